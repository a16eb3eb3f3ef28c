"""
Hooks: one way to listen and to intervene, for our own models and any TransformerBridge; a run from the middle; batches
that halve when memory runs out; activations harvested at any hook.
"""

import contextlib
import difflib
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from utils import BRIEF, endc, fail, tec, yellow  # first: sets OpenMP's variables before torch is loaded

import numpy as np
import torch as t
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

type Names = str | list[str] | Callable[[str], bool]  # a hook name, a *-pattern, a list of these, or a predicate


#%% Hook points, and how they are found
class HookPoint(nn.Module):
    """Identity that lets functions fn(activation, hook) see or replace what flows through, as in TransformerLens."""

    def __init__(self):
        super().__init__()
        self.name: str | None = None
        self.fwd_hooks: list[tuple[Callable, int | None]] = []

    def add_hook(self, fn: Callable, level: int | None = None) -> None:
        self.fwd_hooks.append((fn, level))

    def remove_hooks(self, level: int | None = None) -> None:
        self.fwd_hooks = [(fn, at) for fn, at in self.fwd_hooks if level is not None and at != level]

    def forward(self, x: Tensor) -> Tensor:
        for fn, _ in self.fwd_hooks:
            y = fn(x, hook=self)
            if y is not None:
                x = y
        return x


# hooks of a TransformerBridge that fire only after model.set_<...>(True)
GATES = {
    "hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
}
LEVELS = itertools.count(1000)  # each `hooks` context removes its own and leaves the others


def hook_points(model: nn.Module) -> dict[str, nn.Module]:
    """All hook points by name, aliases such as blocks.0.hook_resid_pre included."""
    if hasattr(model, "hook_dict"):
        return model.hook_dict
    points = {name: module for name, module in model.named_modules() if isinstance(module, HookPoint)}
    for name, point in points.items():
        point.name = name
    return points


def find_hooks(model: nn.Module, names: Names | None, known: dict[str, nn.Module] | None = None) -> list[str]:
    """
    The hook names that `names` means; None is every name. Raises KeyError where nothing fits, or where a hook is gated
    and would never fire. known: hook_points(model), where the caller has them already.
    """
    known = known or hook_points(model)
    if names is None:
        return list(known)
    if callable(names):
        found = [name for name in known if names(name)]
        if not found:
            raise KeyError("no hook name satisfies the predicate")
        return found
    found = []
    for pattern in [names] if isinstance(names, str) else names:
        hits = [pattern] if pattern in known else fnmatch.filter(known, pattern)
        if not hits:
            raise KeyError(f"unknown hook name {pattern!r}; close: {difflib.get_close_matches(pattern, known, 3, 0.3)}")
        found += hits
    for name in found:
        refuse_gated(model, name)
    return list(dict.fromkeys(found))


def refuse_gated(model: nn.Module, name: str) -> None:
    gate = GATES.get(name.split(".")[-1])
    if gate and hasattr(model, f"set_{gate}") and not getattr(model.cfg, gate):
        raise KeyError(f"{name} is gated and would never fire: call model.set_{gate}(True) first")


#%% Running with hooks and with a cache
@contextlib.contextmanager
def hooks(model: nn.Module, fwd_hooks: list[tuple[Names, Callable]], must_fire: bool = True) -> Iterator[None]:
    """
    Attach (names, fn) pairs for the length of the context; fn(activation, hook) returns a replacement or None.
    Raises KeyError on an unknown or gated name, and RuntimeError when a hook has not fired by the end.
    """
    points = hook_points(model)
    level = next(LEVELS)
    chosen = [(name, fn) for names, fn in fwd_hooks for name in find_hooks(model, names, points)]
    silent = set(chosen)  # those that have not fired yet

    def counted(name: str, fn: Callable) -> Callable:
        def run(activation: Tensor, hook: nn.Module) -> Tensor | None:
            silent.discard((name, fn))
            return fn(activation, hook=hook)

        return run

    try:
        for name, fn in chosen:
            points[name].add_hook(counted(name, fn), level=level)
        yield
    finally:
        for name, _ in chosen:
            points[name].remove_hooks(level=level)
    if silent and must_fire:
        raise RuntimeError(f"hooks that never fired: {sorted({name for name, _ in silent})[:5]}")


