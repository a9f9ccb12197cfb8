"""The house of DESIGN 1: a file imports only from rows below its own, siblings only in row 1."""

import ast

import pytest

from tests.conftest import ROOT

ROWS = {"main": 5, "prove": 4, "infer": 4, "stages": 4, "preflight": 4, "train": 3, "runtime.evaluate": 2.5,
        "runtime.signals": 0,
        "models.model_": 2, "models.network_": 1, "models.codecs": 1, "losses": 1, "data.image_files": -2, "data": 1,
        "checkpoint_cli": 1, "report": 1, "reference": 1, "options": 0, "checkpoint": 0, "schedules": 0,
        "metrics": 0, "log": 0,
        "distributed": -1, "foreign": -1, "durable": -2, "inert": -3, "runtime": -3}
TABLES = {"models", "losses", "data"}  # a package's __init__ is a table of names: anyone may read it
ROOMS = (*TABLES, "report", "runtime")
FILES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))])


def row(module):
    for prefix, number in ROWS.items():
        if module == prefix or module.startswith((f"{prefix}.", prefix) if prefix.endswith("_") else f"{prefix}."):
            return number
    return None


def imports(path):
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.dump(node.test))]
    for node in ast.walk(tree):  # what a file does as a program is above all rows
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module in TABLES:
        assert not list(imports(path)), f"{path.name} is a literal table and imports nothing"
        return
    own = row(module)
    assert own is not None, f"{module} has no row; add it to DESIGN 1 and to this test"
    for name in imports(path):
        other = row(name)
        if name in TABLES or other is None:
            continue
        sibling = other == own and (own in (1, 2) or (own == 0 and name in ("options",)))
        assert other < own or sibling, f"{module} (row {own}) imports {name} (row {other})"


def test_tables_name_what_exists():
    import importlib

    for package, table in (("models", "MODELS"), ("models", "NETWORKS"), ("losses", "LOSSES"), ("data", "DATASETS")):
        for target in getattr(importlib.import_module(package), table).values():
            module, _, name = target.partition(":")
            assert hasattr(importlib.import_module(module), name), target


def test_no_utils_and_no_python_in_options():
    assert not [p for p in FILES if p.stem.startswith("utils")]
    assert not list((ROOT / "options").rglob("*.py")), "options/__init__.py would hijack `import options`"


def test_only_torch_torchvision_numpy_and_the_standard_library():
    import sys

    allowed = {"torch", "torchvision", "numpy", *sys.stdlib_module_names, *ROWS, *TABLES}
    for path in FILES:
        for name in imports(path):
            assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
