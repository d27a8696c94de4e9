"""Several processes that train together, started by torchrun: each runs the model on its share of the text and holds its
share of every dictionary's latents."""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.code import SparseCode
from ..kernels.select import select_batch_topk, select_topk
from .errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them: number `rank`, from 0.

    `group` sums and gathers tensors on the device, `host` agrees on numbers without the device. All processes make the same
    calls in the same order. Of a single one (`ALONE`), every call is its own answer.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    host: Any = None

    @classmethod
    def here(cls) -> "Ranks":
        """Those of the process group that is running, if any. All processes must call it."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return ALONE
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, dist.new_group(backend="gloo"))

    @classmethod
    def start(cls) -> "Ranks":
        """Those that torchrun started, each on a GPU of its own where there are any."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return ALONE
        has_gpus, local_rank = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
        if has_gpus:
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"torchrun: --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} is not allowed; "
                    f"there are {torch.cuda.device_count()} GPUs"
                )
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if has_gpus else "gloo")
        return cls.here()

    def apart(self) -> "Ranks":
        """The same processes, whose calls need not keep to the order of these."""
        return self if self.size == 1 else replace(self, group=dist.new_group())

    @property
    def is_first(self) -> bool:
        """Whether it is this process that writes files and tells how far things are."""
        return self.rank == 0

    def sum_(self, x: Tensor) -> Tensor:
        """x, which becomes the sum of everyone's."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def least_(self, x: Tensor) -> Tensor:
        """x, which becomes the smallest of everyone's."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MIN, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[R, ...]: everyone's x, which have one shape."""
        if self.size == 1:
            return x[None]
        out = x.new_empty(self.size, *x.shape)
        # As bytes: not every transport knows every dtype.
        buffers = [buffer.reshape(-1).view(torch.uint8) for buffer in out.unbind()]
        dist.all_gather(buffers, x.contiguous().reshape(-1).view(torch.uint8), group=self.group)
        return out

    def rows(self, x: Tensor, counts: list[int]) -> Tensor:
        """[sum of counts, ...]: everyone's rows one below the other, of which the r-th has counts[r]."""
        if self.size == 1:
            return x
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        return torch.cat([share[:count] for share, count in zip(self.gather(padded), counts, strict=True)])

    def own(self, x: Tensor, dim: int = 0) -> Tensor:
        """This process's share of x along a dimension that `size` divides."""
        return x if self.size == 1 else x.chunk(self.size, dim)[self.rank].contiguous()

    def whole(self, x: Tensor, dim: int = 0) -> Tensor:
        """What `own` was taken from."""
        return x if self.size == 1 else torch.cat(list(self.gather(x)), dim)

    def largest(self, number: int) -> int:
        """The largest of everyone's numbers. Doesn't wait for the device."""
        if self.size == 1:
            return number
        maximum = torch.tensor(number)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self.host)
        return int(maximum)

    def end(self) -> None:
        """After the last call of all."""
        if self.size > 1:
            self.wait()
            dist.destroy_process_group()

    def wait(self) -> None:
        """For all others to get here."""
        self.largest(0)

    def own_state(self, state: dict[str, Tensor], dims: dict[str, int]) -> dict[str, Tensor]:
        """Tensors by name, of those in `dims` this process's share along that dimension."""
        return {name: self.own(x, dims[name]) if name in dims else x for name, x in state.items()}

    def whole_state(self, state: dict[str, Tensor], dims: dict[str, int]) -> dict[str, Tensor]:
        """What `own_state` was taken from; of more than one process on the CPU, a tensor at a time."""
        if self.size == 1:
            return state
        return {name: (self.whole(x, dims[name]) if name in dims else x).cpu() for name, x in state.items()}

    def keep_largest(self, code: SparseCode, k: int) -> SparseCode:
        """Of a code of this process's latents what is among the k largest of a token over everyone's latents, or if it is
        ragged, among the k of the batch. All processes have one shape of code; ties go to the lower rank."""
        if self.size == 1:
            return code
        values = self.gather(code.live(code.values))
        if code.ragged:
            values = values.view(self.size, -1)
            selected = select_batch_topk(values, min(k, values.numel())).to_dense()[self.rank]
        else:
            values = values.movedim(0, 1).flatten(1)
            selected = select_topk(values, min(k, values.shape[1])).to_dense().chunk(self.size, 1)[self.rank]
        return code.only(selected != 0)


ALONE = Ranks()
