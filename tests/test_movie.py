"""Videos in and out through ffmpeg: rate, pixels' shape, sound, rotation, depth; memory of a window; resumed output."""

import json
import os
import re
import shutil
import subprocess
import weakref
from fractions import Fraction

import pytest
import torch

import options
from data import DATASETS, movie, prepare
from data.image_files import encode, read_picture
from models import MODELS, NETWORKS
from tests import test_lgt, test_segmentation, test_vqgan
from tests.conftest import write_json
from tests.runs import run, second_writer, stopped_after_file
from tests.test_vrt import trained, use  # noqa: F401  the fixture
from train import build_model

needs_ffmpeg = pytest.mark.skipif(not (shutil.which("ffmpeg") and shutil.which("ffprobe")),
                                  reason="ffmpeg is not on the PATH")


def film(path, *words, size="32x24", rate="30000/1001", seconds=0.4, sound=True, depth="yuv420p"):
    """Make a clip of a moving test picture, with a tone."""
    tone = ["-f", "lavfi", "-i", f"sine=duration={seconds}", "-c:a", "aac"] if sound else []
    ffmpeg("-f", "lavfi", "-i", f"testsrc2=size={size}:rate={rate}:duration={seconds}", *tone, "-c:v", "libx264",
           "-crf", "5", "-pix_fmt", depth, *words, path)
    return str(path)


def ffmpeg(*words):
    return subprocess.run(["ffmpeg", "-v", "error", *map(str, words)], check=True, capture_output=True).stdout


def streams(path, kind):
    words = ["ffprobe", "-v", "error", "-select_streams", kind, "-show_streams", "-of", "json", str(path)]
    return json.loads(subprocess.run(words, check=True, capture_output=True).stdout)["streams"]


def sound_of(path):
    """The packets of all audio, as they are in the file."""
    return ffmpeg("-i", path, "-map", "0:a", "-c", "copy", "-f", "streamhash", "-")


def frames(path):
    return torch.stack(movie.read_frames(list(movie.frame_paths(str(path)).values())))


# ---------------------------------------------------------------- reading


@needs_ffmpeg
def test_a_quarter_turn_in_the_metadata_turns_frames_and_pixels(tmp_path):
    plain = film(tmp_path / "a.mp4", "-vf", "setsar=4/3")
    turned = str(tmp_path / "b.mp4")
    ffmpeg("-i", plain, "-c", "copy", "-metadata:s:v", "rotate=90", turned)
    assert movie.facts_of(plain).aspect == "4/3" and movie.facts_of(turned).aspect == "3/4"
    assert movie.facts_of(plain).rate == "30000/1001" and movie.facts_of(plain).count == 12
    one, two = frames(plain), frames(turned)
    assert one.shape == (12, 3, 24, 32) and two.shape == (12, 3, 32, 24)
    apart = [(one.rot90(k, (2, 3)).float() - two.float()).abs().mean().item() for k in (1, 3)]
    assert min(apart) < 3 < max(apart)


@needs_ffmpeg
@pytest.mark.parametrize("size, matrix", [("96x96", "smpte170m"), ("720x720", "bt709")])
def test_colours_without_a_tag_are_those_of_the_usual_matrix_for_the_size(tmp_path, size, matrix):
    path = tmp_path / "a.mkv"
    ffmpeg("-f", "lavfi", "-i", f"color=0xC03020:size={size}:rate=5:duration=0.2", "-vf",
           f"format=rgb24,scale=out_color_matrix={matrix},format=yuv420p", "-c:v", "libx264", "-crf", "1", path)
    assert frames(path)[0].float().mean((1, 2)).tolist() == pytest.approx([0xC0, 0x30, 0x20], abs=3)


@needs_ffmpeg
def test_ten_bits_are_read_as_eight(tmp_path):
    ten, eight = (film(tmp_path / f"{depth}.mkv", depth=depth) for depth in ("yuv420p10le", "yuv420p"))
    assert (frames(ten).float() - frames(eight).float()).abs().mean() < 2 and frames(ten).dtype == torch.uint8


@needs_ffmpeg
def test_a_varying_rate_is_read_at_its_mean(tmp_path):
    path = film(tmp_path / "v.mp4", "-vf", r"select=not(mod(n\,3))+lt(n\,10)", "-vsync", "vfr", rate=30, seconds=1)
    facts = movie.facts_of(path)
    assert facts.filters and facts.count / Fraction(facts.rate) == pytest.approx(1, abs=0.1)
    assert len(frames(path)) == facts.count


@needs_ffmpeg
def test_windows_hold_only_their_frames_and_any_frame_can_be_asked_for(tmp_path):
    path = film(tmp_path / "a.mp4", seconds=1)
    whole = frames(path)
    movie._stream.cache_clear()
    paths, seen = list(movie.frame_paths(path).values()), []
    for start in (0, 2, 4, 20, 21, 3):  # windows that overlap, a jump ahead, back
        part = movie.read_frames(paths[start : start + 4])
        assert torch.equal(torch.stack(part), whole[start : start + 4])
        seen += map(weakref.ref, part)
        del part
        assert len({id(ref()) for ref in seen if ref() is not None}) <= 4


