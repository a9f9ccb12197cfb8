"""The words of other programs' command lines and option files, and what they are called here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# A flag, or the last word of a key path -> the key path here, or a remedy.
WORDS = {
    "batch_size": "datasets.train.dataloader_batch_size", "data_root": "datasets.train.dataroot",
    "embed_dim": "netG.embed_dim", "num_layers": "netG.num_layers", "full_heads": "netG.full_heads",
    "epoch_length": "datasets.train.num_samples",
    "epochs": "train.total_epochs", "num_epochs": "train.total_epochs",
    "from_scratch": "--fresh where the run has checkpoints, which archives them, else nothing",
    "grad_clip": "train.G_optimizer_clipgrad",
    "img_size": "nothing (a stroke's picture has 64 pixels a side)",
    "keep_last_n": "checkpoint.keep_last_n", "log_interval": "train.checkpoint_print",
    "lr": "train.G_optimizer_lr", "learning_rate": "train.G_optimizer_lr",
    "num_steps": "train.total_iter", "max_steps": "train.total_iter",
    "num_workers": "datasets.train.dataloader_num_workers", "style_subdirs": "datasets.train.style_subdirs",
    "test_image_dir": "datasets.test.dataroot", "weight_decay": "train.G_optimizer_wd",
}
SECTIONS = {"model": "netG", "training": "train", "loss": "train", "data": "datasets.train", "inference": "val",
            "logging": "log"}  # sections of InkTrace's and LGT's files
RECIPES = {"train_inktrace": ("full_heads", "mask_ratio", "embed_dim"),
           "train_lgt": ("test_image_dir", "w_style", "ode_integration_steps", "style_dim", "num_styles")}


def word_here(path: str) -> str | None:
    """Return what a key path or flag of another program is here: a key path or a remedy; None: not known."""
    first, _, rest = path.partition(".")
    found = WORDS.get(path.rpartition(".")[2].lstrip("-").replace("-", "_"))
    found = found or (f"{SECTIONS[first]}.{rest}".rstrip(".") if first in SECTIONS else None)
    return None if found == path else found


def is_key(word: str) -> bool:
    """Return whether a word here is a key path rather than a remedy."""
    return re.fullmatch(r"[\w.]+", word) is not None


def foreign_sections(tree: Mapping[str, Any], folder: str) -> str | None:
    """Return a sentence with the words here for a file with the sections of another program; None: it has none.

    Args: folder: of the shipped option files, as seen from the file.
    """
    if not any(isinstance(tree.get(name), Mapping) and name != "log" for name in SECTIONS):
        return None
    pairs = dict(_leaves({name: tree[name] for name in SECTIONS if name in tree}))
    for stage in tree.get("stages", []) if isinstance(tree.get("stages"), list) else []:
        pairs |= {f"stages: {old}": new for old, new in _leaves(stage)} if isinstance(stage, Mapping) else {}
    words = [f"{old} -> {new}" for old, new in pairs.items()]
    keys = {old.rpartition(".")[2] for old in pairs}
    recipe = next((name for name, known in RECIPES.items() if keys & set(known)), "train_RECIPE")
    return f"has sections of another program; here: {'; '.join(words)}" + (
        "" if "datasets" in tree or "extends" in tree else f'; and "extends": "{folder}/{recipe}.json" for the rest')


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif found := word_here(f"{prefix}{key}"):
            yield f"{prefix}{key}", found
