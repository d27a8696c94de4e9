"""Parts of a plain transformers model: the layers up to the last hook (`Reader`), and the layers after a hook (`Tail`).

transformer_lens computes attention in Python, with a hook at every step. A hook that is the input or output of a module
can be read faster from the plain transformers model, with any implementation of attention.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class AllHooksRead(Exception):
    """Ends a forward pass once every requested value has been read."""


class HookValues:
    """Collects values by hook. `put` raises AllHooksRead with the last of `hooks`, which ends the forward pass."""

    def __init__(self, hooks: Iterable[str]):
        self.hooks = set(hooks)
        self.values: dict[str, Tensor] = {}

    def put(self, hook: str, value: Tensor) -> None:
        self.values[hook] = value
        if self.values.keys() >= self.hooks:
            raise AllHooksRead


class ModuleSite(NamedTuple):
    """The input ("in") or output ("out") of a module of the plain model, and the layer that contains it."""

    layer: int
    module: str
    side: str


def module_sites(bridge: Any, hooks: Iterable[str]) -> tuple[str, dict[str, ModuleSite]] | None:
    """The path of the plain model's list of layers, and the module site of each hook of a TransformerBridge.

    None if the bridge has no such list, or if a hook is not the input or output of a module.
    """
    blocks = getattr(bridge.adapter, "component_mapping", {}).get("blocks")
    if blocks is None or not blocks.name:
        return None
    sites: dict[str, ModuleSite] = {}
    for hook in hooks:
        # hook points have a second name: hook_resid_post is the block's hook_out, hook_mlp_out may be a norm's
        match = re.fullmatch(r"blocks\.(\d+)\.(?:(.+)\.)?hook_(in|out)", str(bridge.hook_dict[hook].name))
        if match is None:
            return None
        layer, submodule_path, side = int(match[1]), match[2], match[3]
        if submodule_path is None and side == "in" and layer > 0:  # so that this layer need not run
            layer, side = layer - 1, "out"
        path, component = f"{blocks.name}.{layer}", blocks
        for name in submodule_path.split(".") if submodule_path else ():
            component = getattr(component, "submodules", {}).get(name)
            if component is None:
                return None
            path = f"{path}.{component.name}" if component.name else path
        sites[hook] = ModuleSite(layer, path, side)
    return blocks.name, sites


def use_attention(model: Any, attention: str) -> bool:
    """Use this implementation of attention from now on. False if transformers does not have it for this model."""
    try:
        model.set_attn_implementation(attention)
    except Exception:  # unknown to this architecture or transformers version, or a package is missing
        return False
    return model.config._attn_implementation == attention


class Reader:
    """The part of a plain transformers model that some hooks need: the embedding and the layers up to the last hook.

    Parameters on `device` are shared with `plain`. Other parameters that are needed are copied there once, unless
    `placed` already has a copy. The new `placed` maps ids of original parameters to the copies.
    """

    def __init__(
        self,
        plain: nn.Module,
        layers: str,
        sites: Mapping[str, ModuleSite],
        device: torch.device,
        placed: Mapping[int, nn.Parameter] | None = None,
    ):
        self.sites = dict(sites)
        self._layers_path, parent = layers, layers.rpartition(".")[0]
        depth = 1 + max(site.layer for site in sites.values())
        layer_list = plain.get_submodule(layers)
        if not isinstance(layer_list, nn.ModuleList) or len(layer_list) < depth:
            raise TypeError(f"{layers} is no list of at least {depth} layers")
        left_out_ids = {id(p) for layer in layer_list[depth:] for p in layer.parameters()}
        left_out_ids -= {id(p) for layer in layer_list[:depth] for p in layer.parameters()}
        memo: dict[int, Any] = {id(p): p for p in plain.parameters()}
        self.placed: dict[int, nn.Parameter] = {}
        for p in plain.get_submodule(parent).parameters():
            if id(p) not in left_out_ids and p.device != device:
                copied = placed.get(id(p)) if placed else None
                self.placed[id(p)] = nn.Parameter(p.detach().to(device), False) if copied is None else copied
        memo |= self.placed
        memo[id(layer_list)] = nn.ModuleList([copy.deepcopy(layer, memo) for layer in layer_list[:depth]])
        self.model: Any = copy.deepcopy(plain, memo)
        self._stack = self.model.get_submodule(parent)
        for module in self.model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "output_attentions", False):  # only eager attention returns them
                config.output_attentions = False
        nn.Module.to(self._stack, device)  # only buffers are elsewhere; the method of quantised models raises

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self._layers_path)

    def compile(self) -> None:
        """Compile each layer for fixed shapes, except layers with a hook inside them."""
        layer_paths = {f"{self._layers_path}.{i}" for i in range(len(self.layers))}
        layers_hooked_inside = {site.layer for site in self.sites.values() if site.module not in layer_paths}
        for i, layer in enumerate(self.layers):
            if i not in layers_hooked_inside:
                layer.forward = torch.compile(layer.forward, dynamic=False)

    @torch.no_grad()
    def read(self, tokens: Tensor, hooks: Iterable[str]) -> dict[str, Tensor]:
        """Values of these hooks for tokens [B, T] on the reader's device."""
        hooks = list(hooks)
        values = HookValues(hooks)
        with suppress(AllHooksRead), ExitStack() as registered:
            for hook in hooks:
                registered.enter_context(_on_value(self.model, self.sites[hook], partial(values.put, hook)))
            self._stack(input_ids=tokens, use_cache=False)
        return values.values


