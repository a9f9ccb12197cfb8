"""InkTrace's network and losses give the original's numbers in both modes, and refuse clearly."""

import json

import pytest
import torch

from losses.stroke import DenseLoss, StructuralPretrainLoss, focal_loss, gaussian_heatmap
from models.network_inktrace import MAPS, UnifiedModel, extract_keypoints, keypoint_nms, pack, unpack

TINY = dict(embed_dim=8, num_heads=2, num_layers=1)


class Golden:
    """The original's case, our network with its weights, and its tolerances."""

    def __init__(self, path):
        self.file = torch.load(path, weights_only=True)
        self.gate = json.loads(self.file["tolerance"])
        config = json.loads(self.file["config"])
        self.sizes = {key: config[key] for key in ("embed_dim", "num_heads", "num_layers")}
        inputs = self.file["inputs"]
        self.image, self.masked = inputs["image"].float(), inputs["masked_image"].float()
        self.true = {name: target.float() for name, target in inputs["targets"].items()}

    def case(self, name):
        return self.file["cases"][name]

    def network(self, full):
        net = UnifiedModel(**self.sizes, dropout=0.0, full_heads=full)
        dropped = () if full else tuple(json.loads(self.file["structural_drop_prefixes"]))
        weights = {k: v for k, v in self.file["state_dict"].items() if not k.startswith(dropped)}
        assert list(net.state_dict()) == list(weights)  # the order, too: optimizers count parameters
        net.load_state_dict(weights, strict=True)
        return net

    def close(self, got, wanted, what=""):
        torch.testing.assert_close(got.detach(), wanted, atol=self.gate["atol"], rtol=self.gate["rtol"],
                                   msg=lambda text: f"{what}: {text}")

    def losses_close(self, got, wanted):
        assert set(got) == set(wanted)
        for name, value in wanted.items():
            self.close(got[name], value, name)

    def norms_close(self, net, case):
        """Gradient norms; a bias that a norm takes away again has none but rounding."""
        names, values = json.loads(case["grad_norms"]["names"]), case["grad_norms"]["values"]
        parameters = dict(net.named_parameters())
        assert set(json.loads(case["without_grad"])) == {n for n, p in parameters.items() if p.grad is None}
        norms = torch.stack([parameters[name].grad.norm() for name in names])
        torch.testing.assert_close(norms, values, rtol=self.gate["grad_norm_rtol"], atol=1e-5 * values.max().item())


@pytest.fixture(scope="module")
def golden_file():
    from tests.conftest import SHARED

    path = SHARED / "golden" / "inktrace.pt"
    if not path.exists():
        pytest.skip(f"{path} is absent; set PERDURE_SHARED to run this test")
    return path


@pytest.fixture(scope="module")
def golden(golden_file):
    return Golden(golden_file)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("full", [True, False])
@torch.no_grad()
def test_maps_are_the_originals(golden, full, skips):
    net = golden.network(full).eval()
    case = golden.case(f"eval_{'full' if full else 'struct'}_{'skips' if skips else 'noskips'}")
    image = golden.image if "noskips" not in case else golden.masked
    maps = net(image, use_skips=skips)
    assert list(maps) == [name for name in MAPS if full or name in ("skeleton", "tangent")]
    for key, step, first in (("outputs", 1, 0), ("outputs_strided", 2, 0), ("outputs_second_sample_strided", 2, 1)):
        for name, wanted in case.get(key, {}).items():
            golden.close(maps[name][first : first + len(wanted), :, ::step, ::step], wanted, f"{key} {name}")


@torch.no_grad()
def test_the_encoder_is_the_originals(golden):
    (f1, f2, f3), tokens = golden.network(True).eval().encoder(golden.image)
    wanted = golden.case("encoder_eval")["outputs"]
    for got, name in ((f1.mean((2, 3)), "f1_mean"), (f2.mean((2, 3)), "f2_mean"), (f3, "f3"),
                      (tokens.mean(1), "embeddings_mean")):
        golden.close(got, wanted[name], name)


def test_a_dense_training_step_is_the_originals_with_each_samples_own_mask(golden):
    net, case = golden.network(True).train(), golden.case("train_full_skips")
    maps = net(golden.image, use_skips=True)
    losses = DenseLoss()(maps, golden.true)
    golden.losses_close(losses, case["losses"])
    for name, wanted in case["outputs_strided"].items():
        golden.close(maps[name][..., ::2, ::2], wanted, name)
    losses["total"].backward()
    golden.norms_close(net, case)
    state = net.state_dict()
    for kind in ("mean", "var"):
        norms = torch.stack([state[f"{name}.running_{kind}"].norm() for name in json.loads(case["bn_names"])])
        golden.close(norms, case[f"bn_running_{kind}_norms"], kind)


def test_a_structural_training_step_is_the_originals(golden):
    net, case = golden.network(False).train(), golden.case("train_struct_noskips")
    maps = net(golden.masked, use_skips=False)
    losses = StructuralPretrainLoss()(maps, golden.true)
    golden.losses_close(losses, case["losses"])
    for name, wanted in case["outputs_strided"].items():
        golden.close(maps[name][..., ::2, ::2], wanted, name)
    losses["total"].backward()
    golden.norms_close(net, case)


@torch.no_grad()
def test_the_dense_loss_is_the_originals_where_its_mask_is_right(golden):
    maps, case = golden.network(True).eval()(golden.image), golden.case("eval_full_skips")
    golden.losses_close(DenseLoss()(maps, golden.true), case["losses_fixed"])
    first = [{name: value[:1] for name, value in tensors.items()} for tensors in (maps, golden.true)]
    golden.losses_close(DenseLoss()(*first), case["losses_first_sample"])
    assert not torch.isclose(DenseLoss()(maps, golden.true)["loss_tan"], case["losses_peer"]["loss_tan"], rtol=1e-2)


