"""The default recipe of VRT, small."""

from tests.conftest import ROOT, write_json


def vrt_file(folder, name="run", workers=0, train=None, **over):
    """Make an option file whose run of 6 steps lies in folder/NAME."""
    tree = {
        "extends": str(ROOT / "options/train_vrt.json"), "task": name, "path": {"root": str(folder)}, "num_threads": 1,
        "datasets": {"train": {"gt_size": 32, "num_frame": 2, "dataloader_num_workers": workers,
                               "generated": {"num_clips": 5}},  # epochs of 2 batches: a run crosses three of them
                     "test": {"generated": {"num_clips": 1, "num_frame": 2, "gt_size": [32, 32]}}},
        "netG": {"img_size": [2, 8, 8], "embed_dims": [8] * 8, "num_heads": [2] * 8, "drop_path_rate": 0.3,
                 "deformable_groups": 2, "window_size": [2, 2, 2]},
        "train": {"total_iter": 6, "checkpoint_save": 2, "checkpoint_test": 3, "checkpoint_print": 1,
                  "G_optimizer_clipgrad": 1.0, "E_decay": 0.9, **(train or {})}, **over}
    return write_json(folder / f"{name}.json", tree)
