"""VRT and SPyNet give the original's numbers, load its weights, take any size, and refuse clearly."""

import gc
import inspect
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import deform_conv2d

import models.network_spynet as spynet
import models.network_vrt as network_vrt
from models.network_spynet import SpyNet, deform_conv, flow_warp
from models.network_vrt import (
    VRT,
    DeformableAlignment,
    FrameConv,
    LastConv,
    ReflectConv,
    WindowAttention,
    attention,
    backward_and_forward,
    both_directions,
    fused_attention,
    shift_code,
    shift_mask,
    shift_regions,
)

GOLDENS = ["vrt_sr_x4", "vrt_deblur", "vrt_extra_pa6", "vrt_extra_vfi"]
TINY = dict(upscale=1, img_size=[4, 32, 32], window_size=[2, 4, 4], depths=[2] * 7 + [1], indep_reconsts=[],
            embed_dims=[16] * 8, num_heads=[2] * 8, deformable_groups=4, drop_path_rate=0.0)


def tiny(seed=0, **options):
    """A network small enough for a test, whose flow and offsets are not zero as they are at a start."""
    torch.manual_seed(seed)
    net = VRT(**{**TINY, **options})
    for name, p in net.named_parameters():
        if "conv_offset.6" in name or name.endswith("basic_module.8.weight"):
            torch.nn.init.normal_(p, std=0.05)
    return net


def charbonnier(output, target):
    return ((output - target) ** 2 + 1e-9).sqrt().mean()


# ---- parity with the original ------------------------------------------------


def load_golden(shared, name):
    """The file, and a network with its weights: SPyNet's through spynet_path, the others by a strict load."""
    golden = torch.load(shared / "golden" / f"{name}.pt", weights_only=True)
    spynet = golden["spynet_file"] and str(shared / golden["spynet_file"].removeprefix("shared/"))
    net = VRT(**{**json.loads(golden["config"]), "spynet_path": spynet or None})
    own = net.state_dict()
    omitted = {key: own[key] for key in json.loads(golden["omitted_keys"])}
    net.load_state_dict({**omitted, **golden["state_dict"]}, strict=True)
    return golden, net


@pytest.mark.parametrize("name", GOLDENS)
def test_state_dict_is_that_of_the_original(shared, name):
    golden, net = load_golden(shared, name)
    state = net.state_dict()
    spec = [[key, list(v.shape), str(v.dtype).removeprefix("torch.")] for key, v in state.items()]
    assert spec == [[key, *rest] for key, rest in json.loads(golden["state_dict_spec"]).items()]
    assert set(golden["grad_norms"]) == {key for key, _ in net.named_parameters()}
    for key, wanted in golden["buffers"].items():  # "<name>/<window>[/<channels>]"
        name = "." + key.split("/")[0]
        same = [v for k, v in state.items() if k.endswith(name) and v.shape == wanted.shape]
        assert same and all((v - wanted).abs().max() <= 1e-6 for v in same), key


@pytest.mark.parametrize("name", GOLDENS)
def test_outputs_are_those_of_the_original(shared, name):
    golden, net = load_golden(shared, name)
    wanted, got = json.loads(golden["probes"]), {}
    for key in wanted:
        net.get_submodule(key).register_forward_hook(lambda _, __, y, key=key: got.update({key: y.detach()}))
    with torch.no_grad():
        output = net.train()(golden["input"].float())
    error = (output - golden["output"]).abs()
    assert error.max() <= 1e-4 and error.mean() <= 1e-6
    assert abs(charbonnier(output, golden["target"] / 255) - golden["loss"]) <= 1e-6
    if "upsample" in wanted:  # its last layer is part of conv_last
        with torch.no_grad():
            got["upsample"] = net.upsample(got["conv_before_upsample"])
    for key, (mean, std, norm) in wanted.items():
        y = got[key]
        found = [y.mean().item(), y.std().item(), y.norm().item()]
        assert found == pytest.approx([mean, std, norm], rel=1e-4, abs=1e-5), key
    if golden["intermediates"]:
        flows = net._flows(both_directions(golden["input"].float()))
        for key, flow in golden["intermediates"].items():  # flow_<direction>_level<scale>
            directions = dict(zip(("backward", "forward"), backward_and_forward(flows[int(key[-1])][0])))
            assert (directions[key.split("_")[1]] - flow).abs().max() <= 1e-5, key


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "vrt_deblur" else name
                                  for name in GOLDENS])  # the deblurring one has the layers of the others, more of them
