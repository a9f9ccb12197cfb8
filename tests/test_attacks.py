"""Bit flips, power loss, full and failing disks, hostile files: nothing committed is lost, nothing bad is used."""

import argparse
import builtins
import collections
import errno
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch

import checkpoint
from checkpoint import CheckpointError, Layout, Saver, commit, find_newest, locate
from commands import checkpoints
from storage import files, inert, sealed
from tests.conftest import ROOT
from tests.programs import run_program
from tests.test_checkpoint import flip, parts

LAYOUTS = {"split": Layout(), "bundle": Layout("bundle", name="it{iter}.pt")}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def value(found):
    """The number that `parts` was made with, if every part of the set agrees on it."""
    loaded = found.load()
    assert loaded["state"]["iteration"] == found.iteration
    (number,) = loaded["G"]["w"].unique().tolist()
    return number


# ---------------------------------------------------------------- corruption


def test_a_thousand_damages_are_all_caught(tmp_path, layout):
    """500 for each layout: single bits anywhere, also in records and seals, cut ends, zeroed ends, swapped files."""
    for n in (1, 2):
        commit(tmp_path, n, parts(n), layout)
    newest = find_newest(tmp_path)
    victims = {path: path.read_bytes() for path in {newest.path, *newest.files.values()}}
    older = {path.name.replace("1", "2", 1): path.read_bytes() for path in tmp_path.iterdir() if path not in victims}
    dice = random.Random(0)
    for trial in range(500):
        path = dice.choice(sorted(victims))
        data = bytearray(victims[path])
        kind = trial % 10
        if kind < 7:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        elif kind == 7:
            del data[dice.randrange(len(data)):]
        elif kind == 8:
            tail = dice.randrange(1, len(data))
            data[-tail:] = bytes(tail)
        else:
            data = older[path.name]
        path.write_bytes(data)
        said = []
        found = find_newest(tmp_path, said.append)
        assert found.iteration == 1 and value(found) == 1 and len(said) == 1, (path.name, kind, said)
        with pytest.raises(CheckpointError):
            locate(newest.path).load()
        path.write_bytes(victims[path])
    assert value(find_newest(tmp_path)) == 2


def test_a_single_file_far_from_its_set_is_verified_too(tmp_path):
    commit(tmp_path, 1, parts(1))
    copy = shutil.copy(tmp_path / "1_G.pth", tmp_path / "weights.pth")
    assert torch.equal(checkpoint.load_file(copy)["w"], torch.ones(64))
    flip(tmp_path / "weights.pth", 0.4)
    assert torch.load(copy, weights_only=True)  # torch alone does not notice
    with pytest.raises(CheckpointError, match="weights.pth: damaged"):
        checkpoint.load_file(copy)


# ---------------------------------------------------------------- power loss


class Disk:
    """Records file operations below a folder, and rebuilds what a power loss after any of them may leave.

    A file's content is on the disk once it was fsynced; a folder's entry once the folder was.
    """

    def __init__(self, root, monkeypatch):
        self.root, self.log, self.live, self.count = root, [], {}, 0
        for name in ("replace", "link", "unlink"):
            monkeypatch.setattr(os, name, self.entry(getattr(os, name), name))
        monkeypatch.setattr(os, "fsync", self.fsync(os.fsync))
        monkeypatch.setattr(builtins, "open", self.open(builtins.open))

    def mine(self, path):
        return os.fspath(path).startswith(str(self.root)) if isinstance(path, (str, os.PathLike)) else False

    def open(self, real):
        def call(path, mode="r", *args, **kwargs):
            file = real(path, mode, *args, **kwargs)
            if "w" in mode and self.mine(path):
                self.count += 1
                self.live[str(path)] = self.count
                self.log.append(("entries", {str(path): self.count}))
            return file

        return call

    def entry(self, real, name):
        def call(*paths, **kwargs):
            try:
                real(*paths, **kwargs)
            except FileNotFoundError:
                raise
            a, b = str(paths[0]), str(paths[-1])
            if self.mine(a):
                change = {a: None} if name == "unlink" else {b: self.live[a]} if name == "link" else \
                    {a: None, b: self.live[a]}
                self.live.update(change)
                self.log.append(("entries", change))

        return call

    def fsync(self, real):
        def call(descriptor):
            real(descriptor)
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isdir(path):
                self.log.append(("folder", path))
            elif self.mine(path):
                with os.fdopen(os.open(path, os.O_RDONLY), "rb") as file:
                    self.log.append(("content", self.live[path], file.read()))

        return call

    def after(self, operations, kept):
        """Entries {path: content} after so many operations; `kept(change)` says whether an unsynced entry made it."""
        entries, pending, contents = {}, [], {}
        for what, *facts in self.log[:operations]:
            if what == "entries":
                pending.append(facts[0])
            elif what == "content":
                contents[facts[0]] = facts[1]
            elif what == "folder":
                for change in [c for c in pending if any(os.path.dirname(path) == facts[0] for path in c)]:
                    entries.update(change)
                    pending.remove(change)
        for change in pending:
            if kept(change):
                entries.update(change)
        return {path: contents.get(number, b"") for path, number in entries.items() if number is not None}


