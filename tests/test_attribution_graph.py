"""attribution_graph.py: against the model itself with features taken out, a model computed by hand, and the definitions."""

import json

import pytest
import torch as t
from conftest import save_folder, tiny_hf
from test_transcoders import random_coder

from attribution_graph import (
    AttributionGraph,
    LocalReplacement,
    Nodes,
    Pruned,
    attribute,
    cantor,
    completeness_score,
    export_graph,
    find_nodes,
    influence,
    later_nodes,
    least_kept,
    likely_logits,
    logit_weights,
    plain_attribute,
    predicted_change,
    prune,
    replacement_score,
    suppress,
)
from hooks import run_with_hooks
from llama_block import Llama, LlamaConfig
from transcoders import Transcoder
from utils import load_model

TOKENS = t.tensor([0, 7, 31, 12, 7, 3])


def tiny_llama(**changes) -> Llama:
    """Grouped queries and biases, with weights so large that a wrong formula shows."""
    t.manual_seed(0)
    shape = {"n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_model": 12, "d_head": 6, "d_mlp": 24, "d_vocab": 50}
    model = Llama(LlamaConfig(**shape | {"n_ctx": 32, "qkv_bias": True, "o_bias": True} | changes))
    for p in model.parameters():
        p.data += 0.25 * t.randn_like(p)
    return model.eval().requires_grad_(False)


def frozen_of(model, skip: bool, bos: int | None = 0, tokens: t.Tensor = TOKENS) -> LocalReplacement:
    coders = [random_coder(skip, layer) for layer in range(model.cfg.n_layers)]
    return LocalReplacement(model, coders, tokens, bos)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "skip"])
def traced(request) -> tuple[LocalReplacement, AttributionGraph]:
    frozen = frozen_of(tiny_llama(), request.param)
    return frozen, attribute(frozen, find_nodes(frozen, 0.9, 5))


