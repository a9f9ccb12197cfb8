"""What users of the seeds type and expect: it works, or the message has the new word.

docs/promises.md lists all of it, with the tests elsewhere.
"""

import copy
import os
import re
import signal
import sys
import time
import types

import pytest
import torch

import checkpoint
import options
import report
from commands import checkpoints
from data import DATASETS, prepare
from data.frames import read_frame
from log.pictures import write_picture
from models import KAIR_ONLY, MODELS, NETWORKS
from models.model_inktrace import ModelInkTrace
from report.facts import RunFolder
from runtime.hooks import Hooks
from storage.foreign import unpack
from tests import tiny
from tests.conftest import ROOT, write_json
from tests.runs import differing, rows, run, run_until
from tests.test_lgt import recipe as lgt_recipe
from tests.test_segmentation import options_in as segmentation_recipe
from train import build_model


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
    """`save_optimizer` and `load_optimizer` are inverse; model.save(iter_label) writes what find_last_checkpoint,
    imported from options, finds and a run resumes from.
    """
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
    state = copy.deepcopy(model.G_optimizer.state_dict())
    next(iter(model.G_optimizer.state.values()))["exp_avg"].zero_()
    model.load_optimizer(models / "40_optimizerG.pth", model.G_optimizer)
    assert differing(state, model.G_optimizer.state_dict()) == []
    model.save_optimizer(tmp_path, model.G_optimizer, "optimizerG", "last")
    assert differing(state, torch.load(tmp_path / "last_optimizerG.pth", weights_only=True)) == []
    with pytest.raises(checkpoint.CheckpointError, match="40_G.pth: is not the state of an optimizer"):
        model.load_optimizer(models / "40_G.pth", model.G_optimizer)
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
    opt, _ = options.parse(str(file), [], MODELS, NETWORKS, DATASETS)
    with pytest.raises(options.OptionError, match="netG: spynet_path: .* does not exist; fetch github.com/.*spynet.*"
                                                  "or set spynet_path to null"):
        options.build(NETWORKS, opt["netG"], "net_type")


# ---------------------------------------------------------------- 001: InkTrace

DEFAULT_YAML = """\
model:
  embed_dim: 128
training:
  lr: 1e-3
  batch_size: 32
  epochs: 50
  keep_last_n: 3
data:
  num_workers: 4
stages:
  - name: "structural"
    epochs: 30
    model:
      full_heads: false
  - name: "dense"
    init_from: "best_structural.pth"
    training:
      mask_ratio: 0.6
"""


