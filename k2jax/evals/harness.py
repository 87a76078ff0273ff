"""EleutherAI's lm-evaluation-harness (extra `eval`), straight on a checkpoint: an adapter of its `LM` class.

Texts become tokens as the harness's own `hf` model makes them of an export of the checkpoint, so that numbers agree.
"""

import json
from typing import Any, NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from k2jax.data.tokenizer import Tokenizer, load_tokenizer
from k2jax.errors import ConfigError
from k2jax.evals.chat import Rendering
from k2jax.evals.progress import bar
from k2jax.evals.scoring import Row
from k2jax.evals.subject import Subject
from k2jax.model.generation import Sampling
from k2jax.run.saved import SavedStep

DEFAULT_NEW_TOKENS = 256  # as the harness's own models
GENERATED_AT_ONCE = 64  # prompts in one call of the generator, at most
# What a task may ask of generation, besides `until` and the number of tokens.
SAMPLING_KEYS = {"do_sample", "temperature", "top_k", "top_p", "num_beams"}

LogLikelihood = tuple[float, bool]


class CheckpointLM(TemplateLM):
    """A checkpoint as the harness sees it."""

    def __init__(self, subject: Subject, rendering: Rendering | None = None):
        """`rendering` of the chat template that requests are put in, where they are."""
        super().__init__()
        self._subject, self._rendering = subject.whole if rendering else subject, rendering
        self._encoder = load_tokenizer(subject.saved.tokenizer)
        self._prefix = prefix_id(subject.saved, self._encoder)
        self._prefix_text = self.tok_decode([self._prefix])
        self.num_apart = 0  # requests whose continuation was tokenized by itself

    @property
    def eot_token_id(self) -> int:
        return self._subject.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells its cached requests apart."""
        template = self._rendering.template.sha256 if self._rendering else ""
        return f"{self._subject.saved.meta['tokenizer_sha256']}{template}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template that requests are put in."""
        return self._rendering.template.text if self._rendering and chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as the template writes them."""
        assert self._rendering, "the harness asks only where a template is applied"
        return self._rendering(chat_history, add_generation_prompt)

    @property
    def max_length(self) -> int:
        return self._subject.saved.stage.sequence_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As transformers reads the same file: "<fim_prefix>" in a task's text is the token, "</s>" is EOS."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        return self._encoder.encode_with_control(string, framed=add_special_tokens)

    def tok_decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return self._encoder.decode(tokens, skip_control=skip_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness, which cuts the tokens of both texts together where the context's alone would end.

        Where they run over it ("a" and "b" make one token "ab") that leaves nothing of the continuation; the harness's
        own model stops there with an assertion. Its characters are scored all the same: tokenized by themselves, as
        text that continues, after the context's own tokens.
        """
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:
            moved = context[len(context.rstrip()) :] + continuation  # as the harness does with spaces at the border
            continuation_ids = self._encoder.encode_with_control(moved, continues=True)
            self.num_apart += bool(continuation_ids)
        return context_ids, continuation_ids

    def _encode_alone(self, text: str) -> tuple[list[int], list[int]]:
        """A text after nothing: the prefix stands before it, unless it begins with that token itself."""
        ids = self.tok_encode(text, add_special_tokens=False)
        return [self._prefix], ids[1:] if ids[1:] and ids[0] == self._prefix else ids

    # ---- log-likelihoods -------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[LogLikelihood]:
        """Of each request's continuation after its context.

        Raises ConfigError for a continuation of no tokens: it would be certain and greedy whatever the model, and win.
        """
        rows = []
        for request in requests:
            context, continuation = request.args
            encoded = self._encode_pair(context, continuation) if context else self._encode_alone(continuation)
            if not encoded[1]:
                raise ConfigError(
                    f"task {request.task_name}, document {request.doc_id}: the continuation {continuation!r} after "
                    f"...{context[-20:]!r} has no token to score: give it a text, or leave the task out"
                )
            rows.append((request.args, *encoded))
        return self._loglikelihood_tokens(rows)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts: windows of the model's length that meet end to end, every token predicted once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((request.args, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += logprob
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True
    ) -> list[LogLikelihood]:
        """Requests with the same input share its row: the choices of a question, when each is one token."""
        rows: dict[tuple[int, ...], Row] = {}
        places = []  # of each request: its row's input, and where in the row's wanted tokens its own are
        for _, context, continuation in requests:
            tokens, wanted = self._row(context, continuation)
            row = rows.setdefault(tokens, Row(tokens, []))
            places.append((tokens, slice(len(row.wanted), len(row.wanted) + len(wanted))))
            row.wanted.extend(wanted)
        with bar("log-likelihood", len(rows), "row") as done:
            scores = dict(zip(rows, self._subject.scorer(list(rows.values()), done.update), strict=True))
        found = [(scores[tokens].logprobs[part], scores[tokens].is_greedy[part]) for tokens, part in places]
        return [(float(logprobs.sum()), bool(is_greedy.all())) for logprobs, is_greedy in found]

    def _row(self, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Input and wanted tokens; what is too long loses its beginning."""
        if len(continuation) > self.max_length:
            raise ConfigError(
                f"a task's continuation has {len(continuation)} tokens, the model's context is {self.max_length}: "
                f"leave the task out"
            )
        whole = ((context or [self.prefix_token_id]) + continuation)[-(self.max_length + 1) :]
        first = len(whole) - 1 - len(continuation)
        return tuple(whole[:-1]), [(first + i, token) for i, token in enumerate(continuation)]

    # ---- generation ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Requests that sample alike go together, those of about one length in one call."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        texts = [""] * len(requests)
        number = 0  # of a prompt among all: what it draws depends on it
        with bar("generation", len(requests), "prompt") as done:
            for indices in groups.values():
                wish = wish_of(requests[indices[0]].args[1], self.tok_decode([self.eot_token_id]))
                prompts = {i: self._prompt(requests[i].args[0], wish) for i in indices}
                waiting = sorted(indices, key=lambda i: -len(prompts[i]))
                while waiting:
                    longest = len(prompts[waiting[0]]) + wish.new_tokens
                    size = min(GENERATED_AT_ONCE, max(1, self._subject.batch_tokens // longest))
                    some, waiting = waiting[:size], waiting[size:]
                    for i, text in zip(some, self._generate([prompts[i] for i in some], wish, number), strict=True):
                        texts[i] = text
                    number += len(some)
                    done.update(len(some))
        return texts

    def _prompt(self, context: str, wish: "Wish") -> list[int]:
        room = self.max_length - wish.new_tokens
        if room <= 0:
            raise ConfigError(
                f"a task asks for {wish.new_tokens} new tokens, the model's context is {self.max_length}: leave it out"
            )
        return self.tok_encode(context)[-room:] or [self.prefix_token_id]

    def _generate(self, prompts: list[list[int]], wish: "Wish", first_row: int) -> list[str]:
        texts = [""] * len(prompts)
        tokens: list[list[int]] = [[] for _ in prompts]

        def take(row: int, ids: list[int]) -> bool:
            """Whether the row's text has come to an end of the task's; the generator need not go on then."""
            tokens[row] += ids
            texts[row] = self.tok_decode(tokens[row], skip_special_tokens=True)
            return any(end in texts[row] for end in wish.until)

        self._subject.generator.generate(
            prompts,
            wish.new_tokens,
            sampling=wish.sampling,
            seed=self._subject.seed,
            on_tokens=take,
            first_row=first_row,
        )
        return [postprocess_generated_text(text, wish.until, None) for text in texts]


def prefix_id(saved: SavedStep, encoder: Tokenizer) -> int:
    """The token that stands before a text with nothing before it: as the harness has it, BOS if there is one, else EOS.

    An import keeps what the folder names as BOS, which its tokenizer need not put anywhere. Ours have none.
    """
    put = next(iter(encoder.begin_ids), None)  # of an import that did not keep it yet
    found = (saved.imported or {}).get("bos_id", put)
    return saved.meta["eos_id"] if found is None else found


class Wish(NamedTuple):
    """How a task wants its texts."""

    until: list[str]  # ends of a text, with that of EOS
    new_tokens: int
    sampling: Sampling


def wish_of(arguments: dict[str, Any], eos: str) -> Wish:
    """A task's `generation_kwargs` in our terms. Raises ConfigError for what the generator does not do."""
    wanted = dict(normalize_gen_kwargs(arguments, DEFAULT_NEW_TOKENS))
    until, new_tokens = handle_stop_sequences(wanted.pop("until"), eos=eos), wanted.pop("max_gen_toks")
    unknown = sorted(wanted.keys() - SAMPLING_KEYS)
    if unknown or wanted.get("num_beams", 1) != 1:
        raise ConfigError(
            f"a task generates with {', '.join(unknown) or 'num_beams'}, which k2jax does not: leave it out"
        )
    if not wanted["do_sample"]:
        return Wish(until, new_tokens, Sampling())
    chosen = {key: wanted[key] for key in ("temperature", "top_k", "top_p") if key in wanted}
    return Wish(until, new_tokens, Sampling(**{"temperature": 1.0, **chosen}))
