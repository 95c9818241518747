#!/usr/bin/env bash
# Deletes a slice, with its queued resource and everything stored on its hosts.
#
# usage: delete_tpu.sh --name NAME --zone ZONE [--project PROJECT] [--vm] [--dry_run]
#   --vm       the slice was created with --vm: there is no queued resource
#   --dry_run  print the gcloud command instead of running it
#
# Collect the results first: collect_results.sh. An ACTIVE or waiting request is deleted alike.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "name zone" "project" "vm" "$@"
require_tools gcloud

if [[ $VM ]]; then
  run gcloud compute tpus tpu-vm delete "$NAME" "${LOCATION[@]}" --quiet
else
  run gcloud compute tpus queued-resources delete "$NAME" "${LOCATION[@]}" --force --quiet || {
    echo "delete_tpu.sh: nothing was deleted; if $NAME was created with --vm, add --vm." >&2
    exit 1
  }
fi
