say() { printf 'launch: %s\n' "$*" >&2; }

# What the exit codes of all processes mean to the run (k2jax/errors.py), as WORD CODE: done, again (restart at once),
# later (restart after a delay) or stop, and the code that decided. 70 is a bug, or that another process failed: then
# the code of that one decides. 137 and 255: killed, or its host or connection is gone. What is not known stops.
verdict() {
  local code word=done deciding=0 bug=
  for code in "$@"; do
    case $code in
      0) ;;
      70) bug=1 ;;
      75 | 143) [ "$word" != done ] || { word=again deciding=$code; } ;;
      74 | 137 | 255) [ "$word" = stop ] || { word=later deciding=$code; } ;;
      78) word=stop deciding=78 ;;
      *) [ "$deciding" = 78 ] || { word=stop deciding=$code; } ;;
    esac
  done
  if [ "$word" = done ] && [ -n "$bug" ]; then word=stop deciding=70; fi
  echo "$word $deciding"
}

# `wait` ends early when a trap runs, which sets `interrupted`: then it waits again. Sets `code`.
wait_for() {
  local again
  wait "$1"
  code=$?
  while [ -n "$interrupted" ]; do
    interrupted=
    wait "$1"
    again=$?
    [ "$again" -eq 127 ] || code=$again
  done
}
interrupted=