class Tail:
    """The part of a plain transformers model after a hook: the remaining layers, and separately the head.

    Parameters are shared with `plain`. `begin` and `replaced` return the head's inputs [B, T, D] with the hook's value
    unchanged and replaced. The layers before the hook run once in `begin`, or never if the hook is a layer's output.
    `logits` applies the head to any number of those vectors.
    """

    def __init__(self, plain: nn.Module, layers: str, site: ModuleSite, device: torch.device):
        self.model = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
        layer_list = self.model.get_submodule(layers)
        self._base: Any = self.model.base_model
        if not isinstance(layer_list, nn.ModuleList) or self._base is self.model:
            raise TypeError(f"{layers} is no list of layers, or the model has no head")
        self._site = site
        self._is_layer_output = (site.module, site.side) == (f"{layers}.{site.layer}", "out")
        self._skipped_layers = list(layer_list[: site.layer + self._is_layer_output])
        self._entry: Tensor | None = None  # [B, T, D], output of the last skipped layer
        nn.Module.to(self.model, device)

    @torch.no_grad()
    def begin(self, tokens: Tensor, x: Tensor) -> Tensor:
        """The head's inputs [B, T, D] for tokens [B, T], whose value at the hook is `x` [B, T, D_hook]."""
        self._entry = None
        if self._is_layer_output:
            return self.replaced(tokens, x)
        if not self._skipped_layers:
            return self._run(tokens)
        entries: list[Tensor] = []
        last_layer = self._skipped_layers[-1]
        with last_layer.register_forward_hook(lambda _, args, output: entries.append(_first(output))):
            hidden = self._run(tokens)
        self._entry = entries[0]
        return hidden

    @torch.no_grad()
    def replaced(self, tokens: Tensor, value: Tensor) -> Tensor:
        """The head's inputs with `value` [B, T, D_hook] at the hook, for the tokens last given to `begin`."""
        entry = value if self._is_layer_output else self._entry
        with ExitStack() as undo:
            for layer in self._skipped_layers:
                layer.forward = _passing(entry if layer is self._skipped_layers[-1] else None)
                undo.callback(delattr, layer, "forward")
            if not self._is_layer_output:
                undo.enter_context(_on_value(self.model, self._site, lambda _: value))
            return self._run(tokens)

    def _run(self, tokens: Tensor) -> Tensor:
        self._output = self._base(input_ids=tokens, use_cache=False)
        return self._output.last_hidden_state

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of `hidden` [n, D], by the model's head and everything after it, such as soft-capping."""
        output = copy.copy(self._output)
        output["last_hidden_state"] = hidden[None]
        self._base.forward = lambda *args, **options: output
        try:
            tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return self.model(input_ids=tokens, use_cache=False).logits[0]
        finally:
            del self._base.forward


def _passing(value: Tensor | None) -> Callable[..., Tensor]:
    """A replacement for a layer's forward that returns its input, or `value`."""
    return lambda hidden_states, *args, **options: hidden_states if value is None else value


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def _on_value(root: nn.Module, site: ModuleSite, change: Callable[[Tensor], Tensor | None]) -> Any:
    """Register a forward hook that replaces the value at a site with change(value), unless that is None."""
    module = root.get_submodule(site.module)

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        value = change(_first(output))
        return (value, *output[1:]) if value is not None and isinstance(output, tuple) else value

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        value = change(_first(args or kwargs["hidden_states"]))
        if value is None:
            return None
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

    if site.side == "out":
        return module.register_forward_hook(after)
    return module.register_forward_pre_hook(before, with_kwargs=True)


def close(values: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> bool:
    """Whether the values [B, T, D] of every hook have the shape of their reference and agree with it.

    The root mean square over tokens of ||values - reference|| / ||reference|| must be at most 1e-4, or 5e-2 for dtypes
    below float32, where reordering a computation alone gives 2e-2 after thirty layers. Errors are relative per token,
    because a first token a hundred times as large as the others would hide theirs.
    """
    for hook, expected in reference.items():
        if hook not in values or values[hook].shape != expected.shape:
            return False
        limit = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
        norm = expected.double().norm(dim=-1)
        norm = norm.clamp_min(max(0.1 * norm.median().item(), 1e-30))  # for tokens near zero
        error = (values[hook].to(expected.device).double() - expected.double()).norm(dim=-1) / norm
        if not bool(error.square().mean().sqrt() <= limit):  # NaN is not close
            return False
    return True
