"""The scripts as a notebook user runs them: cell by cell in a real ipykernel, with the settings edited in the cell."""

import jupytext
import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from test_zero_layer import story

SMALL = {
    "attn_only.py": "Config(steps=8, tokens_per_step=1024, contexts=(32, 96), context_steps=(0.5,))",
    "zero_layer.py": "Config(steps=20, data='story.txt', vocab=300)",
    "tiny_transformer.py": "Config(steps=8, tokens_per_step=512)",
    "llama_block.py": "Config(steps=8, tokens_per_step=512, n_layers=2, d_model=32, d_mlp=64, n_kv_heads=2)",
    "moe.py": "Config(steps=8, tokens_per_step=512, vocab=512, rows=8, n_layers=2, d_model=32, d_expert=32)",
    "mamba.py": "Config(steps=8, tokens_per_step=512, d_model=32, d_state=4, rows=8)",
    "patching.py": "Config(n=4, held_out=4, site=('resid_pre', 'z'))",
    "sae_probe.py": "Config(steps=50, batch=512, buffer=6000, d_sae=96, heldout=3000, sentences=20, seeds=1, variants=(), random_baseline=False, min_recovered=0.1, max_fvu=0.9)",
    "logit_lens.py": "Config(tuned_steps=0)",
    "reversal.py": "Config(countries=8, forms=1, draws=50)",
    "attribution.py": "Config(steps=8, batch=256, d_sae=64, heldout=2000, suppressed=3, pages=5, circuit_pairs=0)",
    "circuits.py": "Config(n=4, held_out=4, ig_steps=1)",
    "steering.py": "Config(n=8, held_out=8, strengths=(1.0,), random=1, written=2, prompts=1, rows=2)",
    "probing.py": "Config(n=120, seeds=1)",
    "das.py": "Config(n=16, held_out=16, steps=3, ranks=(1,), random=2)",
    "catalogue.py": "Config(neurons=1, rows=8, shuffles=20)",
}


@pytest.mark.parametrize("script", SMALL)
def test_every_cell_runs_in_a_kernel_and_shows_its_figures(script, workdir, monkeypatch):
    (workdir / "story.txt").write_text(story(12000))
    notebook = jupytext.reads((ROOT / script).read_text(), fmt="py:percent")
    settings = [cell for cell in notebook.cells if "cfg = flags(Config" in cell.source]
    assert len(settings) == 1 and len(notebook.cells) > 8
    indent = "    " if "if __name__" in settings[0].source else ""
    for line in (
        "from dataclasses import asdict",
        "assert asdict(cfg) == asdict(Config())",
        f"cfg = {SMALL[script]}",
        "device = 'cpu'",
    ):
        settings[0].source += f"\n{indent}{line}"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    resources = {"metadata": {"path": str(workdir)}}
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    figures = [output for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    fewest = {"logit_lens.py": 3, "das.py": 3, "probing.py": 3, "catalogue.py": 2}  # catalogue is mostly a page
    assert len(figures) >= fewest.get(script, 4)
    assert nbformat.validate(notebook) is None


BOX = """
import sys

sys.argv[0] = "ipykernel_launcher.py"
import ipywidgets
import torch as t


class Kept(ipywidgets.Text):
    def __init__(self, **settings):
        super().__init__(**settings)
        boxes.append(self)


boxes = []
ipywidgets.Text = Kept
from plots import show_attention
from utils import fail


def ask(text):
    words = text.split()
    if len(words) > 2:
        fail("too long")
    return words, t.ones(2, len(words), len(words)).tril() / 2


show_attention(t.ones(2, 1, 1), ["first"], ["L0H0", "L0H1"], "a test", "test/attention", ask=ask)
"""


@pytest.mark.parametrize("typed, shown", [("typed words", "&quot;typed&quot;"), ("one two three", "too long")])
def test_a_prompt_can_be_typed_in_a_notebook(typed, shown, workdir, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = [nbformat.v4.new_code_cell(source) for source in (BOX, f"boxes[0].value = {typed!r}")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(
        notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": str(workdir)}}
    )
    client.execute()
    beneath = [widget for widget in client.widget_state.values() if widget["_model_name"] == "OutputModel"]
    assert len(beneath) == 1
    assert shown in str(beneath[0]["outputs"])
