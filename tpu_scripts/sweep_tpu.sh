#!/usr/bin/env bash
# Runs one study on several slices: every host does a part of its own, with no coordinator.
#
# usage: sweep_tpu.sh --names NAME,NAME,... --zone ZONE --slice SLICE [--project PROJECT]
#          [--only NAME,...] [--dry_run] -- uncurl sweep OPTIONS
#   --names    slices of one kind, set up with setup_tpu.sh
#   --slice    their kind, a file of configs/slices without .json
#   --only     start the parts of these slices only, numbered as with all of --names: for a slice
#              that was lost and made again
#   --dry_run  print the gcloud commands instead of running them
#
# `uncurl sweep` is one process, so a host with its 4 chips is one machine: host h of slice s does
# part `--shard i/n`, i = s * hosts + h and n = slices * hosts, in <out>/shard_<i>_of_<n>. It goes
# on when the connection ends; ~/uncurl_jax/run.log of each host says how far it is. The same
# command goes on with parts that stopped; do not start a part that runs still.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=workloads.sh disable=SC1091
source "$ROOT/tpu_scripts/workloads.sh"
parse_options "names zone slice" "project only" "--" "$@"
read_slice
require_sweep
one_host
IFS=, read -ra names <<<"$NAMES"
IFS=, read -ra only <<<"$ONLY"
for name in "${names[@]}"; do
  [[ ",${NAMES//,/,,}," != *",$name,"*",$name,"* ]] ||
    fail "--names must not repeat, got $name twice."
done
for name in "${only[@]}"; do
  [[ ",$NAMES," == *",$name,"* ]] || fail "--only must be some of --names $NAMES, got $name."
done
require_tools gcloud

hosts=$(field num_hosts)
parts=$((${#names[@]} * hosts)) failed=""
for part in $(seq 0 $((parts - 1))); do
  name=${names[part / hosts]} host=$((part % hosts))
  [[ -z $ONLY || ",$ONLY," == *",$name,"* ]] || continue
  "$ROOT/tpu_scripts/run_on_tpu.sh" --name "$name" --worker "$host" "${LOCATION[@]}" --detach \
    ${DRY_RUN:+--dry_run} -- "${ONE_HOST[@]}" "${COMMAND[@]}" --shard "$part/$parts" ||
    failed+=" $name:$host"
done
[[ -z $failed ]] || {
  echo "sweep_tpu.sh: not started (slice:host):$failed; docs/cloud_tpu.md says what to do." >&2
  exit 1
}
