"""Transports: what moves records between ranks. The only place that talks to other ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ritornello.transports.base import Transport, check_agreement
from ritornello.transports.collective import CollectiveTransport
from ritornello.transports.local import LocalTransport

__all__ = [
    "CollectiveTransport",
    "LocalTransport",
    "Transport",
    "check_agreement",
    "open_transport",
]


def open_transport(
    transport: str | Transport,
    process_group: dist.ProcessGroup | None,
    timeout_seconds: float,
    device: torch.device,
) -> Transport:
    """The transport with that name for the ranks of a group.

    Blocks until all ranks have called it.

    Args:
        transport: "auto", "local", "collective", or a transport made by the caller.
        process_group: None: the default group if there is one, else a single process.
        timeout_seconds: how long a peer may be silent.
        device: where the shards lie.

    Raises:
        ValueError: no such name; "local" for several ranks; "collective" without a group; or
            this process is not in the group.
        TypeError: neither a name nor a transport.
        PeerLostError: not all ranks came within the timeout.
    """
    if isinstance(transport, Transport):
        return transport
    if not isinstance(transport, str):
        raise TypeError(f"transport={transport!r}: give a name or a Transport")
    if transport not in ("auto", "local", "collective"):
        raise ValueError(f"transport={transport!r}: there are 'auto', 'local', 'collective'")
    distributed = dist.is_available() and dist.is_initialized()
    if process_group is not None and dist.get_rank(process_group) < 0:
        raise ValueError("process_group: this process is not one of its ranks")
    num_ranks = dist.get_world_size(process_group) if distributed else 1
    if transport == "local" and num_ranks > 1:
        raise ValueError(
            f"transport='local' serves a single process, but the group has {num_ranks} ranks: "
            "use 'auto' or 'collective'"
        )
    if transport == "collective" and not distributed:
        raise ValueError(
            "transport='collective' needs torch.distributed: call "
            "torch.distributed.init_process_group first, or use 'auto'"
        )
    if num_ranks == 1:
        return LocalTransport(timeout=timeout_seconds)
    return CollectiveTransport.beside(process_group, timeout_seconds, device)
