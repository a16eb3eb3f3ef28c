"""Hooks raise where they would be silent, a run from the middle is the run, and batches halve when memory runs out."""

import pytest
import torch as t
from conftest import tiny_attn_only

from hooks import (
    Cache,
    ask_norm,
    cache_from_resid,
    find_hooks,
    hook_points,
    hooks,
    in_batches,
    peak_bytes,
    run_from,
    run_with_cache,
    run_with_hooks,
)
from llama_block import Llama, LlamaConfig

TOKENS = t.randint(20, (2, 12), generator=t.Generator().manual_seed(0))


@pytest.fixture
def model():
    return tiny_attn_only()


@pytest.fixture
def llama():
    """Two blocks at random, which a stream can enter at any layer."""
    t.manual_seed(0)
    return Llama(LlamaConfig(n_layers=2, n_heads=2, n_kv_heads=1, d_model=16, d_head=8, d_mlp=32, d_vocab=20)).eval()


def test_hooks_replace_activations_and_are_gone_afterwards(model):
    clean = model(TOKENS)
    changed = run_with_hooks(model, TOKENS, [("blocks.0.attn.hook_z", lambda z, hook: t.zeros_like(z))])
    assert not t.allclose(clean, changed)
    assert t.equal(model(TOKENS), clean)


def test_unknown_hook_name_raises_and_suggests(model):
    with pytest.raises(KeyError, match="blocks.0.attn.hook_pattern"):
        run_with_cache(model, TOKENS, "blocks.0.attn.hook_patern")
    with pytest.raises(KeyError, match="unknown"):
        run_with_hooks(model, TOKENS, [("blocks.7.*", lambda x, hook: None)])
    with pytest.raises(KeyError, match="predicate"):
        find_hooks(model, lambda name: False)


def test_a_hook_that_never_fires_raises(model):
    with pytest.raises(RuntimeError, match="never fired.*rot_q"):
        run_with_hooks(model, TOKENS, [("blocks.0.attn.hook_rot_q", lambda x, hook: None)])
    with pytest.raises(RuntimeError, match="never fired"):
        with hooks(model, [("hook_embed", lambda x, hook: None)]):
            pass
    with pytest.raises(RuntimeError, match="never fired"):
        run_with_cache(model, TOKENS, "blocks.1.attn.hook_rot_k")


def test_an_error_inside_the_context_still_removes_hooks(model):
    with pytest.raises(ZeroDivisionError), hooks(model, [("hook_embed", lambda x, hook: 1 / 0)]):
        model(TOKENS)
    assert all(not point.fwd_hooks for point in hook_points(model).values())


def test_nested_contexts_leave_the_outer_hooks(model):
    calls = []
    with hooks(model, [("hook_embed", lambda x, hook: calls.append("outer"))]):
        with hooks(model, [("hook_embed", lambda x, hook: calls.append("inner"))]):
            model(TOKENS)
        model(TOKENS)
    assert calls == ["outer", "inner", "outer"]


def test_cache_by_short_name_pattern_and_predicate(model):
    _, cache = run_with_cache(model, TOKENS, "*hook_pattern")
    assert list(cache) == ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"]
    assert cache["pattern", 1] is cache["blocks.1.attn.hook_pattern"]
    with pytest.raises(KeyError, match="not cached"):
        cache["hook_embed"]
    _, full = run_with_cache(model, TOKENS)
    assert {"hook_embed", "blocks.1.hook_resid_post", "ln_final.hook_scale"} <= set(
        full
    ) and "blocks.0.attn.hook_rot_q" not in full


def test_detach_false_keeps_the_graph(model):
    logits, cache = run_with_cache(model, TOKENS, "blocks.0.hook_resid_post", detach=False)
    (grad,) = t.autograd.grad(logits.sum(), cache["resid_post", 0])
    assert grad.abs().sum() > 0


