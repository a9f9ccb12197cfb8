"""safetensors files: the bytes of the original package, every use of weights, and damage called in one line."""

import importlib
import json
import os
import runpy
import struct
import subprocess
import sys

import pytest
import torch

import checkpoint
from checkpoint import CheckpointError
from commands.checkpoints import main as command
from storage import safetensors
from tests import tiny
from tests.conftest import write_json
from tests.programs import fork, print_to
from tests.runs import run

pytestmark = pytest.mark.usefixtures("tiny_tables")


def every_type():
    """A tensor of each type, with odd sizes, no elements, no axes and other strides."""
    made = {f"z.{name}": torch.arange(3).to(dtype) for name, dtype in safetensors.TYPES.items()}
    return {**made, "a.b": torch.randn(5, 3).T, "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5),
            "läng\n": torch.ones(1, dtype=torch.uint8)}


def test_files_are_to_the_byte_those_of_the_package(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="the safetensors package is not installed")
    tensors = every_type()
    theirs = package.save({name: value.contiguous() for name, value in tensors.items()}, metadata={"format": "pt"})
    assert safetensors.encode(tensors) == theirs
    (tmp_path / "x.safetensors").write_bytes(theirs)
    read = checkpoint.load_file(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype and read[name].shape == value.shape
        assert read[name].reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()
        assert read[name].untyped_storage().nbytes() == value.nbytes


def test_weights_go_out_and_come_back_in_everywhere(tmp_path, capsys):
    """The same weights by --init-from, pretrained_netG, --test --resume and compare."""
    net = tiny.Net()
    torch.save(net.state_dict(), tmp_path / "G.pth")
    out = tmp_path / "G.safetensors"
    words = ["convert", str(tmp_path / "G.pth"), "--to", "safetensors", str(out)]
    assert command(words) == 0 and "a safetensors file" in capsys.readouterr().out
    assert command(words) == 2 and "exists already" in capsys.readouterr().err
    assert command(["compare", str(tmp_path / "G.pth"), str(out)]) == 0
    assert command(["inspect", str(out)]) == 0 and command(["verify", str(out)]) == 0
    for name, flags, path in (("init", ["--init-from", out], {}), ("pre", [], {"pretrained_netG": str(out)})):
        tree = tiny.options(tmp_path, name, train={"total_iter": 1})
        tree["path"] |= path
        assert run("-opt", write_json(tmp_path / f"{name}.json", tree), *flags) == 0
    one, two = (checkpoint.load_file(tmp_path / name / "models/1_G.pth") for name in ("init", "pre"))
    assert all(torch.equal(one[key], two[key]) for key in one) and not torch.equal(one["body.0.weight"],
                                                                                   net.state_dict()["body.0.weight"])
    capsys.readouterr()
    assert run("-opt", tmp_path / "init.json", "--test", "--resume", out) == 0
    assert f"G of {out}: 9 of 9 tensors loaded" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="holds weights only, no iteration; start from them with --init-from"):
        run("-opt", tmp_path / "init.json", "--resume", out)


GOOD = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
SECOND = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}


