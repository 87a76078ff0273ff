"""muP: sizes and rates by the table of Tensor Programs V, and the coordinate check of tools/bench/mup.py."""

import importlib.util
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import REPOSITORY
from test_optimizers import named

from k2jax import config
from k2jax.errors import ConfigError
from k2jax.model.decoder import init_params, parameter_table
from k2jax.training.optimizer import rates

spec = importlib.util.spec_from_file_location("mup", REPOSITORY / "tools/bench/mup.py")
mup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mup)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sizes_and_rates_are_those_of_the_table(name):
    base, wide = (mup.experiment(width, 64, name) for width in (64, 256))
    assert set(rates(base).values()) == {1.0}
    plain = parameter_table(mup.experiment(64, 0, name).model)
    assert {n: p.std for n, p in plain.items()} == {n: p.std for n, p in parameter_table(base.model).items()}
    params = init_params(wide.model, 0)
    for array, p in parameter_table(wide.model).items():
        of_layers = p.is_matrix and array.startswith("layers.")
        times = {"embed_VD": (1, 1), "head_DV": (1 / 4, 1 / 4)}.get(array, (1 / 2, 1 / 4) if of_layers else (1, 1))
        rate = 0.5 if of_layers and name == "muon" else times[1]
        assert rates(wide)[array] == pytest.approx(rate), array
        if p.is_matrix:
            assert p.std == pytest.approx(times[0] * plain[array].std), array
            assert np.std(params[array]) == pytest.approx(p.std, rel=0.05), array


def test_groups_multiply_what_mup_gives_and_a_tied_head_is_refused():
    c = mup.experiment(256, 64, "adamw")
    c.optimizer.groups = ("head.lr=2", "embed.lr=3")
    assert rates(c)["head_DV"] == 0.5 and rates(c)["embed_VD"] == 3.0 and rates(c)["layers.wq_LDNH"] == 0.25
    with pytest.raises(ConfigError, match="model.width_base=32: must be 0 .* where model.tie_embeddings is on"):
        config.validate(named("adamw", **{"model.width_base": 32, "model.tie_embeddings": True}))


def growth(optimizer, base, widths=(64, 256)):
    """{activation: how much more it moves at the larger width}."""
    narrow, wide = (mup.moved(mup.experiment(width, base, optimizer), 4) for width in widths)
    return {name: wide[name] / narrow[name] for name in narrow}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", mup.RATES)
def test_what_steps_change_is_the_same_at_every_width_with_mup_alone(optimizer):
    """Seen red with the rate of the head, or of the layers, left as it is."""
    for name, times in growth(optimizer, 64).items():
        assert 1 / 1.7 < times < 1.7, (name, times)
    assert max(growth(optimizer, 0).values()) > 2


def test_the_picture_has_a_panel_for_each_optimizer():
    moved = {"layer 1": 0.5, "layer 2": 1.0, "logits": 2.0}
    rows = [
        {"optimizer": o, "mup": m, "width": w, "moved": {k: v * math.sqrt(w) for k, v in moved.items()}}
        for o in ("adamw", "muon") for m in (False, True) for w in (64, 128)
    ]  # fmt: skip
    tree = ElementTree.fromstring(mup.picture(rows))
    lines = [element for element in tree if element.tag.endswith("polyline")]
    assert len(lines) == 4 * 3 and all(len(line.get("points").split()) == 2 for line in lines)
