"""What a run says: on a real terminal of any width, through pipes, in CSV files that were torn, for TensorBoard."""

import csv
import fcntl
import io
import os
import pty
import re
import resource
import struct
import sys
import termios
import time
from functools import partial

import pytest

import main as door
from log import terminal
from log.run_log import RunLog
from log.tables import CsvTable
from log.terminal import Pace
from options import OptionError
from tests import tiny
from tests.conftest import write_json
from tests.programs import run_program


class Terminal:
    """A real pseudo-console, and what a person sees on it: lines that are too long wrap, `\\r` and ESC[K work."""

    def __init__(self, columns):
        self.master, slave = pty.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.said = b""
        self.resize(columns)

    def resize(self, columns):
        self.columns = columns
        fcntl.ioctl(self.stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read(self):
        self.stream.flush()
        os.set_blocking(self.master, False)
        while True:
            try:
                self.said += os.read(self.master, 65536)
            except BlockingIOError:
                return self.said.decode()

    def screen(self):
        """The lines on the screen. Fails where one would have wrapped while the window had its present width."""
        rows, line, column = [], {}, 0
        for token in re.findall(r"\x1b\[\d*[A-Za-z]|.", self.read(), re.DOTALL):
            if token == "\r":
                column = 0
            elif token == "\n":
                rows.append("".join(line[i] for i in sorted(line)))
                line, column = {}, 0
            elif token == "\x1b[K":
                line = {i: letter for i, letter in line.items() if i < column}
            elif not token.startswith("\x1b"):
                line[column] = token
                column += 1
                assert column < self.columns, f"the line fills {column} columns of {self.columns}"
        return [*rows, "".join(line[i] for i in sorted(line))]

    def close(self):
        self.stream.close()
        os.close(self.master)


@pytest.fixture
def console(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminals = []

    def make(columns):
        terminals.append(Terminal(columns))
        return terminals[-1]

    yield make
    for each in terminals:
        each.close()


def test_progress_is_cut_to_the_window_and_gone_before_a_line(console):
    screen = console(40)
    log = RunLog(screen.stream)
    for text in ("iter 1/9 | " + "x" * 100, "iter 2/9 | " + "y" * 28, "iter 3/9"):
        log.progress(text)
    assert screen.screen() == ["iter 3/9"]
    log.line("saved    here")
    log.progress("iter 4/9")
    log.close()
    assert screen.screen() == ["saved    here", ""]


def test_the_window_may_be_resized_or_have_no_size(console):
    screen = console(100)
    log = RunLog(screen.stream)
    log.progress("wide " * 30)
    assert len(screen.screen()[0]) == 99
    screen.said = b""
    screen.resize(20)
    log.progress("narrow " * 30)
    assert len(screen.screen()[0]) == 19
    screen.said = b""
    screen.resize(0)
    log.progress("unknown " * 30)
    screen.columns = 81
    assert len(screen.screen()[0]) == 79


def test_colours_only_on_status_words_of_a_terminal(console, monkeypatch, tmp_path):
    screen = console(80)
    log = RunLog(screen.stream)
    log.open(tmp_path, 0)
    log.line("warning  the disk is full")
    log.line("saved    here")
    assert screen.read() == "\x1b[33mwarning\x1b[0m  the disk is full\r\nsaved    here\r\n"
    assert "\x1b" not in (tmp_path / "train.log").read_text()
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
        plain = console(80)
        assert terminal.status("error:", plain.stream) == "error:"
        RunLog(plain.stream).line("warning  the disk is full")
        assert plain.read() == "warning  the disk is full\r\n"
        monkeypatch.delenv(name)


def test_a_pipe_gets_whole_lines_and_nothing_else(tmp_path, capfd):
    log = RunLog(sys.stdout)
    log.progress("iter 1")
    log.line("data     a\nb\x1b[2J")
    log.close()
    assert capfd.readouterr().out == "data     a?b?[2J\n"


def test_lines_of_several_processes_do_not_mix():
    reader, writer = os.pipe()
    children = []
    for rank in range(3):
        if not (child := os.fork()):
            log = RunLog(os.fdopen(writer, "w"))
            for i in range(150):
                log.line(f"iter     {rank} {i} " + str(rank) * 300)
            os._exit(0)
        children.append(child)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        lines = pipe.read().splitlines()
    for child in children:
        os.waitpid(child, 0)
    assert len(lines) == 450
    assert all(re.fullmatch(r"iter     (\d) \d+ \1{300}", line) for line in lines)


def test_quiet_prints_warnings_and_the_end_and_records_all(tmp_path, capfd):
    log = RunLog(sys.stdout, quiet=True)
    log.line("Perdure  a run")
    log.open(tmp_path, 0)
    log.line("iter 1")
    log.warn("the disk is full")
    log.line("finished 9 iterations")
    log.close()
    assert capfd.readouterr().out == "warning  the disk is full\nfinished 9 iterations\n"
    assert [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()] == [
        "Perdure  a run", "iter 1", "warning  the disk is full", "finished 9 iterations"]


def test_a_console_whose_reader_left_does_not_end_a_run(tmp_path):
    reader, writer = os.pipe()
    log = RunLog(os.fdopen(writer, "w"))
    log.open(tmp_path, 0)
    os.close(reader)
    log.line("iter 1")
    log.line("iter 2")
    log.close()
    assert (tmp_path / "train.log").read_text().count("iter") == 2


def test_a_full_disk_costs_no_row_and_no_run(tmp_path):
    log = RunLog(console := io.StringIO())
    log.open(tmp_path, 0)
    log.row("train", {"iteration": 1, "loss": 0.5})
    size = (tmp_path / "train.csv").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 3, before[1]))
    try:
        log.row("train", {"iteration": 2, "loss": 0.25})
        log.row("train", {"iteration": 3, "loss": 0.125})
        log.line("iter     a line that is longer than what there is room for")
        torn = (tmp_path / "train.csv").read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torn == b"iteration,loss\r\n1,0.5\r\n"
    log.row("train", {"iteration": 4, "loss": 0.0})
    log.line("iter     the next")
    log.close()
    with open(tmp_path / "train.csv", newline="") as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    assert (tmp_path / "train.log").read_text().count("iter ") == 2
    assert console.getvalue().count("train.csv can't be written: File too large; the next line tries again") == 1


