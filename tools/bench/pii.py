"""How well rules find personal data, on tools/bench/pii_sample.txt, and what they cost on this machine's documentation.

    python tools/bench/pii.py [--megabytes=4] [--write]

One JSON line for each set of rules (ours; datatrove's PIIFormatter as shipped): by kind how many are labelled, found,
and right, which is those found from their first character to their last; precision and recall of that; characters a
CPU-second. `--write` puts the counts into k2jax/prepare/card/pii_figures.py, from where data cards have them.
"""

import argparse
import hashlib
import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from datatrove.pipeline.formatters import PIIFormatter  # noqa: E402

from k2jax.files import write_text  # noqa: E402
from k2jax.prepare.rules import pii  # noqa: E402
from k2jax.prepare.sources import python_corpus  # noqa: E402

SAMPLE = Path(__file__).with_name("pii_sample.txt")
FIGURES = REPOSITORY / "k2jax" / "prepare" / "card" / "pii_figures.py"
LABEL = re.compile(r"⟦(\w+)\|([^⟧]*)⟧")
Found = tuple[str, int, int]  # kind, start, end


def sample() -> list[tuple[str, str, set[Found]]]:
    """(region, text without its marks, what is marked in it) of each line."""
    lines = []
    for line in SAMPLE.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        region, _, marked = line.partition(" ")
        text, labelled, done = "", set(), 0
        for label in LABEL.finditer(marked):
            text += marked[done : label.start()]
            labelled.add((label[1], len(text), len(text) + len(label[2])))
            text, done = text + label[2], label.end()
        lines.append((region, text + marked[done:], labelled))
    return lines


def ours(text: str, region: str) -> set[Found]:
    """What our rules find with one region's national numbers: kinds one after the other, as a preparation does."""
    finders = {"email": pii.emails(), "ipv6": pii.ipv6, "ipv4": pii.ipv4, "phone": pii.phones((region,))}
    places = list(range(len(text)))  # in the sample's line, of the characters of `text`
    found = set()
    for kind, find in finders.items():
        placeholder = pii.PLACEHOLDERS[kind]
        for start, end in reversed(list(find(text))):
            found.add((kind, places[start], places[end - 1] + 1))
            text = text[:start] + placeholder + text[end:]
            places[start:end] = [places[start]] + [places[end - 1]] * (len(placeholder) - 1)
    return found


def datatroves(text: str, region: str) -> set[Found]:
    """What datatrove's formatter replaces, as shipped: e-mail addresses, and public IPv4 addresses in what is left."""
    both, found = PIIFormatter(), set()
    for kind, rule in (("email", both.emails_replacer), ("ipv4", both.ip_replacer)):
        for match in rule.regex.finditer(text):
            if not rule.validator or rule.validator(match[0]):
                found.add((kind, *match.span()))
                text = text[: match.start()] + "\0" * len(match[0]) + text[match.end() :]
    return found


def counts(find: Callable[[str, str], set[Found]]) -> dict[str, dict[str, int]]:
    """By kind, phone numbers by whether their country's code is there: those labelled, found, and right."""
    kinds = ["email", "ipv4", "ipv6", "phone, with its country's code", "phone, as in its country"]
    totals = {kind: {"labelled": 0, "found": 0, "right": 0} for kind in kinds}
    for region, text, labelled in sample():
        found = find(text, region)
        for key, these in (("labelled", labelled), ("found", found), ("right", labelled & found)):
            for kind, start, _ in these:
                has_code = text[start] == "+"
                totals[kinds[4 - has_code] if kind == "phone" else kind][key] += 1
    return totals


def wrong(find: Callable[[str, str], set[Found]]) -> Iterator[tuple[str, str, str]]:
    """("missed" or "found", kind, line) of what differs from the labels."""
    for region, text, labelled in sample():
        found = find(text, region)
        yield from (("missed", kind, text) for kind, *_ in sorted(labelled - found))
        yield from (("found", kind, text) for kind, *_ in sorted(found - labelled))


def sample_sha256() -> str:
    return hashlib.sha256(SAMPLE.read_bytes()).hexdigest()


def rates(count: dict[str, int]) -> dict[str, float | None]:
    """Precision and recall; None where nothing was found or labelled."""
    parts = {"precision": count["found"], "recall": count["labelled"]}
    return {name: round(count["right"] / whole, 4) if whole else None for name, whole in parts.items()}


def characters_per_second(replace: Callable[[str], object], num_characters: int) -> float:
    """On documentation of this Python's packages: of the processor, once what is loaded lazily is there."""
    texts, size = [], 0
    for one in python_corpus.candidates("python:documents"):
        text = python_corpus.text_of("python:documents", one.name, Path(one.path).read_text("utf-8", "replace"))
        texts += [text] if text else []
        size += len(text or "")
        if size > num_characters:
            break
    replace("a@b.org 8.8.8.8 (212) 664-7665")
    start = time.process_time()
    for text in texts:
        replace(text)
    return size / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=4, help="of documentation for the speed (default: 4)")
    parser.add_argument("--write", action="store_true", help="the counts, into k2jax/prepare/card/pii_figures.py")
    parser.add_argument("--wrong", action="store_true", help="print what our rules miss, or find where nothing is")
    args = parser.parse_args()
    if args.wrong:
        for line in wrong(ours):
            print(*line, sep="\t")
        return
    replacers = {"k2jax": pii.pii_replacer(tuple(pii.PLACEHOLDERS), ("US",)), "datatrove": PIIFormatter().format}
    found = {"k2jax": counts(ours), "datatrove": counts(datatroves)}
    versions = {"datatrove": importlib.metadata.version("datatrove"), "phonenumberslite": pii.phones_version()}
    about = {"sample_sha256": sample_sha256(), "lines": len(sample()), "versions": versions}
    for name, by_kind in found.items():
        speed = characters_per_second(replacers[name], int(args.megabytes * 1e6))
        kinds = {kind: {**count, **rates(count)} for kind, count in by_kind.items()}
        print(json.dumps({"rules": name, "kinds": kinds, "characters_per_cpu_second": round(speed), **about}))
    if args.write:
        table = json.dumps({**about, "rules": found}, indent=4)
        text = '"""What tools/bench/pii.py --write counted; tests/test_pii.py counts it again."""\n\n'
        write_text(FIGURES, f"{text}FIGURES = {table}\n")


if __name__ == "__main__":
    main()