# %% The replacement model and the edges
def test_the_frozen_model_is_the_model_and_the_parts_sum_to_every_node(traced):
    frozen, graph = traced
    assert frozen.gap() < 1e-5
    assert graph.gap() < 1e-5
    assert graph.nodes.n_features > 30 and len(graph.nodes.logits) == 5
    logits = frozen.model(TOKENS[None])[0, -1]
    expected = logits[graph.nodes.logits] - logits.mean()
    t.testing.assert_close(graph.values[graph.nodes.logit_slice], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_both_forms_of_attribution_agree(skip):
    frozen = frozen_of(tiny_llama(), skip, tokens=TOKENS[:3])
    nodes = find_nodes(frozen, 0.9, 3)
    graph = attribute(frozen, nodes, batch=7)
    plain = plain_attribute(frozen, nodes)
    t.testing.assert_close(graph.adjacency, plain.adjacency, rtol=1e-4, atol=1e-5)
    t.testing.assert_close(graph.constants, plain.constants)


def test_an_edge_is_what_taking_the_feature_out_of_the_model_does_while_all_else_is_held(traced):
    frozen, graph = traced
    strongest = graph.adjacency.abs().sum(0)[: graph.nodes.n_features].argsort(descending=True)[:8]
    for feature in strongest.tolist():
        later = later_nodes(graph.nodes, feature)
        change = suppress(frozen, graph.nodes, feature, hold="all")
        t.testing.assert_close(
            change[later], predicted_change(graph, feature, True).float()[later], rtol=1e-3, atol=1e-5
        )
        assert change[~later].abs().max() < 1e-6
        assert change[later].abs().max() > 1e-2


def test_with_less_held_it_is_a_plain_edit_of_the_model(traced):
    frozen, graph = traced
    nodes = graph.nodes
    model = frozen.model
    in_last = (nodes.features[:, 0] == 2) & (nodes.features[:, 1] == nodes.n_pos - 1)
    feature = int(in_last.nonzero()[0, 0])
    write = nodes.acts[feature] * frozen.coders[2].W_dec[nodes.features[feature, 2]]

    def without(x, hook):
        y = x.clone()
        y[0, -1] -= write
        return y

    logits = run_with_hooks(model, TOKENS[None], [("blocks.2.hook_mlp_out", without)])[0, -1]
    moved = (logits - logits.mean()) - (frozen.logits - frozen.logits.mean())
    for hold in ("nothing", "patterns"):  # nothing attends behind the last layer
        change = suppress(frozen, nodes, feature, hold=hold)
        t.testing.assert_close(change[nodes.logit_slice], moved[nodes.logits], rtol=1e-4, atol=1e-5)
    change = suppress(frozen, nodes, feature, hold="frozen")  # with the final norm held the edge is all there is
    expected = -graph.adjacency[nodes.logit_slice, feature]
    t.testing.assert_close(change[nodes.logit_slice], expected, rtol=1e-3, atol=1e-5)
    assert (expected - moved[nodes.logits]).abs().max() > 1e-3


def test_errors_and_embeddings_too_are_what_the_model_says(traced):
    """One error and one embedding changed in the model, all frozen: what every feature of the next layer reads moves so."""
    frozen, graph = traced
    nodes = graph.nodes
    model = frozen.model
    first = nodes.features[:, 0] == 0

    def keep(value):
        return lambda x, hook: value.expand_as(x)

    edits = [("blocks.0.attn.hook_pattern", keep(frozen.patterns[0]))]
    edits += [
        (f"blocks.0.{norm}.hook_scale", keep(of[0].scale))
        for norm, of in (("ln1", frozen.before_attn), ("ln2", frozen.before_mlp))
    ]
    read = {}

    def without(x, hook):
        y = x.clone()
        y[0, 2] = 0
        return y

    def listen(x, hook):
        read["x"] = x[0]

    run_with_hooks(model, TOKENS[None], [*edits, ("hook_embed", without), (frozen.coders[0].hook_in, listen)])
    moved = [
        (read["x"][pos] - frozen.mlp_in[0][pos]) @ frozen.coders[0].W_enc[:, f]
        for _, pos, f in nodes.features[first].tolist()
    ]
    edges = graph.adjacency[: nodes.n_features][first][:, nodes.embed_slice.start + 2]
    t.testing.assert_close(t.stack(moved), -edges, rtol=1e-3, atol=1e-5)
    assert edges.abs().max() > 0.1
    # an error of the last layer reaches the logits through the final norm alone
    last = nodes.error_slice.stop - 1
    end = frozen.errors[-1, -1] / frozen.final.scale[-1] * model.ln_final.weight
    to_logits = end @ (model.W_U[:, nodes.logits] - model.W_U.mean(1, keepdim=True))
    t.testing.assert_close(graph.adjacency[nodes.logit_slice, last], to_logits, rtol=1e-3, atol=1e-5)


def test_beginning_of_text_and_the_first_token_have_no_features():
    frozen = frozen_of(tiny_llama(), False, bos=31)
    assert set(find_nodes(frozen).features[:, 1].tolist()) == {1, 3, 4, 5}
    t.testing.assert_close(frozen.errors[:, [0, 2]], t.stack(frozen.mlp_out)[:, [0, 2]])


def test_a_model_by_hand():
    """No attention, one feature: the token's embedding makes it fire, and it alone makes the answer."""
    model = tiny_llama(n_layers=1, qkv_bias=False, o_bias=False)
    for p in model.parameters():
        p.data.zero_()
    model.embed.weight.data[3, 0] = 2.0
    model.unembed.weight.data[9, 1] = 5.0  # the answer's logit reads dimension 1
    for norm in (model.blocks[0].ln1, model.blocks[0].ln2, model.ln_final):
        norm.weight.data.fill_(1.0)
    coder = Transcoder(12, 4, 12, False, "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out")
    for p in coder.parameters():
        p.data.zero_()
    coder.W_enc.data[0, 2] = 0.5  # feature 2 reads dimension 0,
    coder.b_enc.data[2] = -1.0
    coder.W_dec.data[2, 1] = 3.0  # and writes dimension 1
    coder.requires_grad_(False)
    model.blocks[0].mlp.forward = lambda x: coder(x)  # so that nothing is missed
    frozen = LocalReplacement(model, [coder], t.tensor([5, 3]), None)
    graph = attribute(frozen, find_nodes(frozen, 0.5, 3))
    nodes = graph.nodes
    normalized = 2 / (4 / 12) ** 0.5  # of the embedding: 2 over its root mean square
    act = 0.5 * normalized - 1
    assert nodes.features.tolist() == [[0, 1, 2]]
    assert nodes.acts.item() == pytest.approx(act, rel=1e-4)
    feature, embedding, logit = 0, nodes.embed_slice.start + 1, nodes.logit_slice.start
    assert graph.adjacency[feature, embedding].item() == pytest.approx(0.5 * normalized, rel=1e-4)
    assert graph.constants[feature].item() == pytest.approx(-1)
    scale = ((4 + (3 * act) ** 2) / 12) ** 0.5
    assert graph.adjacency[logit, feature].item() == pytest.approx(5 * 3 * act / scale * (1 - 1 / 50), rel=1e-4)
    assert graph.adjacency[logit, embedding].item() == pytest.approx(0, abs=1e-6)
    assert frozen.errors[0, 1].abs().max() < 1e-6
    assert replacement_score(graph) == pytest.approx(1)
    assert completeness_score(graph) == pytest.approx(1)


def test_what_all_paths_foresee_is_the_sum_over_paths():
    """Features 0 -> 1 -> logit and 0 -> logit; a second source is given."""
    nodes = Nodes(
        features=t.tensor([[0, 1, 5], [1, 1, 6]]),
        acts=t.tensor([2.0, 4.0]),
        logits=t.tensor([1]),
        probabilities=t.tensor([1.0]),
        n_layers=2,
        n_pos=2,
    )
    adjacency = t.zeros(len(nodes), len(nodes))
    logit = nodes.logit_slice.start
    adjacency[1, 0] = 3.0
    adjacency[logit, 0] = 0.5
    adjacency[logit, 1] = 8.0  # by 4 of activation: 2 each
    adjacency[logit, nodes.embed_slice.start] = 7.0
    graph = AttributionGraph(nodes, adjacency, t.zeros(len(nodes)), adjacency.sum(1))
    change = predicted_change(graph, 0, direct=False)
    assert change[1].item() == pytest.approx(-3)
    assert change[logit].item() == pytest.approx(-0.5 - 3 * 2)
    assert predicted_change(graph, 0, direct=True)[logit].item() == pytest.approx(-0.5)


# %% Influence, pruning and scores, by their definitions
def test_influence_is_the_sum_over_all_paths(traced):
    _, graph = traced
    weights = logit_weights(graph)
    shares = graph.adjacency.double().abs()
    shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-10)
    total = t.zeros_like(weights)
    step = weights
    for _ in range(graph.nodes.n_layers + 3):
        step = step @ shares
        total += step
    assert step.abs().max() == 0  # no path is longer
    of_nodes = influence(graph.adjacency, weights)
    t.testing.assert_close(of_nodes, total, rtol=1e-8, atol=1e-12)
    given = of_nodes[graph.nodes.error_slice].sum() + of_nodes[graph.nodes.embed_slice].sum()
    assert given.item() == pytest.approx(weights.sum().item())  # all influence begins at what is given
    score = of_nodes[graph.nodes.embed_slice].sum() / given
    assert replacement_score(graph) == pytest.approx(score.item())
    output = of_nodes + weights
    not_errors = 1 - shares[:, graph.nodes.error_slice].sum(1)
    assert completeness_score(graph) == pytest.approx((not_errors @ output / output.sum()).item())


