"""The loop on one rank, in this process, with a very narrow network."""

import json
import logging
import math
import os
import shutil
import signal
from collections import defaultdict
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import EMBEDDER, changed, make_features, newest, tiny_recipe, train, with_train
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from rvc_dist.config import DataConfig, TrainConfig, load_recipe
from rvc_dist.data import clip_files, preprocess
from rvc_dist.features import extract, feature_files, index
from rvc_dist.files import write_json
from rvc_dist.models import spectral
from rvc_dist.models.generator import Generator
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.report.history import read_history
from rvc_dist.runtime.device import cpu_model
from rvc_dist.train import checkpoint, fingerprint, holdout, losses, memory, out_of_memory, trainer, validation
from rvc_dist.train.clips import MUTE_SOURCE
from rvc_dist.train.dataset import ClipTable
from rvc_dist.train.ddp import TrainedModule
from rvc_dist.train.progress import Progress
from rvc_dist.train.quality import Quality
from rvc_dist.train.step import GanStep
from rvc_dist.voice import export
from rvc_dist.voice.file import Voice
from rvc_dist.workspace import Shard, Speakers, StageError, Stopped, WorkList, Workspace, read_json
from rvc_dist.workspace import fingerprint as fingerprint_of

pytestmark = pytest.mark.usefixtures("thin")
DRAWN_ON = {"extract.unvoiced": "interpolated"}


def quality_of(mel_distance: float) -> Quality:
    return Quality(mel_distance, 1.0, 1.0, 0.1, 1.0, 0.9)


def scalars(recipe, name: str) -> dict[int, float]:
    """Of each step that the history has; TensorBoard has the same."""
    history = read_history(Workspace(recipe.run_dir, recipe.name).history_file)
    return {line["step"]: line["values"][name] for line in history if line["kind"] == "step" and name in line["values"]}


def same(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint) -> bool:
    pairs = [(a.models[n], b.models[n]) for n in a.models]
    pairs += [(a.optimizers[n].tensors, b.optimizers[n].tensors) for n in a.optimizers]
    assert all(a.optimizers[n].groups == b.optimizers[n].groups for n in a.optimizers)
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


def test_a_run_leaves_checkpoints_scalars_pictures_and_sounds(tmp_path):
    shown = {"samples": True, "trackers": ("tensorboard",)}
    recipe = tiny_recipe(tmp_path, max_steps=4, eval_every_steps=2, save_every_steps=2, **shown)
    make_features(recipe)
    saved = train(recipe)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "tiny"), {"scalars": 0})
    events.Reload()
    curves = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert saved.progress.step == 4
    assert saved.progress.best_metric is not None
    assert saved.identity["generator.content_channels"] == 16
    mel = curves["loss/g_mel"]
    assert sorted(mel) == [1, 2, 3, 4]
    assert all(v > 0 for v in mel.values())
    assert mel == pytest.approx(scalars(recipe, "loss/g_mel"), rel=1e-6)
    assert sorted(curves["validation/mel_distance"]) == [2, 4]
    validated = [line for line in read_history(tmp_path / "metrics.jsonl") if line["kind"] == "validation"]
    assert [line["step"] for line in validated] == [2, 4]
    assert validated[-1]["values"]["mel_distance"] == pytest.approx(curves["validation/mel_distance"][4], rel=1e-6)
    assert [*validated[0]["speakers"]] == ["0"]
    assert [line["is_best"] for line in validated] == [line["step"] <= saved.progress.best_step for line in validated]
    assert {"samples/own_1", "originals/own_1"} <= {*events.Tags()["audio"]}
    assert "spectrograms/held_out" in events.Tags()["images"]
    for name in ("grad/norm_g", "grad/norm_d", "train/lr", "perf/audio_s_per_s", "perf/g_step_s"):
        assert len(curves[name]) == 4
    run, *lines = read_history(tmp_path / "metrics.jsonl")
    assert (run["step"], run["total_steps"], run["global_batch"]) == (0, 4, 2)
    assert run["ranks"] == [{"rank": 0, "host": os.uname().nodename, "device": "cpu", "name": cpu_model()}]
    steps = {line["step"]: line["values"]["loss/g_mel"] for line in lines if line["kind"] == "step"}
    assert steps == pytest.approx(mel)
    assert (lines[-1]["kind"], lines[-1]["step"], lines[-1]["why"]) == ("end", 4, "done")
    assert [(line["step"], line["path"], line.get("why")) for line in lines if "path" in line] == [
        (2, "checkpoints/step_00000002", "due"),
        (2, "voice/tiny_0e_2s.pth", None),
        (4, "checkpoints/step_00000004", "end"),
        (4, "voice/tiny_1e_4s.pth", None),
    ]


@pytest.mark.parametrize("page_is", ["made", "a folder"])
def test_the_page_of_a_run_has_its_end_and_no_fault_of_it_ends_the_run(tmp_path, page_is, caplog):
    recipe = tiny_recipe(tmp_path, max_steps=2, eval_every_steps=2, report=True)
    make_features(recipe)
    page = tmp_path / "report.html"
    if page_is == "a folder":
        page.mkdir()
    trainer.run(recipe, Shard())
    warned = [message for message in caplog.messages if str(page) in message]
    assert [message.endswith(f"; `rvc-dist report {tmp_path}` makes it") for message in warned] == (
        [True] if page_is == "a folder" else []
    )
    assert page.is_dir() or "done, at step 2 of 2" in page.read_text(encoding="utf-8")


