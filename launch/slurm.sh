#!/usr/bin/env bash
#SBATCH --job-name=optimization
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=slurm-%x-%j.log
# Runs a command under Slurm, one process per GPU, and again after a preemption, a lost node, or the
# end of its time, until it has finished. sbatch's own flags go before the script:
#
#     sbatch --nodes=4 launch/slurm.sh python experiments/run.py --executor=spmd --mesh=data:32
#     sbatch --array=0-2 launch/slurm.sh python experiments/run.py --executor=spmd --mesh=data:16 \
#         --method="data_parallel(sgd({0.03|0.1|0.3}), mean())"
#
# Task I of an array takes the alternative I of each {A|B|...}. --out must be on a disk that all nodes
# share; by default its name follows from the flags. Exit codes 2 to 5 would come again: no restart.
set -uo pipefail
restarts=${RESTARTS:-20}

pick() { # WORD: with the array task's alternative in place of each {A|B|...}
  local word=$1 before after choices
  while [[ $word =~ ^(.*)\{([^{}]*\|[^{}]*)\}(.*)$ ]]; do
    before=${BASH_REMATCH[1]} after=${BASH_REMATCH[3]}
    IFS='|' read -ra choices <<<"${BASH_REMATCH[2]}"
    if ((${SLURM_ARRAY_TASK_ID:-0} >= ${#choices[@]})); then
      echo "error: $1: there is no alternative ${SLURM_ARRAY_TASK_ID:-0}" >&2
      exit 2
    fi
    word=$before${choices[${SLURM_ARRAY_TASK_ID:-0}]}$after
  done
  printf %s "$word"
}

if [ $# = 0 ]; then
  echo "error: what to run comes after the script: sbatch launch/slurm.sh python SCRIPT FLAGS" >&2
  exit 2
fi
words=()
for word in "$@"; do
  picked=$(pick "$word") || exit 2
  words+=("$picked")
done

told=
stop() { # the run saves on all processes at the same step
  told=1
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop USR1 TERM
srun --kill-on-bad-exit=1 "${words[@]}" &
step=$!
wait $step
code=$?
while kill -0 $step 2>/dev/null; do # a signal ends `wait`, not the step
  wait $step
  code=$?
done
if [ -z "$told" ] && ((code == 0 || (code >= 2 && code <= 5))); then
  exit "$code"
fi
if ((${SLURM_RESTART_COUNT:-0} >= restarts)); then
  echo "error: exit code $code after $restarts restarts" >&2
  exit $((code ? code : 143))
fi
echo "exit code $code${told:+, told to stop}: the job goes back to the queue"
scontrol requeue "$SLURM_JOB_ID"
