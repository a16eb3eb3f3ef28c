"""The one training loop: AdamW, with Muon for hidden matrices; schedules, context stages, autocast, checkpoints, exact resume."""
import ctypes
import dataclasses
import math
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import BAR, cyan, endc, fail, gray, pick_device, secret, tec, write_aside, yellow

import torch as t
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange


@dataclass
class TrainConfig:
    steps: int = 400
    tokens_per_step: int = 4096
    contexts: tuple[int, ...] = (64, 256)  # context lengths, one stage after the other
    context_steps: tuple[float, ...] = (0.6,)  # share of the steps at which the next stage begins
    accumulate: int = 1  # micro-batches per step
    lr: float = 5e-3  # AdamW: embeddings, biases, norms; everything with --optimizer adamw
    muon_lr: float = 0.02  # Muon: hidden matrices
    optimizer: Literal["muon", "adamw"] = "muon"
    weight_decay: float = 0.0
    schedule: Literal["wsd", "cosine"] = "wsd"  # warm-up, stable, linear decay to 0; or cosine to a tenth
    warmup: float = 0.02  # share of the steps
    decay: float = 0.3  # share of the steps (wsd)
    clip: float = 1.0  # gradient norm; 0 does not clip
    autocast: Literal["auto", "on", "off"] = "auto"  # bfloat16 in training: auto is on where it is faster
    compile: bool = False
    wandb: bool = False
    save_every: int = 200  # steps between checkpoints; 0 writes none
    resume: bool = False  # go on from the checkpoint of the same config
    seed: int = 0
    device: str = "auto"


#%% Speed on a CPU: keep freed memory, and use bfloat16 where a 10 ms probe finds it faster
def keep_freed_memory() -> None:
    """glibc returns every large temporary to the system and faults it in again; keeping them makes a step up to 1.7x faster."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"): return
    libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def bf16_is_faster(device: str) -> bool:
    if device != "cpu": return device.startswith("cuda") and t.cuda.is_bf16_supported()

    def seconds(x: Tensor) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(t.ones(512, 512, dtype=t.bfloat16)) < 0.7 * seconds(t.ones(512, 512))


#%% Optimizers and schedule
def make_optimizers(model: nn.Module, cfg: TrainConfig) -> list[t.optim.Optimizer]:
    """Muon for the weight matrices of linear layers inside blocks, AdamW for the rest."""
    hidden = {id(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in name} if cfg.optimizer == "muon" else set()
    rest = [p for p in model.parameters() if id(p) not in hidden and p.requires_grad]
    optimizers: list[t.optim.Optimizer] = [t.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)]
    if hidden: optimizers.append(t.optim.Muon([p for p in model.parameters() if id(p) in hidden], lr=cfg.muon_lr, weight_decay=cfg.weight_decay, momentum=0.95))
    for optimizer in optimizers:
        for group in optimizer.param_groups: group["base_lr"] = group["lr"]
    return optimizers


def schedule(step: int, cfg: TrainConfig) -> float:
    """Share of the peak learning rate at a step."""
    rise = min(1.0, (step + 1) / max(1, cfg.warmup * cfg.steps))
    if cfg.schedule == "cosine": return rise * (0.55 + 0.45 * math.cos(math.pi * step / cfg.steps))
    return rise * min(1.0, (cfg.steps - step) / max(1, cfg.decay * cfg.steps))


def context_at(step: int, cfg: TrainConfig) -> int:
    return cfg.contexts[sum(step >= share * cfg.steps for share in cfg.context_steps[:len(cfg.contexts) - 1])]


#%% Checkpoints: written aside, then renamed; refused where they do not fit
FREE = ("resume", "wandb", "save_every", "device", "compile")  # settings that may differ between a run and its continuation


def identity(cfg: TrainConfig, **more) -> dict:
    """What two runs must share for one to go on from the other's checkpoint: the training settings, and what the script adds (shape, data)."""
    return {**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(TrainConfig) if field.name not in FREE}, **more}


def save_checkpoint(path: Path, run: dict, step: int, model: nn.Module, optimizers: list[t.optim.Optimizer], history: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = dict(run=run, step=step, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], history=history)
    write_aside(path, lambda p: t.save(state, p))


def load_checkpoint(path: Path, run: dict) -> dict:
    try: state = t.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error: fail(f"checkpoint {path} is corrupt ({type(error).__name__}): delete it, or run without --resume")
    if not isinstance(state, dict) or "run" not in state: fail(f"{path} is not a checkpoint of train.py: delete it, or run without --resume")
    differs = [f"{k} was {state['run'].get(k)!r}, is {v!r}" for k, v in run.items() if state["run"].get(k) != v]
    if differs: fail(f"checkpoint {path} does not fit: {'; '.join(differs[:3])}. Use the same flags, or run without --resume")
    return state


