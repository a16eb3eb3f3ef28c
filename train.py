"""The one training loop (Muon and AdamW, exact resume, many processes), and how a script is launched: flags, presets, sweeps, Slurm."""

import contextlib
import copy
import ctypes
import dataclasses
import functools
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NoReturn

from utils import BAR, cyan, endc, fail, gray, in_kernel, pick_device, secret, tec, write_aside, yellow
from hooks import out_of_memory

import numpy as np
import torch as t
from torch import Tensor
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
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
    activation_checkpointing: bool = (
        False  # compute each block's activations again in the backward pass: less memory, a third more time
    )
    fsdp: bool = False  # several processes: share out parameters, gradients and optimizer states (FSDP2), where a copy for each (DDP) does not fit
    compile: bool = False
    wandb: bool = False
    save_every: int = 200  # steps between checkpoints; 0 writes none
    resume: bool = False  # go on from the checkpoint of the same config
    seed: int = 0
    device: str = "auto"


#%% Speed on a CPU: keep freed memory, and use bfloat16 where a 10 ms probe finds it faster
def keep_freed_memory() -> None:
    """glibc returns every large temporary to the system and faults it in again; keeping them makes a step up to 1.7x faster."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def bf16_is_faster(device: str) -> bool:
    if device != "cpu":
        return device.startswith("cuda") and t.cuda.is_bf16_supported()

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
    hidden = (
        {id(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in name}
        if cfg.optimizer == "muon"
        else set()
    )
    rest = [p for p in model.parameters() if id(p) not in hidden and p.requires_grad]
    optimizers: list[t.optim.Optimizer] = [
        t.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    ]
    if hidden:
        optimizers.append(
            t.optim.Muon(
                [p for p in model.parameters() if id(p) in hidden],
                lr=cfg.muon_lr,
                weight_decay=cfg.weight_decay,
                momentum=0.95,
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def schedule(step: int, cfg: TrainConfig) -> float:
    """Share of the peak learning rate at a step."""
    rise = min(1.0, (step + 1) / max(1, cfg.warmup * cfg.steps))
    if cfg.schedule == "cosine":
        return rise * (0.55 + 0.45 * math.cos(math.pi * step / cfg.steps))
    return rise * min(1.0, (cfg.steps - step) / max(1, cfg.decay * cfg.steps))


def context_at(step: int, cfg: TrainConfig) -> int:
    return cfg.contexts[sum(step >= share * cfg.steps for share in cfg.context_steps[: len(cfg.contexts) - 1])]


#%% Checkpoints: written aside, then renamed; refused where they do not fit
FREE = (
    "resume",
    "wandb",
    "save_every",
    "device",
    "compile",
    "fsdp",
    "activation_checkpointing",
)  # settings that may differ between a run and its continuation


def identity(cfg: TrainConfig, **more) -> dict:
    """What two runs must share for one to go on from the other's checkpoint: the training settings, and what the script adds (shape, data)."""
    return {
        **{field.name: getattr(cfg, field.name) for field in dataclasses.fields(TrainConfig) if field.name not in FREE},
        **more,
    }


