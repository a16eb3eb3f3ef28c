"""
Attribution graphs (Ameisen et al. 2025, 'Circuit Tracing'): a prompt's local replacement model of transcoders and their
errors with attention patterns and norms frozen, exact linear attribution in it, influence, pruning, scores, and the
test of edges by suppressing features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from utils import BAR, fail  # first: sets OpenMP's variables before torch is loaded
from hooks import act_name, ask_norm, block_norms, has_qkv, hook_points, hooks, run_with_cache
from logit_attribution import attn_gain, per_head
from sae import text_places
from transcoders import Transcoder

import torch as t
import torch.nn as nn
from einops import einsum
from torch import Tensor
from tqdm import tqdm


#%% The local replacement model: linear in the embeddings and in what features and errors write
@dataclass
class FrozenNorm:
    """A norm whose scale (pos, 1) is held at what it was on the prompt: linear but for its bias."""

    weight: Tensor
    bias: Tensor
    centres: bool
    scale: Tensor

    def normalized(self, x: Tensor) -> Tensor:
        """x (pos, d_model) as hook_normalized has it: before weight and bias."""
        if self.centres:
            x = x - x.mean(-1, keepdim=True)
        return x / self.scale

    def __call__(self, x: Tensor) -> Tensor:
        return self.normalized(x) * self.weight + self.bias


def bias_of(linear: nn.Module) -> Tensor | float:
    bias = getattr(linear, "bias", None)
    return 0.0 if bias is None else bias.float()


class LocalReplacement:
    """
    The model on one prompt, tokens (pos), with every MLP written as features + error, and with attention patterns and
    the scales of norms frozen. Where the prompt is no text (beginning-of-text, the first token), which transcoders
    never see, all that an MLP writes is error.
        embed (pos, d_model)        what enters the first block
        acts (layer, pos, d_sae)    the features
        errors (layer, pos, d_model)
        mlp_in [layer] (pos, d_in)  what each transcoder reads in the model itself
        logits (d_vocab)            the model's own, after the last token
    """

    @t.no_grad()
    def __init__(self, model: nn.Module, coders: list[Transcoder], tokens: Tensor, bos: int | None):
        refuse_unfit(model, coders)
        self.model = model
        self.coders = coders
        self.tokens = tokens
        self.n_layers = model.cfg.n_layers
        self.is_text = text_places(tokens[None], 1, bos)[0]
        self.has_mid = act_name("resid_mid", 0) in hook_points(model)  # else attention and MLP read the same stream
        logits, cache = run_with_cache(model, tokens[None], self.hook_names())
        self.logits = logits[0, -1].float()
        self.embed = cache["resid_pre", 0][0].float()
        self.patterns = [cache["pattern", layer][0].float() for layer in range(self.n_layers)]
        self.before_attn = [self.frozen_norm(cache, "ln1", layer) for layer in range(self.n_layers)]
        self.before_mlp = [self.frozen_norm(cache, "ln2", layer) for layer in range(self.n_layers)]
        self.final = self.frozen_norm(cache, "ln_final", None)
        self.gains = [attn_gain(model, layer, cache["z", layer][0]) for layer in range(self.n_layers)]
        self.mlp_in = [cache[coder.hook_in][0].float() for coder in coders]
        self.mlp_out = [cache[coder.hook_out][0].float() for coder in coders]
        text = self.is_text[:, None]
        self.acts = [coder.encode(x) * text for coder, x in zip(coders, self.mlp_in)]
        rebuilt = [coder(x) * text for coder, x in zip(coders, self.mlp_in)]
        self.errors = t.stack([y - made for y, made in zip(self.mlp_out, rebuilt)])

    def hook_names(self) -> list[str]:
        names = [act_name("resid_pre", 0), "ln_final.hook_scale"]
        for layer, coder in enumerate(self.coders):
            names += [act_name("pattern", layer), act_name("z", layer), coder.hook_in, coder.hook_out]
            names += [f"blocks.{layer}.ln1.hook_scale", f"blocks.{layer}.ln2.hook_scale"]
        return names

    def frozen_norm(self, cache: dict[str, Tensor], name: str, layer: int | None) -> FrozenNorm:
        """name: ln1 or ln2 of a layer, or ln_final (layer None)."""
        owner = self.model if layer is None else self.model.blocks[layer]
        place = name if layer is None else f"blocks.{layer}.{name}"
        shape = ask_norm(getattr(owner, name), self.model.cfg.d_model, self.model.W_U)
        return FrozenNorm(shape.weight, shape.bias, shape.centres, cache[f"{place}.hook_scale"][0].float())

    def attention(self, x: Tensor, layer: int) -> Tensor:
        """What the heads write (pos, d_model), linear in the stream x (pos, d_model)."""
        attn = self.model.blocks[layer].attn
        read = self.before_attn[layer](x)
        values = einsum(read, attn.W_V.float(), "pos d_model, head d_model d_head -> pos head d_head")
        bias = bias_of(attn.v)
        if isinstance(bias, Tensor):
            values = values + bias.view(values.shape[1:])
        values = per_head(values[None], self.model.cfg.n_heads)[0]
        z = einsum(self.patterns[layer], values, "head query key, key head d_head -> query head d_head")
        written = einsum(z, attn.W_O.float(), "pos head d_head, head d_head d_model -> pos d_model")
        return self.gains[layer] * (written + bias_of(attn.o))

    def run(self, sources: Tensor) -> list[Tensor]:
        """
        sources (1 + layer, pos, d_model): the embeddings, and what features and error write in each layer. What is read
        from the stream: by each transcoder [layer] (pos, d_in), and last by the unembedding (pos, d_model).
        """
        text = self.is_text[:, None]
        reads = []
        x = sources[0]
        for layer, coder in enumerate(self.coders):
            mid = x + self.attention(x, layer)
            read = self.read_by_coder(mid if self.has_mid else x, layer)
            reads.append(read)
            x = mid + sources[1 + layer] + text * (coder.b_dec + coder.skipped(read))
        return [*reads, self.final(x)]

    def read_by_coder(self, x: Tensor, layer: int) -> Tensor:
        """What a layer's transcoder reads of the stream x (pos, d_model): its norm, before or after the weight."""
        if self.coders[layer].hook_in.endswith("hook_normalized"):
            return self.before_mlp[layer].normalized(x)
        return self.before_mlp[layer](x)

    def sources_here(self) -> Tensor:
        """run's sources (1 + layer, pos, d_model) as they are on this prompt."""
        by_layer = [acts @ coder.W_dec for acts, coder in zip(self.acts, self.coders)]
        return t.cat([self.embed[None], t.stack(by_layer) + self.errors])

    @t.no_grad()
    def gap(self) -> float:
        """Gate: by how much the unembedding of its run misses the model's own logits, relative to the largest."""
        end = self.run(self.sources_here())[-1][-1]
        logits = self.model.unembed(end[None, None].to(self.model.W_U.dtype))[0, 0].float()
        return ((logits - self.logits).abs().max() / self.logits.abs().max()).item()