# ---------------------------------------------------------------- CSV


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_table_torn_at_any_byte_is_cut_back_to_whole_rows(tmp_path):
    path = tmp_path / "train.csv"
    table = CsvTable(path, 0)
    for i in range(1, 4):
        table.append({"iteration": i, "name, of it": f'say "{i}"', "loss": i / 10})
    whole = path.read_bytes()
    assert whole.startswith(b'iteration,"name, of it",loss\r\n1,"say ""1""",0.1\r\n')
    for size in range(len(whole) + 1):
        for tail in (b"", b"\0\0\0\n\xff\n"):
            path.write_bytes(whole[:size] + tail)
            CsvTable(path, 2).append({"iteration": 3, "name, of it": 'say "3"', "loss": 0.3})
            found = [row["iteration"] for row in rows_of(path)]
            lines = max(0, whole[:size].count(b"\n") - 1)
            assert found == [*"12"[:lines], "3"], (size, tail)


def test_new_columns_leave_earlier_rows_empty_there(tmp_path):
    path = tmp_path / "train.csv"
    table = CsvTable(path, 0)
    table.append({"iteration": 1, "a": 1})
    table.append({"iteration": 2, "b": 2.5})
    assert path.read_bytes() == b"iteration,a,b\r\n1,1,\r\n2,,2.5\r\n"


