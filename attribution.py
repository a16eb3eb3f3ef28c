"""
Through which features does an answer come about? Transcoders take the place of the MLPs, and a prompt becomes a graph of
features, errors, embeddings and logits whose edges are exact, which is pruned, drawn, and tested by suppressing features.
The methods are transcoders.transcoder_loss, transcoders.judge_transcoders, attribution_graph.plain_attribute (its fast
form is attribute), prune, replacement_score, completeness_score and suppress.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from utils import (  # first: sets OpenMP's variables before torch is loaded
    Count,
    Natural,
    Positive,
    Share,
    cyan,
    endc,
    fail,
    gray,
    green,
    pick_device,
    purple,
    save_results,
    set_seed,
    yellow,
)
from report import fill_page
from plots import array, bar, feature_page, imshow, label_tokens, show, show_page, signed_log, signed_log_ticks, visible
from hooks import device_of
from weights import about_bos, bos_id, encode, open_model, text_tokenizer, token_text
from data import refuse_empty
from launch import flags
from pairs import draw_pairs
from graph import Graph
from eap import eap_ig
from lens import knows_world
from features import firing_order, heldout_rows, read_features, text_for
from transcoders import (
    TranscoderConfig,
    fit_transcoders,
    judge_transcoders,
    names_of_model,
    open_folders,
    open_releases,
    refuse_misfits,
    refuse_settings,
    warn_of_bad_transcoders,
)
from attribution_graph import (
    AttributionGraph,
    LocalReplacement,
    Pruned,
    attribute,
    completeness_score,
    export_graph,
    find_nodes,
    later_nodes,
    predicted_change,
    prune,
    replacement_score,
    suppress,
)
from llama_block import Llama

import plotly.graph_objects as go
import torch as t
from scipy.stats import spearmanr
from tabulate import tabulate


#%% Settings: the shell sets them by flags, a notebook edits them here; those of the transcoders are TranscoderConfig's
@dataclass
class Config(TranscoderConfig):
    # texts whose next token is traced, a graph for each
    prompts: tuple[str, ...] = (
        "The capital of Japan is",
        "Then Susan and Philip waited at the school. Susan handed the book to",
    )
    logit_share: Share = 0.95  # the likeliest tokens that hold this share of the probability are the graph's logits,
    most_logits: Count = 10  # so many at most
    node_share: Share = 0.8  # nodes that hold this share of the influence on the logits are kept,
    edge_share: Share = 0.98  # and between them the edges that hold this share of it
    suppressed: Count = 24  # features of each graph that are taken out, the most influential, to test its edges
    pages: Natural = 200  # features of each layer on a page to search, the most frequent
    circuit_pairs: Natural = 16  # pairs for the edges of circuits.py beside the graphs (models of the world); 0: none
    export: str | None = None  # a folder for the graphs as JSON that circuit-tracer's and Neuronpedia's pages read
    memory_gb: Positive = 1.0  # cap on activations
    wandb: bool = False  # numbers and figures go to Weights & Biases too
    device: str = "auto"


HPC = Config(model="gpt2", bos=True, d_sae=24_576, k=32.0, steps=20_000, batch=4096, lr=1e-3, context=128)
cfg = flags(Config, __doc__, hpc=HPC)
device = pick_device(cfg.device)
set_seed(cfg.seed)
for prompt in cfg.prompts:
    refuse_empty(prompt)
refuse_settings(cfg)

#%% The model, its text, and a transcoder for every layer: trained here and kept, or loaded
name = cfg.model
their_weights = None
if cfg.transcoders:
    named, their_weights = names_of_model(cfg.transcoders)
    name = cfg.model or named
    if name is None:
        fail("these transcoders do not name their model: give it by --model")
name = name or "models/world"
model = open_model(name, (Llama,), device, dtype="float32", bos=cfg.bos).requires_grad_(False)  # edges are exact
corpus = text_for(model, name, cfg.data, cfg.bos)
rows = heldout_rows(corpus, cfg.heldout, cfg.context, corpus.bos is not None, cfg.seed).to(device)
if cfg.transcoders:
    coders = open_folders(cfg.transcoders, device)
elif cfg.release:
    coders = open_releases(cfg.release, cfg.sae_ids, device)
else:
    coders = fit_transcoders(model, cfg, corpus, name, device)
refuse_misfits(model, coders, rows[:1], their_weights)
FIRST = 1  # the first token of a row is no text
skips = coders[0].W_skip is not None
kind = "skip transcoders" if skips else "transcoders"
about = f"{Path(name).name}, {kind} of width {coders[0].cfg.d_sae}"
layers = [f"L{layer}" for layer in range(len(coders))]
numbers = {"skip": skips}
print(f"{purple}=== {about} ==={endc}")
print(f"{gray}{about_bos(model)}{endc}")

#%% Judged on held-out text: what the model loses when transcoders take the place of its MLPs
judged, codes = judge_transcoders(model, coders, rows, FIRST, corpus.bos)
headers = ["MLPs replaced", "L0", "FVU", "dead", "clean", "replaced", "mean instead", "recovered"]
table = []
for label, told in zip([*layers, "all at once"], judged):
    table.append([label, *("-" if math.isnan(value) else f"{value:.3f}" for value in told.values())])
print(f"{cyan}cross-entropies in nats; recovered: '-' where the mean in its place costs nothing{endc}")
print(tabulate(table, headers=headers, disable_numparse=True, colalign=["left", *["right"] * 7]))
numbers["judged"] = dict(zip([*layers, "all"], judged))
of_all = judged[-1]
numbers["nats_added"] = of_all["ce_replaced"] - of_all["ce_clean"]
numbers["nats_added_by_means"] = of_all["ce_mean_ablated"] - of_all["ce_clean"]
warn_of_bad_transcoders(judged, 0.8)

#%% ... as bars
lost = {
    "by its transcoder": [told["ce_replaced"] - told["ce_clean"] for told in judged],
    "by the mean of what it writes": [told["ce_mean_ablated"] - told["ce_clean"] for told in judged],
}
fig = bar(
    lost,
    title=f"What the model loses when an MLP is replaced ({about}; {len(rows)} held-out rows)",
    xlabel="MLP",
    ylabel="cross-entropy added (nats)",
    x=[*layers, "all at once"],
)
show(
    fig,
    "attribution/judged",
    "Low blue beside high orange: the features carry nearly all that the model has of the MLP.",
)


#%% A graph for each prompt, and its gates: the frozen model is the model, and the parts of every node sum to it
@dataclass
class Traced:
    """A prompt, its graph, and what is kept of it."""

    tokens: list[str]
    frozen: LocalReplacement
    graph: AttributionGraph
    pruned: Pruned
    answers: list[str]


def trace(prompt: str) -> Traced:
    ids = t.tensor(encode(model, prompt), device=device_of(model))
    frozen = LocalReplacement(model, coders, ids, bos_id(model))
    nodes = find_nodes(frozen, cfg.logit_share, cfg.most_logits)
    graph = attribute(frozen, nodes)
    answers = [token_text(model, token) for token in nodes.logits.tolist()]
    tokens = [token_text(model, token) for token in ids.tolist()]
    return Traced(tokens, frozen, graph, prune(graph, cfg.node_share, cfg.edge_share), answers)


LARGEST_MISS = 1e-4
traced = [trace(prompt) for prompt in cfg.prompts]
numbers["graphs"] = {}
table = []
for prompt, x in zip(cfg.prompts, traced):
    nodes = x.graph.nodes
    gates = {"frozen_model_is_the_model": x.frozen.gap(), "parts_sum_to_nodes": x.graph.gap()}
    told = {
        "answer": x.answers[0],
        "probability": nodes.probabilities[0].item(),
        "active_features": nodes.n_features,
        "kept_nodes": int(x.pruned.nodes.sum()),
        "kept_edges": int(x.pruned.edges.sum()),
        "replacement_score": replacement_score(x.graph),
        "completeness_score": completeness_score(x.graph),
    }
    numbers["graphs"][prompt] = told | {"gates": gates}
    table.append([prompt, *told.values()])
worst_gate = max(max(told["gates"].values()) for told in numbers["graphs"].values())
headers = ["prompt", "answer", "p", "features", "nodes kept", "edges kept", "replacement", "completeness"]
print(f"{purple}=== Graphs: 1 would be scores without any error ==={endc}")
print(tabulate(table, headers=headers, floatfmt=".2f", maxcolwidths=[36] + [None] * 7))
print(f"{cyan}gates: the frozen model misses the model, or parts their node, by {worst_gate:.0e} at most{endc}")
if not worst_gate <= LARGEST_MISS:
    fail(f"gate: {worst_gate:.0e} misses; graphs of this model (or in this precision) cannot be believed")

#%% What the features of the graphs fire on, and those of each layer that fire most
in_graphs = set()
for x in traced:
    nodes = x.graph.nodes
    strongest = x.pruned.influence[: nodes.n_features].argsort(descending=True)[: max(cfg.suppressed, 6)]
    kept = x.pruned.nodes[: nodes.n_features].nonzero()[:, 0]
    named_nodes = nodes.features[t.cat([strongest, kept])]
    in_graphs |= {(layer, feature) for layer, _, feature in named_nodes.tolist()}
entries = []  # [layer] {feature: its entry on a page}
for layer, coder in enumerate(coders):
    frequent = firing_order(codes[layer])[: cfg.pages]
    chosen = sorted({*frequent, *(feature for at, feature in in_graphs if at == layer)})
    read = read_features(model, coder, codes[layer], rows, text_tokenizer(model), chosen)
    entries.append({entry["id"]: entry for entry in read})


def fires_on(layer: int, feature: int) -> str:
    """The token of the feature's strongest context."""
    contexts = entries[layer][feature]["contexts"]
    if not contexts:
        return "nothing in the held-out text"
    words, shades = contexts[0]
    return words[shades.index(max(shades))]