def run_with_hooks(model: nn.Module, tokens: Tensor, fwd_hooks: list[tuple], **kwargs) -> Tensor:
    with hooks(model, fwd_hooks):
        return model(tokens, **kwargs)


ATTENTION_HOOKS = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")
MLP_HOOKS = ("pre", "post")


def act_name(short: str, layer: int) -> str:
    """('z', 3) -> 'blocks.3.attn.hook_z'"""
    room = ""
    if short in ATTENTION_HOOKS:
        room = "attn."
    if short in MLP_HOOKS:
        room = "mlp."
    return f"blocks.{layer}.{room}hook_{short}"


class Cache(dict):
    """Activations by hook name; cache['pattern', 0] is cache['blocks.0.attn.hook_pattern'], as in TransformerLens."""

    def __missing__(self, key: str | tuple[str, int]) -> Tensor:
        if isinstance(key, tuple):
            return self[act_name(*key)]
        raise KeyError(f"{key!r} was not cached; cached: {list(self)[:8]} ...")


def run_with_cache(
    model: nn.Module, tokens: Tensor, names: Names | None = None, detach: bool = True, **kwargs
) -> tuple[Tensor, Cache]:
    """
    (logits, cache of the named activations). None caches every hook that fires; a named hook that does not fire raises.
    detach=False keeps the graph, for gradients with respect to activations.
    """
    cache = Cache()

    def save(name: str, activation: Tensor, hook: nn.Module) -> None:
        cache[name] = activation.detach() if detach else activation

    if names is None:
        wanted = [name for name in hook_points(model) if name.split(".")[-1] not in GATES]
    else:
        wanted = find_hooks(model, names)
    with hooks(model, [(name, partial(save, name)) for name in wanted], must_fire=names is not None):
        out = model(tokens, **kwargs)
    return out, cache


#%% A run from the middle: the residual stream enters at a layer, and only the answer's position is unembedded
def device_of(model: nn.Module) -> t.device:
    return next(model.unembed.parameters()).device


def is_streamed(model: nn.Module) -> bool:
    """Its blocks come from the file when they are called (weights.Streamed)."""
    return getattr(model, "streamed", False)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that compute, where hook points may stand apart from them."""
    return model.layers if is_streamed(model) else list(model.blocks)


def replace_input(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """fn(input) instead of the module's first input; before hooks that are there already. Returns what undoes it."""

    def before(_: nn.Module, args: tuple) -> tuple:
        return (fn(args[0]), *args[1:])

    return module.register_forward_pre_hook(before, prepend=True).remove


