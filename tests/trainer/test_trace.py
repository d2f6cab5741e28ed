import json

from pipelines.contracts import ClipRule
from trainer.stage import Schedule, Stage
from trainer.trace import history


def _write(folder, attempt, rank, lines):
    folder.mkdir(exist_ok=True)
    with (folder / f"rank-{rank:05d}-attempt-{attempt:04d}.jsonl").open("a") as file:
        for step, places in lines:
            record = {"attempt": attempt, "step": step, "stage": "a", "rank": rank}
            file.write(json.dumps({**record, "place": places, "key": [f"d/s/{p}" for p in places]}) + "\n")


def test_the_surviving_history_is_the_newest_attempts(tmp_path):
    schedule = Schedule([Stage(name="a", steps=3, clip=ClipRule(frames=1, sizes=((8, 8),)))], 4, 0)
    trace = tmp_path / "trace"
    _write(trace, 1, 0, [(0, [0, 1]), (1, [4, 5])])
    _write(trace, 1, 1, [(0, [2, 3])])
    _write(trace, 2, 0, [(1, [4, 5, 6, 7]), (2, [8, 9, 10, 11])])
    whole = history(str(tmp_path), schedule, 3)
    assert whole.exact and whole.redone == 2 and whole.places == 12
    assert whole.keys == tuple(f"d/s/{p}" for p in range(12))

    _write(trace, 3, 0, [(2, [8, 8, 10, 3])])
    broken = history(str(tmp_path), schedule, 3)
    assert not broken.exact
    assert broken.lost == (9, 11)
    assert broken.repeated == (3, 3, 8)
