"""Rates of a made-up device, so that no test waits for a large copy and a large product."""

import pytest
from temposae.bench import floors

RATES = floors.Rates("a test's", {2: 2e11, 4: 1e11}, 1e10, 1e10, "a test")


@pytest.fixture
def made_up_rates(monkeypatch: pytest.MonkeyPatch) -> floors.Rates:
    for module in ("floors", "ops", "step", "profile"):
        monkeypatch.setattr(f"temposae.bench.{module}.rates_of", lambda device, *sizes: RATES, raising=True)
    return RATES
