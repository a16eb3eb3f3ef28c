"""
Path patching: the corrupt run sent along chosen paths (direct ones run through MLPs), one path by name (chain
patching), the search backwards from the logits, and self-repair. path_patch is the plain form, path_patch_all and
PathRun the fast one, on graph.EdgeRun.
"""

from functools import partial
from typing import Literal, NamedTuple

from utils import fail  # first: sets OpenMP's variables before torch is loaded
from hooks import Cache, act_name, in_batches, run_from
from logit_attribution import folded_W_U
from pairs import Pairs, baselines, by_groups, inputs, make_metric, require_gap
from graph import EdgeRun, Graph, GraphRun, InputChange, edge_patch, head_writes, pairs_that_fit, run_graph

import torch as t
import torch.nn as nn
from einops import einsum
from torch import Tensor


#%% Plain form of path patching: one sender, any receivers
def keep_activation(kept: Cache, name: str, x: Tensor, hook: nn.Module) -> None:
    kept[name] = x


def put_activation(new: Tensor, heads: list[int], x: Tensor, hook: nn.Module) -> Tensor:
    """new in the place of x; where heads are named, of these heads alone (row, pos, head, d_head)."""
    if not heads:
        return new
    changed = x.clone()
    changed[:, :, heads] = new[:, :, heads]
    return changed


@t.no_grad()
def path_patch(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    sender: str | list[str],
    receivers: list[str],
    metric: str = "logit_diff",
    mlps: Literal["free", "frozen"] = "free",
) -> Tensor:
    """
    Metric (pair) of clean runs in which the receivers read what reaches them when the sender alone (or several) writes
    what it does in the corrupt run: path patching (Wang et al. 2023, appendix B). A path is direct if no attention head
    stands on it: it runs through residual connections and through the MLPs between ("frozen": through no MLP, so that a
    single receiver reads one edge). What lies after the receivers is computed anew. Plain form of path_patch_all.
    """
    layers = range(graph.n_layers)
    attn_outs = tuple(act_name("attn_out", layer) for layer in layers)

    # Step 1: a clean and a corrupt run
    clean = run_graph(model, graph, pairs, "clean", also=attn_outs)
    corrupt = run_graph(model, graph, pairs, "corrupt")
    resid = clean.cache["resid_pre", 0]

    # Step 2: the clean run with all heads frozen, the sender corrupt and the MLPs recomputed, to see what receivers read
    frozen = {name: clean.cache[name] for name in attn_outs}
    if mlps == "frozen":
        frozen |= {act_name("mlp_out", layer): clean.cache["mlp_out", layer] for layer in layers}
    for writer in [sender] if isinstance(sender, str) else sender:
        w = graph.writers.index(writer)
        written_at = graph.write_hook(writer)
        written = frozen.get(written_at, clean.cache[written_at])
        frozen[written_at] = written + corrupt.writes[:, :, w] - clean.writes[:, :, w]
    read = Cache()
    read_at = graph.read_hooks(receivers)
    fwd_hooks = [(name, partial(keep_activation, read, name)) for name in read_at]  # before it is frozen
    fwd_hooks += [(name, partial(put_activation, value, [])) for name, value in frozen.items()]
    logits = run_from(model, resid, pairs.answer_pos, 0, fwd_hooks)

    # Step 3: the clean run again, the receivers given that, and all else free
    if receivers != ["logits"]:
        fwd_hooks = [(name, partial(put_activation, read[name], heads)) for name, heads in read_at.items()]
        logits = run_from(model, resid, pairs.answer_pos, 0, fwd_hooks)

    # Step 4: the metric
    return make_metric(pairs, metric, clean.logits)(logits, pairs.index)


#%% Chain patching: one path by name, and nothing else carries the corrupt run
class Node(NamedTuple):
    """
    One name on a path. receivers: the inputs at which it reads what comes along. writers: who passes it on. A head
    (L2H0) reads at q, k and v; an input (L2H0.k) alone. Where heads share keys and values, L2H0 and L2H0.k read at
    L2H0-1.k and L2H0 alone passes it on; L2H0-1.k names both. As the last step either changes what both heads read.
    """

    receivers: list[str]
    writers: list[str]


type Chain = list[list[Node]]  # the senders first; what stands together in a step was joined by +


