"""Write the kept checkpoints: a small real set of each recipe, by the code in the current folder.

    cd CHECKOUT && python /path/to/tests/checkpoints/write.py FOLDER [vrt lgt ...]

makes FOLDER/{kind}_v{version}.tar.xz: the set of iteration 4 of {kind}.json; and beside it, from version 3 on,
{kind}_v{version}.json: numbers of the set of iteration 6. The published networks are too large to keep. So
normalisation here has one group, VRT narrow layers for flow and alignment, and InkTrace another network, in all
versions alike.
"""

import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
KINDS = sorted(path.stem for path in HERE.glob("*.json") if "_v" not in path.stem)
KEPT, LAST = 4, 6  # iterations


class Strokes(nn.Module):
    """Stand in for the network of InkTrace."""

    def __init__(self, *, full_heads: bool = True):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.GELU(),
                                  nn.Dropout(0.2), nn.Conv2d(4, 8 if full_heads else 3, 3, padding=1))

    def forward(self, x, use_skips=True):
        maps = importlib.import_module("models.network_inktrace").unpack(self.body(x))
        return {name: value.sigmoid() if name in ("skeleton", "keypoints") else value for name, value in maps.items()}


class Flow(nn.Module):
    """Stand in for a level of VRT's SPyNet."""

    def __init__(self):
        super().__init__()
        self.basic_module = nn.Sequential(nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))

    def forward(self, x):
        return self.basic_module(x)


class Alignment(nn.Module):
    """Stand in for VRT's deformable alignment."""

    def __init__(self, dim, *_):
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, clip, flows):
        vrt = importlib.import_module("models.network_vrt")
        aligned = vrt.warp_frames(clip[:, 1:], flows[0])
        return vrt.pad_frames(self.mix(aligned.movedim(2, -1)).movedim(-1, 2), 1)


def make_small(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Make the network of a recipe small for as long as `patch` lasts."""
    if kind == "vrt":
        patch.setattr("models.network_spynet.BasicModule", Flow)
        patch.setattr("models.network_vrt.DeformableAlignment", Alignment)
    elif kind.startswith("inktrace"):
        patch.setitem(importlib.import_module("models").NETWORKS, "strokes", f"{__name__}:Strokes")
    elif kind in ("lgt", "vqgan"):
        patch.setattr(f"models.network_{kind}.GROUPS", 1)


def numbers_of(parts: dict) -> dict[str, list[float]]:
    """Reduce the weights of a network, and each moment of an optimizer, to a norm and a product with fixed numbers.

    All tensors together: the gradient of some is rounding alone, which Adam scales up to the learning rate.
    """
    found = {}
    for label, part in parts.items():
        rows = part["state"].values() if label.startswith("optimizer") else [part] if label != "state" else []
        for row in rows:
            for name, tensor in row.items():
                if torch.is_tensor(tensor) and tensor.is_floating_point():
                    found.setdefault(f"{label} {name}" if label.startswith("optimizer") else label, []).append(
                        tensor.double().flatten())
    for name, tensors in found.items():
        flat = torch.cat(tensors)
        weights = (0.618 * torch.arange(len(flat), dtype=torch.float64).square()).cos()
        found[name] = [float(f"{number:.10g}") for number in (flat.norm(), flat @ weights)]
    return found


def write(kind: str, folder: Path) -> None:
    """Run a recipe to its end in a folder of its own, and keep what belongs to iteration 4."""
    import checkpoint
    import main

    target = folder / f"{kind}_v{checkpoint.VERSION}"
    make_small(kind, pytest.MonkeyPatch())
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        shutil.copy(HERE / f"{kind}.json", ".")
        assert not main.main(["-opt", f"{kind}.json"])
        models = Path("experiments", kind, "models")
        last = checkpoint.find_newest(models)
        assert last.iteration == LAST
        if checkpoint.VERSION >= 3:
            target.with_suffix(".json").write_text(json.dumps(numbers_of(last.load()), indent=1) + "\n")
        for path in models.iterdir():
            if not path.name.startswith((f"{KEPT}_", f"{KEPT}.", f"it{KEPT}.")):
                path.unlink()
        for path in models.parent.iterdir():
            if path != models:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.make_archive(str(target), "xztar", ".", "experiments")


def digest_of_names(network: nn.Module) -> str:
    """Return a checksum of the names and shapes of all tensors that a checkpoint of a network holds."""
    lines = [f"{name} {tuple(tensor.shape)}" for name, tensor in network.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in sys.argv[2:] or KINDS:
        if (process := os.fork()) == 0:
            write(name, Path(sys.argv[1]).resolve())
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(process, 0)[1] == 0, name
