"""`--tasks validation`: loss, perplexity and bits per byte by subset, on windows that training never reads."""

import math
from collections import defaultdict
from typing import Any

import jax
import numpy as np

from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import ConfigError
from k2jax.evals.progress import bar
from k2jax.evals.results import Outcome
from k2jax.evals.subject import Subject
from k2jax.run.saved import SavedStep
from k2jax.training.validation import HeldOutBatch, validate


class Validation:
    """Over all held-out windows of every subset of the stage, or `windows` of each, evenly spaced."""

    name, version, unsafe = "validation", 1, False

    def __init__(self, windows: int | None = None):
        self.windows = windows

    def settings(self, saved: SavedStep) -> dict[str, Any]:
        return {"windows": self.windows, "stage": saved.stage.name, "sequence_length": saved.stage.sequence_length}

    def evaluate(self, subject: Subject) -> Outcome:
        saved, run = subject.saved, subject.run
        decode = load_tokenizer(saved.tokenizer).decode_batch
        samples: list[dict[str, Any]] = []
        with bar("validation", None, "window") as done, jax.set_mesh(subject.mesh):

            def record(batch: HeldOutBatch) -> None:
                texts = decode(batch.rows[:, 1:].tolist(), skip_control=True)
                samples.extend(
                    {
                        "subset": batch.subset,
                        "start": int(start),
                        "loss": float(loss / targets),
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
        metrics = {
            "total": summary(samples),
            "subsets": {
                name: {**summary(windows[name]), "unigram_loss": v.unigram_loss} for name, v in found.items()
            },
        }
        total = metrics["total"]
        parts = ", ".join(f"{name} {part['loss']:.4f}" for name, part in metrics["subsets"].items())
        headline = f"loss {total['loss']:.4f} perplexity {total['perplexity']:.2f} ({parts})"
        return Outcome(headline, metrics, samples, {})


def summary(windows: list[dict[str, Any]]) -> dict[str, Any]:
    """Weighted by tokens. The standard error is that of the windows' mean losses."""
    tokens = np.array([w["tokens"] for w in windows], np.float64)
    losses = np.array([w["loss"] for w in windows])
    num_bytes = sum(w["bytes"] for w in windows)
    nats = float(tokens @ losses)
    loss = nats / float(tokens.sum())
    return {
        "loss": loss,
        "loss_stderr": float(losses.std(ddof=1) / len(losses) ** 0.5) if len(losses) > 1 else None,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
        "tokens": int(tokens.sum()),
        "bytes": num_bytes,
        "windows": len(windows),
    }
