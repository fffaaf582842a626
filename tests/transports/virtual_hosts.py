"""Hosts on one machine, joined by a network that can be slow, narrow or cut.

Each host is a set of Linux namespaces: its own processes, host name, shared memory and interface
``eth0``. What it sends comes out of its TUN device in this process, where a thread passes it on to
the host that has the address: late (latency), one packet after the other (bandwidth), or never (a
cut). So it needs no root, no netem, and no name that another run could have taken. A host ends
with the process that made it, however that ends, and takes all its processes along.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import heapq
import itertools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

NETWORK = "10.91.7."
MTU = 9000
QUEUE_SECONDS = 0.2
"""How long a packet may wait for those before it, where bandwidth is limited; else it is lost."""

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class VirtualHost:
    """One host of ``virtual_hosts``.

    Attributes:
        name: its host name, which the others can resolve.
        address: of its ``eth0``.
        latency_seconds: what each of its packets takes to the other host, one way.
        bits_per_second: the bandwidth of what it sends; None: no limit.
        num_bytes_sent: so far, to the others.
        is_cut: all that it sends, and all that is sent to it, is lost without a trace, as with a
            pulled cable.
    """

    def __init__(self, number: int, names_file: Path) -> None:
        self.name = f"host{number}"
        self.address = f"{NETWORK}{number + 1}"
        self.latency_seconds = 0.0
        self.bits_per_second: float | None = None
        self.is_cut = False
        self.num_bytes_sent = 0
        self.sends_until = 0.0
        here, there = socket.socketpair()
        with here, there:
            # --map-root-user: so that anybody may make the other namespaces.
            self._first = subprocess.Popen(
                ["unshare", "--user", "--map-root-user", "--net", "--pid", "--mount", "--uts",
                 "--ipc", "--mount-proc", "--fork", "--kill-child", sys.executable, __file__,
                 self.name, self.address, str(names_file), str(there.fileno())],
                pass_fds=[there.fileno()],
                stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
            there.close()
            _, devices, _, _ = socket.recv_fds(here, 1, 1)
            if not devices:
                _, complaint = self._first.communicate()
                raise OSError(
                    f"a virtual host cannot be made: {complaint.strip().splitlines()[-1]}"
                )
            self.device = devices[0]
            self._life = here.dup()

    def start(self, *command: object, **environment: object) -> subprocess.Popen[str]:
        """Starts a command in the host; its output is one text."""
        first = f"/proc/{self._first.pid}/ns"
        return subprocess.Popen(
            ["nsenter", f"--user={first}/user", f"--net={first}/net", f"--mount={first}/mnt",
             f"--uts={first}/uts", f"--ipc={first}/ipc", f"--pid={first}/pid_for_children",
             "--preserve-credentials", *map(str, command)],
            env=os.environ | {name: str(value) for name, value in environment.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    def run(self, *command: object, seconds: float = 30.0) -> str:
        """Runs a command in the host; its output."""
        with self.start(*command) as process:
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert process.returncode == 0, output
        return output

    def set_link(self, state: str) -> None:
        """Sets ``eth0`` "up" or "down", as its own administrator would."""
        self.run("ip", "link", "set", "eth0", state)

    def processes(self) -> list[str]:
        """The command lines of what runs in the host, without its first process."""
        namespace = os.readlink(f"/proc/{self._first.pid}/ns/pid_for_children")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_text().replace("\0", " ")
                if os.readlink(process / "ns/pid") == namespace and __file__ not in command:
                    found.append(command)
        return found

    def close(self) -> None:
        """Ends the host, and with it all that runs in it."""
        self._life.close()
        self._first.communicate()
        os.close(self.device)


@contextlib.contextmanager
def virtual_hosts(
    num_hosts: int, latency_seconds: float = 0.0, bits_per_second: float | None = None
) -> Iterator[list[VirtualHost]]:
    """Hosts that reach each other by name and address.

    Raises:
        OSError: this system cannot make them; says why.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        names_file = Path(folder) / "hosts"
        names = [f"{NETWORK}{number + 1} host{number}\n" for number in range(num_hosts)]
        names_file.write_text("127.0.0.1 localhost\n" + "".join(names))
        hosts = []
        for number in range(num_hosts):
            hosts.append(VirtualHost(number, names_file))
            stack.callback(hosts[-1].close)
            hosts[-1].latency_seconds = latency_seconds
            hosts[-1].bits_per_second = bits_per_second
        closing = threading.Event()
        switch = threading.Thread(target=_carry, args=(hosts, closing), daemon=True)
        switch.start()
        stack.callback(switch.join)
        stack.callback(closing.set)
        yield hosts


@functools.cache
def why_not() -> str | None:
    """Why this system cannot make virtual hosts; None if it can."""
    try:
        with virtual_hosts(1) as (host,):
            host.run("true")
    except (OSError, AssertionError) as error:
        return str(error)
    return None


def torchrun(
    hosts: Sequence[VirtualHost], ranks_per_host: Sequence[int], *command: object
) -> list[subprocess.Popen[str]]:
    """Starts a job over all hosts, as its user would: one torchrun on each."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return [
        host.start(
            *launcher, "--nnodes", len(hosts), "--node-rank", number,
            "--nproc-per-node", num_ranks, "--master-addr", hosts[0].name,
            "--master-port", 29500, *command,
            OMP_NUM_THREADS=1,
        )
        for number, (host, num_ranks) in enumerate(zip(hosts, ranks_per_host, strict=True))
    ]  # fmt: skip


def _carry(hosts: Sequence[VirtualHost], closing: threading.Event) -> None:
    """Passes packets on from host to host."""
    of_address = {socket.inet_aton(host.address): host for host in hosts}
    under_way: list[tuple[float, int, VirtualHost, bytes]] = []
    count = itertools.count()
    while not closing.is_set():
        pause = min(0.05, under_way[0][0] - time.monotonic()) if under_way else 0.05
        readable, _, _ = select.select([host.device for host in hosts], [], [], max(0.0, pause))
        now = time.monotonic()
        for host in hosts:
            if host.device not in readable:
                continue
            packet = os.read(host.device, MTU)
            receiver = of_address.get(packet[16:20])
            if receiver is None or host.is_cut or host.sends_until > now + QUEUE_SECONDS:
                continue
            host.num_bytes_sent += len(packet)
            host.sends_until = max(now, host.sends_until)
            if host.bits_per_second is not None:
                host.sends_until += 8 * len(packet) / host.bits_per_second
            arrival = host.sends_until + host.latency_seconds
            heapq.heappush(under_way, (arrival, next(count), receiver, packet))
        while under_way and under_way[0][0] <= now:
            _, _, receiver, packet = heapq.heappop(under_way)
            if not receiver.is_cut:
                with contextlib.suppress(OSError):  # its link is down
                    os.write(receiver.device, packet)


def _be_a_host(name: str, address: str, names_file: str, life: str) -> None:
    """What a host's first process does: sets it up, and waits for the end."""
    socket.sethostname(name)
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TUN | IFF_NO_PI))
    for command in (
        f"mount --bind {names_file} /etc/hosts",
        "ip link set lo up",
        f"ip address add {address}/24 dev eth0",
        f"ip link set eth0 mtu {MTU} up",
    ):
        subprocess.run(command.split(), check=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody else waits for orphans
    with socket.socket(fileno=int(life)) as connection:
        socket.send_fds(connection, [b"."], [device])
        os.close(device)
        connection.recv(1)


if __name__ == "__main__":
    _be_a_host(*sys.argv[1:])
