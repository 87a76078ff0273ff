"""Runs a preparation's stages, each noted in made.json before it writes anything."""

from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

from k2jax.prepare import plan
from k2jax.prepare.engine.engine import Engine, Stage
from k2jax.prepare.made import Made, Unit, lines


class Work:
    """An engine that knows what each stage is made of; `units` are plan.units'."""

    def __init__(self, engine: Engine, made: Made, units: dict[str, Unit]):
        self.units, self._engine, self._made = units, engine, made

    def is_complete(self) -> bool:
        """Whether every unit was begun, of what there is now."""
        return self.units.keys() <= self._made.rows.keys() and not self._made.stale(self.units)

    def stale_lines(self) -> list[str]:
        """What of the folder is not of this recipe, and why."""
        return lines(self._made.stale(self.units), self.units)

    def remove_stale(self) -> None:
        """Removes that."""
        if stale := self._made.stale(self.units):
            self._made.remove(list(stale))

    def again(self, stage: str, ranks: Iterable[int]) -> None:
        """Lets these tasks of a stage, which have ended, run once more."""
        self._made.remove_marks(stage, ranks)

    def describe(self, name: str, **known: Any) -> None:
        """Says of a unit what is known only now: its ranks, or its outputs."""
        self.units[name] = self.units[name]._replace(**known)

    def begin(self, name: str) -> None:
        """Notes what has no tasks: "template", "tokenizer"."""
        self._made.begin(plan.of_stage(self.units, name))

    def run(self, stage: Stage, name: str = "") -> None:
        """Runs what is not complete of a stage, which is of the units `name_of` it."""
        units = plan.of_stage(self.units, self.name_of(stage, name))
        assert units or not stage.tasks, stage.name
        self._made.begin(units, stage.name, stage.tasks)
        self._engine.run(stage)

    def of(self, name: str) -> Any:
        """What runs stages as of these units, whatever they are called."""
        return SimpleNamespace(run=partial(self.run, name=name))

    def name_of(self, stage: Stage, name: str = "") -> str:
        """`name`, else what the stage's own begins with: "limits-0" is of "limits"."""
        names = dict.fromkeys(one.partition("/")[0] for one in self.units)
        return name or next((one for one in names if f"{stage.name}-".startswith(f"{one}-")), "")

    def begin_files(self) -> None:
        """Subsets are dealt out together: where one is new, what was found on the way to others is not gone on with."""
        files = plan.of_stage(self.units, "files")
        new = [unit for name, unit in files.items() if name not in self._made.rows]
        if new:
            for folder in [path for pattern in ("cuts", "limits-*") for path in self._engine.folder.glob(pattern)]:
                self._made.remove_marks(folder.name)
        self._made.remove_outputs(output for unit in new for output in unit.outputs)
        self.begin("files")
