"""The guard on numerics: what the recorded steps say of the next one, and when they are a spike. Every process has the
same rows, so all decide alike; a resumed run reads them from the ledger, and decides as it did the first time."""

import math
from collections.abc import Iterable

import numpy as np
from ml_collections import ConfigDict

from k2jax.data.order import Order
from k2jax.errors import NumericsError
from k2jax.parallel import cluster
from k2jax.run.ledger import StepLog, bits_float
from k2jax.stability.detect import HISTORY, LAG, Row, Spike, limits_of, spike_of


class Guard:
    """Over the steps of one stage; its windows begin anew with each, and where the data change.

    `spike`: the first that a recorded step ended, more than an outlier; None while all is well. `suspects`: steps with
    which one may have begun.
    """

    def __init__(self, config: ConfigDict, order: Order, rows: Iterable[Row] = ()):
        """`rows`: of the steps up to now, of one stage."""
        self.config, self.order = config, order
        self.rows = list(rows)
        self.suspects = [row.step for row in self.rows if _is_suspect(row)]
        self.spike = self._judge()

    def add(self, row: Row) -> None:
        """The next recorded step."""
        stage = self.order.stage_of_step(row.step)
        self.rows = [*self.rows[-HISTORY:], row] if self.rows and self.rows[-1].step >= stage.first_step else [row]
        first = self.rows[0].step
        self.suspects = [step for step in self.suspects if step >= first] + [row.step] * _is_suspect(row)
        self.spike = self.spike or self._judge()

    def limits(self, step: int) -> np.ndarray:
        """Of a step that is to be made, float32 (2,): loss and gradient norm, as `Batch` has them."""
        begun = self.rows and self.rows[-1].step >= self.order.stage_of_step(step).first_step
        known = self.rows if begun else []
        while known and known[-1].step > step - LAG:
            known = known[:-1]
        return np.array(limits_of(known, self.config.stability), np.float32)

    def _judge(self) -> Spike | None:
        return spike_of(self.rows, self.config.stability, self.config.optimizer.max_skips_in_a_row)


def _is_suspect(row: Row) -> bool:
    """Whether a spike may have begun with it."""
    return row.outlier or not row.applied


def recent_rows(ledger: StepLog, order: Order, step: int) -> list[Row]:
    """What a guard must know of the steps up to `step`, from the ledger, on every process."""

    def read() -> list[list]:
        first = max(order.stage_of_step(step).first_step, step - HISTORY - LAG)
        rows = ledger.rows(first, step)
        return [[r["step"], r["loss"], r["grad_norm"], r["applied"], r.get("outlier", False)] for r in rows]

    rows = cluster.decide("reads the last steps", read) if step else []
    return [Row(n, bits_float(loss), bits_float(norm), applied, outlier) for n, loss, norm, applied, outlier in rows]


def check_parameters(last_row: dict) -> None:
    """Raises NumericsError when the last recorded step left a parameter that is not finite: it is not saved."""
    if not math.isfinite(last_row["param_norm"]):
        raise NumericsError(
            f"step {last_row['step']}: parameters are not finite: nothing is saved; go back to an earlier checkpoint"
        )
