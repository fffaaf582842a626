"""Takes out one wait, event or record_stream of the device path at a time: does a test notice?

    python benchmarks/mutants.py             # all of them: some minutes
    python benchmarks/mutants.py begin_turn  # those whose name holds this

Each mutant is a copy of the sources with one line less, and the tests of the device path run on it,
on the simulated accelerator, until one fails. Ends with 1 if one was noticed by no test: then the
line is not needed, or lacks a test. A line that is no longer found ends it with 2.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[1]
SCHEDULES = "lazy or random-1 or given_away or one_stream"
TEST_SECONDS = 1200.0


@dataclass(frozen=True)
class Mutant:
    """One place of the sources, and what stands there in its stead."""

    name: str
    file: str
    line: str
    instead: str = "pass"
    tests: str = "accelerator/test_streams.py"
    """That run on it."""


STAGING, PREFETCH = "rounds/staging.py", "loaders/prefetch.py"

MUTANTS = (
    Mutant(
        "begin_turn: the trainer's stream does not wait",
        STAGING,
        "accelerators.current_stream(self.trainer_device).wait_event(self._turn_end)",
    ),
    Mutant(
        "begin_turn: a trainer on the CPU does not wait",
        STAGING,
        "self._turn_end.synchronize()",
        tests="accelerator/test_same_as_on_the_cpu.py",
    ),
    Mutant("begin_turn: no record_stream", STAGING, "rows.record_stream(stream)"),
    Mutant(
        "collect: begins no turn",
        STAGING,
        """            self._begin_turn()
        if num_rows > len""",
        """            pass
        if num_rows > len""",
    ),
    Mutant(
        "collect: ends no turn",
        STAGING,
        """        self._num_collected = num_rows
        if self._stream is not None:
            self._end_turn()""",
        "        self._num_collected = num_rows",
    ),
    Mutant(
        "take: begins no turn",
        STAGING,
        """            self._begin_turn()
        return self._delivered""",
        """            pass
        return self._delivered""",
    ),
    Mutant(
        "release: ends no turn",
        STAGING,
        '''        """Says that all use of the views from ``take`` has been issued."""
        if self._stream is not None:
            self._end_turn()''',
        '''        """Says that all use of the views from ``take`` has been issued."""''',
    ),
    Mutant("copy_for_trainer: no wait for its memory", STAGING, "self._stream.wait_event(ready)"),
    Mutant(
        "copy_for_trainer: nobody waits for the copy",
        STAGING,
        """            copied.copy_(rows)
            self._stream.synchronize()""",
        "            copied.copy_(rows, non_blocking=True)",
    ),
    Mutant(
        "staged: does not wait",
        STAGING,
        "self._await_turn_end()  # `rehearse` may be at its turn on another stream: both only read",
    ),
    Mutant(
        "put_back: begins no turn",
        STAGING,
        """            self._begin_turn()
        self._delivered""",
        """            pass
        self._delivered""",
    ),
    Mutant(
        "put_back: ends no turn",
        STAGING,
        """staged.to(self.trainer_device)
        if self._stream is not None:
            self._end_turn()""",
        "staged.to(self.trainer_device)",
    ),
    Mutant(
        "worker_stream: the caller's stream",
        STAGING,
        "return accelerators.on_streams(self._streams)",
        "return accelerators.on_streams(())",
    ),
    Mutant(
        "worker_stream: none for the shard's device",
        STAGING,
        "return accelerators.on_streams(self._streams)",
        "return accelerators.on_streams(self._streams[:1])",
        tests="accelerator/test_several_devices.py",
    ),
    Mutant(
        "streams: new ones with new staging memory",
        "rounds/steps.py",
        "self._storage, self._worker_streams",
        "self._storage, {}",
    ),
    Mutant(
        "arrive: does not wait for the trainer", STAGING, "self._stream.wait_event(self._turn_end)"
    ),
    Mutant(
        "arrive: nobody waits for the copy",
        STAGING,
        "self._stream.synchronize()  # also with what was received last, and is overwritten now",
    ),
    Mutant(
        "deliver: ends no turn",
        STAGING,
        """        if self._stream is not None:
            self._turn_end = self._stream.record_event()

    # Turns""",
        "    # Turns",
    ),
    Mutant(
        "deliver: what was put in order is not waited for",
        STAGING,
        "self._stream is not None and order is None",
        "self._stream is not None",
    ),
    Mutant(
        "copied_to: from memory that is given away at once",
        "records/accelerators.py",
        "values.pin_memory().to(device, non_blocking=True)",
        "values.to(device, non_blocking=True)",
        tests="records/test_accelerators.py",
    ),
    Mutant(
        "overwrite: writes on the caller's stream",
        "saving/restoring.py",
        """        with rounds.staging.worker_stream():
            if rounds.paged is not None:
                rounds.paged.clear()""",
        """        if True:
            if rounds.paged is not None:
                rounds.paged.clear()""",
    ),
    Mutant(
        "make_shard: zeroed on the caller's stream",
        "saving/restoring.py",
        "with rounds.staging.worker_stream():  # whose rounds write it, once it is zeroed",
        "if True:",
    ),
    Mutant(
        "rehearse: does not wait for the trainer",
        PREFETCH,
        "stream.wait_stream(accelerators.current_stream(stream.device))",
    ),
    Mutant(
        "rehearse: not on the trainer's stream where it has none of its own",
        PREFETCH,
        "partial(prepare, batches, _stream_of_the_trainer(steps))",
        "partial(prepare, batches, None)",
    ),
    Mutant(
        "rehearse: the trainer does not wait for what was prepared in vain",
        PREFETCH,
        "accelerators.current_stream(stream.device).wait_stream(stream)",
    ),
    Mutant(
        "rehearse: the loader may let go what was not read yet",
        PREFETCH,
        "leaf.record_stream(accelerators.current_stream(leaf.device))\n    return",
        "pass\n    return",
    ),
    Mutant(
        "hand over: the trainer does not wait",
        PREFETCH,
        "accelerators.current_stream(device).wait_event(ready)",
    ),
    Mutant(
        "hand over: no record_stream",
        PREFETCH,
        "            leaf.record_stream(accelerators.current_stream(leaf.device))\n",
        "            pass\n",
    ),
    Mutant(
        "local transport: the receiver does not wait",
        "transports/local.py",
        "stream.wait_event(ready)",
    ),
    Mutant(
        "local transport: the sender may let go what was not read yet",
        "transports/local.py",
        "payload.record_stream(stream)  # the sender may let it go before it was read",
    ),
)


