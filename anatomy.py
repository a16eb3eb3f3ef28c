"""
What reads a hooked model without changing it: head scores, a logit taken apart exactly, catalogues of heads and
neurons, norm-based maps, activations, and bits of information.
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from utils import fail  # first: sets OpenMP's variables before torch is loaded
from hooks import (
    Cache,
    NormShape,
    act_name,
    ask_norm,
    block_norms,
    device_of,
    frozen_gain,
    hook_points,
    hooks,
    residual_multiplier,
    run_with_cache,
)
from data import str_tokens, to_tokens

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from scipy.sparse import csr_matrix
from tokenizers import Tokenizer
from torch import Tensor


#%% Gate: listening changes nothing
@t.no_grad()
def listening_gap(model: nn.Module, tokens: Tensor) -> float:
    """Largest difference of the logits with every hook cached and without, relative to the largest logit."""
    listened, _ = run_with_cache(model, tokens)
    alone = model(tokens)
    return (listened - alone).abs().max().item() / listened.abs().max().item()


#%% Repeated random tokens: what comes after the first copy can be known from the context alone
@t.no_grad()
def attention_patterns(model: nn.Module, tokens: Tensor) -> Tensor:
    """What every head attends to in tokens (1, pos): (layer x head, query, key)."""
    _, cache = run_with_cache(model, tokens, "blocks.*.attn.hook_pattern")
    return t.cat([cache["pattern", layer][0].float().cpu() for layer in range(model.cfg.n_layers)])


def attention_in(model: nn.Module, tokenizer: Tokenizer, text: str) -> tuple[list[str], Tensor]:
    """The tokens of a text, and what every head attends to in it: (layer x head, query, key)."""
    tokens = to_tokens(tokenizer, text).to(device_of(model))
    return str_tokens(tokenizer, tokens[0]), attention_patterns(model, tokens)


def repeated_tokens(batch: int, half: int, vocab: Tensor | int, bos: int | None = None, seed: int = 0) -> Tensor:
    """(batch, [bos] + 2 * half): random tokens, said twice. vocab: the number of tokens, or the ids to draw from."""
    generator = t.Generator().manual_seed(seed)
    pool = vocab if isinstance(vocab, Tensor) else t.arange(vocab)
    once = pool[t.randint(len(pool), (batch, half), generator=generator)]
    twice = t.cat([once, once], dim=1)
    if bos is None:
        return twice
    return t.cat([t.full((batch, 1), bos), twice], dim=1)


def known_tokens(corpus: object, at_least: int = 100) -> Tensor:
    """
    Ids of the tokens that training has seen `at_least` times, since an untrained embedding tells nothing; where the
    text is small, the 50 most frequent. corpus: a data.Corpus.
    """
    counts = sum(np.bincount(part, minlength=corpus.d_vocab) for part in corpus.train.values())
    if corpus.bos is not None:
        counts[corpus.bos] = 0
    fiftieth = np.sort(counts)[-min(50, len(counts))]
    known = np.flatnonzero((counts >= min(at_least, fiftieth)) & (counts > 0))
    return t.from_numpy(known)


def spaced_repeats(batch: int, half: int, pool: Tensor, bos: int | None = None, seed: int = 0) -> Tensor:
    """
    (batch, [bos] + 2 * half): random tokens, of which the last half // 2 (at least 2) have been said once before, in
    each row at its own distance. A head that looks back over one fixed distance, whatever stands there, finds the
    earlier copy in few rows. Each row's tokens differ otherwise, where the pool (ids) has enough of them.
    """
    generator = t.Generator().manual_seed(seed)
    said = max(2, half // 2)
    length = 2 * half
    if length < 2 * said:
        fail(f"rows of {length} tokens have no place for a repeat: give longer rows (--contexts)")
    distances = t.randint(said, length - said + 1, (batch,), generator=generator).tolist()
    rows = []
    for distance in distances:
        if len(pool) >= length:
            row = pool[t.randperm(len(pool), generator=generator)[:length]]
        else:
            row = pool[t.randint(len(pool), (length,), generator=generator)]
        start = length - said - distance
        row[-said:] = row[start : start + said].clone()
        rows.append(row)
    rows = t.stack(rows)
    if bos is None:
        return rows
    return t.cat([t.full((batch, 1), bos), rows], dim=1)


def random_repeats(corpus: object, rows: int, half: int, seed: int, at_least: int = 100) -> Tensor:
    """spaced_repeats of tokens that training has seen. corpus: a data.Corpus."""
    return spaced_repeats(rows, half, known_tokens(corpus, at_least), corpus.bos, seed)


#%% Head scores on repeated random tokens, one function per kind: pattern (batch, head, query, key) -> (head) in 0..1
def stripe(pattern: Tensor, offset: int, start: int = 0) -> Tensor:
    """Mean attention (head) that queries from position start on pay to the key `offset` places back."""
    paid = pattern.diagonal(-offset, dim1=-2, dim2=-1)  # batch head (query - offset)
    return paid[..., max(start - offset, 0) :].mean((0, -1))


def prefix_matching_score(pattern: Tensor, half: int) -> Tensor:
    """Induction heads: attention to the token after the earlier copy (Olsson et al. 2022)."""
    second = pattern.shape[-1] - half  # where the second copy begins
    return stripe(pattern, half - 1, second)


def duplicate_token_score(pattern: Tensor, half: int) -> Tensor:
    """Attention to the earlier copy itself (Wang et al. 2022)."""
    second = pattern.shape[-1] - half
    return stripe(pattern, half, second)


def previous_token_score(pattern: Tensor) -> Tensor:
    """Attention one place back, from the third token on: for the second, the previous token is the first."""
    return stripe(pattern, 1, 2)


def first_token_score(pattern: Tensor) -> Tensor:
    """Attention to the first token, where heads rest that have nothing to do (Xiao et al. 2023)."""
    return pattern[:, :, 2:, 0].mean((0, 2))


def head_scores(model: nn.Module, n_layers: int, tokens: Tensor, half: int | None = None) -> dict[str, Tensor]:
    """
    {'prefix_matching', 'previous_token', 'duplicate_token', 'first_token': (layer, head) in 0..1}, on the CPU.
    With half: by the field's stripes, of tokens (batch, pos) as repeated_tokens makes them. Without: attention to
    where each role looks in whatever rows (role_targets), as spaced_repeats needs it.
    """
    if half is None:
        with t.no_grad():
            found = attention_scores(model, tokens, {role: [mask] for role, mask in role_targets(tokens).items()})
        return {SCORE_NAMES[role]: looked[0] for role, looked in found.items()}
    with t.no_grad():
        _, cache = run_with_cache(model, tokens, [act_name("pattern", layer) for layer in range(n_layers)])
    patterns = [cache["pattern", layer].float() for layer in range(n_layers)]
    scores = {
        "prefix_matching": [prefix_matching_score(pattern, half) for pattern in patterns],
        "previous_token": [previous_token_score(pattern) for pattern in patterns],
        "duplicate_token": [duplicate_token_score(pattern, half) for pattern in patterns],
        "first_token": [first_token_score(pattern) for pattern in patterns],
    }
    return {name: t.stack(by_layer).cpu() for name, by_layer in scores.items()}


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


#%% What a head would take from one place, whatever it looks at
def extraction_by_head(model: nn.Module, x: Tensor, layer: int) -> Tensor:
    """
    (head, row, d_model): what each head of a block writes where it attends to nothing but the stream x (row, d_model),
    W_O W_V norm(x), its biases left out. Through the unembedding: attribute extraction (Geva et al. 2023).
    """
    attn = model.blocks[layer].attn
    norm = block_norms(model, layer).before_attn
    normed = x if norm is None else norm(x[None])[0]
    W_V = attn.W_V.repeat_interleave(model.cfg.n_heads // len(attn.W_V), 0)  # (head, d_model, d_head)
    z = einsum(normed, W_V, "row d_model, head d_model d_head -> head row d_head")
    return einsum(z, attn.W_O, "head row d_head, head d_head d_model -> head row d_model")


#%% Head catalogue: where each kind of head looks, True in (row, query, key) of tokens (row, pos)
# What a role must at least be worth, whatever chance gives: a share of attention; of copying, a rank.
FLOORS = {"previous token": 0.3, "duplicate token": 0.1, "induction": 0.1, "text-begin sink": 0.5, "copying": 0.95}
BY_POSITION = ("previous token", "text-begin sink")  # their null: for each query one of its keys at random
BY_CONTENT = ("duplicate token", "induction")  # their null: each row's looks are another row's
SCORE_NAMES = {
    "previous token": "previous_token",
    "duplicate token": "duplicate_token",
    "induction": "prefix_matching",
    "text-begin sink": "first_token",
}
COPIED = 256  # places whose tokens a copying head is asked to copy
CONTROLS = 4  # runs on rows without a repeat


def places_back(tokens: Tensor) -> Tensor:
    """(query, key): how many places the key lies before the query."""
    place = t.arange(tokens.shape[1], device=tokens.device)
    return place[:, None] - place


def same_token(tokens: Tensor) -> Tensor:
    """(row, query, key): query and key hold the same token."""
    return tokens[:, :, None] == tokens[:, None]


def for_every_row(targets: Tensor, tokens: Tensor) -> Tensor:
    return targets.expand(len(tokens), -1, -1)


def previous_token_targets(tokens: Tensor) -> Tensor:
    """The key one place back, asked from the third token on: for the second, the previous token is the first."""
    back = places_back(tokens)
    asked = back[:, :1] > 1
    return for_every_row((back == 1) & asked, tokens)


def text_begin_targets(tokens: Tensor) -> Tensor:
    """The first token, asked from the third token on."""
    place = t.arange(tokens.shape[1], device=tokens.device)
    asked = place[:, None] > 1
    return for_every_row((place == 0) & asked, tokens)


def duplicate_token_targets(tokens: Tensor) -> Tensor:
    """Earlier copies of the query's token."""
    return same_token(tokens) & (places_back(tokens) > 0)


