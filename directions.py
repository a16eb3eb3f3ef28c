"""
Directions of the residual stream: read from texts that have something and texts that have not, added, clamped and
projected out while a model answers and goes on to write, and kept in files with where they come from.
"""

import math
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

from utils import fail, seed_of  # first: sets OpenMP's variables before torch is loaded
from hooks import (
    act_name,
    cache_from_resid,
    device_of,
    hook_points,
    hooks,
    in_batches,
    rows_that_fit,
    run_from,
    run_with_cache,
    run_with_hooks,
)
from layers import next_token_loss
from weights import encode, generate
from logit_attribution import layer_streams
from world import ANSWERS, DRAW, ENTITIES, RELATIONS, Prompt, fact_prompts, read_countries
from lens import kl_from
from pairs import entities_for, padded, read_table
from probes import fit_probe
from alignment import first_token, read_subspaces, save_subspaces

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from safetensors import SafetensorError
from torch import Tensor


#%% Contrasts: texts that have something and texts that have not
@dataclass
class Contrasts:
    """
    Texts that have something, and texts that have not; of each negative the words that a pushed model should say next
    (target) and those that it says by itself (other): none where that is not known.
    """

    positive: list[str]
    negative: list[str]
    target: list[tuple[str, ...]]
    other: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.negative)


def read_contrasts(path: str) -> Contrasts:
    """
    From a CSV file or a JSON list with the columns positive and negative, and if known target and other: words, | between
    several. A space is put before a word that has none.
    """
    rows = read_table(Path(path), "--contrasts")
    if not rows:
        fail(f"--contrasts {path} holds no row")
    columns: dict[str, list[str]] = {}
    for name in ("positive", "negative"):
        if name not in rows[0]:
            fail(f"--contrasts {path} has no column {name} among {', '.join(map(str, rows[0]))}")
        columns[name] = [str(row.get(name) or "") for row in rows]
        empty = [i + 1 for i, text in enumerate(columns[name]) if not text.strip()]
        if empty:
            fail(f"--contrasts {path}: row {empty[0]} lacks {name}")
    words = {}
    for name in ("target", "other"):
        cells = [str(row[name] or "") if name in row else "" for row in rows]
        words[name] = [spaced(cell.split("|")) for cell in cells]
    return Contrasts(columns["positive"], columns["negative"], words["target"], words["other"])


def read_texts(path: str, flag: str) -> list[str]:
    """The lines of a file, empty ones left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{flag} {path} cannot be read: {error}")
    texts = [line for line in lines if line.strip()]
    if not texts:
        fail(f"{flag} {path} holds no text: one a line")
    return texts


def spaced(words: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Words with a space before each, as they follow a text; empty ones left out."""
    return tuple(f" {word.strip()}" for word in words if word.strip())


#%% Contrasts of the world, whose answers are known: to a country, to women, to the plural
class Contrast(NamedTuple):
    """A text that has something, one that has not, and the words that each is answered with."""

    positive: str
    negative: str
    target: str
    other: str


def contrast_of(task: str, prompt: Prompt) -> Contrast:
    """Towards the woman, the plural, or (drawer_of_country) the country that the corrupt text names."""
    is_positive = prompt.labels.get("gender") == "woman" or prompt.labels.get("number") == "plural"
    if is_positive and task != "country":
        return Contrast(prompt.text, prompt.corrupt, prompt.answer, prompt.wrong)
    return Contrast(prompt.corrupt, prompt.text, prompt.wrong, prompt.answer)


def country_facts(held_out: bool) -> list[Prompt]:
    """Every taught fact about every country, in phrasings that are taught or held out."""
    facts = []
    for task in ("forward", *RELATIONS):
        facts += [fact for fact in fact_prompts(read_countries(), task, held_out) if fact.taught]
    return facts


