"""Trains a model, or resumes the run that the workdir holds.

    python -m k2jax.train --config=experiments/smoke.py --workdir=runs/smoke [--config.KEY=VALUE ...]

The order within a step is fixed: preempted? -> batch -> step -> the previous step's metrics -> a spike? -> checkpoint.
The metrics of a step are read before its state is saved, and never before the next step is under way otherwise.
"""

from k2jax import stopping
from k2jax.parallel.host_memory import keep_freed_memory, take_gpu_memory, use_huge_pages

if __name__ == "__main__":
    use_huge_pages()
    keep_freed_memory()  # before the imports below, some of which start threads
    take_gpu_memory()
    stopping.watch()  # they take seconds, in which a signal may come

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from k2jax import config as configuration
from k2jax import paths, spikes
from k2jax.bucket import BucketPath
from k2jax.data.chunks import checkpoint_steps, chunk_of_step, tokens_before
from k2jax.data.epochs import check_journal, check_resume, order_of
from k2jax.data.manifest import describe
from k2jax.data.order import Order
from k2jax.ending import report
from k2jax.errors import Preempted, run_main
from k2jax.parallel import cluster, compile_cache, sharding
from k2jax.parallel.watchdog import Watchdog
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.directory import RunDirectory
from k2jax.run.fork import parse_fork
from k2jax.run.ledger import Ledger, StepLog, belonging
from k2jax.run.state import TrainState
from k2jax.run.tuning import Tuning
from k2jax.text import shown
from k2jax.training import recovery
from k2jax.training.clock import Clock
from k2jax.training.guard import Guard, check_parameters, recent_rows
from k2jax.training.held_out import HeldOut
from k2jax.training.launch import Launch, process_age_s
from k2jax.training.launch import describe as describe_launch
from k2jax.training.metrics import Recorder
from k2jax.training.optimizer import first_state
from k2jax.training.placement import begin_state, mesh_of, place_state
from k2jax.training.probe import Probe
from k2jax.training.program import feed_steps
from k2jax.training.recompute import Recompute
from k2jax.training.reference import References
from k2jax.training.setup import check_processes_agree, checkpoint_metas, describe_run, open_same_data


def train(
    config: ConfigDict,
    workdir: str | Path | BucketPath,
    forked_from: tuple[Path, int] | None = None,
    launch: Launch | None = None,
) -> None:
    """Trains to the end of the last stage. Raises a RunError for everything that a user can act on."""
    config = configuration.settled(config, sharding.platform())
    while not train_on(config, workdir, forked_from, launch or Launch()):
        launch = Launch(again=True)  # rolled back: it goes on from an earlier checkpoint


