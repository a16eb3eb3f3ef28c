"""One door for models: what comes in is what transformers computes, or it is refused in one line that says what to do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch as t
from conftest import ROOT, one_line_error, relative_error, tiny_hf
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer

from llama_block import Llama
from data import bos_id, load_corpus, load_tokenizer, put_first
from weights import Streamed, about_bos, encode, model_key, open_model
from utils import LFS_POINTER, find_folder, load_model, model_folder, refuse_incomplete

LLAMA = {
    "vocab_size": 3072,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {"vocab_size": 3072, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256}
ROW = t.arange(1, 40)[None]


def made(folder: Path, architecture: str, config: dict, **saving):
    """A transformers model saved to folder with the world's tokenizer."""
    hf = tiny_hf(architecture, **config)
    hf.save_pretrained(folder, **saving)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "models/world" / name, folder / name)
    return hf


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = {name: x.clone() for name, x in change(load_file(path)).items()}
    save_file(tensors, path, {"format": "pt"})


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def prefixed(prefix: str):
    return lambda tensors: {prefix + name: x for name, x in tensors.items()}


def without(part: str):
    return lambda tensors: {name: x for name, x in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (prefixed("_orig_mod."), "torch.compile"),
        (prefixed("module."), "DistributedDataParallel"),
        (without(".h.1."), "missing .first transformer.h.1.*not all of it was fetched"),
        (lambda tensors: tensors | {"h.0.attn.lora_A.weight": t.ones(2, 2)}, "adapter; merge it"),
    ],
)
def test_tensors_missing_or_without_a_place_end_in_a_line_with_the_cause(change, cause, tmp_path):
    made(tmp_path, "GPT2", GPT2)
    change_weights(tmp_path, change)
    with pytest.raises(SystemExit, match=cause):
        load_model(str(tmp_path), device="cpu")


def test_a_classifier_is_no_language_model(tmp_path):
    import transformers

    config = transformers.LlamaConfig(**LLAMA | {"pad_token_id": 0})
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="classifier"):
        load_model(str(tmp_path), (Llama,), device="cpu")


def test_old_buffers_do_no_harm(tmp_path):
    hf = made(tmp_path, "Llama", LLAMA)
    change_weights(
        tmp_path, lambda x: x | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": t.ones(6) for i in range(3)}
    )
    with t.no_grad():
        for ours in ((), (Llama,)):
            assert relative_error(load_model(str(tmp_path), ours, device="cpu")(ROW), hf(ROW).logits) < 1e-5
    refuse_incomplete("x", [], ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"])


def an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def quantised(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def a_wrapper(folder: Path) -> None:
    change_config(folder, vision_config={})


def an_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(LFS_POINTER + b"/spec/v1\n")


def half_a_download(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (an_adapter, "merge it first"),
        (quantised, "gptq"),
        (a_wrapper, "multimodal"),
        (an_lfs_pointer, "git lfs pull"),
        (half_a_download, "1 of 2 shards are missing.*model-00002-of-00002"),
    ],
)
@pytest.mark.parametrize("ours", [(), (Llama,)], ids=["bridge", "ours"])
def test_what_would_be_opened_in_part_is_refused(spoil, said, ours, tmp_path):
    made(tmp_path, "Llama", LLAMA)
    spoil(tmp_path)
    with pytest.raises(SystemExit, match=said):
        load_model(str(tmp_path), ours, device="cpu")


def test_one_file_wins_over_an_old_index(tmp_path):
    hf = made(tmp_path, "Llama", LLAMA)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00009.safetensors"}})
    )
    with t.no_grad():
        for ours in ((), (Llama,)):
            assert relative_error(load_model(str(tmp_path), ours, device="cpu")(ROW), hf(ROW).logits) < 1e-5


def test_what_our_class_does_not_build_goes_through_the_bridge_and_is_right(tmp_path, capsys):
    made(tmp_path, "Llama", LLAMA)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    change_config(tmp_path, rope_parameters=yarn)
    from transformers import AutoModelForCausalLM

    with t.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(ROW).logits
        mine = load_model(str(tmp_path), (Llama,), device="cpu")(ROW)
    assert relative_error(mine, theirs) < 1e-5
    said = capsys.readouterr().out
    assert "'yarn'" in said and "through TransformerBridge instead" in said and "checked" in said


