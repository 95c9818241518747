#!/usr/bin/env bash
# Runs one command on every host of a slice, as multi-host JAX needs.
#
# usage: run_on_tpu.sh --name NAME --zone ZONE [--project PROJECT] [--detach] [--dry_run] -- COMMAND...
#   --detach   go on running when the connection ends; output goes to ~/uncurl_jax/run.log there
#   --dry_run  print the gcloud command instead of running it
#
# COMMAND runs in ~/uncurl_jax with .venv-run active, for example
#   run_on_tpu.sh --name my-slice --zone us-west4-a --detach -- \
#     uncurl train --distributed --gin_file gin/runs/pretrain.gin --cache DIR --out DIR
# To look at it later: the same with `-- tail -n 20 run.log`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/tpu_scripts/common.sh"
parse_options "name zone command" "$@"

remote="cd uncurl_jax && source .venv-run/bin/activate && $(printf '%q ' "${COMMAND[@]}")"
if [[ $DETACH ]]; then
  remote="nohup bash -c $(printf %q "$remote") > uncurl_jax/run.log 2>&1 < /dev/null &"
fi
run gcloud compute tpus tpu-vm ssh "$NAME" "${LOCATION[@]}" --worker=all --command="${remote% }"
