"""Videos from a latent diffusion model: samples of latents, decoded by a codec.

Each sample is drawn and decoded alone: sample n is the same whatever the count.

Legend: C channels (3, RGB), T frames, H height, W width; L caption tokens, D their width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from pipelines import storage
from pipelines.captions import TextEncoder
from pipelines.clips import read_caption
from pipelines.contracts import LatentLayout
from pipelines.faults import InputError, Skip
from pipelines.latents import split
from trainer import footage, pictures, run
from trainer.codec import Codec
from trainer.recipe import LatentRecipe, samples
from trainer.run import Trained

Warn = Callable[[str], None]


def load(url: str, *, device: torch.device | str = "cpu", warn: Warn = lambda text: None) -> Trained:
    """A latent diffusion model from a checkpoint or a run; raises InputError where it is a codec."""
    trained = run.open_model(url, warn=warn)
    _recipe(trained)
    trained.model.to(device)
    return trained


def _recipe(trained: Trained) -> LatentRecipe:
    if samples(trained.recipe):
        return trained.recipe
    raise InputError(
        f"{storage.redact(trained.url)} is a codec (recipe {trained.recipe.name}), and samples are drawn from a latent "
        "diffusion model. Encode a dataset with it (moviola encode --dataset) and train recipe latentdit on that",
        status=2,
    )


def caption(trained: Trained, said: str, encoder: str | None = None) -> Tensor:
    """``caption_emb_1LD`` of a text, or of a stored embedding ``FILE.npy``.

    A text is read by ``encoder``, or by the one that made the embeddings the model was trained on.
    """
    if said.endswith(".npy"):
        try:
            return read_caption(storage.read_bytes(said), said)[None]
        except storage.Missing:
            raise InputError(f"--caption {said}: there is no such file", status=2) from None
        except Skip as skip:
            raise InputError(f"--caption {skip.detail}", status=2) from None
    name = encoder or _recipe(trained).layout.text_encoder
    if name is None:
        raise InputError(
            "--caption: the latents do not say which text encoder made their captions' embeddings; name it with "
            "--text-encoder, or give an embedding (FILE.npy)",
            status=2,
        )
    return TextEncoder(name)([said])[0][None]


def draw(
    trained: Trained,
    codec: Codec,
    to: str,
    *,
    count: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    caption_emb_1LD: Tensor | None = None,
    progress: Callable[[int], None] = lambda done: None,
    warn: Warn = lambda text: None,
) -> list[str]:
    """Draws ``count`` videos and writes them: to the mp4 ``to``, or as ``sample-00000.mp4`` and on, with a picture of
    all, ``samples.png``, to the folder ``to``. Their URLs.

    Raises InputError where the codec can't decode the model's latents.
    """
    recipe = _recipe(trained)
    single = to.endswith(".mp4")
    if single and count > 1:
        raise InputError(f"{to} is one file, and there are {count} samples; name a folder", status=2)
    layout = recipe.layout
    _decodes(codec, layout, warn)
    fps, size = Fraction(layout.fps).limit_denominator(1001), (layout.height, layout.width)
    urls, shown = [], []
    for place in range(count):
        arrays = recipe.sample(
            trained.model, seed, place, steps=steps, guidance=guidance, caption_emb_1LD=caption_emb_1LD
        )
        url = to if single else storage.join(to, f"sample-{place:05d}.mp4")
        chunks = [chunk.cpu() for chunk in codec.decode(split(arrays, layout), size, caption_emb_1LD)]
        with footage.writer(url, fps, *size) as video:
            for chunk_1CTHW in chunks:
                video.add(chunk_1CTHW)
        urls.append(url)
        if place < pictures.CONTACTS:
            shown.append(torch.cat(chunks, dim=2)[0])
        progress(place + 1)
    if not single:
        with tempfile.TemporaryDirectory() as scratch:
            storage.upload(storage.join(to, "samples.png"), pictures.contact(shown, Path(scratch) / "samples.png"))
        urls.append(storage.join(to, "samples.png"))
    return urls


def _decodes(codec: Codec, layout: LatentLayout, warn: Warn) -> None:
    """Raises InputError for a codec of other latents; warns of one whose weights are others, as after post-training."""
    told, size = layout.codec, codec.padded(layout.height, layout.width)
    if codec.recipe.name != told["recipe"]:
        raise InputError(
            f"the model's latents are of recipe {told['recipe']}, and --codec is of {codec.recipe.name}", status=2
        )
    wanted = {name: tensor.shape for name, tensor in layout.tensors.items()}
    shapes = codec.recipe.latent(layout.frames, *size).shapes
    found = {name: tuple(shapes[name]) for name in wanted if name in shapes}
    if found != wanted:
        raise InputError(
            f"the model's latents are {wanted}, and those of --codec {found} for {layout.frames} frames of "
            f"{layout.height} x {layout.width}. Give the codec that encoded them",
            status=2,
        )
    if codec.digest() != told["weights"]:
        warn(
            f"the latents were encoded by other weights ({told['weights'][:12]}) than those of --codec "
            f"({codec.digest()[:12]}); that is right where only its decoder was trained on (post-training)"
        )
