"""What samples of unequal length cost: memory against their data, and time against fixed records.

::

    python benchmarks/ragged.py                 # one rank
    python benchmarks/ragged.py --ranks 2       # two, in shared memory
    python benchmarks/ragged.py --pages         # by the size of pages

Bags of 371 to 6,275 rows, as slides cut into patches give, in a buffer that holds as many as fit:
with room for 64 of the mean size some 62 (what is at the edge does not fit as a whole), give or
take 4 by chance. A second buffer in the same process holds 64 fixed records of the mean size, and
the two take turns, so that they meet the same weather. Times are medians of a round, worker's side:
once with all of its stages, and once without the planning. For fixed records 16 rounds are planned
at once; where lengths differ sizes may change in any round, so that each is planned by itself.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from ritornello import RehearsalBuffer
from ritornello.records import pages
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


def measure(rank: int, args: argparse.Namespace, page_bytes: int | None = None) -> dict[str, Any]:
    """Plays both buffers in turns."""
    generator = np.random.default_rng(rank)
    data_bytes = args.bags * MEAN * args.columns * 4
    if page_bytes is not None:
        pages.LEAST_PAGE_BYTES = pages.MOST_PAGE_BYTES = page_bytes
    arguments: dict[str, Any] = {
        "num_representatives": args.representatives,
        "selection": "reservoir",
        "label": None,
        "asynchronous": False,
    }
    ragged = RehearsalBuffer(args.bags * 2, capacity_bytes=data_bytes, **arguments)
    fixed = RehearsalBuffer(args.bags, **arguments)
    seconds: dict[str, list[list[float]]] = {"ragged": [], "fixed": []}
    with ragged, fixed:
        for step in range(args.steps):
            bags = [
                torch.full((n, args.columns), float(step))
                for n in lengths(args.batch, generator).tolist()
            ]
            whole = torch.full((args.batch, MEAN * args.columns), float(step))
            for name, buffer, batch in (("ragged", ragged, bags), ("fixed", fixed, whole)):
                before = buffer.stats(per_class=False).seconds_per_stage
                buffer.update(batch)
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
    }


def report(found: dict[str, Any]) -> None:
    """One line."""
    print(
        f"{found['ranks']} rank(s), pages of {found['page_bytes']:,} bytes, {found['held']} bags "
        f"held: in use {found['used']:.3f} times the data, all memory {found['bound']:.3f} times "
        f"(padding: {found['padding']:.2f}); a round {found['ragged_ms']:.2f} ms, of fixed records "
        f"{found['fixed_ms']:.2f} ms: {found['ratio']:.2f} times (without planning: "
        f"{found['moving_ratio']:.2f})",
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
    parser.add_argument("--pages", action="store_true", help="try several sizes of pages")
    args = parser.parse_args()
    sizes = [256, 1024, 4096, 16_384, 65_536] if args.pages else [None]
    for page_bytes in sizes:
        if args.ranks == 1:
            report(measure(0, args, page_bytes))
        else:
            report(spawn_ranks(args.ranks, _on_rank, args, page_bytes, seconds=300)[0])


def _on_rank(rank: int, args: argparse.Namespace, page_bytes: int | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    return measure(rank, args, page_bytes)


if __name__ == "__main__":
    main()
