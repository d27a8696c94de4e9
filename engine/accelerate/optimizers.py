"""Use torch's fused kernel in Adam, AdamW and classes derived from them. It computes the same values in one pass."""

from typing import Any

import torch
from torch.optim import Optimizer


class Fused:
    """Adam or AdamW. ConstrainedAdam of dictionary_learning projects and renormalises around it as before."""


def refusal(optimizer: Optimizer) -> str | None:
    """Why the fused kernel does not support this optimizer's parameters. None if it does."""
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            return "differentiable"
        for p in group["params"]:
            if not p.is_floating_point() or p.device.type not in ("cpu", "cuda"):
                return f"a parameter of {p.dtype} on {p.device}"
    return None


def fuse(optimizer: Any) -> None:
    """Turn on the fused kernel. `_unfused` keeps the former settings of each group."""
    optimizer._unfused = [(group.get("fused"), group.get("foreach")) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    _move_steps(optimizer, fused=True)


def unfuse(optimizer: Any) -> None:
    for group, (fused, foreach) in zip(optimizer.param_groups, optimizer._unfused, strict=False):
        group["fused"], group["foreach"] = fused, foreach
    del optimizer._unfused
    _move_steps(optimizer, fused=False)


def _move_steps(optimizer: Any, fused: bool) -> None:
    """Move step counts to the parameter's device for the fused kernel, else to the CPU, unless the group is capturable."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if state and isinstance(state.get("step"), torch.Tensor) and not group.get("capturable"):
                on_device = fused or group.get("fused")
                state["step"] = state["step"].to(p.device if on_device else "cpu")
