"""Callbacks at fixed points of a run, for the proof of a resume, the checks before a run, benchmarks and tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Hooks:
    """Called at fixed points of `train.train` with the `train.Run`. An exception ends the run as any other does.

    Pass instances of subclasses to `train.train` or `main.main`; no method of the run needs to be replaced.
    """

    def before_training(self, run: Any) -> None:
        """Look at the run when everything is built and restored, and nothing is written yet."""

    def before_step(self, run: Any) -> None:
        """Look at the run with `run.iteration` set to the step that comes next and its batch fed to `run.model`."""

    def after_step(self, run: Any) -> None:
        """Look at the run after a step, before its log line, checkpoint and validation."""

    def before_save(self, run: Any) -> None:
        """Look at the run before a checkpoint of `run.iteration` is written."""

    def before_validation(self, run: Any) -> None:
        """Look at the run before its test sets are validated; a checkpoint that was due is committed."""


class HookList(Hooks):
    """Calls several hooks in order."""

    def __init__(self, hooks: Iterable[Hooks]):
        hooks = list(hooks)
        for name in vars(Hooks):
            if not name.startswith("_"):
                setattr(self, name, lambda run, name=name: [getattr(hook, name)(run) for hook in hooks])
