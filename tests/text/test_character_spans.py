"""Character spans of sampled tokens, and weights carried between spans."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_zoo import BUILD, Codepoints, load
from transformers import ByT5Tokenizer

from abc_plugin.errors import UserError
from abc_plugin.text.character_spans import pair, spread, token_spans, token_texts

MOVIE = [f"<0x{byte:02X}>" for byte in "🎬".encode()]
# By hand: (tokenizer, its tokens or ids, what they decode to, where each token begins, and the end).
CASES = {
    "byte-level tokens share a character by bytes": (
        "gpt2", ["A", "ĠðŁ", "İ", "¬", "!"], "A 🎬!", [0, 1, 2.5, 2.75, 3, 4]),
    "sentencepiece drops the first space, and falls back to bytes": (
        "mistral-v1", ["▁Hi", "▁", *MOVIE], "Hi 🎬", [0, 2, 3, 3.25, 3.5, 3.75, 4]),
    "a first token of only that space is empty": ("mistral-v1", ["▁", *MOVIE], "🎬", [0, 0, 0.25, 0.5, 0.75, 1]),
    "of several spaces it drops one": ("mistral-v1", ["▁▁", "▁the", "▁"], "  the ", [0, 1, 5, 6]),
    "wordpiece puts a space before each word": (
        "bert", ["token", "##izer", "##s", ",", "naive", "!"], "tokenizers, naive!", [0, 5, 9, 10, 11, 17, 18]),
    "bytes that are no text are replaced by sequence": (
        "gpt2", ["ðŁ", "a", "¬", "ðŁ", "İ"], "\ufffda\ufffd\ufffd", [0, 1, 2, 3, 3 + 2 / 3, 4]),
    "byte fallback replaces each byte": (
        "mistral-v1", ["▁a", *MOVIE[:3], "b"], "a\ufffd\ufffd\ufffdb", [0, 1, 2, 3, 4, 5]),
    "special tokens are text and unknown ids are not": (
        "smollm2", [1, 10**6, 2], "<|im_start|><|im_end|>", [0, 12, 12, 22]),
    "no tokens": ("smollm2", [], "", [0]),
    "slow tokenizers whose tokens spell the text": (
        "slow", [ord(c) for c in "a🎬\ud800b"], "a🎬\ud800b", [0, 1, 2, 3, 4]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "tokens", "text", "bounds"), CASES.values(), ids=CASES)
def test_spans_by_hand(name, tokens, text, bounds):
    tokenizer = Codepoints() if name == "slow" else load(name)
    ids = [token if isinstance(token, int) else tokenizer.convert_tokens_to_ids(token) for token in tokens]
    decoded, spans_S2 = token_spans(tokenizer, ids)
    assert decoded == text and spans_S2.shape == (len(ids), 2)
    assert spans_S2.tolist() == [pytest.approx(pair) for pair in zip(bounds, bounds[1:], strict=False)]


def test_a_character_of_several_tokens_is_the_last_ones_text():
    tokenizer = load("gpt2")
    ids = tokenizer("A 🎬!\n", add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, ids) == ["A", " ", "", "🎬", "!", "\n"]
    assert token_texts(tokenizer, ids[:3]) == ["A", " ", "\ufffd"]  # cut off inside: shown, not hidden
    assert token_texts(tokenizer, []) == []


@pytest.mark.parametrize("name", [name for name in BUILD if name != "bert"])
def test_texts_of_tokens_join_to_the_text_without_garbage(name):
    tokenizer = load(name)
    for text in ("naïve 🎬👩‍👩‍👧 你好，世界", "مرحبا بالعالم\n\tשלום", "  two <b> & 100 % e\u0301"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in texts)


@pytest.mark.parametrize("name", BUILD)
def test_sampled_ids_are_aligned_with_what_they_decode_to(name):
    """Any ids: spans cut the decoded text into pieces, and a prefix of whole characters ends where its spans do."""
    tokenizer, rng = load(name), random.Random(0)
    size, checked = len(tokenizer), 0
    for _ in range(60):
        ids = [rng.randrange(size + 2) for _ in range(rng.randrange(1, 30))]
        text, spans_S2 = token_spans(tokenizer, ids)
        assert text == tokenizer.decode(ids, skip_special_tokens=False)
        starts, ends = spans_S2.T.tolist()
        assert [0.0, *ends[:-1]] == starts and ends[-1] == len(text)
        for count in range(1, len(ids)):
            prefix = tokenizer.decode(ids[:count])
            if "\ufffd" not in text and text.startswith(prefix):
                assert ends[count - 1] == len(prefix)
                checked += 1
    assert checked > 20


def test_spaces_that_clean_up_drops_are_empty(tmp_path):
    load("bert").save_pretrained(tmp_path)
    tokenizer = type(load("bert")).from_pretrained(tmp_path, clean_up_tokenization_spaces=True)
    ids = tokenizer.convert_tokens_to_ids(["it", "is", "n", "'", "t", "the", "'", "s", "end"])
    text, spans_S2 = token_spans(tokenizer, ids)
    assert text == tokenizer.decode(ids) and len(text) < len("it is n ' t the ' s end")
    pieces = [text[int(start) : int(end)].strip() for start, end in spans_S2.tolist()]
    assert pieces == ["it", "is", "n", "'", "t", "the", "'", "s", "end"]


def test_slow_tokenizers_whose_tokens_do_not_spell_the_text_are_refused():
    slow = ByT5Tokenizer()
    with pytest.raises(UserError, match="ByT5Tokenizer cannot be aligned"):
        token_spans(slow, slow("é", add_special_tokens=False)["input_ids"])


def test_a_weight_is_divided_by_overlapping_characters():
    weight_S, moved = spread([3.0, 1.0], [[0, 3], [3, 4]], [[0, 1], [1, 3.5], [3.5, 4]])
    assert weight_S.tolist() == pytest.approx([1.0, 2.5, 0.5])
    assert moved == 0.0


def test_a_piece_without_overlap_goes_to_the_token_before_it():
    tokens = [[0, 0], [0, 2], [2, 2], [2, 4]]
    weight_S, moved = spread([1.0, 2.0, 4.0, 8.0], [[0, 0], [2, 2], [3, 4], [9, 9]], tokens)
    # before everything: the first that is not empty; at 2: the one that ends there; behind everything: the last
    assert weight_S.tolist() == [0.0, 3.0, 0.0, 12.0]
    assert moved == pytest.approx(11 / 15)
    assert spread([1.0], [[0, 5]], [[0, 0], [0, 0]])[0].tolist() == [1.0, 0.0]


def test_weight_without_tokens_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="no token"):
        spread([1.0], [[0, 1]], np.zeros((0, 2)))
    with pytest.raises(ValueError, match="2,\\) for 1 spans"):
        spread([1.0, 2.0], [[0, 1]], [[0, 1]])
    with pytest.raises(ValueError, match="not finite"):
        spread([float("nan")], [[0, 1]], [[0, 1]])
    with pytest.raises(ValueError, match="out of order"):
        pair([[0, 1]], [[1, 2], [0, 1]])
    assert spread([], np.zeros((0, 2)), [[0, 1]])[0].tolist() == [0.0]


cuts = st.lists(st.floats(0, 50).map(lambda x: round(x * 12) / 12), min_size=2, max_size=20).map(sorted)
pieces = cuts.map(lambda bounds: np.stack([bounds[:-1], bounds[1:]], axis=1))


@given(pieces, pieces, st.data())
def test_sums_are_preserved(sources, targets, data):
    weight = data.draw(st.lists(st.floats(0, 1e3), min_size=len(sources), max_size=len(sources)))
    weight_S, moved = spread(weight, sources, targets)
    assert weight_S.sum().item() == pytest.approx(sum(weight), abs=1e-6)
    assert weight_S.dtype == torch.float64 and 0.0 <= moved <= 1.0
    low, high = targets[0, 0], targets[-1, 1]
    if moved and low < high:  # only pieces without characters, or outside all tokens, are moved
        lone = (sources[:, 0] == sources[:, 1]) | (sources[:, 0] >= high) | (sources[:, 1] <= low)
        assert lone.any()


@given(pieces, st.data())
def test_equal_spans_change_nothing(spans_S2, data):
    weight = np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(spans_S2), max_size=len(spans_S2))))
    weight[spans_S2[:, 0] == spans_S2[:, 1]] = 0.0
    weight_S, moved = spread(weight, spans_S2, spans_S2)
    assert weight_S.tolist() == weight.tolist() and moved == 0.0
