"""Change one token of the sources at random and see whether a test fails: what survives is a hole in the tests.

    python -m tests.mutate --count 200 --seed 0
    python -m tests.mutate losses/pixel.py data/resize.py --count 40
    python -m tests.mutate --seed 0 --only 17 63              # two changes of that sample again, after a new test

Every change is made in a temporary copy of the repository. A change that survives is equivalent or needs a test.
"""

import argparse
import ast
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

from tests.conftest import ROOT, SHARED

# Test files of each source file, the ones that fail soonest first. A folder's line is for all others in it.
TESTS = {
    "checkpoint.py": "checkpoint checkpoint_cli keeping",
    "options.py": "options options_vrt ranges stages",
    "data/": "data_folders data_frames data_image_files data_images data_video",
    "data/folders.py": "data_folders segmentation lgt",
    "data/images.py": "data_images data_folders",
    "data/masks.py": "segmentation data_folders",
    "data/resize.py": "resize data_images",
    "data/sampler.py": "sampler data_images",
    "data/loader.py": "sampler data_images data_frames synthetic",
    "data/strokes.py": "data_strokes inktrace",
    "data/styles.py": "data_folders lgt",
    "data/synthetic.py": "synthetic data_images",
    "data/synthetic_masks.py": "segmentation",
    "data/synthetic_styles.py": "lgt",
    "data/transforms.py": "data_video data_vimeo",
    "data/video.py": "data_video data_frames data_folders",
    "data/vimeo.py": "data_vimeo data_folders",
    "losses/": "vqgan options",
    "losses/energy.py": "loss_energy",
    "losses/lpips.py": "loss_vq",
    "losses/pixel.py": "loss_pixel vrt",
    "losses/stroke.py": "network_inktrace",
    "losses/tanimoto.py": "loss_tanimoto segmentation",
    "losses/vqperceptual.py": "loss_vq vqgan",
    "models/": "finite validation foreign vrt",
    "models/codecs.py": "lgt",
    "models/model_inktrace.py": "inktrace",
    "models/model_lgt.py": "network_lgt lgt",
    "models/model_segmentation.py": "segmentation",
    "models/model_vqgan.py": "vqgan",
    "models/model_vrt.py": "vrt",
    "models/network_discriminator.py": "network_vqgan loss_vq",
    "models/network_inktrace.py": "network_inktrace",
    "models/network_lgt.py": "network_lgt lgt",
    "models/network_resuneta.py": "network_resuneta reference_resuneta",
    "models/network_spynet.py": "network_vrt",
    "models/network_vqgan.py": "network_vqgan reference_vqvae",
    "models/network_vqvae.py": "network_vqgan reference_vqvae",
    "models/network_vrt.py": "network_vrt",
}
PAIRS = ("< <=", "> >=", "== !=", "+ -", "* /", "// /", "+= -=", "*= /=", "% //", "<< >>", "True False", "and or",
         "mean sum", "min max", "amin amax", "argmin argmax", "zeros ones", "floor ceil", "any all", "sin cos",
         "square sqrt", "exp log", "is ==", "zeros_like ones_like")
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
    """List (file, line number, line, changed line) for every change of one token that still compiles."""
    lines, found, tree = text.splitlines(), [], ast.dump(ast.parse(text))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        (row, start), (_, end) = token.start, token.end
        for new in replacements(token):
            changed = lines[row - 1][:start] + new + lines[row - 1][end:]
            try:
                other = ast.dump(ast.parse("\n".join([*lines[:row - 1], changed, *lines[row:]])))
            except SyntaxError:
                continue
            if other != tree:
                found.append((name, row, lines[row - 1], changed))
    return found


def tests_of(name: str) -> list[str]:
    """List the test files of a source file that exist."""
    names = TESTS.get(name) or TESTS[f"{name.split('/')[0]}/"]
    return [path for path in (f"tests/test_{word}.py" for word in names.split()) if (ROOT / path).exists()]


def passes(copy: Path, tests: list[str], seconds: float, changed: bool = True) -> bool:
    """Run tests in the copy, and end them and what they started after `seconds`, which counts as a failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PERDURE_SHARED": str(SHARED), "PYTHONDONTWRITEBYTECODE": "1" if changed else ""}
    process = subprocess.Popen(command, cwd=copy, env=environment, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


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
    chosen = list(enumerate(random.Random(arguments.seed).sample(places, min(arguments.count, len(places))), 1))
    chosen = [(number, change) for number, change in chosen if number in (arguments.only or range(1, len(chosen) + 1))]
    survived, sound = 0, set()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=SKIPPED))
        for number, (name, row, line, changed) in chosen:
            path, tests = copy / name, tests_of(name)
            if name not in sound and not passes(copy, tests, 5 * arguments.seconds, changed=False):
                raise SystemExit(f"{name}: {' '.join(tests)} must pass before anything is changed")
            sound.add(name)
            lines, times = sources[name].splitlines(), path.stat()
            path.write_text("\n".join([*lines[:row - 1], changed, *lines[row:], ""]))
            lives = passes(copy, tests, arguments.seconds)
            path.write_text(sources[name])
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # what Python compiled from it stays valid
            survived += lives
            print(f"{number:4} {'SURVIVED' if lives else 'caught'} {name}:{row}\n  - {line}\n  + {changed}", flush=True)
    print(f"caught {len(chosen) - survived} of {len(chosen)} changes, out of {len(places)} possible ones")


if __name__ == "__main__":
    main()
