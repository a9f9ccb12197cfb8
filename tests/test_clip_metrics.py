"""Metrics of clips: by frame and by clip in log/test_clips.csv, borders, LPIPS, and what flickers."""

import csv
import io

import pytest
import torch

from log.run_log import RunLog
from metrics.vrt import video_metrics
from models.network_spynet import SpyNet
from options import OptionError
from tests.runs import rows, run, run_until
from tests.test_loss_vq import files  # noqa: F401  the fixture
from tests.test_vrt import frames_in, only_testing
from tests.vrt import vrt_file


def measuring(flow=None, **val):
    """A model that only measures."""
    model = only_testing(**val)
    model.flow = flow
    return model


def measured(model, restored, target, together=True):
    """Metrics of a clip (T,3,H,W), given at once or frame by frame."""
    found = []
    for part in (slice(None),) if together else [slice(t, t + 1) for t in range(len(target))]:
        model.degraded = model.target = target[None, part]
        model.restored = restored[None, part]
        model.metrics()
        found += model.frame_rows
    return found


def panning(bias):
    """SpyNet whose flow is `bias` everywhere."""
    flow = SpyNet()
    flow.basic_module[-1].basic_module[-1].bias.data = torch.tensor(bias)
    return flow.eval()


def test_the_warping_error_is_of_what_flickers_not_of_what_moves():
    still = torch.rand(1, 3, 32, 32).expand(4, -1, -1, -1) * 0.5 + 0.25
    flicker = still + torch.tensor([0.1, -0.1, 0.1, -0.1])[:, None, None, None]
    for together in (True, False):
        found = measured(measuring(panning([0.0, 0.0])), flicker, still, together)
        assert "warp" not in found[0] and [row["warp"] for row in found[1:]] == pytest.approx([40] * 3, rel=0.05)
        assert [row["warp_input"] for row in found[1:]] == [0] * 3
    wide = torch.rand(3, 32, 40)
    pan = torch.stack([wide[..., 2 * t : 2 * t + 32] for t in range(4)])  # pixel p of frame t+1 is p + 2 of frame t
    moving, still = (measured(measuring(panning([dx, 0.0])), pan, pan)[1]["warp"] for dx in (2.0, 0.0))
    assert moving < 1e-3 < 1 < still


def test_borders_are_left_out_of_every_metric():
    target = torch.rand(2, 3, 32, 36)
    restored = target.clone()
    restored[..., 1:-1, 1:-1] += 0.1 * torch.rand(2, 3, 30, 34)
    restored[..., 0, :] = 0
    inner = measured(measuring(crop_border=2), restored, target)
    expected = video_metrics(restored[..., 2:-2, 2:-2], target[..., 2:-2, 2:-2])
    assert {key: sum(row[key] for row in inner) / 2 for key in expected} == pytest.approx(expected, abs=1e-9)
    assert measured(measuring(), restored, target)[0]["psnr"] < inner[0]["psnr"] - 1


def test_lpips_is_reported_where_its_weights_are_given(tmp_path, files):  # noqa: F811
    path = vrt_file(tmp_path, train={"total_iter": 1}, val={"vgg_path": str(files[0]), "lpips_path": str(files[1])})
    assert run("-opt", path) == 0
    (row,) = rows(tmp_path / "run", "test")
    assert float(row["test.lpips"]) > 0 and float(row["test.lpips_bicubic"]) > 0
    with pytest.raises(OptionError, match="lpips_path: .* does not exist"):
        run("-opt", path, "--fresh", "--set", f"val.lpips_path={tmp_path / 'none'}")


def test_warping_errors_of_ones_own_frames_are_of_neighbours_only(tmp_path):
    path = vrt_file(tmp_path, train={"total_iter": 1, "checkpoint_test": 0})
    assert run("-opt", path) == 0
    torch.save(SpyNet().state_dict(), tmp_path / "flow.pth")
    for name, size in (("lq", (16, 16)), ("gt", (64, 64))):
        frames_in(tmp_path, [name], [f"{n}.png" for n in range(4)], size)
    words = ["-opt", path, "--test", "--input", tmp_path / "lq", "--truth", tmp_path / "gt", "--output",
             tmp_path / "out", "--set", f"val.warp_path={tmp_path / 'flow.pth'}"]
    assert run(*words) == 0
    table = tmp_path / "out/metrics.csv"
    whole = list(csv.DictReader(table.open()))
    assert [bool(row["warp"]) for row in whole] == [False, True, True, True] and float(whole[1]["warp"]) > 0
    for name in ("0.png", "2.png", "3.png"):
        (tmp_path / "out" / name).unlink()
    assert run(*words) == 0
    again = list(csv.DictReader(table.open()))
    assert [bool(row["warp"]) for row in again] == [False, True, False, True]  # the frame before 2 was not computed
    assert [again[i] for i in (0, 1, 3)] == [whole[i] for i in (0, 1, 3)]


def test_rows_of_an_iteration_replace_those_of_a_launch_that_was_killed_after_them(tmp_path):
    log = RunLog(io.StringIO())
    log.open(tmp_path, 0)
    for iteration, value in ((1, 0.5), (2, 1.5), (2, 2.5)):
        log.replace_rows("test_clips", iteration, [{"frame": 0, "psnr": value}, {"frame": 1, "psnr": value}])
    found = list(csv.DictReader((tmp_path / "test_clips.csv").open()))
    assert [(row["iteration"], row["psnr"]) for row in found] == [("1", "0.5")] * 2 + [("2", "2.5")] * 2


def test_every_clip_and_frame_has_a_row_once_however_the_validation_is_stopped(tmp_path):
    """Stopped between the rows of an iteration and its checkpoint, the resumed run writes them again, not twice."""
    path = vrt_file(tmp_path, train={"total_iter": 2, "checkpoint_test": 1})
    sets = ["--set", "datasets.test.generated={\"num_clips\": 2, \"num_frame\": 3, \"gt_size\": [32, 32]}"]
    run_until(1, "-opt", path, *sets)
    assert run("-opt", path, *sets) == 0
    found = rows(tmp_path / "run", "test_clips")
    assert [(row["iteration"], row["frame"]) for row in found] == [(n, f) for n in "12" for _ in range(2)
                                                                   for f in ("", "0", "1", "2")]
    clip = [row for row in found if row["iteration"] == "2"][:4]
    assert clip[0]["set"] == "test" and clip[0]["clip"] and len({row["clip"] for row in clip}) == 1
    mean = sum(float(row["psnr"]) for row in clip[1:]) / 3
    assert float(clip[0]["psnr"]) == pytest.approx(mean)
    first, second = (float(row["psnr"]) for row in found[8:] if not row["frame"])
    assert float(rows(tmp_path / "run", "test")[1]["test.psnr"]) == pytest.approx((first + second) / 2)
    run("-opt", path, "--test", *sets)
    with open(tmp_path / "run/images/use_clips.csv", newline="") as file:
        used = list(csv.DictReader(file))
    assert [row["psnr"] for row in used] == [row["psnr"] for row in found[8:]]
