"""The plan: a compiled program's text is read right, transfers take the time that the model of the links says, and the
command says before launch whether a step fits and how long it takes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from compilers import on_gpu_compiler, on_tpu_compiler

from k2jax.errors import ConfigError
from k2jax.plan.chips import CHIPS, chip_of
from k2jax.plan.estimate import memory_refused
from k2jax.plan.hlo import Program, array_bytes, replica_groups
from k2jax.plan.links import HOP_S, NETWORK_S, Links
from k2jax.plan.show import ranking, table
from k2jax.plan.timeline import GPU_HBM_SHARE, GPU_MATRIX_SHARE, Timeline
from k2jax.train import train
from k2jax.training.metrics import planned_step_seconds

ROOT = Path(__file__).parent.parent


# ---- a program's text ------------------------------------------------------------------------------------------------

# As the TPU compiler writes it, cut to what is read. One millisecond is 1.75M cycles of a v5p.
LOOP = """HloModule step, is_scheduled=true

%cond (p: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%product (a: f32[8,128]) -> f32[8,128] {
  %a.1 = f32[8,128]{1,0} parameter(0)
  ROOT %conv = f32[8,128]{1,0} convolution(%a.1, %a.1), dim_labels=bf_io->bf
}

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p.2), index=1
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i.2, %step)
  START
  %y = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"1750000"}
  DONE
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%next, %y)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a.2 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %a.2)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%t), condition=%cond, body=%body
  %copy = f32[8,128]{1,0:T(8,128)} copy(%a.2), backend_config={"estimated_cycles":"3500000"}
  ROOT %r = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def v5p(shape: tuple[int, ...] = (8, 8, 8)) -> Links:
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, len(shape))
    return Links(CHIPS["v5p"], [SimpleNamespace(coords=place) for place in places])


def play(step: int = 1, start: str = "", done: str = "", first: int = 0) -> Timeline:
    text = LOOP.replace("STEP", str(step)).replace("START", start).replace("DONE", done)
    text = text.replace("%zero = s32[]{:T(128)} constant(0)", f"%zero = s32[]{{:T(128)}} constant({first})")
    return Timeline(Program(text), CHIPS["v5p"], v5p())


@pytest.mark.parametrize(("first", "step", "turns"), [(0, 1, 6), (0, 2, 3), (0, 4, 2), (1, 1, 5), (1, 2, 3), (2, 4, 1)])
def test_a_loop_counts_as_often_as_it_runs(first: int, step: int, turns: int):
    """One that the compiler took turns out of starts its counter later."""
    parts = play(step, first=first).step()
    assert parts.matrix == pytest.approx(turns * 1e-3, rel=1e-3)
    assert parts.elementwise == pytest.approx(2e-3, rel=1e-3)


def test_a_loop_whose_turns_cannot_be_told_is_an_error():
    with pytest.raises(ValueError, match="loop: its condition is not"):
        Timeline(Program(LOOP.replace("direction=LT", "direction=NE").replace("STEP", "1")), CHIPS["v5p"], v5p()).step()


RING = "{{0,1,2,3,4,5,6,7}}"  # devices along z
PERMUTE = "{{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}"


def test_a_transfer_beside_a_product_is_hidden_and_what_is_left_of_it_exposed():
    """90 MB by a link of 90 GB/s are 1 ms; twice as many are 1 ms more than the product beside them."""
    found = {}
    for megabytes in (45, 180):
        shape = f"f32[{megabytes * 250_000}]"
        start = f"%s = ({shape}, {shape}) collective-permute-start(%big), channel_id=1, source_target_pairs={PERMUTE}"
        start = f"%big = {shape} parameter(0)\n  " + start
        found[megabytes] = play(6, start, f"%d = {shape} collective-permute-done(%s)").step()
    small, large = found[45].collectives, found[180].collectives
    assert small.exposed == 0 and small.hidden == pytest.approx(0.5e-3, rel=1e-2)
    assert large.exposed == pytest.approx(1e-3, rel=1e-2) and large.hidden == pytest.approx(1e-3, rel=1e-2)
    assert found[180].total == pytest.approx(4e-3, rel=1e-2)
    assert found[180].host.size == 0


