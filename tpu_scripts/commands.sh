# Sourced by common.sh: checks, facts about slices, and printing or running commands.
# shellcheck shell=bash

require_match() { # option, its value, regular expression, the same in words
  local LC_ALL=C
  [[ $2 =~ ^($3)$ ]] || fail "--$1 must be $4, got $2."
}

require_command() { # what it is
  ((${#COMMAND[@]})) || fail "$1 is required after --, got none; see --help."
}

read_slice() { # checks --slice; from then on `field NAME` prints a fact from its file
  local known=("$ROOT"/configs/slices/*.json)
  known=("${known[@]##*/}")
  known=("${known[@]%.json}")
  [[ " ${known[*]} " == *" $SLICE "* ]] || fail "--slice must be one of ${known[*]}, got $SLICE."
}

field() { # of the outermost object, which is indented by two spaces
  sed -n "s/^  \"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" "$ROOT/configs/slices/$SLICE.json"
}

require_tools() { # what a real run calls
  local tool
  for tool in "$@"; do
    [[ $DRY_RUN ]] || command -v "$tool" >/dev/null ||
      fail "$tool must be on PATH, got none; install it, see docs/cloud_tpu.md."
  done
}

plain_word='^[A-Za-z0-9_./:=@%+,-]+$'

quote() { # words as they can be pasted into a shell
  local word line=""
  for word in "$@"; do
    [[ $word =~ $plain_word ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}

escape() { # the same with backslashes, for what a host is to run: it is quoted once more
  local word line=""
  for word in "$@"; do
    [[ $word =~ $plain_word ]] || printf -v word %q "$word"
    line+=" $word"
  done
  echo "${line# }"
}

run() { # prints the command, and runs it unless this is a dry run
  if [[ $DRY_RUN ]]; then
    quote "$@"
  else
    echo "+ $(quote "$@")" >&2
    "$@"
  fi
}
