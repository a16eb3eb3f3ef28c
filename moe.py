"""
A mixture of experts with every router and expert open to hooks and edits, and which expert takes which token.
Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE, equal to Hugging Face's.
The method is SparseMoE.route and .forward, its plain form dense_moe; the story begins at Settings.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# The model, the first part of this file, builds on llama_block, and uses utils, hooks, layers and weights alone.
from utils import (  # first: sets OpenMP's variables before torch is loaded
    Count,
    Natural,
    NotNegative,
    cyan,
    endc,
    fail,
    gray,
    green,
    pick_device,
    purple,
    save_results,
    set_seed,
)
from hooks import Cache, HookPoint, run_with_cache, run_with_hooks
from layers import next_token_loss
from llama_block import Llama, LlamaConfig, SwiGLU, read_llama_config, write_llama_config
from weights import open_with_all_hooks

from information import mutual_information
from data import bos_id, kind_of, load_corpus, refuse_empty, str_tokens
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
from plots import COLORS, imshow, label_tokens, line, plain, show, visible
from train import TrainConfig, context_at, first_goes_on, train

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from scipy.sparse import csr_matrix
from tabulate import tabulate
from torch import Tensor


#%% The shape: Llama's, with experts in place of the MLP
# what makes it which architecture; fixed: what that architecture cannot have otherwise
SWITCHES = {
    "mixtral": {"architecture": "MixtralForCausalLM", "qk_norm": "none", "norm_topk": True},
    "qwen2_moe": {"architecture": "Qwen2MoeForCausalLM", "qk_norm": "none", "norm_topk": False, "qkv_bias": True},
    "qwen3_moe": {"architecture": "Qwen3MoeForCausalLM", "qk_norm": "head", "norm_topk": True},
    "olmoe": {"architecture": "OlmoeForCausalLM", "qk_norm": "full", "norm_topk": False},
}


@dataclass
class MoEConfig(LlamaConfig):
    n_layers: int = 3
    n_experts: Count = 4
    top_k: int = 2
    d_expert: int = 192  # neurons of one expert
    norm_topk: bool = True  # the k weights of a token sum to one
    shared: int = 0  # Qwen2-MoE: neurons of an expert that sees every token, after a sigmoid gate
    dense: tuple[int, ...] = ()  # Qwen: layers that have one SwiGLU of d_mlp neurons instead
    aux_coef: float = 0.01  # of the load-balancing loss
    architecture: str = "MixtralForCausalLM"

    def __post_init__(self):
        super().__post_init__()
        family = self.family
        if not 1 <= self.top_k <= self.n_experts:
            fail(f"top_k {self.top_k} is not between 1 and n_experts {self.n_experts}")
        if bool(self.shared) != (family == "qwen2_moe"):
            fail(f"shared {self.shared}: Qwen2-MoE has a shared expert, the others have none ({family})")
        if self.qk_norm != SWITCHES[family]["qk_norm"]:
            fail(f"{family} has qk_norm {SWITCHES[family]['qk_norm']}, not {self.qk_norm}")
        if family == "mixtral" and not self.norm_topk:
            fail("norm_topk is True in Mixtral: its k weights sum to one")
        if self.dense and not family.startswith("qwen"):
            fail(f"{family} has experts in every layer: dense is empty")
        if len(self.dense) == self.n_layers:
            fail("no layer has experts: llama_block.py builds dense models")
        if not family.startswith("qwen"):
            self.d_mlp = self.d_expert

    @property
    def family(self) -> str:
        for name, switches in SWITCHES.items():
            if switches["architecture"] == self.architecture:
                return name
        fail(f"architecture {self.architecture} is not built here (built: {', '.join(MoE.architectures)})")


#%% The layer: router logits -> top k -> each expert runs on its own tokens -> weighted sum
# An expert's hooks hold (token, d_expert): the tokens routed to it, in the order of batch and position, no row where
# none comes.
ExpertFFN = SwiGLU


def router_probs(router_logits: Tensor) -> Tensor:
    """(..., expert) probabilities of router logits (..., expert), in float32 whatever the model's dtype."""
    return router_logits.softmax(-1, dtype=t.float32)


def choose_experts(probs: Tensor, top_k: int) -> Tensor:
    """(..., k) the most probable experts of probs (..., expert), best first."""
    return probs.topk(top_k).indices


