"""The one training loop: Muon and AdamW, checkpoints, exact resume, many processes, signals."""

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
from typing import ClassVar, Literal, NoReturn

from utils import (  # first: sets OpenMP's variables before torch is loaded
    BAR,
    Count,
    Natural,
    NotNegative,
    Share,
    cyan,
    endc,
    fail,
    gray,
    in_kernel,
    pick_device,
    secret,
    tec,
    write_aside,
    yellow,
)
from hooks import out_of_memory
from layers import next_token_loss

import numpy as np
import torch as t
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import trange


@dataclass
class TrainConfig:
    least_context: ClassVar[int] = 8  # tokens that a row of this script must have
    steps: Natural = 400  # 0 trains nothing: the untrained control
    tokens_per_step: Count = 4096  # rows of one context length, as many as hold these tokens
    contexts: tuple[Count, ...] = (64, 256)  # context lengths, one stage after the other
    context_steps: tuple[Share, ...] = (0.6,)  # share of the steps at which the next stage begins
    accumulate: Count = 1  # micro-batches per step
    lr: NotNegative = 5e-3  # AdamW: embeddings, biases, norms
    muon_lr: NotNegative = 0.02  # Muon: hidden matrices
    adamw_lr: NotNegative = 2e-3  # hidden matrices with --optimizer adamw
    optimizer: Literal["muon", "adamw"] = "muon"  # of the hidden matrices; the rest is always AdamW's
    weight_decay: NotNegative = 0.0  # of matrices; norms and biases are spared
    schedule: Literal["wsd", "cosine"] = "wsd"  # warm-up, stable, linear decay to 0; or cosine to a tenth
    warmup: Share = 0.02  # share of the steps
    decay: Share = 0.3  # share of the steps (wsd)
    clip: NotNegative = 1.0  # gradient norm; 0 does not clip
    autocast: Literal["auto", "on", "off"] = "auto"  # bfloat16 in training: auto is on where it is faster
    activation_checkpointing: bool = (
        False  # compute activations again in the backward pass: less memory, a third more time
    )
    fsdp: bool = (
        False  # several processes share out parameters, gradients and optimizer states (FSDP2) where DDP does not fit
    )
    compile: bool = False  # torch.compile: a minute at the start, faster on a GPU
    wandb: bool = False  # losses, numbers and figures go to Weights & Biases too
    save_every: Natural = 200  # steps between checkpoints; 0 writes none
    resume: bool = False  # go on from the checkpoint of the same config
    seed: Natural = 0  # of weights, rows and draws
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


#%% Settings that cannot be run are refused before anything is read or trained
def check_settings(cfg: object) -> None:
    """One line for settings that contradict each other (ranges stand beside the defaults); cfg: any TrainConfig."""
    if not isinstance(cfg, TrainConfig):
        return
    prompt = getattr(cfg, "prompt", None)
    if prompt is not None and not prompt.strip():
        fail("--prompt is empty: give a few words")
    if getattr(cfg, "n_heads", 1) > getattr(cfg, "d_model", math.inf):
        fail(f"--n-heads {cfg.n_heads} is more than --d-model {cfg.d_model}: a head has at least one dimension")
    if getattr(cfg, "n_heads", 1) % getattr(cfg, "n_kv_heads", 1):
        fail(f"--n-heads {cfg.n_heads} is not a multiple of --n-kv-heads {cfg.n_kv_heads}")
    if getattr(cfg, "top_k", 1) > getattr(cfg, "n_experts", math.inf):
        fail(f"--top-k {cfg.top_k} is more than --n-experts {cfg.n_experts}")
    if getattr(cfg, "n_experts", 2) < 2:
        fail("--n-experts 1 leaves the router nothing to choose: llama_block.py builds models without experts")
    check_contexts(cfg)


