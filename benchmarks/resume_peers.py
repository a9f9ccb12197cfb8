"""Kill trainers at random and restart them their own way: who ends with the bits of a run that was never stopped?

    pip install -e '.[peers]'
    python benchmarks/resume_peers.py [--peers perdure lightning ...] [--trials 20] [--folder DIR]

Each peer trains the same small network (batch norm, dropout) on the same pictures (random flips and noise) with AdamW,
a cosine schedule and a moving average, and is written as its documentation recommends:

perdure            main.py with a save every 12 steps; the same command again resumes
lightning          ModelCheckpoint every 12 steps with save_last, EMAWeightAveraging, seed_everything; ckpt_path="last"
lightning-stateful the same with torchdata's StatefulDataLoader
transformers       Trainer with save_steps 12; resume_from_checkpoint; the moving average in a callback of our own,
                   since it has none, saved in the same folder
accelerate         save_state every 12 steps with automatic names; load_state and skip_first_batches; a seedable sampler
plain              the PyTorch tutorial's general checkpoint: torch.save and torch.load of a dictionary, once an epoch
composer           only where it installs (0.32 needs torch < 2.8)

A trial has two kills by SIGKILL, each by a coin in a random step after the first save or within a later save, and a
restart after each; its end is compared with that of the peer's own straight run. Columns: trials that ended with equal
bits; the largest difference of the others; trials that could not restart, as from a torn file; restarts that began at
step 1 (equal bits prove nothing there); steps computed again per kill; samples that an epoch saw twice or never, in all
trials; seconds from a restart to its first step, mostly imports; how long a save holds up the loop. A step that was
computed again counts once, as it was computed last.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, SAMPLES, EVERY, DECAY, RATE = 4, 64, 12, 0.99, 1e-3
EPOCH = SAMPLES // BATCH  # steps of an epoch
PEERS = {"perdure": "torch", "lightning": "lightning", "lightning-stateful": "torchdata",  # name -> what it needs
         "transformers": "transformers", "accelerate": "accelerate", "plain": "torch", "composer": "composer"}


COLUMNS = ("equal bits", "largest difference", "could not restart", "started over", "steps again per kill",
           "samples twice or never", "restart to first step", "a save blocks")


class Net(nn.Module):
    """Two wide convolutions with batch norm and dropout.

    Args: width: channels in between.
    """

    def __init__(self, *, width: int = 192):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU(), nn.Dropout(0.2),
                                  nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Pictures(torch.utils.data.Dataset):
    """Pictures with random flips and noise, of (epoch, index) for Perdure, from torch's generator for the others."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        generator = None
        if isinstance(key, tuple):
            from data.sampler import cpu_generator

            generator = cpu_generator(0, *key)
        index = key[1] if isinstance(key, tuple) else key
        target = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(index))
        target = target.flip(-1) if torch.rand((), generator=generator) < 0.5 else target
        degraded = target + 0.1 * torch.randn(target.shape, generator=generator)
        return {"L": degraded, "H": target, "index": index}


# ---------------------------------------------------------------- what a process tells