def replace_output(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """fn(output) instead of the module's output. Returns what undoes it."""

    def after(_: nn.Module, args: tuple, out: Tensor | tuple) -> Tensor | tuple:
        if isinstance(out, tuple):  # a mixture of experts hands out its router's choice beside it
            return (fn(out[0]), *out[1:])
        return fn(out)

    return module.register_forward_hook(after).remove


def skip_block(block: nn.Module) -> Callable[[], None]:
    """The block hands its input on. Returns what undoes it."""

    def identity(x: Tensor, *args, **kwargs) -> Tensor:
        return x

    block.__dict__["forward"] = identity
    return partial(block.__dict__.pop, "forward")


def run_from(
    model: nn.Module,
    resid: Tensor,
    answer_pos: Callable[[], Tensor] | Tensor | None,
    layer: int = 0,
    fwd_hooks: list[tuple] = (),
    inner: list[tuple[nn.Module, str, Callable[[Tensor], Tensor]]] = (),
) -> Tensor:
    """
    Logits of a run that resid (row, pos, d_model) enters at `layer`: (row, d_vocab) at position answer_pos (row) of each
    row, which alone is unembedded, or (row, pos, d_vocab) if it is None.
    inner: (module, 'in' or 'out', fn) replaces a module's input or output. Where rows_may_join it may add rows on the
    way; answer_pos is a function then, called last.
    """

    def at_the_answer(x: Tensor) -> Tensor:
        at = answer_pos() if callable(answer_pos) else answer_pos
        return x[range(len(x)), at][:, None]

    foreign = is_foreign(model)
    entries = list(inner)
    if answer_pos is not None:
        entries.append((model.unembed, "in", at_the_answer))
    with contextlib.ExitStack() as undo:
        if foreign:
            assert layer == 0 or not is_streamed(model), "blocks that are read when they are called are not skipped"
            entries.insert(0, (blocks_of(model)[layer], "in", lambda x: resid))
            for block in blocks_of(model)[:layer]:
                undo.callback(skip_block(block))
        for module, side, fn in reversed(entries):  # each is put before those that are there
            if side == "in":
                undo.callback(replace_input(module, fn))
        for module, side, fn in entries:
            if side == "out":
                undo.callback(replace_output(module, fn))
        undo.enter_context(hooks(model, list(fwd_hooks)))
        if foreign:
            # they see zeros: where rows may join one of them, whose mask and positions serve any number that enters
            n_rows = 1 if rows_may_join(model) else len(resid)
            zeros = t.zeros(n_rows, resid.shape[1], dtype=t.long, device=resid.device)
            logits = model(zeros, use_cache=False)
        else:
            logits = model(None, start_at_layer=layer, resid=resid)
    return logits if answer_pos is None else logits[:, 0]


def cache_from_resid(
    model: nn.Module, resid: Tensor, answer_pos: Tensor | None, names: list[str]
) -> tuple[Tensor, Cache]:
    """(logits at answer_pos, cache of names) of a run that resid (row, pos, d_model) enters at layer 0."""
    cache = Cache()

    def save(name: str, activation: Tensor, hook: nn.Module) -> None:
        cache[name] = activation.detach()

    listening = [(name, partial(save, name)) for name in dict.fromkeys(names)]
    return run_from(model, resid, answer_pos, 0, listening), cache


#%% How a block is built, where models differ: ours are known, a bridge's are asked
def is_foreign(model: nn.Module) -> bool:
    """A TransformerBridge, or streamed: transformers computes it."""
    return hasattr(model, "hook_dict") or is_streamed(model)


def has_heads(model: nn.Module) -> bool:
    """Attention heads and MLPs are hooked; else (Mamba, streamed weights) the residual stream alone."""
    return not is_streamed(model) and hasattr(model.blocks[0], "attn")


def has_qkv(model: nn.Module) -> bool:
    """Queries, keys and values are linear in the stream, head by head; DeepSeek's come from compressed ones."""
    if not has_heads(model):
        return False
    try:
        return model.blocks[0].attn.W_K is not None
    except (AttributeError, NotImplementedError):  # TransformerBridge says so
        return False


def hf_config(model: nn.Module) -> object | None:
    """transformers' configuration of a bridge or a streamed model, of its language part; None for ours."""
    if not is_foreign(model):
        return None
    hf = model.hf if is_streamed(model) else model.original_model
    return hf.config.get_text_config()


def residual_multiplier(model: nn.Module) -> float:
    """By which Granite multiplies what attention and MLP write; 1 elsewhere."""
    return getattr(hf_config(model), "residual_multiplier", 1.0)


def logit_multiplier(model: nn.Module) -> float:
    """By which Granite and Cohere multiply what the unembedding gives; 1 elsewhere."""
    config = hf_config(model)
    return getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)


class Probed(Exception):
    """Ends a probing run."""


def rows_may_join(model: nn.Module) -> bool:
    """
    Whether more rows may enter a block than the model was given tokens for. The masks of some (Bloom, BigCode) are made
    for as many rows as there are tokens. Asked once, in the first block.
    """
    if not is_foreign(model):
        return True
    if not hasattr(model, "lets_rows_join"):
        model.lets_rows_join = probe_joining(model)
    return model.lets_rows_join


