"""Captions -> text embeddings, computed once and stored beside the clips as KEY.t5.npy.

The encoder half of a T5 (VideoVAE+ takes Flan-T5-large: 1024 numbers a token, at most 100 tokens) reads each caption,
cleaned as PixArt-alpha cleans its own. Shards are written anew under new names; then index.json is exchanged, and the
old shards go. Until then the dataset is as it was, and an embedding that was killed goes on at the shard where it was.

Legend: B captions, L tokens, D embedding width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pipelines import index, storage
from pipelines.cutting import tar_member, told
from pipelines.faults import InputError

MOST_TOKENS = 100
BATCH = 32
_EMBEDDED = re.compile(r"-t5-[0-9a-f]{8}(?=\.tar$)")
_MEMBERS = [field.name for field in dataclasses.fields(index.Member)]


@dataclass(frozen=True, slots=True)
class CaptionReport:
    """``clips`` with an embedding of ``width`` numbers a token, and ``silent`` ones that have no caption."""

    encoder: str
    clips: int
    silent: int
    width: int


class TextEncoder:
    """A T5 encoder from a local folder or a hub name; on CPU in float32, on GPU in bfloat16 (T5 overflows float16).

    Raises InputError when transformers is not installed, or the weights can't be loaded. Only safetensors are read.
    """

    def __init__(self, name: str, most_tokens: int = MOST_TOKENS, device: str | None = None) -> None:
        from pipelines import torchvision_ops  # noqa: F401  (before transformers, which imports torchvision)

        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise InputError(f"caption embeddings need transformers ({error}); pip install 'moviola[models]'") from None
        self.name = name
        self.most_tokens = most_tokens
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        local = Path(name).expanduser()
        where = str(local) if local.is_dir() else name
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=local.is_dir())
            self.model = T5EncoderModel.from_pretrained(
                where, dtype=dtype, use_safetensors=True, local_files_only=local.is_dir()
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"text encoder {name!r} can't be loaded: {' '.join(str(error).split())[:300]}. Give a folder with "
                "config.json, model.safetensors and a tokenizer, or a name on the Hugging Face hub"
            ) from None
        self.model.to(self.device).eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """D, numbers a token."""
        return int(self.model.config.d_model)

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """``emb_LD`` float32 of each caption, without padding, its end-of-sequence token included."""
        cleaned = [clean(caption) for caption in captions]
        tokens = self.tokenizer(
            cleaned, padding=True, truncation=True, max_length=self.most_tokens, return_tensors="pt"
        ).to(self.device)
        states_BLD = self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        lengths_B = tokens.attention_mask.sum(1).tolist()
        return [state_LD[:length].float().cpu() for state_LD, length in zip(states_BLD, lengths_B, strict=True)]


def clean(caption: str) -> str:
    """Lower case, without markup, addresses, mentions and odd spacing (after PixArt-alpha's cleaning of captions)."""
    text = html.unescape(html.unescape(caption)).lower()
    text = re.sub(r"<[^>]+>", " ", text)
    text = re.sub(r"\b(?:https?://|www\.)\S+", " ", text)
    text = re.sub(r"(?<!\w)[@#]\w+", " ", text)
    text = re.sub(r"[\u2018\u2019`´]", "'", re.sub(r"[\u201c\u201d«»]", '"', text))
    return re.sub(r"\s+", " ", re.sub(r"[\u2010-\u2015]", "-", text)).strip()


def embed_captions(
    url: str,
    encoder: str | None = None,
    *,
    most_tokens: int = MOST_TOKENS,
    batch: int = BATCH,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CaptionReport:
    """Embeds the captions of the dataset at ``url`` with ``encoder``, or the one that its card names.

    A caption is the ``caption`` (or ``text``) of a clip's .json, or its .txt. Embeddings are stored as float16, (L, D).
    What is embedded already by the same encoder is left. ``progress(done, all)`` counts shards. Raises InputError when
    no encoder is named, it can't be loaded, or no clip has a caption.
    """
    dataset = index.open_dataset(url)
    card: dict[str, Any] = dataset.card.model_dump()
    encoder = encoder or card.get("text_encoder")
    if not encoder:
        raise InputError(f"{dataset.name}: the card names no text_encoder; give a folder or hub name of a T5 encoder")
    made = {"encoder": encoder, "most_tokens": most_tokens}
    done = card.get("embeddings", {})
    if {key: done.get(key) for key in made} == made:
        return CaptionReport(encoder, done["clips"], dataset.clips - done["clips"], done["width"])
    model = TextEncoder(encoder, most_tokens, device)
    mark = hashlib.blake2b(json.dumps([dataset.digest, made]).encode(), digest_size=4).hexdigest()
    drafts = storage.join(url, ".captions")
    shards = []
    for number, file in enumerate(dataset.files):
        name = f"{_EMBEDDED.sub('', file).removesuffix('.tar')}-t5-{mark}.tar"
        draft = storage.join(drafts, f"{name}.json")
        if not storage.exists(draft):
            shard = _embedded(dataset, number, url, name, model, batch)
            storage.write_json(draft, shard.model_dump())
        shards.append(index.Shard(**storage.read_json(draft)))
        if progress:
            progress(number + 1, len(dataset.files))
    rows = [rows for _, rows in index.Dataset(url, dataset.card, shards, "", url).all_records()]
    totals = index.merge([index.summary(part) for part in rows])
    told = totals["counts"]["captions"]
    if not told:
        for shard in shards:
            _drop(url, shard.file)
        storage.delete(drafts, recursive=True)
        raise InputError(
            f"{dataset.name}: no clip has a caption; pack it with captions beside the videos or in a table"
        )
    card |= totals | {"text_encoder": encoder, "embeddings": {**made, "clips": told, "width": model.width}}
    index.write_index(url, index.Card(**card), shards)
    for file in dataset.files:
        _drop(url, file)  # where the old shards lie elsewhere, only their .idx
    storage.delete(drafts, recursive=True)
    return CaptionReport(encoder, told, dataset.clips - told, model.width)


def _drop(url: str, file: str) -> None:
    for name in (file, index.index_name(file)):
        storage.delete(storage.join(url, name))


def _embedded(dataset: index.Dataset, number: int, url: str, name: str, model: TextEncoder, batch: int) -> index.Shard:
    """Writes one shard anew as ``url/name``, with an embedding after each clip that has a caption, and its index."""
    old = {int(row["offset"]): row for row in dataset.records(number)}
    members: list[index.Member] = []
    with storage.writer(storage.join(url, name)) as file:
        out = _Tar(file)
        for samples in _batched(_samples(dataset, number), batch):
            captions = [_caption(parts) for _, parts in samples]
            texts = sorted({caption for caption in captions if caption})
            embeddings = dict(zip(texts, model(texts), strict=True)) if texts else {}
            for (key, parts), caption in zip(samples, captions, strict=True):
                places = {suffix: out.add(f"{key}.{suffix}", data) for suffix, (_, data) in parts.items()}
                stored = b""
                if caption:
                    stored = _npy(embeddings[caption], f"{dataset.name}/{key}")
                    places[index.CAPTION_SUFFIX] = out.add(f"{key}.{index.CAPTION_SUFFIX}", stored)
                for _, suffix in index.clips_of(key, parts):
                    row = old.get(parts[suffix][0]) if suffix else None
                    if suffix and row is not None:
                        members.append(_moved(row, places[suffix], places, stored))
        length = out.end()
    return index.write_shard_index(url, name, members, length)


def _moved(row: np.void, offset: int, places: dict[str, int], embedding: bytes) -> index.Member:
    """The record of a clip at its new place."""
    fields = {name: row[name].item() for name in _MEMBERS}
    told = {"caption_bytes": len(embedding), "caption_crc": zlib.crc32(embedding) if embedding else 0}
    told["caption_offset"] = places.get(index.CAPTION_SUFFIX, 0)
    moved = {"key": row["key"].decode(), "offset": offset, "kind": int(row["kind"])}
    return index.Member(**{**fields, **told, **moved})


class _Tar:
    """A plain tar in the making; remembers where each member's bytes start."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.place = 0

    def add(self, name: str, data: bytes) -> int:
        whole = tar_member(name, data)
        start = self.place + len(whole) - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self.file.write(whole)
        self.place += len(whole)
        return start

    def end(self) -> int:
        self.file.write(bytes(2 * tarfile.BLOCKSIZE))
        return self.place + 2 * tarfile.BLOCKSIZE


def _samples(dataset: index.Dataset, number: int) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """(key, {suffix: (offset, bytes)}) of each sample of a shard, old embeddings left out."""
    current, parts = "", {}
    with index.open_tar(dataset.shard_url(number), int(dataset.shard_bytes[number])) as tar:
        for info in tar:
            match = index._KEY.match(info.name)
            file = tar.extractfile(info) if info.isreg() and not index._climbs(info.name) else None
            if not match or file is None or match[2].lower() == index.CAPTION_SUFFIX:
                continue
            if match[1] != current and parts:
                yield current, parts
                parts = {}
            current = match[1]
            parts.setdefault(match[2], (info.offset_data, file.read()))
    if parts:
        yield current, parts


def _batched(samples: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _caption(parts: dict[str, tuple[int, bytes]]) -> str:
    """The caption of a sample, empty where it has none."""
    parts = {suffix.lower(): part for suffix, part in parts.items()}
    if "json" in parts and (caption := told(index._sidecar(parts["json"][1]))):
        return caption
    return parts.get("txt", (0, b""))[1].decode("utf-8-sig", "replace").strip()


def _npy(embedding_LD: Tensor, name: str) -> bytes:
    """A float16 .npy; raises InputError for numbers that are not finite, or too large for float16."""
    stored_LD = embedding_LD.to(torch.float16)
    if not torch.isfinite(stored_LD).all():
        raise InputError(
            f"{name}: its embedding has numbers up to {embedding_LD.abs().max().item():.3g}, which float16 can't hold; "
            "check the encoder's weights"
        )
    buffer = io.BytesIO()
    np.save(buffer, stored_LD.numpy(), allow_pickle=False)
    return buffer.getvalue()
