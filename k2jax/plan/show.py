"""A plan as text."""

from typing import Any

from k2jax.plan import saving
from k2jax.plan.chips import GIB


def table(found: dict[str, Any]) -> str:
    """Of `estimate.plan`: a block for each stage, then the whole run."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    lines = [
        f"{found['experiment']} on {found['topology']}: {found['chips']} chips ({found['device_kind']}), mesh {mesh}"
    ]
    for stage in found["stages"].values():
        lines += [
            "",
            f"{stage['stage']}: {stage['steps']:,} steps of {stage['tokens_per_step']:,} tokens",
            *_stage(stage),
        ]
    lines += ["", "checkpoints", *(_row(label, value) for label, value in saving.rows(found["saving"]))]
    if found["days"] is not None:
        lines += ["", _row("whole run", f"{found['days']:.1f} days, {found['chip_hours']:,.0f} chip-hours")]
    return "\n".join(lines)


def _stage(stage: dict[str, Any]) -> list[str]:
    used, limit = stage["hbm_bytes_per_chip"], stage["hbm_limit_bytes"]
    verdict = (
        f"fits, {(limit - used) / GIB:.1f} GiB left"
        if stage["fits"]
        else f"does NOT fit, {(used - limit) / GIB:.1f} GiB over"
    )
    lines = [_row("memory a chip", f"{used / GIB:.1f} of {limit / GIB:.1f} GiB ({used / limit:.0%}): {verdict}")]
    if "argument_bytes" in stage:
        state, temporary = stage["argument_bytes"] / GIB, stage["temporary_bytes"] / GIB
        lines.append(_row("  of a device", f"{state:.1f} GiB state and batch, {temporary:.1f} GiB temporaries"))
        if stage["host_bytes_per_chip"]:
            lines.append(_row("  of its host", f"{stage['host_bytes_per_chip'] / GIB:.1f} GiB a chip"))
    lines += [_row("to make it fit" if i == 0 else "or", remedy) for i, remedy in enumerate(stage["remedies"])]
    if stage["step_seconds"] is not None:
        total = stage["step_seconds"]
        lines += [
            _row(
                "FLOPs a step",
                f"{stage['step_flops_causal']:.3e} causal, {stage['step_flops_noncausal']:.3e} non-causal",
            ),
            _row("step", f"{total:.3f} s (estimated)"),
            *_parts(stage),
            *_network(stage),
            _row("MFU", f"{stage['mfu_causal']:.1%} causal, {stage['mfu_noncausal']:.1%} non-causal"),
            _row("tokens", f"{stage['tokens_per_second_per_chip']:,.0f} a second and chip"),
            _row("", f"{stage['tokens_per_day'] / 1e9:,.1f}B a day"),
            _row("stage", f"{stage['days']:.1f} days, {stage['chip_hours']:,.0f} chip-hours"),
        ]
        if stage["bubble_fraction"]:
            lines.append(
                _row("pipeline bubble", f"{stage['bubble_fraction']:.1%} of the step's turns, within the parts above")
            )
        if stage["kernels_by_arithmetic"]:
            lines.append(_row("note", f"time by arithmetic alone: {', '.join(stage['kernels_by_arithmetic'])}"))
    return [*lines, _row("compiled in", f"{stage['compile_seconds']:.0f} s")]


def _parts(stage: dict[str, Any]) -> list[str]:
    """What a step's time goes to, and what runs beside it."""
    within = {
        "matrix products": "matrix_seconds",
        "elementwise": "elementwise_seconds",
        "attention": "attention_seconds",
        "collectives": "exposed_collective_seconds",
    }
    beside = {"collectives": "hidden_collective_seconds"}
    if stage["network_bytes_per_chip"]:
        within["between slices"] = "exposed_network_seconds"
        beside["collectives between slices"] = "hidden_network_seconds"
    if stage["host_copy_bytes"]:
        within["host copies"] = "exposed_host_copy_seconds"
        beside["copies to and from the host"] = "hidden_host_copy_seconds"
    total = stage["step_seconds"]
    copied = f"{stage['copied_bytes'] / 1e9:.1f} GB a step by operations that compute nothing"
    return [
        *(_row(f"  {label}", f"{stage[key]:.3f} s ({stage[key] / total:.0%})") for label, key in within.items()),
        *(_row("  behind them", f"{stage[key]:.3f} s more of {label}") for label, key in beside.items()),
        _row("  copied", copied),
    ]


def _network(stage: dict[str, Any]) -> list[str]:
    """What goes from a chip to other slices, and its share of all that is waited for."""
    if not stage["network_bytes_per_chip"]:
        return []
    waits = sum(value for key, value in stage.items() if key.startswith("exposed_") and key.endswith("_seconds"))
    share = stage["exposed_network_seconds"] / max(waits, 1e-12)
    size, rate = stage["network_bytes_per_chip"] / 1e9, stage["network_bytes_per_s"] / 1e9
    sent = f"{size:.3g} GB a step from each chip, by a network of {rate:.2f} GB/s a chip"
    return [_row("between slices", sent), _row("", f"{share:.0%} of the time waited for transfers")]


def _row(label: str, value: str) -> str:
    return f"  {label:18} {value}"


def ranking(tried: list[dict[str, Any]]) -> str:
    """Of `search.search`, best first. "micro": 2x8 is 2 microbatches, each in 8 of the pipeline."""
    head = f"{'mesh':28} {'micro':>5} {'remat':24} {'GiB':>6} {'of limit':>8} {'on host':>7} {'step s':>8} {'MFU':>6}"
    lines = [f"{head} {'bubble':>6}"]
    for case in tried:
        mesh = " ".join(f"{axis} {size}" for axis, size in case["mesh"].items() if size > 1)
        parts = f"x{case['pipeline_microbatches']}" if case["mesh"]["stage"] > 1 else ""
        micro = f"{case['microbatches']}{parts}"
        memory = f"{case['hbm_bytes_per_chip'] / GIB:6.1f} {case['hbm_bytes_per_chip'] / case['hbm_limit_bytes']:8.0%}"
        speed = "   does not fit"
        if case["fits"]:
            memory += f" {case['host_bytes_per_chip'] / GIB:7.1f}"
            speed = f"{case['step_seconds']:8.3f} {case['mfu_causal']:6.1%} {case['bubble_fraction']:6.1%}"
        lines.append(f"{mesh:28} {micro:>5} {case['remat']:24} {memory} {speed}")
    return "\n".join(lines)
