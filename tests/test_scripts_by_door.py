"""Every script that takes a model, by each door: a folder, a hub name (in a made-up, offline cache), streamed; with a tokenizer that puts no beginning-of-text, and with --bos."""

import json
from pathlib import Path

import pytest
from test_door import GPT2, LLAMA, made, put_into_hub_cache, tokenizer_that

MIXTRAL = {
    "vocab_size": 3072,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "max_position_embeddings": 256,
}
SMALL = {
    "logit_lens": "--tuned-steps 2",
    "reversal": "--countries 6 --forms 1 --draws 20",
    "patching": "--n 2 --held-out 2 --site resid_pre",
    "circuits": "--n 2 --held-out 2 --ig-steps 1",
    "llama_block": "",
    "tiny_transformer": "--data story.txt",
    "moe": "--data story.txt --contexts 32 --rows 2",
}
KINDS = {"llama_block": ("Llama", LLAMA), "moe": ("Mixtral", MIXTRAL)}  # others take any, here a GPT-2
STREAMED = ("logit_lens", "patching", "reversal")


def numbers_of(done, folder: Path, script: str) -> dict:
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads((folder / f"results/{script}.json").read_text())
    return {name: value for name, value in numbers.items() if name not in ("config", "versions", "tensors", "names")}


def leaves(x: object, path: str = "") -> dict[str, object]:
    """Every number and text of a result by its path, times and the model's name aside."""
    if isinstance(x, dict):
        parts = [leaves(value, f"{path}/{key}") for key, value in x.items()]
    elif isinstance(x, list):
        parts = [leaves(value, f"{path}/{i}") for i, value in enumerate(x)]
    else:
        return {} if "seconds" in path or "model" in path else {path: x}
    return {key: value for part in parts for key, value in part.items()}


@pytest.mark.parametrize("script", list(SMALL))
def test_a_script_gives_the_same_numbers_by_every_door(script, run, tmp_path, monkeypatch):
    kind, config = KINDS.get(script, ("GPT2", GPT2))
    folder = tmp_path / "model"
    made(folder, kind, config)
    tokenizer_that(folder, before=False, after=False)
    put_into_hub_cache(folder, tmp_path / "cache", "me/model", monkeypatch)
    (tmp_path / "story.txt").write_text("Mary went to the store. John gave a drink to Mary.\n\n" * 400)
    name = "--models" if script == "reversal" else "--model"
    flags = [*SMALL[script].split(), "--device", "cpu"]

    def by(model: str, *more: str, place: str) -> dict:
        cwd = tmp_path / place
        cwd.mkdir()
        (cwd / "story.txt").symlink_to(tmp_path / "story.txt")
        done = run(f"{script}.py", name, model, *flags, *more, cwd=cwd)
        found = leaves(numbers_of(done, cwd, script))
        assert len(found) > 5
        return found

    by_folder = by(str(folder), place="folder")
    by_hub = by("me/model", place="hub")
    assert by_hub == pytest.approx(by_folder, rel=1e-4, abs=1e-5)
    with_bos = by(str(folder), "--bos", place="bos")
    assert with_bos != pytest.approx(by_folder, rel=1e-4, abs=1e-5)
    if script in STREAMED:
        streamed = by(str(folder), "--offload", "on", place="streamed")
        both = streamed.keys() & by_folder.keys()
        assert len(both) > 5
        assert {key: streamed[key] for key in both} == pytest.approx(
            {key: by_folder[key] for key in both}, rel=1e-3, abs=1e-4
        )
