"""Evaluates checkpoints of a run: held-out loss, memorization, and tasks of the lm-evaluation-harness.

    python -m k2jax.evaluate --workdir=runs/k2 --steps=every:3 --tasks=validation,k2
    python -m k2jax.evaluate --workdir=runs/k2 --watch

Reads the run directory and the stores that its manifest names, and writes evals/ in it: a result that is there is never
changed, nor made again unless --again says so. A model that needs several hosts is evaluated by several processes,
which come together as those of a training do.
"""

import argparse
import os
import signal
import sys

from k2jax import paths
from k2jax.errors import ConfigError, run_main
from k2jax.run import branches

EPILOG = """\
tasks:
  validation     loss, perplexity and bits per byte by subset, on some of the windows that training never reads
  memorization   share of tokens recited of what the run read, by chunk (LLM360: 32 tokens after 32)
  k2             the 22 metrics of K2-65B's evaluation, beside its published values
  anything else  a task, group or tag of lm-evaluation-harness (pip install 'k2jax[eval]'), or of --task-dir

A task, group or tag of the harness may name data on the Hugging Face hub, which is downloaded, and its file may name
Python functions, which are run: that goes for --task-dir, too.
Exit codes: 0 done, 74 a checkpoint or the storage is damaged, 78 asked for what is not there, 130 Ctrl-C, 70 a bug;
of several processes 75 stopped by a signal, 70 another process failed.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m k2jax.evaluate",
        description="Evaluates checkpoints of a run; results go to evals/ in it and are never overwritten.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    branches.add_options(p)
    add("--steps", metavar="WHICH", help="newest (default), all (default with --watch), every:3 (every third "
        "checkpoint counted from the run's beginning, as K2's), or 10,20")  # fmt: skip
    add("--tasks", default="validation", metavar="A,B", help="see below (default: validation)")
    paths.add(p, "--task-dir", metavar="DIR", help="folder of the harness's task files (YAML) of your own")
    add("--limit", type=_positive, metavar="N", help="only the first N examples of each harness task")
    add("--num-fewshot", type=_count, metavar="N", help="examples before each question, for harness tasks named in "
        "--tasks; k2 has its own")  # fmt: skip
    add("--apply-chat-template", nargs="?", const=True, default=False, metavar="NAME", help="put the requests of "
        "harness tasks in the run's chat template, or the one of this name")  # fmt: skip
    paths.add(p, "--chat-template", metavar="FILE", help="with it: a Jinja template in place of the run's")
    add("--system", metavar="TEXT", help="the system's turn of harness tasks; without a template text before them")
    add("--fewshot-as-multiturn", nargs="?", type=_flag, const=True, metavar="BOOL", help="examples as turns of a "
        "conversation (default with --apply-chat-template; false: in the question's)")  # fmt: skip
    add("--windows", type=_windows, default=512, metavar="N", help="held-out windows of each subset, evenly spaced, or "
        "all (default: 512; the result has the standard error)")  # fmt: skip
    add("--memorization-steps", default="chunks", metavar="A,B", help="steps to take rows from (default: chunks: "
        "four of every chunk up to the checkpoint)")  # fmt: skip
    add("--memorization-rows", type=_positive, default=64, metavar="N", help="rows of each chunk, or of each step "
        "named (default: 64)")  # fmt: skip
    paths.add(p, "--stores", urls=True, metavar="DIR", help="where the run's stores are, by name, if they "
        "have moved")  # fmt: skip
    add("--allow-code-execution", action="store_true", help="run what the model writes for HumanEval and MBPP, on this "
        "machine and with your rights")  # fmt: skip
    add("--batch-tokens", type=_positive, default=16384, metavar="N", help="tokens in one call of the model, over all "
        "devices (default: 16384)")  # fmt: skip
    add("--seed", type=_count, default=1234, metavar="N", help="of few-shot examples and of sampling (default: the "
        "harness's, 1234)")  # fmt: skip
    branches.add_weights(p)
    add("--again", action="store_true", help="also what is stored: the new result is put beside the first")
    add("--watch", action="store_true", help="evaluate each checkpoint as it appears, to the run's last; may run "
        "beside the training")  # fmt: skip
    add("--poll-s", type=float, default=10.0, metavar="S", help="seconds between looks with --watch (default: 10)")
    add("--json", action="store_true", help="print all results of the steps and tasks as JSON at the end")
    return p


def main() -> None:
    p = parser()
    args = p.parse_args()
    args.workdir = branches.chosen(args)
    steps = args.steps or ("all" if args.watch else "newest")
    if args.watch and steps == "newest":
        p.error("--watch waits for steps: --steps is all, every:N or steps with commas between them")
    chosen = None if args.memorization_steps == "chunks" else _steps(p, args.memorization_steps)
    if not args.apply_chat_template and (args.fewshot_as_multiturn or args.chat_template):
        p.error("--fewshot-as-multiturn and --chat-template go with --apply-chat-template")
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # the harness's and its libraries' bars; read when tqdm is imported

    from k2jax.evals.chat import Chat
    from k2jax.evals.session import Session, Wanted  # here, as JAX takes its time, and --help should not
    from k2jax.parallel import cluster, compile_cache

    tasks = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
    if not tasks:
        raise ConfigError(f"--tasks={args.tasks}: names no task: name some, such as validation,k2, or leave it out")
    multiturn = args.apply_chat_template if args.fewshot_as_multiturn is None else args.fewshot_as_multiturn
    wanted = Wanted(
        workdir=args.workdir,
        steps=steps,
        tasks=tasks,
        task_dir=args.task_dir,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        windows=args.windows,
        memorization_steps=chosen,
        memorization_rows=args.memorization_rows,
        allow_code=args.allow_code_execution,
        batch_tokens=args.batch_tokens,
        seed=args.seed,
        stores=args.stores,
        again=args.again,
        chat=Chat(args.apply_chat_template, args.system, bool(multiturn), args.chat_template),
        weights=args.weights,
    )

    join()

    def say(line: str) -> None:
        if cluster.is_main():
            print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    session = Session(wanted, say)
    compile_cache.use(say)
    if args.watch:
        # What is measured is stored: a scheduler that ends the job loses at most the task under way.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        session.watch(args.poll_s)
    else:
        session.run()
    say(f"{session.num_new} new, {len(session.results) - session.num_new} stored before: {args.workdir / 'evals'}")
    if args.json and cluster.is_main():
        print(session.as_json())


def join() -> None:
    """Joins the other processes of this evaluation, where there are any."""
    from k2jax import output, stopping
    from k2jax.parallel import cluster, place

    if place.find_place(cluster.START_S):
        output.libraries_to_stderr()
        cluster.initialize()
        stopping.at_once("what was measured is stored")


def _windows(text: str) -> int | None:
    return None if text == "all" else _positive(text)


def _steps(p: argparse.ArgumentParser, text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        p.error(f"--memorization-steps={text}: expected chunks, or steps with commas between them")
    return tuple(sorted({int(part) for part in text.split(",")}))


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: must be true or false")
    return text.lower() == "true"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be 1 or more")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value}: must be 0 or more")
    return value


if __name__ == "__main__":
    run_main(main)
