"""Read a JSON or YAML option file, merge what overrides it, and check every key against what reads it.

Order: defaults < `extends` < file < stage < command line. The signature of a component is its schema, so that an
unknown key, a wrong type or a missing value is found before a file is created. KAIR's option files are read unmodified.
"""

from __future__ import annotations

import collections.abc
import copy
import difflib
import importlib
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal

from models import KAIR_ONLY
from runtime.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Range
from storage import param_json
from storage.words import foreign_sections, word_here

Table = Mapping[str, str]  # name in an option file -> "module:Class", imported when asked for
Schema = dict[str, tuple[Any, Any]]  # key -> (annotation, default or REQUIRED)
REQUIRED = inspect.Parameter.empty


class OptionError(ValueError):
    """Raised for a user's mistake: one line with what, where, and what would be valid."""

    drawing = ""  # of the folders that were expected, printed below the line


class Section(dict):
    """A JSON object that knows its place in the option file, for messages."""

    where: str = "options"
    origins: Mapping[str, str] = {}  # at the top: key path -> the file or flag that set it; absent: the default


# ---------------------------------------------------------------- sections that every run has


@dataclass
class Path:
    """The `path` section."""

    root: str = "experiments"  # folder of all runs; a run's own folder is root/task
    pretrained_netG: str | None = None  # file of weights to start G from when the run has no checkpoint yet
    pretrained_netE: str | None = None  # file of weights to start the moving average E from; null: a copy of G
    # Checkpoint or weights to start from where networks differ: tensors are matched by name. --init-from and stages
    # set it; "none" overrides what a stage would set.
    init_from: str | None = None
    # Second folder of all runs, e.g. on a slow shared disk: each checkpoint is copied to mirror/task/models in the
    # background, and a run resumes from there if its own folder has none as new.
    mirror: str | None = None
    models: str | None = None  # folder of the checkpoints, with images, log and options below; null: root/task/models


@dataclass
class Checkpoint:
    """The `checkpoint` section."""

    layout: Literal["split", "bundle"] = "split"  # several files ({iter}_G.pth, ...) or one file for a checkpoint
    # File name of each bundle, with the fields epoch and iter; null: keep only the latest and the best bundle.
    name: str | None = "epoch_{epoch:04d}.pt"
    latest: str | None = "latest.pt"  # hard link to the newest bundle (split: latest.json); null: no link
    best: str | None = "best.pt"  # hard link to the bundle of the best validation (split: best.json); null: no link
    interrupted: str = "interrupted.pt"  # bundle saved by a stop or by the clock; the next save removes it
    # Minutes without a save after which one is made besides the regular ones; it is kept until the next save; 0: none.
    every_minutes: NonNegativeFloat = 10
    keep_last_n: PositiveInt | None = None  # how many checkpoints to keep, besides the best; null: all
    best_metric: str | None = None  # column of test.csv that decides the best, or its end ("psnr"); null: the model's
    best_mode: Literal["max", "min"] | None = None  # whether larger or smaller is better; null: the model's
    # Command that is run in the background after each save, a line for the shell or a list of words; it gets the files
    # of the checkpoint as arguments, the commit record last. Its failure is a warning.
    after_save: str | list[str] | None = None
    # What a failed save does: end the run, or warn and save again at the next interval.
    on_save_error: Literal["stop", "warn"] = "stop"
    # Whether files are written in the background while training continues; auto: on CUDA.
    background: Literal["auto"] | bool = field(default="auto", metadata={"key": "async"})


@dataclass
class Log:
    """The `log` section."""

    quiet: bool = False  # print only warnings, errors and how the run ended; the log files get everything
    tensorboard: bool = False  # write TensorBoard's files to log/tensorboard, too; needs the extra "tensorboard"
    wandb: bool = False  # write to Weights & Biases, too; needs the extra "wandb"


