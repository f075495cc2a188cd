"""The page of a run: what it says at every stage of a run, and what Chromium makes of it."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
import shutil
import time
from pathlib import Path

import made_run
import numpy as np
import pytest
import soundfile
from browser import PHONE, Browser

from rvc_dist.__main__ import main
from rvc_dist.arguments import parse
from rvc_dist.config import Recipe
from rvc_dist.report import facts, page, sounds
from rvc_dist.report.figures import NUM_POINTS, thinned
from rvc_dist.workspace import Shard, StageError, Workspace

HOSTILE = "<script>document.title='owned'</script>\"'&\u202e$\\frac{"


def text_of(path: Path) -> str:
    """What a page says, without its tags, pictures and sounds."""
    text = re.sub(r"<(script|style|svg).*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with three speakers that overtrained."""
    root = tmp_path_factory.mktemp("report") / "run"
    made_run.made_run(root, made_run.OVERTRAINED, ("anna", "berta", "<b>carl</b>"), HOSTILE)
    return page.write_page(root)


def test_the_table_of_thousands_of_speakers_is_whole_and_of_bounded_size(tmp_path: Path) -> None:
    work = Workspace(tmp_path, "many")
    made_run.data(work, [f"speaker {i:04d}" for i in range(2000)])
    path = page.write_page(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert all(f"{i} (speaker {i:04d})" in text for i in range(2000))
    assert "And 1960 more" in text_of(path)
    assert path.stat().st_size < 700_000


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (PHONE, False)])
def test_chromium_shows_the_page(whole_run: Path, browser: Browser, width: int, dark: bool) -> None:
    browser.open(whole_run, width=width, dark=dark)
    assert browser.overflow() == 0
    lengths = browser.wait_for("""
        const done = arguments[arguments.length - 1];
        Promise.all([...document.querySelectorAll("audio")].map((audio) => new Promise((ready) => {
          if (audio.readyState) ready(audio);
          else for (const event of ["loadedmetadata", "error"]) audio.addEventListener(event, () => ready(audio));
        }))).then((all) => done(all.map((audio) => [audio.duration, Number(audio.dataset.seconds)])));
    """)
    assert len(lengths) == 3 * (1 + len(made_run.OVERTRAINED))
    assert all(abs(found - wanted) < 0.06 for found, wanted in lengths), lengths
    red, green, blue = map(
        int, re.findall(r"\d+", browser.evaluate("return getComputedStyle(document.body).color"))[:3]
    )
    assert (min(red, green, blue) > 200) == dark, "text is light on dark, and dark on light"
    fills = browser.evaluate("return [...document.querySelectorAll('svg text')].map((t) => getComputedStyle(t).fill)")
    assert len(fills) > 100
    assert set(fills) == {f"rgb({red}, {green}, {blue})"}, "pictures have the page's colours"
    assert browser.evaluate("return document.title") == "anna: report"
    assert browser.errors() == []
    assert browser.requests() == []


def test_one_sound_plays_at_a_time_and_goes_on_in_the_next(whole_run: Path, browser: Browser) -> None:
    browser.open(whole_run)
    first, second, third = browser.wait_for("""
        const done = arguments[arguments.length - 1], all = [...document.querySelectorAll("audio")];
        const [a, b] = all, other = all.find((audio) => audio.dataset.phrase !== a.dataset.phrase);
        (async () => {
          a.muted = b.muted = other.muted = true;
          await a.play(); a.currentTime = 0.6; await b.play();
          const second = b.currentTime;
          await other.play();
          done([a.paused, second, [b.paused, other.currentTime]]);
        })().catch((error) => done([String(error), 0, []]));
    """)
    assert first is True, first
    assert 0.55 < second < 1.2
    assert third[0]
    assert third[1] < 0.5


def test_a_page_says_what_to_keep_and_why(whole_run: Path) -> None:
    said = text_of(whole_run)
    assert "Step 1000 epoch 50.0 Mel distance 0.5000 is below all before it." in said
    assert "It overtrains: the last 3 validations are at least 10.0% worse than the best." in said
    assert "Of 370.2 s of recordings 360.0 s are in clips, 10.2 s not (silence 9.0 s, too short 1.2 s)." in said
    assert "shorter than 0.5 s 3 " in said
    assert "train.seed 1234 7" in said
    assert "2 ranks, 16 clips a step;" in said
    assert "1 node1 cuda:1 NVIDIA H100" in said
    assert whole_run.stat().st_size < 1_500_000


