"""The report of a run: the page has the run's own values, works from a file, and is never half written."""

import csv
import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import report
from log.pictures import save_pictures
from log.run_log import RunLog
from models.model_base import ModelBase
from report.facts import PICTURE_BYTES, RunFolder, Table, curve, data_uri
from storage.files import FolderLock, is_locked
from tests import tiny
from tests.browser import Browser
from tests.conftest import ROOT, write_json
from tests.runs import rows, run, run_until

HOSTILE = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 2'>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile"), seconds=120) as opened:
        yield opened


def facts_in(page):
    """The facts that a page carries; the page is whole."""
    text = Path(page).read_text()
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n")
    return json.loads(re.search(r'<script type="application/json" id="facts">(.*?)</script>', text, re.DOTALL)[1])


def resumed_run(tmp_path, name="one", step=5, **train):
    """A tiny run that was stopped by a signal once and resumed. Returns its folder."""
    path = tiny.write(tmp_path, name, val={"save_img": True}, train=train)
    run_until(step, "-opt", path)
    states = facts_in(tmp_path / name / "log/report.html")["runs"][0]
    assert (states["state"], states["reason"], states["iteration"]) == ("interrupted", "by SIGTERM", step)
    assert run("-opt", path, "--set", "train.total_iter=9") == 0
    return tmp_path / name


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        tiny.add_rows(patch)
        yield resumed_run(tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    return written_run(tmp_path_factory.mktemp("long") / "long", 100_000)


def written_run(folder, rows, **status):
    """A folder with what a run of that many rows leaves in its log, without training."""
    log = folder / "log"
    log.mkdir(parents=True)
    draw = random.Random(0)
    with open(log / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "epoch", "lr", "G_loss", "a_loss", "b_loss", "c_loss"])
        for i in range(1, rows + 1):
            loss = [math.exp(-i / rows) + 0.3 * draw.random() for _ in range(4)]
            writer.writerow([i, i // 100, 1e-3 * (1 - i / rows), 77.7 if i == rows // 3 else loss[0], *loss[1:]])
    (log / "test.csv").write_text("iteration,test.psnr\r\n" + "".join(f"{i},{20 + i / rows}\r\n"
                                                                     for i in range(rows // 10, rows + 1, rows // 10)))
    report.replace(log / "status.json", json.dumps(
        {"version": 1, "state": "finished", "launches": [{"iteration": 0, "began": 1.0}], "task": folder.name,
         "iteration": rows, "total": rows, "metric": ["psnr", "max"], "command": "python main.py", **status}))
    return folder


# ---------------------------------------------------------------- what is read


def test_a_thinned_curve_keeps_every_spike_and_only_real_rows():
    rng = np.random.default_rng(0)
    x, y = np.arange(1.0, 100_001), rng.random(100_000)
    y[12_345], y[77_777], y[5], y[50_000] = 9.0, -9.0, np.nan, np.inf
    found = curve(x, y)
    assert len(found["x"]) <= 2010 and found["rows"] == 99_999 and found["broken"] == 1
    assert found["high"] == [12_346, 9.0] and found["low"] == [77_778, -9.0]
    drawn = dict(zip(found["x"], found["y"]))
    assert drawn[12_346] == 9.0 and drawn[77_778] == -9.0 and drawn[50_001] is None and 6 not in drawn
    assert all(value == y[at - 1] for at, value in drawn.items() if value is not None)
    for start in range(0, 99_000, 1000):  # no stretch loses its extremes
        part = [v for at, v in drawn.items() if start < at <= start + 1000 and v is not None]
        seen = y[start : start + 1000][np.isfinite(y[start : start + 1000])]
        assert max(part) == seen.max() and min(part) == seen.min()
    assert np.mean(found["mean"]["y"]) == pytest.approx(y[np.isfinite(y)].mean(), abs=1e-3)


def test_a_short_curve_is_taken_as_it_is():
    found = curve(np.array([1.0, 2, 3, 4]), np.array([0.5, np.nan, np.inf, 0.1]))
    assert (found["x"], found["y"], "mean" in found) == ([1, 3, 4], [0.5, None, 0.1], False)


def test_a_table_reads_only_new_rows_unless_it_was_rewritten(tmp_path):
    log, table = RunLog(), Table(tmp_path / "train.csv")
    assert table.read() == {}
    log.open(tmp_path, 0)
    log.row("train", {"iteration": 1, "loss": 0.1 + 0.2})
    assert table.read()["loss"].tolist() == [0.1 + 0.2]
    with open(table.path, "a") as file:
        file.write("2,0.2")  # under way
    assert len(table.read()["loss"]) == 1
    with open(table.path, "a") as file:
        file.write("5\r\n3,nan\r\n")
    assert table.read()["loss"].tolist() == [0.1 + 0.2, 0.25, math.inf]
    log.row("train", {"iteration": 4, "loss": 1.0, "more": 2.0})
    assert np.isnan(table.read()["more"][:3]).all() and table.read()["more"][3] == 2.0
    log.close()
    RunLog().open(tmp_path, 1)  # resumed from iteration 1
    assert table.read()["loss"].tolist() == [0.1 + 0.2]


def test_pictures_stay_within_their_bounds(tmp_path):
    for iteration in range(1, 31):
        for clip in range(6 if iteration > 27 else 1):
            save_pictures(tmp_path / f"images/{iteration:06d}_test_{clip}.png", [torch.zeros(3, 8, 8)])
    found = RunFolder(tmp_path).pictures(iteration=28)  # 29 and 30 are of a run that was put away
    assert [p["when"] for p in found] == [f"iteration {i}" for i in range(9, 29)]
    assert [p["name"] for p in found[-1]["shown"]] == [f"test_{i}" for i in range(4)] and found[-1]["more"] == 2
    save_pictures(tmp_path / "images/000028_test_0.png", list(torch.rand(3, 3, 200, 700)))
    assert (tmp_path / "images/000028_test_0.png").stat().st_size > 1_000_000 > len(data_uri(
        tmp_path / "images/000028_test_0.png"))
    (tmp_path / "images/000028_test_1.png").write_bytes(b"no picture" * 20_000)
    run = RunFolder(tmp_path)
    assert [p["name"] for p in run.pictures(28)[-1]["shown"]] == ["test_0", "test_2", "test_3"]
    for key in run.shown:
        run.shown[key] = "data:," + "x" * (PICTURE_BYTES // 8)  # as if each were large: the newest are kept
    found = run.pictures(28)
    assert found[-1]["when"] == "iteration 28" and len(found) == 8  # 3 pictures and 7 times one


def test_a_page_is_not_written_to_a_folder(tmp_path, capsys):
    folder = written_run(tmp_path / "old", 100)
    assert report.main([str(folder), "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}: is a folder; name a file, e.g. {tmp_path}/report.html\n" in capsys.readouterr().err


def test_a_folder_without_its_status_still_has_its_curves(tmp_path):
    folder = written_run(tmp_path / "old", 100)
    (folder / "log/status.json").unlink()
    found = report.read(folder)
    assert (found["state"], found["iteration"], found["launches"]) == ("unknown", 100, [])
    assert found["curves"]["train"]["G_loss"]["rows"] == 100


# ---------------------------------------------------------------- a run writes it


@pytest.mark.usefixtures("tiny_tables")
def test_status_tells_how_a_run_ended_and_what_was_set(tmp_path, monkeypatch):
    written, real = [], report.RunReport.write
    monkeypatch.setattr(report.RunReport, "write", lambda self: real(self) or written.append(self.now()["iteration"]))
    folder = resumed_run(tmp_path)
    assert written == [0, 3, 5, 5, 6, 9, 9]  # at the start, each validation and the end of both launches
    (found,) = facts_in(folder / "log/report.html")["runs"]
    assert (found["state"], found["iteration"], found["total"]) == ("finished", 9, 9)
    assert [(one["iteration"], one["state"], one["until"]) for one in found["launches"]] == [
        (0, "interrupted", 5), (5, "finished", 9)]
    assert found["command"].startswith("python main.py -opt") and "--set train.total_iter=9" in found["command"]
    origins = {key: origin for key, _, origin in found["options"]}
    assert origins["train.total_iter"] == "--set" and origins["train.E_decay"].endswith("one.json")
    assert origins["n_channels"] is None and found["machine"]["torch"] == str(torch.__version__)
    assert {2, 4, 6, 8, 9} <= {c["iteration"] for c in found["checkpoints"]} <= {2, 3, 4, 6, 8, 9}
    assert all(c["checked"] and not c["fault"] for c in found["checkpoints"])
    assert [c["iteration"] for c in found["checkpoints"] if c["best"]] == [found["best"]["iteration"]]

    victim = folder / "models/9_G.pth"
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    victim.write_bytes(damaged)
    assert "9_G.pth" in report.read(folder)["checkpoints"][0]["fault"]

    def fails(self, step):
        raise RuntimeError("the card\nis gone")

    monkeypatch.setattr(ModelBase, "update_learning_rate", lambda self, step: fails(self, step) if step == 8 else None)
    with pytest.raises(RuntimeError):
        run("-opt", tmp_path / "one.json", "--resume", folder / "models/6.json", "--set", "train.total_iter=9")
    (found,) = facts_in(folder / "log/report.html")["runs"]
    assert (found["state"], found["reason"]) == ("failed", "RuntimeError: the card")
    assert [one["iteration"] for one in found["launches"]] == [0, 5, 6] and found["archives"]


@pytest.mark.usefixtures("tiny_tables")
def test_a_report_that_cannot_be_written_stops_no_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "one/log/report.html").mkdir(parents=True)  # nothing can be renamed to it
    assert run("-opt", tiny.write(tmp_path, "one")) == 0
    said = capsys.readouterr().out
    assert said.count("warning  the report was not written: IsADirectoryError") == 1 and "finished 9" in said
    assert not (tmp_path / "one/log/report.html.tmp").exists()


def test_a_killed_run_is_not_shown_as_running(tmp_path):
    (tmp_path / "models").mkdir()
    ready, says = os.pipe()
    child = os.fork()
    if not child:
        lock = FolderLock(tmp_path)
        (tmp_path / "log").mkdir()
        with report.RunReport(tmp_path, tmp_path / "models", print, lambda: {"iteration": 7, "baseline": ""}, total=9):
            os.write(says, b".")
            time.sleep(60)
        lock.close()
        os._exit(0)
    try:
        os.read(ready, 1)
        assert is_locked(tmp_path) and report.read(tmp_path)["state"] == "running"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = report.read(tmp_path)
    assert found["state"] == "killed" and found["reason"] == f"process {child} ended without recording why"
    with report.RunReport(tmp_path, tmp_path / "models", print, lambda: {"iteration": 7, "baseline": ""}) as after:
        assert after.status["launches"][0]["state"] == "killed" and after.status["launches"][0]["until"] == 7


def test_killed_while_writing_leaves_the_old_page_or_the_new(tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    facts = RunFolder(written_run(tmp_path / "run", 300)).facts()
    report.write_page(page, [{**facts, "mark": 0}])

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_halfway(path, text, **settings):
        path.write_bytes(text.encode()[: len(text) // 2])
        die()

    for mark, (owner, name, deadly) in enumerate([(Path, "write_text", die_halfway), (os, "replace", die)], 1):
        child = os.fork()
        if not child:
            monkeypatch.setattr(owner, name, deadly)
            report.write_page(page, [{**facts, "mark": mark}])
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert facts_in(page)["runs"][0]["mark"] == 0
    report.write_page(page, [{**facts, "mark": 3}])
    assert facts_in(page)["runs"][0]["mark"] == 3 and sorted(os.listdir(tmp_path)) == ["report.html", "run"]


def test_an_update_after_100_000_rows_reads_only_the_new_one(tmp_path, long_run):
    run = RunFolder(shutil.copytree(long_run, tmp_path / "long"))
    run.facts()
    with open(run.log / "train.csv", "r+b") as file:
        file.readline()
        file.write(b"9")  # an earlier row, which is not read again
        file.seek(0, os.SEEK_END)
        file.write(b"100001,1,0.001,0.5,0.5,0.5,0.5\r\n")
    report.write_page(tmp_path / "report.html", [run.facts()])
    iterations = run.tables["train"].read()["iteration"]
    assert (iterations[0], iterations[-1], len(iterations)) == (1, 100_001, 100_001)
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_stages_count_as_runs_of_their_own(tmp_path):
    for name, when in (("dense", "260102_000000"), ("structural", "260101_000000")):
        (written_run(tmp_path / "run" / name, 10) / "options").mkdir()
        write_json(tmp_path / f"run/{name}/options/x_{when}.json", {})
    assert report.main([str(tmp_path / "run"), "--out", str(tmp_path / "both.html")]) == 0
    assert [one["task"] for one in facts_in(tmp_path / "both.html")["runs"]] == ["structural", "dense"]


def test_the_command_reports_a_folder_that_is_not_a_run(tmp_path, capsys):
    assert report.main([str(tmp_path / "none")]) == 2
    assert "is not a run's folder" in capsys.readouterr().err


# ---------------------------------------------------------------- a browser opens it


def values_of(browser, chart, keys=("Home", *["ArrowRight"] * 99)):
    """What a chart's cursor tells at each place that keys lead it to: {iteration: [value of each curve]}."""
    return dict(browser.run("""((name, keys) => {
      const figure = document.querySelector(`[data-chart="${name}"]`), plot = figure.querySelector(".plot");
      plot.focus();
      const found = keys.map(key => {
        plot.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        const values = [...figure.querySelectorAll("[data-value]")].map(b => b.dataset.value);
        return [plot.getAttribute("aria-valuenow"), values];
      });
      plot.blur();
      return found;
    })""" + f"({json.dumps(chart)}, {json.dumps(keys)})"))


# The contrast of each text with the ground below it, of all text that is seen.
CONTRAST = """(() => {
  const shade = c => c.match(/[\\d.]+/g).map(Number), parts = [0.2126, 0.7152, 0.0722];
  const light = c => shade(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * parts[i], 0);
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c !== "transparent" && shade(c)[3] !== 0) return c; } return "rgb(255,255,255)"; };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), e = walk.currentNode.parentElement;
    if (!text || !e.getClientRects().length || e.closest("script, noscript")) continue;
    const style = getComputedStyle(e), colour = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [light(colour), light(ground(e))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
})()"""


def test_a_runs_page_has_the_values_of_its_files(browser, resumed):
    folder = resumed
    browser.open(folder / "log/report.html")
    train, test = rows(folder, "train"), rows(folder, "test")
    assert values_of(browser, "G_loss") == {row["iteration"]: [row["G_loss"]] for row in train} and len(train) == 9
    rates = values_of(browser, "learning rate")
    assert {at: float(rate) for at, (rate,) in rates.items()} == {row["iteration"]: float(row["lr"]) for row in train}
    assert values_of(browser, "psnr") == {row["iteration"]: [row["test.psnr"], row["test.psnr_input"]] for row in test}
    assert browser.run("document.querySelector('[data-resume]').dataset.resume") == "5"
    drawn = browser.run("document.querySelector('[data-chart=G_loss] [data-series]').getAttribute('d')")
    assert drawn.count("M") == 2 and drawn.count("L") == 7  # nine points in two pieces
    assert browser.run("document.title") == "one: finished, 9 of 9"
    assert browser.run("document.querySelector('#command').textContent").endswith("--set train.total_iter=9")

    box = browser.run("document.querySelector('[data-chart=G_loss] .plot').scrollIntoView({block: 'center'}); JSON."
                      "stringify(document.querySelector('[data-chart=G_loss] .plot').getBoundingClientRect())")
    box = json.loads(box)
    seen = set()
    for part in range(20):  # by a real pointer
        browser.move_to(box["x"] + box["width"] * part / 20, box["y"] + 90)
        seen.add(tuple(browser.run("(b => [b.dataset.iteration, b.dataset.value])(document.querySelector("
                                   "'[data-chart=G_loss] [data-value]'))")))
    assert seen <= {(row["iteration"], row["G_loss"]) for row in train} and len(seen) >= 8
    browser.move_to(5, 5)

    shown = "document.querySelector('.pictures img').src"
    browser.run("document.querySelector('#slider').focus()")
    last = browser.run(shown)
    browser.press("ArrowLeft")
    assert browser.run("document.querySelector('.slide output').textContent") == "iteration 6"
    assert browser.run(shown) != last
    browser.press("End")
    assert browser.run(shown) == last and browser.run("document.querySelectorAll('.pictures img').length") == 2

    straight = browser.run("document.querySelector('[data-chart=G_loss] [data-series]').getAttribute('d')")
    browser.run("document.querySelector('input[value=log]').click()")
    assert browser.run("document.querySelector('[data-chart=G_loss] [data-series]').getAttribute('d')") != straight
    browser.run("(s => { s.value = 0.9; s.dispatchEvent(new Event('input')); })(document.querySelector('#smoothing'))")
    assert browser.run("document.querySelectorAll('[data-chart=G_loss] .raw').length") == 1
    assert values_of(browser, "G_loss") == {row["iteration"]: [row["G_loss"]] for row in train}  # as before
    assert browser.errors == [] and browser.requests() == [(folder / "log/report.html").as_uri()]


def test_the_page_is_legible_in_both_themes_and_on_a_phone(browser, resumed):
    page = resumed / "log/report.html"
    for theme in ("light", "dark"):
        for width in (1280, 390):
            browser.open(page, width, theme=theme)
            worst, text = browser.run(CONTRAST)
            assert worst >= 4.5, (theme, width, text)
            assert browser.run("document.documentElement.scrollWidth") <= width
    named = "[...document.querySelectorAll('input, select, button, [role=slider], [role=region]')].filter(e => " \
            "!e.labels?.length && !e.ariaLabel && !e.getAttribute('aria-labelledby') && !e.textContent.trim())"
    assert browser.run(f"{named}.map(e => e.outerHTML)") == []
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.run("document.querySelector('header button').click()")  # from the system's, dark, to light
    assert browser.run("getComputedStyle(document.body).backgroundColor") != ground
    assert browser.run("[...document.images].every(i => i.alt)") and browser.errors == []


def test_100_000_rows_are_drawn_from_a_small_page(browser, tmp_path, long_run):
    folder = shutil.copytree(long_run, tmp_path / "long")
    assert report.main([str(folder)]) == 0
    page = folder / "log/report.html"
    browser.open(page)
    assert page.stat().st_size < 2_000_000
    written = {row["iteration"]: [row["G_loss"]] for row in rows(folder, "train")}
    shown_values = values_of(browser, "G_loss", ["Home", *["ArrowRight"] * 20, *["PageUp"] * 11, *["ArrowLeft"] * 20])
    assert len(shown_values) > 45 and shown_values.items() <= written.items()
    assert browser.run("JSON.parse(document.getElementById('facts').textContent).runs[0].curves.train.G_loss.high") == \
        [33_333, 77.7]
    assert browser.errors == []


def test_nothing_in_a_file_does_harm(browser, tmp_path):
    folder = written_run(tmp_path / "evil", 20, task=HOSTILE, state="failed", reason=HOSTILE, command=HOSTILE,
                         machine={"host": HOSTILE}, origins={"a": HOSTILE},
                         launches=[{"iteration": 0, "began": 1.0, "state": HOSTILE, "host": HOSTILE}])
    (folder / "log/train.log").write_text(HOSTILE)
    (folder / "options").mkdir()
    write_json(folder / "options/evil_260101_000000.json", {"a": HOSTILE, HOSTILE: [HOSTILE]})
    (folder / "log/train.csv").write_text(f"iteration,{HOSTILE.replace(',', '')}\r\n1,0.5\r\n2,0.25\r\n")
    save_pictures(folder / "images/000001_<img src=x onerror='window.harmed = 3'>.png", [torch.zeros(3, 8, 8)])
    assert report.main([str(folder), str(folder), "--out", str(tmp_path / "two.html")]) == 0
    assert report.main([str(folder)]) == 0
    for page in (folder / "log/report.html", tmp_path / "two.html"):
        browser.open(page)
        assert browser.run("window.harmed") is None and browser.errors == []
        assert browser.run("document.querySelectorAll('script').length") == 2
        assert browser.run(f"document.body.textContent.includes({json.dumps(HOSTILE)})")
    browser.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'harmed = 4'}))")
    assert browser.run("window.harmed") is None  # not even what gets in runs: the page's policy
    assert browser.errors.pop() and not browser.errors.clear()


def test_several_runs_lie_over_each_other(browser, tmp_path, monkeypatch, capsys):
    folders = [written_run(tmp_path / name, rows) for name, rows in (("one", 50), ("two", 80))]
    for folder, rate in zip(folders, (0.1, 0.2)):
        (folder / "options").mkdir()
        write_json(folder / "options/x_260101_000000.json", {"task": folder.name, "same": 1, "train": {"rate": rate}})
    monkeypatch.chdir(tmp_path)
    assert report.main(list(map(str, folders))) == 0 and capsys.readouterr().out.strip() == "comparison.html"
    browser.open(tmp_path / "comparison.html", theme="dark")
    shown_values = values_of(browser, "G_loss")
    one, two = ({row["iteration"]: row["G_loss"] for row in rows(folder, "train")} for folder in folders)
    assert shown_values["40"] == [one["40"], two["40"]] and shown_values["80"] == [one["50"], two["80"]]
    text = browser.run("document.querySelector('main').innerText")
    assert "train.rate" in text and "same" not in text and "21" in text
    assert browser.run(CONTRAST)[0] >= 4.5 and browser.errors == []


EPOCHS = {"train.total_epochs": None, "train.eval_interval": None, "train.save_interval": None}  # counts iterations
SMALL = {  # of each recipe, what makes it take a second or two
    "train_vrt": {"datasets.test.generated": {"num_clips": 1, "num_frame": 2, "gt_size": [64, 64]},
                  "datasets.train.num_frame": 2, "netG.img_size": [2, 16, 16], "netG.embed_dims": [8] * 8,
                  "netG.num_heads": [2] * 8, "netG.deformable_groups": 2},
    "train_vqgan": {"netG.ddconfig.ch": 32, "train.lossconfig.disc_ndf": 8, "datasets.train.generated.num_samples": 8},
    "train_segmentation": {**EPOCHS, "datasets.train.generated.num_images": 16,
                           "datasets.test.generated.num_images": 4},
    "train_inktrace": {**EPOCHS, "datasets.test.num_samples": 2, "--stage": "structural"},
    "train_lgt": {**EPOCHS, "train.G_scheduler_type": "constant", "val.num_steps": 2, "train.ode_integration_steps": 1,
                  "netG.base_channels": 32, "netG.style_dim": 8, "netG.time_dim": 8,
                  "datasets.train.image_size": 32, "datasets.test.image_size": 32,
                  "datasets.train.generated.num_images": 12},
}


@pytest.mark.parametrize("recipe", SMALL)
def test_every_recipe_has_its_report(browser, tmp_path, recipe):
    every = {"train.total_iter": 2, "train.checkpoint_test": 2, "train.checkpoint_save": 2, "train.checkpoint_print": 1,
             "num_threads": 1, "path.models": str(tmp_path / recipe)}
    settings = [word for key, value in {**every, **SMALL[recipe]}.items()
                for word in ((key, value) if key == "--stage" else ("--set", f"{key}={json.dumps(value)}"))]
    assert run("-opt", ROOT / f"options/{recipe}.json", *settings) == 0
    (folder,) = report.stages_of(tmp_path / recipe)
    browser.open(folder / "log/report.html")
    assert browser.run("document.querySelector('h1').textContent").startswith(recipe) and browser.errors == []
    (column,) = [name for name in rows(folder, "train")[0] if name in ("G_loss", "loss_total")]
    assert values_of(browser, column) == {row["iteration"]: [row[column]] for row in rows(folder, "train")}
    assert browser.run("document.querySelectorAll('.chart').length") > 2
    assert browser.run("[...document.querySelectorAll('.pictures img')].map(i => i.naturalWidth > 0)").count(True) > 0
