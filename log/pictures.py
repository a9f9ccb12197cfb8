"""Write pictures as PNG or JPEG files that are either complete or absent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from data.image_files import encode
from storage.files import save_file


def save_pictures(path: Path, pictures: Sequence[Tensor]) -> Tensor:
    """Write images (C, H, W) in [0, 1] of equal size side by side as one PNG. Returns that (C, H, W)."""
    from torchvision.utils import make_grid  # slow to import, and not every command writes pictures

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [picture.detach().float().cpu().clamp(0, 1) for picture in pictures]
    picture = make_grid(images, nrow=len(images), padding=4, pad_value=1)
    write_picture(path, picture)
    return picture


def write_picture(path: Path, picture: Tensor) -> None:
    """Write an image (C, H, W) in [0, 1] as a PNG, or a JPEG by its name, either complete or absent."""
    image = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    save_file(path, encode(image, "jpeg" if path.suffix == ".jpg" else "png"))
