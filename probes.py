"""
Probes: labelled tokens of the world, which single feature stands for a concept, and how well features, neurons or whole
layers tell a concept of new entities.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from utils import (
    endc,
    fail,
    find_folder,
    load_model,
    seed_of,
    yellow,
)  # first: sets OpenMP's variables before torch is loaded
from hooks import harvest, in_batches
from data import Corpus
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
from pairs import read_table

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
        of_task = fact_prompts(read_countries(), task, True)
        prompts += rng.sample(of_task, min(n, len(of_task)))
    for task in ("ioi", "gender", "agreement"):
        prompts += [DRAW[task](rng, True) for _ in range(n)]
    return prompts


def labelled_tokens(tokenizer, corpus: Corpus, n: int, seed: int, knows_world: bool = True) -> Labelled:
    """
    Tokens of n sentences of each kind, and of 60 rows of text whose tokens have no label; at most 6000 without a label
    are kept. knows_world: the model learned the world; what is true of that corpus alone is not asked of other models.
    """
    natural = judging_rows(corpus, 60, 64, seed_of(seed, "unlabelled text"))[:, 1:]
    labelled = label_sentences(tokenizer, draw_sentences(n, seed), natural, 6000, seed)
    if not knows_world:
        labelled.concepts.pop("known both ways")  # in which directions the world teaches a capital
    return labelled


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
    """
    The same shape with every matrix drawn anew at its own scale (Heap et al. 2025): its SAE shows what is in the text
    alone. ours: see load_model.
    """
    generator = t.Generator().manual_seed(seed)
    twin = copy.deepcopy(model) if isinstance(model, ours) else load_model(find_folder(name), (), device)
    with t.no_grad():
        for p in twin.parameters():
            if p.ndim > 1:
                drawn = t.randn(p.shape, generator=generator).to(p)
                p.copy_(drawn * p.float().std().to(p))
    return twin


def subject_position(tokenizer, prompt: Prompt, n_bos: int) -> int:
    """The last token of the entity that a fact's prompt asks about. n_bos: tokens that stand before the text."""
    subject = prompt.labels["capital" if prompt.task == "reverse" else "country"]
    start = prompt.text.index(subject)
    offsets = tokenizer.encode(prompt.text, add_special_tokens=False).offsets
    return n_bos + last_token(offsets, start, start + len(subject))


def last_token(offsets: list[tuple[int, int]], start: int, end: int) -> int:
    """The last token with characters from start to end; the pieces of one character (Chinese) share its offsets."""
    inside = [i for i, (first, after) in enumerate(offsets) if first < end and after > start]
    if not inside:
        fail(f"no token stands in characters {start} to {end}: the tokenizer leaves them out")
    return inside[-1]


#%% Labels of one's own: texts, what each is, and of which stretch of it
@dataclass
class Example:
    """A text, its label, the characters that the label is about (start, end), and the group that stands in one split."""

    text: str
    label: str
    start: int
    end: int
    group: str


def read_labels(path: str) -> list[Example]:
    """
    From a CSV file or a JSON list with the columns text and label, and if wanted start and end (characters; the whole
    text without) and group. Without a group, examples of the same stretch of text stand in one split.
    """
    rows = read_table(Path(path), "--labels")
    if not rows:
        fail(f"--labels {path} holds no row")
    for name in ("text", "label"):
        if name not in rows[0]:
            fail(f"--labels {path} has no column {name} among {', '.join(map(str, rows[0]))}")
    if ("start" in rows[0]) != ("end" in rows[0]):
        fail(f"--labels {path}: the columns start and end go together")
    return [example_of(path, i + 1, row) for i, row in enumerate(rows)]


