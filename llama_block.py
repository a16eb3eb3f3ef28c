"""
The modern decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Llama, Mistral, Qwen2, Qwen3, OLMo 2 and
Gemma 2 without its soft caps by switches, equal to Hugging Face's.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

# The model, the first half of this file, uses utils, hooks, layers and weights alone; the experiment uses the rest.
from utils import (  # first: sets OpenMP's variables before torch is loaded
    Count,
    Natural,
    NotNegative,
    Positive,
    Share,
    cyan,
    endc,
    fail,
    gray,
    green,
    pick_device,
    purple,
    read_config,
    save_results,
    set_seed,
    with_defaults,
)
from hooks import HookPoint, listening_gap, run_with_cache
from hooked import Hooked
from layers import HeadWeights, attend
from weights import open_with_all_hooks, read_tensors, read_when_called, take_tensors

from heads import attention_in, attention_patterns
from data import bos_id, load_corpus, load_tokenizer, refuse_empty, str_tokens, text_of, to_tokens, write_folder
from launch import flags
from parts import (
    conclude_prompt,
    is_whole,
    legend_numbers,
    print_legend,
    print_prompt,
    prompt_numbers,
    read_legend,
    show_head_norms,
    show_prompt,
    tell_prompt,
    why_not_whole,
)
from plots import imshow, line, show, show_attention, visible
from train import TrainConfig, context_at, first_goes_on, train
from world import evaluate_world, load_world, write_metrics

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from tabulate import tabulate
from tokenizers import Tokenizer
from torch import Tensor

TABLE_LENGTH = 4096  # positions whose rotary tables are kept from the start; more are made when they are asked for


#%% The shape of a model
@dataclass
class LlamaConfig:
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2  # each serves n_heads / n_kv_heads query heads
    d_model: int = 128
    d_head: int = 32
    d_mlp: int = 384
    d_vocab: int = 1024
    n_ctx: int = 256
    rope_base: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1: low frequencies are slowed for longer contexts
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    o_bias: bool = False  # Llama with attention_bias
    # of attention and MLP: before them (Llama), after (OLMo 2, which writes what its norms let through), or both (Gemma 2)
    norms: str = "before"
    qk_norm: str = "none"  # none, head (Qwen3: RMSNorm of each head's q and k) or full (OLMoE: over all heads at once)
    windows: tuple[int | None, ...] = ()  # by layer, the number of keys a query sees (Mistral); empty is all of them
    tied: bool = False  # the unembedding is the embedding
    architecture: str = "LlamaForCausalLM"

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            fail(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.d_head % 2:
            fail(f"d_head {self.d_head} is odd: rotary positions turn pairs of dimensions")
        if self.norms not in NORM_PARTS:
            fail(f"norms {self.norms!r}: use one of {', '.join(NORM_PARTS)}")
        if self.windows and len(self.windows) != self.n_layers:
            fail(f"windows has {len(self.windows)} entries for {self.n_layers} layers")


#%% RMSNorm: divide by the root mean square, multiply by a weight
class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(t.ones(size))
        self.eps = eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        nobody_listens = not self.hook_scale.fwd_hooks and not self.hook_normalized.fwd_hooks
        if x.dtype == t.float32 and nobody_listens:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # the same, faster
        scale = (x.float().pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        scale = self.hook_scale(scale)
        normalized = self.hook_normalized((x.float() / scale).to(x.dtype))
        return self.weight * normalized


#%% Rotary positions: q and k turn with their position, so that scores depend on the offset alone
def rope_frequencies(cfg: LlamaConfig) -> Tensor:
    """
    (d_head / 2) radians per position. Llama 3.1: wavelengths beyond the old context are slowed by `factor`, with a ramp
    between.
    """
    frequency = cfg.rope_base ** (-t.arange(0, cfg.d_head, 2, dtype=t.float32) / cfg.d_head)
    scaling = cfg.rope_scaling
    if not scaling:
        return frequency
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the old context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / scaling["factor"])


def rope_tables(cfg: LlamaConfig, n_ctx: int) -> tuple[Tensor, Tensor]:
    """
    cos and sin (pos, 1, d_head), each frequency twice: dimension i turns with i + d_head / 2 (Hugging Face's order;
    Meta's turns i with i + 1).
    """
    angle = t.arange(n_ctx, dtype=t.float32)[:, None] * rope_frequencies(cfg)  # (pos, d_head / 2)
    angle = t.cat([angle, angle], -1)[:, None]  # (pos, 1, d_head)
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, pos, head, d_head), turned."""
    a, b = x.chunk(2, -1)
    return x * cos + t.cat([-b, a], -1) * sin


#%% Attention with grouped queries: several query heads read one key and value head
class GroupedQueryAttention(nn.Module, HeadWeights):
    """W_Q (head, d_model, d_head); W_K, W_V (kv head, d_model, d_head); W_O (head, d_head, d_model)."""

    def __init__(self, cfg: LlamaConfig, layer: int):
        super().__init__()
        self.cfg = cfg
        self.window = cfg.windows[layer] if cfg.windows else None
        wide = cfg.n_heads * cfg.d_head
        narrow = cfg.n_kv_heads * cfg.d_head
        self.q = nn.Linear(cfg.d_model, wide, bias=cfg.qkv_bias)
        self.o = nn.Linear(wide, cfg.d_model, bias=cfg.o_bias)
        self.k = nn.Linear(cfg.d_model, narrow, bias=cfg.qkv_bias)
        self.v = nn.Linear(cfg.d_model, narrow, bias=cfg.qkv_bias)
        if cfg.qk_norm == "head":
            self.q_norm = RMSNorm(cfg.d_head, cfg.norm_eps)
            self.k_norm = RMSNorm(cfg.d_head, cfg.norm_eps)
        if cfg.qk_norm == "full":
            self.q_norm = RMSNorm(wide, cfg.norm_eps)
            self.k_norm = RMSNorm(narrow, cfg.norm_eps)
        for name in ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result"):
            setattr(self, f"hook_{name}", HookPoint())

    def by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.cfg.d_head))  # (batch, pos, head, d_head)

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What Qwen3 (each head by itself) and OLMoE (all heads at once) do with q and k before they turn."""
        if self.cfg.qk_norm == "full":
            q = self.by_head(self.q_norm(q.flatten(2)))
            k = self.by_head(self.k_norm(k.flatten(2)))
        if self.cfg.qk_norm == "head":  # the norm's hooks see (batch, head, pos, d_head), as in TransformerLens
            q = self.q_norm(q.transpose(1, 2)).transpose(1, 2)
            k = self.k_norm(k.transpose(1, 2)).transpose(1, 2)
        return q, k

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.hook_q(self.by_head(self.q(x)))  # (batch, pos, head, d_head)
        k = self.hook_k(self.by_head(self.k(x)))  # (batch, pos, kv head, d_head)
        v = self.hook_v(self.by_head(self.v(x)))  # (batch, pos, kv head, d_head)
        q, k = self.normed(q, k)
        q = self.hook_rot_q(rope(q, cos, sin))
        k = self.hook_rot_k(rope(k, cos, sin))
        z = self.hook_z(attend(q, k, v, self.hook_attn_scores, self.hook_pattern, window=self.window))
        return self.write(z)  # (batch, pos, d_model)


#%% SwiGLU: a gate decides how much of each neuron passes
class SwiGLU(nn.Module):
    """
    W_in, W_gate (d_model, d_mlp), W_out (d_mlp, d_model). hook_pre is the gate before silu, hook_pre_linear what it
    multiplies, hook_post their product.
    """

    def __init__(self, d_model: int, d_mlp: int):
        super().__init__()
        self.gate = nn.Linear(d_model, d_mlp, bias=False)
        self.inp = nn.Linear(d_model, d_mlp, bias=False)
        self.out = nn.Linear(d_mlp, d_model, bias=False)
        self.hook_pre = HookPoint()
        self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()

    @property
    def W_in(self) -> Tensor:
        return self.inp.weight.T

    @property
    def W_gate(self) -> Tensor:
        return self.gate.weight.T

    @property
    def W_out(self) -> Tensor:
        return self.out.weight.T

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.hook_pre(self.gate(x)))  # (batch, pos, d_mlp)
        neurons = self.hook_post(gate * self.hook_pre_linear(self.inp(x)))
        return self.out(neurons)


#%% The block, and the model
class LlamaBlock(nn.Module):
    def __init__(self, cfg: LlamaConfig, layer: int, mlp: nn.Module):
        super().__init__()
        self.norms = cfg.norms
        self.ln1 = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.ln2 = RMSNorm(cfg.d_model, cfg.norm_eps)
        if cfg.norms == "both":
            self.ln1_post = RMSNorm(cfg.d_model, cfg.norm_eps)
            self.ln2_post = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = GroupedQueryAttention(cfg, layer)
        self.mlp = mlp
        for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"):
            setattr(self, f"hook_{name}", HookPoint())

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(x + self.hook_attn_out(self.attention_write(x, cos, sin)))
        return self.hook_resid_post(x + self.hook_mlp_out(self.mlp_write(x)))

    def attention_write(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.norms == "after":
            return self.ln1(self.attn(x, cos, sin))
        written = self.attn(self.ln1(x), cos, sin)
        return self.ln1_post(written) if self.norms == "both" else written

    def mlp_write(self, x: Tensor) -> Tensor:
        if self.norms == "after":
            return self.ln2(self.mlp(x))
        written = self.mlp(self.ln2(x))
        return self.ln2_post(written) if self.norms == "both" else written


class Llama(nn.Module, Hooked):
    architectures = (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Olmo2ForCausalLM",
        "Gemma2ForCausalLM",
    )

    def __init__(self, cfg: LlamaConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(LlamaBlock(cfg, layer, self.make_mlp(layer)) for layer in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        self.init_weights()
        if cfg.tied:
            self.unembed.weight = self.embed.weight
        cos, sin = rope_tables(cfg, min(cfg.n_ctx, TABLE_LENGTH))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def init_weights(self, embed_std: float = 0.02, unembed_std: float = 0.02) -> None:
        """Small query and key weights, as in attn_only: attention starts near uniform, and heads form soonest."""
        nn.init.normal_(self.embed.weight, std=embed_std)
        nn.init.normal_(self.unembed.weight, std=unembed_std)
        for name, linear in self.blocks.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            gain = 0.3 if name.endswith((".q", ".k")) else 1.0
            nn.init.normal_(linear.weight, std=gain / math.sqrt(linear.in_features))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def make_mlp(self, layer: int) -> nn.Module:
        return SwiGLU(self.cfg.d_model, self.cfg.d_mlp)

    @property
    def W_E(self) -> Tensor:
        return self.embed.weight

    @property
    def W_U(self) -> Tensor:
        return self.unembed.weight.T

    def forward(
        self,
        tokens: Tensor,
        start_at_layer: int = 0,
        resid: Tensor | None = None,
        stop_at_layer: int | None = None,
    ) -> Tensor:
        """
        Logits (batch, pos, d_vocab). Given resid (batch, pos, d_model), the residual stream enters at start_at_layer
        and the blocks below are skipped; with stop_at_layer the residual stream before that layer is returned.
        """
        x = self.hook_embed(self.embed(tokens)) if resid is None else resid
        n_pos = x.shape[1]
        if n_pos > len(self.cos):
            cos, sin = rope_tables(self.cfg, n_pos)
            self.cos = cos.to(x.device)
            self.sin = sin.to(x.device)
        cos = self.cos[:n_pos].to(x.dtype)
        sin = self.sin[:n_pos].to(x.dtype)
        for block in self.blocks[start_at_layer:stop_at_layer]:
            x = block(x, cos, sin)
        if stop_at_layer is not None:
            return x
        return self.unembed(self.ln_final(x))

    @t.no_grad()
    def generate(self, tokens: Tensor, n: int) -> Tensor:
        """tokens (batch, pos) with n more, chosen greedily."""
        for _ in range(n):
            tokens = t.cat([tokens, self(tokens)[:, -1:].argmax(-1)], 1)
        return tokens

    @classmethod
    def from_hf(cls, hf_model: nn.Module, tokenizer: Tokenizer | None = None) -> "Llama":
        """The same model out of a transformers model in memory; every tensor must find its place."""
        config = hf_model.config.to_dict() | {"architectures": [type(hf_model).__name__]}
        model = cls(cls.read_config(config), tokenizer)
        return take_tensors(model, ((name, x.clone()) for name, x in hf_model.state_dict().items())).eval()

    @classmethod
    def from_folder(
        cls, folder: str, device: str = "cpu", dtype: t.dtype = t.float32, resident: float = 1.0
    ) -> "Llama":
        """
        A Hugging Face folder: config.json, safetensors (sharded or not), tokenizer.json. Read tensor by tensor onto the
        device; with resident below 1, only this share of the blocks (read_when_called).
        """
        with t.device("meta"):
            model = cls(cls.read_config(read_config(folder)), load_tokenizer(folder))
        if resident < 1:
            read_when_called(model, folder, device, dtype, resident)
        else:
            take_tensors(model, ((name, x.to(device, dtype)) for name, x in read_tensors(folder)))
        cos, sin = rope_tables(model.cfg, min(model.cfg.n_ctx, TABLE_LENGTH))
        model.cos = cos.to(device)
        model.sin = sin.to(device)
        return model.eval()

    def to_hf(self, folder: Path, dtype: t.dtype | None = None) -> None:
        """Write an ordinary Hugging Face folder."""
        tensors = {name: x.to(dtype or x.dtype) for name, x in self.hf_tensors().items()}
        write_folder(folder, tensors, self.write_config(), self.tokenizer)

    @classmethod
    def read_config(cls, hf: dict) -> LlamaConfig:
        return LlamaConfig(**read_llama_config(hf, cls.architectures))

    def write_config(self) -> dict:
        return write_llama_config(self.cfg)

    def hf_tensors(self) -> dict[str, Tensor]:
        tensors = self.state_dict()
        if self.cfg.tied:
            del tensors["unembed.weight"]
        if self.cfg.architecture.startswith("Gemma2"):
            tensors = {name: unfold_gemma(name, x) for name, x in tensors.items()}
        return {hf_name(name, self.cfg.norms): x for name, x in tensors.items()}

    def place(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """Where a tensor of Hugging Face's files goes: {our name: tensor}."""
        ours = our_name(name, self.cfg.norms)
        if self.cfg.architecture.startswith("Gemma2"):
            x = fold_gemma(ours, x)
        return {ours: x}


