"""What reads a hooked model without changing it: head scores, a logit taken apart exactly, catalogues of heads and neurons, norm-based maps, activations, and bits of information."""

import copy
import math
import re

from utils import fail
from hooks import act_name, device_of, hooks, run_with_cache

from einops import einsum
import numpy as np
from scipy.sparse import csr_matrix
import torch as t
from torch import Tensor
import torch.nn as nn
import torch.nn.functional as F


#%% Head scores on repeated random tokens: what makes a head an induction, previous-token or duplicate-token head
def repeated_tokens(batch: int, half: int, vocab: Tensor | int, bos: int | None = None, seed: int = 0) -> Tensor:
    """(batch, [bos] + 2 * half): random tokens, said twice. vocab: the number of tokens, or the ids to draw from."""
    generator = t.Generator().manual_seed(seed)
    pool = vocab if isinstance(vocab, Tensor) else t.arange(vocab)
    once = pool[t.randint(len(pool), (batch, half), generator=generator)]
    return t.cat([*([t.full((batch, 1), bos)] if bos is not None else []), once, once], dim=1)


def random_repeats(corpus: object, rows: int, half: int, seed: int, at_least: int = 100) -> Tensor:
    """Fresh repeated random tokens, drawn from those seen at least 100 times in training (an untrained embedding tells nothing)."""
    counts = sum(np.bincount(part, minlength=corpus.d_vocab) for part in corpus.train.values())
    counts[corpus.bos] = 0
    return repeated_tokens(
        rows,
        half,
        t.from_numpy(np.flatnonzero(counts >= min(at_least, np.sort(counts)[-min(50, len(counts))]))),
        corpus.bos,
        seed,
    )


def stripe(pattern: Tensor, offset: int, start: int = 0) -> Tensor:
    """Mean attention (head) that queries from position start on pay to the key `offset` places back. pattern: (batch, head, query, key)."""
    return pattern.diagonal(-offset, dim1=-2, dim2=-1)[..., max(start - offset, 0) :].mean((0, -1))


def head_scores(model: nn.Module, n_layers: int, tokens: Tensor, half: int) -> dict[str, Tensor]:
    """
    Each score (layer, head) in 0..1, on tokens from repeated_tokens: 'prefix_matching' (attention to the token after the earlier
    copy, Olsson et al. 2022), 'previous_token', 'duplicate_token' (attention to the earlier copy itself), 'first_token'.
    """
    second = tokens.shape[1] - half
    scores: dict[str, list[Tensor]] = {
        "prefix_matching": [],
        "previous_token": [],
        "duplicate_token": [],
        "first_token": [],
    }
    with t.no_grad():
        _, cache = run_with_cache(model, tokens, [act_name("pattern", layer) for layer in range(n_layers)])
    for layer in range(n_layers):
        pattern = cache["pattern", layer].float()
        scores["prefix_matching"].append(stripe(pattern, half - 1, second))
        scores["previous_token"].append(stripe(pattern, 1, 2))
        scores["duplicate_token"].append(stripe(pattern, half, second))
        scores["first_token"].append(pattern[:, :, 2:, 0].mean((0, 2)))
    return {name: t.stack(rows).cpu() for name, rows in scores.items()}


#%% Direct logit attribution: embedding, positions, every head x source, every neuron, every bias; with the final norm's scale frozen they sum to the logit
def centres(model: nn.Module) -> bool:
    """LayerNorm subtracts the mean and has a bias; RMSNorm neither."""
    return getattr(model.ln_final, "bias", None) is not None


