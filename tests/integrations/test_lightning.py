from __future__ import annotations

import copy
import importlib
import logging
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# Lightning's own: of torch.utils._pytree, which it still calls by an old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    # Advice about loaders with few workers, srun, and folders that hold checkpoints.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The `srun` command:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),
]

pl = pytest.importorskip("lightning.pytorch")

from lightning.fabric import Fabric  # noqa: E402
from lightning.pytorch.loggers.logger import Logger  # noqa: E402
from lightning.pytorch.utilities import CombinedLoader  # noqa: E402
from lightning.pytorch.utilities.exceptions import SIGTERMException  # noqa: E402

import ritornello  # noqa: E402
from ritornello import (  # noqa: E402
    BufferClosedError,
    CheckpointError,
    ComposedSteps,
    RehearsalBuffer,
)
from ritornello.integrations.lightning import HOOK, Rehearsal  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"


class Classifier(pl.LightningModule):
    """Remembers what it was given, and what its hook was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.trained: list[Any] = []
        self.evaluated: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained.append(batch)
        images, labels = batch.values() if isinstance(batch, dict) else batch
        return nn.functional.cross_entropy(self.layer(images.float()), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        self.evaluated.append(batch)
        return 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Normalising(Classifier):
    """Its hook makes float images of uint8 ones."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        assert images.dtype == torch.uint8
        return images / 255, labels


def samples(num_samples: int = 40) -> TensorDataset:
    """Each is known by its first number; three classes."""
    images = torch.arange(num_samples, dtype=torch.uint8).repeat(4, 1).T.contiguous()
    return TensorDataset(images, torch.arange(num_samples) % 3)


def loader(num_samples: int = 40) -> DataLoader[Any]:
    return DataLoader(samples(num_samples), batch_size=8)


def trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **arguments})


def sizes(batches: list[Any]) -> list[int]:
    return [len(images) for images, _ in batches]


@pytest.fixture
def made() -> Iterator[Callable[..., Rehearsal]]:
    """Makes callbacks, and closes them at the end."""
    callbacks: list[Rehearsal] = []

    def make(**arguments: Any) -> Rehearsal:
        callbacks.append(Rehearsal(**{"capacity": 20, "num_representatives": 3, **arguments}))
        return callbacks[-1]

    yield make
    for each in callbacks:
        each.close()


def test_only_training_is_augmented(made: Callable[..., Rehearsal]) -> None:
    rehearsal, module = made(), Classifier()
    training = trainer(rehearsal, max_epochs=2)
    training.fit(module, loader(), loader())
    assert sizes(module.trained) == [8] + [11] * 9
    assert sizes(module.evaluated) == [8] * (2 + 2 * 5)  # with two sanity checks
    assert rehearsal.buffer.stats().num_rounds == 10
    training.validate(module, loader(), verbose=False)
    training.test(module, loader(), verbose=False)
    training.predict(module, loader())
    assert set(sizes(module.evaluated)) == {8}
    assert rehearsal.buffer.stats().num_rounds == 10


