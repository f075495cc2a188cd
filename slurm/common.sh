# Sourced by the batch scripts: the environment of a job, its launchers, and what becomes of it after a signal.
# What differs from cluster to cluster comes from the environment of sbatch:
#   MODULES           modules to load: "cuda/12.4 python/3.12"
#   VENV              the virtual environment (default: .venv if there is one, else the python on the PATH)
#   CONTAINER         an image that has what rvc_dist needs: FILE.sif for apptainer, all else is for pyxis
#   CONTAINER_MOUNTS  folders that it sees besides the checkout: "/data:/data,/scratch:/scratch"
#   RANKS             ranks a node (default: one a GPU; 1 without GPU)
#   MAX_RESTARTS      how often a launcher starts its ranks again after a failure (default 3)
#   MAX_REQUEUES      how often a job goes back into the queue (default 100)
#   LOOK_AHEAD        not empty: preprocess ends before it begins if a later stage would miss something (pipeline.sh sets it)
#   SRUN_OPTIONS      more options of srun: "--network=... --mpi=none"
# shellcheck shell=bash

# First of all: what comes before its trap ends this shell. TERM (a cancel, the end of a grace time) goes to the step as
# well, which saves; this shell has to outlive it.
asked=
trap 'asked=yes; [[ -z ${step:-} ]] || kill -USR1 "$step" 2>/dev/null || true' USR1
trap : TERM

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

cd "$SLURM_SUBMIT_DIR" || exit 2

if [[ -n ${MODULES:-} ]]; then
  set +eu # the functions of module systems are not written for these
  for file in /etc/profile.d/{modules,lmod,z00_lmod}.sh; do
    # shellcheck source=/dev/null
    declare -F module >/dev/null || { [[ -r $file ]] && source "$file"; }
  done
  # shellcheck disable=SC2086 # several words
  module load $MODULES || fail "MODULES: 'module load $MODULES' failed"
  set -eu
fi

srun=(srun --export=ALL --cpu-bind=none) # a step has all processors of the job; the ranks share them
inside=()
if [[ ${CONTAINER:-} == *.sif ]]; then
  apptainer=$(command -v apptainer || command -v singularity) || fail "CONTAINER: neither apptainer nor singularity is on the PATH"
  inside=("$apptainer" exec --nv --pwd "$PWD" --bind "$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" "$CONTAINER")
elif [[ -n ${CONTAINER:-} ]]; then
  srun+=(--container-image="$CONTAINER" --container-workdir="$PWD")
  srun+=(--container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
elif [[ -n ${VENV:-} || -d .venv ]]; then
  VENV=${VENV:-.venv}
  [[ -x $VENV/bin/python ]] || fail "VENV: $VENV/bin/python does not exist"
  PATH="$(cd "$VENV/bin" && pwd):$PATH"
  export PATH
fi
# shellcheck disable=SC2206 # several words
srun+=(${SRUN_OPTIONS:-})

# The id of an array's last task alone is that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# The part of the work that this task of an array does, as --shard takes it.
shard() {
  local first=${SLURM_ARRAY_TASK_MIN:-0} last=${SLURM_ARRAY_TASK_MAX:-0} by=${SLURM_ARRAY_TASK_STEP:-1}
  local id=${SLURM_ARRAY_TASK_ID:-0} count=${SLURM_ARRAY_TASK_COUNT:-1}
  if [[ -n ${SHARDS:-} ]]; then # some tasks of an array of SHARDS, that start at 0
    (( id < SHARDS )) || fail "SHARDS: got $SHARDS, but the array has a task $id; expected tasks 0 to SHARDS - 1"
    echo "$id/$SHARDS"
  elif (( last - first == (count - 1) * by )); then
    echo "$(((id - first) / by))/$count"
  else
    fail "--array: $count tasks between $first and $last leave gaps; to do some shards of N again, set SHARDS=N"
  fi
}

# look_ahead --config RECIPE ...: fails, and says why, when a stage of the recipe would miss something only after hours.
look_ahead() {
  "${srun[@]}" --nodes=1 --ntasks=1 "${inside[@]}" python -m rvc_dist run "$@" --look-ahead
}

# run_stage STAGE --config RECIPE ...: one launcher on every node. Ends the script; back in the queue, if that is right.
run_stage() {
  local code=0 marker="" first details
  if [[ $1 == train || $1 == run ]]; then # rank 0 leaves a note there when a signal stopped it
    marker=$("${srun[@]}" --nodes=1 --ntasks=1 "${inside[@]}" python -c \
      'import sys; from rvc_dist.__main__ import parse; print(parse(sys.argv[1], sys.argv[2:])[0].run_dir)' "$@" | tail -n 1) ||
      fail "the recipe is wrong, or rvc_dist cannot be started on ${SLURMD_NODENAME:-this node}; see above"
    marker=$marker/requeue.json
    rm -f "$marker"
  fi
  # The address that SLURM itself has of the first node: its name need not be known to any name server.
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  details=$(scontrol show node "$first")
  [[ $details =~ NodeAddr=([^[:space:]]+) ]] || fail "scontrol does not know the address of $first"
  export HEAD_ADDR=${BASH_REMATCH[1]}
  export HEAD_PORT=$((10000 + SLURM_JOB_ID % 20000)) # so that two jobs on a node do not meet

  # In the background: a trap of bash waits for a command in the foreground.
  "${srun[@]}" --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 bash launch/node.sh "${inside[@]}" -- "$@" &
  step=$!
  [[ -z $asked ]] || kill -USR1 "$step" 2>/dev/null || true
  while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true # or a signal
  done
  wait "$step" || code=$?
  step=
  finish "$code" "$marker"
}

# finish CODE MARKER: exit with 0 when the stage is done, with 75 when the job went back into the queue.
finish() {
  local code=$1 marker=$2 details why=""
  if [[ -z $marker || ! -f $marker ]]; then
    marker=""
    (( code != 0 )) || exit 0
  fi
  # A job that is cancelled, out of time or requeued by SLURM itself is not RUNNING any more, and goes where it was sent.
  details=$(scontrol show job "$job") || details=""
  if [[ $details == *JobState=RUNNING* ]]; then
    [[ ! $details =~ PreemptTime=[0-9] ]] || why="pre-empted"
    [[ -z $asked ]] || why=${why:-"asked to stop (USR1)"}
    [[ -z $marker ]] || ! grep -q SIGUSR1 "$marker" || why=${why:-"asked to stop (USR1)"}
  fi
  [[ -z $marker ]] || echo "$(date +%T) stopped: $(tr -d '\n' <"$marker")"
  if [[ -z $why ]]; then
    [[ -z $marker ]] || code=75
    echo "$(date +%T) ended with code $code; the same command continues" >&2
    exit "$code"
  fi
  if (( ${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-100} )); then
    fail "$why for the ${SLURM_RESTART_COUNT}th time: more than MAX_REQUEUES allows. Is --time long enough for the start?"
  fi
  echo "$(date +%T) $why: back into the queue"
  scontrol requeue "$job" || fail "cannot be requeued (see above); submit it again, it continues"
  exit 75
}
