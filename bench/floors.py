"""Floors: the least time of a training step or an op, from its bytes and FLOPs and the rates of the device.

A floor is arithmetic, not a measurement. Times are in milliseconds, rates per second.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..kernels.cost import Cost
from .timing import samples

TILE, CANDIDATES = 128, 4  # latents in a tile of the fused encode, and candidates kept per tile
SORT_MS = 0.05  # sorting the code's entries by latent on a GPU; negligible in a CPU's step


@dataclass(frozen=True)
class Rates:
    """Rates that a device reaches in practice.

    flops           FLOP/s of matrix products, by itemsize of the operands
    bytes_per_s     of device memory, read plus written
    l2_bytes_per_s  of the cache that gathers hit
    source          "table", "measured here" or another source
    candidate_flops the rate of bfloat16 products where they choose candidates for float32 operands, else None
    """

    device: str
    flops: dict[int, float]
    bytes_per_s: float
    l2_bytes_per_s: float
    source: str
    candidate_flops: float | None = None


# rates reached by bfloat16 products and large copies; the L2 rate is an assumption; float32 is not listed
KNOWN = {
    "H100": Rates("H100", {2: 660e12}, 3.0e12, 5.5e12, "table"),
    "H200": Rates("H200", {2: 790e12}, 4.3e12, 5.5e12, "table"),
}


class StepFloors(NamedTuple):
    """Floors of one TopK step in milliseconds: (i), (ii), (iii) with float32 moments, (iii) with bfloat16 moments."""

    dense: float
    materialised: float
    fused: float
    fused_bf16_moments: float


FLOOR_NAMES = dict(zip(StepFloors._fields, ("dense", "materialised", "fused", "fused, bf16 moments"), strict=True))


def step_floors(n: int, d: int, f: int, k: float, rates: Rates, itemsize: int = 2) -> StepFloors:
    """Floors of one step on N tokens, with B bytes per operand (`itemsize`), P = 2DF parameters and G = BNKD:

        E = 2NDF / FLOPs                         one matrix product; of (ii) and (iii), at `candidate_flops` if known
        S = G / BW + 3G / L2                     four gathers of K rows per token, one of which misses the cache
        (i)   dense          6E + (aP + 4BNF) / BW        activations and their gradient written and read
        (ii)  materialised   E + BNF / BW + S + (a + 4)P / BW
        (iii) fused          E + (NF / 4) / BW + S + 0.05 ms + cP / BW

    A parameter costs c = 8 + 16 + s bytes: the fp32 weight and two fp32 moments are read and written (bf16 moments: 8
    instead of 16), and a shadow copy of s = B bytes is written if operands are narrower than fp32. a = c + 8 adds a gradient
    that is written and read. (ii) adds 4 to fill it with zeros. NF / 4: 4 candidates of 4 bytes per 128 latents are written
    and read.
    """
    products, g, p = 6e3 * 2 * n * d * f / rates.flops[itemsize], itemsize * n * k * d, 2 * d * f
    e = 1e3 * 2 * n * d * f / (rates.candidate_flops or rates.flops[itemsize])
    per_ms = rates.bytes_per_s / 1e3
    s = g / per_ms + 3 * g / (rates.l2_bytes_per_s / 1e3)
    shadow = itemsize if itemsize < 4 else 0
    fused, narrow = 8 + 16 + shadow, 8 + 8 + shadow
    candidates = n * f * CANDIDATES * 4 * 2 / TILE
    unfused = fused + 8
    return StepFloors(
        dense=products + (unfused * p + 4 * itemsize * n * f) / per_ms,
        materialised=e + itemsize * n * f / per_ms + s + (unfused + 4) * p / per_ms,
        fused=e + candidates / per_ms + s + SORT_MS + fused * p / per_ms,
        fused_bf16_moments=e + candidates / per_ms + s + SORT_MS + narrow * p / per_ms,
    )


class StepWork(NamedTuple):
    """The least work of a step: FLOP, bytes of device memory, and milliseconds."""

    flops: float
    bytes: float
    floor_ms: float


def step_work(n: int, d: int, f: int, k: float, rates: Rates, itemsize: int = 2) -> StepWork:
    """The work of floor (iii), with the gathers' multiply-adds, at k active latents per token, AuxK's included.

    Where floor (i) is lower, it is the work of that: with few latents or many active ones, dense products are faster.
    """
    floors, p = step_floors(n, d, f, k, rates, itemsize), 2 * d * f
    state = (24 + (itemsize if itemsize < 4 else 0)) * p
    if floors.fused <= floors.dense:
        moved = n * f * CANDIDATES * 4 * 2 / TILE + 4 * itemsize * n * k * d + state
        return StepWork(2.0 * n * d * f + 8.0 * n * k * d, moved, floors.fused)
    return StepWork(12.0 * n * d * f, state + 8 * p + 4 * itemsize * n * f, floors.dense)


def op_floor(cost: Cost, rates: Rates, itemsize: int) -> float:
    """The longer of arithmetic and memory traffic (the roofline), in milliseconds.

    `Cost.bytes` counts gathers as cache misses, so an op that gathers can beat its floor.
    """
    return 1e3 * max(cost.flops / rates.flops[itemsize], cost.bytes / rates.bytes_per_s)


def rates_of(device: str, *itemsizes: int) -> Rates:
    """The rates of torch device `device` ("cpu", "cuda") for operands of these sizes in bytes: 2 is bfloat16, 4 float32.

    Cards outside the table are measured, once per process. On GPUs TF32 is off, which is torch's default.
    """
    import torch

    from ..kernels.certified_topk import bfloat16_speedup

    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"
    known = KNOWN.get(card_named(name, KNOWN) or "")
    known_flops = known.flops if known is not None else {}
    flops = {size: known_flops.get(size) or matmul_rate(device, size) for size in itemsizes}
    if known is not None:
        return replace(known, flops=flops)
    bandwidth = copy_rate(device)
    candidates = matmul_rate(device, 2) if torch.device(device).type == "cpu" and bfloat16_speedup() else None
    # caches are not measured, so all gathers count as memory traffic
    return Rates(name, flops, bandwidth, bandwidth, "measured here", candidates)


def card_named(device: str, cards: Iterable[str]) -> str | None:
    """The one of these cards that a device's name says it is. Slower versions of a chip (PCIe, NVL, MIG slices) are none."""
    if re.search(r"PCIe|NVL|MIG", device):
        return None
    return next((card for card in cards if re.search(rf"\b{card}\b", device)), None)


@functools.cache
def copy_rate(device: str) -> float:
    """Bytes per second, read plus written, of a copy larger than any cache: 1 GiB on a GPU, 128 MiB on a CPU."""
    import torch

    source = torch.randn(2**28 if torch.device(device).type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 1e3 * 2 * 4 * source.numel() / min(samples(lambda: target.copy_(source), device, repeats=7))


@functools.cache
def matmul_rate(device: str, itemsize: int) -> float:
    """FLOP/s of a large product of random matrices (zeros would be faster)."""
    import torch

    side = 8192 if torch.device(device).type == "cuda" else 2048
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2e3 * side**3 / min(samples(lambda: a @ b, device, repeats=5))
