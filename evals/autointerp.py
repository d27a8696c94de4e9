"""Automatic interpretation: how well a judge's explanation of a latent predicts where it fires.

The protocol follows SAEBench 0.6.0 (https://github.com/adamkarvonen/SAEBench), with the detection score of Paulo et al.
(arXiv 2410.13928). Latents are drawn among those with enough examples. An example is a token with up to `BUFFER` tokens on
either side. Of each latent there are

    12 top      the largest activations
     7 sampled  weaker ones, drawn with probabilities in proportion to their squares
    10 random   around tokens drawn from all text

The judge sees 10 top and 5 sampled ones, with the tokens marked on which the latent fires, and describes the latent. In
another prompt it sees this description and the other 14 examples, shuffled and without marks, and names those on which the
latent fires. An example is active if some activation in it is above 1% of the latent's largest:

    score     mean over latents of the share of the 14 examples that the judge is right about
    balanced  mean of the shares right among active and among inactive examples, of all latents

About ten of 14 examples are inactive, so a judge that always answers "None" has a score near 0.71 (`none`, as measured). Its
balanced score is 0.5, as that of any constant answer.

Differences from SAEBench: no two examples of a latent share a token; examples at the ends of a row are shorter, so that
latents for the beginning of a row are measured; and a random example on which the latent fires counts as active.

Controls: latents of the random dictionary and positive activations of the model's neurons, drawn and explained in the same
way, and `shuffled`, the dictionary's examples with the description of another of its latents.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.errors import UserError, shown
from ..engine.process.progress import progress_bar
from .evaluation import Autoencoder, Evaluation, TextActivations
from .intervals import Outcomes, interval
from .judge import NO_JUDGE, Answers, Prompt
from .positions import held_out
from .token_texts import TokenTexts

ROWS = 1024  # of held-out text
BUFFER = 10  # tokens on either side of an example's own
TOP, SAMPLED, RANDOM = (10, 2), (5, 2), 10  # examples for the explanation and for the score
ACTIVE = 0.01  # share of the largest activation above which a token is marked
SHOWN = 500  # characters of an explanation

EXPLAIN = (
    "A unit of a language model reacts to something in texts. Below are excerpts in which it is active, the strongest "
    "first. Every token on which it is active stands between << and >>. Find out what these tokens, or the places where "
    "they stand, have in common, and describe it in one line of at most 20 words. The description should fit most of the "
    "marked tokens: a word, a part of a word, a kind of word, a topic, or a position in the text. Don't enumerate many "
    "words. Answer with the description only."
)
DETECT = (
    "A unit of a language model reacts to something in texts. You get a description of what it reacts to, and {n} numbered "
    "excerpts in random order. Decide for each excerpt if the unit is active on at least one of its tokens. Answer with "
    "the numbers of these excerpts, separated by commas, such as {example}, or with None if there are none. Write nothing "
    "else."
)


@dataclass
class _Example:
    """An excerpt: its tokens' texts, and on which of them the latent is active, by the tokens' order."""

    texts: list[str]
    marks: list[bool]

    @property
    def active(self) -> bool:
        return any(self.marks)

    def shown(self, *, marked: bool) -> str:
        pairs = zip(self.texts, self.marks, strict=True)
        return "".join(_marked(text) if marked and mark else text for text, mark in pairs).replace("\n", "↵").strip()


def _marked(text: str) -> str:
    """A token's text in marks, with spaces before a word outside of them."""
    word = text.lstrip(" ") or text
    return f"{text.removesuffix(word)}<<{word}>>" if word else ""


