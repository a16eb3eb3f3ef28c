"""What the analyses answer to input that makes no sense: one clear line, a non-zero exit and no traceback."""

import json
import shutil

import pytest
from conftest import ROOT, one_line_error

WORLD = ROOT / "models/world"
FLAGS = [
    ("logit_lens.py", ["--top", "0"], "--top"),
    ("logit_lens.py", ["--top", "-3"], "--top"),
    ("logit_lens.py", ["--prompt", " "], "--prompt is empty"),
    ("logit_lens.py", ["--tuned-steps", "-1"], "--tuned-steps"),
    ("logit_lens.py", ["--copy-threshold", "1.5"], "--copy-threshold"),
    ("logit_lens.py", ["--copy-threshold", "nan"], "--copy-threshold"),
    ("logit_lens.py", ["--device", "tpu"], "unknown --device"),
    ("logit_lens.py", ["--answer", ""], "--answer"),
    ("logit_lens.py", ["--prompt", " ".join(["word"] * 2000)], "the model reads"),
    ("reversal.py", ["--forms", "0"], "--forms"),
    ("reversal.py", ["--forms", "12"], "--forms"),
    ("reversal.py", ["--countries", "-1"], "--countries"),
    ("reversal.py", ["--top", "0"], "--top"),
    ("reversal.py", ["--draws", "0"], "--draws"),
    ("reversal.py", ["--copy-threshold", "-0.1"], "--copy-threshold"),
    ("reversal.py", ["--model", "./nowhere"], "no such model folder"),
    ("chat.py", ["--chat-tokens", "0"], "--chat-tokens"),
    ("chat.py", ["--chat-tokens", "-5"], "--chat-tokens"),
    ("chat.py", ["--model", "./nowhere"], "no such model folder"),
    ("sae_probe.py", ["--d-sae", "0"], "--d-sae"),
    ("sae_probe.py", ["--d-sae", "-8", "--sparsity", "1"], "--d-sae"),
    ("sae_probe.py", ["--architecture", "topk", "--sparsity", "9999"], "makes no sense"),
    ("sae_probe.py", ["--sparsity", "nan"], "--sparsity is nan"),
    ("sae_probe.py", ["--steps", "0"], "--steps"),
    ("sae_probe.py", ["--batch", "-1"], "--batch"),
    ("sae_probe.py", ["--context", "1"], "--context"),
    ("sae_probe.py", ["--lr", "nan"], "--lr"),
    ("sae_probe.py", ["--max-fvu", "nan"], "--max-fvu"),
    ("sae_probe.py", ["--sae", "x", "--release", "y"], "give one of them"),
    ("sae_probe.py", ["--sae-id", "blocks.8"], "give --release too"),
    ("sae_probe.py", ["--sae", "./nowhere"], "cfg.json"),
    ("sae_probe.py", ["--sentences", "0"], "--sentences"),
    ("sae_probe.py", ["--seeds", "0"], "--seeds"),
    ("sae_probe.py", ["--heldout", "0"], "--heldout"),
    ("feature_steering.py", ["--strengths", "nan"], "--strengths"),
    ("feature_steering.py", ["--prompt", " "], "--prompt is empty"),
    ("feature_steering.py", ["--sentences", "-1"], "--sentences"),
    ("feature_steering.py", ["--lr", "0"], "--lr"),
    ("feature_steering.py", ["--model", "./nowhere"], "no such model folder"),
    ("attribution.py", ["--transcoders", "./nowhere"], "no cfg.json"),
    ("attribution.py", ["--release", "x"], "--sae-ids"),
    ("attribution.py", ["--prompts", " "], "--prompt is empty"),
    ("attribution.py", ["--node-share", "1.5"], "--node-share"),
    ("attribution.py", ["--k", "9999"], "make no sense"),
    ("patching.py", ["--model", "./nowhere"], "no such model folder"),
    ("circuits.py", ["--model", "./nowhere"], "no such model folder"),
    ("circuits.py", ["--path", "L2H0 -> L1H0.q"], "no edge from L2H0 to L1H0.q"),
]


@pytest.mark.parametrize("script, flags, words", FLAGS, ids=[f"{s} {' '.join(f)[:40]}" for s, f, _ in FLAGS])
def test_a_flag_that_makes_no_sense_gets_one_line(run, script, flags, words):
    one_line_error(run(script, *flags), words)


@pytest.mark.parametrize(
    "script", ["logit_lens.py", "reversal.py", "sae_probe.py", "feature_steering.py", "patching.py"]
)
@pytest.mark.parametrize("flags", [["--seed", "many"], ["--colour", "red"], ["--device"]])
def test_a_flag_of_another_kind_gets_one_line(run, script, flags):
    done = run(script, *flags)
    one_line_error(done, flags[0])
    assert len(done.stderr.strip().splitlines()) == 1


BAD_PAIRS = [
    ("clean,corrupt,answer\na,b, c\n", [], "no column wrong"),
    ("", [], "holds no pair"),
    ("clean,corrupt,answer,wrong\nMary left,John, the, a\n", [], "clean has"),
    ("clean,corrupt,answer,wrong\nMary left,John left, the park, a\n", [], "is not one token"),
    ("clean,corrupt,answer,wrong\nMary left,John left,, a\n", [], "row 1 lacks answer"),
    ("clean,corrupt,answer,wrong\nMary left,John left, the, a\n", ["--n", "0"], "--n"),
    ("clean,corrupt,answer,wrong\nMary left,John left, the, a\n", ["--clean", "Mary"], "needs all of"),
    ("clean,corrupt,answer,wrong\nMary left,John left, the, a\n", ["--memory-gb", "-1"], "--memory-gb"),
    ("clean,corrupt,answer,wrong\nMary left,John left, the, a\n", ["--memory-gb", "nan"], "--memory-gb"),
]


@pytest.mark.parametrize("script", ["patching.py", "circuits.py"])
@pytest.mark.parametrize("text, flags, words", BAD_PAIRS, ids=[words for *_, words in BAD_PAIRS])
def test_pairs_that_cannot_be_used_get_one_line(run, script, text, flags, words, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    one_line_error(run(script, "--pairs", str(path), *flags, "--device", "cpu"), words)


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("patching.py", ["--positions", "999"], "position 999 is outside"),
        ("patching.py", ["--held-out", "0"], "--held-out"),
        ("patching.py", ["--site", "resid"], "resid"),
        ("circuits.py", ["--ig-steps", "0"], "--ig-steps"),
        ("circuits.py", ["--n", "-3"], "--n"),
    ],
)
def test_settings_of_pairs_that_make_no_sense_get_one_line(run, script, flags, words):
    one_line_error(run(script, *flags, "--device", "cpu"), words)


@pytest.mark.parametrize("broken", ["no weights", "truncated weights", "binary config", "empty config", "a file"])
@pytest.mark.parametrize("script", ["logit_lens.py", "reversal.py", "chat.py"])
def test_a_model_folder_that_is_broken_gets_one_line(run, tmp_path, script, broken):
    folder = tmp_path / "model"
    shutil.copytree(WORLD, folder)
    weights = folder / "model.safetensors"
    if broken == "no weights":
        weights.unlink()
    if broken == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    if broken == "binary config":
        (folder / "config.json").write_bytes(b"\x00\xff\xfe\x80")
    if broken == "empty config":
        (folder / "config.json").write_text(json.dumps({}))
    if broken == "a file":
        shutil.rmtree(folder)
        folder.write_text("no folder")
    done = run(script, "--model", str(folder), "--device", "cpu")
    one_line_error(done)
