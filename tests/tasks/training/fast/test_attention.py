"""Attention within rows: the operator that a GPU runs, on the CPU with kernels of torch's that are written out here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tasks.training.fast import attention
from tasks.training.fast.attention import PLAIN, Scores, attend, flash, flash4_agrees, seen_blocks

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


def drawn(device: str, dtype: torch.dtype, tokens: int = TOKENS, size: int = SIZE) -> tuple[list[Tensor], Tensor]:
    random = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(tokens, heads, size, generator=random) for heads in (HEADS, GROUPS, GROUPS, HEADS))
    return [part.to(device, dtype).requires_grad_() for part in (q, k, v)], grad.to(device, dtype)


def rows(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Bounds with room for more rows, and the true sizes."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    bounds = torch.tensor([0, *ends, *[sum(lengths)] * (MOST_ROWS - len(ends))], dtype=torch.int32)
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


class Kernels:
    """FlashAttention-4's functions, as far as they are called."""

    wrong = 1.0

    def _flash_attn_fwd(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, max_seqlen_q: int, **how: Any) -> Any:
        assert how["causal"]
        return forward(q, k, v, cu_seqlens_q, cu_seqlens_q, max_seqlen_q, max_seqlen_q)

    def _flash_attn_bwd(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, sums: Tensor, **how: Any) -> Any:
        dq, dk, dv = backward(grad, q, k, v, out, sums, how["cu_seqlens_q"])
        return dq, dk * self.wrong, dv


class FailingKernels(Kernels):
    def _flash_attn_bwd(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("head_dim must be a multiple of 16")


def agrees(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(attention, "flash4_kernels", lambda: kernels)
    return flash4_agrees((HEADS, GROUPS, SIZE), [PLAIN], torch.device("cpu"), torch.bfloat16)


def test_flash_attention_4_is_used_where_it_gives_what_plain_arithmetic_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert agrees(Kernels(), monkeypatch)
    off = Kernels()
    off.wrong = 1.1
    assert not agrees(off, monkeypatch)
    assert "expected below 0.02" in caplog.text
    assert not agrees(FailingKernels(), monkeypatch)
    assert "head_dim must be a multiple of 16" in caplog.text


def test_no_flash_attention_4_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device here")
    assert not flash4_agrees((HEADS, GROUPS, SIZE), [PLAIN], torch.device("cpu"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # FlashAttention-4's packages warn of their own
@pytest.mark.parametrize("scores", [PLAIN, Scores(window=5), Scores(0.05, 400), Scores(0.2, 30, cap=2.0), Scores(cap=2.0)])
@pytest.mark.parametrize("flash4", [True, False])
def test_on_a_gpu_rows_see_what_they_see_on_the_cpu(scores: Scores, flash4: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if flash4 and attention.flash4_kernels() is None:
        pytest.skip("no FlashAttention-4 here")
    for lengths, size in product([*LENGTHS, [300, 500, 7, 93]], (64, 128, 256)):
        exact, exact_grad = drawn("cpu", torch.float32, sum(lengths), size)
        parts, grad = drawn("cuda", torch.bfloat16, sum(lengths), size)
        bounds, sizes = rows(lengths)
        wanted = attend(*exact, bounds, sizes, scores)
        blocks = None if flash4 else seen_blocks(bounds.cuda(), parts[0], scores)
        run = attend if blocks is None else torch.compile(attend, dynamic=False)
        got = run(*parts, bounds.cuda(), sizes, scores, blocks, flash4=flash4)
        assert torch.allclose(got.float().cpu(), wanted, atol=0.03), (lengths, size)
        for one, other in zip(torch.autograd.grad(got, parts, grad), torch.autograd.grad(wanted, exact, exact_grad), strict=True):
            assert (one.float().cpu() - other).norm() < 0.02 * other.norm(), (lengths, size)
