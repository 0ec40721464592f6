"""A real Slurm on this host: a munged, a controller and node daemons of its own, in a folder of its own."""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SYSTEM_PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
_OURS = re.compile(r"(SLURM|SBATCH|SRUN|PMI|PMIX|OPENFLM)_")

_CONFIGURATION = """
ClusterName=openflm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=10
InactiveLimit=0
MinJobAge=3600
MaxArraySize=20
{nodes}
EnforcePartLimits=ALL
PartitionName=main Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:4 MaxTime=INFINITE
PartitionName=closed Nodes=ALL State=UP OverSubscribe=FORCE:4 AllowAccounts=theirs
"""


class Cluster:
    """A running Slurm; ``environment`` is what its commands need."""

    def __init__(self, folder: Path, num_nodes: int, cpus: int) -> None:
        self.folder, self.host = folder, socket.gethostname().split(".")[0]
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self.environment = {name: value for name, value in os.environ.items() if not _OURS.match(name)}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SYSTEM_PATH}
        self._daemons: dict[str, subprocess.Popen] = {}
        ports = _free_ports(1 + num_nodes)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={self.host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000"
            for name, port in zip(self.nodes, ports[1:])
        )
        user = getpass.getuser()
        (folder / "slurm.conf").write_text(
            _CONFIGURATION.format(host=self.host, folder=folder, user=user, controller_port=ports[0], nodes=nodes)
        )

    def start(self) -> None:
        """Returns when all nodes are idle; raises RuntimeError with the end of the log of what did not come up."""
        folder = self.folder
        (folder / "state").mkdir()
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        files = {"key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log", "socket": "socket"}
        options = [f"--{option}={folder}/munge.{kind}" for option, kind in files.items()]
        self._start("munge", ["munged", "--foreground", "--force", *options])
        self._wait(lambda: (folder / "munge.socket").exists(), "munge")
        self._start("slurmctld", ["slurmctld", "-D"])
        for node in self.nodes:
            self.start_node(node)
        idle = lambda: set(self.run("sinfo", "--noheader", "--Node", "--format=%T").split()) == {"idle"}  # noqa: E731
        self._wait(idle, "slurmctld")

    def start_node(self, node: str) -> None:
        self._start(node, ["slurmd", "-D", "-N", node])

    def stop_node(self, node: str) -> None:
        """The node is lost: its daemon, and whatever it has started there, is gone without a word."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()
        for pid in self._started(f"SLURMD_NODENAME={node}"):
            _kill(pid)

    def stop(self) -> None:
        """End the daemons and what they started."""
        with suppress(subprocess.SubprocessError, AssertionError):
            self.run("scancel", "--user", getpass.getuser())
            self._wait(lambda: not self.run("squeue", "--noheader"), "slurmctld", seconds=20)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self._started("SLURMD_NODENAME="):
            _kill(pid)

    def _started(self, variable: str) -> list[int]:
        """Processes of this cluster's jobs with a variable that begins so, and the daemons of their steps."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                ours = f"SLURM_CONF={self.folder}/slurm.conf" in variables
                if ours and any(one.startswith(variable) for one in variables):
                    parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    stepd = Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd")
                    found += [parent, int(folder.name)] if stepd else [int(folder.name)]
        return found

    def run(self, *command: str | Path, check: bool = True, seconds: float = 120, **variables: str) -> str:
        """Output of a command of Slurm; raises CalledProcessError with what it said."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if check and done.returncode:
            raise AssertionError(f"{command}: exit code {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job; of several components or tasks, the first that it names."""
        told = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", told.partition("\n")[0]))

    def wait_for(self, number: str, seconds: float = 600) -> str:
        """The state in which a job ends; raises AssertionError when it has not within ``seconds``."""
        self._wait(lambda: self.job(number)["JobState"] in ENDED, f"job {number}", seconds)
        return self.job(number)["JobState"]

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.folder
            )

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [self.folder / f"{what}.log", self.folder / f"{what}.out"]
                said = "".join(path.read_text()[-1500:] for path in logs if path.exists())
                raise AssertionError(f"{what}: not there after {seconds} s: {said}")
            time.sleep(0.1)


@contextmanager
def slurm_cluster(num_nodes: int, cpus: int = 4) -> Iterator[Cluster]:
    """Skips the test, with the reason, where there is no Slurm."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        pytest.skip(f"no Slurm: {', '.join(missing)} not found; sudo apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: it holds sockets
    cluster = Cluster(folder, num_nodes, cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
