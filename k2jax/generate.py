"""Generates text from a checkpoint of a run.

    python -m k2jax.generate --workdir=runs/smoke --prompt="def read_file(path"
    python -m k2jax.generate --workdir=runs/k2 --prompt="def add(a, b):" --suffix="    return c" --temperature=0
    python -m k2jax.generate --workdir=runs/k2 --prompts=prompts.jsonl --json
    python -m k2jax.generate --workdir=runs/k2-chat --chat

One prompt streams to a terminal as it comes; several are batched, whatever their lengths. With --suffix the model fills
in the middle, by K2's FIM tokens.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from k2jax import paths
from k2jax.data.decoding import Streamer, text_after
from k2jax.errors import ConfigError, run_main
from k2jax.run import branches

USUAL = {"temperature": 0.8, "top_k": 0, "top_p": 1.0}
FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")


class Prompt(NamedTuple):
    text: str
    suffix: str | None = None  # what comes after the text to fill in; None: the text is gone on from


def main() -> None:
    """The command."""
    args = parse()
    if args.chat:
        from k2jax.conversation import command

        command.run(args, USUAL, open_generator, make_mesh)
        return
    prompts = read_prompts(args)

    from k2jax.model.sampling import Sampling, check_sampling  # after the arguments: --help needs none of it
    from k2jax.parallel import compile_cache
    from k2jax.run.saved import check_tokenizer, open_step
    from k2jax.training.placement import mesh_for

    saved = open_step(args.workdir, args.step, args.weights)
    encoder = check_tokenizer(saved)
    sampling = Sampling(*sampling_of(args).values())
    check_sampling(sampling)
    begin_ids = saved.begin_ids
    ids = [encode(encoder, prompt, args.fim_order, begin_ids) for prompt in prompts]
    longest = max(map(len, ids)) + args.max_new_tokens
    if longest > saved.stage.sequence_length:
        print(
            f"warning: prompt and new tokens are {longest:,} together, the model was trained on rows of "
            f"{saved.stage.sequence_length:,}: what lies beyond is new to it",
            file=sys.stderr,
        )
    compile_cache.use(lambda line: print(line, file=sys.stderr))
    generator = open_generator(saved, make_mesh(args.mesh) if args.mesh else mesh_for(saved.config))
    streams = len(prompts) == 1 and not args.json and sys.stdout.isatty()
    for first in range(0, len(ids), args.batch_size):
        some = slice(first, first + args.batch_size)
        printer = Streamer(encoder.decode, ids[first], print_piece) if streams else None
        new = generator.generate(
            ids[some],
            args.max_new_tokens,
            sampling=sampling,
            seed=args.seed,
            first_row=first,
            on_tokens=printer and (lambda row, piece, printer=printer: printer.add(piece)),
        )
        if printer:
            printer.finish()
            print()
            continue
        for prompt, start, tokens in zip(prompts[some], ids[some], new, strict=True):
            result = describe(saved, prompt, text_after(encoder.decode, start, tokens), tokens, args)
            print(json.dumps(result) if args.json else as_text(prompt, result["text"]), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m k2jax.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    branches.add_options(parser)
    branches.add_weights(parser)
    add("--step", type=int, help="a checkpoint (default: the newest)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    paths.add(parser, "--prompts", metavar="FILE", help="a prompt a line; in a .jsonl file a line is "
        '{"prompt": ..., "suffix": ...}')  # fmt: skip
    add("--suffix", metavar="TEXT", help="fill in between --prompt and this")
    add("--fim-order", choices=("psm", "spm"), default="psm", help="how the middle is asked for: prefix, suffix, middle"
        " (default), or suffix, prefix and middle in one")  # fmt: skip
    add("--max-new-tokens", type=int, metavar="N", help="of each prompt (default: 128; of an answer of --chat: 1024)")
    add("--temperature", type=float, help="0 is greedy (default: 0.8; with --chat what generation_config.json says)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: 0, all; --chat: as above)")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that have this probability together "
        "(default: 1, all; --chat: as above)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--batch-size", type=int, default=32, metavar="N", help="prompts generated together (default: 32)")
    add("--mesh", metavar="AXES", help="such as fsdp=2,tensor=4 (default: the experiment's where it fits the devices "
        "here, else all on fsdp). fsdp gathers the weights at every token, tensor leaves them in place")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object a prompt")
    add("--chat", action="store_true", help="answer turns, by the run's chat template: at a terminal; with --json "
        'lines of {"messages": [...]} from the standard input, one by one, or from --prompts, several at once')
    add("--system", metavar="TEXT", help="with --chat: the system's turn, before those that have none")
    paths.add(parser, "--chat-template", metavar="FILE", help="with --chat: a Jinja template in place of the run's")
    args = parser.parse_args()
    args.workdir = branches.chosen(args)
    if args.chat:
        check_chat(parser, args)
    elif args.system is not None or args.chat_template:
        parser.error("--system and --chat-template go with --chat")
    elif not args.prompt and not args.prompts:
        parser.error("--prompt or --prompts is needed")
    if args.suffix is not None and len(args.prompt) != 1:
        parser.error("--suffix goes with one --prompt; several come from a .jsonl file")
    if args.max_new_tokens is None:
        args.max_new_tokens = 1024 if args.chat else 128
    if args.max_new_tokens < 1 or args.batch_size < 1:
        parser.error("--max-new-tokens and --batch-size must be 1 or more")
    return args


def check_chat(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command where options do not go together."""
    if args.prompt or args.suffix is not None:
        parser.error("--prompt and --suffix are for text that is gone on from, not for --chat")
    if args.prompts and not args.json:
        parser.error("--chat --prompts=FILE takes and prints JSON: add --json")
    if args.system is not None and not args.system.strip():
        parser.error("--system: empty; leave it out")