# A loop that keeps an array of each turn by its host and reads another, 24 MB each: 1.5 ms by a link of 16 GB/s.
HOST_COPIES = """%kept = f32[6,6000000]{1,0:S(5)} parameter(0)
  %piece = f32[1,6000000]{1,0} parameter(1)
  %to = ((f32[6,6000000]{1,0:S(5)}, f32[1,6000000]{1,0}, s32[]), f32[6,6000000]{1,0:S(5)}, u32[]{:S(2)}) \
dynamic-update-slice-start(%kept, %piece, %i.2)
  %from = ((f32[6,6000000]{1,0:S(5)}, s32[]), f32[1,6000000]{1,0}, u32[]{:S(2)}) dynamic-slice-start(%kept, %i.2), \
dynamic_slice_sizes={1,6000000}
  %other = ((f32[6,6000000]{1,0:S(5)}, s32[]), f32[1,6000000]{1,0}, u32[]{:S(2)}) dynamic-slice-start(%kept, %i.2), \
dynamic_slice_sizes={1,6000000}"""
HOST_DONE = """%to.1 = f32[6,6000000]{1,0:S(5)} dynamic-update-slice-done(%to)
  %from.1 = f32[1,6000000]{1,0} dynamic-slice-done(%from)"""


def test_copies_to_the_hosts_memory_take_a_link_of_their_own_each_way():
    """Beside a product of 1 ms: to it and from it at once, and a second one from it after the first."""
    gather = f"""%w = f32[22500000] parameter(2)
  %s = (f32[22500000], f32[22500000]) collective-permute-start(%w), channel_id=1, source_target_pairs={PERMUTE}
  """
    done = "%d = f32[22500000] collective-permute-done(%s)\n  "
    two = play(6, gather + HOST_COPIES, done + HOST_DONE).step()
    assert two.host.exposed == pytest.approx(0.5e-3, rel=1e-2), "both ends are 1.5 ms after their starts"
    assert two.host.hidden == pytest.approx(3 * 1.5e-3 - 0.5e-3, rel=1e-2)
    assert two.host.size == 3 * 24e6
    assert two.collectives.exposed == pytest.approx(0, abs=2e-6), "a host copy held up a collective"
    third = play(6, HOST_COPIES, HOST_DONE + "\n  %other.1 = f32[1,6000000]{1,0} dynamic-slice-done(%other)").step()
    assert third.host.exposed == pytest.approx(2e-3, rel=1e-2)
    assert third.total == pytest.approx(two.total + 1.5e-3, rel=1e-2)


def test_a_copy_counts_to_the_host_where_one_side_lies_there():
    """Whole arrays, waited for or not; copies between the device's own memories are no transfers."""
    array = "f32[8000000]{0}"  # 2 ms by the link, 1 ms more than the product
    by_host = array.replace("}", ":S(5)}")
    waited = play(6, f"%x.1 = {array} parameter(0)\n  %c = {by_host} copy(%x.1)").step()
    assert waited.host.exposed == pytest.approx(2e-3, rel=1e-2) and waited.host.size == 32e6
    start = f"%x.1 = {by_host} parameter(0)\n  %c = ({array}, {by_host}, u32[]{{:S(2)}}) copy-start(%x.1)"
    beside = play(6, start, f"%c.1 = {array} copy-done(%c)").step().host
    assert beside.hidden == pytest.approx(1e-3, rel=1e-2) and beside.exposed == pytest.approx(1e-3, rel=1e-2)
    assert play(6, start.replace("S(5)", "S(1)"), f"%c.1 = {array} copy-done(%c)").step().host.size == 0
    body = f"%p.9 = {by_host} parameter(0)\n  ROOT %q.9 = {array} copy(%p.9)"
    fused = LOOP.replace("STEP", "6").replace("START", f"%f = {array} fusion(%x), kind=kLoop, calls=%wrapped")
    program = Program(f"%wrapped (a: f32[9]) -> f32[9] {{\n  {body}\n}}\n\n{fused.replace('DONE', '')}")
    assert Timeline(program, CHIPS["v5p"], v5p()).step().host.size == 32e6


def test_transfers_of_opposite_directions_share_no_link():
    ends = {}
    for name, pairs in (("same", PERMUTE), ("opposite", "{{1,0},{2,1},{3,2},{4,3},{5,4},{6,5},{7,6},{0,7}}")):
        shape = "f32[22500000]"
        lines = [f"%big = {shape} parameter(0)"]
        for i, p in enumerate((PERMUTE, pairs)):
            lines.append(f"%s{i} = ({shape}, {shape}) collective-permute-start(%big), source_target_pairs={p}")
        done = "\n  ".join(f"%d{i} = {shape} collective-permute-done(%s{i})" for i in range(2))
        ends[name] = play(6, "\n  ".join(lines), done).step().total
    assert ends["same"] == pytest.approx(ends["opposite"] + 1e-3, rel=1e-2)


