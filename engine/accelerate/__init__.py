"""Make dictionaries, trainers and optimisers of other libraries faster in place.

    accelerate(sae)                  encode, forward and training step use temposae's ops
    accelerate(trainer)              also its dictionaries, its loss, and its optimiser, which uses torch's fused step
    with accelerated(sae): ...       only within the block
    deaccelerate(sae)                restores the object

The object, its parameters and its state_dict stay the same. Its class is replaced by a derived one, so isinstance still
holds. Pickles and deep copies have the original class. Results and gradients are the same up to the order of sums, and so
are second derivatives of a dictionary. The library's own code runs if anything about a call is unusual (see `eligibility`),
and if so many latents are active that dense products are faster.
"""

import functools
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import UserError, near
from . import optimizers
from .eligibility import obstacle

#: (package, our module) -> classes of the package, for each of which our module has a mixin of the same name
_CLASSES = {
    ("sae_lens", "saelens"):
        "TopKSAE JumpReLUSAE StandardSAE GatedSAE Transcoder SkipTranscoder JumpReLUTranscoder JumpReLUSkipTranscoder",
    ("sae_lens", "saelens_training"):
        "TopKTrainingSAE BatchTopKTrainingSAE MatryoshkaBatchTopKTrainingSAE JumpReLUTrainingSAE StandardTrainingSAE "
        "GatedTrainingSAE SAETrainer",
    ("dictionary_learning", "dictionary_learning"):
        "AutoEncoderTopK BatchTopKSAE MatryoshkaBatchTopKSAE JumpReluAutoEncoder AutoEncoder GatedAutoEncoder",
    ("dictionary_learning", "dictionary_learning_training"):
        "TopKTrainer BatchTopKTrainer MatryoshkaBatchTopKTrainer JumpReluTrainer StandardTrainer "
        "StandardTrainerAprilUpdate GatedSAETrainer",
    ("sparsify", "sparsify"): "SparseCoder Trainer",
}  # fmt: skip
#: package and class -> our module
KINDS = {(package, name): module for (package, module), names in _CLASSES.items() for name in names.split()}
_ADAMS = (torch.optim.Adam, torch.optim.AdamW)
T = TypeVar("T")
_DERIVED_CLASSES: dict[type, type] = {}


def is_accelerated(obj: object) -> bool:
    return "library_class" in vars(type(obj)) and type(obj) in _DERIVED_CLASSES.values()


def accelerate(obj: T) -> T:
    """Make a dictionary, trainer or optimiser faster in place, and return it.

    A trainer's dictionaries and optimisers are accelerated with it. Optimisers other than Adam and AdamW are left as they
    are, with a warning. Raises UserError, without changing the object, for a class that cannot be accelerated, and for
    parameters that are on the meta device, not contiguous, share memory, or differ in dtype or device.

        trainer = accelerate(trainer)
    """
    if is_accelerated(obj):
        return obj
    components, unsupported = _components(obj, _mixin(obj))
    for component in components:
        _check(component)
    for optimizer in unsupported:
        warnings.warn(
            f"accelerate: {type(optimizer).__name__} is not accelerated; only Adam and AdamW are", stacklevel=2
        )
    for component in components:
        if not is_accelerated(component):
            object.__setattr__(component, "__class__", _derived(type(component), _mixin(component)))
            if isinstance(component, torch.optim.Optimizer):
                optimizers.fuse(component)
    return obj


def deaccelerate(obj: T) -> T:
    """Undo `accelerate`, and return the object.

    deaccelerate(sae)
    """
    if is_accelerated(obj):
        for component in _components(obj, type(obj))[0]:
            if is_accelerated(component):
                if isinstance(component, torch.optim.Optimizer):
                    optimizers.unfuse(component)
                object.__setattr__(component, "__class__", type(component).library_class)  # pyright: ignore[reportAttributeAccessIssue]
    return obj


@contextmanager
def accelerated(obj: T) -> Iterator[T]:
    """`accelerate` within a block. An object that was accelerated before stays accelerated.

    with accelerated(sae):
        sae(x)
    """
    was_accelerated = is_accelerated(obj)
    try:
        yield accelerate(obj)
    finally:
        if not was_accelerated:
            deaccelerate(obj)


def _mixin(obj: object) -> type:
    cls = type(obj).library_class if is_accelerated(obj) else type(obj)  # pyright: ignore[reportAttributeAccessIssue]
    package = cls.__module__.partition(".")[0]
    if (module := KINDS.get((package, cls.__name__))) is not None:
        return getattr(import_module(f".{module}", __name__), cls.__name__)
    if isinstance(obj, _ADAMS):
        return optimizers.Fused
    known = sorted({name for _, name in KINDS} | {"Adam", "AdamW"})
    raise UserError(f"accelerate: {package}'s {cls.__name__} is not allowed; {near(cls.__name__, known)}")


def _components(obj: Any, mixin: Any) -> tuple[list[Any], list[Any]]:
    """The object with, for a trainer, its dictionaries and optimisers, and the optimisers that cannot be accelerated."""
    if not hasattr(mixin, "_components"):
        return [obj], []
    dictionaries, candidates = mixin._components(obj)
    for dictionary in dictionaries:
        _mixin(dictionary)
    unsupported = [optimizer for optimizer in candidates if not isinstance(optimizer, _ADAMS)]
    return [obj, *dictionaries, *(optimizer for optimizer in candidates if isinstance(optimizer, _ADAMS))], unsupported


def _derived(cls: type, mixin: type) -> type:
    """A class derived from the library's with the mixin's methods. In these, `library_class` is the library's class.

    The mixin is not a base, because an object's class can only be replaced by one with the same memory layout.
    """
    if cls in _DERIVED_CLASSES:
        return _DERIVED_CLASSES[cls]
    methods: dict[str, Any] = {}
    for base in reversed(mixin.__mro__[:-1]):
        methods |= {name: _as_named(value, cls, name) for name, value in vars(base).items() if callable(value)}

    def reduce(self: Any, protocol: Any) -> Any:
        _, _, *state = object.__reduce_ex__(self, max(2, int(protocol)))
        return _new, (cls,), *state

    attributes = {"library_class": cls, "__reduce_ex__": reduce, "__module__": cls.__module__, "__doc__": cls.__doc__}
    _DERIVED_CLASSES[cls] = type(cls.__name__, (cls,), methods | attributes)
    return _DERIVED_CLASSES[cls]


def _as_named(method: Any, cls: type, name: str) -> Any:
    """A mixin's method with the signature and docstring of the library's method."""
    library_method = getattr(cls, name, None)
    if library_method is None or name[:2] == "__":
        return method
    copied = types.FunctionType(method.__code__, method.__globals__, name, method.__defaults__, method.__closure__)
    copied.__kwdefaults__ = method.__kwdefaults__
    return functools.update_wrapper(copied, library_method)


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def _check(component: Any) -> None:
    name = type(component).__name__
    if isinstance(component, torch.optim.Optimizer):
        if reason := optimizers.refusal(component):
            raise UserError(f"accelerate: {name} with {reason} is not allowed; torch's fused step does not support it")
        return
    if isinstance(component, nn.Module) and (reason := obstacle(component)) is not None:
        raise UserError(f"accelerate: {name}.{reason}")