def example_of(path: str, number: int, row: dict) -> Example:
    """One row of --labels."""
    text = str(row["text"] or "")
    label = "" if row["label"] is None else str(row["label"]).strip()
    if not text.strip() or not label:
        fail(f"--labels {path}: row {number} lacks {'label' if text.strip() else 'text'}")
    start, end = row.get("start"), row.get("end")
    if start in (None, "") and end in (None, ""):
        start, end = 0, len(text)
    if not str(start).isdigit() or not str(end).isdigit() or not 0 <= int(start) < int(end) <= len(text):
        fail(f"--labels {path}: row {number}: characters {start} to {end} are no stretch of a text of {len(text)}")
    start, end = int(start), int(end)
    group = row.get("group")
    if group is None or not str(group).strip():  # 0 is a group
        group = text[start:end].strip()
    return Example(text, label, start, end, str(group))


FEWEST_GROUPS = 4  # of a label and of the others: to train on, to choose on and to judge on


def label_examples(tokenizer, examples: list[Example]) -> Labelled:
    """
    Every example at the last token of its stretch; a concept for each label against all others (of two labels one is
    enough, the last by name). A split by group asks for several groups with each label and several without.
    """
    labels = sorted({example.label for example in examples})
    if len(labels) < 2:
        fail(f"every example has the label {labels[0]!r}: a probe needs two or more")
    group = np.array([example.group for example in examples])
    rows = []
    pos = []
    for encoding, example in zip(
        tokenizer.encode_batch([e.text for e in examples], add_special_tokens=False), examples
    ):
        rows.append(encoding.ids)
        pos.append(last_token(encoding.offsets, example.start, example.end))
    role = np.array([example.label for example in examples])
    index = np.arange(len(examples))
    concepts = {}
    for label in labels[1:] if len(labels) == 2 else labels:
        y = role == label
        n_with = len(set(group[y]))
        n_without = len(set(group[~y]))
        if min(n_with, n_without) < FEWEST_GROUPS:
            fail(
                f"label {label!r} is that of {n_with} groups, others that of {n_without}: to split by group, "
                f"{FEWEST_GROUPS} or more are needed of both (the column group says which examples belong together)"
            )
        concepts[label] = Concept(index, y, group)
    return Labelled(rows, index, np.array(pos), role, concepts)


def world_examples(task: str, n: int, seed: int) -> list[Example]:
    """
    Labels that the world makes known, of held-out sentences: the continent at a country, the gender at a name, the number
    at the noun before the verb, which is not the one that the verb agrees with. A group is a country, a name, a noun.
    """
    rng = Random(seed_of(seed, "labels"))
    if task == "continent":
        facts = [
            fact for kind in ("forward", "language", "currency") for fact in fact_prompts(read_countries(), kind, True)
        ]
        prompts = rng.sample(facts, min(n, len(facts)))
        asked = [(prompt, prompt.labels["continent"], prompt.labels["country"]) for prompt in prompts]
    else:
        kind, column, entity = {"gender": ("gender", "gender", "name"), "number": ("agreement", "number", "subject")}[
            task
        ]
        prompts = [DRAW[kind](rng, True) for _ in range(n)]
        asked = [(prompt, prompt.labels[column], prompt.labels[entity]) for prompt in prompts]
    examples = []
    for prompt, label, entity in asked:
        end = len(prompt.text) if task == "number" else prompt.text.index(entity) + len(entity)
        start = 0 if task == "number" else end - len(entity)
        examples.append(Example(prompt.text, label, start, end, entity))
    return examples


#%% The measure, and who is trained on
def auroc(y: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """
    Probability that a positive outscores a negative, ties half; one per row of weights (resample, token), which say how
    often each token counts.
    """
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
    """
    TRAIN (half), VALIDATION (a fifth) or TEST (the rest) of every token, by group; groups with and without positives
    are dealt out apart.
    """
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


def resampled_groups(concept: Concept, n: int, rng: np.random.Generator) -> np.ndarray:
    """(resample, token): how often each token counts when as many groups are drawn with replacement."""
    groups, member = np.unique(concept.group, return_inverse=True)
    counts = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), n)
    return counts[:, member]


