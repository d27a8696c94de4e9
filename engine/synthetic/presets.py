"""Worlds and recipes by name, as the sections of a config file."""

from typing import Any

from ..errors import check_known

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # same shape as the next: twice as many features as latents, and a few of them active
    "small": {
        "stream": {
            "world": {"features": 1024, "width": 96, "roots": 8, "firing_min": 2e-3},
            "buffer_dtype": "float32",
        },
        "sae": {"activation": "batchtopk", "d_sae": 512, "k": 7},
        "train": {"tokens": 400_000, "batch": 1024},
    },
    # the world and the recipe of arXiv 2602.14687
    "synthsaebench": {
        "stream": {"world": {}, "buffer_dtype": "float32"},
        "sae": {"activation": "batchtopk", "d_sae": 4096, "k": 25},
        "train": {"tokens": 200_000_000, "batch": 1024, "lr": 3e-4},
    },
}


def preset(name: str) -> dict[str, dict[str, Any]]:
    """The settings of a preset. Raises UserError for an unknown name."""
    check_known("preset", name, PRESETS)
    return PRESETS[name]
