from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from language_model import (  # noqa: E402
    NUM_TOKENS,
    Gradients,
    Recorder,
    arguments,
    by_hand,
    make_buffer,
    sequences,
    tiny_model,
)
from transformers import Trainer  # noqa: E402

from ritornello import CheckpointError, RehearsalBuffer  # noqa: E402
from ritornello.integrations.transformers import FOLDER, Rehearsal  # noqa: E402
from ritornello.testing import run_ranks  # noqa: E402
from ritornello.transports import LocalTransport, Transport  # noqa: E402


class RehearsalTrainer(Recorder, Rehearsal, Trainer):
    pass


# TRL's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(autouse=True)
def state_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It is the process's own, and ends with the test; as does all else that frameworks leave."""
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # a thread
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def buffer() -> Iterator[RehearsalBuffer]:
    with make_buffer() as buffer:
        yield buffer


def trainer(folder: Path, buffer: RehearsalBuffer, **more: Any) -> Any:
    given = {"model": tiny_model(), "train_dataset": sequences(), "buffer": buffer}
    kind = more.pop("kind", RehearsalTrainer)
    others = {name: more.pop(name) for name in list(more) if name in ("callbacks", "eval_dataset")}
    own = {name: more.pop(name) for name in list(more) if name in ("model", "in_checkpoints")}
    return kind(args=arguments(folder, **more), **(given | others | own))


def equal(ours: list[list[Any]], theirs: list[list[Any]]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a[name], b[name])
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
        for name in a
    )


def weights(training: Any) -> Tensor:
    return torch.cat([each.detach().flatten() for each in training.model.parameters()])


