"""A batch of the policy's sequences in a reward model's tokens, and credit carried back."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import Codepoints, load
from tokenizers import normalizers
from transformers import ByT5Tokenizer

from abc_plugin.credit.redistribute import response_weights
from abc_plugin.errors import UserError
from abc_plugin.text.tokenizer_mapping import _split_shared, map_batch

texts = st.text(st.one_of(st.characters(), st.sampled_from("e\u0301\u200b\u200d👩🎬\ufeff ﬁ\n\tab<|>")), max_size=24)
PAIRS = [("gpt2", "mistral-v1"), ("mistral-v1", "gpt2"), ("smollm2", "bert"), ("bert", "deepseek"), ("slow", "gpt2")]


def tokenizer(name):
    return Codepoints(eos_token="\0") if name == "slow" else load(name)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def batch(*samples, side="right"):
    """(prompt ids, response ids) -> sequences, attention mask, action mask as OpenRLHF lays them out."""
    length = max(len(prompt) + len(response) for prompt, response in samples)
    rows = []
    for prompt, response in samples:
        gap = [0] * (length - len(prompt) - len(response))
        real, action = [1] * len(prompt + response), [0] * len(prompt) + [1] * len(response)
        parts = ((prompt + response, gap), (real, gap), (action, gap))
        rows.append([gap + row if side == "left" else row + gap for row, gap in parts])
    sequences, mask, action = torch.tensor(rows).unbind(1)
    return sequences, mask, action[:, 1:]


def random_row(mapped, seed=0):
    row = torch.rand(mapped.input_ids_BL.shape, generator=torch.Generator().manual_seed(seed))
    return row * mapped.attention_mask_BL


@pytest.mark.parametrize(("policy", "reward_model"), PAIRS)
@settings(max_examples=60, deadline=None)
@given(prompt=texts.filter(len), response=texts, ended=st.booleans(), side=st.sampled_from(["left", "right"]))
def test_any_text_keeps_its_sum_and_the_prompt_gets_no_credit(policy, reward_model, prompt, response, ended, side):
    policy, reward_model = tokenizer(policy), tokenizer(reward_model)
    if policy.is_fast:  # these take no halves of surrogate pairs
        prompt, response = (text.encode("utf-8", "replace").decode() for text in (prompt, response))
    prompt = encode(policy, prompt) or [5]
    response = encode(policy, response) + [policy.eos_token_id or 5] * ended
    sequences, mask, action = batch((prompt, response), ([7, 8], [9]), side=side)
    mapped = map_batch(policy, reward_model, sequences, mask, action)
    row = random_row(mapped)
    out, moved = mapped.to_policy(row)
    assert out.sum(1).tolist() == pytest.approx(row.double().sum(1).tolist(), abs=1e-6)
    assert (out[mask == 0] == 0).all() and moved.min() >= 0 and moved.max() <= 1
    credit = response_weights(out[:, 1:], action)
    assert (credit[action == 0] == 0).all()
    assert credit.sum(1).tolist() == pytest.approx([float(bool(response)), 1.0])


@pytest.mark.parametrize("name", ["smollm2", "gpt2", "mistral-v1", "deepseek"])
@settings(max_examples=40, deadline=None)
@given(text=texts.filter(len), cut=st.integers(0, 10), ended=st.booleans())
def test_equal_tokenizers_are_the_identity(name, text, cut, ended):
    tokenizer = load(name)
    ids = encode(tokenizer, text.encode("utf-8", "replace").decode())
    if not ids or encode(tokenizer, tokenizer.decode(ids)) != ids:
        return  # SmolLM2 reads some control characters as nothing; normalised text is read as other ids
    ended = ended and tokenizer.eos_token_id is not None
    prompt, response = ids[:cut], ids[cut:] + [tokenizer.eos_token_id] * ended
    sequences, mask, action = batch((prompt, response))
    mapped = map_batch(tokenizer, copy.copy(tokenizer), sequences, mask, action)
    assert mapped.input_ids_BL.tolist() == sequences.tolist()
    row = random_row(mapped)
    row[:, [not piece for piece in map(tokenizer.decode, sequences[0].tolist())]] = 0.0  # not seen: see the next test
    out, moved = mapped.to_policy(row)
    assert out.tolist() == pytest.approx(row.double().numpy(), abs=1e-12)
    assert moved.tolist() == [0.0]


@settings(max_examples=40, deadline=None)
@given(prompt=texts.filter(len), response=texts.filter(len))
def test_nothing_crosses_the_border(prompt, response):
    """A reward model of characters shows on which side of the border each weight lay."""
    gpt2 = load("gpt2")
    prompt, response = (text.encode("utf-8", "replace").decode() for text in (prompt, response))
    sequences, mask, action = batch((encode(gpt2, prompt), encode(gpt2, response)))
    mapped = map_batch(gpt2, Codepoints(), sequences, mask, action)
    row = random_row(mapped)
    out, moved = mapped.to_policy(row)
    assert out[0, len(encode(gpt2, prompt)) :].sum().item() == pytest.approx(row[0, len(prompt) :].sum().item())
    assert moved.item() == 0.0


def test_a_piece_that_is_not_seen_is_counted_as_moved():
    mistral = load("mistral-v1")
    ids = encode(mistral, "🎬")  # "▁", whose space the decoder drops, and four bytes
    assert len(ids) == 5
    mapped = map_batch(mistral, mistral, *batch(([], ids)))
    out, moved = mapped.to_policy(torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2]]))
    assert out.tolist() == [pytest.approx([0.0, 0.4, 0.2, 0.2, 0.2])]
    assert moved.tolist() == pytest.approx([0.2])


def test_a_token_across_the_border_gives_each_side_its_characters():
    gpt2, mistral = load("gpt2"), load("mistral-v1")
    assert len(encode(mistral, "where")) == 1
    mapped = map_batch(gpt2, mistral, *batch((encode(gpt2, "whe"), encode(gpt2, "re"))))
    out, moved = mapped.to_policy(torch.ones(1, 1))
    assert out[:, -1].tolist() == pytest.approx([2 / 5]) and out.sum().item() == pytest.approx(1) and moved.item() == 0


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_every_end_of_the_policys_becomes_the_reward_models_and_back(end):
    """Its tokenizer's own, and one that its configuration alone names."""
    policy, reward_model = load("smollm2"), load("mistral-v1")
    response = encode(policy, " good")
    end = policy.convert_tokens_to_ids(end)
    samples = batch((encode(policy, "So"), [*response, end]), (encode(policy, "So"), response))
    mapped = map_batch(policy, reward_model, *samples, ends=[0, 2])
    assert mapped.attention_mask_BL.sum(1).diff().tolist() == [-1]
    last = mapped.attention_mask_BL.sum(1) - 1
    finished, cut = mapped.input_ids_BL[torch.arange(2), last].tolist()
    assert finished == reward_model.eos_token_id and cut == encode(reward_model, "So good")[-1]
    row = torch.zeros(mapped.input_ids_BL.shape)
    row[0, last[0]] = 0.75
    out, moved = mapped.to_policy(row)
    assert out[0].tolist() == [0.0] * (out.shape[1] - 1) + [0.75] and moved.tolist() == [0, 0]


