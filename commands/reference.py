"""docs/options.md: every key that an option file may have, from the signatures that check it.

What a key means is the comment after or above a dataclass's field, or its entry under Args of a constructor's
docstring. `others: as `Class`.` there takes the entries of another class of the module.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache

import options
from data import DATASETS
from data.synthetic_masks import SyntheticMaskDataset
from data.synthetic_styles import DrawnStyles
from losses import LOSSES
from models import MODELS, NETWORKS
from models.codecs import CODECS
from models.network_vqgan import DDConfig

HEAD = """# Options

Made by `python -m commands.reference > docs/options.md` from the code that checks them; a test keeps it current.

JSON with `//` comments. Order: defaults < `extends` < file < command line. `--set section.key=value` sets any of them.
An unknown key is an error that names the nearest valid one.
"""
HEADINGS = "| key | type and range | default | meaning |", "|---|---|---|---|"
SECTIONS = {"Top level": options.Top, "path": options.Path, "checkpoint": options.Checkpoint, "log": options.Log}


PARTS = (("datasets.*.dataset_type", DATASETS), ("net*.net_type", NETWORKS), ("datasets.*.codec.type", CODECS),
         ("train.G_lossfn_type, and the keys of train.lossconfig", LOSSES))
NESTED = {"net*.ddconfig": DDConfig, "datasets.*.generated, of masks": SyntheticMaskDataset,
          "datasets.*.generated, of styles": DrawnStyles}


def reference() -> str:
    """The page, as Markdown."""
    parts = [HEAD]
    for title, component in SECTIONS.items():
        parts += [f"## {title}\n", table(component)]
    for section, name in (("train", "TrainOptions"), ("val", "ValOptions")):
        parts.append(f"## {section}\n")
        parts += of_models(section, name)
    parts += ["## datasets.*\n\nOf every entry, `train`, `test` or `test_NAME`:\n", table(options.Loader),
              "`scale`, `n_channels` and `seed` are handed to every data set that has them.\n"]
    for title, components in PARTS:
        parts.append(f"## {title}\n")
        for names, component in by_target(components):
            parts += [f"### {', '.join(f'`{name}`' for name in names)}\n\n{first_sentence(component)}\n",
                      table(component)]
    for title, component in NESTED.items():
        parts += [f"## {title}\n", table(component)]
    return "\n".join(parts)


def components() -> Iterator[type]:
    """Every class whose signature checks keys of an option file."""
    yield from [*SECTIONS.values(), options.Loader, *NESTED.values()]
    for _, model in by_target(MODELS):
        yield from (model.TrainOptions, model.ValOptions)
    for _, parts in PARTS:
        yield from (component for _, component in by_target(parts))


def of_models(section: str, name: str) -> Iterator[str]:
    """The keys that each class of options adds to those of its bases, and which models have them."""
    users: dict[type, list[str]] = {}
    for names, model in by_target(MODELS):
        for kind in reversed(getattr(model, name).__mro__[:-1]):
            users.setdefault(kind, []).extend(names)
    tables: dict[str, list[str]] = {}
    for kind, names in users.items():
        whose = "every model" if len(names) == len(MODELS) else ", ".join(f"`{each}`" for each in names)
        tables.setdefault(whose, []).extend(rows(kind, inspect.get_annotations(kind)))
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


def table(component: type) -> str:
    found = list(rows(component, options.schema_of(component)))
    return "\n".join([*HEADINGS, *found, ""]) if found else "No keys.\n"


def rows(component: type, keys: Iterable[str]) -> Iterator[str]:
    """Key, type, default and meaning of each."""
    schema = options.schema_of(component)
    meanings = meanings_of(component)
    for key in keys:
        kind, default = schema[key]
        shown = "needed" if default is options.REQUIRED else f"`{json.dumps(default, default=str)}`"
        cells = [f"`{key}`", options.kind_name(kind), shown, meanings.get(key, "")]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def meanings_of(component: type) -> dict[str, str]:
    """What each key means, as a sentence, in the words of the class or the nearest of its bases that says so."""
    found: dict[str, str] = {}
    keys = options.schema_of(component)
    for kind in reversed(component.__mro__[:-1]):
        if kind.__module__.startswith("torch"):
            continue
        for text in (kind.__doc__, vars(kind).get("__init__", None) and kind.__init__.__doc__):
            if other := re.search(r"(?:Args|others): as `(\w+)`", text or ""):
                found |= meanings_of(getattr(sys.modules[kind.__module__], other[1]))
            found |= arguments_in(inspect.cleandoc(text or ""), keys)
        found |= comments_in(kind)
    return {key: sentence(found[key]) for key in keys if found.get(key)}


def sentence(text: str) -> str:
    """A comment as the page has it: with a capital, a full stop and JSON's words."""
    text = re.sub(r"\b(None|True|False)\b", lambda word: json.dumps(ast.literal_eval(word[0])), text)
    return text[:1].upper() + text[1:].rstrip(".") + "."


def arguments_in(docstring: str, keys: Iterable[str]) -> dict[str, str]:
    """The entries `key: text` or `key, key: text` under Args."""
    under = re.search(r"\bArgs:(.*?)(?=\n\S|\b(?:Returns|Raises|Source|Attributes):|\Z)", docstring, re.DOTALL)
    if not under:
        return {}
    known = "|".join(map(re.escape, [*keys, "others"]))
    pieces = re.split(rf"(?:^|(?<=\s))((?:{known})(?:, (?:{known}))*): ", " ".join(under[1].split()))
    return {key: text.strip() for names, text in zip(pieces[1::2], pieces[2::2]) for key in names.split(", ")}


@cache
def comments_in(kind: type) -> dict[str, str]:
    """The comment after each field of a dataclass, or on the lines of its own right above it."""
    source = textwrap.dedent(inspect.getsource(kind))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    keys = {f.name: f.metadata.get("key", f.name) for f in fields(kind)} if is_dataclass(kind) else {}
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign) and node.target.id in keys:
            first = node.lineno
            while first - 1 in comments and not comments[first - 1].line[:comments[first - 1].start[1]].strip():
                first -= 1
            lines = range(first, node.end_lineno + 1)
            said = [comments[line].string.lstrip("# ") for line in lines if line in comments]
            found |= {keys[node.target.id]: " ".join(said)} if said else {}
    return found


def first_sentence(component: Callable) -> str:
    return re.split(r"(?<=\.)\s", " ".join(inspect.cleandoc(component.__doc__ or component.__name__).split()))[0]


if __name__ == "__main__":
    sys.stdout.write(reference())
