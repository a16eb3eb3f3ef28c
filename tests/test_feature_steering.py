"""feature_steering.py: where it pushes and how far, and that its choice of SAE is sae_probe.py's."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch as t
from conftest import ROOT, one_line_error
from tokenizers import Tokenizer

import sae_probe
import feature_steering as steering
from hooks import harvest
from llama_block import Llama, LlamaConfig
from probes import subject_position
from sae import SAEConfig
from feature_steering import (
    Asked,
    ContinentQuestions,
    continent_means,
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


@pytest.fixture
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
    starts = [subject_position(tokenizer, prompt, 1) for prompt in prompts]
    rows = [[0, *tokenizer.encode(prompt.text, add_special_tokens=False).ids] for prompt in prompts]
    asked = Asked.of(rows, starts, [len(row) for row in rows], "cpu")
    for prompt, row, end, mask in zip(prompts, asked.tokens, asked.last.tolist(), asked.places[..., 0]):
        assert tokenizer.decode(row[1 : end + 1].tolist()) == prompt.text
        start = int(mask.argmax())
        before = tokenizer.decode(row[1 : start + 1].tolist())
        assert before.endswith(prompt.labels["country"])
        assert not tokenizer.decode(row[1:start].tolist()).endswith(prompt.labels["country"])
        assert (mask[:start] == 0).all()
        assert (mask[start:] == 1).all()


@pytest.fixture(scope="module")
def spelling():
    """Questions to a random model whose tokenizer spells letter by letter, with a bare space before each word."""
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted({c for p in fact_prompts(read_countries(), "continent", True) for c in p.sentence} | {"A", "O"})
    speller = Tokenizer(models.BPE({c: i for i, c in enumerate(["<unk>", *letters])}, [], unk_token="<unk>"))
    speller.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    speller.decoder = decoders.Fuse()
    t.manual_seed(0)
    model = Llama(LlamaConfig(d_model=32, n_layers=2, d_vocab=speller.get_vocab_size(), n_ctx=256)).eval()
    prompts = fact_prompts(read_countries(), "continent", True)[:8]
    for p in model.parameters():
        p.data += 0.2 * t.randn_like(p)
    model.requires_grad_(False)
    subject = SimpleNamespace(model=model, hook="blocks.1.hook_resid_pre", tokenizer=speller, bos=[])
    return ContinentQuestions(subject, prompts, CONTINENTS, "cpu"), speller, prompts


def test_a_continent_is_its_whole_word_where_all_begin_with_a_bare_space(spelling):
    questions, speller, prompts = spelling
    plain = questions.answers()
    steering.require_telling_words(plain)
    for prompt, said, right in zip(prompts, plain, questions.right):
        log_p = []
        for name in CONTINENTS:
            ids = t.tensor([speller.encode(f"{prompt.text} {name}").ids])
            n_word = len(name) + 1
            by_token = questions.model(ids)[0, -n_word - 1 : -1].log_softmax(-1)
            log_p.append(by_token.gather(1, ids[0, -n_word:, None]).sum())
        t.testing.assert_close(said, t.stack(log_p) - log_p[right], rtol=1e-4, atol=1e-3)
    pushed = questions.answers(lambda x: 3 * t.ones_like(x).cumsum(-1))
    assert (pushed - plain).abs().max() > 1e-2


def test_words_that_the_baseline_does_not_tell_apart_stop_the_study():
    with pytest.raises(SystemExit, match="differ between continents by 0"):
        steering.require_telling_words(t.zeros(5, 6))
    with pytest.raises(SystemExit, match="differ between continents by nan"):
        steering.require_telling_words(t.full((5, 6), t.nan))


def test_answers_are_the_plain_models_less_the_right_ones(questions):
    plain = questions.answers()
    asked, of_one_token = questions.passes[0]
    ids = t.stack([questions.words[i][0, 0] for i in of_one_token])
    for i in range(0, len(questions), 7):
        tokens = asked.tokens[i : i + 1, : int(asked.last[i]) + 1]
        logits = questions.model(tokens)[0, -1, ids]
        of_these = plain[i, of_one_token]
        t.testing.assert_close(of_these - of_these[0], logits - logits[0], rtol=1e-3, atol=1e-3)
    assert (plain.gather(1, questions.right[:, None]) == 0).all()
    assert (plain.argmax(1) == questions.right).float().mean() > 0.9  # the model knows where countries are
    expected = plain.log_softmax(1)[t.arange(len(plain)), questions.right].mean()
    assert log_p_right(plain) == pytest.approx(expected.item(), rel=1e-4)


def test_a_push_that_puts_another_countrys_stream_there_gives_its_answers(questions):
    """
    Everything from the country on is another prompt's of the same tokens: the same run, as nothing before it differs.
    """
    asked, of_one_token = questions.passes[0]
    same_shape = [
        (i, j)
        for i in range(len(questions))
        for j in range(i)
        if questions.right[i] != questions.right[j]
        and asked.last[i] == asked.last[j]
        and asked.places[i].equal(asked.places[j])
        and asked.tokens[i, : int(asked.places[i].argmax())].equal(asked.tokens[j, : int(asked.places[j].argmax())])
    ]
    assert same_shape
    i, j = same_shape[0]
    questions.passes = questions.passes[:1]  # the stream below is of these rows
    x = harvest(questions.model, asked.tokens, [HOOK])[HOOK]
    moved = questions.answers(lambda y: (x[j] - x[i]).expand_as(y))[i, of_one_token]
    plain = questions.answers()[j, of_one_token]
    t.testing.assert_close(moved - moved[0], plain - plain[0], rtol=1e-3, atol=1e-3)


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
    one_line_error(run("feature_steering.py", "--release", "gpt2-smal-res-jb"), "gpt2-smal-res-jb", "gpt2-small-res-jb")
