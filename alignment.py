"""
What an activation stands for: interchange interventions, whole or in a subspace, which distributed alignment search
(DAS) finds; causal variables of the world, whose values are known in every prompt.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

from utils import BRIEF, fail, seed_of, write_aside  # first: sets OpenMP's variables before torch is loaded
from hooks import (
    act_name,
    cache_from_resid,
    device_of,
    in_batches,
    rows_that_fit,
    run_from,
    run_with_cache,
    run_with_hooks,
)
from weights import encode
from logit_attribution import layer_streams
from world import ENTITIES, RELATIONS, Prompt, draw_agreement, draw_ioi, fact_prompts, read_countries
from lens import without_weight_gradients
from pairs import entities_for, make_pairs, padded

import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import trange


#%% An interchange intervention, in its plain form
def interchanged(base: Tensor, source: Tensor, subspace: Tensor | None) -> Tensor:
    """
    base (case, d) that has, along the orthonormal columns of subspace (d, k), the coordinates of source (case, d);
    without a subspace all of source.
    """
    if subspace is None:
        return source
    difference = source.float() - base.float()
    coordinates = einsum(difference, subspace, "case d, d k -> case k")
    return base + einsum(coordinates, subspace, "case k, d k -> case d").to(base.dtype)


@t.no_grad()
def interchange(
    model: nn.Module,
    base: Tensor,
    source: Tensor,
    hook_name: str,
    base_pos: Tensor,
    source_pos: Tensor,
    subspace: Tensor | None = None,
) -> Tensor:
    """
    Logits (case, pos, d_vocab) of runs of base (case, pos), in which an activation at position base_pos (case) has, in
    the subspace (d, k), what it has in the runs of source (case, pos) at source_pos (case). Geiger et al. 2021, 2024.
    """
    index = t.arange(len(base), device=base.device)
    _, cache = run_with_cache(model, source, hook_name)
    from_source = cache[hook_name][index, source_pos]

    def put(activation: Tensor, hook: nn.Module) -> None:
        activation[index, base_pos] = interchanged(activation[index, base_pos], from_source, subspace)

    return run_with_hooks(model, base, [(hook_name, put)])


#%% Cases: two prompts, and what a causal model answers to the first when its variable has the second's value
@dataclass
class Case:
    """
    value: the variable's in source. predicted: the causal model's answer to base once the variable has that value.
    edited: base with that value in the text itself. candidates: the answers among which the model decides; none: all
    tokens. places: after which character each ends, in base and in source. entities: what the two are about, names,
    nouns or countries; intervals come from a bootstrap of them.
    """

    base: str
    source: str
    edited: str
    answer: str
    predicted: str
    candidates: tuple[str, ...]
    places: dict[str, tuple[int, int]]
    value: str
    entities: tuple[str, str]


@dataclass
class Cases:
    """
    Cases as tokens: base, source, edited (case, pos), padded on the right; answer, predicted (case); candidates (case,
    candidate) or None; positions (case) of the places, in base and in source; where the answer is due, in base and in
    edited.
    """

    base: Tensor
    source: Tensor
    edited: Tensor
    answer: Tensor
    predicted: Tensor
    candidates: Tensor | None
    base_places: dict[str, Tensor]
    source_places: dict[str, Tensor]
    base_end: Tensor
    edited_end: Tensor
    values: list[str]
    entities: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.base)

    @property
    def index(self) -> Tensor:
        return t.arange(len(self), device=self.base.device)

    @property
    def changes(self) -> Tensor:
        """(case) whether the interchange should change the answer."""
        return self.answer != self.predicted

    def take(self, index: Tensor) -> "Cases":
        chosen = {}
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                chosen[name] = x[index]
            elif isinstance(x, dict):
                chosen[name] = {place: positions[index] for place, positions in x.items()}
            elif isinstance(x, list):
                chosen[name] = [x[i] for i in index.tolist()]
        return replace(self, **chosen)


def position_of(model: nn.Module, text: str, end: int) -> int | None:
    """The token with which text[:end] ends; None where one token goes beyond that."""
    ids = encode(model, text[:end])
    if not ids or encode(model, text)[: len(ids)] != ids:
        return None
    return len(ids) - 1


def first_token(model: nn.Module, text: str, answer: str) -> int | None:
    """The first token of the answer where it follows the text; None where it merges with the text's last."""
    ids = encode(model, text)
    whole = encode(model, text + answer)
    if whole[: len(ids)] != ids or len(whole) == len(ids):
        return None
    return whole[len(ids)]


