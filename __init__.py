"""Train and study sparse autoencoders on language-model activations, with the position of every activation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .engine.accelerate import accelerate as accelerate
    from .engine.accelerate import accelerated as accelerated
    from .engine.accelerate import deaccelerate as deaccelerate
    from .engine.config import RunConfig as RunConfig
    from .engine.config import SAEConfig as SAEConfig
    from .engine.config import StreamConfig as StreamConfig
    from .engine.config import TrainConfig as TrainConfig
    from .engine.errors import UserError as UserError
    from .engine.parts import Part as Part
    from .engine.parts import PartSettings as PartSettings
    from .engine.parts import part as part
    from .engine.sae import SparseAutoencoder as SparseAutoencoder
    from .engine.storage.checkpoint import load as load
    from .engine.storage.checkpoint import save as save
    from .engine.stream import ActivationStream as ActivationStream
    from .engine.train import Run as Run
    from .engine.train import train as train
    from .engine.train import train_together as train_together
    from .evals import features as features
    from .evals.api import dashboard as dashboard
    from .evals.api import evaluate as evaluate
    from .kernels import ops as ops

_WHERE = {
    "ActivationStream": ".engine.stream",
    "Part": ".engine.parts",
    "PartSettings": ".engine.parts",
    "Run": ".engine.train",
    "RunConfig": ".engine.config",
    "SAEConfig": ".engine.config",
    "SparseAutoencoder": ".engine.sae",
    "StreamConfig": ".engine.config",
    "TrainConfig": ".engine.config",
    "UserError": ".engine.errors",
    "accelerate": ".engine.accelerate",
    "accelerated": ".engine.accelerate",
    "dashboard": ".evals.api",
    "deaccelerate": ".engine.accelerate",
    "evaluate": ".evals.api",
    "features": ".evals.features",
    "load": ".engine.storage.checkpoint",
    "ops": ".kernels.ops",
    "part": ".engine.parts",
    "save": ".engine.storage.checkpoint",
    "train": ".engine.train",
    "train_together": ".engine.train",
}

__all__ = [
    "ActivationStream",
    "Part",
    "PartSettings",
    "Run",
    "RunConfig",
    "SAEConfig",
    "SparseAutoencoder",
    "StreamConfig",
    "TrainConfig",
    "UserError",
    "__version__",
    "accelerate",
    "accelerated",
    "dashboard",
    "deaccelerate",
    "evaluate",
    "features",
    "load",
    "ops",
    "part",
    "save",
    "train",
    "train_together",
]


def __getattr__(name: str) -> Any:  # imports torch only when a name that needs it is used
    if name not in _WHERE:
        raise AttributeError(f"module 'temposae' has no attribute {name!r}")
    module = import_module(_WHERE[name], __name__)
    value = getattr(module, name, module)  # `features` and `ops` are modules
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
