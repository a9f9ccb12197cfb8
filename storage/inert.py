"""Read a torch file of another program without running anything in it: plain values, tensors, and placeholders.

torch.load(weights_only=True) rejects a file for one unknown class anywhere in it. Here every name in the file becomes
an `Unread`, and every call of a name an `Unread` with the arguments. Nothing is imported, looked up or called while the
file is read. Afterwards `_Builder` replaces the calls on two short lists by plain values and tensors; all others
remain `Unread`, which does nothing.

File formats: torch/serialization.py (zip archive since 1.6, before that a sequence of pickles).
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

MAGIC = 0x1950A86A20F9469CFC6C  # of torch's older files
MAX_VALUES = 20_000_000  # shared values count each time: a small file can hold very many
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}.items()}
STORAGES["torch.storage.UntypedStorage"] = STORAGES["torch.UntypedStorage"] = torch.uint8
ALIASES = {"__builtin__": "builtins", "pathlib._local": "pathlib", "numpy.core.multiarray": "numpy.multiarray",
           "numpy._core.multiarray": "numpy.multiarray", "numpy.core.numeric": "numpy.numeric",
           "numpy._core.numeric": "numpy.numeric"}  # modules of other versions of Python and numpy
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
HARMFUL = re.compile(  # names that no training state contains: the file was made to harm, and is rejected
    r"(os|posix|nt|_?io|subprocess|commands|sys|shutil|importlib|imp|runpy|_?pickle|cPickle|cloudpickle|"
    r"ctypes|pty|socket|webbrowser|code|codeop|multiprocessing|urllib|http|torch\.(load|hub|serialization|jit)|numpy\.load|"
    r"builtins\.(eval|exec|execfile|compile|__import__|open|input|breakpoint))(\.|$)")


class Unread:
    """Stands for a class or function (`args` is None), or for what a call of it would return."""

    __slots__ = ("name", "args", "state", "items")

    def __init__(self, name: str, args: tuple | None = None):
        self.name, self.args = name, args
        self.state: Any = None  # what the file sets as the object's state
        self.items: list = []  # what the file adds to it: items of a list, or (key, value) pairs

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Iterable[Any]) -> None:
        self.items.extend(items)


# ---------------------------------------------------------------- reading the pickle


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler, with each instruction that could run something overridden.

    It is the one written in Python: of the one written in C only two methods can be overridden, and it hashes whatever
    a file has as a key, which can take forever. Here dicts are built last, of values that were counted.

    Args:
        file: where the pickle begins. stored: persistent id -> 1-D tensor.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, stored: Callable[[tuple], torch.Tensor]):
        super().__init__(file, encoding="latin1")
        self.persistent_load = stored

    def find_class(self, module: str, name: str) -> Any:
        name = f"{ALIASES.get(module, module)}.{name}"
        if HARMFUL.match(name):
            raise ValueError(f"it asks for {name}")
        return DTYPES.get(name) or Unread(name)

    def _instantiate(self, function: Any, args: Any) -> None:
        if not isinstance(function, Unread) or not isinstance(args, (tuple, list)):
            raise ValueError("it calls something that is not a name")
        self.append(Unread(function.name if function.args is None else f"{function.name}()", tuple(args)))

    def _target(self) -> Unread:
        if not isinstance(self.stack[-1], Unread):
            raise ValueError("it changes something that is neither a dict nor an object")
        return self.stack[-1]

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self._instantiate(self.stack.pop(), args)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        self._target().state = state

    def load_empty_dict(self) -> None:
        self.append(Unread("builtins.dict", ()))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._target().append((key, value))

    def load_setitems(self) -> None:
        pairs = self.pop_mark()
        self._target().extend(zip(pairs[::2], pairs[1::2]))

    def load_forbidden(self) -> None:
        raise ValueError("it has instructions that torch does not write")

    dispatch |= {
        pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce, pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build, pickle.EMPTY_DICT[0]: load_empty_dict,
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
        pickle.EMPTY_SET[0]: dispatch[pickle.EMPTY_LIST[0]], pickle.ADDITEMS[0]: dispatch[pickle.APPENDS[0]],
        pickle.FROZENSET[0]: dispatch[pickle.TUPLE[0]]}
    for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.PERSID,
                  pickle.DICT):
        dispatch[_code[0]] = load_forbidden


# ---------------------------------------------------------------- building plain values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name in it is not a text")
    return value


def _bytes(data: bytes | str) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _numpy_dtype(call: Unread) -> np.dtype | None:
    """Return the dtype of numbers or texts; None for another one."""
    code, *_ = call.args
    if not isinstance(code, str) or not re.fullmatch(r"[biufcSU]\d{1,4}|[?b]1?", code):
        return None
    order = call.state[1] if call.state else "="
    return np.dtype(code).newbyteorder(order if order in ("<", ">") else "=")


def _numpy_scalar(call: Unread, data: bytes | str) -> Any:
    dtype = _numpy_dtype(call)
    return Unread("numpy.generic") if dtype is None else np.frombuffer(_bytes(data), dtype, 1)[0].item()


def _numpy_array(shape: tuple, call: Unread, fortran: bool, data: bytes | str) -> Any:
    if (dtype := _numpy_dtype(call)) is None:
        return Unread("numpy.ndarray")
    values = np.frombuffer(_bytes(data), dtype).reshape(shape, order="F" if fortran else "C")
    if dtype.kind in "SU":
        return values.tolist()
    return torch.from_numpy(np.array(values, dtype.newbyteorder("="), order="C"))


def _tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, _grad: Any = None, _hooks: Any = None,
            dtype: Any = None, *_: Any) -> torch.Tensor:
    storage = _view(storage, dtype) if isinstance(dtype, torch.dtype) else storage
    numbers = (offset, *size, *stride)
    if not (isinstance(storage, torch.Tensor) and len(size) == len(stride) and all(type(n) is int for n in numbers)
            and min(numbers) >= 0 and (0 in size or offset + sum((n - 1) * s for n, s in zip(size, stride))
                                       < len(storage))):
        raise ValueError("a tensor leads beyond its data")
    return storage.as_strided(size, stride, offset)


def _view(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)


# The only calls that are carried out, each by a function of this file or a plain type.
MAKERS: dict[str, Callable[..., Any]] = {
    "builtins.set": list, "builtins.frozenset": tuple, "builtins.complex": complex, "torch.Size": tuple,
    "collections.Counter": lambda counts=None: counts if isinstance(counts, dict) else {},
    "_codecs.encode": lambda text, codec: text.encode("latin1"),
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor, "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "numpy.multiarray.scalar": _numpy_scalar,
    "numpy.numeric._frombuffer": lambda data, call, shape, order: _numpy_array(shape, call, order == "F", data)}
MAKERS |= {f"pathlib.{name}": lambda *parts: "/".join(parts).replace("//", "/") for name in
           ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")}
FILLED: dict[str, Callable[[tuple, Any, list], Any]] = {  # the same of (args, state, items)
    "builtins.dict": lambda args, state, items: dict(items),
    "collections.defaultdict": lambda args, state, items: dict(items),
    "collections.OrderedDict": lambda args, state, items: dict([*(args[0] if args else ()), *items]),
    "argparse.Namespace": lambda args, state, items: state if isinstance(state, dict) else {},
    "types.SimpleNamespace": lambda args, state, items: state if isinstance(state, dict) else {},
    "numpy.multiarray._reconstruct": lambda args, state, items: _numpy_array(*state[1:])}


class _Builder:
    """Carries out the calls in a value that are on the short lists.

    Raises ValueError for a value that contains itself, or more than MAX_VALUES values.
    """

    def __init__(self):
        self.known: dict[int, tuple[Any, int]] = {}  # id -> the value built, and how many values it holds

    def build(self, value: Any) -> tuple[Any, int]:
        """Return the value, and how many values it holds."""
        if not isinstance(value, (list, tuple, Unread)):
            return value, 1 + len(value) // 64 if isinstance(value, (str, bytes)) else 1
        if id(value) not in self.known:
            self.known[id(value)] = None, MAX_VALUES  # while it is being built
            self.known[id(value)] = self._build(value)
        if self.known[id(value)][1] >= MAX_VALUES:
            raise ValueError("it holds too many values, or itself")
        return self.known[id(value)]

    def _build(self, value: list | tuple | Unread) -> tuple[Any, int]:
        if isinstance(value, Unread):
            if value.name == "numpy.dtype" and value.args:
                value.state, count = self.build(value.state)
                return value, count
            if value.args is None or value.name not in MAKERS | FILLED:
                return value, 1
            (args, one), (state, two), (items, three) = map(self.build, (value.args, value.state, value.items))
            made = MAKERS[value.name](*args) if value.name in MAKERS else FILLED[value.name](args, state, items)
            return made, one + two + three
        built = [self.build(part) for part in value]
        return type(value)(part for part, _ in built), 1 + sum(count for _, count in built)


# ---------------------------------------------------------------- files


def read(path: Path) -> Any:
    """Read a torch file. Raises ValueError, in a few words, for anything but a complete torch file."""
    try:
        return _Builder().build(_read_zip(path) if zipfile.is_zipfile(path) else _read_pickles(path))[0]
    except ValueError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # arbitrary bytes fail in many ways
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from None


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
            _, storage, key, *_ = pid
            if _text(key) not in known:
                data = bytearray(archive.read(records[f"data/{key}"]))
                known[key] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            return _view(known[key], STORAGES[storage.name])

        return _Unpickler(io.BytesIO(archive.read(records["data.pkl"])), stored).load()


def _read_pickles(path: Path) -> Any:
    """Read torch's older format: magic number, version, machine, the object, keys, then the data of each key."""
    with open(path, "rb") as file:
        left, known = path.stat().st_size, {}

        def stored(pid: tuple) -> torch.Tensor:
            nonlocal left
            _, storage, key, _, count, *view = pid
            dtype = STORAGES[storage.name]
            if view and view[0] is not None:
                raise ValueError("it holds views of views")
            if _text(key) not in known:
                left -= count * dtype.itemsize
                if count < 0 or left < 0:
                    raise ValueError("its data are not all there")
                known[key] = torch.zeros(count * dtype.itemsize, dtype=torch.uint8)
            return _view(known[key], dtype)

        def load() -> Any:
            return _Unpickler(file, stored).load()

        try:
            magic = load()
        except Exception:
            magic = None
        if magic != MAGIC:
            raise ValueError("it is not a torch file")
        load()
        if not _Builder().build(load())[0].get("little_endian", True):
            raise ValueError("its numbers are big-endian")
        value = load()
        for key in load():
            (count,) = struct.unpack("<q", file.read(8))
            data = file.read(len(known[key]))
            if count < 0 or len(data) != len(known[key]):
                raise ValueError("its data are not all there")
            if data:
                known[key].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return value


def unread_in(value: Any) -> Unread | None:
    """Return the first placeholder in a value, if any."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    elif not isinstance(value, (list, tuple)):
        return value if isinstance(value, Unread) else None
    return next((found for part in value if (found := unread_in(part))), None)