def test_gradients_are_those_of_the_original(shared, name):
    """In float64 past the flow: where two channels are normalised (vrt_sr_x4) float32 may miss the gate."""
    golden, net = load_golden(shared, name)
    net.double().train()
    if net.pa_frames:  # float64 convolutions are slow
        net.spynet.float()
        net.spynet.register_forward_pre_hook(lambda _, frames: tuple(x.float() for x in frames))
        net.spynet.register_forward_hook(lambda _, __, flows: [flow.double() for flow in flows])
    charbonnier(net(golden["input"].double()), golden["target"] / 255.0).backward()
    for key, p in net.named_parameters():
        wanted = golden["grad_norms"][key]
        assert abs(p.grad.norm().item() - wanted) <= 1e-2 * wanted + 1e-6, key


def test_published_files_load_and_give_the_same_output(shared, tmp_path):
    """A released file: {"params": everything}, buffers included."""
    golden, net = load_golden(shared, "vrt_extra_pa6")
    torch.save({"params": net.state_dict()}, tmp_path / "published.pth")
    fresh = VRT(**json.loads(golden["config"])).eval()
    fresh.load_state_dict(torch.load(tmp_path / "published.pth", weights_only=True)["params"], strict=True)
    with torch.no_grad():
        assert (fresh(golden["input"].float()) - golden["output"]).abs().max() <= 1e-4


def test_the_published_weights_of_16_frames_have_their_number_of_parameters():
    """Those of the other tasks: tests/test_options_vrt.py."""
    with torch.device("meta"):
        net = VRT(window_size=[8, 8, 8], pa_frames=6, deformable_groups=24)
    assert sum(p.numel() for p in net.parameters()) == 35_134_783 and len(net.state_dict()) == 1666


def test_signature_is_the_schema_of_an_option_section():
    parameters = inspect.signature(VRT.__init__).parameters
    assert list(parameters)[1:5] == ["upscale", "in_chans", "out_chans", "img_size"] and len(parameters) == 24
    for parameter in list(parameters.values())[1:]:
        assert parameter.annotation is not parameter.empty and parameter.default is not parameter.empty


def test_drop_path_rates_are_the_published_ones():
    """Linear over all blocks, but a stage's second group starts over with the stage's first rate."""
    net = VRT(**{**TINY, "depths": [4] + [1] * 7, "drop_path_rate": 0.2})
    step = 0.2 / 10
    groups = (net.stage1.residual_group1, net.stage1.residual_group2, net.stage2.residual_group2,
              net.stage8[1].residual_group)
    rates = [[block.drop_path for block in group.blocks] for group in groups]
    assert rates == [pytest.approx(wanted) for wanted in ([0, step, 2 * step], [0], [4 * step], [0.2])]


# ---- parts -------------------------------------------------------------------


def test_flow_warp_is_that_of_the_original(shared):
    golden = torch.load(shared / "golden" / "kair_helpers.pt", weights_only=True)["flow_warp"]
    for key, wanted in golden["out"].items():
        mode, padding, *variant = key.split("/")
        flow = golden["flow_int" if variant == ["integer_flow"] else "flow"]
        corners = variant != ["align_corners_false"]
        output = flow_warp(golden["x"], flow, mode, padding, align_corners=corners)
        assert (output - wanted).abs().max() <= 1e-5, key
    x, flow = golden["x"].clone().requires_grad_(), golden["flow"].clone().requires_grad_()
    (flow_warp(x, flow) * golden["cotangent"]).sum().backward()
    assert (x.grad - golden["grad_x"]).abs().max() <= 1e-5
    assert (flow.grad - golden["grad_flow"]).abs().max() <= 1e-5


def test_flow_warp_refuses_a_flow_of_another_size():
    with pytest.raises(ValueError, match=r"needs a flow of \(N, 8, 9, 2\)"):
        flow_warp(torch.zeros(1, 3, 8, 9), torch.zeros(1, 2, 8, 9))


@pytest.mark.parametrize("function, dtype, gate", [
    (deform_conv, torch.float64, 1e-9), (spynet.deform_conv_by_gather, torch.float32, 1e-4)])