class SparseMoE(nn.Module):
    """
    What the hooks hold, and what an edit of each does:
    hook_router_logits (batch, pos, expert): the experts are ranked anew;
    hook_expert_indices (batch, pos, k): the new choice is weighted by the router's probabilities of it (k may change);
    hook_expert_weights (batch, pos, k): they stand as they are given;
    hook_shared_gate (batch, pos, 1), of Qwen2-MoE alone: the shared expert's output is multiplied with it.
    """

    def __init__(self, cfg: MoEConfig):
        super().__init__()
        self.top_k = cfg.top_k
        self.norm_topk = cfg.norm_topk
        self.router = nn.Linear(cfg.d_model, cfg.n_experts, bias=False)
        self.experts = nn.ModuleList(ExpertFFN(cfg.d_model, cfg.d_expert) for _ in range(cfg.n_experts))
        self.hook_router_logits = HookPoint()
        self.hook_expert_indices = HookPoint()
        self.hook_expert_weights = HookPoint()
        self.has_shared = cfg.shared > 0
        if self.has_shared:
            self.shared_expert = SwiGLU(cfg.d_model, cfg.shared)
            self.shared_expert_gate = nn.Linear(cfg.d_model, 1, bias=False)
            self.hook_shared_gate = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        """
        What the layer adds to the stream, (batch, pos, d_model) as x.
        Shapes below: B batch, P pos, N = B * P tokens, D d_model, E experts, K choices of a token.
        """
        indices, weights = self.route(x)  # (B, P, K) both
        k = indices.shape[-1]
        tokens = x.flatten(0, 1)  # (N, D)
        choices = indices.flatten()  # (N * K): choice c is one of the k of token c // k
        load = choices.bincount(minlength=len(self.experts)).tolist()  # (E): choices that fall on each expert
        by_expert = choices.argsort(stable=True).split(load)  # E groups of choices, in the order of the tokens
        out = t.zeros_like(tokens)  # (N, D)
        for expert, its_choices in zip(self.experts, by_expert, strict=True):
            its_tokens = its_choices // k
            its_weights = weights.flatten()[its_choices, None]  # (its tokens, 1)
            written = expert(tokens[its_tokens]) * its_weights  # (its tokens, D)
            out.index_add_(0, its_tokens, written.to(out.dtype))
        out = out.view_as(x)  # (B, P, D)
        if self.has_shared:
            gate = self.hook_shared_gate(self.shared_expert_gate(x).sigmoid())  # (B, P, 1)
            out = out + gate * self.shared_expert(x)
        return out

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts of each token and their weights, (batch, pos, k) both."""
        router_logits = self.hook_router_logits(self.router(x))  # (batch, pos, expert)
        probs = router_probs(router_logits)
        # noise or another rule goes here, not into choose_experts, which the loss and dense_moe call again
        indices = self.hook_expert_indices(choose_experts(probs, self.top_k))
        weights = probs.gather(-1, indices)
        if self.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        return indices, self.hook_expert_weights(weights.to(x.dtype))


def dense_moe(layer: SparseMoE, x: Tensor) -> Tensor:
    """
    The plain form of SparseMoE.forward: (batch, pos, d_model) of x (batch, pos, d_model).
    Every expert runs on every token, weighted by zero where it was not chosen (Shazeer et al. 2017, eq. 2).
    """
    indices, chosen_weights = layer.route(x)
    weights = x.new_zeros(*x.shape[:-1], len(layer.experts))  # (batch, pos, expert)
    weights.scatter_(-1, indices, chosen_weights)
    written = t.stack([expert(x) for expert in layer.experts], -2)  # (batch, pos, expert, d_model)
    out = einsum(weights, written, "batch pos expert, batch pos expert d_model -> batch pos d_model")
    if layer.has_shared:
        out = out + layer.shared_expert_gate(x).sigmoid() * layer.shared_expert(x)
    return out


def load_balancing_loss(router_logits: list[Tensor], top_k: int) -> Tensor:
    """
    n_experts * sum over experts of (choices per token) * (mean probability): top_k where the experts are used evenly
    (Switch Transformer, eq. 4-6).
    router_logits: one (batch, pos, expert) a layer; the tokens of all layers are pooled.
    """
    pooled = t.cat([logits.flatten(0, -2) for logits in router_logits])  # (token, expert)
    n_experts = pooled.shape[-1]
    probs = router_probs(pooled)
    chosen = choose_experts(probs, top_k)  # (token, k)
    choices = F.one_hot(chosen, n_experts).sum(1).float()  # (token, expert): 1 where chosen
    return n_experts * (choices.mean(0) * probs.mean(0)).sum()


def moe_loss(model: nn.Module, tokens: Tensor, cfg: MoEConfig) -> Tensor:
    """
    () next-token loss in nats + aux_coef * the mean over layers of the load-balancing loss.
    Each layer is balanced by itself: where layers are pooled, as in transformers, an expert idle in one is made up for
    by its namesake in another.
    """
    logits, cache = run_with_cache(model, tokens, "*.hook_router_logits", detach=False)
    by_layer = [load_balancing_loss([router_logits], cfg.top_k) for router_logits in cache.values()]
    return next_token_loss(logits, tokens) + cfg.aux_coef * t.stack(by_layer).mean()


#%% The model: Llama with experts
class MoE(Llama):
    architectures = tuple(switches["architecture"] for switches in SWITCHES.values())

    def make_mlp(self, layer: int) -> nn.Module:
        if layer in self.cfg.dense:
            return SwiGLU(self.cfg.d_model, self.cfg.d_mlp)
        return SparseMoE(self.cfg)

    @property
    def sparse(self) -> list[int]:
        return [layer for layer in range(self.cfg.n_layers) if layer not in self.cfg.dense]

    @classmethod
    def read_config(cls, hf: dict) -> MoEConfig:
        return read_moe_config(hf, cls.architectures)

    def write_config(self) -> dict:
        return write_moe_config(self.cfg, bos_id(self.tokenizer) if self.tokenizer else None)

    def hf_tensors(self) -> dict[str, Tensor]:
        """In files each expert stands by itself."""
        names = MIXTRAL if self.cfg.family == "mixtral" else {"gate": "router"}
        tensors = super().hf_tensors()
        for theirs, usual in names.items():
            tensors = {name.replace(f".{usual}.", f".{theirs}."): x for name, x in tensors.items()}
        return tensors

    def place(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """A file's tensor is one expert's, a transformers model's in memory (three axes) holds all experts'."""
        for theirs, usual in MIXTRAL.items():
            name = name.replace(f".{theirs}.", f".{usual}.")
        if x.ndim < 3:
            return super().place(name, x)
        room, kind = name.rsplit(".", 1)
        if kind not in STACKED:
            fail(f"tensor {name} of shape {tuple(x.shape)} has no place in {self.cfg.architecture}")
        parts = STACKED[kind]
        placed = {}
        for expert, its_weights in enumerate(x):
            for part, piece in zip(parts, its_weights.chunk(len(parts))):
                placed |= super().place(f"{room}.{expert}.{part}.weight", piece)
        return placed


#%% Hugging Face's words, beyond Llama's
MIXTRAL = {"gate": "router", "block_sparse_moe": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # tensors of all experts, in memory


def layer_slides(hf: dict, layer: int) -> bool:
    """Whether a layer of Qwen's sees a window only, where config.json does not list its layer_types."""
    name = (hf.get("architectures") or ["unknown"])[0]
    if not hf.get("use_sliding_window"):
        return False
    if name == "Qwen2MoeForCausalLM":
        return layer % 2 == 0 and layer < hf.get("max_window_layers", 28)
    return name == "Qwen3MoeForCausalLM"