def test_the_voice_file_knows_its_trained_speakers(tmp_path):
    recipe = replace(tiny_recipe(tmp_path, max_steps=1), data=DataConfig(sample_rate=24000, holdout=0.0))
    make_features(recipe, speakers=(1, 3))  # no folder 0/ and 2/; all of them have silent clips
    assert train(recipe).speakers.trained == (1, 3)
    assert train(with_train(recipe, max_steps=2)).speakers.trained == (1, 3)
    assert Workspace(recipe.run_dir, recipe.name).speakers() == Speakers({1: "1", 3: "3"}, (1, 3))
    export.run(recipe, Shard())
    voice = Voice.load(Workspace(recipe.run_dir, recipe.name).last_voice_file, torch.device("cpu"))
    assert (voice.trained_speakers, voice.speaker(None)) == ((1, 3), 1)
    with pytest.raises(StageError, match=r"infer\.speaker: got 0, this voice was trained on speakers 1, 3"):
        voice.speaker(0)


def test_silent_clips_train_no_speaker(tmp_path):
    recipe = replace(tiny_recipe(tmp_path), data=DataConfig(sample_rate=24000, holdout=0.0))
    make_features(recipe, speakers=(0, 1, 2))
    table = ClipTable.load(recipe)
    only_silent = replace(table, train=tuple(c for c in table.train if c.speaker != 1 or c.source == MUTE_SOURCE))
    assert {c.speaker for c in only_silent.train} == {0, 1, 2}
    assert only_silent.trained_speakers == (0, 2)


@pytest.mark.usefixtures("whole_networks")
def test_the_mel_loss_falls(tmp_path):
    recipe = tiny_recipe(tmp_path, max_steps=24, learning_rate=3e-3, eval_every_steps=1000)
    make_features(recipe)
    train(recipe)
    mel = list(scalars(recipe, "loss/g_mel").values())
    assert sum(mel[-6:]) < 0.8 * sum(mel[:6]), mel


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16_adamw": True, "lr_schedule": "cosine"},
        {"num_workers": 0, "grad_accum_steps": 2, "batch_size": 1, "log_every_steps": 5},
        {"cache_on_device": True, "kl_warmup_steps": 6, "warmup_steps": 3},
    ],
)
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, options):
    whole = tiny_recipe(tmp_path / "whole", max_steps=7, eval_every_steps=3, **options)
    halves = tiny_recipe(tmp_path / "halves", max_steps=7, eval_every_steps=3, save_every_steps=3, **options)
    for recipe in (whole, halves):
        make_features(recipe)
    reference = train(whole)
    # The interrupted run leaves its checkpoint of step 3 and is then cut off after some more steps.
    train_until(halves, 5)
    assert newest(halves).progress.step == 3
    assert same(train(halves), reference)
    assert scalars(halves, "loss/g_mel") == scalars(whole, "loss/g_mel")
    assert scalars(halves, "loss/d") == scalars(whole, "loss/d")


def train_until(recipe, step: int) -> None:
    """Train and die at `step` without any goodbye."""

    class DiedError(Exception):
        pass

    class Dying(trainer.Trainer):
        def train_step(self, batch):
            if self.progress.step == step:
                raise DiedError
            super().train_step(batch)

    AcceleratorState._reset_state(reset_partial_state=True)
    dying = Dying(recipe)
    with pytest.raises(DiedError):
        dying.train()
    dying.close()


def test_a_finished_run_is_left_alone(tmp_path, caplog):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    reference = train(recipe)
    with caplog.at_level(logging.INFO):
        assert same(train(recipe), reference)
    assert "already trained" in caplog.text


def test_a_signal_saves_and_stops_and_the_run_goes_on(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, max_steps=5)
    make_features(recipe)
    step = trainer.Trainer.train_step
    for stops_at, number in ((2, signal.SIGTERM), (3, signal.SIGUSR1), (4, signal.SIGINT)):

        def signalled(self, batch, stops_at=stops_at, number=number):
            step(self, batch)
            if self.progress.step == stops_at - 1:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(trainer.Trainer, "train_step", signalled)
        with pytest.raises(Stopped, match=f"{number.name} at step {stops_at}"):
            train(recipe)
        end = read_history(tmp_path / "metrics.jsonl")[-1]
        assert (end["kind"], end["step"], end["why"]) == ("end", stops_at, f"stopped by {number.name}")
        assert newest(recipe).progress.step == stops_at
    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    assert train(recipe).progress.step == 5


def test_the_generator_step_gives_the_discriminator_no_gradients(tmp_path):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    train_one = trainer.Trainer(recipe)
    (batch,) = next(train_one.loader.steps(train_one.progress))
    before = {k: v.clone() for k, v in train_one.step.d.module.state_dict().items()}
    train_one.train_step([batch])
    after_d_step = {k: p.grad.clone() for k, p in train_one.step.d.module.named_parameters()}
    out, real = train_one.step.generate(batch)
    with train_one.step.d.frozen(torch.float32):
        sum(train_one.step.generator_terms(out, real, batch).values()).backward()
    assert all(torch.equal(p.grad, after_d_step[k]) for k, p in train_one.step.d.module.named_parameters())
    assert all(p.requires_grad for p in train_one.step.d.module.parameters())
    assert any(not torch.equal(before[k], v) for k, v in train_one.step.d.module.state_dict().items())
    train_one.close()


