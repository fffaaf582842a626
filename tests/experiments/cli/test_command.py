from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import run

from ritornello.experiments.recipes.named import RECIPES
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.training.saver import Saver


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
    assert results["command"] == "ritornello run digits --epochs 1 --tasks 2 --seed 3"
    assert (folder / "report.html").exists()
    assert run("run", "digits", "--epochs", "1", "--tasks", "2", "--strategy", "incremental") == 0
    assert run("report", str(folder), "runs/digits-incremental", "--output", "both.html") == 0
    assert "both.html" in capsys.readouterr().out.replace("\n", "")
    page = Path("both.html").read_text()
    assert "incremental" in page
    assert "rehearsal" in page


def test_a_package_that_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(*_: Any) -> None:
        import matplotlib  # noqa: F401

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("ritornello.experiments.cli.runs.train", show)
    assert run("run", "digits") == 2
    error = capsys.readouterr().err
    assert "matplotlib" in error
    assert error.endswith("pip install 'ritornello[experiments]'\n")
    monkeypatch.setenv("RITORNELLO_TRACEBACK", "1")
    with pytest.raises(ImportError):
        run("run", "digits")


def test_a_second_run_goes_to_a_folder_of_its_own() -> None:
    arguments = ("run", "digits", "--epochs", "1", "--tasks", "2", "--strategy", "incremental")
    assert run(*arguments) == run(*arguments) == 0
    assert sorted(each.name for each in Path("runs").iterdir()) == [
        "digits-incremental",
        "digits-incremental-2",
    ]


def test_compare_runs_every_combination_and_the_page_is_made_of_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (
        "compare", "digits", "--epochs", "1", "--tasks", "2", "--device", "cpu",
        "--strategies", "incremental", "rehearsal", "--capacities", "20", "0.1",
        "--seeds", "0", "1",
    )  # fmt: skip
    assert run(*arguments, "--output", "out/a b") == 0
    printed = capsys.readouterr().out
    assert "incremental, rehearsal on 1 rank, seeds 0, 1: 6 runs" in printed
    comparison = json.loads(Path("out/a b/comparison.json").read_text())
    assert list(comparison) == [
        "incremental, seed 0",
        "incremental, seed 1",
        "rehearsal, capacity 20, seed 0",
        "rehearsal, capacity 20, seed 1",
        "rehearsal, capacity 0.1, seed 0",
        "rehearsal, capacity 0.1, seed 1",
    ]
    command = f"ritornello {' '.join(arguments)} --output 'out/a b'"
    assert {each["command"] for each in comparison.values()} == {command}
    assert Path("out/a b/rehearsal-capacity-20-seed-1/results.json").exists()
    rows = [line.split() for line in printed.splitlines() if line.startswith("rehearsal")]
    assert [row[:4] for row in rows] == [
        ["rehearsal,", "capacity", "20", "2"],
        ["rehearsal,", "capacity", "0.1", "2"],
    ]
    assert run("results", "out", "--output", "page.md", "--archive", "docs/kept.json") == 0
    assert "6 runs:" in capsys.readouterr().out
    page = Path("page.md").read_text()
    assert command in page
    assert "`ritornello results docs/kept.json --output page.md`" in page
    assert run("results", "docs/kept.json", "--output", "page.md") == 0
    assert Path("page.md").read_text() == page


def test_several_seeds_of_one_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--epochs", "1", "--tasks", "2", "--strategy", "incremental", "--seeds", "4", "6")
    assert run("run", "digits", *arguments) == 0
    assert "incremental on 1 rank, seeds 4, 6: 2 runs" in capsys.readouterr().out
    comparison = json.loads(Path("runs/digits-incremental/comparison.json").read_text())
    assert [each["seed"] for each in comparison.values()] == [4, 6]


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        (["compare", "mnist"], ["incremental", "rehearsal", "from-scratch"]),
        (["compare", "buzzega-mnist-der-200"], ["incremental", "der", "from-scratch"]),
        (["compare", "mnist", "--capacity", "9", "--strategy", "der"], ["der"]),
        (
            ["compare", "mnist", "--strategies", "der", "--representatives", "1", "2", "--seed", "3"],
            ["der, r 1", "der, r 2"],
        ),
        (
            ["compare", "mnist", "--strategies", "joint", "er-ace", "--candidates", "1"],
            ["joint", "er-ace"],
        ),
        (
            ["compare", "mnist", "--strategies", "der", "--selections", "fifo", "reservoir",
             "--samplings", "uniform", "grasp"],
            [f"der, selection {selection}, sampling {sampling}"
             for selection in ("fifo", "reservoir") for sampling in ("uniform", "grasp")],
        ),
        (
            ["compare", "cifar10-frontier"],
            ["incremental"]
            + [f"rehearsal, append, r {r}" for r in (8, 16, 32, 64)]
            + [f"rehearsal, proportional, r {r}" for r in (0, 8, 16, 32, 64)]
            + ["from-scratch"],
        ),
        (
            ["compare", "frontier", "--strategy", "rehearsal", "--compositions", "proportional"],
            ["rehearsal, r 0", "rehearsal, r 8"],
        ),
        (
            ["compare", "mnist", "--strategy", "rehearsal", "--first-share", "0.7",
             "--compositions", "append", "proportional"],
            ["rehearsal, append", "rehearsal, proportional"],
        ),
        (["run", "buzzega-mnist-er-500"], ["rehearsal"]),
        (["run", "mnist", "--strategy", "joint", "--seeds", "1", "2"],
         ["joint, seed 1", "joint, seed 2"]),
        (["demo"], ["incremental", "rehearsal", "from-scratch"]),
    ],
)  # fmt: skip
def test_what_runs(
    arguments: list[str], labels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def train(recipes: dict[str, Recipe], *further: object) -> None:
        asked.update(recipes)

    monkeypatch.setattr("ritornello.experiments.cli.runs.train", train)
    assert run(*arguments) == 0
    assert list(asked) == labels
    if "--capacity" in arguments:
        assert asked["der"].capacity == 9
    if "--seed" in arguments:
        assert {each.seed for each in asked.values()} == {3}


def test_a_recipe_as_published_keeps_its_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Recipe] = []
    monkeypatch.setattr(
        "ritornello.experiments.cli.runs.train",
        lambda recipes, *_: asked.extend(recipes.values()),
    )
    name = "buzzega-mnist-er-500"
    run("run", name, "--seeds", "1", "2", "--device", "cpu", "--data", "mnist.npz")
    run("run", name, "--epochs", "2")
    run("compare", name, "--capacities", "500", "501", "--strategies", "rehearsal")
    assert [each.published is not None for each in asked] == [True, True, False, True, False]


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in RECIPES)
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 100