def test_epochs_that_an_earlier_version_counted_from_0_are_raised_once(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b"iteration,epoch,epoch_loss\r\n1,0,\r\n2,0,0\r\n3,,0\r\n4,1,1\r\n5,2,2\r\n")
    for _ in range(2):
        CsvTable(path, 4)
        assert path.read_bytes() == b"iteration,epoch,epoch_loss\r\n1,1,\r\n2,1,0\r\n3,,0\r\n4,2,1\r\n"


def test_a_table_that_another_program_wrote_in_its_own_way_is_kept(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("iteration;loss\n1;0,5\n")
    CsvTable(path, 9).append({"iteration": 2, "loss": 0.5})
    assert (tmp_path / "train.csv.old").read_text() == "iteration;loss\n1;0,5\n"
    assert path.read_bytes() == b"iteration,loss\r\n2,0.5\r\n"
    path.write_bytes("\ufeffiteration,loss\n1,0.5\n".encode())  # a byte order mark, as spreadsheets write it
    assert CsvTable(path, 9).columns == ["iteration", "loss"] and len(rows_of(path)) == 1


def test_a_torn_line_of_the_log_is_ended_before_the_next(tmp_path):
    (tmp_path / "train.log").write_text("2026-01-01 00:00:00 iter 1\n2026-01-01 00:00:01 ite")
    log = RunLog(sys.stdout)
    log.open(tmp_path, 0)
    log.line("resume   from 300")
    log.close()
    assert (tmp_path / "train.log").read_text().splitlines()[2].endswith("resume   from 300")


# ---------------------------------------------------------------- rate and time left


def test_rate_is_this_launchs_and_time_left_has_its_share_of_validations(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace(900, 1000)
    assert pace.describe(900) == "-- it/s"
    now[0] += 5
    assert pace.describe(910) == "2.00 it/s, 00:45 left"
    now[0] += 5  # of these, a validation took
    pace.paused += 5
    assert pace.describe(910) == "2.00 it/s, 01:30 left"
    assert Pace(0, 1).describe(0) == "-- it/s"


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_asked_for_and_absent_is_one_line(tmp_path, monkeypatch, tiny_tables):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    file = write_json(tmp_path / "o.json", tiny.options(tmp_path, "run"))
    with pytest.raises(OptionError, match=r"TensorBoard is not installed; pip install tensorboard"):
        door.main(["-opt", str(file), "--tensorboard"])
    assert not (tmp_path / "run").exists()


def test_tensorboard_draws_no_step_twice_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tree = tiny.options(tmp_path, "run", log={"tensorboard": True}, val={"save_img": True})
    file = write_json(tmp_path / "o.json", tree)
    assert run_program(tmp_path, "-opt", file, before=partial(tiny.die_at, 100)).returncode == -9
    done = rows_of(tmp_path / "run" / "log" / "train.csv")
    assert 4 < len(done) < 9, "to be killed in the middle; choose another operation"
    assert run_program(tmp_path, "-opt", file).returncode == 0
    folder = tmp_path / "run" / "log"
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    for table in ("train", "test"):
        rows = rows_of(folder / f"{table}.csv")
        for column in set(rows[0]) - {"iteration"}:
            events = found.Scalars(f"{table}/{column}")
            assert [event.step for event in events] == [int(row["iteration"]) for row in rows], column
            assert [event.value for event in events] == pytest.approx([float(row[column]) for row in rows])
    assert [event.step for event in found.Images("test/0")] == [3, 6, 9]
    assert "_hparams_/session_start_info" in found.summary_metadata


def test_flags_reach_the_log(tmp_path, tiny_tables, capfd):
    file = write_json(tmp_path / "o.json", tiny.options(tmp_path, "run", {"total_iter": 2, "checkpoint_test": 0}))
    assert door.main(["-opt", str(file), "--quiet"]) == 0
    assert capfd.readouterr().out == f"finished 2 iterations in {tmp_path / 'run'}\n"
    with pytest.raises(OptionError, match="log.loud: unknown key"):
        door.main(["-opt", str(file), "--set", "log.loud=true"])