def layer_is_dense(hf: dict, layer: int) -> bool:
    """Whether a layer of Qwen's has one MLP in the place of experts."""
    if not hf["architectures"][0].startswith("Qwen"):
        return False
    listed = layer in (hf.get("mlp_only_layers") or [])
    between = (layer + 1) % hf.get("decoder_sparse_step", 1) != 0
    return listed or between


def read_moe_config(hf: dict, architectures: tuple[str, ...]) -> MoEConfig:
    if hf.get("clip_qkv"):
        fail("clip_qkv of OLMoE is not built here")
    layers = range(hf.get("num_hidden_layers", 0))
    kinds = ["sliding_attention" if layer_slides(hf, layer) else "full_attention" for layer in layers]
    shape = read_llama_config({"layer_types": kinds} | hf, architectures)
    return MoEConfig(
        **shape,
        n_experts=hf.get("num_experts") or hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        d_expert=hf.get("moe_intermediate_size") or hf["intermediate_size"],
        shared=hf.get("shared_expert_intermediate_size", 0),
        norm_topk=hf.get("norm_topk_prob", shape["architecture"] == "MixtralForCausalLM"),
        dense=tuple(layer for layer in layers if layer_is_dense(hf, layer)),
        aux_coef=hf.get("router_aux_loss_coef", 0.001),
    )


def write_moe_config(cfg: MoEConfig, bos: int | None) -> dict:
    """config.json for transformers."""
    hf = write_llama_config(cfg) | {
        "model_type": cfg.family,
        "num_experts_per_tok": cfg.top_k,
        "router_aux_loss_coef": cfg.aux_coef,
        "output_router_logits": False,
        "bos_token_id": bos,
        "eos_token_id": bos,
        "pad_token_id": None,
    }
    if cfg.family == "mixtral":
        hf["num_local_experts"] = cfg.n_experts
    else:
        hf |= {"num_experts": cfg.n_experts, "norm_topk_prob": cfg.norm_topk}
    if cfg.family.startswith("qwen"):
        hf |= {"moe_intermediate_size": cfg.d_expert, "mlp_only_layers": list(cfg.dense), "decoder_sparse_step": 1}
    if cfg.family == "qwen2_moe":
        hf |= {"shared_expert_intermediate_size": cfg.shared, "qkv_bias": cfg.qkv_bias}
    return hf


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
    """
    How many bits the choice of expert tells about a label, I(expert; label [| given]), beside what chance gives:
    {'observed', 'mean' and 'bar' of shuffled labels: what a finite sample gives by itself, and its 99th percentile}.
    choices (row, pos, k); labels and given (row, pos).
    by_row: whole rows are shuffled, for labels that all tokens of a row share.
    """
    rng = np.random.default_rng(seed)
    flat = choices.reshape(-1, choices.shape[-1])
    n_labels = int(labels.max()) + 1
    condition = np.zeros_like(labels) if given is None else given
    base = bits(flat, condition.ravel(), n_experts)

    def measure(label: np.ndarray) -> float:
        """I(expert; label | condition) = I(expert; condition and label) - I(expert; condition)."""
        both = condition * n_labels + label
        return bits(flat, both.ravel(), n_experts) - base

    def shuffled() -> np.ndarray:
        if by_row:
            return rng.permutation(labels)
        return rng.permutation(labels.ravel()).reshape(labels.shape)

    by_chance = [measure(shuffled()) for draw in range(shuffles)]
    return {
        "observed": measure(labels),
        "mean": float(np.mean(by_chance)),
        "bar": float(np.quantile(by_chance, 0.99)),
    }


def about_shape(model: MoE) -> str:
    shape = model.cfg
    return f"{shape.n_layers}-layer {shape.family}, {shape.n_experts} experts, top {shape.top_k}"


@t.no_grad()
def routing(model: MoE, rows: Tensor) -> np.ndarray:
    """Chosen experts (layer, row, pos, k) of the sparse layers, best first."""
    _, cache = run_with_cache(model, rows, "*.hook_expert_indices")
    return np.stack([indices.cpu().numpy() for indices in cache.values()])


def load_of(chosen: np.ndarray, n_experts: int) -> np.ndarray:
    """Share of the choices (layer, row, pos, k) that fall on each expert: (layer, expert)."""
    return np.stack([np.bincount(layer.ravel(), minlength=n_experts) / layer.size for layer in chosen])