def save_checkpoint(path: Path, run: dict, step: int, model: nn.Module, optimizers: list[dict], history: dict) -> bool:
    """False where the disk is full: the checkpoint before is kept, and training can go on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = dict(run=run, step=step, model=model.state_dict(), optimizers=optimizers, history=history)
    try:
        write_aside(path, lambda p: t.save(state, p))
    except (OSError, RuntimeError) as error:
        print(
            f"{yellow}step {step}: {path} was not written, the one before is kept: {str(error).splitlines()[0]}{endc}"
        )
    else:
        return True
    return False


def load_checkpoint(path: Path, run: dict) -> dict:
    try:
        state = t.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
        fail(f"checkpoint {path} is corrupt ({type(error).__name__}): delete it, or run without --resume")
    if not isinstance(state, dict) or "run" not in state:
        fail(f"{path} is not a checkpoint of train.py: delete it, or run without --resume")
    differs = [f"{k} was {state['run'].get(k)!r}, is {v!r}" for k, v in run.items() if state["run"].get(k) != v]
    if differs:
        fail(f"checkpoint {path} does not fit: {'; '.join(differs[:3])}. Use the same flags, or run without --resume")
    return state


#%% Several processes (torchrun, srun): each takes its share of every batch, the first alone prints and writes
def processes() -> tuple[int, int]:
    """(rank, number) of the processes that torchrun or srun started; the first call joins them into one group."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
        ).stdout.split()
        env.update(
            RANK=env["SLURM_PROCID"],
            WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"],
            LOCAL_RANK=env["SLURM_LOCALID"],
            MASTER_ADDR=nodes[0],
            MASTER_PORT=str(20000 + int(env["SLURM_JOB_ID"]) % 20000),
        )
    if int(env.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        if t.cuda.is_available():
            t.cuda.set_device(int(env["LOCAL_RANK"]) % t.cuda.device_count())
        dist.init_process_group(timeout=timedelta(hours=2))
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size()


def first_goes_on() -> None:
    """Ends all processes but the first: call it after the last training, before what one process does alone."""
    rank, size = processes()
    if size == 1:
        return
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        raise SystemExit(0)
    os.environ.update(RANK="0", WORLD_SIZE="1")


def share_of(rows: Tensor, rank: int, size: int) -> tuple[Tensor, float]:
    """This process's rows, and the weight of their mean that makes the mean over processes the mean over all rows. Without rows: one row of weight 0, so that nobody waits."""
    mine = rows[rank::size]
    return (mine, len(mine) * size / len(rows)) if len(mine) else (rows[:1], 0.0)


def agree(loss: float, stop: int, size: int) -> tuple[float, int]:
    """(mean loss, highest signal) of all processes."""
    if size == 1:
        return loss, stop
    both = t.tensor([loss / size, stop], dtype=t.float64)
    dist.all_reduce(both[:1]), dist.all_reduce(both[1:], dist.ReduceOp.MAX)
    return both[0].item(), int(both[1])


def sharded(model: nn.Module) -> nn.Module:
    """A copy whose parameters are shared out over all processes, block by block."""
    from torch.distributed.fsdp import fully_shard  # 3 s

    for p in model.parameters():
        dist.broadcast(p.data, 0)
    model = copy.deepcopy(model)
    for block in getattr(model, "blocks", []):
        fully_shard(block)
    return fully_shard(model)


@t.no_grad()
def collect(model: nn.Module, parts: nn.Module) -> None:
    """Whole parameters from the sharded copy into the model, one at a time."""
    for whole, part in zip(model.parameters(), parts.parameters(), strict=True):
        whole.copy_(part.full_tensor())


def whole_state(optimizer: t.optim.Optimizer) -> dict:
    """Its state_dict with whole tensors, so that a checkpoint fits any number of processes."""
    return t.utils._pytree.tree_map(
        lambda x: x.full_tensor().cpu() if hasattr(x, "full_tensor") else x, optimizer.state_dict()
    )


def load_state(optimizer: t.optim.Optimizer, saved: dict) -> None:
    from torch.distributed.tensor import distribute_tensor

    params = [p for group in optimizer.param_groups for p in group["params"]]
    part = lambda p, x: (
        distribute_tensor(x.to(p.device), p.device_mesh, p.placements)
        if hasattr(p, "full_tensor") and x.shape == p.shape
        else x
    )
    optimizer.load_state_dict(
        {
            **saved,
            "state": {i: {key: part(params[i], x) for key, x in state.items()} for i, state in saved["state"].items()},
        }
    )


#%% Memory: what a run will need
def expected_memory(
    make_model: Callable[[], nn.Module], cfg: TrainConfig, device: str = "cuda", low: bool = True
) -> dict[str, float]:
    """Gigabytes of one process at the peak of a step, from shapes alone (no such device is needed). low: bfloat16 autocast. Not for models whose shapes depend on data (experts)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage()._cdata] = x
        return x

    before = t.is_autocast_enabled(device), t.get_autocast_dtype(device)
    with FakeTensorMode(), t.device(device):
        model, ctx = make_model(), max(cfg.contexts)
        optimizers = make_optimizers(model, cfg)
        if cfg.activation_checkpointing:
            recompute_blocks(model)
        try:  # autocast() itself refuses a device that is not there
            t.set_autocast_enabled(device, low), t.set_autocast_dtype(device, t.bfloat16)
            with t.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                language_loss(model, t.zeros(cfg.tokens_per_step // cfg.accumulate // ctx, ctx, dtype=t.long))
        finally:
            t.set_autocast_enabled(device, before[0]), t.set_autocast_dtype(device, before[1])
        for p in model.parameters():
            saved.pop(p.untyped_storage()._cdata, None)
        states = sum(
            p.numel() * p.element_size() * (1 if isinstance(o, t.optim.Muon) else 2)
            for o in optimizers
            for group in o.param_groups
            for p in group["params"]
        )
        weights, sizes = (
            sum(p.numel() * p.element_size() for p in model.parameters()),
            [x.untyped_storage().nbytes() for x in saved.values()],
        )
    parts = dict(
        parameters=weights, gradients=weights, optimizer=states, activations=sum(sizes) + 2 * max(sizes)
    )  # the largest, the logits, has its gradient beside it, twice for a moment
    return {name: size / 1e9 for name, size in {**parts, "total": sum(parts.values())}.items()}


def recompute_blocks(model: nn.Module) -> None:
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


#%% Signals: preemption and time limits save at the end of a step; a Slurm job goes back to the queue
@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The signals (Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2) that arrived inside the context, which are otherwise ignored there; a second Ctrl-C is not."""
    caught: list[int] = []
    if in_kernel() or threading.current_thread() is not threading.main_thread():
        return (yield caught)

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    before = {
        number: signal.signal(number, catch)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def slurm_id() -> str | None:
    """Of the job this process runs in: 12, or 12_3 in an array."""
    env = os.environ
    return (
        f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
        if "SLURM_ARRAY_JOB_ID" in env
        else env.get("SLURM_JOB_ID")
    )


def in_queue(job: str) -> str:
    """'PENDING (Priority)', 'RUNNING (None)' ...; nothing once it has left the queue."""
    if not shutil.which("squeue"):
        return ""
    asked = subprocess.run(
        ["squeue", "--noheader", "--array", "--jobs", job, "--format", "%T (%r)"], capture_output=True, text=True
    )
    return (
        f"UNKNOWN ({asked.stderr.strip()})"
        if asked.returncode and "Invalid job id" not in asked.stderr
        else asked.stdout.strip()
    )


def give_way(number: int, rank: int, at: str) -> NoReturn:
    """The checkpoint is written. A preempted job requeues itself, a cancelled one is no longer RUNNING and just ends."""
    job = slurm_id()
    requeue = rank == 0 and job is not None and in_queue(job).startswith("RUNNING")
    print(
        f"{yellow}{signal.Signals(number).name}: saved {at}; {f'job {job} goes back to the queue' if requeue else 'go on with --resume'}{endc}",
        flush=True,
    )
    if requeue:
        subprocess.run(["scontrol", "requeue", job], check=True)
    raise SystemExit(128 + number if rank == 0 else 0)


#%% The loop
def language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats, averaged over all positions but the first."""
    logits = model(tokens)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(
    model: nn.Module,
    batch: Callable[[int], Tensor],
    cfg: TrainConfig,
    name: str,
    loss_fn: Callable = language_loss,
    watch: Callable[[int], dict] | None = None,
    watch_every: int = 50,
    tokens_per_batch: int | None = None,
    split: bool = True,
    **fits,
) -> dict:
    """
    Train in place. batch(i) gives micro-batch i and must depend on i alone, so that a resumed run sees the same data; several processes split its rows,
    over which loss_fn(model, rows) averages (split=False: each takes them all). watch(step) -> numbers to keep, every watch_every steps, on every process.
    Returns the history: step, tokens, loss, watch, seconds, tokens_per_second.
    The checkpoint is checkpoints/<name>.pt; fits: what else it must share with the run (data, model shape).
    """
    (rank, size), device, path = processes(), pick_device(cfg.device), Path("checkpoints") / f"{name}.pt"
    if cfg.fsdp and size == 1:
        fail(
            "--fsdp shares a model out over several processes: start them by torchrun --nproc-per-node N, or --slurm --slurm-gpus N"
        )
    model.to("cpu" if cfg.fsdp else device).train()
    if device == "cpu":
        keep_freed_memory()
    low = cfg.autocast == "on" or (cfg.autocast == "auto" and bf16_is_faster(device))
    history: dict = {"step": [], "tokens": [], "loss": [], "watch": [], "seconds": 0.0}
    run, state, first = identity(cfg, **fits), None, 0
    if cfg.resume and path.exists():
        state = load_checkpoint(path, run)
        model.load_state_dict(state["model"])
        history, first = state["history"], state["step"]
        print(f"{gray}resumed {path} at step {first} of {cfg.steps}{endc}")
    elif cfg.resume:
        print(f"{yellow}--resume: no checkpoint {path} yet, starting from step 0{endc}")
    work = sharded(model) if cfg.fsdp else model
    if cfg.activation_checkpointing:
        recompute_blocks(work)
    optimizers = make_optimizers(work, cfg)
    for optimizer, saved in zip(optimizers, state["optimizers"] if state else []):
        load_state(optimizer, saved)
    forward = ddp = (
        nn.parallel.DistributedDataParallel(work, find_unused_parameters=True) if size > 1 and not cfg.fsdp else work
    )
    if cfg.compile:
        forward = t.compile(forward)
    board = start_wandb(name, run) if cfg.wandb and rank == 0 else None
    seen, start = history["tokens"][-1] if history["tokens"] else 0, time.perf_counter() - history["seconds"]
    bar = trange(first, cfg.steps, initial=first, total=cfg.steps, desc=f"{name}", disable=rank > 0, **BAR)
    with caught_signals() as caught:
        for step in bar:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * schedule(step, cfg)
            total = 0.0
            try:
                for micro in range(cfg.accumulate):
                    tokens = batch(step * cfg.accumulate + micro)
                    seen += tokens_per_batch or tokens.numel()
                    tokens, weight = share_of(tokens, rank, size) if split else (tokens, 1.0)
                    with ddp.no_sync() if ddp is not work and micro + 1 < cfg.accumulate else contextlib.nullcontext():
                        with t.autocast(device.split(":")[0], t.bfloat16, enabled=low):
                            loss = loss_fn(forward, tokens.to(device)) * weight / cfg.accumulate
                        loss.backward()
                    total += loss.item()
                total, stop = agree(total, max(caught, default=0), size)
                if not math.isfinite(total):
                    fail(f"the loss is {total} at step {step}: lower --lr and --muon-lr")
                if cfg.clip:
                    nn.utils.clip_grad_norm_(work.parameters(), cfg.clip)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            except (t.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                fail(
                    f"out of memory at step {step} with {tokens.numel() // size} tokens at once: raise --accumulate ({cfg.accumulate}), lower --tokens-per-step ({cfg.tokens_per_step}) or --contexts, or set --activation-checkpointing{' or --fsdp' * (size > 1)}"
                )
            last = step + 1 == cfg.steps
            history["step"].append(step + 1), history["tokens"].append(seen), history["loss"].append(total)
            if watch and ((step + 1) % watch_every == 0 or last):
                if cfg.fsdp:
                    collect(model.to(device), work)
                model.eval()
                history["watch"].append({"step": step + 1, "tokens": seen, **watch(step + 1)})
                assert all(type(value) in (int, float) for value in history["watch"][-1].values()), (
                    "watch returns Python numbers: they go into the checkpoint"
                )
                model.to("cpu" if cfg.fsdp else device).train()
            if board:
                board.log(
                    {
                        "loss": total,
                        "tokens": seen,
                        **{
                            k: v
                            for k, v in (history["watch"][-1] if history["watch"] else {}).items()
                            if isinstance(v, float)
                        },
                    },
                    step=step,
                )
            if step % 10 == 0 or last:
                bar.set_description(f"{name} loss {cyan}{total:.3f}{endc} nats {seen / 1e6:.2f}M tokens")
            if stop or (cfg.save_every and (last or (step + 1) % cfg.save_every == 0)):
                history["seconds"] = time.perf_counter() - start
                if cfg.fsdp:
                    collect(model, work)
                states = [whole_state(optimizer) for optimizer in optimizers]
                saved = rank > 0 or save_checkpoint(path, run, step + 1, model, states, history)
            if stop:
                give_way(stop, rank, f"{path} at step {step + 1} of {cfg.steps}" if saved else "nothing new")
    history["seconds"] = time.perf_counter() - start
    if cfg.fsdp:
        collect(model.to(device), work)
    if cfg.activation_checkpointing and not cfg.fsdp:
        for block in model.blocks:
            del block.forward
    tec()
    model.eval()
    return {**history, "tokens_per_second": seen / history["seconds"]}


def start_wandb(name: str, run: dict):
    """A new run, which the script's figures and numbers join; it ends with the script, or where the next begins."""
    import wandb

    if wandb.run:
        wandb.run.finish()
    key = secret("WANDB_API_KEY")
    if key:
        wandb.login(key=key)
    else:
        print(f"{yellow}no WANDB_API_KEY in .env: wandb writes an offline run{endc}")
    return wandb.init(project="interp", name=name, config=run, mode="online" if key else "offline")


#%% Speed: hooks cost nothing when nobody listens
def bench_against_hf(ours: nn.Module, hf_model: nn.Module, tokens: Tensor, pairs: int = 7) -> float:
    """Hugging Face's time / ours for forward, loss and backward, median of interleaved pairs: above 1 ours is faster."""

    def seconds(forward: Callable, model: nn.Module) -> float:
        if tokens.is_cuda:
            t.cuda.synchronize()
        start = time.perf_counter()
        language_loss(forward, tokens).backward()
        if tokens.is_cuda:
            t.cuda.synchronize()
        model.zero_grad()
        return time.perf_counter() - start

    runs = [(ours.train(), ours), (lambda x: hf_model(x, use_cache=False).logits, hf_model.train())]
    for run in runs * 2:
        seconds(*run)
    ratios = []
    for i in range(pairs):
        took = [seconds(*runs[j]) for j in ((0, 1) if i % 2 else (1, 0))]
        ratios.append(took[1] / took[0] if i % 2 else took[0] / took[1])
    return sorted(ratios)[pairs // 2]


#%% Batches of a corpus, some of whose rows say a snippet twice
def repeat_batches(corpus, cfg: TrainConfig) -> Callable[[int], Tensor]:
    """i -> micro-batch i, of which a share of cfg.repeats rows say a snippet twice: two thirds natural, one third in shuffled order."""
    weights = {"code": 1 - cfg.english, "english": cfg.english} if set(corpus.train) == {"code", "english"} else None

    def batch(i: int) -> Tensor:
        ctx = context_at(i // cfg.accumulate, cfg)
        return corpus.batch(
            np.random.default_rng((cfg.seed, i)),
            cfg.tokens_per_step // cfg.accumulate // ctx,
            ctx,
            cfg.repeats * 2 / 3,
            cfg.repeats / 3,
            weights,
        )

    return batch
