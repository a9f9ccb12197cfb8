"""Command-line entry point: arguments -> options -> train() or another command.

    python main.py -opt options/train_vrt.json            train; the same command again resumes
    python main.py -opt FILE --resume PATH                resume from the checkpoint that you name
    python main.py --resume PATH                          the same with the options in the checkpoint
    python main.py -opt FILE --set train.total_iter=1000  set any option from the command line
    python main.py -opt FILE --dry-run                    try everything once without training
    torchrun --nproc_per_node=2 main.py -opt FILE         train on several processes; scripts/train.slurm: several nodes
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from runtime import signals

if __name__ == "__main__":
    signals.begin_program()  # the imports below take seconds

import checkpoint
import options
from checkpoint import CheckpointError
from commands import dry_run
from commands.infer import infer
from commands.prove import prove
from commands.replay import replay
from commands.stages import train_stages
from data import DATASETS
from log.terminal import status
from models import MODELS, NETWORKS
from runtime import distributed
from runtime.hooks import Hooks
from storage.words import is_key, word_here
from train import NonFiniteLoss, train


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise options.OptionError(f"{message}; see --help")


def parser_for(flags: dict[str, str], **settings) -> argparse.ArgumentParser:
    """Build the parser: the flags of every run, and those of an option file's `cli` table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, **settings)
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
        text = f"set {', '.join(options.keys_of(keys))}"
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
    shipped = options.option_files_with(argv, str(Path(__file__).parent / "options"))
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


def resume_command(argv: list[str], saved: bool) -> str:
    """Return the command that resumes this run: the same one without the flags that choose another start.

    Args: saved: the options came from the checkpoint that was named, so its folder stays named.
    """
    kept, skip = [], False
    for word, after in zip(argv, [*argv[1:], ""]):
        if skip or word == "--fresh":
            skip = False
        elif saved and (word == "--resume" or word.startswith("--resume=")):
            skip = word == "--resume"
            path = Path(after if skip else word.partition("=")[2])
            kept += ["--resume", str(path if path.is_dir() else path.parent)]
        elif word in ("--resume", "--init-from", "--init_from"):
            skip = True
        elif not word.startswith(("--resume=", "--init-from=", "--init_from=")):
            kept.append(word)
    return shlex.join([*distributed.launcher(), *kept])


def saved_options(path: str) -> dict:
    """Load the options stored in a checkpoint. The run's folder may have been moved.

    Raises: OptionError if the file stores no options of this program.
    """
    found = checkpoint.locate(path)
    config = found.load().get("state", {}).get("config") or {}
    if not options.is_perdure_config(config):
        raise options.OptionError(f"{path}: stores no options of this program; give an option file with -opt")
    folder = found.folder.resolve()
    if folder != Path(options.models_folder(config)).resolve():
        tail = Path(config["task"], "models").parts
        if config["path"]["models"] or folder.name != "models":
            config["path"]["models"] = str(folder)
        else:
            if folder.parts[-len(tail):] != tail:  # another name as well
                tail = folder.parts[-2:]
                config["task"] = tail[0]
            config["path"]["root"] = str(folder.parents[len(tail) - 1])
    config.get("checkpoint", {}).pop("after_save", None)  # what a file holds is never run
    return config


