"""Two voices become one: weights, speakers and pitch, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NARROW, changed, make_generator, narrow_recipe, parse_recipe, voice_contents

from rvc_dist import __main__ as cli
from rvc_dist.config import Recipe
from rvc_dist.models.torch_file import save_pth
from rvc_dist.voice import blend
from rvc_dist.voice.file import Voice
from rvc_dist.workspace import Shard, StageError

ALONE, CPU = Shard(0, 1), torch.device("cpu")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return changed(narrow_recipe(tmp_path), "blend", output=str(tmp_path / "mix.pth"))


def voice(path: Path, recipe: Recipe, seed: int, num_speakers: int = 1, **told: Any) -> Path:
    generator = make_generator(recipe, num_speakers=num_speakers)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    contents = voice_contents(recipe, generator) | told
    save_pth(path, {key: value for key, value in contents.items() if value is not None})
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["weight"]
    return found


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_every_weight_is_the_mean_that_the_tools_take(ratio: float, recipe: Recipe, tmp_path: Path) -> None:
    a, b = (voice(tmp_path / f"{name}.pth", recipe, seed) for seed, name in enumerate("ab"))
    blend.run(changed(recipe, "blend", ratio=ratio), ALONE, str(a), str(b))
    of_a, of_b, mix = tensors(a), tensors(b), tensors(tmp_path / "mix.pth")
    assert mix.keys() == of_a.keys()
    for key, value in mix.items():
        expected = (ratio * of_a[key].float() + (1 - ratio) * of_b[key].float()).half()
        assert value.dtype == torch.float16
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)
    told = torch.load(tmp_path / "mix.pth", weights_only=True)
    assert (told["model_name"], told["version"], told["sr"], told["f0"]) == ("mix", "v2", 24000, 1)
    assert told["info"] == f"{ratio:g} of a, {1 - ratio:g} of b, blended by rvc_dist"
    assert Voice.load(tmp_path / "mix.pth", CPU).trained_with == Voice.load(a, CPU).trained_with
    if ratio in (0.0, 1.0):
        same = of_a if ratio else of_b
        assert all(torch.equal(value, same[key]) for key, value in mix.items())


def speaker(i: int, name: str, hz: float) -> dict[str, Any]:
    return {"id": i, "name": name, "f0_median": hz}


def test_only_speakers_become_one_whatever_their_ids(recipe: Recipe, tmp_path: Path) -> None:
    told = {"trained_speakers": [1], "speaker_info": [speaker(1, "alice", 200.0)], "f0_median": 200.0}
    a = voice(tmp_path / "a.pth", recipe, 0, 2, **told)
    told = {"trained_speakers": [0], "speaker_info": [speaker(0, "bob", 100.0)], "f0_median": 100.0}
    b = voice(tmp_path / "b.pth", recipe, 1, 1, **told)
    blend.run(recipe, ALONE, str(a), str(b))
    mix = Voice.load(tmp_path / "mix.pth", CPU)
    assert (mix.trained_speakers, mix.speaker("alice + bob"), mix.median_f0(1)) == ((1,), 1, 150.0)
    table = [tensors(path)["emb_g.weight"].float() for path in (a, b, tmp_path / "mix.pth")]
    torch.testing.assert_close(table[2][1], (table[0][1] + table[1][0]) / 2, rtol=1e-3, atol=1e-4)


def test_of_several_speakers_those_of_one_id_are_mixed(recipe: Recipe, tmp_path: Path) -> None:
    info = [speaker(0, "alice", 200.0), speaker(1, "carol", 220.0)]
    a = voice(tmp_path / "a.pth", recipe, 0, 2, trained_speakers=[0, 1], speaker_info=info)
    info = [speaker(0, "alice", 210.0), speaker(3, "bob", 100.0)]
    b = voice(tmp_path / "b.pth", recipe, 1, 4, trained_speakers=[0, 3], speaker_info=info)
    blend.run(recipe, ALONE, str(a), str(b))
    mix = Voice.load(tmp_path / "mix.pth", CPU)
    assert mix.trained_speakers == (0, 1, 3)
    assert {row: info["name"] for row, info in mix.speakers.items()} == {0: "alice", 1: "carol", 3: "bob"}
    assert [mix.median_f0(row) for row in mix.trained_speakers] == [205.0, 220.0, 100.0]
    of_a, of_b, table = (tensors(path)["emb_g.weight"] for path in (a, b, tmp_path / "mix.pth"))
    assert len(table) == 4
    assert torch.equal(table[1], of_a[1])
    assert torch.equal(table[3], of_b[3])
    torch.testing.assert_close(table[0].float(), (of_a[0].float() + of_b[0].float()) / 2, rtol=1e-3, atol=1e-4)


def test_foreign_voices_are_mixed_row_by_row(recipe: Recipe, tmp_path: Path) -> None:
    """They do not say who was trained."""
    nothing = dict.fromkeys(("trained_speakers", "embedder_model", "unvoiced"))
    a, b = (voice(tmp_path / f"{n}.pth", recipe, i, 3 + i, **nothing) for i, n in enumerate("ab"))
    blend.run(recipe, ALONE, str(a), str(b))
    mix = Voice.load(tmp_path / "mix.pth", CPU)
    assert (mix.trained_speakers, mix.generator.shape.num_speakers, mix.unvoiced) == ((), 4, None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recipe": {"num_layers": 2}}, r"they differ in num_layers \(1 and 2\)$"),
        (
            {"recipe": {"pitch_guidance": False, "gin_channels": 16}},
            r"gin_channels \(8 and 16\), pitch_guidance \(True and",
        ),
        ({"embedder_model": "spin"}, r"content encoder \(mfcc and spin\)$"),
        ({"weight": {}}, "blend: .*b.pth holds no voice that can be built here"),
        ({"config": [1, 2]}, "got 2 entries, expected 18"),
    ],
)
def test_voices_of_two_kinds_are_refused(change: dict[str, Any], told: str, recipe: Recipe, tmp_path: Path) -> None:
    other = changed(recipe, "model", **change.pop("recipe", {}))
    a, b = voice(tmp_path / "a.pth", recipe, 0), voice(tmp_path / "b.pth", other, 1, **change)
    with pytest.raises(StageError, match=told):
        blend.run(recipe, ALONE, str(a), str(b))
    assert not (tmp_path / "mix.pth").exists()


def test_what_is_no_voice_or_would_be_overwritten_is_a_sentence(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = voice(tmp_path / "a.pth", recipe, 0)
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    (tmp_path / "half.pth").write_bytes(a.read_bytes()[:5000])
    for words, told in (
        ([str(a), str(tmp_path / "evil.pth")], "evil.pth is not a voice file (damaged, no torch file"),
        ([str(tmp_path / "half.pth"), str(a)], "half.pth is not a voice file (damaged"),
        ([str(a), str(tmp_path / "none.pth")], "none.pth does not exist; train one, or name another"),
        ([str(a), str(a), "--blend.output", str(a)], "a.pth is one of the voices that are blended; give another"),
    ):
        assert cli.main(["blend", *words]) == cli.EXIT_FAILED
        error = capsys.readouterr().err
        assert told in error
        assert "Traceback" not in error
    assert cli.main(["blend", str(a)]) == cli.EXIT_USAGE
    assert "expected two: rvc-dist blend A.pth B.pth" in capsys.readouterr().err
    assert parse_recipe("blend", ["a", "b", "--blend.ratio", "0.3"]).blend.ratio == 0.3
    assert NARROW.version == "v2"
