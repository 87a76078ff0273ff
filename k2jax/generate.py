"""Generates text from a checkpoint of a run.

    python -m k2jax.generate --workdir=runs/smoke --prompt="def read_file(path"
    python -m k2jax.generate --workdir=runs/k2 --prompt="def add(a, b):" --suffix="    return c" --temperature=0
    python -m k2jax.generate --workdir=runs/k2 --prompts=prompts.jsonl --json

One prompt streams to a terminal as it comes; several are batched, whatever their lengths. With --suffix the model fills
in the middle, by K2's FIM tokens.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from k2jax import paths
from k2jax.errors import ConfigError, run_main
from k2jax.run import branches

FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")


class Prompt(NamedTuple):
    text: str
    suffix: str | None = None  # what comes after the text to fill in; None: the text is gone on from


def main() -> None:
    """The command."""
    args = parse()
    prompts = read_prompts(args)

    from k2jax.model.sampling import Sampling, check_sampling  # after the arguments: --help needs none of it
    from k2jax.parallel import compile_cache
    from k2jax.run.saved import check_tokenizer, open_step
    from k2jax.training.placement import mesh_for

    saved = open_step(args.workdir, args.step)
    encoder = check_tokenizer(saved)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
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
    add("--step", type=int, help="a checkpoint (default: the newest)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    paths.add(parser, "--prompts", metavar="FILE", help="a prompt a line; in a .jsonl file a line is "
        '{"prompt": ..., "suffix": ...}')  # fmt: skip
    add("--suffix", metavar="TEXT", help="fill in between --prompt and this")
    add("--fim-order", choices=("psm", "spm"), default="psm", help="how the middle is asked for: prefix, suffix, middle"
        " (default), or suffix, prefix and middle in one")  # fmt: skip
    add("--max-new-tokens", type=int, default=128, metavar="N", help="of each prompt (default: 128)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default: 0, all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that have this "
        "probability together (default: 1, all)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--batch-size", type=int, default=32, metavar="N", help="prompts generated together (default: 32)")
    add("--mesh", metavar="AXES", help="such as fsdp=2,tensor=4 (default: the experiment's where it fits the devices "
        "here, else all on fsdp). fsdp gathers the weights at every token, tensor leaves them in place")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object a prompt")
    args = parser.parse_args()
    args.workdir = branches.chosen(args)
    if not args.prompt and not args.prompts:
        parser.error("--prompt or --prompts is needed")
    if args.suffix is not None and len(args.prompt) != 1:
        parser.error("--suffix goes with one --prompt; several come from a .jsonl file")
    if args.max_new_tokens < 1 or args.batch_size < 1:
        parser.error("--max-new-tokens and --batch-size must be 1 or more")
    return args


def open_generator(saved: Any, mesh: Any) -> Any:
    """The model of a saved step, its arrays verified, on a mesh. ConfigError where the mesh does not divide them."""
    from k2jax.model.decoder import compute_dtype, parameter_table
    from k2jax.model.generation import Generator
    from k2jax.parallel.sharding import check_divisible
    from k2jax.run.saved import restore_params

    m = saved.config.model
    for name, p in parameter_table(m).items():
        check_divisible(name, p.shape, p.axes, mesh)
    params, dtype = restore_params(saved, mesh), compute_dtype(saved.config)
    options = {"eos_id": saved.meta["eos_id"], "stop_ids": saved.stop_ids}
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


# ---- ids to text -----------------------------------------------------------------------------------------------------


def text_after(decode: Callable[[list[int]], str], start: list[int], new: list[int]) -> str:
    """What `new` adds to the text of `start`: a token's text may depend on those before it."""
    context = start[-8:]
    return decode(context + new)[len(decode(context)) :]


class Streamer:
    """Turns tokens into text piece by piece; a character whose bytes are not all there is held back."""

    def __init__(self, decode: Callable[[list[int]], str], start: list[int], write: Callable[[str], None]):
        self.decode, self.start, self.write = decode, start, write
        self.new: list[int] = []
        self.told = 0

    def add(self, piece: list[int]) -> None:
        self.new += piece
        text = text_after(self.decode, self.start, self.new)
        self._tell(text.rstrip("\N{REPLACEMENT CHARACTER}"))

    def finish(self) -> None:
        self._tell(text_after(self.decode, self.start, self.new))

    def _tell(self, text: str) -> None:
        self.write(text[self.told :])
        self.told = max(self.told, len(text))


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
        "seed": args.seed,
        "sampling": {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p},
    }


if __name__ == "__main__":
    run_main(main, prints=True, raw=True)
