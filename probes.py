"""Probes: labelled tokens of the world, which single feature stands for a concept, and how well features, neurons or whole layers tell a concept of new entities."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from utils import find_folder, load_model  # first: sets OpenMP's variables before torch is loaded
from hooks import in_batches
from data import Corpus
from anatomy import harvest
from world import (
    DRAW,
    FACTS,
    Concept,
    Labelled,
    Prompt,
    fact_prompts,
    judging_rows,
    label_sentences,
    read_countries,
)

import numpy as np
import torch as t
import torch.nn as nn
from scipy.sparse import csr_matrix
from torch import Tensor


#%% Labelled tokens, and what a model has at them
def draw_sentences(n: int, seed: int) -> list[Prompt]:
    """n held-out sentences of every kind of fact and of three other tasks."""
    rng = Random(seed)
    prompts = []
    for task in FACTS:
        prompts += rng.sample(fact_prompts(read_countries(), task, True), n)
    for task in ("ioi", "gender", "agreement"):
        prompts += [DRAW[task](rng, True) for _ in range(n)]
    return prompts


def labelled_tokens(tokenizer, corpus: Corpus, n: int, seed: int) -> Labelled:
    """Tokens of n sentences of each kind, and of 60 rows of text whose tokens have no label; at most 6000 without a label are kept."""
    natural = judging_rows(corpus, 60, 64, seed + 1)[:, 1:]
    return label_sentences(tokenizer, draw_sentences(n, seed), natural, 6000, seed)


def harvest_labelled(
    model: nn.Module, labelled: Labelled, names: list[str], bos: list[int], device: str
) -> dict[str, Tensor]:
    """{hook: (kept token, d)} on the CPU. bos: what stands before every row."""
    by_row: dict[str, list] = {name: [None] * len(labelled.rows) for name in names}

    def keep(same_length: list[int]) -> None:
        tokens = t.tensor([bos + labelled.rows[i] for i in same_length], device=device)
        for name, x in harvest(model, tokens, names).items():
            for i, activation in zip(same_length, x.cpu()):
                by_row[name][i] = activation[len(bos) :]

    lengths = [len(row) for row in labelled.rows]
    for length in sorted(set(lengths)):
        same_length = [i for i, other in enumerate(lengths) if other == length]
        list(in_batches(keep, same_length, 128))
    start_of_row = np.cumsum([0, *lengths])
    places = start_of_row[labelled.row] + labelled.pos
    return {name: t.cat(rows)[places] for name, rows in by_row.items()}


def random_twin(model: nn.Module, name: str, ours: tuple[type, ...], device: str, seed: int) -> nn.Module:
    """The same shape with every matrix drawn anew at its own scale (Heap et al. 2025): its SAE shows what is in the text alone. ours: see load_model."""
    generator = t.Generator().manual_seed(seed)
    twin = copy.deepcopy(model) if isinstance(model, ours) else load_model(find_folder(name), (), device)
    with t.no_grad():
        for p in twin.parameters():
            if p.ndim > 1:
                drawn = t.randn(p.shape, generator=generator).to(p)
                p.copy_(drawn * p.float().std().to(p))
    return twin


#%% The measure, and who is trained on
def auroc(y: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Probability that a positive outscores a negative, ties half; one per row of weights (resample, token), which say how often each token counts."""
    order = np.argsort(score, kind="stable")
    y = y[order]
    score = score[order]
    weights = np.ones((1, len(y))) if weights is None else weights[:, order]
    new_score = np.r_[True, score[1:] != score[:-1]]
    starts = np.flatnonzero(new_score)  # of runs of equal scores
    positive = np.add.reduceat(weights * y, starts, 1)
    negative = np.add.reduceat(weights * ~y, starts, 1)
    outscored = negative.cumsum(1) - negative / 2
    with np.errstate(invalid="ignore"):  # nan where a resample has one label only
        return (positive * outscored).sum(1) / (positive.sum(1) * negative.sum(1))


TRAIN, VALIDATION, TEST = range(3)


def split(concept: Concept, seed: int) -> np.ndarray:
    """TRAIN (half), VALIDATION (a fifth) or TEST of every token, by group; groups with and without positives are dealt out apart."""
    rng = np.random.default_rng(seed)
    with_positives = set(concept.group[concept.y])
    without = set(concept.group) - with_positives
    part_of = {}
    for groups in (sorted(with_positives), sorted(without)):
        for i, group in enumerate(rng.permutation(groups)):
            part_of[group] = int(np.searchsorted((0.5, 0.7), (i + 0.5) / len(groups)))
    return np.array([part_of[group] for group in concept.group])


