"""
The engine of edges against plain forms written out by hand, against activation patching, against closed forms, and
against hand-built models whose answer is known.
"""

import pytest
import torch as t
import torch.nn as nn
from conftest import ROOT, memory_for
from models_for_tests import H, L, three_pairs, tiny_models

from hooks import act_name, peak_bytes, run_with_cache, run_with_hooks
from pairs import Pairs, baselines, draw_pairs, find_places, make_metric, normalised
from interventions import sweep
from graph import Graph, abc_prompts, edge_patch, mean_of_reference, plain_edge_patch, write_differences
from path_patching import path_patch, path_patch_all, self_repair, trace_back
from eap import (
    agreement,
    eap,
    eap_ig,
    eap_ig_activations,
    plain_eap,
    plain_eap_ig,
    plain_eap_ig_activations,
)
from circuit_search import (
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
from roles import RoleSearch, find_roles
from llama_block import Llama, LlamaConfig


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return three_pairs()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return tiny_models()


@pytest.fixture(scope="module")
def world() -> Llama:
    return Llama.from_folder(str(ROOT / "models/world")).requires_grad_(False)


def single(graph: Graph) -> tuple[t.Tensor, t.Tensor]:
    """(edges (edge, 2), masks with one edge each)."""
    edges = graph.is_edge.nonzero()
    masks = t.zeros(len(edges), *graph.is_edge.shape, dtype=t.bool)
    masks[range(len(edges)), edges[:, 0], edges[:, 1]] = True
    return edges, masks


# %% The graph
def count_edges(layers: int, heads: int) -> int:
    """By counting: q, k, v of each head and the MLP read all before them, the logits read everything."""
    total = 1 + layers * (heads + 1)
    for layer in range(layers):
        before = 1 + layer * (heads + 1)
        total += 3 * heads * before + before + heads
    return total


def test_the_edges_are_counted_named_and_linked(models, world):
    graph = Graph(models["gpt2"])
    assert int(graph.is_edge.sum()) == count_edges(L, H)
    assert graph.writers[:7] == ["embed", "L0H0", "L0H1", "L0H2", "L0H3", "L0 MLP", "L1H0"]
    assert graph.receiver_names[3:5] == ["L0H3.q", "L0H0.k"] and graph.receiver_names[-2:] == [
        f"L{L - 1} MLP",
        "logits",
    ]
    assert graph.receivers_of(["L1H2", "L2 MLP"], "k") == ["L1H2.k"]
    assert graph.receivers_of(["L1H2", "L2 MLP"], "MLP") == ["L2 MLP"]
    grouped = Graph(models["ours"])  # four heads, two groups
    assert grouped.receivers_of(["L1H2", "L1H3"], "k") == ["L1H2-3.k"] and grouped.receivers_of(["L1H1"], "q") == [
        "L1H1.q"
    ]
    assert graph.serial and not Graph(models["gpt_neox"]).serial
    assert graph.edges(["L1H0"], ["L1 MLP"]).any() and not graph.edges(["L1H0"], ["L1H1.q"]).any()
    assert not Graph(models["gpt_neox"]).edges(["L1H0"], ["L1 MLP"]).any()
    assert int(Graph(world).is_edge.sum()) == 479


# %% The engine gives what the plain forms give
@t.no_grad()
@pytest.mark.parametrize("name", ["ours", "gpt2", "gpt_neox", "gptj", "gemma2", "olmo2"])
def test_every_single_edge_equals_plain_edge_patching(models, pairs, name):
    model = models[name]
    graph = Graph(model)
    edges, masks = single(graph)
    chosen = range(0, len(edges), 5)
    values = edge_patch(model, graph, pairs, masks[chosen], "logit_diff", memory_gb=1e-2)
    clean, _ = baselines(model, pairs, "logit_diff")
    assert (values - clean).abs().max() > 0.05
    for value, i in zip(values, chosen):
        writer, receiver = graph.writers[edges[i, 0]], graph.receiver_names[edges[i, 1]]
        expected = plain_edge_patch(model, graph, pairs, writer, receiver)
        t.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4, msg=f"{writer} to {receiver}")


