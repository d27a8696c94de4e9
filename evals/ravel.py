"""RAVEL: whether latents can change one attribute of an entity and leave its other attributes as they are.

The protocol follows SAEBench 0.6.0 (https://github.com/adamkarvonen/SAEBench; Huang et al., arXiv 2402.17700). In a prompt
that the model completes with the right value ("the crop of drabel is"), the latents that a mask m selects get the values
that they have in a prompt about another entity, at one token:

    x' = x + decode(f + m (f_source - f)) - decode(f)        m in {0, 1}^F, one for every attribute

    cause      share of pairs that ask for the mask's attribute, with different values, whose answer becomes the source's
    isolation  share of pairs that ask for another attribute of this kind of entity, whose answer stays the base's
    score      (cause + isolation) / 2, mean over attributes

Changing nothing has the score 0.5 (0 and 1), and so has exchanging everything (1 and 0). `whole` is the exchange of all of
x: its `cause` is the most that latents at this token can reach.

The masks are trained by gradient (multi-task differentiable binary masking): m = sigmoid(l / temperature), with l = 0 at
first, on the cross-entropy of the wanted answer in as many pairs of cause as of isolation, while the temperature falls from
1 to 1e-4. Latents with l > 0 are exchanged. Scores are of other pairs than those for training.

Differences from SAEBench: the error x - decode(f) stays, because without it a control loses isolation by its
reconstruction alone, whatever its latents mean (`keep_error=False` drops it, as SAEBench does). The answer is the next
token, the first one of the value, instead of a text of several tokens. All masks are trained together, with Adam at a rate
of `RATE` for `EPOCHS` epochs of `TRAIN` pairs of either sort for an attribute (SAEBench: 0.001, 2 epochs, 7,000 pairs).

Controls: the random dictionary, and all of the model's activations instead of latents (`lm_neurons`), with masks of their
own; and `shuffled`, the dictionary with masks of as many latents, drawn among those that fire at these tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.stream import ActivationStream, LanguageModel, TokenRows
from ..engine.stream.token_rows import TestbedRows
from .entity_facts import NO_FACTS, Prompts, file_prompts, language_prompts
from .evaluation import LABELLED, Autoencoder, Evaluation, Neurons, fitted
from .intervals import Outcomes, interval

TRAIN, TEST = 48, 32  # pairs of cause, and pairs of isolation, for an attribute
LEAST = 8  # pairs of either sort for training and testing that an attribute needs
EPOCHS, BATCH, RATE = 2, 96, 0.1
COLDEST = 1e-4  # last temperature


@dataclass
class _Pairs:
    """n pairs of prompts by their numbers, `base` and `source` [n]; the `mask` [n] to use; and which pairs are of `cause`
    [n], the others of isolation."""

    base: Tensor
    source: Tensor
    mask: Tensor
    cause: Tensor

    def __len__(self) -> int:
        return len(self.base)

    def only(self, numbers: Tensor) -> "_Pairs":
        return _Pairs(self.base[numbers], self.source[numbers], self.mask[numbers], self.cause[numbers])


@dataclass
class _Latents:
    """Dense latents `f` [P, F] of an autoencoder at the places of all prompts, what stands there if nothing is exchanged
    (`unchanged` [P, D]), and `W_dec` [F, D]."""

    f: Tensor
    unchanged: Tensor
    W_dec: Tensor

    @classmethod
    def of(cls, autoencoder: Autoencoder, x: Tensor, place: Tensor, *, keep_error: bool) -> "_Latents":
        code = autoencoder.encode_sparse(x, place.to(x.device))
        return cls(code.to_dense(), x if keep_error else autoencoder.decode(code), autoencoder.W_dec)

    def exchanged(self, pairs: _Pairs, mask: Tensor) -> Tensor:
        """x' [n, D], with latents exchanged as the `mask` [n, F] says."""
        return self.unchanged[pairs.base] + (mask * (self.f[pairs.source] - self.f[pairs.base])) @ self.W_dec


