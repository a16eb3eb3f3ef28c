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
    "logit_lens": "--tuned-steps 0",
    "reversal": "--countries 6 --forms 1 --draws 20",
    "patching": "--n 2 --held-out 2 --site resid_pre --data story.txt",
    "circuits": "--n 2 --held-out 2 --ig-steps 1",
    "sae_probe": "--data story.txt --steps 12 --batch 128 --buffer 1500 --d-sae 24 --heldout 800 --sentences 12 --seeds 1 --variants "
    "--no-random-baseline --min-recovered -99 --max-fvu 99 --hook blocks.1.hook_resid_pre",
    "llama_block": "",
    "tiny_transformer": "--data story.txt",
    "moe": "--data story.txt --contexts 32 --rows 2",
}
KINDS = {"llama_block": ("Llama", LLAMA), "moe": ("Mixtral", MIXTRAL)}  # others take any, here a GPT-2
STREAMED = ("logit_lens", "patching", "reversal")


def numbers_of(done, folder: Path, script: str) -> dict:
    assert done.returncode == 0, done.stderr[-2000:]
    path = folder / f"results/{script}.json"
    if script == "reversal":  # its own file holds a summary by the model's name
        (path,) = folder.glob("results/reversal/*.json")
    numbers = json.loads(path.read_text())
    return {name: value for name, value in numbers.items() if name not in ("config", "versions", "tensors", "names")}


def leaves(x: object, path: str = "") -> dict[str, object]:
    """Every number and text of a result by its path, times aside."""
    if isinstance(x, dict):
        parts = [leaves(value, f"{path}/{key}") for key, value in x.items()]
    elif isinstance(x, list):
        parts = [leaves(value, f"{path}/{i}") for i, value in enumerate(x)]
    else:
        return {} if "seconds" in path else {path: x}
    return {key: value for part in parts for key, value in part.items()}


def differing(one: dict[str, object], other: dict[str, object], tolerance: float) -> list[str]:
    """The paths at which two results that both have them differ."""
    paths = []
    for path in one.keys() & other.keys():
        a, b = one[path], other[path]
        if isinstance(a, float) and isinstance(b, float):
            a, b = 0, round((a - b) / (tolerance * (1 + abs(b))))
        if a != b and not path.endswith("/model"):  # its name
            paths.append(path)
    return paths


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
    assert by_hub.keys() == by_folder.keys()
    assert not differing(by_hub, by_folder, 1e-5)
    with_bos = by(str(folder), "--bos", place="bos")
    assert differing(with_bos, by_folder, 1e-2)
    if script in STREAMED:
        streamed = by(str(folder), "--offload", "on", place="streamed")
        assert len(streamed.keys() & by_folder.keys()) > 5
        assert not differing(streamed, by_folder, 1e-3)
