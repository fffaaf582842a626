"""What samples of unequal length cost: memory against their data, and time against fixed records.

::

    python benchmarks/ragged.py                 # one rank
    python benchmarks/ragged.py --ranks 2       # two, in shared memory
    python benchmarks/ragged.py --pages         # by the size of pages

Bags of 371 to 6,275 rows, as slides cut into patches give, in a buffer that holds as many as fit:
with room for 64 of the mean size some 62 (what is at the edge does not fit as a whole), give or
take 4 by chance. A second buffer in the same process holds 64 fixed records of the mean size, and
the two take turns, so that they meet the same weather; how many bytes the one draws for each byte
of the other is shown, too. Times are medians of a round, worker's side: once with all of its
stages, and once without the planning. They are means over some such pairs of buffers, as it is
chance how large those bags are that a buffer holds.

The ranks begin each round together: else what is measured is how long one waits for another, whose
trainer had larger bags to prepare. (Where lengths differ each round waits for the last rank to
begin, as sizes may change in any. Nobody waits for that round but the next step.)
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from ritornello import RehearsalBuffer
from ritornello.records import pages
from ritornello.records.paging import Records
from ritornello.testing import spawn_ranks

LEAST, MOST = 371, 6275

MEAN = 2600
"""Rows: so most bags are short, and padding takes 2.4 times the data."""

STAGES = ("admit", "plan", "exchange", "stage")

PLANNING = STAGES.index("plan")


def lengths(num: int, generator: np.random.Generator) -> np.ndarray:
    """Of bags: skewed, from the least to the most."""
    skew = (MOST - MEAN) / (MEAN - LEAST)
    drawn: np.ndarray = LEAST + (MOST - LEAST) * generator.beta(1.0, skew, num)
    return drawn.astype(np.int64)


def measure(
    rank: int, args: argparse.Namespace, page_bytes: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Plays both buffers in turns."""
    generator = np.random.default_rng((seed, rank))
    data_bytes = args.bags * MEAN * args.columns * 4
    if page_bytes is not None:
        pages.LEAST_PAGE_BYTES = pages.MOST_PAGE_BYTES = page_bytes
    arguments: dict[str, Any] = {
        "num_representatives": args.representatives,
        "selection": "reservoir",
        "label": None,
        "asynchronous": False,
        "seed": seed,
    }
    ragged = RehearsalBuffer(args.bags * 2, capacity_bytes=data_bytes, **arguments)
    fixed = RehearsalBuffer(args.bags, **arguments)
    seconds: dict[str, list[list[float]]] = {"ragged": [], "fixed": []}
    num_bytes = dict.fromkeys(seconds, 0)
    with ragged, fixed:
        for buffer in (ragged, fixed):
            begin_together(buffer)
        for step in range(args.steps):
            bags = [
                torch.full((n, args.columns), float(step))
                for n in lengths(args.batch, generator).tolist()
            ]
            whole = torch.full((args.batch, MEAN * args.columns), float(step))
            for name, buffer, batch in (("ragged", ragged, bags), ("fixed", fixed, whole)):
                before = buffer.stats(per_class=False).seconds_per_stage
                augmented = buffer.update(batch)
                num_bytes[name] += sum(each.nbytes for each in augmented[args.batch :])
                after = buffer.stats(per_class=False).seconds_per_stage
                seconds[name].append([after[stage] - before[stage] for stage in STAGES])
        held = [len(each) for batch in ragged.representatives(8) for each in batch]
        stats = ragged.stats(per_class=False)
        data = sum(held) * args.columns * 4
    half = args.steps // 2
    late = {name: np.array(each[half:]) for name, each in seconds.items()}
    whole_ms = {name: 1e3 * float(np.median(each.sum(1))) for name, each in late.items()}
    moving_ms = {
        name: 1e3 * float(np.median(each.sum(1) - each[:, PLANNING])) for name, each in late.items()
    }
    layout = ragged._steps.begun.layout  # type: ignore[union-attr]
    return {
        "ranks": args.ranks,
        "page_bytes": layout.paging.page_bytes,  # type: ignore[union-attr]
        "held": len(held),
        "used": stats.used_bytes / data,
        "bound": stats.shard_bytes / data,
        "padding": len(held) * MOST * args.columns * 4 / data,
        "ragged_ms": whole_ms["ragged"],
        "fixed_ms": whole_ms["fixed"],
        "ratio": whole_ms["ragged"] / whole_ms["fixed"],
        "moving_ratio": moving_ms["ragged"] / moving_ms["fixed"],
        "drawn": num_bytes["ragged"] / num_bytes["fixed"],
    }


def begin_together(buffer: RehearsalBuffer) -> None:
    """Lets each round of a buffer begin when all ranks have come to it."""
    steps = buffer._steps
    run, transport = steps._run, steps.rounds.transport

    def run_together(candidates: Records) -> int:
        transport.all_gather(np.zeros(1, dtype=np.int64))
        return run(candidates)

    steps._run = run_together


def report(found: dict[str, Any]) -> None:
    """One line."""
    print(
        f"{found['ranks']:.0f} rank(s), pages of {found['page_bytes']:,.0f} bytes, "
        f"{found['held']:.0f} bags "
        f"held: in use {found['used']:.3f} times the data, all memory {found['bound']:.3f} times "
        f"(padding: {found['padding']:.2f}); a round {found['ragged_ms']:.2f} ms, of fixed records "
        f"{found['fixed_ms']:.2f} ms: {found['ratio']:.2f} times (without planning: "
        f"{found['moving_ratio']:.2f}), with {found['drawn']:.2f} times the bytes",
        flush=True,
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--bags", type=int, default=64, help="of mean size that fit")
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--representatives", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=8, help="of buffers, one after the other")
    parser.add_argument("--pages", action="store_true", help="try several sizes of pages")
    args = parser.parse_args()
    sizes = [256, 1024, 4096, 16_384, 65_536] if args.pages else [None]
    for page_bytes in sizes:
        if args.ranks == 1:
            report(measure_pairs(0, args, page_bytes))
        else:
            report(spawn_ranks(args.ranks, measure_pairs, args, page_bytes, seconds=600)[0])


def measure_pairs(rank: int, args: argparse.Namespace, page_bytes: int | None) -> dict[str, Any]:
    """The means of ``measure`` over some pairs of buffers."""
    torch.set_num_threads(1)
    found = [measure(rank, args, page_bytes, seed) for seed in range(args.pairs)]
    return {key: float(np.mean([each[key] for each in found])) for key in found[0]}


if __name__ == "__main__":
    main()
