import dataclasses
import itertools
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch as t
import torch.nn as nn
from conftest import ROOT
from test_zero_layer import story

from attn_only import AttnOnly, AttnOnlyConfig, Config, train_own
from bench import PlainGPT, train_plainly
from hooks import in_batches
from data import load_corpus
from llama_block import Llama, LlamaConfig
from moe import MoE, MoEConfig
from tiny_transformer import TinyConfig, TinyTransformer
from train import (
    Muon,
    TrainConfig,
    bf16_is_faster,
    context_at,
    expected_memory,
    make_optimizers,
    language_loss,
    orthogonalized,
    recompute_blocks,
    schedule,
    train,
)
from utils import secret, set_seed
from zero_layer import ZeroLayer

SMALL = AttnOnlyConfig(n_layers=1, n_heads=2, d_model=16, d_head=8, d_vocab=20, n_ctx=16)
CFG = TrainConfig(steps=12, contexts=(16,), device="cpu", autocast="off", save_every=4)


def fresh(seed: int = 0) -> AttnOnly:
    t.manual_seed(seed)
    return AttnOnly(SMALL)


def batch(i: int) -> t.Tensor:
    return t.randint(20, (4, 16), generator=t.Generator().manual_seed(i))


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_training_lowers_the_loss_and_repeats_exactly():
    once, again = (
        train(fresh(), lambda i: batch(0), dataclasses.replace(CFG, steps=30, save_every=0), "a") for _ in range(2)
    )
    assert once["loss"] == again["loss"]
    assert once["loss"][-1] < once["loss"][0] - 0.5
    assert once["tokens"][-1] == 30 * 64
    assert once["tokens_per_second"] > 0


def test_a_run_cut_off_resumes_to_the_same_loss():
    whole = train(fresh(), batch, CFG, "whole")

    class Cut(Exception):
        pass

    def cut(i):
        if i == 9:
            raise Cut
        return batch(i)

    with pytest.raises(Cut):
        train(fresh(), cut, CFG, "cut")
    model = fresh(seed=5)
    resumed = train(model, batch, dataclasses.replace(CFG, resume=True), "cut")
    assert resumed["loss"] == whole["loss"]
    assert resumed["step"] == whole["step"]