def test_a_bridge_that_answers_otherwise_than_transformers_is_not_used(tmp_path, monkeypatch):
    made(tmp_path, "GPT2", GPT2)
    from transformer_lens.model_bridge import TransformerBridge

    true_boot = TransformerBridge.boot_transformers

    def wrong_boot(source, hf_model, **settings):
        with t.no_grad():
            hf_model.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
        return true_boot(source, hf_model=hf_model, **settings)

    monkeypatch.setattr(TransformerBridge, "boot_transformers", wrong_boot)
    with pytest.raises(SystemExit, match="misses the logits of"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("ours", [(), (Llama,)], ids=["bridge", "ours"])
def test_weights_that_are_nan_and_activations_too_large_are_told_apart(ours, tmp_path):
    made(tmp_path, "Llama", LLAMA)
    down = "model.layers.1.mlp.down_proj.weight"
    up = "model.layers.1.mlp.up_proj.weight"
    change_weights(tmp_path, lambda tensors: tensors | {down: 1e4 * tensors[down], up: 1e3 * tensors[up]})
    load_model(str(tmp_path), ours, device="cpu")
    with pytest.raises(SystemExit, match="too large for float16.*bfloat16"):
        load_model(str(tmp_path), ours, device="cpu", dtype="float16")
    change_weights(tmp_path, lambda tensors: tensors | {down: tensors[down] * float("nan")})
    with pytest.raises(SystemExit, match=r"weights are broken.*1\.mlp"):
        load_model(str(tmp_path), ours, device="cpu")


def test_a_name_becomes_one_folder_from_anywhere(tmp_path, monkeypatch):
    """A folder, ~, a folder beside the scripts, a link, a space in the name, a hub name and its short form: one place."""
    real = tmp_path / "a model"
    made(real, "Qwen3", LLAMA | {"head_dim": 16, "num_key_value_heads": 2})
    (tmp_path / "link").symlink_to(real)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert {str(model_folder(name)) for name in ("a model", "link", "~/a model", str(real))} == {str(real)}
    assert find_folder("models/world") == str(ROOT / "models/world")
    with pytest.raises(SystemExit, match="no such model folder"):
        model_folder("./nothing")


def put_into_hub_cache(folder: Path, cache: Path, name: str, monkeypatch) -> None:
    """As if the hub model of that name had been fetched before; the hub itself is not reachable."""
    from huggingface_hub import constants

    room = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789" * 4
    shutil.copytree(folder, room / "snapshots" / commit)
    (room / "refs").mkdir()
    (room / "refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def test_a_hub_model_and_its_copy_take_the_same_path(tmp_path, monkeypatch):
    hf = made(tmp_path / "copy", "Qwen3", LLAMA | {"head_dim": 16, "num_key_value_heads": 2})
    put_into_hub_cache(tmp_path / "copy", tmp_path / "cache", "Qwen/Qwen3-tiny", monkeypatch)
    for name in ("Qwen/Qwen3-tiny", "Qwen3-tiny"):
        model = load_model(name, (Llama,), device="cpu")
        assert isinstance(model, Llama)
        with t.no_grad():
            assert relative_error(model(ROW), hf(ROW).logits) < 1e-5


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: change_weights(folder, without("layers.1.")), "tensors that the model needs are missing"),
        (lambda folder: change_weights(folder, prefixed("module.")), "DistributedDataParallel"),
        (an_adapter, "merge it first"),
        (an_lfs_pointer, "git lfs pull"),
    ],
    ids=["a layer is missing", "a prefix", "an adapter", "a pointer"],
)
def test_streamed_weights_pass_the_same_door(spoil, said, tmp_path):
    made(tmp_path, "Llama", LLAMA)
    spoil(tmp_path)
    with pytest.raises(SystemExit, match=said):
        open_model(str(tmp_path), (Llama,), "cpu", offload="on")


def test_streamed_weights_answer_as_transformers_does(tmp_path):
    hf = made(tmp_path, "Llama", LLAMA)
    model = open_model(str(tmp_path), (Llama,), "cpu", offload="on")
    assert isinstance(model, Streamed)
    with t.no_grad():
        assert relative_error(model(ROW), hf(ROW).logits) < 1e-5


# %% Beginning-of-text: what the model's own files say, by every door alike
def tokenizer_that(folder: Path, before: bool, after: bool, **config) -> None:
    """Rewrite a folder's tokenizer: whether it puts <|endoftext|> (0) before and after a text."""
    tokenizer = load_tokenizer(folder)
    form = f"{'<|endoftext|> ' if before else ''}$A{' <|endoftext|>' if after else ''}"
    special = [("<|endoftext|>", 0)] if before or after else []
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def by_every_door(folder: Path, monkeypatch, tmp_path: Path, bos: bool | None = None) -> list:
    """The model of a folder in our class, through the bridge, streamed, and by a hub name."""
    put_into_hub_cache(folder, tmp_path / f"cache of {bos}", "me/model", monkeypatch)
    name = str(folder)
    return [
        open_model(name, (Llama,), "cpu", bos=bos),
        open_model(name, (), "cpu", bos=bos),
        open_model(name, (), "cpu", offload="on", bos=bos),
        open_model("me/model", (Llama,), "cpu", bos=bos),
    ]