def shuffled_labels(concept: Concept, rng: np.random.Generator) -> np.ndarray:
    """Every group has another's label; or, where groups are mixed, every token another's."""
    _, member = np.unique(concept.group, return_inverse=True)
    share = np.bincount(member, concept.y) / np.bincount(member)
    if set(share) == {0.0, 1.0}:
        return rng.permutation(share > 0.5)[member]
    return rng.permutation(concept.y)


@dataclass
class Trial:
    """One split of a concept's entities: what every probe of it is trained on and judged by."""

    concept: Concept
    parts: Parts
    resamples: np.ndarray  # (100, test token): how often each counts when the groups are drawn again
    shuffled: np.ndarray  # (token) labels that mean nothing


def make_trial(concept: Concept, seed: int) -> Trial:
    rng = np.random.default_rng(seed)
    parts = deal(concept, seed, rng)
    resamples = resampled_groups(concept, 100, rng)[:, parts.test]
    return Trial(concept, parts, resamples, shuffled_labels(concept, rng))


def one_sided_part(trial: Trial) -> str | None:
    """A part of the split in which every token has the label, or none, so that it tells nothing."""
    for name, part in vars(trial.parts).items():
        y = trial.concept.y[part]
        if not len(y) or y.all() or not y.any():
            return name
    return None


def refuse_one_sided(trial: Trial, label: str) -> None:
    name = one_sided_part(trial)
    if name:
        fail(
            f"label {label!r}: of the groups dealt to {name}, all examples or none have it: give more groups with it "
            "and without it"
        )


def without_one_sided(labelled: Labelled, seeds: list[int]) -> Labelled:
    """The concepts that every split can tell, in training, validation and test; the others are left out, and said."""
    kept = {}
    for name, concept in labelled.concepts.items():
        if any(one_sided_part(make_trial(concept, seed)) for seed in seeds):
            print(
                f"{yellow}{name} is left out: too few entities have it for {len(seeds)} splits (more --sentences){endc}"
            )
        else:
            kept[name] = concept
    return replace(labelled, concepts=kept)


def judged(
    trial: Trial,
    y: np.ndarray,
    validation_score: np.ndarray,
    test_score: np.ndarray,
    units: list[int] | None = None,
) -> dict:
    """
    'validation' and 'test': AUROC on those entities; 'boot': the test's by resample; 'units': the columns that were
    seen. y: labels (token of the concept); scores are those of the tokens of their part.
    """
    y_test = y[trial.parts.test]
    return {
        "validation": float(auroc(y[trial.parts.validation], validation_score)[0]),
        "test": float(auroc(y_test, test_score)[0]),
        "boot": auroc(y_test, test_score, trial.resamples),
        "units": units,
    }


#%% Few columns of codes: the single one that stands for a concept, and logistic regressions on the first of them
KS = (1, 2, 4, 8, 16, 32)  # how many features a probe may see


def column_means(x: csr_matrix) -> np.ndarray:
    return np.asarray(x.mean(0)).ravel()


def by_difference(x: csr_matrix, y: np.ndarray, n: int) -> np.ndarray:
    """The n columns of x (token, feature) whose means differ most, in standard deviations, higher in the positives."""
    difference = column_means(x[y]) - column_means(x[~y])
    variance = column_means(x.multiply(x)) - column_means(x) ** 2
    std = np.sqrt(np.maximum(variance, 0))
    return np.argsort(-difference / (std + 1e-6))[:n]


def candidates(trial: Trial, codes: csr_matrix) -> tuple[list[int], np.ndarray]:
    """
    The columns of codes (labelled token, feature) that differ most on the training entities, best first; and their
    values (token of the concept, column).
    """
    concept = trial.concept
    train = trial.parts.train
    chosen = by_difference(codes[concept.index[train]], concept.y[train], KS[-1])
    return chosen.tolist(), codes[concept.index][:, chosen].toarray()


