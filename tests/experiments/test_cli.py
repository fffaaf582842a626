from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ritornello.experiments import cli


def run(*arguments: str) -> int:
    try:
        cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def test_run_then_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "digits", "--epochs", "1", "--tasks", "2", "--seed", "3") == 0
    printed = capsys.readouterr().out
    assert "rehearsal on 1 rank, seed 3" in printed
    folder = Path("runs/digits-rehearsal")
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["num_tasks"] == 2
    assert (folder / "report.html").exists()
    assert run("run", "digits", "--epochs", "1", "--tasks", "2", "--strategy", "incremental") == 0
    assert run("report", str(folder), "runs/digits-incremental", "--output", "both.html") == 0
    assert "both.html" in capsys.readouterr().out.replace("\n", "")
    page = Path("both.html").read_text()
    assert "incremental" in page
    assert "rehearsal" in page


def test_a_second_run_goes_to_a_folder_of_its_own() -> None:
    arguments = ("run", "digits", "--epochs", "1", "--tasks", "2", "--strategy", "incremental")
    assert run(*arguments) == run(*arguments) == 0
    assert sorted(each.name for each in Path("runs").iterdir()) == [
        "digits-incremental",
        "digits-incremental-2",
    ]


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("digits", "mnist", "cifar10", "folder"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "minst"), "there is no recipe 'minst' (did you mean 'mnist'?)"),
        (("run", "digits", "--strategy", "magic"), "strategy='magic': there are incremental"),
        (("compare", "digits", "--strategies", "x"), "strategy='x': there are incremental"),
        (("run", "digits", "--ranks", "3"), "does not divide evenly over 3 ranks"),
        (("run", "mnist", "--data", "nowhere.npz"), "data: there is no file nowhere.npz"),
        (("run", "folder", "--data", "nowhere"), "nowhere must hold a folder 'train'"),
        (("run", "digits", "--capacity", "0"), "capacity=0: it must be at least 1"),
        (("run", "digits", "--selection", "best"), "selection='best': there are"),
        (("run", "digits", "--model", "restnet18"), "model='restnet18'"),
        (("report",), "report: give one or more output folders"),
        (("report", "nowhere"), "nowhere holds neither results.json nor comparison.json"),
    ],
)
def test_errors_are_one_line_and_status_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("ritornello: error: ")
    assert message in error
    assert "\n" not in error


def test_a_folder_that_is_not_empty(capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/precious").touch()
    assert run("run", "digits", "--output", "full") == 2
    assert "it exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_ranks(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "ritornello.experiments.cli"]
    process = subprocess.Popen(
        [*command, "run", "digits", "--ranks", "2", "--epochs", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        # Two ranks, and the resource tracker of multiprocessing.
        while len(children := _children(process.pid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert f"ritornello: error: stopped by {number.name}; all ranks were ended" in error
    deadline = time.monotonic() + 10
    while (left := [c for c in children if _is_running(c)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("needs /proc")
    return [int(child) for child in path.read_text().split()]


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom ritornello.experiments import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'matplotlib', 'torchvision', 'timm', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "compare" in ran.stdout
