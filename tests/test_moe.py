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
    name_table,
    routing,
    scatter,
    silence,
    specialisation,
    token_losses,
)
from hooks import hook_points, hooks, run_with_cache, run_with_hooks
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
    t.manual_seed(0)
    model = MoE(
        MoEConfig(
            **dict(n_layers=2, n_heads=2, n_kv_heads=1, d_model=32, d_head=16, n_experts=4, d_expert=24, d_vocab=260)
            | more
        )
    )
    with t.no_grad():
        for p in model.parameters():
            p.add_(t.randn(p.shape) * 0.15)
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
    assert type(again) is type(hf) and {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in hf.state_dict().items()
    }
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
    mixtral = MoE.read_config(
        hub
        | dict(
            architectures=["MixtralForCausalLM"], num_local_experts=8, sliding_window=None, tie_word_embeddings=False
        )
    )
    assert (mixtral.n_experts, mixtral.d_expert, mixtral.norm_topk, mixtral.rope_base) == (8, 96, True, 1e6)
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
    assert (qwen2.d_expert, qwen2.shared, qwen2.d_mlp, qwen2.norm_topk, qwen2.qkv_bias, qwen2.windows, qwen2.dense) == (
        32,
        48,
        96,
        False,
        True,
        (),
        (),
    )
    assert MoE.read_config(
        qwen | dict(architectures=["Qwen3MoeForCausalLM"], norm_topk_prob=True, mlp_only_layers=[0])
    ).dense == (0,)
    olmoe = MoE.read_config(
        hub
        | dict(
            architectures=["OlmoeForCausalLM"], num_experts=8, norm_topk_prob=False, clip_qkv=None, rope_scaling=None
        )
    )
    assert (olmoe.d_expert, olmoe.qk_norm, olmoe.norm_topk) == (96, "full", False)


