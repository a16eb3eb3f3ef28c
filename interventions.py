"""What changes a hooked model: prompt pairs and their metrics, activation patching, ablations, attention knock-out."""

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

from utils import BRIEF, fail
from hooks import (
    act_name,
    blocks_of,
    device_of,
    in_batches,
    is_streamed,
    cache_from_resid,
    rows_that_fit,
    run_from,
    run_with_hooks,
)
from weights import encode, token_text
from world import DRAW, fact_prompts, read_countries

import torch as t
from torch import Tensor
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


#%% Prompt pairs: clean and corrupt in as many tokens, an answer and a wrong answer of one token each, and names for their positions
@dataclass
class Pairs:
    """clean, corrupt (pair, pos), padded on the right; answer, wrong (pair) tokens, read at position at (pair). places: named masks (pair, pos)."""

    clean: Tensor
    corrupt: Tensor
    answer: Tensor
    wrong: Tensor
    answer_pos: Tensor
    places: dict[str, Tensor] = field(default_factory=dict)
    corrupt_resid: Tensor | None = None  # (pair, pos, d_model) enters layer 0 in place of corrupt's embeddings

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def index(self) -> Tensor:
        return t.arange(len(self), device=self.answer_pos.device)

    def take(self, index: Tensor | slice) -> "Pairs":
        """Some of the pairs, cut behind the last answer."""
        cut = lambda x: None if x is None else x[index, : int(self.answer_pos[index].max()) + 1]
        return Pairs(
            cut(self.clean),
            cut(self.corrupt),
            self.answer[index],
            self.wrong[index],
            self.answer_pos[index],
            {name: cut(mask) for name, mask in self.places.items()},
            cut(self.corrupt_resid),
        )


def pair_error(model: nn.Module, clean: str, corrupt: str, *answers: str) -> str | None:
    """What keeps the texts from being a pair, in one line."""
    first, second = encode(model, clean), encode(model, corrupt)
    if len(first) != len(second):
        return f"clean has {len(first)} tokens, corrupt {len(second)}: {[token_text(model, i) for i in first]} against {[token_text(model, i) for i in second]}; reword one of them"
    for answer in answers:
        if (whole := encode(model, clean + answer))[:-1] != first:
            return f"the answer {answer!r} is not one token after {clean!r}: the text with it ends in {[token_text(model, i) for i in whole[-3:]]}; a word begins with a space, {' ' + answer.strip()!r}"
    return None


def make_pairs(model: nn.Module, rows: list[tuple[str, str, str, str]]) -> Pairs:
    """rows of (clean, corrupt, answer, wrong), sorted by length."""
    for i, row in enumerate(rows):
        if error := pair_error(model, *row):
            fail(f"pair {i + 1}: {error}")
    ids = sorted(
        (
            [encode(model, text) for text in (clean, corrupt, clean + answer, clean + wrong)]
            for clean, corrupt, answer, wrong in rows
        ),
        key=lambda row: len(row[0]),
    )
    clean, corrupt = (
        t.tensor([row[i] + row[i][:1] * (len(ids[-1][0]) - len(row[i])) for row in ids], device=device_of(model))
        for i in (0, 1)
    )
    if clean.equal(corrupt):
        fail("clean and corrupt are the same: there is nothing to patch")
    pairs = Pairs(
        clean,
        corrupt,
        *(clean.new_tensor([row[i][-1] for row in ids]) for i in (2, 3)),
        clean.new_tensor([len(row[0]) - 1 for row in ids]),
    )
    return replace(pairs, places=find_places(pairs))


