"""Is the row the one that eager attention computes? Every family, by the code of ``abc-rlhf bench parity``.

With SNAPSHOT=1 the table in the repository is written anew: SNAPSHOT=1 pytest tests/attention/test_parity.py
"""

import os
import re
from contextlib import closing
from pathlib import Path

import pytest
import torch
from cpu_flash import cpu_flash, use_implementation
from recovery_models import FAMILIES, RIGHT, WINDOW, inputs, tiny

from abc_plugin.attention.attach import attach
from abc_plugin.attention.full_matrix import rerun_eager_row, rerun_eager_rows
from abc_plugin.attention.layers import attention_layers, is_full, target_layer
from abc_plugin.attention.query_positions import score_positions
from abc_plugin.cli import main
from abc_plugin.tools.bench import eager_parity as parity
from abc_plugin.tools.bench.model_families import Family

TABLE = Path(parity.__file__).with_name("parity.md")
READ = [name for name, family in FAMILIES.items() if family.exact]
RESULTS = {}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_as_its_entry_says(family):
    result = RESULTS[family] = parity.check(family)
    assert not result.faults
    assert set(result.fp32) == set(FAMILIES[family].exact)


@pytest.mark.parametrize("family", READ)
def test_the_definition_is_what_the_model_reports_and_tells_layers_and_tokens_apart(family):
    """``output_attentions=True`` in eager mode, one matrix per layer; rows so far apart that 1e-6 and 2e-2 mean
    something, also with the tamer weights of the bf16 check."""
    model = use_implementation(tiny(family, **parity.TAME), "eager")
    feed = parity.accepted_inputs(model, RIGHT)
    rows = rerun_eager_rows(model, RIGHT, **feed)
    with torch.no_grad():
        reported = model(attention_mask=RIGHT, output_attentions=True, use_cache=False, **feed).attentions
    reported = [weights for weights in reported if weights is not None]
    assert len(reported) in (len(rows), model.config.num_hidden_layers)
    if len(reported) > len(rows):
        reported = [reported[index] for index in rows]
    position = score_positions(RIGHT)
    uniform = RIGHT / RIGHT.sum(1, keepdim=True)
    for row, weights in zip(rows.values(), reported, strict=True):
        torch.testing.assert_close(row, weights[torch.arange(3), :, position].mean(1), rtol=0, atol=1e-6)
        assert parity.distance(row, uniform) > 2 * parity.BF16
    for one, other in zip(list(rows.values())[:-1], list(rows.values())[1:], strict=True):
        assert parity.distance(one, other) > 2 * parity.BF16


def test_the_table_in_the_repository_is_of_these_families():
    if os.environ.get("SNAPSHOT"):
        text = TABLE.read_text(encoding="utf-8")
        lines = [
            *parity.HEAD,
            *map(parity.line, RESULTS.values()),
            *parity.refusals(list(RESULTS.values())),
        ]
        TABLE.write_text(text[: text.index(parity.HEAD[0])] + "\n".join(lines) + "\n", encoding="utf-8")
    text = TABLE.read_text(encoding="utf-8")
    assert re.findall(r"^\| (\w+) \|", text, re.MULTILINE)[1:] == list(FAMILIES)
    numbers = re.compile(r"\d\.\de-\d\d")  # which differ from machine to machine
    for family, result in RESULTS.items():
        assert numbers.sub("#", parity.line(result)) in numbers.sub("#", text), family


def test_the_table_is_wide_enough():
    assert len({FAMILIES[name].model_type for name in READ}) >= 25
    assert {FAMILIES[name].what for name in FAMILIES if name not in READ} >= {"no attention", "encoder-decoder"}
    assert [int(mask.sum()) for mask in (parity.RIGHT, parity.LEFT, parity.NONE, parity.ONE)] == [26, 26, 36, 3]


LAST_FULL = {"qwen3_next": 1, "qwen3_5": 1, "jamba": 1, "bamba": 1, "nemotron_h": 0, "granitemoehybrid": 1, "lfm2": 1}
LAST_FULL |= {"minimax": 1, "falcon_h1": 2, "gemma2": 1, "gemma3": 1, "gpt_oss": 1, "qwen2_window": 0, "llama4": 1}
FULL = {"gpt_neo": [True, False, True], "llama4": [False, True, False], "modernbert": [True, False, True]}
FULL |= {"starcoder2": [False] * 3, "bloom": [True] * 3, "deberta_v2": [True] * 3, "deepseek_v3": [True] * 3}


