"""Parts of a plain transformers model: up to the last layer that some hooks need (`Reader`), and from a hook on (`Tail`).

transformer_lens computes attention in Python with a hook at every step of it. Where a hook is the input or output of a
module that the plain model has too, the plain model gives the same value sooner, with any implementation of attention.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class AllHooksRead(Exception):
    """Raised inside a forward pass once every value that was wanted is there."""


class HookValues:
    """Values by hook; `put` ends the forward pass, by raising AllHooksRead, with the last of `hooks`."""

    def __init__(self, hooks: Iterable[str]):
        self.hooks = set(hooks)
        self.values: dict[str, Tensor] = {}

    def put(self, hook: str, value: Tensor) -> None:
        self.values[hook] = value
        if self.values.keys() >= self.hooks:
            raise AllHooksRead


class ModuleSite(NamedTuple):
    """Input ("in") or output ("out") of a module of the plain model, and the layer that holds it."""

    layer: int
    module: str
    side: str


def places(bridge: Any, hooks: Iterable[str]) -> tuple[str, dict[str, ModuleSite]] | None:
    """Path of the plain model's list of layers, and where in that model each hook of a TransformerBridge lies.

    None if the bridge knows of no such list, or if a hook is anything else than what goes into or comes out of a module.
    """
    blocks = getattr(bridge.adapter, "component_mapping", {}).get("blocks")
    if blocks is None or not blocks.name:
        return None
    sites: dict[str, ModuleSite] = {}
    for hook in hooks:
        # the hook points' own names: hook_resid_post is hook_out of the block, hook_mlp_out perhaps that of a norm
        match = re.fullmatch(r"blocks\.(\d+)\.(?:(.+)\.)?hook_(in|out)", str(bridge.hook_dict[hook].name))
        if match is None:
            return None
        layer, submodule_path, side = int(match[1]), match[2], match[3]
        if submodule_path is None and side == "in" and layer > 0:  # without entering another layer
            layer, side = layer - 1, "out"
        path, component = f"{blocks.name}.{layer}", blocks
        for name in submodule_path.split(".") if submodule_path else ():
            component = getattr(component, "submodules", {}).get(name)
            if component is None:
                return None
            path = f"{path}.{component.name}" if component.name else path
        sites[hook] = ModuleSite(layer, path, side)
    return blocks.name, sites


class Reader:
    """The part of a plain transformers model that some hooks need: embedding and layers up to the last one needed.

    Parameters that lie on `device` are shared with `plain`; the needed ones that don't are copied there once, into
    `placed` (by the id of the original), which is also looked into first. The layers behind are left out.
    """

    def __init__(
        self,
        plain: nn.Module,
        layers: str,
        places: Mapping[str, ModuleSite],
        device: torch.device,
        placed: Mapping[int, nn.Parameter] | None = None,
    ):
        self.places = dict(places)
        self._layers_path, parent = layers, layers.rpartition(".")[0]
        depth = 1 + max(place.layer for place in places.values())
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
        self.model = copy.deepcopy(plain, memo)
        self._stack = self.model.get_submodule(parent)
        for module in self.model.modules():
            config = getattr(module, "config", None)
            if getattr(config, "output_attentions", False):  # only eager attention has them
                setattr(config, "output_attentions", False)  # noqa: B010
        for module in self._stack.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)

    @property
    def layers(self) -> nn.ModuleList:
        layer_list = self.model.get_submodule(self._layers_path)
        assert isinstance(layer_list, nn.ModuleList)
        return layer_list

    def attend(self, attention: str) -> bool:
        """Use this implementation of attention from now on; False if transformers doesn't have it for this model."""
        return _attend(self.model, attention)

    def compile(self) -> None:
        """torch.compile for each layer, at fixed shapes; a layer with a hook inside it stays as it is."""
        layer_paths = {f"{self._layers_path}.{i}" for i in range(len(self.layers))}
        layers_hooked_inside = {place.layer for place in self.places.values() if place.module not in layer_paths}
        for i, layer in enumerate(self.layers):
            if i not in layers_hooked_inside:
                layer.forward = torch.compile(layer.forward, dynamic=False)

    @torch.no_grad()
    def read(self, tokens: Tensor, hooks: Iterable[str]) -> dict[str, Tensor]:
        """Values of these hooks for tokens [B, T] on the reader's device."""
        hooks = list(hooks)
        catch = HookValues(hooks)
        handles = [self._watch(hook, catch) for hook in hooks]
        try:
            self._stack(input_ids=tokens, use_cache=False)
        except AllHooksRead:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return catch.values

    def _watch(self, hook: str, catch: HookValues) -> Any:
        return _watch(self.model, self.places[hook], lambda value: catch.put(hook, value))


