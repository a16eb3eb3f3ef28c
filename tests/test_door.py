"""One door for models: what comes in is what transformers computes, or it is refused in one line that says what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch as t
from conftest import ROOT, relative_error, tiny_hf
from safetensors.torch import load_file, save_file

from llama_block import Llama
from weights import Streamed, open_model
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
    with pytest.raises(SystemExit, match="misses transformers' logits"):
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


def test_a_hub_model_and_its_copy_take_the_same_path(tmp_path, monkeypatch):
    hf = made(tmp_path / "copy", "Qwen3", LLAMA | {"head_dim": 16, "num_key_value_heads": 2})
    room = tmp_path / "cache/models--Qwen--Qwen3-tiny"
    shutil.copytree(tmp_path / "copy", room / "snapshots" / ("0123456789" * 4))
    (room / "refs").mkdir()
    (room / "refs/main").write_text("0123456789" * 4)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
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
