from __future__ import annotations

import json
from pathlib import Path

import pytest

from ritornello.experiments.cli.command import main
from ritornello.experiments.speed.bench import RoundTimes, check_bench, measure_rounds
from ritornello.experiments.speed.workloads import WORKLOADS


def test_rounds_are_timed_stage_by_stage() -> None:
    measured = measure_rounds(WORKLOADS["mnist"], "local", num_rounds=20)
    assert measured.num_rounds == 20
    assert measured.record_bytes == 800  # 784 of the image, 8 of the label, to a multiple of 16
    assert set(measured.stage_seconds) == {"admit", "plan", "exchange", "stage"}
    assert 0 < measured.plain_seconds < measured.round_seconds < 1
    assert measured.ratio == measured.round_seconds / measured.plain_seconds
    low, high = measured.round_middle_half
    assert low <= measured.round_seconds <= high


def test_the_command_writes_table_picture_and_figures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bench"
    options = "--ranks 2 --workloads mnist --rounds 10 --steps 1 --seconds 0.05"
    main(["bench", *options.split(), "--output", str(folder)])
    shown, said = capfd.readouterr()
    for text in (
        "shared_memory", "collective", "ratio", "bytes/representative", "plain copying",
        "handing over", "Beside a step of about 1 ms", "rehearse", "with update",
    ):  # fmt: skip
        assert text in shown
    assert max(map(len, shown.partition("Picture:")[0].splitlines())) <= 81
    assert "ranks" not in said  # no warning of either one
    assert "optimiser" not in said
    saved = json.loads((folder / "bench.json").read_text())
    assert saved["machine"]["cores"] >= 1
    assert [RoundTimes(**each).transport for each in saved["rounds"]] == [
        "shared_memory",
        "collective",
    ]
    for kind in ("update", "beside"):
        assert [each["workload"] for each in saved[kind]] == ["mnist"]
    assert (folder / "bench.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workloads": ["sound"]}, "--workloads sound: there are imagenet-uint8"),
        ({"transports": ["mpi"]}, "--transports mpi: start the ranks by MPI: mpirun"),
        ({"transports": ["local"]}, r"--transports local: with 2 rank\(s\) there are shared_mem"),
        ({"num_rounds": 1}, "--rounds 1: it must be at least 5"),
        ({"seconds": 0}, "--seconds and --steps must be above 0"),
    ],
)
def test_options_out_of_range(changes: dict[str, object], message: str) -> None:
    arguments = {
        "workloads": ["mnist"], "transports": [], "num_ranks": 2, "under_mpi": False,
        "num_rounds": 10, "step_milliseconds": [1.0], "seconds": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        check_bench(**{**arguments, **changes})  # type: ignore[arg-type]


def test_transports_that_are_measured_if_none_are_given() -> None:
    given = (["mnist"], [])
    assert check_bench(*given, 1, False, 10, [1.0], 1.0) == ("local",)
    assert check_bench(*given, 2, False, 10, [1.0], 1.0) == ("shared_memory", "collective")
    assert check_bench(*given, 2, True, 10, [1.0], 1.0) == ("shared_memory", "collective", "mpi")
