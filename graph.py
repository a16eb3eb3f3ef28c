"""The graph of writes and reads: path patching, edge attribution (EAP, EAP-IG), circuits, roles."""

from functools import partial

from hooks import Cache, act_name, in_batches, hook_points, cache_from_resid, rows_that_fit, run_from
from anatomy import folded_W_U
from interventions import Pairs, baselines, by_groups, inputs, make_metric

from einops import einsum
import numpy as np
import torch as t
from torch import Tensor
import torch.nn as nn
import torch.nn.functional as F


#%% The graph: the embedding, every head and every MLP write to the stream; every head's q, k, v, every MLP and the logits read it
class Graph:
    """writers and receivers by name; upstream (writer, receiver) is True where there is an edge. Masks of that shape are sets of edges."""

    def __init__(self, model: nn.Module):
        L, H, n_kv = model.cfg.n_layers, model.cfg.n_heads, model.blocks[0].attn.W_K.shape[0]
        self.n_layers, self.n_heads, self.serial = (
            L,
            H,
            act_name("resid_mid", 0) in hook_points(model),
        )  # not serial: attention and MLP read the same stream (GPT-NeoX)
        self.writers = ["embed", *(f"L{l}H{h}" if h < H else f"L{l} MLP" for l in range(L) for h in range(H + 1))]
        self.head_names = [name for name in self.writers if "H" in name]
        spans = [(l, x, n) for l in range(L) for x, n in (("q", H), ("k", n_kv), ("v", n_kv), ("MLP", 1))] + [
            (L, "logits", 1)
        ]
        self.receivers = [
            x if x == "logits" else f"L{l} MLP" if x == "MLP" else f"L{l}H{i}.{x}"
            for l, x, n in spans
            for i in range(n)
        ]
        self.layer_of = t.tensor([min(l, L - 1) for l, _, n in spans for _ in range(n)])
        self.columns = {
            (l, x): slice(end - n, end) for (l, x, n), end in zip(spans, np.cumsum([n for *_, n in spans]).tolist())
        }
        self.upstream = t.zeros(len(self.writers), len(self.receivers), dtype=t.bool)
        self.links = t.zeros(
            len(self.receivers), len(self.writers)
        )  # 1 where a receiver is an input of that writer; grouped queries share k and v
        for l, x, n in spans:
            start, heads = self.columns[l, x].start, self.heads(l)
            self.upstream[: heads.stop if x == "MLP" and self.serial else heads.start, start : start + n] = True
            if x == "MLP":
                self.links[start, heads.stop] = 1
            elif x != "logits":
                self.links[start + t.arange(H) // (H // n), t.arange(heads.start, heads.stop)] = 1

    def heads(self, layer: int) -> slice:
        """A layer's heads among the writers; its MLP follows."""
        return slice(1 + layer * (self.n_heads + 1), (layer + 1) * (self.n_heads + 1))

    def edges(self, writers: list[str], receivers: list[str] | None = None) -> Tensor:
        """The edges from some writers to some (None: all) receivers."""
        mask = t.zeros_like(self.upstream)
        mask[
            t.tensor([self.writers.index(w) for w in writers])[:, None],
            t.tensor([self.receivers.index(r) for r in receivers or self.receivers]),
        ] = True
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
    logits, cache = cache_from_resid(
        model, inputs(model, pairs, which), pairs.answer_pos, [*names, "ln_final.hook_scale"]
    )
    written = [
        x
        for l in range(graph.n_layers)
        for x in (head_writes(model, l, cache["z", l]), cache["mlp_out", l][:, :, None])
    ]
    return logits, cache, t.cat([cache["resid_pre", 0][:, :, None], *written], 2)


def edge_run(
    model: nn.Module,
    graph: Graph,
    resid: Tensor,
    at: Tensor,
    layer: int = 0,
    swap: Tensor | None = None,
    other: Tensor | None = None,
    live: Tensor | None = None,
    nudge: Tensor | None = None,
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
        if swap is None or not swap[:, :, columns].any():
            return delta
        gap = t.cat(gaps, 2)
        moved = einsum(
            swap[:, : gap.shape[2], columns].to(gap.dtype),
            gap,
            "row writer receiver, row pos writer d_model -> row pos receiver d_model",
        )
        return moved if delta is None else delta + moved

    def enter(l: int, x: Tensor, hook: nn.Module) -> None:
        norm, delta = model.blocks[l].ln1, change(slice(graph.columns[l, "q"].start, graph.columns[l, "v"].stop))
        state["moved"] = (
            None
            if delta is None
            else norm((x[:, :, None] + delta).flatten(1, 2)).view(delta.shape) - norm(x)[:, :, None]
        )
        state["MLP"] = None if graph.serial else change(graph.columns[l, "MLP"])

    def read(l: int, kind: str, x: Tensor, hook: nn.Module) -> Tensor | None:
        if state["moved"] is None:
            return None
        W, start = (
            getattr(model.blocks[l].attn, f"W_{kind.upper()}"),
            graph.columns[l, kind].start - graph.columns[l, "q"].start,
        )
        return x + einsum(
            state["moved"][:, :, start : start + len(W)],
            W,
            "row pos head d_model, head d_model d_head -> row pos head d_head",
        )

    def write(l: int, x: Tensor, hook: nn.Module) -> None:
        out, start = (
            (head_writes(model, l, x), graph.heads(l).start) if x.ndim == 4 else (x[:, :, None], graph.heads(l).stop)
        )
        gaps.append(other[:, :, start : start + out.shape[2]] - out)

    def add(l: int, kind: str, x: Tensor) -> Tensor:
        delta = state["MLP"] if kind == "MLP" and not graph.serial else change(graph.columns[l, kind])
        return x if delta is None else x + delta[:, :, 0]

    layers = range(layer, graph.n_layers)
    fwd_hooks = [(act_name("resid_pre", l), partial(enter, l)) for l in layers] + [
        (act_name(kind, l), partial(read, l, kind)) for l in layers for kind in "qkv"
    ]
    if swap is not None:
        fwd_hooks += [(act_name(site, l), partial(write, l)) for l in layers for site in ("z", "mlp_out")]
    inner = [(model.blocks[l].ln2, "in", partial(add, l, "MLP")) for l in layers] + [
        (model.ln_final, "in", partial(add, graph.n_layers, "logits"))
    ]
    return run_from(model, resid, at, layer, fwd_hooks, inner), gaps


def pairs_that_fit(model: nn.Module, graph: Graph, pairs: Pairs, memory_gb: float) -> int:
    """Part of the memory holds the writes of both runs, the rest twice as many rows in flight."""
    return rows_that_fit(
        model, pairs.clean.shape[1], memory_gb / 4, (4 * len(graph.writers) + 24 * graph.n_heads) * model.cfg.d_model
    )


#%% Path patching and edge attribution
@t.no_grad()
def edge_patch(
    model: nn.Module, graph: Graph, pairs: Pairs, swaps: Tensor, kind: str = "logit_diff", memory_gb: float = 1.0
) -> Tensor:
    """
    Metric (swap, pair) of clean runs in which the edges of each mask in swaps (swap, writer, receiver) carry the corrupt run's writes; what lies behind a receiver
    is computed anew, all else stays (path patching, Wang et al. 2023). A circuit is the run in which all other edges are swapped.
    """
    swaps, n_pairs = (
        (swaps & graph.upstream).to(pairs.answer_pos.device),
        pairs_that_fit(model, graph, pairs, memory_gb),
    )
    begins = t.stack([graph.layer_of[row].min() if row.any() else graph.layer_of[-1] for row in swaps.any(1).cpu()]).to(
        pairs.answer_pos.device
    )

    def patch(group: Pairs) -> Tensor:
        (logits, cache, live), (_, _, other) = (run_graph(model, graph, group, which) for which in ("clean", "corrupt"))
        metric, values = make_metric(group, kind, logits), t.zeros(len(swaps), len(group), device=swaps.device)
        for begin in begins.unique().tolist():
            cells = t.cartesian_prod((begins == begin).nonzero()[:, 0], group.index)  # (swap, pair)
            run = lambda w, p: metric(
                edge_run(
                    model, graph, cache["resid_pre", begin][p], group.answer_pos[p], begin, swaps[w], other[p], live[p]
                )[0],
                p,
            )
            values[cells.unbind(1)] = t.cat(
                list(in_batches(lambda part: run(*part.unbind(1)), cells, 2 * n_pairs, "edges"))
            )
        return values

    return t.cat(by_groups(patch, pairs, n_pairs), 1)


def edge_attribution(
    model: nn.Module, graph: Graph, pairs: Pairs, kind: str = "logit_diff", steps: int = 0, memory_gb: float = 1.0
) -> Tensor:
    """
    (writer, receiver): what the clean metric would lose if the edge carried the corrupt write, by gradient, mean over pairs. steps 0: EAP, at the clean run (Syed et
    al. 2023); else EAP-IG, between corrupt and clean embeddings (Hanna et al. 2024). Summed over receivers: attribution patching of nodes.
    """

    def attribute(group: Pairs) -> Tensor:
        total = t.zeros(graph.upstream.shape, device=pairs.answer_pos.device)
        with t.no_grad():
            (logits, cache, own), (_, source, other) = (
                run_graph(model, graph, group, which) for which in ("clean", "corrupt")
            )
        for alpha in [(i + 0.5) / steps for i in range(steps)] or [1.0]:
            resid = source["resid_pre", 0].lerp(cache["resid_pre", 0], alpha)
            nudge = resid.new_zeros(*resid.shape[:2], len(graph.receivers), resid.shape[-1]).requires_grad_()
            with t.enable_grad():
                values = make_metric(group, kind, logits)(
                    edge_run(model, graph, resid, group.answer_pos, nudge=nudge)[0], group.index
                )
            (gradient,) = t.autograd.grad(values.sum(), nudge)
            total += einsum(
                (own - other).float(),
                gradient.float(),
                "pair pos writer d_model, pair pos receiver d_model -> writer receiver",
            ) / max(1, steps)
        return total

    return (
        sum(by_groups(attribute, pairs, pairs_that_fit(model, graph, pairs, memory_gb))) / len(pairs)
    ).cpu() * graph.upstream


@t.no_grad()
def write_differences(model: nn.Module, graph: Graph, pairs: Pairs, memory_gb: float = 1.0) -> tuple[float, Tensor]:
    """Between clean and corrupt: by how much the sum of the writes misses the stream before the last layer, relative to its largest; the norm of each write, summed over pairs and positions (writer)."""

    def differ(group: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        (_, a, own), (_, b, other) = (run_graph(model, graph, group, which) for which in ("clean", "corrupt"))
        writes, stream = (
            (own - other).float(),
            (a["resid_pre", graph.n_layers - 1] - b["resid_pre", graph.n_layers - 1]).float(),
        )
        return (
            (writes[:, :, : graph.heads(graph.n_layers - 1).start].sum(2) - stream).abs().max(),
            stream.abs().max(),
            writes.norm(dim=-1).sum((0, 1)),
        )

    miss, largest, norms = zip(*by_groups(differ, pairs, pairs_that_fit(model, graph, pairs, memory_gb)))
    return (max(miss) / max(largest)).item(), sum(norms).cpu()


#%% Circuits: the strongest edges alone, everything else as in the corrupt run
def top_edges(graph: Graph, score: Tensor, sizes: list[int]) -> Tensor:
    """Masks (size, writer, receiver) of the edges with the largest |score|."""
    rank = score.abs().masked_fill(~graph.upstream, -1.0).flatten().argsort(descending=True).argsort().view(score.shape)
    return t.stack([(rank < size) & graph.upstream for size in sizes])


def area(
    values: Tensor, clean: Tensor, corrupt: Tensor, x: list[float], draws: int = 1000
) -> tuple[float, float, float]:
    """Area under faithfulness over the share of edges kept, for values (size, pair), and its 95% interval from resampled pairs."""
    index = t.cat(
        [t.arange(len(clean))[None], t.randint(len(clean), (draws, len(clean)), generator=t.Generator().manual_seed(0))]
    ).to(clean.device)
    curve = (values[:, index].mean(-1) - corrupt[index].mean(-1)) / (clean[index].mean(-1) - corrupt[index].mean(-1))
    areas = t.trapezoid(curve.cpu(), t.tensor(x), dim=0)
    return areas[0].item(), *areas[1:].quantile(t.tensor([0.025, 0.975])).tolist()


#%% Backwards from the logits by path patching; self-repair; and the roles of GPT-2's circuit for indirect objects (Wang et al. 2023)
ROLES = {
    "name mover": ("end", "IO"),
    "negative name mover": ("end", "IO"),
    "S-inhibition": ("end", "S2"),
    "induction": ("S2", "S1+1"),
    "duplicate token": ("S2", "S1"),
    "previous token": ("S1+1", "S1"),
}  # where a role looks from and to
WANG = {
    "name mover": "L9H9 L9H6 L10H0",
    "negative name mover": "L10H7 L11H10",
    "S-inhibition": "L7H3 L7H9 L8H6 L8H10",
    "induction": "L5H5 L6H9",
    "duplicate token": "L0H1 L3H0",
    "previous token": "L2H2 L4H11",
}


def path_losses(
    model: nn.Module, graph: Graph, pairs: Pairs, receivers: list[str], kind: str, memory_gb: float = 1.0
) -> Tensor:
    """(writer, pair) metric lost when the paths from one writer straight to the receivers carry the corrupt run."""
    return (
        baselines(model, pairs, kind, memory_gb)[0]
        - edge_patch(
            model, graph, pairs, t.stack([graph.edges([w], receivers) for w in graph.writers]), kind, memory_gb
        )
    ).cpu()


def trace_back(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    kind: str,
    memory_gb: float = 1.0,
    depth: int = 4,
    floor: float = 0.05,
    width: int = 3,
) -> list[tuple[list[str], Tensor]]:
    """
    Steps (receivers, share (writer)) of the metric lost by the path from each writer straight to the receivers: the logits, then the q, k, v and MLP inputs of those
    that lost most (at most `width`, at least `floor`) through the input before.
    """
    gap, options, steps = float(-t.stack(baselines(model, pairs, kind, memory_gb)).mean(1).diff()), [["logits"]], []
    while options and len(steps) < 4 * depth:
        new = [
            (receivers, path_losses(model, graph, pairs, receivers, kind, memory_gb).mean(1) / gap)
            for receivers in options
        ]
        best, steps = max((share for _, share in new), key=lambda share: share.max()), steps + new
        names = [graph.writers[i] for i in best.topk(width).indices.tolist() if best[i] >= floor and i > 0]
        options = [receivers for x in ("q", "k", "v", "MLP") if names and (receivers := graph.readers(names, x))]
    return steps


@t.no_grad()
def self_repair(
    model: nn.Module, graph: Graph, pairs: Pairs, head: str, kind: str, memory_gb: float = 1.0
) -> tuple[float, float, Tensor]:
    """A head's write set to its mean over pairs and positions: metric lost by the path to the logits alone, by all paths, and the change of every writer's direct effect (writer), in logits of answer - wrong."""
    writer, n_pairs = graph.writers.index(head), pairs_that_fit(model, graph, pairs, memory_gb)

    def written(group: Pairs) -> tuple[Tensor, int]:
        own, real = (
            run_graph(model, graph, group, "clean")[2][:, :, writer],
            t.arange(group.clean.shape[1], device=group.answer_pos.device) <= group.answer_pos[:, None],
        )
        return own[real].sum(0), int(real.sum())

    def fail_head(group: Pairs) -> tuple[Tensor, Tensor]:
        logits, cache, own = run_graph(model, graph, group, "clean")
        other, metric, lost = own.clone(), make_metric(group, kind, logits), []
        other[:, :, writer] = mean
        for receivers in (["logits"], None):
            swap = graph.edges([head], receivers).to(own.device).expand(len(group), -1, -1)
            patched, gaps = edge_run(model, graph, cache["resid_pre", 0], group.answer_pos, 0, swap, other)
            lost.append((metric(logits, group.index) - metric(patched, group.index)).sum())
        change = (other - t.cat(gaps, 2) - own)[group.index, group.answer_pos].float() / cache["ln_final.hook_scale"][
            group.index, group.answer_pos
        ][:, None]
        return t.stack(lost) / len(pairs), einsum(
            change,
            folded_W_U(model, group.answer) - folded_W_U(model, group.wrong),
            "pair writer d_model, d_model pair -> writer",
        ) / len(pairs)

    sums, counts = zip(*by_groups(written, pairs, n_pairs))
    mean = sum(sums) / sum(counts)
    lost, change = map(sum, zip(*by_groups(fail_head, pairs, n_pairs)))
    return *lost.tolist(), change.cpu()


@t.no_grad()
def find_roles(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    kind: str,
    memory_gb: float = 1.0,
    shuffles: int = 200,
    floor: float = 0.3,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, list[str]]]:
    """
    Scores {role: (layer, head)}: attention from where the role looks to what it looks at. Bars {role: float}: `floor` or, if larger, the 99th percentile of the best
    head's score with keys drawn at random. Found {role: heads} above the bar; movers also write the answer (or against it) straight to the logits, and S-inhibition
    heads act on the movers' queries, beyond the 99th percentile of the best head's effect with signs drawn at random.
    """
    generator, scores, bars, names, T = (
        t.Generator().manual_seed(seed),
        {},
        {},
        [act_name("pattern", l) for l in range(graph.n_layers)],
        pairs.clean.shape[1],
    )
    place = {name: mask.float().argmax(1) for name, mask in pairs.places.items()}

    def look_from(group: Pairs) -> dict[str, Tensor]:
        """{query: (pair, layer, head, key)}"""
        _, cache = cache_from_resid(model, inputs(model, group, "clean"), group.answer_pos, names)
        rows = {query: group.places[query].float().argmax(1) for query, _ in ROLES.values()}
        return {
            query: F.pad(
                t.stack([cache[name][group.index, :, q].float() for name in names], 1), (0, T - group.clean.shape[1])
            )
            for query, q in rows.items()
        }

    seen = by_groups(look_from, pairs, rows_that_fit(model, T, memory_gb, graph.n_layers * graph.n_heads * T))
    for role, (query, key) in ROLES.items():
        q, k, look = place[query], place[key], t.cat([part[query] for part in seen])
        drawn = (t.rand(shuffles, len(pairs), generator=generator).to(q.device) * (q + 1)).long()
        scores[role], null = (
            look[pairs.index, :, :, k].mean(0).cpu(),
            t.stack([look[pairs.index, :, :, d].mean(0).max() for d in drawn]),
        )
        bars[role] = max(floor, null.quantile(0.99).item())
    found = {
        role: [graph.head_names[i] for i in (score > bars[role]).flatten().nonzero()[:, 0].tolist()]
        for role, score in scores.items()
    }

    def acting(role: str, receivers: list[str], sign: int = 1) -> list[str]:
        if not found[role] or not receivers:
            return []
        lost = path_losses(model, graph, pairs, receivers, kind, memory_gb)[
            [graph.writers.index(head) for head in graph.head_names]
        ]
        bar = (
            ((t.randint(2, (shuffles, 1, len(pairs)), generator=generator) * 2.0 - 1) * lost)
            .mean(-1)
            .amax(1)
            .quantile(0.99)
        )
        return [head for head in found[role] if sign * lost[graph.head_names.index(head)].mean() > bar]

    found |= {
        "name mover": acting("name mover", ["logits"]),
        "negative name mover": acting("negative name mover", ["logits"], -1),
    }
    return (
        scores,
        bars,
        found
        | {
            "S-inhibition": acting(
                "S-inhibition", graph.readers(found["name mover"], "q") if found["name mover"] else []
            )
        },
    )
