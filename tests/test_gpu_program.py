"""The training step as the GPU's compiler has it: nothing is copied or computed twice, and every sum has one order.

Of a model as wide as experiments/k2_1b.py, with two layers, on one H100. What a GPU must tell is gpu_suite.py's.
"""

import json
import re
from pathlib import Path

import pytest
from compilers import on_gpu_compiler, run_compiling

COMPILE = """
import json
from k2jax.plan import topologies
topologies.use_tpu_compiler()
import jax
from k2jax import config
from k2jax.plan import estimate
from k2jax.plan.chips import chip_of
from k2jax.plan.hlo import Program
from k2jax.plan.links import Links
from k2jax.plan.timeline import Timeline
from k2jax.run import tuning
from k2jax.training.placement import mesh_of
from k2jax.training.program import compile_lowered
devices = topologies.devices("h100:1")
sizes = ["model.num_layers=2", "stages.0.rows_per_step=32", "stages.0.microbatches=4"]
for name, more in {"apart": [], "scanned": ["model.unroll=1"]}.items():
    c = config.load(EXPERIMENT, [*sizes, *more])
    mesh = mesh_of(c, devices)
    tuned = tuning.Tuning({tuning.CACHE: "/nowhere", tuning.MODE: "AUTOTUNE_CACHE_MODE_READ"})
    with jax.set_mesh(mesh):
        compiled = compile_lowered(estimate.lower(c, 0, mesh), c, tuned)
    text = compiled.as_text()
    parts = Timeline(Program(text), chip_of("h100"), Links(chip_of("h100"), devices)).step()
    open(f"{name}.txt", "w").write(text)
    print(json.dumps([name, parts.copied, parts.total, compiled.memory_analysis().temp_size_in_bytes]))
"""
LAYERS, MICROBATCHES = 2, 4


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[float]], dict[str, str]]:
    """({how the layers are: [bytes copied, seconds a step, bytes of temporaries]}, {the same: the program})."""
    folder = tmp_path_factory.mktemp("gpu_program")
    experiment = Path(__file__).parents[1] / "experiments" / "k2_1b.py"
    lines = run_compiling(f"EXPERIMENT = {str(experiment)!r}\n{COMPILE}", folder).splitlines()
    found = {name: values for name, *values in map(json.loads, lines)}
    return found, {name: (folder / f"{name}.txt").read_text() for name in found}


@on_gpu_compiler
def test_next_to_nothing_is_copied_where_layers_are_apart(compiled):
    """What is left: blocks of the loss, and the sums' start. A scan copies what each of its turns keeps."""
    apart, scanned = (compiled[0][name] for name in ("apart", "scanned"))
    assert apart[0] < 6e9 < 30e9 < scanned[0], "bytes"
    assert apart[1] < 0.95 * scanned[1], "estimated seconds of a step"
    assert apart[2] < scanned[2], "bytes of temporaries"


@on_gpu_compiler
def test_attention_runs_once_forward_and_once_backward_a_layer(compiled):
    text = compiled[1]["apart"]
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == LAYERS
    assert text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == LAYERS


@on_gpu_compiler
def test_every_sum_has_one_order(compiled):
    """A scatter whose places may come twice adds them as its threads come."""
    for name, text in compiled[1].items():
        scatters = re.findall(r" scatter\(.*", text)
        assert scatters and all("unique_indices=true" in line for line in scatters), name


@on_gpu_compiler
def test_gradients_are_added_in_their_products(compiled):
    """None of a matrix's own: the sum so far goes into the product, which writes it back."""
    text = compiled[1]["apart"]
    sums = re.findall(r"= f32\[(?:2048,5504|5504,2048|2048,2048)\]\S* fusion\(.*kind=kLoop", text)
    assert not sums, sums[:3]
    assert not re.findall(r"= bf16\[8,2048,16,\S* concatenate\(", text), "RoPE's halves are put together"