def train_on(
    config: ConfigDict, workdir: str | Path | BucketPath, forked_from: tuple[Path, int] | None, launch: Launch
) -> bool:
    """From the newest checkpoint to the end; False where a spike was met and the run rolled back."""
    check_processes_agree(config)
    mesh = mesh_of(config)
    clock = Clock(launch, say)
    with Watchdog(config.watchdog, clock.at) as watchdog, RunDirectory(workdir, say) as run, clock, jax.set_mesh(mesh):
        compile_cache.use(say)
        launch.did("coming together")

        # ---- the run is what it was, or what is allowed to change ---------------------------------------------------
        if forked_from:
            run.fork(*forked_from)
        stores, manifest = open_same_data(config)
        say(describe(manifest))
        run.check(config, manifest, dict(mesh.shape), launched=not launch.again)
        clock.keep(run.path)
        if launch.again:
            run.put()
            spikes.run_again(run, config.stability.rollback.replay, say)
        launch.did("data")

        # ---- the state is restored and verified, or made -----------------------------------------------------------
        watchdog.at("restore")
        shapes = jax.eval_shape(lambda: first_state(config))
        shardings = place_state(config, shapes, mesh)
        between, every = config.checkpoint.keep_between, config.checkpoint.moments_every
        # 0: of imported weights
        checkpoints = Checkpoints(run.place, [0], between, say, moments_every=every, mirror=run.mirror)
        state = checkpoints.restore_newest(shardings, shapes)
        made = None if state else begin_state(config, shardings)
        step = saved = int(state.step) if state else 0
        clock.goes_on_from(step)
        stopping.at_once(f"step {step} is saved" if step else "before the first step")

        # ---- the data is a function of epochs, journal and step ----------------------------------------------------
        epochs, journal = run.begin(config, manifest, checkpoints.last_meta)
        check_journal(epochs, journal)
        order = order_of(epochs, journal)
        if step:
            number = checkpoints.last_meta["epoch"]["number"]
            check_resume(epochs, journal, checkpoints.last_data, number, order, step)
        say(describe_run(config, order, mesh, manifest["vocab_size"]))
        recorder = open_records(config, run.path, order, sorted(stores), checkpoints, step)
        guard = recorder.guard
        recovery.keep_watch(guard, run.path, journal, checkpoints)
        chunk, eos_id = partial(chunk_of_step, order), manifest["eos_id"]
        held_out = HeldOut(config, run.path, chunk, step, mesh, stores, eos_id, say)
        probe = Probe(config, mesh, eos_id)
        save_steps = set(checkpoint_steps(order))
        checkpoints.keep(save_steps)
        launch.did("restore" if checkpoints.last_meta else "new state")

        # ---- training ----------------------------------------------------------------------------------------------
        metas = checkpoint_metas(config, manifest, mesh, epochs, stores, checkpoints.last_meta)
        save = partial(save_checkpoint, checkpoints, recorder, order, len(journal), metas)
        tuning = Tuning.of_run(config, run.path)
        work = feed_steps(
            config, order, stores, manifest, mesh, shapes, shardings,
            first_step=step + 1, say=say, launch=launch, tuning=tuning,
        )  # fmt: skip
        recompute = Recompute(config, mesh, shapes, shardings, manifest, clock, say)
        of_trainer = metas, checkpoints.last_meta, partial(watchdog.at, "step")
        references = References(config, run.path, mesh, manifest, stores, *of_trainer, say=say)
        watchdog.at("data")
        with checkpoints, closing(work), progress_bar(order.num_steps, step) as bar:
            for step, plan, run_step, batch, data_wait_s in work:
                watchdog.at("step")
                if cluster.preempted():
                    watchdog.at("save")
                    stop(checkpoints, recorder, save if saved < step - 1 else None, state, step - 1)
                state = state or made()  # made while the step was compiled
                batch = references.added(batch, step, plan, state.params)
                again = recompute.check(step, plan, state, batch)
                state, metrics = run_step(state, batch._replace(limits=guard.limits(step)))
                metrics = probe.added(metrics, step, plan, state.params, batch)
                # Reads the metrics of the step before this one, so that the device is not waited for.
                recorder.push(step, plan, metrics | again, data_wait_s)
                clock.stepped(step, recorder.last_row)
                note_first_step(launch, recorder, run)
                due = step in save_steps or is_multiple(step, config.checkpoint.every_steps)
                if due:
                    watchdog.at("save")
                    recorder.flush()
                if guard.spike:
                    watchdog.at("save")
                    recorder.end(checkpoints.wait())
                    checkpoints.close()
                    spikes.examine(run, guard.spike, say)
                    recovery.roll_back(guard.spike, config, run.path, epochs, journal, checkpoints, say)
                    return False
                recovery.keep_watch(guard, run.path, journal, checkpoints)
                if due:
                    save(state, step)
                    saved = step
                    watchdog.at("evaluate")
                    held_out.record(step, plan, state.params)
                recorder.saved(checkpoints.poll())
                bar.update()
                watchdog.at("data")
        watchdog.at("save")
        recorder.end(checkpoints.wait())
        recovery.keep_watch(guard, run.path, journal, checkpoints)  # of the last rows
        note_first_step(launch, recorder, run)  # of a run that had one step left
        checkpoints.close()
        stopping.at_once(f"step {order.num_steps} is saved, what ends a run is not made")
        watchdog.at("evaluate")
        report(config, order.stage_of_step(step).index, state, mesh, stores, manifest, run, say)
        run.end()
        return True