def check_contexts(cfg: TrainConfig) -> None:
    if not cfg.contexts:
        fail("--contexts is empty: give the length of the rows, as in --contexts 64 256")
    if cfg.least_context <= 1:
        return  # of no effect
    if min(cfg.contexts) < cfg.least_context:
        fail(f"--contexts {min(cfg.contexts)} is too short: rows have at least {cfg.least_context} tokens")
    begins = cfg.context_steps[: len(cfg.contexts) - 1]
    if len(begins) < len(cfg.contexts) - 1:
        fail(
            f"--contexts has {len(cfg.contexts)} stages and --context-steps says where {len(begins)} of the "
            f"{len(cfg.contexts) - 1} after the first begin: give a share of the steps for each, as in --context-steps "
            + " ".join(f"{(i + 1) / len(cfg.contexts):.2g}" for i in range(len(cfg.contexts) - 1))
        )
    if list(begins) != sorted(begins) or not all(0 <= share < 1 for share in begins):
        fail(f"--context-steps {' '.join(map(str, begins))}: shares of the steps from 0 to below 1, ascending")
    if cfg.tokens_per_step // cfg.accumulate < max(cfg.contexts):
        fail(
            f"--tokens-per-step {cfg.tokens_per_step} in --accumulate {cfg.accumulate} parts has no whole row of "
            f"--contexts {max(cfg.contexts)} tokens: raise the first, or lower another"
        )


#%% Speed on a CPU: keep freed memory, and use bfloat16 where a 10 ms probe finds it faster
def keep_freed_memory() -> None:
    """
    glibc returns every large temporary to the system and faults it in again; keeping them makes a step up to 1.7x
    faster.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def bf16_is_faster(device: str) -> bool:
    if device != "cpu":
        return device.startswith("cuda") and t.cuda.is_bf16_supported(including_emulation=False)

    def seconds(x: Tensor) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(t.ones(256, 256, dtype=t.bfloat16)) < 0.7 * seconds(t.ones(256, 256))


#%% Muon: momentum for matrices, whose every step is made about orthogonal
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Jordan et al. 2024


def orthogonalized(G: Tensor, dtype: t.dtype) -> Tensor:
    """
    About U V^T of G = U S V^T (out, in): five Newton-Schulz steps bring every singular value to 0.7 ... 1.2 (Jordan et
    al. 2024), in dtype.
    """
    a, b, c = NEWTON_SCHULZ
    tall = G.shape[0] > G.shape[1]
    X = G.to(dtype)
    X = X.T if tall else X
    X = X / X.norm().clamp(min=1e-7)  # all singular values below 1
    for _ in range(5):
        A = X @ X.T
        B = t.addmm(A, A, A, beta=b, alpha=c)  # b A + c A^2
        X = t.addmm(X, B, X, beta=a)  # a X + B X
    return X.T if tall else X


class Muon(t.optim.Optimizer):
    """
    Momentum whose steps are orthogonalized (Jordan et al. 2024), as torch.optim.Muon. dtype: of orthogonalized; torch's
    is always bfloat16, which a CPU that only imitates it takes twenty times as long for as for float32.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, dtype: t.dtype):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype

    @t.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(self, p: nn.Parameter, group: dict) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = t.zeros_like(p.grad)
        average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        nesterov = p.grad.lerp(average, group["momentum"])
        direction = orthogonalized(nesterov, self.dtype)
        n_out, n_in = p.shape
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(direction, alpha=-group["lr"] * math.sqrt(max(1, n_out / n_in)))


#%% Optimizers and schedule
ROUTERS = ("router", "shared_expert_gate")  # maps to logits of a choice, as the unembedding is


@dataclass
class ParameterKinds:
    """Every parameter that is trained, once, by what the optimizers do with it."""

    hidden: list[nn.Parameter]  # weights of the linear maps inside blocks but the routers
    tables: list[nn.Parameter]  # every other matrix: embeddings, positions, unembedding, routers
    vectors: list[nn.Parameter]  # norms and biases (by distance too), which never decay


def kinds_of_parameters(model: nn.Module) -> ParameterKinds:
    linears = set()
    for name, module in model.named_modules():
        is_router = name.rsplit(".")[-1] in ROUTERS
        if isinstance(module, nn.Linear) and "blocks" in name and not is_router:
            linears.add(id(module.weight))
    kinds = ParameterKinds([], [], [])
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in linears:
            kinds.hidden.append(p)
        elif p.ndim >= 2 and not name.endswith("bias"):
            kinds.tables.append(p)
        else:
            kinds.vectors.append(p)
    return kinds