@needs_ffmpeg
def test_a_cut_off_video_or_none_at_all_is_one_line(tmp_path, shared):
    path = film(tmp_path / "a.mkv", seconds=1)
    assert movie.facts_of(path).count == 30
    with open(path, "rb+") as file:
        file.truncate(os.path.getsize(path) // 2)
    with pytest.raises(ValueError, match=r"a.mkv: ends at frame \d+ of 30 \(.*\)$") as caught:
        frames(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"not_frames.mp4: can't be read as a video \([^/]+\)$"):
        movie.facts_of(str(shared / "field/not_frames.mp4"))


# ---------------------------------------------------------------- writing


@needs_ffmpeg
@pytest.mark.parametrize("size", ["32x24", "33x25"])
def test_a_copy_has_the_colours_times_and_sound_of_its_source(tmp_path, size):
    source = film(tmp_path / "a.mkv", "-vf", "setsar=4/3,hue=s=0.3", size=size, depth="yuv444p")
    out = tmp_path / "b.mp4"
    movie.write_video(out, (content for _, content in movie.pictures_of(source)), source, "mine")
    movie_out, theirs = movie.facts_of(str(out)), movie.facts_of(source)
    assert movie_out[:3] == theirs[:3] and movie_out.aspect == theirs.aspect == "4/3"
    assert sound_of(out) == sound_of(source) and movie.mark_of(str(out)) == "mine"
    difference = frames(out).float() - frames(source).float()
    assert difference.abs().mean() < 8 and difference.mean((0, 2, 3)).abs().max() < 1  # half of the chroma is lost


@needs_ffmpeg
def test_a_late_first_frame_stays_late(tmp_path):
    source = film(tmp_path / "a.mp4", seconds=0.5)
    late = str(tmp_path / "late.mkv")
    ffmpeg("-itsoffset", "0.3", "-i", source, "-i", source, "-map", "0:v", "-map", "1:a", "-c", "copy", late)
    out = tmp_path / "out.mp4"
    movie.write_video(out, (content for _, content in movie.pictures_of(late)), late)
    assert movie.facts_of(late).offset == pytest.approx(0.3, abs=0.05)
    assert movie.facts_of(str(out)).offset == pytest.approx(movie.facts_of(late).offset, abs=0.02)
    assert movie.facts_of(str(out)).count == 15


@needs_ffmpeg
def test_sound_that_a_file_cannot_hold_is_said_before_any_work(tmp_path):
    source = film(tmp_path / "a.mkv", "-c:a", "pcm_s16le")
    with pytest.raises(ValueError, match="trial.mp4: can't be written with the sound of .*a.mkv .*pcm_s16le") as caught:
        movie.try_writing(tmp_path / "x.mp4", source)
    assert "\n" not in str(caught.value)
    movie.try_writing(tmp_path / "x.mkv", source)


# ---------------------------------------------------------------- the commands


@needs_ffmpeg
def test_a_clip_is_restored_killed_and_resumed_to_an_equal_clip(trained, tmp_path, monkeypatch, capsys):  # noqa: F811
    path, _ = trained
    source = film(tmp_path / "a b'ü.mp4", size="16x16", seconds=0.12)
    whole, half = tmp_path / "whole.mp4", tmp_path / "half.mp4"
    assert use(path, "--input", source, "--output", whole) == 0
    assert sorted(os.listdir(tmp_path)) == ["a b'ü.mp4", "whole.mp4"]
    (video,), (sound,) = streams(whole, "v"), streams(whole, "a")
    assert (video["width"], video["height"], video["nb_frames"], video["r_frame_rate"]) == (64, 64, "4", "30000/1001")
    assert sound["codec_name"] == "aac" and sound_of(whole) == sound_of(source)
    with stopped_after_file(monkeypatch, "00000002.png"):
        assert use(path, "--input", source, "--output", half) == 143
    assert not half.exists() and len(os.listdir(tmp_path / "half.mp4.frames")) == 4  # three frames and made_by.json
    capsys.readouterr()
    assert use(path, "--input", source, "--output", half) == 0
    assert "1 written, 3 were there" in capsys.readouterr().out
    assert half.read_bytes() == whole.read_bytes() and not (tmp_path / "half.mp4.frames").exists()
    assert use(path, "--input", source, "--output", half) == 0 and "half.mp4 was there" in capsys.readouterr().out
    with pytest.raises(options.OptionError, match="half.mp4: exists, and is not the result of these weights, options"):
        use(path, "--input", source, "--output", half, "--set", "val.flip_seq=true")


@needs_ffmpeg
def test_a_second_process_does_not_write_the_same_clip(trained, tmp_path, monkeypatch):  # noqa: F811
    path, _ = trained
    source, out = film(tmp_path / "a.mp4", size="16x16", seconds=0.12), tmp_path / "b.mp4"
    told = second_writer(monkeypatch, lambda: use(path, "--input", source, "--output", out))
    assert use(path, "--input", source, "--output", out) == 0
    assert re.match(rf"{out}.frames: process {os.getpid()} on .* is writing here; wait for it or stop it", told[0])
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]


