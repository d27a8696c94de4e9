"""Argument checks shared by the ops. They read metadata only, so they never wait for a GPU. All raise ValueError."""

import torch
from torch import Tensor

POSITION_DTYPES = (torch.int32, torch.int64)


def check_shape(name: str, tensor: Tensor, **dims: int) -> None:
    """Check that `tensor` has exactly these dimensions, given in order as symbol=size."""
    if tuple(tensor.shape) != tuple(dims.values()):
        expected = f"[{', '.join(dims)}] = {list(dims.values())}"
        raise ValueError(f"{name} must have shape {expected}, got {list(tensor.shape)}")


def check_centers(name: str, tensor: Tensor, d: int, size: int) -> None:
    """Check for [D], or [S, D] with one row for each of S equal runs of `size` items."""
    if tensor.dim() != 2 or not len(tensor) or size % len(tensor):
        check_shape(name, tensor, D=d)
    else:
        check_shape(name, tensor, S=len(tensor), D=d)


def check_floating(**tensors: Tensor | None) -> None:
    """Check that every tensor given has a floating dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must have a floating dtype, got {tensor.dtype}")


def check_positions(pos: Tensor, n_tokens: int, n_positions: int | None = None) -> None:
    """Check that `pos` is an int32 or int64 [N] and, on the CPU, where reading values is free, that 0 <= pos < T."""
    check_shape("pos", pos, N=n_tokens)
    if pos.dtype not in POSITION_DTYPES:
        raise ValueError(f"pos must be int32 or int64, got {pos.dtype}")
    if n_positions is not None and pos.device.type == "cpu" and n_tokens:
        low, high = (int(v) for v in pos.aminmax())
        if low < 0 or high >= n_positions:
            raise ValueError(f"pos must lie in [0, T) = [0, {n_positions}), got values from {low} to {high}")


def check_one_device(**tensors: Tensor | None) -> None:
    """Check that all tensors given are on one device."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"arguments must be on one device, got {', '.join(f'{n} on {d}' for n, d in devices.items())}")
