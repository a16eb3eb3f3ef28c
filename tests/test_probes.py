"""probes.py against scikit-learn, and concepts made by hand whose columns are known."""

from random import Random

from types import SimpleNamespace

import json
import numpy as np
import pytest
import torch as t
from conftest import ROOT
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer

import world
from hooks import harvest
from llama_block import Llama
from probes import (
    Example,
    label_examples,
    last_token,
    read_labels,
    without_one_sided,
    probe_directions,
    refuse_one_sided,
    world_examples,
    labelled_tokens,
    TEST,
    TRAIN,
    VALIDATION,
    auroc,
    concepts_of_features,
    draw_sentences,
    harvest_labelled,
    interval_over_splits,
    make_trial,
    method_in_words,
    over_splits,
    random_twin,
    run_probes,
    single_feature,
    split,
    summarise_splits,
)
from features import sparse
from world import DRAW, Concept, Labelled, fact_prompts, label_sentences, read_countries


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(ROOT / "models/world/tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    return Llama.from_folder(str(ROOT / "models/world")).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def either() -> tuple[Concept, np.ndarray]:
    """A concept of 40 of 120 entities that is written in column 3 or in column 5; and the columns (token, 40)."""
    rng = np.random.default_rng(0)
    group = np.repeat([f"e{i}" for i in range(120)], 10)
    y = np.repeat(np.arange(120) < 40, 10)
    x = rng.exponential(size=(1200, 40)) * (rng.random((1200, 40)) < 0.1)
    which = np.repeat(rng.integers(0, 2, 120), 10)
    x[y & (which == 0), 3] += 4
    x[y & (which == 1), 5] += 4
    return Concept(np.arange(1200), y, group), x


# %% The measure
def test_auroc_is_scikit_learns_and_its_weights_repeat_tokens():
    rng = np.random.default_rng(0)
    y = rng.random(300) < 0.3
    score = rng.integers(0, 6, 300).astype(float)
    score[y] += rng.integers(0, 3, y.sum())
    times = rng.integers(0, 3, (4, 300))
    assert auroc(y, score)[0] == pytest.approx(roc_auc_score(y, score))
    for w, value in zip(times, auroc(y, score, times)):
        assert value == pytest.approx(roc_auc_score(np.repeat(y, w), np.repeat(score, w)))


def test_entities_never_stand_in_two_parts(either):
    concept, _ = either
    part = split(concept, 1)
    assert all(len(set(part[concept.group == g])) == 1 for g in set(concept.group))
    assert 0.4 < (part == TRAIN).mean() < 0.6
    assert 0.1 < (part == VALIDATION).mean() < 0.3
    assert all(concept.y[part == i].any() for i in (TRAIN, VALIDATION, TEST))


# %% Probes
def test_probes_find_what_is_there_for_new_entities(either):
    """A concept written in columns 3 and 5 (either) is found by two columns; one alone misses half of its entities."""
    concept, x = either
    found = run_probes(concept, {"features": sparse(t.from_numpy(x))}, {"here": x}, 1)
    assert set(found["2 features"]["units"]) == {3, 5}
    assert found["2 features"]["test"] > 0.99
    # half of the positives stand out, the others are as good as drawn: 0.5 * 1 + 0.5 * 0.5 = 0.75
    single = found["single features"]
    assert 0.6 < single["test"] < 0.9
    assert found["dense here"]["test"] > 0.98
    assert found["difference of means here"]["test"] > 0.98
    low, high = np.nanpercentile(single["boot"], (2.5, 97.5))
    assert low < single["test"] < high


def test_a_difference_of_means_is_the_projection_on_it(either):
    concept, x = either
    found = run_probes(concept, {}, {"here": x}, 1)["difference of means here"]
    parts = make_trial(concept, 1).parts
    positives = parts.train[concept.y[parts.train]]
    negatives = parts.train[~concept.y[parts.train]]
    score = x @ (x[positives].mean(0) - x[negatives].mean(0))
    for name, tokens in (("validation", parts.validation), ("test", parts.test)):
        assert found[name] == pytest.approx(roc_auc_score(concept.y[tokens], score[tokens]))


def test_probes_find_nothing_in_shuffled_labels(either):
    concept, x = either
    shuffled = [run_probes(concept, {}, {"here": x}, seed)["shuffled labels"]["test"] for seed in range(6)]
    assert abs(np.mean(shuffled) - 0.5) < 0.15, shuffled


def test_the_single_feature_is_the_one_that_the_probes_report(either):
    """Two stories choose it, one with the probes and one without: it must be the same."""
    concept, x = either
    codes = sparse(t.from_numpy(x))
    for seed in range(4):
        probed = run_probes(concept, {"features": codes}, {}, seed)["single features"]
        alone = single_feature(make_trial(concept, seed), codes)
        assert alone["units"] == probed["units"]
        assert alone["test"] == probed["test"]
        assert alone["units"] in ([3], [5])  # the columns in which the concept is written


def test_concepts_that_share_their_single_feature_are_listed_under_it(either):
    concept, x = either
    codes = sparse(t.from_numpy(x))
    no_tokens = np.zeros(0, int)
    labelled = Labelled([], no_tokens, no_tokens, no_tokens, {"this": concept, "the same": concept})
    [feature] = single_feature(make_trial(concept, 3), codes)["units"]
    assert concepts_of_features(labelled, codes, 3) == {feature: ["this", "the same"]}


# %% What the splits say together
def made_run(by_k: dict[int, float], layers: dict[str, float], **more: float) -> dict[str, dict]:
    """
    What run_probes would give: AUROCs that are 0.1 lower on test than on validation, and two resamples around the
    test's.
    """
    validation = {"single features": 0.8}
    validation |= {f"{k} features": x for k, x in by_k.items()}
    validation |= {f"dense {place}": x for place, x in layers.items()}
    validation |= more
    run = {}
    for method, x in validation.items():
        run[method] = {"validation": x, "test": x - 0.1, "boot": np.array([x - 0.2, x]), "units": [3, 5]}
    return run


def test_the_summary_chooses_on_validation_and_reports_test():
    by_k = {1: 0.8, 2: 0.94, 4: 0.96, 8: 0.97, 16: 0.98, 32: 0.99}
    runs = [
        made_run(by_k, {"first": 0.9, "second": 0.95}),
        made_run(by_k, {"first": 0.97, "second": 0.95}),
    ]
    probe = summarise_splits(runs, ["first", "second"])
    assert probe["feature"] == 3  # the first of the single feature's units
    assert probe["features_needed"] == 4  # the fewest with 0.95 on validation
    assert probe["features"] == [3, 5]
    assert probe["best_layer"] == "second"  # 0.95 over the splits against (0.9 + 0.97) / 2
    assert probe["auroc"]["4 features"] == pytest.approx(0.96 - 0.1)
    resamples = [0.96 - 0.2, 0.96] * 2  # two of each split
    assert probe["interval"]["4 features"] == pytest.approx(np.percentile(resamples, (2.5, 97.5)).tolist())


def test_a_method_is_summed_up_over_the_splits_that_have_it():
    by_k = dict.fromkeys((1, 2, 4, 8, 16, 32), 0.7)
    runs = [made_run(by_k, {"first": 0.9}), made_run(by_k, {"first": 0.9}, shuffled=0.5)]
    assert over_splits(runs, "shuffled", "test") == pytest.approx(0.5 - 0.1)
    assert interval_over_splits(runs, "shuffled") == pytest.approx(np.percentile([0.3, 0.5], (2.5, 97.5)).tolist())


def test_where_no_number_of_features_is_enough_the_most_are_reported():
    run = made_run({1: 0.7, 2: 0.7, 4: 0.7, 8: 0.7, 16: 0.7, 32: 0.7}, {"first": 0.9})
    run["32 features"]["units"] = [1, 2, 3]
    probe = summarise_splits([run], ["first"])
    assert probe["features_needed"] is None
    assert probe["features"] == [1, 2, 3]


def test_one_feature_is_said_in_the_singular():
    assert method_in_words("1 features") == "1 feature"
    assert method_in_words("single features of random weights") == "single feature of random weights"
    assert method_in_words("16 features") == "16 features"
    assert method_in_words("8 neurons") == "8 neurons"
    assert method_in_words("shuffled labels") == "shuffled labels"


# %% Labelled tokens
def test_labels_stand_on_the_last_token_of_their_entity(tokenizer):
    countries = read_countries()
    prompts = [p for p in fact_prompts(countries, "forward", True) if "Everyone" in p.text]
    prompts += [DRAW[task](Random(i), True) for i in range(20) for task in ("ioi", "agreement")]
    labelled = label_sentences(tokenizer, prompts, t.tensor([[5, 6, 7]]), 10_000, 0)
    names = {
        "country": {r["country"] for r in countries},
        "capital": {r["capital"] for r in countries},
        "name": set(world.WOMEN + world.MEN),
        "object": set(world.OBJECTS),
        "place": set(world.PLACES),
    }
    seen = {role: set() for role in names}
    for row, pos, role in zip(labelled.row, labelled.pos, labelled.role):
        before = tokenizer.decode(labelled.rows[row][: pos + 1])
        if role in names:
            ending = {name for name in names[role] if before.endswith(f" {name}")}
            seen[role] |= ending
            assert ending, (before, role)
        if role in ("plural", "singular"):
            assert before == prompts[row].text
            assert prompts[row].labels["number"] == role
    both = names["country"] & names["capital"]
    assert seen["country"] >= names["country"] - both
    assert seen["capital"] >= names["capital"] - both
    assert seen["name"]
    assert seen["object"]
    assert seen["place"]
    continents = {r["country"]: r["continent"] for r in countries}
    africa = labelled.concepts["in Africa"]
    assert all((continents[g] == "Africa") == y for g, y in zip(africa.group, africa.y))
    assert len(set(africa.group)) > 150


def test_sentences_are_drawn_of_every_kind_and_again_the_same():
    prompts = draw_sentences(3, 0)
    assert len(prompts) == 3 * 8
    assert {p.task for p in prompts} == {*world.FACTS, "ioi", "gender", "agreement"}
    assert all(p.held_out for p in prompts)
    assert [p.sentence for p in draw_sentences(3, 0)] == [p.sentence for p in prompts]
    assert [p.sentence for p in draw_sentences(3, 1)] != [p.sentence for p in prompts]


def test_harvested_activations_stand_where_their_label_stands(tokenizer, model):
    """In batches of rows of one length, or each row run by itself: the same activations, in the order of the labels."""
    hook = "blocks.1.hook_resid_pre"
    labelled = label_sentences(tokenizer, draw_sentences(2, 0), t.tensor([[5, 6, 7]]), 100, 0)
    found = harvest_labelled(model, labelled, [hook], [0], "cpu")[hook]
    assert len(found) == len(labelled.role)
    for i in range(0, len(found), 17):
        tokens = t.tensor([[0, *labelled.rows[labelled.row[i]]]])
        alone = harvest(model, tokens, [hook])[hook][0, labelled.pos[i] + 1]
        t.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-3)