@dataclass
class Top:
    """The top level of an option file; `net*`, `train` and `val` are checked against the classes that they name."""

    task: str  # name of the run, and of its folder below path.root
    model: str  # recipe of the run, a name of models.MODELS
    datasets: dict  # training set and test sets by name: {"train": {...}, "test": {...}}
    netG: dict  # network to train: {"net_type": ..., and the keys of that network}
    train: dict  # section of the training: steps, losses, optimizers, learning rates
    description: str = ""  # note for people; the program does not read it
    scale: PositiveInt = 1  # upscaling factor, handed to every dataset
    n_channels: PositiveInt = 3  # channels of an image, handed to every dataset
    device: str = "auto"  # device to train on: "auto", "cpu", "cuda" or "cuda:N"
    # CPU threads of each process; sums may depend on it, so set it if a run may change machines; null: torch's number.
    num_threads: Annotated[int, Range(ge=1, le=1024)] | None = None
    deterministic: bool = False  # use only deterministic kernels (CUDA); an operation without one is an error
    val: dict = field(default_factory=dict)  # section of the validation and of --test
    path: dict = field(default_factory=dict)  # section of folders and of weights to start from
    checkpoint: dict = field(default_factory=dict)  # section of the files that a save writes and keeps
    log: dict = field(default_factory=dict)  # section of what is printed and logged
    cli: dict = field(default_factory=dict)  # flags that this file adds to the command line: {"flag": "key.path"}
    # Stages of the run, in order, each {"name", "init_from", and the keys of this file that it overrides}.
    stages: list[dict] = field(default_factory=list)
    stage: str | None = None  # name of the stage that this run is; --stage sets it
    gpu_ids: list[NonNegativeInt] | None = None  # numbers of the CUDA devices, one for each process
    dist: bool = False  # KAIR's switch for several processes, not needed here: torchrun sets their number
    # Compute batch norm over the rows of all processes (CUDA only); results then depend on the number of processes.
    sync_batchnorm: bool = False


@dataclass
class Loader:
    """The keys of a `datasets` entry that are for the loader, not for the dataset."""

    dataset_type: str  # kind of the dataset, a name of data.DATASETS
    phase: str = ""  # "train" or "test", for KAIR's files; the entry's own name decides
    name: str | None = None  # label for people; the program does not read it
    dataloader_batch_size: PositiveInt = 1  # samples per optimizer step, all processes together
    # Worker processes of each process that read samples; 0: it reads them itself; "auto": with CUDA one for each CPU
    # core that it has beyond its own, at most 8, else 0. Results do not depend on it.
    dataloader_num_workers: Annotated[int, Range(ge=0, le=1024)] | Literal["auto"] = "auto"
    dataloader_shuffle: bool = True  # draw a new order of the samples for each epoch, from train.manual_seed


# Flags of every option file; its own `cli` table adds to them or redirects them.
FLAGS = {
    "lr": "train.G_optimizer_lr",
    "epochs": "train.total_epochs",
    "batch_size": "datasets.train.dataloader_batch_size",
    "save_dir": "path.root",
    "device": "device",
    "seed": "train.manual_seed",
}

# Keys of KAIR's files, and of ours from earlier versions, that are not used here: they pass with a notice.
UNUSED = {
    "dist_timeout": "train.watchdog is used",
    "merge_bn": "", "merge_bn_startpoint": "", "is_train": "", "num_gpu": "", "rank": "", "world_size": "",
    "find_unused_parameters": "gradients are summed after the backward pass",
    "use_static_graph": "gradients are summed after the backward pass",
    "netG.init_type": "each network initialises itself", "netG.scale": "netG.upscale is used",
    "train.G_regularizer_orthstep": "", "train.G_regularizer_clipstep": "",
    "train.G_optimizer_reuse": "the optimizer is always saved and restored",
    "train.F_feature_layer": "", "train.F_weights": "", "train.F_lossfn_type": "", "train.F_use_input_norm": "",
    "train.F_use_range_norm": "",
    "path.log": "it is in the run's folder", "path.task": "it is root/task",
    "path.images": "it is in the run's folder", "path.options": "it is in the run's folder",
    "path.pretrained_optimizerG": "resume restores it",
    "datasets.*.interval_list": "a sequence of Vimeo-90K is taken as it is",
    "datasets.*.dataroot_lq": "this dataset makes L of dataroot_gt",
    "checkpoint.mode": "checkpoint.name null keeps only the latest and the best",
    "model_args": "", "train_args": "",  # the rest of a param.json
    "perceptual_weight": f"without {' and '.join(param_json.LPIPS_FILES)} it is 0",
}


# ---------------------------------------------------------------- reading