def draw_contrasts(model: nn.Module, task: str, country: str, n: int, seed: int, role: str) -> Contrasts:
    """
    n different contrasts of the world: gender (women against men), number (plural against singular), country (one
    country against any other). Those to find on and those to test on share no name, noun or other country, and of
    countries no phrasing.
    """
    rng = Random(seed_of(seed, f"contrasts {role}"))
    if task == "country":
        draw = drawer_of_country(country, held_out=role == "test")
        entities = [row["country"] for row in read_countries() if row["country"] != country]
    else:
        kind = {"gender": "gender", "number": "agreement"}[task]
        draw = partial(DRAW[kind], held_out=True)
        entities = ENTITIES[kind]
    allowed = entities_for(role, entities, seed)
    drawn: dict[Contrast, None] = {}  # in the order in which they were drawn, each once
    for _ in range(100 * n):
        if len(drawn) == n:
            break
        prompt = draw(rng)
        contrast = contrast_of(task, prompt)
        if not allowed.issuperset(prompt.about) or contrast in drawn:
            continue
        if may_ask(model, contrast.negative, (contrast.target,), (contrast.other,)):
            drawn[contrast] = None
    if len(drawn) < n:
        fail(
            f"there are {len(drawn)} different contrasts of {task} to {role} on that fit this tokenizer, {n} were asked "
            f"for: ask for fewer, or give your own with --contrasts"
        )
    positive, negative, target, other = (list(column) for column in zip(*drawn))
    return Contrasts(positive, negative, [(word,) for word in target], [(word,) for word in other])


def drawer_of_country(country: str, held_out: bool) -> Callable[[Random], Prompt]:
    """Draws a fact about another country, whose corrupt text and wrong answer are about this one."""
    facts = country_facts(held_out)
    rows = {row["country"]: row for row in read_countries()}
    if country not in rows:
        fail(f"--country {country} is none of the {len(rows)} countries of models/world/countries.csv")
    known = {fact.labels["phrasing"] for fact in facts if fact.labels["country"] == country}
    others = [fact for fact in facts if fact.labels["country"] != country and fact.labels["phrasing"] in known]

    def draw(rng: Random) -> Prompt:
        fact = rng.choice(others)
        answer = ANSWERS.get(fact.task, fact.task)
        text, _ = fact.labels["phrasing"].split(f" {{{answer}}}")
        return replace(fact, corrupt=text.format(**rows[country]), wrong=f" {rows[country][answer]}")

    return draw


