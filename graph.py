"""
The graph of writes and reads, a run in which every receiver has an input of its own, and edge patching: one edge alone
in its plain form, then any sets of edges, and what stands in for a write that is not kept. On it stand path_patching,
eap (edge attribution), circuit_search and roles.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from hooks import Cache, act_name, block_norms, cache_from_resid, hook_points, in_batches, rows_that_fit, run_from
from logit_attribution import attn_gain, layer_streams
from pairs import Pairs, by_groups, inputs, make_metric

import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
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
        chosen = self.receiver_names if receivers is None else receivers
        columns = t.tensor([self.receiver_names.index(name) for name in chosen], dtype=t.long)
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


@t.no_grad()
def write_differences(model: nn.Module, graph: Graph, pairs: Pairs, memory_gb: float = 1.0) -> tuple[float, Tensor]:
    """
    Between clean and corrupt: by how much the sum of all writes misses the last stream, relative to its largest; the
    norm of each write, summed over pairs and positions up to the answer (writer).
    """
    last = layer_streams(model)[-1]

    def differ(group: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        clean = run_graph(model, graph, group, "clean", (last,))
        corrupt = run_graph(model, graph, group, "corrupt", (last,))
        position = t.arange(group.clean.shape[1], device=group.answer_pos.device)
        real = (position <= group.answer_pos[:, None])[..., None]  # (pair, pos, 1)
        writes = (clean.writes - corrupt.writes).float() * real[..., None]
        stream = (clean.cache[last] - corrupt.cache[last]).float() * real
        miss = writes.sum(2) - stream
        return miss.abs().max(), stream.abs().max(), writes.norm(dim=-1).sum((0, 1))

    parts = by_groups(differ, pairs, pairs_that_fit(model, graph, pairs, memory_gb))
    misses, largest, norms = zip(*parts)
    return (max(misses) / max(largest)).item(), sum(norms).cpu()


def reads_shared_norm(model: nn.Module, layer: int) -> bool:
    """One norm serves attention and the MLP (GPT-J, Phi, Falcon), so that a change for the MLP alone comes after it."""
    norms = block_norms(model, layer)
    return norms.before_mlp is not None and norms.before_mlp is norms.before_attn


def mlp_entrance(model: nn.Module, layer: int) -> nn.Module:
    """The module at whose input what the MLP reads can be changed: its own norm, else the MLP itself."""
    if reads_shared_norm(model, layer):
        return model.blocks[layer].mlp
    return block_norms(model, layer).before_mlp or model.blocks[layer].mlp


#%% Plain form of edge patching: one edge
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


#%% What stands in for the writes outside a set of edges
type Ablation = Callable[[nn.Module, Graph, Pairs], Tensor]  # writes (pair, pos, writer, d_model) of a group of pairs


def corrupt_writes(model: nn.Module, graph: Graph, group: Pairs) -> Tensor:
    """What every writer writes in the pair's own corrupt run (interchange, or swap)."""
    return run_graph(model, graph, group, "corrupt").writes


def mean_of_reference(
    model: nn.Module, graph: Graph, pairs: Pairs, memory_gb: float = 1.0, draws: int = 16, seed: int = 0
) -> tuple[Ablation, str]:
    """
    (the ablation, in words): every writer's mean write at each position over a reference distribution. For indirect
    objects Wang et al.'s (2023) p_ABC: each pair's own words with three names in them, drawn from all pairs',
    `draws` times. For other pairs, or where these know fewer than three names: the corrupt runs, position by position
    over all pairs. Wang et al. ablate heads alone; here the embedding and MLPs are writers as well.
    """
    known = t.cat([pairs.answer, pairs.wrong]).unique()
    if {"IO", "S1", "S2"} <= pairs.places.keys() and len(known) >= 3:
        names = draw_names(known, draws, seed)
        return partial(abc_mean_writes, names), f"mean over {draws} prompts of the same words and three drawn names"
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
        writes = corrupt_writes(model, graph, reference)
        total = total + writes.float()
    return (total / len(names)).to(writes.dtype)


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
