"""LGT's network and its ODE give the original's numbers; the average style is the one of the rows as they are."""

import json

import pytest
import torch

from models.model_lgt import euler, generate, invert
from models.network_lgt import LGTUNet

SMALL = dict(base_channels=32, style_dim=8, time_dim=8, num_encoder_blocks=1, num_decoder_blocks=1)
INFERENCE = ["inference_cfg_decay", "inference_no_cfg", "inference_cfg_constant"]


@pytest.fixture(scope="module")
def golden():
    from tests.conftest import SHARED

    path = SHARED / "golden/lgt.pt"
    if not path.exists():
        pytest.skip(f"{path} is absent; set PERDURE_SHARED to run this test")
    file = torch.load(path, weights_only=True)
    return {k: json.loads(v) if k in ("config", "manifests", "tolerance") and isinstance(v, str) else v
            for k, v in unjson(file).items()}


def unjson(tree):
    """Lists and objects that the golden holds as JSON texts."""
    if isinstance(tree, dict):
        return {k: unjson(v) for k, v in tree.items()}
    return json.loads(tree) if isinstance(tree, str) and tree[:1] in "[{" else tree


@pytest.fixture
def net(golden):
    net = LGTUNet(**golden["config"]["model"])
    net.load_state_dict({k: v.float() for k, v in golden["state_dict"].items()}, strict=True)
    return net


def assert_close(golden, got, wanted):
    gate = golden["tolerance"]
    torch.testing.assert_close(got, wanted, rtol=gate["rtol"], atol=gate["atol"])


def assert_norms(golden, net, case):
    """Each parameter's gradient norm; those that had none have none."""
    norms = case["grad_norms"]
    got = dict(net.named_parameters())
    largest = norms["values"].max().item()
    for name, wanted in zip(norms["names"], norms["values"], strict=True):
        torch.testing.assert_close(got[name].grad.norm(), wanted, rtol=golden["tolerance"]["grad_norm_rtol"],
                                   atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}")
    assert [k for k, p in got.items() if p.grad is None] == case.get("without_grad", [])


def test_default_model_has_the_original_keys_and_shapes(golden):
    with torch.device("meta"):
        state = LGTUNet().state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == golden["manifests"]["default"]


@pytest.mark.parametrize("case", ["forward_cond", "forward_avg"])
def test_forward(golden, net, case):
    inputs, wanted = golden["inputs"], golden["cases"][case]
    x = inputs["x"].clone().requires_grad_()
    v = net(x, inputs["t"], inputs["style_id"], use_avg_style=case == "forward_avg")
    assert_close(golden, v, wanted["outputs"]["v"])
    (v * inputs["grad_out"]).sum().backward()
    if "grads" in wanted:
        assert_close(golden, x.grad, wanted["grads"]["x"])
    assert_norms(golden, net, wanted)


@pytest.mark.parametrize("case", INFERENCE)
def test_inversion_and_generation(golden, net, case):
    inputs, wanted, steps = golden["inputs"], golden["cases"][case], golden["config"]["inference_steps"]
    s = wanted["settings"]
    with torch.no_grad():
        noise = invert(lambda x, t: net(x, t, inputs["style_src"]), inputs["x_src"], steps)
        if "x0" in wanted["outputs"]:
            assert_close(golden, noise, wanted["outputs"]["x0"])
        noises = golden["noises"][: len(wanted["noisy_steps"])]  # one more would raise StopIteration
        end = generate(lambda x, t: net(x, t, inputs["style_id"]),
                       (lambda x, t: net(x, t, inputs["style_id"], True)) if s["use_cfg"] else None,
                       noise, steps, s["cfg_scale"], s["cfg_decay"], s["temperature_lambda"],
                       s["temperature_threshold"], noises)
    assert_close(golden, end, wanted["outputs"]["x1"])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["constant", "shrinking"])
def test_integration(golden, net, kind, recompute):
    inputs, wanted = golden["inputs"], golden["cases"][f"train_{kind}"]["outputs"]
    x_t = golden["cases"]["train_shrinking"]["outputs"]["x_t"]
    assert_close(golden, torch.lerp(inputs["x0"], inputs["x_src"], inputs["t"][:, None, None, None]), x_t)
    x, t = euler(lambda x, t: net(x, t, inputs["style_id"]), x_t, inputs["t"], golden["config"]["ode_steps"], kind,
                 recompute)
    assert_close(golden, x, wanted["x_1"])
    assert_close(golden, t, wanted["t_end"])


def test_the_average_follows_the_rows_and_is_saved():
    net = LGTUNet(**SMALL, num_styles=3)
    torch.nn.init.normal_(net.output_proj[2].weight)
    x, t, style = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 2])
    before = net(x, t, style, use_avg_style=True)
    with torch.no_grad():
        net.style_embed.embeddings.weight[0] += 3
    embeddings = net.style_embed
    torch.testing.assert_close(embeddings(style, True)[0], embeddings.embeddings.weight.mean(0))
    for block in net.decoder_blocks_32:  # zero at first, so that no style shows
        torch.nn.init.normal_(block.style_conv.hypernet.weight)
    assert not torch.equal(net(x, t, style, use_avg_style=True), before)
    embeddings.refresh()
    assert torch.equal(net.state_dict()["style_embed.avg_embedding"], embeddings.embeddings.weight.mean(0))


def test_it_starts_as_the_velocity_zero_and_learns_from_the_output_on():
    net = LGTUNet(**SMALL)
    v = net(torch.randn(1, 4, 8, 12), torch.rand(1), torch.tensor([1]))
    assert v.shape == (1, 4, 8, 12) and not v.any()
    (v * torch.randn_like(v)).sum().backward()
    learning = {k for k, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"output_proj.2.weight", "output_proj.2.bias"}


@pytest.mark.parametrize("options, text", [
    ({"base_channels": 48}, "multiple of 32"), ({"time_dim": 7}, "even"),
    ({"num_styles": 0}, "num_styles 0 must be >= 1")])
def test_impossible_networks(options, text):
    with pytest.raises(ValueError, match=text):
        LGTUNet(**{**SMALL, **options})


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 4, 8, 6), (4, 8, 8)])
def test_wrong_latents(shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        LGTUNet(**SMALL)(torch.zeros(shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