@needs_ffmpeg
def test_frames_of_a_clip_and_a_folder_of_clips(trained, tmp_path, capsys):  # noqa: F811
    path, _ = trained
    (tmp_path / "in").mkdir()
    clips = [film(tmp_path / f"in/{name}", sound=False, seconds=0.1, size="16x16") for name in ("b.mov", "a.mkv")]
    assert use(path, "--input", tmp_path / "in", "--output", tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["a.mp4", "b.mp4"]
    assert use(path, "--input", clips[0], "--output", tmp_path / "png") == 0
    assert sorted(os.listdir(tmp_path / "png")) == ["00000000.png", "00000001.png", "00000002.png", "made_by.json"]
    difference = frames(tmp_path / "out/b.mp4")[1].float() - read_picture(str(tmp_path / "png/00000001.png"))
    assert difference.abs().mean() < 4
    truth = film(tmp_path / "truth.mkv", sound=False, seconds=0.1, size="64x64")
    assert use(path, "--input", clips[0], "--output", tmp_path / "t.mp4", "--truth", truth) == 0
    assert "metrics  psnr" in capsys.readouterr().out and (tmp_path / "t.csv").read_text().count("\n") == 4


def vqgan(folder):
    return write_json(folder / "run.json", test_vqgan.tree(folder))


def lgt(folder):
    data = test_lgt.folders(folder / "data", {"a": 2, "b": 2})
    return test_lgt.recipe(folder, "run", {}, {"dataroot": data, "style_subdirs": ["a", "b"]}, {"dataroot": data},
                           val={"num_steps": 1})


@needs_ffmpeg
@pytest.mark.parametrize("recipe, flags", [(vqgan, ()), (test_segmentation.options_in, ()), (lgt, ("--style", "b"))])
def test_other_recipes_take_a_video_frame_by_frame(tmp_path, recipe, flags):
    path = recipe(tmp_path)
    opt, _ = options.parse(str(path), [], MODELS, NETWORKS, DATASETS)
    torch.save(build_model(opt).networks["G"].state_dict(), tmp_path / "w.pth")
    source, out = film(tmp_path / "a.mp4", size="22x18", seconds=0.1), tmp_path / "out.mkv"
    assert run("-opt", path, "--test", "--resume", tmp_path / "w.pth", "--input", source, "--output", out, *flags) == 0
    assert frames(out).shape == (3, 3, 18, 22) and sound_of(out) == sound_of(source)
    assert not (tmp_path / "out.mkv.frames").exists()


@needs_ffmpeg
def test_prepare_turns_videos_into_frames(tmp_path):
    clip = film(tmp_path / "a.mp4", sound=False, seconds=0.1)
    assert prepare.main(["frames", clip, str(tmp_path / "one")]).endswith("one: 3 frames")
    assert torch.equal(read_picture(str(tmp_path / "one/00000002.png")), frames(clip)[2])
    (tmp_path / "clips").mkdir()
    shutil.copy(clip, tmp_path / "clips/b.MP4")
    prepare.main(["frames", str(tmp_path / "clips"), str(tmp_path / "all")])
    assert os.listdir(tmp_path / "all/b") and len(os.listdir(tmp_path / "all/b")) == 3
    with pytest.raises(ValueError, match="is neither a video"):
        prepare.main(["frames", str(tmp_path), str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_without_ffmpeg_one_line_says_how_to_install_it(trained, tmp_path, monkeypatch):  # noqa: F811
    path, _ = trained
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.mp4").write_bytes(b"\0")
    for out in ("b.mp4", "folder"):
        with pytest.raises(options.OptionError, match="a.mp4: videos need ffmpeg, which is not on the PATH; install it "
                           r"\(apt install ffmpeg, .*\), or use a folder of frames$"):
            use(path, "--input", tmp_path / "a.mp4", "--output", tmp_path / out)
    with pytest.raises(ValueError, match="install it"):
        prepare.main(["frames", str(tmp_path / "a.mp4"), str(tmp_path / "out")])
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("output, words", [("x.mp4", "is a video, and .* is none; name a folder"),
                                           ("x.webm", "is a video, and")])
def test_pictures_do_not_become_a_video(trained, tmp_path, output, words):  # noqa: F811
    path, folder = trained
    with pytest.raises(options.OptionError, match=words):
        use(path, "--input", folder / "lq", "--output", tmp_path / output)


def test_a_picture_is_no_frame_of_a_video(tmp_path):
    (tmp_path / "x.mp4").mkdir()
    (tmp_path / "x.mp4/00000000").write_bytes(encode(torch.zeros(3, 8, 8, dtype=torch.uint8)))
    assert not movie.is_frame(str(tmp_path / "x.mp4/00000000"))
