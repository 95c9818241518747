# Sourced by the other scripts: their options, and the sentence that says what is wrong with them.
# shellcheck shell=bash disable=SC2034

((BASH_VERSINFO[0] * 10 + BASH_VERSINFO[1] >= 44)) || {
  echo "$(basename "$0"): bash must be 4.4 or newer, got $BASH_VERSION; install a newer one." >&2
  exit 2
}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=commands.sh disable=SC1091
source "$ROOT/tpu_scripts/commands.sh"
COMMAND=()

fail() { # sentence; for input that is wrong
  echo "$(basename "$0"): $1" >&2
  exit 2
}

# parse_options REQUIRED OPTIONAL FLAGS "$@": three lists of names. Option --some_name VALUE sets
# SOME_NAME, a flag sets it to 1; the flag "--" lets words follow --, which become COMMAND.
parse_options() {
  local required=$1 values=" $1 $2 " flags=" $3 dry_run " option name value
  shift 3
  for name in $values ${flags/ -- / }; do printf -v "${name^^}" %s ""; done
  while (($#)); do
    option=$1 name=${1%%=*} name=${name#--}
    shift
    if [[ $option == --help ]]; then
      sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0" # the comment at the top of the script
      exit 0
    elif [[ $option == -- && $flags == *" -- "* ]]; then
      COMMAND=("$@")
      break
    elif [[ $option == --[a-z]* && $flags == *" ${option#--} "* ]]; then
      printf -v "${name^^}" %s 1
    elif [[ $option == --[a-z]* && $values == *" $name "* ]]; then
      [[ $option == *=* ]] || { option+="=${1-}" && shift "$((!!$#))"; }
      value=${option#*=} option=${name^^}
      [[ $value && $value != --* ]] || fail "--$name needs a value, got '$value'; see --help."
      [[ -z ${!option} ]] || fail "--$name must be given once, got ${!option} and $value."
      printf -v "$option" %s "$value"
    else
      fail "unknown option $option; see --help."
    fi
  done
  for name in $required; do
    option=${name^^}
    [[ ${!option} ]] || fail "--$name is required, got none; see --help."
  done
  name='[a-z][-a-z0-9]*'
  option="a-z, 0-9 and hyphens, beginning with a letter"
  [[ -z ${NAME-} ]] || require_match name "$NAME" "$name" "$option"
  [[ -z ${NAMES-} ]] || require_match names "$NAMES" "$name(,$name)*" "names with commas: $option"
  LOCATION=(${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"})
}