@dataclass
class _Latent:
    """A latent's examples to explain it by, strongest first, and those to score the explanation on, shuffled."""

    latent: int
    explain: list[_Example]
    detect: list[_Example]

    def explanation_prompt(self) -> Prompt:
        return Prompt(EXPLAIN, _numbered(example.shown(marked=True) for example in self.explain))

    def detection_prompt(self, explanation: str) -> Prompt:
        n, named = len(self.detect), sum(TOP[1:] + SAMPLED[1:])
        example = ", ".join(str(1 + i * n // named) for i in range(named))
        examples = _numbered(example.shown(marked=False) for example in self.detect)
        return Prompt(DETECT.format(n=n, example=example), f"Description: {explanation}\n\n{examples}")

    @property
    def active(self) -> np.ndarray:
        """bool [14]"""
        return np.array([example.active for example in self.detect])


def autointerp(evaluation: Evaluation) -> dict[str, Any]:
    """Explain latents by a judge and score the explanations, on `ROWS` held-out rows.

    Returns the `score`, its `balanced` form and `none`; `latents`, each with its explanation, its `score`, and the
    numbers of the examples that the judge named (`named`) and that are `active`; the number of latents `scored`, of
    `answers` and of those that are `unparsable`; and `controls` with the same figures. Raises UserError without a judge,
    for one that doesn't answer, and for a text on which no latent fires often enough.
    """
    if (answers := evaluation.answers) is None:
        raise UserError(f"autointerp: {NO_JUDGE}")
    collected = held_out(evaluation, ROWS)
    text = _Text.of(collected, TokenTexts(evaluation.stream.model.tokenizer))
    drawn: dict[str, list[_Latent]] = {}
    for name, autoencoder in evaluation.autoencoders(collected, mean=False).items():
        draw = evaluation.generator(f"autointerp {name}")
        drawn[name] = _drawn(text, collected, autoencoder, answers.judge.latents, draw)
    if not drawn["sae"]:
        least = sum(TOP + SAMPLED)
        raise UserError(f"autointerp: no latent fires in {least} places apart on {len(collected)} rows of text")
    results = _results(answers, drawn, evaluation.generator("autointerp shuffled"))
    summaries = {name: _summary(scored) for name, scored in results.items()}
    return {
        **summaries.pop("sae"),
        "controls": summaries,
        "intervals": _intervals(results, evaluation.generator("autointerp intervals")),
        "warnings": _warnings(results, answers.judge.latents),
        "judge": answers.judge.identity,
        "protocol": {
            "rows": len(collected), "tokens": len(collected.x), "buffer": BUFFER, "top": TOP, "sampled": SAMPLED,
            "random": RANDOM, "act_threshold_frac": ACTIVE,
        },
    }  # fmt: skip


@dataclass
class _Text:
    """R rows of `tokens` [R, T], the `first` and `last` kept position of each row [R], and `row` and `pos` [n] of the n
    kept tokens."""

    words: TokenTexts
    tokens: np.ndarray
    first: np.ndarray
    last: np.ndarray
    row: np.ndarray
    pos: np.ndarray

    @classmethod
    def of(cls, collected: TextActivations, words: TokenTexts) -> "_Text":
        kept = collected.kept.cpu().numpy()
        first, last = kept.argmax(1), kept.shape[1] - 1 - kept[:, ::-1].argmax(1)
        places = (tensor.cpu().numpy() for tensor in (collected.row, collected.pos))
        return cls(words, collected.tokens.cpu().numpy(), first, last, *places)

    def apart(self, order: Iterable[int], count: int, used: dict[int, list[int]]) -> list[int]:
        """The first `count` tokens in this order whose examples share no token with each other, nor with those in `used`
        (row -> positions), to which they are added."""
        chosen: list[int] = []
        for token in order:
            if len(chosen) == count:
                break
            row, pos = int(self.row[token]), int(self.pos[token])
            if all(abs(pos - other) > 2 * BUFFER for other in used.get(row, ())):
                used.setdefault(row, []).append(pos)
                chosen.append(token)
        return chosen

    def example(self, token: int, active: Mapping[int, set[int]]) -> _Example:
        """The example around a token; `active`: row -> positions on which the latent is active."""
        row, pos = int(self.row[token]), int(self.pos[token])
        window = range(max(int(self.first[row]), pos - BUFFER), min(int(self.last[row]), pos + BUFFER) + 1)
        texts = self.words.along(self.tokens[row, window.start : window.stop].tolist())
        in_row = active.get(row, set())
        return _Example(texts, [i in in_row for i in window])


def _drawn(
    text: _Text, collected: TextActivations, autoencoder: Autoencoder, count: int, draw: np.random.Generator
) -> list[_Latent]:
    """Examples of up to `count` latents, drawn among those that fire in enough places."""
    code = collected.code(autoencoder)
    by_latent = code.transpose()
    tokens = by_latent.tokens.cpu().numpy()
    values, offsets = code.values[by_latent.order].float().cpu().numpy(), by_latent.latent_offsets.cpu().numpy()
    latents: list[_Latent] = []
    with progress_bar("gathering examples", count, "latents") as bar:
        for latent in draw.permutation(np.flatnonzero(np.diff(offsets) >= sum(TOP + SAMPLED))).tolist():
            entries = slice(offsets[latent], offsets[latent + 1])
            token, value = tokens[entries], values[entries]
            if (found := _examples(text, latent, token[value > 0], value[value > 0], draw)) is not None:
                latents.append(found)
                bar.advance(1)
            if len(latents) == count:
                break
    return latents


def _examples(
    text: _Text, latent: int, token: np.ndarray, value: np.ndarray, draw: np.random.Generator
) -> _Latent | None:
    """Examples of a latent that fires on these tokens [m]; None if it fires in too few places."""
    used: dict[int, list[int]] = {}
    top = text.apart(token[np.argsort(-value, kind="stable")], sum(TOP), used)
    if len(top) < sum(TOP):
        return None
    weaker = value < value[np.isin(token, top)].min()
    # the order in which draws without replacement, in proportion to value^2, would come
    when = draw.exponential(size=weaker.sum()) / np.maximum(value[weaker].astype(np.float64) ** 2, 1e-300)
    sampled = text.apart(token[weaker][np.argsort(when, kind="stable")], sum(SAMPLED), used)
    random = text.apart(draw.permutation(len(text.row)), RANDOM, used)
    if len(sampled) < sum(SAMPLED) or len(random) < RANDOM:
        return None
    active: dict[int, set[int]] = {}
    for at in token[value > ACTIVE * value.max()]:
        active.setdefault(int(text.row[at]), set()).add(int(text.pos[at]))
    top, sampled = ([group[i] for i in draw.permutation(len(group))] for group in (top, sampled))
    strength = dict(zip(token.tolist(), value.tolist(), strict=True))
    explain = sorted((*top[: TOP[0]], *sampled[: SAMPLED[0]]), key=lambda at: -strength[at])
    detect = [*top[TOP[0] :], *sampled[SAMPLED[0] :], *random]
    detect = [detect[i] for i in draw.permutation(len(detect))]
    return _Latent(latent, *([text.example(at, active) for at in group] for group in (explain, detect)))


@dataclass
class _Scored:
    """A latent, its explanation (None: none could be read), and which examples the judge named, bool [14] or None."""

    latent: _Latent
    explanation: str | None
    named: np.ndarray | None
    answer: str  # the last one

    @property
    def right(self) -> np.ndarray | None:
        return None if self.named is None else self.named == self.latent.active


def _results(
    answers: Answers, drawn: Mapping[str, list[_Latent]], draw: np.random.Generator
) -> dict[str, list[_Scored]]:
    """Ask the judge for all explanations, then for all detections."""
    every = [(name, latent) for name, latents in drawn.items() for latent in latents]
    written = answers.to([latent.explanation_prompt() for _, latent in every], "asking for explanations")
    cases = [(name, latent, explanation(text), text) for (name, latent), text in zip(every, written, strict=True)]
    own = [case for case in cases if case[0] == "sae"]
    if len(own) > 1:  # each latent with the description of the next one in a random circle
        circle = draw.permutation(len(own))
        others = {int(i): own[int(j)] for i, j in zip(circle, np.roll(circle, 1), strict=True)}
        cases += [("shuffled", own[i][1], *others[i][2:]) for i in sorted(others)]
    asked = [i for i, case in enumerate(cases) if case[2] is not None]
    prompts = [cases[i][1].detection_prompt(cases[i][2] or "") for i in asked]
    given = dict(zip(asked, answers.to(prompts, "asking for examples"), strict=True))
    results: dict[str, list[_Scored]] = {}
    for i, (name, latent, text, written_as) in enumerate(cases):
        answer = given.get(i, written_as)
        named = None if i not in given else detected(answer, len(latent.detect))
        results.setdefault(name, []).append(_Scored(latent, text, named, answer))
    return results


def explanation(answer: str) -> str | None:
    """The explanation in an answer, in one line; None if there is none."""
    text = " ".join(_final(answer).split()).removeprefix("Description:").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'*`":
        text = text[1:-1].strip()
    return re.sub(r"(?<=\w)\.$", "", text)[:SHOWN] or None


def detected(answer: str, n: int) -> np.ndarray | None:
    """Which of n examples an answer names, bool [n]; None unless it is a list of their numbers, or "None"."""
    text = _final(answer).strip().strip("[]().").strip()
    named = np.zeros(n, dtype=bool)
    if text.lower() == "none":
        return named
    if not re.fullmatch(r"\d+((\s*,\s*(and\s+)?|\s+and\s+|\s+)\d+)*", text):
        return None
    numbers = np.array([int(word) for word in re.findall(r"\d+", text)])
    if not ((numbers >= 1) & (numbers <= n)).all():
        return None
    named[numbers - 1] = True
    return named


def _final(answer: str) -> str:
    """An answer without a model's reasoning before it."""
    return answer.rpartition("</think>")[2]


def _numbered(texts: Iterable[str]) -> str:
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))