def best_candidate(trial: Trial, chosen: list[int], x: np.ndarray) -> dict:
    """The candidate that tells the concept best on validation entities, as its own score."""
    validation = trial.parts.validation
    y = trial.concept.y
    scores = [auroc(y[validation], column)[0] for column in x[validation].T]
    best = int(np.argmax(scores))
    column = x[:, best]
    return judged(trial, y, column[validation], column[trial.parts.test], units=[chosen[best]])


def single_feature(trial: Trial, codes: csr_matrix) -> dict:
    """
    The one column of codes (labelled token, feature) that stands for the concept: among those that differ most on
    training entities, the one that tells best on validation entities. It is the one of 'units'; 'test' is its AUROC.
    """
    return best_candidate(trial, *candidates(trial, codes))


def concepts_of_features(labelled: Labelled, codes: csr_matrix, seed: int) -> dict[int, list[str]]:
    """{feature: the concepts whose single feature it is}."""
    concepts: dict[int, list[str]] = {}
    for name, concept in labelled.concepts.items():
        [feature] = single_feature(make_trial(concept, seed), codes)["units"]
        concepts.setdefault(feature, []).append(name)
    return concepts


@dataclass
class LinearProbe:
    """The log-odds of a label, as a linear function of z (..., column); weight (column) is its direction there."""

    weight: np.ndarray
    bias: float

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return z @ self.weight + self.bias


def fit_probe(x: np.ndarray, y: np.ndarray) -> LinearProbe:
    """Logistic regression on standardised columns."""
    from sklearn.linear_model import LogisticRegression

    mean = x.mean(0)
    std = x.std(0) + 1e-6
    regression = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-2, class_weight="balanced")
    regression.fit((x - mean) / std, y)

    weight = regression.coef_[0] / std
    return LinearProbe(weight, float(regression.intercept_[0] - mean @ weight))


def ridge_map(x: Tensor, y: Tensor, penalty: float = 0.1) -> Callable[[Tensor], Tensor]:
    """
    The affine map from x (row, d_in) to y (row, d_out) of ridge regression, as a function; penalty in units of the mean
    variance of x, times the number of rows.
    """
    mean_x = x.mean(0)
    mean_y = y.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred
    strength = penalty * gram.trace() / len(gram) + 1e-12  # where x never varies the mean of y is predicted
    weight = t.linalg.solve(gram + strength * t.eye(len(gram), device=x.device), centred.T @ (y - mean_y))

    def predict(z: Tensor) -> Tensor:
        return (z - mean_x) @ weight + mean_y

    return predict


def logistic_probe(trial: Trial, x: np.ndarray, y: np.ndarray, units: list[int] | None = None) -> dict:
    """A logistic regression from x (token of the concept, column) to y, fitted on the training entities."""
    parts = trial.parts
    score = fit_probe(x[parts.train], y[parts.train])
    return judged(trial, y, score(x[parts.validation]), score(x[parts.test]), units)


def probe_codes(trial: Trial, codes: csr_matrix, source: str, ks: tuple[int, ...]) -> dict[str, dict]:
    """The best single column, and logistic regressions on the first k candidates, for every k."""
    chosen, x = candidates(trial, codes)
    found = {f"single {source}": best_candidate(trial, chosen, x)}
    for k in ks:
        found[f"{k} {source}"] = logistic_probe(trial, x[:, :k], trial.concept.y, units=chosen[:k])
    return found


#%% Whole layers: a logistic regression, the difference of means, and what a probe finds where nothing is to be found
def difference_of_means(trial: Trial, x: np.ndarray) -> dict:
    """x (token of the concept, d) along the line from the mean of the negatives to that of the positives."""
    parts = trial.parts
    y = trial.concept.y
    x_train = x[parts.train]
    y_train = y[parts.train]
    direction = x_train[y_train].mean(0) - x_train[~y_train].mean(0)
    return judged(trial, y, x[parts.validation] @ direction, x[parts.test] @ direction)


