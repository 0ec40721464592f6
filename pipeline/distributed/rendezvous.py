"""Where the ranks meet in any launcher's environment, and the process group that they make there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist

from pipeline.distributed.places import Place, number

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500
SLURM_PORTS = range(20_000, 32_000)  # below the range from which Linux gives ports to whoever asks for any
NUM_PORTS = 16  # tried from the first one on
MEETING_SECONDS = 600.0
SILENCE = timedelta(minutes=30)  # of a collective, until the rank that does not answer is taken for hanging
_ATTEMPT_SECONDS, _REMIND_SECONDS = 3.0, 30.0
_GREETING, _MAX_GREETING_BYTES = "OpenFLM", 4096


class Meeting(NamedTuple):
    """The store at which all ranks of a launch meet, and where rank 0 is."""

    store: dist.Store
    address: str


@dataclass(frozen=True)
class MeetingPoint:
    """Address and port, and what tells this launch from others: where it is known, a port in use means the next one.

    Two ranks are of one launch when their names of it have one in common.
    """

    address: str
    port: int
    launch: frozenset[str] = frozenset()


def meeting_point(place: Place, environment: Mapping[str, str]) -> MeetingPoint:
    """Where a launcher's variables let the ranks meet; raises ValueError naming the variable that is wrong."""
    if "MASTER_ADDR" in environment:
        address = environment["MASTER_ADDR"]
        port = number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else DEFAULT_PORT
        if not 0 < port < 65536:
            raise ValueError(f"MASTER_PORT={port}, expected a port from 1 to 65535")
        if not _resolves(address):
            raise ValueError(f"MASTER_ADDR={address!r} is no host that this one knows; expected the node of rank 0")
        return MeetingPoint(address, port, _ancestors() if place.local_world_size == place.world_size else frozenset())
    if place.launcher == "slurm":
        step = f"{environment.get('SLURM_JOB_ID', '0')}.{environment.get('SLURM_STEP_ID', '0')}"
        port = SLURM_PORTS[zlib.crc32(step.encode()) % (len(SLURM_PORTS) - NUM_PORTS)]
        return MeetingPoint(_slurm_address(environment), port, frozenset({step}))
    return MeetingPoint(LOOPBACK, DEFAULT_PORT)


def meet(place: Place, environment: MutableMapping[str, str] = os.environ, seconds: float = MEETING_SECONDS) -> Meeting:
    """Open the store on rank 0, find it on the others, and set the variables that libraries read.

    Raises:
        ValueError: a launcher's variables are wrong, no port is free, or rank 0 is not found within ``seconds``.
    """
    if place.world_size == 1:  # without a port, which another process could hold
        store, address, port = dist.HashStore(), LOOPBACK, DEFAULT_PORT
    elif place.launcher == "mpi" and "MASTER_ADDR" not in environment:
        store, address, port = _meet_by_mpi(place)
    else:
        point = meeting_point(place, environment)
        address = point.address
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, port = _agents_store(point), point.port
        else:
            store, port = _open_store(point) if place.is_main else _find(point, place, seconds)
    store.set_timeout(timedelta(seconds=seconds))
    environment.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    return Meeting(store, address)


def connect(
    place: Place,
    device: torch.device,
    meeting: Meeting | None = None,
    own_address: str | None = None,
    silence: timedelta = SILENCE,
) -> None:
    """Create the process group: nccl on CUDA, gloo elsewhere, there over the network of ``own_address``.

    A collective that takes longer than ``silence`` fails.
    """
    store = (meeting or meet(place)).store
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := _interface_of(own_address)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface  # or gloo takes what the host's name leads to, often the loopback
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.PrefixStore("group", store) if place.world_size > 1 else store
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=silence)


def _ancestors() -> frozenset[str]:
    """The processes that started this one and its parent: a launcher, or a launcher and a script around each rank."""
    return frozenset(f"child of {process.pid}" for process in psutil.Process().parents()[:2] if process.pid > 1)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list like ``rack[1-2]n[03,07-09],login``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _slurm_address(environment: Mapping[str, str]) -> str:
    """The first node of the step, which has rank 0: not the host where the step was started from."""
    if environment.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return LOOPBACK
    host = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if host and not _resolves(host):  # Slurm may know an address where the name service does not
        found = _command_output("scontrol", "show", "node", host)
        address = re.search(r"\bNodeAddr=(\S+)", found)
        host = address[1] if address and _resolves(address[1]) else ""
    if not host:
        raise ValueError(
            f"SLURM_STEP_NODELIST={environment.get('SLURM_STEP_NODELIST')!r}: its first node has no address that this "
            "one knows; set MASTER_ADDR to the address of the node of rank 0"
        )
    return host


