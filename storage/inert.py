"""Read a torch file of others without running anything in it: plain values, tensors, and stand-ins for all the rest.

torch.load(weights_only=True) turns a whole file down for one unknown class anywhere in it. Here the instructions of the
pickle are gone through one by one, and only those that make plain values and tensors are carried out. No name in a file
is ever looked up, imported or called. What would be an object becomes an `Unread`, which has a name and does nothing.

Layouts of the files: torch/serialization.py (zip archive since 1.6, and the older row of pickles).
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

MAGIC = 0x1950A86A20F9469CFC6C  # of torch's older files
MOST = 20_000_000  # values in a file, those that are there twice counted twice: a small file can hold very many
STORAGES = {f"torch.{name}Storage": kind for name, kind in {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}.items()}
STORAGES["torch.storage.UntypedStorage"] = STORAGES["torch.UntypedStorage"] = torch.uint8
DTYPES = {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
HARMFUL = re.compile(  # what no state asks for: such a file was made to harm, and nothing of it is used
    r"(os|posix|nt|_?io|subprocess|commands|sys|shutil|importlib|imp|runpy|_?pickle|cPickle|cloudpickle|"
    r"ctypes|pty|socket|webbrowser|code|codeop|multiprocessing|urllib|http|torch\.(load|hub|serialization|jit)|numpy\.load|"
    r"(builtins|__builtin__)\.(eval|exec|execfile|compile|__import__|open|input|breakpoint))(\.|$)")


class Unread:
    """Stands for an object, a class or a function that is not read."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"


class _Attributes(dict):
    """A namespace as the dict that it is."""


class _Dtype:
    """A numpy dtype whose byte order is still to come."""

    def __init__(self, code: str, *_: Any):
        plain = isinstance(code, str) and re.fullmatch(r"[biufcSU]\d{1,4}|[?b]1?", code)
        self.code, self.order = code if plain else None, "="

    def kind(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)


class _Array:
    """A numpy array before its data come; then what the pickle calls by these numbers is the tensor."""

    def __init__(self, *_: Any):
        self.memos: list[int] = []


def _scalar(kind: _Dtype, data: bytes | str) -> Any:
    if kind.code is None:
        return Unread("numpy.generic")
    return np.frombuffer(_raw(data), kind.kind(), 1)[0].item()


def _array(state: tuple) -> Any:
    _, shape, kind, fortran, data = state
    if kind.code is None:
        return Unread("numpy.ndarray")
    values = np.frombuffer(_raw(data), kind.kind())
    values = values.reshape(shape, order="F" if fortran else "C")
    if values.dtype.kind in "SU":
        return values.tolist()
    return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C"))


def _raw(data: bytes | str) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else data


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name in it is no text")
    return value


def _pairs(items: Any) -> dict:
    """A dict of pairs. A key must be plain: the hash of tuples in tuples may take for ever."""
    items = list(items)
    for key, _ in items:
        for part in key if isinstance(key, tuple) else (key,):
            if isinstance(part, tuple):
                raise ValueError("a key in it is nested")
    return dict(items)


def _encode(text: str, codec: str) -> bytes:
    if codec not in ("latin1", "latin-1"):
        raise ValueError(f"text in {codec!r}")
    return text.encode(codec)


def _tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    numbers = (offset, *size, *stride)
    if not (isinstance(storage, torch.Tensor) and len(size) == len(stride) and all(type(n) is int for n in numbers)
            and min(numbers) >= 0 and (0 in size or offset + sum((n - 1) * s for n, s in zip(size, stride))
                                       < len(storage))):
        raise ValueError("a tensor leads beyond its data")
    return storage.as_strided(size, stride, offset)


