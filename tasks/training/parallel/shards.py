"""Frozen tensors of a model's layers, shared out over the processes and put together where a layer is computed; imports torch.

torch's FSDP2 does both: it gathers a layer's tensors while the one before it is computed, and frees them after. They go as
their bytes in the shape of bfloat16: not all that move them know fp8, and FSDP2 before torch 2.13 takes no integers. A layer is
computed again for its backward pass, for which its tensors are gathered anew. Adapters stay whole on each process (gradients.py).

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

Groups = Sequence[Sequence[Tensor]]
Compute = Callable[[Groups, Tensor], Tensor]
"""A layer: of its tensors and its input."""


class SharedLayers(nn.Module):
    """The layers of a model one after the other."""

    def __init__(self, layers: Iterable[Groups]) -> None:
        """Each layer's tensors are shared out before the next one's are made."""
        super().__init__()
        self.layers = nn.ModuleList()
        for groups in layers:
            layer = SharedLayer(groups)
            mesh = init_device_mesh(layer.device.type, (dist.get_world_size(),))
            fully_shard(layer, mesh=mesh)
            self.layers.append(layer)
        fully_shard(self)

    def forward(self, x: Tensor, computes: Sequence[Compute]) -> Tensor:
        """The last layer's output."""
        for layer, compute in zip(self.layers, computes, strict=True):
            x = layer(x, compute)
        return x


class SharedLayer(nn.Module):
    """A layer's tensors, in groups."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self._forms: list[list[Tensor | tuple[str, torch.dtype, torch.Size]]] = []
        self.device = groups[0][0].device
        for number, tensors in enumerate(groups):
            self._forms.append([self._take(f"{number}_{place}", tensor) for place, tensor in enumerate(tensors)])

    def _take(self, name: str, tensor: Tensor) -> Tensor | tuple[str, torch.dtype, torch.Size]:
        if not tensor.ndim:
            return tensor  # a number, as frozen.py's balances
        self.register_parameter(name, nn.Parameter(tensor.contiguous().flatten().view(torch.bfloat16), requires_grad=False))
        return name, tensor.dtype, tensor.shape

    def _whole(self) -> Groups:
        def whole(form: Tensor | tuple[str, torch.dtype, torch.Size]) -> Tensor:
            if isinstance(form, Tensor):
                return form
            name, dtype, shape = form
            return self.get_parameter(name).view(dtype).view(shape)

        return [[whole(form) for form in forms] for forms in self._forms]

    def forward(self, x: Tensor, compute: Compute) -> Any:
        """The layer's output."""
        return checkpoint(lambda x: compute(self._whole(), x), x, use_reentrant=False)
