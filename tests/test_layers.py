"""The house of DESIGN 1: imports go down only, also those inside functions and `__main__` blocks."""

import ast
import importlib
import sys

import pytest

from tests.conftest import ROOT

ROWS = (  # from the top; a name that ends in _ is the beginning of a module's name
    ("main",),
    ("commands",),
    ("train",),
    ("runtime.resume", "runtime.evaluate", "runtime.finite", "runtime.records", "report"),
    ("models.model_", "models.step"),
    ("models.network_", "models.codecs", "losses", "data"),
    ("checkpoint", "log", "runtime", "metrics"),
    ("storage", "options"),
    ("runtime.ranges", "data.image_files"),
)
TABLES = ("models", "losses", "data")  # a package's __init__ is a table of names: anyone may read it
EXCEPTIONS = {("checkpoint", "commands.checkpoints")}  # python -m checkpoint
ROOMS = sorted({name.split(".")[0] for row in ROWS for name in row if (ROOT / name.split(".")[0]).is_dir()})
FILES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))])


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in FILES}


def row(module):
    """The longest name that fits says in which row a module is."""
    fitting = [(len(name), number) for number, names in enumerate(ROWS) for name in names
               if module == name or module.startswith(name if name.endswith("_") else f"{name}.")]
    return max(fitting)[1] if fitting else None


def imports(source):
    """Every module that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            yield from inner or {node.module}


def test_networks_do_not_import_options():
    """A network is built from plain arguments, so that other programs can use it."""
    for module, path in zip(map(name_of, FILES), FILES):
        if module.startswith("models.network_") or module == "models.codecs":
            assert "options" not in set(imports(path.read_text())), module


def upward(module, source):
    """What a file imports that is not below it, in words."""
    own = row(module)
    if own is None:
        return [f"{module} has no row; add it to DESIGN 1 and to this test"]
    return [f"{module} (row {own}) imports {name} (row {row(name)})" for name in imports(source)
            if row(name) is not None and row(name) < own and name not in TABLES and (module, name) not in EXCEPTIONS]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    source, module = path.read_text(), name_of(path)
    if module in TABLES:
        assert not list(imports(source)), f"{path.name} is a literal table and imports nothing"
        return
    assert not upward(module, source)


@pytest.mark.parametrize("source", ["import train", "def save():\n    from train import Run",
                                    "if __name__ == '__main__':\n    from commands import prove",
                                    "from runtime import resume"])
def test_an_upward_import_is_seen_wherever_it_stands(source):
    assert upward("checkpoint", source)


def test_no_circle():
    needs = {name_of(path): {name for name in imports(path.read_text()) if name in MODULES and name not in TABLES
                             and (name_of(path), name) not in EXCEPTIONS} for path in FILES}
    while free := {module for module, needed in needs.items() if not needed & set(needs)}:
        needs = {module: needed for module, needed in needs.items() if module not in free}
    assert not needs, {module: sorted(needed & set(needs)) for module, needed in needs.items()}


def test_tables_name_what_exists():
    for package, table in (("models", "MODELS"), ("models", "NETWORKS"), ("losses", "LOSSES"), ("data", "DATASETS")):
        for target in getattr(importlib.import_module(package), table).values():
            module, _, name = target.partition(":")
            assert hasattr(importlib.import_module(module), name), target


def test_no_utils_and_no_python_in_options():
    assert not [p for p in FILES if p.stem.startswith("utils")]
    assert not list((ROOT / "options").rglob("*.py")), "options/__init__.py would hijack `import options`"


def test_only_torch_torchvision_numpy_and_the_standard_library():
    allowed = {"torch", "torchvision", "numpy", *sys.stdlib_module_names, *(name.split(".")[0] for name in MODULES)}
    for path in FILES:
        for name in imports(path.read_text()):
            assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
