#!/usr/bin/env bash
# From a fresh clone to a converted voice: environment, every stage on several ranks, a report of where things are.
# Usage: bash launch/demo.sh [--section.key VALUE ...]      RANKS: how many (default: one a GPU, or 2 without GPU)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" cpu

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
(( gpus > 0 )) || export ACCELERATE_USE_CPU=true
(( ranks > 1 )) && many=(--multi_gpu) || many=()
exec accelerate launch "${many[@]}" --num_machines 1 --num_processes "$ranks" --mixed_precision no \
  --dynamo_backend no -m rvc_dist demo "$@"
