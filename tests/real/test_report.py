"""The report in a real browser: it draws, plays, can be looked at frame by frame, and asks nobody for anything."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from cluster import report
from pipelines import storage
from tests.cluster.test_watch import run_url  # noqa: F401
from tests.real.browser import Browser
from tests.real.test_prometheus import free_port
from trainer import examine
from trainer.pictures import Views

FRAMES = 5
pytestmark = pytest.mark.real


def clip(step: float) -> Views:
    """Grey that grows lighter from frame to frame; the reconstruction is darker by ``step``."""
    original = torch.linspace(-0.5, 0.5, FRAMES).view(1, FRAMES, 1, 1).expand(3, FRAMES, 16, 24).contiguous()
    return Views("a clip", original, {"reconstruction": original - step, "flow": torch.zeros_like(original)}, fps=20.0)


@pytest.fixture
def two(run_url: str, tmp_path: Path) -> list[str]:  # noqa: F811
    """Two runs with clips, and an evaluation of the first."""
    quality = {"clips": 2, "clip": {"frames": FRAMES, "height": 16, "width": 24}, "flicker": 1.0, "ssim": 0.5}
    quality |= {"psnr_db": 21.5, "lpips": 0.1, "numbers_per_frame": 12.0, "confidence": {"psnr_db": [20.5, 22.5]}}
    values = {**quality, "lpips_backbone": "alex (random weights)", "baselines": {"bicubic": quality}}
    storage.write_bytes(storage.join(run_url, "evaluation.json"), json.dumps(values).encode())
    other = str(tmp_path / "other")
    shutil.copytree(run_url, other)
    text = Path(other, "manifest.yaml").read_text().replace("name: seen", "name: other").replace("seed: 0", "seed: 7")
    Path(other, "manifest.yaml").write_text(text)
    *_, last = Path(other, "metrics.jsonl").read_text().splitlines()
    line = {**json.loads(last), "terms": {"mse": 0.1, "adversary": -0.5}}
    storage.append_text(storage.join(other, "metrics.jsonl"), json.dumps(line) + "\n")
    for url, step in ((run_url, 0.1), (other, 0.4)):
        examine.write([clip(step)], storage.join(url, "samples"), video=False)
    return [run_url, other]


@pytest.fixture
def browser(chromium: None, tmp_path: Path):
    with Browser(free_port(), tmp_path) as opened:
        yield opened


BRIGHTNESS = """return [...document.querySelectorAll("canvas")].map(canvas =>
  [canvas.dataset.view, canvas.getContext("2d").getImageData(12, 8, 1, 1).data[0]])"""


def test_it_draws_plays_and_logs_nothing(two: list[str], browser: Browser, tmp_path: Path) -> None:
    for name, runs in (("one", two[:1]), ("two", two)):
        page = tmp_path / f"{name}.html"
        page.write_text(report.render(runs))
        for width, dark in ((1200, False), (390, True)):
            browser.open(page, width=width, dark=dark)
            assert browser.run("return document.body.dataset.drawn") == "yes"
            assert browser.run("return document.documentElement.scrollWidth") <= width, "nothing sticks out"
            paper, ink = browser.run(
                "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
                ".map(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0))"
            )
            assert (paper < 120 and ink > 600) if dark else (paper > 700 and ink < 150)
            assert browser.picture(tmp_path / f"{name}-{width}.png").stat().st_size > 10_000
        assert browser.complaints() == []
        assert set(browser.requests()) == {page.as_uri()}

    shown = dict(browser.run(BRIGHTNESS)[:2])
    assert [view for view, _ in browser.run(BRIGHTNESS)] == ["original", *["reconstruction", "error"] * 2]
    grey = [round((value + 1) * 127.5) for value in torch.linspace(-0.5, 0.5, FRAMES).tolist()]
    for frame in range(FRAMES):
        browser.run(
            "const slider = document.querySelector('input[type=range]');"
            f"slider.value = {frame}; slider.dispatchEvent(new Event('input'))"
        )
        shown = browser.run(BRIGHTNESS)
        assert abs(shown[0][1] - grey[frame]) <= 3, "the frame that was asked for"
        assert abs(shown[1][1] - (grey[frame] - 0.1 * 127.5)) <= 4 and abs(shown[3][1] - (grey[frame] - 51)) <= 4
    assert shown[4][1] > shown[2][1], "the worse run has the brighter error"
    browser.run("document.querySelectorAll('button')[0].click()")
    moved = browser.run("""return new Promise(done => {
      const slider = document.querySelector("input[type=range]"), seen = new Set();
      const look = () => { seen.add(slider.value); seen.size === 5 ? done(seen.size) : requestAnimationFrame(look); };
      setTimeout(() => done(seen.size), 20000); look();
    })""")
    assert moved == FRAMES, "it plays through every frame"
    said = [line for line in browser.complaints() if "getImageData" not in line]  # which only this test calls
    assert said == []


def test_what_it_says_and_that_text_of_others_stays_text(two: list[str], browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(report.render(two))
    browser.open(page)
    text = browser.run(
        "document.querySelectorAll('details').forEach(d => d.open = true); return document.body.innerText"
    )
    for part in ("seen", "other", "seed: 0 -> 7", "21.50 ± 1.00", "productive 15 s (75.0%)", "bicubic down and up",
                 "</script><b>gone"):  # fmt: skip
        assert part in text, text
    assert browser.run("return document.querySelectorAll('svg .restart').length") >= 2
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.read_text())


def test_long_curves_are_thinned_and_keep_their_extremes() -> None:
    points = [[float(i), float(i % 7)] for i in range(10_000)]
    points[5_003][1] = 99.0
    thinned = report.thin(points)
    assert len(thinned) <= report.POINTS + 2 and thinned == sorted(thinned)
    assert [5_003.0, 99.0] in thinned and report.thin(points[:10]) == points[:10]
