"""The comparison of tokenizers: every pair of genuine ones, and mutations of one, each with its reasoned verdict."""

import json
import re
from functools import cache
from itertools import combinations

import pytest
from tokenizer_zoo import BUILD, Codepoints, load
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from abc_plugin.text.tokenizer_differences import (
    COMPATIBLE,
    INCOMPATIBLE,
    SAME,
    ModelTokenizer,
    _embedding_rows,
    _end,
    compare,
)

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "padding_side", "model_max_length", "chat_template")


@cache
def known(name):
    """Keeps the vocabulary and parts that it has read."""
    return ModelTokenizer(load(name))


def mutated(change=lambda parts: None, **roles):
    """SmolLM2's tokenizer after ``change`` of its parts and with other roles."""
    original = load("smollm2")
    parts = json.loads(original.backend_tokenizer.to_str())
    change(parts)
    roles = {role: getattr(original, role) for role in ROLES} | roles
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), **roles)


def findings(verdict, result):
    return {finding.part: finding.words for finding in result.findings if finding.verdict == verdict}


@pytest.mark.parametrize("name", BUILD)
def test_every_genuine_tokenizer_is_the_same_as_itself(name):
    result = compare(known(name), ModelTokenizer(load(name)))
    assert result.verdict == SAME and not result.examples and not result.incompatibilities()


# Each of these was trained on its own: shared strings got their ids by frequency, so vocabulary, merges and texts
# differ at once. Only Mistral's v1 and v2 are one tokenizer, with 768 control tokens put in before its pieces: pieces,
# merges, pre-tokenizer and special tokens are equal, but for 3 of 32,000 tokens every id is shifted.
SHARED = {frozenset(("mistral-v1", "mistral-v2")): {"vocabulary", "texts"}}
SAME_END = {frozenset(pair) for pair in combinations(("smollm2", "mistral-v1", "mistral-v2"), 2)}  # all end with id 2


@pytest.mark.parametrize("pair", list(combinations(BUILD, 2)), ids="-".join)
def test_every_pair_of_genuine_tokenizers_is_dangerous_for_its_reasons(pair):
    result = compare(*map(known, pair))
    assert result.verdict == INCOMPATIBLE
    expected = SHARED.get(frozenset(pair))
    if expected is None:
        expected = {"vocabulary", "pre-tokenizer", "merges", "texts"}
        if frozenset(pair) not in SAME_END:
            expected |= {"end of sequence"}
        if "bert" in pair:  # lower-cases, is WordPiece
            expected |= {"normalizer", "model"}
        elif any(name.startswith("mistral") for name in pair):  # byte fallback
            expected |= {"model"}
    assert set(findings(INCOMPATIBLE, result)) == expected
    assert len(result.examples) == 5 and "has id" in result.incompatibilities()[0]


def swap(parts):
    vocabulary = parts["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġof"] = vocabulary["Ġof"], vocabulary["Ġthe"]


def rename(parts):
    token = "".join(parts["model"]["merges"].pop())  # the rarest, part of no other
    parts["model"]["vocab"]["Ġzzzz"] = parts["model"]["vocab"].pop(token)


def own_word(parts):
    parts["model"]["vocab"]["ĠtheĠof"] = len(parts["model"]["vocab"])


def extra(content, special=True):
    def change(parts):
        token = parts["added_tokens"][0] | {"id": 49152, "content": content, "special": special}
        parts["added_tokens"].append(token)

    return change


def strip(parts):
    parts["added_tokens"][1]["lstrip"] = True


def forget(parts):
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] != "<|im_start|>"]


def digits(parts):
    del parts["pre_tokenizer"]["pretokenizers"][0]