def writers_of(step: list[Node]) -> list[str]:
    return [writer for node in step for writer in node.writers]


def inputs_of(step: list[Node]) -> list[str]:
    """The inputs at which a step reads, each once (heads may share one)."""
    return list(dict.fromkeys(receiver for node in step for receiver in node.receivers))


def chain_name(chain: Chain) -> str:
    """A path as it was understood: the senders, then the inputs at which each step reads."""
    steps = [writers_of(chain[0]), *(inputs_of(step) for step in chain[1:])]
    return " -> ".join(" + ".join(names) for names in steps)


def read_chain(graph: Graph, text: str) -> Chain:
    """'L0H1 + L0H3 -> L1H2.k -> logits' by steps; what the graph does not have ends in one line."""
    steps = [[name.strip() for name in step.split("+")] for step in text.split("->")]
    if len(steps) < 2:
        fail(f'--path "{text}" has one step: a path leads from writers to who reads them, "L0H1 -> L1 MLP -> logits"')
    for name in steps[0]:
        if name not in graph.writers:
            fail(f"--path: nothing named {name!r} writes; writers are {graph.describe_writers()}")
    chain = [[Node([], [name]) for name in steps[0]]]
    for step in steps[1:]:
        nodes = [read_node(graph, name) for name in step]
        require_edges(graph, chain[-1], nodes)
        chain.append(nodes)
    for nodes in chain:
        twice = [writer for writer in writers_of(nodes) if writers_of(nodes).count(writer) > 1]
        if twice:
            fail(f"--path: {twice[0]} stands twice in one step")
    return chain


def read_node(graph: Graph, name: str) -> Node:
    """Who reads under this name: logits, L1 MLP, L2H0, L2H0.k, or of heads that share their keys L2H0-1.k."""
    head, _, input = name.partition(".")
    if head in graph.writers[1:]:
        by_input = [graph.receivers_of([head], one) for one in ([input] if input else ("q", "k", "v", "MLP"))]
        receivers = [receiver for found in by_input for receiver in found]
        if receivers:
            return Node(receivers, [head])
    if name in graph.receiver_names:
        r = graph.receiver_names.index(name)
        fed = [writer for writer in graph.fed_by(r) if writer in graph.writers]  # the logits feed none
        return Node([name], fed)
    fail(
        f"--path: nothing named {name!r} reads; who writes does (but embed), a head by q, k and v or by one of them "
        f"(L0H0.q), and the logits; writers are {graph.describe_writers()}"
    )


def require_edges(graph: Graph, nodes: list[Node], readers: list[Node]) -> None:
    """Each of one step is read by each of the next, or the program ends in a line that says what is read."""
    writers = writers_of(nodes)
    if not writers:
        fail("--path: the logits are the last step of a path, nothing reads them")
    if "logits" in inputs_of(readers) and len(readers) > 1:
        fail("--path: the logits are a step of their own")
    for receiver in inputs_of(readers):
        r = graph.receiver_names.index(receiver)
        for writer in writers:
            if not graph.is_edge[graph.writers.index(writer), r]:
                read = [name for name, on in zip(graph.writers, graph.is_edge[:, r]) if on]
                fail(
                    f"--path: there is no edge from {writer} to {receiver}, which reads what is written before it: "
                    f"{', '.join(read) if len(read) < 10 else f'{read[0]}, {read[1]} ... {read[-1]}'}"
                )


def run_with_changes(
    model: nn.Module, graph: Graph, pairs: Pairs, receivers: list[str], change: Tensor, also: list[tuple] = ()
) -> Tensor:
    """Logits (pair, d_vocab) of clean runs in which these receivers read change (pair, pos, d_model) more."""
    fwd_hooks, module_inputs = list(also), []
    for name in receivers:
        receiver = graph.receivers[graph.receiver_names.index(name)]
        hooks_there, inputs_there = InputChange(model, receiver, change).entries()
        fwd_hooks += hooks_there
        module_inputs += inputs_there
    return run_from(model, inputs(model, pairs, "clean"), pairs.answer_pos, 0, fwd_hooks, module_inputs)


