from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

with warnings.catch_warnings():
    # Avalanche's GEM would like one; qpsolvers says so when it is imported.
    warnings.filterwarnings("ignore", "no QP solver found", UserWarning)
    pytest.importorskip("avalanche", reason="needs avalanche-lib")
    import dill
    from avalanche.benchmarks import split_online_stream, tensors_benchmark
    from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
    from avalanche.core import SupervisedPlugin
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.models import MTSimpleMLP
    from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, LwFPlugin
    from avalanche.training.supervised import Naive

    from ritornello.integrations.avalanche import RehearsalPlugin

from ritornello import BufferClosedError, CheckpointError, SavedFolder

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    # Each strategy that is given no logger says so.
    pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning"),
    # dill does not find torch's optimisers where they say they are, and pickle does.
    pytest.mark.filterwarnings("ignore:Cannot locate reference to <class 'torch.optim"),
]


class Spy(SupervisedPlugin):
    """Remembers the mini-batches that a strategy trains on, and the sizes that it evaluates on."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[tuple[Tensor, ...]] = []
        self.num_outputs: list[int] = []
        self.evaluated: list[int] = []

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.trained.append(tuple(leaf.clone() for leaf in strategy.mbatch))
        self.num_outputs.append(len(strategy.mb_output))

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.evaluated.append(len(strategy.mb_y))


def numbered(num_experiences: int = 2, *, task_labels: list[int] | None = None) -> Any:
    """Experiences of 32 samples, each known by its first number, with two classes each."""
    tensors = []
    for number in range(num_experiences):
        images = torch.arange(32 * number, 32 * (number + 1)).repeat(4, 1).T.float()
        tensors.append((images, torch.arange(32) % 2 + 2 * number))
    return tensors_benchmark(tensors, tensors, task_labels=task_labels or [0] * num_experiences)


def strategy_with(
    *plugins: Any, model: nn.Module | None = None, kind: type[Naive] = Naive, **arguments: Any
) -> Naive:
    torch.manual_seed(0)
    model = nn.Linear(4, 10) if model is None else model
    settings = {"train_mb_size": 8, "eval_mb_size": 16, "evaluator": None, **arguments}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.001)
    return kind(model=model, optimizer=optimiser, plugins=list(plugins), **settings)


def test_the_strategy_trains_on_augmented_mini_batches() -> None:
    spy = Spy()
    with RehearsalPlugin(16, num_representatives=3) as plugin:
        strategy = strategy_with(plugin, spy)
        for experience in numbered().train_stream:
            strategy.train(experience)
        assert len(plugin.buffer) == 16
    assert spy.num_outputs == [8] + 7 * [11]
    for images, targets, task_labels in spy.trained:
        numbers = images[:, 0].long()
        assert (targets == numbers % 2 + 2 * (numbers // 32)).all()
        assert (task_labels == 0).all()
    # All new samples come once, and in the second experience the first one's come back.
    new = torch.cat([images[:8, 0] for images, _, _ in spy.trained]).sort().values
    assert (new == torch.arange(64)).all()
    assert sum(int((images[8:, 0] < 32).sum()) for images, _, _ in spy.trained[4:]) >= 4


def test_the_mask_belongs_to_the_mini_batch_of_the_iteration() -> None:
    class Masks(Spy):
        def before_backward(self, strategy: Any, **kwargs: Any) -> None:
            mask = plugin.buffer.past_mask
            assert len(mask) == len(strategy.mb_output)
            masks.append((int((~mask).sum()), plugin.buffer.num_past))

    masks: list[tuple[int, int]] = []
    with RehearsalPlugin(16, num_representatives=3) as plugin:
        strategy = strategy_with(plugin, Masks(), train_mb_size=12)
        for experience in numbered().train_stream:  # of 32 samples each
            strategy.train(experience)
    assert masks == [(12, 0), (12, 3), (8, 3), (12, 3), (12, 3), (8, 3)]


def test_a_strategy_that_does_not_let_it_augment(caplog: pytest.LogCaptureFixture) -> None:
    class OwnLoop(Naive):
        def _before_training_iteration(self, **kwargs: Any) -> None:
            """Calls no plugin."""

    for kind in (Naive, OwnLoop):
        assert not caplog.records
        with RehearsalPlugin(16, num_representatives=3) as plugin:
            strategy = strategy_with(plugin, kind=kind)
            for experience in numbered().train_stream:
                strategy.train(experience)
    (record,) = caplog.records
    assert "OwnLoop has trained on an experience and augmented no mini-batch" in record.message


def test_evaluation_is_left_alone() -> None:
    spy = Spy()
    with RehearsalPlugin(16, num_representatives=3) as plugin:
        strategy = strategy_with(plugin, spy, eval_every=1)
        benchmark = numbered()
        for experience in benchmark.train_stream:
            strategy.train(experience, eval_streams=[benchmark.test_stream])
        num_rounds = plugin.buffer.stats().num_rounds
        strategy.eval(benchmark.test_stream)
        assert plugin.buffer.stats().num_rounds == num_rounds == 8
    assert set(spy.evaluated) == {16}


def test_metrics_of_training_count_representatives() -> None:
    class CountsTargets(nn.Linear):
        """Predicts class 0 of all."""

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * 0 + nn.functional.one_hot(
                torch.zeros(len(images), dtype=torch.int64), 10
            )

    evaluator = EvaluationPlugin(accuracy_metrics(epoch=True))
    with RehearsalPlugin(16, num_representatives=8) as plugin:
        strategy = strategy_with(plugin, model=CountsTargets(4, 10), evaluator=evaluator)
        first, second = numbered().train_stream
        strategy.train(first)
        metrics = strategy.train(second)
    [found] = [value for name, value in metrics.items() if name.startswith("Top1_Acc_Epoch")]
    # No new sample is of class 0: what is right are representatives.
    assert 0.05 < found < 0.4


def test_task_labels_come_with_representatives() -> None:
    spy = Spy()
    with RehearsalPlugin(16, num_representatives=4) as plugin:
        model = MTSimpleMLP(input_size=4, hidden_size=8)
        strategy = strategy_with(plugin, spy, model=model)
        for experience in numbered(task_labels=[0, 1]).train_stream:
            strategy.train(experience)
    for images, _, task_labels in spy.trained:
        assert (task_labels == images[:, 0].long() // 32).all()
    assert {0, 1} == set(torch.cat([labels for _, _, labels in spy.trained[4:]]).tolist())


@pytest.mark.parametrize("rehearsal_first", [True, False])
def test_other_plugins_see_the_same_mini_batch(rehearsal_first: bool) -> None:
    spy = Spy()
    with RehearsalPlugin(16, num_representatives=4) as plugin:
        others = [LwFPlugin(alpha=1, temperature=2), EWCPlugin(ewc_lambda=0.1), spy]
        plugins = [plugin, *others] if rehearsal_first else [*others, plugin]
        strategy = strategy_with(*plugins)
        for experience in numbered().train_stream:
            strategy.train(experience)
    assert spy.num_outputs == [8] + 7 * [12]
    assert strategy.loss.isfinite().all()


def tasks_in(plugin: RehearsalPlugin, folder: Path) -> list[str]:
    plugin.save(folder)
    return [task["name"] for task in json.loads((folder / "manifest.json").read_text())["tasks"]]


def test_each_experience_begins_a_task(tmp_path: Path) -> None:
    with RehearsalPlugin(16, num_representatives=4) as plugin:
        strategy = strategy_with(plugin)
        for experience in numbered(3).train_stream:
            strategy.train(experience.train())  # hides its number
        expected = ["experience-0", "experience-1", "experience-2"]
        assert tasks_in(plugin, tmp_path) == expected


@pytest.mark.parametrize(
    ("boundaries", "expected"), [(True, ["experience-0", "experience-1"]), (False, [])]
)
def test_online_experiences(boundaries: bool, expected: list[str], tmp_path: Path) -> None:
    spy = Spy()
    with RehearsalPlugin(16, num_representatives=4) as plugin:
        strategy = strategy_with(plugin, spy)
        stream = split_online_stream(
            numbered().train_stream, experience_size=8, access_task_boundaries=boundaries
        )
        for experience in stream:
            strategy.train(experience)
        assert tasks_in(plugin, tmp_path) == expected
    assert spy.num_outputs == [8] + 7 * [12]


def test_rehearsal_undoes_forgetting() -> None:
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    tasks = [(images[labels // 2 == task], labels[labels // 2 == task]) for task in range(3)]
    benchmark = tensors_benchmark(tasks, tasks, task_labels=[0] * 3)

    def accuracy_after_all(*plugins: Any) -> float:
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        strategy = strategy_with(*plugins, model=model, train_epochs=3)
        strategy.optimizer.param_groups[0]["lr"] = 0.2
        strategy.train(benchmark.train_stream)
        with torch.no_grad():
            predicted = model(torch.cat([each for each, _ in tasks])).argmax(dim=1)
        return float((predicted == torch.cat([each for _, each in tasks])).float().mean())

    assert accuracy_after_all() < 0.4
    with RehearsalPlugin(100, num_representatives=8) as plugin:
        assert accuracy_after_all(plugin) > 0.85


@pytest.fixture
def by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else dill writes torch's optimisers by value, and fails, with or without this plugin."""
    monkeypatch.setitem(dill.settings, "byref", True)


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_checkpoint_goes_on_as_if_it_had_never_stopped(in_folder: bool, tmp_path: Path) -> None:
    first, second = numbered().train_stream
    spy = Spy()
    strategy = strategy_with(RehearsalPlugin(16, num_representatives=4), spy)
    strategy.train(first)
    if in_folder:
        RehearsalPlugin.of(strategy).save(tmp_path / "buffer")
    save_checkpoint(strategy, tmp_path / "strategy.pkl")
    strategy.train(second)
    expected = spy.trained
    RehearsalPlugin.of(strategy).close()

    unused = RehearsalPlugin(16, num_representatives=4)
    strategy = strategy_with(unused, Spy())
    strategy, num_trained = maybe_load_checkpoint(strategy, tmp_path / "strategy.pkl")
    unused.close()
    assert num_trained == 1
    strategy.train(second)
    [found] = [each for each in strategy.plugins if isinstance(each, Spy)]
    assert len(found.trained) == len(expected) == 8
    for one, other in zip(found.trained, expected, strict=True):
        assert all(map(torch.equal, one, other))
    RehearsalPlugin.of(strategy).close()


