"""
What reads a hooked model without changing it: head scores, a logit taken apart exactly, catalogues of heads and
neurons, norm-based maps, activations, and bits of information.
"""

import copy
import math
import re
from collections.abc import Callable

from utils import fail  # first: sets OpenMP's variables before torch is loaded
from hooks import act_name, device_of, hooks, run_with_cache

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from scipy.sparse import csr_matrix
from torch import Tensor


#%% Gate: listening changes nothing
@t.no_grad()
def listening_gap(model: nn.Module, tokens: Tensor) -> float:
    """Largest difference of the logits with every hook cached and without, relative to the largest logit."""
    listened, _ = run_with_cache(model, tokens)
    alone = model(tokens)
    return (listened - alone).abs().max().item() / listened.abs().max().item()


#%% Repeated random tokens: what comes after the first copy can be known from the context alone
def repeated_tokens(batch: int, half: int, vocab: Tensor | int, bos: int | None = None, seed: int = 0) -> Tensor:
    """(batch, [bos] + 2 * half): random tokens, said twice. vocab: the number of tokens, or the ids to draw from."""
    generator = t.Generator().manual_seed(seed)
    pool = vocab if isinstance(vocab, Tensor) else t.arange(vocab)
    once = pool[t.randint(len(pool), (batch, half), generator=generator)]
    twice = t.cat([once, once], dim=1)
    if bos is None:
        return twice
    return t.cat([t.full((batch, 1), bos), twice], dim=1)


def random_repeats(corpus: object, rows: int, half: int, seed: int, at_least: int = 100) -> Tensor:
    """
    (rows, 1 + 2 * half): beginning-of-text and random tokens said twice, drawn from those that training has seen.
    Seen is `at_least` times, since an untrained embedding tells nothing; where the text is small, the 50 most frequent.
    corpus: a data.Corpus.
    """
    counts = sum(np.bincount(part, minlength=corpus.d_vocab) for part in corpus.train.values())
    if corpus.bos is not None:
        counts[corpus.bos] = 0
    fiftieth = np.sort(counts)[-min(50, len(counts))]
    known = np.flatnonzero(counts >= min(at_least, fiftieth))
    return repeated_tokens(rows, half, t.from_numpy(known), corpus.bos, seed)


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


def head_scores(model: nn.Module, n_layers: int, tokens: Tensor, half: int) -> dict[str, Tensor]:
    """
    {'prefix_matching', 'previous_token', 'duplicate_token', 'first_token': (layer, head) in 0..1}, on the CPU.
    tokens (batch, pos) as repeated_tokens makes them, half as it was given.
    """
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
def centres(model: nn.Module) -> bool:
    """LayerNorm subtracts the mean and has a bias; RMSNorm neither."""
    return getattr(model.ln_final, "bias", None) is not None


