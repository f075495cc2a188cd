"""On the PYTHONPATH: this Python has none of the modules that LACKING names."""

import os
import sys

sys.modules |= dict.fromkeys(os.environ["LACKING"].split(","))  # None: importing them is an ImportError
