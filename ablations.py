"""Ablations: a part zeroed, set to its mean, to another row's value or drowned in noise, and what text loses by it."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from utils import BRIEF, fail  # first: sets OpenMP's variables before torch is loaded
from hooks import act_name, cache_from_resid, in_batches, rows_that_fit, run_from, run_with_cache, run_with_hooks
from layers import next_token_loss
from pairs import Pairs, baselines, by_groups, inputs, make_metric, normalised

import torch as t
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


#%% Ablations, the plain form: a part is zeroed, set to its mean, to another row's value, or drowned in noise
class Part(NamedTuple):
    """
    Of `site` in a layer: of the change (row, pos, ...) that an ablation makes there, keep lets only the part's own
    through.
    """

    site: str
    layer: int
    keep: Callable[[Tensor], Tensor] = lambda change: change

    @property
    def hook_name(self) -> str:
        return act_name(self.site, self.layer)


class Moments(NamedTuple):
    """Mean and standard deviation over text of an activation at one position (...)."""

    mean: Tensor
    std: Tensor


def ablated(x: Tensor, how: str, moments: Moments | None, other: Tensor | None, sigma: float = 1.0) -> Tensor:
    """
    What an ablation puts in the place of x (row, pos, ...). mean and noise need moments over text, resample needs
    another run's activation.
    """
    if how == "zero":
        return t.zeros_like(x)
    if how == "mean":
        return moments.mean.to(x)
    if how == "resample":
        return other
    if how == "noise":
        return x + sigma * moments.std.to(x) * t.randn_like(x)
    raise ValueError(f"unknown ablation {how!r}")


@t.no_grad()
def ablate(model: nn.Module, tokens: Tensor, part: Part, text: Tensor, how: str, sigma: float = 1.0) -> Tensor:
    """
    Logits (row, pos, d_vocab) of a run in which a part is ablated. how: zero; mean over text (row, pos); resample,
    the row before at the same position (Chan et al. 2022); noise of sigma standard deviations over text. The first
    position of text, which attends only to itself, is left out.
    """
    _, text_cache = run_with_cache(model, text, part.hook_name)
    over_text = text_cache[part.hook_name][:, 1:].float()
    moments = Moments(over_text.mean((0, 1)), over_text.std((0, 1), correction=0))
    _, other_cache = run_with_cache(model, tokens.roll(1, 0), part.hook_name)
    other = other_cache[part.hook_name]

    def change(x: Tensor, hook: nn.Module) -> Tensor:
        new = ablated(x, how, moments, other, sigma)
        return x + part.keep(new - x)

    return run_with_hooks(model, tokens, [(part.hook_name, change)])


mean_ablation = partial(ablate, how="mean")  # (Wang et al. 2022)


#%% Ablations, the fast form: many of them on the same rows, each from its own layer on
class AblatedRuns:
    """
    Runs of the same tokens (row, pos) with one ablation each. The plain run leaves the stream before every layer, and
    an ablation's run starts from it at its own layer. Logits are (row, d_vocab) at answer_pos, or (row, pos, d_vocab)
    where that is None. other_tokens: the rows to resample from.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        other_tokens: Tensor,
        answer_pos: Tensor | None,
        moments: dict[str, Moments],
        resampled_hooks: list[str],
    ):
        self.model = model
        self.answer_pos = answer_pos
        self.moments = moments
        streams = [act_name("resid_pre", layer) for layer in range(model.cfg.n_layers)]
        unembedded = tokens.new_zeros(len(tokens)) if answer_pos is None else answer_pos
        self.logits, self.cache = cache_from_resid(model, model(tokens, stop_at_layer=0), unembedded, streams)
        self.other = {}
        if resampled_hooks:
            resid = model(other_tokens, stop_at_layer=0)
            _, self.other = cache_from_resid(model, resid, unembedded, resampled_hooks)

    def plain(self) -> Tensor:
        return run_from(self.model, self.cache["resid_pre", 0], self.answer_pos)

    def ablate(self, part: Part, how: str, sigma: float) -> Tensor:
        moments = self.moments[part.hook_name]
        other = self.other[part.hook_name] if how == "resample" else None

        def change(x: Tensor, hook: nn.Module) -> Tensor:
            new = ablated(x, how, moments, other, sigma)
            return x + part.keep(new - x)

        resid = self.cache["resid_pre", part.layer]
        return run_from(self.model, resid, self.answer_pos, part.layer, fwd_hooks=[(part.hook_name, change)])

    def scores(self, ablations: list[tuple[Part, str, float]], score: Callable[[Tensor], Tensor]) -> Tensor:
        """(1 + ablation, ...) score of the plain run's logits, and of each ablation's."""
        values = [score(self.plain())]
        for part, how, sigma in tqdm(ablations, desc="ablations", **BRIEF):
            values.append(score(self.ablate(part, how, sigma)))
        return t.stack(values)