@pytest.mark.parametrize("layout, background", [("split", False), ("bundle", True)])
def test_power_loss_after_any_file_operation_leaves_a_complete_set(tmp_path, monkeypatch, layout, background):
    models, after = tmp_path / "run", tmp_path / "after"
    models.mkdir(), after.mkdir()
    acknowledged = []  # (operations done, iteration that save had returned for)
    with monkeypatch.context() as patch:
        disk = Disk(models, patch)
        saver = Saver(models, LAYOUTS[layout], keep_last_n=2, background=background)
        for n, reason in enumerate(("regular best interrupted regular interrupted regular regular").split(), 1):
            saver.save(n, parts(n), best=2 if n < 4 else 4, reason=reason, epoch=n)
            saver.wait()
            saver.poll()
            acknowledged.append((len(disk.log), n))
    assert len(disk.log) > 40
    dice = random.Random(0)
    for done in range(acknowledged[0][0], len(disk.log) + 1):
        promised = max(n for operations, n in acknowledged if operations <= done)
        for kept in (lambda _: False, lambda _: True, lambda _: dice.random() < 0.5):
            for path, content in disk.after(done, kept).items():
                (after / os.path.basename(path)).write_bytes(content)
            said = []
            found = find_newest(after, said.append)
            assert found and found.iteration >= promised, (done, promised, disk.log[done - 1][:2])
            assert not said and not any(s.fault() for s in checkpoint.find_sets(after)), done  # nothing is half there
            assert value(found) == found.iteration
            checkpoint.clean(after)
            assert find_newest(after).iteration == found.iteration and not list(after.glob("*.tmp"))
            for path in after.iterdir():
                path.unlink()


# ---------------------------------------------------------------- disks that refuse