def test_an_end_inside_the_prompt_is_text():
    gpt2 = load("gpt2")
    ids = encode(gpt2, "a<|endoftext|>")
    mapped = map_batch(gpt2, load("mistral-v1"), *batch((ids, [])))
    assert load("mistral-v1").decode(mapped.input_ids_BL[0]) == "a<|endoftext|>"


def test_the_reward_models_special_tokens_are_added_and_counted():
    gpt2, bert = load("gpt2"), load("bert")
    prompt, response = encode(gpt2, "It is"), encode(gpt2, " fine")
    mapped = map_batch(gpt2, bert, *batch((prompt, response)), special_tokens=True)
    assert bert.convert_ids_to_tokens(mapped.input_ids_BL[0]) == ["[CLS]", "it", "is", "fine", "[SEP]"]
    out, moved = mapped.to_policy(torch.tensor([[0.5, 0.1, 0.1, 0.2, 0.1]]))
    assert out.tolist() == [pytest.approx([0.6, 0.1, 0.3])]  # CLS to the first token, SEP to the last
    assert moved.tolist() == pytest.approx([0.1 / 0.3])


def test_truncation_cuts_the_front_and_is_counted():
    gpt2, mistral = load("gpt2"), load("mistral-v1")
    samples = (encode(gpt2, "one two three"), encode(gpt2, " four five")), (encode(gpt2, "one"), encode(gpt2, " two"))
    mapped = map_batch(gpt2, mistral, *batch(*samples), max_length=3)
    assert mapped.truncated_B.tolist() == [True, False]
    assert mistral.convert_ids_to_tokens(mapped.input_ids_BL[0]) == ["▁three", "▁four", "▁five"]
    out, moved = mapped.to_policy(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]))
    assert out.tolist() == [[0, 0, 0.5, 0.25, 0.25], [0.5, 0.5, 0, 0, 0]] and moved.tolist() == [0, 0]
    with pytest.raises(UserError, match="maximum length 2 leaves no room"):
        map_batch(gpt2, load("bert"), *batch(*samples), special_tokens=True, max_length=2)


