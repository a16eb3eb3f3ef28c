"""Sparse mixture of experts, trained live: a router sends each token to k of n experts. Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE by switches."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import (
    cyan,
    endc,
    fail,
    full_name,
    gray,
    green,
    model_folder,
    pick_device,
    pick_dtype,
    purple,
    read_config,
    save_results,
    set_seed,
    yellow,
)
from plots import COLORS, imshow, label_tokens, line, show, visible
from hooks import HookPoint, run_with_cache, run_with_hooks
from weights import tensor_table
from data import bos_id, kind_of, load_corpus, str_tokens, to_tokens
from train import TrainConfig, context_at, first_goes_on, train
from launch import flags
from anatomy import mutual_information
from llama_block import Llama, LlamaConfig, SwiGLU, read_llama_config, rope_frequencies, write_llama_config

from einops import einsum
import numpy as np
from scipy.sparse import csr_matrix
from tabulate import tabulate
import torch as t
from torch import Tensor
import torch.nn as nn
import torch.nn.functional as F

SWITCHES = {  # what makes it which architecture; fixed: what that architecture cannot have otherwise
    "mixtral": dict(architecture="MixtralForCausalLM", qk_norm="none", norm_topk=True),
    "qwen2_moe": dict(architecture="Qwen2MoeForCausalLM", qk_norm="none", norm_topk=False, qkv_bias=True),
    "qwen3_moe": dict(architecture="Qwen3MoeForCausalLM", qk_norm="head", norm_topk=True),
    "olmoe": dict(architecture="OlmoeForCausalLM", qk_norm="full", norm_topk=False),
}


#%% The shape: Llama's, with experts in place of the MLP
@dataclass
class MoEConfig(LlamaConfig):
    n_layers: int = 3
    n_experts: int = 4
    top_k: int = 2
    d_expert: int = 192  # neurons of one expert
    norm_topk: bool = True  # the k weights of a token sum to one
    shared: int = 0  # Qwen2-MoE: neurons of an expert that sees every token, behind a sigmoid gate
    dense: tuple[int, ...] = ()  # Qwen: layers that have one SwiGLU of d_mlp neurons instead
    aux_coef: float = 0.01  # of the load-balancing loss
    architecture: str = "MixtralForCausalLM"

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.top_k <= self.n_experts:
            fail(f"top_k {self.top_k} is not between 1 and n_experts {self.n_experts}")
        if bool(self.shared) != (self.family == "qwen2_moe"):
            fail(f"shared {self.shared}: Qwen2-MoE has a shared expert, the others have none ({self.family})")
        if self.qk_norm != SWITCHES[self.family]["qk_norm"]:
            fail(f"{self.family} has qk_norm {SWITCHES[self.family]['qk_norm']}, not {self.qk_norm}")
        if self.family == "mixtral" and not self.norm_topk:
            fail("norm_topk is True in Mixtral: its k weights sum to one")
        if self.dense and not self.family.startswith("qwen"):
            fail(f"{self.family} has experts in every layer: dense is empty")
        if len(self.dense) == self.n_layers:
            fail("no layer has experts: llama_block.py builds dense models")
        if not self.family.startswith("qwen"):
            self.d_mlp = self.d_expert

    @property
    def family(self) -> str:
        return next(
            (name for name, switches in SWITCHES.items() if switches["architecture"] == self.architecture), None
        ) or fail(f"architecture {self.architecture} is not built here (built: {', '.join(MoE.architectures)})")


#%% The layer: router logits -> top k -> each expert runs on its own tokens -> weighted sum
ExpertFFN = SwiGLU  # its hooks hold (token, d_expert): the tokens routed to it, in the order of batch and position; no row where none comes


class SparseMoE(nn.Module):
    """hook_router_logits (batch, pos, expert), hook_expert_indices and _weights (batch, pos, k). Edited logits are ranked anew; edited indices take the router's probabilities of the new choice (k may change); edited weights stand."""

    def __init__(self, cfg: MoEConfig):
        super().__init__()
        self.top_k, self.norm_topk = cfg.top_k, cfg.norm_topk
        self.router = nn.Linear(cfg.d_model, cfg.n_experts, bias=False)
        self.experts = nn.ModuleList(ExpertFFN(cfg.d_model, cfg.d_expert) for _ in range(cfg.n_experts))
        self.hook_router_logits, self.hook_expert_indices, self.hook_expert_weights = (
            HookPoint(),
            HookPoint(),
            HookPoint(),
        )
        if cfg.shared:
            self.shared_expert, self.shared_expert_gate, self.hook_shared_gate = (
                SwiGLU(cfg.d_model, cfg.shared),
                nn.Linear(cfg.d_model, 1, bias=False),
                HookPoint(),
            )

    def forward(self, x: Tensor) -> Tensor:
        probs = self.hook_router_logits(self.router(x)).softmax(-1, dtype=t.float32)
        indices = self.hook_expert_indices(probs.topk(self.top_k).indices)
        weights = probs.gather(-1, indices)
        if self.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = self.hook_expert_weights(weights.to(x.dtype))
        tokens, out, k = x.flatten(0, 1), t.zeros_like(x).flatten(0, 1), indices.shape[-1]
        load = indices.flatten().bincount(minlength=len(self.experts)).tolist()
        for expert, choices in zip(self.experts, indices.flatten().argsort(stable=True).split(load), strict=True):
            here = choices // k  # choice c is one of the k of token c // k
            out.index_add_(0, here, (expert(tokens[here]) * weights.flatten()[choices, None]).to(out.dtype))
        out = out.view_as(x)
        return (
            out + self.hook_shared_gate(self.shared_expert_gate(x).sigmoid()) * self.shared_expert(x)
            if hasattr(self, "shared_expert")
            else out
        )


