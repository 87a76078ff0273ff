"""The TPU's and the GPU's compilers in tests: both run without a device, in a process of their own.

`make test-compilers` runs what is marked so, and CI does. `make test` leaves it out: it takes minutes, and concerns
those alone who touch kernels, the sharding of a step, or the plan.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY

HAS_TPU_COMPILER = importlib.util.find_spec("libtpu") is not None
HAS_GPU_COMPILER = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def on_tpu_compiler(test: Callable) -> Callable:
    """Marks a test."""
    skip = pytest.mark.skipif(not HAS_TPU_COMPILER, reason="needs the TPU's compiler (the extra `tpu`)")
    return pytest.mark.compilers(skip(test))


def on_gpu_compiler(test: Callable) -> Callable:
    """Marks a test."""
    skip = pytest.mark.skipif(not HAS_GPU_COMPILER, reason="needs JAX's CUDA plugin (the extra `gpu`)")
    return pytest.mark.compilers(skip(test))


def run_compiling(code: str, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """What a program prints that compiles for devices that are not here."""
    found_in = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"}  # compiled_step.py is of the tests
    of_process = os.environ | found_in | (environment or {})
    of_process.pop("JAX_COMPILATION_CACHE_DIR")  # nothing is looked for in a cache: it is what the compiler does
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=of_process, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
