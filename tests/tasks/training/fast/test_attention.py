"""Attention within rows: the operator that a GPU runs, on the CPU with kernels of torch's that are written out here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tasks.training.fast.attention import attend, flash

TOKENS, HEADS, GROUPS, SIZE, MOST_ROWS = 40, 4, 2, 8, 9
LENGTHS = ([20, 12, 8], [39, 1], [5, 5, 5, 5, 5, 5, 5, 5])


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, _b: Tensor, longest: int, _l: int, *_: Any) -> Any:
    assert max(end - start for start, end in pairwise(bounds.tolist())) == longest
    assert len(torch.unique(bounds)) == len(bounds), "told of rows that are not there"
    nothing = torch.empty(0)
    return attend(q, k, v, bounds, torch.empty(0)), torch.zeros(HEADS, TOKENS), nothing, nothing, nothing


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, _o: Tensor, _s: Tensor, bounds: Tensor, *_: Any) -> Any:
    """The gradients of softmax(q k' / sqrt(D)) v, written out."""
    wide = [part.repeat_interleave(HEADS // part.shape[1], 1).transpose(0, 1) for part in (grad, q, k, v)]
    found: list[list[Tensor]] = []
    for start, end in pairwise(bounds.tolist()):
        grads, queries, keys, values = (part[:, start:end] for part in wide)
        later = torch.ones(end - start, end - start).triu(1).bool()
        shares = (queries @ keys.mT / SIZE**0.5).masked_fill(later, -torch.inf).softmax(-1)
        of_shares = grads @ values.mT
        of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) / SIZE**0.5
        found.append([of_scores @ keys, of_scores.mT @ queries, shares.mT @ grads])
    dq, dk, dv = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    dk, dv = (part.unflatten(0, (GROUPS, -1)).sum(1) for part in (dk, dv))
    return tuple(part.transpose(0, 1).contiguous() for part in (dq, dk, dv))


@pytest.fixture
def kernels() -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield


def drawn(device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    random = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(TOKENS, heads, SIZE, generator=random) for heads in (HEADS, GROUPS, GROUPS, HEADS))
    return [part.to(device, dtype).requires_grad_() for part in (q, k, v)], grad.to(device, dtype)


def rows(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Bounds with room for more rows, and the true sizes."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    bounds = torch.tensor([0, *ends, *[TOKENS] * (MOST_ROWS - len(ends))], dtype=torch.int32)
    return bounds, torch.tensor([len(lengths), max(lengths)])


@pytest.mark.usefixtures("kernels")
def test_one_compilation_serves_rows_of_any_number_and_length() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *inputs: flash(*inputs)[0], backend=counter, dynamic=False)
    for lengths in LENGTHS:
        parts, grad = drawn("cpu", torch.float32)
        got, wanted = compiled(*parts, *rows(lengths)), attend(*parts, *rows(lengths))
        assert torch.allclose(got, wanted, atol=1e-6)
        for one, other in zip(torch.autograd.grad(got, parts, grad), torch.autograd.grad(wanted, parts, grad), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS)
def test_on_a_gpu_rows_see_what_they_see_on_the_cpu(lengths: list[int]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    (bounds, sizes), (exact, exact_grad), (parts, grad) = (
        rows(lengths),
        drawn("cpu", torch.float32),
        drawn("cuda", torch.bfloat16),
    )
    wanted, got = attend(*exact, bounds, sizes), attend(*parts, bounds.cuda(), sizes)
    assert torch.allclose(got.float().cpu(), wanted, atol=0.02)
    for one, other in zip(torch.autograd.grad(got, parts, grad), torch.autograd.grad(wanted, exact, exact_grad), strict=True):
        assert (one.float().cpu() - other).norm() < 0.02 * other.norm()