def case_fits(model: nn.Module, case: Case) -> bool:
    """Different answers begin with different tokens, and every place ends where a token ends."""
    answers = dict.fromkeys((case.answer, case.predicted, *case.candidates))
    tokens = [first_token(model, case.base, answer) for answer in answers]
    positions = []
    for base_end, source_end in case.places.values():
        positions.append(position_of(model, case.base, base_end))
        positions.append(position_of(model, case.source, source_end))
    return None not in tokens and len(set(tokens)) == len(tokens) and None not in positions


def as_tokens(model: nn.Module, cases: list[Case]) -> Cases:
    device = device_of(model)

    def rows(which: str) -> list[list[int]]:
        return [encode(model, getattr(case, which)) for case in cases]

    def answers(which: str) -> Tensor:
        return t.tensor([first_token(model, case.base, getattr(case, which)) for case in cases], device=device)

    def positions(which: str, side: int) -> dict[str, Tensor]:
        found = {}
        for place in cases[0].places:
            ends = [position_of(model, getattr(case, which), case.places[place][side]) for case in cases]
            found[place] = t.tensor(ends, device=device)
        return found

    candidates = None
    if cases[0].candidates:
        ids = [[first_token(model, case.base, answer) for answer in case.candidates] for case in cases]
        candidates = t.tensor(ids, device=device)
    base = rows("base")
    edited = rows("edited")
    return Cases(
        base=padded(base, device),
        source=padded(rows("source"), device),
        edited=padded(edited, device),
        answer=answers("answer"),
        predicted=answers("predicted"),
        candidates=candidates,
        base_places=positions("base", 0),
        source_places=positions("source", 1),
        base_end=t.tensor([len(row) - 1 for row in base], device=device),
        edited_end=t.tensor([len(row) - 1 for row in edited], device=device),
        values=[case.value for case in cases],
        entities=[case.entities for case in cases],
    )


#%% The world's variables: what a causal model computes in the middle, and prompts that differ in all else too
CAUSAL_MODELS = {
    "country": "the country that the prompt names; answer = its capital. Sources name one and ask anything about it",
    "subject_name": "the name said twice; answer = the other of the two. Sources say the two names in another sentence",
    "subject_position": "whether the first or the second name is said again; answer = the other. Sources say other names",
    "number": "the subject's; answer = the verb in it. Sources have another subject, and another noun before the verb",
}


def places_around(text: str, word: str, last: bool = False) -> dict[str, int]:
    """Where places end in a text that says the word: what stands before it, itself, the next word if any, the text."""
    found = [*re.finditer(rf" {word}\b", text)][-1 if last else 0]
    ends = {"before": found.start(), "subject": found.end()}
    next_word = re.match(r"\W*\w+", text[found.end() :])
    if next_word:
        ends["after"] = found.end() + next_word.end()
    return ends | {"end": len(text)}


def both_places(base: dict[str, int], source: dict[str, int], *names: str) -> dict[str, tuple[int, int]]:
    return {name: (base[name], source[name]) for name in names}


def draw_country(rng: Random, facts: dict[str, list[Prompt]]) -> Case:
    """facts: by country, of its capital and of all else. A source in four, or more, is about the base's own country."""
    country = rng.choice(list(facts))
    other = country if rng.random() < 0.25 else rng.choice(list(facts))
    base = rng.choice([fact for fact in facts[country] if fact.task == "forward"])
    source = rng.choice(facts[other])
    phrasing, _ = base.labels["phrasing"].split(" {capital}")
    return Case(
        base=base.text,
        source=source.text,
        edited=phrasing.format(**source.labels),
        answer=base.answer,
        predicted=f" {source.labels['capital']}",
        candidates=(),
        places=both_places(
            places_around(base.text, re.escape(country)),
            places_around(source.text, re.escape(other)),
            "before",
            "subject",
            "end",
        ),
        value=other,
        entities=(country, other),
    )


