"""Hooks: one way to listen and to intervene, for our own models and any TransformerBridge; a run from the middle; batches that halve when memory runs out."""

import contextlib
import difflib
import fnmatch
import itertools
from collections.abc import Callable, Iterator
from functools import partial

from utils import BRIEF, endc, fail, tec, yellow

import numpy as np
import torch as t
from torch import Tensor
import torch.nn as nn
from tqdm import tqdm


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


GATES = {
    "hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
    **{f"hook_{x}_input": "use_split_qkv_input" for x in "qkv"},
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


def find_hooks(
    model: nn.Module, names: str | list[str] | Callable[[str], bool] | None, known: dict[str, nn.Module] | None = None
) -> list[str]:
    """Hook names for a name, a *-pattern, a list of these, or a predicate; None is every name. Raises KeyError where nothing fits."""
    known = known or hook_points(model)
    if names is None:
        return list(known)
    if callable(names):
        if not (found := [name for name in known if names(name)]):
            raise KeyError("no hook name satisfies the predicate")
        return found
    found = []
    for pattern in [names] if isinstance(names, str) else names:
        hits = [pattern] if pattern in known else fnmatch.filter(known, pattern)
        if not hits:
            raise KeyError(f"unknown hook name {pattern!r}; close: {difflib.get_close_matches(pattern, known, 3, 0.3)}")
        found += hits
    for name in found:
        gate = GATES.get(name.split(".")[-1])
        if gate and hasattr(model, f"set_{gate}") and not getattr(model.cfg, gate):
            raise KeyError(f"{name} is gated and would never fire: call model.set_{gate}(True) first")
    return list(dict.fromkeys(found))


#%% Running with hooks and with a cache
@contextlib.contextmanager
def hooks(
    model: nn.Module, fwd_hooks: list[tuple[str | list[str] | Callable[[str], bool], Callable]], must_fire: bool = True
) -> Iterator[None]:
    """
    Attach (names, fn) pairs for the length of the context; fn(activation, hook) returns a replacement or None.
    Raises KeyError on an unknown or gated name, and RuntimeError when a hook has not fired by the end.
    """
    points, level, silent = hook_points(model), next(LEVELS), set()

    def counted(name: str, fn: Callable) -> Callable:
        def run(activation: Tensor, hook: nn.Module) -> Tensor | None:
            silent.discard((name, fn))
            return fn(activation, hook=hook)

        return run

    chosen = [(name, fn) for names, fn in fwd_hooks for name in find_hooks(model, names, points)]
    silent.update(chosen)
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


class Cache(dict):
    """Activations by hook name; cache['pattern', 0] is cache['blocks.0.attn.hook_pattern'], as in TransformerLens."""

    def __missing__(self, key: str | tuple[str, int]) -> Tensor:
        if isinstance(key, tuple):
            return self[act_name(*key)]
        raise KeyError(f"{key!r} was not cached; cached: {list(self)[:8]} ...")


def act_name(short: str, layer: int) -> str:
    room = (
        "attn."
        if short in ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")
        else "mlp."
        if short in ("pre", "post")
        else ""
    )
    return f"blocks.{layer}.{room}hook_{short}"


def run_with_cache(
    model: nn.Module,
    tokens: Tensor,
    names: str | list[str] | Callable[[str], bool] | None = None,
    detach: bool = True,
    **kwargs,
) -> tuple[Tensor, Cache]:
    """
    (logits, cache of the named activations). None caches every hook that fires; a named hook that does not fire raises.
    detach=False keeps the graph, for gradients with respect to activations.
    """
    cache = Cache()

    def save(name: str) -> Callable:
        def fn(activation: Tensor, hook: nn.Module) -> None:
            cache[name] = activation.detach() if detach else activation

        return fn

    optional = names is None
    wanted = (
        [name for name in hook_points(model) if not (optional and name.split(".")[-1] in GATES)]
        if optional
        else find_hooks(model, names)
    )
    with hooks(model, [(name, save(name)) for name in wanted], must_fire=not optional):
        out = model(tokens, **kwargs)
    return out, cache


#%% A run from the middle: the residual stream enters at a layer, and only the answer's position is unembedded
def device_of(model: nn.Module) -> t.device:
    return next(model.ln_final.parameters()).device


def is_streamed(model: nn.Module) -> bool:
    """Its blocks come from the file when they are called (weights.Streamed)."""
    return getattr(model, "streamed", False)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that compute, where hook points may stand apart from them."""
    return model.layers if is_streamed(model) else list(model.blocks)


def run_from(
    model: nn.Module,
    resid: Tensor,
    at: Callable[[], Tensor] | Tensor | None,
    layer: int = 0,
    fwd_hooks: list[tuple] = [],
    inner: list[tuple] = [],
) -> Tensor:
    """
    Logits (row, d_vocab) at position at (row), or (row, pos, d_vocab) if at is None, of a run that resid (row, pos, d_model) enters at `layer`. inner: (module,
    'in' or 'out', fn) replaces a module's input or output; it may add rows on the way, where at is a function, called last.
    """
    pick = lambda x: x[range(len(x)), at() if callable(at) else at][:, None]
    entries = [*inner, *([] if at is None else [(model.unembed, "in", pick)])]
    with contextlib.ExitStack() as stack:
        if foreign := hasattr(model, "hook_dict") or is_streamed(
            model
        ):  # they see one row of zeros, whose mask and positions serve any number of rows that enter
            entries = [(blocks_of(model)[layer], "in", lambda x: resid), *entries]
            assert layer == 0 or not is_streamed(model), "blocks that are read when they are called are not skipped"
            for block in blocks_of(model)[:layer]:
                block.__dict__["forward"] = lambda x, *args, **kwargs: x
                stack.callback(block.__dict__.pop, "forward")
        for module, side, fn in entries[::-1]:  # before the hook points of Streamed, which are hooks themselves
            if side == "in":
                stack.callback(
                    module.register_forward_pre_hook(
                        lambda module, args, fn=fn: (fn(args[0]), *args[1:]), prepend=True
                    ).remove
                )
        for module, side, fn in entries:
            if side == "out":
                stack.callback(module.register_forward_hook(lambda module, args, out, fn=fn: fn(out)).remove)
        stack.enter_context(hooks(model, fwd_hooks))
        out = (
            model(t.zeros(1, resid.shape[1], dtype=t.long, device=resid.device), use_cache=False)
            if foreign
            else model(None, start_at_layer=layer, resid=resid)
        )
    return out if at is None else out[:, 0]


def cache_from_resid(model: nn.Module, resid: Tensor, at: Tensor | None, names: list[str]) -> tuple[Tensor, Cache]:
    """(logits at `at`, cache of names)."""
    cache = Cache()

    def save(name: str, x: Tensor, hook: nn.Module) -> None:
        cache[name] = x.detach()

    return run_from(model, resid, at, 0, [(name, partial(save, name)) for name in dict.fromkeys(names)]), cache


#%% Memory: batches that halve where it does not suffice, and what a call takes at its peak
def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, t.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_batches[Rows, Out](fn: Callable[[Rows], Out], rows: Rows, batch: int, title: str = "rows") -> Iterator[Out]:
    """fn(rows[i:i + batch]) for all rows in order. Where memory does not suffice the batch is halved and the same rows are tried again."""
    start, bar = 0, tqdm(total=len(rows), desc=title, **BRIEF)
    while start < len(rows):
        part = rows[start : start + batch]
        try:
            out, fits = fn(part), True
        except (t.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if len(part) == 1:
                fail(
                    f"out of memory on a single row: use a smaller model, shorter rows or --device cpu ({str(error).splitlines()[0]})"
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


def peak_bytes(run: Callable) -> int:
    """Largest sum of live tensor bytes that run allocates, by the CPU allocator's own record."""
    with t.profiler.profile(activities=[t.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in record.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return int(np.cumsum([size for _, size in events]).max())


def rows_that_fit(model: nn.Module, T: int, memory_gb: float, floats: int = 0) -> int:
    """How many rows of T tokens a run may have: activations of one layer, the answer's logits, and `floats` per position more."""
    cfg = model.cfg
    return max(
        1,
        int(
            memory_gb
            * 2**28
            / (T * (10 * cfg.d_model + 4 * cfg.d_mlp + 4 * cfg.n_heads * T + floats) + 8 * cfg.d_vocab)
        ),
    )