def name_of(x: Traced, node: int) -> str:
    """As 'L2 f135 (·Paris) at ·is_4': what it mostly fires on, and where it stands."""
    kind, layer, pos = x.graph.nodes.place(node)
    word = label_tokens(x.tokens)[pos]
    if kind == "feature":
        feature = int(x.graph.nodes.features[node, 2])
        return f"L{layer} f{feature} ({fires_on(layer, feature)}) at {word}"
    if kind == "error":
        return f"L{layer} error at {word}"
    if kind == "embedding":
        return f"embedding of {word}"
    at = node - x.graph.nodes.logit_slice.start
    return f"{visible(x.answers[at])} {x.graph.nodes.probabilities[at]:.2f}"


def shares(x: Traced) -> t.Tensor:
    """(node): the share of all that reaches the logits that comes from a node or by way of it."""
    return x.pruned.influence / x.graph.nodes.probabilities.sum()


for prompt, x in zip(cfg.prompts, traced):
    strongest = [
        node
        for node in x.pruned.influence.argsort(descending=True).tolist()
        if x.graph.nodes.place(node)[0] == "feature"
    ][:6]
    told = ", ".join(f"{name_of(x, node)} {shares(x)[node]:.0%}" for node in strongest)
    print(f"{purple}{prompt}{endc} {cyan}{x.answers[0]}{endc}: {told}")

