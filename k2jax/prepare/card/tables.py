"""The tables of the data card, the same in HTML and in Markdown."""

from dataclasses import dataclass
from typing import Any

from k2jax.prepare.card.scores import histograms
from k2jax.prepare.card.text import num_bytes, number, power_of_two, share

SECTIONS = (  # (key, title, what it is), in their order
    ("flow", "From documents to stores", "Removed and kept, by subset. Bytes are of UTF-8 text, on disk of files."),
    (
        "steps", "Every step",
        "What came in less what was removed is what came out; a later step can have changed it.",
    ),
    ("reasons", "Why documents were removed", "By subset, step and reason."),
    ("duplicates", "Duplicates", "One document of a cluster of copies stays, by the priority of its subset."),
    ("stores", "Stores and their mix", "Tokens in the mix are those for training times the repeats."),
    (
        "conversations", "Conversations",
        "What is in the stores. Only answers are learned. Joined ones begin within a token of the prompt, endless ones "
        "end with no control token; compared are conversations whose generation blocks were held against prefixes. "
        "A preference pair is two conversations, whose answers behind what both ask are learned.",
    ),
    ("lengths", "Lengths", ""),
    ("languages", "Languages", "Where a step identifies them, or the source names them."),
    (
        "scores", "Quality and scores",
        "Of all documents that were scored, also those that were left out for it: where another threshold would cut.",
    ),
    ("licences", "Licences", "As the sources or the recipe name them; nobody has checked them."),
    (
        "contamination", "Contamination",
        "Documents that share n-grams with evaluation sets, as the recipe defines them.",
    ),
    (
        "personal", "Personal data",
        "What placeholders stand for, in copies that were removed later, too. Precision and recall are of the rules on "
        "k2jax's labelled lines (tools/bench/pii_sample.txt), not on these documents: what is right was found from its "
        "first character to its last. What is missed stays in the stores.",
    ),
    (
        "samples", "Samples",
        "Texts are cut. What shows nothing, or turns the direction of text, is written as an escape.",
    ),
    ("encodings", "Encodings", "Files of text and of JSON lines, by their marks, the recipe, or a guess."),
    ("problems", "Problems in the input", "Counts, and the first cases with their file and line."),
    ("recipe", "Recipe", "Every parameter of the data experiment."),
    ("versions", "Versions and digests", "What the bytes of the stores depend on, and what they are."),
)


NOT_STATED = "(not stated)"


@dataclass(frozen=True)
class Table:
    """A table: numbers and text are formatted when shown, `numeric` columns are set right, `code` in one width."""

    head: list[str]
    rows: list[list[Any]]
    numeric: tuple[int, ...] = ()
    code: tuple[int, ...] = ()
    title: str = ""
    folded: str = ""  # what the line says that unfolds it
    heated: bool = False  # numbers are shaded by their size

    def text(self, value: Any) -> str:
        """A cell as it is written."""
        return (
            number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
        )

    def heat(self, value: Any) -> float:
        """From 0 to 0.6, by the largest number of the table."""
        numbers = [value for row in self.rows for value in row if isinstance(value, int)]
        return 0.6 * value / max(numbers) if isinstance(value, int) and any(numbers) else 0.0


def tables_of(key: str, card: dict[str, Any]) -> list[Table]:
    """The tables of a section, none if it has nothing to say."""
    makers = {
        "flow": _flow_table,
        "steps": _steps,
        "reasons": _reasons,
        "duplicates": _duplicates,
        "stores": _stores,
        "conversations": _conversations,
        "lengths": lambda card: [],
        "languages": lambda card: _names(card, "languages"),
        "licences": lambda card: _names(card, "licences"),
        "scores": _scores,
        "encodings": _encodings,
        "contamination": _contamination,
        "personal": _personal,
        "samples": lambda card: [],
        "problems": _problems,
        "recipe": lambda card: [
            Table(["parameter", "value"], flatten(card["config"]), folded="All parameters")
        ],
        "versions": _versions,
    }
    return [table for table in makers[key](card) if table.rows]


def flow(card: dict[str, Any]) -> dict[str, dict[str, int]]:
    """By subset: documents read, removed by cleaning and as copies, and kept."""
    found = {}
    for name, subset in card["subsets"].items():
        steps, removed = subset["steps"], {"cleaning": 0, "exact": 0, "near": 0}
        for step in steps:
            for reason, counts in step["removed"].items():
                is_copy = step["step"] in ("duplicates", "equal") and reason in removed
                removed[reason if is_copy else "cleaning"] += counts["documents"]
        found[name] = {
            "read": steps[0]["in"]["documents"] if steps else 0,
            **removed,
            "kept": steps[-1]["out"]["documents"] if steps else 0,
        }
    return found


def parts_of_flow(row: dict[str, int]) -> dict[str, int]:
    """The parts of a subset's documents by the names that a reader sees."""
    names = {"kept": "kept", "cleaning": "cleaning", "exact": "exact copies", "near": "near copies"}
    return {shown: row[key] for key, shown in names.items()}


