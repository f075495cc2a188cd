"""`rvc-dist ARGUMENTS` with work units of a few seconds, so that little audio is many of them."""

import sys

from rvc_dist import workspace
from rvc_dist.__main__ import main

if __name__ == "__main__":
    workspace.MIN_UNIT_S = 4.0
    sys.exit(main(sys.argv[1:]))
