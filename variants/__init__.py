"""The documented runs, as compositions of the engine's parts. So far: those that are a mask and an L1 term."""

from ..engine.config import SAEConfig
from ..engine.errors import UserError, near
from . import log_a, log_b

#: run -> settings of its dictionary, on top of the logs' common ground (relu, L1 0.04)
RUNS = log_a.RUNS | log_b.RUNS


def dictionary(run: str, d_in: int, d_sae: int = 2304, positions: int = 128) -> SAEConfig:
    """The dictionary of a documented run, for activations of width `d_in` at `positions` positions.

    Raises UserError, with near matches, for a run that is not there.
    """
    if run not in RUNS:
        raise UserError(f"run: {run!r} is not allowed; {near(run, RUNS)}")
    settings = {"activation": "relu", "l1_coefficient": 0.04} | RUNS[run]
    mask = {"positions": positions} | settings.pop("mask", {})
    return SAEConfig(d_in=d_in, d_sae=d_sae, mask=mask, **settings)