@pytest.mark.parametrize("name", ["ours", "gpt2", "gpt_neox", "gptj", "gemma2", "olmo2"])
def test_eap_and_eap_ig_of_every_edge_equal_their_plain_forms(models, pairs, name):
    model = models[name]
    graph = Graph(model)
    for metric, every in (("logit_diff", 1), ("log_prob", 5)):
        receivers = graph.receiver_names[::every]
        plain = t.stack([plain_eap(model, graph, pairs, r, metric) for r in receivers], 1)
        plain_ig = t.stack([plain_eap_ig(model, graph, pairs, r, metric, steps=3) for r in receivers], 1)
        assert plain.abs().max() > 0.05 and (plain - plain_ig).abs().max() > 0.01
        found = eap(model, graph, pairs, metric, memory_gb=1e-2)[:, ::every]
        found_ig = eap_ig(model, graph, pairs, metric, 3, memory_gb=1e-2)[:, ::every]
        t.testing.assert_close(found, plain, atol=1e-4, rtol=1e-3)
        t.testing.assert_close(found_ig, plain_ig, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["ours", "gpt2", "gpt_neox", "gemma2"])
def test_eap_ig_on_activations_equals_its_plain_form_and_from_the_embedding_eap_ig(models, pairs, name):
    model = models[name]
    graph = Graph(model)
    found = eap_ig_activations(model, graph, pairs, steps=2, memory_gb=1e-2)
    for receiver in ("L1 MLP", "logits", graph.receivers_of(["L1H1"], "v")[0]):
        plain = plain_eap_ig_activations(model, graph, pairs, receiver, steps=2)
        column = found[:, graph.receiver_names.index(receiver)]
        assert plain.abs().max() > 1e-3
        t.testing.assert_close(column, plain, atol=1e-4, rtol=1e-3, msg=receiver)
    on_inputs = eap_ig(model, graph, pairs, steps=2)
    t.testing.assert_close(found[0], on_inputs[0], atol=1e-4, rtol=1e-3)
    assert (found[1:] - on_inputs[1:]).abs().max() > 1e-3


def test_on_the_world_model_the_engine_gives_what_the_plain_forms_give(world):
    graph = Graph(world)
    few = draw_pairs(world, "ioi", 3, 0)
    edges, masks = single(graph)
    chosen = range(0, len(edges), 9)
    values = edge_patch(world, graph, few, masks[chosen], memory_gb=0.05)
    for value, i in zip(values, chosen):
        writer, receiver = graph.writers[edges[i, 0]], graph.receiver_names[edges[i, 1]]
        expected = plain_edge_patch(world, graph, few, writer, receiver)
        t.testing.assert_close(value, expected, atol=1e-3, rtol=1e-4, msg=f"{writer} to {receiver}")
    plain = t.stack([plain_eap(world, graph, few, receiver) for receiver in graph.receiver_names], 1)
    plain_ig = t.stack([plain_eap_ig(world, graph, few, receiver, steps=2) for receiver in graph.receiver_names], 1)
    for engine, form in (
        (eap(world, graph, few, memory_gb=0.05), plain),
        (eap_ig(world, graph, few, steps=2, memory_gb=0.05), plain_ig),
    ):
        assert form.abs().max() > 1
        t.testing.assert_close(engine, form, atol=1e-4 * form.abs().max().item(), rtol=0)