def test_a_killed_process_resumes_to_the_same_final_loss(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    cfg = Config(
        n_layers=1, steps=60, contexts=(32,), tokens_per_step=1024, save_every=10, autocast="off", device="cpu"
    )
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import attn_only as a; from data import load_corpus; a.set_seed(0); a.train_own(a.{cfg!r}, 1, load_corpus(), 'cpu')"
    checkpoint = workdir / "checkpoints/attn_only/1_layers.pt"
    checkpoint.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert 0 < t.load(checkpoint)["step"] < 60, process.stderr.read()
    _, resumed = train_own(dataclasses.replace(cfg, resume=True), 1, load_corpus(), "cpu")
    set_seed(0)
    _, whole = train_own(cfg, 1, load_corpus(), "cpu")
    assert resumed["loss"][-1] == pytest.approx(whole["loss"][-1], rel=1e-5)
    assert len(resumed["loss"]) == 60


def test_accumulated_micro_batches_equal_one_batch():
    whole = lambda i: t.cat([batch(2 * i), batch(2 * i + 1)])
    one = fresh()
    two = fresh()
    a = train(one, whole, dataclasses.replace(CFG, save_every=0), "a")
    b = train(two, batch, dataclasses.replace(CFG, save_every=0, accumulate=2), "b")
    assert a["tokens"] == b["tokens"]
    assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other"])
def test_corrupt_checkpoints_are_refused(damage, tmp_path):
    train(fresh(), batch, CFG, "x")
    path = tmp_path / "checkpoints/x.pt"
    if damage == "other":
        t.save({"weights": t.zeros(3)}, path)
    else:
        path.write_bytes(
            {"truncated": path.read_bytes()[:1000], "garbage": b"not a checkpoint at all", "empty": b""}[damage]
        )
    with pytest.raises(SystemExit, match="checkpoints/x.pt"):
        train(fresh(), batch, dataclasses.replace(CFG, resume=True), "x")


def test_checkpoints_that_do_not_fit_are_refused():
    train(fresh(), batch, CFG, "x", shape="narrow")
    with pytest.raises(SystemExit, match="steps was 12, is 24"):
        train(fresh(), batch, dataclasses.replace(CFG, steps=24, resume=True), "x", shape="narrow")
    with pytest.raises(SystemExit, match="shape was 'narrow', is 'wide'"):
        train(fresh(), batch, dataclasses.replace(CFG, resume=True), "x", shape="wide")


def test_a_diverging_run_says_which_flag_to_lower():
    with pytest.raises(SystemExit, match="lower --lr"):
        train(fresh(), batch, CFG, "x", loss_fn=lambda model, tokens: language_loss(model, tokens) * t.nan)


def models_of_every_architecture() -> dict[str, nn.Module]:
    narrow = {"d_model": 16, "d_vocab": 20, "n_ctx": 16}
    experts = narrow | {"n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_head": 8, "n_experts": 2, "d_expert": 8}
    qwen = {"architecture": "Qwen2MoeForCausalLM", "shared": 8, "dense": (0,), "d_mlp": 24, "norm_topk": False}
    return {
        "attn_only": fresh(),
        "attn_only, learned": AttnOnly(dataclasses.replace(SMALL, positions="learned", norm="none", bias="all")),
        "tiny_transformer": TinyTransformer(TinyConfig(**narrow, n_layers=2, n_heads=2, d_mlp=24)),
        "tiny_transformer, untied": TinyTransformer(TinyConfig(**narrow, n_heads=2, d_mlp=24, tied=False)),
        "llama_block": Llama(LlamaConfig(**narrow, n_layers=2, n_heads=2, n_kv_heads=1, d_head=8, d_mlp=24)),
        "moe": MoE(MoEConfig(**experts)),
        "moe, shared": MoE(MoEConfig(**experts, **qwen)),
        "zero_layer": ZeroLayer(20, 16),
    }


# what each parameter is called, by the optimizer that takes it
HIDDEN = r"blocks\.\d+\.(attn\.[qkvo]|mlp\.(inp|out|gate)|mlp\.(experts\.\d+|shared_expert)\.(inp|out|gate))\.weight"
TABLE = r"embed\.weight|unembed\.weight|W_pos|W_E|W_U|blocks\.\d+\.mlp\.(router|shared_expert_gate)\.weight"
VECTOR = r".*\.bias|.*distance_bias|.*(ln1|ln2|ln_final)\.weight"


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("architecture", list(models_of_every_architecture()))
def test_muon_takes_linear_maps_and_no_router_and_vectors_never_decay(architecture, optimizer):
    model = models_of_every_architecture()[architecture]
    named = {id(p): name for name, p in model.named_parameters()}
    cfg = dataclasses.replace(CFG, optimizer=optimizer, weight_decay=0.1, lr=0.01, adamw_lr=0.003, muon_lr=0.02)
    found = {}
    for made in make_optimizers(model, cfg):
        for group in made.param_groups:
            for p in group["params"]:
                assert id(p) in named, "a parameter is taken twice"
                found[named.pop(id(p))] = (type(made).__name__, group["base_lr"], group["weight_decay"])
    assert not named, f"nobody trains {named}"
    hidden = ("Muon", 0.02, 0.1) if optimizer == "muon" else ("AdamW", 0.003, 0.1)
    for name, setting in found.items():
        kinds = [bool(re.fullmatch(pattern, name)) for pattern in (HIDDEN, TABLE, VECTOR)]
        assert sum(kinds) == 1, name
        assert setting == [hidden, ("AdamW", 0.01, 0.1), ("AdamW", 0.01, 0.0)][kinds.index(True)], name


def test_weight_decay_shrinks_matrices_and_leaves_vectors():
    """With no gradient the decay alone moves the weights, by lr * weight_decay of them."""
    model = models_of_every_architecture()["tiny_transformer"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    [adamw] = make_optimizers(
        model, dataclasses.replace(CFG, optimizer="adamw", weight_decay=0.5, lr=0.1, adamw_lr=0.1)
    )
    for p in model.parameters():
        p.grad = t.zeros_like(p)
    adamw.step()
    for name, p in model.named_parameters():
        t.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim == 2 else 1.0))


