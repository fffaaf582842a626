"""What moves records between ranks; ``Transport`` is the contract."""

from ritornello.transports.base import Transport
from ritornello.transports.collective import CollectiveTransport
from ritornello.transports.local import LocalTransport
from ritornello.transports.mpi import MpiTransport
from ritornello.transports.opening import open_transport
from ritornello.transports.shared_memory import SharedMemoryTransport

__all__ = [
    "CollectiveTransport",
    "LocalTransport",
    "MpiTransport",
    "SharedMemoryTransport",
    "Transport",
    "open_transport",
]
