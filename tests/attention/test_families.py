"""The parity table: every family as its entry says, by the code that ``abc-rlhf bench parity`` runs."""

import re
from pathlib import Path

import pytest
import torch
from cpu_flash import cpu_flash, use_implementation
from recovery_models import FAMILIES, PADDINGS, RIGHT, WINDOW, inputs, tiny

from abc_plugin.attention.layers import attention_layers, is_full, target_layer
from abc_plugin.attention.matrix import rerun_eager_rows
from abc_plugin.attention.positions import score_positions
from abc_plugin.cli import main
from abc_plugin.tools.bench import parity
from abc_plugin.tools.bench.families import Family

READ = [name for name, family in FAMILIES.items() if family.exact]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_as_its_entry_says(family):
    result = parity.check(family)
    assert not result.faults
    assert bool(result.fp32) == bool(FAMILIES[family].exact) and len(result.fp32) == len(FAMILIES[family].exact)


def test_the_table_is_wide_enough():
    assert len({FAMILIES[name].model_type for name in READ}) >= 25
    assert {FAMILIES[name].what for name in FAMILIES if name not in READ} >= {"no attention", "encoder-decoder"}


@pytest.mark.parametrize("family", [name for name in READ if "eager" in FAMILIES[name].exact])
def test_the_definition_is_what_the_model_itself_reports(family):
    """``output_attentions=True`` in eager mode: one matrix per layer, none from a layer without attention."""
    model = use_implementation(tiny(family), "eager")
    feed = parity.feed_of(model, RIGHT)
    with torch.no_grad():
        reported = model(attention_mask=RIGHT, output_attentions=True, use_cache=False, **feed).attentions
    reported = [weights for weights in reported if weights is not None]
    rows = rerun_eager_rows(model, RIGHT, **feed)
    assert len(reported) in (len(rows), model.config.num_hidden_layers)
    if len(reported) > len(rows):
        reported = [reported[index] for index in rows]
    position = score_positions(RIGHT)
    for row, weights in zip(rows.values(), reported, strict=True):
        torch.testing.assert_close(row, weights[torch.arange(3), :, position].mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", READ)
def test_rows_are_far_from_uniform_and_from_each_other(family):
    """So that 1e-6 and 2e-2 mean something: also the tamer weights of the bf16 check tell layers and tokens apart."""
    model = tiny(family, **parity.TAME)
    rows = rerun_eager_rows(model, RIGHT, **parity.feed_of(model, RIGHT))
    uniform = RIGHT / RIGHT.sum(1, keepdim=True)
    for row in rows.values():
        assert parity.distance(row, uniform) > 2 * parity.BF16
    for one, other in zip(list(rows.values())[:-1], list(rows.values())[1:], strict=True):
        assert parity.distance(one, other) > 2 * parity.BF16


@pytest.mark.parametrize(
    ("family", "layer"),
    [("qwen3_next", 1), ("qwen3_5", 1), ("jamba", 1), ("bamba", 1), ("nemotron_h", 0), ("granitemoehybrid", 1)]
    + [("lfm2", 1), ("minimax", 1), ("falcon_h1", 2)]
    + [("gemma2", 1), ("gemma3", 1), ("gpt_oss", 1), ("qwen2_window", 0), ("llama4", 1), ("gpt_neo", 2)],
)
def test_last_full_is_the_last_layer_with_full_attention(family, layer):
    assert target_layer(tiny(family), "last_full", outside=True)[1:] == (layer, 3)


def test_full_windowed_and_local_layers_are_told_apart():
    kinds = {family: list(map(is_full, attention_layers(tiny(family), outside=True).values())) for family in READ}
    assert kinds["gpt_neo"] == [True, False, True] and kinds["llama4"] == [False, True, False]
    assert kinds["modernbert"] == [True, False, True] and kinds["starcoder2"] == [False] * 3
    assert kinds["bloom"] == kinds["deberta_v2"] == kinds["deepseek_v3"] == [True] * 3


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
def test_a_sliding_layer_gives_exact_zeros_outside_its_window(implementation):
    model = use_implementation(tiny("gemma3"), implementation)
    with cpu_flash():
        row, _ = parity.recovered(model, "last", "auto", RIGHT, **inputs(RIGHT))
    distance = score_positions(RIGHT)[:, None] - torch.arange(RIGHT.shape[1])
    assert torch.equal(row > 0, (distance >= 0) & (distance < WINDOW))


def test_the_command_prints_the_table_and_fails_with_the_family_that_fails(monkeypatch, capsys):
    chosen = {name: FAMILIES[name] for name in ("llama", "gemma2", "gptj", "t5")}
    monkeypatch.setattr(parity, "FAMILIES", chosen)
    assert main(["bench", "parity"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("| family |") and [line.split()[1] for line in out[2:6]] == list(chosen)
    assert [line.split("|")[3].strip() for line in out[2:6]] == ["tap", "tap", "fallback", "refused"]
    assert out[3].split("|")[4].strip() == "refused" and "drops its softcap" in "".join(out)
    assert out[-1] == "3 of 4 families are read"

    chosen |= {"llama": Family("llama", exact=("sdpa",), refused=("eager",)), "t5": Family("t5", exact=("sdpa",))}
    monkeypatch.setattr(parity, "FP32", -1.0)
    assert main(["bench", "parity"]) == 1
    error = capsys.readouterr().err
    for fault in ("llama: eager was to be refused", "t5: sdpa was to be exact", "gptj: fp32 under eager is off by 0"):
        assert fault in error


def test_the_table_in_the_repository_is_of_these_families():
    table = Path(parity.__file__).with_suffix(".md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE)[1:] == list(FAMILIES)


def test_paddings_are_what_they_are_called():
    assert [int(mask.sum()) for mask in PADDINGS.values()] == [26, 26, 36, 3]