def test_names_are_text_and_never_markup(whole_run: Path) -> None:
    source = whole_run.read_text(encoding="utf-8")
    assert source.count("<script") == 1
    assert source.count("&lt;script&gt;document") == 3 + 3 + 3 + 1, (
        "titles, those of spectrograms, recordings, a warning"
    )
    assert "&lt;b&gt;carl" in source
    assert "\u202e" not in source
    assert "\\u202e" in source


@pytest.mark.parametrize(
    ("distances", "step", "then"),
    [
        (
            made_run.IMPROVING,
            2000,
            "The best is the newest: the voice is still improving. Train longer: raise train.max",
        ),
        (made_run.OVERTRAINED, 1000, "It overtrains"),
        ((0.9, 0.5, 0.502, 0.501, 0.5), 800, "Since then 3 validations came out within chance of it"),
        ((0.9, 0.7, 0.5, 0.6), 1500, "Since then 1 validation came out worse, by at least 20.0%. So few may be chance"),
        ((0.9, 0.5), 2000, "With 2 validations nobody can say yet"),
        ((), None, "Choose by ear"),
    ],
)
def test_advice(tmp_path: Path, distances: tuple[float, ...], step: int | None, then: str) -> None:
    work = Workspace(tmp_path, "anna")
    made_run.history(work, distances)
    work.voice_dir.mkdir()
    advised = facts.advice(facts.read_facts(tmp_path))
    assert advised.step == step
    assert then in advised.then


def test_the_command_that_converts_is_one(tmp_path: Path) -> None:
    """It takes the voice of the advised step where there is one, else has it exported first."""
    root = tmp_path / "it's a run"
    work = made_run.made_run(root)
    of_step = work.voice_dir / "anna_100e_2000s.pth"
    found = facts.read_facts(root)
    convert = facts.conversion(found, facts.advice(found))
    recipe, _, _ = parse("infer", shlex.split(convert.infer)[2:])
    assert (recipe.infer.model, recipe.run_dir, convert.export) == (str(of_step), str(root), "")
    of_step.unlink()
    convert = facts.conversion(found, facts.advice(found))
    recipe, _, _ = parse("export", shlex.split(convert.export)[2:])
    assert recipe.run_dir == str(root)
    assert shlex.split(convert.infer)[5] == str(work.voice_dir / "anna_best.pth")
    moved = root.rename(tmp_path / "moved")
    words = shlex.split(facts.conversion(*[f := facts.read_facts(moved), facts.advice(f)]).infer)
    assert parse("infer", words[2:])[0].run_dir == str(moved)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("data", "There are no samples yet|There are none yet: training|No validation has been made.|Not known before"),
        ("nothing", "There are no clips yet: `rvc-dist preprocess` makes them."),
        ("old", "metrics.jsonl is missing or empty: this run was trained by an older version.|tensorboard --logdir"),
        ("old", "Step 300 epoch 15.0 So says the newest checkpoint: its mel distance on held-out speech was 1.4000."),
        ("damaged", "clips/report.json: not valid JSON|speakers.json: |samples.json: not valid JSON"),
        ("foreign recipe", "config.yaml is not one that this version reads"),
    ],
)
def test_every_stage_of_a_run_has_a_page(tmp_path: Path, there: str, said: str) -> None:
    work = Workspace(tmp_path / "run", "anna")
    work.save_recipe(Recipe(name="anna", run_dir=str(work.root)))
    if there != "nothing":
        made_run.data(work, ["anna"])
    if there == "old":
        newest = work.checkpoints_dir / "step_00000320"
        newest.mkdir(parents=True)
        (newest / "manifest.json").touch()
        (newest / "state.json").write_text('{"progress": {"best_metric": 1.4, "best_step": 300, "best_epoch": 15}}')
        copy = shutil.copytree(newest, newest.with_name("step_00000320_before"))  # a user's, and no checkpoint
        (copy / "state.json").write_text('{"progress": {"best_metric": 9.9, "best_step": 1, "best_epoch": 1}}')
    if there == "damaged":
        made_run.samples(work.root, [100])
        for path in (work.clips_report_file, work.speakers_file, work.root / "samples/step_00000100/samples.json"):
            path.write_text("{")
    if there == "foreign recipe":
        work.config_file.write_text("train: {of_a_later_version: 1}\n")
    assert main(["report", str(work.root)]) == 0
    found = text_of(work.root / page.PAGE)
    assert all(part in found for part in said.split("|")), found