def load_balancing_loss(router_logits: list[Tensor], top_k: int) -> Tensor:
    """n_experts * sum over experts of (choices per token) * (mean probability), layers (batch, pos, expert) pooled; top_k where balanced (Switch Transformer, eq. 4-6)."""
    probs = t.cat([logits.flatten(0, -2) for logits in router_logits]).softmax(-1, dtype=t.float32)
    choices = F.one_hot(probs.topk(top_k).indices, probs.shape[-1]).sum(1).float()
    return probs.shape[-1] * (choices.mean(0) * probs.mean(0)).sum()


def moe_loss(model: nn.Module, tokens: Tensor, cfg: MoEConfig) -> Tensor:
    """Next-token loss in nats + aux_coef * load-balancing loss, layer by layer: pooled as in transformers, an expert idle in one layer is made up for by its namesake in another."""
    logits, cache = run_with_cache(model, tokens, "*.hook_router_logits", detach=False)
    return (
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        + cfg.aux_coef * t.stack([load_balancing_loss([x], cfg.top_k) for x in cache.values()]).mean()
    )


#%% The model: Llama with experts, and its names on Hugging Face, of each expert by itself (files) or of all in one tensor (memory)
MIXTRAL = {"gate": "router", "block_sparse_moe": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class MoE(Llama):
    architectures = tuple(switches["architecture"] for switches in SWITCHES.values())

    def make_mlp(self, layer: int) -> nn.Module:
        return SwiGLU(self.cfg.d_model, self.cfg.d_mlp) if layer in self.cfg.dense else SparseMoE(self.cfg)

    @property
    def sparse(self) -> list[int]:
        return [layer for layer in range(self.cfg.n_layers) if layer not in self.cfg.dense]

    @classmethod
    def read_config(cls, hf: dict) -> MoEConfig:
        if hf.get("clip_qkv"):
            fail("clip_qkv of OLMoE is not built here")
        layers, window, name = (
            range(hf.get("num_hidden_layers", 0)),
            hf.get("use_sliding_window"),
            (hf.get("architectures") or ["unknown"])[0],
        )
        slides = {
            "Qwen2MoeForCausalLM": lambda i: window and i % 2 == 0 and i < hf.get("max_window_layers", 28),
            "Qwen3MoeForCausalLM": lambda i: window,
        }.get(name, lambda i: False)
        shape = read_llama_config(
            {"layer_types": ["sliding_attention" if slides(i) else "full_attention" for i in layers]} | hf,
            cls.architectures,
        )
        sizes = dict(
            n_experts=hf.get("num_experts") or hf["num_local_experts"],
            top_k=hf["num_experts_per_tok"],
            d_expert=hf.get("moe_intermediate_size") or hf["intermediate_size"],
            shared=hf.get("shared_expert_intermediate_size", 0),
        )
        dense = tuple(
            i
            for i in layers
            if name.startswith("Qwen")
            and (i in (hf.get("mlp_only_layers") or []) or (i + 1) % hf.get("decoder_sparse_step", 1))
        )
        return MoEConfig(
            **shape,
            **sizes,
            norm_topk=hf.get("norm_topk_prob", name == "MixtralForCausalLM"),
            dense=dense,
            aux_coef=hf.get("router_aux_loss_coef", 0.001),
        )

    def write_config(self) -> dict:
        cfg, bos = self.cfg, bos_id(self.tokenizer) if self.tokenizer else None
        hf = write_llama_config(cfg) | dict(
            model_type=cfg.family,
            num_experts_per_tok=cfg.top_k,
            router_aux_loss_coef=cfg.aux_coef,
            output_router_logits=False,
            bos_token_id=bos,
            eos_token_id=bos,
            pad_token_id=None,
        )
        hf |= (
            dict(num_local_experts=cfg.n_experts)
            if cfg.family == "mixtral"
            else dict(num_experts=cfg.n_experts, norm_topk_prob=cfg.norm_topk)
        )
        if cfg.family.startswith("qwen"):
            hf |= dict(moe_intermediate_size=cfg.d_expert, mlp_only_layers=list(cfg.dense), decoder_sparse_step=1)
        if cfg.family == "qwen2_moe":
            hf |= dict(shared_expert_intermediate_size=cfg.shared, qkv_bias=cfg.qkv_bias)
        return hf

    def hf_tensors(self) -> dict[str, Tensor]:
        tensors = super().hf_tensors()
        for theirs, usual in (MIXTRAL if self.cfg.family == "mixtral" else {"gate": "router"}).items():
            tensors = {name.replace(f".{usual}.", f".{theirs}."): x for name, x in tensors.items()}
        return tensors

    def place(self, name: str, x: Tensor) -> dict[str, Tensor]:
        for theirs, usual in MIXTRAL.items():
            name = name.replace(f".{theirs}.", f".{usual}.")
        if x.ndim < 3:
            return super().place(name, x)
        room, kind = name.rsplit(".", 1)
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind) or fail(
            f"tensor {name} of shape {tuple(x.shape)} has no place in {self.cfg.architecture}"
        )
        return {
            ours: y
            for e, expert in enumerate(x)
            for part, piece in zip(parts, expert.chunk(len(parts)))
            for ours, y in super(MoE, self).place(f"{room}.{e}.{part}.weight", piece).items()
        }


