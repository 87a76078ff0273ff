"""The peer of gpu_suite.py: PyTorch and transformers train the very model of the section `train`, on as many tokens.

Its decoder blocks compiled, cuDNN's attention, bfloat16 by autocast over float32 weights, fused AdamW, gradients
accumulated over as many microbatches and clipped to the same norm. That it is the same model is a test's
(tests/test_gpu_suite.py: the same weights and tokens, the same loss and gradients).
"""

import importlib.util
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
from gpu_suite_cases import Row, tried
from ml_collections import ConfigDict

from k2jax.hf.families import config_to_hf


def make_model(c: ConfigDict, device: str) -> Any:
    """LlamaForCausalLM of a configuration, in float32; the folder that k2jax exports has the same config.json."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    values = config_to_hf(c.model, c.stages[0], dtype="float32", bos_id=None, eos_id=2)
    assert values["model_type"] == "llama", values["model_type"]
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(LlamaConfig(**values | {"use_cache": False}), attn_implementation="sdpa")


def loss_of(model: Any, tokens_BT: Any) -> Any:
    """Mean cross-entropy of (rows, T + 1) tokens, in float32."""
    from torch.nn.functional import cross_entropy

    logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
    return cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten())


def steps(c: ConfigDict, model: Any, tokens_BT: Any, device: str) -> Iterator[float]:
    """Trains on the same tokens again and again; the loss of each step."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    o, stage, on_gpu = c.optimizer, c.stages[0], device == "cuda"
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": o.weight_decay}]
    groups.append({"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=stage.lr_peak, betas=(o.b1, o.b2), eps=o.eps, fused=True)
    while True:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for rows in tokens_BT.chunk(stage.microbatches):
            bf16 = torch.autocast(device, torch.bfloat16, enabled=on_gpu)
            with bf16, sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if on_gpu else nullcontext():
                loss = loss_of(model, rows) / stage.microbatches
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        yield total.item()  # waits for the device


def peer(smoke: bool) -> Iterator[Row]:
    row: Row = {"peer": "torch"}
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        yield row | {"skipped": f"{' and '.join(missing)} not installed"}
        return
    import torch

    if not smoke and not torch.cuda.is_available():
        yield row | {"skipped": f"torch {torch.__version__} finds no CUDA"}
        return
    yield tried(row, lambda: trained(smoke))


def trained(smoke: bool) -> Row:
    import torch
    import transformers
    from gpu_suite_training import GIB, TIMED, UNTIMED, get_config, speed_row
    from loader import VOCAB_SIZE

    c, device = get_config(smoke), "cpu" if smoke else "cuda"
    stage = c.stages[0]
    started = time.perf_counter()
    model = make_model(c, device)
    if not smoke:
        for block in model.model.layers:
            block.compile()
    draw = np.random.default_rng(0).integers(3, VOCAB_SIZE, (stage.rows_per_step, stage.sequence_length + 1))
    training = steps(c, model, torch.asarray(draw, device=device), device)
    losses, step_s = [next(training)], []
    row: Row = {"torch": torch.__version__, "transformers": transformers.__version__}
    row["first_step_s"] = round(time.perf_counter() - started, 1)
    for _ in range(UNTIMED + TIMED):
        begun = time.perf_counter()
        losses.append(next(training))
        step_s.append(time.perf_counter() - begun)
    assert np.isfinite(losses).all(), losses
    row |= speed_row(c, step_s, "" if smoke else torch.cuda.get_device_name())
    return row | ({} if smoke else {"peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2)})


def compared(peer_row: Row, train_rows: list[Row]) -> Row:
    """With the best of k2jax in the same run, as it trains by default, on one batch as the peer is: the figure is the
    ratio."""
    ours = [row for row in train_rows if row.get("batches") == "one" and row["deterministic"] and "tokens_per_s" in row]
    if not ours or "tokens_per_s" not in peer_row:
        return peer_row
    best = max(ours, key=lambda row: row["tokens_per_s"])
    row = peer_row | {"k2jax_attention": best["attention"], "k2jax_tokens_per_s": best["tokens_per_s"]}
    return row | {"k2jax_over_torch": round(best["tokens_per_s"] / peer_row["tokens_per_s"], 3)}