@t.no_grad()
def test_single_paths_equal_receivers_recomputed_by_hand(models, pairs):
    """
    The receiver's input with the sender's corrupt write, through the real norm and weights, patched in as q, k, v or
    MLP output.
    """
    model, at = models["ours"], pairs.answer_pos
    graph = Graph(model)
    metric_fn = make_metric(pairs, "logit_diff")
    names = [act_name(site, layer) for layer in range(L) for site in ("resid_pre", "resid_mid", "resid_post", "z")]
    _, clean = run_with_cache(model, pairs.clean, names)
    _, corrupt = run_with_cache(model, pairs.corrupt, names)
    change = (corrupt["z", 0] - clean["z", 0])[:, :, 2] @ model.blocks[0].attn.W_O[2]  # sender L0H2
    block = model.blocks[2]

    def value(logits: t.Tensor) -> t.Tensor:
        return metric_fn(logits[range(3), at], pairs.index)

    expected = {}
    for input, W, b, head in (
        ("q", block.attn.W_Q, block.attn.q.bias, 3),
        ("k", block.attn.W_K, block.attn.k.bias, 1),
        ("v", block.attn.W_V, block.attn.v.bias, 0),
    ):
        new = block.ln1(clean["resid_pre", 2] + change) @ W[head] + (0 if b is None else b.view(-1, 8)[head])

        def put_head(x, hook):
            return x.index_copy(2, t.tensor([head]), new[:, :, None])

        name = f"L2H{head}.q" if input == "q" else f"L2H{2 * head}-{2 * head + 1}.{input}"
        expected[name] = value(run_with_hooks(model, pairs.clean, [(act_name(input, 2), put_head)]))
    new_mlp = block.mlp(block.ln2(clean["resid_mid", 2] + change))
    put_mlp = [("blocks.2.hook_mlp_out", lambda x, hook: new_mlp)]
    expected["L2 MLP"] = value(run_with_hooks(model, pairs.clean, put_mlp))
    expected["logits"] = value(model.unembed(model.ln_final(clean["resid_post", 2] + change)))

    masks = t.stack([graph.edges(["L0H2"], [receiver]) for receiver in expected])
    values = edge_patch(model, graph, pairs, masks)
    untouched, _ = baselines(model, pairs, "logit_diff")
    for found, (receiver, wanted) in zip(values, expected.items()):
        assert (wanted - untouched).abs().max() > 1e-3, receiver
        t.testing.assert_close(found, wanted, atol=1e-4, rtol=0, msg=receiver)
        plain = plain_edge_patch(model, graph, pairs, "L0H2", receiver)
        t.testing.assert_close(plain, wanted, atol=1e-4, rtol=0, msg=receiver)


@t.no_grad()
@pytest.mark.parametrize("name", ["gptj", "gemma2", "olmo2"])
def test_with_a_shared_norm_or_norms_after_writes_add_up_and_all_edges_are_the_corrupt_run(models, pairs, name):
    model = models[name]
    graph = Graph(model)
    miss, _ = write_differences(model, graph, pairs)
    assert miss < 1e-5
    ends = edge_patch(model, graph, pairs, t.stack([~graph.is_edge, graph.is_edge]))
    t.testing.assert_close(ends, t.stack(baselines(model, pairs, "logit_diff")), atol=1e-4, rtol=1e-4)


@t.no_grad()
@pytest.mark.parametrize("name", ["ours", "gpt2", "llama", "gpt_neox"])
def test_all_paths_are_activation_patching_of_the_sender_and_all_edges_the_corrupt_run(models, pairs, name):
    model = models[name]
    graph = Graph(model)
    clean, corrupt = baselines(model, pairs, "logit_diff")
    ends = edge_patch(model, graph, pairs, t.stack([~graph.is_edge, graph.is_edge]))
    t.testing.assert_close(ends, t.stack([clean, corrupt]), atol=1e-5, rtol=1e-5)

    everywhere = {"all": t.ones_like(pairs.clean, dtype=t.bool)}
    heads = edge_patch(model, graph, pairs, t.stack([graph.edges([head]) for head in graph.head_names])).view(L, H, 3)
    mlps = edge_patch(model, graph, pairs, t.stack([graph.edges([f"L{layer} MLP"]) for layer in range(L)]))
    t.testing.assert_close(heads, sweep(model, pairs, "z", "head", direction="noise"), atol=1e-4, rtol=0)
    swept_mlps = sweep(model, pairs, "mlp_out", direction="noise", places=everywhere)[:, 0]
    t.testing.assert_close(mlps, swept_mlps, atol=1e-4, rtol=0)

    kept = graph.is_edge & (t.rand(graph.is_edge.shape, generator=t.Generator().manual_seed(1)) < 0.2)
    pruned = graph.prune(kept)
    values = edge_patch(model, graph, pairs, t.stack([~kept, ~pruned]))
    assert 0 < pruned.sum() < kept.sum()
    t.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-5)
    t.testing.assert_close(circuit_metric(model, graph, pairs, t.stack([kept, pruned])), values, atol=1e-5, rtol=1e-5)


