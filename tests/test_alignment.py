"""
Interchange interventions: against a linear model whose variable lies in a known subspace, against activation patching,
the fast form against the plain one, cases against what their texts say; and the story of das.py.
"""

import csv
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch as t
import torch.nn as nn
from conftest import ROOT, one_line_error
from models_for_tests import hf_and_bridge, three_pairs

from alignment import (
    CAUSAL_MODELS,
    Cases,
    agrees_with_causal_model,
    draw_cases,
    fit_das,
    interchange,
    interchange_gates,
    interchange_runs,
    interchanged,
    means_subspace,
    places_around,
    principal_subspace,
    random_subspace,
    read_subspaces,
    save_subspaces,
    share_with_interval,
)
from hooks import HookPoint
from pairs import Pairs, draw_pairs
from interventions import activation_patch
from llama_block import Llama
from weights import token_text


@pytest.fixture(scope="module")
def world() -> Llama:
    return Llama.from_folder(str(ROOT / "models/world")).requires_grad_(False)


def cases_of(pairs: Pairs, position: int) -> Cases:
    """Pairs as cases, whose one place stands at the same position everywhere."""
    here = {"here": t.full_like(pairs.answer, position), "end": pairs.answer_pos}
    return Cases(
        base=pairs.clean,
        source=pairs.corrupt,
        edited=pairs.corrupt,
        answer=pairs.answer,
        predicted=pairs.wrong,
        candidates=t.stack([pairs.wrong, pairs.answer], 1),
        base_places=here,
        source_places=here,
        base_end=pairs.answer_pos,
        edited_end=pairs.answer_pos,
        values=["x"] * len(pairs),
        entities=[(str(i), str(i)) for i in range(len(pairs))],
    )


# %% A model with a known answer: two variables in two planes of the stream, and a third that nothing reads
D, N_A, N_B = 16, 12, 3
END = N_A * N_B


def circle(n: int) -> t.Tensor:
    """(n, 2) points on a circle."""
    angle = t.arange(n) * 2 * math.pi / n
    return t.stack([angle.cos(), angle.sin()], 1)


class Block(nn.Module):
    """Every position gets what stands one before it, times `moves`."""

    def __init__(self, moves: float):
        super().__init__()
        self.moves = moves
        self.hook_resid_pre = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, x: t.Tensor) -> t.Tensor:
        x = self.hook_resid_pre(x)
        before = nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
        return self.hook_resid_post(x + self.moves * before)


class TwoVariables(nn.Module):
    """
    Token a * N_B + b is written as A's plane times the point of a, B's times that of b, and noise elsewhere; the first
    block moves it to the end, where the logit of each such token is read from both planes.
    """

    def __init__(self):
        super().__init__()
        t.manual_seed(0)
        self.cfg = SimpleNamespace(n_layers=2, d_model=D, d_mlp=D, n_heads=1, d_vocab=END + 1)
        axes = random_subspace(D, D, t.Generator().manual_seed(0))
        self.plane_a, plane_b, rest = axes[:, :2], axes[:, 2:4], axes[:, 4:]
        points_a = circle(N_A).repeat_interleave(N_B, 0) @ self.plane_a.T
        points_b = circle(N_B).repeat(N_A, 1) @ plane_b.T
        noise = 0.3 * t.randn(END, D - 4) @ rest.T
        self.W_E = t.cat([points_a + points_b + noise, t.zeros(1, D)])
        self.blocks = nn.ModuleList([Block(1.0), Block(0.0)])
        self.ln_final = nn.Identity()
        self.unembed = nn.Linear(D, END + 1, bias=False)
        self.unembed.weight.data = t.cat([8 * (points_a + points_b), t.zeros(1, D)])

    @property
    def W_U(self) -> t.Tensor:
        return self.unembed.weight.T

    def forward(self, tokens, start_at_layer=0, resid=None, stop_at_layer=None):
        x = self.W_E[tokens] if resid is None else resid
        for block in self.blocks[start_at_layer:stop_at_layer]:
            x = block(x)
        return x if stop_at_layer is not None else self.unembed(x)


