"""The story of one prompt: what layers write sums to the logit, and the script on models/world."""

import json
import re

import pytest
import torch as t
from conftest import ROOT, one_line_error
from test_lens import CAP, ROWS, logits_by_layer, save_model

import logit_lens as ll
from logit_attribution import layer_writes, logit_parts, parts_error
from lens import TUNED_ROWS, TUNED_TOKENS, Lens, draw_rows, judge_lenses, tuned_lens
from llama_block import Llama
from utils import load_model
from weights import answer_token, encode
from world import judging_rows, load_world


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_layer_writes_sum_to_the_logit(tmp_path, name):
    hf = save_model(name, tmp_path)
    model = load_model(str(tmp_path), (Llama,), "cpu")
    last = logits_by_layer(name, hf)[-1, len(ROWS[0]) - 1]
    if name == "Gemma2ForCausalLM":
        last = CAP * (last / CAP).atanh()  # before the soft cap
    for token in (5, 300):
        writes, logit = layer_writes(model, ROWS[0], token)
        assert abs(sum(writes.values()) - logit) < 1e-3
        assert abs(logit - last[token]) < 1e-2
        if name == "Gemma2ForCausalLM":
            continue
        parts = logit_parts(model, t.tensor([ROWS[0]]), token)
        by_layer = parts["heads"].sum((1, 2)) + parts["attn_bias"] + parts["mlp"]
        t.testing.assert_close(t.tensor([writes[f"L{i}"] for i in range(3)]), by_layer, atol=1e-3, rtol=1e-3)


def test_what_all_tokens_have_in_common_is_left_out_of_the_writes(tmp_path):
    """The mean logit: the parts still sum exactly, and a shift of every token's column changes nothing."""
    save_model("LlamaForCausalLM", tmp_path)
    model = load_model(str(tmp_path), (Llama,), "cpu").requires_grad_(False)
    row = ROWS[0]
    logits = model(t.tensor([row]))[0, -1]
    expected = (logits[37] - logits.mean()).item()
    writes, logit = layer_writes(model, row, 37, less_mean=True)
    assert logit == pytest.approx(expected, abs=1e-3)
    assert sum(writes.values()) == pytest.approx(expected, abs=1e-3)
    parts = logit_parts(model, t.tensor([row]), 37, less_mean=True)
    assert parts["logit"].item() == pytest.approx(expected, abs=1e-3)
    assert parts_error(parts) < 1e-4
    raw, _ = layer_writes(model, row, 37)
    model.unembed.weight.data += 0.3 * t.randn(1, 48)
    shifted, _ = layer_writes(model, row, 37, less_mean=True)
    assert shifted == pytest.approx(writes, abs=1e-3)
    assert layer_writes(model, row, 37)[0] != pytest.approx(raw, abs=1e-2)


def test_a_milestone_is_said_in_words():
    assert ll.says_layer(3.0, 4) == "after 3 of 4 blocks"
    assert ll.says_layer(float("nan"), 4) == "at no layer"


def test_the_script_tells_its_story_and_trains_the_tuned_lens_once(run, workdir):
    flags = ("--tuned-steps", "40", "--device", "cpu")
    first = run("logit_lens.py", *flags)
    assert first.returncode == 0, first.stderr[-2000:]
    numbers = json.loads((workdir / "results/logit_lens.json").read_text())
    assert numbers["last_layer_gate_error"] < 1e-4
    assert set(numbers["layer_writes"]) == {"embed", "L0", "L1", "L2", "L3", "constant"}
    model = load_model(str(ROOT / "models/world"), (Llama,), "cpu")
    prompt = ll.Config().prompt
    row = t.tensor([encode(model, prompt)])
    attn_bias = logit_parts(model, row, answer_token(model, prompt, "Tokyo"), less_mean=True)["attn_bias"].tolist()
    for layer, parts in enumerate(numbers["head_and_mlp_writes"]):
        # a layer writes what its heads, its MLP and the bias after attention write
        assert sum(parts) + attn_bias[layer] == pytest.approx(numbers["layer_writes"][f"L{layer}"], abs=1e-3)
    assert numbers["milestones"]["semantic"] == 4
    assert numbers["milestones"]["copied"] is None
    tuned = numbers["tuned_lens"]
    assert all(better < raw for better, raw in zip(tuned["KL, tuned"][:-1], tuned["KL, raw"]))
    said = re.sub(r"\x1b\[[0-9;]*m", "", first.stdout)
    assert "' Tokyo' is top-1 to the end: after 4 of 4 blocks" in said
    assert "put first, once" in said.splitlines()[-2]
    drawn = set(re.findall(r"figs/logit_lens/(\w+).html", said))
    assert drawn == {"grid", "tuned_KL", "tuned_perplexity", "layers", "heads", "index"}

    again = run("logit_lens.py", *flags)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "tuned lens KL" in first.stderr
    assert "tuned lens KL" not in again.stderr  # read back
    assert json.loads((workdir / "results/logit_lens.json").read_text())["tuned_lens"] == tuned