def blank_comments(text: str) -> str:
    """Replace `//` comments outside strings by blanks, so that lines and columns in messages are right."""
    return re.sub(r'"(?:\\.|[^"\\\n])*"?|//[^\n]*',
                  lambda found: " " * len(found[0]) if found[0].startswith("/") else found[0], text)


def parse_yaml(text: str) -> Any:
    """Parse YAML to the values that JSON has. Raises OptionError without PyYAML, ValueError for invalid text."""
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise OptionError("a YAML file needs PyYAML: pip install pyyaml; or write it as JSON") from None
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d.]*[eE][-+]?\d+$"),
                                 list("-+0123456789"))  # 1e-3, which PyYAML takes for a text
    try:
        return json.loads(json.dumps(yaml.load(text, loader), default=str))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise json.JSONDecodeError(f"{error.problem}", text, mark.index if mark else 0) from None


def read_file(path: str) -> dict:
    """Read the object in a JSON file with `//` comments, or a YAML file. Raises OptionError with line and column."""
    kind = "YAML" if path.endswith((".yaml", ".yml")) else "JSON"
    try:
        with open(path, encoding="utf-8-sig") as file:  # without the byte order mark that some editors write
            text = file.read()
        tree = parse_yaml(text) if kind == "YAML" else json.loads(blank_comments(text))
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise OptionError(f"{path}: no such option file; the shipped ones are in options/") from None
    except IsADirectoryError:
        found = sorted(os.path.join(path, name) for name in os.listdir(path) if re.search("json$|ya?ml$", name))
        found.append("options/train_vrt.json")
        raise OptionError(f"{path}: is a folder; name an option file, e.g. {found[0]}") from None
    except json.JSONDecodeError as error:
        raise OptionError(f"{path}:{error.lineno}:{error.colno}: not valid {kind}: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:  # e.g. a number of 5000 digits
        raise OptionError(f"{path}: can't be read as a {kind} text file: {error}") from None
    if not isinstance(tree, dict):
        raise OptionError(f"{path}: an option file holds one {kind} object, not a {type(tree).__name__}")
    return tree


def load(path: str, chain: tuple[str, ...] = ()) -> tuple[dict, dict[str, str]]:
    """Read a file merged over what it extends. Returns the options, and for each key path the file that set it."""
    real = os.path.realpath(path)
    if real in chain:
        names = [os.path.relpath(p) for p in (*chain[chain.index(real):], real)]
        raise OptionError(f"{path}: 'extends' forms a cycle: {' -> '.join(names)}")
    tree = read_file(path)
    if param_json.is_param_json(tree):
        try:
            converted = param_json.convert(tree, path)
        except ValueError as error:
            raise OptionError(f"{path}: {error}") from None
        own = {key: tree[key] for key in tree if key not in ("model_type", "model_args", "train_args")}
        tree = merge(converted, own, {}, path)
    shipped = os.path.join(os.path.dirname(os.path.abspath(__file__)), "options")
    if sentence := foreign_sections(tree, os.path.relpath(shipped, os.path.dirname(real))):
        raise OptionError(f"{path}: {sentence}")
    base = tree.pop("extends", None)
    if base is None:
        merged, origins = {}, {}
    elif isinstance(base, str):
        merged, origins = load(os.path.join(os.path.dirname(path), base), (*chain, real))
    else:
        raise OptionError(f"{path}: extends: must be the path of one option file, not {json.dumps(base)}")
    return merge(merged, tree, origins, path), origins


def cli_table(path: str) -> dict[str, Any]:
    """Return the `cli` table of an option file, see `check_cli`. Raises OptionError."""
    return check_cli(load(path)[0].get("cli", {}), path)


def check_cli(table: Any, path: str) -> dict[str, Any]:
    """Check a `cli` table: each flag has a key path, a list of them, or an object {word: {key path: value}}.

    A name that another flag has is found by `commands.arguments`. Raises: OptionError.
    """
    targets = table.values() if isinstance(table, dict) else [None]
    if not all(isinstance(part, dict if isinstance(target, dict) else str) for target in targets
               for part in (target.values() if isinstance(target, dict) else
                            target if isinstance(target, list) else [target])):
        raise OptionError(f'{path}: cli: must be an object of {{"flag": "section.key"}}, of lists of keys, or of '
                          '{"flag": {"word": {"section.key": value}}}')
    for flag in table:
        if not re.fullmatch(r"\w[\w-]*", flag):
            raise OptionError(f"{path}: cli: {json.dumps(flag)} must be the name of a flag, of letters, digits, _ -")
    return table


def keys_of(target: Any) -> list[str]:
    """Return the key paths that a flag of a `cli` table sets."""
    if isinstance(target, dict):
        return list(dict.fromkeys(key for setting in target.values() for key in setting))
    return [key.partition("=")[0] for key in (target if isinstance(target, list) else [target])]


def set_by_flag(flag: str, target: Any, text: str) -> dict[str, Any]:
    """Return the values, by key path, that a flag of a `cli` table sets when it is given a text.

    A key may name another value: `"section.key={}/images"` puts the text in place of the braces.
    """
    if not isinstance(target, dict):
        parts = [key.partition("=") for key in (target if isinstance(target, list) else [target])]
        return {key: parse_value(value.replace("{}", text) if equals else text) for key, equals, value in parts}
    if text not in target:
        raise OptionError(f"--{flag}: unknown '{text}'; {closest(text, target)}")
    return target[text]


def find_option_file(argv: Iterable[str], folder: str) -> str | None:
    """Return the option file in a folder that defines most of the flags in `argv`; None if none or several do."""
    found = option_files_with(argv, folder)
    return found[0] if len(found) == 1 else None


def option_files_with(argv: Iterable[str], folder: str) -> list[str]:
    """Return the option files in a folder that define most of the flags in `argv`, if any does."""
    if not os.path.isdir(folder):
        return []
    words = {word.lstrip("-").partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    counts = {os.path.join(folder, name): len(words & (set(cli_table(os.path.join(folder, name))) - set(FLAGS)))
              for name in sorted(os.listdir(folder)) if name.endswith(".json")}
    return [path for path, count in counts.items() if count == max(counts.values()) > 0]


def merge(base: dict, over: Mapping, origins: dict[str, str], origin: str, prefix: str = "") -> dict:
    """Merge `over` into a copy of `base`: objects deeply, other values replace; `origins` gets the key paths set."""
    merged = dict(base)
    for key, value in over.items():
        path = f"{prefix}{key}"
        origins[path] = origin
        if isinstance(value, Mapping):
            below = merged.get(key)
            value = merge(below if isinstance(below, Mapping) else {}, value, origins, origin, f"{path}.")
        merged[key] = value
    return merged


def parse_value(text: str) -> Any:
    """Return a command-line value: parsed where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def set_key(tree: dict, origins: dict[str, str], path: str, value: Any, origin: str) -> None:
    """Set `a.b.c` in a nested dict; `check` finds unknown keys later."""
    keys = path.split(".")
    if not all(keys):
        raise OptionError(f"{origin}: '{path}' is not a key path; write it as section.key=value")
    for depth, key in enumerate(keys[:-1]):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise OptionError(f"{origin}: '{'.'.join(keys[: depth + 1])}' is a value, not a section")
    tree[keys[-1]] = value
    origins[path] = origin


# ---------------------------------------------------------------- checking


def closest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message: the nearest valid name, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"valid: {', '.join(sorted(known))}" if known else "no key is valid here"


def schema_of(component: Callable) -> Schema:
    """Return the keywords of a dataclass or of a class's constructor."""
    if is_dataclass(component):
        hints = typing.get_type_hints(component, include_extras=True)
        return {f.metadata.get("key", f.name): (hints[f.name], default_of(f)) for f in fields(component)}
    hints = typing.get_type_hints(component.__init__, include_extras=True)
    parameters = list(inspect.signature(component.__init__).parameters.values())[1:]
    return {p.name: (hints.get(p.name, Any), p.default) for p in parameters
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            and typing.get_origin(hints.get(p.name)) is not type}  # no JSON value is a class


def default_of(item) -> Any:
    """Return the default of a dataclass's field."""
    if item.default_factory is not MISSING:
        return item.default_factory()
    return REQUIRED if item.default is MISSING else item.default


NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null",
         dict: "an object", list: "a list"}
LISTS = (list, tuple, collections.abc.Sequence)


def kind_name(kind: Any) -> str:
    """Return an annotation in words, with its range, for messages and docs/options.md."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return f"{kind_name(args[0])} {args[1]}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_name(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(a) for a in args)
    if origin in LISTS and args:
        one = re.sub("^an? ", "", kind_name(args[0]))
        return "a list of " + re.sub(r"\b(number|text|object|list)\b", r"\1s", one, count=1)
    return NAMES.get(origin or kind, getattr(kind, "__name__", str(kind)))


def fit(value: Any, kind: Any) -> Any:
    """Return `value` converted to an annotation. Raises TypeError when its type or its range does not fit."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = fit(value, args[0])
        if value not in args[1]:
            raise TypeError
        return value
    if origin in (typing.Union, types.UnionType):
        reason = ""
        for one in args:
            try:
                return fit(value, one)
            except TypeError as error:
                reason = reason or str(error)
        raise TypeError(reason)
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in args):
            return value
        raise TypeError
    if origin in LISTS or kind in LISTS:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        fixed = origin is tuple and args and args[-1] is not Ellipsis
        if fixed and len(value) != len(args):
            raise TypeError
        kinds = args if fixed else [args[0] if args else Any] * len(value)
        return [fit(v, k) for v, k in zip(value, kinds)]
    kind = origin or kind
    if kind in (int, float) and isinstance(value, int) and abs(value) >= 2**63:
        raise TypeError("it has more than 64 bits")
    if kind in (int, float) and not finite(value):
        raise TypeError("it must be finite")
    if kind is int and isinstance(value, float) and value.is_integer():
        return fit(int(value), int)  # 1e5 is a natural way to write an iteration
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in NAMES and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise TypeError
    return value


