"""The plan stage: its formulas by hand, its counts against the trainer's and bench's, and its forecast of real runs."""

import json
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState
from helpers import NARROWEST, changed, make_features, thin_networks, tiny_recipe, with_train
from launching import rvc_dist
from torch._subclasses.fake_tensor import FakeTensorMode

from rvc_dist import __main__ as cli
from rvc_dist.config import (
    BenchConfig,
    ConfigError,
    DataConfig,
    LossConfig,
    PlanConfig,
    PreprocessConfig,
    Recipe,
    TrainConfig,
)
from rvc_dist.data import preprocess
from rvc_dist.models import spectral
from rvc_dist.report.history import read_history
from rvc_dist.tools import bench, measuring, plan
from rvc_dist.tools.forecast import (
    BUCKET_BYTES,
    FIRST_BUCKET_BYTES,
    Cluster,
    Forecast,
    Load,
    Measured,
    Pace,
    all_reduce_s,
    data_limit,
    forecasts,
    loads,
    num_buckets,
    ring_share,
    speed_limit,
)
from rvc_dist.tools.tracing import Allocations, TracedStep, count, tensor_bytes, trace, traced_step
from rvc_dist.train.dataset import ClipTable
from rvc_dist.train.progress import Progress, total_steps
from rvc_dist.train.sampler import BUCKET_FRAMES, BucketBatchSampler
from rvc_dist.workspace import Shard, StageError


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


LINKED = Cluster(ranks_per_node=8, bandwidth=1e9, local_bandwidth=1e10, latency_s=0.0)


# Formulas


def test_bytes_and_seconds_of_an_all_reduce():
    assert [ring_share(w) for w in (1, 2, 4)] == [0.0, 1.0, 1.5]
    assert num_buckets(FIRST_BUCKET_BYTES) == 1
    assert num_buckets(FIRST_BUCKET_BYTES + 1) == 2
    assert num_buckets(FIRST_BUCKET_BYTES + 2 * BUCKET_BYTES) == 3
    # 4 ranks: 1.5 x 100 MB at 1 GB/s; 100 MB are 1 + 4 buckets, of 2 log2 4 messages each
    assert all_reduce_s(10**8, 4, 1e9, 1e-3) == pytest.approx(0.15 + 5 * 4 * 1e-3)
    assert all_reduce_s(10**6, 5, 1e9, 1e-3) == pytest.approx(1.6e-3 + 6e-3)  # log2 5 counts as 3


def test_communication_is_hidden_in_part_but_never_the_last_bucket():
    gradients = [10**9, 5 * 10**8]  # on 16 ranks, two nodes: 1.875 x 1.5 GB at 1 GB/s
    assert LINKED.exposed_s(1, gradients, 1.0, {}) == 0.0
    assert LINKED.exposed_s(16, gradients, 1.0, {}) == pytest.approx(1.875 * 1.5 - 0.3)
    assert LINKED.exposed_s(16, gradients, 100.0, {}) == pytest.approx(1.875 * BUCKET_BYTES / 1e9)
    assert LINKED.exposed_s(8, gradients, 0.0, {}) == pytest.approx(1.75 * 0.15)  # within the node


def test_measured_communication_holds_for_the_links_it_was_measured_on():
    measured = {2: Measured(1.0, 0.1), 16: Measured(1.0, 0.6)}
    assert LINKED.exposed_s(2, [8], 1.0, measured) == pytest.approx(0.1)
    assert LINKED.exposed_s(4, [8], 1.0, measured) == pytest.approx(0.15)
    assert LINKED.exposed_s(32, [8], 1.0, measured) == pytest.approx(0.6 * (62 / 32) / (30 / 16))
    only_local = {2: Measured(1.0, 0.1)}
    assert LINKED.exposed_s(16, [8], 0.0, only_local) == LINKED.exposed_s(16, [8], 0.0, {})
    assert LINKED.exposed_s(4, [10**9], 0.0, {2: Measured(1.0, None)}) == pytest.approx(0.15)


