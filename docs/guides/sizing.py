"""Writes the tables of sizing.md, from the layouts of records and the simulator's count of traffic.

    python docs/guides/sizing.py

writes them anew; tests/project/test_docs.py fails where the page says something else.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from ritornello.experiments.speed.draw_statistics import Traffic, TrafficCount, draw_blocks
from ritornello.experiments.speed.step_time import A100, RoundLoad, predict
from ritornello.policies.sampling import UniformSampling
from ritornello.records.layout import Layout
from ritornello.records.shard import rows_of_rank, rows_per_rank

PAGE = Path(__file__).with_name("sizing.md")

LABEL = torch.zeros(1, dtype=torch.int64)

SAMPLES = {
    "28 x 28 uint8": (torch.zeros(1, 1, 28, 28, dtype=torch.uint8), LABEL),
    "28 x 28 float32": (torch.zeros(1, 1, 28, 28), LABEL),
    "32 x 32 x 3 uint8": (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), LABEL),
    "32 x 32 x 3 uint8, 10 logits": (
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        LABEL,
        torch.zeros(1, 10),
    ),
    "224 x 224 x 3 uint8": (torch.zeros(1, 3, 224, 224, dtype=torch.uint8), LABEL),
    "224 x 224 x 3 float32": (torch.zeros(1, 3, 224, 224), LABEL),
    "512 tokens, int32": (torch.zeros(1, 512, dtype=torch.int32), LABEL),
    "512 tokens, int64": (torch.zeros(1, 512, dtype=torch.int64), LABEL),
    "512 tokens and a mask, int64": (
        torch.zeros(1, 512, dtype=torch.int64),
        torch.zeros(1, 512, dtype=torch.int64),
        LABEL,
    ),
}
CAPACITIES = (10_000, 50_000, 100_000, 1_000_000)
PER_RANK = (8, 64)
REPRESENTATIVES = (7, 16, 64)
TRAFFIC_SAMPLES = (
    "32 x 32 x 3 uint8",
    "224 x 224 x 3 uint8",
    "224 x 224 x 3 float32",
    "512 tokens, int32",
)
RANKS_PER_HOST = 8
STEPS_MS = (20, 100, 500)
HOSTS = (1, 2, 4, 16)
TIMED_HOSTS = 4
GIGABITS = (10, 25, 100, 200)


def record_bytes(name: str) -> int:
    """Of one representative."""
    return Layout.of(SAMPLES[name]).record_bytes


def size(num_bytes: float) -> str:
    """A number of bytes to three figures."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= one:
            digits = 2 - int(np.log10(num_bytes / one))
            return f"{num_bytes / one:.{max(0, digits)}f} {unit}"
    return f"{num_bytes:.0f} B"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Rows of Markdown; all columns but the first to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(each)} |" for each in (header, rule, *rows))


def memory() -> str:
    """Of the shards, by sample and capacity; of the largest capacity also on each rank."""
    largest = CAPACITIES[-1]
    header = ["sample, with an int64 label", "record"]
    header += [f"{each:,}" for each in CAPACITIES]
    header += [f"of it on each of {each} ranks" for each in PER_RANK]
    rows = []
    for name in SAMPLES:
        one = record_bytes(name)
        sizes = [each * one for each in CAPACITIES]
        sizes += [rows_of_rank(largest, 0, num_ranks) * one for num_ranks in PER_RANK]
        rows.append([name, f"{one:,} B", *map(size, sizes)])
    return table(header, rows)


def traffic() -> str:
    """What a rank gets in a step, and what that is in a second on a host."""
    header = ["sample", "`r`", "per rank and step"]
    header += [f"{RANKS_PER_HOST} ranks, step of {each} ms" for each in STEPS_MS]
    rows = []
    for name in TRAFFIC_SAMPLES:
        for r in REPRESENTATIVES:
            drawn = r * record_bytes(name)
            rates = [RANKS_PER_HOST * drawn / (each / 1000) for each in STEPS_MS]
            rows.append([name, str(r), size(drawn), *(f"{size(each)}/s" for each in rates)])
    return table(header, rows)


@cache
def drawn_over(num_hosts: int, r: int) -> Traffic:
    """What simulated draws move."""
    sizes = rows_per_rank(100_000, num_hosts * RANKS_PER_HOST)
    count = TrafficCount(sizes, RANKS_PER_HOST)
    for block in draw_blocks(sizes, r, UniformSampling(), seed=0, steps=range(200)):
        count.add(block)
    return count.result()


def network() -> str:
    """The part of what is drawn that crosses the network."""
    parts = [drawn_over(each, 16).network_records / 16 for each in HOSTS]
    shown = [f"{100 * each:.0f} %" for each in parts]
    return table(["hosts", *map(str, HOSTS)], [["of other hosts", *shown]])


def time() -> str:
    """A round's copies and messages, by the simulator's model, in milliseconds."""
    rows = []
    for name in TRAFFIC_SAMPLES:
        for r in REPRESENTATIVES:
            traffic = drawn_over(TIMED_HOSTS, r)
            load = RoundLoad(
                num_ranks=TIMED_HOSTS * RANKS_PER_HOST,
                admit_seconds=0.0,
                plan_seconds=0.0,
                busiest_rank_served=traffic.busiest_rank_served,
                busiest_rank_messages=traffic.busiest_rank_messages,
                busiest_node_records=traffic.busiest_node_records,
            )
            took = []
            for gigabits in GIGABITS:
                step = predict(
                    replace(
                        A100,
                        ranks_per_node=RANKS_PER_HOST,
                        network_bytes_per_second=gigabits * 1e9 / 8,
                    ),
                    load,
                    batch_size=8 * r,
                    num_representatives=r,
                    num_candidates=2 * r,
                    record_bytes=record_bytes(name),
                    growth=1.0,
                )
                took.append(f"{1000 * step.round_seconds:.1f}")
            rows.append([name, str(r), *took])
    return table(["sample", "`r`", *(f"{each} Gbit/s" for each in GIGABITS)], rows)


def page_with_tables(text: str) -> str:
    """The page with its tables as they should be."""
    for name, made in (
        ("memory", memory()),
        ("traffic", traffic()),
        ("network", network()),
        ("time", time()),
    ):
        pattern = rf"(<!-- {name}: [^>]*-->\n\n).*?(?=\n\n)"
        assert re.search(pattern, text, re.DOTALL), name
        text = re.sub(pattern, lambda found, made=made: found[1] + made, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text()))
