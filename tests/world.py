"""The processes of one run: what happens in them, and how they end; and small options of every recipe."""

import builtins
import copy
import multiprocessing
import os
import re
import signal
import time

import torch

import checkpoint
import options
from runtime import distributed, signals
from runtime.hooks import Hooks
from runtime.watchdog import watch
from tests import tiny
from tests.conftest import ROOT, write_json
from tests.programs import fork, run_main_here

BATCH = 12  # of all recipes: shared by 1, 2, 3, 4
DDCONFIG = {"in_channels": 3, "out_ch": 3, "resolution": 16, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
            "attn_resolutions": [], "z_channels": 4}


def member(rank, size, port, arguments, output, acts):
    """A process of the world, as torchrun would start it; `acts` are (rank, step, what) that happen in it."""
    join(rank, size, port)
    run_main_here(arguments, output, hooks=[Acts({(step, what) for who, step, what in acts if who == rank})])


def join(rank, size, port):
    """Let this process have what torchrun tells its processes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="", TORCHELASTIC_USE_AGENT_STORE="True",
                      TORCHELASTIC_RESTART_COUNT="0")


class Acts(Hooks):
    """Lets things happen in this process, as (step, what).

    Before a validation: "bad validation", a signal and "at validation". After a step: a signal, "press N" (SIGINT
    now and N seconds later), "raise", "sleep", "time is over" (train.stop_after), "watched" (train.watchdog),
    "other weights", "full disk"; "nan": in the next loss; "worker dies in save": in the next save; "dies at file
    operation N" of those to come. In the data of a step: "sample" and what `Troubled` does. In step 0: "nohup",
    "impatient", "hasty" (two presses of Ctrl+C are one within half a second), "listens late", "SIGTERM at start".
    """

    def __init__(self, acts):
        self.acts, self.commit = acts, checkpoint.commit
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
        for _, what in acts:
            if what == "nohup":
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            elif what == "impatient":
                distributed.SAY_AFTER, distributed.BEAT_EVERY = 1.0, 1
            elif what == "hasty":
                signals.SAME_PRESS /= 4
            elif what == "listens late":  # the main thread may see a broken connection before the watch does
                distributed.dist.recv = late(distributed.dist.recv)

    def before_training(self, run):
        if (0, "SIGTERM at start") in self.acts:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        distributed.gather(None)  # the others wait here
        batches = iter(copy.deepcopy(run.batches))
        keys = {step: next(batches)[-1] for step in range(run.iteration + 1, run.opt["train"]["total_iter"] + 1)}
        trouble = {keys[step]: what.removeprefix("sample ") for step, what in self.acts
                   if what.startswith("sample") and step in keys}
        run.train_set = Troubled(run.train_set, trouble)

    def before_step(self, run):
        if (run.iteration - 1, "nan") in self.acts:
            run.model.degraded = run.model.degraded * float("nan")

    def after_step(self, run):
        if (run.iteration - 1, "full disk") in self.acts:
            checkpoint.commit = self.commit
        for what in [what for step, what in self.acts if step == run.iteration]:
            if what in signal.Signals.__members__:
                os.kill(os.getpid(), signal.Signals[what])
            elif what.startswith("press"):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(float(what.split()[1]))
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            elif what == "raise":
                raise ZeroDivisionError("on purpose")
            elif what == "other weights":
                next(run.model.netG.parameters()).data.view(-1)[0] += 1e-3
            elif what == "sleep":
                time.sleep(600)
            elif what == "time is over":
                watch.end = time.monotonic()
            elif what == "watched":
                watch.patience = 2.0
            elif what == "worker dies in save":
                checkpoint.commit = self.commit_without_a_worker
            elif what.startswith("dies at file operation"):
                tiny.die_at(int(what.split()[-1]))
            elif what == "full disk":
                checkpoint.commit = no_space

    def before_validation(self, run):
        if (run.iteration, "bad validation") in self.acts:
            run.model.metrics = damaged
        for step, what in self.acts:
            if step == run.iteration and what.endswith(" at validation"):
                os.kill(os.getpid(), signal.Signals[what.split()[0]])

    def commit_without_a_worker(self, *args, **kwargs):
        checkpoint.commit = self.commit
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        end = time.monotonic() + 1
        while time.monotonic() < end:  # where a handler would raise
            time.sleep(0.01)
        return self.commit(*args, **kwargs)


def read(path):
    with open(path) as file:
        return file.read()


def late(receive):
    def call(*args, **kwargs):
        try:
            return receive(*args, **kwargs)
        except RuntimeError:
            time.sleep(1)
            raise

    return call


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


def damaged():
    raise ValueError("damaged on purpose")


class Troubled:
    """A dataset in one of whose samples something happens: a signal, an exception by its name, a long wait."""

    def __init__(self, dataset, trouble):
        self.dataset, self.trouble = dataset, trouble

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        what = self.trouble.get(key)
        if what in signal.Signals.__members__:
            os.kill(os.getpid(), signal.Signals[what])
        elif what == "hangs":
            time.sleep(60)
        elif what == "is late":  # until the first rank says so
            theirs, end = os.readlink("/proc/self/fd/1").replace("_1.txt", "_0.txt"), time.monotonic() + 30
            while "waiting  for rank 1" not in read(theirs).partition("2.json in")[2] and time.monotonic() < end:
                time.sleep(0.05)
        elif what == "is local":
            class Local(Exception):
                def __reduce__(self):
                    raise TypeError("can't be pickled")
            raise Local("of a kind of its own")
        elif what == "EIO":
            raise OSError(5, "Input/output error", "/data/picture.png")
        elif what == "full shm":
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device")
        elif what == "can't be sent":
            return {**self.dataset[key], "folder": lambda: None}
        elif what:
            raise getattr(builtins, what)("on purpose")
        return self.dataset[key]


class World:
    """The processes; `finish` waits for them and never longer than asked."""

    def __init__(self, folder, size, *arguments, acts=(), member=member):
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        folder.mkdir(exist_ok=True)
        stem = f"{time.monotonic_ns()}"
        self.outputs = [folder / f"{stem}_{rank}.txt" for rank in range(size)]
        words = [str(argument) for argument in arguments]
        self.processes = [fork(member, rank, size, self.store.port, words, str(path), acts)
                          for rank, path in enumerate(self.outputs)]

    def said(self, rank):
        return self.outputs[rank].read_text() if self.outputs[rank].exists() else ""

    def wait_for(self, text, rank=0, seconds=60, after=""):
        """Until the process has printed this, after that."""
        end = time.monotonic() + seconds
        while text not in self.said(rank).partition(after)[2] if after else text not in self.said(rank):
            assert time.monotonic() < end and self.processes[rank].is_alive(), self.report()
            time.sleep(0.02)

    def signal(self, number, rank=0):
        os.kill(self.processes[rank].pid, number)

    def finish(self, seconds=120):
        """Exit codes; a process that is left is ended, and that is an error."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        assert not hung, f"{len(hung)} processes hung\n{self.report()}"
        return [process.exitcode for process in self.processes]

    def report(self):
        return "\n".join(f"--- {rank}, exit code {self.processes[rank].exitcode}\n{self.said(rank)}"
                         for rank in range(len(self.processes)))


