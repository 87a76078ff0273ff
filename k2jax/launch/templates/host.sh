# What one host does: bash host.sh install | preflight | train, and for who is not there to send a signal:
#   bash host.sh under-stdin WHAT      as WHAT, stopped by SIGTERM when a line, or the end of stdin, comes
#   bash host.sh begin | status | stop of a training that outlives the connection; its log is train.log beside this file

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -z "$CODE" ] || { cd && cd "$CODE"; } || exit 78 # from the home folder

case $1 in
  install)
    set -e
    echo "$LOCK_DIGEST  requirements.lock" | sha256sum --check --quiet
    python3 -m venv .venv
    .venv/bin/python -m pip install -qq --constraint requirements.lock setuptools
    .venv/bin/python -m pip install -qq --no-build-isolation --constraint requirements.lock --editable ".$EXTRA"
    ;;
  preflight) exec "$PYTHON" -m k2jax.preflight "${ARGUMENTS[@]}" "${EXPECTED[@]}" ;;
  train) exec "$PYTHON" -m k2jax.train "${ARGUMENTS[@]}" ;;
  under-stdin)
    bash "$here/host.sh" "$2" < /dev/null 3<&- &
    child=$!
    echo "$$" > "$here/pid-${JAX_PROCESS_ID:-0}"
    trap 'interrupted=1; kill -TERM "$child" 2> /dev/null' TERM INT HUP
    exec 3<&0
    {
      while read -r _; do kill -TERM "$child"; done
      kill -TERM "$child"
    } <&3 2> /dev/null > /dev/null &
    listener=$!
    wait_for "$child"
    kill "$listener" 2> /dev/null
    exit "$code"
    ;;
  begin)
    rm -f "$here/code" "$here/pid-0"
    setsid nohup bash "$here/host.sh" to-the-end < /dev/null >> "$here/train.log" 2>&1 &
    for ((i = 0; i < 300; i++)); do
      [ ! -s "$here/pid-0" ] || exit 0
      sleep 0.1
    done
    exit 70
    ;;
  to-the-end)
    bash "$here/host.sh" train &
    child=$!
    echo "$child" > "$here/pid-0"
    trap 'interrupted=1; kill -TERM "$child" 2> /dev/null' TERM INT HUP
    wait_for "$child"
    echo "$code" > "$here/code.new" && mv "$here/code.new" "$here/code"
    ;;
  status)
    if [ -s "$here/code" ]; then echo "k2jax-code $(cat "$here/code")"
    elif kill -0 "$(cat "$here/pid-0" 2> /dev/null)" 2> /dev/null; then echo "k2jax-code running"
    else echo "k2jax-code 137"; fi # killed before it could say
    ;;
  stop) cat "$here"/pid-* 2> /dev/null | xargs --no-run-if-empty kill -TERM 2> /dev/null || true ;;
  *) say "host.sh $1: unknown"; exit 64 ;;
esac