def from_plain(plain: PlainGPT, shape: TinyConfig) -> TinyTransformer:
    """Our model with the weights of nanoGPT's."""
    weights = plain.state_dict()
    ours = {
        "embed.weight": weights["embed.weight"],
        "unembed.weight": weights["embed.weight"],
        "W_pos": weights["positions.weight"],
        "ln_final.weight": weights["ln_final.weight"],
        "ln_final.bias": weights["ln_final.bias"],
    }
    names = {"attn.out": "attn.o", "inp": "mlp.inp", "out": "mlp.out", "ln1": "ln1", "ln2": "ln2"}
    for layer, kind in itertools.product(range(shape.n_layers), ("weight", "bias")):
        block = f"blocks.{layer}"
        for theirs, mine in names.items():
            ours[f"{block}.{mine}.{kind}"] = weights[f"{block}.{theirs}.{kind}"]
        for name, part in zip("qkv", weights[f"{block}.attn.qkv.{kind}"].chunk(3)):
            ours[f"{block}.attn.{name}.{kind}"] = part
    model = TinyTransformer(shape)
    model.load_state_dict(ours)
    return model


def test_adamw_alone_is_nanogpts_loop():
    """The same weights, rows and rates: after eight steps both models are still one."""
    shape = TinyConfig(n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=20, n_ctx=16, act="gelu")
    t.manual_seed(0)
    plain = PlainGPT(shape)
    model = from_plain(plain, shape)
    before = plain(batch(99)).detach()
    t.testing.assert_close(model(batch(99)), before)
    train_plainly(plain, batch, steps=8, peak_lr=3e-3)
    cfg = dataclasses.replace(
        CFG,
        steps=8,
        save_every=0,
        optimizer="adamw",
        lr=3e-3,
        adamw_lr=3e-3,
        weight_decay=0.1,
        schedule="cosine",
        warmup=0.0,
    )
    train(model, batch, cfg, "x")
    assert (plain(batch(99)) - before).abs().max() > 0.01
    t.testing.assert_close(model(batch(99)), plain(batch(99)), atol=1e-4, rtol=1e-4)


def test_an_untrained_gpt2_shape_starts_as_nanogpts():
    """Each kind of weight has the spread that nanoGPT's initialisation gives it."""
    shape = TinyConfig(n_layers=2, n_heads=4, d_model=64, d_mlp=256, d_vocab=300, n_ctx=64)
    theirs = from_plain(PlainGPT(shape), shape).state_dict()
    model = TinyTransformer(shape)
    model.init_weights(as_gpt2=True)
    for name, weight in model.state_dict().items():
        assert weight.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1, abs=1e-8), name


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_muon_is_torchs_and_as_exact_in_float32(shape):
    t.manual_seed(0)
    start = t.randn(shape)
    params = [nn.Parameter(start.clone()) for _ in range(3)]
    optimizers = [
        t.optim.Muon(params[:1], lr=0.02, weight_decay=0.1, momentum=0.95),
        Muon(params[1:2], lr=0.02, weight_decay=0.1, dtype=t.bfloat16),
        Muon(params[2:], lr=0.02, weight_decay=0.1, dtype=t.float32),
    ]
    for _ in range(5):
        gradient = t.randn(shape)
        for p, optimizer in zip(params, optimizers):
            p.grad = gradient.clone()
            optimizer.step()
    assert t.equal(params[0], params[1])
    moved = (params[0] - start).norm()
    assert (params[2] - params[0]).norm() < 0.01 * moved


def test_orthogonalized_brings_singular_values_near_one():
    t.manual_seed(0)
    values = t.linalg.svdvals(orthogonalized(t.randn(24, 60), t.float32))
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_schedules():
    wsd = TrainConfig(steps=100, warmup=0.1, decay=0.3)
    assert schedule(0, wsd) == pytest.approx(0.1)
    assert schedule(50, wsd) == 1
    assert schedule(85, wsd) == pytest.approx(0.5)
    assert schedule(99, wsd) == pytest.approx(1 / 30)
    cosine = TrainConfig(steps=100, warmup=0.0, schedule="cosine")
    assert schedule(0, cosine) == 1
    assert schedule(50, cosine) == pytest.approx(0.55)
    assert schedule(99, cosine) == pytest.approx(0.1, abs=1e-3)


def test_context_stages():
    cfg = TrainConfig(steps=10, contexts=(8, 16, 32), context_steps=(0.5, 0.8))
    assert [context_at(i, cfg) for i in (0, 4, 5, 7, 8, 9)] == [8, 8, 16, 16, 32, 32]


def test_uniform_logits_lose_log_vocab():
    class Uniform(nn.Module):
        def forward(self, tokens):
            return t.zeros(*tokens.shape, 20)

    assert language_loss(Uniform(), batch(0)).item() == pytest.approx(math.log(20))


