"""Write the lines and table rows of a run's steps and epochs.

`run` is a `train.Run`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from runtime.evaluate import describe_losses
from runtime.resume import learning_rate

TITLES = {"swd": "SWD", "ssm": "SSM", "iou": "IoU"}  # of the means of an epoch; others are capitalized


def record(run: Any, printed: bool) -> None:
    """Write a CSV row of this iteration, and if `printed` a log line; one of the epoch if it ends here."""
    means = run.model.close_epoch() if run.due(0, 1) else {}
    if not (printed or means):
        return
    run.losses.check()
    steps, rate = run.means.num_steps, run.model.current_learning_rate()
    losses = run.means.close() or run.model.current_log()  # where all were skipped
    epoch = run.position[0] + 1  # the one that this step belongs to, from 1, as in the resume's line
    run.log.row("train", {"iteration": run.iteration, "epoch": epoch, "lr": rate, **losses, "steps": steps,
                          **{f"epoch_{name}": value for name, value in means.items()}})
    if means:
        run.log.line(describe_epoch(run, means))
    if printed:
        terms = describe_losses(losses)
        terms += f" | {run.model.skipped} steps skipped" if run.model.skipped else ""
        run.log.line(f"iter {run.iteration:>7,} | epoch {epoch} | lr {rate:.3e} | {terms} | "
                     f"{run.pace.describe(run.iteration)}")


def describe_epoch(run: Any, means: Mapping[str, float]) -> str:
    """Format the means of the epoch that ends here: 'Epoch 51/100 | Loss: 0.2345 | SWD: 0.1123 | LR: 8.95e-05'."""
    train = run.opt["train"]
    num_epochs = train["total_epochs"] or run.batches.after(train["total_iter"] - run.started_at)[0] + 1
    words = [f"{TITLES.get(name, name.capitalize())}: {value:.4f}" for name, value in means.items()]
    return " | ".join([f"Epoch {run.epochs_done}/{num_epochs}", *words, f"LR: {learning_rate(run, run.iteration):.2e}"])


def show_progress(run: Any) -> None:
    """Redraw the progress line, at most twice a second."""
    if run.log.live and time.monotonic() - run.shown > 0.5:
        terms = describe_losses(run.model.current_log())
        run.log.progress(f"iter {run.iteration:,}/{run.opt['train']['total_iter']:,} | "
                         f"{run.pace.describe(run.iteration)} | {terms} | lr {run.model.current_learning_rate():.3e}")
        run.shown = time.monotonic()
