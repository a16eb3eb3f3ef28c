"""Weights that lie alone, put on the config and tokenizer of a base: --base of the stories that open a model."""

import json
import shutil
from pathlib import Path

import pytest
import torch as t
from conftest import ROOT, one_line_error, relative_error, save_folder, tiny_hf
from safetensors.torch import load_file, save_file

from launch import READS
from llama_block import Llama
from utils import load_model, on_base
from weights import model_key, open_model

SHAPE = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
STORIES = ("logit_lens", "reversal", "patching", "circuits", "steering", "chat", "readers", "catalogue")
TOKENS = t.arange(1, 12)[None]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Path]:
    """Two bases, and the weights of the first, twice as large at the end, with nothing beside them."""
    at = tmp_path_factory.mktemp("bases")
    found = {}
    for name, architecture, more in (
        ("llama", "Llama", {"intermediate_size": 48}),
        ("gemma", "Gemma2", {"head_dim": 8}),
    ):
        found[name] = save_folder(tiny_hf(architecture, **SHAPE, **more), at / name)
    tensors = load_file(found["llama"] / "model.safetensors")
    tensors["lm_head.weight"] *= 2
    found["weights"] = at / "weights"
    found["weights"].mkdir()
    save_file(tensors, found["weights"] / "mine.safetensors")
    found["tensors"] = tensors
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@t.no_grad()
@pytest.mark.parametrize("ours", [(Llama,), ()])
def test_weights_alone_answer_as_the_whole_model_does(alone, ours, capsys):
    base = load_model(str(alone["llama"]), ours, "cpu")
    for weights in (alone["weights"], alone["weights"] / "mine.safetensors"):
        model = open_model(on_base(str(weights), str(alone["llama"])), ours, "cpu")
        assert isinstance(model, Llama) == bool(ours)
        assert relative_error(model(TOKENS), 2 * base(TOKENS)) < 1e-5
    again = load_model(str(alone["weights"]), ours, "cpu", base=str(alone["llama"]))
    assert relative_error(again(TOKENS), 2 * base(TOKENS)) < 1e-5


def test_one_base_is_not_taken_for_another(alone, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(alone["llama"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    weights = str(alone["weights"])
    on_first, on_other = (on_base(weights, str(base)) for base in (alone["llama"], other))
    assert on_first != on_other
    assert model_key(on_first, []) != model_key(on_other, [])
    assert model_key(on_first, []) != model_key(str(alone["llama"]), [])  # of other weights
    assert on_base(weights, str(alone["llama"])) == on_first
    assert on_base(on_first, str(alone["llama"])) == on_first, "a cell that runs again changes nothing"
    assert on_base(weights, None) == weights


def test_what_does_not_fit_its_base_ends_in_one_line(alone, tmp_path, capsys):
    def refusal(tensors: dict[str, t.Tensor], base: Path, ours: tuple = ()) -> str:
        folder = tmp_path / f"weights_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SystemExit) as line:
            open_model(on_base(str(folder), str(base)), ours, "cpu")
        assert "\n" not in str(line.value)
        return str(line.value)

    named_otherwise = {name.replace("self_attn", "attention"): x for name, x in alone["tensors"].items()}
    narrow = alone["tensors"] | {
        "model.embed_tokens.weight": alone["tensors"]["model.embed_tokens.weight"][:50].clone()
    }
    for ours in ((Llama,), ()):
        assert "attention" in refusal(named_otherwise, alone["llama"], ours)
        assert "embed" in refusal(narrow, alone["llama"], ours)
    assert "have another shape" in refusal(narrow, alone["llama"])
    assert "missing" in refusal(alone["tensors"], alone["gemma"])
    for name, said in ((str(tmp_path / "gone"), "no such model folder"), (str(tmp_path), "no *.safetensors")):
        with pytest.raises(SystemExit, match=said.replace("*", r"\*")):
            on_base(name, str(alone["llama"]))


def test_an_adapter_is_no_weights(alone, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="merge it first"):
        on_base(str(tmp_path), str(alone["llama"]))


def test_every_story_that_opens_a_model_takes_a_base():
    field = "    base: str | None = None  # a model whose config and tokenizer the weights of --model are put on\n"
    for name in STORIES:
        source = ROOT / ("sae.py" if name == "steering" else f"{name}.py")  # the SAE stories share their settings
        assert field in source.read_text(), name
    assert "base" in READS


def test_a_story_reads_weights_on_their_base(run, tmp_path, workdir):
    """The world's weights alone, on the world."""
    weights = tmp_path / "world.safetensors"
    shutil.copy(ROOT / "models/world/model.safetensors", weights)
    flags = ("--base", "models/world", "--tuned-steps", "0", "--device", "cpu")
    done = run("logit_lens.py", "--model", str(weights), *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "world-on-world" in done.stdout
    assert "Tokyo" in "".join(done.stdout.splitlines()[-2:])
    one_line_error(run("logit_lens.py", "--model", str(tmp_path / "gone"), *flags), "no such model folder")
