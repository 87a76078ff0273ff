"""tools/bench/gpu_suite.py, tiny and on the CPU: that it runs to its end, and that it says so where something fails."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import on_gpu_compiler, run_compiling
from conftest import REPOSITORY

from k2jax.errors import RunError
from k2jax.run.ledger import Ledger

BENCH = REPOSITORY / "tools" / "bench"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_suite

    return gpu_suite


def worker(suite, section: str, capsys: pytest.CaptureFixture) -> tuple[bool, list[dict]]:
    """(whether all is as it should be, the rows) of a section's process, in this one."""
    with pytest.raises(SystemExit) as ended:
        suite.work(section, smoke=True)
    return not ended.value.code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.processes
def test_every_section_runs_and_its_figures_are_in_the_table_and_the_json(tmp_path: Path):
    out = tmp_path / "suite.json"
    command = [sys.executable, str(BENCH / "gpu_suite.py"), "--smoke", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["device"] == "cpu" and list(result["sections"]) == [
        "train", "peer", "bits", "profile", "attention", "numerics", "checkpoint", "loader",
    ]  # fmt: skip
    rows = {name: [r for r in section["rows"] if "jax" not in r] for name, section in result["sections"].items()}
    assert [row["batches"] for row in rows["train"]] == ["one", "loader"]
    assert all(row["tokens_per_s"] > 0 for row in rows["train"])
    assert rows["train"][0]["planned_gib"] > rows["train"][0]["parameters_gib"] + rows["train"][0]["moments_gib"] > 0
    [peer] = rows["peer"]
    if "skipped" not in peer:
        ours = rows["train"][0]["tokens_per_s"]
        assert peer["k2jax_over_torch"] == pytest.approx(ours / peer["tokens_per_s"], abs=1e-3)
    launches = {row["launch"]: row for row in rows["bits"]}
    assert [(row["equal"], row["steps"]) for row in launches.values()] == [(True, 30)] * 2
    assert 5 <= launches["killed and resumed"]["killed_after_step"] < 30
    everything, *kinds = rows["profile"]
    assert everything["ms"] == pytest.approx(sum(row["ms"] for row in kinds), rel=1e-3)
    assert {"matrix products", "optimizer, norms"} <= {row["kind"] for row in kinds}
    assert [row["ok"] for row in rows["numerics"]] == [True, True] and all(row["repeats"] for row in rows["numerics"])
    assert {row["attention"] for row in rows["attention"]} == {"flash", "jnp"}
    assert rows["checkpoint"][0]["stall_s"] > 0 and rows["loader"][0]["loader_tokens_per_s"] > 0
    for word in ("tokens_per_s", "both_tflop_s", str(rows["loader"][0]["loader_tokens_per_s"])):
        assert word in done.stdout


# ---- nothing is silent -----------------------------------------------------------------------------------------------


def test_a_section_that_fails_is_named_and_the_others_run(suite, monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setitem(suite.BENCH, "loader", ([], ["--no-such-option"]))
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["gpu_suite.py", "--smoke", "--sections", "loader", "checkpoint"])
    with pytest.raises(RunError, match="^failed: loader; the others are good"):
        suite.main()
    sections = json.loads((tmp_path / "gpu_suite.json").read_text())["sections"]
    assert "unrecognized arguments: --no-such-option" in sections["loader"]["error"]
    assert "unrecognized" in sections["loader"]["rows"][0]["not run"]
    assert sections["checkpoint"]["error"] is None and "checkpoint: done" in capsys.readouterr().out


def test_a_section_that_takes_too_long_is_ended_and_its_cases_are_told(suite, monkeypatch):
    monkeypatch.setattr(suite, "WORTH_S", 0)
    found = suite.run_section("train", True, 0.05, suite.environment(True, ""))
    assert found["error"] == "took more than 0.05 s"
    assert [(row["batches"], row["not run"]) for row in found["rows"]] == [
        ("one", "took more than 0.05 s"), ("loader", "took more than 0.05 s"),
    ]  # fmt: skip


def test_without_time_left_no_section_begins_and_every_case_is_told(suite):
    found = suite.run_all(list(suite.SECTIONS), smoke=False, minutes=0.0)
    assert all(section["error"] == "not begun: 0 s were left" for section in found.values())
    for name, section in found.items():
        assert len(section["rows"]) == len(suite.SECTIONS[name].cases(False)) > 0
        assert all(row["not run"] == section["error"] and not row["ok"] for row in section["rows"])


def test_cases_that_have_a_row_are_not_told_again(suite):
    case, *others = suite.SECTIONS["attention"].cases(False)
    assert suite.without_a_row("attention", False, [case | {"both_ms": 1.0}]) == others
    for name, section in suite.SECTIONS.items():
        cases = [tuple(case.items()) for case in section.cases(False)]
        assert len(set(cases)) == len(cases), f"{name}: a row would be taken for two cases'"


def test_what_was_asked_comes_in_the_suites_order(suite, monkeypatch):
    monkeypatch.setattr(suite, "run_section", lambda name, *_: {"error": None, "wall_s": 0.0, "rows": []})
    assert list(suite.run_all(["loader", "numerics", "train"], True, 9.0)) == ["train", "numerics", "loader"]


def test_wrong_numbers_fail_the_numerics(suite, monkeypatch, capsys):
    """Here because no error is small enough; a section that raises at once fails in the same way."""
    import gpu_suite_attention

    monkeypatch.setitem(gpu_suite_attention.ERROR_LIMITS, "bfloat16", 0.0)
    good, (_, wrong, right) = worker(suite, "numerics", capsys)
    assert not good and (wrong["dtype"], wrong["ok"]) == ("bfloat16", False) and right["ok"]


def test_a_number_that_is_none_is_an_error(suite):
    from gpu_suite_attention import worst

    good = [np.ones((2, 3, 4, 5), np.float32)] * 4
    expected = {(0, 0): [x[:1, :, :2] for x in good], (1, 1): [x[1:, :, 2:] for x in good]}
    assert worst(good, expected, 2)["ok"]
    for at in ((0, 0, 0, 0), (1, 2, 3, 4)):
        bad = [x.copy() for x in good]
        bad[2][at] = np.nan
        assert not worst(bad, expected, 2)["ok"]


def test_what_raises_is_a_row_that_failed_and_what_cannot_be_here_is_not(suite):
    from gpu_suite_cases import tried

    def no_memory():
        raise MemoryError("out of it")

    def no_hopper():
        raise NotImplementedError("needs a Hopper GPU")

    assert tried({"a": 1}, no_memory) == {"a": 1, "ok": False, "error": "MemoryError: out of it"}
    assert tried({"a": 1}, no_hopper) == {"a": 1, "skipped": "needs a Hopper GPU"}


# ---- the peer is the same model --------------------------------------------------------------------------------------


def test_pytorch_has_the_same_loss_and_gradients_of_the_same_weights(suite):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from gpu_suite_peer import loss_of, make_model, steps
    from gpu_suite_training import get_config

    from k2jax.hf.layout import tensors
    from k2jax.training.optimizer import init_state
    from k2jax.training.step import loss_sums

    c = get_config(True, "precision.compute=float32")
    model, stage = make_model(c, "cpu"), c.stages[0]
    params = jax.device_get(init_state(c.model, 0).params)
    weights, table = dict(model.named_parameters()), tensors(c.model)
    assert {t.name for t in table} == set(weights)
    with torch.no_grad():
        for t in table:
            ours = params[t.array] if t.layer is None else params[t.array][t.layer]
            weights[t.name].copy_(torch.from_numpy(t.to_hf(ours).copy()))
    tokens = np.random.default_rng(0).integers(0, c.model.vocab_size, (4, stage.sequence_length + 1))

    def loss(params):
        rows = jnp.asarray(tokens, jnp.int32), jnp.zeros(4, jnp.int32)
        options = {"config": c, "stage": stage, "eos_id": 2, "num_subsets": 1, "compute_dtype": jnp.float32}
        return loss_sums(params, *rows, **options)[0] / (4 * stage.sequence_length)

    ours, grads = jax.jit(jax.value_and_grad(loss))(params)
    theirs = loss_of(model, torch.from_numpy(tokens))
    assert theirs.item() == pytest.approx(float(ours), rel=1e-6)
    theirs.backward()
    for t in table:
        found = t.from_hf(weights[t.name].grad.numpy())
        expected = grads[t.array] if t.layer is None else grads[t.array][t.layer]
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), err_msg=t.name)
    # A step's loss is the mean over its microbatches, and steps learn.
    first, *_, last = (next(training) for training in [steps(c, model, torch.from_numpy(tokens), "cpu")] * 4)
    assert first == pytest.approx(float(ours), rel=1e-6) and last < first


