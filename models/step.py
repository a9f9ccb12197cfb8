"""One training step as a pure function: weights, buffers, optimizer state and step number in, the next ones out.

The batch is cut into micro-batches. Each is seeded and computed by itself, and they are summed in a fixed tree, so the
result does not depend on which process computes which of them. A recipe supplies `losses` and, if needed, `begin_step`,
`counts` and `finish_step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from runtime import determinism, distributed

PINNED = 1 << 26  # most bytes that are pinned to be sent


@dataclass
class Shape:
    """Name what the list of a micro-batch holds."""

    labels: list[str] = field(default_factory=list)  # optimizers that step
    terms: list[str] = field(default_factory=list)  # loss terms


class TrainingStep:
    """The step of `ModelBase`, which defines the attributes that are only declared here."""

    opt_train: Mapping[str, Any]
    device: torch.device
    networks: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    scaler: torch.amp.GradScaler | None

    batch: Sequence[str] = ("degraded", "target")  # attributes set by feed_data that hold the rows of a batch

    def __init__(self):
        self.log_dict: dict[str, Tensor] = {}  # loss terms of the last step, on the device
        self.micro_terms: dict[int, dict[str, Tensor]] = {}  # loss terms of this rank's micro-batches by number
        self.gradient_norms: dict[str, Tensor] = {}  # of the last step by optimizer, on the device
        self.failed_step: int | None = None  # the step that raised before it changed anything
        self.skipped = self.skipped_in_a_row = 0  # steps that train.on_nan skipped
        self.moving: tuple[list[Tensor], list[Tensor]] | None = None  # cache of moving_tensors, and their copies
        self.averaged: tuple | None = None  # cache of update_E: the networks, their parameters and buffers

    # ------------------------------------------------ what a recipe supplies

    def begin_step(self, step: int) -> None:
        """Prepare the networks for a step, as a function of its number alone."""

    def losses(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the losses of the micro-batch in the attributes `batch`, a mean over its rows each.

        All random generators are seeded for this micro-batch. What is returned must depend on nothing else but it, the
        networks and the step.

        Returns: losses by the label of the optimizer that steps; loss terms for the log by name, scalars.
        """
        raise NotImplementedError

    def counts(self) -> list[Tensor]:
        """Return and reset what the micro-batch adds to sums over the batch, after its backward pass."""
        return []

    def finish_step(self, step: int, counts: list[Tensor]) -> None:
        """Use the sums of `counts` over the batch, after the optimizers stepped; not called for a skipped step."""

    # ------------------------------------------------ the step

    def optimize_parameters(self, current_step: int) -> None:
        """Make one step: losses and gradients of each micro-batch by itself, their sum in a fixed tree, the optimizers.

        So the result does not depend on which rank computes a micro-batch. Buffers that a forward pass changes, as
        those of batch norm, move by the mean of the changes. A step that is skipped changes nothing, nor does one whose
        losses or gradients raise: `failed_step` is its number then.
        """
        self.begin_step(current_step)
        num = distributed.num_micro_batches(self.opt_train["accumulate"])
        if self.moving is None:
            moving = [tensor.detach() for tensor in self.moving_tensors()]  # some are parameters
            self.moving = moving, [torch.empty_like(tensor) for tensor in moving]
        moving, before = self.moving
        if moving:
            torch._foreach_copy_(before, moving)  # one call where there may be hundreds
        batch, shape = {name: getattr(self, name) for name in self.batch}, Shape()
        self.micro_terms, self.gradient_norms = {}, {}
        try:
            total = iter(distributed.sum_micro_batches(
                lambda number: self.micro_batch(current_step, number, num, batch, moving, before, shape), num))
        except Exception:
            self.undo(moving, before)
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            self.failed_step = current_step
            raise
        for name, rows in batch.items():
            setattr(self, name, rows)
        for label in shape.labels:
            for parameter in self.parameters_of(label):
                parameter.grad = next(total)
        with torch.no_grad():
            for tensor, old in zip(moving, before) if num > 1 else ():
                if tensor.is_floating_point():
                    tensor.copy_(next(total).div_(num).add_(old))
            losses, terms = next(total), next(total)
            self.log_dict = dict(zip(shape.terms, terms.unbind()))
            skipped = self.is_bad(losses) or not self.step_optimizers(shape.labels)
            if skipped:
                self.undo(moving, before)
        self.skipped += skipped and self.opt_train["on_nan"] == "skip"
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            self.finish_step(current_step, list(total))
            if "E" in self.networks:
                self.update_E(self.opt_train["E_decay"])

    @staticmethod
    @torch.no_grad()
    def undo(moving: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Put back what forward passes have moved since the step began."""
        for tensor, old in zip(moving, before):
            tensor.copy_(old)

    def micro_batch(self, step: int, number: int, num: int, batch: Mapping[str, Tensor], moving: Sequence[Tensor],
                    before: Sequence[Tensor], shape: Shape) -> list[Tensor | None]:
        """Compute one of `num` micro-batches: gradients, changes of buffers, losses, loss terms, counts."""
        determinism.seed_micro_batch(self.opt_train["manual_seed"], step, number)
        share = num // distributed.world_size()
        if num > 1:
            self.undo(moving, before)
            for name, rows in batch.items():  # a tensor of its own: memory alignment can change the last bits
                place, size = number % share, len(rows) // share
                assert size * share == len(rows), f"{len(rows)} rows are not {share} equal micro-batches"
                setattr(self, name, rows[place * size : (place + 1) * size].clone())
        losses, terms = self.losses(step)
        shape.labels, shape.terms = list(losses), list(terms)
        found = torch.stack([loss.detach().float() for loss in losses.values()])
        part: list[Tensor | None] = []
        bad = self.is_bad(found)
        for label, loss in losses.items():
            parameters = self.parameters_of(label)
            for parameter in parameters:
                parameter.grad = None
            if not bad:
                self.backward(loss / num if num > 1 else loss, parameters)
            part += [torch.zeros_like(p) if p.grad is None and num > 1 else p.grad for p in parameters]
            for parameter in parameters:
                parameter.grad = None
        part += [tensor - old for tensor, old in zip(moving, before) if num > 1 and tensor.is_floating_point()]
        self.micro_terms[number] = {name: term.detach() for name, term in terms.items()}
        values = torch.stack([term.detach().float() for term in terms.values()])
        return [*part, found, values / num, *self.counts()]

    def backward(self, loss: Tensor, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Compute the gradients of a loss, scaled for fp16; None: of all parameters."""
        (self.scaler.scale(loss) if self.scaler else loss).backward(inputs=parameters)

    def parameters_of(self, label: str) -> list[nn.Parameter]:
        """Return the parameters that an optimizer trains now."""
        return [p for group in self.optimizers[label].param_groups for p in group["params"] if p.requires_grad]

    def moving_tensors(self) -> list[Tensor]:
        """Return the tensors besides parameters that a forward pass in training may change: statistics and counters.

        Of integers these are the scalars, such as batch norm's counter; larger ones are tables.
        """
        found = []
        for label, network in self.networks.items():
            if label != "E":
                saved = network.state_dict().keys()
                found += [buffer for name, buffer in network.named_buffers()
                          if name in saved and (buffer.is_floating_point() or buffer.ndim == 0)]
        return found

    def checks_each_step(self) -> bool:
        """Tell whether losses and gradients are checked before the optimizers step.

        They are on CPU, where it is free and NaN coordinates would crash grid_sample's backward kernel, and with
        `on_nan` "skip". Elsewhere the loop checks the losses of several steps at once.
        """
        return self.opt_train["on_nan"] == "skip" or self.device.type == "cpu"

    def is_bad(self, values: Tensor) -> bool:
        """Tell whether values are not finite, where each step is checked."""
        return self.checks_each_step() and not bool(torch.isfinite(values).all())

    def step_optimizers(self, labels: Sequence[str]) -> bool:
        """Step these optimizers unless a gradient is not finite, which would spoil weights and moments for good.

        `train.{label}_optimizer_clipgrad` limits the norm of all gradients of an optimizer together. With fp16 the
        scaler skips steps of too large gradients.

        Returns: whether the steps were made.
        """
        norms = {}
        for label in labels:
            if self.scaler:
                self.scaler.unscale_(self.optimizers[label])
            norms[label] = torch.nn.utils.get_total_norm([p.grad for p in self.parameters_of(label)
                                                          if p.grad is not None])
        if not self.scaler:
            self.gradient_norms = {f"gradient norm of {label}": norm for label, norm in norms.items()}
            if self.is_bad(torch.stack(list(norms.values()))):
                return False
        for label in labels:
            if clip := self.opt_train[f"{label.removeprefix('optimizer')}_optimizer_clipgrad"]:
                torch.nn.utils.clip_grads_with_norm_(self.parameters_of(label), clip, norms[label])
            optimizer = self.optimizers[label]
            self.scaler.step(optimizer) if self.scaler else optimizer.step()
        if self.scaler:
            self.scaler.update()
        return True

    def numbers(self) -> tuple[dict[int, dict[str, float]], dict[str, float]]:
        """Return loss terms by number of this rank's micro-batches, and gradient norms by name, of the last step.

        Waits for the device.
        """
        losses = {number: {name: float(term) for name, term in terms.items()}
                  for number, terms in self.micro_terms.items()}
        return losses, {name: float(norm) for name, norm in self.gradient_norms.items()}

    def move(self, x: Tensor) -> Tensor:
        """Move a tensor from the CPU to the device; from pinned memory, as the copy would wait for a card otherwise.

        Training batches are pinned already. Large clips of a validation are not: torch keeps pinned memory for good.
        """
        pinned = self.device.type == "cuda" and x.nbytes <= PINNED
        return (x.pin_memory() if pinned else x).to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes, in the precision of `train.amp`."""
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[self.opt_train["amp"]]
        return torch.autocast(self.device.type, dtype=kind, enabled=kind is not None)

    def update_E(self, decay: float = 0.999) -> None:
        """Update the moving average: E = decay * E + (1 - decay) * G for parameters, a copy for buffers."""
        pair = tuple(self.get_bare_model(self.networks[label]) for label in ("E", "G"))
        if self.averaged is None or self.averaged[0] != pair:  # walking through modules takes longer than averaging
            self.averaged = pair, [list(net.parameters()) for net in pair], [list(net.buffers()) for net in pair]
        _, (kept, current), (kept_buffers, buffers) = self.averaged
        with torch.no_grad():
            torch._foreach_lerp_(kept, current, 1 - decay)
            if buffers:
                torch._foreach_copy_(kept_buffers, buffers)
