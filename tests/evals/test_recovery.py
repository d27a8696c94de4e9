"""Recovery of known features: constructed dictionaries with known scores, and what tells kinds of dictionaries apart."""

import pytest
import torch
from temposae.engine.config import WorldConfig
from temposae.engine.stream import WorldSource
from temposae.evals.recovery import Tally, matched_cosine, recovery
from torch import Tensor

#: fewer features than dimensions, so that a threshold on projections finds all coefficients
EASY = {
    "features": 48, "width": 48, "roots": 4, "depth": 1, "orthogonal_steps": 3000, "firing_min": 0.05, "firing_max": 0.1,
    "spread_mean": 0.2, "spread_std": 0.0, "magnitude_first": 2.0, "magnitude_last": 1.5, "positions": 16,
}  # fmt: skip
#: more features than dimensions, but fewer of each interval of positions
CROWDED = EASY | {
    "features": 96,
    "width": 32,
    "roots": 0,
    "orthogonal_steps": 100,
    "firing_max": 0.2,
    "firing_min": 0.1,
}


class Known:
    """The world's own directions. Coefficients are those of least squares over the features that `mask` [T, F] allows at a
    position, where they are above a threshold."""

    looks_along_rows = False

    def __init__(self, source: WorldSource, mask: Tensor | None = None, scale: float = 1.0):
        self.W_dec, self.bias, self.scale = source.world.directions, source.world.bias, scale
        mask = torch.ones(source.positions, len(self.W_dec)) if mask is None else mask
        self.inverse = torch.linalg.pinv(mask[..., None] * self.W_dec)  # [T, D, F]

    def encode(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        assert pos is not None
        f = torch.einsum("nd,ndf->nf", x - self.bias, self.inverse[pos.long()])
        return self.scale * torch.where(f > 0.6, f, 0)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.bias


class Blind(Known):
    """Random directions of the same number."""

    def __init__(self, source: WorldSource):
        super().__init__(source)
        shape = self.W_dec.shape
        self.W_dec = torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
        self.inverse = torch.linalg.pinv(self.W_dec).expand(source.positions, -1, -1)


def test_the_true_dictionary_has_perfect_scores_and_a_random_one_has_not():
    source = WorldSource(WorldConfig(**EASY | {"lasting": 0.5, "order": 0.3}), device="cpu")
    scores = recovery(source, {"known": Known(source), "blind": Blind(source)}, tokens=32_768)
    known, blind = scores["known"], scores["blind"]
    for key in ("f1", "precision", "recall", "mcc", "uniqueness", "r2", "shrinkage"):
        assert known[key] == pytest.approx(1, abs=5e-3), key
    assert known["l0"] == pytest.approx(known["true_l0"], rel=1e-2)
    assert known["dead"] == 0
    assert known["durations"]["r"] > 0.97
    assert known["durations"]["log2_error"] < 0.1
    assert {kind: values["recovered"] for kind, values in known["kinds"].items()} == {
        "plain": 1, "lasting": 1, "order": 1,
    }  # fmt: skip
    assert known["mcc"] - blind["mcc"] > 0.3
    assert known["f1"] - blind["f1"] > 0.3
    assert all(values["recovered"] < 0.3 for values in blind["kinds"].values())


def test_scores_of_flaws_that_are_put_in():
    source = WorldSource(WorldConfig(**EASY), device="cpu")
    shrunk = Known(source, scale=0.5)
    doubled = Known(source)
    doubled.W_dec = torch.cat([doubled.W_dec[:24], doubled.W_dec[:24]])
    doubled.inverse = torch.cat([doubled.inverse[..., :24], doubled.inverse[..., :24] * 0], -1)
    scores = recovery(source, {"shrunk": shrunk, "doubled": doubled}, tokens=8192)
    assert scores["shrunk"]["shrinkage"] < 0.75
    assert scores["shrunk"]["f1"] == pytest.approx(1, abs=5e-3)
    assert scores["doubled"]["uniqueness"] == 0.5
    assert scores["doubled"]["dead"] == 24
    assert scores["doubled"]["f1"] == pytest.approx(0.5, abs=5e-3)


def test_positions_tell_dictionaries_apart_where_they_matter_and_only_there():
    def scores(**settings):
        source = WorldSource(WorldConfig(**CROWDED | settings), device="cpu")
        time, mask = source.world.time, torch.ones(16, 96)
        inside = (torch.arange(16) * 4 // 16)[:, None] == time.interval
        mask[:, source.world.base[time.positional]] = inside.float()
        result = recovery(source, {"plain": Known(source), "aware": Known(source, mask)}, tokens=16_384)
        return result["plain"], result["aware"]

    plain, aware = scores(positional=1.0)
    assert aware["f1"] > 0.95 > plain["f1"] + 0.2
    assert aware["kinds"]["positional"]["recovered"] > plain["kinds"]["positional"]["recovered"] + 0.1
    assert aware["mcc"] == plain["mcc"]  # directions are the same
    plain, aware = scores()
    assert plain == aware


def test_scores_do_not_depend_on_the_size_of_batches():
    source = WorldSource(WorldConfig(**EASY | {"lasting": 0.5}), device="cpu")
    whole, parts = Tally(Known(source), source.world), Tally(Known(source), source.world)
    for batch, code in source.labelled(4096):
        true = code.to_dense() > 0
        whole.add(batch.x, batch.pos, true)
        for start in range(0, len(batch), 256):
            part = slice(start, start + 256)
            parts.add(batch.x[part], batch.pos[part], true[part])
    first, second = whole.scores(), parts.scores()
    assert first.pop("r2") == pytest.approx(second.pop("r2"), abs=1e-9)
    assert first.pop("shrinkage") == pytest.approx(second.pop("shrinkage"), abs=1e-9)
    assert first == second


def test_the_matching_is_one_to_one():
    cosine = torch.tensor([[0.9, 0.8, 0.0], [0.9, 0.1, 0.2]])
    assert matched_cosine(cosine) == pytest.approx((0.8 + 0.9) / 2)
