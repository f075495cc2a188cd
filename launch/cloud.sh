#!/usr/bin/env bash
# A fresh cloud instance: driver check, environment, data, and the whole run on all GPUs. The same command goes on after
# an interruption, on this instance or on another one.
# Usage: bash launch/cloud.sh RECIPE DATA [--section.key VALUE ...]
#   DATA   a folder of recordings (a mounted disk, for example), an rclone path such as bucket:voices/alice, or what
#          `rvc-dist upload` made (s3://bucket/alice, gs://, hf://): trained from there, nothing is copied first
#   SAVE   (environment) an rclone path where the run folder is kept: fetched first, sent every SAVE_EVERY_S seconds
#          (default 300) and at the end. Not needed when run_dir is on a disk that outlives the instance. Nothing is
#          deleted there: what the run removes or replaces is moved to REPLACED (default: SAVE with .replaced after it),
#          where of the checkpoints the KEEP_REPLACED (default 3) with the most steps stay.
#   RANKS  (environment) ranks to start; default: one a GPU. On a machine without GPU it must be given.
set -euo pipefail
usage() { sed -n '4,12p' "$0" >&2; exit 2; }
recipe=${1:-} data=${2:-}
[[ -n $recipe && -n $data ]] || usage
shift 2
[[ -f $recipe ]] || { echo "cloud.sh: $recipe is not a file; expected a recipe such as configs/48k.yaml" >&2; exit 2; }
recipe=$(realpath "$recipe")
is_remote() { [[ $1 == *:* && $1 != *://* && ! -e $1 ]]; }
is_uploaded() { [[ $1 =~ ^(s3|gs|hf|file):// ]]; }
if { is_remote "$data" || [[ -n ${SAVE:-} ]]; } && ! command -v rclone > /dev/null; then
  echo "cloud.sh: $data or SAVE needs rclone: https://rclone.org/install, then \`rclone config\`" >&2
  exit 1
fi
if ! is_remote "$data" && ! is_uploaded "$data"; then
  [[ -d $data ]] || { echo "cloud.sh: $data is not a folder; is the disk mounted?" >&2; exit 1; }
  data=$(realpath "$data")
fi

# The driver, before anything is downloaded.
if [[ -z ${RANKS:-} ]]; then
  if ! command -v nvidia-smi > /dev/null; then
    echo "cloud.sh: no nvidia-smi: this image has no NVIDIA driver. Take an image that has it, or set RANKS to train on" \
      "the CPU" >&2
    exit 1
  fi
  nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv,noheader
fi

extras=$([[ -z ${RANKS:-} ]] && echo gpu || echo cpu),f0,formats
case $data in s3://*) extras+=,s3 ;; gs://*) extras+=,gcs ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "${EXTRAS:-$extras}"
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if (( gpus == 0 )) && [[ -z ${RANKS:-} ]]; then
  echo "cloud.sh: the driver is there but torch sees no GPU: it is probably too old for this torch; see" \
    "https://pytorch.org/get-started/locally for a torch that fits, or update the driver" >&2
  exit 1
fi
ranks=${RANKS:-$gpus}
run_dir=$(python - "$recipe" "$@" << 'PYTHON'
import sys
from rvc_dist.__main__ import parse
print(parse("run", ["--config", sys.argv[1], *sys.argv[2:]])[0].run_dir)
PYTHON
)

if is_remote "$data"; then
  rclone copy "$data" "$run_dir.audio" # a changed recording is fetched again, the others are not
  data=$run_dir.audio
fi
from=(--data.audio_dir "$data")
! is_uploaded "$data" || from=(--data.remote "$data")
# Half-written files and folders stay here, and so does the lock of this machine's job.
kept=(--exclude '.*.tmp' --exclude '.*.tmp/**' --exclude '/train.lock*')
save() {
  # A manifest says that a checkpoint is whole, so it is sent when the rest is there.
  rclone copy "$run_dir" "$SAVE" "${kept[@]}" --backup-dir "$replaced" --exclude '/checkpoints/*/manifest.json' \
    && rclone sync "$run_dir" "$SAVE" "${kept[@]}" --backup-dir "$replaced" \
    && thin
}
thin() { # of what was moved to $replaced, checkpoints alone grow in number: each has a name of its own
  local found=0 folders
  folders=$(rclone lsf --dirs-only "$replaced/checkpoints" 2> /dev/null) || found=$?
  (( found != 3 )) || return 0 # nothing was replaced yet
  (( found == 0 )) || { echo "cloud.sh: $replaced/checkpoints cannot be read: old checkpoints stay there" >&2; return 0; }
  { grep -xE 'step_[0-9]{8}/' <<< "$folders" || true; } | sort -r | tail -n +"$((${KEEP_REPLACED:-3} + 1))" \
    | while read -r folder; do
      rclone purge "$replaced/checkpoints/${folder%/}" < /dev/null \
        || echo "cloud.sh: $replaced/checkpoints/$folder cannot be removed" >&2
    done
}
if [[ -n ${SAVE:-} ]]; then
  SAVE=${SAVE%/} replaced=${REPLACED:-${SAVE%/}.replaced}
  found=0
  rclone lsf "$SAVE" > /dev/null || found=$?
  if (( found == 3 )); then # rclone's code for a directory that is not there
    echo "cloud.sh: nothing is kept at $SAVE yet: a new run" >&2
  elif (( found != 0 )); then
    echo "cloud.sh: $SAVE cannot be read (rclone's exit code $found, its reason is above). Nothing was started, since a" \
      "new run would be saved over what is kept there: check the remote with \`rclone lsf $SAVE\`" >&2
    exit 1
  else
    only=(--ignore-existing)
    if [[ ! -d $run_dir || -e $run_dir.fetching ]]; then # the files of a fetch that was interrupted may be cut off
      only=()
      mkdir -p "$run_dir"
      touch "$run_dir.fetching"
    fi
    rclone copy "$SAVE" "$run_dir" "${kept[@]}" "${only[@]}"
    rm -f "$run_dir.fetching"
    python - "$run_dir/checkpoints" << 'PYTHON'
import sys
from pathlib import Path
from rvc_dist.train import checkpoint
for path in checkpoint.list_checkpoints(Path(sys.argv[1])):
    if problems := checkpoint.find_corruption(path):
        print(f"cloud.sh: {path} is not whole and is passed over: {'; '.join(problems)}", file=sys.stderr)
        checkpoint.discard(path)
PYTHON
  fi
fi

if (( gpus > 0 && ranks == 1 )); then
  launcher=(--config_file launch/one_gpu.yaml)
elif (( gpus > 0 )); then
  launcher=(--config_file launch/multi_gpu.yaml --num_processes "$ranks")
elif (( ranks == 1 )); then
  launcher=(--cpu --num_machines 1 --num_processes 1 --mixed_precision no --dynamo_backend no)
else
  launcher=(--config_file launch/cpu.yaml --num_processes "$ranks")
fi
# A group of its own, so that the notice of an interruption (SIGTERM) reaches the launcher and its ranks, which save a
# checkpoint and end. Bash runs a trap only between commands, hence the wait.
set -m
accelerate launch "${launcher[@]}" -m rvc_dist run --config "$recipe" "$@" "${from[@]}" &
job=$!
if [[ -n ${SAVE:-} ]]; then
  (while sleep "${SAVE_EVERY_S:-300}"; do save || echo "cloud.sh: not saved to $SAVE, trying again later" >&2; done) &
  saver=$!
fi
set +m
trap 'kill -TERM -- -"$job" 2> /dev/null || true' TERM INT
code=0
wait "$job" || code=$?
while kill -0 -- -"$job" 2> /dev/null; do # the trap ended the wait, or the launcher ended before its rank: it is saving
  sleep 0.2
done
if [[ -n ${SAVE:-} ]]; then
  kill -TERM -- -"$saver" 2> /dev/null || true # with an rclone that is at work
  wait "$saver" || true
  save || { echo "cloud.sh: the run could not be saved to $SAVE; it is in $run_dir" >&2; exit 1; }
fi
(( code == 0 )) || echo "cloud.sh: ended with exit code $code; the same command goes on" >&2
exit "$code"
