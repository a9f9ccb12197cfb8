"""ResUNet-a and its Tanimoto loss beside a second implementation in float64, written down from the paper's equations.

Diakogiannis et al. 2020, arXiv:1904.00592: figure 2 (residual block), figure 3 (pooling), table 1 (order of the
layers), section 2.4 (Tanimoto). Weights are copied; outputs, the gradients of all weights and that of the image agree.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses.tanimoto import TanimotoLoss
from models.model_segmentation import ModelSegmentation
from models.network_resuneta import ResUNetA

DILATIONS = ((1, 3, 7), (1, 2), (1,))


class Reference:
    """The network as a function of an image, from weights under the keys of ResUNetA's state."""

    def __init__(self, state, norm, training, back):
        self.state, self.normalised, self.training, self.back = state, norm, training, back

    def conv(self, x, key, dilation=1, stride=1):
        weight = self.state[f"{key}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{key}.bias"), stride, dilation * (weight.shape[-1] // 2), dilation)

    def norm(self, x, key):
        axes = {"batch": (0, 2, 3), "instance": (2, 3), "layer": (1, 2, 3)}[self.normalised]
        mean = x.mean(axes, keepdim=True)
        variance = ((x - mean) ** 2).mean(axes, keepdim=True)
        if self.normalised == "batch" and not self.training:
            mean, variance = (self.state[f"{key}.running_{name}"].view(1, -1, 1, 1) for name in ("mean", "var"))
        weight, bias = (self.state[f"{key}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        return (x - mean) / (variance + 1e-5) ** 0.5 * weight + bias

    def conv_norm(self, x, key):
        return self.norm(self.conv(x, f"{key}.0"), f"{key}.1")

    def block(self, x, key, dilations):
        """x + sum of branches of BN, ReLU, convolution, BN, ReLU, convolution."""
        out = x
        for n, dilation in enumerate(dilations):
            y = self.conv(self.norm(x, f"{key}.branches.{n}.0").relu(), f"{key}.branches.{n}.2", dilation)
            y = self.conv(self.norm(y, f"{key}.branches.{n}.3").relu(), f"{key}.branches.{n}.5", dilation)
            out = out + y
        return out

    def pooling(self, x, key):
        """1, 4, 16 and 64 parts of the map, each filled with its largest value, convolved, beside the map itself."""
        maps = [x]
        for n, side in enumerate((1, 2, 4, 8)):
            rows = [torch.cat([part.amax((2, 3), keepdim=True).expand_as(part) for part in row.chunk(side, 3)], 3)
                    for row in x.chunk(side, 2)]
            maps.append(self.conv_norm(torch.cat(rows, 2), f"{key}.parts.{n}"))
        return self.conv_norm(torch.cat(maps, 1), f"{key}.merge")

    def __call__(self, x, classes):
        first = x = self.conv_norm(x, "stem").relu()  # row 1
        skips = []
        for level, dilations in enumerate(DILATIONS):  # rows 2-12
            x = self.block(self.conv(x, f"down.{level - 1}", stride=2) if level else x, f"encoder.{level}", dilations)
            skips.append(x)
        x = self.pooling(x, "bridge").relu()  # row 13
        for level in reversed(range(len(DILATIONS) - 1)):  # rows 14-28
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = torch.cat([self.conv_norm(x, f"up.{level}").relu(), skips[level]], 1)
            x = self.block(self.conv_norm(x, f"combine.{level}"), f"decoder.{level}", self.back[level])
        both = torch.cat([x, first], 1)  # row 29
        pooled = self.pooling(both, "pool").relu()  # row 30
        if "head.weight" in self.state:
            return self.conv(pooled, "head")  # row 31
        distance = self.conv_norm(self.conv_norm(both, "head.distance.0").relu(), "head.distance.1").relu()
        distance = self.conv(distance, "head.distance.2")
        likely = distance.sigmoid() if classes == 1 else distance.softmax(1)
        boundary = self.conv_norm(torch.cat([pooled, likely], 1), "head.boundary.0").relu()
        boundary = self.conv(boundary, "head.boundary.1")
        y = self.conv_norm(torch.cat([pooled, boundary.sigmoid(), likely], 1), "head.segmentation.0").relu()
        y = self.conv(self.conv_norm(y, "head.segmentation.1").relu(), "head.segmentation.2")
        return torch.cat([y, boundary, distance, self.conv(both, "head.color")], 1)


@pytest.mark.parametrize("norm, training, multitask, classes, back", [
    ("batch", True, False, 3, None), ("batch", False, False, 2, ((1, 3), (1, 2))), ("batch", True, True, 3, None),
    ("instance", True, False, 1, None), ("layer", False, True, 1, ((1, 5), (1,)))], ids=str)
def test_outputs_and_gradients_are_the_equations(norm, training, multitask, classes, back):
    net = ResUNetA(width=4, num_classes=classes, dilations=DILATIONS, decoder_dilations=back, layer_norm=norm,
                   multitask=multitask).double().train(training)
    for name, value in net.state_dict().items():  # norms that start at 1 and 0 would hide a missing one
        if value.ndim == 1 and value.is_floating_point():
            value.copy_(torch.rand_like(value) + (0.0 if name.endswith("bias") else 0.5))
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)  # at the bottom 8 x 8: each scale has equal parts
    copies = {key: value.clone().requires_grad_(value.is_floating_point()) for key, value in net.state_dict().items()}
    ours, theirs = image.clone().requires_grad_(), image.clone().requires_grad_()
    wanted = Reference(copies, norm, training, back or ((1,), (1,)))(theirs, classes)
    found = net(ours)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(found)
    (found * cotangent).sum().backward()
    (wanted * cotangent).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, copies[name].grad, rtol=1e-7, atol=1e-9, msg=name)


def plain_tanimoto(p, labels, smooth):
    """1 - the mean of T with complement, by loops over images and classes; (B,K,H,W) arrays."""
    def similarity(p, labels):
        volumes = [labels[:, c].sum((1, 2)).mean() for c in range(labels.shape[1])]
        largest = max([volume**-2 for volume in volumes if volume > 0], default=0.0)
        weights = [volume**-2 if volume > 0 else largest for volume in volumes]
        found = []
        for image, truth in zip(p, labels):
            over = under = smooth
            for w, a, b in zip(weights, image, truth):
                over, under = over + w * (a * b).sum(), under + w * (a * a + b * b - a * b).sum()
            found.append(over / under)
        return np.array(found)

    return 1 - ((similarity(p, labels) + similarity(1 - p, 1 - labels)) / 2).mean()


def one_hot(ids, classes):
    return F.one_hot(ids, classes).movedim(-1, 1).double()


@pytest.mark.parametrize("classes, smooth", [(2, 1e-5), (4, 0.1)])
def test_tanimoto_is_its_equation_also_for_an_absent_class(classes, smooth):
    logits = torch.randn(3, classes, 5, 6, dtype=torch.float64)
    p = logits.softmax(1).numpy()
    for labels in (one_hot(torch.randint(classes, (3, 5, 6)), classes), one_hot(torch.ones(3, 5, 6).long(), classes)):
        found = TanimotoLoss(smooth=smooth)(logits, labels)
        assert found.item() == pytest.approx(plain_tanimoto(p, labels.numpy(), smooth), rel=1e-12)


def test_tanimoto_by_hand():
    """Two pixels of one class, p = (1/2, 1), l = (1, 1): N = 3/2, D = 5/4 + 2 - 3/2 = 7/4; none of 1 - l is there."""
    logits, labels = torch.tensor([0.0, 40.0], dtype=torch.float64).view(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    found = TanimotoLoss(complement=False, smooth=1e-12)(logits, labels.double())
    assert found.item() == pytest.approx(1 - 6 / 7, rel=1e-9)
    found = TanimotoLoss(smooth=1e-12)(logits, labels.double())  # no class has a weight there: T = s / s
    assert found.item() == pytest.approx(1 - (6 / 7 + 1) / 2, rel=1e-9)


def test_the_loss_of_four_tasks_is_the_mean_of_theirs():
    model = object.__new__(ModelSegmentation)
    model.__dict__.update(num_classes=3, ignore_index=None, multitask=True, criterion=TanimotoLoss())
    logits, ids = torch.randn(2, 12, 5, 6, dtype=torch.float64), torch.randint(3, (2, 5, 6))
    soft = torch.rand(2, 9, 5, 6, dtype=torch.float64)  # boundary, distance, colour
    segmentation, boundary, distance, color = logits.split([3, 3, 3, 3], 1)
    parts = [(segmentation.softmax(1), one_hot(ids, 3)), (boundary.sigmoid(), soft[:, :3]),
             (distance.softmax(1), soft[:, 3:6]), (color.sigmoid(), soft[:, 6:])]
    wanted = np.mean([plain_tanimoto(p.numpy(), labels.numpy(), 1e-5) for p, labels in parts])
    found = model.loss(logits, torch.cat([ids[:, None].double(), soft], 1))
    assert found.item() == pytest.approx(wanted, rel=1e-7)
