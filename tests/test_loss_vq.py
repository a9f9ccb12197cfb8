"""LPIPS and VQGAN's loss give the originals' numbers, spare the work before disc_start, and refuse clearly."""

import json

import pytest
import torch
from torch import nn
from torchvision.models import vgg16

import losses.vqperceptual as vqperceptual
from losses import LOSSES
from losses.lpips import LPIPS, WIDTHS
from losses.vqperceptual import VQLPIPSWithDiscriminator, hinge_loss, vanilla_loss
from options import Section, build

CASES = ["hinge_before_opt0", "hinge_before_opt1", "hinge_after_opt0", "hinge_after_opt1", "vanilla_before_opt0",
         "vanilla_before_opt1", "vanilla_after_opt0", "vanilla_after_opt1", "no_perceptual_after_opt0",
         "vgg_after_opt0", "vgg_after_opt1", "eval_grad_after_opt0", "eval_nograd_after_opt0",
         "eval_nograd_after_opt1", "conditional_after_opt0", "conditional_after_opt1", "actnorm_after_opt0"]
BUGS = ("early_discriminator", "shared_generator_pass")  # whose traces the goldens hold
SMALL = dict(disc_start=10, perceptual_weight=0.0, disc_ndf=4, disc_num_layers=2)


def golden_file(shared, name):
    return torch.load(shared / "golden" / f"{name}.pt", weights_only=True)


def assert_close(got, wanted, gate, what=""):
    torch.testing.assert_close(got.double(), wanted.double(), atol=gate["atol"], rtol=gate["rtol"],
                               msg=lambda text: f"{what}: {text}")