def _summary(scored: Sequence[_Scored]) -> dict[str, Any]:
    known = [(one.right, one.latent.active) for one in scored if one.right is not None]
    per_latent, by_class = _outcomes(scored)
    return {
        "score": per_latent.score if known else None,
        "balanced": by_class.score if known else None,
        "none": float(np.mean([1 - active.mean() for _, active in known])) if known else None,
        "scored": len(known),
        "unparsable": sum(one.named is None for one in scored),
        "answers": len(scored),
        "latents": {str(one.latent.latent): _described(one) for one in scored},
    }


def _described(one: _Scored) -> dict[str, Any]:
    numbers = lambda chosen: None if chosen is None else (np.flatnonzero(chosen) + 1).tolist()
    right = one.right
    described = {
        "explanation": one.explanation,
        "score": None if right is None else float(right.mean()),
        "named": numbers(one.named),
        "active": numbers(one.latent.active),
    }
    return described | ({"unparsable": one.answer[:SHOWN]} if right is None else {})


def _outcomes(scored: Sequence[_Scored]) -> tuple[Outcomes, Outcomes]:
    """What each latent contributes to the score, and to its balanced form (active, inactive)."""
    gained, counted = np.zeros((len(scored), 1)), np.zeros((len(scored), 1))
    by_class, of_class = np.zeros((len(scored), 2)), np.zeros((len(scored), 2))
    for i, one in enumerate(scored):
        if (right := one.right) is not None:
            gained[i], counted[i] = right.mean(), 1
            for side, chosen in enumerate((one.latent.active, ~one.latent.active)):
                by_class[i, side], of_class[i, side] = right[chosen].sum(), chosen.sum()
    return Outcomes(gained, counted), Outcomes(by_class, of_class)


