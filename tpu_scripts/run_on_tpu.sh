#!/usr/bin/env bash
# Runs one command on every host of a slice, as multi-host JAX needs, or on some of them.
#
# usage: run_on_tpu.sh --name NAME --zone ZONE [--project PROJECT] [--worker HOSTS] [--detach]
#          [--dry_run] -- COMMAND...
#   --worker   hosts, from 0: all (the default), 2, 0,3 or 1-3
#   --detach   go on running when the connection ends; output is added to ~/uncurl_jax/run.log
#              there, and at last a line with the exit status
#   --dry_run  print the gcloud command instead of running it
#
# COMMAND runs in ~/uncurl_jax with .venv-run active, for example
#   run_on_tpu.sh --name my-slice --zone us-west4-a --detach -- \
#     uncurl train --distributed --gin_file gin/runs/pretrain.gin --cache DIR --out DIR
# To look at it later: the same with `-- tail -n 20 run.log`; to stop it as a preemption would,
# with `-- pkill -TERM -x uncurl`. Pipes and variables of the hosts: `-- bash -c 'echo $HOME'`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "name zone" "project worker" "detach --" "$@"
require_command "a command"
require_match worker "${WORKER:=all}" 'all|[0-9]+([,-][0-9]+)*' "all or numbers of hosts"
require_tools gcloud

remote="cd uncurl_jax && source .venv-run/bin/activate && $(escape "${COMMAND[@]}")"
if [[ $DETACH ]]; then
  remote="nohup bash -c $(quote "$remote; echo \"exit status \$?\"") \
>> uncurl_jax/run.log 2>&1 < /dev/null &"
fi
run gcloud compute tpus tpu-vm ssh "$NAME" "${LOCATION[@]}" --worker="$WORKER" --command="$remote"