@t.no_grad()
def token_losses(model: MoE, rows: Tensor, fwd_hooks: list[tuple] = (), **enter) -> Tensor:
    """(row, pos - 1) nats of every token but the first."""
    return next_token_loss(run_with_hooks(model, rows, list(fwd_hooks), **enter), rows, reduction="none")


#%% What can be done to an expert, as (hook name, hook)
def knock_out(layer: int, expert: int) -> tuple[str, Callable]:
    """The router cannot choose it, and the next best is taken."""

    def never(router_logits: Tensor, hook: HookPoint) -> Tensor:
        return router_logits.index_fill(-1, t.tensor([expert], device=router_logits.device), -t.inf)

    return f"blocks.{layer}.mlp.hook_router_logits", never


def silence(layer: int, expert: int) -> tuple[str, Callable]:
    """It is chosen and writes nothing."""

    def nothing(post: Tensor, hook: HookPoint) -> Tensor:
        return t.zeros_like(post)

    return f"blocks.{layer}.mlp.experts.{expert}.hook_post", nothing


def force(layer: int, expert: int) -> tuple[str, Callable]:
    """Every token goes to it alone."""

    def always(indices: Tensor, hook: HookPoint) -> Tensor:
        return t.full_like(indices[..., :1], expert)

    return f"blocks.{layer}.mlp.hook_expert_indices", always


def scatter(layer: int, n_experts: int, seed: int = 0) -> tuple[str, Callable]:
    """Every token goes to k experts at random."""

    def at_random(indices: Tensor, hook: HookPoint) -> Tensor:
        generator = t.Generator().manual_seed(seed)
        order = t.rand(*indices.shape[:-1], n_experts, generator=generator).argsort(-1)
        return order[..., : indices.shape[-1]].to(indices.device)

    return f"blocks.{layer}.mlp.hook_expert_indices", at_random


#%% One prompt through the routers
@dataclass
class Routed:
    """What the routers of the sparse layers say of a prompt's tokens, on the CPU."""

    layers: list[str]
    experts: list[str]
    router_logits: Tensor  # (layer, pos, expert)
    probs: Tensor  # (layer, pos, expert)
    chosen: Tensor  # (layer, pos, k), best first
    weights: Tensor  # (layer, pos, k)

    @property
    def load(self) -> np.ndarray:
        """(layer, expert) how many of the tokens' choices fall on each expert."""
        n_experts = len(self.experts)
        return np.stack([np.bincount(layer.flatten().numpy(), minlength=n_experts) for layer in self.chosen])


ROUTERS = ("*.hook_router_logits", "*.hook_expert_indices", "*.hook_expert_weights")


def route_prompt(model: MoE, cache: Cache) -> Routed:
    """From the cache of a run on a prompt (1, pos). Gate: the experts chosen are those of the largest router logits."""

    def of_layers(part: str) -> Tensor:
        return t.stack([cache[f"blocks.{layer}.mlp.hook_{part}"][0] for layer in model.sparse]).cpu()

    router_logits = of_layers("router_logits").float()
    chosen = of_layers("expert_indices")
    least_chosen = router_logits.gather(-1, chosen).amin(-1)
    passed_over = router_logits.scatter(-1, chosen, -t.inf).amax(-1)
    assert (least_chosen >= passed_over).all(), "an expert was chosen over one with a larger router logit"
    return Routed(
        layers=[f"L{layer}" for layer in model.sparse],
        experts=[f"E{expert}" for expert in range(model.cfg.n_experts)],
        router_logits=router_logits,
        probs=router_probs(router_logits),
        chosen=chosen,
        weights=of_layers("expert_weights").float(),
    )


def evenly(n: int, most: int) -> list[int]:
    """At most so many of n layers, from the first to the last."""
    return sorted({int(i) for i in np.linspace(0, n - 1, most)})


def routing_headers(routed: Routed) -> list[str]:
    return ["token", *(f"{routed.layers[i]}: weight (logit, p)" for i in evenly(len(routed.layers), 4))]


def routing_table(routed: Routed, tokens: list[str], most: int = 24) -> list[list[str]]:
    """A row for each of the first tokens, a column for at most four layers: its experts, best first."""
    rows = []
    for position, token in enumerate(tokens[:most]):
        row = [f"{position} {visible(token)}"]
        for i in evenly(len(routed.layers), 4):
            said = []
            for expert, weight in zip(routed.chosen[i, position].tolist(), routed.weights[i, position].tolist()):
                logit = routed.router_logits[i, position, expert]
                p = routed.probs[i, position, expert]
                said.append(f"E{expert} {weight:.2f} ({logit:.2f}, {p:.2f})")
            row.append("  ".join(said))
        rows.append(row)
    return rows


def load_table(routed: Routed) -> list[list]:
    """A row for each layer: how many of the prompt's choices fall on each expert."""
    return [[layer, *counts] for layer, counts in zip(routed.layers, routed.load.tolist())]


def routing_numbers(routed: Routed) -> dict:
    """For results/moe.json, of all layers and tokens."""
    return {
        "layers": routed.layers,
        "router_logits": routed.router_logits,
        "probabilities": routed.probs,
        "experts": routed.chosen,
        "weights": routed.weights,
        "load": routed.load,
    }


