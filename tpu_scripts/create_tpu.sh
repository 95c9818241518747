#!/usr/bin/env bash
# Asks for a TPU slice as a queued resource and waits until it is there.
#
# usage: create_tpu.sh --name NAME --zone ZONE --slice SLICE [--project PROJECT] [--spot] [--dry_run]
#   --slice    a file of configs/slices without .json: v5e-16, v5e-64, v5e-256, v5p-32, v5p-128, v6e-16
#   --spot     a spot slice: cheaper, may be taken away at any time
#   --dry_run  print the gcloud commands instead of running them
#
# The slice costs money from the moment it is ACTIVE until delete_tpu.sh. Stopping this script does
# not withdraw the request; the last command that --dry_run prints shows its state.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/tpu_scripts/common.sh"
parse_options "name zone slice" "$@"

file=$root/configs/slices/$SLICE.json
known=$(cd "$root/configs/slices" && ls -- *.json | sed 's/\.json$//' | paste -sd ' ')
[[ -f $file ]] || fail "--slice must be one of $known, got $SLICE."
field() { sed -n "s/^ *\"$1\": \"\(.*\)\",\{0,1\}$/\1/p" "$file"; }

run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${LOCATION[@]}" \
  --accelerator-type="$(field accelerator_type)" --runtime-version="$(field runtime_version)" \
  ${SPOT:+--spot}

describe=(gcloud compute tpus queued-resources describe "$NAME" "${LOCATION[@]}"
  "--format=value(state.state)")
if [[ $DRY_RUN ]]; then
  run "${describe[@]}"
  exit 0
fi
while state=$("${describe[@]}"); do
  echo "$(date +%H:%M:%S) $NAME: $state"
  case "$state" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED | SUSPENDING)
      fail "$NAME is $state: look at 'gcloud compute tpus queued-resources describe $NAME', then delete it."
      ;;
  esac
  sleep 30
done
