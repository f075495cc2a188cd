#!/usr/bin/env bash
# Does this code hold on this machine's GPUs, and how fast is it there? In under 9 minutes, without network: the tests
# that need a GPU, then training steps of every kind, optimizers, extraction, conversion, parity and, on several GPUs,
# scaling. Every part has a time limit; what is known is printed at once, and all of it again as tables at the end.
# Usage: bash launch/gpu_check.sh [--device cpu] [--tiny]     (the options try the script itself where there is no GPU)
# Honours PYTHON and OUT, the folder where gpu_check/gpu_check.json is written (runs). Exit code 1: a part failed.
set -euo pipefail
set +e # a part that fails stops no other
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-$(command -v python3 || command -v python)}
folder=${OUT:-runs}/gpu_check cpu='' tiny=() most_s=520 failed=() unfinished=()
while (( $# )); do
  case $1 in
    --device) [[ ${2:-} == cpu ]] || { echo "gpu_check: --device takes cpu, or is left out for a GPU" >&2; exit 2; }
      cpu=1; export CUDA_VISIBLE_DEVICES='' ACCELERATE_USE_CPU=true; shift 2 ;;
    --tiny) tiny=(--tiny); export TORCHDYNAMO_DISABLE=1; shift ;; # compiling takes minutes, however small the networks
    *) echo "gpu_check: unknown option $1; see the head of $0" >&2; exit 2 ;;
  esac
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit
if [[ $gpus == 0 && -z $cpu ]]; then
  echo "gpu_check: torch sees no GPU on this machine: run it on one, or try the script with --device cpu --tiny" >&2
  exit 1
fi
rm -rf "$folder"

part() { # NAME LIMIT_S COMMAND...
  local name=$1 limit_s=$2 left_s=$(( most_s - SECONDS )) code=0
  shift 2
  if (( left_s < 10 )); then unfinished+=("$name"); return; fi
  echo "== $name (at $SECONDS s, at most $(( limit_s < left_s ? limit_s : left_s )) s)"
  timeout -k 5 $(( limit_s < left_s ? limit_s : left_s )) "$@" & child=$! # in the foreground no trap would fire
  wait "$child" || code=$?
  if (( code == 124 || code == 137 )) && (( left_s < limit_s )); then
    unfinished+=("$name")
  elif (( code != 0 )); then
    echo "== $name: FAILED, $( (( code == 124 || code == 137 )) && echo "not done after $limit_s s" || echo "exit code $code")"
    failed+=("$name")
  fi
}
measure() { # LIMIT_S PART [NAME]
  part "${*:2}" "$1" "$python" -m rvc_dist.tools.gpu_check "$folder" "${@:2}" "${tiny[@]}"
}
# shellcheck disable=SC2317  # the trap calls it
finish() {
  "$python" -m rvc_dist.tools.gpu_check "$folder" table
  local IFS=';'
  (( ${#unfinished[@]} == 0 )) || echo "== no time was left for: ${unfinished[*]}"
  echo "== ${#failed[@]} parts failed${failed:+: ${failed[*]}} ($SECONDS s)"
}
trap finish EXIT
trap 'kill "$child"; exit 1' TERM INT

measure 60 machine
tests=() # which only a checkout has
[[ ! -d tests ]] || mapfile -t tests < <(grep -rlE 'mark\.gpu' tests --include='test_*.py')
pytest=("$python" -m pytest -q --durations=5 -p no:cacheprovider "${tests[@]}")
(( ${#tests[@]} == 0 )) || part tests 150 "${pytest[@]}" -m 'gpu and not slow'
measure 120 steps plain fp32 TF32
measure 120 steps bf16 bf16_adamw fp16
measure 60 optimizers
measure 60 conversion
measure 90 extraction
measure 60 parity
measure 170 steps 'CUDA graphs'
(( ${#tests[@]} == 0 )) || part 'slow tests' 120 "${pytest[@]}" -m 'gpu and slow' # those that compile
(( gpus > 0 )) || gpus=2 # ranks on a CPU
for (( ranks = 2; ranks <= gpus; ranks *= 2 )); do
  part "scaling $ranks" 60 "$python" -m torch.distributed.run --standalone --nproc_per_node "$ranks" \
    -m rvc_dist.tools.gpu_check "$folder" scaling "${tiny[@]}"
done
measure "$most_s" steps compiled # for comparison, in the time that is left
exit $(( ${#failed[@]} > 0 ))
