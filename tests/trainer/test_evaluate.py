import dataclasses
import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch import Tensor, nn

from pipelines import index
from pipelines.contracts import Batch, BatchPlan, Clip, ClipRule, Source
from pipelines.faults import InputError
from trainer.evaluate import Report, baselines, evaluate, largest_size, moved
from trainer.examine import FixedClips
from trainer.losses import Perceptual, PerceptualSpec
from trainer.quality import FvdSpec, VideoFeatures

torch.set_num_threads(1)

RULE = ClipRule(frames=3, sizes=((32, 36),))


def clip(place: int, frames: int = 3, height: int = 32, width: int = 36) -> Clip:
    noise = torch.rand((3, frames, height, width), generator=torch.Generator().manual_seed(place))
    ramp = torch.linspace(-0.8, 0.8, width).expand_as(noise)
    return Clip(ramp + (noise - 0.5) * 0.3, 10.0, 0.1 * (place % 4), place, Source("d", "s", f"{place:04}"))


def batch(clips: list[Clip], weight: float = 0.5) -> Batch:
    plan = BatchPlan(0, "evaluation", clips[0].place, len(clips), "video", clips[0].place, (32, 36), RULE)
    return Batch(
        torch.stack([c.pixels_CTHW for c in clips]),
        torch.tensor([c.fps for c in clips]),
        torch.tensor([c.motion for c in clips], dtype=torch.float64),
        tuple(c.place for c in clips),
        tuple(c.source for c in clips),
        plan,
        weight,
        seed=0,
    )


def spending(reconstruct: Callable[[Tensor], Tensor], numbers: int = 300) -> Callable[[Tensor], tuple[Tensor, int]]:
    """A codec that spends so many numbers a frame."""
    return lambda pixels_1CTHW: (reconstruct(pixels_1CTHW), numbers * pixels_1CTHW.shape[2])


def dim(pixels_1CTHW: Tensor) -> Tensor:
    """Stands in for a codec: its error grows with the frame index."""
    frames = pixels_1CTHW.shape[2]
    return pixels_1CTHW * (1 - 0.02 * torch.arange(1, frames + 1).view(-1, 1, 1))


@pytest.fixture(scope="module")
def perceptual() -> Perceptual:
    return Perceptual(PerceptualSpec(backbone="alex", weights="random"))


@pytest.mark.parametrize("height, width, numbers", [(64, 64, 768), (64, 64, 3), (256, 448, 5000.5), (90, 7, 200)])
def test_baseline_size_is_the_largest_within_the_budget_and_keeps_the_aspect(height, width, numbers):
    h, w = largest_size(height, width, numbers)
    assert 3 * h * w <= numbers
    assert w == max(1, round(h * width / height))
    assert 3 * (h + 1) * max(1, round((h + 1) * width / height)) > numbers


def test_baseline_size_at_the_edges():
    assert largest_size(64, 64, 3 * 64 * 64) == (64, 64)
    assert largest_size(64, 64, 1e9) == (64, 64), "never larger than the frame"
    assert largest_size(64, 64, 2.9) is None


def test_no_baseline_spends_more_than_the_latent():
    for numbers in (3.0, 50.0, 768.0, 3000.0, 1e6):
        found = baselines(7, 64, 48, numbers)
        assert [baseline.name for baseline in found] == ["bicubic", "first_frame"]
        assert all(baseline.numbers_per_frame <= numbers for baseline in found)
    assert [baseline.name for baseline in baselines(7, 64, 48, 2.0)] == ["first_frame"], "one pixel, once a clip"
    assert baselines(1, 64, 48, 2.0) == []


def test_first_frame_is_kept_as_it_is_where_the_clip_can_pay_for_it():
    x = clip(0).pixels_CTHW[None]
    first = baselines(3, 32, 36, 32 * 36.0)[1]
    assert first.size == (32, 36) and first.numbers_per_frame == 32 * 36
    assert torch.equal(first.reconstruct(x), x[:, :, :1].expand_as(x))
    poorer = baselines(3, 32, 36, 32 * 36.0 - 1)[1]
    assert poorer.size == (31, 35)
    assert poorer.reconstruct(x).std(2).max() == 0 and not torch.equal(poorer.reconstruct(x), first.reconstruct(x))


