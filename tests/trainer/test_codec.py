import json
import math
import re
import shutil
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipelines.contracts import generator
from pipelines.faults import InputError
from trainer import codec as codecs
from trainer import footage as videos
from trainer import latents
from trainer.codec import Codec
from trainer.recipes.arvae.config import ArvaeConfig
from trainer.recipes.arvae.recipe import ArvaeRecipe

torch.set_num_threads(1)

CONFIG = {
    "down": 8,
    "supplement_channels": 6,
    "widths": [4, 6, 8, 8],
    "motion_width": 4,
    "state_width": 4,
    "spynet": {"levels": 2, "widths": [8, 8, 4, 4], "kernel": 3},
    "transform": "dct",
    "first_frame": {"kind": "own", "channels": 24, "widths": [4, 6, 8, 8]},
    "perceptual": None,
}


def a_codec(seed: int = 0) -> Codec:
    recipe = ArvaeRecipe(ArvaeConfig.model_validate(CONFIG))
    return Codec(recipe, recipe.build(seed))


def scene(frames: int, height: int, width: int) -> torch.Tensor:
    """Smooth texture that drifts by a pixel a frame, (1, 3, T, H, W) in [-1, 1]."""
    noise = torch.randn(1, 1, (height + frames) // 8 + 2, (width + frames) // 8 + 2, generator=generator(0, 0, "scene"))
    texture = torch.nn.functional.interpolate(noise, scale_factor=8, mode="bicubic").tanh() * 0.9
    return torch.stack([texture[..., t : t + height, t : t + width] for t in range(frames)], dim=2).expand(
        -1, 3, -1, -1, -1
    )


@pytest.fixture
def video(tmp_path):
    """An mp4 of 20 frames of 54 x 36 at 12.5 frames/s, and its pixels."""
    pixels = scene(20, 36, 54)
    with videos.writer(str(tmp_path / "scene.mp4"), Fraction(25, 2), 36, 54) as made:
        made.add(pixels)
    return tmp_path / "scene.mp4", pixels


def test_any_size_comes_back_at_its_size():
    codec, pixels = a_codec(), scene(3, 37, 50)
    assert codec.padded(37, 50) == (40, 56)
    made = codec.reconstruct(pixels)
    assert made.shape == pixels.shape
    assert (made - pixels).square().mean() < 0.05 * pixels.square().mean()


def test_padding_does_not_change_sizes_that_fit():
    codec, pixels = a_codec(), scene(3, 32, 40)
    trained = codec.model(pixels).pixels_B3THW.clamp(-1, 1)
    assert torch.allclose(codec.reconstruct(pixels), trained, atol=1e-6)


def test_memory_does_not_grow_with_the_video(tmp_path):
    codec, alive = a_codec(), []

    def frames(count):
        for t in range(count):
            frame = torch.full((1, 3, 1, 16, 16), t / count)
            alive.append(weakref.ref(frame))
            yield frame

    most = 0
    for _ in codec.decode(codec.encode(frames(60)), (16, 16)):
        most = max(most, sum(reference() is not None for reference in alive))
    assert len(alive) == 60
    assert most <= 2


def test_a_video_survives_the_files(video, tmp_path):
    path, _ = video
    codec, out = a_codec(), str(tmp_path / "scene.safetensors")
    coded = codecs.encode_file(codec, str(path), out)
    assert (coded.frames, coded.height, coded.width, coded.fps) == (20, 36, 54, 12.5)
    cells = 5 * 7
    assert coded.numbers == cells * (24 + 19 * 8)
    assert coded.numbers_per_frame == coded.numbers / 20

    with latents.opened(out) as (metadata, stream):
        assert (metadata["recipe"], metadata["frames"], metadata["fps"]) == ("arvae", "20", "25/2")
        assert json.loads(metadata["model"])["first_frame"]["channels"] == 24
        stored = list(stream)
    with videos.reader(str(path)) as frames:
        made = list(codec.encode(frames))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(stored, made, strict=True) for name in b)

    decoded = codecs.decode_file(codec, out, str(tmp_path / "back.mp4"))
    assert (decoded.frames, decoded.numbers, decoded.fps) == (20, coded.numbers, 12.5)
    with videos.reader(str(path)) as original, videos.reader(str(tmp_path / "back.mp4")) as back:
        assert (back.height, back.width, back.fps) == (36, 54, Fraction(25, 2))
        error = torch.cat(list(original), 2) - torch.cat(list(back), 2)
    assert -10 * math.log10((error / 2).square().mean()) > 24


