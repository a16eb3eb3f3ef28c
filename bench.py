"""
How fast is all this beside what people use?
Training, patching and the lens, each side by side with its peer, in one run.
"""

import contextlib
import io
import itertools
import json
import math
import re
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from utils import (  # first: sets OpenMP's variables before torch is loaded
    BAR,
    ROOT,
    WORLD,
    Natural,
    Positive,
    cyan,
    endc,
    fail,
    finite,
    gray,
    green,
    load_model,
    pick_device,
    purple,
    save_results,
    set_seed,
    versions,
    write_aside,
)
from logit_attribution import layer_streams
from data import Corpus, load_corpus
from hooks import hooks, peak_bytes, run_with_cache
from pairs import Pairs, draw_pairs, make_metric
from interventions import sweep
from launch import flags
from layers import next_token_loss
from lens import Lens, read
from llama_block import Llama, LlamaConfig
from tiny_transformer import TinyConfig, TinyTransformer
from train import TrainConfig, keep_freed_memory, train
from weights import Streamed

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from tabulate import tabulate
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

PARTS = ("training", "scratch", "patching", "lens", "streaming")


def now() -> float:
    """Seconds of a clock, once the card has done what it was given."""
    if t.cuda.is_available():
        t.cuda.synchronize()
    return time.perf_counter()


#%% Training: hooks cost nothing when nobody listens
def training_seconds(forward: Callable[[Tensor], Tensor], model: nn.Module, tokens: Tensor) -> float:
    """Of one forward pass, loss and backward pass."""
    start = now()
    next_token_loss(forward(tokens), tokens).backward()
    seconds = now() - start
    model.zero_grad()
    return seconds