def test_the_tuned_lens_converges_on_rows_that_no_training_saw(workdir, monkeypatch, tmp_path):
    """
    200 steps on models/world bring layers 0 to 3 below what the tuned-lens package reaches (1.876, 0.927, 0.669, 0.495)
    on held-out rows.
    """
    monkeypatch.chdir(workdir)
    model = load_model(str(ROOT / "models/world"), (Llama,), "cpu")
    corpus = load_world()
    rows = judging_rows(corpus, TUNED_ROWS, TUNED_TOKENS, 0)
    lens = tuned_lens(model, lambda step: draw_rows(corpus, True, (0, step), 16), 200, tmp_path / "lens.safetensors")
    scores, _ = judge_lenses(model, {"tuned": Lens(model, translators=lens)}, rows)
    assert all(kl < package for kl, package in zip(scores["KL, tuned"], (1.876, 0.927, 0.669, 0.495)))


def test_the_grid_and_the_milestones_are_those_of_the_lens_that_is_named(run, workdir):
    flags = ("--lens", "jacobian", "--jacobian-rows", "2", "--tuned-steps", "0", "--device", "cpu")
    done = run("logit_lens.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads((workdir / "results/logit_lens.json").read_text())
    assert numbers["milestones"] == numbers["milestones_jacobian"]
    assert numbers["milestones_raw"]["semantic"] == 4
    assert {"KL, raw", "KL, jacobian"} <= set(numbers["tuned_lens"])
    assert numbers["tuned_lens"]["KL, jacobian"][-1] == pytest.approx(0, abs=1e-4)
    assert numbers["milestones_audited"]["semantic"] == 4
    artefact = numbers["norm_artefact"]
    assert len(artefact["KL"]) == len(artefact["same top-1"]) == 5
    assert all(0 <= share < 1 for share in artefact["same top-1"])
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert "by the jacobian lens ' Tokyo' is top-1 to the end" in said
    assert "audit: counted only where" in said
    assert "Jacobian lens of" in (workdir / "figs/logit_lens/grid.html").read_text()
    one_line_error(run("logit_lens.py", "--lens", "tuned", "--tuned-steps", "0"), "--lens tuned needs 1 or more")


def test_a_lens_without_norm_is_warned_of_and_an_answer_can_be_given(run):
    done = run("logit_lens.py", "--norm", "none", "--answer", "Kyoto", "--tuned-steps", "0", "--device", "cpu")
    if done.returncode:
        one_line_error(done, "several tokens")
        done = run("logit_lens.py", "--norm", "none", "--answer", "Paris", "--tuned-steps", "0", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--norm none: without the final norm the last layer is" in done.stdout
    assert "tuned lens left out (--tuned-steps 0)" in done.stdout


def test_bad_settings_get_one_line(run):
    one_line_error(run("logit_lens.py", "--prompt", " "), "--prompt is empty")
    one_line_error(run("logit_lens.py", "--top", "0"), "--top is 0: it must be at least 1")
    one_line_error(run("logit_lens.py", "--prompt", " ".join(["word"] * 2000)), "the model reads")
