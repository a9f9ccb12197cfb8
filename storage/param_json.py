"""A VQGAN's `param.json` (`model_type`, `model_args`, `train_args`) as the options of a run here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

KEYS = {  # key path there -> here; the rest means nothing here and is left where it is
    "model_args.model_variant": "netG.net_type", "model_args.ddconfig": "netG.ddconfig",
    "model_args.lossconfig.params": "train.lossconfig", "model_args.ckpt_path": "path.init_from",
    **{f"model_args.{key}": f"netG.{key}" for key in (
        "n_embed", "embed_dim", "beta", "decay", "eps", "legacy", "remap", "sane_index_shape", "kl_weight",
        "in_channels", "num_hiddens", "num_res_hiddens", "num_res_blocks")},
    "model_args.num_embeddings": "netG.n_embed", "model_args.embedding_dim": "netG.embed_dim",
    "model_args.commitment_cost": "netG.beta", "model_args.num_residual_hiddens": "netG.num_res_hiddens",
    "model_args.num_residual_layers": "netG.num_res_blocks",
    "train_args.lr": "train.G_optimizer_lr", "train_args.num_steps": "train.total_iter",
    "train_args.use_taming_loss": "train.use_taming_loss",
    "train_args.batch_size": "datasets.train.dataloader_batch_size", "train_args.seed": "train.manual_seed",
}
LPIPS_FILES = ("weights/vgg16-397923af.pth", "weights/lpips_vgg.pth")  # the defaults of train.lossconfig


def is_param_json(tree: Mapping[str, Any]) -> bool:
    """Return whether these are the contents of a param.json."""
    return "model_type" in tree and "model_args" in tree


def convert(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the options here that a param.json stands for; sections of ours in it are kept.

    Args: path: of the file, which gives the run its name.
    Raises: ValueError: it names a loss that does not exist here.
    """
    side = {"size": tree["model_args"].get("ddconfig", {}).get("resolution", 256)}
    out: dict[str, Any] = {
        "task": os.path.splitext(os.path.basename(path))[0], "model": tree["model_type"],
        "datasets": {"train": {"dataset_type": "ImageTrainDataset", **side},
                     "test": {"dataset_type": "ImageTestDataset", **side}},
        "netG": {"net_type": tree["model_type"]}, "train": {"lossconfig": {"disc_start": 0}},
        "cli": {"images": "datasets.train.dataroot", "test_images": "datasets.test.dataroot"}}

    def put(where: str, value: Any) -> None:
        *sections, last = KEYS.get(where, where).split(".")
        if where not in KEYS and isinstance(value, Mapping):
            for key, part in value.items():
                put(f"{where}.{key}", part)
            return
        place = out
        for name in sections:
            place = place.setdefault(name, {})
        place[last] = value

    target = tree["model_args"].get("lossconfig", {}).get("target", "VQLPIPSWithDiscriminator")
    if not target.endswith("VQLPIPSWithDiscriminator"):
        raise ValueError(f"model_args.lossconfig.target: {target} is not here; valid: VQLPIPSWithDiscriminator")
    for section in ("model_args", "train_args"):
        put(section, tree.get(section, {}))
    if not all(map(os.path.isfile, LPIPS_FILES)):
        if "perceptual_weight" not in out["train"]["lossconfig"]:
            out["train"]["lossconfig"] = {**out["train"]["lossconfig"], "perceptual_weight": 0.0}
            out["perceptual_weight"] = None  # for a notice
    return out
