"""What an op costs: floating-point operations and bytes of device memory."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Work of one op, once: multiply-adds count two, every byte read from or written to device memory counts once.

    Gathers are counted as if they missed the cache, so `bytes` is an upper bound for ops that gather rows.
    """

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Time if arithmetic and traffic did not overlap: crude as a forecast, fair as a comparison of two ways."""
        return self.flops / flops_per_second + self.bytes / bytes_per_second
