"""Phrases to listen to: what they are, that they are what `infer` makes, and that nothing of them touches a run."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import EMBEDDER, WIDTH, SteadyPitch, changed, make_features, tiny_recipe, tone, train, workspace_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rvc_dist.choices import F0_METHODS, F0Spec
from rvc_dist.config import load_recipe
from rvc_dist.data import audio, decode
from rvc_dist.features import index
from rvc_dist.features.content import Embedder
from rvc_dist.features.extractor import Extractor
from rvc_dist.report.history import read_history
from rvc_dist.report.sounds import Sample
from rvc_dist.train import checkpoint, listening, trainer
from rvc_dist.train.clips import ClipRef
from rvc_dist.train.dataset import ClipDataset
from rvc_dist.voice import export, infer, windows
from rvc_dist.workspace import Shard, StageError, read_json, save_arrays

pytestmark = pytest.mark.usefixtures("thin")

RATE = 24000


class Spectral(Embedder):
    """As wide as the features that `make_features` makes up, and said to be what made them."""

    name, width, weights_hash = EMBEDDER["name"], WIDTH, EMBEDDER["hash"]

    def encode(self, wave):
        frames = wave[:, : wave.shape[1] // 320 * 320].reshape(len(wave), -1, 320)
        return torch.fft.rfft(frames).abs()[..., : self.width].log1p()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("rvc_dist.features.extractor.load_embedder", lambda _config, _version, device: Spectral(device))
    monkeypatch.setitem(F0_METHODS, "yin", F0Spec(SteadyPitch))


def samples(recipe, step: int) -> dict[str, dict]:
    """By name of the file."""
    folder = workspace_of(recipe).samples_dir / f"step_{step:08d}"
    entries = read_json(folder / "samples.json", list[Sample])
    assert sorted(p.name for p in folder.iterdir()) == sorted(["samples.json", *(e["file"] for e in entries)])
    return {Path(entry["file"]).stem: entry for entry in entries}


def heard(recipe, step: int, name: str) -> np.ndarray:
    return soundfile.read(workspace_of(recipe).samples_dir / f"step_{step:08d}" / f"{name}.flac", dtype="float32")[0]


@pytest.mark.slow
def test_what_is_heard_is_what_infer_makes_of_the_exported_voice(tmp_path, monkeypatch):
    """Of the same features and, but for their rounding to float16, the same weights: they differ by less than 0.3%."""
    song = tmp_path / "song.wav"
    soundfile.write(song, np.stack([tone(2.5, 44100), tone(2.5, 44100)], axis=1), 44100)
    shown = {"eval_reference": str(song), "samples": True, "trackers": ("tensorboard",)}
    recipe = tiny_recipe(tmp_path / "run", max_steps=2, eval_every_steps=2, **shown)
    recipe = changed(recipe, "index", speakers="both")
    make_features(recipe, num_clips=12, speakers=(1, 3))
    index.run(recipe, Shard())
    train(recipe)
    found = samples(recipe, 2)
    foreign, reference = ("another speaker in the voice of", "your reference in the voice of")
    assert [(e["kind"], e["title"], e["speaker"], e["index"]) for e in found.values() if e["kind"] != "own"] == [
        ("foreign", f"{foreign} 1", 1, True),
        ("reference", f"{reference} 1", 1, True),
        ("foreign", f"{foreign} 3", 3, True),
        ("reference", f"{reference} 3", 3, True),
    ]
    own = [e for e in found.values() if e["kind"] == "own"]
    assert {e["speaker"] for e in own} == {1, 3}
    export.run(recipe, Shard())
    for name, entry in found.items():
        wave, (original, rate) = (
            heard(recipe, 2, name),
            soundfile.read(workspace_of(recipe).samples_dir / "step_00000002" / entry["original"], dtype="float32"),
        )
        assert (len(wave), rate, entry["rate"]) == (len(original), RATE, RATE)
        assert entry["seconds"] == pytest.approx(len(wave) / RATE, abs=1e-3)
        for level in (wave, original):
            np.testing.assert_allclose(listening.levelled(level, RATE), level, atol=1e-4)
        if entry["kind"] == "own":
            continue
        source = {"foreign": listening.FOREIGN, "reference": song}[entry["kind"]]
        converter = infer.Converter.load(changed(recipe, "infer", auto_pitch=True, speaker=entry["speaker"]))
        with decode.opened(source) as recording:  # what is written of it has 16 bits, of which a new voice fills few
            blocks = windows.convert(converter.for_recording(recording), audio.stream(recording, 16000), RATE, 3000)
            made = np.concatenate(list(blocks))
        assert len(made) == len(wave)
        gain = wave @ made / (made @ made)
        assert np.linalg.norm(wave - gain * made) < 0.003 * np.linalg.norm(wave)
    written = [line for line in read_history(workspace_of(recipe).history_file) if line["kind"] == "samples"]
    assert [(line["step"], line["folder"]) for line in written] == [(2, "samples/step_00000002")]
    events = EventAccumulator(str(workspace_of(recipe).events_dir), {"audio": 0})
    events.Reload()
    assert {f"samples/{name}" for name in found} <= {*events.Tags()["audio"]}

    # A run that goes on needs neither the encoder nor the recording again; another recording needs both.
    kept = workspace_of(recipe).samples_dir / "features.safetensors"
    before = kept.read_bytes()
    song.unlink()
    monkeypatch.setattr(Extractor, "load", lambda *_: pytest.fail("the encoder was loaded"))
    further = changed(recipe, "train", max_steps=4)
    train(further)
    assert samples(further, 4) == found
    assert kept.read_bytes() == before
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("section", "values", "kinds"),
    [
        ("data", {"holdout": 0.0}, ["foreign"]),
        ("infer", {"index_rate": 0.0}, ["own", "foreign"]),
        ("model", {"pitch_guidance": False}, ["own", "foreign"]),
        ("model", {"energy": True}, ["own", "foreign"]),
        ("model", {"architecture": "svc"}, ["own", "foreign"]),
    ],
)
def test_every_kind_of_voice_is_heard_and_no_random_state_is_touched(tmp_path, section, values, kinds):
    recipe = changed(tiny_recipe(tmp_path, max_steps=1, save_every_voices=False, samples=True), section, **values)
    make_features(recipe)
    index.run(recipe, Shard())
    run = trainer.Trainer(recipe)
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    written = []
    run.listening.play(run.step.generator, 0, written.append)
    run.listening.flush()
    assert written == [workspace_of(recipe).samples_dir / "step_00000000"]
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    found = samples(recipe, 0)
    assert [entry["kind"] for entry in found.values()] == kinds
    assert found["foreign"]["index"] == (section != "infer")
    assert len(heard(recipe, 0, "foreign")) == round(7.4545 * RATE)
    again = {name: heard(recipe, 0, name) for name in found}
    run.listening.play(run.step.generator, 0)
    run.listening.flush()
    for name, wave in again.items():
        np.testing.assert_array_equal(heard(recipe, 0, name), wave)
    run.close()


def test_a_fault_of_samples_is_a_warning_and_costs_one_evaluation(tmp_path, monkeypatch, caplog):
    recipe = tiny_recipe(tmp_path, samples=True)
    make_features(recipe)
    folder = workspace_of(recipe).samples_dir
    (folder / ".step_00000009.tmp").mkdir(parents=True)  # of a run that was killed
    run = trainer.Trainer(recipe)
    assert sorted(p.name for p in folder.iterdir()) == ["features.safetensors", "originals"]

    def play(step: int) -> str:
        caplog.clear()
        run.listening.play(run.step.generator, step)
        run.listening.flush()
        return caplog.text

    faults = {"write_flac": OSError(28, "No space left on device"), "converted": torch.OutOfMemoryError("no memory")}
    for step, (name, error) in enumerate(faults.items(), 1):
        whole, calls = getattr(listening, name), []

        def second_fails(*what, whole=whole, calls=calls, error=error):
            calls.append(what)
            if len(calls) == 2:
                raise error
            return whole(*what)

        monkeypatch.setattr(listening, name, second_fails)
        assert f"samples of step {step} are left out: {error}" in play(step)
    with torch.no_grad():
        run.step.generator.emb_g.weight.fill_(float("nan"))
    assert "at step 3 the voice gives numbers that are not finite: silence" in play(3)
    assert not heard(recipe, 3, "foreign").any()
    assert sorted(p.name for p in folder.iterdir()) == ["features.safetensors", "originals", "step_00000003"]
    run.close()


def test_without_the_encoder_there_are_held_out_phrases_alone(tmp_path, monkeypatch, caplog):
    recipe = tiny_recipe(tmp_path, samples=True)
    make_features(recipe)
    missing = "rvc_dist.features.extractor.load_embedder", lambda *_: (_ for _ in ()).throw(OSError("no network"))
    monkeypatch.setattr(*missing)
    run = trainer.Trainer(recipe)
    assert [phrase.kind for phrase in run.listening.phrases] == ["own"]
    assert "samples: only held-out phrases are converted: no network" in caplog.text
    run.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("fifo", "it is a FIFO"), (b"RIFF", "song.wav: "), ("short", "shorter")],
)
def test_a_reference_that_cannot_be_read_is_one_error_before_any_step(tmp_path, content, message):
    song = tmp_path / "song.wav"
    if content == "short":
        soundfile.write(song, tone(0.5), RATE)
    elif content == "fifo":
        os.mkfifo(song)
    elif content is not None:
        song.write_bytes(content)
    recipe = tiny_recipe(tmp_path / "run", eval_reference=str(song), samples=True)
    make_features(recipe)
    with pytest.raises(StageError, match=f"train.eval_reference: .*{message}"):
        train(recipe)
    assert not checkpoint.list_checkpoints(workspace_of(recipe).checkpoints_dir)


def test_the_reference_of_older_recipes_is_read(tmp_path):
    (tmp_path / "old.yaml").write_text("extract: {reference: song.flac, f0_method: yin}\ntrain: {max_steps: 3}\n")
    recipe = load_recipe(tmp_path / "old.yaml")
    assert (recipe.train.eval_reference, recipe.train.max_steps, recipe.extract.f0_method) == ("song.flac", 3, "yin")
    (tmp_path / "old.yaml").write_text("extract: {reference: null}\n")
    assert load_recipe(tmp_path / "old.yaml").train.eval_reference is None


def clip(speaker: int, source: str, start_s: float, duration_s: float = 3.0, guessed: bool = False) -> ClipRef:
    return ClipRef(0, "00000", speaker, source, 100, start_s, duration_s, guessed=guessed)


def test_phrases_are_stretches_of_neighbours_evenly_over_speakers():
    a = [clip(0, "a", start) for start in (2.7, 0.0, 8.2, 20.0, 22.0)]  # 0 to 5.7 s, then alone, then 20 to 25 s
    b = [clip(0, "b", start) for start in (0.0, 2.7, 5.4, 8.1)]  # 8 s of it
    c = [clip(5, "c", start, guessed=True) for start in (0.0, 3.0)]
    assert listening.own_phrases([*a, *b, *c]) == [b[:3], c[:1], [a[1], a[0]]]
    assert listening.own_phrases([]) == []


@pytest.mark.parametrize(("share_s", "pause_s"), [(0.3, 0.0), (0.0, 0.4)])
def test_clips_meet_in_what_they_share_at_one_level(tmp_path, share_s, pause_s):
    """Of a swelling tone, cut into clips that are levelled each for itself."""
    recipe = changed(tiny_recipe(tmp_path, samples=True), "model", energy=True)
    rate, hop = RATE, recipe.rate_spec.hop
    wave, frames = tone(4.0, rate) * np.linspace(0.2, 1.0, 4 * rate, dtype=np.float32), np.arange(400, dtype=np.float32)
    starts, gains = (0.0, 2.0 - share_s + pause_s), (1.0, 0.5)
    waves, features, clips = {}, {}, []
    for i, (start_s, gain) in enumerate(zip(starts, gains, strict=True)):
        samples_, f0 = slice(round(start_s * rate), round((start_s + 2) * rate)), slice(round(start_s * 100), None)
        waves[f"{i:05d}"] = gain * wave[samples_]
        features[f"{i:05d}.f0"] = frames[f0][: len(waves[f"{i:05d}"]) * 100 // rate]
        features[f"{i:05d}.energy"] = gain * features[f"{i:05d}.f0"]
        features[f"{i:05d}.content"] = features[f"{i:05d}.f0"][::2, None].repeat(WIDTH, axis=1)
        num = len(waves[f"{i:05d}"]) // hop
        clips.append(ClipRef(0, f"{i:05d}", 0, "a", num, start_s, len(waves[f"{i:05d}"]) / rate))
    save_arrays(workspace_of(recipe).clips_file(0), waves, {"stamp": "t"})
    save_arrays(workspace_of(recipe).features_file(0), features, {"stamp": "t"})
    joined, fed = listening.joined(ClipDataset(recipe, ()), clips, 360)
    last = round((starts[1] + 2) * 100)
    expected = np.delete(np.arange(last), slice(200, 200 + round(100 * pause_s)))[:360]
    np.testing.assert_array_equal(fed.f0.numpy(), expected)
    np.testing.assert_array_equal(fed.content[:, 0].numpy(), expected // 2 * 2)
    assert fed.energy is not None
    levels = np.where((expected < 200) | (share_s > 0), 1.0, 0.5)
    np.testing.assert_allclose(fed.energy.numpy(), expected * levels, rtol=1e-4)
    of_wave = (expected[:, None] * hop + np.arange(hop)).reshape(-1)
    np.testing.assert_allclose(joined.numpy(), wave[of_wave] * np.repeat(levels, hop), atol=1e-5)
    assert fed.num_samples == len(joined) == len(expected) * hop


def test_levels_are_of_speech_and_never_clip():
    speech = tone(1.0)
    for wave in (speech, np.concatenate([np.zeros(5 * RATE, np.float32), 0.01 * speech])):
        levelled = listening.levelled(wave, RATE)[-RATE:]
        assert np.sqrt(np.square(levelled).mean()) == pytest.approx(listening.LEVEL, rel=0.05)
    click = np.zeros(RATE, np.float32)
    click[100] = 0.1
    assert np.abs(listening.levelled(click, RATE)).max() == pytest.approx(listening.MAX_PEAK)
    for silence in (np.zeros(RATE, np.float32), np.zeros(0, np.float32)):
        np.testing.assert_array_equal(listening.levelled(silence, RATE), silence)