def test_the_seeds_yaml_is_told_every_new_word_at_once(tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    path = tmp_path / "configs/default.yaml"
    path.parent.mkdir()
    path.write_text(DEFAULT_YAML)
    said = error_of("--config", path, "--stage", "structural")
    for pair in ("model.embed_dim -> netG.embed_dim", "training.lr -> train.G_optimizer_lr",
                 "training.batch_size -> datasets.train.dataloader_batch_size", "training.epochs -> train.total_epochs",
                 "training.keep_last_n -> checkpoint.keep_last_n",
                 "data.num_workers -> datasets.train.dataloader_num_workers", "stages: epochs -> train.total_epochs",
                 "stages: model.full_heads -> netG.full_heads", "stages: training.mask_ratio -> train.mask_ratio"):
        assert pair in said
    base = said.rpartition('"extends": "')[2].partition('"')[0]
    assert (path.parent / base).resolve() == ROOT / "options/train_inktrace.json"
    path.write_text(f"extends: {base}\nnetG: {{embed_dim: 128}}\ntrain: {{G_optimizer_lr: 1e-3, total_epochs: 50}}\n"
                    "stages:\n  - {name: structural, train: {total_epochs: 30}}\n  - {name: dense}\n")
    opt, notices = options.parse(str(path), [], MODELS, NETWORKS, DATASETS, "structural")
    assert (opt["netG"]["embed_dim"], opt["train"]["G_optimizer_lr"], opt["train"]["total_epochs"]) == (128, 1e-3, 30)
    assert not notices


@pytest.mark.parametrize("text, said", [
    ("train: {G_optimizer_lrr: 1}", "train.G_optimizer_lrr: unknown key; did you mean 'G_optimizer_lr'"),
    ("task: [1", "x.yaml:1:9: not valid YAML: "),
    ("- 1", "one YAML object, not a list"),
    ("train: {total_iter: 2024-01-01}", '"2024-01-01" is not a whole number'),
])
def test_yaml_has_the_checks_of_json(text, said, tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "x.yaml"
    base = f"extends: {ROOT}/options/train_vqgan.json\n" if text.startswith("train") else ""
    path.write_text(base + text)
    assert said in error_of("-opt", path)


def test_yaml_without_pyyaml_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "x.yml").write_text("task: x")
    assert error_of("-opt", tmp_path / "x.yml").endswith("x.yml: a YAML file needs PyYAML: pip install pyyaml; or "
                                                         "write it as JSON")


@pytest.mark.parametrize("words, said", [
    ("--from-scratch", "--from-scratch: here it is --fresh"),
    ("--embed-dim 128 --num_layers 4", "--embed-dim: here it is --set netG.embed_dim=VALUE; --num_layers: here it is "
                                       "--set netG.num_layers=VALUE"),
    ("--num-epochs 5", "--num-epochs: here it is --epochs VALUE"),
    ("--weight_decay=0", "--weight_decay: here it is --set train.G_optimizer_wd=VALUE"),
    ("--stage 2", "there is no '2'; number 2 is dense"),
    ("--set train.num_epochs=5", "train.num_epochs: unknown key; here it is train.total_epochs"),
    ("--set train.batch_size=5", "unknown key; here it is datasets.train.dataloader_batch_size"),
    ("--set train.lr=5", "unknown key; here it is train.G_optimizer_lr"),
    ("--set training.w_style=5", "training: unknown key; here it is train"),
])
def test_words_of_the_old_scripts_are_answered_with_the_new_ones(words, said):
    file = ["-opt", ROOT / "options/train_inktrace.json"]
    assert said in error_of(*file, *words.split())


def test_a_file_alone_and_flags_of_a_recipe_alone_are_answered():
    file = ROOT / "options/train_lgt.json"
    assert error_of(file) == f"{file}: an option file is named with -opt {file}"
    said = error_of("--images", "pictures")
    assert "train_vqgan.json and " in said and "train_vqvae.json; name one with -opt" in said
    assert "no such option file" in error_of("--config", "none.json")


def staged(folder, name="run", **over):
    """An option file with two stages whose folder it fixes, as train_inktrace.json does."""
    return tiny.write(folder, name, train={"total_iter": 2}, path={"models": str(folder / "checkpoints")},
                      checkpoint={"layout": "bundle"}, stages=[{"name": "structural"}, {"name": "dense"}],
                      cli={"save_dir": "path.models"}, **over)


def test_a_sweep_over_one_stage_starts_with_the_best_of_the_one_before(tmp_path, tiny_tables, capsys):
    path = staged(tmp_path)
    assert run("-opt", path, "--stage", "structural") == 0
    for lr in ("1e-3", "5e-4"):
        assert run("-opt", path, "--stage", "dense", "--lr", lr, "--save_dir", tmp_path / f"sweeps/lr_{lr}") == 0
        assert f"from the best of structural: {tmp_path}/checkpoints/structural/epoch_" in capsys.readouterr().out
        state = checkpoint.find_newest(tmp_path / f"sweeps/lr_{lr}/dense").load()["state"]
        assert state["iteration"] == 2 and state["config"]["train"]["G_optimizer_lr"] == float(lr)


def test_a_stage_resumes_from_a_file_of_the_old_scripts(tmp_path, tiny_tables, capsys):
    net = tiny.Net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.rand(2, 3, 16, 16)).mean().backward()
    optimizer.step()
    torch.save({"epoch": 0, "model_state_dict": net.state_dict(), "optimizer_state_dict": optimizer.state_dict(),
                "loss": 0.5}, tmp_path / "best_dense_model.pth")
    assert run("-opt", staged(tmp_path), "--stage", "dense", "--resume", tmp_path / "best_dense_model.pth", "--set",
               "train.total_iter=4") == 0
    assert "best_dense_model.pth: iteration 2 of 4, epoch 1" in capsys.readouterr().out
    assert checkpoint.find_newest(tmp_path / "checkpoints/dense").iteration == 4


