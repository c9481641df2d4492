#!/usr/bin/env bash
# Runs one command on this machine, detached from the terminal. The job's state is stored in .job.
#
#     bash launch/detached.sh start COMMAND...   starts the command, unless one is running
#     bash launch/detached.sh status             prints 'running PID', 'ended CODE', 'lost', 'not started'
#     bash launch/detached.sh logs [LINES]       prints the last lines; with 'follow', also new ones
#     bash launch/detached.sh kill [SECONDS]     sends SIGTERM, so that a run saves; then SIGKILL
#
# CODE is the command's exit code, or 143 after SIGTERM, since such a job has not finished. 'lost'
# means that the machine was preempted while the job ran.
set -uo pipefail
folder=.job

pid_of_running() {
  local pid
  pid=$(cat $folder/pid 2>/dev/null) && grep -qs detached "/proc/$pid/cmdline" && echo "$pid"
}

remove_lock() { # a killed libtpu leaves a lock file, which prevents the next start
  sudo -n rm -f /tmp/libtpu_lockfile 2>/dev/null || rm -f /tmp/libtpu_lockfile 2>/dev/null || true
}

case ${1:-} in
  start)
    shift
    if pid=$(pid_of_running); then
      echo "a job is already running as process $pid; 'kill' ends it" >&2
      exit 1
    fi
    remove_lock
    mkdir -p $folder
    rm -f $folder/exit_code
    echo "--- $(date -u +%FT%TZ) $*" >>$folder/log
    setsid nohup bash "$0" run "$@" >>$folder/log 2>&1 </dev/null &
    echo $! >$folder/pid
    ;;
  run) # used by start: waits until the command ends
    shift
    told=
    "$@" &
    child=$!
    trap 'told=1; kill -TERM $child' TERM
    wait $child
    code=$?
    while kill -0 $child 2>/dev/null; do # a signal ends `wait`, not the command
      wait $child
      code=$?
    done
    [ -z "$told" ] || code=143
    echo $code >$folder/exit_code.new
    mv $folder/exit_code.new $folder/exit_code
    ;;
  status)
    if [ -f $folder/exit_code ]; then
      echo "ended $(cat $folder/exit_code)"
    elif pid=$(pid_of_running); then
      echo "running $pid"
    elif [ -f $folder/pid ]; then
      echo lost
    else
      echo "not started"
    fi
    ;;
  logs)
    if [ "${3:-}" = follow ]; then
      exec tail -n "${2:-100}" -F $folder/log
    fi
    exec tail -n "${2:-100}" $folder/log
    ;;
  kill)
    if pid=$(pid_of_running); then
      kill -TERM "$pid"
      for _ in $(seq $((10 * ${2:-60}))); do
        pid_of_running >/dev/null || break
        sleep 0.1
      done
      kill -KILL -- "-$pid" 2>/dev/null
    fi
    remove_lock
    ;;
  *)
    echo "usage: detached.sh start COMMAND... | status | logs [LINES [follow]] | kill [SECONDS]" >&2
    exit 2
    ;;
esac
exit 0
