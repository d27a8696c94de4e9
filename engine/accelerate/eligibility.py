"""Decide for each call whether our ops replace the library's code.

`takes` decides. The library's code runs with torch modes that observe or transform a computation, with hooks, replaced
methods or modules, and with unusual inputs or parameters. A second differentiation cannot be foreseen, so
`TwiceDifferentiable` computes such gradients through the library's code.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._device import DeviceContext

FLOATING = (torch.float32, torch.bfloat16, torch.float64)  # in float16 another order of sums selects other latents
#: modules inside a dictionary that our ops replace, or that do nothing without a hook
INSIDE = {
    ("torch.nn.modules.linear", "Linear"), ("torch.nn.modules.activation", "ReLU"),
    ("transformer_lens.hook_points", "HookPoint"), ("sae_lens.saes.topk_sae", "TopK"),
    ("sae_lens.saes.topk_sae", "SparseHookPoint"), ("sae_lens.saes.batchtopk_sae", "BatchTopK"),
}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GENERATED = "<string>"  # file name of methods that a dataclass generates
_checked: dict[type, dict[str, Any]] = {}  # class -> its contents when they were last checked to be the library's


def takes(owner: Any, x: Any) -> bool:
    """Whether our ops give the same results as the library's code for its dictionary `owner` and input `x`."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return False
    is_usual = x.ndim > 1 and x.numel() > 0 and x.dtype in FLOATING and x.layout == torch.strided
    is_usual = is_usual and (torch.is_inference_mode_enabled() or not x.is_inference())
    return is_usual and _modes_are_plain(x) and is_as_made(owner) and obstacle(owner, x.device, FLOATING) is None


def fits(x: Tensor, W: Tensor, centred: bool) -> bool:
    """Whether torch multiplies x and W of these dtypes. `centred`: a parameter was subtracted from x, which may widen it."""
    wider = torch.promote_types(x.dtype, W.dtype) == W.dtype
    return x.dtype == W.dtype or (wider and (centred or torch.is_autocast_enabled(x.device.type)))


def is_as_made(owner: Any) -> bool:
    """Whether an accelerated object still has its library's methods, and known modules without hooks."""
    cls = type(owner)
    if "library_class" not in vars(cls) or not all(map(_is_the_librarys, _classes(cls.library_class))):
        return False
    if any(name in _methods(cls.library_class) for name in vars(owner)):  # replaced on the object
        return False
    # a trainer's dictionary is checked separately
    inner = [module for module in owner.modules() if module is not owner] if hasattr(owner, "encode") else []
    return not modules._has_any_global_hook() and all(map(_does_nothing_else, inner))


def trains(trainer: Any, dictionary: Any, x: Any) -> bool:
    """Whether our ops can run a trainer's step on x: both objects are unchanged, and the dictionary has no hooks."""
    return is_as_made(trainer) and is_as_made(dictionary) and not _has_hooks(dictionary) and dictionary._is_plain(x)


def obstacle(
    module: nn.Module, device: torch.device | None = None, dtypes: tuple[torch.dtype, ...] | None = None
) -> str | None:
    """Why our ops do not support a module's parameters, optionally on `device` and in `dtypes`. None if they do."""
    name_of_storage: dict[int, str] = {}
    first: tuple[str, Tensor] | None = None
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return f"{name} is a {type(tensor).__name__} of layout {tensor.layout}; only plain tensors are allowed"
        if tensor.is_meta:
            return f"{name} is on the meta device; give it values first"
        if tensor.is_inference():
            return f"{name} was made in inference mode; clone it first"
        if not tensor.is_contiguous() and not tensor.T.is_contiguous():
            return f"{name} is not contiguous; strides {tensor.stride()} are not allowed"
        storage = tensor.untyped_storage().data_ptr()
        if storage in name_of_storage:
            return f"{name} shares its memory with {name_of_storage[storage]}; tied views are not allowed"
        name_of_storage[storage] = name
        first = first or (name, tensor)
        if dtypes is not None and tensor.dtype not in dtypes:
            return f"{name} has dtype {tensor.dtype}, which is not allowed"
        for attribute, allowed in (("dtype", first[1].dtype), ("device", device or first[1].device)):
            value = getattr(tensor, attribute)
            if value != allowed and not (attribute == "dtype" and name == "threshold"):  # float32 in SAELens
                expected = getattr(first[1], attribute)
                return f"{name} has {attribute} {value}, {first[0]} {expected}; all must have the same"
    return "parameters are missing" if first is None else None


