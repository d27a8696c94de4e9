"""Memory: a run of many steps takes no more than its first part did. 50,000 steps would take ten minutes on 2 cores."""

from pathlib import Path

import pytest
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.train import train

STEPS, EARLY, WINDOW, BATCH = 12_000, 1_000, 2_000, 32
STATUS = Path("/proc/self/status")


def resident() -> int:
    """KiB of memory that this process holds."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.is_file(), reason="reads the memory held from /proc")
def test_memory_after_12k_steps_is_that_after_1k(stream_of, monkeypatch):
    """In the mean over `WINDOW` steps: from one step to another it goes up and down by 2%, as blocks are freed."""
    stream = stream_of(buffer_tokens=2048)
    held: list[int] = []
    serve = stream.next

    def counted(n):
        held.append(resident())
        return serve(n)

    monkeypatch.setattr(stream, "next", counted)
    settings = TrainConfig(tokens=STEPS * BATCH, batch=BATCH, control=False, log_every_steps=500)
    train(stream, SAEConfig(d_in=128, d_sae=32, k=2), settings)
    assert len(held) == STEPS
    early, late = (sum(part) / WINDOW for part in (held[EARLY : EARLY + WINDOW], held[-WINDOW:]))
    assert late <= 1.01 * early, (early, late)
