#!/usr/bin/env bash
# Copies the last commit of this checkout to every host of a slice and installs it there.
#
# usage: setup_tpu.sh --name NAME --zone ZONE [--project PROJECT] [--dry_run]
#   --dry_run  print the commands instead of running them
#
# Each host gets ~/uncurl_jax with .venv-run: the locked versions, and the libtpu that belongs to
# the locked jax. Ends by counting the chips that JAX sees on all hosts together. May be repeated;
# what runs wrote into ~/uncurl_jax stays.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "name zone" "project" "" "$@"
require_tools gcloud git

archive=uncurl_jax.tar.gz
if [[ ! $DRY_RUN ]]; then
  [[ -z $(git -C "$ROOT" status --porcelain) ]] ||
    echo "setup_tpu.sh: this checkout has changes that are not committed; they are not copied." >&2
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  cd "$scratch"
fi
run git -C "$ROOT" archive --format=tar.gz --output="$PWD/$archive" HEAD

# Runs on the hosts. Their image may have an older Python only, and be updating itself still.
apt="sudo apt-get -qq -o DPkg::Lock::Timeout=600"
install="set -e; rm -rf uncurl_jax/uncurl_jax; mkdir -p uncurl_jax; \
tar -xzf $archive -C uncurl_jax; cd uncurl_jax; \
(requirements/find_python && make --version) > /dev/null 2>&1 || \
($apt update && $apt install -y make python3.11 python3.11-venv); \
make install; .venv-run/bin/python -m pip install --quiet 'jax[tpu]'"
count="cd uncurl_jax && .venv-run/bin/python -c 'import jax; jax.distributed.initialize(); \
print(jax.process_index(), jax.device_count(), jax.devices()[0].device_kind)'"

run gcloud compute tpus tpu-vm scp "$archive" "$NAME:" "${LOCATION[@]}" --worker=all
run gcloud compute tpus tpu-vm ssh "$NAME" "${LOCATION[@]}" --worker=all --command="$install"
run gcloud compute tpus tpu-vm ssh "$NAME" "${LOCATION[@]}" --worker=all --command="$count"
