"""Where ranks meet: addresses and ports of every launcher, ports in use, and strangers at a port."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.distributed import rendezvous
from pipeline.distributed.places import Place
from pipeline.distributed.rendezvous import NUM_PORTS, SLURM_PORTS, MeetingPoint, first_host, meeting_point

ALONE_ON_A_NODE = Place(0, 2, 0, "environment", 2)


def test_a_launcher_may_name_the_meeting_point() -> None:
    explicit = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}
    assert meeting_point(Place(0, 2, 0, "environment"), explicit) == MeetingPoint("127.0.0.1", 1234)
    assert meeting_point(Place(0, 2, 0, "slurm"), {"MASTER_ADDR": "127.0.0.1"}).port == 29500
    assert f"child of {os.getppid()}" in meeting_point(ALONE_ON_A_NODE, explicit).launch


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT='x' is not a whole number"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "MASTER_PORT=0, expected a port from 1 to 65535"),
        ({"MASTER_ADDR": "", "MASTER_PORT": "1"}, "MASTER_ADDR='' is no host"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR='no.such.host.invalid' is no host"),
    ],
)
def test_a_wrong_variable_is_named(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        meeting_point(Place(0, 2, 0, "environment"), environment)


def test_under_slurm_ranks_meet_on_the_first_node_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Place(0, 2, 0, "slurm")
    one_node = meeting_point(slurm, {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"})
    assert one_node.address == "127.0.0.1"
    nodes = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2"}
    nodes |= {"SLURM_STEP_NODELIST": "n[03,05]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    known = {"n03": True}
    monkeypatch.setattr(rendezvous, "_resolves", lambda host: host in known)
    assert meeting_point(slurm, nodes).address == "n03"
    known = {"10.1.1.3": True}  # the name service does not know n03, Slurm does
    monkeypatch.setattr(rendezvous, "_command_output", lambda *command: "NodeName=n03\n   NodeAddr=10.1.1.3 Port=1")
    assert meeting_point(slurm, nodes).address == "10.1.1.3"
    monkeypatch.setattr(rendezvous, "_command_output", lambda *command: "")
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST='n.03,05.': its first node has no address"):
        meeting_point(slurm, nodes)


def test_steps_of_a_job_meet_at_different_ports_below_the_ephemeral_range() -> None:
    slurm = Place(0, 2, 0, "slurm")
    points = [
        meeting_point(slurm, {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(20)
        for step in range(20)
    ]
    ports = {point.port for point in points}
    assert len(ports) > 380  # of 400: few fall together by chance, and the next port is tried then
    assert min(ports) >= SLURM_PORTS.start and max(ports) + NUM_PORTS <= SLURM_PORTS.stop <= 32768
    assert len({point.launch for point in points}) == 400


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[03,07-09],login", "n03"),
        ("a,b[1,3],c", "a"),
        ("r[0-1]n[4-5]", "r0n4"),
        ("n[1-2]-ib", "n1-ib"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="Slurm's scontrol is not installed")
@settings(max_examples=25)
@given(
    st.lists(
        st.from_regex(r"[a-z]{1,3}(\[[0-9]{1,2}(,[0-9]{1,2})?\])?(x\[1-3\])?", fullmatch=True), min_size=1, max_size=3
    )
)
def test_first_host_is_scontrols(parts: list[str]) -> None:
    nodes = ",".join(parts)
    command = ["scontrol", "show", "hostnames", nodes]
    with tempfile.NamedTemporaryFile("w") as file:  # it asks for a configuration, whatever it is
        print("ClusterName=c\nSlurmctldHost=localhost\nNodeName=n\nPartitionName=p Nodes=n", file=file, flush=True)
        environment = {**os.environ, "SLURM_CONF": file.name}
        hosts = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert first_host(nodes) == hosts.stdout.split()[0]


@contextmanager
def listener() -> Iterator[int]:
    """A port that somebody listens on who is no store: he says nothing to anybody."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        server.settimeout(0.1)
        over = threading.Event()

        def accept() -> None:
            kept = []
            while not over.is_set():
                try:
                    kept.append(server.accept()[0])
                except TimeoutError:
                    pass
            for connection in kept:
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            over.set()
            thread.join()


def test_a_port_in_use_is_named() -> None:
    with listener() as port, pytest.raises(ValueError, match=rf"port {port} of .* is in use.*--master_port"):
        rendezvous._open_store(MeetingPoint("127.0.0.1", port))


def _find(point: MeetingPoint, results: multiprocessing.SimpleQueue) -> None:
    store, port = rendezvous._find(point, Place(1, 2, 1, "environment", 2), seconds=60)
    results.put((port, store.get("word")))


def test_all_ranks_take_the_next_port_where_one_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first port is somebody who is no store, at the second the store of another launch."""
    monkeypatch.setattr(rendezvous, "_ATTEMPT_SECONDS", 0.5)
    with listener() as port:
        other, _ = rendezvous._open_store(MeetingPoint("127.0.0.1", port, frozenset({"other", "4"})))
        point = MeetingPoint("127.0.0.1", port, frozenset({"this", "5"}))
        results = multiprocessing.get_context("fork").SimpleQueue()
        process = multiprocessing.get_context("fork").Process(target=_find, args=(point, results))
        process.start()
        store, taken = rendezvous._open_store(point)
        store.set("word", "found")
        assert taken >= port + 2 and results.get() == (taken, b"found")
        process.join()
        del other


def test_nobody_at_the_meeting_point() -> None:
    with socket.socket() as server:  # bound, so that nobody else listens there, and not listening
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=rf"no rank 0 at 127.0.0.1:{port} within 0.2 s"):
            rendezvous._find(MeetingPoint("127.0.0.1", port), Place(1, 2, 1, "environment"), seconds=0.2)


def test_a_process_alone_needs_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_store", None)
    assert rendezvous.meet(Place(0, 1, 0, "single"), {"MASTER_PORT": "nonsense"}).address == "127.0.0.1"
