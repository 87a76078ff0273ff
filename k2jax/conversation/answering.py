"""Answers of a checkpoint to turns of a conversation: rendered by its chat template, one row kept between turns.

A prompt has the ids that transformers gives the same turns. An answer ends at every token that the run, its imported
files or the template name for that, or at the end of the context.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from k2jax.chat.worker import Renderer, Unrendered
from k2jax.data.decoding import text_after
from k2jax.data.tokenizer import Tokenizer
from k2jax.errors import ConfigError
from k2jax.model.generation import Generator
from k2jax.model.kept_row import KeptRow
from k2jax.model.sampling import Sampling
from k2jax.run.saved import SavedStep

STOP, LENGTH = "stop", "length"  # why an answer ended


class Prompt(NamedTuple):
    """What the model sees, and how many tokens may follow."""

    turns: list[dict[str, Any]]
    tools: list | None
    text: str
    ids: list[int]
    most: int


class Answer(NamedTuple):
    """What the model says to a prompt."""

    content: str
    ids: list[int]  # without the token that ended it
    num_cached: int  # tokens of the prompt that were not computed again
    finish: str
    fills_context: bool


class Settings(NamedTuple):
    """Of every answer."""

    max_new_tokens: int
    sampling: Sampling
    seed: int


class Answerer:
    """A checkpoint's side of conversations."""

    def __init__(
        self, saved: SavedStep, encoder: Tokenizer, renderer: Renderer, generator: Generator, settings: Settings
    ):
        """`renderer` is the template's; `generator` ends at `stop_ids`."""
        self.encoder, self.settings = encoder, settings
        self.context = min(saved.context, saved.config.model.sliding_window or saved.context)
        self._renderer, self._generator, self._row = renderer, generator, KeptRow(generator)

    def prompt(self, turns: list[dict[str, Any]], tools: list | None = None) -> Prompt:
        """Raises ConfigError where the template makes none of the turns, or the context has no room for an answer."""
        text = self._renderer.prompt(turns, tools)
        ids = self.encoder.encode_with_control(text)
        room = self.context - len(ids)
        if room <= 0:
            raise ConfigError(
                f"the conversation has {len(ids):,} tokens, the model's context is {self.context:,}: there is no room "
                f"for an answer: leave out earlier turns, or begin a new conversation"
            )
        return Prompt(turns, tools, text, ids, min(room, self.settings.max_new_tokens))

    def answer(
        self, prompt: Prompt, *, number: int = 0, on_tokens: Callable[[list[int]], bool | None] | None = None
    ) -> Answer:
        """From the kept row. `number` is the conversation's, of which draws depend; `on_tokens` as KeptRow has it."""
        before = self._row.num_computed
        options = {"sampling": self.settings.sampling, "seed": self.settings.seed}
        new = self._row.generate(prompt.ids, prompt.most, number=number, on_tokens=on_tokens, **options)
        return self._answer(prompt, new, len(prompt.ids) - (self._row.num_computed - before))

    def answer_all(self, prompts: list[Prompt], first_number: int) -> list[Answer]:
        """Those to several at once: the same, and none of them is kept."""
        most = max(prompt.most for prompt in prompts)
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest + most > self.context:  # one at its end would take the others beyond it
            return [self.answer(prompt, number=first_number + i) for i, prompt in enumerate(prompts)]
        options = {"sampling": self.settings.sampling, "seed": self.settings.seed, "first_row": first_number}
        new = self._generator.generate([prompt.ids for prompt in prompts], most, **options)
        return [self._answer(prompt, ids, 0) for prompt, ids in zip(prompts, new, strict=True)]

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without control tokens."""
        return self.encoder.decode(ids, skip_control=True)

    def _answer(self, prompt: Prompt, new: list[int], num_cached: int) -> Answer:
        finish = LENGTH if len(new) == prompt.most else STOP
        full = len(prompt.ids) + len(new) >= self.context
        return Answer(self._content(prompt, text_after(self.decode, prompt.ids, new)), new, num_cached, finish, full)

    def _content(self, prompt: Prompt, text: str) -> str:
        """The text as the turn that the template writes so: one may put a space of its own before an answer."""
        for content in (text, text.strip()):
            turns = [*prompt.turns, {"role": "assistant", "content": content}]
            try:
                rendered = self._renderer.prompt(turns, prompt.tools, begun=True)
            except Unrendered:
                continue
            if rendered.startswith(prompt.text + text.rstrip()):
                return content
        return text


def stop_ids(saved: SavedStep, encoder: Tokenizer, ends: list[str]) -> tuple[int, ...]:
    """The tokens that end an answer: those of the run, then those by which the template ends one."""
    more = filter(None, map(encoder.token_to_id, ends))
    return tuple(dict.fromkeys((*saved.stop_ids, *more)))
