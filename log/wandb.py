"""Write the tables for Weights & Biases, where it is installed."""

from __future__ import annotations

import contextlib
import importlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from options import OptionError


def wandb_module() -> Any:
    """Import wandb. Raises: OptionError when it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise OptionError("log.wandb: wandb is not installed; pip install wandb, or leave the option out: log/*.csv "
                          "has the same numbers") from None


class WandbBoard:
    """Writes the tables as `<table>/<column>` over the iteration, with pictures, and the options as its config.

    All launches of a run are one run there; what a launch repeats is not written again.

    Args:
        module: wandb. folder: of the logs. iteration: that the launch resumes from.
        settings: the options as {"a.b": value}.
    Raises: OSError: wandb cannot begin.
    """

    name = "Weights & Biases"

    def __init__(self, module: Any, folder: Path, iteration: int, settings: Mapping[str, Any]):
        self.module, self.path, kept = module, folder / "wandb.json", {}
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(self.path.read_text()) if iteration else {}
        self.id, self.written = kept.get("id") or secrets.token_hex(4), kept.get("written", {})
        try:
            self.run = module.init(project="perdure", name=settings.get("task"), id=self.id, resume="allow",
                                   dir=str(folder), config=dict(settings))
            self.run.define_metric("*", step_metric="iteration")
        except Exception as error:  # its own class, which depends on the version
            raise OSError(str(error)) from error

    def row(self, table: str, values: Mapping[str, Any]) -> None:
        """Write the numbers of a row, unless an earlier launch did."""
        if values["iteration"] > self.written.get(table, 0):
            self.run.log({"iteration": values["iteration"]} | {
                f"{table}/{key}": value for key, value in values.items()
                if key != "iteration" and isinstance(value, (int, float))})
            self.written[table] = values["iteration"]
            self.path.write_text(json.dumps({"id": self.id, "written": self.written}))

    def picture(self, tag: str, picture: Tensor, iteration: int | None) -> None:
        """Write a picture (C, H, W) in [0, 1]."""
        image = self.module.Image((picture.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())
        self.run.log({"iteration": iteration, tag: image})

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()
