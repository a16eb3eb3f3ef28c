"""Every architecture works or is refused in one line that says what works instead; docs/models.md's table says which."""

import contextlib
import dataclasses
import io
from pathlib import Path

import pytest
import torch as t
import torch.nn as nn
from architectures import ARCHITECTURES, make_architecture
from conftest import ROOT, relative_error

from logit_attribution import about_norms, final_norm, logit_parts, parts_error
from data import load_tokenizer
from graph import Graph, edge_patch, write_differences
from hooks import act_name, has_heads, has_qkv, hook_points, missed_gates
from pairs import Pairs, baselines, draw_pairs
from interventions import activation_patch, sweep, sweep_gates
from lens import Lens, logit_lens, require_exact_lens
from llama_block import Llama, LlamaConfig
from parts import norm_kind, read_legend
from weights import open_model

COLUMNS = ("lens", "stream", "heads", "logit by head", "circuits", "streamed")
ROW = t.arange(1, 12)[None]


@contextlib.contextmanager
def refused():
    """What ends in one line is a no; a traceback is none."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        yield


def reads_by_the_lens(model: nn.Module) -> bool:
    """The last layer's lens is the model's own output, by the plain form and by the gate."""
    with refused():
        require_exact_lens(model, ROW.tolist())
        last = logit_lens(model, ROW)[-1]
        return relative_error(last, model(ROW)) < 1e-5
    return False


def patches_the_stream(model: nn.Module, pairs: Pairs) -> bool:
    """The gates of a sweep hold, and a cell of it is what the plain form gives."""
    with refused():
        if missed_gates(sweep_gates(model, pairs, "logit_diff"), model):
            return False
        swept = sweep(model, pairs, "resid_post")[0]
        position = int(pairs.answer_pos.min())
        plain = activation_patch(model, pairs, "resid_post", 0, position)
        return t.allclose(swept[position], plain, atol=1e-3)
    return False


def patches_heads(model: nn.Module, pairs: Pairs) -> bool:
    with refused():
        if not has_heads(model) or act_name("z", 0) not in hook_points(model):
            return False
        swept = sweep(model, pairs, "z", by="head")[0, 1]
        return t.allclose(swept, activation_patch(model, pairs, "z", 0, head=1), atol=1e-3)
    return False


def takes_a_logit_apart(model: nn.Module) -> bool:
    return has_qkv(model) and parts_error(logit_parts(model, ROW, 5)) < 1e-3


def has_circuits(model: nn.Module, pairs: Pairs) -> bool:
    """circuits.py's gates: no edge patched, every edge patched, and the writes add up."""
    if not has_qkv(model):
        return False
    graph = Graph(model)
    clean, corrupt = baselines(model, pairs, "logit_diff")
    none, every = edge_patch(model, graph, pairs, t.stack([~graph.is_edge, graph.is_edge]))
    miss, _ = write_differences(model, graph, pairs)
    scale = 0.01 + (clean - corrupt).abs().max()
    return max((none - clean).abs().max() / scale, (every - corrupt).abs().max() / scale, miss) < 1e-3


