"""What a preparation would do: of each stage whether it is done, how much of it is, or why it is done again.

Reads what the command itself reads before its first stage, and writes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from k2jax.prepare import before, claim, clean, dealing, finished, made, plan
from k2jax.prepare.made import Made, Unit

OF_STEPS = ("files", "deduplicate", "shared", "kept", "shards")  # of which later steps are known by the earlier ones


def look(
    config: ConfigDict, out: str | Path, *, other_code: bool = False, redo: Sequence[str] = ()
) -> list[str]:
    """A line a stage; the options are build's.

    Raises ConfigError and StorageError where the command itself would, before it writes.
    """
    config, out = claim.numbered(config), Path(out).absolute()
    data = finished.read(out) if (out / "data.json").exists() else None
    finished.check_redo(config, out, data, redo)
    changed = list(finished.changes(data, config).values()) if data else []
    if data and finished.is_left(config, out, data, other_code or bool(redo)):
        return [f"{out}: finished, it is left as it is"]
    if data and not claim.has_stages(out):
        finished.check_possible(config, out, data)
        return [f"data.json and card: written anew ({'; '.join(changed)})"]
    before.check_apart(config, out)
    given = before.given(config)
    listing = clean.check(config)
    whole = dealing.settled(config, listing)
    wanted = plan.units(whole, plan.facts(whole, listing, given.tokenizer, given.told()))
    claim.check_folder(out, other_code)
    plan.check_names(wanted, redo)
    begun = Made(out, redo, plan.read_again(whole, out))
    found = _lines(begun, wanted)
    is_complete = data and not changed and not begun.stale(wanted) and wanted.keys() <= begun.rows.keys()
    why = f" ({'; '.join(changed)})" if changed else ""
    return [*found, f"data.json and card: {'done' if is_complete else f'to be written{why}'}"]


def _lines(begun: Made, wanted: dict[str, Unit]) -> list[str]:
    stale = begun.stale(wanted)
    again = {line.partition(":")[0]: line for line in made.lines(stale, wanted)}
    found = []
    for stage in dict.fromkeys(name.partition("/")[0] for name in [*wanted, *stale]):
        units = plan.of_stage(wanted, stage)
        kept = [name for name in units if name in begun.rows and name not in stale]
        complete, num_tasks = begun.done(kept)
        if line := again.get(f"stage {stage}"):
            found.append(line + (f"; {complete:,} tasks stay done" if complete else ""))
            continue
        followed = any(stage in {one.partition("/")[0] for one in row["follows"]} for row in begun.rows.values())
        whole = complete == num_tasks and len(kept) == len(units) and (followed or stage not in OF_STEPS)
        part = f"partly done ({complete:,} of {num_tasks:,} tasks)"
        found.append(f"stage {stage}: {'to do' if not kept else 'done' if whole else part}")
    return found