#%% ... each layer's as a page to search
for layer, of_layer in enumerate(entries):
    title = f"{len(of_layer)} features of MLP {layer}: {about}"
    reading = (
        "What the features of the first MLP fire on, and which tokens they promote; the later layers' pages follow."
    )
    page = feature_page(list(of_layer.values()), title)
    show_page(page, f"attribution/features_L{layer}", reading if layer == 0 else "")


#%% ... and each prompt's graph as a page: by layer and token, a node's edges and contexts when it is hovered
def graph_page(x: Traced, title: str) -> str:
    nodes = x.graph.nodes
    kept = x.pruned.nodes.nonzero()[:, 0].tolist()
    number = {node: i for i, node in enumerate(kept)}
    drawn = []
    features = {}
    for node in kept:
        kind, layer, pos = nodes.place(node)
        key = None
        if kind == "feature":
            feature = int(nodes.features[node, 2])
            key = f"{layer} {feature}"
            entry = entries[layer][feature]
            features[key] = {field: entry[field] for field in ("density", "max", "up", "down", "contexts")}
        drawn.append(
            {
                "name": name_of(x, node),
                "kind": kind,
                "row": layer + 1,
                "pos": pos,
                "act": nodes.acts[node].item() if kind == "feature" else None,
                "share": shares(x)[node].item(),
                "feature": key,
            }
        )
    edges = []
    for target, source in x.pruned.edges.nonzero().tolist():
        weight = x.graph.adjacency[target, source].item()
        edges.append({"from": number[source], "to": number[target], "weight": weight})
    data = {
        "about": f"{about}; {len(kept)} of {len(nodes)} nodes, those with {cfg.node_share:.0%} of the influence; an edge "
        "is what its source gives the target's pre-activation, attention and norms as they were.",
        "tokens": [visible(token) for token in x.tokens],
        "layers": ["embed", *layers, "logits"],
        "nodes": drawn,
        "edges": sorted(edges, key=lambda edge: -abs(edge["weight"])),
        "features": features,
    }
    return fill_page("attribution", title, data)


