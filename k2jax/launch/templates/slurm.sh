# From the folder of this file, which all nodes must see:
#   sbatch [--partition=... --account=...] job.sbatch
#   touch stop; scancel --batch --signal=TERM JOB      saves, and is not queued again
#   scancel JOB                                        ends it; nothing else is left to tear down
# Processes find each other by JAX's own detection of Slurm, which gives each task one GPU, that of its local number:
# so there is a task for every GPU, and each sees all GPUs of its node. The coordinator is on the first node, its port
# follows from the job's number. Preflight and training are steps of the job; a requeued job begins with both again.

cd "$SLURM_SUBMIT_DIR" || exit 78
stopping=
step() {
  srun --kill-on-bad-exit=0 --wait=300 --unbuffered "${SRUN[@]}" bash host.sh "$1" &
  wait_for $!
}
# Slurm tells this script, and not the steps, that the time limit is near (--signal=B:); so does a preempting job.
trap 'stopping=1; interrupted=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

restarts=${SLURM_RESTART_COUNT:-0}
say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart $restarts of at most $MAX_RESTARTS"
step preflight # srun's exit code is the highest of its tasks'
if [ "$code" -eq 0 ]; then
  if [ -n "$stopping" ]; then code=75; else step train; fi
fi
read -r word code < <(verdict "$code")
say "exit code $code: $word"
case $word in
  done) exit 0 ;;
  stop) exit "$code" ;;
  later) [ -n "$stopping" ] || sleep "$DELAY_S" ;;
esac
if [ "$restarts" -ge "$MAX_RESTARTS" ]; then
  say "restarted $restarts times, no more"
  exit "$code"
fi
if [ -e stop ]; then
  say "not queued again: $PWD/stop is there"
  exit "$code"
fi
scontrol requeue "$SLURM_JOB_ID"