def test_a_transfer_that_is_waited_for_holds_up_those_under_way():
    shape = "f32[45000000]"  # 180 MB: 2 ms by a link, the sum 1.75 ms, the product between start and end 1 ms
    start = f"""%big = {shape} parameter(0)
  %s = ({shape}, {shape}) collective-permute-start(%big), channel_id=1, source_target_pairs={PERMUTE}
  %sum = {shape} all-reduce(%big), channel_id=2, replica_groups={RING}, to_apply=%add"""
    timeline = play(6, start, f"%d = {shape} collective-permute-done(%s)")
    parts = timeline.step()
    assert parts.collectives.exposed == pytest.approx(1.75e-3 + 1e-3, rel=1e-2)
    assert parts.collectives.hidden == pytest.approx(1e-3, rel=2e-2)
    assert timeline.waited_for.most_common(1)[0][0].startswith("all-reduce f32[45000000]")


# As the TPU compiler writes what goes between slices: 50 MB by a network of 6.25 GB/s are 8 ms.
OF_SLICES = (
    'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_host_transfer_rendezvous="NAME",_xla_megascale_target=GROUPS,_xla_megascale_transfer_type="KIND"}'
)
SENT = """%big = f32[12500000] parameter(1)
  %rv = (f32[12500000], u32[], token[]) recv(%token), channel_id=2, OF_SLICES
  %s = (f32[12500000], u32[], token[]) send(%big, %token), channel_id=1, OF_SLICES"""
RECEIVED = """%sd = token[] send-done(%s), channel_id=1
  %rd = (f32[12500000], token[]) recv-done(%rv), channel_id=2"""
PAIRS = "{{100000->200000},{200000->100000}}"


@pytest.mark.parametrize(
    ("kind", "groups", "megabytes"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:3}"', 50),
        ("REDUCE_SCATTER", '"{1,2,3,4}x{0:3}"', 37.5),
        ("REDUCE_SCATTER", '"{1:8}x{0:3}"', 43.75),
        ("ALL_GATHER", "{{100000,200000,300000},{100001,200001,300001}}", 100),
        ("ALL_TO_ALL", "{{100000,200000},{100001,200001}}", 25),
        ("ONE_TO_ONE", PAIRS, 50),
    ],
)
def test_between_slices_a_device_sends_over_its_share_of_the_network(kind: str, groups: str, megabytes: float):
    """Beside a product of 1 ms; the rest of it is waited for where it is received."""
    attributes = OF_SLICES.replace("NAME", kind.lower() + "_0").replace("GROUPS", groups).replace("KIND", kind)
    parts = play(6, SENT.replace("OF_SLICES", attributes), RECEIVED).step()
    took = megabytes * 1e6 / CHIPS["v5p"].network_bytes_per_s + NETWORK_S
    assert parts.slices.size == megabytes * 1e6
    assert parts.slices.hidden == pytest.approx(1e-3, rel=1e-2)
    assert parts.slices.exposed == pytest.approx(took - 1e-3, rel=1e-2)
    assert parts.collectives.size == parts.host.size == 0
    assert parts.total == pytest.approx(2e-3 + took, rel=1e-2)


def test_between_slices_and_within_one_nothing_is_shared():
    """But two transfers between slices run one after the other."""
    one = OF_SLICES.replace("GROUPS", PAIRS).replace("KIND", "ONE_TO_ONE")
    sent = SENT.replace("OF_SLICES", one.replace("NAME", "a"))
    ring = f"%w = (f32[9], f32[9]) collective-permute-start(%big), channel_id=9, source_target_pairs={PERMUTE}"
    mixed = play(6, f"{sent}\n  {ring}", f"%d = f32[9] collective-permute-done(%w)\n  {RECEIVED}").step()
    assert mixed.collectives.exposed == 0 and mixed.slices.exposed == pytest.approx(7e-3 + NETWORK_S, rel=1e-2)
    again = SENT.replace("OF_SLICES", one.replace("NAME", "b")).partition("\n")[2]
    again = again.replace("%rv =", "%rv2 =").replace("%s =", "%s2 =")
    both = RECEIVED + "\n  %rd2 = (f32[12500000], token[]) recv-done(%rv2), channel_id=2"
    assert play(6, f"{sent}\n{again}", both).step().slices.exposed == pytest.approx(15e-3 + 2 * NETWORK_S, rel=1e-2)