def test_ranks_of_a_node_slow_one_another_as_measured_and_for_want_of_cores():
    measured = {2: Measured(1.5, 0.0)}
    assert [LINKED.crowding(w, measured) for w in (1, 2, 64)] == [1.0, 1.5, 1.5]
    two_cores = replace(LINKED, free_cores=2.0)
    assert [two_cores.crowding(w, {}) for w in (1, 2, 4, 64)] == [1.0, 1.0, 2.0, 4.0]
    assert two_cores.crowding(4, {2: Measured(1.2, 0.0)}) == pytest.approx(2.4)
    assert two_cores.crowding(4, {4: Measured(3.0, 0.0)}) == 3.0


def test_compute_grows_with_the_padded_frames_in_part():
    pace = Pace(full_s=2.0, frames=300, growing_share=0.25)
    assert pace.compute_s(300) == 2.0
    assert pace.compute_s(600) == 2.5
    assert pace.compute_s(300, share=0.5) == 1.0


def test_loads_are_what_the_busiest_rank_gets():
    sampler = BucketBatchSampler([60] * 10, batch_size=2, num_ranks=2, rank=0, seed=1)
    assert sorted(loads(sampler)) == [Load(100, 0.5), Load(100, 1.0), Load(100, 1.0)]
    for ranks, accum in ((1, 1), (3, 2), (7, 1), (40, 1)):
        lengths = [*range(50, 450, 9)]
        steps = []
        for rank in range(ranks):
            sampler = BucketBatchSampler(lengths, 2, ranks, rank, 1, accum)
            parts = [sampler.rank_batches(clips, 0) for clips in sampler.global_batches(0)]
            steps.append([Load(p[0].padded_frames, sum(len(m.clips) for m in p) / (2 * accum)) for p in parts])
        assert loads(BucketBatchSampler(lengths, 2, ranks, 0, 1, accum)) == [
            max(each) for each in zip(*steps, strict=True)
        ]


def test_a_global_batch_that_is_kept_is_less_work_for_each_of_more_ranks(tmp_path):
    train = replace(tiny_recipe(tmp_path).train, batch_size=2, keep_global_batch=8, max_epochs=1, max_steps=None)
    rows = forecasts(train, [100] * 16, [1, 2, 4], Pace(1.0, 100, 0.0), LINKED, [0], frame_s=0.01)
    assert [(row.global_batch, row.total_steps, row.compute_s) for row in rows.values()] == [
        (8, 2, 1.0),
        (8, 2, 0.5),
        (8, 2, 0.25),
    ]
    assert data_limit(16, 8, train.keep_global_batch).ranks == 8
    recipe = replace(tiny_recipe(tmp_path), train=train)
    keys = [measuring.recipe_key(recipe, ranks) for ranks in (1, 2, 4, 8)]
    assert [(key["batch_size"], key["grad_accum_steps"]) for key in keys] == [(2, 4), (2, 2), (2, 1), (1, 1)]


def test_a_run_on_one_and_two_ranks_by_hand(tmp_path):
    train = replace(tiny_recipe(tmp_path).train, batch_size=1, max_epochs=10, max_steps=None)
    pace = Pace(1.0, 100, 0.0, measured={2: Measured(1.0, 0.25)})
    rows = forecasts(train, [100] * 8, [1, 2], pace, LINKED, [600, 400], frame_s=0.01)
    one, two = rows[1], rows[2]
    assert (one.steps_per_epoch, one.total_steps, one.epoch_s, one.wall_s) == (8, 80, 8.0, 80.0)
    assert (two.steps_per_epoch, two.total_steps, two.epoch_s, two.wall_s) == (4, 40, 5.0, 50.0)
    assert (one.audio_s_per_s, two.audio_s_per_s) == (1.0, 1.6)
    assert (one.efficiency, two.efficiency) == (1.0, pytest.approx(0.8))
    assert (one.sent_bytes, two.sent_bytes) == (0.0, 1000.0)
    assert two.rank_hours == pytest.approx(100 / 3600)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("max_steps", [None, 7, 10**6])
def test_budgets_are_the_trainers(tmp_path, ranks, max_steps):
    train = replace(tiny_recipe(tmp_path).train, max_epochs=13, max_steps=max_steps)
    lengths = [*range(40, 140)]
    sampler = BucketBatchSampler(lengths, train.batch_size, ranks, 0, train.seed)
    row = forecasts(train, lengths, [ranks], Pace(1.0, 100, 0.0), LINKED, [8], 0.01)[ranks]
    left = len(sampler.global_batches(0))
    assert row.steps_per_epoch == left
    assert row.total_steps == min(13 * left, max_steps or 13 * left)
    assert row.total_steps == total_steps(train, sampler.steps_per_epoch, left, Progress())


