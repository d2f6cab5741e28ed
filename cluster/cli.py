"""The command ``moviola``. Every verb is thin: it reads its arguments, calls one function, and shows the answer."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from pipelines import storage
from pipelines.faults import InputError, Remark

STOPPED = 75
INTERRUPTED = 130
LINE_SECONDS = 30.0
"""Between two lines of how far a command is, where there is no terminal for a bar."""
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
"""Of a path: faults of input."""
FLAN_T5 = "google/flan-t5-large"
"""What VideoVAE+ reads captions by."""
app = typer.Typer(
    name="moviola",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
out = Console(soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

Manifest = Annotated[str, typer.Argument(help="Path or URL of a manifest.", show_default=False)]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or its path.", show_default=False)]
CheckpointUrl = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run (its newest committed one).")
]
CodecUrl = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, a run, or a folder that `moviola export` wrote.")
]
Runs = Annotated[str, typer.Option("--runs", envvar="MOVIOLA_RUNS", help="Folder or URL where runs are kept.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change any field, e.g. optimizer.lr=1e-4.")
]
ModelSets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Change what changes no weights, e.g. model.length.by=psnr (One-DVA)."
    ),
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the run, in place of the manifest's.")]
Cluster = Annotated[
    str, typer.Option("--cluster", metavar="CLUSTER", help="local, http://HOST:8265 (Ray's dashboard) or kubernetes.")
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Show what it says until it ends.")]
Caption = Annotated[
    str | None, typer.Option("--caption", metavar="TEXT", help="What the video shows, for a model that reads text.")
]
Encoder = Annotated[
    str | None,
    typer.Option(
        "--text-encoder",
        help="T5 encoder of the caption, a folder or a hub name; by default that of the run's captions, else "
        "google/flan-t5-large.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"moviola {version('moviola')}, torch {version('torch')}, ray {version('ray')}", highlight=False)
        raise typer.Exit


@app.callback()
def moviola(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Trains video autoencoders at scale. `moviola COMMAND --help` says more of each command."""