def test_replica_groups_in_all_their_forms():
    assert replica_groups("replica_groups={{0,2},{1,3}}, x") == [[0, 2], [1, 3]]
    assert replica_groups("replica_groups=[2,2]<=[4]") == [[0, 1], [2, 3]]
    assert replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)") == [[0, 2], [1, 3]]
    assert replica_groups("replica_groups=mesh['a'=2,'b'=2] {'b'}, use") == [[0, 1], [2, 3]]
    assert replica_groups("replica_groups=mesh['a'=2,'b'=2] {'a'}, use") == [[0, 2], [1, 3]]
    assert replica_groups("source_target_pairs={{0,1},{1,0}}") == [[0, 1], [1, 0]]
    assert replica_groups("replica_groups={}") is None


def test_sizes_of_arrays():
    assert array_bytes("(bf16[4,2048]{1,0:T(8,128)(2,1)}, f32[3]{0}, pred[5], s32[])") == 16384 + 12 + 5 + 4
    assert array_bytes("f8e4m3fn[16]") == 16


# ---- links -----------------------------------------------------------------------------------------------------------


def seconds(kind: str, rest: str, links: Links, megabytes: int = 90) -> float:
    text = f"ENTRY %m (a: f32[1]) -> f32[1] {{\n  %a = f32[{megabytes * 250_000}]{{0}} parameter(0)\n"
    text += f"  %c = f32[{megabytes * 250_000}]{{0}} {kind}(%a), {rest}\n}}\n"
    program = Program(text)
    return links.transfer(program, program.computations["m"][1])[0]


def test_rings_of_a_torus_send_both_ways_and_lines_do_not():
    ring = seconds("all-gather", f"replica_groups={RING}", v5p())
    assert ring == pytest.approx(7 * 90e6 / 180e9 + 4 * HOP_S)
    line = seconds("all-gather", "replica_groups={{0,1}}", v5p((2, 2, 2)))
    assert line == pytest.approx(90e6 / 90e9 + HOP_S)


def test_an_algorithm_along_every_axis_is_as_much_faster_and_one_ring_is_not():
    everyone = "replica_groups=[1,512]<=[512]"
    three = seconds("all-reduce", everyone, v5p())
    assert three == pytest.approx(2 * 90e6 * 511 / 512 / (3 * 180e9) + 12 * HOP_S)
    one = seconds("all-reduce", everyone + ', backend_config={"strategy":"StrategyRing"}', v5p())
    assert one == pytest.approx(2 * 90e6 * 511 / 512 / 180e9 + 12 * HOP_S)


