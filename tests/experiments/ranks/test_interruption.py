"""Signals, ranks that agree, and folders that belong to one job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from ritornello.errors import CheckpointError
from ritornello.experiments.ranks.group import Ranks
from ritornello.experiments.ranks.interruption import Agreement, NotedSignals, RunInterruptedError
from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.results.run_folder import locked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_noted(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with NotedSignals() as noted:
        assert noted.number == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted.number == number
    assert signal.getsignal(number) == before
    assert RunInterruptedError(number, "saved").status == 128 + number


def test_other_threads_note_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with NotedSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def steps_that_heard() -> list[list[tuple[int, int, bool]]]:
    """Rank 1 gets a signal at step 30, and from step 60 on it is time for a checkpoint on rank 0."""
    heard: list[tuple[int, int, bool]] = []
    with Ranks() as ranks:
        agreement = Agreement(ranks)
        for step in range(3000):
            number = signal.SIGTERM * (ranks.rank == 1 and step >= 30)
            heard.append((step, *agreement.hear(number, ranks.rank == 0 and step >= 60)))
        heard = [each for each in heard if any(each[1:])]
        last = agreement.hear_now(signal.SIGUSR1 if ranks.rank else 0)
        return ranks.gather([*heard, (3000, last, False)])


def test_all_ranks_hear_in_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, second = launch(2, steps_that_heard)
    assert first == second
    assert first[0][1:] == (signal.SIGTERM, False) or first[0][1:] == (signal.SIGTERM, True)
    assert first[-2][1:] == (signal.SIGTERM, True)
    # Then rank 1 has another one, and the one before is heard with it: the highest counts.
    assert first[-1] == (3000, signal.SIGTERM, False)


def test_one_rank_hears_at_once() -> None:
    with Ranks() as ranks:
        agreement = Agreement(ranks)
        assert agreement.hear(15, True) == (15, True)
        assert agreement.hear_now(10) == 10


def failing_together() -> list[str]:
    with Ranks() as ranks:
        assert ranks.tell(f"from {ranks.rank}") == "from 0"
        try:
            with ranks.together("cannot write"):
                if dist.get_rank() == 1:
                    raise OSError("No space left on device")
        except CheckpointError as error:
            return ranks.gather(str(error))
        return ranks.gather("no error")


def test_what_fails_on_one_rank_fails_on_all() -> None:
    expected = "cannot write (rank 1): No space left on device"
    assert launch(2, failing_together) == [expected, expected]
    with (
        Ranks() as ranks,
        pytest.raises(CheckpointError, match="^cannot read: no"),
        ranks.together("cannot read"),
    ):
        raise ValueError("no")


def test_a_folder_belongs_to_one_job(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from ritornello.experiments.results.run_folder import locked\n"
        "with locked(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    folder = tmp_path / "new" / "folder"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        message = f"writing there \\(process {other.pid} on"
        with pytest.raises(FileExistsError, match=message), locked(folder):
            pass
        other.kill()  # as its end, whatever it was, gives the folder back
        with locked(folder, wait_seconds=30.0):
            assert f"process {os.getpid()} on" in (folder / ".lock").read_text()
