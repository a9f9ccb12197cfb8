"""How close pictures are: PSNR and SSIM, on RGB or on luma (Y of BT.601), as KAIR and BasicSR report them; how much of
a segmentation is right.

Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004; MATLAB's
rgb2ycbcr. Same numbers as KAIR's utils_image, without its side effects: no argument is ever changed, and an
unsupported shape is an error. Legend: T frames, C channels, H W pixels; values 0..255 unless it says otherwise.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Image = np.ndarray | Tensor

# ITU-R BT.601, studio swing: rows Y, Cb, Cr of R, G, B in 0..1
YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
YCBCR_OFFSET = (16.0, 128.0, 128.0)


def calculate_psnr(img1: Image, img2: Image, border: int = 0) -> float:
    """Peak signal-to-noise ratio.

    Args:
        img1, img2: (H,W) or (H,W,C), C = 1 or 3, uint8 or float, 0..255.
        border: pixels to leave out on each side.
    Returns:
        decibels; inf for identical images.
    Raises:
        ValueError: shapes that differ or don't fit.
    """
    return _psnr(*_planes(img1, img2, border)).item()


def calculate_ssim(img1: Image, img2: Image, border: int = 0) -> float:
    """Structural similarity: Gaussian window of 11 x 11, sigma 1.5, valid region; mean over channels and pixels.

    Args, Raises: as calculate_psnr; what is left after the border needs 11 x 11 pixels.
    Returns: similarity, 1 for identical images.
    """
    return _ssim(*_planes(img1, img2, border)).item()


def rgb2ycbcr(img: Image, only_y: bool = True) -> Image:
    """RGB -> YCbCr, or Y alone.

    Args:
        img: (...,3) uint8 in 0..255 or float in [0,1].
        only_y: return Y (...) instead of (...,3).
    Returns:
        the same kind and dtype: uint8 rounded, in 16..235 (Cb, Cr 16..240), or float, that divided by 255.
    """
    return _ycbcr(img, YCBCR, only_y)


def bgr2ycbcr(img: Image, only_y: bool = True) -> Image:
    """BGR -> YCbCr, or Y alone; otherwise as rgb2ycbcr."""
    return _ycbcr(img, tuple(row[::-1] for row in YCBCR), only_y)


def video_metrics(restored: Tensor, target: Tensor) -> dict[str, float]:
    """Metrics of one clip: means over its frames, on what an 8-bit file would hold.

    Args:
        restored, target: (T,3,H,W) RGB in [0,1]; what lies outside is clamped.
    Returns:
        {"psnr", "ssim"} on RGB and {"psnr_y", "ssim_y"} on Y, the latter not rounded again.
    Source: the test loop of KAIR's main_train_vrt.
    """
    if restored.shape != target.shape or restored.ndim != 4 or restored.shape[1] != 3:
        raise ValueError(f"clips of shape {tuple(restored.shape)} and {tuple(target.shape)}; both must be (T,3,H,W)")
    pairs = [clip.detach().clamp(0, 1).mul(255).round().cpu() for clip in (restored, target)]
    luma = [255 * rgb2ycbcr(clip.movedim(1, -1) / 255).unsqueeze(1) for clip in pairs]
    scores = {"psnr": _psnr, "ssim": _ssim}
    means = {name: score(*pairs).mean().item() for name, score in scores.items()}
    return means | {f"{name}_y": score(*luma).mean().item() for name, score in scores.items()}


def overlap(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """How well a set of pixels covers another, of which both may be empty.

    Args: found, wanted: bool tensors of equal shape.
    Returns: {"iou", "precision", "recall", "f1"} in [0,1]; 1 where there was nothing to find and nothing was found.
    """
    hits, num_found, num_wanted = ((found & wanted).sum().item(), found.sum().item(), wanted.sum().item())
    return {"iou": _share(hits, num_found + num_wanted - hits), "precision": _share(hits, num_found),
            "recall": _share(hits, num_wanted), "f1": f1(hits, num_found, num_wanted)}


def f1(hits: int, num_found: int, num_wanted: int) -> float:
    """Harmonic mean of precision and recall; 1 where there was nothing to find and nothing was found."""
    return _share(2 * hits, num_found + num_wanted)


def matches(found: Tensor, wanted: Tensor, radius: float) -> int:
    """How many points lie near a wanted one; each may be used once, by the first that comes.

    Args: found: (N,2), the surest first. wanted: (M,2). radius: largest distance, in the points' unit.
    """
    distances, hits = torch.cdist(found.double(), wanted.double()), 0
    for row in distances if len(wanted) else ():
        distance, place = row.min(0)
        if distance <= radius:
            hits += 1
            distances[:, place] = math.inf
    return hits


def direction_error(found: Tensor, wanted: Tensor) -> float:
    """Mean angle between lines, in degrees 0..90.

    Args: found, wanted: (2,N) cos and sin of twice the lines' angles, of any length. Returns: 0 if N is 0.
    """
    (x, y), (u, v) = found.double(), wanted.double()
    angles = torch.atan2(x * v - y * u, x * u + y * v).abs() / 2
    return math.degrees(angles.mean().item()) if len(angles) else 0.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def image_metrics(restored: Tensor, target: Tensor) -> dict[str, float]:
    """PSNR over all channels, a mean over images, on what an 8-bit file would hold; and what one colour would get.

    Args:
        restored, target: (B,C,H,W) in [0,1]; what lies outside is clamped.
    Returns:
        {"psnr", "psnr_mean_colour"}: the latter of pictures that are nothing but their own mean colour.
    """
    if restored.shape != target.shape or restored.ndim != 4:
        raise ValueError(f"images of shape {tuple(restored.shape)} and {tuple(target.shape)}; both must be (B,C,H,W)")
    restored, target = (images.detach().clamp(0, 1).mul(255).round().cpu() for images in (restored, target))
    plain = target.mean((2, 3), keepdim=True).round().expand_as(target)
    return {"psnr": _psnr(restored, target).mean().item(), "psnr_mean_colour": _psnr(plain, target).mean().item()}


def codebook_use(indices: Tensor, num_codes: int) -> dict[str, Tensor]:
    """How much of a codebook is in use.

    Args:
        indices: of any shape, 0..num_codes - 1.
    Returns:
        {"codes_used": share of the codes that occur, 0..1, "perplexity": exp of the entropy of the indices,
        1..num_codes}, scalars on the indices' device.
    """
    hits = torch.zeros(num_codes, device=indices.device)
    hits.index_add_(0, indices.flatten(), torch.ones_like(indices.flatten(), dtype=hits.dtype))
    share = hits / indices.numel()
    return {"codes_used": (hits > 0).float().mean(), "perplexity": torch.special.entr(share).sum().exp()}
def confusion(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = None) -> Tensor:
    """Counts to be added up over a data set before anything is divided.

    Args:
        prediction, target: class ids of equal shape, 0..num_classes-1.
        ignore_index: value of target where a pixel does not count.
    Returns: (num_classes,3) int64 true positives, false positives, false negatives of each class.
    """
    valid = target != (-1 if ignore_index is None else ignore_index)
    classes = torch.arange(num_classes, device=target.device).view(-1, *[1] * target.ndim)
    said, true = (prediction == classes) & valid, target == classes  # (K,...)
    counts = [said & true, said & ~true, ~said & true & valid]
    return torch.stack([each.flatten(1).sum(1) for each in counts], dim=1)


def segmentation_metrics(counts: Tensor) -> dict[str, float]:
    """Intersection over union, precision, recall and F1 of summed counts.

    Args: counts: (K,3) as of `confusion`; of two classes the second is the foreground, and it alone counts.
    Returns: {"iou", "precision", "recall", "f1"}; for more than two classes the means over those that occur, and
        `iou_<class>` of each of them. Where nothing is there and nothing was found, the IoU is 1 and the rest is 0.
    """
    scores = [_scores(*row) for row in counts.tolist()[1 if len(counts) == 2 else 0:] if any(row)] or [_scores(0, 0, 0)]
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    if len(counts) > 2:
        means |= {f"iou_{c}": _scores(*row)["iou"] for c, row in enumerate(counts.tolist()) if any(row)}
    return means


def _scores(hits: float, false: float, missed: float) -> dict[str, float]:
    def share(part: float, whole: float, empty: float = 0.0) -> float:
        return part / whole if whole else empty

    return {"iou": share(hits, hits + false + missed, empty=1.0), "precision": share(hits, hits + false),
            "recall": share(hits, hits + missed), "f1": share(2 * hits, 2 * hits + false + missed)}


def _planes(img1: Image, img2: Image, border: int) -> list[Tensor]:
    """Two (H,W) or (H,W,C) images -> two (1,C,H,W) float64 without their borders."""
    planes = []
    for img in (img1, img2):
        img = _tensor(img)
        img = img.unsqueeze(-1) if img.ndim == 2 else img
        if img.ndim != 3 or img.shape[-1] not in (1, 3):
            raise ValueError(f"an image of shape {tuple(img.shape)}; (H,W), (H,W,1) or (H,W,3) is needed")
        planes.append(img.movedim(-1, 0)[None].double())
    height, width = planes[0].shape[-2:]
    if planes[0].shape != planes[1].shape:
        raise ValueError(f"images of different shapes: {tuple(np.shape(img1))} and {tuple(np.shape(img2))}")
    if not 0 <= 2 * border < min(height, width):
        raise ValueError(f"a border of {border} leaves nothing of {height} x {width} pixels")
    return [x[..., border : height - border, border : width - border] for x in planes]


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    """(T,C,H,W) twice -> (T,) decibels."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 20 * torch.log10(255 / error.sqrt())


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    """(T,C,H,W) twice -> (T,). One frame at a time: its five moment maps stay in the processor's cache."""
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM's window is 11 x 11; {a.shape[-2]} x {a.shape[-1]} pixels are too few")
    return torch.stack([_frame_ssim(x.double(), y.double()) for x, y in zip(a, b, strict=True)])


