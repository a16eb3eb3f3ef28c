"""Interventions against one forward per cell, against transformer_lens.patching, against closed forms, and against hand-built models whose answer is known."""

import json

import pytest
import torch as t
import torch.nn as nn
from conftest import ROOT, memory_for, one_line_error, save_folder, tiny_hf

from interventions import Pairs, baselines, draw_pairs, find_places, make_metric, make_pairs, normalised, position_masks
from graph import area
from hooks import peak_bytes, run_from
from data import load_tokenizer, write_tokenizer
from llama_block import Llama, LlamaConfig
from interventions import HEADS, STREAM, Part, ablation_effects, fine_parts, knock_out, sweep
from graph import Graph, edge_attribution, edge_patch, find_roles, self_repair, top_edges, write_differences
from weights import Streamed
from hooks import act_name, run_with_cache, run_with_hooks
from utils import load_model

L, H = 3, 4
BRIDGES = ("gpt2", "llama", "gemma2", "gpt_neox")


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """Three pairs of two lengths; clean and corrupt differ from position 2 or 3 on."""
    rng = t.Generator().manual_seed(0)
    clean = t.randint(1, 250, (3, 8), generator=rng)
    corrupt = clean.clone()
    corrupt[:, 3] = t.randint(1, 250, (3,), generator=rng)
    corrupt[1, 2] = 7
    at = t.tensor([7, 7, 5])
    clean[2, 6:] = corrupt[2, 6:] = 0
    made = Pairs(clean, corrupt, t.tensor([5, 9, 3]), t.tensor([7, 100, 8]), at)
    made.places = find_places(made)
    return made


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Tiny Hugging Face models with large weights as bridges; 'ours' is the Llama, with grouped queries, in our class."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaForCausalLM,
    )
    from transformers import LlamaConfig as HFLlamaConfig

    t.manual_seed(0)
    shape = dict(vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=L, num_attention_heads=H)
    hf = {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=L, n_head=H, n_positions=64)),
        "llama": LlamaForCausalLM(HFLlamaConfig(**shape, num_key_value_heads=2)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**shape, num_key_value_heads=2, head_dim=8)),
        "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(**shape)),
    }
    out = {}
    for name, model in hf.items():
        for p in model.parameters():
            p.data.add_(0.15 * t.randn(p.shape))
        model.config.architectures = [type(model).__name__]
        if name == "llama":
            out["ours"] = Llama.from_hf(model).requires_grad_(False)
        out[name] = (
            build_bridge_from_module(model, model.config.architectures[0], hf_config=model.config)
            .eval()
            .requires_grad_(False)
        )
    return out


def naive(model: nn.Module, pairs: Pairs, site: str, by: str, direction: str, kind: str = "logit_diff") -> t.Tensor:
    """One forward of the whole model per cell."""
    base, source = (pairs.corrupt, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupt)
    clean_logits = model(pairs.clean)[range(3), pairs.answer_pos]
    _, cache = run_with_cache(model, source, [act_name(site, layer) for layer in range(L)])
    n_heads = cache[site, 0].shape[1 if site == "pattern" else 2] if site in HEADS else 1
    cells = {
        "pos": [(None, p) for p in range(8)],
        "head": [(h, None) for h in range(n_heads)],
        "head pos": [(h, p) for h in range(n_heads) for p in range(8)],
    }[by]
    out = []
    for layer in range(L):
        for head, position in cells:

            def patch(x, hook):
                x, new = x.clone(), cache[site, layer]
                if site == "pattern":
                    where = (
                        slice(None),
                        slice(None) if head is None else head,
                        slice(None) if position is None else position,
                    )
                else:
                    where = (
                        slice(None),
                        slice(None) if position is None else position,
                        *([] if head is None else [head]),
                    )
                x[where] = new[where]
                return x

            logits = run_with_hooks(model, base, [(act_name(site, layer), patch)])[range(3), pairs.answer_pos]
            out.append(make_metric(pairs, kind, clean_logits)(logits, pairs.index))
    return t.stack(out).view(L, *((n_heads, 8) if by == "head pos" else (len(cells),)), 3)


