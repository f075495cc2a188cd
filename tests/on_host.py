"""In a process that `warm_cli` forked: `python WORDS` on a host of `netns`.

Where that is a launcher its ranks are forks; `rvc-dist launch` becomes torchrun in this process. With SEEN in the
environment they note what they see.

Usage: on_host.py NAMESPACE NAME HOSTS_FILE WORDS
"""

import ctypes
import os
import socket
import subprocess
import sys

from forked_launcher import fork_ranks, run

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x20000, 0x4000000, 0x40000000
NUM_STARTS = 12
"""Ranks that are forked at once, for all starts of the one of this host; later ones would note nothing."""


def enter(namespace: str, name: str, hosts_file: str) -> None:
    """Be on that host: its network, its name, its /etc/hosts."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as network:
        assert libc.setns(network.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    assert libc.unshare(CLONE_NEWNS | CLONE_NEWUTS) == 0, os.strerror(ctypes.get_errno())
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", hosts_file, "/etc/hosts"], check=True)
    socket.sethostname(name)


if __name__ == "__main__":
    enter(*sys.argv[1:4])
    if "SEEN" in os.environ:
        import seen_clips  # noqa: F401
    fork_ranks(NUM_STARTS)
    run(sys.argv[4:])()
