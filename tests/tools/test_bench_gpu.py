"""``abc-rlhf bench gpu`` as far as a CPU goes: tiny models, stand-ins for kernels; rows that fail, hang and crash."""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils

from abc_plugin.cli import main
from abc_plugin.errors import UserError
from abc_plugin.tools.bench import gpu_checks, gpu_commands, gpu_table, kernel_parity, kernels
from abc_plugin.tools.bench.command import add_arguments
from abc_plugin.tools.bench.gpu_checks import ERROR, FAILS, HOLDS, NOT_RUN, Row, all_rows, measured
from abc_plugin.tools.bench.kernels import attend, cpu_flash

ROOT = Path(__file__).parents[2]


def trial(out, rows):
    status = main(["bench", "gpu", "--device", "cpu", "--out", str(out), "--rows", rows])
    return status, json.loads((out / "gpu.json").read_text())["rows"]


@pytest.fixture(scope="module")
def exact():
    """A short forward's rows of llama, measured here."""
    rows = [row for row in all_rows("cpu") if row.part == "exact" and "llama, bf" in row.name and "256" in row.name]
    return {row.name: measured(row, "cpu", Path()) for row in rows}


def test_rows_under_kernels_hold(exact):
    assert len(exact) == 5
    for name, result in exact.items():
        assert result["status"] == HOLDS, (name, result)
        assert 0 < result["figures"]["row"] < 2e-2 and 0 < result["figures"]["contributions"] < 0.1


@pytest.mark.parametrize(
    "rows", ["exact: llama, every", "cost: tiny, 256", "sdpa: gemma2", "float32", "512 tokens, full"]
)
def test_other_rows(rows):
    [row, *_] = [row for row in all_rows("cpu") if rows in f"{row.part}: {row.name}"]
    result = measured(row, "cpu", Path())
    assert result["status"] == (NOT_RUN if "gemma2" in rows else HOLDS), result
    assert result["why"] == ("sdpa drops softcap: another model than in eager attention" if "gemma2" in rows else "")


def test_the_script_runs_a_command_and_writes_the_table(tmp_path):
    """The whole way: an environment beside this one, a process that measures rows, a run by QLoRA."""
    settings = {"PYTHON": sys.executable, "VENV": str(tmp_path / "venv"), "PIP_NO_INDEX": "1"}
    words = [
        "bash",
        "launch/gpu_check.sh",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--rows",
        "QLoRA, judge 3B, abc",
    ]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    log = tmp_path / "gpu.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    table = (tmp_path / "gpu.md").read_text()
    assert table in done.stdout and "torch " in table
    [row] = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert (row["part"], row["status"]) == ("dialogue", HOLDS) and row["figures"]["step s"] > 0
    assert not (tmp_path / "work").exists()


def test_the_server_is_asked_for_in_words_that_the_command_takes(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    def command(*words):
        args = parser.parse_args(words[1:])
        return f"{words[0]} {args.measurement} {args.tokens} {Path(args.model).name}"

    monkeypatch.setattr(gpu_commands, "command", command)
    [row] = [row for row in all_rows("cpu") if row.part == "serve"]
    assert measured(row, "cpu", tmp_path)["figures"] == {"found": "bench server 8 reward_model"}


def test_credit_that_slows_a_run_or_takes_the_card_is_a_failing_claim(tmp_path, monkeypatch):
    figures = {"none": {"step s": 10.0, "score s": 1.0, "peak GiB": 20.0}, "abc": {"step s": 10.4, "score s": 1.1}}
    monkeypatch.setattr(gpu_commands, "random_checkpoint", lambda out, *_: out)
    monkeypatch.setattr(gpu_commands, "train", lambda out, *_: {"peak GiB": 25.0} | figures[out.name])
    monkeypatch.setattr(gpu_commands, "figures_of", lambda out: figures[out.name])
    none, abc = (measured(row, "cuda", tmp_path) for row in all_rows("cuda") if row.part == "dialogue")
    assert none["status"] == HOLDS and abc["status"] == FAILS
    assert abc["why"] == (
        "it takes more than 24.0 GiB; it takes more than × 1.05 of the scoring; it takes more than × 1.03 of a step"
    )


def refuses(device, out):
    raise UserError("no such kernel")


def breaks(device, out):
    return {"row": 0.5}, ["the row is off"]


def raises(device, out):
    raise KeyError("a slip")


def out_of_memory(device, out):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("measure", "status", "why"),
    [
        (refuses, NOT_RUN, "no such kernel"),
        (breaks, FAILS, "the row is off"),
        (raises, ERROR, "KeyError: 'a slip'"),
        (out_of_memory, NOT_RUN, "out of memory"),
    ],
)
def test_a_row_says_why(measure, status, why):
    result = measured(Row("exact", "x", measure, 9), "cpu", Path())
    assert (result["status"], result["why"]) == (status, why)


def holds(device, out):
    return {}, []


def hangs(device, out):
    time.sleep(99)


def dies(device, out):
    os.kill(os.getpid(), signal.SIGKILL)


