import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch as t
import torch.nn as nn
from conftest import ROOT

import utils
from anatomy import head_scores, repeated_tokens, stripe
from attn_only import AttnOnly, AttnOnlyConfig
from hooks import Cache, HookPoint, find_hooks, hook_points, hooks, run_with_cache, run_with_hooks
from plots import imshow, label_tokens, line, show
from utils import pick_device, pick_dtype, save_results, secret, write_aside


@pytest.fixture
def model() -> AttnOnly:
    t.manual_seed(0)
    return AttnOnly(AttnOnlyConfig(d_model=16, d_head=4, d_vocab=20, n_ctx=32)).eval()


TOKENS = t.randint(20, (2, 12), generator=t.Generator().manual_seed(0))


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


def test_scripts_import_silently_and_without_heavy_libraries():
    code = "import sys, utils, data, train, anatomy, zero_layer, attn_only, tiny_transformer, llama_block, moe, logit_lens, patching, sae_probe; assert not {'transformer_lens', 'sae_lens', 'wandb', 'datasets', 'transformers'} & set(sys.modules), sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_hooks_replace_activations_and_are_gone_afterwards(model):
    clean = model(TOKENS)
    changed = run_with_hooks(model, TOKENS, [("blocks.0.attn.hook_z", lambda z, hook: t.zeros_like(z))])
    assert not t.allclose(clean, changed)
    assert t.equal(model(TOKENS), clean)


def test_unknown_hook_name_raises_and_suggests(model):
    with pytest.raises(KeyError, match="blocks.0.attn.hook_pattern"):
        run_with_cache(model, TOKENS, "blocks.0.attn.hook_patern")
    with pytest.raises(KeyError, match="unknown"):
        run_with_hooks(model, TOKENS, [("blocks.7.*", lambda x, hook: None)])
    with pytest.raises(KeyError, match="predicate"):
        find_hooks(model, lambda name: False)


def test_a_hook_that_never_fires_raises(model):
    with pytest.raises(RuntimeError, match="never fired.*rot_q"):
        run_with_hooks(model, TOKENS, [("blocks.0.attn.hook_rot_q", lambda x, hook: None)])
    with pytest.raises(RuntimeError, match="never fired"):
        with hooks(model, [("hook_embed", lambda x, hook: None)]):
            pass
    with pytest.raises(RuntimeError, match="never fired"):
        run_with_cache(model, TOKENS, "blocks.1.attn.hook_rot_k")


def test_an_error_inside_the_context_still_removes_hooks(model):
    with pytest.raises(ZeroDivisionError), hooks(model, [("hook_embed", lambda x, hook: 1 / 0)]):
        model(TOKENS)
    assert all(not point.fwd_hooks for point in hook_points(model).values())


def test_nested_contexts_leave_the_outer_hooks(model):
    calls = []
    with hooks(model, [("hook_embed", lambda x, hook: calls.append("outer"))]):
        with hooks(model, [("hook_embed", lambda x, hook: calls.append("inner"))]):
            model(TOKENS)
        model(TOKENS)
    assert calls == ["outer", "inner", "outer"]


def test_cache_by_short_name_pattern_and_predicate(model):
    _, cache = run_with_cache(model, TOKENS, "*hook_pattern")
    assert list(cache) == ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"]
    assert cache["pattern", 1] is cache["blocks.1.attn.hook_pattern"]
    with pytest.raises(KeyError, match="not cached"):
        cache["hook_embed"]
    _, full = run_with_cache(model, TOKENS)
    assert {"hook_embed", "blocks.1.hook_resid_post", "ln_final.hook_scale"} <= set(
        full
    ) and "blocks.0.attn.hook_rot_q" not in full


def test_detach_false_keeps_the_graph(model):
    logits, cache = run_with_cache(model, TOKENS, "blocks.0.hook_resid_post", detach=False)
    (grad,) = t.autograd.grad(logits.sum(), cache["resid_post", 0])
    assert grad.abs().sum() > 0


def test_result_hook_splits_attn_out_by_head(model):
    _, cache = run_with_cache(model, TOKENS, ["blocks.0.attn.hook_result", "blocks.0.hook_attn_out"])
    assert cache["result", 0].shape == (2, 12, 4, 16)
    t.testing.assert_close(cache["result", 0].sum(2), cache["attn_out", 0])


def test_head_scores_read_the_right_stripes():
    class Fixed(nn.Module):
        """Attends by rule: head 0 to the previous token, 1 to the token after the last copy, 2 to the copy, 3 to the first."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.Module()})])
            self.blocks[0]["attn"].hook_pattern = HookPoint()

        def forward(self, tokens):
            T, half = tokens.shape[1], 10
            pattern = t.zeros(len(tokens), 4, T, T)
            for q in range(T):
                for head, key in enumerate((q - 1, q - half + 1, q - half, 0)):
                    pattern[:, head, q, max(key, 0)] = 1
            return self.blocks[0]["attn"].hook_pattern(pattern)

    scores = head_scores(Fixed(), 1, repeated_tokens(3, 10, 50, bos=0), 10)
    for i, name in enumerate(("previous_token", "prefix_matching", "duplicate_token", "first_token")):
        assert scores[name][0, i] == 1, name
        assert name == "first_token" or scores[name][0].sum() == 1, name


def test_stripe_matches_a_loop():
    pattern = t.rand(2, 3, 9, 9)
    slow = t.stack([pattern[:, :, q, q - 2] for q in range(5, 9)]).mean((0, 1))
    t.testing.assert_close(stripe(pattern, 2, 5), slow)


def test_repeated_tokens_repeat_after_bos():
    tokens = repeated_tokens(5, 7, t.arange(3, 9), bos=1)
    assert (tokens[:, 0] == 1).all() and t.equal(tokens[:, 1:8], tokens[:, 8:]) and tokens[:, 1:].min() >= 3


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


def test_imshow_is_diverging_around_zero():
    fig = imshow(t.tensor([[-3.0, 1.0]]), "t", "x", "y")
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (-3, 3)


def test_write_aside_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")

    def broken(aside):
        aside.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_aside(path, broken)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_labels_keep_repeats_apart():
    assert label_tokens([" the", " the", "\n"]) == ["·the_0", "·the_1", "⏎_2"]


def test_cache_is_a_dict():
    assert Cache({"blocks.3.mlp.hook_post": 1})["post", 3] == 1
