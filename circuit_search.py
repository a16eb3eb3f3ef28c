"""Circuits: the fewest edges that keep the answer, how faithful they are (MIB's measures), and their export."""

from pairs import Pairs, normalised
from graph import Ablation, Graph, corrupt_writes, edge_patch

import torch as t
import torch.nn as nn
from torch import Tensor


#%% Circuits: the strongest edges alone, everything else as in the corrupt run
def top_edges(graph: Graph, score: Tensor, sizes: list[int]) -> Tensor:
    """Masks (size, writer, receiver) of the edges with the largest |score|."""
    strength = score.abs().masked_fill(~graph.is_edge, -1.0).flatten()
    rank = strength.argsort(descending=True).argsort().view(score.shape)
    return t.stack([(rank < size) & graph.is_edge for size in sizes])


def circuit_metric(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    circuits: Tensor,
    metric: str = "logit_diff",
    memory_gb: float = 1.0,
    ablation: Ablation = corrupt_writes,
) -> Tensor:
    """
    Metric (circuit, pair) of runs in which the edges of a circuit (circuit, writer, receiver) are clean and all others
    ablated. Edges that no clean path reaches, or from which none goes on, are ablated too (prune), as in MIB (Mueller
    et al. 2025).
    """
    pruned = t.stack([graph.prune(circuit & graph.is_edge) for circuit in circuits])
    different, which = pruned.unique(dim=0, return_inverse=True)  # each is run once
    values = edge_patch(model, graph, pairs, ~different, metric, memory_gb, ablation)
    return values[which.to(values.device)]


def smallest_circuit(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    score: Tensor,
    metric: str = "logit_diff",
    share: float = 0.9,
    memory_gb: float = 1.0,
    ablation: Ablation = corrupt_writes,
) -> Tensor:
    """
    Mask (writer, receiver) of the fewest edges of the largest |score| that keep this share of the metric, from all
    edges ablated (0) to none (1), pruned. Sizes double until one suffices; between it and the one before, bisection:
    the size found suffices and one edge less does not. Faithfulness need not rise with every edge, so a smaller size
    that suffices may have been passed over.
    """
    ends = t.stack([graph.is_edge, t.zeros_like(graph.is_edge)])
    clean, ablated = circuit_metric(model, graph, pairs, ends, metric, memory_gb, ablation)

    def suffices(size: int) -> bool:
        circuit = top_edges(graph, score, [size])
        values = circuit_metric(model, graph, pairs, circuit, metric, memory_gb, ablation)
        return normalised(values, clean, ablated).item() >= share

    n_edges = int(graph.is_edge.sum())
    too_few, size = 0, 1
    while size < n_edges and not suffices(size):
        too_few, size = size, min(2 * size, n_edges)
    while size - too_few > 1:
        middle = (too_few + size) // 2
        if suffices(middle):
            size = middle
        else:
            too_few = middle
    return graph.prune(top_edges(graph, score, [size])[0])


#%% Faithfulness over the edges kept, by MIB's measures and on a logarithmic axis, with intervals over pairs
MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def resampled_faithfulness(values: Tensor, clean: Tensor, ablated: Tensor, draws: int = 1000) -> Tensor:
    """
    (1 + draws, size): (metric - ablated) / (clean - ablated) of the mean metrics (size, pair), (pair), (pair); the
    first row over the pairs themselves, the others over pairs drawn with replacement, the same for every call with as
    many pairs, so that methods can be compared draw by draw.
    """
    n = len(clean)
    resampled = t.randint(n, (draws, n), generator=t.Generator().manual_seed(0))
    index = t.cat([t.arange(n)[None], resampled])
    values, clean, ablated = values.double().cpu(), clean.double().cpu(), ablated.double().cpu()
    ablated_mean = ablated[index].mean(-1)
    gap = clean[index].mean(-1) - ablated_mean
    return ((values[:, index].mean(-1) - ablated_mean) / gap).T


def cpr(faithfulness: Tensor, shares: list[float]) -> Tensor:
    """
    Integrated circuit performance ratio (Mueller et al. 2025): the area under faithfulness (..., size) over the shares
    of edges kept. 1 if every circuit does what the model does.
    """
    return t.trapezoid(faithfulness, t.tensor(shares, dtype=faithfulness.dtype))


def cmd(faithfulness: Tensor, shares: list[float]) -> Tensor:
    """Integrated circuit-model distance (Mueller et al. 2025): the area of |1 - faithfulness|; 0 is best."""
    return cpr((1 - faithfulness).abs(), shares)


def log_area(faithfulness: Tensor, sizes: list[int]) -> Tensor:
    """Mean faithfulness (..., size) over the logarithm of the edges kept, from the first size to the last."""
    x = t.tensor(sizes, dtype=faithfulness.dtype).log()
    return t.trapezoid(faithfulness, x) / (x[-1] - x[0])


def interval(draws: Tensor) -> tuple[float, float, float]:
    """(value, 2.5th and 97.5th percentile) of (1 + draws) values, whose first is that of the sample itself."""
    low, high = draws[1:].quantile(t.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return draws[0].item(), low, high


#%% Scores and a circuit in the layout that EAP-IG's Graph.from_json and MIB read
def mib_graph(model: nn.Module, graph: Graph, score: Tensor, kept: Tensor) -> dict:
    """
    {cfg, nodes {name: in_graph}, edges {name: score, in_graph}} of scores and a circuit (writer, receiver); nodes are
    called input, a3.h5, m3, logits, edges m0->a3.h5<q>. There every head has keys and values of its own: where heads
    share them, each is given an equal part of the score.
    """
    config = {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": not graph.serial,
        "d_model": model.cfg.d_model,
    }
    reached = kept.any(1)
    nodes = {mib_name(writer): {"in_graph": bool(on)} for writer, on in zip(graph.writers, reached)}
    nodes["logits"] = {"in_graph": True}
    edges = {}
    for w, r in graph.is_edge.nonzero().tolist():
        receiver = graph.receivers[r]
        suffix = f"<{receiver.input}>" if receiver.input in ("q", "k", "v") else ""
        for fed in graph.fed_by(r):
            name = f"{mib_name(graph.writers[w])}->{mib_name(fed)}{suffix}"
            edges[name] = {"score": score[w, r].item() / receiver.sharing, "in_graph": bool(kept[w, r])}
    return {"cfg": config, "nodes": nodes, "edges": edges}


def mib_name(node: str) -> str:
    """embed: input, L3H5: a3.h5, L3 MLP: m3, logits: logits"""
    if node == "embed":
        return "input"
    if node.endswith(" MLP"):
        return "m" + node.removeprefix("L").removesuffix(" MLP")
    return node.replace("L", "a").replace("H", ".h")