def test_rows_that_hang_or_crash_leave_the_others_and_a_failing_claim_gives_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_table, "PROCESSES", multiprocessing.get_context("fork"))
    monkeypatch.setattr(gpu_table, "STARTUP", 5)
    rows = [Row("exact", f"row {i}", each, 1) for i, each in enumerate((holds, breaks, hangs, holds, dies, holds))]
    monkeypatch.setattr(gpu_table, "all_rows", lambda _device: rows)
    status, results = trial(tmp_path, "row")
    assert status == 1
    assert [row["status"] for row in results] == [HOLDS, FAILS, NOT_RUN, HOLDS, ERROR, HOLDS]
    assert results[2]["why"] == "stopped after 1 s"
    assert results[4]["why"] == "its process ended with status -9; see gpu.log"
    assert "| exact | row 1 | FAILS | row 0.5; the row is off |" in capsys.readouterr().out
    status, results = trial(tmp_path, "row 3")
    assert (status, [row["status"] for row in results]) == (0, [HOLDS])
    start = time.monotonic()
    [late] = gpu_table.measure(rows[:1], "cpu", tmp_path / "late", minutes=0)
    assert late["why"] == "the 0 minutes were over" and time.monotonic() - start < 1


def test_what_cannot_be_asked_for_is_one_line(capsys):
    assert main(["bench", "gpu", "--device", "cpu", "--rows", "no such"]) == 2
    if not torch.cuda.is_available():
        assert main(["bench", "gpu"]) == 2
        assert "--device cpu tries the script" in capsys.readouterr().err


def test_the_cards_name_and_the_versions(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: card)
    about = gpu_table.machine("cuda")
    assert about["device"].startswith("NVIDIA H100, 80 GiB, CUDA") and about["torch"] == torch.__version__
    names = [row.name for row in all_rows("cuda")]
    assert len({*names}) == len(names) and names[0].startswith("sdpa, flash backend: llama, bf")


def varlen_211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """PyTorch's function by its definition."""
    parts = (x.split(cu_seq_q.diff().tolist()) for x in (query, key, value))
    causal = window_size == (-1, 0)
    return torch.cat([attend(*part, None, causal, (-1, -1), 0.0, None) for part in zip(*parts, strict=True)])


def varlen_210(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    return varlen_211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, 0 if is_causal else -1))


@pytest.mark.parametrize("kernel", [varlen_210, varlen_211, "package"])
@pytest.mark.parametrize("layout", ["full", "padded", "packed"])
def test_kernels_of_a_card_are_called_as_transformers_calls_them(kernel, layout, monkeypatch):
    """Their Python part, with the definition in place of the kernels."""
    name = kernels.VARLEN
    if kernel == "package":
        with cpu_flash():
            (dense, varlen, *_), _ = flash_utils.lazy_import_flash_attention("any")
        package, name = ModuleType("flash_attn_interface"), "flash-attn 3"
        package.flash_attn_func, package.flash_attn_varlen_func = dense, varlen
        monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    else:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    model = kernel_parity.reward_model("llama", torch.float32, "cpu", gpu_checks.TINY)
    feed = kernel_parity.batch(32, layout != "full", "cpu")
    expected = model(**feed)
    model.packed = layout == "packed"
    with kernels.running(name, torch.device("cuda")) as (implementation, calls):
        found = kernel_parity.use_implementation(model, implementation)(**feed)
    assert len(calls) == 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_kernel_that_is_absent_or_drops_what_the_model_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    cases = (
        ("flash-attn 3", None, "flash-attn 3 is not installed"),
        (kernels.VARLEN, "sinks", "torch varlen drops sinks"),
    )
    for name, needs, message in cases:
        with pytest.raises(UserError, match=message), kernels.running(name, torch.device("cuda"), needs):
            pass


def test_a_wrong_row_is_found(monkeypatch):
    model = kernel_parity.reward_model("llama", torch.float32, "cpu", gpu_checks.TINY)
    read = kernel_parity.read

    def off(*args, **options):
        found, score_B = read(*args, **options)
        return {need: row_BS * 1.01 for need, row_BS in found.items()}, score_B

    monkeypatch.setattr(kernel_parity, "read", off)
    figures, broken = kernel_parity.compare(kernels.SDPA, model, 32, "padded", True, None)
    assert figures["row"] > 1e-6 and broken == ["the row is off by more than 1e-06"]


def test_the_random_checkpoint_is_a_model_with_a_letter_per_token(tmp_path):
    path = gpu_commands.random_checkpoint(tmp_path / "policy", "policy", gpu_checks.TINY, "cpu")
    model = gpu_commands.AutoModelForCausalLM.from_pretrained(path)
    weight = model.model.layers[1].self_attn.q_proj.weight
    assert model.config.head_dim == 16 and weight.dtype == torch.bfloat16 and 0.08 < weight.std() < 0.12
    tokenizer = gpu_commands.PreTrainedTokenizerFast.from_pretrained(path)
    text = "".join(map(chr, gpu_commands.LETTERS[:20]))
    assert tokenizer(text)["input_ids"] == [*range(3, 23)] and tokenizer.decode([*range(3, 23)]) == text