@pytest.mark.parametrize(("dtype", "makings"), [(torch.float32, 1), (torch.bfloat16, 1), (None, 2)])
def test_frozen_passes_gradients_through_and_makes_weights_once(dtype, makings, monkeypatch):
    """The same numbers in any precision; a compiled network (None) makes its weights in each pass."""
    made = []
    weigh = torch._weight_norm
    monkeypatch.setattr(torch, "_weight_norm", lambda *args: made.append(1) or weigh(*args))
    net = torch.nn.Sequential(weight_norm(torch.nn.Conv1d(2, 2, 3)), torch.nn.Conv1d(2, 2, 1))
    net[1].bias.requires_grad_(False)
    wrapped = torch.nn.Sequential(net) if dtype is None else net
    trained = TrainedModule(net, wrapped, wrapped, torch.optim.SGD(net.parameters()))
    x = torch.randn(2, 1, 2, 8).unbind()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with autocast:
        expected = [net(part) for part in x]
    made.clear()
    x[0].requires_grad_()
    with trained.frozen(dtype or torch.float32), autocast:
        seen = [wrapped(part) for part in x]
        seen[0].sum().backward()
    assert len(made) == makings
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert x[0].grad is not None
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net[1].parameters()] == [True, False]
    net(x[0]).sum().backward()
    assert all(p.grad is not None for p in net[0].parameters())


def test_a_step_sees_the_whole_files_spectrogram(tmp_path, monkeypatch):
    """Losses and gradients are those of spectrograms taken of the whole file and cut, as other tools of RVC do."""
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    net = trainer.Trainer(recipe)
    (batch,) = next(net.loader.steps(net.progress))

    def of_whole_files(wave, n_fft, hop):
        rows = torch.zeros(len(batch.clips), n_fft // 2 + 1, batch.content.shape[1])
        for row, number, length in zip(rows, batch.clips, batch.lengths, strict=True):
            clip = net.table.train[number]
            file = net.work.clips_file(clip.unit)
            samples = safe_open(file, "pt").get_tensor(clip.key) if clip.unit >= 0 else torch.zeros(int(length) * hop)
            assert len(samples) >= length * hop
            row[:, :length] = spectral.spectrogram(samples[None], n_fft, hop)[0, :, :length]
        return rows

    results = []
    for way in (spectral.spectrogram_with_reach, of_whole_files):
        monkeypatch.setattr("rvc_dist.train.step.spectrogram_with_reach", way)
        out, real = net.step.generate(batch)
        terms = net.step.generator_terms(out, real, batch)
        net.step.g.module.zero_grad()
        losses.weighted_sum(terms, recipe.train.loss, 1.0).backward()
        gradients = torch.cat([p.grad.flatten() for p in net.step.g.module.parameters() if p.grad is not None])
        results.append((torch.stack([*terms.values()]).detach(), gradients))
    net.close()
    (values, gradients), (whole_values, whole_gradients) = results
    torch.testing.assert_close(values, whole_values, rtol=1e-6, atol=1e-7)
    assert (gradients - whole_gradients).norm() <= 1e-5 * whole_gradients.norm()


def test_changed_shapes_are_refused_with_every_mismatch(tmp_path):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    train(recipe)
    with pytest.raises(StageError, match="optimizer: adamw, now radam"):
        train(with_train(recipe, optimizer="radam", max_steps=9))
    assert load_recipe(tmp_path / "config.yaml") == recipe


def test_another_voice_in_a_trained_run_folder_is_refused_and_nothing_is_touched(tmp_path):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    train(recipe)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "checkpoints" in p.parts}
    config = (tmp_path / "config.yaml").read_text()
    make_features(recipe, voice="theirs")  # in files of the same names
    for steps in (4, 9):
        message = (
            r"step_00000004 was trained on other recordings \(3 \(0\.wav, 1\.wav, 2\.wav\)\).*none is the same.*run_dir"
        )
        with pytest.raises(StageError, match=message):
            train(with_train(recipe, max_steps=steps))
    assert {p: p.read_bytes() for p in before} == before
    assert (tmp_path / "config.yaml").read_text() == config


def test_changed_recordings_are_told_and_the_best_begins_anew_with_other_validation_clips(
    tmp_path, monkeypatch, caplog
):
    recipe = tiny_recipe(tmp_path, max_steps=2, eval_every_steps=1)
    make_features(recipe)
    first = train(recipe)
    assert "the data changed" not in caplog.text
    assert first.data["dataset_length"] == "00:00:05"
    # The same data, and a seed or share that choose the same clips: nothing changes.
    again = train(with_train(recipe, max_steps=3)).progress
    assert again.best_step in (1, 2, 3)
    assert "begins anew" not in caplog.text
    make_features(recipe, num_clips=12)
    more = train(with_train(recipe, max_steps=4)).progress
    assert "the data changed since step_00000003: 1 (3.wav) new; the epoch begins anew" in caplog.text
    assert more.batches_done == ((2, 1),), "of the new clips none but this step's were seen"
    caplog.clear()
    for number, other in enumerate(
        (replace(recipe, data=replace(recipe.data, holdout=0.4)), with_train(recipe, seed=5))
    ):
        after = train(with_train(other, max_steps=5 + number)).progress
        assert "validation has other clips, another seed or another measure" in caplog.text
        assert (after.best_step, after.step) == (5 + number, 5 + number), "what was best on other clips does not count"
        caplog.clear()
    monkeypatch.setattr(holdout, "BEST_BY", "another measure, as that of older versions")
    monkeypatch.setattr(validation.Validation, "measure", lambda self, _: [quality_of(99.0)] * len(self.clips))
    measured_anew = train(with_train(other, max_steps=7)).progress
    assert (measured_anew.best_metric, measured_anew.best_step) == (99.0, 7)
    assert "another seed or another measure since step_00000006: the best begins anew" in caplog.text
    caplog.clear()
    assert train(with_train(other, max_steps=8)).progress.best_step == 7
    assert "begins anew" not in caplog.text