@t.no_grad()
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_sweep_equals_one_forward_per_cell_on_our_llama(models, pairs, direction):
    model = models["ours"]
    for site, by in [(site, "pos") for site in (*STREAM, "z", "pattern", "post")] + [
        (site, by) for site in HEADS for by in ("head", "head pos")
    ]:
        for memory_gb in (1.0, 1e-3):  # the second cuts the sweep into many runs
            expected = naive(model, pairs, site, by, direction)
            assert expected.std(0).max() > 0.01
            t.testing.assert_close(
                sweep(model, pairs, site, by, direction=direction, memory_gb=memory_gb),
                expected,
                atol=1e-4,
                rtol=0,
                msg=f"{site} {by}",
            )
    for kind in ("log_prob", "kl"):
        t.testing.assert_close(
            sweep(model, pairs, "resid_mid", kind=kind, direction=direction),
            naive(model, pairs, "resid_mid", "pos", direction, kind),
            atol=1e-4,
            rtol=0,
        )


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_every_sweep_equals_transformer_lens(models, pairs, name):
    from transformer_lens import patching as theirs

    model, two = models[name], pairs.take(slice(0, 2))
    clean_cache = model.run_with_cache(two.clean)[1]
    metric = lambda logits: make_metric(two, "logit_diff")(logits[:, -1], two.index).mean()
    functions = {
        ("resid_pre", "pos"): "resid_pre",
        ("resid_mid", "pos"): "resid_mid",
        ("attn_out", "pos"): "attn_out",
        ("mlp_out", "pos"): "mlp_out",
    }
    functions |= {
        ("z" if part == "out" else part, "head"): f"attn_head_{part}_all_pos"
        for part in ("out", "q", "k", "v", "pattern")
    } | {("z" if part == "out" else part, "head pos"): f"attn_head_{part}_by_pos" for part in ("out", "k", "pattern")}
    for (site, by), function in functions.items():
        with t.no_grad():
            expected = getattr(theirs, f"get_act_patch_{function}")(model, two.corrupt, clean_cache, metric)
        if by == "head pos" and site != "pattern":
            expected = expected.transpose(1, 2)
        mine = sweep(model, two, site, by).mean(-1)
        assert mine.shape == expected.shape and expected.std() > 1e-3
        t.testing.assert_close(mine, expected, atol=1e-4, rtol=0, msg=f"{site} {by}")


