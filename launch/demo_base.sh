#!/usr/bin/env bash
# Makes the demo's base model again: speech of Debian whose licences let the weights be shared, then training (on a GPU).
# Usage: bash launch/demo_base.sh [--section.key VALUE ...]      Needs apt-get of Debian or Ubuntu.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" formats,cpu

packages=(asterisk-core-sounds-{fr,it,ru}-g722 festvox-ru)
work=runs/demo_base/debian
mkdir -p "$work"
for package in "${packages[@]}"; do
  [[ -d $work/$package ]] && continue
  (cd "$work" && apt-get download "$package")
  dpkg -x "$work/$package"_*.deb "$work/$package.half" && mv "$work/$package.half" "$work/$package"
done

python - "$work" runs/demo_base/audio << 'PYTHON'
"""Decode the prompts and join them, a folder a speaker: clips of half a second are the shortest that training takes."""
import sys
from pathlib import Path

import av
import numpy as np
import soundfile

RATE, GAP_S, PIECE_S, MOST_PIECES = 16000, 0.25, 30, 76  # 45 minutes of festvox-ru, all of the others
NO_SPEECH = ("beep", "beeperr", "tone", "monkeys", "silence/", "weasels")
OF_THE_DEMO = ("vm-tempgreeting", "vm-forwardoptions")  # what it converts
debian, target = map(Path, sys.argv[1:])


def decode(path):
    with av.open(str(path), format="g722" if path.suffix == ".g722" else None) as file:
        frames = list(file.decode(audio=0))
    assert {(frame.sample_rate, frame.format.name) for frame in frames} == {(RATE, "s16")}, path
    return np.concatenate([frame.to_ndarray().ravel() for frame in frames])


def write(folder, number, waves):
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / f"{number:03d}.flac", np.concatenate(waves), RATE)


for package in sorted(path for path in debian.iterdir() if path.is_dir()):
    waves, number, seconds = [], 0, 0.0
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".g722", ".wav") and p.stat().st_size > 4000):
        if any(word in str(path.relative_to(package)) for word in NO_SPEECH + OF_THE_DEMO):
            continue
        waves += [decode(path), np.zeros(int(GAP_S * RATE), np.int16)]
        seconds += len(waves[-2]) / RATE + GAP_S
        if seconds > PIECE_S:
            write(target / package.name, number, waves)
            waves, number, seconds = [], number + 1, 0.0
        if number == MOST_PIECES:
            break
    if waves:
        write(target / package.name, number, waves)
PYTHON

for stage in preprocess extract train "export --as pretrained"; do # no index: a base model converts for nobody
  # shellcheck disable=SC2086 # some have options
  rvc-dist $stage --config demo_base "$@"
done