def _modes_are_plain(x: Tensor) -> bool:
    """Whether no mode observes operations (dispatch and function modes, tracing), transforms them (torch.func, forward
    mode), relies on saved tensors (checkpointing) or requires deterministic algorithms."""
    modes = (torch._C._get_function_stack_at(index) for index in range(torch._C._len_torch_function_stack()))
    has_modes = any(type(mode) is not DeviceContext for mode in modes)  # DeviceContext only sets a device
    observes = torch._C._len_torch_dispatch_stack() > 0 or torch.jit.is_tracing() or has_modes
    transforms = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    saves = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore[reportAttributeAccessIssue]
    return not (observes or transforms or saves or torch.are_deterministic_algorithms_enabled())


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def _does_nothing_else(inner: nn.Module) -> bool:
    """Whether a module inside a dictionary is a known one, without hooks and with its original `forward`."""
    cls = type(inner)
    is_known = (cls.__module__, cls.__name__) in INSIDE and "forward" not in vars(inner)
    return is_known and not _has_hooks(inner) and all(map(_is_the_librarys, _classes(cls)))


@cache
def _classes(cls: type) -> tuple[type, ...]:
    """A class and its bases, without nn.Module and those of Python itself."""
    return tuple(base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("builtins", "typing", "abc")
                 and base is not nn.Module)  # fmt: skip


@cache
def _methods(cls: type) -> frozenset[str]:
    return frozenset(name for base in cls.__mro__ for name, value in vars(base).items() if callable(value))


def _is_the_librarys(cls: type) -> bool:
    contents = vars(cls)
    if cls in _checked and _checked[cls] == contents:
        return True
    paths = _library_paths(cls)
    for name, value in contents.items():
        for code in _codes(value):
            if not code.co_filename.startswith(paths) and not (code.co_filename == _GENERATED and name[:2] == "__"):
                return False
    _checked[cls] = dict(contents)
    return True


@cache
def _library_paths(cls: type) -> tuple[str, ...]:
    """Folders with code of the library and of the decorators of its methods."""
    roots = (cls.__module__.partition(".")[0], "torch", "contextlib", "typing_extensions", "transformer_lens")
    libraries = [sys.modules[root] for root in roots if root in sys.modules]
    return tuple(
        path
        for library in libraries
        for path in getattr(library, "__path__", [getattr(library, "__file__", None)])
        if path
    )


def _codes(value: Any) -> Iterator[CodeType]:
    if isinstance(value, property):
        for function in (value.fget, value.fset, value.fdel):
            yield from _codes(function)
        return
    function = getattr(value, "__func__", value)
    while function is not None:
        if isinstance(code := getattr(function, "__code__", None), CodeType):
            yield code
        function = getattr(function, "__wrapped__", None)


def twice(owner: Any, outputs: Sequence[Any], x: Tensor, by_library: Callable[[Tensor], Sequence[Any]]) -> list[Any]:
    """Make our ops' outputs differentiable any number of times. `by_library` computes them with the library's code."""
    positions = [i for i, output in enumerate(outputs) if isinstance(output, Tensor) and output.requires_grad]
    results = list(outputs)
    if not positions:
        return results
    parameters = dict(owner.named_parameters())
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None

    def recompute(x: Tensor, *values: Tensor) -> list[Tensor]:
        with ExitStack() as contexts:
            contexts.enter_context(torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None))
            contexts.enter_context(_reparametrize_module(owner, dict(zip(parameters, values, strict=True))))
            recomputed = by_library(x)
        return [recomputed[i] for i in positions]

    tensors = (*(outputs[i] for i in positions), x, *parameters.values())
    for i, output in zip(positions, TwiceDifferentiable.apply(recompute, len(positions), *tensors), strict=True):
        results[i] = output
    return results


class TwiceDifferentiable(torch.autograd.Function):
    """Pass outputs and their gradients through. With `create_graph`, compute the inputs' gradients through `recompute`,
    which can be differentiated again, and give the outputs none."""

    @staticmethod
    def forward(ctx: Any, recompute: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, inputs = tensors[:count], tensors[count:]
        ctx.recompute, ctx.count = recompute, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return tuple(output.detach() for output in outputs)  # the same memory

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, None, *grads, *[None] * len(inputs)
        grad_indices = [i for i, grad in enumerate(grads) if grad is not None]
        input_indices = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
        outputs = ctx.recompute(*inputs)
        input_grads: list[Tensor | None] = [None] * len(inputs)
        new_grads = torch.autograd.grad(
            [outputs[i] for i in grad_indices], [inputs[i] for i in input_indices], [grads[i] for i in grad_indices],
            create_graph=True, allow_unused=True,
        )  # fmt: skip
        for i, grad in zip(input_indices, new_grads, strict=True):
            input_grads[i] = grad
        return None, None, *[None] * ctx.count, *input_grads
