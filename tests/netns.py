"""Two hosts with a network of their own, on one machine: each is a network namespace with its own host name.

The cable between them is a pair of TUN devices whose packets a thread carries across, so that it can be cut, delay and
lose packets on any kernel: `tc netem` would do the same, but many kernels lack it. TCP is the kernel's own.
Needs root, iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import json
import os
import random
import secrets
import select
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
"""linux/if_tun.h"""
MTU = 9000
DEVICE = "eth0"
INSIDE = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
"""What turns a namespace into a host: a name, and its /etc/hosts, which no other process sees."""


def marks() -> list[pytest.MarkDecorator]:
    """Of tests on two hosts."""
    skip = pytest.mark.skipif(bool(missing()), reason=missing() or "never")
    return [pytest.mark.root, pytest.mark.slow, pytest.mark.distributed, pytest.mark.usefixtures("thin_ranks"), skip]


def missing() -> str:
    """What keeps two hosts from being made here; empty when nothing does."""
    if os.geteuid() != 0:
        return "makes network namespaces: needs root"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "makes network namespaces: needs iproute2 and util-linux"
    return "" if Path("/dev/net/tun").exists() else "makes network namespaces: needs /dev/net/tun"


@dataclass
class Host:
    namespace: str
    name: str
    address: str
    hosts_file: Path

    def command(self, *arguments: object) -> list[str]:
        """`arguments` as a command that runs on this host."""
        inside = ["unshare", "--uts", "sh", "-c", INSIDE, "sh", str(self.hosts_file), self.name]
        return ["ip", "netns", "exec", self.namespace, *inside, *map(str, arguments)]

    def warm(self, server: str) -> dict[str, str]:
        """The variable by which tests/warm_python.py runs its words on this host, in a fork of `server`."""
        script = str(Path(__file__).with_name("on_host.py"))
        return {"WARM": json.dumps([server, script, self.namespace, self.name, str(self.hosts_file)])}

    def set_tcp_retries(self, retries: int) -> None:
        """Connections to a peer that is silent break after 0.2 s x (2 ** (retries + 1) - 1); Linux retries 15 times."""
        write = self.command("sh", "-c", f"echo {retries} > /proc/sys/net/ipv4/tcp_retries2")
        subprocess.run(write, check=True)

    def processes(self) -> list[int]:
        """Ids of what runs here."""
        return [int(p) for p in ip("netns", "pids", self.namespace).split()]

    def kill_all(self) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        while self.processes():
            time.sleep(0.05)


@dataclass
class Cable(threading.Thread):
    """Carries packets between two TUN devices."""

    ends: tuple[int, int]
    """File descriptors of the devices."""
    is_cut: bool = False
    delay_s: float = 0.0
    """One way, each way."""
    loss: float = 0.0
    """Share of packets that never arrive, 0..1."""
    num_lost: int = 0
    _stopped: bool = False
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        super().__init__(name="cable", daemon=True)

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        other = dict(zip(self.ends, reversed(self.ends), strict=True))
        underway: list[tuple[float, int, int, bytes]] = []
        order = itertools.count()
        while not self._stopped:
            wait_s = min(0.1, max(0.0, underway[0][0] - time.monotonic())) if underway else 0.1
            for end in select.select(self.ends, [], [], wait_s)[0]:
                packet = os.read(end, MTU + 100)
                if self.is_cut or self._random.random() < self.loss:
                    self.num_lost += 1
                else:
                    heapq.heappush(underway, (time.monotonic() + self.delay_s, next(order), other[end], packet))
            while underway and underway[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(underway)
                with suppress(OSError):  # the device is down
                    os.write(end, packet)

    def stop(self) -> None:
        self._stopped = True
        self.join()


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def tun(name: str) -> int:
    """A new TUN device of this name; it is there as long as the descriptor is open."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return end


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host, Cable]]:
    """Two hosts that reach each other, node0 and node1, and the cable between them; `folder` takes their hosts files.

    Both share this machine's file system. At the end whatever still runs there is killed.
    """
    tag = secrets.token_hex(4)
    hosts = [Host(f"rvc{tag}-{i}", f"node{i}", f"10.213.7.{i + 1}", folder / f"hosts{i}") for i in range(2)]
    listed = "".join(f"{host.address} {host.name}\n" for host in hosts)
    with ExitStack() as undo:
        ends = []
        for i, host in enumerate(hosts):
            host.hosts_file.write_text(f"127.0.0.1 localhost\n{listed}")
            ip("netns", "add", host.namespace)
            undo.callback(ip, "netns", "delete", host.namespace)
            undo.callback(host.kill_all)
            end = tun(f"t{tag}{i}")
            undo.callback(os.close, end)
            ends.append(end)
            # A device that is moved keeps its descriptor.
            ip("link", "set", f"t{tag}{i}", "netns", host.namespace, "name", DEVICE)
            ip("-n", host.namespace, "address", "add", host.address, "peer", hosts[1 - i].address, "dev", DEVICE)
            ip("-n", host.namespace, "link", "set", DEVICE, "mtu", str(MTU), "up")
            ip("-n", host.namespace, "link", "set", "lo", "up")
        cable = Cable((ends[0], ends[1]))
        cable.start()
        undo.callback(cable.stop)
        yield hosts[0], hosts[1], cable
