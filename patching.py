"""Causal interventions: activation patching, ablations, path patching, edge attribution and circuits, on our own models and any TransformerBridge."""
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

from anatomy import Pairs, area, baselines, blocks_of, by_groups, draw_pairs, halving, inputs, make_metric, make_pairs, normalised, peak_bytes, position_masks, read_out, read_pairs, record, rows_that_fit, run_from
from data import judging_rows, load_corpus, load_world
from llama_block import Llama
from train import flags, keep_freed_memory
from utils import BRIEF, WORLD, Cache, Streamed, about_bos, act_name, cyan, endc, fail, find_folder, gray, green, hook_points, imshow, label_tokens, line, load_model, open_model, pick_device, purple, save_results, set_seed, show, token_text, yellow

import numpy as np
import plotly.graph_objects as go
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

STREAM, HEADS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"), ("z", "q", "k", "v", "pattern")

#%% The sweep: one growing batch. The rows of a layer's cells join the two plain runs at that layer, so nothing below it is computed again
@t.no_grad()
def sweep(
    model: nn.Module, pairs: Pairs, site: str, by: Literal["pos", "head", "head pos"] = "pos", kind: str = "logit_diff", direction: Literal["denoise", "noise"] = "denoise",
    places: dict[str, Tensor] | None = None, memory_gb: float = 1.0, skip: bool = True,
) -> Tensor:
    """
    Metric (layer, place, pair), (layer, head, pair) or (layer, head, place, pair) after patching `site` of one layer, there alone: clean activations into the
    corrupt run (denoise) or the other way round (noise). places: masks (pair, pos), default every position; of a pattern the query is placed. k and v have as
    many heads as keys. Activations stay within memory_gb, however many the pairs. skip: cells before a pair's first difference are not run, as nothing differs.
    """
    n_rows = rows_that_fit(model, pairs.clean.shape[1], memory_gb)
    places = {"all": t.ones_like(pairs.clean, dtype=t.bool)} if by == "head" else places or position_masks(pairs)
    if bad := [name for name, mask in places.items() if mask.shape != pairs.clean.shape]: fail(f"place {bad[0]!r} is not a mask of {tuple(pairs.clean.shape)} (pair, pos)")
    if len(pairs) > (most := max(1, n_rows // 16)):
        return t.cat(by_groups(lambda part: sweep(model, part, site, by, kind, direction, part.places, memory_gb, skip), replace(pairs, places=places), most), -1)
    # the rows of a batch: B plain runs to be patched, B plain runs to be patched from, then the cells of layer 0, of layer 1 ...
    B, n_layers, position, masks = len(pairs), model.cfg.n_layers, t.arange(pairs.clean.shape[1], device=pairs.at.device), t.stack(list(places.values()))
    resid = t.cat([inputs(model, pairs, which) for which in (("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt"))])
    n_heads = 1 if by == "pos" else model.blocks[0].attn.W_K.shape[0] if site in ("k", "v") else model.cfg.n_heads
    layer, head, place, pair = (x.flatten() for x in t.meshgrid(*(t.arange(n, device=position.device) for n in (n_layers, n_heads, len(masks), B)), indexing="ij"))
    reach = ((resid[:B] != resid[B:]).any(-1).cumsum(1) > 0) & (position <= pairs.at[:, None])  # behind the answer nothing matters either
    touched = masks & reach if skip else masks
    first, needed = touched.float().argmax(-1)[place, pair], (touched.any(-1)[place, pair] | (not skip)).nonzero()[:, 0]
    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Metric of the runs to be patched, and of these rows."""
        joins = {l: rows[layer[rows] == l] for l in layer[rows].unique().tolist()}
        who, changed, now, seen = t.cat([pairs.index] * 2), t.ones(2 * B, len(position), dtype=t.bool, device=position.device), 0, ()  # each row's pair, what may differ in it, the layer the batch is in
        def enter(l: int, x: Tensor) -> Tensor:
            nonlocal who, changed, now
            now, new = l, pair[joins[l]] if l in joins else pair[:0]
            if l in joins: who, changed = t.cat([who, new]), t.cat([changed, (position >= first[joins[l], None]) & (position <= pairs.at[new, None])])
            return t.cat([x, x[new]])
        def patch(x: Tensor, hook: nn.Module) -> None:  # in place: a bridge's hook_resid_mid hands out what the MLP reads, which is the stream itself
            cells = joins[now]
            where, own = masks[place[cells], pair[cells]], (t.arange(n_heads, device=x.device) == head[cells, None]) | (by == "pos")
            where = where[:, None, :, None] & own[:, :, None, None] if site == "pattern" else (where[:, :, None] & own[:, None])[..., None] if x.ndim == 4 else where[..., None]
            x[-len(cells):] = t.where(where, x[B + pair[cells]], x[-len(cells):])
        def cut(l: int, x: Tensor) -> Tensor:  # the MLP sees the positions that may differ, in the last layer the answer's; the others keep the plain run's output
            nonlocal seen
            seen = (changed if l < n_layers - 1 else position == pairs.at[who, None]).nonzero(as_tuple=True)
            return x[seen][None]
        def back(l: int, out: Tensor) -> Tensor:
            full = out.new_zeros(*changed.shape, out.shape[-1]).index_put_(seen, out[0])
            if l < n_layers - 1: full[2 * B:] = t.where(changed[2 * B:, :, None], full[2 * B:], full[who[2 * B:]])
            return full
        inner = [(block, "in", partial(enter, l)) for l, block in enumerate(blocks_of(model))]
        if "mlp" not in act_name(site, 0) and not isinstance(model, Streamed): inner += [(model.blocks[l].mlp, side, partial(fn, l)) for l in range(n_layers) for side, fn in (("in", cut), ("out", back))]
        logits = run_from(model, resid, lambda: pairs.at[who], 0, [([act_name(site, l) for l in joins], patch)] if joins else [], inner)
        metric = make_metric(pairs, kind, logits[B:2 * B] if direction == "denoise" else logits[:B])
        return metric(logits[:B], pairs.index), metric(logits[2 * B:], who[2 * B:])
    plain, patched = zip(*(halving(run, needed, max(1, n_rows - 2 * B), f"patching {site}") if len(needed) else [run(needed)]))
    table = plain[0][pair].index_put((needed,), t.cat(patched)).view(n_layers, n_heads, len(masks), B)
    return {"pos": table[:, 0], "head": table[:, :, 0], "head pos": table}[by]

#%% Ablations: a part is zeroed, set to its mean, to another row's value, or drowned in noise
class Part(NamedTuple):
    """Of `site` in a layer: of the change (row, pos, ...) that an ablation makes there, keep lets only the part's own through."""
    site: str
    layer: int
    keep: Callable[[Tensor], Tensor] = lambda change: change

@t.no_grad()
def ablation_effects(model: nn.Module, pairs: Pairs, rows: Tensor, ablations: list[tuple[Part, str, float]], kind: str, memory_gb: float = 1.0) -> list[tuple[float, float]]:
    """
    For each (part, how, sigma): the share of the clean metric lost, and the loss added on text rows (row, pos) in nats per token. how: zero; mean over the text;
    resample (the row before, same position); noise (sigma standard deviations over the text).
    """
    streams, names = [act_name("resid_pre", l) for l in range(model.cfg.n_layers)], {how: list(dict.fromkeys(act_name(part.site, part.layer) for part, h, _ in ablations if how in (h, "any"))) for how in ("any", "resample")}
    enter, widths = lambda tokens: model(tokens, stop_at_layer=0), record(model, model(rows[:1], stop_at_layer=0), rows.new_zeros(1), [*streams, *names["any"]])[1]
    floats = 2 * sum(x[0, 0].numel() for x in widths.values())
    def moments(part: Tensor) -> dict[str, Tensor]:
        """{hook: (mean and mean square, ...)} over text."""
        _, seen = record(model, enter(part), part.new_zeros(len(part)), names["any"])
        return {name: t.stack([x[:, 1:].float().pow(power).mean((0, 1)) for power in (1, 2)]) * len(part) / len(rows) for name, x in seen.items()}
    def scores(tokens: Tensor, at: Tensor, whole: bool, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(1 + ablation) score of the first half of the rows, unchanged and ablated; the other half is resampled from."""
        n = len(tokens) // 2
        (logits, seen), (_, other) = record(model, enter(tokens[:n]), at[:n], streams), record(model, enter(tokens[n:]), at[n:], names["resample"])
        def run(part: Part, how: str = "none", sigma: float = 0.0) -> Tensor:
            name = act_name(part.site, part.layer)
            def change(x: Tensor, hook: nn.Module) -> Tensor:
                new = {"none": lambda: x, "zero": lambda: 0 * x, "mean": lambda: mean[name].to(x), "resample": lambda: other[name], "noise": lambda: x + sigma * std[name].to(x) * t.randn_like(x)}[how]()
                return x + part.keep(new - x)
            return score(run_from(model, seen["resid_pre", part.layer], None if whole else at[:n], part.layer, [(name, change)]), logits)
        return t.stack([run(Part("resid_pre", 0)), *(run(*ablation) for ablation in tqdm(ablations, desc="ablations", **BRIEF))])
    def of_pairs(index: Tensor) -> Tensor:
        group, both = pairs.take(index), pairs.take(t.cat([index, index - 1]))
        return scores(both.clean, both.at, False, lambda answers, plain: make_metric(group, kind, plain)(answers, group.index).sum()) / len(pairs)
    def of_text(index: Tensor) -> Tensor:
        both = rows[t.cat([index, index - 1])]
        return scores(both, both.new_zeros(len(both)), True, lambda said, _: F.cross_entropy(said[:, :-1].flatten(0, 1).float(), both[:len(index), 1:].flatten(), reduction="sum")) / rows[:, 1:].numel()
    summed = list(halving(moments, rows, rows_that_fit(model, rows.shape[1], memory_gb, floats)))
    mean, square = ({name: sum(part[name][i] for part in summed) for name in names["any"]} for i in (0, 1))
    std = {name: (square[name] - mean[name].pow(2)).clamp(min=0).sqrt() for name in mean}
    metric = sum(halving(of_pairs, pairs.index, rows_that_fit(model, pairs.clean.shape[1], memory_gb, floats)))
    loss = sum(halving(of_text, t.arange(len(rows), device=rows.device), rows_that_fit(model, rows.shape[1], memory_gb, floats + 4 * model.cfg.d_vocab)))
    return list(zip((1 - metric[1:] / metric[0]).tolist(), (loss[1:] - loss[0]).tolist()))

@t.no_grad()
def fine_parts(model: nn.Module, pairs: Pairs, layer: int, memory_gb: float = 1.0) -> dict[str, Part]:
    """Neurons of an MLP by how far clean and corrupt differ there at the answer's position x ||W_out||, and the direction in which the stream before it differs most; beside random ones."""
    def differ(group: Pairs) -> tuple[Tensor, Tensor]:
        (_, clean), (_, corrupt) = (record(model, inputs(model, group, which), group.at, [act_name(x, layer) for x in ("post", "resid_pre")]) for which in ("clean", "corrupt"))
        return tuple((clean[x, layer] - corrupt[x, layer])[group.index, group.at].float() for x in ("post", "resid_pre"))
    neurons, stream = map(t.cat, zip(*by_groups(differ, pairs, rows_that_fit(model, pairs.clean.shape[1], memory_gb))))
    order, top = (neurons.abs().mean(0) * model.blocks[layer].mlp.W_out.float().norm(dim=-1)).argsort(descending=True), t.linalg.svd(stream)[2][0]
    parts = {f"L{layer}: {n} {title} neurons": Part("post", layer, partial(t.mul, F.one_hot(ids[:n], len(ids)).sum(0))) for title, ids in (("strongest", order), ("random", t.randperm(len(order)).to(order.device))) for n in (1, 4, 16, 64)}
    onto = lambda v: lambda change: (change @ v.to(change))[..., None] * v.to(change)
    return parts | {f"before L{layer}: {title}": Part("resid_pre", layer, onto(v / v.norm())) for title, v in (("direction of largest difference", top), ("random direction", t.randn(len(top))))}

#%% The graph of writes and reads: the embedding, every head and every MLP write to the stream; every head's q, k, v, every MLP and the logits read it
class Graph:
    """writers and receivers by name; upstream (writer, receiver) is True where there is an edge. Masks of that shape are sets of edges."""

    def __init__(self, model: nn.Module):
        L, H, n_kv = model.cfg.n_layers, model.cfg.n_heads, model.blocks[0].attn.W_K.shape[0]
        self.n_layers, self.n_heads, self.serial = L, H, act_name("resid_mid", 0) in hook_points(model)  # not serial: attention and MLP read the same stream (GPT-NeoX)
        self.writers = ["embed", *(f"L{l}H{h}" if h < H else f"L{l} MLP" for l in range(L) for h in range(H + 1))]
        self.head_names = [name for name in self.writers if "H" in name]
        spans = [(l, x, n) for l in range(L) for x, n in (("q", H), ("k", n_kv), ("v", n_kv), ("MLP", 1))] + [(L, "logits", 1)]
        self.receivers = [x if x == "logits" else f"L{l} MLP" if x == "MLP" else f"L{l}H{i}.{x}" for l, x, n in spans for i in range(n)]
        self.layer_of = t.tensor([min(l, L - 1) for l, _, n in spans for _ in range(n)])
        self.columns = {(l, x): slice(end - n, end) for (l, x, n), end in zip(spans, np.cumsum([n for *_, n in spans]).tolist())}
        self.upstream = t.zeros(len(self.writers), len(self.receivers), dtype=t.bool)
        self.links = t.zeros(len(self.receivers), len(self.writers))  # 1 where a receiver is an input of that writer; grouped queries share k and v
        for l, x, n in spans:
            start, heads = self.columns[l, x].start, self.heads(l)
            self.upstream[:heads.stop if x == "MLP" and self.serial else heads.start, start:start + n] = True
            if x == "MLP": self.links[start, heads.stop] = 1
            elif x != "logits": self.links[start + t.arange(H) // (H // n), t.arange(heads.start, heads.stop)] = 1

    def heads(self, layer: int) -> slice:
        """A layer's heads among the writers; its MLP follows."""
        return slice(1 + layer * (self.n_heads + 1), (layer + 1) * (self.n_heads + 1))

    def edges(self, writers: list[str], receivers: list[str] | None = None) -> Tensor:
        """The edges from some writers to some (None: all) receivers."""
        mask = t.zeros_like(self.upstream)
        mask[t.tensor([self.writers.index(w) for w in writers])[:, None], t.tensor([self.receivers.index(r) for r in receivers or self.receivers])] = True
        return mask & self.upstream

    def readers(self, writers: list[str], kind: str) -> list[str]:
        """The receivers of one kind (q, k, v, MLP) that are inputs of these writers."""
        used = self.links[:, [self.writers.index(w) for w in writers]].any(1).tolist()
        return [r for r, on in zip(self.receivers, used) if on and r.endswith(kind)]

    def prune(self, kept: Tensor) -> Tensor:
        """Less the edges of nodes that hear nothing or whose word reaches nothing: those carry what the corrupt run writes, kept or not."""
        hears, matters = kept.any(0).float() @ self.links > 0, self.links @ kept.any(1).float() > 0
        hears[0] = matters[-1] = True
        less = kept & hears[:, None] & matters
        return kept if less.equal(kept) else self.prune(less)

def head_writes(model: nn.Module, layer: int, z: Tensor) -> Tensor:
    return einsum(z, model.blocks[layer].attn.W_O, "row pos head d_head, head d_head d_model -> row pos head d_model")

def run_graph(model: nn.Module, graph: Graph, pairs: Pairs, which: str) -> tuple[Tensor, Cache, Tensor]:
    """A plain run: (logits, cache, writes (pair, pos, writer, d_model))."""
    names = [act_name(site, l) for l in range(graph.n_layers) for site in ("resid_pre", "z", "mlp_out")]
    logits, cache = record(model, inputs(model, pairs, which), pairs.at, [*names, "ln_final.hook_scale"])
    written = [x for l in range(graph.n_layers) for x in (head_writes(model, l, cache["z", l]), cache["mlp_out", l][:, :, None])]
    return logits, cache, t.cat([cache["resid_pre", 0][:, :, None], *written], 2)

def edge_run(
    model: nn.Module, graph: Graph, resid: Tensor, at: Tensor, layer: int = 0, swap: Tensor | None = None, other: Tensor | None = None, live: Tensor | None = None, nudge: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """
    Logits (row, d_vocab) of a run in which every receiver has its own input, put through the real norm: the stream, but along the edges of swap (row, writer,
    receiver) the write in other (row, pos, writer, d_model) instead of the run's own; and nudge (row, pos, receiver, d_model) is added. The run enters at `layer`
    with resid; live, like other, holds its writes below. Also other - own, to be joined along the writers.
    """
    below, state = graph.heads(layer).start, {}
    gaps = [] if swap is None else [other[:, :, :below] - (resid[:, :, None] if layer == 0 else live[:, :, :below])]
    def change(columns: slice) -> Tensor | None:
        """(row, pos, receiver, d_model) by which the inputs of these receivers differ from the stream."""
        delta = None if nudge is None else nudge[:, :, columns]
        if swap is None or not swap[:, :, columns].any(): return delta
        gap = t.cat(gaps, 2)
        moved = einsum(swap[:, :gap.shape[2], columns].to(gap.dtype), gap, "row writer receiver, row pos writer d_model -> row pos receiver d_model")
        return moved if delta is None else delta + moved
    def enter(l: int, x: Tensor, hook: nn.Module) -> None:
        norm, delta = model.blocks[l].ln1, change(slice(graph.columns[l, "q"].start, graph.columns[l, "v"].stop))
        state["moved"] = None if delta is None else norm((x[:, :, None] + delta).flatten(1, 2)).view(delta.shape) - norm(x)[:, :, None]
        state["MLP"] = None if graph.serial else change(graph.columns[l, "MLP"])
    def read(l: int, kind: str, x: Tensor, hook: nn.Module) -> Tensor | None:
        if state["moved"] is None: return None
        W, start = getattr(model.blocks[l].attn, f"W_{kind.upper()}"), graph.columns[l, kind].start - graph.columns[l, "q"].start
        return x + einsum(state["moved"][:, :, start:start + len(W)], W, "row pos head d_model, head d_model d_head -> row pos head d_head")
    def write(l: int, x: Tensor, hook: nn.Module) -> None:
        out, start = (head_writes(model, l, x), graph.heads(l).start) if x.ndim == 4 else (x[:, :, None], graph.heads(l).stop)
        gaps.append(other[:, :, start:start + out.shape[2]] - out)
    def add(l: int, kind: str, x: Tensor) -> Tensor:
        delta = state["MLP"] if kind == "MLP" and not graph.serial else change(graph.columns[l, kind])
        return x if delta is None else x + delta[:, :, 0]
    layers = range(layer, graph.n_layers)
    fwd_hooks = [(act_name("resid_pre", l), partial(enter, l)) for l in layers] + [(act_name(kind, l), partial(read, l, kind)) for l in layers for kind in "qkv"]
    if swap is not None: fwd_hooks += [(act_name(site, l), partial(write, l)) for l in layers for site in ("z", "mlp_out")]
    inner = [(model.blocks[l].ln2, "in", partial(add, l, "MLP")) for l in layers] + [(model.ln_final, "in", partial(add, graph.n_layers, "logits"))]
    return run_from(model, resid, at, layer, fwd_hooks, inner), gaps

def pairs_that_fit(model: nn.Module, graph: Graph, pairs: Pairs, memory_gb: float) -> int:
    """Part of the memory holds the writes of both runs, the rest twice as many rows in flight."""
    return rows_that_fit(model, pairs.clean.shape[1], memory_gb / 4, (4 * len(graph.writers) + 24 * graph.n_heads) * model.cfg.d_model)

@t.no_grad()
def edge_patch(model: nn.Module, graph: Graph, pairs: Pairs, swaps: Tensor, kind: str = "logit_diff", memory_gb: float = 1.0) -> Tensor:
    """
    Metric (swap, pair) of clean runs in which the edges of each mask in swaps (swap, writer, receiver) carry the corrupt run's writes; what lies behind a receiver
    is computed anew, all else stays (path patching, Wang et al. 2023). A circuit is the run in which all other edges are swapped.
    """
    swaps, n_pairs = (swaps & graph.upstream).to(pairs.at.device), pairs_that_fit(model, graph, pairs, memory_gb)
    begins = t.stack([graph.layer_of[row].min() if row.any() else graph.layer_of[-1] for row in swaps.any(1).cpu()]).to(pairs.at.device)
    def patch(group: Pairs) -> Tensor:
        (logits, cache, live), (_, _, other) = (run_graph(model, graph, group, which) for which in ("clean", "corrupt"))
        metric, values = make_metric(group, kind, logits), t.zeros(len(swaps), len(group), device=swaps.device)
        for begin in begins.unique().tolist():
            cells = t.cartesian_prod((begins == begin).nonzero()[:, 0], group.index)  # (swap, pair)
            run = lambda w, p: metric(edge_run(model, graph, cache["resid_pre", begin][p], group.at[p], begin, swaps[w], other[p], live[p])[0], p)
            values[cells.unbind(1)] = t.cat(list(halving(lambda part: run(*part.unbind(1)), cells, 2 * n_pairs, "edges")))
        return values
    return t.cat(by_groups(patch, pairs, n_pairs), 1)

def edge_attribution(model: nn.Module, graph: Graph, pairs: Pairs, kind: str = "logit_diff", steps: int = 0, memory_gb: float = 1.0) -> Tensor:
    """
    (writer, receiver): what the clean metric would lose if the edge carried the corrupt write, by gradient, mean over pairs. steps 0: EAP, at the clean run (Syed et
    al. 2023); else EAP-IG, between corrupt and clean embeddings (Hanna et al. 2024). Summed over receivers: attribution patching of nodes.
    """
    def attribute(group: Pairs) -> Tensor:
        total = t.zeros(graph.upstream.shape, device=pairs.at.device)
        with t.no_grad(): (logits, cache, own), (_, source, other) = (run_graph(model, graph, group, which) for which in ("clean", "corrupt"))
        for alpha in [(i + 0.5) / steps for i in range(steps)] or [1.0]:
            resid = source["resid_pre", 0].lerp(cache["resid_pre", 0], alpha)
            nudge = resid.new_zeros(*resid.shape[:2], len(graph.receivers), resid.shape[-1]).requires_grad_()
            with t.enable_grad(): values = make_metric(group, kind, logits)(edge_run(model, graph, resid, group.at, nudge=nudge)[0], group.index)
            (gradient,) = t.autograd.grad(values.sum(), nudge)
            total += einsum((own - other).float(), gradient.float(), "pair pos writer d_model, pair pos receiver d_model -> writer receiver") / max(1, steps)
        return total
    return (sum(by_groups(attribute, pairs, pairs_that_fit(model, graph, pairs, memory_gb))) / len(pairs)).cpu() * graph.upstream

@t.no_grad()
def write_differences(model: nn.Module, graph: Graph, pairs: Pairs, memory_gb: float = 1.0) -> tuple[float, Tensor]:
    """Between clean and corrupt: by how much the sum of the writes misses the stream before the last layer, relative to its largest; the norm of each write, summed over pairs and positions (writer)."""
    def differ(group: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        (_, a, own), (_, b, other) = (run_graph(model, graph, group, which) for which in ("clean", "corrupt"))
        writes, stream = (own - other).float(), (a["resid_pre", graph.n_layers - 1] - b["resid_pre", graph.n_layers - 1]).float()
        return (writes[:, :, :graph.heads(graph.n_layers - 1).start].sum(2) - stream).abs().max(), stream.abs().max(), writes.norm(dim=-1).sum((0, 1))
    miss, largest, norms = zip(*by_groups(differ, pairs, pairs_that_fit(model, graph, pairs, memory_gb)))
    return (max(miss) / max(largest)).item(), sum(norms).cpu()

#%% Circuits: the strongest edges alone, everything else as in the corrupt run
def top_edges(graph: Graph, score: Tensor, sizes: list[int]) -> Tensor:
    """Masks (size, writer, receiver) of the edges with the largest |score|."""
    rank = score.abs().masked_fill(~graph.upstream, -1.0).flatten().argsort(descending=True).argsort().view(score.shape)
    return t.stack([(rank < size) & graph.upstream for size in sizes])

def draw_circuit(graph: Graph, kept: Tensor, score: Tensor, title: str) -> go.Figure:
    """Layers from below, heads by number, the MLP at the right; an edge's colour is the input it enters, its width the score."""
    H, colors = graph.n_heads, {"q": "#0072B2", "k": "#D55E00", "v": "#009E73", "MLP": "#CC79A7", "logits": "#000000"}
    spots = {"embed": (H / 2, -1.0), "logits": (H / 2, 2.0 * graph.n_layers)} | {name: ((i % (H + 1)) + 0.5 * (i % (H + 1) == H), 2.0 * (i // (H + 1)) + (i % (H + 1) == H)) for i, name in enumerate(graph.writers[1:])}
    fig, used = go.Figure([go.Scatter(x=[None], y=[None], mode="lines", line=dict(color=color, width=4), name=f"into {kind}") for kind, color in colors.items()]), {}
    for w, r in kept.nonzero().tolist():
        (writer, reader), value = (graph.writers[w], graph.receivers[r]), score[w, r].item()
        ends = [spots[name] for name in (writer, reader.split(".")[0])]
        used |= {writer: ends[0], reader.split(".")[0]: ends[1]}
        look = dict(color=colors[reader.replace(" ", ".").split(".")[-1]], width=1 + 7 * abs(value) / score[kept].abs().max().item(), dash="solid" if value > 0 else "dot")
        x, y = np.linspace(*ends, 3).T
        fig.add_trace(go.Scatter(x=x, y=y, mode="lines", opacity=0.6, line=look, showlegend=False, hovertemplate=f"{writer} to {reader}<br>score {value:.3f}<extra></extra>"))
    x, y = zip(*used.values())
    fig.add_trace(go.Scatter(x=x, y=y, text=list(used), mode="markers+text", textposition="top center", marker=dict(size=16, color="#56B4E9"), showlegend=False, hovertemplate="%{text}<extra></extra>"))
    return fig.update_layout(title=title, height=260 + 130 * graph.n_layers, xaxis=dict(title="head; at the right the MLP", tickvals=list(range(H))), yaxis=dict(title="layer", tickvals=[2 * l for l in range(graph.n_layers)], ticktext=[f"L{l}" for l in range(graph.n_layers)]))

#%% Backwards from the logits by path patching; self-repair; knock-out; and the roles of GPT-2's circuit for indirect objects (Wang et al. 2023)
ROLES = {"name mover": ("end", "IO"), "negative name mover": ("end", "IO"), "S-inhibition": ("end", "S2"), "induction": ("S2", "S1+1"), "duplicate token": ("S2", "S1"), "previous token": ("S1+1", "S1")}  # where a role looks from and to
WANG = {"name mover": "L9H9 L9H6 L10H0", "negative name mover": "L10H7 L11H10", "S-inhibition": "L7H3 L7H9 L8H6 L8H10", "induction": "L5H5 L6H9", "duplicate token": "L0H1 L3H0", "previous token": "L2H2 L4H11"}

def path_losses(model: nn.Module, graph: Graph, pairs: Pairs, receivers: list[str], kind: str, memory_gb: float = 1.0) -> Tensor:
    """(writer, pair) metric lost when the paths from one writer straight to the receivers carry the corrupt run."""
    return (baselines(model, pairs, kind, memory_gb)[0] - edge_patch(model, graph, pairs, t.stack([graph.edges([w], receivers) for w in graph.writers]), kind, memory_gb)).cpu()

def trace_back(model: nn.Module, graph: Graph, pairs: Pairs, kind: str, memory_gb: float = 1.0, depth: int = 4, floor: float = 0.05, width: int = 3) -> list[tuple[list[str], Tensor]]:
    """
    Steps (receivers, share (writer)) of the metric lost by the path from each writer straight to the receivers: the logits, then the q, k, v and MLP inputs of those
    that lost most (at most `width`, at least `floor`) through the input before.
    """
    gap, options, steps = float(-t.stack(baselines(model, pairs, kind, memory_gb)).mean(1).diff()), [["logits"]], []
    while options and len(steps) < 4 * depth:
        new = [(receivers, path_losses(model, graph, pairs, receivers, kind, memory_gb).mean(1) / gap) for receivers in options]
        best, steps = max((share for _, share in new), key=lambda share: share.max()), steps + new
        names = [graph.writers[i] for i in best.topk(width).indices.tolist() if best[i] >= floor and i > 0]
        options = [receivers for x in ("q", "k", "v", "MLP") if names and (receivers := graph.readers(names, x))]
    return steps

@t.no_grad()
def self_repair(model: nn.Module, graph: Graph, pairs: Pairs, head: str, kind: str, memory_gb: float = 1.0) -> tuple[float, float, Tensor]:
    """A head's write set to its mean over pairs and positions: metric lost by the path to the logits alone, by all paths, and the change of every writer's direct effect (writer), in logits of answer - wrong."""
    writer, n_pairs = graph.writers.index(head), pairs_that_fit(model, graph, pairs, memory_gb)
    def written(group: Pairs) -> tuple[Tensor, int]:
        own, real = run_graph(model, graph, group, "clean")[2][:, :, writer], t.arange(group.clean.shape[1], device=group.at.device) <= group.at[:, None]
        return own[real].sum(0), int(real.sum())
    def fail_head(group: Pairs) -> tuple[Tensor, Tensor]:
        logits, cache, own = run_graph(model, graph, group, "clean")
        other, metric, lost = own.clone(), make_metric(group, kind, logits), []
        other[:, :, writer] = mean
        for receivers in (["logits"], None):
            swap = graph.edges([head], receivers).to(own.device).expand(len(group), -1, -1)
            patched, gaps = edge_run(model, graph, cache["resid_pre", 0], group.at, 0, swap, other)
            lost.append((metric(logits, group.index) - metric(patched, group.index)).sum())
        change = (other - t.cat(gaps, 2) - own)[group.index, group.at].float() / cache["ln_final.hook_scale"][group.index, group.at][:, None]
        return t.stack(lost) / len(pairs), einsum(change, read_out(model, group.answer) - read_out(model, group.wrong), "pair writer d_model, d_model pair -> writer") / len(pairs)
    sums, counts = zip(*by_groups(written, pairs, n_pairs))
    mean = sum(sums) / sum(counts)
    lost, change = map(sum, zip(*by_groups(fail_head, pairs, n_pairs)))
    return *lost.tolist(), change.cpu()

@t.no_grad()
def knock_out(model: nn.Module, pairs: Pairs, layers: Iterable[int], mask: Tensor, kind: str, memory_gb: float = 1.0) -> Tensor:
    """Metric (pair) of clean runs in which, in these layers, no head attends from the answer's position to the positions of mask (pair, pos) (Geva et al. 2023)."""
    def blind(group: Pairs) -> Tensor:
        query, resid = t.arange(group.clean.shape[1], device=mask.device) == group.at[:, None], inputs(model, group, "clean")
        def hide(scores: Tensor, hook: nn.Module) -> Tensor: return scores.masked_fill((query[:, :, None] & group.places["hidden"][:, None])[:, None], -1e9)
        return make_metric(group, kind, run_from(model, resid, group.at))(run_from(model, resid, group.at, 0, [([act_name("attn_scores", l) for l in layers], hide)]), group.index)
    return t.cat(by_groups(blind, replace(pairs, places={"hidden": mask}), rows_that_fit(model, mask.shape[1], memory_gb)))

@t.no_grad()
def find_roles(model: nn.Module, graph: Graph, pairs: Pairs, kind: str, memory_gb: float = 1.0, shuffles: int = 200, floor: float = 0.3, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, float], dict[str, list[str]]]:
    """
    Scores {role: (layer, head)}: attention from where the role looks to what it looks at. Bars {role: float}: `floor` or, if larger, the 99th percentile of the best
    head's score with keys drawn at random. Found {role: heads} above the bar; movers also write the answer (or against it) straight to the logits, and S-inhibition
    heads act on the movers' queries, beyond the 99th percentile of the best head's effect with signs drawn at random.
    """
    generator, scores, bars, names, T = t.Generator().manual_seed(seed), {}, {}, [act_name("pattern", l) for l in range(graph.n_layers)], pairs.clean.shape[1]
    place = {name: mask.float().argmax(1) for name, mask in pairs.places.items()}
    def look_from(group: Pairs) -> dict[str, Tensor]:
        """{query: (pair, layer, head, key)}"""
        _, cache = record(model, inputs(model, group, "clean"), group.at, names)
        rows = {query: group.places[query].float().argmax(1) for query, _ in ROLES.values()}
        return {query: F.pad(t.stack([cache[name][group.index, :, q].float() for name in names], 1), (0, T - group.clean.shape[1])) for query, q in rows.items()}
    seen = by_groups(look_from, pairs, rows_that_fit(model, T, memory_gb, graph.n_layers * graph.n_heads * T))
    for role, (query, key) in ROLES.items():
        q, k, look = place[query], place[key], t.cat([part[query] for part in seen])
        drawn = (t.rand(shuffles, len(pairs), generator=generator).to(q.device) * (q + 1)).long()
        scores[role], null = look[pairs.index, :, :, k].mean(0).cpu(), t.stack([look[pairs.index, :, :, d].mean(0).max() for d in drawn])
        bars[role] = max(floor, null.quantile(0.99).item())
    found = {role: [graph.head_names[i] for i in (score > bars[role]).flatten().nonzero()[:, 0].tolist()] for role, score in scores.items()}
    def acting(role: str, receivers: list[str], sign: int = 1) -> list[str]:
        if not found[role] or not receivers: return []
        lost = path_losses(model, graph, pairs, receivers, kind, memory_gb)[[graph.writers.index(head) for head in graph.head_names]]
        bar = ((t.randint(2, (shuffles, 1, len(pairs)), generator=generator) * 2.0 - 1) * lost).mean(-1).amax(1).quantile(0.99)
        return [head for head in found[role] if sign * lost[graph.head_names.index(head)].mean() > bar]
    found |= {"name mover": acting("name mover", ["logits"]), "negative name mover": acting("negative name mover", ["logits"], -1)}
    return scores, bars, found | {"S-inhibition": acting("S-inhibition", graph.readers(found["name mover"], "q") if found["name mover"] else [])}

#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str = "models/world"  # a hub name, a short name or a folder
    task: Literal["ioi", "capitals", "induction", "greater_than", "agreement", "gender"] = "ioi"
    clean: str | None = None  # a prompt of your own, with --corrupt, --answer and --wrong
    corrupt: str | None = None
    answer: str | None = None  # one token, with the space before it: " Paris"
    wrong: str | None = None
    pairs: str | None = None  # or many: a CSV or JSON file with the columns clean, corrupt, answer, wrong
    metric: Literal["logit_diff", "log_prob", "kl"] = "logit_diff"
    site: tuple[str, ...] = STREAM + HEADS  # activations to sweep
    positions: tuple[int, ...] = ()  # of the shown prompt; default all
    n: int = 32  # pairs to look at and to find the circuit on
    held_out: int = 100  # pairs to test it on
    ig_steps: int = 5
    offload: Literal["auto", "on", "off"] = "auto"  # weights come block by block where they do not fit, always, never; then the stream alone is patched
    data: str | None = None  # text whose loss ablations are measured on: world, stdlib, a file or folder, a hub dataset; default world for models/world, else stdlib
    memory_gb: float = 1.0  # cap on activations
    seed: int = 0
    device: str = "auto"
    bench: bool = False  # only compare the speed of sweeps with transformer_lens.patching

if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=Config(model="gpt2", n=256, held_out=500, memory_gb=24.0))
    device = pick_device(cfg.device)
    set_seed(cfg.seed)

#%% Speed against transformer_lens.patching (--bench): the same sweeps, prompts and numbers, runs interleaved
if __name__ == "__main__" and cfg.bench:
    from transformer_lens import patching as theirs
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel
    keep_freed_memory()
    hf, world, numbers, gaps = GPT2LMHeadModel(GPT2Config()), load_model(str(WORLD), (Llama,), device).requires_grad_(False), {}, []
    gpt2 = build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=hf.config).to(device).eval().requires_grad_(False)
    models = {"gpt2": (gpt2, gpt2), "world": (world, TransformerBridge.boot_transformers(str(WORLD), device=device).eval().requires_grad_(False))}
    pool = draw_pairs(world, "ioi", 1000, cfg.seed)
    for name, n in product(models, (1, 32)):
        (ours, bridge), pairs = models[name], pool.take((pool.at == 14).nonzero()[:n, 0])
        for title, site, by, other in (("resid_pre", "resid_pre", "pos", theirs.get_act_patch_resid_pre), ("head", "z", "head", theirs.get_act_patch_attn_head_out_all_pos)):
            seconds, _, _ = [], sweep(ours, pairs, site, by), bridge.run_with_cache(pairs.clean)  # both are warm
            for _ in range(3 if n == 1 else 1):
                start = time.perf_counter()
                with t.no_grad(): reference = other(bridge, pairs.corrupt, bridge.run_with_cache(pairs.clean)[1], lambda logits: make_metric(pairs, "logit_diff")(logits[:, -1], pairs.index).mean())
                middle = time.perf_counter()
                mine = sweep(ours, pairs, site, by, memory_gb=cfg.memory_gb).mean(-1)
                seconds.append((middle - start, time.perf_counter() - middle))
                gaps.append((mine - reference).abs().max().item())
            speedup = float(np.median([slow / fast for slow, fast in seconds]))
            print(f"{cyan}{name}, {n} IOI pair{'s' * (n > 1)} of 15 tokens, {title} sweep: {np.median(seconds, 0)[0]:.3f} s by transformer_lens, {np.median(seconds, 0)[1]:.3f} s here: {speedup:.1f} times as fast; largest difference so far {max(gaps):.0e}{endc}")
            if n == 1: numbers[f"{title}_speedup_{name}"] = speedup
    peak = {n: peak_bytes(lambda: sweep(world, pool.take(slice(0, n)), "z", "head", memory_gb=cfg.memory_gb)) / 2**30 for n in (32, 128, 512)}
    print(f"{cyan}world, head sweep, largest memory of tensors under the cap of {cfg.memory_gb:g} GB: {', '.join(f'{n} pairs {gb:.2f} GB' for n, gb in peak.items())}{endc}")
    assert max(peak.values()) < cfg.memory_gb
    save_results("patching_bench", cfg, **numbers, max_abs_diff=max(gaps), peak_gigabytes=peak)
    raise SystemExit

#%% The model and the prompts: pairs that differ in one thing, some to look at, others to test on
if __name__ == "__main__":
    model = open_model(cfg.model, (Llama,), device, offload=cfg.offload).requires_grad_(False)
    own, say = (cfg.clean, cfg.corrupt, cfg.answer, cfg.wrong), lambda ids: [token_text(model, int(i)) for i in ids]
    if any(own) and not all(own): fail("a prompt of your own needs all of --clean, --corrupt, --answer and --wrong")
    task, given = ("own pairs", read_pairs(cfg.pairs) if cfg.pairs else [own]) if cfg.pairs or any(own) else (cfg.task, [])
    if len(given) == 1: print(f"{yellow}one pair: what is found is tested on the same pair{endc}")
    pairs, held = (make_pairs(model, given[i % len(given)::2]) if given else draw_pairs(model, task, n, cfg.seed + i) for i, n in enumerate((cfg.n, cfg.held_out)))
    if not (streamed := isinstance(model, Streamed)): keep_freed_memory()  # blocks that come and go would leave holes
    kind, graph, numbers, few, shown = cfg.metric, None if streamed else Graph(model), {}, pairs.take(slice(0, None, max(1, len(pairs) // 16))), pairs.take(slice(len(pairs) // 2, len(pairs) // 2 + 1))
    about, layers, heads, labels = f"{task}, {Path(cfg.model).name}, {kind}", [f"L{l}" for l in range(model.cfg.n_layers)], [f"H{h}" for h in range(model.cfg.n_heads)], label_tokens(say(shown.clean[0]))
    print(f"{purple}=== {about}: {len(pairs)} pairs, {len(held)} held out ==={endc}")
    print(f"{gray}clean   {''.join(say(shown.clean[0]))}\ncorrupt {''.join(say(shown.corrupt[0]))}\nanswer  {say(shown.answer)[0]!r}, wrong {say(shown.wrong)[0]!r}; {about_bos(model)}{endc}")

#%% Baselines and gates: before a number is believed, patching nothing changes nothing, patching everything changes everything, and the writes add up
if __name__ == "__main__":
    (clean, corrupt), (held_clean, held_corrupt) = (baselines(model, x, kind, cfg.memory_gb) for x in (pairs, held))
    share, held_share = (partial(normalised, clean=a, corrupt=b) for a, b in ((clean, corrupt), (held_clean, held_corrupt)))
    share(clean)  # refuses equal metrics
    few_clean, few_corrupt = baselines(model, few, kind, cfg.memory_gb)
    with t.no_grad(): logits = model(few.clean)[few.index, few.at]
    nothing, whole = (sweep(model, few, "resid_pre", kind=kind, places={"all": t.full_like(few.clean, on, dtype=t.bool)}, memory_gb=cfg.memory_gb, skip=False) for on in (False, True))
    scale = 0.01 + (few_clean - few_corrupt).abs().max()
    misses = {"answer alone unembedded": make_metric(few, kind, logits)(logits, few.index) - few_clean, "nothing patched": nothing - few_corrupt, "everything patched": whole - few_clean}
    if not streamed:
        gap, magnitude = write_differences(model, graph, few, cfg.memory_gb)
        none, every = edge_patch(model, graph, few, t.stack([~graph.upstream, graph.upstream]), kind, cfg.memory_gb)
        misses |= {"no edge patched": none - few_clean, "every edge patched": every - few_corrupt, "writes along the edges add up": gap * scale}
    numbers |= {"clean": clean.mean().item(), "corrupt": corrupt.mean().item(), "gates": {title: (miss.abs().max() / scale).item() for title, miss in misses.items()}}
    print(f"{cyan}clean {clean.mean():.3f}, corrupt {corrupt.mean():.3f} (held out {held_clean.mean():.3f}, {held_corrupt.mean():.3f}); gates: {', '.join(f'{title} {miss:.0e}' for title, miss in numbers['gates'].items())}{endc}")
    wrong = [title for title, miss in numbers["gates"].items() if miss > (1e-4 if model.W_U.dtype == t.float32 else 5e-2)]
    if any("edge" not in title for title in wrong): fail(f"gate: {wrong[0]} misses; sweeps of this model cannot be believed")
    if wrong: print(f"{yellow}gate: {wrong[0]} misses: the writes of this model do not add up to its stream (a norm stands behind them), so paths and circuits are left out{endc}")

#%% Where it happens: sweeps by layer and token of one pair, by layer and place of all pairs, by head
if __name__ == "__main__":
    print(f"{purple}=== Activation patching ==={endc}")
    if streamed and cfg.site == STREAM + HEADS: cfg = replace(cfg, site=("resid_pre", "resid_post"))
    if unknown := [site for site in cfg.site if act_name(site, 0) not in hook_points(model)]: fail(f"unknown hook {unknown[0]!r}: this model has no {act_name(unknown[0], 0)}; use some of {', '.join(STREAM + HEADS)}")
    chosen, stream, by_head = position_masks(shown, cfg.positions), [site for site in cfg.site if site not in HEADS], [site for site in cfg.site if site in HEADS]
    if stream:
        cells = t.stack([normalised(sweep(model, shown, site, "pos", kind, places=chosen), *baselines(model, shown, kind)) for site in stream])
        show(imshow(cells, f"Clean activation into the corrupt run at one token (n = 1, {about}; 0 = corrupt, 1 = clean)", "token", "layer", [labels[int(p)] for p in chosen], layers, stream, columns=2, value="restored"), "patching/tokens")
        panels = {f"{site}, {direction}": share(sweep(model, pairs, site, "pos", kind, direction, pairs.places, cfg.memory_gb)) for site in stream for direction in ("denoise", "noise")}
        show(imshow(t.stack(list(panels.values())), f"Clean into corrupt (denoise), corrupt into clean (noise) by place (n = {len(pairs)}, {about}; 0 = corrupt, 1 = clean)", "place", "layer", list(pairs.places), layers, list(panels), columns=2, value="metric"), "patching/places")
        numbers |= {"by_place": {title: panel.tolist() for title, panel in panels.items()}, "places": list(pairs.places)}
    if by_head:
        panels = {f"{site}, {direction}": share(sweep(model, pairs, site, "head", kind, direction, memory_gb=cfg.memory_gb)) for site in by_head for direction in ("denoise", "noise")}
        wide = t.stack([panel.repeat_interleave(graph.n_heads // panel.shape[1], 1) for panel in panels.values()])
        show(imshow(wide, f"Patching by head (n = {len(pairs)}, {about}; 0 = corrupt, 1 = clean; heads that share keys show one value)", "head", "layer", heads, layers, list(panels), columns=4, value="metric"), "patching/heads")
        cells = share(sweep(model, pairs, by_head[0], "head pos", kind, places=pairs.places, memory_gb=cfg.memory_gb)).flatten(0, 1)
        show(imshow(cells, f"Clean {by_head[0]} of one head into the corrupt run, by place (n = {len(pairs)}, {about})", "place", "head", list(pairs.places), graph.head_names[:len(cells)], value="restored"), "patching/head_places")
        numbers |= {"by_head": {title: panel.tolist() for title, panel in panels.items()}}

#%% Where the weights come block by block the story ends here: heads, MLPs and edges are not hooked
if __name__ == "__main__" and streamed:
    save_results("patching", cfg, **numbers)
    table = numbers["by_place"][f"{cfg.site[0]}, denoise"]
    best = [max(range(len(pairs.places)), key=lambda i: row[i]) for row in table]
    print(f"{green}At {cfg.site[0]} the answer stands at {' '.join(f'L{l} {list(pairs.places)[i]} {table[l][i]:.0%}' for l, i in enumerate(best))} (share of the metric that the clean stream there restores; the weights were streamed). Gates: the worst misses by {max(numbers['gates'].values()):.0e}.{endc}")
    raise SystemExit

#%% Facts: noise on the subject's embeddings, restored by layer and place (ROME); and what the answer may not look at
if __name__ == "__main__" and task == "capitals":
    sigma, resid = 3 * model.W_E.float().std().item(), inputs(model, pairs, "clean")
    noised = replace(pairs, corrupt_resid=resid + sigma * t.randn_like(resid) * pairs.places["changed"][..., None])
    ends = baselines(model, noised, "log_prob")
    panels = {site: normalised(sweep(model, noised, site, "pos", "log_prob", places=pairs.places, memory_gb=cfg.memory_gb), *ends) for site in ("resid_post", "attn_out", "mlp_out")}
    show(imshow(t.stack(list(panels.values())), f"Causal tracing: subject noised by {sigma:.2f}, one clean activation restored (n = {len(pairs)}, {Path(cfg.model).name}, log-probability: 0 = noised {ends[1].mean():.2f}, 1 = clean {ends[0].mean():.2f} nats)", "place", "layer", list(pairs.places), layers, list(panels), columns=3, value="restored"), "patching/tracing")
    blind = {place: [normalised(knock_out(model, pairs, which, mask, "log_prob", cfg.memory_gb), *ends).item() for which in (*([l] for l in range(graph.n_layers)), range(graph.n_layers))] for place, mask in pairs.places.items() if place != "end"}
    show(imshow(t.tensor(list(blind.values())), f"Attention from the answer's position knocked out (n = {len(pairs)}, {Path(cfg.model).name}, log-probability: 0 = subject noised, 1 = clean)", "layer", "to", [*layers, "all"], list(blind), value="metric left"), "patching/knock_out")
    subject = list(pairs.places).index("changed")
    numbers |= {"places": list(pairs.places), "tracing": {site: panel.tolist() for site, panel in panels.items()}, "knock_out": blind}
    print(f"{cyan}the clean subject after layer 0 restores {panels['resid_post'][0, subject]:.0%}, one MLP output there at most {panels['mlp_out'][:, subject].max():.0%}; without attention from the answer's position to the subject {blind['changed'][-1]:.2f} is left, to the words between {blind['between'][-1]:.2f} (1 = clean, 0 = subject noised){endc}")

#%% What is needed: heads, MLPs, neurons and directions taken away, with the effect on the answer and on the loss over text
if __name__ == "__main__":
    print(f"{purple}=== Ablations ==={endc}")
    data = cfg.data or ("world" if find_folder(cfg.model) == str(WORLD) else "stdlib")
    rows = judging_rows(load_world() if data == "world" else load_corpus(data, tokenizer=find_folder(cfg.model)), 16, 64, cfg.seed).to(device)
    names, sigmas = graph.writers[1:], [0.0, 0.25, 0.5, 1.0, 2.0, 4.0]
    parts = [part for l in range(graph.n_layers) for part in (*(Part("z", l, partial(t.mul, F.one_hot(t.tensor(h), graph.n_heads)[:, None].to(device))) for h in range(graph.n_heads)), Part("mlp_out", l))]
    effects = {how: ablation_effects(model, few, rows, [(part, how, 1.0) for part in parts], kind, cfg.memory_gb) for how in ("zero", "mean", "resample", "noise")}
    where = f"n = {len(few)} prompts, {rows.numel()} held-out tokens of {data}, {about}; means and deviations over that text"
    for i, title in enumerate(("share of the metric lost", "nats per token of text lost")): show(imshow(t.tensor([[e[i] for e in effect] for effect in effects.values()]), f"Ablation: {title} ({where})", "part", "ablation", names, list(effects), value=title), f"patching/ablation_{('metric', 'loss')[i]}")
    order = sorted(range(len(parts)), key=lambda i: -effects["mean"][i][0])
    strongest, mlp = (next(i for i in order if parts[i].site == site) for site in ("z", "mlp_out"))
    curves = {names[i]: [e[0] for e in ablation_effects(model, few, rows, [(parts[i], "noise", s) for s in sigmas], kind, cfg.memory_gb)] for i in (strongest, mlp)}
    show(line(curves, f"Gaussian noise on the strongest head and MLP ({where})", "sigma (standard deviations)", "share of the metric lost", sigmas, markers=True), "patching/noise")
    fine = fine_parts(model, few, parts[mlp].layer, cfg.memory_gb)
    lost = ablation_effects(model, few, rows, [(part, "mean", 1.0) for part in fine.values()], kind, cfg.memory_gb)
    table = [[names[i], *(f"{effects[how][i][0]:.2f} / {effects[how][i][1]:+.2f}" for how in effects)] for i in order[:8]] + [[title, "", f"{a:.2f} / {b:+.2f}"] for title, (a, b) in zip(fine, lost)]
    print(tabulate(table, headers=["share of metric lost / nats added", *effects]))
    numbers |= {"ablation": {how: dict(zip(names, effect)) for how, effect in effects.items()}, "noise_curve": curves, "fine_ablation": dict(zip(fine, lost))}

#%% Backwards from the logits by path patching; and self-repair: what the strongest writers do directly, and who steps in when they fail
if __name__ == "__main__":
    if wrong:
        save_results("patching", cfg, **numbers)
        raise SystemExit
    print(f"{purple}=== Path patching ==={endc}")
    steps = {" ".join(receivers): losses for receivers, losses in trace_back(model, graph, few, kind, cfg.memory_gb)}
    show(imshow(t.stack(list(steps.values())), f"Exact path patching: metric lost when the path from a writer to these inputs is corrupt (n = {len(few)}, {about})", "writer", "inputs", graph.writers, list(steps), value="share lost"), "patching/paths")
    for title, losses in steps.items(): print(f"{gray}into {title}: {cyan}{', '.join(f'{graph.writers[i]} {losses[i]:+.2f}' for i in losses.abs().topk(4).indices.tolist())}{endc}")
    repair = []
    for head in sorted(graph.head_names, key=lambda head: -steps["logits"][graph.writers.index(head)])[:4]:
        alone, total, change = self_repair(model, graph, few, head, kind, cfg.memory_gb)
        repair.append([head, alone, total, ", ".join(f"{graph.writers[j]} {change[j]:+.2f}" for j in change.topk(2).indices.tolist() if change[j] > 0.05)])
    print(tabulate(repair, headers=["set to its mean", "lost directly", "lost in all", "steps in (direct effect, logits)"], floatfmt=".2f"))
    numbers |= {"paths": {title: dict(zip(graph.writers, losses.tolist())) for title, losses in steps.items()}, "self_repair": repair}

#%% Indirect objects: which roles of GPT-2's circuit exist in this model, each against a permutation null
if __name__ == "__main__" and {"IO", "S1", "S1+1", "S2"} <= held.places.keys():
    scores, bars, found = find_roles(model, graph, held, kind, cfg.memory_gb)
    show(imshow(t.stack(list(scores.values())), f"Attention of each role (n = {len(held)} held-out pairs, {about}; bars {', '.join(f'{role} {bar:.2f}' for role, bar in bars.items())})", "head", "layer", heads, layers, list(scores), columns=3, diverging=False, value="attention"), "patching/roles")
    table = [[role, " ".join(found[role]) or "none", f"{graph.head_names[int(score.argmax())]} {score.max():.2f}", bars[role], *[WANG[role]] * (Path(cfg.model).name in ("gpt2", "gpt2-small"))] for role, score in scores.items()]
    print(tabulate(table, headers=["role", "heads", "most attention", "bar", "Wang et al. (2023)"][:len(table[0])], floatfmt=".2f"))
    numbers |= {"roles": found, "role_bars": bars, "role_scores": {role: score.tolist() for role, score in scores.items()}}

#%% Edges: attribution by gradient and along a path of gradients, against the truth
if __name__ == "__main__":
    print(f"{purple}=== Edges and circuits ==={endc}")
    start = time.perf_counter()
    ranking = {"EAP-IG": edge_attribution(model, graph, pairs, kind, cfg.ig_steps, cfg.memory_gb)}
    numbers["edge_attribution_seconds"] = time.perf_counter() - start
    ranking |= {"EAP": edge_attribution(model, graph, pairs, kind, 0, cfg.memory_gb), "magnitude": magnitude[:, None].expand(graph.upstream.shape), "random": t.rand(graph.upstream.shape)}
    total, picked = int(graph.upstream.sum()), top_edges(graph, t.rand(graph.upstream.shape), [500])[0].nonzero()  # at most 500 are patched one by one
    single = t.zeros(len(picked), *graph.upstream.shape, dtype=t.bool)
    single[range(len(picked)), picked[:, 0], picked[:, 1]] = True
    truth = (few_clean - edge_patch(model, graph, few, single, kind, cfg.memory_gb)).mean(-1).cpu()
    estimates = {method: edge_attribution(model, graph, few, kind, steps, cfg.memory_gb)[picked[:, 0], picked[:, 1]] for method, steps in (("EAP-IG", cfg.ig_steps), ("EAP", 0))}
    correlation = {method: t.corrcoef(t.stack([truth, x]))[0, 1].item() for method, x in estimates.items()}
    fig = go.Figure([go.Scatter(x=truth, y=x, mode="markers", name=f"{method}, correlation {correlation[method]:.2f}", text=[f"{graph.writers[w]} to {graph.receivers[r]}" for w, r in picked.tolist()], hovertemplate="%{text}<br>patched %{x:.3f}<br>estimated %{y:.3f}<extra></extra>") for method, x in estimates.items()])
    show(fig.update_layout(title=f"Metric lost by an edge, patched and estimated ({len(picked)} of {total} edges, n = {len(few)}, {about})", xaxis_title="lost by patching", yaxis_title="estimated"), "patching/attribution")
    numbers |= {"attribution_correlation": correlation["EAP-IG"], "attribution_correlation_eap": correlation["EAP"], "node_attribution": dict(zip(graph.writers, ranking["EAP-IG"].sum(1).tolist()))}
    print(f"{cyan}{total} edges attributed in {numbers['edge_attribution_seconds']:.1f} s (EAP-IG, {cfg.ig_steps} steps, {len(pairs)} pairs); correlation with patching {len(picked)} of them: EAP-IG {correlation['EAP-IG']:.2f}, EAP {correlation['EAP']:.2f}{endc}")

#%% The circuit: the fewest edges that keep the behaviour, found on some pairs and tested on others, beside random circuits of its size
if __name__ == "__main__":
    grid = [0.0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.3, 0.5, 1.0]
    sizes, keep = [round(x * total) for x in grid], lambda where, masks: edge_patch(model, graph, where, ~masks, kind, cfg.memory_gb)
    ladders = {method: top_edges(graph, score, sizes) for method, score in ranking.items()}
    circuit = graph.prune(ladders["EAP-IG"][int((share(keep(pairs, ladders["EAP-IG"])) >= 0.9).nonzero()[0])])
    curves = {method: keep(held, masks) for method, masks in ladders.items()}
    areas = {method: area(values, held_clean, held_corrupt, grid) for method, values in curves.items()}
    lines = {f"{method} (area {areas[method][0]:.2f})": held_share(values) for method, values in curves.items()} | {"all but the EAP-IG edges (completeness)": held_share(keep(held, ~ladders["EAP-IG"]))}
    show(line(lines, f"Faithfulness against edges kept (n = {len(held)} held-out pairs, {about}; 0 = corrupt, 1 = clean)", "share of edges", "metric kept", grid, markers=True, dashed=list(lines)[2:]), "patching/faithfulness")
    size, rivals = int(circuit.sum()), t.cat([top_edges(graph, t.rand(graph.upstream.shape), [int(circuit.sum())]) for _ in range(10)])
    faithfulness, complement, *random = held_share(keep(held, t.cat([t.stack([circuit, ~circuit]), rivals]))).tolist()
    show(draw_circuit(graph, circuit, ranking["EAP-IG"], f"{size} of {total} edges keep {faithfulness:.0%} ({about}, found on {len(pairs)} pairs by EAP-IG, n = {len(held)} held-out pairs; dotted: against the answer)"), "patching/circuit")
    numbers |= {"circuit_faithfulness": faithfulness, "circuit_edges": size, "circuit_edges_total": total, "circuit_complement": complement, "random_circuit_faithfulness": float(np.mean(random)), "random_circuit_faithfulness_max": max(random)}
    numbers |= {"eap_ig_faithfulness": areas["EAP-IG"][0], "eap_faithfulness": areas["EAP"][0], "areas": areas, "circuit": [f"{graph.writers[w]} to {graph.receivers[r]}" for w, r in circuit.nonzero().tolist()]}
    for method, (value, low, high) in areas.items(): print(f"{cyan}area under faithfulness, {method}: {value:.3f} ({low:.3f} to {high:.3f}, 95% over {len(held)} pairs){endc}")

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    save_results("patching", cfg, **numbers)
    worse, better = sorted(("EAP", "EAP-IG"), key=lambda method: areas[method][0])
    ranked, inside = f"{better} ranks edges best" if areas[better][1] > areas[worse][2] else "EAP and EAP-IG rank edges alike, within their intervals", [w for i, w in enumerate(graph.writers) if circuit[i].any()]
    if "roles" in numbers: print(f"{green}Of the roles in GPT-2's circuit this model has {'; '.join(f'{role} {chr(32).join(names)}' for role, names in found.items() if names) or 'none'}; none is {', '.join(role for role, names in found.items() if not names) or 'missing'}.{endc}")
    print(f"{green}{size} of {total} edges ({size / total:.0%}; {' '.join(inside)}) keep {faithfulness:.0%} of the metric on {len(held)} held-out pairs, as many random edges {np.mean(random):.0%}, all the others {complement:.0%}; {ranked} (areas {areas["EAP-IG"][0]:.3f} by EAP-IG, {areas["EAP"][0]:.3f} by EAP). Gates: the worst misses by {max(numbers['gates'].values()):.0e}.{endc}")