def is_noticed(mutant: Mutant) -> tuple[bool, str]:
    """Whether a test fails on it, and which."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "ritornello"
        shutil.copytree(CHECKOUT / "src" / "ritornello", sources)
        path = sources / mutant.file
        text = path.read_text()
        if text.count(mutant.line) != 1:
            raise LookupError(f"{mutant.name}: {mutant.file} does not hold its line just once")
        path.write_text(text.replace(mutant.line, mutant.instead))
        output = Path(folder) / "output"
        process = mp.get_context("fork").Process(
            target=run_tests, args=(folder, mutant.tests, output)
        )
        process.start()
        process.join(TEST_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        lines = output.read_text().splitlines()
    said = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), "")
    # Killed: the mutant hangs, which a test's own limit would notice.
    return process.exitcode in (1, -9), said or "\n    ".join(lines[-3:])


def run_tests(sources: str, tests: str, output: Path) -> None:
    """In a fork, which has PyTorch and the simulated accelerator, but not yet the sources."""
    sys.path.insert(0, sources)
    os.chdir(CHECKOUT)
    with output.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        chosen = ["-m", "accelerator and not slow", "-k", SCHEDULES]
        code = pytest.main(
            ["-q", "-x", "-p", "no:cacheprovider", "--tb=no", *chosen, f"tests/{tests}"]
        )
    os._exit(int(code))


def main() -> int:
    """Tries them all, prints a line for each; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", default="", help="only those that hold it")
    chosen = [each for each in MUTANTS if parser.parse_args().name in each.name]
    torch.set_num_threads(1)
    sys.path.insert(0, str(CHECKOUT / "tests"))
    import simulated

    if reason := simulated.missing():
        print(reason, file=sys.stderr)
        return 2
    unnoticed = 0
    for mutant in chosen:
        try:
            noticed, said = is_noticed(mutant)
        except LookupError as error:
            print(error, file=sys.stderr)
            return 2
        unnoticed += not noticed
        print(f"{'noticed' if noticed else 'NOT NOTICED'}: {mutant.name}\n    {said}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