GPU = """HloModule step, is_scheduled=true

%cast (p: f32[24,2048,4096], n: s32[]) -> f8e4m3fn[2048,4096] {
  %p.1 = f32[24,2048,4096]{1,0,2} parameter(0)
  %n.1 = s32[] parameter(1)
  %seen = f32[4096,24,2048]{2,1,0} bitcast(%p.1)
  %part = f32[4096,1,2048]{2,1,0} dynamic-slice(%seen, %n.1, %n.1, %n.1), dynamic_slice_sizes={4096,1,2048}
  ROOT %q = f8e4m3fn[2048,4096]{0,1} convert(%part)
}

ENTRY %main (x: TYPE[65536,2048], w: f32[24,2048,4096], n: s32[]) -> bf16[65536,4096] {
  %x.1 = TYPE[65536,2048]{1,0} parameter(0)
  %w.1 = f32[24,2048,4096]{1,0,2} parameter(1)
  %n.2 = s32[] parameter(2)
  %w.2 = f8e4m3fn[2048,4096]{0,1} fusion(%w.1, %n.2), kind=kLoop, calls=%cast
  ROOT %y = bf16[65536,4096]{1,0} dot(%x.1, %w.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


@pytest.mark.parametrize(("kind", "times"), [("bf16", 1), ("f8e5m2", 2), ("s8", 2)])
def test_a_gpu_multiplies_8_bits_twice_as_fast(kind: str, times: int):
    """And what is cut out of an array is all that is read of it, also where it is seen as another one first."""
    parts = Timeline(Program(GPU.replace("TYPE", kind)), CHIPS["h100"], Links(CHIPS["h100"], [None])).step()
    flops = 2 * 65536 * 2048 * 4096
    assert parts.matrix == pytest.approx(flops / (times * GPU_MATRIX_SHARE * 989e12), rel=1e-3)
    assert parts.elementwise == pytest.approx(2048 * 4096 * (4 + 1) / (GPU_HBM_SHARE * 3.35e12), rel=1e-3)


def test_between_hosts_gpus_share_the_network():
    links = Links(CHIPS["h100"], [None] * 16)
    within = seconds("all-reduce", "replica_groups={{0,1,2,3,4,5,6,7}}", links)
    assert within == pytest.approx(2 * 90e6 * 7 / 8 / 450e9 + 8 * HOP_S)
    across = seconds("all-reduce", "replica_groups={{0,8}}", links)
    assert across == pytest.approx(2 * 90e6 / 2 / 50e9 + 2 * HOP_S)


KERNELS = """ENTRY %m (a: f32[1]) -> f32[1] {
  %i = s32[1,4]{1,0} parameter(0)
  %q = bf16[1,4,Q_,128]{3,2,1,0} parameter(1)
  %k = bf16[1,4,K_,128]{3,2,1,0} parameter(2)
  %flash_attention_forward_full.1 = (f32[1,4,Q_,128]{3,2,1,0}, f32[1,4,1,Q_]{3,2,1,0}) custom-call(%i, %q, %k, %k)
  %flash_attention_backward_full.1 = (f32[1,4,Q_,128]{3,2,1,0}, f32[1,4,K_,128]{3,2,1,0}) custom-call(%i, %q, %k, %k)
}
"""


@on_tpu_compiler
def test_a_kernel_costs_as_many_pairs_as_it_takes():
    """As the ring's parts do: all queries with half of the keys is as much as half of the queries with all keys."""
    found = {}
    for T, S in ((4096, 2048), (2048, 4096), (2048, 2048)):
        text = KERNELS.replace("Q_", str(T)).replace("K_", str(S))
        timeline = Timeline(Program(text), CHIPS["v5p"], v5p((2, 2, 1)))
        found[T, S] = timeline.step().attention
        assert not timeline.guessed_kernels, "its bundles were not read"
    assert found[4096, 2048] == found[2048, 4096] == pytest.approx(2 * found[2048, 2048])
    assert found[2048, 2048] > 7 * 2 * 4 * 2048 * 2048 * 128 / 459e12, "less than the arithmetic takes"


# ---- the command -----------------------------------------------------------------------------------------------------


# As small as the TPU's kernels and two shards of the heads allow: twice that compiles three times as long.
D, L, N, K, H, F, V, T, ROWS = 256, 4, 2, 2, 128, 512, 512, 256, 8
PARAMS = 2 * V * D + L * (D * H * (N + K + K + N) + 3 * D * F)
# Answers a line of arguments by a line of what `main` did with them; compilers write to file descriptor 1 themselves.
SERVER = """
import contextlib, io, json, os, runpy, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from k2jax.errors import run_main
main = runpy.run_path("tools/plan.py")["main"]
for line in sys.stdin:
    sys.argv, out, errors = ["plan.py", *json.loads(line)], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            run_main(main)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), errors.getvalue()]), file=answers, flush=True)
"""


def plan_arguments(tiny_data: Path, *arguments: str) -> list[str]:
    small = {"dim": D, "num_heads": N, "num_kv_heads": K, "head_dim": H, "ffn_dim": F, "num_layers": L}
    common = [f"--config={tiny_data / 'tiny.py'}", "--stage=stage1", f"--config.stages.0.sequence_length={T}"]
    return [*common, *(f"--config.model.{key}={value}" for key, value in small.items()), *arguments]


