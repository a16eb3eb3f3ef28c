import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch as t
from conftest import ROOT

import utils
from test_house import ARCHITECTURES, FOUNDATIONS
from plots import imshow, line, show
from utils import pick_device, pick_dtype, save_results, secret, write_aside


def test_colours_are_the_guides_eleven():
    codes = {
        "purple": "38;2;255;0;255",
        "blue": "38;2;0;0;255",
        "cyan": "38;2;0;255;255",
        "yellow": "38;2;255;255;0",
        "green": "38;2;0;255;0",
        "red": "38;2;255;0;0",
        "gray": "38;2;127;127;127",
        "orange": "38;2;255;165;0",
        "bold": "1",
        "underline": "4",
        "endc": "0",
    }
    assert {name: getattr(utils, name) for name in codes} == {name: f"\x1b[{code}m" for name, code in codes.items()}


def test_what_is_imported_is_silent_and_leaves_heavy_libraries_out():
    """Foundations, and scripts whose cells are guarded because others import their definitions."""
    guarded = [path.stem for path in ROOT.glob("*.py") if "__main__" in path.read_text()]
    names = [*FOUNDATIONS, *guarded]
    heavy = {"transformer_lens", "sae_lens", "wandb", "datasets", "transformers"}
    code = f"import sys, {', '.join(names)}; assert not {heavy} & set(sys.modules), sorted({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert set(ARCHITECTURES) <= set(guarded)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_device_and_dtype():
    assert (
        pick_device("auto") in ("cuda", "mps", "cpu")
        and pick_dtype("cpu") is t.float32
        and pick_dtype("cpu", "bfloat16") is t.bfloat16
    )
    for bad in ("gpu", "tpu:0"):
        with pytest.raises(SystemExit, match="--device"):
            pick_device(bad)
    if not t.cuda.is_available():
        with pytest.raises(SystemExit, match="--device cpu"):
            pick_device("cuda")


def test_secrets_come_from_the_env_file_only(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    monkeypatch.setenv("HF_TOKEN", "from the shell")
    assert secret("HF_TOKEN") is None
    (tmp_path / ".env").write_text("HF_TOKEN=from the file\nWANDB_API_KEY=\n")
    assert secret("HF_TOKEN") == "from the file" and secret("WANDB_API_KEY") is None


@dataclass
class Settings:
    steps: int = 3


def test_figures_and_results_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    show(imshow(t.randn(2, 3, 3), "two panels", "key", "query", panels=["a", "b"]), "script/heat")
    show(line({"loss": [3.0, 2.0], "floor": [1.0, 1.0]}, "loss", "step", "nats", dashed=("floor",)), "script/loss")
    html = (tmp_path / "figs/script/heat.html").read_text()
    assert (
        "two panels" in html
        and "plotly.min.js" in html
        and (tmp_path / "figs/script/plotly.min.js").stat().st_size > 1e6
    )
    save_results("script", Settings(5), loss=1.5, scores=np.array([1.0, 2.0]))
    saved = json.loads((tmp_path / "results/script.json").read_text())
    assert (
        saved["loss"] == 1.5
        and saved["scores"] == [1.0, 2.0]
        and saved["config"] == {"steps": 5}
        and "torch" in saved["versions"]
    )


def test_write_aside_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")

    def broken(aside):
        aside.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_aside(path, broken)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_are_null(tmp_path, monkeypatch):
    import dataclasses

    monkeypatch.chdir(tmp_path)
    config = dataclasses.make_dataclass("Config", [("x", float)])(x=float("inf"))
    utils.save_results("story", config, a=float("nan"), b=[t.tensor([1.0, float("nan")])], c=(1, {"d": t.tensor(2)}))
    text = (tmp_path / "results/story.json").read_text()
    saved = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (saved["a"], saved["b"], saved["c"]) == (None, [[1.0, None]], [1, {"d": 2}])
    assert saved["config"] == {"x": None}