def induction_targets(tokens: Tensor) -> Tensor:
    """The key after an earlier copy of the query's token."""
    after_same = F.pad(same_token(tokens)[:, :, :-1], (1, 0))
    return after_same & (places_back(tokens) > 0)


def role_targets(tokens: Tensor) -> dict[str, Tensor]:
    """Where each role looks, True in (row, query, key)."""
    return {
        "previous token": previous_token_targets(tokens),
        "text-begin sink": text_begin_targets(tokens),
        "duplicate token": duplicate_token_targets(tokens),
        "induction": induction_targets(tokens),
    }


#%% Head catalogue: how much each head looks there, and the same with the role's structure shuffled away
def attention_on(pattern: Tensor, targets: Tensor) -> Tensor:
    """(head): attention (row, head, query, key) on targets (row, query, key), mean over queries that have a target."""
    asked = targets.any(-1)
    return einsum(pattern, targets.to(pattern.dtype), "row head query key, row query key -> head") / asked.sum()


def attention_scores(model: nn.Module, rows: Tensor, looks: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """
    {role: (look, layer, head)}: attention paid to each of a role's looks, which are targets (row, query, key).
    One layer's patterns are in memory at a time.
    """
    by_layer: dict[str, list[Tensor]] = {role: [] for role in looks}

    def score(pattern: Tensor, hook: nn.Module) -> None:
        for role, masks in looks.items():
            by_look = t.stack([attention_on(pattern.float(), mask) for mask in masks])
            by_layer[role].append(by_look.cpu())

    with hooks(model, [(act_name("pattern", layer), score) for layer in range(model.cfg.n_layers)]):
        model(rows)
    return {role: t.stack(scores, 1) for role, scores in by_layer.items()}


def without_repeats(tokens: Tensor, generator: t.Generator) -> Tensor:
    """The rows (row, pos), in which what is said again later is replaced by another of their tokens at random."""
    said_again = (same_token(tokens) & (places_back(tokens) < 0)).any(-1)
    said_again[:, 0] = False
    drawn = t.randint(tokens.numel(), tokens.shape, generator=generator).to(tokens.device)
    return t.where(said_again, tokens.flatten()[drawn], tokens)


def control_scores(model: nn.Module, tokens: Tensor, generator: t.Generator) -> dict[str, Tensor]:
    """
    {role by content: (layer, head)}: each head's attention to the same places of rows in which nothing is repeated,
    mean of CONTROLS runs. A head that looks there by position alone has its whole score here.
    """
    targets = role_targets(tokens)
    looks = {role: [targets[role]] for role in BY_CONTENT}
    runs = [attention_scores(model, without_repeats(tokens, generator), looks) for _ in range(CONTROLS)]
    return {role: t.cat([run[role] for run in runs]).mean(0) for role in BY_CONTENT}


#%% ... two permutation nulls from the patterns of one run, so that a thousand shuffles cost little
def other_rows_null(pattern: Tensor, targets: Tensor, orders: Tensor) -> Tensor:
    """
    (shuffle, head): attention_on where each row's targets are those of another row.
    pattern (row, head, query, key); targets (row, query, key); orders (shuffle, row), each a permutation of the rows.
    """
    paid = einsum(pattern, targets.to(pattern.dtype), "row head query key, other query key -> head row other")
    rows = t.arange(len(pattern), device=pattern.device)
    permuted = paid[:, rows, orders].sum(-1)  # (head, shuffle)
    return permuted.T / targets.any(-1).sum()


def overlap(targets: Tensor) -> float:
    """Share of a row's targets (row, query, key) that another row has too, mean over pairs of rows."""
    by_place = targets.sum(0).float()
    shared = (by_place * (by_place - 1)).sum() / max(1, len(targets) - 1)
    return (shared / targets.sum()).item()


def random_keys_null(pattern: Tensor, targets: Tensor, draws: Tensor) -> Tensor:
    """
    (shuffle, head): attention_on where each query that has a target has one of its visible keys at random instead.
    pattern (row, head, query, key); draws (shuffle, row, query) in 0..1.
    """
    asked = targets.any(-1).to(pattern.dtype)
    visible = t.arange(1, pattern.shape[-1] + 1, device=pattern.device)
    keys = (draws * visible).long().permute(1, 2, 0)  # (row, query, shuffle)
    by_head = []
    for head in range(pattern.shape[1]):
        paid = pattern[:, head].gather(-1, keys)
        by_head.append(einsum(paid, asked, "row query shuffle, row query -> shuffle") / asked.sum())
    return t.stack(by_head, 1)


def attention_nulls(
    model: nn.Module, tokens: Tensor, targets: dict[str, Tensor], shuffles: int, generator: t.Generator
) -> dict[str, Tensor]:
    """{role by attention: (shuffle, layer, head)}: the scores with the role's structure shuffled away."""
    n_rows, length = tokens.shape
    orders = t.rand((shuffles, n_rows), generator=generator).argsort(1).to(tokens.device)
    draws = t.rand((shuffles, n_rows, length), generator=generator).to(tokens.device)
    by_layer: dict[str, list[Tensor]] = {role: [] for role in targets}

    def shuffle(pattern: Tensor, hook: nn.Module) -> None:
        for role in BY_CONTENT:
            by_layer[role].append(other_rows_null(pattern.float(), targets[role], orders).cpu())
        for role in BY_POSITION:
            by_layer[role].append(random_keys_null(pattern.float(), targets[role], draws).cpu())

    with hooks(model, [(act_name("pattern", layer), shuffle) for layer in range(model.cfg.n_layers)]):
        model(tokens)
    return {role: t.stack(nulls, 1) for role, nulls in by_layer.items()}


def copying_ranks(model: nn.Module, tokens: Tensor, places: Tensor, ids: Tensor) -> list[Tensor]:
    """
    How much a head raises each token when it is fed what stands at a place: per layer (place, head, token of ids), the
    token's rank among ids in 0..1, by the logit that the head's value-output map writes.
    places: indices into tokens.flatten(). The direct path from the values of a real run, through folded_W_U's weights.
    """
    layers = range(model.cfg.n_layers)
    _, cache = run_with_cache(model, tokens, [act_name("v", layer) for layer in layers])
    unembedding = folded_W_U(model, ids)
    ranks = []
    for layer in layers:
        values = per_head(cache["v", layer], model.cfg.n_heads).flatten(0, 1)
        raised = einsum(
            values[places].float(),
            model.blocks[layer].attn.W_O.float(),
            unembedding,
            "place head d_head, head d_head d_model, d_model token -> place head token",
        )
        ranks.append(raised.argsort(-1).argsort(-1) / (len(ids) - 1))
    return ranks


def copying_scores(ranks: list[Tensor], namings: list[Tensor]) -> Tensor:
    """
    (naming, layer, head): mean rank of the token that each place is said to hold.
    A naming (place) says which: indices into copying_ranks's ids. ranks as copying_ranks gives them.
    """
    by_layer = []
    for rank in ranks:
        n_heads = rank.shape[1]
        by_naming = []
        for naming in namings:
            own = naming[:, None, None].expand(-1, n_heads, 1)
            by_naming.append(rank.gather(-1, own).mean((0, 2)))
        by_layer.append(t.stack(by_naming).cpu())
    return t.stack(by_layer, 1)


@t.no_grad()
def catalogue(
    model: nn.Module, tokens: Tensor, shuffles: int = 1000, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, list[str]]]:
    """
    Which head plays which role: (scores {role: (layer, head)}, bars {role: float}, names {head: its roles}).
    tokens (batch, pos): rows that repeat tokens, each at its own distance (spaced_repeats). Ours or a TransformerBridge.
    Scores of the roles by attention: attention to where the role looks (role_targets). 'copying' is by OV score: of the
    other tokens in the rows, the share whose logit the head's value-output map, fed a token, raises less than that
    token's own; 0.5 is chance (copying_ranks).
    A bar is the larger of the role's floor and the 99th percentile, over shuffles, of the maximum over all heads
    (which_bar says which). Shuffled are each query's keys (previous token, sink), which row looks where (duplicate,
    induction) or the tokens' names (copying). Of duplicate and induction, what must lie above the bar is the score less
    the same head's where nothing is repeated (control_scores).
    """
    generator = t.Generator().manual_seed(seed)
    targets = role_targets(tokens)
    if not targets["induction"].any():
        fail("the head catalogue needs rows that repeat tokens: spaced_repeats")
    places = t.randperm(tokens.numel(), generator=generator)[:COPIED].to(tokens.device)

    found = attention_scores(model, tokens, {role: [mask] for role, mask in targets.items()})
    scores = {role: looked[0] for role, looked in found.items()}
    nulls = attention_nulls(model, tokens, targets, shuffles, generator)
    for role in BY_CONTENT:
        if overlap(targets[role]) > 0.5:  # one distance in all rows: shuffling them says nothing, the control does
            nulls[role] = nulls[role][:0]
    control = control_scores(model, tokens, generator)

    # copying: the tokens' own names, then shuffled names
    ids, own = tokens.flatten()[places].unique(return_inverse=True)
    namings = [own]
    for _ in range(shuffles):
        order = t.randperm(len(own), generator=generator).to(own.device)
        namings.append(own[order])
    by_naming = copying_scores(copying_ranks(model, tokens, places, ids), namings)
    scores["copying"] = by_naming[0]
    nulls["copying"] = by_naming[1:]

    bars = {role: role_bar(role, null) for role, null in nulls.items()}
    above_control = {role: score - control.get(role, 0.0) for role, score in scores.items()}
    return scores, bars, roles_above(above_control, bars)


