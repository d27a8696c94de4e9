"""Typed, validated settings of a run. A wrong value names the field, the value, and what is allowed."""

from ..setting_types import Config
from ..storage.yaml_file import read_yaml
from .base import Coefficient, Count, Latents, Positions, Rows, Share, Temperature, section
from .run import RunConfig, SweepConfig
from .sae import MaskConfig, SAEConfig
from .stream import Layer, StreamConfig
from .train import EvalConfig, TrainConfig
from .world import WorldConfig
