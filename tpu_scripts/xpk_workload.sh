#!/usr/bin/env bash
# Runs a command on every host of slices of a GKE cluster that XPK made.
#
# usage: xpk_workload.sh --name NAME --cluster CLUSTER --zone ZONE --slice SLICE --image IMAGE
#          [--num_slices N] [--sweep] [--storage NAME] [--max_restarts N] [--project PROJECT]
#          [--dry_run] -- COMMAND...
#   --slice         a file of configs/slices without .json: v5e-16, v5p-32, v6e-16, ...
#   --image         built from configs/workloads/Dockerfile
#   --num_slices    slices (1 by default) that run COMMAND as one program
#   --sweep         COMMAND is `uncurl sweep ...`: a workload NAME-0, NAME-1, ... for each slice,
#                   and every host does a part of its own, as with sweep_tpu.sh
#   --storage       what `xpk storage attach` made, mounted where it says
#   --max_restarts  times that a workload begins again after a failure or preemption (default 0)
#   --dry_run       print the xpk commands instead of running them
#
# XPK queues the workloads; look at them with `xpk workload list --cluster CLUSTER`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=workloads.sh disable=SC1091
source "$ROOT/tpu_scripts/workloads.sh"
parse_options "name cluster zone slice image" "num_slices storage max_restarts project" \
  "sweep --" "$@"
check_workload
require_tools xpk

submit() { # name, number of slices, command line
  run xpk workload create --workload="$1" --cluster="$CLUSTER" "${LOCATION[@]}" \
    --tpu-type="$(field accelerator_type)" --num-slices="$2" --docker-image="$IMAGE" \
    --max-restarts="$MAX_RESTARTS" ${STORAGE:+--storage="$STORAGE"} --command="$3"
}
for_each_workload submit