def finite(value: Any) -> bool:
    """Return whether a value, or each value of a list, is finite; Python's JSON reads NaN, Infinity and 1e999."""
    return all(map(finite, value)) if isinstance(value, list) else not isinstance(value, float) or math.isfinite(value)


def check(section: Mapping, schema: Schema, path: str, where: Callable[[str], str], notices: list[str]) -> Section:
    """Check a section against its schema: every key known, every type right, no required key missing.

    Args:
        path: key path of the section, "" at the top. where: key path -> the file that set it.
        notices: gets a line for each key in UNUSED.
    Returns: the section with converted values. Raises: OptionError.
    """
    out = Section()
    out.where = f"{where(path)}: {path}" if path else where(path)
    for key, value in section.items():
        full = f"{path}.{key}" if path else key
        if key not in schema:
            pattern = ".".join("*" if i == 1 and full.startswith("datasets.") else k
                               for i, k in enumerate(full.split(".")))
            if pattern not in UNUSED:
                word = word_here(full)
                raise OptionError(f"{where(full)}: {full}: unknown key; "
                                  + (f"here it is {word}" if word else closest(key, schema)))
            reason = UNUSED[pattern] or (", ".join(flatten(value)) if isinstance(value, Mapping) else "")
            notices.append(f"{where(full)}: {full} is not used here" + (f": {reason}" if reason else ""))
            continue
        try:
            value = os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value
            out[key] = fit(value, schema[key][0])
        except TypeError as error:
            shown, reason = json.dumps(value), f" ({error})" if str(error) else ""
            if value == -1 and key.startswith("checkpoint_"):
                reason = "; 0 switches it off"
            shown = shown if len(shown) < 60 else shown[:57] + "..."
            raise OptionError(f"{where(full)}: {full}: {shown} is not {kind_name(schema[key][0])}{reason}") from None
    for key, (kind, default) in schema.items():
        if default is REQUIRED and key not in out:
            at = f"{path}.{key}" if path else key
            raise OptionError(f"{where(path)}: {at}: missing; give {kind_name(kind)}")
    return out