#%% Measures: what the choice of expert tells about a token, above chance; what routing is worth
def bits(choices: np.ndarray, labels: np.ndarray, n_experts: int) -> float:
    """I(expert; label) in bits for the choices (token, k) of labelled tokens, one of the k drawn at random."""
    n_labels = int(labels.max()) + 1
    joint = np.bincount((labels[:, None] * n_experts + choices).ravel(), minlength=n_labels * n_experts)
    return mutual_information(csr_matrix(joint.reshape(n_labels, n_experts).astype(float)))


def specialisation(
    choices: np.ndarray,
    labels: np.ndarray,
    n_experts: int,
    given: np.ndarray | None = None,
    by_row: bool = False,
    shuffles: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """I(expert; label [| given]) in bits: observed, and of shuffled labels (of whole rows by_row, for labels that rows have in common) the mean, which a finite sample gives by itself, and the 99th percentile. choices (row, pos, k), labels and given (row, pos)."""
    rng, flat, n = np.random.default_rng(seed), choices.reshape(-1, choices.shape[-1]), int(labels.max()) + 1
    condition = np.zeros_like(labels) if given is None else given
    base = bits(flat, condition.ravel(), n_experts)
    measure = lambda x: bits(flat, (condition * n + x).ravel(), n_experts) - base
    null = [
        measure(rng.permutation(labels) if by_row else rng.permutation(labels.ravel()).reshape(labels.shape))
        for _ in range(shuffles)
    ]
    return {"observed": measure(labels), "mean": float(np.mean(null)), "bar": float(np.quantile(null, 0.99))}


@t.no_grad()
def routing(model: MoE, rows: Tensor) -> np.ndarray:
    """Chosen experts (layer, row, pos, k) of the sparse layers, best first."""
    _, cache = run_with_cache(model, rows, "*.hook_expert_indices")
    return np.stack([x.cpu().numpy() for x in cache.values()])


def load_of(chosen: np.ndarray, n_experts: int) -> np.ndarray:
    return np.stack([np.bincount(x.ravel(), minlength=n_experts) / x.size for x in chosen])


@t.no_grad()
def token_losses(model: MoE, rows: Tensor, fwd_hooks: list[tuple] = [], **enter) -> Tensor:
    """(row, pos - 1) nats of every token but the first."""
    logits = run_with_hooks(model, rows, fwd_hooks, **enter)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1)


