"""Tanimoto in both forms, Dice and cross-entropy: the originals' numbers and gradients, and what must hold anyway."""

import pytest
import torch

from losses.tanimoto import CrossEntropyLoss, DiceLoss, PooledTanimotoLoss, TanimotoLoss

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # the golden's own
PORT = {"tanimoto": lambda: PooledTanimotoLoss(complement=False), "tanimoto_complement": PooledTanimotoLoss,
        "tanimoto_complement_alpha": lambda: PooledTanimotoLoss(alpha=0.3), "dice": DiceLoss}
TARGETS = {"one_channel": ("one", 1), "mask_0_255": ("one", 1), "empty_mask": ("one", 0),
           "two_channels": ("two", 1), "full_mask": ("two", None)}
EVERY = (TanimotoLoss, PooledTanimotoLoss, DiceLoss, CrossEntropyLoss)


@pytest.fixture(scope="module")
def golden(request):
    from tests.conftest import SHARED

    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent; set PERDURE_SHARED to run this test")
    return torch.load(SHARED / "golden/tanimoto.pt", weights_only=True)


def loss_and_gradient(loss, logits, *rest):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *rest)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("name", PORT)
@pytest.mark.parametrize("target", TARGETS)
def test_the_pooled_forms_are_the_ports(golden, target, name):
    case, (channels, factor) = golden["cases"][f"port_{target}_{name}"], TARGETS[target]
    mask = golden["inputs"]["mask"]
    mask = torch.ones_like(mask) if factor is None else mask * factor
    labels = mask if channels == "one" else torch.cat([1 - mask, mask], dim=1)
    value, gradient = loss_and_gradient(PORT[name](), golden["inputs"][f"logits_{channels}"], labels)
    torch.testing.assert_close(value, case["losses"]["loss"], **TOLERANCE)
    torch.testing.assert_close(gradient, case["grads"]["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", ["classes", "absent_class", "single_sigmoid"])
def test_the_default_form_is_the_authors(golden, name):
    case = golden["cases"][f"authors_{name}"]
    logits, labels = case["inputs"]["logits"], case["inputs"]["labels"]
    value, gradient = loss_and_gradient(TanimotoLoss(), logits, labels)
    torch.testing.assert_close(value, case["losses"]["loss"], **TOLERANCE)
    torch.testing.assert_close(gradient, case["grads"]["logits"], **TOLERANCE)
    p = logits.softmax(1) if case["activation"] == "softmax" else logits.sigmoid()
    for complement, key in ((False, "tanimoto"), (True, "with_complement")):
        found = TanimotoLoss(complement).similarity(p, labels)
        torch.testing.assert_close(found, case["outputs"][key], **TOLERANCE)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, (2, 8, 8), generator=generator)
    labels = torch.nn.functional.one_hot(ids, 3).movedim(-1, 1).float()
    return torch.randn(2, 3, 8, 8, generator=generator), labels


def test_equal_maps_are_alike_also_soft_ones(batch):
    soft = batch[0].softmax(1)
    torch.testing.assert_close(TanimotoLoss().similarity(soft, soft), torch.ones(2))


@pytest.mark.parametrize("kind", EVERY)
def test_the_right_answer_costs_nothing_and_the_wrong_one_all(batch, kind):
    _, labels = batch
    right, wrong = kind()(80 * labels - 40, labels), kind()(40 - 80 * labels, labels)
    assert right < 1e-5 and wrong > (0.5 if kind is TanimotoLoss else 0.6)


@pytest.mark.parametrize("kind", EVERY)
def test_ignored_pixels_have_no_say(batch, kind):
    logits, labels = batch
    valid = torch.ones(2, 1, 8, 8)
    valid[:, :, 5:] = 0
    value, gradient = loss_and_gradient(kind(), logits, labels, valid)
    assert not gradient[:, :, 5:].any() and gradient[:, :, :5].any()
    cut, _ = loss_and_gradient(kind(), logits[:, :, :5], labels[:, :, :5])
    torch.testing.assert_close(value, cut)
    nothing, gradient = loss_and_gradient(kind(), logits, labels, torch.zeros_like(valid))
    assert nothing == 0 and not gradient.any()


@pytest.mark.parametrize("kind", EVERY)
def test_a_single_pixel_that_counts_has_its_own_loss(batch, kind):
    logits, labels = batch
    valid = torch.zeros(2, 1, 8, 8)
    valid[0, 0, 3, 4] = 1
    if kind is TanimotoLoss:  # which takes each image by itself: another has nothing to lose
        logits, labels, valid = logits[:1], labels[:1], valid[:1]
    pixel = slice(0, 1), slice(None), slice(3, 4), slice(4, 5)
    torch.testing.assert_close(kind()(logits, labels, valid), kind()(logits[pixel], labels[pixel]))


def test_a_batch_without_foreground_still_teaches(batch):
    """With one class and no foreground the complement alone acts, and pushes every probability down."""
    logits, labels = batch[0][:, :1], torch.zeros(2, 1, 8, 8)
    _, gradient = loss_and_gradient(TanimotoLoss(), logits, labels)
    assert (gradient > 0).all()
    assert not loss_and_gradient(TanimotoLoss(complement=False), logits, labels)[1].any()


def test_cross_entropy_of_two_channels_is_that_of_their_difference(batch):
    two, labels = batch[0][:, :2], (batch[0][:, 2:] > 0).float()
    one = CrossEntropyLoss()(two[:, 1:] - two[:, :1], labels)
    torch.testing.assert_close(CrossEntropyLoss()(two, torch.cat([1 - labels, labels], 1)), one)


def test_an_impossible_share_is_named():
    with pytest.raises(ValueError, match="alpha 2 must be from 0 to 1"):
        PooledTanimotoLoss(alpha=2)
