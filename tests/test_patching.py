"""The story of patching.py: whole runs on our model, on bridges, with streamed weights, and its error lines."""

import json

import pytest
import torch as t
from conftest import ROOT, one_line_error

from data import load_tokenizer, write_tokenizer


@pytest.fixture
def script(run, workdir):
    """script('--flag', ...) runs patching.py and returns its numbers."""

    def script(*args: str) -> dict:
        done = run("patching.py", "--device", "cpu", *args)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((workdir / "results/patching.json").read_text())

    return script


def save_with_world_tokenizer(model, folder) -> str:
    model.save_pretrained(folder)
    write_tokenizer(folder, load_tokenizer(str(ROOT / "models/world")))
    return str(folder)


def text_file(folder) -> str:
    path = folder / "text.txt"
    path.write_text("Then Mary and John left the park.\n\n" * 400)
    return str(path)


def test_the_story_of_streamed_weights_ends_with_the_stream(script, run):
    few = ("--offload", "on", "--n", "4", "--held-out", "4")
    one_line_error(
        run("patching.py", *few, "--site", "z", "--device", "cpu"), "--site z: this model has no blocks.0.attn.hook_z"
    )
    numbers = script(*few)
    assert max(numbers["gates"].values()) < 1e-4
    assert list(numbers["by_place"]) == [
        "resid_pre, denoise",
        "resid_pre, noise",
        "resid_post, denoise",
        "resid_post, noise",
    ]
    before_layer_0 = numbers["by_place"]["resid_pre, denoise"][0]
    assert before_layer_0[numbers["places"].index("S2")] > 0.9  # the whole difference stands at the second subject
    place, value = numbers["answer_stands_at"]["resid_pre"]["L0"]
    assert place == "S2"
    assert value == pytest.approx(max(before_layer_0))


def test_facts_are_traced(script):
    numbers = script("--task", "capitals", "--n", "4", "--held-out", "4", "--site", "mlp_out")
    subject = numbers["places"].index("changed")
    assert numbers["tracing"]["resid_post"][0][subject] > 0.8  # the clean subject after layer 0 restores the fact
    assert numbers["knock_out"]["changed"][-1] < min(0.5, *numbers["knock_out"]["before"])


def test_what_is_found_holds_on_held_out_pairs_and_is_said(run, workdir):
    done = run("patching.py", "--n", "8", "--held-out", "16", "--site", "z", "resid_pre", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads((workdir / "results/patching.json").read_text())
    name, here, held_out = numbers["strongest_heads"]["z"][0]
    assert here == pytest.approx(max(max(row) for row in numbers["by_head"]["z, denoise"]))
    assert held_out == pytest.approx(here, abs=0.2)
    assert f"{name} {here:.0%}" in done.stdout
    part, metric_lost, nats = numbers["most_needed"]
    assert [metric_lost, nats] == numbers["ablation"]["mean"][part]
    assert metric_lost == max(lost for lost, _ in numbers["ablation"]["mean"].values())
    assert numbers["worst_gate"] == max(numbers["gates"].values()) < 1e-4


def test_any_bridge_and_any_pairs(script, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    t.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=3072, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    folder = save_with_world_tokenizer(model, tmp_path / "gpt2")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(
        "clean,corrupt,answer,wrong\n"
        "Then Mary and John left. John gave it to,Then Mary and John left. Mary gave it to, Mary, John\n"
        "Soon Tom saw,Soon Paul saw, the, a\n"
    )
    numbers = script("--model", folder, "--pairs", str(pairs), "--metric", "log_prob", "--data", text_file(tmp_path))
    assert max(numbers["gates"].values()) < 1e-4
    assert len(numbers["ablation"]["zero"]) == 2 * 3


def test_where_writes_do_not_add_up_patching_holds_all_the_same(script, tmp_path):
    """Gemma-2 puts a norm behind attention and MLP: no circuit, but activations can be patched and ablated."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    t.manual_seed(0)
    config = Gemma2Config(
        vocab_size=3072,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = Gemma2ForCausalLM(config)
    for p in model.parameters():
        p.data.add_(0.15 * t.randn(p.shape))
    folder = save_with_world_tokenizer(model, tmp_path / "gemma")
    few = ("--n", "4", "--held-out", "4")
    numbers = script("--model", folder, *few, "--site", "k", "z", "--data", text_file(tmp_path))
    assert max(numbers["gates"].values()) < 1e-4
    assert len(numbers["by_head"]["k, denoise"][0]) == 2
    assert {name[2:] for name, _, _ in numbers["strongest_heads"]["k"]} <= {"H0-1", "H2-3"}  # what a key head feeds
    assert len(numbers["ablation"]["mean"]) == 2 * 5


def test_a_wrong_command_line_ends_in_one_line(run):
    few = ("--n", "4", "--held-out", "4", "--device", "cpu")
    one_line_error(
        run("patching.py", "--site", "resid_prre", *few),
        "--site resid_prre: this model has no",
        "use some of resid_pre",
    )
    own = ("--clean", "The key", "--corrupt", "The keys", "--answer", " is")
    one_line_error(run("patching.py", *own, "--device", "cpu"), "--wrong")


def test_text_that_cannot_be_read_is_said_before_the_sweeps(run):
    done = run("patching.py", "--n", "4", "--held-out", "4", "--data", "./nowhere.txt", "--device", "cpu")
    one_line_error(done, "no such file")
    assert "gates" not in done.stdout and "=== Activation patching" not in done.stdout
