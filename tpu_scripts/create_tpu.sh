#!/usr/bin/env bash
# Asks for a TPU slice and waits until it is there: as a queued resource, or at once with --vm.
#
# usage: create_tpu.sh --name NAME --zone ZONE --slice SLICE [--project PROJECT] [--vm] [--spot]
#          [--valid_for DURATION] [--dry_run] [-- GCLOUD OPTIONS]
#   --slice      a file of configs/slices without .json: v5e-16, v5p-32, v6e-16, ...
#   --vm         a TPU VM directly: fails at once where there is none, instead of queueing
#   --spot       a spot slice: cheaper, may be taken away at any time
#   --valid_for  withdraw the request if it is not served by then: 30m, 6h, 2d; not with --vm
#   --dry_run    print the gcloud commands instead of running them
#   --           passed on, for example --service-account=EMAIL --network=NETWORK --reserved
#
# The slice costs money from the moment it is there until delete_tpu.sh. Stopping this script does
# not withdraw the request; the last command that --dry_run prints shows its state.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "name zone slice" "project valid_for" "vm spot --" "$@"
read_slice
[[ -z $VM || -z $VALID_FOR ]] || fail "--valid_for goes with a queue, got it with --vm; drop one."
[[ -z $VALID_FOR ]] || require_match valid_for "$VALID_FOR" '[0-9]+[smhd]' "a time such as 6h"
require_tools gcloud

type=--accelerator-type=$(field accelerator_type)
runtime=$(field runtime_version)
if [[ $VM ]]; then
  run gcloud compute tpus tpu-vm create "$NAME" "${LOCATION[@]}" "$type" --version="$runtime" \
    ${SPOT:+--spot} "${COMMAND[@]}"
  exit
fi
run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${LOCATION[@]}" \
  "$type" --runtime-version="$runtime" ${SPOT:+--spot} \
  ${VALID_FOR:+--valid-until-duration="$VALID_FOR"} "${COMMAND[@]}"

describe=(gcloud compute tpus queued-resources describe "$NAME" "${LOCATION[@]}"
  "--format=value(state.state)")
if [[ $DRY_RUN ]]; then
  run "${describe[@]}"
  exit
fi
while true; do
  state=$("${describe[@]}")
  echo "$(date +%H:%M:%S) $NAME: $state"
  case "$state" in
    ACTIVE) exit ;;
    FAILED | SUSPENDED | SUSPENDING)
      echo "create_tpu.sh: $NAME is $state; docs/cloud_tpu.md says how to find out why." >&2
      exit 1
      ;;
  esac
  sleep 30
done