@t.no_grad()
def test_a_run_from_any_layer_equals_the_whole_run(models, pairs):
    for name, model in models.items():
        logits, cache = run_with_cache(model, pairs.clean, ["blocks.*.hook_resid_pre"])
        for layer in range(L):
            t.testing.assert_close(
                run_from(model, cache["resid_pre", layer], pairs.answer_pos, layer),
                logits[range(3), pairs.answer_pos],
                atol=1e-5,
                rtol=1e-5,
            )
            t.testing.assert_close(
                run_from(model, cache["resid_pre", layer], None, layer), logits, atol=1e-5, rtol=1e-5
            )
        t.testing.assert_close(model(pairs.clean), logits)  # nothing is left behind


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_memory_stays_under_the_cap_whatever_the_batch(models, pairs, name):
    """And what is computed in groups equals what is computed at once."""
    model, many, graph = models[name], pairs.take(t.arange(3).repeat(16)), Graph(models[name])
    place = lambda i: t.zeros_like(many.clean, dtype=t.bool).index_fill(1, t.tensor([i]), True)
    many.places = {
        "IO": place(0),
        "S1": place(1),
        "S1+1": place(2),
        "S2": place(3),
        "end": t.arange(8) == many.answer_pos[:, None],
    }
    rows, swaps = (
        t.randint(1, 250, (40, 12), generator=t.Generator().manual_seed(0)),
        t.stack([graph.edges([writer]) for writer in graph.writers[:3]]),
    )
    parts = [(Part(site, layer), how, 1.0) for site, layer, how in (("z", 1, "zero"), ("mlp_out", 0, "mean"))]
    calls = {
        "baselines": lambda gb: t.stack(baselines(model, many, "kl", gb)),
        "stream": lambda gb: sweep(model, many, "resid_pre", memory_gb=gb),
        "heads": lambda gb: sweep(model, many, "z", "head pos", memory_gb=gb),
        "pattern": lambda gb: sweep(model, many, "pattern", "head", memory_gb=gb),
        "edges": lambda gb: edge_patch(model, graph, many, swaps, "logit_diff", gb),
        "attribution": lambda gb: edge_attribution(model, graph, many, "logit_diff", 1, gb),
        "ablations": lambda gb: t.tensor(ablation_effects(model, many, rows, parts, "logit_diff", gb)),
        "writes": lambda gb: write_differences(model, graph, many, gb)[1],
        "repair": lambda gb: self_repair(model, graph, many, "L0H1", "logit_diff", gb)[2],
        "knock-out": lambda gb: knock_out(model, many, [1], place(2), "logit_diff", gb),
        "roles": lambda gb: find_roles(model, graph, many, "logit_diff", gb, shuffles=5)[0]["induction"],
        "neurons": lambda gb: fine_parts(model, many, 1, gb) and t.zeros(1),
    }
    for title, call in calls.items():
        cap, got = 2e-3, []
        assert peak_bytes(lambda: got.append(call(cap))) / 2**30 < cap, title
        t.testing.assert_close(got[0], call(1.0), atol=1e-4, rtol=1e-4, msg=title)
    for title in ("stream", "heads", "pattern", "edges"):
        assert peak_bytes(lambda: calls[title](1.0)) / 2**30 > cap, "these pairs were too few to try the cap"


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_out_of_memory_halves_the_rows_and_changes_no_number(models, pairs, name, capsys):
    model, many, graph = models[name], pairs.take(t.arange(3).repeat(4)), Graph(models[name])
    rows, parts = (
        t.randint(1, 250, (9, 12), generator=t.Generator().manual_seed(0)),
        [(Part("z", 1), how, 1.0) for how in ("mean", "resample")],
    )
    for call in (
        lambda: t.stack(baselines(model, many, "logit_diff")),
        lambda: sweep(model, many, "z", "head"),
        lambda: edge_patch(model, graph, many, t.stack([graph.edges([writer]) for writer in graph.writers])),
        lambda: edge_attribution(model, graph, many),
        lambda: t.tensor(ablation_effects(model, many, rows, parts, "logit_diff")),
        lambda: knock_out(model, many, [1], many.clean == 5, "log_prob"),
    ):
        expected = call()
        assert "out of memory" not in capsys.readouterr().out
        with memory_for(model, 30 if len(expected) == L else 7):
            found = call()
        assert "out of memory: going on with" in capsys.readouterr().out
        t.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "architecture, config",
    [
        ("GPT2", dict(vocab_size=260, n_embd=32, n_layer=L, n_head=H, n_positions=64)),
        (
            "Llama",
            dict(
                vocab_size=260,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=L,
                num_attention_heads=H,
                num_key_value_heads=2,
            ),
        ),
        (
            "Gemma2",
            dict(
                vocab_size=260,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=L,
                num_attention_heads=H,
                num_key_value_heads=2,
                head_dim=8,
            ),
        ),
    ],
)
def test_weights_from_disk_give_the_same_sweeps_of_the_stream(architecture, config, pairs, tmp_path):
    folder = str(save_folder(tiny_hf(architecture, **config), tmp_path))
    whole, streamed = load_model(folder, device="cpu"), Streamed(folder, "cpu", t.float32)
    assert sum(p.is_meta for p in streamed.hf.parameters()) > 10
    t.testing.assert_close(
        t.stack(baselines(streamed, pairs, "kl")), t.stack(baselines(whole, pairs, "kl")), atol=1e-4, rtol=1e-4
    )
    for site, direction, memory_gb in (("resid_pre", "denoise", 1.0), ("resid_post", "noise", 1e-3)):
        expected = sweep(whole, pairs, site, direction=direction)
        assert expected.std() > 0.01
        t.testing.assert_close(
            sweep(streamed, pairs, site, direction=direction, memory_gb=memory_gb), expected, atol=1e-4, rtol=1e-4
        )


def test_the_story_of_streamed_weights_ends_with_the_stream(script, run):
    one_line_error(
        run("patching.py", "--offload", "on", "--site", "z", "--n", "4", "--held-out", "4", "--device", "cpu"),
        "unknown hook 'z'",
    )
    numbers = script("--offload", "on", "--n", "4", "--held-out", "4")
    assert max(numbers["gates"].values()) < 1e-4 and list(numbers["by_place"]) == [
        "resid_pre, denoise",
        "resid_pre, noise",
        "resid_post, denoise",
        "resid_post, noise",
    ]
    assert (
        numbers["by_place"]["resid_pre, denoise"][0][numbers["places"].index("S2")] > 0.9
    )  # before layer 0 the whole difference stands at the second subject