def open_records(
    config: ConfigDict, workdir: Path, order: Order, subsets: list[str], checkpoints: Checkpoints, step: int
) -> Recorder:
    """Metrics and ledger, cut back to the restored step: what came after it is run again."""
    chunk = partial(chunk_of_step, order)
    metrics, ledger = StepLog(workdir / "metrics", chunk), Ledger(workdir / "ledger", chunk)
    if cluster.is_main():
        metrics.truncate(step)
        dropped = ledger.resume(step, checkpoints.last_meta and belonging(checkpoints.last_meta))
        imported = " from imported weights" if checkpoints.last_meta and not step else ""
        say(f"resuming after step {step} of {order.num_steps}" if step else f"starting at step 1{imported}")
        if dropped:
            say(f"{dropped} step(s) after the checkpoint are run again")
    seen = tokens_before(order, step + 1)
    guard = Guard(config, order, recent_rows(ledger.steps, order, step))
    return Recorder(config, workdir, order, subsets, metrics, ledger, guard, say, seen, first_step=step + 1)


def note_first_step(launch: Launch, recorder: Recorder, run: RunDirectory) -> None:
    """Once the first step of this launch is done: what a restart of this run takes."""
    if launch.done or recorder.first_done is None:
        return
    record = launch.finish(recorder.first_step, recorder.first_done)
    say(describe_launch(record))
    if cluster.is_main():
        run.note_launch({"first_step": record})


def save_checkpoint(
    checkpoints: Checkpoints,
    recorder: Recorder,
    order: Order,
    decisions: int,
    metas: list[dict[str, Any]],
    state: TrainState,
    step: int,
) -> None:
    """Starts an asynchronous save, once the metrics of `step` are read and found good; `metas` are by stage."""
    stage = order.stage_of_step(step).index
    recorder.flush()
    check_parameters(recorder.last_row)
    recorder.sync()
    recorder.saved(checkpoints.wait())
    say(f"saving {step}")
    checkpoints.save(
        state,
        step,
        data={"next_step": step + 1, "order": order.digest(), "journal": decisions},
        meta={**metas[stage], "tokens_seen": recorder.tokens_seen, "stage": stage},
    )


def stop(
    checkpoints: Checkpoints,
    recorder: Recorder,
    save: Callable[[TrainState, int], None] | None,
    state: TrainState,
    step: int,
) -> NoReturn:
    """After a signal to any process: makes `step` a checkpoint if it is none, and ends the run."""
    if save is not None:
        save(state, step)
    recorder.end(checkpoints.wait())
    done = f"; step {step} is saved" if step else " before the first step"
    raise Preempted(f"stopped by {stopping.name()}{done}: run the same command to go on")


def progress_bar(total: int, done: int) -> tqdm:
    """On stderr, only where that is a terminal."""
    shown = cluster.is_main() and sys.stderr.isatty()
    return tqdm(total=total, initial=done, unit="step", disable=not shown)


def is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def say(line: str) -> None:
    if cluster.is_main():
        tqdm.write(shown(line), file=sys.stdout)
        sys.stdout.flush()


def main() -> None:
    launch = Launch(process_age_s())
    parser = argparse.ArgumentParser(
        prog="python -m k2jax.train",
        description="Trains a model, or resumes a run.",
        epilog="Any key of k2jax/config.py can be set: --config.optimizer.clip_norm=0.5. "
        "Exit codes: 0 done, 75 stopped by a signal and saved (restart), 74 storage, 65 numerics, "
        "78 configuration or data, 70 a bug.",
    )
    paths.add(parser, "--config", required=True, metavar="FILE", help="experiment, as experiments/smoke.py")
    paths.add(parser, "--workdir", buckets=True, required=True, metavar="DIR", help="run directory, which may be a "
        "gs:// or s3:// URL; a run in it is resumed")  # fmt: skip
    parser.add_argument("--fork", type=parse_fork, metavar="RUN@STEP", help="begin from a checkpoint of another run")
    args, rest = parser.parse_known_args()
    overrides = [text.removeprefix("--config.") for text in rest if text.startswith("--config.")]
    unknown = [text for text in rest if not text.startswith("--config.")]
    if unknown:
        parser.error(
            f"unknown argument {unknown[0]}; keys of the configuration are set as --config.KEY=VALUE"
        )
    config = configuration.load(args.config, overrides)
    launch.did("start and imports")
    cluster.initialize()
    train(config, args.workdir, args.fork, launch)


if __name__ == "__main__":
    run_main(main)
