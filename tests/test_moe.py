import json

import numpy as np
import pytest
import torch as t
import torch.nn.functional as F
from conftest import one_line_error, relative_error, save_folder, tiny_hf
from safetensors.torch import load_file, save_file

from data import train_bpe
from moe import (
    SWITCHES,
    MoE,
    MoEConfig,
    SparseMoE,
    bits,
    dense_moe,
    force,
    knock_out,
    load_balancing_loss,
    moe_loss,
    routing,
    scatter,
    silence,
    specialisation,
    token_losses,
)
from hooks import hook_points, hooks, run_with_cache, run_with_hooks
from parts import read_legend
from utils import load_model

SHAPE = dict(
    vocab_size=260,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts_per_tok=2,
    pad_token_id=None,
    bos_token_id=0,
    eos_token_id=0,
)
QWEN = dict(num_experts=6, moe_intermediate_size=24)
VARIANTS = {
    "MixtralForCausalLM": dict(num_local_experts=6),
    "Qwen2MoeForCausalLM": QWEN | dict(shared_expert_intermediate_size=32),
    "Qwen3MoeForCausalLM": QWEN | dict(head_dim=16, norm_topk_prob=True),
    "OlmoeForCausalLM": dict(num_experts=6),
    "Mixtral windowed": dict(num_local_experts=3, sliding_window=5),
    "Qwen2Moe mixed": QWEN
    | dict(
        shared_expert_intermediate_size=32,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        qkv_bias=False,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
        tie_word_embeddings=True,
    ),
    "Qwen3Moe mixed": QWEN
    | dict(decoder_sparse_step=2, attention_bias=True, use_sliding_window=True, sliding_window=4),
    "Olmoe biased": dict(num_experts=6, norm_topk_prob=True, attention_bias=True),
}
FOUR = list(VARIANTS)[:4]
TOKENS = t.randint(2, 250, (2, 20), generator=t.Generator().manual_seed(0))


def make_hf(variant: str):
    return tiny_hf(variant.split()[0].removesuffix("ForCausalLM"), **SHAPE | VARIANTS[variant])


def own(**more) -> MoE:
    """Two layers of four experts, random weights large enough that the router chooses clearly."""
    t.manual_seed(0)
    small = dict(n_layers=2, n_heads=2, n_kv_heads=1, d_model=32, d_head=16, n_experts=4, d_expert=24, d_vocab=260)
    model = MoE(MoEConfig(**small | more))
    with t.no_grad():
        for weight in model.parameters():
            weight.add_(t.randn(weight.shape) * 0.15)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@t.no_grad()
def test_logits_equal_hugging_face(variant, parity):
    hf = make_hf(variant)
    error = relative_error(MoE.from_hf(hf)(TOKENS), hf(TOKENS).logits)
    parity(variant, error)
    assert error <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@t.no_grad()
def test_both_directions_round_trip(variant, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = make_hf(variant)
    ours = MoE.from_hf(hf, train_bpe(["a b c"], 260))
    ours.to_hf(tmp_path / "a")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(again) is type(hf)
    saved = again.state_dict()
    wanted = hf.state_dict()
    assert set(saved) == set(wanted)
    assert all(t.equal(saved[name], x) for name, x in wanted.items())
    assert relative_error(again(TOKENS).logits, hf(TOKENS).logits) <= 1e-6
    back = MoE.from_folder(str(tmp_path / "a"))
    assert back.cfg == ours.cfg
    assert all(t.equal(x, ours.state_dict()[name]) for name, x in back.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("a b")["input_ids"][0] == 0
    save_folder(hf, tmp_path / "b")
    t.testing.assert_close(MoE.from_folder(str(tmp_path / "b"))(TOKENS), ours(TOKENS), atol=1e-5, rtol=1e-5)
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in "ab"]
    assert set(files[0]) == set(files[1]), "our files name the tensors as transformers does"


@pytest.mark.parametrize("variant", FOUR)
@t.no_grad()
def test_a_file_may_hold_all_experts_in_one_tensor(variant, tmp_path):
    hf = make_hf(variant)
    folder = save_folder(hf, tmp_path)
    save_file({name: x.contiguous() for name, x in hf.state_dict().items()}, folder / "model.safetensors")
    assert relative_error(MoE.from_folder(str(folder))(TOKENS), hf(TOKENS).logits) <= 1e-5


def test_configs_of_the_hub_are_read():
    hub = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=100,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        num_experts_per_tok=2,
        hidden_act="silu",
        rope_theta=1e6,
    )
    words = dict(architectures=["MixtralForCausalLM"], num_local_experts=8)
    mixtral = MoE.read_config(hub | words | dict(sliding_window=None, tie_word_embeddings=False))
    assert mixtral.n_experts == 8
    assert mixtral.d_expert == 96
    assert mixtral.norm_topk is True
    assert mixtral.rope_base == 1e6

    qwen = hub | dict(
        num_experts=8,
        moe_intermediate_size=32,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        sliding_window=32768,
        use_sliding_window=False,
        max_window_layers=2,
    )
    qwen2 = MoE.read_config(qwen | dict(architectures=["Qwen2MoeForCausalLM"], shared_expert_intermediate_size=48))
    assert qwen2.d_expert == 32
    assert qwen2.shared == 48
    assert qwen2.d_mlp == 96
    assert qwen2.norm_topk is False
    assert qwen2.qkv_bias is True
    assert qwen2.windows == ()
    assert qwen2.dense == ()
    words = dict(architectures=["Qwen3MoeForCausalLM"], norm_topk_prob=True, mlp_only_layers=[0], head_dim=16)
    assert MoE.read_config(qwen | words).dense == (0,)

    words = dict(architectures=["OlmoeForCausalLM"], num_experts=8, norm_topk_prob=False)
    olmoe = MoE.read_config(hub | words | dict(clip_qkv=None, rope_scaling=None))
    assert olmoe.d_expert == 96
    assert olmoe.qk_norm == "full"
    assert olmoe.norm_topk is False


