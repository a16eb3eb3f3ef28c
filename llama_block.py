"""The modern decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Llama, Mistral, Qwen2 and Qwen3 by switches, equal to Hugging Face's."""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from utils import cyan, endc, fail, gray, green, load_model, pick_device, purple, read_config, save_results, set_seed
from plots import imshow, line, show, visible
from hooks import HookPoint, run_with_cache
from weights import read_tensors, take_tensors, tensor_table
from layers import HeadWeights, attend
from data import load_corpus, str_tokens, to_tokens, write_folder
from train import TrainConfig, bench_against_hf, context_at, first_goes_on, train
from launch import flags
from world import evaluate_world, load_world, write_metrics

from einops import einsum
import numpy as np
from tabulate import tabulate
from tokenizers import Tokenizer
import torch as t
from torch import Tensor
import torch.nn as nn
import torch.nn.functional as F


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
    qk_norm: str = "none"  # none, head (Qwen3: RMSNorm of each head's q and k) or full (OLMoE: over all heads at once)
    windows: tuple[int | None, ...] = ()  # by layer, the number of keys a query sees (Mistral); empty is all of them
    tied: bool = False  # the unembedding is the embedding
    architecture: str = "LlamaForCausalLM"

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            fail(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.d_head % 2:
            fail(f"d_head {self.d_head} is odd: rotary positions turn pairs of dimensions")
        if self.windows and len(self.windows) != self.n_layers:
            fail(f"windows has {len(self.windows)} entries for {self.n_layers} layers")


#%% Hugging Face's words: config.json, and the names of the tensors (each part of a name has one of ours)
def read_llama_config(hf: dict, architectures: tuple[str, ...]) -> dict:
    """Fields of llama_block.LlamaConfig from a config.json; whatever is not built here ends the program rather than being left out."""
    name = (hf.get("architectures") or ["unknown"])[0]
    if name not in architectures:
        fail(
            f"architecture {name} is not built here (built: {', '.join(architectures)}); load_model opens it as a TransformerBridge"
        )
    rope = hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {}), "rope_theta": hf.get("rope_theta", 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        fail(f"rope type {kind!r} of {name} is not built here (built: default, llama3)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        fail(f"partial rotary positions of {name} are not built here")
    if (act := hf.get("hidden_act", "silu")) != "silu":
        fail(f"activation {act!r} of {name} is not built here (built: silu)")
    if hf.get("mlp_bias"):
        fail(f"mlp_bias of {name} is not built here")
    n_layers, n_heads, window = hf["num_hidden_layers"], hf["num_attention_heads"], hf.get("sliding_window")
    if name.startswith("Qwen"):  # Qwen states a window that only some layers use, and only when told to
        kinds = hf.get("layer_types") or [
            "sliding_attention"
            if hf.get("use_sliding_window") and i >= hf.get("max_window_layers", n_layers)
            else "full_attention"
            for i in range(n_layers)
        ]
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    else:
        windows = (window,) * n_layers
    return dict(
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=hf.get("num_key_value_heads") or n_heads,
        d_model=hf["hidden_size"],
        d_head=hf.get("head_dim") or hf["hidden_size"] // n_heads,
        d_mlp=hf["intermediate_size"],
        d_vocab=hf["vocab_size"],
        n_ctx=hf["max_position_embeddings"],
        rope_base=rope["rope_theta"],
        rope_scaling=rope if kind == "llama3" else None,
        norm_eps=hf["rms_norm_eps"],
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("qkv_bias", True) if name.startswith("Qwen2") else hf.get("attention_bias", False),
        o_bias=hf.get("attention_bias", False) and not name.startswith("Qwen2"),
        qk_norm={"Qwen3ForCausalLM": "head", "Qwen3MoeForCausalLM": "head", "OlmoeForCausalLM": "full"}.get(
            name, "none"
        ),
        windows=windows if any(windows) else (),
        architecture=name,
    )


def write_llama_config(cfg: object) -> dict:
    """config.json for transformers of a llama_block.LlamaConfig."""
    window = next((w for w in cfg.windows if w), None)
    hf = dict(
        architectures=[cfg.architecture],
        model_type=cfg.architecture.removesuffix("ForCausalLM").lower(),
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_mlp,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        head_dim=cfg.d_head,
        vocab_size=cfg.d_vocab,
        max_position_embeddings=cfg.n_ctx,
        rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tied,
        hidden_act="silu",
        rope_theta=cfg.rope_base,
        rope_parameters=cfg.rope_scaling or {"rope_type": "default", "rope_theta": cfg.rope_base},
        sliding_window=window,
    )
    if cfg.architecture.startswith("Qwen"):
        hf |= dict(
            use_sliding_window=window is not None,
            layer_types=["sliding_attention" if w else "full_attention" for w in cfg.windows or [None] * cfg.n_layers],
        )
    if not cfg.architecture.startswith("Qwen2"):
        hf |= dict(attention_bias=cfg.qkv_bias)
    return hf


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


THEIRS = {ours: theirs for theirs, ours in PARTS.items()}


def our_name(hf: str) -> str:
    return ".".join(PARTS.get(part, part) for part in hf.removeprefix("model.").split("."))


def hf_name(ours: str) -> str:
    return "model." * (not ours.startswith("unembed")) + ".".join(THEIRS.get(part, part) for part in ours.split("."))


#%% RMSNorm: divide by the root mean square, multiply by a weight
class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps, self.hook_scale, self.hook_normalized = (
            nn.Parameter(t.ones(size)),
            eps,
            HookPoint(),
            HookPoint(),
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == t.float32 and not self.hook_scale.fwd_hooks and not self.hook_normalized.fwd_hooks:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        scale = self.hook_scale((x.float().pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.weight * self.hook_normalized((x.float() / scale).to(x.dtype))


#%% Rotary positions: q and k turn with their position, so that scores depend on the offset alone
def rope_frequencies(cfg: LlamaConfig) -> Tensor:
    """(d_head / 2) radians per position. Llama 3.1: wavelengths beyond the old context are slowed by `factor`, with a ramp between."""
    frequency = cfg.rope_base ** (-t.arange(0, cfg.d_head, 2, dtype=t.float32) / cfg.d_head)
    if not cfg.rope_scaling:
        return frequency
    low, high, old, factor = (
        cfg.rope_scaling[key]
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "factor")
    )
    turns = old * frequency / (2 * math.pi)  # in the old context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / factor)


def rope_tables(cfg: LlamaConfig, n_ctx: int) -> tuple[Tensor, Tensor]:
    """cos and sin (pos, 1, d_head), each frequency twice: dimension i turns with i + d_head / 2 (Hugging Face's order; Meta's turns i with i + 1)."""
    angle = t.arange(n_ctx, dtype=t.float32)[:, None] * rope_frequencies(cfg)
    angle = t.cat([angle, angle], -1)[:, None]
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, pos, head, d_head)."""
    a, b = x.chunk(2, -1)
    return x * cos + t.cat([-b, a], -1) * sin


#%% Attention with grouped queries: several query heads read one key and value head
class GroupedQueryAttention(nn.Module, HeadWeights):
    """W_Q (head, d_model, d_head); W_K, W_V (kv head, d_model, d_head); W_O (head, d_head, d_model)."""

    def __init__(self, cfg: LlamaConfig, layer: int):
        super().__init__()
        self.cfg, self.window = cfg, cfg.windows[layer] if cfg.windows else None
        wide, narrow = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
        self.q, self.o = nn.Linear(cfg.d_model, wide, bias=cfg.qkv_bias), nn.Linear(wide, cfg.d_model, bias=cfg.o_bias)
        self.k, self.v = (
            nn.Linear(cfg.d_model, narrow, bias=cfg.qkv_bias),
            nn.Linear(cfg.d_model, narrow, bias=cfg.qkv_bias),
        )
        if cfg.qk_norm == "head":
            self.q_norm, self.k_norm = RMSNorm(cfg.d_head, cfg.norm_eps), RMSNorm(cfg.d_head, cfg.norm_eps)
        if cfg.qk_norm == "full":
            self.q_norm, self.k_norm = RMSNorm(wide, cfg.norm_eps), RMSNorm(narrow, cfg.norm_eps)
        for name in ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result"):
            setattr(self, f"hook_{name}", HookPoint())

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        norm = self.cfg.qk_norm
        split = lambda y: y.unflatten(-1, (-1, self.cfg.d_head))
        q, k, v = self.hook_q(split(self.q(x))), self.hook_k(split(self.k(x))), self.hook_v(split(self.v(x)))
        if norm == "full":
            q, k = split(self.q_norm(q.flatten(2))), split(self.k_norm(k.flatten(2)))
        if norm == "head":
            q, k = self.q_norm(q.transpose(1, 2)).transpose(1, 2), self.k_norm(k.transpose(1, 2)).transpose(1, 2)
        q, k = self.hook_rot_q(rope(q, cos, sin)), self.hook_rot_k(rope(k, cos, sin))
        z = self.hook_z(attend(q, k, v, self.hook_attn_scores, self.hook_pattern, window=self.window))
        return self.write(z)


#%% SwiGLU: a gate decides how much of each neuron passes
class SwiGLU(nn.Module):
    """W_in, W_gate (d_model, d_mlp), W_out (d_mlp, d_model). hook_pre is the gate before silu, hook_pre_linear what it multiplies, hook_post their product."""

    def __init__(self, d_model: int, d_mlp: int):
        super().__init__()
        self.gate, self.inp, self.out = (
            nn.Linear(d_model, d_mlp, bias=False),
            nn.Linear(d_model, d_mlp, bias=False),
            nn.Linear(d_mlp, d_model, bias=False),
        )
        self.hook_pre, self.hook_pre_linear, self.hook_post = HookPoint(), HookPoint(), HookPoint()

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
        return self.out(self.hook_post(F.silu(self.hook_pre(self.gate(x))) * self.hook_pre_linear(self.inp(x))))


#%% The block, and the model
class LlamaBlock(nn.Module):
    def __init__(self, cfg: LlamaConfig, layer: int, mlp: nn.Module):
        super().__init__()
        self.ln1, self.ln2 = RMSNorm(cfg.d_model, cfg.norm_eps), RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn, self.mlp = GroupedQueryAttention(cfg, layer), mlp
        for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"):
            setattr(self, f"hook_{name}", HookPoint())

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(x + self.hook_attn_out(self.attn(self.ln1(x), cos, sin)))
        return self.hook_resid_post(x + self.hook_mlp_out(self.mlp(self.ln2(x))))


class Llama(nn.Module):
    architectures = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

    def __init__(self, cfg: LlamaConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.embed, self.hook_embed = nn.Embedding(cfg.d_vocab, cfg.d_model), HookPoint()
        self.blocks = nn.ModuleList(LlamaBlock(cfg, layer, self.make_mlp(layer)) for layer in range(cfg.n_layers))
        self.ln_final, self.unembed = (
            RMSNorm(cfg.d_model, cfg.norm_eps),
            nn.Linear(cfg.d_model, cfg.d_vocab, bias=False),
        )
        self.init_weights()
        if cfg.tied:
            self.unembed.weight = self.embed.weight
        cos, sin = rope_tables(cfg, min(cfg.n_ctx, 4096))
        self.register_buffer("cos", cos, persistent=False), self.register_buffer("sin", sin, persistent=False)

    def init_weights(self, embed_std: float = 0.02, unembed_std: float = 0.02) -> None:
        """Small query and key weights, as in attn_only: attention starts near uniform, and heads form soonest."""
        for weight, std in ((self.embed.weight, embed_std), (self.unembed.weight, unembed_std)):
            nn.init.normal_(weight, std=std)
        for name, linear in self.blocks.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            nn.init.normal_(
                linear.weight, std=(0.3 if name.endswith((".q", ".k")) else 1.0) / math.sqrt(linear.in_features)
            )
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
        self, tokens: Tensor, start_at_layer: int = 0, resid: Tensor | None = None, stop_at_layer: int | None = None
    ) -> Tensor:
        """
        Logits (batch, pos, d_vocab). Given resid (batch, pos, d_model), the residual stream enters at start_at_layer and the blocks below are
        skipped; with stop_at_layer the residual stream before that layer is returned.
        """
        x = self.hook_embed(self.embed(tokens)) if resid is None else resid
        T = x.shape[1]
        if T > len(self.cos):
            self.cos, self.sin = (table.to(x.device) for table in rope_tables(self.cfg, T))
        cos, sin = self.cos[:T].to(x.dtype), self.sin[:T].to(x.dtype)
        for block in self.blocks[start_at_layer:stop_at_layer]:
            x = block(x, cos, sin)
        return self.unembed(self.ln_final(x)) if stop_at_layer is None else x

    @t.no_grad()
    def generate(self, tokens: Tensor, n: int) -> Tensor:
        """tokens (batch, pos) with n more, chosen greedily."""
        for _ in range(n):
            tokens = t.cat([tokens, self(tokens)[:, -1:].argmax(-1)], 1)
        return tokens

    @classmethod
    def from_hf(cls, hf_model: nn.Module, tokenizer: Tokenizer | None = None) -> "Llama":
        """The same model out of a transformers model in memory; every tensor must find its place."""
        model = cls(
            cls.read_config(hf_model.config.to_dict() | {"architectures": [type(hf_model).__name__]}), tokenizer
        )
        return take_tensors(model, ((name, x.clone()) for name, x in hf_model.state_dict().items())).eval()

    @classmethod
    def from_folder(cls, folder: str, device: str = "cpu", dtype: t.dtype = t.float32) -> "Llama":
        """A Hugging Face folder: config.json, safetensors (sharded or not), tokenizer.json. Read tensor by tensor onto the device."""
        if not (file := Path(folder) / "tokenizer.json").is_file():
            fail(f"no tokenizer.json in {folder}: copy the tokenizer there (tokenizer.save_pretrained)")
        with t.device("meta"):
            model = cls(cls.read_config(read_config(folder)), Tokenizer.from_file(str(file)))
        take_tensors(model, ((name, x.to(device, dtype)) for name, x in read_tensors(folder)))
        model.cos, model.sin = (table.to(device) for table in rope_tables(model.cfg, min(model.cfg.n_ctx, 4096)))
        return model.eval()

    def to_hf(self, folder: Path, dtype: t.dtype | None = None) -> None:
        """Write an ordinary Hugging Face folder."""
        write_folder(
            folder,
            {name: x.to(dtype or x.dtype) for name, x in self.hf_tensors().items()},
            self.write_config(),
            self.tokenizer,
        )

    @classmethod
    def read_config(cls, hf: dict) -> LlamaConfig:
        return LlamaConfig(**read_llama_config(hf, cls.architectures))

    def write_config(self) -> dict:
        return write_llama_config(self.cfg)

    def hf_tensors(self) -> dict[str, Tensor]:
        return {
            hf_name(name): x
            for name, x in self.state_dict().items()
            if not (self.cfg.tied and name == "unembed.weight")
        }

    def place(self, name: str, x: Tensor) -> dict[str, Tensor]:
        return {our_name(name): x}


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config(TrainConfig):
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4
    d_model: int = 128
    d_mlp: int = 384
    vocab: int = 3072  # size of the byte-level BPE trained on the text
    rope_base: float = 10000.0
    bias: bool = (
        True  # on q, k, v and o: Llama's attention_bias (transformers reads any tokenizer in a Qwen2 folder as Qwen's)
    )
    steps: int = 450
    lr: float = 1e-2
    muon_lr: float = 0.014
    decay: float = 0.4  # share of the steps (wsd)
    contexts: tuple[int, ...] = (64,)
    data: str = "world"  # world (a corpus that is known exactly), stdlib, a text file or folder, or a hub dataset
    out: str = "checkpoints/llama_block/model"  # where the trained model goes, in half precision, with metrics.json if it learned the world
    others: tuple[
        str, ...
    ] = ()  # folders that the same command with other seeds wrote: metrics.json then holds the spread
    model: str | None = None  # look into this model instead of training: a hub name or a folder
    prompt: str = "The capital of Japan is"
    bench: bool = False  # only compare training speed with Hugging Face's Llama


if __name__ == "__main__":
    cfg = flags(
        Config,
        __doc__,
        hpc=Config(
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
        ),
    )  # --hpc: an A100 with 40 GB
    device = pick_device(cfg.device)
    set_seed(cfg.seed)

#%% Speed against Hugging Face's Llama with its default attention (--bench): 6 layers of width 512, and this script's own shape
if __name__ == "__main__" and cfg.bench:
    from transformers import LlamaForCausalLM as HFLlama
    from transformers.models.llama import LlamaConfig as HFConfig

    ratios, own = (
        {},
        dict(
            hidden_size=cfg.d_model,
            intermediate_size=cfg.d_mlp,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.n_kv_heads,
        ),
    )
    for name, shape, rows in (
        (
            "6 layers, d_model 512",
            dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8),
            (8, 128),
        ),
        ("default", own, (cfg.tokens_per_step // cfg.contexts[-1], cfg.contexts[-1])),
    ):
        ours, theirs = (HFLlama(HFConfig(vocab_size=cfg.vocab, **shape)).to(device) for _ in range(2))
        ratios[name] = bench_against_hf(
            Llama.from_hf(ours).to(device), theirs, t.randint(cfg.vocab, rows, device=device)
        )
        print(
            f"{cyan}{name}, {rows[0]} x {rows[1]} tokens: {ratios[name]:.3f} times Hugging Face's training speed (median of 7 interleaved pairs){endc}"
        )
    save_results(
        "llama_block_bench",
        cfg,
        throughput_vs_hf=ratios["6 layers, d_model 512"],
        throughput_vs_hf_default=ratios["default"],
    )
    raise SystemExit

#%% A model: trained before your eyes, or someone's, with every tensor in its place
if __name__ == "__main__":
    numbers: dict = {}
    if cfg.model:
        Llama.read_config(read_config(cfg.model))  # refuse before anything is fetched
        table = [
            [name, "x".join(map(str, shape)), dtype, norm, our_name(name)]
            for name, shape, dtype, norm in tensor_table(cfg.model)
        ]
        print(tabulate(table, headers=["tensor", "shape", "dtype", "norm", "here"], floatfmt=".2f"))
        model = load_model(cfg.model, (Llama,), cfg.device)
    else:
        print(f"{purple}=== Training {cfg.n_layers} layers on {cfg.data}, seed {cfg.seed}, {device} ==={endc}")
        corpus = load_world(cfg.vocab) if cfg.data == "world" else load_corpus(cfg.data, cfg.vocab)
        model = Llama(
            LlamaConfig(
                cfg.n_layers,
                cfg.n_heads,
                cfg.n_kv_heads,
                cfg.d_model,
                cfg.d_model // cfg.n_heads,
                cfg.d_mlp,
                corpus.d_vocab,
                max(256, *cfg.contexts),
                cfg.rope_base,
                qkv_bias=cfg.bias,
                o_bias=cfg.bias,
            ),
            corpus.tokenizer,
        )
        model.init_weights(0.2, 0.5 / math.sqrt(cfg.d_model))
        batch = lambda i: corpus.batch(
            np.random.default_rng((cfg.seed, i)),
            cfg.tokens_per_step // cfg.accumulate // (ctx := context_at(i // cfg.accumulate, cfg)),
            ctx,
        )
        watch = (lambda step: evaluate_world(model, corpus, quick=True, device=device)) if cfg.data == "world" else None
        history = train(
            model,
            batch,
            cfg,
            "llama_block",
            watch=watch,
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
            f"{green}loss {numbers['train_loss']:.3f} nats after {history['tokens'][-1] / 1e6:.2f}M tokens, {history['tokens_per_second']:,.0f} tokens/s; saved to {cfg.out} for transformers{endc}"
        )
        model = Llama.from_folder(cfg.out, device)  # what follows is measured on the file
    shape, tokenizer = model.cfg, model.tokenizer

#%% What it learned of the world, and when: facts, their reverse, indirect objects and the rest come one by one
if __name__ == "__main__" and cfg.data == "world" and not cfg.model:
    known = evaluate_world(model, corpus, device=device)
    numbers |= known
    tasks = [
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
    ]
    fig = line(
        {task.replace("_", " "): [w[task] for w in history["watch"]] for task in tasks},
        f"What the model knows by tokens seen, on a fixed subsample (world, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, seed {cfg.seed})",
        "tokens seen",
        "share right (greater than: p(later) - p(not later))",
        [w["tokens"] for w in history["watch"]],
        markers=True,
    )
    show(fig, "llama_block/phases")
    command = " ".join(["uv run llama_block.py", *[flag for flag in sys.argv[1:] if flag != "--resume"]])
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
        command=command,
    )
    print(
        tabulate(
            [[name.replace("_", " "), *values] for name, values in spread.items()],
            headers=["on the reopened file"],
            floatfmt=".3f",
        )
    )

#%% Gates: listening changes nothing, positions enter by their differences only, grouped heads share what they should
if __name__ == "__main__":
    prompt = to_tokens(tokenizer, cfg.prompt).to(device)
    rows = (
        prompt
        if cfg.model
        else t.from_numpy(corpus.rows(np.random.default_rng(1), 32, max(cfg.contexts), "heldout")).to(device)
    )
    with t.no_grad():
        logits, cache = run_with_cache(model, rows)
    with t.no_grad():
        gap = (logits - model(rows)).abs().max().item() / logits.abs().max().item()
    assert gap < (1e-5 if logits.dtype == t.float32 else 2e-2), f"listening changes the logits by {gap}"
    cos, sin = (table.to(device) for table in rope_tables(shape, 64))
    mean = {x: cache[x, 0].float().mean((0, 1)) for x in "qk"}
    turned = {x: rope(mean[x].expand(1, 64, -1, -1), cos, sin)[0] for x in "qk"}
    scores = einsum(
        turned["q"],
        turned["k"].repeat_interleave(shape.n_heads // shape.n_kv_heads, 1),
        "query head d_head, key head d_head -> head query key",
    )
    drift = (
        max((scores.diagonal(-o, 1, 2) - scores[:, o, :1]).abs().max().item() for o in range(40))
        / scores.abs().max().item()
    )
    assert drift < 1e-4, f"scores at one offset differ by {drift}"
    numbers |= {"listening_gap": gap, "rope_offset_drift": drift}
    print(
        f"{cyan}gates: listening moves logits by {gap:.0e}, scores at one offset agree to {drift:.0e} (both relative){endc}"
    )

#%% Rotary positions: how a score falls with the offset, for aligned q and k, and for the mean q and k of each head of layer 0
if __name__ == "__main__":
    aligned = (t.arange(256)[:, None] * rope_frequencies(shape)).cos().mean(1)
    show(
        line(
            {"q = k = ones": aligned},
            f"RoPE with base {shape.rope_base:g}: score of aligned q and k against their offset (d_head {shape.d_head})",
            "offset",
            "score / score at 0",
        ),
        "llama_block/rope",
    )
    show(
        line(
            {f"L0H{h}": scores[h, :, 0] / math.sqrt(shape.d_head) for h in range(shape.n_heads)},
            f"Mean query against mean key of each head of layer 0, turned by RoPE ({rows.shape[0]} rows)",
            "offset",
            "attention score",
        ),
        "llama_block/rope_heads",
    )

#%% How far each head looks: the mean distance of its attention, and the share it keeps on the first token
if __name__ == "__main__":
    T = rows.shape[1]
    away = (t.arange(T)[:, None] - t.arange(T)).clamp(min=0).to(device)
    distance = t.stack(
        [
            (cache["pattern", layer].float() * away).sum(-1)[:, :, T // 2 :].mean((0, 2))
            for layer in range(shape.n_layers)
        ]
    )
    sink = t.stack([cache["pattern", layer][:, :, T // 2 :, 0].float().mean((0, 2)) for layer in range(shape.n_layers)])
    heads, layers = [f"H{h}" for h in range(shape.n_heads)], [f"L{layer}" for layer in range(shape.n_layers)]
    show(
        imshow(
            distance,
            f"Mean attention distance of each head (n = {len(rows)} rows of {T} tokens, queries of the second half)",
            "head",
            "layer",
            heads,
            layers,
            diverging=False,
            value="tokens",
        ),
        "llama_block/distance",
    )
    show(
        imshow(
            sink,
            f"Attention on the first token (n = {len(rows)} rows)",
            "head",
            "layer",
            heads,
            layers,
            diverging=False,
            value="attention",
        ),
        "llama_block/sink",
    )
    numbers |= {"attention_distance": distance.tolist(), "attention_on_first_token": sink.tolist()}

#%% RMSNorm against LayerNorm: what subtracting the mean would change in each layer's stream
if __name__ == "__main__":
    streams = [cache["resid_pre", layer].float() for layer in range(shape.n_layers)] + [
        cache["resid_post", shape.n_layers - 1].float()
    ]
    same = [F.cosine_similarity(x, x - x.mean(-1, keepdim=True), dim=-1).mean().item() for x in streams]
    size = [x.pow(2).mean(-1).sqrt().mean().item() for x in streams]
    show(
        line(
            {
                "cosine of RMSNorm(x) and LayerNorm(x)": same,
                "RMS of x, share of the last": [x / size[-1] for x in size],
            },
            f"RMSNorm against LayerNorm, both without weights, and the stream's size by layer (n = {rows.numel()} tokens; last RMS {size[-1]:.2f})",
            "layer",
            "cosine, share",
            markers=True,
        ),
        "llama_block/norms",
    )
    numbers |= {"rms_layernorm_cosine": same, "resid_rms": size}

#%% SwiGLU's gates: how many are open, and how few neurons carry the write
if __name__ == "__main__":
    bins, gates, stats = np.linspace(-4, 4, 81), {}, []
    for layer in range(shape.n_layers):
        pre, post = cache["pre", layer].float(), cache["post", layer].float()
        gates[f"L{layer}"] = np.histogram(pre.flatten().cpu().numpy(), bins, density=True)[0]
        share = post.pow(2).sort(-1, descending=True).values.cumsum(-1) / post.pow(2).sum(-1, keepdim=True)
        stats.append(
            [
                f"L{layer}",
                (pre > 0).float().mean().item(),
                ((pre > 0).float().mean((0, 1)) == 0).float().mean().item(),
                ((share < 0.9).sum(-1) + 1).float().mean().item() / post.shape[-1],
            ]
        )
    show(
        line(
            gates,
            f"Gate pre-activations (n = {rows.numel()} tokens x {shape.d_mlp} neurons per layer)",
            "gate before silu",
            "density",
            bins[:-1] + 0.05,
        ),
        "llama_block/gates",
    )
    print(
        tabulate(
            stats,
            headers=["layer", "gates open", "neurons never open", "neurons for 90% of the squared activation"],
            floatfmt=".3f",
        )
    )
    numbers |= {"gates_open": [row[1] for row in stats], "neurons_for_90_percent": [row[3] for row in stats]}

#%% What it says next, and the conclusion
if __name__ == "__main__":
    with t.no_grad():
        top = model(prompt)[0, -1].float().softmax(-1).topk(5)
    print(
        f"{gray}after {cfg.prompt!r}: {', '.join(f'{visible(tok)} {p:.2f}' for tok, p in zip(str_tokens(tokenizer, top.indices), top.values.tolist()))}{endc}\n{cyan}{''.join(str_tokens(tokenizer, model.generate(prompt, 24)[0, 1:]))}{endc}"
    )
    save_results("llama_block", cfg, **numbers)
    far, near = distance.argmax().item(), distance.argmin().item()
    name = lambda i: f"L{i // shape.n_heads}H{i % shape.n_heads}"
    if "fact_recall" in numbers:
        print(
            f"{green}It completes {known['fact_recall']:.1%} of the capital facts it was taught ({known['fact_recall_heldout_phrasing']:.1%} in phrasings it never saw), {known['reverse_recall_of_forward_only']:.1%} and {known['forward_recall_of_reverse_only']:.1%} of those it was only told the other way round,"
        )
        print(
            f"and {known['ioi_accuracy']:.1%} of indirect objects with pairs of names it never saw (logit difference {known['ioi_logit_diff']:.1f}).{endc}"
        )
    print(
        f"{green}{shape.architecture} shape, {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters: heads look {distance.min():.1f} ({name(near)}) to {distance.max():.1f} ({name(far)}) tokens back, {100 * np.mean(numbers['gates_open']):.0f}% of gates are open, LayerNorm would turn the stream only by a cosine of {min(same):.4f}. Gate: scores depend on offset to {drift:.0e}.{endc}"
    )