# %% Ablations
def indirect_objects() -> Pairs:
    """Three prompts IO .. S1 .. S2 .., or S1 first, of different lengths."""
    clean = t.tensor(
        [
            [1, 50, 20, 60, 30, 60, 40, 41],
            [1, 21, 61, 51, 31, 61, 42, 1],
            [1, 52, 22, 62, 32, 33, 62, 43],
        ]
    )
    answer, wrong = t.tensor([50, 51, 52]), t.tensor([60, 61, 62])
    corrupt = clean.clone()
    corrupt[[0, 1, 2], [5, 5, 6]] = answer
    made = Pairs(clean=clean, corrupt=corrupt, answer=answer, wrong=wrong, answer_pos=t.tensor([7, 6, 7]))
    made.places = find_places(made)
    return made


def z_replaced(model: nn.Module, pairs: Pairs, mean: t.Tensor) -> t.Tensor:
    """The metric of clean runs in which head L1H2's z (pair, pos, d_head) is this."""

    def put(z, hook):
        z = z.clone()
        z[:, :, 2] = mean
        return z

    logits = run_with_hooks(model, pairs.clean, [("blocks.1.attn.hook_z", put)])
    return make_metric(pairs, "logit_diff")(logits[pairs.index, pairs.answer_pos], pairs.index)


def test_prompts_of_the_reference_have_the_words_and_three_other_names():
    pairs = indirect_objects()
    assert {"IO", "S1", "S2"} <= pairs.places.keys()
    found = abc_prompts(pairs, t.tensor([7, 8, 9]))
    assert found.tolist() == [
        [1, 7, 20, 8, 30, 9, 40, 41],
        [1, 21, 8, 7, 31, 9, 42, 1],
        [1, 7, 22, 8, 32, 33, 9, 43],
    ]


@t.no_grad()
@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_a_head_ablated_by_the_mean_writes_the_mean_of_what_it_wrote_in_reference_prompts(models, name):
    model = models[name]
    graph = Graph(model)
    pairs = indirect_objects()
    ablation, words = mean_of_reference(model, graph, pairs, draws=5)
    assert "5 prompts" in words and "drawn names" in words
    names = ablation.args[0]
    assert names.shape == (5, 3) and all(len(set(three)) == 3 for three in names.tolist())
    mean = 0
    for three in names:
        _, cache = run_with_cache(model, abc_prompts(pairs, three), "blocks.1.attn.hook_z")
        mean = mean + cache["z", 1][:, :, 2] / 5
    all_of_the_head = graph.edges(["L1H2"])[None]
    found = edge_patch(model, graph, pairs, all_of_the_head, ablation=ablation)[0]
    t.testing.assert_close(found, z_replaced(model, pairs, mean), atol=1e-4, rtol=1e-4)
    assert (found - baselines(model, pairs, "logit_diff")[0]).abs().max() > 1e-3


@t.no_grad()
def test_pairs_without_names_are_ablated_by_the_mean_of_their_corrupt_runs(models, pairs):
    model = models["ours"]
    graph = Graph(model)
    ablation, words = mean_of_reference(model, graph, pairs, memory_gb=1e-3)
    assert "3 corrupt runs" in words
    _, cache = run_with_cache(model, pairs.corrupt, "blocks.1.attn.hook_z")
    z = cache["z", 1][:, :, 2]
    mean = t.cat([z[:, :6].mean(0), z[:2, 6:].mean(0)])  # the third pair ends at position 5
    found = edge_patch(model, graph, pairs, graph.edges(["L1H2"])[None], ablation=ablation)[0]
    t.testing.assert_close(found, z_replaced(model, pairs, mean.expand(3, -1, -1)), atol=1e-4, rtol=1e-4)
    assert (found - baselines(model, pairs, "logit_diff")[0]).abs().max() > 1e-3