@t.no_grad()
def ablation_effects(
    model: nn.Module,
    pairs: Pairs,
    rows: Tensor,
    ablations: list[tuple[Part, str, float]],
    metric: str,
    memory_gb: float = 1.0,
) -> list[tuple[float, float]]:
    """
    For each ablation (part, how, sigma; see ablate), whose means and deviations are over text rows (row, pos): the
    share of the metric lost (0 = clean, 1 = corrupt: see normalised), and the loss added on that text in nats per
    token. resample takes the row before, same position (beyond a shorter prompt's end that is its filler).
    """
    if min(len(pairs), len(rows)) < 2 and any(how == "resample" for _, how, _ in ablations):
        fail("resample takes what another pair, or another row of text, has there, and there is one pair or one row")
    ablated_hooks = unique(part.hook_name for part, _, _ in ablations)
    resampled_hooks = unique(part.hook_name for part, how, _ in ablations if how == "resample")
    floats = 2 * cached_floats(model, rows, ablated_hooks)
    pairs_at_once = rows_that_fit(model, pairs.clean.shape[1], memory_gb, floats)
    text_at_once = rows_that_fit(model, rows.shape[1], memory_gb, floats)
    scored_text_at_once = rows_that_fit(model, rows.shape[1], memory_gb, floats + 4 * model.cfg.d_vocab)
    moments = moments_over_text(model, rows, ablated_hooks, text_at_once)

    def metric_of_pairs(index: Tensor) -> Tensor:
        """(run, pair); the pairs before these are resampled from."""
        group = pairs.take(index)
        both = pairs.take(t.cat([index, index - 1]))
        tokens, other_tokens = both.clean.split(len(index))
        runs = AblatedRuns(model, tokens, other_tokens, group.answer_pos, moments, resampled_hooks)
        metric_fn = make_metric(group, metric, runs.logits)

        def score(logits: Tensor) -> Tensor:
            return metric_fn(logits, group.index)

        return runs.scores(ablations, score)

    def loss_of_text(index: Tensor) -> Tensor:
        """Summed over these rows; the rows before them are resampled from."""
        tokens = rows[index]
        runs = AblatedRuns(model, tokens, rows[index - 1], None, moments, resampled_hooks)

        def score(logits: Tensor) -> Tensor:
            return next_token_loss(logits, tokens, "sum")

        return runs.scores(ablations, score) / rows[:, 1:].numel()

    metric_by_run = t.cat(list(in_batches(metric_of_pairs, pairs.index, pairs_at_once)), -1)
    clean, corrupt = baselines(model, pairs, metric, memory_gb)
    loss_by_run = sum(in_batches(loss_of_text, t.arange(len(rows), device=rows.device), scored_text_at_once))
    metric_lost = (1 - normalised(metric_by_run[1:], clean, corrupt)).tolist()
    nats_added = (loss_by_run[1:] - loss_by_run[0]).tolist()
    return list(zip(metric_lost, nats_added))


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def cached_floats(model: nn.Module, rows: Tensor, names: list[str]) -> int:
    """Numbers per position that the stream before every layer and the named activations hold."""
    streams = [act_name("resid_pre", layer) for layer in range(model.cfg.n_layers)]
    resid = model(rows[:1], stop_at_layer=0)
    _, cache = cache_from_resid(model, resid, rows.new_zeros(1), [*streams, *names])
    return sum(x[0, 0].numel() for x in cache.values())


