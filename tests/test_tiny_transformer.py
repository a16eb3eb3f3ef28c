import copy
import json
import math

import pytest
import torch as t
from conftest import one_line_error
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from data import train_bpe
from llama_block import Llama, LlamaConfig
from tiny_transformer import TinyConfig, TinyTransformer, sinusoids
from bench import bench_against_hf
from train import language_loss
from hooks import hook_points, run_with_cache
from utils import load_model
from weights import tensor_table

V = 300


def shake(model: t.nn.Module, size: float = 0.1) -> t.nn.Module:
    """Weights that a wrong formula cannot survive: biases and norms too."""
    t.manual_seed(1)
    with t.no_grad():
        for p in model.parameters():
            p.add_(size * t.randn_like(p))
    return model.eval()


def hf_gpt2(tied: bool = True, **more) -> GPT2LMHeadModel:
    t.manual_seed(0)
    config = GPT2Config(
        **{
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "vocab_size": V,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "tie_word_embeddings": tied,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **more,
        }
    )
    return shake(GPT2LMHeadModel(config))


def small(**more) -> TinyTransformer:
    t.manual_seed(0)
    return shake(
        TinyTransformer(
            TinyConfig(**{"n_layers": 2, "n_heads": 3, "d_model": 24, "d_mlp": 40, "d_vocab": 30, "n_ctx": 48, **more})
        )
    )


def small_llama() -> Llama:
    t.manual_seed(0)
    return shake(
        Llama(LlamaConfig(n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_head=8, d_mlp=48, d_vocab=30, n_ctx=64))
    )