def test_reconstruction_beside_the_original(video, tmp_path):
    path, pixels = video
    codec = a_codec()
    coded = codecs.reconstruct_file(codec, str(path), str(tmp_path / "out.mp4"))
    with videos.reader(str(path)) as frames:
        original = torch.cat(list(frames), 2)
    made = codec.reconstruct(original)
    expected = -10 * math.log10(((made - original) / 2).square().mean())
    assert coded.psnr_db == pytest.approx(expected, abs=0.01)
    with videos.reader(str(tmp_path / "out.mp4")) as frames:
        both = torch.cat(list(frames), 2)
    assert both.shape == (1, 3, 20, 36, 108)
    assert (both[..., :54] - original).abs().mean() < 0.05
    assert (both[..., 54:] - made).abs().mean() < 0.05
    assert coded.frames == pixels.shape[2]


def test_what_is_read_is_never_written_over(video, tmp_path):
    shutil.copy(video[0], tmp_path / "in.mp4")
    (tmp_path / "link.mp4").symlink_to("in.mp4")
    before = (tmp_path / "in.mp4").read_bytes()
    for write in (codecs.reconstruct_file, codecs.encode_file, codecs.decode_file):
        for out in ("in.mp4", "link.mp4"):
            with pytest.raises(InputError, match=rf"{out} is the file to read; name another one to write"):
                write(a_codec(), str(tmp_path / "in.mp4"), str(tmp_path / out))
    assert (tmp_path / "in.mp4").read_bytes() == before


def test_odd_sizes_can_be_written(tmp_path):
    with videos.writer(str(tmp_path / "odd.mp4"), Fraction(30000, 1001), 33, 47) as made:
        made.add(scene(3, 33, 47))
    with videos.reader(str(tmp_path / "odd.mp4")) as found:
        assert (found.height, found.width, found.fps) == (33, 47, Fraction(30000, 1001))
        assert len(list(found)) == 3


def test_written_colours_are_read_back(tmp_path):
    colours = torch.tensor([[0.6, -0.4, -0.8], [-0.5, 0.5, 0.1], [0.9, 0.9, 0.9]])
    pixels = colours.T.reshape(1, 3, 3, 1, 1).expand(1, 3, 3, 32, 32)
    with videos.writer(str(tmp_path / "flat.mp4"), Fraction(10), 32, 32) as made:
        made.add(pixels)
    with videos.reader(str(tmp_path / "flat.mp4")) as found:
        assert (torch.cat(list(found), 2) - pixels).abs().max() < 6 / 127.5


def test_an_exception_leaves_no_video(tmp_path):
    with pytest.raises(RuntimeError), videos.writer(str(tmp_path / "half.mp4"), Fraction(10), 32, 32) as made:
        made.add(scene(2, 32, 32))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_the_same_codec(tmp_path):
    codec, pixels = a_codec(seed=5), scene(3, 32, 32)
    codecs.export(codec, str(tmp_path / "export"))
    again = codecs.load(str(tmp_path / "export"))
    assert again.digest() == codec.digest() != a_codec(seed=6).digest()
    assert torch.equal(again.reconstruct(pixels), codec.reconstruct(pixels))


