"""Command-line entry point: arguments -> options -> train() or another command.

    python main.py -opt options/train_vrt.json            train; the same command again resumes
    python main.py -opt FILE --resume PATH                resume from the checkpoint that you name
    python main.py --resume PATH                          the same with the options in the checkpoint
    python main.py -opt FILE --set train.total_iter=1000  set any option from the command line
    python main.py -opt FILE --dry-run                    try everything once without training
    torchrun --nproc_per_node=2 main.py -opt FILE         train on several processes; scripts/train.slurm: several nodes
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next imports take a tenth of a second: no traceback of them

import shlex
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from commands import arguments
from runtime import signals

if __name__ == "__main__":
    signals.begin_program()  # the imports below take seconds
    arguments.answer(sys.argv[1:], __doc__)  # --help, or a mistake that is found without them

import checkpoint
import options
from checkpoint import CheckpointError
from commands import dry_run
from commands.infer import infer
from commands.prove import prove
from commands.replay import replay
from commands.stages import train_stages
from data import DATASETS
from models import MODELS, NETWORKS
from runtime import distributed
from runtime.hooks import Hooks
from train import NonFiniteLoss, train


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
    config = found.load_state().get("config") or {}
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
    line = arguments.read(argv, __doc__, saved_options)
    args, source, tree = line.args, line.source, line.tree
    alone = args.prove_resume is not None or args.replay is not None or args.dry_run or args.input
    if distributed.world_size() > 1 and alone:
        raise options.OptionError("--prove-resume, --replay, --dry-run and --input are for one process: leave torchrun "
                                  "out")
    stages = [] if tree else options.stage_names(source)
    if (args.stage or args.run_all_stages) and not stages:
        raise options.OptionError(f"{source}: has no stages; leave --stage and --run-all-stages out")
    overrides = arguments.overrides_in(args, line.flags)
    if args.prove_resume is not None:
        return prove(source, overrides, args.prove_resume, args.stage or next(iter(stages), None))
    command = resume_command(argv, saved=bool(tree))
    launch = partial(dry_run.dry_run, hooks=hooks) if args.dry_run else \
        partial(train, hooks=[dry_run.FirstLook(), *hooks])
    if args.replay is not None:
        launch = partial(replay, args.replay)
    if stages and not args.test:
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
            arguments.print_error(error)
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
