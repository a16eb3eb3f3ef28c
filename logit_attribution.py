"""
A logit taken apart exactly: by layer, head, source and neuron (direct logit attribution); and where the output of each
part lies in the residual stream.
"""

from dataclasses import dataclass

from hooks import (
    Cache,
    NormShape,
    act_name,
    ask_norm,
    block_norms,
    device_of,
    frozen_gain,
    residual_multiplier,
    run_with_cache,
)

import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from torch import Tensor


#%% What the final norm and the unembedding read
def final_norm(model: nn.Module) -> NormShape:
    return ask_norm(model.ln_final, model.cfg.d_model, model.W_U)


def centres(model: nn.Module) -> bool:
    """LayerNorm subtracts the mean, RMSNorm does not."""
    return final_norm(model).centres


def folded_W_U(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """
    (d_model, token) in float32: the unembedding with the final norm's weight folded in and, for LayerNorm, centred.
    ids: the tokens wanted; None is all of them.
    """
    W_U = model.W_U if ids is None else model.W_U[:, ids]
    norm = final_norm(model)
    W = norm.weight[:, None] * W_U.float()
    return W - W.mean(0) if norm.centres else W


def logit_direction(
    model: nn.Module, token: int, scale: Tensor, less_mean: bool = False, versus: int | None = None
) -> Tensor:
    """
    (d_model): a write to the final stream, times this, summed, is its part of the token's logit; with less_mean, of the
    logit less the mean logit of all tokens, which leaves out what a write gives to every token alike; with versus, of
    the logit less that token's. scale (1): the final norm's, frozen at the position that is asked about.
    """
    column = folded_W_U(model, t.tensor([token], device=scale.device))[:, 0]
    if less_mean:
        column = column - folded_W_U(model).mean(1)
    if versus is not None:
        column = column - folded_W_U(model, t.tensor([versus], device=scale.device))[:, 0]
    return column / scale


def unembed_column(model: nn.Module, token: int, less_mean: bool = False) -> Tensor:
    """(d_model) of W_U, with less_mean less the mean column of all tokens."""
    column = model.W_U[:, token].float()
    return column - model.W_U.float().mean(1) if less_mean else column


def constant_logit(model: nn.Module, token: int, less_mean: bool = False) -> Tensor:
    """() what the biases of the final norm and of the unembedding give the token's logit, whatever the stream holds."""
    constant = final_norm(model).bias @ unembed_column(model, token, less_mean)
    b_U = getattr(model.unembed, "b_U", getattr(model.unembed, "bias", None))
    if b_U is None:
        return constant
    constant = constant + b_U[token].float()
    return constant - b_U.float().mean() if less_mean else constant


def linear_bias_logit(linear: nn.Module, direction: Tensor) -> Tensor:
    """() what a linear map's bias gives the logit."""
    bias = getattr(linear, "bias", None)
    if bias is None:
        return direction.new_zeros(())
    return bias.float() @ direction


def per_head(x: Tensor, n_heads: int) -> Tensor:
    """Keys or values (batch, pos, kv head, d_head), repeated for the query heads that share them."""
    return x.repeat_interleave(n_heads // x.shape[2], 2)


#%% Direct logit attribution (Elhage et al. 2021): with the final norm's scale frozen, the logit is linear in each write
@t.no_grad()
def direct_logit_attribution(
    model: nn.Module, tokens: Tensor, token: int, position: int = -1, less_mean: bool = False
) -> dict[str, float]:
    """
    What each write to the stream gives the logit of `token` (less_mean: less the mean over all tokens) at one position
    of tokens (1, pos); they sum to the logit.
    {'embed' (positions included), 'L0 attn', 'L0 mlp', 'L1 attn' ..., 'constant' (constant_logit)}.
    The plain form; logit_parts takes the writes further apart.
    """
    layers = range(model.cfg.n_layers)
    names = {"embed": act_name("resid_pre", 0)}
    for layer in layers:
        names[f"L{layer} attn"] = act_name("attn_out", layer)
        names[f"L{layer} mlp"] = act_name("mlp_out", layer)
    _, cache = run_with_cache(model, tokens, [*names.values(), "ln_final.hook_scale"])

    direction = logit_direction(model, token, cache["ln_final.hook_scale"][0, position], less_mean)
    parts = {}
    for part, name in names.items():
        write = cache[name][0, position].float()
        parts[part] = einsum(write, direction, "d_model, d_model ->").item()
    parts["constant"] = constant_logit(model, token, less_mean).item()
    return parts


@t.no_grad()
def logit_parts(
    model: nn.Module,
    tokens: Tensor,
    token: int,
    position: int = -1,
    less_mean: bool = False,
    versus: int | None = None,
) -> dict[str, Tensor]:
    """
    The logit of `token` at one position of tokens (1, pos), with less_mean less the mean logit of all tokens, with
    versus less that token's (a logit difference), and the parts that sum to it:
    'embed', 'pos_embed' (): the token's and the position's embedding (pos_embed is 0 where none enters the stream);
    'heads' (layer, head, source): what each head writes from each source position;
    'attn_bias' (layer): the output maps' biases;
    'mlp' (layer): the MLPs;
    'constant' (): constant_logit;
    'logit' (): the model's own, before a soft cap (Gemma 2) or a scale (Granite).
    Where the MLPs have neurons, 'neurons' (layer, d_mlp) and 'mlp_bias' (layer) sum to 'mlp'.
    The scales of the final norm, and of norms after attention and MLP (Gemma 2, OLMo 2), are frozen at their values
    there. The weights are the model's own; its final norm alone is folded (folded_W_U). Ours or a TransformerBridge,
    grouped queries too.
    """
    n_layers = model.cfg.n_layers
    last = layer_streams(model)[-1]
    _, cache = run_with_cache(model, tokens, [*write_sites(model, n_layers, n_layers), last, "ln_final.hook_scale"])
    end = cache[last][:, position][:, None]
    logits = model.unembed(model.ln_final(end))[0, 0].float()
    logit = logits[token] - logits.mean() if less_mean else logits[token]
    constant = constant_logit(model, token, less_mean)
    if versus is not None:
        assert not less_mean, "the mean of all tokens is no part of a logit difference"
        logit = logit - logits[versus]
        constant = constant - constant_logit(model, versus)
    direction = logit_direction(model, token, cache["ln_final.hook_scale"][0, position], less_mean, versus)
    parts = parts_along(model, cache, position, direction, n_layers, n_layers)
    return parts | {"constant": constant, "logit": logit}


def has_neurons(model: nn.Module) -> bool:
    """All MLPs have neurons of their own; a mixture of experts has each expert's."""
    return all(hasattr(block.mlp, "W_out") for block in model.blocks)


def adds_positions(model: nn.Module) -> bool:
    """Positions enter the stream by an embedding of their own (GPT-2)."""
    return hasattr(model, "W_pos") or hasattr(model, "pos_embed")


def write_sites(model: nn.Module, n_attn: int, n_mlps: int) -> list[str]:
    """The hooks that parts_along reads."""
    names = [act_name("resid_pre", 0)]
    if adds_positions(model):
        names.append("hook_pos_embed")
    names += [act_name(site, layer) for layer in range(n_attn) for site in ("v", "pattern", "z")]
    names += [act_name("mlp_out", layer) for layer in range(n_mlps)]
    if has_neurons(model):
        names += [act_name("post", layer) for layer in range(n_mlps)]
    return names


def parts_along(
    model: nn.Module, cache: dict[str, Tensor], position: int, direction: Tensor, n_attn: int, n_mlps: int
) -> dict[str, Tensor]:
    """
    What each write gives the stream's product with direction (d_model), at one position, where the first n_attn layers'
    attention and the first n_mlps layers' MLPs have written: the parts of logit_parts but for 'constant' and 'logit'.
    cache: write_sites of a run of one row.
    """
    blocks = model.blocks
    none = direction.new_zeros(0)
    start = cache["resid_pre", 0][0, position].float() @ direction
    positional = direction.new_zeros(())
    if adds_positions(model):
        positional = cache["hook_pos_embed"][0, position].float() @ direction

    heads = []
    attn_biases = []
    for layer in range(n_attn):
        # what attention and the MLP write is multiplied by this, after a norm of their own
        of_attn = direction * attn_gain(model, layer, cache["z", layer][0, position])
        by_head = einsum(
            cache["pattern", layer][0, :, position].float(),
            per_head(cache["v", layer], model.cfg.n_heads)[0].float(),
            blocks[layer].attn.W_O.float() @ of_attn,
            "head source, source head d_head, head d_head -> head source",
        )
        heads.append(by_head)
        attn_biases.append(linear_bias_logit(blocks[layer].attn.o, of_attn))

    mlps = [cache["mlp_out", layer][0, position].float() @ direction for layer in range(n_mlps)]
    parts = {
        "embed": start - positional,
        "pos_embed": positional,
        "heads": t.stack(heads) if heads else none.view(0, model.cfg.n_heads, 0),
        "attn_bias": t.stack(attn_biases) if heads else none,
        "mlp": t.stack(mlps) if mlps else none,
    }
    if not has_neurons(model):
        return parts
    neurons = []
    mlp_biases = []
    for layer in range(n_mlps):
        activations = cache["post", layer][0, position]
        of_mlp = direction * mlp_gain(model, layer, activations)
        written_by_one = blocks[layer].mlp.W_out.float() @ of_mlp  # by a neuron whose activation is 1
        neurons.append(activations.float() * written_by_one)
        mlp_biases.append(linear_bias_logit(blocks[layer].mlp.out, of_mlp))
    parts["neurons"] = t.stack(neurons) if neurons else none.view(0, 0)
    parts["mlp_bias"] = t.stack(mlp_biases) if neurons else none
    return parts


def about_norms(model: nn.Module) -> str:
    """What is frozen where heads are told apart after a norm that they share; nothing to say where there is none."""
    if block_norms(model, 0).after_attn is None:
        return ""
    return (
        "norms stand after attention and MLPs: a head's write passes its norm with the scale that all heads together "
        "give it in that run, which is frozen, so that the writes of heads add up"
    )


def attn_gain(model: nn.Module, layer: int, z: Tensor) -> Tensor | float:
    """
    (..., d_model) by which a norm after attention multiplies what the heads z (..., head, d_head) write; without one a
    number, 1 but for Granite.
    """
    norm = block_norms(model, layer).after_attn
    if norm is None:
        return residual_multiplier(model)
    attn = model.blocks[layer].attn
    written = einsum(z, attn.W_O, "... head d_head, head d_head d_model -> ... d_model")
    return frozen_gain(norm, written if getattr(attn.o, "bias", None) is None else written + attn.o.bias)


def mlp_gain(model: nn.Module, layer: int, activations: Tensor) -> Tensor | float:
    """(d_model) by which a norm after the MLP multiplies what its neurons (d_mlp) write; or a number, as attn_gain."""
    norm = block_norms(model, layer).after_mlp
    if norm is None:
        return residual_multiplier(model)
    mlp = model.blocks[layer].mlp
    written = activations @ mlp.W_out
    return frozen_gain(norm, written if getattr(mlp.out, "bias", None) is None else written + mlp.out.bias)


def parts_error(parts: dict[str, Tensor], whole: str = "logit") -> float:
    """How far the parts miss the whole ('logit', 'pre'), and the neurons the MLPs, relative to max(1, |whole|)."""
    summed = sum(parts[name].sum() for name in ("embed", "pos_embed", "heads", "attn_bias", "mlp", "constant"))
    miss = abs((summed - parts[whole]).item())
    if "neurons" in parts and len(parts["mlp"]):
        by_neuron = parts["neurons"].sum(1) + parts["mlp_bias"]
        miss = max(miss, (by_neuron - parts["mlp"]).abs().max().item())
    return miss / max(1.0, abs(parts[whole].item()))


#%% Logit attribution by layer alone, for any model whose stream can be read: each layer's write towards the answer
def layer_streams(model: nn.Module) -> list[str]:
    """The stream after 0, 1, ... n_layers blocks."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers))]


def direction_at_end(model: nn.Module, end: Tensor, token: int, less_mean: bool = False) -> tuple[Tensor, Tensor]:
    """
    (d_model) and (): a write to the stream that ends as `end` (d_model), times the first, summed, is its part of the
    token's logit, the final norm's scale frozen there; all writes' parts, found at once. For any final norm.
    """
    norm = final_norm(model)
    column = unembed_column(model, token, less_mean)
    normed = model.ln_final(end[None, None])[0, 0].float() - norm.bias
    direction = norm.weight * column
    end = end.float()
    if norm.centres:
        direction = direction - direction.mean()
        end = end - end.mean()
    scale = normed.norm() / (norm.weight * end).norm()
    return direction * scale, normed @ column


@t.no_grad()
def layer_writes(
    model: nn.Module, row: list[int], token: int, less_mean: bool = False
) -> tuple[dict[str, float], float]:
    """
    What each layer gives the logit of `token` after the row of token ids, and the logit itself, before a soft cap; with
    less_mean, less the mean logit of all tokens:
    ({'embed', 'L0' .., 'constant'}, their sum).
    The final norm's scale is frozen there.
    """
    _, cache = run_with_cache(model, t.tensor([row], device=device_of(model)), layer_streams(model))
    stream = t.stack([cache[name][0, -1] for name in layer_streams(model)])  # point d_model
    direction, logit = direction_at_end(model, stream[-1], token, less_mean)
    along = stream.float() @ direction

    constant = constant_logit(model, token, less_mean).item()
    writes = {"embed": along[0].item()}
    for layer, write in enumerate(along.diff().tolist()):
        writes[f"L{layer}"] = write
    writes["constant"] = constant
    return writes, logit.item() + constant


#%% Where each part's output lies in the stream: how long its write is, how much of the final stream, how much of a logit
@dataclass
class StreamParts:
    """The writes of one run at one position, which sum to the final stream, and the logit of a token by them."""

    names: list[str]  # embed, pos_embed, L0 attn, L0 mlp, ...; or embed, L0, L1 ... where layers are seen as a whole
    writes: Tensor  # (part, d_model)
    stream: Tensor  # (d_model) after the last block
    effects: Tensor  # (part) on the logit of the token less the mean logit of all, by the direct path
    constant: float  # what biases give that logit, whatever the stream holds
    logit: float  # the model's own, less the mean; before a soft cap or a scale
    logits: Tensor  # (d_vocab) of the run at the position
    cache: Cache  # of the run: the writes, and what else was asked for

    @property
    def norms(self) -> Tensor:
        return self.writes.norm(dim=-1)

    @property
    def shares(self) -> Tensor:
        """(part) how much of the final stream the write is, along it: they sum to 1, and a write against it is negative."""
        return self.writes @ self.stream / self.stream.norm() ** 2

    @property
    def cosines(self) -> Tensor:
        """(part, part + 1) of every two writes, in the last column of each write and the final stream."""
        others = t.cat([self.writes, self.stream[None]])
        return F.cosine_similarity(self.writes[:, None], others[None], dim=-1)

    @property
    def missed(self) -> float:
        """How far the writes miss the final stream, relative to its largest entry."""
        return ((self.writes.sum(0) - self.stream).abs().max() / self.stream.abs().max()).item()

    @property
    def effects_missed(self) -> float:
        """How far their effects miss the logit, relative to the largest effect."""
        return abs(self.effects.sum().item() + self.constant - self.logit) / self.effects.abs().max().item()


def write_names(model: nn.Module, whole_layers: bool) -> dict[str, str]:
    """{part: the hook that holds what it writes}; of whole layers, the stream after each."""
    if whole_layers:
        parts = ["embed", *(f"L{layer}" for layer in range(model.cfg.n_layers))]
        return dict(zip(parts, layer_streams(model)))
    names = {"embed": act_name("resid_pre", 0)}
    if hasattr(model, "W_pos") or hasattr(model, "pos_embed"):
        names["pos_embed"] = "hook_pos_embed"
    for layer in range(model.cfg.n_layers):
        names[f"L{layer} attn"] = act_name("attn_out", layer)
        names[f"L{layer} mlp"] = act_name("mlp_out", layer)
    return names


@t.no_grad()
def stream_parts(
    model: nn.Module,
    tokens: Tensor,
    token: int | None = None,
    position: int = -1,
    whole_layers: bool = False,
    also: list[str] | tuple[str, ...] = (),
) -> StreamParts:
    """
    The writes to the stream at one position of tokens (1, pos), and their effects on the logit of `token`; None is the
    likeliest. One run of the model, which `also` caches these hooks.
    whole_layers: each layer's write, attention and MLP together, for models whose stream alone is hooked (streamed,
    Mamba) or goes through norms (OPT-350m).
    """
    names = write_names(model, whole_layers)
    last = layer_streams(model)[-1]
    logits, cache = run_with_cache(model, tokens, [*names.values(), last, *also])
    logits = logits[0, position].float()
    if token is None:
        token = int(logits.argmax())
    found = t.cat([cache[name][:1, position] for name in names.values()]).float()
    end = cache[last][0, position]
    if whole_layers:
        writes = t.cat([found[:1], found.diff(dim=0)])
    else:
        writes = found
        if "pos_embed" in names:  # embed is then the rest of what enters the first block
            writes[0] = writes[0] - writes[1]
    direction, logit = direction_at_end(model, end, token, less_mean=True)
    constant = constant_logit(model, token, less_mean=True).item()
    return StreamParts(
        names=list(names),
        writes=writes.cpu(),
        stream=end.float().cpu(),
        effects=(writes @ direction).cpu(),
        constant=constant,
        logit=logit.item() + constant,
        logits=logits.cpu(),
        cache=cache,
    )