@pytest.mark.parametrize("call", ["fsync", "replace", "link", "write"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_an_error_at_any_operation_is_said_and_harms_nothing(tmp_path, monkeypatch, layout, call, number):
    saver, real = Saver(tmp_path, layout), files._Writer.write if call == "write" else getattr(os, call)
    saver.save(1, parts(1), best=1)
    saver.poll()
    for failing in range(0, 1000, 13 if call == "write" else 1):
        left = iter(range(failing, -1, -1))

        def refuse(*args, left=left, **kwargs):
            if next(left, 1) == 0:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        saver.pending = None
        with monkeypatch.context() as patch:
            patch.setattr(files._Writer, "write", refuse) if call == "write" else patch.setattr(os, call, refuse)
            try:
                saver.save(2, parts(2), best=2)
                refused = False
            except OSError:
                refused = True
        assert not list(tmp_path.glob("*.tmp"))
        found = find_newest(tmp_path)
        assert found.fault() is None and value(found) == found.iteration
        assert all((tmp_path / name).exists() for name in before if name not in ("latest.json", "best.json"))
        if not refused:
            break
        if call != "link" and found.iteration == 1:
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        for path in tmp_path.iterdir():  # back to the first for the next trial
            path.unlink()
        for name, data in before.items():
            (tmp_path / name).write_bytes(data)
    spared = call == "link" or call == "fsync" and number == errno.EACCES  # copies; folders without fsync
    assert found.iteration == 2 and (failing > 2 or spared)


def test_a_file_size_limit_leaves_nothing_partial(tmp_path, layout):
    commit(tmp_path, 1, parts(1), layout)
    before, limits = sorted(os.listdir(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            commit(tmp_path, 2, parts(2) | {"E": {"w": torch.randn(100_000)}}, layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path)) == before and find_newest(tmp_path).fault() is None


def test_space_is_checked_before_anything_is_written(tmp_path, monkeypatch, layout):
    commit(tmp_path, 1, parts(1), layout)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    monkeypatch.setattr(files, "write_durably", None)
    with pytest.raises(OSError, match=r"has 10.0 kB free, 8\d\d\.\d kB are needed"):
        commit(tmp_path, 2, parts(2) | {"E": {"w": torch.randn(200_000)}}, layout)
    assert find_newest(tmp_path).iteration == 1


def test_a_full_small_disk_keeps_what_it_has(tmp_path, monkeypatch, layout):
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        commit(tmp_path, 1, parts(1), layout)
        (tmp_path / "other.bin").write_bytes(bytes(60_000))
        for checked in (True, False):  # refused by the check before, and by the disk in the middle
            with monkeypatch.context() as patch, pytest.raises((OSError, RuntimeError)):
                if not checked:
                    patch.setattr(checkpoint, "check_space", lambda *_: None)
                commit(tmp_path, 2, parts(2) | {"E": {"w": torch.randn(40_000)}}, layout)
            assert not list(tmp_path.glob("*.tmp")) and find_newest(tmp_path).iteration == 1
        (tmp_path / "other.bin").unlink()
        commit(tmp_path, 2, parts(2), layout)
        assert value(find_newest(tmp_path)) == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---------------------------------------------------------------- hostile files


CALLS = [("os", "system"), ("posix", "system"), ("os", "popen"), ("os", "remove"), ("builtins", "eval"),
         ("builtins", "exec"), ("builtins", "compile"), ("builtins", "__import__"), ("builtins", "open"),
         ("builtins", "getattr"), ("subprocess", "Popen"), ("subprocess", "call"), ("runpy", "run_path"),
         ("importlib", "import_module"), ("shutil", "rmtree"), ("pickle", "loads"), ("torch", "load"),
         ("torch.hub", "load"), ("torch.serialization", "add_safe_globals"), ("ctypes", "CDLL"), ("pty", "spawn"),
         ("webbrowser", "open"), ("functools", "partial"), ("operator", "attrgetter"), ("types", "SimpleNamespace"),
         ("numpy", "load"), ("pathlib", "Path.touch"), ("code", "interact")]
ONLY_ODD = ("builtins.getattr", "functools.partial", "operator.attrgetter", "types.SimpleNamespace",
            "pathlib.Path.touch")  # not what only a hostile file asks for


class Call:
    """Pickles to a call of any function: what a hostile file is made of."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __reduce__(self):
        target = __import__(self.module, fromlist=["_"])
        for part in self.name.split("."):
            target = getattr(target, part)
        return target, ("touch HOSTILE" if self.name in ("system", "popen", "call") else "HOSTILE",)


@pytest.mark.parametrize("module, name", CALLS, ids=[".".join(c) for c in CALLS])
def test_no_file_that_can_be_read_runs_code(tmp_path, monkeypatch, capsys, module, name):
    """In each part of a set with a good record, in a bundle with a good seal, and in files of others."""
    monkeypatch.chdir(tmp_path)
    hostile = {"x": Call(module, name)}
    files = []
    for label in ("G", "optimizerG", "state"):
        folder = tmp_path / label
        folder.mkdir()
        commit(folder, 1, parts(1) | {label: parts(1)[label] | hostile})
        files.append(folder / "1.json")
    checkpoint.save_bundle(tmp_path / "all.pt", parts(1) | {"state": parts(1)["state"] | hostile}, {"iteration": 1})
    torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": 3, "callbacks": Call(module, name)}, "other.ckpt")
    torch.save({"w": Call(module, name)}, "weights.pth", _use_new_zipfile_serialization=False)
    for path in (*files, tmp_path / "all.pt", tmp_path / "other.ckpt", tmp_path / "weights.pth"):
        if path.name == "other.ckpt" and f"{module}.{name}" in ONLY_ODD:  # outside of what is used: stands there, inert
            assert locate(path).load()["state"]["iteration"] == 3
            continue
        with pytest.raises(CheckpointError, match="refused: it asks for|holds no weights") as caught:
            locate(path).load()
        assert "\n" not in str(caught.value)
        assert checkpoints.main(["convert", str(path), "--to", "weights", str(tmp_path / "out.pth")]) == 2
        assert checkpoints.main(["inspect", str(path), "--options"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 2 and "Traceback" not in said
    assert not os.path.exists("HOSTILE") and not os.path.exists("out.pth")


@pytest.mark.parametrize("flag", ["--resume", "--init-from"])
def test_main_rejects_hostile_files(tmp_path, flag):
    torch.save({"params": {"w": torch.ones(1)}, "x": Call("os", "system")}, tmp_path / "bad.pth")
    done = run_program(tmp_path, "-opt", ROOT / "options/train_vrt.json", "--set", f"path.root={tmp_path}",
                       flag, tmp_path / "bad.pth", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "refused: it asks for posix.system" in done.stderr
    assert not (tmp_path / "HOSTILE").exists() and not (tmp_path / "train_vrt").exists()


@pytest.mark.parametrize("name", ["../7_G.pth", "/etc/7_G.pth", "8_G.pth", "7_G.pth/x", "7.json", "7_G.pth\0"])
def test_a_record_that_leads_elsewhere_is_refused(tmp_path, name):
    commit(tmp_path, 7, parts(7))
    record = sealed.verified((tmp_path / "7.json").read_bytes())
    record["files"][name] = record["files"].pop("7_G.pth")
    (tmp_path / "7.json").write_bytes(sealed.with_checksum(record))
    said = []
    assert find_newest(tmp_path, said.append) is None and "it names" in said[0]


def test_a_member_that_is_a_link_to_elsewhere_is_refused(tmp_path):
    commit(tmp_path, 7, parts(7))
    shutil.move(tmp_path / "7_G.pth", tmp_path / "secret.bin")
    os.symlink(tmp_path / "secret.bin", tmp_path / "7_G.pth")
    said = []
    assert find_newest(tmp_path, said.append) is None and "it names '7_G.pth'" in said[0]


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b'{"files": 3}', b'{"iteration": "x", "files": {}}',
                                  b"\xff\xfe"])
def test_rubbish_in_place_of_a_record_is_reported(tmp_path, text):
    commit(tmp_path, 7, parts(7))
    (tmp_path / "7.json").write_bytes(text)
    for content in (text, sealed.with_checksum(json.loads(text)) if text.startswith(b"{") else text):
        (tmp_path / "7.json").write_bytes(content)
        said = []
        assert find_newest(tmp_path, said.append) is None and len(said) == 1 and "record is damaged" in said[0]


def test_a_seal_is_not_taken_from_a_file_of_another_size(tmp_path):
    commit(tmp_path, 1, parts(1), LAYOUTS["bundle"])
    data = (tmp_path / "it1.pt").read_bytes()
    (tmp_path / "it1.pt").write_bytes(b"x" * 100 + data)
    assert "damaged" in sealed.find_fault(tmp_path / "it1.pt")


# ---------------------------------------------------------------- what is in a file of others


def with_pickle(path, program):
    """A torch file whose pickle is this."""
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, program if name.endswith("data.pkl") else data)
    return path


def doubled(op_in, op_out, times=60):
    """A value that holds the one before twice, so many times: small in the file, endless for who goes through it."""
    return op_in + b"".join(b"q%cr%sh%c" % (i, struct.pack("<I", 300 + i), i) + op_out for i in range(times))


class Trap:
    """Writes a file when it is imported, made, called, filled, set or hashed."""

    def __new__(cls, *_):
        open("HOSTILE", "w").close()
        return object.__new__(cls)

    __setstate__ = __setitem__ = append = extend = __call__ = __reduce__ = __hash__ = __new__


HERE = b"ctests.test_attacks\nTrap\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n("
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x02tQ"
PROGRAMS = {
    "made": (HERE + b")R", "stands"), "made by __new__": (HERE + b")\x81", "stands"),
    "set": (HERE + b")R}X\x01\0\0\0aK\x01sb", "stands"),
    "set by slots": (HERE + b")RN}X\x01\0\0\0aK\x01s\x86b", "stands"),
    "filled": (HERE + b")RK\x01a", "stands"), "filled by keys": (HERE + b")RK\x01K\x02s", "stands"),
    "called twice": (HERE + b")R)R", "stands"), "a key": (b"}" + HERE + b")RK\x01s", "stands"),
    "by instance": (b"(K\x01itests.test_attacks\nTrap\n", "stands"), "by object": (b"(" + HERE + b"K\x01o", "stands"),
    "a module that is nowhere": (b"cno_such_module\nThing\n)R", "stands"),
    "a method of a call": (b"cbuiltins\ngetattr\n" + HERE + b"X\x06\0\0\0append\x86RK\x01\x85R", "stands"),
    "a function of torch is changed": (b"ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\0\0\0__defaults__Nsb", "stands"),
    "system": (b"cos\nsystem\nX\x0d\0\0\0touch HOSTILE\x85R", "it asks for os.system"),
    "system within": (b"cbuiltins\ngetattr\n(cos\nsystem\nX\x08\0\0\0__call__tR", "it asks for os.system"),
    "eval by stack": (b"X\x08\0\0\0builtinsX\x04\0\0\0eval\x93X\x01\0\0\0" + b"1\x85R", "asks for builtins.eval"),
    "lists in lists": (doubled(b"]", b"\x86"), "too many values"),
    "a list in itself": (b"]q\0h\0a", "holds too many values, or itself"),
    "tuples as a key": (b"}" + doubled(b")", b"\x86") + b"K\x01s", "too many values"),
    "a path of tuples": (b"cpathlib\nPosixPath\n" + doubled(b")", b"\x86") + b"\x85R", "too many values"),
    "a tensor beyond its data": (TENSOR + STORAGE + b"K\0J\xff\xff\xff\x7f\x85K\x01\x85\x89}tR", "beyond its data"),
    "a tensor before its data": (TENSOR + STORAGE + b"J\xf0\xff\xff\xffK\x01\x85K\x01\x85\x89}tR", "beyond its data"),
    "an extension": (b"\x82\x01", "torch does not write"), "no end": (b"K\x01K\x02", "damaged .EOFError"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_pickle_of_others_is_read_and_never_run(tmp_path, monkeypatch, name):
    """Each instruction that could run something, in a file that weights_only refuses; as zip archive and as old row."""
    monkeypatch.chdir(tmp_path)
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    program, expected = PROGRAMS[name]
    program = b"\x80\x02}X\x04\0\0\0oddlcno_such_module\nOdd\nsX\x01\0\0\0x" + program
    program += b"" if name == "no end" else b"s."
    rows = b"".join(pickle.dumps(head, 2) for head in (inert.MAGIC, 1001, {"little_endian": True}))
    old = tmp_path / "old.pth"
    old.write_bytes(rows + program + pickle.dumps(["0"] if STORAGE in program else [], 2)
                    + (struct.pack("<qff", 2, 1, 1) if STORAGE in program else b""))
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "no_such_module", raising=False)
        for path in (with_pickle(tmp_path / "new.pth", program), old):
            if expected == "stands":
                assert isinstance(inert.read(path)["oddl"], inert.Unread)
            else:
                with pytest.raises(ValueError, match=expected):
                    inert.read(path)
                with pytest.raises(CheckpointError, match="refused|can't be read|damaged") as caught:
                    sealed.load_file(path)
                assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not os.path.exists("HOSTILE") and torch._utils._rebuild_tensor_v2.__defaults__ == defaults


def test_an_old_file_that_promises_more_than_it_has_takes_no_memory(tmp_path):
    huge = STORAGE.replace(b"K\x02tQ", b"\x8a\x05" + b"\xff" * 4 + b"\x7ftQ")
    program = b"\x80\x02}X\x01\0\0\0x" + TENSOR + huge + b"K\0K\x01\x85K\x01\x85\x89}tRs."
    rows = b"".join(pickle.dumps(head, 2) for head in (inert.MAGIC, 1001, {"little_endian": True}))
    (tmp_path / "x.pth").write_bytes(rows + program + pickle.dumps(["0"], 2))
    with pytest.raises(ValueError, match="not all there"):
        inert.read(tmp_path / "x.pth")


def test_every_instruction_that_torch_and_numpy_write_is_understood(tmp_path):
    """The same values as torch's own reader gives, by each protocol, in the old layout too."""
    weights = {"w": torch.randn(3, 4).t(), "half": torch.ones(5, dtype=torch.bfloat16), "none": torch.empty(0, 3),
               "number": torch.tensor(3), "parameter": torch.nn.Parameter(torch.ones(2))}
    plain = {"a": [1, 2.5, None, True, "text", b"bytes", (1, (2,)), -5, 2**80], "c": collections.OrderedDict(b=1)}
    odd = {"path": checkpoint.Path("/a/b"), "default": collections.defaultdict(list, {"k": [1]}), "set": {1},
           "options": argparse.Namespace(lr=0.1, inner=argparse.Namespace(n=2)), "size": torch.Size([1, 2])}
    odd |= {"scalar": torch.ones(1).numpy()[0], "array": torch.arange(6.0).reshape(2, 3).numpy().T}
    for protocol in (2, 3, 4, 5):
        for zipped in (True, False):
            torch.save(weights | plain | odd, tmp_path / "x.pth", pickle_protocol=protocol,
                       _use_new_zipfile_serialization=zipped)
            found = inert.read(tmp_path / "x.pth")
            for key, value in weights.items():
                assert torch.equal(found[key], value) and found[key].dtype == value.dtype
                assert found[key].stride() == value.stride()
            assert {key: found[key] for key in plain} == plain and found["path"] == "/a/b" and found["set"] == [1]
            assert found["default"] == {"k": [1]} and found["options"] == {"lr": 0.1, "inner": {"n": 2}}
            assert found["scalar"] == 1 and found["size"] == (1, 2)
            assert torch.equal(found["array"], torch.arange(6.0).reshape(2, 3).t())


@pytest.mark.parametrize("kind", ["plain", "with objects"])
def test_damage_in_the_directory_of_anothers_archive_is_one_line(tmp_path, kind):
    """Each byte of its end: sizes, flags, offsets, names; zipfile fails in as many ways."""
    payload = {"state_dict": parts(2.0)["G"], "global_step": 2}
    torch.save(payload if kind == "plain" else payload | {"hp": argparse.Namespace(lr=1)}, tmp_path / "last.ckpt")
    data = (tmp_path / "last.ckpt").read_bytes()
    for at in range(data.index(b"PK\x01\x02"), len(data)):
        (tmp_path / "last.ckpt").write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        said = []
        try:
            found = find_newest(tmp_path, said.append)
            assert found is None and (said or checkpoint.has_checkpoints(tmp_path)) or \
                torch.equal(found.load()["G"]["w"], torch.full((64,), 2.0))
            locate(tmp_path / "last.ckpt").load()
        except CheckpointError as error:
            assert "\n" not in str(error)


KINDS = {"a web page": (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page, not a checkpoint"),
         "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
         "safetensors": (struct.pack("<Q", 40) + b'{"w":{"dtype":"F32","shape":[0],"data_of' + bytes(9), "safetensors"),
         "gzip": (b"\x1f\x8b" + bytes(40), "is a gzip archive"), "HDF5": (b"\x89HDF\r\n" + bytes(40), "is an HDF5"),
         "tar": (b"x" * 257 + b"ustar" + bytes(250), "is a tar archive"),
         "text": (b"hello there, this is text", "refused|damaged")}


@pytest.mark.parametrize("kind", KINDS)
def test_what_only_is_called_a_checkpoint_is_called_by_its_name(tmp_path, kind):
    content, words = KINDS[kind]
    for name in ("model.ckpt", "weights.pth", "5_G.pth"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=words) as caught:
            checkpoint.read_weights(tmp_path / name)
        assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    (tmp_path / "run").mkdir()
    os.replace(tmp_path / "model.ckpt", tmp_path / "run/model.ckpt")
    said = []
    assert find_newest(tmp_path / "run", said.append) is None and checkpoint.has_checkpoints(tmp_path / "run")
    assert any(sealed.re.search(words, line) for line in said)