def probe_joining(model: nn.Module) -> bool:
    def two_rows(x: Tensor) -> Tensor:
        return x.expand(2, -1, -1).clone()

    def leave(x: Tensor) -> Tensor:
        raise Probed

    blocks = blocks_of(model)
    with contextlib.ExitStack() as undo, t.no_grad():
        undo.callback(replace_input(blocks[0], two_rows))
        if len(blocks) > 1:
            undo.callback(replace_input(blocks[1], leave))
        try:
            model(t.zeros(1, 4, dtype=t.long, device=device_of(model)), use_cache=False)
        except Probed:
            return True
        except RuntimeError:  # shapes that do not fit
            return False
    return True


@dataclass
class BlockNorms:
    """
    What stands between a block's parts and the stream. Attention and MLP read it through before_* (None: as it is), and
    in Gemma 2, Gemma 3 and OLMo 2 write to it through after_*.
    """

    before_attn: nn.Module | None
    after_attn: nn.Module | None
    before_mlp: nn.Module | None
    after_mlp: nn.Module | None


def block_norms(model: nn.Module, layer: int) -> BlockNorms:
    block = model.blocks[layer]
    ln2 = getattr(block, "ln2", None)
    if hasattr(block, "ln1_post"):
        return BlockNorms(block.ln1, block.ln1_post, ln2, block.ln2_post)
    if norms_come_after(model):
        return BlockNorms(None, block.ln1, None, ln2)
    return BlockNorms(block.ln1, None, ln2 or block.ln1, None)  # one norm may serve both (GPT-J, Phi, Falcon)