def test_a_checkpoint_that_does_not_know_its_data_goes_on_with_a_line(tmp_path, monkeypatch, caplog):
    recipe = tiny_recipe(tmp_path, max_steps=1)
    make_features(recipe)
    monkeypatch.setattr(fingerprint, "of_data", lambda *_: {})
    train(recipe)
    monkeypatch.undo()
    make_features(recipe, voice="any")
    with caplog.at_level(logging.INFO):
        assert train(with_train(recipe, max_steps=2)).data["recordings"].keys() == {"any 0", "any 1", "any 2"}
    assert "is from before checkpoints knew their data" in caplog.text


def test_a_recipe_that_features_were_not_made_with_is_refused_and_not_kept(tmp_path):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    work = Workspace(recipe.run_dir, recipe.name)
    report = {"settings": feature_files.feature_settings(recipe), "clips": fingerprint_of([]), "content_frames": 0}
    work.features_report_file.write_text(json.dumps(report))
    work.work_list_file.write_text(WorkList("", clip_files.clip_settings(recipe), (), ()).dumps())
    train(recipe)
    kept = work.config_file.read_text()
    others = {
        r"extract\.f0_method: yin -> rmvpe": replace(recipe, extract=replace(recipe.extract, f0_method="rmvpe")),
        r"model\.version: v2 -> v1": replace(recipe, model=replace(recipe.model, version="v1")),
        r"preprocess\.clean: 0\.0 -> 0\.5": replace(recipe, preprocess=replace(recipe.preprocess, clean_dataset=True)),
        r"is the run of tiny, the recipe's name is other": replace(recipe, name="other"),
    }
    for message, other in others.items():
        with pytest.raises(StageError, match=message):
            train(with_train(other, max_steps=9))
    with pytest.raises(StageError, match=r"clips of other settings.*preprocess\.chunk_len: 3\.0 -> 4\.0"):
        extract.run(replace(recipe, preprocess=replace(recipe.preprocess, chunk_len=4.0)), Shard())
    for stage in (export, index, extract):
        with pytest.raises(StageError, match="is the run of tiny"):
            stage.run(replace(recipe, name="other"), Shard())
    assert work.config_file.read_text() == kept
    preprocess.save_recipe(replace(others[r"extract\.f0_method: yin -> rmvpe"], data=DataConfig("new", 24000)), work)
    assert load_recipe(work.config_file) == replace(recipe, data=DataConfig("new", 24000)), "until extract has run"


def test_pitch_of_the_other_convention_is_not_trained_on(tmp_path):
    """Neither its features nor, once those are made again, its checkpoint."""
    recipe = tiny_recipe(tmp_path, max_steps=1)
    make_features(recipe)
    assert "extract.unvoiced" not in train(recipe).identity, "the default's checkpoints are what they were"
    drawn = changed(with_train(recipe, max_steps=2), "extract", unvoiced="interpolated")
    with pytest.raises(StageError, match=r"set back what differs \(extract\.unvoiced: zero -> interpolated\)"):
        train(drawn)
    work = Workspace(recipe.run_dir, recipe.name)
    write_json(work.features_report_file, read_json(work.features_report_file) | {"settings": DRAWN_ON})
    with pytest.raises(StageError, match=r"was made with other settings;(?s:.)*extract\.unvoiced: zero, now interpol"):
        train(drawn)
    shutil.rmtree(work.checkpoints_dir)
    assert train(drawn).identity.items() >= DRAWN_ON.items()
    write_json(work.features_report_file, read_json(work.features_report_file) | {"settings": {}})
    with pytest.raises(StageError, match=r"extract\.unvoiced: interpolated, now zero"):
        train(with_train(recipe, max_steps=3))


def test_features_of_another_encoder_are_not_trained_on(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, max_steps=1)
    make_features(recipe)
    saved = train(recipe)
    generator = {"model": to_upstream(saved.models["generator"]), "embedder_model": "mfcc"}
    torch.save(generator | {"embedder_hash": EMBEDDER["hash"]}, tmp_path / "ours.pth")
    torch.save(generator | {"embedder_model": "contentvec"}, tmp_path / "theirs.pth")
    longer = with_train(recipe, max_steps=2)
    # The same weights by another name are the same encoder, others by the same name are not.
    monkeypatch.setitem(EMBEDDER, "hash", "f" * 16)
    make_features(recipe)
    with pytest.raises(StageError, match=r"embedder: mfcc \(weights 0123456789abcdef\), now mfcc \(weights f{16}\)"):
        train(longer)
    fresh = tiny_recipe(tmp_path / "fresh", max_steps=1)
    make_features(fresh)
    for name, trained_with in (("ours", r"mfcc \(weights 0123456789abcdef\)"), ("theirs", "contentvec")):
        message = (
            rf"train\.pretrained_g: .*{name}\.pth was trained with {trained_with}, the features are of mfcc \(weig"
        )
        with pytest.raises(StageError, match=message):
            train(with_train(fresh, pretrained_g=str(tmp_path / f"{name}.pth")))
    monkeypatch.setitem(EMBEDDER, "hash", "0123456789abcdef")
    monkeypatch.setitem(EMBEDDER, "name", "/elsewhere/mfcc")
    make_features(recipe)
    make_features(fresh)
    assert train(longer).identity["embedder"]["name"] == "/elsewhere/mfcc"
    assert train(with_train(fresh, pretrained_g=str(tmp_path / "ours.pth"))).progress.step == 1


