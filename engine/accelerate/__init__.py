"""Dictionaries and trainers of other libraries, made faster in place: the same object, parameters, results and state_dict.

    accelerate(sae)                  from here on its encode, forward and training step go through our ops
    with accelerated(sae): ...       only within
    deaccelerate(sae)                as it was

An accelerated object is of a class derived from its own, so that isinstance still holds; what is pickled or deep-copied of
it is of its own class. Results and gradients are the same up to the order of sums. Where something needs what our ops never
make (a hook on pre-activations, autocast), the library's own code runs, for that call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import UserError, near

#: module and class of what can be accelerated -> ours, and its mixin there
KINDS: dict[tuple[str, str], tuple[str, str]] = {
    ("sae_lens.saes.topk_sae", "TopKSAE"): ("saelens", "TopK"),
    ("sae_lens.saes.topk_sae", "TopKTrainingSAE"): ("saelens", "TopKTraining"),
    ("sae_lens.saes.batchtopk_sae", "BatchTopKTrainingSAE"): ("saelens", "BatchTopKTraining"),
    ("dictionary_learning.trainers.top_k", "AutoEncoderTopK"): ("dictionary_learning", "TopK"),
    ("dictionary_learning.trainers.top_k", "TopKTrainer"): ("dictionary_learning", "TopKTraining"),
    ("dictionary_learning.trainers.batch_top_k", "BatchTopKSAE"): ("dictionary_learning", "BatchTopK"),
    ("dictionary_learning.trainers.batch_top_k", "BatchTopKTrainer"): ("dictionary_learning", "BatchTopKTraining"),
    ("sparsify.sparse_coder", "SparseCoder"): ("sparsify", "Coder"),
}  # fmt: skip
T = TypeVar("T")
_MADE: dict[type, type] = {}


def is_accelerated(obj: object) -> bool:
    return "own" in vars(type(obj)) and type(obj) in _MADE.values()


def accelerate(obj: T) -> T:
    """Make a dictionary or trainer faster in place; returns it. Nothing happens to one that is already.

    Raises UserError, and leaves the object as it is, for a class that can't be accelerated, and for parameters without
    values (meta), not contiguous, sharing memory, of several dtypes or on several devices.
    """
    if is_accelerated(obj):
        return obj
    cls = type(obj)
    place = KINDS.get((cls.__module__, cls.__name__))
    if place is None:
        known = sorted(name for _, name in KINDS)
        raise UserError(
            f"accelerate: {cls.__module__.partition('.')[0]}'s {cls.__name__} is not allowed; {near(cls.__name__, known)}"
        )
    for module in [obj] if isinstance(obj, nn.Module) else [getattr(obj, "ae", None)]:
        if isinstance(module, nn.Module):
            _check(module, cls.__name__)
    if cls not in _MADE:
        _MADE[cls] = _derived(cls, getattr(import_module(f".{place[0]}", __name__), place[1]))
    object.__setattr__(obj, "__class__", _MADE[cls])
    if not isinstance(obj, nn.Module):
        accelerate(obj.ae)  # pyright: ignore[reportAttributeAccessIssue]
    return obj


def deaccelerate(obj: T) -> T:
    """Let an object be of its own class again; returns it."""
    if is_accelerated(obj):
        object.__setattr__(obj, "__class__", type(obj).own)  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(obj, nn.Module):
            deaccelerate(obj.ae)  # pyright: ignore[reportAttributeAccessIssue]
    return obj


@contextmanager
def accelerated(obj: T) -> Iterator[T]:
    """`accelerate` within a block; one that is accelerated already stays so."""
    was = is_accelerated(obj)
    try:
        yield accelerate(obj)
    finally:
        if not was:
            deaccelerate(obj)


def _derived(cls: type, mixin: type) -> type:
    """A class derived from a library's alone, since an object may change its class only to one that lays it out alike: with
    the methods of ours, in which `own` is the library's."""
    methods: dict[str, Any] = {}
    for base in reversed(mixin.__mro__[:-1]):
        methods |= {name: value for name, value in vars(base).items() if callable(value)}

    def reduced(self: Any, protocol: Any) -> Any:
        _, _, *others = object.__reduce_ex__(self, max(2, int(protocol)))
        return _new, (cls,), *others

    own = {"own": cls, "__reduce_ex__": reduced, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), methods | own)


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def _check(module: nn.Module, name: str) -> None:
    seen: dict[int, str] = {}
    first: tuple[str, Tensor] | None = None
    for at, tensor in module.named_parameters():
        if tensor.is_meta:
            raise UserError(f"accelerate: {name}.{at} is on the meta device; give it values first")
        if not tensor.is_contiguous() and not tensor.T.is_contiguous():
            raise UserError(f"accelerate: {name}.{at} is not contiguous; strides {tensor.stride()} are not allowed")
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            raise UserError(
                f"accelerate: {name}.{at} shares its memory with {seen[storage]}; tied views are not allowed"
            )
        seen[storage] = at
        if first is None:
            first = at, tensor
        for what in ("dtype", "device"):
            own, other = getattr(tensor, what), getattr(first[1], what)
            if own != other:
                raise UserError(f"accelerate: {name}.{at} has {what} {own}, {first[0]} {other}; all must have the same")
