# Sourced by sweep_tpu.sh and the scripts for GKE: what every host of every slice is to run.
# shellcheck shell=bash

require_sweep() { # checks COMMAND
  require_command "uncurl sweep"
  [[ "${COMMAND[*]} " == "uncurl sweep "* ]] ||
    fail "what follows -- must be uncurl sweep and its options, got ${COMMAND[*]}."
  [[ " ${COMMAND[*]}" != *" --shard"* ]] || fail "--shard is added here, got one after --; drop it."
  [[ " ${COMMAND[*]}" == *" --out"* ]] || fail "uncurl sweep needs --out, got none; add it."
}

# A program that is started with ONE_HOST has a host with 4 chips for itself: it neither waits for
# the other hosts of the slice nor sees their chips.
one_host() {
  [[ $(field chips_per_host) == 4 ]] || fail "--slice must have 4 chips per host, got $SLICE."
  ONE_HOST=(env "TPU_PROCESS_BOUNDS=1,1,1" "TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1"
    "TPU_VISIBLE_CHIPS=0,1,2,3" CLOUD_TPU_TASK_ID=0 TPU_WORKER_ID=0 TPU_WORKER_HOSTNAMES=localhost)
}

check_workload() { # options that the scripts for GKE share
  read_slice
  require_match num_slices "${NUM_SLICES:=1}" '[1-9][0-9]*' "a number above 0"
  require_match max_restarts "${MAX_RESTARTS:=0}" '[0-9]+' "a number"
  require_command "a command"
  if [[ $SWEEP ]]; then
    require_sweep
    one_host
  fi
}

# for_each_workload FUNCTION: calls FUNCTION NAME NUM_SLICES LINE; LINE is for bash on every host.
# Kubernetes numbers the hosts of a slice in JOB_COMPLETION_INDEX; `exec` lets SIGTERM reach them.
for_each_workload() {
  local words index hosts parts
  words=$(escape "${COMMAND[@]}")
  if [[ ! $SWEEP ]]; then
    "$1" "$NAME" "$NUM_SLICES" "exec $words"
    return
  fi
  hosts=$(field num_hosts)
  parts=$((NUM_SLICES * hosts))
  for index in $(seq 0 $((NUM_SLICES - 1))); do
    "$1" "$NAME-$index" 1 "exec ${ONE_HOST[*]} $words \
--shard \$((JOB_COMPLETION_INDEX + $((index * hosts))))/$parts"
  done
}