@pytest.mark.parametrize("groups, weight_groups", [(1, 1), (4, 1), (6, 2), (6, 3)])
@pytest.mark.parametrize("size", [(7, 9), (1, 1), (1, 4), (3, 1)])
def test_deform_conv_is_torchvisions(function, dtype, gate, size, groups, weight_groups):
    torch.manual_seed(0)
    kernel = (6, 12 // weight_groups, 3, 3)
    shapes = ((2, 12, *size), (2, 18 * groups, *size), (2, 9 * groups, *size), kernel, (6,))
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    tensors[1] *= 3  # some taps lie outside
    x, offset, modulation, weight, bias = tensors = [t.requires_grad_() for t in tensors]
    outputs = function(*tensors), deform_conv2d(x, offset, weight, bias, padding=1, mask=modulation)
    cotangent = torch.randn_like(outputs[1])
    ours, theirs = ((out, *torch.autograd.grad(out, tensors, cotangent)) for out in outputs)
    torch.testing.assert_close(ours, theirs, rtol=gate, atol=gate)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 6)])
def test_two_convolutions_as_one_are_the_two(size):
    torch.manual_seed(0)
    inner, last, x = FrameConv(5, 4).double(), LastConv(4, 3).double(), torch.randn(2, 5, *size, dtype=torch.float64)
    parameters = [*inner.parameters(), *last.parameters()]
    outputs = last(x, inner), last(inner(x))
    assert torch.allclose(*outputs, atol=1e-12)
    gradients = [torch.autograd.grad(output.square().sum(), parameters) for output in outputs]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients))


@pytest.mark.parametrize("width", [16, 20, 30])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("swap", [False, True], ids=["own queries", "the other frame's queries"])
def test_fused_attention_is_the_plain_one(width, masked, swap):
    """Outputs and gradients in float64, at the published head widths, for every region of a shift in all directions."""
    torch.manual_seed(0)
    size, window, shift = (4, 6, 6), (2, 4, 4), (1, 2, 2)
    regions = shift_regions(size, window, shift, "cpu")  # (8, 32)
    assert set(regions.flatten().tolist()) == set(range(8))
    mask, code = shift_mask(regions, torch.zeros((), dtype=torch.float64)), shift_code(regions.double(), 0.3)
    shape = (3, 8, 2, 32, 3, 2, width) if swap else (3, 8, 32, 3, 2, width)
    mask, code = (mask[:, None, None], code[:, None]) if swap else (mask[:, None], code)
    qkv = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 32, 32, dtype=torch.float64, requires_grad=True)
    plain = attention(qkv, 0.3, [bias, mask] if masked else [bias], swap)
    fused = fused_attention(qkv, 0.3, bias, code if masked else None, swap)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-9)
    gradients = [torch.autograd.grad(out.sin().sum(), (qkv, bias)) for out in (plain, fused)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype, width, padded", [
    (torch.float32, 20, 20), (torch.float32, 30, 32), (torch.bfloat16, 20, 24), (torch.bfloat16, 30, 32),
    (torch.bfloat16, 16, 16)])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_a_fused_kernel_gets_what_it_takes(monkeypatch, dtype, width, padded, masked):
    """Heads of whole 16 bytes, and a bias of their type that no window has a copy of."""
    seen = []

    def kernel(q, k, v, attn_mask, scale):
        seen.extend((q, k, v, attn_mask))
        return torch.zeros_like(q)

    monkeypatch.setattr(network_vrt.F, "scaled_dot_product_attention", kernel)
    code = shift_code(torch.arange(8).expand(5, 8), 0.3) if masked else None
    fused_attention(torch.randn(2, 5, 8, 3, 6, width).to(dtype), 0.3, torch.randn(6, 8, 8), code)
    *heads, bias = seen
    if masked and width + 2 > padded:
        padded += 16 // heads[0].element_size()
    assert [t.shape for t in heads] == 3 * [(10, 6, 8, padded)] and bias.shape == (10, 6, 8, 8)
    assert all(t.dtype == dtype for t in seen) and bias.stride(0) == 0
    assert bias.untyped_storage().nbytes() == 6 * 8 * 8 * bias.element_size()


def test_fused_attention_gives_the_same_network(monkeypatch):
    """Also with windows that are shifted in time, in mutual attention, and at sizes that are padded to windows."""
    torch.manual_seed(1)
    net, x = tiny(depths=[3, 3] + [1] * 5 + [2]).double(), torch.rand(1, 4, 3, 20, 16, dtype=torch.float64)
    results = []
    for fused in (False, True):
        monkeypatch.setattr(network_vrt, "fused", lambda x, fused=fused: fused)
        out = net(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), net.stage1.residual_group1.parameters())))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-9)