def histogram(card: dict[str, Any]) -> tuple[list[str], list[int], list[int]]:
    """Lengths over all subsets: labels of bins, documents after the first stage and after the last."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for subset in card["subsets"].values():
        stages = list(subset["lengths"].values()) or [{}]
        for total, lengths in ((first, stages[0]), (last, stages[-1])):
            for power, count in lengths.items():
                total[int(power)] = total.get(int(power), 0) + count
    both = first | last
    bins = range(min(both, default=0), max(both, default=-1) + 1)
    return [power_of_two(bin) for bin in bins], *([total.get(bin, 0) for bin in bins] for total in (first, last))


def flatten(value: Any, prefix: str = "") -> list[list[str]]:
    """[["dedup.n_grams", "13"], ...]"""
    if isinstance(value, dict) and value:
        return [
            row
            for key, inner in value.items()
            for row in flatten(inner, f"{prefix}.{key}" if prefix else key)
        ]
    return [[prefix, repr(value)]]


def _flow_table(card: dict[str, Any]) -> list[Table]:
    head = [
        "subset",
        "files",
        "on disk",
        "read",
        "text",
        "by cleaning",
        "exact copies",
        "near copies",
        "kept",
        "text kept",
    ]
    rows = []
    for name, counts in flow(card).items():
        subset = card["subsets"][name]
        steps = subset["steps"] or [{"in": {"bytes": 0}, "out": {"bytes": 0}}]
        sizes = [subset["input"]["bytes"], steps[0]["in"]["bytes"], steps[-1]["out"]["bytes"]]
        rows.append([name, subset["input"]["files"], sizes[0], counts["read"], sizes[1],
                     *(counts[key] for key in ("cleaning", "exact", "near", "kept")), sizes[2],
                     subset["stored"]["tokens"]])  # fmt: skip
    rows.append(
        ["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])]
        if rows
        else ["all"] + [0] * 10
    )
    for row in rows:
        row[2], row[4], row[9] = (num_bytes(row[i]) for i in (2, 4, 9))
    return [Table([*head, "tokens"], rows, numeric=tuple(range(1, 11)))]


def _steps(card: dict[str, Any]) -> list[Table]:
    tables = []
    for name, subset in card["subsets"].items():
        rows = []
        for step in subset["steps"]:
            came, left = step["in"], step["out"]
            gone = {key: came[key] - left[key] for key in came}
            documents = [came["documents"], gone["documents"], share(gone["documents"], came["documents"])]
            sizes = [num_bytes(value["bytes"]) for value in (came, gone, left)]
            rows.append([step["step"], *documents, left["documents"], *sizes])
        head = ["step", "documents in", "removed", "of them", "out", "text in", "text removed", "text out"]
        tables.append(Table(head, rows, numeric=tuple(range(1, 8)), title=name))
    return tables


def _reasons(card: dict[str, Any]) -> list[Table]:
    rows = [
        [name, step["step"], reason, counts["documents"], share(counts["documents"], step["in"]["documents"]),
         num_bytes(counts["bytes"])]
        for name, subset in card["subsets"].items()
        for step in subset["steps"]
        for reason, counts in sorted(step["removed"].items(), key=lambda item: (-item[1]["documents"], item[0]))
    ]  # fmt: skip
    return [
        Table(["subset", "step", "reason", "documents", "of the step's", "text"], rows, numeric=(3, 4, 5))
    ]


def _duplicates(card: dict[str, Any]) -> list[Table]:
    found = card["duplicates"]
    pairs = {tuple(name.split(" -> ")): count for name, count in found["pairs"].items()}
    own, other = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
    matrix = [[name, *(pairs.get((name, stays), "") for stays in other)] for name in own]
    largest = [[row["subset"], row["copies"], "; ".join(row["sources"])] for row in found["largest"]]
    rules = [
        [row["subset"], _range(*row["copies"]), row["factor"], row["documents"]] for row in card["upsampling"]
    ]
    places = sorted(found["copies_in"].items(), key=lambda item: (-item[1], item[0]))
    return [
        Table(["removed from, for a copy in", *other], matrix, numeric=tuple(range(1, len(other) + 1)), heated=True,
              title="Documents removed, by the subset of the one that stayed"),
        Table(["subset", "copies", "repeated", "documents kept"], rules, numeric=(1, 2, 3),
              title="Upsampling by copies (what is turned for FIM into a store of its own is not repeated)"),
        Table(["place", "documents"], [list(item) for item in places], numeric=(1,), title="",
              folded="Where the documents of clusters stood"),
        Table(["subset", "documents", "removed copies, such as"], largest, numeric=(1,), title="", code=(2,),
              folded="The largest clusters"),
    ]  # fmt: skip


def _range(least: int, most: int | None) -> str:
    return f"{least:,} or more" if most is None else f"{least:,}" if most == least else f"{least:,}-{most:,}"


def _stores(card: dict[str, Any]) -> list[Table]:
    rows = [
        [name, row["subset"], row["documents"], num_bytes(row["bytes"]), row["tokens"],
         row["tokens"] - row["train_tokens"], row.get("unknown_tokens", 0), float(row["repeats"]), row["mix_tokens"],
         share(row["mix_share"], 1)]
        for name, row in card["stores"].items()
    ]  # fmt: skip
    head = ["store", "subset", "documents", "text", "tokens", "held out", "unknown", "repeats", "tokens in the mix"]
    return [Table([*head, "share"], rows, numeric=tuple(range(2, 10)))]


def _conversations(card: dict[str, Any]) -> list[Table]:
    chat = card["chat"]
    if not chat["conversations"]:
        return []
    rows = [[name, *counts.values()] for name, counts in chat["conversations"].items()]
    head = ["subset", *(key.replace("_", " ") for key in next(iter(chat["conversations"].values())))]
    told = [["SHA-256", chat["template_sha256"]], *(["note", note] for note in chat["notes"])]
    return [
        Table(head, rows, numeric=tuple(range(1, len(head)))),
        Table(["of the chat template", ""], told, code=(1,)),
    ]


def stated(card: dict[str, Any], key: str) -> dict[str, list[dict[str, int]]]:
    """By subset: documents by language or licence after the first stage and after the last, also those without any."""
    found = {}
    for name, subset in card["subsets"].items():
        stages = []
        for stage, counts in subset[key].items():
            rest = subset["kept"][stage].get("documents", 0) - sum(counts.values())
            stages.append({**counts, NOT_STATED: rest} if rest > 0 else counts)
        found[name] = [stages[0], stages[-1]] if stages else [{}, {}]
    return found


def _names(card: dict[str, Any], key: str) -> list[Table]:
    rows = [
        [name, value, count, last.get(value, 0)]
        for name, (first, last) in stated(card, key).items()
        for value, count in sorted(first.items(), key=lambda item: (-item[1], item[0]))
    ]
    head = ["subset", key.removesuffix("s"), "after cleaning", "kept"]
    return [Table(head, rows, numeric=(2, 3), folded="By subset")]


def _scores(card: dict[str, Any]) -> list[Table]:
    head = ["from", "documents", "that much or more"]
    return [Table(head, rows, numeric=(0, 1, 2), title=title) for title, rows in histograms(card).items()]


def _encodings(card: dict[str, Any]) -> list[Table]:
    rows = [[name, *item] for name, subset in card["subsets"].items() for item in subset["encodings"].items()]
    return [Table(["subset", "encoding", "files"], rows, numeric=(2,))]


def _contamination(card: dict[str, Any]) -> list[Table]:
    found = card["contamination"]
    rows = [
        [name, counts["checked"], counts["contaminated"], share(counts["contaminated"], counts["checked"])]
        for name, counts in found["subsets"].items()
    ]
    hits = [[hit["source"], hit["evaluation"], hit["n_gram"]] for hit in found["hits"]]
    items = sorted(found["items"].items())
    sets = [[name, found["sets"].get(name, 0), n["items"], n["too_short"]] for name, n in items]
    return [
        Table(["subset", "checked", "contaminated", "of them"], rows, numeric=(1, 2, 3)),
        Table(["evaluation set", "documents", "items looked for", "too short to be"], sets, numeric=(1, 2, 3)),
        Table(["document", "evaluation item", "first that is shared"], hits, folded="The first documents"),
    ]


def _personal(card: dict[str, Any]) -> list[Table]:
    found = card["personal"]
    kinds = sorted({kind for subset in found["subsets"].values() for kind in subset["replaced"]})
    rows = [
        [name, *(subset["replaced"].get(kind, "off") for kind in kinds), ", ".join(subset["regions"])]
        for name, subset in found["subsets"].items()
    ]
    measured = [
        [rules, kind, n["labelled"], n["found"], n["right"], share(n["right"], n["found"]),
         share(n["right"], n["labelled"])]
        for rules, counts in found["measured"].get("rules", {}).items()
        for kind, n in counts.items()
    ]  # fmt: skip
    columns = ["labelled", "found", "right", "precision", "recall"]
    numeric = tuple(range(1, len(kinds) + 1))
    return [
        Table(["subset", *kinds, "phones without a code, of"], rows, numeric=numeric, title="Replaced"),
        Table(["rules", "kind", *columns], measured, numeric=tuple(range(2, 7)), title="The rules, measured"),
    ]


def _problems(card: dict[str, Any]) -> list[Table]:
    counts = [
        [name, reason, n] for name, subset in card["subsets"].items() for reason, n in subset["bad"].items()
    ]
    cases = [[name, problem] for name, subset in card["subsets"].items() for problem in subset["problems"]]
    return [
        Table(["subset", "reason", "times"], counts, numeric=(2,)),
        Table(["subset", "where, and what"], cases, code=(1,), folded="The first cases"),
    ]


def _versions(card: dict[str, Any]) -> list[Table]:
    digests = [["tokenizer.json", card["tokenizer"]["sha256"]]]
    digests += [[name, row["root_digest"]] for name, row in card["stores"].items()]
    return [
        Table(["store", "root digest (SHA-256)"], digests, code=(1,)),
        Table(["library", "version"], [["k2jax", card["version"]], *map(list, card["versions"].items())]),
    ]
