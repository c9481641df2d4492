#!/usr/bin/env bash
#SBATCH --job-name=optimization
#SBATCH --nodes=2
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=slurm-%x-%j.log
# Runs a command under Slurm, one process per node or per GPU, and restarts it after a preemption, a
# lost node, a crash or the end of its time limit, until it has finished. The size of the job is set
# by sbatch's own flags, before the script. Examples for CPU nodes and for 8 GPUs per node:
#
#     sbatch --nodes=4 --cpus-per-task=16 launch/slurm.sh \
#         python experiments/run.py --executor=spmd --mesh=data:4
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 launch/slurm.sh \
#         python experiments/run.py --executor=spmd --mesh=data:32
#     sbatch --nodes=2 --array=0-2 launch/slurm.sh python experiments/run.py --executor=spmd \
#         --mesh=data:2 --method="data_parallel(sgd({0.03|0.1|0.3}), mean())"
#
# Task I of an array uses alternative I of each {A|B|...}. --out must be on a disk that all nodes
# share; its default name depends only on the flags. `scancel JOB` stops the job for good: the run
# then has Slurm's KillWait (30 s by default) to save. With `scancel --signal=TERM JOB`, the run has
# as much time as it needs. After RESTARTS (20) restarts of any kind, a crash ends the job. Exit
# codes 2 to 5 would recur, so these codes end the job at once.
set -uo pipefail
restarts=${RESTARTS:-20}

pick() { # prints WORD with the array task's alternative in place of each {A|B|...}
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
  echo "error: no command to run: sbatch launch/slurm.sh python SCRIPT FLAGS" >&2
  exit 2
fi
words=()
for word in "$@"; do
  picked=$(pick "$word") || exit 2
  words+=("$picked")
done

gpus=${SLURM_GPUS_ON_NODE:-0} tasks=${SLURM_TASKS_PER_NODE:-1}
tasks=${tasks%%[(,]*}
if ((gpus > 0 && gpus != tasks && (tasks > 1 || ${SLURM_JOB_NUM_NODES:-1} > 1))); then
  echo "error: --ntasks-per-node=$tasks: a node has $gpus GPUs, each of which needs a process;" \
    "pass --ntasks-per-node=$gpus" >&2
  exit 2
fi

# Only for the last task of an array, SLURM_JOB_ID is the id of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}
out_of_time='' stopped=''
# The time limit is near: the run saves its state, on all processes at the same step.
trap 'out_of_time=1; scancel --signal=TERM "$job"' USR1
# Slurm also sends SIGTERM to the run, and decides by itself whether the job runs again.
trap 'stopped=1' TERM
reread() { # forwards srun's stderr; returns the code of the process that failed first, 0 if killed
  local line first=
  trap '' TERM
  while IFS= read -r line || [ -n "$line" ]; do
    printf '%s\n' "$line" >&2
    if [[ -z $first && $line =~ ^srun:\ error:\ .*:\ tasks?\ .*:\ (.*) ]]; then
      first=${BASH_REMATCH[1]}
    fi
  done
  [[ $first =~ exit\ code\ ([0-9]+)$ ]] && return "${BASH_REMATCH[1]}"
  return 0
}
# If a process fails, srun ends the other processes, and returns their exit code instead.
(
  trap : TERM
  srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
    "${words[@]}" 2>&1 >&3 | reread
) 3>&1 &
step=$!
wait $step
code=$?
while kill -0 $step 2>/dev/null; do # a signal ends `wait`, not the step
  wait $step
  code=$?
done
if ((code >= 2 && code <= 5)); then
  exit "$code"
fi
trap '' TERM # Slurm sends SIGTERM more than once, and to squeue and scontrol as well
# A preemption with a grace time sends SIGTERM only to the run, which saves and ends with 0.
read -r state preempted reason < <(
  squeue --noheader --jobs="$job" --Format=State:30,PreemptTime:30,Reason:60
)
[ "${preempted:-N/A}" != N/A ] || preempted=
if [ "$code$out_of_time$stopped$preempted" = 0 ] && [ "$reason" != TimeLimit ]; then
  exit 0
fi
code=$((code ? code : 143)) # a job that was told to stop has not finished
case "$state,$reason,${stopped:+stopped},${preempted:+preempted}" in
  *,TimeLimit,* | RUNNING,*,, | RUNNING,*,preempted) ;;
  *) exit "$code" ;; # cancelled, or already back in the queue
esac
if [ -z "$out_of_time$preempted" ] && ((${SLURM_RESTART_COUNT:-0} >= restarts)); then
  echo "error: exit code $code after $restarts restarts" >&2
  exit "$code"
fi
echo "exit code $code: the job goes back to the queue"
scontrol requeue "$job" || exit "$code"