for i, (prompt, x) in enumerate(zip(cfg.prompts, traced), 1):
    told = numbers["graphs"][prompt]
    title = f"Through which features '{prompt}' becomes '{x.answers[0].strip()}'"
    show_page(
        graph_page(x, title),
        f"attribution/graph_{i}",
        f"From the tokens upward to the logits. Completeness {told['completeness_score']:.2f}, replacement "
        f"{told['replacement_score']:.2f}: the rest is what the transcoders miss (orange diamonds).",
    )


#%% Where the influence stands: by layer and token, of features and of errors
def by_place(x: Traced, kind: str) -> t.Tensor:
    """(layer, pos) shares of the influence."""
    nodes = x.graph.nodes
    total = shares(x).new_zeros(nodes.n_layers, nodes.n_pos)
    if kind == "errors":
        return shares(x)[nodes.error_slice].view_as(total)
    layer, pos, _ = nodes.features.T
    return total.index_put((layer, pos), shares(x)[: nodes.n_features], accumulate=True)


for i, (prompt, x) in enumerate(zip(cfg.prompts, traced), 1):
    fig = imshow(
        t.stack([by_place(x, kind) for kind in ("features", "errors")]),
        title=f"Where the influence on the answer to '{prompt}' stands ({about}; share of the influence on the logits)",
        xlabel="token",
        ylabel="layer",
        x=label_tokens(x.tokens),
        y=layers,
        panels=["features", "errors"],
        diverging=False,
        value="share",
    )
    show(
        fig,
        f"attribution/where_{i}",
        "How much of what reaches the logits passes there. It passes several layers, so that shares add up to more than 1; "
        "at the first token all is error, since transcoders never see it.",
    )


#%% Edges put to the test: a feature is taken out of the model, and every later node's change is beside what was predicted
@dataclass
class Tested:
    """Of every pair of a suppressed feature and a node after it (pair): changes predicted and measured."""

    names: list[str]
    by_edges: t.Tensor
    by_paths: t.Tensor
    held: t.Tensor  # measured with attention, norms and other MLPs held
    frozen: t.Tensor  # measured with attention and norms held, as the graph has them
    patterns: t.Tensor  # measured with attention alone held
    live: t.Tensor  # measured as the model runs
    is_logit: t.Tensor


