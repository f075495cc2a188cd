"""`python WORDS` in a process that `warm_cli` forked, behind the script that WARM names: sent what signals come here.

SIGUSR1 is for what that process has begun, as launch/node.sh sends it. Of Python's own modules alone, to start in no
time.
"""

import json
import os
import signal
import socket
import sys


def begun_by(process: int) -> list[int]:
    """Ids of the processes that have `process` as an ancestor."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{task}/children") as children:
                found += map(int, children.read().split())
    except OSError:  # it has ended
        pass
    return found + [later for child in found for later in begun_by(child)]


def ask(*_: object) -> None:
    for each in begun_by(process):
        try:
            os.kill(each, signal.SIGUSR1)
        except ProcessLookupError:  # it has ended
            continue


address, script, *words = json.loads(os.environ["WARM"])
asked = json.dumps([script, words + sys.argv[1:], os.getcwd(), dict(os.environ)])
with socket.socket(socket.AF_UNIX) as server:
    server.connect(address)
    socket.send_fds(server, [len(asked).to_bytes(4, "big")], [1, 2])
    server.sendall(asked.encode("ascii"))
    process = int(server.recv(8))
    signal.signal(signal.SIGUSR1, ask)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(process, number))
    sys.exit(int(server.recv(8) or 1))
