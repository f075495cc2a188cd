"""The bench stage: what it counts against what is known, what it keeps, and that it leaves the run alone."""

import json
import math
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import make_features, thin_networks, tiny_recipe, with_train
from launching import rvc_dist
from safetensors.numpy import load_file

from rvc_dist import __main__ as cli
from rvc_dist.choices import DISCRIMINATORS
from rvc_dist.config import BenchConfig, ConfigError, LossConfig, Recipe
from rvc_dist.models.discriminator import MultiPeriodDiscriminator, PeriodDiscriminator, ScaleDiscriminator
from rvc_dist.tools import bench, bench_report, measuring, parity, peak
from rvc_dist.workspace import Shard, StageError

LOSSES = {"loss/d", "loss/g_mel", "loss/g_kl", "loss/g_fm", "loss/g_adv", "loss/g_total"}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """A layer of each kind, in ranks too, a quick peak, and a fresh Accelerate."""
    thin_networks(monkeypatch.setattr)
    monkeypatch.setenv("THIN", "1")
    monkeypatch.setattr(bench, "measured_peak", lambda device, dtype: 1e13)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def bench_recipe(folder, seconds=0.6, options=None, **train) -> Recipe:
    """A run with features; `options` are those of the bench section."""
    recipe = tiny_recipe(folder, **train)
    make_features(recipe, seconds=seconds)
    return replace(recipe, bench=BenchConfig(**({"warmup_steps": 1, "steps": 2} | (options or {}))))


def run_of(recipe) -> measuring.MeasuredRun:
    AcceleratorState._reset_state(reset_partial_state=True)
    stage = bench.Bench(recipe, Shard())
    stage.prepare()
    return measuring.MeasuredRun(stage.recipe())


def results(recipe, name="results.json"):
    return json.loads((bench.Bench(recipe, Shard()).folder / name).read_text())["results"]


def files(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


# What is counted


def conv_flops(module, shape) -> int:
    """Forward pass and gradients of a sub-discriminator's layers for real waves of `shape`, by hand.

    The first layer's input needs no gradient.
    """
    batch, _, length = shape
    columns, total = batch, 0
    if isinstance(module, PeriodDiscriminator):
        columns, length = batch * module.period, math.ceil(length / module.period)
    for i, layer in enumerate([*module.convs, module.conv_post]):
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
        length = (length + 2 * padding - kernel) // stride + 1
        once = 2 * columns * length * layer.out_channels * (layer.in_channels // layer.groups) * kernel
        total += once * (3 if i else 2)
    return total


@pytest.mark.parametrize("module", [PeriodDiscriminator(7, 64), ScaleDiscriminator(256)])
def test_operations_of_a_discriminator_are_those_of_its_convolutions(module):
    assert isinstance(module, PeriodDiscriminator) or {c.groups for c in module.convs} >= {1, 4, 16}
    wave = torch.randn(2, 1, 1000)
    with measuring.flop_counter() as counter:
        score, _ = module(wave)
        score.sum().backward()
    assert counter.get_total_flops() == conv_flops(module, wave.shape)


def test_operations_of_a_transposed_convolution():
    layer = torch.nn.ConvTranspose1d(16, 8, 4, stride=2, padding=1)
    with measuring.flop_counter() as counter:
        layer(torch.randn(2, 16, 100)).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 2 * 100 * 16 * 8 * 4)


def test_operations_of_a_step_by_part(tmp_path):
    run = run_of(bench_recipe(tmp_path))
    batches = run.longest()
    flops = run.count_flops(batches)
    spec = run.recipe.rate_spec
    sliced = (2 * len(batches[0].clips), 1, spec.segment)  # real and generated slices in one pass
    assert flops["d_step"] == sum(conv_flops(d, sliced) for d in run.step.d.module.discriminators)
    assert set(flops) == {"g_forward", "d_step", "g_step"}
    # The G step passes real and generated slices forward, and gradients back to the generated ones and through G.
    assert flops["g_step"] > 0.5 * flops["d_step"] + 2 * flops["g_forward"] * 0.8


def test_micro_batches_cost_a_second_forward_pass_of_g(tmp_path):
    once, twice = (bench_recipe(tmp_path / str(n), batch_size=1, grad_accum_steps=n) for n in (1, 2))
    counts = []
    for recipe in (once, twice):
        run = run_of(recipe)
        counts.append(run.count_flops(run.longest()))
    assert counts[1]["g_forward"] == 3 * counts[0]["g_forward"]
    assert counts[1]["d_step"] == 2 * counts[0]["d_step"]


def test_the_longest_batch_is_full_and_as_long_as_the_longest_clip(tmp_path):
    run = run_of(bench_recipe(tmp_path, batch_size=20))
    (batch,) = run.longest()
    assert len(batch.clips) == 20
    assert set(batch.clips) == set(range(len(run.table.train)))
    assert batch.loss_scale == 1.0
    assert batch.lengths[0] == max(c.num_frames for c in run.table.train)


@pytest.mark.parametrize("fastest", ["product", "1-D", "image", "channels last", "gradients"])
def test_the_peak_is_that_of_the_fastest_kernel(monkeypatch, fastest):
    """Whichever it is, with the operations that the kernels really do."""

    def seconds(work, _device):
        with measuring.flop_counter() as counter:
            work()
        tensors = [value for value in work.args if isinstance(value, torch.Tensor)]
        kinds = {
            "product": work.func is torch.mm,
            "1-D": tensors[0].dim() == 3,
            "image": tensors[0].dim() == 4,
            "channels last": all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors if t.dim() == 4)
            and tensors[0].dim() == 4,
            "gradients": work.func is torch.ops.aten.convolution_backward,
        }
        return counter.get_total_flops() / (265e9 if kinds[fastest] else 200e9)

    monkeypatch.setattr(peak, "_seconds", seconds)
    assert peak.measured_peak(torch.device("cpu"), torch.float32) == pytest.approx(265e9)