def test_normalised_text_is_aligned_by_offsets():
    gpt2, bert = load("gpt2"), load("bert")
    mapped = map_batch(gpt2, bert, *batch((encode(gpt2, "NAÏVE"), encode(gpt2, " Crème 🎬"))))
    assert bert.convert_ids_to_tokens(mapped.input_ids_BL[0]) == ["naive", "cr", "##eme", "[UNK]"]
    out, moved = mapped.to_policy(torch.tensor([[0.5, 0.125, 0.125, 0.25]]))
    action = torch.tensor([0] * len(encode(gpt2, "NAÏVE")) + [1] * len(encode(gpt2, " Crème 🎬")))
    assert (out[0] * (1 - action)).sum().item() == 0.5 and (out[0] * action).sum().item() == 0.5 and moved.item() == 0
    assert out[0, -3:].sum().item() == pytest.approx(0.25)  # the three tokens of the clapper board


def test_offsets_that_tokens_share_are_divided_among_them():
    gpt2, lower = load("gpt2"), copy.deepcopy(load("gpt2"))
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    ids = encode(gpt2, "B 🎬!")
    mapped = map_batch(gpt2, lower, *batch(([], ids)))
    assert mapped.input_ids_BL.tolist() == [encode(gpt2, "b 🎬!")]
    row = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25]])
    out, moved = mapped.to_policy(row)
    # its tokens 1 to 3 say only that they are of " 🎬" or of "🎬"; the last two halve the character, ours quarter it
    assert mapped.pairs_B[0].source_P.size > 5 and moved.item() == 0.0
    assert out[0, [0, 4]].tolist() == pytest.approx([0.1, 0.25])
    assert out.sum().item() == pytest.approx(1.0)
    assert _split_shared(np.array([[0, 1], [1, 3], [1, 3], [3, 3], [3, 3], [3, 4.0]])).tolist() == [
        [0, 1],
        [1, 2],
        [2, 3],
        [3, 3],
        [3, 3],
        [3, 4],
    ]
    assert _split_shared(np.zeros((0, 2))).shape == (0, 2)


def template(name, text):
    tokenizer = copy.deepcopy(load(name))
    tokenizer.chat_template = text
    return tokenizer


TRIMMED = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]\n{% endfor %}"


@pytest.mark.parametrize("ended", [True, False])
def test_the_reward_models_own_chat_template(ended):
    policy, reward_model = load("smollm2"), template("gpt2", TRIMMED)
    prompt = encode(policy, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    response = encode(policy, "\n hello") + [policy.eos_token_id] * ended
    sequences, mask, action = batch((prompt, response))
    turns = [[{"role": "user", "content": "Hi"}]]
    mapped = map_batch(policy, reward_model, sequences, mask, action, messages_B=turns)
    shown = "[user]Hi[end]\n[assistant]hello" + ("[end]\n<|endoftext|>" if ended else "")
    assert reward_model.decode(mapped.input_ids_BL[0]) == shown
    length = mapped.input_ids_BL.shape[1]
    out, moved = mapped.to_policy(torch.full((1, length), 1.0))
    tail = len(encode(reward_model, "[end]\n<|endoftext|>")) * ended
    hello = len(encode(reward_model, "hello"))
    on_response = out[0, len(prompt) :]
    assert out[0, : len(prompt) - 1].sum().item() == 0.0  # the template counts as the prompt's last token
    assert on_response.sum().item() == pytest.approx(hello + tail)
    assert on_response[-1 - ended].item() == pytest.approx(hello) and moved.item() == 0
    if ended:
        assert on_response[-1].item() == pytest.approx(tail)


def composing():
    tokenizer = copy.deepcopy(load("gpt2"))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize(
    ("reward_model", "prompt", "response", "share"),
    [
        (composing, "A e", "\u0301", 1 / 3),  # of " é", a space, a letter and its accent
        (composing, "\u1112", "\u1161\u11ab", 2 / 3),  # a syllable of three letters
        (composing, "e\u0301 q", "\u0301", 1.0),  # no such letter: the accent is a token of its own
        (lambda: load("bert"), "cafe", "\u0301", 1 / 5),  # drops accents
        (lambda: load("bert"), "the film ", "a", 1.0),  # the space before a word is none of the word's
        (lambda: load("bert"), "the film", " a", 1.0),
    ],
)
def test_accents_and_spaces_take_their_part_to_the_response(reward_model, prompt, response, share):
    policy, reward_model = Codepoints(eos_token="\0"), reward_model()
    mapped = map_batch(policy, reward_model, *batch((encode(policy, prompt), encode(policy, response))))
    row = torch.zeros(mapped.input_ids_BL.shape)
    last = encode(reward_model, prompt + response)[-1]
    same = (mapped.input_ids_BL[0] == last).nonzero()[-1]
    row[0, same] = 1.0
    if "\u1112" in prompt:  # the syllable's bytes are several tokens
        row = torch.ones_like(row) / row.shape[1]
    out, moved = mapped.to_policy(row)
    assert out[0, len(prompt) :].sum().item() == pytest.approx(share) and moved.item() == 0


ANSWER = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1].strip() }}[end]\n{% endfor %}"
# As Qwen3's: the thoughts of the last reply are written again, with line feeds of its own.
THOUGHTS = """{% for m in messages %}[{{ m.role }}]{% set parts = m.content.split('</think>') %}
{% if parts | length > 1 %}
<think>
{{ parts[0].split('<think>')[-1].strip() }}
</think>

{% endif %}{{ parts[-1].lstrip('\n') }}[end]{% endfor %}"""