def test_pruning_keeps_the_share_that_is_asked_for(traced):
    _, graph = traced
    nodes = graph.nodes
    pruned = prune(graph, 0.8, 0.98)
    assert pruned.nodes[nodes.embed_slice.start :].all()
    inner = pruned.nodes.clone()
    inner[nodes.embed_slice.start :] = False
    assert 0 < inner.sum() < nodes.n_features
    assert pruned.edges[:, inner].any(0).all()  # each leads somewhere
    assert not (pruned.edges.any(0) & ~pruned.nodes).any()
    features = inner.clone()
    features[nodes.n_features :] = False
    assert pruned.edges[features].any(1).all()
    assert prune(graph, 0.95, 0.98).nodes.sum() > pruned.nodes.sum()
    assert prune(graph, 0.8, 0.5).edges.sum() < pruned.edges.sum()
    least = least_kept(t.tensor([4.0, 1.0, 3.0, 2.0]), 0.7)
    assert least == 3


def test_the_likeliest_logits_hold_the_share():
    logits = t.tensor([0.1, 0.6, 0.25, 0.05]).log()
    ids, probabilities = likely_logits(logits, 0.8, 4)
    assert ids.tolist() == [1, 2] and probabilities.sum().item() == pytest.approx(0.85)
    assert len(likely_logits(logits, 0.99, 3)[0]) == 3


