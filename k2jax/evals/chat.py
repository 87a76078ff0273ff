"""Chat templates in the harness: what it asks of a model, answered from the run's own template."""

import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from k2jax.chat import fit
from k2jax.chat.template import ChatTemplate
from k2jax.chat.worker import Renderer, Unrendered
from k2jax.data.tokenizer import load_tokenizer
from k2jax.run.chat_template import template_of
from k2jax.run.saved import SavedStep

MOST = 64 << 20  # characters of a prompt


class Chat(NamedTuple):
    """How requests are put: by a template (its name, True for the default one), with a system text, examples as turns.

    The words are the harness's; a system text alone stands before requests that are plain text.
    """

    template: bool | str = False
    system: str | None = None
    multiturn: bool = False
    file: Path | None = None  # of another template than the run's

    def template_of(self, saved: SavedStep) -> ChatTemplate | None:
        """None where none is applied. Raises ConfigError where there is none to apply."""
        if not self.template:
            return None
        name = self.template if isinstance(self.template, str) else ""
        return template_of(saved, file=self.file, name=name, date=datetime.date.today().isoformat())

    def settings(self, template: ChatTemplate | None) -> dict[str, Any]:
        """What of it is part of a result's identity; as of before there was any where none is asked for."""
        found: dict[str, Any] = {"template_sha256": template and template.sha256}
        found |= {} if self.system is None else {"system": self.system}
        how = {"template_tokens": template.tokens, "fewshot_as_multiturn": self.multiturn} if template else {}
        return found | how


PLAIN = Chat()


class Rendering:
    """A template at work; to be used in a `with`."""

    def __init__(self, template: ChatTemplate, saved: SavedStep):
        """Raises ConfigError if it is none."""
        self.template, self.num_without_system = template, 0
        encoder = load_tokenizer(saved.tokenizer)
        self.notes = fit.notes(template, encoder)
        control = sorted(filter(None, map(encoder.id_to_token, encoder.control_ids)))
        self._renderer = Renderer(template, control, most=MOST)

    def __enter__(self) -> Self:
        self._renderer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._renderer.__exit__(*error)

    def __call__(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of turns, to be answered or, without the generation prompt, to be gone on with.

        As in the harness, turns that the template refuses are tried without the system's; that is counted. Raises
        ConfigError where it refuses them all the same.
        """
        turns = [dict(turn) for turn in history]
        try:
            return self._renderer.prompt(turns, begun=not add_generation_prompt)
        except Unrendered as error:
            others = [turn for turn in turns if turn["role"] != "system"]
            if len(others) == len(turns) or error.reason != "the template refuses it":
                raise
        self.num_without_system += 1
        return self._renderer.prompt(others, begun=not add_generation_prompt)
