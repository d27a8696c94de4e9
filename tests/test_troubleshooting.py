"""docs/guides/troubleshooting.md shows the messages that its commands give.

With RENEW_DOCS=1 in the environment the test writes them into the page instead.
"""

import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from temposae.engine.storage.checkpoint import all_in

from .commandline import run

PAGE = Path(__file__).resolve().parents[1] / "docs/guides/troubleshooting.md"
BLOCK = re.compile(r"^```(?:(yaml)\n# file: (\S+)\n(.*?)|console\n\$ temposae (.*?)\n(.*?))^```", re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's commands find: a text, arrays, a cache, a finished run, and copies of it that were changed."""
    place = tmp_path_factory.mktemp("reader")
    (place / "text.txt").write_text("One document.\n\nAnother one.\n")
    (place / "chats.jsonl").write_text('{"messages": "One document."}\n' * 40)
    values = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    np.save(place / "flat.npy", values)
    np.save(place / "ids.npy", np.arange(200).reshape(100, 2))
    values[7, 3] = np.nan
    np.save(place / "nan.npy", values)
    small = ("--tokens", "4096", "--no-eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert run("train", "--d-sae", "64", "--k", "4", "--out", "runs/done", *small).code == 0
        assert run("cache", "--out", "acts", "--layer", "1", "--tokens", "4096").code == 0
    for name in ("edited", "damaged"):
        shutil.copytree(place / "runs/done", place / "runs" / name)
    config = place / "runs/edited/config.yaml"
    config.write_text(config.read_text().replace("k: 4", "k: 8"))
    weights = all_in(place / "runs/damaged")[-1] / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return place


def renewed(text: str) -> str:
    """The page with the messages that its commands give now, run in the folder at hand."""

    def block(match: re.Match[str]) -> str:
        kind, name, content, command, _ = match.groups()
        if kind == "yaml":
            Path(name).write_text(content)
            return match[0]
        result = run(*shlex.split(command))
        assert result.code == 2, f"{command}: {result}"
        return f"```console\n$ temposae {command}\n{result.err.strip().replace(str(Path.cwd()), '/home/me')}\n```"

    return BLOCK.sub(block, text)


def test_messages_are_those_of_the_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    text = PAGE.read_text()
    now = renewed(text)
    if os.environ.get("RENEW_DOCS"):
        PAGE.write_text(now)
    else:
        assert now == text, "run: RENEW_DOCS=1 pytest tests/test_troubleshooting.py"
    assert len(re.findall(r"^error: ", now, re.M)) >= 20