@pytest.mark.parametrize("variant", [*FOUR, "Qwen2Moe mixed"])
@t.no_grad()
def test_every_same_named_hook_equals_the_bridge(variant, tmp_path):
    hf = make_hf(variant)
    ours = MoE.from_hf(hf)
    bridge = load_model(str(save_folder(hf, tmp_path)), device="cpu")
    bridge.set_use_attn_result(True)
    shared = [name for name in hook_points(ours) if name in hook_points(bridge)]
    _, mine = run_with_cache(ours, TOKENS, shared)
    _, theirs = run_with_cache(bridge, TOKENS, shared)
    for name in shared:
        assert mine[name].numel() == theirs[name].numel(), name
        t.testing.assert_close(
            mine[name].clamp(min=-1e4),  # masked scores are -inf here, the least number there
            theirs[name].view_as(mine[name]).clamp(min=-1e4),  # some hooks there have batch and pos on one axis
            atol=1e-4,
            rtol=1e-4,
            msg=lambda said: f"{name}: {said}",
        )
    for part in (
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_post",
        "hook_attn_out",
        "hook_mlp_out",
        "attn.hook_q",
        "attn.hook_k",
        "attn.hook_v",
        "attn.hook_pattern",
        "attn.hook_z",
        "attn.hook_result",
        "ln1.hook_normalized",
        "ln2.hook_scale",
    ):
        assert all(f"blocks.{layer}.{part}" in shared for layer in range(3)), part
    assert ("blocks.0.mlp.shared_expert.hook_post" in shared) == (ours.cfg.family == "qwen2_moe")
    _, routed = run_with_cache(ours, TOKENS, "*.hook_router_logits")
    _, gates = run_with_cache(bridge, TOKENS, "*.mlp.gate.hook_out")
    for layer in ours.sparse:
        t.testing.assert_close(
            routed[f"blocks.{layer}.mlp.hook_router_logits"].flatten(0, 1),
            gates[f"blocks.{layer}.mlp.gate.hook_out"],
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("variant", FOUR)
def test_loss_and_gradients_equal_hugging_face(variant):
    hf = make_hf(variant)
    ours = MoE.from_hf(hf)
    ours.load_state_dict({name: x.clone() for name, x in ours.state_dict().items()}, assign=True)
    ours.requires_grad_(True)
    hf.router_aux_loss_coef = 0.3
    logits, cache = run_with_cache(ours, TOKENS, "*.hook_router_logits", detach=False)
    theirs = hf(TOKENS, labels=TOKENS, output_router_logits=True).loss
    next_token = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    mine = next_token + 0.3 * load_balancing_loss(list(cache.values()), 2)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)

    theirs.backward()
    mine.backward()
    their_gradients = {}  # by our names
    for name, weight in hf.named_parameters():
        their_gradients |= ours.place(name, weight.grad)
    assert set(their_gradients) == {name for name, _ in ours.named_parameters()}
    for name, weight in ours.named_parameters():
        t.testing.assert_close(
            weight.grad, their_gradients[name], atol=1e-5, rtol=1e-3, msg=lambda said: f"{name}: {said}"
        )


