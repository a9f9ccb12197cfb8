"""The pages in docs/: the reference is what the code says, links lead somewhere, and the commands exist."""

import ast
import io
import re
import shlex
import sys
import tokenize
import types

import pytest

import main as door
import options
from commands import arguments
from commands.reference import arguments_in, reference
from data import DATASETS
from models import NETWORKS
from tests.conftest import ROOT
from tests.test_layers import FILES, ROOMS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_reference_is_what_the_code_checks():
    text = reference()
    assert (ROOT / "docs" / "options.md").read_text() == text, "run: python -m commands.reference > docs/options.md"
    for kind in (options.Top, options.Path, options.Checkpoint, options.Log, options.Loader):
        for key in options.schema_of(kind):
            assert f"\n| `{key}` |" in text


def test_entries_of_a_docstring():
    doc = "A class.\n\nArgs:\n    a: the first, which\n        continues. b, c: both.\nReturns: d: nothing."
    assert arguments_in(doc, ["a", "b", "c", "d"]) == {"a": "the first, which continues.", "b": "both.", "c": "both."}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_commands_are_taken(page):
    text = page.read_text().replace("\\\n", " ")  # a command may take several lines
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
    for line in re.findall(r"^    python main\.py (.*)$", text, re.MULTILINE):
        words = [word for word in shlex.split(re.split(r"\s{3,}| & ", line)[0])]
        file = next((words[i + 1] for i, word in enumerate(words) if word == "-opt"), None) or \
            options.find_option_file(words, str(ROOT / "options"))
        flags = options.FLAGS | (options.cli_table(str(ROOT / file)) if file and (ROOT / file).exists() else {})
        known = arguments.parser_for(flags, exit_on_error=False)
        known.parse_args(words)
        for key in re.findall(r"--set (\w[\w.]*)=", line):
            assert key.split(".")[0] in options.schema_of(options.Top), line


def test_the_recipe_of_the_page_trains_and_resumes(tmp_path, monkeypatch, capsys):
    """docs/recipe.md: its network, dataset, rows of the tables and option file, as they stand there."""
    network, dataset, rows, file = re.findall(r"```(?:python|json)\n(.*?)```", (ROOT / "docs/recipe.md").read_text(),
                                              re.DOTALL)
    for source, table, row in zip((network, dataset), (NETWORKS, DATASETS), rows.splitlines()):
        name, target = re.search(r'"(.*?)": "(.*?)"', row).groups()
        module = types.ModuleType(target.partition(":")[0])
        exec(source, vars(module))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(table, name, target)
    path = tmp_path / "train_smoother.json"
    path.write_text(file)
    for total in (2, 4):
        words = ["--save_dir", str(tmp_path), "--set", f"train.total_iter={total}"]
        assert door.main(["-opt", str(path), *words]) == 0
    assert "train_smoother/models/2.json: iteration 2 of 4" in capsys.readouterr().out


def test_contributing_names_every_file_once_it_is_there():
    """The guided list and the table of recipes: each path exists, and no module is missing."""
    named = set(re.findall(r"`([\w/]+\.(?:py|json|js)|[\w/]+/)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert not [path for path in named if not (ROOT / path).exists()]
    modules = {str(path.relative_to(ROOT)) for path in FILES} - {f"{room}/__{kind}__.py" for room in ROOMS
                                                                 for kind in ("init", "main")}
    assert modules <= named, modules - named


def lines_of_code(source):
    """Count the lines that hold code: no blank line, comment or docstring."""
    tree, lines = ast.parse(source), set()
    documented = [node.body[0] for node in ast.walk(tree)
                  if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - {line for text in documented for line in range(text.lineno, text.end_lineno + 1)})


def test_the_whole_stays_small():
    """Below 15,000 lines of code; docstrings are not counted, so that nothing is saved on them."""
    assert lines_of_code('"""A."""\n\nx = """b\nc"""  # d\n') == 2
    assert sum(lines_of_code(path.read_text()) for path in [*FILES, *(ROOT / "benchmarks").glob("*.py")]) < 15_000


def test_the_loop_stays_a_page():
    source = (ROOT / "train.py").read_text()
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    assert source.count("\n") <= 330 and max(node.end_lineno - node.lineno for node in classes) <= 200


def test_every_option_is_explained_in_a_sentence_of_its_own():
    """No empty cell, no fragment of a sentence that began elsewhere, no sentence for two keys of one table."""
    for table in re.findall(r"(?:^\|.*\n)+", reference(), re.MULTILINE):
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()[2:]]
        meanings = [meaning for _, _, _, meaning in cells]
        for key, _, _, meaning in cells:
            assert re.fullmatch(r"[A-Z\"(].*\w.*\.", meaning) and meaning.count(" ") >= 2, f"{key}: {meaning!r}"
            assert not re.match(r"(of|as|its|by|and|or|to|from|likewise|others?|the same|these|null|none)\b", meaning,
                                re.IGNORECASE), f"{key}: {meaning!r}"
            assert meanings.count(meaning) == 1, f"{key}: {meaning!r} stands twice"
            assert not re.search(r"\. (?!null)[a-z_]+: ", meaning), f"{key}: {meaning!r} runs into another key's entry"


def test_every_promise_has_its_test():
    """docs/promises.md names tests that exist; "P" is tests/test_promises.py, "the same" the row above."""
    for line in (ROOT / "docs/promises.md").read_text().splitlines():
        if re.match(r"\| \d\d\d|\| README", line):
            cell = re.split(r"(?<!\\)\|", line)[4].strip()
            found = re.fullmatch(r"the same|(?:P|`(tests/\w+\.py)`) `(test_\w+)`", cell)
            assert found, line
            if found[2]:
                assert f"def {found[2]}(" in (ROOT / (found[1] or "tests/test_promises.py")).read_text(), line
