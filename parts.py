"""
Someone's model taken apart: which tensor of its files is W_E, W_U, a norm, a head's W_Q, W_K, W_V and W_O or a neuron's
weights, where positions enter, and where the output of each part lies in the residual stream of a prompt.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from utils import (  # first: sets OpenMP's variables before torch is loaded
    HARMLESS,
    cyan,
    endc,
    fail,
    gray,
    model_folder,
    purple,
    read_config,
    refuse_foreign,
    refuse_not_finite,
    yellow,
)
from plots import bar, imshow, label_tokens, plain, show, visible
from hooks import device_of, has_heads, logit_multiplier
from weights import about_bos, encode, norm_of, read_tensors, token_text
from logit_attribution import StreamParts, stream_parts

import torch as t
import torch.nn as nn
from tabulate import tabulate
from torch import Tensor

#%% The names of tensors: what a module of a Hugging Face model is, in the words of A Mathematical Framework
OUTSIDE = {  # modules outside the blocks, by the end of their name
    "embed_tokens": "W_E",
    "wte": "W_E",
    "word_embeddings": "W_E",
    "embed_in": "W_E",
    "embeddings": "W_E",
    "word_embeddings_layernorm": "ln_embed",
    "wpe": "W_pos",
    "embed_positions": "W_pos",
    "project_in": "W_E_in",  # OPT-350m: from the embedding to the stream
    "project_out": "W_U_out",  # and from the stream to the unembedding
    "norm": "ln_final",
    "norm_f": "ln_final",
    "ln_f": "ln_final",
    "final_layer_norm": "ln_final",
    "final_layernorm": "ln_final",
    "lm_head": "W_U",
    "embed_out": "W_U",
}
NORMS = {
    "ln_1": "ln1",
    "input_layernorm": "ln1",
    "self_attn_layer_norm": "ln1",
    "ln_attn": "ln1",
    "norm": "ln1",
    "ln_2": "ln2",
    "post_attention_layernorm": "ln2",
    "final_layer_norm": "ln2",
    "ln_mlp": "ln2",
}
NORMS_AFTER = {  # where a block has norms after attention and MLP too (Gemma 2 and 3), or there alone (OLMo 2)
    "post_attention_layernorm": "ln1_post",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ln2_post",
}
QKV = ("W_Q", "W_K", "W_V")
IN_ATTENTION: dict[str, str | tuple[str, ...]] = {
    "q_proj": "W_Q",
    "k_proj": "W_K",
    "v_proj": "W_V",
    "c_attn": QKV,
    "query_key_value": QKV,
    "qkv_proj": QKV,
    "o_proj": "W_O",
    "out_proj": "W_O",
    "c_proj": "W_O",
    "dense": "W_O",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "sinks": "sinks",
    # DeepSeek's queries, keys and values are read from compressed ones
    "q_a_proj": "W_Q_down",
    "q_a_layernorm": "q_down_norm",
    "q_b_proj": "W_Q_up",
    "kv_a_proj_with_mqa": "W_KV_down",
    "kv_a_layernorm": "kv_down_norm",
    "kv_b_proj": "W_KV_up",
}
IN_MLP: dict[str, str | tuple[str, ...]] = {
    "gate_proj": "W_gate",
    "up_proj": "W_in",
    "down_proj": "W_out",
    "gate_up_proj": ("W_gate", "W_in"),
    "w1": "W_gate",
    "w3": "W_in",
    "w2": "W_out",
    "c_fc": "W_in",
    "fc_in": "W_in",
    "fc1": "W_in",
    "dense_h_to_4h": "W_in",
    "c_proj": "W_out",
    "fc_out": "W_out",
    "fc2": "W_out",
    "dense_4h_to_h": "W_out",
    "gate": "W_router",
    "router": "W_router",
    "shared_expert_gate": "W_shared_gate",
}
IN_MAMBA = {
    "in_proj": "W_in",
    "conv1d": "convolution",
    "x_proj": "W_x",
    "dt_proj": "W_step",
    "A_log": "A_log",
    "D": "D",
    "out_proj": "W_out",
}
ORDER = (
    "W_E W_E_in W_pos ln_embed ln1 W_Q_down q_down_norm W_Q_up W_KV_down kv_down_norm W_KV_up W_Q W_K W_V q_norm k_norm "
    "sinks W_O ln1_post ln2 W_router W_shared_gate W_gate W_in W_out ln2_post ln_final W_U_out W_U"
).split()  # as the stream meets them
BLOCK = re.compile(r"^(.*\.)?(h|layers)\.(?P<layer>\d+)\.(?P<rest>.+)$")
ATTENTION = re.compile(r"^(self_attn|attn\.attention|attn|attention|self_attention)\.(?P<module>.+)$")
MLP = re.compile(
    r"^((mlp|block_sparse_moe)\.)?(?P<expert>experts\.(\d+\.)?)?(?P<shared>shared_experts?\.)?(?P<module>[^.]+)$"
)


def parts_in_block(module: str, norms_after: bool) -> str | tuple[str, ...]:
    """What a module of a block is, by its name within the block; '' where the name says nothing."""
    if norms_after and module in NORMS_AFTER:
        return NORMS_AFTER[module]
    if module in NORMS:
        return NORMS[module]
    attention = ATTENTION.match(module)
    if attention:
        return IN_ATTENTION.get(attention["module"], "")
    if module.startswith("mixer."):
        return IN_MAMBA.get(module.removeprefix("mixer."), "")
    mlp = MLP.match(module)
    return IN_MLP.get(mlp["module"], "") if mlp else ""


def parts_of_name(name: str, norms_after: bool = False) -> tuple[str, ...]:
    """model.layers.0.self_attn.q_proj.weight -> (W_Q); transformer.h.0.attn.c_attn.bias -> (b_Q, b_K, b_V); or ()."""
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):  # a parameter by itself: sinks, A_log, the weights of all experts in one
        module = name.removesuffix("_bias")
        kind = "bias" if name.endswith("_bias") else "weight"
    block = BLOCK.match(module)
    found = parts_in_block(block["rest"], norms_after) if block else OUTSIDE.get(module.rpartition(".")[2], "")
    parts = (found,) if isinstance(found, str) else found
    if not all(parts):
        return ()
    if kind == "weight":
        return parts
    return tuple(f"b_{part.removeprefix('W_')}" if part.startswith("W_") else f"{part}.bias" for part in parts)


def owner_of_name(name: str) -> str:
    """Whose weights these are, where a block has several of one kind: 'expert', 'shared expert' or ''."""
    if ".experts." in name:
        return "expert"
    if ".shared_expert." in name or ".shared_experts." in name:
        return "shared expert"
    return ""


def starred(name: str) -> str:
    """model.layers.0.mlp.experts.3.gate_proj.weight -> model.layers.*.mlp.experts.*.gate_proj.weight"""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


#%% The shape of attention's weights: how they divide into heads
@dataclass
class HeadShape:
    n_heads: int  # of queries; 0 where the model has no attention
    n_kv_heads: int  # of keys and values: each serves n_heads / n_kv_heads query heads
    in_groups: bool  # a tensor of q, k and v together has those of each key head side by side; else all q, all k, all v
    in_out: bool  # weights are stored (in, out), as GPT-2's are; else (out, in)


def text_config(config: dict) -> Any:
    """transformers' own reading of a config.json: its defaults, and RoPE in one form."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    if "model_type" not in config:
        fail("config.json says no model_type: it is no transformers config")
    try:
        return AutoConfig.for_model(**config).get_text_config()
    except (ValueError, KeyError) as error:
        fail(f"transformers does not know the config: {str(error).strip().splitlines()[0]}")