def passed_on(model: nn.Module, graph: Graph, pairs: Pairs, clean: GraphRun, node: Node, change: Tensor) -> Tensor:
    """
    What a node writes more (pair, pos, d_model) when it alone, in a clean run, reads change more; a head after a norm
    after attention (Gemma 2) with the norm's scale in that run.
    """
    kept = Cache()
    layer = graph.writer_layer(node.writers[0])
    names = [act_name("z", layer), act_name("mlp_out", layer)]
    listening = [(name, partial(keep_activation, kept, name)) for name in names]
    run_with_changes(model, graph, pairs, node.receivers, change, listening)
    writes = t.cat([head_writes(model, layer, kept["z", layer]), kept["mlp_out", layer][:, :, None]], 2)
    of_layer = slice(graph.head_slice(layer).start, graph.head_slice(layer).stop + 1)
    more = writes - clean.writes[:, :, of_layer]
    return more[:, :, [graph.writers.index(writer) - of_layer.start for writer in node.writers]].sum(2)


@t.no_grad()
def chain_patch(model: nn.Module, graph: Graph, pairs: Pairs, chain: Chain, metric: str = "logit_diff") -> Tensor:
    """
    Metric (pair) of clean runs in which only what travels along one chain of edges is the corrupt run's: the senders
    write what they do there, each node in turn is computed from what the one before passes on in its place, all else
    clean, and the last one reads that. What lies after the last is computed anew (nothing, where it is the logits).
    A chain of one edge is edge patching; path patching (Wang et al. 2023) goes on along all direct paths at once.
    """
    # Step 1: a clean and a corrupt run, and what the senders write otherwise
    clean = run_graph(model, graph, pairs, "clean")
    corrupt = run_graph(model, graph, pairs, "corrupt")
    senders, *between, last = chain
    from_senders = [graph.writers.index(writer) for writer in writers_of(senders)]
    change = (corrupt.writes - clean.writes)[:, :, from_senders].sum(2)

    # Step 2: hop by hop, what each node writes otherwise when it reads that, each in a clean run of its own
    for nodes in between:
        change = sum(passed_on(model, graph, pairs, clean, node, change) for node in nodes)

    # Step 3: the clean run again, the last ones reading what has come to them
    logits = run_with_changes(model, graph, pairs, inputs_of(last), change)

    # Step 4: the metric
    return make_metric(pairs, metric, clean.logits)(logits, pairs.index)


#%% Path patching of every sender, the fast form
@t.no_grad()
def path_patch_all(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    receivers: list[str],
    metric: str = "logit_diff",
    memory_gb: float = 1.0,
) -> Tensor:
    """Metric (writer, pair): path_patch of each writer as the sender (Wang et al. 2023), the MLPs free."""
    assert receivers == ["logits"] or "logits" not in receivers, "given logits would leave nothing to the others"
    n_pairs = pairs_that_fit(model, graph, pairs, memory_gb)
    patch = partial(patch_paths_of_group, model, graph, receivers, metric, 2 * n_pairs)
    return t.cat(by_groups(patch, pairs, n_pairs), 1)


def patch_paths_of_group(
    model: nn.Module, graph: Graph, receivers: list[str], metric: str, n_rows: int, group: Pairs
) -> Tensor:
    """path_patch_all of pairs that fit into memory at once: senders that write at one hook share a batch."""
    attn_outs = tuple(act_name("attn_out", layer) for layer in range(graph.n_layers))
    clean = run_graph(model, graph, group, "clean", also=attn_outs)
    corrupt = run_graph(model, graph, group, "corrupt")
    metric_fn = make_metric(group, metric, clean.logits)

    def patch_rows(written_at: str, rows: Tensor) -> Tensor:
        sender, pair = rows.unbind(1)
        change = corrupt.writes[pair, :, sender] - clean.writes[pair, :, sender]
        run = PathRun(model, graph, clean.cache, receivers, pair, group.answer_pos[pair])
        return metric_fn(run.run(written_at, change), pair)

    # to begin with as if nothing were sent, which holds where no direct path leads from the sender to a receiver
    values = metric_fn(clean.logits, group.index).repeat(len(graph.writers), 1)
    sends = graph.edges(graph.writers, receivers).any(1)
    for written_at, writers in graph.writers_at().items():
        senders = [w for w in writers if sends[w]]
        if not senders:
            continue
        rows = t.cartesian_prod(t.tensor(senders, device=group.index.device), group.index)  # (sender, pair)
        values[rows.unbind(1)] = t.cat(list(in_batches(partial(patch_rows, written_at), rows, n_rows, "paths")))
    return values