@pytest.fixture(scope="module")
def plan(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """`plan(*arguments)`: exit code, stdout and stderr of the command, all of them in one process beside this one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    log = tmp_path_factory.mktemp("plan") / "log"
    with log.open("w") as file, subprocess.Popen([sys.executable, "-c", SERVER], stderr=file, **pipes) as process:

        def ask(*arguments: str) -> tuple[int, str, str]:
            process.stdin.write(json.dumps(plan_arguments(tiny_data, *arguments)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, log.read_text()[-3000:]
            return tuple(json.loads(answer))

        yield ask
        process.stdin.close()


def plan_as_a_program(tiny_data: Path, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "tools/plan.py", *plan_arguments(tiny_data, *arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@on_tpu_compiler
def test_a_step_that_fits(plan: Callable, tmp_path: Path):
    code, out, errors = plan("--topology=v5e:2x2", "--json", f"--workdir={tmp_path}")
    assert code == 0, errors
    found = json.loads(out)
    assert found["fits"] and found["chips"] == 4 and found["mesh"]["fsdp"] == 4
    assert 1e7 < found["hbm_bytes_per_chip"] < found["hbm_limit_bytes"] == int(15.75 * 2**30)
    tokens = ROWS * T
    causal = (6 * (PARAMS - V * D) + 6 * L * T * N * H) * tokens
    assert found["step_flops_causal"] == pytest.approx(causal)
    assert found["mfu_causal"] == pytest.approx(causal / (found["step_seconds"] * 4 * 197e12))
    assert found["mfu_noncausal"] > found["mfu_causal"] > 0
    # Four layers, and not one as XLA's own cost analysis has it: what matrix units need at least, and not far more.
    least = 6 * (PARAMS - V * D) * tokens / 4 / 197e12
    assert least < found["matrix_seconds"] < 6 * least
    assert found["tokens_per_second_per_chip"] == pytest.approx(tokens / found["step_seconds"] / 4)
    assert found["days"] == pytest.approx(20 * found["step_seconds"] / 86400)
    assert found["chip_hours"] == pytest.approx(found["days"] * 24 * 4)
    assert found["saving"]["state_bytes"] == pytest.approx(12 * PARAMS, rel=0.01)
    rows = r"\ncheckpoints\n  state .*\n  on disk .*\n  storage .*\n  training waits .*\n  stage1 "
    assert re.search(rows, table(found))
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert kept["step_seconds"] == pytest.approx(found["step_seconds"], rel=0.01)


@on_tpu_compiler
def test_a_step_that_does_not_fit_exits_with_2_and_says_what_would(plan: Callable):
    large = ["--config.model.dim=8192", "--config.model.ffn_dim=32768", "--config.model.num_layers=16"]
    code, out, errors = plan("--topology=v5e:2x2", *large)
    assert code == 2, errors
    assert "does NOT fit" in out and "parameters and moments alone take" in out
    large = ["--config.stages.0.rows_per_step=4096"]
    code, out, errors = plan("--topology=v5e:2x2", *large)
    assert code == 2, errors
    microbatches = re.search(r"stages\.0\.microbatches=(\d+)", out)
    assert microbatches, out
    code, out, errors = plan("--topology=v5e:2x2", *large, f"--config.{microbatches.group()}")
    assert code == 0, f"the remedy does not help:\n{out}{errors}"


@on_tpu_compiler
def test_the_search_ranks_what_fits(plan: Callable):
    """Three microbatches of a pipeline are no multiple of two stages; without stages there are none to try."""
    options = ["--search", "--fsdp", "2", "4", "3", "--tensor", "1", "2", "--pipeline", "1", "2", "--remat", "full"]
    code, out, errors = plan("--topology=v5e:2x2", *options, "--pipeline-microbatches", "2", "3", "--json")
    assert code == 0, errors
    tried = json.loads(out)
    meshes = {tuple(case["mesh"][axis] for axis in ("replica", "stage", "fsdp", "tensor")) for case in tried}
    assert meshes == {(2, 1, 2, 1), (1, 1, 4, 1), (1, 1, 2, 2), (1, 2, 2, 1)} and len(tried) == 4
    (piped,) = [case for case in tried if case["mesh"]["stage"] == 2]
    assert piped["bubble_fraction"] == pytest.approx(1 / 3)
    lines = ranking(tried).splitlines()
    assert [line.split()[-1] for line in lines if " 1x2 full " in line] == ["33.3%"] and len(lines) == 5
    times = [case["step_seconds"] for case in tried]
    assert times == sorted(times)


@on_tpu_compiler
def test_a_step_on_two_slices(plan: Callable):
    """Half of each device's gradients go to the other slice, and half of its parameters come back, as float32."""
    code, out, errors = plan("--topology=v5e:2x2*2", "--config.mesh.replica=2", "--json")
    assert code == 0, errors
    found = json.loads(out)
    assert found["chips"] == found["devices"] == 8 and found["mesh"]["replica"] == 2 and found["mesh"]["fsdp"] == 4
    assert found["network_bytes_per_chip"] == pytest.approx(PARAMS / 4 * 4, rel=0.05)
    waited = found["exposed_network_seconds"] + found["hidden_network_seconds"]
    assert waited > found["network_bytes_per_chip"] / found["network_bytes_per_s"]
    assert found["network_bytes_per_s"] == CHIPS["v5e"].network_bytes_per_s
    printed = table(found)
    assert re.search(r"between slices +0\.00\d+ GB a step from each chip, by a network of 3\.12 GB/s a chip", printed)
    assert re.search(r"\d+% of the time waited for transfers", printed)


@on_tpu_compiler
def test_arrays_kept_by_the_host_take_its_memory_and_copies(plan: Callable):
    code, out, errors = plan("--topology=v5e:2x2", "--config.model.remat=q+up@host", "--json")
    assert code == 0, errors
    found = json.loads(out)
    kept = ROWS / 4 * T * F * 2 * L
    assert found["host_bytes_per_chip"] == pytest.approx(kept, rel=0.01)
    assert found["host_copy_bytes"] == 2 * kept, "there and back, once a layer"
    seconds = found["exposed_host_copy_seconds"] + found["hidden_host_copy_seconds"]
    assert seconds == pytest.approx(2 * kept / CHIPS["v5e"].host_bytes_per_s + 2 * L * HOP_S)
    printed = table(found)
    assert re.search(r"of its host +0\.0 GiB a chip", printed) and "of copies to and from the host" in printed


@on_tpu_compiler
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v9:4"], ["'v9'", "v4, v5e, v5p, v6e, tpu7x, h100, a100"]),
        (["--topology=v5e:3x5"], ["v5e:3x5", "GENERATION:SHAPE"]),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], ["mesh", "needs 3 devices, this run has 4"]),
        (["--topology=v5e:2x2", "--config.model.rings=(3,2)"], ["model.rings=(3, 2)", "mesh.fsdp=4"]),
        (["--topology=v5e:2x2", "--config.compiler.tpu=('xla_tpu_nonsense=true',)"], ["xla_tpu_nonsense"]),
        (
            ["--topology=v5e:2x2", "--config.model.attention.implementation=cudnn"],
            ["implementation='cudnn'", "runs on NVIDIA GPUs, this is tpu"],
        ),
        (["--topology=v5e:2x2*0"], ["'v5e:2x2*0'", "the number of slices, 1 to 64"]),
        (["--topology=v5e:2x2*2", "--config.mesh.replica=1"], ["mesh.replica=1 on 2 slices", "a multiple of 2"]),
        (["--topology=v5e:2x2", "--stage=stage7"], ["stage7", "stage1, stage2"]),
    ],
)
def test_bad_input_is_one_line(plan: Callable, arguments: list[str], words: list[str]):
    code, out, errors = plan(*arguments)
    last = errors.strip().splitlines()[-1]
    assert code == 78 and last.startswith("error: ") and all(word in last for word in words), errors


