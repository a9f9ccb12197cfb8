"""The smallest run that has everything a state can hold, so that hundreds of resumes take seconds.

A network with batch statistics and dropout, data with its own random augmentation; ModelPlain and the loop are the
real ones. As a program it is `main.py` with these in its tables, and dies at the N-th file operation when asked to:

    python -m tests.tiny [--die-at N] -opt FILE ...
"""

import os
import signal
import sys

import torch
import torch._dynamo  # the first step of an optimizer imports it, which takes 1.3 s: here once for all forked processes
import torchvision.io  # noqa: F401  0.3 s, likewise
from torch import nn

import losses.pixel  # noqa: F401  imported by name at a start: once here as well
import main as door
import metrics.psnr_ssim  # noqa: F401
import models.model_plain  # noqa: F401
from data import DATASETS
from data.sampler import sample_rng
from models import MODELS, NETWORKS
from runtime.hooks import Hooks
from storage import system
from tests.conftest import write_json

ROWS = ((MODELS, "tiny", "models.model_plain:ModelPlain"), (NETWORKS, "tiny", "tests.tiny:Net"),
        (DATASETS, "tiny", "tests.tiny:Images"))
FILE_OPERATIONS = ("fsync", "replace", "link", "unlink")


def add_rows(patch):
    """Put these rows in the tables for as long as a MonkeyPatch lasts."""
    for table, name, row in ROWS:
        patch.setitem(table, name, row)


class Net(nn.Module):
    def __init__(self, *, width: int = 8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU(), nn.Dropout(0.2),
                                  nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class Images(torch.utils.data.Dataset):
    def __init__(self, *, num_samples: int = 11, size: int = 16, seed: int = 0):
        self.num_samples, self.size, self.seed = num_samples, size, seed

    def __len__(self):
        return self.num_samples

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = sample_rng(self.seed, epoch, index)
        target = torch.from_numpy(rng.random((3, self.size, self.size), dtype="float32"))
        noise = torch.from_numpy(rng.normal(size=target.shape).astype("float32"))
        return {"L": target + 0.2 * noise, "H": target, "folder": f"{index}", "key": f"{epoch}/{index}"}


def options(folder, name, train=None, **over):
    """The tree of an option file whose run lies in folder/name."""
    train = {"total_iter": 9, "checkpoint_save": 2, "checkpoint_test": 3, "checkpoint_print": 1, "E_decay": 0.9,
             "G_optimizer_lr": 0.01, "G_optimizer_clipgrad": 0.5, "G_scheduler_type": "CosineAnnealingWarmRestarts",
             **(train or {})}
    loader = {"dataset_type": "tiny", "dataloader_batch_size": 4, "dataloader_num_workers": over.pop("workers", 0)}
    return {"task": name, "model": "tiny", "path": {"root": str(folder)}, "num_threads": 1, "val": {"save_img": False},
            "datasets": {"train": loader, "test": {"dataset_type": "tiny", "num_samples": 2}},
            "netG": {"net_type": "tiny"}, "train": train, **over}


def write(folder, name="run", *args, **over):
    """Write the option file folder/NAME.json with these `options`. Returns its path."""
    return write_json(folder / f"{name}.json", options(folder, name, *args, **over))


class At(Hooks):
    """Calls `act(run)` at an event of one iteration, e.g. `At("after_step", 3, stop)`."""

    def __init__(self, event, iteration, act):
        setattr(self, event, lambda run: act(run) if run.iteration == iteration else None)


def stop_after(iteration, sig=signal.SIGTERM):
    """Send this process a signal in the step of this number."""
    return At("after_step", iteration, lambda run: system.send_to_self(sig))


def die_at(count):
    """Kill this process by SIGKILL before its count-th file operation."""
    left = iter(range(count - 1, -1, -1))

    def deadly(real):
        def call(*args, **kwargs):
            if next(left, 1) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in FILE_OPERATIONS:
        setattr(os, name, deadly(getattr(os, name)))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] == "--die-at":
        die_at(int(arguments[1]))
        arguments = arguments[2:]
    for table, name, row in ROWS:
        table[name] = row
    door.program(arguments)