def renamed(text: str, names: dict[str, str]) -> str:
    def new_name(match: re.Match) -> str:
        return names[match[0]]

    return re.sub(rf"\b({'|'.join(names)})\b", new_name, text)


def draw_subject_name(rng: Random) -> Case:
    """In one source of four the subject is the base's."""
    base = draw_ioi(rng, True)
    source = draw_ioi(rng, True)
    io, subject = base.about
    same = rng.random() < 0.25
    new_subject, new_io = (subject, io) if same else (io, subject)
    source_io, source_subject = source.about
    source_text = renamed(source.text, {source_subject: new_subject, source_io: new_io})
    return Case(
        base=base.text,
        source=source_text,
        edited=base.text if same else base.corrupt,
        answer=base.answer,
        predicted=base.answer if same else base.wrong,
        candidates=(),
        places=both_places(
            places_around(base.text, subject, last=True),
            places_around(source_text, new_subject, last=True),
            "before",
            "subject",
            "after",
            "end",
        ),
        value=new_subject,
        entities=(subject, io),
    )


def draw_subject_position(rng: Random) -> Case:
    base = draw_ioi(rng, True)
    source = draw_ioi(rng, True)
    same = base.labels["order"] == source.labels["order"]
    return Case(
        base=base.text,
        source=source.text,
        edited=base.text if same else base.corrupt,
        answer=base.answer,
        predicted=base.answer if same else base.wrong,
        candidates=(),
        places=both_places(
            places_around(base.text, base.labels["s"], last=True),
            places_around(source.text, source.labels["s"], last=True),
            "before",
            "subject",
            "after",
            "end",
        ),
        value="second" if source.labels["order"] == "ABBA" else "first",
        entities=(base.labels["s"], source.labels["s"]),
    )


def draw_number(rng: Random) -> Case:
    base = draw_agreement(rng, True)
    source = draw_agreement(rng, True)
    same = base.labels["number"] == source.labels["number"]
    return Case(
        base=base.text,
        source=source.text,
        edited=base.text if same else base.corrupt,
        answer=base.answer,
        predicted=base.answer if same else base.wrong,
        candidates=(base.answer, base.wrong),  # the tense is free
        places=both_places(
            places_around(base.text, f"{base.labels['subject']}s?"),
            places_around(source.text, f"{source.labels['subject']}s?"),
            "before",
            "subject",
            "after",
            "end",
        ),
        value=source.labels["number"],
        entities=(base.labels["subject"], source.labels["subject"]),
    )


def facts_by_country() -> dict[str, list[Prompt]]:
    """Of the countries whose capital is taught forward: phrasings taught, of the capital and of all else."""
    facts: dict[str, list[Prompt]] = {}
    countries = read_countries()
    forward = [fact for fact in fact_prompts(countries, "forward") if fact.taught]
    for fact in forward:
        facts.setdefault(fact.labels["country"], []).append(fact)
    for task in RELATIONS:
        for fact in fact_prompts(countries, task):
            if fact.labels["country"] in facts:
                facts[fact.labels["country"]].append(fact)
    return facts


def draw_cases(model: nn.Module, variable: str, n: int, seed: int, role: str) -> Cases:
    """
    n different cases of a variable of the world whose texts fit the model's tokenizer; those to find on and those to
    test on share no country, name or subject noun.
    """
    rng = Random(seed_of(seed, f"interchange {role}"))
    entities, draw = drawn_from(variable)
    allowed = entities_for(role, entities, seed)
    cases = []
    for _ in range(100 * n):
        if len(cases) == n:
            break
        case = draw(rng)
        if allowed.issuperset(case.entities) and case not in cases and case_fits(model, case):
            cases.append(case)
    if len(cases) < max(1, n):
        fail(
            f"there are {len(cases)} different cases of {variable} to {role} on that fit this tokenizer, {n} were asked "
            f"for: ask for fewer, or give your own with --pairs"
        )
    return as_tokens(model, cases)