def head_shape(config: Any) -> HeadShape:
    n_heads = getattr(config, "num_attention_heads", 0)
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    if config.model_type == "falcon" and config.new_decoder_architecture:
        n_kv_heads = config.num_kv_heads
    elif getattr(config, "multi_query", False):  # Falcon, BigCode
        n_kv_heads = 1
    in_groups = config.model_type in ("gpt_neox", "bloom", "falcon", "gpt_bigcode")
    return HeadShape(n_heads, n_kv_heads, in_groups, in_out=config.model_type == "gpt2")


def split_qkv(x: Tensor, heads: HeadShape) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (head, d_head, ...) of rows that hold all three."""
    group = heads.n_heads // heads.n_kv_heads
    if heads.in_groups:
        by_group = x.unflatten(0, (heads.n_kv_heads, group + 2, -1))
        return by_group[:, :-2].flatten(0, 1), by_group[:, -2], by_group[:, -1]
    by_head = x.unflatten(0, (heads.n_heads + 2 * heads.n_kv_heads, -1))
    return by_head.split([heads.n_heads, heads.n_kv_heads, heads.n_kv_heads])


LOOKED_UP = ("W_E", "W_pos")  # a row for each token or position: not a map that is multiplied by


def as_out_in(x: Tensor, part: str, heads: HeadShape) -> Tensor:
    """A matrix as nn.Linear keeps it, (out, in); a bias as it is. GPT-2's blocks keep theirs as (in, out)."""
    in_out = heads.in_out and x.ndim == 2 and part not in (*LOOKED_UP, "W_U")
    return x.mT if in_out else x


