"""Train the stages of an option file in order: each is a run in its own folder, started with an earlier one's weights.

    python main.py -opt options/train_inktrace.json --run-all-stages     all of them, resumed if some were trained
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
    """Train every unfinished stage of a file, or one.

    A stage starts with the best weights of the previous one, unless its `init_from` names something else.

    Args:
        option_file: the file with the stages.
        overrides: what the command line sets, as `options.parse` takes it.
        only: name of a stage; None: all.
        resume: a checkpoint; its stage is resumed and the later ones follow.
        init_from: weights for the first of these stages.
        fresh: move what the stages have into dated folders first.
        command: the command that resumes them, to be printed.
        launch: trains one stage, with the signature of `train`.
    Returns: the exit code.
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
    for name in chain:
        if name not in names and not checkpoint.has_checkpoints(folder_of(opts[name])):  # a sweep over one stage
            elsewhere = [one for one in overrides if not one[0].startswith("path.")]
            opts[name], _ = options.parse(option_file, elsewhere, MODELS, NETWORKS, DATASETS, name)
    for name in names[1:] if resume else names:
        if fresh or not checkpoint.has_checkpoints(folder_of(opts[name])):
            check_origin(name, names, chain, opts)
    with StopRequest(waits=False) as stop:
        for name in names:
            stop.agree()
            if stop.agreed:
                say(f"stopped  by {stop.agreed.name} before stage {name}; resume with: {command}")
                return stop.exit_code
            opt, notices = parsed[name]
            first = name == names[0]
            origin = f", resumed from {resume}" if resume and first else set_origin(name, chain, opts)
            title = f"stage    {name}, {chain.index(name) + 1} of {len(chain)}{origin}"
            code = launch(opt, notices, resume=resume if first else None, init_from=init_from if first else None,
                          fresh=fresh, command=command, preface=[title, *list_overrides(option_file, name, opt)])
            if code:
                return code
    return 0


def say(text: str) -> None:
    if distributed.is_main():
        print(text)


def stage_of(path: str, chain: list[str], only: str | None) -> str:
    """Find the stage that a checkpoint resumes: its own, or `only` where it belongs to no stage of the file.

    Raises: CheckpointError where that is ambiguous, with the options that would be valid.
    """
    name = (checkpoint.locate(path).load_state().get("metadata") or {}).get("stage")
    if only is None and name not in chain:
        raise CheckpointError(f"{path}: is of {f'stage {name!r}' if name else 'no stage'}; choose the stage to "
                              f"resume: {' or '.join(f'--stage {one}' for one in chain)}")
    if only and name in chain and name != only:
        raise CheckpointError(f"{path}: is of stage {name!r}; resume that with --stage {name} --resume {path}, or "
                              f"start {only} with its weights: --stage {only} --init-from {path}")
    return only or name


def folder_of(opt: Mapping[str, Any]) -> Path:
    return Path(options.models_folder(opt))


# ---------------------------------------------------------------- the weights that a stage starts with


def origin_of(name: str, chain: list[str], opts: Mapping[str, Mapping]) -> tuple[str | None, str | None]:
    """Find the source of a stage's first weights: `(earlier stage, None)`, `(None, path)` or `(None, None)`."""
    init_from = opts[name]["path"]["init_from"]
    if init_from is None and name != chain[0]:
        return chain[chain.index(name) - 1], None
    if init_from in chain:
        if chain.index(init_from) >= chain.index(name):
            raise options.OptionError(f"{opts[name]['opt_path']}: stages: {name}: init_from: {init_from!r} is not "
                                      "before it")
        return init_from, None
    return None, None if init_from == "none" else init_from


def check_origin(name: str, names: list[str], chain: list[str], opts: Mapping[str, Mapping]) -> None:
    """Check that a stage can start, before the previous one trains for days. Raises OptionError, CheckpointError."""
    earlier, path = origin_of(name, chain, opts)
    if path and not Path(path).exists():
        parents = Path(path).resolve().parents
        if not any(folder_of(opts[other]).resolve() in parents for other in names[: names.index(name)]):
            before = ", ".join(chain[: chain.index(name)]) or "there is none"
            raise options.OptionError(f"{opts[name]['opt_path']}: stages: {name}: init_from: {path}: no such file; "
                                      f"give one, an earlier stage ({before}), or null for none")
    elif earlier and earlier not in names and not checkpoint.find_newest(folder_of(opts[earlier])):
        raise CheckpointError(f"{folder_of(opts[earlier])}: no checkpoint, but stage {name} starts with the best of "
                              f"{earlier}; run --stage {earlier} or --run-all-stages, or give --init-from FILE or none")
    elif earlier and opts[earlier]["netG"] != opts[name]["netG"]:
        one, two = (options.resolve(MODELS, opt["model"], "model")(
                    {**opt, "device": "cpu", "train": {**opt["train"], "compile": False}})
                    for opt in (opts[earlier], opts[name]))
        two.init_weights(two.netG, one.netG.state_dict(), f"{opts[name]['opt_path']}: stages: {name}: {earlier}",
                         opts[earlier]["netG"], two.opt_train["G_param_strict"])


def set_origin(name: str, chain: list[str], opts: Mapping[str, Mapping]) -> str:
    """Set `path.init_from` to the file that a stage starts with. Returns a description for the log."""
    earlier, path = origin_of(name, chain, opts)
    if earlier and (found := checkpoint.find_best(folder_of(opts[earlier]), say)):
        opts[name]["path"]["init_from"] = str(found.path)
        return f", from the best of {earlier}: {found.path}"
    return f", from {path}" if path else ""


def list_overrides(option_file: str, name: str, opt: Mapping[str, Any]) -> list[str]:
    """List what a stage overrides, one line per key."""
    tree, _ = options.load(option_file)
    over = {key: value for key, value in options.stages_in(tree, option_file)[name].items()
            if key not in ("name", "init_from")}
    before, now = options.flatten(tree), options.flatten(opt)
    rows = [(key, json.dumps(before[key]) if key in before else "default", json.dumps(value),
             "" if now.get(key) == value else f", command line: {json.dumps(now.get(key))}")
            for key, value in options.flatten(over).items()]
    width = max((len(key) for key, *_ in rows), default=0)
    return [f"stage    {key:<{width}}  {old} -> {new}{last}" for key, old, new, last in rows]