def norms_come_after(model: nn.Module) -> bool:
    """OLMo 2 has a norm after attention and after the MLP alone, by the names of those before. Asked once."""
    if not is_foreign(model):
        return getattr(model.cfg, "norms", "before") == "after"
    if not hasattr(model, "has_norms_after"):
        called = []
        block = model.blocks[0]
        with contextlib.ExitStack() as undo, t.no_grad():
            for name in ("ln1", "attn"):
                handle = getattr(block, name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
                undo.callback(handle.remove)
            model(t.zeros(1, 4, dtype=t.long, device=device_of(model)), use_cache=False)
        model.has_norms_after = called[0] == "attn"
    return model.has_norms_after


class NormShape(NamedTuple):
    """What a norm does beside dividing by its scale: weight and bias (d_model), and whether it takes the mean out."""

    weight: Tensor
    bias: Tensor
    centres: bool


@t.no_grad()
def ask_norm(norm: nn.Module, d_model: int, like: Tensor) -> NormShape:
    """
    Found by asking, since norms say it in many ways (Gemma's weight is 1 + w, OLMo's has none): norm(v) - norm(0) is
    the weight times v over its size, for v = 1, -1, 1 ... whose mean is 0, and LayerNorm does not see v + 1. like: a
    tensor of the norm's dtype.
    """
    if isinstance(norm, nn.Identity):
        return NormShape(t.ones(d_model, device=like.device), t.zeros(d_model, device=like.device), False)
    signs = (1 - 2 * (t.arange(d_model, device=like.device) % 2)).to(like.dtype)
    if d_model % 2:
        signs[-1] = 0  # else their mean would not be 0; what stands there is asked by the same signs, turned round
    turned = signs.roll(1)
    asked = 1024 * t.stack([0 * signs, signs, turned, signs + 1])  # so large that the norm's epsilon is nothing
    at_zero, at_signs, at_turned, at_moved = norm(asked[None])[0].float()
    size = signs.float().pow(2).mean().sqrt()
    weight = t.where(signs != 0, (at_signs - at_zero) * signs, (at_turned - at_zero) * turned) * size
    miss = (at_signs - at_moved).abs().max()
    return NormShape(weight, at_zero, bool(miss <= 1e-2 * weight.abs().max()))


def frozen_gain(norm: nn.Module, x: Tensor) -> Tensor:
    """(..., d_model) by which an RMS norm multiplies x (..., d_model), its scale taken as it is there."""
    weight = ask_norm(norm, x.shape[-1], x).weight
    return weight * (norm(x).float().norm(dim=-1) / (weight * x.float()).norm(dim=-1))[..., None]


#%% Memory: batches that halve where it does not suffice, and what a call takes at its peak
def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, t.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_batches[Rows, Out](fn: Callable[[Rows], Out], rows: Rows, batch: int, title: str = "rows") -> Iterator[Out]:
    """
    fn(rows[i:i + batch]) for all rows in order. Where memory does not suffice the batch is halved and the same rows are
    tried again.
    """
    start = 0
    bar = tqdm(total=len(rows), desc=title, **BRIEF)
    while start < len(rows):
        part = rows[start : start + batch]
        try:
            out = fn(part)
            fits = True
        except (t.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if len(part) == 1:
                reason = str(error).splitlines()[0]
                fail(
                    f"out of memory on a single row: use a smaller model, shorter rows or --device cpu ({reason})",
                )
            fits = False
        if fits:
            yield out
            start += len(part)
            bar.update(len(part))
        else:  # out here the failed call's tensors are free
            tec()
            batch = -(-len(part) // 2)
            print(f"{yellow}out of memory: going on with {batch} rows at a time{endc}")
    bar.close()


def rows_that_fit(model: nn.Module, n_pos: int, memory_gb: float, floats: int = 0) -> int:
    """
    How many rows of n_pos tokens a run may have: the activations of one layer, the answer's logits, and `floats` per
    position more, in float32.
    """
    cfg = model.cfg
    per_position = 10 * cfg.d_model + 4 * cfg.d_mlp + 4 * cfg.n_heads * n_pos + floats
    per_row = n_pos * per_position + 8 * cfg.d_vocab
    return max(1, int(memory_gb * 2**28 / per_row))


def peak_bytes(run: Callable) -> int:
    """Largest sum of live tensor bytes that run allocates, by the CPU allocator's own record."""
    with t.profiler.profile(activities=[t.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    memory = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    memory.sort(key=lambda event: (event.start_ns(), event.nbytes()))
    return int(np.cumsum([event.nbytes() for event in memory]).max())


#%% Gates: what may be missed, and whether listening changes anything
def missed_gates(gates: dict[str, float], model: nn.Module) -> list[str]:
    """The gates that miss by more than the model's dtype explains; NaN is a miss."""
    allowed = 1e-4 if model.W_U.dtype == t.float32 else 5e-2
    return [name for name, miss in gates.items() if not miss <= allowed]


def in_words(gates: dict[str, float]) -> str:
    """As they are printed: nothing patched 3e-07, ..."""
    return ", ".join(f"{name.replace('_', ' ')} {miss:.0e}" for name, miss in gates.items())


@t.no_grad()
def listening_gap(model: nn.Module, tokens: Tensor) -> float:
    """Largest difference of the logits with every hook cached and without, relative to the largest logit."""
    listened, _ = run_with_cache(model, tokens)
    alone = model(tokens)
    return (listened - alone).abs().max().item() / listened.abs().max().item()


#%% Activations, harvested at any hook, heads side by side
@t.no_grad()
def harvest(model: nn.Module, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """{hook: (batch, pos, d)} in float32; the blocks above the last hook are not run."""
    in_blocks = [re.search(r"blocks\.(\d+)\.", name) for name in names]
    stop = {}
    if all(in_blocks):
        last = max(int(match[1]) for match in in_blocks)
        stop = {"stop_at_layer": last + 1}
    _, cache = run_with_cache(model, tokens, names, **stop)

    found = {name: cache[name].float().flatten(2) for name in names}
    for name, activations in found.items():
        broken = (~activations.isfinite()).sum()
        if broken:
            fail(
                f"{broken} activations at {name} are NaN or infinite: "
                "the model's weights are broken, or its dtype is too small"
            )
    return found
