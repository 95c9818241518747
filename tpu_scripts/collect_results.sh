#!/usr/bin/env bash
# Copies results to a local directory: metrics, plans, statistics and reports, but no checkpoints.
#
# usage: collect_results.sh --from gs://BUCKET/DIR --out DIR [OPTIONS]
#    or: collect_results.sh --names NAME,... --zone ZONE --slice SLICE --from DIR --out DIR
#          [OPTIONS]
#   --from         a bucket's directory, or one of the hosts: absolute or below ~/uncurl_jax
#   --worker       of each slice this host alone, 0 for what one program wrote; by default all hosts
#   --project      of the slices or the bucket
#   --checkpoints  checkpoints too
#   --update       replace local files that are older; otherwise what is there stays, and is named
#   --dry_run      print the commands instead of running them
#
# Token caches and unfinished files are left out. The parts of a sweep come together in one
# directory, as `uncurl report` wants them. A host that does not answer is named at the end.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "from out" "names zone slice project worker" "checkpoints update" "$@"

if [[ $FROM == gs://* ]]; then
  [[ -z $NAMES$ZONE$SLICE$WORKER ]] ||
    fail "--from gs:// takes no --names, --zone, --slice or --worker, got some; drop them."
  require_tools gcloud
  exclude='(^|.*/)caches/.*,(^|.*/)[^/]*\.partial(/.*)?$'
  [[ $CHECKPOINTS ]] || exclude+=',(^|.*/)checkpoint_[0-9]+/.*'
  keep=$([[ $UPDATE ]] && echo --skip-if-dest-has-newer-mtime || echo --no-clobber)
  run mkdir -p "$OUT"
  run gcloud storage rsync "$FROM" "$OUT" --recursive "$keep" --exclude="$exclude" "${LOCATION[@]}"
  exit
fi
for option in NAMES ZONE SLICE; do
  [[ ${!option} ]] || fail "--${option,,} is required unless --from is gs://, got none; see --help."
done
read_slice
[[ -z $WORKER ]] || require_match worker "$WORKER" '[0-9]+' "the number of a host"
require_tools gcloud tar

exclude="--exclude=caches '--exclude=*.partial'"
[[ $CHECKPOINTS ]] || exclude+=" '--exclude=checkpoint_[0-9]*'"
keep=(--skip-old-files --warning=existing-file)
[[ -z $UPDATE ]] || keep=(--keep-newer-files)
# Status 1 of tar: a file grew while it was read, as those of a running sweep do.
pack="cd uncurl_jax && { tar -czf ~/uncurl_results.tar.gz $exclude -C $(escape "$FROM") . ||
test \$? = 1; }"
tpu=(gcloud compute tpus tpu-vm) failed=""
run mkdir -p "$OUT"
for name in ${NAMES//,/ }; do
  for host in ${WORKER:-$(seq 0 $(($(field num_hosts) - 1)))}; do
    file=$OUT/.$name-$host.tar.gz at=("${LOCATION[@]}" "--worker=$host")
    { run "${tpu[@]}" ssh "$name" "${at[@]}" --command="${pack//$'\n'/ }" &&
      run "${tpu[@]}" scp "$name:uncurl_results.tar.gz" "$file" "${at[@]}" &&
      run tar -xzf "$file" -C "$OUT" "${keep[@]}" && run rm "$file"; } || failed+=" $name:$host"
  done
done
[[ -z $failed ]] || { echo "collect_results.sh: failed for (slice:host)$failed." >&2 && exit 1; }