def test_reflected_borders_are_torchs_without_its_padding(monkeypatch):
    """Recipe 009's last layer; reflection padding has no deterministic gradient on CUDA."""
    torch.manual_seed(0)
    ours, x = ReflectConv(4, 3, 7), torch.randn(2, 4, 8, 9)
    theirs = torch.nn.Conv2d(4, 3, 7, padding=3, padding_mode="reflect")
    theirs.load_state_dict(ours.state_dict())
    wanted = theirs(x)
    monkeypatch.setattr(network_vrt.F, "pad", None)
    assert torch.equal(ours(x), wanted)
    assert isinstance(tiny(pa_frames=0, out_chans=3).conv_last, ReflectConv)


@pytest.mark.parametrize("window", [(2, 4, 4), (1, 4, 4), (2, 3, 4), (2, 2, 3)])
def test_relative_bias_follows_positions_when_a_window_shrinks(window):
    layer = WindowAttention(4, (2, 4, 4), num_heads=2, mutual=False, qkv_bias=True, qk_scale=None)
    positions = torch.cartesian_prod(*(torch.arange(s) for s in window))
    d, h, w = (positions[:, None] - positions[None]).unbind(-1)
    wanted = layer.relative_position_bias_table[((d + 1) * 7 + h + 3) * 7 + w + 3].permute(2, 0, 1)
    assert torch.equal(layer._relative_bias(window), wanted)


def test_samples_of_a_batch_do_not_mix():
    net = tiny(pa_frames=4, depths=[3] + [1] * 7).eval()  # its second block has shifted windows
    x = torch.rand(2, 4, 3, 40, 32)
    with torch.no_grad():
        assert torch.allclose(net(x), torch.cat((net(x[:1]), net(x[1:]))), atol=1e-5)


# ---- inputs of any size ------------------------------------------------------

BRANCHES = {
    "x1": {}, "x2": dict(upscale=2), "x3": dict(upscale=3), "x4": dict(upscale=4), "x8": dict(upscale=8),
    "pa4": dict(pa_frames=4), "pa6": dict(pa_frames=6, embed_dims=[24] * 8, deformable_groups=6),
    "noise": dict(nonblind_denoising=True), "between": dict(pa_frames=0), "self": dict(mul_attn_ratio=0.0),
    "one group": dict(deformable_groups=1),
}


@pytest.mark.parametrize("branch, frames, height, width", [
    *((branch, 2, 17, 23) for branch in BRANCHES), ("x4", 1, 17, 23), ("pa6", 1, 17, 23), ("x4", 2, 40, 41),
    ("x4", 2, 32, 32)])
def test_any_size_gives_its_shape_and_finite_gradients(branch, frames, height, width):
    options = BRANCHES[branch]
    between, scale = options.get("pa_frames") == 0, options.get("upscale", 1)
    frames = 4 if between else frames
    net = tiny(**options)
    x = torch.rand(1, frames, 3 + net.nonblind_denoising, height, width, requires_grad=True)
    output = net(x)
    assert output.shape == (1, 1 if between else frames, 3, height * scale, width * scale)
    output.square().mean().backward()
    assert x.grad.isfinite().all()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("shape", [(2, 32, 32), (3, 40, 48), (6, 64, 32)])
def test_sizes_that_fit_are_not_padded(shape):
    x = torch.rand(1, shape[0], 3, *shape[1:])
    assert tiny()._pad(x) is x


def test_padding_repeats_the_last_frame_row_and_column():
    net = tiny(pa_frames=6, embed_dims=[24] * 8)  # 4 frames; 4 * 8 pixels for windows of 4 at 1/8
    x = torch.rand(1, 2, 3, 17, 35)
    padded = net._pad(x)
    assert padded.shape == (1, 4, 3, 32, 40)
    assert torch.equal(padded[:, :2, :, :17, :35], x)
    assert torch.equal(padded[:, 2], padded[:, 1]) and torch.equal(padded[:, 3], padded[:, 1])
    assert torch.equal(padded[..., 31, :], padded[..., 16, :])
    assert torch.equal(padded[..., 39], padded[..., 34])
    with torch.no_grad():
        assert torch.equal(net.eval()(x), net(padded)[:, :2, :, :17, :35])


