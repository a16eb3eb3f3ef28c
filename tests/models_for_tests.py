"""Small models and prompt pairs that several test files share."""

import copy

import torch as t
import torch.nn as nn
from conftest import tiny_hf

from pairs import Pairs, find_places
from llama_block import Llama

L, H = 3, 4  # layers and heads of every model here


def three_pairs() -> Pairs:
    """Three pairs of two lengths; clean and corrupt differ from position 2 or 3 on."""
    rng = t.Generator().manual_seed(0)
    clean = t.randint(1, 250, (3, 8), generator=rng)
    corrupt = clean.clone()
    corrupt[:, 3] = t.randint(1, 250, (3,), generator=rng)
    corrupt[1, 2] = 7
    clean[2, 6:] = 0
    corrupt[2, 6:] = 0
    made = Pairs(
        clean=clean,
        corrupt=corrupt,
        answer=t.tensor([5, 9, 3]),
        wrong=t.tensor([7, 100, 8]),
        answer_pos=t.tensor([7, 7, 5]),
    )
    made.places = find_places(made)
    return made


def hf_and_bridge(architecture: str) -> tuple[nn.Module, nn.Module]:
    """(a tiny GPT2 or Llama of transformers, as packages that know nothing of bridges take it; the same as a bridge)"""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    configs = {
        "GPT2": {"vocab_size": 260, "n_embd": 32, "n_layer": L, "n_head": H, "n_positions": 64},
        "Llama": {
            "vocab_size": 260,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": L,
            "num_attention_heads": H,
        },
    }
    hf = tiny_hf(architecture, **configs[architecture]).requires_grad_(False)
    wrapped = copy.deepcopy(hf)  # a bridge changes what it wraps
    name = type(hf).__name__
    wrapped.config.architectures = [name]
    bridge = build_bridge_from_module(wrapped, name, hf_config=wrapped.config)
    return hf, bridge.eval().requires_grad_(False)


def tiny_models() -> dict[str, nn.Module]:
    """
    Tiny Hugging Face models with large weights as bridges; 'ours' is the Llama, with grouped queries, in our class.
    Gemma 2 has norms before and after attention and MLP, OLMo 2 after alone, and GPT-J one for both.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GPTJConfig,
        GPTJForCausalLM,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaForCausalLM,
        Olmo2Config,
        Olmo2ForCausalLM,
    )
    from transformers import LlamaConfig as HFLlamaConfig

    t.manual_seed(0)
    shape = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": L,
        "num_attention_heads": H,
    }
    hf = {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=L, n_head=H, n_positions=64)),
        "llama": LlamaForCausalLM(HFLlamaConfig(**shape, num_key_value_heads=2)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**shape, num_key_value_heads=2, head_dim=8)),
        "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(**shape)),
        "olmo2": Olmo2ForCausalLM(Olmo2Config(**shape, num_key_value_heads=2)),
        "gptj": GPTJForCausalLM(
            GPTJConfig(vocab_size=260, n_embd=32, n_layer=L, n_head=H, n_positions=64, rotary_dim=4)
        ),
    }
    models = {}
    for name, model in hf.items():
        for p in model.parameters():
            p.data.add_(0.15 * t.randn(p.shape))
        architecture = type(model).__name__
        model.config.architectures = [architecture]
        if name == "llama":
            models["ours"] = Llama.from_hf(model).requires_grad_(False)
        bridge = build_bridge_from_module(model, architecture, hf_config=model.config)
        models[name] = bridge.eval().requires_grad_(False)
    return models
