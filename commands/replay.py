"""Compute one step again: `main.py -opt FILE --replay N` shows what step N saw, and whether it repeats itself.

It starts from the newest intact checkpoint before step N, or from the one that --resume names, computes the steps up to
N - 1 and step N twice, and writes nothing to the run's folder.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoint
import options
from data.loader import endless
from data.sampler import describe_samples
from log.run_log import start_log
from log.terminal import number
from runtime.determinism import failures_named, prepare_machine
from runtime.evaluate import describe_losses
from runtime.resume import restore
from train import Run


def replay(step: int, opt: options.Section, notices: Sequence[str], *, resume: str | None = None,
           preface: Sequence[str] = (), **_: Any) -> int:
    """Print the samples, losses and gradient norms of a step. Returns 0 if both computations are equal, else 1.

    The signature is that of `train.train` after `step`, so that a stage of a file is replayed as it is trained.

    Raises: OptionError: the step is not one of the run's, or lies before the checkpoint that was named.
    """
    if step < 1:
        raise options.OptionError(f"--replay {step}: must be 1 or above")
    prepare_machine(opt)
    with contextlib.ExitStack() as stack:
        settings = {**opt["log"], "tensorboard": False, "wandb": False}
        log = stack.enter_context(contextlib.closing(start_log(settings, notices, preface)))
        run = stack.enter_context(contextlib.closing(Run(opt, log)))
        own = None if resume else checkpoint.find_newest(run.models, log.warn, before=step)
        first = resume or opt["train"]["resume_checkpoint"]
        restore(run, checkpoint.locate(first, log.warn) if own is None and first else own)
        if step > opt["train"]["total_iter"]:
            raise options.OptionError(f"--replay {step}: the run has {opt['train']['total_iter']} steps")
        if run.iteration >= step:
            raise options.OptionError(f"--replay {step}: {first} is at iteration {run.iteration}, after that step; "
                                      "name an older checkpoint")
        run.model.save_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perdure_"))) / "models"
        samples = stack.enter_context(contextlib.closing(endless(run.train_set, run.batches, 0, pinned=False)))
        stack.enter_context(failures_named(run.model.device))
        for iteration in range(run.iteration + 1, step):
            run.fetch(samples)
            advance(run, iteration)
        run.fetch(samples)
        keys = run.batches.keys_of(step - run.started_at)
        log.line(f"samples  of step {step}: {describe_samples(run.train_set, keys, len(keys))}")
        before = copy.deepcopy(run.model.parts())
        lines, first = record(run, step)
        for line in lines:
            log.line(line)
        load(run, before)
        if record(run, step)[1] == first:
            log.line("equal    a second computation gives the same losses, gradients and weights")
            return 0
        log.line("differs  a second computation gives another result: the machine, or a kernel without fixed order")
        return 1


def advance(run: Run, iteration: int) -> None:
    """Make one step as the training loop does."""
    run.model.update_learning_rate(iteration - 1)
    run.model.optimize_parameters(iteration)


def record(run: Run, step: int) -> tuple[list[str], list[Any]]:
    """Make the step.

    Returns: lines with the losses of each micro-batch, the gradient norms and a checksum of the weights; the same
    values with all their bits.
    """
    advance(run, step)
    (losses, norms), checksum = run.model.numbers(), run.model.checksum()
    lines = [f"losses   of micro-batch {place}: {describe_losses(terms)}" for place, terms in losses.items()]
    lines.append(", ".join(f"{name} {number(norm)}" for name, norm in norms.items()) or
                 f"gradient norms are not computed {'with fp16' if run.model.scaler else 'for such a loss'}")
    lines.append(f"weights  {checksum % 2**32:08x} after the step")
    return lines, [repr(losses), repr(norms), checksum]


def load(run: Run, parts: dict[str, Any]) -> None:
    """Restore networks and optimizers."""
    for label, network in run.model.networks.items():
        run.model.get_bare_model(network).load_state_dict(parts[label])
    for label, optimizer in run.model.optimizers.items():
        optimizer.load_state_dict(parts[label])
