"""Which content encoder features are of: it comes back from every file, and two are compared by what they are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rvc_dist.config import EmbedderMix
from rvc_dist.features.identity import EmbedderId

MIX = EmbedderMix((9, 10), 0.3)
NINE = EmbedderMix((9,))


@pytest.mark.parametrize("mix", [EmbedderMix(), MIX])
def test_it_comes_back_from_features_and_from_voices(mix: EmbedderMix) -> None:
    embedder = EmbedderId("spin", "00ff", mix)
    assert EmbedderId.from_features(json.loads(json.dumps(embedder.to_features()))) == embedder
    assert EmbedderId.from_voice(json.loads(json.dumps(embedder.to_voice()))) == embedder
    assert ("mix" in embedder.to_features()) is ("embedder_mix" in embedder.to_voice()) is mix.is_on


def test_what_other_tools_write_is_read() -> None:
    assert EmbedderId.from_voice({"embedder_model": "contentvec", "sr": 40000}) == EmbedderId("contentvec")
    assert EmbedderId.from_voice({"model": {}, "iteration": 1}) is None


def test_a_mix_of_nothing_is_no_mix() -> None:
    plain = EmbedderId("spin", "00ff")
    assert (
        EmbedderId("spin", "00ff", EmbedderMix((9,), 0.0)) == EmbedderId("spin", "00ff", EmbedderMix((), 0.9)) == plain
    )


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        # Hashes decide, whatever the names; so does the mix.
        (EmbedderId("contentvec", "aa"), EmbedderId("/models/cv", "aa"), True),
        (EmbedderId("contentvec", "aa"), EmbedderId("contentvec", "bb"), False),
        (EmbedderId("contentvec", "aa", MIX), EmbedderId("cv", "aa", MIX), True),
        (EmbedderId("contentvec", "aa", MIX), EmbedderId("contentvec", "aa"), False),
        (EmbedderId("contentvec", "aa", EmbedderMix((9,), 0.5)), EmbedderId("contentvec", "aa", NINE), True),
        (EmbedderId("contentvec", "aa", EmbedderMix((9,), 0.4)), EmbedderId("contentvec", "aa", NINE), False),
        # Without one the names do, where they mean something.
        (EmbedderId("contentvec", "aa"), EmbedderId("contentvec"), True),
        (EmbedderId("contentvec", "aa"), EmbedderId("spin"), False),
        (EmbedderId("mfcc", "aa"), EmbedderId("contentvec"), False),
        (EmbedderId("/models/cv", "aa"), EmbedderId("contentvec"), None),
        (EmbedderId("spin", "aa"), EmbedderId("custom"), None),
        (EmbedderId("owner/encoder", "aa"), EmbedderId("owner/encoder"), True),
        (EmbedderId("contentvec", "aa", NINE), EmbedderId("contentvec"), None),
        (EmbedderId("contentvec", "aa", NINE), EmbedderId("spin"), False),
    ],
)
def test_agreement(one: EmbedderId, other: EmbedderId, agree: bool | None) -> None:
    assert one.agrees_with(other) is agree
    assert other.agrees_with(one) is agree


def test_it_says_all_it_knows() -> None:
    assert str(EmbedderId("spin")) == "spin"
    assert str(EmbedderId("spin", "00ff")) == "spin (weights 00ff)"
    assert str(EmbedderId("spin", "00ff", MIX)) == "spin (weights 00ff, 0.3 of layers 9, 10 mixed in)"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedder_model": 3}, "embedder_model: got 3, expected a text or null"),
        ({"embedder_hash": b"00ff"}, "embedder_hash: got b'00ff', expected a text or null"),
        ({"embedder_mix": [9]}, r"embedder_mix: got \[9\], expected keys such as layers"),
        ({"embedder_mix": {"layers": [9]}}, r"embedder_mix\.ratio: got nothing, expected .*0\.0 to 1\.0"),
        ({"embedder_mix": {"layers": ["x"], "ratio": 0.5}}, r"embedder_mix\.layers: got \['x'\], expected rising"),
        (
            {"embedder_mix": {"layers": [float("inf")], "ratio": 0.5}},
            r"embedder_mix\.layers: got \[inf\], expected rising",
        ),
        ({"embedder_mix": {"layers": [9], "ratio": 7.0}}, r"embedder_mix\.ratio: got 7\.0, expected 0\.0 to 1\.0"),
    ],
)
def test_what_was_written_otherwise_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbedderId.from_voice({"embedder_model": "spin"} | fields)
