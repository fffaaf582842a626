"""What the ranks of a run tell each other besides tensors, over a process group of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from ritornello.errors import CheckpointError


class Ranks:
    """All ranks of the default process group; one, if there is none.

    Every rank makes one, and calls its methods in the same order. The group is gloo's, so that
    nothing here waits for a GPU, and its own, so that what runs in the background meets nothing
    of the trainer's.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._group: Any = dist.new_group(backend="gloo") if self.num_ranks > 1 else None

    def tell(self, content: Any) -> Any:
        """Rank 0's content, on every rank."""
        if self._group is None:
            return content
        told = [content]
        dist.broadcast_object_list(told, src=0, group=self._group)
        return told[0]

    def gather(self, content: Any) -> list[Any]:
        """Every rank's content, on every rank."""
        if self._group is None:
            return [content]
        everyone = [None] * self.num_ranks
        dist.all_gather_object(everyone, content, group=self._group)
        return everyone

    def start_maximum(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Starts to take the maximum over the ranks, in the background.

        Returns:
            What waits for it, if need be, and gives it.
        """
        if self._group is None:
            return lambda: list(numbers)
        highest = torch.tensor(numbers, dtype=torch.int64)
        work: Any = dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._group, async_op=True)

        def outcome() -> list[int]:
            work.wait()
            return list(highest.tolist())

        return outcome

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """What is done inside fails on all ranks if it fails on one; blocks until all are done.

        Args:
            doing: how the message begins.

        Raises:
            CheckpointError: names the first rank that failed, and why.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        for rank, reason in enumerate(self.gather(own and (str(own) or type(own).__name__))):
            if reason is not None:
                where = f" (rank {rank})" if self.num_ranks > 1 else ""
                raise CheckpointError(f"{doing}{where}: {reason}") from own

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