@pytest.fixture
def poison(monkeypatch):
    """poison(NAME, STEPS): in these steps (from 1), counted over all runs of the test, a loss of that name is NaN."""

    def install(name: str, steps: set[int]) -> None:
        loss, calls = getattr(losses, name), []

        def poisoned(*args):
            calls.append(1)
            return loss(*args) * (float("nan") if len(calls) in steps else 1.0)

        monkeypatch.setattr(losses, name, poisoned)

    return install


@pytest.mark.parametrize(
    ("loss", "optimizer"),
    [
        ("multiscale_mel_loss", "adamw"),
        ("discriminator_loss", "adamw"),
        ("multiscale_mel_loss", "radam"),
        ("discriminator_loss", "anyprecision_adamw"),
    ],
)
def test_a_step_without_finite_gradients_changes_nothing_and_its_clips_are_named(
    tmp_path, poison, caplog, loss, optimizer
):
    recipe = tiny_recipe(tmp_path, optimizer=optimizer, save_every_steps=1, keep_checkpoints=9, eval_every_steps=99)
    make_features(recipe)
    poison(loss, {3})
    final = train(recipe)
    before, after = (checkpoint.load(tmp_path / "checkpoints" / f"step_0000000{step}") for step in (2, 3))
    poisoned, other = ("generator", "discriminator")[:: 1 if loss == "multiscale_mel_loss" else -1]
    assert all(torch.equal(v, after.models[poisoned][k]) for k, v in before.models[poisoned].items())
    tensors = before.optimizers[poisoned].tensors
    assert all(torch.equal(v, after.optimizers[poisoned].tensors[k]) for k, v in tensors.items())
    assert before.optimizers[poisoned].groups == after.optimizers[poisoned].groups
    assert any(not torch.equal(v, after.models[other][k]) for k, v in before.models[other].items())
    assert all(v.isfinite().all() for v in final.models["generator"].values())
    assert final.progress.step == 4
    assert sorted(scalars(recipe, "loss/g_mel")) == [1, 2, 4], "a bad step has no losses, and spoils no mean"
    (line,) = [r.message for r in caplog.records if "no update" in r.message]
    assert line.startswith("step 3:")
    assert ".wav (unit " in line
    (warned,) = [x for x in read_history(tmp_path / "metrics.jsonl") if "no update" in x.get("text", "")]
    assert (warned["kind"], warned["step"], warned["text"]) == ("warning", 3, line)


def test_too_many_bad_steps_in_a_row_go_back_to_the_checkpoint_and_then_stop(tmp_path, poison, caplog):
    recipe = tiny_recipe(tmp_path, max_steps=20, save_every_steps=5, log_every_steps=1, max_bad_steps=2)
    make_features(recipe)
    poison("multiscale_mel_loss", {6, 7, 8, 9})
    with pytest.raises(StageError, match=r"step 9: 2 steps in a row .*also after going back.*max_grad_norm"):
        train(recipe)
    assert "step 7: 2 steps in a row had no finite gradients; going on from the weights of step 5" in caplog.text
    saved = newest(recipe)
    assert saved.progress.step == 5
    assert all(v.isfinite().all() for v in saved.models["generator"].values())


def test_a_checkpoint_is_verified_before_a_run_goes_back_to_it(tmp_path, poison, monkeypatch):
    recipe = tiny_recipe(tmp_path, max_steps=9, save_every_steps=4, log_every_steps=1, max_bad_steps=2)
    make_features(recipe)
    poison("multiscale_mel_loss", {6, 7})
    step, weights = trainer.Trainer.train_step, tmp_path / "checkpoints" / "step_00000004" / "generator.safetensors"

    def damage(self, batches):
        if self.progress.step == 6:
            self.writer.wait()
            weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        step(self, batches)

    monkeypatch.setattr(trainer.Trainer, "train_step", damage)
    with pytest.raises(StageError, match=r"step_00000004 is damaged .*\n.*generator\.safetensors was changed"):
        train(recipe)


def test_bad_steps_before_the_first_checkpoint_stop_the_run(tmp_path, poison):
    recipe = tiny_recipe(tmp_path, max_steps=9, save_every_steps=9, log_every_steps=4)
    make_features(recipe)
    poison("multiscale_mel_loss", {1, 2, 3})
    with pytest.raises(StageError, match=r"step 4: 3 steps in a row .* before the first checkpoint"):
        train(recipe)
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, max_steps=4, save_every_steps=1, log_every_steps=1000)
    make_features(recipe)
    update = TrainedModule.update

    updated = []

    def overflow(self, max_norm):
        updated.append(1)
        if len(updated) > 4:  # in the third step; D and G are updated in each
            next(self.module.parameters()).data.mul_(float("inf"))
        return update(self, max_norm)

    monkeypatch.setattr(TrainedModule, "update", overflow)
    with pytest.raises(StageError, match="step 3: a weight is not finite"):
        train(recipe)
    assert newest(recipe).progress.step == 2