def role_bar(role: str, null: Tensor) -> float:
    """
    The larger of the role's floor and the 99th percentile, over shuffles, of the best of all heads.
    null (shuffle, layer, head): the scores with the role's structure shuffled away.
    """
    if len(null) == 0:
        return FLOORS[role]
    best_of_heads = null.flatten(1).amax(1)
    return max(FLOORS[role], best_of_heads.quantile(0.99).item())


def which_bar(role: str, bar: float) -> str:
    """Which of the two decided."""
    return "floor" if bar == FLOORS[role] else "null"


def heads_of_role(role: str, roles: dict[str, list[str]], scores: dict[str, Tensor]) -> list[str]:
    """The heads that are named for the role, strongest first; roles and scores as catalogue gives them."""
    strength = dict(zip(roles, scores[role].flatten().tolist()))
    return sorted((name for name in roles if role in roles[name]), key=lambda name: -strength[name])


def roles_above(scores: dict[str, Tensor], bars: dict[str, float]) -> dict[str, list[str]]:
    """{head: the roles whose score lies above the bar}."""
    n_layers, n_heads = next(iter(scores.values())).shape
    roles = {}
    for layer in range(n_layers):
        for head in range(n_heads):
            roles[f"L{layer}H{head}"] = [role for role in scores if scores[role][layer, head] > bars[role]]
    return roles


