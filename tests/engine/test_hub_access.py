"""A hub that can't be reached is found out by one request, and said in one line."""

import time

import huggingface_hub
import pytest
from huggingface_hub import constants
from temposae.engine.errors import UserError
from temposae.engine.interchange import hub
from temposae.engine.process import hub_access
from temposae.engine.stream.documents import open_documents
from temposae.engine.stream.model_loading import load


@pytest.fixture
def no_network(monkeypatch):
    """The network refuses, and nothing says so beforehand; gives the addresses asked for."""
    asked = []

    class Session:
        def head(self, address, timeout):
            asked.append(address)
            assert timeout <= 10
            raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub_access.why_not.cache_clear()
    yield asked
    hub_access.why_not.cache_clear()


WHY = "https://huggingface.co does not answer: Name or service not known"


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: load("some/model", None), ("model: 'some/model'", "local Hugging Face folder, testbed or smollm2")),
        (lambda: open_documents("some/set"), ("data: 'some/set'", "local file or folder")),
        (lambda: hub.fetch("some/sae"), ("sae: some/sae",)),
    ],
    ids=["model", "data", "sae"],
)  # fmt: skip
def test_it_is_asked_once_and_the_reason_is_whole(ask, words, no_network):
    import datasets  # noqa: F401  # may take seconds

    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        ask()
    message = str(caught.value)
    assert "\n" not in message
    assert WHY in message
    assert all(word in message for word in words)
    assert len(no_network) == 1
    assert time.monotonic() - began < 5
    assert constants.HF_HUB_OFFLINE  # so the libraries don't try again


def test_what_is_in_the_cache_is_used_without_a_network(no_network, monkeypatch, tmp_path):
    """The line is for what is not there: a model in the cache whose loading fails is told by the reason."""
    commit, repo = "0" * 40, tmp_path / "models--some--model"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit / "config.json").write_text('{"model_type": "nonsense"}')
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        hub_access, "is_cached", lambda name: huggingface_hub.try_to_load_from_cache(name, "config.json", tmp_path)
    )
    with pytest.raises(UserError, match="model: 'some/model' can't be loaded") as caught:
        load("some/model", None)
    assert "does not answer" not in str(caught.value)