def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_was_saved(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, max_steps=9, save_every_steps=2, eval_every_steps=99)
    make_features(recipe)
    usage = checkpoint.shutil.disk_usage
    asked = []

    def filling(folder):
        asked.extend([folder] if tmp_path in folder.parents else [])  # and not shared memory
        return usage(folder)._replace(free=10**6 if len(asked) > 2 else 10**12)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", filling)
    with pytest.raises(StageError, match=r"a checkpoint needs \d+ MB, the disk has 1 MB free"):
        train(recipe)
    assert newest(recipe).progress.step == 2


def test_a_folder_that_cannot_hold_checkpoints_is_refused_before_any_step(tmp_path):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(StageError, match=r"checkpoints cannot be written there .* nothing was trained"):
        train(recipe)
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    ("fits", "accumulated", "advice"),
    [
        (4, 1, "train.batch_size 4 would fit (4 with train.grad_accum_steps 2 keeps the steps as large)"),
        (4, 3, "train.batch_size 4 would fit (4 with train.grad_accum_steps 6 keeps the steps as large)"),
        (6, 1, "train.batch_size 6 would fit (4 with train.grad_accum_steps 2 keeps the steps as large)"),
        (0, 1, "not even one clip fits"),
    ],
)
def test_advice_is_below_the_batch_that_failed(monkeypatch, fits, accumulated, advice):
    monkeypatch.setattr(out_of_memory, "batch_that_fits", lambda *_: fits)
    step = SimpleNamespace(config=TrainConfig(batch_size=7, grad_accum_steps=accumulated))
    assert out_of_memory.remedy(step, SimpleNamespace(clips=range(7))) == advice


@pytest.mark.parametrize(
    ("available", "fits"),
    [
        (5500, "3 would fit (3"),
        (6500, "4 would fit (4"),
        (99999, "3 would fit (3"),
        (2500, "1 would fit (1"),
        (999, ""),
    ],
)
def test_no_memory_says_which_batch_would_fit_beside_what_graphs_hold(tmp_path, monkeypatch, available, fits):
    """Of 7 that failed, by hand: 500 bytes, 1000 a clip and 500 more in graphs, and 4 clips cannot be computed."""
    recipe = tiny_recipe(tmp_path, batch_size=7)
    make_features(recipe)
    sizes = []

    def out_of_memory(self, *_, **__):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    def dry_run(self, batch):
        sizes.append(len(batch.clips))

    def peak_of(work, device):
        work()
        return 500 + 1000 * sizes[-1] if sizes[-1] < 4 else None

    monkeypatch.setattr(GanStep, "__call__", out_of_memory)
    monkeypatch.setattr(GanStep, "local_dry_run", dry_run)
    monkeypatch.setattr(memory, "peak_of", peak_of)
    monkeypatch.setattr(memory, "graph_pools", lambda _: 7 * 500)
    net = trainer.Trainer(recipe)
    weights = sum(p.nbytes for n in net.networks.values() for p in n.module.parameters())
    net.close()
    monkeypatch.setattr(memory, "capacity", lambda _: 2 * weights + available)
    with pytest.raises(StageError, match=r"rank 0: cpu has not enough memory for train.batch_size 7 ") as caught:
        train(recipe)
    assert (f"; train.batch_size {fits}" if fits else "; not even one clip fits.") in str(caught.value)
    assert sizes == [3, 1]