#%% Neuron catalogue: where neurons fire, and which tokens they raise
@t.no_grad()
def neuron_catalogue(
    model: nn.Module, rows: Tensor, layer: int, n: int = 4, contexts: int = 5, also: list[int] = ()
) -> list[dict]:
    """
    The n neurons of a layer with the largest peak |activation| x ||W_out||, and those asked for, each as
    'neuron': its index;
    'peaks': [(activation, row, position)] in the `contexts` rows where it is strongest, largest first;
    'dips': the same where it is below zero by more than a tenth of its largest size (a gated neuron can be);
    'activation' (row, pos), 'largest' of it in size, 'density': the share of tokens with more than a tenth of that;
    'effect' (d_vocab): on the logits of an activation of 1, by the direct path (neuron_effect).
    """
    _, cache = run_with_cache(model, rows, act_name("post", layer), stop_at_layer=layer + 1)
    post = cache["post", layer].float()  # row pos neuron
    largest = post.abs().amax((0, 1))
    strength = largest * model.blocks[layer].mlp.W_out.float().norm(dim=-1)
    strongest = strength.topk(min(n, len(strength))).indices.tolist()
    unembedding = folded_W_U(model)
    found = []
    for neuron in dict.fromkeys([*also, *strongest]):
        activation = post[:, :, neuron]  # row pos
        threshold = largest[neuron] / 10
        dips = [(-x, row, pos) for x, row, pos in peaks_by_row(-activation, contexts) if x > threshold]
        found.append(
            {
                "neuron": neuron,
                "peaks": peaks_by_row(activation, contexts),
                "dips": dips,
                "activation": activation.cpu(),
                "largest": largest[neuron].item(),
                "density": (activation.abs() > threshold).float().mean().item(),
                "effect": neuron_effect(model, layer, neuron, unembedding).cpu(),
            }
        )
    return found


