"""
What changes a model while it runs: activation patching (the plain form and the sweep), causal tracing, attention
knock-out, patchscopes, edits by a function.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from utils import fail  # first: sets OpenMP's variables before torch is loaded
from hooks import (
    act_name,
    block_norms,
    blocks_of,
    has_heads,
    hook_points,
    in_batches,
    rows_may_join,
    rows_that_fit,
    run_from,
    run_with_cache,
    run_with_hooks,
)
from layers import next_token_loss
from logit_attribution import layer_streams
from pairs import Pairs, baselines, by_groups, inputs, make_metric, position_masks

import torch as t
import torch.nn as nn
from torch import Tensor


#%% Activation patching, the plain form: one run of the model for each activation
STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


HEADS = ("z", "q", "k", "v", "pattern")


@t.no_grad()
def activation_patch(
    model: nn.Module,
    pairs: Pairs,
    site: str,
    layer: int,
    position: int | slice = slice(None),
    head: int | slice = slice(None),
    metric: str = "logit_diff",
    direction: Literal["denoise", "noise"] = "denoise",
) -> Tensor:
    """
    Metric (pair) after `site` of one layer, at one position and of one head (default: all of them), was taken from
    the other run: from the clean run into the corrupt one (denoise), or from the corrupt run into the clean one
    (noise) (Vig et al. 2020, Meng et al. 2022, Heimersheim & Nanda 2024).
    """
    assert pairs.corrupt_resid is None, "the plain form runs on tokens"
    hook_name = act_name(site, layer)
    clean_logits, clean_cache = run_with_cache(model, pairs.clean, hook_name)
    _, corrupt_cache = run_with_cache(model, pairs.corrupt, hook_name)
    if direction == "denoise":
        base_tokens = pairs.corrupt
        donor = clean_cache[hook_name]
    else:
        base_tokens = pairs.clean
        donor = corrupt_cache[hook_name]
    if site == "pattern":  # (pair, head, query, key)
        where = (slice(None), head, position)
    elif site in HEADS:  # (pair, pos, head, d_head)
        where = (slice(None), position, head)
    else:  # (pair, pos, d_model)
        where = (slice(None), position)

    def patch(activation: Tensor, hook: nn.Module) -> None:
        # in place, as a bridge's hook_resid_mid is the stream itself: see GrowingBatch.patch
        activation[where] = donor[where]

    logits = run_with_hooks(model, base_tokens, [(hook_name, patch)])
    metric_fn = make_metric(pairs, metric, clean_logits[pairs.index, pairs.answer_pos])
    return metric_fn(logits[pairs.index, pairs.answer_pos], pairs.index)


#%% Activation patching, the fast form: all layers, heads and places in one growing batch
@dataclass
class Cells:
    """
    The cells of a sweep, an entry each: one layer, head, place and pair. first: the position from which on its run
    can differ from the plain one. In this order layers come one after the other, so cells join a growing batch in
    their order.
    """

    layer: Tensor
    head: Tensor
    place: Tensor
    pair: Tensor
    first: Tensor

    def __len__(self) -> int:
        return len(self.layer)

    def take(self, index: Tensor) -> "Cells":
        return Cells(self.layer[index], self.head[index], self.place[index], self.pair[index], self.first[index])


class GrowingBatch:
    """
    One forward pass for many cells of a sweep. Its rows: the base run of every pair, which is to be patched; the
    donor run of every pair, which is patched from; then a row for each cell. Below the layer that it patches a cell's
    row is its pair's base run, so it joins there, as a copy of that row, and nothing below is computed again (where
    rows_may_join; else all join before the first layer). Layer by layer the model calls

        enter     the cells of this layer join
        patch     what they patch becomes the donor's
        cut       the MLP reads only positions that can differ from the base run ...
        restore   ... and everywhere else the base run's output is copied

    n_heads is 1 where all heads are patched together. masks: (place, pair, pos).
    """

    def __init__(self, model: nn.Module, pairs: Pairs, site: str, cells: Cells, masks: Tensor, n_heads: int):
        self.model = model
        self.site = site
        self.cells_of = {layer: cells.take(cells.layer == layer) for layer in cells.layer.unique().tolist()}
        self.rows_of: dict[int, slice] = {}  # by layer, where its cells stand in the batch
        self.join_late = rows_may_join(model)
        self.masks = masks
        self.n_heads = n_heads
        self.n_pairs = len(pairs)
        self.n_layers = model.cfg.n_layers
        self.answer_pos = pairs.answer_pos
        self.position = t.arange(pairs.clean.shape[1], device=pairs.answer_pos.device)
        # what changes during the pass
        self.layer = 0
        self.pair = t.cat([pairs.index, pairs.index])  # (row) the pair whose run it is
        self.can_differ = t.ones(2 * len(pairs), len(self.position), dtype=t.bool, device=self.position.device)
        self.read = ()  # (row), (position) that the MLP of this layer reads

    def run(self, resid: Tensor) -> Tensor:
        """
        Logits (row, d_vocab) where the answer is due, after base and donor runs enter with resid (2 * pair, pos,
        d_model).
        """
        if not self.join_late:
            for layer in self.cells_of:
                resid = self.join(layer, resid)
        inner = [(block, "in", partial(self.enter, layer)) for layer, block in enumerate(blocks_of(self.model))]
        if self.join_late and has_heads(self.model) and not self.patches_in_mlp():
            for layer in range(self.n_layers):
                mlp = self.model.blocks[layer].mlp
                inner.append((mlp, "in", partial(self.cut, layer)))
                inner.append((mlp, "out", partial(self.restore, layer)))
        patched_hooks = [act_name(self.site, layer) for layer in self.cells_of]
        fwd_hooks = [(patched_hooks, self.patch)] if patched_hooks else []
        return run_from(self.model, resid, self.row_answer_pos, layer=0, fwd_hooks=fwd_hooks, inner=inner)

    def patches_in_mlp(self) -> bool:
        """Then all positions must go through it. Where the MLP reads the bare stream, its input is hook_resid_mid."""
        bare = block_norms(self.model, 0).before_mlp is None
        return "mlp" in act_name(self.site, 0) or (bare and self.site == "resid_mid")

    def row_answer_pos(self) -> Tensor:
        return self.answer_pos[self.pair]

    def enter(self, layer: int, resid: Tensor) -> Tensor:
        """The stream (row, pos, d_model) before this layer, in which its cells now have their rows."""
        self.layer = layer
        if layer in self.cells_of and self.join_late:
            return self.join(layer, resid)
        return resid

    def join(self, layer: int, resid: Tensor) -> Tensor:
        """With a copy of the base run's row for each cell of this layer."""
        cells = self.cells_of[layer]
        behind_first = self.position >= cells.first[:, None]
        before_end = self.position <= self.answer_pos[cells.pair, None]
        self.rows_of[layer] = slice(len(resid), len(resid) + len(cells))
        self.pair = t.cat([self.pair, cells.pair])
        self.can_differ = t.cat([self.can_differ, behind_first & before_end])
        return t.cat([resid, resid[cells.pair]])

    def patch(self, activation: Tensor, hook: nn.Module) -> None:
        """
        In place, in the rows of this layer's cells: a bridge's hook_resid_mid hands out what the MLP reads, which is
        the stream itself.
        """
        cells = self.cells_of[self.layer]
        rows = self.rows_of[self.layer]
        donor = activation[self.n_pairs + cells.pair]
        activation[rows] = t.where(self.patched(cells, activation.ndim), donor, activation[rows])

    def patched(self, cells: Cells, ndim: int) -> Tensor:
        """True where these cells patch, in a shape that broadcasts over the site's activation."""
        positions = self.masks[cells.place, cells.pair]  # (cell, pos)
        heads = t.arange(self.n_heads, device=self.position.device) == cells.head[:, None]  # (cell, head or 1)
        if self.site == "pattern":
            return positions[:, None, :, None] & heads[:, :, None, None]  # (cell, head, query, 1)
        if ndim == 4:
            return positions[:, :, None, None] & heads[:, None, :, None]  # (cell, pos, head, 1)
        return positions[:, :, None]  # (cell, pos, 1)

    def cut(self, layer: int, resid: Tensor) -> Tensor:
        """
        What the MLP reads (1, chosen, d_model): positions that can differ, in the last layer only where the answer is
        due.
        """
        read = self.can_differ
        if layer == self.n_layers - 1:
            read = self.position == self.row_answer_pos()[:, None]
        self.read = read.nonzero(as_tuple=True)
        return resid[self.read][None]

    def restore(self, layer: int, out: Tensor) -> Tensor:
        """
        The MLP's output (row, pos, d_model), where it was not computed the base run's; in the last layer zeros, which
        nothing reads.
        """
        full = out.new_zeros(*self.can_differ.shape, out.shape[-1])
        full.index_put_(self.read, out[0])
        if layer < self.n_layers - 1:
            cells = slice(2 * self.n_pairs, None)
            base = full[self.pair[cells]]  # row i is the base run of pair i
            full[cells] = t.where(self.can_differ[cells, :, None], full[cells], base)
        return full


