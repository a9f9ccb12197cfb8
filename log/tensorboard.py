"""The tables once more for TensorBoard, where it is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from options import OptionError


def summary_writer() -> type:
    """TensorBoard's writer. Raises: OptionError when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise OptionError("log.tensorboard: TensorBoard is not installed; pip install tensorboard, or leave "
                          "it out: log/*.csv has the same figures") from None
    return SummaryWriter


class Board:
    """The tables once more for TensorBoard, as `<table>/<column>`, with pictures and the options as hparams.

    Args:
        writer: a SummaryWriter that purges what the run repeats. settings: the options as {"a.b": value}.
    """

    def __init__(self, writer, settings: Mapping[str, Any]):
        self.writer, self.settings = writer, settings

    def row(self, table: str, values: Mapping[str, Any]) -> None:
        figures = {f"{table}/{key}": value for key, value in values.items()
                   if key != "iteration" and isinstance(value, (int, float))}
        for tag, value in figures.items():
            self.writer.add_scalar(tag, value, values["iteration"])
        if table == "test":
            self.tell_settings(figures)
        self.writer.flush()  # a kill may come at any time, and what lies before a checkpoint is not trained again

    def tell_settings(self, metrics: Mapping[str, float]) -> None:
        """The hparams, once; TensorBoard wants to know with them which metrics there are."""
        from torch.utils.tensorboard.summary import hparams

        settings = {key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
                    for key, value in self.settings.items() if value is not None}
        for summary in hparams(settings, dict(metrics)) if settings else ():
            self.writer.file_writer.add_summary(summary)
        self.settings = {}

    def picture(self, tag: str, picture: Tensor, iteration: int | None) -> None:
        self.writer.add_image(tag, picture, iteration)

    def close(self) -> None:
        self.tell_settings({})
        self.writer.close()
