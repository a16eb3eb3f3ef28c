"""
The story of circuits.py on small runs: any bridge and any pairs, models whose writes do not add up, streamed weights,
wrong command lines.
"""

import json

import pytest
import torch as t
from architectures import make_architecture
from conftest import ROOT
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
    numbers = script(*given, "--metric", "log_prob", "--path", "L0H1 -> L1 MLP -> logits")
    path = numbers["path"]
    assert path["path"] == "L0H1 -> L1 MLP -> logits"
    for value, low, high in (path["share_lost"], path["share_lost_by_path_patching_to_first_reader"]):
        assert low <= value <= high and value != 0
    assert path["share_lost"] != path["share_lost_by_path_patching_to_first_reader"]
    assert max(numbers["gates"].values()) < 1e-4 and len(numbers["gates"]) == 6
    assert numbers["circuit_edges_total"] == count_edges(2, 2)


def test_where_writes_do_not_add_up_paths_are_left_out(script, tmp_path):
    """OPT-350m normalises the stream itself, after attention and after the MLP."""
    make_architecture("OPT-350m", tmp_path)
    numbers = script("--model", str(tmp_path), "--n", "4", "--held-out", "4")
    assert numbers["gates"]["writes_add_up"] > 1e-2
    assert numbers["gates"]["everything_patched"] < 1e-4
    assert "circuit" not in numbers
    assert "paths" not in numbers


def test_norms_after_attention_and_mlp_have_circuits_too(script, tmp_path):
    make_architecture("Gemma-2", tmp_path)
    small = ("--n", "4", "--held-out", "4", "--ig-steps", "2")
    other_ways = ("--trace-by", "edge_patch", "--ablation", "mean", "--export", str(tmp_path / "out/edges.json"))
    numbers = script("--model", str(tmp_path), *small, *other_ways)
    assert max(numbers["gates"].values()) < 1e-4
    assert numbers["circuit"]
    assert numbers["circuit_faithfulness"] == numbers["faithfulness_by_ablation"]["mean"]["normalised"]
    exported = json.loads((tmp_path / "out/edges.json").read_text())["edges"]
    assert sum(edge["in_graph"] for edge in exported.values()) >= numbers["circuit_edges"]