@t.no_grad()
def sweep(
    model: nn.Module,
    pairs: Pairs,
    site: str,
    by: Literal["pos", "head", "head pos"] = "pos",
    metric: str = "logit_diff",
    direction: Literal["denoise", "noise"] = "denoise",
    places: dict[str, Tensor] | None = None,
    memory_gb: float = 1.0,
    skip: bool = True,
) -> Tensor:
    """
    activation_patch of `site` in every layer, each alone: metric (layer, place, pair), (layer, head, pair) or (layer,
    head, place, pair). places: named masks (pair, pos) whose positions are patched together, default each position
    alone; of a pattern the query is placed. k and v have as many heads as keys. Activations stay within memory_gb,
    however many the pairs. skip: cells before a pair's first difference are not run, as nothing differs there.
    """
    if by == "head":
        places = {"all": t.ones_like(pairs.clean, dtype=t.bool)}
    places = places or position_masks(pairs)
    for name, mask in places.items():
        if mask.shape != pairs.clean.shape:
            fail(f"place {name!r} is not a mask of {tuple(pairs.clean.shape)} (pair, pos)")
    of_group = partial(
        sweep_group,
        model,
        site=site,
        n_heads=1 if by == "pos" else heads_at(model, site),
        metric=metric,
        direction=direction,
        memory_gb=memory_gb,
        skip=skip,
    )
    most_pairs = max(1, rows_that_fit(model, pairs.clean.shape[1], memory_gb) // 16)
    table = t.cat(by_groups(of_group, replace(pairs, places=places), most_pairs), -1)
    if by == "pos":
        return table[:, 0]
    if by == "head":
        return table[:, :, 0]
    return table


def sweep_group(
    model: nn.Module,
    group: Pairs,
    site: str,
    n_heads: int,
    metric: str,
    direction: str,
    memory_gb: float,
    skip: bool,
) -> Tensor:
    """
    sweep of a few pairs over their places: metric (layer, head, place, pair). n_heads is 1 where heads go together.
    """
    base, donor = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    resid = t.cat([inputs(model, group, base), inputs(model, group, donor)])
    masks = t.stack(list(group.places.values()))  # (place, pair, pos)
    touched = masks & can_matter(group, resid) if skip else masks
    shape = (model.cfg.n_layers, n_heads, len(masks), len(group))
    cells, touches_any = plan_cells(group, shape, touched)
    needed = touches_any.nonzero()[:, 0] if skip else t.arange(len(cells), device=masks.device)

    def run(chosen_cells: Tensor) -> tuple[Tensor, Tensor]:
        """Metric of the base runs (pair), and of these cells."""
        some = cells.take(chosen_cells)
        logits = GrowingBatch(model, group, site, some, masks, n_heads).run(resid)
        base_logits, donor_logits, cell_logits = logits.split([len(group), len(group), len(some)])
        metric_fn = make_metric(group, metric, donor_logits if direction == "denoise" else base_logits)
        return metric_fn(base_logits, group.index), metric_fn(cell_logits, some.pair)

    if len(needed):
        n_rows = rows_that_fit(model, group.clean.shape[1], memory_gb)
        done = list(in_batches(run, needed, max(1, n_rows - 2 * len(group)), f"patching {site}"))
    else:
        done = [run(needed)]
    unpatched = done[0][0]
    patched = t.cat([values for _, values in done])
    return unpatched[cells.pair].index_put((needed,), patched).view(shape)


def heads_at(model: nn.Module, site: str) -> int:
    """Keys and values may have fewer heads than queries."""
    return model.blocks[0].attn.W_K.shape[0] if site in ("k", "v") else model.cfg.n_heads


def head_names(model: nn.Module, site: str) -> list[str]:
    """H0, H1 ...; the keys and values that several heads share are named by these: H0-1, H2-3."""
    n = heads_at(model, site)
    sharing = model.cfg.n_heads // n
    if sharing == 1:
        return [f"H{head}" for head in range(n)]
    return [f"H{first}-{first + sharing - 1}" for first in range(0, n * sharing, sharing)]


def can_matter(pairs: Pairs, resid: Tensor) -> Tensor:
    """
    Mask (pair, pos): from the first position at which the two runs enter differently, up to the answer. resid: (2 *
    pair, pos, d_model).
    """
    first_run, second_run = resid.split(len(pairs))
    differs = (first_run != second_run).any(-1)
    position = t.arange(pairs.clean.shape[1], device=pairs.answer_pos.device)
    return (differs.cumsum(1) > 0) & (position <= pairs.answer_pos[:, None])


def plan_cells(pairs: Pairs, shape: tuple[int, int, int, int], touched: Tensor) -> tuple[Cells, Tensor]:
    """
    All cells of a sweep of this shape (layer, head, place, pair), and a mask (cell) of those that touch anything.
    touched: (place, pair, pos).
    """
    axes = [t.arange(n, device=pairs.answer_pos.device) for n in shape]
    layer, head, place, pair = (axis.flatten() for axis in t.meshgrid(*axes, indexing="ij"))
    first = touched.float().argmax(-1)[place, pair]
    return Cells(layer, head, place, pair, first), touched.any(-1)[place, pair]


#%% Gates of the sweep
@t.no_grad()
def sweep_gates(model: nn.Module, pairs: Pairs, metric: str, memory_gb: float = 1.0) -> dict[str, float]:
    """
    What must hold before a sweep is believed, as the largest miss over the largest difference of clean and corrupt:
    the answer's position unembedded alone has the model's own logits, patching nothing is the corrupt run, patching
    everything before a layer is the clean run.
    """
    clean, corrupt = baselines(model, pairs, metric, memory_gb)
    alone = run_from(model, inputs(model, pairs, "clean"), pairs.answer_pos)
    logits = model(pairs.clean)[pairs.index, pairs.answer_pos]
    whole_model = make_metric(pairs, metric, alone)(logits, pairs.index)

    def patch_everywhere(on: bool) -> Tensor:
        places = {"all": t.full_like(pairs.clean, on, dtype=t.bool)}
        return sweep(model, pairs, "resid_pre", metric=metric, places=places, memory_gb=memory_gb, skip=False)

    misses = {
        "answer_alone_unembedded": whole_model - clean,
        "nothing_patched": patch_everywhere(False) - corrupt,
        "everything_patched": patch_everywhere(True) - clean,
    }
    scale = 0.01 + (clean - corrupt).abs().max()
    return {name: (miss.abs().max() / scale).item() for name, miss in misses.items()}


#%% Causal tracing: noise on the subject's embeddings, one clean activation restored (Meng et al. 2022)
@t.no_grad()
def embedding_std(model: nn.Module, tokens: Tensor, place_mask: Tensor) -> float:
    """
    Standard deviation of the token embeddings at the positions of place_mask (pair, pos), as they enter the first
    block, so scaled where the model scales them (Gemma). Where positions are added to them, they are read at
    hook_embed, before.
    """
    if "hook_pos_embed" in hook_points(model):
        _, cache = run_with_cache(model, tokens, "hook_embed")
        embeddings = cache["hook_embed"]
    else:
        embeddings = model(tokens, stop_at_layer=0)
    return embeddings[place_mask].float().std().item()


@t.no_grad()
def noised_pairs(model: nn.Module, pairs: Pairs, place_mask: Tensor, sigma: float) -> Pairs:
    """
    The same pairs, but the corrupt run is the clean one with Gaussian noise of standard deviation sigma on what
    enters layer 0 at the positions of place_mask (pair, pos). Meng et al. take sigma = 3 embedding_std, and the
    subject's tokens.
    """
    resid = inputs(model, pairs, "clean")
    noise = sigma * t.randn_like(resid)
    return replace(pairs, corrupt=pairs.clean, corrupt_resid=resid + noise * place_mask[..., None])


@t.no_grad()
def causal_trace(
    model: nn.Module, noised: Pairs, site: str, layer: int, place_mask: Tensor, metric: str = "log_prob"
) -> Tensor:
    """
    Causal tracing (Meng et al. 2022): metric (pair) of the noised runs (see noised_pairs) in which `site` of one
    layer is the clean run's at the positions of place_mask (pair, pos). Plain form of a sweep of noised pairs. (The
    paper restores attention and MLP outputs in windows of ten layers, here it is one layer.)
    """
    # Step 1: a clean run
    hook_name = act_name(site, layer)
    clean_logits, clean_cache = run_with_cache(model, noised.clean, hook_name)

    # Step 2: the run again, with the noised embeddings, and the clean activation restored
    def put_noised(resid: Tensor, hook: nn.Module) -> Tensor:
        return noised.corrupt_resid.clone()

    def restore(activation: Tensor, hook: nn.Module) -> None:
        activation[place_mask] = clean_cache[hook_name][place_mask]  # in place: see GrowingBatch.patch

    logits = run_with_hooks(model, noised.clean, [(act_name("resid_pre", 0), put_noised), (hook_name, restore)])

    # Step 3: the metric
    metric_fn = make_metric(noised, metric, clean_logits[noised.index, noised.answer_pos])
    return metric_fn(logits[noised.index, noised.answer_pos], noised.index)


#%% Attention knock-out
@t.no_grad()
def attention_knock_out(model: nn.Module, pairs: Pairs, layers: Iterable[int], mask: Tensor, metric: str) -> Tensor:
    """
    Metric (pair) of clean runs in which, in these layers, no head attends from the answer's position to the positions
    of mask (pair, pos) (Geva et al. 2023).
    """
    position = t.arange(pairs.clean.shape[1], device=mask.device)
    is_answer = position == pairs.answer_pos[:, None]
    hidden = is_answer[:, :, None] & mask[:, None, :]  # (pair, query, key)

    def hide(scores: Tensor, hook: nn.Module) -> Tensor:
        return scores.masked_fill(hidden[:, None], t.finfo(scores.dtype).min)  # (pair, head, query, key)

    resid = inputs(model, pairs, "clean")
    scores_hooks = [act_name("attn_scores", layer) for layer in layers]
    clean_logits = run_from(model, resid, pairs.answer_pos)
    logits = run_from(model, resid, pairs.answer_pos, layer=0, fwd_hooks=[(scores_hooks, hide)])
    return make_metric(pairs, metric, clean_logits)(logits, pairs.index)


def knock_out(
    model: nn.Module, pairs: Pairs, layers: Iterable[int], mask: Tensor, metric: str, memory_gb: float = 1.0
) -> Tensor:
    """attention_knock_out in groups of pairs that fit into memory."""
    layers = list(layers)

    def of_group(group: Pairs) -> Tensor:
        return attention_knock_out(model, group, layers, group.places["hidden"], metric)

    masked = replace(pairs, places={"hidden": mask})
    return t.cat(by_groups(of_group, masked, rows_that_fit(model, mask.shape[1], memory_gb)))


#%% Patchscopes: an activation moved into another prompt, and what the model makes of it there
def patchscope(model: nn.Module, x: Tensor, layer: int, target: Tensor, position: int) -> Tensor:
    """
    Logits (row, d_vocab) at the end of a target prompt (pos), whose stream after `layer` blocks is x (row, d_model) at
    one position. Ghandeharioun et al. 2024.
    """
    stream = layer_streams(model)[layer]
    with t.no_grad():
        _, cache = run_with_cache(model, target[None], stream)
    resid = cache[stream].expand(len(x), -1, -1).clone()
    resid[:, position] = x
    at_the_end = t.full((len(x),), len(target) - 1, device=x.device)
    return run_from(model, resid, at_the_end, layer)


#%% Edits of an activation by a function, and what they cost in loss over text
def put(new: Callable[[Tensor], Tensor], first: int = 0) -> Callable:
    """A hook that puts new(x) in the place of x (batch, pos, d_in), from position `first` on."""

    def fn(x: Tensor, hook: nn.Module) -> Tensor:
        replaced = new(x.flatten(2).float()).view_as(x).to(x.dtype)
        return t.cat([x[:, :first], replaced[:, first:]], 1)

    return fn


@t.no_grad()
def loss_of(model: nn.Module, rows: Tensor, edits: list[tuple], batch: int = 64) -> float:
    """Mean next-token cross-entropy in nats."""

    def summed_loss(part: Tensor) -> float:
        return next_token_loss(run_with_hooks(model, part, edits), part, "sum").item()

    return sum(in_batches(summed_loss, rows, batch)) / rows[:, 1:].numel()