def test_memory_counts_what_others_leave_what_this_process_may_have_and_the_pools_of_graphs(monkeypatch):
    gpu, gb = torch.device("cuda", 1), 10**9
    values = {
        "mem_get_info": (60 * gb, 100 * gb),
        "memory_reserved": 20 * gb,
        "memory_snapshot": [
            {"device": device, "total_size": size, "segment_pool_id": pool}
            for device, size, pool in ((1, 9 * gb, (0, 0)), (1, 3 * gb, (0, 1)), (1, 4 * gb, (0, 2)), (0, gb, (0, 1)))
        ],
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for fraction, available in ((1.0, 80 * gb), (0.5, 50 * gb)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _, fraction=fraction: fraction)
        assert memory.capacity(gpu) == available - fraction * 8 * gb
        assert memory.free_memory(gpu) == min(60 * gb, available - 20 * gb)
    assert memory.graph_pools(gpu) == 7 * gb
    assert memory.graph_pools(torch.device("cpu")) == 0


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_libraries_say_where_memory_lacks_is_known(text, is_one):
    assert memory.is_out_of_memory(RuntimeError(text)) is is_one
    assert memory.is_out_of_memory(torch.OutOfMemoryError("no memory"))


@pytest.mark.slow
def test_accumulated_micro_batches_are_the_larger_batch(tmp_path):
    """To the same bounds as ranks (test_exactness.py); here also the epoch's short batch, of 3 clips in 9."""
    options = {"log_every_steps": 1, "eval_every_steps": 99, "max_steps": 8}
    cases = {
        "whole": {"batch_size": 6},
        "micro": {"batch_size": 2, "grad_accum_steps": 3},
        "kept": {"batch_size": 4, "keep_global_batch": 6},
    }
    whole, micro, kept = (tiny_recipe(tmp_path / name, **options, **sizes) for name, sizes in cases.items())
    results = []
    for recipe in (whole, micro, kept):
        make_features(recipe, num_clips=12)
        results.append(train(recipe).models)
    for name in checkpoint.MODELS:
        for key, value in results[0][name].items():
            for other in results[1:]:
                assert (other[name][key] - value).norm() <= 1e-4 * value.norm(), key
    assert scalars(whole, "loss/g_mel") == pytest.approx(scalars(micro, "loss/g_mel"), rel=1e-4)
    assert sorted(scalars(micro, "loss/d")) == list(range(1, 9))


@pytest.mark.parametrize(
    ("nodes", "number", "of_node"),
    [("2", "SIGTERM", True), ("2", "SIGUSR1", False), ("2", "SIGINT", False), ("1", "SIGTERM", False)],
)
def test_sigterm_is_for_one_of_several_launchers_and_other_signals_for_all(nodes, number, of_node, monkeypatch):
    written = []
    run = SimpleNamespace(
        _finish_writing=lambda: None,
        is_main=False,
        progress=Progress(step=3),
        total_steps=9,
        history=SimpleNamespace(write=lambda *_, why: written.append(why)),
    )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    with pytest.raises(Stopped) as stopped:
        trainer.Trainer._stop(run, signal.Signals[number])
    assert stopped.value.of_node is of_node
    told = "launchers that were not asked to end go on from it" if of_node else "the same command continues"
    assert str(stopped.value) == f"stopped by {number} at step 3 of 9; a checkpoint was written and {told}"
    assert written == [f"stopped by {number}"]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # srun's ranks have no launcher
    with pytest.raises(Stopped) as stopped:
        trainer.Trainer._stop(run, signal.Signals[number])
    assert not stopped.value.of_node


def test_kl_warmup_raises_the_weight_linearly(tmp_path):
    recipe = tiny_recipe(tmp_path, kl_warmup_steps=4, eval_every_steps=99)
    make_features(recipe)
    train(recipe)
    by_name = {name: scalars(recipe, f"loss/g_{name}") for name in ("mel", "kl", "fm", "adv", "total")}
    for step in range(1, 5):
        others = 45 * by_name["mel"][step] + by_name["fm"][step] + by_name["adv"][step]
        assert by_name["total"][step] - others == pytest.approx(step / 4 * by_name["kl"][step], rel=1e-3)


def test_overtraining_ends_the_run(tmp_path, monkeypatch, caplog):
    recipe = tiny_recipe(tmp_path, max_steps=50, eval_every_steps=2, overtrain_detect=True, overtrain_threshold=2)
    make_features(recipe)
    monkeypatch.setattr(validation.Validation, "measure", lambda self, _: [quality_of(1.0)] * len(self.clips))
    saved = train(recipe)
    assert saved.progress.best_step == 2
    assert saved.progress.epoch - saved.progress.best_epoch == 2
    assert saved.progress.step < 50
    assert "overtraining" in caplog.text
    warning, end = read_history(tmp_path / "metrics.jsonl")[-2:]
    assert warning["text"].startswith("overtraining: ")
    assert end["why"] == "overtrained"


def test_validation_searches_no_kernels_for_the_length_of_each_clip(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    searched, infer = [], Generator.infer
    monkeypatch.setattr(
        Generator, "infer", lambda *inputs: searched.append(torch.backends.cudnn.benchmark) or infer(*inputs)
    )
    run = trainer.Trainer(recipe)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as fast_train has it on a GPU
    run.evaluate()
    run.close()
    assert set(searched) == {False}
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("searches", [True, False])
def test_a_step_searches_kernels_for_slices_alone(tmp_path, monkeypatch, searches):
    """In both directions: clips have hundreds of lengths, and a search for each took a GPU a minute in 20 steps."""
    recipe = tiny_recipe(tmp_path, grad_accum_steps=2)
    make_features(recipe, num_clips=11)  # all steps are full
    run = trainer.Trainer(recipe)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", searches)
    found: dict[str, set[bool]] = defaultdict(set)

    def watch(name, module):
        def note(*_: object) -> None:
            found[name].add(torch.backends.cudnn.benchmark)

        def forward(_module, _inputs, output):
            note()
            if output.requires_grad:
                output.register_hook(note)

        module.register_forward_hook(forward)

    g, d = (run.networks[name].module for name in checkpoint.MODELS)
    for name in ("enc_p.proj", "enc_q.pre", "enc_q.proj", "flow.flows.0.pre"):
        watch("clips", g.get_submodule(name))
    for module in (g.get_submodule("dec.conv_pre"), g.get_submodule("dec.conv_post"), d.discriminators[0].convs[0]):
        watch("slices", module)
    steps = run.loader.steps(run.progress)
    for _ in range(2):
        run.train_step(next(steps))
    run.close()
    assert found == {"clips": {False}, "slices": {searches}}
    assert torch.backends.cudnn.benchmark == searches


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(4, {(4, True), (3, False)}), (16, {(7, False), (7, True)})], ids=["end", "all"]
)
def test_no_kernels_are_searched_for_a_size_that_does_not_come_again(tmp_path, monkeypatch, batch_size, expected):
    """The last step of an epoch has fewer clips; all steps have where the dataset is smaller than a batch."""
    recipe = tiny_recipe(tmp_path, batch_size=batch_size)
    make_features(recipe)
    seen: set[tuple[int, bool]] = set()
    with closing(trainer.Trainer(recipe)) as run:
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        run.step.generator.dec.register_forward_hook(
            lambda _, __, wave: seen.add((len(wave), torch.backends.cudnn.benchmark))
        )
        steps = run.loader.steps(run.progress)
        for _ in range(2):
            run.train_step(next(steps))
    assert torch.backends.cudnn.benchmark
    assert seen == expected


