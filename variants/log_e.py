"""Log E, self-aligning adversarial SAEs (`self_aligning`)."""

from .documented import Documented

RUNS: dict[str, Documented] = {}