@t.no_grad()
def test_with_all_edges_ablated_the_logits_read_the_sum_of_the_mean_writes(models):
    model = models["ours"]
    graph = Graph(model)
    pairs = indirect_objects()
    ablation, _ = mean_of_reference(model, graph, pairs, draws=4)
    nothing, everything = circuit_metric(
        model, graph, pairs, t.stack([t.zeros_like(graph.is_edge), graph.is_edge]), ablation=ablation
    )
    t.testing.assert_close(everything, baselines(model, pairs, "logit_diff")[0], atol=1e-4, rtol=1e-4)
    final = 0
    for three in ablation.args[0]:  # the stream is the sum of all writes and of biases, the same in every run
        _, cache = run_with_cache(model, abc_prompts(pairs, three), f"blocks.{L - 1}.hook_resid_post")
        final = final + cache["resid_post", L - 1][pairs.index, pairs.answer_pos] / 4
    logits = model.unembed(model.ln_final(final))
    expected = make_metric(pairs, "logit_diff")(logits, pairs.index)
    t.testing.assert_close(nothing, expected, atol=1e-4, rtol=1e-4)
    assert (nothing - everything).abs().max() > 1e-2


# %% Roles
@t.no_grad()
def test_a_head_that_looks_at_any_name_has_no_role(models, monkeypatch):
    """By rule: L0H0 attends to IO, L0H1 to every name alike."""
    model = models["ours"]
    graph = Graph(model)
    pairs = indirect_objects().take(t.arange(24) % 3)
    names = [pairs.places[place].float() for place in ("IO", "S1", "S2")]

    def by_rule(*args) -> dict:
        attention = {}
        for place in ("end", "S2", "S1+1"):
            pattern = t.zeros(len(pairs), graph.n_layers, graph.n_heads, pairs.clean.shape[1])
            pattern[:, 0, 0] = 0.8 * names[0]
            pattern[:, 0, 1] = 0.3 * sum(names)
            attention[place] = pattern
        return attention

    monkeypatch.setattr("roles.attention_from_places", by_rule)
    search = RoleSearch(model, graph, pairs, "logit_diff", 1.0, shuffles=1000, floor=0.1, seed=0, by="edge_patch")
    assert search.scores["name mover"][0, 1] == pytest.approx(0.3)
    assert search.elsewhere["name mover"][0, 1] == pytest.approx(0.3)
    assert search.elsewhere["name mover"][0, 0] == 0
    assert search.looking["name mover"] == ["L0H0"]
    assert all("L0H1" not in heads for heads in search.looking.values())


# %% Memory
@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_memory_stays_under_the_cap_whatever_the_batch(models, pairs, name):
    """And what is computed in groups equals what is computed at once."""
    model, many = models[name], pairs.take(t.arange(3).repeat(16))
    graph = Graph(model)

    def mask_at(position: int) -> t.Tensor:
        return t.zeros_like(many.clean, dtype=t.bool).index_fill(1, t.tensor([position]), True)

    many.places = {"IO": mask_at(0), "S1": mask_at(1), "S1+1": mask_at(2), "S2": mask_at(3)}
    many.places["end"] = t.arange(8) == many.answer_pos[:, None]
    swaps = t.stack([graph.edges([writer]) for writer in graph.writers[:3]])
    calls = {
        "edges": lambda gb: edge_patch(model, graph, many, swaps, "logit_diff", gb),
        "paths": lambda gb: path_patch_all(model, graph, many, ["logits"], "logit_diff", gb),
        "EAP": lambda gb: eap(model, graph, many, "logit_diff", gb),
        "EAP-IG": lambda gb: eap_ig(model, graph, many, "logit_diff", 1, gb),
        "writes": lambda gb: write_differences(model, graph, many, gb)[1],
        "repair": lambda gb: self_repair(model, graph, many, "L0H1", "logit_diff", gb).change,
        "roles": lambda gb: find_roles(model, graph, many, "logit_diff", gb, shuffles=5).scores["induction"],
    }
    if name == "gpt2":  # the engines are the same; a bridge is slower
        calls = {title: calls[title] for title in ("edges", "paths")}
    cap = 2e-3
    for title, call in calls.items():
        got = []
        peak = peak_bytes(lambda: got.append(call(cap)))
        assert peak / 2**30 < cap, title
        t.testing.assert_close(got[0], call(1.0), atol=1e-4, rtol=1e-4, msg=title)
    assert peak_bytes(lambda: calls["edges"](1.0)) / 2**30 > cap, "these pairs were too few to try the cap"


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_out_of_memory_halves_the_rows_and_changes_no_number(models, pairs, name, capsys):
    model, many = models[name], pairs.take(t.arange(3).repeat(4))
    graph = Graph(model)
    swaps = t.stack([graph.edges([writer]) for writer in graph.writers])
    for call in (
        lambda: edge_patch(model, graph, many, swaps),
        lambda: path_patch_all(model, graph, many, ["L1 MLP"]),
        lambda: eap(model, graph, many),
        lambda: eap_ig(model, graph, many, steps=2),
    ):
        expected = call()
        assert "out of memory" not in capsys.readouterr().out
        with memory_for(model, 7):
            found = call()
        assert "out of memory: going on with" in capsys.readouterr().out
        t.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# %% Attribution on hand-built models
