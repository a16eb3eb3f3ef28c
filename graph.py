"""
The graph of writes and reads: path patching (direct paths run through MLPs), edge patching (one edge alone), chain
patching (one path of several edges, by name), edge attribution (EAP, EAP-IG), circuits, roles. The plain forms, one
sender, edge or receiver at a time, stand before the fast engines.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

from utils import fail  # first: sets OpenMP's variables before torch is loaded
from hooks import Cache, act_name, block_norms, cache_from_resid, hook_points, in_batches, rows_that_fit, run_from
from anatomy import attn_gain, folded_W_U
from interventions import Pairs, baselines, by_groups, inputs, make_metric, normalised

import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from scipy.stats import spearmanr
from torch import Tensor


#%% The graph: embedding, heads and MLPs write to the stream; every head's q, k, v, every MLP and the logits read it
class Receiver(NamedTuple):
    """
    What reads the stream through one norm: its layer, which input it is (q, k, v, MLP, logits), and of q the head, of k
    and v the group of heads that share it, and how many share it. It is named by the heads that it feeds: L4H2-3.v.
    """

    layer: int
    input: str
    head: int = 0
    sharing: int = 1

    @property
    def name(self) -> str:
        if self.input == "logits":
            return "logits"
        if self.input == "MLP":
            return f"L{self.layer} MLP"
        return f"L{self.layer}H{heads_fed(self.head, self.sharing)}.{self.input}"


def heads_fed(head: int, sharing: int) -> str:
    """The numbers of the heads that a query, key or value head feeds: 5, or 2-3 of a key head that two share."""
    first = head * sharing
    return str(head) if sharing == 1 else f"{first}-{first + sharing - 1}"


class Graph:
    """
    Who writes to the stream, who reads it, and the edges between them. Functions take writers and receivers by name.

    writers: names (embed, L0H0, L0 MLP, ...), in the order in which they write.
    receivers: Receiver tuples, in the order in which they read.
    receiver_names: their names (L0H0.q, L0 MLP, logits).
    receiver_slices {(layer, input): slice}: where these receivers stand among all.
    receiver_layers (receiver): the last layer at which a run can enter and still change what the receiver reads.
    is_edge (writer, receiver): True where the receiver reads what the writer writes. Such masks are sets of edges.
    is_input_of (receiver, writer): 1 where the writer computes what it writes from the receiver (L0H0 from L0H0.q).
    """

    def __init__(self, model: nn.Module):
        self.n_layers = model.cfg.n_layers
        self.n_heads = model.cfg.n_heads
        self.n_kv_heads = model.blocks[0].attn.W_K.shape[0]
        # serial: the MLP reads what attention has written; else (GPT-NeoX) both read the same stream
        self.serial = act_name("resid_mid", 0) in hook_points(model)

        self.writers = self.name_writers()
        self.head_names = [name for name in self.writers if "H" in name]
        self.receivers = self.list_receivers()
        self.receiver_names = [receiver.name for receiver in self.receivers]
        # the logits stand after the last layer
        self.receiver_layers = t.tensor([min(receiver.layer, self.n_layers - 1) for receiver in self.receivers])
        self.receiver_slices = self.find_receiver_slices()
        self.is_edge = self.find_edges()
        self.is_input_of = self.find_inputs()

    def name_writers(self) -> list[str]:
        names = ["embed"]
        for layer in range(self.n_layers):
            names += [f"L{layer}H{head}" for head in range(self.n_heads)]
            names.append(f"L{layer} MLP")
        return names

    def list_receivers(self) -> list[Receiver]:
        receivers = []
        sharing = self.n_heads // self.n_kv_heads
        for layer in range(self.n_layers):
            receivers += [Receiver(layer, "q", head) for head in range(self.n_heads)]
            receivers += [Receiver(layer, "k", head, sharing) for head in range(self.n_kv_heads)]
            receivers += [Receiver(layer, "v", head, sharing) for head in range(self.n_kv_heads)]
            receivers.append(Receiver(layer, "MLP"))
        receivers.append(Receiver(self.n_layers, "logits"))
        return receivers

    def find_receiver_slices(self) -> dict[tuple[int, str], slice]:
        slices = {}
        for i, receiver in enumerate(self.receivers):
            key = (receiver.layer, receiver.input)
            first = slices[key].start if receiver.head > 0 else i
            slices[key] = slice(first, i + 1)
        return slices

    def find_edges(self) -> Tensor:
        is_edge = t.zeros(len(self.writers), len(self.receivers), dtype=t.bool)
        for i, receiver in enumerate(self.receivers):
            heads = self.head_slice(receiver.layer)
            reads_heads_of_its_layer = receiver.input == "MLP" and self.serial
            is_edge[: heads.stop if reads_heads_of_its_layer else heads.start, i] = True
        return is_edge

    def find_inputs(self) -> Tensor:
        is_input_of = t.zeros(len(self.receivers), len(self.writers))
        for i, receiver in enumerate(self.receivers):
            heads = self.head_slice(receiver.layer)
            if receiver.input == "MLP":
                is_input_of[i, heads.stop] = 1
            elif receiver.input != "logits":
                # grouped queries share k and v
                sharing = 1 if receiver.input == "q" else self.n_heads // self.n_kv_heads
                first = heads.start + receiver.head * sharing
                is_input_of[i, first : first + sharing] = 1
        return is_input_of

    def head_slice(self, layer: int) -> slice:
        """A layer's heads among the writers; its MLP follows."""
        return slice(1 + layer * (self.n_heads + 1), (layer + 1) * (self.n_heads + 1))

    def edges(self, writers: list[str], receivers: list[str] | None = None) -> Tensor:
        """The edges from some writers to some (None: all) receivers."""
        rows = t.tensor([self.writers.index(name) for name in writers])
        columns = t.tensor([self.receiver_names.index(name) for name in receivers or self.receiver_names])
        mask = t.zeros_like(self.is_edge)
        mask[rows[:, None], columns] = True
        return mask & self.is_edge

    def receivers_of(self, writers: list[str], input: str) -> list[str]:
        """The q, k, v or MLP inputs of these writers."""
        columns = [self.writers.index(name) for name in writers]
        belongs = self.is_input_of[:, columns].any(1).tolist()
        return [receiver.name for receiver, on in zip(self.receivers, belongs) if on and receiver.input == input]

    def write_hook(self, writer: str) -> str:
        """The hook at which what a writer writes joins the stream; a head's is that of its whole layer."""
        if writer == "embed":
            return act_name("resid_pre", 0)
        return act_name("mlp_out" if writer.endswith("MLP") else "attn_out", self.writer_layer(writer))

    def writer_layer(self, writer: str) -> int:
        """The layer of a head or an MLP."""
        return (self.writers.index(writer) - 1) // (self.n_heads + 1)

    def describe_writers(self) -> str:
        last = self.n_layers - 1
        return f"embed, L0H0 to L{last}H{self.n_heads - 1} and L0 MLP to L{last} MLP"

    def writers_at(self) -> dict[str, list[int]]:
        """{hook: the writers (their places among all) whose writes join the stream at it}"""
        together: dict[str, list[int]] = {}
        for i, writer in enumerate(self.writers):
            together.setdefault(self.write_hook(writer), []).append(i)
        return together

    def read_hooks(self, receivers: list[str]) -> dict[str, list[int]]:
        """
        {hook: heads} at which what these receivers (but the logits) make of their inputs can be put: q, k, v of these
        heads, or the whole MLP's output (no heads).
        """
        heads: dict[str, list[int]] = {}
        for name in receivers:
            receiver = self.receivers[self.receiver_names.index(name)]
            if receiver.input == "MLP":
                heads[act_name("mlp_out", receiver.layer)] = []
            elif receiver.input != "logits":
                heads.setdefault(act_name(receiver.input, receiver.layer), []).append(receiver.head)
        return heads

    def fed_by(self, receiver: int) -> list[str]:
        """The heads or the MLP that compute what they write from a receiver; the logits from theirs."""
        fed = self.is_input_of[receiver].nonzero()[:, 0].tolist()
        return [self.writers[i] for i in fed] or [self.receiver_names[receiver]]

    def prune(self, kept: Tensor) -> Tensor:
        """
        Less the edges from writers that no kept edge reaches and into receivers from which none goes on: those carry
        what the corrupt run writes, kept or not.
        """
        is_reached = kept.any(0).float() @ self.is_input_of > 0  # (writer)
        goes_on = self.is_input_of @ kept.any(1).float() > 0  # (receiver)
        is_reached[0] = True  # the embedding
        goes_on[-1] = True  # the logits
        fewer = kept & is_reached[:, None] & goes_on
        return kept if fewer.equal(kept) else self.prune(fewer)

    def edge_names(self, kept: Tensor) -> list[str]:
        return [f"{self.writers[w]} to {self.receiver_names[r]}" for w, r in kept.nonzero().tolist()]


