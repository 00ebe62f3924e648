"""Attention kernels under transformers' own attention path: PyTorch's, those of the flash-attn packages, and a CPU
stand-in for these, so that the path runs without a GPU.

Only the kernels are replaced; masks, unpadding, packing and options go through transformers unchanged.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from abc_plugin.errors import UserError

SDPA, SDPA_FLASH, VARLEN = "sdpa", "sdpa, flash backend", "torch varlen"
PACKAGES = {  # name: the module that has flash_attn_func and flash_attn_varlen_func
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 3, forward only": "fa3_fwd_interface",
    "flash-attn 4": "flash_attn.cute",
}
OPTIONS = {"softcap": {"softcap"}, "sinks": {"s_aux", "learnable_sink"}}  # and what kernels call them


@contextmanager
def running(kernel: str, device: torch.device, needs: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Within the block transformers calls ``kernel``; yields the implementation to set, and the calls as they come.

    On the CPU the definition in PyTorch stands in for the kernels of VARLEN and PACKAGES.  needs: one of OPTIONS,
    which transformers silently leaves out where a kernel does not take it.
    Raises UserError where the kernel is not installed, drops what is needed, or does not take the block's inputs.
    """
    with ExitStack() as stack:
        implementation, calls = "sdpa" if kernel in (SDPA, SDPA_FLASH) else "flash_attention_2", []
        if implementation == "sdpa":
            takes, calls = set(), ["scaled_dot_product_attention"]
            if kernel == SDPA_FLASH:
                stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
        elif device.type == "cpu":
            takes, calls = {"softcap", "s_aux"}, stack.enter_context(cpu_flash())
        else:
            functions = functions_of(kernel)
            takes, calls = (
                {*inspect.signature(functions[1]).parameters},
                stack.enter_context(flash_kernels(*functions)),
            )
        if needs and not OPTIONS[needs] & takes:
            raise UserError(f"{kernel} drops {needs}: another model than in eager attention")
        try:
            yield implementation, calls
        except RuntimeError as error:
            if "No available kernel" in str(error):
                raise UserError(f"{kernel}: {error}") from None
            raise


def functions_of(kernel: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The kernel for batches without padding, and that for streams of sequences. Raises UserError."""
    if kernel == VARLEN:
        return dense_of(torch_varlen), torch_varlen
    try:
        module = importlib.import_module(PACKAGES[kernel])
        return module.flash_attn_func, module.flash_attn_varlen_func
    except (ImportError, AttributeError) as error:
        raise UserError(f"{kernel} is not installed: {error}") from None


def torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """PyTorch's own varlen kernel (2.10 or later) with flash-attn's signature: q (Q, H, D), k and v (L, K, D)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise UserError(f"PyTorch {torch.__version__} has no torch.nn.attention.varlen") from None
    if softmax_scale not in (None, q.shape[-1] ** -0.5):
        raise UserError(f"torch varlen is called without a scale, the model's is {softmax_scale}")
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    lengths = (cu_seqlens_q.int(), cu_seqlens_k.int(), int(max_seqlen_q), int(max_seqlen_k))
    if "is_causal" in inspect.signature(varlen_attn).parameters:  # PyTorch 2.10
        return varlen_attn(q, k, v, *lengths, is_causal=causal)
    return varlen_attn(q, k, v, *lengths, window_size=(-1, 0) if causal else (-1, -1))


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