def test_the_ratio_is_to_our_best_on_one_batch(suite):
    from gpu_suite_peer import compared

    one = {"batches": "one", "deterministic": True}
    rows = [one | {"attention": "cudnn", "tokens_per_s": 60.0}, one | {"attention": "mosaic", "tokens_per_s": 66.0}]
    rows += [one | {"attention": "cudnn", "error": "none"}, {"device": "GPU", "jax": "0"}]
    rows += [one | {"attention": "cudnn", "tokens_per_s": 90.0, key: value}
             for key, value in {"batches": "loader", "deterministic": False}.items()]  # fmt: skip
    row = compared({"peer": "torch", "tokens_per_s": 60.0}, rows)
    assert (row["k2jax_attention"], row["k2jax_over_torch"]) == ("mosaic", 1.1)
    for peer, ours in (({"peer": "torch", "skipped": "no torch"}, rows), ({"tokens_per_s": 60.0}, rows[2:3])):
        assert compared(peer, ours) == peer


def test_without_pytorch_the_peer_is_skipped_and_says_so(suite, monkeypatch, capsys):
    import gpu_suite_peer

    monkeypatch.setattr(gpu_suite_peer.importlib.util, "find_spec", lambda name: None)
    good, rows = worker(suite, "peer", capsys)
    assert good and rows == [{"peer": "torch", "skipped": "torch and transformers not installed"}]


