"""``abc-rlhf bench``: measures what it says, on a small model, and says what is wrong with bad input."""

import re
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from recovery_models import tiny

from abc_plugin.cli import main
from abc_plugin.tools.bench import forward_cost
from abc_plugin.tools.bench.forward_cost import CREDIT, EAGER, METHODS, PLAIN, RECOVERY, RERUN, Cost, measure

VARIANTS = [*RECOVERY]


@pytest.fixture
def path(tmp_path):
    tiny().save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_command_prints_each_size_and_draws(path, tmp_path, capsys):
    png = tmp_path / "cost.png"
    sizes = ["--tokens", "8", "16", "--batch", "1", "2", "--repeats", "2"]
    assert main(["bench", "recovery", "--model", path, *sizes, "--png", str(png)]) == 0
    out = capsys.readouterr().out
    assert "attention row of layer 2 of 3 (LlamaAttention, sdpa)" in out
    assert "…" not in out
    cells = [line.strip().split("  ") for line in out.splitlines() if " MB" in line or "[" in line]
    assert [row[0] for row in cells[::4]] == ["1 × 8", "1 × 16", "2 × 8", "2 × 16"]
    assert [row[0] for row in cells if row not in cells[::4]] == VARIANTS[1:] * 4
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000


def test_variants_run_what_they_say_and_leave_the_model_as_it_was(monkeypatch):
    model, seen = tiny(), []
    model.register_forward_pre_hook(
        lambda part, args, options: seen.append((part.config._attn_implementation, "output_attentions" in options)),
        with_kwargs=True,
    )
    recorded, inner, steps = [], forward_cost.record, []

    @contextmanager
    def record(readers, mask):
        with inner(readers, mask) as recordings:
            yield recordings
        recorded.append((readers["attention"], recordings["attention"].row_BS))

    monkeypatch.setattr(forward_cost, "record", record)
    result = measure(model, batch=2, tokens=8, repeats=3, advance=lambda: steps.append(1))
    assert len(steps) == len(VARIANTS) * 4
    assert {variant: len(values) for variant, values in result.seconds.items()} == dict.fromkeys(VARIANTS, 3)
    # of each, one for memory; of plain and credit, one for operations
    assert seen.count(("sdpa", False)) == 14 and seen.count(("eager", True)) == 4
    assert [type(reader).__name__ for reader, _ in recorded].count("AttentionTap") == 5
    assert len(recorded) == 9 and all(row.shape == (2, 8) for _, row in recorded)
    assert model.config._attn_implementation == "sdpa"
    attention = model.layers[2].self_attn
    assert not [hook for hook in attention._forward_hooks.values() if hasattr(hook, "__self__")]


@pytest.mark.parametrize("variants", [RECOVERY, METHODS], ids=["recovery", "methods"])
def test_each_variant_follows_each_other_one_equally_often(variants):
    names = [*variants]
    orders = [forward_cost.in_turn(names, turn) for turn in range(2 * len(names))]
    pairs = Counter(pair for order in orders for pair in zip(order, order[1:], strict=False))
    assert len(pairs) == len(names) * (len(names) - 1) and set(pairs.values()) == {2}
    assert all(sorted(order) == sorted(names) for order in orders)


def test_time_ratios_are_paired():
    result = Cost(1, 8, {PLAIN: [1.0, 10.0, 2.0], CREDIT: [1.1, 11.0, 2.2]}, {PLAIN: 8, CREDIT: 12}, {})
    assert result.time_ratios(CREDIT) == pytest.approx((1.1, 1.1, 1.1))
    assert result.memory_ratio(CREDIT) == 1.5


def test_peak_memory_counts_what_is_alive_at_once():
    kept = torch.empty(1000)

    def forward():
        first = torch.empty(1000)
        second = torch.empty(2000)  # 12 kB alive
        del first, second
        return kept + torch.empty(1000)  # 8 kB

    assert forward_cost.peak_bytes(forward, torch.device("cpu")) == 12_000


def test_what_credit_adds_is_linear_in_tokens_and_the_matrices_are_not():
    """Counted, so exact: 2·B·H·T·D operations, and memory that is gone again before the forward's own peak."""
    model = tiny(hidden_size=64, intermediate_size=256, head_dim=16)
    costs = {tokens: measure(model, batch=2, tokens=tokens, repeats=1) for tokens in (256, 512, 1024)}
    for tokens, result in costs.items():
        assert result.operations[CREDIT] - result.operations[PLAIN] == 2 * 2 * 4 * tokens * 16
        assert result.memory_ratio(CREDIT) <= 1.02
    growth = [costs[1024].peak[variant] / costs[512].peak[variant] for variant in VARIANTS]
    assert growth[0] == pytest.approx(2, rel=0.05) and growth[1] == pytest.approx(2, rel=0.05)
    assert growth[2] > 3.5 and growth[3] > 3.5
    assert costs[1024].memory_ratio(RERUN) < costs[1024].memory_ratio(EAGER)


def test_a_model_outside_the_interface_is_measured_by_its_fallback(tmp_path, capsys):
    tiny("gptj").save_pretrained(tmp_path)
    assert main(["bench", "recovery", "--model", str(tmp_path), "--tokens", "8", "--repeats", "1"]) == 0
    assert "GPTJAttention, eager, read from its own weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "0"], "at least 1"),
        (["--batch", "1", "0"], "at least 1"),
        (["--model", "/no/such"], "/no/such does not load"),
        (["--tokens", "4", "--repeats", "1", "--png", "/no/such/x.png"], "--png /no/such/x.png cannot be written"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert main(["bench", "recovery", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_without_a_measurement_the_command_names_them(capsys):
    with pytest.raises(SystemExit):
        main(["bench"])
    assert "MEASUREMENT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    out = capsys.readouterr().out
    assert "recovery" in out and "parity" in out


def test_bench_methods_times_every_methods_evidence(tiny, capsys):
    words = ["--model", str(tiny / "reward_model"), "--tokens", "8", "--repeats", "1"]
    assert main(["bench", "methods", *words]) == 0
    rows = [line.strip().split("  ") for line in capsys.readouterr().out.splitlines() if " MB" in line or "[" in line]
    assert [rows[0][1].strip(), *(row[0] for row in rows[1:])] == ["plain", *[*METHODS][1:]]
    assert main(["bench", "methods", *words[:2], "--tokens", "0"]) == 2


def test_bench_server_compares_many_clients_with_batched_forwards(tiny, capsys):
    pytest.importorskip("fastapi")
    words = ["--model", str(tiny / "reward_model"), "--clients", "4", "--batch", "2", "--tokens", "8"]
    assert main(["bench", "server", *words, "--repeats", "1"]) == 0
    assert re.search(r"4 clients, 8 tokens, .* texts/s served .* forwards of 2 .* ratio \d", capsys.readouterr().out)
    assert main(["bench", "server", *words, "--repeats", "0"]) == 2
