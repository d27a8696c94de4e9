"""The language model under study: several places in it read in one pass, which ends with the last of them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.torch_modes import default_modes
from ..errors import UserError, near, shown
from .model_loading import BUILT_IN, TESTBED, load
from .partial_model import AllHooksRead, HookValues, Reader, Tail, close, places

__all__ = ["BUILT_IN", "TESTBED", "LanguageModel"]

#: implementations of attention, in the order in which they are tried
FASTEST = {"cuda": ("sdpa", "flex_attention", "eager"), "cpu": ("sdpa", "eager")}
ATTENTION = ("auto", *FASTEST["cuda"])
PROBE = 47  # tokens in a row of a probe; a prime, which is no model's number of heads
MEMORY = 2e9  # bytes that a pass through the model may take beside its weights
COPIES = 4  # of logits that are there at once: as the model gives them, in float32, their logarithms, what they become
PROBED = 16  # logits of a probe's tokens that are there at once: two references, two results, float64 copies
MOST_PADDING = 0.1  # of a group of rows that run together


class LanguageModel:
    """A causal language model and one or more places in it: `hooks`, as wide as `widths`; `hook`, `d_model` are the first.

    `model` is testbed, smollm2, a hub name, a folder, or a TransformerBridge or HookedTransformer in hand, which keeps
    its own device and dtype (by name: float32 on a CPU, bfloat16 on a GPU). The places are transformer_lens names
    (`hook`, `hooks`) or the residual stream after layers (`layer`, `layers`); after the middle layer unless given.

    Values of heads, [B, T, H, d_head] at `hook_z` and the like, are read and replaced as [B, T, H d_head], as in SAELens.

    `activations(tokens)` and `harvest(tokens)` give what passes the hooks, [B, T, D], and run no layer behind the last one
    needed; tokens are padded behind, if at all, and whatever stands at padding means nothing. `losses(tokens, replace)`
    runs the whole model with one hook's value replaced and gives the loss of every next token, [B, T - 1], in nats.

    Hooks at the edge of a module are read from a plain transformers model if that gives what transformer_lens does on a
    probe; `reader` says which of the two is in use, and `attention` how it attends: `auto` is the first of sdpa,
    flex_attention (GPU only) and eager that gives the same values. `compile` puts torch.compile on the plain model's
    layers. A GPU holds the layers that are needed, and the others from when `bridge` or `losses` is first asked for.

    Raises UserError for a model that can't be loaded and for a hook, a layer or an attention that it doesn't have.
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
            self._bridge = _in_hand(model)
            self.name = str(getattr(model.cfg, "model_name", None) or type(model).__name__)
            self.device, self.dtype = _device_of(model), next(model.parameters()).dtype
            if device is not None and torch.device(device).type != self.device.type:
                raise UserError(f"device: {device!r} is not allowed; {self.name} is already on {self.device}")
        self.memory: float = MEMORY
        self.n_layers: int = self._bridge.cfg.n_layers
        self.context: int = int(self._bridge.cfg.n_ctx)
        self._reader: Reader | None = None
        self._tails: dict[str, Tail | None] = {}
        self.use(
            hooks=[*([] if hook is None else [hook]), *hooks],
            layers=[*([] if layer is None else [layer]), *layers],
        )

    @default_modes()
    def use(self, *, hooks: Sequence[str] = (), layers: Sequence[int] = ()) -> None:
        """From now on read these hooks, or the residual stream after these layers; after the middle one unless given."""
        names = self._names(hooks, layers)
        probe = torch.randint(self._bridge.cfg.d_vocab, (2, min(PROBE, self.context)), generator=_seeded())
        try:
            reference = self._through(self._bridge, probe, names)
        except UserError:
            raise
        except ValueError as error:  # transformer_lens has hooks that it doesn't pass unless told to
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
        """What the hooks are read from: transformers or transformer_lens."""
        return "transformer_lens" if self._reader is None else "transformers"

    @property
    def tokenizer(self) -> Any:
        """What makes tokens of text; None of a model that came without."""
        return self._bridge.tokenizer

    @property
    def vocabulary(self) -> int:
        """How many tokens the model embeds."""
        return int(self._bridge.cfg.d_vocab)

    @property
    def bridge(self) -> Any:
        """The whole model as transformer_lens has it, all of it on `device` from the first time that it is asked for."""
        if _device_of(self._bridge) != self.device:
            placed = self._reader.placed if self._reader else {}
            for root in (self._bridge, self._bridge.original_model, self._plain):
                if root is not None:  # what the reader put on the device already is not put there twice
                    _replace(root, placed)
            with self._room():
                self._bridge.to(self.device, print_details=False)
        return self._bridge

    @default_modes()
    def activations(self, tokens: Tensor) -> Tensor:
        """What passes the first hook, [B, T, D], for tokens [B, T]."""
        return self._read(tokens, (self.hook,))[self.hook]

    @default_modes()
    def harvest(self, tokens: Tensor, length: Tensor | None = None) -> dict[str, Tensor]:
        """What passes each hook, [B, T, D_hook], for tokens [B, T], in one pass.

        With the `length` [B] of each row, rows of similar length run together, cut to the longest of them, which changes
        nothing but the time: attention is causal and padding stands behind. Behind a row's end are zeros then."""
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
    def logits(
        self, tokens: Tensor, replace: Callable[[Tensor], Tensor] | None = None, hook: str | None = None
    ) -> Tensor:
        """Logits of every next token [B, T, V], with the value x at `hook` (the first) becoming replace(x)."""
        tokens, bridge = tokens.to(self.device), self.bridge
        if replace is None:
            return bridge(tokens)
        (place,) = self._names([hook or self.hook], ())
        return bridge.run_with_hooks(tokens, fwd_hooks=[(place, lambda x, hook: _of_heads(replace, x))])

    @default_modes()
    def losses(
        self, tokens: Tensor, replace: Callable[[Tensor], Tensor] | None = None, hook: str | None = None
    ) -> Tensor:
        """Loss of every next token, [B, T - 1] in nats; the rest as in `logits`. For how many rows: `rows_with_logits`."""
        return next_token_losses(self.logits(tokens, replace, hook), tokens)

    def rows_with_logits(self, T: int) -> int:
        """How many rows of T tokens may have all of their logits at once, within `memory`; at least one."""
        return max(1, int(self.memory / (COPIES * 4 * T * self.vocabulary)))

    def rows_of_activations(self, T: int) -> int:
        """How many rows of T tokens may go through a layer at once, within `memory`, by an estimate: three times what an MLP
        is wide and six times the residual stream, attention's weights in float32, and what the hooks give; at least one."""
        cfg = self._bridge.cfg
        wide = 3 * int(getattr(cfg, "d_mlp", None) or 4 * cfg.d_model) + 6 * cfg.d_model + sum(self.widths.values())
        attention = 0 if self.attention != "eager" else 2 * 4 * T * cfg.n_heads
        return max(1, int(self.memory / (T * (wide * self.dtype.itemsize + attention))))

    @default_modes()
    def tail(self, hook: str | None = None) -> Tail | None:
        """The model from a hook (the first) on, with which the layers before it need not run again for every replacement.

        None where there is no plain model with that hook at the edge of a module, or where its logits are not those of
        `logits` on a probe, with the hook's value as it is and with another one.
        """
        name = self.place(hook or self.hook)
        if name not in self._tails:
            self._tails[name] = self._tested_tail(name)
        return self._tails[name]

    def _tested_tail(self, hook: str) -> Tail | None:
        layers_and_sites = None if self._plain is None else places(self._bridge, [hook])
        if self._plain is None or layers_and_sites is None:
            return None
        T = max(2, min(PROBE, self.context, int(self.memory / (PROBED * 2 * 4 * self.vocabulary))))
        probe = torch.randint(self._bridge.cfg.d_vocab, (2, T), generator=_seeded()).to(self.device)
        x = self._through(self.bridge, probe, [hook])[hook]
        replacement = x.flip(0, 1)
        reference = {"as it is": self.logits(probe), "replaced": self.logits(probe, lambda _: replacement, hook)}
        for attention in FASTEST.get(self.device.type, FASTEST["cpu"]):
            try:
                tail = Tail(self._plain, layers_and_sites[0], layers_and_sites[1][hook], self.device)
                if not tail.attend(attention):
                    continue
                hidden = {"as it is": tail.begin(probe, x), "replaced": tail.replaced(probe, replacement)}
                logits = {name: tail.logits(h.flatten(0, 1)).view(*probe.shape, -1) for name, h in hidden.items()}
            except Exception:  # a model that can't be cut here is one that is run whole
                continue
            if close(logits, reference):
                return tail
        return None

    @default_modes()
    @torch.no_grad()
    def direct_logits(self, directions: Tensor) -> Tensor | None:
        """What directions [n, D] of the residual stream do to the logits where nothing else is there, float32 [n, V].

            unembed(ln_final(direction)) - unembed(ln_final(0))        without soft-capping

        None where D is not the residual stream's width, or the model has no such two modules.
        """
        norm, unembed = (getattr(self.bridge, name, None) for name in ("ln_final", "unembed"))
        if directions.shape[1] != self.bridge.cfg.d_model or norm is None or unembed is None:
            return None
        x = directions.to(self.device, self.dtype)[:, None]
        affected, baseline = (unembed(norm(residual)).float()[:, 0] for residual in (x, torch.zeros_like(x[:1])))
        return affected - baseline

    def _read(self, tokens: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        if self._reader is not None:
            values = self._reader.read(tokens.to(self.device), hooks)
            return {name: values[name] for name in hooks}
        return self._through(self.bridge, tokens, hooks)

    @torch.no_grad()
    def _through(self, bridge: Any, tokens: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        catch = HookValues(hooks)

        def watch(name: str) -> tuple[str, Callable[..., None]]:
            return name, lambda x, hook: catch.put(name, x.flatten(2) if _has_heads(x, tokens) else x)

        with suppress(AllHooksRead):
            bridge.run_with_hooks(tokens.to(_device_of(bridge)), fwd_hooks=[watch(name) for name in hooks])
        if missing := [name for name in hooks if name not in catch.values]:
            raise UserError(f"hook: {missing[0]!r} is not allowed; {self.name} never passes it")
        return {name: catch.values[name] for name in hooks}

    def _fastest(self, hooks: Sequence[str], probe: Tensor, reference: dict[str, Tensor]) -> tuple[Reader | None, str]:
        """The reader to use and how it attends: None and eager where only transformer_lens gives the right values."""
        attentions = FASTEST.get(self.device.type, FASTEST["cpu"])
        candidate = self._partial_reader(hooks)

        def works(attention: str) -> bool:
            if candidate is None or not candidate.attend(attention):
                return False
            try:
                return close(candidate.read(probe.to(self.device), hooks), reference)
            except Exception:  # a reader that can't run this model is one that isn't used
                return False

        chosen = next(
            filter(works, attentions if self._requested_attention == "auto" else (self._requested_attention,)), None
        )
        if chosen is None and self._requested_attention not in ("auto", "eager"):
            available = [attention for attention in attentions if attention == "eager" or works(attention)]
            raise UserError(
                f"attention: {self._requested_attention!r} is not allowed for {', '.join(hooks)} of {self.name}; "
                f"{' and '.join(available)} can be had"
            )
        if self._compile and (candidate is None or chosen is None):
            raise UserError(
                f"compile: True is not allowed; only transformer_lens reads {', '.join(hooks)} of {self.name}"
            )
        if candidate is None or chosen is None:
            return None, "eager"
        if self._compile:
            candidate.compile()
        return candidate, chosen

    def _partial_reader(self, hooks: Sequence[str]) -> Reader | None:
        layers_and_sites = None if self._plain is None else places(self._bridge, hooks)
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
        """The hook of this name, or at the residual stream after this layer; after the middle one if neither is given.
        `field`: the setting that names the hook."""
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
    """Rows [B] in groups of similar `length`: a group ends when padding would make up more than `MOST_PADDING` of it, but
    not before it holds an eighth of all tokens, since small forward passes are slow."""
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
    """-log p of every next token, [B, T - 1] in nats, of logits [B, T, V] and tokens [B, T]."""
    predictions, targets = logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(predictions, targets, reduction="none").view(tokens.shape[0], -1)


def _has_heads(x: Tensor, tokens: Tensor) -> bool:
    """Whether a hook's value is [B, T, H, d_head], for tokens [B, T]. Attention patterns, [B, H, T, T], are not."""
    return x.ndim == 4 and x.shape[:2] == tokens.shape


def _of_heads(replace: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A replacement of values [B, T, D] where the hook has heads."""
    return replace(x) if x.ndim <= 3 else replace(x.flatten(2)).reshape(x.shape)


def _device(name: str) -> torch.device:
    """With its index, as tensors name it: cuda is cuda:0."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"device: {name!r} is not allowed; torch can't use it ({reason})") from error


def _in_hand(model: Any) -> Any:
    """A TransformerBridge or a HookedTransformer, told by what it can do: not every transformer_lens has both."""
    if not all(hasattr(model, name) for name in ("run_with_hooks", "hook_dict", "cfg")):
        raise UserError(
            f"model: a {type(model).__name__} is not allowed; "
            "give a name, a folder, a TransformerBridge or a HookedTransformer"
        )
    return model


def _device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


def _replace(root: nn.Module, replacements: dict[int, nn.Parameter]) -> None:
    for module in root.modules():
        for name, p in module._parameters.items():
            if id(p) in replacements:
                module._parameters[name] = replacements[id(p)]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
