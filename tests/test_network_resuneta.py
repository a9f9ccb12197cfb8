"""ResUNet-a d6, row by row of the paper's table; every other option by what it changes."""

import pytest
import torch
from torch import nn

from models.network_resuneta import D6, PSPPooling, ResBlockA, ResUNetA, largest_of_parts

# Counted by hand. c(a, b) = a b: a 1x1 convolution without bias; a norm has 2 f, weight and bias.
#   conv + norm:      c(a, b) + 2 b                 down: c(f, 2f) + 2f, a bias, no norm
#   ResBlock-a f:     for each rate 2 norms, 2 convolutions 3x3, one bias: 2*2f + 2*9 f^2 + f = 18 f^2 + 5 f
#   PSPPooling a->f:  4 (a f/4 + 2 f/4) + (a + f) f + 2 f
# row: (output channels, side at 256, dilations, parameters)
TABLE = {
    1: (32, 256, None, 3 * 32 + 64),  # 160
    2: (32, 256, (1, 3, 15, 31), 4 * (18 * 32**2 + 5 * 32)),  # 4 * 18,592 = 74,368
    3: (64, 128, None, 32 * 64 + 64),  # 2,112
    4: (64, 128, (1, 3, 15, 31), 4 * (18 * 64**2 + 5 * 64)),  # 4 * 74,048 = 296,192
    5: (128, 64, None, 64 * 128 + 128),  # 8,320
    6: (128, 64, (1, 3, 15), 3 * (18 * 128**2 + 5 * 128)),  # 3 * 295,552 = 886,656
    7: (256, 32, None, 128 * 256 + 256),  # 33,024
    8: (256, 32, (1, 3, 15), 3 * (18 * 256**2 + 5 * 256)),  # 3 * 1,180,928 = 3,542,784
    9: (512, 16, None, 256 * 512 + 512),  # 131,584
    10: (512, 16, (1,), 18 * 512**2 + 5 * 512),  # 4,721,152
    11: (1024, 8, None, 512 * 1024 + 1024),  # 525,312
    12: (1024, 8, (1,), 18 * 1024**2 + 5 * 1024),  # 18,879,488
    13: (1024, 8, None, 4 * (1024 * 256 + 512) + 2048 * 1024 + 2048),  # 1,050,624 + 2,099,200 = 3,149,824
    14: (512, 8, None, 1024 * 512 + 1024),  # 525,312; convolved at 8, then enlarged to 16
    15: (512, 16, None, 1024 * 512 + 1024),  # 525,312: two times 512 channels in, 512 out
    16: (512, 16, (1,), 18 * 512**2 + 5 * 512),  # 4,721,152
    17: (256, 16, None, 512 * 256 + 512),  # 131,584
    18: (256, 32, None, 512 * 256 + 512),  # 131,584
    19: (256, 32, (1,), 18 * 256**2 + 5 * 256),  # 1,180,928
    20: (128, 32, None, 256 * 128 + 256),  # 33,024
    21: (128, 64, None, 256 * 128 + 256),  # 33,024
    22: (128, 64, (1,), 18 * 128**2 + 5 * 128),  # 295,552
    23: (64, 64, None, 128 * 64 + 128),  # 8,320
    24: (64, 128, None, 128 * 64 + 128),  # 8,320
    25: (64, 128, (1,), 18 * 64**2 + 5 * 64),  # 74,048
    26: (32, 128, None, 64 * 32 + 64),  # 2,112
    27: (32, 256, None, 64 * 32 + 64),  # 2,112
    28: (32, 256, (1,), 18 * 32**2 + 5 * 32),  # 18,592
    # 29: concatenation with row 1: 64 channels, nothing to learn
    30: (32, 256, None, 4 * (64 * 8 + 16) + 96 * 32 + 64),  # 2,112 + 3,136 = 5,248
    31: (6, 256, None, 32 * 6 + 6),  # 198; 32 is the softmax, which the loss applies
}
TOTAL = 39_947_398  # the sum of all rows, for six classes


def rows(net):
    """The module of each row."""
    found = [net.stem, net.encoder[0]]
    for level in range(1, 6):
        found += [net.down[level - 1], net.encoder[level]]
    found.append(net.bridge)
    for level in range(4, -1, -1):
        found += [net.up[level], net.combine[level], net.decoder[level]]
    return dict(zip([*range(1, 29), 30, 31], [*found, net.pool, net.head]))


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def rates(block):
    """Of a block's branches, both convolutions of each padded so that sizes stay."""
    convolutions = [[m for m in branch if isinstance(m, nn.Conv2d)] for branch in block.branches]
    for pair in convolutions:
        assert len(pair) == 2 and len({(m.dilation, m.padding) for m in pair}) == 1
        assert pair[0].dilation == pair[0].padding and pair[0].bias is None and pair[1].bias is not None
    return tuple(pair[0].dilation[0] for pair in convolutions)


def test_d6_is_the_papers_table():
    with torch.device("meta"):
        net = ResUNetA(num_classes=6, image_size=256)
        modules, shapes = rows(net), {}
        for row, module in modules.items():
            module.register_forward_hook(lambda m, inputs, out, row=row: shapes.__setitem__(row, tuple(out.shape)))
        assert net(torch.empty(2, 3, 256, 256)).shape == (2, 6, 256, 256)
    for row, (channels, side, dilations, parameters) in TABLE.items():
        module = modules[row]
        assert shapes[row] == (2, channels, side, side), f"row {row}"
        assert num_parameters(module) == parameters, f"row {row}"
        assert (rates(module) if isinstance(module, ResBlockA) else None) == dilations, f"row {row}"
        assert isinstance(module, PSPPooling) == (row in (13, 30)), f"row {row}"
    assert num_parameters(net) == sum(row[3] for row in TABLE.values()) == TOTAL