def test_a_random_twin_has_the_models_shape_and_scale_and_nothing_else_of_it(model):
    twin = random_twin(model, "models/world", (Llama,), "cpu", 0)
    for (name, p), drawn in zip(model.named_parameters(), twin.parameters()):
        if p.ndim > 1:
            assert drawn.std().item() == pytest.approx(p.std().item(), rel=0.05), name
            assert abs(t.corrcoef(t.stack([p.flatten(), drawn.flatten()]))[0, 1]) < 0.05, name
        else:
            assert drawn.equal(p), name


def test_what_is_true_of_the_worlds_corpus_alone_is_not_asked_of_other_models(tokenizer):
    corpus = SimpleNamespace(rows=lambda rng, n, ctx, split: rng.integers(1, 3000, (n, ctx)))
    concepts = labelled_tokens(tokenizer, corpus, 5, 0).concepts
    assert "known both ways" in concepts
    of_others = labelled_tokens(tokenizer, corpus, 5, 0, knows_world=False).concepts
    assert set(concepts) - set(of_others) == {"known both ways"}


# %% Labels of one's own
def examples_of(groups: int, label_of) -> list[Example]:
    """Two examples of every group, a number that the text says twice: read at the first."""
    texts = [(f"say {i} and {i} {word}", str(i)) for i in range(10, 10 + groups) for word in ("now", "then")]
    return [Example(text, label_of(int(number)), 4, 6, number) for text, number in texts]