@app.command()
def train(
    manifest: Manifest,
    sets: Sets = None,
    name: Name = None,
    runs: Runs = "./runs",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge and resolve the manifest, train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train in the foreground, on an embedded local Ray. The same command goes on with a run that was stopped.

    Ctrl-C or SIGTERM commits a checkpoint and ends with status 75.
    """

    def wanted() -> tuple[Any, str]:
        from trainer import manifest as manifests
        from trainer import run as folder

        return manifests.load(manifest, sets or [], name=name, judge=folder.data_faults), runs

    if dry_run:
        _dry_run(wanted()[0], as_json)
    else:
        _train(wanted, as_json)


def _train(find: Callable[[], tuple[Any, str]], as_json: bool) -> None:
    """Trains what ``find`` gives, in its folder of runs. A signal is answered once it is known which run it is."""
    asked: list[int] = []

    def hear(number: int, frame: Any) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        err.print(f"{signal.Signals(number).name}: stopping before it begins …")

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        from cluster import launch
        from trainer import run as folder

        wanted, runs = find()
        if not asked:
            wanted, run_url = folder.claim(wanted, runs)
            err.print(f"run {wanted.name} in {storage.redact(run_url)}")
            outcome = launch.foreground(wanted, run_url, err, asked=asked)
        elif folder.load(run_url := folder.url_of(runs, wanted.name), missing_ok=True) is None:
            raise KeyboardInterrupt
        else:
            outcome = "stopped"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _finish(outcome, wanted.name, run_url, _again(), as_json)


@app.command()
def submit(
    manifest: Manifest,
    cluster: Cluster,
    sets: Sets = None,
    name: Name = None,
    runs: Runs = "./runs",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Judge the manifest for the cluster; for kubernetes, print the RayJob.")
    ] = False,
    follow: Follow = False,
    as_json: Json = False,
) -> None:
    """Hand a run to something that outlives this command, and return with its name; `-f` follows it.

    The same command goes on with a run that was stopped, at another size or on another cluster if asked.
    """
    from cluster import kubernetes
    from cluster import submit as submitting
    from trainer import manifest as manifests
    from trainer import run as folder

    submitting.known(cluster)
    wanted = manifests.load(manifest, sets or [], name=name, judge=lambda sound: submitting.judge(sound, runs, cluster))
    if not dry_run:
        _submit(wanted, runs, cluster, follow, as_json)
        return
    run_url = folder.url_of(runs, wanted.name)
    if cluster == "kubernetes" and wanted.kubernetes is not None:
        job = kubernetes.render(wanted, run_url, f"{wanted.name}-000000", submitting.environment())
        if as_json:
            _dry_run(wanted, as_json, rayjob=job)
        else:
            out.print(kubernetes.text(job), end="", highlight=False)
    faults = list(submitting.judge(wanted, runs, cluster))
    if faults:
        listing = "\n  ".join(faults)
        raise InputError(f"{wanted.name} can't run on {cluster}:\n  {listing}", status=2)
    if cluster != "kubernetes":
        _dry_run(wanted, as_json)


def _submit(wanted: Any, runs: str, cluster: str, follow: bool, as_json: bool) -> None:
    from cluster import submit as submitting

    given = submitting.submit(wanted, runs, cluster)
    if as_json:
        out.print_json(data=dataclasses.asdict(given))
    else:
        out.print(given.name)
    if given.job is None:
        err.print(f"run {given.name} is done already: {storage.redact(given.url)}")
        return
    err.print(f"run {given.name} in {storage.redact(given.url)}: job {given.job} on {cluster}")
    if given.warning:
        _warn(given.warning)
    if not follow:
        err.print(f"  moviola logs {given.name} -f --runs {storage.redact(runs)}")
        return
    _follow(given.url, given.name, forever=True)


def _follow(run_url: str, name: str, *, forever: bool) -> None:
    from cluster import submit as submitting

    state = submitting.follow(run_url, lambda line: out.print(storage.redact(line), highlight=False), forever=forever)
    if forever and state in ("failed", "silent"):
        raise typer.Exit(1)
    if forever and state == "stopped":
        raise typer.Exit(STOPPED)


@app.command()
def logs(run: RunName, follow: Follow = False, runs: Runs = "./runs") -> None:
    """What happened to a run and what it trained, from its storage; `-f` goes on until it ends."""
    from trainer import run as folder

    _, run, run_url = _run(run, runs)
    folder.load(run_url)
    _follow(run_url, run, forever=follow)


@app.command()
def resume(
    run: RunName,
    runs: Runs = "./runs",
    sets: Sets = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="CLUSTER", help="As for submit; by default in the foreground.")
    ] = None,
    follow: Follow = False,
    as_json: Json = False,
) -> None:
    """Go on with a run from its newest committed checkpoint; `--set workers.count=N` at another world size."""

    def wanted() -> tuple[Any, str]:
        from trainer import manifest as manifests
        from trainer import run as folder

        parent, name, run_url = _run(run, runs)
        folder.load(run_url)
        return manifests.load(storage.join(run_url, "manifest.yaml"), sets or [], name=name), parent

    if cluster is None:
        _train(wanted, as_json)
    else:
        _submit(*wanted(), cluster, follow, as_json)


def _run(name: str, runs: str) -> tuple[str, str, str]:
    """The folder of runs, the name and the URL of a run, from its name, or from its path or URL."""
    from trainer import manifest as manifests
    from trainer import run as folder

    parent, slash, last = name.rstrip("/").rpartition("/")
    if slash:
        runs, name = parent or "/", last
    if not manifests.NAME.fullmatch(name):
        raise InputError(f"{name!r} is no run's name; `moviola list` shows the runs that there are", status=2)
    return runs, name, folder.url_of(runs, name)


def _again() -> str:
    """The command as it was typed, without secrets."""
    import shlex
    import shutil

    command = sys.argv[0] if shutil.which(sys.argv[0]) not in (None, shutil.which("moviola")) else "moviola"
    return " ".join(shlex.quote(storage.redact(argument)) for argument in (command, *sys.argv[1:]))


def _finish(outcome: str, name: str, run_url: str, command: str, as_json: bool) -> None:
    from cluster import runs as known

    status = known.status(run_url)
    if as_json:
        out.print_json(data=dataclasses.asdict(status))
    if outcome == "stopped":
        step = status.last_commit_step
        kept = " before its first checkpoint" if step is None else f"; a checkpoint of step {step} is committed"
        err.print(f"run {name} stopped{kept}. To go on:")
        err.print(f"  {command}")
        raise typer.Exit(STOPPED)
    err.print(f"run {name} is done: {status.step} steps, goodput {status.goodput or 0:.1%}, {storage.redact(run_url)}")


def _dry_run(wanted: Any, as_json: bool, rayjob: Any = None) -> None:
    from trainer import plan, run

    facts = plan.dry_run(wanted)
    if as_json:
        out.print_json(data=facts if rayjob is None else {**facts, "rayjob": rayjob})
    else:
        plan.show(facts, out)
    for fault in run.data_faults(wanted):
        _warn(f"train would refuse this: {fault}")
    for remark in run.remarks(wanted):
        _warn(remark)


@app.command()
def schema() -> None:
    """The JSON Schema of a manifest: `moviola schema > moviola.schema.json`, and an editor completes and checks."""
    from trainer import manifest as manifests

    out.print_json(data=manifests.schema())


@app.command("list")
def list_runs(runs: Runs = "./runs", as_json: Json = False) -> None:
    """All runs of a folder: state, stage, step, loss, speed, goodput."""
    from cluster import runs as known
    from trainer import run

    found = []
    for name in known.names(runs):
        try:
            found.append(known.status(run.url_of(runs, name)))
        except InputError as error:
            _warn(f"{name} is left out: {error}")
    if as_json:
        out.print_json(data={"runs": [dataclasses.asdict(status) for status in found]})
        return
    if not found:
        err.print(f"no runs in {storage.redact(runs)}")
    table = Table()
    titles = "run", "state", "attempt", "stage", "step", "loss", "clips/s", "left", "commit", "restarts", "goodput"
    for title in titles:
        table.add_column(title, overflow="fold")
    for s in found:
        left = None if s.seconds_left is None else known.clock(s.seconds_left)
        goodput = None if s.goodput is None else f"{s.goodput:.1%}"
        table.add_row(*_cells(s.name, s.state, s.attempt, s.stage, f"{s.step}/{s.steps}", s.loss, s.clips_per_second,
                              left, s.last_commit_step, s.restarts, goodput))  # fmt: skip
    if found:
        out.print(table)


def _cells(*values: Any) -> list[str]:
    return ["-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]


@app.command()
def status(run: RunName, runs: Runs = "./runs", as_json: Json = False) -> None:
    """One run, from its storage: state, step, loss, commits, restarts and where every second went."""
    from cluster import runs as known
    from cluster import submit as submitting

    state = submitting.refresh(_run(run, runs)[2])
    if as_json:
        out.print_json(data=dataclasses.asdict(state))
        return
    total = sum(state.ledger.values()) or 1.0
    causes = ", ".join(f"{cause} {times}" for cause, times in state.causes.items())
    rows = {
        "run": state.name, "state": state.state, "on": state.cluster, "attempt": state.attempt, "stage": state.stage,
        "step": f"{state.step} of {state.steps}", "loss": state.loss, "clips a second": state.clips_per_second,
        "time left": None if state.seconds_left is None else known.clock(state.seconds_left),
        "last commit": None if state.last_commit_step is None else f"step {state.last_commit_step}",
        "restarts": f"{state.restarts} ({causes})" if causes else 0,
        "goodput": None if state.goodput is None else f"{state.goodput:.1%} of {known.clock(total)}",
        "time went to": "  ".join(f"{cause} {s:.0f} s ({s / total:.0%})" for cause, s in state.ledger.items()
                                  if s >= 0.5) or None,
    }  # fmt: skip
    table = Table(show_header=False)
    for name, value in (rows | ({"failure": state.failure} if state.failure else {})).items():
        table.add_row(name, *_cells(value))
    out.print(table)


@app.command()
def stop(run: RunName, runs: Runs = "./runs") -> None:
    """Ask a run to commit a checkpoint and end. A job that has not begun is taken back."""
    from cluster import runs as known
    from cluster import submit as submitting

    _, run, run_url = _run(run, runs)
    state = submitting.refresh(run_url).state
    if state in ("done", "stopped", "failed"):
        raise InputError(f"run {run} is already {state}")
    if submitting.stop(run_url, _warn) == "stopped":
        step = known.status(run_url).last_commit_step
        kept = "no checkpoint is committed" if step is None else f"the checkpoint of step {step} is committed"
        began = "nothing has begun with it" if state == "waiting" else "its process was gone"
        err.print(f"run {run} is stopped: {began}, and {kept}; `moviola resume {run}` goes on")
        return
    if state == "silent":
        _warn(f"nothing is heard of {run}, so it may be over; if its process lives, it stops at its next step")
    err.print(f"asked {run} to stop; `moviola status {run}` says when its checkpoint is committed")


@app.command()
def evaluate(
    checkpoint: CheckpointUrl,
    dataset: Annotated[str | None, typer.Argument(help="Dataset; by default the run's data.eval.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip; by default the last stage's.", min=1)] = None,
    clips: Annotated[int | None, typer.Option(help="Clips, spread over the dataset; by default all.", min=1)] = None,
    lpips: Annotated[Literal["alex", "vgg"], typer.Option(help="LPIPS backbone.")] = "alex",
    lpips_weights: Annotated[
        str, typer.Option(help="The backbone's weights: random, torchvision (downloads), a path or a URL.")
    ] = "random",
    i3d: Annotated[
        str | None, typer.Option(help="Path of StyleGAN-V's i3d_torchscript.pt: also rFVD, at dataset level.")
    ] = None,
    i3d_batch: Annotated[
        int | None, typer.Option(help="Also rFVD as LeanVAE and WF-VAE print it, for batches of so many clips.", min=1)
    ] = None,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="Also Shannon entropy: of frames, of motion and residual, of latents.")
    ] = False,
    sets: ModelSets = None,
    by: Annotated[
        str | None, typer.Option(help="motion: also thirds of the clips, from least to most motion.", metavar="motion")
    ] = None,
    captions: Annotated[
        bool, typer.Option("--captions/--no-captions", help="Whether a model that reads text gets the clips' captions.")
    ] = True,
    runs: Runs = "./runs",
    as_json: Json = False,
) -> None:
    """PSNR, SSIM, LPIPS, rFVD, beside two baselines of the same latent budget; a run keeps them in evaluation.json."""
    from trainer import codec as codecs
    from trainer import examine
    from trainer import run as folder

    if by not in (None, "motion"):
        raise InputError(f"--by {by}: clips are split by motion; write --by motion", status=2)
    url, run_url = _checkpoint(checkpoint, runs)
    if i3d_batch and not i3d:
        raise InputError("--i3d-batch needs --i3d, the network's path", status=2)
    dataset = dataset or _required(folder.load(run_url)).data.eval
    if dataset is None:
        raise InputError(f"{checkpoint}: the run's manifest has no data.eval; name a dataset", status=2)
    with err.status("evaluating …") as status:
        report = examine.evaluate_checkpoint(
            url, dataset, run_url=run_url, frames=frames, count=clips, sets=sets or (),
            lpips={"backbone": lpips, "weights": lpips_weights},
            fvd={"i3d": i3d, "per_batch": i3d_batch} if i3d else None, entropies=entropy, captions=captions,
            device=codecs.fastest(),
            progress=lambda done: status.update(f"evaluating … {done} clips"), warn=_warn,
        )  # fmt: skip
    if as_json:
        out.print_json(report.json())
        return
    out.print(report.table())
    for table in report.entropies.tables() if report.entropies else ():
        out.print(table)
    if by:
        out.print(report.by_motion())
    err.print(f"{run_url}/evaluation.json, pictures in {run_url}/samples")


@app.command()
def reconstruct(
    checkpoint: CodecUrl,
    video: Annotated[str, typer.Argument(help="Video of any length and size.")],
    to: Annotated[str, typer.Argument(metavar="OUT.mp4", help="Where the mp4 goes.")],
    alone: Annotated[bool, typer.Option("--alone", help="The reconstruction alone, not beside the original.")] = False,
    caption: Caption = None,
    text_encoder: Encoder = None,
    sets: ModelSets = None,
    runs: Runs = "./runs",
    as_json: Json = False,
) -> None:
    """Encode and decode a video of any length in constant memory; an mp4 with the original on the left."""
    from trainer import codec as codecs

    url = _checkpoint(checkpoint, runs)[0]
    codec = codecs.load(url, sets=sets or (), device=codecs.fastest(), warn=_warn)
    text = _text(codec, url, caption, text_encoder)
    _coded(
        lambda show: codecs.reconstruct_file(codec, video, to, beside=not alone, progress=show, caption_emb_1LD=text),
        to, as_json,
    )  # fmt: skip


@app.command()
def encode(
    checkpoint: CodecUrl,
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="VIDEO OUT.safetensors | --dataset DATASET DEST",
            help="A video of any length and size, and where its latents go; with --dataset, only where they go.",
            show_default=False,
        ),
    ],
    dataset: Annotated[
        str | None, typer.Option(help="Encode every clip of a dataset, to a dataset of latents. Run again to go on.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Of a dataset: frames of a sample; by default the codec's last stage's.", min=1)
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Of a dataset: pixels; by default the codec's last stage's.")
    ] = None,
    caption: Caption = None,
    text_encoder: Encoder = None,
    sets: ModelSets = None,
    runs: Runs = "./runs",
    as_json: Json = False,
) -> None:
    """Encode a video to latents, frame by frame; or a dataset, to train a latent diffusion model on."""
    from trainer import codec as codecs

    url = _checkpoint(checkpoint, runs)[0]
    if dataset is None:
        if frames or size:
            raise InputError("--frames and --size belong to --dataset; a video is encoded as it is", status=2)
        if len(paths) != 2:
            raise InputError(
                f"encode CHECKPOINT VIDEO OUT.safetensors takes two paths; here are {len(paths)}", status=2
            )
        codec = codecs.load(url, sets=sets or (), device=codecs.fastest(), warn=_warn)
        text = _text(codec, url, caption, text_encoder)
        _coded(
            lambda show: codecs.encode_file(codec, paths[0], paths[1], show, caption_emb_1LD=text), paths[1], as_json
        )
        return
    if caption is not None:
        raise InputError(
            "--caption belongs to one video; --dataset takes the captions that lie beside the clips", status=2
        )
    if len(paths) != 1:
        raise InputError(f"encode CHECKPOINT --dataset DATASET DEST takes one path; here are {len(paths)}", status=2)
    from trainer import encoding

    window = encoding.window(url, frames, size)
    codec = codecs.load(url, sets=sets or (), device=codecs.fastest(), warn=_warn)
    with _bar("encoding clips") as move:

        def show(state: encoding.Progress) -> None:
            move(state.done, state.clips, f"{state.samples} samples, {state.skipped} clips skipped")

        summary = encoding.encode_dataset(codec, dataset, paths[0], *window, progress=show)
    if as_json:
        out.print_json(data=dataclasses.asdict(summary))
    else:
        out.print(summary.text())


@app.command()
def sample(
    checkpoint: CheckpointUrl,
    to: Annotated[str, typer.Argument(metavar="OUT.mp4|DIR", help="An mp4, or a folder for several.")],
    codec: Annotated[str, typer.Option(help="Checkpoint, run or export that decodes the latents.")],
    count: Annotated[int, typer.Option(help="Samples.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Sample n is a function of the weights, this seed and n.", min=0)] = 0,
    caption: Annotated[
        str | None, typer.Option(metavar="TEXT|FILE.npy", help="A caption, or its stored embedding; a class's name.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="T5 encoder of the caption; by default the one of the latents' captions.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler; by default the model's.", min=1)] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Weight of the caption; 1 is none. By default the model's.", min=0)
    ] = None,
    runs: Runs = "./runs",
    as_json: Json = False,
) -> None:
    """Draw videos from a latent diffusion model: its samples, decoded by the codec that its latents came from."""
    from trainer import codec as codecs
    from trainer import sampling

    device = codecs.fastest()
    model = sampling.load(_checkpoint(checkpoint, runs)[0], device=device, warn=_warn)
    decoder = codecs.load(_checkpoint(codec, runs)[0], device=device, warn=_warn)
    with err.status("sampling …") as status:
        made = sampling.draw(
            model, decoder, to, count=count, seed=seed, steps=steps, guidance=guidance,
            caption_emb_1LD=sampling.caption(model, caption, text_encoder) if caption is not None else None,
            progress=lambda done: status.update(f"{done} of {count} samples"), warn=_warn,
        )  # fmt: skip
    if as_json:
        out.print_json(data={"videos": made})
        return
    for url in made:
        err.print(storage.redact(url))


@app.command()
def decode(
    checkpoint: CodecUrl,
    latents: Annotated[str, typer.Argument(help="Latents that `moviola encode` wrote with the same weights.")],
    to: Annotated[str, typer.Argument(metavar="OUT.mp4", help="Where the mp4 goes.")],
    caption: Caption = None,
    text_encoder: Encoder = None,
    sets: ModelSets = None,
    runs: Runs = "./runs",
    as_json: Json = False,
) -> None:
    """Decode latents to a video."""
    from trainer import codec as codecs

    url = _checkpoint(checkpoint, runs)[0]
    codec = codecs.load(url, sets=sets or (), device=codecs.fastest(), warn=_warn)
    text = _text(codec, url, caption, text_encoder)
    _coded(lambda show: codecs.decode_file(codec, latents, to, show, caption_emb_1LD=text), to, as_json)


def _text(codec: Any, url: str, caption: str | None, encoder: str | None) -> Any:
    """The caption's embedding (1, L, D), None without one or of an empty one, which datasets count as none; raises
    InputError for a model that reads no text.
    """
    if caption is None or not caption.strip():
        return None
    if getattr(codec.recipe.config, "text", None) is None:
        raise InputError(f"--caption: this {codec.recipe.name} reads no text; leave it out", status=2)
    from pipelines.captions import TextEncoder
    from trainer import run as folder

    return TextEncoder(encoder or folder.text_encoder(url) or FLAN_T5)([caption])[0][None]


def _coded(work: Callable[[Callable[[int], None]], Any], to: str, as_json: bool) -> None:
    with err.status("…") as status:
        coded = work(lambda frames: status.update(f"frame {frames}"))
    if as_json:
        out.print_json(coded.json())
        return
    quality = f", {coded.psnr_db:.2f} dB PSNR" if coded.psnr_db is not None else ""
    err.print(f"{coded.frames} frames, {coded.numbers_per_frame:,.0f} latent numbers a frame{quality}: {to}")


@app.command()
def export(
    checkpoint: CheckpointUrl,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where config.json and model.safetensors go.")],
    runs: Runs = "./runs",
) -> None:
    """Write safetensors and config.json: all that `trainer.codec.load` needs."""
    from trainer import codec as codecs

    for url in codecs.export(codecs.load(_checkpoint(checkpoint, runs)[0], warn=_warn), folder):
        err.print(storage.redact(url))


@app.command()
def fingerprint(checkpoint: CheckpointUrl, runs: Runs = "./runs", as_json: Json = False) -> None:
    """One digest each for weights, EMA, optimizer, adversary, loader and RNG: equal states have equal fingerprints."""
    from trainer import checkpoint as checkpoints

    digests = checkpoints.fingerprint(_checkpoint(checkpoint, runs)[0], warn=_warn)
    if as_json:
        out.print_json(data=digests)
        return
    for part, digest in digests.items():
        out.print(f"{part:<10} {digest or '-'}")


@app.command()
def report(
    names: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Names or paths of runs; several are compared.", show_default=False),
    ],
    to: Annotated[
        str | None, typer.Option("-o", "--out", metavar="FILE.html", help="By default report.html of the first run.")
    ] = None,
    runs: Runs = "./runs",
) -> None:
    """One HTML page to send to a colleague: curves, time, quality, clips that play. It needs nothing but itself."""
    from cluster import report as reports

    urls = [_run(name, runs)[2] for name in names]
    to = to or storage.join(urls[0], "report.html")
    storage.write_bytes(to, reports.render(urls).encode())
    err.print(storage.redact(to))


@app.command()
def watch(run: RunName, runs: Runs = "./runs") -> None:
    """A live page of a run in the terminal, from its storage: progress, loss, quality, speed, goodput, events."""
    from cluster import watch as watching

    watching.watch(_run(run, runs)[2], Console(markup=False, width=None if out.is_terminal else out.width))


@app.command()
def pack(
    source: Annotated[str, typer.Argument(metavar="VIDEO_DIR_OR_LIST", help="Folder, list file or s3:// prefix.")],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="Where the dataset goes: a folder or s3://.")],
    rules: Annotated[str | None, typer.Option(help="Rules file (YAML), as in manifests/datasets/.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a rule, e.g. frames=49.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Cut videos and images to clips and write them as WebDataset shards with an index. Run again to go on."""
    from pipelines import pack as packing

    chosen = packing.load_rules(rules, sets or [])
    with _bar("packing videos") as move:

        def show(state: packing.Progress) -> None:
            move(state.done, state.videos, f"{state.clips} clips, {state.skipped} skipped")

        summary = packing.pack(source, dest, chosen, workers=workers, progress=show)
    if as_json:
        out.print_json(data=dataclasses.asdict(summary))
    else:
        out.print(summary.text(), markup=False)


@app.command()
def index(
    url: Annotated[str, typer.Argument(help="Folder or s3:// prefix with plain WebDataset tars.")],
    to: Annotated[str | None, typer.Option(help="Where the index goes; by default beside the shards.")] = None,
    name: Annotated[str | None, typer.Option(help="The dataset's name; by default the folder's.")] = None,
    as_json: Json = False,
) -> None:
    """Index an existing WebDataset as it is: nothing is rewritten."""
    from pipelines import index as indexing

    with _bar("indexing shards") as show:
        report = indexing.index_dataset(url, to, name=name, workers=os.cpu_count() or 1, progress=show)
    if as_json:
        out.print_json(data=dataclasses.asdict(report))
        return
    out.print(f"{report.clips} clips in {report.shards} shards, {report.kept} of them indexed before")
    for reason, count in report.skipped.items():
        out.print(f"skipped, {reason}: {count}")
    for line in report.named:
        out.print(f"  {line}", markup=False)


@app.command()
def captions(
    dataset: Annotated[str, typer.Argument(help="A packed or indexed dataset; its shards are written anew.")],
    text_encoder: Annotated[
        str | None, typer.Option(help="A T5 encoder, a folder or a hub name; by default the one that the card names.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Store T5 embeddings of a dataset's captions beside its clips, once. Run again to go on."""
    from pipelines.captions import embed_captions

    with _bar("embedding shards") as show:
        made = embed_captions(dataset, text_encoder, progress=show)
    if as_json:
        out.print_json(data=dataclasses.asdict(made))
        return
    silent = f"; {made.silent} have none" if made.silent else ""
    err.print(f"{made.clips} captions embedded by {made.encoder}, {made.width} numbers a token{silent}")


@contextlib.contextmanager
def _bar(doing: str) -> Iterator[Callable[..., None]]:
    """A bar on the terminal, elsewhere a line now and then, and the function that moves it: how many are done, of how
    many, and what else there is to say.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    said = time.monotonic()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task(doing, total=None)

        def move(done: int, total: int, text: str = "") -> None:
            nonlocal said
            progress.update(task, completed=done, total=total, description=text or doing)
            if not err.is_terminal and time.monotonic() - said >= LINE_SECONDS:
                said = time.monotonic()
                err.print(f"{doing}: {done} of {total}{text and ', '}{text}")

        yield move


@app.command()
def lint(
    target: Annotated[str, typer.Argument(metavar="DATASET_OR_MANIFEST", help="A dataset's URL or a manifest.")],
    every_clip: Annotated[bool, typer.Option("--all", help="Decode every clip, not a sample.")] = False,
    as_json: Json = False,
) -> None:
    """Everything that is wrong with a dataset, or with a manifest and the datasets that it names, at once."""
    from pipelines import lint as linting
    from trainer import manifest as manifests

    findings: list[str] = []
    urls, rules, status = [target], [], 1
    if target.endswith((".yaml", ".yml")):
        try:
            wanted = manifests.load(target)
        except InputError as error:
            findings, urls, status = str(error).splitlines(), manifests.named_datasets(target), error.status
        else:
            urls = [ref.dataset for ref in (*wanted.data.train, *wanted.data.images)]
            urls += [wanted.data.eval] if wanted.data.eval else []
            rules = [stage.clip for stage in wanted.schedule.stages]
    for url in urls:
        findings += [str(finding) for finding in linting.lint_dataset(url, rules=rules, every_clip=every_clip)]
    if as_json:
        out.print_json(data={"findings": findings})
    else:
        out.print("\n".join(findings) or f"{target}: nothing wrong", markup=False)
    if findings:
        raise typer.Exit(status)


def _checkpoint(name: str, runs: str) -> tuple[str, str]:
    """A checkpoint's URL and its run's, from a run's name, a run's URL, a checkpoint's, or a folder that holds one."""
    import re

    def exported() -> bool:
        return os.path.isfile(os.path.join(name, "config.json")) and not storage.exists(storage.join(runs, name))

    if "/" in name or name.startswith(".") or (name and exported()):
        return name, re.sub(r"/checkpoints/step-\d{8,}/?$", "", name.rstrip("/"))
    run_url = _run(name, runs)[2]
    return run_url, run_url


def _required(value: Any) -> Any:
    assert value is not None
    return value


def _warn(text: str) -> None:
    err.print(f"warning: {text}", style="yellow")


def guarded(command: Callable[[], Any]) -> int:
    """Runs a command to its exit status; a fault of input ends in its message alone, a fault of ours in a traceback.

    SIGTERM ends it as Ctrl-C does: files half written and processes of its own do not stay behind. A Remark is shown as
    a warning of the command's.
    """
    before, show = signal.signal(signal.SIGTERM, signal.default_int_handler), warnings.showwarning

    def remark(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, Remark):
            _warn(str(message))
        else:
            show(message, category, *where)

    warnings.showwarning = remark
    try:
        return command() or 0
    except InputError as error:
        err.print(f"moviola: {storage.redact(str(error))}", style="red")
        return error.status
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != INTERRUPTED:
            raise
        err.print("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (*UNWRITABLE, *UNUSABLE):
            raise
        message = storage.redact(f"{error.filename or 'storage'}: {os.strerror(error.errno).lower()}")
        remedy = "make room, or name a folder that can be written" if error.errno in UNWRITABLE else "name another path"
        err.print(f"moviola: {message}; {remedy}", style="red")
        return 1
    finally:
        warnings.showwarning = show
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def main() -> None:
    """The entry point of the command."""
    sys.exit(guarded(lambda: app()))


if __name__ == "__main__":
    main()
