"""Choose the backend of an op and its launch configuration."""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .configs import CONFIGS, DISPATCH_RATES, FP8_SINCE, DispatchRates
from .cost import Cost

BACKENDS = ("torch", "triton")
VARIABLE = "TEMPOSAE_BACKEND"
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_decided: ContextVar[str | None] = ContextVar("decided", default=None)


@contextmanager
def decided(backend: str) -> Iterator[None]:
    """Run every op within the context on `backend`, unless it is given another: a step decides once, and its ops don't ask
    their cost models."""
    token = _decided.set(backend)
    try:
        yield
    finally:
        _decided.reset(token)


def choose(op: str, *tensors: Tensor, cost: Callable[[str], Cost] | None = None, backend: str | None = None) -> str:
    """Return the backend, "torch" or "triton", for `op` on these tensors. See `why`."""
    return why(op, *tensors, cost=cost, backend=backend)[0]


def why(
    op: str = "ops", *tensors: Tensor, cost: Callable[[str], Cost] | None = None, backend: str | None = None
) -> tuple[str, str]:
    """Return the backend for `op` on these tensors, and the reason in words.

    The `backend` argument comes first, then a surrounding `decided`, then the environment variable TEMPOSAE_BACKEND (torch,
    triton or auto), then the device: CUDA tensors use triton if it is installed and supports their dtype, unless
    `cost(backend)`, at the rates in configs.py, takes less time with torch. Without tensors, this machine's default device
    decides.

    Raises ValueError for an unknown backend, and if triton is requested but cannot run.
    """
    sources = {"the backend argument": backend, "the step": _decided.get(), VARIABLE: os.environ.get(VARIABLE)}
    source, requested = next(((source, name) for source, name in sources.items() if name), ("", "auto"))
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"{source} is {requested!r}; allowed: {', '.join(BACKENDS)}, auto")
    if requested == "torch":
        return "torch", f"{source} says so"
    obstacle = _obstacle(tensors)
    if requested == "triton":
        if obstacle:
            raise ValueError(f"{source} asks for triton for {op}, but {obstacle}")
        return "triton", f"{source} says so"
    if obstacle:
        return "torch", obstacle
    device = _device(tensors)
    if device.type != "cuda":
        return "torch", "Triton's interpreter is for tests and runs only on request"
    if cost is None:
        return "triton", "CUDA tensors, and triton is installed"
    itemsize, rates = min(4, max(2, tensors[0].element_size())) if tensors else 2, dispatch_rates(_arch(device))
    torch_s, triton_s = (cost(b).seconds(rates.flops_per_s[b][itemsize], rates.bytes_per_s) for b in BACKENDS)
    verdict = f"the cost model expects {1e6 * triton_s:.0f} us with triton and {1e6 * torch_s:.0f} us with torch"
    return ("torch" if torch_s < triton_s else "triton"), verdict


def twin(
    package: str, op: str, *tensors: Tensor, cost: Callable[[str], Cost] | None = None, backend: str | None
) -> Any:
    """Return the module of a `package` that runs `op` on these tensors, `reference` or `triton`. The latter is imported
    only here, because it needs triton."""
    chosen = choose(op, *tensors, cost=cost, backend=backend)
    return importlib.import_module(f"{package}.{'reference' if chosen == 'torch' else 'triton'}")


def _device(tensors: tuple[Tensor, ...]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _obstacle(tensors: tuple[Tensor, ...]) -> str | None:
    """Return why triton cannot run on these tensors, or None."""
    if not _triton_installed():
        return "triton is not installed (it needs Linux)"
    for tensor in tensors:
        if tensor.dtype.is_floating_point and tensor.dtype not in TRITON_DTYPES:
            return f"the kernels take float32, float16 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
    device = _device(tensors)
    if device.type == "cuda":
        if torch.version.cuda is None:
            return "this torch build is not for NVIDIA GPUs"
        if _arch(device) < min(CONFIGS):
            return f"sm_{_arch(device)} is older than sm_{min(CONFIGS)}"
    elif os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on", "yes", "y"):
        return f"on {device.type} triton runs only through its interpreter (TRITON_INTERPRET=1)"
    return None


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def has_fp8(device: torch.device) -> bool:
    """Return whether products in e4m3 run on this device. The CPU emulates them."""
    return device.type != "cuda" or _arch(device) >= FP8_SINCE


def has_wgmma(device: torch.device) -> bool:
    """Return whether the device has the matrix instructions of sm_90, which later GPUs lack."""
    return device.type == "cuda" and _arch(device) == 90


def dispatch_rates(arch: int) -> DispatchRates:
    """Return the rates for sm_`arch`: its own, or those of the nearest entry (the lower one of two)."""
    return DISPATCH_RATES[min(sorted(DISPATCH_RATES), key=lambda entry: abs(entry - arch))]


def dense_from(device: torch.device) -> float:
    """Return `DispatchRates.dense_from` of the device. Triton's interpreter on the CPU uses the first entry."""
    return dispatch_rates(_arch(device) if device.type == "cuda" else min(DISPATCH_RATES)).dense_from


@functools.cache  # so that the warning comes once per GPU generation
def config_row(arch: int) -> dict[str, dict[str, int]]:
    """Return the launch configurations for sm_`arch`: its own row, or the nearest lower one with one warning.

    Raises ValueError below the lowest row.
    """
    if arch in CONFIGS:
        return CONFIGS[arch]
    lower_archs = [row_arch for row_arch in CONFIGS if row_arch < arch]
    if not lower_archs:
        raise ValueError(f"sm_{arch} is older than sm_{min(CONFIGS)}, the oldest with launch configurations")
    warnings.warn(f"no launch configurations for sm_{arch}; using those of sm_{max(lower_archs)}", stacklevel=2)
    return CONFIGS[max(lower_archs)]


def launch_options(op: str, tensor: Tensor) -> dict[str, Any]:
    """Return the keyword arguments of a launch on the tensor's device: block sizes, warps, stages."""
    configs = config_row(_arch(tensor.device)) if tensor.is_cuda else CONFIGS[min(CONFIGS)]
    # Triton's default for FP fusion is about to change. Contracting a*b+c only makes sums more accurate.
    return {**configs[op], "enable_fp_fusion": True}


def launch_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a Triton kernel on the device of its first argument, a tensor, whichever device is current."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)