def find_places(pairs: Pairs) -> dict[str, Tensor]:
    """Masks that share out the positions up to the answer: IO, S1, S1+1, S2 where the wrong name stands twice and corrupt has the answer's there; else by what changed."""
    position, changed, end = (
        t.arange(pairs.clean.shape[1], device=pairs.answer_pos.device),
        pairs.clean != pairs.corrupt,
        pairs.answer_pos[:, None],
    )
    begin = changed.float().argmax(1, keepdim=True)
    io, s1 = (
        (pairs.clean == name[:, None]).float().argmax(1, keepdim=True) == position
        for name in (pairs.answer, pairs.wrong)
    )
    s2 = changed & (pairs.clean == pairs.wrong[:, None]) & (pairs.corrupt == pairs.answer[:, None]) & ~s1
    if s2.any(1).all() and (io & (position < begin)).any(1).all():
        named = {
            "IO": io,
            "S1": s1,
            "S1+1": F.pad(s1[:, :-1], (1, 0)),
            "S2": s2,
            "end": position == end,
            "before S2": position < begin,
            "after S2": (position > begin) & (position < end),
        }
    else:
        named = {
            "changed": changed & (position != end),
            "end": position == end,
            "before": position < begin,
            "between": (position > begin) & (position < end),
        }
    taken = t.zeros_like(changed)
    for name, mask in named.items():
        named[name], taken = mask & ~taken, taken | mask
    return {
        name: mask
        for name, mask in sorted(named.items(), key=lambda item: ((item[1] * position).sum() / item[1].sum()).item())
        if mask.any()
    }


def position_masks(pairs: Pairs, positions: Iterable[int] = ()) -> dict[str, Tensor]:
    """One place for each of these positions, or for every one."""
    T = pairs.clean.shape[1]
    if outside := [p for p in positions if not 0 <= p < T]:
        fail(f"position {outside[0]} is outside the sequence, whose positions are 0 to {T - 1}")
    return {
        str(p): (t.arange(T, device=pairs.answer_pos.device) == p).expand(len(pairs), T) for p in positions or range(T)
    }


def draw_pairs(model: nn.Module, task: str, n: int, seed: int) -> Pairs:
    """n pairs of a task whose texts and answers fit the model's tokenizer; names, nouns and years in combinations held out of models/world's training."""
    rng, rows = Random(seed), []
    facts = [fact for fact in fact_prompts(read_countries(), "forward") if fact.taught] if task == "capitals" else []
    for _ in range(100 * n):
        prompt = rng.choice(facts) if facts else DRAW[task](rng, True)
        other = (
            rng.choice([fact for fact in facts if fact.labels["phrasing"] == prompt.labels["phrasing"]])
            if facts
            else None
        )  # the same phrasing about another country
        row = (
            (prompt.text, other.text, prompt.answer, other.answer)
            if other
            else (prompt.text, prompt.corrupt, prompt.answer, prompt.wrong)
        )
        if len(set(row)) == 4 and not pair_error(model, *row):
            rows.append(row)
        if len(rows) == n:
            return make_pairs(model, rows)
    fail(
        f"only {len(rows)} of {n} {task} pairs fit this tokenizer (answers of one token, both texts of one length): give your own with --pairs"
    )


def read_pairs(path: str) -> list[tuple[str, str, str, str]]:
    """Rows of a CSV file with the columns clean, corrupt, answer, wrong, or of a JSON list of such objects."""
    names = ("clean", "corrupt", "answer", "wrong")
    try:
        rows = (
            json.loads(Path(path).read_text())
            if path.endswith(".json")
            else list(csv.DictReader(Path(path).read_text().splitlines()))
        )
    except (OSError, json.JSONDecodeError) as error:
        fail(f"--pairs {path} cannot be read: {error}")
    if bad := [i for i, row in enumerate(rows or [{}]) if not all(name in row and row[name] for name in names)]:
        fail(f"--pairs {path}: row {bad[0] + 1} lacks one of the columns {', '.join(names)}")
    return [tuple(row[name] for name in names) for row in rows]


def inputs(model: nn.Module, pairs: Pairs, which: str) -> Tensor:
    """What enters layer 0 in the clean or the corrupt run."""
    return (
        pairs.corrupt_resid
        if which == "corrupt" and pairs.corrupt_resid is not None
        else model(getattr(pairs, which), stop_at_layer=0)
    )


def by_groups[Out](fn: Callable[[Pairs], Out], pairs: Pairs, most: int) -> list[Out]:
    """fn of the pairs in groups of at most `most`, of fewer where memory does not suffice."""
    return list(in_batches(lambda index: fn(pairs.take(index)), pairs.index, most))


