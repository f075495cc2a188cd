"""In which order a run reads: what decides, what a checkpoint keeps, and what becomes of the place in an epoch."""

import pytest
from accelerate import Accelerator
from helpers import changed, make_features, tiny_recipe, train, with_train

from rvc_dist.train import fingerprint, memory, reading
from rvc_dist.train.dataset import ClipTable, bytes_per_s
from rvc_dist.train.progress import Progress
from rvc_dist.train.sampler import Sampling

pytestmark = pytest.mark.usefixtures("thin")
NODES = {"a large node": 10**9, "a small node": 10**6}


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """What a run of nine clips (2 MB) chooses on a node with a checkpoint, as `chosen(node, saved, **data)`."""
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    table, accelerator = ClipTable.load(recipe), Accelerator(cpu=True)

    def choose(node: str, before: dict | None = None, **data: object) -> Sampling:
        monkeypatch.setattr(memory, "host_memory", lambda: NODES[node])
        asked = changed(recipe, "data", **data)
        now = fingerprint.of_data(asked, table)
        return reading.choose(asked, table, accelerator, {"train": now["train"], **before} if before else {}, now)

    choose.gb_a_frame = bytes_per_s(recipe, 16) * recipe.rate_spec.hop / 24000 / 1e9
    return choose


def test_data_that_exceeds_the_memory_is_read_locally_wherever_the_run_goes_on(chosen):
    assert chosen("a large node") == Sampling()
    local = chosen("a small node")
    assert local.window_frames == round(10**6 / 4 / 1e9 / chosen.gb_a_frame)
    kept = {"window_frames": local.window_frames}
    assert chosen("a large node", kept) == local
    assert chosen("a large node", kept, read_order="local") == local
    assert chosen("a small node", {"window_frames": 0}) == Sampling(), "one that began on a large node, or long ago"
    assert chosen("a large node", kept | {"train": "other clips"}) == Sampling(), "of other clips nothing is kept"
    assert chosen("a small node", kept, read_order="shuffled") == Sampling()
    assert chosen("a large node", read_order="local").window_frames == round(0.25 / chosen.gb_a_frame)
    for kept in {}, {"window_frames": 7}:
        asked = chosen("a large node", kept, read_order="local", window_gb=1e-4)
        assert asked == Sampling(0.0, round(1e-4 / chosen.gb_a_frame)), "a number in the recipe counts first"
    assert chosen("a large node", balance=0.5) == Sampling(0.5)


def test_a_container_or_a_job_bounds_the_memory(monkeypatch):
    total = 64 << 30
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("", (), {"total": total}))
    files = {
        "/proc/self/cgroup": "0::/slurm/job_1/step_0",
        "/sys/fs/cgroup/slurm/job_1/step_0/memory.max": "max",
        "/sys/fs/cgroup/slurm/job_1/memory.max": str(8 << 30),
    }
    monkeypatch.setattr(memory, "_lines", lambda path: files.get(str(path), "").splitlines())
    assert memory.host_memory() == 8 << 30
    files |= {"/proc/self/cgroup": "5:memory:/", "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 << 30)}
    assert memory.host_memory() == 4 << 30
    files.clear()
    assert memory.host_memory() == total


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"balance": 0.5}, "data.balance 0 -> 0.5"),
        ({"read_order": "local", "window_gb": 1e-4}, "read order shuffled -> local (windows of "),
    ],
)
def test_another_balance_or_order_begins_the_epoch_anew_and_says_so(tmp_path, caplog, data, said):
    """With loader processes on, two speakers, and nine clips of which the epoch goes on at the third."""
    recipe = tiny_recipe(tmp_path, max_steps=2, num_workers=1)
    make_features(recipe, speakers=(0, 0, 1))
    before = train(recipe)
    assert not {"balance", "window_frames"} & before.data.keys(), "as older versions wrote it"
    now = changed(with_train(recipe, max_steps=3), "data", **data)
    after = train(now)
    assert f"since step_00000002: {said}" in caplog.text
    assert caplog.text.count("; the epoch begins anew") == 1
    assert after.progress.batches_done == ((2, 1),)
    caplog.clear()
    assert train(with_train(now, max_steps=4)).progress.batches_done == ((2, 2),)
    assert "begins anew" not in caplog.text
    assert after.data.get("balance", after.data.get("window_frames")) in (
        0.5,
        round(1e5 / (bytes_per_s(recipe, 16) / 100)),
    )
    caplog.clear()
    back = changed(with_train(recipe, max_steps=5), "data", read_order="shuffled")
    assert train(back).progress.batches_done == ((2, 1),)


def test_what_a_checkpoint_says_of_a_place_that_is_the_same(tmp_path):
    now = {"train": "x", "validation": "y", "balance": 0.5}
    place = Progress(step=9, epoch=2, batches_done=((8, 3),), best_metric=1.0)
    assert fingerprint.adjusted(place, now, now) == place
    assert fingerprint.adjusted(place, now | {"balance": 1.0}, now).batches_done == ()
    assert fingerprint.adjusted(place, now, {"train": "x", "validation": "y"}).batches_done == ()
    assert fingerprint.adjusted(place, {}, {"train": "x", "validation": "y"}).batches_done == ((8, 3),), "an old one"
    assert fingerprint.adjusted(place, {}, now).batches_done == ()