def pieces_of(x: Tensor, parts: tuple[str, ...], heads: HeadShape) -> dict[str, Tensor]:
    """
    {part: its weights as the field writes them}: W_Q, W_K, W_V (head, d_model, d_head), W_O (head, d_head, d_model),
    b_Q, b_K, b_V (head, d_head), W_in (d_model, d_mlp), W_U (d_model, d_vocab); what has no such form, as in the file.
    """
    rows = as_out_in(x, parts[0], heads)
    is_matrix = x.ndim == 2
    kinds = tuple(part.replace("b_", "W_", 1) for part in parts)
    if kinds == QKV:  # (all heads' queries, keys and values, d_model) or a bias
        pieces = split_qkv(rows, heads)
    elif len(parts) == 2 and x.ndim == (1 if parts[0].startswith("b_") else 2):  # Phi-3: gates' rows, then neurons'
        pieces = rows.chunk(2)
    elif len(parts) == 2:  # of all experts in one
        return {" and ".join(parts): x}
    elif kinds[0] in QKV and heads.n_heads:  # (head x d_head, d_model)
        n_heads = heads.n_heads if kinds[0] == "W_Q" else heads.n_kv_heads
        pieces = [rows.unflatten(0, (n_heads, -1))]
    elif parts[0] == "W_O":  # (d_model, head x d_head)
        return {"W_O": rows.unflatten(1, (heads.n_heads, -1)).permute(1, 2, 0)}
    elif parts[0].startswith("W_") and parts[0] not in LOOKED_UP and is_matrix:
        pieces = [rows]
    else:
        return {parts[0]: x}
    return {part: piece.mT if is_matrix else piece for part, piece in zip(parts, pieces)}


#%% The legend: one pass over the files, one tensor in memory at a time
@dataclass
class Kind:
    """Weights of one kind, over all layers (and experts)."""

    part: str
    owner: str  # '', expert, shared expert
    tensor: str  # its name in the files, * for numbers
    in_file: str  # shape
    here: str  # shape, as the field writes it
    dtype: str
    norms: list[float] = field(default_factory=list)  # Frobenius, one for each tensor
    head_norms: dict[int, list[float]] = field(default_factory=dict)  # {layer: of each head}, of attention's weights


class TensorRow(NamedTuple):
    """A tensor of the files."""

    name: str
    shape: str
    dtype: str
    norm: float
    parts: str  # what it is in the field's words; '' if that is not known


@dataclass
class Legend:
    name: str
    config: Any  # transformers'
    heads: HeadShape
    kinds: list[Kind]
    tensors: list[TensorRow]

    def has(self, part: str) -> bool:
        return any(kind.part == part for kind in self.kinds)

    def norms_by_head(self, part: str) -> dict[int, list[float]]:
        """{layer: of each head} of W_Q, W_K, W_V or W_O; empty where the files do not hold them head by head."""
        by_layer = {}
        for kind in self.kinds:
            if kind.part == part:
                by_layer |= kind.head_norms
        return dict(sorted(by_layer.items()))

    @property
    def unnamed(self) -> list[str]:
        return [tensor.name for tensor in self.tensors if not tensor.parts]


def place_in_order(kind: Kind) -> tuple[int, str, bool]:
    """As the stream meets the parts. b_Q comes after W_Q, ln1.bias after ln1; 'W_gate and W_in' stands as W_gate does."""
    is_bias = kind.part.startswith("b_") or kind.part.endswith(".bias")
    weights = f"W_{kind.part.removeprefix('b_')}" if kind.part.startswith("b_") else kind.part.removesuffix(".bias")
    first = weights.split()[0]
    place = ORDER.index(first) if first in ORDER else len(ORDER)
    return place, kind.owner, is_bias


def by_layer_and_name(tensor: TensorRow) -> tuple:
    """Sorts as people count: layer 2 before layer 10."""
    return tuple((part.isdigit(), int(part) if part.isdigit() else part) for part in tensor.name.split("."))