@pytest.mark.parametrize("variant", [*FOUR, "Qwen2Moe mixed"])
@t.no_grad()
def test_every_same_named_hook_equals_the_bridge(variant, tmp_path):
    hf = make_hf(variant)
    bridge, ours = load_model(str(save_folder(hf, tmp_path)), device="cpu"), MoE.from_hf(hf)
    bridge.set_use_attn_result(True)
    shared = [name for name in hook_points(ours) if name in hook_points(bridge)]
    _, mine = run_with_cache(ours, TOKENS, shared)
    _, theirs = run_with_cache(bridge, TOKENS, shared)
    for name in shared:
        assert (
            mine[name].shape == theirs[name].reshape(mine[name].shape).shape
            and mine[name].numel() == theirs[name].numel()
        ), name
        t.testing.assert_close(
            mine[name].clamp(min=-1e4),
            theirs[name].view_as(mine[name]).clamp(min=-1e4),
            atol=1e-4,
            rtol=1e-4,
            msg=lambda m: f"{name}: {m}",
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
    theirs, mine = (
        hf(TOKENS, labels=TOKENS, output_router_logits=True).loss,
        F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        + 0.3 * load_balancing_loss(list(cache.values()), 2),
    )
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    theirs.backward(), mine.backward()
    placed = {ours_name: x for name, p in hf.named_parameters() for ours_name, x in ours.place(name, p.grad).items()}
    assert set(placed) == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        t.testing.assert_close(p.grad, placed[name], atol=1e-5, rtol=1e-3, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("variant", FOUR)
@t.no_grad()
def test_bf16_stays_within_the_bf16_error(variant):
    hf = make_hf(variant)
    exact, ours, theirs = (
        hf(TOKENS).logits,
        MoE.from_hf(hf).bfloat16()(TOKENS).float(),
        hf.bfloat16()(TOKENS).logits.float(),
    )
    assert (ours - exact).abs().median() < 1.5 * (theirs - exact).abs().median()


def test_the_auxiliary_loss_equals_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = [t.randn(2, 30, 8) for _ in range(3)]
    for k in (1, 2, 8):
        assert load_balancing_loss(logits, k).item() == pytest.approx(
            load_balancing_loss_func(tuple(x.flatten(0, 1) for x in logits), 8, k).item(), rel=1e-5
        )
    assert load_balancing_loss([t.eye(8).repeat(20, 1)[None] * 1e-3], 1).item() == pytest.approx(1, abs=1e-3)
    assert load_balancing_loss([t.tensor([9.0, 0, 0, 0]).expand(1, 5, 4)], 1).item() > 3.9


def test_the_training_loss_balances_each_layer():
    model = own(aux_coef=0.5)
    logits, cache = run_with_cache(model, TOKENS)
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    by_layer = [load_balancing_loss([cache[f"blocks.{layer}.mlp.hook_router_logits"]], 2).item() for layer in range(2)]
    assert moe_loss(model, TOKENS, model.cfg).item() == pytest.approx(plain.item() + 0.5 * sum(by_layer) / 2, rel=1e-5)
    a, b = t.tensor([9.0, 0]).expand(1, 5, 2), t.tensor([0, 9.0]).expand(1, 5, 2)
    assert load_balancing_loss([a, b], 1).item() == pytest.approx(1, abs=1e-3) and load_balancing_loss([a], 1) > 1.9, (
        "pooled over layers, two collapsed layers look balanced"
    )


@t.no_grad()
def test_top_k_of_all_experts_is_the_dense_weighted_sum():
    for family in ("mixtral", "olmoe"):
        mlp, x = (
            SparseMoE(MoEConfig(n_experts=5, top_k=5, d_model=16, d_expert=12, **SWITCHES[family])),
            t.randn(2, 7, 16),
        )
        dense = sum(mlp.router(x).softmax(-1)[..., [e]] * expert(x) for e, expert in enumerate(mlp.experts))
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
    model, changed = own(), TOKENS.clone()
    changed[:, 12] += 1
    t.testing.assert_close(model(TOKENS)[:, :12], model(changed)[:, :12], atol=1e-5, rtol=1e-5)


@t.no_grad()
def test_hooks_of_the_experts_hold_the_tokens_routed_there_and_fire_with_none():
    model = own()
    _, cache = run_with_cache(model, TOKENS)
    t.testing.assert_close(model(TOKENS), run_with_cache(model, TOKENS)[0], atol=1e-5, rtol=1e-5)
    indices = cache["blocks.0.mlp.hook_expert_indices"]
    x = model.blocks[0].ln2.weight * cache["blocks.0.ln2.hook_normalized"]
    for e, expert in enumerate(model.blocks[0].mlp.experts):
        here = (indices == e).any(-1)
        assert cache[f"blocks.0.mlp.experts.{e}.hook_pre"].shape == (here.sum(), 24)
        t.testing.assert_close(cache[f"blocks.0.mlp.experts.{e}.hook_pre"], expert.gate(x[here]))
        t.testing.assert_close(
            cache[f"blocks.0.mlp.experts.{e}.hook_post"], F.silu(expert.gate(x[here])) * expert.inp(x[here])
        )
    _, alone = run_with_cache(model, TOKENS[:1, :1])
    assert sorted(len(alone[f"blocks.0.mlp.experts.{e}.hook_post"]) for e in range(4)) == [0, 0, 1, 1]
    with pytest.raises(KeyError):
        run_with_cache(model, TOKENS, "blocks.0.mlp.hook_post")


def cached(model: MoE, hook: tuple) -> dict:
    with hooks(model, [hook]):
        return run_with_cache(model, TOKENS)[1]


@t.no_grad()
def test_edits_of_the_router_are_obeyed():
    model = own()
    logits, cache = run_with_cache(model, TOKENS)
    out = cached(model, knock_out(1, 2))
    assert not (out["blocks.1.mlp.hook_expert_indices"] == 2).any() and len(out["blocks.1.mlp.experts.2.hook_pre"]) == 0
    t.testing.assert_close(out["blocks.1.mlp.hook_expert_weights"].sum(-1), t.ones(2, 20))
    forced = cached(model, force(1, 3))
    assert (
        forced["blocks.1.mlp.hook_expert_weights"].shape == (2, 20, 1)
        and len(forced["blocks.1.mlp.experts.3.hook_pre"]) == 40
    )
    mlp, x = model.blocks[1].mlp, model.blocks[1].ln2.weight * cache["blocks.1.ln2.hook_normalized"]
    t.testing.assert_close(forced["mlp_out", 1], mlp.experts[3](x), atol=1e-5, rtol=1e-5)
    silent, weights = (
        cached(model, silence(1, 0)),
        cache["blocks.1.mlp.hook_expert_weights"] * (cache["blocks.1.mlp.hook_expert_indices"] != 0),
    )
    reweighted = cached(model, ("blocks.1.mlp.hook_expert_weights", lambda w, hook: weights))
    t.testing.assert_close(silent["mlp_out", 1], reweighted["mlp_out", 1], atol=1e-6, rtol=1e-5)
    assert not t.allclose(silent["mlp_out", 1], cache["mlp_out", 1])
    drawn = cached(model, scatter(1, 4))["blocks.1.mlp.hook_expert_indices"]
    assert (drawn[..., 0] != drawn[..., 1]).all() and drawn.unique().tolist() == [0, 1, 2, 3]
    same = run_with_hooks(
        model,
        TOKENS,
        [
            (f"*.hook_{part}", lambda x, hook: x.clone())
            for part in ("router_logits", "expert_indices", "expert_weights")
        ],
    )
    t.testing.assert_close(same, logits, atol=1e-5, rtol=1e-5)


def test_bits_and_their_bias():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (50, 40))
    assert bits(labels.reshape(-1, 1), labels.ravel(), 4) == pytest.approx(2, abs=0.01)
    pairs = np.stack(
        [labels, (labels + 1) % 4], -1
    )  # two experts for each label: one of four is known to be one of two
    assert bits(pairs.reshape(-1, 2), labels.ravel(), 4) == pytest.approx(1, abs=0.01)
    blind = specialisation(rng.integers(0, 4, (50, 40, 2)), rng.integers(0, 200, (50, 40)), 4)
    assert blind["mean"] > 0.05 and abs(blind["observed"] - blind["mean"]) < 0.02, (
        "many labels, few tokens: bits out of nothing, and the shuffles say so"
    )
    informed = specialisation(labels[..., None], labels, 4)
    assert informed["observed"] > 10 * informed["bar"]
    row = np.repeat(rng.integers(0, 2, (50, 1)), 40, 1)
    through = specialisation((labels // 2)[..., None], np.maximum(row, 0), 2, given=labels, by_row=True)
    assert through["observed"] == pytest.approx(0, abs=1e-9), (
        "an expert that follows from the token says nothing beyond it"
    )
    beyond = specialisation(row[..., None], row, 2, given=labels, by_row=True)
    assert beyond["observed"] > 0.9 > 0.1 > beyond["bar"]


@t.no_grad()
def test_routing_and_losses_are_read_by_layer():
    model = MoE.from_hf(make_hf("Qwen2Moe mixed"))
    assert model.sparse == [0, 2] and routing(model, TOKENS).shape == (2, 2, 20, 2)
    losses = token_losses(model, TOKENS)
    assert losses.mean().item() == pytest.approx(
        F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).item(), rel=1e-5
    )
    middle = model(TOKENS, stop_at_layer=2)
    t.testing.assert_close(
        token_losses(model, TOKENS, [knock_out(2, 0)], start_at_layer=2, resid=middle),
        token_losses(model, TOKENS, [knock_out(2, 0)]),
    )


@pytest.mark.parametrize("variant", [*FOUR, "Qwen2Moe mixed"])
def test_the_table_names_every_tensor(variant, tmp_path):
    hf = make_hf(variant)
    folder, ours = save_folder(hf, tmp_path), MoE.from_hf(hf)
    table = name_table(ours, str(folder))
    tensors = load_file(folder / "model.safetensors")
    assert sum(row[4] for row in table) == len(tensors)
    row = next(row for row in table if row[0].endswith(("experts.*.w2.weight", "experts.*.down_proj.weight")))
    assert row[1] == "blocks.*.mlp.experts.*.out.weight" and row[4] == 6 * len(ours.sparse) and row[3] == "float32"
    assert row[5] == pytest.approx(
        min(expert.out.weight.norm().item() for layer in ours.sparse for expert in ours.blocks[layer].mlp.experts),
        rel=1e-5,
    )
    tensors["model.layers.0.extra"] = t.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SystemExit):
        name_table(ours, str(folder))


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
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
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
    assert words in str(error.value) and "\n" not in str(error.value)


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
    one_line_error(run("moe.py", "--top-k", "9", "--data", "short.txt", "--vocab", "300", "--steps", "6"), "top_k 9")
