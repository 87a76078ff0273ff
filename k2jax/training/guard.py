"""The guard on numerics: what the recorded metrics say, and when they end a run. A step that is not finite changed
nothing (step.py); several in a row are no accident."""

import math

from k2jax.errors import NumericsError
from k2jax.training.metrics import Recorder


def check_steps(recorder: Recorder, most: int) -> None:
    """Raises NumericsError once `most` steps in a row, up to the last recorded one, were not finite."""
    if recorder.skips_in_a_row >= most:
        step = recorder.last_row["step"]
        raise NumericsError(
            f"loss or gradient not finite in {recorder.skips_in_a_row} steps in a row, up to step {step}; no update "
            f"was made in them; the data: tools/which_docs.py --step {step}"
        )


def check_parameters(recorder: Recorder) -> None:
    """Raises NumericsError when the last recorded step left a parameter that is not finite: it is not saved."""
    if not math.isfinite(recorder.last_row["param_norm"]):
        raise NumericsError(
            f"step {recorder.last_row['step']}: parameters are not finite: nothing is saved; go back to an earlier "
            f"checkpoint"
        )