# %% Paths and edges
def single(graph: Graph) -> tuple[t.Tensor, t.Tensor]:
    """(edges (edge, 2), masks with one edge each)."""
    edges = graph.upstream.nonzero()
    masks = t.zeros(len(edges), *graph.upstream.shape, dtype=t.bool)
    masks[range(len(edges)), edges[:, 0], edges[:, 1]] = True
    return edges, masks


@t.no_grad()
@pytest.mark.parametrize("name", ["ours", "gpt2", "llama", "gpt_neox"])
def test_all_paths_are_activation_patching_of_the_sender_and_all_edges_the_corrupt_run(models, pairs, name):
    model = models[name]
    graph, (clean, corrupt) = Graph(model), baselines(model, pairs, "logit_diff")
    ends = edge_patch(model, graph, pairs, t.stack([~graph.upstream, graph.upstream]))
    t.testing.assert_close(ends, t.stack([clean, corrupt]), atol=1e-5, rtol=1e-5)
    everywhere = {"all": t.ones_like(pairs.clean, dtype=t.bool)}
    heads = edge_patch(model, graph, pairs, t.stack([graph.edges([head]) for head in graph.head_names])).view(L, H, 3)
    mlps = edge_patch(model, graph, pairs, t.stack([graph.edges([f"L{layer} MLP"]) for layer in range(L)]))
    t.testing.assert_close(heads, sweep(model, pairs, "z", "head", direction="noise"), atol=1e-4, rtol=0)
    t.testing.assert_close(
        mlps, sweep(model, pairs, "mlp_out", direction="noise", places=everywhere)[:, 0], atol=1e-4, rtol=0
    )
    kept = graph.upstream & (t.rand(graph.upstream.shape, generator=t.Generator().manual_seed(1)) < 0.2)
    pruned = graph.prune(kept)
    values = edge_patch(model, graph, pairs, t.stack([~kept, ~pruned]))
    assert 0 < pruned.sum() < kept.sum()
    t.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-5)


@t.no_grad()
def test_single_paths_equal_receivers_recomputed_by_hand(models, pairs):
    """The receiver's input with the sender's corrupt write, through the real norm and weights, patched in as q, k, v or MLP output."""
    model, at = models["ours"], pairs.answer_pos
    graph, logits = Graph(model), lambda x: x[range(3), at]
    names = [act_name(site, layer) for layer in range(L) for site in ("resid_pre", "resid_mid", "resid_post", "z")]
    (_, clean), (_, corrupt) = (run_with_cache(model, x, names) for x in (pairs.clean, pairs.corrupt))
    change = (corrupt["z", 0] - clean["z", 0])[:, :, 2] @ model.blocks[0].attn.W_O[2]  # sender L0H2
    block, metric = model.blocks[2], make_metric(pairs, "logit_diff")
    expected = {}
    for kind, W, b, head in (
        ("q", block.attn.W_Q, block.attn.q.bias, 3),
        ("k", block.attn.W_K, block.attn.k.bias, 1),
        ("v", block.attn.W_V, block.attn.v.bias, 0),
    ):
        new = block.ln1(clean["resid_pre", 2] + change) @ W[head] + (0 if b is None else b.view(-1, 8)[head])
        expected[f"L2H{head}.{kind}"] = metric(
            logits(
                run_with_hooks(
                    model,
                    pairs.clean,
                    [(act_name(kind, 2), lambda x, hook: x.index_copy(2, t.tensor([head]), new[:, :, None]))],
                )
            ),
            pairs.index,
        )
    new = block.mlp(block.ln2(clean["resid_mid", 2] + change))
    expected["L2 MLP"] = metric(
        logits(run_with_hooks(model, pairs.clean, [("blocks.2.hook_mlp_out", lambda x, hook: new)])), pairs.index
    )
    expected["logits"] = metric(logits(model.unembed(model.ln_final(clean["resid_post", 2] + change))), pairs.index)
    values = edge_patch(model, graph, pairs, t.stack([graph.edges(["L0H2"], [receiver]) for receiver in expected]))
    untouched = baselines(model, pairs, "logit_diff")[0]
    for value, (receiver, wanted) in zip(values, expected.items()):
        assert (wanted - untouched).abs().max() > 1e-3, receiver
        t.testing.assert_close(value, wanted, atol=1e-4, rtol=0, msg=receiver)


