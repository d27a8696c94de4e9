"""Recovery: how well a dictionary finds the known features of a synthetic world.

With c_ji = |cos(W_dec_j, d_i)| for latent j and feature i, the definitions are those of SynthSAEBench (arXiv 2602.14687):

    mcc          mean c over the best one-to-one matching of latents and features
    uniqueness   number of different features argmax_i c_ji, over the number of latents
    f1           mean over latents of 2 both / (fires + true): latent j as a detector of its feature argmax_i c_ji
    precision    mean of both / fires;  recall: mean of both / true;  each is 0 where it is not defined
    r2           1 - sum |x - x_hat|^2 / sum |x - mean x|^2
    l0           mean number of active latents per token;  true_l0: of active features
    dead         number of latents that never fire
    shrinkage    mean of |x_hat| / |x|

Further, per kind of feature, with the latent argmax_j c_ji as a detector of feature i, over features that fire:

    f1           mean F1;  recovered: share of features with F1 >= 0.5
    durations    for lasting features: correlation of log durations, and median |log2(measured / true)|. The measured mean
                 duration is (stays + leaves) / leaves, from the steps at which the latent stays on or turns off
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.errors import UserError
from ..engine.stream.world_source import WorldSource
from ..engine.synthetic.world import KINDS, World

RECOVERED = 0.5  # F1 from which a feature counts as recovered
SAMPLES = 65536  # held-out tokens
LEAST = 10  # times that a latent must turn off for a measured duration


class Encoder(Protocol):
    """What is scored: W_dec [F, D], encode x [..., D] at pos [...] to f [..., F], and decode."""

    @property
    def W_dec(self) -> Tensor: ...

    @property
    def looks_along_rows(self) -> bool: ...

    def encode(self, x: Tensor, pos: Tensor | None = None) -> Tensor: ...

    def decode(self, f: Tensor) -> Tensor: ...


@torch.no_grad()
def recovery(
    source: WorldSource, dictionaries: Mapping[str, Encoder], tokens: int = SAMPLES
) -> dict[str, dict[str, Any]]:
    """Score dictionaries on at least `tokens` held-out tokens of a world. Returns the scores above by name.

    Durations are None where fewer than two lasting features can be measured, and kinds without features are left out.
    """
    tallies = {name: Tally(dictionary, source.world) for name, dictionary in dictionaries.items()}
    for batch, code in source.labelled(tokens):
        true = code.to_dense() > 0
        for tally in tallies.values():
            tally.add(batch.x, batch.pos, true)
    return {name: tally.scores() for name, tally in tallies.items()}


class Tally:
    """Counts of a dictionary over tokens, as float64: exact, and independent of the size of batches."""

    def __init__(self, dictionary: Encoder, world: World):
        self.dictionary, self.world = dictionary, world
        rows = functional.normalize(dictionary.W_dec.detach().float(), dim=1, eps=1e-8)
        self.cosine = (rows @ functional.normalize(world.directions, dim=1, eps=1e-8).T).abs()
        self.feature_of, self.latent_of = self.cosine.argmax(1), self.cosine.argmax(0)
        self.lasting = world.base[world.time.lasting]

        def zeros(n: int) -> Tensor:
            return torch.zeros(n, dtype=torch.float64, device=world.device)

        latents, features = self.cosine.shape
        self.fires, self.both_of_latent = zeros(latents), zeros(latents)
        self.true, self.both_of_feature = zeros(features), zeros(features)
        self.stays, self.leaves = zeros(len(self.lasting)), zeros(len(self.lasting))
        self.total, self.squares, self.squared_error, self.shrinkage = zeros(world.config.width), *zeros(3)
        self.tokens = 0

    def add(self, x: Tensor, pos: Tensor, true: Tensor) -> None:
        """Count whole rows: x [N, D] at pos [N], and where features truly fire, bool [N, features]."""
        positions = self.world.config.positions
        shape = (-1, positions) if self.dictionary.looks_along_rows else (-1,)
        f = self.dictionary.encode(x.unflatten(0, shape), pos.unflatten(0, shape))
        x_hat = self.dictionary.decode(f).reshape(x.shape)
        fires = f.reshape(len(x), -1) != 0
        self.fires += fires.sum(0)
        self.true += true.sum(0)
        self.both_of_latent += (fires & true[:, self.feature_of]).sum(0)
        self.both_of_feature += (fires[:, self.latent_of] & true).sum(0)
        on = fires[:, self.latent_of[self.lasting]].unflatten(0, (-1, positions))
        self.stays += (on[:, :-1] & on[:, 1:]).sum((0, 1))
        self.leaves += (on[:, :-1] & ~on[:, 1:]).sum((0, 1))
        self.total += x.double().sum(0)
        self.squares += x.double().square().sum()
        self.squared_error += (x - x_hat).double().square().sum()
        self.shrinkage += (x_hat.norm(dim=1) / x.norm(dim=1)).double().sum()
        self.tokens += len(x)

    def scores(self) -> dict[str, Any]:
        true = self.true[self.feature_of]
        variance = self.squares - self.total.square().sum() / self.tokens
        return {
            "f1": float(_ratio(2 * self.both_of_latent, self.fires + true).mean()),
            "precision": float(_ratio(self.both_of_latent, self.fires).mean()),
            "recall": float(_ratio(self.both_of_latent, true).mean()),
            "mcc": matched_cosine(self.cosine),
            "uniqueness": len(self.feature_of.unique()) / len(self.feature_of),
            "r2": float(1 - self.squared_error / variance),
            "l0": float(self.fires.sum() / self.tokens),
            "true_l0": float(self.true.sum() / self.tokens),
            "dead": int((self.fires == 0).sum()),
            "shrinkage": float(self.shrinkage / self.tokens),
            "kinds": self._kinds(),
            "durations": self._durations(),
            "tokens": self.tokens,
        }

    def _kinds(self) -> dict[str, dict[str, Any]]:
        f1 = _ratio(2 * self.both_of_feature, self.fires[self.latent_of] + self.true)
        kinds = {}
        for number, kind in enumerate(KINDS):
            of_kind = f1[(self.world.kind == number) & (self.true > 0)]
            if len(of_kind):
                recovered = float((of_kind >= RECOVERED).double().mean())
                kinds[kind] = {"features": len(of_kind), "f1": float(of_kind.mean()), "recovered": recovered}
        return kinds

    def _durations(self) -> dict[str, Any] | None:
        measurable = self.leaves >= LEAST
        if int(measurable.sum()) < 2:
            return None
        measured = ((self.stays + self.leaves) / self.leaves)[measurable].log2()
        true = self.world.time.duration[measurable].double().log2()
        r = float(torch.corrcoef(torch.stack([measured, true]))[0, 1])
        return {
            "features": len(true),
            "r": r if r == r else None,  # NaN if all are equal
            "log2_error": float((measured - true).abs().median()),
        }


def matched_cosine(cosine: Tensor) -> float:
    """The mean of `cosine` [F, features] over its best one-to-one matching."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError:
        raise UserError("recovery: MCC needs scipy; pip install 'temposae[evals]'") from None
    matrix = cosine.double().cpu().numpy()
    return float(matrix[linear_sum_assignment(matrix, maximize=True)].mean())


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where whole is 0."""
    return torch.where(whole > 0, part / whole, 0)