def make_optimizers(model: nn.Module, cfg: TrainConfig, low: bool = False) -> list[t.optim.Optimizer]:
    """
    AdamW, and Muon for the hidden matrices. Weight decay pulls on every matrix, embeddings too, and on no vector, as in
    nanoGPT. low: bfloat16 is fast here.
    """
    kinds = kinds_of_parameters(model)
    groups = [
        {"params": kinds.tables, "lr": cfg.lr},
        {"params": kinds.vectors, "lr": cfg.lr, "weight_decay": 0.0},
    ]
    if cfg.optimizer == "adamw":
        groups.append({"params": kinds.hidden, "lr": cfg.adamw_lr})
    groups = [group for group in groups if group["params"]]
    optimizers: list[t.optim.Optimizer] = [
        t.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    ]
    if cfg.optimizer == "muon" and kinds.hidden:
        dtype = t.bfloat16 if low else t.float32
        optimizers.append(Muon(kinds.hidden, cfg.muon_lr, cfg.weight_decay, dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]  # what schedule takes a share of
    return optimizers


def schedule(step: int, cfg: TrainConfig) -> float:
    """Share of the peak learning rate at a step."""
    rise = min(1.0, (step + 1) / max(1, cfg.warmup * cfg.steps))
    if cfg.schedule == "cosine":
        return rise * (0.55 + 0.45 * math.cos(math.pi * step / cfg.steps))
    return rise * min(1.0, (cfg.steps - step) / max(1, cfg.decay * cfg.steps))


def set_learning_rates(optimizers: list[t.optim.Optimizer], step: int, cfg: TrainConfig) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule(step, cfg)


def context_at(step: int, cfg: TrainConfig) -> int:
    """The context length at a step."""
    begins = cfg.context_steps[: len(cfg.contexts) - 1]
    stage = sum(step >= share * cfg.steps for share in begins)
    return cfg.contexts[stage]


#%% Checkpoints: written aside, then renamed; refused where they do not fit
# settings that may differ between a run and its continuation
FREE = ("resume", "wandb", "save_every", "device", "compile", "fsdp", "activation_checkpointing")


def identity(cfg: TrainConfig, **more) -> dict:
    """
    What two runs must share for one to go on from the other's checkpoint: the training settings, and what the script
    adds (shape, data).
    """
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in FREE]
    return {**{name: getattr(cfg, name) for name in names}, **more}


def save_checkpoint(path: Path, run: dict, step: int, model: nn.Module, optimizers: list[dict], history: dict) -> bool:
    """False where the disk is full: the checkpoint before is kept, and training can go on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"run": run, "step": step, "model": model.state_dict(), "optimizers": optimizers, "history": history}
    try:
        write_aside(path, lambda aside: t.save(state, aside))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        print(f"{yellow}step {step}: {path} was not written, the one before is kept: {reason}{endc}")
        return False
    return True


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
        env.update(torchrun_variables(env))
    if int(env.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        if t.cuda.is_available():
            t.cuda.set_device(int(env["LOCAL_RANK"]) % t.cuda.device_count())
        dist.init_process_group(timeout=timedelta(hours=2))
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    return dist.get_rank(), dist.get_world_size()


def torchrun_variables(env: dict[str, str]) -> dict[str, str]:
    """What torchrun would set, from what srun set."""
    asked = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
    nodes = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(20000 + int(env["SLURM_JOB_ID"]) % 20000),
    }


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
    """
    This process's rows, and the weight of their mean that makes the mean over processes the mean over all rows. Without
    rows: one row of weight 0, so that nobody waits.
    """
    mine = rows[rank::size]
    if len(mine) == 0:
        return rows[:1], 0.0
    return mine, len(mine) * size / len(rows)


def agree(loss: float, stop: int, size: int) -> tuple[float, int]:
    """(mean loss, highest signal) of all processes."""
    if size == 1:
        return loss, stop
    mean_loss = t.tensor(loss / size, dtype=t.float64)
    highest = t.tensor(stop, dtype=t.float64)
    dist.all_reduce(mean_loss)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return mean_loss.item(), int(highest)


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

    def whole(x: object) -> object:
        return x.full_tensor().cpu() if hasattr(x, "full_tensor") else x

    return t.utils._pytree.tree_map(whole, optimizer.state_dict())


def load_state(optimizer: t.optim.Optimizer, saved: dict) -> None:
    """The way back: whole tensors are shared out as their parameters are."""
    from torch.distributed.tensor import distribute_tensor

    params = [p for group in optimizer.param_groups for p in group["params"]]

    def part(p: Tensor, x: object) -> object:
        if hasattr(p, "full_tensor") and x.shape == p.shape:
            return distribute_tensor(x.to(p.device), p.device_mesh, p.placements)
        return x

    state = {}
    for i, values in saved["state"].items():
        state[i] = {key: part(params[i], x) for key, x in values.items()}
    optimizer.load_state_dict({**saved, "state": state})


#%% Memory: what a run will need
def expected_memory(
    make_model: Callable[[], nn.Module],
    cfg: TrainConfig,
    device: str = "cuda",
    low: bool = True,
) -> dict[str, float]:
    """
    Gigabytes of one process at the peak of a step, from shapes alone (no such device is needed). low: bfloat16
    autocast. Not for models whose shapes depend on data (experts).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), t.device(device):
        model = make_model()
        optimizers = make_optimizers(model, cfg)
        if cfg.activation_checkpointing:
            recompute_blocks(model)
        kept = kept_for_backward(model, cfg, device, low)
        sizes = [x.untyped_storage().nbytes() for x in kept]
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        states = 0
        for optimizer in optimizers:
            moments = 1 if isinstance(optimizer, Muon) else 2
            for group in optimizer.param_groups:
                states += sum(moments * p.numel() * p.element_size() for p in group["params"])
    parts = {
        "parameters": weights,
        "gradients": weights,
        "optimizer": states,
        # the largest, the logits, has its gradient beside it, twice for a moment
        "activations": sum(sizes) + 2 * max(sizes),
    }
    parts["total"] = sum(parts.values())
    return {name: size / 1e9 for name, size in parts.items()}