def tiny(**changes):
    torch.manual_seed(0)
    return ResUNetA(**{"width": 4, "depth": 3, **changes})


@pytest.mark.parametrize("side, expected", [
    (256, D6), (128, ((1, 3, 15, 31), (1, 3, 15, 31), (1, 3, 15), (1, 3), (1,), (1,))),
    (64, ((1, 3, 15, 31), (1, 3, 15), (1, 3), (1, 3), (1,), (1,))),
], ids=str)
def test_small_images_get_smaller_dilations(side, expected):
    with torch.device("meta"):
        net = ResUNetA(image_size=side)
    assert tuple(rates(block) for block in net.encoder) == expected


def test_dilations_of_the_decoder_and_depth():
    net = ResUNetA(width=4, depth=4, decoder_dilations=((1, 3), (1, 5), (1,)), dilations=((1, 2),) * 4)
    assert [rates(block) for block in net.decoder] == [(1, 3), (1, 5), (1,)]
    assert [rates(block) for block in net.encoder] == [(1, 2)] * 4
    assert len(net.down) == len(net.up) == len(net.combine) == 3


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (8, 100), (1, 1)], ids=str)
def test_any_size_goes_in_and_comes_out(size):
    for layer_norm in ("batch", "instance", "layer"):
        net = tiny(layer_norm=layer_norm, num_classes=5).eval()
        out = net(torch.rand(2, 3, *size))
        assert out.shape == (2, 5, *size) and out.isfinite().all()


def test_every_weight_learns_whatever_the_head():
    for multitask, channels in ((False, 2), (True, 9)):
        net = tiny(multitask=multitask)
        out = net(torch.rand(2, 3, 32, 32))
        assert out.shape[1] == channels
        (out * torch.randn_like(out)).sum().backward()
        assert all(p.grad is not None and p.grad.any() for name, p in net.named_parameters()
                   if not name.endswith("bias"))


def test_the_head_is_conditioned_in_the_authors_order():
    """What the distance says moves boundary and segmentation, the boundary moves the segmentation, no other way."""
    net, x = tiny(multitask=True).eval(), torch.rand(1, 3, 16, 16)
    before = net(x).split([2, 2, 2, 3], dim=1)
    for part, moved in (("distance", (1, 1, 1, 0)), ("boundary", (1, 1, 0, 0)), ("segmentation", (1, 0, 0, 0)),
                        ("color", (0, 0, 0, 1))):
        last = getattr(net.head, part)
        last = last if isinstance(last, nn.Conv2d) else last[-1]
        with torch.no_grad():
            last.bias[0] += 1
            after = net(x).split([2, 2, 2, 3], dim=1)
            last.bias[0] -= 1
        assert tuple(int((a - b).abs().max() > 1e-4) for a, b in zip(before, after)) == moved, part


def test_norms_are_what_they_are_called():
    x = torch.randn(3, 4, 8, 8) * 5 + 2
    axes = {"batch": (0, 2, 3), "instance": (2, 3), "layer": (1, 2, 3)}
    for layer_norm, over in axes.items():
        y = tiny(layer_norm=layer_norm).stem[1](x)
        torch.testing.assert_close(y.mean(over), torch.zeros_like(y.mean(over)), atol=1e-5, rtol=0)
        torch.testing.assert_close(y.square().mean(over), torch.ones_like(y.mean(over)), atol=1e-3, rtol=0)


def test_pooling_takes_equal_parts_of_the_map():
    x = torch.randn(2, 3, 16, 24)
    for n in (1, 2, 4, 8):
        pooled = nn.functional.max_pool2d(x, (16 // n, 24 // n))
        assert torch.equal(largest_of_parts(x, n), nn.functional.interpolate(pooled, size=(16, 24)))
    y = largest_of_parts(x[..., :5, :7], 4)  # parts of 2 rows and 2 columns, the last ones of 1
    assert torch.equal(y[..., 4, 6], x[..., 4, 6]) and torch.equal(y[..., 0, 0], x[..., :2, :2].amax((2, 3)))


@pytest.mark.parametrize("wrong, says", [
    ({"depth": 7}, "depth 7 must be in 2..6"), ({"width": 6}, "width 6 must be a multiple of 4"),
    ({"image_size": 32, "depth": 6}, "at least 64"), ({"num_classes": 0}, "num_classes 0"),
    ({"dilations": [[1], []]}, "each level needs rates"), ({"decoder_dilations": [[1]]}, "depth 3 needs 2"),
    ({"decoder_dilations": [[1], []]}, r"decoder_dilations [[1], []]: each level needs rates"),
    ({"dilations": [[1], [0]]}, "must be >= 1"),
], ids=str)
def test_what_cannot_be_built_is_named(wrong, says):
    with pytest.raises(ValueError) as error:
        ResUNetA(**{"width": 4, "depth": 2 if "dilations" in wrong else 3, **wrong})
    assert says in str(error.value) and "\n" not in str(error.value)
