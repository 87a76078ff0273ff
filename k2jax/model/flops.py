"""The model's arithmetic: FLOPs per token in both conventions, and the peaks that MFU is a share of.

XLA's cost analysis counts a scanned layer once, so it is never used for this.
"""

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from k2jax.model.decoder import parameter_table

# Dense bf16 FLOP/s of one device, by the start of JAX's `device_kind`; the longest match counts. Vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153e12,  # half a chip: a TensorCore is a device
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


class FlopsPerToken(NamedTuple):
    """Of one training step (forward and backward, nothing recomputed), per token."""

    causal: float  # attention counted for the positions that a causal mask lets through: half
    noncausal: float  # attention counted in full: the older convention, higher numbers


def flops_per_token(m: ConfigDict, sequence_length: int) -> FlopsPerToken:
    """6 FLOPs per matrix parameter and token (the embedding look-up is none), and attention's two products.

    K2-65B at length 2048: 398.2e9 causal, 406.2e9 non-causal. Rows of several documents count as one.
    """
    lookup_only = 0 if m.tie_embeddings else m.vocab_size * m.dim
    in_matrices = sum(math.prod(p.shape) for p in parameter_table(m).values() if p.is_matrix)
    matrices = 6.0 * (in_matrices - lookup_only)
    attention = 12.0 * m.num_layers * m.num_heads * m.head_dim * sequence_length
    return FlopsPerToken(matrices + attention / 2, matrices + attention)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak of one device; None where it is not known (CPU)."""
    found = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(found, key=len)] if found else None