def main(argv: list[str], hooks: Sequence[Hooks] = ()) -> int:
    """Run the command that the arguments name. Returns the exit code.

    Raises: OptionError, CheckpointError, NonFiniteLoss: one line for the user.
    """
    first, _ = parser_for(options.FLAGS, add_help=False).parse_known_args(argv)
    flags, tree = dict(options.FLAGS), None
    first.opt = first.opt or options.find_option_file(argv, str(Path(__file__).parent / "options"))
    if first.opt:
        flags |= options.cli_table(first.opt)
    elif first.resume:
        tree = saved_options(first.resume)
        flags |= options.check_cli(tree.get("cli", {}), first.resume)
    args, unknown = parser_for(flags).parse_known_args(argv)
    if unknown:
        raise options.OptionError(unknown_arguments(unknown, flags, argv))
    source = first.opt or args.resume
    if not source:
        raise options.OptionError("which run? give an option file: python main.py -opt options/train_vrt.json")
    if (args.dist or args.launcher) and not distributed.launched() and "WORLD_SIZE" not in os.environ:
        raise options.OptionError("--dist and --launcher: torchrun starts several processes: torchrun "
                                  "--nproc_per_node=2 main.py ..., or sbatch scripts/train.slurm ...")
    alone = args.prove_resume is not None or args.replay is not None or args.dry_run or args.input
    if distributed.world_size() > 1 and alone:
        raise options.OptionError("--prove-resume, --replay, --dry-run and --input are for one process: leave torchrun "
                                  "out")
    stages = [] if tree else options.stage_names(source)
    if (args.stage or args.run_all_stages) and not stages:
        raise options.OptionError(f"{source}: has no stages; leave --stage and --run-all-stages out")
    overrides = overrides_in(args, flags)
    if args.prove_resume is not None:
        if tree:
            raise options.OptionError("--prove-resume needs an option file: -opt FILE")
        return prove(source, overrides, args.prove_resume, args.stage or next(iter(stages), None))
    command = resume_command(argv, saved=bool(tree))
    launch = partial(dry_run.dry_run, hooks=hooks) if args.dry_run else \
        partial(train, hooks=[dry_run.FirstLook(), *hooks])
    if args.replay is not None:
        launch = partial(replay, args.replay)
    if not args.test:
        if args.input or args.output or args.truth:
            raise options.OptionError("--input, --output and --truth go with --test")
        if stages:
            only = args.stage or (stages[-1] if args.replay is not None else None)
            return train_stages(source, overrides, only, resume=args.resume, init_from=args.init_from,
                                fresh=args.fresh, command=command, launch=launch)
    if args.init_from:
        overrides.append(("path.init_from", args.init_from, "--init-from"))
    stage = args.stage or (stages[-1] if stages else None)
    opt, notices = options.parse(source, overrides, MODELS, NETWORKS, DATASETS, stage, tree)
    if args.test:
        return infer(opt, notices, resume=args.resume, source=args.input, output=args.output, truth=args.truth,
                     command=shlex.join([*distributed.launcher(), *argv]))
    return launch(opt, notices, resume=args.resume, init_from=args.init_from, fresh=args.fresh, command=command)


def program(argv: list[str], hooks: Sequence[Hooks] = ()) -> None:
    """Run `main` as this process and exit. A failure of any rank ends all, and its cause is printed once."""
    signals.begin_program()
    try:
        distributed.start()
        with signals.program(end_others):
            code = main(argv, hooks)
        distributed.finish()
    except (options.OptionError, CheckpointError, NonFiniteLoss) as error:
        code = 1 if isinstance(error, NonFiniteLoss) else 2
        if distributed.fail(f"error: {error}", code):
            print(f"{status('error:', sys.stderr)} {error}", file=sys.stderr)
            if drawing := getattr(error, "drawing", ""):
                print(drawing, file=sys.stderr)
    except Exception as error:
        code = 1
        distributed.wait_for_cause(error)
        if distributed.fail(f"{type(error).__name__}: {error}"):
            traceback.print_exc()
        else:
            code = distributed.code_of_failure()  # another rank failed first and printed the cause
    if code > 128 and (code := code_of_stop(code)) > 128:
        signals.end_by_signal(code - 128)
    distributed.exit_process(code)


def code_of_stop(code: int) -> int:
    """Return 0 below torchrun, which would restart a failed process, and leave a mark for scripts/train.slurm."""
    if not distributed.launched():
        return code
    if mark := os.environ.get("PERDURE_STOPPED"):
        Path(mark).touch()
    return 0


def end_others(number: int) -> tuple[bool, int | None]:
    """End all ranks for a signal before the first step: see `signals.program`."""
    code = code_of_stop(128 + number)
    return distributed.fail(f"stopped by signal {number}", code, record=False), None if code else 0


if __name__ == "__main__":
    program(sys.argv[1:])
