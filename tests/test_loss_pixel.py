"""Pixel losses: what a plain computation in float64 gives, a case worked out by hand, and KAIR's numbers."""

import math

import numpy as np
import pytest
import torch

from losses import LOSSES
from losses.pixel import CharbonnierLoss, L1Loss, L2Loss, L2SumLoss, SSIMLoss
from options import Section, build


@pytest.fixture
def golden(shared):
    return torch.load(shared / "golden/kair_helpers.pt", weights_only=True)["losses"]


def plain_ssim(a, b, width=11):
    """SSIM of each image (B,), pixel by pixel: sums over a window of Gaussian weights, zeros beyond the border."""
    half = width // 2
    bell = np.exp(-np.arange(-half, half + 1) ** 2 / (2 * 1.5**2))
    weight = np.outer(bell, bell) / bell.sum() ** 2
    a, b = (np.pad(x.double().numpy(), [(0, 0), (0, 0), (half, half), (half, half)]) for x in (a, b))
    values = np.empty((*a.shape[:2], a.shape[2] - 2 * half, a.shape[3] - 2 * half))
    for place in np.ndindex(values.shape):
        image, channel, y, x = place
        p, q = (z[image, channel, y:y + width, x:x + width] for z in (a, b))
        mean_p, mean_q, pp, qq, pq = ((weight * z).sum() for z in (p, q, p * p, q * q, p * q))
        values[place] = ((2 * mean_p * mean_q + 0.0001) * (2 * (pq - mean_p * mean_q) + 0.0009)
                         / ((mean_p**2 + mean_q**2 + 0.0001) * (pp - mean_p**2 + qq - mean_q**2 + 0.0009)))
    return values.mean((1, 2, 3))


def pair(*shape):
    target = torch.rand(shape, dtype=torch.float64)
    return target + 0.2 * torch.randn_like(target), target


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 4, 3, 5, 6)], ids=["images", "frames"])
@pytest.mark.parametrize("loss, plain", [
    (L1Loss(), lambda d: np.abs(d).mean()),
    (L2Loss(), lambda d: (d * d).mean()),
    (L2SumLoss(), lambda d: (d * d).sum()),
    (CharbonnierLoss(), lambda d: np.sqrt(d * d + 0.000000001).mean()),
    (CharbonnierLoss(0.01), lambda d: np.sqrt(d * d + 0.01).mean()),
], ids=["l1", "l2", "l2sum", "charbonnier", "charbonnier 0.01"])
def test_losses_are_their_formulas(loss, plain, shape):
    restored, target = pair(*shape)
    assert loss(restored, target).item() == pytest.approx(plain((restored - target).numpy()), rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 9, 14), (1, 1, 4, 13)], ids=str)
def test_ssim_is_its_formula(shape):
    restored, target = pair(*shape)
    wanted = plain_ssim(restored, target)
    loss = SSIMLoss()
    assert loss.similarity(restored, target).tolist() == pytest.approx(wanted, rel=1e-6)  # its window is float32
    assert loss(restored, target).item() == pytest.approx(1 - wanted.mean(), rel=1e-6)
    frames = [torch.stack([x, x.flip(-1)], dim=1) for x in (restored, target)]  # (B,T,C,H,W)
    assert loss(*frames).item() == pytest.approx(loss(restored, target).item(), rel=1e-6)


def test_ssim_of_one_pixel_by_hand():
    """Of an image of one pixel only the middle weight k counts: mean k a, variance k a^2 - k^2 a^2."""
    k = 1 / (1 + 2 * sum(math.exp(-n * n / 4.5) for n in range(1, 6))) ** 2
    a, b, c1, c2 = 0.8, 0.5, 0.0001, 0.0009
    variance = k - k * k
    wanted = ((2 * k * k * a * b + c1) * (2 * variance * a * b + c2)
              / ((k * k * (a * a + b * b) + c1) * (variance * (a * a + b * b) + c2)))
    a, b = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (a, b))
    assert SSIMLoss()(a, b).item() == pytest.approx(1 - wanted, rel=1e-6)


def test_values_are_those_of_kair(golden):
    """Seven of Charbonnier, three of SSIM; KAIR's SSIMLoss is the similarity, and one of its windows is 7 wide."""
    images, frames = (golden["a"], golden["b"]), (golden["a5"], golden["b5"])
    for name, wanted in golden["values"].items():
        kind, how, *rest = name.split("/")
        if kind == "charbonnier":
            loss = CharbonnierLoss() if how == "default" else CharbonnierLoss(float(how.removeprefix("eps=")))
            found = loss(*(frames if rest == ["5d"] else images)).item()
        elif rest == ["window7"]:
            found = plain_ssim(*images, width=7).mean()
        else:
            found = 1 - SSIMLoss()(*(x[:, : int(how[0])] for x in images)).item()
        assert found == pytest.approx(wanted, abs=1e-6), name
    assert len(golden["values"]) == 10


def test_similarity_and_gradients_are_those_of_kair(golden):
    torch.testing.assert_close(SSIMLoss().similarity(golden["a"], golden["b"]), golden["ssim_per_sample"],
                               rtol=0, atol=1e-6)
    for loss, a, b, wanted in ((CharbonnierLoss(), "a5", "b5", golden["charbonnier_grad_5d"]),
                               (SSIMLoss(), "a", "b", -golden["ssim_grad_3ch"])):
        leaf = golden[a].clone().requires_grad_()
        loss(leaf, golden[b]).backward()
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("name, kind", [
    ("l1", L1Loss), ("l2", L2Loss), ("l2sum", L2SumLoss), ("ssim", SSIMLoss), ("charbonnier", CharbonnierLoss)])
def test_option_files_name_them(name, kind):
    assert type(build(LOSSES, Section(type=name), "type")) is kind