def peaks_by_row(activation: Tensor, n: int) -> list[tuple[float, int, int]]:
    """[(activation, row, position)] of activation (row, pos): the n rows with the largest, largest first."""
    peak, position = activation.max(1)
    rows = peak.topk(min(n, len(peak))).indices.tolist()
    return [(peak[row].item(), row, position[row].item()) for row in rows]


def write_weight(norm: nn.Module | None, like: Tensor) -> Tensor | float:
    """(d_model): the weight of a norm after attention or the MLP (Gemma 2), whose scale is left out; 1 without one."""
    if norm is None:
        return 1.0
    return ask_norm(norm, like.shape[-1], like).weight


def neuron_effect(model: nn.Module, layer: int, neuron: int, unembedding: Tensor) -> Tensor:
    """
    (d_vocab): what a neuron's W_out gives each logit, less the mean of all tokens, which softmax does not see.
    unembedding: folded_W_U(model); the scales of the norms are left out.
    """
    mlp = model.blocks[layer].mlp
    write = mlp.W_out[neuron].float() * write_weight(block_norms(model, layer).after_mlp, mlp.W_out)
    effect = write @ unembedding
    return effect - effect.mean()


def sharpness(effect: Tensor) -> Tensor:
    """(...): by how many standard deviations over tokens (..., d_vocab) the strongest, up or down, stands out."""
    centred = effect - effect.mean(-1, keepdim=True)
    return centred.abs().amax(-1) / centred.std(-1)


def sharpness_null(matrix: Tensor, n: int = 200, seed: int = 0) -> float:
    """95th percentile of the sharpness of n random directions through matrix (d_model, d_vocab): any has its top tokens."""
    generator = t.Generator().manual_seed(seed)
    directions = t.randn((n, len(matrix)), generator=generator).to(matrix.device)
    return sharpness(directions @ matrix).quantile(0.95).item()


#%% Neuron catalogue: what a neuron reads, by tokens and by what has written to the stream
def neuron_readers(model: nn.Module, layer: int) -> dict[str, tuple[nn.Module, Tensor, str]]:
    """
    {'in': ...} or, where the MLP is gated, {'gate': ..., 'in': ...}: the linear map that neurons read by, its weights
    (d_model, d_mlp), and the hook of what it gives. A gated neuron's activation is act(gate) x in.
    """
    mlp = model.blocks[layer].mlp
    into = getattr(mlp, "inp", None) or getattr(mlp, "in")
    if getattr(mlp, "W_gate", None) is None:
        return {"in": (into, mlp.W_in, act_name("pre", layer))}
    linear = f"blocks.{layer}.mlp.hook_pre_linear"
    return {"gate": (mlp.gate, mlp.W_gate, act_name("pre", layer)), "in": (into, mlp.W_in, linear)}


def embeddings_as_read(model: nn.Module, norm: nn.Module | None) -> Tensor:
    """(d_model, token) in float32: each token's embedding by itself, through a block's norm."""
    W_E = model.W_E
    normed = W_E if norm is None else norm(W_E[None])[0]
    return normed.float().T


def tokens_read(model: nn.Module, layer: int, neuron: int, as_read: Tensor) -> dict[str, Tensor]:
    """
    {reader: (d_vocab)}: each token's embedding against the neuron's W_in (and W_gate), less the mean of all tokens.
    as_read: embeddings_as_read of the norm before the layer's MLP.
    """
    found = {}
    for reader, (_, W, _) in neuron_readers(model, layer).items():
        read = W[:, neuron].float() @ as_read
        found[reader] = (read - read.mean()).cpu()
    return found