def prefix_space(parts):
    parts["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def nested(parts):
    """Other spellings of the same pipeline."""
    parts["normalizer"] = {"type": "Sequence", "normalizers": []}
    parts["pre_tokenizer"]["pretokenizers"][0] = {
        "type": "Sequence",
        "pretokenizers": [parts["pre_tokenizer"]["pretokenizers"][0]],
    }
    parts["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = False


def begin(token, index):
    def change(parts):
        parts["post_processor"]["single"].insert(0, {"SpecialToken": {"id": token, "type_id": 0}})
        parts["post_processor"]["special_tokens"][token] = {"id": token, "ids": [index], "tokens": [token]}

    return change


NFC = {"type": "NFC"}
LOWER = {"type": "Lowercase"}
MUTATIONS = [
    # (verdict, pattern of its finding, change, roles)
    # The same strings, other ids: credit for one word is read as credit for another.
    (INCOMPATIBLE, "the token 'Ġ(the|of)' has id .*\\(2 such tokens\\)", swap, {}),
    # An id whose string the other does not know.
    (INCOMPATIBLE, "id 49151 is .* for the policy and 'Ġzzzz' for the reward model", rename, {}),
    # Not an added token: a word that the pieces could make, so texts may be read otherwise.
    (INCOMPATIBLE, "only the reward model has 'ĠtheĠof'", own_word, {}),
    # Rare merges are in none of the texts, but decide ids.
    (INCOMPATIBLE, "their merges differ: number 48899", lambda parts: parts["model"]["merges"].pop(), {}),
    (INCOMPATIBLE, "their merges differ: number 20000", lambda parts: parts["model"]["merges"].pop(20000), {}),
    (INCOMPATIBLE, "their normalizers differ", lambda parts: parts.update(normalizer=LOWER), {}),
    (INCOMPATIBLE, "their normalizers differ", lambda parts: parts.update(normalizer=NFC), {}),
    (INCOMPATIBLE, "their pre-tokenizers differ", digits, {}),
    (INCOMPATIBLE, "their pre-tokenizers differ", prefix_space, {}),
    (INCOMPATIBLE, "their models differ", lambda parts: parts["model"].update(ignore_merges=True), {}),
    # The score is read where a sequence ends.
    (INCOMPATIBLE, "eos_token_id is 2 .* for the policy and 0", lambda parts: None, {"eos_token": "<|endoftext|>"}),
    (INCOMPATIBLE, "eos_token_id is 2 .* and none", lambda parts: None, {"eos_token": None}),
    # The marks of turns are matched otherwise, or not at all.
    (INCOMPATIBLE, "the added token '<\\|im_start\\|>' is not matched in text alike", strip, {}),
    (INCOMPATIBLE, "the added token '<\\|im_start\\|>' is not matched in text alike", forget, {"bos_token": None}),
    # Reads every text behind another first token.
    (INCOMPATIBLE, "bos_token_id is 1 .*put before texts", begin("<|endoftext|>", 0), {"bos_token": "<|endoftext|>"}),
    # OpenRLHF encodes without the tokens around a text.
    (COMPATIBLE, "with special tokens 'a' is \\[81\\] .* \\[1, 81\\]", begin("<|im_start|>", 1), {}),
    (COMPATIBLE, "bos_token_id is 1 .*put before no text", lambda parts: None, {"bos_token": "<|endoftext|>"}),
    # In none of the texts, and the policy cannot write it.
    (COMPATIBLE, "only the reward model has '<\\|new\\|>'", extra("<|new|>"), {}),
    (COMPATIBLE, "only the reward model has '<think>'", extra("<think>", special=False), {}),
    # Padding is masked.
    (COMPATIBLE, "16 .* for the policy and 2 ", lambda parts: None, {"pad_token": "<|im_end|>"}),
    (COMPATIBLE, "for the policy and 49152 \\('\\[PAD\\]'\\)", extra("[PAD]"), {"pad_token": "[PAD]"}),
    (COMPATIBLE, "right for the policy and left for the reward model", lambda parts: None, {"padding_side": "left"}),
    # Changes prompts of its own, not the policy's ids.
    (
        COMPATIBLE,
        "the reward model reads prompts as the policy's template",
        lambda parts: None,
        {"chat_template": "x"},
    ),
    (COMPATIBLE, "8192 for the policy and 512", lambda parts: None, {"model_max_length": 512}),
    (SAME, "", nested, {}),
    (SAME, "", lambda parts: None, {}),
]


@pytest.mark.parametrize(("verdict", "words", "change", "roles"), MUTATIONS)
def test_each_mutation_has_its_verdict(verdict, words, change, roles):
    other = ModelTokenizer(mutated(change, **roles))
    result = compare(known("smollm2"), other)
    assert result.verdict == verdict, findings(INCOMPATIBLE, result)
    assert verdict == SAME or any(re.search(words, finding) for finding in findings(verdict, result).values())
    back = compare(other, known("smollm2"))  # who is who does not change the verdict
    assert back.verdict == verdict, findings(INCOMPATIBLE, back)


@pytest.mark.parametrize(
    ("extra_token", "our_rows", "their_rows", "verdict"),
    [
        (False, 49152, 49152, SAME),
        (False, 49280, 49152, COMPATIBLE),
        (False, 49152, 49280, COMPATIBLE),
        (True, 49153, 49280, COMPATIBLE),
        (True, 49153, 49152, INCOMPATIBLE),
        (True, 49152, 49152, INCOMPATIBLE),
    ],
)
def test_padded_embedding_rows_are_harmless_and_missing_ones_dangerous(extra_token, our_rows, their_rows, verdict):
    policy = mutated(extra("<|new|>")) if extra_token else load("smollm2")
    result = _embedding_rows(ModelTokenizer(policy, our_rows), ModelTokenizer(load("smollm2"), their_rows))
    assert result[0] == verdict
    if verdict == INCOMPATIBLE:
        whose = "the reward model's" if our_rows > their_rows else "its own"
        assert result[1] == f"the policy's id 49152 ('<|new|>') has no row in {whose} embedding of 49152"


def test_the_ids_that_end_a_generation_count():
    def end(*ids):
        return _end(ModelTokenizer(load("smollm2"), generation_ends=ids), known("smollm2"))

    assert (end(2)[0], end(2, 0)[0], end(0)[0]) == (SAME, COMPATIBLE, INCOMPATIBLE)
    assert "generation ends with (0,)" in end(0)[1]


def test_an_end_that_is_also_padding_is_not_masked():
    def strip_end(parts):
        parts["added_tokens"][2]["lstrip"] = True

    both = {"pad_token": "<|im_end|>"}
    result = compare(ModelTokenizer(mutated(**both)), ModelTokenizer(mutated(strip_end, **both)))
    assert "the added token '<|im_end|>' is not matched in text alike" in result.incompatibilities()[0]


def test_the_users_own_prompts_decide_over_a_token_that_only_one_has():
    ours, theirs = known("smollm2"), ModelTokenizer(mutated(extra("<think>", special=False)))
    assert compare(ours, theirs, ["fine"]).verdict == COMPATIBLE
    result = compare(ours, theirs, ["fine", "so <think> hard"])
    assert result.verdict == INCOMPATIBLE
    assert result.examples[0].text == "so <think> hard" and 49152 in result.examples[0].reward_model


def test_slow_tokenizers_are_compared_by_vocabulary_and_texts():
    assert (
        compare(ModelTokenizer(Codepoints(eos_token="a")), ModelTokenizer(Codepoints(eos_token="a"))).verdict == SAME
    )
    result = compare(ModelTokenizer(Codepoints(eos_token="a")), ModelTokenizer(Codepoints(eos_token="b")))
    assert "eos_token_id is" in result.incompatibilities()[0]

    class Upper(Codepoints):
        def _tokenize(self, text):
            return list(text.upper())

    result = compare(ModelTokenizer(Codepoints(eos_token="a")), ModelTokenizer(Upper(eos_token="a")))
    assert set(findings(INCOMPATIBLE, result)) == {"texts"} and "pipeline" in findings(COMPATIBLE, result)