# ---- bits ------------------------------------------------------------------------------------------------------------


def write_ledger(workdir: Path, losses: list[float], checkpoints: dict[int, str]) -> Path:
    (workdir / "ledger").mkdir(parents=True)
    ledger = Ledger(workdir / "ledger", lambda step: 1)
    for step, loss in enumerate(losses, 1):
        ledger.append_step(step, "batch", loss, 1.0, True, False)
    for step, digest in checkpoints.items():
        ledger.append_record(step, {"checkpoint": digest, "order": "o", "config": "c"})
    return workdir


def test_ledgers_are_compared_and_the_first_difference_is_told(suite, tmp_path: Path):
    from gpu_suite_bits import ledgers_differ

    losses = [3.0, 2.5, 2.25]
    first = write_ledger(tmp_path / "first", losses, {2: "a"})
    assert ledgers_differ(first, write_ledger(tmp_path / "same", losses, {2: "a"})) == {
        "equal": True, "steps": 3, "checkpoints": 1,
    }  # fmt: skip
    cases = {
        "loss": ([3.0, np.nextafter(np.float32(2.5), 3), 2.25], {2: "a"}, ("first_step", 2, "loss")),
        "short": (losses[:2], {2: "a"}, ("first_step", 3, "missing")),
        "state": (losses, {2: "b"}, ("first_checkpoint", 2, "checkpoint")),
        "unsaved": (losses, {}, ("first_checkpoint", 2, "missing")),
    }
    for name, (others, saved, (key, at, what)) in cases.items():
        row = ledgers_differ(first, write_ledger(tmp_path / name, others, saved))
        assert not row["equal"] and row[key] == at and row["what"].split(",")[0] == what, (name, row)


