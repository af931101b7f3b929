"""Causal attention within rows laid end to end: flash attention on a GPU, row by row elsewhere; imports torch.

On a GPU since Hopper that is FlashAttention-4, where the extra `fast-attention` is installed and gives what plain arithmetic
does, else torch's FlashAttention-2. The latter has no capped scores, which Gemma 2 has: there torch's flex_attention compiles a
kernel for them.

A GPU starts blocks of threads for as many rows as `bounds` has room for, each as long as the longest, and those without work
cost time too. Packs have one shape, so that one compilation serves all, but not as many rows, nor as long ones. So their true
sizes go in beside the padded bounds, as a tensor on the CPU: reading it waits for nothing, and a new value compiles nothing.

Shapes: T tokens of all rows together, H query heads, G key-value heads, D their size.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import flex_attention as flex

from tasks.refs import home

logger = logging.getLogger(__name__)

HOPPER = 9
"""Its compute capability: the first for which FlashAttention-4 has kernels of its own."""
TRIED_ROWS, TRIED_WINDOW = (200, 7, 93), 50
"""Tokens of the rows that FlashAttention-4 is tried with; and what layers that see a window see of them."""
NEAR = 0.02
"""Relative distance from float32 that it may have in bfloat16; the tests ask no more of torch's flash attention."""


class Scores(NamedTuple):
    """How a layer weighs what a token sees."""

    scale: float | None = None
    """Of the products of queries and keys; None: one over the root of D."""
    window: int | None = None
    """The last so many tokens are seen, the token itself one of them; None: all before it."""
    cap: float | None = None
    """Scores are kept between this and its negative by a tangent hyperbolic."""


PLAIN = Scores()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    sizes: Tensor,
    scores: Scores = PLAIN,
    blocks: Any = None,
    *,
    flash4: bool = False,
) -> Tensor:
    """Causal attention within each row: q (T, H, D), k and v (T, G, D) to (T, H, D).

    Rows begin and end at `bounds`, (at least rows + 1); sizes, on the CPU: [rows, tokens of the longest]; blocks: seen_blocks;
    flash4: on a GPU, by FlashAttention-4 (flash4_agrees).
    """
    if blocks is not None:
        return _attend_capped(q, k, v, scores, blocks)
    if q.is_cuda and q.dtype != torch.float32:
        return flash(q, k, v, bounds, sizes, flash4, *scores)[0]
    return attend_rows(q, k, v, bounds.tolist(), scores)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scores: Scores) -> Tensor:
    """The same with torch's scaled_dot_product_attention or written out, a row after the other."""
    rows = [slice(start, end) for start, end in pairwise(bounds) if end > start]
    return torch.cat([_attend_row(q[row], k[row], v[row], scores) for row in rows])


def _attend_row(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    if scores.window is None and scores.cap is None:
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scale, enable_gqa=True)
        return mixed[0].transpose(0, 1)
    tokens = q.shape[2]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    if scores.window is not None:
        seen = seen.triu(1 - scores.window)
    if scores.cap is None:
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scores.scale, enable_gqa=True)
        return mixed[0].transpose(0, 1)
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    products = _cap(q @ k.mT * (scores.scale or q.shape[-1] ** -0.5), scores.cap)
    shares = products.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (shares @ v)[0].transpose(0, 1)


def _cap(score: Tensor, cap: float) -> Tensor:
    return torch.tanh(score / cap) * cap


def seen_blocks(bounds: Tensor, x: Tensor, scores: Scores) -> Any:
    """Which blocks of tokens see which, where _attend_capped needs to know: for capped scores on a GPU in 16 bits; else None."""
    if scores.cap is None or not x.is_cuda or x.dtype == torch.float32:
        return None
    return make_blocks(bounds, len(x), scores.window)


def make_blocks(bounds: Tensor, tokens: int, window: int | None) -> Any:
    """A BlockMask of causal attention within rows, and within a window if there is one."""
    row = torch.searchsorted(bounds[1:], torch.arange(tokens, dtype=bounds.dtype, device=bounds.device), right=True)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (row[query] == row[key]) & (key <= query) & (query - key < (window or tokens))

    return flex.create_block_mask(sees, None, None, tokens, tokens, device=bounds.device)


def _attend_capped(q: Tensor, k: Tensor, v: Tensor, scores: Scores, blocks: Any) -> Tensor:
    cap = scores.cap
    assert cap is not None

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return _cap(score, cap)

    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    mixed = flex.flex_attention(q, k, v, score_mod=capped, block_mask=blocks, scale=scores.scale, enable_gqa=True)
    return mixed[0].transpose(0, 1)