#%% A plain run, and what every writer wrote in it
def head_writes(model: nn.Module, layer: int, z: Tensor) -> Tensor:
    """(row, pos, head, d_model), after a norm after attention (Gemma 2) with its scale as it is in this run."""
    W_O = model.blocks[layer].attn.W_O
    writes = einsum(z, W_O, "row pos head d_head, head d_head d_model -> row pos head d_model")
    gain = attn_gain(model, layer, z)
    return writes * (gain[:, :, None].to(writes.dtype) if isinstance(gain, Tensor) else gain)


def through(norm: nn.Module | None, x: Tensor) -> Tensor:
    """What is read of the stream x (row, pos, d_model): as it is where there is no norm before (OLMo 2)."""
    return x if norm is None else norm(x)


class GraphRun(NamedTuple):
    """logits (pair, d_vocab) at the answer's position; cache; writes (pair, pos, writer, d_model)."""

    logits: Tensor
    cache: Cache
    writes: Tensor


def run_graph(model: nn.Module, graph: Graph, pairs: Pairs, which: str, also: tuple[str, ...] = ()) -> GraphRun:
    """The clean or the corrupt run; also: hooks to cache beside the stream before each layer, z and the MLP outputs."""
    layers = range(graph.n_layers)
    names = [act_name(site, layer) for layer in layers for site in ("resid_pre", "z", "mlp_out")]
    logits, cache = cache_from_resid(model, inputs(model, pairs, which), pairs.answer_pos, [*names, *also])
    writes = [cache["resid_pre", 0][:, :, None]]
    for layer in layers:
        writes.append(head_writes(model, layer, cache["z", layer]))
        writes.append(cache["mlp_out", layer][:, :, None])
    return GraphRun(logits, cache, t.cat(writes, 2))