def _typed_tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, _grad: Any, _hooks: Any,
                  kind: torch.dtype, *_: Any) -> torch.Tensor:
    return _tensor(storage[: len(storage) // kind.itemsize * kind.itemsize].view(kind), offset, size, stride)


MAKERS: dict[str, Callable[..., Any]] = {  # all that may be made: each is pure, and written or chosen here
    "collections.OrderedDict": lambda items=(): _pairs(items), "collections.defaultdict": lambda *_: {},
    "collections.Counter": lambda items=(): dict(items) if isinstance(items, dict) else {},
    "_codecs.encode": _encode,
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.Size": tuple, "numpy.dtype": _Dtype,
    "argparse.Namespace": lambda *_: _Attributes(), "types.SimpleNamespace": lambda *_: _Attributes()}
MAKERS |= {f"numpy.{core}.multiarray.{name}": maker for core in ("core", "_core")
           for name, maker in (("scalar", _scalar), ("_reconstruct", _Array))}
MAKERS |= {f"numpy.{core}.numeric._frombuffer": lambda data, kind, shape, order:
           _array((1, shape, kind, order == "F", data)) for core in ("core", "_core")}
MAKERS |= {f"{module}.{name}": lambda *parts: "/".join(map(_text, parts)).replace("//", "/") for name in
           ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
           for module in ("pathlib", "pathlib._local")}
MAKERS |= {f"{module}.{name}": maker for module in ("builtins", "__builtin__")
           for name, maker in (("set", list), ("frozenset", tuple), ("complex", complex))}


class _Machine:
    """Carries out the instructions of one pickle. Args: stored: the 1-D tensor that a persistent id speaks of."""

    PUSHED = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING",
              "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE",
              "SHORT_BINUNICODE", "BINUNICODE8", "FLOAT", "BINFLOAT"}
    MADE: dict[str, Callable[[], Any]] = {
        "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list,
        "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}

    def __init__(self, stored: Callable[[tuple], torch.Tensor]):
        self.stored = stored
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks that a mark covered
        self.memo: dict[int, Any] = {}

    def run(self, file: io.BufferedIOBase) -> Any:
        for op, arg, _ in pickletools.genops(file):
            name, stack = op.name, self.stack
            if name in self.PUSHED:
                stack.append(arg)
            elif name in self.MADE:
                stack.append(self.MADE[name]())
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                number = len(self.memo) if name == "MEMOIZE" else arg
                self.memo[number] = stack[-1]
                if isinstance(stack[-1], _Array):
                    stack[-1].memos.append(number)
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(self.memo[arg])
            elif name == "MARK":
                self.below.append(stack)
                self.stack = []
            elif name in ("PROTO", "FRAME"):
                pass
            elif name == "STOP":
                return stack.pop()
            else:
                getattr(self, f"_{name.lower()}", self._unknown)(arg)
        raise ValueError("it has no end")

    def _unknown(self, arg: Any) -> None:
        raise ValueError("it has instructions that torch does not write")

    def _marked(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    # names, and what would be calls

    def _global(self, name: str) -> None:
        name = name.replace(" ", ".")
        if HARMFUL.match(name):
            raise ValueError(f"it asks for {name}")
        self.stack.append(DTYPES.get(name) or Unread(name))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._global(f"{_text(module)} {_text(name)}")

    def _make(self, what: Any, arguments: Any) -> Any:
        if not isinstance(what, Unread) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no name")
        maker = MAKERS.get(what.name)
        return maker(*arguments) if maker else Unread(what.name)

    def _reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        self.stack.append(self._make(self.stack.pop(), arguments))

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        self.stack.pop()
        self._reduce(None)

    def _inst(self, name: str) -> None:
        arguments = tuple(self._marked())
        self._global(name)
        self.stack.append(self._make(self.stack.pop(), arguments))

    def _obj(self, _: Any) -> None:
        what, *arguments = self._marked()
        self.stack.append(self._make(what, tuple(arguments)))

    def _build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Array):
            self.stack[-1] = _array(state)
            self.memo |= dict.fromkeys(target.memos, self.stack[-1])
        elif isinstance(target, _Dtype):
            target.order = state[1] if state[1] in ("<", ">") else "="
        elif isinstance(target, _Attributes):
            target.update(state)
        elif not isinstance(target, (Unread, dict)):  # an OrderedDict's own attributes say nothing of its content
            raise ValueError("it sets what can't be set")

    def _binpersid(self, _: Any) -> None:
        self.stack.append(self.stored(self.stack.pop()))

    # containers

    def _pop(self, _: Any) -> None:
        self.stack.pop() if self.stack else self._marked()

    def _pop_mark(self, _: Any) -> None:
        self._marked()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _fill(self, items: list[Any], pairs: bool) -> None:
        target = self.stack[-1]
        if pairs and isinstance(target, dict):
            target.update(_pairs(zip(items[::2], items[1::2])))
        elif not pairs and isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Unread):
            raise ValueError("it fills what is no container")

    def _append(self, _: Any) -> None:
        self._fill([self.stack.pop()], False)

    def _appends(self, _: Any) -> None:
        self._fill(self._marked(), False)

    _additems = _appends

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value], True)

    def _setitems(self, _: Any) -> None:
        self._fill(self._marked(), True)

    def _list(self, _: Any) -> None:
        items = self._marked()
        self.stack.append(items)

    def _tuple(self, _: Any) -> None:
        items = self._marked()
        self.stack.append(tuple(items))

    _frozenset = _tuple

    def _dict(self, _: Any) -> None:
        items = self._marked()
        self.stack.append(_pairs(zip(items[::2], items[1::2])))

    def _tuple1(self, _: Any, count: int = 1) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _tuple2(self, _: Any) -> None:
        self._tuple1(None, 2)

    def _tuple3(self, _: Any) -> None:
        self._tuple1(None, 3)


