"""Checkpoints that earlier versions wrote, in tests/checkpoints/: this version resumes each of them."""

import copy
import json
import shutil

import pytest
import torch

import checkpoint
import options
from data import DATASETS
from models import MODELS, NETWORKS
from runtime.hooks import Hooks
from tests.checkpoints.write import HERE, KEPT, LAST, digest_of_names, make_small, numbers_of
from tests.conftest import ROOT
from tests.runs import differing, final, run

SETS = sorted(path.name.removesuffix(".tar.xz") for path in HERE.glob("*.tar.xz"))


class Restored(Hooks):
    """Keeps what a run holds before its first step."""

    def before_training(self, run):
        self.parts, self.history = copy.deepcopy(run.model.parts()), copy.deepcopy(run.history.rows)
        self.iteration = run.iteration


@pytest.mark.parametrize("name", SETS)
def test_a_kept_checkpoint_resumes(tmp_path, monkeypatch, capsys, name):
    """Weights, moments, iteration and history as stored. From version 3 on the end is that of a run never stopped.

    Processors round differently, so the end is compared within 1e-6, not bit for bit; other versions of torch also draw
    differently, so it is compared only with the version that wrote the set.
    """
    kind, _, version = name.rpartition("_v")
    make_small(kind, monkeypatch)
    monkeypatch.chdir(tmp_path)
    shutil.unpack_archive(HERE / f"{name}.tar.xz")
    shutil.copy(HERE / f"{kind}.json", ".")
    stored, restored = checkpoint.find_newest(f"experiments/{kind}/models").load(), Restored()
    assert run("-opt", f"{kind}.json", hooks=[restored]) == 0
    said = capsys.readouterr().out
    assert restored.iteration == stored["state"]["iteration"] == KEPT and f"iteration {KEPT} of {LAST}" in said
    assert restored.history == stored["state"]["history"] and len(restored.history) == 2
    gone = {"D", "optimizerD"} if kind == "vqvae" else set()  # it was never used there, and is not built any more
    assert set(restored.parts) == set(stored) - {"state"} - gone
    for label, part in restored.parts.items():
        kept = stored[label]
        if label.startswith("optimizer"):  # its parameter groups are the options'
            part, kept = part["state"], kept["state"]
        assert differing(part, kept) == [], label
    assert ("draws are new from here" in said) == (int(version) < 3), said
    assert "absent " not in said
    if int(version) >= 3 and stored["state"]["environment"]["torch"].split(".")[:2] == torch.__version__.split(".")[:2]:
        found = numbers_of(final(tmp_path / "experiments" / kind, LAST))
        expected = json.loads((HERE / f"{name}.json").read_text())
        expected = {key: pair for key, pair in expected.items() if key not in gone}
        assert set(found) == set(expected)
        for key, (norm, product) in expected.items():
            assert found[key] == pytest.approx([norm, product], rel=0, abs=1e-6 * norm), key


@pytest.mark.parametrize("file, stage, digest", [
    ("train_vrt", None, "73158f09b5b01e7a"), ("train_inktrace", "dense", "d74771b321ece6a6")])
def test_tensors_of_networks_that_are_too_large_to_keep_have_the_names_and_shapes_of_version_2(file, stage, digest):
    opt, _ = options.parse(str(ROOT / f"options/{file}.json"), [], MODELS, NETWORKS, DATASETS, stage)
    with torch.device("meta"):
        network = options.build(NETWORKS, opt["netG"], "net_type")
    assert digest_of_names(network) == digest