# What can be done to an expert: the router cannot choose it, and the next best is taken; it is chosen and writes nothing; every token goes to it alone. Or: k at random.
def knock_out(layer: int, expert: int) -> tuple[str, Callable]:
    return f"blocks.{layer}.mlp.hook_router_logits", lambda logits, hook: logits.index_fill(
        -1, t.tensor([expert], device=logits.device), -t.inf
    )


def silence(layer: int, expert: int) -> tuple[str, Callable]:
    return f"blocks.{layer}.mlp.experts.{expert}.hook_post", lambda post, hook: t.zeros_like(post)


def force(layer: int, expert: int) -> tuple[str, Callable]:
    return f"blocks.{layer}.mlp.hook_expert_indices", lambda indices, hook: t.full_like(indices[..., :1], expert)


def scatter(layer: int, n_experts: int, seed: int = 0) -> tuple[str, Callable]:
    return (
        f"blocks.{layer}.mlp.hook_expert_indices",
        lambda indices, hook: (
            t.rand(*indices.shape[:-1], n_experts, generator=t.Generator().manual_seed(seed))
            .argsort(-1)[..., : indices.shape[-1]]
            .to(indices.device)
        ),
    )


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config(TrainConfig):
    family: Literal["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"] = "mixtral"
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 2
    d_model: int = 128
    n_experts: int = 4
    top_k: int = 2
    d_expert: int = 192  # neurons of one expert
    shared: int = 192  # neurons of the shared expert (qwen2_moe)
    aux_coef: float = 0.01  # of the load-balancing loss
    steps: int = 220
    lr: float = 1e-2
    contexts: tuple[int, ...] = (128,)
    data: str = "stdlib"  # stdlib, a text file or folder, or a hub dataset
    vocab: int = 1024  # size of the byte-level BPE trained on the text
    rows: int = 48  # held-out rows of each source to measure on
    model: str | None = None  # look into this model instead of training: a hub name or a folder
    prompt: str = 'def read(self, size):\n        """Return the next 10 bytes."""\n        return self.data[0]'


if __name__ == "__main__":
    cfg = flags(
        Config,
        __doc__,
        hpc=Config(
            n_layers=12,
            n_heads=8,
            n_kv_heads=4,
            d_model=512,
            n_experts=8,
            d_expert=1408,
            vocab=16384,
            contexts=(512,),
            tokens_per_step=131072,
            accumulate=8,
            steps=10000,
            lr=3e-3,
            autocast="on",
        ),
    )  # --hpc: an A100 with 40 GB
    device, numbers = pick_device(cfg.device), {}
    set_seed(cfg.seed)


#%% A model: trained before your eyes with its load watched, or someone's, with every tensor in its place
def name_table(model: MoE, name: str) -> list[list]:
    """For each kind of tensor: its name and ours with * for numbers, shape, dtype, how many, least and greatest norm. Every tensor must have its place."""
    star = lambda x: ".".join("*" if part.isdigit() else part for part in x.split("."))
    kinds, found = {}, {"unembed.weight"} if model.cfg.tied else set()
    for theirs, shape, dtype, norm in tensor_table(name):
        places = model.place(theirs, t.zeros(shape, device="meta"))
        kinds.setdefault(
            (star(theirs), ", ".join(dict.fromkeys(map(star, places))), "x".join(map(str, shape)), dtype), []
        ).append(norm)
        found |= set(places)
    if wrong := found ^ set(model.state_dict()):
        fail(f"{name}: {len(wrong)} tensors are missing or have no place, first {sorted(wrong)[0]}")
    return [[*kind, len(norms), min(norms), max(norms)] for kind, norms in kinds.items()]


