"""``abc-rlhf bench``: runs on a small model, and says what is wrong with bad input."""

import pytest
from recovery_models import tiny

from abc_plugin.cli import main
from abc_plugin.recovery import bench


@pytest.fixture
def path(tmp_path):
    tiny().save_pretrained(tmp_path)
    return str(tmp_path)


def test_bench_prints_a_row_per_length(path, capsys):
    assert main(["bench", "--model", path, "--tokens", "8", "16", "--batch", "2", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    assert "attention row of layer 2 of 3 (LlamaAttention, sdpa)" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("│")] == ["8", "16"]


def test_variants_run_what_they_say_and_leave_the_model_as_it_was(monkeypatch):
    model, seen = tiny(), []
    model.register_forward_pre_hook(
        lambda part, args, options: seen.append((part.config._attn_implementation, "output_attentions" in options)),
        with_kwargs=True,
    )
    recorded = []
    tapped = bench._tapped
    monkeypatch.setattr(bench, "_tapped", lambda *args: recorded.append(tapped(*args)))
    seconds = bench.measure(model, batch=2, tokens=8, repeats=3)
    assert {variant: len(values) for variant, values in seconds.items()} == {"plain": 3, "tap": 3, "eager": 3}
    assert seen.count(("sdpa", False)) == 8 and seen.count(("eager", True)) == 4
    assert len(recorded) == 4 and all(row.shape == (2, 8) for row in recorded)
    assert model.config._attn_implementation == "sdpa"


def test_ratios_are_paired():
    seconds = {"plain": [1.0, 10.0, 2.0], "tap": [1.1, 11.0, 2.2]}
    assert bench._ratio(seconds, "tap").startswith("1.1000 [1.1000, 1.1000]")


@pytest.mark.parametrize(
    ("words", "message"), [(["--repeats", "0"], "at least 1"), (["--model", "/no/such"], "/no/such does not load")]
)
def test_bad_input_is_one_line(words, message, capsys):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