@pytest.mark.parametrize("num_accumulated", [1, 2, 3])
def test_loss_and_gradient_are_those_of_a_plain_loop(
    buffer: RehearsalBuffer, tmp_path: Path, num_accumulated: int
) -> None:
    """By token, over all mini-batches of a step, the new samples' and the past ones'."""
    gradients = Gradients()
    training = trainer(
        tmp_path,
        buffer,
        callbacks=[gradients],
        gradient_accumulation_steps=num_accumulated,
        lr_scheduler_type="constant",
    )
    training.train()
    sizes = [len(batch["labels"]) for step in training.trained for batch in step]
    assert sizes == [4] + [8] * 21
    losses, expected = by_hand(training.trained, 0.1)
    assert len(gradients.found) == len(expected) == 2 * -(-11 // num_accumulated)
    for ours, theirs in zip(gradients.found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    logged = [each["loss"] for each in training.state.log_history if "loss" in each]
    assert logged == pytest.approx(losses, rel=1e-6)


class Classifier(nn.Module):
    """A model that is not told how many tokens there are: its loss is the mini-batch's mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4).double()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layer(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_models_that_take_the_mean_of_a_mini_batch(tmp_path: Path) -> None:
    images = torch.arange(60.0).double().view(20, 3) / 60
    data = [{"images": each, "labels": torch.tensor(i % 4)} for i, each in enumerate(images)]
    gradients = Gradients()
    with make_buffer(selection="class-balanced", label="labels") as buffer:
        training = trainer(tmp_path, buffer, model=Classifier(), callbacks=[gradients])
        training.train_dataset = data
        training.train()
    model = Classifier()
    first, second = training.trained[1]
    for batch in (first, second):
        assert len(batch["labels"]) == 8
    model.load_state_dict(Classifier().state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(model(**batch)["loss"] / 2 for batch in training.trained[0]).backward()
    expected = [each.grad for each in model.parameters()]
    for a, b in zip(gradients.found[0], expected, strict=True):
        torch.testing.assert_close(a, b)
    optimiser.step()


def test_only_training_is_augmented(buffer: RehearsalBuffer, tmp_path: Path) -> None:
    training = trainer(
        tmp_path, buffer, eval_dataset=sequences(8), eval_strategy="epoch", num_train_epochs=1
    )
    training.train()
    num_rounds = buffer.stats().num_rounds
    assert num_rounds == 11
    training.evaluate()
    training.predict(sequences(8))
    assert buffer.stats().num_rounds == num_rounds


def test_each_mini_batch_of_a_step_has_its_mask(buffer: RehearsalBuffer, tmp_path: Path) -> None:
    training = trainer(tmp_path, buffer, num_train_epochs=1)
    training.train()
    masks = [mask.tolist() for mask in training.masks]
    assert masks == [[False] * 4, *[[False] * 4 + [True] * 4] * 10]


def test_there_is_no_mask_but_in_training(buffer: RehearsalBuffer, tmp_path: Path) -> None:
    """Of 8 samples to evaluate, as many as a step trains on, none is past."""
    training = trainer(tmp_path, buffer, eval_dataset=sequences(8), num_train_epochs=1)
    training.train()
    with pytest.raises(RuntimeError, match=r"past_mask: no mini-batch is trained on.*training"):
        training.past_mask  # noqa: B018
    training.compute_loss = lambda *_, **__: training.past_mask
    with pytest.raises(RuntimeError, match="past_mask"):
        training.evaluate()


@pytest.mark.parametrize("name", ["DPOTrainer", "RewardTrainer"])
def test_trainers_of_pairs_are_refused(name: str, buffer: RehearsalBuffer) -> None:
    of_pairs = type(name, (Trainer,), {})
    rehearsing = type("Rehearsing", (Rehearsal, of_pairs), {})
    with pytest.raises(TypeError, match=rf"a mini-batch of {name} holds pairs.*shift"):
        rehearsing(None, None, buffer=buffer)


def test_what_is_no_trainer_of_hugging_face_is_refused(buffer: RehearsalBuffer) -> None:
    class Other:
        def training_step(self) -> None: ...

    class Rehearsing(Rehearsal, Other):
        pass

    with pytest.raises(TypeError, match=r"Rehearsing has no get_batch_samples, _save_optimizer"):
        Rehearsing(buffer=buffer)


@pytest.mark.parametrize("step", [3, 6, 8])
def test_it_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path, step: int) -> None:
    """In the midst of an epoch, at its end, and in the second one; with its order of samples."""
    more = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": step}
    with make_buffer() as buffer:
        whole = trainer(tmp_path, buffer, **more)
        whole.train()
    with make_buffer() as buffer:
        rest = trainer(tmp_path, buffer, **more)
        rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert equal(rest.trained, whole.trained[step:])
    assert torch.equal(weights(rest), weights(whole))


@pytest.mark.parametrize("more", [{"in_checkpoints": False}, {"save_only_model": True}])
def test_checkpoints_without_the_buffer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, more: dict[str, Any]
) -> None:
    saves = {"save_strategy": "steps", "save_steps": 4}
    with make_buffer() as buffer:
        trainer(tmp_path, buffer, **saves, **more).train()
    assert not (tmp_path / "checkpoint-4" / FOLDER).exists()
    with make_buffer() as buffer, caplog.at_level(logging.WARNING):
        trainer(tmp_path, buffer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "checkpoint-4 holds no buffer; it stays as it is" in caplog.text


class Bare:
    """What the mixin needs of a trainer."""

    def get_batch_samples(self, *given: Any) -> None: ...

    def training_step(self, *given: Any) -> None: ...

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None: ...

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None: ...


class BareTrainer(Rehearsal, Bare):
    pass


@pytest.mark.parametrize("finds_it", [0, 1])
def test_the_first_rank_says_whether_a_checkpoint_holds_the_buffer(
    finds_it: int, tmp_path: Path
) -> None:
    """On a file system that lags one rank may find it, and another not."""

    def rank_main(end: Transport) -> tuple[int, str]:
        checkpoint = tmp_path if end.rank == finds_it else tmp_path / "late"
        with RehearsalBuffer(20, num_representatives=1, transport=end, num_candidates=4) as buffer:
            buffer.update((4 * end.rank + torch.arange(4), torch.arange(4)))
            buffer.save(tmp_path / FOLDER)
            buffer.update((4 * end.rank + torch.arange(4), torch.arange(4)))
            try:
                BareTrainer(buffer=buffer)._load_optimizer_and_scheduler(str(checkpoint))
            except CheckpointError as error:
                return len(buffer), str(error)
            return len(buffer), ""

    for num_held, message in run_ranks(LocalTransport.connect(2, 20.0), rank_main):
        assert num_held == 16
        assert bool(message) == (finds_it == 0)


def test_a_buffer_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="buffer='50000': give a RehearsalBuffer"):
        trainer(tmp_path, "50000")  # type: ignore[arg-type]


def test_a_trainer_that_takes_mini_batches_past_it(buffer: RehearsalBuffer, tmp_path: Path) -> None:

    class Own(Trainer):
        def get_batch_samples(self, iterator: Iterator[Any], number: int, device: Any) -> Any:
            return [next(iterator) for _ in range(number)], None

    class Wrong(Rehearsal, Own):
        def get_batch_samples(self, *given: Any) -> Any:
            return Own.get_batch_samples(self, *given)

    with pytest.raises(RuntimeError, match="has not passed get_batch_samples"):
        trainer(tmp_path, buffer, kind=Wrong).train()


def test_samples_of_unequal_length_are_refused(buffer: RehearsalBuffer, tmp_path: Path) -> None:
    trainer(tmp_path, buffer).train()
    training = trainer(tmp_path, buffer)
    training.train_dataset = [{n: each[:5] for n, each in one.items()} for one in sequences(8)]
    with pytest.raises(ValueError, match=r"batch\['input_ids'\] is .*Pad, crop or resize"):
        training.train()


# TRL.


def tiny_tokenizer() -> Any:
    """Whose words are the numbers of the tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {str(number): number for number in range(NUM_TOKENS)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0")),
        pad_token="0",
        eos_token="1",
    )


def test_supervised_fine_tuning(tmp_path: Path) -> None:
    """TRL's trainer: gradients of a plain loop, and resuming bit for bit."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class FineTuning(Recorder, Rehearsal, trl.SFTTrainer):
        pass

    rows = [{n: each.tolist() for n, each in sample.items()} for sample in sequences()]
    data = datasets.Dataset.from_list(
        [{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows]
    )

    def fine_tuning(buffer: RehearsalBuffer, gradients: Gradients) -> Any:
        given = arguments(
            tmp_path,
            trl.SFTConfig,
            lr_scheduler_type="constant",
            save_strategy="steps",
            save_steps=3,
            bf16=False,
            max_length=8,
            pad_to_multiple_of=8,
        )
        return FineTuning(
            tiny_model(),
            given,
            train_dataset=data,
            processing_class=tiny_tokenizer(),
            buffer=buffer,
            callbacks=[gradients],
        )

    gradients = Gradients()
    with make_buffer() as buffer:
        whole = fine_tuning(buffer, gradients)
        whole.train()
    assert [len(batch["labels"]) for step in whole.trained for batch in step] == [4] + [8] * 21
    _, expected = by_hand(whole.trained, 0.1)
    for ours, theirs in zip(gradients.found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)  # its loss is in float32
    with make_buffer() as buffer:
        rest = fine_tuning(buffer, Gradients())
        rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(rest.trained, whole.trained[3:])
    assert torch.equal(weights(rest), weights(whole))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_and_on_one(tmp_path: Path) -> None:
    """The example, gradients and resuming on two ranks; and their checkpoint on one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = Path(__file__).with_name("transformers_ranks.py")
    ran = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    [average] = re.findall(r"average: ([\d.]+) %", ran.stdout)
    assert float(average) > 80.0
    assert ran.stdout.count("all is well on rank") == 2
    with make_buffer() as buffer:
        buffer.load(tmp_path / "checkpoint-2" / FOLDER)
        assert len(buffer) == 20