def shape_of(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


def read_legend(name: str) -> Legend:
    """Of a hub name, a short name or a folder of any size."""
    raw = read_config(name)
    folder = model_folder(name)
    refuse_foreign(folder, raw)
    config = text_config(raw)
    heads = head_shape(config)
    norms_after = config.model_type.startswith(("gemma2", "gemma3", "olmo2", "olmo3"))
    kinds: dict[tuple, Kind] = {}
    tensors = []
    for theirs, x in read_tensors(folder):
        dtype = str(x.dtype).removeprefix("torch.")
        if HARMLESS.search(theirs):
            tensors.append(TensorRow(theirs, shape_of(x), dtype, norm_of(x), "(no weight: a buffer)"))
            continue
        parts = parts_of_name(theirs, norms_after)
        owner = owner_of_name(theirs)
        squares = 0.0
        pieces = pieces_of(x, parts, heads) if parts else {"": x}
        for part, piece in pieces.items():
            key = (part, owner, starred(theirs), shape_of(x))
            kind = kinds.setdefault(key, Kind(*key, shape_of(piece), dtype))
            if part in (*QKV, "W_O") and piece.ndim == 3:
                by_head = [norm_of(head) for head in piece]
                kind.head_norms[int(BLOCK.match(theirs)["layer"])] = by_head
                norm = math.hypot(*by_head)
            else:
                norm = norm_of(piece)
            kind.norms.append(norm)
            squares += norm**2
        named = " ".join(part for part in pieces if part)
        tensors.append(TensorRow(theirs, shape_of(x), dtype, math.sqrt(squares), named))
    tensors.sort(key=by_layer_and_name)
    known = [kind for kind in kinds.values() if kind.part]
    return Legend(name, config, heads, sorted(known, key=place_in_order), tensors)


#%% The legend in words: the stream, norms, positions, heads, neurons, experts
def about_embeddings(legend: Legend) -> str:
    config = legend.config
    said = "W_E writes a token into the stream"
    if config.model_type.startswith("gemma"):
        said += f", times sqrt(d_model) = {math.sqrt(config.hidden_size):.2f}"
    if (getattr(config, "embedding_multiplier", None) or 1) != 1:
        said += f", times {config.embedding_multiplier:g}"
    said += "; W_U reads the logits from it"
    if not legend.has("W_U"):
        said += " and is W_E (tied: no tensor of its own)"
    for name, what in (("final_logit_softcapping", "capped at"), ("logit_scale", "times"), ("logits_scaling", "over")):
        value = getattr(config, name, None)
        if value and value != 1:
            said += f"; the logits are {what} {value:g}"
    return said


def norm_kind(config: Any) -> str:
    """RMSNorm or LayerNorm, by the name that its epsilon has in the config."""
    return "RMSNorm" if hasattr(config, "rms_norm_eps") or config.model_type == "mamba" else "LayerNorm"


def norm_epsilon(config: Any) -> float:
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    return next((getattr(config, name) for name in names if hasattr(config, name)), 1e-5)


def about_norms(legend: Legend) -> str:
    config = legend.config
    places = {
        "ln_embed": "after W_E",
        "ln1": "before attention" if legend.heads.n_heads else "before the mixer",
        "q_norm": "of q, after W_Q",
        "k_norm": "of k, after W_K",
        "ln1_post": "after attention",
        "ln2": "before the MLP",
        "ln2_post": "after the MLP",
        "ln_final": "before W_U",
    }
    found = [f"{part} {where}" for part, where in places.items() if legend.has(part)]
    if not found:
        return f"{norm_kind(config)} without weights: no tensor is one"
    said = f"{norm_kind(config)}, epsilon {norm_epsilon(config):g}: {', '.join(found)}"
    if legend.has("ln1") and not legend.has("ln2") and legend.heads.n_heads:
        said += "; attention and MLP both read ln1"
    if getattr(config, "use_parallel_residual", False):
        said += "; the MLP reads the stream as attention does, before it writes"
    if not getattr(config, "do_layer_norm_before", True):
        said += "; they stand after attention and MLP here, on the stream itself"
    if config.model_type.startswith("gemma"):
        said += "; it multiplies by 1 + the weight in the file"
    return said


def rope_by_layers(config: Any) -> dict[str, dict]:
    """{the layers it holds in: transformers' rope parameters}; empty where the model does not turn its queries and keys."""
    rope = getattr(config, "rope_parameters", None)
    if getattr(config, "alibi", False):
        return {}
    if not rope:
        rotary = getattr(config, "rotary_dim", None)  # GPT-J
        return {"all layers": {"rope_theta": 10000.0, "rope_type": "default"}} if rotary else {}
    if "rope_theta" in rope:
        return {"all layers": rope}
    return {f"{kind.replace('_', ' ')} layers": of_kind for kind, of_kind in rope.items()}


def rotary_dims(config: Any, rope: dict) -> tuple[int, int]:
    """How many dimensions of a head turn, of how many."""
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type == "deepseek_v3":
        return config.qk_rope_head_dim, config.qk_head_dim
    if getattr(config, "rotary_dim", None):
        return config.rotary_dim, d_head
    return int(d_head * rope.get("partial_rotary_factor", 1.0)), d_head


def about_rope(config: Any, where: str, rope: dict) -> str:
    turning, d_head = rotary_dims(config, rope)
    base = rope["rope_theta"]
    slowest = 2 * math.pi * base ** ((turning - 2) / turning)
    said = (
        f"RoPE, which has no tensor, turns q and k of every head in {where}, after W_Q and W_K (and their norms, where "
        f"it has any): base {base:g}, {turning} of {d_head} dimensions, a turn takes {2 * math.pi:.1f} to {slowest:,.0f} tokens"
    )
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    kind = scaling.pop("rope_type", "default")
    if kind == "default":
        return f"{said}; not scaled"
    return f"{said} before scaling; scaled as {kind}: {', '.join(f'{name} {value}' for name, value in scaling.items())}"


def about_positions(legend: Legend) -> list[str]:
    config = legend.config
    said = [about_rope(config, where, rope) for where, rope in rope_by_layers(config).items()]
    turned = getattr(config, "no_rope_layers", None)  # 1 where it is used, whatever its name says
    if turned and not all(turned):
        said.append(f"RoPE is left out in layers {', '.join(str(i) for i, used in enumerate(turned) if not used)}")
    if legend.has("W_pos"):
        said.append("positions: W_pos, learned, added to W_E's row")
    if config.model_type == "bloom" or getattr(config, "alibi", False):
        said.append("positions: ALiBi, which has no tensor, adds to a score less the farther its key lies")
    if not said:
        said.append("positions: none enter by themselves")
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    slides = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    if window and getattr(config, "use_sliding_window", True) and (slides or not kinds):
        layers = f"layers {', '.join(map(str, slides))}" if slides else "all layers"
        said.append(f"a query of {layers} sees the last {window} keys")
    return said


def about_heads(legend: Legend) -> str:
    heads = legend.heads
    if not heads.n_heads:
        return ""
    group = heads.n_heads // heads.n_kv_heads
    said = f"attention: {heads.n_heads} heads of queries, {heads.n_kv_heads} of keys and values"
    if group > 1:
        said += f": heads 0 to {group - 1} of queries read head 0 of keys, the next {group} the next"
    if legend.has("W_Q_up"):
        return said + "; W_Q and W_K W_V are products of a map down and a map up, which norms part"
    fused = [kind.tensor for kind in legend.kinds if kind.part == "W_Q" and kind.in_file != kind.here]
    joined = any(kind.part == "W_K" and kind.tensor in fused for kind in legend.kinds)
    if joined:
        how = "those of a key head side by side" if heads.in_groups else "all of q, then k, then v"
        said += f"; one tensor holds W_Q, W_K and W_V ({how})"
    return said


def activation_of(config: Any) -> str:
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), "gelu")