class Journal:
    """Appends events to a file, each at once, so that a kill loses none."""

    def __init__(self, folder: Path):
        self.file = os.open(folder / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def add(self, event: str, **facts: Any) -> None:
        os.write(self.file, json.dumps({"event": event, "time": time.time(), **facts}).encode() + b"\n")

    def step(self, number: int, indices: Any) -> None:
        self.add("step", number=int(number), indices=[int(index) for index in indices])

    @contextlib.contextmanager
    def saving(self):
        self.add("save")
        yield
        self.add("saved")


def events_of(folder: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a journal."""
    path = folder / "journal"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def finish(folder: Path, net: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
    """Write the final weights and their moving average."""
    torch.save({"net": dict(net), "average": dict(average)}, folder / "final.pt")


# ---------------------------------------------------------------- the peers


def train_perdure(folder: Path, steps: int, journal: Journal) -> None:
    import checkpoint
    import main
    from data import DATASETS
    from models import NETWORKS
    from runtime.hooks import Hooks

    class Watch(Hooks):
        saving = False

        def before_step(self, run):
            if self.saving:
                journal.add("saved")
            self.saving = False
            journal.step(run.iteration, [index for _, index in run.batches.keys_of(run.iteration - run.started_at)])

        def before_save(self, run):
            self.saving = True
            journal.add("save")

    NETWORKS["peers"], DATASETS["peers"] = "benchmarks.resume_peers:Net", "benchmarks.resume_peers:Pictures"
    file = folder / "perdure.json"
    file.write_text(json.dumps({
        "task": "run", "model": "plain", "path": {"root": str(folder)}, "netG": {"net_type": "peers"}, "num_threads": 1,
        "datasets": {"train": {"dataset_type": "peers", "dataloader_batch_size": BATCH}},
        "train": {"total_iter": steps, "checkpoint_save": EVERY, "checkpoint_print": 0, "E_decay": DECAY,
                  "G_optimizer_type": "adamw", "G_optimizer_wd": 0.01, "G_optimizer_lr": RATE,
                  "G_scheduler_type": "CosineAnnealingWarmRestarts", "G_scheduler_periods": steps}}))
    if code := main.main(["-opt", str(file)], hooks=[Watch()]):
        sys.exit(code)
    parts = checkpoint.find_newest(folder / "run/models").load()
    finish(folder, parts["G"], parts["E"])


def build(steps: int) -> tuple:
    """Build network, average, optimizer and schedule for the peers that take torch's."""
    net = Net()
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY))
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.01)
    return net, average, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def train_plain(folder: Path, steps: int, journal: Journal) -> None:
    torch.manual_seed(0)
    net, average, optimizer, schedule = build(steps)
    loader = torch.utils.data.DataLoader(Pictures(), BATCH, shuffle=True)
    held, first, path = (net, average, optimizer, schedule), 0, folder / "checkpoint.pt"
    if path.exists():
        state = torch.load(path)
        for part, values in zip(held, state["parts"]):
            part.load_state_dict(values)
        first = state["epoch"] + 1
    for epoch in range(first, -(-steps // EPOCH)):
        for place, batch in enumerate(loader):
            if epoch * EPOCH + place < steps:
                journal.step(epoch * EPOCH + place + 1, batch["index"])
                optimizer.zero_grad()
                F.l1_loss(net(batch["L"]), batch["H"]).backward()
                optimizer.step()
                schedule.step()
                average.update_parameters(net)
        with journal.saving():
            torch.save({"epoch": epoch, "parts": [part.state_dict() for part in held]}, path)
    finish(folder, net.state_dict(), average.module.state_dict())


def train_accelerate(folder: Path, steps: int, journal: Journal) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed

    class Position:
        def __init__(self):
            self.done = 0

        def state_dict(self):
            return {"done": self.done}

        def load_state_dict(self, state):
            self.done = state["done"]

    set_seed(0)
    naming = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=3)
    accelerator = Accelerator(cpu=True, project_config=naming,
                              dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    net, average, optimizer, schedule = build(steps)
    loader = torch.utils.data.DataLoader(Pictures(), BATCH, shuffle=True)
    net, optimizer, loader, schedule = accelerator.prepare(net, optimizer, loader, schedule)
    at = Position()
    accelerator.register_for_checkpointing(average, at)
    if (folder / "checkpoints").exists():
        accelerator.load_state()
        accelerator.project_configuration.iteration = at.done // EVERY
    while at.done < steps:
        loader.set_epoch(at.done // EPOCH)
        skipped = at.done % EPOCH
        for batch in accelerator.skip_first_batches(loader, skipped) if skipped else loader:
            if at.done == steps:
                break
            journal.step(at.done + 1, batch["index"])
            optimizer.zero_grad()
            accelerator.backward(F.l1_loss(net(batch["L"]), batch["H"]))
            optimizer.step()
            schedule.step()
            average.update_parameters(accelerator.unwrap_model(net))
            at.done += 1
            if at.done % EVERY == 0:
                with journal.saving():
                    accelerator.save_state()
    finish(folder, accelerator.unwrap_model(net).state_dict(), average.module.state_dict())


def train_transformers(folder: Path, steps: int, journal: Journal) -> None:
    import transformers
    from transformers.trainer_utils import get_last_checkpoint

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, L, H, index):
            if self.training:
                journal.step(trainer.state.global_step + 1, index)
            return {"loss": F.l1_loss(self.net(L), H)}

    class Average(transformers.TrainerCallback):
        def __init__(self, net):
            self.net, self.copy = net, copy.deepcopy(net)

        def on_train_begin(self, args, state, control, **kwargs):
            self.copy.load_state_dict(self.net.state_dict())
            if state.global_step:
                self.copy.load_state_dict(torch.load(Path(get_last_checkpoint(args.output_dir)) / "average.pt"))

        def on_step_end(self, args, state, control, **kwargs):
            with torch.no_grad():
                for kept, now in zip(self.copy.parameters(), self.net.parameters()):
                    kept.lerp_(now, 1 - DECAY)

        def on_save(self, args, state, control, **kwargs):
            torch.save(self.copy.state_dict(), Path(args.output_dir) / f"checkpoint-{state.global_step}/average.pt")

    class Timed(transformers.Trainer):
        def _save_checkpoint(self, *args, **kwargs):
            with journal.saving():
                super()._save_checkpoint(*args, **kwargs)

    transformers.set_seed(0)
    model = Model()
    settings = transformers.TrainingArguments(
        str(folder / "out"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE, weight_decay=0.01,
        lr_scheduler_type="cosine", max_grad_norm=0, save_strategy="steps", save_steps=EVERY, save_total_limit=3,
        logging_steps=10 * steps, report_to=[], disable_tqdm=True, use_cpu=True, seed=0, data_seed=0,
        remove_unused_columns=False)
    average = Average(model.net)
    trainer = Timed(model, settings, train_dataset=Pictures(), callbacks=[average])
    last = get_last_checkpoint(settings.output_dir) if os.path.isdir(settings.output_dir) else None
    trainer.train(resume_from_checkpoint=last)
    finish(folder, model.net.state_dict(), average.copy.state_dict())


def train_lightning(folder: Path, steps: int, journal: Journal, stateful: bool = False) -> None:
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, batch_idx):
            journal.step(self.global_step + 1, batch["index"])
            return F.l1_loss(self.net(batch["L"]), batch["H"])

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Timed(lightning.Trainer):
        def save_checkpoint(self, *args, **kwargs):
            with journal.saving():
                super().save_checkpoint(*args, **kwargs)

    lightning.seed_everything(0, workers=True)
    if stateful:
        from torchdata.stateful_dataloader import StatefulDataLoader as Loader
    else:
        from torch.utils.data import DataLoader as Loader
    loader = Loader(Pictures(), BATCH, shuffle=True, num_workers=0)
    module = Module()
    trainer = Timed(max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
                    enable_model_summary=False, default_root_dir=folder,
                    callbacks=[ModelCheckpoint(folder / "saved", every_n_train_steps=EVERY, save_last=True),
                               EMAWeightAveraging(decay=DECAY)])
    trainer.fit(module, loader, ckpt_path="last")
    finish(folder, module.net.state_dict(), {})  # at the end the callback puts the average into the module


TRAINERS: dict[str, Callable[[Path, int, Journal], None]] = {
    "perdure": train_perdure, "plain": train_plain, "accelerate": train_accelerate, "transformers": train_transformers,
    "lightning": train_lightning,
    "lightning-stateful": lambda folder, steps, journal: train_lightning(folder, steps, journal, stateful=True)}


# ---------------------------------------------------------------- runs, kills and what came of them


class Launch:
    """One process of a peer, and its events."""

    def __init__(self, peer: str, folder: Path, steps: int):
        self.folder, self.began, self.old = folder, time.time(), len(events_of(folder))
        self.output = open(folder / "output", "w+")
        self.process = subprocess.Popen([sys.executable, __file__, "--child", peer, "--folder", str(folder), "--steps",
                                         str(steps)], cwd=folder, stdout=self.output, stderr=subprocess.STDOUT,
                                        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})

    def wait_for(self, steps: int, save: bool = False) -> bool:
        """Wait for so many steps of this launch, and for the next save to begin. False: the process ended before."""
        while self.process.poll() is None:
            kinds = [event["event"] for event in events_of(self.folder)[self.old :]]
            if kinds.count("step") >= steps and not (save and kinds[-1] != "save"):
                return True
            time.sleep(0.002)
        return False

    def end(self, kill: bool) -> str:
        """Kill the process or wait for its end. Returns the last line of its output if it failed."""
        if kill:
            self.process.send_signal(signal.SIGKILL)
        code = self.process.wait(600)
        self.output.seek(0)
        lines = self.output.read().strip().splitlines() or [""]
        self.output.close()
        return lines[-1] if code not in (0, -signal.SIGKILL) else ""


def straight(peer: str, folder: Path, steps: int) -> dict[str, Any]:
    """Run to the end. Returns final weights, seconds of a step and of a save. Raises: RuntimeError: it failed."""
    folder.mkdir(parents=True)
    if fault := Launch(peer, folder, steps).end(kill=False):
        raise RuntimeError(fault)
    events = events_of(folder)
    times = [event["time"] for event in events if event["event"] == "step"]
    return {"final": torch.load(folder / "final.pt"), "saves": blocked(events),
            "step": statistics.median(b - a for a, b in zip(times, times[1:]))}


def blocked(events: list[dict]) -> list[float]:
    """Return the seconds that each completed save took."""
    return [after["time"] - event["time"] for event, after in zip(events, events[1:])
            if event["event"] == "save" and after["event"] == "saved"]


def trial(peer: str, folder: Path, steps: int, draw: random.Random, known: Mapping[str, Any]) -> dict[str, Any]:
    """Kill twice, restart each time, and run to the end. Returns what is counted of it."""
    folder.mkdir(parents=True)
    starts, again, over, fault = [], 0, 0, ""
    for kill in (True, True, False):
        launch = Launch(peer, folder, steps)
        done = max((event["number"] for event in events_of(folder) if event["event"] == "step"), default=0)
        if kill and draw.random() < 0.5:
            hit = launch.wait_for(EPOCH + draw.randrange(1, EPOCH), save=True)
            time.sleep(draw.uniform(0, max(known["saves"])) if hit else 0)
        elif kill:
            hit = launch.wait_for(draw.randrange(EPOCH + 1, 3 * EPOCH))
            time.sleep(draw.uniform(0, known["step"]) if hit else 0)
        fault = launch.end(kill)
        new = [event for event in events_of(folder)[launch.old :] if event["event"] == "step"]
        if launch.old and new:
            starts.append(new[0]["time"] - launch.began)
            again += max(0, done + 1 - new[0]["number"])
            over += new[0]["number"] == 1
        if fault:
            break
    found = {"starts": starts, "again": again, "over": over, "fault": fault, "equal": False, "largest": 0.0, "wrong": 0}
    if not fault:
        a, b = known["final"], torch.load(folder / "final.pt")
        pairs = [(a[part][key], b[part][key]) for part in a for key in a[part]]
        found["equal"] = all(torch.equal(x, y) for x, y in pairs)
        found["largest"] = max(float((x.double() - y.double()).abs().max()) for x, y in pairs)
        found["wrong"] = wrong_samples(events_of(folder))
    return found


def wrong_samples(events: list[dict]) -> int:
    """Count the samples that complete epochs saw twice or never; a step counts as it was computed last."""
    last = {event["number"]: event["indices"] for event in events if event["event"] == "step"}
    epochs = defaultdict(Counter)
    for number, indices in last.items():
        epochs[(number - 1) // EPOCH].update(indices)
    complete = range(max(last) // EPOCH)
    return sum(sum(abs(epochs[epoch][index] - 1) for index in range(SAMPLES)) for epoch in complete)


def row(peer: str, folder: Path, steps: int, trials: int) -> str:
    """Measure a peer. Returns its row of the table."""
    if not importlib.util.find_spec(PEERS[peer]) or peer not in TRAINERS:
        return f"| {peer} | not run: {PEERS[peer]} is not installed {'| ' * len(COLUMNS)}"
    try:
        known = straight(peer, folder / "straight", steps)
    except RuntimeError as fault:
        return f"| {peer} | not run: {fault} {'| ' * len(COLUMNS)}"
    found = []
    for number in range(trials):
        found.append(trial(peer, folder / str(number), steps, random.Random(f"{peer} {number}"), known))
        print(f"{peer} {number}: {found[-1]}", file=sys.stderr, flush=True)
    ended = [one for one in found if not one["fault"]]
    starts = [seconds for one in found for seconds in one["starts"]]
    equal, over, again = (sum(one[key] for one in found) for key in ("equal", "over", "again"))
    largest, start = max((one["largest"] for one in ended), default=0), statistics.median(starts) if starts else 0
    cells = (f"{equal} of {trials}", f"{largest:.1e}", trials - len(ended), over, f"{again / max(1, len(starts)):.1f}",
             sum(one["wrong"] for one in ended), f"{start:.1f} s", f"{1000 * statistics.median(known['saves']):.0f} ms")
    return f"| {peer} | {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8 * EPOCH)
    parser.add_argument("--folder", type=Path, help="keep the runs here; default: a temporary folder")
    parser.add_argument("--child", choices=TRAINERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.set_num_threads(1)
        TRAINERS[args.child](args.folder, args.steps, Journal(args.folder))
        return
    with tempfile.TemporaryDirectory(prefix="peers_") as temporary:
        rows = [row(peer, (args.folder or Path(temporary)).resolve() / peer, args.steps, args.trials)
                for peer in args.peers]
    print(f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
