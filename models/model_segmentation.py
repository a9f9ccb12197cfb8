"""The segmentation recipe: it predicts the class of every pixel; scores divide counts summed over a data set.

Source: Diakogiannis et al. 2020, arXiv:1904.00592; the histories and their names are those of
mischiefliao/ResUNeta-Torch.
Legend: B batch, K classes, C channels that the network returns, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.masks import by_stem, images_in, read_image, read_mask
from losses.tanimoto import activate
from metrics.segmentation import confusion, segmentation_metrics
from models import NETWORKS
from models.model_plain import ModelPlain, merge_tiles
from options import build
from runtime.ranges import Fraction, NonNegativeInt

HISTORIES = ("train_losses", "train_metrics_history", "val_losses", "val_metrics_history")
COUNTS = ("tp", "fp", "fn")  # the columns of metrics.confusion
PALETTE = ((0, 0, 0), (1, 1, 1), (0.9, 0.3, 0.2), (0.2, 0.5, 0.9), (0.3, 0.7, 0.3), (0.95, 0.8, 0.2), (0.6, 0.3, 0.7))
IGNORED = (0.5, 0.5, 0.5)


class ModelSegmentation(ModelPlain):
    """Train on images `degraded` (B,3,H,W) and class ids `target` (B,H,W); `restored` (B,C,H,W) are logits.

    With `netG.multitask`, `target` is (B,2K+4,H,W): ids, boundary, distance, and the image's hue, saturation, value.
    """

    @dataclass
    class TrainOptions(ModelPlain.TrainOptions):
        G_lossfn_type: Literal["tanimoto", "tanimoto_pooled", "dice", "bce"] = "tanimoto"
        loss_complement: bool = True  # average Tanimoto losses of p, l with those of 1 - p, 1 - l
        loss_alpha: Fraction = 0.5  # weight of the foreground in tanimoto_pooled, between 0 and 1
        # Schedule of the learning rate: steps at milestones, restarting cosines, lower after a plateau, or constant.
        G_scheduler_type: Literal["MultiStepLR", "CosineAnnealingWarmRestarts", "ReduceLROnPlateau",
                                  "constant"] = "constant"
        G_scheduler_patience: NonNegativeInt = 5  # validations without gain before ReduceLROnPlateau lowers the rate

    @dataclass
    class ValOptions(ModelPlain.ValOptions):
        tile: NonNegativeInt = 0  # side of the tiles of a prediction in pixels; 0: no tiles, resize to image_size
        tile_overlap: NonNegativeInt = 64  # pixels that neighbouring tiles share and blend

    best_metric = "loss", "min"

    def __init__(self, opt: Mapping[str, Any]):
        self.data = {"image_size": 256, "num_classes": 2, "ignore_index": None, **opt["datasets"]["train"]}
        self.num_classes, self.ignore_index = self.data["num_classes"], self.data["ignore_index"]
        self.multitask = opt["netG"].get("multitask", False)
        super().__init__(opt)
        for name, section in opt["datasets"].items():
            for key, wanted in (("num_classes", self.num_classes), ("ignore_index", self.ignore_index)):
                if section.get(key, wanted) != wanted:
                    raise ValueError(f"{opt['opt_path']}: datasets.{name}.{key}: {section[key]} must be that of "
                                     f"datasets.train, {wanted}")
            if self.multitask and not section.get("multitask"):
                raise ValueError(f"{opt['opt_path']}: datasets.{name}.multitask must be true where netG.multitask is")
        v = opt["val"]
        if v["tile"] and not 0 <= v["tile_overlap"] < v["tile"]:
            raise ValueError(f"{opt['opt_path']}: val.tile_overlap {v['tile_overlap']} must be below val.tile "
                             f"{v['tile']}")
        self.history: dict[str, list] = {name: [] for name in HISTORIES}
        self.validated: list[str] = []  # stems of the validation set
        self.begin_epoch(0, 0)

    def define_network(self, label: str) -> nn.Module:
        """Build the network for the classes of the data and, unless its section has one, their image size."""
        section = self.opt[f"net{label}"]
        if section.get("num_classes", self.num_classes) != self.num_classes:
            raise ValueError(f"{self.opt['opt_path']}: netG.num_classes {section['num_classes']} must be that of "
                             f"datasets.train, {self.num_classes}")
        size = section.get("image_size", self.data["image_size"])
        return build(NETWORKS, section, "net_type", num_classes=self.num_classes, image_size=size).to(self.device)

    def define_loss(self) -> None:
        """Build the criterion."""
        t = self.opt_train
        self.criterion = self.build_loss(t, complement=t["loss_complement"], alpha=t["loss_alpha"])
        self.G_lossfn = self.loss

    def define_scheduler(self) -> None:
        """Build the schedule of G; ReduceLROnPlateau follows from the history of validations."""
        t = self.opt_train
        if t["G_scheduler_type"] == "ReduceLROnPlateau":
            self.schedules["optimizerG"] = lambda initial, finished: max(
                initial * t["G_scheduler_gamma"] ** self.plateaus(), t["G_scheduler_eta_min"])
        else:
            super().define_scheduler()

    def plateaus(self) -> int:
        """Count the plateaus in the history of validation losses, as torch's ReduceLROnPlateau does."""
        best, since, found = math.inf, 0, 0
        for loss in self.history["val_losses"]:
            best, since = (loss, 0) if loss < best * (1 - 1e-4) else (best, since + 1)
            if since > self.opt_train["G_scheduler_patience"]:
                found, since = found + 1, 0
        return found

    def init_train(self, parts: Mapping[str, Any] | None = None, source: str = "checkpoint") -> list[str]:
        """Prepare for training; report histories that a checkpoint lacks."""
        reports = super().init_train(parts, source)
        absent = [name for name in HISTORIES if parts and name not in parts.get("state", {})]
        if absent:
            reports.append(f"{source}: holds no {', '.join(absent)}; they start over")
        return reports

    # ------------------------------------------------ training

    def feed_data(self, data: Mapping[str, Any], need_H: bool = True) -> None:
        """Move a batch to the device: `L` (B,3,H,W) in [0,1], `H` (B,H,W) class ids; in training with `epoch`."""
        super().feed_data(data, need_H)
        self.names = data["folder"]
        if self.target is not None:
            self.target = self.target.float()  # the loss converts logits to the type of the target
        if self.multitask and self.target is not None:
            maps = [self.move(data[name]) for name in ("boundary", "distance")]
            self.target = torch.cat([self.target[:, None], *maps, hsv(self.degraded)], dim=1)
        if "epoch" in data:
            place = int(data["epoch"][0]), int(data["num_samples"][0])
            if place != self.epoch["place"]:
                self.begin_epoch(*place)

    def begin_epoch(self, epoch: int, num_samples: int) -> None:
        """Reset the sums of loss and counts, which stay on the device until the epoch ends."""
        self.epoch = {"place": (epoch, num_samples), "seen": 0,
                      "loss": torch.zeros((), dtype=torch.float64, device=self.device),
                      "counts": torch.zeros(max(2, self.num_classes), 3, dtype=torch.int64, device=self.device)}

    def counts(self) -> list[Tensor]:
        """Return true positives, false positives and false negatives of the micro-batch."""
        return [self.confusion(self.restored, self.target)]

    def optimize_parameters(self, current_step: int) -> None:
        """Train on the batch, and count its samples."""
        super().optimize_parameters(current_step)
        self.epoch["seen"] += self.opt["datasets"]["train"]["dataloader_batch_size"]

    def finish_step(self, step: int, counts: list[Tensor]) -> None:
        """Add loss and counts of the batch to those of the epoch."""
        self.epoch["loss"] += self.log_dict["G_loss"].double() * self.opt["datasets"]["train"]["dataloader_batch_size"]
        self.epoch["counts"] += counts[0]

    def close_epoch(self) -> dict[str, float]:
        """Append the means of the epoch to the history, and return them. Waits for the device."""
        loss, scores = float(self.epoch["loss"]) / self.epoch["seen"], segmentation_metrics(self.epoch["counts"])
        self.history["train_losses"].append(loss)
        self.history["train_metrics_history"].append(scores)
        self.begin_epoch(self.epoch["place"][0] + 1, self.epoch["place"][1])
        return {"loss": loss, **scores}

    def loss(self, restored: Tensor, target: Tensor) -> Tensor:
        """Return the criterion, or its mean over several tasks."""
        k, ids = self.num_classes, self.ids(target).unsqueeze(1)  # (B,1,H,W)
        valid = None if self.ignore_index is None else (ids != self.ignore_index).float()
        classes = torch.arange(max(2, k), device=ids.device)[-k:]  # with one class only the foreground
        losses = [self.criterion(restored[:, :k], (ids == classes.view(-1, 1, 1)).float(), valid)]
        if self.multitask:
            parts = zip(restored[:, k:].split([k, k, 3], 1), target[:, 1:].split([k, k, 3], 1),
                        ("sigmoid", None, "sigmoid"))
            losses += [self.criterion(logits, soft, valid, how) for logits, soft, how in parts]
        return sum(losses) / len(losses)

    def ids(self, target: Tensor) -> Tensor:
        """Return the class ids (B,H,W) of a target."""
        return (target[:, 0] if self.multitask else target).long()

    def classes(self, restored: Tensor) -> Tensor:
        """Return the class ids (B,H,W) that logits (B,C,H,W) predict."""
        logits = restored[:, : self.num_classes]
        return (logits[:, 0] > 0).long() if self.num_classes == 1 else logits.argmax(1)

    def confusion(self, restored: Tensor, target: Tensor) -> Tensor:
        """Return true positives, false positives and false negatives of each class."""
        return confusion(self.classes(restored), self.ids(target), max(2, self.num_classes), self.ignore_index)

    # ------------------------------------------------ testing

    def metrics(self) -> dict[str, Any]:
        """Return name and loss of one image, and the counts that `summarize` sums, as `tp_<class>` etc."""
        row = {"name": self.names[0], "loss": float(self.loss(self.restored.float(), self.target))}
        return row | by_name(self.confusion(self.restored, self.target))

    def summarize(self, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the metrics of a test set; those of the set named "test" also extend the history."""
        loss, scores = sum(row["loss"] for row in rows) / len(rows), self.pooled(rows)
        if name == "test":
            self.history["val_losses"].append(loss)
            self.history["val_metrics_history"].append(scores)
            self.validated = [row["name"] for row in rows if "name" in row]
        return {"loss": loss, **scores}

    def pooled(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Return the metrics of several images together: their counts are summed before they are divided."""
        rows = list(rows)
        return segmentation_metrics(torch.tensor([[sum(row[f"{kind}_{c}"] for row in rows) for kind in COUNTS]
                                                  for c in range(max(2, self.num_classes))]))

    def summarize_inference(self, rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the metrics of all outputs together."""
        return self.pooled(rows.values())

    def pictures(self) -> list[Tensor]:
        """Return image, truth and prediction."""
        ids = self.ids(self.target)[0]
        return [self.degraded[0], self.colours(ids), self.colours(self.classes(self.restored)[0])]

    def colours(self, ids: Tensor) -> Tensor:
        """Colour class ids (H,W) as a picture (3,H,W) in [0,1]; ignored pixels are grey."""
        palette = torch.tensor(PALETTE, device=ids.device)
        shown = palette[ids % len(PALETTE)]
        if self.ignore_index is not None:
            shown[ids == self.ignore_index] = torch.tensor(IGNORED, device=ids.device)
        return shown.movedim(-1, 0)

    # ------------------------------------------------ prediction

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Predict class ids (H,W) of an image (3,H,W) in [0,1] of any size, in tiles of `val.tile`."""
        network = self.netE if self.netE is not None else self.netG
        network.eval()
        tile, overlap = self.opt["val"]["tile"], self.opt["val"]["tile_overlap"]
        image = image[None].to(self.device)
        if tile:
            p = merge_tiles(lambda x: self.probabilities(network, x), image, tile, overlap,
                            lambda _, length, __: fade(length, overlap))
        else:
            side = [self.data["image_size"]] * 2
            small = F.interpolate(image, side, mode="bilinear", antialias=True, align_corners=False)
            p = F.interpolate(self.probabilities(network, small), image.shape[-2:], mode="bilinear",
                              align_corners=False)
        return (p[0, 0] > 0.5).long() if self.num_classes == 1 else p[0].argmax(0)

    def load_for_inference(self, payload: Mapping[str, Any], source: str) -> str:
        """Load weights, and build the loss, which is a metric."""
        self.define_loss()
        return super().load_for_inference(payload, source)

    shown_output = "{}_overlay.png"

    def infer(self, source: str, truth: str | None, wanted: Callable[[str], bool]) -> Iterator[Any]:
        """Yield of each image `{stem}_overlay.png`, then `{stem}_pred.png` with class ids, or 0 and 255."""
        images = images_in(source)
        masks = by_stem(Path(truth), "truth") if truth else {}
        yield 2 * len(images)
        for path in images:
            stem = path.stem
            over, mask = f"{stem}_overlay.png", f"{stem}_pred.png"
            if not (wanted(over) or wanted(mask)):
                continue
            image = read_image(path)
            ids, metrics = self.predict(image).cpu(), None
            if stem in masks:
                target = read_mask(masks[stem], self.num_classes, self.ignore_index, self.data.get("mask_threshold"))
                counts = confusion(ids, target.long(), max(2, self.num_classes), self.ignore_index)
                scores = segmentation_metrics(counts)
                metrics = {name: scores[name] for name in ("iou", "precision", "recall", "f1")} | by_name(counts)
            yield over, self.overlay(image, ids), None
            yield mask, ids[None].float() / (1 if self.num_classes <= 2 else 255), metrics

    def probabilities(self, network: nn.Module, image: Tensor) -> Tensor:
        """Return the probabilities (1,K,H,W) of the classes of an image (1,3,H,W)."""
        return activate(network(image)[:, : self.num_classes].float())

    def overlay(self, image: Tensor, ids: Tensor) -> Tensor:
        """Return the image (3,H,W) in [0,1] with the foreground coloured."""
        found = (ids > 0).to(image.device)
        shades = torch.tensor(PALETTE[2:], device=image.device)
        colour = shades[(ids.to(image.device).long() - 1) % len(shades)].movedim(-1, 0)
        return torch.where(found, 0.5 * image + 0.5 * colour, image)

    # ------------------------------------------------ state

    def extra_state(self, finished: int) -> dict[str, Any]:
        """Return the extra state with histories and the sums of the epoch."""
        losses = [loss for loss in self.history["val_losses"] if math.isfinite(loss)]
        return {**super().extra_state(finished), **{name: list(rows) for name, rows in self.history.items()},
                "best_loss": min(losses, default=None), "validation_names": self.validated,
                "current_epoch": {**self.epoch, "place": list(self.epoch["place"])}}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore histories and sums."""
        super().load_extra_state(state)
        self.history = {name: list(state.get(name, [])) for name in HISTORIES}
        self.validated = list(state.get("validation_names", []))
        found = [part["current_epoch"] for part in state.get("ranks", [state]) if "current_epoch" in part]
        if found:  # before version 3 each rank saved sums of its own
            self.begin_epoch(*found[0]["place"])
            self.epoch["seen"] = found[0]["seen"]
            for name in ("loss", "counts"):
                self.epoch[name] += sum(one[name].to(self.device) for one in found)


def by_name(counts: Tensor) -> dict[str, float]:
    """Return the counts of `confusion` by name: tp_0, fp_0, fn_0, tp_1, ..."""
    return {f"{kind}_{c}": float(n) for c, row in enumerate(counts.tolist()) for kind, n in zip(COUNTS, row)}


def fade(length: int, overlap: int) -> Tensor:
    """Return weights (length,) that are 1 inside and fall over `overlap` pixels towards both ends, never to 0."""
    from_edge = torch.minimum(torch.arange(1, length + 1), torch.arange(length, 0, -1))
    return (from_edge / (overlap + 1)).clamp(max=1)


def hsv(image: Tensor) -> Tensor:
    """Convert RGB (B,3,H,W) in [0,1] to hue, saturation and value in [0,1]."""
    r, g, b = image.unbind(1)
    value, low = image.amax(1), image.amin(1)
    chroma = value - low
    by = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(value == r, (g - b) / by % 6, torch.where(value == g, (b - r) / by + 2, (r - g) / by + 4)) / 6
    saturation = chroma / torch.where(value > 0, value, 1)
    return torch.stack([torch.where(chroma > 0, hue, 0), saturation, value], dim=1)