def sampling_of(args: argparse.Namespace) -> dict[str, float]:
    """What the options say, and of the others what the command does by itself."""
    given = {name: getattr(args, name) for name in USUAL}
    return {name: USUAL[name] if value is None else value for name, value in given.items()}


def open_generator(saved: Any, mesh: Any, *, stop_ids: Sequence[int] = (), whole: bool = False) -> Any:
    """The model of a saved step, its arrays verified, on a mesh; `stop_ids` end a text beside the run's own.

    A prompt is `whole` where EOS in it ends no document. ConfigError where the mesh does not divide the arrays.
    """
    from k2jax.model.decoder import compute_dtype, parameter_table
    from k2jax.model.generation import Generator
    from k2jax.parallel.sharding import check_divisible
    from k2jax.run.saved import restore_params

    m = saved.config.model.copy_and_resolve_references()
    with m.unlocked():
        m.mask_documents = m.mask_documents and not whole
    for name, p in parameter_table(m).items():
        check_divisible(name, p.shape, p.axes, mesh)
    params, dtype = restore_params(saved, mesh), compute_dtype(saved.config)
    options = {"eos_id": saved.meta["eos_id"], "stop_ids": (*saved.stop_ids, *stop_ids)}
    options["keep_params"] = False  # memory peaks at the parameters and one array
    return Generator(m, saved.stage.rope_base, params, mesh, dtype, **options)


def make_mesh(text: str) -> Any:
    """The mesh of --mesh, over as many devices as it names. ConfigError for one that cannot be."""
    import jax

    from k2jax.parallel import sharding

    sizes = dict.fromkeys(sharding.MESH_AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--mesh={text}: {part!r} is not AXIS=SIZE with an axis of {', '.join(sizes)}")
        sizes[axis] = int(size)
    return sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Those of the command line, then those of the file. ConfigError naming a line that is none."""
    prompts = [Prompt(text, args.suffix) for text in args.prompt]
    if args.prompts is None:
        return prompts
    try:
        with args.prompts.open(encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts={args.prompts}: cannot be read: {error}") from error
    if not lines:
        raise ConfigError(f"--prompts={args.prompts}: holds no prompt: write one a line")
    if args.prompts.suffix != ".jsonl":
        return prompts + [Prompt(line) for line in lines]
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            prompt = Prompt(values["prompt"], values.get("suffix"))
        except (ValueError, KeyError, TypeError, AttributeError):
            prompt = None
        if prompt is None or not isinstance(prompt.text, str) or not isinstance(prompt.suffix, str | None):
            raise ConfigError(f'--prompts={args.prompts}: line {number} is not {{"prompt": TEXT, "suffix": TEXT}}')
        prompts.append(prompt)
    return prompts


def encode(encoder: Any, prompt: Prompt, fim_order: str, begin_ids: Sequence[int] = ()) -> list[int]:
    """The ids that the model sees, `begin_ids` first. ConfigError for a suffix where the tokenizer has no FIM tokens.

    psm: <fim_prefix> prefix <fim_suffix> suffix <fim_middle>; spm, as K2's data preparation wrote it (StarCoder's
    second variant): <fim_prefix> <fim_suffix> suffix <fim_middle> prefix. As there, the suffix continues a document
    that the prompt, or the middle behind it, begins: no tokenizer's leading space is put before it.
    """
    text = encoder.encode(prompt.text)
    if prompt.suffix is None:
        return [*begin_ids, *text]
    marks = [encoder.token_to_id(token) for token in FIM]
    if None in marks:
        raise ConfigError(f"--suffix: the run's tokenizer has no token {FIM[marks.index(None)]}: leave it out")
    suffix = encoder.encode(prompt.suffix, continues=True)
    before, after, middle = ([mark] for mark in marks)
    if fim_order == "psm":
        return [*begin_ids, *before, *text, *after, *suffix, *middle]
    return [*begin_ids, *before, *after, *suffix, *middle, *text]


def print_piece(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def as_text(prompt: Prompt, text: str) -> str:
    return f"{prompt.text}|{text}" + (f"|{prompt.suffix}" if prompt.suffix is not None else "")


def describe(saved: Any, prompt: Prompt, text: str, tokens: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """What --json prints of a prompt."""
    return {
        "prompt": prompt.text,
        "suffix": prompt.suffix,
        "text": text,
        "ids": tokens,
        "num_tokens": len(tokens),
        "finish": "length" if len(tokens) == args.max_new_tokens else "eos",
        "step": saved.step,
        "checkpoint": saved.digest,
        "weights": saved.weights,
        "seed": args.seed,
        "sampling": sampling_of(args),
    }


if __name__ == "__main__":
    run_main(main, prints=True, raw=True)