class Saturating(nn.Module):
    """An MLP that rises from 0 to 1 by a sigmoid: flat at both ends."""

    def forward(self, x):
        return t.sigmoid(12 * (x - 0.5))


def hand_built(mlp: type) -> Llama:
    """
    No norms, attention uniform (so constant), the MLP given: the first token's embedding reaches the logits along
    paths that are known.
    """
    t.manual_seed(0)
    config = LlamaConfig(n_layers=2, n_heads=2, n_kv_heads=2, d_model=8, d_head=4, d_mlp=8, d_vocab=20)
    model = Llama(config).requires_grad_(False)
    for block in model.blocks:
        block.ln1 = nn.Identity()
        block.ln2 = nn.Identity()
        block.mlp = mlp()
        block.attn.q.weight.zero_()
    model.ln_final = nn.Identity()
    model.embed.weight.uniform_(0, 1)
    model.unembed.weight.normal_()
    return model


def linear() -> nn.Linear:
    return nn.Linear(8, 8).requires_grad_(False)


def test_eap_and_eap_ig_are_exact_on_a_linear_model():
    model = hand_built(linear)
    small = Pairs(t.tensor([[1, 2, 3, 4]]), t.tensor([[1, 5, 3, 6]]), t.tensor([7]), t.tensor([8]), t.tensor([3]))
    graph = Graph(model)
    edges, masks = single(graph)
    clean, _ = baselines(model, small, "logit_diff")
    truth = (clean - edge_patch(model, graph, small, masks, "logit_diff")).mean(-1)
    assert truth.abs().max() > 0.1
    for scores in (
        eap(model, graph, small),
        eap_ig(model, graph, small, steps=3),
        eap_ig_activations(model, graph, small, steps=2),
    ):
        t.testing.assert_close(scores[edges[:, 0], edges[:, 1]], truth, atol=1e-4, rtol=1e-3)


def test_where_the_model_saturates_eap_fails_and_eap_ig_does_not():
    model = hand_built(Saturating)
    for block in model.blocks:
        block.attn.o.weight.zero_()
    model.blocks[1].mlp = linear()
    model.embed.weight[1] = 1.0  # clean is where the sigmoid is flat at 1
    model.embed.weight[2] = 0.0  # corrupt where it is flat at 0
    small = Pairs(t.tensor([[0, 1]]), t.tensor([[0, 2]]), t.tensor([7]), t.tensor([8]), t.tensor([1]))
    graph = Graph(model)
    path = graph.edges(["embed"], ["L0 MLP"])
    clean, _ = baselines(model, small, "logit_diff")
    truth = (clean - edge_patch(model, graph, small, path[None], "logit_diff")).item()
    by_eap = eap(model, graph, small)[path].item()
    by_eap_ig = eap_ig(model, graph, small, steps=50)[path].item()
    by_activations = eap_ig_activations(model, graph, small, steps=50)[path].item()
    found = (truth, by_eap, by_eap_ig, by_activations)
    assert abs(truth) > 0.3, found
    assert abs(by_activations - truth) < 0.15 * abs(truth), found
    assert abs(by_eap) < 0.2 * abs(truth), found
    assert abs(by_eap_ig - truth) < 0.15 * abs(truth), found


