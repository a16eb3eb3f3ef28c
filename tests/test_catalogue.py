"""
The catalogue of heads and neurons: what a neuron reads taken apart, against closed forms, another package's hooks and
planted neurons; its page in a browser.
"""

import copy
import shutil

import pytest
import torch as t
from conftest import one_line_error
from models_for_tests import tiny_models

from logit_attribution import folded_W_U, parts_error
from neurons import (
    embeddings_as_read,
    neuron_catalogue,
    neuron_effect,
    neuron_parts,
    neuron_readers,
    peaks_by_row,
    sharpness,
    sharpness_null,
    strongest_parts,
    tokens_read,
    without_sources,
)
from heads import head_looks, head_map
from hooks import block_norms, run_with_cache
from plots import catalogue_page

TOKENS = t.randint(1, 250, (1, 11), generator=t.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def models():
    return tiny_models()


@pytest.mark.parametrize("name", ["ours", "llama", "gpt2", "gemma2", "olmo2", "gpt_neox", "gptj"])
def test_the_parts_of_what_a_neuron_reads_sum_to_it(models, name):
    """Norms before, behind, before and behind, one for both; attention and MLP one after the other and side by side."""
    model = models[name]
    for layer in (0, 2):
        for reader in neuron_readers(model, layer):
            parts = neuron_parts(model, TOKENS, layer, 7, 6, reader)
            assert parts_error(parts, "pre") < 1e-5, (name, layer, reader)
            assert parts["heads"].abs().sum() > 0 or layer == 0
            together = without_sources(parts)
            summed = sum(values.sum() for values in together.values())
            assert summed.item() == pytest.approx(parts["pre"].item(), abs=1e-4)


def test_parts_are_the_same_by_our_hooks_and_by_transformer_lens(models):
    for reader in ("gate", "in"):
        ours, theirs = (neuron_parts(models[name], TOKENS, 2, 5, 9, reader) for name in ("ours", "llama"))
        assert ours.keys() == theirs.keys()
        for part, x in ours.items():
            t.testing.assert_close(x, theirs[part], atol=1e-4, rtol=1e-4)


@t.no_grad()
def test_a_neuron_that_reads_another_ones_write_is_told_so(models):
    """Planted: what L2N5 reads is what L0N3 writes. Its part in closed form: activation x W_out . (weight x W_gate) / scale."""
    model = copy.deepcopy(models["ours"])
    model.blocks[0].mlp.out.weight[:, 3] *= 50
    writer = model.blocks[0].mlp.W_out[3]
    model.blocks[2].mlp.gate.weight[5] = 30 * writer / writer.norm()
    parts = neuron_parts(model, TOKENS, 2, 5, 9, "gate")
    name, given = strongest_parts(without_sources(parts), 1)[0]
    _, cache = run_with_cache(
        model, TOKENS, ["blocks.0.mlp.hook_post", "blocks.2.ln2.hook_scale", "blocks.2.mlp.hook_pre"]
    )
    read = model.blocks[2].ln2.weight * model.blocks[2].mlp.W_gate[:, 5]
    closed = cache["post", 0][0, 9, 3] * (writer @ read) / cache["blocks.2.ln2.hook_scale"][0, 9, 0]
    assert name == "L0N3"
    assert given == pytest.approx(closed.item(), rel=1e-4)
    assert parts["pre"].item() == pytest.approx(cache["pre", 2][0, 9, 5].item(), rel=1e-5)
    assert parts_error(parts, "pre") < 1e-5


@t.no_grad()
def test_the_gate_can_fail(models):
    parts = neuron_parts(models["ours"], TOKENS, 2, 5, 9)
    parts["heads"] = 1.1 * parts["heads"]
    assert parts_error(parts, "pre") > 1e-4


@t.no_grad()
def test_what_a_neuron_writes_passes_the_norm_behind(models):
    """Gemma 2 multiplies what its MLPs write by 1 + w."""
    model = models["gemma2"]
    mlp = model.blocks[1].mlp
    weight = 1 + model.original_model.model.layers[1].post_feedforward_layernorm.weight
    expected = (weight * mlp.W_out[7]) @ folded_W_U(model)
    effect = neuron_effect(model, 1, 7, folded_W_U(model))
    t.testing.assert_close(effect, expected - expected.mean(), atol=1e-3, rtol=1e-3)
    assert neuron_effect(models["ours"], 1, 7, folded_W_U(models["ours"])).mean().abs() < 1e-5


@t.no_grad()
def test_the_tokens_a_neuron_reads_are_those_of_a_stream_that_holds_them_alone(models):
    model = models["gpt2"]
    norm = block_norms(model, 0).before_mlp
    read = tokens_read(model, 0, 7, embeddings_as_read(model, norm))["in"]
    alone = t.stack([norm(model.W_E[i][None, None])[0, 0] @ model.blocks[0].mlp.W_in[:, 7] for i in range(260)])
    t.testing.assert_close(read, alone - alone.mean(), atol=1e-4, rtol=1e-4)


@t.no_grad()
def test_a_gated_neuron_has_dips(models):
    """Of an activation that is negative in one row, the dip is its place; those of less than a tenth are no dips."""
    model = models["ours"]
    rows = t.randint(1, 250, (5, 9), generator=t.Generator().manual_seed(0))
    (found, *_) = neuron_catalogue(model, rows, 1, n=0, contexts=3, also=[7])
    post = run_with_cache(model, rows, "blocks.1.mlp.hook_post")[1]["post", 1][:, :, 7]
    assert found["neuron"] == 7
    assert found["peaks"][0][0] == post.max()
    assert found["dips"][0][0] == post.min()
    row, position = found["dips"][0][1:]
    assert post[row, position] == post.min()
    assert all(x < -found["largest"] / 10 for x, *_ in found["dips"])
    assert found["density"] == (post.abs() > post.abs().max() / 10).float().mean()


def test_peaks_come_from_different_rows():
    activation = t.tensor([[0.0, 5, 4], [1, 0, 2], [3, 0, 0]])
    assert peaks_by_row(activation, 2) == [(5.0, 0, 1), (3.0, 2, 0)]


@t.no_grad()
@pytest.mark.parametrize("name", ["ours", "gpt2", "gemma2"])
def test_a_heads_map_is_the_best_of_rank_one(models, name):
    """Against the singular value decomposition of the whole matrix; grouped heads share W_V."""
    model, layer, head = models[name], 1, 2
    read, write, share = head_map(model, layer, head)
    attn, norms = model.blocks[layer].attn, block_norms(model, layer)
    group = model.cfg.n_heads // len(attn.W_V)
    if name == "gpt2":
        normed = (t.eye(32) - 1 / 32) * model.original_model.transformer.h[layer].ln_1.weight
    elif name == "gemma2":
        normed = t.diag(1 + model.original_model.model.layers[layer].input_layernorm.weight)
    else:
        normed = t.diag(norms.before_attn.weight)
    whole = normed @ attn.W_V[head // group] @ attn.W_O[head]
    if name == "gemma2":
        whole = whole * (1 + model.original_model.model.layers[layer].post_attention_layernorm.weight)
    u, s, vh = t.linalg.svd(whole)
    assert share == pytest.approx((s[0] ** 2 / s.pow(2).sum()).item(), rel=1e-3)
    t.testing.assert_close(t.outer(read, write), t.outer(u[:, 0], vh[0]), atol=2e-3, rtol=1e-2)


@t.no_grad()
def test_a_heads_looks_are_the_largest_of_a_loop(models):
    model, layer = models["ours"], 1
    rows = t.randint(1, 250, (4, 7), generator=t.Generator().manual_seed(1))
    _, cache = run_with_cache(model, rows, ["blocks.1.attn.hook_v", "blocks.1.attn.hook_pattern"])
    attn = model.blocks[layer].attn
    best = (0.0, 0, 0)
    for row in range(4):
        for query in range(7):
            for key in range(1, query):
                value = cache["v", 1][row, key, 3 // 2] @ attn.W_O[3]
                brought = (cache["pattern", 1][row, 3, query, key] * value.norm()).item()
                best = max(best, (brought, row, query))
    found = head_looks(model, rows, layer, n=2)[3]
    assert len(found) == 2
    assert found[0][:3] == (pytest.approx(best[0], rel=1e-4), *best[1:])
    t.testing.assert_close(found[0][3], cache["pattern", 1][best[1], 3, best[2], : best[2] + 1])


def test_random_directions_stand_out_less_than_one_token_alone():
    matrix = t.randn(16, 400, generator=t.Generator().manual_seed(0))
    null = sharpness_null(matrix)
    assert 3 < null < 5  # the largest of 400 normal numbers
    assert sharpness(t.eye(400)[7]) > 2 * null


ENTRY = {"layer": 3, "named": "", "size": 1.0, "contexts": [["+1.0", ["·a", "·<b>"], [10, -90]]]}


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_heads_and_neurons_are_found_in_the_page(tmp_path):
    from playwright.sync_api import sync_playwright

    head = ENTRY | {"id": "L3H1", "kind": "head", "number": 1, "lines": [["fed", "·Paris"]], "links": []}
    by = [["gate", [["L3H1", "+2.00"], ["L0N9", "-1.00"]]]]
    neuron = ENTRY | {"id": "L3N117", "kind": "neuron", "number": 117, "lines": [["raises", "·</script>"]], "links": by}
    path = tmp_path / "page.html"
    path.write_text(catalogue_page([head, neuron], "two"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"file://{path}")
        assert page.locator("article").count() == 2
        for query, found in (("3.117", "L3N117"), ("paris", "L3H1"), ("l0n9", "L3N117"), ("</script>", "L3N117")):
            page.fill("#query", query)
            assert page.locator("article h3").all_inner_texts() == [f"{found}"], query
        page.fill("#query", "")
        page.select_option("#kind", "neuron")
        assert page.locator("article").count() == 1
        assert page.locator("td a").all_inner_texts() == ["L3H1"]  # what stands in the page is linked
        browser.close()


@pytest.mark.parametrize("asked, said", [("9.1", "layers 0 to 3"), ("L3N1", "layer.number"), ("3.9999", "384 neurons")])
def test_a_neuron_that_is_not_there_is_said(run, asked, said):
    one_line_error(run("catalogue.py", "--neuron", asked, "--device", "cpu"), said)