def put_to_test(x: Traced) -> Tested:
    nodes = x.graph.nodes
    order = x.pruned.influence[: nodes.n_features].argsort(descending=True)[: cfg.suppressed].tolist()
    on_top = t.zeros(len(nodes), dtype=t.bool)
    on_top[nodes.logit_slice] = True
    kept = x.pruned.nodes.cpu()
    parts = []
    names = []
    for feature in order:
        to = (later_nodes(nodes, feature).cpu() & kept).nonzero()[:, 0]
        changes = [
            predicted_change(x.graph, feature, direct=True),
            predicted_change(x.graph, feature, direct=False),
            suppress(x.frozen, nodes, feature, hold="all"),
            suppress(x.frozen, nodes, feature, hold="frozen"),
            suppress(x.frozen, nodes, feature, hold="patterns"),
            suppress(x.frozen, nodes, feature, hold="nothing"),
        ]
        parts.append(t.stack([change.cpu().double()[to] for change in changes] + [on_top[to].double()]))
        names += [f"{name_of(x, feature)} taken out: {name_of(x, node)}" for node in to.tolist()]
    by_edges, by_paths, held, frozen, patterns, live, is_logit = t.cat(parts, 1)
    return Tested(names, by_edges, by_paths, held, frozen, patterns, live, is_logit.bool())


def pearson(x: t.Tensor, y: t.Tensor) -> float:
    if len(x) < 3:
        return math.nan
    return t.corrcoef(t.stack([x, y]))[0, 1].item()


print(f"{purple}=== Features suppressed: predicted against measured change of the kept nodes after them ==={endc}")
tested = [put_to_test(x) for x in traced]
numbers["edges"] = {}
table = []
for prompt, x in zip(cfg.prompts, tested):
    logits = x.is_logit
    told = {
        "pairs": len(x.live),
        "held_error": ((x.by_edges - x.held).abs().max() / x.by_edges.abs().max()).item(),
        "edges_frozen": pearson(x.by_edges, x.frozen),
        "paths_frozen": pearson(x.by_paths, x.frozen),
        "paths_patterns_held": pearson(x.by_paths, x.patterns),
        "paths_live": pearson(x.by_paths, x.live),
        "paths_live_spearman": float(spearmanr(array(x.by_paths), array(x.live)).statistic),
        "paths_live_features": pearson(x.by_paths[~logits], x.live[~logits]),
    }
    numbers["edges"][prompt] = told
    table.append([prompt, *("-" if math.isnan(value) else value for value in told.values())])
headers = [
    "prompt",
    "pairs",
    "edges, all held: error",
    "edges, attention and norms held",
    "paths, attention and norms held",
    "paths, attention held",
    "paths, nothing held",
    "... Spearman",
    "... features alone",
]
print(
    tabulate(
        table,
        headers=headers,
        floatfmt=["", "", ".0e", *[".2f"] * 6],
        maxcolwidths=[30] + [None] * 8,
        maxheadercolwidths=12,
    )
)
print(f"{gray}correlations (Pearson where nothing else is said) of what edges alone, or all paths, foresee{endc}")
worst_held = max(told["held_error"] for told in numbers["edges"].values())
if worst_held <= LARGEST_MISS:
    print(f"{cyan}gate: with all else held, each edge is what the model does, to {worst_held:.0e} of the largest{endc}")
else:
    print(
        f"{yellow}with all else held the edges miss by {worst_held:.0e} of the largest: this model's norms cannot be held "
        f"by its hooks, so that the test is the model as it runs{endc}"
    )

#%% ... as a scatter: predicted along all paths, and measured with attention and norms held, and in the model as it runs
fig = go.Figure()
for i, x in enumerate(tested):
    answer = traced[i].answers[0].strip()
    for how, measured, symbol in (("attention and norms held", x.frozen, "circle"), ("as it runs", x.live, "x")):
        fig.add_trace(
            go.Scatter(
                x=signed_log(x.by_paths),
                y=signed_log(measured),
                mode="markers",
                marker={"symbol": symbol, "size": 7, "opacity": 0.7},
                name=f"{answer}, {how}: correlation {pearson(x.by_paths, measured):.2f}",
                text=x.names,
                customdata=t.stack([x.by_paths, measured], 1).tolist(),
                hovertemplate="%{text}<br>predicted %{customdata[0]:.3f}<br>measured %{customdata[1]:.3f}<extra></extra>",
            )
        )
