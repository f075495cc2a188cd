#!/usr/bin/env bash
# Submits the whole job of a recipe: preprocess and extract as job arrays, index, train, export, each after the one before.
# Usage: bash slurm/pipeline.sh RECIPE [--nodes N] [--gpus-per-node G] [--shards K] [--dry-run] [--section.key VALUE ...] [-- SBATCH OPTIONS]
#   --nodes N          nodes of the training (default 1)
#   --gpus-per-node G  GPUs of each (default 1; 0: on processors alone); a task of extract has one
#   --shards K         tasks of each array (default 4); K%M runs M of them at a time
#   --dry-run          show the sbatch commands, submit nothing
# Options of sbatch after -- are for all jobs (--partition, --account, ...); those of one stage come from
# PREPROCESS_SBATCH, EXTRACT_SBATCH, INDEX_SBATCH, TRAIN_SBATCH, EXPORT_SBATCH: TRAIN_SBATCH="--cpus-per-task=16 --time=2-0".
# What a cluster needs besides (modules, a container, ...) comes from the variables in slurm/common.sh.
# Prints a job id for each stage. The first job looks for all that the later ones need, but for what only the machines that
# train have, before it begins. A stage that fails cancels those after it; the same command does what is left to do.
set -euo pipefail

fail() {
  echo "pipeline.sh: $*" >&2
  exit 2
}

count() { # OPTION VALUE LEAST
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || (( $2 < $3 )); then
    fail "$1: got '$2', expected a whole number of at least $3"
  fi
}

recipe=${1:-}
case $recipe in
  -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit ;;
  "" | -*) fail "expected a recipe first: bash slurm/pipeline.sh RECIPE [OPTIONS]; --help shows them" ;;
esac
shift
nodes=1 gpus=1 shards=4 at_a_time="" dry_run=no
changes=()
while (( $# > 0 )); do
  case $1 in
    --nodes=* | --gpus-per-node=* | --shards=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;&
    --nodes | --nodes=*) nodes=${2:-}; count --nodes "$nodes" 1; shift 2 ;;
    --gpus-per-node | --gpus-per-node=*) gpus=${2:-}; count --gpus-per-node "$gpus" 0; shift 2 ;;
    --shards | --shards=*)
      shards=${2:-}
      [[ $shards != *%* ]] || at_a_time=%${shards#*%} shards=${shards%%\%*}
      count --shards "$shards" 1
      [[ -z $at_a_time ]] || count "--shards K%M" "${at_a_time#%}" 1
      shift 2
      ;;
    --dry-run) dry_run=yes; shift ;;
    --) shift; break ;;
    *) changes+=("$1"); shift ;;
  esac
done
sbatch=(sbatch --parsable --kill-on-invalid-dep=yes "$@")

[[ -f $recipe ]] || fail "$recipe: no such recipe"
recipe=$(realpath "$recipe")
cd "$(dirname "${BASH_SOURCE[0]}")/.." # the checkout; relative folders of a recipe are looked for here
python=${VENV:-.venv}/bin/python
if [[ -z ${CONTAINER:-} && -x $python ]]; then # a mistake is told now, not when the job starts
  "$python" -m rvc_dist train --config "$recipe" "${changes[@]}" --print_config >/dev/null ||
    fail "the recipe or its changes are wrong (see above); nothing was submitted"
fi
if [[ $dry_run == no ]]; then
  command -v sbatch >/dev/null || fail "sbatch is not on the PATH: run this where jobs are submitted"
fi

submitted=()
give_up() {
  (( ${#submitted[@]} == 0 )) || scancel "${submitted[@]}"
  fail "sbatch refused the job of the $1 stage (see above); ${#submitted[@]} jobs before it were cancelled"
}

# submit STAGE OPTIONS OF ITS OWN AS ONE TEXT, then those of sbatch: a job after the one before.
before=""
submit() {
  local stage=$1 script=$2 id own
  read -ra own <<<"$3"
  shift 3
  local command=("${sbatch[@]:0:3}" "$@" ${before:+"--dependency=afterok:$before"} "${sbatch[@]:3}" "${own[@]}"
    "slurm/$script.sbatch" "$recipe" "${changes[@]}")
  if [[ $dry_run == yes ]]; then
    printf '%q ' "${command[@]}"
    echo
    before=${stage^^}_ID
    return
  fi
  id=$("${command[@]}") || give_up "$stage"
  before=${id%%;*} # with the name of the cluster after it where there are several
  submitted+=("$before")
  printf '%-12s%s\n' "$stage" "$before"
}

export SHARDS=$shards STAGE=train LOOK_AHEAD=yes
array=--array=0-$((shards - 1))$at_a_time
(( gpus > 0 )) && one_gpu=(--gpus-per-node=1) all_gpus=(--gpus-per-node="$gpus") || one_gpu=() all_gpus=()
(( nodes > 1 )) && train=train_multinode || train=train
submit preprocess preprocess "${PREPROCESS_SBATCH:-}" "$array"
submit extract extract "${EXTRACT_SBATCH:-}" "$array" "${one_gpu[@]}"
submit index index "${INDEX_SBATCH:-}"
submit train "$train" "${TRAIN_SBATCH:-}" --nodes="$nodes" "${all_gpus[@]}"
submit export export "${EXPORT_SBATCH:-}"
