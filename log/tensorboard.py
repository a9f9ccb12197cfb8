"""Write the tables for TensorBoard, where it is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from options import OptionError


def summary_writer() -> type:
    """Return TensorBoard's writer class. Raises: OptionError when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise OptionError("log.tensorboard: TensorBoard is not installed; pip install tensorboard, or "
                          "leave the option out: log/*.csv has the same numbers") from None
    return SummaryWriter


class Board:
    """Writes the tables for TensorBoard as `<table>/<column>`, with pictures, and the options as hparams.

    Args:
        writer: the class of the SummaryWriter, which purges the steps that the run repeats.
        folder: of the logs. iteration: that the launch resumes from. settings: the options as {"a.b": value}.
    """

    name = "TensorBoard"

    def __init__(self, writer: type, folder: Path, iteration: int, settings: Mapping[str, Any]):
        self.writer, self.settings = writer(str(folder / "tensorboard"), purge_step=iteration + 1), settings

    def row(self, table: str, values: Mapping[str, Any]) -> None:
        """Write the numbers of a row."""
        figures = {f"{table}/{key}": value for key, value in values.items()
                   if key != "iteration" and isinstance(value, (int, float))}
        for tag, value in figures.items():
            self.writer.add_scalar(tag, value, values["iteration"])
        if table == "test":
            self.write_settings(figures)
        self.writer.flush()  # a kill may come now, and steps before a checkpoint are not repeated

    def write_settings(self, metrics: Mapping[str, float]) -> None:
        """Write the hparams, once; TensorBoard needs the names of the metrics with them."""
        from torch.utils.tensorboard.summary import hparams

        settings = {key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
                    for key, value in self.settings.items() if value is not None}
        for summary in hparams(settings, dict(metrics)) if settings else ():
            self.writer.file_writer.add_summary(summary)
        self.settings = {}

    def picture(self, tag: str, picture: Tensor, iteration: int | None) -> None:
        """Write a picture (C, H, W) in [0, 1]."""
        self.writer.add_image(tag, picture, iteration)

    def close(self) -> None:
        """Write what is left and close the files."""
        self.write_settings({})
        self.writer.close()
