#!/usr/bin/env bash
# Deletes a slice and its queued resource, with everything stored on its hosts.
#
# usage: delete_tpu.sh --name NAME --zone ZONE [--project PROJECT] [--dry_run]
#   --dry_run  print the gcloud command instead of running it
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/tpu_scripts/common.sh"
parse_options "name zone" "$@"

run gcloud compute tpus queued-resources delete "$NAME" "${LOCATION[@]}" --force --quiet