def test_probe_answers():
    assert isinstance(bf16_is_faster("cpu"), bool)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_after_the_step_and_the_run_resumes_exactly(number, capsys):
    def interrupted(i):
        if i == 5:
            os.kill(os.getpid(), number)
        return batch(i)

    before = signal.getsignal(number)
    cfg = dataclasses.replace(CFG, save_every=0)
    with pytest.raises(SystemExit) as stopped:
        train(fresh(), interrupted, cfg, "x")
    assert stopped.value.code == 128 + number
    assert "go on with --resume" in capsys.readouterr().out
    assert t.load("checkpoints/x.pt")["step"] == 6
    assert signal.getsignal(number) == before
    assert (
        train(fresh(seed=3), batch, dataclasses.replace(cfg, resume=True), "x")["loss"]
        == train(fresh(), batch, cfg, "whole")["loss"]
    )


def test_ctrl_c_ends_an_analysis_in_one_line_and_leaves_no_half_file(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "patching.py"), "--data", str(ROOT / "README.md"), "--device", "cpu"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "tokens.html" in line:
            break  # the first figure is whole
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, err
    assert "stopped by Ctrl-C" in err, err
    assert "Traceback" not in err, err
    assert (tmp_path / "figs/patching/tokens.html").read_text().rstrip().endswith("</html>")
    assert not (tmp_path / "results/patching.json").exists()