def bench_against_hf(ours: nn.Module, theirs: nn.Module, tokens: Tensor, pairs: int = 7) -> float:
    """Hugging Face's time / ours, median over interleaved pairs whose order alternates: above 1 ours is faster."""
    ours.train()
    theirs.train()

    def time_ours() -> float:
        return training_seconds(ours, ours, tokens)

    def time_theirs() -> float:
        return training_seconds(lambda x: theirs(x, use_cache=False).logits, theirs, tokens)

    for _ in range(2):  # warm
        time_ours()
        time_theirs()
    ratios = []
    for i in range(pairs):
        if i % 2:
            mine = time_ours()
            other = time_theirs()
        else:
            other = time_theirs()
            mine = time_ours()
        ratios.append(other / mine)
    return sorted(ratios)[pairs // 2]


def bench_training_gpt2(shape: TinyConfig, rows: int, device: str, compiled: bool = False) -> float:
    """tiny_transformer.py against GPT2LMHeadModel, rows of shape.n_ctx tokens; both compiled, or neither."""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2Config(
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_embd=shape.d_model,
        n_inner=shape.d_mlp,
        n_positions=shape.n_ctx,
        vocab_size=shape.d_vocab,
        tie_word_embeddings=shape.tied,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    tokens = t.randint(shape.d_vocab, (rows, shape.n_ctx), device=device)
    models = [TinyTransformer(shape).to(device), GPT2LMHeadModel(theirs).to(device)]
    if compiled:
        for model in models:
            model.compile()
    return bench_against_hf(*models, tokens)


def bench_training_llama(
    sizes: dict[str, int], d_vocab: int, rows: int, n_pos: int, device: str, compiled: bool = False
) -> float:
    """llama_block.py against LlamaForCausalLM with its default attention, from the same weights."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    config = HFConfig(vocab_size=d_vocab, **sizes)
    source = LlamaForCausalLM(config).to(device)
    theirs = LlamaForCausalLM(config).to(device)
    tokens = t.randint(d_vocab, (rows, n_pos), device=device)
    models = [Llama.from_hf(source).to(device), theirs]
    if compiled:
        for model in models:
            model.compile()
    return bench_against_hf(*models, tokens)


#%% Training from scratch: nanoGPT's model and loop, written down plainly, on the rows that ours trains on
class PlainAttention(nn.Module):
    def __init__(self, shape: TinyConfig):
        super().__init__()
        self.n_heads = shape.n_heads
        self.qkv = nn.Linear(shape.d_model, 3 * shape.d_model)
        self.out = nn.Linear(shape.d_model, shape.d_model)

    def forward(self, x: Tensor) -> Tensor:
        by_head = "batch pos (part head d_head) -> part batch head pos d_head"
        q, k, v = rearrange(self.qkv(x), by_head, part=3, head=self.n_heads)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(z, "batch head pos d_head -> batch pos (head d_head)"))


class PlainBlock(nn.Module):
    def __init__(self, shape: TinyConfig):
        super().__init__()
        self.ln1 = nn.LayerNorm(shape.d_model)
        self.attn = PlainAttention(shape)
        self.ln2 = nn.LayerNorm(shape.d_model)
        self.inp = nn.Linear(shape.d_model, shape.d_mlp)
        self.out = nn.Linear(shape.d_mlp, shape.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.out(F.gelu(self.inp(self.ln2(x))))


class PlainGPT(nn.Module):
    """GPT-2's shape and initialisation, as nanoGPT's model.py, with exact GELU."""

    def __init__(self, shape: TinyConfig):
        super().__init__()
        self.embed = nn.Embedding(shape.d_vocab, shape.d_model)
        self.positions = nn.Embedding(shape.n_ctx, shape.d_model)
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape.n_layers))
        self.ln_final = nn.LayerNorm(shape.d_model)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes_into_the_stream = name.endswith("out.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * shape.n_layers) if writes_into_the_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        place = t.arange(tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) + self.positions(place)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln_final(x), self.embed.weight)


def train_plainly(model: nn.Module, rows: Callable[[int], Tensor], steps: int, peak_lr: float) -> None:
    """nanoGPT's train.py: AdamW whose decay spares vectors, clipping, warm-up, then a cosine to a tenth of peak_lr."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = t.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95))
    warm_up = steps // 10
    for step in range(steps):
        turn = math.pi * (step - warm_up) / (steps - warm_up)
        lr = peak_lr * min((step + 1) / (warm_up + 1), 0.55 + 0.45 * math.cos(max(0.0, turn)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens = rows(step)  # one more than the model reads
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            loss.item()  # what it would print


@t.no_grad()
def heldout_loss(model: nn.Module, corpus: Corpus, n_ctx: int) -> float:
    rows = corpus.rows(np.random.default_rng(12345), 256, n_ctx, "heldout")
    parts = t.from_numpy(rows).split(64)
    return float(np.mean([next_token_loss(model(part), part).item() for part in parts]))


def bench_from_scratch(steps: int = 60, rows: int = 32, seeds: tuple[int, ...] = (0, 1)) -> dict[str, dict[str, float]]:
    """
    {"tokens_per_cpu_second": {who: number}, "loss_from_scratch": {who: number}} of nanoGPT's loop, and of train() with
    AdamW alone and with Muon, after equal tokens of equal rows, in turns, on the CPU in float32: means over seeds. The
    loss, in nats, is of held-out text.
    """
    keep_freed_memory()
    corpus = load_corpus("stdlib", 512)
    shape = TinyConfig(n_layers=2, n_heads=4, d_model=128, d_mlp=512, n_ctx=64, d_vocab=corpus.d_vocab, act="gelu")

    def rows_of(n_tokens: int, seed: int) -> Callable[[int], Tensor]:
        def batch(i: int) -> Tensor:
            return t.from_numpy(corpus.rows(np.random.default_rng((seed, i)), rows, n_tokens))

        return batch

    def nanogpt(seed: int, steps: int) -> nn.Module:
        model = PlainGPT(shape)
        train_plainly(model, rows_of(shape.n_ctx + 1, seed), steps, peak_lr=1e-3)  # its own for small models
        return model

    def ours(seed: int, steps: int, optimizer: str) -> nn.Module:
        model = TinyTransformer(shape)
        model.init_weights(as_gpt2=True)
        cfg = TrainConfig(steps=steps, optimizer=optimizer, lr=1e-2, autocast="off", save_every=0, device="cpu")
        train(model, rows_of(shape.n_ctx, seed), cfg, f"{optimizer}, seed {seed}")
        return model

    racers = {
        "nanoGPT": nanogpt,
        "ours, AdamW": partial(ours, optimizer="adamw"),
        "ours, Muon": partial(ours, optimizer="muon"),
    }
    for racer in racers.values():
        racer(seed=0, steps=2)  # all are warm
    speeds: dict[str, list[float]] = {who: [] for who in racers}
    losses: dict[str, list[float]] = {who: [] for who in racers}
    for seed, who in itertools.product(seeds, racers):
        set_seed(seed)
        start = time.process_time()
        model = racers[who](seed, steps)
        speeds[who].append(steps * rows * shape.n_ctx / (time.process_time() - start))
        losses[who].append(heldout_loss(model.eval(), corpus, shape.n_ctx))
    return {
        "tokens_per_cpu_second": {who: float(np.mean(found)) for who, found in speeds.items()},
        "loss_from_scratch": {who: float(np.mean(found)) for who, found in losses.items()},
    }


#%% Patching: the sweeps of transformer_lens.patching, on the same prompts, with the same numbers
@dataclass
class PatchingRace:
    """One sweep by both: seconds of the medians, their ratio, and the largest difference of what they found."""

    theirs: float
    ours: float
    speedup: float
    gap: float


def race_patching(
    ours: nn.Module,
    bridge: nn.Module,
    pairs: Pairs,
    site: str,
    by: str,
    their_sweep: Callable,
    rounds: int,
    memory_gb: float,
) -> PatchingRace:
    """
    Runs interleaved; the clean run's cache, which both need, counts for both.
    ours: a model of ours, or the bridge.
    """
    metric_fn = make_metric(pairs, "logit_diff")

    def their_metric(logits: Tensor) -> Tensor:
        return metric_fn(logits[:, -1], pairs.index).mean()

    sweep(ours, pairs, site, by)  # both are warm
    bridge.run_with_cache(pairs.clean)
    seconds = []
    gaps = []
    for _ in range(rounds):
        start = now()
        with t.no_grad():
            _, clean_cache = bridge.run_with_cache(pairs.clean)
            reference = their_sweep(bridge, pairs.corrupt, clean_cache, their_metric)
        middle = now()
        mine = sweep(ours, pairs, site, by, memory_gb=memory_gb).mean(-1)
        seconds.append((middle - start, now() - middle))
        gaps.append((mine - reference).abs().max().item())
    theirs_median, ours_median = np.median(seconds, axis=0)
    speedup = float(np.median([slow / fast for slow, fast in seconds]))
    return PatchingRace(float(theirs_median), float(ours_median), speedup, max(gaps))


def open_racers(device: str) -> dict[str, tuple[nn.Module, nn.Module]]:
    """
    {name: (what our sweep runs on, the bridge that theirs runs on)}.
    GPT-2-small's shape at random, and models/world.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    hf = GPT2LMHeadModel(GPT2Config())
    gpt2 = build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=hf.config).to(device)
    world = load_model(str(WORLD), (Llama,), device)
    with contextlib.redirect_stdout(io.StringIO()):  # it says where the model moves
        world_bridge = TransformerBridge.boot_transformers(str(WORLD), device=device)
    for model in (gpt2, world, world_bridge):
        model.eval().requires_grad_(False)
    return {"gpt2": (gpt2, gpt2), "world": (world, world_bridge)}


def bench_patching(device: str, seed: int, memory_gb: float) -> dict:
    from transformer_lens import patching as theirs

    keep_freed_memory()
    racers = open_racers(device)
    world, _ = racers["world"]
    pool = draw_pairs(world, "ioi", 1000, seed)
    same_length = pool.take((pool.answer_pos == 14).nonzero()[:, 0])
    sweeps = (
        ("resid_pre", "resid_pre", "pos", theirs.get_act_patch_resid_pre),
        ("head", "z", "head", theirs.get_act_patch_attn_head_out_all_pos),
    )
    numbers: dict = {"max_abs_diff": 0.0}
    for name, n_pairs in itertools.product(racers, (1, 32)):
        pairs = same_length.take(slice(0, n_pairs))
        for title, site, by, their_sweep in sweeps:
            race = race_patching(
                *racers[name],
                pairs=pairs,
                site=site,
                by=by,
                their_sweep=their_sweep,
                rounds=3 if n_pairs == 1 else 1,
                memory_gb=memory_gb,
            )
            suffix = "" if n_pairs == 1 else f"_{n_pairs}_pairs"
            numbers[f"{title}_speedup_{name}{suffix}"] = race.speedup
            numbers["max_abs_diff"] = max(numbers["max_abs_diff"], race.gap)
            print(
                f"{cyan}{name}, {n_pairs} IOI pair{'s' * (n_pairs > 1)} of 15 tokens, {title} sweep: "
                f"{race.theirs:.3f} s by transformer_lens, {race.ours:.3f} s here: "
                f"{race.speedup:.1f} times as fast; largest difference {race.gap:.0e}{endc}"
            )
    numbers["peak_gigabytes"] = peaks_of_patching(world, pool, memory_gb)
    return numbers


def peaks_of_patching(world: nn.Module, pool: Pairs, memory_gb: float) -> dict[int, float]:
    """{pairs: largest memory of tensors in GB}, which stays under the cap however many the pairs."""
    peaks = {}
    for n_pairs in (32, 128, 512):
        pairs = pool.take(slice(0, n_pairs))
        peaks[n_pairs] = peak_bytes(lambda pairs=pairs: sweep(world, pairs, "z", "head", memory_gb=memory_gb)) / 2**30
    said = ", ".join(f"{n_pairs} pairs {peak:.2f} GB" for n_pairs, peak in peaks.items())
    print(f"{cyan}world, head sweep, largest memory of tensors under the cap of {memory_gb:g} GB: {said}{endc}")
    assert max(peaks.values()) < memory_gb, "a sweep went over its cap on memory"
    return peaks


#%% The lens: time and memory against the plain forward pass, its arithmetic floor, and keeping everything
@t.no_grad()
def bench_lens(rounds: int = 5) -> dict:
    """
    GPT-2-small's shape with random weights on the CPU, 8 x 64 tokens: medians over interleaved rounds of CPU seconds on
    one thread (waiting threads would count). The floor is the forward pass and one norm and unembedding for each layer
    but the last.
    """
    keep_freed_memory()
    threads = t.get_num_threads()
    t.set_num_threads(1)
    shape = TinyConfig(n_layers=12, n_heads=12, d_model=768, d_mlp=3072, d_vocab=50257, n_ctx=64)
    model = TinyTransformer(shape).eval()
    lens = Lens(model)
    tokens = t.randint(50257, (8, 64))
    rows = tokens.tolist()
    answers = tokens.roll(-1, 1).flatten().tolist()
    places = list(itertools.product(range(8), range(64)))

    def forward() -> None:
        model(tokens)

    def floor() -> None:
        def lens_here(x: Tensor, hook: nn.Module) -> None:
            lens(x)

        with hooks(model, [(layer_streams(model)[:-1], lens_here)]):
            model(tokens)

    def answer_position() -> None:
        read(model, lens, rows, places[63::64], answers[63::64], against_final=False)

    def all_positions() -> None:
        read(model, lens, rows, places, answers, against_final=False)

    def all_measures() -> None:
        read(model, lens, rows, places, answers)

    def everything() -> list:
        _, cache = run_with_cache(model, tokens)
        return [lens(cache[name]) for name in layer_streams(model)]

    timed = {"forward": forward, "answer": answer_position, "floor": floor, "all": all_positions}
    measured = {**timed, "all with KL, entropy": all_measures, "everything": everything}
    peak = {name: peak_bytes(run) for name, run in measured.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _, name in tqdm(list(itertools.product(range(rounds), timed)), desc="bench", **BAR):
        start = time.process_time()
        timed[name]()
        seconds[name].append(time.process_time() - start)
    t.set_num_threads(threads)

    table = [[name, np.median(seconds[name]) if name in seconds else None, peak[name] / 1e6] for name in measured]
    print(tabulate(table, headers=["GPT-2-small's shape, 8 x 64", "CPU seconds", "peak MB"], floatfmt=".3f"))

    def ratio(a: str, b: str) -> float:
        return float(np.median(np.divide(seconds[a], seconds[b])))

    def extra(name: str) -> float:
        return max(0, peak[name] - peak["forward"])

    return {
        "time_vs_forward": ratio("answer", "forward"),
        "time_all_positions_vs_floor": ratio("all", "floor"),
        "memory_vs_cache_everything": extra("all") / extra("everything"),
        "peak_megabytes": {name: size / 1e6 for name, size in peak.items()},
    }


#%% Streaming: a model on disk is read block by block, with the same numbers and a share of the memory
def anonymous_memory() -> int:
    """Bytes of this process that are not mapped files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


class MemoryWatch:
    """How far anonymous memory grew at most since this was made, sampled every 5 ms until stop() is called."""

    def __init__(self):
        self.before = anonymous_memory()
        self.peak = self.before
        self.done = threading.Event()
        threading.Thread(target=self.sample, daemon=True).start()

    def sample(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, anonymous_memory())

    def stop(self) -> int:
        self.done.set()
        return self.peak - self.before


def lens_and_growth(folder: str, resident: float) -> tuple[dict[str, list], int]:
    """The lens on fixed tokens, and by how much anonymous memory grew at most over the moment before loading."""
    from transformers import AutoModelForCausalLM  # noqa: F401  its import is not the model's memory

    watch = MemoryWatch()
    model = Streamed(folder, "cpu", t.bfloat16, resident)
    if resident:
        for p in model.hf.parameters():
            p.data = p.data.clone()  # out of the mapped file
    row = list(range(32))
    found = read(model, Lens(model), [row], [(0, i) for i in row], row)
    growth = watch.stop()
    return {name: x.tolist() for name, x in found.items()}, growth


def write_random_llama(folder: Path, gigabytes: float) -> int:
    """A random Llama of that size in bfloat16; the bytes of its file."""
    shape = LlamaConfig(
        n_layers=max(2, round(gigabytes * 1e9 / 2 / 51.4e6)),
        n_heads=16,
        n_kv_heads=16,
        d_model=2048,
        d_head=128,
        d_mlp=5632,
        d_vocab=3072,
        n_ctx=256,
    )
    t.set_default_dtype(t.bfloat16)
    Llama(shape, Tokenizer.from_file(str(WORLD / "tokenizer.json"))).to_hf(folder)
    t.set_default_dtype(t.float32)
    return (folder / "model.safetensors").stat().st_size


def bench_streaming(gigabytes: float) -> dict[str, float]:
    """A random Llama on disk, read with every block on disk and with all of them in memory, each in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_random_llama(Path(folder), gigabytes)
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            streamed, growth = pool.submit(lens_and_growth, folder, 0.0).result()
            whole, growth_whole = pool.submit(lens_and_growth, folder, 1.0).result()
    print(
        f"{cyan}a Llama of {size / 1e9:.2f} GB on disk: anonymous memory grows by {growth / 1e9:.2f} GB streamed, "
        f"{growth_whole / 1e9:.2f} GB in memory{endc}"
    )
    assert streamed == whole, "streaming changed the numbers of the lens"
    return {
        "streaming_peak_over_checkpoint": growth / size,
        "in_memory_peak_over_checkpoint": growth_whole / size,
        "checkpoint_gigabytes": size / 1e9,
    }


#%% On a GPU: what no CPU can say. Presets, half precision, compiled training, a model larger than the card's memory
PRESETS = {  # gigabytes that train.expected_memory says of a step of --hpc, as the README's table has them
    "attn_only": 10.5,
    "tiny_transformer": 20,
    "llama_block": 26,
    "moe": 19,
    "mamba": 8.4,
}
STORIES = (
    "zero_layer attn_only tiny_transformer llama_block moe mamba logit_lens reversal patching circuits readers das"
).split()


def peak_gigabytes() -> float:
    return t.cuda.max_memory_allocated() / 1e9 if t.cuda.is_available() else 0.0


def run_story(script: str, args: list[str]) -> tuple[float, float]:
    """(seconds, peak gigabytes on the card) of a script, in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        sys.argv = [str(ROOT / f"{script}.py"), *args]
        start = now()
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{script}.py ended with: {end.code}") from None
        return now() - start, peak_gigabytes()


def in_own_process(script: str, args: list[str]) -> tuple[float, float]:
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        return pool.submit(run_story, script, args).result()


def gpu_patching(device: str, dtypes: tuple[str, ...] = ("float32", "bfloat16"), seed: int = 0) -> dict[str, float]:
    """{sweep, dtype, pairs: times as fast as transformer_lens.patching}, GPT-2-small's shape with random weights."""
    from transformer_lens import patching as theirs

    bridge, _ = open_racers(device)["gpt2"]
    pool = draw_pairs(load_model(str(WORLD), (Llama,), device), "ioi", 1000, seed)
    same_length = pool.take((pool.answer_pos == 14).nonzero()[:, 0])
    sweeps = (
        ("resid_pre", "resid_pre", "pos", theirs.get_act_patch_resid_pre),
        ("heads", "z", "head", theirs.get_act_patch_attn_head_out_all_pos),
    )
    speedups = {}
    for dtype, n_pairs, (title, site, by, their_sweep) in itertools.product(dtypes, (1, 32), sweeps):
        model = bridge.to(getattr(t, dtype))
        pairs = same_length.take(slice(0, n_pairs))
        race = race_patching(
            model, model, pairs=pairs, site=site, by=by, their_sweep=their_sweep, rounds=2, memory_gb=8.0
        )
        speedups[f"{title}, {dtype}, {n_pairs} pairs"] = race.speedup
    return speedups


def gpu_lens(device: str, rows: int = 32, n_pos: int = 256, rounds: int = 5) -> float:
    """Time of the lens at every layer and position / that of a forward pass, GPT-2-small's shape with random weights."""
    shape = TinyConfig(n_layers=12, n_heads=12, d_model=768, d_mlp=3072, d_vocab=50257, n_ctx=n_pos)
    model = TinyTransformer(shape).to(device).eval()
    lens = Lens(model)
    tokens = t.randint(50257, (rows, n_pos), device=device)
    places = list(itertools.product(range(rows), range(n_pos)))
    answers = tokens.roll(-1, 1).flatten().tolist()
    ratios = []
    for _ in range(rounds):
        start = now()
        with t.no_grad():
            model(tokens)
        middle = now()
        read(model, lens, tokens.tolist(), places, answers, against_final=False)
        ratios.append((now() - middle) / (middle - start))
    return float(np.median(ratios))


def gpu_streaming(device: str, gigabytes: float, card_gigabytes: float) -> dict[str, float]:
    """A random Llama of that size on disk through the lens, on a card that may use only so much memory."""
    if t.cuda.is_available():
        whole = t.cuda.get_device_properties(0).total_memory / 1e9
        t.cuda.set_per_process_memory_fraction(min(1.0, card_gigabytes / whole))
        t.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        size = write_random_llama(Path(folder), gigabytes) / 1e9
        start = now()
        model = Streamed(folder, device, t.bfloat16, resident=0.5 * card_gigabytes / size)
        row = list(range(32))
        read(model, Lens(model), [row], [(0, i) for i in row], row)
        return {"checkpoint_gigabytes": size, "peak_gigabytes": peak_gigabytes(), "seconds": now() - start}


def bench_gpu() -> dict:
    """All of it, on a card; each part is printed as it is measured."""
    device = "cuda"
    numbers: dict = {"card": t.cuda.get_device_name(0), "versions": versions()}
    gpt2 = TinyConfig(n_layers=12, n_heads=12, d_model=768, d_mlp=3072, n_ctx=512, d_vocab=50257)
    llama = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    numbers["training_vs_hf"] = {}
    for compiled in (False, True):
        kind = "compiled" if compiled else "eager"
        numbers["training_vs_hf"][f"GPT-2, {kind}"] = bench_training_gpt2(gpt2, 8, device, compiled)
        numbers["training_vs_hf"][f"Llama, {kind}"] = bench_training_llama(llama, 32000, 8, 512, device, compiled)
    print(f"{cyan}training / Hugging Face's: {numbers['training_vs_hf']}{endc}")
    numbers["patching_vs_transformer_lens"] = gpu_patching(device)
    print(f"{cyan}patching / TransformerLens's: {numbers['patching_vs_transformer_lens']}{endc}")
    numbers["lens_vs_forward"] = gpu_lens(device)
    print(f"{cyan}the lens at all positions / a forward pass: {numbers['lens_vs_forward']:.2f}{endc}")
    numbers["stories"] = {}
    for script in STORIES:
        seconds, peak = in_own_process(script, [])
        numbers["stories"][script] = {"seconds": seconds, "peak_gigabytes": peak}
        print(f"{cyan}{script}.py: {seconds:.0f} s, {peak:.2f} GB{endc}")
    numbers["presets"] = {}
    for script, expected in PRESETS.items():
        _, peak = in_own_process(script, ["--hpc", "--steps", "3", "--data", "stdlib", "--save-every", "0"])
        numbers["presets"][script] = {"peak_gigabytes": peak, "expected_gigabytes": expected}
        print(f"{cyan}{script}.py --hpc: {peak:.1f} GB, expected {expected} GB{endc}")
    numbers["streaming"] = gpu_streaming(device, gigabytes=16.0, card_gigabytes=12.0)
    print(f"{cyan}a model of 16 GB on a card that may use 12: {numbers['streaming']}{endc}")
    return numbers


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    # measure on a CUDA card instead (meant for ten minutes; not yet run on one): training, patching, the lens, the default stories, the presets'
    # memory, a model larger than 12 GB; written to docs/results/gpu.json
    gpu: bool = False
    only: tuple[Literal["training", "scratch", "patching", "lens", "streaming"], ...] = PARTS  # what to measure
    memory_gb: Positive = 1.0  # cap on the activations of a patching sweep
    gigabytes: Positive = 2.0  # size of the random checkpoint that is streamed
    wandb: bool = False  # numbers and figures go to Weights & Biases too
    seed: Natural = 0  # of every draw
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


if __name__ == "__main__":
    cfg = flags(Config, __doc__)
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    numbers: dict = {}

#%% On a card, if asked for: and that is all
if __name__ == "__main__" and cfg.gpu:
    if not t.cuda.is_available():
        fail("--gpu: torch sees no CUDA card here, so nothing was measured; without --gpu all runs on the CPU")
    path = ROOT / "docs/results/gpu.json"
    text = json.dumps(finite(bench_gpu()), indent=1)
    write_aside(path, lambda aside: aside.write_text(text + "\n"))
    print(f"{gray}numbers: {path.relative_to(ROOT)}{endc}")
    print(f"{green}What a card says is in {path.name}; the README's tables have what CPUs say.{endc}")
    raise SystemExit

#%% Training against Hugging Face's GPT-2 and Llama: 6 layers of width 512, and the scripts' own shapes
if __name__ == "__main__" and "training" in cfg.only:
    print(
        f"{purple}=== Training speed / Hugging Face's (median of 7 interleaved pairs, above 1 ours is faster) ==={endc}"
    )
    keep_freed_memory()
    wide_gpt2 = TinyConfig(n_layers=6, n_heads=8, d_model=512, d_mlp=2048, n_ctx=128, d_vocab=512)
    small_gpt2 = TinyConfig(n_layers=2, n_heads=4, d_model=128, d_mlp=512, n_ctx=64, d_vocab=512)
    wide_llama = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
    }
    small_llama = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    numbers |= {
        "throughput_vs_hf_gpt2": bench_training_gpt2(wide_gpt2, rows=8, device=device),
        "throughput_vs_hf_gpt2_small": bench_training_gpt2(small_gpt2, rows=64, device=device),
        "throughput_vs_hf_llama": bench_training_llama(wide_llama, d_vocab=3072, rows=8, n_pos=128, device=device),
        "throughput_vs_hf_llama_small": bench_training_llama(
            small_llama, d_vocab=3072, rows=64, n_pos=64, device=device
        ),
    }
    for name in ("gpt2", "gpt2_small", "llama", "llama_small"):
        print(f"{cyan}{name}: {numbers[f'throughput_vs_hf_{name}']:.2f}{endc}")

#%% Training from scratch against nanoGPT's loop: speed, and the loss after equal tokens
if __name__ == "__main__" and "scratch" in cfg.only:
    print(f"{purple}=== From scratch beside nanoGPT's loop: the shape and the rows of tiny_transformer.py ==={endc}")
    numbers |= bench_from_scratch()
    for who, speed in numbers["tokens_per_cpu_second"].items():
        times = speed / numbers["tokens_per_cpu_second"]["nanoGPT"]
        loss = numbers["loss_from_scratch"][who]
        print(f"{cyan}{who}: {speed:,.0f} tokens per CPU second ({times:.2f} of nanoGPT's), loss {loss:.3f} nats{endc}")

#%% Patching against transformer_lens.patching
if __name__ == "__main__" and "patching" in cfg.only:
    print(f"{purple}=== Patching ==={endc}")
    numbers |= bench_patching(device, cfg.seed, cfg.memory_gb)

#%% The lens against the forward pass and its floor
if __name__ == "__main__" and "lens" in cfg.only:
    print(f"{purple}=== The lens ==={endc}")
    numbers |= bench_lens()

#%% A model on disk against the same model in memory
if __name__ == "__main__" and "streaming" in cfg.only:
    print(f"{purple}=== Streaming ==={endc}")
    numbers |= bench_streaming(cfg.gigabytes)

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    save_results("bench", cfg, **numbers)
    said = []
    if "training" in cfg.only:
        gpt2, llama = numbers["throughput_vs_hf_gpt2"], numbers["throughput_vs_hf_llama"]
        said.append(f"Training runs at {gpt2:.2f} (GPT-2) and {llama:.2f} (Llama) of Hugging Face's speed.")
    if "scratch" in cfg.only:
        speed, loss = numbers["tokens_per_cpu_second"], numbers["loss_from_scratch"]
        said.append(
            f"From scratch AdamW alone runs at {speed['ours, AdamW'] / speed['nanoGPT']:.2f} and Muon at "
            f"{speed['ours, Muon'] / speed['nanoGPT']:.2f} of nanoGPT's speed, to {loss['ours, AdamW']:.2f} and "
            f"{loss['ours, Muon']:.2f} nats against {loss['nanoGPT']:.2f} after equal tokens."
        )
    if "patching" in cfg.only:
        for name, words in (("gpt2", "GPT-2 small's shape"), ("world", "the world model")):
            one, many = (
                [numbers[f"{sweep}_speedup_{name}{of}"] for sweep in ("resid_pre", "head")] for of in ("", "_32_pairs")
            )
            said.append(
                f"Patching {words} is {one[0]:.0f} (stream) and {one[1]:.0f} (heads) times as fast as transformer_lens's "
                f"with one pair, {many[0]:.0f} and {many[1]:.0f} times with 32; the same numbers to "
                f"{numbers['max_abs_diff']:.0e}."
            )
    if "lens" in cfg.only:
        said.append(
            f"The lens at the answer's position costs {numbers['time_vs_forward']:.2f} forward passes, "
            f"at every layer and position {numbers['time_all_positions_vs_floor']:.2f} of its floor and "
            f"{numbers['memory_vs_cache_everything']:.3f} of the memory of keeping everything."
        )
    if "streaming" in cfg.only:
        share = numbers["streaming_peak_over_checkpoint"]
        said.append(f"A model on disk takes {share:.2f} of its size, with the same numbers as in memory.")
    for sentence in said:
        print(f"{green}{sentence}{endc}")
