"""The common form of dictionaries, between other libraries' formats and temposae's."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..config import SAEConfig
from ..errors import UserError
from ..sae import SparseAutoencoder
from .hook_metadata import Where

State = dict[str, Tensor]
BESIDE = "temposae.safetensors"  # our file beside a library's files


@dataclass(frozen=True)
class DictionarySpec:
    """A dictionary by its formula. W_enc [D, F], W_dec [F, D], any floating dtype.

        pre = (x - b_dec) W_enc + b_enc      with `subtracts`, else x W_enc + b_enc
        f   = relu(pre) where pre > threshold, [F] (jumprelu) or one number (batchtopk); the k largest per token (topk)

    A transcoder subtracts nothing and has W_dec [F, d_out], b_dec [d_out]. `prefixes` are those of a Matryoshka
    dictionary. `where` is what is known about its training place and text (`hook_metadata.SETTINGS`), `tokens` the
    number of training tokens if known.
    """

    activation: str
    tensors: State = field(repr=False)
    subtracts: bool = True
    is_transcoder: bool = False
    k: int | None = None
    prefixes: tuple[int, ...] | None = None
    where: Where = field(default_factory=dict)
    tokens: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """D, F, d_out."""
        (D, F), (_, d_out) = self.tensors["W_enc"].shape, self.tensors["W_dec"].shape
        return D, F, d_out

    def checked(self) -> "DictionarySpec":
        """Return it in contiguous float32. Raises UserError for wrong shapes and numbers that aren't finite."""
        tensors = {name: tensor.real.float() for name, tensor in self.tensors.items()}
        check_matrices(tensors)
        D, F = tensors["W_enc"].shape
        d_out = tensors["W_dec"].shape[1] if self.is_transcoder else D
        shapes = {"W_enc": (D, F), "W_dec": (F, d_out), "b_enc": (F,), "b_dec": (d_out,)}
        if self.activation in ("jumprelu", "batchtopk"):
            shapes["threshold"] = (F,) if self.activation == "jumprelu" else ()
        for name, shape in shapes.items():
            if not self.tensors[name].is_floating_point():
                raise UserError(f"{name} has dtype {self.tensors[name].dtype}; it must have a floating-point dtype")
            if tensors[name].shape != shape:
                allowed = f"with W_enc {[D, F]} it must be {list(shape)}"
                raise UserError(f"{name} has shape {list(tensors[name].shape)}; {allowed}")
            if not tensors[name].isfinite().all():
                raise UserError(f"{name} has numbers that are not finite")
        return replace(self, tensors={name: tensors[name].contiguous() for name in shapes})

    def subtracting(self, subtracts: bool) -> "DictionarySpec":
        """Return the same function with or without x - b_dec in the encoder; b_enc compensates."""
        if self.is_transcoder or self.subtracts == subtracts:
            return self
        t = self.tensors
        b_enc = bias_where(subtracts, t["b_enc"], t["b_dec"], t["W_enc"])
        return replace(self, subtracts=subtracts, tensors={**t, "b_enc": b_enc})

    def jumping(self) -> "DictionarySpec":
        """Return the same function as jumprelu, with thresholds 0 for relu. Raises UserError for topk."""
        if self.activation == "topk":
            raise UserError("activation: topk is not allowed here; it keeps k latents per token, whatever their size")
        if self.activation == "jumprelu":
            return self
        F = self.sizes[1]
        zero = torch.zeros((), dtype=self.tensors["b_enc"].dtype)
        threshold = self.tensors.get("threshold", zero).expand(F).clone()
        return replace(self, activation="jumprelu", tensors={**self.tensors, "threshold": threshold})


def check_matrices(tensors: State) -> None:
    """Raise UserError if W_enc or W_dec is not a matrix."""
    for name in ("W_enc", "W_dec"):
        if tensors[name].ndim != 2:
            raise UserError(f"{name} has shape {list(tensors[name].shape)}; it must be a matrix")


