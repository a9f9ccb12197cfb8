"""What users of the seeds type and expect: it works, or the message has the new word.

docs/promises.md lists all of it, with the tests elsewhere.
"""


import pytest
import torch

import checkpoint
import options
from data import prepare
from models import KAIR_ONLY, MODELS, NETWORKS
from runtime.hooks import Hooks
from tests import tiny
from tests.conftest import ROOT, write_json
from tests.runs import run


def error_of(*arguments):
    """The one line that a command ends with."""
    with pytest.raises((options.OptionError, checkpoint.CheckpointError)) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Keep(Hooks):
    """Keeps the run, to look at when it has ended."""

    def before_training(self, run):
        self.run = run


# ---------------------------------------------------------------- 004: KAIR


def test_kairs_names_save_and_find(tmp_path, tiny_tables):
    """model.save(iter_label) writes what find_last_checkpoint, imported from options, finds and a run resumes from."""
    from options import find_last_checkpoint

    keep = Keep()
    assert run("-opt", tiny.write(tmp_path, train={"total_iter": 2}), hooks=[keep]) == 0
    model, models = keep.run.model, tmp_path / "kair/models"
    models.mkdir(parents=True)
    model.save_dir = models
    model.save(40)
    assert sorted(path.name for path in models.iterdir()) == ["40_E.pth", "40_G.pth", "40_optimizerG.pth"]
    assert find_last_checkpoint(str(models)) == (40, str(models / "40_G.pth"))
    assert find_last_checkpoint(str(models), net_type="optimizerG")[0] == 40
    assert torch.equal(torch.load(models / "40_G.pth", weights_only=True)["body.0.weight"],
                       model.netG.state_dict()["body.0.weight"])
    assert run("-opt", tiny.write(tmp_path, "kair", train={"total_iter": 41})) == 0
    assert checkpoint.find_newest(models).iteration == 41
    assert not hasattr(options, "find_first_checkpoint")


def kairs_record(folder, **over):
    """The options as KAIR's utils_option.save writes them into experiments/TASK/options."""
    tree = tiny.options(folder / "experiments", "task", train={"total_iter": 1, "checkpoint_test": 5})
    root = f"{folder}/experiments/task"
    tree["path"] |= {"pretrained_netG": None, "pretrained_netE": None, "pretrained_optimizerG": None, "task": root,
                     "log": root, "options": f"{root}/options", "models": f"{root}/models", "images": f"{root}/images"}
    for phase, section in tree["datasets"].items():
        section |= {"phase": phase, "scale": 1, "n_channels": 3}
    tree["netG"] |= {"scale": 1}
    tree["train"] |= {"F_feature_layer": 34, "F_weights": 1.0, "F_lossfn_type": "l1", "F_use_input_norm": True,
                      "F_use_range_norm": False, "G_scheduler_restart_weights": 1, "G_optimizer_reuse": False}
    tree |= {"opt_path": "options/task.json", "is_train": True, "merge_bn": False, "merge_bn_startpoint": -1,
             "scale": 1, "n_channels": 3, "find_unused_parameters": False, "use_static_graph": False, "dist": False,
             "num_gpu": 1, "rank": 0, "world_size": 1, "gpu_ids": [0], **over}
    (folder / "experiments/task/options").mkdir(parents=True)
    return write_json(folder / "experiments/task/options/task_261127_120000.json", tree)


def test_option_files_that_kair_writes_run_in_their_folder(tmp_path, tiny_tables):
    assert run("-opt", kairs_record(tmp_path)) == 0
    assert sorted(path.name for path in (tmp_path / "experiments").iterdir()) == ["task"]
    assert (tmp_path / "experiments/task/models/1_G.pth").exists() and (tmp_path / "experiments/task/log").is_dir()


@pytest.mark.parametrize("name", ["rvrt", "swinir", "dncnn", "gan", "usrnet", "plain4", "rrdbnet"])
def test_recipes_of_kair_that_are_not_here_are_called_so(name, tmp_path, tiny_tables):
    path = tiny.write(tmp_path)
    for key, table in (("model", MODELS), ("netG.net_type", NETWORKS)):
        said = error_of("-opt", path, "--set", f"{key}={name}")
        assert f"KAIR's {name} is not one of the recipes here" in said and "docs/recipe.md" in said
        assert "did you mean" not in said and name not in table
    assert not KAIR_ONLY & ({*MODELS, *NETWORKS} - {"plain"})


def test_the_difference_between_kairs_iterations_is_warned_of(tmp_path, tiny_tables, capsys):
    models = tmp_path / "run/models"
    models.mkdir(parents=True)
    net = tiny.Net().state_dict()
    for name in ("4_G", "4_E", "6_G"):
        torch.save(net, models / f"{name}.pth")
    assert run("-opt", tiny.write(tmp_path, train={"total_iter": 5})) == 0
    out = capsys.readouterr().out
    assert "warning  Checkpoint step mismatch: E=4, G=6; 6 is not used, 4 has all of them" in out


def test_data_prepare_makes_the_folder_of_its_list(tmp_path, shared):
    out = tmp_path / "data/meta_info/list.txt"
    prepare.main(["meta", str(shared / "data/video/test_GT"), str(out)])
    assert len(out.read_text().splitlines()) == 2


def test_a_missing_spynet_names_key_address_and_null():
    file = ROOT / "options/vrt/001_train_vrt_videosr_bi_reds_6frames.json"
    opt, _ = options.parse(str(file), [], MODELS, NETWORKS, __import__("data").DATASETS)
    with pytest.raises(options.OptionError, match="netG: spynet_path: .* does not exist; fetch github.com/.*spynet.*"
                                                  "or set spynet_path to null"):
        options.build(NETWORKS, opt["netG"], "net_type")