def two_variable_cases(n: int, odd: int, seed: int) -> Cases:
    """The variable is a: base (a, b), source (a', b') with another b, predicted (a', b). Its values are even, or odd."""
    generator = t.Generator().manual_seed(seed)
    a, other_a = 2 * t.randint(N_A // 2, (2, n), generator=generator) + odd
    b = t.randint(N_B, (n,), generator=generator)
    other_b = (b + t.randint(1, N_B, (n,), generator=generator)) % N_B
    end = t.full((n,), END)
    places = {"subject": t.zeros(n, dtype=t.long), "end": t.ones(n, dtype=t.long)}
    return Cases(
        base=t.stack([a * N_B + b, end], 1),
        source=t.stack([other_a * N_B + other_b, end], 1),
        edited=t.stack([other_a * N_B + b, end], 1),
        answer=a * N_B + b,
        predicted=other_a * N_B + b,
        candidates=None,
        base_places=places,
        source_places=places,
        base_end=places["end"],
        edited_end=places["end"],
        values=[str(x) for x in other_a.tolist()],
        entities=[(str(x), str(y)) for x, y in zip(a.tolist(), other_a.tolist())],
    )


@pytest.mark.parametrize("layer, place, elsewhere", [(0, "subject", "end"), (1, "end", "subject")])
def test_das_finds_the_subspace_in_which_the_variable_is_known_to_lie(layer, place, elsewhere):
    """Also for values that it was not found on; the whole stream brings the other variable too, and is wrong."""
    model = TwoVariables()
    find, test = two_variable_cases(200, 0, 1), two_variable_cases(200, 1, 2)
    assert all(right.all() for right in agrees_with_causal_model(model, test))
    runs, test_runs = interchange_runs(model, find), interchange_runs(model, test)
    found = fit_das(runs, layer, place, rank=2, steps=150, batch=64, lr=0.05)
    same_plane = t.linalg.svdvals(model.plane_a.T @ found)
    assert same_plane.min() > 0.98, "the cosine of the larger angle between the planes"
    assert test_runs.right(layer, place, found).all()
    means = means_subspace(runs.source[place][layer], find.values, 2)
    assert test_runs.right(layer, place, means).float().mean() < 1  # noise and the other variable tilt it
    nothing = random_subspace(D, 2, t.Generator().manual_seed(1))
    assert not test_runs.right(layer, place, None).any()
    assert test_runs.right(layer, place, nothing)[test.changes].float().mean() < 0.3
    elsewhere_found = fit_das(runs, layer, elsewhere, rank=2, steps=20)
    assert not test_runs.right(layer, elsewhere, elsewhere_found)[test.changes].any()
    numbered = replace(runs, source={place: find.index.view(1, -1, 1)}).with_shuffled_sources(0).source[place].flatten()
    assert not (numbered == find.index).any() and numbered.sort().values.equal(find.index)  # each goes to another
    shuffled = fit_das(runs.with_shuffled_sources(0), layer, place, rank=2, steps=150, batch=64, lr=0.05)
    assert test_runs.right(layer, place, shuffled)[test.changes].float().mean() < 0.3


# %% The interchange
def test_an_interchange_takes_the_source_along_the_subspace_and_the_base_across_it():
    generator = t.Generator().manual_seed(0)
    base, source = t.randn(2, 5, D, generator=generator)
    axes = random_subspace(D, D, generator)
    subspace, rest = axes[:, :3], axes[:, 3:]
    mixed = interchanged(base, source, subspace)
    t.testing.assert_close(mixed @ subspace, source @ subspace)
    t.testing.assert_close(mixed @ rest, base @ rest)
    assert interchanged(base, source, None) is source


@pytest.mark.parametrize("layer", [0, 2])
def test_of_the_whole_stream_it_is_activation_patching(world, layer):
    pairs = draw_pairs(world, "agreement", 4, 0)
    position = t.full_like(pairs.answer, 3)
    logits = interchange(world, pairs.corrupt, pairs.clean, f"blocks.{layer}.hook_resid_pre", position, position)
    at_answer = logits[pairs.index, pairs.answer_pos]
    found = at_answer[pairs.index, pairs.answer] - at_answer[pairs.index, pairs.wrong]
    t.testing.assert_close(found, activation_patch(world, pairs, "resid_pre", layer, position=3))


@pytest.mark.parametrize("kind", ["ours", "a bridge"])
def test_runs_from_the_middle_are_the_plain_form_and_the_gates_hold(kind, world):
    if kind == "ours":
        model, cases = world, draw_cases(world, "country", 6, 0, "any")
    else:
        model, cases = hf_and_bridge("GPT2")[1], cases_of(three_pairs(), 3)
    runs = interchange_runs(model, cases)
    assert max(interchange_gates(runs, cases.index).values()) < 1e-5
    subspace = random_subspace(model.cfg.d_model, 5, t.Generator().manual_seed(0))
    place = list(cases.base_places)[0 if kind == "a bridge" else 1]
    for layer in range(model.cfg.n_layers):
        hook_name = f"blocks.{layer}.hook_resid_pre"
        positions = cases.base_places[place], cases.source_places[place]
        plain = interchange(model, cases.base, cases.source, hook_name, *positions, subspace)
        fast = runs.run(layer, place, subspace, cases.index)
        expected = plain[cases.index, cases.base_end]
        t.testing.assert_close(fast, expected, atol=1e-4, rtol=1e-4)
        untouched = model(cases.base)[cases.index, cases.base_end]
        assert (expected - untouched).abs().max() > 1e-3


# %% Cases: what the causal model predicts, read from the texts alone
def said(model: Llama, cases: Cases, i: int) -> tuple[str, str, str, str, dict[str, str]]:
    """(base, source, answer, predicted, the word at each place of the source) of case i."""
    texts = []
    for tokens, end in ((cases.base[i], cases.base_end[i]), (cases.source[i], cases.source_places["end"][i])):
        texts.append("".join(token_text(model, int(token)) for token in tokens[1 : end + 1]))
    places = {name: token_text(model, int(cases.source[i, at[i]])) for name, at in cases.source_places.items()}
    answers = (token_text(model, int(token)) for token in (cases.answer[i], cases.predicted[i]))
    return *texts, *answers, places


def predict_country(base: str, source: str) -> str:
    with open(ROOT / "models/world/countries.csv") as file:
        capitals = {row["country"]: row["capital"] for row in csv.DictReader(file)}
    named = [country for country in capitals if re.search(rf" {re.escape(country)}(?!\w)", source)]
    return f" {capitals[max(named, key=len)]}"


def names_in(text: str) -> list[str]:
    openings = "Then When Yesterday Soon Later One In Last At After With".split()
    return [word for word in re.findall(r"\b[A-Z][a-z]+\b", text) if word not in openings]


def predict_subject_name(base: str, source: str) -> str:
    first, second, _ = names_in(base)
    subject = names_in(source)[-1]
    return f" {second if subject == first else first}"


def predict_subject_position(base: str, source: str) -> str:
    first, second, _ = names_in(base)
    source_first, _, source_subject = names_in(source)
    return f" {second if source_subject == source_first else first}"


def predict_number(base: str, source: str) -> bool:
    """Whether the verb is a plural's."""
    before = re.split(r" (?:near|behind|beside|next to|in front of|across from) ", source)[0]
    return before.endswith("s")


@pytest.mark.parametrize("variable", CAUSAL_MODELS)
def test_the_causal_model_is_what_the_texts_say_and_the_world_model_agrees(world, variable):
    find = draw_cases(world, variable, 40, 0, "find")
    test = draw_cases(world, variable, 40, 0, "test")
    entities = [{name for pair in cases.entities for name in pair} for cases in (find, test)]
    assert not entities[0] & entities[1]
    base_right, edited_right = agrees_with_causal_model(world, test)
    assert base_right.float().mean() > 0.95
    assert edited_right.float().mean() > 0.95
    assert 0 < test.changes.sum() < len(test)
    predict = globals()[f"predict_{variable}"]
    for i in range(len(test)):
        base, source, _, predicted, places = said(world, test, i)
        expected = predict(base, source)
        if variable == "number":
            assert expected == (predicted in (" are", " were", " have"))
            assert places["end"] == token_text(world, int(test.source[i, test.source_places["end"][i]]))
        else:
            assert expected.startswith(predicted), (base, source)
        if variable.startswith("subject"):
            assert places["subject"].strip() == names_in(source)[-1]


# %% Subspaces and their numbers
def test_the_means_of_two_values_span_their_difference():
    x = t.randn(40, D, generator=t.Generator().manual_seed(0))
    values = ["one", "other"] * 20
    difference = x[::2].mean(0) - x[1::2].mean(0)
    found = means_subspace(x, values, 4)
    assert found.shape == (D, 1)
    assert abs(found[:, 0] @ difference / difference.norm()) == pytest.approx(1, abs=1e-5)


def test_places_around_a_word_are_found_at_the_end_of_a_text_too():
    text = "They live in New Japan and like Japan"
    assert [text[:end] for end in places_around(text, "Japan").values()] == [
        "They live in New",
        "They live in New Japan",
        "They live in New Japan and",
        text,
    ]
    assert places_around(text, "Japan", last=True) == {"before": len(text) - 6, "subject": len(text), "end": len(text)}


def test_means_need_two_values():
    with pytest.raises(SystemExit, match="means need two"):
        means_subspace(t.randn(4, 3), ["a"] * 4, 1)


def test_principal_components_keep_the_variance_that_sklearn_says():
    from sklearn.decomposition import PCA

    x = t.randn(60, D, generator=t.Generator().manual_seed(0)) * t.arange(1, D + 1)
    theirs = t.from_numpy(PCA(3).fit(x.numpy()).components_).float()
    assert t.linalg.svdvals(theirs @ principal_subspace(x, 3)).min() > 0.999


def test_the_interval_is_the_binomials_where_every_case_is_about_something_else():
    right = t.arange(400) < 100
    share, low, high = share_with_interval(right, [(str(i), str(i)) for i in range(400)])
    assert share == 0.25
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 * 0.75 / 400), rel=0.1)
    clusters = [(str(i // 50), str(i // 50)) for i in range(400)]
    _, low, high = share_with_interval(right, clusters)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 * 0.75 / 8), rel=0.25)


def test_a_file_of_subspaces_says_where_they_come_from(tmp_path):
    subspace = random_subspace(D, 2, t.Generator().manual_seed(0))
    save_subspaces(tmp_path / "new/one.safetensors", {"blocks.0.hook_resid_pre end": subspace}, model="m", seed=3)
    subspaces, about = read_subspaces(tmp_path / "new/one.safetensors")
    assert subspaces["blocks.0.hook_resid_pre end"].equal(subspace)
    assert about == {"model": "m", "seed": 3}


# %% The story
def test_own_pairs_go_through_the_story(run, workdir, tmp_path):
    rows = ["clean,corrupt,answer,wrong"]
    for noun in ("key", "book", "car", "dog", "tree", "house"):
        rows.append(f"The {noun} near the lamp,The {noun}s near the lamp, is, are")
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(rows) + "\n")
    few = ("--steps", "4", "--ranks", "1", "--random", "2", "--device", "cpu")
    done = run("das.py", "--pairs", str(path), *few)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads((workdir / "results/das.json").read_text())
    assert numbers["variable"] == "what differs in own pairs"
    assert numbers["n"] == numbers["n_held_out"] == 6  # three pairs, both ways
    assert numbers["best"]["means of the values"]["rank"] == 1  # of two values
    assert numbers["iia"]["the whole stream"][0][numbers["places"].index("changed")] == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rank", "999"], "--rank is at most the 128"),
        (["--rank", "0"], "--rank"),
        (["--variable", "colour"], "colour"),
        (["--pairs", "./nowhere.csv"], "cannot be read"),
    ],
)
def test_bad_settings_get_one_line(run, flags, words):
    one_line_error(run("das.py", *flags, "--device", "cpu"), words)
