"""A training step by autograd, clip_grad_norm_ and torch's Adam: for every dictionary and device. The fused step must equal
it."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.adam import Rates, adam
from ...kernels.loss import PositionSums
from ..fused import Outcome
from ..learner import Learner
from ..sae import BatchContext
from .objective import Objective
from .stacked_weights import rounding_seed


def autograd_step(
    learner: Learner, x: Tensor, pos: Tensor, target: Tensor, context: BatchContext | None, lr: float
) -> Outcome:
    """One update on scaled x [N, D] at pos [N] towards `target`, by torch's Adam, or by ours for narrow moments."""
    sae = learner.sae
    objective = _accumulated_gradients(learner, x, pos, target, context)
    sae.project_decoder_gradient()
    for name, parameter in sae.named_parameters():
        if name in learner.leaves and learner.leaves[name] is not parameter and parameter.grad is not None:
            learner.leaves[name].grad = parameter.grad.T
    norm = torch.zeros_like(objective.loss.detach())
    if learner.config.clip_norm is not None:
        norm = torch.nn.utils.clip_grad_norm_(list(learner.leaves.values()), learner.config.clip_norm)
    learner.adam.step()
    for name, moments in learner.narrow.items():
        leaf = learner.leaves[name]
        if leaf.grad is not None:
            adam(leaf.detach(), leaf.grad, moments, _rates(learner, name, lr))
    for leaf in learner.leaves.values():
        leaf.grad = None
    sae.zero_grad()
    sae.constrain()
    learner.hold_directions()
    sae.after()
    learner.version += 1
    aux_loss, least_kept = (
        None if tensor is None else tensor[None] for tensor in (objective.aux_loss, objective.least_kept)
    )
    sums = PositionSums(*(total[None] for total in objective.sums))
    return Outcome(objective.loss.detach()[None], aux_loss, norm[None], sums, objective.fired[None], least_kept)


def _accumulated_gradients(
    learner: Learner, x: Tensor, pos: Tensor, target: Tensor, context: BatchContext | None
) -> Objective:
    """The objective and its gradients, in `accumulate` chunks of the batch."""
    objectives: list[Objective] = []
    dead = learner.dead
    for x_chunk, pos_chunk, target_chunk in zip(
        *(tensor.chunk(learner.config.accumulate) for tensor in (x, pos, target)), strict=True
    ):
        objective = learner.sae.objective(x_chunk, pos_chunk, learner.n_positions, dead, target_chunk, context)
        share = len(x_chunk) / len(x)
        (objective.loss * share).backward()
        aux_loss = None if objective.aux_loss is None else objective.aux_loss * share
        objectives.append(replace(objective, loss=objective.loss.detach() * share, aux_loss=aux_loss))
    return functools.reduce(Objective.add, objectives)


def _rates(learner: Learner, name: str, lr: float) -> Rates:
    """Adam's settings for a parameter in this step, whose gradient is clipped already."""
    beta1, beta2, step, device = learner.config.beta1, learner.config.beta2, learner.steps_done, learner.mean.device
    numbers = (lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, 1.0)
    step_size, correction, factor = (torch.full((), number, device=device) for number in numbers)
    seed = torch.full((), rounding_seed(name, step), dtype=torch.int32, device=device)
    return Rates(step_size, correction, factor, beta1, beta2, seed=seed)