class Tail:
    """A plain transformers model from a hook on: the layers behind it, and the head by itself.

    Parameters are shared with `plain`. `hidden` gives what the head makes logits of, [B, T, D]: with the value at the hook
    as it is, then with others in its place. Layers before the hook run once or, where the hook is a layer's output, not at
    all. `logits` takes as many of those vectors at a time as there is room for.
    """

    def __init__(self, plain: nn.Module, layers: str, place: ModuleSite, device: torch.device):
        self.model: Any = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
        layer_list = self.model.get_submodule(layers)
        self._base: Any = self.model.base_model
        if not isinstance(layer_list, nn.ModuleList) or self._base is self.model:
            raise TypeError(f"{layers} is no list of layers, or the model has no head")
        self._site = place
        self._is_layer_output = (place.module, place.side) == (f"{layers}.{place.layer}", "out")
        self._skipped_layers = list(layer_list[: place.layer + self._is_layer_output])
        self._entry: Tensor | None = None  # [B, T, D], what the last of the layers left out gives
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)

    def attend(self, attention: str) -> bool:
        """Use this implementation of attention from now on; False if transformers doesn't have it for this model."""
        return _attend(self.model, attention)

    @torch.no_grad()
    def begin(self, tokens: Tensor, x: Tensor) -> Tensor:
        """What goes into the head, [B, T, D], of tokens [B, T] whose value at the hook is `x` [B, T, D_hook]."""
        self._entry = None
        if self._is_layer_output:
            return self.replaced(tokens, x)
        if not self._skipped_layers:
            return self._run(tokens)
        entries: list[Tensor] = []
        handle = self._skipped_layers[-1].register_forward_hook(lambda _, args, output: entries.append(_first(output)))
        try:
            hidden = self._run(tokens)
        finally:
            handle.remove()
        self._entry = entries[0]
        return hidden

    @torch.no_grad()
    def replaced(self, tokens: Tensor, value: Tensor) -> Tensor:
        """The same with `value` [B, T, D_hook] at the hook, of the tokens that `begin` was given."""
        entry = value if self._is_layer_output else self._entry
        handles: list[Any] = []
        for layer in self._skipped_layers:
            layer.forward = _passing(entry if layer is self._skipped_layers[-1] else None)
        if not self._is_layer_output:
            handles.append(_splice(self.model, self._site, value))
        try:
            return self._run(tokens)
        finally:
            for layer in self._skipped_layers:
                del layer.forward
            for handle in handles:
                handle.remove()

    def _run(self, tokens: Tensor) -> Tensor:
        self._output = self._base(input_ids=tokens, use_cache=False)
        return self._output.last_hidden_state

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of `hidden` [n, D], by the model's own head with all that comes after it."""
        output = copy.copy(self._output)
        output["last_hidden_state"] = hidden[None]
        self._base.forward = lambda *args, **options: output
        try:
            tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return self.model(input_ids=tokens, use_cache=False).logits[0]
        finally:
            del self._base.forward


def _passing(value: Tensor | None) -> Callable[..., Tensor]:
    """In place of a layer's forward: gives on what comes in, or `value`."""
    return lambda hidden_states, *args, **options: hidden_states if value is None else value


def _attend(model: Any, attention: str) -> bool:
    try:
        model.set_attn_implementation(attention)
    except Exception:  # not for this architecture, not in this transformers, not without some package
        return False
    return model.config._attn_implementation == attention


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def _watch(root: nn.Module, place: ModuleSite, put: Callable[[Tensor], None]) -> Any:
    """A forward hook that puts the value at a place."""
    module = root.get_submodule(place.module)
    if place.side == "out":
        return module.register_forward_hook(lambda _, args, output: put(_first(output)))
    return module.register_forward_pre_hook(
        lambda _, args, kwargs: put(_first(args or kwargs["hidden_states"])), with_kwargs=True
    )


def _splice(root: nn.Module, place: ModuleSite, value: Tensor) -> Any:
    """A forward hook that replaces the value at a place."""
    module = root.get_submodule(place.module)
    if place.side == "out":
        return module.register_forward_hook(
            lambda _, args, output: (value, *output[1:]) if isinstance(output, tuple) else value
        )

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

    return module.register_forward_pre_hook(before, with_kwargs=True)


def close(values: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> bool:
    """Whether every hook has its reference's shape [B, T, D] and its values.

    The root mean square over tokens of ||values - reference|| / ||reference|| is at most 1e-4, or 5e-2 in less than float32
    (where the same computation in another order is off by 2e-2 after thirty layers). Token by token, since a first token
    a hundred times as large as the others would hide whatever is wrong with those.
    """
    for hook, expected in reference.items():
        if hook not in values or values[hook].shape != expected.shape:
            return False
        limit = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
        norm = expected.double().norm(dim=-1)
        norm = norm.clamp_min(max(0.1 * norm.median().item(), 1e-30))  # for tokens of about zero
        error = (values[hook].to(expected.device).double() - expected.double()).norm(dim=-1) / norm
        if not bool(error.square().mean().sqrt() <= limit):  # NaN is not close
            return False
    return True