def test_a_folder_of_another_run_is_refused_with_the_way_out(tmp_path, tiny_tables, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, models = staged(tmp_path), tmp_path / "checkpoints/structural"
    assert run("-opt", first, "--stage", "structural") == 0
    before = sorted(tmp_path.rglob("*"))
    for words, what in ((["--set", "task=other"], "task run, and this one is of task other"),
                        (["-opt", staged(tmp_path, "copy", task="run")],
                         "option file run.json, and this one is of option file copy.json")):
        said = error_of("-opt", first, "--stage", "structural", "--set", "train.total_iter=4", *words)
        assert f"{models}: holds a run of {what}; " in said
        assert "folder of its own (path.models)" in said and f"--resume {models}" in said and "--fresh" in said
    assert before == sorted(path for path in tmp_path.rglob("*") if path.name != "copy.json")
    assert run("-opt", tmp_path / "copy.json", "--stage", "structural", "--resume", models, "--set",
               "train.total_iter=4") == 0
    assert checkpoint.find_newest(models).iteration == 4


# ---------------------------------------------------------------- 000: LGT


def test_lgt_prints_and_writes_what_its_users_watch(tmp_path, capsys):
    """checkpoints/ has the pictures and the CSV; a line for each epoch; a resume does not repeat an epoch's row."""
    words = ["-opt", lgt_recipe(tmp_path, "one", {"eval_interval": 3}), "--set", f"path.models={tmp_path}/checkpoints"]
    assert run(*words) == 0
    out, models = capsys.readouterr().out, tmp_path / "checkpoints"
    for epoch in (1, 2, 3):
        assert re.search(rf"^Epoch {epoch}/3 \| Loss: \d+\.\d{{4}} \| SWD: \d\.\d{{4}} \| SSM: \d\.\d{{4}} \| "
                         r"LR: \d\.\d\de-0\d$", out, re.MULTILINE)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "one.json"}
    assert {"inference", "logs", "epoch_0001.pt", "epoch_0003.pt", "latest.pt"} <= set(os.listdir(models))
    assert (models / "inference/epoch_0003/plain_to_dusk.jpg").exists()
    time.sleep(1.1)  # the name of a launch's CSV has its second
    assert run(*words, "--resume", models / "epoch_0002.pt") == 0
    out = capsys.readouterr().out
    assert "epoch_0002.pt: iteration 4 of 6, epoch 2 finished, next epoch 3, next learning rate" in out
    assert re.findall(r"^Epoch (\d)", out, re.MULTILINE) == ["3"]
    first, second = sorted((models / "logs").glob("training_*.csv"))
    assert [line.split(",")[0] for line in first.read_text().splitlines()] == ["epoch", "1", "2"]
    assert [line.split(",")[0] for line in second.read_text().splitlines()] == ["epoch", "3"]
    assert RunFolder(models, models).pictures(6)[-1]["when"] == "epoch 3"


@pytest.mark.parametrize("words, said", [
    (["--num_epochs", "9"], "--num_epochs: here it is --epochs VALUE"),
    (["--set", "train.num_epochs=9"], "train.num_epochs: unknown key; here it is train.total_epochs"),
])
def test_lgts_words_are_answered(words, said):
    assert said in error_of("--config", ROOT / "options/train_lgt.json", *words)