def show_routing(routed: Routed, tokens: list[str], about: str) -> None:
    """figs/moe/prompt (probabilities), prompt_logits, prompt_weights (0 where an expert is not chosen) and prompt_load."""
    panels = evenly(len(routed.layers), 32)
    chosen_weights = t.zeros_like(routed.probs).scatter(-1, routed.chosen, routed.weights)  # (layer, pos, expert)
    maps = {
        "prompt": (routed.probs, "Router probabilities", "probability"),
        "prompt_logits": (routed.router_logits, "Router logits", "logit"),
        "prompt_weights": (chosen_weights, "Weights of the chosen experts, 0 where one is not chosen,", "weight"),
    }
    for name, (by_token, what, value) in maps.items():
        fig = imshow(
            by_token[panels].transpose(1, 2),
            f"{what} on {about}",
            xlabel="token",
            ylabel="expert",
            x=label_tokens(tokens),
            y=routed.experts,
            panels=[routed.layers[i] for i in panels],
            diverging=value == "logit",
            value=value,
            columns=1,
        )
        show(
            fig,
            f"moe/{name}",
            "A row for each expert, a column for each token, a panel for each layer.",
        )
    fig = imshow(
        routed.load,
        f"Load by expert: choices of {len(tokens)} tokens, {routed.chosen.shape[-1]} each, on {about}",
        xlabel="expert",
        ylabel="layer",
        x=routed.experts,
        y=routed.layers,
        diverging=False,
        value="choices",
    )
    show(
        fig,
        "moe/prompt_load",
        "How often each expert was chosen in this prompt; even would be the same everywhere.",
    )


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config(TrainConfig):
    family: Literal["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"] = "mixtral"  # whose routing, norms and shared experts
    n_layers: Count = 3  # blocks
    n_heads: Count = 4  # attention heads of a block
    n_kv_heads: Count = 2  # heads of keys and values, which n_heads share
    d_model: Count = 128  # width of the residual stream
    n_experts: Count = 4  # experts of a block
    top_k: Count = 2  # experts that a token goes to
    d_expert: Count = 192  # neurons of one expert
    shared: Natural = 192  # neurons of the shared expert (qwen2_moe)
    aux_coef: NotNegative = 0.01  # of the load-balancing loss
    steps: Natural = 220
    lr: NotNegative = 1e-2
    contexts: tuple[Count, ...] = (128,)
    data: str = "stdlib"  # stdlib, a text file or folder, or a hub dataset
    vocab: Count = 1024  # size of the byte-level BPE trained on the text
    rows: Count = 48  # held-out rows of each source to measure on
    model: str | None = None  # look into this model instead of training: a hub name or a folder
    offload: Literal["auto", "on", "off"] = "auto"  # its weights come from disk: where they do not fit, always, never
    bos: bool | None = None  # put a beginning-of-text token first; default as that model's own tokenizer says
    # a text to look at
    prompt: str = 'def read(self, size):\n        """Return the next 10 bytes."""\n        return self.data[0]'


# --hpc: an A100 with 40 GB
HPC = Config(
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
)

if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=HPC)
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    refuse_empty(cfg.prompt)
    numbers: dict = {}
    history: dict = {}


#%% Someone's model, whatever its kind and size: which of its tensors is which part, then every one of them
if __name__ == "__main__" and cfg.model:
    legend = read_legend(cfg.model)
    print_legend(legend)
    show_head_norms(legend, "moe")
    numbers |= legend_numbers(legend)
    save_results("moe", cfg, **numbers)  # they stand, whether the model opens or not
    model = open_with_all_hooks(cfg.model, MoE, cfg.device, offload=cfg.offload, bos=cfg.bos)

#%% Without --model, one is trained before your eyes
if __name__ == "__main__" and not cfg.model:
    print(
        f"{purple}=== Training {cfg.n_layers} layers of {cfg.n_experts} experts, top {cfg.top_k}, on {cfg.data}, "
        f"seed {cfg.seed}, {device} ==={endc}"
    )
    corpus = load_corpus(cfg.data, cfg.vocab)
    sizes = MoEConfig(
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_kv_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_model // cfg.n_heads,
        d_vocab=corpus.d_vocab,
        n_ctx=max(256, *cfg.contexts),
        rope_base=1000.0,
        n_experts=cfg.n_experts,
        top_k=cfg.top_k,
        d_expert=cfg.d_expert,
        shared=cfg.shared if cfg.family == "qwen2_moe" else 0,
        aux_coef=cfg.aux_coef,
        **SWITCHES[cfg.family],
    )
    model = MoE(sizes, corpus.tokenizer).to(device)

#%% Held-out rows of each source, and how the untrained router spreads them
if __name__ == "__main__" and (not cfg.model or is_whole(model, MoE)):
    shape = model.cfg
    if cfg.model:
        corpus = load_corpus(cfg.data, tokenizer=str(model.folder), bos=cfg.bos)
    context = min(shape.n_ctx, max(cfg.contexts))
    sources = list(corpus.heldout)
    rng = np.random.default_rng(10**6)
    by_source = []
    for source_name in sources:
        only = {part: float(part == source_name) for part in sources}
        by_source.append(corpus.rows(rng, cfg.rows, context, "heldout", only))
    rows = t.from_numpy(np.concatenate(by_source)).to(device)
    row_source = np.repeat(np.arange(len(sources)), cfg.rows)
    untrained = routing(model, rows)
    experts = [f"E{expert}" for expert in range(shape.n_experts)]
    layers = [f"L{layer}" for layer in model.sparse]
    about = about_shape(model)
    few_layers = evenly(len(layers), 4)  # of the sparse layers, whose experts are changed

