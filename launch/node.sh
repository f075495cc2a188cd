#!/usr/bin/env bash
# The launcher of a node's ranks: started once on every node by SLURM, Kubernetes or SkyPilot, passes their signals on.
# Usage: bash launch/node.sh [COMMAND OF THE CONTAINER ...] -- STAGE --config RECIPE [--section.key VALUE ...]
# Which node this is, of how many, and where the first is reached, is taken from what started it: srun with
# slurm/common.sh; an Indexed Job of Kubernetes with NODES and HEAD_ADDR; a task of SkyPilot. Without them there is one.
#   RANKS         ranks a node (default: one a GPU; 1 without GPU)
#   MAX_RESTARTS  how often the launcher starts its ranks again after a failure (default 3)
#   CPUS          processors of the node for this job, where neither SLURM nor the system says (a share of a Kubernetes node)
#   PATIENCE_S    seconds that ranks have to save a checkpoint and end, once they are asked to (default 90)
# NODES may be FEWEST:MOST: nodes that come and go (docs/distribution.md). HEAD_ADDR is then where
# `rvc-dist launch --meeting_point` runs, TERM ends this node alone, and MAX_RESTARTS is not read.
# Exit code 75, outside SLURM, whose batch script decides: the run, or this node of those that come and go, was asked to
# stop and has saved; start it again.
# With cgroups, as on most clusters, SLURM's signals (all but KILL) reach this process alone and nothing that it starts,
# and of a container those of Kubernetes reach process 1 alone.
set -euo pipefail
asked_at=
asked_by=
trap 'asked_at=${asked_at:-$SECONDS} asked_by=${asked_by:-USR1}' USR1
trap 'asked_at=${asked_at:-$SECONDS} asked_by=${asked_by:-TERM}' TERM

inside=()
while [[ $1 != -- ]]; do
  inside+=("$1")
  shift
done
shift
stage=$1
is_training=
[[ $stage != train && $stage != run ]] || is_training=yes

nodes=${SLURM_JOB_NUM_NODES:-${SKYPILOT_NUM_NODES:-${NODES:-1}}}
node_rank=${SLURM_NODEID:-${SKYPILOT_NODE_RANK:-${JOB_COMPLETION_INDEX:-0}}}
is_elastic=
[[ $nodes != *:* ]] || is_elastic=yes
[[ $nodes != 1 ]] || node_rank=0 # the index of a data stage's Job is its shard
head_addr=${HEAD_ADDR:-${SKYPILOT_NODE_IPS:-}}
head_addr=${head_addr%%[[:space:]]*} # of the addresses of all nodes the first
if [[ $nodes != 1 && -z $head_addr ]]; then
  echo "node.sh: $nodes nodes, but HEAD_ADDR is not set: the address of the first one, or of the meeting point" >&2
  exit 2
fi

# Launchers hide the exit codes of their ranks: rank 0 of a training leaves a note there when it was asked to stop.
marker=
if [[ -n $is_training && -z ${SLURM_JOB_ID:-} ]]; then
  script='import sys; from rvc_dist.__main__ import parse; print(parse(sys.argv[1], sys.argv[2:])[0].run_dir)'
  run_dir=$("${inside[@]}" python -c "$script" "$@" | tail -n 1) || {
    echo "node.sh: the recipe is wrong, or rvc_dist cannot be started here; see above" >&2
    exit 2
  }
  marker=$run_dir/requeue.json
  (( node_rank > 0 )) || rm -f "$marker"
fi

if [[ -z ${RANKS:-} || -n $is_elastic ]]; then
  gpus=$("${inside[@]}" python -c 'import torch; print(torch.cuda.device_count())')
  RANKS=${RANKS:-$((gpus > 0 ? gpus : 1))}
fi
# A rank's part of the processors, unless the user says otherwise; Accelerate would count those of the whole machine.
threads=$((${SLURM_CPUS_ON_NODE:-${CPUS:-$(nproc)}} / RANKS))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
command=(python -m rvc_dist "$@")
if [[ -n $is_elastic ]]; then
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${PATIENCE_S:-90}
  (( gpus > 0 )) && device=--gpus || device=--cpu
  command=(python -m rvc_dist launch --nodes "$nodes" "$device" "$RANKS"
    --main_ip "$head_addr" --main_port "${HEAD_PORT:-29500}" -- "$@")
elif (( RANKS > 1 )) || [[ $nodes != 1 ]]; then
  # Only a c10d rendezvous recovers after a restart. Its host is said: torch would guess it from names. The nodes wait
  # for each other as launch/two_nodes.yaml says: one may still be loading its image.
  (( node_rank == 0 )) && is_host=true || is_host=false
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  command=(python -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$RANKS" --rdzv-backend c10d
    --rdzv-endpoint "${head_addr:-localhost}:${HEAD_PORT:-29500}"
    --rdzv-id "${SLURM_JOB_ID:-${SKYPILOT_TASK_ID:-none}}"
    --rdzv-conf "is_host=$is_host,join_timeout=600,read_timeout=600,keep_alive_max_attempt=2000"
    --max-restarts "${MAX_RESTARTS:-3}" -m rvc_dist "$@")
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
if [[ -n $is_training ]]; then
  ask_with=USR1 patience_s=${PATIENCE_S:-90}
fi
exec {silence}<> <(:)
while kill -0 "$launcher" 2>/dev/null; do
  if [[ -z $asked_at ]]; then
    read -r -t 0.25 -u "$silence" || true # a wait for the launcher would sleep over a signal that came just before it
    continue
  fi
  mapfile -t others < <(descendants "$launcher")
  if [[ -n $is_elastic && $asked_by == TERM ]]; then # its launcher asks the ranks, and waits as long for them
    ask_with=TERM patience_s=$((${PATIENCE_S:-90} + 10))
  fi
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
if (( code == 0 )) && [[ -n $marker && -f $marker ]]; then
  echo "node.sh: stopped: $(tr -d '\n' <"$marker"); the same command continues" >&2
  code=75
elif (( code != 0 )) && [[ -n $is_elastic && $asked_by == TERM ]]; then
  echo "node.sh: this node has ended as it was asked to; the others go on" >&2
  code=75
fi
exit "$code"