def test_the_data_limit_is_where_the_trainer_begins_to_warn():
    assert data_limit(100, 4).ranks == 6
    assert data_limit(15, 4).ranks == 0
    for ranks in range(1, 12):
        sampler = BucketBatchSampler([100] * 100, 2, ranks, 0, 0, accum_steps=2)
        assert sampler.exceeds_dataset == (ranks > data_limit(100, 4).ranks)


def row(ranks: int, epoch_s: float, efficiency: float) -> Forecast:
    return Forecast(ranks, ranks, 10, 10, epoch_s / 10, 0.0, epoch_s / 40, 1.0, efficiency)


def test_the_speed_limit_is_the_last_doubling_that_saves_a_tenth_at_half_the_efficiency():
    one, two = row(1, 100.0, 1.0), row(2, 55.0, 0.91)
    assert speed_limit([one, two]) is None
    assert speed_limit([one, two, row(4, 49.0, 0.51)]) is None
    limit = speed_limit([one, two, row(4, 50.0, 0.5), row(8, 10.0, 1.0)])
    assert limit is not None
    assert limit.ranks == 2
    assert "4 ranks would make an epoch 9% shorter, at an efficiency of 50%, with 25% of a step" in limit.reason
    limit = speed_limit([one, two, row(4, 30.0, 0.49)])
    assert limit is not None
    assert limit.ranks == 2
    limit = speed_limit([one, row(2, 120.0, 0.42)])
    assert limit is not None
    assert (limit.ranks, "20% longer" in limit.reason) == (1, True)


# The traced step


def test_bytes_are_counted_while_their_storage_lives():
    with FakeTensorMode(), Allocations() as allocated:
        a = torch.zeros(1000)
        b = a * 2
        view = b[:10]
        del a
        assert (allocated.num_bytes, allocated.peak_bytes) == (4000, 8000)
        del b
        assert allocated.num_bytes == 4000
        del view
        assert allocated.num_bytes == 0


