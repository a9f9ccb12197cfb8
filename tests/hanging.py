"""`python -m tests.hanging KIND ...`: main.py with the rows of tests/tiny.py; at first rank 1 hangs after step 9.

KIND: "stopped" (SIGSTOP), "worker" (a data worker waits for ever), "read" (a file that never answers), "step".
"""

import os
import signal
import sys
import tempfile

from runtime.hooks import Hooks
from tests import tiny


class Silent:
    """A dataset of which no sample ever comes."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        pipe = os.path.join(tempfile.mkdtemp(), "pipe")
        os.mkfifo(pipe)
        return open(pipe).read()


class Hang(Hooks):
    def __init__(self, kind):
        self.kind = kind

    def before_training(self, run):
        if self.kind in ("worker", "read") and run.iteration:
            run.train_set = Silent(run.train_set)

    def after_step(self, run):
        if run.iteration == 9 and self.kind in ("stopped", "step"):
            os.kill(os.getpid(), signal.SIGSTOP) if self.kind == "stopped" else signal.pause()


if __name__ == "__main__":
    for table, name, row in tiny.ROWS:
        table[name] = row
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and os.environ.get("RANK", "1") == "1"
    tiny.door.program(sys.argv[2:], hooks=[Hang(sys.argv[1])] if first else [])
