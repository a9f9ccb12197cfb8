"""The autoencoders with codebooks and the discriminator give the originals' numbers, load their weights, keep their
codebooks in order, and refuse clearly."""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import models.network_vqgan as network_vqgan
from models import NETWORKS
from models.network_discriminator import NLayerDiscriminator
from models.network_vqgan import (
    EMAVQ,
    DDConfig,
    Decoder,
    EMAVectorQuantizer,
    Encoder,
    GumbelVQ,
    VectorQuantizer,
    VQModel,
    nearest,
    perplexity,
)
from models.network_vqvae import VQVAE2, VqVae
from options import Section, build
from storage.foreign import split_taming

TINY = dict(ch=32, in_channels=3, out_ch=3, resolution=16, z_channels=8, num_res_blocks=1, attn_resolutions=[8],
            ch_mult=[1, 2])
SMALL = dict(num_hiddens=8, num_res_hiddens=4, num_res_blocks=1, n_embed=10, embed_dim=4)
FAMILY = {
    "VQModel": lambda **o: VQModel(TINY, 10, 4, **o),
    "EMAVQ": lambda **o: EMAVQ(TINY, 10, 4, **o),
    "GumbelVQ": lambda **o: GumbelVQ(TINY, 10, 8, **o),
    "VqVae": lambda **o: VqVae(**SMALL, **o),
    "VqVae, averages": lambda **o: VqVae(**SMALL, decay=0.9, **o),
    "VQVAE2": lambda **o: VQVAE2(**SMALL, **o),
}


def golden_file(shared, name):
    return torch.load(shared / "golden" / f"{name}.pt", weights_only=True)


def assert_close(got, wanted, gate, what=""):
    torch.testing.assert_close(got.float(), wanted, atol=gate["atol"], rtol=gate["rtol"],
                               msg=lambda text: f"{what}: {text}")


def assert_norms(module, wanted, gate):
    """Gradient norms; a bias that a norm takes away again has none but rounding."""
    names, values = json.loads(wanted["names"]), wanted["values"]
    grads = dict(module.named_parameters())
    assert set(names) == {name for name, p in grads.items() if p.grad is not None}
    norms = torch.stack([grads[name].grad.norm() for name in names])
    torch.testing.assert_close(norms, values, rtol=gate["grad_norm_rtol"], atol=1e-5 * values.max().item())


# ---- VQModel, as the original -------------------------------------------------


@pytest.fixture
def vqgan(shared):
    golden = golden_file(shared, "vqgan")
    config = json.loads(golden["config"])
    net = VQModel(**config)
    net.load_state_dict(golden["state_dict"], strict=True)
    return golden, net.train(), json.loads(golden["tolerance"])


def test_a_training_step_of_vqgan_is_that_of_the_original(vqgan):
    golden, net, gate = vqgan
    case = golden["cases"]["train_step"]
    assert list(net.state_dict()) == list(golden["state_dict"])
    x = case["inputs"]["x"].clone().requires_grad_()
    latents = []
    net.quant_conv.register_forward_hook(lambda _, __, z: (z.retain_grad(), latents.append(z)) and None)
    quant, loss, (_, _, indices) = net.encode(x)
    dec = net.decode(quant)
    mse = (dec - x.detach()).square().mean()
    (mse + loss).backward()
    assert torch.equal(indices, case["outputs"]["indices"])
    for got, name in ((latents[0], "pre_quant"), (quant, "quant"), (dec, "dec")):
        assert_close(got, case["outputs"][name], gate, name)
    for got, name in ((mse, "rec_mse"), (loss, "codebook_loss"), (mse + loss, "total")):
        assert_close(got, case["losses"][name], gate, name)
    assert_close(x.grad, case["grads"]["x"], gate, "x")
    assert_close(latents[0].grad, case["grads"]["pre_quant"], gate, "pre_quant")
    assert_norms(net, case["grad_norms"], gate)


def test_another_size_of_image_keeps_the_placement_of_attention(vqgan):
    golden, net, gate = vqgan
    case = golden["cases"]["other_size"]
    with torch.no_grad():
        loss, dec, _, indices = net(case["inputs"]["x"])
    assert torch.equal(indices, case["outputs"]["indices"])
    assert_close(dec, case["outputs"]["dec"], gate)
    assert_close(loss, case["losses"]["codebook_loss"], gate)


