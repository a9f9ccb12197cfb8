"""Sealed files: checksums of every byte, and reading that verifies first and never runs code.

A torch file is a zip archive with a CRC-32 of each record's data, which torch.load does not check (measured: a flipped
bit loads silently). Our files carry a *seal* in the archive's comment, which every other reader skips. It is a JSON
object that describes the file and holds the CRC-32 of all bytes that are not data. Those include the table of the
data's own CRCs, so the two together cover every byte, and no byte is summed twice.

    | header, data | header, data | ... | table of records | PK 5 6 ... length | {"perdure": 2, ..., "seal": CRC} |
    |      the data's CRCs are in the table of records     |   end of archive  |     the comment: the seal         |
    |<----------------------------- body ---------------------------------->|
                 body_crc32 covers the body without the data, with the comment's length taken as 0;
                 the seal's own CRC covers the rest of its JSON
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from storage import inert, safetensors
from storage.system import read_at

END = b"PK\x05\x06"  # signature of a zip archive's last record: 22 bytes, the last two are the comment's length
MARK = b'{"perdure": '
CHUNK = 1 << 20


class CheckpointError(ValueError):
    """Raised for a checkpoint that can't be read, trusted or written: one line with the path and the reason."""


# ---------------------------------------------------------------- writing


def add_seal(writer: Any, about: Mapping[str, Any]) -> dict[str, int]:
    """Append the seal to a torch file that was just written, and set the length of the archive's comment.

    Args: writer: has `write`, and the open file as `file`. about: plain values for the seal.
    Returns: what a commit record needs besides the size: the CRC-32 of the body.
    """
    file = writer.file
    file.flush()
    body = file.tell()
    assert read_at(file.fileno(), 4, body - 22) == END, "torch.save wrote something else than a plain zip archive"
    crc = _Archive(file.fileno(), body).crc32()
    comment = with_checksum({"perdure": 2, **about, "body": body, "body_crc32": crc})
    file.seek(body - 2)
    writer.write(struct.pack("<H", len(comment)))
    writer.write(comment)
    return {"body_crc32": crc}


class _Archive:
    """Read a torch file as a zip archive of uncompressed records.

    Args: descriptor: an open file. body: its size in bytes up to the comment.
    Raises: ValueError, zipfile.BadZipFile where it is not what torch writes.
    """

    def __init__(self, descriptor: int, body: int):
        self.descriptor, self.body = descriptor, body
        with open(os.dup(descriptor), "rb") as file:
            records = sorted(zipfile.ZipFile(file).infolist(), key=lambda record: record.header_offset)
        self.data: list[tuple[int, int, int]] = []  # from, to, CRC-32
        end = 0
        for record in records:
            header = read_at(descriptor, 30, record.header_offset)
            name, extra = struct.unpack("<HH", header[26:30])
            start = record.header_offset + 30 + name + extra
            if record.header_offset < end or record.compress_type or record.file_size != record.compress_size or \
                    record.external_attr & 16:  # for a folder torch reads no bytes and returns uninitialized memory
                raise ValueError("its records overlap, are compressed or folders")
            end = start + record.file_size
            self.data.append((start, end, record.CRC))
        if end > body - 22:
            raise ValueError("its records extend beyond its end")

    def crc32(self) -> int:
        """Return the CRC-32 of every byte that is not a record's data, with the comment's length taken as 0."""
        crc, at = 0, 0
        for start, end, _ in self.data:
            crc, at = zlib.crc32(read_at(self.descriptor, start - at, at), crc), end
        return zlib.crc32(read_at(self.descriptor, self.body - 2 - at, at) + b"\0\0", crc)

    def find_broken_record(self) -> int | None:
        """Return the number of the first record whose data do not match its CRC, counted from 0."""
        for i, (start, end, expected) in enumerate(self.data):
            crc = 0
            while start < end and (read := read_at(self.descriptor, min(CHUNK, end - start), start)):
                crc, start = zlib.crc32(read, crc), start + len(read)
            if crc != expected or start < end:
                return i
        return None


def with_checksum(facts: Mapping[str, Any], indent: int | None = None) -> bytes:
    """Return facts as JSON with a checksum of their own, so that a flipped bit in them is noticed as well."""
    seal = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    return json.dumps({**facts, "seal": seal}, indent=indent).encode()


def verified(text: bytes) -> dict[str, Any]:
    """Return the facts that `with_checksum` wrote. Raises ValueError when a byte differs."""
    facts = json.loads(text)
    sealed = isinstance(facts, dict) and facts.pop("seal", None) is not None
    if sealed and text in (with_checksum(facts), with_checksum(facts, indent=1)):  # to the byte: 1e-5 equals 1E-5
        return facts
    raise ValueError("checksum differs")


# ---------------------------------------------------------------- reading


