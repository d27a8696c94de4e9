"""GPUs of the performance model: their units, and the rates that they reach in practice."""

from typing import NamedTuple

from .floors import KNOWN, Rates

# published measurements of rates
BENCHES = "te42kyfo/gpu-benches on GitHub, commit 1c36d509"
MATMULS = "Maximum Achievable Matmul FLOPS, stas00/ml-engineering on GitHub, commit 744d01e1"
RMSNORM = "NVIDIA/cutlass pull request 2917, RMSNorm on a B200"


class Sm(NamedTuple):
    """Limits of a streaming multiprocessor. Each has 4 schedulers, which issue one warp's instruction per cycle."""

    shared_bytes: int  # 1 KB less for each CTA
    tensor_flops: int  # per cycle, bfloat16
    float_cycles: int  # of a scheduler, for a float32 instruction of a warp
    registers: int = 65536
    warps: int = 64
    ctas: int = 32


#: by architecture
SMS = {
    80: Sm(shared_bytes=164 * 1024, tensor_flops=2048, float_cycles=2),
    90: Sm(shared_bytes=228 * 1024, tensor_flops=4096, float_cycles=1),
    100: Sm(shared_bytes=228 * 1024, tensor_flops=8192, float_cycles=1),
}


class Gpu(NamedTuple):
    """A GPU. Rates of H100 and H200 are those of the floors, and others are published measurements.

    tile_bytes_per_s  of L2 where many programs read the same tiles. `rates` has that of gathered rows, an assumption
    clock             Hz, of kernels without matrix products
    latency           seconds from a load to its value while memory is busy, an assumption
    """

    arch: int
    sms: int
    clock: float
    rates: Rates
    tile_bytes_per_s: float
    latency: float = 0.6e-6

    @property
    def sm(self) -> Sm:
        return SMS[self.arch]

    @property
    def tensor_clock(self) -> float:
        """The clock at which tensor cores that never wait reach the rate of matrix products."""
        return self.rates.flops[2] / (self.sms * self.sm.tensor_flops)


# Tiles: measured on an A100 and an H200, and assumed for the H100, which has the H200's chip, and, by multiprocessors, for
# the B200. Gathers: the floors assume 5.5 TB/s for an H100, and the others have the same share of the rate of tiles.
GPUS = {
    "A100": Gpu(80, 108, 1.41e9, Rates("A100", {2: 271.2e12}, 1.73e12, 3.1e12, f"{MATMULS}; {BENCHES}"), 5.4e12),
    "H100": Gpu(90, 132, 1.755e9, KNOWN["H100"], 9.7e12),
    "H200": Gpu(90, 132, 1.755e9, KNOWN["H200"], 9.7e12),
    "B200": Gpu(100, 148, 1.85e9, Rates("B200", {2: 1745e12}, 6.5e12, 6.2e12, f"{MATMULS}; {RMSNORM}"), 10.9e12),
}