@pytest.fixture(scope="module")
def tokens() -> t.Tensor:
    return t.randint(V, (3, 40), generator=t.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 as transformers saves it, with a tokenizer."""
    path = tmp_path_factory.mktemp("hf")
    hf_gpt2().save_pretrained(path)
    train_bpe(["a b c"], V).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>"})
    )
    return path


@pytest.fixture(scope="module")
def bridge(folder):
    return load_model(str(folder), device="cpu", dtype="float32")


# %% Equal to Hugging Face, forwards and backwards
@pytest.mark.parametrize(
    "tied, more", [(True, {}), (False, {"n_inner": 96, "activation_function": "gelu", "layer_norm_epsilon": 1e-3})]
)
@t.no_grad()
def test_logits_equal_hugging_face(tied, more, tokens, parity):
    hf = hf_gpt2(tied, **more)
    ours, theirs = TinyTransformer.from_hf(hf)(tokens), hf(tokens).logits
    error, relative = (ours - theirs).abs().max().item(), ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"GPT-2 {'tied' if tied else 'untied'}: max |difference| {error:.1e}, relative {relative:.1e}")
    assert relative <= 1e-5
    if not more:
        parity("GPT2LMHeadModel", relative)


def test_gradients_equal_hugging_face(tokens):
    hf = hf_gpt2()
    ours = TinyTransformer.from_hf(copy.deepcopy(hf))
    language_loss(ours, tokens).backward()
    language_loss(lambda x: hf(x).logits, tokens).backward()
    mine, found = dict(ours.named_parameters()), 0
    for name, p in hf.named_parameters():
        for place, grad in ours.place(name, p.grad).items():
            t.testing.assert_close(mine[place].grad, grad, atol=1e-5, rtol=1e-4)
            found += 1
    assert found == len(mine)


@t.no_grad()
def test_bf16_stays_within_its_own_error(tokens):
    hf = hf_gpt2()
    exact, ours = hf(tokens).logits, TinyTransformer.from_hf(copy.deepcopy(hf)).bfloat16()(tokens).float()
    theirs = hf.bfloat16()(tokens).logits.float()
    assert (ours - exact).pow(2).mean().sqrt() < 1.2 * (theirs - exact).pow(2).mean().sqrt()


@t.no_grad()
def test_every_hook_equals_the_bridge(folder, bridge, tokens):
    ours = load_model(str(folder), ours=(TinyTransformer,), device="cpu", dtype="float32")
    assert isinstance(ours, TinyTransformer) and ours.tokenizer.get_vocab_size() <= V
    bridge.set_use_attn_result(True)
    (logits, cache), (theirs, expected) = (
        run_with_cache(ours, tokens, [name for name in hook_points(ours) if "rot_" not in name]),
        run_with_cache(bridge, tokens),
    )
    if "blocks.0.attn.hook_result" not in expected:
        expected |= run_with_cache(bridge, tokens, "*.attn.hook_result")[1]
    bridge.set_use_attn_result(False)
    t.testing.assert_close(logits, theirs, atol=1e-4, rtol=1e-4)
    for name, x in cache.items():
        y = expected[name]
        if name.endswith("attn_scores"):
            x, y = x.tril(), y.tril()  # the mask may be -inf or very negative
        assert x.shape[1:] == y.shape[1:] and (x - y).abs().max() < 1e-4, name
    assert len(cache) == 3 * 18 + 4


# %% Both ways through a Hugging Face folder
@pytest.mark.parametrize("more", [{}, {"tied": False, "positions": "sinusoidal", "act": "gelu", "d_mlp": 50}])
@t.no_grad()
def test_round_trip_through_a_folder(tmp_path, more):
    model = small(d_vocab=V, **more)
    model.tokenizer, ids = train_bpe(["ab cd"], V), t.randint(V, (2, 20))
    model.to_hf(tmp_path / "m")
    hf, again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval(), TinyTransformer.from_folder(tmp_path / "m")
    t.testing.assert_close(hf(ids).logits, model(ids), atol=1e-4, rtol=1e-4)
    assert t.equal(again(ids), model(ids)) and (again.unembed.weight is again.embed.weight) == model.cfg.tied
    assert {k: v for k, v in vars(again.cfg).items() if k != "positions"} == {
        k: v for k, v in vars(model.cfg).items() if k != "positions"
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "m").encode("ab cd") == [
        hf.config.bos_token_id,
        *model.tokenizer.encode("ab cd", add_special_tokens=False).ids,
    ]
    hf.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    (tmp_path / "theirs/tokenizer.json").write_text(model.tokenizer.to_str())
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1 and t.equal(
        TinyTransformer.from_folder(tmp_path / "theirs")(ids), model(ids)
    )


def test_tensor_table_reads_every_tensor(folder):
    table, state = {row[0]: row[1:] for row in tensor_table(str(folder))}, hf_gpt2().state_dict()
    assert set(table) == set(state) - {"lm_head.weight"}
    for name, (shape, dtype, norm) in table.items():
        assert (
            shape == tuple(state[name].shape)
            and dtype == "float32"
            and norm == pytest.approx(state[name].norm().item(), rel=1e-5)
        )


def test_what_does_not_fit_is_refused(tmp_path, folder):
    hf = hf_gpt2()

    class Fake:  # a transformers model whose state we can spoil
        config = hf.config

        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return self.state

    state = hf.state_dict()
    for spoiled, words in (
        (
            {k: v for k, v in state.items() if "h.1.mlp.c_fc.bias" not in k},
            "missing from the file, first blocks.1.mlp.inp.bias",
        ),
        (state | {"transformer.h.0.extra": t.ones(2)}, "extra has no place"),
        (state | {"transformer.wpe.weight": t.ones(3, 64)}, "the config says"),
        (state | {"lm_head.weight": state["lm_head.weight"] + 1}, "ties"),
        (state | {"transformer.h.7.ln_1.bias": t.ones(64)}, "has no place"),
    ):
        with pytest.raises(SystemExit, match=words):
            TinyTransformer.from_hf(Fake(spoiled))
    for change, words in (
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is not built"),
        ({"activation_function": "relu"}, "relu"),
        ({"n_head": 5}, "does not divide into 5 heads"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ):
        bad = tmp_path / words[:4]
        bad.mkdir()
        for file in folder.iterdir():
            (bad / file.name).write_bytes(file.read_bytes())
        (bad / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
        with pytest.raises(SystemExit, match=words):
            TinyTransformer.from_folder(bad)
    (bad / "config.json").write_text((folder / "config.json").read_text())
    (bad / "tokenizer.json").unlink()
    with pytest.raises(SystemExit, match="no tokenizer.json"):
        TinyTransformer.from_folder(bad)
    (folder_without := tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no model.safetensors"):
        list(tensor_table(str(folder_without)))
    (folder_without / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(SystemExit, match="corrupt"):
        list(tensor_table(str(folder_without)))
    with pytest.raises(SystemExit, match="100 tokens are too many"):
        small()(t.zeros(1, 100, dtype=t.long))


def test_masks_in_old_files_are_left_out():
    hf = hf_gpt2()
    assert TinyTransformer(TinyConfig()).place("h.3.attn.bias", t.ones(1, 1, 4, 4)) == {}
    assert list(TinyTransformer.from_hf(hf).place("h.3.attn.c_attn.bias", t.arange(6)).values())[1].tolist() == [2, 3]


# %% The model itself
def test_sinusoids_have_their_closed_form():
    table = sinusoids(50, 16)
    assert table.shape == (50, 16)
    for pos, i in ((0, 0), (7, 3), (49, 7)):
        assert table[pos, 2 * i].item() == pytest.approx(math.sin(pos / 10000 ** (2 * i / 16)), abs=1e-5)
        assert table[pos, 2 * i + 1].item() == pytest.approx(math.cos(pos / 10000 ** (2 * i / 16)), abs=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@t.no_grad()
def test_no_token_sees_the_future(positions):
    model, ids = small(positions=positions), t.randint(30, (1, 12))
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 30
    t.testing.assert_close(model(ids)[:, :8], model(changed)[:, :8])
    assert not t.allclose(model(ids)[:, 8:], model(changed)[:, 8:])


@t.no_grad()
def test_parts_of_the_model_can_be_run():
    model, ids = small(), t.randint(30, (2, 12))
    t.testing.assert_close(model(ids, 1, resid=model(ids, stop_at_layer=1)), model(ids))


def test_heads_must_divide():
    with pytest.raises(SystemExit, match="d_model 128 does not divide into 3 heads"):
        TinyConfig(n_heads=3)


def test_compiles_without_a_graph_break():
    assert t._dynamo.explain(small())(t.randint(30, (2, 12))).graph_break_count == 0


def test_bench_gives_a_ratio():
    hf = hf_gpt2(n_layer=1)
    assert 0.1 < bench_against_hf(TinyTransformer.from_hf(copy.deepcopy(hf)), hf, t.randint(V, (2, 16)), pairs=3) < 10


# %% The script, as a newcomer runs it
FAST = ("--steps", "12", "--tokens-per-step", "1024", "--contexts", "32")


def test_sinusoidal_and_untied_variants_run(run):
    done = run("tiny_transformer.py", *FAST, "--positions", "sinusoidal", "--no-tied", "--n-layers", "1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--model", "./nowhere"), ("no such model folder: ./nowhere",)),
        (("--answer", "qqqzzz"), ("no token reads 'qqqzzz'",)),
    ],
)
def test_bad_input_gets_one_line(run, flags, words):
    one_line_error(run("tiny_transformer.py", *FAST, "--n-layers", "1", *flags), *words)