def moments_over_text(model: nn.Module, rows: Tensor, names: list[str], at_once: int) -> dict[str, Moments]:
    """Of each named activation, over rows (row, pos) without the first position, which attends only to itself."""

    def share_of_sums(part: Tensor) -> dict[str, Tensor]:
        """{hook: (mean and mean square, ...)}, weighted by the share of rows."""
        resid = model(part, stop_at_layer=0)
        _, cache = cache_from_resid(model, resid, part.new_zeros(len(part)), names)
        sums = {}
        for name, x in cache.items():
            x = x[:, 1:].float().contiguous()
            sums[name] = t.stack([x.mean((0, 1)), x.pow(2).mean((0, 1))]) * len(part) / len(rows)
        return sums

    shares = list(in_batches(share_of_sums, rows, at_once))
    moments = {}
    for name in names:
        mean, mean_square = sum(share[name] for share in shares)
        moments[name] = Moments(mean, (mean_square - mean.pow(2)).clamp(min=0).sqrt())
    return moments


#%% Parts finer than a head or an MLP: neurons and directions
@t.no_grad()
def fine_parts(model: nn.Module, pairs: Pairs, layer: int, memory_gb: float = 1.0) -> dict[str, Part]:
    """
    Neurons of an MLP by how far clean and corrupt differ there at the answer's position x ||W_out||, and the
    direction in which the stream before it differs most; beside random ones. None for a mixture of experts.
    """
    if not hasattr(model.blocks[layer].mlp, "W_out"):
        return {}  # a mixture of experts has no one list of neurons
    neuron_gap, stream_gap = differences_at_answer(model, pairs, ["post", "resid_pre"], layer, memory_gb)
    strength = neuron_gap.abs().mean(0) * model.blocks[layer].mlp.W_out.float().norm(dim=-1)
    strongest = strength.argsort(descending=True)
    shuffled = t.randperm(len(strongest)).to(strongest.device)
    parts = {}
    for title, neurons in (("strongest", strongest), ("random", shuffled)):
        for n in (1, 4, 16, 64):
            of_these = F.one_hot(neurons[:n], len(neurons)).sum(0)
            parts[f"L{layer}: {n} {title} neurons"] = Part("post", layer, partial(t.mul, of_these))
    largest = t.linalg.svd(stream_gap, full_matrices=False)[2][0]
    at_random = t.randn(len(largest))
    for title, direction in (("direction of largest difference", largest), ("random direction", at_random)):
        parts[f"before L{layer}: {title}"] = Part("resid_pre", layer, partial(along, direction / direction.norm()))
    return parts


def differences_at_answer(
    model: nn.Module, pairs: Pairs, sites: list[str], layer: int, memory_gb: float
) -> list[Tensor]:
    """For each site: clean - corrupt (pair, d) where the answer is due."""
    names = [act_name(site, layer) for site in sites]

    def differences(group: Pairs) -> list[Tensor]:
        _, clean = cache_from_resid(model, inputs(model, group, "clean"), group.answer_pos, names)
        _, corrupt = cache_from_resid(model, inputs(model, group, "corrupt"), group.answer_pos, names)
        return [(clean[name] - corrupt[name])[group.index, group.answer_pos].float() for name in names]

    groups = by_groups(differences, pairs, rows_that_fit(model, pairs.clean.shape[1], memory_gb))
    return [t.cat(parts) for parts in zip(*groups)]


def along(direction: Tensor, change: Tensor) -> Tensor:
    """What of a change (row, pos, d_model) lies along a unit direction (d_model)."""
    direction = direction.to(change)
    return (change @ direction)[..., None] * direction