def test_an_example_is_read_at_the_last_token_of_its_stretch(tokenizer):
    examples = [Example("The state of Saint Lucia lies", "a", 13, 24, str(i)) for i in range(4)]
    examples += [Example("We saw Tom", "b", 0, 10, str(i)) for i in range(4, 8)]
    labelled = label_examples(tokenizer, examples)
    assert list(labelled.concepts) == ["b"] and labelled.concepts["b"].y.tolist() == [False] * 4 + [True] * 4
    for example, row, pos in zip(examples, labelled.rows, labelled.pos):
        assert tokenizer.decode(row[: pos + 1]) == example.text[: example.end]


def test_several_labels_are_each_held_against_the_others(tokenizer):
    labelled = label_examples(tokenizer, examples_of(30, lambda i: "abc"[i % 3]))
    assert list(labelled.concepts) == ["a", "b", "c"]
    assert sum(concept.y.astype(int) for concept in labelled.concepts.values()).tolist() == [1] * 60
    assert all(len(set(concept.group)) == 30 for concept in labelled.concepts.values())


def test_a_label_whose_groups_cannot_be_shared_out_gets_one_line(tokenizer):
    with pytest.raises(SystemExit, match="label 'b' is that of 1 groups"):
        label_examples(tokenizer, examples_of(30, lambda i: "b" if i == 12 else "a"))
    concept = Concept(np.arange(8), np.arange(8) < 4, np.repeat(["a", "b"], 4))
    with pytest.raises(SystemExit, match="label 'x': of the groups dealt to"):
        refuse_one_sided(make_trial(concept, 0), "x")


