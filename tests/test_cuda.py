"""What only CUDA would show, seen without it: on the meta device, or with the device's own words put in its place."""

import contextlib
import json
import multiprocessing
import os
import runpy
import sys
import threading
import time
import traceback
import types
import weakref
from typing import get_args, get_type_hints

import pytest
import torch
import torch._functorch.config
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils import pin_memory

import checkpoint
import main as door
from benchmarks import common
from commands import dry_run
from data import loader, styles
from data.loader import num_workers
from losses.energy import PatchSlicedWassersteinLoss
from metrics.vqgan import image_metrics
from metrics.vrt import frame_metrics, in_8_bits
from models import model_plain, network_vrt
from models.model_base import ModelBase
from models.model_plain import ModelPlain
from models.model_vqgan import ModelVQGAN
from models.network_vqgan import nearest
from options import OptionError
from runtime import determinism, distributed, resume
from tests import tiny, world
from tests.conftest import OLD_TORCH, ROOT, write_json
from tests.runs import assert_equal_runs, differing, final, rows, run
from tests.vrt import vrt_file

pytestmark = pytest.mark.usefixtures("tiny_tables")
KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def saved_by_others(kind, shape, **changes):
    """The state of an optimizer that is not fused: its `step` lies on the CPU wherever the parameters are."""
    parameter = torch.nn.Parameter(torch.randn(shape))
    optimizer = KINDS[kind]([parameter], lr=0.5)
    parameter.grad = torch.ones(shape)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0] |= changes
    return state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [torch.tensor(1.0), 1], ids=["a tensor", "a number, as of old versions"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_step_count_of_a_foreign_optimizer_lies_where_the_kernel_wants_it(kind, step, fused):
    parameter = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    mine = KINDS[kind]([parameter], lr=0.1)
    mine.param_groups[0] |= {"fused": fused, "initial_lr": 0.1}  # no fused optimizer can be made on meta
    ModelBase.load_optimizer_state(None, mine, saved_by_others(kind, (4, 3), step=step), "other.pth")
    state, (group,) = mine.state[parameter], mine.param_groups
    assert state["step"].device.type == ("meta" if fused else "cpu") and state["step"].dtype == torch.float32
    assert state["exp_avg"].device.type == "meta"
    assert (group["lr"], group["fused"]) == (0.1, fused)  # what the options say


@pytest.mark.parametrize("model", [ModelPlain, ModelVQGAN], ids=lambda kind: kind.__name__)
def test_these_are_all_optimizers_that_are_offered(model):
    assert get_args(get_type_hints(model.TrainOptions)["G_optimizer_type"]) == tuple(KINDS)


def cuda_here(monkeypatch, count=2):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_saved_options_hold_what_the_user_said_of_the_device(tmp_path, monkeypatch):
    """Else a resume from a checkpoint alone would put every process on one card, or stay on the CPU."""
    tree = tiny.options(tmp_path, "run", train={"total_iter": 2}, device="auto")
    assert run("-opt", write_json(tmp_path / "run.json", tree)) == 0
    state = checkpoint.find_newest(tmp_path / "run/models").load()["state"]
    (written,) = (tmp_path / "run/options").iterdir()
    assert state["config"]["device"] == json.loads(written.read_text())["device"] == "auto"
    assert state["environment"]["device"] == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "1")
    cuda_here(monkeypatch)
    resumed = door.saved_options(str(tmp_path / "run/models/2.json"))
    assert distributed.device_for(resumed) == torch.device("cuda:1")


@pytest.mark.parametrize("device, gpu_ids, rank, wanted", [
    ("auto", None, 0, "cuda:0"), ("cuda", None, 1, "cuda:1"), ("cuda", [3, 2], 1, "cuda:2"),
    ("cuda:1", None, 0, "cuda:1"), ("cpu", None, 1, "cpu")])
def test_each_process_has_its_device(monkeypatch, device, gpu_ids, rank, wanted):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    cuda_here(monkeypatch)
    opt = {"device": device, "gpu_ids": gpu_ids}
    assert str(distributed.device_for(opt)) == wanted and opt == {"device": device, "gpu_ids": gpu_ids}


