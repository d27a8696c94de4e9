"""The `BENCH` of every kernels/<op>/bench.py, in the order of a training step."""

from importlib import import_module
from pkgutil import iter_modules

from .. import kernels
from ..kernels.bench_types import STAGES, OpBench

BENCHES: list[OpBench] = sorted(
    (
        import_module(f"..kernels.{module.name}.bench", __package__).BENCH
        for module in iter_modules(kernels.__path__)
        if module.ispkg
    ),
    key=lambda bench: STAGES.index(bench.stage),
)
