"""What changed near a step, of all that a run writes down: decisions, stages, learning rate, epochs, launches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from k2jax.data.epochs import Epoch
from k2jax.data.journal import Entry
from k2jax.data.launches import Launch
from k2jax.data.order import Order

NEAR = 200  # steps
JUMP = 0.1  # of the learning rate, as a share: beyond what the schedule says
PARTS = ("host", "commit", "versions", "devices", "host_hardware", "flags")  # of a launch


class Change(NamedTuple):
    """Something that was another way before."""

    step: int  # the first that it holds for
    kind: str  # "journal", "stage", "warm-up", "learning rate", "configuration", "launch"
    what: str
    keys: tuple[str, ...] = ()  # that changed: of the configuration, or of a launch
    ratio: float | None = None  # of the learning rate: now / before


def changes(
    step: int,
    *,
    rows: Sequence[Mapping[str, Any]],
    epochs: Sequence[Epoch],
    journal: Sequence[Entry],
    order: Order,
    launches: Sequence[Launch],
    scheduled: Callable[[Epoch, int], float | None],
) -> list[Change]:
    """All within NEAR steps before `step`, the nearest first.

    Args:
        rows: of metrics.
        order: as it was at the step.
        scheduled: (epoch, step) to the learning rate that its configuration has for the step; None where it has none.
    """
    found = [*_decisions(journal), *_stages(order, epochs), *_epochs(epochs), *_launches(launches)]
    found += _learning_rates(rows, epochs, order, scheduled)
    near = [change for change in found if step - NEAR <= change.step <= step]
    return sorted(near, key=lambda change: (-change.step, change.kind))


def _decisions(journal: Sequence[Entry]) -> Iterable[Change]:
    for entry in journal:
        if type(entry.get("at_step")) is int and entry["kind"] != "no_update":  # that is what is to be explained
            how = f" ({entry['how']})" if "how" in entry else ""
            what = f"{entry['kind']}{how}: {entry.get('why', 'no reason given')}"
            yield Change(entry["at_step"] + 1, "journal", what)


def _stages(order: Order, epochs: Sequence[Epoch]) -> Iterable[Change]:
    config = epochs[-1].config
    while order is not None:
        for plan in order.stages:
            row = config["stages"][plan.index] if plan.index < len(config["stages"]) else {}
            size = f"rows of {plan.sequence_length} tokens, {plan.rows_per_step} a step"
            what = f"stage {plan.name} begins: {size}, of {', '.join(row.get('mix', {}))}"
            if plan.first_step <= plan.last_step and plan.first_step > 1 and not plan.done:
                yield Change(plan.first_step, "stage", what)
            warm = row.get("warmup_steps", 0)
            if warm:
                end = plan.first_step - plan.done + warm
                yield Change(end, "warm-up", f"the warm-up of {plan.name} is over, after {warm} steps")
        order = order.past


def _epochs(epochs: Sequence[Epoch]) -> Iterable[Change]:
    for epoch in epochs[1:]:
        what = "; ".join(f"{key}: {before!r} -> {now!r}" for key, (before, now) in epoch.changes.items())
        origin = f"; from {epoch.origin['kind']}" if epoch.origin and "kind" in epoch.origin else ""
        what = f"epoch {epoch.number}: {what or 'as before'}{origin}"
        yield Change(epoch.after_step + 1, "configuration", what, tuple(epoch.changes))


def _launches(launches: Sequence[Launch]) -> Iterable[Change]:
    for before, now in zip([None, *launches], launches, strict=False):
        if before is None:
            continue
        keys = tuple(part for part in PARTS if before.get(part) != now.get(part))
        differing = [f"{part}: {_told(before.get(part), now.get(part))}" for part in keys]
        what = f"launched again at {now['time']}: {'; '.join(differing) or 'same host, versions and devices'}"
        yield Change(first_step(now), "launch", what, keys)


def first_step(launch: Launch) -> int:
    """The first that a launch made."""
    noted = launch.get("first_step")
    return noted["step"] if isinstance(noted, dict) else (launch.get("newest_step") or 0) + 1


def _told(before: Any, now: Any) -> str:
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{before} -> {now}"
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in keys)


def _learning_rates(
    rows: Sequence[Mapping[str, Any]],
    epochs: Sequence[Epoch],
    order: Order,
    scheduled: Callable[[Epoch, int], float | None],
) -> Iterable[Change]:
    """Where it is another than the configuration before would have it, or the next stage begins with another."""
    for before, now in zip(rows, rows[1:], strict=False):
        step, lr, last = now["step"], now.get("lr"), before.get("lr")
        if now["step"] != before["step"] + 1 or not lr or not last:
            continue
        epoch = [epoch for epoch in epochs if epoch.after_step < before["step"]][-1]
        expected, was = scheduled(epoch, step), scheduled(epoch, step - 1)
        new_stage = order.stage_of_step(step).index != order.stage_of_step(step - 1).index
        if expected and abs(lr / expected - 1) > JUMP and not (was and abs(last / was - 1) > JUMP):
            what = f"from {last:.3g} to {lr:.3g}, where the configuration before had {expected:.3g}"
            yield Change(step, "learning rate", what, ratio=lr / expected)
        elif new_stage and abs(lr / last - 1) > JUMP:
            yield Change(step, "learning rate", f"from {last:.3g} to {lr:.3g} with the new stage", ratio=lr / last)
