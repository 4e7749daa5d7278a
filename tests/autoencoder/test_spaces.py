"""The papers' grids are valid space files, at full size and shrunk."""

from pathlib import Path

import pytest
import yaml

from distrecon import config
from distrecon.autoencoder import PAPER
from distrecon.cluster.space import read_space
from distrecon.kinds import KINDS

SPACES = Path(__file__).parents[2] / "tune_spaces"
TRIALS = {"paper_losses": 5, "paper_beta": 4, "paper_query_sets": 6, "paper_cycle_consistency": 4}


@pytest.mark.parametrize("name", TRIALS)
def test_paper_spaces(name):
    sweep = read_space(SPACES / f"{name}.yaml", KINDS)
    assert (sweep.name, sweep.kind.name, sweep.trials) == (name, "autoencoder", TRIALS[name])
    assert (sweep.base.model.width, sweep.base.model.layers, sweep.base.model.heads) == (256, 8, 8)
    rates = {config.replace(sweep.base, v).autoencoder.optim_in_use.lr for v in sweep.grid()}
    assert rates == ({1e-4, 1e-5} if name == "paper_losses" else {1e-5})
    small = read_space(SPACES / f"{name}.yaml", KINDS, smoke=True)
    assert small.trials == 2
    assert small.base.model.width < 64


def test_the_papers_plan_has_the_papers_settings():
    """What the shipped space and `PAPER` both say is the same: the networks' sizes among it."""
    base = yaml.safe_load((SPACES / "paper_losses.yaml").read_text())["base"]
    both = PAPER.keys() & base.keys()
    assert both >= {"model.width", "model.layers", "model.heads", "model.latent"}
    assert {key: PAPER[key] for key in both} == {key: base[key] for key in both}