#%% Hugging Face's words: the names of the tensors (each part of a name has one of ours), and config.json
PARTS = {
    "embed_tokens": "embed",
    "layers": "blocks",
    "norm": "ln_final",
    "lm_head": "unembed",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
    "self_attn": "attn",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "inp",
    "down_proj": "out",
}
NORM_PARTS = {  # names of norms mean other places where some stand after
    "before": {},
    "after": {"post_attention_layernorm": "ln1", "post_feedforward_layernorm": "ln2"},
    "both": {
        "post_attention_layernorm": "ln1_post",
        "pre_feedforward_layernorm": "ln2",
        "post_feedforward_layernorm": "ln2_post",
    },
}
NORMS = {"Olmo2ForCausalLM": "after", "Gemma2ForCausalLM": "both"}
QK_NORMS = {
    "Qwen3ForCausalLM": "head",
    "Qwen3MoeForCausalLM": "head",
    "OlmoeForCausalLM": "full",
    "Olmo2ForCausalLM": "full",
}


def our_name(theirs: str, norms: str = "before") -> str:
    """model.layers.0.self_attn.q_proj.weight -> blocks.0.attn.q.weight"""
    names = PARTS | NORM_PARTS[norms]
    parts = theirs.removeprefix("model.").split(".")
    return ".".join(names.get(part, part) for part in parts)