def test_kernels_are_timed_in_training_only(tmp_path, monkeypatch):
    """A validation's shapes differ from clip to clip: each would be timed again."""
    seen = {"step": set(), "test": set()}
    step, test = ModelPlain.optimize_parameters, ModelPlain.test
    monkeypatch.setattr(ModelPlain, "optimize_parameters", lambda self, n: (
        seen["step"].add(torch.backends.cudnn.benchmark), step(self, n)))
    monkeypatch.setattr(ModelPlain, "test", lambda self: (
        seen["test"].add(torch.backends.cudnn.benchmark), test(self)))
    assert run("-opt", tiny.write(tmp_path)) == 0
    assert seen == {"step": {True}, "test": {False}} and not torch.backends.cudnn.benchmark
    seen["step"].clear()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert run("-opt", tiny.write(tmp_path), "--fresh") == 0
    assert seen["step"] == {False}


def test_the_start_says_that_cuda_without_deterministic_is_not_exact(tmp_path, monkeypatch, capsys):
    real = resume.banner

    def on_cuda(run, *args):
        before, run.model.device = run.model.device, torch.device("cuda:0")
        real(run, *args)
        run.model.device = before

    monkeypatch.setattr(resume, "banner", on_cuda)
    path = tiny.write(tmp_path, train={"total_iter": 1})
    try:
        for value in ("false", "true"):
            assert run("-opt", path, "--fresh", "--set", f"deterministic={value}") == 0
            assert ("bit for bit only with deterministic" in capsys.readouterr().out) == (value == "false")
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_cards_are_hidden_from_tests_unless_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for asked, wanted in (("", ""), ("1", "0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        monkeypatch.setenv("PERDURE_TEST_CUDA", asked)
        runpy.run_path(str(ROOT / "tests/conftest.py"))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == wanted


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
                                   RuntimeError("CUDA out of memory. Tried to allocate 2 MiB"),  # torchvision 0.29
                                   RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), RuntimeError("can't allocate memory")])
