"""Draw coefficients of a synthetic world, as sparse codes.

Features without a parent are drawn densely for a chunk of tokens. Children are drawn only where their parents fire, so
nothing of size tokens x features is made.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.code import LatentMajor, SparseCode
from .world import MOST_OFTEN, World, exceeded


class Entries(NamedTuple):
    """Coefficients above zero: token, feature int64 and value float32, all [n]."""

    token: Tensor
    feature: Tensor
    value: Tensor


def generator_for(world: World, *seeds: int) -> torch.Generator:
    """A generator on the world's device for the samples that `seeds` number."""
    state = np.random.SeedSequence([world.config.seed, *seeds]).generate_state(1, np.uint64)
    return torch.Generator(world.device).manual_seed(int(state[0]) >> 1)


@torch.no_grad()
def sample(world: World, rows: int, draw: torch.Generator) -> SparseCode:
    """Draw the coefficients of `rows` rows of T positions: a ragged code over rows * T tokens."""
    c, base = world.config, world.base
    tokens = rows * c.positions
    shared = _normal(draw, tokens, c.correlation_rank)
    latent = _normal(draw, tokens, len(base)).mul_(world.own[base]).addmm_(shared, world.factor[base].T)
    firing = _over_time(world, latent.view(rows, c.positions, -1), draw)
    token, column = _where(firing.view(tokens, -1))
    levels = [_with_values(world, token, base[column], draw)]
    for _ in range(c.depth if world.parents else 0):
        levels.append(_children(world, shared, levels[-1], draw))
    token, feature, value = (torch.cat(parts) for parts in zip(*levels, strict=True))
    by_token = LatentMajor.of(token.int(), feature, tokens)  # tokens take the place of latents
    return SparseCode(value[by_token.order], by_token.tokens, c.features, by_token.latent_offsets)


def _over_time(world: World, latent: Tensor, draw: torch.Generator) -> Tensor:
    """Where the features without a parent fire, bool [rows, T, base], from their Gaussian variables."""
    c, time = world.config, world.time
    rows, positions, _ = latent.shape
    steps = torch.arange(positions, device=latent.device)
    if len(time.context):
        decay = torch.exp((steps[:, None] - steps).abs() / -c.context_duration)
        context = _normal(draw, rows, positions) @ torch.linalg.cholesky(decay).T
        moved = c.context_strength * context[..., None] * time.sign
        rest = math.sqrt(1 - c.context_strength**2)
        latent[..., time.context] = moved + rest * latent[..., time.context]
    firing = latent > world.threshold[world.base]
    if len(time.lasting):
        rate = world.rate[world.base[time.lasting]]
        variable = latent[..., time.lasting]
        turns_on = variable > exceeded(rate / (time.duration * (1 - rate)))
        stays_on = variable > exceeded(1 - 1 / time.duration)
        # a chain has the state of the last step that set it whatever it was before; the first step always does
        is_set = turns_on | ~stays_on
        turns_on[:, 0], is_set[:, 0] = firing[:, 0, time.lasting], True
        last_set = torch.where(is_set, steps[:, None], 0).cummax(1).values
        firing[..., time.lasting] = turns_on.gather(1, last_set)
    if len(time.positional):
        rate = (world.rate[world.base[time.positional]] * c.intervals).clamp_max(MOST_OFTEN)
        inside = (steps * c.intervals // positions)[:, None] == time.interval
        firing[..., time.positional] = (latent[..., time.positional] > exceeded(rate)) & inside
    if len(time.ordered):
        events, before = firing[..., time.events], torch.zeros_like(firing[..., time.events])
        for step in range(1, min(c.reach, positions - 1) + 1):
            before[:, step:] |= events[:, :-step]
        other = torch.arange(len(time.events), device=latent.device) ^ 1
        firing[..., time.ordered] = events[..., other] & before
    return firing


def _children(world: World, shared: Tensor, parents: Entries, draw: torch.Generator) -> Entries:
    """The children that fire of the features that fire at one level."""
    c = world.config
    token, feature, value = (part[parents.feature < world.parents] for part in parents)
    child = c.roots + feature[:, None] * c.branching + torch.arange(c.branching, device=feature.device)
    exists = child < world.tree_end
    child = child.clamp_max(world.tree_end - 1)
    together = torch.einsum("nr,nbr->nb", shared[token], world.factor[child])
    latent = together + world.own[child] * _normal(draw, *child.shape)
    firing = exists & (latent > world.threshold[child])
    magnitude = _magnitudes(world, child, draw)
    firing &= magnitude > 0
    # of exclusive children that would fire, a random one does
    lots = torch.rand(child.shape, generator=draw, device=draw.device).masked_fill_(~firing, -1)
    wins = lots == lots.amax(1, keepdim=True)
    firing &= wins | ~world.exclusive[feature][:, None]
    if c.scale_by_parent:
        magnitude = magnitude * (value / world.mean[feature])[:, None]
    entry, _ = firing.nonzero(as_tuple=True)
    return Entries(token[entry], child[firing], magnitude[firing])


def _where(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of what is true in `mask` [n, m]. On a CPU numpy is several times as fast as torch."""
    if mask.device.type == "cpu":
        places = torch.from_numpy(np.flatnonzero(mask.numpy()))
        return places // mask.shape[1], places % mask.shape[1]
    return mask.nonzero(as_tuple=True)  # type: ignore[return-value]


def _with_values(world: World, token: Tensor, feature: Tensor, draw: torch.Generator) -> Entries:
    value = _magnitudes(world, feature, draw)
    entries = Entries(token, feature, value)
    return Entries(*(part[value > 0] for part in entries))


def _magnitudes(world: World, feature: Tensor, draw: torch.Generator) -> Tensor:
    return (world.mean[feature] + world.spread[feature] * _normal(draw, *feature.shape)).relu_()


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, device=draw.device)