def hf_name(ours: str, norms: str = "before") -> str:
    """blocks.0.attn.q.weight -> model.layers.0.self_attn.q_proj.weight"""
    names = {part: theirs for theirs, part in (PARTS | NORM_PARTS[norms]).items()}
    theirs = ".".join(names.get(part, part) for part in ours.split("."))
    return theirs if ours.startswith("unembed") else f"model.{theirs}"


def fold_gemma(ours: str, x: Tensor) -> Tensor:
    """Gemma multiplies by 1 + a norm's weight, and its embedding by sqrt(d_model): here the tensors hold the product."""
    if ours == "embed.weight":
        return x * math.sqrt(x.shape[1])
    return 1 + x if ".ln" in f".{ours}" else x


def unfold_gemma(ours: str, x: Tensor) -> Tensor:
    """The way back."""
    if ours == "embed.weight":
        return x / math.sqrt(x.shape[1])
    return x - 1 if ".ln" in f".{ours}" else x


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
OWN_DEFAULTS = {  # fields whose default is another in each architecture: a window of 4096, heads of 128
    "MistralForCausalLM": ("sliding_window",),
    "MixtralForCausalLM": ("sliding_window",),
    "Qwen3ForCausalLM": ("head_dim",),
    "Qwen3MoeForCausalLM": ("head_dim",),
    "Gemma2ForCausalLM": (
        "head_dim",
        "query_pre_attn_scalar",
        "hidden_activation",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "tie_word_embeddings",
        "sliding_window",
        "layer_types",
    ),
}