def test_the_noise_level_has_an_effect_but_is_not_a_frame():
    net = tiny(nonblind_denoising=True).eval()
    x = torch.rand(1, 2, 4, 32, 32)
    flows = []
    net.spynet.register_forward_hook(lambda _, inputs, __: flows.append(inputs[0]))
    with torch.no_grad():
        assert not torch.equal(net(x), net(torch.cat((x[:, :, :3], 1 - x[:, :, 3:]), dim=2)))
    assert torch.equal(*flows)


# ---- SPyNet's weights --------------------------------------------------------


def test_without_a_file_flow_is_zero_and_learns():
    net = VRT(**{**TINY, "spynet_path": None})
    frames = torch.rand(1, 3, 3, 32, 32)
    flows = net.spynet(frames[:, 0], frames[:, 1])
    assert [tuple(flow.shape[-2:]) for flow in flows] == [(32, 32), (16, 16), (8, 8), (4, 4)]
    assert all(flow.eq(0).all() for flow in flows)
    for p in net.parameters():  # elsewhere training has begun, so offsets answer to the flow
        if p.shape[-1:] == (3,):
            p.data.add_(torch.randn_like(p) * 0.01)
    charbonnier(net(frames), frames.flip(1)).backward()
    assert all(level.basic_module[-1].weight.grad.ne(0).any() for level in net.spynet.basic_module)


def test_spynet_files_load_bare_wrapped_and_with_constants(tmp_path):
    torch.manual_seed(0)
    source = SpyNet()
    torch.nn.init.normal_(source.basic_module[5].basic_module[8].weight)
    full = source.state_dict()
    bare = {key: value for key, value in full.items() if key.startswith("basic_module")}
    for content in (bare, {"params": bare}, {"params": full}):
        torch.save(content, path := tmp_path / "spynet.pth")
        loaded = VRT(**{**TINY, "spynet_path": str(path)}).spynet.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in full.items())


def test_a_missing_spynet_file_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        VRT(**{**TINY, "spynet_path": str(tmp_path / "none.pth")})
    message = str(error.value)
    for part in ("none.pth", "spynet_sintel_final-3d2a1287.pth", "github.com/", "null"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [
    b"", b"no weights", b"PK\x03\x04 cut off", {"params": {}}, {"w": torch.ones(2)}, [1]])
def test_a_wrong_spynet_file_is_one_clear_line(tmp_path, content):
    path = tmp_path / "wrong.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="wrong.pth") as error:
        SpyNet(str(path))
    assert "\n" not in str(error.value)


