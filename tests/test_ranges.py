"""Every number that an option file may set has a range, and a value outside of it is one line."""

import json
import math
import typing

import pytest

import main as door
import options
from commands import reference
from runtime.ranges import Range
from tests.conftest import ROOT, write_json

COMPONENTS = sorted({*reference.components()}, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}")


def alone(value):
    return value


def numbers(kind, wrap=alone):
    """Each int or float of an annotation with its ranges, and what puts a number where the annotation has it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        yield args[0], [note for note in args[1:] if isinstance(note, Range)], wrap
    elif kind in (int, float):
        yield kind, [], wrap
    elif origin in options.LISTS and args[-1] is not Ellipsis:
        for place, one in enumerate(args):
            others = [0.5] * len(args)
            yield from numbers(one, lambda x, i=place, o=others, w=wrap: w([*o[:i], x, *o[i + 1:]]))
    elif origin in options.LISTS:
        yield from numbers(args[0], lambda x, w=wrap: w([x]))
    elif origin is not typing.Literal:
        for one in args:
            yield from numbers(one, wrap)


def just_outside(kind, bounds):
    """The nearest numbers below and above a range, or the bound itself where it does not belong to it."""
    below, above = ((lambda x: x - 1), (lambda x: x + 1)) if kind is int else (
        (lambda x: math.nextafter(x, -math.inf)), (lambda x: math.nextafter(x, math.inf)))
    return [step(bound) for bound, step in ((bounds.ge, below), (bounds.gt, alone), (bounds.le, above),
                                            (bounds.lt, alone)) if bound is not None]


def complaint(schema, key, value):
    with pytest.raises(options.OptionError) as caught:
        options.check({key: value}, {key: (schema[key][0], None)}, "part", lambda _: "file.json", [])
    return str(caught.value)


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda kind: kind.__qualname__)
def test_every_numeric_option_has_a_range_and_refuses_the_values_next_to_it(component):
    schema = options.schema_of(component)
    for key, (kind, _) in schema.items():
        for number, ranges, wrap in numbers(kind):
            assert len(ranges) == 1, f"{component.__qualname__}.{key}: give {number.__name__} a range"
            outside = just_outside(number, ranges[0])
            assert outside, f"{component.__qualname__}.{key}: a range without bounds"
            for value in [*outside, math.nan, math.inf, -math.inf, 10**400, True]:
                shown = complaint(schema, key, wrap(value))
                assert shown.startswith(f"file.json: part.{key}: ") and "\n" not in shown
                assert options.kind_name(kind) in shown and str(ranges[0]) in shown


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda kind: kind.__qualname__)
def test_every_default_lies_in_its_own_range(component):
    for key, (kind, default) in options.schema_of(component).items():
        if default is not options.REQUIRED:
            assert options.fit(default, kind) == json.loads(json.dumps(default)), key


@pytest.mark.parametrize("words, expected", [
    (["--batch_size", "-2"], "dataloader_batch_size: -2 is not a whole number >= 1"),
    (["--batch_size", "0"], "dataloader_batch_size: 0 is not a whole number >= 1"),
    (["--lr=-1e-4"], "train.G_optimizer_lr: -0.0001 is not a number >= 0"),
    (["--lr", "1e999"], "train.G_optimizer_lr: Infinity is not a number >= 0 (it must be finite)"),
    (["--epochs", "0"], "train.total_epochs: 0 is not a whole number >= 1 or null"),
    (["--seed", str(2**63)], "9223372036854775808 is not a whole number from 0 to 9223372036854775807"),
    (["--seed", "-1"], "train.manual_seed: -1 is not a whole number from 0 to"),
    (["--set", "train.accumulate=0"], "train.accumulate: 0 is not a whole number >= 1"),
    (["--set", "train.E_decay=2"], "train.E_decay: 2 is not a number >= 0 and < 1"),
    (["--set", "train.checkpoint_save=-1"], "train.checkpoint_save: -1 is not a whole number >= 0"),
    (["--set", "train.G_optimizer_betas=[0.9, 1]"], "train.G_optimizer_betas: [0.9, 1] is not a list of numbers >= 0"),
    (["--set", "datasets.train.dataloader_num_workers=-1"], "-1 is not a whole number from 0 to 1024"),
    (["--set", 'datasets.train.degradation={"noise_sigma": NaN}'], "degradation.noise_sigma: NaN must be finite"),
    (["--set", "netG.embed_dims=[8, -8]"], "netG.embed_dims: [8, -8] is not a list of whole numbers >= 1"),
    (["--set", 'datasets.train.generated={"num_clips": -1}'], "num_clips: -1 is not a whole number >= 1"),
    (["--set", "train.total_iter=" + "9" * 5000], "train.total_iter: "),
])
def test_an_impossible_value_is_one_line_and_makes_no_folder(tmp_path, words, expected):
    file = write_json(tmp_path / "a.json", {"extends": str(ROOT / "options/train_vrt.json"),
                                            "path": {"root": str(tmp_path / "runs")}})
    with pytest.raises(options.OptionError) as caught:
        door.main(["-opt", str(file), *words])
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 5000])
def test_a_file_with_a_number_that_is_none_is_one_line(tmp_path, number):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"extends": str(ROOT / "options/train_vrt.json"), "train": {"G_optimizer_lr": "X"}})
                    .replace('"X"', number))
    with pytest.raises(options.OptionError) as caught:
        door.main(["-opt", str(path)])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
