"""`python WORDS` in a process that `warm_cli` forked, behind the script that WARM names: sent what signals come here.

Of Python's own modules alone, to start in no time.
"""

import json
import os
import signal
import socket
import sys

address, script, *words = json.loads(os.environ["WARM"])
asked = json.dumps([script, words + sys.argv[1:], os.getcwd(), dict(os.environ)])
with socket.socket(socket.AF_UNIX) as server:
    server.connect(address)
    socket.send_fds(server, [len(asked).to_bytes(4, "big")], [1, 2])
    server.sendall(asked.encode("ascii"))
    process = int(server.recv(8))
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(process, number))
    sys.exit(int(server.recv(8) or 1))