def names_its_parts(model: nn.Module, folder: Path) -> bool:
    """Every tensor has a name of the field's, and the legend's norms by head and of neurons are the opened model's."""
    legend = read_legend(str(folder))
    has_final_norm = not isinstance(model.ln_final, nn.Identity)
    is_rms = norm_kind(legend.config) == "RMSNorm"
    if legend.unnamed or (has_final_norm and is_rms == final_norm(model).centres):
        return False
    for part in ("W_Q", "W_K", "W_V", "W_O"):
        theirs = t.stack([getattr(block.attn, part).float().norm(dim=(1, 2)) for block in model.blocks])
        found = t.tensor(list(legend.norms_by_head(part).values()))
        if len(theirs[0]) != len(found[0]):  # the bridge repeats keys and values for the heads that share them
            found = found.repeat_interleave(len(theirs[0]) // len(found[0]), 1)
        if not t.allclose(found, theirs, rtol=1e-4):
            return False
    for part in ("W_in", "W_gate", "W_out"):
        norms = [norm for kind in legend.kinds if kind.part == part and not kind.owner for norm in kind.norms]
        weights = [getattr(block.mlp, part, None) for block in model.blocks]
        if all(weight is not None for weight in weights):
            theirs = [weight.float().norm().item() for weight in weights]
            if norms and sorted(norms) != pytest.approx(sorted(theirs), rel=1e-4):
                return False
    return True


def is_streamed_right(folder: Path, theirs: t.Tensor, pairs: Pairs) -> bool:
    with refused():
        model = open_model(str(folder), (), "cpu", offload="on")
        assert relative_error(model(ROW), theirs) < 1e-5
        return not missed_gates(sweep_gates(model, pairs, "logit_diff"), model)
    return False


@t.no_grad()
def measure(name: str, folder: Path) -> list[str]:
    """A row of the table."""
    hf = make_architecture(name, folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = open_model(str(folder), (Llama,), "cpu").requires_grad_(False)
    except SystemExit as line:
        if "--offload on" not in str(line):
            return ["no"] * len(COLUMNS)
        with contextlib.redirect_stdout(io.StringIO()):
            model = open_model(str(folder), (), "cpu", offload="on")
        pairs = draw_pairs(model, "ioi", 3, 0)
        streamed = is_streamed_right(folder, hf(ROW).logits, pairs)
        return [*["no"] * (len(COLUMNS) - 1), "yes" if streamed else "no"]
    theirs = hf(ROW).logits
    assert relative_error(model(ROW), theirs) < 1e-5
    assert not has_qkv(model) or names_its_parts(model, folder)
    pairs = draw_pairs(model, "ioi", 3, 0)
    by_lens = reads_by_the_lens(model)
    found = (
        by_lens,
        patches_the_stream(model, pairs),
        patches_heads(model, pairs),
        by_lens and takes_a_logit_apart(model),
        has_circuits(model, pairs),
        is_streamed_right(folder, theirs, pairs),
    )
    return ["yes" if works else "no" for works in found]


def in_the_table() -> dict[str, list[str]]:
    """{architecture: its cells} of the table in docs/models.md."""
    rows = {}
    for line in (ROOT / "docs/models.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in ARCHITECTURES and len(cells) == 1 + len(COLUMNS):
            rows[cells[0]] = cells[1:]
    return rows


def test_the_table_names_every_architecture():
    assert list(in_the_table()) == list(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_does_what_the_table_says(name, tmp_path):
    assert measure(name, tmp_path) == in_the_table()[name]


@pytest.mark.parametrize("norms", ["after", "both"])
def test_our_own_norms_after_have_circuits_and_the_bridges_edges(norms, tmp_path):
    """llama_block.py --norms: the gates of circuits.py hold, and every edge is worth what it is in TransformerLens."""
    t.manual_seed(0)
    architecture = {"after": "Olmo2ForCausalLM", "both": "Gemma2ForCausalLM"}[norms]
    shape = LlamaConfig(2, 4, 2, 32, 8, 64, d_vocab=3072, n_ctx=128, norms=norms, architecture=architecture)
    shape = dataclasses.replace(shape, qk_norm="full" if norms == "after" else "none")
    model = Llama(shape, load_tokenizer(ROOT / "models/world"))
    with t.no_grad():
        for p in model.parameters():
            p.add_(0.15 * t.randn(p.shape))
    model.to_hf(tmp_path)
    ours = open_model(str(tmp_path), (Llama,), "cpu").requires_grad_(False)
    bridge = open_model(str(tmp_path), (), "cpu").requires_grad_(False)
    assert isinstance(ours, Llama) and not isinstance(bridge, Llama)
    pairs = draw_pairs(ours, "ioi", 3, 0)
    assert has_circuits(ours, pairs) and takes_a_logit_apart(ours)
    graph = Graph(ours)
    edges = [t.zeros_like(graph.is_edge) for _ in range(6)]
    for edge, place in zip(edges, graph.is_edge.nonzero()[:: len(graph.is_edge.nonzero()) // 6]):
        edge[tuple(place)] = True
    mine = edge_patch(ours, graph, pairs, t.stack(edges))
    theirs = edge_patch(bridge, Graph(bridge), pairs, t.stack(edges))
    t.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
    assert "frozen" in about_norms(ours) and about_norms(bridge) == about_norms(ours)
    assert about_norms(open_model(str(ROOT / "models/world"), (Llama,), "cpu")) == ""


def test_a_lens_without_the_final_norm_is_no_gate(tmp_path):
    """The gate can fail: a wrong norm is seen."""
    make_architecture("Llama", tmp_path)
    model = open_model(str(tmp_path), (Llama,), "cpu")
    wrong = Lens(model, "none")(t.randn(1, 1, model.cfg.d_model))
    right = Lens(model)(t.randn(1, 1, model.cfg.d_model))
    assert not t.allclose(wrong, right)


if __name__ == "__main__":  # prints the table for docs/models.md
    import tempfile

    print(f"| architecture | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|")
    for name in ARCHITECTURES:
        print(f"| {name} | {' | '.join(measure(name, Path(tempfile.mkdtemp())))} |", flush=True)