@pytest.mark.usefixtures("by_reference")
def test_a_later_save_is_needed_after_further_steps(tmp_path: Path) -> None:
    """What was saved before is not taken for the buffer as it is now."""
    first, second = numbered().train_stream
    with RehearsalPlugin(16, num_representatives=4) as plugin:
        strategy = strategy_with(plugin)
        strategy.train(first)
        plugin.save(tmp_path / "buffer")
        strategy.train(second)
        save_checkpoint(strategy, tmp_path / "strategy.pkl")
        held = plugin.buffer.stats().held_per_class
    strategy, _ = maybe_load_checkpoint(strategy_with(), tmp_path / "strategy.pkl")
    with RehearsalPlugin.of(strategy) as plugin:
        assert plugin.buffer.stats().held_per_class == held == {0: 4, 1: 4, 2: 4, 3: 4}


@pytest.mark.usefixtures("by_reference")
def test_a_checkpoint_whose_folder_is_gone(tmp_path: Path) -> None:
    with RehearsalPlugin(16, num_representatives=4) as plugin:
        strategy = strategy_with(plugin)
        strategy.train(numbered().train_stream[0])
        plugin.save(tmp_path / "buffer")
        save_checkpoint(strategy, tmp_path / "strategy.pkl")
    (tmp_path / "buffer").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="buffer"):
        maybe_load_checkpoint(strategy_with(), tmp_path / "strategy.pkl")


