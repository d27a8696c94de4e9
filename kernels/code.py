"""SparseCode: which latents are active on which token, and how strongly. Encoders return it, decoders take it."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class LatentMajor(NamedTuple):
    """Entries sorted stably by latent: latent j owns `latent_offsets[j]:latent_offsets[j + 1]`, by ascending token.

    order           int64 [C]    index of each sorted entry in the flattened code
    latents         int32 [C]    latent of each sorted entry. Unused entries of a ragged code have F and come last
    tokens          int32 [C]    token of each sorted entry
    latent_offsets  int64 [F+1]
    """

    order: Tensor
    latents: Tensor
    tokens: Tensor
    latent_offsets: Tensor

    @classmethod
    def of(cls, latents: Tensor, tokens: Tensor | int, n_latents: int) -> "LatentMajor":
        """Sort entries given as latents int32 [C] in [0, F], with F for unused entries, and tokens [C], or K if each token
        has K entries."""
        order = _stable_argsort(latents, n_latents)
        latents = latents[order]
        tokens = order // tokens if isinstance(tokens, int) else tokens[order]
        bounds = torch.arange(n_latents + 1, device=latents.device, dtype=latents.dtype)
        return cls(order, latents, tokens.int(), torch.searchsorted(latents, bounds))


@dataclass(frozen=True, eq=False)
class SparseCode:
    """Sparse activations of N tokens on F latents.

    values    [N, K] when every token has K entries, or [C] when ragged (C is the capacity)
    indices   int32, the shape of `values`: the latent of each entry
    offsets   int64 [N+1] when ragged: token n owns entries offsets[n]:offsets[n+1]. None for fixed K
    overflow  bool scalar tensor when ragged with a given capacity: true if entries did not fit and were dropped
    recomputed  int64 [S] from the ragged kernels of S dictionaries: how many tiles of latents they computed twice

    Entries from `offsets[N]` on are unused and never read as activations, whatever they hold. Raises ValueError for
    shapes and dtypes that do not fit together.
    """

    values: Tensor
    indices: Tensor
    n_latents: int
    offsets: Tensor | None = None
    overflow: Tensor | None = None
    recomputed: Tensor | None = None
    # Layouts depend on indices and offsets alone, so codes that differ only in values share them.
    layouts: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.values.shape != self.indices.shape:
            raise ValueError(f"values {list(self.values.shape)} and indices {list(self.indices.shape)} must match")
        if self.indices.dtype != torch.int32:
            raise ValueError(f"indices must be int32, got {self.indices.dtype}")
        if self.values.dim() != (1 if self.ragged else 2):
            expected = "[C] with offsets" if self.ragged else "[N, K] without offsets"
            raise ValueError(f"values must be {expected}, got {list(self.values.shape)}")
        if self.offsets is not None and (self.offsets.dtype != torch.int64 or self.offsets.dim() != 1):
            raise ValueError(f"offsets must be int64 [N+1], got {self.offsets.dtype} {list(self.offsets.shape)}")

    @classmethod
    def side_by_side(cls, codes: list["SparseCode"]) -> "SparseCode":
        """Join codes of S dictionaries of F latents on the same N tokens into one over S F latents and S N tokens:
        token s N + n is token n in dictionary s."""
        if len(codes) == 1:
            return codes[0]
        f = codes[0].n_latents
        values = torch.cat([code.values for code in codes])
        indices = torch.cat([code.indices + dictionary * f for dictionary, code in enumerate(codes)])
        offsets = overflow = None
        if codes[0].offsets is not None:
            unused = torch.cat([code.live(torch.zeros_like(code.indices), unused=1) for code in codes])
            order = unused.sort(stable=True).indices  # unused entries come last
            values, indices = values[order], indices[order]
            counts = torch.cat([code.offsets.diff() for code in codes if code.offsets is not None])
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            flags = [code.overflow for code in codes if code.overflow is not None]
            overflow = torch.stack(flags).any() if flags else None
        return cls(values, indices, len(codes) * f, offsets, overflow)

    @property
    def ragged(self) -> bool:
        return self.offsets is not None

    @property
    def n_tokens(self) -> int:
        return self.values.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def rows(self) -> Tensor:
        """Token of each entry, int64, the shape of `values`. Unused entries of a ragged code have the last token."""
        if "rows" not in self.layouts:
            if self.offsets is None:
                tokens = torch.arange(self.n_tokens, device=self.values.device)
                self.layouts["rows"] = tokens[:, None].expand(self.values.shape)
            else:
                entries = torch.arange(self.values.numel(), device=self.values.device)
                self.layouts["rows"] = torch.searchsorted(self.offsets[1:-1].contiguous(), entries, right=True)
        return self.layouts["rows"]

    @property
    def owners(self) -> Tensor | int:
        """`tokens` for `LatentMajor.of`."""
        return self.rows if self.offsets is not None else self.values.shape[1]

    def live(self, entries: Tensor, unused: int = 0) -> Tensor:
        """Return per-entry data with `unused` in place of the unused entries of a ragged code."""
        if self.offsets is None:
            return entries
        used = torch.arange(entries.numel(), device=entries.device) < self.offsets[-1]
        return torch.where(used, entries, unused)

    def to_dense(self) -> Tensor:
        """Return activations [N, F]. Entries of one token and latent are summed. Differentiable in `values`."""
        dense = self.values.new_zeros(self.n_tokens * self.n_latents)
        elements = self.rows * self.n_latents + self.live(self.indices)
        return dense.scatter_add_(0, elements.flatten(), self.live(self.values).flatten()).view(-1, self.n_latents)

    def l0(self) -> Tensor:
        """Return the number of nonzero values per token, int64 [N]."""
        if self.offsets is None:
            return (self.values != 0).sum(-1)
        running = (self.values != 0).cumsum(0)
        return torch.cat([running.new_zeros(1), running])[self.offsets].diff()

    def fired(self) -> Tensor:
        """Return which latents are positive on some token, bool [F]. Doesn't wait for the device."""
        active = (self.live(self.values.detach()) > 0).flatten().int()
        counts = torch.zeros(self.n_latents, dtype=torch.int32, device=active.device)
        return counts.scatter_add_(0, self.live(self.indices).flatten().long(), active) > 0

    def with_values(self, values: Tensor) -> "SparseCode":
        """Return the same entries with other values. Both codes share the layouts computed for either."""
        return replace(self, values=values)

    def only(self, keep: Tensor) -> "SparseCode":
        """Return the entries where `keep` (bool, shape of `values`) is true, as a ragged code of the same capacity."""
        keep = self.live(keep, unused=False).flatten()
        counts = torch.zeros(self.n_tokens, dtype=torch.int64, device=keep.device)
        counts.index_add_(0, self.rows.flatten(), keep.long())
        order = (~keep).sort(stable=True).indices  # unused ones come last
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SparseCode(self.values.flatten()[order], self.indices.flatten()[order], self.n_latents, offsets)

    def grouped(self, ends: Tensor) -> tuple["SparseCode", Tensor]:
        """Split the entries by groups of latents: group g holds latents ends[g - 1] (or 0) to ends[g].

        ends int [G], ascending, the last one F. Returns a ragged code over G * N tokens, where token g * N + n owns the
        entries of token n in group g, and the index of each of its entries in this flattened code, int64 [C].
        """
        n, tokens, latents = self.n_tokens, self.rows.flatten(), self.live(self.indices).flatten()
        owners = torch.searchsorted(ends, latents, right=True) * n + tokens
        owners = self.live(owners.view(self.indices.shape), unused=len(ends) * n).flatten()
        owners, order = owners.sort(stable=True)
        offsets = torch.searchsorted(owners, torch.arange(len(ends) * n + 1, device=owners.device))
        flat = self.values.flatten()[order], self.indices.flatten()[order]
        return SparseCode(*flat, self.n_latents, offsets), order

    def transpose(self) -> LatentMajor:
        """Return the latent-major view, computed once per set of indices."""
        if "latent_major" not in self.layouts:
            latents = self.live(self.indices, unused=self.n_latents).flatten()
            self.layouts["latent_major"] = LatentMajor.of(latents, self.owners, self.n_latents)
        return self.layouts["latent_major"]


def _stable_argsort(keys: Tensor, largest: int) -> Tensor:
    """Stable argsort of int32 keys in [0, largest]."""
    if keys.device.type == "cpu" and largest < 2**16:
        # numpy sorts 16-bit keys by radix: twice as fast as torch, and not slowed down by a busy second core.
        return torch.from_numpy(np.argsort(keys.numpy().astype(np.uint16), kind="stable"))
    return torch.sort(keys, stable=True).indices