def about_neurons(legend: Legend) -> str:
    act = activation_of(legend.config)
    if not legend.heads.n_heads:
        return ""
    if not (legend.has("W_gate") or legend.has("W_gate and W_in")):
        return f"MLP without a gate: {act}(x W_in) W_out"
    if legend.config.model_type == "gpt_oss":
        return "gated MLP: (g sigmoid(1.702 g) * (1 + x W_in)) W_out, where g is x W_gate; both are cut at their limits"
    name = {"silu": "SwiGLU", "swish": "SwiGLU"}.get(act, "gated MLP")
    return f"{name}: ({act}(x W_gate) * x W_in) W_out"


def experts_of(config: Any) -> tuple[int, int]:
    """How many experts a layer has, and how many a token is sent to; 0, 0 where it has none."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    n_experts = next((getattr(config, name) for name in names if getattr(config, name, None)), 0)
    return n_experts, getattr(config, "num_experts_per_tok", 0) if n_experts else 0


def about_experts(legend: Legend) -> str:
    n_experts, top_k = experts_of(legend.config)
    if not n_experts:
        return ""
    n_layers = sum(len(kind.norms) for kind in legend.kinds if kind.part == "W_router")
    of_layers = f"{n_layers} of {legend.config.num_hidden_layers} layers"
    said = f"mixture of {n_experts} experts in {of_layers}: a token goes to the top {top_k} by W_router"
    if any(kind.owner == "shared expert" for kind in legend.kinds):
        said += ", and to a shared expert"
    return said


def about_model(legend: Legend) -> list[str]:
    """A line for each: what the table does not say by its rows."""
    config = legend.config
    lines = [about_embeddings(legend), about_norms(legend), *about_positions(legend), about_heads(legend)]
    lines += [about_neurons(legend), about_experts(legend)]
    residual = getattr(config, "residual_multiplier", 1.0)
    if residual != 1:
        lines.append(f"what attention and MLP write is multiplied by {residual:g}")
    return [line for line in lines if line]


#%% The legend on the screen: its words, a row for each kind of weights, then every tensor
MOST_ROWS = 400  # of the table of every tensor; beyond, the first block stands for the others


def span(numbers: list[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def legend_table(legend: Legend) -> list[list]:
    """A row for each kind of weights: [part, tensor, shape in the file, shape here, dtype, how many, norms, by head]."""
    rows = []
    for kind in legend.kinds:
        part = f"{kind.part}, {kind.owner}" if kind.owner else kind.part
        by_head = span([norm for heads in kind.head_norms.values() for norm in heads]) if kind.head_norms else ""
        rows.append(
            [part, kind.tensor, kind.in_file, kind.here, kind.dtype, len(kind.norms), span(kind.norms), by_head]
        )
    return rows


def print_legend(legend: Legend) -> None:
    config = legend.config
    print(
        f"{purple}=== {legend.name}: {config.num_hidden_layers} layers, d_model {config.hidden_size}, d_vocab "
        f"{config.vocab_size}, {config.model_type} ==={endc}"
    )
    for said in about_model(legend):
        print(f"{cyan}{said}{endc}")
    headers = ["part", "tensor (* any number)", "in the file", "here: head, in, out", "dtype", "n", "norm", "of a head"]
    print(tabulate(legend_table(legend), headers=headers, disable_numparse=True))
    print(
        f"{gray}here: model.W_E, model.W_U, model.blocks[layer].ln1, .ln2, .attn.W_Q[head], .attn.W_K[head] ..., "
        f".mlp.W_gate, .mlp.W_in, .mlp.W_out, model.ln_final{endc}"
    )
    if not legend.has("W_Q"):
        print(f"{yellow}no W_Q, W_K, W_V head by head: no tensor of a {config.model_type} model is one{endc}")
    if legend.unnamed:
        print(f"{yellow}{len(legend.unnamed)} tensors have no name of the field's, first {legend.unnamed[0]}{endc}")

    rows = []
    for tensor in legend.tensors:
        block = BLOCK.match(tensor.name)
        if len(legend.tensors) > MOST_ROWS and block and block["layer"] != "0":
            continue
        rows.append(tensor)
    print(tabulate(rows, headers=["tensor", "shape", "dtype", "norm", "part"], floatfmt=".2f"))
    left_out = len(legend.tensors) - len(rows)
    if left_out:
        print(f"{gray}{left_out} tensors of the blocks after the first are not printed; the results hold them{endc}")


def legend_numbers(legend: Legend) -> dict:
    """For results/<script>.json."""
    n_experts, top_k = experts_of(legend.config)
    kinds = []
    for kind in legend.kinds:
        about = [kind.part, kind.owner, kind.tensor, kind.in_file, kind.here, kind.dtype]
        kinds.append([*about, len(kind.norms), min(kind.norms), max(kind.norms)])
    return {
        "legend": about_model(legend),
        "names": kinds,
        "tensors": legend.tensors,
        "head_norms": {part: list(legend.norms_by_head(part).values()) for part in (*QKV, "W_O")},
        "n_experts": n_experts,
        "top_k": top_k,
    }


def show_head_norms(legend: Legend, script: str) -> None:
    """figs/<script>/weight_norms: the norms of every head's four matrices, by layer."""
    parts = [part for part in (*QKV, "W_O") if legend.norms_by_head(part)]
    if not parts:
        return
    layers = sorted({layer for part in parts for layer in legend.norms_by_head(part)})  # those that have attention
    norms = t.full((len(parts), len(layers), legend.heads.n_heads), t.nan)
    for i, part in enumerate(parts):
        for layer, of_heads in legend.norms_by_head(part).items():
            norms[i, layers.index(layer), : len(of_heads)] = t.tensor(of_heads)
    fig = imshow(
        norms,
        f"Frobenius norm of each head's weights ({plain(Path(legend.name).name)}; {legend.heads.n_kv_heads} heads of keys "
        f"and values; each panel's scale its own)",
        xlabel="head",
        ylabel="layer",
        x=[f"H{head}" for head in range(legend.heads.n_heads)],
        y=[f"L{layer}" for layer in layers],
        panels=parts,
        diverging=False,
        value="norm",
        columns=2,
        one_scale=False,
    )
    show(
        fig,
        f"{script}/weight_norms",
        "A row for each layer, a column for each head. Small norms are heads that read or write little.",
    )