def read_rope(hf: dict) -> dict:
    """rope_theta and what scales it, in the words of transformers 5; older files say the same by two fields."""
    if hf.get("rope_parameters"):
        return hf["rope_parameters"]
    return {**(hf.get("rope_scaling") or {}), "rope_theta": hf.get("rope_theta", 10000.0)}


def rope_kind(rope: dict) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def refuse_unbuilt(hf: dict, architectures: tuple[str, ...]) -> None:
    """Whatever is not built here ends the program rather than being left out."""
    name = (hf.get("architectures") or ["unknown"])[0]
    rope = read_rope(hf)
    kind = rope_kind(rope)
    activation = hf.get("hidden_act", "silu")
    if name not in architectures:
        built = ", ".join(architectures)
        fail(f"architecture {name} is not built here (built: {built}); load_model opens it as a TransformerBridge")
    if kind not in ("default", "llama3"):
        fail(f"rope type {kind!r} of {name} is not built here (built: default, llama3)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        fail(f"partial rotary positions of {name} are not built here")
    if name.startswith("Gemma2"):
        activation = hf.get("hidden_activation", "gelu_pytorch_tanh")
        refuse_unbuilt_gemma(hf)
    if activation != "silu":
        fail(f"activation {activation!r} of {name} is not built here (built: silu)")
    if hf.get("mlp_bias"):
        fail(f"mlp_bias of {name} is not built here")


def refuse_unbuilt_gemma(hf: dict) -> None:
    """What is built is the shape of Gemma 2's block: norms on both sides, without the soft caps."""
    if hf.get("attn_logit_softcapping", 50.0) or hf.get("final_logit_softcapping", 30.0):
        fail("soft caps of Gemma2ForCausalLM are not built here")
    if hf.get("query_pre_attn_scalar", 256) != hf.get("head_dim", 256):
        fail("query_pre_attn_scalar of Gemma2ForCausalLM is built here where it is head_dim alone")
    if hf.get("tie_word_embeddings", True):
        fail("the tied embeddings of Gemma2ForCausalLM are not built here")


def read_windows(hf: dict, name: str) -> tuple[int | None, ...]:
    """By layer, how many keys a query sees, None where it sees all; empty where all layers see all."""
    n_layers = hf["num_hidden_layers"]
    window = hf.get("sliding_window")
    if name.startswith(("Mistral", "Mixtral")):  # one window for all layers
        return (window,) * n_layers if window else ()
    if not name.startswith(("Qwen", "Gemma2")):  # a field that transformers does not read there
        return ()
    # Qwen states a window that only some layers use, and only when told to
    slides_from = hf.get("max_window_layers", n_layers) if hf.get("use_sliding_window") else n_layers
    kinds = hf.get("layer_types")
    if not kinds:
        kinds = ["sliding_attention" if layer >= slides_from else "full_attention" for layer in range(n_layers)]
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def read_llama_config(hf: dict, architectures: tuple[str, ...]) -> dict:
    """Fields of LlamaConfig from a config.json."""
    refuse_unbuilt(hf, architectures)
    name = hf["architectures"][0]
    hf = with_defaults(hf, (*SIZES, *OWN_DEFAULTS.get(name, ())))
    rope = read_rope(hf)
    n_heads = hf["num_attention_heads"]
    attention_bias = hf.get("attention_bias", False)
    if name.startswith("Qwen2"):
        qkv_bias, o_bias = hf.get("qkv_bias", True), False
    else:
        qkv_bias, o_bias = attention_bias, attention_bias
    return {
        "n_layers": hf["num_hidden_layers"],
        "n_heads": n_heads,
        "n_kv_heads": hf.get("num_key_value_heads") or n_heads,
        "d_model": hf["hidden_size"],
        "d_head": hf.get("head_dim") or hf["hidden_size"] // n_heads,
        "d_mlp": hf["intermediate_size"],
        "d_vocab": hf["vocab_size"],
        "n_ctx": hf["max_position_embeddings"],
        "rope_base": rope["rope_theta"],
        "rope_scaling": rope if rope_kind(rope) == "llama3" else None,
        "norm_eps": hf["rms_norm_eps"],
        "tied": hf.get("tie_word_embeddings", False),
        "qkv_bias": qkv_bias,
        "o_bias": o_bias,
        "norms": NORMS.get(name, "before"),
        "qk_norm": QK_NORMS.get(name, "none"),
        "windows": read_windows(hf, name),
        "architecture": name,
    }


def write_llama_config(cfg: LlamaConfig) -> dict:
    """config.json for transformers."""
    window = next((w for w in cfg.windows if w), None)
    hf = {
        "architectures": [cfg.architecture],
        "model_type": cfg.architecture.removesuffix("ForCausalLM").lower(),
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.d_head,
        "vocab_size": cfg.d_vocab,
        "max_position_embeddings": cfg.n_ctx,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "hidden_act": "silu",
        "rope_theta": cfg.rope_base,
        "rope_parameters": cfg.rope_scaling or {"rope_type": "default", "rope_theta": cfg.rope_base},
        "sliding_window": window,
    }
    if cfg.architecture.startswith("Gemma2"):
        del hf["hidden_act"]
        hf |= {"hidden_activation": "silu", "query_pre_attn_scalar": cfg.d_head}
        hf |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        hf["sliding_window"] = window or cfg.n_ctx  # it must be a number, also where no layer uses it
    if cfg.architecture.startswith(("Qwen", "Gemma2")):
        windows = cfg.windows or [None] * cfg.n_layers
        hf["use_sliding_window"] = window is not None
        hf["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    if not cfg.architecture.startswith("Qwen2"):
        hf["attention_bias"] = cfg.qkv_bias
    return hf


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config(TrainConfig):
    n_layers: Count = 4  # blocks
    n_heads: Count = 4  # attention heads of a block
    n_kv_heads: Count = 4  # heads of keys and values, which n_heads share
    d_model: Count = 128  # width of the residual stream
    d_mlp: Count = 384  # neurons of an MLP
    vocab: Count = 3072  # size of the byte-level BPE trained on the text
    rope_base: Positive = 10000.0  # of the rotary positions: the longest wave is about 2 pi times this, in tokens
    # Llama's norms stand before attention and MLP, OLMo 2's after, Gemma 2's on both sides: the folder is then theirs
    norms: Literal["before", "after", "both"] = "before"
    bias: bool = (
        True  # on q, k, v and o: Llama's attention_bias (transformers reads a Qwen2 folder's tokenizer as Qwen's)
    )
    steps: Natural = 450
    lr: NotNegative = 1e-2
    muon_lr: NotNegative = 0.014
    decay: Share = 0.4  # share of the steps (wsd)
    contexts: tuple[Count, ...] = (64,)
    data: str = "world"  # world (a corpus that is known exactly), stdlib, a text file or folder, or a hub dataset
    out: str = (
        "checkpoints/llama_block/model"  # where the model goes, in half precision, with what it knows of the world
    )
    others: tuple[str, ...] = ()  # folders written by this command with other seeds: metrics.json then holds the spread
    model: str | None = None  # look into this model instead of training: a hub name or a folder
    offload: Literal["auto", "on", "off"] = "auto"  # its weights come from disk: where they do not fit, always, never
    bos: bool | None = None  # put a beginning-of-text token first; default as that model's own tokenizer says
    prompt: str = "The capital of Japan is"  # a text to look at


ARCHITECTURES = {"before": "LlamaForCausalLM", "after": "Olmo2ForCausalLM", "both": "Gemma2ForCausalLM"}

# --hpc: an A100 with 40 GB
HPC = Config(
    n_layers=12,
    n_heads=12,
    n_kv_heads=4,
    d_model=768,
    d_mlp=2048,
    vocab=32768,
    data="HuggingFaceFW/fineweb-edu",
    contexts=(1024,),
    tokens_per_step=262144,
    accumulate=16,
    steps=10000,
    lr=3e-3,
    muon_lr=0.02,
    autocast="on",
    compile=True,
)

if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=HPC)
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    refuse_empty(cfg.prompt)
    for other in cfg.others:
        if not (Path(other) / "metrics.json").is_file():
            fail(f"--others {other}: no metrics.json there: first make that folder with this command and another seed")
    numbers: dict = {}
    history: dict = {}

#%% Someone's model, whatever its kind and size: which of its tensors is which part, then every one of them
if __name__ == "__main__" and cfg.model:
    legend = read_legend(cfg.model)
    print_legend(legend)
    show_head_norms(legend, "llama_block")
    numbers |= legend_numbers(legend)
    save_results("llama_block", cfg, **numbers)  # they stand, whether the model opens or not
    model = open_with_all_hooks(cfg.model, Llama, cfg.device, offload=cfg.offload, bos=cfg.bos)

#%% Without --model, one is trained before your eyes, saved for transformers and opened again
if __name__ == "__main__" and not cfg.model:
    print(f"{purple}=== Training {cfg.n_layers} layers on {cfg.data}, seed {cfg.seed}, {device} ==={endc}")
    corpus = load_world(cfg.vocab) if cfg.data == "world" else load_corpus(cfg.data, cfg.vocab)
    # OLMo 2 and Gemma 2 have no biases; after a norm they would write something else in every run, which no edge carries
    with_bias = cfg.bias and cfg.norms == "before"
    shape = LlamaConfig(
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_kv_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_model // cfg.n_heads,
        d_mlp=cfg.d_mlp,
        d_vocab=corpus.d_vocab,
        n_ctx=max(256, *cfg.contexts),
        rope_base=cfg.rope_base,
        qkv_bias=with_bias,
        o_bias=with_bias,
        norms=cfg.norms,
        qk_norm="full" if cfg.norms == "after" else "none",
        architecture=ARCHITECTURES[cfg.norms],
    )
    model = Llama(shape, corpus.tokenizer)
    model.init_weights(embed_std=0.2, unembed_std=0.5 / math.sqrt(cfg.d_model))

    def batch(i: int) -> Tensor:
        context = context_at(i // cfg.accumulate, cfg)
        n_rows = cfg.tokens_per_step // cfg.accumulate // context
        return corpus.batch(np.random.default_rng((cfg.seed, i)), n_rows, context)

    def watch(step: int) -> dict:
        return evaluate_world(model, corpus, quick=True, device=device)

    history = train(
        model,
        batch,
        cfg,
        "llama_block",
        watch=watch if cfg.data == "world" else None,
        watch_every=max(1, cfg.steps // 12),
        shape=dataclasses.asdict(model.cfg),
        data=corpus.key,
    )
    model.to_hf(Path(cfg.out), t.float16)
    first_goes_on()
    numbers |= {
        "train_loss": float(np.mean(history["loss"][-20:])),
        "train_seconds": history["seconds"],
        "tokens_per_second": history["tokens_per_second"],
    }
    print(
        f"{green}loss {numbers['train_loss']:.3f} nats after {history['tokens'][-1] / 1e6:.2f}M tokens, "
        f"{history['tokens_per_second']:,.0f} tokens/s; saved to {cfg.out} for transformers{endc}"
    )
    model = Llama.from_folder(cfg.out, device)  # what follows is measured on the file

#%% The prompt: its tokens, what comes next, and where the output of each part lies in the stream
if __name__ == "__main__":
    story = tell_prompt(model, cfg.prompt)
    print_prompt(story, model)
    numbers |= prompt_numbers(story)

#%% ... as bars, and as a map of every two parts
if __name__ == "__main__":
    show_prompt(story, "the model trained here" if not cfg.model else Path(cfg.model).name, "llama_block")

#%% Of a model that is not built here, or whose weights do not fit into memory, that is all
if __name__ == "__main__" and not is_whole(model, Llama):
    save_results("llama_block", cfg, **numbers)
    print(f"{gray}{why_not_whole(model, Llama)}: the cells below, on a Llama in memory, are left out{endc}")
    print(f"{green}{conclude_prompt(story)}{endc}")
    raise SystemExit

#%% What it learned of the world: facts, their reverse, indirect objects and the rest
if __name__ == "__main__":
    shape = model.cfg
    tokenizer = model.tokenizer
    n_millions = sum(p.numel() for p in model.parameters()) / 1e6
    learned_the_world = cfg.data == "world" and not cfg.model

if __name__ == "__main__" and learned_the_world:
    known = evaluate_world(model, corpus, device=device)
    numbers |= known
    words = ["uv run llama_block.py", *[flag for flag in sys.argv[1:] if flag != "--resume"]]
    spread = write_metrics(
        Path(cfg.out),
        known,
        cfg.others,
        seed=cfg.seed,
        steps=cfg.steps,
        seconds=numbers["train_seconds"],
        threads=t.get_num_threads(),
        corpus=corpus.key,
        python=sys.version.split()[0],
        torch=t.__version__,
        command=" ".join(words),
    )
    seeds = [f"seed {seed}" for seed in spread.pop("seed")]
    table = [[name.replace("_", " "), *values] for name, values in spread.items()]
    print(tabulate(table, headers=["on the reopened file", *seeds], floatfmt=".3f"))

#%% ... and when: they come one by one
TASKS = (
    "forward_recall",
    "reverse_recall",
    "reverse_recall_of_forward_only",
    "forward_recall_of_reverse_only",
    "continent_recall",
    "ioi_accuracy",
    "greater_than",
    "agreement_accuracy",
    "gender_accuracy",
    "prefix_matching",
)

if __name__ == "__main__" and learned_the_world:
    fig = line(
        {task.replace("_", " "): [seen[task] for seen in history["watch"]] for task in TASKS},
        "What the model knows by tokens seen, on a fixed subsample "
        f"(world, {n_millions:.1f}M parameters, seed {cfg.seed})",
        xlabel="tokens seen",
        ylabel="share right (greater than: p(later) - p(not later))",
        x=[seen["tokens"] for seen in history["watch"]],
        markers=True,
    )
    show(
        fig,
        "llama_block/phases",
        "What is learned first: each line is a kind of question, asked of the model as it trains. Facts and pairs "
        "of names that were held out are asked too.",
    )

#%% Gates: listening changes nothing, positions enter by their differences only
if __name__ == "__main__":
    prompt = to_tokens(tokenizer, cfg.prompt).to(device)
    if cfg.model:
        rows = prompt
    else:
        rows = t.from_numpy(corpus.rows(np.random.default_rng(1), 32, max(cfg.contexts), "heldout")).to(device)
    with t.no_grad():
        logits, cache = run_with_cache(model, rows)
    gap = listening_gap(model, rows)
    limit = 1e-5 if logits.dtype == t.float32 else 2e-2
    assert gap < limit, f"listening changes the logits by {gap}"

    # the mean query and key of each head of layer 0, turned to every position: equal offsets give equal scores
    cos, sin = (table.to(device) for table in rope_tables(shape, 64))
    with t.no_grad():
        normed_q, normed_k = model.blocks[0].attn.normed(cache["q", 0], cache["k", 0])  # Qwen3, OLMo 2
    mean_q = normed_q.float().mean((0, 1))  # (head, d_head)
    mean_k = normed_k.float().mean((0, 1))  # (kv head, d_head)
    turned_q = rope(mean_q.expand(1, 64, -1, -1), cos, sin)[0]  # (pos, head, d_head)
    turned_k = rope(mean_k.expand(1, 64, -1, -1), cos, sin)[0]
    turned_k = turned_k.repeat_interleave(shape.n_heads // shape.n_kv_heads, 1)  # (pos, head, d_head)
    scores = einsum(turned_q, turned_k, "query head d_head, key head d_head -> head query key")
    drifts = [(scores.diagonal(-offset, 1, 2) - scores[:, offset, :1]).abs().max().item() for offset in range(40)]
    drift = max(drifts) / scores.abs().max().item()
    assert drift < 1e-4, f"scores at one offset differ by {drift}"

    numbers |= {"listening_gap": gap, "rope_offset_drift": drift}
    print(
        f"{cyan}gates: listening moves logits by {gap:.0e}, scores at one offset agree to {drift:.0e} "
        f"(both relative){endc}"
    )

#%% Rotary positions: how a score falls with the offset, for aligned q and k
if __name__ == "__main__":
    aligned = (t.arange(256)[:, None] * rope_frequencies(shape)).cos().mean(1)
    fig = line(
        {"q = k = ones": aligned},
        f"RoPE with base {shape.rope_base:g}: score of aligned q and k against their offset (d_head {shape.d_head})",
        xlabel="offset",
        ylabel="score / score at 0",
    )
    show(
        fig,
        "llama_block/rope",
        "How well a key that lies exactly along the query is seen at a distance: the fast waves are the first "
        "dimensions, the slow ones the last.",
    )

#%% ... and for the mean q and k of each head of layer 0
if __name__ == "__main__":
    fig = line(
        {f"L0H{head}": scores[head, :, 0] / math.sqrt(shape.d_head) for head in range(shape.n_heads)},
        f"Mean query against mean key of each head of layer 0, turned by RoPE ({rows.shape[0]} rows)",
        xlabel="offset",
        ylabel="attention score",
    )
    show(
        fig,
        "llama_block/rope_heads",
        "Where each head looks by position alone, before any content: the higher, the more it prefers keys that "
        "far back.",
    )


#%% How far each head looks: the mean distance of its attention, and the share it keeps on the first token
def head_name(index: int, n_heads: int) -> str:
    """5 -> L1H1, of four heads a layer"""
    return f"L{index // n_heads}H{index % n_heads}"


if __name__ == "__main__":
    n_pos = rows.shape[1]
    away = (t.arange(n_pos)[:, None] - t.arange(n_pos)).clamp(min=0).to(device)  # (query, key)
    distances = []
    on_first_token = []
    for layer in range(shape.n_layers):
        pattern = cache["pattern", layer].float()[:, :, n_pos // 2 :]  # queries of the second half
        distances.append((pattern * away[n_pos // 2 :]).sum(-1).mean((0, 2)))
        on_first_token.append(pattern[..., 0].mean((0, 2)))
    distance = t.stack(distances)  # (layer, head)
    sink = t.stack(on_first_token)  # (layer, head)
    numbers |= {"attention_distance": distance.tolist(), "attention_on_first_token": sink.tolist()}

#%% ... as maps of layers and heads
if __name__ == "__main__":
    heads = [f"H{head}" for head in range(shape.n_heads)]
    layers = [f"L{layer}" for layer in range(shape.n_layers)]
    fig = imshow(
        distance,
        f"Mean attention distance of each head (n = {len(rows)} rows of {n_pos} tokens, queries of the second half)",
        xlabel="head",
        ylabel="layer",
        x=heads,
        y=layers,
        diverging=False,
        value="tokens",
    )
    show(
        fig,
        "llama_block/distance",
        "Pale heads look near, dark ones far back.",
    )
    fig = imshow(
        sink,
        f"Attention on the first token (n = {len(rows)} rows)",
        xlabel="head",
        ylabel="layer",
        x=heads,
        y=layers,
        diverging=False,
        value="attention",
    )
    show(
        fig,
        "llama_block/sink",
        f"A head that looks here often rests on the first token when it has nothing to look at: the most is "
        f"{sink.max():.0%} of a head's attention.",
    )

#%% Attention of every head on the prompt: maps, and a page to hover
if __name__ == "__main__":
    patterns = attention_patterns(model, prompt)
    head_names = [head_name(i, shape.n_heads) for i in range(len(patterns))]
    about = f"{'the model trained here' if not cfg.model else Path(cfg.model).name} on the prompt"
    show_attention(
        patterns,
        str_tokens(tokenizer, prompt[0]),
        head_names,
        about,
        "llama_block/attention",
        ask=partial(attention_in, model, tokenizer),
    )

#%% RMSNorm against LayerNorm: what subtracting the mean would change in each layer's stream
if __name__ == "__main__":
    streams = [cache["resid_pre", layer].float() for layer in range(shape.n_layers)]
    streams.append(cache["resid_post", shape.n_layers - 1].float())
    norm_cosine = []
    resid_rms = []
    for x in streams:
        centred = x - x.mean(-1, keepdim=True)
        norm_cosine.append(F.cosine_similarity(x, centred, dim=-1).mean().item())
        resid_rms.append(x.pow(2).mean(-1).sqrt().mean().item())
    numbers |= {"rms_layernorm_cosine": norm_cosine, "resid_rms": resid_rms}

#%% ... by layer, beside the stream's size
if __name__ == "__main__":
    fig = line(
        {
            "cosine of RMSNorm(x) and LayerNorm(x)": norm_cosine,
            "RMS of x, share of the last": [rms / resid_rms[-1] for rms in resid_rms],
        },
        "RMSNorm against LayerNorm, both without weights, and the stream's size by layer "
        f"(n = {rows.numel()} tokens; last RMS {resid_rms[-1]:.2f})",
        xlabel="layer",
        ylabel="cosine, share",
        markers=True,
    )
    show(
        fig,
        "llama_block/norms",
        "Near 1: subtracting the mean, which LayerNorm does and RMSNorm leaves out, would hardly turn the stream.",
    )

#%% SwiGLU's gates: how many are open, and how few neurons carry the write
if __name__ == "__main__":
    bins = np.linspace(-4, 4, 81)
    gate_density = {}
    gate_table = []
    for layer in range(shape.n_layers):
        pre = cache["pre", layer].float()  # (row, pos, d_mlp)
        squares = cache["post", layer].float().pow(2)
        is_open = (pre > 0).float()
        carried = squares.sort(-1, descending=True).values.cumsum(-1) / squares.sum(-1, keepdim=True)
        neurons_for_90_percent = ((carried < 0.9).sum(-1) + 1).float().mean().item()
        gate_density[f"L{layer}"] = np.histogram(pre.flatten().cpu().numpy(), bins, density=True)[0]
        gate_table.append(
            [
                f"L{layer}",
                is_open.mean().item(),
                (is_open.mean((0, 1)) == 0).float().mean().item(),
                neurons_for_90_percent / shape.d_mlp,
            ]
        )
    headers = ["layer", "gates open", "neurons never open", "neurons for 90% of the squared activation"]
    print(tabulate(gate_table, headers=headers, floatfmt=".3f"))
    numbers |= {
        "gates_open": [row[1] for row in gate_table],
        "neurons_for_90_percent": [row[3] for row in gate_table],
    }

#%% ... the density of their pre-activations
if __name__ == "__main__":
    fig = line(
        gate_density,
        f"Gate pre-activations (n = {rows.numel()} tokens x {shape.d_mlp} neurons per layer)",
        xlabel="gate before silu",
        ylabel="density",
        x=bins[:-1] + 0.05,
    )
    show(
        fig,
        "llama_block/gates",
        "Left of 0 a gate is shut, right of it open: how much of the MLP a token uses.",
    )


#%% What it says next, and the conclusion
if __name__ == "__main__":
    with t.no_grad():
        top = model(prompt)[0, -1].float().softmax(-1).topk(5)
    next_tokens = zip(str_tokens(tokenizer, top.indices), top.values.tolist())
    room = max(0, shape.n_ctx - prompt.shape[1])
    written = model.generate(prompt, min(24, room))[0].tolist()
    said = text_of(tokenizer, written[0 if bos_id(tokenizer) is None else 1 :])
    print(f"{gray}after {cfg.prompt!r}: {', '.join(f'{visible(token)} {p:.2f}' for token, p in next_tokens)}{endc}")
    print(f"{cyan}{said}{endc}")
    save_results("llama_block", cfg, **numbers)
    if learned_the_world:
        print(
            f"{green}It completes {known['fact_recall']:.1%} of the capital facts it was taught "
            f"({known['fact_recall_heldout_phrasing']:.1%} in phrasings it never saw), "
            f"{known['reverse_recall_of_forward_only']:.1%} and {known['forward_recall_of_reverse_only']:.1%} of those "
            f"it was only told the other way round, and {known['ioi_accuracy']:.1%} of indirect objects with pairs of "
            f"names it never saw (logit difference {known['ioi_logit_diff']:.1f}).{endc}"
        )
    nearest = head_name(distance.argmin().item(), shape.n_heads)
    farthest = head_name(distance.argmax().item(), shape.n_heads)
    print(
        f"{green}{shape.architecture} shape, {n_millions:.2f}M parameters: heads look {distance.min():.1f} ({nearest}) "
        f"to {distance.max():.1f} ({farthest}) tokens back, {100 * np.mean(numbers['gates_open']):.0f}% of gates are "
        f"open, LayerNorm would turn the stream only by a cosine of {min(norm_cosine):.4f}. Gate: scores depend on "
        f"offset to {drift:.0e}.{endc}"
    )
