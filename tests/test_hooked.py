"""The methods that a TransformerLens user types: on each of our classes, and beside a TransformerBridge of the same weights."""

import pytest
import torch as t
from conftest import ROOT, relative_error, save_folder, tiny_attn_only, tiny_hf
from architectures import make_architecture

from attn_only import AttnOnly
from llama_block import Llama
from moe import MoE
from tiny_transformer import TinyTransformer
from utils import load_model
from zero_layer import ZeroLayer

TEXT = "The capital of Japan is"
GPT2 = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same GPT-2 in our class and as a bridge."""
    folder = save_folder(tiny_hf("GPT2", **GPT2), tmp_path_factory.mktemp("gpt2"))
    return load_model(str(folder), (TinyTransformer,), "cpu"), load_model(str(folder), (), "cpu")


@t.no_grad()
def test_the_methods_mean_what_transformer_lens_means_by_them(both):
    ours, bridge = both
    assert isinstance(ours, TinyTransformer) and not isinstance(bridge, TinyTransformer)
    tokens = ours.to_tokens(TEXT)
    assert tokens.equal(bridge.to_tokens(TEXT, prepend_bos=bool(tokens[0, 0] == 0)))
    assert ours.to_str_tokens(TEXT) == ours.to_str_tokens(tokens) == bridge.to_str_tokens(tokens[0])
    assert ours.to_string(tokens[0, 1:]) == bridge.to_string(tokens[0, 1:])
    assert ours.to_single_token("a") == bridge.to_single_token("a")
    for name in ("W_E", "W_U", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"):
        assert getattr(ours, name).shape == getattr(bridge, name).shape, name
        assert relative_error(getattr(ours, name), getattr(bridge, name)) < 1e-6, name
    assert ours.W_pos.equal(bridge.original_model.transformer.wpe.weight)
    assert ours.blocks[1].attn.W_Q.equal(ours.W_Q[1])

    wanted = ["blocks.0.attn.hook_pattern", "blocks.1.hook_resid_post"]
    logits, cache = ours.run_with_cache(tokens, names_filter=wanted)
    their_logits, their_cache = bridge.run_with_cache(tokens, names_filter=wanted)
    assert relative_error(logits, their_logits) < 1e-5
    assert relative_error(cache["pattern", 0], their_cache["pattern", 0]) < 1e-5

    def zero_head_2(z, hook):
        z = z.clone()
        z[:, :, 2] = 0
        return z

    edits = [("blocks.1.attn.hook_z", zero_head_2)]
    assert (
        relative_error(ours.run_with_hooks(tokens, fwd_hooks=edits), bridge.run_with_hooks(tokens, fwd_hooks=edits))
        < 1e-5
    )


@t.no_grad()
def test_added_hooks_stay_until_they_are_reset(both):
    ours, _ = both
    tokens = ours.to_tokens(TEXT)
    plain = ours(tokens)
    ours.add_hook("blocks.0.hook_mlp_out", lambda x, hook: 0 * x)
    changed = ours(tokens)
    assert relative_error(changed, plain) > 1e-2
    with ours.hooks([("blocks.1.hook_mlp_out", lambda x, hook: 0 * x)]):
        assert relative_error(ours(tokens), changed) > 1e-2
    assert ours(tokens).equal(changed)
    ours.reset_hooks()
    assert ours(tokens).equal(plain)


def test_names_that_are_unknown_or_never_fire_raise(both):
    ours, _ = both
    for call in (
        lambda: ours.add_hook("blocks.9.hook_resid_pre", print),
        lambda: ours.run_with_cache(TEXT, "blocks.0.hook_nothing"),
        lambda: ours.run_with_hooks(TEXT, [("hook_typo", print)]),
    ):
        with pytest.raises(KeyError, match="unknown hook name"):
            call()
    with pytest.raises(RuntimeError, match="never fired"):
        ours.run_with_hooks(TEXT, [("blocks.1.hook_mlp_out", lambda x, hook: None)], stop_at_layer=1)


@t.no_grad()
def test_every_class_of_ours_has_them(tmp_path):
    make_architecture("Mixtral", tmp_path)
    models = [
        load_model(str(ROOT / "models/world"), (Llama,), "cpu"),
        load_model(str(tmp_path), (MoE,), "cpu"),
        tiny_attn_only(),
        ZeroLayer(20, 8),
    ]
    assert [type(model) for model in models] == [Llama, MoE, AttnOnly, ZeroLayer]
    for model in models:
        tokens = t.randint(1, 20, (2, 7))
        logits, cache = model.run_with_cache(tokens)
        assert logits.shape == (2, 7, model.W_U.shape[1]) and "hook_embed" in cache
        zeroed = model.run_with_hooks(tokens, [("hook_embed", lambda x, hook: 0 * x)])
        assert not zeroed.equal(logits)
        model.reset_hooks()
        assert relative_error(model(tokens), logits) < 1e-5
        if not isinstance(model, ZeroLayer):
            assert model.W_Q.shape[0] == len(model.blocks)
    world = models[0]
    two = world.to_tokens([TEXT, " Mary"])
    assert two.shape[0] == 2 and world.to_string(two[0, 1:]) == f" {TEXT}".strip()
    assert two[1, 0] == two[0, 0] and (two[1, 2:] == 0).all()
    assert world.to_tokens(" Mary", prepend_bos=False).equal(two[1:, 1:2])
