"""A trained model as a codec: encodes, decodes and reconstructs videos of any length, in constant memory.

    codec = load("s3://runs/arvae-16x16")                     a run, a checkpoint, or an exported folder
    for latent in codec.encode(frames): ...                   named tensors, as early as the recipe can
    for pixels_1CTHW in codec.decode(latents, size): ...
    encode_file(codec, "in.mp4", "out.safetensors"); decode_file(codec, "out.safetensors", "out.mp4")
    reconstruct_file(codec, "in.mp4", "out.mp4", beside=True)

Legend: C channels (3, RGB), T frames, H height, W width.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines import storage
from pipelines.faults import InputError
from trainer import checkpoint, footage, latents, manifest, run
from trainer import recipe as recipes
from trainer.recipe import CodecRecipe, Latent, codec_of

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = "moviola-codec-1"


class Codec:
    """A recipe and its model. Frames of any size go in: they are padded to what the recipe takes and cropped again."""

    def __init__(self, recipe: CodecRecipe, model: nn.Module, *, device: torch.device | str = "cpu") -> None:
        self.recipe = recipe
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The size that a frame of that size is coded at."""
        multiple = self.recipe.multiple
        return math.ceil(height / multiple) * multiple, math.ceil(width / multiple) * multiple

    @torch.no_grad()
    def encode(
        self, frames_1CTHW: Tensor | Iterable[Tensor], caption_emb_1LD: Tensor | None = None
    ) -> Iterator[Latent]:
        """Latents of a video, or of a stream of chunks of it, in [-1, 1]; each is yielded as early as it can be.

        ``caption_emb_1LD`` is for recipes that read text; None is no caption.
        """
        yield from self.recipe.encode(
            self.model, map(self._pad, _chunks(frames_1CTHW)), _moved(caption_emb_1LD, self.device)
        )

    @torch.no_grad()
    def decode(
        self, stream: Iterable[Latent], size: tuple[int, int], caption_emb_1LD: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Chunks (1, C, t, H, W) in [-1, 1] on the codec's device, cropped to ``size`` (height, width)."""
        height, width = size
        moved = ({name: tensor.to(self.device) for name, tensor in latent.items()} for latent in stream)
        for pixels_1CTHW in self.recipe.decode(self.model, moved, _moved(caption_emb_1LD, self.device)):
            yield pixels_1CTHW[..., :height, :width]

    def reconstruct(self, frames_1CTHW: Tensor, caption_emb_1LD: Tensor | None = None) -> Tensor:
        """Encodes and decodes a video that fits in memory; the same shape, on the CPU."""
        return self.round_trip(frames_1CTHW, caption_emb_1LD)[0]

    def round_trip(self, frames_1CTHW: Tensor, caption_emb_1LD: Tensor | None = None) -> tuple[Tensor, int]:
        """The reconstruction, and how many latent numbers it was made from."""
        coded = Coded()
        stream = _counted(self.encode(frames_1CTHW, caption_emb_1LD), coded)
        chunks = self.decode(stream, tuple(frames_1CTHW.shape[-2:]), caption_emb_1LD)
        return torch.cat([chunk.cpu() for chunk in chunks], dim=2), coded.numbers

    def digest(self) -> str:
        """A digest of the weights: latents are decoded by the weights that encoded them, and no others."""
        return checkpoint.weights_digest(self.model.state_dict())

    def _pad(self, chunk_1CTHW: Tensor) -> Tensor:
        *_, height, width = chunk_1CTHW.shape
        tall, wide = self.padded(height, width)
        chunk_1CTHW = chunk_1CTHW.to(self.device)
        if (tall, wide) == (height, width):
            return chunk_1CTHW
        return F.pad(chunk_1CTHW, (0, wide - width, 0, tall - height, 0, 0), mode="replicate")


def fastest() -> str:
    """The device for long work: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _chunks(frames_1CTHW: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    return frames_1CTHW.split(1, dim=2) if isinstance(frames_1CTHW, Tensor) else frames_1CTHW


# -- where codecs come from -------------------------------------------------------------------------------------------


def load(
    url: str,
    *,
    ema: bool | None = None,
    sets: Sequence[str] = (),
    device: torch.device | str = "cpu",
    warn: Callable[[str], None] = lambda text: None,
) -> Codec:
    """A codec from a checkpoint, a run (its newest checkpoint), or a folder that :func:`export` wrote.

    ``ema`` None takes the averaged weights where the run keeps them; ``sets`` (``model.a=value``) change what changes
    no weights. Raises InputError where there is none of these.
    """
    if not storage.exists(storage.join(url, CONFIG)):
        trained = run.open_model(url, ema=ema, sets=sets, warn=warn)
        return Codec(codec_of(trained.recipe, storage.redact(url)), trained.model, device=device)
    config = storage.read_json(storage.join(url, CONFIG))
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f"{storage.redact(url)}/{CONFIG} is not of a codec that `moviola export` wrote ({FORMAT})")
    try:
        kind = recipes.load(config["recipe"])
        recipe = codec_of(kind(kind.Config.model_validate(config["model"])), storage.redact(url))
        told = config["weights"]
    except (KeyError, TypeError, ValidationError):
        raise InputError(f"{storage.redact(url)}/{CONFIG} was changed or cut short; export it again") from None
    recipe = manifest.changed_model(recipe, sets)
    model = recipes.skeleton(recipe)
    with latents.local(storage.join(url, WEIGHTS)) as path:
        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{storage.redact(url)}/{WEIGHTS} is damaged: {error}; export it again") from None
    checkpoint.assign(model, weights)
    codec = Codec(recipe, model, device=device)
    if codec.digest() != told:
        raise InputError(
            f"{storage.redact(url)}/{WEIGHTS} is not what {CONFIG} says: it is damaged, or of another export"
        )
    return codec


def export(codec: Codec, folder: str) -> list[str]:
    """Writes ``config.json`` and ``model.safetensors``, all that :func:`load` needs; their URLs."""
    urls = [storage.join(folder, name) for name in (CONFIG, WEIGHTS)]
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        weights = {name: tensor.cpu().contiguous() for name, tensor in codec.model.state_dict().items()}
        save_file(weights, file.name, metadata={"format": FORMAT})
        storage.upload(urls[1], file.name)
    told = made_by(codec) | {"model": recipes.portable(codec.recipe).model_dump(mode="json")}
    storage.write_json(urls[0], {"format": FORMAT, **told, "parts": dict(codec.recipe.parts(codec.model))})
    return urls


def made_by(codec: Codec) -> dict[str, object]:
    """What coded: recipe, configuration, and the digest of the weights."""
    config = codec.recipe.config.model_dump(mode="json")
    return {"recipe": codec.recipe.name, "model": config, "weights": codec.digest()}


# -- files ------------------------------------------------------------------------------------------------------------


@dataclass
class Coded:
    """What came of a file: ``numbers`` latent numbers; ``psnr_db`` over all pixels where both sides were seen."""

    frames: int = 0
    height: int = 0
    width: int = 0
    fps: float = 0.0
    numbers: int = 0
    psnr_db: float | None = None

    @property
    def numbers_per_frame(self) -> float:
        """Latent numbers over frames."""
        return self.numbers / max(1, self.frames)

    def json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self) | {"numbers_per_frame": self.numbers_per_frame})


Progress = Callable[[int], None]


def _apart(source: str, out: str) -> None:
    """Raises InputError where writing ``out`` would lose ``source``."""
    same = storage.absolute(source) == storage.absolute(out)
    if not same and not storage.is_remote(source) and not storage.is_remote(out):
        with contextlib.suppress(OSError):
            same = os.path.samefile(storage.absolute(source), storage.absolute(out))
    if same:
        raise InputError(f"{storage.redact(out)} is the file to read; name another one to write", status=2)


def encode_file(
    codec: Codec,
    video: str,
    out: str,
    progress: Progress = lambda frames: None,
    *,
    caption_emb_1LD: Tensor | None = None,
) -> Coded:
    """Encodes a video to a latents file; raises InputError for what can't be read or written."""
    _apart(video, out)
    with footage.reader(video) as source:
        coded = Coded(height=source.height, width=source.width, fps=float(source.fps))

        def metadata() -> dict[str, str]:
            made = {k: v if isinstance(v, str) else json.dumps(v) for k, v in made_by(codec).items()}
            shape = {"frames": coded.frames, "height": coded.height, "width": coded.width, "fps": source.fps}
            return made | {name: str(value) for name, value in shape.items()}

        stream = _counted(codec.encode(_watched(source, coded, progress), caption_emb_1LD), coded)
        latents.save(out, stream, metadata)
    return coded


def decode_file(
    codec: Codec,
    file: str,
    out: str,
    progress: Progress = lambda frames: None,
    *,
    caption_emb_1LD: Tensor | None = None,
) -> Coded:
    """Decodes a latents file to an mp4; raises InputError for latents of other weights."""
    _apart(file, out)
    with latents.opened(file) as (metadata, stream):
        if metadata["weights"] != codec.digest():
            raise InputError(
                f"{storage.redact(file)} was encoded by other weights ({metadata['recipe']} "
                f"{metadata['weights'][:12]}) than those given ({codec.recipe.name} {codec.digest()[:12]}). "
                "Decode with the checkpoint that encoded."
            )
        fps, height, width = Fraction(metadata["fps"]), int(metadata["height"]), int(metadata["width"])
        coded = Coded(height=height, width=width, fps=float(fps))
        with footage.writer(out, fps, height, width) as video:
            for pixels_1CTHW in codec.decode(_counted(stream, coded), (height, width), caption_emb_1LD):
                video.add(pixels_1CTHW)
                coded.frames = video.frames
                progress(coded.frames)
    return coded


def reconstruct_file(
    codec: Codec,
    video: str,
    out: str,
    *,
    beside: bool = True,
    progress: Progress = lambda frames: None,
    caption_emb_1LD: Tensor | None = None,
) -> Coded:
    """Encodes and decodes a video in one pass and writes an mp4; ``beside`` puts the original on the left."""
    _apart(video, out)
    with footage.reader(video) as source:
        coded = Coded(height=source.height, width=source.width, fps=float(source.fps))
        waiting: deque[Tensor] = deque()

        def kept() -> Iterator[Tensor]:
            for frame_1CTHW in _watched(source, coded, progress):
                waiting.append(frame_1CTHW)
                yield frame_1CTHW

        size, error = (source.height, source.width), 0.0
        stream = codec.decode(_counted(codec.encode(kept(), caption_emb_1LD), coded), size, caption_emb_1LD)
        with footage.writer(out, source.fps, source.height, source.width * (2 if beside else 1)) as made:
            for pixels_1CTHW in stream:
                for x_1C1HW in pixels_1CTHW.cpu().split(1, dim=2):
                    original_1C1HW = waiting.popleft()
                    error += ((x_1C1HW - original_1C1HW) / 2).double().square().sum().item()
                    made.add(torch.cat((original_1C1HW, x_1C1HW), dim=-1) if beside else x_1C1HW)
        mean = error / (3 * math.prod(size) * coded.frames)
        coded.psnr_db = -10 * math.log10(mean) if mean else None
    return coded


def _watched(frames: Iterable[Tensor], coded: Coded, progress: Progress) -> Iterator[Tensor]:
    for frame_1CTHW in frames:
        coded.frames += frame_1CTHW.shape[2]
        progress(coded.frames)
        yield frame_1CTHW


def _counted(stream: Iterable[Latent], coded: Coded) -> Iterator[Latent]:
    for latent in stream:
        coded.numbers += sum(tensor.numel() for tensor in latent.values() if tensor.is_floating_point())
        yield latent