# %% Export and refusals
def test_the_export_has_what_circuit_tracer_writes(traced):
    frozen, graph = traced
    pruned = prune(graph, 0.8, 0.98)
    words = [str(node) for node in range(len(graph.nodes))]
    told = json.loads(json.dumps(export_graph(frozen, graph, pruned, words, list("abcdef"), "slug", "world")))
    assert set(told) == {"metadata", "qParams", "nodes", "links"}
    assert {"slug", "scan", "prompt", "prompt_tokens", "schema_version", "transcoder_list"} <= set(told["metadata"])
    ids = [node["node_id"] for node in told["nodes"]]
    assert len(set(ids)) == len(ids) == pruned.nodes.sum()
    assert all(link["source"] in ids and link["target"] in ids for link in told["links"])
    kinds = {node["feature_type"] for node in told["nodes"]}
    assert kinds == {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
    for node in told["nodes"]:
        assert {"layer", "ctx_idx", "feature", "jsNodeId", "clerp", "influence", "token_prob"} <= set(node)
        assert isinstance(node["layer"], str) and isinstance(node["feature"], int)
    of_features = [node for node in told["nodes"] if node["feature_type"] == "cross layer transcoder"]
    layer, number, pos = map(int, of_features[0]["node_id"].split("_"))
    assert of_features[0]["feature"] == cantor(layer, number) and of_features[0]["ctx_idx"] == pos
    targets = [node["is_target_logit"] for node in told["nodes"] if node["feature_type"] == "logit"]
    assert targets[0] and not any(targets[1:])
    assert (cantor(0, 0), cantor(1, 0), cantor(0, 1), cantor(2, 3)) == (0, 1, 2, 18)


def test_a_prompt_without_text_is_refused():
    with pytest.raises(SystemExit, match="no feature is active on this prompt"):
        find_nodes(frozen_of(tiny_llama(), False, tokens=TOKENS[:1]))


def test_transcoders_that_read_elsewhere_are_refused():
    model = tiny_llama(n_layers=1)
    coder = random_coder(False)
    coder.hook_in = "blocks.0.hook_resid_mid"
    with pytest.raises(SystemExit, match="reads blocks.0.hook_resid_mid: graphs are made of those that read"):
        LocalReplacement(model, [coder], TOKENS, 0)


@pytest.mark.parametrize("reads", ["ln2.hook_normalized", "mlp.hook_in"])
def test_a_bridge_s_graph_is_exact_too(tmp_path_factory, reads):
    """GPT-2: LayerNorm, biases, positions."""
    hf = tiny_hf("GPT2", vocab_size=260, n_positions=32, n_embd=12, n_layer=2, n_head=2)
    model = load_model(str(save_folder(hf, tmp_path_factory.mktemp("gpt2"))), (), "cpu").requires_grad_(False)
    coders = [random_coder(layer == 1, layer) for layer in range(2)]
    for layer, coder in enumerate(coders):
        coder.hook_in = f"blocks.{layer}.{reads}"
    frozen = LocalReplacement(model, coders, TOKENS, None)
    graph = attribute(frozen, find_nodes(frozen, 0.9, 3))
    assert frozen.gap() < 1e-4
    assert graph.gap() < 1e-4
    assert isinstance(prune(graph), Pruned)
