# From any machine that reaches all hosts by ssh without a password, and on which this stays until the end (tmux):
#   bash launch.sh HOSTS install       the code is at CODE there; makes .venv and installs from the lock
#   bash launch.sh HOSTS [run]         preflight, then training, restarted as its exit codes say
#   bash launch.sh HOSTS teardown      ends what a lost connection may have left, and removes its files there
# HOSTS is a file with a host a line, in the order of the processes: the first one serves the coordinator on PORT.
# SIGTERM, SIGINT or SIGHUP to this script becomes SIGTERM to all: they save and it ends with 75. So does its end by
# any other way, or that of the connection. Logs: logs/HOST beside this file.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SSH=(ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4 --)
there=.k2jax-launch/$NAME
[ $# -ge 1 ] || { say "usage: bash launch.sh HOSTS [install|run|teardown]"; exit 64; }
mapfile -t hosts < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' "$1")
if [ "${#hosts[@]}" -ne "$HOSTS" ]; then
  say "$1 names ${#hosts[@]} host(s), $TOPOLOGY has $HOSTS: one a line"
  exit 78
fi
for host in "${hosts[@]}"; do
  [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.@:-]*$ ]] || { say "$1: $host is no host's name"; exit 78; }
done
coordinator=${hosts[0]#*@}:$PORT

scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
mkdir -p "$here/logs"
fds=() stopping=
stop_all() {
  local fd
  stopping=1 interrupted=1
  for fd in "${fds[@]}"; do echo stop >&"$fd"; done 2> /dev/null
}
trap stop_all TERM INT HUP
trap '' PIPE

# host.sh WHAT on every host at once, until all have ended. Sets `codes`.
on_all() {
  local i fd pids=() pipes=()
  codes=() fds=()
  for i in "${!hosts[@]}"; do
    pipes+=("$scratch/$i")
    rm -f "${pipes[i]}" && mkfifo "${pipes[i]}"
    (
      trap '' TERM INT HUP # a terminal's go to all of the group: only what is sent through the pipe counts
      "${SSH[@]}" "${hosts[i]}" "env JAX_COORDINATOR_ADDRESS=$coordinator JAX_NUM_PROCESSES=$HOSTS \
JAX_PROCESS_ID=$i bash $there/host.sh under-stdin $1" < "${pipes[i]}" 2>&1 | tee -a "$here/logs/${hosts[i]}"
      exit "${PIPESTATUS[0]}"
    ) &
    pids+=($!)
  done
  for i in "${!hosts[@]}"; do # opened when all have started, so that none holds another's
    exec {fd}> "${pipes[i]}"
    fds+=("$fd")
  done
  [ -z "$stopping" ] || stop_all
  for i in "${!hosts[@]}"; do
    wait_for "${pids[i]}"
    codes+=("$code")
  done
  for fd in "${fds[@]}"; do exec {fd}>&-; done
  fds=()
}

copy() {
  local host
  for host in "${hosts[@]}"; do
    "${SSH[@]}" "$host" "mkdir -p $there && cat > $there/host.sh" < "$here/host.sh" || { say "$host: not reached"; exit 74; }
  done
}

install() {
  copy
  on_all install
  for i in "${!hosts[@]}"; do
    [ "${codes[i]}" -eq 0 ] || { say "${hosts[i]}: install ended with ${codes[i]}"; exit "${codes[i]}"; }
  done
}

run() {
  local restarts word
  copy
  for ((restarts = 0; ; restarts++)); do
    on_all preflight
    if [[ ! ${codes[*]} =~ [1-9] ]]; then
      if [ -n "$stopping" ]; then codes=(75); else on_all train; fi
    fi
    read -r word code < <(verdict "${codes[@]}")
    say "exit codes ${codes[*]}: $word"
    [ "$word" != done ] || exit 0
    [ "$word" != stop ] || exit "$code"
    [ -z "$stopping" ] || exit 75
    [ "$restarts" -lt "$MAX_RESTARTS" ] || { say "restarted $restarts times, no more"; exit "$code"; }
    [ "$word" = again ] || { sleep "$DELAY_S" & wait_for $!; }
    [ -z "$stopping" ] || exit 75
  done
}

case ${2:-run} in
  install) install ;;
  run) run ;;
  teardown)
    for host in "${hosts[@]}"; do
      "${SSH[@]}" "$host" "[ ! -e $there ] || { bash $there/host.sh stop; rm -rf $there; }" < /dev/null
    done
    ;;
  *) say "launch.sh HOSTS $2: unknown"; exit 64 ;;
esac