READ_AT = ("ln2.hook_normalized", "mlp.hook_in", "ln2.hook_out")  # without the norm's weight; and with it


def refuse_unfit(model: nn.Module, coders: list[Transcoder]) -> None:
    """Models and transcoders that the replacement model cannot be made of, in one line each."""
    if not has_qkv(model):
        fail("a graph needs values by head, and this model (Mamba, DeepSeek, streamed) has none")
    for layer, coder in enumerate(coders):
        if coder.hook_in not in [f"blocks.{layer}.{place}" for place in READ_AT]:
            fail(f"a transcoder reads {coder.hook_in}: graphs are made of those that read {', '.join(READ_AT)}")
        norms = block_norms(model, layer)
        if coder.hook_out != act_name("mlp_out", layer) and norms.after_mlp is not None:
            fail(f"a transcoder writes at {coder.hook_out}, before a norm: graphs are made of those at hook_mlp_out")
        if norms.before_attn is None or norms.before_mlp is None:
            fail("this model has no norm before its attention or MLP (OLMo 2): graphs are not made of it")


#%% The nodes of a prompt's graph, and what each of them writes or reads
@dataclass
class Nodes:
    """
    In this order: features that are active, errors by layer and position, embeddings by position, logits.
        features (feature, 3)     layer, position, number
        acts (feature)            how active they are
        logits (logit)            token ids
        probabilities (logit)
        n_layers, n_pos
    """

    features: Tensor
    acts: Tensor
    logits: Tensor
    probabilities: Tensor
    n_layers: int
    n_pos: int

    def __len__(self) -> int:
        return self.logit_slice.stop

    @property
    def n_features(self) -> int:
        return len(self.features)

    @property
    def error_slice(self) -> slice:
        return slice(self.n_features, self.n_features + self.n_layers * self.n_pos)

    @property
    def embed_slice(self) -> slice:
        return slice(self.error_slice.stop, self.error_slice.stop + self.n_pos)

    @property
    def logit_slice(self) -> slice:
        return slice(self.embed_slice.stop, self.embed_slice.stop + len(self.logits))

    def place(self, node: int) -> tuple[str, int, int]:
        """(kind, layer, position); an embedding's layer is -1, a logit's the number of layers."""
        if node < self.error_slice.start:
            layer, pos, _ = self.features[node].tolist()
            return "feature", layer, pos
        if node < self.embed_slice.start:
            layer, pos = divmod(node - self.error_slice.start, self.n_pos)
            return "error", layer, pos
        if node < self.logit_slice.start:
            return "embedding", -1, node - self.embed_slice.start
        return "logit", self.n_layers, self.n_pos - 1