def drawn_from(variable: str) -> tuple[list[str], Callable[[Random], Case]]:
    """(what its cases are about, how one is drawn)"""
    if variable == "country":
        facts = facts_by_country()
        return sorted(facts), partial(draw_country, facts=facts)
    if variable == "subject_name":
        return ENTITIES["ioi"], draw_subject_name
    if variable == "subject_position":
        return ENTITIES["ioi"], draw_subject_position
    if variable == "number":
        return ENTITIES["agreement"], draw_number
    raise ValueError(f"unknown variable {variable!r}: {', '.join(CAUSAL_MODELS)}")


def cases_of_pairs(model: nn.Module, rows: list[tuple[str, str, str, str]]) -> Cases:
    """
    Rows (clean, corrupt, answer, wrong) as two cases each: clean is the base, corrupt the source, and after the
    interchange `wrong` is due rather than `answer`; and the other way round, or any push from the one to the other
    would do. A place is the last position of those that pairs.find_places names.
    """
    both_ways = []
    for clean, corrupt, answer, wrong in rows:
        both_ways.append((clean, corrupt, answer, wrong))
        both_ways.append((corrupt, clean, wrong, answer))
    pairs = make_pairs(model, both_ways)
    position = t.arange(pairs.clean.shape[1], device=pairs.clean.device)
    places = {}
    for name, mask in pairs.places.items():
        if mask.any(1).all():
            places[name] = (mask * position).amax(1)
    places["end"] = pairs.answer_pos
    # both ways of a pair are as long, and make_pairs sorts by length and keeps the order, so they stay neighbours
    number = [str(i // 2) for i in range(len(pairs))]
    return Cases(
        base=pairs.clean,
        source=pairs.corrupt,
        edited=pairs.corrupt,
        answer=pairs.answer,
        predicted=pairs.wrong,
        candidates=t.stack([pairs.answer, pairs.wrong], 1),
        base_places=places,
        source_places=places,
        base_end=pairs.answer_pos,
        edited_end=pairs.answer_pos,
        values=[str(token) for token in pairs.wrong.tolist()],
        entities=list(zip(number, number)),
    )


#%% What a run chose, and what it should choose
def candidate_logits(cases: Cases, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(logits (case, candidate) of logits (case, d_vocab), the candidate (case) that is predicted)"""
    predicted = cases.predicted[index]
    if cases.candidates is None:
        return logits.float(), predicted
    candidates = cases.candidates[index]
    return logits.float().gather(1, candidates), (candidates == predicted[:, None]).int().argmax(1)


def chosen_tokens(cases: Cases, logits: Tensor, index: Tensor) -> Tensor:
    """(case) the likeliest candidate by logits (case, d_vocab)."""
    among, _ = candidate_logits(cases, logits, index)
    best = among.argmax(1)
    if cases.candidates is None:
        return best
    return cases.candidates[index, best]


@t.no_grad()
def agrees_with_causal_model(model: nn.Module, cases: Cases, memory_gb: float = 1.0) -> tuple[Tensor, Tensor]:
    """(case) whether the model answers base as the causal model does, and whether it does so to edited."""

    def of_group(index: Tensor) -> tuple[Tensor, Tensor]:
        base = run_from(model, model(cases.base[index], stop_at_layer=0), cases.base_end[index])
        edited = run_from(model, model(cases.edited[index], stop_at_layer=0), cases.edited_end[index])
        base_right = chosen_tokens(cases, base, index) == cases.answer[index]
        edited_right = chosen_tokens(cases, edited, index) == cases.predicted[index]
        return base_right, edited_right

    longest = max(cases.base.shape[1], cases.edited.shape[1])
    groups = list(in_batches(of_group, cases.index, rows_that_fit(model, longest, memory_gb)))
    return t.cat([base for base, _ in groups]), t.cat([edited for _, edited in groups])


#%% Many interchanges of the same cases: both runs are made once, and an interchanged one goes on from its layer
@dataclass
class InterchangeRuns:
    """base: the stream (layer, case, pos, d_model) before every layer; source: by place (layer, case, d_model)."""

    model: nn.Module
    cases: Cases
    base: Tensor
    source: dict[str, Tensor]
    at_once: int

    def run(self, layer: int, place: str, subspace: Tensor | None, index: Tensor) -> Tensor:
        """Logits (case, d_vocab) where the answer is due, of the cases of index; as interchange gives them."""
        resid = self.base[layer, index].clone()
        row = t.arange(len(index), device=resid.device)
        position = self.cases.base_places[place][index]
        resid[row, position] = interchanged(resid[row, position], self.source[place][layer, index], subspace)
        return run_from(self.model, resid, self.cases.base_end[index], layer)

    @t.no_grad()
    def right(self, layer: int, place: str, subspace: Tensor | None) -> Tensor:
        """(case) whether the interchanged run answers as the causal model predicts."""

        def of_group(index: Tensor) -> Tensor:
            logits = self.run(layer, place, subspace, index)
            return chosen_tokens(self.cases, logits, index) == self.cases.predicted[index]

        return t.cat(list(in_batches(of_group, self.cases.index, self.at_once)))

    def with_shuffled_sources(self, seed: int) -> "InterchangeRuns":
        """Every case gets the source of another, which says nothing about what is predicted."""
        order = t.randperm(len(self.cases), generator=t.Generator().manual_seed(seed)).to(self.base.device)
        from_case = t.empty_like(order)
        from_case[order] = order.roll(1)  # one round through all of them, so that none keeps its own
        return replace(self, source={place: x[:, from_case] for place, x in self.source.items()})


@t.no_grad()
def interchange_runs(model: nn.Module, cases: Cases, memory_gb: float = 1.0) -> InterchangeRuns:
    names = [act_name("resid_pre", layer) for layer in range(model.cfg.n_layers)]
    longest = max(cases.base.shape[1], cases.source.shape[1])
    at_once = rows_that_fit(model, longest, memory_gb, len(names) * model.cfg.d_model)

    def streams(tokens: Tensor) -> Tensor:
        """(layer, case, pos, d_model)"""
        _, cache = cache_from_resid(model, model(tokens, stop_at_layer=0), tokens.new_zeros(len(tokens)), names)
        return t.stack([cache[name] for name in names])

    def at_places(index: Tensor) -> dict[str, Tensor]:
        of_source = streams(cases.source[index])
        row = t.arange(len(index), device=index.device)
        return {place: of_source[:, row, where[index]] for place, where in cases.source_places.items()}

    base = t.cat(list(in_batches(streams, cases.base, at_once)), 1)
    groups = list(in_batches(at_places, cases.index, at_once))
    source = {place: t.cat([group[place] for group in groups], 1) for place in cases.source_places}
    return InterchangeRuns(model, cases, base, source, at_once)


@t.no_grad()
def interchange_gates(runs: InterchangeRuns, few: Tensor) -> dict[str, float]:
    """
    What must hold before an interchange is believed, as the largest miss over the largest logit: of nothing it is the
    base run; of the whole stream where the answer is due, after the last block, the source run; a rotation of full
    rank moves all; runs from the middle are the plain form's. few: the cases (index) that are asked.
    """
    model, cases = runs.model, runs.cases
    some = cases.take(few)
    d_model = model.cfg.d_model
    place = "end"
    layer = model.cfg.n_layers // 2
    generator = t.Generator().manual_seed(0)
    rotation = random_subspace(d_model, d_model, generator).to(runs.base.device)
    base_logits = model(some.base)[some.index, some.base_end]
    source_end = some.source_places["end"]
    source_logits = model(some.source)[some.index, source_end]

    def plain(hook_name: str, where: str, subspace: Tensor | None) -> Tensor:
        positions = (some.base_places[where], some.source_places[where])
        logits = interchange(model, some.base, some.source, hook_name, *positions, subspace)
        return logits[some.index, some.base_end]

    half = rotation[:, : d_model // 2]
    last_stream = layer_streams(model)[-1]
    misses = {
        "nothing_interchanged": runs.run(layer, place, rotation[:, :0], few) - base_logits,
        "everything_after_the_last_block": plain(last_stream, "end", None) - source_logits,
        "a_rotation_of_full_rank": runs.run(layer, place, rotation, few) - runs.run(layer, place, None, few),
        "runs_from_the_middle": runs.run(layer, place, half, few) - plain(act_name("resid_pre", layer), place, half),
    }
    scale = source_logits.abs().max()
    return {name: (miss.abs().max() / scale).item() for name, miss in misses.items()}


#%% Distributed alignment search (Geiger et al. 2024): the subspace whose interchange does what the variable's would
def orthonormal(columns: Tensor) -> Tensor:
    """(d, k) orthonormal columns of the same span."""
    return t.linalg.qr(columns)[0]


def fit_das(
    runs: InterchangeRuns,
    layer: int,
    place: str,
    rank: int,
    steps: int = 80,
    batch: int = 32,
    lr: float = 0.02,
    seed: int = 0,
) -> Tensor:
    """
    Orthonormal columns (d_model, rank) that make the model, after the interchange of the stream before `layer` at a
    place, answer as the causal model predicts: least cross-entropy over the candidates, by Adam from a random start.
    Geiger et al. 2024, https://arxiv.org/abs/2303.02536: the first columns of the rotation there.
    """
    generator = t.Generator().manual_seed(seed)
    cases = runs.cases
    device = runs.base.device
    columns = random_subspace(runs.base.shape[-1], rank, generator).to(device).requires_grad_()
    optimizer = t.optim.Adam([columns], lr)
    with without_weight_gradients(runs.model), t.enable_grad():
        for step in trange(steps, desc=f"DAS, layer {layer}, {place}", **BRIEF):
            optimizer.param_groups[0]["lr"] = lr * min(1, 2 * (steps - step) / steps)  # falls over the second half
            index = t.randint(len(cases), (batch,), generator=generator).to(device)
            logits = runs.run(layer, place, orthonormal(columns), index)
            loss = F.cross_entropy(*candidate_logits(cases, logits, index))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return orthonormal(columns.detach())


#%% Subspaces that cost nothing: at random, of the values' means, of the largest variance
def random_subspace(d: int, rank: int, generator: t.Generator) -> Tensor:
    return orthonormal(t.randn(d, rank, generator=generator))


def principal_subspace(x: Tensor, rank: int) -> Tensor:
    """(d, at most rank) directions of the largest variance of x (row, d)."""
    centred = (x - x.mean(0)).float()
    _, strengths, directions = t.linalg.svd(centred, full_matrices=False)
    n = int((strengths > 1e-4 * strengths[0]).sum())
    return directions[: min(rank, n)].T.contiguous()


def means_subspace(x: Tensor, values: list[str], rank: int) -> Tensor:
    """
    (d, at most rank): the principal subspace of the means of x (row, d) over the rows of each value. It has a rank below
    the number of values: of two values it is the difference of means.
    """
    means = []
    for value in sorted(set(values)):
        is_value = t.tensor([v == value for v in values], device=x.device)
        means.append(x[is_value].float().mean(0))
    if len(means) < 2:
        fail(f"all cases have the value {values[0]}: means need two")
    return principal_subspace(t.stack(means), rank)


#%% Interchange accuracy
def share_with_interval(
    right: Tensor, entities: list[tuple[str, str]], draws: int = 1000
) -> tuple[float, float, float]:
    """
    (share, 2.5th, 97.5th percentile) of right (case), over a bootstrap of the entities that cases are about: a case
    counts as often as its two were drawn, multiplied (Owen 2007).
    """
    names = sorted({name for pair in entities for name in pair})
    number = {name: i for i, name in enumerate(names)}
    first = t.tensor([number[one] for one, _ in entities])
    second = t.tensor([number[other] for _, other in entities])
    generator = t.Generator().manual_seed(0)
    drawn = t.randint(len(names), (draws, len(names)), generator=generator)
    counts = F.one_hot(drawn, len(names)).sum(1).float()  # (draw, entity)
    weights = t.where(first == second, counts[:, first], counts[:, first] * counts[:, second])
    right = right.float().cpu()
    shares = einsum(weights, right, "draw case, case -> draw") / weights.sum(1)
    low, high = shares.nanquantile(t.tensor([0.025, 0.975])).tolist()
    return right.mean().item(), low, high


#%% Subspaces in a file
def save_subspaces(path: Path, subspaces: dict[str, Tensor], **about) -> None:
    """subspaces (d, k) by name, and where they come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.cpu().contiguous() for name, x in subspaces.items()}
    metadata = {"about": json.dumps(about)}
    write_aside(path, lambda aside: save_file(tensors, aside, metadata))


def read_subspaces(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """(subspaces (d, k) by name, where they come from)"""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