def random_vgg(seed):
    """VGG16's convolutions by the goldens' recipe, as torchvision would save them."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in vgg16(weights=None).features.state_dict().items()}
    state = {}
    for n, (key, shape) in enumerate((k, v) for k, v in shapes.items() if k.endswith("weight")):
        generator = torch.Generator().manual_seed(seed + n)
        state[f"features.{key}"] = torch.randn(shape, generator=generator) * (2 / (9 * shape[1])) ** 0.5
        state[f"features.{key.replace('weight', 'bias')}"] = 0.05 * torch.randn(shape[0], generator=generator)
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of a random VGG and random linear weights, as the published files hold them."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(random_vgg(20240), folder / "vgg.pth")
    torch.save({f"lin{n}.model.1.weight": torch.rand(1, w, 1, 1) for n, w in enumerate(WIDTHS)}, folder / "lin.pth")
    return folder / "vgg.pth", folder / "lin.pth"


@pytest.fixture
def lpips(shared, files, tmp_path):
    """The golden, and LPIPS with its weights; skipped where this torch draws another VGG from the seed."""
    golden = golden_file(shared, "lpips")
    weights = [v for k, v in torch.load(files[0], weights_only=True).items() if k.endswith("weight")]
    wanted = golden["vgg_checksum"]["weight_abs_sum"]
    found = torch.stack([w.double().abs().sum() for w in weights])
    if not torch.allclose(found, wanted, rtol=1e-5):
        pytest.skip("this version of torch draws other numbers from a seed than the goldens' did")
    torch.save(golden["state_dict"], tmp_path / "lin.pth")
    return golden, LPIPS(str(files[0]), str(tmp_path / "lin.pth")), tmp_path / "lin.pth"


# ---- LPIPS -------------------------------------------------------------------------


def test_lpips_heads_are_those_of_the_original(lpips):
    golden, net, _ = lpips
    case, gate = golden["cases"]["head"], json.loads(golden["tolerance"])
    ours, maps = ([f.clone().requires_grad_() for f in case["inputs"][key].values()] for key in ("feats0", "feats1"))
    layers = net.distances(ours, maps)
    assert_close(torch.cat(layers, dim=1).flatten(1), case["outputs"]["per_layer"], gate)
    assert_close(sum(layers), case["outputs"]["value"], gate)
    sum(layers).sum().backward()
    norms = torch.stack([m.grad.norm() for m in maps])
    torch.testing.assert_close(norms, case["grad_norms"]["values"], rtol=gate["rtol"], atol=0)


def test_lpips_is_that_of_the_original(lpips):
    golden, net, _ = lpips
    case, gate = golden["cases"]["full"], json.loads(golden["tolerance"])
    x, y = case["inputs"]["x"], case["inputs"]["y"].clone().requires_grad_()
    value = net.train()(x, y)  # train() must not wake the dropout
    value.sum().backward()
    assert_close(value, case["outputs"]["value"], gate)
    assert_close(y.grad, case["grads"]["y"], gate)
    maps = net.net(net.scaling_layer(x))
    assert_close(torch.stack([m.norm() for m in maps]), case["outputs"]["feat_norms_x"], gate)
    assert_close(torch.stack([m.mean() for m in maps]), case["outputs"]["feat_means_x"], gate)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == json.loads(golden["manifest"])


def test_lpips_is_frozen_and_zero_for_equal_images_with_a_finite_gradient(files):
    random = torch.get_rng_state()
    net = LPIPS(*map(str, files))
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(p.requires_grad for p in net.parameters()) and not net.train().training
    maps = [torch.zeros(1, w, 2, 2, requires_grad=True) for w in WIDTHS]
    total = sum(net.distances(maps, [m.detach() for m in maps]))
    total.sum().backward()
    assert total.item() == 0 and all(m.grad.isfinite().all() for m in maps)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    assert net(x, x).shape == (1, 1, 1, 1) and net(x, x).item() == 0 < net(x, -x).item()


def test_lpips_can_drop_features_as_taming_does(files):
    loss = VQLPIPSWithDiscriminator(0, vgg_path=str(files[0]), lpips_path=str(files[1]), disc_ndf=4,
                                    legacy=["perceptual_dropout"])
    net, (x, y) = loss.train().perceptual_loss, torch.rand(2, 1, 3, 16, 16)
    assert not torch.equal(net(x, y), net(x, y))
    loss.eval()
    assert torch.equal(net(x, y), net(x, y))


def test_missing_weights_say_at_once_where_to_get_them_or_how_to_do_without(tmp_path, files):
    for vgg, linear, name, url in (
            (tmp_path / "no.pth", files[1], "vgg_path", "https://download.pytorch.org/models/vgg16-397923af.pth"),
            (files[0], tmp_path / "no.pth", "lpips_path", "richzhang/PerceptualSimilarity/raw/master/lpips/weights")):
        with pytest.raises(FileNotFoundError) as error:
            VQLPIPSWithDiscriminator(10, vgg_path=str(vgg), lpips_path=str(linear))
        for part in (name, url, str(tmp_path / "no.pth"), "set perceptual_weight to 0"):
            assert part in str(error.value)
        assert "\n" not in str(error.value)


def test_files_of_something_else_are_refused_in_one_line(tmp_path, files):
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for vgg, linear, message in ((tmp_path / "other.pth", files[1], "does not hold VGG16's weights"),
                                 (files[0], tmp_path / "other.pth", "does not hold LPIPS's weights for VGG16"),
                                 (tmp_path / "broken.pth", files[1], "broken.pth")):
        with pytest.raises(ValueError, match=message) as error:
            LPIPS(str(vgg), str(linear))
        assert "\n" not in str(error.value)


# ---- the loss, as the original ---------------------------------------------------------


class Stub(nn.Module):
    def forward(self, x, y):
        return (x - y).square().mean(dim=(1, 2, 3), keepdim=True)


def build_loss(golden, case, perceptual, legacy):
    config = {**json.loads(case["config"]), "perceptual_weight": 0.0}
    loss = VQLPIPSWithDiscriminator(**config, legacy=legacy)
    loss.perceptual_weight = json.loads(case["config"])["perceptual_weight"]
    loss.perceptual_loss = perceptual
    state = golden["discriminator_state_dicts"][case["discriminator_state"]]
    loss.discriminator.load_state_dict(state, strict=True)
    return loss.train(case["training"])


def run_case(golden, case, perceptual, legacy):
    """The loss object, its value, log, and the leaves whose gradients are golden."""
    loss_fn = build_loss(golden, case, perceptual, legacy)
    inputs = golden["inputs"]
    leaves = {key: inputs[key].clone().requires_grad_()
              for key in ("feat", "last_layer_weight", "last_layer_bias", "codebook_loss")}
    with torch.set_grad_enabled(not case["no_grad"]):
        restored = nn.functional.conv2d(leaves["feat"], leaves["last_layer_weight"], leaves["last_layer_bias"],
                                        padding=1)
        loss, log = loss_fn(leaves["codebook_loss"], inputs["x"], restored, case["optimizer_idx"],
                            case["global_step"], last_layer=leaves["last_layer_weight"],
                            cond=inputs["cond"] if case["uses_cond"] else None, split=case["split"])
    if loss.requires_grad:
        loss.backward()
    return loss_fn, loss, log, leaves


def perceptual_of(case, request):
    if case["perceptual"] == "vgg":
        return request.getfixturevalue("lpips")[1]
    return {"stub": Stub(), "off": None}[case["perceptual"]]


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_the_original(shared, request, name):
    golden = golden_file(shared, "vq_lpips_disc_loss")
    assert list(golden["cases"]) == CASES
    case, gate = golden["cases"][name], json.loads(golden["tolerance"])
    loss_fn, loss, log, leaves = run_case(golden, case, perceptual_of(case, request), BUGS)
    assert_close(loss, case["losses"]["loss"], gate, "loss")
    assert log.keys() == case["log"].keys()
    for key, wanted in case["log"].items():
        assert_close(log[key], wanted, gate, key)
        assert not log[key].requires_grad and log[key].shape == ()
    for key, wanted in case.get("grads", {}).items():
        assert_close(leaves[key].grad, wanted, gate, key)
    for key, wanted in case["discriminator_buffers_after"].items():
        assert_close(loss_fn.discriminator.state_dict()[key], wanted, gate, key)
    if "grad_norms" in case:
        names, values = json.loads(case["grad_norms"]["names"]), case["grad_norms"]["values"]
        weights = dict(loss_fn.discriminator.named_parameters())
        norms = torch.stack([weights[key].grad.norm() for key in names])
        torch.testing.assert_close(norms, values, rtol=gate["grad_norm_rtol"], atol=1e-5 * values.max().item())


@pytest.mark.parametrize("name", [name for name in CASES if "opt0" in name])
def test_without_the_originals_bugs_the_generator_learns_the_same(shared, request, name):
    golden = golden_file(shared, "vq_lpips_disc_loss")
    case, gate = golden["cases"][name], json.loads(golden["tolerance"])
    loss_fn, loss, _, leaves = run_case(golden, case, perceptual_of(case, request), legacy=())
    assert_close(loss, case["losses"]["loss"], gate, "loss")
    for key, wanted in case.get("grads", {}).items():
        assert_close(leaves[key].grad, wanted, gate, key)
    state = golden["discriminator_state_dicts"][case["discriminator_state"]]
    assert all(torch.equal(v, state[k].to(v)) for k, v in loss_fn.discriminator.state_dict().items())
    assert all(p.grad is None for p in loss_fn.discriminator.parameters())


# ---- the loss, in training ---------------------------------------------------------------


def images(size=16):
    x, last = torch.rand(2, 3, size, size) * 2 - 1, nn.Conv2d(3, 3, 1)
    return x, last(x), last.weight


def test_nothing_is_asked_of_the_discriminator_before_disc_start():
    loss_fn = VQLPIPSWithDiscriminator(**SMALL)
    calls = []
    loss_fn.discriminator.main[0].register_forward_hook(lambda *_: calls.append(1))
    x, restored, weight = images()
    for step, wanted in ((9, 0), (10, 1)):
        assert loss_fn.has_discriminator(step) is bool(wanted)
        loss_fn.generator_loss(torch.ones(()), x, restored, step, weight)
        assert len(calls) == wanted
        loss_fn.discriminator_loss(x, restored, step)
        assert len(calls) == 3 * wanted
    loss, log = loss_fn.discriminator_loss(x, restored, 9)
    assert loss == 0 and not loss.requires_grad and log["train/disc_loss"] == 0


def test_one_forward_pass_of_the_generator_serves_both_players():
    loss_fn = VQLPIPSWithDiscriminator(**SMALL)
    x, restored, weight = images()
    loss, _ = loss_fn.generator_loss(torch.ones(()), x, restored, 10, weight)
    loss.backward()
    before, statistics = weight.grad, loss_fn.discriminator.state_dict()["main.3.running_mean"].clone()
    assert all(p.grad is None for p in loss_fn.discriminator.parameters())
    loss, _ = loss_fn.discriminator_loss(x, restored, 10)
    loss.backward()
    assert weight.grad is before and all(p.grad is not None for p in loss_fn.discriminator.parameters())
    assert not torch.equal(loss_fn.discriminator.state_dict()["main.3.running_mean"], statistics)


def test_the_adaptive_weight_balances_the_last_layers_gradients():
    loss_fn = VQLPIPSWithDiscriminator(**SMALL, disc_weight=0.5)
    x, restored, weight = images()
    _, log = loss_fn.generator_loss(torch.ones(()), x, restored, 10, weight)
    nll = (x - restored).abs().mean()
    adversarial = -loss_fn.discriminator.train()(restored).mean()
    norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (nll, adversarial)]
    assert log["train/d_weight"].item() == pytest.approx((0.5 * norms[0] / (norms[1] + 1e-4)).item(), rel=1e-4)


def test_pixelloss_weight_counts_unless_legacy_ignores_it():
    x, restored, weight = images()
    values = [VQLPIPSWithDiscriminator(**SMALL, pixelloss_weight=2.0, legacy=legacy).generator_loss(
        torch.zeros(()), x, restored, 0, weight)[0].item() for legacy in ([], ["ignored_pixelloss_weight"])]
    assert values[0] == pytest.approx(2 * values[1])


def test_hinge_and_vanilla_are_what_they_are_called():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 0.5))
    wanted = nn.functional.binary_cross_entropy_with_logits
    assert vanilla_loss(real, fake).item() == pytest.approx(
        0.5 * (wanted(real, torch.ones(2)) + wanted(fake, torch.zeros(2))).item())


def test_validation_needs_no_gradient_and_no_last_layer():
    loss_fn = VQLPIPSWithDiscriminator(**SMALL).eval()
    x, restored, _ = images()
    with torch.no_grad():
        loss, log = loss_fn(torch.ones(()), x, restored, 0, 10, split="val")
    assert log["val/d_weight"] == 0 and loss.item() == pytest.approx((log["val/nll_loss"] + 1).item())


def test_names_of_option_files_build():
    loss = build(LOSSES, Section(kind="VQLPIPSWithDiscriminator", **SMALL), "kind")
    assert isinstance(loss, VQLPIPSWithDiscriminator)
    assert LOSSES["vqperceptual"] == LOSSES["VQLPIPSWithDiscriminator"] and "lpips" in LOSSES


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    (dict(legacy=["typo"]), "legacy: unknown typo; valid: early_discriminator"),
    (dict(disc_loss="wasserstein"), "disc_loss 'wasserstein' must be one of hinge, vanilla"),
    (dict(disc_weight=-1.0), "disc_weight -1.0 must be >= 0"),
    (dict(disc_num_layers=0), "disc_num_layers 0 must be >= 1"),
])
def test_impossible_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        VQLPIPSWithDiscriminator(**{**SMALL, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, change, message", [
    ({}, lambda a: a.update(reconstructions=torch.zeros(2, 3, 8, 8)), "don't match inputs"),
    (dict(disc_num_layers=3), lambda a: None, "must have 24 x 24 pixels or more"),
    (dict(disc_conditional=True), lambda a: None, "disc_conditional needs cond"),
    ({}, lambda a: a.update(cond=torch.zeros(2, 1, 16, 16)), "cond needs disc_conditional"),
    ({}, lambda a: a.update(last_layer=None, global_step=10), "needs last_layer"),
])
def test_wrong_arguments_are_refused_in_one_line_at_the_first_step(options, change, message):
    x, restored, weight = images()
    arguments = dict(codebook_loss=torch.ones(()), inputs=x, reconstructions=restored, optimizer_idx=0, global_step=0,
                     last_layer=weight)
    change(arguments)
    with pytest.raises(ValueError, match=message) as error:
        VQLPIPSWithDiscriminator(**{**SMALL, **options})(**arguments)
    assert "\n" not in str(error.value)


def test_every_bug_has_a_name_and_is_off_by_default():
    assert VQLPIPSWithDiscriminator(**SMALL).legacy == frozenset()
    assert set(BUGS) < vqperceptual.LEGACY.keys()