def reads_shared_norm(model: nn.Module, layer: int) -> bool:
    """One norm serves attention and the MLP (GPT-J, Phi, Falcon), so that a change for the MLP alone comes after it."""
    norms = block_norms(model, layer)
    return norms.before_mlp is not None and norms.before_mlp is norms.before_attn


def mlp_entrance(model: nn.Module, layer: int) -> nn.Module:
    """The module at whose input what the MLP reads can be changed: its own norm, else the MLP itself."""
    if reads_shared_norm(model, layer):
        return model.blocks[layer].mlp
    return block_norms(model, layer).before_mlp or model.blocks[layer].mlp


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


#%% Plain forms: edge patching of one edge, EAP and EAP-IG of the edges into one receiver
class InputChange:
    """
    Adds change (pair, pos, d_model) to what one receiver reads, ahead of its norm; everything else reads the stream
    as it is.
    """

    def __init__(self, model: nn.Module, receiver: Receiver, change: Tensor):
        self.model = model
        self.receiver = receiver
        self.change = change
        self.stream: Tensor | None = None

    def run(self, resid: Tensor, answer_pos: Tensor, also: list[tuple] = ()) -> Tensor:
        """Logits (pair, d_vocab) of a run that resid (pair, pos, d_model) enters at layer 0. also: further hooks."""
        fwd_hooks, module_inputs = self.entries()
        return run_from(self.model, resid, answer_pos, 0, [*also, *fwd_hooks], module_inputs)

    def entries(self) -> tuple[list[tuple], list[tuple]]:
        """(hooks, changed module inputs) of a run, as run_from takes them."""
        fwd_hooks, module_inputs = [], []
        if self.receiver.input == "logits":
            module_inputs = [(self.model.ln_final, "in", self.change_input)]
        elif self.receiver.input == "MLP":
            block = self.model.blocks[self.receiver.layer]
            if reads_shared_norm(self.model, self.receiver.layer):
                fwd_hooks = [(act_name("resid_pre", self.receiver.layer), self.keep_stream)]
                module_inputs = [(block.mlp, "in", self.change_normed_input)]
            else:
                module_inputs = [(mlp_entrance(self.model, self.receiver.layer), "in", self.change_input)]
        else:
            fwd_hooks = [
                (act_name("resid_pre", self.receiver.layer), self.keep_stream),
                (act_name(self.receiver.input, self.receiver.layer), self.change_head),
            ]
        return fwd_hooks, module_inputs

    def change_input(self, x: Tensor) -> Tensor:
        return x + self.change.view(x.shape)

    def moved(self) -> Tensor:
        """(pair, pos, d_model) what the output of the norm before attention moves by."""
        norm = block_norms(self.model, self.receiver.layer).before_attn
        return through(norm, self.stream + self.change) - through(norm, self.stream)

    def change_normed_input(self, x: Tensor) -> Tensor:
        return x + self.moved()

    def keep_stream(self, x: Tensor, hook: nn.Module) -> None:
        self.stream = x

    def change_head(self, x: Tensor, hook: nn.Module) -> Tensor:
        """
        q, k, v (pair, pos, head, d_head) are linear in the normed stream: one head's moves by its weights times what
        the norm's output moves by.
        """
        block = self.model.blocks[self.receiver.layer]
        W = getattr(block.attn, f"W_{self.receiver.input.upper()}")[self.receiver.head]
        changed = x.clone()
        changed[:, :, self.receiver.head] += einsum(
            self.moved(), W, "pair pos d_model, d_model d_head -> pair pos d_head"
        )
        return changed


