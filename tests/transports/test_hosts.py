"""Several hosts, as real as one machine can make them: see virtual_hosts.py and host_ranks.py."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from host_ranks import make_buffer, mini_batch
from torch import Tensor
from virtual_hosts import VirtualHost, torchrun, virtual_hosts, why_not

from ritornello.testing import run_ranks
from ritornello.transports import LocalTransport, Transport

SCRIPT = Path(__file__).with_name("host_ranks.py")
TIMEOUT_SECONDS = 3.0
FOREVER = 1_000_000


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if reason := why_not():
        pytest.skip(reason)


def start(
    hosts: Sequence[VirtualHost], ranks_per_host: Sequence[int], folder: Path, *options: object
) -> list[subprocess.Popen[str]]:
    return torchrun(hosts, ranks_per_host, SCRIPT, folder, *options)


def finish(jobs: Sequence[subprocess.Popen[str]], hosts: Sequence[VirtualHost]) -> str:
    """Waits for all; what they wrote. Nothing may go on running."""
    output = "\n".join(job.communicate(timeout=80)[0] for job in jobs)
    assert [host.processes() for host in hosts] == [[]] * len(hosts)
    return output


def run(
    hosts: Sequence[VirtualHost], ranks_per_host: Sequence[int], folder: Path, *options: object
) -> list[dict[str, Any]]:
    """Runs a job to its good end; what each rank has seen."""
    jobs = start(hosts, ranks_per_host, folder, *options)
    output = finish(jobs, hosts)
    assert all(job.returncode == 0 for job in jobs), output
    return seen_by(sum(ranks_per_host), folder)


def seen_by(num_ranks: int, folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(num_ranks)]


def await_step(folder: Path, step: int, jobs: Sequence[subprocess.Popen[str]]) -> None:
    """Waits until the training has come so far."""
    file = folder / "step"
    while not file.exists() or int(file.read_text() or 0) < step:
        assert all(job.poll() is None for job in jobs), [job.communicate()[0] for job in jobs]
        time.sleep(0.02)


def expected_batches(num_ranks: int, num_steps: int) -> list[list[tuple[Tensor, Tensor]]]:
    """The same on one host, with ranks as threads."""

    def rank_main(transport: Transport) -> list[tuple[Tensor, Tensor]]:
        with make_buffer(transport) as buffer:
            return [buffer.update(mini_batch(transport.rank, step)) for step in range(num_steps)]

    return run_ranks(LocalTransport.connect(num_ranks), rank_main)


def assert_same(
    batches: Sequence[tuple[Tensor, ...]], expected: Sequence[tuple[Tensor, ...]]
) -> None:
    assert len(batches) == len(expected) > 0
    for ours, theirs in zip(batches, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


CONNECT = """
import socket, sys, time
began = time.monotonic()
connection = socket.create_connection((sys.argv[1], 5000), timeout=1.0)
connected = time.monotonic() - began
connection.sendall(bytes(int(sys.argv[2])))
connection.shutdown(socket.SHUT_WR)
connection.recv(1)
print(connected, time.monotonic() - began)
"""
ACCEPT = """
import socket
server = socket.create_server(("", 5000))
while True:
    connection, _ = server.accept()
    with connection:
        while connection.recv(2**20):
            pass