class Saturating(nn.Module):
    """An MLP that rises from 0 to 1 by a sigmoid: flat at both ends."""

    def forward(self, x):
        return t.sigmoid(12 * (x - 0.5))


def hand_built(mlp: type) -> Llama:
    """No norms, attention uniform (so constant), the MLP given: the first token's embedding reaches the logits along paths that are known."""
    t.manual_seed(0)
    model = Llama(
        LlamaConfig(n_layers=2, n_heads=2, n_kv_heads=2, d_model=8, d_head=4, d_mlp=8, d_vocab=20)
    ).requires_grad_(False)
    for block in model.blocks:
        block.ln1, block.ln2, block.mlp = nn.Identity(), nn.Identity(), mlp()
        block.attn.q.weight.zero_()
    model.ln_final = nn.Identity()
    model.ln_final.hook_scale = model.blocks[0].ln1  # the graph's cache asks for a scale; this model has none
    model.embed.weight.uniform_(0, 1)
    model.unembed.weight.normal_()
    return model


@pytest.fixture
def no_scale(monkeypatch):
    """run_graph without the final norm's scale, which hand-built models do not have."""
    import graph

    cache_from_resid = graph.cache_from_resid
    monkeypatch.setattr(
        graph,
        "cache_from_resid",
        lambda model, resid, at, names: cache_from_resid(
            model, resid, at, [name for name in names if name != "ln_final.hook_scale"]
        ),
    )


def test_eap_is_exact_on_a_linear_model(no_scale):
    model = hand_built(lambda: nn.Linear(8, 8).requires_grad_(False))
    small = Pairs(t.tensor([[1, 2, 3, 4]]), t.tensor([[1, 5, 3, 6]]), t.tensor([7]), t.tensor([8]), t.tensor([3]))
    graph = Graph(model)
    edges, masks = single(graph)
    truth = (baselines(model, small, "logit_diff")[0] - edge_patch(model, graph, small, masks, "logit_diff")).mean(-1)
    assert truth.abs().max() > 0.1
    for steps in (0, 3):
        t.testing.assert_close(
            edge_attribution(model, graph, small, "logit_diff", steps)[edges[:, 0], edges[:, 1]],
            truth,
            atol=1e-4,
            rtol=1e-3,
        )


def test_where_the_model_saturates_eap_fails_and_eap_ig_does_not(no_scale):
    model = hand_built(Saturating)
    for block in model.blocks:
        block.attn.o.weight.zero_()
    model.blocks[1].mlp = nn.Linear(8, 8).requires_grad_(False)
    model.embed.weight[1], model.embed.weight[2] = (
        1.0,
        0.0,
    )  # clean is where the sigmoid is flat at 1, corrupt where it is flat at 0
    small = Pairs(t.tensor([[0, 1]]), t.tensor([[0, 2]]), t.tensor([7]), t.tensor([8]), t.tensor([1]))
    graph = Graph(model)
    path = graph.edges(["embed"], ["L0 MLP"])
    truth = (
        baselines(model, small, "logit_diff")[0] - edge_patch(model, graph, small, path[None], "logit_diff")
    ).item()
    eap, ig = (edge_attribution(model, graph, small, "logit_diff", steps)[path].item() for steps in (0, 50))
    assert abs(truth) > 0.3 and abs(eap) < 0.2 * abs(truth) and abs(ig - truth) < 0.15 * abs(truth), (truth, eap, ig)