@pytest.mark.usefixtures("by_reference")
def test_a_task_that_begins_after_saving_is_not_lost(tmp_path: Path) -> None:
    with RehearsalPlugin(16, num_representatives=4) as plugin:
        strategy = strategy_with(plugin)
        first, second = numbered().train_stream
        strategy.train(first)
        plugin.save(tmp_path / "buffer")
        strategy.experience = second
        plugin.before_training_exp(strategy)
        save_checkpoint(strategy, tmp_path / "strategy.pkl")
    restored, _ = maybe_load_checkpoint(strategy_with(), tmp_path / "strategy.pkl")
    with RehearsalPlugin.of(restored) as plugin:
        plugin.buffer.save(tmp_path / "again")
    tasks = SavedFolder(tmp_path / "again").manifest.tasks
    assert [task.name for task in tasks] == ["experience-0", "experience-1"]


def test_closing() -> None:
    plugin = RehearsalPlugin(16, num_representatives=4)
    strategy = strategy_with(plugin)
    plugin.close()
    with pytest.raises(BufferClosedError, match="begin_task after close"):
        strategy.train(numbered().train_stream[0])
    # One that is never closed ends with its strategy; no_leaks sees to it.
    strategy_with(RehearsalPlugin(16, num_representatives=4)).train(numbered().train_stream[0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RehearsalPlugin(0, num_representatives=4), ValueError, "capacity=0"),
        (lambda: RehearsalPlugin(16), TypeError, "num_representatives"),
        (lambda: RehearsalPlugin(16, num_representatives=4, mem_size=1), TypeError, "mem_size"),
        (lambda: RehearsalPlugin.of(strategy_with()), ValueError, "Naive has no RehearsalPlugin"),
    ],
)
def test_messages(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_without_avalanche(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "avalanche.benchmarks", None)
    monkeypatch.delitem(sys.modules, "ritornello.integrations.avalanche")
    with pytest.raises(ImportError, match=r"pip install 'ritornello\[avalanche\]'"):
        importlib.import_module("ritornello.integrations.avalanche")


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("by_reference")
def test_two_ranks(tmp_path: Path) -> None:
    """The example, and a checkpoint of two ranks that goes on on one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    ran = subprocess.run(
        [*command, "2", str(Path(__file__).with_name("avalanche_ranks.py")), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = re.search(r"average: ([\d.]+) %", ran.stdout)
    assert found, ran.stdout
    assert float(found[1]) > 80.0
    assert ran.stdout.count("refused: a checkpoint of one rank cannot hold the shards of all") == 2
    assert ran.stdout.count("restored: 1 20") == 2

    strategy, num_trained = maybe_load_checkpoint(strategy_with(), tmp_path / "strategy.pkl")
    assert num_trained == 1
    with RehearsalPlugin.of(strategy) as plugin:
        assert plugin.buffer.stats().held_per_rank == [20]
        strategy.train(numbered().train_stream[0])
