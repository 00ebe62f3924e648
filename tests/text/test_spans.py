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
from abc_plugin.text.spans import pair, spread, token_spans, token_texts


def spans(name, text):
    tokenizer = load(name)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    seen, spans_S2 = token_spans(tokenizer, ids)
    return seen, list(
        zip(tokenizer.convert_ids_to_tokens(ids), *np.round(spans_S2.numpy().T, 6).tolist(), strict=True)
    )


def test_byte_level_tokens_share_a_character_by_bytes():
    text, tokens = spans("gpt2", "A 🎬!")
    assert text == "A 🎬!"
    assert tokens == [("A", 0, 1), ("ĠðŁ", 1, 2.5), ("İ", 2.5, 2.75), ("¬", 2.75, 3), ("!", 3, 4)]


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


def test_sentencepiece_drops_the_first_space_and_falls_back_to_bytes():
    text, tokens = spans("mistral-v1", "Hi 🎬")
    assert text == "Hi 🎬"
    assert tokens == [("▁Hi", 0, 2), ("▁", 2, 3)] + [
        (f"<0x{byte:02X}>", 3 + k / 4, 3 + (k + 1) / 4) for k, byte in enumerate("🎬".encode())
    ]
    text, tokens = spans("mistral-v1", "🎬")
    assert tokens[0] == ("▁", 0, 0)


def test_sentencepiece_spaces_at_the_start_belong_to_their_own_tokens():
    tokenizer = load("mistral-v1")
    ids = tokenizer.convert_tokens_to_ids(["▁▁", "▁the", "▁"])
    text, spans_S2 = token_spans(tokenizer, ids)
    assert text == "  the " and spans_S2.tolist() == [[0, 1], [1, 5], [5, 6]]


def test_wordpiece_puts_a_space_before_each_word():
    assert spans("bert", "Tokenizers, naïve!") == (
        "tokenizers, naive!",
        [("token", 0, 5), ("##izer", 5, 9), ("##s", 9, 10), (",", 10, 11), ("naive", 11, 17), ("!", 17, 18)],
    )


def test_bytes_that_are_no_text_are_replaced_as_the_decoder_does():
    gpt2, mistral = load("gpt2"), load("mistral-v1")
    ids = gpt2.convert_tokens_to_ids(["ðŁ", "a", "¬", "ðŁ", "İ"])
    text, spans_S2 = token_spans(gpt2, ids)
    assert text == "\ufffda\ufffd\ufffd"
    assert spans_S2.tolist() == pytest.approx(np.array([[0, 1], [1, 2], [2, 3], [3, 3 + 2 / 3], [3 + 2 / 3, 4]]))
    ids = mistral.convert_tokens_to_ids(["▁a", "<0xF0>", "<0x9F>", "<0x8E>", "b"])  # one for each byte here
    text, spans_S2 = token_spans(mistral, ids)
    assert text == "a\ufffd\ufffd\ufffdb"
    assert spans_S2.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]


def test_special_tokens_are_text_and_unknown_ids_are_not():
    tokenizer = load("smollm2")
    text, spans_S2 = token_spans(tokenizer, [1, 10**6, 2])
    assert text == "<|im_start|><|im_end|>"
    assert spans_S2.tolist() == [[0, 12], [12, 12], [12, 22]]
    text, spans_S2 = token_spans(tokenizer, [])
    assert text == "" and spans_S2.shape == (0, 2)


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


def test_slow_tokenizers_are_aligned_where_their_tokens_spell_the_text_and_refused_elsewhere():
    text, spans_S2 = token_spans(Codepoints(), [ord(c) for c in "a🎬\ud800b"])
    assert text == "a🎬\ud800b" and spans_S2.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    slow = ByT5Tokenizer()
    ids = slow("é", add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match="ByT5Tokenizer cannot be aligned"):
        token_spans(slow, ids)


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