def test_the_program_ends_as_its_main_does(tiny_data: Path):
    code, out, errors = plan_as_a_program(tiny_data, "--topology=v9:4")
    assert code == 78 and out == "" and errors.startswith("error: ") and "'v9'" in errors and errors.count("\n") == 1


COUNT = """
from k2jax.plan import topologies
topologies.use_tpu_compiler()
for generation in topologies.GENERATIONS.values():
    devices = topologies.devices(generation.smallest)
    print(devices[0].device_kind, len(devices) / len({tuple(device.coords) for device in devices}), sep="|")
"""


@on_tpu_compiler
def test_chips_have_as_many_devices_as_the_compiler_gives_them():
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True)
    found = [line.split("|") for line in done.stdout.splitlines()]
    tpus = [chip for chip in CHIPS.values() if chip.is_tpu]
    assert found == [[chip.kind, f"{chip.devices_per_chip:.1f}"] for chip in tpus], done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ran out of memory in memory space hbm. Used 27.50G of 15.75G hbm. Exceeded by 11.75G.", int(27.5 * 2**30)),
        ("the total memory required for HLO temporaries (1.5T) exceeds available HBM (95.74G).", int(1.5 * 2**40)),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_memory_that_the_compiler_refused(text: str, expected: int | None):
    assert memory_refused(text) == expected