def test_bicubic_baseline_by_the_numbers():
    x = torch.linspace(-1, 1, 64).view(1, 1, 1, 1, 64).expand(1, 3, 2, 64, 64)
    bicubic = baselines(2, 64, 64, 768)[0]
    assert bicubic.size == (16, 16) and bicubic.numbers_per_frame == 768
    y = bicubic.reconstruct(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y[..., 8:-8], x[..., 8:-8], atol=1e-2, rtol=0)
    step = torch.where(x > 0, 1.0, -1.0)
    assert bicubic.reconstruct(step).abs().max() <= 1, "overshoot is clamped"
    frames = torch.cat([bicubic.reconstruct(step[:, :, :1]), bicubic.reconstruct(x[:, :, :1])], 2)
    assert torch.equal(bicubic.reconstruct(torch.cat([step[:, :, :1], x[:, :, :1]], 2)), frames), "frame by frame"


def test_report_has_what_readers_of_evaluation_json_expect(perceptual):
    report = evaluate(spending(dim), [clip(place) for place in range(5)], perceptual=perceptual)
    values = json.loads(report.json())
    assert values["clips"] == 5 and values["clip"] == {"frames": 3, "height": 32, "width": 36}
    assert values["lpips_backbone"] == "alex (random weights)"
    assert list(values["baselines"]) == ["bicubic", "first_frame"]
    for name, line in report.methods():
        assert {"clips", "psnr_db", "ssim", "lpips", "lpips_backbone", "numbers_per_frame"} <= line.keys()
        assert line["numbers_per_frame"] <= 300
        assert len(line["by_frame"]["psnr_db"]) == 3 and len(line["by_motion"]) == 3, name
        low, high = line["confidence"]["psnr_db"]
        assert low < line["psnr_db"] < high
    curve = values["by_frame"]["psnr_db"]
    assert curve[0] - curve[1] == pytest.approx(6.02, abs=0.2), "twice the error is 6 dB"
    gain = values["baselines"]["bicubic"]["margin"]
    assert gain["psnr_db"] == pytest.approx(values["psnr_db"] - values["baselines"]["bicubic"]["psnr_db"])
    assert gain["confidence"][0] > 0, "dimming beats bicubic on this footage"
    assert Report(values) == report, "nothing is lost on the way to a file and back"


def test_the_budget_is_the_mean_of_what_was_spent(perceptual):
    numbers = iter((300, 900, 1200))
    report = evaluate(lambda x: (dim(x), next(numbers)), [clip(place) for place in range(3)], perceptual=perceptual)
    assert report.values["numbers_per_frame"] == 800 / 3
    assert [line["numbers_per_frame"] for line in report.values["per_clip"]] == [100, 300, 400]
    for name, line in report.values["baselines"].items():
        expected = next(rival for rival in baselines(3, 32, 36, 800 / 3) if rival.name == name)
        assert (line["size"], line["clips"]) == (list(expected.size), 3)


def shown(report: Report) -> str:
    console = Console(width=140, file=io.StringIO())
    console.print(report.table())
    return console.file.getvalue()


def test_clips_are_split_by_motion_in_the_table_too(perceptual):
    report = evaluate(spending(dim), [clip(place) for place in range(7)], perceptual=perceptual)
    parts = report.values["by_motion"]
    assert [part["clips"] for part in parts] == [2, 2, 3]
    assert parts[0]["motion"][1] <= parts[1]["motion"][0] and parts[1]["motion"][1] <= parts[2]["motion"][0]
    for part in parts:
        low, high = part["confidence"]["psnr_db"]
        assert low < part["psnr_db"] < high
    console = Console(width=140, file=io.StringIO())
    console.print(report.by_motion())
    text = console.file.getvalue()
    assert text.count("this model") == text.count("bicubic down and up") == 3
    for part, name in zip(parts, ("least motion", "middle", "most motion"), strict=True):
        assert any(name in line and f"{part['psnr_db']:.2f}" in line for line in text.splitlines())


