"""
Path patching against a second one, written with transformer_lens alone as ARENA's course does, against its plain form,
and against edge patching where the MLPs are frozen. Chain patching against edge patching, against the same by the
engine of edges, against formulas written out, and against what must come of it when a node reads all that is corrupt.
"""

import pytest
import torch as t
import torch.nn as nn
from models_for_tests import H, L, three_pairs, tiny_models

from pairs import Pairs, baselines, inputs, make_metric
from interventions import activation_patch
from graph import EdgeRun, Graph, edge_patch, plain_edge_patch, run_graph
from path_patching import chain_name, chain_patch, path_losses, path_patch, path_patch_all, read_chain, read_node

ALL = ["ours", "gpt2", "gpt_neox", "gptj", "gemma2", "olmo2"]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return three_pairs()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return tiny_models()


@pytest.fixture(scope="module")
def sixteen() -> Pairs:
    rng = t.Generator().manual_seed(1)
    clean = t.randint(1, 250, (16, 9), generator=rng)
    corrupt = clean.clone()
    corrupt[:, 3:5] = t.randint(1, 250, (16, 2), generator=rng)
    answer, wrong = t.randint(1, 250, (2, 16), generator=rng)
    return Pairs(clean=clean, corrupt=corrupt, answer=answer, wrong=wrong, answer_pos=t.full((16,), 8))


# %% A second implementation, by transformer_lens alone
class ArenaPathPatching:
    """
    Path patching of a head's z, by the course's steps: every z frozen to the original run but for the sender's, which
    comes from the new one; a receiver's q, k, v or the final stream recorded in that run; patched in in another.
    """

    def __init__(self, bridge: nn.Module, pairs: Pairs, frozen_mlps: bool):
        self.bridge = bridge
        self.pairs = pairs
        self.frozen_mlps = frozen_mlps
        _, self.orig_cache = bridge.run_with_cache(pairs.clean)
        _, self.new_cache = bridge.run_with_cache(pairs.corrupt)

    def difference(self, logits: t.Tensor) -> t.Tensor:
        rows = range(len(logits))
        return logits[rows, -1, self.pairs.answer] - logits[rows, -1, self.pairs.wrong]

    def patch_or_freeze(self, layer: int, head: int, z: t.Tensor, hook) -> t.Tensor:
        name = f"blocks.{hook_layer(hook)}.attn.hook_z"
        new = self.orig_cache[name].clone()
        if hook_layer(hook) == layer:
            new[:, :, head] = self.new_cache[name][:, :, head]
        return new

    def record(self, layer: int, head: int, wanted: list[str]) -> dict[str, t.Tensor]:
        recorded = {}

        def freeze_mlp(x, hook):
            return self.orig_cache[f"blocks.{hook_layer(hook)}.hook_mlp_out"]

        fwd_hooks = []
        for name in wanted:
            fwd_hooks.append((name, lambda x, hook, name=name: recorded.update({name: x.clone()})))
        for l in range(L):
            fwd_hooks.append((f"blocks.{l}.attn.hook_z", lambda x, hook: self.patch_or_freeze(layer, head, x, hook)))
            if self.frozen_mlps:
                fwd_hooks.append((f"blocks.{l}.hook_mlp_out", freeze_mlp))
        self.bridge.run_with_hooks(self.pairs.clean, fwd_hooks=fwd_hooks)
        return recorded

    def to_logits(self, layer: int, head: int) -> t.Tensor:
        last = f"blocks.{L - 1}.hook_resid_post"
        final = self.record(layer, head, [last])[last]
        return self.difference(self.bridge.unembed(self.bridge.ln_final(final)))

    def to_heads(self, layer: int, head: int, input: str, receivers: list[tuple[int, int]]) -> t.Tensor:
        names = [f"blocks.{l}.attn.hook_{input}" for l in sorted({l for l, _ in receivers})]
        recorded = self.record(layer, head, names)

        def patch_head_input(x, hook):
            heads = [h for l, h in receivers if l == hook_layer(hook)]
            x = x.clone()
            x[:, :, heads] = recorded[f"blocks.{hook_layer(hook)}.attn.hook_{input}"][:, :, heads]
            return x

        logits = self.bridge.run_with_hooks(self.pairs.clean, fwd_hooks=[(name, patch_head_input) for name in names])
        return self.difference(logits)


def hook_layer(hook) -> int:
    return int(hook.name.split("blocks.")[1].split(".")[0])