def folded_W_U(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """
    (d_model, token) in float32: the unembedding with the final norm's weight folded in and, for LayerNorm, centred.
    ids: the tokens wanted; None is all of them.
    """
    W_U = model.W_U if ids is None else model.W_U[:, ids]
    W = model.ln_final.weight[:, None] * W_U
    if centres(model):
        W = W - W.mean(0)
    return W.float()


def logit_direction(model: nn.Module, token: int, scale: Tensor, less_mean: bool = False) -> Tensor:
    """
    (d_model): a write to the final stream, times this, summed, is its part of the token's logit; with less_mean, of the
    logit less the mean logit of all tokens, which leaves out what a write gives to every token alike.
    scale (1): the final norm's, frozen at the position that is asked about.
    """
    column = folded_W_U(model, t.tensor([token], device=scale.device))[:, 0]
    if less_mean:
        column = column - folded_W_U(model).mean(1)
    return column / scale


def norm_bias_logit(model: nn.Module, token: int, less_mean: bool = False) -> Tensor:
    """() what the final norm's bias gives the token's logit; 0 for RMSNorm."""
    if not centres(model):
        return model.W_U.new_zeros((), dtype=t.float32)
    column = model.W_U[:, token].float()
    if less_mean:
        column = column - model.W_U.float().mean(1)
    return model.ln_final.bias.float() @ column


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
def direct_logit_attribution(model: nn.Module, tokens: Tensor, token: int, position: int = -1) -> dict[str, float]:
    """
    What each write to the stream gives the logit of `token` at one position of tokens (1, pos); they sum to the logit.
    {'embed' (positions included), 'L0 attn', 'L0 mlp', 'L1 attn' ..., 'constant' (the final norm's bias)}.
    The plain form; logit_parts takes the writes further apart.
    """
    layers = range(model.cfg.n_layers)
    names = {"embed": act_name("resid_pre", 0)}
    for layer in layers:
        names[f"L{layer} attn"] = act_name("attn_out", layer)
        names[f"L{layer} mlp"] = act_name("mlp_out", layer)
    _, cache = run_with_cache(model, tokens, [*names.values(), "ln_final.hook_scale"])

    direction = logit_direction(model, token, cache["ln_final.hook_scale"][0, position])
    parts = {}
    for part, name in names.items():
        write = cache[name][0, position].float()
        parts[part] = einsum(write, direction, "d_model, d_model ->").item()
    parts["constant"] = norm_bias_logit(model, token).item()
    return parts


@t.no_grad()
def logit_parts(
    model: nn.Module, tokens: Tensor, token: int, position: int = -1, less_mean: bool = False
) -> dict[str, Tensor]:
    """
    The logit of `token` at one position of tokens (1, pos), with less_mean less the mean logit of all tokens, and the
    parts that sum to it:
    'embed', 'pos_embed' (): the token's and the position's embedding (pos_embed is 0 where none enters the stream);
    'heads' (layer, head, source): what each head writes from each source position;
    'attn_bias' (layer): the output maps' biases;
    'mlp' (layer): the MLPs;
    'constant' (): the final norm's bias;
    'logit' (): the model's own.
    Where the MLPs have neurons, 'neurons' (layer, d_mlp) and 'mlp_bias' (layer) sum to 'mlp'.
    The final norm's scale is frozen at its value there. The weights are the model's own; its final norm alone is folded
    (folded_W_U). Ours or a TransformerBridge, grouped queries too.
    """
    blocks = model.blocks
    layers = range(model.cfg.n_layers)
    has_pos = hasattr(model, "W_pos") or hasattr(model, "pos_embed")
    has_neurons = all(hasattr(block.mlp, "W_out") for block in blocks)
    sites = ["v", "pattern", "mlp_out"]
    if has_neurons:
        sites.append("post")
    names = [act_name(site, layer) for layer in layers for site in sites]
    names += [act_name("resid_pre", 0), "ln_final.hook_scale"]
    if has_pos:
        names.append("hook_pos_embed")
    logits, cache = run_with_cache(model, tokens, names)
    direction = logit_direction(model, token, cache["ln_final.hook_scale"][0, position], less_mean)

    start = cache["resid_pre", 0][0, position].float() @ direction
    positional = direction.new_zeros(())
    if has_pos:
        positional = cache["hook_pos_embed"][0, position].float() @ direction
    heads = [
        einsum(
            cache["pattern", layer][0, :, position].float(),
            per_head(cache["v", layer], model.cfg.n_heads)[0].float(),
            blocks[layer].attn.W_O.float() @ direction,
            "head source, source head d_head, head d_head -> head source",
        )
        for layer in layers
    ]
    mlps = [cache["mlp_out", layer][0, position].float() @ direction for layer in layers]
    own_logit = logits[0, position, token].float()
    if less_mean:
        own_logit = own_logit - logits[0, position].float().mean()
    parts = {
        "embed": start - positional,
        "pos_embed": positional,
        "heads": t.stack(heads),
        "attn_bias": t.stack([linear_bias_logit(blocks[layer].attn.o, direction) for layer in layers]),
        "mlp": t.stack(mlps),
        "constant": norm_bias_logit(model, token, less_mean),
        "logit": own_logit,
    }
    if has_neurons:
        neurons = []
        for layer in layers:
            written_by_one = blocks[layer].mlp.W_out.float() @ direction  # by a neuron whose activation is 1
            neurons.append(cache["post", layer][0, position].float() * written_by_one)
        parts["neurons"] = t.stack(neurons)
        parts["mlp_bias"] = t.stack([linear_bias_logit(blocks[layer].mlp.out, direction) for layer in layers])
    return parts


def parts_error(parts: dict[str, Tensor]) -> float:
    """How far the parts miss the logit, and the neurons the MLPs, relative to max(1, |logit|)."""
    summed = sum(parts[name].sum() for name in ("embed", "pos_embed", "heads", "attn_bias", "mlp", "constant"))
    miss = abs((summed - parts["logit"]).item())
    if "neurons" in parts:
        by_neuron = parts["neurons"].sum(1) + parts["mlp_bias"]
        miss = max(miss, (by_neuron - parts["mlp"]).abs().max().item())
    return miss / max(1.0, abs(parts["logit"].item()))


#%% Logit attribution by layer alone, for any model whose stream can be read: each layer's write towards the answer
def points(model: nn.Module) -> list[str]:
    """The stream after 0, 1, ... n_layers blocks."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers))]


@t.no_grad()
def layer_writes(
    model: nn.Module, row: list[int], token: int, less_mean: bool = False
) -> tuple[dict[str, float], float]:
    """
    What each layer gives the logit of `token` after the row of token ids, and the logit itself, before a soft cap; with
    less_mean, less the mean logit of all tokens:
    ({'embed', 'L0' .., 'constant'}, their sum).
    The final norm's scale is frozen there. Its weight, and whether it centres, are found by asking the module, since
    its attributes are named differently in each architecture: norm(v) - norm(0) is weight * v for v = 1, -1, 1 ...,
    and LayerNorm does not see v + 1.
    """
    _, cache = run_with_cache(model, t.tensor([row], device=device_of(model)), points(model))
    stream = t.stack([cache[name][0, -1] for name in points(model)])  # point d_model
    signs = (1 - 2 * (t.arange(stream.shape[1], device=stream.device) % 2)).to(stream.dtype)
    asked = t.stack([0 * signs, signs, signs + 1, stream[-1]])
    at_zero, at_signs, at_moved, end = model.ln_final(asked[None])[0].float()

    weight = (at_signs - at_zero) * signs
    column = model.W_U[:, token].float()
    if less_mean:
        column = column - model.W_U.float().mean(1)
    stream = stream.float()
    if t.allclose(at_signs, at_moved, atol=1e-2):  # the norm centres
        stream = stream - stream.mean(-1, keepdim=True)
    scale = (end - at_zero).norm() / (weight * stream[-1]).norm()
    along = stream @ (weight * column) * scale

    unembed_bias = getattr(model.unembed, "b_U", getattr(model.unembed, "bias", None))
    fixed = 0.0
    if unembed_bias is not None:
        fixed = (unembed_bias[token] - less_mean * unembed_bias.float().mean()).item()
    writes = {"embed": along[0].item()}
    for layer, write in enumerate(along.diff().tolist()):
        writes[f"L{layer}"] = write
    writes["constant"] = (at_zero @ column).item() + fixed
    return writes, (end @ column).item() + fixed


#%% Head catalogue: where each kind of head looks, True in (row, query, key) of tokens (row, pos)
FLOORS = {"previous token": 0.3, "duplicate token": 0.3, "induction": 0.3, "text-begin sink": 0.5, "copying": 0.95}
BY_POSITION = ("previous token", "text-begin sink")  # their null: each query's keys shuffled
BY_CONTENT = ("duplicate token", "induction")  # their null: the tokens behind the first shuffled
COPIED = 256  # places whose tokens a copying head is asked to copy


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


def shuffled_keys(tokens: Tensor, generator: t.Generator) -> Tensor:
    """(row, query, key): for each query its visible keys in a random order, the hidden ones behind them."""
    rows, length = tokens.shape
    hidden = t.ones(length, length, dtype=t.bool).triu(1)
    draws = t.rand((rows, length, length), generator=generator).masked_fill(hidden, 2.0)
    return draws.argsort(-1).to(tokens.device)


def shuffled_tokens(tokens: Tensor, generator: t.Generator) -> Tensor:
    """The rows with all tokens behind the first in a random order."""
    order = t.rand(tokens[:, 1:].shape, generator=generator).argsort(1).to(tokens.device)
    return t.cat([tokens[:, :1], tokens[:, 1:].gather(1, order)], 1)


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
    model: nn.Module, tokens: Tensor, shuffles: int = 20, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, list[str]]]:
    """
    Which head plays which role: (scores {role: (layer, head)}, bars {role: float}, names {head: its roles}).
    tokens (batch, pos): rows that start with beginning-of-text and repeat (repeated_tokens). Ours or a
    TransformerBridge.
    Scores of the roles by attention: attention to where the role looks (role_targets). 'copying' is by OV score: of the
    other tokens in the rows, the share whose logit the head's value-output map, fed a token, raises less than that
    token's own; 0.5 is chance (copying_ranks).
    A bar is the larger of the role's floor and the 99th percentile, over shuffles, of the maximum over all heads.
    Shuffled are each query's keys (previous token, sink), the tokens behind the first (duplicate, induction) or the
    tokens' names (copying).
    """
    generator = t.Generator().manual_seed(seed)
    targets = role_targets(tokens)
    if not targets["induction"].any():
        fail("the head catalogue needs rows that repeat tokens: repeated_tokens")
    places = t.randperm(tokens.numel(), generator=generator)[:COPIED].to(tokens.device)

    # roles by attention: first as they are, then with keys shuffled (one run serves all looks), then with tokens
    # shuffled (a run each)
    looks = {role: [mask] for role, mask in targets.items()}
    for _ in range(shuffles):
        order = shuffled_keys(tokens, generator)
        for role in BY_POSITION:
            looks[role].append(targets[role].gather(-1, order))
    found = attention_scores(model, tokens, looks)  # role: (real and then its shuffles, layer, head)
    content = {role: [targets[role]] for role in BY_CONTENT}
    for _ in range(shuffles):
        null = attention_scores(model, shuffled_tokens(tokens, generator), content)
        for role in BY_CONTENT:
            found[role] = t.cat([found[role], null[role]])

    # copying: the tokens' own names, then shuffled names
    ids, own = tokens.flatten()[places].unique(return_inverse=True)
    namings = [own]
    for _ in range(shuffles):
        order = t.randperm(len(own), generator=generator).to(own.device)
        namings.append(own[order])
    found["copying"] = copying_scores(copying_ranks(model, tokens, places, ids), namings)

    scores = {role: looked[0] for role, looked in found.items()}
    bars = {role: role_bar(role, looked[1:]) for role, looked in found.items()}
    return scores, bars, roles_above(scores, bars)


def role_bar(role: str, null: Tensor) -> float:
    """
    The larger of the role's floor and the 99th percentile, over shuffles, of the best of all heads.
    null (shuffle, layer, head): the scores with the role's structure shuffled away.
    """
    best_of_heads = null.flatten(1).amax(1)
    return max(FLOORS[role], best_of_heads.quantile(0.99).item())


def roles_above(scores: dict[str, Tensor], bars: dict[str, float]) -> dict[str, list[str]]:
    """{head: the roles whose score lies above the bar}."""
    n_layers, n_heads = next(iter(scores.values())).shape
    roles = {}
    for layer in range(n_layers):
        for head in range(n_heads):
            roles[f"L{layer}H{head}"] = [role for role in scores if scores[role][layer, head] > bars[role]]
    return roles


#%% Neuron catalogue: where the strongest neurons fire, and which tokens they raise
@t.no_grad()
def neuron_catalogue(model: nn.Module, rows: Tensor, layer: int, n: int = 4, contexts: int = 5) -> list[dict]:
    """
    The n neurons of a layer with the largest peak activation x ||W_out||, each as
    'neuron': its index;
    'peaks': [(activation, row, position)] in the `contexts` rows where it is strongest;
    'effect' (d_vocab): on the logits, by the direct path (folded_W_U's weights, scale of the final norm left out).
    """
    _, cache = run_with_cache(model, rows, act_name("post", layer))
    W_out = model.blocks[layer].mlp.W_out.float()
    unembedding = folded_W_U(model)
    peak, position = cache["post", layer].float().max(1)  # row neuron
    strength = peak.amax(0) * W_out.norm(dim=-1)
    found = []
    for neuron in strength.topk(n).indices.tolist():
        best_rows = peak[:, neuron].topk(min(contexts, len(rows))).indices.tolist()
        peaks = [(peak[row, neuron].item(), row, position[row, neuron].item()) for row in best_rows]
        effect = W_out[neuron] @ unembedding
        effect = effect - effect.mean()  # softmax does not see the mean
        found.append({"neuron": neuron, "peaks": peaks, "effect": effect.cpu()})
    return found


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


#%% Attention maps through the feed-forward block (Kobayashi et al. 2021, 2024): each source in a position's stream
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
    return norms | {"error": error}


def mixing(norms: Tensor) -> float:
    """Share of a map (query, key) that lies off the diagonal, mean over queries but the first."""
    own = norms.diagonal() / norms.sum(1)
    return (1 - own)[1:].mean().item()


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