# %% Ablations, knock-out, places, areas
@t.no_grad()
def test_ablations_equal_hooks_written_out(models, pairs):
    model = models["ours"]
    rows, clean = (
        t.randint(1, 250, (4, 12), generator=t.Generator().manual_seed(3)),
        baselines(model, pairs, "logit_diff")[0].mean(),
    )
    loss = lambda logits: t.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    mean = run_with_cache(model, rows, "blocks.1.hook_mlp_out")[1]["mlp_out", 1][:, 1:].mean((0, 1))
    head = lambda h: lambda change: change * t.nn.functional.one_hot(t.tensor(h), H)[:, None]
    u = t.randn(32)
    u = u / u.norm()
    cases = [
        (Part("z", 1, head(2)), "zero", lambda x, hook: x.index_fill(2, t.tensor([2]), 0)),
        (Part("mlp_out", 1), "mean", lambda x, hook: mean.expand_as(x)),
        (Part("z", 2, head(0)), "resample", lambda x, hook: t.cat([x.roll(1, 0)[:, :, :1], x[:, :, 1:]], 2)),
        (
            Part("post", 0, lambda change: change * t.nn.functional.one_hot(t.tensor([3, 5]), 48).sum(0)),
            "zero",
            lambda x, hook: x.index_fill(2, t.tensor([3, 5]), 0),
        ),
        (
            Part("resid_pre", 2, lambda change: (change @ u)[..., None] * u),
            "zero",
            lambda x, hook: x - (x @ u)[..., None] * u,
        ),
    ]
    for (part, how, fn), (lost, nats) in zip(
        cases, ablation_effects(model, pairs, rows, [(part, how, 1.0) for part, how, _ in cases], "logit_diff")
    ):
        entry = [(act_name(part.site, part.layer), fn)]
        value = make_metric(pairs, "logit_diff")(
            run_with_hooks(model, pairs.clean, entry)[range(3), pairs.answer_pos], pairs.index
        ).mean()
        assert (
            abs(lost - (1 - value / clean)) < 1e-3
            and abs(nats - (loss(run_with_hooks(model, rows, entry)) - loss(model(rows)))) < 1e-4
            and abs(nats) > 1e-4
        ), part
    curve = [
        lost
        for lost, _ in ablation_effects(
            model, pairs, rows, [(Part("mlp_out", 0), "noise", sigma) for sigma in (0.0, 5.0)], "logit_diff"
        )
    ]
    assert curve[0] == pytest.approx(0, abs=1e-4) and abs(curve[1]) > 0.01


@t.no_grad()
def test_knock_out_removes_the_attention_from_the_answer_and_no_other(models, pairs):
    for name in ("ours", "gpt2"):
        model, mask = models[name], t.zeros_like(pairs.clean, dtype=t.bool).index_fill(1, t.tensor([2]), True)

        def cut(pattern, hook):
            pattern = pattern.clone()
            pattern[range(3), :, pairs.answer_pos, 2] = 0
            return pattern / pattern.sum(-1, keepdim=True)

        expected = run_with_hooks(model, pairs.clean, [("blocks.1.attn.hook_pattern", cut)])[range(3), pairs.answer_pos]
        t.testing.assert_close(
            knock_out(model, pairs, [1], mask, "logit_diff"),
            make_metric(pairs, "logit_diff")(expected, pairs.index),
            atol=1e-4,
            rtol=0,
        )


@pytest.fixture(scope="module")
def world() -> Llama:
    return Llama.from_folder(str(ROOT / "models/world"))


def test_places_share_out_the_positions_and_name_the_names(world):
    for task in ("ioi", "capitals", "greater_than", "induction", "agreement", "gender"):
        pairs = draw_pairs(world, task, 8, 0)
        count, behind = (
            sum(mask.int() for mask in pairs.places.values()),
            t.arange(pairs.clean.shape[1]) > pairs.answer_pos[:, None],
        )
        assert (count == (~behind).int()).all() and (pairs.clean != pairs.corrupt).any(1).all(), task
        if task == "ioi":
            assert all(
                (pairs.clean[pairs.places[place]] == ids).all()
                for place, ids in (("IO", pairs.answer), ("S1", pairs.wrong), ("S2", pairs.wrong))
            )
        else:
            assert (pairs.clean != pairs.corrupt).equal(pairs.places["changed"]), task


def test_areas_and_top_edges_by_hand(models):
    values = t.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 4.0]])  # faithfulness 0, 2/3, 1 at shares 0, .5, 1
    value, low, high = area(values, t.tensor([2.0, 4.0]), t.tensor([0.0, 0.0]), [0.0, 0.5, 1.0])
    assert value == pytest.approx(0.25 * 2 / 3 + 0.25 * (1 + 2 / 3)) and low <= value <= high and low < high
    graph = Graph(models["ours"])
    score = graph.upstream * -t.arange(1.0, graph.upstream.numel() + 1).view(graph.upstream.shape)
    masks = top_edges(graph, score, [0, 1, 1000])
    assert (
        masks.sum((1, 2)).tolist() == [0, 1, int(graph.upstream.sum())]
        and masks[1].flatten().nonzero().item() == graph.upstream.flatten().nonzero().max()
    )