def test_the_default_sizes_have_the_originals_shapes(golden):
    for full, name in ((True, "default_full"), (False, "default_structural")):
        with torch.device("meta"):
            net = UnifiedModel(full_heads=full)
        assert {k: list(v.shape) for k, v in net.state_dict().items()} == json.loads(golden.file["manifests"][name])
    assert sum(p.numel() for p in net.parameters()) == 1_707_335


def test_peaks_are_the_originals(golden):
    tools = golden.file["tools"]
    heatmap, wanted = tools["inputs"]["heatmap"], tools["outputs"]
    assert torch.equal(keypoint_nms(heatmap), wanted["nms"])
    for channel, points in enumerate(extract_keypoints(heatmap[0], most=10)):
        rows = wanted[f"top10_ch{channel}"]
        assert torch.equal(points, rows[rows[:, 2] > 0])
    every = extract_keypoints(heatmap[0], most=heatmap.numel())
    assert [len(points) for points in every] == wanted["nms"][0].count_nonzero((1, 2)).tolist()


def test_bells_are_the_originals(golden):
    points = golden.true["keypoints"][:1]
    summed = golden.file["tools"]["outputs"]["gaussian_of_targets_first_sample"].float()
    torch.testing.assert_close(gaussian_heatmap(points), summed, atol=1e-4, rtol=0)  # float16 in the file
    with torch.no_grad():
        found = golden.network(True).eval()(golden.image)["keypoints"]
    loss = focal_loss(found, gaussian_heatmap(golden.true["keypoints"]))  # two bells meet in the other samples
    summed = golden.case("eval_full_skips")["keypoint_loss_gaussian_sigma1.5"]
    assert loss.item() == pytest.approx(summed.item(), rel=golden.gate["rtol"])


# ---------------------------------------------------------------- without the golden


def test_bells_that_meet_make_no_false_keypoint():
    points = torch.zeros(1, 1, 16, 16)
    points[0, 0, 8, 7] = points[0, 0, 8, 9] = points[0, 0, 7, 8] = points[0, 0, 9, 8] = 1
    bells = gaussian_heatmap(points)
    assert torch.equal(bells == 1, points == 1)  # in the middle of the four, the original's sum is 1
    distance = torch.tensor([(y - 8) ** 2 + (x - 7) ** 2 for y in range(16) for x in range(16)]).view(16, 16)
    assert torch.allclose(bells[0, 0, 3:14, 2], torch.exp(-distance[3:14, 2] / 4.5))


def test_each_sample_has_its_own_mask():
    """The published loss fails this: there every sample's error counts under every sample's skeleton."""
    true = unpack(torch.zeros(2, 8, 8, 8))
    true["skeleton"][0, 0, 2] = 1
    wrong = {name: value.clone() for name, value in true.items()}
    for name in ("tangent", "offset", "width"):
        wrong[name][1] = 0.3  # only where nothing is drawn
    losses = DenseLoss()(wrong, true)
    assert losses["loss_tan"] == losses["loss_off"] == losses["loss_width"] == 0


def test_weights_scale_their_terms():
    maps, true = unpack(torch.rand(2, 8, 8, 8)), unpack(torch.rand(2, 8, 8, 8).round())
    plain = DenseLoss()(maps, true)
    other = DenseLoss(skeleton_weight=5, keypoints_weight=0, tangent_weight=3)(maps, true)
    assert other["loss_skel"] == plain["loss_skel"] / 2 and other["loss_keys"] == 0
    assert other["loss_tan"] == pytest.approx(3 * plain["loss_tan"].item())
    assert plain["total"] == sum(value for name, value in plain.items() if name != "total")


def test_packing_is_undone_by_unpacking():
    packed = torch.rand(2, 8, 4, 4)
    assert torch.equal(pack(unpack(packed)), packed) and torch.equal(pack(unpack(packed[0])), packed[0])
    assert list(unpack(packed[:, :3])) == ["skeleton", "tangent"]


def test_layers_do_not_start_as_copies_and_gates_are_closed():
    net = UnifiedModel(embed_dim=8, num_heads=2, num_layers=2)
    first, second = net.encoder.transformer.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    maps = net.eval()(torch.rand(1, 1, 64, 64))
    assert maps["skeleton"].mean() < 0.1 and maps["keypoints"].mean() < 0.1
    assert net.decoder.grounding1.gamma_attn == net.decoder.grounding2.gamma_ffn == 0


@pytest.mark.parametrize("over", [{"embed_dim": 9}, {"num_layers": 0}, {"dropout": 1.0}])
def test_impossible_sizes_are_refused(over):
    with pytest.raises(ValueError, match="must"):
        UnifiedModel(**{**TINY, **over})


def test_other_images_and_losses_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 32\); \(B, C, 64, 64\) is needed"):
        UnifiedModel(**TINY)(torch.rand(1, 1, 32, 32))
    with pytest.raises(ValueError, match="offset_weight -1 must be >= 0"):
        DenseLoss(offset_weight=-1)
    with pytest.raises(ValueError, match="keypoint_sigma -1 must be >= 0"):
        DenseLoss(keypoint_sigma=-1)


def test_probabilities_are_computed_in_float32_under_autocast():
    """In bfloat16 the sigmoid of 7 is 1, and a keypoint there has no gradient."""
    net = UnifiedModel(embed_dim=32, num_layers=1).eval()
    for head in (net.decoder.heads.skeleton, net.decoder.heads.keypoints):
        torch.nn.init.constant_(head[0].bias, 7.0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        maps = net(torch.rand(1, 1, 64, 64))
    for name in ("skeleton", "keypoints"):
        assert maps[name].dtype == torch.float32 and maps[name].max() < 1
