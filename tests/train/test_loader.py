"""How batches come to the device: on CUDA one step ahead, on a stream of its own."""

from contextlib import contextmanager

import torch

from rvc_dist.train.dataset import Batch
from rvc_dist.train.loader import copied_ahead, copied_in_turn


def batch(number: int) -> Batch:
    numbers = torch.full((1,), number)
    return Batch(numbers, numbers, numbers, numbers, numbers, (number,), (0,), 1.0, 1.0, 0)


def test_each_step_is_copied_beside_the_one_before_and_its_memory_kept(monkeypatch):
    """With streams that only write down what they are given."""
    calls, current = [], ["main"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            return f"event {len([c for c in calls if c[0] == 'copy'])}"

        def wait_event(self, event):
            calls.append((self.name, "waits for", event))

    @contextmanager
    def stream(entered):
        current[0] = entered.name
        yield
        current[0] = "main"

    def to(self, device):
        calls.append(("copy", self.clips[0], current[0]))
        return self

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(Batch, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: calls.append(("keep", int(t), s.name)))
    for batches in copied_ahead(iter([[batch(n)] for n in (1, 2, 3)]), torch.device("cuda", 0)):
        calls.append(("step", batches[0].clips[0], current[0]))
    expected = [("copy", 1, "copies")]
    for number in (1, 2, 3):
        expected += [("copy", number + 1, "copies")] * (number < 3)
        expected += [
            ("main", "waits for", f"event {number}"),
            *5 * [("keep", number, "main")],
            ("step", number, "main"),
        ]
    assert calls == expected


def test_on_a_cpu_nothing_is_read_before_it_is_asked_for():
    read = []

    def loaded():
        for number in (1, 2):
            read.append(number)
            yield [batch(number)]

    steps = copied_in_turn(loaded(), torch.device("cpu"))
    assert next(steps)[0].clips == (1,)
    assert read == [1]