def test_full_windowed_and_local_layers_are_told_apart():
    for family, layer in LAST_FULL.items():
        assert target_layer(tiny(family), "last_full", outside=True)[1:] == (layer, 3), family
    for family, full in FULL.items():
        assert list(map(is_full, attention_layers(tiny(family), outside=True).values())) == full, family


def read(model, implementation, recovery, mask, **feed):
    reader = attach(use_implementation(model, implementation), "last", recovery)
    with closing(reader), cpu_flash(), torch.no_grad(), reader.record(mask) as recording:
        model(attention_mask=mask, **feed)
    return recording.row_BS


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
def test_a_sliding_layer_gives_exact_zeros_outside_its_window(implementation):
    row = read(tiny("gemma3"), implementation, "auto", RIGHT, **inputs(RIGHT))
    distance = score_positions(RIGHT)[:, None] - torch.arange(RIGHT.shape[1])
    assert torch.equal(row > 0, (distance >= 0) & (distance < WINDOW))


READERS = [("llama", "sdpa", "auto"), ("llama", "flash_attention_2", "auto"), ("llama", "eager", "auto")]
READERS += [("llama", "sdpa", "eager-rerun"), ("llama", "flash_attention_2", "eager-rerun"), ("gptj", "eager", "auto")]


@pytest.mark.parametrize(("family", "implementation", "recovery"), READERS)
def test_padding_does_not_change_the_row_and_a_row_of_padding_is_zero(family, implementation, recovery):
    model = tiny(family)
    alone = torch.ones(1, 9, dtype=torch.long)
    ids = inputs(alone)["input_ids"]
    expected = read(model, implementation, recovery, alone, **inputs(alone))
    for left, right in ((3, 0), (0, 3), (2, 1)):
        mask = torch.nn.functional.pad(alone, (left, right))
        feed = {**inputs(mask), "input_ids": torch.nn.functional.pad(ids, (left, right))}
        row = read(model, implementation, recovery, mask, **feed)
        torch.testing.assert_close(row[:, left : left + 9], expected, rtol=0, atol=2e-6)
    mask = torch.cat([RIGHT[:2], torch.zeros(1, 12, dtype=torch.long)])
    row = read(model, implementation, recovery, mask, **inputs(mask))
    assert not row[2].any()
    torch.testing.assert_close(row[:2].sum(1), torch.ones(2))


def test_the_row_goes_by_the_mask_when_padding_and_eos_share_an_id():
    model = tiny(pad_token_id=0, eos_token_id=0)
    ids = inputs(RIGHT)["input_ids"].clone()
    ids.scatter_(1, score_positions(RIGHT)[:, None], 0)  # each response ends in EOS, whose id is the padding's
    row = read(model, "sdpa", "auto", RIGHT, input_ids=ids)
    torch.testing.assert_close(row, rerun_eager_row(model, "last", RIGHT, input_ids=ids), rtol=0, atol=1e-6)
    assert torch.equal(row > 0, RIGHT.bool())


def test_the_command_prints_the_table_and_fails_with_the_family_that_fails(monkeypatch, capsys):
    chosen = {name: FAMILIES[name] for name in ("llama", "gemma2", "gptj", "t5")}
    monkeypatch.setattr(parity, "FAMILIES", chosen)
    assert main(["bench", "parity"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("| family |") and [line.split()[1] for line in out[2:6]] == list(chosen)
    assert [line.split("|")[3].strip() for line in out[2:6]] == ["tap", "tap", "own weights", "refused"]
    assert out[3].split("|")[4].strip() == "refused" and "drops its softcap" in "".join(out)
    assert out[-1] == "3 of 4 families are read"

    chosen |= {"llama": Family("llama", exact=("sdpa",), refused=("eager",)), "t5": Family("t5", exact=("sdpa",))}
    del chosen["gemma2"]
    monkeypatch.setattr(parity, "FP32", -1.0)
    assert main(["bench", "parity"]) == 1
    error = capsys.readouterr().err
    for fault in ("llama: eager was to be refused", "t5: sdpa was to be exact", "gptj: fp32 under eager is off by 0"):
        assert fault in error
