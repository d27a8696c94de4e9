"""The work of an op: floating-point operations and bytes of device memory."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Work of one call. A multiply-add is two FLOPs. Each byte read from or written to device memory counts once.

    Gathers are counted as cache misses, so `bytes` is an upper bound for ops that gather rows.
    """

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Time without overlap of arithmetic and traffic: a crude forecast, but a fair comparison of two backends."""
        return self.flops / flops_per_second + self.bytes / bytes_per_second