# ---- the profile -----------------------------------------------------------------------------------------------------

KERNELS = {
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopB_TNT": "matrix products",
    "gemm_fusion_dot_12": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": "matrix products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128": "attention forward",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128": "attention backward",
    "cudnn::fusion::compute_dot_do_o_specialized<true, cudnn::fusion::NUM_MTILES>": "attention backward",
    "flash_attention_forward": "attention forward",
    "flash_attention_dkv": "attention backward",
    "flash_attention_dq": "attention backward",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "collectives",
    "MemcpyD2D": "memcpy",
    "memcpy32_post": "memcpy",
    "loop_add_multiply_fusion": "arithmetic",
    "loop_convert_fusion_3": "casts",
    "wrapped_concatenate": "copies",
    "loop_broadcast_fusion": "copies",
    "input_transpose_fusion": "copies",
    "input_scatter_fusion": "gathers and scatters",
    "input_reduce_fusion_7": "sums",
    "loop_select_fusion_2": "optimizer, norms",
    "input_reduce_fusion_8": "optimizer, norms",
    "wrapped_sqrt": "optimizer, norms",
    "mystery": "other",
}
PROGRAM = """
  %loop_add_multiply_fusion = f32[8]{0} fusion(%x), kind=kLoop, metadata={op_name="jit(train_step)/while/body/add"}
  %input_reduce_fusion.7 = f32[8]{0} fusion(%x), metadata={op_name="jit(train_step)/while/body/jvp()/reduce_sum"}
  %loop_select_fusion.2 = (f32[8]{0}, f32[8]{0}) fusion(%x), metadata={op_name="jit(train_step)/jit(_where)/select_n"}
  %input_reduce_fusion.8 = f32[8]{0} fusion(%x), metadata={op_name="jit(train_step)/reduce_sum"}
  ROOT %wrapped_sqrt = f32[] fusion(%x), metadata={op_name="jit(train_step)/sqrt"}
"""


def test_kernels_are_of_their_kind(suite):
    from gpu_suite_profile import Kernel, by_kind, kind_of, op_names

    places = op_names(PROGRAM)
    assert {name: kind_of(Kernel(name, "", 1.0), places) for name in KERNELS} == KERNELS
    assert kind_of(Kernel("anything_fusion", "loop_select_fusion.2", 1.0), places) == "copies"
    runs = [Kernel("gemm_a", "", 3e6), Kernel("gemm_a", "", 5e6), Kernel("gemm_b", "", 4e6), Kernel("memcpy", "", 4e6)]
    everything, products, copies = by_kind(runs, {}, steps=2)
    assert everything == {"kind": "all", "ms": 8.0, "calls": 2.0}
    assert products == {
        "kind": "matrix products", "ms": 6.0, "calls": 1.5, "longest": "gemm_a 4.00, gemm_b 2.00", "share": 0.75,
    }  # fmt: skip
    assert (copies["kind"], copies["ms"], copies["share"]) == ("memcpy", 2.0, 0.25)


def test_of_a_gpus_trace_only_its_streams_count(suite, tmp_path: Path):
    """Other lines have the same time again. The file is one that JAX's profiler would write, made from text."""
    from gpu_suite_profile import Kernel, read_trace

    events = "events { metadata_id: 1 duration_ps: 2000000 stats { metadata_id: 1 str_value: 'fusion.1' } }"
    plane = "name: '/device:GPU:0' event_metadata { key: 1 value { id: 1 name: 'loop_fusion' } } "
    plane += "stat_metadata { key: 1 value { id: 1 name: 'hlo_op' } } "
    plane += f"lines {{ name: 'Stream #7(Compute)' {events} {events} }} lines {{ name: 'XLA Ops' {events} }}"
    data = jax.profiler.ProfileData.text_proto_to_serialized_xspace(f"planes {{ {plane} }}")
    (tmp_path / "made.xplane.pb").write_bytes(data)
    assert read_trace(tmp_path / "made.xplane.pb") == [Kernel("loop_fusion", "fusion.1", 2000.0)] * 2


