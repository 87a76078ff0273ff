"""`--tasks validation`: loss, perplexity and bits per byte by subset, on windows that training never reads."""

import math
from collections import defaultdict
from typing import Any

import jax
import numpy as np

from k2jax.data.conversations import is_target, num_held_out_rows
from k2jax.data.manifest import num_windows
from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import ConfigError
from k2jax.evals.identity import stores_digest
from k2jax.evals.progress import bar
from k2jax.evals.results import Outcome
from k2jax.evals.subject import Subject
from k2jax.run.saved import SavedStep
from k2jax.training.validation import HeldOutBatch, validate

WINDOWS = 512  # of each subset, by default: all that K2 holds out would be 1.4B tokens a checkpoint


class Validation:
    """Over `windows` of the held-out windows of every subset of the stage, evenly spaced, or over all of them.

    Which ones depends on the store's content alone. The total weighs a subset by all that it holds out, whatever was
    read of it: it estimates what all windows would give.
    """

    name, version, unsafe = "validation", 2, False

    def __init__(self, windows: int | None = WINDOWS):
        """`windows` None for all."""
        self.windows = windows

    def settings(self, saved: SavedStep) -> dict[str, Any]:
        return {
            "windows": "all" if self.windows is None else self.windows,
            "stage": saved.stage.name,
            "sequence_length": saved.stage.sequence_length,
            "data_sha256": stores_digest(saved, saved.stage.mix),
        }

    def evaluate(self, subject: Subject) -> Outcome:
        saved, run = subject.saved, subject.run
        decode = load_tokenizer(saved.tokenizer).decode_batch
        samples: list[dict[str, Any]] = []
        with bar("validation", None, "window") as done, jax.set_mesh(subject.mesh):

            def record(batch: HeldOutBatch) -> None:
                ids = batch.rows[:, 1:]
                asked = np.ones(ids.shape, bool)
                if batch.marks is not None:
                    asked = is_target(batch.marks, saved.stage.kind == "dpo")
                texts = decode([row[of].tolist() for row, of in zip(ids, asked, strict=True)], skip_control=True)
                samples.extend(
                    {
                        "subset": batch.subset,
                        "start": int(start),
                        "loss": float(loss / max(targets, 1)),
                        "tokens": int(targets),
                        "bytes": len(text.encode()),
                    }
                    for start, loss, targets, text in zip(
                        batch.starts, batch.losses, batch.targets, texts, strict=True
                    )
                )
                done.update(len(texts))

            found = validate(
                saved.config,
                saved.stage,
                subject.params,
                subject.mesh,
                run.stores,
                subject.compute_dtype,
                subject.eos_id,
                max_windows=self.windows,
                on_batch=record,
            )
        if not found:
            raise ConfigError(
                f"validation: no subset of stage {saved.stage.name} holds out the {saved.stage.sequence_length} tokens "
                f"of a window: prepare the data with a larger validation fraction"
            )
        windows = defaultdict(list)
        for sample in samples:
            windows[sample["subset"]].append(sample)
        length, shift = saved.stage.sequence_length, saved.config.data.label_shift
        tokens = {name: run.stores[name].num_tokens - run.stores[name].num_train_tokens for name in found}
        held_out = {name: num_windows(count, length, shift) for name, count in tokens.items()}
        if saved.stage.kind != "pretrain":
            held_out = {name: num_held_out_rows(run.stores[name], length, saved.stage.too_long) for name in found}
        metrics = {
            "total": summary(windows, held_out),
            "subsets": {
                name: {**summary({name: windows[name]}, held_out), "unigram_loss": v.unigram_loss}
                for name, v in found.items()
            },
        }
        return Outcome(headline(metrics), metrics, samples, {})


def headline(metrics: dict[str, Any]) -> str:
    """The numbers in a line: of how many windows, and what their choice leaves open."""
    total = metrics["total"]
    error = "" if total["loss_stderr"] is None else f" +/- {total['loss_stderr']:.4f}"
    parts = ", ".join(f"{name} {part['loss']:.4f}" for name, part in metrics["subsets"].items())
    of = f"{total['windows']:,} of {total['held_out_windows']:,} held-out windows"
    return f"loss {total['loss']:.4f}{error} perplexity {total['perplexity']:.2f} on {of} ({parts})"


def summary(windows: dict[str, list[dict[str, Any]]], held_out: dict[str, int]) -> dict[str, Any]:
    """Of the windows of some subsets, each weighed by the tokens that it holds out.

    The standard error is that of the windows' mean losses, of each subset apart, as if windows were independent.
    """
    nats = tokens = num_bytes = 0.0
    variances = []  # (that of a subset's mean loss, its weight)
    for name, some in windows.items():
        each = held_out[name] / len(some)  # as many windows does one stand for
        counts = np.array([w["tokens"] for w in some], np.float64)
        losses = np.array([w["loss"] for w in some])
        nats, tokens = nats + each * float(counts @ losses), tokens + each * float(counts.sum())
        num_bytes += each * sum(w["bytes"] for w in some)
        variance = losses.var(ddof=1) / len(some) if len(some) > 1 else None
        variances.append((variance, each * float(counts.sum())))
    known = all(variance is not None for variance, _ in variances)
    read = [w for some in windows.values() for w in some]
    loss = nats / tokens
    return {
        "loss": loss,
        "loss_stderr": float(sum(v * (weight / tokens) ** 2 for v, weight in variances) ** 0.5) if known else None,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
        "tokens": sum(w["tokens"] for w in read),
        "bytes": sum(w["bytes"] for w in read),
        "windows": len(read),
        "held_out_windows": sum(held_out[name] for name in windows),
    }
