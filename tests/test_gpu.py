"""On a CUDA device: every row of ``abc-rlhf bench gpu``. Skipped where there is none."""

import pytest
import torch

from abc_plugin.cli import main
from abc_plugin.tools.bench.gpu_checks import HOLDS, NOT_RUN, all_rows, measured

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("row", all_rows("cuda"), ids=lambda row: f"{row.part}, {row.name}")
def test_the_claim_holds(row, work):
    result = measured(row, "cuda", work)
    print(torch.cuda.get_device_name(), row.part, row.name, result["figures"])
    if result["status"] == NOT_RUN:
        pytest.skip(result["why"])
    assert result["status"] == HOLDS, result["why"]


def test_bench_names_the_device_and_what_does_not_fit(capsys):
    assert main(["bench", "recovery", "--tokens", "1024", "4096", "--batch", "1", "8", "--repeats", "4"]) == 0
    out = capsys.readouterr().out
    assert "wall time" in out and "cuda" in out
