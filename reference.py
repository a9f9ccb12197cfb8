"""docs/options.md: every key that an option file may have, from the signatures that check it.

What a key means is the comment after a dataclass's field, or its entry under Args of a constructor's docstring.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache

import options
from data import DATASETS
from losses import LOSSES
from models import MODELS, NETWORKS

HEAD = """# Options

Made by `python -m options reference > docs/options.md` from the code that checks them; a test keeps it current.

JSON with `//` comments. Order: defaults < `extends` < file < command line. `--set section.key=value` sets any of them.
An unknown key is an error that names the nearest valid one.
"""
HEADINGS = "| key | type | default | |", "|---|---|---|---|"
SECTIONS = {"Top level": options.Top, "path": options.Path, "checkpoint": options.Checkpoint, "log": options.Log}


def reference() -> str:
    """The page, as Markdown."""
    parts = [HEAD]
    for title, component in SECTIONS.items():
        parts += [f"## {title}\n", table(component, options.schema_of(component))]
    for section, name in (("train", "TrainOptions"), ("val", "ValOptions")):
        parts.append(f"## {section}\n")
        parts += of_models(section, name)
    parts += ["## datasets.*\n\nOf every entry, `train`, `test` or `test_NAME`:\n",
              table(options.Loader, options.schema_of(options.Loader)),
              "`scale`, `n_channels` and `seed` are handed to every data set that has them.\n"]
    for title, components in (("datasets.*.dataset_type", DATASETS), ("net*.net_type", NETWORKS),
                              ("train.G_lossfn_type, and the keys of train.lossconfig", LOSSES)):
        parts.append(f"## {title}\n")
        for names, component in by_target(components):
            parts += [f"### {', '.join(f'`{name}`' for name in names)}\n\n{first_sentence(component)}\n",
                      table(component, options.schema_of(component))]
    return "\n".join(parts)


def of_models(section: str, name: str) -> Iterator[str]:
    """The keys that each class of options adds to those of its bases, and which models have them."""
    users: dict[type, list[str]] = {}
    for names, model in by_target(MODELS):
        for kind in reversed(getattr(model, name).__mro__[:-1]):
            users.setdefault(kind, []).extend(names)
    tables: dict[str, list[str]] = {}
    for kind, names in users.items():
        schema = options.schema_of(kind)
        whose = "every model" if len(names) == len(MODELS) else ", ".join(f"`{each}`" for each in names)
        tables.setdefault(whose, []).extend(rows(kind, {key: schema[key] for key in inspect.get_annotations(kind)}))
    for whose, found in tables.items():
        if found:
            yield "\n".join([f"### {section}, of {whose}\n", *HEADINGS, *found, ""])


def by_target(components: options.Table) -> Iterator[tuple[list[str], type]]:
    """Each class of a table once, with all its names."""
    names: dict[str, list[str]] = {}
    for name, target in components.items():
        names.setdefault(target, []).append(name)
    for each in names.values():
        yield each, options.resolve(components, each[0], "")


def table(component: type, schema: options.Schema) -> str:
    return "\n".join([*HEADINGS, *rows(component, schema), ""]) if schema else "No keys.\n"


def rows(component: type, schema: options.Schema) -> Iterator[str]:
    """Key, type, default and meaning of each."""
    meanings = meanings_of(component, schema)
    for key, (kind, default) in schema.items():
        shown = "needed" if default is options.REQUIRED else f"`{json.dumps(default, default=str)}`"
        cells = [f"`{key}`", options.kind_name(kind), shown, meanings.get(key, "")]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def meanings_of(component: type, keys: Iterable[str]) -> dict[str, str]:
    """What each key means, in the words of the class or the nearest of its bases that says so."""
    found: dict[str, str] = {}
    for kind in reversed(component.__mro__[:-1]):
        if kind.__module__.startswith("torch"):
            continue
        for text in (kind.__doc__, vars(kind).get("__init__", None) and kind.__init__.__doc__):
            found |= arguments_in(inspect.cleandoc(text or ""), keys)
        found |= comments_in(kind)
    return found


def arguments_in(docstring: str, keys: Iterable[str]) -> dict[str, str]:
    """The entries `key: text` or `key, key: text` under Args."""
    under = re.search(r"\bArgs:(.*?)(?=\n\S|\b(?:Returns|Raises|Source|Attributes):|\Z)", docstring, re.DOTALL)
    if not under:
        return {}
    known = "|".join(map(re.escape, keys))
    pieces = re.split(rf"(?:^|(?<=\s))((?:{known})(?:, (?:{known}))*): ", " ".join(under[1].split()))
    return {key: text.strip() for names, text in zip(pieces[1::2], pieces[2::2]) for key in names.split(", ")}


@cache
def comments_in(kind: type) -> dict[str, str]:
    """The comment after each field of a dataclass, and after each argument of a constructor."""
    source = textwrap.dedent(inspect.getsource(kind))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    keys = {f.name: f.metadata.get("key", f.name) for f in fields(kind)} if is_dataclass(kind) else {}
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            said = [comments[line] for line in range(node.lineno, node.end_lineno + 1) if line in comments]
            found |= {keys.get(node.target.id, node.target.id): " ".join(said)} if said else {}
        elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = [*node.args.args, *node.args.kwonlyargs]
            lines = [argument.lineno for argument in arguments]
            found |= {argument.arg: comments[argument.lineno] for argument in arguments
                      if argument.lineno in comments and lines.count(argument.lineno) == 1}
    return found


def first_sentence(component: Callable) -> str:
    return re.split(r"(?<=[.:])\s", " ".join(inspect.cleandoc(component.__doc__ or component.__name__).split()))[0]