def test_codes_decode_as_in_the_original(vqgan):
    golden, net, gate = vqgan
    case = golden["cases"]["decode_codes"]
    indices, shape = case["inputs"]["indices"], case["inputs"]["shape_bhwc"].tolist()
    with torch.no_grad():
        assert_close(net.quantize.lookup(indices.view(shape[:3])), case["outputs"]["z_q"], gate)
        assert_close(net.decode_code(indices, shape), case["outputs"]["dec"], gate)
        assert_close(net.decode_code(indices.view(shape[:3])), case["outputs"]["dec"], gate)


@pytest.mark.parametrize("legacy", [True, False])
def test_beta_weighs_the_commitment_unless_legacy_is_set(vqgan, legacy):
    golden, net, gate = vqgan
    case = golden["cases"]["beta_placement"][f"legacy_{str(legacy).lower()}"]
    config = json.loads(golden["config"])
    book = VectorQuantizer(config["n_embed"], config["embed_dim"], config["beta"], legacy=legacy)
    book.embedding.load_state_dict({"weight": golden["state_dict"]["quantize.embedding.weight"]})
    z = golden["cases"]["train_step"]["outputs"]["pre_quant"].clone().requires_grad_()
    loss = book(z)[1]
    loss.backward()
    assert_close(loss, case["losses"]["codebook_loss"], gate)
    assert_close(z.grad, case["grads"]["z"], gate)
    assert_close(book.embedding.weight.grad, case["grads"]["embedding"], gate)


def test_the_papers_beta_is_the_default():
    assert inspect.signature(VQModel.__init__).parameters["legacy"].default is False


def test_pooling_and_double_z_are_those_of_the_original(shared):
    golden = golden_file(shared, "vqgan")
    case, gate = golden["cases"]["double_z_pool"], json.loads(golden["tolerance"])
    config = DDConfig(**json.loads(case["config"]))
    encoder, decoder = Encoder(config), Decoder(config, give_pre_end=True)
    encoder.load_state_dict(case["encoder_state_dict"], strict=True)
    decoder.load_state_dict(case["decoder_state_dict"], strict=True)
    with torch.no_grad():
        assert_close(encoder(case["inputs"]["x"]), case["outputs"]["encoded"], gate)
        assert_close(encoder(case["inputs"]["x_faint"]), case["outputs"]["encoded_faint"], gate)
        assert_close(decoder(case["inputs"]["z"]), case["outputs"]["decoded_pre_end"], gate)


@pytest.mark.parametrize("name", ["imagenet_f16_1024", "imagenet_f16_16384"])
def test_published_models_load_strictly_with_the_weights_of_their_loss_passed_over(shared, name):
    golden = golden_file(shared, "vqgan")
    manifest = json.loads(golden["manifests"][name])
    loss_keys = json.loads(golden["manifests"]["loss_prefix_keys"])
    with torch.device("meta"):
        net = VQModel(manifest["ddconfig"], manifest["n_embed"], manifest["embed_dim"])
        published = {k: torch.empty(shape) for k, shape in {**manifest["keys"], **loss_keys}.items()}
        published["colorize"] = torch.empty(3, 5, 1, 1)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == manifest["keys"]
    assert split_taming(published)[0].keys() == manifest["keys"].keys()
    net.load_state_dict(published, strict=True, assign=True)
    assert len(published) == 343 + 55 + 1  # what the caller holds is left alone
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net.load_state_dict({**published, "other": torch.empty(1, device="meta")}, strict=True, assign=True)


# ---- the codebook of moving averages, as the original --------------------------


def ema_book(golden, state, **options):
    config = json.loads(golden["config"])
    book = EMAVectorQuantizer(config["n_embed"], config["embedding_dim"], config["beta"], config["decay"],
                              config["eps"], **options)
    book.load_state_dict(state, strict=True)
    return book.train()