def _frame_ssim(x: Tensor, y: Tensor) -> Tensor:
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    moments = torch.stack([x, y, x * x, y * y, x * y])  # (5,C,H,W)
    mean_x, mean_y, xx, yy, xy = _gaussian_window(moments)
    var_x, var_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean()


def _gaussian_window(x: Tensor) -> Tensor:
    """(...,H,W) -> (...,H-10,W-10): weighted means over 11 x 11 pixels, one axis after the other."""
    weights = [math.exp(-0.5 * (offset / 1.5) ** 2) for offset in range(-5, 6)]
    for axis in (-2, -1):  # sums of shifted views: in float64 many times as fast as a convolution
        shifted = [x.narrow(axis, start, x.shape[axis] - 10) for start in range(11)]
        x = shifted[0] * (weights[0] / sum(weights))
        for view, weight in zip(shifted[1:], weights[1:]):
            x.add_(view, alpha=weight / sum(weights))
    return x


def _ycbcr(img: Image, matrix: tuple, only_y: bool) -> Image:
    x = _tensor(img)
    if x.ndim < 1 or x.shape[-1] != 3 or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise ValueError(f"{x.dtype} of shape {tuple(x.shape)}; (...,3) uint8 or float is needed")
    rows = slice(0, 1 if only_y else 3)
    levels = x.double() if x.dtype == torch.uint8 else x.double() * 255
    out = levels @ torch.tensor(matrix[rows], dtype=torch.float64).T.to(x.device) / 255
    out += torch.tensor(YCBCR_OFFSET[rows], dtype=torch.float64, device=x.device)
    out = (out.round() if x.dtype == torch.uint8 else out / 255).to(x.dtype)
    out = out[..., 0] if only_y else out
    return out if isinstance(img, Tensor) else out.numpy()


def _tensor(img: Image) -> Tensor:
    return img if isinstance(img, Tensor) else torch.from_numpy(np.ascontiguousarray(img))  # BGR views run backwards
