"""Cycles of this project's TPU attention kernels: compiled in a process of their own, read bundle by bundle.

    python -m k2jax.plan.kernels GENERATION LENGTH HEAD_DIM BLOCKS DUMP [turned]

is that process: the compiler reads the flag that makes it write its bundles once, when it starts.
"""

import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from k2jax.plan import topologies
from k2jax.plan.bundles import Program, cycles, read_program

Blocks = tuple[int, int, int, int]  # forward and its strip, backward and its strip


def flash_costs(
    generation: str, length: int, head_dim: int, blocks: Blocks, turned: bool = False
) -> dict[str, tuple[float, Program]]:
    """{"forward": (cycles of one head and row on one TensorCore, its program), "backward": ..., "forward_full": ...}.

    Causal bfloat16 attention of `length` positions; "_full" is that of all pairs of positions, as between parts of a
    row. `turned`: by the kernels that turn q and k, "forward_turned" and "backward_turned". ValueError, with the
    compiler's last line, where it does not compile so.
    """
    found = _costs_or_error(generation, length, head_dim, blocks, turned)
    if isinstance(found, ValueError):
        raise found
    return found


@lru_cache
def _costs_or_error(
    generation: str, length: int, head_dim: int, blocks: Blocks, turned: bool
) -> dict[str, tuple[float, Program]] | ValueError:
    """Errors are remembered, too: each costs a process."""
    try:
        return _costs(generation, length, head_dim, blocks, turned)
    except ValueError as error:
        return error


def _costs(
    generation: str, length: int, head_dim: int, blocks: Blocks, turned: bool
) -> dict[str, tuple[float, Program]]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = [generation, str(length), str(head_dim), ",".join(map(str, blocks)), folder]
        command = [sys.executable, "-m", "k2jax.plan.kernels", *arguments, *(["turned"] if turned else [])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1][:200])
        rows_per_cycle = topologies.GENERATIONS[generation].matrix_rows
        found = {}
        for direction, block in (("forward", blocks[0]), ("backward", blocks[2])):
            program = read_program(Path(folder), f"flash_attention_{direction}")
            for suffix, runs in _runs(direction, length, block, turned).items():
                found[direction + suffix] = (cycles(program, runs, rows_per_cycle), program)
    return found


def _runs(direction: str, length: int, block: int, turned: bool) -> dict[str, list[float]]:
    """{kind of attention: how often each part of its program runs for one head}."""
    steps = length // block
    causal, full = steps * (steps - 1) / 2, steps * steps
    if not turned and direction == "forward":
        return {suffix: [1, steps + 2, steps, pairs] for suffix, pairs in (("", causal), ("_full", full))}
    if not turned:
        return {suffix: [1, steps + 2, steps, 1, pairs, 1] for suffix, pairs in (("", causal), ("_full", full))}
    from k2jax.kernels.flash_attention_turned import turns

    turning = [turns(length)] if turns(length) > 1 else []  # the loop over a row's parts, there and back
    if direction == "forward":
        return {"_turned": [1, steps + 2, steps, *turning, causal]}
    return {"_turned": [1, steps + 2, steps, *turning, 1, causal, 1, *turning]}


def blocks_of_table(generation: str, length: int, head_dim: int) -> Blocks:
    from k2jax.kernels.flash_attention_tpu import block_sizes

    sizes = block_sizes(generation, length, 2 * head_dim)
    return sizes.forward, sizes.forward_strip, sizes.backward, sizes.backward_strip


def resident_of_table(generation: str, length: int, head_dim: int) -> int:
    """Positions of a row that a kernel takes at once."""
    from k2jax.kernels.flash_attention_tpu import block_sizes

    return block_sizes(generation, length, 2 * head_dim).resident


def compile_flash(
    generation: str, length: int, head_dim: int, blocks: Blocks, dump: str, turned: bool = False
) -> None:
    topologies.use_tpu_compiler(dump)
    from functools import partial

    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from k2jax.kernels.flash_attention import flash_attention
    from k2jax.kernels.flash_attention_tpu import BlockSizes
    from k2jax.kernels.flash_attention_turned import turned_attention

    device = topologies.tpu_devices(topologies.GENERATIONS[generation].smallest)[0]
    place, sizes = SingleDeviceSharding(device), BlockSizes(*blocks, resident=length)
    shape = (1, length, head_dim) if turned else (1, length, 1, head_dim)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    angle = jax.ShapeDtypeStruct((length, head_dim // 2), jnp.float32, sharding=place)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple:
        attend = partial(flash_attention, sizes=sizes)
        if turned:
            attend = partial(turned_attention, rope=(cos, sin), head_dim=head_dim, sizes=sizes)
        out, backward = jax.vjp(attend, q, k, v)
        return out, backward(dout)

    jax.jit(both).lower(x, x, x, x, angle, angle).compile()


if __name__ == "__main__":
    name, positions, width, sizes, folder, *kind = sys.argv[1:]
    blocks = tuple(int(size) for size in sizes.split(","))
    compile_flash(name, int(positions), int(width), blocks, folder, turned=kind == ["turned"])