@t.no_grad()
@pytest.mark.parametrize("mlps", ["free", "frozen"])
def test_path_patching_is_arenas_on_sixteen_pairs(models, sixteen, mlps):
    model = models["gpt2"]
    graph = Graph(model)
    arena = ArenaPathPatching(model, sixteen, mlps == "frozen")
    clean, _ = baselines(model, sixteen, "logit_diff")
    moved = []
    for layer, head in ((0, 1), (0, 3), (1, 2), (2, 0)):
        found = path_patch(model, graph, sixteen, f"L{layer}H{head}", ["logits"], mlps=mlps)
        t.testing.assert_close(found, arena.to_logits(layer, head), atol=1e-4, rtol=1e-4)
        moved.append((found - clean).abs().max().item())
    receivers = [(1, 0), (1, 3), (2, 1)]
    for input in ("q", "k", "v"):
        for layer, head in ((0, 0), (0, 2), (1, 1)):
            names = [f"L{l}H{h}.{input}" for l, h in receivers]
            found = path_patch(model, graph, sixteen, f"L{layer}H{head}", names, mlps=mlps)
            t.testing.assert_close(found, arena.to_heads(layer, head, input, receivers), atol=1e-4, rtol=1e-4)
            moved.append((found - clean).abs().max().item())
    assert min(moved) > 1e-3


# %% The engine, and what the two settings share
def receivers_to_try(graph: Graph) -> list[list[str]]:
    """The logits, one input, and several of one kind, in one layer and in two."""
    return [
        ["logits"],
        graph.receivers_of(["L1H0", "L2H3"], "k"),
        graph.receivers_of(["L2H1", "L2H2"], "v"),
        ["L0 MLP", "L1 MLP"],
    ]


@t.no_grad()
@pytest.mark.parametrize("name", ["ours", "gpt2", "gpt_neox", "gemma2"])
def test_all_senders_at_once_equal_the_plain_form(models, pairs, name):
    model = models[name]
    graph = Graph(model)
    clean, _ = baselines(model, pairs, "logit_diff")
    for receivers in receivers_to_try(graph):
        values = path_patch_all(model, graph, pairs, receivers, memory_gb=1e-2)
        assert (values - clean).abs().max() > 1e-3, receivers
        for writer in ("embed", "L0H1", "L0 MLP", "L1H2"):
            expected = path_patch(model, graph, pairs, writer, receivers)
            found = values[graph.writers.index(writer)]
            t.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=f"{writer} to {receivers}")


@t.no_grad()
@pytest.mark.parametrize("name", ["ours", "gpt2", "gpt_neox", "gptj", "gemma2", "olmo2"])
def test_with_frozen_mlps_one_receiver_reads_one_edge_and_with_free_ones_more(models, pairs, name):
    model = models[name]
    graph = Graph(model)
    clean, _ = baselines(model, pairs, "logit_diff")
    for writer, receiver in (
        ("L0H1", "logits"),
        ("L0H1", "L2 MLP"),
        ("embed", graph.receivers_of(["L2H2"], "v")[0]),
    ):
        edge = plain_edge_patch(model, graph, pairs, writer, receiver)
        frozen = path_patch(model, graph, pairs, writer, [receiver], mlps="frozen")
        t.testing.assert_close(frozen, edge, atol=1e-4, rtol=1e-4, msg=f"{writer} to {receiver}")
        free = path_patch(model, graph, pairs, writer, [receiver])
        assert (edge - clean).abs().max() > 1e-4
        assert (free - edge).abs().max() > 1e-4, f"{writer} to {receiver}: no path runs through an MLP"


@t.no_grad()
def test_from_the_last_layer_both_are_one_edge_and_losses_follow_the_choice(models, pairs):
    model = models["ours"]
    graph = Graph(model)
    heads = [graph.writers.index(f"L{L - 1} MLP")]
    by_path = path_losses(model, graph, pairs, ["logits"], "logit_diff")
    by_edge = path_losses(model, graph, pairs, ["logits"], "logit_diff", by="edge_patch")
    t.testing.assert_close(by_path[heads], by_edge[heads], atol=1e-4, rtol=0)
    before = [graph.writers.index(f"L0H{head}") for head in range(H)]
    assert (by_path[before] - by_edge[before]).abs().max() > 1e-2
    clean, _ = baselines(model, pairs, "logit_diff")
    edge = plain_edge_patch(model, graph, pairs, "L0H2", "logits")
    t.testing.assert_close(by_edge[graph.writers.index("L0H2")], clean - edge, atol=1e-4, rtol=0)


