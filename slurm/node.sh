#!/usr/bin/env bash
# What srun starts, once on every node: the launcher of the node's ranks, and who passes signals on to them.
# Usage: bash slurm/node.sh [COMMAND OF THE CONTAINER ...] -- STAGE --config RECIPE [--section.key VALUE ...]
# With cgroups, as on most clusters, SLURM's signals (all but KILL) reach this process alone and nothing that it starts.
set -euo pipefail
asked_at=
trap 'asked_at=${asked_at:-$SECONDS}' USR1 TERM

inside=()
while [[ $1 != -- ]]; do
  inside+=("$1")
  shift
done
shift
stage=$1

if [[ -z ${RANKS:-} ]]; then
  gpus=$("${inside[@]}" python -c 'import torch; print(torch.cuda.device_count())')
  RANKS=$((gpus > 0 ? gpus : 1))
fi
# A rank's part of the processors, unless the user says otherwise; Accelerate would count those of the whole machine.
threads=$((${SLURM_CPUS_ON_NODE:-1} / RANKS))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
command=(python -m rvc_dist "$@")
if (( RANKS > 1 || SLURM_JOB_NUM_NODES > 1 )); then
  # Only a c10d rendezvous recovers after a restart. Its host is said: torch would guess it from names.
  (( SLURM_NODEID == 0 )) && is_host=true || is_host=false
  command=(python -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$RANKS"
    --rdzv-backend c10d --rdzv-endpoint "$HEAD_ADDR:$HEAD_PORT" --rdzv-id "$SLURM_JOB_ID"
    --rdzv-conf "is_host=$is_host" --max-restarts "${MAX_RESTARTS:-3}" -m rvc_dist "$@")
fi

# All processes that descend from process $1. Read from /proc: a container need not have ps.
descendants() {
  local -A children=()
  local stat pid queue=("$1")
  for stat in /proc/[0-9]*/stat; do
    { IFS= read -r stat <"$stat"; } 2>/dev/null || continue # it has just ended
    pid=${stat%% *}
    stat=${stat##*) } # the name, in parentheses, may hold anything; state and parent follow
    stat=${stat#* }
    children[${stat%% *}]+=" $pid"
  done
  while (( ${#queue[@]} > 0 )); do
    for pid in ${children[${queue[0]}]:-}; do
      echo "$pid"
      queue+=("$pid")
    done
    queue=("${queue[@]:1}")
  done
}

# USR1 would end the launcher; ranks that train set a handler of their own, and others leave it for later.
(
  trap '' USR1
  exec "${inside[@]}" "${command[@]}"
) &
launcher=$!

# A stage of units loses nothing of worth when it is ended. A rank that trains saves and ends; it is asked again and
# again, since it may be starting, and ended when it has not for so long.
ask_with=TERM patience_s=20
if [[ $stage == train || $stage == run ]]; then
  ask_with=USR1 patience_s=${PATIENCE_S:-90}
fi
while kill -0 "$launcher" 2>/dev/null; do
  if [[ -z $asked_at ]]; then
    wait "$launcher" || true # or a signal
    continue
  fi
  mapfile -t others < <(descendants "$launcher")
  if (( SECONDS - asked_at > patience_s )); then
    kill -KILL "$launcher" "${others[@]}" 2>/dev/null || true
  elif [[ $ask_with == USR1 ]]; then
    kill -USR1 "$launcher" "${others[@]}" 2>/dev/null || true
  elif [[ -z ${told:-} ]]; then
    told=yes
    kill -TERM "$launcher" 2>/dev/null || true
  fi
  sleep 0.5
done
code=0
wait "$launcher" || code=$?
exit "$code"
