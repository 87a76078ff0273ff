"""Hugging Face's models and ours: which tensor is which. config.json: families.py.

A matrix of ours is (in..., out...), one of theirs (out, in), one tensor a layer. Both turn the pairs (i, i + H/2) in
RoPE (the split-half form), so that no head is permuted. Letters as in model/decoder.py.
"""

import math
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from k2jax.model.decoder import Parameter, parameter_table

# Their names, by the name in parameter_table; {} is the layer's number. The norms before LLaMA's MLP and behind
# OLMo-2's attention have one name there.
NAMES = {
    "embed_VD": "model.embed_tokens.weight",
    "layers.attention_norm_LD": "model.layers.{}.input_layernorm.weight",
    "layers.wq_LDNH": "model.layers.{}.self_attn.q_proj.weight",
    "layers.bq_LNH": "model.layers.{}.self_attn.q_proj.bias",
    "layers.q_norm_LNH": "model.layers.{}.self_attn.q_norm.weight",
    "layers.q_norm_LH": "model.layers.{}.self_attn.q_norm.weight",
    "layers.wk_LDKH": "model.layers.{}.self_attn.k_proj.weight",
    "layers.bk_LKH": "model.layers.{}.self_attn.k_proj.bias",
    "layers.k_norm_LKH": "model.layers.{}.self_attn.k_norm.weight",
    "layers.k_norm_LH": "model.layers.{}.self_attn.k_norm.weight",
    "layers.wv_LDKH": "model.layers.{}.self_attn.v_proj.weight",
    "layers.bv_LKH": "model.layers.{}.self_attn.v_proj.bias",
    "layers.wo_LNHD": "model.layers.{}.self_attn.o_proj.weight",
    "layers.attention_out_norm_LD": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp_norm_LD": "model.layers.{}.post_attention_layernorm.weight",
    "layers.w_gate_LDF": "model.layers.{}.mlp.gate_proj.weight",
    "layers.w_up_LDF": "model.layers.{}.mlp.up_proj.weight",
    "layers.w_down_LFD": "model.layers.{}.mlp.down_proj.weight",
    "layers.mlp_out_norm_LD": "model.layers.{}.post_feedforward_layernorm.weight",
    "final_norm_D": "model.norm.weight",
    "head_DV": "lm_head.weight",
}
INPUTS = {"layers.wo_LNHD": 2}  # leading dimensions that a product contracts (after L), where they are not one
AS_THEY_ARE = {"embed_VD"}  # a look-up, and no product


class Tensor(NamedTuple):
    """One tensor of theirs and the array, or the layer of an array, that holds it here."""

    name: str  # theirs
    shape: tuple[int, ...]  # theirs: (out, in) of a matrix
    array: str  # ours, as in parameter_table
    layer: int | None  # the index along L
    our_shape: tuple[int, ...]  # of the layer

    def to_hf(self, ours: np.ndarray) -> np.ndarray:
        """`our_shape` to `shape`; a view, not contiguous in general."""
        if self.array in AS_THEY_ARE or len(self.shape) == 1:
            return ours.reshape(self.shape)
        return ours.reshape(self.shape[::-1]).T

    def from_hf(self, theirs: np.ndarray) -> np.ndarray:
        """`shape` to `our_shape`: the inverse of `to_hf`."""
        if self.array in AS_THEY_ARE or len(self.shape) == 1:
            return theirs.reshape(self.our_shape)
        return theirs.T.reshape(self.our_shape)


def tensors(m: ConfigDict) -> list[Tensor]:
    """Every tensor of a model, in the order of a forward pass."""
    table = parameter_table(m)
    first = [_tensor("embed_VD", table["embed_VD"], None)]
    layers = [
        _tensor(array, p, layer)
        for layer in range(m.num_layers)
        for array, p in table.items()
        if array.startswith("layers.")
    ]
    last = [_tensor(array, table[array], None) for array in ("final_norm_D", "head_DV") if array in table]
    return [*first, *layers, *last]


def _tensor(array: str, p: Parameter, layer: int | None) -> Tensor:
    our_shape = p.shape if layer is None else p.shape[1:]
    if not p.is_matrix:
        return Tensor(NAMES[array].format(layer), (math.prod(our_shape),), array, layer, our_shape)
    inputs = INPUTS.get(array, 1)
    matrix = (math.prod(our_shape[inputs:]), math.prod(our_shape[:inputs]))
    shape = our_shape if array in AS_THEY_ARE else matrix
    return Tensor(NAMES[array].format(layer), shape, array, layer, our_shape)