def folded_W_U(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """(d_model, token): the unembedding with the final norm's weight folded in and, for LayerNorm, centred; all tokens or those of ids."""
    W = model.ln_final.weight[:, None] * (model.W_U if ids is None else model.W_U[:, ids])
    return (W - W.mean(0) if centres(model) else W).float()


def per_head(x: Tensor, n_heads: int) -> Tensor:
    """Keys or values (batch, pos, kv head, d_head), repeated for the query heads that share them."""
    return x.repeat_interleave(n_heads // x.shape[2], 2)


@t.no_grad()
def logit_parts(model: nn.Module, tokens: Tensor, token: int, position: int = -1) -> dict[str, Tensor]:
    """
    Parts of the logit of `token` at one position of tokens (1, pos): 'embed', 'pos_embed' (), 'heads' (layer, head, source), 'attn_bias' (layer),
    'mlp' (layer), 'constant' () (the final norm's bias), and 'logit', which they sum to; 'neurons' (layer, d_mlp) and 'mlp_bias' (layer) sum to 'mlp'.
    The final norm's scale is frozen at its value there. Ours or a TransformerBridge, grouped queries too. Weights: unprocessed, folded_W_U's fold apart.
    """
    layers, n_heads = range(model.cfg.n_layers), model.cfg.n_heads
    has_pos, has_neurons = (
        hasattr(model, "W_pos") or hasattr(model, "pos_embed"),
        all(hasattr(block.mlp, "W_out") for block in model.blocks),
    )
    names = [
        act_name(short, layer) for layer in layers for short in ("v", "pattern", "mlp_out") + ("post",) * has_neurons
    ]
    logits, cache = run_with_cache(
        model, tokens, [*names, act_name("resid_pre", 0), "ln_final.hook_scale", *["hook_pos_embed"] * has_pos]
    )
    g = folded_W_U(model, t.tensor([token], device=tokens.device))[:, 0] / cache["ln_final.hook_scale"][0, position]
    none = g.new_zeros(())
    bias = lambda linear: none if getattr(linear, "bias", None) is None else linear.bias.float() @ g
    positional = cache["hook_pos_embed"][0, position].float() @ g if has_pos else none
    heads = [
        einsum(
            cache["pattern", l][0, :, position].float(),
            per_head(cache["v", l], n_heads)[0].float(),
            model.blocks[l].attn.W_O.float() @ g,
            "head source, source head d_head, head d_head -> head source",
        )
        for l in layers
    ]
    parts = {
        "embed": cache["resid_pre", 0][0, position].float() @ g - positional,
        "pos_embed": positional,
        "heads": t.stack(heads),
        "attn_bias": t.stack([bias(model.blocks[l].attn.o) for l in layers]),
        "mlp": t.stack([cache["mlp_out", l][0, position].float() @ g for l in layers]),
        "constant": model.ln_final.bias.float() @ model.W_U[:, token].float() if centres(model) else none,
        "logit": logits[0, position, token].float(),
    }
    if has_neurons:
        parts |= {
            "neurons": t.stack(
                [cache["post", l][0, position].float() * (model.blocks[l].mlp.W_out.float() @ g) for l in layers]
            ),
            "mlp_bias": t.stack([bias(model.blocks[l].mlp.out) for l in layers]),
        }
    return parts


def parts_error(parts: dict[str, Tensor]) -> float:
    """How far the parts miss the logit, and the neurons the MLPs, relative to max(1, |logit|)."""
    miss = [
        sum(parts[name].sum() for name in ("embed", "pos_embed", "heads", "attn_bias", "mlp", "constant"))
        - parts["logit"]
    ]
    if "neurons" in parts:
        miss.append((parts["neurons"].sum(1) + parts["mlp_bias"] - parts["mlp"]).abs().max())
    return max(abs(x.item()) for x in miss) / max(1.0, abs(parts["logit"].item()))


#%% Head catalogue: a role is named only above a floor and above the best of all heads where the role's structure is shuffled away
FLOORS = {"previous token": 0.3, "duplicate token": 0.3, "induction": 0.3, "text-begin sink": 0.5, "copying": 0.95}


def role_targets(tokens: Tensor) -> dict[str, Tensor]:
    """Where each role looks, True in (row, query, key); induction: the key after an earlier copy of the query."""
    place = t.arange(tokens.shape[1], device=tokens.device)
    back, same = place[:, None] - place, tokens[:, :, None] == tokens[:, None]
    targets = {
        "previous token": ((back == 1) & (back[:, :1] > 1)).expand_as(same),
        "text-begin sink": ((place == 0) & (back[:, :1] > 1)).expand_as(same),
    }
    return targets | {"duplicate token": same & (back > 0), "induction": F.pad(same[:, :, :-1], (1, 0)) & (back > 0)}


def attention_on(pattern: Tensor, targets: Tensor) -> Tensor:
    """(head) attention (row, head, query, key) paid to targets (row, query, key), averaged over the queries that have one."""
    asked = targets.any(-1)
    return einsum(pattern, targets.to(pattern.dtype), "row head query key, row query key -> head") / asked.sum()


@t.no_grad()
def catalogue(
    model: nn.Module, tokens: Tensor, shuffles: int = 20, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, list[str]]]:
    """
    Scores {role: (layer, head)}, bars {role: float} and names {head: its roles}, for rows (batch, pos) that start with beginning-of-text and repeat
    (repeated_tokens). Ours or a TransformerBridge. 'copying' is by OV score: of the other tokens in the rows, the share whose logit the head's
    value-output map, fed a token, raises less than that token's own (0.5 is chance; the direct path from real values, through folded_W_U's weights).
    The bar is the larger of the role's floor and the 99th percentile, over shuffles, of the maximum over all heads: shuffled are each query's keys
    (previous token, sink), the tokens behind the first (duplicate, induction) or the tokens' names (copying).
    """
    generator, layers, n_heads, targets = (
        t.Generator().manual_seed(seed),
        range(model.cfg.n_layers),
        model.cfg.n_heads,
        role_targets(tokens),
    )
    if not targets["induction"].any():
        fail("the head catalogue needs rows that repeat tokens: repeated_tokens")
    chosen = t.randperm(tokens.numel(), generator=generator)[:256].to(tokens.device)
    ids, own = tokens.flatten()[chosen].unique(return_inverse=True)
    U, looks = folded_W_U(model, ids), {role: [mask] for role, mask in targets.items()}
    hidden = t.ones_like(targets["induction"][0]).triu(1).cpu()
    for _ in range(shuffles):
        order = (
            t.rand(targets["induction"].shape, generator=generator)
            .masked_fill(hidden, 2.0)
            .argsort(-1)
            .to(tokens.device)
        )
        for role in ("previous token", "text-begin sink"):
            looks[role].append(targets[role].gather(-1, order))

    def measure(rows: Tensor, looks: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """{role: (look, layer, head)}"""
        found: dict[str, list[Tensor]] = {role: [] for role in looks}

        def fn(pattern: Tensor, hook: nn.Module) -> None:
            for role, masks in looks.items():
                found[role].append(t.stack([attention_on(pattern.float(), mask) for mask in masks]).cpu())

        with hooks(model, [(act_name("pattern", layer), fn) for layer in layers]):
            model(rows)
        return {role: t.stack(x, 1) for role, x in found.items()}

    found, content = measure(tokens, looks), {role: targets[role] for role in ("duplicate token", "induction")}
    for _ in range(shuffles):
        order = t.rand(tokens[:, 1:].shape, generator=generator).argsort(1).to(tokens.device)
        null = measure(
            t.cat([tokens[:, :1], tokens[:, 1:].gather(1, order)], 1), {role: [mask] for role, mask in content.items()}
        )
        found |= {role: t.cat([found[role], null[role]]) for role in content}
    names = [own, *(own[t.randperm(len(own), generator=generator).to(own.device)] for _ in range(shuffles))]
    _, cache = run_with_cache(model, tokens, [act_name("v", layer) for layer in layers])
    copying = []
    for layer in layers:
        out = einsum(
            per_head(cache["v", layer], n_heads).flatten(0, 1)[chosen].float(),
            model.blocks[layer].attn.W_O.float(),
            U,
            "place head d_head, head d_head d_model, d_model token -> place head token",
        )
        rank = out.argsort(-1).argsort(-1) / (len(ids) - 1)
        copying.append(
            t.stack([rank.gather(-1, name[:, None, None].expand(-1, n_heads, 1)).mean((0, 2)) for name in names]).cpu()
        )
    found["copying"] = t.stack(copying, 1)
    bars = {role: max(FLOORS[role], x[1:].flatten(1).amax(1).quantile(0.99).item()) for role, x in found.items()}
    scores = {role: x[0] for role, x in found.items()}
    return (
        scores,
        bars,
        {
            f"L{layer}H{head}": [role for role in scores if scores[role][layer, head] > bars[role]]
            for layer in layers
            for head in range(n_heads)
        },
    )


#%% Neuron catalogue: where the strongest neurons fire, and which tokens they raise
@t.no_grad()
def neuron_catalogue(model: nn.Module, rows: Tensor, layer: int, n: int = 4, contexts: int = 5) -> list[dict]:
    """The n neurons of a layer with the largest peak activation x ||W_out||: 'neuron', 'peaks' [(activation, row, position)], 'effect' (d_vocab) on the logits by the direct path (folded_W_U's weights, scale of the final norm left out)."""
    _, cache = run_with_cache(model, rows, act_name("post", layer))
    acts, W_out, U, found = cache["post", layer].float(), model.blocks[layer].mlp.W_out.float(), folded_W_U(model), []
    best, position = acts.max(1)  # row neuron
    for neuron in (best.amax(0) * W_out.norm(dim=-1)).topk(n).indices.tolist():
        top = best[:, neuron].topk(min(contexts, len(rows))).indices.tolist()
        effect = W_out[neuron] @ U
        found.append(
            {
                "neuron": neuron,
                "peaks": [(best[row, neuron].item(), row, position[row, neuron].item()) for row in top],
                "effect": (effect - effect.mean()).cpu(),
            }
        )
    return found


#%% Folding: norm weights go into the matrices that read after them, and what the norm removes is taken out of the matrices that write
@t.no_grad()
def fold_norm[Model: nn.Module](model: Model) -> Model:
    """A float32 copy with the same log-probabilities, whose norms have weight 1 and bias 0 (fp32, since bf16 would round the products)."""
    new, with_mean = copy.deepcopy(model).float(), centres(model)
    new.unembed.weight = nn.Parameter(new.unembed.weight.clone())  # unties
    if with_mean:
        new.unembed.bias = nn.Parameter(t.zeros(new.cfg.d_vocab, device=new.W_U.device))

    def fold(norm: nn.Module, readers: list[nn.Linear]) -> None:
        for linear in readers:
            if with_mean:
                linear.bias += linear.weight @ norm.bias
            linear.weight *= norm.weight
            if with_mean:
                linear.weight -= linear.weight.mean(1, keepdim=True)
        norm.weight.fill_(1)
        if with_mean:
            norm.bias.zero_()

    writers = [new.unembed]  # a constant added to every logit is not seen by softmax
    for block in new.blocks:
        linears = {name: module for name, module in block.mlp.named_modules() if isinstance(module, nn.Linear)}
        fold(block.ln1, [block.attn.q, block.attn.k, block.attn.v])
        fold(block.ln2, [linear for name, linear in linears.items() if not name.endswith("out")])
        if with_mean:
            writers += [block.attn.o, *(linear for name, linear in linears.items() if name.endswith("out"))]
    fold(new.ln_final, [new.unembed])
    for x in [x for linear in writers for x in (linear.weight, linear.bias) if x is not None]:
        x -= x.mean(0, keepdim=True)
    for x in [new.embed.weight, *([new.W_pos] if hasattr(new, "W_pos") else [])] if with_mean else []:
        x -= x.mean(1, keepdim=True)
    return new


#%% Attention maps through the feed-forward block (Kobayashi et al. 2021, 2024): how much of each source is in a position's stream, before and after the MLP
def ff_maps(model: nn.Module, tokens: Tensor, layer: int, nodes: int = 48) -> dict[str, Tensor]:
    """
    Norms (query, key) of what the key's residual stream brings to the query, for tokens (1, pos): 'attn' ||sum over heads of alpha f(x)||, 'attn_res' the
    same + x where key = query, 'attn_res_norm' after ln2 (scale frozen), 'ff' through the MLP, 'ff_res' = attn_res + ff added as vectors; 'weighted' (head,
    query, key) ||alpha f(x)||. f is each head's value-output map, its value bias included. Through the activation, each source's share is its integrated
    gradient on the straight path from 'biases alone' to the real pre-activation (Gauss-Legendre). 'error' is how far all sources + biases miss
    the model's own resid_post, relative to its largest entry. GELU or SwiGLU, LayerNorm or RMSNorm.
    """
    block = model.blocks[layer]
    norm, mlp, b_O = block.ln2, block.mlp, 0.0 if block.attn.o.bias is None else block.attn.o.bias
    readers, post = (
        ([mlp.gate, mlp.inp], lambda gate, linear: F.silu(gate) * linear)
        if hasattr(mlp, "gate")
        else ([mlp.inp], mlp.act)
    )
    centre = lambda y: y - y.mean(-1, keepdim=True) if centres(model) else y
    with t.no_grad():
        _, cache = run_with_cache(
            model,
            tokens,
            [act_name(short, layer) for short in ("v", "pattern", "resid_pre", "resid_post")]
            + [f"blocks.{layer}.ln2.hook_scale"],
        )
        x, scale = cache["resid_pre", layer][0], cache[f"blocks.{layer}.ln2.hook_scale"][0]
        moved = einsum(
            cache["pattern", layer][0],
            per_head(cache["v", layer], model.cfg.n_heads)[0],
            block.attn.W_O,
            "head query key, key head d_head, head d_head d_model -> head query key d_model",
        )
        stream = moved.sum(0) + t.diag_embed(x.T).permute(1, 2, 0)
        normed = centre(stream) / scale[:, None] * norm.weight
        rest = centre(b_O + 0 * x) / scale * norm.weight + (norm.bias if centres(model) else 0)
        pre = [normed @ linear.weight.T for linear in readers]  # query key neuron
        start = [F.linear(rest, linear.weight, linear.bias) for linear in readers]  # query neuron
    slopes = [0.0] * len(readers)
    for at, weight in zip(*np.polynomial.legendre.leggauss(nodes)):
        points = [(s + (at + 1) / 2 * p.sum(1)).requires_grad_() for s, p in zip(start, pre)]
        slopes = [
            mean + weight / 2 * slope for mean, slope in zip(slopes, t.autograd.grad(post(*points).sum(), points))
        ]
    with t.no_grad():
        ff = sum(p * slope[:, None] for p, slope in zip(pre, slopes)) @ mlp.W_out
        whole = (stream + ff).sum(1) + b_O + mlp.out(post(*start))
        error = (whole - cache["resid_post", layer][0]).abs().max() / cache["resid_post", layer].abs().max()
        maps = {
            "attn": moved.sum(0),
            "attn_res": stream,
            "attn_res_norm": normed,
            "ff": ff,
            "ff_res": stream + ff,
            "weighted": moved,
        }
        return {name: y.norm(dim=-1) for name, y in maps.items()} | {"error": error}


def mixing(norms: Tensor) -> float:
    """Share of a map (query, key) that lies off the diagonal, mean over queries but the first."""
    return (1 - norms.diagonal() / norms.sum(1))[1:].mean().item()


#%% Logit attribution: what each layer writes in the direction of the answer, for any model whose stream can be read


def points(model: nn.Module) -> list[str]:
    """The stream after 0, 1, ... n_layers blocks."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers))]


@t.no_grad()
def layer_writes(model: nn.Module, row: list[int], token: int) -> tuple[dict[str, float], float]:
    """
    ({'embed', 'L0' .., 'constant'}, the logit of token after the row that they sum to, before a soft cap). The final norm's scale is frozen there; its weight,
    and whether it centres, are found by asking the module: norm(v) - norm(0) is weight * v for v = 1, -1, 1 ..., and LayerNorm does not see v + 1.
    """
    _, cache = run_with_cache(model, t.tensor([row], device=device_of(model)), points(model))
    x = t.stack([cache[name][0, -1] for name in points(model)])
    v = (1 - 2 * (t.arange(x.shape[1], device=x.device) % 2)).to(x.dtype)
    zero, plain, moved, out = model.ln_final(t.stack([0 * v, v, v + 1, x[-1]])[None])[0].float()
    weight, column, x = (plain - zero) * v, model.W_U[:, token].float(), x.float()
    if t.allclose(plain, moved, atol=1e-2):
        x = x - x.mean(-1, keepdim=True)
    along = x @ (weight * column) * (out - zero).norm() / (weight * x[-1]).norm()
    bias = getattr(model.unembed, "b_U", getattr(model.unembed, "bias", None))
    fixed = 0.0 if bias is None else bias[token].item()
    names = ["embed", *(f"L{layer}" for layer in range(model.cfg.n_layers)), "constant"]
    return dict(zip(names, [*t.cat([along[:1], along.diff()]).tolist(), (zero @ column).item() + fixed])), (
        out @ column
    ).item() + fixed


#%% Activations: harvested at any hook, heads side by side; streamed through a buffer that is shuffled whenever half of it has left
@t.no_grad()
def harvest(model: nn.Module, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """{hook: (batch, pos, d)} in float32; the blocks above the last hook are not run."""
    layers = [re.search(r"blocks\.(\d+)\.", name) for name in names]
    stop = dict(stop_at_layer=max(int(layer[1]) for layer in layers) + 1) if all(layers) else {}
    _, cache = run_with_cache(model, tokens, names, **stop)
    found = {name: cache[name].float().flatten(2) for name in names}
    for name, x in found.items():
        if not x.isfinite().all():
            fail(
                f"{(~x.isfinite()).sum()} activations at {name} are NaN or infinite: the model's weights are broken, or its dtype is too small"
            )
    return found


#%% Information: entropy and mutual information of counts
def row_totals(counts: csr_matrix) -> np.ndarray:
    return np.asarray(counts.sum(1)).ravel()


def entropy_floor(counts: csr_matrix) -> float:
    """Entropy of the next token given this one, in nats per token: no model that sees one token has a lower loss on these counts."""
    return float(
        -(counts.data * np.log(counts.data / np.repeat(row_totals(counts), np.diff(counts.indptr)))).sum()
        / counts.sum()
    )


def mutual_information(counts: csr_matrix) -> float:
    """Bits per token that knowing this token tells about the next: the KL of a model that knows only frequencies."""
    p = np.asarray(counts.sum(0)).ravel() / counts.sum()
    return float(-(p[p > 0] * np.log(p[p > 0])).sum() - entropy_floor(counts)) / math.log(2)