def test_lgts_config_file_is_told_every_new_word(tmp_path):
    path = write_json(tmp_path / "config.json", {"training": {
        "save_interval": 5, "eval_interval": 5, "test_image_dir": "/mnt/f/monet2photo/test", "num_epochs": 100,
        "resume_checkpoint": None, "batch_size": 8, "ode_integration_steps": 3}})
    said = error_of("--config", path)
    for pair in ("training.save_interval -> train.save_interval", "training.test_image_dir -> datasets.test.dataroot",
                 "training.num_epochs -> train.total_epochs", "options/train_lgt.json",
                 "training.resume_checkpoint -> train.resume_checkpoint",
                 "training.ode_integration_steps -> train.ode_integration_steps"):
        assert pair in said


# ---------------------------------------------------------------- 002: segmentation


def test_training_metrics_of_each_epoch_are_printed_and_in_the_csv(tmp_path, capsys):
    assert run("-opt", segmentation_recipe(tmp_path, train={"checkpoint_print": 100})) == 0
    out, folder = capsys.readouterr().out, tmp_path / "run"
    found = re.findall(r"^Epoch (\d)/3 \| Loss: (\S+) \| IoU: (\S+) \| Precision: \S+ \| Recall: \S+ \| "
                       r"F1: (\S+) \| LR: ", out, re.MULTILINE)
    table = rows(folder)
    assert [line[0] for line in found] == ["1", "2", "3"] and [row["iteration"] for row in table] == ["3", "6", "9"]
    state = checkpoint.find_newest(folder / "models").load()["state"]
    for i, row in enumerate(table):
        assert float(row["epoch_loss"]) == state["train_losses"][i]
        assert {k: float(row[f"epoch_{k}"]) for k in ("iou", "precision", "recall", "f1")} == \
            state["train_metrics_history"][i]
        assert found[i][1:] == tuple(f"{float(row[f'epoch_{k}']):.4f}" for k in ("loss", "iou", "f1"))
    assert "epoch_iou" in RunFolder(folder).facts()["curves"]["train"]  # in the report


# ---------------------------------------------------------------- 003: VQGAN

PARAM_JSON = """\
{
    "model_type": "TamingVQGAN",
    "model_args": {
        "model_variant": "EMAVQ",
        "n_embed": 16,
        "embed_dim": 8,
        "ddconfig": {
            "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
            "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0
        },
        "lossconfig": {
            "target": "models.taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
            "params": {
                "disc_conditional": false, "disc_in_channels": 3, "disc_start": 1, "disc_weight": 0.8,
                "codebook_weight": 1.0, "disc_num_layers": 1, "disc_ndf": 8
            }
        }
    },
    "train_args": {
        "use_taming_loss": true,  // optional
        "lr": 1e-4,
        "num_steps": 3,
        "lr_decay": 0.98
    }
}
"""  # the seed's, with smaller numbers


def test_param_json_trains_and_its_checkpoints_go_both_ways(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "param.json").write_text(PARAM_JSON)
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        write_picture(tmp_path / f"pictures/{i}.png", torch.rand(3, 20, 20))
    words = ["-opt", "param.json", "--images", "pictures", "--set", "val.save_img=false"]
    assert run(*words) == 0
    out, models = capsys.readouterr().out, tmp_path / "experiments/param/models"
    assert "train_args is not used here: lr_decay" in out and "model_args is not used here: lossconfig.target" in out
    assert "perceptual_weight is not used here: without weights/vgg16" in out
    assert "G EMAVQ" in out and "ImageTrainDataset, 2 samples" in out and "learning rate 0.0001" in out
    one = checkpoint.find_newest(models).load()
    assert (one["state"]["iteration"], one["state"]["config"]["train"]["lossconfig"]["disc_weight"]) == (3, 0.8)

    assert checkpoints.main(["convert", "experiments/param", "--to", "taming", "old.pth"]) == 0
    written = torch.load("old.pth", weights_only=True)
    assert set(written) == {"steps", "state_dict", "optimizer", "optimizer_disc", "scheduler"}
    assert written["steps"] == written["scheduler"]["last_epoch"] == 3
    assert "loss.discriminator.main.0.weight" in written["state_dict"] and "encoder.conv_in.weight" in \
        written["state_dict"]
    assert run(*words, "--resume", "old.pth", "--set", "task=again", "--set", "train.total_iter=4") == 0
    assert "old.pth: iteration 3 of 4" in capsys.readouterr().out
    parts = unpack(written, "old.pth")
    for label in ("G", "D", "optimizerG", "optimizerD"):
        assert differing(one[label], parts[label]) == [], label
    assert checkpoints.main(["convert", "experiments/param", "--to", "taming", "e.pth", "--network", "E"]) == 2