@t.no_grad()
def test_without_heads_between_free_paths_are_all_paths(models, pairs):
    """From the last layer's heads every path to the logits is direct: path patching is activation patching of z."""
    for name in ("ours", "gpt2", "gpt_neox"):
        model = models[name]
        clean, _ = baselines(model, pairs, "logit_diff")
        found = path_patch(model, Graph(model), pairs, f"L{L - 1}H1", ["logits"])
        expected = activation_patch(model, pairs, "z", L - 1, head=1, direction="noise")
        t.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert (found - clean).abs().max() > 1e-3


@t.no_grad()
def test_several_senders_with_frozen_mlps_are_several_edges(models, pairs):
    model = models["ours"]
    graph = Graph(model)
    senders = ["L0H1", "L0H2", "L1 MLP"]
    edges = edge_patch(model, graph, pairs, graph.edges(senders, ["L2 MLP"])[None])[0]
    found = path_patch(model, graph, pairs, senders, ["L2 MLP"], mlps="frozen")
    t.testing.assert_close(found, edges, atol=1e-4, rtol=1e-4)
    alone = path_patch(model, graph, pairs, senders[0], ["L2 MLP"], mlps="frozen")
    assert (alone - edges).abs().max() > 1e-3


# %% Chains
def patched_by(model: nn.Module, graph: Graph, pairs: Pairs, text: str) -> t.Tensor:
    return chain_patch(model, graph, pairs, read_chain(graph, text))


@t.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_a_chain_of_one_edge_is_edge_patching(models, pairs, name):
    model = models[name]
    graph = Graph(model)
    clean, _ = baselines(model, pairs, "logit_diff")
    texts = []
    masks = []
    for w, r in graph.is_edge.nonzero()[::37].tolist():
        texts.append(f"{graph.writers[w]} -> {graph.receiver_names[r]}")
        masks.append(graph.edges([graph.writers[w]], [graph.receiver_names[r]]))
    for text, senders, readers in (
        ("L0H1 -> L2H1", ["L0H1"], [graph.receivers_of(["L2H1"], input)[0] for input in ("q", "k", "v")]),
        ("L0H1 + L0H3 + L1 MLP -> L2H2.k", ["L0H1", "L0H3", "L1 MLP"], graph.receivers_of(["L2H2"], "k")),
        ("embed -> L1 MLP + L2 MLP", ["embed"], ["L1 MLP", "L2 MLP"]),
        ("L0H0 -> L2H0 + L2H1", ["L0H0"], [r for i in "qkv" for r in graph.receivers_of(["L2H0", "L2H1"], i)]),
    ):
        texts.append(text)
        masks.append(graph.edges(senders, readers))
    expected = edge_patch(model, graph, pairs, t.stack(masks))
    for text, values in zip(texts, expected):
        t.testing.assert_close(patched_by(model, graph, pairs, text), values, atol=1e-4, rtol=1e-4, msg=text)
    assert (expected - clean).abs().amax(1)[-4:].min() > 1e-3


def patched_by_engine(model: nn.Module, graph: Graph, pairs: Pairs, text: str) -> t.Tensor:
    """chain_patch by the engine: in each run the edges of one hop are swapped, and the writes read off its gaps."""
    clean = run_graph(model, graph, pairs, "clean")
    other = run_graph(model, graph, pairs, "corrupt").writes
    senders, *hops = read_chain(graph, text)
    names = [writer for node in senders for writer in node.writers]
    for nodes in hops:
        heard = other
        other = clean.writes.clone()
        for node in nodes:
            swap = graph.edges(names, node.receivers).expand(len(pairs), -1, -1)
            run = EdgeRun(model, graph, swap, heard)
            logits = run.run(inputs(model, pairs, "clean"), pairs.answer_pos)
            writes = heard - t.cat(run.gaps, 2)
            for writer in node.writers:
                w = graph.writers.index(writer)
                other[:, :, w] = writes[:, :, w]
        names = [writer for node in nodes for writer in node.writers]
    return make_metric(pairs, "logit_diff")(logits, pairs.index)


@t.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_longer_chains_are_the_engines_edges_hop_by_hop(models, pairs, name):
    model = models[name]
    graph = Graph(model)
    clean, _ = baselines(model, pairs, "logit_diff")
    for text in (
        "L0H1 -> L2H0.k -> logits",
        "embed -> L0H2 -> L1H3.v -> L2 MLP -> logits",
        "L0H1 + L0H3 -> L1 MLP -> L2H1",
        "L0 MLP -> L1H0.q + L1H2 + L2H1 -> logits",
    ):
        found = patched_by(model, graph, pairs, text)
        t.testing.assert_close(found, patched_by_engine(model, graph, pairs, text), atol=1e-5, rtol=1e-5, msg=text)
        assert (found - clean).abs().max() > 1e-4, text


