"""
Along which paths does the answer travel, and how few of them suffice? Path patching, self-repair, roles of heads,
edge attribution and circuits, on our own models and any TransformerBridge.
The methods in plain form, and their fast forms: path_patch, chain_patch (path_patch_all) in path_patching.py;
plain_edge_patch (edge_patch) in graph.py; plain_eap, plain_eap_ig, plain_eap_ig_activations (eap, eap_ig,
eap_ig_activations) in eap.py; circuits in circuit_search.py, roles in roles.py.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# first: sets OpenMP's variables before torch is loaded
from utils import (
    Count,
    DtypeName,
    Natural,
    Positive,
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
    on_base,
)
from report import fill_page
from plots import imshow, line, show, show_page, signed_log, signed_log_ticks
from hooks import has_qkv, in_words, missed_gates
from data import text_of
from weights import about_bos, open_model, text_tokenizer, token_text
from train import keep_freed_memory
from launch import flags
from logit_attribution import about_norms
from pairs import UNITS, Pairs, baselines, by_groups, normalised, read_task, require_gap
from interventions import sweep_gates
from graph import Graph, corrupt_writes, edge_patch, mean_of_reference, pairs_that_fit, write_differences
from path_patching import (
    chain_name,
    chain_patch,
    inputs_of,
    path_losses,
    path_patch,
    read_chain,
    self_repair,
    trace_back,
    writers_of,
)
from eap import agreement, eap, eap_ig, eap_ig_activations
from circuit_search import (
    MIB_SHARES,
    circuit_metric,
    cmd,
    cpr,
    interval,
    log_area,
    mib_graph,
    resampled_faithfulness,
    smallest_circuit,
    top_edges,
)
from roles import WANG, find_roles
from llama_block import Llama

import plotly.graph_objects as go
import torch as t
from tabulate import tabulate
from torch import Tensor


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str = "models/world"  # a hub name, a short name or a folder
    base: str | None = None  # a model whose config and tokenizer the weights of --model are put on
    bos: bool | None = None  # put a beginning-of-text token first; default as the model's own tokenizer says
    task: Literal["ioi", "capitals", "induction", "greater_than", "agreement", "gender"] = (
        "ioi"  # which prompts, each with an answer that is known (README: the world model)
    )
    clean: str | None = None  # a prompt of your own, with --corrupt, --answer and --wrong
    corrupt: str | None = None  # the same prompt with one thing changed, of as many tokens
    answer: str | None = None  # one token, with the space before it: " Paris"
    wrong: str | None = None  # the token that the answer is held against
    pairs: str | None = None  # or many: a CSV or JSON file with the columns clean, corrupt, answer, wrong
    # one path by name, as "L1H3 -> L2H0.k -> logits" or "L1H1 + L1H3 -> L2 MLP": what does it carry, edge by edge?
    path: str | None = None
    metric: Literal["logit_diff", "log_prob", "kl"] = "logit_diff"  # each is written out in pairs.make_metric
    n: Count = 32  # pairs to find the circuit on
    held_out: Count = 100  # pairs to test it on
    # what goes back from the logits and tells roles: path_patch sends along residual connections and MLPs (Wang et al.
    # 2023), edge_patch along single edges
    trace_by: Literal["path_patch", "edge_patch"] = "path_patch"
    # whose strongest edges become the circuit; EAP-IG on activations takes 1 + 2 n_layers times EAP-IG's runs
    rank_by: Literal["EAP-IG", "EAP-IG on activations", "EAP", "magnitude", "random"] = "EAP-IG"
    # what stands outside the circuit: each pair's corrupt run, or the mean over prompts with other names. Wang et al.
    # (2023) put the mean in the place of heads alone; here every edge outside is ablated, the embedding's and MLPs' too
    ablation: Literal["corrupt", "mean"] = "corrupt"
    ig_steps: Count = 5  # runs between corrupt and clean embeddings (EAP-IG)
    export: str | None = None  # write all scores and the circuit here, as JSON that EAP-IG's and MIB's code reads
    memory_gb: Positive = 1.0  # cap on activations
    wandb: bool = False  # numbers and figures go to Weights & Biases too
    seed: Natural = 0  # of every draw
    dtype: DtypeName = "auto"  # of the weights; auto: bfloat16 on a GPU that has it, else float32
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


cfg = flags(Config, __doc__, hpc=Config(model="gpt2", bos=True, n=256, held_out=500, memory_gb=24.0))
if cfg.metric == "kl" and cfg.rank_by == "EAP":
    fail("--metric kl --rank-by EAP: in the clean run kl's gradient is 0, so EAP has no ranking; take EAP-IG")
device = pick_device(cfg.device)
set_seed(cfg.seed)

#%% The model and the prompts: pairs that differ in one thing, some to find the circuit on, others to test it on
cfg.model = on_base(cfg.model, cfg.base)
model = open_model(cfg.model, (Llama,), device, cfg.dtype, bos=cfg.bos).requires_grad_(False)
if not has_qkv(model):
    fail(
        "paths need queries, keys and values by head, and this model (streamed, without attention, or with DeepSeek's "
        "compressed one) has none: patching.py takes it"
    )
keep_freed_memory()
if about_norms(model):
    print(f"{gray}{about_norms(model)}{endc}")
task, pairs, test_pairs = read_task(model, cfg)
few = pairs.take(slice(0, None, max(1, len(pairs) // 16)))  # for what patches paths one by one
graph = Graph(model)
chain = read_chain(graph, cfg.path) if cfg.path is not None else None
metric = cfg.metric
about = f"{task}, {Path(cfg.model).name}, {metric}"
units = UNITS[metric]
layers = [f"L{layer}" for layer in range(graph.n_layers)]
heads = [f"H{head}" for head in range(graph.n_heads)]
numbers = {}


def in_interval(draws: Tensor, sign: str = "") -> str:
    value, low, high = interval(draws)
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


shown = pairs.take(slice(len(pairs) // 2, len(pairs) // 2 + 1))
tokenizer = text_tokenizer(model)
print(f"{purple}=== {about}: {len(pairs)} pairs, {len(test_pairs)} held out ==={endc}")
print(f"{gray}clean   {text_of(tokenizer, shown.clean[0].tolist())}")
print(f"corrupt {text_of(tokenizer, shown.corrupt[0].tolist())}")
answer, wrong = (token_text(model, int(ids)) for ids in (shown.answer, shown.wrong))
print(f"answer  {answer!r}, wrong {wrong!r}; {about_bos(model)}{endc}")

#%% Baselines and gates: no edge patched changes nothing, every edge patched is the corrupt run, the writes add up
clean, corrupt = baselines(model, pairs, metric, cfg.memory_gb)
test_clean, test_corrupt = baselines(model, test_pairs, metric, cfg.memory_gb)
few_clean, few_corrupt = baselines(model, few, metric, cfg.memory_gb)
gap = require_gap(clean, corrupt)  # figures show shares of it
few_gap = require_gap(few_clean, few_corrupt)

of_sweeps = sweep_gates(model, few, metric, cfg.memory_gb)
scale = 0.01 + (few_clean - few_corrupt).abs().max()
no_and_every_edge = t.stack([~graph.is_edge, graph.is_edge])
none_patched, all_patched = edge_patch(model, graph, few, no_and_every_edge, metric, cfg.memory_gb)
writes_gap, magnitude = write_differences(model, graph, few, cfg.memory_gb)
of_edges = {
    "no_edge_patched": ((none_patched - few_clean).abs().max() / scale).item(),
    "every_edge_patched": ((all_patched - few_corrupt).abs().max() / scale).item(),
    "writes_add_up": writes_gap,
}
gates = of_sweeps | of_edges
numbers |= {"clean": clean.mean().item(), "corrupt": corrupt.mean().item(), "gates": gates}

print(
    f"{cyan}clean {clean.mean():.3f}, corrupt {corrupt.mean():.3f} (held out {test_clean.mean():.3f}, "
    f"{test_corrupt.mean():.3f}) {units}; gates: {in_words(gates)}{endc}"
)
missed = missed_gates(of_sweeps, model)
if missed:
    fail(f"gate: {missed[0]} misses; sweeps of this model cannot be believed")
missed = missed_gates(of_edges, model)
if missed:
    rounded = "" if model.W_U.dtype == t.float32 else f" in {model.W_U.dtype} (--dtype float32 adds up better)"
    print(
        f"{yellow}gate: {missed[0]} misses: the writes of this model do not add up to its stream{rounded}, "
        f"so paths and circuits are left out{endc}"
    )
    save_results("circuits", cfg, **numbers)
    raise SystemExit

#%% Backwards from the logits: which writers reach them directly, and what reaches those
PATHS = {
    "path_patch": "path patching (Wang et al. 2023: direct paths run through MLPs, not through heads)",
    "edge_patch": "edge patching (the edge from a writer to an input, and no other path)",
}
print(f"{purple}=== Backwards from the logits by {PATHS[cfg.trace_by]} ==={endc}")
steps = trace_back(model, graph, few, metric, cfg.memory_gb, by=cfg.trace_by)
paths = {" ".join(to): lost for to, lost in steps}
numbers["paths"] = {title: dict(zip(graph.writers, lost.tolist())) for title, lost in paths.items()}
for title, lost in paths.items():
    strongest = lost.abs().topk(4).indices.tolist()
    print(f"{gray}into {title}: {cyan}{', '.join(f'{graph.writers[i]} {lost[i]:+.2f}' for i in strongest)}{endc}")

#%% ... and by how much the two ways differ for the heads that reach the logits most
by_direct_effect = sorted(graph.head_names, key=lambda head: -paths["logits"][graph.writers.index(head)])
numbers["direct_effects"] = {}
for by in PATHS:
    lost = path_losses(model, graph, few, ["logits"], metric, cfg.memory_gb, by).mean(1) / few_gap
    numbers["direct_effects"][by] = {head: lost[graph.writers.index(head)].item() for head in by_direct_effect[:6]}
table = [[head, *(effects[head] for effects in numbers["direct_effects"].values())] for head in by_direct_effect[:6]]
print(tabulate(table, headers=["lost to the logits by", "path patching", "edge patching"], floatfmt=".3f"))

#%% ... as a map of writers and the inputs they reach
fig = imshow(
    t.stack(list(paths.values())),
    title=(
        f"Who reaches whom, back from the logits (n = {len(few)}, {about}; metric lost when a writer's corrupt output "
        f"reaches these inputs, by {PATHS[cfg.trace_by]})"
    ),
    xlabel="writer",
    ylabel="inputs",
    x=graph.writers,
    y=list(paths),
    value="share lost",
    meaning={0: "clean", 1: "corrupt"},
)
show(
    fig,
    "circuits/paths",
    "From the top: what reaches the logits, then what reaches the inputs of the strongest of those writers, and so on. "
    "Blue: the answer needs this path; red: the path works against it.",
)


#%% One path by name (--path): what it alone carries on held-out pairs, and what path patching sends to its first reader
def lost_share(patch: Callable[[Pairs], Tensor]) -> Tensor:
    """(1 + draws): share of the metric lost by a patch, on the held-out pairs and on pairs drawn from them."""
    at_once = pairs_that_fit(model, graph, test_pairs, cfg.memory_gb)
    patched = t.cat(by_groups(patch, test_pairs, at_once))
    return 1 - resampled_faithfulness(patched[None], test_clean, test_corrupt)[:, 0]


if chain:
    title = chain_name(chain)
    senders, first_readers = writers_of(chain[0]), inputs_of(chain[1])
    by_chain = lost_share(lambda group: chain_patch(model, graph, group, chain, metric))
    by_paths = lost_share(lambda group: path_patch(model, graph, group, senders, first_readers, metric))
    numbers["path"] = {
        "path": title,
        "share_lost": interval(by_chain),
        "share_lost_by_path_patching_to_first_reader": interval(by_paths),
    }
    print(f"{purple}=== One path, {len(test_pairs)} held-out pairs, share of the metric lost (95%) ==={endc}")
    print(f"{cyan}{title}: {in_interval(by_chain, sign='+')}{endc} (edge by edge, all else clean)")
    of_paper = f"path patching (Wang et al. 2023) from {' + '.join(senders)} to {' + '.join(first_readers)}"
    if (by_chain - by_paths).abs().max() < 1e-4:
        print(f"{gray}{of_paper} gives the same{endc}")
    else:
        share = in_interval(by_paths, sign="+")
        print(f"{cyan}{of_paper}: {share}{endc} (also through the MLPs between, and along all paths after)")

#%% Self-repair: what the strongest heads do directly, and who steps in when they fail
repairs = []
for head in by_direct_effect[:4]:
    repair = self_repair(model, graph, few, head, metric, cfg.memory_gb)
    helpers = [i for i in repair.change.topk(2).indices.tolist() if repair.change[i] > 0.05]
    steps_in = ", ".join(f"{graph.writers[i]} {repair.change[i]:+.2f}" for i in helpers)
    repairs.append([head, repair.lost_directly, repair.lost_in_all, steps_in])
numbers["self_repair"] = repairs
headers = [
    "set to its mean",
    f"lost by its edge to logits ({units})",
    f"lost in all ({units})",
    "steps in (direct effect, logits)",
]
print(tabulate(repairs, headers=headers, floatfmt=".2f"))

#%% Indirect objects: which roles of GPT-2's circuit exist in this model: heads that look where the role looks, more than
# at random keys and more than at another token of the kind (another name), and that act as it acts
is_ioi = {"IO", "S1", "S1+1", "S2"} <= test_pairs.places.keys()
has_roles = is_ioi and metric != "kl"
if is_ioi and not has_roles:
    print(f"{gray}roles are left out: they help the answer or hurt it, and kl has no sign{endc}")
if has_roles:
    roles = find_roles(model, graph, test_pairs, metric, cfg.memory_gb, by=cfg.trace_by)
    numbers |= {
        "roles": roles.found,
        "role_bars": roles.bars,
        "role_scores": {role: score.tolist() for role, score in roles.scores.items()},
        "role_attention_elsewhere": {role: score.tolist() for role, score in roles.elsewhere.items()},
    }
    headers = ["role", "heads", "most attention", "random keys, 99%", "the same head elsewhere, 99%"]
    is_gpt2 = Path(cfg.model).name in ("gpt2", "gpt2-small")
    if is_gpt2:
        headers.append("Wang et al. (2023)")
    table = []
    for role, score in roles.scores.items():
        best = int(score.argmax())
        most = f"{graph.head_names[best]} {score.max():.2f}"
        row = [
            role,
            " ".join(roles.found[role]) or "none",
            most,
            roles.bars[role],
            roles.elsewhere[role].flatten()[best],
        ]
        table.append([*row, WANG[role]] if is_gpt2 else row)
    print(tabulate(table, headers=headers, floatfmt=".2f", maxheadercolwidths=16))

#%% ... as maps of the attention by which a role is known
if has_roles:
    bars = ", ".join(f"{role} {bar:.2f}" for role, bar in roles.bars.items())
    fig = imshow(
        t.stack(list(roles.scores.values())),
        title=f"Which heads look where a role of GPT-2's circuit looks (n = {len(test_pairs)} held-out pairs, {about}; more than random keys only above: {bars})",
        xlabel="head",
        ylabel="layer",
        x=heads,
        y=layers,
        panels=list(roles.scores),
        columns=3,
        diverging=False,
        value="attention",
    )
    show(
        fig,
        "circuits/roles",
        "Attention from the role's token to the token by which the role is known. A head has the role only if it also acts "
        "as the role acts: the table above names those.",
    )

#%% Edges: attribution by gradient (EAP) and along a path of gradients (EAP-IG), against the truth
print(f"{purple}=== Edges and circuits ==={endc}")
n_edges = int(graph.is_edge.sum())
start = time.perf_counter()
ranking = {"EAP-IG": eap_ig(model, graph, pairs, metric, cfg.ig_steps, cfg.memory_gb)}
numbers["edge_attribution_seconds"] = time.perf_counter() - start
ranking["EAP"] = eap(model, graph, pairs, metric, cfg.memory_gb)
if metric == "kl":
    print(f"{yellow}kl is least in the clean run, where its gradient is 0: EAP ranks by rounding{endc}")
if cfg.rank_by == "EAP-IG on activations":
    ranking[cfg.rank_by] = eap_ig_activations(model, graph, pairs, metric, cfg.ig_steps, cfg.memory_gb)
ranking["magnitude"] = magnitude[:, None].expand(graph.is_edge.shape)
ranking["random"] = t.rand(graph.is_edge.shape)

picked = top_edges(graph, t.rand(graph.is_edge.shape), [500])[0].nonzero()  # at most 500 are patched one by one
writer, receiver = picked.unbind(1)
single = t.zeros(len(picked), *graph.is_edge.shape, dtype=t.bool)
single[range(len(picked)), writer, receiver] = True
lost_by_patching = (few_clean - edge_patch(model, graph, few, single, metric, cfg.memory_gb)).mean(-1).cpu()
estimates = {
    "EAP-IG": eap_ig(model, graph, few, metric, cfg.ig_steps, cfg.memory_gb)[writer, receiver],
    "EAP": eap(model, graph, few, metric, cfg.memory_gb)[writer, receiver],
}
# a weak edge patched alone follows the clean run's gradient (EAP); along a strong one it changes, which EAP-IG averages
top = max(1, len(picked) // 20)
agree = {method: agreement(lost_by_patching, estimated, top) for method, estimated in estimates.items()}
numbers |= {
    "attribution_agreement": {method: found._asdict() for method, found in agree.items()},
    "node_attribution": dict(zip(graph.writers, ranking["EAP-IG"].sum(1).tolist())),
}
print(
    f"{cyan}{n_edges} edges attributed in {numbers['edge_attribution_seconds']:.1f} s (EAP-IG, {cfg.ig_steps} steps, "
    f"{len(pairs)} pairs){endc}"
)
headers = [f"against {len(picked)} edges patched", "Pearson", "Spearman", f"top {top} shared", "same sign"]
print(tabulate([[method, *found] for method, found in agree.items()], headers=headers, floatfmt=".2f"))


def nearer(measure: str) -> str:
    """The method that is nearer to patching by a measure of agreement."""
    by_ig, by_eap = (round(getattr(agree[method], measure), 2) for method in ("EAP-IG", "EAP"))
    if by_ig == by_eap:
        return "both alike"
    return "EAP-IG" if by_ig > by_eap else "EAP"


print(
    f"{cyan}Nearer to patching in the sizes of the strong edges (Pearson): {nearer('pearson')}; in which edges are "
    f"strongest (top {top}): {nearer('top')}; in the order of all, most of them near 0 (Spearman): "
    f"{nearer('spearman')}; in signs: {nearer('sign')}. A circuit is made of the strong ones.{endc}"
)

#%% ... as a scatter of edges: lost by patching, and estimated
edge_names = [f"{graph.writers[w]} to {graph.receiver_names[r]}" for w, r in picked.tolist()]
fig = go.Figure()
for method, estimated in estimates.items():
    fig.add_trace(
        go.Scatter(
            x=signed_log(lost_by_patching / few_gap),
            y=signed_log(estimated / few_gap),
            mode="markers",
            name=f"{method}, correlation {agree[method].pearson:.2f}",
            text=edge_names,
            customdata=t.stack([lost_by_patching / few_gap, estimated / few_gap], 1).tolist(),
            hovertemplate="%{text}<br>patched %{customdata[0]:.4f}<br>estimated %{customdata[1]:.4f}<extra></extra>",
        )
    )
fig.add_trace(go.Scatter(x=[-1, 4], y=[-1, 4], mode="lines", name="equal", line={"dash": "dash", "color": "#999"}))
fig.update_layout(
    title=(
        f"Does the gradient find the edges that patching finds? (share of the metric that an edge loses, {len(picked)} of "
        f"{n_edges} edges, n = {len(few)}, {about})"
    ),
    xaxis={"title": "share lost by patching the edge (signed logarithm)", **signed_log_ticks()},
    yaxis={"title": "share estimated (signed logarithm)", **signed_log_ticks()},
)
show(
    fig,
    "circuits/attribution",
    "Each dot is an edge; on the dashed line the estimate is exact. 0 = clean, 1 = corrupt.",
)

#%% The circuit: the fewest edges that keep 90% of the metric, found on some pairs
mean_writes, mean_words = mean_of_reference(model, graph, pairs, cfg.memory_gb)
ABLATIONS = {"corrupt": corrupt_writes, "mean": mean_writes}
OUTSIDE = {"corrupt": "the pair's corrupt run (swap)", "mean": mean_words}
ablation = ABLATIONS[cfg.ablation]
score = ranking[cfg.rank_by]
circuit = smallest_circuit(model, graph, pairs, score, metric, 0.9, cfg.memory_gb, ablation)
circuit_size = int(circuit.sum())

#%% ... tested on others, beside all other edges and random circuits of its size, with either ablation, in both units
rivals = [top_edges(graph, t.rand(graph.is_edge.shape), [circuit_size])[0] for _ in range(10)]
tested = t.stack([circuit, t.zeros_like(circuit), ~circuit, *rivals])
faithfulness_by_ablation = {}
table = []
for how, words in OUTSIDE.items():
    values = circuit_metric(model, graph, test_pairs, tested, metric, cfg.memory_gb, ABLATIONS[how])
    of_circuit, all_ablated, of_others = values[:3]
    kept = normalised(of_circuit, test_clean, all_ablated).item()
    complement = normalised(of_others, test_clean, all_ablated).item()
    by_chance = normalised(values[3:], test_clean, all_ablated)
    over_clean = (of_circuit.mean() / test_clean.mean()).item() if metric == "logit_diff" else None
    faithfulness_by_ablation[how] = {
        "normalised": kept,  # 0 = all edges ablated, 1 = none
        "circuit_over_clean": over_clean,  # Wang et al.'s unit, of logit differences
        "all_ablated": all_ablated.mean().item(),
        "circuit_complement": complement,
        "random_circuit": by_chance.mean().item(),
        "random_circuit_max": by_chance.max().item(),
    }
    in_wangs_unit = "-" if over_clean is None else over_clean
    table.append([words, all_ablated.mean().item(), kept, in_wangs_unit, complement, by_chance.mean().item()])
headers = [
    "outside the circuit",
    f"all ablated ({units})",
    "(circuit - all ablated) / (clean - all ablated)",
    "circuit / clean",
    "the other edges",
    "as many at random",
]
print(f"{circuit_size} of {n_edges} edges, found with the ablation {OUTSIDE[cfg.ablation]}:")
print(tabulate(table, headers=headers, floatfmt=".2f", maxheadercolwidths=20, maxcolwidths=40))
tested_as_found = faithfulness_by_ablation[cfg.ablation]
faithfulness = tested_as_found["normalised"]
numbers |= {
    "circuit_faithfulness": faithfulness,
    "circuit_edges": circuit_size,
    "circuit_edges_total": n_edges,
    "faithfulness_by_ablation": faithfulness_by_ablation,
    "circuit": graph.edge_names(circuit),
}

#%% Which ranking is best? Faithfulness over the edges kept, on the held-out pairs
shares_between = [0.003, 0.007, 0.014, 0.03, 0.07, 0.14, 0.3, 0.7]  # and MIB's
sizes = sorted({int(share * n_edges) for share in [*MIB_SHARES, *shares_between]} | {0, 1})
ladders = {method: top_edges(graph, score, sizes) for method, score in ranking.items()}
completeness = f"all but the {cfg.rank_by} edges (completeness)"
curves = {}  # (1 + draws, size), the first row on the pairs themselves
for method, circuits in [*ladders.items(), (completeness, ~ladders[cfg.rank_by])]:
    values = circuit_metric(model, graph, test_pairs, circuits, metric, cfg.memory_gb, ablation)
    all_ablated = values[-1] if method == completeness else values[0]
    curves[method] = resampled_faithfulness(values, test_clean, all_ablated)

at_mib_shares = [sizes.index(int(share * n_edges)) for share in MIB_SHARES]
measures = {}
for method in ranking:
    measures[method] = {
        "CPR": cpr(curves[method][:, at_mib_shares], list(MIB_SHARES)),
        "CMD": cmd(curves[method][:, at_mib_shares], list(MIB_SHARES)),
        "log_area": log_area(curves[method][:, 1:], sizes[1:]),
    }
table = []
numbers["rankings"] = {}
for method, drawn in measures.items():
    numbers["rankings"][method] = {name: interval(values) for name, values in drawn.items()}
    row = [method, *(in_interval(values) for values in drawn.values())]
    if method == "EAP-IG":
        row += ["", ""]
    else:
        ahead = {f"{name}_behind_eap_ig": measures["EAP-IG"][name] - drawn[name] for name in ("CPR", "log_area")}
        numbers["rankings"][method] |= {name: interval(values) for name, values in ahead.items()}
        row += [in_interval(values, sign="+") for values in ahead.values()]
    table.append(row)
headers = [
    "edges ranked by",
    "CPR (1 is best)",
    "CMD (0 is best)",
    "area over log edges",
    "EAP-IG ahead, CPR",
    "EAP-IG ahead, log area",
]
print(tabulate(table, headers=headers, maxheadercolwidths=14))
print(
    f"{gray}CPR, CMD: Mueller et al. 2025 (MIB); in brackets 95% over {len(test_pairs)} pairs, drawn alike for all{endc}"
)

#%% ... as curves of what is kept against edges kept
fig = line(
    {method: curve[0, 1:] for method, curve in curves.items()},
    title=(
        f"How few edges suffice, by the ranking that chose them (n = {len(test_pairs)} held-out pairs, {about}; outside: "
        f"{OUTSIDE[cfg.ablation]}; 0 = all edges ablated, 1 = none)"
    ),
    xlabel="edges kept",
    ylabel="share of the metric kept",
    x=sizes[1:],
    markers=True,
    logx=True,
    dashed=["magnitude", "random", completeness],
)
show(
    fig,
    "circuits/faithfulness",
    "The farther left a curve rises, the better its ranking. Dashed: what the rankings must beat, and the model without the "
    "circuit, which must stay low.",
)

#%% ... and drawn edge by edge
EDGE_COLORS = {"q": "#0072B2", "k": "#D55E00", "v": "#009E73", "MLP": "#CC79A7", "logits": "#000000"}


def node_coordinates(graph: Graph) -> dict[str, tuple[float, float]]:
    """
    (x, y) of the embedding, every head, every MLP and the logits: two units of height per layer, the MLP in the upper
    one.
    """
    n_heads = graph.n_heads
    coordinates = {"embed": (n_heads / 2, -1.0), "logits": (n_heads / 2, 2.0 * graph.n_layers)}
    for layer in range(graph.n_layers):
        for head in range(n_heads):
            coordinates[f"L{layer}H{head}"] = (float(head), 2.0 * layer)
        coordinates[f"L{layer} MLP"] = (n_heads + 0.5, 2.0 * layer + 1)
    return coordinates


def circuit_page(graph: Graph, kept: Tensor, score: Tensor, title: str, about: str) -> str:
    """The edges kept (writer, receiver) with their scores, as a page on which a node's edges stand out when it is hovered."""
    coordinates = node_coordinates(graph)
    edges = []
    for w, r in kept.nonzero().tolist():
        for receiving_node in graph.fed_by(r):  # several where heads share keys and values
            edges.append(
                {
                    "from": graph.writers[w],
                    "to": receiving_node,
                    "input": graph.receivers[r].input,
                    "score": score[w, r].item(),
                }
            )
    data = {
        "about": about,
        "layers": [f"L{layer}" for layer in range(graph.n_layers)],
        "nodes": [{"name": name, "x": x, "y": y} for name, (x, y) in coordinates.items()],
        "edges": sorted(edges, key=lambda edge: -abs(edge["score"])),
        "colors": EDGE_COLORS,
    }
    return fill_page("circuit", title, data)