def run(folder, size, *arguments, acts=(), seconds=120):
    """A world from beginning to end -> (exit codes, what each process said)."""
    world = World(folder, size, *arguments, acts=acts)
    codes = world.finish(seconds)
    return codes, [world.said(rank) for rank in range(size)]


def losses(folder):
    """Loss terms of each step."""
    import csv

    with open(folder / "log/train.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if re.search("loss", key, re.IGNORECASE) and value}
                for row in csv.DictReader(file)]


# ---------------------------------------------------------------- small options of every recipe


def recipe(kind, folder, name, train=None, **over):
    """An option file of a recipe, small: 6 steps, a checkpoint every 2, a validation every 3."""
    tree = {"extends": str(ROOT / f"options/train_{kind.split()[0]}.json"), "task": name, "num_threads": 1,
            "stages": [], "path": {"root": str(folder), "models": None}, "val": {"save_img": False},
            "checkpoint": {"layout": "split"}, "train": {}}
    tree = options.merge(tree, RECIPES[kind], {}, "")
    data = {"train": {"dataloader_batch_size": BATCH}}
    steps = {"total_epochs": None, "total_iter": 6, "save_interval": None, "eval_interval": None,
             "checkpoint_save": 2, "checkpoint_test": 3, "checkpoint_print": 1, **(train or {})}
    tree = options.merge(tree, {"datasets": data, "train": steps, **over}, {}, "")
    return write_json(folder / f"{name}.json", tree)


RECIPES = {
    "vrt": {"datasets": {"train": {"num_frame": 2, "gt_size": 32, "generated": {"num_clips": 25}},
                         "test": {"generated": {"num_clips": 3, "num_frame": 2, "gt_size": [32, 32]}}},
            "netG": {"img_size": [2, 8, 8], "embed_dims": [8] * 8, "num_heads": [2] * 8, "deformable_groups": 2},
            "train": {"fix_iter": 3, "fix_keys": ["spynet", "deform"], "fix_lr_mul": 0.5}},
    "vqgan": {"datasets": {"train": {"size": 16, "generated": {"num_samples": 25}},
                           "test": {"size": 16, "generated": {"num_images": 3}}},
              "netG": {"n_embed": 8, "ddconfig": DDCONFIG, "restart_below": 0.1},
              "train": {"lossconfig": {"disc_start": 2, "disc_ndf": 4, "disc_num_layers": 1}, "disc_every": 2}},
    "vqvae": {"datasets": {"train": {"size": 16, "generated": {"num_samples": 25}},
                           "test": {"size": 16, "generated": {"num_images": 3}}},
              "netG": {"n_embed": 8, "num_hiddens": 8, "num_res_hiddens": 4}},
    "inktrace": {"datasets": {"train": {"num_samples": 25}, "test": {"num_samples": 3}},
                 "netG": {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0}},
    "inktrace dense": {"datasets": {"train": {"num_samples": 25}, "test": {"num_samples": 3}},
                       "netG": {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0, "full_heads": True},
                       "train": {"G_lossfn_type": "dense"}},
    "lgt": {"datasets": {"train": {"image_size": 16, "generated": {"num_images": 10}},
                         "test": {"image_size": 16}},
            "netG": {"base_channels": 32, "style_dim": 8, "time_dim": 8},
            "val": {"num_steps": 2}, "train": {"ode_integration_steps": 2, "use_velocity_reg": True}},
    "segmentation": {"datasets": {"train": {"image_size": 16, "generated": {"num_images": 25}},
                                  "test": {"image_size": 16, "generated": {"num_images": 3}}},
                     "netG": {"depth": 2, "width": 4}},
}