def test_a_clip_without_a_score_takes_that_of_its_frames(perceptual):
    still = torch.full((1, 3, 4, 32, 32), -0.5)
    moving = still + torch.arange(4).view(1, 1, 4, 1, 1) * 0.1
    assert moved(still) == 0 and moved(moving) == pytest.approx(0.05, rel=1e-5) and moved(still[:, :, :1]) == 0
    clips = [dataclasses.replace(clip(place), motion=0.0) for place in range(3)]
    report = evaluate(spending(dim), clips, perceptual=perceptual)
    scores = [line["motion"] for line in report.values["per_clip"]]
    assert scores == [pytest.approx(moved(c.pixels_CTHW[None])) for c in clips] and all(scores)


def test_a_caption_goes_with_its_clip(perceptual):
    heard = []

    def reconstruct(x, caption=None):
        heard.append(None if caption is None else caption.shape[1])
        return x, 1000

    clips = [dataclasses.replace(clip(at), caption_emb_LD=torch.ones(at, 4) if at else None) for at in range(3)]
    report = evaluate(reconstruct, clips, perceptual=perceptual, reads=True)
    assert report.values["captions"] == 2
    assert "2 of 3 clips coded with their caption, the others without" in shown(report)
    emb, mask = torch.zeros(3, 2, 4), torch.tensor([[False, False], [True, False], [True, True]])
    together = dataclasses.replace(batch(clips), caption_emb_BLD=emb, caption_mask_BL=mask)
    assert "captions" not in evaluate(reconstruct, [together], perceptual=perceptual).values
    assert heard == [None, 1, 2] * 2


def test_clips_that_are_all_too_short_are_said_to_be(small_dataset):
    dataset = index.open_dataset(str(small_dataset))
    held_back = FixedClips(dataset, ClipRule(frames=500, sizes=((32, 32),), crop="center", flip=0.0), (32, 32), 2)
    with pytest.raises(InputError, match=r"of 2 clips none has the 500 frames that are measured\. Ask for fewer"):
        list(held_back)


def test_table_shows_every_method_with_budget_and_backbone(perceptual):
    report = evaluate(spending(dim), [clip(place) for place in range(3)], perceptual=perceptual)
    text = shown(report)
    assert "3 clips of 3 frames, 32 x 36" in text
    assert "LPIPS backbone: alex (random weights)" in text
    (model,) = [line for line in text.splitlines() if "this model" in line]
    assert (
        "300.0" in model and f"{report.values['psnr_db']:.2f} ± " in model and f"{report.values['lpips']:.4f}" in model
    )
    (bicubic,) = [line for line in text.splitlines() if "bicubic down and up" in line and "│" in line]
    assert "270.0" in bicubic
    assert (
        f"PSNR over bicubic down and up: {report.values['baselines']['bicubic']['margin']['psnr_db']:+.2f} dB" in text
    )


def test_table_of_one_clip_and_of_a_broken_model(perceptual):
    text = shown(evaluate(spending(lambda x: x / 0), [clip(0)], perceptual=perceptual))
    assert "1 reconstructions are not finite, so means are missing; the first is d/s/0000" in text


def test_batches_and_clips_give_the_same_report_and_fillers_do_not_count(perceptual):
    clips = [clip(place) for place in range(4)]
    calls = []

    def reconstruct(x):
        calls.append(x.shape[0])
        return dim(x)

    one_by_one = evaluate(spending(dim), clips, perceptual=perceptual)
    filler = batch([clip(9)], weight=0.0)
    batched = evaluate(
        spending(reconstruct), [batch(clips[2:]), batch(clips[:2]), filler, clips[1]], perceptual=perceptual
    )
    assert batched.json() == one_by_one.json()
    assert calls == [1] * 6, "fillers and repeats still run the model, so that ranks stay in step"


def test_reconstruction_runs_without_gradients_and_progress_is_told(perceptual):
    model, heard = nn.Conv3d(3, 3, 1), []

    def reconstruct(x):
        y = model(x)
        assert not y.requires_grad
        return y

    evaluate(spending(reconstruct), [clip(0), clip(1)], perceptual=perceptual, progress=heard.append)
    assert heard == [1, 2]