#%% How much of a story a model allows: all of it in our own class and in memory, else the legend and the prompt
def is_whole(model: nn.Module, own: type) -> bool:
    return isinstance(model, own) and not getattr(model, "reads_when_called", False)


def why_not_whole(model: nn.Module, own: type) -> str:
    if not isinstance(model, own):
        return f"the model is not {own.__name__}'s kind"
    return "the weights come from disk at every pass"


#%% A prompt: its tokens, what comes next, and where the output of each part lies in the stream
@dataclass
class PromptStory:
    tokens: Tensor  # (1, pos)
    texts: list[str]
    next_tokens: list[tuple[str, float]]  # likeliest first, with their probabilities
    parts: StreamParts  # at the last position, for the likeliest token


LARGEST_MISS = {t.float32: 1e-4, t.bfloat16: 5e-2, t.float16: 1e-2}  # of the parts' sum, relative


def tell_prompt(model: nn.Module, prompt: str, also: list[str] | tuple[str, ...] = (), top: int = 8) -> PromptStory:
    """
    What a model of any kind says after a prompt, and the writes to its stream there: each layer's attention and MLP
    where they are hooked and what they write adds up to the stream, else each layer as a whole, which is said. One run,
    where they do; parts.cache has the hooks of `also` too.
    Gate: the writes sum to the final stream, and their direct effects to the logit.
    """
    tokens = t.tensor([encode(model, prompt)], device=device_of(model))
    texts = [token_text(model, i) for i in tokens[0].tolist()]
    if model.W_U.shape[0] != model.cfg.d_model:
        fail("a map stands between the stream and W_U (OPT-350m): what is written to its stream has no direct effect")
    limit = LARGEST_MISS[model.W_U.dtype]
    whole_layers = not has_heads(model)
    if whole_layers:
        print(
            f"{yellow}the stream alone is hooked here: each layer's write is seen as a whole, what its attention, its "
            f"MLP and its heads write is not{endc}"
        )
    parts = stream_parts(model, tokens, whole_layers=whole_layers, also=also)
    refuse_not_finite(parts.logits, model)
    if parts.missed > limit and not whole_layers:
        print(f"{yellow}what attention and MLPs write misses the stream by {parts.missed:.0e}: layers as a whole{endc}")
        parts = stream_parts(model, tokens, whole_layers=True, also=also)
    assert parts.missed < limit, f"the writes miss the final stream by {parts.missed}"
    assert parts.effects_missed < limit, f"the effects of the writes miss the logit by {parts.effects_missed}"

    found = parts.logits.softmax(-1).topk(min(top, len(parts.logits)))
    next_texts = [token_text(model, i) for i in found.indices.tolist()]
    return PromptStory(tokens, texts, list(zip(next_texts, found.values.tolist())), parts)


