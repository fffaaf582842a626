"""A process group for the simulated accelerator: as NCCL's, it has streams of its own.

Gloo carries the bytes, between processes, each with a device of its own or not.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future


class _Work(dist._Work):
    """The caller's stream waits in ``wait``, the host never does."""

    def __init__(self, results: list[Tensor], done: torch.Event) -> None:
        super().__init__()
        self._results, self._done = results, done  # held until it is over, as NCCL does

    def wait(self, timeout: timedelta | None = None) -> bool:
        torch.accelerator.current_stream(self._results[0].device).wait_event(self._done)
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Future[list[Tensor]]:
        self.wait()
        future: Future[list[Tensor]] = Future()
        future.set_result(self._results)
        return future


class SimulatedGroup(dist.ProcessGroup):
    """What DDP and the collective transport ask for."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._streams: dict[torch.device, torch.Stream] = {}

    def _late(self, inputs: list[Tensor], outputs: list[Tensor], act: Callable[..., Any]) -> _Work:
        """Acts on copies in CPU memory, on the group's stream, behind the caller's."""
        device = inputs[0].device
        stream = self._streams.setdefault(device, torch.Stream(device))
        stream.wait_stream(torch.accelerator.current_stream(device))
        with torch.get_device_module(device).stream(stream):
            results = [torch.empty(each.shape, dtype=each.dtype) for each in outputs]
            act([each.cpu() for each in inputs], results)
            for output, result in zip(outputs, results, strict=True):
                output.copy_(result)
            return _Work([*outputs, *inputs], stream.record_event())

    def alltoall_base(
        self, output: Tensor, values: Tensor, to: list[int], of: list[int], *options: Any
    ) -> Any:
        def act(inputs: list[Tensor], outputs: list[Tensor]) -> None:
            if self.size() == 1:
                outputs[0].copy_(inputs[0])
            else:
                self._gloo.alltoall_base(outputs[0], inputs[0], to, of).wait()

        if output.device.type == "cpu":
            return self._gloo.alltoall_base(output, values, to, of)
        return self._late([values], [output], act)

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        options = options or dist.AllreduceOptions()

        def act(inputs: list[Tensor], outputs: list[Tensor]) -> None:
            self._gloo.allreduce(inputs, options).wait()
            for output, each in zip(outputs, inputs, strict=True):
                output.copy_(each)

        if tensors[0].device.type == "cpu":
            return self._gloo.allreduce(tensors, options)
        return self._late(tensors, tensors, act)

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> Any:
        def act(inputs: list[Tensor], outputs: list[Tensor]) -> None:
            self._gloo.broadcast(inputs, options).wait()
            for output, each in zip(outputs, inputs, strict=True):
                output.copy_(each)

        if tensors[0].device.type == "cpu":
            return self._gloo.broadcast(tensors, options)
        return self._late(tensors, tensors, act)

    def allgather(self, outputs: list[list[Tensor]], tensors: list[Tensor], *options: Any) -> Any:
        if tensors[0].device.type == "cpu":
            return self._gloo.allgather(outputs, tensors)
        return self._late(
            tensors, outputs[0], lambda of, into: self._gloo.allgather([into], of).wait()
        )

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> Any:
        return self._gloo.send(tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> Any:
        return self._gloo.recv(tensors, peer, tag)

    def barrier(self, options: Any = None) -> Any:
        return self._gloo.barrier()

    def getBackendName(self) -> str:  # noqa: N802  (PyTorch's name)
        return "simulated"

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names.get(self, "simulated")


def register() -> None:
    """Makes it the default backend for the simulated device."""
    if "simulated" not in dist.Backend.backend_list:
        dist.Backend.register_backend("simulated", SimulatedGroup, devices=["sim"])
