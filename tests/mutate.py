"""Change one token of the sources at random and see whether a test fails: what survives is a hole in the tests.

    python -m tests.mutate --count 200 --seed 0
    python -m tests.mutate losses/pixel.py data/resize.py --count 40
    python -m tests.mutate --seed 0 --only 17 63              # two changes of that sample again, after a new test
    python -m tests.mutate --seed 0 --only $(seq 101 200)     # its second half

Every change is made in a temporary copy of the repository. A change that survives is equivalent or needs a test.
"""

import argparse
import ast
import io
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tokenize
from collections import Counter
from pathlib import Path

import pytest
import torch  # noqa: F401  once, for all forks

ROOT = Path(__file__).resolve().parent.parent
# Test files of each source file, the quick ones first; where a line is absent, those of its folder.
TESTS = {
    "checkpoint.py": "checkpoint checkpoint_cli", "options.py": "options options_vrt ranges",
    "data": "data_folders data_frames data_images", "data/frames.py": "data_frames data_video",
    "data/image_files.py": "data_image_files data_images",
    "data/images.py": "data_images data_folders", "data/loader.py": "data_images data_frames synthetic",
    "data/masks.py": "drawn segmentation", "data/resize.py": "resize data_images",
    "data/sampler.py": "sampler data_images", "data/strokes.py": "drawn data_strokes inktrace",
    "data/styles.py": "data_folders lgt", "data/synthetic.py": "drawn synthetic data_images",
    "data/synthetic_masks.py": "drawn segmentation", "data/synthetic_styles.py": "drawn lgt",
    "data/transforms.py": "data_video data_vimeo", "data/video.py": "data_video", "data/vimeo.py": "data_vimeo",
    "losses": "vqgan", "losses/energy.py": "loss_energy", "losses/lpips.py": "loss_vq", "losses/pixel.py": "loss_pixel",
    "losses/stroke.py": "network_inktrace",
    "losses/tanimoto.py": "loss_tanimoto reference_resuneta", "losses/vqperceptual.py": "loss_vq",
    "models": "finite foreign validation", "models/codecs.py": "lgt", "models/model_inktrace.py": "inktrace",
    "models/model_lgt.py": "network_lgt lgt", "models/model_segmentation.py": "reference_resuneta segmentation",
    "models/model_vqgan.py": "vqgan", "models/model_vrt.py": "vrt",
    "models/network_discriminator.py": "network_vqgan", "models/network_inktrace.py": "network_inktrace",
    "models/network_lgt.py": "network_lgt", "models/network_resuneta.py": "network_resuneta reference_resuneta",
    "models/network_spynet.py": "network_vrt", "models/network_vqgan.py": "reference_vqvae network_vqgan",
    "models/network_vqvae.py": "reference_vqvae network_vqgan", "models/network_vrt.py": "network_vrt",
}
PAIRS = ("< <=", "> >=", "== !=", "+ -", "* /", "// /", "+= -=", "*= /=", "% //", "<< >>", "True False", "and or",
         "mean sum", "min max", "amin amax", "argmin argmax", "zeros ones", "floor ceil", "any all", "sin cos",
         "square sqrt", "exp log", "zeros_like ones_like")
SWAPS = {word: other for a, b in (pair.split() for pair in PAIRS) for word, other in ((a, b), (b, a))}
SKIPPED = shutil.ignore_patterns(".git", "__pycache__", "experiments", "*.egg-info")


def replacements(token: tokenize.TokenInfo) -> list[str]:
    """List what may stand in a token's place."""
    if token.type == tokenize.NUMBER:
        value = ast.literal_eval(token.string)
        return [str(value + 1), str(value - 1)] if isinstance(value, int) else [repr(value * 2), repr(value / 2)]
    if token.string == "not":
        return [""]
    return [SWAPS[token.string]] if token.string in SWAPS else []


def changes(name: str, text: str) -> list[tuple[str, int, str, str]]:
    """List (file, line number, line, changed line) for every change of one token."""
    lines, found = text.splitlines(), []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        (row, start), (_, end) = token.start, token.end
        line = lines[row - 1] if token.string else ""
        found += [(name, row, line, line[:start] + new + line[end:]) for new in replacements(token)]
    return found


def changed_text(text: str, row: int, changed: str) -> str | None:
    """Return the source with one line changed, None where it does not compile or means the same."""
    lines = text.splitlines()
    other = "\n".join([*lines[:row - 1], changed, *lines[row:], ""])
    try:
        return None if ast.dump(ast.parse(other)) == ast.dump(ast.parse(text)) else other
    except SyntaxError:
        return None


def tests_of(name: str) -> list[str]:
    """List the test files of a source file that exist, then the page of options, which has every default and range."""
    names = f'{TESTS.get(name) or TESTS[name.split("/")[0]]} docs'
    return [path for path in (f"tests/test_{word}.py" for word in names.split()) if (ROOT / path).exists()]


def outcome(copy: Path, tests: list[str], seconds: float, changed: bool = True) -> str:
    """Run tests in a child process that has torch already; `timed out` where it and its children had to be ended."""
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(copy)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(1, 2)
        sys.path[0], sys.dont_write_bytecode = str(copy), changed
        del sys.modules["tests"]
        os._exit(pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]))
    ends = time.monotonic() + seconds
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < ends:
        time.sleep(0.05)
    if not ended[0]:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "timed out"
    return "caught" if ended[1] else "SURVIVED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="source files; default: checkpoint.py, options.py and three folders")
    parser.add_argument("--count", type=int, default=200, help="number of changes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of changes")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the changes to make, counted from 1")
    parser.add_argument("--seconds", type=float, default=180, help="time limit of the tests of one change")
    arguments = parser.parse_args()
    folders = [path.relative_to(ROOT) for name in ("models", "losses", "data") for path in (ROOT / name).glob("*.py")]
    names = arguments.files or sorted(["checkpoint.py", "options.py", *map(str, folders)])
    sources = {name: (ROOT / name).read_text() for name in names}
    places = [change for name, text in sources.items() for change in changes(name, text)]
    random.Random(arguments.seed).shuffle(places)
    counts, sound = Counter(), set()
    os.environ.setdefault("PERDURE_SHARED", str(ROOT.parent / "shared"))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=SKIPPED))
        valid = ((place, text) for place in places if (text := changed_text(sources[place[0]], place[1], place[3])))
        for number, ((name, row, line, changed), text) in enumerate(itertools.islice(valid, arguments.count), 1):
            if arguments.only and number not in arguments.only:
                continue
            path, tests = copy / name, tests_of(name)
            if str(tests) not in sound and outcome(copy, tests, 5 * arguments.seconds, changed=False) != "SURVIVED":
                raise SystemExit(f"{name}: {' '.join(tests)} must pass before anything is changed")
            sound.add(str(tests))
            times = path.stat()
            path.write_text(text)
            found = outcome(copy, tests, arguments.seconds)
            path.write_text(sources[name])
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # what Python compiled from it stays valid
            counts[found] += 1
            print(f"{number:4} {found} {name}:{row}\n  - {line}\n  + {changed}", flush=True)
    print(f"{counts.total()} changes:", ", ".join(f"{count} {found}" for found, count in counts.items()))


if __name__ == "__main__":
    main()
