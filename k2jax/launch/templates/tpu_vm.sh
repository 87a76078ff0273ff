# From a machine with gcloud, in the repository (COMMIT is what is copied):
#   ZONE=... PROJECT=... bash launch.sh create [--spot|--reserved|...]    a queued resource; waits until it is there
#   ... bash launch.sh install      copies the code at COMMIT to all workers and installs from the lock
#   ... bash launch.sh run          preflight, training; restarts as exit codes say. Interrupted, it leaves the training
#                                   alone, and the same command goes on watching
#   ... bash launch.sh logs | stop | teardown      stop saves; teardown deletes the TPUs
# Every command goes to all workers (--worker=all): one that is left out makes the others wait for ever. Processes find
# each other by Google's metadata server; the coordinator is worker 0 of the first slice, on port 8482.

: "${ZONE:?set it, as us-east5-a}" "${PROJECT:?set it}" "${POLL_S:=30}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
place=(--zone="$ZONE" --project="$PROJECT")
there=.k2jax-launch/$NAME

on_all() { # COMMAND, of one line: gcloud cuts others
  local node
  for node in "${NODES[@]}"; do
    gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1" < /dev/null > "$scratch/$node" 2>&1 &
  done
  wait
  cat "${NODES[@]/#/$scratch/}"
}
scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT

state() { gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)'; }

create() {
  gcloud compute tpus queued-resources create "$NAME" "${place[@]}" "${ACCELERATOR[@]}" "$@" || exit 74
  local now
  until now=$(state) && [ "$now" = ACTIVE ]; do
    say "$NAME: $now"
    case $now in FAILED | SUSPENDED | SUSPENDING) exit 74 ;; esac
    sleep 30
  done
}

copy() { # LOCAL FILE
  local node
  for node in "${NODES[@]}"; do
    gcloud compute tpus tpu-vm scp "$1" "$node:$there/" "${place[@]}" --worker=all || exit 74
  done
}

# COMMAND on all workers. Sets `codes`; those that do not answer count as gone.
each() {
  on_all "$1; echo k2jax-code \$?" | tee "$scratch/said"
  mapfile -t codes < <(sed -n 's/^k2jax-code //p' "$scratch/said")
  while [ "${#codes[@]}" -lt "$HOSTS" ]; do codes+=(255); done
  [[ ! ${codes[*]} =~ [1-9] ]]
}

install() {
  git archive --format=tar.gz --output="$scratch/code.tar.gz" "$COMMIT" || exit 78
  each "mkdir -p $there $CODE" || exit 74
  copy "$here/host.sh"
  copy "$scratch/code.tar.gz"
  each "tar -xzf $there/code.tar.gz -C $CODE && bash $there/host.sh install" || exit 74
}

# The codes of all workers once the training has ended everywhere; those that cannot be reached count as gone.
watch() {
  local lost=0
  while :; do
    mapfile -t codes < <(on_all "bash $there/host.sh status" | sed -n 's/^k2jax-code //p')
    if [ "${#codes[@]}" -ne "$HOSTS" ]; then
      lost=$((lost + 1))
      say "${#codes[@]} of $HOSTS workers answer ($(state))"
      [ "$lost" -lt 5 ] || { codes+=(255); return; }
    else
      lost=0
      [[ " ${codes[*]} " == *" running "* ]] || return 0
    fi
    sleep "$POLL_S"
  done
}

run() {
  local restarts word code going=
  mapfile -t codes < <(on_all "bash $there/host.sh status" | sed -n 's/^k2jax-code //p')
  [[ " ${codes[*]} " != *" running "* ]] || going=1
  for ((restarts = 0; ; restarts++)); do
    if [ -n "$going" ]; then
      going=
      watch
    elif each "bash $there/host.sh preflight"; then
      if each "bash $there/host.sh begin"; then watch; fi
    fi
    read -r word code < <(verdict "${codes[@]}")
    say "exit codes ${codes[*]}: $word"
    case $word in done) exit 0 ;; stop) exit "$code" ;; later) sleep "$DELAY_S" ;; esac
    [ "$restarts" -lt "$MAX_RESTARTS" ] || { say "restarted $restarts times, no more"; exit "$code"; }
    if [ "$(state)" != ACTIVE ]; then
      say "$NAME is no longer there: teardown, create and install it, then run"
      exit 74
    fi
  done
}

case ${1:-} in
  create) shift; create "$@" ;;
  install) install ;;
  run) run ;;
  logs) on_all "tail -n 50 $there/train.log" ;;
  stop) on_all "bash $there/host.sh stop" ;;
  teardown) gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet ;;
  *) say "usage: ZONE=... PROJECT=... bash launch.sh create|install|run|logs|stop|teardown"; exit 64 ;;
esac
