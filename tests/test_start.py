"""From the command to the first step: what is compiled before it, and that the first state costs no bits."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import runs

from k2jax import train
from k2jax.errors import ConfigError
from k2jax.parallel import fsdp, xla_options
from k2jax.run.saved import open_step
from k2jax.training import step
from k2jax.training.optimizer import first_state
from k2jax.training.placement import begin_state, mesh_of, place_state
from k2jax.training.program import compile_lowered

REPO = Path(__file__).parent.parent
PROGRAMS = 4  # the first state, the step; with the constants that the two are given


def test_training_imports_nothing_that_it_does_not_use():
    others = "torch, transformers, tensorflow, datasets, pandas, matplotlib, lm_eval, plotly, wandb, scipy"
    code = f"import sys, k2jax.train; print(*set(sys.modules) & set({others.split(', ')!r}))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert not answer.stdout.split()


def test_few_programs_are_compiled_before_the_first_step(tiny_config, tmp_path, monkeypatch):
    """A program that is not needed for it (of a digest, a probe, an evaluation) is compiled later."""
    compiled: list[str] = []

    def count(event: str, _seconds: float, **about: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about.get("fun_name", "?"))

    before: list[int] = []
    noted = train.note_first_step

    def note(*given: object) -> None:  # after every step
        before.append(len(compiled))
        noted(*given)

    monkeypatch.setattr(train, "note_first_step", note)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        train.train(tiny_config(), tmp_path / "run")
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert 2 <= before[0] <= PROGRAMS, compiled[: before[0]]


def test_the_first_state_has_the_bits_that_the_usual_optimisation_gives(tiny_config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # read long ago by XLA itself; the tests' would be kept
    config = tiny_config()
    mesh = mesh_of(config)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: first_state(config))
        shardings = place_state(config, shapes, mesh)
        made = begin_state(config, shardings)()
        usual = jax.jit(lambda: first_state(config), out_shardings=shardings).lower()
        usual = usual.compile(compiler_options={"xla_backend_optimization_level": "3"})()  # tests have none
    for name, value in usual.params.items():
        assert np.array_equal(value, made.params[name]), name
    assert jax.tree.structure(made) == jax.tree.structure(usual)


@pytest.mark.parametrize("dtype, copies", [("float32", 0), ("bfloat16", None)])
def test_no_weight_gradient_makes_a_transposed_copy_of_its_input(dtype, copies):
    """In float32; numbers are those of einsum in both types."""
    x = jax.random.normal(jax.random.key(0), (2, 96, 48), dtype)
    w = jax.random.normal(jax.random.key(1), (48, 5, 16))
    dy = jax.random.normal(jax.random.key(2), (2, 96, 5, 16), dtype)

    def gradient(x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda w: fsdp.matmul(x, w, 0, x.dtype), w)[1](dy)[0]

    lowered = jax.jit(gradient).lower(x, w, dy)
    found = gradient(x, w, dy)
    assert found.shape == w.shape and found.dtype == jnp.float32
    wanted = jnp.einsum("bti,btnh->inh", x.astype(jnp.float32), dy.astype(jnp.float32))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
    if copies is not None:
        assert len(re.findall(r"= \S+ (?:transpose|copy)\(", lowered.compile().as_text())) == copies


def test_a_cpus_compiler_gets_the_options_of_its_kind_but_those_of_the_environment(
    tiny_config, monkeypatch: pytest.MonkeyPatch
):
    lowered = jax.jit(lambda x: x + 1).lower(jnp.zeros(3))
    compile_lowered(lowered, tiny_config())
    monkeypatch.setitem(xla_options.BY_KIND, "cpu", {"xla_no_such_option": "1"})
    with pytest.raises(ConfigError, match="compiler.defaults=True: .* no option 'xla_no_such_option': set"):
        compile_lowered(lowered, tiny_config())
    compile_lowered(lowered, tiny_config(**{"compiler.defaults": False}))
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_option=2")  # read long ago, by XLA itself
    compile_lowered(lowered, tiny_config())


def test_a_run_records_the_type_that_it_computed_in_and_goes_on_in_it(tiny_config, tiny_run: Path, tmp_path: Path):
    assert tiny_config().precision.compute == "auto"
    run = runs.copy_run(tiny_run, tmp_path / "run")
    assert open_step(run).config.precision.compute == "float32"
    other = tiny_config(**{"precision.compute": "bfloat16"})  # what "auto" is on another platform
    with pytest.raises(ConfigError, match="precision.compute.*float32.*bfloat16"):
        train.train(other, run)


@pytest.mark.parametrize("microbatches, times", [(1, 1), (2, 2)])
def test_the_forward_pass_is_traced_no_more_than_it_must_be(microbatches, times, tiny_config, monkeypatch):
    """Once; and once for what a loop over microbatches adds up. Each more costs every start."""
    config, traced, loss_sums = tiny_config(), [], step.loss_sums
    monkeypatch.setattr(step, "loss_sums", lambda *given, **named: traced.append(1) or loss_sums(*given, **named))
    rows = jax.ShapeDtypeStruct((microbatches, 2, 33), jnp.int32), jax.ShapeDtypeStruct((microbatches, 2), jnp.int32)
    given = dict(config=config, stage=config.stages[0], eos_id=2, num_subsets=3, compute_dtype=jnp.float32)
    params = jax.eval_shape(lambda: first_state(config)).params
    jax.eval_shape(lambda *arrays: step.summed_gradients(*arrays, **given), params, *rows)
    assert len(traced) == times
