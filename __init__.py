"""temposae: train and study sparse autoencoders on language-model activations, without losing their positions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .engine import ops as ops
    from .engine.accelerate import accelerate as accelerate
    from .engine.accelerate import accelerated as accelerated
    from .engine.accelerate import deaccelerate as deaccelerate
    from .engine.checkpoint import load as load
    from .engine.checkpoint import save as save
    from .engine.config import RunConfig as RunConfig
    from .engine.config import SAEConfig as SAEConfig
    from .engine.config import StreamConfig as StreamConfig
    from .engine.config import TrainConfig as TrainConfig
    from .engine.sae import SparseAutoencoder as SparseAutoencoder
    from .engine.stream import ActivationStream as ActivationStream
    from .engine.train import train as train
    from .engine.train import train_together as train_together
    from .evals import features as features

_WHERE = {
    "ActivationStream": ".engine.stream",
    "RunConfig": ".engine.config",
    "SAEConfig": ".engine.config",
    "SparseAutoencoder": ".engine.sae",
    "StreamConfig": ".engine.config",
    "TrainConfig": ".engine.config",
    "accelerate": ".engine.accelerate",
    "accelerated": ".engine.accelerate",
    "deaccelerate": ".engine.accelerate",
    "features": ".evals.features",
    "load": ".engine.checkpoint",
    "ops": ".engine.ops",
    "save": ".engine.checkpoint",
    "train": ".engine.train",
    "train_together": ".engine.train",
}

__all__ = [
    "ActivationStream",
    "RunConfig",
    "SAEConfig",
    "SparseAutoencoder",
    "StreamConfig",
    "TrainConfig",
    "__version__",
    "accelerate",
    "accelerated",
    "deaccelerate",
    "features",
    "load",
    "ops",
    "save",
    "train",
    "train_together",
]


def __getattr__(name: str) -> Any:  # torch is imported only when something that needs it is asked for
    if name not in _WHERE:
        raise AttributeError(f"module 'temposae' has no attribute {name!r}")
    module = import_module(_WHERE[name], __name__)
    value = getattr(module, name, module)  # `features` is a module itself
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
