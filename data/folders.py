"""Listing of folders and of files with lists, without hidden files and files of the operating system.

Pictures of unsupported formats are counted, for a line at the start of a run.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator

from data.image_files import EXTENSIONS, KINDS, printable, read_bytes, unreadable

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm")
OTHERS = (".tif", ".tiff", ".bmp", ".gif", ".jfif", ".jp2", ".jxl", ".avif", ".heic", ".ppm", ".pgm", ".tga", ".exr",
          *VIDEOS)
SYSTEM = {"@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini"}

_unsupported: dict[str, tuple[Counter, str]] = {}  # folder -> number of unsupported files by extension, and one of them


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is hidden or belongs to the operating system."""
    return name.startswith(".") or name in SYSTEM


def list_folder(folder: str) -> tuple[list[str], list[str]]:
    """Return the sorted names of folders and of pictures in a folder. Raises ValueError: it is unreadable."""
    folders, pictures, others, example = [], [], Counter(), ""
    here = os.path.realpath(folder) + os.sep
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                ending = os.path.splitext(entry.name)[1].lower()
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    if not entry.is_symlink() or not here.startswith(os.path.realpath(entry.path) + os.sep):
                        folders.append(entry.name)
                elif ending in EXTENSIONS:
                    pictures.append(entry.name)
                elif ending in OTHERS:
                    others[ending] += 1
                    example = entry.path
    except OSError as error:
        raise ValueError(unreadable(folder, error)) from None
    if others:
        _unsupported[here] = others, example
    return sorted(folders), sorted(pictures)


def walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Yield path and names of pictures of a folder and all folders below it, sorted, without links to folders above."""
    above = (*above, os.path.realpath(folder))
    folders, pictures = list_folder(folder)
    yield folder, pictures
    for path in (os.path.join(folder, name) for name in folders):
        if os.path.realpath(path) not in above:
            yield from walk(path, above)


def is_folder(path: str) -> bool:
    """Tell whether a path is a folder. Raises ValueError: the path is not accessible."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ValueError(unreadable(path, error)) from None


def unsupported_files(lead: str = "") -> str:
    """Return `lead` and a line about unsupported pictures found since the last call, or ""."""
    found = sum((others for others, _ in _unsupported.values()), Counter())
    counts = ", ".join(f"{count:,} {ending}" for ending, count in sorted(found.items()))
    example = next((printable(path) for _, path in _unsupported.values()), "")
    _unsupported.clear()
    remedy = "; of videos python -m data.prepare frames makes them" if any(map(found.get, VIDEOS)) else ""
    return f"{lead}passed over: {counts} files, as {example}; {KINDS} files are read{remedy}" if counts else ""


def read_lines(path: str, bytewise: bool = False) -> list[str]:
    """Return the lines of a text file in UTF-8, with or without a byte order mark.

    Args: bytewise: accept any bytes, for lists of file names.
    Raises: FileNotFoundError, ValueError: the file is unreadable or not in UTF-8.
    """
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig", "surrogateescape" if bytewise else "strict").splitlines()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{printable(path)}, line {line}: is not a text in UTF-8 (byte {content[error.start]:#04x}); "
                         "save it as UTF-8") from None
