"""Real attention kernels under transformers' own attention path: PyTorch's, and those of the flash-attn packages."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from abc_plugin.errors import UserError
from abc_plugin.tools.bench.cpu_flash import cpu_flash, dense_of, flash_kernels

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