#%% Metrics: one number per row, from its logits where the answer is due
def make_metric(pairs: Pairs, kind: str, clean_logits: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """fn(logits (row, d_vocab), pair (row)) -> (row): logit_diff (answer - wrong), log_prob of the answer, or kl from clean_logits (pair, d_vocab)."""

    def metric(logits: Tensor, pair: Tensor) -> Tensor:
        pick, logits = lambda x, ids: x.gather(-1, ids[pair, None])[:, 0], logits.float()
        if kind == "logit_diff":
            return pick(logits, pairs.answer) - pick(logits, pairs.wrong)
        if kind == "log_prob":
            return pick(logits.log_softmax(-1), pairs.answer)
        return F.kl_div(
            logits.log_softmax(-1), clean_logits.float().log_softmax(-1)[pair], log_target=True, reduction="none"
        ).sum(-1)

    return metric


def normalised(values: Tensor, clean: Tensor, corrupt: Tensor) -> Tensor:
    """Means over the last axis (pair), on the CPU, as a share of the way from corrupt (0) to clean (1)."""
    if abs(gap := (clean.mean() - corrupt.mean()).item()) < 1e-6:
        fail(
            "clean and corrupt give the same metric, so there is nothing to normalise by: choose pairs whose answers differ"
        )
    return ((values.mean(-1) - corrupt.mean()) / gap).cpu()


@t.no_grad()
def baselines(model: nn.Module, pairs: Pairs, kind: str, memory_gb: float = 1.0) -> tuple[Tensor, Tensor]:
    """Metric (pair) of the clean and of the corrupt run."""

    def ends(group: Pairs) -> Tensor:
        clean, corrupt = (
            run_from(model, inputs(model, group, which), group.answer_pos) for which in ("clean", "corrupt")
        )
        return t.stack([make_metric(group, kind, clean)(logits, group.index) for logits in (clean, corrupt)])

    return tuple(t.cat(by_groups(ends, pairs, rows_that_fit(model, pairs.clean.shape[1], memory_gb)), -1))


#%% Activation patching: one growing batch. The rows of a layer's cells join the two plain runs at that layer, so nothing below it is computed again
STREAM, HEADS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"), ("z", "q", "k", "v", "pattern")


@t.no_grad()
def sweep(
    model: nn.Module,
    pairs: Pairs,
    site: str,
    by: Literal["pos", "head", "head pos"] = "pos",
    kind: str = "logit_diff",
    direction: Literal["denoise", "noise"] = "denoise",
    places: dict[str, Tensor] | None = None,
    memory_gb: float = 1.0,
    skip: bool = True,
) -> Tensor:
    """
    Metric (layer, place, pair), (layer, head, pair) or (layer, head, place, pair) after patching `site` of one layer, there alone: clean activations into the
    corrupt run (denoise) or the other way round (noise). places: masks (pair, pos), default every position; of a pattern the query is placed. k and v have as
    many heads as keys. Activations stay within memory_gb, however many the pairs. skip: cells before a pair's first difference are not run, as nothing differs.
    """
    n_rows = rows_that_fit(model, pairs.clean.shape[1], memory_gb)
    places = {"all": t.ones_like(pairs.clean, dtype=t.bool)} if by == "head" else places or position_masks(pairs)
    if bad := [name for name, mask in places.items() if mask.shape != pairs.clean.shape]:
        fail(f"place {bad[0]!r} is not a mask of {tuple(pairs.clean.shape)} (pair, pos)")
    if len(pairs) > (most := max(1, n_rows // 16)):
        return t.cat(
            by_groups(
                lambda part: sweep(model, part, site, by, kind, direction, part.places, memory_gb, skip),
                replace(pairs, places=places),
                most,
            ),
            -1,
        )
    # the rows of a batch: B plain runs to be patched, B plain runs to be patched from, then the cells of layer 0, of layer 1 ...
    B, n_layers, position, masks = (
        len(pairs),
        model.cfg.n_layers,
        t.arange(pairs.clean.shape[1], device=pairs.answer_pos.device),
        t.stack(list(places.values())),
    )
    resid = t.cat(
        [
            inputs(model, pairs, which)
            for which in (("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt"))
        ]
    )
    n_heads = 1 if by == "pos" else model.blocks[0].attn.W_K.shape[0] if site in ("k", "v") else model.cfg.n_heads
    layer, head, place, pair = (
        x.flatten()
        for x in t.meshgrid(
            *(t.arange(n, device=position.device) for n in (n_layers, n_heads, len(masks), B)), indexing="ij"
        )
    )
    reach = ((resid[:B] != resid[B:]).any(-1).cumsum(1) > 0) & (
        position <= pairs.answer_pos[:, None]
    )  # behind the answer nothing matters either
    touched = masks & reach if skip else masks
    first, needed = touched.float().argmax(-1)[place, pair], (touched.any(-1)[place, pair] | (not skip)).nonzero()[:, 0]

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Metric of the runs to be patched, and of these rows."""
        joins = {l: rows[layer[rows] == l] for l in layer[rows].unique().tolist()}
        who, changed, now, seen = (
            t.cat([pairs.index] * 2),
            t.ones(2 * B, len(position), dtype=t.bool, device=position.device),
            0,
            (),
        )  # each row's pair, what may differ in it, the layer the batch is in

        def enter(l: int, x: Tensor) -> Tensor:
            nonlocal who, changed, now
            now, new = l, pair[joins[l]] if l in joins else pair[:0]
            if l in joins:
                who, changed = (
                    t.cat([who, new]),
                    t.cat([changed, (position >= first[joins[l], None]) & (position <= pairs.answer_pos[new, None])]),
                )
            return t.cat([x, x[new]])

        def patch(
            x: Tensor, hook: nn.Module
        ) -> None:  # in place: a bridge's hook_resid_mid hands out what the MLP reads, which is the stream itself
            cells = joins[now]
            where, own = (
                masks[place[cells], pair[cells]],
                (t.arange(n_heads, device=x.device) == head[cells, None]) | (by == "pos"),
            )
            where = (
                where[:, None, :, None] & own[:, :, None, None]
                if site == "pattern"
                else (where[:, :, None] & own[:, None])[..., None]
                if x.ndim == 4
                else where[..., None]
            )
            x[-len(cells) :] = t.where(where, x[B + pair[cells]], x[-len(cells) :])

        def cut(
            l: int, x: Tensor
        ) -> Tensor:  # the MLP sees the positions that may differ, in the last layer the answer's; the others keep the plain run's output
            nonlocal seen
            seen = (changed if l < n_layers - 1 else position == pairs.answer_pos[who, None]).nonzero(as_tuple=True)
            return x[seen][None]

        def back(l: int, out: Tensor) -> Tensor:
            full = out.new_zeros(*changed.shape, out.shape[-1]).index_put_(seen, out[0])
            if l < n_layers - 1:
                full[2 * B :] = t.where(changed[2 * B :, :, None], full[2 * B :], full[who[2 * B :]])
            return full

        inner = [(block, "in", partial(enter, l)) for l, block in enumerate(blocks_of(model))]
        if "mlp" not in act_name(site, 0) and not is_streamed(model):
            inner += [
                (model.blocks[l].mlp, side, partial(fn, l))
                for l in range(n_layers)
                for side, fn in (("in", cut), ("out", back))
            ]
        logits = run_from(
            model,
            resid,
            lambda: pairs.answer_pos[who],
            0,
            [([act_name(site, l) for l in joins], patch)] if joins else [],
            inner,
        )
        metric = make_metric(pairs, kind, logits[B : 2 * B] if direction == "denoise" else logits[:B])
        return metric(logits[:B], pairs.index), metric(logits[2 * B :], who[2 * B :])

    plain, patched = zip(
        *(in_batches(run, needed, max(1, n_rows - 2 * B), f"patching {site}") if len(needed) else [run(needed)])
    )
    table = plain[0][pair].index_put((needed,), t.cat(patched)).view(n_layers, n_heads, len(masks), B)
    return {"pos": table[:, 0], "head": table[:, :, 0], "head pos": table}[by]


#%% Ablations: a part is zeroed, set to its mean, to another row's value, or drowned in noise
class Part(NamedTuple):
    """Of `site` in a layer: of the change (row, pos, ...) that an ablation makes there, keep lets only the part's own through."""

    site: str
    layer: int
    keep: Callable[[Tensor], Tensor] = lambda change: change


@t.no_grad()
def ablation_effects(
    model: nn.Module,
    pairs: Pairs,
    rows: Tensor,
    ablations: list[tuple[Part, str, float]],
    kind: str,
    memory_gb: float = 1.0,
) -> list[tuple[float, float]]:
    """
    For each (part, how, sigma): the share of the clean metric lost, and the loss added on text rows (row, pos) in nats per token. how: zero; mean over the text;
    resample (the row before, same position); noise (sigma standard deviations over the text).
    """
    streams, names = (
        [act_name("resid_pre", l) for l in range(model.cfg.n_layers)],
        {
            how: list(dict.fromkeys(act_name(part.site, part.layer) for part, h, _ in ablations if how in (h, "any")))
            for how in ("any", "resample")
        },
    )
    enter, widths = (
        lambda tokens: model(tokens, stop_at_layer=0),
        cache_from_resid(model, model(rows[:1], stop_at_layer=0), rows.new_zeros(1), [*streams, *names["any"]])[1],
    )
    floats = 2 * sum(x[0, 0].numel() for x in widths.values())

    def moments(part: Tensor) -> dict[str, Tensor]:
        """{hook: (mean and mean square, ...)} over text."""
        _, seen = cache_from_resid(model, enter(part), part.new_zeros(len(part)), names["any"])
        return {
            name: t.stack([x[:, 1:].float().pow(power).mean((0, 1)) for power in (1, 2)]) * len(part) / len(rows)
            for name, x in seen.items()
        }

    def scores(tokens: Tensor, at: Tensor, whole: bool, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(1 + ablation) score of the first half of the rows, unchanged and ablated; the other half is resampled from."""
        n = len(tokens) // 2
        (logits, seen), (_, other) = (
            cache_from_resid(model, enter(tokens[:n]), at[:n], streams),
            cache_from_resid(model, enter(tokens[n:]), at[n:], names["resample"]),
        )

        def run(part: Part, how: str = "none", sigma: float = 0.0) -> Tensor:
            name = act_name(part.site, part.layer)

            def change(x: Tensor, hook: nn.Module) -> Tensor:
                new = {
                    "none": lambda: x,
                    "zero": lambda: 0 * x,
                    "mean": lambda: mean[name].to(x),
                    "resample": lambda: other[name],
                    "noise": lambda: x + sigma * std[name].to(x) * t.randn_like(x),
                }[how]()
                return x + part.keep(new - x)

            return score(
                run_from(model, seen["resid_pre", part.layer], None if whole else at[:n], part.layer, [(name, change)]),
                logits,
            )

        return t.stack(
            [run(Part("resid_pre", 0)), *(run(*ablation) for ablation in tqdm(ablations, desc="ablations", **BRIEF))]
        )

    def of_pairs(index: Tensor) -> Tensor:
        group, both = pairs.take(index), pairs.take(t.cat([index, index - 1]))
        return scores(
            both.clean,
            both.answer_pos,
            False,
            lambda answers, plain: make_metric(group, kind, plain)(answers, group.index).sum(),
        ) / len(pairs)

    def of_text(index: Tensor) -> Tensor:
        both = rows[t.cat([index, index - 1])]
        return (
            scores(
                both,
                both.new_zeros(len(both)),
                True,
                lambda said, _: F.cross_entropy(
                    said[:, :-1].flatten(0, 1).float(), both[: len(index), 1:].flatten(), reduction="sum"
                ),
            )
            / rows[:, 1:].numel()
        )

    summed = list(in_batches(moments, rows, rows_that_fit(model, rows.shape[1], memory_gb, floats)))
    mean, square = ({name: sum(part[name][i] for part in summed) for name in names["any"]} for i in (0, 1))
    std = {name: (square[name] - mean[name].pow(2)).clamp(min=0).sqrt() for name in mean}
    metric = sum(in_batches(of_pairs, pairs.index, rows_that_fit(model, pairs.clean.shape[1], memory_gb, floats)))
    loss = sum(
        in_batches(
            of_text,
            t.arange(len(rows), device=rows.device),
            rows_that_fit(model, rows.shape[1], memory_gb, floats + 4 * model.cfg.d_vocab),
        )
    )
    return list(zip((1 - metric[1:] / metric[0]).tolist(), (loss[1:] - loss[0]).tolist()))


@t.no_grad()
def fine_parts(model: nn.Module, pairs: Pairs, layer: int, memory_gb: float = 1.0) -> dict[str, Part]:
    """Neurons of an MLP by how far clean and corrupt differ there at the answer's position x ||W_out||, and the direction in which the stream before it differs most; beside random ones."""

    def differ(group: Pairs) -> tuple[Tensor, Tensor]:
        (_, clean), (_, corrupt) = (
            cache_from_resid(
                model,
                inputs(model, group, which),
                group.answer_pos,
                [act_name(x, layer) for x in ("post", "resid_pre")],
            )
            for which in ("clean", "corrupt")
        )
        return tuple(
            (clean[x, layer] - corrupt[x, layer])[group.index, group.answer_pos].float() for x in ("post", "resid_pre")
        )

    neurons, stream = map(t.cat, zip(*by_groups(differ, pairs, rows_that_fit(model, pairs.clean.shape[1], memory_gb))))
    order, top = (
        (neurons.abs().mean(0) * model.blocks[layer].mlp.W_out.float().norm(dim=-1)).argsort(descending=True),
        t.linalg.svd(stream)[2][0],
    )
    parts = {
        f"L{layer}: {n} {title} neurons": Part("post", layer, partial(t.mul, F.one_hot(ids[:n], len(ids)).sum(0)))
        for title, ids in (("strongest", order), ("random", t.randperm(len(order)).to(order.device)))
        for n in (1, 4, 16, 64)
    }
    onto = lambda v: lambda change: (change @ v.to(change))[..., None] * v.to(change)
    return parts | {
        f"before L{layer}: {title}": Part("resid_pre", layer, onto(v / v.norm()))
        for title, v in (("direction of largest difference", top), ("random direction", t.randn(len(top))))
    }


#%% Attention knock-out
@t.no_grad()
def knock_out(
    model: nn.Module, pairs: Pairs, layers: Iterable[int], mask: Tensor, kind: str, memory_gb: float = 1.0
) -> Tensor:
    """Metric (pair) of clean runs in which, in these layers, no head attends from the answer's position to the positions of mask (pair, pos) (Geva et al. 2023)."""

    def blind(group: Pairs) -> Tensor:
        query, resid = (
            t.arange(group.clean.shape[1], device=mask.device) == group.answer_pos[:, None],
            inputs(model, group, "clean"),
        )

        def hide(scores: Tensor, hook: nn.Module) -> Tensor:
            return scores.masked_fill((query[:, :, None] & group.places["hidden"][:, None])[:, None], -1e9)

        return make_metric(group, kind, run_from(model, resid, group.answer_pos))(
            run_from(model, resid, group.answer_pos, 0, [([act_name("attn_scores", l) for l in layers], hide)]),
            group.index,
        )

    return t.cat(
        by_groups(blind, replace(pairs, places={"hidden": mask}), rows_that_fit(model, mask.shape[1], memory_gb))
    )


#%% Edits of an activation by a function, and what they cost in loss over text
def put(new: Callable[[Tensor], Tensor], first: int = 0) -> Callable:
    """A hook that puts new(x) in the place of x (batch, pos, d_in), from position `first` on."""

    def fn(x: Tensor, hook: nn.Module) -> Tensor:
        return t.cat([x[:, :first], new(x.flatten(2).float()).view_as(x).to(x.dtype)[:, first:]], 1)

    return fn


@t.no_grad()
def loss_of(model: nn.Module, rows: Tensor, edits: list[tuple], batch: int = 64) -> float:
    """Mean next-token cross-entropy in nats."""
    losses = in_batches(
        lambda part: F.cross_entropy(
            run_with_hooks(model, part, edits)[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"
        ).item(),
        rows,
        batch,
    )
    return sum(losses) / rows[:, 1:].numel()
