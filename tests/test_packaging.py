"""What pip installs: the dependencies and no file of ours, since the project runs from its checkout."""

import os
import runpy
import shutil
import subprocess
import sys
import warnings
import zipfile

import pytest

from tests.conftest import ROOT


def test_a_wheel_puts_no_top_level_name_into_site_packages(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    names = [name for name in listed if name and (ROOT / name).is_file()] or \
        [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and ".git" not in path.parts]
    for name in names:  # a copy, for the build leaves folders behind
        if name.split("/")[0] not in ("tests", "docs"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    built = subprocess.run([sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('..')"],
                           cwd=source, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if ".dist-info/" not in name]
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    assert "Requires-Dist: torch>=2.6" in metadata and "Requires-Dist: pytest" in metadata


@pytest.mark.parametrize("words, answer", [
    (["log", "report", "RUN"], "use: python -m report RUN\n"),
    (["options", "reference"], "use: python -m commands.reference > docs/options.md\n"),
    (["report", "nowhere"], "error: nowhere: "),
    (["checkpoint", "inspect", "nowhere"], "error: Checkpoint file not found: nowhere; "),
    (["data.prepare", "meta", "/nowhere", "out.txt"], "error: FOLDER: folder /nowhere does not exist\n")])
def test_the_commands_run_as_modules_and_old_words_answer_with_the_new_ones(monkeypatch, capsys, words, answer):
    monkeypatch.setattr(sys, "argv", words)
    warnings.simplefilter("ignore")  # of what is imported already
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)  # as python -m does
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out
    assert said.err.startswith(answer) and said.err.count("\n") == 1
