import dataclasses
import math
import signal
import subprocess
import sys
import time

import pytest
import torch as t
import torch.nn as nn
from conftest import ROOT

from attn_only import AttnOnly, AttnOnlyConfig, Config, train_own
from data import load_corpus
from train import TrainConfig, bf16_is_faster, context_at, make_optimizers, next_token_loss, schedule, train
from utils import set_seed

SMALL = AttnOnlyConfig(n_layers=1, n_heads=2, d_model=16, d_head=8, d_vocab=20, n_ctx=16)
CFG = TrainConfig(steps=12, contexts=(16,), device="cpu", autocast="off", save_every=4)


def fresh(seed: int = 0) -> AttnOnly:
    t.manual_seed(seed)
    return AttnOnly(SMALL)


def batch(i: int) -> t.Tensor: return t.randint(20, (4, 16), generator=t.Generator().manual_seed(i))


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)


def test_training_lowers_the_loss_and_repeats_exactly():
    once, again = (train(fresh(), lambda i: batch(0), dataclasses.replace(CFG, steps=30, save_every=0), "a") for _ in range(2))
    assert once["loss"] == again["loss"] and once["loss"][-1] < once["loss"][0] - 0.5
    assert once["tokens"][-1] == 30 * 64 and once["tokens_per_second"] > 0


def test_a_run_cut_off_resumes_to_the_same_loss():
    whole = train(fresh(), batch, CFG, "whole")
    class Cut(Exception): pass
    def cut(i):
        if i == 9: raise Cut
        return batch(i)
    with pytest.raises(Cut): train(fresh(), cut, CFG, "cut")
    model = fresh(seed=5)
    resumed = train(model, batch, dataclasses.replace(CFG, resume=True), "cut")
    assert resumed["loss"] == whole["loss"] and resumed["step"] == whole["step"]


def test_a_killed_process_resumes_to_the_same_final_loss(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    cfg = Config(n_layers=1, steps=60, contexts=(32,), tokens_per_step=1024, save_every=10, autocast="off", device="cpu")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import attn_only as a; from data import load_corpus; a.set_seed(0); a.train_own(a.{cfg!r}, 1, load_corpus(), 'cpu')"
    checkpoint = workdir / "checkpoints/attn_only/1_layers.pt"
    checkpoint.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not checkpoint.exists() and process.poll() is None: time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 0 < t.load(checkpoint)["step"] < 60, process.stderr.read()
    _, resumed = train_own(dataclasses.replace(cfg, resume=True), 1, load_corpus(), "cpu")
    set_seed(0)
    _, whole = train_own(cfg, 1, load_corpus(), "cpu")
    assert resumed["loss"][-1] == pytest.approx(whole["loss"][-1], rel=1e-5) and len(resumed["loss"]) == 60


def test_accumulated_micro_batches_equal_one_batch():
    whole = lambda i: t.cat([batch(2 * i), batch(2 * i + 1)])
    one, two = fresh(), fresh()
    a = train(one, whole, dataclasses.replace(CFG, save_every=0), "a")
    b = train(two, batch, dataclasses.replace(CFG, save_every=0, accumulate=2), "b")
    assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], abs=2e-3)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other"])
def test_corrupt_checkpoints_are_refused(damage, tmp_path):
    train(fresh(), batch, CFG, "x")
    path = tmp_path / "checkpoints/x.pt"
    if damage == "other": t.save({"weights": t.zeros(3)}, path)
    else: path.write_bytes({"truncated": path.read_bytes()[:1000], "garbage": b"not a checkpoint at all", "empty": b""}[damage])
    with pytest.raises(SystemExit, match="checkpoints/x.pt"): train(fresh(), batch, dataclasses.replace(CFG, resume=True), "x")


def test_checkpoints_that_do_not_fit_are_refused():
    train(fresh(), batch, CFG, "x", shape="narrow")
    with pytest.raises(SystemExit, match="steps was 12, is 24"): train(fresh(), batch, dataclasses.replace(CFG, steps=24, resume=True), "x", shape="narrow")
    with pytest.raises(SystemExit, match="shape was 'narrow', is 'wide'"): train(fresh(), batch, dataclasses.replace(CFG, resume=True), "x", shape="wide")


def test_a_diverging_run_says_which_flag_to_lower():
    with pytest.raises(SystemExit, match="lower --lr"): train(fresh(), batch, CFG, "x", loss_fn=lambda model, tokens: next_token_loss(model, tokens) * t.nan)


def test_muon_takes_the_matrices_inside_blocks_only():
    model = fresh()
    adam, muon = make_optimizers(model, CFG)
    named = {id(p): name for name, p in model.named_parameters()}
    assert {named[id(p)] for p in muon.param_groups[0]["params"]} == {f"blocks.0.attn.{x}.weight" for x in "qkvo"}
    assert sum(len(o.param_groups[0]["params"]) for o in (adam, muon)) == len(named)
    assert len(make_optimizers(model, dataclasses.replace(CFG, optimizer="adamw"))) == 1


def test_schedules():
    wsd = TrainConfig(steps=100, warmup=0.1, decay=0.3)
    assert schedule(0, wsd) == pytest.approx(0.1) and schedule(50, wsd) == 1 and schedule(85, wsd) == pytest.approx(0.5) and schedule(99, wsd) == pytest.approx(1 / 30)
    cosine = TrainConfig(steps=100, warmup=0.0, schedule="cosine")
    assert schedule(0, cosine) == 1 and schedule(50, cosine) == pytest.approx(0.55) and schedule(99, cosine) == pytest.approx(0.1, abs=1e-3)


def test_context_stages():
    cfg = TrainConfig(steps=10, contexts=(8, 16, 32), context_steps=(0.5, 0.8))
    assert [context_at(i, cfg) for i in (0, 4, 5, 7, 8, 9)] == [8, 8, 16, 16, 32, 32]


def test_uniform_logits_lose_log_vocab():
    class Uniform(nn.Module):
        def forward(self, tokens): return t.zeros(*tokens.shape, 20)
    assert next_token_loss(Uniform(), batch(0)).item() == pytest.approx(math.log(20))


def test_probe_answers():
    assert isinstance(bf16_is_faster("cpu"), bool)