title = f"The circuit: {circuit_size} of {n_edges} edges keep {faithfulness:z.0%} of the way to the clean run"
about_circuit = (
    f"{about}; found on {len(pairs)} pairs by {cfg.rank_by}, tested on {len(test_pairs)} held-out pairs. Layers go upward, "
    "heads sideways, MLPs stand at the right. Hover a node to see its edges alone, click to hold them."
)
if cfg.rank_by.startswith("EAP"):
    score = score / gap  # what an edge carries, as a share of the metric
show_page(
    circuit_page(graph, circuit, score, title, about_circuit),
    "circuits/circuit",
    "An edge's colour is the input that it enters, its width how much of the metric it carries.",
)

#%% The numbers for machines, and the conclusion
save_results("circuits", cfg, **numbers)
if cfg.export:
    Path(cfg.export).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.export).write_text(json.dumps(mib_graph(model, graph, ranking[cfg.rank_by], circuit)))
    print(f"{gray}scores and circuit: {cfg.export}{endc}")
if has_roles:
    have = "; ".join(f"{role} {' '.join(names)}" for role, names in roles.found.items() if names) or "none"
    lack = ", ".join(role for role, names in roles.found.items() if not names) or "missing"
    print(f"{green}Of the roles in GPT-2's circuit this model has {have}; none is {lack}.{endc}")
ahead, low, high = numbers["rankings"]["EAP"]["log_area_behind_eap_ig"]
ranked = "EAP and EAP-IG rank edges alike, within the interval of their difference"
if len(test_pairs) > 1 and (low > 0 or high < 0):
    ranked = f"{'EAP-IG' if low > 0 else 'EAP'} ranks edges better"
inside = " ".join(name for i, name in enumerate(graph.writers) if circuit[i].any())
over_clean = ""
if metric == "logit_diff":
    over_clean = f" ({tested_as_found['circuit_over_clean']:z.0%} of the clean logit difference, Wang et al.'s unit)"
print(
    f"{green}{circuit_size} of {n_edges} edges ({circuit_size / n_edges:.0%}; {inside}) keep {faithfulness:z.0%} of the "
    f"way from all ablated to clean{over_clean} on {len(test_pairs)} held-out pairs, outside them "
    f"{OUTSIDE[cfg.ablation]}; as many random edges {tested_as_found['random_circuit']:z.0%}, all the others "
    f"{tested_as_found['circuit_complement']:z.0%}; {ranked} (area over log edges {ahead:+.3f}, {low:+.3f} to "
    f"{high:+.3f}). Gates: the worst misses by {max(gates.values()):.0e}.{endc}"
)
