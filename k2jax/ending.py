"""What ends a run: held-out loss by subset, sampled text, and where things are."""

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from k2jax import files
from k2jax.data.decoding import text_after
from k2jax.data.tokenizer import load_tokenizer
from k2jax.model.decoder import compute_dtype
from k2jax.model.generation import Generator
from k2jax.model.sampling import Sampling
from k2jax.parallel import cluster
from k2jax.run.directory import RunDirectory
from k2jax.run.state import TrainState
from k2jax.training.placement import mesh_for, move_params
from k2jax.training.validation import validate


def report(
    config: ConfigDict,
    stage_index: int,
    state: TrainState,
    mesh: jax.sharding.Mesh,
    stores: dict[str, Any],
    manifest: dict[str, Any],
    run: RunDirectory,
    say: Callable[[str], None],
) -> None:
    """The end of a run: validation loss by subset, sampled text, and where things are."""
    stage, dtype, eos_id = config.stages[stage_index], compute_dtype(config), manifest["eos_id"]
    windows = config.eval.windows
    found = validate(config, stage, state.params, mesh, stores, dtype, eos_id, max_windows=windows)
    for name, v in found.items():
        say(
            f"validation {name:16} loss {v.loss:.4f}   unigram {v.unigram_loss:.4f}   ({v.tokens:,} held-out tokens)"
        )
    encoder = load_tokenizer(run.path / "tokenizer.json")
    starts = [encoder.encode(prompt) for prompt in config.eval.prompts]
    if starts:
        reader = mesh_for(config, mesh.devices.flat)  # generation has no pipeline
        params = move_params(config, state.params, reader)
        generator = Generator(config.model, stage.rope_base, params, reader, dtype, eos_id=eos_id)
        new = generator.generate(starts, config.eval.new_tokens, sampling=Sampling(0.8), seed=config.seed)
        for prompt, start, tokens in zip(config.eval.prompts, starts, new, strict=True):
            say(f"sample: {prompt}|{text_after(encoder.decode, start, tokens)}")
    if cluster.is_main():
        values = {"step": int(state.step), "subsets": {name: v._asdict() for name, v in found.items()}}
        files.write_json(run.path / "validation.json", values, sort_keys=True, end="")
    say(f"the run: {run.place}")
    say(
        f"next: python tools/which_docs.py --workdir={run.place} --step={int(state.step)} shows what a step read;"
    )
    say(f"      python tools/report.py --workdir={run.place} makes a page of it; metrics/*.jsonl hold a row a step")
