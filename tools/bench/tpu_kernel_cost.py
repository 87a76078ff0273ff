"""Cycles of the attention kernels on a TPU that is not here, beside splash attention at its best block sizes.

    python tools/bench/tpu_kernel_cost.py [--generations v5p v6e] [--lengths 2048 8192 32768]
        [--kernels flash turned splash] [--blocks FORWARD,STRIP,BACKWARD,STRIP]

Compiles each kernel for the TPU (extra `tpu`), reads its final instruction bundles, and counts how often each part of
it runs for one head of causal bfloat16 attention, head_dim 128. "turned" are the kernels that apply RoPE, too, which
take shorter rows alone. Prints one JSON line a case:

cycles: of one TensorCore; matrix_unit_share: of them, what the arithmetic alone would take (products of the causal
half, two in forward and five in backward); ratio_to_splash: of cycles to those of splash attention for the same
direction, the best over its block sizes. HBM's transfers overlap with the arithmetic: not counted.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from k2jax.plan import topologies  # noqa: E402
from k2jax.plan.bundles import Program, cycles, read_program  # noqa: E402
from k2jax.plan.kernels import blocks_of_table, flash_costs, resident_of_table  # noqa: E402

HEAD_DIM = 128
PRODUCTS = {"forward": 2, "backward": 5}


# ---- one compilation, in a process of its own: the compiler reads its flags once -------------------------------------


def compile_case(case: dict[str, Any], dump: str) -> None:
    topologies.use_tpu_compiler(dump)
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    device = topologies.tpu_devices(topologies.GENERATIONS[case["generation"]].smallest)[0]
    attend, shape = splash(case)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))

    def both(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, backward = jax.vjp(attend, q, k, v)
        return out, backward(dout)

    jax.jit(both).lower(x, x, x, x).compile()


def splash(case: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, kv, compute = case["blocks"]
    sizes = kernels.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=compute,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((case["length"], case["length"]))])
    attend = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    return attend, (1, case["length"], HEAD_DIM)


# ---- how often each part of a kernel runs ----------------------------------------------------------------------------


def flash_by_parts(case: dict[str, Any]) -> dict[str, tuple[float, Program]]:
    """A row longer than what is resident is taken in pairs of parts: causal ones, and those before them in full.

    How the parts' results are put together is left to XLA, and not counted: some elementwise passes over a row.
    """
    resident = resident_of_table(case["generation"], case["length"], HEAD_DIM)
    if case["kernel"] == "turned":
        if case["length"] > resident // 2:
            raise ValueError(f"rows of more than {resident // 2} positions are not turned within the kernels")
        costs = flash_costs(case["generation"], case["length"], HEAD_DIM, tuple(case["blocks"]), turned=True)
        return {direction: costs[f"{direction}_turned"] for direction in PRODUCTS}
    parts = max(case["length"] // resident, 1)
    costs = flash_costs(case["generation"], case["length"] // parts, HEAD_DIM, tuple(case["blocks"]))
    found = {}
    for direction in PRODUCTS:
        (causal, program), (full, _) = costs[direction], costs[f"{direction}_full"]
        found[direction] = (parts * causal + parts * (parts - 1) / 2 * full, program)
    return found


def splash_costs(case: dict[str, Any]) -> dict[str, tuple[float, Program]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--compile", json.dumps(case), "--dump", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1][:200])
        return read_splash(Path(folder), case)


def read_splash(folder: Path, case: dict[str, Any]) -> dict[str, tuple[float, Program]]:
    """Its grid is all pairs of blocks. A step's longest part runs where the two see each other, the others once a row.

    What runs without a condition, as where a row of the grid is one block, is no part: it counts with each step.
    """
    q, kv, _ = case["blocks"]
    rows_per_cycle = topologies.GENERATIONS[case["generation"]].matrix_rows
    rows, columns = case["length"] // q, case["length"] // kv
    seen = sum(j * kv < (i + 1) * q for i in range(rows) for j in range(columns))
    steps, found = rows * columns, {}
    for direction, name, once in (("forward", "fwd", rows), ("backward", "dkv", columns)):
        program = read_program(folder, f"splash_mha_{name}")
        within = program.parts[3:]
        longest = max((part.stop - part.first for part in within), default=0)
        runs = [seen if part.stop - part.first == longest else once for part in within]
        runs = [1, steps + 2, steps, *runs] if steps > 1 else [1] * len(program.parts)
        found[direction] = (cycles(program, runs, rows_per_cycle), program)
    return found


def cost(case: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """{direction: JSON line}; None where the kernel does not compile so, as for want of VMEM."""
    try:
        found = splash_costs(case) if case["kernel"] == "splash" else flash_by_parts(case)
    except ValueError as error:
        print(f"{case}: {error}", file=sys.stderr)
        return None
    rate = topologies.GENERATIONS[case["generation"]].multiply_adds
    lines = {}
    for direction, (total, program) in found.items():
        ideal = PRODUCTS[direction] * case["length"] ** 2 / 2 * HEAD_DIM / rate
        lines[direction] = {
            "kernel": case["kernel"], "direction": direction, "generation": case["generation"],
            "sequence_length": case["length"], "blocks": case["blocks"], "cycles": round(total),
            "matrix_unit_share": round(ideal / total, 3), "vmem_bytes": program.vmem_bytes,
            "spills": program.spills,
        }  # fmt: skip
    return lines


def splash_cases(generation: str, length: int) -> list[dict[str, Any]]:
    """Its one kernel for all gradients: two do seven products for its five."""
    sizes = [size for size in (512, 1024, 2048) if size <= length]
    blocks = [[q, kv, c] for q, kv, c in itertools.product(sizes, sizes, (512, 1024)) if c <= kv]
    return [{"kernel": "splash", "generation": generation, "length": length, "blocks": b} for b in blocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", default=["v5p", "v6e"], choices=topologies.GENERATIONS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--kernels", nargs="+", default=["splash", "flash"], choices=["splash", "flash", "turned"])
    parser.add_argument("--blocks", default=None, help="of the flash kernels, all four; by default those of the table")
    parser.add_argument("--compile", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--dump", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_case(args.compile, args.dump)
        return
    for generation, length in itertools.product(args.generations, args.lengths):
        best: dict[str, Any] = {}
        for case in splash_cases(generation, length) if "splash" in args.kernels else []:
            for direction, line in (cost(case) or {}).items():
                if direction not in best or line["cycles"] < best[direction]["cycles"]:
                    best[direction] = line
        for line in best.values():
            print(json.dumps(line | {"ratio_to_splash": 1.0}), flush=True)
        for kernel in (name for name in ("flash", "turned") if name in args.kernels):
            given = args.blocks and tuple(int(size) for size in args.blocks.split(","))
            blocks = given or blocks_of_table(generation, length, HEAD_DIM)
            case = {"kernel": kernel, "generation": generation, "length": length, "blocks": list(blocks)}
            for direction, line in (cost(case) or {}).items():
                ratio = line["cycles"] / best[direction]["cycles"] if best else None
                print(json.dumps(line | {"ratio_to_splash": ratio and round(ratio, 3)}), flush=True)


if __name__ == "__main__":
    main()
