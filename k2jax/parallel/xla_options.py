"""XLA's options by kind of device: what trainer and plan give to its compiler, unless `compiler.defaults` is off.

An experiment's own (`compiler.tpu`, `compiler.gpu`) come after them. tests/test_xla_options.py gives each row to its
compiler, which refuses an option that it does not know.
"""

import os

# Tried in libtpu 0.0.42 by tools/plan.py on K2-65B, v5p:8x8x8, stage one: 15.3 s a step without any of this, 10.5 s
# with them and the weights' gathers written out (fsdp.py).
_TPU = {
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_collective_permute": "true",
    "xla_tpu_enable_async_collective_fusion": "true",  # a gather's steps within a product that does not need it yet
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_decompose_einsum_reduce_scatter": "true",  # weight gradients: parts travel while the next is multiplied
    "xla_tpu_enable_ag_backward_pipelining": "true",  # the next layer's gather beside this one's products
}
# Of VMEM, to a product's tiles. v5p: 64 MiB, products at 99% of the matrix units' rate and not at 90%. v6e: 96 MiB, as
# Levanter's notes have it: K2-65B's gate product at 0.88 of the rate and its weight's gradient at 0.90; 0.80 and 0.83
# with 64.
_VMEM = "xla_tpu_scoped_vmem_limit_kib"

BY_KIND: dict[str, dict[str, str]] = {
    "TPU v5 lite": _TPU | {_VMEM: "65536"},
    "TPU v5": _TPU | {_VMEM: "65536"},
    "TPU v6 lite": _TPU | {_VMEM: "98304"},
    "TPU7x": _TPU | {_VMEM: "65536"},
    # A step as fast as with all of LLVM's passes, compiled in 5.5 to 9.6 s for 11.2 (58M parameters).
    "cpu": {"xla_backend_optimization_level": "1"},
}


def of_kind(kind: str) -> dict[str, str]:
    """Of JAX's `device_kind`; nothing for one that is not in the table: XLA's own defaults."""
    return BY_KIND.get({"TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}.get(kind, kind), {})


def of_this_cpu() -> dict[str, str]:
    """Of a CPU, less what XLA_FLAGS sets: the user's way to the options of whatever XLA compiles there."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: text for name, text in of_kind("cpu").items() if f"--{name}=" not in flags}