# %% Bad input, and whole runs
def test_bad_input_is_answered_in_one_clear_line(models, pairs, world):
    cases = [
        (lambda: make_pairs(world, [("Mary left", "Mary", " the", " a")]), "clean has"),
        (lambda: make_pairs(world, [("Mary left", "John left", " the park", " a")]), "is not one token"),
        (lambda: position_masks(pairs, [8]), "outside the sequence"),
        (lambda: normalised(t.zeros(3), t.ones(3), t.ones(3)), "same metric"),
        (lambda: make_pairs(world, [("Mary left", "Mary left", " the", " a")]), "the same"),
    ]
    for call, words in cases:
        with pytest.raises(SystemExit) as error:
            call()
        assert words in str(error.value) and "\n" not in str(error.value)
    for name, site in (("ours", "resid_prre"), ("gpt_neox", "resid_mid")):  # GPT-NeoX has none
        with pytest.raises(KeyError, match="unknown hook name"):
            sweep(models[name], pairs, site)


@pytest.fixture
def script(run, workdir):
    """script('--flag', ...) runs patching.py and returns its numbers."""

    def script(*args: str) -> dict:
        done = run("patching.py", "--device", "cpu", *args)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((workdir / "results/patching.json").read_text())

    return script


def test_facts_are_traced(script):
    numbers = script("--task", "capitals", "--n", "4", "--held-out", "4", "--ig-steps", "2", "--site", "mlp_out")
    assert (
        numbers["tracing"]["resid_post"][0][numbers["places"].index("changed")] > 0.8
    )  # the clean subject after layer 0 restores the fact
    assert numbers["knock_out"]["changed"][-1] < min(0.5, *numbers["knock_out"]["before"])


def test_any_bridge_and_any_pairs(script, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    t.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=3072, n_embd=32, n_layer=2, n_head=2, n_positions=64)).save_pretrained(
        tmp_path / "gpt2"
    )
    write_tokenizer(tmp_path / "gpt2", load_tokenizer(str(ROOT / "models/world")))
    (tmp_path / "pairs.csv").write_text(
        "clean,corrupt,answer,wrong\nThen Mary and John left. John gave it to,Then Mary and John left. Mary gave it to, Mary, John\nSoon Tom saw,Soon Paul saw, the, a\n"
    )
    (tmp_path / "text.txt").write_text("Then Mary and John left the park.\n\n" * 400)
    numbers = script(
        "--model",
        str(tmp_path / "gpt2"),
        "--pairs",
        str(tmp_path / "pairs.csv"),
        "--metric",
        "log_prob",
        "--data",
        str(tmp_path / "text.txt"),
    )
    assert max(numbers["gates"].values()) < 1e-4 and numbers["circuit_edges_total"] == count_edges(2, 2)


def test_where_writes_do_not_add_up_paths_are_left_out(script, models, tmp_path):
    """Gemma-2 puts a norm behind attention and MLP."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    t.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=3072,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    for p in model.parameters():
        p.data.add_(0.15 * t.randn(p.shape))
    model.save_pretrained(tmp_path / "gemma")
    write_tokenizer(tmp_path / "gemma", load_tokenizer(str(ROOT / "models/world")))
    (tmp_path / "text.txt").write_text("Then Mary and John left the park.\n\n" * 400)
    numbers = script(
        "--model",
        str(tmp_path / "gemma"),
        "--n",
        "4",
        "--held-out",
        "4",
        "--site",
        "z",
        "--data",
        str(tmp_path / "text.txt"),
    )
    assert (
        numbers["gates"]["writes along the edges add up"] > 1e-2
        and numbers["gates"]["everything patched"] < 1e-4
        and "ablation" in numbers
        and "circuit" not in numbers
    )


def count_edges(layers: int, heads: int) -> int:
    """By counting: q, k, v of each head and the MLP read all before them, the logits read everything."""
    return (
        sum(3 * heads * (1 + l * (heads + 1)) + 1 + l * (heads + 1) + heads for l in range(layers))
        + 1
        + layers * (heads + 1)
    )


def test_a_wrong_command_line_ends_in_one_line(run):
    one_line_error(
        run("patching.py", "--site", "resid_prre", "--n", "4", "--held-out", "4", "--device", "cpu"),
        "unknown hook",
        "resid_prre",
    )
    one_line_error(
        run("patching.py", "--clean", "The key", "--corrupt", "The keys", "--answer", " is", "--device", "cpu"),
        "--wrong",
    )