def probe_dense(trial: Trial, activations: np.ndarray, place: str) -> dict[str, dict]:
    """activations: (labelled token, d) of a place in the model."""
    x = activations[trial.concept.index]
    return {
        f"dense {place}": logistic_probe(trial, x, trial.concept.y),
        f"difference of means {place}": difference_of_means(trial, x),
    }


def probe_shuffled(trial: Trial, activations: np.ndarray) -> dict[str, dict]:
    """The baseline: labels without meaning. Nothing where all labels to train on came out the same."""
    y_train = trial.shuffled[trial.parts.train]
    if y_train.all() or not y_train.any():
        return {}
    return {"shuffled labels": logistic_probe(trial, activations[trial.concept.index], trial.shuffled)}


def run_probes(
    concept: Concept, codes: dict[str, csr_matrix], dense: dict[str, np.ndarray], seed: int
) -> dict[str, dict]:
    """
    {method: as `judged` says} on one split of the concept's entities. codes (labelled token, column) by source: probed
    by few columns; dense activations (labelled token, d) by place: probed whole, the last of them also with shuffled
    labels.
    """
    trial = make_trial(concept, seed)
    found: dict[str, dict] = {}
    for source, columns in codes.items():
        ks = KS if source == "features" else (8,)  # neurons and the like are only compared
        found |= probe_codes(trial, columns, source, ks)
    for place, activations in dense.items():
        found |= probe_dense(trial, activations, place)
    if dense:
        found |= probe_shuffled(trial, list(dense.values())[-1])
    return found


#%% The lines that probes of a layer find, in its own coordinates
def probe_directions(concept: Concept, activations: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """{method: unit direction (d)} of the whole-layer probes on a split's training groups; zero where all are alike."""
    trial = make_trial(concept, seed)
    x = activations[concept.index][trial.parts.train]
    y = concept.y[trial.parts.train]
    found = {"logistic probe": fit_probe(x, y).weight, "difference of means": x[y].mean(0) - x[~y].mean(0)}
    return {method: direction / (np.linalg.norm(direction) or 1.0) for method, direction in found.items()}


#%% What the splits say together: runs are run_probes's answers for one concept, one run a split
def method_in_words(method: str) -> str:
    """'1 features' and 'single features', as results call them, in the singular."""
    return re.sub(r"^(1|single) (feature|neuron)s", r"\1 \2", method)


def over_splits(runs: list[dict[str, dict]], method: str, part: str) -> float:
    """Mean AUROC of a method on a part ('validation' or 'test'), over the splits that have it."""
    return float(np.nanmean([run[method][part] for run in runs if method in run]))


def interval_over_splits(runs: list[dict[str, dict]], method: str) -> list[float]:
    """95% of the test AUROCs over splits and resampled entities."""
    resampled = np.concatenate([run[method]["boot"] for run in runs if method in run])
    return np.nanpercentile(resampled, (2.5, 97.5)).tolist()


def summarise_splits(runs: list[dict[str, dict]], places: list[str]) -> dict:
    """
    The number of features and the best of places (layers that were probed whole) are chosen on validation entities, the
    single feature and the features are the first split's.
    """
    validation = {method: over_splits(runs, method, "validation") for method in runs[0]}
    enough = [k for k in KS if validation[f"{k} features"] >= 0.95]
    needed = enough[0] if enough else None
    return {
        "feature": runs[0]["single features"]["units"][0],
        "features_needed": needed,
        "features": runs[0][f"{needed or KS[-1]} features"]["units"],
        "best_layer": max(places, key=lambda place: validation[f"dense {place}"]),
        "auroc": {method: over_splits(runs, method, "test") for method in runs[0]},
        "interval": {method: interval_over_splits(runs, method) for method in runs[0]},
    }
