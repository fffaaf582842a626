"""Hosts far apart: what rehearsal adds to a step, and how soon a cut link is an error.

    PYTHONPATH=tests/transports python benchmarks/hosts.py

Three virtual hosts on this Linux machine, one rank on each; tests/transports/virtual_hosts.py makes
them. Latency is a packet's, one way: a round trip takes twice as long. Bandwidth is that of what a
host sends. A step is a sleep in place of computation, then an all-reduce of 400 kB of gradients.
Samples have 12 kB, b = 32, r = 7. Steps with and without rehearsal take turns; shown are medians
over the steps of all ranks. A round alone is timed without a step beside it. Takes about ten
minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from virtual_hosts import VirtualHost, torchrun, virtual_hosts

from ritornello import PeerLostError, RehearsalBuffer

NUM_HOSTS = 3
BATCH = (torch.zeros(32, 3, 64, 64, dtype=torch.uint8), torch.arange(32) % 10)
CAPACITY = 900
NUM_REPRESENTATIVES = 7
NETWORKS = ((0.0, None), (0.0, 100e6), (0.02, None), (0.02, 100e6))
SECONDS_OF_COMPUTING = (0.05, 0.1)
SAMPLINGS = ("uniform", "class-balanced")
NUM_BLOCKS, STEPS_PER_BLOCK = 4, 15


def make_buffer(timeout_seconds: float = 60.0, **options: Any) -> RehearsalBuffer:
    """A buffer with the benchmark's sizes."""
    return RehearsalBuffer(
        CAPACITY,
        num_representatives=NUM_REPRESENTATIVES,
        timeout_seconds=timeout_seconds,
        **options,
    )


def steps(seconds_of_computing: float) -> dict[str, float]:
    """Milliseconds of a step with and without rehearsal, and how long ``update`` held it up."""
    gradients = torch.zeros(100_000)
    with_rehearsal, without, updates = [], [], []
    with make_buffer() as buffer:
        while len(buffer) < CAPACITY:
            buffer.update(BATCH)
        for _ in range(NUM_BLOCKS):
            for rehearses in (True, False):
                for step in range(STEPS_PER_BLOCK):
                    began = time.perf_counter()
                    if rehearses:
                        buffer.update(BATCH)
                    updated = time.perf_counter()
                    time.sleep(seconds_of_computing)
                    dist.all_reduce(gradients)
                    seconds = time.perf_counter() - began
                    if step == 0:  # its round had all the time of the block before
                        continue
                    if rehearses:
                        with_rehearsal.append(seconds)
                        updates.append(updated - began)
                    else:
                        without.append(seconds)
    columns = {"without": without, "with": with_rehearsal, "update": updates}
    return {name: 1e3 * float(np.median(column)) for name, column in columns.items()}


def rounds(sampling: str) -> dict[str, float]:
    """Milliseconds of a round, while the buffer is filling and when it is full."""
    filling, full = [], []
    with make_buffer(sampling=sampling, asynchronous=False) as buffer:
        while len(full) < 30:
            column = full if len(buffer) == CAPACITY else filling
            dist.barrier()
            began = time.perf_counter()
            buffer.update(BATCH)
            column.append(time.perf_counter() - began)
    return {"filling": 1e3 * float(np.median(filling[1:])), "full": 1e3 * float(np.median(full))}


def until_cut(folder: Path, timeout_seconds: float) -> None:
    """Trains until the error, and notes when it came and which ranks it named."""
    rank = dist.get_rank()
    try:
        with make_buffer(timeout_seconds) as buffer:
            while True:
                buffer.update(BATCH)
                time.sleep(0.02)
                (folder / f"trains-{rank}").touch()
    except PeerLostError as error:
        outcome = {"at": time.monotonic(), "peers": error.peers}
        (folder / f"{rank}.json").write_text(json.dumps(outcome))
        raise  # after a good end, torchrun would wait for the host that is out of reach