#%% Training, its load watched
if __name__ == "__main__" and not cfg.model:

    def batch(i: int) -> Tensor:
        n_pos = context_at(i // cfg.accumulate, cfg)
        n_rows = cfg.tokens_per_step // cfg.accumulate // n_pos
        return corpus.batch(np.random.default_rng((cfg.seed, i)), n_rows, n_pos, weights=dict.fromkeys(sources, 1.0))

    def watch_load(step: int) -> dict[str, float]:
        load = load_of(routing(model, rows[::4]), shape.n_experts)
        return {layers[i] + experts[expert]: float(share) for (i, expert), share in np.ndenumerate(load)}

    def loss(forward: nn.Module, tokens: Tensor) -> Tensor:
        return moe_loss(forward, tokens, shape)

    history = train(
        model,
        batch,
        cfg,
        "moe",
        loss,
        watch_load,
        max(1, cfg.steps // 20),
        shape=dataclasses.asdict(shape),
        data=corpus.key,
    )
    folder = Path("checkpoints/moe/model")
    model.to_hf(folder)
    first_goes_on()
    numbers |= {"train_seconds": history["seconds"], "tokens_per_second": history["tokens_per_second"]}
    print(
        f"{green}trained on {history['tokens'][-1] / 1e6:.2f}M tokens in {history['seconds']:.1f} s "
        f"({cyan}{history['tokens_per_second']:,.0f} tokens/s{green}), saved to {folder} for transformers{endc}"
    )

#%% The prompt: its tokens, what comes next, and where the output of each part lies in the stream
if __name__ == "__main__":
    story = tell_prompt(model, cfg.prompt, also=ROUTERS if isinstance(model, MoE) else ())
    print_prompt(story, model)
    numbers |= prompt_numbers(story)

#%% ... as bars, and as a map of every two parts
if __name__ == "__main__":
    show_prompt(story, "the model trained here" if not cfg.model else Path(cfg.model).name, "moe")

#%% ... and through the routers: logits, probabilities and chosen experts of every token, by layer; load by expert
if __name__ == "__main__" and isinstance(model, MoE):
    routed = route_prompt(model, story.parts.cache)
    print(tabulate(routing_table(routed, story.texts), headers=routing_headers(routed)))
    print(tabulate(load_table(routed), headers=["layer", *routed.experts]))
    numbers["prompt_routing"] = routing_numbers(routed)

#%% ... as maps of experts and tokens
if __name__ == "__main__" and isinstance(model, MoE):
    show_routing(routed, story.texts, f"{plain(repr(cfg.prompt[:60]))} ({about_shape(model)})")

#%% Of a model that is not built here, or whose weights do not fit into memory, that is all
if __name__ == "__main__" and not is_whole(model, MoE):
    save_results("moe", cfg, **numbers)
    routers = "" if isinstance(model, MoE) else "its routers are not open here, and "
    print(f"{gray}{why_not_whole(model, MoE)}: {routers}the cells below, on a mixture in memory, are left out{endc}")
    print(f"{green}{conclude_prompt(story)}{endc}")
    raise SystemExit

#%% Gates: the output is the weighted sum of all experts, zero for those not chosen, whatever the rule that chose them
if __name__ == "__main__":
    some = rows[:: max(1, len(rows) // 4)][:4]
    with t.no_grad():
        logits, cache = run_with_cache(model, some)
        dense_errors = []
        for layer in model.sparse:
            x = model.blocks[layer].ln2.weight * cache[f"blocks.{layer}.ln2.hook_normalized"]
            dense = dense_moe(model.blocks[layer].mlp, x)
            dense_errors.append(((dense - cache["mlp_out", layer]).abs().max() / dense.abs().max()).item())

        def write_back(x: Tensor, hook: HookPoint) -> Tensor:
            return cache[hook.name].clone()

        parts = ("router_logits", "expert_indices", "expert_weights")
        again = run_with_hooks(model, some, [(f"*.hook_{part}", write_back) for part in parts])
    replay_error = ((again - logits).abs().max() / logits.abs().max()).item()
    tolerance = 1e-4 if logits.dtype == t.float32 else 3e-2
    assert max(*dense_errors, replay_error) < tolerance, (
        f"routing misses the dense weighted sum by {max(dense_errors)}; writing back what the router said changes the "
        f"logits by {replay_error}"
    )
    print(
        f"{cyan}gates: routing = dense weighted sum to {max(dense_errors):.0e}, its choices written back = the same "
        f"logits to {replay_error:.0e} (both relative){endc}"
    )

#%% Load: how evenly the experts are used
if __name__ == "__main__":
    even = 1 / shape.n_experts
    picked = routing(model, rows)  # (layer, row, pos, k)
    chosen = picked[:, :, 1:]  # without beginning-of-text
    load = load_of(chosen, shape.n_experts)  # (layer, expert)
    print(
        f"{cyan}load: the busiest expert takes {load.max() / even:.2f} times its even share, the idlest "
        f"{load.min() / even:.2f} times{endc}"
    )

#%% ... over training
if __name__ == "__main__" and history:
    over_training = [[[seen[layer + expert] for seen in history["watch"]] for expert in experts] for layer in layers]
    fig = imshow(
        np.array(over_training) - even,
        f"Load over training: share of choices minus the even {even:.3f} "
        f"({about}; n = {rows[::4].numel()} held-out tokens)",
        xlabel="step",
        ylabel="expert",
        x=[seen["step"] for seen in history["watch"]],
        y=experts,
        panels=layers,
        value="share - even",
    )
    show(
        fig,
        "moe/load_over_training",
        "Blue experts are chosen more than their even share, red ones less; the balancing loss pulls both to white.",
    )

#%% ... or of a model that was trained elsewhere
if __name__ == "__main__" and not history:
    fig = imshow(
        load - even,
        f"Load: share of choices minus the even {even:.3f} ({about}; n = {chosen[0, ..., 0].size} held-out tokens)",
        xlabel="expert",
        ylabel="layer",
        x=experts,
        y=layers,
        value="share - even",
    )
    show(
        fig,
        "moe/load",
        "Blue experts are chosen more than their even share, red ones less.",
    )


#%% What does the choice of expert tell? The token, its kind, its source, and the source beyond the token
@dataclass
class Question:
    """Labels (row, pos) of which the choice of expert may tell, beyond what `given` tells."""

    labels: np.ndarray
    given: np.ndarray | None = None
    by_row: bool = False  # whole rows share a label


def answers(
    questions: dict[str, Question], choices: np.ndarray, n_experts: int, shuffles: int
) -> dict[str, list[dict]]:
    """specialisation of each question in each layer of choices (layer, row, pos, k)."""
    found = {}
    for name, question in questions.items():
        found[name] = [
            specialisation(layer, question.labels, n_experts, question.given, question.by_row, shuffles)
            for layer in choices
        ]
    return found


def above_mean(by_layer: list[dict[str, float]], key: str = "observed") -> list[float]:
    """Bits above what shuffled labels give on average."""
    return [bits_of[key] - bits_of["mean"] for bits_of in by_layer]


if __name__ == "__main__":
    names = str_tokens(corpus.tokenizer, range(max(shape.d_vocab, corpus.d_vocab)))
    ids = rows[:, 1:].cpu().numpy()  # (row, pos)
    kinds = sorted({kind_of(name) for name in names})
    kind = np.array([kinds.index(kind_of(name)) for name in names])[ids]
    source = np.repeat(row_source[:, None], ids.shape[1], 1)
    questions = {"token": Question(ids), "kind of token": Question(kind)}
    if len(sources) > 1:
        questions["source"] = Question(source, by_row=True)
        questions["source given token"] = Question(source, given=ids, by_row=True)
    found = answers(questions, chosen, shape.n_experts, shuffles=100)
    before = {} if cfg.model else answers(questions, untrained[:, :, 1:], shape.n_experts, shuffles=20)
    told = {name: above_mean(by_layer) for name, by_layer in found.items()}
    told_before = {f"{name}, untrained": above_mean(by_layer) for name, by_layer in before.items()}
    table = []
    for name, by_layer in found.items():
        for i, layer in enumerate(layers):
            row = [name, layer, by_layer[i]["observed"], by_layer[i]["mean"], by_layer[i]["bar"], told[name][i]]
            if before:
                row.append(told_before[f"{name}, untrained"][i])
            table.append(row)
    headers = ["I(expert; ...)", "layer", "bits", "shuffled: mean", "99%", "above the mean", "untrained"]
    print(tabulate(table, headers=headers[: len(table[0])], floatfmt=".3f"))

#%% ... bits above shuffled labels, by layer; dotted what chance alone reaches, dashed the untrained model
if __name__ == "__main__":
    bars = {f"{name}, 99% of shuffles": above_mean(by_layer, "bar") for name, by_layer in found.items()}
    fig = line(
        told | bars | told_before,
        "What the choice of expert tells: mutual information above the mean of 100 shuffles "
        f"({about}; n = {ids.size} held-out tokens)",
        xlabel="layer",
        ylabel="bits",
        x=model.sparse,
        markers=True,
    )
    for i, trace in enumerate(fig.data):
        trace.line = {"color": COLORS[i % len(found)], "dash": ("solid", "dot", "dash")[i // len(found)]}
    fig.update_xaxes(dtick=1)
    show(
        fig,
        "moe/specialisation",
        "How much a token's kind says about its expert, beyond what shuffled labels give.",
    )


#%% Who goes where: each expert's share of a source or kind of token, and the tokens that prefer it
def first_choice_share(
    first: np.ndarray, ids: np.ndarray, expert: int, n_tokens: int, at_least: int = 20
) -> np.ndarray:
    """Of each token seen at_least times: the share of its occurrences whose first choice is the expert."""
    seen = np.bincount(ids.ravel(), minlength=n_tokens)
    came = np.bincount(ids.ravel(), (first == expert).ravel(), n_tokens)
    return np.where(seen >= at_least, came / np.maximum(seen, 1), 0)


if __name__ == "__main__":
    groups = {f"source: {name}": source == i for i, name in enumerate(sources)}
    for i, name in enumerate(kinds):
        if (kind == i).sum() >= 50:
            groups[name] = kind == i
    load_by_group = np.stack([load_of(chosen[:, mask], shape.n_experts) for mask in groups.values()], 2)
    where = load_by_group - load[..., None]  # (layer, expert, group)
    seen = np.bincount(ids.ravel(), minlength=len(names))
    preferred = []
    for i in sorted({few_layers[0], few_layers[-1]}):
        for expert in load[i].argsort()[::-1][:8]:
            share = first_choice_share(chosen[i, ..., 0], ids, expert, len(names))
            best = np.lexsort((-seen, -share))[:10]
            words = "  ".join(f"{visible(names[token])} {share[token]:.2f}" for token in best)
            preferred.append([layers[i], experts[expert], load[i, expert], words])
    first_choices = "tokens with this first choice: share of their occurrences (seen 20 times or more)"
    headers = ["layer", "expert", "load", first_choices]
    print(tabulate(preferred, headers=headers, floatfmt=".2f"))

#%% ... as a map of experts and kinds of token
if __name__ == "__main__":
    fig = imshow(
        where[few_layers].reshape(-1, len(groups)),
        "Where each kind of token goes: share of its choices minus the expert's load "
        f"({about}; n = {ids.size} held-out tokens)",
        xlabel="tokens",
        ylabel="expert",
        x=[f"{name} ({mask.sum()})" for name, mask in groups.items()],
        y=[layers[i] + expert for i in few_layers for expert in experts],
        value="share - load",
    )
    show(
        fig,
        "moe/who_goes_where",
        "Blue: the expert takes more of this kind of token than of all tokens; red: less.",
    )

#%% Knock an expert out, silence it, or force every token through it: what the loss does, by source
CHANGES = {"knock_out": knock_out, "silence": silence, "force": force}
WAYS = {
    "knock_out": "knocked out",
    "silence": "silenced",
    "force": "forced",
}


def mean_by_source(losses: Tensor, row_source: np.ndarray) -> list[float]:
    return [losses[row_source == i].mean().item() for i in range(int(row_source.max()) + 1)]


if __name__ == "__main__":
    clean = token_losses(model, rows)
    heldout_loss = mean_by_source(clean, row_source)
    effect_columns = [*sources, "its own tokens", "all"]
    effects = {}
    scattered = {}
    for i in few_layers:
        layer = model.sparse[i]
        with t.no_grad():
            enter = {"start_at_layer": layer, "resid": model(rows, stop_at_layer=layer)}
        at_random = token_losses(model, rows, [scatter(layer, shape.n_experts)], **enter)
        scattered[layers[i]] = (at_random - clean).mean().item()
        for expert in sorted(load[i].argsort()[::-1][:8].tolist()):
            name = layers[i] + experts[expert]
            own = t.from_numpy((picked[i] == expert).any(-1)[:, :-1]).to(device)
            effects[name] = {}
            for way, change in CHANGES.items():
                added = token_losses(model, rows, [change(layer, expert)], **enter) - clean
                effects[name][way] = [*mean_by_source(added, row_source), added[own].mean().item(), added.mean().item()]
    table = []
    for name, effect in effects.items():
        table.append([name, *(f"{nats:+.3f}" for way in WAYS for nats in effect[way])])
    headers = [f"{way}: {column}" for way in ("out", "silent", "forced") for column in effect_columns]
    print(tabulate(table, headers=["expert", *headers]))
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in zip(sources, heldout_loss))
    random_losses = ", ".join(f"{name} {nats:+.3f}" for name, nats in scattered.items())
    print(f"{cyan}held-out loss {losses} nats; with experts drawn at random in one layer {random_losses}{endc}")

#%% ... as maps of experts and tokens
if __name__ == "__main__":
    fig = imshow(
        np.array([[effect[way] for effect in effects.values()] for way in WAYS]),
        f"Loss with one expert changed, minus the loss as it is ({about}; n = {clean.numel()} predictions)",
        xlabel="tokens",
        ylabel="expert",
        x=effect_columns,
        y=list(effects),
        panels=list(WAYS.values()),
        value="nats",
        columns=3,
    )
    show(
        fig,
        "moe/knock_out",
        "What text loses when one expert is knocked out (the next best is taken), silenced (chosen, it writes nothing), or "
        "all tokens are forced through it alone. Its own tokens lose most where it had learned what no other did.",
    )

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    save_results(
        "moe",
        cfg,
        **numbers,
        dense_sum_error=max(dense_errors),
        replay_error=replay_error,
        load=load,
        load_max_over_even=load.max() / even,
        heldout_loss=dict(zip(sources, heldout_loss)),
        specialisation=found,
        specialisation_untrained=before,
        bits_above_shuffled=told,
        effects=effects,
        effect_columns=effect_columns,
        random_experts=scattered,
    )
    most = np.log2(shape.n_experts / shape.top_k)
    conclusion = (
        f"Of {most:.2f} bits at most, the choice of expert tells {told['token'][0]:.2f} about the token "
        f"in {layers[0]}, {told['token'][-1]:.2f} in {layers[-1]}"
    )
    if "source" in found:
        by_layer = zip(layers, found["source given token"])
        beyond = [layer for layer, bits_of in by_layer if bits_of["observed"] > bits_of["bar"]]
        chance = f"above 99% of shuffles in {', '.join(beyond)}" if beyond else "not above chance"
        conclusion += (
            f"; about the source at most {max(told['source']):.3f}, beyond what the token says "
            f"{max(told['source given token']):.3f} ({chance})"
        )
    worst = max(effects, key=lambda name: effects[name]["knock_out"][-1])
    print(
        f"{green}{conclusion}. Without {worst} the loss rises by {effects[worst]['knock_out'][-1]:.3f} nats, with it "
        f"silent by {effects[worst]['silence'][-1]:.3f}; random experts in one layer cost up to "
        f"{max(scattered.values()):.3f}. Gate: routing = dense weighted sum to {max(dense_errors):.0e}.{endc}"
    )