@pytest.mark.parametrize(
    ("words", "shown", "credited"),
    [
        (ANSWER, "[user]Hi[end]\n[assistant]Yes.[end]\n", "Yes."),
        (THOUGHTS, "[user]Hi[end][assistant]<think>\nno yes\n</think>\n\nYes.[end]", "<think>no yes</think>Yes."),
    ],
)
def test_a_template_that_treats_the_reply_is_shown_as_it_writes_it(words, shown, credited):
    policy = load("gpt2")
    reward_model = template("gpt2", words)
    response = [*encode(policy, "<think>no yes</think>\n\nYes."), policy.eos_token_id]
    sequences = batch((encode(policy, "Hi"), response))
    mapped = map_batch(policy, reward_model, *sequences, messages_B=[[{"role": "user", "content": "Hi"}]])
    assert reward_model.decode(mapped.input_ids_BL[0]) == shown + "<|endoftext|>"
    out, moved = mapped.to_policy(torch.ones(mapped.input_ids_BL.shape))
    assert out.sum().item() == pytest.approx(mapped.input_ids_BL.shape[1]) and moved.item() == 0
    got = [
        policy.decode(token) for token, share in zip(response[:-1], out[0, 1:-1].tolist(), strict=True) if share > 0
    ]
    assert "".join("".join(got).split()) == "".join(credited.split())


def test_unusable_templates_are_refused():
    gpt2 = load("gpt2")
    sequences = batch((encode(gpt2, "a"), encode(gpt2, "b")))
    turns = [[{"role": "user", "content": "a"}]]
    for reward_model, message in (
        (load("mistral-v1"), "chat template cannot be used"),
        (template("gpt2", "{{ messages[0].content }}"), "leaves the assistant's reply out"),
    ):
        with pytest.raises(UserError, match=message):
            map_batch(gpt2, reward_model, *sequences, messages_B=turns)


def test_a_slow_reward_model_is_read_by_its_own_tokens_or_refused():
    gpt2 = load("gpt2")
    mapped = map_batch(gpt2, Codepoints(), *batch((encode(gpt2, "a"), encode(gpt2, "b🎬"))))
    assert mapped.input_ids_BL.tolist() == [[ord(c) for c in "ab🎬"]]
    out, _ = mapped.to_policy(torch.tensor([[1.0, 2.0, 8.0]]))
    assert out.tolist() == [pytest.approx([1.0, 2.0, 4.0, 2.0, 2.0])]
    with pytest.raises(UserError, match="ByT5Tokenizer is a slow tokenizer without offsets"):
        map_batch(gpt2, ByT5Tokenizer(), *batch((encode(gpt2, "a"), encode(gpt2, "é"))))


def test_rows_of_another_shape_or_with_nan_are_refused():
    gpt2 = load("gpt2")
    mapped = map_batch(gpt2, gpt2, *batch((encode(gpt2, "a b"), [])))
    for row in (torch.ones(1, 3), torch.tensor([[1.0, float("nan")]])):
        with pytest.raises(ValueError, match="row of shape"):
            mapped.to_policy(row)


def test_sequences_without_tokens_or_response_are_defined():
    gpt2, mistral = load("gpt2"), load("mistral-v1")
    mapped = map_batch(gpt2, mistral, *batch(([], []), (encode(gpt2, "ab"), [])))
    assert mapped.attention_mask_BL.sum(1).tolist()[0] == 1  # a row without any token has no score position
    out, moved = mapped.to_policy(random_row(mapped))
    assert out[0].sum() == 0 and moved.tolist() == [0, 0]