def be_a_rank(folder: Path, what: str, timeout_seconds: float) -> None:
    """What torchrun starts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60.0))
    if what == "cut":
        until_cut(folder, timeout_seconds)
    outcome = {
        "steps": [steps(seconds) for seconds in SECONDS_OF_COMPUTING],
        "rounds": [rounds(sampling) for sampling in SAMPLINGS],
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


def start(
    hosts: Sequence[VirtualHost], folder: str, *arguments: object
) -> list[subprocess.Popen[str]]:
    """Starts this file on one rank of each host."""
    return torchrun(hosts, [1] * len(hosts), __file__, "--folder", folder, *arguments)


def finish(jobs: Sequence[subprocess.Popen[str]], folder: str) -> list[Any]:
    """What the ranks found."""
    output = [job.communicate(timeout=300)[0] for job in jobs]
    files = [Path(folder) / f"{rank}.json" for rank in range(len(jobs))]
    if not all(file.exists() for file in files):
        sys.exit("\n".join(output))
    return [json.loads(file.read_text()) for file in files]


def measure(latency_seconds: float, bits_per_second: float | None) -> Any:
    """All about one network: each figure the median over the ranks."""
    with (
        virtual_hosts(NUM_HOSTS, latency_seconds, bits_per_second) as hosts,
        tempfile.TemporaryDirectory() as folder,
    ):
        everyone = finish(start(hosts, folder, "--rank", "measure"), folder)
    return {
        part: [
            {name: float(np.median([each[part][i][name] for each in everyone])) for name in row}
            for i, row in enumerate(everyone[0][part])
        ]
        for part in everyone[0]
    }


def cut(timeout_seconds: float, silently: bool) -> list[tuple[float, list[int]]]:
    """For each rank: seconds from the cut of the last host to its error, and whom it named."""
    with virtual_hosts(NUM_HOSTS) as hosts, tempfile.TemporaryDirectory() as folder:
        jobs = start(hosts, folder, "--rank", "cut", "--timeout-seconds", timeout_seconds)
        while len(list(Path(folder).glob("trains-*"))) < NUM_HOSTS:
            time.sleep(0.1)
        time.sleep(2.0)
        cut_at = time.monotonic()
        if silently:
            hosts[-1].is_cut = True
        else:
            hosts[-1].set_link("down")
        everyone = finish(jobs, folder)
    return [(each["at"] - cut_at, each["peers"]) for each in everyone]


def main() -> None:
    """Measures and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", choices=("measure", "cut"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--timeout-seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        be_a_rank(options.folder, options.rank, options.timeout_seconds)
        return
    measured = [measure(*network) for network in NETWORKS]
    print("latency  Mbit/s  computing   step without   with   of it update   (ms)")
    for (latency, bandwidth), found in zip(NETWORKS, measured, strict=True):
        speed = f"{bandwidth / 1e6:.0f}" if bandwidth else "-"
        for computing, row in zip(SECONDS_OF_COMPUTING, found["steps"], strict=True):
            print(
                f"{1e3 * latency:7.0f}{speed:>8}{1e3 * computing:11.0f}{row['without']:15.1f}"
                f"{row['with']:7.1f}{row['update']:15.2f}"
            )
    print("\nlatency  Mbit/s  sampling         round while filling   full   (ms)")
    for (latency, bandwidth), found in zip(NETWORKS, measured, strict=True):
        speed = f"{bandwidth / 1e6:.0f}" if bandwidth else "-"
        for sampling, row in zip(SAMPLINGS, found["rounds"], strict=True):
            print(
                f"{1e3 * latency:7.0f}{speed:>8}  {sampling:15}{row['filling']:21.1f}"
                f"{row['full']:7.1f}"
            )
    print("\ntimeout_seconds  cut         seconds until the error, and whom it names, on each rank")
    for timeout_seconds in (3.0, 10.0):
        for silently in (True, False):
            errors = "   ".join(f"{s:.2f} {peers}" for s, peers in cut(timeout_seconds, silently))
            print(f"{timeout_seconds:15.0f}  {'silent' if silently else 'link down':9}   {errors}")


if __name__ == "__main__":
    main()