#%% The loop
def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats, averaged over all positions but the first."""
    logits = model(tokens)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(
    model: nn.Module, batch: Callable[[int], Tensor], cfg: TrainConfig, name: str, loss_fn: Callable = next_token_loss,
    watch: Callable[[int], dict] | None = None, watch_every: int = 50, tokens_per_batch: int | None = None, **fits,
) -> dict:
    """
    Train in place. batch(i) gives micro-batch i and must depend on i alone, so that a resumed run sees the same data.
    watch(step) -> numbers to keep, every watch_every steps. Returns the history: step, tokens, loss, watch, seconds, tokens_per_second.
    The checkpoint is checkpoints/<name>.pt; fits: what else it must share with the run (data, model shape).
    """
    device, path = pick_device(cfg.device), Path("checkpoints") / f"{name}.pt"
    model.to(device).train()
    if device == "cpu": keep_freed_memory()
    low = cfg.autocast == "on" or (cfg.autocast == "auto" and bf16_is_faster(device))
    optimizers = make_optimizers(model, cfg)
    history: dict = {"step": [], "tokens": [], "loss": [], "watch": [], "seconds": 0.0}
    run, first = identity(cfg, **fits), 0
    if cfg.resume and path.exists():
        state = load_checkpoint(path, run)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True): optimizer.load_state_dict(saved)
        history, first = state["history"], state["step"]
        print(f"{gray}resumed {path} at step {first} of {cfg.steps}{endc}")
    elif cfg.resume: print(f"{yellow}--resume: no checkpoint {path} yet, starting from step 0{endc}")
    forward = t.compile(model) if cfg.compile else model
    board = start_wandb(name, run) if cfg.wandb else None
    seen, clock = history["tokens"][-1] if history["tokens"] else 0, time.perf_counter()
    bar = trange(first, cfg.steps, initial=first, total=cfg.steps, desc=f"{name}", **BAR)
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups: group["lr"] = group["base_lr"] * schedule(step, cfg)
        total = 0.0
        for micro in range(cfg.accumulate):
            tokens = batch(step * cfg.accumulate + micro).to(device)
            with t.autocast(device.split(":")[0], t.bfloat16, enabled=low): loss = loss_fn(forward, tokens)
            (loss / cfg.accumulate).backward()
            total, seen = total + loss.item() / cfg.accumulate, seen + (tokens_per_batch or tokens.numel())
        if not math.isfinite(total): fail(f"the loss is {total} at step {step}: lower --lr and --muon-lr")
        if cfg.clip: nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        last = step + 1 == cfg.steps
        history["step"].append(step + 1), history["tokens"].append(seen), history["loss"].append(total)
        if watch and ((step + 1) % watch_every == 0 or last):
            model.eval()
            history["watch"].append({"step": step + 1, "tokens": seen, **watch(step + 1)})
            assert all(type(value) in (int, float) for value in history["watch"][-1].values()), "watch returns Python numbers: they go into the checkpoint"
            model.train()
        if board: board.log({"loss": total, "tokens": seen, **{k: v for k, v in (history["watch"][-1] if history["watch"] else {}).items() if isinstance(v, float)}}, step=step)
        if step % 10 == 0 or last: bar.set_description(f"{name} loss {cyan}{total:.3f}{endc} nats {seen / 1e6:.2f}M tokens")
        if last or (cfg.save_every and (step + 1) % cfg.save_every == 0):
            now = time.perf_counter()
            history["seconds"], clock = history["seconds"] + now - clock, now
            if cfg.save_every: save_checkpoint(path, run, step + 1, model, optimizers, history)
    if board: board.finish()
    tec()
    model.eval()
    return {**history, "tokens_per_second": seen / history["seconds"]}


def start_wandb(name: str, run: dict):
    import wandb
    key = secret("WANDB_API_KEY")
    if key: wandb.login(key=key)
    else: print(f"{yellow}no WANDB_API_KEY in .env: wandb writes an offline run{endc}")
    return wandb.init(project="interp", name=name, config=run, mode="online" if key else "offline")


#%% Speed: hooks cost nothing when nobody listens
def bench_against_hf(ours: nn.Module, hf_model: nn.Module, tokens: Tensor, pairs: int = 7) -> float:
    """Hugging Face's time / ours for forward, loss and backward, median of interleaved pairs: above 1 ours is faster."""
    def seconds(forward: Callable, model: nn.Module) -> float:
        if tokens.is_cuda: t.cuda.synchronize()
        start = time.perf_counter()
        next_token_loss(forward, tokens).backward()
        if tokens.is_cuda: t.cuda.synchronize()
        model.zero_grad()
        return time.perf_counter() - start

    runs = [(ours.train(), ours), (lambda x: hf_model(x, use_cache=False).logits, hf_model.train())]
    for run in runs * 2: seconds(*run)
    ratios = []
    for i in range(pairs):
        took = [seconds(*runs[j]) for j in ((0, 1) if i % 2 else (1, 0))]
        ratios.append(took[1] / took[0] if i % 2 else took[0] / took[1])
    return sorted(ratios)[pairs // 2]
