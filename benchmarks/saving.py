"""Saving and loading one large shard, against ``dd`` on the same disk in the same run.

    python benchmarks/saving.py --gigabytes 2 --folder /tmp/saving

Prints GB/s (10**9 bytes) of ``save``, of a save in the background between rounds, and of ``load``,
beside ``dd`` writing and reading as many bytes, and the most memory that each took above the
shard. Files are dropped from the page cache before they are read, where the system allows it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ritornello import RehearsalBuffer

IMAGE = (3, 224, 224)
BATCH_SIZE = 64


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), int(arguments.gigabytes * 1e9), arguments.repeats)


def measure(folder: Path, num_bytes: int, repeats: int) -> None:
    """Prints a table for each of some repeats."""
    record_bytes = 3 * 224 * 224 + 16
    capacity = num_bytes // record_bytes
    images = torch.randint(0, 255, (BATCH_SIZE, *IMAGE), dtype=torch.uint8)
    labels = torch.arange(BATCH_SIZE)
    buffer = make(capacity)
    while len(buffer) < capacity:
        buffer.update((images, labels))
    size = buffer.stats().shard_bytes
    print(f"one shard: {capacity} images of 3 x 224 x 224, {size / 1e9:.2f} GB")
    for number in range(repeats):
        print(f"run {number + 1} of {repeats}")
        report("dd, write and fdatasync", size, lambda: dd_write(folder / "dd", size))
        report("save", size, lambda: buffer.save(folder / "saved"))
        report("save in the background", size, lambda: save_between_rounds(buffer, folder, images))
        for path in (folder / "dd", *(folder / "saved").glob("*.safetensors")):
            drop_from_cache(path)
        report("dd, read", size, lambda: dd_read(folder / "dd"))
        report("load", size, lambda: load(capacity, folder), itself=size)
        report("dd, read from the cache", size, lambda: dd_read(folder / "dd"))
        report("load from the cache", size, lambda: load(capacity, folder), itself=size)
        shutil.rmtree(folder / "saved")
        shutil.rmtree(folder / "background")
    buffer.close()


def make(capacity: int) -> RehearsalBuffer:
    """An empty buffer."""
    return RehearsalBuffer(capacity, num_representatives=7, num_candidates=14)


def load(capacity: int, folder: Path) -> None:
    """Loads into a new buffer, whose memory has to be made first."""
    with make(capacity) as buffer:
        buffer.load(folder / "saved")


def save_between_rounds(buffer: RehearsalBuffer, folder: Path, images: torch.Tensor) -> None:
    """Saves while rounds go on, one every 50 ms."""
    buffer.save(folder / "background", background=True)
    waited = buffer.stats().seconds_waited
    num_rounds = 0
    labels = torch.arange(BATCH_SIZE)
    while not (folder / "background" / "manifest.json").exists():
        buffer.update((images, labels))
        time.sleep(0.05)
        num_rounds += 1
    waited = buffer.stats().seconds_waited - waited
    buffer.wait_until_saved()
    print(
        f"    {num_rounds} rounds meanwhile; update waited {1e3 * waited / num_rounds:.1f} ms each"
    )


def dd_write(path: Path, num_bytes: int) -> None:
    """As many bytes, down to the disk."""
    path.unlink(missing_ok=True)
    dd("if=/dev/zero", f"of={path}", f"count={-(-num_bytes // 2**22)}", "conv=fdatasync")


def dd_read(path: Path) -> None:
    """All bytes of a file."""
    dd(f"if={path}", "of=/dev/null")


def dd(*arguments: str) -> None:
    """Runs ``dd``."""
    subprocess.run(["dd", "bs=4M", *arguments], check=True, capture_output=True)


def drop_from_cache(path: Path) -> None:
    """So that it is read from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(what: str, num_bytes: int, act: Callable[[], object], itself: int = 0) -> None:
    """Prints the speed, and the most memory taken meanwhile, without the shard ``itself``."""
    before, most, done = memory_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], memory_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.perf_counter()
    act()
    seconds = time.perf_counter() - began
    done.set()
    watching.join()
    above = max(0, most[0] - before - itself) / 1e6
    print(
        f"  {what:26} {num_bytes / seconds / 1e9:6.2f} GB/s {seconds:7.2f} s {above:8.0f} MB more"
    )


def memory_bytes() -> int:
    """This process's memory, shared memory included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
