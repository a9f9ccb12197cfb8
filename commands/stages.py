"""The stages of an option file, in their order: each is a run in a folder of its own, begun with weights of another.

    python main.py -opt options/train_inktrace.json --run-all-stages     all of them; again: goes on where it stopped
    python main.py -opt options/train_inktrace.json --stage dense        one
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import checkpoint
import options
from checkpoint import CheckpointError
from data import DATASETS
from models import MODELS, NETWORKS
from runtime import distributed
from runtime.signals import StopRequest
from train import train

Override = tuple[str, Any, str]


def train_stages(option_file: str, overrides: Iterable[Override], only: str | None = None, *, resume: str | None = None,
                 init_from: str | None = None, fresh: bool = False, command: str = "",
                 launch: Callable[..., int] = train) -> int:
    """Train every stage of a file, or one; what is finished is not repeated. Returns the exit code.

    A stage begins with the best weights of the one before, unless its `init_from` says other.

    Args:
        only: name of a stage; None: all. resume: a checkpoint, with whose stage to go on. init_from: weights for the
            first of these stages. fresh: put away what they have. command: what goes on, to be printed.
        launch: what to do with each, as `train`.
    Raises: OptionError, CheckpointError: one line, before anything is trained; NonFiniteLoss.
    """
    chain = options.stage_names(option_file)
    if resume:
        stage = stage_of(resume, chain, only)
        names = [only] if only else chain[chain.index(stage):]
    else:
        names = chain if only is None else [only]
    parsed = {}
    for name in dict.fromkeys([*names, *chain]):
        own = [("path.init_from", init_from, "--init-from")] if init_from and name == names[0] else []
        parsed[name] = options.parse(option_file, [*overrides, *own], MODELS, NETWORKS, DATASETS, name)
    opts = {name: opt for name, (opt, _) in parsed.items()}
    for name in names[1:] if resume else names:
        if fresh or not checkpoint.has_traces(folder_of(opts[name])):
            check_origin(name, names, chain, opts)
    with StopRequest(waits=False) as stop:
        for name in names:
            stop.settle()
            if stop.agreed:
                say(f"stopped  by {stop.agreed.name} before stage {name}; go on with: {command}")
                return stop.exit_code
            opt, notices = parsed[name]
            first = name == names[0]
            said = f", resumed from {resume}" if resume and first else resolve_origin(name, chain, opts)
            code = launch(opt, notices, resume=resume if first else None, init_from=init_from if first else None,
                          fresh=fresh, command=command, preface=[f"stage    {name}, {chain.index(name) + 1} of "
                                                                 f"{len(chain)}{said}", *table(option_file, name, opt)])
            if code:
                return code
    return 0


def say(text: str) -> None:
    if distributed.is_main():
        print(text)


def stage_of(path: str, chain: list[str], only: str | None) -> str:
    """The stage to resume with a checkpoint: its own, or what --stage says of one that is of none of these.

    Raises: CheckpointError where that is not clear, with what to type instead.
    """
    name = (checkpoint.locate(path).load().get("state", {}).get("metadata") or {}).get("stage")
    if only is None and name not in chain:
        raise CheckpointError(f"{path}: is of {f'stage {name!r}' if name else 'no stage'}; say which of the stages it "
                              f"is to resume: {' or '.join(f'--stage {one}' for one in chain)}")
    if only and name in chain and name != only:
        raise CheckpointError(f"{path}: is of stage {name!r}; resume that with --stage {name} --resume {path}, or "
                              f"start {only} with its weights: --stage {only} --init-from {path}")
    return only or name


def folder_of(opt: Mapping[str, Any]) -> Path:
    return Path(options.models_folder(opt))


# ---------------------------------------------------------------- what a stage begins with


def origin_of(name: str, chain: list[str], opts: Mapping[str, Mapping]) -> tuple[str | None, str | None]:
    """`(earlier stage, None)`, `(None, path)`, or neither, as the options say."""
    said = opts[name]["path"]["init_from"]
    if said is None and name != chain[0]:
        return chain[chain.index(name) - 1], None
    if said in chain:
        if chain.index(said) >= chain.index(name):
            raise options.OptionError(f"{opts[name]['opt_path']}: stages: {name}: init_from: {said!r} is not before it")
        return said, None
    return None, None if said == "none" else said


def check_origin(name: str, names: list[str], chain: list[str], opts: Mapping[str, Mapping]) -> None:
    """Find out now, not after the stage before has trained for days, whether a stage can begin."""
    earlier, path = origin_of(name, chain, opts)
    if path and not Path(path).exists():
        made = [other for other in names[: names.index(name)]
                if folder_of(opts[other]).resolve() in Path(path).resolve().parents]
        if not made:
            before = ", ".join(chain[: chain.index(name)]) or "there is none"
            raise options.OptionError(f"{opts[name]['opt_path']}: stages: {name}: init_from: {path}: no such file; "
                                      f"give one, an earlier stage ({before}), or null for none")
    elif earlier and earlier not in names and not checkpoint.find_newest(folder_of(opts[earlier])):
        raise CheckpointError(f"{folder_of(opts[earlier])}: no checkpoint, but stage {name} begins with the best of "
                              f"{earlier}; run --stage {earlier} or --run-all-stages, or say --init-from FILE or none")
    elif earlier and opts[earlier]["netG"] != opts[name]["netG"]:
        one, two = (options.resolve(MODELS, opt["model"], "model")(
                    {**opt, "device": "cpu", "train": {**opt["train"], "compile": False}})
                    for opt in (opts[earlier], opts[name]))
        two.init_weights(two.netG, one.netG.state_dict(), f"{opts[name]['opt_path']}: stages: {name}: {earlier}",
                         opts[earlier]["netG"], two.opt_train["G_param_strict"])


def resolve_origin(name: str, chain: list[str], opts: Mapping[str, Mapping]) -> str:
    """Put the file that a stage begins with in its options. Returns words for the log."""
    earlier, path = origin_of(name, chain, opts)
    if earlier and (found := checkpoint.find_best(folder_of(opts[earlier]), say)):
        opts[name]["path"]["init_from"] = str(found.path)
        return f", from the best of {earlier}: {found.path}"
    return f", from {path}" if path else ""


def table(option_file: str, name: str, opt: Mapping[str, Any]) -> list[str]:
    """What a stage overrides, a line each."""
    tree, _ = options.load(option_file)
    over = {key: value for key, value in options.stages_in(tree, option_file)[name].items()
            if key not in ("name", "init_from")}
    before, now = options.flatten(tree), options.flatten(opt)
    rows = [(key, json.dumps(before[key]) if key in before else "default", json.dumps(value),
             "" if now.get(key) == value else f", command line: {json.dumps(now.get(key))}")
            for key, value in options.flatten(over).items()]
    width = max((len(key) for key, *_ in rows), default=0)
    return [f"stage    {key:<{width}}  {old} -> {new}{last}" for key, old, new, last in rows]
