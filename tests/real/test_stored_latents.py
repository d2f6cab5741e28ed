"""A dataset of latents on a production S3 implementation: encoded by one machine, gone on with by another."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from pipelines import index, lint, storage
from pipelines.loader import Loader
from tests.trainer.test_codec import a_codec
from trainer.encoding import Progress, encode_dataset
from trainer.recipes.latentdit.stages import stages
from trainer.stage import Schedule

pytestmark = pytest.mark.real
FRAMES, SIZE, SHARD = 7, (32, 32), 5


class Gone(Exception):
    """The machine."""


def encode(source: Path, dest: str, until: int = 0) -> list[int]:
    """Clips done, as they were told; ``until`` so many."""
    done: list[int] = []

    def progress(state: Progress) -> None:
        done.append(state.done)
        if state.done == until:
            raise Gone

    encode_dataset(a_codec(), str(source), dest, FRAMES, SIZE, shard_clips=SHARD, progress=progress)
    return done


def test_another_machine_goes_on_at_the_last_whole_shard(folder_url: str, small_dataset: Path, tmp_path: Path) -> None:
    encode(small_dataset, str(tmp_path / "latents"))
    dest = f"{folder_url}/latents"
    drafts = set(Path(tempfile.gettempdir()).glob("moviola-encode-*"))
    with pytest.raises(Gone):
        encode(small_dataset, dest, until=8)
    (draft,) = set(Path(tempfile.gettempdir()).glob("moviola-encode-*")) - drafts
    shutil.rmtree(draft)
    assert encode(small_dataset, dest) == [5, 6, 7, 8, 9, 10, 10, 11, 12, 12]
    names = {entry.name for entry in storage.list_dir(dest)}
    assert names == {path.name for path in (tmp_path / "latents").iterdir()}, "nothing else is left"
    for name in names:
        assert storage.read_bytes(f"{dest}/{name}") == (tmp_path / "latents" / name).read_bytes(), name
    assert not draft.exists() and lint.lint_dataset(dest) == []
    dataset = index.open_dataset(dest)
    plan = Schedule([stages()[0].model_copy(update={"steps": 3, "batch": 8})], 8, 0).plan
    loader = Loader([(dataset, 1.0)], None, plan, 3, seed=0, micro_batch=4)
    keys = [source.key for _, batches in loader.iter_from(0) for batch in batches for source in batch.sources]
    assert len(set(keys)) == len(keys) == dataset.clips
