"""Log D, multi-scale temporal SAEs for unlearning (`multiscale_conv`)."""

from .documented import Documented

RUNS: dict[str, Documented] = {}
