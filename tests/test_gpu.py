"""On a CUDA device: the same checks where the kernels are other ones. Skipped where there is none."""

import pytest
import recovery_models
import torch
from conftest import local_flags, run_python

from abc_plugin.recovery.rerun import rerun_eager_row
from abc_plugin.recovery.tap import AttentionTap

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_local_run_with_abc(tiny, tmp_path):
    result = run_python("-m", "abc_plugin", "local", *local_flags(tiny, tmp_path, **{"reward_shaping": "abc"}))
    assert result.returncode == 0, result.stderr[-3000:]
    assert torch.cuda.get_device_name() in result.stdout
    assert "done: 3 steps" in result.stdout


@pytest.mark.parametrize("padding", recovery_models.PADDINGS)
def test_fp32_row_is_the_eager_row(padding):
    mask = recovery_models.PADDINGS[padding].cuda()
    model = recovery_models.tiny("llama").cuda()
    feed = {name: value.cuda() for name, value in recovery_models.inputs(mask.cpu()).items()}
    with AttentionTap(model).record(mask) as recording, torch.no_grad():
        model(attention_mask=mask, **feed)
    reference = rerun_eager_row(model, "last_full", mask, **feed)
    assert (recording.row_BS - reference).abs().max() < 1e-6
