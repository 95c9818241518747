#!/usr/bin/env bash
# Runs a command on every host of slices of any GKE cluster, as JobSets and without XPK.
#
# usage: gke_workload.sh --name NAME --slice SLICE --image IMAGE --bucket BUCKET [--num_slices N]
#          [--sweep] [--max_restarts N] [--dry_run] -- COMMAND...
#   --slice         a file of configs/slices without .json; the cluster has node pools of this kind
#   --image         built from configs/workloads/Dockerfile
#   --bucket        a bucket without gs://, mounted at /bucket
#   --num_slices    slices (1 by default) that run COMMAND as one program
#   --sweep         COMMAND is `uncurl sweep ...`: a JobSet NAME-0, NAME-1, ... for each slice, and
#                   every host does a part of its own, as with sweep_tpu.sh
#   --max_restarts  times that a JobSet begins again after a failure or preemption (default 0);
#                   wrong input, exit status 2, is not tried again
#   --dry_run       print the kubectl commands and manifests instead of running them
#
# Fills in configs/workloads/jobset.yaml and gives it to the cluster of kubectl's current context.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=workloads.sh disable=SC1091
source "$ROOT/tpu_scripts/workloads.sh"
parse_options "name slice image bucket" "num_slices max_restarts" "sweep --" "$@"
check_workload
require_match bucket "$BUCKET" '[a-z0-9][-_.a-z0-9]*' "the name of a bucket without gs://"
require_match image "$IMAGE" '[-_./:@A-Za-z0-9]+' "the name of an image"
case $(field accelerator_type) in
  v5litepod-*) accelerator=tpu-v5-lite-podslice ;;
  v5p-*) accelerator=tpu-v5p-slice ;;
  v6e-*) accelerator=tpu-v6e-slice ;;
  *) fail "--slice must be of a kind whose name in GKE is known here, got $SLICE." ;;
esac
require_tools kubectl

submit() { # name, number of slices, command line
  local text key
  local -A values=([NAME]=$1 [NUM_SLICES]=$2 [IMAGE]=$IMAGE [BUCKET]=$BUCKET
    [MAX_RESTARTS]=$MAX_RESTARTS [ACCELERATOR]=$accelerator [TOPOLOGY]=$(field topology)
    [NUM_HOSTS]=$(field num_hosts) [CHIPS_PER_HOST]=$(field chips_per_host))
  text=$(grep -v '^ *#' "$ROOT/configs/workloads/jobset.yaml")
  for key in "${!values[@]}"; do text=${text//"\${$key}"/"${values[$key]}"}; done
  text=${text//"\${COMMAND}"/"$3"}
  if [[ $DRY_RUN ]]; then
    printf "kubectl apply --filename=- <<'END'\n%s\nEND\n" "$text"
  else
    run kubectl apply --filename=- <<<"$text"
  fi
}
for_each_workload submit