@dataclass
class Parts:
    """Indices into a concept's tokens."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def deal(concept: Concept, seed: int, rng: np.random.Generator) -> Parts:
    """The split, with at most 400 positives and 800 negatives to train on."""
    part = split(concept, seed)
    train = np.flatnonzero(part == TRAIN)
    is_positive = concept.y[train]
    positives = rng.permutation(train[is_positive])[:400]
    negatives = rng.permutation(train[~is_positive])[:800]
    return Parts(
        train=np.concatenate([positives, negatives]),
        validation=np.flatnonzero(part == VALIDATION),
        test=np.flatnonzero(part == TEST),
    )


#%% Which single feature stands for a concept: the candidates by training entities, the choice by validation entities
def column_means(x: csr_matrix) -> np.ndarray:
    return np.asarray(x.mean(0)).ravel()


def by_difference(x: csr_matrix, y: np.ndarray, n: int) -> np.ndarray:
    """The n columns of x (token, feature) whose means differ most, in standard deviations, higher in the positives."""
    difference = column_means(x[y]) - column_means(x[~y])
    variance = column_means(x.multiply(x)) - column_means(x) ** 2
    std = np.sqrt(np.maximum(variance, 0))
    return np.argsort(-difference / (std + 1e-6))[:n]


KS = (1, 2, 4, 8, 16, 32)  # how many features a probe may see


def candidates(concept: Concept, codes: csr_matrix, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """The columns of codes that differ most on the training entities, best first; and their values (token of the concept, column)."""
    chosen = by_difference(codes[concept.index[parts.train]], concept.y[parts.train], KS[-1])
    return chosen, codes[concept.index][:, chosen].toarray()


def best_column(x: np.ndarray, y: np.ndarray, validation: np.ndarray) -> int:
    scores = [auroc(y[validation], column)[0] for column in x[validation].T]
    return int(np.argmax(scores))


def single_feature(concept: Concept, codes: csr_matrix, seed: int) -> tuple[int, float]:
    """The one column of codes (token, feature) that tells the concept best on validation entities, and its AUROC on test entities. As in run_probes."""
    parts = deal(concept, seed, np.random.default_rng(seed))
    chosen, x = candidates(concept, codes, parts)
    best = best_column(x, concept.y, parts.validation)
    return int(chosen[best]), float(auroc(concept.y[parts.test], x[parts.test, best])[0])


def concepts_of_features(labelled: Labelled, codes: csr_matrix, seed: int) -> dict[int, list[str]]:
    """{feature: the concepts whose single feature it is}."""
    concepts: dict[int, list[str]] = {}
    for name, concept in labelled.concepts.items():
        feature, _ = single_feature(concept, codes, seed)
        concepts.setdefault(feature, []).append(name)
    return concepts


#%% Probes: single columns, logistic regressions on a few of them or on a whole layer, differences of means, and shuffled labels
def fit_probe(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Logistic regression on standardised columns; returns its score as a function."""
    from sklearn.linear_model import LogisticRegression

    mean = x.mean(0)
    std = x.std(0) + 1e-6
    probe = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-2, class_weight="balanced")
    probe.fit((x - mean) / std, y)

    def score(z: np.ndarray) -> np.ndarray:
        return probe.decision_function((z - mean) / std)

    return score


def shuffled_labels(concept: Concept, rng: np.random.Generator) -> np.ndarray:
    """Every group has another's label; or, where groups are mixed, every token another's."""
    _, member = np.unique(concept.group, return_inverse=True)
    share = np.bincount(member, concept.y) / np.bincount(member)
    if set(share) == {0.0, 1.0}:
        return rng.permutation(share > 0.5)[member]
    return rng.permutation(concept.y)


def resampled_groups(concept: Concept, n: int, rng: np.random.Generator) -> np.ndarray:
    """(resample, token): how often each token counts when as many groups are drawn with replacement."""
    groups, member = np.unique(concept.group, return_inverse=True)
    counts = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), n)
    return counts[:, member]


def run_probes(
    concept: Concept, codes: dict[str, csr_matrix], dense: dict[str, np.ndarray], seed: int
) -> dict[str, dict]:
    """
    {method: 'validation' and 'test' AUROC, 'boot' the test's on 100 resamples of the groups, 'units' the columns}. Columns are picked from codes, by source;
    dense activations, by place, are probed whole; the last of them also with shuffled labels.
    """
    rng = np.random.default_rng(seed)
    y = concept.y
    parts = deal(concept, seed, rng)
    weights = resampled_groups(concept, 100, rng)[:, parts.test]
    shuffled = shuffled_labels(concept, rng)
    train = parts.train
    found: dict[str, dict] = {}

    def judged(validation_score: np.ndarray, test_score: np.ndarray, y: np.ndarray, units: list[int] | None) -> dict:
        return {
            "validation": float(auroc(y[parts.validation], validation_score)[0]),
            "test": float(auroc(y[parts.test], test_score)[0]),
            "boot": auroc(y[parts.test], test_score, weights),
            "units": units,
        }

    def probed(x: np.ndarray, y: np.ndarray, units: list[int] | None = None) -> dict:
        score = fit_probe(x[train], y[train])
        return judged(score(x[parts.validation]), score(x[parts.test]), y, units)

    for source, all_columns in codes.items():
        chosen, x = candidates(concept, all_columns, parts)
        best = best_column(x, y, parts.validation)
        column = x[:, best]
        found[f"single {source}"] = judged(column[parts.validation], column[parts.test], y, [int(chosen[best])])
        if dense:
            for k in KS if source == "features" else (8,):
                found[f"{k} {source}"] = probed(x[:, :k], y, chosen[:k].tolist())
    for place, activations in dense.items():
        x = activations[concept.index]
        found[f"dense {place}"] = probed(x, y)
        direction = x[train][y[train]].mean(0) - x[train][~y[train]].mean(0)
        found[f"difference of means {place}"] = judged(
            x[parts.validation] @ direction, x[parts.test] @ direction, y, None
        )
    if dense and 0 < shuffled[train].sum() < len(train):
        found["shuffled labels"] = probed(x, shuffled)
    return found