@t.no_grad()
def plain_edge_patch(
    model: nn.Module, graph: Graph, pairs: Pairs, writer: str, receiver: str, metric: str = "logit_diff"
) -> Tensor:
    """
    Metric (pair) of clean runs in which one receiver reads one writer's corrupt write in place of its clean one, and
    no other path carries it. What lies after the receiver is computed anew. Plain form of edge_patch.
    """
    # Step 1: a clean and a corrupt run
    clean = run_graph(model, graph, pairs, "clean")
    corrupt = run_graph(model, graph, pairs, "corrupt")

    # Step 2: the clean run again, the receiver's input changed by what the writer would have written
    w = graph.writers.index(writer)
    r = graph.receiver_names.index(receiver)
    assert graph.is_edge[w, r], f"there is no edge from {writer} to {receiver}"
    change = corrupt.writes[:, :, w] - clean.writes[:, :, w]
    logits = InputChange(model, graph.receivers[r], change).run(inputs(model, pairs, "clean"), pairs.answer_pos)

    # Step 3: the metric
    return make_metric(pairs, metric, clean.logits)(logits, pairs.index)


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


#%% The engine: one forward pass in which every receiver has an input of its own
class EdgeRun:
    """
    One forward pass in which every receiver has its own input, put through the real norm. That is the stream, but

    along the edges of swap (row, writer, receiver) the write in other (row, pos, writer, d_model), not the run's own;
    plus nudge (row, pos, receiver, d_model).

    The rows of a batch may be different runs. gaps grow with the pass: other - own of the writers so far, to be joined
    along the writers.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        swap: Tensor | None = None,
        other: Tensor | None = None,
        nudge: Tensor | None = None,
    ):
        self.model = model
        self.graph = graph
        self.swap = swap
        self.other = other
        self.nudge = nudge
        self.gaps: list[Tensor] = []
        # of the layer that the pass is in
        # (row, pos, receiver, d_model), what the normed inputs of q, k, v move by
        self.normed_change: Tensor | None = None
        # what the MLP's input moves by, where it reads the same stream as attention
        self.parallel_mlp_change: Tensor | None = None

    def run(
        self,
        resid: Tensor,
        answer_pos: Tensor,
        layer: int = 0,
        own: Tensor | None = None,
        also: list[tuple] = (),
    ) -> Tensor:
        """
        Logits (row, d_vocab) of a run that resid (row, pos, d_model) enters at `layer`; own, like other, holds its
        writes below. also: further hooks.
        """
        if self.swap is not None:
            below = self.graph.head_slice(layer).start
            own_below = resid[:, :, None] if layer == 0 else own[:, :, :below]
            self.gaps.append(self.other[:, :, :below] - own_below)
        fwd_hooks, module_inputs = list(also), []
        for l in range(layer, self.graph.n_layers):
            fwd_hooks.append((act_name("resid_pre", l), partial(self.enter_layer, l)))
            fwd_hooks += [(act_name(site, l), partial(self.change_heads, l, site)) for site in ("q", "k", "v")]
            if self.swap is not None:
                fwd_hooks.append((act_name("z", l), partial(self.keep_head_gaps, l)))
                fwd_hooks.append((act_name("mlp_out", l), partial(self.keep_mlp_gap, l)))
            module_inputs.append((mlp_entrance(self.model, l), "in", partial(self.change_mlp_input, l)))
        module_inputs.append((self.model.ln_final, "in", self.change_final_input))
        return run_from(self.model, resid, answer_pos, layer, fwd_hooks, module_inputs)

    def input_change(self, receivers: slice) -> Tensor | None:
        """
        (row, pos, receiver, d_model) by which the inputs of these receivers differ from the stream; None: not at all.
        """
        nudge = None if self.nudge is None else self.nudge[:, :, receivers]
        if self.swap is None or not self.swap[:, :, receivers].any():
            return nudge
        gap = t.cat(self.gaps, 2)
        swapped = einsum(
            self.swap[:, : gap.shape[2], receivers].to(gap.dtype),
            gap,
            "row writer receiver, row pos writer d_model -> row pos receiver d_model",
        )
        return swapped if nudge is None else nudge + swapped

    def enter_layer(self, layer: int, x: Tensor, hook: nn.Module) -> None:
        """The stream before a layer: put through the norm as each of the layer's heads reads it."""
        norm = block_norms(self.model, layer).before_attn
        slices = self.graph.receiver_slices
        change = self.input_change(slice(slices[layer, "q"].start, slices[layer, "v"].stop))
        self.normed_change = None
        if change is not None:
            as_read = (x[:, :, None] + change).flatten(1, 2)
            self.normed_change = through(norm, as_read).view(change.shape) - through(norm, x)[:, :, None]
        if self.graph.serial:
            return
        self.parallel_mlp_change = self.input_change(slices[layer, "MLP"])
        if self.parallel_mlp_change is not None and reads_shared_norm(self.model, layer):
            as_read = x + self.parallel_mlp_change[:, :, 0]
            self.parallel_mlp_change = (through(norm, as_read) - through(norm, x))[:, :, None]

    def change_heads(self, layer: int, site: str, x: Tensor, hook: nn.Module) -> Tensor | None:
        """q, k or v (row, pos, head, d_head), linear in the normed input: the change goes through the weights alone."""
        if self.normed_change is None:
            return None
        W = getattr(self.model.blocks[layer].attn, f"W_{site.upper()}")
        slices = self.graph.receiver_slices
        start = slices[layer, site].start - slices[layer, "q"].start
        return x + einsum(
            self.normed_change[:, :, start : start + len(W)],
            W,
            "row pos head d_model, head d_model d_head -> row pos head d_head",
        )

    def keep_head_gaps(self, layer: int, z: Tensor, hook: nn.Module) -> None:
        self.gaps.append(self.other[:, :, self.graph.head_slice(layer)] - head_writes(self.model, layer, z))

    def keep_mlp_gap(self, layer: int, out: Tensor, hook: nn.Module) -> None:
        mlp = self.graph.head_slice(layer).stop
        self.gaps.append(self.other[:, :, mlp : mlp + 1] - out[:, :, None])

    def change_mlp_input(self, layer: int, x: Tensor) -> Tensor:
        change = self.parallel_mlp_change
        if self.graph.serial:
            change = self.input_change(self.graph.receiver_slices[layer, "MLP"])
        return x if change is None else x + change[:, :, 0].view(x.shape)

    def change_final_input(self, x: Tensor) -> Tensor:
        change = self.input_change(self.graph.receiver_slices[self.graph.n_layers, "logits"])
        return x if change is None else x + change[:, :, 0]