def test_labels_of_the_world_are_what_its_sentences_say():
    for task, said in (("gender", {"man", "woman"}), ("number", {"plural", "singular"})):
        examples = world_examples(task, 40, 0)
        assert {example.label for example in examples} == said and len(examples) == 40
    continent = {row["country"]: row["continent"] for row in read_countries()}
    for example in world_examples("continent", 40, 0):
        assert example.label == continent[example.group] and example.text[example.start : example.end] == example.group
    for example in world_examples("number", 40, 0):
        is_plural = f"{example.group}s " in example.text
        assert example.end == len(example.text) and is_plural == (example.label == "plural")


def test_a_probe_is_scikit_learns_pipeline_and_its_direction_the_gradient_of_its_score(either):
    concept, x = either
    parts = make_trial(concept, 2).parts
    y = concept.y
    regression = LogisticRegression(C=0.1, tol=1e-8, class_weight="balanced")
    theirs = make_pipeline(StandardScaler(), regression).fit(x[parts.train], y[parts.train])
    expected = roc_auc_score(y[parts.test], theirs.decision_function(x[parts.test]))
    assert run_probes(concept, {}, {"here": x}, 2)["dense here"]["test"] == pytest.approx(expected, abs=2e-3)
    direction = probe_directions(concept, x, 2)["logistic probe"]
    score = theirs.decision_function(np.eye(x.shape[1])) - theirs.decision_function(np.zeros((1, x.shape[1])))
    assert direction @ score / np.linalg.norm(score) > 0.999
    assert np.linalg.norm(direction) == pytest.approx(1)


def test_a_stretch_ends_at_its_last_token():
    """The pieces of one character share its offsets: a Chinese character of three tokens ends at the third."""
    offsets = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    assert last_token(offsets, 0, 2) == 3
    assert last_token(offsets, 0, 1) == 0
    assert last_token(offsets, 1, 3) == 4
    with pytest.raises(SystemExit, match="no token stands in characters 3 to 5"):
        last_token(offsets, 3, 5)


def test_what_a_split_cannot_tell_is_left_out(capsys):
    """Of three entities with a concept none is left for one of the parts; of sixty all parts have some."""
    group = np.array([f"entity {i}" for i in range(120)])
    index = np.arange(120)
    few = Concept(index, index < 3, group)
    many = Concept(index, index < 60, group)
    labelled = Labelled([], index, index, np.array([""] * 120), {"few": few, "many": many})
    assert list(without_one_sided(labelled, [0, 1]).concepts) == ["many"]
    assert "few is left out" in capsys.readouterr().out


def test_a_group_that_is_zero_is_a_group(tmp_path):
    rows = [{"text": f"word {i} here", "label": "a" if i % 2 else "b", "group": i % 3} for i in range(6)]
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    assert [example.group for example in read_labels(str(tmp_path / "labels.json"))] == ["0", "1", "2", "0", "1", "2"]