def ravel(evaluation: Evaluation, *, keep_error: bool = True) -> dict[str, Any]:
    """Train masks for every attribute and exchange latents between entities.

    Returns the mean `score`, `cause` and `isolation`, the same for all `attributes`, with the number of their mask's
    `latents`; `whole`; `controls`; and the numbers of prompts, `known` ones and test `pairs`. Raises UserError for a
    transcoder or a dictionary that doesn't fit, a text without facts, and a model that knows too few of them.
    """
    stream = evaluation.stream
    fitted("sae", evaluation.sae, stream)
    if evaluation.sae.cfg.d_out is not None:
        raise UserError("sae: a transcoder is not allowed; RAVEL changes the activations that were encoded")
    prompts, asked = evaluation.once("ravel prompts", lambda: _known(evaluation))
    training, testing, used = _pairs(prompts, evaluation)
    x = evaluation.once("ravel activations", lambda: _activations(stream, prompts))
    autoencoders: dict[str, Autoencoder] = {"sae": evaluation.sae}
    if evaluation.random is not None:
        autoencoders["random"] = evaluation.random
    if evaluation.neurons:
        autoencoders["lm_neurons"] = Neurons(x.shape[1], x.shape[1], x.device)
    right: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name, autoencoder in autoencoders.items():
        latents = _Latents.of(autoencoder, x, prompts.place, keep_error=keep_error)
        masks[name] = _trained(stream, prompts, latents, training, f"ravel: masks of {name}")
        right[name] = _right(stream, prompts, testing, latents, masks[name])
        if name == "sae":
            shuffled = _shuffled(masks[name], latents, evaluation.generator("ravel shuffled"))
            right["shuffled"] = _right(stream, prompts, testing, latents, shuffled)
    right["whole"] = _right(stream, prompts, testing, None, None)
    outcomes = {name: _outcomes(testing, correct, used) for name, correct in right.items()}
    by_name = {name: _means(parts) for name, parts in outcomes.items()}
    draw, compared = evaluation.generator("ravel intervals"), [name for name in outcomes if name != "whole"]
    counts = {name: int(mask[used].sum(1).float().mean().round()) for name, mask in masks.items()}
    return {
        **by_name["sae"],
        "attributes": _by_attribute(prompts, testing, right["sae"], masks["sae"], used),
        "whole": by_name["whole"],
        "controls": {
            name: by_name[name] | {"latents": counts.get(name, counts["sae"])} for name in compared if name != "sae"
        },
        "latents": counts["sae"],
        "intervals": {key: interval({name: outcomes[name][key] for name in compared}, draw) for key in outcomes["sae"]},
        "prompts": asked,
        "known": len(prompts),
        "pairs": len(testing),
        "protocol": {
            "train_pairs": len(training),
            "epochs": EPOCHS,
            "learning_rate": RATE,
            "batch": BATCH,
            "keep_error": keep_error,
        },
    }


def _known(evaluation: Evaluation) -> tuple[Prompts, int]:
    """The prompts that the model completes right, and the number of all."""
    stream, paths = evaluation.stream, evaluation.files.get("ravel", ())
    if paths:
        prompts = file_prompts(paths, stream)
    elif isinstance(stream.text, TestbedRows):
        prompts = language_prompts(stream.text.language, LABELLED)
    else:
        raise UserError(f"ravel: {stream.text.name} {NO_FACTS}")
    right = [
        _last(stream.model.logits(batch.tokens), batch).argmax(1).cpu() == batch.answer
        for batch in map(prompts.only, _batches(stream, len(prompts), prompts.tokens.shape[1]))
    ]
    known = torch.cat(right) if right else torch.zeros(0, dtype=torch.bool)
    return prompts.only(known), len(prompts)


