"""Memory: a run of many steps takes no more than its first part did. 50,000 steps would take ten minutes on 2 cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig, StreamConfig
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import ActivationStream, LanguageModel
from temposae.engine.stream.partial_model import Tail
from temposae.evals.core import core
from transformers import AutoModelForCausalLM, LlamaConfig

STEPS, EARLY, WINDOW, BATCH = 12_000, 1_000, 2_000, 32
STATUS = Path("/proc/self/status")


RUN = f"""
import sys
from pathlib import Path
from temposae.engine.config import SAEConfig, StreamConfig, TrainConfig
from temposae.engine.stream import ActivationStream, LanguageModel
from temposae.engine.train import train

resident, model = [], LanguageModel("testbed", device="cpu")
stream = ActivationStream(StreamConfig(buffer_tokens=2048), tokens={STEPS * BATCH}, batch={BATCH}, model=model)
serve = stream.next

def counted(n):
    lines = Path("/proc/self/status").read_text().splitlines()
    resident.append(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")))
    return serve(n)

stream.next = counted
settings = TrainConfig(tokens={STEPS * BATCH}, batch={BATCH}, control=False, log_every_steps=500)
train(stream, SAEConfig(d_in=128, d_sae=32, k=2), settings)
print(*resident)
"""


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.is_file(), reason="reads the memory held from /proc")
def test_memory_after_12k_steps_is_that_after_1k():
    """In a process of its own, KiB in the mean over `WINDOW` steps: it goes up and down by 2%, as blocks are freed."""
    output = subprocess.run([sys.executable, "-c", RUN], check=True, capture_output=True, text=True).stdout
    resident = list(map(int, output.split()))
    assert len(resident) == STEPS
    early, late = (sum(steps) / WINDOW for steps in (resident[EARLY : EARLY + WINDOW], resident[-WINDOW:]))
    assert late <= 1.01 * early, (early, late)


def test_a_setting_bounds_rows_and_logits_and_changes_no_figure(monkeypatch):
    """At 2 MB a pass of the embedded model takes few rows, and the head few tokens; figures are those of 2 GB."""
    sizes: list[int] = []
    logits = Tail.logits

    def counted(self, hidden):
        sizes.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(Tail, "logits", counted)
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=64, k=8))
    found, largest, rows = [], [], []
    for gigabytes in (2.0, 0.002):
        config = StreamConfig(memory_gb=gigabytes, max_norm=None)
        stream = ActivationStream(config, tokens=4096, model=LanguageModel("testbed", device="cpu"))
        sizes.clear()
        found.append(core(stream, sae, {}, rows=8, ce_rows=4))
        largest.append(max(sizes))
        rows.append(stream.config.rows_per_forward)
        V = stream.model.vocabulary
    assert rows[0] == 32
    assert rows[1] < 8
    assert largest[1] <= 2e6 / (16 * V) < largest[0]
    for figure in ("explained_variance", "ce_recovered", "kl_recovered"):
        assert found[0][figure] == pytest.approx(found[1][figure], rel=1e-4)
    assert found[0]["ce"]["clean"] == pytest.approx(found[1]["ce"]["clean"], rel=1e-5)
    given = StreamConfig(memory_gb=0.002, rows_per_forward=32)
    assert ActivationStream(given, tokens=4096, model=stream.model).config.rows_per_forward == 32


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.is_file(), reason="reads the memory held from /proc")
def test_a_large_vocabulary_takes_no_more_than_the_setting(tmp_path):
    """A vocabulary of 262,144 on the command line: what it held at most, above what the model and libraries hold."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=262_144, max_position_embeddings=512, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 262_144, (2000, 128)))
    peaks = []
    for gigabytes in (2, 0.5):
        out = tmp_path / f"run {gigabytes}"
        settings = tmp_path / "config.yaml"
        settings.write_text(json.dumps({"stream": {"memory_gb": gigabytes}}))
        options = ["--model", tmp_path / "model", "--data", tmp_path / "ids.npy", "--tokens", 16_384, "--d-sae", 512]
        command = [sys.executable, "-m", "temposae", "train", settings, *map(str, options), "--out", out]
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
        peaks.append(json.loads((out / "summary.json").read_text())["peak_gb"])
    assert peaks[0] < 1.0 + 2  # 1 GB: libraries, and the model's 0.14 GB a few times over while it is loaded
    assert peaks[1] < 1.0 + 0.5
