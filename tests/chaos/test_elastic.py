"""Two workers, one, two again: a drained node and one that comes back, under a real Ray cluster of several nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.lab import STAGES, Lab, smoke
from tests.chaos.nodes import Command, Nodes

STEPS = 100
TOLERANCE = 1e-4
"""Of a step's loss, relative: sums in another order, and what Adam makes of them over the steps since. A warp has a
kink where its flow is 0, as all are at first, and so a gradient that the last bit decides: at the rate of 3e-5 that
came to 3e-5 on one worker throughout, at 1e-3 to 5e-3.
"""
SOON = 1e-5
"""In the first ten steps on one worker."""


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_drained_node_and_a_new_one_change_the_world_and_nothing_else(small_dataset: Path, tmp_path: Path) -> None:
    plain = smoke(str(small_dataset), steps=STEPS // len(STAGES), checkpoint={"every_steps": 10, "keep": 3})
    plain["optimizer"] = {"lr": 3e-5, "warmup": 2}
    lab = Lab(tmp_path, plain)
    fixed = lab.losses(lab.whole(1))
    elastic = ("workers={count: [1, 2], resize_seconds: 1}", "failure.grace_seconds=60")
    with Nodes(2) as nodes:
        env = {"RAY_ADDRESS": nodes.address}
        with Command(["train", *lab.arguments("elastic", *elastic)], tmp_path / "log", env) as command:
            command.until(lambda: len(lab.lines("elastic")) > 3)
            old = nodes.processes("ray::RayTrainWorker")
            nodes.drain(nodes.nodes[-1], 4)
            command.until(lambda: set(nodes.processes("ray::RayTrainWorker")) - set(old))
            nodes.add()
            assert command.wait() == 0, command.said
    worlds = [line["world"] for line in sorted(lab.lines("elastic"), key=lambda line: line["time"])]
    sizes = [size for size, before in zip(worlds, [0, *worlds], strict=False) if size != before]
    assert sizes == [2, 1, 2], lab.events("elastic", "start", "restart", "resize", "leave", "notice")
    history = lab.history("elastic")
    assert history.exact and history.redone == 0, "the notice, and the question before the resize, lost no step"
    assert history.keys == lab.history(lab.whole(1)).keys
    losses = lab.losses("elastic")
    alone = worlds.index(1)
    assert [losses[step] for step in range(alone)] == [fixed[step] for step in range(alone)]
    for step in range(STEPS):
        close = SOON if step < alone + 10 else TOLERANCE
        assert losses[step] == pytest.approx(fixed[step], rel=close), f"step {step}"
    assert lab.imbalance("elastic") < 0.01
    (resized,) = lab.events("elastic", "resize")
    assert (resized["before"], resized["after"], resized["committed"]) == (1, 2, True)
    assert [event["cause"] for event in lab.events("elastic", "restart")] == ["preempted"]