def test_result_hook_splits_attn_out_by_head(model):
    _, cache = run_with_cache(model, TOKENS, ["blocks.0.attn.hook_result", "blocks.0.hook_attn_out"])
    assert cache["result", 0].shape == (2, 12, 4, 16)
    t.testing.assert_close(cache["result", 0].sum(2), cache["attn_out", 0])


def test_cache_is_a_dict():
    assert Cache({"blocks.3.mlp.hook_post": 1})["post", 3] == 1


def test_a_run_from_the_middle_is_the_run(llama):
    logits, cache = run_with_cache(llama, TOKENS, "*hook_resid_pre")
    for layer in range(llama.cfg.n_layers):
        t.testing.assert_close(run_from(llama, cache["resid_pre", layer], None, layer), logits)
    answer_pos = t.tensor([3, 11])
    alone = run_from(llama, cache["resid_pre", 0], answer_pos)
    t.testing.assert_close(alone, logits[t.arange(2), answer_pos])


def test_a_cache_from_the_stream_holds_what_a_full_run_holds(llama):
    _, cache = run_with_cache(llama, TOKENS, ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z"])
    _, again = cache_from_resid(llama, cache["resid_pre", 0], None, ["blocks.1.attn.hook_z"])
    assert list(again) == ["blocks.1.attn.hook_z"]
    t.testing.assert_close(again["z", 1], cache["z", 1])


def test_rows_may_join_on_the_way_and_hooks_are_gone_afterwards(llama):
    _, cache = run_with_cache(llama, TOKENS, "*hook_resid_pre")
    twice = [(llama.blocks[1], "in", lambda x: t.cat([x, x]))]
    positions = t.tensor([5, 5, 5, 5])
    logits = run_from(llama, cache["resid_pre", 0], lambda: positions, inner=twice)
    assert logits.shape == (4, 20)
    t.testing.assert_close(logits[:2], logits[2:])
    assert not llama.blocks[1]._forward_pre_hooks


def test_batches_halve_until_they_fit_and_keep_their_order(capsys):
    sizes = []

    def double(rows):
        sizes.append(len(rows))
        if len(rows) > 3:
            raise t.OutOfMemoryError("CUDA out of memory, says this test")
        return rows * 2

    found = t.cat(list(in_batches(double, t.arange(10), 8)))
    assert found.tolist() == list(range(0, 20, 2))
    assert sizes[:3] == [8, 4, 2]
    assert "going on with 4 rows" in capsys.readouterr().out


def test_a_row_that_never_fits_ends_in_one_line_and_other_errors_pass():
    def never(rows):
        raise t.OutOfMemoryError("CUDA out of memory, says this test")

    with pytest.raises(SystemExit, match="single row"):
        list(in_batches(never, t.arange(2), 2))

    def broken(rows):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(in_batches(broken, t.arange(2), 2))


def test_peak_bytes_counts_what_lives_at_once():
    def one_after_the_other():
        for _ in range(4):
            t.zeros(1_000_000)

    def at_once():
        return [t.zeros(1_000_000) for _ in range(4)]

    assert 4e6 <= peak_bytes(one_after_the_other) < 8e6
    assert 16e6 <= peak_bytes(at_once) < 20e6


@pytest.mark.parametrize("d_model", [64, 125])
@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", [t.float32, t.bfloat16])
def test_a_norm_of_any_width_and_size_says_what_it_is(d_model, size, dtype):
    """Small weights do not make an RMSNorm look as if it took the mean away; odd widths have a mean of signs too."""
    weight = (size * (1 + t.rand(d_model))).to(dtype)
    layer_norm = t.nn.LayerNorm(d_model, dtype=dtype)
    rms_norm = t.nn.RMSNorm(d_model, eps=1e-6, dtype=dtype)
    for norm, centres in ((layer_norm, True), (rms_norm, False)):
        norm.weight.data = weight.clone()
        shape = ask_norm(norm, d_model, weight)
        assert shape.centres == centres
        t.testing.assert_close(shape.weight, weight.float(), rtol=1e-4 if dtype == t.float32 else 2e-2, atol=0)