@pytest.mark.parametrize("variant", FOUR)
@t.no_grad()
def test_bf16_stays_within_the_bf16_error(variant):
    hf = make_hf(variant)
    exact = hf(TOKENS).logits
    ours = MoE.from_hf(hf).bfloat16()(TOKENS).float()
    theirs = hf.bfloat16()(TOKENS).logits.float()  # last: it turns hf itself into bf16
    # the median: where rounding sends a token to another expert, its logits differ by more than rounding
    assert (ours - exact).abs().median() < 1.5 * (theirs - exact).abs().median()


def test_the_auxiliary_loss_equals_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = list(t.randn(3, 2, 30, 8))  # of three layers
    flat = tuple(layer.flatten(0, 1) for layer in logits)
    for top_k in (1, 2, 8):
        theirs = load_balancing_loss_func(flat, 8, top_k).item()
        assert load_balancing_loss(logits, top_k).item() == pytest.approx(theirs, rel=1e-5)


def test_the_auxiliary_loss_is_top_k_where_balanced_and_rises_to_the_number_of_experts():
    each_expert_in_turn = t.eye(8).repeat(20, 1)[None] * 1e-3
    assert load_balancing_loss([each_expert_in_turn], 1).item() == pytest.approx(1, abs=1e-3)
    always_the_first = t.tensor([9.0, 0, 0, 0]).expand(1, 5, 4)
    assert load_balancing_loss([always_the_first], 1).item() > 3.9  # of 4


def test_the_training_loss_balances_each_layer():
    model = own(aux_coef=0.5)
    logits, cache = run_with_cache(model, TOKENS)
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    by_layer = [load_balancing_loss([cache[f"blocks.{layer}.mlp.hook_router_logits"]], 2).item() for layer in range(2)]
    balance = sum(by_layer) / 2  # mean of two layers
    assert moe_loss(model, TOKENS, model.cfg).item() == pytest.approx(plain.item() + 0.5 * balance, rel=1e-5)


def test_pooled_over_layers_two_collapsed_layers_look_balanced():
    """Why the training loss takes each layer by itself."""
    to_the_first = t.tensor([9.0, 0]).expand(1, 5, 2)
    to_the_second = t.tensor([0, 9.0]).expand(1, 5, 2)
    assert load_balancing_loss([to_the_first], 1) > 1.9
    assert load_balancing_loss([to_the_first, to_the_second], 1).item() == pytest.approx(1, abs=1e-3)