def _intervals(results: Mapping[str, list[_Scored]], draw: np.random.Generator) -> dict[str, Any]:
    """Items are latents. Those of a control are other items than the dictionary's, so the difference is not paired; only
    `shuffled` has the same latents."""
    total = sum(len(scored) for name, scored in results.items() if name != "shuffled")
    outcomes: dict[str, dict[str, Outcomes]] = {"score": {}, "balanced": {}}
    start = 0
    for name, scored in results.items():
        first = 0 if name == "shuffled" else start
        for key, part in zip(outcomes, _outcomes(scored), strict=True):
            gained, counted = (np.zeros((total, part.gained.shape[1])) for _ in range(2))
            gained[first : first + len(scored)], counted[first : first + len(scored)] = part.gained, part.counted
            outcomes[key][name] = Outcomes(gained, counted)
        start += len(scored) if name != "shuffled" else 0
    known = {key: {name: part for name, part in parts.items() if part.items} for key, parts in outcomes.items()}
    found = {key: interval(parts, draw) for key, parts in known.items() if "sae" in parts}
    return {key: edges for key, edges in found.items() if edges is not None}


def _warnings(results: Mapping[str, list[_Scored]], count: int) -> list[str]:
    warnings = []
    if (n := len(results["sae"])) < count:
        warnings.append(f"only {n} latents fire in {sum(TOP + SAMPLED)} places apart, fewer than the {count} asked for")
    lost = [one for scored in results.values() for one in scored if one.named is None]
    if lost:
        answers = sum(map(len, results.values()))
        which = f"none of the judge's {answers} answers can be read"
        if len(lost) < answers:
            which = f"{len(lost)} of the judge's {answers} answers can't be read"
        said = f"the first is {shown(lost[0].answer[:80])}, not numbers such as 1, 4 or None"
        warnings.append(f"{which}; {said} (--fresh asks again)")
    return warnings