@cache
def flash4_kernels() -> Any:
    """The module of FlashAttention-4's kernels, where it is installed and they are made for the GPU; else None."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < HOPPER:
        return None
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # what it compiles serves later trainings
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(home() / "flash_attention_compiled"))  # else below /tmp
    try:
        from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]  # the extra `fast-attention`
    except ImportError as error:
        if error.name != "flash_attn":  # it is installed, but not as it must be
            logger.warning("Attention is torch's, which takes longer, for FlashAttention-4 does not import: %s", error)
        return None
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)  # at each compilation, of a type of its own
    return interface


def flash4_agrees(heads: tuple[int, int, int], kinds: Iterable[Scores], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlashAttention-4 is here, and gives what plain arithmetic in float32 does of (H, G, D) heads, gradients too.

    Its kernels are compiled for each size and kind, as yet by a beta version: so they are tried before a model is trained.
    """
    if dtype == torch.float32 or flash4_kernels() is None:
        return False
    for kind in kinds:
        try:
            apart = _flash4_distance(heads, kind._replace(window=kind.window and TRIED_WINDOW), device, dtype)
        except Exception as error:
            logger.warning("Attention is torch's, for FlashAttention-4 has no kernels for heads %s, %s: %r", heads, kind, error)
            return False
        if not apart < NEAR:
            message = "Attention is torch's, for FlashAttention-4 for heads %s, %s: got %.3f from float32; expected below %s."
            logger.warning(message, heads, kind, apart, NEAR)
            return False
    return True


def _flash4_distance(heads: tuple[int, int, int], scores: Scores, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative distance of what it gives, or a gradient of it, from the same in float32."""
    bounds = [0, *accumulate(TRIED_ROWS)]
    sizes = torch.tensor([len(TRIED_ROWS), max(TRIED_ROWS)])
    random, (queries, groups, size) = torch.Generator().manual_seed(0), heads
    drawn = [torch.randn(bounds[-1], count, size, generator=random) for count in (queries, groups, groups, queries)]
    q, k, v, grad = (part.to(device, dtype) for part in drawn)
    with torch.enable_grad():
        wide, narrow = [part.float().requires_grad_() for part in (q, k, v)], [part.requires_grad_() for part in (q, k, v)]
        found = flash(q, k, v, torch.tensor(bounds, dtype=torch.int32, device=device), sizes, True, *scores)[0]
        wanted = attend_rows(*wide, bounds=bounds, scores=scores)
        pairs = [(found, wanted)]
        pairs += zip(torch.autograd.grad(found, narrow, grad), torch.autograd.grad(wanted, wide, grad.float()), strict=True)
    return max(float((one.detach().float() - other.detach()).norm() / other.detach().norm()) for one, other in pairs)


@torch.library.custom_op("amazon_ft::flash", mutates_args=())
def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    sizes: Tensor,
    flash4: bool = False,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Flash attention on rows of any lengths; what it gives, and the logarithms of its sums, (H, T).

    torch.nn.attention.varlen calls the same operators of torch, but with sizes that torch.compile takes for constants. Only
    FlashAttention-4 has a cap.
    """
    rows, longest = sizes.tolist()
    bounds = bounds[: rows + 1]
    if flash4:
        how = _how4(bounds, longest, scale, window) | {"score_mod": _caps4(cap).get("score_mod")}
        out, log_sums, *_ = flash4_kernels()._flash_attn_fwd(q, k, v, return_lse=True, **how)
        return out, log_sums
    out, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale, window_size_left=_left(window, longest)
    )
    return out, log_sums


def _left(window: int | None, longest: int) -> int | None:
    """The tokens before each that it sees; None: all, as where no row is longer.

    >>> _left(100, 500), _left(4096, 500)
    (99, None)
    """
    return None if window is None or window >= longest else window - 1


@cache
def _caps4(cap: float | None) -> dict[str, Any]:
    """FlashAttention-4's functions for scores and their gradients; given a cap, it makes, reads and hashes them at each call."""
    if cap is None:
        return {}
    utils = flash4_kernels().utils
    return {"score_mod": utils.create_softcap_scoremod(cap), "score_mod_bwd": utils.create_softcap_scoremod_bwd(cap)}


def _how4(bounds: Tensor, longest: int, scale: float | None, window: int | None) -> dict[str, Any]:
    """FlashAttention-4's arguments beside the tensors."""
    where = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return where | {"causal": True, "softmax_scale": scale, "window_size_left": _left(window, longest)}


@flash.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("amazon_ft::flash_backward", mutates_args=())
def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    bounds: Tensor,
    sizes: Tensor,
    flash4: bool,
    scale: float | None,
    window: int | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    rows, longest = sizes.tolist()
    bounds = bounds[: rows + 1]
    if flash4:
        how = _how4(bounds, longest, scale, window) | _caps4(cap)
        dq, dk, dv = flash4_kernels()._flash_attn_bwd(q, k, v, out, grad, log_sums, **how)
        return dq, dk, dv
    none = torch.empty(2, dtype=torch.uint64, device=q.device)  # random state: nothing is dropped
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad,
        *(q, k, v, out, log_sums, bounds, bounds, longest, longest, 0.0, True, none, none),
        scale=scale,
        window_size_left=_left(window, longest),
    )
    return dq, dk, dv


@flash_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, sizes, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, sizes)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *flash_backward(grad, *ctx.saved_tensors, *ctx.how), *[None] * 6


flash.register_autograd(_backward, setup_context=_keep)