def _pairs(prompts: Prompts, evaluation: Evaluation) -> tuple[_Pairs, _Pairs, list[int]]:
    """Pairs for training and for testing, and the attributes that have enough of them."""
    draw = evaluation.generator("ravel pairs")
    train, test = (max(LEAST, count // evaluation.share) for count in (TRAIN, TEST))
    kinds = [kind for kind, _ in prompts.names]
    by_attribute = [_drawn(prompts, a, 4 * (train + test), draw) for a in range(len(kinds))]
    sides: list[list[tuple[np.ndarray, int, bool]]] = [[], []]
    used = []
    for attribute, kind in enumerate(kinds):
        others = [by_attribute[a] for a in range(len(kinds)) if kinds[a] == kind and a != attribute]
        pools = [by_attribute[attribute], draw.permutation(np.concatenate([np.zeros((0, 2), np.int64), *others]))]
        n = min(len(pool) for pool in pools)
        n_train = min(train, n * train // (train + test))
        if min(n_train, n - n_train) < LEAST:
            continue
        used.append(attribute)
        for pool, cause in zip(pools, (True, False), strict=True):
            sides[0].append((pool[:n_train], attribute, cause))
            sides[1].append((pool[n_train : n_train + test], attribute, cause))
    if not used:
        raise UserError(f"ravel: the model completes {len(prompts)} prompts right, too few for any attribute")
    return *(_joined(side) for side in sides), used  # pyright: ignore[reportReturnType]


def _drawn(prompts: Prompts, attribute: int, most: int, draw: np.random.Generator) -> np.ndarray:
    """Different pairs [n, 2] of prompts for an attribute whose answers differ, at most `most`, in random order."""
    numbers, answer = np.flatnonzero(prompts.attribute.numpy() == attribute), prompts.answer.numpy()
    if len(numbers) < 2:
        return np.zeros((0, 2), np.int64)
    pairs = numbers[draw.integers(len(numbers), size=(4 * most, 2))]
    pairs = np.unique(pairs[answer[pairs[:, 0]] != answer[pairs[:, 1]]], axis=0)
    return draw.permutation(pairs)[:most]


def _joined(parts: list[tuple[np.ndarray, int, bool]]) -> _Pairs:
    pairs = torch.from_numpy(np.concatenate([pool for pool, _, _ in parts]))
    sizes = torch.tensor([len(pool) for pool, _, _ in parts])
    mask, cause = (torch.tensor([part[i] for part in parts]).repeat_interleave(sizes) for i in (1, 2))
    return _Pairs(pairs[:, 0], pairs[:, 1], mask, cause)


def _batches(stream: ActivationStream, n: int, T: int) -> tuple[Tensor, ...]:
    """Numbers of rows to run at once. The training of masks depends on it, so it doesn't depend on `rows_per_forward`."""
    return torch.arange(n).split(min(BATCH, stream.model.rows_with_logits(max(1, T))))


def _activations(stream: ActivationStream, prompts: Prompts) -> Tensor:
    """Activations [P, D] at the places of all prompts."""
    x = []
    for batch in map(prompts.only, _batches(stream, len(prompts), prompts.tokens.shape[1])):
        rows = TokenRows(batch.tokens, batch.length, torch.zeros_like(batch.tokens), torch.arange(len(batch)))
        acts, _ = stream.read(rows)
        x.append(next(iter(acts.values()))[torch.arange(len(batch)), batch.place].float())
    return torch.cat(x)


def _last(logits: Tensor, prompts: Prompts) -> Tensor:
    """Logits [P, V] of the token after each prompt, from [P, T, V]."""
    return logits[torch.arange(len(prompts)), prompts.length - 1].float()


def _wanted(prompts: Prompts, pairs: _Pairs) -> Tensor:
    """The answer that each pair should get, [n]."""
    return prompts.answer[torch.where(pairs.cause, pairs.source, pairs.base)]


def _logits(model: LanguageModel, prompts: Prompts, pairs: _Pairs, x: Tensor) -> Tensor:
    """Logits [n, V] after the base prompts, with x [n, D] at their places."""
    base = prompts.only(pairs.base)
    longest = int(base.length.max())

    def put(acts: Tensor, hook: Any) -> Tensor:
        flat = acts.flatten(2).clone()
        flat[torch.arange(len(base)), base.place] = x.to(flat)
        return flat.reshape(acts.shape)

    tokens = base.tokens[:, :longest].to(model.device)
    return _last(model.bridge.run_with_hooks(tokens, fwd_hooks=[(model.place(model.hook), put)]), base)


@contextmanager
def _frozen(model: LanguageModel) -> Iterator[None]:
    """No gradients for the model's weights, so that backward ends at the hook."""
    weights = [p for p in model.bridge.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _trained(stream: ActivationStream, prompts: Prompts, latents: _Latents, pairs: _Pairs, title: str) -> Tensor:
    """Masks of all attributes, bool [A, F]."""
    logit = torch.zeros(len(prompts.names), latents.f.shape[1], device=latents.f.device, requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=RATE)
    order = torch.Generator().manual_seed(0)
    size = len(_batches(stream, len(pairs), prompts.tokens.shape[1])[0])
    batches = [b for _ in range(EPOCHS) for b in torch.randperm(len(pairs), generator=order).split(size)]
    temperatures = torch.logspace(0, np.log10(COLDEST), len(batches)).tolist()
    wanted = _wanted(prompts, pairs).to(logit.device)
    with _frozen(stream.model), torch.enable_grad(), progress_bar(title, len(batches), "steps") as bar:
        for numbers, temperature in zip(batches, temperatures, strict=True):
            batch = pairs.only(numbers)
            x = latents.exchanged(batch, torch.sigmoid(logit / temperature)[batch.mask])
            loss = F.cross_entropy(_logits(stream.model, prompts, batch, x), wanted[numbers])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.advance(1, loss=f"{float(loss.detach()):.3f}")
    return logit.detach() > 0


@torch.no_grad()
def _right(
    stream: ActivationStream, prompts: Prompts, pairs: _Pairs, latents: _Latents | None, mask: Tensor | None
) -> Tensor:
    """Whether each pair gets the answer that it should, bool [n]; without latents, all of x is exchanged."""
    x = None
    if latents is None or mask is None:
        x = _activations(stream, prompts)
    wanted, right = _wanted(prompts, pairs), []
    for numbers in _batches(stream, len(pairs), prompts.tokens.shape[1]):
        batch = pairs.only(numbers)
        if x is not None:
            put = x[batch.source]
        else:
            assert latents is not None
            assert mask is not None
            put = latents.exchanged(batch, mask[batch.mask].float())
        answer = _logits(stream.model, prompts, batch, put).argmax(1).cpu()
        right.append(answer == wanted[numbers])
    return torch.cat(right)


def _shuffled(mask: Tensor, latents: _Latents, draw: np.random.Generator) -> Tensor:
    """Masks of as many latents each, drawn among those that fire at some place."""
    alive = np.flatnonzero((latents.f != 0).any(0).cpu().numpy())
    drawn = torch.zeros_like(mask)
    for row, chosen in zip(drawn, mask, strict=True):
        row[torch.from_numpy(draw.permutation(alive)[: int(chosen.sum())]).to(mask.device)] = True
    return drawn


def _outcomes(pairs: _Pairs, right: Tensor, used: list[int]) -> dict[str, Outcomes]:
    """What each pair contributes to the score, to cause and to isolation; groups are attributes."""
    gained, counted = (np.zeros((len(pairs), len(used), 2)) for _ in range(2))
    rows, column = np.arange(len(pairs)), np.searchsorted(used, pairs.mask.numpy())
    side = (~pairs.cause).long().numpy()
    gained[rows, column, side], counted[rows, column, side] = right.numpy(), 1
    parts = {"score": slice(None), "cause": slice(0, 1), "isolation": slice(1, 2)}
    return {
        name: Outcomes(gained[:, :, part].reshape(len(pairs), -1), counted[:, :, part].reshape(len(pairs), -1))
        for name, part in parts.items()
    }


def _means(outcomes: Mapping[str, Outcomes]) -> dict[str, float]:
    return {name: part.score for name, part in outcomes.items()}


def _by_attribute(
    prompts: Prompts, pairs: _Pairs, right: Tensor, masks: Tensor, used: list[int]
) -> dict[str, dict[str, float | int]]:
    scores = {}
    for attribute in used:
        own = pairs.mask == attribute
        cause, isolation = (float(right[own & side].float().mean()) for side in (pairs.cause, ~pairs.cause))
        latents = int(masks[attribute].sum())
        figures = {"score": (cause + isolation) / 2, "cause": cause, "isolation": isolation, "latents": latents}
        scores[": ".join(prompts.names[attribute])] = figures
    return scores
