"""Hosts on one machine: each has its own network, host name, process table and sshd, and a login
that works both ways.

A host is a set of Linux namespaces. Its first process dies with the one that started it (prctl's
parent-death signal), and takes all others with it: nothing is left, even after a SIGKILL to pytest.
They share the file system, but for what a test mounts on one of them alone.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ("unshare", "nsenter", "setpriv", "ip", "sshd", "ssh", "ssh-keygen", "pdsh")
SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PidFile none
"""
SSH = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
# sshd is the host's first process: it reaps the children of others that ended
BOOT = """
set -e
hostname {name}
ip link set lo up
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
exec {sshd} -D -e -f {folder}/sshd_config 2> {folder}/{name}.log
"""


def why_not() -> str:
    """Why this machine cannot have two hosts; "" if it can."""
    if missing := [tool for tool in TOOLS if not _which(tool)]:
        return (
            f"two hosts need {', '.join(missing)} "
            "(Debian: apt-get install iproute2 openssh-server pdsh util-linux)"
        )
    if os.geteuid() != 0:
        return "two hosts need root, for network namespaces"
    link = ["ip", "link", "add", "one0", "type", "veth", "peer", "name", "two0"]
    tried = subprocess.run(
        [*_namespaces(), *link], capture_output=True, text=True, check=False
    )
    return (
        f"two hosts need network namespaces: {tried.stderr.strip()}"
        if tried.returncode
        else ""
    )


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _namespaces() -> list[str]:
    namespaces = (
        "--net",
        "--uts",
        "--ipc",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    )
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces]


class Node:
    """One host. ``start`` boots it, also after ``kill``."""

    def __init__(self, cluster: "Cluster", number: int) -> None:
        self.cluster = cluster
        self.number = number
        self.name = f"node-{number}"
        self.address = f"10.77.0.{number}"
        self._process: subprocess.Popen[bytes] | None = None
        # process id, as the machine counts, of the host's first process
        self._first = 0

    def start(self) -> None:
        """Boot, plug into the switch, and wait until it accepts logins."""
        boot = BOOT.format(
            name=self.name, folder=self.cluster.folder, sshd=_which("sshd")
        )
        self._process = subprocess.Popen([*_namespaces(), "sh", "-c", boot])
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        wait_for(lambda: bool(children.read_text()), 30)
        self._first = int(children.read_text())
        process = str(self._first)
        # the same after a reboot
        end = (
            "name",
            "eth0",
            "address",
            f"02:00:00:00:00:{self.number:02x}",
            "netns",
            process,
        )
        self.cluster.on_switch(
            "ip", "link", "add", f"port{self.number}", "type", "veth", "peer", *end
        )
        self.cluster.on_switch(
            "ip", "link", "set", f"port{self.number}", "master", "switch", "up"
        )
        self.check("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.check("ip", "link", "set", "eth0", "up")
        wait_for(lambda: self.popen(["ssh", self.name, "true"]).wait() == 0, 30)

    def enter(self, words: Sequence[str]) -> list[str]:
        """The command line that runs ``words`` on this host."""
        namespaces = ("--net", "--uts", "--ipc", "--mount", "--pid", f"--wd={ROOT}")
        return ["nsenter", "-t", str(self._first), *namespaces, *words]

    def popen(self, words: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Start a program on this host."""
        return subprocess.Popen(self.enter(words), text=True, **options)  # pyright: ignore

    def check(self, *words: str) -> str:
        """Run a program to its end; returns what it printed."""
        return subprocess.run(
            self.enter(words), check=True, capture_output=True, text=True
        ).stdout

    def kill(self) -> None:
        """As if its power failed, but that the kernel closes its connections: SIGKILL to every
        process at once."""
        if self._process is not None:
            os.kill(self._first, 9)
            self._process.wait()
            self._process = None


class Cluster:
    """Hosts node-1, node-2 ... on one switch. A context manager."""

    def __init__(self, folder: Path, hosts: int = 2) -> None:
        self.folder = folder
        self.nodes = [Node(self, number + 1) for number in range(hosts)]

    def __enter__(self) -> "Cluster":
        self.folder.mkdir(parents=True, exist_ok=True)
        make_key = [
            "ssh-keygen",
            "-q",
            "-t",
            "ed25519",
            "-N",
            "",
            "-f",
            str(self.folder / "key"),
        ]
        subprocess.run(make_key, check=True)
        names = "".join(f"{node.address} {node.name}\n" for node in self.nodes)
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + names)
        (self.folder / "ssh_config").write_text(SSH.format(folder=self.folder))
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        self._switch = subprocess.Popen([*_namespaces(), "sleep", "infinity"])
        children = Path(f"/proc/{self._switch.pid}/task/{self._switch.pid}/children")
        wait_for(lambda: bool(children.read_text()), 30)
        self._first = children.read_text().strip()
        self.on_switch("ip", "link", "add", "switch", "type", "bridge")
        self.on_switch("ip", "link", "set", "switch", "up")
        for node in self.nodes:
            node.start()
        return self

    def on_switch(self, *words: str) -> None:
        """Run a program where the switch is."""
        subprocess.run(
            ["nsenter", "-t", self._first, "--net", *words],
            check=True,
            capture_output=True,
        )

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            node.kill()
        self._switch.kill()
        self._switch.wait()


def wait_for(condition: object, seconds: float) -> None:
    """Poll ``condition``; AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():  # pyright: ignore
        assert time.monotonic() < deadline, f"waited for {seconds} s"
        time.sleep(0.02)
