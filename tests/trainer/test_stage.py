"""The schedule is arithmetic: checked against walking through every step."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts import ClipRule
from trainer.stage import OptimizerSpec, Schedule, Stage

RULE = ClipRule(frames=5, sizes=((64, 64), (32, 48)))
OWN_BATCH = st.one_of(st.none(), st.integers(1, 9))


@given(
    st.lists(st.tuples(st.integers(0, 40), OWN_BATCH, st.floats(0, 1), OWN_BATCH), min_size=1, max_size=4).filter(
        lambda stages: any(steps for steps, *_ in stages)
    ),
    st.integers(1, 9),
)
def test_places_are_one_gapless_sequence_and_each_stream_too(stages, batch):
    schedule = Schedule(
        [
            Stage(name=f"s{i}", steps=steps, clip=RULE, batch=own, image_share=share, image_batch=images)
            for i, (steps, own, share, images) in enumerate(stages)
        ],
        batch,
        seed=3,
    )
    place = 0
    streams = {"video": 0, "image": 0}
    for step in range(schedule.steps):
        plan = schedule.plan(step)
        assert plan.place == place
        assert plan.stream_place == streams[plan.stream]
        assert plan.stage == schedule.stage(step).name
        assert plan.rule.frames == (1 if plan.stream == "image" else 5)
        assert plan.size in RULE.sizes
        place += plan.clips
        streams[plan.stream] += plan.clips
    assert place == schedule.clips


def test_image_batches_are_dealt_evenly():
    schedule = Schedule([Stage(name="joint", steps=1000, clip=RULE, image_share=0.2)], 4, 0)
    images = [step for step in range(1000) if schedule.plan(step).stream == "image"]
    assert len(images) == 200
    assert {b - a for a, b in pairwise(images)} == {5}


def test_an_image_batch_has_its_own_size():
    schedule = Schedule([Stage(name="joint", steps=5, clip=RULE, image_share=0.2, image_batch=64)], 4, 0)
    plans = [schedule.plan(step) for step in range(5)]
    assert [(plan.clips, plan.rule.frames) for plan in plans] == [*[(4, 5)] * 4, (64, 1)]
    assert [plan.per_clip for plan in plans] == [1, 1, 1, 1, 5]
    assert [plan.place for plan in plans] == [0, 4, 8, 12, 16]
    assert schedule.clips == 4 * 4 + 64


def test_buckets_follow_from_seed_and_step():
    one, two = (Schedule([Stage(name="a", steps=50, clip=RULE)], 4, seed) for seed in (1, 2))
    sizes = [one.plan(step).size for step in range(50)]
    assert set(sizes) == set(RULE.sizes)
    assert sizes == [one.plan(step).size for step in range(50)] != [two.plan(step).size for step in range(50)]


def test_trains_takes_patterns_and_freeze_wins():
    stage = Stage(name="a", steps=1, clip=RULE, train=("encoder.*",), freeze=("*.motion.*",))
    assert stage.trains("encoder.key.weight")
    assert not stage.trains("encoder.motion.weight")
    assert not stage.trains("decoder.weight")


def test_parameters_rest_only_where_there_are_images():
    stage = Stage(name="joint", steps=5, clip=RULE, image_share=0.2, image_freeze=("*.temporal.*",))
    assert stage.rests("encoder.temporal.weight") and not stage.rests("encoder.conv.weight")
    assert not stage.model_copy(update={"image_share": 0.0}).rests("encoder.temporal.weight")


def test_supervised_frames_must_lie_in_the_clip():
    with pytest.raises(ValueError, match=r"supervise \[4, 6\] must lie within frames 1 to 5"):
        Stage(name="a", steps=1, clip=RULE, supervise=(4, 6))


def test_learning_rate_by_hand():
    spec = OptimizerSpec(lr=1.0, warmup=4, decay="cosine", floor=0.1)
    assert [spec.rate(s, 104) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert spec.rate(54, 104) == pytest.approx(0.55)
    assert spec.rate(104, 104) == pytest.approx(0.1)
    assert OptimizerSpec(lr=0.5).rate(99, 100) == 0.5