def pairs_that_fit(model: nn.Module, graph: Graph, pairs: Pairs, memory_gb: float) -> int:
    """Part of the memory holds the writes of both runs, the rest twice as many rows in flight."""
    floats = (4 * len(graph.writers) + 24 * graph.n_heads) * model.cfg.d_model
    return rows_that_fit(model, pairs.clean.shape[1], memory_gb / 4, floats)


#%% Path patching of every sender
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


#%% Ablations: what stands in for a write that is not kept
type Ablation = Callable[[nn.Module, Graph, Pairs], Tensor]  # writes (pair, pos, writer, d_model) of a group of pairs


def corrupt_writes(model: nn.Module, graph: Graph, group: Pairs) -> Tensor:
    """What every writer writes in the pair's own corrupt run (interchange, or swap)."""
    return run_graph(model, graph, group, "corrupt").writes


def mean_ablation(
    model: nn.Module, graph: Graph, pairs: Pairs, memory_gb: float = 1.0, draws: int = 16, seed: int = 0
) -> tuple[Ablation, str]:
    """
    (the ablation, in words): every writer's mean write at each position over a reference distribution. For indirect
    objects Wang et al.'s (2023) p_ABC: each pair's own words with three different names in them (the pairs' names),
    `draws` times. For other pairs, or where these know fewer than three names: the corrupt runs, position by position
    over all pairs. Wang et al. ablate heads alone; here the embedding and MLPs are writers as well.
    """
    known = t.cat([pairs.answer, pairs.wrong]).unique()
    if {"IO", "S1", "S2"} <= pairs.places.keys() and len(known) >= 3:
        names = draw_names(known, draws, seed)
        return partial(abc_mean_writes, names), f"mean over {draws} prompts of the same words and three other names"
    mean = corrupt_mean_writes(model, graph, pairs, memory_gb)
    return partial(shared_writes, mean), f"mean over {len(pairs)} corrupt runs, position by position"


def draw_names(known: Tensor, draws: int, seed: int) -> Tensor:
    """(draw, 3): three different ones of the known token ids (name)."""
    generator = t.Generator().manual_seed(seed)
    return t.stack([known[t.randperm(len(known), generator=generator)[:3]] for _ in range(draws)])


def abc_prompts(pairs: Pairs, names: Tensor) -> Tensor:
    """(pair, pos): the clean tokens with the first name for the indirect object, the others for S1 and S2 (3)."""
    is_io = pairs.clean == pairs.answer[:, None]
    is_s = pairs.clean == pairs.wrong[:, None]
    is_s1 = is_s & (is_s.cumsum(1) == 1)
    tokens = pairs.clean.clone()
    tokens[is_io] = names[0]
    tokens[is_s1] = names[1]
    tokens[is_s & ~is_s1] = names[2]
    return tokens


def abc_mean_writes(names: Tensor, model: nn.Module, graph: Graph, group: Pairs) -> Tensor:
    """Mean writes (pair, pos, writer, d_model) over the group's prompts with each of the names (draw, 3)."""
    total: Tensor | float = 0.0
    for three in names:
        reference = replace(group, corrupt=abc_prompts(group, three), corrupt_resid=None)
        total = total + corrupt_writes(model, graph, reference)
    return total / len(names)


