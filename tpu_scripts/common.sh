# Sourced by the other scripts: options they share, and running or printing a command.
# shellcheck shell=bash disable=SC2034

NAME="" ZONE="" PROJECT="" SLICE="" SPOT="" DETACH="" DRY_RUN="" COMMAND=()

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

# The help of a script is the comment at its top.
print_help() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

# parse_options "name zone [slice] [command]" "$@": what is named there is required.
parse_options() {
  local required=$1 option
  shift
  while (($#)); do
    option=$1
    shift
    case "$option" in
      --help) print_help && exit 0 ;;
      --dry_run) DRY_RUN=1 ;;
      --spot) SPOT=1 ;;
      --detach) DETACH=1 ;;
      --name | --zone | --project | --slice)
        (($#)) || fail "$option needs a value; see --help."
        printf -v "$(tr 'a-z-' 'A-Z_' <<<"${option#--}")" %s "$1"
        shift
        ;;
      --) COMMAND=("$@") && break ;;
      *) fail "unknown option $option; see --help." ;;
    esac
  done
  for option in $required; do
    case "$option" in
      command) ((${#COMMAND[@]})) || fail "a command is required after --; see --help." ;;
      name) [[ $NAME ]] || fail "--name is required; see --help." ;;
      zone) [[ $ZONE ]] || fail "--zone is required; see --help." ;;
      slice) [[ $SLICE ]] || fail "--slice is required; see --help." ;;
    esac
  done
  LOCATION=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
}

# Runs a command, or prints it so that it can be pasted into a shell.
run() {
  if [[ ! $DRY_RUN ]]; then
    "$@"
    return
  fi
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}