def read_tail(path: Path) -> bytes:
    """Read the end of a file, which holds the seal if it has one."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 22 - 0xFFFF))
        return file.read()


def read_seal(path: Path) -> dict[str, Any] | None:
    """Read the seal of a torch file; None for a file of another program. Raises CheckpointError if it is damaged.

    Only the end of the file is read; `find_fault` verifies the rest.
    """
    if safetensors.is_safetensors(path):
        return None
    with open(path, "rb") as file:
        head = file.read(4)
        size = file.seek(0, os.SEEK_END)
    tail = read_tail(path)
    end = tail.rfind(END)
    comment = tail[end + 22 :] if end >= 0 else b""
    if MARK not in tail:
        if end >= 0 and tail[end + 20 :] == b"\0\0" or end < 0 and head[:1] not in (b"P", b"\0", b""):
            return None  # a complete archive without a comment, or torch's old format
        if not comment:
            raise CheckpointError(f"{path}: {'damaged (its end is missing)' if head else 'is empty'}")
    try:
        facts = verified(comment)
        if struct.unpack("<H", tail[end + 20 : end + 22])[0] != len(comment) or facts["body"] != size - len(comment):
            raise ValueError("its size differs")
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(f"{path}: damaged (its seal: {error})") from None
    return facts


def find_fault(path: Path, facts: Mapping[str, int] | None = None) -> str | None:
    """Return what is wrong with a torch file, or None.

    Args: facts: size and CRC-32 from a commit record; None: verify against the file's own seal, or, in a file of
        another program, against the CRCs of the zip archive.
    """
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size == 0:
        return "is empty"
    try:
        if not facts and (kind := find_other_format(path)):
            return kind
        if not facts and safetensors.is_safetensors(path):
            fault = safetensors.find_fault(path)
            return f"damaged (safetensors: {fault})" if fault else None
        if facts:
            if size != facts["size"]:
                return f"has {size} bytes, was committed with {facts['size']}"
            if "crc32" in facts:  # version 1: of the whole file
                return None if _crc32(path) == facts["crc32"] else "damaged (checksum differs)"
        seal = read_seal(path)
        if facts and (not seal or any(seal.get(key, facts[key]) != facts[key] for key in facts if key != "size")):
            return "is not the file that was committed"
        if seal:
            with open(path, "rb") as file:
                archive = _Archive(file.fileno(), seal["body"])
                if archive.crc32() != seal["body_crc32"] or archive.find_broken_record() is not None:
                    return "damaged (checksum differs)"
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
                broken = archive.testzip()  # looks at names and flags, too
                if broken or _Archive(file.fileno(), size - len(archive.comment)).find_broken_record() is not None:
                    return f"damaged (record {broken})"
        else:
            read_torch(path)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
            struct.error) as error:  # zipfile raises RuntimeError for a flipped bit that says "encrypted"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = reason.removeprefix(f"{path}: ")
        return reason if reason.startswith(("damaged", "refused")) else f"damaged ({reason})"
    return None


def has_checksums(path: Path) -> bool:
    """Return whether damage in a torch file can be noticed: torch's old format has no checksum of any kind."""
    return zipfile.is_zipfile(path)


def find_other_format(path: Path) -> str | None:
    """Return which other format a file has, and how to get a torch file from it; None if it may be a torch file."""
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not a checkpoint: the download needs a login or a confirmation; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself: run git lfs pull in its repository"
    for kind, mark in (("a gzip archive: unpack it", b"\x1f\x8b"), ("an HDF5 file, as Keras writes", b"\x89HDF"),
                       ("a GGUF file", b"GGUF"), ("a picture", b"\x89PNG"), ("a 7z archive: unpack it", b"7z\xbc\xaf")):
        if head.startswith(mark):
            return f"is {kind}, not a torch file"
    if head[257:262] == b"ustar":
        return "is a tar archive, not a torch file: unpack it"
    return None


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def load_file(path: Path | str) -> Any:
    """Verify a torch or safetensors file, then read it to the CPU; code in it is never run.

    Raises: CheckpointError, one line, when it is missing, empty, damaged, of another format, or holds code.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a .pth file in it")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if fault := find_fault(path):
        hint = ", its writer was interrupted" if fault == "is empty" else ""
        raise CheckpointError(f"{path}: {fault}" + (f"{hint}; name another checkpoint" if len(fault) < 60 else ""))
    return safetensors.read(path) if safetensors.is_safetensors(path) else read_torch(path)


def read_torch(path: Path, mapped: bool = False) -> Any:
    """Read the tensors and plain values of a torch file that was verified. Raises CheckpointError, one line.

    Args: mapped: leave tensors in the file, unless it is in torch's old layout.
    Other objects in a file of another program become placeholders (see storage/inert.py).
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and has_checksums(path))
    except pickle.UnpicklingError as error:
        blamed = re.search(r"GLOBAL (\S+)|Unsupported (?:global|class|operand)[: ]+(?:GLOBAL )?(\S+)", str(error))
        what = f"it asks for {blamed.group(1) or blamed.group(2)}" if blamed else "it is not a plain torch file"
        if read_seal(path) is None:
            try:
                return inert.read(path)
            except ValueError as reason:
                what = _first_line(reason)
        raise CheckpointError(f"{path}: refused: {what}; only tensors and plain values are read") from None
    except Exception as error:  # torch's reader fails in many ways on arbitrary bytes
        raise CheckpointError(f"{path}: can't be read as a torch file: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
