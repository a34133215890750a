"""A real Slurm on one machine: munged, slurmctld and several slurmd, in one directory, in the foreground.

Every node has a mount, UTS and PID namespace of its own: a hostname that the others resolve to an address of
the loopback network, and one process whose death takes everything on the node with it. So a node can crash
like a machine that loses power, and nothing survives the tests. GPUs are links to /dev/null, which Slurm
allots like real ones. Daemons die with the process that started them.

By hand: `python tests/slurm/cluster.py DIR` keeps one up until Ctrl-C and says how to talk to it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "unshare")
PACKAGES = "slurmctld slurmd slurm-client munge"
UP_SECONDS, DOWN_SECONDS = 30, 8
_PR_SET_PDEATHSIG = 1


def missing() -> str:
    """What keeps a cluster from being started here, in words; empty where nothing does."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install {PACKAGES}"
    tried = subprocess.run(_own_namespaces("true"), capture_output=True, text=True, check=False)
    return f"no namespaces for nodes: {tried.stderr.strip()}" if tried.returncode else ""


class Cluster:
    """The cluster in `root`, whose path must be short: sockets are in it.

    Args:
        root: an empty directory.
        nodes: how many, called n1, n2, ...
        gpus: of each node.
        cores: of each node, whatever the machine has.
        down_after: seconds until a node that does not answer is down.
        settings: further lines of slurm.conf.
    """

    def __init__(
        self,
        root: Path,
        *,
        nodes: int = 4,
        gpus: int = 4,
        cores: int = 8,
        down_after: int = 3,
        settings: Sequence[str] = (),
    ) -> None:
        self.root, self.nodes = root, [f"n{number}" for number in range(1, nodes + 1)]
        self._gpus, self._cores, self._down_after, self._settings = gpus, cores, down_after, settings
        self._config = root / "etc" / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self._config)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        for name in ("etc", "state", "log", "run", "dev", *(f"spool.{node}" for node in self.nodes)):
            (self.root / name).mkdir(parents=True)
        self._configure()
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    # -- for tests -------------------------------------------------------------------------------------------

    def run(self, *command: str, check: bool = True, **more: Any) -> str:
        """What a command of a user prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, **more)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: int | str) -> Mapping[str, str]:
        """What scontrol says of a job: JobState, Reason, ExitCode, Restarts, NodeList and the like."""
        text = self.run("scontrol", "show", "job", "-o", str(number))
        return dict(part.partition("=")[::2] for part in text.split() if "=" in part)

    def wait(self, number: int | str, *states: str, timeout: float = 120.0) -> Mapping[str, str]:
        """The job once it is in one of the states."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']} ({job['Reason']})"
            time.sleep(0.1)
        return job

    def begin_soon(self, number: int | str) -> None:
        """Take the two minutes off that Slurm lets a job wait once it was requeued.

        In the second of the requeue itself Slurm would start the job with credentials it has revoked.
        """
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now+2")

    def crash(self, node: str) -> None:
        """Everything on the node is gone at once."""
        daemon = self._daemons[f"slurmd.{node}"]
        daemon.kill()
        daemon.wait()

    def boot(self, node: str) -> None:
        """Start a node that has crashed."""
        self._spawn(f"slurmd.{node}", *_own_namespaces(*self._node_command(node)))

    def set_down(self, node: str) -> None:
        """Slurm learns that a node is lost, without the seconds that it takes to notice."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def await_idle(self) -> None:
        """All nodes are up and free."""
        deadline = time.monotonic() + UP_SECONDS
        wanted = {f"{node} idle" for node in self.nodes}
        while set(self.run("sinfo", "-hN", "-o", "%N %t", check=False).splitlines()) != wanted:
            assert time.monotonic() < deadline, self.run("sinfo", "-N", "-l", check=False) + self._logs()
            time.sleep(0.02)

    # -- the daemons -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        etc, run, log = self.root / "etc", self.root / "run", self.root / "log"
        self._spawn(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={etc}/munge.key", f"--socket={run}/munge"),
            *(f"--pid-file={run}/munged.pid", f"--log-file={log}/munged", f"--seed-file={run}/munge.seed"),
        )
        self._await("munged", (run / "munge").exists)
        self._spawn("slurmctld", "slurmctld", "-D", "-c", "-f", str(self._config))
        self._await("slurmctld", self._listens)  # a node that registers earlier waits for a second
        for node in self.nodes:
            self.boot(node)
        self.await_idle()

    def _stop(self) -> None:
        if "slurmctld" in self._daemons and self._daemons["slurmctld"].poll() is None:
            self.run("scancel", "--user", _user(), check=False)
            deadline = time.monotonic() + DOWN_SECONDS
            while self.run("squeue", "-h", check=False) and time.monotonic() < deadline:
                time.sleep(0.05)
        nodes = [name for name in self._daemons if name.startswith("slurmd.")]
        for names in (nodes, ["slurmctld"], ["munged"]):
            daemons = [self._daemons[name] for name in names if name in self._daemons]
            for daemon in daemons:
                if names is nodes:
                    daemon.kill()  # of the first process of its namespace: what runs on the node goes with it
                else:
                    daemon.terminate()
            for daemon in daemons:
                try:
                    daemon.wait(5)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def _spawn(self, name: str, *command: str) -> None:
        with open(self.root / "log" / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=functools.partial(_die_with, os.getpid()),
            )

    def _node_command(self, node: str) -> list[str]:
        hosts = self.root / "etc" / "hosts"
        daemon = f"slurmd -D -f {self._config} -N {node}"
        return ["sh", "-c", f"mount --bind {hosts} /etc/hosts && hostname {node} && exec {daemon}"]

    def _await(self, daemon: str, ready: Any) -> None:
        deadline = time.monotonic() + UP_SECONDS
        while not ready():
            assert self._daemons[daemon].poll() is None, self._logs()
            assert time.monotonic() < deadline, self._logs()
            time.sleep(0.01)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def _logs(self) -> str:
        return "".join(
            f"\n--- {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in sorted((self.root / "log").iterdir())
        )

    def _configure(self) -> None:
        etc, user = self.root / "etc", _user()
        host = socket.gethostname().split(".")[0]
        key = etc / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        addresses = {node: f"127.0.0.{10 + number}" for number, node in enumerate(self.nodes, 1)}
        known = Path("/etc/hosts").read_text()
        (etc / "hosts").write_text(known + "".join(f"\n{ip} {node}" for node, ip in addresses.items()) + "\n")
        for number in range(self._gpus):
            (self.root / "dev" / f"gpu{number}").symlink_to("/dev/null")
        self._port, *ports = _free_ports(1 + len(self.nodes))
        # Without cgroups at all; that slurmd looks for them nevertheless is what this file prevents.
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        devices = f"{self.root}/dev/gpu[0-{self._gpus - 1}]"
        gres = f"NodeName={','.join(self.nodes)} Name=gpu Type=h100 File={devices}"
        (etc / "gres.conf").write_text(f"AutoDetect=off\n{gres}\n")
        nodes = (
            f"NodeName={node} NodeHostname={host} NodeAddr={addresses[node]} Port={port} CPUs={self._cores} "
            f"Boards=1 SocketsPerBoard=1 CoresPerSocket={self._cores} ThreadsPerCore=1 RealMemory=6000 "
            f"Gres=gpu:h100:{self._gpus} State=UNKNOWN"
            for node, port in zip(self.nodes, ports, strict=True)
        )
        settings = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": self._port,
            "SlurmUser": user,
            "SlurmdUser": user,
            "SlurmctldPidFile": f"{self.root}/run/slurmctld.pid",
            "SlurmdPidFile": f"{self.root}/run/slurmd.%n.pid",
            "SlurmctldLogFile": f"{self.root}/log/slurmctld.log",
            "SlurmdLogFile": f"{self.root}/log/slurmd.%n.log",
            "StateSaveLocation": f"{self.root}/state",
            "SlurmdSpoolDir": f"{self.root}/spool.%n",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.root}/run/munge",
            "CredType": "cred/munge",
            "MailProg": "/bin/true",
            "MpiDefault": "none",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=10000",
            "SlurmdParameters": "config_overrides",  # nodes may claim more cores than the machine has
            "ReturnToService": 2,
            "SlurmctldTimeout": 10,
            "SlurmdTimeout": self._down_after,
            "MessageTimeout": 3,
            "TCPTimeout": 1,
            "KillWait": 5,
            "MinJobAge": 3600,  # finished jobs stay to be asked about, without accounting
            "GresTypes": "gpu",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        partition = "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
        self._config.write_text("\n".join([*lines, *self._settings, *nodes, partition]) + "\n")


def _own_namespaces(*command: str) -> list[str]:
    """The command as the first process of namespaces of its own; its death kills all others in them."""
    user = [] if os.getuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    own = ["--mount", "--uts", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
    return ["unshare", *user, *own, "--propagation", "private", *command]


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    with Cluster(Path(sys.argv[1]).resolve()) as up:
        print(f"export SLURM_CONF={up.root}/etc/slurm.conf", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