@pytest.mark.parametrize("name", ["warm", "fresh", "eval_no_update", "update_flag_off"])
def test_moving_averages_are_those_of_the_original(shared, name):
    golden = golden_file(shared, "ema_quantizer")
    case, gate = golden["cases"][name], json.loads(golden["tolerance"])
    book = ema_book(golden, case["state_before"])
    assert list(book.state_dict()) == list(golden["state_dict"])
    book.train(name != "eval_no_update")
    book.frozen = name == "update_flag_off"
    for step in (case[key] for key in ("step1", "step2") if key in case):
        z = step["inputs"]["z"].clone().requires_grad_()
        output, loss, (usage, _, indices) = book(z)
        total = loss + (output * step["inputs"]["grad_out"]).sum()
        total.backward()
        book.update()
        assert torch.equal(indices, step["outputs"]["indices"])
        for got, wanted in ((output, step["outputs"]["z_q"]), (usage, step["outputs"]["perplexity"]),
                            (loss, step["losses"]["loss"]), (total, step["losses"]["total"]),
                            (z.grad, step["grads"]["z"])):
            assert_close(got, wanted, gate, name)
        for key, wanted in step["state_after"].items():
            assert_close(book.state_dict()[key], wanted, gate, key)


# ---- the codebook of moving averages, in training ------------------------------


def look_up(book, z):
    output, loss, _ = book(z.requires_grad_())
    (loss + output.sum()).backward()


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_empty_codes_stay_where_they_are():
    book = EMAVectorQuantizer(64, 4).train()
    before = book.embedding.weight.clone()
    for step in range(30):
        look_up(book, before[:3].repeat(4, 1).T.reshape(1, 4, 3, 4) + 0.01)
        book.update(step)
    empty = book.embedding.cluster_size < 1
    assert empty.sum() > 50
    assert torch.allclose(book.embedding.weight[empty], before[empty], rtol=1e-3)


def test_accumulated_batches_are_one_update():
    z = torch.randn(4, 4, 3, 3)
    whole, parts = EMAVectorQuantizer(8, 4), EMAVectorQuantizer(8, 4)
    parts.load_state_dict(whole.state_dict())
    look_up(whole, z.clone())
    seen = []
    for part in z.chunk(2):
        look_up(parts, part.clone())
        seen.append(parts.take_counts())
    before = state_of(parts)
    whole.update()
    parts.update(seen=sum(seen))
    assert not equal(before, parts.state_dict())
    for key, value in whole.state_dict().items():
        assert torch.allclose(parts.state_dict()[key], value, atol=1e-6), key
    after = state_of(parts)
    parts.update()
    assert equal(after, parts.state_dict())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_gradient_checkpointing_computes_twice_counts_once(use_reentrant):
    plain, recomputed = EMAVectorQuantizer(8, 4), EMAVectorQuantizer(8, 4)
    recomputed.load_state_dict(plain.state_dict())
    z = torch.randn(2, 4, 3, 3)
    look_up(plain, z.clone())
    leaf = z.clone().requires_grad_()
    output, loss = checkpoint(lambda x: recomputed(x * 1)[:2], leaf, use_reentrant=use_reentrant)
    (loss + output.sum()).backward()
    plain.update()
    recomputed.update()
    assert equal(plain.state_dict(), recomputed.state_dict())


def test_only_a_forward_pass_with_a_gradient_counts_and_none_of_a_skipped_step():
    book = EMAVectorQuantizer(8, 4)
    before, z = state_of(book), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        book(z.clone().requires_grad_())  # the discriminator's turn, say
    assert not book.take_counts().any()
    book(z.clone().requires_grad_())
    book.drop_counts()  # the step was skipped for its loss
    book.eval()
    look_up(book, z.clone())
    book.update()
    assert equal(before, book.state_dict())
    book.train()
    book(z.clone().requires_grad_())
    assert book.take_counts()[:, 0].sum() == 18 and not book.take_counts().any()


def test_processes_that_sum_their_counts_have_the_same_codes():
    whole, half = EMAVectorQuantizer(8, 4), EMAVectorQuantizer(8, 4)
    half.load_state_dict(whole.state_dict())
    z = torch.randn(2, 4, 3, 3)
    look_up(whole, torch.cat((z, z)))
    look_up(half, z.clone())
    whole.update()
    half.update(seen=2 * half.take_counts())  # as if another process saw the same
    for key, value in whole.state_dict().items():
        assert torch.allclose(half.state_dict()[key], value, atol=1e-6), key