fig.add_trace(go.Scatter(x=[-4, 4], y=[-4, 4], mode="lines", name="equal", line={"dash": "dash", "color": "#999"}))
fig.update_layout(
    title=f"Does the graph foresee what a suppressed feature changes? ({about}; {cfg.suppressed} features of each graph)",
    xaxis={"title": "change predicted along the graph's paths (signed logarithm)", **signed_log_ticks()},
    yaxis={"title": "change measured in the model (signed logarithm)", **signed_log_ticks()},
)
show(
    fig,
    "attribution/edges",
    "Each dot is a suppressed feature and a node after it; on the dashed line the graph is right. Crosses: what it cannot "
    "know is that norms and attention change too, and strong writes to the last position move the final norm most.",
)

#%% Beside the edge circuit of circuits.py: how much each layer's MLP carries there, and in the graphs
TASKS = ("capitals", "ioi")
compared = cfg.circuit_pairs and knows_world(model) and cfg.prompts == Config().prompts
if compared:
    writers = Graph(model)
    numbers["beside_circuits"] = {}
    for task, x in zip(TASKS, traced):
        pairs = draw_pairs(model, task, cfg.circuit_pairs, cfg.seed, role="find")
        scores = eap_ig(model, writers, pairs, memory_gb=cfg.memory_gb).abs().sum(1)
        of_mlps = t.stack([scores[writers.writers.index(f"{layer} MLP")] for layer in layers])
        features = by_place(x, "features").sum(1)
        errors = by_place(x, "errors").sum(1)
        told = {
            "edge_attribution": (of_mlps / of_mlps.sum()).tolist(),
            "graph": ((features + errors) / (features + errors).sum()).tolist(),
            "graph_features": (features / (features + errors).sum()).tolist(),
        }
        numbers["beside_circuits"][task] = told
        headers = [f"share of the MLPs, {task}", *layers]
        words = ["edges from it (EAP-IG, sizes)", "in the graph", "... by its features"]
        print(tabulate([[word, *row] for word, row in zip(words, told.values())], headers=headers, floatfmt=".2f"))

#%% The numbers for machines, the graphs for other pages, and the conclusion
save_results("attribution", cfg, **numbers)
if cfg.export:
    folder = Path(cfg.export)
    folder.mkdir(parents=True, exist_ok=True)
    for i, x in enumerate(traced, 1):
        words = [name_of(x, node) if x.pruned.nodes[node] else "" for node in range(len(x.graph.nodes))]
        words[x.graph.nodes.logit_slice] = x.answers
        told = export_graph(x.frozen, x.graph, x.pruned, words, x.tokens, f"graph-{i}", Path(name).name)
        (folder / f"graph-{i}.json").write_text(json.dumps(told))
    print(f"{gray}graphs: {folder}{endc}")
print(
    f"{green}With all {len(coders)} MLPs replaced by {of_all['l0']:.0f} features a token the model loses "
    f"{numbers['nats_added']:.2f} nats, where "
    f"means in their place lose {numbers['nats_added_by_means']:.2f}."
)
for prompt, x in zip(cfg.prompts, traced):
    told = numbers["graphs"][prompt]
    foreseen = numbers["edges"][prompt]
    print(
        f"'{prompt}' becomes '{x.answers[0].strip()}' by way of {told['kept_nodes']} nodes (completeness "
        f"{told['completeness_score']:.2f}, replacement {told['replacement_score']:.2f}); what {cfg.suppressed} suppressed "
        f"features change is foreseen with a correlation of {foreseen['paths_frozen']:.2f} if attention and norms "
        f"stay as they were, {foreseen['paths_patterns_held']:.2f} if norms change too, {foreseen['paths_live']:.2f} if all may."
    )
print(f"Gates: parts sum to their node within {worst_gate:.0e}, edges to the model within {worst_held:.0e}.{endc}")