def test_a_spynet_file_with_another_shape_is_refused(tmp_path):
    state = SpyNet().state_dict()
    state["basic_module.0.basic_module.0.weight"] = torch.zeros(32, 8, 3, 3)
    torch.save(state, path := tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold SPyNet's weights"):
        SpyNet(str(path))


# ---- training ----------------------------------------------------------------


def test_checkpointing_gives_the_same_gradients(monkeypatch):
    calls = []
    real = network_vrt.checkpoint

    def counted(function, *args, **kwargs):
        calls.append(function.__name__)
        return real(function, *args, **kwargs)

    monkeypatch.setattr(network_vrt, "checkpoint", counted)
    x, gradients = torch.rand(2, 2, 3, 32, 32), []
    options = dict(drop_path_rate=0.5, depths=[3] + [1] * 7)
    for flags in ({}, dict(use_checkpoint_attn=True, use_checkpoint_ffn=True, no_checkpoint_attn_blocks=[0],
                           no_checkpoint_ffn_blocks=[7])):
        net = tiny(**options, **flags)
        torch.manual_seed(1)  # drop path
        net(x).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert calls.count("_attend") == 7 and calls.count("_feed_forward") == 9  # of 10, less those left out
    assert all(torch.allclose(a, b, atol=1e-7, rtol=1e-4) for a, b in zip(*gradients))
    calls.clear()
    with torch.no_grad():
        net(x)
    net.eval()(x)
    assert not calls


def test_drop_path_acts_in_training_only_and_draws_from_the_seed():
    net = tiny(drop_path_rate=0.5)
    x = torch.rand(4, 2, 3, 32, 32)

    def output(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return net(x)

    assert torch.equal(output(1), output(1)) and not torch.equal(output(1), output(2))
    net.eval()
    assert torch.equal(output(1), output(2))


def test_a_fresh_alignment_starts_from_the_flow_alone():
    """Offsets of 0, whose layers before the last can learn; weights uniform within 1 / sqrt(9 C), biases 0."""
    align = DeformableAlignment(16, 2, 4, 10)
    assert not align.conv_offset[-1].weight.any() and not align.conv_offset[-1].bias.any() and not align.bias.any()
    assert all(layer.weight.std() > 0.01 for layer in list(align.conv_offset)[:-1:2])
    bound = 1 / 12
    assert align.weight.abs().max() <= bound and align.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert align.weight.mean().abs() < 0.01


def test_inference_keeps_no_tensor_and_training_continues_after_it():
    net = tiny(depths=[3] + [1] * 7)  # the second block has shifted windows and a mask

    def count_tensors():
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    before = count_tensors()
    for height in (32, 40, 48):
        with torch.inference_mode():
            net(torch.rand(1, 2, 3, height, 32))
    assert count_tensors() == before
    net(torch.rand(1, 2, 3, 32, 32)).mean().backward()


# ---- refusals ----------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    (dict(pa_frames=3), "pa_frames 3 must be one of 0, 2, 4, 6"),
    (dict(upscale=5), "upscale must be 1, 3, or a power of two"),
    (dict(upscale=0), "upscale 0 must be >= 1"),
    (dict(in_chans=1), "in_chans must be 3"),
    (dict(out_chans=1), "out_chans must be 3"),
    (dict(img_size=[32, 32]), r"img_size must be \[frames, rows, columns\]"),
    (dict(window_size=[4, 4]), r"window_size must be \[frames, rows, columns\]"),
    (dict(window_size=[2, 0, 4]), r"window_size \[2, 0, 4\] must be >= 1"),
    (dict(depths=[1] * 7), r"8 or more, got \(7, 8, 8\)"),
    (dict(embed_dims=[16] * 9), r"equally many entries, 8 or more, got \(8, 9, 8\)"),
    (dict(num_heads=[3] * 8), r"embed_dims\[0\] must be a multiple of num_heads\[0\] = 3"),
    (dict(embed_dims=[16] * 4 + [8] + [16] * 3), r"embed_dims\[4\] must equal embed_dims\[2\] = 16, got 8"),
    (dict(embed_dims=[16] * 3 + [6] + [16] * 4), r"embed_dims\[3\] must be a multiple of 4, got 6"),
    (dict(embed_dims=[16] * 3 + [6] + [16] * 4, mul_attn_ratio=0.0), r"embed_dims\[3\] must be a multiple of 4, got 6"),
    (dict(embed_dims=[6] + [16] * 5 + [6, 16]), r"embed_dims\[0\] must be a multiple of 4, got 6"),
    (dict(mul_attn_ratio=1.5), "mul_attn_ratio 1.5 must be from 0 to 1"),
    (dict(drop_path_rate=1.0), "drop_path_rate 1.0 must be >= 0 and < 1"),
    (dict(deformable_groups=0), "deformable_groups must be positive"),
    (dict(deformable_groups=3), r"embed_dims\[0\] .* = 16 must be a multiple of deformable_groups = 3"),
    (dict(deformable_groups=1, pa_frames=4), "positive and even with pa_frames 4"),
    (dict(pa_frames=6), r"embed_dims\[0\] must be a multiple of 3"),
    (dict(pa_frames=0, upscale=4), "upscale must be 1 with pa_frames 0"),
    (dict(pa_frames=0, out_chans=4), "out_chans must be 3 for each interpolated frame"),
    (dict(pa_frames=0, img_size=[1, 32, 32]), r"img_size\[0\] must be 2"),
    (dict(pa_frames=0, nonblind_denoising=True), "nonblind_denoising must be false"),
])
def test_options_that_fit_no_network_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        VRT(**{**TINY, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape, options, message", [
    ((1, 3, 32, 32), {}, r"input must be \(batch, frames, 3, height, width\), got \(1, 3, 32, 32\)"),
    ((1, 2, 3, 32, 32), dict(nonblind_denoising=True), r"\(batch, frames, 4, height, width\)"),
    ((1, 0, 3, 32, 32), {}, "input must be"),
    ((1, 5, 3, 32, 32), dict(pa_frames=0), r"img_size\[0\] = 4 frames, got 5"),
])
def test_inputs_that_are_no_clip_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)(torch.zeros(shape))