class PathRun:
    """
    Steps 2 and 3 of path_patch in rows that are runs of these pairs (row), each with its own sender. The run with
    frozen heads enters at the layer where they write, the run with patched receivers at the first receiver's: below,
    both are the clean run, whose activations cache holds.
    """

    def __init__(
        self, model: nn.Module, graph: Graph, cache: Cache, receivers: list[str], pair: Tensor, answer_pos: Tensor
    ):
        self.model = model
        self.graph = graph
        self.cache = cache
        self.pair = pair
        self.answer_pos = answer_pos
        self.read_at = graph.read_hooks(receivers)
        self.read = Cache()

    def run(self, written_at: str, change: Tensor) -> Tensor:
        """Logits (row, d_vocab), what is written at this hook having changed by change (row, pos, d_model)."""
        logits = self.frozen_run(written_at, change)
        return self.patched_run() if self.read_at else logits  # who reads at no hook is the logits

    def frozen_run(self, written_at: str, change: Tensor) -> Tensor:
        first = layer_of(written_at)
        frozen = {}
        for layer in range(first, self.graph.n_layers):
            name = act_name("attn_out", layer)
            frozen[name] = self.cache[name][self.pair]
        frozen[written_at] = self.cache[written_at][self.pair] + change
        fwd_hooks = [
            (name, partial(keep_activation, self.read, name)) for name in self.read_at if layer_of(name) >= first
        ]
        fwd_hooks += [(name, partial(put_activation, value, [])) for name, value in frozen.items()]
        return self.run_from(first, fwd_hooks)

    def patched_run(self) -> Tensor:
        fwd_hooks = [
            (name, partial(put_activation, self.read[name], heads))
            for name, heads in self.read_at.items()
            if name in self.read  # else no path leads there: it is read as in the clean run
        ]
        return self.run_from(min(map(layer_of, self.read)), fwd_hooks)

    def run_from(self, layer: int, fwd_hooks: list[tuple]) -> Tensor:
        resid = self.cache["resid_pre", layer][self.pair]
        return run_from(self.model, resid, self.answer_pos, layer, fwd_hooks)


def layer_of(hook_name: str) -> int:
    """blocks.3.attn.hook_q: 3"""
    return int(hook_name.split(".")[1])


#%% Backwards from the logits by path patching
type TraceBy = Literal["path_patch", "edge_patch"]


def path_losses(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    receivers: list[str],
    metric: str,
    memory_gb: float = 1.0,
    by: TraceBy = "path_patch",
) -> Tensor:
    """
    (writer, pair) metric lost when one writer's corrupt write reaches the receivers: along all direct paths, which run
    through MLPs (path_patch, Wang et al. 2023), or along the edges to them alone (edge_patch).
    """
    clean, _ = baselines(model, pairs, metric, memory_gb)
    if by == "path_patch":
        patched = path_patch_all(model, graph, pairs, receivers, metric, memory_gb)
    else:
        swaps = t.stack([graph.edges([writer], receivers) for writer in graph.writers])
        patched = edge_patch(model, graph, pairs, swaps, metric, memory_gb)
    return (clean - patched).cpu()


def trace_back(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    metric: str,
    memory_gb: float = 1.0,
    max_steps: int = 16,
    floor: float = 0.05,
    width: int = 3,
    by: TraceBy = "path_patch",
) -> list[tuple[list[str], Tensor]]:
    """
    Steps (receivers, lost (writer)): the share of the metric lost along the direct paths from each writer to the
    receivers, which are named (see path_losses). First the logits; then, again and again, the inputs (q, k, v, MLP: a
    step each) of the writers that lost most (at most `width`, at least `floor`) in the last round's strongest step,
    until max_steps are done (Wang et al. 2023).
    """
    gap = require_gap(*baselines(model, pairs, metric, memory_gb))
    steps = []
    options = [["logits"]]
    while options and len(steps) < max_steps:
        new = []
        for receivers in options:
            lost = path_losses(model, graph, pairs, receivers, metric, memory_gb, by).mean(1) / gap
            new.append((receivers, lost))
        steps += new
        most = max((lost for _, lost in new), key=lambda lost: lost.max())
        options = inputs_of_strongest(graph, most, floor, width)
    return steps