@pytest.mark.parametrize("name", ["missing", "file", "empty"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(StageError, match="expected a run folder: rvc-dist report RUN"):
        page.run(Recipe(), Shard(), [str(tmp_path / name)])
    assert not (tmp_path / "empty" / page.PAGE).exists()


@pytest.mark.slow
def test_a_page_of_100_000_lines_takes_seconds_and_stays_small(tmp_path: Path) -> None:
    work = Workspace(tmp_path, "anna")
    values = {"loss/g_mel": 0.5, "loss/d": 3.0, "perf/audio_s_per_s": 100.0}
    line = '{"kind": "step", "time": %d, "step": %d, "epoch": 0.0, "seconds": {"data": 0.1}, "values": '
    line += json.dumps(values) + "}\n"
    with work.history_file.open("w", encoding="utf-8") as stream:
        for step in range(100_000):
            line = {
                "kind": "step",
                "time": step,
                "step": step,
                "epoch": 0.0,
                "values": values,
                "seconds": {"data": 0.1},
            }
            stream.write(json.dumps(line) + "\n")
    began_at = time.process_time()
    path = page.write_page(tmp_path)
    assert time.process_time() - began_at < 20
    assert path.stat().st_size < 300_000


def test_thinned_curves_keep_their_mean_and_their_ends() -> None:
    values = np.arange(100_000.0)
    line = thinned(values, values)
    assert len(line.steps) <= NUM_POINTS
    assert line.lows[0] == 0
    assert line.highs[-1] == 99_999
    assert np.allclose(line.means, line.steps)
    few = thinned([1, 2, 3], [3.0, 1.0, 2.0])
    assert few.means.tolist() == few.lows.tolist() == few.highs.tolist() == [3.0, 1.0, 2.0]


def test_sounds_are_bounded_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    made_run.samples(tmp_path, range(100, 2100, 100), seconds=0.5)
    notes: list[str] = []
    phrases = sounds.read_samples(tmp_path / "samples", notes)
    found = sounds.embed(phrases, 300, notes)
    assert (len(found.steps), found.steps[0], found.steps[-1]) == (sounds.MAX_STEPS, 100, 2000)
    assert 300 in found.steps
    assert found.left_out == "Here are 8 of 20 steps; all are in the run's folder samples."
    small = sounds.embed(sounds.read_samples(tmp_path / "samples", notes), 300, notes, max_bytes=40_000)
    assert sum(len(s.address) for p in small.phrases for s in p.sounds) * 3 / 4 < 40_000
    assert "of 20 steps" in small.left_out
    assert notes == []


def test_sounds_of_rates_that_mp3_lacks_keep_their_length(tmp_path: Path) -> None:
    address = sounds.mp3_address((made_run.tone(1.0, 200)[:40_000], 40_000))
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert (rate, len(wave) / rate) == (44_100, pytest.approx(made_run.RATE / 40_000, abs=0.002))


def test_samples_of_others_lead_nowhere_else(tmp_path: Path) -> None:
    made_run.samples(tmp_path, [100])
    folder = tmp_path / "samples" / "step_00000100"
    entries = json.loads((folder / "samples.json").read_text())
    entries[0]["file"] = "../../secret.flac"
    entries[1]["original"] = "/etc/passwd"
    (tmp_path / "secret.flac").write_bytes((folder / "own.flac").read_bytes())
    (folder / "reference.flac").write_text("no sound")
    (folder / "samples.json").write_text(json.dumps(entries))
    notes: list[str] = []
    found = sounds.embed(sounds.read_samples(tmp_path / "samples", notes), None, notes)
    assert [(p.kind, [s.label for s in p.sounds]) for p in found.phrases] == [("foreign", ["step 100"])]
    assert len(notes) == 1
    assert notes[0].startswith("reference.flac: reference.flac is no sound file")


def test_runs_are_compared(tmp_path: Path, browser: Browser) -> None:
    """Their numbers, keys and sounds side by side, in a page of the first."""
    roots = [tmp_path / "first", tmp_path / "second"]
    made_run.made_run(roots[0], made_run.IMPROVING)
    work = made_run.made_run(roots[1], made_run.OVERTRAINED)
    work.save_recipe(Recipe(name="anna", run_dir=str(roots[1])))
    assert main(["report", *map(str, roots)]) == 0
    path = roots[0] / page.COMPARISON
    said = text_of(path)
    assert "2 runs compared" in said
    assert "best step 2000 1000" in said
    assert "Mel distance (best step) 0.520 0.500" in said
    assert "train.seed 7 1234" in said
    assert "run_dir" not in said
    browser.open(path, width=PHONE)
    assert (browser.overflow(), browser.errors(), browser.requests()) == (0, [], [])
    assert browser.evaluate("return document.querySelectorAll('audio').length") == 3 * 3
