"""Opens the transport that an argument names, for the ranks of a process group or a mesh."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ritornello.records.storage import Storage
from ritornello.transports.agreement import check_agreement
from ritornello.transports.base import Transport
from ritornello.transports.collective import CollectiveTransport
from ritornello.transports.launched import check_alone
from ritornello.transports.local import LocalTransport
from ritornello.transports.mpi import MpiTransport
from ritornello.transports.shared_memory import SharedMemoryTransport

DEFAULT_SECONDS = 1800.0
"""The timeout where no process group has one: PyTorch's own default."""

NAMES = ("auto", "local", "shared_memory", "collective", "mpi")


def open_transport(
    transport: str | Transport,
    process_group: dist.ProcessGroup | DeviceMesh | None,
    timeout_seconds: float | None,
    storage: Storage,
) -> Transport:
    """The transport with that name for the ranks of a group.

    Blocks until all ranks have called it.

    Args:
        transport: one of ``NAMES``, or a transport made by the caller. "auto": shared memory
            inside each host and "collective" between hosts, or "local" for a single process.
        process_group: or a device mesh of one dimension. None: the default group if there is
            one, else a single process.
        timeout_seconds: how long a peer may be silent; None: as long as in the group itself.
        storage: where the shards shall lie.

    Raises:
        ValueError: no such name; "local" for several ranks; "collective" or "shared_memory"
            without a group; "auto" without one where a launcher has started several ranks;
            "shared_memory" for several hosts or storage that cannot be
            shared; "mpi" for other ranks than the group's; a mesh of several dimensions; or this
            process is not in the group.
        TypeError: neither a name nor a transport; neither a group nor a mesh.
        ImportError: "mpi" without mpi4py.
        PeerLostError: not all ranks came within the timeout.
    """
    if isinstance(transport, Transport):
        return transport
    if not isinstance(transport, str):
        raise TypeError(f"transport={transport!r}: give a name or a Transport")
    if transport not in NAMES:
        raise ValueError(f"transport={transport!r}: there are {', '.join(map(repr, NAMES))}")
    distributed = dist.is_available() and dist.is_initialized()
    group = None if process_group is None else _group_of(process_group)
    if timeout_seconds is None:
        timeout_seconds = _timeout_of(group) if distributed else DEFAULT_SECONDS
    if transport == "mpi":
        return MpiTransport.beside(group, timeout_seconds, storage.device)
    num_ranks = dist.get_world_size(group) if distributed else 1
    if transport == "local" and num_ranks > 1:
        raise ValueError(
            f"transport='local' serves a single process, but the group has {num_ranks} ranks: "
            "use 'auto', 'shared_memory' or 'collective'"
        )
    if transport in ("collective", "shared_memory") and not distributed:
        raise ValueError(
            f"transport={transport!r} needs torch.distributed: call "
            "torch.distributed.init_process_group first, or use 'auto'"
        )
    if transport == "shared_memory" and not storage.can_be_shared:
        raise ValueError(
            f"transport='shared_memory' cannot read shards in storage={str(storage)!r}: use "
            "storage='shared' or 'file:DIR', or transport='collective'"
        )
    if num_ranks == 1:
        if transport == "auto" and not distributed:
            check_alone(os.environ)
        return LocalTransport(timeout=timeout_seconds)
    collective = CollectiveTransport.beside(group, timeout_seconds, storage.device)
    try:
        # What follows differs between these, and ranks that do not meet would wait in vain.
        check_agreement(collective, {"transport": transport, "storage": storage.kind})
        if transport == "collective" or not storage.can_be_shared:
            return collective
        return _share_memory(collective, required=transport == "shared_memory")
    except BaseException:
        collective.close()
        raise


def _timeout_of(group: dist.ProcessGroup | None) -> float:
    """The timeout of a group's collectives; the longest, where its devices have several."""
    own: Any = dist.group.WORLD if group is None else group
    timeouts = list[float]()
    for device in own._device_types:
        with suppress(RuntimeError, AttributeError):  # a backend without options
            timeouts.append(own._get_backend(device).options._timeout.total_seconds())
    return max(timeouts, default=DEFAULT_SECONDS)


def default_ranks() -> tuple[int, int]:
    """This rank in the default process group, and how many there are; 0 and 1 without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _group_of(process_group: Any) -> dist.ProcessGroup:
    """The group of the ranks that share a buffer."""
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(f"process_group: the mesh has {_axes_text(process_group)}")
        if process_group.get_coordinate() is None:
            raise ValueError("process_group: this process is not one of the mesh's ranks")
        group: dist.ProcessGroup = process_group.get_group()
        return group
    outside = process_group is dist.GroupMember.NON_GROUP_MEMBER  # what new_group gives to others
    if not outside and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group={process_group!r}: give a torch.distributed.ProcessGroup, or a "
            "DeviceMesh of one dimension"
        )
    if outside or dist.get_rank(process_group) < 0:
        raise ValueError("process_group: this process is not one of its ranks")
    member: dist.ProcessGroup = process_group
    return member


def _axes_text(mesh: DeviceMesh) -> str:
    names = mesh.mesh_dim_names
    if names is None:
        return (
            f"{mesh.ndim} axes without names, but a buffer's ranks lie along one: name them "
            "(mesh_dim_names=...), and give the data-parallel one, such as mesh['data_parallel']"
        )
    listed = ", ".join(f"'{name}' of {size}" for name, size in zip(names, mesh.shape, strict=True))
    return (
        f"the axes {listed}, but a buffer's ranks lie along one: give the data-parallel one, such "
        f"as mesh['{names[0]}']; if several are data-parallel, make them one: "
        f"mesh['{names[0]}', '{names[1]}']._flatten('all_data_parallel')"
    )


def _share_memory(collective: CollectiveTransport, required: bool) -> Transport:
    """Shared memory for the ranks that have a neighbour on their host, on top of a transport."""
    supported = collective.all_gather(np.array([SharedMemoryTransport.is_supported()]))
    if not supported.all():
        if required:
            where = np.flatnonzero(supported[:, 0] == 0).tolist()
            raise ValueError(
                f"transport='shared_memory': memory cannot be shared on rank(s) {where} (it needs "
                "Linux, with /proc and memfd_create): use 'auto' or 'collective'"
            )
        return collective
    shared = SharedMemoryTransport(collective)
    if required and shared.num_hosts > 1:
        shared.close()
        raise ValueError(
            f"transport='shared_memory' serves one host, but the ranks are on {shared.num_hosts} "
            "(or in containers that cannot see each other's memory): use 'auto', which takes "
            "shared memory inside each host and the network between them"
        )
    return shared if shared.num_hosts < shared.num_ranks else collective