def test_the_example_in_the_docs_runs(video, tmp_path, monkeypatch, capsys):
    codecs.export(a_codec(), str(tmp_path / "weights"))
    video[0].rename(tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs/codec.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["decoded"].shape == names["frames"].shape == video[1].shape
    printed = capsys.readouterr().out
    assert "numbers of pixels for one of the latent" in printed and re.search(r"PSNR -?\d+\.\d\d dB", printed)


def test_a_damaged_export_is_refused(tmp_path):
    codecs.export(a_codec(), str(tmp_path))
    weights = {name: tensor + 1 for name, tensor in a_codec().model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors is not what config.json says"):
        codecs.load(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"model.safetensors is damaged: .*; export it again"):
        codecs.load(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    for changed, message in (
        ([config], r"config.json is not of a codec that `moviola export` wrote"),
        ({**config, "model": {"down": 7}}, r"config.json was changed or cut short"),
        ({"format": config["format"]}, r"config.json was changed or cut short"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            codecs.load(str(tmp_path))


def test_latents_of_other_weights_are_refused(video, tmp_path):
    out = str(tmp_path / "scene.safetensors")
    codecs.encode_file(a_codec(seed=1), str(video[0]), out)
    with pytest.raises(InputError, match=r"encoded by other weights \(arvae .*Decode with the checkpoint that encoded"):
        codecs.decode_file(a_codec(seed=2), out, str(tmp_path / "out.mp4"))
    assert not (tmp_path / "out.mp4").exists()


def test_faults_of_files_are_named(video, tmp_path):
    codec = a_codec()
    with pytest.raises(InputError, match=r"nowhere.mp4: there is no such file"):
        codecs.encode_file(codec, str(tmp_path / "nowhere.mp4"), str(tmp_path / "out"))
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(InputError, match=r"text.mp4 can't be decoded"):
        codecs.encode_file(codec, str(tmp_path / "text.mp4"), str(tmp_path / "out"))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match=r"sound.mp4 has no video stream; it has audio"):
        codecs.encode_file(codec, str(tmp_path / "sound.mp4"), str(tmp_path / "out"))
    strange = video[0].read_bytes().replace(b"avc1", b"zzzz")
    (tmp_path / "strange.mp4").write_bytes(strange)
    with pytest.raises(InputError, match=r"strange.mp4 can't be decoded: its video is of a codec that FFmpeg does not"):
        codecs.encode_file(codec, str(tmp_path / "strange.mp4"), str(tmp_path / "out"))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile scene.mp4\n")
    with pytest.raises(InputError, match=r"list.mp4 can't be decoded"):
        codecs.reconstruct_file(codec, str(tmp_path / "list.mp4"), str(tmp_path / "out"))
    shutil.copy(video[0], tmp_path / "a%d:1.mp4")
    with videos.reader(str(tmp_path / "a%d:1.mp4")) as found:
        assert len(list(found)) == 20
    with videos.reader(f"file://{tmp_path}/a%25d:1.mp4") as found:
        assert found.height == 36
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"junk.safetensors is not a safetensors file"):
        codecs.decode_file(codec, str(tmp_path / "junk.safetensors"), str(tmp_path / "out.mp4"))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"not of latents that `moviola encode` wrote"):
        codecs.decode_file(codec, str(tmp_path / "other.safetensors"), str(tmp_path / "out.mp4"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.mp4").exists()


@pytest.mark.footage
def test_real_videos_are_read_upright_and_in_order(footage):
    read = {}
    for path in sorted(footage.glob("*.*")):
        if path.suffix in (".mp4", ".mkv", ".webm", ".avi"):
            with videos.reader(str(path)) as found:
                frames = [frame for frame, _ in zip(found, range(4), strict=False)]
                assert all(frame.shape == (1, 3, 1, found.height, found.width) for frame in frames)
                assert len(frames) == 4 and torch.cat(frames).abs().max() <= 1
                read[path.stem] = (found.height, found.width, float(found.fps))
    assert len(read) >= 10
