"""LGT's energies give the original's numbers and gradients, in float32 whatever the caller's autocast says."""

import pytest
import torch
import torch.nn.functional as F

from losses.energy import CosineSSMLoss, GeometricFreeEnergyLoss, PatchSlicedWassersteinLoss, divergence
from models.model_lgt import euler
from tests.test_network_lgt import assert_close, assert_norms, golden, net  # noqa: F401

TRAIN = ["train_shrinking", "train_shrinking_dropped", "train_constant", "train_constant_dropped"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("term, name", [("total", "x_pred"), ("style_swd", "swd"), ("content_ssm", "ssm")])
def test_energy(golden, term, name):  # noqa: F811
    inputs, wanted = golden["inputs"], golden["cases"]["energy"]
    x = inputs["x"].clone().requires_grad_()
    loss = GeometricFreeEnergyLoss(**golden["config"]["loss"])
    losses = loss(x, inputs["x_style"], inputs["x_src"], seeded(golden["swd"]["seed"]))
    assert_close(golden, losses[term], wanted["losses"][term])
    assert_close(golden, torch.autograd.grad(losses[term], x)[0], wanted["grads"][name])


def test_all_samples_and_regularisers(golden):  # noqa: F811
    inputs, cases = golden["inputs"], golden["cases"]
    x = inputs["x"].clone().requires_grad_()
    swd = PatchSlicedWassersteinLoss(3, golden["config"]["loss"]["num_projections"], None)
    loss = swd(x, inputs["x_style"], seeded(golden["swd"]["seed_all_samples"]))
    assert_close(golden, loss, cases["swd_all_samples"]["losses"]["swd"])
    assert_close(golden, torch.autograd.grad(loss, x)[0], cases["swd_all_samples"]["grads"]["x_pred"])
    wanted = cases["regularisers"]["losses"]
    assert_close(golden, GeometricFreeEnergyLoss().velocity_penalty(x.detach()), wanted["velocity"])
    assert_close(golden, 0.01 * divergence(x.detach()), wanted["divergence"])
    both = GeometricFreeEnergyLoss(divergence_weight=0.01).velocity_penalty(x.detach())
    assert_close(golden, both, wanted["velocity"] + wanted["divergence"])


@pytest.mark.parametrize("case", TRAIN)
def test_training_step(golden, net, case):  # noqa: F811
    inputs, wanted, config = golden["inputs"], golden["cases"][case], golden["config"]
    x_t = golden["cases"]["train_shrinking"]["outputs"]["x_t"]
    average = case.endswith("dropped")
    x_1, t = euler(lambda x, t: net(x, t, inputs["style_id"], average), x_t, inputs["t"], config["ode_steps"],
                   case.split("_")[1])
    losses = GeometricFreeEnergyLoss(**config["loss"])(x_1, inputs["x_style"], inputs["x_src"],
                                                       seeded(golden["swd"]["seed"]))
    assert_close(golden, x_1, wanted["outputs"]["x_1"])
    assert_close(golden, t, wanted["outputs"]["t_end"])
    for name, value in wanted["losses"].items():
        assert_close(golden, losses[name], value)
    losses["total"].backward()
    assert_norms(golden, net, wanted)


def test_self_similarity_is_what_its_matrices_say():
    x, y = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    a, b = (F.normalize(z.flatten(2), dim=1) for z in (x, y))
    matrices = (a.mT @ a - b.mT @ b).square().sum() / (2 * 12 * 12)
    torch.testing.assert_close(CosineSSMLoss()(x, y), matrices)
    assert CosineSSMLoss()(x, 3 * x).abs() < 1e-12


def test_float32_under_autocast():
    x, y = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for loss in (PatchSlicedWassersteinLoss(), CosineSSMLoss()):
        plain = loss(x, y, seeded(1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(x, y, seeded(1)), plain)


def test_a_generator_decides_all_and_the_global_one_is_left_alone():
    x, y = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    loss = GeometricFreeEnergyLoss(max_samples=50, max_spatial_samples=20)
    before = torch.get_rng_state()
    one, two, other = (loss(x, y, x.flip(3), seeded(s))["total"] for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_that_ignores_the_style_is_only_found_out_by_groups():
    dark, light = torch.full((1, 4, 8, 8), -1.0), torch.full((1, 4, 8, 8), 1.0)
    asked, made = torch.cat([dark, light]), torch.cat([light, dark])
    loss = GeometricFreeEnergyLoss()
    assert loss(made, asked, made, seeded(0))["style_swd"] < 1e-9
    assert loss(made, asked, made, seeded(0), groups=[0, 1])["style_swd"] > 1


def test_mistakes():
    for bad in ({"patch_size": 0}, {"num_projections": 0}, {"max_samples": -1}, {"w_style": -1.0},
                {"max_spatial_samples": 0}):
        with pytest.raises(ValueError, match="must be >= [01]"):
            GeometricFreeEnergyLoss(**bad)
    with pytest.raises(ValueError, match="of one shape"):
        PatchSlicedWassersteinLoss()(torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 8, 8))
