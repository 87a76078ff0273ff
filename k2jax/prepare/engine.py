"""Runs the stages of a preparation on datatrove's executors: processes of this machine, Ray, or Slurm."""

from collections.abc import Callable
from typing import NamedTuple


class Stage(NamedTuple):
    """A part of a preparation: `function(rank)` for every rank from 0 to `tasks`, in any order, on any machine.

    A task writes files of its own, whole or not at all, and the same bytes whenever it runs; it may be killed and run
    again. `function` is a module's function, or a partial of one, so that it can be sent to another process.
    """

    name: str
    tasks: int
    function: Callable[[int], None]