def test_faults_of_input(perceptual):
    with pytest.raises(InputError, match="no clips to evaluate"):
        evaluate(spending(dim), [], perceptual=perceptual)
    with pytest.raises(InputError, match="no clips to evaluate"):
        evaluate(spending(dim), [batch([clip(0)], weight=0.0)], perceptual=perceptual)
    with pytest.raises(InputError) as fault:
        evaluate(spending(dim), [clip(0), clip(1, frames=4, width=40)], perceptual=perceptual)
    assert str(fault.value) == (
        "d/s/0001: 4 frames of 32 x 40, but the first clip evaluated has 3 frames of 32 x 36. Evaluate clips of one "
        "shape at a time: give the evaluation one size and frame count."
    )
    with pytest.raises(ValueError, match=r"the reconstruction is \(3, 2, 32, 36\)"):
        evaluate(spending(lambda x: x[:, :, :2]), [clip(0)], perceptual=perceptual)


class Means(nn.Module):
    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        return x.float().mean([3, 4]).flatten(1) / 255


def test_rfvd_stands_beside_every_method(perceptual, tmp_path):
    torch.jit.script(Means()).save(str(tmp_path / "i3d.pt"))
    fvd = VideoFeatures(FvdSpec(i3d=str(tmp_path / "i3d.pt")))
    report = evaluate(spending(dim), [clip(p, frames=10) for p in range(3)], perceptual=perceptual, fvd=fvd)
    for _, line in report.methods():
        assert line["rfvd"]["value"] > 0 and line["rfvd"]["clips"] == 3
    perfect = evaluate(spending(lambda x: x), [clip(p, frames=10) for p in range(3)], perceptual=perceptual, fvd=fvd)
    assert perfect.values["rfvd"]["value"] == pytest.approx(0, abs=1e-6)
    assert "rFVD" in shown(report)


SHARES = {  # by world size: the places that each rank measures; the last rank of three has none
    2: [[5, 0, 3, 3], [1, 2, 4, 6]],
    3: [[6, 4, 2, 0], [1, 3, 5], []],
}


def evaluate_share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    perceptual = Perceptual(PerceptualSpec(backbone="alex", weights="random"))
    pair = dist.new_group([0, 1])
    for world, group in ((3, None), (2, pair)):
        if rank < world:
            clips = [clip(place, frames=10) for place in SHARES[world][rank]]
            fvd = VideoFeatures(FvdSpec(i3d=f"{folder}/i3d.pt", per_batch=2))
            report = evaluate(spending(dim), clips, perceptual=perceptual, fvd=fvd, group=group)
            with open(f"{folder}/{world}-{rank}.json", "w") as file:
                file.write(report.json())
    odd = [clip(0), clip(1, frames=4), clip(2)][rank]
    with pytest.raises(InputError, match="d/s/0001: 4 frames of 32 x 36"):
        evaluate(spending(dim), [odd], perceptual=perceptual)
    dist.barrier()
    dist.destroy_process_group()


def test_any_world_size_reports_the_same_to_the_last_bit(perceptual, tmp_path):
    torch.jit.script(Means()).save(str(tmp_path / "i3d.pt"))
    mp.spawn(evaluate_share, (str(tmp_path),), nprocs=3)
    fvd = VideoFeatures(FvdSpec(i3d=str(tmp_path / "i3d.pt"), per_batch=2))
    alone = evaluate(
        spending(dim), [clip(place, frames=10) for place in range(7)], perceptual=perceptual, fvd=fvd
    ).json()
    for world in SHARES:
        for rank in range(world):
            assert (tmp_path / f"{world}-{rank}.json").read_text() == alone, f"rank {rank} of {world}"


def test_places_are_the_clips_identity(perceptual):
    with pytest.raises(ValueError, match="place 0 holds two clips"):
        evaluate(spending(dim), [clip(0), replace(clip(1), place=0)], perceptual=perceptual)