def test_out_of_memory_in_a_step_is_one_line_and_costs_no_step(tmp_path, monkeypatch, error):
    def full(self, step):
        raise error

    one, two = (tiny.write(tmp_path, name, train={"total_iter": 6}) for name in ("one", "two"))
    with monkeypatch.context() as patch, pytest.raises(OptionError, match="^out of memory: .* has no checkpoint yet"):
        run("-opt", one, hooks=[tiny.At("before_step", 1, lambda run: patch.setattr(ModelPlain, "losses", full))])
    told = pytest.raises(OptionError, match="^out of memory: .*train.accumulate.* the last checkpoint is intact")
    with monkeypatch.context() as patch, told as line:
        run("-opt", one, hooks=[tiny.At("before_step", 6, lambda run: patch.setattr(ModelPlain, "losses", full))])
    assert "\n" not in str(line.value) and checkpoint.find_newest(tmp_path / "one/models").iteration == 5
    assert run("-opt", one) == 0 and run("-opt", two) == 0
    assert_equal_runs(tmp_path / "one", tmp_path / "two", 6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_whose_backward_pass_fails_leaves_no_trace(tmp_path, monkeypatch, accumulate):
    """Batch norm's statistics have moved by then, those of the first micro-batch as well."""
    def broken(self, loss, parameters=None):
        self.left -= 1
        if not self.left:
            raise RuntimeError("out of order")
        real(self, loss, parameters)

    def arm(run):
        run.model.left = accumulate
        monkeypatch.setattr(ModelPlain, "backward", broken)

    real = ModelPlain.backward
    train = {"total_iter": 5, "checkpoint_test": 5, "accumulate": accumulate}
    one, two = (tiny.write(tmp_path, name, train=train) for name in ("one", "two"))
    with pytest.raises(RuntimeError, match="^out of order"):
        run("-opt", one, hooks=[tiny.At("before_step", 4, arm)])
    monkeypatch.setattr(ModelPlain, "backward", real)
    assert run("-opt", two, hooks=[tiny.stop_after(3)]) == 143
    assert differing(*(final(tmp_path / name, 3) for name in ("one", "two"))) == []
    assert run("-opt", two) == 0
    assert run("-opt", one) == 0
    assert_equal_runs(tmp_path / "one", tmp_path / "two", 5)


def test_another_error_in_a_step_is_no_lack_of_memory(tmp_path, monkeypatch):
    def broken(self, step):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(ModelPlain, "losses", broken)
    with pytest.raises(RuntimeError, match="^mat1"):
        run("-opt", tiny.write(tmp_path))


def test_a_validation_that_fills_the_card_lets_it_go_before_the_save(tmp_path, monkeypatch):
    class Activations:
        pass

    def full(self):
        held = Activations()
        alive.append(weakref.ref(held))
        raise torch.OutOfMemoryError("CUDA out of memory")

    alive = []
    monkeypatch.setattr(ModelPlain, "test", full)
    saved = tiny.At("before_save", 3, lambda run: alive.append(alive[0]()))
    with pytest.raises(OptionError, match="out of memory"):
        run("-opt", tiny.write(tmp_path, train={"checkpoint_save": 100}), hooks=[saved])
    assert alive[1:] == [None]


def test_what_compares_close_values_computes_in_full_float32(monkeypatch):
    """TF32 keeps 10 bits: codes and projections that lie close together would change places."""
    seen = []

    def watch(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (seen.append(precision()), real(*args, **kwargs))[1])

    def precision():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    watch(torch, "addmm")
    watch(torch.nn.functional, "conv2d")
    torch.set_float32_matmul_precision("high")
    try:
        before = precision()
        nearest(torch.randn(5, 4), torch.randn(7, 4))
        PatchSlicedWassersteinLoss()(*torch.randn(2, 2, 4, 8, 8))
        monkeypatch.setattr(model_plain, "imresize", lambda *args: seen.append(precision()))
        model = types.SimpleNamespace(degraded=torch.rand(1, 3, 4, 4), target=torch.rand(1, 3, 8, 8), opt={"scale": 2})
        ModelPlain.baseline(model)
        assert seen == [("highest", False)] * 4 and precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_tf32_is_not_tied_to_deterministic(monkeypatch, tmp_path):
    """It repeats itself, and without it a deterministic step of large matrix products takes several times as long."""
    cuda_here(monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    opt = {"num_threads": 1, "device": "cuda", "gpu_ids": None, "deterministic": True,
           "train": {"manual_seed": 0}}
    try:
        determinism.prepare_machine(opt)
        assert torch.get_float32_matmul_precision() == "high" and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


def test_a_resume_says_which_of_cuda_cudnn_and_driver_changed(tmp_path, monkeypatch, capsys):
    path, found = tiny.write(tmp_path, train={"total_iter": 2}, device="cpu"), []
    for cudnn, driver in ((91900, "Kernel Module  535.104.05  Sat Aug 19\nGCC 12.3.0"), (92000, "x86_64  580.65.06")):
        with monkeypatch.context() as patch:
            cuda_here(patch)
            patch.setattr(torch.cuda, "get_device_name", lambda: "a card")
            patch.setattr(torch.version, "cuda", "13.0")
            patch.setattr(torch.backends.cudnn, "version", lambda cudnn=cudnn: cudnn)
            patch.setattr(determinism, "DRIVER", tmp_path / "version")
            determinism.DRIVER.write_text(f"NVRM version: NVIDIA UNIX {driver}\n")
            found.append(determinism.environment())
    assert [found[0][key] for key in ("cuda_version", "cudnn", "driver")] == ["13.0", 91900, "535.104.05"]
    for count, environment in enumerate(found, start=2):
        monkeypatch.setattr(determinism, "environment", lambda environment=environment: environment)
        assert run("-opt", path, "--set", f"train.total_iter={count}") == 0
    said = capsys.readouterr().out
    assert "cudnn 91900 -> 92000, driver 535.104.05 -> 580.65.06" in said and "cuda_version" not in said


@pytest.mark.parametrize("cores, ranks, cuda, wanted", [(16, 1, True, 8), (16, 4, True, 3), (2, 1, True, 1),
                                                        (8, 8, True, 0), (4, 8, True, 0), (16, 1, False, 0)])
def test_the_number_of_workers_follows_from_the_cores_of_each_process(monkeypatch, cores, ranks, cuda, wanted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert num_workers("auto", cuda) == wanted and num_workers(3, cuda) == 3


def test_a_run_has_as_many_workers_as_auto_says_with_equal_results(tmp_path, monkeypatch):
    one, two = (tiny.write(tmp_path, name, workers=count, train={"total_iter": 4})
                for name, count in (("one", 0), ("two", "auto")))
    counts = []
    for path in (one, two):
        with monkeypatch.context() as patch:
            patch.setattr(loader, "num_workers", lambda wanted, cuda: 2 if wanted == "auto" else wanted)
            assert run("-opt", path, hooks=[tiny.At("after_step", 2, lambda run: counts.append(
                len(multiprocessing.active_children())))]) == 0
    assert counts == [0, 2]
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


class Codec(torch.nn.Module):
    """Stands for a codec with weights."""

    fingerprint, factor, channels = "weights", 4, 3

    def __init__(self):
        super().__init__()
        self.seen, self.moves = [], []

    def to(self, device):
        self.moves.append(device.type)

    def encode(self, images):
        self.seen.append(images.device.type)
        return torch.zeros(1, 3, 4, 4)


def test_pictures_are_encoded_on_the_device_before_workers_start(tmp_path, monkeypatch):
    codec = Codec()
    monkeypatch.setattr(styles, "shared_codec", lambda section: codec)
    data = styles.StyleDataset(image_size=16, generated={"num_images": 3})
    data.encode_on(torch.device("meta"))  # stands for a card
    assert codec.seen == ["meta"] * 3 * len(data.styles) and codec.moves == ["meta", "cpu"]
    assert data[0, 0]["source"].shape == (3, 4, 4) and len(codec.seen) == 3 * len(data.styles)
    monkeypatch.setattr(styles, "MOST_KEPT", 100)  # nothing is kept, so that nothing is encoded in vain
    data = styles.StyleDataset(image_size=16, generated={"num_images": 3})
    data.encode_on(torch.device("meta"))
    assert len(codec.seen) == 3 * len(data.styles) + 1


def test_every_process_encodes_the_same_pictures_on_its_card(monkeypatch):
    """Latents from a card differ in the last bits from those that workers encode where not all can be kept."""
    monkeypatch.setattr(styles, "shared_codec", lambda section: Codec())
    monkeypatch.setattr(styles, "MOST_KEPT", 200)  # one latent
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    kept = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        data = styles.StyleDataset(image_size=16, generated={"num_images": 3})
        data.encode_on(torch.device("meta"))
        kept.append(list(data.latents.kept))
    assert kept[0] == kept[1] and len(kept[0]) == 1


def test_a_run_encodes_its_pictures_where_it_trains(tmp_path, monkeypatch):
    seen = []
    for kind in (styles.StyleDataset, styles.StyleTestDataset):
        monkeypatch.setattr(kind, "encode_on", lambda self, device: seen.append(device.type))
    common.build_run(common.read_options(str(world.recipe("lgt", tmp_path, "run")), {}))
    assert seen == ["cpu", "cpu"]


# ---------------------------------------------------------------- validation


@OLD_TORCH
def test_metrics_are_computed_on_the_device(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "item", lambda self: self.device.type)
    with FakeTensorMode():
        pair = torch.empty(2, 2, 3, 16, 16, device="cuda")
        assert set(image_metrics(*pair).values()) == {"cuda"}
        assert {column.device.type for column in frame_metrics(*map(in_8_bits, pair)).values()} == {"cuda"}


@pytest.mark.parametrize("lazy", [False, True])
def test_the_metrics_of_the_baseline_are_computed_once_in_a_run(tmp_path, monkeypatch, lazy):
    """It is as good in each validation, and takes as long to compare as what the network restored."""
    if lazy:  # clips of 2 frames
        path = vrt_file(tmp_path, train={"total_iter": 4, "checkpoint_test": 2})
    else:
        path = tiny.write(tmp_path, train={"total_iter": 4, "checkpoint_test": 2})
    calls, real = [], model_plain.frame_metrics
    monkeypatch.setattr(model_plain, "frame_metrics", lambda *clips: (calls.append(1), real(*clips))[1])
    hooks = [tiny.At("before_training", 0, lambda run: calls.clear())]
    assert run("-opt", path, hooks=hooks) == 0
    first, second = rows(tmp_path / "run", "test")
    assert len(calls) == 2 + 2 + 2  # of 2 samples or frames: the baseline, and two validations
    name = "psnr_bicubic" if lazy else "psnr_input"
    assert first[f"test.{name}"] == second[f"test.{name}"] and first["test.psnr"] != second["test.psnr"]


def test_a_dry_run_does_not_add_the_memory_of_steps_to_that_of_a_validation(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty the cache"))
    monkeypatch.setattr(dry_run, "clips_of", lambda dataset: iter(dataset))
    model = types.SimpleNamespace(device=torch.device("cuda"), validate=lambda sample: calls.append(sample) or {})
    dry_run.Trial(types.SimpleNamespace(opt={}, model=model, test_sets={"test": ["sample"]})).validate("test")
    assert calls == ["empty the cache", "sample"]


# ---------------------------------------------------------------- waiting for the device


class Waits(TorchDispatchMode):
    """Collects copies and indices that let the CPU wait for the device. The meta device itself rejects `.item()`,
    `.tolist()`, `bool(tensor)`, `nonzero` and copies to the CPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        if name == "_to_copy.default":
            waits = kwargs.get("device", args[0].device) != args[0].device and not kwargs.get("non_blocking")
        elif name == "copy_.default":
            waits = args[0].device != args[1].device and not (args[2:3] or (False,))[0]
        else:
            waits = name.startswith("index") and any(isinstance(index, torch.Tensor) and index.device != args[0].device
                                                     for index in pytree.tree_leaves(args[1:]))
        if waits:
            ours = [str(frame) for frame in traceback.extract_stack() if str(ROOT) in frame.filename]
            self.seen.append((name, ours[-2]))
        return func(*args, **kwargs)


@pytest.fixture
def on_meta(tmp_path, monkeypatch):
    """Builds a small run of a recipe on the meta device; returns it with its batches."""
    for name in ("Adam", "AdamW"):  # no fused optimizer can be made there
        real = getattr(torch.optim, name)
        monkeypatch.setattr(torch.optim, name, lambda *args, real=real, fused, **how: real(*args, **how))
    monkeypatch.setattr(torch, "autocast", lambda *args, **how: contextlib.nullcontext())
    with contextlib.ExitStack() as stack:
        def build(kind, **changes):
            small = {"datasets.train.dataloader_batch_size": 4, "device": "meta", **changes}
            opt = common.read_options(str(world.recipe(kind, tmp_path, "run")), small)
            run = common.build_run(opt)
            return run, stack.enter_context(common.batches_of(run))

        yield build


RECIPES = {**dict.fromkeys(world.RECIPES, {}), "vqgan": {
    "netG.net_type": "emavq", "train.lossconfig.use_actnorm": True, "train.lossconfig.disc_start": 1,
    "train.disc_every": 1, "train.accumulate": 2}, "vrt": {
    "datasets.train.dataloader_batch_size": 1}}


@pytest.mark.parametrize("kind", RECIPES)
def test_no_step_waits_for_the_device(on_meta, kind):
    run, batches = on_meta(kind, **RECIPES[kind])
    for module in getattr(run.model, "act_norms", ()):
        module.surely = True  # as after the first step of the discriminator, which asks
    data = next(batches)
    with Waits() as waits:
        run.model.feed_data(data)
        run.model.update_learning_rate(0)
        run.model.optimize_parameters(1)
    assert not waits.seen


def test_act_norm_asks_the_device_until_the_first_step_of_the_discriminator(tmp_path):
    def flags(run):
        seen.append([module.surely for module in run.model.act_norms])

    steps = {"checkpoint_test": 9, "total_iter": 4, "lossconfig": {"use_actnorm": True}}
    seen, path = [], world.recipe("vqgan", tmp_path, "run", train=steps)
    looks = [tiny.At(event, step, flags) for event, step in (("before_step", 2), ("after_step", 2), ("after_step", 3))]
    assert run("-opt", path, hooks=[*looks, tiny.stop_after(2)]) == 143
    assert run("-opt", path, hooks=[tiny.At("before_step", 3, flags)]) == 0  # resumed
    assert seen == [[False], [True], [True]]


@pytest.mark.parametrize("kind", world.RECIPES)
def test_what_a_step_computed_is_not_held_by_the_model(tmp_path, kind):
    """A step that is skipped, or that raises, has no backward pass, which would let go of the activations."""
    run = common.build_run(common.read_options(str(world.recipe(kind, tmp_path, "run")), {}))
    with common.batches_of(run) as batches:
        run.model.feed_data(next(batches))
    run.model.update_learning_rate(0)
    run.model.begin_step(1)
    run.model.losses(1)
    held = [name for name, value in vars(run.model).items() if isinstance(value, torch.Tensor) and value.grad_fn]
    assert not held


def test_copies_of_what_the_first_batch_sets_grow_no_graph(tmp_path):
    steps = {"total_iter": 2, "lossconfig": {"use_actnorm": True}}
    seen, path = [], world.recipe("vqgan", tmp_path, "run", train=steps)
    looks = [tiny.At("after_step", step, lambda run: seen.extend(run.model.moving[1])) for step in (1, 2)]
    assert run("-opt", path, hooks=looks) == 0
    assert any(copy.shape == (1, 64, 1, 1) or copy.ndim == 4 for copy in seen)  # those of ActNorm are among them
    assert not any(copy.requires_grad for copy in seen)


def test_a_recipe_sends_from_pinned_memory_to_a_card():
    """Copies of pageable memory above 64 KB wait for the card, which no debugging mode of torch reports."""
    calls, card = [], types.SimpleNamespace(type="cuda")
    tensor = types.SimpleNamespace(nbytes=100, pin_memory=lambda: (calls.append("pin"), tensor)[1],
                                   to=lambda device, non_blocking: calls.append((device, non_blocking)))
    ModelPlain.move(types.SimpleNamespace(device=card), tensor)
    tensor.nbytes = 1 << 30  # a clip of a validation: the memory would stay pinned
    ModelPlain.move(types.SimpleNamespace(device=card), tensor)
    assert calls == ["pin", (card, True), (card, True)]
    for path in (ROOT / "models").glob("model_*.py"):
        assert "non_blocking" not in path.read_text(), f"{path.name}: use move()"


class Spin(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, key):
        end = time.perf_counter() + 0.003
        while time.perf_counter() < end:
            pass
        return {"L": torch.rand(3, 64, 64), "H": torch.rand(3, 64, 64)}


def test_the_thread_that_pins_batches_ends_before_the_workers_that_it_reads_from(monkeypatch):
    """It exists only for a card. When it reads from a killed worker, it dies with a traceback."""
    for name, value in {"is_available": True, "current_accelerator": torch.device("cuda"), "current_device_index": 0,
                        "set_device_index": None}.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *args, value=value: value)
    monkeypatch.setattr(pin_memory, "pin_memory", lambda data, device=None: data)
    failures = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    for number in range(1, 9):
        batches = loader.endless(Spin(), [[(0, j), (0, j + 1)] for j in range(300)], 2, True)
        assert batches.loader._pin_memory_thread.is_alive()
        for _ in range(number):
            next(batches)
        batches.close()
        assert not batches.loader._pin_memory_thread.is_alive()
    assert not failures


# ---------------------------------------------------------------- compilation


@OLD_TORCH
def test_a_compiled_network_trains_on_when_the_discriminator_starts(tmp_path, monkeypatch):
    """Until then its backward pass reuses activations; the adaptive weight needs them three times."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda net, real=torch.compile: real(net, backend="aot_eager"))
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    path = world.recipe("vqgan", tmp_path, "run", train={"total_iter": 3, "compile": True,
                                                         "lossconfig": {"disc_start": 2}})
    assert run("-opt", path) == 0


@pytest.mark.parametrize("kind, changes", [
    ("vqvae", {"netG.net_type": "vqvae2"}), ("segmentation", {}),
    *(pytest.param(kind, changes, marks=pytest.mark.slow) for kind, changes in (
        ("vqgan", {"netG.net_type": "emavq"}), ("lgt", {}), ("vrt", {}), ("inktrace", {}), ("inktrace dense", {})))])
def test_a_forward_pass_is_one_graph(tmp_path, monkeypatch, kind, changes):
    """Each break lets Python run between two graphs, and costs what compilation wins."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: real(net, backend="eager", fullgraph=True))
    monkeypatch.setattr(network_vrt, "fused", lambda x: True)  # as on CUDA
    changes = {"datasets.train.dataloader_batch_size": 2, "train.compile": True, "train.amp": "bf16", **changes}
    run = common.build_run(common.read_options(str(world.recipe(kind, tmp_path, "run")), changes))
    with common.batches_of(run) as batches:
        run.model.feed_data(next(batches))
    torch._dynamo.reset()
    run.model.begin_step(1)
    run.model.losses(1)  # raises where the graph breaks
    for counts in getattr(run.model.netG, "take_counts", list)():
        assert counts[:, 0].sum() > 0  # what compiled code leaves for the codebook