"""


def test_the_network_is_as_slow_as_it_says_and_can_be_cut() -> None:
    with virtual_hosts(2) as (first, second):

        def connect(num_bytes: int = 0) -> tuple[float, float]:
            connected, sent = first.run(sys.executable, "-c", CONNECT, "host1", num_bytes).split()
            return float(connected), float(sent)

        server = second.start(sys.executable, "-c", ACCEPT)
        while "-c" not in str(second.processes()):
            time.sleep(0.01)
        time.sleep(0.3)
        connect()
        first.latency_seconds = second.latency_seconds = 0.02
        assert connect()[0] > 0.04
        first.bits_per_second = 8e6
        assert connect(400_000)[1] > 0.4
        second.is_cut = True
        with pytest.raises(AssertionError, match="timed out"):
            connect()
        second.is_cut = False
        second.set_link("down")
        with pytest.raises(AssertionError, match="timed out"):
            connect()
        second.set_link("up")
        connect()
    assert server.wait(timeout=5.0) != 0  # it ended with its host
    assert server.stdout is not None
    server.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks_per_host", "latency_seconds"),
    [([1, 1], 0.0), ([2, 1, 1], 0.0), ([1, 1, 1], 0.02)],
    ids=["2 hosts", "3 hosts, 2 ranks on one", "3 hosts, 20 ms apart"],
)
def test_hosts_give_what_one_process_gives(
    ranks_per_host: list[int], latency_seconds: float, tmp_path: Path
) -> None:
    num_ranks, num_steps = sum(ranks_per_host), 40
    with virtual_hosts(len(ranks_per_host), latency_seconds) as hosts:
        everyone = run(hosts, ranks_per_host, tmp_path, "--num-steps", num_steps)
        num_bytes = [host.num_bytes_sent for host in hosts]
    for seen, expected in zip(everyone, expected_batches(num_ranks, num_steps), strict=True):
        assert seen["num_hosts"] == len(ranks_per_host)
        assert_same(seen["batches"], expected)
        assert torch.equal(seen["weight"], everyone[0]["weight"])
    # The last rank is alone on its host: what it received came from the others.
    assert sum(num_bytes[:-1]) > everyone[-1]["bytes_received"] > 40 * num_steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "options"),
    [
        ("silence", ("--without-ddp", "--sampling", "class-balanced")),
        ("silence", ()),
        ("link down", ("--without-ddp",)),
    ],
    ids=["silence while gathering", "silence under DDP", "link down while exchanging"],
)
def test_a_cut_link_is_an_error_on_every_rank_within_the_timeout(
    failure: str, options: Sequence[str], tmp_path: Path
) -> None:
    ranks_per_host = [2, 1]
    options = [*options, "--timeout-seconds", str(TIMEOUT_SECONDS), "--pause-seconds", "0.01"]
    with virtual_hosts(2) as hosts:
        jobs = start(hosts, ranks_per_host, tmp_path, "--num-steps", FOREVER, *options)
        await_step(tmp_path, 30, jobs)
        cut_at = time.monotonic()
        if failure == "silence":
            hosts[1].is_cut = True
        else:
            hosts[1].set_link("down")
        output = finish(jobs, hosts)
    assert all(job.returncode == 1 for job in jobs), output
    assert "terminate called" not in output
    everyone = seen_by(3, tmp_path)
    for seen in everyone:
        assert seen["failed_at"] - cut_at < TIMEOUT_SECONDS + 3.0, seen["error"]
    if "--without-ddp" in options:
        for rank, seen in enumerate(everyone):
            assert seen["error"].startswith(f"PeerLostError: rank {rank}: round "), seen["error"]
            (peer,) = seen["peers"]
            assert f"rank {peer} sent nothing for 3 s (timeout_seconds)" in seen["error"]
        # A rank may have waited for its neighbour, which waited for the one out of reach.
        assert (2,) in (everyone[0]["peers"], everyone[1]["peers"])


@pytest.mark.long
@pytest.mark.timeout(240)  # three jobs
def test_training_goes_on_after_the_link_was_repaired(tmp_path: Path) -> None:
    num_steps, save_every = 60, 10
    saving = ("--save-every", save_every)
    with virtual_hosts(2) as hosts:
        broken = tmp_path / "broken"
        broken.mkdir()
        options = ("--pause-seconds", 0.05, "--timeout-seconds", TIMEOUT_SECONDS)
        jobs = start(hosts, [1, 1], broken, "--num-steps", FOREVER, *saving, *options)
        await_step(broken, 25, jobs)
        hosts[0].is_cut = True
        output = finish(jobs, hosts)
        assert all(job.returncode == 1 for job in jobs), output

        hosts[0].is_cut = False
        resumed = run(hosts, [1, 1], broken, "--num-steps", num_steps, *saving, "--resume")
        undisturbed = run(hosts, [1, 1], tmp_path, "--num-steps", num_steps)
    for seen, expected in zip(resumed, undisturbed, strict=True):
        assert seen["first"] in (20, 30)
        assert_same(seen["batches"], expected["batches"][seen["first"] :])
        assert torch.equal(seen["weight"], expected["weight"])