def file_of(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def changed(**values):
    return {"w": {**GOOD["w"], **values}}


HOSTILE = {
    "length beyond the file": (file_of(GOOD, 8, 10**6), "header takes 1,000,000 bytes"),
    "length of 64 bits": (file_of(GOOD, 8, 2**64 - 1), "header takes 18,446,744,073,709,551,615 bytes"),
    "no length": (b"\x01\x02", "damaged"),
    "overlap": (file_of({**GOOD, "v": {**SECOND, "data_offsets": [4, 8]}}, 8), "'v' overlaps"),
    "the same place twice": (file_of({**GOOD, "v": GOOD["w"]}, 8), "overlaps"),
    "gap": (file_of({**GOOD, "v": {**SECOND, "data_offsets": [12, 16]}}, 16), "'v' .* leaves a gap"),
    "bytes left over": (file_of(GOOD, 9), "take 8 bytes and 9 are there"),
    "end missing": (file_of(GOOD, 7), "take 8 bytes and 7 are there"),
    "name twice": (file_of(b'{"w":%s,"w":%s}' % ((json.dumps(GOOD["w"]).encode(),) * 2), 8), "has a name twice"),
    "key twice": (file_of(b'{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', 8), "a name twice"),
    "unknown type": (file_of(changed(dtype="F4"), 8), "of type 'F4'; valid: U64"),
    "type of another kind": (file_of(changed(dtype=["F32"]), 8), "of type"),
    "shape too large": (file_of(changed(shape=[3]), 8), "the shape of 'w' does not fit its 8 bytes"),
    "sizes below zero": (file_of(changed(shape=[-1, -2]), 8), "shape of 'w'"),
    "a product of 2**64 + 2": (file_of(changed(shape=[2**32 + 1, 2**32 - 1]), 8), "shape of 'w'"),
    "sizes that are not whole": (file_of(changed(shape=[2.0]), 8), "shape of 'w'"),
    "true as a size": (file_of(changed(shape=[2, True]), 8), "shape of 'w'"),
    "end before start": (file_of(changed(data_offsets=[8, 0]), 8), "no valid data_offsets"),
    "offsets below zero": (file_of(changed(data_offsets=[-8, 0]), 8), "no valid data_offsets"),
    "no offsets": (file_of({"w": {"dtype": "F32", "shape": [2]}}, 8), "no valid data_offsets"),
    "no tensor": (file_of({"w": 3}, 8), "no valid data_offsets"),
    "list": (file_of([GOOD], 8), "not a table of tensors"),
    "nested": (file_of(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 8), "nested too deeply"),
    "not UTF-8": (file_of(b'{"\xff":1}', 0), "utf-8"),
    "no JSON": (file_of(b'{"w":', 0), "damaged"),
    "a number of 9,999 digits": (file_of(b'{"w":' + b"9" * 9999 + b"}", 0), "damaged"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_refused_in_one_line(tmp_path, kind):
    content, words = HOSTILE[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.load_file(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    path.write_bytes(file_of(GOOD, 8))
    assert checkpoint.load_file(path)["w"].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["sampler_state", "epoch", "optimizers", "E", "params"])
def test_a_tensor_may_be_called_like_a_part_of_a_state(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.encode({name: torch.ones(2)}))
    assert list(checkpoint.read_weights(path)[0]) == [name]


def test_a_type_that_the_format_lacks_is_named(tmp_path, capsys):
    torch.save({"w": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "x.pth")
    assert command(["convert", str(tmp_path / "x.pth"), "--to", "safetensors", str(tmp_path / "out")]) == 2
    assert "w is torch.complex128" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- convert --trust

PROGRAM = """
import torch
class Net(torch.nn.Linear):
    pass
class Told:
    def __reduce__(self):
        return open, ("ran", "w")
"""


def trusted_here(words, output):
    """Be the process that `convert --trust` starts, forked."""
    print_to(f"{output}.out", f"{output}.err")
    os.chdir(os.path.dirname(words[1]))
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])  # as python FILE ... sets them
    runpy.run_path(words[0], run_name="__main__")


def test_only_trust_runs_the_code_in_a_file_and_only_in_its_own_process(tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs.py").write_text(PROGRAM)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        theirs = importlib.import_module("theirs")
        torch.save({"model": theirs.Net(2, 3), "epoch": 4, "args": [theirs.Net]}, tmp_path / "net.pth")
        torch.save(theirs.Told(), tmp_path / "told.pth")
        del sys.modules["theirs"]
    source, out = str(tmp_path / "net.pth"), tmp_path / "w.pth"
    assert command(["convert", source, "--to", "weights", str(out)]) == 2
    said = capsys.readouterr().err
    assert "theirs.Net" in said and "python -m checkpoint convert --trust" in said and not out.exists()
    assert command(["convert", source, "--to", "weights", str(out), "--trust"]) == 0
    assert {name: value.shape for name, value in checkpoint.load_file(out).items()} == {"weight": (3, 2), "bias": (3,)}
    assert "theirs" not in sys.modules

    def forked(words, cwd, **_):
        assert words[0] == sys.executable and cwd == tmp_path
        process = fork(trusted_here, words[1:], str(tmp_path / "said"))
        process.join(60)
        return subprocess.CompletedProcess(words, process.exitcode, "", (tmp_path / "said.err").read_text())

    monkeypatch.setattr(subprocess, "run", forked)  # the others quicker
    for trust in ([], ["--trust"]):
        words = ["convert", str(tmp_path / "told.pth"), "--to", "weights", str(tmp_path / "t.pth"), *trust]
        assert command(words) == 2 and (tmp_path / "ran").exists() == bool(trust) and not (tmp_path / "t.pth").exists()
    (tmp_path / "theirs.py").unlink()
    capsys.readouterr()
    assert command(["convert", source, "--to", "weights", str(tmp_path / "v.pth"), "--trust"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No module named 'theirs'" in said and "PYTHONPATH" in said