@t.no_grad()
def test_a_chain_by_formulas_written_out(models, pairs):
    """L0H1 -> L1H2.k -> L2 MLP -> logits of GPT-2, by transformer_lens's caches and the weights alone."""
    model = models["gpt2"]
    pairs = pairs.take(slice(0, 2))  # their answers stand last
    _, clean = model.run_with_cache(pairs.clean)
    _, corrupt = model.run_with_cache(pairs.corrupt)

    first = model.blocks[0].attn
    sent = (corrupt["blocks.0.attn.hook_z"] - clean["blocks.0.attn.hook_z"])[:, :, 1] @ first.W_O[1]

    attn = model.blocks[1].attn
    normed = model.blocks[1].ln1(clean["blocks.1.hook_resid_pre"] + sent)
    k = normed @ attn.W_K[2] + attn.b_K[2]
    scores = clean["blocks.1.attn.hook_q"][:, :, 2] @ k.mT / k.shape[-1] ** 0.5
    future = t.ones_like(scores, dtype=t.bool).triu(1)
    pattern = scores.masked_fill(future, -t.inf).softmax(-1)
    z = pattern @ clean["blocks.1.attn.hook_v"][:, :, 2]
    passed = (z - clean["blocks.1.attn.hook_z"][:, :, 2]) @ attn.W_O[2]

    block = model.blocks[2]
    written = block.mlp(block.ln2(clean["blocks.2.hook_resid_mid"] + passed)) - clean["blocks.2.hook_mlp_out"]
    logits = model.unembed(model.ln_final(clean["blocks.2.hook_resid_post"] + written))[:, -1]
    expected = logits[range(2), pairs.answer] - logits[range(2), pairs.wrong]
    found = patched_by(model, Graph(model), pairs, "L0H1 -> L1H2.k -> L2 MLP -> logits")
    t.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - baselines(model, pairs, "logit_diff")[0]).abs().max() > 1e-4


@t.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_a_node_that_reads_all_that_is_corrupt_passes_on_its_corrupt_write(models, pairs, name):
    """But for a head behind a norm after attention (Gemma 2, OLMo 2): its scale is of all heads, the others clean."""
    model = models[name]
    graph = Graph(model)
    nodes = ["L1 MLP"] if name in ("gemma2", "olmo2") else ["L1 MLP", "L1H2"]
    for node in nodes:
        reads = graph.edges(graph.writers, read_node(graph, node).receivers).any(1)
        before = " + ".join(writer for writer, on in zip(graph.writers, reads) if on)
        for rest in ("logits", "L2H0.v", "L2 MLP -> logits"):
            longer = patched_by(model, graph, pairs, f"{before} -> {node} -> {rest}")
            shorter = patched_by(model, graph, pairs, f"{node} -> {rest}")
            t.testing.assert_close(longer, shorter, atol=1e-4, rtol=1e-4, msg=f"{node} -> {rest}")


def test_paths_are_read_by_the_graphs_names_and_what_it_lacks_is_said_in_a_line(models):
    ours = Graph(models["ours"])  # two heads share keys and values
    assert chain_name(read_chain(ours, "L0H1+L0H3->L2H1->logits")) == (
        "L0H1 + L0H3 -> L2H1.q + L2H0-1.k + L2H0-1.v -> logits"
    )
    assert read_node(ours, "L2H0.k") == (["L2H0-1.k"], ["L2H0"])
    assert read_node(ours, "L2H0-1.k") == (["L2H0-1.k"], ["L2H0", "L2H1"])
    parallel = Graph(models["gpt_neox"])
    for graph, text, words in (
        (ours, "L2H0 -> L1H0.q", "no edge from L2H0 to L1H0.q, which reads what is written before it: embed, L0H0,"),
        (parallel, "L1H0 -> L1 MLP", "no edge from L1H0 to L1 MLP"),
        (ours, "L0H1", "has one step"),
        (ours, "L9H1 -> logits", "embed, L0H0 to L2H3 and L0 MLP to L2 MLP"),
        (ours, "L0H1 -> L1H0.x", "nothing named 'L1H0.x' reads"),
        (ours, "L0H1 -> embed", "nothing named 'embed' reads"),
        (ours, "L0H1 -> logits -> L2H0", "the logits are the last step"),
        (ours, "L0H1 -> L1 MLP + logits", "the logits are a step of their own"),
        (ours, "L0H1 + L0H1 -> logits", "L0H1 stands twice"),
    ):
        with pytest.raises(SystemExit) as end:
            read_chain(graph, text)
        assert words in str(end.value)
        assert "\n" not in str(end.value)
    read_chain(ours, "L1H0 -> L1 MLP")
