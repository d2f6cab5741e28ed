"""One name is one run: the same manifest goes on, another is refused, data that changed is refused by name."""

import json
import shutil

import pytest
import yaml

from pipelines.faults import InputError
from trainer import manifest as manifests
from trainer import run


@pytest.fixture
def plain(small_dataset):
    return {
        "name": "small",
        "recipe": "arvae",
        "model": {"down": 8},
        "data": {"train": str(small_dataset)},
        "batch": 4,
        "clip": {"sizes": [[32, 32]]},
    }


def _claim(plain, runs):
    return run.claim(manifests.validate(plain, "m"), str(runs))


def test_claim_writes_a_manifest_complete_in_itself_and_goes_on(plain, tmp_path):
    first, url = _claim(plain, tmp_path)
    stored = yaml.safe_load((tmp_path / "small" / "manifest.yaml").read_text())
    assert stored == first.resolved()
    assert stored["data"]["train"][0]["digest"]
    (tmp_path / "small" / "stop.json").write_text("{}")
    again, _ = _claim({**plain, "workers": {"count": 4}, "batch": 4}, tmp_path)
    assert again.workers.count == 4
    assert not (tmp_path / "small" / "stop.json").exists(), "an old stop request does not stop the next attempt"
    assert run.load(url).digest() == first.digest()


def test_another_manifest_under_the_name_is_refused_with_the_difference(plain, tmp_path):
    _claim(plain, tmp_path)
    with pytest.raises(InputError, match="was made by another manifest") as caught:
        _claim({**plain, "batch": 8, "stages": {"frames-3": {"steps": 5}}}, tmp_path)
    text = str(caught.value)
    assert "batch: 4 -> 8" in text and "stages.frames-3.steps: 300000 -> 5" in text and "--name" in text
    assert caught.value.status == 2


def test_a_dataset_that_changed_is_refused(plain, tmp_path, small_dataset):
    _claim(plain, tmp_path)
    index = small_dataset / "index.json"
    text = index.read_text()
    try:
        index.write_text(text + " ")
        with pytest.raises(InputError, match="changed since this run started"):
            _claim(plain, tmp_path)
    finally:
        index.write_text(text)


def test_a_missing_run_and_a_missing_dataset_are_named(plain, tmp_path):
    with pytest.raises(InputError, match=r"no run at .*absent; `moviola list`"):
        run.load(str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"dataset .*nowhere is not there"):
        _claim({**plain, "data": {"train": str(tmp_path / "nowhere")}}, tmp_path)


def test_the_captions_encoder_is_known_by_the_run(plain, tmp_path, small_dataset):
    assert run.text_encoder(_claim(plain, tmp_path)[1]) is None
    told = shutil.copytree(small_dataset, tmp_path / "told")
    plain_index = json.loads((told / "index.json").read_text())
    plain_index["card"] |= {"text_encoder": "some/t5", "embeddings": {"width": 6, "clips": 12}}
    (told / "index.json").write_text(json.dumps(plain_index))
    mixed = [str(small_dataset), str(told)]
    _, url = _claim({**plain, "name": "told", "data": {"train": mixed}}, tmp_path)
    assert run.text_encoder(url) == run.text_encoder(f"{url}/checkpoints/step-00000001") == "some/t5"
    assert run.text_encoder(str(tmp_path)) is None
