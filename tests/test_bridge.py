"""The loader and the hooks on real Hugging Face models through TransformerBridge (one process: its import takes 10 s)."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch as t
from conftest import ROOT

import utils
from heads import head_scores, repeated_tokens
from data import train_bpe
from hooks import find_hooks, run_with_cache, run_with_hooks
from utils import full_name, load_model

TOKENS = t.randint(1, 250, (2, 10), generator=t.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    t.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(
            LlamaConfig(
                vocab_size=260,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    }
    out = {}
    for name, model in models.items():
        for p in model.parameters():
            p.data.add_(0.1 * t.randn(p.shape))
        out[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(out[name])
        PreTrainedTokenizerFast(
            tokenizer_object=train_bpe(["a b c"], 260), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
        ).save_pretrained(out[name])
    return out


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@t.no_grad()
def test_a_folder_becomes_a_hooked_model_equal_to_hugging_face(folders, name):
    from transformers import AutoModelForCausalLM

    model = load_model(str(folders[name]), device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(folders[name], attn_implementation="eager")(
        TOKENS, output_hidden_states=True, output_attentions=True
    )
    logits, cache = run_with_cache(model, TOKENS, ["blocks.*.hook_resid_pre", "blocks.*.attn.hook_pattern"])
    t.testing.assert_close(logits, reference.logits, atol=1e-4, rtol=1e-4)
    for layer in range(2):
        t.testing.assert_close(cache["resid_pre", layer], reference.hidden_states[layer], atol=1e-4, rtol=1e-4)
        t.testing.assert_close(cache["pattern", layer], reference.attentions[layer], atol=1e-4, rtol=1e-4)


@t.no_grad()
def test_hooks_on_a_bridge_change_what_they_should_and_are_gone_afterwards(folders):
    model = load_model(str(folders["llama"]), device="cpu")
    clean = model(TOKENS)
    cut = run_with_hooks(
        model,
        TOKENS,
        [
            ("blocks.1.hook_attn_out", lambda x, hook: t.zeros_like(x)),
            ("blocks.1.hook_mlp_out", lambda x, hook: t.zeros_like(x)),
        ],
    )
    resid = run_with_cache(model, TOKENS, "blocks.1.hook_resid_pre")[1]["resid_pre", 1]
    replaced = run_with_hooks(model, TOKENS, [("blocks.1.hook_resid_post", lambda x, hook: resid)])
    t.testing.assert_close(cut, replaced)
    assert not t.allclose(cut, clean) and t.equal(model(TOKENS), clean)


def test_unknown_and_gated_names_raise_on_a_bridge(folders):
    model = load_model(str(folders["llama"]), device="cpu")
    with pytest.raises(KeyError, match="unknown"):
        run_with_cache(model, TOKENS, "blocks.9.hook_resid_pre")
    with pytest.raises(KeyError, match="set_use_attn_result"):
        run_with_hooks(model, TOKENS, [("blocks.0.attn.hook_result", lambda x, hook: None)])
    model.set_use_attn_result(True)
    assert run_with_cache(model, TOKENS, "blocks.0.attn.hook_result")[1]["result", 0].shape == (2, 10, 4, 32)
    assert len(find_hooks(model, "blocks.*.hook_resid_post")) == 2


def test_head_scores_run_on_a_bridge(folders):
    scores = head_scores(load_model(str(folders["gpt2"]), device="cpu"), 2, repeated_tokens(4, 8, 250, bos=0), 8)
    assert scores["prefix_matching"].shape == (2, 4) and 0 < scores["prefix_matching"].max() < 1


def test_our_class_is_used_where_it_takes_the_architecture(folders):
    class Ours(t.nn.Linear):
        architectures = ("LlamaForCausalLM",)
        cfg = SimpleNamespace(d_vocab=16, n_ctx=64)

        @classmethod
        def read_config(cls, config):
            return cls.cfg

        @classmethod
        def from_folder(cls, folder, device, dtype):
            model = cls(2, 2, device=device, dtype=dtype)
            model.folder = folder
            return model

        def forward(self, tokens):
            return tokens.float()

    ours = load_model(str(folders["llama"]), (Ours,), device="cpu")
    assert isinstance(ours, Ours)
    assert str(ours.folder) == str(folders["llama"])
    assert not ours.training
    assert not isinstance(load_model(str(folders["gpt2"]), (Ours,), device="cpu"), Ours)


@t.no_grad()
def test_finetuned_weights_on_a_known_architecture(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    tuned = AutoModelForCausalLM.from_pretrained(folders["llama"])
    tuned.lm_head.weight.mul_(2)
    tuned.save_pretrained(tmp_path)  # no tokenizer there: the base has it
    expected = tuned(TOKENS).logits
    for model in (
        load_model(str(tmp_path), device="cpu", base=str(folders["llama"])),
        load_model(str(folders["llama"]), device="cpu", hf_model=tuned),
    ):
        t.testing.assert_close(model(TOKENS), expected, atol=1e-4, rtol=1e-4)


def test_short_names():
    names = {
        "gpt2-small": "gpt2",
        "gpt2-medium": "gpt2-medium",
        "pythia-70m": "EleutherAI/pythia-70m",
        "gemma-2b": "google/gemma-2b",
        "meta-llama/Meta-Llama-3-8B": "meta-llama/Meta-Llama-3-8B",
    }
    assert {name: full_name(name) for name in names} == names


def test_models_that_cannot_be_had_are_refused_in_one_line(tmp_path):
    for bad in (str(tmp_path / "gone"), str(tmp_path), "nobody/nothing"):
        with pytest.raises(SystemExit) as error:
            load_model(bad, device="cpu")
        assert "\n" not in str(error.value)


def test_a_shared_real_llama_config_is_read():
    if not (folder := ROOT.parent / "shared/models/stories260K").is_dir():
        pytest.skip("../shared is absent")
    assert (
        utils.read_config(str(folder))["architectures"] == ["LlamaForCausalLM"]
        and json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 4
    )