def test_unknown_accelerators_are_refused_with_the_known():
    with pytest.raises(ConfigError, match="known: v4, v5e, v5p, v6e, tpu7x, h100, a100"):
        chip_of("b200:8")


@on_gpu_compiler
def test_a_step_on_gpus(tiny_data: Path):
    code, out, errors = plan_as_a_program(tiny_data, "--topology=h100:8", "--json")
    assert code == 0, errors
    found = json.loads(out)
    assert found["chips"] == 8 and found["device_kind"].startswith("NVIDIA H100")
    least = 6 * (PARAMS - V * D) * ROWS * T / 8 / 989e12
    # Products of a model so small are bound by memory; with twice its width it is less than six times.
    assert least < found["matrix_seconds"] < 12 * least and 0 < found["mfu_causal"] < 1


# ---- predicted beside actual -----------------------------------------------------------------------------------------


def test_the_trainer_prints_what_was_planned(tiny_config, tmp_path: Path, capsys: pytest.CaptureFixture):
    kept = {"device_kind": "cpu", "devices": 8, "topology": "here", "fits": True}
    kept["stages"] = {"stage1": {"step_seconds": 1.234, "hbm_bytes_per_chip": 2**30}}
    (tmp_path / "plan.json").write_text(json.dumps(kept))
    train(tiny_config(**{"stages.0.chunks": 1, "stages.1.chunks": 1, "eval.windows": 1}), tmp_path)
    printed = capsys.readouterr().out
    assert "planned for here: 1.0 GiB a chip\n" in printed
    assert re.search(r"step 7 .* \d\.\d{3} s a step, planned 1\.234", printed)
    assert not re.search(r"step 12 .*planned", printed), "stage2 was not planned"


def test_a_plan_that_the_compiler_refused_stops_nothing(tmp_path: Path):
    kept = {"device_kind": "cpu", "devices": 8, "topology": "here", "fits": False, "step_seconds": None}
    kept["stages"] = {"stage1": {"step_seconds": None, "hbm_bytes_per_chip": 2**36}}
    (tmp_path / "plan.json").write_text(json.dumps(kept))
    said: list[str] = []
    assert planned_step_seconds(tmp_path, said.append) == {}
    assert said == ["planned for here: 64.0 GiB a chip, which does not fit"]


def test_a_plan_for_other_devices_is_not_compared(tmp_path: Path):
    (tmp_path / "plan.json").write_text(json.dumps({"device_kind": "TPU v5", "devices": 512}))
    said: list[str] = []
    assert planned_step_seconds(tmp_path, said.append) == {}
    assert "for 512 TPU v5, this run has 8 cpu" in said[0]


# ---- the whole of K2-65B and K2-7B: minutes and gigabytes (`make plan-65b`) ------------------------------------------


ROWS_SHARED = "--stage=stage2 --config.mesh.fsdp=256 --config.mesh.context=2 --config.model.rings=()"


@pytest.mark.slow
@on_tpu_compiler
@pytest.mark.parametrize(
    ("experiment", "topology", "least_mfu", "other"),
    [
        ("k2_65b_v5p", "v5p:8x8x8", 0.65, ""),
        ("k2_65b_v6e", "v6e:16x16", 0.38, ""),
        ("k2_65b_128k", "v5p:8x8x8", 0.3, ""),
        ("k2_7b", "v5p:4x4x4", 0.65, "--stage=stage1"),
        ("k2_7b", "v6e:8x8", 0.38, "--config.model.remat=full"),
        ("k2_65b_v5p", "v5p:8x8x8", 0.5, ROWS_SHARED),
        ("k2_65b_v5p", "v5p:8x8x8*2", 0.55, "--stage=stage1 --config.mesh.replica=2"),
    ],
)
def test_it_fits_and_is_as_fast_as_its_experiment_says(experiment, topology, least_mfu, other):
    arguments = [f"--config=experiments/{experiment}.py", f"--topology={topology}", "--json", *other.split()]
    done = subprocess.run([sys.executable, "tools/plan.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["hbm_bytes_per_chip"] <= 0.9 * found["hbm_limit_bytes"]
    assert all(stage["mfu_causal"] >= least_mfu for stage in found["stages"].values())