def print_prompt(story: PromptStory, model: nn.Module) -> None:
    parts = story.parts
    said = visible(story.next_tokens[0][0])
    print(f"{purple}=== The prompt: {len(story.texts)} tokens; {about_bos(model)} ==={endc}")
    print(f"{gray}{' '.join(label_tokens(story.texts))}{endc}")
    print(f"next: {', '.join(f'{visible(text)} {cyan}{p:.3f}{endc}' for text, p in story.next_tokens)}")
    print(f"{purple}=== Where each part's output lies in the stream, at the last token, for {said!r} ==={endc}")
    with_stream = parts.cosines[:, -1].tolist()
    columns = zip(
        parts.names, parts.norms.tolist(), parts.shares.tolist(), with_stream, parts.effects.tolist(), strict=True
    )
    rows = [list(row) for row in columns]
    rows.append(["biases", None, None, None, parts.constant])
    rows.append(["sum", parts.stream.norm().item(), parts.shares.sum().item(), 1.0, parts.logit])
    headers = ["part", "norm", "share of the final stream", "cosine with it", f"direct effect on {said!r}"]
    print(tabulate(rows, headers=headers, floatfmt=".3f"))
    print(
        f"{cyan}gates: the writes sum to the final stream to {parts.missed:.0e}, their effects to the logit (less the mean "
        f"logit of all tokens) to {parts.effects_missed:.0e}{endc}"
    )
    scale = logit_multiplier(model)
    if scale != 1:
        print(f"{gray}that logit is taken before the model multiplies it by {scale:g}{endc}")
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0
    if cap > 0:
        print(f"{gray}that logit is taken before the model caps it softly at {cap:g}{endc}")


