"""Ids to text, a piece at a time."""

from collections.abc import Callable


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
