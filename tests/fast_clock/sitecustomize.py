"""On the PYTHONPATH: this Python is CLOCK_AHEAD_S seconds ahead (or behind, if negative) in `time` and `datetime`."""

import datetime
import os
import time

AHEAD_S = float(os.environ["CLOCK_AHEAD_S"])
right_time, right_time_ns = time.time, time.time_ns


class FastDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=AHEAD_S)


time.time = lambda: right_time() + AHEAD_S
time.time_ns = lambda: right_time_ns() + round(AHEAD_S * 1e9)
# So that pickles of this class are read as the usual one elsewhere.
FastDatetime.__module__, FastDatetime.__name__, FastDatetime.__qualname__ = "datetime", "datetime", "datetime"
datetime.datetime = FastDatetime
