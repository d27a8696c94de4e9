"""Published measurements of matrix products and of memory, and what the performance model says of the same work."""

from collections.abc import Callable
from typing import NamedTuple

from ..kernels.backend import config_row
from ..kernels.bench_types import Launch, Step
from ..kernels.encode.bench import product
from .gpus import BENCHES, GPUS, MATMULS, RMSNORM
from .model import time_launch
from .results import markdown

FAST_CU = "pranjalssh/fast.cu on GitHub, README"
TUTORIAL = "Triton's tutorial 09 in hyperai/triton-cn on GitHub"


class Published(NamedTuple):
    """A measurement: TFLOP/s of bfloat16 products, or GB/s read plus written."""

    gpu: str
    what: str
    value: float
    unit: str
    source: str
    model: Callable[[str], float]  # of the name of the GPU


def dense(name: str) -> float:
    """TFLOP/s of a library's product of 8192-matrices, which does nothing but multiply."""
    work = 2.0 * 8192**3
    return work / time_launch(Launch("", "", dram=6 * 8192**2, tensor_flops=work), GPUS[name])["ms"] / 1e9


def tutorial(name: str) -> float:
    """TFLOP/s of `encode` as compiled for the blocks, warps and stages of Triton's tutorial, [8192, 512] @ [512, 8192]."""
    blocks = dict(BLOCK_N=128, BLOCK_F=256, BLOCK_D=64, GROUP_N=8, num_warps=8, num_stages=3)
    step = Step(8192, 512, 8192, 1, config_row(GPUS[name].arch) | {"encode": blocks})
    launch = product(step, "encode bf16", "encode", 2 * 8192**2)
    return launch.tensor_flops / time_launch(launch, GPUS[name], blocks)["ms"] / 1e9


def copy(name: str) -> float:
    """GB/s of a pass over 4 GB."""
    return 4e3 / time_launch(Launch("", "", dram=4e9), GPUS[name])["ms"]


CUBLAS, BEST = "cuBLAS, 8192 x 8192 x 8192", "torch.matmul, the best of many shapes"
NCCL = "NVIDIA/nccl issue 1264"
PUBLISHED = (
    Published("A100", BEST, 271.2, "TFLOP/s", MATMULS, dense),
    Published("H100", BEST, 794.5, "TFLOP/s", MATMULS, dense),
    Published("H200", BEST, 794.5, "TFLOP/s", MATMULS, dense),
    Published("B200", BEST, 1745.0, "TFLOP/s", MATMULS, dense),
    Published("H100", CUBLAS, 797.8, "TFLOP/s", FAST_CU, dense),
    Published("H100", f"{CUBLAS}, another card", 518.6, "TFLOP/s", "pranjalssh/fast.cu issue 13", dense),
    Published("B200", CUBLAS, 1610.0, "TFLOP/s", "pyptx.dev/performance", dense),
    Published("A100", "Triton's tutorial kernel, K = 512", 167.2, "TFLOP/s", TUTORIAL, tutorial),
    Published("A100", "triad", 1759.0, "GB/s", BENCHES, copy),
    Published("H100", "reading", 3134.0, "GB/s", "simveit/effective-reduction-mojo on GitHub", copy),
    Published("H100", "copy", 2573.0, "GB/s", NCCL, copy),
    Published("H200", "reading", 3888.0, "GB/s", BENCHES, copy),
    Published("H200", "triad", 3534.0, "GB/s", BENCHES, copy),
    Published("B200", "RMSNorm", 6517.0, "GB/s", RMSNORM, copy),
)


def table() -> str:
    """The measurements and the model's side as Markdown."""
    lines: list[tuple[str, ...]] = [("GPU", "measured", "published", "model", "model / published", "source")]
    for row in PUBLISHED:
        predicted = row.model(row.gpu)
        values = [f"{value:.0f} {row.unit}" for value in (row.value, predicted)]
        lines.append((row.gpu, row.what, *values, f"{predicted / row.value:.2f}", row.source))
    return "\n".join(markdown(lines)) + "\n"


if __name__ == "__main__":
    print(table(), end="")