def test_a_full_disk_keeps_the_last_checkpoint_and_the_training(tmp_path, capsys):
    """A limit on file size stands for the full disk: write() fails in the middle of the file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(i):
        if i == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        return batch(i)

    try:
        history = train(fresh(), filling, CFG, "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(history["loss"]) == CFG.steps
    assert t.load("checkpoints/x.pt")["step"] == 4
    assert capsys.readouterr().out.count("was not written, the one before is kept") == 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["x.pt"]


def out_of_memory(*_):
    raise t.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def test_out_of_memory_in_training_says_which_flag_to_lower():
    with pytest.raises(
        SystemExit, match=r"64 tokens at once: raise --accumulate \(1\), lower --tokens-per-step \(4096\)"
    ):
        train(fresh(), batch, CFG, "x", loss_fn=out_of_memory)


def test_analysis_halves_its_batch_with_the_same_numbers(capsys):
    rows = t.randn(23, 4)
    sizes = []

    def fn(part):
        sizes.append(len(part))
        return part.square().sum(1) if len(part) <= 3 else out_of_memory()

    assert t.equal(t.cat(list(in_batches(fn, rows, 10))), rows.square().sum(1))
    assert sizes == [10, 5, *[3] * 7, 2]
    assert capsys.readouterr().out.count("out of memory: going on with") == 2
    with pytest.raises(SystemExit, match="on a single row"):
        list(in_batches(out_of_memory, rows, 8))
    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(lambda part: part @ part, rows, 8))


def test_recomputed_activations_change_no_number_and_leave_the_model_as_it_was():
    model = fresh()
    cfg = dataclasses.replace(CFG, save_every=0)
    recomputed = train(model, batch, dataclasses.replace(cfg, activation_checkpointing=True), "x")
    assert recomputed["loss"] == train(fresh(), batch, cfg, "x")["loss"]
    assert not any("forward" in vars(block) for block in model.blocks)


@pytest.mark.parametrize("changes", [{}, {"autocast": "on"}, {"activation_checkpointing": True}, {"accumulate": 4}])
def test_expected_memory_is_what_torch_tracks(changes):
    """Against torch's own tracker of a whole step, forward and backward, on shapes alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    make = lambda: AttnOnly(
        AttnOnlyConfig(n_layers=4, n_heads=8, d_model=256, d_head=32, d_vocab=4096, n_ctx=256, positions="rotary")
    )
    cfg = TrainConfig(contexts=(256,), tokens_per_step=16384, optimizer="adamw", **changes)
    expected = expected_memory(make, cfg, "cpu", cfg.autocast == "on")
    with FakeTensorMode():
        model = make()
        tracker = MemTracker()
        if cfg.activation_checkpointing:
            recompute_blocks(model)
        tracker.track_external(model)
        with tracker, t.autocast("cpu", t.bfloat16, enabled=cfg.autocast == "on"):
            language_loss(model, t.zeros(64 // cfg.accumulate, 256, dtype=t.long)).backward()
    tracked = tracker.get_tracker_snapshot("peak")[t.device("cpu")]["Total"] / 1e9 + expected["optimizer"]
    assert expected["total"] == pytest.approx(tracked, rel=0.1)
    assert expected["total"] == pytest.approx(
        sum(expected[name] for name in ("parameters", "gradients", "optimizer", "activations"))
    )
    assert expected["optimizer"] == 2 * expected["parameters"] == 2 * 4e-9 * sum(p.numel() for p in make().parameters())


# %% Several processes: the same global batch gives the same losses
TWO = """
import dataclasses
import json
import sys

sys.path[:0] = [{root!r}, {tests!r}]
from test_train import CFG, Halves, batch, fresh, odd
from train import first_goes_on, language_loss, processes, train

import torch as t

rank, size = processes()
found = {{}}


def go(name, batch, watched=False, model=None, **changes):
    model = model or fresh(seed=rank)  # the first one's weights count

    def watch(step):
        return {{"loss": language_loss(model, batch(0)).item()}}

    cfg = dataclasses.replace(CFG, save_every=6, **changes)
    history = train(model, batch, cfg, name, watch=watch if watched else None, watch_every=5)
    found[name] = {{
        "loss": history["loss"],
        "tokens": history["tokens"][-1],
        "watch": [seen.get("loss") for seen in history["watch"]],
        "norm": sum(p.norm().item() for p in model.parameters()),
    }}


go("even", batch, watched=True)
go("odd", odd)
go("one", lambda i: batch(i)[:1])
go("accumulate", odd, accumulate=2)
go("idle", odd, model=Halves())
go("recompute", odd, activation_checkpointing=True)
go("fsdp", odd, watched=True, fsdp=True)
go("fsdp_adamw", odd, fsdp=True, optimizer="adamw", activation_checkpointing=True)


class Cut(Exception):
    pass


def cut(i):
    if i == 8:
        raise Cut
    return odd(i)


try:
    go("fsdp_cut", cut, fsdp=True)
except Cut:
    go("fsdp_cut", odd, fsdp=True, resume=True)
if rank:
    with open("rank1.json", "w") as file:
        file.write(json.dumps(found))
print("from rank", rank)
first_goes_on()
assert processes() == (0, 1)
with open("rank0.json", "w") as file:
    file.write(json.dumps(found))
"""


class Halves(nn.Module):
    """Two experts, one for each row: a process may leave one without a gradient."""

    def __init__(self):
        super().__init__()
        t.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.out = nn.Linear(8, 20)

    def forward(self, tokens):
        choice = tokens[:, 0] % 2
        x = self.embed(tokens)
        by_expert = t.cat([self.experts[i](x[choice == i]) for i in (0, 1) if (choice == i).any()])
        rows = t.cat([t.where(choice == i)[0] for i in (0, 1)])
        return self.out(by_expert[rows.argsort()])


def odd(i: int) -> t.Tensor:
    return t.randint(20, (5, 16), generator=t.Generator().manual_seed(i))  # 5 rows: 3 for one process, 2 for the other


def start_two(code: str, folder: Path) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = {
            **os.environ,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(s.getsockname()[1]),
            "GLOO_SOCKET_IFNAME": "lo",
        }
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("two")
    processes = start_two(TWO.format(root=str(ROOT), tests=str(ROOT / "tests")), folder)
    out = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], out[0][1] + out[1][1]
    # the first alone prints
    assert out[0][0].endswith("from rank 0\n")
    assert out[1][0] == ""
    return json.loads((folder / "rank0.json").read_text()), json.loads((folder / "rank1.json").read_text()), folder


ALONE = {
    "even": (batch, {}),
    "odd": (odd, {}),
    "one": (lambda i: batch(i)[:1], {}),
    "accumulate": (odd, {"accumulate": 2}),
    "idle": (odd, {}),
    "recompute": (odd, {}),
    "fsdp": (odd, {}),
    "fsdp_adamw": (odd, {"optimizer": "adamw"}),
}


@pytest.mark.parametrize("name", ALONE)
def test_two_processes_follow_the_loss_curve_of_one(name, two):
    first, second, _ = two
    rows, changes = ALONE[name]
    model = Halves() if name == "idle" else fresh()
    alone = train(model, rows, dataclasses.replace(CFG, save_every=0, **changes), name)
    assert (
        first[name]["loss"]
        == second[name]["loss"]
        == pytest.approx(alone["loss"], abs=1e-5 if name in ("fsdp_adamw",) else 2e-3)
    )
    assert first[name]["loss"][0] == pytest.approx(alone["loss"][0], abs=1e-6)
    assert first[name]["tokens"] == alone["tokens"][-1]
    assert (
        first[name]["norm"]
        == second[name]["norm"]
        == pytest.approx(sum(p.norm().item() for p in model.parameters()), rel=1e-3)
    )


def test_watch_runs_on_every_process_and_sees_the_whole_model(two):
    first, second, folder = two
    for name in ("even", "fsdp"):
        assert len(first[name]["watch"]) == 3
        assert first[name]["watch"] == second[name]["watch"]
        assert None not in first[name]["watch"]


def test_sharded_training_resumes_exactly(two):
    first, second, _ = two
    assert first["fsdp_cut"]["loss"] == second["fsdp_cut"]["loss"] == first["fsdp"]["loss"]
    assert first["fsdp_cut"]["norm"] == first["fsdp"]["norm"]


@pytest.mark.parametrize("name", ["odd", "fsdp", "fsdp_adamw"])
def test_one_process_goes_on_from_the_checkpoint_of_two(name, two, monkeypatch):
    first, _, folder = two
    monkeypatch.chdir(folder)
    path = folder / f"checkpoints/{name}.pt"
    changes = ALONE[name][1]
    assert t.load(path)["step"] == CFG.steps

    class Cut(Exception):
        pass

    def cut(i):
        if i == 7:
            raise Cut
        return odd(i)

    with pytest.raises(Cut):
        train(fresh(), cut, dataclasses.replace(CFG, save_every=6, **changes), "half")
    half = t.load("checkpoints/half.pt")
    state = t.load(path)
    assert jsonable(half["optimizers"]) == jsonable(state["optimizers"])  # whole tensors of the same shapes
    model = fresh(seed=9)
    history = train(model, odd, dataclasses.replace(CFG, resume=True, save_every=6, **changes), name)
    assert history["loss"] == first[name]["loss"]
    assert sum(p.norm().item() for p in model.parameters()) == pytest.approx(first[name]["norm"], rel=1e-6)


def jsonable(optimizers: list[dict]) -> list:
    return [
        {
            i: {key: list(x.shape) if isinstance(x, t.Tensor) else type(x).__name__ for key, x in state.items()}
            for i, state in o["state"].items()
        }
        for o in optimizers
    ]


def test_wandb_without_a_key_writes_an_offline_run(run, tmp_path):
    if secret("WANDB_API_KEY"):
        pytest.skip("a key stands in .env: the run would go online")
    (tmp_path / "story.txt").write_text(story(12000))
    done = run(
        "attn_only.py",
        *"--data story.txt --vocab 300 --steps 4 --tokens-per-step 512 --contexts 32 --n-layers 1 --save-every 0 --wandb".split(),
        cwd=tmp_path,
        fresh=True,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert "wandb writes an offline run" in done.stdout
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert sum(file.stat().st_size for file in folder.glob("*.wandb")) > 2000
    assert list(folder.rglob("media/plotly/**/*.json"))


def test_an_analysis_has_a_wandb_run_too(run, tmp_path):
    if secret("WANDB_API_KEY"):
        pytest.skip("a key stands in .env: the run would go online")
    (tmp_path / "story.txt").write_text(story(4000))
    flags = "--n 2 --held-out 2 --site resid_pre --data story.txt --device cpu --wandb"
    done = run("patching.py", *flags.split(), cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr[-1500:]
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    said = b"".join(file.read_bytes() for file in folder.glob("*.wandb"))
    assert b"gates.nothing_patched" in said
    assert list(folder.rglob("media/plotly/**/*.json"))


def test_no_steps_are_the_untrained_control():
    model = fresh()
    before = [p.clone() for p in model.parameters()]
    history = train(model, batch, dataclasses.replace(CFG, steps=0), "x", watch=lambda step: {"step seen": step})
    assert history["tokens"] == [0] and len(history["loss"]) == 1 and history["watch"][0]["step seen"] == 0
    assert all(t.equal(a, b) for a, b in zip(before, model.parameters()))


def test_weights_that_the_last_step_broke_are_one_line():
    model = fresh()
    with pytest.raises(SystemExit, match="lower --lr and --muon-lr"):
        train(model, batch, dataclasses.replace(CFG, steps=1, lr=t.inf, save_every=0, clip=0.0, warmup=0.0), "x")
