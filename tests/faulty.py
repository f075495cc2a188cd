"""rvc_dist with a fault: FAULT=RANK:STEP:KIND makes that rank raise, disappear or sleep before that step.

With KIND driver, it hangs there as in a GPU's driver and collectives wait for an hour; with device, the others wait
for it in a log step as for a GPU. With KIND nan, the losses of the step are not numbers, with overflow they are very
large; with stall the rank's loader process gives nothing from it on, with loader it is killed; with disk nothing that
the rank writes beside its recipe ends any more, and its exit has shorter limits; with limit no file may have more than
LIMIT_BYTES from then on.

Usage: like `python -m rvc_dist`.
"""

import ctypes
import os
import resource
import signal
import sys
import time
from unittest import mock

from tensorboard.summary.writer.record_writer import RecordWriter

from rvc_dist.__main__ import main
from rvc_dist.runtime import background, logs, watchdog
from rvc_dist.train import dataset, losses, trainer

SLEEP_S = 8
LIMIT_BYTES = 1 << 17
FACTORS = {"nan": float("nan"), "overflow": 1e20}
rank, at, kind = os.environ["FAULT"].split(":")
healthy, read, sync = trainer.Trainer.train_step, dataset.ClipDataset.__getitem__, os.fsync
write_record = RecordWriter.write
num_read, disk_hangs = 0, False
silence, _held_open = os.pipe()


def faulty_read(self, plans):
    global num_read
    num_read += 1
    if os.environ["RANK"] == rank and num_read == int(at):
        if kind == "loader":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "stall":
            os.read(silence, 1)
    return read(self, plans)


def faulty_sync(file):
    if disk_hangs and os.readlink(f"/proc/self/fd/{file}").startswith(os.path.dirname(sys.argv[-1])):
        os.read(silence, 1)
    sync(file)


def faulty_record(self, record):
    if disk_hangs:
        os.read(silence, 1)
    write_record(self, record)


def hang():
    """In native code, where neither signals nor errors of other threads reach this one: it locks what it has locked."""
    native, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    native.pthread_mutex_lock(lock)
    native.pthread_mutex_lock(lock)


def faulty(self, batches):
    if kind == "device" and self.progress.step + 1 == int(at) and self.accelerator.process_index != int(rank):
        with self.heartbeat.within("log"):
            hang()
    if self.accelerator.process_index == int(rank) and self.progress.step + 1 == int(at):
        if kind == "disk":
            global disk_hangs
            disk_hangs = True
        elif kind in ("device", "driver"):
            hang()
        elif kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
        elif kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "sleep":
            time.sleep(SLEEP_S)
        elif kind in FACTORS:
            of_d, of_g, factor = losses.discriminator_loss, losses.weighted_sum, FACTORS[kind]
            with (
                mock.patch.object(losses, "discriminator_loss", lambda *a: of_d(*a) * factor),
                mock.patch.object(losses, "weighted_sum", lambda *a: of_g(*a) * factor),
            ):
                return healthy(self, batches)
        elif kind == "raise":
            raise RuntimeError("this rank was made to fail")
    return healthy(self, batches)


trainer.Trainer.train_step = faulty
dataset.ClipDataset.__getitem__ = faulty_read
if kind in ("device", "driver"):
    make = trainer.make_accelerator
    trainer.make_accelerator = lambda config: make(config, 3600.0)
if kind == "disk":
    os.fsync, RecordWriter.write = faulty_sync, faulty_record
    for module in (background, logs, watchdog):
        module.EXIT_S = 2.0

if __name__ == "__main__":
    sys.exit(main())
