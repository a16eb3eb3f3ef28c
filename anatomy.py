"""Reading any hooked model, ours or a TransformerBridge: head scores, a logit's parts, catalogues of heads and neurons, folded norms, maps through the MLP."""
import contextlib
import copy
import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random

from data import DRAW, FACTS, Prompt, World, fact_prompts, read_countries
from utils import BRIEF, Cache, Streamed, act_name, encode, endc, fail, hooks, run_with_cache, run_with_hooks, tec, token_text, yellow

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from torch import Tensor
from tqdm import tqdm

#%% Memory: analysis that goes on with half the rows at a time where it does not suffice, and what a call takes at its peak
def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, t.OutOfMemoryError) or "can't allocate memory" in str(error)


def halving[Rows, Out](fn: Callable[[Rows], Out], rows: Rows, batch: int, title: str = "rows") -> Iterator[Out]:
    """fn(rows[i:i + batch]) for all rows in order. Where memory does not suffice the batch is halved and the same rows are tried again."""
    start, bar = 0, tqdm(total=len(rows), desc=title, **BRIEF)
    while start < len(rows):
        part = rows[start:start + batch]
        try: out, fits = fn(part), True
        except (t.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error): raise
            if len(part) == 1: fail(f"out of memory on a single row: use a smaller model, shorter rows or --device cpu ({str(error).splitlines()[0]})")
            fits = False
        if fits:
            yield out
            start += len(part)
            bar.update(len(part))
        else:  # out here the failed call's tensors are free
            tec()
            batch = -(-len(part) // 2)
            print(f"{yellow}out of memory: going on with {batch} rows at a time{endc}")
    bar.close()


def peak_bytes(run: Callable) -> int:
    """Largest sum of live tensor bytes that run allocates, by the CPU allocator's own record."""
    with t.profiler.profile(activities=[t.profiler.ProfilerActivity.CPU], profile_memory=True) as record: run()
    events = sorted((event.start_ns(), event.nbytes()) for event in record.profiler.kineto_results.events() if event.name() == "[memory]")
    return int(np.cumsum([size for _, size in events]).max())

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
    return repeated_tokens(rows, half, t.from_numpy(np.flatnonzero(counts >= min(at_least, np.sort(counts)[-min(50, len(counts))]))), corpus.bos, seed)


def stripe(pattern: Tensor, offset: int, start: int = 0) -> Tensor:
    """Mean attention (head) that queries from position start on pay to the key `offset` places back. pattern: (batch, head, query, key)."""
    return pattern.diagonal(-offset, dim1=-2, dim2=-1)[..., max(start - offset, 0):].mean((0, -1))


def head_scores(model: nn.Module, n_layers: int, tokens: Tensor, half: int) -> dict[str, Tensor]:
    """
    Each score (layer, head) in 0..1, on tokens from repeated_tokens: 'prefix_matching' (attention to the token after the earlier
    copy, Olsson et al. 2022), 'previous_token', 'duplicate_token' (attention to the earlier copy itself), 'first_token'.
    """
    second = tokens.shape[1] - half
    scores: dict[str, list[Tensor]] = {"prefix_matching": [], "previous_token": [], "duplicate_token": [], "first_token": []}
    with t.no_grad(): _, cache = run_with_cache(model, tokens, [act_name("pattern", layer) for layer in range(n_layers)])
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


def read_out(model: nn.Module, ids: Tensor | None = None) -> Tensor:
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
    The final norm's scale is frozen at its value there. Ours or a TransformerBridge, grouped queries too. Weights: unprocessed, read_out's fold apart.
    """
    layers, n_heads = range(model.cfg.n_layers), model.cfg.n_heads
    has_pos, has_neurons = hasattr(model, "W_pos") or hasattr(model, "pos_embed"), all(hasattr(block.mlp, "W_out") for block in model.blocks)
    names = [act_name(short, layer) for layer in layers for short in ("v", "pattern", "mlp_out") + ("post",) * has_neurons]
    logits, cache = run_with_cache(model, tokens, [*names, act_name("resid_pre", 0), "ln_final.hook_scale", *["hook_pos_embed"] * has_pos])
    g = read_out(model, t.tensor([token], device=tokens.device))[:, 0] / cache["ln_final.hook_scale"][0, position]
    none = g.new_zeros(())
    bias = lambda linear: none if getattr(linear, "bias", None) is None else linear.bias.float() @ g
    positional = cache["hook_pos_embed"][0, position].float() @ g if has_pos else none
    heads = [einsum(cache["pattern", l][0, :, position].float(), per_head(cache["v", l], n_heads)[0].float(), model.blocks[l].attn.W_O.float() @ g, "head source, source head d_head, head d_head -> head source") for l in layers]
    parts = {
        "embed": cache["resid_pre", 0][0, position].float() @ g - positional, "pos_embed": positional, "heads": t.stack(heads), "attn_bias": t.stack([bias(model.blocks[l].attn.o) for l in layers]),
        "mlp": t.stack([cache["mlp_out", l][0, position].float() @ g for l in layers]), "constant": model.ln_final.bias.float() @ model.W_U[:, token].float() if centres(model) else none, "logit": logits[0, position, token].float(),
    }
    if has_neurons: parts |= {"neurons": t.stack([cache["post", l][0, position].float() * (model.blocks[l].mlp.W_out.float() @ g) for l in layers]), "mlp_bias": t.stack([bias(model.blocks[l].mlp.out) for l in layers])}
    return parts


def parts_error(parts: dict[str, Tensor]) -> float:
    """How far the parts miss the logit, and the neurons the MLPs, relative to max(1, |logit|)."""
    miss = [sum(parts[name].sum() for name in ("embed", "pos_embed", "heads", "attn_bias", "mlp", "constant")) - parts["logit"]]
    if "neurons" in parts: miss.append((parts["neurons"].sum(1) + parts["mlp_bias"] - parts["mlp"]).abs().max())
    return max(abs(x.item()) for x in miss) / max(1.0, abs(parts["logit"].item()))


#%% Head catalogue: a role is named only above a floor and above the best of all heads where the role's structure is shuffled away
FLOORS = {"previous token": 0.3, "duplicate token": 0.3, "induction": 0.3, "text-begin sink": 0.5, "copying": 0.95}


def role_targets(tokens: Tensor) -> dict[str, Tensor]:
    """Where each role looks, True in (row, query, key); induction: the key after an earlier copy of the query."""
    place = t.arange(tokens.shape[1], device=tokens.device)
    back, same = place[:, None] - place, tokens[:, :, None] == tokens[:, None]
    targets = {"previous token": ((back == 1) & (back[:, :1] > 1)).expand_as(same), "text-begin sink": ((place == 0) & (back[:, :1] > 1)).expand_as(same)}
    return targets | {"duplicate token": same & (back > 0), "induction": F.pad(same[:, :, :-1], (1, 0)) & (back > 0)}


def attention_on(pattern: Tensor, targets: Tensor) -> Tensor:
    """(head) attention (row, head, query, key) paid to targets (row, query, key), averaged over the queries that have one."""
    asked = targets.any(-1)
    return einsum(pattern, targets.to(pattern.dtype), "row head query key, row query key -> head") / asked.sum()


@t.no_grad()
def catalogue(model: nn.Module, tokens: Tensor, shuffles: int = 20, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, float], dict[str, list[str]]]:
    """
    Scores {role: (layer, head)}, bars {role: float} and names {head: its roles}, for rows (batch, pos) that start with beginning-of-text and repeat
    (repeated_tokens). Ours or a TransformerBridge. 'copying' is by OV score: of the other tokens in the rows, the share whose logit the head's
    value-output map, fed a token, raises less than that token's own (0.5 is chance; the direct path from real values, through read_out's weights).
    The bar is the larger of the role's floor and the 99th percentile, over shuffles, of the maximum over all heads: shuffled are each query's keys
    (previous token, sink), the tokens behind the first (duplicate, induction) or the tokens' names (copying).
    """
    generator, layers, n_heads, targets = t.Generator().manual_seed(seed), range(model.cfg.n_layers), model.cfg.n_heads, role_targets(tokens)
    if not targets["induction"].any(): fail("the head catalogue needs rows that repeat tokens: repeated_tokens")
    chosen = t.randperm(tokens.numel(), generator=generator)[:256].to(tokens.device)
    ids, own = tokens.flatten()[chosen].unique(return_inverse=True)
    U, looks = read_out(model, ids), {role: [mask] for role, mask in targets.items()}
    hidden = t.ones_like(targets["induction"][0]).triu(1).cpu()
    for _ in range(shuffles):
        order = t.rand(targets["induction"].shape, generator=generator).masked_fill(hidden, 2.0).argsort(-1).to(tokens.device)
        for role in ("previous token", "text-begin sink"): looks[role].append(targets[role].gather(-1, order))

    def measure(rows: Tensor, looks: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """{role: (look, layer, head)}"""
        found: dict[str, list[Tensor]] = {role: [] for role in looks}
        def fn(pattern: Tensor, hook: nn.Module) -> None:
            for role, masks in looks.items(): found[role].append(t.stack([attention_on(pattern.float(), mask) for mask in masks]).cpu())
        with hooks(model, [(act_name("pattern", layer), fn) for layer in layers]): model(rows)
        return {role: t.stack(x, 1) for role, x in found.items()}

    found, content = measure(tokens, looks), {role: targets[role] for role in ("duplicate token", "induction")}
    for _ in range(shuffles):
        order = t.rand(tokens[:, 1:].shape, generator=generator).argsort(1).to(tokens.device)
        null = measure(t.cat([tokens[:, :1], tokens[:, 1:].gather(1, order)], 1), {role: [mask] for role, mask in content.items()})
        found |= {role: t.cat([found[role], null[role]]) for role in content}
    names = [own, *(own[t.randperm(len(own), generator=generator).to(own.device)] for _ in range(shuffles))]
    _, cache = run_with_cache(model, tokens, [act_name("v", layer) for layer in layers])
    copying = []
    for layer in layers:
        out = einsum(per_head(cache["v", layer], n_heads).flatten(0, 1)[chosen].float(), model.blocks[layer].attn.W_O.float(), U, "place head d_head, head d_head d_model, d_model token -> place head token")
        rank = out.argsort(-1).argsort(-1) / (len(ids) - 1)
        copying.append(t.stack([rank.gather(-1, name[:, None, None].expand(-1, n_heads, 1)).mean((0, 2)) for name in names]).cpu())
    found["copying"] = t.stack(copying, 1)
    bars = {role: max(FLOORS[role], x[1:].flatten(1).amax(1).quantile(0.99).item()) for role, x in found.items()}
    scores = {role: x[0] for role, x in found.items()}
    return scores, bars, {f"L{layer}H{head}": [role for role in scores if scores[role][layer, head] > bars[role]] for layer in layers for head in range(n_heads)}


#%% Neuron catalogue: where the strongest neurons fire, and which tokens they raise
@t.no_grad()
def neuron_catalogue(model: nn.Module, rows: Tensor, layer: int, n: int = 4, contexts: int = 5) -> list[dict]:
    """The n neurons of a layer with the largest peak activation x ||W_out||: 'neuron', 'peaks' [(activation, row, position)], 'effect' (d_vocab) on the logits by the direct path (read_out's weights, scale of the final norm left out)."""
    _, cache = run_with_cache(model, rows, act_name("post", layer))
    acts, W_out, U, found = cache["post", layer].float(), model.blocks[layer].mlp.W_out.float(), read_out(model), []
    best, position = acts.max(1)  # row neuron
    for neuron in (best.amax(0) * W_out.norm(dim=-1)).topk(n).indices.tolist():
        top = best[:, neuron].topk(min(contexts, len(rows))).indices.tolist()
        effect = W_out[neuron] @ U
        found.append({"neuron": neuron, "peaks": [(best[row, neuron].item(), row, position[row, neuron].item()) for row in top], "effect": (effect - effect.mean()).cpu()})
    return found


#%% Folding: norm weights go into the matrices that read after them, and what the norm removes is taken out of the matrices that write
@t.no_grad()
def fold_norm[Model: nn.Module](model: Model) -> Model:
    """A float32 copy with the same log-probabilities, whose norms have weight 1 and bias 0 (fp32, since bf16 would round the products)."""
    new, with_mean = copy.deepcopy(model).float(), centres(model)
    new.unembed.weight = nn.Parameter(new.unembed.weight.clone())  # unties
    if with_mean: new.unembed.bias = nn.Parameter(t.zeros(new.cfg.d_vocab, device=new.W_U.device))

    def fold(norm: nn.Module, readers: list[nn.Linear]) -> None:
        for linear in readers:
            if with_mean: linear.bias += linear.weight @ norm.bias
            linear.weight *= norm.weight
            if with_mean: linear.weight -= linear.weight.mean(1, keepdim=True)
        norm.weight.fill_(1)
        if with_mean: norm.bias.zero_()

    writers = [new.unembed]  # a constant added to every logit is not seen by softmax
    for block in new.blocks:
        linears = {name: module for name, module in block.mlp.named_modules() if isinstance(module, nn.Linear)}
        fold(block.ln1, [block.attn.q, block.attn.k, block.attn.v])
        fold(block.ln2, [linear for name, linear in linears.items() if not name.endswith("out")])
        if with_mean: writers += [block.attn.o, *(linear for name, linear in linears.items() if name.endswith("out"))]
    fold(new.ln_final, [new.unembed])
    for x in [x for linear in writers for x in (linear.weight, linear.bias) if x is not None]: x -= x.mean(0, keepdim=True)
    for x in [new.embed.weight, *([new.W_pos] if hasattr(new, "W_pos") else [])] if with_mean else []: x -= x.mean(1, keepdim=True)
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
    readers, post = ([mlp.gate, mlp.inp], lambda gate, linear: F.silu(gate) * linear) if hasattr(mlp, "gate") else ([mlp.inp], mlp.act)
    centre = lambda y: y - y.mean(-1, keepdim=True) if centres(model) else y
    with t.no_grad():
        _, cache = run_with_cache(model, tokens, [act_name(short, layer) for short in ("v", "pattern", "resid_pre", "resid_post")] + [f"blocks.{layer}.ln2.hook_scale"])
        x, scale = cache["resid_pre", layer][0], cache[f"blocks.{layer}.ln2.hook_scale"][0]
        moved = einsum(cache["pattern", layer][0], per_head(cache["v", layer], model.cfg.n_heads)[0], block.attn.W_O, "head query key, key head d_head, head d_head d_model -> head query key d_model")
        stream = moved.sum(0) + t.diag_embed(x.T).permute(1, 2, 0)
        normed = centre(stream) / scale[:, None] * norm.weight
        rest = centre(b_O + 0 * x) / scale * norm.weight + (norm.bias if centres(model) else 0)
        pre = [normed @ linear.weight.T for linear in readers]  # query key neuron
        start = [F.linear(rest, linear.weight, linear.bias) for linear in readers]  # query neuron
    slopes = [0.0] * len(readers)
    for at, weight in zip(*np.polynomial.legendre.leggauss(nodes)):
        points = [(s + (at + 1) / 2 * p.sum(1)).requires_grad_() for s, p in zip(start, pre)]
        slopes = [mean + weight / 2 * slope for mean, slope in zip(slopes, t.autograd.grad(post(*points).sum(), points))]
    with t.no_grad():
        ff = sum(p * slope[:, None] for p, slope in zip(pre, slopes)) @ mlp.W_out
        whole = (stream + ff).sum(1) + b_O + mlp.out(post(*start))
        error = (whole - cache["resid_post", layer][0]).abs().max() / cache["resid_post", layer].abs().max()
        maps = {"attn": moved.sum(0), "attn_res": stream, "attn_res_norm": normed, "ff": ff, "ff_res": stream + ff, "weighted": moved}
        return {name: y.norm(dim=-1) for name, y in maps.items()} | {"error": error}


def mixing(norms: Tensor) -> float:
    """Share of a map (query, key) that lies off the diagonal, mean over queries but the first."""
    return (1 - norms.diagonal() / norms.sum(1))[1:].mean().item()


#%% Logit attribution: what each layer writes in the direction of the answer, for any model whose stream can be read
def device_of(model: nn.Module) -> t.device: return next(model.ln_final.parameters()).device


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
    if t.allclose(plain, moved, atol=1e-2): x = x - x.mean(-1, keepdim=True)
    along = x @ (weight * column) * (out - zero).norm() / (weight * x[-1]).norm()
    bias = getattr(model.unembed, "b_U", getattr(model.unembed, "bias", None))
    fixed = 0.0 if bias is None else bias[token].item()
    names = ["embed", *(f"L{layer}" for layer in range(model.cfg.n_layers)), "constant"]
    return dict(zip(names, [*t.cat([along[:1], along.diff()]).tolist(), (zero @ column).item() + fixed])), (out @ column).item() + fixed


#%% What a model knows of the world: any callable from tokens (batch, pos) to logits
@t.no_grad()
def read_answers(model: Callable[[Tensor], Tensor], world: World, prompts: list[Prompt], device: str = "cpu", batch: int = 256) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """
    By prompt: whether the whole answer (of a fact: and the token that ends it) is chosen greedily; logit of the answer's first token
    minus the wrong one's; log-probabilities (prompt, vocab) at the place of the first token.
    """
    encode = lambda texts: [x.ids for x in world.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    asked, whole = encode([p.text for p in prompts]), encode([p.sentence for p in prompts])
    said, wrong = encode([p.text + p.answer for p in prompts]), encode([p.text + (p.wrong or p.answer) for p in prompts])
    right, gap, first = np.zeros(len(prompts), bool), np.zeros(len(prompts)), t.zeros(len(prompts), world.d_vocab)
    def answer(rows: list[int]) -> None:
        tokens = t.tensor([[world.bos, *whole[i]] for i in rows], device=device)
        logits = model(tokens).float().cpu()
        hits = (logits[:, :-1].argmax(-1) == tokens[:, 1:].cpu()).numpy()
        for row, i in enumerate(rows):
            start, stop = len(asked[i]), min(len(said[i]) + (prompts[i].task in FACTS), len(whole[i]))
            right[i], at = hits[row, start:stop].all(), logits[row, start]
            gap[i], first[i] = at[whole[i][start]] - at[wrong[i][start]], at.log_softmax(-1)
    for length in tqdm(sorted({len(ids) for ids in whole}), desc="questions", **BRIEF): list(halving(answer, [i for i, ids in enumerate(whole) if len(ids) == length], batch))
    return right, gap, first


def evaluate_world(model: Callable[[Tensor], Tensor], world: World, quick: bool = False, device: str = "cpu") -> dict[str, float]:
    """
    What the model knows. Recalls: share of whole answers; forward and reverse are the directions of the capital fact, *_of_* names the part.
    ioi_accuracy, induction_accuracy: the answer is the likeliest of all tokens; agreement, gender: likelier than the wrong one; ioi_logit_diff
    in logits; greater_than: p(later year) - p(not later); heldout_loss: nats per token of natural text; prefix_matching (modules only): of the
    best head. quick: a fixed subsample, for curves over training.
    """
    facts = {(task, split): world.prompts(task, split, n=100 if quick else None) for task in FACTS for split in ("taught", "held_out") if not (quick and task not in ("forward", "reverse") and split == "held_out")}
    drawn = {task: world.prompts(task, "held_out", n=48 if quick else 512) for task in DRAW}
    prompts = [p for group in (facts | drawn).values() for p in group]
    right, gap, first = read_answers(model, world, prompts, device)
    is_in = lambda tasks, held, part="": np.array([p.task in tasks and p.held_out == held and part in ("", p.labels.get("part")) for p in prompts])
    taught = np.array([p.taught for p in prompts])
    share = lambda chosen, values=right: float(values[chosen].mean())
    numbers = {
        "fact_recall": share(is_in(("forward", "reverse"), False) & taught), "fact_recall_heldout_phrasing": share(is_in(("forward", "reverse"), True) & taught),
        "forward_recall": share(is_in(("forward",), False) & taught), "reverse_recall": share(is_in(("reverse",), False) & taught),
        "forward_recall_of_both": share(is_in(("forward",), False, "both")), "reverse_recall_of_both": share(is_in(("reverse",), False, "both")),
        "reverse_recall_of_forward_only": share(is_in(("reverse",), False, "forward")), "forward_recall_of_reverse_only": share(is_in(("forward",), False, "reverse")),
        **{f"{task}_recall": share(is_in((task,), False)) for task in ("continent", "language", "currency")},
    }
    if not quick: numbers |= {f"{task}_recall_heldout_phrasing": share(is_in((task,), True)) for task in ("continent", "language", "currency")}
    digits = t.tensor([world.tokenizer.token_to_id(f"{i:02d}") for i in range(100)])
    years = is_in(("greater_than",), True)
    later = t.arange(100) > t.tensor([int(p.labels["start"]) for p, chosen in zip(prompts, years) if chosen])[:, None]
    chance = first[t.from_numpy(years)][:, digits].exp()
    numbers |= {
        "ioi_accuracy": share(is_in(("ioi",), True)), "ioi_logit_diff": share(is_in(("ioi",), True), gap), "greater_than": (chance * later - chance * ~later).sum(1).mean().item(),
        **{f"{task}_accuracy": share(is_in((task,), True), gap > 0) for task in ("agreement", "gender")}, "induction_accuracy": share(is_in(("induction",), True)),
    }
    rows = t.from_numpy(world.rows(np.random.default_rng(0), 24 if quick else 256, 64, "heldout")).to(device)
    with t.no_grad(): numbers["heldout_loss"] = sum(halving(lambda part: F.cross_entropy(model(part)[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum").item(), rows, 32)) / rows[:, 1:].numel()
    if isinstance(model, t.nn.Module): numbers["prefix_matching"] = head_scores(model, model.cfg.n_layers, repeated_tokens(12 if quick else 64, 24, world.common, world.bos).to(device), 24)["prefix_matching"].max().item()
    return numbers


def write_metrics(folder: Path, known: dict[str, float], others: tuple[str, ...] = (), **made) -> dict[str, list]:
    """metrics.json beside the weights: what the model knows, how it was made, and all that by seed, from the folders of the others. Returns the last."""
    runs = [made | known, *(json.loads((Path(other) / "metrics.json").read_text()) for other in others)]
    for other, run in zip(others, runs[1:]):
        if any(run[key] != made[key] for key in ("corpus", "steps")): fail(f"--others {other}: trained on another corpus, or for other steps")
    by_seed = {name: [run[name] for run in runs] for name in ("seed", *known)}
    (folder / "metrics.json").write_text(json.dumps(known | made | {"over_seeds": by_seed}, indent=1) + "\n")
    return by_seed


#%% Activations: harvested at any hook, heads side by side; streamed through a buffer that is shuffled whenever half of it has left
@t.no_grad()
def harvest(model: nn.Module, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """{hook: (batch, pos, d)} in float32; the blocks above the last hook are not run."""
    layers = [re.search(r"blocks\.(\d+)\.", name) for name in names]
    stop = dict(stop_at_layer=max(int(layer[1]) for layer in layers) + 1) if all(layers) else {}
    _, cache = run_with_cache(model, tokens, names, **stop)
    found = {name: cache[name].float().flatten(2) for name in names}
    for name, x in found.items():
        if not x.isfinite().all(): fail(f"{(~x.isfinite()).sum()} activations at {name} are NaN or infinite: the model's weights are broken, or its dtype is too small")
    return found


def stream(model: nn.Module, hook: str, batch: Callable[[int], Tensor], size: int, buffer: int, seed: int) -> Iterator[Tensor]:
    """Shuffled activations (size, d_in) without end, `buffer` of them in memory. batch(i) gives rows of tokens; the beginning-of-text at their head is no text and left out."""
    generator, store = t.Generator().manual_seed(seed), t.empty(0)
    for i in itertools.count():
        new = harvest(model, batch(i), [hook])[hook][:, 1:].flatten(0, 1)
        store = t.cat([store.to(new), new])
        if len(store) < buffer: continue
        store = store[t.randperm(len(store), generator=generator).to(store.device)]
        while len(store) > max(buffer // 2, size):
            yield store[:size]
            store = store[size:]


def put(new: Callable[[Tensor], Tensor], first: int = 0) -> Callable:
    """A hook that puts new(x) in the place of x (batch, pos, d_in), from position `first` on."""
    def fn(x: Tensor, hook: nn.Module) -> Tensor: return t.cat([x[:, :first], new(x.flatten(2).float()).view_as(x).to(x.dtype)[:, first:]], 1)
    return fn


@t.no_grad()
def loss_of(model: nn.Module, rows: Tensor, edits: list[tuple], batch: int = 64) -> float:
    """Mean next-token cross-entropy in nats."""
    losses = halving(lambda part: F.cross_entropy(run_with_hooks(model, part, edits)[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum").item(), rows, batch)
    return sum(losses) / rows[:, 1:].numel()


#%% Prompt pairs: clean and corrupt in as many tokens, an answer and a wrong answer of one token each, and names for their positions
@dataclass
class Pairs:
    """clean, corrupt (pair, pos), padded on the right; answer, wrong (pair) tokens, read at position at (pair). places: named masks (pair, pos)."""
    clean: Tensor
    corrupt: Tensor
    answer: Tensor
    wrong: Tensor
    at: Tensor
    places: dict[str, Tensor] = field(default_factory=dict)
    corrupt_resid: Tensor | None = None  # (pair, pos, d_model) enters layer 0 in place of corrupt's embeddings

    def __len__(self) -> int: return len(self.clean)

    @property
    def index(self) -> Tensor: return t.arange(len(self), device=self.at.device)

    def take(self, index: Tensor | slice) -> "Pairs":
        """Some of the pairs, cut behind the last answer."""
        cut = lambda x: None if x is None else x[index, :int(self.at[index].max()) + 1]
        return Pairs(cut(self.clean), cut(self.corrupt), self.answer[index], self.wrong[index], self.at[index], {name: cut(mask) for name, mask in self.places.items()}, cut(self.corrupt_resid))

def pair_error(model: nn.Module, clean: str, corrupt: str, *answers: str) -> str | None:
    """What keeps the texts from being a pair, in one line."""
    first, second = encode(model, clean), encode(model, corrupt)
    if len(first) != len(second): return f"clean has {len(first)} tokens, corrupt {len(second)}: {[token_text(model, i) for i in first]} against {[token_text(model, i) for i in second]}; reword one of them"
    for answer in answers:
        if (whole := encode(model, clean + answer))[:-1] != first: return f"the answer {answer!r} is not one token after {clean!r}: the text with it ends in {[token_text(model, i) for i in whole[-3:]]}; a word begins with a space, {' ' + answer.strip()!r}"
    return None


def make_pairs(model: nn.Module, rows: list[tuple[str, str, str, str]]) -> Pairs:
    """rows of (clean, corrupt, answer, wrong), sorted by length."""
    for i, row in enumerate(rows):
        if error := pair_error(model, *row): fail(f"pair {i + 1}: {error}")
    ids = sorted(([encode(model, text) for text in (clean, corrupt, clean + answer, clean + wrong)] for clean, corrupt, answer, wrong in rows), key=lambda row: len(row[0]))
    clean, corrupt = (t.tensor([row[i] + row[i][:1] * (len(ids[-1][0]) - len(row[i])) for row in ids], device=device_of(model)) for i in (0, 1))
    if clean.equal(corrupt): fail("clean and corrupt are the same: there is nothing to patch")
    pairs = Pairs(clean, corrupt, *(clean.new_tensor([row[i][-1] for row in ids]) for i in (2, 3)), clean.new_tensor([len(row[0]) - 1 for row in ids]))
    return replace(pairs, places=find_places(pairs))

def find_places(pairs: Pairs) -> dict[str, Tensor]:
    """Masks that share out the positions up to the answer: IO, S1, S1+1, S2 where the wrong name stands twice and corrupt has the answer's there; else by what changed."""
    position, changed, end = t.arange(pairs.clean.shape[1], device=pairs.at.device), pairs.clean != pairs.corrupt, pairs.at[:, None]
    begin = changed.float().argmax(1, keepdim=True)
    io, s1 = ((pairs.clean == name[:, None]).float().argmax(1, keepdim=True) == position for name in (pairs.answer, pairs.wrong))
    s2 = changed & (pairs.clean == pairs.wrong[:, None]) & (pairs.corrupt == pairs.answer[:, None]) & ~s1
    if s2.any(1).all() and (io & (position < begin)).any(1).all():
        named = {"IO": io, "S1": s1, "S1+1": F.pad(s1[:, :-1], (1, 0)), "S2": s2, "end": position == end, "before S2": position < begin, "after S2": (position > begin) & (position < end)}
    else: named = {"changed": changed & (position != end), "end": position == end, "before": position < begin, "between": (position > begin) & (position < end)}
    taken = t.zeros_like(changed)
    for name, mask in named.items(): named[name], taken = mask & ~taken, taken | mask
    return {name: mask for name, mask in sorted(named.items(), key=lambda item: ((item[1] * position).sum() / item[1].sum()).item()) if mask.any()}


def position_masks(pairs: Pairs, positions: Iterable[int] = ()) -> dict[str, Tensor]:
    """One place for each of these positions, or for every one."""
    T = pairs.clean.shape[1]
    if outside := [p for p in positions if not 0 <= p < T]: fail(f"position {outside[0]} is outside the sequence, whose positions are 0 to {T - 1}")
    return {str(p): (t.arange(T, device=pairs.at.device) == p).expand(len(pairs), T) for p in positions or range(T)}


def draw_pairs(model: nn.Module, task: str, n: int, seed: int) -> Pairs:
    """n pairs of a task whose texts and answers fit the model's tokenizer; names, nouns and years in combinations held out of models/world's training."""
    rng, rows = Random(seed), []
    facts = [fact for fact in fact_prompts(read_countries(), "forward") if fact.taught] if task == "capitals" else []
    for _ in range(100 * n):
        prompt = rng.choice(facts) if facts else DRAW[task](rng, True)
        other = rng.choice([fact for fact in facts if fact.labels["phrasing"] == prompt.labels["phrasing"]]) if facts else None  # the same phrasing about another country
        row = (prompt.text, other.text, prompt.answer, other.answer) if other else (prompt.text, prompt.corrupt, prompt.answer, prompt.wrong)
        if len(set(row)) == 4 and not pair_error(model, *row): rows.append(row)
        if len(rows) == n: return make_pairs(model, rows)
    fail(f"only {len(rows)} of {n} {task} pairs fit this tokenizer (answers of one token, both texts of one length): give your own with --pairs")

def read_pairs(path: str) -> list[tuple[str, str, str, str]]:
    """Rows of a CSV file with the columns clean, corrupt, answer, wrong, or of a JSON list of such objects."""
    names = ("clean", "corrupt", "answer", "wrong")
    try: rows = json.loads(Path(path).read_text()) if path.endswith(".json") else list(csv.DictReader(Path(path).read_text().splitlines()))
    except (OSError, json.JSONDecodeError) as error: fail(f"--pairs {path} cannot be read: {error}")
    if bad := [i for i, row in enumerate(rows or [{}]) if not all(name in row and row[name] for name in names)]: fail(f"--pairs {path}: row {bad[0] + 1} lacks one of the columns {', '.join(names)}")
    return [tuple(row[name] for name in names) for row in rows]


#%% A run from the middle: the residual stream enters at a layer, the blocks below are skipped, and only the answer's position is unembedded
def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that compute, where hook points may stand apart from them."""
    return model.layers if isinstance(model, Streamed) else list(model.blocks)


def run_from(model: nn.Module, resid: Tensor, at: Callable[[], Tensor] | Tensor | None, layer: int = 0, fwd_hooks: list[tuple] = [], inner: list[tuple] = []) -> Tensor:
    """
    Logits (row, d_vocab) at position at (row), or (row, pos, d_vocab) if at is None, of a run that resid (row, pos, d_model) enters at `layer`. inner: (module,
    'in' or 'out', fn) replaces a module's input or output; it may add rows on the way, where at is a function, called last.
    """
    pick = lambda x: x[range(len(x)), at() if callable(at) else at][:, None]
    entries = [*inner, *([] if at is None else [(model.unembed, "in", pick)])]
    with contextlib.ExitStack() as stack:
        if foreign := hasattr(model, "hook_dict") or isinstance(model, Streamed):  # they see one row of zeros, whose mask and positions serve any number of rows that enter
            entries = [(blocks_of(model)[layer], "in", lambda x: resid), *entries]
            assert layer == 0 or not isinstance(model, Streamed), "blocks that are read when they are called are not skipped"
            for block in blocks_of(model)[:layer]:
                block.__dict__["forward"] = lambda x, *args, **kwargs: x
                stack.callback(block.__dict__.pop, "forward")
        for module, side, fn in entries[::-1]:  # before the hook points of Streamed, which are hooks themselves
            if side == "in": stack.callback(module.register_forward_pre_hook(lambda module, args, fn=fn: (fn(args[0]), *args[1:]), prepend=True).remove)
        for module, side, fn in entries:
            if side == "out": stack.callback(module.register_forward_hook(lambda module, args, out, fn=fn: fn(out)).remove)
        stack.enter_context(hooks(model, fwd_hooks))
        out = model(t.zeros(1, resid.shape[1], dtype=t.long, device=resid.device), use_cache=False) if foreign else model(None, start_at_layer=layer, resid=resid)
    return out if at is None else out[:, 0]


def record(model: nn.Module, resid: Tensor, at: Tensor | None, names: list[str]) -> tuple[Tensor, Cache]:
    """(logits at `at`, cache of names)."""
    cache = Cache()
    def save(name: str, x: Tensor, hook: nn.Module) -> None: cache[name] = x.detach()
    return run_from(model, resid, at, 0, [(name, partial(save, name)) for name in dict.fromkeys(names)]), cache


def inputs(model: nn.Module, pairs: Pairs, which: str) -> Tensor:
    """What enters layer 0 in the clean or the corrupt run."""
    return pairs.corrupt_resid if which == "corrupt" and pairs.corrupt_resid is not None else model(getattr(pairs, which), stop_at_layer=0)

def by_groups[Out](fn: Callable[[Pairs], Out], pairs: Pairs, most: int) -> list[Out]:
    """fn of the pairs in groups of at most `most`, of fewer where memory does not suffice."""
    return list(halving(lambda index: fn(pairs.take(index)), pairs.index, most))

def rows_that_fit(model: nn.Module, T: int, memory_gb: float, floats: int = 0) -> int:
    """How many rows of T tokens a run may have: activations of one layer, the answer's logits, and `floats` per position more."""
    cfg = model.cfg
    return max(1, int(memory_gb * 2**28 / (T * (10 * cfg.d_model + 4 * cfg.d_mlp + 4 * cfg.n_heads * T + floats) + 8 * cfg.d_vocab)))


#%% Metrics: one number per row, from its logits where the answer is due
def make_metric(pairs: Pairs, kind: str, clean_logits: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """fn(logits (row, d_vocab), pair (row)) -> (row): logit_diff (answer - wrong), log_prob of the answer, or kl from clean_logits (pair, d_vocab)."""
    def metric(logits: Tensor, pair: Tensor) -> Tensor:
        pick, logits = lambda x, ids: x.gather(-1, ids[pair, None])[:, 0], logits.float()
        if kind == "logit_diff": return pick(logits, pairs.answer) - pick(logits, pairs.wrong)
        if kind == "log_prob": return pick(logits.log_softmax(-1), pairs.answer)
        return F.kl_div(logits.log_softmax(-1), clean_logits.float().log_softmax(-1)[pair], log_target=True, reduction="none").sum(-1)
    return metric

def normalised(values: Tensor, clean: Tensor, corrupt: Tensor) -> Tensor:
    """Means over the last axis (pair), on the CPU, as a share of the way from corrupt (0) to clean (1)."""
    if abs(gap := (clean.mean() - corrupt.mean()).item()) < 1e-6: fail("clean and corrupt give the same metric, so there is nothing to normalise by: choose pairs whose answers differ")
    return ((values.mean(-1) - corrupt.mean()) / gap).cpu()

@t.no_grad()
def baselines(model: nn.Module, pairs: Pairs, kind: str, memory_gb: float = 1.0) -> tuple[Tensor, Tensor]:
    """Metric (pair) of the clean and of the corrupt run."""
    def ends(group: Pairs) -> Tensor:
        clean, corrupt = (run_from(model, inputs(model, group, which), group.at) for which in ("clean", "corrupt"))
        return t.stack([make_metric(group, kind, clean)(logits, group.index) for logits in (clean, corrupt)])
    return tuple(t.cat(by_groups(ends, pairs, rows_that_fit(model, pairs.clean.shape[1], memory_gb)), -1))

def area(values: Tensor, clean: Tensor, corrupt: Tensor, x: list[float], draws: int = 1000) -> tuple[float, float, float]:
    """Area under faithfulness over the share of edges kept, for values (size, pair), and its 95% interval from resampled pairs."""
    index = t.cat([t.arange(len(clean))[None], t.randint(len(clean), (draws, len(clean)), generator=t.Generator().manual_seed(0))]).to(clean.device)
    curve = (values[:, index].mean(-1) - corrupt[index].mean(-1)) / (clean[index].mean(-1) - corrupt[index].mean(-1))
    areas = t.trapezoid(curve.cpu(), t.tensor(x), dim=0)
    return areas[0].item(), *areas[1:].quantile(t.tensor([0.025, 0.975])).tolist()
