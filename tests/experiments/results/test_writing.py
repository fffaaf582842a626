"""What is written down of a run that has not measured everything."""

from __future__ import annotations

from ritornello.experiments.results.writing import StepSeconds, TaskLog, outcome_of


def test_a_run_that_an_earlier_release_has_begun_tells_no_losses() -> None:
    log = TaskLog(
        at_start=([0.1, 0.1], [0.5, 0.5]),
        top1=[[0.9, 0.1], [0.8, 0.7]],
        top5=[[1.0, 0.5], [1.0, 1.0]],
        loss=[[0.6, 0.4]],  # after the second task alone
        seconds=[1.0, 1.0],
        steps=[10, 10],
    )
    told = {"loss", "average_loss", "forgetting_in_loss"}
    assert not told & set(outcome_of(log, StepSeconds()))
    log.loss.insert(0, [0.3, 2.0])
    assert told <= set(outcome_of(log, StepSeconds()))


def test_a_loss_that_has_diverged_is_not_left_out_of_means() -> None:
    log = TaskLog(
        at_start=([0.1, 0.1], [0.5, 0.5]),
        top1=[[0.9, 0.1], [0.1, 0.7]],
        top5=[[1.0, 0.5], [0.5, 1.0]],
        loss=[[0.3, 2.0], [None, 0.4]],
        seconds=[1.0, 1.0],
        steps=[10, 10],
    )
    outcome = outcome_of(log, StepSeconds())
    assert outcome["average_loss"] is outcome["forgetting_in_loss"] is None
    log.top1[1][0] = None  # its test samples are gone: the means are over the others
    assert outcome_of(log, StepSeconds())["average_loss"] == 0.4
