"""steering.py: where it pushes and how far, and that its choice of SAE is sae_probe.py's."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch as t
from conftest import ROOT, one_line_error
from tokenizers import Tokenizer

import sae_probe
import steering
from anatomy import harvest
from llama_block import Llama
from sae import SAEConfig
from steering import (
    ContinentQuestions,
    continent_means,
    country_prompts,
    log_p_right,
    same_length,
    steering_directions,
    steering_effect,
)
from world import Concept, Labelled, fact_prompts, read_countries

HOOK = "blocks.2.hook_resid_pre"
CONTINENTS = ["Africa", "Asia", "Europe", "North America", "Oceania", "South America"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(ROOT / "models/world/tokenizer.json"))


@pytest.fixture(scope="module")
def questions(tokenizer):
    model = Llama.from_folder(str(ROOT / "models/world")).eval().requires_grad_(False)
    subject = SimpleNamespace(model=model, hook=HOOK, tokenizer=tokenizer, bos=[0])
    prompts = fact_prompts(read_countries(), "continent", True)[:60]
    return ContinentQuestions(subject, prompts, CONTINENTS, "cpu")


def test_the_settings_that_choose_the_sae_are_those_of_sae_probe():
    """Equal defaults, and equal presets, find the SAE that sae_probe.py has trained."""
    for field in dataclasses.fields(SAEConfig):
        assert getattr(steering.Config(), field.name) == getattr(sae_probe.Config(), field.name), field.name
    assert steering.Config().sentences == sae_probe.Config().sentences


def test_the_push_begins_at_the_last_token_of_the_country(tokenizer):
    prompts = fact_prompts(read_countries(), "continent", True)
    tokens, last, places = country_prompts(tokenizer, prompts, [0])
    assert (tokens[:, 0] == 0).all()
    for prompt, row, end, mask in zip(prompts, tokens, last.tolist(), places[..., 0]):
        assert tokenizer.decode(row[1 : end + 1].tolist()) == prompt.text
        start = int(mask.argmax())
        before = tokenizer.decode(row[1 : start + 1].tolist())
        assert before.endswith(prompt.labels["country"])
        assert not tokenizer.decode(row[1:start].tolist()).endswith(prompt.labels["country"])
        assert (mask[:start] == 0).all()
        assert (mask[start:] == 1).all()


def test_answers_are_the_plain_models_less_the_right_ones(questions):
    plain = questions.answers()
    for i in range(0, len(questions), 7):
        tokens = questions.tokens[i : i + 1, : int(questions.last[i]) + 1]
        logits = questions.model(tokens)[0, -1, questions.ids]
        t.testing.assert_close(plain[i], logits - logits[questions.right[i]], rtol=1e-3, atol=1e-3)
    assert (plain.argmax(1) == questions.right).float().mean() > 0.9  # the model knows where countries are
    expected = plain.log_softmax(1)[t.arange(len(plain)), questions.right].mean()
    assert log_p_right(plain) == pytest.approx(expected.item(), rel=1e-4)


def test_a_push_that_puts_another_countrys_stream_there_gives_its_answers(questions):
    """
    Everything from the country on is another prompt's of the same tokens: the same run, as nothing before it differs.
    """
    same_shape = [
        (i, j)
        for i in range(len(questions))
        for j in range(i)
        if questions.right[i] != questions.right[j]
        and questions.last[i] == questions.last[j]
        and questions.places[i].equal(questions.places[j])
        and questions.tokens[i, : int(questions.places[i].argmax())].equal(
            questions.tokens[j, : int(questions.places[j].argmax())]
        )
    ]
    assert same_shape
    i, j = same_shape[0]
    x = harvest(questions.model, questions.tokens, [HOOK])[HOOK]
    moved = questions.answers(lambda y: (x[j] - x[i]).expand_as(y))[i]
    plain = questions.answers()
    theirs = plain[j] - plain[j, questions.right[i]]
    t.testing.assert_close(moved, theirs, rtol=1e-3, atol=1e-3)


def test_the_effect_is_measured_over_prompts_about_other_continents():
    """A model whose answers are the push itself: every direction raises its own continent by its length."""
    right = t.tensor([0, 0, 1, 2])
    pushes = SimpleNamespace(right=right, answers=lambda delta: t.zeros(4, 3) + delta(t.zeros(4, 3)))
    plain = t.zeros(4, 3)
    directions = list(2 * t.eye(3)[:, None])  # of any length: only the direction counts
    assert steering_effect(pushes, plain, directions, t.tensor(5.0), any_target=False) == (5.0, 1.0)
    rise, turned = steering_effect(pushes, plain, directions, t.tensor(5.0), any_target=True)
    assert rise == pytest.approx(5 / 3)
    assert turned == pytest.approx(1 / 3)


def test_continents_are_known_by_training_countries_and_directions_lead_from_the_right_one():
    d_in = 8
    home = np.repeat(np.arange(3), 40)
    group = np.array([f"c{i}" for i in range(120)])
    index = np.arange(120)
    concepts = {f"in {c}": Concept(index, home == i, group) for i, c in enumerate("abc")}
    labelled = Labelled([], index, index, group, concepts)
    activations = 10 * t.eye(d_in)[t.from_numpy(home)]
    means = continent_means(activations, labelled, list("abc"), 0, "cpu")
    t.testing.assert_close(means, 10 * t.eye(d_in)[:3])
    part = steering.split(concepts["in a"], 0)
    activations[t.from_numpy(part != steering.TRAIN)] = t.nan  # only training countries are looked at
    assert continent_means(activations, labelled, list("abc"), 0, "cpu").equal(means)
    decoder = SimpleNamespace(W_dec=t.eye(d_in), cfg=SimpleNamespace(d_in=d_in))
    right = t.tensor([2, 0])
    directions, closest = steering_directions(decoder, means, right, [5, 6], 0)
    assert closest == [0, 1, 2]
    assert directions["difference of means"][1].equal((means[1] - means[right])[:, None])
    assert [len(of_kind) for of_kind in directions.values()] == [3, 3, 10, 10]
    assert all(v.argmax() in (5, 6) for v in directions["random features"])


def test_the_controls_go_as_far_as_the_edit():
    x = t.randn(2, 5, 8)
    other = same_length(lambda x: 3 * x, t.randn(1, 1, 8), x)
    t.testing.assert_close(other.norm(dim=-1), 3 * x.norm(dim=-1))
    assert t.linalg.matrix_rank(other.flatten(0, 1)) == 1


def test_a_misspelt_release_is_answered_with_its_neighbours(run):
    one_line_error(run("steering.py", "--release", "gpt2-smal-res-jb"), "gpt2-smal-res-jb", "gpt2-small-res-jb")