@t.no_grad()
def corrupt_mean_writes(model: nn.Module, graph: Graph, pairs: Pairs, memory_gb: float) -> Tensor:
    """(pos, writer, d_model): mean over the corrupt runs that are still before their answer at this position."""

    def summed(group: Pairs) -> tuple[Tensor, Tensor]:
        position = t.arange(group.clean.shape[1], device=group.answer_pos.device)
        real = (position <= group.answer_pos[:, None]).to(t.float32)
        shorter = pairs.clean.shape[1] - group.clean.shape[1]  # groups are cut after their last answer
        writes = corrupt_writes(model, graph, group).float()
        total = einsum(writes, real, "pair pos writer d_model, pair pos -> pos writer d_model")
        return F.pad(total, (0, 0, 0, 0, 0, shorter)), F.pad(real.sum(0), (0, shorter))

    sums, counts = zip(*by_groups(summed, pairs, pairs_that_fit(model, graph, pairs, memory_gb)))
    return sum(sums) / sum(counts)[:, None, None]


def shared_writes(mean: Tensor, model: nn.Module, graph: Graph, group: Pairs) -> Tensor:
    """The same writes (pos, writer, d_model) for every pair; beyond the last position of the mean its last."""
    n_pos = group.clean.shape[1]
    longer = mean[t.arange(n_pos, device=mean.device).clamp(max=len(mean) - 1)]
    return longer.to(inputs(model, group, "clean").dtype).expand(len(group), -1, -1, -1)


#%% Edge patching: any sets of edges
@t.no_grad()
def edge_patch(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    swaps: Tensor,
    metric: str = "logit_diff",
    memory_gb: float = 1.0,
    ablation: Ablation = corrupt_writes,
) -> Tensor:
    """
    Metric (swap, pair) of clean runs in which the edges of each mask in swaps (swap, writer, receiver) carry the
    corrupt run's writes, or another ablation's; what lies after a receiver is computed anew, all else stays. One edge
    is what Syed et al. (2023) attribute; a circuit is the run in which all other edges are swapped.
    """
    swaps = (swaps & graph.is_edge).to(pairs.answer_pos.device)
    n_pairs = pairs_that_fit(model, graph, pairs, memory_gb)
    patch = partial(patch_group, model, graph, swaps, metric, 2 * n_pairs, ablation)
    return t.cat(by_groups(patch, pairs, n_pairs), 1)


def patch_group(
    model: nn.Module, graph: Graph, swaps: Tensor, metric: str, n_rows: int, ablation: Ablation, group: Pairs
) -> Tensor:
    """
    edge_patch of pairs that fit into memory at once. A run enters at the first layer with a swapped input: below it,
    it is the clean run.
    """
    clean = run_graph(model, graph, group, "clean")
    other = ablation(model, graph, group)
    metric_fn = make_metric(group, metric, clean.logits)

    def patch_rows(layer: int, rows: Tensor) -> Tensor:
        swap, pair = rows.unbind(1)
        run = EdgeRun(model, graph, swaps[swap], other[pair])
        resid = clean.cache["resid_pre", layer][pair]
        return metric_fn(run.run(resid, group.answer_pos[pair], layer, clean.writes[pair]), pair)

    values = t.zeros(len(swaps), len(group), device=swaps.device)
    first_layers = first_swapped_layers(graph, swaps)
    for layer in first_layers.unique().tolist():
        entering = (first_layers == layer).nonzero()[:, 0]
        rows = t.cartesian_prod(entering, group.index)  # (swap, pair)
        values[rows.unbind(1)] = t.cat(list(in_batches(partial(patch_rows, layer), rows, n_rows, "edges")))
    return values


def first_swapped_layers(graph: Graph, swaps: Tensor) -> Tensor:
    """The layer (swap) of the first receiver with a swapped edge; the last one where nothing is swapped."""
    swapped = swaps.any(1).cpu()  # (swap, receiver)
    layers = t.where(swapped, graph.receiver_layers, graph.receiver_layers[-1])
    return layers.min(1).values.to(swaps.device)


#%% Edge attribution: what patching each edge would do, by gradient
def eap(model: nn.Module, graph: Graph, pairs: Pairs, metric: str = "logit_diff", memory_gb: float = 1.0) -> Tensor:
    """
    Edge attribution patching (Syed et al. 2023), (writer, receiver): what the clean metric would lose if the edge
    carried the corrupt write, by the gradient in the clean run, mean over pairs. Summed over receivers: attribution
    patching of nodes.
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


@t.no_grad()
def write_differences(model: nn.Module, graph: Graph, pairs: Pairs, memory_gb: float = 1.0) -> tuple[float, Tensor]:
    """
    Between clean and corrupt: by how much the sum of the writes misses the stream before the last layer, relative to
    its largest; the norm of each write, summed over pairs and positions (writer).
    """
    last = graph.n_layers - 1

    def differ(group: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        clean = run_graph(model, graph, group, "clean")
        corrupt = run_graph(model, graph, group, "corrupt")
        writes = (clean.writes - corrupt.writes).float()
        stream = (clean.cache["resid_pre", last] - corrupt.cache["resid_pre", last]).float()
        miss = writes[:, :, : graph.head_slice(last).start].sum(2) - stream
        return miss.abs().max(), stream.abs().max(), writes.norm(dim=-1).sum((0, 1))

    parts = by_groups(differ, pairs, pairs_that_fit(model, graph, pairs, memory_gb))
    misses, largest, norms = zip(*parts)
    return (max(misses) / max(largest)).item(), sum(norms).cpu()


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
    receivers, which are named (see path_losses). First the logits; then, again and again, the inputs (q, k, v, MLP: a step each) of the
    writers that lost most (at most `width`, at least `floor`) in the last round's strongest step, until max_steps are
    done (Wang et al. 2023).
    """
    clean, corrupt = t.stack(baselines(model, pairs, metric, memory_gb)).mean(1)
    gap = float(clean - corrupt)
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


