"""Values out of records of others: a text, or what is wrong with it."""

from typing import Any, NamedTuple

TOO_LONG = "longer than max_line_bytes"


class Bad(NamedTuple):
    """Input that gives no document: the reason it is counted under, and what was found."""

    reason: str
    what: str = ""


def text_of(value: Any, most: int) -> str | Bad:
    """The text, or why it is none."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return Bad("not UTF-8", f"byte {error.start}")
    if not isinstance(value, str):
        return Bad("text is no string", type(value).__name__)
    if "\0" in value:
        return Bad("NUL in the text", f"character {value.index(chr(0))}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        return Bad("half a surrogate pair", f"character {error.start}")
    return Bad(TOO_LONG, f"{size} bytes") if size > most else value
