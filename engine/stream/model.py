"""The language model: reads several hooks in one forward pass, which ends at the last of them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.torch_modes import default_modes
from ..errors import UserError, near, shown
from .model_loading import load
from .partial_model import AllHooksRead, HookValues, Reader, Tail, close, module_sites, use_attention

#: implementations of attention by device, in the order in which they are tried
FASTEST = {"cuda": ("sdpa", "flex_attention", "eager"), "cpu": ("sdpa", "eager")}
ATTENTION = ("auto", *FASTEST["cuda"])
PROBE = 47  # tokens per row of a probe; a prime, so that it differs from every number of heads
MEMORY = 2e9  # bytes that a pass may take besides the weights
COPIES = 4  # of all logits at once: the model's, in float32, log-probabilities, and the result
PROBED = 16  # of a probe's logits at once: two references, two results, and float64 copies
MOST_PADDING = 0.1  # share of padding in a group of rows that run together
Change = Callable[[Tensor], Tensor]


class LanguageModel:
    """A causal language model that reads `hooks` of these `widths`; `hook` and `d_model` describe the first hook.

    `model` is testbed, smollm2, a hub name, a folder, or a TransformerBridge or HookedTransformer in memory. Models in
    memory keep their device and dtype; others use float32 on a CPU and bfloat16 on a GPU. Hooks are transformer_lens
    names (`hook`, `hooks`) or the residual stream after layers (`layer`, `layers`), by default after the middle layer.
    Values per head, [B, T, H, d_head] at hooks such as `hook_z`, are read and replaced as [B, T, H d_head].

    Tokens may be padded at the end; the values at padding have no meaning. Activations run no layer after the last one
    needed, and a GPU holds only these layers until `bridge` or `losses` is first used. If a hook is the input or output
    of a module, it is read from a plain transformers model, provided that this gives the values of transformer_lens on
    a probe. `attention="auto"` selects the first of sdpa, flex_attention (GPU only) and eager that gives these values.
    `compile` compiles the layers of the plain model.

    Raises UserError if the model can't be loaded or lacks a requested hook, layer or attention implementation.
    """

    @default_modes()
    def __init__(
        self,
        model: str | os.PathLike[str] | Any = "testbed",
        *,
        hook: str | None = None,
        hooks: Sequence[str] = (),
        layer: int | None = None,
        layers: Sequence[int] = (),
        device: str | None = None,
        attention: str = "auto",
        compile: bool = False,
    ):
        if attention not in ATTENTION:
            raise UserError(f"attention: {attention!r} is not allowed; it must be one of {', '.join(ATTENTION)}")
        self._requested_attention, self._compile = attention, compile
        self._plain: nn.Module | None = None
        if isinstance(model, str | os.PathLike):
            self.name = os.fspath(model)
            self.device = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            self._bridge, self._plain = load(self.name, self.dtype)
        else:
            # by attributes, since not every transformer_lens version has both classes
            if not all(hasattr(model, name) for name in ("run_with_hooks", "hook_dict", "cfg")):
                allowed = "give a name, a folder, a TransformerBridge or a HookedTransformer"
                raise UserError(f"model: a {type(model).__name__} is not allowed; {allowed}")
            self._bridge = model
            self.name = str(getattr(model.cfg, "model_name", None) or type(model).__name__)
            self.device, self.dtype = _device_of(model), next(model.parameters()).dtype
            if device is not None and torch.device(device).type != self.device.type:
                raise UserError(f"device: {device!r} is not allowed; {self.name} is already on {self.device}")
        self.memory: float = MEMORY
        self.n_layers: int = self._bridge.cfg.n_layers
        self.context: int = int(self._bridge.cfg.n_ctx)
        self._reader: Reader | None = None
        self._tails: dict[str, Tail | None] = {}
        hooks = [name for name in (hook, *hooks) if name is not None]
        self.use(hooks=hooks, layers=[number for number in (layer, *layers) if number is not None])

    @default_modes()
    def use(self, *, hooks: Sequence[str] = (), layers: Sequence[int] = ()) -> None:
        """Read these hooks from now on, or the residual stream after these layers, by default after the middle one."""
        names = self._names(hooks, layers)
        probe = self._probe(min(PROBE, self.context))
        try:
            reference = self._through(self._bridge, probe, names)
        except UserError:
            raise
        except ValueError as error:  # transformer_lens disables some of its hooks by default
            raise UserError(f"hook: {' and '.join(map(repr, names))} can't be read; {error}") from error
        for name, value in reference.items():
            if value.ndim != 3:
                raise UserError(f"hook: {name!r} is not allowed; it gives {value.ndim} dimensions, not [B, T, D]")
        self._reader, self.attention = self._fastest(names, probe, reference)
        self.hooks: tuple[str, ...] = names
        self.widths: dict[str, int] = {name: reference[name].shape[-1] for name in names}
        self.hook, self.d_model = names[0], self.widths[names[0]]

    @property
    def reader(self) -> str:
        """The library that the hooks are read with: transformers or transformer_lens."""
        return "transformer_lens" if self._reader is None else "transformers"

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self._bridge.tokenizer

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model embeds."""
        return int(self._bridge.cfg.d_vocab)

    @property
    def bridge(self) -> Any:
        """The whole transformer_lens model. The first use moves all of it to `device`."""
        if _device_of(self._bridge) != self.device:
            placed = self._reader.placed if self._reader else {}
            for root in (self._bridge, self._bridge.original_model, self._plain):
                if root is not None:  # reuse the parameters that the reader has already moved
                    _replace(root, placed)
            with self._room():
                self._bridge.to(self.device, print_details=False)
        return self._bridge

    @default_modes()
    def activations(self, tokens: Tensor) -> Tensor:
        """Activations [B, T, D] at the first hook for tokens [B, T]."""
        return self._read(tokens, (self.hook,))[self.hook]

    @default_modes()
    def harvest(self, tokens: Tensor, length: Tensor | None = None) -> dict[str, Tensor]:
        """Activations [B, T, D_hook] at every hook for tokens [B, T], in one pass.

        With the `length` [B] of each row, rows of similar length run together, cut to the longest of them. Since
        attention is causal, this only saves time. Activations at padding are then zero."""
        if length is None:
            return self._read(tokens, self.hooks)
        acts_by_hook: dict[str, Tensor] = {}
        for rows in similar_length_groups(length):
            T = max(1, int(length[rows].max()))
            for hook, x in self._read(tokens[rows, :T], self.hooks).items():
                if hook not in acts_by_hook:
                    acts_by_hook[hook] = x.new_zeros(*tokens.shape, x.shape[-1])
                acts_by_hook[hook][rows.to(x.device), :T] = x
        return acts_by_hook

    @default_modes()
    @torch.no_grad()
    def logits(self, tokens: Tensor, replace: Change | None = None, hook: str | None = None) -> Tensor:
        """Next-token logits [B, T, V], with activations x at `hook` (default: the first) replaced by replace(x)."""
        tokens, bridge = tokens.to(self.device), self.bridge
        if replace is None:
            return bridge(tokens)
        edit = lambda x, hook: replace(x.flatten(2)).reshape(x.shape)
        return bridge.run_with_hooks(tokens, fwd_hooks=[(self.place(hook or self.hook), edit)])

    @default_modes()
    def losses(self, tokens: Tensor, replace: Change | None = None, hook: str | None = None) -> Tensor:
        """Next-token losses [B, T - 1] in nats; arguments as in `logits`. `rows_with_logits` says how many rows fit."""
        return next_token_losses(self.logits(tokens, replace, hook), tokens)

    def rows_with_logits(self, T: int) -> int:
        """Number of rows of T tokens whose logits fit in `memory` at once, at least one."""
        return max(1, int(self.memory / (COPIES * 4 * T * self.vocabulary)))

    def rows_of_activations(self, T: int) -> int:
        """Estimated number of rows of T tokens that fit in `memory` in one pass, at least one.

        Counts 3 times the MLP's width, 6 times the residual stream, the hooks' values, and eager attention."""
        cfg = self._bridge.cfg
        wide = 3 * int(getattr(cfg, "d_mlp", None) or 4 * cfg.d_model) + 6 * cfg.d_model + sum(self.widths.values())
        attention = 0 if self.attention != "eager" else 2 * 4 * T * cfg.n_heads
        return max(1, int(self.memory / (T * (wide * self.dtype.itemsize + attention))))

    @default_modes()
    def tail(self, hook: str | None = None) -> Tail | None:
        """The part of the model after a hook (default: the first), to run replacements without the earlier layers.

        None if there is no plain model, if the hook is not the input or output of a module, or if the logits on a probe
        differ from those of `logits`, with the hook's value unchanged or replaced.
        """
        name = self.place(hook or self.hook)
        if name not in self._tails:
            self._tails[name] = self._tested_tail(name)
        return self._tails[name]

    def _tested_tail(self, hook: str) -> Tail | None:
        layers_and_sites = None if self._plain is None else module_sites(self._bridge, [hook])
        if self._plain is None or layers_and_sites is None:
            return None
        T = max(2, min(PROBE, self.context, int(self.memory / (PROBED * 2 * 4 * self.vocabulary))))
        probe = self._probe(T).to(self.device)
        x = self._through(self.bridge, probe, [hook])[hook]
        replacement = x.flip(0, 1)
        reference = {"as it is": self.logits(probe), "replaced": self.logits(probe, lambda _: replacement, hook)}
        for attention in FASTEST.get(self.device.type, FASTEST["cpu"]):
            try:
                tail = Tail(self._plain, layers_and_sites[0], layers_and_sites[1][hook], self.device)
                if not use_attention(tail.model, attention):
                    continue
                hidden = {"as it is": tail.begin(probe, x), "replaced": tail.replaced(probe, replacement)}
                logits = {name: tail.logits(h.flatten(0, 1)).view(*probe.shape, -1) for name, h in hidden.items()}
            except Exception:  # a model that can't be split here is run as a whole
                continue
            if close(logits, reference):
                return tail
        return None

    @default_modes()
    @torch.no_grad()
    def direct_logits(self, directions: Tensor) -> Tensor | None:
        """Effect of directions [n, D] of the residual stream on the logits, float32 [n, V], without soft-capping.

            unembed(ln_final(direction)) - unembed(ln_final(0))

        None if D is not the width of the residual stream, or the model lacks one of the two modules.
        """
        norm, unembed = (getattr(self.bridge, name, None) for name in ("ln_final", "unembed"))
        if directions.shape[1] != self.bridge.cfg.d_model or norm is None or unembed is None:
            return None
        x = directions.to(self.device, self.dtype)[:, None]
        affected, baseline = (unembed(norm(residual)).float()[:, 0] for residual in (x, torch.zeros_like(x[:1])))
        return affected - baseline

    def _probe(self, T: int) -> Tensor:
        """Two rows of T random tokens, always the same, to compare implementations on."""
        return torch.randint(self._bridge.cfg.d_vocab, (2, T), generator=torch.Generator().manual_seed(0))

    def _read(self, tokens: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        if self._reader is not None:
            values = self._reader.read(tokens.to(self.device), hooks)
            return {name: values[name] for name in hooks}
        return self._through(self.bridge, tokens, hooks)

    @torch.no_grad()
    def _through(self, bridge: Any, tokens: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        catch = HookValues(hooks)

        def put(name: str, x: Tensor, hook: Any) -> None:
            has_heads = x.ndim == 4 and x.shape[:2] == tokens.shape  # unlike attention patterns [B, H, T, T]
            catch.put(name, x.flatten(2) if has_heads else x)

        with suppress(AllHooksRead):
            bridge.run_with_hooks(
                tokens.to(_device_of(bridge)), fwd_hooks=[(name, partial(put, name)) for name in hooks]
            )
        if missing := [name for name in hooks if name not in catch.values]:
            raise UserError(f"hook: {missing[0]!r} is not allowed; {self.name} never runs it")
        return {name: catch.values[name] for name in hooks}

    def _fastest(self, hooks: Sequence[str], probe: Tensor, reference: dict[str, Tensor]) -> tuple[Reader | None, str]:
        """The reader and its attention; None and eager if only transformer_lens gives the right values."""
        attentions, requested = FASTEST.get(self.device.type, FASTEST["cpu"]), self._requested_attention
        candidate = self._partial_reader(hooks)

        def works(attention: str) -> bool:
            if candidate is None or not use_attention(candidate.model, attention):
                return False
            try:
                return close(candidate.read(probe.to(self.device), hooks), reference)
            except Exception:  # a reader that can't run this model is not used
                return False

        chosen = next(filter(works, attentions if requested == "auto" else (requested,)), None)
        if chosen is None and requested not in ("auto", "eager"):
            available = [attention for attention in attentions if attention == "eager" or works(attention)]
            raise UserError(
                f"attention: {requested!r} is not allowed for {', '.join(hooks)} of {self.name}; "
                f"it must be {' or '.join(available)}"
            )
        if candidate is not None and chosen is not None:
            if self._compile:
                candidate.compile()
            return candidate, chosen
        if self._compile:
            raise UserError(f"compile: True is not allowed; {self.name} needs transformer_lens for {', '.join(hooks)}")
        return None, "eager"

    def _partial_reader(self, hooks: Sequence[str]) -> Reader | None:
        layers_and_sites = None if self._plain is None else module_sites(self._bridge, hooks)
        if self._plain is None or layers_and_sites is None:
            return None
        with self._room(), suppress(AttributeError, TypeError):  # no such modules, or not a list of layers
            return Reader(self._plain, *layers_and_sites, self.device, self._reader.placed if self._reader else None)

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise UserError(f"device: {self.device} is not allowed; it has too little memory for {self.name}") from None

    def place(self, hook: str | None = None, layer: int | None = None, *, field: str = "hook") -> str:
        """The name of this hook or of the residual stream after this layer, by default after the middle layer. Raises
        UserError, naming the setting `field`, if the model lacks it."""
        (name,) = self._names([] if hook is None else [hook], [] if layer is None else [layer], field)
        return name

    def _names(self, hooks: Iterable[str], layers: Iterable[int], field: str = "hook") -> tuple[str, ...]:
        hooks, layers = list(hooks), list(layers)
        if hooks and layers:
            raise UserError("hook: give a hook or a layer, not both")
        for hook in hooks:
            if hook not in self._bridge.hook_dict:
                raise UserError(f"{field}: {shown(hook)} is not in {self.name}; {near(hook, self._bridge.hook_dict)}")
        if not hooks and not layers:
            layers = [(self.n_layers - 1) // 2]
        for layer in layers:
            if not 0 <= layer < self.n_layers:
                raise UserError(f"layer: {layer} is not allowed; {self.name} has layers 0 to {self.n_layers - 1}")
        return tuple(dict.fromkeys([*hooks, *(f"blocks.{layer}.hook_resid_post" for layer in layers)]))


def similar_length_groups(length: Tensor) -> list[Tensor]:
    """Indices of rows in groups of similar `length` [B].

    A group ends when padding would exceed `MOST_PADDING` of it, but not before it holds an eighth of all tokens, since
    small forward passes are slow."""
    order = length.argsort(descending=True, stable=True)
    sizes = length[order].tolist()
    groups, start, group_tokens = [], 0, 0
    for index, size in enumerate(sizes):
        area = sizes[start] * (index + 1 - start)
        if index > start and area - (group_tokens + size) > MOST_PADDING * area and 8 * group_tokens >= sum(sizes):
            groups.append(order[start:index])
            start, group_tokens = index, 0
        group_tokens += size
    groups.append(order[start:])
    return groups


def next_token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p of every next token, [B, T - 1] in nats, from logits [B, T, V] and tokens [B, T]."""
    predictions, targets = logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(predictions, targets, reduction="none").view(tokens.shape[0], -1)


def _device(name: str) -> torch.device:
    """A torch device with its index: cuda becomes cuda:0."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"device: {name!r} is not allowed; torch can't use it ({reason})") from error


def _device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


def _replace(root: nn.Module, replacements: dict[int, nn.Parameter]) -> None:
    for module in root.modules():
        for name, p in module._parameters.items():
            if id(p) in replacements:
                module._parameters[name] = replacements[id(p)]