@pytest.mark.parametrize(
    ("before", "after", "config", "begins"),
    [
        (True, False, {}, True),  # Llama, Gemma, Mistral
        (False, False, {}, False),  # Pythia, Qwen: a bos_token that no text begins with
        (False, True, {}, False),  # only ends its texts
        (True, True, {}, True),
        (False, False, {"add_bos_token": True}, True),  # OPT
    ],
)
def test_every_door_reads_the_beginning_of_text_that_the_files_say(
    before, after, config, begins, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    made(folder, "Llama", LLAMA)
    tokenizer_that(folder, before, after, **config)
    text = "The capital of Japan"
    bare = load_tokenizer(folder).encode(text, add_special_tokens=False).ids
    theirs = AutoTokenizer.from_pretrained(folder)(text).input_ids
    expected = [0, *bare] if begins else bare
    if not config:  # add_bos_token is no longer read by transformers 5
        assert theirs[: len(expected)] == expected
    for model in by_every_door(folder, monkeypatch, tmp_path):
        assert encode(model, text) == expected
        assert ("put first" in about_bos(model)) == begins


def test_bos_and_no_bos_override_by_every_door(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    made(folder, "Llama", LLAMA)
    for model in by_every_door(folder, monkeypatch, tmp_path, bos=False):
        assert 0 not in encode(model, "The capital")
    tokenizer_that(folder, before=False, after=False)
    for model in by_every_door(folder, monkeypatch, tmp_path, bos=True):
        assert encode(model, "The capital")[0] == 0
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None}))
    with pytest.raises(SystemExit, match="name no beginning-of-text token"):
        open_model(str(folder), (Llama,), "cpu", bos=True)


def test_rows_of_text_follow_the_same_rule(tmp_path):
    folder = tmp_path / "model"
    made(folder, "Llama", LLAMA)
    text = tmp_path / "text.txt"
    text.write_text("Then Mary and John left the park.\n\n" * 400)
    for before in (True, False):
        tokenizer_that(folder, before, after=False)
        corpus = load_corpus(str(text), tokenizer=str(folder), cache=str(tmp_path / "data"))
        rows = corpus.rows(np.random.default_rng(0), 16, 24)
        assert corpus.bos == (0 if before else None)
        assert (rows[:, 0] == 0).all() == before
        stream = corpus.train["text"]
        assert (stream == 0).any()  # documents are apart in either case


# %% What no model reads
@pytest.mark.parametrize("ours", [(), (Llama,)])
def test_ids_beyond_the_embedding_and_rows_beyond_the_context_end_in_a_line(ours, tmp_path):
    made(tmp_path, "Llama", LLAMA)
    model = load_model(str(tmp_path), ours, "cpu")
    with pytest.raises(SystemExit, match="token 3072 is beyond the 3072"):
        model(t.tensor([[1, 3072]]))
    with pytest.raises(SystemExit, match="a row of 257 tokens is longer than the 256"):
        model(t.ones(1, 257, dtype=t.long))


def test_a_tokenizer_that_has_grown_ends_in_a_line(tmp_path, run):
    made(tmp_path, "Llama", LLAMA)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True)])
    put_first(tokenizer, tokenizer.token_to_id("<bos>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert bos_id(tokenizer) == 3072
    done = run("logit_lens.py", "--model", str(tmp_path), "--tuned-steps", "0", "--device", "cpu")
    one_line_error(done, "token 3072 is beyond the 3072")


def test_an_encoder_and_an_encoder_with_a_decoder_are_refused(tmp_path):
    import transformers

    small = {"vocab_size": 300, "num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": 1}
    transformers.BertForMaskedLM(transformers.BertConfig(**small)).save_pretrained(tmp_path / "bert")
    with pytest.raises(SystemExit, match="not a causal language model"):
        load_model(str(tmp_path / "bert"))
    t5 = transformers.T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(SystemExit, match="an encoder with a decoder"):
        load_model(str(tmp_path / "t5"))


# %% Fields that config.json leaves out, and the key of what was computed
@pytest.mark.parametrize(
    ("architecture", "field", "attribute", "default"),
    [
        ("Mistral", "sliding_window", "windows", (4096,) * 3),
        ("Mistral", "num_key_value_heads", "n_kv_heads", 8),
        ("Qwen3", "head_dim", "d_head", 128),
        ("Llama", "num_key_value_heads", "n_kv_heads", 4),
    ],
)
def test_a_field_left_out_says_what_transformers_takes_it_to_say(architecture, field, attribute, default):
    config = {
        **LLAMA,
        "model_type": architecture.lower(),
        "architectures": [f"{architecture}ForCausalLM"],
        "num_attention_heads": 8 if architecture == "Mistral" else 4,
        "num_key_value_heads": 4,
        "head_dim": 12,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
    }
    del config[field]
    assert getattr(Llama.read_config(config), attribute) == default


def test_the_key_of_a_result_covers_all_weights_the_tokenizer_and_the_settings(tmp_path):
    made(tmp_path, "Llama", LLAMA | {"hidden_size": 96})
    keys = [model_key(str(tmp_path), ["float32", 0])]
    assert model_key(str(tmp_path), ["float32", 0]) == keys[0]
    keys.append(model_key(str(tmp_path), ["float32", 1]))

    def last_norm_changed(tensors: dict) -> dict:
        return tensors | {"model.norm.weight": 2 * tensors["model.norm.weight"]}  # behind the first megabyte

    change_weights(tmp_path, last_norm_changed)
    keys.append(model_key(str(tmp_path), ["float32", 0]))
    tokenizer_that(tmp_path, before=False, after=False)
    keys.append(model_key(str(tmp_path), ["float32", 0]))
    assert len(set(keys)) == len(keys)
