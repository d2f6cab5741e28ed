"""Caption embeddings: those of the encoder, stored once, found by the loader; the clips stay as they were."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch

from pipelines import captions, index, storage
from pipelines.clips import read_caption
from pipelines.faults import InputError
from pipelines.pack import PackRules, pack
from tests.pipelines.footage import scene, write
from tests.pipelines.test_pack import clips

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'moviola[models]')")

TOLD = {"a": "A slow pan over <b>Leaves</b>", "b": "stripes " * 200, "c": None, "d": "A slow pan over <b>Leaves</b>"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small T5 with random weights and a tokenizer of letters, saved as a checkpoint is."""
    from pipelines import torchvision_ops  # noqa: F401, I001  (before transformers)
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("t5")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz'-.,0123456789"]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)
    tokenizer.save_pretrained(folder)
    config = T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    T5EncoderModel(config).eval().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Eight clips of four videos in three shards; three of the videos are captioned."""
    folder = tmp_path_factory.mktemp("told")
    for place, (name, text) in enumerate(TOLD.items()):
        write(folder / "videos" / f"{name}.mp4", scene(place, 24))
        if text:
            (folder / "videos" / f"{name}.txt").write_text(text)
    pack(folder / "videos", folder / "made", PackRules(frames=12, least_frames=6, shard_clips=3))
    return folder / "made"


@pytest.fixture
def dataset(packed, tmp_path):
    return str(shutil.copytree(packed, tmp_path / "made"))


def stored(url):
    """{key: (source, video bytes, embedding or None)}, by ranged reads as the loader makes them."""
    opened, found = index.open_dataset(url), {}
    infos = {key: info["source"] for key, info, _ in clips(url)}
    for shard, rows in opened.all_records():
        for row in rows:

            def read(part, row=row, shard=shard):
                start = int(row[f"{part}offset"])
                return storage.read_bytes(opened.shard_url(shard), start, start + int(row[f"{part}bytes"]))

            key = row["key"].decode()
            found[key] = infos[key], read(""), read_caption(read("caption_"), key) if row["caption_bytes"] else None
    return found


def test_stored_embeddings_are_the_encoders(dataset, encoder):
    from transformers import AutoTokenizer, T5EncoderModel

    before = stored(dataset)
    report = captions.embed_captions(dataset, encoder, batch=2)
    assert (report.clips, report.silent, report.width) == (6, 2, 32)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), T5EncoderModel.from_pretrained(encoder).eval()
    after = stored(dataset)
    assert before.keys() == after.keys()
    for key, (source, video, embedding) in after.items():
        assert video == before[key][1]
        text = TOLD[source[0]]
        if text is None:
            assert embedding is None
            continue
        cleaned = "a slow pan over leaves" if source[0] in "ad" else ("stripes " * 200).strip()
        tokens = tokenizer(cleaned, truncation=True, max_length=100, return_tensors="pt")
        with torch.inference_mode():
            expected_LD = model(**tokens).last_hidden_state[0]
        assert embedding.shape == expected_LD.shape and embedding.shape[0] == (100 if source[0] == "b" else 24)
        assert torch.allclose(embedding, expected_LD, atol=2e-3), "float16 of the unpadded forward pass"
    card = index.open_dataset(dataset).card
    assert card.counts["captions"] == 6
    assert card.model_extra["embeddings"] == {"encoder": encoder, "most_tokens": 100, "clips": 6, "width": 32}


def test_embeddings_are_made_once(dataset, encoder, monkeypatch):
    first = captions.embed_captions(dataset, encoder)
    files = {entry.name: entry.bytes for entry in storage.list_dir(dataset)}
    assert sum(name.endswith(".tar") for name in files) == 3 and ".captions" not in files
    monkeypatch.setattr(captions, "TextEncoder", None)
    assert captions.embed_captions(dataset) == first, "the card names the encoder now"
    assert {entry.name: entry.bytes for entry in storage.list_dir(dataset)} == files


def test_other_settings_replace_them(dataset, encoder):
    captions.embed_captions(dataset, encoder)
    report = captions.embed_captions(dataset, encoder, most_tokens=10)
    assert report.clips == 6
    assert {len(e) for _, _, e in stored(dataset).values() if e is not None} == {10}
    names = [entry.name for entry in storage.list_dir(dataset) if entry.name.endswith(".tar")]
    assert len(names) == 3 and all(name.count("-t5-") == 1 for name in names)


def test_a_killed_embedding_leaves_the_dataset_as_it_was_and_goes_on(dataset, encoder, tmp_path, monkeypatch):
    whole = str(shutil.copytree(dataset, tmp_path / "whole" / "made"))
    captions.embed_captions(whole, encoder)
    before = stored(dataset)

    class Killed(BaseException):
        pass

    def kill(done, shards):
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        captions.embed_captions(dataset, encoder, progress=kill)
    assert stored(dataset) == before
    made = []
    embedded = captions._embedded
    monkeypatch.setattr(captions, "_embedded", lambda *args: made.append(args[1]) or embedded(*args))
    captions.embed_captions(dataset, encoder)
    assert made == [2], "only the shard that was missing"
    one, other = stored(dataset), stored(whole)
    assert all(torch.equal(one[k][2], other[k][2]) if one[k][2] is not None else other[k][2] is None for k in other)


def test_what_can_not_be_embedded_is_explained(dataset, encoder, tmp_path):
    with pytest.raises(InputError, match="made: the card names no text_encoder; give a folder or hub name"):
        captions.embed_captions(dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"text encoder '.*empty' can't be loaded: .*Give a folder with config\.json"):
        captions.embed_captions(dataset, str(tmp_path / "empty"))
    write(tmp_path / "videos" / "silent.mp4", scene(0, 24))
    pack(tmp_path / "videos", tmp_path / "silent", PackRules(frames=12, least_frames=6))
    before = sorted(entry.name for entry in storage.list_dir(str(tmp_path / "silent")))
    with pytest.raises(InputError, match="silent: no clip has a caption; pack it with captions"):
        captions.embed_captions(str(tmp_path / "silent"), encoder)
    assert sorted(entry.name for entry in storage.list_dir(str(tmp_path / "silent"))) == before
    with pytest.raises(InputError, match=r"numbers up to 1e\+06, which float16 can't hold"):
        captions._npy(torch.full((2, 3), 1e6), "clip")


def test_padding_and_company_do_not_change_an_embedding(encoder):
    model = captions.TextEncoder(encoder)
    alone = model(["short"])[0]
    beside = model(["short", "a much longer caption than the other one"])[0]
    assert alone.shape == (7, 32)
    assert torch.allclose(alone, beside, atol=1e-5)


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("  A\tDog\n runs ", "a dog runs"),
        ("see https://x.y/z?q=1 or www.a.b now", "see or now"),
        ("<p>bold</p> &amp;lt;3 &quot;q&quot;", 'bold <3 "q"'),
        ("by @someone #tagged e@mail", "by e@mail"),
        ("it’s “so” – fine", 'it\'s "so" - fine'),
    ],
)
def test_captions_are_cleaned(caption, cleaned):
    assert captions.clean(caption) == cleaned


def test_foreign_tars_keep_their_members(tmp_path, encoder):
    """Long names, text files and pictures of an indexed WebDataset that something else has made."""
    long = "deep/" * 25 + "clip"
    video = write(tmp_path / "a.mp4", scene(0, 12)).read_bytes()
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        for name, data in ((f"{long}.mp4", video), (f"{long}.txt", b"stripes"), (f"{long}.cls", b"7")):
            tar.addfile(*member(name, data))
    (tmp_path / "made").mkdir()
    shutil.move(tmp_path / "foreign.tar", tmp_path / "made")
    url = str(tmp_path / "made")
    index.index_dataset(url)
    captions.embed_captions(url, encoder)
    (file,) = (entry.name for entry in storage.list_dir(url) if entry.name.endswith(".tar"))
    with tarfile.open(tmp_path / "made" / file) as tar:
        assert [m.name for m in tar] == [f"{long}.mp4", f"{long}.txt", f"{long}.cls", f"{long}.t5.npy"]
        embedding = np.load(io.BytesIO(tar.extractfile(f"{long}.t5.npy").read()))
    assert embedding.dtype == np.float16 and embedding.shape == (9, 32)
    (row,) = index.open_dataset(url).records(0)
    start = int(row["offset"])
    assert storage.read_bytes(f"{url}/{file}", start, start + int(row["bytes"])) == video
    assert json.loads((tmp_path / "made" / "index.json").read_text())["card"]["counts"]["captions"] == 1


def test_all_videos_of_a_foreign_sample_keep_their_records(tmp_path, encoder):
    video = write(tmp_path / "a.mp4", scene(0, 12)).read_bytes()
    url = tmp_path / "made"
    url.mkdir()
    with tarfile.open(url / "foreign.tar", "w") as tar:
        for name, data in (("0001.Left.MP4", video), ("0001.right.mp4", video), ("0001.txt", b"stripes")):
            tar.addfile(*member(name, data))
    index.index_dataset(str(url))
    captions.embed_captions(str(url), encoder)
    rows = index.open_dataset(str(url)).records(0)
    assert [row["key"].decode() for row in rows] == ["0001.Left", "0001.right"]
    (file,) = (entry.name for entry in storage.list_dir(str(url)) if entry.name.endswith(".tar"))
    for row in rows:
        start = int(row["offset"])
        assert storage.read_bytes(f"{url}/{file}", start, start + int(row["bytes"])) == video
        assert row["caption_bytes"] > 0


def test_shards_of_like_names_are_told_apart(tmp_path, encoder):
    video = write(tmp_path / "a.mp4", scene(0, 12)).read_bytes()
    for n, name in enumerate(("made/a/b.tar", "made/a-b.tar")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(tmp_path / name, "w") as tar:
            for member_name, data in ((f"{n}.mp4", video), (f"{n}.TXT", b"stripes")):
                tar.addfile(*member(member_name, data))
    url = str(tmp_path / "made")
    index.index_dataset(url)
    assert captions.embed_captions(url, encoder).clips == 2
    dataset = index.open_dataset(url)
    assert {row["key"] for _, rows in dataset.all_records() for row in rows} == {b"0", b"1"}
    assert not (tmp_path / "made" / ".captions").exists()


def test_clips_of_one_name_keep_their_records(tmp_path, encoder):
    first, second = (write(tmp_path / "a.mp4", scene(0, frames)).read_bytes() for frames in (12, 9))
    url = tmp_path / "made"
    url.mkdir()
    with tarfile.open(url / "foreign.tar", "w") as tar:
        parts = (("0.mp4", first), ("0.mp4", second), ("0.txt", b"a"), ("1.mp4", second), ("0.mp4", second))
        for name, data in parts:
            tar.addfile(*member(name, data))
    index.index_dataset(str(url))
    captions.embed_captions(str(url), encoder)
    (file,) = (entry.name for entry in storage.list_dir(str(url)) if entry.name.endswith(".tar"))
    rows = index.open_dataset(str(url)).records(0)
    assert [int(row["frames"]) for row in rows] == [12, 9, 9]
    for row, data in zip(rows, (first, second, second), strict=True):
        start = int(row["offset"])
        assert storage.read_bytes(f"{url}/{file}", start, start + int(row["bytes"])) == data


def member(name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, io.BytesIO(data)


def test_the_command_embeds_and_says_how_many(dataset, encoder, monkeypatch, capsys):
    from cluster import cli

    monkeypatch.setattr("sys.argv", ["moviola", "captions", dataset, "--text-encoder", encoder, "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert told == {"encoder": encoder, "clips": 6, "silent": 2, "width": 32}
    assert index.open_dataset(dataset).caption_width == 32
