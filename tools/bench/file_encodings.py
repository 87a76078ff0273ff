#!/usr/bin/env python3
"""How often a guess of an encoding (k2jax/prepare/sources/encodings.py) gives back the text, beside
charset-normalizer's.

    python tools/bench/file_encodings.py [--folder=/usr/share/locale] [--texts=4]

Texts are messages of programs in their translations, one, eight or forty at a time, in the encodings that their
language was written in; what counts is that the letters come back, whatever the name.
"""

import argparse
import gettext
import random
import time
from collections import Counter
from pathlib import Path

from charset_normalizer import from_bytes

from k2jax.prepare.sources.encodings import SAMPLE_BYTES, UNKNOWN, guessed

ENCODINGS = {
    "ar": "cp1256", "bg": "cp1251", "ca": "cp1252", "cs": "cp1250 iso8859_2", "da": "cp1252", "de": "cp1252 iso8859_1",
    "el": "cp1253 iso8859_7", "es": "cp1252", "et": "cp1257 cp1252", "fi": "cp1252", "fr": "cp1252 iso8859_1",
    "he": "cp1255", "hr": "cp1250", "hu": "cp1250 iso8859_2", "it": "cp1252", "ja": "shift_jis euc_jp", "ko": "euc_kr",
    "lt": "cp1257", "lv": "cp1257", "nb": "cp1252", "nl": "cp1252", "pl": "cp1250 iso8859_2", "pt_BR": "cp1252",
    "ro": "iso8859_2", "ru": "cp1251 koi8_r iso8859_5", "sk": "cp1250", "sl": "cp1250", "sr": "cp1251", "sv": "cp1252",
    "th": "cp874", "tr": "cp1254", "uk": "cp1251 koi8_u", "vi": "cp1258", "zh_CN": "gb18030", "zh_TW": "big5",
}  # fmt: skip
PROGRAMS = ("glib20", "libapt-pkg6.0", "gtk30", "gtk30-properties", "make", "libc", "bash", "coreutils", "dpkg")
SHORTEST = 20  # characters of a message


def messages(folder: Path, language: str) -> list[str]:
    """Those of a language that are not ASCII."""
    paths = [folder / language / "LC_MESSAGES" / f"{name}.mo" for name in PROGRAMS]
    found = []
    for path in (path for path in paths if path.exists()):
        with open(path, "rb") as file:
            found += vars(gettext.GNUTranslations(file))["_catalog"].values()
    return [one for one in found if isinstance(one, str) and not one.isascii() and len(one) > SHORTEST]


def theirs(data: bytes) -> str:
    """charset-normalizer's guess."""
    best = from_bytes(data[:SAMPLE_BYTES]).best()
    return best.encoding if best else UNKNOWN


def is_right(text: str, encoding: str, name: str) -> bool:
    """Whether a text in one encoding comes back by the name of another."""
    try:
        return text.encode(encoding).decode(name) == text
    except (LookupError, UnicodeDecodeError):
        return False


def main() -> None:
    """Prints a line for each guesser and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/usr/share/locale"), help="of translations")
    parser.add_argument("--texts", type=int, default=4, help="of each language, encoding and length")
    args = parser.parse_args()
    found = {language: messages(args.folder, language) for language in ENCODINGS}
    for length in (1, 8, 40):
        draw, texts = random.Random(length), []
        for language, encoding in ((a, b) for a, names in ENCODINGS.items() if found[a] for b in names.split()):
            for _ in range(args.texts):
                text = "\n".join(draw.choices(found[language], k=length)) + "\n"
                texts.append((encoding, text.encode(encoding, "ignore").decode(encoding)))
        for who, guess in (("k2jax", guessed), ("charset-normalizer", theirs)):
            before = time.process_time()
            named = [(text, encoding, guess(text.encode(encoding))) for encoding, text in texts]
            seconds = (time.process_time() - before) / len(texts)
            wrong = Counter(encoding for text, encoding, name in named if not is_right(text, encoding, name))
            right = 1 - wrong.total() / len(texts)
            print(f"{length:>3} messages, {who:<19} {right:.1%} of {len(texts)}, {seconds * 1000:.0f} ms each; wrong: "
                  f"{dict(wrong.most_common(4))}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
