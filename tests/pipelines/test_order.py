"""The order of clips against brute force; its promises over seeds, sizes, weights, worlds and resume points."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts import ClipRule
from pipelines.order import LEAST_RUNS, Mixture, Permutation, crop, frame_numbers, quotas, share

seeds = st.integers(0, 2**63 - 1)


@given(size=st.integers(1, 3000), key=seeds)
@settings(max_examples=60, deadline=None)
def test_a_permutation_permutes_and_both_forms_agree(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    images = permutation.array(np.arange(size))
    assert sorted(images) == list(range(size))
    assert [permutation(i) for i in range(min(size, 50))] == list(images[:50])


@pytest.mark.parametrize("size", [3, 7, 24])
def test_every_image_is_equally_likely(size: int) -> None:
    trials = 2000
    counts = np.zeros((size, size))
    for key in range(trials):
        permutation = Permutation(size, key * 7919)
        counts[np.arange(size), [permutation(i) for i in range(size)]] += 1
    expected = trials / size
    chi_squared = ((counts - expected) ** 2 / expected).sum(axis=1)
    assert chi_squared.max() < (size - 1) + 6 * np.sqrt(2 * (size - 1)) + 6


def _by_hand(mixture: Mixture, places: int) -> list[tuple[int, int, int]]:
    """(dataset, epoch, clip) of the first places, by dealing slot after slot from whole epochs in lists."""
    dealt: Counter[int] = Counter()
    sequence: list[tuple[int, int, int]] = []
    epochs: dict[tuple[int, int], list[int]] = {}
    cycle = 0
    while len(sequence) < places:
        deck = [d for d, quota in enumerate(mixture.quotas) for _ in range(quota)]
        order = mixture._cycle_order(cycle).array(np.arange(len(deck)))
        within: Counter[int] = Counter()
        placed = {}
        for card, dataset in enumerate(deck):
            placed[card] = (dataset, cycle * mixture.quotas[dataset] + within[dataset])
            within[dataset] += 1
        for turn in range(len(deck)):
            dataset, slot = placed[int(order[turn])]
            for offset in range(mixture.granularity):
                n = slot * mixture.granularity + offset
                epoch, position = n // mixture.sizes[dataset], n % mixture.sizes[dataset]
                if (dataset, epoch) not in epochs:
                    epochs[dataset, epoch] = list(mixture.epoch_order(dataset, epoch))
                sequence.append((dataset, epoch, int(epochs[dataset, epoch][position])))
                dealt[dataset] += 1
        cycle += 1
    return sequence[:places]


@given(
    seed=seeds,
    sizes=st.lists(st.integers(3, 300), min_size=1, max_size=4),
    granularity=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_place_is_what_dealing_by_hand_gives(
    seed: int, sizes: list[int], granularity: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    mixture = Mixture(seed, sizes, weights, granularity)
    by_hand = _by_hand(mixture, 400)
    fresh = Mixture(seed, sizes, weights, granularity)
    for place in data.draw(st.lists(st.integers(0, 399), min_size=30, max_size=30)):
        draw = fresh.draw(place)
        assert (draw.dataset, draw.epoch, draw.clip) == by_hand[place]


@given(seed=seeds, size=st.integers(1, 1500), granularity=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_an_epoch_holds_every_clip_once(seed: int, size: int, granularity: int) -> None:
    mixture = Mixture(seed, [size], None, granularity)
    for epoch in range(2):
        assert sorted(mixture.epoch_order(0, epoch)) == list(range(size))
        places = range(epoch * size, min((epoch + 1) * size, epoch * size + 60))
        assert [mixture.draw(place).clip for place in places] == list(mixture.epoch_order(0, epoch)[: len(places)])


def test_epochs_and_seeds_and_datasets_are_ordered_differently() -> None:
    orders = [
        tuple(Mixture(seed, [1000, 1000], [1, 1]).epoch_order(dataset, epoch)[:50])
        for seed in (1, 2)
        for dataset in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == len(orders)


@given(
    seed=seeds,
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    batch=st.integers(1, 40),
    micro_batch=st.integers(1, 8),
    worlds=st.lists(st.integers(1, 64), min_size=1, max_size=4),
    granularity=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_a_run_resumed_at_other_world_sizes_trains_on_the_same_sequence(
    seed: int, sizes: list[int], batch: int, micro_batch: int, worlds: list[int], granularity: int
) -> None:
    mixture = Mixture(seed, sizes, None, granularity)
    wanted = [mixture.draw(place) for place in range(batch * 2 * len(worlds))]
    trained = []
    step = 0
    for world in worlds:
        again = Mixture(seed, sizes, None, granularity)
        for _ in range(2):
            for rank in range(world):
                for part in share(batch, rank, world, micro_batch):
                    if part.weight:
                        first = step * batch + part.first
                        trained += [again.draw(place) for place in range(first, first + part.count)]
            step += 1
    assert trained == wanted


@pytest.mark.parametrize("world", range(1, 65))
def test_ranks_share_a_batch_fairly(world: int) -> None:
    for clips in (1, 2, 7, 16, 63, 64, 65, 100):
        for micro_batch in (1, 2, 3, 8):
            ranks = [share(clips, rank, world, micro_batch) for rank in range(world)]
            assert len({len(parts) for parts in ranks}) == 1
            parts = [part for rank in ranks for part in rank]
            assert sum(part.weight for part in parts) == 1
            real = [part for part in parts if part.weight]
            assert [i for part in real for i in range(part.first, part.first + part.count)] == list(range(clips))
            assert all(part.weight == Fraction(part.count, clips) for part in real)
            assert all(1 <= part.count <= micro_batch and part.first + part.count <= clips for part in parts)
            fillers = len(parts) - len(real)
            assert fillers == max(0, len(parts) - clips)
            if not fillers:
                counts = [part.count for part in parts]
                assert max(counts) - min(counts) <= 1


def test_wrong_shares_and_mixtures_are_refused() -> None:
    for arguments in ((0, 0, 1, 1), (4, 2, 2, 1), (4, 0, 1, 0)):
        with pytest.raises(ValueError):
            share(*arguments)
    for sizes, weights, granularity in (([], [], 1), ([5], [1, 1], 1), ([0], [1], 1), ([5], [0], 1), ([5], [1], 0)):
        with pytest.raises(ValueError):
            Mixture(0, sizes, weights, granularity)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1], (1,)), ([9, 1], (9, 1)), ([0.9, 0.1], (9, 1)), ([2, 4, 6], (1, 2, 3)), ([1 / 3, 2 / 3], (1, 2))],
)
def test_quotas_of_simple_weights_are_exact(weights: list[float], expected: tuple[int, ...]) -> None:
    assert quotas(weights) == expected


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_quotas_come_near_any_weights(weights: list[float]) -> None:
    dealt = quotas(weights)
    assert min(dealt) >= 1
    for quota, weight in zip(dealt, weights, strict=True):
        assert abs(quota / sum(dealt) - weight / sum(weights)) < 0.004


def test_weights_hold_in_every_stretch() -> None:
    mixture = Mixture(4, [5000, 300, 70], [7, 2, 1])
    for first in (0, 10_000, 123_450):
        counts = Counter(mixture.draw(place).dataset for place in range(first, first + 100))
        assert counts == {0: 70, 1: 20, 2: 10}


def test_runs_of_neighbours_stand_together() -> None:
    granularity, size = 8, 8 * LEAST_RUNS * 3 + 5
    order = Mixture(3, [size], None, granularity).epoch_order(0, 0)
    steps = np.diff(order) % size
    assert (steps == 1).sum() >= size - 2 * (size // granularity)
    starts = order[: size // granularity * granularity : granularity]
    assert (np.diff(starts) % size == granularity).mean() < 0.05
    small = Mixture(3, [LEAST_RUNS * 2], None, 8)
    assert small.runs == (2,)


def test_a_substitute_is_of_the_same_dataset_and_shifts_no_one() -> None:
    mixture = Mixture(9, [100, 50], [1, 1], 4)
    before = [mixture.draw(place) for place in range(300)]
    substitutes = [[mixture.draw(place, k) for k in range(1, 6)] for place in range(300)]
    assert [mixture.draw(place) for place in range(300)] == before
    for draw, others in zip(before, substitutes, strict=True):
        assert {other.dataset for other in others} == {draw.dataset}
        assert [other.substitute for other in others] == [1, 2, 3, 4, 5]
        assert all(0 <= other.clip < mixture.sizes[other.dataset] for other in others)
        assert len({other.clip for other in others}) > 1
    assert [mixture.draw(7, k) for k in range(1, 6)] == substitutes[7]


def test_the_order_is_the_same_in_every_version() -> None:
    """A run may be resumed by a later version, so these numbers must not change."""
    mixture = Mixture(1234, [10_000_000, 700], [3, 1], 4)
    draws = [mixture.draw(place) for place in (0, 1, 5, 9, 10, 1_000_003, 123_456_789_012)]
    assert [(draw.dataset, draw.epoch, draw.clip) for draw in draws] == GOLDEN
    assert mixture.draw(5, 2).clip == GOLDEN_SUBSTITUTE


GOLDEN = [(0, 0, 1331652), (0, 0, 1331653), (0, 0, 8704621), (1, 0, 354), (1, 0, 355), (0, 0, 6355815), (0, 9259, 7830)]
GOLDEN_SUBSTITUTE = 9138744


@pytest.mark.parametrize("weights", [(0.7, 0.3), (14.555, 21.318), (1e-5, 3.3)])
def test_a_mixture_travels_to_another_process(weights: tuple[float, ...]) -> None:
    mixture = Mixture(3, [90, 40], weights, 2)
    again = pickle.loads(pickle.dumps(mixture))
    assert [again.draw(place) for place in range(50)] == [mixture.draw(place) for place in range(50)]


rules = st.builds(
    lambda frames, least, more, per: ClipRule(
        frames=frames, stride=(least, least + more), stride_per=per, sizes=((8, 8),)
    ),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(0, 4),
    st.sampled_from(["clip", "gap"]),
)


@given(rule=rules, stored=st.integers(1, 60), seed=seeds, place=st.integers(0, 10**9))
@settings(max_examples=300, deadline=None)
def test_frames_lie_in_the_clip_at_allowed_strides(rule: ClipRule, stored: int, seed: int, place: int) -> None:
    numbers = frame_numbers(rule, stored, seed, place)
    if stored < rule.least_frames:
        assert numbers is None
        return
    assert numbers is not None and len(numbers) == rule.frames
    assert numbers[0] >= 0 and numbers[-1] < stored
    strides = set(np.diff(numbers))
    assert all(rule.stride[0] <= stride <= rule.stride[1] for stride in strides)
    assert rule.stride_per == "gap" or len(strides) <= 1
    assert numbers == frame_numbers(rule, stored, seed, place)


def test_every_start_and_stride_is_drawn() -> None:
    rule = ClipRule(frames=3, stride=(1, 3), sizes=((8, 8),))
    drawn = {frame_numbers(rule, 10, 5, place) for place in range(3000)}
    assert drawn == {(a, a + s, a + 2 * s) for s in (1, 2, 3) for a in range(10 - 2 * s)}
    gaps = ClipRule(frames=3, stride=(1, 2), stride_per="gap", sizes=((8, 8),))
    drawn = {frame_numbers(gaps, 6, 5, place) for place in range(3000)}
    assert drawn == {(a, a + s, a + s + t) for s in (1, 2) for t in (1, 2) for a in range(6 - s - t)}


@given(
    stored=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    seed=seeds,
    where=st.sampled_from(["center", "random"]),
)
@settings(max_examples=300, deadline=None)
def test_a_crop_lies_in_a_frame_that_just_covers_it(
    stored: tuple[int, int], size: tuple[int, int], seed: int, where: str
) -> None:
    how = crop(ClipRule(frames=1, sizes=(size,), crop=where), stored, size, seed, 3)
    assert how.height >= size[0] and how.width >= size[1]
    assert how.height == size[0] or how.width == size[1]
    assert 0 <= how.top <= how.height - size[0] and 0 <= how.left <= how.width - size[1]
    if where == "center":
        assert (how.top, how.left) == ((how.height - size[0]) // 2, (how.width - size[1]) // 2)


def test_flips_come_with_their_probability() -> None:
    for probability in (0.0, 0.25, 1.0):
        rule = ClipRule(frames=1, sizes=((8, 8),), flip=probability)
        flips = sum(crop(rule, (8, 8), (8, 8), 1, place).flip for place in range(4000))
        assert abs(flips / 4000 - probability) < 0.03
    rule = ClipRule(frames=1, sizes=((8, 8),))
    tops = {(c.top, c.left) for c in (crop(rule, (10, 8), (8, 8), 1, place) for place in range(200))}
    assert tops == {(0, 0), (1, 0), (2, 0)}