def kept_for_backward(model: nn.Module, cfg: TrainConfig, device: str, low: bool) -> list[Tensor]:
    """The tensors, one per storage, that a forward pass of one micro-batch keeps, without the parameters."""
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage()._cdata] = x
        return x

    def unpack(x: Tensor) -> Tensor:
        return x

    context = max(cfg.contexts)
    rows = cfg.tokens_per_step // cfg.accumulate // context
    was_enabled = t.is_autocast_enabled(device)
    was_dtype = t.get_autocast_dtype(device)
    try:  # autocast() itself refuses a device that is not there
        t.set_autocast_enabled(device, low)
        t.set_autocast_dtype(device, t.bfloat16)
        with t.autograd.graph.saved_tensors_hooks(pack, unpack):
            language_loss(model, t.zeros(rows, context, dtype=t.long))
    finally:
        t.set_autocast_enabled(device, was_enabled)
        t.set_autocast_dtype(device, was_dtype)
    for p in model.parameters():
        saved.pop(p.untyped_storage()._cdata, None)
    return list(saved.values())


def recompute_blocks(model: nn.Module) -> None:
    """Keep no activations inside blocks: they are computed again in the backward pass."""
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


#%% Signals: preemption and time limits save at the end of a step; a Slurm job goes back to the queue
@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """
    The signals (Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2) that arrived inside the context, which are otherwise ignored there;
    a second Ctrl-C is not.
    """
    caught: list[int] = []
    if in_kernel() or threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def slurm_id() -> str | None:
    """Of the job this process runs in: 12, or 12_3 in an array."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def in_queue(job: str) -> str:
    """'PENDING (Priority)', 'RUNNING (None)' ...; nothing once it has left the queue."""
    if not shutil.which("squeue"):
        return ""
    command = ["squeue", "--noheader", "--array", "--jobs", job, "--format", "%T (%r)"]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return f"UNKNOWN ({asked.stderr.strip()})"
    return asked.stdout.strip()


def give_way(number: int, rank: int, at: str) -> NoReturn:
    """
    Ends the process once its checkpoint is written.
    A preempted job requeues itself, a cancelled one is no longer RUNNING and just ends.
    """
    job = slurm_id()
    requeue = rank == 0 and job is not None and in_queue(job).startswith("RUNNING")
    then = f"job {job} goes back to the queue" if requeue else "go on with --resume"
    print(f"{yellow}{signal.Signals(number).name}: saved {at}; {then}{endc}", flush=True)
    if requeue:
        subprocess.run(["scontrol", "requeue", job], check=True)
    raise SystemExit(128 + number if rank == 0 else 0)


#%% The loop
def language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats, averaged over all positions but the first."""
    return next_token_loss(model(tokens), tokens)


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
    Train in place. batch(i) gives micro-batch i and must depend on i alone, so that a resumed run sees the same data;
    several processes split its rows, over which loss_fn(model, rows) averages (split=False: each takes them all).
    watch(step) -> numbers to keep, every watch_every steps, on every process.
    Returns the history: step, tokens, loss, watch, seconds, tokens_per_second.
    The checkpoint is checkpoints/<name>.pt; fits: what else it must share with the run (data, model shape).
    """
    run = Run(model, cfg, name, fits)
    if cfg.steps == 0:
        run.look_untrained(batch, loss_fn, watch)
        return run.finish()
    bar = trange(run.first, cfg.steps, initial=run.first, total=cfg.steps, desc=name, disable=run.rank > 0, **BAR)
    with caught_signals() as caught:
        for step in bar:
            done = step + 1
            is_last = done == cfg.steps
            set_learning_rates(run.optimizers, step, cfg)
            try:
                loss = run.gradients(step, batch, loss_fn, tokens_per_batch, split)
                loss, stop = agree(loss, max(caught, default=0), run.size)
                run.update(step, loss)
            except (t.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                run.say_what_to_lower(step)
            run.note(done, loss)
            if watch and (done % watch_every == 0 or is_last):
                run.watch(done, watch)
            run.log(step, loss)
            if step % 10 == 0 or is_last:
                bar.set_description(f"{name} loss {cyan}{loss:.3f}{endc} nats {run.seen / 1e6:.2f}M tokens")
            saved = False
            if stop or (cfg.save_every and (is_last or done % cfg.save_every == 0)):
                saved = run.save(done)
            if stop:
                give_way(stop, run.rank, f"{run.path} at step {done} of {cfg.steps}" if saved else "nothing new")
    history = run.finish()
    if caught:  # during the last step, when no other would have looked
        os.kill(os.getpid(), max(caught))
    return history


class Run:
    """What changes over a training run: the model's working copy, optimizers, tokens seen, history, the clock."""

    def __init__(self, model: nn.Module, cfg: TrainConfig, name: str, fits: dict):
        self.model = model
        self.cfg = cfg
        self.rank, self.size = processes()
        self.device = pick_device(cfg.device)
        self.path = Path("checkpoints") / f"{name}.pt"
        self.identity = identity(cfg, **fits)
        if cfg.fsdp and self.size == 1:
            fail(
                "--fsdp shares a model out over several processes: start them by torchrun --nproc-per-node N, or "
                "--slurm --slurm-gpus N"
            )
        self.home = "cpu" if cfg.fsdp else self.device  # where the whole model stands between steps
        model.to(self.home).train()
        if self.device == "cpu":
            keep_freed_memory()
        self.low = cfg.autocast == "on" or (cfg.autocast == "auto" and bf16_is_faster(self.device))
        state = self.resume() if cfg.resume else None
        self.history: dict = {"step": [], "tokens": [], "loss": [], "watch": [], "seconds": 0.0}
        self.first = 0
        if state:
            self.history = state["history"]
            self.first = state["step"]
        self.make_working_copy()
        self.optimizers = make_optimizers(self.work, cfg, self.low)
        if state:
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                load_state(optimizer, saved)
        self.board = start_wandb(name, self.identity) if cfg.wandb and self.rank == 0 else None
        self.seen = self.history["tokens"][-1] if self.history["tokens"] else 0  # tokens
        self.start = time.perf_counter() - self.history["seconds"]

    def resume(self) -> dict | None:
        """The state of the checkpoint, whose weights the model takes; None where there is none yet."""
        if not self.path.exists():
            print(f"{yellow}--resume: no checkpoint {self.path} yet, starting from step 0{endc}")
            return None
        state = load_checkpoint(self.path, self.identity)
        self.model.load_state_dict(state["model"])
        print(f"{gray}resumed {self.path} at step {state['step']} of {self.cfg.steps}{endc}")
        return state

    def make_working_copy(self) -> None:
        """work: whose parameters are optimized; ddp: what shares gradients; forward: what computes."""
        self.work = sharded(self.model) if self.cfg.fsdp else self.model
        if self.cfg.activation_checkpointing:
            recompute_blocks(self.work)
        self.ddp = self.work
        if self.size > 1 and not self.cfg.fsdp:
            self.ddp = nn.parallel.DistributedDataParallel(self.work, find_unused_parameters=True)
        self.forward = t.compile(self.ddp) if self.cfg.compile else self.ddp

    def gradients(
        self,
        step: int,
        batch: Callable[[int], Tensor],
        loss_fn: Callable,
        tokens_per_batch: int | None,
        split: bool,
    ) -> float:
        """Gradients of all micro-batches of a step; the loss of this process's rows."""
        total = 0.0
        for micro in range(self.cfg.accumulate):
            tokens = batch(step * self.cfg.accumulate + micro)
            self.seen += tokens_per_batch or tokens.numel()
            weight = 1.0
            if split:
                tokens, weight = share_of(tokens, self.rank, self.size)
            self.tokens_at_once = tokens.numel()
            waits = self.ddp is not self.work and micro + 1 < self.cfg.accumulate  # for the last micro-batch
            with self.ddp.no_sync() if waits else contextlib.nullcontext():
                with t.autocast(self.device.split(":")[0], t.bfloat16, enabled=self.low):
                    loss = loss_fn(self.forward, tokens.to(self.device)) * weight / self.cfg.accumulate
                loss.backward()
            total += loss.item()
        return total

    @t.no_grad()
    def look_untrained(self, batch: Callable[[int], Tensor], loss_fn: Callable, watch: Callable | None) -> None:
        """The history of no step: the loss of the first batch, and what is watched."""
        self.note(0, loss_fn(self.forward, batch(0).to(self.device)).item())
        if watch:
            self.watch(0, watch)

    def refuse_not_finite(self) -> None:
        """The last step may break what the loss before it could not show. Of fsdp's shards once they are collected."""
        for name, p in self.model.named_parameters():
            if not p.isfinite().all():
                fail(f"the weights are NaN or infinite after training ({name}): lower --lr and --muon-lr")

    def update(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            fail(f"the loss is {loss} at step {step}: lower --lr and --muon-lr")
        if self.cfg.clip:
            nn.utils.clip_grad_norm_(self.work.parameters(), self.cfg.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def say_what_to_lower(self, step: int) -> NoReturn:
        fail(
            f"out of memory at step {step} with {self.tokens_at_once} tokens at once: raise --accumulate "
            f"({self.cfg.accumulate}), lower --tokens-per-step ({self.cfg.tokens_per_step}) or --contexts, or set "
            f"--activation-checkpointing{' or --fsdp' * (self.size > 1)}"
        )

    def note(self, done: int, loss: float) -> None:
        self.history["step"].append(done)
        self.history["tokens"].append(self.seen)
        self.history["loss"].append(loss)

    def watch(self, done: int, watch: Callable[[int], dict]) -> None:
        if self.cfg.fsdp:
            collect(self.model.to(self.device), self.work)
        self.model.eval()
        numbers = watch(done)
        kinds = {type(value) for value in numbers.values()}
        assert kinds <= {int, float}, "watch returns Python numbers: they go into the checkpoint"
        self.history["watch"].append({"step": done, "tokens": self.seen, **numbers})
        self.model.to(self.home).train()

    def log(self, step: int, loss: float) -> None:
        if not self.board:
            return
        seen = self.history["watch"][-1] if self.history["watch"] else {}
        watched = {name: value for name, value in seen.items() if isinstance(value, float)}
        self.board.log({"loss": loss, "tokens": self.seen, **watched}, step=step)

    def save(self, done: int) -> bool:
        """Whether the checkpoint stands; the first process writes it."""
        self.history["seconds"] = time.perf_counter() - self.start
        if self.cfg.fsdp:
            collect(self.model, self.work)
        self.refuse_not_finite()
        states = [whole_state(optimizer) for optimizer in self.optimizers]
        if self.rank > 0:
            return True
        return save_checkpoint(self.path, self.identity, done, self.model, states, self.history)

    def finish(self) -> dict:
        """The model whole and in eval mode; the history."""
        self.history["seconds"] = time.perf_counter() - self.start
        if self.cfg.fsdp:
            collect(self.model.to(self.device), self.work)
        self.refuse_not_finite()
        if self.cfg.activation_checkpointing and not self.cfg.fsdp:
            for block in self.model.blocks:
                del block.forward  # of recompute_blocks
        tec()
        self.model.eval()
        return {**self.history, "tokens_per_second": self.seen / self.history["seconds"]}


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


#%% Batches of a corpus, some of whose rows say a snippet twice
def repeat_batches(corpus, cfg: TrainConfig) -> Callable[[int], Tensor]:
    """
    i -> micro-batch i, of which a share of cfg.repeats rows say a snippet twice: two thirds natural, one third in
    shuffled order.
    """
    weights = None
    if set(corpus.train) == {"code", "english"}:
        weights = {"code": 1 - cfg.english, "english": cfg.english}

    def batch(i: int) -> Tensor:
        context = context_at(i // cfg.accumulate, cfg)
        return corpus.batch(
            np.random.default_rng((cfg.seed, i)),
            cfg.tokens_per_step // cfg.accumulate // context,
            context,
            cfg.repeats * 2 / 3,
            cfg.repeats / 3,
            weights,
        )

    return batch