def inputs_of_strongest(graph: Graph, lost: Tensor, floor: float, width: int) -> list[list[str]]:
    """The inputs (q, k, v, MLP) of the writers (but the embedding, which has none) that lost most."""
    strongest = [i for i in lost.topk(width).indices.tolist() if lost[i] >= floor and i > 0]
    if not strongest:
        return []
    names = [graph.writers[i] for i in strongest]
    by_input = [graph.receivers_of(names, input) for input in ("q", "k", "v", "MLP")]
    return [receivers for receivers in by_input if receivers]


#%% Self-repair: what a head does directly, and who steps in when it fails
class SelfRepair(NamedTuple):
    """
    Metric lost by the edge to the logits alone, and by all paths; the change of every writer's direct effect
    (writer), in logits of answer - wrong.
    """

    lost_directly: float
    lost_in_all: float
    change: Tensor


@t.no_grad()
def self_repair(
    model: nn.Module, graph: Graph, pairs: Pairs, head: str, metric: str, memory_gb: float = 1.0
) -> SelfRepair:
    """
    A head's write is set to its mean over pairs and positions: first where the logits read it, then where anyone does
    (McGrath et al. 2023).
    """
    n_pairs = pairs_that_fit(model, graph, pairs, memory_gb)
    mean = mean_write(model, graph, pairs, head, n_pairs)
    parts = by_groups(partial(replace_write, model, graph, head, mean, metric), pairs, n_pairs)
    losses, changes = zip(*parts)
    lost_directly, lost_in_all = (sum(losses) / len(pairs)).tolist()
    return SelfRepair(lost_directly, lost_in_all, (sum(changes) / len(pairs)).cpu())


def mean_write(model: nn.Module, graph: Graph, pairs: Pairs, head: str, n_pairs: int) -> Tensor:
    """Mean (d_model) of a head's write over pairs and positions up to the answer's."""
    writer = graph.writers.index(head)

    def written(group: Pairs) -> tuple[Tensor, int]:
        own = run_graph(model, graph, group, "clean").writes[:, :, writer]
        position = t.arange(group.clean.shape[1], device=group.answer_pos.device)
        real = position <= group.answer_pos[:, None]
        return own[real].sum(0), int(real.sum())

    sums, counts = zip(*by_groups(written, pairs, n_pairs))
    return sum(sums) / sum(counts)


def replace_write(
    model: nn.Module, graph: Graph, head: str, mean: Tensor, metric: str, group: Pairs
) -> tuple[Tensor, Tensor]:
    """
    Metric lost (2: by the edge to the logits, by all paths) and change of direct effects (writer), summed over pairs,
    when a head writes `mean`.
    """
    clean = run_graph(model, graph, group, "clean", also=("ln_final.hook_scale",))
    metric_fn = make_metric(group, metric, clean.logits)
    other = clean.writes.clone()
    other[:, :, graph.writers.index(head)] = mean

    def fail_head(receivers: list[str] | None) -> tuple[Tensor, Tensor]:
        """Metric lost, and what all writers write at the answer's position (pair, writer, d_model)."""
        swap = graph.edges([head], receivers).to(other.device).expand(len(group), -1, -1)
        run = EdgeRun(model, graph, swap, other)
        logits = run.run(clean.cache["resid_pre", 0], group.answer_pos)
        lost = (metric_fn(clean.logits, group.index) - metric_fn(logits, group.index)).sum()
        return lost, (other - t.cat(run.gaps, 2))[group.index, group.answer_pos]

    lost_directly, _ = fail_head(["logits"])
    lost_in_all, writes = fail_head(None)
    scale = clean.cache["ln_final.hook_scale"][group.index, group.answer_pos]
    change = (writes - clean.writes[group.index, group.answer_pos]).float() / scale[:, None]
    toward_answer = folded_W_U(model, group.answer) - folded_W_U(model, group.wrong)
    effects = einsum(change, toward_answer, "pair writer d_model, d_model pair -> writer")
    return t.stack([lost_directly, lost_in_all]), effects