def test_one_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "mnist") == 0
    settings = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:] if line
    )
    assert settings["num_tasks"].strip() == "5"
    assert settings["global_batch_size"].strip() == "16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "minst"), "there is no recipe 'minst' (did you mean 'mnist'?)"),
        (("run", "digits", "--strategy", "magic"), "strategy='magic': there are incremental"),
        (
            ("run", "digits", "--device", "gpu"),
            "device='gpu': there are auto, cpu, and accelerators such as cuda",
        ),
        (("compare", "digits", "--strategies", "x"), "strategy='x': there are incremental"),
        (("run", "digits", "--ranks", "0"), "--ranks 0: it must be at least 1"),
        (("run", "digits", "--ranks", "3"), "does not divide evenly over 3 ranks"),
        (("run", "mnist", "--data", "nowhere.npz"), "data: there is no file nowhere.npz"),
        (("run", "folder", "--data", "nowhere"), "nowhere must hold a folder 'train'"),
        (("run", "digits", "--capacity", "0"), "capacity=0: it must be at least 1"),
        (("run", "digits", "--selection", "best"), "selection='best': there are"),
        (("run", "digits", "--model", "restnet18"), "model='restnet18'"),
        (("recipes", "minst"), "there is no recipe 'minst'"),
        (
            ("run", "digits", "--epochs", "1", "--iterations", "2"),
            "--epochs and --iterations: a task has one of the two; leave one out",
        ),
        (("run", "digits", "--capacity", "1.5"), "capacity=1.5: it must be at least 1, or a"),
        (("run", "digits", "--remembers", "x"), "remembers='x': there are stream, last-epoch"),
        (("results",), "results: give output folders of 'run' or 'compare', or an archive"),
        (("results", "nowhere"), "nowhere: neither a file, nor a folder with a results.json"),
        (("run", "digits", "--resume"), "--resume: say with --output which run goes on"),
        (("run", "digits", "--save-every", "0"), "--save-every 0: it must be at least 1"),
        (("run", "digits", "--save-minutes", "0"), "--save-minutes 0: it must be above 0"),
        (("run", "digits", "--keep", "0"), "--keep 0: it must be at least 1"),
        (("run", "digits", "--restarts", "-1"), "--restarts -1: it must not be negative"),
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
    assert run("run", "digits", "--output", "full", "--resume") == 2
    assert "it exists and holds no run to go on with" in capsys.readouterr().err


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_has_the_run_saved(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "ritornello.experiments.cli", "run", "digits", "--ranks", "2"]
    with subprocess.Popen(
        [*command, "--epochs", "100000", "--save-every", "20", "--output", "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not list(Path().glob("out/checkpoints/*0")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"interrupted by {number.name}: saved at task 1 of 5, step " in error
    step = error.partition("saved at task 1 of 5, step ")[2].partition(";")[0]
    assert Path(f"out/checkpoints/step-{int(step):08}/run.json").exists()
    assert "all ranks were ended; goes on with --resume --output out" in error


def test_resume_begins_goes_on_and_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", "digits", "--epochs", "1", "--tasks", "2", "--output", "out", "--resume")
    between_steps = Saver.between_steps

    def stopping(saver: Saver, count: int, *rest: Any) -> None:
        if count == 20:
            signal.raise_signal(signal.SIGTERM)
        between_steps(saver, count, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Saver, "between_steps", stopping)
        assert run(*arguments) == 143
    error = capsys.readouterr().err
    assert error.startswith("ritornello: error: interrupted by SIGTERM: saved at task 1 of 2, step")
    assert run(*arguments[:-1]) == 2
    assert "not empty; give another folder, or remove it, or go on with" in capsys.readouterr().err
    assert run(*arguments, "--learning-rate", "0.5") == 2
    assert "learning_rate was 0.05 and is 0.5" in capsys.readouterr().err
    assert run(*arguments) == 0
    assert "resumed at task 1 of 2, step 20\n" in capsys.readouterr().err
    written = Path("out/results.json").stat().st_mtime_ns
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    assert "has finished before; nothing is run" in printed
    assert "avg top-1" in printed
    assert Path("out/results.json").stat().st_mtime_ns == written


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
    assert "results" in ran.stdout
