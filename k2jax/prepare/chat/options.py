"""What a recipe may say of conversations (`recipe.conversations`)."""

from ml_collections import ConfigDict

CHAT_KINDS = ("jsonl", "parquet", "arrow")  # of sources, that conversations can be in
TEXT_ONLY = (  # what is done to text alone: it would move the answers, or judge a template's words
    "text_key", "text", "extract", "language_model", "languages", "language_thresholds", "url_blocklist", "line_rules",
    "drop_repeated", "drop_shared", "filters", "quality_model", "quality_label", "quality_threshold", "scorer",
    "scorer_threshold", "nfc", "pii", "pii_regions", "fim_rate", "fim_stores",
)  # fmt: skip


def problems(where: str, chosen: ConfigDict, kind: str, tokenizer: str, *, usual: ConfigDict) -> list[str]:
    """What is wrong with a subset of conversations beside what can be with any; `usual` is a subset of plain text."""
    found, c = [], chosen.conversations
    if kind not in CHAT_KINDS:
        found.append(f"{where}.source={chosen.source!r}: conversations are read from {', '.join(CHAT_KINDS)}")
    if not tokenizer:
        found.append(f"{where}: conversations need tokenizer, the one whose control tokens their template writes")
    if wrong := [key for key in TEXT_ONLY if chosen[key] != usual[key]]:
        found.append(f"{where}.{wrong[0]}={chosen[wrong[0]]!r}: is for text, not for conversations; leave it out")
    if c.max_tokens < 0:
        found.append(f"{where}.max_tokens={c.max_tokens}: must not be negative")
    if c.pairs and c.too_long == "cut":
        found.append(f"{where}.too_long='cut': a pair cannot be cut, it would lose answers; use refuse or drop")
    for key, known in (("too_long", "refuse drop cut"), ("bad_rows", "refuse drop"), ("answers", "all last")):
        if c[key] not in known.split():
            found.append(f"{where}.{key}={c[key]!r}: must be one of {known.replace(' ', ', ')}")
    pairs = [list(pair) for pair in c.roles if isinstance(pair, tuple | list)]
    fine = all(len(pair) == 2 and pair[1] in ("system", "user", "assistant", "tool") for pair in pairs)
    if not fine or len(pairs) != len(c.roles):
        found.append(f"{where}.roles={c.roles}: must be pairs (a row's name, system, user, assistant or tool)")
    return found
