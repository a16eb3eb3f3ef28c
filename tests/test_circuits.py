"""
The story of circuits.py on small runs: any bridge and any pairs, models whose writes do not add up, streamed weights,
wrong command lines.
"""

import json

import pytest
import torch as t
from conftest import ROOT, one_line_error
from test_graph import count_edges

from data import load_tokenizer, write_tokenizer


@pytest.fixture
def script(run, workdir):
    """script('--flag', ...) runs circuits.py and returns its numbers."""

    def script(*args: str) -> dict:
        done = run("circuits.py", "--device", "cpu", *args)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((workdir / "results/circuits.json").read_text())

    return script


def test_any_bridge_and_any_pairs(script, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    t.manual_seed(0)
    config = GPT2Config(vocab_size=3072, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    write_tokenizer(tmp_path / "gpt2", load_tokenizer(str(ROOT / "models/world")))
    (tmp_path / "pairs.csv").write_text(
        "clean,corrupt,answer,wrong\n"
        "Then Mary and John left. John gave it to,Then Mary and John left. Mary gave it to, Mary, John\n"
        "Soon Tom saw,Soon Paul saw, the, a\n"
    )
    given = ("--model", str(tmp_path / "gpt2"), "--pairs", str(tmp_path / "pairs.csv"))
    numbers = script(*given, "--metric", "log_prob")
    assert max(numbers["gates"].values()) < 1e-4 and len(numbers["gates"]) == 6
    assert numbers["circuit_edges_total"] == count_edges(2, 2)


def test_where_writes_do_not_add_up_paths_are_left_out(script, tmp_path):
    """Gemma-2 puts a norm behind attention and MLP."""
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
    model.save_pretrained(tmp_path / "gemma")
    write_tokenizer(tmp_path / "gemma", load_tokenizer(str(ROOT / "models/world")))
    numbers = script("--model", str(tmp_path / "gemma"), "--n", "4", "--held-out", "4")
    assert numbers["gates"]["writes_add_up"] > 1e-2
    assert numbers["gates"]["everything_patched"] < 1e-4
    assert "circuit" not in numbers and "paths" not in numbers


def test_a_wrong_command_line_ends_in_one_line(run):
    own = ("--clean", "The key", "--corrupt", "The keys", "--answer", " is")
    one_line_error(run("circuits.py", *own, "--device", "cpu"), "--wrong")


def test_streamed_weights_are_sent_to_patching(run, monkeypatch):
    import hooks

    monkeypatch.setattr(hooks, "is_streamed", lambda model: True)
    one_line_error(run("circuits.py", "--n", "4", "--held-out", "4", "--device", "cpu"), "patching.py")