def _open_store(point: MeetingPoint) -> tuple[dist.Store, int]:
    """On rank 0: a store, and at the first free port of the meeting point a thread that tells ranks where it is."""
    ports = range(point.port, point.port + (NUM_PORTS if point.launch else 1))
    for port in ports:
        try:
            server = _listen(LOOPBACK if point.address == LOOPBACK else "", port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ValueError(f"{point.address}:{port}: rank 0 cannot listen there: {error.strerror}") from None
            continue
        store = _store(LOOPBACK, 0, is_server=True)
        greeting = json.dumps([_GREETING, sorted(point.launch), store.port]).encode() + b"\n"
        threading.Thread(target=_greet, args=(server, greeting), daemon=True, name="meeting").start()
        return store, port
    raise ValueError(
        f"port {point.port}{f' to {ports[-1]}' if len(ports) > 1 else ''} of {socket.gethostname()} is in use, most "
        "likely by another training; give this one another (--master_port, or MASTER_PORT)"
    )


def _listen(address: str, port: int) -> socket.socket:
    """A socket that listens there, or the one that a launcher reserved for rank 0 (``launching.reserve_port``)."""
    if reserved := os.environ.pop("MASTER_LISTEN_FD", None):
        return socket.socket(fileno=int(reserved))
    return socket.create_server((address, port), backlog=1024)


def _greet(server: socket.socket, greeting: bytes) -> None:
    while True:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_ATTEMPT_SECONDS)
            connection.sendall(greeting)


def _find(point: MeetingPoint, place: Place, seconds: float) -> tuple[dist.Store, int]:
    """On the other ranks: the store of this launch, at the first port or, where that was in use, at a later one."""
    began = reminded = time.monotonic()
    while time.monotonic() < began + seconds:
        for port in range(point.port, point.port + (NUM_PORTS if point.launch else 1)):
            store = _store_of_launch(point, port, place)
            if store is not None:
                return store, port
        if time.monotonic() > reminded + _REMIND_SECONDS and place.local_rank == 0:
            reminded = time.monotonic()
            print(f"rank {place.rank}: waiting for rank 0 at {point.address}:{point.port}", file=sys.stderr, flush=True)
        time.sleep(0.1)
    raise ValueError(
        f"no rank 0 at {point.address}:{point.port} within {seconds:g} s; its own message has the cause, or the "
        "network keeps the two apart"
    )


def _store_of_launch(point: MeetingPoint, port: int, place: Place) -> dist.Store | None:
    """The store that rank 0 of this launch names at ``port``, None where nobody listens yet, or somebody else does."""
    try:
        with socket.create_connection((point.address, port), timeout=_ATTEMPT_SECONDS) as connection:
            with connection.makefile("rb") as stream:
                greeting, launch, store_port = json.loads(stream.readline(_MAX_GREETING_BYTES))
        if greeting != _GREETING or (point.launch and point.launch.isdisjoint(launch)):
            return None
        store = _store(point.address, store_port, is_server=False)
        return store if store.add(f"is there: {place.rank}", 1) == 1 else None
    except (OSError, RuntimeError, ValueError, TypeError):
        return None


def _agents_store(point: MeetingPoint) -> dist.Store:
    """The store that torchrun holds at the meeting point itself."""
    try:
        return _store(point.address, point.port, is_server=False)
    except RuntimeError as error:
        raise ValueError(f"no store of torchrun at {point.address}:{point.port}: {_short(error)}") from None


def _store(address: str, port: int, is_server: bool) -> dist.Store:
    return dist.TCPStore(
        address, port, None, is_server, timeout=timedelta(seconds=MEETING_SECONDS), wait_for_workers=False
    )


def _meet_by_mpi(place: Place) -> tuple[dist.Store, str, int]:
    """Rank 0 takes a free port and tells the others through MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"started by mpirun but mpi4py cannot be used ({_short(error)}); set MASTER_ADDR and MASTER_PORT"
        ) from None
    world = MPI.COMM_WORLD
    if world.Get_size() != place.world_size:
        raise ValueError(
            f"mpirun started {place.world_size} processes, mpi4py finds {world.Get_size()}: it belongs to another MPI; "
            "install mpi4py for the MPI of this mpirun, or set MASTER_ADDR and MASTER_PORT"
        )
    one_node = world.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == world.Get_size()
    store = meeting = None
    if place.is_main:
        address = LOOPBACK if one_node else _outward_address()
        store = _store(LOOPBACK, 0, is_server=True)
        meeting = (address, store.port)
    address, port = world.bcast(meeting, root=0)
    return store or _store(address, port, is_server=False), address, port


def _outward_address() -> str:
    """The address of this host on the route to other hosts, by the routing table; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def _interface_of(address: str | None) -> str | None:
    """The network interface that has an address."""
    names = (name for name, held in psutil.net_if_addrs().items() if address in (one.address for one in held))
    return None if address is None else next(names, None)


def _resolves(host: str) -> bool:
    try:
        return bool(host) and bool(socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):
        return False


def _command_output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _short(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split())