#%% The roles of GPT-2's circuit for indirect objects (Wang et al. 2023), found in any model
ROLES = {  # where a role looks from and to
    "name mover": ("end", "IO"),
    "negative name mover": ("end", "IO"),
    "S-inhibition": ("end", "S2"),
    "induction": ("S2", "S1+1"),
    "duplicate token": ("S2", "S1"),
    "previous token": ("S1+1", "S1"),
}
LIKE = {  # where else such a token stands: a head that looks at any name has no eye for this one
    "IO": ("S1", "S2"),
    "S2": ("IO", "S1"),
    "S1": ("IO",),
    "S1+1": ("IO+1",),
}
WANG = {  # the heads in GPT-2 small
    "name mover": "L9H9 L9H6 L10H0",
    "negative name mover": "L10H7 L11H10",
    "S-inhibition": "L7H3 L7H9 L8H6 L8H10",
    "induction": "L5H5 L6H9",
    "duplicate token": "L0H1 L3H0",
    "previous token": "L2H2 L4H11",
}


class Roles(NamedTuple):
    """
    scores {role: (layer, head)}: attention from where the role looks to what it looks at. bars {role: float}: `floor`
    or, if larger, the 99th percentile of the best head's score with keys drawn at random. elsewhere {role: (layer,
    head)}: the 99th percentile of the head's own attention to another token of the kind (another name; what follows
    one), 0 where there is none before the query. found {role: heads}: above both, and acting as the role acts.
    """

    scores: dict[str, Tensor]
    bars: dict[str, float]
    elsewhere: dict[str, Tensor]
    found: dict[str, list[str]]


@t.no_grad()
def find_roles(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    metric: str,
    memory_gb: float = 1.0,
    shuffles: int = 1000,
    floor: float = 0.1,
    seed: int = 0,
    by: TraceBy = "path_patch",
) -> Roles:
    """
    Movers also write the answer (or against it) to the logits along direct paths, and S-inhibition heads act so on the
    movers' queries, beyond the 99th percentile of the best head's effect with signs drawn at random. Direct paths are
    path_losses' (by).
    """
    search = RoleSearch(model, graph, pairs, metric, memory_gb, shuffles, floor, seed, by)
    movers = search.name_movers()
    found = {
        "name mover": movers,
        "negative name mover": search.negative_name_movers(),
        "S-inhibition": search.s_inhibition_heads(movers),
        "induction": search.induction_heads(),
        "duplicate token": search.duplicate_token_heads(),
        "previous token": search.previous_token_heads(),
    }
    return Roles(search.scores, search.bars, search.elsewhere, found)


