"""K2's suite: the 22 metrics that LLM360 published for K2-65B, as tasks of the lm-evaluation-harness.

LLM360 did not publish K2's few-shot settings or which of a task's metrics it took. For Amber and Crystal, evaluated by
the same group with the same harness, the settings are public (Analysis360, analysis/metrics/README.md): where there is
one we take it. The rest, such as how answers that are code are drawn, and every choice between acc and acc_norm, is
ours, and marked. So numbers here are beside
K2's, not the same measurement.
"""

from typing import Any, NamedTuple

AMBER = "published for Amber and Crystal"
K2 = "published for K2"
OURS = "our choice"


class Metric(NamedTuple):
    """One of the 22, with what K2-65B had at the end and after stage 1 (percent)."""

    name: str  # as on K2's page
    task: str  # the harness's
    key: str  # in its results: metric,filter
    num_fewshot: int | None  # None: as the harness's task has it
    fewshot_source: str
    k2: float
    k2_stage1: float
    pass_at: dict[str, Any] | None = None  # of sampled solutions
    sampling: dict[str, tuple[Any, str]] = {}  # of answers that are code: what is set, and where that is from

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """What a result says of its settings: {name: its value (None: the task's own), and where that is from}."""
        settings = {"num_fewshot": (self.num_fewshot, self.fewshot_source), **self.sampling}
        return {name: {"value": value, "source": source} for name, (value, source) in settings.items()}


ACC, ACC_NORM = "acc,none", "acc_norm,none"
# LLM360 did not publish how K2's solutions were drawn. Temperatures of 10 are those of Amber and Crystal.
GREEDY = {"samples": (1, OURS), "temperature": (0.0, OURS)}
HUMANEVAL_10 = {"k": 10, "samples": 20, "temperature": 0.2, "top_p": 0.95}
MBPP_10 = {"k": 10, "samples": 20, "temperature": 0.1, "top_p": 0.95}
DRAWN = {"samples": OURS, "temperature": AMBER, "top_p": OURS}
HUMANEVAL_TOKENS = {"max_new_tokens": (1024, f"{OURS}: the harness's task")}
MBPP_TOKENS = {"max_new_tokens": (256, f"{OURS}: the harness's default")}
HUMANEVAL_1, MBPP_1 = GREEDY | HUMANEVAL_TOKENS, GREEDY | MBPP_TOKENS
HUMANEVAL_DRAWN = {name: (HUMANEVAL_10[name], source) for name, source in DRAWN.items()} | HUMANEVAL_TOKENS
MBPP_DRAWN = {name: (MBPP_10[name], source) for name, source in DRAWN.items()} | MBPP_TOKENS

WINOGRANDE = "our choice of the two published for Amber and Crystal, 0 and 5"
# fmt: off
SUITE = (
    Metric("MMLU", "mmlu", ACC, 5, AMBER, 62.6, 64.8),
    Metric("HellaSwag", "hellaswag", ACC_NORM, 10, AMBER, 83.2, 85.5),
    Metric("ARC-C", "arc_challenge", ACC_NORM, 25, AMBER, 61.9, 64.8),
    Metric("ARC-E", "arc_easy", ACC_NORM, 25, OURS, 85.1, 86.4),
    # K2's page has both 77 and 78.6 for stage 1.
    Metric("Winogrande", "winogrande", ACC, 0, WINOGRANDE, 79.5, 77.0),
    Metric("TruthfulQA", "truthfulqa_mc2", ACC, 0, AMBER, 40.4, 40.8),
    Metric("PIQA", "piqa", ACC_NORM, 0, AMBER, 82.8, 84.6),
    Metric("RACE", "race", ACC, 0, AMBER, 41.1, 40.6),
    Metric("OpenBookQA", "openbookqa", ACC_NORM, 0, AMBER, 45.4, 49.2),
    Metric("LogiQA", "logiqa", ACC_NORM, 0, OURS, 38.2, 34.6),
    Metric("CrowS-Pairs", "crows_pairs_english", "pct_stereotype,none", 0, AMBER, 72.9, 74.0),
    Metric("ToxiGen", "toxigen", ACC_NORM, 0, OURS, 43.2, 43.2),
    Metric("GSM8K", "gsm8k", "exact_match,strict-match", 5, AMBER, 58.3, 50.2),
    Metric("MathQA", "mathqa", ACC_NORM, 0, OURS, 44.2, 39.0),
    Metric("MedQA", "medqa_4options", ACC_NORM, 0, OURS, 51.7, 53.7),
    Metric("MedMCQA", "medmcqa", ACC_NORM, 0, OURS, 53.5, 56.0),
    Metric("PubMedQA", "pubmedqa", ACC, 0, OURS, 73.6, 78.6),
    Metric("BBH", "bbh", "exact_match,get-answer", None, OURS, 69.8, 64.6),
    Metric("HumanEval p@1", "humaneval", "pass@1,create_test", 0, K2, 38.5, 32.0, None, HUMANEVAL_1),
    Metric("HumanEval p@10", "humaneval", "pass@10,create_test", 0, K2, 59.8, 48.2, HUMANEVAL_10, HUMANEVAL_DRAWN),
    Metric("MBPP p@1", "mbpp", "pass_at_1,none", None, OURS, 36.5, 25.7, None, MBPP_1),
    Metric("MBPP p@10", "mbpp", "pass@10,all", None, OURS, 56.8, 51.0, MBPP_10, MBPP_DRAWN),
)
# fmt: on


class Line(NamedTuple):
    """One metric of the suite for one checkpoint, percent; `ours` is None where it was not measured."""

    name: str
    ours: float | None
    k2: float
    k2_stage1: float
    num_fewshot: int | None
    fewshot_source: str


def compare(found: dict[str, dict[str, Any]]) -> list[Line]:
    """The table for one checkpoint from its results' metrics, by name; last, the average of those measured."""
    lines = []
    for m in SUITE:
        value = found[m.name].get(m.key) if m.name in found else None
        ours = None if value is None else 100 * value
        lines.append(Line(m.name, ours, m.k2, m.k2_stage1, m.num_fewshot, m.fewshot_source))
    measured = [line for line in lines if line.ours is not None]
    if measured:
        averages = [sum(line[i] for line in measured) / len(measured) for i in (1, 2, 3)]
        lines.append(Line(f"average of {len(measured)}", *averages, None, ""))
    return lines


def as_text(lines: list[Line]) -> list[str]:
    """The table as lines of text."""
    rows = [f"{'':16}{'here':>8}{'K2':>8}{'stage 1':>9}  few-shot examples"]
    for line in lines:
        ours = "-" if line.ours is None else f"{line.ours:.1f}"
        shots = "the task's own" if line.num_fewshot is None else str(line.num_fewshot)
        source = f"  {shots} ({line.fewshot_source})" if line.fewshot_source else ""
        rows.append(f"{line.name:16}{ours:>8}{line.k2:>8.1f}{line.k2_stage1:>9.1f}{source}")
    measured = {line.name for line in lines if line.ours is not None}
    for m in SUITE:
        if m.sampling and m.name in measured:
            said = (f"{name.replace('_', ' ')} {value:g} ({source})" for name, (value, source) in m.sampling.items())
            rows.append(f"{m.name}: {', '.join(said)}")
    return rows