def test_a_metric_that_is_no_number_is_never_the_best(tmp_path, monkeypatch, caplog):
    recipe = tiny_recipe(tmp_path, max_steps=4, eval_every_steps=1)
    make_features(recipe)
    distances = iter([math.inf, 2.0, math.inf, math.inf])
    monkeypatch.setattr(
        validation.Validation, "measure", lambda self, _: [quality_of(next(distances))] * len(self.clips)
    )
    progress = train(recipe).progress
    assert (progress.best_metric, progress.best_step) == (2.0, 2)
    assert "step 1 is not the best: mel distance inf is never the best" in caplog.text


def test_overtraining_cannot_be_seen_without_validation_and_the_run_says_so(tmp_path, caplog):
    recipe = tiny_recipe(tmp_path, max_steps=1, overtrain_detect=True)
    make_features(recipe, num_clips=3)
    train(replace(recipe, data=replace(recipe.data, holdout=0.05)))
    assert "train.overtrain_detect does nothing: no clip is held out" in caplog.text
    assert "data.holdout: nothing is held out of speaker 0 (2.1 s)" in caplog.text


def test_validation_leaves_the_training_noise_where_it_was(tmp_path):
    often = tiny_recipe(tmp_path / "often", max_steps=5, eval_every_steps=1)
    never = tiny_recipe(tmp_path / "never", max_steps=5, eval_every_steps=1000)
    for recipe in (often, never):
        make_features(recipe)
    assert same(train(often), train(never))
    assert scalars(often, "loss/g_mel") == scalars(never, "loss/g_mel")


def test_pretrained_weights_start_the_run_and_bring_their_speaker_table(tmp_path):
    recipe = tiny_recipe(tmp_path / "base", max_steps=1)
    make_features(recipe)
    saved = train(recipe)
    generator = dict(saved.models["generator"])
    generator["emb_g.weight"] = torch.randn(109, 4)
    for name, state in (("G", generator), ("D", saved.models["discriminator"])):
        torch.save({"model": to_upstream(state), "iteration": 1}, tmp_path / f"{name}.pth")
    files = {"pretrained_g": str(tmp_path / "G.pth"), "pretrained_d": str(tmp_path / "D.pth")}
    tuned = tiny_recipe(tmp_path / "tuned", max_steps=1, learning_rate=1e-12, **files)
    make_features(tuned)
    result = train(tuned)
    assert result.identity["generator.num_speakers"] == 109
    torch.testing.assert_close(result.models["generator"]["emb_g.weight"], generator["emb_g.weight"])
    (tmp_path / "G.pth").unlink()
    assert train(with_train(tuned, max_steps=2)).progress.step == 2
    assert train(with_train(tuned, max_steps=3, pretrained_g=None)).identity["generator.num_speakers"] == 109


def test_pretrained_weights_of_another_shape_are_refused(tmp_path):
    file = tmp_path / "G.pth"
    torch.save({"model": {"emb_g.weight": torch.zeros(1, 4), "x": torch.zeros(2)}}, file)
    recipe = tiny_recipe(tmp_path / "run", pretrained_g=str(file))
    make_features(recipe)
    with pytest.raises(StageError, match=r"train.pretrained_g: .*does not fit"):
        train(recipe)


def test_clipping_bounds_the_gradient_norm(tmp_path):
    recipe = tiny_recipe(tmp_path, max_grad_norm=0.1)
    make_features(recipe)
    bounded = trainer.Trainer(recipe)
    bounded.train_step(next(bounded.loader.steps(bounded.progress)))
    for network in bounded.networks.values():
        norm = nn.utils.get_total_norm([p.grad for p in network.module.parameters() if p.grad is not None])
        assert norm <= 0.1001
    bounded.close()


def test_features_must_be_there(tmp_path):
    with pytest.raises(StageError, match="run `rvc-dist extract` first"):
        train(tiny_recipe(tmp_path))


@pytest.mark.parametrize(
    ("version", "rate", "pitch"),
    [("v2", rate, True) for rate in (24000, 32000, 40000, 44100, 48000)]
    + [("v1", 32000, True), ("v1", 40000, True), ("v1", 48000, True), ("v2", 48000, False), ("v1", 40000, False)],
)
def test_every_version_and_rate_trains_a_step_and_exports(tmp_path, request, version, rate, pitch):
    if rate == 48000:
        request.getfixturevalue("whole_networks")
    recipe = tiny_recipe(tmp_path, max_steps=1, eval_every_steps=1)
    model = replace(recipe.model, version=version, pitch_guidance=pitch)
    recipe = replace(recipe, model=model, data=replace(recipe.data, sample_rate=rate))
    make_features(recipe)
    assert train(recipe).progress.step == 1
    export.run(recipe, Shard())
    voice = Voice.load(Workspace(recipe.run_dir, recipe.name).last_voice_file, torch.device("cpu"))
    assert (voice.version, voice.rate, voice.generator.shape.pitch_guidance) == (version, rate, pitch)
    f0 = torch.full((1, 40), 150.0) if pitch else None
    coarse = torch.full((1, 40), 50) if pitch else None
    speaker = torch.tensor([0])
    wave = voice.generator.infer(torch.randn(1, 40, 16), torch.tensor([40]), coarse, f0, speaker)
    assert wave.shape == (1, 1, 40 * recipe.rate_spec.hop)
    assert wave.isfinite().all()