def test_gradients_of_a_hopeless_convolution_are_not_waited_for(monkeypatch):
    tried = []
    monkeypatch.setattr(peak, "_seconds", lambda work, _: tried.append(work.func) or 10.0 ** len(tried))
    peak.measured_peak(torch.device("cpu"), torch.float16)
    assert torch.ops.aten.convolution in tried
    assert torch.ops.aten.convolution_backward not in tried


def test_a_peak_is_measured_in_seconds():
    began_at = time.process_time()
    assert 1e8 < peak.measured_peak(torch.device("cpu"), torch.float32) < 1e13
    assert time.process_time() - began_at < 10


# What is reported


def span(wall_s, cpu_s):
    return {"wall_s": wall_s, "cpu_s": cpu_s}


def rank(walls, cpu_s, audio_s, alone) -> dict:
    parts = {name: span(0.1, cpu_s / 2) for name in ("g_forward", "d_step")}
    samples = [span(wall, cpu_s) | {"audio_s": audio_s, "parts": parts} for wall in walls]
    return {
        "samples": {"dealt": samples, "longest": samples},
        "longest_frames": 100,
        "wire_bytes_per_step": 40.0,
        "memory": {"resident": 7},
        "peak_flops": {"fp32": 10_000.0},
        "flops": {"g_forward": 100, "d_step": 300},
        "with_and_without_wire": [[span(2.0, 0.0), span(alone, 0.0)]] * 3,
    }


def test_numbers_of_several_ranks_are_put_together():
    ranks = [rank([1.0, 3.0, 2.0], 0.5, 6.0, alone=1.0), rank([2.0, 2.0, 2.0], 0.5, 6.0, alone=1.5)]
    summary = bench.summarise(ranks, on_cuda=False, precision="fp32")
    # Each step takes as long as on the slower rank: 2, 3 and 2 s.
    assert summary["series"]["dealt"]["wall_s"] == 2.0
    assert summary["series"]["dealt"]["audio_s_per_s"] == 3.0
    assert summary["utilisation"] == {
        "g_forward": 100 / 0.25 / 10_000,
        "d_step": 300 / 0.25 / 10_000,
        "step": 400 / 0.5 / 10_000,
    }
    wire = summary["communication"]
    assert (wire["share"], wire["slowest_rank"], wire["slowest_s"], wire["fastest_rank"]) == (0.25, 1, 1.5, 0)


def test_on_cuda_utilisation_is_by_seconds():
    summary = bench.summarise([rank([2.0], 0.5, 6.0, 1.0)], on_cuda=True, precision="fp32")
    assert summary["utilisation"]["step"] == 400 / 2.0 / 10_000
    assert summary["utilisation"]["d_step"] == 300 / 0.1 / 10_000