def test_the_mask_belongs_to_the_mini_batch_of_the_step(made: Callable[..., Rehearsal]) -> None:
    """Also in the first step, and in the last, short one."""
    rehearsal, masks = made(), []

    class Masked(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            masks.append(rehearsal.buffer.past_mask.tolist())
            assert rehearsal.buffer.num_past == sum(masks[-1])
            return super().training_step(batch, batch_idx)

    module = Masked()
    trainer(rehearsal, accumulate_grad_batches=2).fit(module, loader(35))
    assert sizes(module.trained) == [8] + [11] * 3 + [6]
    assert masks == [[False] * 8, *[[False] * 8 + [True] * 3] * 3, [False] * 3 + [True] * 3]


def test_a_trainer_that_takes_mini_batches_ahead_of_time_has_their_own_masks() -> None:
    """As of a loop of ``rehearse``, whose length it does not know."""

    class Masked(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batch, mask = batch
            assert int(mask.sum()) == (3 if batch_idx else 0)
            ahead.append(buffer.num_past - int(mask.sum()))
            return super().training_step(batch, batch_idx)

    module, ahead = Masked(), []
    with RehearsalBuffer(20, num_representatives=3) as buffer:
        trainer().fit(module, ritornello.rehearse(loader(35), buffer, with_mask=True))
    assert ahead[0] == 3  # what the buffer says is of the next one
    assert sizes(module.trained) == [8] + [11] * 3 + [6]


def composed() -> ComposedSteps:
    return ComposedSteps(40, 120, samples_per_step=8, num_epochs=3, first_share=0.9)


def new_ones(batches: list[Any], epochs: range) -> list[list[int]]:
    """The first samples of mini-batches, as many as are new in these epochs."""
    counts = [len(each) for epoch in epochs for each in composed().positions(epoch)]
    return [images[:count, 0].tolist() for (images, _), count in zip(batches, counts, strict=True)]


def test_how_many_are_drawn_follows_the_composition(made: Callable[..., Rehearsal]) -> None:
    rehearsal = made(num_representatives=0, most_representatives=8)
    before, module = Classifier(), Classifier()
    trainer(rehearsal).fit(before, loader())
    assert sizes(before.trained) == [8] * 5
    trainer(rehearsal, max_epochs=3).fit(module, DataLoader(samples(), batch_sampler=composed()))
    assert sizes(module.trained)[1:] == [8] * 14
    wanted = [positions for epoch in range(3) for positions in composed().positions(epoch)]
    assert new_ones(module.trained, range(3)) == wanted


def test_a_composition_goes_on_from_a_checkpoint(
    made: Callable[..., Rehearsal], tmp_path: Path
) -> None:
    """Lightning says which epoch begins."""
    given = {"num_representatives": 0, "most_representatives": 8}
    begun, module = trainer(made(**given)), Classifier()
    begun.fit(Classifier(), DataLoader(samples(), batch_sampler=composed()))
    begun.save_checkpoint(tmp_path / "last.ckpt")
    trainer(made(**given), max_epochs=3).fit(
        module,
        DataLoader(samples(), batch_sampler=composed()),
        ckpt_path=tmp_path / "last.ckpt",
        weights_only=False,
    )
    assert sizes(module.trained) == [8] * 10
    wanted = [positions for epoch in (1, 2) for positions in composed().positions(epoch)]
    assert new_ones(module.trained, range(1, 3)) == wanted


def test_representatives_are_those_of_the_plain_loop(made: Callable[..., Rehearsal]) -> None:
    rehearsal, module = made(num_candidates=4, seed=3), Classifier()
    trainer(rehearsal).fit(module, loader())
    with RehearsalBuffer(20, num_representatives=3, num_candidates=4, seed=3) as buffer:
        expected = [buffer.update(batch) for batch in loader()]
    for (images, labels), (plain_images, plain_labels) in zip(
        module.trained, expected, strict=True
    ):
        assert torch.equal(images, plain_images)
        assert torch.equal(labels, plain_labels)


def test_the_modules_own_hook_comes_after(made: Callable[..., Rehearsal]) -> None:
    rehearsal, module = made(), Normalising()
    trainer(rehearsal).fit(module, loader())
    images, _ = module.trained[-1]
    assert images.dtype == torch.float32
    assert len(images) == 11
    [stored, *_] = rehearsal.buffer.representatives()
    assert stored[0].dtype == torch.uint8


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


class NormalisingData(Data):
    on_after_batch_transfer = Normalising.on_after_batch_transfer


@pytest.mark.parametrize("data", [Data, NormalisingData])
def test_the_hook_may_be_the_data_modules(made: Callable[..., Rehearsal], data: type[Data]) -> None:
    rehearsal, module, source = made(), Classifier(), data()
    trainer(rehearsal).fit(module, datamodule=source)
    assert sizes(module.trained) == [8] + [11] * 4
    assert module.trained[-1][0].is_floating_point() == (data is NormalisingData)
    assert HOOK not in vars(module)
    assert HOOK not in vars(source)


def test_hooks_are_as_before(made: Callable[..., Rehearsal]) -> None:
    module, own = Classifier(), Normalising()
    trainer(made()).fit(module, loader())
    assert HOOK not in vars(module)
    hook = own.on_after_batch_transfer
    setattr(own, HOOK, hook)  # the object's own, as another library may set it
    trainer(made()).fit(own, loader())
    assert vars(own)[HOOK] is hook


class Copying(Classifier):
    def on_train_epoch_end(self) -> None:
        self.trainer.copied = copy.deepcopy(self)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.num_transferred = getattr(self, "num_transferred", 0) + 1
        return batch


def test_the_module_may_be_copied_while_it_trains(made: Callable[..., Rehearsal]) -> None:
    rehearsal, module = made(), Copying()
    training = trainer(rehearsal)
    training.fit(module, loader())
    copied = training.copied
    copied.trained.clear()
    trainer().fit(copied, loader())  # without rehearsal
    assert sizes(copied.trained) == [8] * 5
    assert (module.num_transferred, copied.num_transferred) == (5, 10)
    copied.trained.clear()
    trainer(rehearsal).fit(copied, loader())
    assert sizes(copied.trained) == [11] * 5
    assert (module.num_transferred, copied.num_transferred) == (5, 15)
    assert rehearsal.buffer.stats().num_rounds == 10


def test_a_step_augments_once(made: Callable[..., Rehearsal]) -> None:
    """Hooks may call each other, and a step may transfer what it likes."""

    class Calling(Data):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return self.trainer.lightning_module.on_after_batch_transfer(batch, dataloader_idx)

    class Transferring(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            other = self.trainer.strategy.batch_to_device(next(iter(loader())))
            assert sizes([other]) == [8]
            return super().training_step(batch, batch_idx)

    rehearsal, module = made(), Transferring()
    trainer(rehearsal).fit(module, datamodule=Calling())
    assert sizes(module.trained) == [8] + [11] * 4
    assert rehearsal.buffer.stats().num_rounds == 5


def test_hooks_that_another_callback_has_left_behind(made: Callable[..., Rehearsal]) -> None:
    class Raising(pl.Callback):
        def on_exception(self, *_: Any) -> None:
            raise RuntimeError("of the other callback")

    rehearsal, module = made(), Failing()
    with pytest.raises(RuntimeError, match="of the other callback"):
        trainer(Raising(), rehearsal).fit(module, loader())
    module.error, module.trained = None, []
    trainer(rehearsal).fit(module, loader())
    assert sizes(module.trained) == [11] * 5


def test_example_inputs_are_no_mini_batches(made: Callable[..., Rehearsal]) -> None:
    module, rehearsal = Classifier(), made()
    module.example_input_array = torch.zeros(2, 4)
    module.forward = lambda images: module.layer(images)
    trainer(rehearsal, enable_model_summary=True).fit(module, loader())
    assert rehearsal.buffer.stats().num_rounds == 5


def test_dicts_and_accumulated_gradients(made: Callable[..., Rehearsal]) -> None:
    class Named(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"image": torch.full((4,), index), "digit": torch.tensor(index % 3)}

    rehearsal, module = made(label="digit"), Classifier()
    training = trainer(rehearsal, accumulate_grad_batches=2, limit_train_batches=4)
    training.fit(module, DataLoader(Named(), batch_size=8))
    assert [len(batch["image"]) for batch in module.trained] == [8, 11, 11, 11]
    assert training.global_step == 2


def test_several_loaders_are_one_nested_mini_batch(made: Callable[..., Rehearsal]) -> None:
    class Both(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (images, labels), (more, _) = batch["left"], batch["right"]
            assert len(images) == len(more)
            return super().training_step((images, labels), batch_idx)

    module = Both()
    pairs = CombinedLoader({"left": loader(), "right": loader()}, "min_size")
    trainer(made(label=("left", 1))).fit(module, pairs)
    assert sizes(module.trained) == [8] + [11] * 4
    uneven = CombinedLoader({"left": loader(), "right": loader(16)}, "max_size")
    with pytest.raises(ValueError, match=r"batch\['right'\] has NoneType parts"):
        trainer(made(label=("left", 1))).fit(module, uneven)


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument:UserWarning")
def test_mini_batches_that_pass_by_are_refused(made: Callable[..., Rehearsal]) -> None:
    class Fetching(Classifier):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=r"holds no representatives.*buffer\.update"):
        trainer(made()).fit(Fetching(), loader())


def test_the_buffer_lives_on_from_fit_to_fit(made: Callable[..., Rehearsal]) -> None:
    rehearsal, module = made(), Classifier()
    with pytest.raises(RuntimeError, match="no buffer yet: the first fit makes it"):
        _ = rehearsal.buffer
    rehearsal.begin_task("Monday")
    training = trainer(rehearsal)
    training.fit(module, loader())
    buffer = rehearsal.buffer
    rehearsal.begin_task("Tuesday")
    training.fit_loop.max_epochs = 2  # the same trainer
    training.fit(module, loader())
    rehearsal.begin_task("Tuesday")  # which has begun
    trainer(rehearsal).fit(module, loader())  # another one
    assert rehearsal.buffer is buffer
    assert sizes(module.trained) == [8] + [11] * 14
    marks = [(mark.name, mark.first_round) for mark in buffer._checkpointing.tasks]
    assert marks == [("Monday", 0), ("Tuesday", 5)]


def test_tasks_within_a_fit(made: Callable[..., Rehearsal]) -> None:
    rehearsal = made()

    class Daily(Classifier):
        def on_train_epoch_start(self) -> None:
            rehearsal.begin_task(f"day {self.current_epoch}")

    trainer(rehearsal, max_epochs=2).fit(Daily(), loader())
    marks = [(mark.name, mark.first_round) for mark in rehearsal.buffer._checkpointing.tasks]
    assert marks == [("day 0", 0), ("day 1", 5)]


def test_checkpoints_hold_the_buffer(made: Callable[..., Rehearsal], tmp_path: Path) -> None:
    """The second epoch from a checkpoint is that of an uninterrupted run; no pickle is needed."""
    whole, rehearsal = Classifier(), made(num_candidates=3)
    trainer(rehearsal, max_epochs=2).fit(whole, loader())
    first = made(num_candidates=3)
    first.begin_task("Monday")
    saving = trainer(first)
    saving.fit(Classifier(), loader())
    saving.save_checkpoint(tmp_path / "last.ckpt")
    assert "Rehearsal" in torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]

    halves, second = Classifier(), made(num_candidates=3)
    second.begin_task("Monday")  # which has begun in the checkpoint
    training = trainer(second, max_epochs=2)
    training.fit(halves, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for ours, expected in zip(halves.trained, whole.trained[5:], strict=True):
        assert torch.equal(ours[0], expected[0])
    assert len(second.buffer.tasks) == 1
    # Evaluating that checkpoint does not take the buffer back to it.
    training.validate(
        halves, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True
    )
    assert second.buffer.stats().num_rounds == 10


def test_checkpoints_without_a_buffer(
    made: Callable[..., Rehearsal], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    apart = made(in_checkpoints=False)
    saving = trainer(apart)
    saving.fit(Classifier(), loader())
    saving.save_checkpoint(tmp_path / "last.ckpt")
    apart.buffer.save(tmp_path / "buffer")
    assert "Rehearsal" not in torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]

    path = tmp_path / "last.ckpt"
    module = Classifier()
    trainer(made(), max_epochs=2).fit(module, loader(), ckpt_path=path, weights_only=True)
    assert "the checkpoint holds no buffer" in caplog.text
    assert sizes(module.trained)[0] == 8

    beside, module = made(in_checkpoints=False), Classifier()
    beside.load(tmp_path / "buffer")
    trainer(beside, max_epochs=2).fit(module, loader(), ckpt_path=path, weights_only=True)
    assert sizes(module.trained) == [11] * 5
    beside.load(tmp_path / "buffer")  # at once
    assert beside.buffer.stats().num_rounds == 5
    with pytest.raises(CheckpointError, match="holds no saved buffer"):
        beside.load(tmp_path)


class Failing(Classifier):
    error: BaseException | None = ValueError("of the user")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 2 and self.error is not None:
            raise self.error
        return super().training_step(batch, batch_idx)


def test_what_could_not_be_loaded_is_not_forgotten(
    made: Callable[..., Rehearsal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsal = made()
    monkeypatch.chdir(tmp_path)
    rehearsal.load("buffer")
    monkeypatch.chdir(Path(__file__).parent)  # it is the folder that it was
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{tmp_path}/buffer holds no saved buffer"):
            trainer(rehearsal).fit(Classifier(), loader())


class SavingOnException(pl.Callback):
    """As ``OnExceptionCheckpoint``, which looks for its last checkpoint in each fit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_one_rank_goes_on_after_an_exception(
    made: Callable[..., Rehearsal], tmp_path: Path
) -> None:
    rehearsal, module = made(), Failing()
    with pytest.raises(ValueError, match="of the user"):
        trainer(rehearsal, SavingOnException(tmp_path / "last.ckpt")).fit(module, loader())
    assert HOOK not in vars(module)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "Rehearsal" in saved["callbacks"]
    module = Classifier()
    trainer(rehearsal).fit(module, loader())
    assert sizes(module.trained) == [11] * 5


@pytest.mark.parametrize("error", [ValueError("of the user"), SIGTERMException()])
def test_several_ranks_learn_of_an_exception(
    made: Callable[..., Rehearsal], error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    rehearsal, module = made(), Classifier()
    trainer(rehearsal).fit(module, loader())
    testing = SimpleNamespace(world_size=2, state=SimpleNamespace(fn="test"))
    rehearsal.on_exception(testing, module, error)  # type: ignore[arg-type]
    assert rehearsal.state_dict()
    several = SimpleNamespace(world_size=2, state=SimpleNamespace(fn="fit"))
    rehearsal.on_exception(several, module, error)  # type: ignore[arg-type]
    if isinstance(error, SIGTERMException):  # all ranks stop between two steps, to save
        assert rehearsal.state_dict()
        return
    with pytest.raises(BufferClosedError):
        rehearsal.buffer.update(samples()[:2])
    assert rehearsal.state_dict() == {}
    assert "a checkpoint without the buffer" in caplog.text
    with pytest.raises(RuntimeError, match="closed.*make another Rehearsal"):
        trainer(rehearsal).fit(module, loader())


def test_a_trainer_of_other_ranks_is_refused(made: Callable[..., Rehearsal]) -> None:
    rehearsal, module = made(), Classifier()
    trainer(rehearsal).fit(module, loader())
    rehearsal._num_ranks = 2
    with pytest.raises(ValueError, match=r"made for 2 rank\(s\), but this trainer has 1"):
        trainer(rehearsal).fit(module, loader())


def test_processes_that_end_with_the_fit(tmp_path: Path) -> None:
    # One that has used an accelerator, as those of other tests have, cannot train when it is forked.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        fresh.submit(fit_in_a_fork, tmp_path / "log").result()
    assert "the buffer in them, end with this fit" in (tmp_path / "log").read_text()


def fit_in_a_fork(log: Path) -> None:
    rehearsal = Rehearsal(24, num_representatives=3)
    noting = logging.FileHandler(log)
    logging.getLogger("ritornello").addHandler(noting)
    trainer(rehearsal, strategy="ddp_fork", devices=1).fit(Classifier(), loader())
    noting.close()
    with pytest.raises(RuntimeError, match="ddp_spawn"):
        _ = rehearsal.buffer


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="num_representative"):
        Rehearsal(20, num_representative=3)
    with pytest.raises(ValueError, match="log_every_n_steps=0: it must be at least 1"):
        Rehearsal(20, num_representatives=3, log_every_n_steps=0)
    with pytest.raises(ValueError, match="capacity"):
        trainer(Rehearsal(-1, num_representatives=3)).fit(Classifier(), loader())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `Rehearsal`"):
        trainer(*(Rehearsal(20, num_representatives=3) for _ in range(2)))


class Noting(Logger):
    """Notes the buffer's figures."""

    name, version = "noting", 0

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[int | None, float]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Has no place for them."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "buffer/held" in metrics:
            assert metrics["buffer/exposed_ms"] > 0
            self.noted.append((step, metrics["buffer/held"]))


def test_figures_are_logged(made: Callable[..., Rehearsal], tmp_path: Path) -> None:
    rehearsal, noting = made(log_every_n_steps=2), Noting()

    class Loading(Classifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                rehearsal.buffer.save(tmp_path)
                rehearsal.load(tmp_path)

    trainer(rehearsal, logger=noting, max_epochs=2).fit(Loading(), loader())
    assert noting.noted == [(2, 16), (4, 20), (6, 20), (8, 20), (10, 20)]


def test_pytorch_lightning_too(made: Callable[..., Rehearsal]) -> None:
    """The same package under its older name, whose Trainer takes the callback as it is."""
    older = pytest.importorskip("pytorch_lightning")

    class Older(older.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.trained = nn.Linear(4, 3), []

        training_step = Classifier.__dict__["training_step"]
        configure_optimizers = Classifier.configure_optimizers

    rehearsal, module = made(), Older()
    older.Trainer(
        accelerator="cpu",
        callbacks=[rehearsal],
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    ).fit(module, loader())
    assert sizes(module.trained) == [8] + [11] * 4


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ritornello.integrations.lightning"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    older = importlib.import_module("pytorch_lightning")
    assert issubclass(importlib.import_module(name).Rehearsal, older.Callback)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(ImportError, match=r"pip install 'ritornello\[lightning\]'"):
        importlib.import_module(name)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_and_on_one(made: Callable[..., Rehearsal], tmp_path: Path) -> None:
    """Both examples, and checkpoints that two ranks have saved, loaded on two and on one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = Path(__file__).with_name("lightning_ranks.py")
    ran = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    averages = [float(each) for each in re.findall(r"average: ([\d.]+) %", ran.stdout)]
    assert len(averages) == 2
    assert min(averages) > 80.0
    assert ran.stdout.count("all is well on rank") == 2

    rehearsal = made(capacity=24)
    path = tmp_path / "lightning.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["Rehearsal"]
    assert sorted(state) == ["rank_0", "rank_1"]
    module = Classifier()
    rehearsal.begin_task("first")
    training = trainer(rehearsal, max_epochs=2, limit_train_batches=8)
    training.fit(module, DataLoader(floats(), batch_size=4), ckpt_path=path, weights_only=True)
    assert sizes(module.trained) == [7] * 8
    assert rehearsal.buffer.stats().held_per_rank == [24]
    assert len(rehearsal.buffer.tasks) == 1

    fabric = Fabric(accelerator="cpu", devices=1)
    with RehearsalBuffer(24, num_representatives=3) as buffer:
        fabric.load(tmp_path / "fabric.ckpt", {"buffer": buffer.whole}, strict=False)
        assert len(buffer) == 24


def floats() -> TensorDataset:
    images, labels = samples(64).tensors
    return TensorDataset(images.float(), labels)
