"""On a CUDA device: every method by real kernels. Skipped elsewhere."""

import pytest
import torch
from conftest import local_flags, run_python
from recovery_models import LEFT, NONE, inputs, tiny_reward_model

from abc_plugin.attention.evidence_readers import attach_readers, record, rows


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


@on_gpu
@pytest.mark.parametrize("needs", ["attention", "prefix", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_methods_read_is_what_the_cpu_reads(needs, dtype):
    found = {}
    for device in ("cpu", "cuda"):
        model = tiny_reward_model().to(device, torch.float32 if device == "cpu" else dtype)
        readers = attach_readers(model, {needs})
        for padding in (NONE, LEFT):
            ids, mask = inputs(padding)["input_ids"].to(device), padding.to(device)
            with torch.no_grad(), record(readers, mask) as recordings:
                model(ids, mask)
            found.setdefault(device, []).append(rows(recordings)[needs])
    for cpu_BS, cuda_BS in zip(found["cpu"], found["cuda"], strict=True):
        assert cuda_BS.device.type == "cpu"
        tolerance = 1e-4 if dtype == torch.float32 else 6e-2
        torch.testing.assert_close(cuda_BS, cpu_BS, atol=tolerance * cpu_BS.abs().max().item(), rtol=0)


@on_gpu
@pytest.mark.parametrize("method", ["prefix", "grad_input", "abc_d", "abc_d2"])
def test_local_run_of_every_method(tiny, tmp_path, method):
    result = run_python("-m", "abc_plugin", "local", *local_flags(tiny, tmp_path, reward_shaping=method))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "done: 3 steps" in result.stdout