def may_ask(model: nn.Module, text: str, target: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """The classes begin with tokens of their own after the text, and no token stands in both."""
    targets = {first_token(model, text, word) for word in target}
    others = {first_token(model, text, word) for word in other}
    return None not in targets | others and not targets & others


#%% What a model has at the end of texts, or on average over them
@t.no_grad()
def streams_of(
    model: nn.Module, texts: list[str], names: list[str], place: str = "last", memory_gb: float = 1.0
) -> Tensor:
    """(hook, text, d_model) on the CPU: at a text's last token, or the mean over its tokens (beginning-of-text not)."""
    rows = [encode(model, text) for text in texts]
    tokens = padded(rows, device_of(model))
    last = t.tensor([len(row) - 1 for row in rows], device=tokens.device)
    first = len(encode(model, ""))  # 1 where a beginning-of-text token is put first

    def of_group(index: Tensor) -> Tensor:
        resid = model(tokens[index], stop_at_layer=0)
        _, cache = cache_from_resid(model, resid, last[index], names)
        x = t.stack([cache[name] for name in names]).float()  # (hook, text, pos, d_model)
        if place == "last":
            return x[:, range(len(index)), last[index]].cpu()
        position = t.arange(tokens.shape[1], device=tokens.device)
        inside = ((position >= first) & (position <= last[index, None])).float()
        return (einsum(x, inside, "hook text pos d, text pos -> hook text d") / inside.sum(1)[:, None]).cpu()

    at_once = rows_that_fit(model, tokens.shape[1], memory_gb, len(names) * model.cfg.d_model)
    index = t.arange(len(rows), device=tokens.device)
    return t.cat(list(in_batches(of_group, index, at_once)), 1)


#%% Ways from contrasts to a direction: positive and negative are (text, d), what comes out is (d) and has length 1
def mean_difference(positive: Tensor, negative: Tensor) -> Tensor:
    """From the mean of the negatives to that of the positives (Marks & Tegmark 2023, Rimsky et al. 2023)."""
    return F.normalize(positive.mean(0) - negative.mean(0), dim=0)


def principal_difference(positive: Tensor, negative: Tensor) -> Tensor:
    """
    First principal component of the differences of pairs, towards the positives (Zou et al. 2023). Each difference
    counts with both signs, as in the paper, so their mean is zero and nothing is centred. Texts are paired in order.
    """
    n = min(len(positive), len(negative))
    differences = positive[:n] - negative[:n]
    _, _, axes = t.linalg.svd(differences, full_matrices=False)
    return towards(axes[0], positive, negative)


def towards(unit: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The direction, turned round where it points from the positives' mean to the negatives'."""
    along = (positive.mean(0) - negative.mean(0)) @ unit
    return -unit if along < 0 else unit


def logistic_direction(positive: Tensor, negative: Tensor) -> Tensor:
    """The weight of a logistic regression on standardised coordinates, in the stream's own (probes.fit_probe)."""
    x = t.cat([positive, negative]).numpy()
    y = np.arange(len(x)) < len(positive)
    return F.normalize(t.from_numpy(fit_probe(x, y).weight).float(), dim=0)


def feature_direction(sae, positive: Tensor, negative: Tensor) -> tuple[Tensor, int]:
    """Decoder row of the feature whose mean code rises most, in its standard deviations; and which that is."""
    device = sae.W_dec.device
    high = sae.encode(positive.to(device)).float()
    low = sae.encode(negative.to(device)).float()
    rise = (high.mean(0) - low.mean(0)) / (t.cat([high, low]).std(0) + 1e-6)
    feature = int(rise.argmax())
    return F.normalize(sae.W_dec[feature].detach().float(), dim=0).cpu(), feature


# each (positive, negative) -> direction; feature_direction needs an autoencoder, so steering.py calls it by itself
METHODS = {
    "difference of means": mean_difference,
    "PCA of differences": principal_difference,
    "logistic probe": logistic_direction,
}


def random_directions(d: int, n: int, seed: int) -> list[Tensor]:
    drawn = t.randn(n, d, generator=t.Generator().manual_seed(seed))
    return list(F.normalize(drawn, dim=1))


@dataclass
class Direction:
    """
    unit (d_model) at a hook. size: the distance of the classes' means, by which all directions there are measured: a
    strength of 1 is a push of that length. low, high: the mean coordinate along it of negatives and of positives.
    """

    unit: Tensor
    hook: str
    size: float
    low: float
    high: float


def placed(unit: Tensor, hook: str, positive: Tensor, negative: Tensor) -> Direction:
    """positive, negative (text, d_model): the stream at the hook."""
    low = negative.mean(0)
    high = positive.mean(0)
    return Direction(unit, hook, (high - low).norm().item(), (low @ unit).item(), (high @ unit).item())


#%% What is done to a stream x (..., d_model)
def add(x: Tensor, vector: Tensor) -> Tensor:
    return x + vector


def project_out(x: Tensor, unit: Tensor) -> Tensor:
    """Nothing of x is left along it."""
    return clamp(x, unit, 0.0)


def clamp(x: Tensor, unit: Tensor, to: float) -> Tensor:
    """The coordinate along it is `to`."""
    along = einsum(x, unit, "... d, d -> ...")
    return x + (to - along)[..., None] * unit


@dataclass
class Edit:
    """A change of the stream x (batch, pos, d_model) at hooks, from a position on."""

    hooks: list[str]
    change: Callable[[Tensor], Tensor]

    def fwd_hooks(self, start: Tensor) -> list[tuple]:
        """start (batch): the position from which each row is changed."""
        return [(name, partial(changed_from, self.change, start)) for name in self.hooks]


def changed_from(change: Callable[[Tensor], Tensor], start: Tensor, x: Tensor, hook: nn.Module) -> Tensor:
    position = t.arange(x.shape[1], device=x.device)
    late = position >= start.to(x.device)[:, None]
    return t.where(late[..., None], change(x.float()).to(x.dtype), x)


def adding(direction: Direction, strength: float, device: str | t.device) -> Edit:
    vector = strength * direction.size * direction.unit
    return Edit([direction.hook], partial(add, vector=vector.to(device)))


def clamping(direction: Direction, strength: float, device: str | t.device) -> Edit:
    """Strength 0 puts the negatives' mean coordinate there, 1 the positives'."""
    to = direction.low + strength * (direction.high - direction.low)
    return Edit([direction.hook], partial(clamp, unit=direction.unit.to(device), to=to))


def projecting_out(direction: Direction, device: str | t.device) -> Edit:
    return Edit([direction.hook], partial(project_out, unit=direction.unit.to(device)))


def ablating_everywhere(model: nn.Module, direction: Direction, device: str | t.device) -> Edit:
    """No block reads it or leaves it in the stream: projected out at every hook of the stream (Arditi et al. 2024)."""
    known = hook_points(model)
    everywhere = []
    for layer in range(model.cfg.n_layers):
        names = [act_name(short, layer) for short in ("resid_pre", "resid_mid", "resid_post")]
        everywhere += [name for name in names if name in known]
    return Edit(everywhere, partial(project_out, unit=direction.unit.to(device)))


def first_tokens(model: nn.Module, text: str, words: tuple[str, ...]) -> list[int]:
    """The tokens by which words begin after the text, each once."""
    return list(dict.fromkeys(first_token(model, text, word) for word in words))


#%% What an edit does: the probability of a class of words after prompts
class Asked:
    """
    Prompts with a target class and another class of words, by their first tokens. where: an edit begins at a prompt's
    end ('end') or after beginning-of-text ('all').
    """

    def __init__(
        self,
        model: nn.Module,
        texts: list[str],
        target: list[tuple[str, ...]],
        other: list[tuple[str, ...]],
        where: str = "end",
        memory_gb: float = 1.0,
    ):
        self.model = model
        self.texts = texts
        self.words = list(zip(target, other))
        self.rows = [encode(model, text) for text in texts]
        device = device_of(model)
        self.tokens = padded(self.rows, device)
        self.end = t.tensor([len(row) - 1 for row in self.rows], device=device)
        self.start = self.end if where == "end" else t.full_like(self.end, len(encode(model, "")))
        self.target = [first_tokens(model, text, words) for text, words in zip(texts, target)]
        self.other = [first_tokens(model, text, words) for text, words in zip(texts, other)]
        self.at_once = rows_that_fit(model, self.tokens.shape[1], memory_gb)

    def __len__(self) -> int:
        return len(self.rows)

    @t.no_grad()
    def log_p(self, edit: Edit | None = None) -> Tensor:
        """
        (prompt, class): log-probability that one of the target's, or of the other's, tokens comes next; where no other
        words are known, the other class is all else.
        """

        def of_group(index: Tensor) -> Tensor:
            resid = self.model(self.tokens[index], stop_at_layer=0)
            edits = edit.fwd_hooks(self.start[index]) if edit else []
            log_p = run_from(self.model, resid, self.end[index], 0, edits).float().log_softmax(-1)
            rows = []
            for i, of_prompt in zip(index.tolist(), log_p):
                target = of_prompt[self.target[i]].logsumexp(0)
                if self.other[i]:
                    other = of_prompt[self.other[i]].logsumexp(0)
                else:
                    other = t.log1p(-target.clamp(max=-1e-7).exp())  # rounding can make the target's 0
                rows.append(t.stack([target, other]))
            return t.stack(rows).cpu()

        index = t.arange(len(self), device=self.tokens.device)
        return t.cat(list(in_batches(of_group, index, self.at_once)))


def effect(log_p: Tensor) -> dict[str, float]:
    """Of log_p (prompt, class): mean probability of the target, and how often it is likelier than the other class."""
    target, other = log_p.unbind(1)
    return {"p_target": target.exp().mean().item(), "turned": (target > other).float().mean().item()}


#%% What an edit costs: on text that has nothing to do with it
@t.no_grad()
def text_cost(model: nn.Module, rows: Tensor, edit: Edit, first: int, memory_gb: float = 1.0) -> tuple[float, float]:
    """
    (next-token loss added, KL of the plain model's distribution from the edited one), nats per token, on rows (row,
    pos) of text that are edited from position `first` on; what stands before is not counted.
    """

    def of_group(part: Tensor) -> tuple[float, float]:
        start = t.full((len(part),), first, device=part.device)
        plain = model(part)
        edited = run_with_hooks(model, part, edit.fwd_hooks(start))
        added = next_token_loss(edited, part, "sum") - next_token_loss(plain, part, "sum")
        kl = kl_from(plain[:, first:].float().log_softmax(-1), edited[:, first:]).sum()
        return added.item(), kl.item()

    at_once = rows_that_fit(model, rows.shape[1], memory_gb, 3 * model.cfg.d_vocab)
    groups = list(in_batches(of_group, rows, at_once))
    added, kl = (sum(column) for column in zip(*groups))
    return added / rows[:, first + 1 :].numel(), kl / rows[:, first:].numel()


#%% Text under an edit, and what a judge or the plain model says of it
def write(
    model: nn.Module,
    ids: list[int],
    n: int,
    edit: Edit | None,
    start: int,
    temperature: float = 0.0,
    generator: t.Generator | None = None,
) -> list[int]:
    """Up to n tokens after ids, while the stream is edited from position `start` on."""

    def hooks_from(position: int) -> list[tuple]:
        return edit.fwd_hooks(t.tensor([max(0, start - position)])) if edit else []

    return list(generate(model, ids, n, hooks_from, temperature, generator))


@t.no_grad()
def plain_loss(model: nn.Module, ids: list[int], answer: list[int]) -> float:
    """Mean loss in nats of the unedited model on an answer after ids."""
    tokens = t.tensor([ids + answer], device=device_of(model))
    log_p = model(tokens)[0, len(ids) - 1 : -1].float().log_softmax(-1)
    return -log_p[range(len(answer)), answer].mean().item()


def first_said(text: str, words: tuple[str, ...]) -> float:
    """At which character the first of some words stands, whole (' he' is not in ' her'); infinity where none does."""
    found = [re.search(rf"{re.escape(word)}(?!\w)", text) for word in words]
    return min((match.start() for match in found if match), default=math.inf)


def says(text: str, classes: tuple[tuple[str, ...], tuple[str, ...]]) -> bool:
    """Whether a text says one of the first class's words before any of the second's."""
    return first_said(text, classes[0]) < first_said(text, classes[1])


def open_judge(path: str) -> Callable[[str], float]:
    """The function judge(text) of a Python file: how much a text that was written has what is asked for."""
    if not Path(path).is_file():
        fail(f"--judge {path}: no such file; give a Python file with a function judge(text) that returns a number")
    defined = runpy.run_path(path)
    if not callable(defined.get("judge")):
        fail(f"--judge {path} defines no function judge(text)")
    return defined["judge"]


#%% Gates: what must hold before an edit is believed
def moved_by_nothing(model: nn.Module, tokens: Tensor, direction: Direction, first: Tensor) -> float:
    """How far a push of no length moves the logits, as a share of the largest."""
    nothing = adding(direction, 0.0, tokens.device)
    plain = model(tokens)
    pushed = run_with_hooks(model, tokens, nothing.fwd_hooks(first))
    return ((pushed - plain).abs().max() / plain.abs().max()).item()


def left_after_projecting_out(model: nn.Module, tokens: Tensor, direction: Direction, first: Tensor) -> float:
    """What the last stream still has along a direction that was projected out everywhere, as a share of its length."""
    last = layer_streams(model)[-1]
    with hooks(model, ablating_everywhere(model, direction, tokens.device).fwd_hooks(first)):
        _, cache = run_with_cache(model, tokens, last)
    stream = cache[last][0, first.item() :].float()
    along = einsum(stream, direction.unit.to(tokens.device), "pos d, d -> pos")
    return (along.abs() / stream.norm(dim=1)).max().item()


def unlike_one_run(model: nn.Module, ids: list[int], direction: Direction, first: Tensor, n: int) -> float:
    """
    Of n tokens written one by one under a push, with kept keys and values where the model has them: how far below the
    largest logit of one run over all of them each lies, at most, as a share of that run's largest.
    """
    device = device_of(model)
    push = adding(direction, 1.0, device)
    answer = write(model, ids, n, push, first.item())
    if not answer:  # it ends the text at once
        return 0.0
    row = t.tensor([ids + answer], device=device)
    logits = run_with_hooks(model, row, push.fwd_hooks(first))[0, len(ids) - 1 : -1].float()
    chosen = logits[range(len(answer)), answer]
    below = (logits.max(1).values - chosen) / logits.abs().max()
    return below.max().item()


@t.no_grad()
def edit_gates(asked: Asked, direction: Direction, n: int = 4, written: int = 6) -> dict[str, float]:
    """The largest miss of each gate over the first n prompts."""
    model = asked.model
    gates = {"nothing_pushed": 0.0, "left_of_what_is_projected_out": 0.0, "written_against_one_run": 0.0}
    for ids, start in zip(asked.rows[:n], asked.start.tolist()):
        tokens = t.tensor([ids], device=asked.tokens.device)
        first = t.tensor([start])
        missed = (
            moved_by_nothing(model, tokens, direction, first),
            left_after_projecting_out(model, tokens, direction, first),
            unlike_one_run(model, ids, direction, first, written),
        )
        gates = {gate: max(worst, miss) for (gate, worst), miss in zip(gates.items(), missed)}
    return gates


#%% Directions in a file
def save_direction(path: Path, direction: Direction, **about) -> None:
    """As one column, as alignment's subspaces are kept, with the numbers of its contrasts and where it comes from."""
    measured = {"size": direction.size, "low": direction.low, "high": direction.high}
    save_subspaces(path, {direction.hook: direction.unit[:, None]}, **about, **measured)


def read_directions(path: str, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """
    ({hook: unit (d_model)}, where they come from) of a file that steering.py, probing.py or das.py wrote; of subspaces
    those of rank 1, of several at one hook ('hook place rank 1') that of the place at which das.py found the variable.
    """
    try:
        columns, about = read_subspaces(path)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        fail(f"--direction {path} cannot be read as directions with where they come from: {error}")
    found: dict[str, Tensor] = {}
    best_place = about.get("best_place", "")
    at_best_first = sorted(columns, key=lambda name: f" {best_place} rank " not in name)
    for name in at_best_first:
        hook = name.split()[0]
        if columns[name].shape[1] == 1 and hook not in found:
            found[hook] = F.normalize(columns[name][:, 0].float(), dim=0)
    if not found:
        fail(f"--direction {path} holds no direction: every subspace has more than one dimension")
    known = hook_points(model)
    for hook, unit in found.items():
        if hook not in known or len(unit) != model.cfg.d_model:
            fail(f"--direction {path}: {hook}, {len(unit)} wide, is no place in the stream of this model")
    return found, about
