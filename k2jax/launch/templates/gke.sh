# What each pod does. JobSet gives it a host name, its number in its slice and the number of that.
export JAX_COORDINATOR_ADDRESS="$NAME-hosts-0-0.$NAME:$PORT" JAX_NUM_PROCESSES="$HOSTS"
export JAX_PROCESS_ID=$((JOB_INDEX * HOSTS_PER_SLICE + JOB_COMPLETION_INDEX))
[ -z "$CODE" ] || cd "$CODE" || exit 78

child= stopping=
trap 'interrupted=1; stopping=1; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null' TERM # bash is process 1 here
run() {
  "$@" &
  child=$!
  [ -z "$stopping" ] || kill -TERM "$child"
  wait_for "$child"
}
for ((i = 0; i < 150; i++)); do # the name of the first pod, which may start later
  getent hosts "${JAX_COORDINATOR_ADDRESS%:*}" > /dev/null && break
  sleep 2
done
JAX_COORDINATOR_ADDRESS="${JAX_COORDINATOR_ADDRESS%:*}:$((PORT + 1))" \
  run "$PYTHON" -m k2jax.preflight "${ARGUMENTS[@]}" "${EXPECTED[@]}"
if [ "$code" -eq 0 ]; then
  if [ -n "$stopping" ]; then code=75; else run "$PYTHON" -m k2jax.train "${ARGUMENTS[@]}"; fi
fi
say "process $JAX_PROCESS_ID of $HOSTS: exit code $code"
case $code in 70 | 74) [ -n "$stopping" ] || sleep "$DELAY_S" ;; esac # the first to end restarts all
exit "$code"