def test_dead_codes_restart_from_the_batch_as_the_step_says():
    book = EMAVectorQuantizer(6, 4, restart_below=0.5)
    book.embedding.cluster_size[2:] = 0.1
    z = torch.randn(2, 4, 3, 3)
    vectors = z.permute(0, 2, 3, 1).flatten(0, 2)
    results = []
    for step in (1, 1, 2):
        twin = copy.deepcopy(book)
        torch.manual_seed(step + len(results))  # a global generator in any state
        random = torch.get_rng_state()
        # all latents choose code 0, so the others have no hits
        twin.embedding.weight[0], twin.embedding.weight[1:] = 0, 100
        look_up(twin, z.clone())
        twin.update(step)
        assert torch.equal(torch.get_rng_state(), random)
        distance = torch.cdist(twin.embedding.weight, vectors).min(dim=1).values
        assert (distance[2:] < 1e-3).all() and distance[1] > 0.1
        assert torch.equal(twin.embedding.cluster_size[2:], torch.full((4,), twin.embedding.cluster_size[2].item()))
        assert twin.embedding.cluster_size[2].item() == pytest.approx((0.99 * 2.4 + 0.01 * 18) / 6)
        results.append(twin.embedding.weight.clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_averages_complete_themselves_from_a_model_that_has_none():
    source, net = FAMILY["VQModel"](), FAMILY["EMAVQ"]()
    net.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(net.quantize.embedding.embed_avg, source.quantize.embedding.weight)
    twin = copy.deepcopy(net)
    twin.load_state_dict(FAMILY["VQModel"]().state_dict(), strict=True)
    assert torch.equal(net.quantize.embedding.embed_avg, source.quantize.embedding.weight)
    with pytest.raises(RuntimeError, match="embed_avg"):  # half of it is not a model
        state = net.state_dict()
        del state["quantize.embedding.embed_avg"]
        net.load_state_dict(state, strict=True)


# ---- every network ------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_every_network_gives_loss_images_perplexity_and_indices(name):
    net = FAMILY[name]().train()
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    loss, restored, usage, indices = net(images)
    assert loss.shape == usage.shape == () and restored.shape == images.shape
    assert not usage.requires_grad and 1 <= usage <= 10.01
    (loss + (restored - images).abs().mean()).backward()
    before = {key: v for key, v in state_of(net).items() if "quantize" in key}
    net.update_codebook(step=1)
    moved = [key for key, v in before.items() if not torch.equal(v, net.state_dict()[key])]
    assert bool(moved) == (name in ("EMAVQ", "VqVae, averages", "VQVAE2"))
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
    assert net.last_layer.grad.ne(0).any() and 3 in net.last_layer.shape[:2]


@pytest.mark.parametrize("name", FAMILY)
def test_indices_decode_to_the_reconstruction(name):
    net = FAMILY[name]().eval()
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        _, restored, _, indices = net(images)
        again = net.decode_code(indices, (2, 8, 12)) if "VQ" in name and name != "VQVAE2" else net.decode_code(indices)
        assert torch.allclose(again, restored, atol=1e-5)
        assert torch.equal(net(images)[1], restored)  # no noise


def test_names_of_option_files_build():
    for name in ("TamingVQGAN", "taming_vqgan", "EMAVQ", "emavq", "VQGAN", "vqgan", "GumbelVQ"):
        section = Section(net_type=name, ddconfig=TINY, n_embed=10, embed_dim=8)
        assert isinstance(build(NETWORKS, section, "net_type"), VQModel)
    for name, kind in (("VQVAE2", VQVAE2), ("vqvae2", VQVAE2), ("VqVae", VqVae), ("vqvae", VqVae)):
        assert isinstance(build(NETWORKS, Section(net_type=name, **SMALL), "net_type"), kind)


def test_half_precision_leaves_the_codebook_in_float32():
    book = EMAVectorQuantizer(500, 4)  # many codes: bfloat16 would confuse them
    z = torch.randn(1, 4, 8, 8)
    plain = book(z)[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quant, loss, (usage, _, indices) = book(z)
        _, restored, _, _ = FAMILY["EMAVQ"]()(torch.rand(1, 3, 16, 16))
        assert book(z.bfloat16())[0].dtype == torch.float32
    assert quant.dtype == loss.dtype == torch.float32 and restored.dtype == torch.bfloat16
    assert torch.equal(indices, plain[2]) and usage == plain[0]


# ---- parts ---------------------------------------------------------------------


def test_the_nearest_code_is_found_in_chunks_of_any_size(monkeypatch):
    z, codes = torch.randn(50, 4), torch.randn(7, 4)
    wanted = torch.cdist(z, codes).argmin(dim=1)
    assert torch.equal(nearest(z, codes), wanted)
    for most in (1, 20, 349):
        monkeypatch.setattr(network_vqgan, "MAX_DISTANCES", most)
        assert torch.equal(nearest(z, codes), wanted)


def test_perplexity_counts_the_codes_in_use():
    assert perplexity(torch.arange(8), 16) == pytest.approx(8, rel=1e-5)
    assert perplexity(torch.zeros(8, dtype=torch.long), 16) == pytest.approx(1, rel=1e-5)


def test_remapped_and_shaped_indices(tmp_path):
    path = tmp_path / "used.npy"
    np.save(path, np.array([9, 2, 4, 7]))
    z = torch.randn(2, 4, 3, 5)
    plain, remapped = VectorQuantizer(10, 4), VectorQuantizer(10, 4, remap=str(path))
    remapped.load_state_dict(plain.state_dict(), strict=False)
    assert "used" in remapped.state_dict()
    indices, (places, shaped) = plain(z)[2][2], (remapped(z)[2][2], VectorQuantizer(10, 4, sane_index_shape=True)(z))
    assert indices.shape == (30,) and places.shape == (30, 1) and shaped[2][2].shape == (2, 3, 5)
    known = torch.isin(indices, remapped.used)
    assert known.any() and not known.all()
    assert torch.equal(remapped.used[places[known, 0]], indices[known])
    assert 0 <= places.min() and places.max() < 4
    back = remapped.inward(places, (2, 3, 5))
    assert torch.equal(back.flatten()[known], indices[known])


def test_gumbel_samples_in_training_and_is_sure_in_evaluation():
    net = FAMILY["GumbelVQ"]().train()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert not torch.equal(net(images)[3], net(images)[3])
    with torch.no_grad():
        logits = net.quantize.proj(net.quant_conv(net.encoder(images)))
        share = logits.softmax(dim=1)
        wanted = net.quantize.kl_weight * (share * (share * 10 + 1e-10).log()).sum(dim=1).mean()
    assert net.eval()(images)[0].item() == pytest.approx(wanted.item(), rel=1e-4)
    assert torch.equal(net(images)[3], logits.argmax(dim=1).flatten())


# ---- discriminator ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["bn_n3", "bn_n2", "actnorm_n2"])
def test_the_discriminator_is_that_of_the_original(shared, name):
    golden = golden_file(shared, "nlayer_discriminator")
    case, gate = golden["cases"][name], json.loads(golden["tolerance"])
    net = NLayerDiscriminator(**json.loads(case["config"]))
    net.load_state_dict(case["state_dict"], strict=True)
    assert list(net.state_dict()) == list(case["state_dict"])
    x = case["inputs"]["x"].clone().requires_grad_()
    logits = net.train()(x)
    (logits * case["inputs"]["grad_out"]).sum().backward()
    assert_close(logits, case["outputs"]["logits"], gate)
    assert_close(x.grad, case["grads"]["x"], gate)
    assert_norms(net, case["grad_norms"], gate)
    for key, wanted in {**case["buffers_after"], **case.get("state_after", {})}.items():
        assert_close(net.state_dict()[key].float(), wanted.float(), gate, key)
    with torch.no_grad():
        assert_close(net.eval()(case["inputs"]["x"]), case["outputs"]["logits_eval_after"], gate)


def test_the_discriminator_starts_as_the_original(shared):
    golden = golden_file(shared, "nlayer_discriminator")
    state = NLayerDiscriminator().state_dict()
    assert {key: list(v.shape) for key, v in state.items()} == json.loads(golden["manifest_ndf64_n3"])
    for key, (mean, std) in json.loads(golden["init_mean_std_ndf64"]).items():
        if state[key].numel() > 1:
            few = 4 / state[key].numel() ** 0.5  # how far a sample of that size may lie off
            assert state[key].mean().item() == pytest.approx(mean, abs=2 * few * max(std, 1e-3)), key
            assert state[key].std().item() == pytest.approx(std, rel=2 * few, abs=1e-6), key


def test_the_smallest_image_that_a_discriminator_takes():
    for layers in (1, 2, 3):
        net = NLayerDiscriminator(ndf=4, n_layers=layers).eval()
        assert net(torch.zeros(1, 3, net.min_size, net.min_size)).shape == (1, 1, 1, 1)
        with pytest.raises(RuntimeError):
            net(torch.zeros(1, 3, net.min_size - 1, net.min_size - 1))


# ---- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize("make, message", [
    (lambda: VQModel({**TINY, "num_res_block": 1}, 10, 4), "ddconfig: .*'num_res_block'"),
    (lambda: VQModel({**TINY, "ch": "32"}, 10, 4), "ch '32' must be >= 1"),
    (lambda: VQModel({k: v for k, v in TINY.items() if k != "ch"}, 10, 4), "ddconfig: .* 'ch'"),
    (lambda: VQModel({**TINY, "ch": 48}, 10, 4), r"must be a multiple of 32, got \[48\]"),
    (lambda: VQModel({**TINY, "ch_mult": []}, 10, 4), "an entry for each level"),
    (lambda: VQModel({**TINY, "resolution": 15}, 10, 4), "resolution must be a multiple of 2 for 2 levels"),
    (lambda: VQModel({**TINY, "double_z": True}, 10, 4), "double_z must be false"),
    (lambda: VQModel(TINY, 0, 4), "n_embed 0 must be >= 1"),
    (lambda: VQModel(TINY, 10, 0), "embed_dim 0 must be >= 1"),
    (lambda: VQModel(TINY, 10, 4, remap="none.npy"), "remap: none.npy is not a .npy file"),
    (lambda: EMAVQ(TINY, 10, 4, decay=1.0), "decay 1.0 must be >= 0 and < 1"),
    (lambda: EMAVQ(TINY, 10, 4, restart_below=1.0), "restart_below 1.0 must be"),
    (lambda: GumbelVQ(TINY, 10, 4), "embed_dim must equal ddconfig.z_channels = 8, got 4"),
    (lambda: VqVae(**{**SMALL, "num_hiddens": 7}), "num_hiddens must be even"),
    (lambda: VqVae(**{**SMALL, "num_res_hiddens": 0}), "num_res_hiddens 0 must be >= 1"),
    (lambda: VqVae(**{**SMALL, "num_res_blocks": -1}), "num_res_blocks -1 must be >= 0"),
    (lambda: VqVae(**SMALL, restart_below=0.1), "restart_below needs a codebook of moving averages"),
    (lambda: NLayerDiscriminator(n_layers=0), "n_layers 0 must be >= 1"),
    (lambda: FAMILY["VQModel"]()(torch.zeros(1, 3, 15, 16)), "both sides multiples of 2, got"),
    (lambda: FAMILY["VQModel"]()(torch.zeros(1, 1, 16, 16)), r"images must be \(batch, 3, height, width\)"),
    (lambda: FAMILY["VQVAE2"]()(torch.zeros(1, 3, 12, 16)), "multiples of 8"),
    (lambda: FAMILY["VQModel"]().decode_code(torch.zeros(64, dtype=torch.long)), "give flat ones with their shape"),
    (lambda: FAMILY["VQModel"]().decode_code(torch.zeros(64, dtype=torch.long), (1, 8, 9)), "64 codes are not of"),
    (lambda: FAMILY["VQVAE2"]().decode_code((torch.zeros(1, 2, 2),)), "codes must be a pair"),
])
def test_what_fits_nothing_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
