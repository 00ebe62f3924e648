"""Tiny random models for the recovery tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaModel, LlamaPreTrainedModel

from abc_plugin.recovery.rows import score_positions

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # far from uniform attention: a wrong row cannot pass
}
WINDOW, MOE = 4, {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ENDS_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
ALL, NO_SDPA = ("sdpa", "flash_attention_2", "eager"), ("flash_attention_2", "eager")

# name: (model_type, changes to COMMON, implementations that compute what eager computes)
FAMILIES: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    "llama": ("llama", {}, ALL),
    "llama_no_gqa": ("llama", {"num_key_value_heads": 4}, ALL),
    "llama_one_key_head": ("llama", {"num_key_value_heads": 1}, ALL),
    "qwen2": ("qwen2", {}, ALL),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        ALL,
    ),
    "qwen3": ("qwen3", {"head_dim": 8}, ALL),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, **MOE}, ALL),
    "mistral": ("mistral", {"sliding_window": None}, ALL),
    "mistral_window": ("mistral", {"sliding_window": WINDOW}, ALL),
    "mixtral": ("mixtral", MOE, ALL),
    "gemma": ("gemma", {"head_dim": 8}, ALL),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0}, NO_SDPA),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ENDS_SLIDING}, ALL),
    "phi": ("phi", {}, ALL),
    "phi3": ("phi3", {}, ALL),
    "olmo2": ("olmo2", {}, ALL),
    "cohere2": ("cohere2", {"sliding_window": WINDOW}, ALL),
    "smollm3": ("smollm3", {}, ALL),
    "granite": ("granite", {"attention_multiplier": 0.2}, ALL),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}, ALL),
    "gpt2": ("gpt2", {}, ("sdpa", "eager")),  # in fp32 its flash path asks for a torch Linear, and gpt2 has none
    "gpt_neox": ("gpt_neox", {}, ALL),
    "opt": ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}, ALL),
    "gpt_oss": ("gpt_oss", {"head_dim": 8, "sliding_window": WINDOW, **MOE}, NO_SDPA),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 3,
        },
        ALL,
    ),
}


def tiny(family: str = "llama", **changes: object) -> nn.Module:
    """The base model (no head) of a family, random weights, eval mode, sdpa unless the family has none."""
    model_type, own, implementations = FAMILIES.get(family, (family, {}, ALL))
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **own, **changes})
    model = AutoModel.from_config(config, attn_implementation="sdpa" if "sdpa" in implementations else "eager")
    with torch.no_grad():  # some families start sinks and biases at 0
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


# Padded on the right, on the left, not at all, and cut to a single real token.
RIGHT = torch.tensor([[1] * 9 + [0] * 3, [1] * 5 + [0] * 7, [1] * 12])
LEFT = RIGHT.flip(1)
NONE = torch.ones(3, 12, dtype=torch.long)
ONE = torch.tensor([[0] * 11 + [1], [1] + [0] * 11, [0] * 5 + [1] + [0] * 6])
PADDINGS = {"right": RIGHT, "left": LEFT, "none": NONE, "one_token": ONE}


def inputs(mask_BS: Tensor) -> dict[str, Tensor]:
    """Random ids and the position_ids that OpenRLHF derives from the mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, COMMON["vocab_size"], mask_BS.shape, generator=generator) * mask_BS
    positions = (mask_BS.cumsum(-1) - 1).masked_fill(mask_BS == 0, 1)
    return {"input_ids": ids, "position_ids": positions}


class RewardModel(LlamaPreTrainedModel):
    """Shaped like the class OpenRLHF derives: the base model under ``self.model`` and a scalar ``score`` head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        return self.score(hidden).squeeze(-1).gather(1, score_positions(attention_mask)[:, None]).squeeze(1)


def tiny_reward_model() -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(LlamaConfig(**COMMON)).eval()
