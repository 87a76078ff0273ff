"""`python -m k2jax.generate --chat`: opens what it needs, says what it found, and talks."""

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from k2jax.chat import fit
from k2jax.chat.turns import MOST
from k2jax.chat.worker import Renderer
from k2jax.conversation import lines, settings, terminal
from k2jax.conversation.answering import Answerer, Settings, stop_ids
from k2jax.errors import ConfigError
from k2jax.parallel import compile_cache
from k2jax.run.chat_template import template_of
from k2jax.run.saved import check_tokenizer, open_step
from k2jax.training.placement import mesh_for


def run(
    args: argparse.Namespace,
    usual: dict[str, float],
    open_generator: Callable[..., Any],
    make_mesh: Callable[[str], Any],
) -> None:
    """All of it; `usual` is how the command draws where nothing says how.

    Raises ConfigError at the end where lines of JSON could not be answered.
    """
    saved = open_step(args.workdir, args.step, args.weights)
    encoder = check_tokenizer(saved)
    template = template_of(saved, file=args.chat_template, date=datetime.date.today().isoformat())
    warnings = fit.notes(template, encoder)
    options = {key: getattr(args, key) for key in settings.KEYS}
    chosen = settings.chosen(saved, options, usual)
    control = sorted(filter(None, map(encoder.id_to_token, encoder.control_ids)))
    with Renderer(template, control, most=MOST) as renderer:
        ends = stop_ids(saved, encoder, renderer.ends())
        _say(f"{saved.config.name}, step {saved.step}; {template.source}, SHA-256 {template.sha256[:12]}")
        _say(f"an answer ends at {', '.join(encoder.id_to_token(id) or str(id) for id in ends)}; {chosen.told}")
        for warning in (*warnings, *chosen.warnings):
            _say(f"warning: {warning}")
        compile_cache.use(_say)
        mesh = make_mesh(args.mesh) if args.mesh else mesh_for(saved.config)
        generator = open_generator(saved, mesh, stop_ids=ends, whole=True)
        rest = Settings(args.max_new_tokens, chosen.sampling, args.seed)
        answerer = Answerer(saved, encoder, renderer, generator, rest)
        _say(f"the model's context is {answerer.context:,} tokens, an answer has {args.max_new_tokens:,} at most")
        if not args.json:
            terminal.talk(answerer, encoder.special_tokens, args.system, _say)
            return
        about = {"step": saved.step, "checkpoint": saved.digest, "weights": saved.weights}
        about |= {"template_sha256": template.sha256, "seed": args.seed, "sampling": chosen.sampling._asdict()}
        _print_lines(args, answerer, encoder.special_tokens, about)


def _print_lines(args: argparse.Namespace, answerer: Answerer, special: set[str], about: dict[str, Any]) -> None:
    if args.prompts:
        try:
            given: Iterable[bytes] = args.prompts.read_bytes().split(b"\n")
        except OSError as error:
            raise ConfigError(f"--prompts={args.prompts}: cannot be read: {error.strerror}") from error
    else:
        given = sys.stdin.buffer
    count, wrong = 0, []
    at_once = args.batch_size if args.prompts else 1
    for told in lines.answered(given, answerer, special, args.system, at_once=at_once):
        count += 1
        if "error" in told:
            wrong.append(told["line"])
            print(json.dumps(told), flush=True)
        else:
            print(json.dumps(told | about), flush=True)
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if wrong[5:] else "")
        raise ConfigError(
            f"{len(wrong)} of {count} lines were not answered: line {shown}; what is printed for each says why"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
