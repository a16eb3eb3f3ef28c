"""
Readers: which of them tell the truth? Lenses, patchscopes, a probe and heads are asked what the stream holds, in a
model whose facts are known: the corpus taught some of them in one direction only. Two questions, which may have
different best readers: what will the model say, and what does it know?
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from utils import (  # first: sets OpenMP's variables before torch is loaded
    Count,
    Natural,
    Positive,
    cyan,
    endc,
    fail,
    find_model,
    green,
    load_model,
    pick_device,
    purple,
    save_results,
    set_seed,
    write_aside,
    yellow,
    on_base,
)
from plots import bar, imshow, line, show
from hooks import device_of, in_batches, run_from, run_with_cache
from weights import bos_id, encode, model_key
from launch import flags
from logit_attribution import folded_W_U, layer_streams
from heads import extraction_by_head
from world import FACTS, RELATIONS, Prompt, fact_prompts, judging_rows, read_answers, read_countries
from lens import (
    TUNED_ROWS,
    TUNED_TOKENS,
    Lens,
    LensText,
    judge_lenses,
    knows_world,
    require_exact_lens,
    slug,
)
from interventions import patchscope
from probes import auroc, random_twin, ridge_map, subject_position
from llama_block import Llama

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from scipy.stats import rankdata
from tabulate import tabulate
from torch import Tensor

#%% What is asked: facts of every country, in several phrasings, and where their prompts are read
CAPITALS = ("forward", "reverse")  # of the capital: from the country, from the city; each taught for two thirds
PLACES = ("subject", "end")  # the last token of the entity that is asked about, and that of the prompt


@dataclass
class Questions:
    """One task's prompts. Questions of one group differ in the entity alone, and their answers are of one part."""

    task: str
    prompts: list[Prompt]
    rows: Tensor  # (question, pos) tokens, padded on the right, which a causal model never sees
    places: Tensor  # (place, question) positions
    country: Tensor  # (question)
    group: Tensor  # (question) of one phrasing, and of the capitals one part: what is ranked together
    candidates: Tensor  # (candidate) the first tokens of all answers
    right: Tensor  # (question) the candidate that is the answer's

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def taught(self) -> np.ndarray:
        return np.array([prompt.taught for prompt in self.prompts])

    def groups(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(its questions, the candidates that are an answer to one of them)."""
        for group in self.group.unique():
            questions = (self.group == group).nonzero()[:, 0]
            yield questions, self.right[questions].unique()


def phrasings(task: str, n: int) -> list[str]:
    """n of a task; those that models/world was taught and those it was not alternate."""
    alternating = itertools.chain(*itertools.zip_longest(*FACTS[task]))
    return [phrasing for phrasing in alternating if phrasing][:n]


def ask(model: nn.Module, task: str, countries: list[dict[str, str]], n_phrasings: int) -> Questions:
    chosen = phrasings(task, n_phrasings)
    prompts = [p for held_out in (False, True) for p in fact_prompts(countries, task, held_out)]
    prompts = [p for p in prompts if p.labels["phrasing"] in chosen]
    n_bos = int(bos_id(model) is not None)
    rows = [encode(model, p.text) for p in prompts]
    answers = [encode(model, p.text + p.answer)[len(row)] for p, row in zip(prompts, rows)]
    candidates = t.tensor(answers).unique()
    names = [row["country"] for row in countries]
    groups = [(p.labels["phrasing"], p.labels["part"] if task in CAPITALS else "") for p in prompts]
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    subject = [subject_position(model.tokenizer, p, n_bos) for p in prompts]
    end = [len(row) - 1 for row in rows]
    device = device_of(model)
    return Questions(
        task=task,
        prompts=prompts,
        rows=nn.utils.rnn.pad_sequence([t.tensor(row) for row in rows], batch_first=True).to(device),
        places=t.tensor([subject, end], device=device),
        country=t.tensor([names.index(p.labels["country"]) for p in prompts]),
        group=t.tensor([number[group] for group in groups]),
        candidates=candidates.to(device),
        right=t.searchsorted(candidates, t.tensor(answers)),
    )


@t.no_grad()
def streams_at_places(model: nn.Module, questions: Questions) -> Tensor:
    """(place, layer, question, d_model): the stream after 0 .. n_layers blocks."""
    names = layer_streams(model)

    def of_group(index: Tensor) -> Tensor:
        _, cache = run_with_cache(model, questions.rows[index], names)
        places = questions.places[:, index]
        stacked = t.stack([cache[name] for name in names])  # (layer, question, pos, d_model)
        return t.stack([stacked[:, t.arange(len(index)), positions] for positions in places])

    return t.cat(list(in_batches(of_group, t.arange(len(questions)), 256)), 2)


#%% The readers: from the stream x (question, d_model) after a number of blocks to scores (question, candidate)
type Reader = Callable[[Questions, Tensor, int], Tensor | None]  # None where it has nothing to read by
N_FOLDS = 5  # countries are dealt out to these; what a reader learns, it learns from the other folds' countries
TARGETS = {  # what a patchscope moves an activation into, at the place of X
    "forward": "The capital of X is",
    "reverse": "The city of X is the capital of",
    "continent": "The continent of X is",
    "language": "The main language of X is",
    "currency": "The currency of X is the",
}
SAY_IT_TWICE = "Say it twice: key lamp X, key lamp"  # the world's lists: the model says X again


def fold_of(questions: Questions) -> Tensor:
    """(question) the fold of its country."""
    order = t.randperm(int(questions.country.max()) + 1, generator=t.Generator().manual_seed(0))
    return order[questions.country] % N_FOLDS


def by_lens(lens: Lens, questions: Questions, x: Tensor, layer: int) -> Tensor:
    return lens(x, layer).float()[:, questions.candidates]


def target_prompt(model: nn.Module, text: str) -> tuple[Tensor, int]:
    """Its tokens (pos), and where X stands, as the one token that an entity mostly is here."""
    before, after = text.split(" X")
    first = encode(model, before)
    last = model.tokenizer.encode(after, add_special_tokens=False).ids
    return t.tensor([*first, model.tokenizer.token_to_id("X"), *last]), len(first)


def by_patchscope(
    model: nn.Module, targets: dict[str, str], questions: Questions, x: Tensor, layer: int
) -> Tensor | None:
    """What the model says at the end of the target prompt, in which x stands for X; None after the last block."""
    if layer == model.cfg.n_layers:
        return None
    target, position = target_prompt(model, targets[questions.task])
    return patchscope(model, x, layer, target.to(x.device), position).float()[:, questions.candidates]


def answer_directions(model: nn.Module, questions: Questions) -> Tensor:
    """(candidate, d_model): what the unembedding reads each candidate by, less what is common to all of them."""
    columns = folded_W_U(model, questions.candidates).T.detach()
    return columns - columns.mean(0)


def by_probe(model: nn.Module, questions: Questions, x: Tensor, layer: int) -> Tensor:
    """
    A linear probe that is fitted to other countries, taught and untaught alike: x is mapped to the direction of its
    answer (ridge_map), and candidates score by their cosine with that.
    """
    directions = F.normalize(answer_directions(model, questions), dim=1)
    fold = fold_of(questions)
    fitted_on = x.detach().float()
    scores = x.new_zeros(len(x), len(directions))
    for held_out in range(N_FOLDS):
        others = fold != held_out
        predict = ridge_map(fitted_on[others], directions[questions.right[others]])
        predicted = predict(x[~others].float())
        scores[~others] = F.normalize(predicted, dim=1) @ directions.T
    return scores


def by_heads(model: nn.Module, questions: Questions, x: Tensor, layer: int) -> Tensor | None:
    """
    Attribute extraction: what one head of the blocks above would write if it looked at x alone; the head whose writes
    rank the answers of other folds' countries highest. None after the last block.
    """
    if layer == model.cfg.n_layers:
        return None
    directions = answer_directions(model, questions)
    by_head = []
    for above in range(layer, model.cfg.n_layers):
        writes = extraction_by_head(model, x, above).float()
        by_head += list(einsum(writes, directions, "head row d_model, answer d_model -> head row answer"))
    own = t.stack([t.from_numpy(percentiles(questions, scores.detach(), questions.right)[0]) for scores in by_head])
    fold = fold_of(questions)
    scores = t.zeros_like(by_head[0])
    for held_out in range(N_FOLDS):
        best = own[:, fold != held_out].mean(1).argmax()
        scores[fold == held_out] = by_head[best][fold == held_out]
    return scores


def make_readers(model: nn.Module, lenses: dict[str, Lens]) -> dict[str, Reader]:
    readers: dict[str, Reader] = {f"{kind} lens": partial(by_lens, lens) for kind, lens in lenses.items()}
    readers["patchscope: the question"] = partial(by_patchscope, model, TARGETS)
    readers["patchscope: say it twice"] = partial(by_patchscope, model, dict.fromkeys(TARGETS, SAY_IT_TWICE))
    readers["linear probe"] = partial(by_probe, model)
    readers["a head's OV"] = partial(by_heads, model)
    return readers


@t.no_grad()
def patchscope_gate(model: nn.Module, text: str) -> float:
    """How far a target prompt's last logits move, relative to the largest, when X's own stream is put at X."""
    tokens, position = target_prompt(model, text)
    tokens = tokens.to(device_of(model))
    logits, cache = run_with_cache(model, tokens[None], layer_streams(model))
    missed = []
    for layer, stream in enumerate(layer_streams(model)[:-1]):
        moved = patchscope(model, cache[stream][:, position], layer, tokens, position)
        missed.append((moved - logits[:, -1]).abs().max() / logits.abs().max())
    return max(missed).item()


#%% The measure: the answer's percentile among those of its group, less what the same answer gets for other entities
def percentiles(questions: Questions, scores: Tensor, asked: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """
    Of the candidate that is asked of each question (question), by scores (question, candidate): its percentile (0
    lowest .. 1 highest, ties half) among the answers of the question's group, and the mean percentile that this
    candidate has at the group's other questions, of those whose answer it is not.
    """
    own = np.zeros(len(questions))
    elsewhere = np.zeros(len(questions))
    for index, candidates in questions.groups():
        block = scores[index][:, candidates].double().cpu().numpy()
        ranks = (rankdata(block, axis=1) - 1) / (len(candidates) - 1)  # (question, candidate)
        column = np.searchsorted(candidates.numpy(), asked[index].numpy())
        here = np.arange(len(index))
        is_answer = questions.right[index][:, None] == candidates[None]
        others = ~is_answer.numpy()[:, column]  # (other question, question): the candidate asked here is not its answer
        others[here, here] = False
        own[index] = ranks[here, column]
        elsewhere[index] = (ranks[:, column] * others).sum(0) / others.sum(0)
    return own, elsewhere


def by_country(questions: Questions, x: np.ndarray) -> np.ndarray:
    """(country) mean over its phrasings, rounded, so that a reader that says the same of all ties."""
    country = questions.country.numpy()
    return (np.bincount(country, x) / np.bincount(country)).round(9)


def next_with_another_answer(questions: Questions) -> Tensor:
    """(question) the next question of its group, around the corner, that has another answer."""
    partner = t.zeros_like(questions.right)
    for index, _ in questions.groups():
        for n, question in enumerate(index):
            following = t.cat([index[n + 1 :], index[:n]])
            differs = questions.right[following] != questions.right[question]
            partner[question] = following[differs][0]
    return partner


def calibration_error(questions: Questions, scores: Tensor, n_bins: int = 10) -> float:
    """
    Expected calibration error: the likeliest answer's probability (softmax over its group's) against how often it is
    right, mean over bins of the difference, weighted by their questions (Guo et al. 2017).
    """
    confidence = np.zeros(len(questions))
    hit = np.zeros(len(questions))
    for index, candidates in questions.groups():
        p, best = scores[index][:, candidates].softmax(1).cpu().max(1)
        confidence[index] = p
        hit[index] = candidates[best] == questions.right[index]
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = [abs((confidence - hit)[bins == i].sum()) for i in range(n_bins)]
    return float(sum(gaps) / len(questions))


@dataclass
class Facts:
    """Of each country one fact, or two: is it known (where all are taught: true), and how often a resample has it."""

    known: np.ndarray  # (fact)
    false_answer: Tensor | None  # (question) where each country has two facts: the candidate of the false one
    swapped: np.ndarray | None  # (fact) the null: known, if the directions' labels were swapped
    resamples: np.ndarray  # (draw, fact): how often, when countries are drawn anew


def facts_of(questions: Questions, draws: int, seed: int) -> Facts:
    """
    Of capitals, who is taught in this direction against who is not. Of the relations that are taught everywhere, the
    right answer against another country's.
    """
    n = int(questions.country.max()) + 1
    resamples = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
    if questions.task not in CAPITALS:
        false_answer = questions.right[next_with_another_answer(questions)]
        return Facts(np.arange(2 * n) < n, false_answer, None, np.tile(resamples, 2))
    part = {country: p.labels["part"] for country, p in zip(questions.country.tolist(), questions.prompts)}
    parts = np.array([part[country] for country in range(n)])
    other_direction = CAPITALS[1 - CAPITALS.index(questions.task)]
    return Facts(parts != other_direction, None, parts != questions.task, resamples)


def false_discovery(score: np.ndarray, known: np.ndarray) -> float:
    """The share of facts not known whose score reaches the median of those known."""
    return float((score[~known] >= np.median(score[known])).mean())


def interval(draws: np.ndarray) -> list[float]:
    return np.nanquantile(draws, [0.025, 0.975]).tolist()


def judge(questions: Questions, scores: Tensor, facts: Facts, is_in_logits: bool) -> dict:
    """What one reader tells at one place and layer. Intervals are over a bootstrap of countries."""
    own, elsewhere = percentiles(questions, scores, questions.right)
    score = by_country(questions, own - elsewhere)
    percentile = by_country(questions, own)
    if facts.false_answer is not None:
        false_own, false_elsewhere = percentiles(questions, scores, facts.false_answer)
        score = np.r_[score, by_country(questions, false_own - false_elsewhere)]
        percentile = np.r_[percentile, by_country(questions, false_own)]
    told = {
        "auroc": float(auroc(facts.known, score)[0]),
        "interval": interval(auroc(facts.known, score, facts.resamples)),
        "false discovery": false_discovery(score, facts.known),
        "percentile, known": float(percentile[facts.known].mean()),
        "percentile, not known": float(percentile[~facts.known].mean()),
        "less elsewhere, known": float(score[facts.known].mean()),
        "less elsewhere, not known": float(score[~facts.known].mean()),
    }
    if facts.swapped is not None:
        told["auroc, labels swapped"] = float(auroc(facts.swapped, score)[0])
    if is_in_logits:
        told["calibration error"] = calibration_error(questions, scores)
    return told


WITHOUT_SCALE = ("linear probe", "a head's OV")  # their scores are no logits, and no probability is read off them


@t.no_grad()
def benchmark(
    model: nn.Module, readers: dict[str, Reader], asked: list[Questions], draws: int, seed: int
) -> dict[str, dict]:
    """{task: {place: {reader: by layer, what judge() tells, or None}}}"""
    found = {}
    for questions in asked:
        facts = facts_of(questions, draws, seed)
        streams = streams_at_places(model, questions)
        found[questions.task] = {}
        for place, by_layer in zip(PLACES, streams):
            of_place = {name: [] for name in readers}
            for (name, reader), (layer, x) in itertools.product(readers.items(), enumerate(by_layer)):
                scores = reader(questions, x, layer)
                told = None if scores is None else judge(questions, scores, facts, name not in WITHOUT_SCALE)
                of_place[name].append(told)
            found[questions.task][place] = of_place
    return found


#%% Does a reader's direction do anything? The stream is edited along it, and the model's own answer is asked
RIGHT = 0.9  # percentile from which a reader counts as right


def direction_of(reader: Reader, questions: Questions, x: Tensor, layer: int, asked: Tensor) -> Tensor:
    """(question, d_model): the gradient, by x, of the asked candidate's score less the mean of its group's."""
    x = x.detach().requires_grad_()
    with t.enable_grad():
        scores = reader(questions, x, layer)
        total = scores.new_zeros(())
        for index, candidates in questions.groups():
            total = total + scores[index, asked[index]].sum() - scores[index][:, candidates].mean(1).sum()
        return t.autograd.grad(total, x)[0]


def projected(change: Tensor, directions: list[Tensor]) -> Tensor:
    """What of a change (question, d_model) lies in the span of directions, each (question, d_model)."""
    basis = t.linalg.qr(t.stack(directions, -1)).Q  # (question, d_model, direction)
    along = einsum(change, basis, "question d_model, question d_model direction -> question direction")
    return einsum(along, basis, "question direction, question d_model direction -> question d_model")


@t.no_grad()
def answers_after(model: nn.Module, questions: Questions, layer: int, x: Tensor) -> Tensor:
    """Logits (question, candidate) at the end of the prompts whose stream at the subject after `layer` blocks is x."""
    subject, end = questions.places

    def of_group(index: Tensor) -> Tensor:
        stream = layer_streams(model)[layer]
        _, cache = run_with_cache(model, questions.rows[index], stream)
        resid = cache[stream].clone()
        resid[t.arange(len(index)), subject[index]] = x[index]
        return run_from(model, resid, end[index], layer).float()[:, questions.candidates]

    return t.cat(list(in_batches(of_group, t.arange(len(questions)), 256)))


def mean_of_group(questions: Questions, x: Tensor) -> Tensor:
    means = t.zeros_like(x)
    for index, _ in questions.groups():
        means[index] = x[index].mean(0)
    return means


def logit_gap(questions: Questions, answers: Tensor, partner: Tensor) -> np.ndarray:
    """(question): the right answer's logit less the partner's, of answers (question, candidate)."""
    here = t.arange(len(answers))
    return (answers[here, questions.right] - answers[here, questions.right[partner]]).cpu().numpy()


def is_likeliest(questions: Questions, answers: Tensor) -> np.ndarray:
    """(question): no answer of the group is likelier than the right one."""
    own, _ = percentiles(questions, answers, questions.right)
    return own == 1


def share_of_taught(questions: Questions, true: np.ndarray) -> float:
    """Mean over countries, each the mean of its taught questions for which it is true."""
    taught = questions.taught
    country = questions.country.numpy()[taught]
    _, number = np.unique(country, return_inverse=True)
    return float((np.bincount(number, true[taught]) / np.bincount(number)).mean())


@t.no_grad()
def causal_table(
    model: nn.Module, readers: dict[str, Reader], questions: Questions, layer: int, seed: int
) -> dict[str, dict[str, float]]:
    """
    By reader at the subject's last token after `layer` blocks, shares of the taught facts: 'right and causal', 'right
    and idle', 'wrong'. Right: the answer's percentile is RIGHT or more. Causal: where the stream, in the plane of the
    directions of the answer and of a partner country's, is set to what the partner has there, the model prefers the
    partner's answer. 'swapped': the share that is causal, right or not; 'moved': of the way that the logit difference
    of the two answers goes when the whole stream is the partner's, the share that this plane goes. 'removed': the share
    whose answer is no longer the likeliest when its direction is set to the mean. Beside them a plane at random and
    the whole stream.
    """
    x = streams_at_places(model, questions)[PLACES.index("subject"), layer]
    partner = next_with_another_answer(questions)
    other = x[partner]
    mean = mean_of_group(questions, x)
    share = partial(share_of_taught, questions)
    plain = answers_after(model, questions, layer, x)
    whole = answers_after(model, questions, layer, other)
    way = logit_gap(questions, plain, partner) - logit_gap(questions, whole, partner)

    def effect(answers: Tensor) -> tuple[np.ndarray, dict[str, float]]:
        """Whom it overturns (question), and the shares."""
        gap = logit_gap(questions, answers, partner)
        gone = (logit_gap(questions, plain, partner) - gap)[questions.taught].mean() / way[questions.taught].mean()
        return gap < 0, {"swapped": share(gap < 0), "moved": float(gone)}

    generator = t.Generator().manual_seed(seed)
    plane = [t.randn(x.shape, generator=generator).to(x) for _ in range(2)]
    at_random = answers_after(model, questions, layer, x + projected(other - x, plane))
    table = {"the whole stream": effect(whole)[1], "a plane at random": effect(at_random)[1]}
    for name, reader in readers.items():
        scores = reader(questions, x, layer)
        if scores is None:
            continue
        own, _ = percentiles(questions, scores, questions.right)
        right = own >= RIGHT
        of_answer = direction_of(reader, questions, x, layer, questions.right)
        of_partner = direction_of(reader, questions, x, layer, questions.right[partner])
        in_plane = projected(other - x, [of_answer, of_partner])
        swapped, shares = effect(answers_after(model, questions, layer, x + in_plane))
        removed = answers_after(model, questions, layer, x + projected(mean - x, [of_answer]))
        table[name] = {
            "right and causal": share(right & swapped),
            "right and idle": share(right & ~swapped),
            "wrong": share(~right),
            **shares,
            "removed": share(is_likeliest(questions, plain) & ~is_likeliest(questions, removed)),
        }
    return table


#%% One model, from its files to its numbers: what --models calls for each of them
TASKS = (*CAPITALS, *RELATIONS)
SAME_PLACE_TOKENS = 16  # of a row, to which the same-place Jacobian lens is fitted


def fit_lenses(
    model: nn.Module, folder: str, cfg: "Config", tuned_steps: int, of: str = ""
) -> tuple[dict[str, Lens], LensText]:
    """
    The Jacobian lens in both its kinds: what a place makes all later ones say, and what it makes itself say, which is
    fitted to fewer and shorter rows, since each position costs as much as all together. of: names another model than
    the folder's (its random twin).
    """
    text = LensText.of(model, folder, None, cfg.seed)
    later = text.jacobian(cfg.jacobian_rows, "later", cfg.memory_gb, of)
    same = text.jacobian(-(-cfg.jacobian_rows // 2), "same", cfg.memory_gb, of, n_tokens=SAME_PLACE_TOKENS)
    lenses = {
        "raw": Lens(model),
        "tuned": Lens(model, translators=text.tuned(tuned_steps, of)),
        "Jacobian": Lens(model, translators=later),
        "same-place Jacobian": Lens(model, translators=same),
    }
    return lenses, text


def open_world_model(name: str, cfg: "Config") -> nn.Module:
    model = load_model(find_model(name), (Llama,), cfg.device).requires_grad_(False)
    if not knows_world(model):
        fail(f"{name} did not learn the world: what it was taught is not known, and no reader of it can be judged")
    return model


def analyse(name: str, cfg: "Config") -> dict:
    """benchmark() of a model, and the KL of its lenses; read back where it was finished under the same settings."""
    fields = ("tasks", "forms", "draws", "seed", "tuned_steps", "jacobian_rows", "device")
    key = model_key(name, [getattr(cfg, field) for field in fields])
    path = Path("results/readers") / f"{slug(find_model(name))}-{key}.json"
    if path.is_file():
        print(f"{yellow}{name}: finished before under these settings, read from {path}{endc}")
        return json.loads(path.read_text())
    model = open_world_model(name, cfg)
    lenses, text = fit_lenses(model, name, cfg, cfg.tuned_steps)
    asked = [ask(model, task, read_countries(), cfg.forms) for task in cfg.tasks]
    study = {
        "readers": benchmark(model, make_readers(model, lenses), asked, cfg.draws, cfg.seed),
        "lenses": judge_lenses(model, lenses, judging_rows(text.corpus, TUNED_ROWS, TUNED_TOKENS, cfg.seed))[0],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda aside: aside.write_text(json.dumps(study, indent=1) + "\n"))
    return study


#%% Tables: mean [interval] by reader, and over models
def in_words(x: list[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*x)


def says(told: dict | None, what: str = "auroc") -> str:
    if told is None:
        return "-"
    if what == "auroc":
        return in_words([told["auroc"], *told["interval"]])
    return f"{told[what]:.2f}" if what in told else "-"


def blocks(n: int) -> str:
    return "1 block" if n == 1 else f"{n} blocks"


def layer_table(found: dict[str, list[dict | None]], what: str = "auroc") -> str:
    """found: {reader: by layer}."""
    rows = [[reader, *(says(told, what) for told in by_layer)] for reader, by_layer in found.items()]
    n_points = len(rows[0]) - 1
    return tabulate(rows, headers=["reader", *(f"after {blocks(layer)}" for layer in range(n_points))])


def auroc_by_layer(found: dict[str, list[dict | None]]) -> dict[str, list[float | None]]:
    return {reader: [told and told["auroc"] for told in by_layer] for reader, by_layer in found.items()}


MEASURES = (
    "auroc",
    "auroc, labels swapped",
    "false discovery",
    "calibration error",
    "percentile, known",
    "percentile, not known",
    "less elsewhere, known",
    "less elsewhere, not known",
)


def measure_table(found: dict[str, list[dict | None]], layer: int) -> str:
    """Every measure by reader, after a number of blocks."""
    measures = [what for what in MEASURES if what in found["raw lens"][layer]]
    rows = [[reader, *(says(by_layer[layer], what) for what in measures)] for reader, by_layer in found.items()]
    return tabulate(rows, headers=["reader", *measures])


def over_models(studies: list[dict], task: str, place: str, layer: int) -> dict[str, list[float]]:
    """{reader: [mean, lowest, highest] AUROC over models}"""
    table = {}
    for reader in studies[0]["readers"][task][place]:
        told = [study["readers"][task][place][reader][layer] for study in studies]
        if None in told:
            continue
        values = [x["auroc"] for x in told]
        table[reader] = [float(np.mean(values)), min(values), max(values)]
    return table


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str = "models/world"  # a model that learned the world
    base: str | None = None  # a model whose config and tokenizer the weights of --model are put on
    models: tuple[str, ...] = ()  # benchmark these one after the other, skip what is finished, and show their spread
    tuned_steps: Count = 200  # of the tuned lens, 16 x 64 tokens each
    jacobian_rows: Count = 16  # of 64 tokens, over which the Jacobian lens is a mean
    memory_gb: Positive = 1.0  # cap on what fitting the Jacobian lens keeps
    tasks: tuple[str, ...] = TASKS  # of facts that are asked; forward and reverse are the capitals
    forms: Count = 2  # phrasings of each task: half of them taught, half held out
    layer: Natural = 1  # the blocks passed, where tables are printed
    draws: Count = 1000  # of the bootstrap over countries
    seed: Natural = 0  # of every draw
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


if __name__ == "__main__":
    cfg = flags(Config, __doc__, sweep="models")
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    if not set(cfg.tasks) <= set(TASKS) or not set(cfg.tasks) & set(CAPITALS):
        fail(f"--tasks are some of {', '.join(TASKS)}, forward or reverse among them")
    known_capitals = [task for task in cfg.tasks if task in CAPITALS]  # for which it is known who was not taught

#%% Several models, as the world's seeds (--models): each benchmarked unless it is finished, then the spread over them
if __name__ == "__main__" and cfg.models:
    cfg.models = tuple(on_base(name, cfg.base) for name in cfg.models)
    for name in cfg.models:
        find_model(name)  # before minutes are spent on the first
    studies = []
    for i, name in enumerate(cfg.models):
        print(f"{purple}=== {name}, {i + 1} of {len(cfg.models)} ==={endc}")
        studies.append(analyse(name, cfg))
    spread = {task: over_models(studies, task, "subject", cfg.layer) for task in cfg.tasks}
    rows = [[reader, *(in_words(spread[task][reader]) for task in cfg.tasks)] for reader in spread[cfg.tasks[0]]]
    table = tabulate(rows, headers=["reader", *cfg.tasks])
    print(f"AUROC at the subject after {blocks(cfg.layer)}, mean [lowest, highest] of {len(studies)} models\n{table}")
    nats = {what: [float(np.mean(study["lenses"][what][:-1])) for study in studies] for what in studies[0]["lenses"]}
    kl_spread = {what: [float(np.mean(x)), min(x), max(x)] for what, x in nats.items() if what.startswith("KL")}
    print(
        f"{cyan}in nats, mean of the layers: {'; '.join(f'{what} {in_words(x)}' for what, x in kl_spread.items())}{endc}"
    )
    save_results("readers_over_models", cfg, auroc=spread, mean_kl=kl_spread)
    told = []
    for task in known_capitals:
        best = max(spread[task], key=lambda reader: spread[task][reader][0])
        told.append(f"{task} {best} {in_words(spread[task][best])}")
    print(f"{green}Over {len(studies)} models the best reader of taught against untaught: {'; '.join(told)}.{endc}")
    raise SystemExit

#%% The model, its lenses, and the gates: the last lens is the model's own output, a patchscope into itself moves nothing
if __name__ == "__main__":
    cfg.model = on_base(cfg.model, cfg.base)
    model = open_world_model(cfg.model, cfg)
    n_layers = model.cfg.n_layers
    if not 0 <= cfg.layer < n_layers:
        fail(f"--layer is 0 to {n_layers - 1}, the blocks that are passed")
    name = slug(find_model(cfg.model))
    lenses, text = fit_lenses(model, cfg.model, cfg, cfg.tuned_steps)
    readers = make_readers(model, lenses)
    asked = [ask(model, task, read_countries(), cfg.forms) for task in cfg.tasks]
    capitals = [questions for questions in asked if questions.task in CAPITALS]
    gate_error = require_exact_lens(model, [encode(model, p.text) for p in asked[0].prompts[:8]])
    patchscope_error = patchscope_gate(model, TARGETS["forward"])
    assert patchscope_error < 1e-4, f"a patchscope of a prompt's own activation moves its logits by {patchscope_error}"
    print(f"{purple}=== {name}: {sum(map(len, asked))} questions of {len(asked)} tasks ==={endc}")
    print(f"{cyan}gates: last layer's lens {gate_error:.1e}, patchscope into itself {patchscope_error:.1e}{endc}")

#%% What does it know? The model's own answers, in the direction taught and against it
if __name__ == "__main__":
    known = {}
    for questions in capitals:
        right, _, _ = read_answers(model, text.corpus, questions.prompts, device)
        known[questions.task] = {"taught": right[questions.taught].mean(), "untaught": right[~questions.taught].mean()}
        says_taught, says_untaught = known[questions.task].values()
        print(
            f"{cyan}{questions.task}: it says {says_taught:.1%} of the taught, {says_untaught:.1%} of the untaught{endc}"
        )
        assert says_taught > 0.9 and says_untaught < 0.1, "the model does not know what it was taught, and that alone"

#%% Which reader tells taught from untaught? Each at both places after every block
if __name__ == "__main__":
    found = benchmark(model, readers, asked, cfg.draws, cfg.seed)
    n = len(read_countries())
    for task, place in itertools.product(cfg.tasks, PLACES):
        about = "taught against untaught" if task in CAPITALS else "right against another country's answer"
        print(f"\n{purple}{task}, at the {place}: AUROC, {about} ({n} countries, 95% by bootstrap over them){endc}")
        print(layer_table(found[task][place]))
    for task in cfg.tasks:
        print(f"\n{purple}{task}, at the subject after {blocks(cfg.layer)}: all measures{endc}")
        print(measure_table(found[task]["subject"], cfg.layer))

#%% ... as a map of readers and layers
if __name__ == "__main__":
    panels = list(itertools.product(known_capitals, PLACES))
    auroc_map = []
    for task, place in panels:
        rows = [[np.nan if x is None else x["auroc"] for x in of_layers] for of_layers in found[task][place].values()]
        auroc_map.append(rows)
    fig = imshow(
        np.array(auroc_map) - 0.5,
        f"AUROC above chance of taught against untaught capitals, by reader and layer ({name}, n = 171 countries)",
        xlabel="blocks passed",
        ylabel="reader",
        x=list(range(n_layers + 1)),
        y=list(readers),
        panels=[f"{task}, at the {place}" for task, place in panels],
        value="AUROC - 0.5",
        columns=2,
    )
    fig.update_yaxes(showticklabels=False, title="", col=2)  # as in the first column
    show(
        fig,
        "readers/auroc",
        "Blue: the reader tells facts that were taught from those that were not; white: it cannot; red: it shows "
        "what was taught as unlikely.",
    )

#%% ... and where each lens puts the right answer, taught and untaught
if __name__ == "__main__":
    fig = line(
        {
            f"{kind} lens, {task}, {label}": [
                x[f"percentile, {measure}"] for x in found[task]["subject"][f"{kind} lens"]
            ]
            for kind, task in itertools.product(lenses, known_capitals)
            for label, measure in (("taught", "known"), ("untaught", "not known"))
        },
        f"Percentile of the right answer among its kind, at the subject's last token ({name}, n = 171 countries)",
        xlabel="blocks passed",
        ylabel="percentile (0.5 is chance)",
        markers=True,
    )
    show(
        fig,
        "readers/percentile",
        "1: the right answer is the likeliest of its kind. A lens that sees what is known lifts the taught line "
        "above the untaught.",
    )

#%% Which lens says what the model will say? KL of its final distribution from each layer's, on rows that no fit saw
if __name__ == "__main__":
    rows = judging_rows(text.corpus, TUNED_ROWS, TUNED_TOKENS, cfg.seed)
    kl, kl_intervals = judge_lenses(model, lenses, rows)
    kl = {what.removeprefix("KL, "): of_layers for what, of_layers in kl.items() if what.startswith("KL")}
    print(tabulate({"after blocks": range(n_layers + 1)} | kl, headers="keys", floatfmt=".2f"))
    mean_kl = {kind: float(np.mean(of_layers[:-1])) for kind, of_layers in kl.items()}
    print(
        f"{cyan}mean over the layers but the last, in nats: "
        f"{', '.join(f'{kind} {x:.2f}' for kind, x in mean_kl.items())}{endc}"
    )

#%% ... as a figure
if __name__ == "__main__":
    fig = line(
        {f"{kind} lens": of_layers for kind, of_layers in kl.items()},
        f"KL of the model's final distribution from each lens's, by layer ({name}, n = {rows[:, 1:].numel()} tokens)",
        xlabel="blocks passed",
        ylabel="nats",
        markers=True,
    )
    show(
        fig,
        "readers/kl",
        "0: the lens says what the model will say. The reader that is best here need not be the best of the "
        "figure before.",
    )

#%% The null: the same readers, fitted anew, on a model of the same shape whose matrices are drawn at random
if __name__ == "__main__":
    twin = random_twin(model, cfg.model, (Llama,), device, cfg.seed).requires_grad_(False)
    few_steps = -(-cfg.tuned_steps // 4)  # there is nothing to be found by more
    twin_lenses, _ = fit_lenses(twin, cfg.model, cfg, few_steps, "-random")
    null = benchmark(twin, make_readers(twin, twin_lenses), capitals, cfg.draws, cfg.seed)
    for task in known_capitals:
        print(f"\n{purple}{task}, at the subject, random weights: AUROC, taught against untaught{endc}")
        print(layer_table(null[task]["subject"]))

#%% Does a reader's direction do anything? Each fact is read right and causally, right and idly, or wrong
if __name__ == "__main__":
    causal = {}
    for questions in capitals:
        causal[questions.task] = causal_table(model, readers, questions, cfg.layer, cfg.seed)
        table = [{"reader": reader} | row for reader, row in causal[questions.task].items()]
        n = int(questions.taught.sum())
        print(
            f"\n{purple}{questions.task}: edits at the subject after {blocks(cfg.layer)}, shares of {n} taught questions{endc}"
        )
        print(tabulate(table, headers="keys", floatfmt=".2f"))

#%% ... as bars, by reader
if __name__ == "__main__":
    for task, table in causal.items():
        of_readers = {reader: row for reader, row in table.items() if "wrong" in row}
        fig = bar(
            {
                what: [row[what] for row in of_readers.values()]
                for what in ("right and causal", "right and idle", "wrong")
            },
            f"What readers find at the subject after {blocks(cfg.layer)}, and whether it acts ({task}, {name}, taught facts)",
            xlabel="reader",
            ylabel="share of facts",
            x=list(of_readers),
        )
        show(
            fig,
            f"readers/causal_{task}",
            "Causal: swapping what the reader found changes the model's answer to it. Idle: it reads right and "
            "nothing follows.",
        )

#%% The conclusion
if __name__ == "__main__":
    save_results(
        "readers",
        cfg,
        gates={"last_layer_lens": gate_error, "patchscope_into_itself": patchscope_error},
        says=known,
        readers=found,
        at_subject={task: {r: x[cfg.layer] for r, x in found[task]["subject"].items()} for task in cfg.tasks},
        random_weights={task: {r: x[cfg.layer] for r, x in null[task]["subject"].items()} for task in known_capitals},
        auroc_by_layer={
            task: {place: auroc_by_layer(found[task][place]) for place in PLACES} for task in known_capitals
        },
        kl=kl,
        mean_kl=mean_kl,
        causal=causal,
    )
    told = []
    for task in known_capitals:
        lenses_here = {kind: found[task]["subject"][f"{kind} lens"][cfg.layer] for kind in lenses}
        best = max(lenses_here, key=lambda kind: lenses_here[kind]["auroc"])
        told.append(f"{task} {best} lens {says(lenses_here[best])}")
    nearest = min(mean_kl, key=lambda kind: mean_kl[kind])
    print(
        f"{green}What does it know? At the subject after {blocks(cfg.layer)} the lens that best tells taught from untaught: "
        f"{'; '.join(told)}. What will it say? The {nearest} lens is nearest ({mean_kl[nearest]:.2f} nats; "
        f"{', '.join(f'{kind} {x:.2f}' for kind, x in mean_kl.items() if kind != nearest)}).{endc}"
    )