def prompt_numbers(story: PromptStory) -> dict:
    """For results/<script>.json."""
    parts = story.parts
    return {
        "prompt_tokens": story.texts,
        "next_tokens": story.next_tokens,
        "writes": parts.names,
        "write_norms": parts.norms,
        "write_shares": parts.shares,
        "write_cosines": parts.cosines[:, -1],
        "write_effects": parts.effects,
        "gates": {"writes_missed": parts.missed, "effects_missed": parts.effects_missed},
    }


def show_prompt(story: PromptStory, about: str, script: str) -> None:
    """figs/<script>/stream, stream_effects and stream_cosines."""
    where = f"at the last of {len(story.texts)} tokens ({plain(about)})"
    show_writes(story.parts, where, script)
    show_effects(story, where, script)
    show_cosines(story.parts, where, script)


def show_writes(parts: StreamParts, where: str, script: str) -> None:
    fig = bar(
        {
            "norm, of the final stream's": parts.norms / parts.stream.norm(),
            "share along it (they sum to 1)": parts.shares,
        },
        f"How long each part's write to the stream is, and how much of it lies along the final stream, {where}",
        xlabel="part",
        ylabel="of the final stream's norm",
        x=parts.names,
    )
    show(
        fig,
        f"{script}/stream",
        "A part can be long and yet lie across the final stream; what lies along it sums to the whole.",
    )


def show_effects(story: PromptStory, where: str, script: str) -> None:
    parts = story.parts
    said = plain(visible(story.next_tokens[0][0]))
    fig = bar(
        {"direct effect": [*parts.effects.tolist(), parts.constant]},
        f"Direct effect of each part's write on the logit of '{said}' less the mean logit ({parts.logit:.2f} in all), "
        f"final norm's scale frozen, {where}",
        xlabel="part",
        ylabel="logit",
        x=[*parts.names, "biases"],
    )
    show(
        fig,
        f"{script}/stream_effects",
        "What each part adds to the logit of the token that the model says; together they are the logit.",
    )


def show_cosines(parts: StreamParts, where: str, script: str) -> None:
    fig = imshow(
        parts.cosines,
        f"Cosine of every two writes to the stream, and of each with the final stream, {where}",
        xlabel="part",
        ylabel="part",
        x=[*parts.names, "final stream"],
        y=parts.names,
        value="cosine",
    )
    fig.update_layout(height=max(450, 150 + 18 * len(parts.names)))
    show(
        fig,
        f"{script}/stream_cosines",
        "Blue: two parts write in one direction; red: one takes back what the other wrote.",
    )


def conclude_prompt(story: PromptStory) -> str:
    """The strongest writes in a sentence."""
    parts = story.parts
    text, p = story.next_tokens[0]
    along = parts.shares.topk(min(3, len(parts.names)))
    raises = parts.effects.topk(min(3, len(parts.names)))
    most_along = ", ".join(f"{parts.names[i]} {share:.2f}" for share, i in zip(*map(Tensor.tolist, along)))
    most_raised = ", ".join(f"{parts.names[i]} {effect:+.2f}" for effect, i in zip(*map(Tensor.tolist, raises)))
    return (
        f"{visible(text)!r} comes next with {p:.2f}; of the final stream most is written by {most_along}; its logit is "
        f"raised most by {most_raised}. Gate: the writes sum to the stream to {parts.missed:.0e}."
    )