def linear_weights(tensors: State) -> State:
    """Return W_enc, b_enc and W_dec of a dictionary made of the nn.Linear layers `encoder` and `decoder`."""
    W_enc, W_dec = (tensors[f"{layer}.weight"].T for layer in ("encoder", "decoder"))
    return {"W_enc": W_enc, "b_enc": tensors["encoder.bias"], "W_dec": W_dec}


def unit_rows(tensors: State) -> State:
    """Scale the rows of W_dec to norm 1 and the latents by the old norms, which is the same function.

    A threshold is not scaled, because it already refers to scaled latents. A row of zeros stays.
    """
    norm = tensors["W_dec"].norm(dim=1)
    norm = norm.where(norm > 0, 1)
    scaled = {"W_enc": tensors["W_enc"] * norm, "b_enc": tensors["b_enc"] * norm}
    return {**tensors, **scaled, "W_dec": tensors["W_dec"] / norm[:, None]}


def gated(W_enc: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> State:
    """Convert a gated encoder to a jumprelu encoder of the same function (Rajamanoharan et al., arXiv 2404.16014):

    relu(exp(r_mag) x W_enc + b_mag) where x W_enc + b_gate > 0, that is where exp(r_mag) x W_enc + b_mag > threshold
    threshold = b_mag - exp(r_mag) b_gate, computed in float64 and rounded once
    """
    scale = r_mag.double().exp()
    threshold = b_mag.double() - scale * b_gate.double()
    return {"W_enc": (W_enc.double() * scale).float(), "b_enc": b_mag, "threshold": threshold.float()}


def bias_where(subtracts: bool, b_enc: Tensor, b_dec: Tensor, W_enc: Tensor) -> Tensor:
    """Return b_enc for an encoder that subtracts b_dec (`subtracts`) instead of one that does not, or the reverse:

    x W_enc + b_enc = (x - b_dec) W_enc + (b_enc + b_dec W_enc), computed in float64 and rounded once
    """
    shift = b_dec.double() @ W_enc.double()
    return (b_enc.double() + (shift if subtracts else -shift)).to(b_enc.dtype)


def of_sae(sae: SparseAutoencoder, where: Where, tokens: int | None) -> DictionarySpec:
    """Convert a dictionary of temposae. Raises UserError for masks and parts, which no other library has."""
    c = sae.cfg
    if c.mask.kind != "none":
        raise UserError(f"mask.kind: {c.mask.kind} is not allowed; only temposae's own format has masks over positions")
    if c.parts:
        kinds = ", ".join(part["kind"] for part in c.parts)
        raise UserError(f"parts: {kinds} are not allowed; only temposae's own format has parts")
    tensors = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    is_transcoder = c.d_out is not None
    return DictionarySpec(
        c.activation, tensors, c.apply_b_dec_to_input and not is_transcoder, is_transcoder,
        c.k if c.activation in ("topk", "batchtopk") else None, c.prefixes, where, tokens,
    )  # fmt: skip


def to_sae(spec: DictionarySpec, settings: SAEConfig | None = None) -> SparseAutoencoder:
    """Convert to a dictionary of temposae, with its original `settings` if they are known."""
    spec = spec.checked()
    if settings is None:
        D, F, d_out = spec.sizes
        config: dict[str, Any] = {"d_in": D, "d_sae": F, "activation": spec.activation, "prefixes": spec.prefixes}
        config |= {"d_out": d_out} if spec.is_transcoder else {"apply_b_dec_to_input": spec.subtracts}
        settings = SAEConfig(**config, k=min(32, F) if spec.k is None else spec.k)
    tensors = dict(spec.tensors)
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].clamp_min(0)  # activations below 0 are 0 anyway
    if settings.activation == "batchtopk" and tensors["threshold"].ndim == 1:
        tensors["threshold"] = tensors["threshold"][0]
    elif settings.activation in ("relu", "topk"):
        tensors.pop("threshold", None)
    sae = SparseAutoencoder(settings)
    sae.load_state_dict(tensors, strict=True)
    return sae