def with_defaults(section: Section, schema: Schema) -> Section:
    """Add the default of every absent key to a section, which is changed and returned."""
    for key, (_, default) in schema.items():
        if key not in section:
            section[key] = list(default) if isinstance(default, tuple) else default
    return section


def resolve(table: Table, name: str, where: str) -> type:
    """Import the class that a name stands for. Raises OptionError with the closest name."""
    if name not in table and str(name).lower() in KAIR_ONLY:
        raise OptionError(f"{where}: KAIR's {name} is not one of the recipes here, which docs/recipes.md lists; "
                          "docs/recipe.md shows how to add it")
    if name not in table:
        raise OptionError(f"{where}: unknown '{name}'; {closest(str(name), table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(table: Table, section: Section, type_key: str, **given: Any) -> Any:
    """Create the component that `section[type_key]` names, with the rest of the section as keywords.

    Args: given: further keywords, used if the component has them.
    Raises: OptionError for an unknown name, or where the constructor raises ValueError.
    """
    component = resolve(table, section[type_key], f"{section.where}.{type_key}")
    known = schema_of(component)
    keywords = {k: v for k, v in {**section, **given}.items() if k in known}
    try:
        return component(**keywords)
    except (ValueError, FileNotFoundError) as error:
        found = OptionError(f"{section.where}: {error}")
        if any(re.search("root|path", key) and isinstance(value, str) and value and value in str(error)
               for key, value in keywords.items()):
            found.drawing = getattr(component, "layout", "")
        raise found from error


# ---------------------------------------------------------------- the options of a run


def parse(path: str, overrides: Iterable[tuple[str, Any, str]], models: Table, networks: Table, datasets: Table,
          stage: str | None = None, tree: Mapping | None = None) -> tuple[Section, list[str]]:
    """Read and check the options of a run, with all defaults added.

    Args:
        path: option file. overrides: (key path, value, flag that set it), later ones win.
        models, networks, datasets: tables of the names that a file may use.
        stage: name of a stage of the file; its folder is in the folder of the run. tree: options to use instead of the
            file, e.g. those in a checkpoint; `path` is then their source, for messages.
    Returns: the options, and notices for the user (keys that are not used).
    Raises: OptionError, one line.
    """
    tree, origins = (copy.deepcopy(dict(tree)), {}) if tree else load(path)
    option_file = tree.pop("opt_path", path)
    chain = stages_in(tree, path)
    if stage is not None:
        tree, origins = merge_stage(tree, origins, chain, stage, path)
    for key, value, origin in overrides:
        set_key(tree, origins, key, value, origin)

    def where(key: str) -> str:
        while key and key not in origins:
            key = key.rpartition(".")[0]
        return origins.get(key, path)

    notices: list[str] = []
    top = schema_of(Top) | {k: (dict, None) for k in tree if k.startswith("net") and isinstance(tree[k], dict)}
    opt = with_defaults(check(tree, top, "", where, notices), top)
    model = resolve(models, opt["model"], f"{where('model')}: model")
    for name in [k for k in opt if k.startswith("net") and opt[k] is not None]:
        network = resolve(networks, opt[name].get("net_type"), f"{where(name)}: {name}.net_type")
        opt[name] = check(opt[name], schema_of(network) | {"net_type": (str, REQUIRED)}, name, where, notices)
    for name, schema in (("path", schema_of(Path)), ("checkpoint", schema_of(Checkpoint)), ("log", schema_of(Log)),
                         ("train", schema_of(model.TrainOptions)), ("val", schema_of(model.ValOptions))):
        opt[name] = with_defaults(check(opt[name], schema, name, where, notices), schema)
    for name in opt["datasets"]:
        opt["datasets"][name] = check_dataset(opt, name, datasets, where, notices)
    if "train" not in opt["datasets"]:
        raise OptionError(f"{where('datasets')}: datasets.train: missing; training needs a training set")
    if opt["path"]["models"] == os.path.join(opt["path"]["root"], opt["task"], "models"):
        opt["path"]["models"] = None  # KAIR writes the default into the options that it saves
    if stage is not None and opt["path"]["models"]:
        opt["path"]["models"] = os.path.join(opt["path"]["models"], stage)
    elif stage is not None:
        opt["task"] = os.path.join(opt["task"], stage)
    for key, value in flatten(opt).items():  # also in objects without a schema, as a degradation
        if not finite(value):
            raise OptionError(f"{where(key)}: {key}: {json.dumps(value)} must be finite")
    opt["opt_path"], opt["stages"], opt.origins = option_file, [], origins
    return opt, notices


# ---------------------------------------------------------------- stages


def stage_names(path: str) -> list[str]:
    """Return the names of an option file's stages, in order. Raises OptionError for an invalid stage."""
    return list(stages_in(load(path)[0], path))


def stages_in(tree: Mapping, path: str) -> dict[str, dict]:
    """Return the overrides of each stage of a file, by name. Raises OptionError for an invalid stage."""
    entries, found = tree.get("stages", []), {}
    if not isinstance(entries, list):
        raise OptionError(f'{path}: stages: must be a list of {{"name": ..., keys to override}}')
    for number, entry in enumerate(entries):
        at = f"{path}: stages[{number}]"
        if not isinstance(entry, Mapping):
            raise OptionError(f'{at}: must be an object {{"name": ..., keys to override}}, not {json.dumps(entry)}')
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*\w[\w.-]*", name) or name == "none":
            raise OptionError(f"{at}.name: {json.dumps(name)} must be a name for a folder, of letters, digits, _ . -")
        if name in found:
            raise OptionError(f"{at}.name: {name!r} is used twice; each stage needs a name of its own")
        if alien := {"extends", "stages", "stage", "cli"} & set(entry):
            raise OptionError(f"{at}: {sorted(alien)[0]}: belongs to the file, not to a stage")
        if not isinstance(entry.get("init_from", ""), (str, type(None))):
            raise OptionError(f"{at}.init_from: {json.dumps(entry['init_from'])} must be an earlier stage, a file or "
                              "null")
        found[name] = dict(entry)
    return found


def merge_stage(tree: dict, origins: dict[str, str], chain: Mapping[str, dict], stage: str,
              path: str) -> tuple[dict, dict[str, str]]:
    """Merge the overrides of a stage into a file's options. Returns the options, and who set each."""
    if stage not in chain:
        number = int(stage) if re.fullmatch("[1-9]", stage) else 0
        raise OptionError(f"{path}: stages: there is no {stage!r}; " + (
            f"number {number} is {list(chain)[number - 1]}" if 0 < number <= len(chain) else
            closest(stage, chain) if chain else "the file has no stages"))
    over = {key: value for key, value in chain[stage].items() if key not in ("name", "init_from")} | {"stage": stage}
    tree = merge(tree, over, origins, f"{path}: stages: {stage}")
    if "init_from" in chain[stage]:
        origin = chain[stage]["init_from"]
        set_key(tree, origins, "path.init_from", "none" if origin is None else origin, f"{path}: stages: {stage}")
    return tree, origins


def models_folder(opt: Mapping[str, Any]) -> str:
    """Return the folder of a run's checkpoints."""
    return opt["path"]["models"] or os.path.join(opt["path"]["root"], opt["task"], "models")


def run_folder(opt: Mapping[str, Any]) -> str:
    """Return the folder of a run: the one of its checkpoints where the options name that, else the one above it."""
    return opt["path"]["models"] or os.path.dirname(models_folder(opt))


def origin_of(opt: Mapping[str, Any], key: str) -> str:
    """Return the flag or file that set an option, or the option file."""
    return getattr(opt, "origins", {}).get(key, opt["opt_path"])


def check_dataset(opt: Mapping, name: str, table: Table, where: Callable[[str], str], notices: list[str]) -> Section:
    """Check an entry of `datasets`, and add the values that every dataset gets from other sections."""
    path, section = f"datasets.{name}", opt["datasets"][name]
    phase = name.split("_")[0]
    if phase not in ("train", "test"):
        raise OptionError(f"{where(path)}: {path}: an entry is named train, test or test_<name>")
    if not isinstance(section, Mapping):
        raise OptionError(f"{where(path)}: {path}: must be an object")
    component = resolve(table, section.get("dataset_type"), f"{where(path)}: {path}.dataset_type")
    own, loader = schema_of(component), schema_of(Loader)
    common = {"scale": opt["scale"], "n_channels": opt["n_channels"], "seed": opt["train"]["manual_seed"]}
    given = {k: v for k, v in section.items() if k not in ("scale", "n_channels")}  # as in KAIR, the top level's apply
    given = {k: v for k, v in common.items() if k in own} | given
    checked = check(given, loader | own, path, where, notices)
    checked["phase"] = phase
    return with_defaults(checked, loader)


def is_perdure_config(config: Mapping[str, Any]) -> bool:
    """Return whether the options in a checkpoint are Perdure's."""
    return {"task", "datasets", "netG", "train", "path"} <= set(config)


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Return nested options as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def __getattr__(name: str) -> Any:
    if name == "find_last_checkpoint":  # here in KAIR's utils_option
        return importlib.import_module("checkpoint").find_last_checkpoint
    raise AttributeError(name)


if __name__ == "__main__":
    sys.stderr.write("use: python -m commands.reference > docs/options.md\n")
    sys.exit(2)
