"""The command line: its flags, those of an option file, and what is wrong with them. It is read without torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import options
from log.terminal import status
from storage.words import is_key, word_here

OPTION_FILES = str(Path(__file__).resolve().parent.parent / "options")


@dataclass
class CommandLine:
    """What the user typed. Without -opt, the options are those in the checkpoint that --resume names."""

    args: argparse.Namespace
    flags: Mapping[str, Any]  # each with what it sets: those of every run, and of the option file's `cli` table
    source: str  # option file or checkpoint
    tree: dict | None  # options in the checkpoint


def read(argv: Sequence[str], about: str, options_in: Callable[[str], dict] | None = None) -> CommandLine | None:
    """Read the arguments; --help prints `about` and the flags, and exits.

    Args: options_in: returns the options in a checkpoint. Without it, None is returned where they are needed.
    Raises: OptionError, one line.
    """
    first, _ = parser_for(options.FLAGS, add_help=False).parse_known_args(argv)
    flags, tree = dict(options.FLAGS), None
    first.opt = first.opt or options.find_option_file(argv, OPTION_FILES)
    if first.opt:
        flags |= options.cli_table(first.opt)
    elif first.resume and not options_in:
        return None
    elif first.resume:
        tree = options_in(first.resume)
        flags |= options.check_cli(tree.get("cli", {}), first.resume)
    try:
        parser = parser_for(flags, description=about)
    except argparse.ArgumentError as error:  # the name of a flag that is here already
        raise options.OptionError(f"{first.opt or first.resume}: cli: {error}; name the flag otherwise") from None
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise options.OptionError(unknown_arguments(unknown, flags, argv))
    if not (source := first.opt or args.resume):
        raise options.OptionError("which run? give an option file: python main.py -opt options/train_vrt.json")
    if (args.dist or args.launcher) and not {"WORLD_SIZE", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"} & set(os.environ):
        raise options.OptionError("--dist and --launcher: torchrun starts several processes: torchrun "
                                  "--nproc_per_node=2 main.py ..., or sbatch scripts/train.slurm ...")
    if args.prove_resume is not None and not first.opt:
        raise options.OptionError("--prove-resume needs an option file: -opt FILE")
    if not args.test and args.prove_resume is None and (args.input or args.output or args.truth):
        raise options.OptionError("--input, --output and --truth go with --test")
    overrides_in(args, flags)  # what is wrong with one of them
    return CommandLine(args, flags, source, tree)


def answer(argv: Sequence[str], about: str) -> None:
    """Print --help or a mistake in the arguments, and exit; else return.

    A single process only: of several, the first one to fail prints.
    """
    try:
        if "WORLD_SIZE" not in os.environ:
            read(argv, about)
    except options.OptionError as error:
        print_error(error)
        sys.exit(2)


def print_error(error: Exception | str) -> None:
    """Print a user's mistake, and the folders that were expected."""
    print(f"{status('error:', sys.stderr)} {error}", file=sys.stderr)
    if drawing := getattr(error, "drawing", ""):
        print(drawing, file=sys.stderr)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise options.OptionError(f"{message}; see --help")


def parser_for(flags: dict[str, str], **settings) -> argparse.ArgumentParser:
    """Build the parser: the flags of every run, and those of an option file's `cli` table."""
    parser = Parser(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
    parser.add_argument("-opt", "--opt", "--config", metavar="FILE", help="option file, e.g. options/train_vrt.json")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", metavar="PATH",
                       help="resume from this checkpoint: a member of a set, its record (500.json) or a folder")
    start.add_argument("--init-from", "--init_from", metavar="FILE",
                       help="start with these weights, matched by name and shape")
    parser.add_argument("--fresh", action="store_true", help="archive what the run has and start over")
    stages = parser.add_mutually_exclusive_group()
    stages.add_argument("--stage", metavar="NAME", help="train only this stage of the file")
    stages.add_argument("--run-all-stages", "--run_all_stages", action="store_true",
                        help="train all stages, each from the best weights of the previous one (the default)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true",
                         help="try data, steps, a validation and a save once without training, and print a table")
    instead.add_argument("--test", action="store_true", help="test without training: on the test sets, or with --input")
    parser.add_argument("--input", metavar="PATH", help="with --test: test on these files: a folder, a video")
    parser.add_argument("--output", metavar="PATH",
                        help="with --test: write results here, a folder or a video; partial output is resumed")
    parser.add_argument("--truth", metavar="PATH", help="with --test: the ground truth of the inputs, for metrics")
    instead.add_argument("--prove-resume", type=int, nargs="?", const=6, metavar="N",
                         help="compare N steps with N steps that are killed halfway and resumed; default 6")
    instead.add_argument("--replay", type=int, metavar="N",
                         help="compute step N twice from the newest checkpoint before it, and print what it saw")
    parser.add_argument("--quiet", action="store_true", help="print only warnings, errors and the last line")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard records, in log/tensorboard")
    parser.add_argument("--wandb", action="store_true", help="also write to Weights & Biases")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set any option")
    for name in ("--dist", "--launcher", "--local-rank", "--local_rank"):  # KAIR's: torchrun replaces them
        parser.add_argument(name, nargs="?", const=True, help=argparse.SUPPRESS)
    for flag, keys in flags.items():
        names = dict.fromkeys([f"--{flag}", f"--{flag.replace('_', '-')}"])
        text = f"set {', '.join(options.keys_of(keys))}".replace("%", "%%")
        parser.add_argument(*names, dest=f"flag_{flag}", metavar="VALUE", help=text)
    return parser


def overrides_in(args: argparse.Namespace, flags: dict[str, str]) -> list[tuple[str, object, str]]:
    """Collect the options that the command line sets, as (key path, value, flag)."""
    found = [(key, value, f"--{flag}") for flag, keys in flags.items()
             if (text := getattr(args, f"flag_{flag}")) is not None
             for key, value in options.set_by_flag(flag, keys, text).items()]
    found += [(f"log.{key}", True, f"--{key}") for key in ("quiet", "tensorboard", "wandb") if getattr(args, key)]
    for text in args.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise options.OptionError(f"--set {text}: write it as section.key=value")
        found.append((key.strip(), options.parse_value(value), "--set"))
    return found


def unknown_arguments(unknown: Sequence[str], flags: dict[str, str], argv: Sequence[str]) -> str:
    """Return a message about arguments that no flag takes, with what they are here.

    Args: unknown: those arguments. flags: those of the option file, if any, and of every run. argv: all arguments.
    """
    known = {key: f"--{flag} VALUE" for flag, keys in flags.items() for key in options.keys_of(keys)}
    shipped = options.option_files_with(argv, OPTION_FILES)
    found = []
    for word in (word.partition("=")[0] for word in unknown):
        name = word.lstrip("-").replace("-", "_")
        if others := [path for path in shipped if name in options.cli_table(path) and name not in flags]:
            found.append(f"{word}: a flag of {' and '.join(map(os.path.relpath, others))}; name one with -opt")
        elif word.startswith("-") and (here := word_here(word)):
            found.append(f"{word}: here it is " + (known.get(here, f"--set {here}=VALUE") if is_key(here) else here))
        elif os.path.isfile(word):
            found.append(f"{word}: an option file is named with -opt {word}")
    return "; ".join(found or [f"unrecognized arguments: {' '.join(unknown)}; see --help"])
