"""On a CUDA device: the same checks where the kernels are other ones. Skipped where there is none."""

from contextlib import ExitStack, closing

import pytest
import torch
from conftest import local_flags, run_python
from recovery_models import PADDINGS, inputs, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModel, LlamaConfig, Qwen3Config
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from abc_plugin.attention import attach
from abc_plugin.attention.matrix import rerun_eager_row, rerun_eager_rows
from abc_plugin.cli import main
from abc_plugin.tools.bench.cost import CREDIT, PLAIN, measure
from abc_plugin.tools.bench.cpu_flash import flash_kernels, use_implementation
from abc_plugin.tools.bench.parity import BF16, FP32, accepted_inputs, difference, distance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_local_run_with_abc(tiny, tmp_path):
    result = run_python("-m", "abc_plugin", "local", *local_flags(tiny, tmp_path, **{"reward_shaping": "abc"}))
    assert result.returncode == 0, result.stderr[-3000:]
    assert torch.cuda.get_device_name() in result.stdout
    assert "done: 3 steps" in result.stdout


@pytest.mark.parametrize(
    "family", ["llama", "qwen3_moe", "gemma3", "deepseek_v3", "gpt2", "modernbert", "gptj", "falcon"]
)
@pytest.mark.parametrize("recovery", ["auto", "eager-rerun"])
def test_fp32_row_is_the_eager_row(family, recovery):
    model = tiny(family).cuda()
    for padding in PADDINGS.values():
        mask = padding.cuda()
        feed = {name: value.cuda() for name, value in accepted_inputs(model, padding).items()}
        for layer, expected in rerun_eager_rows(model, mask, **feed).items():
            with closing(attach(model, str(layer), recovery)) as reader:
                with reader.record(mask) as recording, torch.no_grad():
                    model(attention_mask=mask, **feed)
                assert recording.row_BS.device == mask.device
                assert difference(recording.row_BS, expected) <= FP32


# Real kernels, in bf16, at the scale of a reward model of 1B parameters (random weights).

BIG = {"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "pad_token_id": 0}
BIG |= {"num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192, "max_position_embeddings": 8192}


@pytest.fixture(scope="module", params=[LlamaConfig, Qwen3Config], ids=["llama", "qwen3"])
def big(request):
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModel.from_config(request.param(**BIG), dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    yield model
    del model
    torch.cuda.empty_cache()


def torch_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    """PyTorch's own varlen flash kernel, with flash-attn's signature."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = (cu_seqlens_q.int(), cu_seqlens_k.int(), int(max_seqlen_q), int(max_seqlen_k))
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(q, k, v, *lengths, scale=softmax_scale, window_size=window, enable_gqa=True)


def torch_dense(q, k, v, softmax_scale=None, causal=False):
    """The same for batches without padding: q (B, S, H, D)."""
    batch, length = q.shape[:2]
    starts = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * length
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return torch_varlen(*flat, starts, starts, length, length, softmax_scale, causal).view_as(q)


def running(kernel):
    """What to enter so that the model's attention runs this kernel, and the implementation to set."""
    stack = ExitStack()
    if kernel == "sdpa flash backend":
        stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))  # raises where it cannot be used
        return stack, "sdpa"
    if kernel == "sdpa":
        return stack, "sdpa"
    if kernel == "torch varlen":
        stack.enter_context(flash_kernels(torch_dense, torch_varlen))
        return stack, "flash_attention_2"
    available = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if not available[kernel]():
        pytest.skip(f"{kernel} is not installed")
    return stack, kernel


def batch(length, padded):
    """Two sequences; padded: the second is a third shorter, on the right, and the first a little, on the left."""
    mask = torch.ones(2, length, dtype=torch.long)
    if padded:
        mask[0, : length // 16] = 0
        mask[1, -length // 3 :] = 0
    ids = torch.randint(1, BIG["vocab_size"], mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    feed = {**inputs(mask), "input_ids": ids}
    return mask.cuda(), {name: value.cuda() for name, value in feed.items()}


KERNELS = ["sdpa", "torch varlen", "flash_attention_2", "flash_attention_3"]
CASES = [(kernel, length, padded) for kernel in KERNELS for length in (512, 2048, 8192) for padded in (False, True)]
CASES += [("sdpa flash backend", length, False) for length in (512, 2048, 8192)]  # it takes no mask


@pytest.mark.parametrize(("kernel", "length", "padded"), CASES)
def test_bf16_row_is_the_eager_row_under_real_kernels(big, kernel, length, padded):
    mask, feed = batch(length, padded)
    stack, implementation = running(kernel)
    rows = {}
    with stack, torch.no_grad():
        use_implementation(big, implementation)
        try:
            before = big(attention_mask=mask, use_cache=False, **feed).last_hidden_state
            for recovery in ("auto", "eager-rerun"):
                with closing(attach(big, recovery=recovery)) as reader, reader.record(mask) as recording:
                    during = big(attention_mask=mask, use_cache=False, **feed).last_hidden_state
                assert torch.equal(before[mask.bool()], during[mask.bool()])
                rows[recovery] = recording.row_BS
        finally:
            use_implementation(big, "sdpa")
    assert distance(rows["auto"], rows["eager-rerun"]) <= BF16  # of the same query and keys
    assert not rows["auto"][mask == 0].any()
    torch.testing.assert_close(rows["auto"].sum(1), torch.ones(2, device="cuda"))
    if length <= 2048:  # of the whole model in eager attention
        assert distance(rows["auto"], rerun_eager_row(big, "last_full", mask, **feed)) <= BF16


@pytest.mark.parametrize("length", [1024, 4096, 8192])
def test_credit_costs_next_to_nothing(big, length):
    result = measure(big, 1, length, repeats=12)
    low, middle, high = result.time_ratios(CREDIT)
    print(f"{torch.cuda.get_device_name()}, {length} tokens: time {middle:.4f} [{low:.4f}, {high:.4f}],", end=" ")
    print(f"memory {result.memory_ratio(CREDIT):.4f} of {result.peak[PLAIN] / 2**20:.0f} MB")
    assert result.operations[CREDIT] - result.operations[PLAIN] == 2 * 32 * length * 64
    assert result.memory_ratio(CREDIT) <= 1.02
    assert middle <= 1.05


def test_bench_names_the_device_and_what_does_not_fit(capsys):
    assert main(["bench", "recovery", "--tokens", "1024", "4096", "--batch", "1", "8", "--repeats", "4"]) == 0
    out = capsys.readouterr().out
    assert "wall time" in out and "cuda" in out