def test_more_than_all_of_a_device_is_an_error_and_no_number(capsys):
    ranks = [rank([2.0], 0.5, 6.0, alone=1.0) | {"peak_flops": {"fp32": 799.0}, "memory": {"resident": 7}}]
    summary = bench.summarise(ranks, on_cuda=False, precision="fp32")
    assert summary["utilisation"] == {"g_forward": 100 / 0.25 / 799, "d_step": None, "step": None}
    rows = {row[0]: row[-1] for row in bench_report.part_rows(summary)}
    assert (rows["g_forward"], rows["d_step"], rows["step"]) == ("50.1%", "error", "error")
    (line,) = bench_report.impossible(summary)
    assert line.startswith("ERROR of the benchmark: d_step, step did more operations a second than the measured peak")


def test_a_run_is_measured_and_nothing_outside_its_bench_folder_is_touched(tmp_path, capsys):
    recipe = bench_recipe(tmp_path, seconds=0.9)  # two lengths of batches
    for name in ("config.yaml", "compile.json", "checkpoints/keep", "tensorboard/keep"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("the run's own")
    before = files(tmp_path)
    bench.run(recipe, Shard())
    printed = capsys.readouterr().out
    inside = tmp_path / "bench"
    after = {p: v for p, v in files(tmp_path).items() if inside not in p.parents}
    assert after == before
    assert not list(inside.rglob("checkpoints"))

    (result,) = results(recipe)
    summary = result["summary"]
    assert result["key"]["data"] == "run"
    assert [len(s) for s in result["ranks"][0]["samples"].values()] == [2, 2]
    assert set(summary["series"]["dealt"]["parts"]) == {"data", "g_forward", "d_step", "g_step"}
    assert set(summary["series"]["longest"]["parts"]) == {"g_forward", "d_step", "g_step"}
    assert 0 < summary["utilisation"]["step"] < 1
    assert summary["wire_bytes_per_step"] == 0
    assert summary["memory"]["resident"] > 1e8
    assert summary["gradient_bytes"]["discriminator"] == 4 * summary["parameters"]["discriminator"]
    assert result["machine"]["cpu"]
    for text in ("1 rank, batch 2", "clips of the run", "utilisation", "g_step", "peak memory", "Scaling", "written: "):
        assert text in printed
    assert "\x1b" not in printed
    assert "─" not in printed


def test_results_accumulate_and_the_same_one_is_replaced(tmp_path):
    recipe = bench_recipe(tmp_path)
    bench.run(recipe, Shard())
    (first,) = results(recipe)
    bench.run(with_train(recipe, batch_size=1), Shard())
    assert [r["key"]["batch_size"] for r in results(recipe)] == [2, 1]
    bench.run(recipe, Shard())
    assert [r["key"]["batch_size"] for r in results(recipe)] == [1, 2]
    again = results(recipe)[1]
    assert again["key"] == first["key"]
    assert again["ranks"] != first["ranks"]


def stored(ranks, speed, **key) -> dict:
    return {"key": {"ranks": ranks, "threads": 1} | key, "summary": {"series": {"dealt": {"audio_s_per_s": speed}}}}


def test_the_scaling_table_takes_results_that_differ_in_ranks_alone():
    every = [stored(4, 30.0), stored(2, 20.0), stored(8, 99.0, threads=3)]
    rows = list(bench_report.scaling_rows(every[0], every))
    assert rows == [["2", "20.00", "1.00", "100%", ""], ["4", "30.00", "1.50", "75%", ""]]
    (line,) = bench_report.not_comparable(every[0], every)
    assert line == "8 ranks: not in this table, since measured with threads: 1 -> 3"


# The demo voice


def test_without_features_clips_of_the_demo_voice_are_measured(tmp_path, capsys):
    recipe = replace(tiny_recipe(tmp_path, batch_size=3), bench=BenchConfig(warmup_steps=1, steps=1))
    bench.run(recipe, Shard())
    printed = capsys.readouterr().out
    assert "clips of the demo voice with random content features" in printed
    assert [p.name for p in tmp_path.iterdir()] == ["bench"]
    (result,) = results(recipe)
    assert result["key"]["data"] == "demo"
    assert result["ranks"][0]["samples"]["dealt"][0]["audio_s"] == pytest.approx(9.0)


def test_clips_of_the_demo_voice(tmp_path):
    recipe = tiny_recipe(tmp_path, batch_size=8)
    stage = bench.Bench(recipe, Shard())
    stage.prepare()
    features = load_file(stage.work.features_file(0))
    waves = load_file(stage.work.clips_file(0))
    assert len({wave.tobytes() for wave in waves.values()}) == len(waves) >= 20
    assert {wave.shape for wave in waves.values()} == {(72000,)}
    assert all(np.abs(wave).max() > 0.05 for wave in waves.values())
    assert {features[k].shape for k in features if k.endswith("content")} == {(150, 768)}
    f0 = features["00000.f0"]
    assert f0.shape == (300,)
    assert f0[f0 > 0].min() >= 80
    assert f0.max() <= 300
    assert 0.1 < (f0 == 0).mean() < 0.4
    clips = measuring.MeasuredRun(stage.recipe()).table.train  # whole global batches, of every clip
    assert len(clips) % 8 == 0
    assert len(clips) >= max(4 * 8, len(waves))
    assert len(set(clips)) == len(waves)


def test_clips_of_the_demo_voice_follow_the_recipe_and_are_cut_once(tmp_path):
    stage = bench.Bench(tiny_recipe(tmp_path), Shard())
    stage.prepare()
    before = files(tmp_path)
    stage.prepare()
    assert files(tmp_path) == before
    v1 = replace(tiny_recipe(tmp_path), model=replace(tiny_recipe(tmp_path).model, version="v1"))
    other = bench.Bench(v1, Shard())
    assert not other._is_cut()
    other.prepare()
    assert load_file(other.work.features_file(0))["00000.content"].shape == (150, 256)


def test_a_moved_run_folder_keeps_its_links(tmp_path):
    recipe = bench_recipe(tmp_path / "old")
    bench.Bench(recipe, Shard()).prepare()
    (tmp_path / "old").rename(tmp_path / "new")
    moved = bench.Bench(replace(recipe, run_dir=str(tmp_path / "new")), Shard())
    moved.prepare()
    assert moved.work.features_file(0).is_file()
    assert moved.work.clips_dir.resolve() == (tmp_path / "new" / "clips").resolve()


# The plain step


@pytest.mark.parametrize(
    ("vocoder", "options"),
    [
        ("hifi-gan", {}),
        ("hifi-gan", {"d_updates": 2, "loss": LossConfig(stft=2.5), "mel_frames": "edge"}),
        ("refinegan", {}),
    ],
)
def test_the_plain_step_computes_the_same_losses_and_gradients(tmp_path, vocoder, options):
    # So low a rate that D, whose update comes before G's losses, is the same in both to float32 rounding.
    recipe = bench_recipe(tmp_path, learning_rate=1e-9, **options)
    run = run_of(replace(recipe, model=replace(recipe.model, vocoder=vocoder)))
    batches = run.longest()
    run.train_step(batches)
    plain = run.plain("recipe")
    losses = run.compare_losses(plain, batches)
    assert set(losses) == LOSSES | ({"loss/g_stft"} if options else set())
    for name, (ours, theirs) in losses.items():
        assert theirs == pytest.approx(ours, rel=1e-5), name
    mine, its = (dict(m.named_parameters()) for m in (run.step.g.module, plain.generator))
    for name, parameter in mine.items():
        if parameter.grad is not None:
            difference = (its[name].grad - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-8)
            assert difference < 2e-4, name


def test_the_plain_step_costs_ds_gradients_once_more(tmp_path):
    run = run_of(bench_recipe(tmp_path))
    plain = run.plain("recipe")
    (batch,) = run.longest()
    with measuring.flop_counter() as counter:
        plain.step(batch, 1.0)
    flops = run.count_flops([batch])
    assert all(p.grad is not None for p in plain.d.parameters())
    # In the G step: D's gradients from real and generated slices, and the way back through the real ones. The D step
    # has as many operations for these, and as many again forward and on the way back through the generated ones.
    assert counter.get_total_flops() == sum(flops.values()) + flops["d_step"] // 2


def test_a_thin_image_gives_the_same_score_and_features():
    from rvc_dist.tools.plain_step import PlainDiscriminator

    network = MultiPeriodDiscriminator(DISCRIMINATORS["v2"], 64)
    real, fake = torch.randn(2, 2, 1, 1001)
    with torch.no_grad():
        plain, _ = PlainDiscriminator(network)(real, fake)
        whole = network(real)
    for (score, features), other_score, other_features in zip(plain, whole.scores, whole.features, strict=True):
        torch.testing.assert_close(score.sort(1).values, other_score.sort(1).values, rtol=1e-4, atol=1e-6)
        for mine, other in zip(features, other_features, strict=True):
            assert mine.numel() == other.numel()
            torch.testing.assert_close(mine.abs().mean(), other.abs().mean())


@pytest.mark.slow
def test_the_ratio_to_the_plain_step_is_printed(tmp_path, capsys):
    recipe = bench_recipe(tmp_path, options={"plain": True, "plain_precision": "fp32"}, precision="bf16")
    bench.run(recipe, Shard())
    assert "Against a plain RVC step (fp32 precision)" in capsys.readouterr().out
    (result,) = results(recipe)
    plain = result["summary"]["plain"]
    assert set(plain["losses"]) == LOSSES
    assert 0 < plain["difference"] < 0.2
    assert plain["ratio"]["cpu_s"] == pytest.approx(plain["plain"]["cpu_s"] / plain["real"]["cpu_s"])
    assert "bf16" in result["summary"]["peak_flops"]


# Parity


def test_fast_train_changes_nothing_on_a_cpu(tmp_path, capsys):
    recipe = bench_recipe(tmp_path, options={"parity": True}, fast_train=True)
    bench.run(recipe, Shard())
    (result,) = results(recipe, "parity.json")
    assert result["settings"] == ["fast_train true"]
    assert set(result["compared"]) == LOSSES | {"grad/norm_d", "grad/norm_g"}
    for name, row in result["compared"].items():
        assert row["absolute"] == row["relative"] == 0.0, name
        assert row["first"][0] == row["first"][1] > 0
    for flag in ("tf32 matmul", "tf32 cudnn", "cudnn.benchmark"):
        assert {n: side["machine"][flag] for n, side in result["sides"].items()} == {"float32": False, "recipe": True}
    printed = capsys.readouterr().out
    for text in (*result["compared"], "fast_train true", "mean absolute differences", "0.00%"):
        assert text in printed


def test_bf16_adamw_changes_little_but_something(tmp_path):
    recipe = bench_recipe(tmp_path, options={"parity": True, "steps": 3}, bf16_adamw=True)
    bench.run(recipe, Shard())
    (result,) = results(recipe, "parity.json")
    curves = result["curves"]["loss/g_mel"]
    assert [len(curve) for curve in curves.values()] == [3, 3]
    for name, row in result["compared"].items():
        assert 0 < row["relative"] < 0.2, name
        assert row["steps"] == 3
    assert not (tmp_path / "bench" / "results.json").exists()


def test_steps_without_finite_gradients_are_left_out_of_the_comparison():
    row = parity._compare([1.0, None, 4.0], [2.0, 1.0, 4.0])
    assert row == {
        "first": (1.0, 2.0),
        "last": (4.0, 4.0),
        "mean": [2.5, 3.0],
        "steps": 2,
        "absolute": 0.5,
        "relative": 0.2,
    }
    assert parity._compare([None], [1.0]) is None


@pytest.mark.parametrize(
    ("train", "num_ranks", "settings"),
    [
        ({"compile": "always"}, 1, ["compile always"]),
        ({"precision": "bf16", "optimizer": "radam"}, 1, ["precision bf16", "optimizer radam"]),
        ({"grad_compression": "bf16"}, 2, ["grad_compression bf16"]),
        ({}, 2, None),
        ({"grad_compression": "bf16"}, 1, None),  # one rank sends nothing
    ],
)
def test_parity_compares_what_the_recipe_asks_for(tmp_path, train, num_ranks, settings):
    config = tiny_recipe(tmp_path, **train).train
    if settings is None:
        with pytest.raises(StageError, match="--parity: nothing to compare"):
            parity.asked_for(config, num_ranks)
    else:
        assert parity.asked_for(config, num_ranks) == settings


# Mistakes


def test_parity_has_a_short_form():
    assert cli.parse("bench", ["--parity", "--train.fast_train", "true"])[0].bench.parity
    assert not cli.parse("bench", [])[0].bench.parity
    with pytest.raises(ConfigError, match="unknown key parity"):
        cli.parse("train", ["--parity"])


def failing(capsys, recipe, *arguments) -> str:
    """What the command line says of a recipe that it cannot measure."""
    path = bench.Bench(recipe, Shard()).run.root.parent / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert cli.main(["bench", "--config", str(path), *arguments]) in (1, 2)
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


@pytest.fixture
def _quiet(monkeypatch):
    monkeypatch.setattr(cli, "set_up_logging", lambda *_: None)


@pytest.mark.usefixtures("_quiet")
def test_mistakes_are_told(tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    recipe = bench_recipe(run_dir)
    for key in ("steps", "warmup_steps"):
        assert f"bench.{key}: got 0, expected at least 1" in failing(capsys, recipe, f"--bench.{key}", "0")
    assert "--parity: nothing to compare" in failing(capsys, recipe, "--parity")
    accumulating = failing(capsys, recipe, "--bench.plain", "true", "--train.grad_accum_steps", "2")
    assert "bench.plain: got train.grad_accum_steps 2" in accumulating
    assert not (run_dir / "bench").exists()

    other_rate = failing(capsys, recipe, "--data.sample_rate", "40000")
    assert "belongs to clips of 24000 Hz, the recipe says data.sample_rate 40000" in other_rate

    (run_dir / "bench" / "results.json").write_text("{")
    assert "results.json: not valid JSON" in failing(capsys, recipe)
    (run_dir / "bench" / "results.json").write_text('{"format": 0}')
    assert "results.json: not results of this version" in failing(capsys, recipe)

    shutil.rmtree(run_dir / "bench")
    (run_dir / "bench").write_text("in the way")
    blocked = failing(capsys, recipe)
    assert f"{run_dir / 'bench'}: the benchmark's files cannot be written (File exists)" in blocked
    assert "remove what is in the way" in blocked

    def refuse(path, _data):
        raise PermissionError(13, "Permission denied", str(path))

    (run_dir / "bench").unlink()
    monkeypatch.setattr(bench, "atomic_write", refuse)
    assert "cannot be written (Permission denied); make " in failing(capsys, recipe)


# Several ranks


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_send_each_gradient_once_and_half_of_it_compressed(tmp_path):
    recipe = bench_recipe(tmp_path)
    config = tmp_path / "recipe.yaml"
    config.write_text(recipe.to_yaml())
    rvc_dist(1, "bench", "--config", config)
    output = rvc_dist(2, "bench", "--config", config, "--bench.plain", "true")
    for text in ("2 ranks, batch 2", "communication", "slowest and fastest alone", "Against a plain RVC step"):
        assert text in output
    rows = [line.split() for line in output.partition("Scaling")[2].splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("1", "2")] == ["1", "2"]
    rvc_dist(2, "bench", "--config", config, "--train.grad_compression", "bf16")
    alone, two, compressed = (r["summary"] for r in results(recipe))
    gradient_bytes = sum(alone["gradient_bytes"].values())
    assert [r["wire_bytes_per_step"] for r in (alone, two, compressed)] == [0, gradient_bytes, gradient_bytes / 2]
    assert len(results(recipe)[1]["ranks"]) == 2
    assert -1 < two["communication"]["share"] < 1
    assert two["plain"]["difference"] < 1e-3


@pytest.mark.slow
@pytest.mark.distributed
def test_parity_of_two_ranks(tmp_path):
    recipe = bench_recipe(tmp_path)
    config = tmp_path / "recipe.yaml"
    config.write_text(recipe.to_yaml())
    output = rvc_dist(2, "bench", "--config", config, "--parity", "--train.grad_compression", "bf16")
    assert "grad_compression bf16" in output
    (result,) = results(recipe, "parity.json")
    assert result["key"]["ranks"] == 2
    # Compression changes the gradients, so nothing of the first D loss, which comes before any update.
    first = result["compared"]["loss/d"]["first"]
    assert first[0] == first[1]
    assert 0 < result["compared"]["grad/norm_g"]["relative"] < 0.05
