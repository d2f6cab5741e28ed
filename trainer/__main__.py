"""``torchrun -m trainer MANIFEST``: the same loop without Ray, for profiling, tests and a bare GPU box.

Under torchrun every process joins one group; alone it is a group of one. The run is resumed where its name is taken by
the same manifest. Exit status: 0 done, 1 failed, 2 wrong manifest, 75 stopped with a committed checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from pipelines.faults import InputError
from trainer import loop, manifest, run
from trainer.heartbeat import PeerLost
from trainer.signals import Signals


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, joins the group, trains."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("manifest", help="path or URL of a manifest")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets")
    parser.add_argument("--name", help="name of the run, in place of the manifest's")
    parser.add_argument("--runs", default=os.environ.get("MOVIOLA_RUNS", "./runs"), help="where runs are kept")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        wanted = manifest.load(options.manifest, options.sets, name=options.name)
        if "RANK" in os.environ:
            patience = timedelta(seconds=wanted.failure.hang_seconds)
            store, rank, size = next(dist.rendezvous("env://", timeout=patience))
            # torchrun keeps its store when it restarts a group: the addresses of the dead are still in it.
            store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            backend = "nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        world = loop.World.current(device)
        claimed, run_url = run.claim_together(wanted, options.runs, world.rank)

        def connect(signals: Signals) -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: signals.stop())

        outcome = loop.train(claimed, run_url, world, on_start=connect)
    except InputError as error:
        print(f"moviola: {error}", file=sys.stderr)
        return error.status
    except PeerLost as error:
        print(f"moviola: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0 if outcome == "done" else 75


if __name__ == "__main__":
    sys.exit(main())