class RoleSearch:
    """
    Which heads look as a role looks (scores, bars, elsewhere, looking), and which of them also do what it does: one
    method per role.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        pairs: Pairs,
        metric: str,
        memory_gb: float,
        shuffles: int,
        floor: float,
        seed: int,
        by: TraceBy,
    ):
        self.model = model
        self.graph = graph
        self.pairs = pairs
        self.metric = metric
        self.by = by
        self.memory_gb = memory_gb
        self.shuffles = shuffles
        self.generator = t.Generator().manual_seed(seed)

        self.scores: dict[str, Tensor] = {}
        self.bars: dict[str, float] = {}
        self.elsewhere: dict[str, Tensor] = {}
        self.looking: dict[str, list[str]] = {}
        attention = attention_from_places(model, graph, pairs, memory_gb)
        for role, (query, key) in ROLES.items():
            self.scores[role] = self.mean_attention(attention[query], position_of(pairs, key))
            self.bars[role] = max(floor, self.chance_attention(attention[query], position_of(pairs, query)))
            self.elsewhere[role] = self.attention_elsewhere(attention[query], position_of(pairs, query), LIKE[key])
            bar = self.elsewhere[role].clamp(min=self.bars[role])
            above = (self.scores[role] > bar).flatten().nonzero()[:, 0].tolist()
            self.looking[role] = [graph.head_names[i] for i in above]

    def name_movers(self) -> list[str]:
        """From the end they attend to the indirect object and write it to the logits."""
        return self.acting(self.looking["name mover"], ["logits"])

    def negative_name_movers(self) -> list[str]:
        """From the end they attend to the indirect object and write against it."""
        return self.acting(self.looking["negative name mover"], ["logits"], sign=-1)

    def s_inhibition_heads(self, movers: list[str]) -> list[str]:
        """From the end they attend to the second subject and steer the name movers' queries."""
        if not movers:
            return []
        return self.acting(self.looking["S-inhibition"], self.graph.receivers_of(movers, "q"))

    def induction_heads(self) -> list[str]:
        """From the second subject they attend to what followed the first."""
        return self.looking["induction"]

    def duplicate_token_heads(self) -> list[str]:
        """From the second subject they attend to the first."""
        return self.looking["duplicate token"]

    def previous_token_heads(self) -> list[str]:
        """From the token after the first subject they attend to it."""
        return self.looking["previous token"]

    def mean_attention(self, attention: Tensor, keys: Tensor) -> Tensor:
        """(layer, head): attention (pair, layer, head, key) to each pair's key, mean over pairs."""
        return attention[self.pairs.index, :, :, keys].mean(0).cpu()

    def chance_attention(self, attention: Tensor, queries: Tensor) -> float:
        """99th percentile, over draws of a key at or before each pair's query, of the best head's attention to it."""
        uniform = t.rand(self.shuffles, len(self.pairs), generator=self.generator).to(queries.device)
        drawn = (uniform * (queries + 1)).long()  # (shuffle, pair)
        best = [attention[self.pairs.index, :, :, keys].mean(0).max() for keys in drawn]
        return t.stack(best).quantile(0.99).item()

    def attention_elsewhere(self, attention: Tensor, queries: Tensor, places: tuple[str, ...]) -> Tensor:
        """
        (layer, head): 99th percentile, over draws of one of these places at or before each pair's query, of the head's
        mean attention to it; 0 where no pair has one.
        """
        keys = t.stack([position_of(self.pairs, place) for place in places], 1)  # (pair, place)
        allowed = (keys <= queries[:, None]).float().cpu()
        pairs = allowed.any(1).nonzero()[:, 0]
        if len(pairs) == 0:
            return t.zeros(attention.shape[1:3])
        at_place = attention.cpu()[pairs[:, None], :, :, keys.cpu()[pairs]]  # (pair, place, layer, head)
        drawn = allowed[pairs].multinomial(self.shuffles, replacement=True, generator=self.generator)  # (pair, shuffle)
        weights = F.one_hot(drawn, len(places)).float() / len(pairs)
        means = einsum(weights, at_place, "pair shuffle place, pair place layer head -> shuffle layer head")
        return means.quantile(0.99, dim=0)

    def acting(self, heads: list[str], receivers: list[str], sign: int = 1) -> list[str]:
        """
        Those of the heads whose direct paths to the receivers help the metric (sign 1) or hurt it (-1), more than
        chance.
        """
        if not heads or not receivers:
            return []
        rows = [self.graph.writers.index(head) for head in self.graph.head_names]
        losses = path_losses(self.model, self.graph, self.pairs, receivers, self.metric, self.memory_gb, self.by)
        lost = losses[rows]  # (head, pair)
        bar = self.chance_loss(lost)
        if self.metric == "kl":
            sign = -sign  # a divergence grows where the answer is lost
        effect = {head: sign * lost[self.graph.head_names.index(head)].mean() for head in heads}
        return [head for head in heads if effect[head] > bar]

    def chance_loss(self, lost: Tensor) -> Tensor:
        """99th percentile, over draws of a sign for each pair, of the best head's mean loss."""
        signs = t.randint(2, (self.shuffles, 1, len(self.pairs)), generator=self.generator) * 2.0 - 1
        return (signs * lost).mean(-1).amax(1).quantile(0.99)


def position_of(pairs: Pairs, place: str) -> Tensor:
    """The first position (pair) of a place; IO+1 is the one after IO."""
    after = place == "IO+1"
    return pairs.places["IO" if after else place].float().argmax(1) + after


def attention_from_places(model: nn.Module, graph: Graph, pairs: Pairs, memory_gb: float) -> dict[str, Tensor]:
    """{place that a role looks from: attention (pair, layer, head, key)} in clean runs."""
    names = [act_name("pattern", layer) for layer in range(graph.n_layers)]
    queries = list(dict.fromkeys(query for query, _ in ROLES.values()))
    n_pos = pairs.clean.shape[1]

    def look(group: Pairs) -> dict[str, Tensor]:
        _, cache = cache_from_resid(model, inputs(model, group, "clean"), group.answer_pos, names)
        shorter = n_pos - group.clean.shape[1]  # groups are cut after their last answer
        attention = {}
        for query in queries:
            position = position_of(group, query)
            rows = [cache[name][group.index, :, position].float() for name in names]
            attention[query] = F.pad(t.stack(rows, 1), (0, shorter))
        return attention

    n_pairs = rows_that_fit(model, n_pos, memory_gb, graph.n_layers * graph.n_heads * n_pos)
    parts = by_groups(look, pairs, n_pairs)
    return {query: t.cat([part[query] for part in parts]) for query in queries}
