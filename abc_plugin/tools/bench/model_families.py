"""Tiny random models of many families, and where each row must be exact: the data of ``abc-rlhf bench parity``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # far from uniform attention: a wrong row cannot pass
    # Families that have experts call them differently; the others do not read these.
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
WINDOW = 4
SLIDES = {"sliding_window": WINDOW}
LATENT = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 3,
}
MAMBA = {  # by the names of its several implementations
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "n_mamba_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
}
HYBRID = {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"]}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ENDS_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **SLIDES}
ENDS_CHUNKED = {"layer_types": ["chunked_attention", "full_attention", "chunked_attention"]}
ENDS_CONV = {"layer_types": ["full_attention", "full_attention", "conv"]}
ENDS_LINEAR = {"layer_types": ["full_attention", "full_attention", "linear_attention"]}
PER_LAYER = {"head_dim": 4, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
SOFTCAP = {"attn_logit_softcapping": 2.0}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
SDPA, FLASH, EAGER = "sdpa", "flash_attention_2", "eager"
ALL, NO_SDPA, ONLY_EAGER = (SDPA, FLASH, EAGER), (FLASH, EAGER), (EAGER,)


@dataclass(frozen=True)
class Family:
    """A model type of transformers, its changes to COMMON, and the implementations where it is exact or refused."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    exact: tuple[str, ...] = ALL
    refused: tuple[str, ...] = ()
    what: str = ""
    without: tuple[str, ...] = ()  # of COMMON: settings that its configuration refuses
    only_bf16: tuple[str, ...] = ()  # implementations that its fp32 model cannot run


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", what="grouped queries"),
    "llama_no_gqa": Family("llama", {"num_key_value_heads": 4}, what="one key head per query head"),
    "llama_one_key_head": Family("llama", {"num_key_value_heads": 1}, what="one key head"),
    "llama4": Family(
        "llama4_text", {"attention_chunk_size": WINDOW, **ENDS_CHUNKED}, (SDPA, EAGER), what="last layer chunked"
    ),
    "qwen2": Family("qwen2"),
    "qwen2_window": Family("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **SLIDES}, what="window"),
    "qwen2_moe": Family("qwen2_moe"),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3_moe"),
    "qwen3_next": Family("qwen3_next", {**DELTA, **ENDS_LINEAR}, what="last layer linear"),
    "qwen3_5": Family("qwen3_5_text", {**DELTA, **ENDS_LINEAR}, what="last layer linear"),
    "mistral": Family("mistral", {"sliding_window": None}),
    "mistral_window": Family("mistral", SLIDES, what="window in every layer"),
    "ministral": Family("ministral", ENDS_SLIDING, what="last layer sliding"),
    "mistral3": Family("ministral3"),
    "mistral4": Family("mistral4", {**LATENT, "head_dim": 16}, what="latent attention"),
    "mixtral": Family("mixtral", {"sliding_window": None}),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2", {"query_pre_attn_scalar": 1, **SOFTCAP, **SLIDES}, NO_SDPA, (SDPA,), "softcap, window"),
    "gemma3": Family("gemma3_text", {"query_pre_attn_scalar": 4, **ENDS_SLIDING}, what="last layer sliding"),
    "gemma4": Family(
        "gemma4_text", {"initializer_range": 0.05, "global_head_dim": 4, **PER_LAYER, **ENDS_SLIDING}, what="window"
    ),
    "gemma3n": Family(
        "gemma3n_text",
        {"num_kv_shared_layers": 0, "laurel_rank": 4, **PER_LAYER, **ENDS_SLIDING},
        what="last layer sliding",
    ),
    "phi": Family("phi"),
    "phi3": Family("phi3", what="also Phi-4"),
    "phimoe": Family("phimoe"),
    "olmo": Family("olmo"),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3", SLIDES, what="window"),
    "olmoe": Family("olmoe"),
    "cohere": Family("cohere"),
    "cohere2": Family("cohere2", SLIDES, what="window"),
    "smollm3": Family("smollm3"),
    "granite": Family("granite", {"attention_multiplier": 0.2}),
    "granitemoe": Family("granitemoe", {"attention_multiplier": 0.2}),
    "granitemoehybrid": Family("granitemoehybrid", {**MAMBA, **ENDS_LINEAR}, what="last layer Mamba"),
    "starcoder2": Family("starcoder2", SLIDES, what="window"),
    "stablelm": Family("stablelm"),
    "glm": Family("glm"),
    "glm4": Family("glm4"),
    "glm4_moe": Family("glm4_moe"),
    "deepseek_v2": Family("deepseek_v2", LATENT, what="latent attention"),
    "deepseek_v3": Family("deepseek_v3", LATENT, what="latent attention"),
    "glm4_moe_lite": Family("glm4_moe_lite", LATENT, what="latent attention"),
    "minicpm3": Family("minicpm3", LATENT, what="latent attention"),
    "apertus": Family("apertus"),
    "exaone4": Family("exaone4", SLIDES, what="window"),
    "ernie4_5": Family("ernie4_5"),
    "ernie4_5_moe": Family("ernie4_5_moe"),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense"),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe"),
    "seed_oss": Family("seed_oss"),
    "minimax": Family("minimax", ENDS_LINEAR),
    "minimax_m2": Family("minimax_m2"),
    "nemotron": Family("nemotron"),
    "nemotron_h": Family(
        "nemotron_h",
        {"layers_block_type": ["full_attention", "mamba", "moe"], "moe_shared_expert_intermediate_size": 16, **MAMBA},
        what="last layer experts",
    ),
    "falcon_h1": Family("falcon_h1", {"mamba_d_ssm": 64, **MAMBA}, what="beside Mamba"),
    "lfm2": Family("lfm2", ENDS_CONV, what="last layer convolution"),
    "jamba": Family("jamba", {"attn_layer_period": 3, "attn_layer_offset": 1, **MAMBA}, what="last layer Mamba"),
    "bamba": Family("bamba", {"attn_layer_indices": [0, 1], **MAMBA}, what="last layer Mamba"),
    "gpt_oss": Family("gpt_oss", SLIDES, NO_SDPA, what="sinks, window"),
    "mimo_v2_flash": Family(
        "mimo_v2_flash", {"v_head_dim": 8, **ENDS_SLIDING}, NO_SDPA, what="sinks, last layer sliding"
    ),
    # in fp32 flash needs a torch Linear, gpt2 has none
    "gpt2": Family("gpt2", exact=(SDPA, EAGER), only_bf16=(FLASH,)),
    "gpt_bigcode": Family("gpt_bigcode"),
    "gpt_neox": Family("gpt_neox"),
    "opt": Family("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    "modernbert": Family(
        "modernbert", {"local_attention": 4, "global_attn_every_n_layers": 2}, what="encoder, window"
    ),
    "bert": Family("bert", what="encoder"),
    "roberta": Family("roberta", {"max_position_embeddings": 80}, what="encoder"),
    "eurobert": Family("eurobert", what="encoder"),
    "deberta": Family("deberta", DISENTANGLED, ONLY_EAGER),
    "deberta_v2": Family(
        "deberta-v2",
        {"position_buckets": 8, "share_att_key": True, **DISENTANGLED},
        ONLY_EAGER,
        what="also DeBERTa-v3",
    ),
    "bloom": Family("bloom", exact=ONLY_EAGER, what="alibi"),
    "mpt": Family("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3}, ONLY_EAGER, what="alibi"),
    "falcon": Family(
        "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, (SDPA, EAGER), without=("head_dim",)
    ),
    "falcon_rw": Family("falcon", {"alibi": True, "multi_query": False}, (), (SDPA, EAGER), "alibi", ("head_dim",)),
    "gptj": Family("gptj", {"rotary_dim": 4, "n_inner": 48}, ONLY_EAGER),
    "gpt_neo": Family(
        "gpt_neo", {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": WINDOW}, ONLY_EAGER
    ),
    "codegen": Family("codegen", {"rotary_dim": 4, "n_inner": 48}, ONLY_EAGER),
    "diffllama": Family("diffllama", exact=(), refused=ALL, what="difference of two softmaxes"),
    "zamba2": Family("zamba2", {**HYBRID, **MAMBA}, (), ALL, "shared layer"),
    "mamba2": Family("mamba2", {"num_heads": 4, "head_dim": 16, "n_groups": 1}, (), ONLY_EAGER, "no attention"),
    "xlnet": Family("xlnet", {"d_head": 8}, (), ONLY_EAGER, "two streams", ("max_position_embeddings",)),
    "longformer": Family("longformer", {"attention_window": 4}, (), ONLY_EAGER, "sparse attention"),
    "t5": Family(
        "t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, (), ALL, "encoder-decoder"
    ),
    "bart": Family("bart", {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}, (), ALL, "encoder-decoder"),
}


def tiny(family: str = "llama", **changes: object) -> nn.Module:
    """The base model (no head) of a family, or of a model type; random weights, eval mode, sdpa where it has that."""
    entry = FAMILIES.get(family, Family(family))
    torch.manual_seed(0)
    common = {name: value for name, value in COMMON.items() if name not in entry.without}
    settings = copy.deepcopy({**common, **entry.changes, **changes})  # some configurations change the lists they get
    config = AutoConfig.for_model(entry.model_type, **settings)
    model = AutoModel.from_config(config, attn_implementation=SDPA if SDPA in entry.exact else EAGER)
    with torch.no_grad():  # some families start sinks and biases at 0
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()
