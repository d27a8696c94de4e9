"""Automatic interpretation with judges whose answers are known, on latents that are words."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import TokenRows
from temposae.engine.train import train
from temposae.evals import autointerp as module
from temposae.evals import suite
from temposae.evals.autointerp import BUFFER, EXPLAIN, autointerp, detected, explanation
from temposae.evals.evaluation import Evaluation
from temposae.evals.judge import NO_JUDGE, Answers, Judge, Prompt
from temposae.evals.report_tables import section

from ..commandline import run as command

R, T, D = 300, 50, 40
ORACLE = Path(__file__).parents[2] / "examples" / "word_judge.py"  # knows the answers where a latent is a word
COMMAND = f"{sys.executable} {ORACLE}"


class Words:
    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" w{i}" for i in ids)


class Planted:
    """A stream of R rows of T tokens of D words; x is the word's own direction, with a size of its own. The first token of
    a row is special."""

    def __init__(self):
        draw = np.random.default_rng(0)
        self.tokens = torch.from_numpy(draw.integers(0, D, (R, T)))
        self.size = torch.from_numpy(draw.uniform(1, 2, (R, T))).float()
        self.text, self.positions = SimpleNamespace(name="planted text"), T
        self.model = SimpleNamespace(device="cpu", tokenizer=Words())

    def held_out(self, rows: int) -> Any:
        assert rows == module.ROWS
        yield TokenRows(self.tokens, torch.full((R,), T), self.tokens, torch.arange(R))

    def read(self, rows: TokenRows) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        x = torch.nn.functional.one_hot(rows.tokens, D) * self.size[rows.row][..., None]
        return {"somewhere": x}, torch.arange(T).expand(R, T) > 0


def sae(W: torch.Tensor) -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=W.shape[1], activation="relu", k=4))
    with torch.no_grad():
        sae.W_enc.copy_(W)
        sae.W_dec.copy_(torch.nn.functional.normalize(W.T, dim=1))
    return sae


class Scripted(Judge):
    """A judge in this process; `asked` are the prompts."""

    def __init__(self, reply: Any, latents: int = 10):
        super().__init__(command=("scripted",), latents=latents)
        object.__setattr__(self, "reply", reply)
        object.__setattr__(self, "asked", [])

    def answer(self, prompt: Prompt) -> str:
        cast(Any, self).asked.append(prompt)
        return cast(Any, self).reply(prompt)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """Latent j of the dictionary fires on word j alone, and of the random one on half of the words."""
    half = torch.rand(D, D, generator=torch.Generator().manual_seed(0)) < 0.5
    return Evaluation(cast(Any, Planted()), sae(torch.eye(D)), sae(half.float()), neurons=False)


def measured(evaluation: Evaluation, judge: Judge) -> dict[str, Any]:
    evaluation.answers = Answers(judge)
    return json.loads(json.dumps(autointerp(evaluation), allow_nan=False))


def asks_for_examples(prompt: Prompt) -> bool:
    return prompt.system != EXPLAIN


def test_a_judge_that_knows_the_answers_is_right_about_every_example(evaluation):
    found = measured(evaluation, Judge.of(COMMAND, latents=12))
    assert (found["score"], found["balanced"], found["scored"], found["unparsable"]) == (1, 1, 12, 0)
    assert {scores["explanation"] for scores in found["latents"].values()} == {
        f"the words w{latent}" for latent in found["latents"]
    }
    assert all(scores["named"] == scores["active"] for scores in found["latents"].values())
    shuffled, random = found["controls"]["shuffled"], found["controls"]["random"]
    assert abs(shuffled["balanced"] - 0.5) < 0.15
    assert shuffled["latents"].keys() == found["latents"].keys()
    assert all(
        shuffled["latents"][latent]["explanation"] != scores["explanation"]
        for latent, scores in found["latents"].items()
    )
    assert 0 < random["scored"] <= 12
    for key in ("score", "balanced"):
        edges = found["intervals"][key]
        assert edges["low"] <= found[key] <= edges["high"]
        assert edges["above_random"]["difference"] == pytest.approx(found[key] - random[key])
        assert edges["controls"]["shuffled"]["low"] <= shuffled[key] <= edges["controls"]["shuffled"]["high"]
        assert edges["items"] == 12
    assert found["judge"]["program"] == Path(sys.executable).name


def test_a_judge_that_answers_at_random_is_right_by_chance(evaluation):
    draw = np.random.default_rng(1)

    def coin(prompt: Prompt) -> str:
        numbers = np.flatnonzero(draw.random(14) < 0.5) + 1
        return ", ".join(map(str, numbers)) if asks_for_examples(prompt) else "coins"

    found = measured(evaluation, Scripted(coin, latents=D))
    assert found["scored"] == D
    assert abs(found["score"] - 0.5) < 0.07  # the standard deviation over 560 examples is 0.021
    assert abs(found["balanced"] - 0.5) < 0.07
    assert abs(found["score"] - found["controls"]["shuffled"]["score"]) < 0.1


def test_a_judge_that_always_answers_none_scores_as_said(evaluation):
    found = measured(evaluation, Scripted(lambda prompt: "None", latents=D))
    assert found["score"] == pytest.approx(found["none"])
    assert 0.3 < found["none"] < 0.71
    assert found["balanced"] == 0.5


def test_answers_that_cannot_be_read_are_counted(evaluation):
    found = measured(evaluation, Scripted(lambda prompt: "I don't know,\nsorry"))
    assert (found["score"], found["balanced"], found["scored"]) == (None, None, 0)
    assert found["unparsable"] == found["answers"] == 10
    assert found["intervals"] == {}
    assert found["warnings"] == [
        "none of the judge's 30 answers can be read; the first is \"I don't know,\\nsorry\", not numbers such as 1, 4 or "
        "None (--fresh asks again)"
    ]
    assert all(scores["unparsable"] == "I don't know,\nsorry" for scores in found["latents"].values())
    section("autointerp", found)

    some = measured(evaluation, Scripted(lambda prompt: "1" if len(prompt.user) % 2 else "?"))
    lost = [some, *some["controls"].values()]
    assert 0 < some["unparsable"] < some["answers"] == 10
    assert some["scored"] + some["unparsable"] == 10
    assert some["warnings"][0].startswith(
        f"{sum(s['unparsable'] for s in lost)} of the judge's 30 answers can't be read"
    )

    silent = measured(evaluation, Scripted(lambda prompt: "1, 2" if asks_for_examples(prompt) else " \n"))
    assert silent["unparsable"] == 10
    assert all(scores["explanation"] is None for scores in silent["latents"].values())


def test_examples_are_those_of_the_protocol(evaluation):
    judge = Scripted(lambda prompt: "None", latents=D)
    found = measured(evaluation, judge)
    prompts = cast(Any, judge).asked
    stream = cast(Any, evaluation.stream)
    rows = [[f"w{token}" for token in row] for row in stream.tokens.tolist()]

    def place(text: str) -> tuple[int, range]:
        """The row and the positions of an example."""
        words = text.replace("<<", "").replace(">>", "").split()
        (where,) = [
            (row, range(at, at + len(words)))
            for row, of_row in enumerate(rows)
            for at in range(1, T - len(words) + 1)
            if of_row[at : at + len(words)] == words
        ]
        return where

    explained = [prompt for prompt in prompts if not asks_for_examples(prompt)]
    for prompt in explained[:D]:
        (latent,) = {int(mark) for mark in re.findall(r"<<w(\d+)>>", prompt.user)}
        scored = next(p for p in prompts if asks_for_examples(p) and p.user.startswith("Description: None"))
        texts = [line.partition(". ")[2] for line in prompt.user.splitlines()]
        assert len(texts) == sum(group[0] for group in (module.TOP, module.SAMPLED))
        assert all(f"<<w{latent}>>" in text for text in texts)
        assert all(text.count(f"w{latent}>>") == len(re.findall(rf"\bw{latent}\b", text)) for text in texts)
        where = [place(text) for text in texts]
        assert all(len(positions) <= 2 * BUFFER + 1 for _, positions in where)
        assert len({(row, at) for row, positions in where for at in positions}) == sum(len(p) for _, p in where)
        sizes = [max(stream.size[row, at].item() for at in p if rows[row][at] == f"w{latent}") for row, p in where]
        assert sizes[0] == max(sizes)
        assert scored.user.count("\n") == 2 + 14 - 1
    for scores in found["latents"].values():
        assert 4 <= len(scores["active"]) <= 14


def test_what_is_explained_is_not_what_is_scored(evaluation):
    """No token is in two examples of a latent, and its strongest tokens are among them."""
    drawn = []
    real = module._results
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "_results", lambda answers, latents, draw: drawn.append(latents) or real(answers, latents, draw)
        )
        measured(evaluation, Scripted(lambda prompt: "None", latents=D))
    latents = drawn[0]["sae"]
    assert len({latent.latent for latent in latents}) == len(latents) == D
    orders = [[example.active for example in latent.detect] for latent in latents]
    assert len({tuple(order) for order in orders}) > D / 2  # shuffled
    for latent in latents:
        texts = [example.shown(marked=False) for example in (*latent.explain, *latent.detect)]
        assert len(texts) == 29
        assert len(set(texts)) == 29
        for example in (*latent.explain, *latent.detect):
            words = example.shown(marked=False).split()
            assert [word == f"w{latent.latent}" for word in words] == example.marks


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("1, 4", [1, 4]), ("14", [14]), ("[2,3]", [2, 3]), ("2 and 3.", [2, 3]), ("1, 2, and 5", [1, 2, 5]), ("None", []),
        ("none.", []), ("1 2\n", [1, 2]), ("<think>is it 7?</think>\n\n1", [1]), ("3, 3", [3]), ("", None), ("0", None),
        ("15", None), ("Examples 1 and 2", None), ("1, two", None), ("1 None", None), ("-1", None), ("1.5", None),
        ("1 2 3 4 5 6 7 8 9 10 11 12 13 14 " * 2000 + "x", None),
    ],
)  # fmt: skip
def test_answers_are_read_strictly(answer, named):
    found = detected(answer, 14)
    assert (None if found is None else (np.flatnonzero(found) + 1).tolist()) == named


def test_explanations_are_one_line():
    assert explanation(' "The word\n cat." ') == "The word cat"
    assert explanation("the words ' .") == "the words ' ."
    assert explanation("<think>hm</think> Description: cats") == "cats"
    assert explanation("<think>hm</think>\n") is None
    assert len(explanation("x" * 10_000) or "") == module.SHOWN


def test_special_spaces_stand_outside_of_the_marks():
    example = module._Example([" the", " cat", "ch", "\n", " ", ""], [False, True, True, True, True, True])
    assert example.shown(marked=True) == "the <<cat>><<ch>><<↵>><< >>"
    assert example.shown(marked=False) == "the catch↵"
    assert example.active


def test_few_latents_and_no_latents_are_said(evaluation):
    few = evaluation.of(sae(torch.eye(D)[:, :3]), None)
    found = measured(few, Scripted(lambda prompt: "None"))
    assert found["warnings"] == ["only 3 latents fire in 19 places apart, fewer than the 10 asked for"]
    assert found["intervals"]["score"]["above_random"] is None
    dead = evaluation.of(sae(-torch.eye(D)), None)
    with pytest.raises(UserError, match="^autointerp: no latent fires in 19 places apart on 300 rows of text$"):
        measured(dead, Scripted(lambda prompt: "None"))


def test_without_a_judge_the_option_is_named(evaluation):
    evaluation.answers = None
    with pytest.raises(UserError) as error:
        autointerp(evaluation)
    assert str(error.value) == f"autointerp: {NO_JUDGE}"
    assert "--judge-command" in NO_JUDGE
    assert "--judge-url" in NO_JUDGE
    assert "autointerp" not in suite.every_eval(None)
    assert suite.every_eval(Judge.of("cat"))[-1] == "autointerp"


def test_a_run_keeps_answers_and_result(stream_of, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 96)
    run = tmp_path / "run"
    train(stream_of(), SAEConfig(d_in=128, d_sae=64, k=4), TrainConfig(tokens=8192, batch=256), out=run)
    code, _, err = command("eval", "autointerp", "--sae", run)
    assert code == 2
    assert f"error: autointerp: {NO_JUDGE}" in err
    log = tmp_path / "log"
    judge = f"sh -c 'echo x >> {log}; exec {COMMAND}'"
    asked = ("eval", "autointerp", "--sae", run, "--judge-command", judge)
    code, out, err = command(*asked, "--judge-latents", 3, "--json", tmp_path / "a.json")
    assert code == 0, err
    result = json.loads((tmp_path / "a.json").read_text())
    assert 0 < result["score"] <= 1
    assert {"random", "lm_neurons", "shuffled"} == set(result["controls"])
    assert (result["answers"], result["of"]["latents"]) == (3, 3)
    assert "score" in out
    calls = log.read_text().count("x")
    assert calls == 3 * 7
    assert (
        f"the words {next(iter(result['latents'].values()))['explanation'][10:20]}" in (run / "report.md").read_text()
    )
    command(*asked, "--judge-latents", 3)  # the result is there
    (run / "evals" / "autointerp.json").unlink()
    command(*asked, "--judge-latents", 3, "--json", tmp_path / "b.json")  # the answers are there
    assert log.read_text().count("x") == calls
    again = json.loads((tmp_path / "b.json").read_text())
    assert again | {"seconds": 0} == result | {"seconds": 0}
    command(*asked, "--judge-latents", 4)
    assert calls < log.read_text().count("x") <= calls + 4 + 3 * 2 + 1  # new latents, and another circle
    assert command("eval", "autointerp", "--sae", run, "--judge-command", "false", "--judge-model", "m").code == 2