@pytest.mark.slow
def test_a_traced_step_counts_what_a_real_one_counts(tmp_path, monkeypatch):
    thin_networks(monkeypatch.setattr)
    recipe = tiny_recipe(tmp_path, batch_size=3, grad_accum_steps=2, d_updates=2, loss=LossConfig(stft=1.0))
    recipe = changed(recipe, "model", energy=True)
    make_features(recipe)
    run = measuring.MeasuredRun(recipe)
    batches = run.longest()
    frames = batches[0].content.shape[1]
    parameters = [p for n in run.step.networks.values() for p in n.module.parameters()]
    traced = trace(recipe, run.table.content_channels, run.table.num_speakers, frames)
    assert traced.flops == sum(run.count_flops(batches).values())
    assert traced.weight_bytes == sum(p.nbytes for p in parameters)
    assert traced.gradient_bytes == {
        name: sum(p.nbytes for p in n.module.parameters() if p.requires_grad) for name, n in run.step.networks.items()
    }
    run.train_step(batches)
    state = [n.optimizer.state_dict()["state"] for n in run.step.networks.values()]
    assert traced.optimizer_bytes == tensor_bytes(state)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Of the tiny recipe with thin networks; of so few frames a step is traced once."""
    with pytest.MonkeyPatch.context() as patch:
        thin_networks(patch.setattr)
        return trace(tiny_recipe(tmp_path_factory.mktemp("usual")), 16, 1, BUCKET_FRAMES)


def test_a_traced_step_holds_as_many_bytes_as_the_same_step_on_real_tensors(tmp_path, monkeypatch, usual):
    thin_networks(monkeypatch.setattr)
    recipe = tiny_recipe(tmp_path)
    spectral.forget_constants()
    with Allocations() as allocated:
        step = traced_step(recipe, 16, 1)
        allocated.peak_bytes = allocated.num_bytes
        count(step, usual.frames)
    assert allocated.peak_bytes == pytest.approx(usual.peak_bytes, rel=0.02)


@pytest.mark.slow
def test_memory_follows_clips_precision_optimizer_and_checkpointing(tmp_path, monkeypatch, usual):
    thin_networks(monkeypatch.setattr)
    recipe = tiny_recipe(tmp_path)
    assert trace(recipe, 16, 1, 200).activation_bytes > 1.05 * usual.activation_bytes
    of_8 = changed(with_train(recipe, batch_size=8), "model", upsample_initial_channel=64)
    kept, recomputed = (trace(with_train(of_8, activation_checkpointing=on), 16, 1, 100) for on in (False, True))
    assert kept.activation_bytes > 4 * usual.activation_bytes, "of 2 clips, and a decoder half as wide"
    assert recomputed.peak_bytes < 0.97 * kept.peak_bytes
    half = trace(with_train(recipe, bf16_adamw=True), 16, 1, usual.frames)
    assert half.activation_bytes < usual.activation_bytes
    assert half.optimizer_bytes == pytest.approx(1.5 * usual.weight_bytes, rel=1e-3)
    mel = spectral.log_mel(torch.zeros(1, 4800), 24000, 1024, 240, 80)  # no fake constants are left behind
    assert type(mel) is torch.Tensor


# What there is to train on


def recordings(folder: Path, *seconds: float) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, length in enumerate(seconds):
        soundfile.write(folder / f"{i}.wav", 0.3 * rng.standard_normal(round(length * 24000)).clip(-3, 3) / 3, 24000)


@pytest.mark.parametrize(("method", "num_clips"), [("simple", 6 + 2), ("skip", 2), ("automatic", 5 + 2)])
def test_clips_are_foretold_from_durations_and_counted_once_they_are_cut(tmp_path, method, num_clips):
    """Windows of 3 s every 2.7 s: of 14.1 s six, the last of 0.6 s, or five, the last of 3.3 s; of 5 s two."""
    recordings(tmp_path / "audio", 14.1, 5.0)
    cut = PreprocessConfig(cut_method=method, num_workers=1)
    data = DataConfig(str(tmp_path / "audio"), sample_rate=24000, holdout=0.0)
    recipe = replace(tiny_recipe(tmp_path / "run"), data=data, preprocess=cut)
    expected, source = plan.training_clips(recipe)
    assert "estimate from the durations" in source
    assert sum(c.unit >= 0 for c in expected.train) == num_clips
    assert sum(c.unit < 0 for c in expected.train) == recipe.extract.include_mutes
    preprocess.run(recipe, Shard())
    found, source = plan.training_clips(recipe)
    assert source == "the run's clips, without features yet"
    assert sorted(c.num_frames for c in found.train) == sorted(c.num_frames for c in expected.train)


def test_the_runs_own_clips_are_the_trainers(tmp_path):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    table, source = plan.training_clips(recipe)
    assert source == "the run's clips"
    assert (len(table.train), len(table.holdout)) == (7, 2)  # one clip is on neither side; one silence
    assert table == ClipTable.load(recipe)


# Where the step time comes from


def result(recipe: Recipe, ranks: int, seconds: float, **key) -> dict:
    dealt = {"audio_s_per_s": 1.0, "parts": {"data": {"wall_s": 0.01}}}
    summary = {
        "series": {"longest": {"wall_s": seconds}, "dealt": dealt},
        "longest_frames": 100,
        "memory": {"resident": 10**9},
    }
    if ranks > 1:
        summary["communication"] = {"with_s": seconds, "without_s": 0.8 * seconds, "share": 0.2}
    on = {"device": "cpu", "cpu": "Abacus", "threads": 1}
    machine = {"cores": 4, "threads": 1}
    return {
        "measured_at": "2026-01-01T00:00:00+00:00",
        "key": {"ranks": ranks, **measuring.recipe_key(recipe), **on, **key},
        "machine": machine,
        "summary": summary,
    }


TRACED = TracedStep(100, 400, {"generator": 300, "discriminator": 100}, 800, 4000, flops=2e9, flops_per_frame=1e7)


def test_the_newest_benchmark_counts_and_those_on_other_ranks_beside_it(tmp_path):
    recipe = tiny_recipe(tmp_path)
    file = tmp_path / "bench" / "results.json"
    kept = [
        result(recipe, 1, 9.0, cpu="Quipu"),
        result(recipe, 2, 2.0),
        result(recipe, 1, 1.0),
        result(with_train(recipe, batch_size=7), 1, 5.0),
    ]
    for each in kept:
        bench.store(file, each)
    found = plan.kept_results(recipe)
    assert found == [kept[2], kept[1]]
    pace, source, machine = plan.pace_of_results(found, TRACED)
    assert (pace.full_s, pace.frames, pace.growing_share, pace.data_s) == (1.0, 100, pytest.approx(0.5), 0.01)
    assert pace.measured == {2: Measured(1.6, pytest.approx(0.4))}
    assert "Abacus" in source
    cluster, pace, assumed = plan.find_cluster(recipe, pace, machine)
    assert (cluster.ranks_per_node, cluster.free_cores) == (4, 4.0)
    assert assumed == ["4 ranks a node (plan.ranks_per_node)", "plan.bandwidth_gb_s 3 GB/s"]
    assert cluster.exposed_s(2, [10**9], 0.0, pace.measured) == pytest.approx(0.4)


def test_a_bandwidth_that_is_given_goes_before_the_measured_one(tmp_path):
    recipe = replace(tiny_recipe(tmp_path), plan=PlanConfig(local_bandwidth_gb_s=2.0, ranks_per_node=4))
    bench.store(tmp_path / "bench" / "results.json", result(recipe, 2, 2.0))
    pace, _, machine = plan.find_pace(recipe, TRACED, 100.0)
    cluster, pace, assumed = plan.find_cluster(recipe, pace, machine)
    assert cluster.exposed_s(2, [10**9], 0.0, pace.measured) == pytest.approx(0.5 + 40 * 2 * 5e-5)
    assert cluster.crowding(2, pace.measured) == 1.0  # nothing on one rank to compare with
    assert assumed == ["plan.bandwidth_gb_s 3 GB/s"]


def test_a_step_is_given_or_estimated_from_its_operations(tmp_path):
    recipe = replace(tiny_recipe(tmp_path), plan=PlanConfig(step_s=3.0))
    pace, source, _ = plan.find_pace(recipe, TRACED, 50.0)
    assert pace.compute_s(50) == 3.0
    assert pace.compute_s(100) == pytest.approx(3.0 * 2e9 / 1.5e9)  # operations at 100 and at 50 frames
    assert "given" in source
    recipe = replace(recipe, plan=PlanConfig(device_tflop_s=0.004))
    pace, source, _ = plan.find_pace(recipe, TRACED, 50.0)
    assert pace.compute_s(100) == pytest.approx(0.5)
    assert "ESTIMATE" in source


def test_a_step_that_was_never_measured_is_measured_once(tmp_path, monkeypatch, capsys):
    thin_networks(monkeypatch.setattr)
    monkeypatch.setattr(bench, "measured_peak", lambda device, dtype: 1e13)
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    plan.run(recipe, Shard())
    (kept,) = plan.kept_results(recipe)
    assert len(kept["ranks"][0]["samples"]["dealt"]) == plan.STEPS
    monkeypatch.setattr(bench, "measured_result", None)
    monkeypatch.setattr(plan, "trace", lambda *_: TRACED)  # as before, in less time
    plan.run(recipe, Shard())
    out = capsys.readouterr().out
    assert "by steps on 1 rank: RUN/bench/results.json" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["step"]["full_s"] == kept["summary"]["series"]["longest"]["wall_s"]
    assert [f["ranks"] for f in written["forecasts"]] == [2**i for i in range(11)]


# The stage as a user meets it


def test_before_preprocess_there_is_a_forecast_already(tmp_path, monkeypatch, capsys):
    thin_networks(monkeypatch.setattr)
    recordings(tmp_path / "audio", 100.0, 80.0)
    recipe = replace(
        tiny_recipe(tmp_path / "run", max_steps=None, max_epochs=10),
        data=DataConfig(str(tmp_path / "audio"), 24000, holdout=0.0),
    )
    config = tmp_path / "recipe.yaml"
    config.write_text(recipe.to_yaml())
    assert cli.main(["plan", "--config", str(config), "--plan.step_s", "0.5", "--plan.ranks", "6"]) == 0
    out = capsys.readouterr().out
    # 68 clips with the silent one: 34 steps an epoch on one rank, 6 on six ranks of two clips.
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line[:1].isdigit() and ": " not in line}
    assert lines["1"][1:3] == ["34", "340"]
    assert lines["6"][1:4] == ["<", "6", "60"]
    assert "128" not in lines  # 64 ranks take all clips in one step
    assert "More ranks pay up to 8; what ends it is the dataset" in out
    assert "past that" not in out
    assert "an estimate from the durations of the recordings" in out
    assert re.search(r"\(about \d+ held out\): an estimate", out)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"plan.json"}


def test_fixed_steps_are_not_made_shorter_by_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "trace", lambda *_: TRACED)
    recipe = replace(tiny_recipe(tmp_path, max_steps=5), plan=PlanConfig(ranks=4, step_s=1.0))
    make_features(recipe)
    plan.run(recipe, Shard())
    out = capsys.readouterr().out
    assert "train.max_steps 5 ends the run: more ranks do not shorten it" in out
    assert "The recipe's ranks are past that." in out


def test_what_d_sends_is_counted_at_each_of_its_updates():
    bytes_of = {"generator": 40, "discriminator": 70}
    assert plan.sent_bytes(TrainConfig(), bytes_of) == [40, 70]
    assert plan.sent_bytes(TrainConfig(d_updates=2, grad_compression="bf16"), bytes_of) == [20, 35, 35]


def test_wrong_uses_are_named(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"plan.device_tflop_s: got 2.0 with plan.step_s 1.0; set only one"):
        Recipe(plan=PlanConfig(step_s=1.0, device_tflop_s=2.0))
    with pytest.raises(ConfigError, match=r"plan.bandwidth_gb_s: got 0.0, expected more than 0"):
        Recipe(plan=PlanConfig(bandwidth_gb_s=0.0))
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(StageError, match="plan: started on several ranks"):
        plan.run(recipe, Shard(0, 2))
    assert cli.main(["plan", "--run_dir", str(tmp_path), "--data.audio_dir", str(tmp_path / "none")]) == 1
    assert "none does not exist" in capsys.readouterr().err


# Against real runs

NUM_STEPS, BOUND, ATTEMPTS = 16, 0.25, 4


def seconds_of_steps(folder: Path) -> float:
    """Median over the steps of a run that logs each, without the first ones."""
    times = [line["time"] for line in read_history(folder / "metrics.jsonl") if line["kind"] == "step"]
    assert len(times) == NUM_STEPS
    return statistics.median(np.diff(times)[3:])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.alone
def test_runs_on_one_and_two_ranks_take_as_long_as_foretold(tmp_path, monkeypatch):
    """From bench on 1 and on 2 ranks; another attempt is for machines on which something else ran meanwhile."""
    thin_networks(monkeypatch.setattr)
    monkeypatch.setenv("THIN", "1")
    model = replace(NARROWEST, discriminator_channels=128)
    recipe = tiny_recipe(tmp_path / "run", max_steps=NUM_STEPS, eval_every_steps=10**6, save_every_steps=10**6)
    recipe = replace(recipe, model=model, bench=BenchConfig(warmup_steps=1, steps=8), plan=PlanConfig(ranks=2))
    make_features(recipe, num_clips=48, seconds=1.2)
    config = tmp_path / "recipe.yaml"
    config.write_text(recipe.to_yaml())
    told: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    to_be_told = [1, 2]
    for attempt in range(ATTEMPTS):
        measured = {}
        for ranks in to_be_told:
            copy = tmp_path / f"{attempt}_{ranks}"
            shutil.copytree(tmp_path / "run", copy)
            rvc_dist(ranks, "bench", "--config", config)
            rvc_dist(ranks, "train", "--config", config, "--run_dir", copy)
            measured[ranks] = seconds_of_steps(copy)
        rows = plan.make_plan(recipe).rows
        assert rows[1].compute_s > 0.05
        for ranks, seconds in measured.items():
            told[ranks].append((rows[ranks].step_s, seconds))
        to_be_told = [ranks for ranks in measured if abs(told[ranks][-1][0] / told[ranks][-1][1] - 1) > BOUND]
        if not to_be_told:
            return
    pytest.fail(f"ranks, and seconds a step as foretold and as measured: {told}")