if __name__ == "__main__":
    if cfg.model:
        print(f"{purple}=== Opening {cfg.model} ==={endc}")
        with t.device("meta"):
            model = MoE(MoE.read_config(read_config(full_name(cfg.model))))  # refuse before anything is fetched
        numbers["names"] = name_table(model, folder := str(model_folder(cfg.model)))
        print(
            tabulate(
                numbers["names"], headers=["tensor", "here", "shape", "dtype", "n", "norm from", "to"], floatfmt=".2f"
            )
        )
        wave, need = (
            2 * np.pi / rope_frequencies(model.cfg),
            sum(p.numel() for p in model.parameters()) * pick_dtype(device).itemsize,
        )
        print(
            f"{gray}W_E is embed, W_U unembed{' (tied: W_E)' * model.cfg.tied}, W_Q W_K W_V W_O attn.q k v o, W_router mlp.router, W_gate W_in W_out of an expert mlp.experts.*.gate inp out; RoPE has no tensor: base {model.cfg.rope_base:g}, a turn takes {wave[0]:.1f} to {wave[-1]:.0f} tokens{endc}"
        )
        memory = (
            t.cuda.mem_get_info()[0]
            if device.startswith("cuda")
            else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        )
        if need > 0.8 * memory:
            save_results("moe", cfg, **numbers)
            print(
                f"{yellow}{need / 1e9:.0f} GB of weights do not fit into {memory / 1e9:.0f} GB of memory: names, shapes and norms only{endc}"
            )
            raise SystemExit
        corpus, model, history = (
            load_corpus(cfg.data, tokenizer=folder),
            MoE.from_folder(folder, device, pick_dtype(device)),
            {},
        )
    else:
        print(
            f"{purple}=== Training {cfg.n_layers} layers of {cfg.n_experts} experts, top {cfg.top_k}, on {cfg.data}, seed {cfg.seed}, {device} ==={endc}"
        )
        corpus = load_corpus(cfg.data, cfg.vocab)
        sizes = dict(
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_kv_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_model // cfg.n_heads,
            d_vocab=corpus.d_vocab,
            n_ctx=max(cfg.contexts),
            rope_base=1000.0,
        )
        model = MoE(
            MoEConfig(
                **sizes,
                **SWITCHES[cfg.family],
                n_experts=cfg.n_experts,
                top_k=cfg.top_k,
                d_expert=cfg.d_expert,
                shared=cfg.shared * (cfg.family == "qwen2_moe"),
                aux_coef=cfg.aux_coef,
            ),
            corpus.tokenizer,
        ).to(device)
    shape, ctx, sources, rng = (
        model.cfg,
        min(model.cfg.n_ctx, max(cfg.contexts)),
        list(corpus.heldout),
        np.random.default_rng(10**6),
    )
    rows = t.from_numpy(
        np.concatenate(
            [
                corpus.rows(rng, cfg.rows, ctx, "heldout", {part: float(part == one) for part in sources})
                for one in sources
            ]
        )
    ).to(device)
    row_source, untrained = np.repeat(np.arange(len(sources)), cfg.rows), routing(model, rows)
    if not cfg.model:
        batch = lambda i: corpus.batch(
            np.random.default_rng((cfg.seed, i)),
            cfg.tokens_per_step // cfg.accumulate // (at := context_at(i // cfg.accumulate, cfg)),
            at,
            weights=dict.fromkeys(sources, 1.0),
        )
        watch = lambda step: {
            f"L{layer}E{e}": share
            for layer, shares in zip(model.sparse, load_of(routing(model, rows[::4]), shape.n_experts).tolist())
            for e, share in enumerate(shares)
        }
        history = train(
            model,
            batch,
            cfg,
            "moe",
            lambda forward, tokens: moe_loss(forward, tokens, shape),
            watch,
            max(1, cfg.steps // 20),
            shape=dataclasses.asdict(shape),
            data=corpus.key,
        )
        model.to_hf(folder := Path("checkpoints/moe/model"))
        first_goes_on()
        numbers |= {"train_seconds": history["seconds"], "tokens_per_second": history["tokens_per_second"]}
        print(
            f"{green}trained on {history['tokens'][-1] / 1e6:.2f}M tokens in {history['seconds']:.1f} s ({cyan}{history['tokens_per_second']:,.0f} tokens/s{green}), saved to {folder} for transformers{endc}"
        )
    experts, layers, about = (
        [f"E{e}" for e in range(shape.n_experts)],
        [f"L{layer}" for layer in model.sparse],
        f"{shape.n_layers}-layer {shape.family}, {shape.n_experts} experts, top {shape.top_k}",
    )
    panels = sorted(
        {int(i) for i in np.linspace(0, len(layers) - 1, 8)}
    )  # the layers that figures show, where there are many
    few = panels[:: -(-len(panels) // 4)]  # those that tables show, and that are worked on

#%% Gates: routing is the weighted sum of all experts with zeros for those not chosen; what a hook reads can be written back
if __name__ == "__main__":
    errors, some = [], rows[:: max(1, len(rows) // 4)][:4]
    with t.no_grad():
        logits, cache = run_with_cache(model, some)
        for layer in model.sparse:
            mlp, x = (
                model.blocks[layer].mlp,
                model.blocks[layer].ln2.weight * cache[f"blocks.{layer}.ln2.hook_normalized"],
            )
            routed, indices, weights = (
                cache[f"blocks.{layer}.mlp.hook_{part}"]
                for part in ("router_logits", "expert_indices", "expert_weights")
            )
            dense = einsum(
                t.zeros_like(routed).scatter(-1, indices, weights),
                t.stack([expert(x) for expert in mlp.experts]),
                "batch pos expert, expert batch pos d_model -> batch pos d_model",
            )
            if shape.shared:
                dense += mlp.shared_expert_gate(x).sigmoid() * mlp.shared_expert(x)
            errors.append(((dense - cache["mlp_out", layer]).abs().max() / dense.abs().max()).item())
        again = run_with_hooks(
            model,
            some,
            [
                (f"*.hook_{part}", lambda x, hook: cache[hook.name].clone())
                for part in ("router_logits", "expert_indices", "expert_weights")
            ],
        )
    replay, tolerance = (
        ((again - logits).abs().max() / logits.abs().max()).item(),
        1e-4 if logits.dtype == t.float32 else 3e-2,
    )
    assert max(*errors, replay) < tolerance, (
        f"routing misses the dense weighted sum by {max(errors)}; writing back what the router said changes the logits by {replay}"
    )
    print(
        f"{cyan}gates: routing = dense weighted sum to {max(errors):.0e}, its choices written back = the same logits to {replay:.0e} (both relative){endc}"
    )

#%% Load: how evenly the experts are used, over training and at the end
if __name__ == "__main__":
    picked, even = routing(model, rows), 1 / shape.n_experts
    chosen = picked[:, :, 1:]  # layer row pos k, without beginning-of-text
    load = load_of(chosen, shape.n_experts)
    if history:
        show(
            imshow(
                np.array([[[w[layer + expert] for w in history["watch"]] for expert in experts] for layer in layers])
                - even,
                f"Load over training: share of choices minus the even {even:.3f} ({about}; n = {rows[::4].numel()} held-out tokens)",
                "step",
                "expert",
                [w["step"] for w in history["watch"]],
                experts,
                layers,
                value="share - even",
            ),
            "moe/load_over_training",
        )
    else:
        show(
            imshow(
                load - even,
                f"Load: share of choices minus the even {even:.3f} ({about}; n = {chosen[0, ..., 0].size} held-out tokens)",
                "expert",
                "layer",
                experts,
                layers,
                value="share - even",
            ),
            "moe/load",
        )
    print(
        f"{cyan}load: the busiest expert takes {load.max() / even:.2f} times its even share, the idlest {load.min() / even:.2f} times{endc}"
    )

#%% What does the choice of expert tell? The token, its kind, its source, and the source beyond the token: bits above shuffled labels
if __name__ == "__main__":
    names, ids = str_tokens(corpus.tokenizer, range(max(shape.d_vocab, corpus.d_vocab))), rows[:, 1:].cpu().numpy()
    kinds = sorted({kind_of(name) for name in names})
    kind, source = (
        np.array([kinds.index(kind_of(name)) for name in names])[ids],
        np.repeat(row_source[:, None], ids.shape[1], 1),
    )
    asked = {"token": (ids, None, False), "kind of token": (kind, None, False)} | (
        {"source": (source, None, True), "source given token": (source, ids, True)} if len(sources) > 1 else {}
    )
    tell = lambda choices, shuffles: {
        name: [specialisation(x, labels, shape.n_experts, given, by_row, shuffles) for x in choices]
        for name, (labels, given, by_row) in asked.items()
    }
    found, before = tell(chosen, 100), {} if cfg.model else tell(untrained[:, :, 1:], 20)
    told = {name: [x["observed"] - x["mean"] for x in by_layer] for name, by_layer in found.items()}
    told_before = {
        f"{name}, untrained": [x["observed"] - x["mean"] for x in by_layer] for name, by_layer in before.items()
    }
    print(
        tabulate(
            [
                [
                    name,
                    layer,
                    x["observed"],
                    x["mean"],
                    x["bar"],
                    told[name][i],
                    *([told_before[f"{name}, untrained"][i]] if before else []),
                ]
                for name in found
                for i, (layer, x) in enumerate(zip(layers, found[name]))
            ],
            headers=["I(expert; ...)", "layer", "bits", "shuffled: mean", "99%", "above the mean", "untrained"],
            floatfmt=".3f",
        )
    )
    bars = {f"{name}, 99% of shuffles": [x["bar"] - x["mean"] for x in by_layer] for name, by_layer in found.items()}
    fig = line(
        told | bars | told_before,
        f"What the choice of expert tells: mutual information above the mean of 100 shuffles ({about}; n = {ids.size} held-out tokens)",
        "layer",
        "bits",
        model.sparse,
        markers=True,
    )
    for i, trace in enumerate(fig.data):
        trace.line = dict(color=COLORS[i % len(found)], dash=("solid", "dot", "dash")[i // len(found)])
    show(fig.update_xaxes(dtick=1), "moe/specialisation")

#%% Who goes where: each expert's share of a source or kind of token, and the tokens that prefer it
if __name__ == "__main__":
    groups = {f"source: {name}": source == i for i, name in enumerate(sources)} | {
        name: kind == i for i, name in enumerate(kinds) if (kind == i).sum() >= 50
    }
    where = (
        np.stack([load_of(chosen[:, mask], shape.n_experts) for mask in groups.values()], 2) - load[..., None]
    )  # layer expert group
    show(
        imshow(
            where[few].reshape(-1, len(groups)),
            f"Where each kind of token goes: share of its choices minus the expert's load ({about}; n = {ids.size} held-out tokens)",
            "tokens",
            "expert",
            [f"{name} ({mask.sum()})" for name, mask in groups.items()],
            [layers[i] + e for i in few for e in experts],
            value="share - load",
        ),
        "moe/who_goes_where",
    )
    seen, preferred = np.bincount(ids.ravel(), minlength=len(names)), []
    for i in sorted({few[0], few[-1]}):
        for e in load[i].argsort()[::-1][:8]:
            share = np.where(
                seen >= 20,
                np.bincount(ids.ravel(), (chosen[i, ..., 0] == e).ravel(), len(names)) / np.maximum(seen, 1),
                0,
            )
            preferred.append(
                [
                    layers[i],
                    experts[e],
                    load[i, e],
                    "  ".join(f"{visible(names[j])} {share[j]:.2f}" for j in np.lexsort((-seen, -share))[:10]),
                ]
            )
    print(
        tabulate(
            preferred,
            headers=[
                "layer",
                "expert",
                "load",
                "tokens with this first choice: share of their occurrences (seen 20 times or more)",
            ],
            floatfmt=".2f",
        )
    )

#%% One prompt: the router's probabilities and the chosen experts, token by token
if __name__ == "__main__":
    prompt = to_tokens(corpus.tokenizer, cfg.prompt).to(device)
    if prompt.shape[1] > shape.n_ctx:
        print(
            f"{yellow}--prompt has {prompt.shape[1]} tokens, more than the {shape.n_ctx} the model was made for{endc}"
        )
    with t.no_grad():
        _, cache = run_with_cache(
            model, prompt, ["*.hook_router_logits", "*.hook_expert_indices", "*.hook_expert_weights"]
        )
    probs, picks, given = (
        t.stack([cache[f"blocks.{layer}.mlp.hook_{part}"][0].float().cpu() for layer in model.sparse])
        for part in ("router_logits", "expert_indices", "expert_weights")
    )
    said = str_tokens(corpus.tokenizer, prompt[0])
    print(
        tabulate(
            [
                [
                    f"{i} {visible(token)}",
                    *(
                        " ".join(f"E{e:.0f}:{w:.2f}" for e, w in zip(picks[l, i].tolist(), given[l, i].tolist()))
                        for l in few
                    ),
                ]
                for i, token in enumerate(said[:24])
            ],
            headers=["token", *(f"{layers[l]}: experts and weights" for l in few)],
        )
    )
    hover = [
        [["chosen" if e in picks[l, i] else "" for i in range(len(said))] for e in range(shape.n_experts)]
        for l in panels
    ]
    show(
        imshow(
            probs.softmax(-1)[panels].transpose(1, 2),
            f"Router probabilities on {cfg.prompt[:60]!r} ({about})",
            "token",
            "expert",
            label_tokens(said),
            experts,
            [layers[i] for i in panels],
            diverging=False,
            value="probability",
            hover=hover,
            columns=1,
        ),
        "moe/prompt",
    )

#%% Knock an expert out, silence it, or force every token through it: what the loss does, by source
if __name__ == "__main__":
    clean, effects, scattered = token_losses(model, rows), {}, {}
    parts = lambda x: [x[row_source == i].mean().item() for i in range(len(sources))]
    for i in few:
        layer = model.sparse[i]
        with t.no_grad():
            enter = dict(start_at_layer=layer, resid=model(rows, stop_at_layer=layer))
        scattered[layers[i]] = (
            (token_losses(model, rows, [scatter(layer, shape.n_experts)], **enter) - clean).mean().item()
        )
        for e in sorted(load[i].argsort()[::-1][:8].tolist()):
            own = t.from_numpy((picked[i] == e).any(-1)[:, :-1]).to(device)
            change = {
                how.__name__: token_losses(model, rows, [how(layer, e)], **enter) - clean
                for how in (knock_out, silence, force)
            }
            effects[layers[i] + experts[e]] = {
                how: [*parts(x), x[own].mean().item(), x.mean().item()] for how, x in change.items()
            }
    columns, ways = (
        [*sources, "its own tokens", "all"],
        {
            "knock_out": "knocked out: the next best is taken",
            "silence": "silenced: chosen, writes nothing",
            "force": "forced: every token through it alone",
        },
    )
    show(
        imshow(
            np.array([[effect[how] for effect in effects.values()] for how in ways]),
            f"Loss with one expert changed, minus the loss as it is ({about}; n = {clean.numel()} predictions)",
            "tokens",
            "expert",
            columns,
            list(effects),
            list(ways.values()),
            value="nats",
            columns=3,
        ),
        "moe/knock_out",
    )
    print(
        tabulate(
            [[name, *(f"{x:+.3f}" for how in ways for x in effect[how])] for name, effect in effects.items()],
            headers=["expert", *(f"{how}: {column}" for how in ("out", "silent", "forced") for column in columns)],
        )
    )
    print(
        f"{cyan}held-out loss {', '.join(f'{name} {x:.3f}' for name, x in zip(sources, parts(clean)))} nats; with experts drawn at random in one layer {', '.join(f'{name} {x:+.3f}' for name, x in scattered.items())}{endc}"
    )

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    save_results(
        "moe",
        cfg,
        **numbers,
        dense_sum_error=max(errors),
        replay_error=replay,
        load=load,
        load_max_over_even=load.max() / even,
        heldout_loss=dict(zip(sources, parts(clean))),
        specialisation=found,
        specialisation_untrained=before,
        bits_above_shuffled=told,
        effects=effects,
        effect_columns=columns,
        random_experts=scattered,
    )
    worst = max(effects, key=lambda name: effects[name]["knock_out"][-1])
    said = f"of {np.log2(shape.n_experts / shape.top_k):.2f} bits at most, the choice of expert tells {told['token'][0]:.2f} about the token in {layers[0]}, {told['token'][-1]:.2f} in {layers[-1]}"
    beyond = [layer for layer, x in zip(layers, found.get("source given token", [])) if x["observed"] > x["bar"]]
    if "source" in found:
        said += f"; about the source at most {max(told['source']):.3f}, beyond what the token says {max(told['source given token']):.3f} ({'above 99% of shuffles in ' + ', '.join(beyond) if beyond else 'not above chance'})"
    print(
        f"{green}{said}. Without {worst} the loss rises by {effects[worst]['knock_out'][-1]:.3f} nats, with it silent by {effects[worst]['silence'][-1]:.3f}; random experts in one layer cost up to {max(scattered.values()):.3f}. Gate: routing = dense weighted sum to {max(errors):.0e}.{endc}"
    )