@t.no_grad()
def test_top_k_of_all_experts_is_the_dense_weighted_sum():
    for family in ("mixtral", "olmoe"):
        mlp = SparseMoE(MoEConfig(n_experts=5, top_k=5, d_model=16, d_expert=12, **SWITCHES[family]))
        x = t.randn(2, 7, 16)
        probs = mlp.router(x).softmax(-1)
        dense = sum(probs[..., [i]] * expert(x) for i, expert in enumerate(mlp.experts))
        t.testing.assert_close(mlp(x), dense, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", SWITCHES)
@t.no_grad()
def test_the_sparse_layer_equals_its_plain_form(family):
    shared = 8 if family == "qwen2_moe" else 0
    mlp = SparseMoE(MoEConfig(n_experts=5, top_k=2, d_model=16, d_expert=12, shared=shared, **SWITCHES[family]))
    x = t.randn(2, 7, 16)
    t.testing.assert_close(mlp(x), dense_moe(mlp, x), atol=1e-6, rtol=1e-5)


@t.no_grad()
def test_later_tokens_never_change_earlier_logits():
    model = own()
    changed = TOKENS.clone()
    changed[:, 12] += 1
    t.testing.assert_close(model(TOKENS)[:, :12], model(changed)[:, :12], atol=1e-5, rtol=1e-5)


@t.no_grad()
def test_hooks_of_the_experts_hold_the_tokens_routed_there_and_fire_with_none():
    model = own()
    listened, cache = run_with_cache(model, TOKENS)
    t.testing.assert_close(model(TOKENS), listened, atol=1e-5, rtol=1e-5)
    indices = cache["blocks.0.mlp.hook_expert_indices"]
    x = model.blocks[0].ln2.weight * cache["blocks.0.ln2.hook_normalized"]
    for i, expert in enumerate(model.blocks[0].mlp.experts):
        here = x[(indices == i).any(-1)]  # (tokens routed here, d_model)
        pre = cache[f"blocks.0.mlp.experts.{i}.hook_pre"]
        post = cache[f"blocks.0.mlp.experts.{i}.hook_post"]
        assert pre.shape == (len(here), 24)
        t.testing.assert_close(pre, expert.gate(here))
        t.testing.assert_close(post, F.silu(expert.gate(here)) * expert.inp(here))

    _, alone = run_with_cache(model, TOKENS[:1, :1])  # one token, which two of the four experts take
    tokens_here = [len(alone[f"blocks.0.mlp.experts.{i}.hook_post"]) for i in range(4)]
    assert sorted(tokens_here) == [0, 0, 1, 1]
    with pytest.raises(KeyError):
        run_with_cache(model, TOKENS, "blocks.0.mlp.hook_post")


ROUTER = "blocks.1.mlp."  # of the layer that is edited below


def cached(model: MoE, *edits: tuple) -> dict:
    """The cache of a run under hooks."""
    with hooks(model, list(edits)):
        _, cache = run_with_cache(model, TOKENS)
    return cache


@t.no_grad()
def test_an_expert_knocked_out_is_chosen_by_no_token():
    cache = cached(own(), knock_out(1, 2))
    assert not (cache[ROUTER + "hook_expert_indices"] == 2).any()
    assert len(cache[ROUTER + "experts.2.hook_pre"]) == 0
    t.testing.assert_close(cache[ROUTER + "hook_expert_weights"].sum(-1), t.ones(2, 20))  # the others' sum to one


@t.no_grad()
def test_an_expert_forced_takes_every_token_alone():
    model = own()
    block = model.blocks[1]
    x = block.ln2.weight * cached(model)["blocks.1.ln2.hook_normalized"]
    forced = cached(model, force(1, 3))
    assert forced[ROUTER + "hook_expert_weights"].shape == (2, 20, 1)
    assert len(forced[ROUTER + "experts.3.hook_pre"]) == 40
    t.testing.assert_close(forced["mlp_out", 1], block.mlp.experts[3](x), atol=1e-5, rtol=1e-5)


@t.no_grad()
def test_an_expert_silenced_is_as_if_its_weight_were_zero():
    model = own()
    cache = cached(model)
    others_weights = cache[ROUTER + "hook_expert_weights"] * (cache[ROUTER + "hook_expert_indices"] != 0)
    reweighted = cached(model, (ROUTER + "hook_expert_weights", lambda weights, hook: others_weights))
    silent = cached(model, silence(1, 0))
    t.testing.assert_close(silent["mlp_out", 1], reweighted["mlp_out", 1], atol=1e-6, rtol=1e-5)
    assert not t.allclose(silent["mlp_out", 1], cache["mlp_out", 1])


@t.no_grad()
def test_experts_at_random_are_different_ones_and_all_of_them():
    drawn = cached(own(), scatter(1, 4))[ROUTER + "hook_expert_indices"]
    assert (drawn[..., 0] != drawn[..., 1]).all()
    assert drawn.unique().tolist() == [0, 1, 2, 3]


@t.no_grad()
def test_what_the_router_said_written_back_changes_nothing():
    model = own()
    parts = ("router_logits", "expert_indices", "expert_weights")
    same = run_with_hooks(model, TOKENS, [(f"*.hook_{part}", lambda x, hook: x.clone()) for part in parts])
    t.testing.assert_close(same, model(TOKENS), atol=1e-5, rtol=1e-5)


def test_bits_of_an_expert_a_label_and_of_two_experts_a_label():
    labels = np.random.default_rng(0).integers(0, 4, (50, 40))
    assert bits(labels.reshape(-1, 1), labels.ravel(), 4) == pytest.approx(2, abs=0.01)  # one of four
    pairs = np.stack([labels, (labels + 1) % 4], -1)  # one of four is known to be one of two
    assert bits(pairs.reshape(-1, 2), labels.ravel(), 4) == pytest.approx(1, abs=0.01)


def test_many_labels_give_bits_out_of_nothing_and_the_shuffles_say_so():
    rng = np.random.default_rng(0)
    blind = specialisation(rng.integers(0, 4, (50, 40, 2)), rng.integers(0, 200, (50, 40)), 4)
    assert blind["mean"] > 0.05
    assert abs(blind["observed"] - blind["mean"]) < 0.02
    labels = rng.integers(0, 4, (50, 40))
    informed = specialisation(labels[..., None], labels, 4)
    assert informed["observed"] > 10 * informed["bar"]


def test_what_an_expert_tells_of_a_row_beyond_the_token():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, (50, 40))
    source = np.repeat(rng.integers(0, 2, (50, 1)), 40, 1)  # one for each row
    follows_token = specialisation((tokens // 2)[..., None], source, 2, given=tokens, by_row=True)
    assert follows_token["observed"] == pytest.approx(0, abs=1e-9)
    follows_source = specialisation(source[..., None], source, 2, given=tokens, by_row=True)
    assert follows_source["observed"] > 0.9
    assert follows_source["bar"] < 0.1


@t.no_grad()
def test_routing_and_losses_are_read_by_layer():
    model = MoE.from_hf(make_hf("Qwen2Moe mixed"))
    assert model.sparse == [0, 2]  # layer 1 is dense
    assert routing(model, TOKENS).shape == (2, 2, 20, 2)  # (sparse layer, row, pos, k)
    plain = F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert token_losses(model, TOKENS).mean().item() == pytest.approx(plain.item(), rel=1e-5)
    middle = model(TOKENS, stop_at_layer=2)
    from_the_middle = token_losses(model, TOKENS, [knock_out(2, 0)], start_at_layer=2, resid=middle)
    t.testing.assert_close(from_the_middle, token_losses(model, TOKENS, [knock_out(2, 0)]))


@pytest.mark.parametrize("variant", [*FOUR, "Qwen2Moe mixed"])
def test_the_legend_names_every_tensor(variant, tmp_path):
    hf = make_hf(variant)
    folder = save_folder(hf, tmp_path)
    ours = MoE.from_hf(hf)
    legend = read_legend(str(folder))
    assert len(legend.tensors) == len(load_file(folder / "model.safetensors"))
    assert not legend.unnamed

    (of_outputs,) = [kind for kind in legend.kinds if (kind.part, kind.owner) == ("W_out", "expert")]
    norms = [expert.W_out.norm().item() for layer in ours.sparse for expert in ours.blocks[layer].mlp.experts]
    assert sorted(of_outputs.norms) == pytest.approx(sorted(norms), rel=1e-5)
    (of_routers,) = [kind for kind in legend.kinds if kind.part == "W_router"]
    assert of_routers.norms == pytest.approx(
        [ours.blocks[layer].mlp.router.weight.norm().item() for layer in ours.sparse], rel=1e-5
    )
    dense = [kind for kind in legend.kinds if kind.part == "W_out" and not kind.owner]
    assert sum(len(kind.norms) for kind in dense) == len(ours.cfg.dense)


@pytest.mark.parametrize(
    "damage, words",
    [
        ("unknown architecture", "BloomForCausalLM"),
        ("top_k", "top_k 9"),
        ("clip", "clip_qkv"),
        ("missing tensor", "missing"),
        ("extra tensor", "no place"),
        ("extra expert", "no place"),
        ("wrong shape", "the config says"),
        ("fused with a wrong name", "no place"),
        ("no tokenizer", "tokenizer.json"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(damage, words, tmp_path):
    folder = save_folder(make_hf("OlmoeForCausalLM"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    match damage:
        case "unknown architecture":
            config["architectures"] = ["BloomForCausalLM"]
        case "top_k":
            config["num_experts_per_tok"] = 9
        case "clip":
            config["clip_qkv"] = 8.0
        case "missing tensor":
            del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        case "extra tensor":
            tensors["model.layers.1.mlp.up_proj.bias"] = t.zeros(3)
        case "extra expert":
            config["num_experts"] = 5
        case "wrong shape":
            config["intermediate_size"] = 96
        case "fused with a wrong name":
            tensors["model.layers.1.mlp.experts.up_proj"] = t.zeros(6, 40, 48)
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SystemExit) as error:
        MoE.from_folder(str(folder))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(top_k=5), "top_k"),
        (dict(shared=8), "shared"),
        (dict(norm_topk=False), "norm_topk"),
        (dict(dense=(0,)), "every layer"),
        (dict(architecture="LlamaForCausalLM"), "not built"),
        (SWITCHES["qwen3_moe"] | dict(qk_norm="full"), "qk_norm"),
        (SWITCHES["qwen3_moe"] | dict(dense=(0, 1, 2)), "no layer"),
    ],
)
def test_shapes_that_cannot_be_are_refused(wrong, words):
    with pytest.raises(SystemExit, match=words):
        MoEConfig(**wrong)


def test_more_experts_chosen_than_there_are_is_one_line(run, workdir):
    (workdir / "short.txt").write_text("the cat and the dog and the tree\n\n" * 400)
    one_line_error(run("moe.py", "--top-k", "9", "--data", "short.txt", "--vocab", "300", "--steps", "6"), "--top-k 9")