# ---------------------------------------------------------------- files


def read(path: Path) -> Any:
    """What a torch file holds. Raises ValueError, in a few words, for anything but a whole torch file."""
    try:
        value = _read_zip(path) if zipfile.is_zipfile(path) else _read_row(path)
        _weigh(value, {})
    except ValueError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # a pickle that nobody wrote on purpose fails in many ways
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from None
    return value


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
        if "constants.pkl" in records:
            raise ValueError("it is a TorchScript program")
        if "data.pkl" not in records:
            raise ValueError("it is a zip archive of something else")
        if any(record.compress_type for record in records.values()) or \
                sum(record.file_size for record in records.values()) > path.stat().st_size:
            raise ValueError("its records are compressed or overlap")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise ValueError("its numbers are big-endian")
        known: dict[str, torch.Tensor] = {}

        def stored(pid: tuple) -> torch.Tensor:
            _, kind, key, *_ = pid
            if _text(key) not in known:
                data = bytearray(archive.read(records[f"data/{key}"]))
                known[key] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            return _typed(known[key], kind)

        return _Machine(stored).run(io.BytesIO(archive.read(records["data.pkl"])))


def _read_row(path: Path) -> Any:
    """torch's older layout: magic number, version, machine, the object, keys, then the data of each key."""
    with open(path, "rb") as file:
        left, known = path.stat().st_size, {}

        def stored(pid: tuple) -> torch.Tensor:
            nonlocal left
            _, kind, key, _, count, *view = pid
            if view and view[0] is not None:
                raise ValueError("it holds views of views")
            if _text(key) not in known:
                left -= count * STORAGES[kind.name].itemsize
                if count < 0 or left < 0:
                    raise ValueError("its data are not all there")
                known[key] = torch.zeros(count * STORAGES[kind.name].itemsize, dtype=torch.uint8)
            return _typed(known[key], kind)

        def load() -> Any:
            return _Machine(stored).run(file)

        try:
            magic = load()
        except Exception:
            magic = None
        if magic != MAGIC:
            raise ValueError("it is not a torch file")
        load()
        if not load().get("little_endian", True):
            raise ValueError("its numbers are big-endian")
        value = load()
        for key in load():
            (count,) = struct.unpack("<q", file.read(8))
            size = len(known[key])
            data = file.read(size)
            if count < 0 or len(data) != size:
                raise ValueError("its data are not all there")
            if data:
                known[key].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return value


def _typed(data: torch.Tensor, kind: Unread) -> torch.Tensor:
    kind = STORAGES[kind.name]
    return data[: len(data) // kind.itemsize * kind.itemsize].view(kind)


def _weigh(value: Any, known: dict[int, int]) -> int:
    """How many values there are, for whoever goes through them. Raises ValueError for too many, or a circle."""
    if not isinstance(value, (dict, list, tuple)):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST  # while it is being looked into
        parts = (*value.keys(), *value.values()) if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_weigh(part, known) for part in parts)
    if known[id(value)] >= MOST:
        raise ValueError("it holds too many values, or itself")
    return known[id(value)]


def unread_in(value: Any) -> Unread | None:
    """The first stand-in in a value, if any."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    elif not isinstance(value, (list, tuple)):
        return value if isinstance(value, Unread) else None
    return next((found for part in value if (found := unread_in(part))), None)