# ---- documents by cuDNN ----------------------------------------------------------------------------------------------


def test_documents_are_packed_as_the_call_takes_them(suite, monkeypatch):
    """Where each begins and how long it is, -1 after the last; two rows with other documents each."""
    import gpu_suite_attention
    from jax._src.cudnn import fused_attention_stablehlo

    told = {}
    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", lambda *qkv, **how: told.update(how))
    monkeypatch.setattr(gpu_suite_attention, "MOST_DOCUMENTS", 4)
    q = jnp.zeros((2, 7, 1, 16))
    gpu_suite_attention.cudnn_packed(q, q, q, jnp.array([[0, 0, 0, 1, 2, 2, 2], [0] * 7]))
    assert told["q_seqlen"].tolist() == told["kv_seqlen"].tolist() == [[3, 1, 3, -1], [7, -1, -1, -1]]
    assert told["q_offsets"].tolist() == told["kv_offsets"].tolist() == [[0, 3, 4, -1, -1], [0, -1, -1, -1, -1]]
    assert (told["scale"], told["mask_type"].name) == (0.25, "PADDING_CAUSAL")


PACKED = """
from k2jax.plan import topologies
topologies.use_tpu_compiler()
import jax, jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from gpu_suite_attention import cudnn_packed, with_gradients
fused_attention_stablehlo.check_compute_capability = lambda capability: True  # it asks the device, which is not here
place = jax.sharding.SingleDeviceSharding(topologies.devices("h100:1")[0])
q = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16, sharding=place)
ids = jax.ShapeDtypeStruct((2, 256), jnp.int32, sharding=place)
text = with_gradients(cudnn_packed).lower(q, q, q, q, ids).compile().as_text()
print(text.count('custom_call_target="__cudnn$fmha'), text.count('"mask_type": "PADDING_CAUSAL"'))
"""


@on_gpu_compiler
def test_packed_documents_compile_for_an_h100(tmp_path: Path):
    path = f"{REPOSITORY}:{BENCH}"
    assert run_compiling(PACKED, tmp_path, {"PYTHONPATH": path}) == "2 2\n"


def test_cudnn_masks_no_documents_of_grouped_heads(suite):
    names = {(c["documents"], c["heads"] == c["kv_heads"]): set() for c in suite.SECTIONS["attention"].cases(False)}
    for case in suite.SECTIONS["attention"].cases(False):
        names[case["documents"], case["heads"] == case["kv_heads"]].add(case["attention"])
    ours = {"mosaic", "mosaic_ahead", "flash"}
    assert names == {
        (False, True): {"cudnn", "jnp", *ours}, (False, False): {"cudnn", *ours},
        (True, True): {"cudnn_packed", *ours}, (True, False): ours,
    }  # fmt: skip


def test_documents_are_counted_in_the_arithmetic(suite):
    from gpu_suite_attention import draw, pairs_seen

    assert pairs_seen(None, 2, 8) == 64.0
    assert pairs_seen(np.array([[0, 0, 1, 1], [0, 0, 0, 0]]), 2, 4) == 4.0 + 8.0
    case = {"rows": 2, "length": 64, "heads": 1, "kv_heads": 1, "head_dim": 8, "dtype": "float32", "documents": True}
    document_BT = draw(case).document_BT
    assert (np.diff(document_BT) >= 0).all() and document_BT[:, -1].tolist() == [7, 7]


def test_a_profile_that_fails_is_a_row(suite, monkeypatch, capsys):
    import gpu_suite_training

    monkeypatch.setattr(gpu_suite_training, "Training", lambda *_: SimpleNamespace())
    good, (_, row) = worker(suite, "profile", capsys)
    assert not good and row["kind"] == "all" and "AttributeError" in row["error"]
