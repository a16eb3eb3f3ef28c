"""
Edge attribution: what patching each edge would do, by gradient (EAP, EAP-IG). The plain forms, one receiver at a time,
stand before the fast ones.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from pairs import Pairs, by_groups, make_metric
from graph import EdgeRun, Graph, InputChange, Receiver, pairs_that_fit, run_graph

import torch as t
import torch.nn as nn
from einops import einsum
from scipy.stats import spearmanr
from torch import Tensor


#%% Plain forms: EAP and EAP-IG of the edges into one receiver
def input_gradient(
    model: nn.Module,
    receiver: Receiver,
    resid: Tensor,
    pairs: Pairs,
    metric: str,
    clean_logits: Tensor,
    also: list[tuple] = (),
) -> Tensor:
    """
    Gradient (pair, pos, d_model) of the metric at what one receiver reads, in a run that resid enters at layer 0. also:
    hooks of that run.
    """
    change = t.zeros_like(resid).requires_grad_()
    with t.enable_grad():
        logits = InputChange(model, receiver, change).run(resid, pairs.answer_pos, also)
        value = make_metric(pairs, metric, clean_logits)(logits, pairs.index).sum()
    (gradient,) = t.autograd.grad(value, change)
    return gradient


@t.no_grad()
def plain_eap(model: nn.Module, graph: Graph, pairs: Pairs, receiver: str, metric: str = "logit_diff") -> Tensor:
    """
    Edge attribution patching (Syed et al. 2023) of the edges into one receiver (writer): the gradient at its input in
    the clean run times the writer's clean - corrupt, over positions and d_model, mean over pairs. Plain form of eap.
    """
    clean = run_graph(model, graph, pairs, "clean")
    corrupt = run_graph(model, graph, pairs, "corrupt")
    r = graph.receiver_names.index(receiver)
    gradient = input_gradient(model, graph.receivers[r], clean.cache["resid_pre", 0], pairs, metric, clean.logits)
    difference = clean.writes - corrupt.writes
    scores = einsum(difference, gradient, "pair pos writer d_model, pair pos d_model -> writer") / len(pairs)
    return scores.cpu() * graph.is_edge[:, r]


@t.no_grad()
def plain_eap_ig(
    model: nn.Module, graph: Graph, pairs: Pairs, receiver: str, metric: str = "logit_diff", steps: int = 5
) -> Tensor:
    """
    EAP with integrated gradients (Hanna et al. 2024): as plain_eap, the gradient averaged over runs between corrupt
    and clean embeddings. Plain form of eap_ig.
    """
    clean = run_graph(model, graph, pairs, "clean")
    corrupt = run_graph(model, graph, pairs, "corrupt")
    r = graph.receiver_names.index(receiver)
    start = corrupt.cache["resid_pre", 0]
    end = clean.cache["resid_pre", 0]
    gradient = t.zeros_like(start)
    for step in range(steps):
        resid = start + (step + 0.5) / steps * (end - start)
        gradient += input_gradient(model, graph.receivers[r], resid, pairs, metric, clean.logits) / steps
    difference = clean.writes - corrupt.writes
    scores = einsum(difference, gradient, "pair pos writer d_model, pair pos d_model -> writer") / len(pairs)
    return scores.cpu() * graph.is_edge[:, r]


def add_to(change: Tensor, x: Tensor, hook: nn.Module) -> Tensor:
    return x + change


@t.no_grad()
def plain_eap_ig_activations(
    model: nn.Module, graph: Graph, pairs: Pairs, receiver: str, metric: str = "logit_diff", steps: int = 5
) -> Tensor:
    """
    EAP-IG on activations (Mueller et al. 2025, after Marks et al. 2024): as plain_eap, the gradient of a writer's edge
    averaged over clean runs in which the writer, together with all that join the stream at the same hook (a layer's
    heads), writes between corrupt and clean. Plain form of eap_ig_activations.
    """
    clean = run_graph(model, graph, pairs, "clean")
    corrupt = run_graph(model, graph, pairs, "corrupt")
    r = graph.receiver_names.index(receiver)
    difference = clean.writes - corrupt.writes
    scores = t.zeros(len(graph.writers))
    for written_at, writers in graph.writers_at().items():
        gradient = t.zeros_like(clean.cache["resid_pre", 0])
        for step in range(steps):
            alpha = (step + 0.5) / steps
            change = -(1 - alpha) * difference[:, :, writers].sum(2)
            also = [(written_at, partial(add_to, change))]
            resid = clean.cache["resid_pre", 0]
            gradient += input_gradient(model, graph.receivers[r], resid, pairs, metric, clean.logits, also) / steps
        scores[writers] = einsum(
            difference[:, :, writers], gradient, "pair pos writer d_model, pair pos d_model -> writer"
        ).cpu()
    return scores / len(pairs) * graph.is_edge[:, r]


#%% Fast forms: all edges from the gradients of a run
def eap(model: nn.Module, graph: Graph, pairs: Pairs, metric: str = "logit_diff", memory_gb: float = 1.0) -> Tensor:
    """
    Edge attribution patching (Syed et al. 2023), (writer, receiver): what the clean metric would lose if the edge
    carried the corrupt write, by the gradient in the clean run, mean over pairs. Summed over receivers: attribution
    patching of nodes. With the metric kl that gradient is 0 (the clean run is its minimum): take eap_ig.
    """
    return attribute_edges(model, graph, pairs, metric, [1.0], memory_gb)


def eap_ig(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    metric: str = "logit_diff",
    steps: int = 5,
    memory_gb: float = 1.0,
) -> Tensor:
    """
    EAP with integrated gradients (Hanna et al. 2024), (writer, receiver): as eap, the gradient averaged over `steps`
    runs between corrupt and clean embeddings.
    """
    assert steps > 0
    return attribute_edges(model, graph, pairs, metric, [(i + 0.5) / steps for i in range(steps)], memory_gb)


def attribute_edges(
    model: nn.Module, graph: Graph, pairs: Pairs, metric: str, alphas: list[float], memory_gb: float
) -> Tensor:
    """
    (writer, receiver): gradients in runs from corrupt (alpha 0) to clean (1) embeddings, averaged over alphas, times
    clean - corrupt writes; mean over pairs.
    """
    n_pairs = pairs_that_fit(model, graph, pairs, memory_gb)
    totals = by_groups(partial(attribute_group, model, graph, metric, alphas), pairs, n_pairs)
    return (sum(totals) / len(pairs)).cpu() * graph.is_edge


def attribute_group(model: nn.Module, graph: Graph, metric: str, alphas: list[float], group: Pairs) -> Tensor:
    """attribute_edges of pairs that fit into memory at once, summed over them."""
    with t.no_grad():
        clean = run_graph(model, graph, group, "clean")
        corrupt = run_graph(model, graph, group, "corrupt")
    metric_fn = make_metric(group, metric, clean.logits)
    difference = clean.writes - corrupt.writes
    total = t.zeros(graph.is_edge.shape, device=group.answer_pos.device)
    for alpha in alphas:
        resid = corrupt.cache["resid_pre", 0].lerp(clean.cache["resid_pre", 0], alpha)
        total += edge_scores(model, graph, group, resid, difference, metric_fn) / len(alphas)
    return total


def edge_scores(
    model: nn.Module,
    graph: Graph,
    group: Pairs,
    resid: Tensor,
    difference: Tensor,
    metric_fn: Callable[[Tensor, Tensor], Tensor],
    also: list[tuple] = (),
) -> Tensor:
    """
    (writer, receiver): gradients of the metric at what receivers read, in a run that resid (pair, pos, d_model)
    enters, times difference (pair, pos, writer, d_model), summed over pairs. also: hooks of that run.
    """
    pair, pos, d_model = resid.shape
    nudge = resid.new_zeros(pair, pos, len(graph.receiver_names), d_model).requires_grad_()
    with t.enable_grad():
        logits = EdgeRun(model, graph, nudge=nudge).run(resid, group.answer_pos, also=also)
        value = metric_fn(logits, group.index).sum()
    (gradient,) = t.autograd.grad(value, nudge)
    return einsum(
        difference.float(),
        gradient.float(),
        "pair pos writer d_model, pair pos receiver d_model -> writer receiver",
    )


def eap_ig_activations(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    metric: str = "logit_diff",
    steps: int = 5,
    memory_gb: float = 1.0,
) -> Tensor:
    """
    EAP-IG on activations (Mueller et al. 2025, after Marks et al. 2024), (writer, receiver): as eap, the gradient of a
    writer's edges averaged over `steps` clean runs in which this writer, with all that join the stream at its hook,
    writes between corrupt and clean. It takes 1 + 2 n_layers times the runs of eap_ig.
    """
    assert steps > 0
    n_pairs = pairs_that_fit(model, graph, pairs, memory_gb)
    totals = by_groups(partial(attribute_group_by_activations, model, graph, metric, steps), pairs, n_pairs)
    return (sum(totals) / len(pairs)).cpu() * graph.is_edge


def attribute_group_by_activations(model: nn.Module, graph: Graph, metric: str, steps: int, group: Pairs) -> Tensor:
    """eap_ig_activations of pairs that fit into memory at once, summed over them."""
    with t.no_grad():
        clean = run_graph(model, graph, group, "clean")
        corrupt = run_graph(model, graph, group, "corrupt")
    metric_fn = make_metric(group, metric, clean.logits)
    total = t.zeros(graph.is_edge.shape, device=group.answer_pos.device)
    for written_at, writers in graph.writers_at().items():
        difference = clean.writes[:, :, writers] - corrupt.writes[:, :, writers]
        for step in range(steps):
            share_corrupt = 1 - (step + 0.5) / steps
            also = [(written_at, partial(add_to, -share_corrupt * difference.sum(2)))]
            resid = clean.cache["resid_pre", 0]
            total[writers] += edge_scores(model, graph, group, resid, difference, metric_fn, also) / steps
    return total


#%% Estimated effects of edges against exact ones
class Agreement(NamedTuple):
    """
    pearson, spearman over all edges; top: share of the `n` edges of the largest |effect| among the n of the largest
    |estimate|; sign: share of edges (but those without any effect) whose estimate has the effect's sign.
    """

    pearson: float
    spearman: float
    top: float
    sign: float


def agreement(effect: Tensor, estimate: Tensor, n: int) -> Agreement:
    """How well estimates (edge) stand for the effects (edge) that edge patching has."""
    strongest = set(effect.abs().topk(n).indices.tolist())
    estimated = set(estimate.abs().topk(n).indices.tolist())
    acts = effect != 0
    return Agreement(
        pearson=t.corrcoef(t.stack([effect, estimate]))[0, 1].item(),
        spearman=float(spearmanr(effect.tolist(), estimate.tolist()).statistic),
        top=len(strongest & estimated) / n,
        sign=(effect.sign() == estimate.sign())[acts].float().mean().item(),
    )