def read_direction(norm: nn.Module | None, column: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """
    (direction (d_model), constant ()): what a column (d_model) of weights reads of norm(x) is x . direction + constant,
    with the norm's scale frozen as it is at x (d_model).
    """
    column = column.float()
    if norm is None:
        return column, column.new_zeros(())
    shape = ask_norm(norm, len(x), x)
    direction = shape.weight * column
    centred = x.float()
    if shape.centres:
        centred = centred - centred.mean()
        direction = direction - direction.mean()
    normed = norm(x[None, None])[0, 0].float() - shape.bias
    scale = (shape.weight * centred).norm() / normed.norm()
    return direction / scale, shape.bias @ column


@t.no_grad()
def neuron_parts(
    model: nn.Module, tokens: Tensor, layer: int, neuron: int, position: int, reader: str = "in"
) -> dict[str, Tensor]:
    """
    What a neuron reads ('in' or, of a gated one, 'gate') at one position of tokens (1, pos), and the parts that sum to
    it: as logit_parts, of the layers that have written before, the scale of the norm before the MLP frozen;
    'constant': what the biases of that norm and of the map give;
    'pre' (): the model's own pre-activation.
    Ours or a TransformerBridge; attention and MLP one after the other or side by side.
    """
    linear, W, hook = neuron_readers(model, layer)[reader]
    serial = act_name("resid_mid", layer) in hook_points(model)
    n_attn = layer + 1 if serial else layer
    enters = act_name("resid_mid" if serial else "resid_pre", layer)
    names = dict.fromkeys([*write_sites(model, n_attn, layer), enters, hook])
    _, cache = run_with_cache(model, tokens, list(names), stop_at_layer=layer + 1)

    norm = block_norms(model, layer).before_mlp
    direction, constant = read_direction(norm, W[:, neuron], cache[enters][0, position])
    bias = getattr(linear, "bias", None)
    if bias is not None:
        constant = constant + bias[neuron].float()
    parts = parts_along(model, cache, position, direction, n_attn, layer)
    return parts | {"constant": constant, "pre": cache[hook][0, position, neuron].float()}


def without_sources(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    The parts of neuron_parts or logit_parts with each head's sources and all biases together: 'embed', 'pos_embed',
    'biases' and 'constant' (), 'heads' (layer, head), 'neurons' (layer, d_mlp) or, where there are none, 'mlp' (layer).
    """
    written = "neurons" if "neurons" in parts else "mlp"
    biases = parts["attn_bias"].sum()
    if "mlp_bias" in parts:
        biases = biases + parts["mlp_bias"].sum()
    return {
        "embed": parts["embed"],
        "pos_embed": parts["pos_embed"],
        "heads": parts["heads"].sum(-1),
        written: parts[written],
        "biases": biases,
        "constant": parts["constant"],
    }


def strongest_parts(parts: dict[str, Tensor], n: int) -> list[tuple[str, float]]:
    """[(name, what it gives)] of the n largest in size: 'embed', 'L0H1', 'L0N17', 'L0 MLP' ...; parts: without_sources."""
    letters = {"heads": "H", "neurons": "N"}
    found = []
    for kind, values in parts.items():
        flat = values.flatten()
        for i in flat.abs().topk(min(n, len(flat))).indices.tolist():
            name = kind
            if kind in letters:
                layer, number = divmod(i, values.shape[1])
                name = f"L{layer}{letters[kind]}{number}"
            if kind == "mlp":
                name = f"L{i} MLP"
            found.append((name, flat[i].item()))
    found.sort(key=lambda part: -abs(part[1]))
    return found[:n]


#%% What a head does in texts, and what its value-output map carries most of
@t.no_grad()
def head_looks(model: nn.Module, rows: Tensor, layer: int, n: int = 3) -> list[list[tuple[float, int, int, Tensor]]]:
    """
    Per head of a layer the n rows (row, pos) where it brings most from one earlier place, neither the first token's nor
    the query's own, by norm (Kobayashi et al. 2020): [(||attention x value x W_O||, row, query, attention (query's keys))].
    """
    names = [act_name(site, layer) for site in ("v", "pattern")]
    _, cache = run_with_cache(model, rows, names, stop_at_layer=layer + 1)
    values = per_head(cache["v", layer], model.cfg.n_heads).float()
    W_O = model.blocks[layer].attn.W_O.float()
    size = einsum(values, W_O, "row key head d_head, head d_head d_model -> row head key d_model").norm(dim=-1)
    pattern = cache["pattern", layer].float()
    brought = pattern * size[:, :, None]
    brought[..., 0] = 0
    brought.diagonal(dim1=-2, dim2=-1).zero_()
    n_keys = brought.shape[-1]
    found = []
    for head in range(model.cfg.n_heads):
        looks = []
        for x, row, place in peaks_by_row(brought[:, head].flatten(1), n):
            query = place // n_keys
            looks.append((x, row, query, pattern[row, head, query, : query + 1].cpu()))
        found.append(looks)
    return found


@t.no_grad()
def head_map(model: nn.Module, layer: int, head: int) -> tuple[Tensor, Tensor, float]:
    """
    (read (d_model), write (d_model), share): the first pair of singular directions of W_V W_O (Millidge & Black 2022)
    and their share of its squared norm. What lies along read is written along write. The weights of the norm before are
    folded in, of one after too; scales are left out.
    """
    attn = model.blocks[layer].attn
    norms = block_norms(model, layer)
    W_V = attn.W_V[head // (model.cfg.n_heads // len(attn.W_V))].float()  # d_model d_head
    W_O = attn.W_O[head].float()  # d_head d_model
    if norms.before_attn is not None:
        shape = ask_norm(norms.before_attn, len(W_V), attn.W_V)
        W_V = shape.weight[:, None] * W_V
        W_V = W_V - W_V.mean(0) if shape.centres else W_V
    W_O = W_O * write_weight(norms.after_attn, attn.W_O)
    q_read, r_read = t.linalg.qr(W_V)  # of d_head columns, so that no (d_model, d_model) is taken apart
    q_write, r_write = t.linalg.qr(W_O.T)
    u, s, vh = t.linalg.svd(r_read @ r_write.T)
    share = (s[0] ** 2 / s.pow(2).sum()).item()
    return q_read @ u[:, 0], q_write @ vh[0], share


#%% Folding: norm weights go into the matrices that read, and what the norm removes is taken out of those that write
def fold_into_readers(norm: nn.Module, readers: list[nn.Linear], with_mean: bool) -> None:
    """
    The norm's weight (and bias) go into the linear maps that read it, in place.
    with_mean: the norm centres, so that the maps need no longer see the mean.
    """
    for linear in readers:
        if with_mean:
            linear.bias += linear.weight @ norm.bias
        linear.weight *= norm.weight
        if with_mean:
            linear.weight -= linear.weight.mean(1, keepdim=True)
    norm.weight.fill_(1)
    if with_mean:
        norm.bias.zero_()


def centre_writes(linear: nn.Linear) -> None:
    """What the linear map writes gets mean 0."""
    linear.weight -= linear.weight.mean(0, keepdim=True)
    if linear.bias is not None:
        linear.bias -= linear.bias.mean(0, keepdim=True)


@t.no_grad()
def fold_norm[Model: nn.Module](model: Model) -> Model:
    """
    A copy with the same log-probabilities, whose norms have weight 1 and bias 0.
    In float32, since bf16 would round the products.
    """
    folded = copy.deepcopy(model).float()
    with_mean = centres(model)
    folded.unembed.weight = nn.Parameter(folded.unembed.weight.clone())  # unties
    if with_mean:
        folded.unembed.bias = nn.Parameter(t.zeros(folded.cfg.d_vocab, device=folded.W_U.device))

    for block in folded.blocks:
        linears = [(name, module) for name, module in block.mlp.named_modules() if isinstance(module, nn.Linear)]
        mlp_readers = [linear for name, linear in linears if not name.endswith("out")]
        mlp_writers = [linear for name, linear in linears if name.endswith("out")]
        fold_into_readers(block.ln1, [block.attn.q, block.attn.k, block.attn.v], with_mean)
        fold_into_readers(block.ln2, mlp_readers, with_mean)
        if with_mean:
            for linear in [block.attn.o, *mlp_writers]:
                centre_writes(linear)
    fold_into_readers(folded.ln_final, [folded.unembed], with_mean)

    centre_writes(folded.unembed)  # a constant added to every logit is not seen by softmax
    if with_mean:
        folded.embed.weight -= folded.embed.weight.mean(1, keepdim=True)
        if hasattr(folded, "W_pos"):
            folded.W_pos -= folded.W_pos.mean(1, keepdim=True)
    return folded


#%% Norm-based maps (Kobayashi et al. 2021, 2024): each source in a position's stream, through attention and the MLP
def mixing_ratio(by_source: Tensor) -> Tensor:
    """
    Share (query) of a stream that comes from other positions, of what each key brings to each query (query, key,
    d_model): ||sum of the others|| / (that + ||own||) (Kobayashi et al. 2021). The first query has no others: 0.
    """
    own = by_source.diagonal(dim1=0, dim2=1).T  # (query, d_model)
    others_norm = (by_source.sum(1) - own).norm(dim=-1)
    return others_norm / (others_norm + own.norm(dim=-1))


def mlp_readers(mlp: nn.Module) -> list[nn.Linear]:
    """The maps whose outputs the activation takes: one, or gate and input."""
    return [mlp.gate, mlp.inp] if hasattr(mlp, "gate") else [mlp.inp]


def neuron_activation(mlp: nn.Module, pre: list[Tensor]) -> Tensor:
    """Activations of the neurons from the outputs of mlp_readers."""
    if hasattr(mlp, "gate"):
        gate, linear = pre
        return F.silu(gate) * linear
    return mlp.act(pre[0])


def mean_slopes(activation: Callable, start: list[Tensor], change: list[Tensor], nodes: int) -> list[Tensor]:
    """
    Integrated gradients: of each input, the gradient of activation, averaged over the straight path from start to
    start + change (Gauss-Legendre with so many nodes).
    start, change: one tensor an input, as activation takes them.
    """
    slopes = [0.0] * len(start)
    places, weights = np.polynomial.legendre.leggauss(nodes)  # on -1 .. 1
    for place, weight in zip(places, weights):
        part = (place + 1) / 2  # of the way, on 0 .. 1
        along = [(at_start + part * step).requires_grad_() for at_start, step in zip(start, change)]
        gradients = t.autograd.grad(activation(along).sum(), along)
        slopes = [mean + weight / 2 * gradient for mean, gradient in zip(slopes, gradients)]
    return slopes


def ff_maps(model: nn.Module, tokens: Tensor, layer: int, nodes: int = 48) -> dict[str, Tensor]:
    """
    How much each key's residual stream brings to each query of tokens (1, pos), as norms (query, key):
    'attn': ||sum over heads of alpha f(x)||, f each head's value-output map, its value bias included;
    'attn_res': the same, + x where key = query;
    'attn_res_norm': attn_res after ln2, its scale frozen;
    'ff': what goes on through the MLP;
    'ff_res': attn_res + ff, added as vectors;
    'mixing_attn_res', 'mixing_ff_res' (query): the mixing_ratio of these;
    'weighted' (head, query, key): ||alpha f(x)||;
    'error' (): how far all sources + biases miss the model's own resid_post, relative to its largest entry.
    Through the activation, each source's share is its integrated gradient on the straight path from the biases alone to
    the real pre-activation (mean_slopes). GELU or SwiGLU, LayerNorm or RMSNorm.
    """
    block = model.blocks[layer]
    norm = block.ln2
    mlp = block.mlp
    readers = mlp_readers(mlp)
    b_O = 0.0 if block.attn.o.bias is None else block.attn.o.bias
    scale_name = f"blocks.{layer}.ln2.hook_scale"

    def normalised(y: Tensor, scale: Tensor) -> Tensor:
        """ln2 with its scale frozen, without its bias."""
        if centres(model):
            y = y - y.mean(-1, keepdim=True)
        return y / scale * norm.weight

    # step 1: what each key's stream brings through attention, and through ln2 to the neurons; and what the biases bring
    # apart from all keys
    with t.no_grad():
        sites = [act_name(site, layer) for site in ("v", "pattern", "resid_pre", "resid_post")]
        _, cache = run_with_cache(model, tokens, [*sites, scale_name])
        x = cache["resid_pre", layer][0]
        scale = cache[scale_name][0]
        by_head = einsum(
            cache["pattern", layer][0],
            per_head(cache["v", layer], model.cfg.n_heads)[0],
            block.attn.W_O,
            "head query key, key head d_head, head d_head d_model -> head query key d_model",
        )
        attn = by_head.sum(0)
        own_stream = t.diag_embed(x.T).permute(1, 2, 0)  # query key d_model: x where key = query
        stream = attn + own_stream
        normed = normalised(stream, scale[:, None])
        normed_biases = normalised(b_O + 0 * x, scale)
        if centres(model):
            normed_biases = normed_biases + norm.bias
        pre = [normed @ linear.weight.T for linear in readers]  # query key neuron
        start = [F.linear(normed_biases, linear.weight, linear.bias) for linear in readers]  # query neuron

    # step 2: through the activation each key gets the mean slope times what it brings
    def activation(pre: list[Tensor]) -> Tensor:
        return neuron_activation(mlp, pre)

    slopes = mean_slopes(activation, start, [by_key.sum(1) for by_key in pre], nodes)

    # step 3: back to the stream; keys and biases together must be the model's own stream
    with t.no_grad():
        ff = sum(by_key * slope[:, None] for by_key, slope in zip(pre, slopes)) @ mlp.W_out
        whole = (stream + ff).sum(1) + b_O + mlp.out(activation(start))
        resid_post = cache["resid_post", layer]
        error = (whole - resid_post[0]).abs().max() / resid_post.abs().max()
        maps = {
            "attn": attn,
            "attn_res": stream,
            "attn_res_norm": normed,
            "ff": ff,
            "ff_res": stream + ff,
            "weighted": by_head,
        }
        norms = {name: vectors.norm(dim=-1) for name, vectors in maps.items()}
        norms["mixing_attn_res"] = mixing_ratio(maps["attn_res"])
        norms["mixing_ff_res"] = mixing_ratio(maps["ff_res"])
    return norms | {"error": error}


#%% Activations, harvested at any hook, heads side by side
@t.no_grad()
def harvest(model: nn.Module, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """{hook: (batch, pos, d)} in float32; the blocks above the last hook are not run."""
    in_blocks = [re.search(r"blocks\.(\d+)\.", name) for name in names]
    stop = {}
    if all(in_blocks):
        last = max(int(match[1]) for match in in_blocks)
        stop = {"stop_at_layer": last + 1}
    _, cache = run_with_cache(model, tokens, names, **stop)

    found = {name: cache[name].float().flatten(2) for name in names}
    for name, activations in found.items():
        broken = (~activations.isfinite()).sum()
        if broken:
            fail(
                f"{broken} activations at {name} are NaN or infinite: "
                "the model's weights are broken, or its dtype is too small"
            )
    return found


#%% Information: entropy and mutual information of counts[x, y], how often y comes after x
def row_totals(counts: csr_matrix) -> np.ndarray:
    return np.asarray(counts.sum(1)).ravel()


def entropy_floor(counts: csr_matrix) -> float:
    """
    Entropy of the next token given this one, in nats per token.
    No model that sees one token has a lower loss on these counts.
    """
    stored_per_row = np.diff(counts.indptr)
    p_next = counts.data / np.repeat(row_totals(counts), stored_per_row)
    return float(-(counts.data * np.log(p_next)).sum() / counts.sum())


def mutual_information(counts: csr_matrix) -> float:
    """Bits per token that this token tells about the next: how much a model loses that knows only frequencies."""
    frequency = np.asarray(counts.sum(0)).ravel() / counts.sum()
    seen = frequency[frequency > 0]
    entropy = -(seen * np.log(seen)).sum()
    return float(entropy - entropy_floor(counts)) / math.log(2)
