"""Run a command with stand-ins for CUDA cards; see the package."""

import argparse
import shutil
import sys

from tests import card

parser = argparse.ArgumentParser(prog="python -m tests.card", description=card.__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cards", type=int, default=1, help="how many")
parser.add_argument("--memory", type=int, help="MB of each; default: 80 GB")
parser.add_argument("--idle", action="store_true", help="kernels compute nothing")
parser.add_argument("command", nargs=argparse.REMAINDER)
args = parser.parse_args()
if not args.command or not shutil.which(args.command[0]):
    parser.error(f"give a command that exists, not {' '.join(args.command[:1]) or 'none'}")
sys.exit(card.run(args.command, cards=args.cards, memory=args.memory, idle=args.idle))
