# What each node does.
[ -z "$CODE" ] || cd "$CODE" || exit 78
if [ "$IS_TPU" = 0 ]; then # TPU VMs find each other by Google's metadata server
  export JAX_COORDINATOR_ADDRESS="${SKYPILOT_NODE_IPS%%$'\n'*}:$PORT"
  export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
fi
# SkyPilot restarts after the codes of recover_on_exit_codes as often as they come: here they are counted, where the
# workdir is a folder.
if [ "$SKYPILOT_NODE_RANK" = 0 ] && [[ $WORKDIR != *://* ]]; then
  counter=$WORKDIR/launches-of-sky
  mkdir -p "$WORKDIR" || exit 74
  launches=$(($(cat "$counter" 2> /dev/null || echo 0) + 1))
  echo "$launches" > "$counter" || exit 74
  [ "$launches" -le $((MAX_RESTARTS + 1)) ] || { say "restarted $MAX_RESTARTS times, no more; remove $counter"; exit 70; }
fi
child= stopping=
trap 'interrupted=1; stopping=1; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null' TERM INT
run() {
  "$@" &
  child=$!
  [ -z "$stopping" ] || kill -TERM "$child"
  wait_for "$child"
}
JAX_COORDINATOR_PORT=$((PORT + 1)) JAX_COORDINATOR_ADDRESS="${JAX_COORDINATOR_ADDRESS:+${JAX_COORDINATOR_ADDRESS%:*}:$((PORT + 1))}" \
  run "$PYTHON" -m k2jax.preflight "${ARGUMENTS[@]}" "${EXPECTED[@]}"
if [ "$code" -eq 0 ]; then
  if [ -n "$stopping" ]; then code=75; else run "$PYTHON" -m k2jax.train "${ARGUMENTS[@]}"; fi
fi
say "node $SKYPILOT_NODE_RANK of $HOSTS: exit code $code"
[ "$code" -ne 74 ] || [ -n "$stopping" ] || sleep "$DELAY_S"
exit "$code"