# %% Backwards from the logits; circuits
def test_what_is_traced_back_begins_at_the_logits_and_goes_on_at_the_strongest(models, pairs):
    model = models["ours"]
    graph = Graph(model)
    steps = trace_back(model, graph, pairs, "logit_diff", max_steps=8)
    assert steps[0][0] == ["logits"] and 1 < len(steps) < 12
    clean, corrupt = baselines(model, pairs, "logit_diff")
    alone = path_patch(model, graph, pairs, "L1H2", ["logits"])
    expected = ((clean - alone).mean() / (clean - corrupt).mean()).item()
    assert steps[0][1][graph.writers.index("L1H2")] == pytest.approx(expected, abs=1e-4)
    strongest = steps[0][1].topk(3).indices.tolist()
    inputs_of = {
        r for input in ("q", "k", "v", "MLP") for r in graph.receivers_of([graph.writers[i] for i in strongest], input)
    }
    assert set(steps[1][0]) <= inputs_of


def test_self_repair_of_a_head_is_its_mean_patched_in(models, pairs):
    model = models["ours"]
    graph = Graph(model)
    z = run_with_cache(model, pairs.clean, "blocks.1.attn.hook_z")[1]["z", 1][:, :, 2]
    real = t.arange(8) <= pairs.answer_pos[:, None]
    mean = z[real].mean(0)

    def put_mean(x, hook):
        x = x.clone()
        x[:, :, 2] = mean
        return x

    clean, _ = baselines(model, pairs, "logit_diff")
    logits = run_with_hooks(model, pairs.clean, [("blocks.1.attn.hook_z", put_mean)])[range(3), pairs.answer_pos]
    expected = (clean - make_metric(pairs, "logit_diff")(logits, pairs.index)).mean()
    repair = self_repair(model, graph, pairs, "L1H2", "logit_diff")
    assert repair.lost_in_all == pytest.approx(expected.item(), abs=1e-4)
    assert abs(repair.lost_directly - repair.lost_in_all) > 1e-3
    n_before = graph.writers.index("L1H2")
    assert repair.change[:n_before].abs().max() < 1e-4  # those before it do not notice


def test_top_edges_by_hand(models):
    graph = Graph(models["ours"])
    score = graph.is_edge * -t.arange(1.0, graph.is_edge.numel() + 1).view(graph.is_edge.shape)
    masks = top_edges(graph, score, [0, 1, 1000])
    assert masks.sum((1, 2)).tolist() == [0, 1, int(graph.is_edge.sum())]
    assert masks[1].flatten().nonzero().item() == graph.is_edge.flatten().nonzero().max()


def test_areas_under_faithfulness_by_hand_and_methods_on_the_same_draws():
    values = t.tensor([[0.0, 0.0], [2.0, 7.0], [2.0, 4.0]])  # faithfulness 0, 1.5, 1
    clean, ablated = t.tensor([2.0, 4.0]), t.tensor([0.0, 0.0])
    drawn = resampled_faithfulness(values, clean, ablated, draws=200)
    assert drawn.shape == (201, 3) and drawn[0].tolist() == [0.0, 1.5, 1.0]
    shares = [0.0, 0.5, 1.0]
    assert cpr(drawn, shares)[0].item() == pytest.approx(0.25 * 1.5 + 0.25 * 2.5)
    assert cmd(drawn, shares)[0].item() == pytest.approx(0.25 * 1.5 + 0.25 * 0.5)
    assert log_area(drawn, [1, 4, 16])[0].item() == pytest.approx(0.25 * 1.5 + 0.25 * 2.5)
    # both pairs the first: faithfulness 1, both the second: 1.75
    assert {round(x, 3) for x in drawn[:, 1].tolist()} == {1.0, 1.5, 1.75}
    value, low, high = interval(cpr(drawn, shares))
    assert low < value < high
    # a method that is ahead by 0.1 of the gap in every pair is so in every draw
    ahead = resampled_faithfulness(values + 0.1 * clean, clean, ablated, draws=200)
    t.testing.assert_close(ahead - drawn, t.full_like(drawn, 0.1), atol=1e-6, rtol=0)


