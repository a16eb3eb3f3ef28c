import json
import math

import pytest
import torch as t
from conftest import ROOT, relative_error, save_folder, tiny_hf
from safetensors.torch import load_file, save_file

from data import train_bpe
from llama_block import Llama, LlamaConfig, RMSNorm, rope, rope_frequencies, rope_tables
from llama_block import hf_name
from hooks import hook_points, run_with_cache
from utils import load_model
from weights import read_tensors

SHAPE = dict(
    vocab_size=260,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
VARIANTS = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": dict(sliding_window=5),
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": dict(head_dim=16),
    "Llama 3.1": dict(rope_parameters=LLAMA3),
    "Llama tied": dict(tie_word_embeddings=True),
    "Llama biased": dict(attention_bias=True),
    "Qwen2 windowed": dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "Olmo2ForCausalLM": {},
    "Gemma2ForCausalLM": dict(
        head_dim=12,
        query_pre_attn_scalar=12,
        hidden_activation="silu",
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
        attention_bias=True,
        sliding_window=5,
    ),
}
TOKENS = t.randint(1, 250, (2, 20), generator=t.Generator().manual_seed(0))


def make_hf(variant: str):
    return tiny_hf(variant.split()[0].removesuffix("ForCausalLM"), **SHAPE | VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@t.no_grad()
def test_logits_equal_hugging_face(variant, parity):
    hf = make_hf(variant)
    error = relative_error(Llama.from_hf(hf)(TOKENS), hf(TOKENS).logits)
    parity(variant, error)
    assert error <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@t.no_grad()
def test_both_directions_round_trip(variant, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = make_hf(variant)
    ours = Llama.from_hf(hf, train_bpe(["a b c"], 260))
    ours.to_hf(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(again) is type(hf)
    saved = again.state_dict()
    wanted = hf.state_dict()
    assert set(saved) == set(wanted)
    rounding = 1e-6 if variant.startswith("Gemma2") else 0.0  # its norms and embedding are folded
    for name, x in wanted.items():
        t.testing.assert_close(saved[name], x, atol=rounding, rtol=0)
    assert relative_error(again(TOKENS).logits, hf(TOKENS).logits) <= 1e-6

    back = Llama.from_folder(str(tmp_path / "a"))
    t.testing.assert_close(back(TOKENS), ours(TOKENS), atol=20 * rounding, rtol=0)
    assert back.cfg == ours.cfg
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("a b")["input_ids"][0] == 0
    save_folder(hf, tmp_path / "b")
    t.testing.assert_close(Llama.from_folder(str(tmp_path / "b"))(TOKENS), ours(TOKENS), atol=0, rtol=0)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.endswith("ForCausalLM")])
@t.no_grad()
def test_every_same_named_hook_equals_the_bridge(variant, tmp_path):
    hf = make_hf(variant)
    ours = Llama.from_hf(hf)
    bridge = load_model(str(save_folder(hf, tmp_path)), device="cpu")
    bridge.set_use_attn_result(True)
    shared = [name for name in hook_points(ours) if name in hook_points(bridge)]
    _, mine = run_with_cache(ours, TOKENS, shared)
    _, theirs = run_with_cache(bridge, TOKENS, shared)
    for name in shared:
        assert mine[name].shape == theirs[name].shape, name
        t.testing.assert_close(
            mine[name].clamp(min=-1e4),  # masked scores are -inf here, the least number there
            theirs[name].clamp(min=-1e4),
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
        "mlp.hook_pre",
        "mlp.hook_post",
        "ln1.hook_normalized",
        "ln2.hook_scale",
    ):
        assert all(f"blocks.{layer}.{part}" in shared for layer in range(3)), part


def test_gradients_equal_hugging_face():
    hf = make_hf("Qwen3ForCausalLM")
    ours = Llama.from_hf(hf)
    for logits in (hf(TOKENS).logits, ours(TOKENS)):
        loss = t.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
    theirs = dict(hf.named_parameters())
    for name, mine in ours.named_parameters():
        wanted = theirs[hf_name(name)].grad
        t.testing.assert_close(mine.grad, wanted, atol=1e-5, rtol=1e-3, msg=lambda said: f"{name}: {said}")


@t.no_grad()
def test_bf16_stays_within_the_bf16_error():
    hf = make_hf("LlamaForCausalLM")
    exact = hf(TOKENS).logits
    ours = Llama.from_hf(hf).bfloat16()(TOKENS).float()
    theirs = hf.bfloat16()(TOKENS).logits.float()  # last: it turns hf itself into bf16
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


@t.no_grad()
def test_later_tokens_never_change_earlier_logits():
    model = Llama.from_hf(make_hf("LlamaForCausalLM"))
    changed = TOKENS.clone()
    changed[:, 12] += 1
    t.testing.assert_close(model(TOKENS)[:, :12], model(changed)[:, :12], atol=1e-5, rtol=1e-5)


@t.no_grad()
def test_a_window_shows_the_query_and_the_keys_just_before_it():
    model = Llama.from_hf(make_hf("MistralForCausalLM"))  # a window of 5
    _, cache = run_with_cache(model, TOKENS, "blocks.0.attn.hook_pattern")
    distance = t.arange(20)[:, None] - t.arange(20)  # (query, key)
    in_window = (distance >= 0) & (distance < 5)
    assert ((cache["pattern", 0] > 0) == in_window).all()


@t.no_grad()
def test_listening_changes_nothing():
    model = Llama.from_hf(make_hf("MistralForCausalLM"))
    listened, _ = run_with_cache(model, TOKENS)
    t.testing.assert_close(listened, model(TOKENS), atol=1e-5, rtol=1e-5)
    kinds = {name.split(".")[-1] for name in hook_points(model)}
    assert kinds >= {"hook_rot_q", "hook_result", "hook_pre_linear"}


@t.no_grad()
def test_the_middle_of_the_model_can_be_entered_and_left():
    model = Llama.from_hf(make_hf("LlamaForCausalLM"))
    _, cache = run_with_cache(model, TOKENS, "blocks.2.hook_resid_pre")
    middle = model(TOKENS, stop_at_layer=2)
    t.testing.assert_close(middle, cache["resid_pre", 2])
    t.testing.assert_close(model(TOKENS, start_at_layer=2, resid=middle), model(TOKENS))


def test_rope_scores_depend_on_the_offset_alone():
    cos, sin = rope_tables(LlamaConfig(d_head=16), 50)
    q = rope(t.randn(16).expand(1, 50, 1, 16), cos, sin)[0, :, 0]  # one vector, at 50 positions
    k = rope(t.randn(16).expand(1, 50, 1, 16), cos, sin)[0, :, 0]
    scores = q @ k.T  # (query, key)
    for offset in range(20):
        at_this_offset = scores.diagonal(-offset)
        assert (at_this_offset - scores[offset, 0]).abs().max() < 1e-4


def test_rope_convention_turns_i_with_i_plus_half():
    cos, sin = rope_tables(LlamaConfig(d_head=8, rope_base=100.0), 4)
    x = t.randn(8)
    turned = rope(x.expand(1, 4, 1, 8), cos, sin)[0, 3, 0]
    for i in range(4):
        angle = 3 * 100 ** (-i / 4)  # at position 3, of frequency base ** (-2i / d_head)
        by_hand = complex(x[i], x[i + 4]) * complex(math.cos(angle), math.sin(angle))
        assert turned[i].item() == pytest.approx(by_hand.real, abs=1e-5)
        assert turned[i + 4].item() == pytest.approx(by_hand.imag, abs=1e-5)


def test_llama3_scaling_slows_low_frequencies_only():
    scaling = LLAMA3 | {"original_max_position_embeddings": 8192}
    plain = rope_frequencies(LlamaConfig(d_head=64, rope_base=5e5))
    scaled = rope_frequencies(LlamaConfig(d_head=64, rope_base=5e5, rope_scaling=scaling))
    assert t.equal(scaled[:2], plain[:2])
    assert t.allclose(scaled[-2:], plain[-2:] / 8)  # factor 8


def test_rmsnorm_against_torch():
    x = t.randn(3, 5, 16)
    norm = RMSNorm(16, 1e-6)
    norm.weight.data = t.randn(16)
    t.testing.assert_close(norm(x), t.nn.functional.rms_norm(x, (16,), norm.weight, 1e-6))


def test_no_graph_break_under_compile():
    model = Llama.from_hf(make_hf("LlamaForCausalLM"))
    assert t._dynamo.explain(model)(TOKENS).graph_break_count == 0


@pytest.mark.parametrize("weights", ["real", "random"])
@t.no_grad()
def test_a_real_llama_continues_as_transformers_does(weights, tmp_path):
    """
    Greedy text of stories260K, token by token; and of random weights in its shape with its tokenizer, where only those
    are at hand.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = ROOT.parent / "shared/models/stories260K"
    needed = "model.safetensors" if weights == "real" else "config.json"
    if not (folder / needed).is_file():
        pytest.skip(f"{folder.name} of ../shared is absent ({weights} weights)")
    if weights == "random":
        t.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        for weight in hf.parameters():
            weight.add_(0.2 * t.randn(weight.shape))
        hf.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
        folder = tmp_path
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = Llama.from_folder(str(folder))
    tokens = AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt")["input_ids"]
    assert (hf(tokens).logits - ours(tokens)).abs().max() < 1e-4
    their_text = hf.generate(tokens, max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert t.equal(their_text, ours.generate(tokens, 60))


@pytest.mark.parametrize(
    "damage, words",
    [
        ("unknown architecture", "BloomForCausalLM"),
        ("unknown rope", "yarn"),
        ("heads", "not a multiple"),
        ("activation", "gelu"),
        ("missing tensor", "missing"),
        ("extra tensor", "no place"),
        ("wrong shape", "the config says"),
        ("no tokenizer", "tokenizer.json"),
        ("no weights", "only safetensors"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(damage, words, tmp_path):
    folder = save_folder(make_hf("LlamaForCausalLM"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    match damage:
        case "unknown architecture":
            config["architectures"] = ["BloomForCausalLM"]
        case "unknown rope":
            config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4}
        case "heads":
            config["num_key_value_heads"] = 3
        case "activation":
            config["hidden_act"] = "gelu"
        case "missing tensor":
            del tensors["model.layers.1.mlp.up_proj.weight"]
        case "extra tensor":
            tensors["model.layers.1.mlp.up_proj.bias"] = t.zeros(3)
        case "wrong shape":
            config["intermediate_size"] = 96
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "no weights":
            (folder / "model.safetensors").rename(folder / "model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    if damage != "no weights":
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SystemExit) as error:
        Llama.from_folder(str(folder))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_sharded_folders_are_read_tensor_by_tensor(tmp_path):
    hf = make_hf("LlamaForCausalLM")
    hf.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert {name for name, _ in read_tensors(str(tmp_path))} == set(hf.state_dict())


def test_a_window_is_read_where_transformers_reads_one():
    """A Llama's config can hold a window left over from Mistral; its attention sees all."""
    sizes = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24, vocab_size=50)
    hf = tiny_hf("Llama", **sizes, num_key_value_heads=2, sliding_window=3)
    ours = Llama.from_hf(hf)
    assert not any(ours.cfg.windows)
    tokens = t.randint(50, (2, 12), generator=t.Generator().manual_seed(0))
    assert relative_error(ours(tokens), hf(tokens).logits) < 1e-5