def test_param_json_with_another_loss_or_unknown_words_is_an_error(tmp_path):
    path = tmp_path / "param.json"
    path.write_text(PARAM_JSON.replace("vqperceptual.VQLPIPSWithDiscriminator", "dummy.DummyLoss"))
    assert "lossconfig.target: models.taming.modules.losses.dummy.DummyLoss is not here; valid: VQLPIPS" in \
        error_of("-opt", path)
    path.write_text(PARAM_JSON.replace("ch_mult", "ch_mul"))
    assert "netG.ddconfig.ch_mul: unknown key; did you mean 'ch_mult'?" in error_of("-opt", path)
    path.write_text(PARAM_JSON.replace("EMAVQ", "EMAVVQ"))
    assert "netG.net_type: unknown 'EMAVVQ'; did you mean 'EMAVQ'?" in error_of("-opt", path)


class FakeWandb(types.ModuleType):
    """Has what log/wandb.py calls, and keeps it."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.rows, self.ended = [], [], 0

    def init(self, **settings):
        self.begun.append(settings)
        return types.SimpleNamespace(log=self.rows.append, define_metric=lambda *_, **__: None, finish=self.finish)

    def finish(self):
        self.ended += 1

    @staticmethod
    def Image(array):
        return array.shape


def test_wandb_gets_each_row_once_after_a_resume(tmp_path, tiny_tables, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    path = tiny.write(tmp_path, train={"total_iter": 5}, val={"save_img": True})
    assert run("-opt", path, "--wandb") == 0
    assert run("-opt", path, "--wandb", "--set", "train.total_iter=7", "--resume", tmp_path / "run/models/2.json") == 0
    assert fake.begun[0]["id"] == fake.begun[1]["id"] and fake.begun[0]["name"] == "run" and fake.ended == 2
    assert fake.begun[0]["config"]["train.total_iter"] == 5 and fake.begun[0]["dir"] == str(tmp_path / "run/log")
    for key, wanted in (("train/G_loss", [1, 2, 3, 4, 5, 6, 7]), ("test/test.psnr", [3, 5, 6, 7])):
        assert [row["iteration"] for row in fake.rows if key in row] == wanted
    assert any("test/0" in row for row in fake.rows)
    assert run("-opt", path, "--wandb", "--fresh") == 0
    assert fake.begun[2]["id"] != fake.begun[0]["id"]


def test_wandb_that_is_absent_or_broken(tmp_path, tiny_tables, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    path = tiny.write(tmp_path, train={"total_iter": 1})
    assert "wandb is not installed; pip install wandb" in error_of("-opt", path, "--wandb")
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(fake, "init", lambda **_: 1 / 0)
    assert run("-opt", path, "--wandb") == 0
    assert "warning  Weights & Biases gets no rows of this launch: division by zero" in capsys.readouterr().out


def test_resume_with_the_interrupted_file_works_a_second_time(tmp_path, tiny_tables, capsys):
    """Also after regular saves have replaced it; and a file that never was is still an error."""
    path = tiny.write(tmp_path, checkpoint={"layout": "bundle", "interrupted": "interrupted_checkpoint.pth"},
                      path={"models": str(tmp_path / "checkpoints")})
    file = tmp_path / "checkpoints/interrupted_checkpoint.pth"
    run_until(5, "-opt", path, sig=signal.SIGINT)
    for stop in (7, 8, None, None):
        run_until(stop, "-opt", path, "--resume", file, sig=signal.SIGINT)
        assert file.exists() == (stop == 7)
    said = capsys.readouterr().out
    assert f"Checkpoint saved to {file}\n" in said and f"resume training using: --resume {file}, or" in said
    assert said.count(f"{file} was replaced by later saves of this run; it resumes from the newest") == 2
    assert "nothing left to do; raise train.total_iter to train longer" in said
    assert f"Checkpoint file not found: {file.parent}/other.pth; " in error_of("-opt", path, "--resume",
                                                                                file.with_name("other.pth"))


# ---------------------------------------------------------------- README


@pytest.mark.parametrize("own", [False, True], ids=["root/task", "path.models"])
def test_fresh_archives_checkpoints_logs_tables_pictures_and_report_together(own, tmp_path, tiny_tables, capsys):
    over = {"path": {"models": str(tmp_path / "run/models")}} if own else {}
    path = tiny.write(tmp_path, train={"total_iter": 3}, val={"save_img": True}, **over)
    folder = tmp_path / ("run/models" if own else "run")
    assert run("-opt", path) == 0
    before = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    (tmp_path / "run/models/vgg16.pth").write_bytes(b"weights of a loss")
    assert run("-opt", path, "--fresh", "--set", "train.total_iter=1", "--set", "val.save_img=false") == 0
    (archive,) = (tmp_path / "run").glob("models_2*")
    assert f"archived all that the run had: {archive}\n" in capsys.readouterr().out
    kept = {str(file.relative_to(archive)): file.read_bytes() for file in archive.rglob("*") if file.is_file()}
    wanted = {name.removeprefix("models/"): data for name, data in before.items() if not name.startswith(".")}
    assert kept == wanted and {"3.json", "log/train.csv", "log/test.csv", "log/train.log", "log/report.html",
                               "images/000003_test_0.png"} <= set(kept)
    assert [row["iteration"] for row in rows(folder)] == ["1"] and not (folder / "images").exists()
    assert (tmp_path / "run/models/vgg16.pth").exists() and len(list((folder / "options").iterdir())) == 1
    assert run("-opt", path, "--resume", archive, "--set", "task=again", "--set", "train.total_iter=4", "--set",
               f"path.models={tmp_path}/again") == 0  # the archive is still a run


# ---------------------------------------------------------------- what the files hold


def test_vqvae_has_no_discriminator_unless_it_is_used():
    opt, _ = options.parse(str(ROOT / "options/train_vqvae.json"), [], MODELS, NETWORKS, DATASETS)
    model = build_model(opt)
    model.init_train()
    assert set(model.parts()) == {"G", "E", "optimizerG"}
    opt["train"]["lossconfig"]["disc_factor"] = 1.0
    model = build_model(opt)
    model.init_train()
    assert set(model.parts()) == {"G", "E", "D", "optimizerG", "optimizerD"}


@pytest.mark.parametrize("keys, said", [
    (("params", "params_ema"), "takes params, not the moving average in params_ema"),
    (("params_ema",), "takes params_ema"), (("params",), None)])
def test_init_from_says_which_weights_it_takes(keys, said, tmp_path, tiny_tables, capsys):
    torch.save({key: tiny.Net().state_dict() for key in keys}, tmp_path / "net.pth")
    assert run("-opt", tiny.write(tmp_path, train={"total_iter": 1}), "--init-from", tmp_path / "net.pth") == 0
    out = capsys.readouterr().out
    assert (f"weights  {tmp_path}/net.pth: {said}\n" in out) if said else "takes" not in out
    assert run("-opt", tiny.write(tmp_path, "two", train={"total_iter": 1}), "--init-from", tmp_path / "run") == 0
    assert f"weights  {tmp_path}/run: takes G, not the moving average E\n" in capsys.readouterr().out


def test_a_plain_model_restores_a_users_pictures(tmp_path, tiny_tables, capsys):
    """docs/recipe.md: a recipe of one network has --test --input without code of its own."""
    path = tiny.write(tmp_path, train={"total_iter": 1})
    for folder in ("in/sub", "gt/sub"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a", "sub/b"):
        write_picture(tmp_path / f"in/{name}.png", torch.rand(3, 20, 24))
        write_picture(tmp_path / f"gt/{name}.png", torch.rand(3, 20, 24))
    assert run("-opt", path) == 0
    capsys.readouterr()
    words = ["-opt", path, "--test", "--input", tmp_path / "in", "--output", tmp_path / "out"]
    assert run(*words, "--truth", tmp_path / "gt") == 0
    assert "psnr" in capsys.readouterr().out
    model = build_model(options.parse(str(path), [], MODELS, NETWORKS, DATASETS)[0])
    model.load_for_inference(checkpoint.find_newest(tmp_path / "run/models").load(), "")
    for name in ("a", "sub/b"):
        model.feed_data({"L": read_frame(f"{tmp_path}/in/{name}.png")[None].float() / 255}, need_H=False)
        model.test()
        wanted = (model.restored[0].clamp(0, 1) * 255).round().byte()
        assert torch.equal(read_frame(f"{tmp_path}/out/{name}.png"), wanted)
    with pytest.raises(ValueError, match="does not support inference"):
        next(ModelInkTrace.infer(types.SimpleNamespace(opt={"model": "inktrace"}), "in", None, bool))


def test_folders_of_lightning_are_inspected_verified_and_resumed(tmp_path, tiny_tables, capsys):
    state = {"epoch": 1, "global_step": 5, "state_dict": {f"model.{k}": v for k, v in tiny.Net().state_dict().items()}}
    (tmp_path / "logs/version_0/checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "logs/version_0/checkpoints/last.ckpt")
    for command in ("inspect", "verify"):
        assert checkpoints.main([command, str(tmp_path / "logs/version_0")]) == 0
        out = capsys.readouterr().out
        assert "last.ckpt" in out and "iteration" in out and " 5" in out
    assert run("-opt", tiny.write(tmp_path, train={"total_iter": 6}), "--resume", tmp_path / "logs/version_0") == 0
    assert "checkpoints/last.ckpt: iteration 5 of 6" in capsys.readouterr().out
    torch.save({**state, "global_step": None}, tmp_path / "logs/version_0/checkpoints/last.ckpt")
    assert checkpoints.main(["inspect", str(tmp_path / "logs/version_0")]) == 0
    assert "iteration        -" in capsys.readouterr().out


def test_a_comparison_lies_with_the_runs_that_it_compares(tmp_path, tiny_tables, monkeypatch, capsys):
    for name in ("one", "two"):
        assert run("-opt", tiny.write(tmp_path / "", name, train={"total_iter": 1})) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert report.main(["../one", "../two"]) == 0
    assert capsys.readouterr().out.endswith("../comparison.html\n") and (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize("words, said", [
    (["--device", "gpu"], "--device: device: 'gpu' is unknown; valid: auto, cpu, cuda, cuda:N"),
    (["--batch_size", "12"], "--batch_size: datasets.train: a batch of 12 can't be filled: the training set has 11"),
    (["--save_dir", "/proc/none"], "--save_dir: /proc/none/run/models: can't be made"),
    (["--lr", "much"], '--lr: train.G_optimizer_lr: "much" is not a number'),
    (["--set", "train.checkpoint_save=-1"], "checkpoint_save: -1 is not a whole number >= 0; 0 switches it off"),
])
def test_a_bad_value_is_blamed_on_its_flag(words, said, tmp_path, tiny_tables):
    assert said in error_of("-opt", tiny.write(tmp_path), *words)


def test_the_end_and_what_raises_it_is_in_epochs_where_they_count(tmp_path, tiny_tables, capsys):
    words = ["-opt", tiny.write(tmp_path), "--epochs", "2"]
    for _ in range(2):
        assert run(*words) == 0
    out = capsys.readouterr().out
    assert "4.json: iteration 4 of 4, epoch 2 finished\n" in out  # no next epoch, no next learning rate
    assert "nothing left to do; raise train.total_epochs to train longer" in out