def test_the_smallest_circuit_keeps_enough_and_one_edge_less_does_not(models, pairs):
    model = models["ours"]
    graph = Graph(model)
    score = eap_ig(model, graph, pairs, steps=2)
    n_edges = int(graph.is_edge.sum())
    ladder = top_edges(graph, score, list(range(n_edges + 1)))
    clean, corrupt = baselines(model, pairs, "logit_diff")
    kept = normalised(circuit_metric(model, graph, pairs, ladder), clean, corrupt)
    for share in (0.5, 0.9):
        enough = kept >= share
        turns = (enough[1:] & ~enough[:-1]).nonzero()[:, 0] + 1
        circuit = smallest_circuit(model, graph, pairs, score, share=share)
        assert 0 < circuit.sum() < n_edges
        assert any(circuit.equal(graph.prune(ladder[size])) for size in turns.tolist())


def test_agreement_of_estimates_with_effects_by_hand():
    effect = t.tensor([3.0, -2.0, 1.0, 0.0])  # ranks 4 1 3 2
    estimate = t.tensor([2.0, -1.0, -3.0, 5.0])  # ranks 3 2 1 4
    found = agreement(effect, estimate, 2)
    assert found.spearman == pytest.approx(1 - 6 * 10 / (4 * 15), abs=1e-9)
    assert found.top == 0 and agreement(effect, estimate, 3).top == pytest.approx(2 / 3)
    assert found.sign == pytest.approx(2 / 3)
    assert found.pearson == pytest.approx(3.5 / (13 * 36.75) ** 0.5)
    assert agreement(effect, 2 * effect, 2) == pytest.approx((1, 1, 1, 1))


def test_shared_keys_are_named_and_drawn_by_the_heads_that_they_feed(models):
    graph = Graph(models["ours"])
    assert graph.n_kv_heads == 2 and graph.n_heads == 4
    r = graph.receiver_names.index("L1H2-3.v")
    assert graph.fed_by(r) == ["L1H2", "L1H3"]
    assert graph.fed_by(graph.receiver_names.index("L1H2.q")) == ["L1H2"]
    assert graph.fed_by(graph.receiver_names.index("logits")) == ["logits"]
    assert graph.receivers_of(["L1H3"], "k") == ["L1H2-3.k"]
    assert "L1H1.v" not in graph.receiver_names


def names_in_mib(layers: int, heads: int, parallel: bool) -> set[str]:
    """The edges that EAP-IG's Graph.from_model builds, by its names."""
    names = set()
    before = ["input"]
    for layer in range(layers):
        own = [f"a{layer}.h{head}" for head in range(heads)]
        names |= {f"{node}->{head}<{input}>" for node in before for head in own for input in "qkv"}
        names |= {f"{node}->m{layer}" for node in (before if parallel else before + own)}
        before += [*own, f"m{layer}"]
    return names | {f"{node}->logits" for node in before}


@pytest.mark.parametrize("name", ["ours", "gpt2", "gpt_neox"])
def test_the_exported_graph_has_mibs_nodes_and_edges_and_our_scores(models, name):
    graph = Graph(models[name])
    score = t.randn(graph.is_edge.shape, generator=t.Generator().manual_seed(0)) * graph.is_edge
    kept = top_edges(graph, score, [20])[0]
    found = mib_graph(models[name], graph, score, kept)
    assert found["cfg"] == {"n_layers": L, "n_heads": H, "parallel_attn_mlp": name == "gpt_neox", "d_model": 32}
    assert found["edges"].keys() == names_in_mib(L, H, name == "gpt_neox")
    assert found["nodes"].keys() == {"input", "logits", *(f"m{l}" for l in range(L))} | {
        f"a{l}.h{h}" for l in range(L) for h in range(H)
    }
    assert sum(edge["score"] for edge in found["edges"].values()) == pytest.approx(score.sum().item(), abs=1e-4)
    w, r = graph.writers.index("L0H1"), graph.receiver_names.index("L1H2.q")
    assert found["edges"]["a0.h1->a1.h2<q>"] == {"score": score[w, r].item(), "in_graph": bool(kept[w, r])}
    assert any(edge["in_graph"] for edge in found["edges"].values())
    if name == "ours":  # keys and values are shared by two heads
        r = graph.receiver_names.index("L1H2-3.v")
        for edge in ("a0.h1->a1.h2<v>", "a0.h1->a1.h3<v>"):
            assert found["edges"][edge]["score"] == pytest.approx(score[w, r].item() / 2)
