"""A CPU stand-in for the flash-attn kernels, so that transformers' own flash path runs without a GPU.

Only the two kernels are replaced; masks, unpadding, packing and options go through transformers unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor, nn


def use_implementation(model: nn.Module, name: str) -> nn.Module:
    """Set the attention implementation without transformers' check that flash-attn is installed."""
    for part in model.modules():
        if hasattr(getattr(part, "config", None), "_attn_implementation"):
            part.config._attn_implementation = name
    return model


def cpu_flash() -> AbstractContextManager[list[str]]:
    """Replace the kernels by their definition, as ``flash_kernels`` does."""
    return flash_kernels(dense_of(flash_attn_varlen_func), flash_attn_varlen_func)


@contextmanager
def flash_kernels(dense: Callable[..., Tensor], varlen: Callable[..., Tensor]) -> Iterator[list[str]]:
    """Let transformers' flash path call these two, of flash-attn's signatures; what they do not take is not passed.

    Yields which of the two are called, "dense" or "varlen", as the calls come.
    """
    called: list[str] = []

    def noted(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(kernel)  # transformers passes only what the signature names
        def call(*args: object, **options: object) -> Tensor:
            called.append(name)
            return kernel(*args, **options)

        return call

    padding = (None, flash_utils._pad_input, flash_utils._unpad_input)
    kernels = (noted("dense", dense), noted("varlen", varlen), *padding)
    options_of = flash_utils._lazy_define_process_function(kernels[1])
    original = flash_utils.lazy_import_flash_attention
    flash_utils.lazy_import_flash_attention = lambda implementation, *args, **kwargs: (kernels, options_of)
    try:
        yield called
    finally:
        flash_utils.lazy_import_flash_attention = original


def dense_of(varlen: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel for batches without padding, q (B, S, H, D), by that for streams of sequences."""

    def dense(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        batch, length = q.shape[:2]
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
        streams = (x.flatten(0, 1) for x in (q, k, v))
        return varlen(*streams, starts, starts, length, length, **options).unflatten(0, (batch, length))

    return dense


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
) -> Tensor:
    """flash-attn's kernel for streams of sequences, each by ``attend``."""
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([attend(*each, softmax_scale, causal, window_size, softcap, s_aux) for each in sequences])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """flash-attn's documented semantics for one sequence; q (Q, H, D), k and v (L, K, D), in fp32."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).float() for x in (k, v))
    logits_HQL = torch.einsum("qhd,khd->hqk", q.float(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        logits_HQL = softcap * torch.tanh(logits_HQL / softcap)
    query_Q, key_L = torch.arange(len(q), device=q.device), torch.arange(len(k), device=q.device)
    distance_QL = query_Q[:, None] + len(k) - len(q) - key_L
    hidden_QL = (distance_QL < 0) if causal else torch.zeros_like(distance_QL, dtype=torch.bool)
    if window[0] >= 0:
        hidden_QL = hidden_QL | (distance_QL > window[0])
    if window[1] >= 0:
        hidden_QL = hidden_QL | (-distance_QL > window[1])
    logits_HQL = logits_HQL.masked_fill(hidden_QL, float("-inf"))
    if sinks is not None:
        logits_HQL = torch.cat([logits_HQL, sinks.float().view(-1, 1, 1).expand(-1, len(q), 1)], dim=2)
    weights_HQL = logits_HQL.softmax(dim=2)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights_HQL, v).to(q.dtype)
