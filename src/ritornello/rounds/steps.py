"""The trainer's side of the rounds: one step after another.

A step takes what the last round has staged, joins it with the mini-batch, copies the candidates and
starts the next round, which as a rule the worker runs. All of it runs on the trainer's thread, but
for ``prepare``, which ``rehearse`` calls on a thread of its own.

An exception out of a signal handler may come at any moment on the trainer's thread, and passes
through. So where the steps are is one object, and to replace it one store: before it the step did
not happen, behind it the worker ends the round whatever comes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from ritornello.policies.selection import check_labels
from ritornello.records import accelerators
from ritornello.records.coding import Coding, Drawn
from ritornello.records.layout import Layout, Values
from ritornello.records.nesting import Batch, leaves_of, path_text
from ritornello.records.paging import Records
from ritornello.records.storage import Storage
from ritornello.rounds.arguments import Arguments, plain
from ritornello.rounds.first_batch import Begun, device_of, understood
from ritornello.rounds.joining import Outputs
from ritornello.rounds.round import Rounds
from ritornello.rounds.staging import Candidates, Staging, WorkerStreams
from ritornello.rounds.waiting import GRACE_SECONDS, Place, Waiting
from ritornello.rounds.watching import Training
from ritornello.rounds.worker import Errand, Pace, Worker
from ritornello.transports.watch import Watch


class Steps(Waiting):
    """One rank's steps.

    Args:
        arguments: of the buffer, checked.
        rounds: what the worker runs.
        worker: that runs them.
        storage: where the shard lies.
        timeout_seconds: how long a round may take.
        watch: over what ranks do together; None for a single one.
        asynchronous: whether the trainer goes on while a round runs; "auto": or, where that is
            quicker, runs it itself.
        coding: between the form of a sample that is trained on and the one that is stored.

    Attributes:
        arguments: of the buffer.
        begun: what the first mini-batch has fixed; None before it.
        rate: ``r`` of the rounds to come.
        num_candidates: ``c`` of the mini-batches to come; 0: none of them is offered.
        training: what it gets.
        num_rounds_here: how many ran on the trainer's own thread.
        seconds_here: that these took.
    """

    def __init__(
        self,
        arguments: Arguments,
        rounds: Rounds,
        worker: Worker,
        storage: Storage,
        timeout_seconds: float,
        watch: Watch | None = None,
        asynchronous: bool | str = True,
        coding: Coding | None = None,
    ) -> None:
        super().__init__(rounds, worker, timeout_seconds, watch)
        self._run = rounds.run if watch is None else watch.run
        self.arguments, self._storage = arguments, storage
        self._asynchronous = asynchronous
        self._candidates = Candidates(arguments.seed, rounds.transport.rank)
        self._worker_streams: WorkerStreams = {}
        self.begun: Begun | None = None
        self.outputs = Outputs(coding or Coding(), arguments.num_draws)
        self._pace = Pace(asynchronous is not False)
        self._num_new_joined = self._num_joined = 0
        self.rate: float = plain(arguments.num_representatives)
        self.num_candidates = arguments.num_candidates
        self.training = Training(arguments, rounds, self.here)
        self._advice: str | None = None  # in errors; None: the trainer's first batch has come
        self.seconds_offering = self.seconds_copying = 0.0
        self.num_rounds_here, self.seconds_here = 0, 0.0

    @property
    def num_past(self) -> int:
        """Representatives in what the trainer got last; see ``RehearsalBuffer.num_past``."""
        return self._place.num_past

    @property
    def num_staged(self) -> int:
        """Representatives for the next step, once the round has ended."""
        return self._place.last_round.result

    # In a step.

    def prepare(self, batch: Batch, call: str, offered: Batch | None = None) -> Batch:
        """``update`` up to the round: joins, and copies the candidates.

        ``rehearse`` calls it on a thread of its own, a step ahead. To the trainer, and to what is
        saved, nothing has happened yet.

        Args:
            batch: the mini-batch.
            call: in which it is.
            offered: the mini-batch that is encoded, if it is another one: where the loader put it.
        """
        began = time.perf_counter()
        outputs, coding = self.outputs, self.outputs.coding
        seconds_otherwise = self.seconds_waited + outputs.seconds + self.seconds_offering
        stored = batch
        if coding.encodes:
            stored = coding.encoded(batch if offered is None else offered)
        begun, leaves, samples = self._checked(stored)
        given = leaves
        if not coding.is_none:
            try:
                given = outputs.understood(begun, batch, leaves)
            except (TypeError, ValueError) as error:
                raise self.with_rank(error) from None
        staged = self._staged(call)
        if staged is None:
            augmented = outputs.alone(begun, batch, given)
        elif coding.is_none:
            augmented = outputs.joined(begun, leaves, samples, staged)
        else:
            draws = self._decoded() if coding.decodes else outputs.copies(begun, staged)
            try:
                augmented = outputs.joined_with(begun, given, draws, len(staged))
            except (TypeError, ValueError) as error:
                raise self.with_rank(error) from None
        self._copy_candidates(begun.staging, leaves, samples)
        self._num_new_joined = leaves[0].shape[0]
        seconds_otherwise -= self.seconds_waited + outputs.seconds + self.seconds_offering
        self.seconds_offering += time.perf_counter() - began + seconds_otherwise
        return augmented

    def draw(self, call: str) -> list[Batch] | None:
        """Copies of one step's representatives, a batch for each draw; None if there are none."""
        staged = self._staged(call)
        drawn = None
        if staged is not None:
            begun, decodes = self._known, self.outputs.coding.decodes
            drawn = self._decoded() if decodes else self.outputs.copies(begun, staged)
            if decodes:  # where they are trained on
                tensors = [leaf for _, leaf in leaves_of(drawn) if isinstance(leaf, Tensor)]
                self.outputs.device = device_of(tensors)
            begun.staging.release()
        self._num_new_joined = 0
        self.training.optimisers.num_steps = 0
        self._place = self._place._replace(
            is_offered=False, num_new=0, num_past=self._num_joined, drawn=Drawn()
        )
        return drawn

    def offer(self, batch: Batch) -> None:
        """Copies the candidates, and starts the round.

        Raises:
            RuntimeError: the last ones have not been drawn.
        """
        if self._place.is_offered:
            raise RuntimeError(
                "offer: the last offer's representatives have not been drawn yet; draw and "
                "offer alternate (to store samples without training, call fill)"
            )
        began = time.perf_counter()
        begun, leaves, samples = self._checked(self.outputs.coding.encoded(batch))
        self._copy_candidates(begun.staging, leaves, samples)
        self.seconds_offering += time.perf_counter() - began
        self.start_round(may_run_here=True)

    def start_round(self, may_run_here: bool = False) -> None:
        """Starts the round of the candidates that were copied.

        Args:
            may_run_here: whether it may run at once, on this thread, where that is quicker.
        """
        began = time.perf_counter()
        # What `rehearse` has prepared becomes the trainer's only now.
        next_round = self._start(
            self.rate, self._num_new_joined, self._num_joined, Drawn(), may_run_here
        )
        self.training.got(self._num_joined, self._place.num_offers, self.rate)
        if self._asynchronous is False:
            self._worker.finish(next_round, self._timeout_seconds + GRACE_SECONDS)
        self.seconds_offering += time.perf_counter() - began

    def _start(
        self,
        rate: float,
        num_new: int,
        num_past: int,
        drawn: Drawn | None = None,
        may_run_here: bool = False,
    ) -> Errand[int]:
        """From one store on the step has happened, and the round will run.

        Args:
            rate: of the round.
            num_new: of the step.
            num_past: of the step.
            drawn: gets what is drawn as it is trained on; None: for who asks.
            may_run_here: see ``start_round``.
        """
        self.rounds.rate = rate
        pause = self._pace.pause(time.perf_counter(), self._place.last_round.seconds)
        staging, decodes = self._known.staging, self.outputs.coding.decodes
        runs_here = may_run_here and self._is_quicker_here
        candidates = staging.candidates()
        run: Callable[[], int]
        if runs_here:
            run = partial(self.rounds.run_once, self.rounds.num_rounds, candidates)
        else:
            run = partial(_run_and_look_ahead, self._run, candidates, self._candidates)
            if drawn is not None and decodes:
                run = partial(self._run_and_decode, run, drawn)
        # Not kept in a name: a frame that holds itself would hold the mini-batch, too.
        next_round = Errand(
            run, 0.0 if runs_here else pause, sys._getframe() if runs_here else None
        )
        drawn = drawn or Drawn()
        self._place = Place(self._place.num_offers + 1, True, num_new, num_past, next_round, drawn)
        if runs_here:
            try:
                next_round.attempt()
            except Exception:  # the round's own, which the worker meets, too; or a handler's
                next_round.give_up_attempt()
                self.settle()
                raise
            self.num_rounds_here += 1
            self.seconds_here += next_round.seconds
        else:
            self._worker.start(next_round)
        return next_round

    @property
    def _is_quicker_here(self) -> bool:
        """Whether the trainer runs its rounds itself."""
        return (
            self._asynchronous == "auto"
            and self._pace.is_brief
            and not self.outputs.coding.decodes
            and self._known.staging.runs_at_once
            and self.rounds.can_be_repeated
        )

    def _run_and_decode(self, run: Callable[[], int], drawn: Drawn) -> int:
        """A round, and behind it what the trainer would wait for; on the worker's thread."""
        num_staged = run()
        if num_staged:
            self.rounds.stage = "decode"
            with suppress(Exception):  # it is raised where the trainer asks for them
                drawn.decoded = self.outputs.decoded(self._known, num_staged)
        return num_staged

    def _decoded(self) -> list[Batch]:
        """What is staged as it is trained on, a batch for each draw; once the round has ended."""
        drawn = self._place.drawn
        if drawn.decoded is None:
            decode = partial(self.outputs.decoded, self._known, self.num_staged)
            drawn.decoded = self.between_rounds(decode)
        return drawn.decoded.taken()

    def past_mask(self) -> Tensor:
        """See ``RehearsalBuffer.past_mask``."""
        num_new, num_past = self._place.num_new, self._place.num_past
        return torch.arange(num_new + num_past, device=self.trainer_device) >= num_new

    def drop_prepared(self) -> None:
        """Drops what ``prepare`` has copied."""
        if self.begun is not None:
            self.begun.staging.drop_collected()

    def _staged(self, call: str) -> Tensor | None:
        """Waits for the round; one step's representatives as records, None if there are none.

        Raises:
            RuntimeError: the sampling policy needs to be told of tasks, and knows none.
        """
        if not self._place.is_offered:
            if not self._place.num_offers:
                return None
            self._offer_nothing(call)
        self.settle()
        num_staged = self._place.last_round.result
        if not num_staged:
            self.training.check_tasks(call, self._place.num_offers)
        self._num_joined = num_staged
        return self._known.staging.take(num_staged) if num_staged else None

    def _offer_nothing(self, call: str) -> None:
        """Starts the round of a step that has drawn and offered nothing, such as one that failed.

        So a rank takes part in as many rounds as it draws, whatever becomes of its steps.
        """
        self.training.has_left_out_an_offer(call)
        self.drop_prepared()
        self.start_round()

    def _copy_candidates(self, staging: Staging, leaves: list[Tensor], samples: Values) -> None:
        began = time.perf_counter()
        rows = self._candidates.rows(self.num_offers, leaves[0].shape[0], self.num_candidates)
        staging.collect(leaves, samples, rows)
        self.seconds_copying += time.perf_counter() - began

    def _checked(self, batch: Batch) -> tuple[Begun, list[Tensor], Values]:
        """A mini-batch's leaves, and their values; the first one fixes what ``Begun`` says."""
        try:
            begun = self.begun
            if begun is None:
                layout, leaves = understood(batch, self.arguments, self._transport.num_ranks)
                label = layout.label_position(self.arguments.label_path, self.rounds.needs_labels)
                begun = self._begin(device_of(leaves), layout, label)
                if self.rounds.among_others is not None:
                    self.rounds.among_others.note(leaves)
            else:
                leaves = begun.layout.leaves(batch)
                if self._advice is not None:
                    begun = self._meet(batch, begun, leaves)
            samples = begun.layout.values_of(leaves)
            if self.rounds.needs_labels and begun.label is not None:
                labels, given = samples[begun.label], leaves[begun.label]
                # On a device, reading the labels would make the trainer wait: the worker does it.
                if labels is None and (given.is_cpu or not begun.staging.on_gpu):
                    labels = given.cpu().numpy()
                if labels is not None:
                    check_labels(labels, self.rounds.selection.num_classes)
        except (TypeError, ValueError) as error:
            raise self.with_rank(error, self._advice or "") from None
        return begun, leaves, samples

    @property
    def trainer_device(self) -> torch.device:
        """Where mini-batches are; the CPU before the first one."""
        if self.outputs.device is not None:
            return self.outputs.device
        return torch.device("cpu") if self.begun is None else self.begun.staging.trainer_device

    @property
    def _known(self) -> Begun:
        assert self.begun is not None
        return self.begun

    def _begin(
        self, device: torch.device, layout: Layout, label: int | None, staged: Records | None = None
    ) -> Begun:
        begun = Begun.on(device, layout, label, self.arguments, self._storage, self._worker_streams)
        if self.rounds.among_others is not None:
            self.rounds.among_others.begin()
        if staged is not None:
            begun.staging.put_back(staged)
        opened = partial(self.rounds.open, layout, label, begun.identity, begun.staging)
        if self._worker.is_calling:
            opened()
        else:  # an interrupt shall not leave it half done
            self.between_rounds(opened)
        self.begun = begun
        return begun

    def _meet(self, batch: Batch, begun: Begun, leaves: list[Tensor]) -> Begun:
        """Learns from the first mini-batch after a load what is not saved."""
        layout, device = begun.layout.nested_as(batch), device_of(leaves)
        if device == begun.staging.trainer_device:
            begun.layout = layout
        else:
            self.settle()
            begun = self._begin(device, layout, begun.label, self.staged_records())
        self._advice = None
        return begun

    def change_rate(self, rate: float) -> None:
        """Says how many are drawn from the next round on.

        Raises:
            ValueError, TypeError: they cannot be.
        """
        try:
            self.rate = self.arguments.changed_rate(rate)
            self.training.is_rate_set = True
        except (TypeError, ValueError) as error:
            raise self.with_rank(error) from None

    def settle(self) -> None:
        """See ``Waiting.settle``."""
        super().settle()
        if self.rounds.selection.excess_labels and self.begun is not None:
            label = self.begun.label
            assert label is not None
            self.training.has_many_labels(path_text(self.begun.layout.fields[label].path))

    def finish(self, wait_seconds: float) -> None:
        """See ``Waiting.finish``."""
        self.training.optimisers.close()
        super().finish(wait_seconds)

    # For who fills it.

    def collect(self, batch: Batch) -> int:
        """Makes every sample of a mini-batch a candidate of the next round; how many there are.

        Raises:
            TypeError, ValueError: it is not like the first one.
        """
        self.settle()
        advice = "" if self.begun is None else self._advice
        begun, leaves, samples = self._checked(self.outputs.coding.encoded(batch))
        self._advice = advice  # the trainer's own may be on a device
        begun.staging.collect(leaves, samples, None)
        return leaves[0].shape[0]

    def start_between_steps(self, rate: float) -> None:
        """Starts a round whose draw takes the place of what the next step was to get.

        Args:
            rate: of this round alone, where it may change.
        """
        self._start(rate, self._place.num_new, self._place.num_past)

    # For who saves and restores it.

    def staged_records(self) -> Records:
        """A copy of what is staged for the next step, in CPU memory."""
        return self._known.staging.staged(self.num_staged)

    def begin_restored(
        self, layout: Layout, label: int | None, on_gpu: bool, advice: str = ""
    ) -> None:
        """Begins with a layout that is known from elsewhere, before any mini-batch.

        Args:
            layout: of the records.
            label: the position of the label among the fields.
            on_gpu: whether mini-batches were on an accelerator there.
            advice: for the error if the first mini-batch is of another form.

        Raises:
            MemoryError: its records do not fit.
        """
        if self.begun is not None:  # some ranks may know it from a mini-batch that was refused
            return
        device = torch.device("cpu")
        if on_gpu and accelerators.is_available():  # the first draw may come before any mini-batch
            device = accelerators.current_device()
        self._begin(device, layout, label)
        self._advice = advice

    def forget_restored(self) -> None:
        """As before ``begin_restored``."""
        self.begun = self._advice = self.rounds.shard = self.rounds.paged = None

    def go_on(
        self, num_rounds: int, is_offered: bool, staged: Records, rate: float, most_drawn: int
    ) -> None:
        """Takes the place of a buffer after some rounds, with what it had staged, and its rate."""
        self.rate, self.rounds.most_drawn = rate, most_drawn
        self._known.staging.put_back(staged)
        self._num_new_joined = self._num_joined = 0
        last_round = Errand.ended(len(staged.rows))
        self._place = Place(num_rounds, is_offered, 0, 0, last_round, Drawn())

    def draw_again(self, rate: float) -> None:
        """Has a round run without candidates, for what the next step draws.

        Args:
            rate: of this round alone, where it may change.
        """
        if self.is_offered:
            self.drop_prepared()
            self.start_between_steps(rate)


def _run_and_look_ahead(
    run: Callable[[Records], int], candidates: Records, choice: Candidates
) -> int:
    """A round, and behind it the next choice; holds nothing of the trainer's."""
    num_staged = run(candidates)
    choice.look_ahead()
    return num_staged
