"""Cycles of this project's TPU attention kernels: compiled in a process of their own, read bundle by bundle.

    python -m k2jax.plan.kernels GENERATION LENGTH HEAD_DIM BLOCKS DUMP

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


def flash_costs(generation: str, length: int, head_dim: int, blocks: Blocks) -> dict[str, tuple[float, Program]]:
    """{"forward": (cycles of one head and row on one TensorCore, its program), "backward": ..., "forward_full": ...}.

    Causal bfloat16 attention of `length` positions; "_full" is that of all pairs of positions, as between parts of a
    row. ValueError, with the compiler's last line, where it does not compile so.
    """
    found = _costs_or_error(generation, length, head_dim, blocks)
    if isinstance(found, ValueError):
        raise found
    return found


@lru_cache
def _costs_or_error(
    generation: str, length: int, head_dim: int, blocks: Blocks
) -> dict[str, tuple[float, Program]] | ValueError:
    """Errors are remembered, too: each costs a process."""
    try:
        return _costs(generation, length, head_dim, blocks)
    except ValueError as error:
        return error


def _costs(generation: str, length: int, head_dim: int, blocks: Blocks) -> dict[str, tuple[float, Program]]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = [generation, str(length), str(head_dim), ",".join(map(str, blocks)), folder]
        command = [sys.executable, "-m", "k2jax.plan.kernels", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1][:200])
        rows_per_cycle = topologies.GENERATIONS[generation].matrix_rows
        found = {}
        for direction, block in (("forward", blocks[0]), ("backward", blocks[2])):
            steps = length // block
            program = read_program(Path(folder), f"flash_attention_{direction}")
            for suffix, pairs in (("", steps * (steps - 1) / 2), ("_full", steps * steps)):
                runs = [1, steps + 2, steps, pairs] if direction == "forward" else [1, steps + 2, steps, 1, pairs, 1]
                found[direction + suffix] = (cycles(program, runs, rows_per_cycle), program)
    return found


def blocks_of_table(generation: str, length: int, head_dim: int) -> Blocks:
    from k2jax.kernels.flash_attention_tpu import block_sizes

    sizes = block_sizes(generation, length, 2 * head_dim)
    return sizes.forward, sizes.forward_strip, sizes.backward, sizes.backward_strip


def resident_of_table(generation: str, length: int, head_dim: int) -> int:
    """Positions of a row that a kernel takes at once."""
    from k2jax.kernels.flash_attention_tpu import block_sizes

    return block_sizes(generation, length, 2 * head_dim).resident


def compile_flash(generation: str, length: int, head_dim: int, blocks: Blocks, dump: str) -> None:
    topologies.use_tpu_compiler(dump)
    from functools import partial

    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from k2jax.kernels.flash_attention import flash_attention
    from k2jax.kernels.flash_attention_tpu import BlockSizes

    device = topologies.tpu_devices(topologies.GENERATIONS[generation].smallest)[0]
    x = jax.ShapeDtypeStruct((1, length, 1, head_dim), jnp.bfloat16, sharding=SingleDeviceSharding(device))

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple:
        out, backward = jax.vjp(partial(flash_attention, sizes=BlockSizes(*blocks, resident=length)), q, k, v)
        return out, backward(dout)

    jax.jit(both).lower(x, x, x, x).compile()


if __name__ == "__main__":
    name, positions, width, sizes, folder = sys.argv[1:]
    compile_flash(name, int(positions), int(width), tuple(int(size) for size in sizes.split(",")), folder)