def likely_logits(logits: Tensor, share: float, most: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, as many as hold this share of the probability, `most` at most; and their probabilities."""
    probabilities, ids = logits.softmax(-1).topk(min(most, len(logits)))
    before = probabilities.cumsum(-1) - probabilities
    kept = before < share
    return ids[kept], probabilities[kept]


def find_nodes(frozen: LocalReplacement, share: float = 0.95, most: int = 10) -> Nodes:
    places = []
    for layer, acts in enumerate(frozen.acts):
        pos, feature = acts.nonzero(as_tuple=True)
        places.append(t.stack([t.full_like(pos, layer), pos, feature], 1))
    features = t.cat(places)
    if not len(features):
        fail("no feature is active on this prompt (transcoders never see its first token): give a longer one")
    acts = t.cat([of_layer[of_layer != 0] for of_layer in frozen.acts])
    logits, probabilities = likely_logits(frozen.logits, share, most)
    return Nodes(features, acts, logits, probabilities, frozen.n_layers, len(frozen.tokens))


def writes_of(frozen: LocalReplacement, nodes: Nodes) -> tuple[Tensor, Tensor, Tensor]:
    """
    Of all nodes but the logits: what each writes (node, d_model), and where, as a source of LocalReplacement.run:
    0 embeddings, 1 + layer (node), and the position (node).
    """
    features = [frozen.coders[layer].W_dec[feature] for layer, _, feature in nodes.features.tolist()]
    of_features = t.stack(features) * nodes.acts[:, None]
    written = t.cat([of_features, frozen.errors.flatten(0, 1), frozen.embed])
    layer = [nodes.place(node)[1] for node in range(nodes.logit_slice.start)]
    pos = [nodes.place(node)[2] for node in range(nodes.logit_slice.start)]
    device = written.device
    return written, 1 + t.tensor(layer, device=device), t.tensor(pos, device=device)


@dataclass
class Targets:
    """What features and logits read: a direction of one of LocalReplacement.run's reads, at a position, and a bias."""

    node: Tensor  # (target)
    read: Tensor  # (target) which of the reads
    pos: Tensor  # (target)
    direction: list[Tensor]  # [target] (d_in) or (d_model)
    bias: Tensor  # (target)
    value: Tensor  # (target) what it is in the model itself: a pre-activation, or a logit less the mean of all


@t.no_grad()
def targets_of(frozen: LocalReplacement, nodes: Nodes) -> Targets:
    directions = []
    biases = []
    values = []
    for layer, pos, feature in nodes.features.tolist():
        coder = frozen.coders[layer]
        directions.append(coder.W_enc[:, feature])
        biases.append(coder.b_enc[feature])
        values.append(coder.pre_activations(frozen.mlp_in[layer][pos])[feature])
    W_U = frozen.model.W_U.float()
    b_U = getattr(frozen.model.unembed, "b_U", getattr(frozen.model.unembed, "bias", None))
    mean_direction = W_U.mean(1)
    for token in nodes.logits.tolist():
        directions.append(W_U[:, token] - mean_direction)
        biases.append(W_U.new_zeros(()) if b_U is None else b_U[token].float() - b_U.float().mean())
        values.append(frozen.logits[token] - frozen.logits.mean())
    device = W_U.device
    node = t.cat([t.arange(nodes.n_features), t.arange(nodes.logit_slice.start, nodes.logit_slice.stop)])
    of_logits = t.tensor([[nodes.n_layers, nodes.n_pos - 1]] * len(nodes.logits), device=device)
    read, pos = t.cat([nodes.features[:, :2], of_logits]).T
    return Targets(node.to(device), read, pos, directions, t.stack(biases), t.stack(values))


#%% Attribution: the plain form, one backward pass for each target; and the same in batches
@dataclass
class AttributionGraph:
    """
    adjacency (target, source) over all nodes: what the source gives the target's pre-activation or logit, directly.
    constants (target): what biases give it. values (target): what it is in the model. Rows of errors and embeddings,
    which are given, are zero.
    """

    nodes: Nodes
    adjacency: Tensor
    constants: Tensor
    values: Tensor

    def gap(self) -> float:
        """Gate: by how much the parts miss what they should sum to, relative to the largest of its kind."""
        missed = (self.adjacency.sum(1) + self.constants - self.values).abs()
        of_kinds = []
        for kind in (slice(0, self.nodes.n_features), self.nodes.logit_slice):
            largest = self.values[kind].abs().max()
            of_kinds.append((missed[kind].max() / largest).item())
        return max(of_kinds)


def plain_attribute(frozen: LocalReplacement, nodes: Nodes) -> AttributionGraph:
    """One backward pass from each target; a source's part is what it writes times the gradient where it writes it."""
    targets = targets_of(frozen, nodes)
    written, source_of, pos_of = writes_of(frozen, nodes)
    sources = frozen.sources_here().requires_grad_()
    reads = frozen.run(sources)
    adjacency = t.zeros(len(nodes), len(nodes), device=written.device)
    for target, node in enumerate(targets.node.tolist()):
        read = reads[targets.read[target]][targets.pos[target]]
        value = read @ targets.direction[target]
        gradient = t.autograd.grad(value, sources, retain_graph=True)[0]  # (1 + layer, pos, d_model)
        for source in range(len(written)):
            adjacency[node, source] = written[source] @ gradient[source_of[source], pos_of[source]]
    return with_constants(frozen, nodes, targets, adjacency)


def attribute(frozen: LocalReplacement, nodes: Nodes, batch: int = 64) -> AttributionGraph:
    """plain_attribute, with the backward passes of `batch` targets of one layer at once."""
    targets = targets_of(frozen, nodes)
    written, source_of, pos_of = writes_of(frozen, nodes)
    sources = frozen.sources_here().requires_grad_()
    reads = frozen.run(sources)
    adjacency = t.zeros(len(nodes), len(nodes), device=written.device)
    groups = [
        group
        for layer in range(nodes.n_layers + 1)
        for group in (targets.read == layer).nonzero()[:, 0].split(batch)
        if len(group)
    ]
    for group in tqdm(groups, desc="attribution", **BAR | {"delay": 2}):
        read = reads[targets.read[group[0]]]
        asked = read.new_zeros(len(group), *read.shape)
        asked[range(len(group)), targets.pos[group]] = t.stack([targets.direction[i] for i in group.tolist()])
        gradients = t.autograd.grad(read, sources, asked, retain_graph=True, is_grads_batched=True)[0]
        at_sources = gradients[:, source_of, pos_of]  # (target, source, d_model)
        parts = einsum(at_sources, written, "target source d_model, source d_model -> target source")
        adjacency[targets.node[group], : len(written)] = parts
    return with_constants(frozen, nodes, targets, adjacency)


@t.no_grad()
def with_constants(frozen: LocalReplacement, nodes: Nodes, targets: Targets, adjacency: Tensor) -> AttributionGraph:
    """Beside the parts: what a target reads when all sources are zero, which is what biases give it."""
    reads = frozen.run(t.zeros_like(frozen.sources_here()))
    constants = adjacency.new_zeros(len(nodes))
    values = adjacency.new_zeros(len(nodes))
    for target, node in enumerate(targets.node.tolist()):
        read = reads[targets.read[target]][targets.pos[target]]
        constants[node] = read @ targets.direction[target] + targets.bias[target]
        values[node] = targets.value[target]
    return AttributionGraph(nodes, adjacency, constants, values)


#%% Influence on the logits, pruning and scores, as circuit-tracer defines them
def shares_of_input(adjacency: Tensor) -> Tensor:
    """Each target's parts by size, as shares of their sum."""
    sizes = adjacency.double().abs()
    return sizes / sizes.sum(1, keepdim=True).clamp(min=1e-10)


def influence(adjacency: Tensor, weights: Tensor) -> Tensor:
    """
    (node): how much of what reaches the logits, weighted by weights (node), comes from or by way of each node, over all
    paths: weights ((I - A)^-1 - I), with A the shares of each target's input.
    """
    shares = shares_of_input(adjacency)
    eye = t.eye(len(shares), dtype=shares.dtype, device=shares.device)
    weights = weights.to(shares)
    return t.linalg.solve((eye - shares).T, weights) - weights


def logit_weights(graph: AttributionGraph) -> Tensor:
    """(node): the probabilities of the logits, 0 elsewhere."""
    weights = t.zeros(len(graph.nodes), dtype=t.double, device=graph.adjacency.device)
    weights[graph.nodes.logit_slice] = graph.nodes.probabilities.double()
    return weights


@dataclass
class Pruned:
    nodes: Tensor  # bool (node): which are kept
    edges: Tensor  # bool (target, source)
    influence: Tensor  # (node), before pruning


def least_kept(sizes: Tensor, share: float) -> Tensor:
    """The size from which on the largest hold this share of the sum: the rule by which nodes and edges are kept."""
    ordered = sizes.flatten().sort(descending=True).values
    reached = ordered.cumsum(0) / ordered.sum()
    return ordered[min(int(t.searchsorted(reached, share)), len(ordered) - 1)]


def prune(graph: AttributionGraph, node_share: float = 0.8, edge_share: float = 0.98) -> Pruned:
    """
    The nodes that hold node_share of all influence, embeddings and logits besides; between them the edges that hold
    edge_share of it; and of these nodes those that lead somewhere, features only where something reaches them.
    """
    nodes = graph.nodes
    weights = logit_weights(graph)
    of_nodes = influence(graph.adjacency, weights)
    if not of_nodes.any():
        fail("nothing on this prompt has any influence on the logits: there is no graph to prune")
    kept = of_nodes >= least_kept(of_nodes, node_share)
    kept[nodes.embed_slice.start :] = True
    between = graph.adjacency * kept[:, None] * kept[None]
    of_targets = influence(between, weights) + weights
    of_edges = shares_of_input(between) * of_targets[:, None]
    edges = (of_edges >= least_kept(of_edges, edge_share)) & (of_edges > 0)
    is_feature = t.zeros_like(kept)
    is_feature[: nodes.n_features] = True
    is_error = t.zeros_like(kept)
    is_error[nodes.error_slice] = True
    while True:
        leads_nowhere = (is_feature | is_error) & ~edges.any(0)
        unreached = is_feature & ~edges.any(1)
        gone = kept & (leads_nowhere | unreached)
        if not gone.any():
            return Pruned(kept, edges, of_nodes)
        kept = kept & ~gone
        edges = edges & kept[:, None] & kept[None]


def replacement_score(graph: AttributionGraph) -> float:
    """The share of influence that comes from embeddings, of what comes from embeddings and errors: 1 without errors."""
    of_nodes = influence(graph.adjacency, logit_weights(graph))
    from_embeddings = of_nodes[graph.nodes.embed_slice].sum()
    from_errors = of_nodes[graph.nodes.error_slice].sum()
    return (from_embeddings / (from_embeddings + from_errors)).item()


def completeness_score(graph: AttributionGraph) -> float:
    """
    The share of nodes' inputs that is no error's, mean of the nodes weighted by their influence. Errors and embeddings,
    which have no inputs, count as complete (as in circuit-tracer).
    """
    weights = logit_weights(graph)
    of_nodes = influence(graph.adjacency, weights) + weights
    from_errors = shares_of_input(graph.adjacency)[:, graph.nodes.error_slice].sum(1)
    return (((1 - from_errors) * of_nodes).sum() / of_nodes.sum()).item()


#%% Testing edges: a feature is taken out of the model itself, and every later node's change is measured
def keep(value: Tensor) -> Callable:
    """A hook that puts value in the place of what it sees."""

    def fn(x: Tensor, hook: nn.Module) -> Tensor:
        return value.expand_as(x).to(x.dtype)

    return fn


Held = Literal[
    "nothing",  # the model runs on freely
    "patterns",  # attention patterns are as they were on the prompt
    "frozen",  # these and the scales of norms: what the graph freezes
    "all",  # also what other MLPs write, but for the linear part of skip transcoders: only direct edges act
]


def suppress(frozen: LocalReplacement, nodes: Nodes, feature: int, hold: Held) -> Tensor:
    """
    By how much every node's pre-activation or logit less the mean (node) changes in the model itself when a feature's
    write is taken out of its MLP's output. hold: what stays as it was on the prompt.
    """
    layer, pos, number = nodes.features[feature].tolist()
    write = nodes.acts[feature] * frozen.coders[layer].W_dec[number]
    seen = {}  # by layer, what its transcoder would read now

    def listen(at: int, x: Tensor, hook: nn.Module) -> None:
        seen[at] = x[0].float()

    def take_out(at: int, y: Tensor, hook: nn.Module) -> Tensor:
        out = y.clone()
        if hold == "all":
            passed = frozen.coders[at].skipped(seen[at] - frozen.mlp_in[at]) * frozen.is_text[:, None]
            out[0] = (frozen.mlp_out[at] + passed).to(y.dtype)
        if at == layer:
            out[0, pos] -= write.to(y.dtype)
        return out

    edits = holding(frozen, hold)
    for at, coder in enumerate(frozen.coders):
        edits += [(coder.hook_in, partial(listen, at)), (coder.hook_out, partial(take_out, at))]
    with t.no_grad(), hooks(frozen.model, edits):
        logits = frozen.model(frozen.tokens[None])[0, -1].float()
    change = logits.new_zeros(len(nodes))
    at_layer, place, number = nodes.features.T
    for at, coder in enumerate(frozen.coders):
        of_layer = (at_layer == at).nonzero()[:, 0]
        moved = (seen[at] - frozen.mlp_in[at])[place[of_layer]]
        change[of_layer] = einsum(moved, coder.W_enc[:, number[of_layer]], "feature d_in, d_in feature -> feature")
    moved = (logits - logits.mean()) - (frozen.logits - frozen.logits.mean())
    change[nodes.logit_slice] = moved[nodes.logits]
    return change


def holding(frozen: LocalReplacement, hold: Held) -> list[tuple]:
    """Hooks that keep attention patterns, and with frozen or all the scales of norms, as they were on the prompt."""
    if hold == "nothing":
        return []
    edits = [(act_name("pattern", layer), keep(pattern)) for layer, pattern in enumerate(frozen.patterns)]
    if hold == "patterns":
        return edits
    for layer in range(frozen.n_layers):
        edits.append((f"blocks.{layer}.ln1.hook_scale", keep(frozen.before_attn[layer].scale)))
        edits.append((f"blocks.{layer}.ln2.hook_scale", keep(frozen.before_mlp[layer].scale)))
    return [*edits, ("ln_final.hook_scale", keep(frozen.final.scale))]


def predicted_change(graph: AttributionGraph, feature: int, direct: bool) -> Tensor:
    """
    What the graph says that every node (node) changes by when a feature is suppressed: by its edges alone (direct), or
    along all paths through features that stay active, attention, norms and errors as they were.
    """
    nodes = graph.nodes
    by_edges = -graph.adjacency[:, feature].double()
    if direct:
        return by_edges
    per_unit = graph.adjacency.double().clone()  # of a change of the source by 1
    per_unit[:, : nodes.n_features] /= nodes.acts.double()
    per_unit[:, nodes.n_features :] = 0.0  # errors and embeddings are given
    eye = t.eye(len(nodes), dtype=t.double, device=per_unit.device)
    return t.linalg.solve(eye - per_unit, by_edges)


def later_nodes(nodes: Nodes, feature: int) -> Tensor:
    """bool (node): those that a feature can reach: later layers at its position or after it, and the logits."""
    layer, pos, _ = nodes.features[feature].tolist()
    reached = t.zeros(len(nodes), dtype=t.bool, device=nodes.features.device)
    reached[: nodes.n_features] = (nodes.features[:, 0] > layer) & (nodes.features[:, 1] >= pos)
    reached[nodes.logit_slice] = True
    return reached


#%% Export: the format that circuit-tracer writes and Neuronpedia reads (schema version 1)
def cantor(x: int, y: int) -> int:
    """One number for two, as circuit-tracer numbers a layer's features."""
    return (x + y) * (x + y + 1) // 2 + y


def feature_entry(nodes: Nodes, node: int, layer: int, pos: int) -> dict:
    number = int(nodes.features[node, 2])
    return {
        "node_id": f"{layer}_{number}_{pos}",
        "jsNodeId": f"{layer}_{number}-0",
        "layer": str(layer),
        "feature": cantor(layer, number),
        "feature_type": "cross layer transcoder",
        "activation": nodes.acts[node].item(),
    }


def error_entry(layer: int, pos: int) -> dict:
    return {
        "node_id": f"{layer}_-1_{pos}",
        "jsNodeId": f"{layer}_-1-{pos}",
        "layer": str(layer),
        "feature": -1,
        "feature_type": "mlp reconstruction error",
    }


def embedding_entry(token: int, pos: int) -> dict:
    return {
        "node_id": f"E_{token}_{pos}",
        "jsNodeId": f"E_{token}-{pos}",
        "layer": "E",
        "feature": pos,
        "feature_type": "embedding",
    }


def logit_entry(nodes: Nodes, node: int, pos: int, word: str) -> dict:
    at = node - nodes.logit_slice.start
    token = int(nodes.logits[at])
    probability = nodes.probabilities[at].item()
    top = str(nodes.n_layers + 1)
    return {
        "node_id": f"{top}_{token}_{pos}",
        "jsNodeId": f"L_{token}-{pos}",
        "layer": top,
        "feature": token,
        "feature_type": "logit",
        "token_prob": probability,
        "is_target_logit": at == 0,
        "clerp": f'Output "{word}" (p={probability:.3f})',
        "influence": None,
    }


def node_entry(frozen: LocalReplacement, nodes: Nodes, node: int, words: list[str], share: float) -> dict:
    """share: the cumulative share of influence at which the node comes, the most influential first."""
    kind, layer, pos = nodes.place(node)
    entry = {"ctx_idx": pos, "run_idx": 0, "reverse_ctx_idx": 0, "clerp": "", "influence": share, "activation": None}
    entry |= {"token_prob": 0.0, "is_target_logit": False}
    if kind == "feature":
        return entry | feature_entry(nodes, node, layer, pos)
    if kind == "error":
        return entry | error_entry(layer, pos)
    if kind == "embedding":
        return entry | embedding_entry(int(frozen.tokens[pos]), pos)
    return entry | logit_entry(nodes, node, pos, words[node])


def export_graph(
    frozen: LocalReplacement,
    graph: AttributionGraph,
    pruned: Pruned,
    words: list[str],
    tokens: list[str],
    slug: str,
    scan: str,
) -> dict:
    """The pruned graph as JSON holds it. words: each node's name; scan: which model and transcoders."""
    nodes = graph.nodes
    order = pruned.influence.argsort(descending=True)
    reached = (pruned.influence[order].cumsum(0) / pruned.influence.sum()).tolist()
    share = dict(zip(order.tolist(), reached))
    kept = pruned.nodes.nonzero()[:, 0].tolist()
    entries = {node: node_entry(frozen, nodes, node, words, share[node]) for node in kept}
    links = []
    for target, source in pruned.edges.nonzero().tolist():
        link = {"source": entries[source]["node_id"], "target": entries[target]["node_id"]}
        links.append(link | {"weight": graph.adjacency[target, source].item()})
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": tokens,
            "prompt": "".join(tokens),
            "node_threshold": None,
            "schema_version": 1,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": list(entries.values()),
        "links": links,
    }