def test_recal_all_flows_is_accepted_without_effect():
    x = torch.rand(1, 2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(tiny(recal_all_flows=True)(x), tiny()(x))


@pytest.mark.parametrize("mode, padding", [("bilinear", "zeros"), ("bilinear", "border"), ("nearest", "zeros")])
def test_sampling_by_gather_is_grid_sample(mode, padding):
    """What exact mode on CUDA uses, with its gradients; points inside, outside and on the edge."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    columns, rows = 12 * torch.rand(2, 2, 5, 6, dtype=torch.float64) - 2
    results = []
    for function in (spynet.sample, spynet.sample_by_gather):
        inputs = [t.clone().requires_grad_() for t in (x, columns, rows)]
        out = function(*inputs, mode, padding)
        out.sin().sum().backward()
        results.append([out.detach(), *(t.grad for t in inputs)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_only_exact_mode_on_cuda_avoids_its_kernels(monkeypatch):
    for cuda, exact, warn_only, grad in itertools.product((True, False), repeat=4):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda exact=exact: exact)
        monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda warn=warn_only: warn)
        with torch.set_grad_enabled(grad):  # a validation has no gradient whose order could matter
            wanted = cuda and exact and not warn_only and grad
            assert spynet.needs_fixed_order(SimpleNamespace(is_cuda=cuda)) == wanted


def test_the_gradient_of_sampling_by_gather_sorts_points_not_single_values():
    """In deterministic mode CUDA sorts all indices that a gradient adds to."""
    class Indices(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.embedding_dense_backward.default:
                seen.append(args[1].numel())
            assert not func.__name__.startswith(("scatter", "index_put", "gather"))
            return func(*args, **(kwargs or {}))

    seen, x = [], torch.randn(2, 16, 4, 5, requires_grad=True)
    with Indices():
        spynet.sample_by_gather(x, 4 * torch.rand(2, 3, 6), 3 * torch.rand(2, 3, 6)).sum().backward()
    assert seen == [2 * 3 * 6] * 4  # of each corner, for all 16 channels at once


@pytest.mark.parametrize("act, arguments", [
    (spynet.sample, lambda: [torch.randn(2, 16, 8, 9), 8 * torch.rand(2, 8, 9), 7 * torch.rand(2, 8, 9)]),
    (deform_conv, lambda: [torch.randn(2, 8, 8, 9), torch.randn(2, 36, 8, 9), torch.rand(2, 18, 8, 9),
                           torch.randn(8, 8, 3, 3), torch.randn(8)])])
def test_exact_mode_stores_nothing_of_what_it_reads_at_points(monkeypatch, act, arguments):
    """Deterministic training needs no more memory than training; each point is read again for the gradient."""
    monkeypatch.setattr(spynet, "needs_fixed_order", lambda x: True)
    inputs, saved, gradients = [value.requires_grad_() for value in arguments()], [], []
    for again in (spynet.computed_again, lambda function, *args: function(*args)):
        monkeypatch.setattr(spynet, "computed_again", again)
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: (saved.append(saved.pop() + t.nbytes), t)[1], lambda t: t):
            out = act(*inputs)
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    given = sum(value.nbytes for value in inputs)
    assert saved[0] <= given < 3 * given < saved[1]
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def test_flows_are_estimated_in_float32_under_autocast():
    net, frames = SpyNet(), torch.rand(2, 1, 3, 32, 32)
    for level in net.basic_module:
        torch.nn.init.normal_(level.basic_module[-1].weight, std=0.1)
    with torch.no_grad():
        wanted = net(*frames)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = net(*frames)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted))


def test_blocks_that_are_computed_again_save_no_random_state(monkeypatch):
    """They draw nothing, and on CUDA a copy of the state waits for the device."""
    net = tiny(use_checkpoint_attn=True, use_checkpoint_ffn=True).train()
    monkeypatch.setattr(torch, "get_rng_state", None)
    net(torch.rand(1, 2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_a_position_that_is_not_a_number_gives_nan_instead_of_a_crash(padding):
    x = torch.randn(1, 2, 4, 5, requires_grad=True)
    columns = torch.tensor([1.5, float("nan"), float("inf")]).view(1, 1, 3).requires_grad_()
    out = spynet.sample_by_gather(x, columns, torch.ones(1, 1, 3), padding_mode=padding)
    assert out[..., 0].isfinite().all() and out[..., 1].isnan().all()
    out.sum().backward()
    assert columns.grad[..., 0].isfinite().all()
