#!/usr/bin/env bash
# Compiles the programs of a gin file for a slice, with no TPU, and says whether they fit it.
#
# usage: aot_check.sh --slice SLICE --gin_file FILE --out JSON [--programs LIST] [--dry_run]
#          [-- OPTIONS OF uncurl aot]
#   --slice     a file of configs/slices without .json: v5e-16, v5p-32, v6e-16, ...
#   --programs  some of train,calibrate,evaluate,decode; by default those of uncurl aot
#   --dry_run   print the command instead of running it
#   --          passed on, for example --gin.NUM_EXPERTS=32
#
# Needs libtpu as a compiler: pip install 'uncurl_jax[aot]'. Any environment that has it will do:
# UNCURL=/path/to/uncurl names its program, by default the one on PATH. One compilation at a time.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "slice gin_file out" "programs" "--" "$@"
read_slice
uncurl=${UNCURL:-uncurl}
require_tools "$uncurl"

run env JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 "$uncurl" aot --slice "$SLICE" \
  --gin_file "$GIN_FILE" ${PROGRAMS:+--programs "$PROGRAMS"} --out "$OUT" "${COMMAND[@]}"
