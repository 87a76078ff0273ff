"""One checkpoint = one data chunk = one range of steps: which step belongs to which.

Chunks are numbered from 1 over the whole run, as their checkpoints are. A range that the journal skips makes a stage's
last chunk shorter; the step at which a stage ends is always a checkpoint. Where the data change a chunk ends, too.
"""

from k2jax.data.order import Order, StagePlan


def num_chunks(plan: StagePlan) -> int:
    """Of a stage, after the journal; the last one may be short."""
    return -(-(plan.last_step - plan.first_step + 1) // plan.steps_per_chunk)


def chunk_of_step(order: Order, step: int) -> int:
    order = order.of_step(step)
    before = chunk_of_step(order, order.after_step) if order.past else 0
    plan = order.stage_of_step(step)
    before += sum(num_chunks(earlier) for earlier in order.stages[: plan.index])
    return before + (step - plan.first_step) // plan.steps_per_chunk + 1


def checkpoint_steps(order: Order) -> list[int]:
    """The last step of each chunk, in order: the steps whose checkpoints are kept for ever."""
    earlier = checkpoint_steps(order.past) if order.past else []
    steps = [step for step in earlier if step < order.after_step] + ([order.after_step] if earlier else [])
    for plan in order.stages:
        ends = [plan.first_step - 1 + (i + 1) * plan.steps_per_chunk for i in range(num_chunks(plan))]
        steps += [min(end, plan.last_step) for end in ends]
    return steps


def tokens_before(order: Order, step: int) -> int:
    """Tokens in the rows of steps 1 to `step` - 1; of conversations padding counts as such."""
    earlier = tokens_before(order.past, min(step, order.after_step + 1)) if order.past else 0
    return earlier + sum(
        (min(step - 1, plan.last_step) - plan.first_step + 1) * plan.rows_per_step * plan.sequence_length
        for plan in order.stages
        if step > plan.first_step
    )
