"""Ranges of numeric options, as annotations: `size: PositiveInt = 256`.

`options.check` rejects a value outside its range, and docs/options.md shows the range.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have, with the names of pydantic's bounds; None: no bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        return ((self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
                and (self.le is None or value <= self.le) and (self.lt is None or value < self.lt))

    def __str__(self) -> str:
        if self.ge is not None and self.le is not None:
            return f"from {self.ge} to {self.le}"
        bounds = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, le=1)]
ProperFraction = Annotated[float, Range(ge=0, lt=1)]
Seed = Annotated[int, Range(ge=0, le=2**63 - 1)]


def checked(init: Callable) -> Callable:
    """Make a constructor raise ValueError for an argument outside the range or choice of its annotation."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checking(*args: Any, **kwargs: Any) -> None:
        kinds = typing.get_type_hints(init, include_extras=True)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in kinds and not _fits(value, kinds[name]):
                raise ValueError(f"{name} {value!r} must be {' or '.join(_valid(kinds[name]))}")
        init(*args, **kwargs)

    return checking


def _fits(value: Any, kind: Any) -> bool:
    """Tell whether a value is in the range or choice of an annotation; types without either take any value."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return isinstance(value, Real) and value in args[1]
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in args)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(each, args[0]) for each in value)
    return value in args if origin is Literal else kind is not types.NoneType or value is None


def _valid(kind: Any) -> list[str]:
    """Return the ranges and choices of an annotation in words."""
    if typing.get_origin(kind) is Annotated:
        return [str(typing.get_args(kind)[1])]
    if typing.get_origin(kind) is Literal:
        return [f"one of {', '.join(map(str, typing.get_args(kind)))}"]
    found = [words for one in typing.get_args(kind) for words in _valid(one)]
    return list(dict.fromkeys(found))
