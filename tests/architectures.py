"""Tiny folders of the architectures that people bring: large random weights, the world's tokenizer."""

import shutil
from pathlib import Path

import torch as t
import torch.nn as nn
import transformers
from conftest import ROOT

WIDTH = {"vocab_size": 3072, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE = WIDTH | {"intermediate_size": 64, "max_position_embeddings": 128}
GROUPED = SHAPE | {"num_key_value_heads": 2}
GPT2_SHAPE = {"vocab_size": 3072, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT_SHAPE = WIDTH | {"ffn_dim": 64, "max_position_embeddings": 128}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# name: (class in transformers, its config's settings)
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "GPT-2": ("GPT2LMHeadModel", GPT2_SHAPE),
    "GPT-J": ("GPTJForCausalLM", GPT2_SHAPE | {"rotary_dim": 4}),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": 3072,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 128,
        },
    ),
    "GPT-NeoX, parallel": ("GPTNeoXForCausalLM", SHAPE),
    "GPT-NeoX, serial": ("GPTNeoXForCausalLM", SHAPE | {"use_parallel_residual": False}),
    "OPT": ("OPTForCausalLM", OPT_SHAPE | {"word_embed_proj_dim": 32}),
    "OPT-350m": (
        "OPTForCausalLM",
        OPT_SHAPE | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "Bloom": ("BloomForCausalLM", {"vocab_size": 3072, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "BigCode": ("GPTBigCodeForCausalLM", GPT2_SHAPE),
    "StarCoder2": ("Starcoder2ForCausalLM", GROUPED),
    "Falcon": ("FalconForCausalLM", WIDTH),
    "Phi": ("PhiForCausalLM", SHAPE),
    "Phi-3": ("Phi3ForCausalLM", SHAPE | {"pad_token_id": 0}),
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 8}),
    "Gemma": ("GemmaForCausalLM", GROUPED | {"head_dim": 8}),
    "Gemma-2": ("Gemma2ForCausalLM", GROUPED | {"head_dim": 8}),
    "Gemma-3": ("Gemma3ForCausalLM", GROUPED | {"head_dim": 8}),
    "OLMo": ("OlmoForCausalLM", SHAPE),
    "OLMo-2": ("Olmo2ForCausalLM", GROUPED),
    "Granite": (
        "GraniteForCausalLM",
        GROUPED
        | {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.2},
    ),
    "Cohere": ("CohereForCausalLM", GROUPED),
    "SmolLM3": ("SmolLM3ForCausalLM", GROUPED),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", SHAPE | DEEPSEEK),
    "Mixtral": ("MixtralForCausalLM", GROUPED | EXPERTS),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", GROUPED | QWEN_MOE | {"shared_expert_intermediate_size": 32}),
    "GPT-OSS": ("GptOssForCausalLM", GROUPED | EXPERTS | {"head_dim": 8}),
    "Mamba": ("MambaForCausalLM", {"vocab_size": 3072, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 3072, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "BERT": ("BertForMaskedLM", SHAPE),
}


def config_class(architecture: str) -> type:
    if architecture == "Gemma3ForCausalLM":
        return transformers.Gemma3TextConfig
    return getattr(transformers, architecture).config_class


def make_architecture(name: str, folder: Path) -> nn.Module:
    """The transformers model, which lies in the folder then."""
    architecture, settings = ARCHITECTURES[name]
    t.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = getattr(transformers, architecture)(config_class(architecture)(**ids | settings)).eval()
    with t.no_grad():
        for p in model.parameters():
            p.add_(0.15 * t.randn(p.shape))
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "models/world" / file, folder / file)
    return model
