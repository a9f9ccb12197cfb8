"""The original programs beside this project's models: imported from their own checkouts, stepped in their own order.

For benchmarks/against_originals.py, and for tests where a checkout is named. Sizes stand in benchmarks/originals.json.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torchvision  # noqa: F401  before the originals: it looks at all modules when it is imported
from torch import Tensor, nn

from benchmarks.common import ROOT, build_run
from models.model_vqgan import ModelVQGAN, as_levels
from options import OptionError, Section, read_file

KNOWN = read_file(str(ROOT / "benchmarks/originals.json"))


# ---------------------------------------------------------------- the originals


class Stand(nn.Module):
    """Stand in for any class or function of a package that is only imported."""

    def __init__(self, *args: Any):
        super().__init__()


class Empty(ModuleType):
    """Stand in for a package that is only imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stand


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Print nothing, and show no warning."""
    with contextlib.redirect_stdout(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def original(kind: str, path: str) -> Iterator[None]:
    """Let imports find the modules of the original program first, and only within.

    Raises: OptionError: the path is not such a checkout, or a package is missing.
    """
    root, empty = Path(path).resolve(), KNOWN[kind]["absent"]
    if lacking := [name for name in KNOWN[kind]["files"] if not (root / name).is_file()]:
        raise OptionError(f"--{kind} {path}: is not a checkout of {kind}: it has no {lacking[0]}")
    hidden = {entry.stem for entry in root.iterdir()}
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in hidden or name in empty}
    sys.modules.update({name: Empty(name) for name in empty})
    others = [entry for entry in sys.path if Path(entry).resolve() != ROOT]  # our packages would win over its folders
    try:
        with mock.patch.object(sys, "path", [str(root), *others]), quiet():
            yield
    except ModuleNotFoundError as error:
        raise OptionError(f"--{kind} {path}: needs the package {error.name}: pip install {error.name}") from None
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in hidden or name in empty]:
            del sys.modules[name]
        sys.modules.update(saved)


class Kair:
    """KAIR's ModelVRT, stepped as main_train_vrt.py does. Args: opt: options of ours. path: the checkout."""

    def __init__(self, opt: Section, path: str):
        train = {**opt["train"], "G_optimizer_betas": list(opt["train"]["G_optimizer_betas"])}
        train["G_scheduler_periods"] = train["G_scheduler_periods"] or train["total_iter"]
        with original("kair", path):
            clean = importlib.import_module("utils.utils_option").dict_to_nonedict
            self.model = importlib.import_module("models.model_vrt").ModelVRT(clean(
                {**opt, "netG": {**KNOWN["kair"]["net"], **opt["netG"]}, "train": train, "path": {"models": ""},
                 "is_train": True, "gpu_ids": None, "dist": False}))
            self.model.init_train()
        self.networks = {"G": self.model.netG.module, "E": self.model.netE}
        for module in self.model.netG.modules():
            if hasattr(module, "drop_prob"):  # 0.2 cannot be set in its option files, and draws other numbers
                module.drop_prob = 0.0

    def step(self, number: int, data: Mapping[str, Any]) -> dict[str, float]:
        with quiet():
            self.model.update_learning_rate(number)
            self.model.feed_data(data)
            self.model.optimize_parameters(number)
        return dict(self.model.log_dict)

    def restore(self, sample: Mapping[str, Tensor]) -> Tensor:
        with quiet():
            self.model.feed_data(sample)
            self.model.test()
        return self.model.E[0]


class Taming:
    """taming's VQModel, stepped as Lightning 1.0 does: both optimizers each batch. Args: as Kair."""

    def __init__(self, opt: Section, path: str):
        net, loss = opt["netG"], {key: value for key, value in opt["train"]["lossconfig"].items() if key != "legacy"}
        with original("taming", path):
            module = importlib.import_module("taming.modules.losses.vqperceptual")
            loss = {"target": f"{module.__name__}.VQLPIPSWithDiscriminator", "params": loss}
            with mock.patch.object(module, "LPIPS", Perceptual):
                model = self.model = importlib.import_module("taming.models.vqgan").VQModel(
                    dict(net["ddconfig"]), loss, net["n_embed"], net["embed_dim"])
        model.log = model.log_dict = lambda *args, **more: None
        # main.py: base_learning_rate times batch, GPUs and accumulation; the product is our option
        model.learning_rate = opt["train"]["G_optimizer_lr"]
        self.optimizers, _ = model.configure_optimizers()
        autoencoder = nn.ModuleDict({name: part for name, part in model.named_children() if name != "loss"})
        self.networks = {"G": autoencoder, "D": model.loss.discriminator}

    def step(self, number: int, data: Mapping[str, Any]) -> dict[str, float]:
        batch, found = {"image": data["image"].permute(0, 2, 3, 1)}, {}
        self.model.global_step = number - 1  # Lightning counts a batch after both optimizers
        for index, (label, optimizer) in enumerate(zip("GD", self.optimizers)):
            self.model.requires_grad_(False)  # Lightning's toggle_optimizer
            self.networks[label].requires_grad_(True)
            loss = self.model.training_step(batch, number - 1, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found[f"{label}_loss"] = loss.item()  # its progress bar shows it
        return found

    def restore(self, sample: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return (self.model.eval()(sample["image"])[0] + 1) / 2


# ---------------------------------------------------------------- ours


class TwoPasses(ModelVQGAN):
    """ModelVQGAN in taming's order: the discriminator judges what the stepped autoencoder makes in a second pass."""

    def optimize_parameters(self, current_step: int) -> None:
        terms: dict[str, Tensor] = {}
        turns = "GD" if self.calculator.discriminator_due(current_step) else "G"
        for self.turn in turns:
            super().optimize_parameters(current_step)
            terms |= self.log_dict
        self.log_dict = terms

    def losses(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        vq_loss, restored, _, indices = self.forward_G(self.images)
        last = self.get_bare_model(self.netG).last_layer
        loss, _ = self.loss(vq_loss, self.images, restored, "GD".index(self.turn), step, last)
        self.hits = self.hits_of(as_levels(indices))
        return {f"optimizer{self.turn}": loss}, {f"{self.turn}_loss": loss}


class Ours:
    """The model of this project, stepped as train.py does. Args: opt: its options."""

    def __init__(self, opt: Section):
        self.model = build_run(opt).model
        self.networks = self.model.networks

    def step(self, number: int, data: Mapping[str, Any]) -> dict[str, float]:
        self.model.update_learning_rate(number - 1)
        self.model.feed_data(data)
        if "image" in data:
            self.model.images = data["image"].contiguous(memory_format=torch.channels_last)
        self.model.optimize_parameters(number)
        return {name: float(value) for name, value in self.model.log_dict.items() if name in ("G_loss", "D_loss")}

    def restore(self, sample: Mapping[str, Tensor]) -> Tensor:
        self.model.feed_data(sample)
        self.model.test()
        return (self.model.restored + 1) / 2 if "image" in sample else self.model.restored[0]


# ---------------------------------------------------------------- what both need


class Perceptual(nn.Module):
    """Stand in for LPIPS: the distance of features of one random layer, for both sides the same."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        kernel = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1)).to(a) / 5
        a, b = (nn.functional.conv2d(x, kernel).tanh() for x in (a, b))
        return (a - b).square().mean((1, 2, 3), keepdim=True)
