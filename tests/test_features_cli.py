"""`temposae features`: a store from the command line, a mistake in one line, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from temposae.engine.config import RunConfig, SAEConfig, StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage import checkpoint
from temposae.evals import features

from .commandline import run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a dictionary that knows its stream, one of another width, and a text."""
    monkeypatch.chdir(tmp_path)
    for name, width in (("sae", 128), ("narrow", 64)):
        sae = SparseAutoencoder(SAEConfig(d_in=width, d_sae=32, k=2))
        settings = RunConfig(stream=StreamConfig(hook="blocks.1.hook_resid_post", context=32), sae=sae.cfg)
        checkpoint.write(tmp_path / name, 0, {"sae": (sae.cfg, sae.state_dict())}, settings)
    checkpoint.save(sae, tmp_path / "alone")
    (tmp_path / "text.txt").write_text("the boats near the harbor are old .\n\n" * 40)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    return tmp_path


REFUSED = {
    "no such run": ("--sae nowhere", ("sae: nowhere", "does not exist")),
    "another width": ("--sae narrow --tokens 10", ("sae: d_in = 64", "width 128")),
    "unknown place": ("--sae alone --tokens 10", ("model", "--model")),
    "out not empty": ("--sae sae --out full", ("out: full", "not empty", "new folder")),
    "out is a file": ("--sae sae --out file", ("out: file", "not empty", "new folder")),
    "out under a file": ("--sae sae --out file/store", ("out: file/store", "can't be written")),
    "data missing": ("--sae sae --data shirt.txt", ("data: shirt.txt", "does not exist")),
    "no tokens": ("--sae sae --tokens 0", ("tokens: 0", "at least 1")),
    "negative threshold": ("--sae sae --tokens 5 --min-activation -1", ("--min-activation: -1", "at least 0")),
    "threshold nan": ("--sae sae --tokens 5 --min-activation nan", ("--min-activation: nan", "at least 0")),
    "unknown hook": ("--sae sae --tokens 5 --hook blocks.9.hook_resid_post", ("hook", "blocks.9")),
    "layer too high": ("--sae sae --tokens 5 --layer 9", ("layer: 9", "0 to 3")),
    "json nowhere": ("--sae sae --tokens 5 --json nowhere/f.json", ("json: nowhere/f.json", "folder that exists")),
}


@pytest.mark.parametrize(("argv", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(argv: str, words: tuple[str, ...], place: Path) -> None:
    before = sorted(place.rglob("*"))
    code, out, err = run("features", *argv.split(), *(() if "--out" in argv else ("--out", "store")))
    assert code != 0, out
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert [word for word in words if word not in err] == [], err
    assert sorted(place.rglob("*")) == before
    assert (place / "full" / "thesis.tex").read_text() == "years of work"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder where nobody may write")
def test_a_place_where_nobody_may_write(place: Path) -> None:
    code, _, err = run("features", "--sae", "sae", "--tokens", "5", "--out", "/proc/store")
    assert code == 2
    assert err.startswith("error: out: /proc/store can't be written")
    assert len(err.splitlines()) == 1


def test_a_text_file_to_its_end(place: Path) -> None:
    code, out, err = run("features", "--sae", "sae", "--data", "text.txt", "--out", "store", "--json", "f.json")
    assert code == 0, err
    tokens = pd.read_parquet("store/tokens.parquet")
    assert tokens["document"].unique().tolist() == list(range(40))
    words = tokens[tokens["document"] == 39]["text"].str.strip().tolist()
    assert words == ["the", "boats", "near", "the", "harbor", "are", "old", "."]
    found: dict[str, Any] = json.loads((place / "f.json").read_text())
    assert found["tokens"] == len(tokens) == 320
    assert found["command"].keys() == {"seconds", "tokens_per_s"}
    assert "320 tokens in 40 rows" in out
    assert "tokens/s" in out
    entries = features.read("store", document=39)
    assert set(entries["document"].tolist()) == {39}
    code, _, err = run("features", "--sae", "sae", "--data", "text.txt", "--out", "store")
    assert code == 2
    assert "not empty" in err


def test_another_place_in_the_model(place: Path) -> None:
    for out, *where in (("one",), ("two", "--layer", "2")):
        code, _, err = run("features", "--sae", "sae", "--data", "text.txt", "--out", out, *where)
        assert code == 0, err
    assert [features.info(out)["hook"] for out in ("one", "two")] == [f"blocks.{i}.hook_resid_post" for i in (1, 2)]
    norms = [pd.read_parquet(f"{out}/tokens.parquet")["squared_norm"] for out in ("one", "two")]
    assert not norms[0].equals(norms[1])


@pytest.mark.slow
def test_killed_in_the_middle(place: Path) -> None:
    """Without warning, once it encodes: no reader takes what is left for a store."""
    code = "import sys; from temposae.evals import features; features._PART = 2000; "
    code += "from temposae.cli import main; sys.argv[0] = 'temposae'; main()"
    argv = ["features", "--sae", "sae", "--tokens", str(10**9), "--out", "store"]
    process = subprocess.Popen([sys.executable, "-c", code, *argv], env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        while process.poll() is None and len(list(place.glob("store/features/part-*"))) < 3:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match=r"store: store has no store\.json; the store is incomplete"):
        features.read("store")
    code, _, err = run("features", "--sae", "sae", "--tokens", "10", "--out", "store")
    assert code == 2
    assert "out: store exists and is not empty" in err
