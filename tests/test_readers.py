"""
Readers: the measure on scores made by hand, each reader against a direct computation, edits against their closed form,
and the story over models (on models/world: test_scripts.py).
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch as t
from conftest import ROOT, one_line_error
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

import readers as rd
from logit_attribution import layer_streams
from heads import extraction_by_head
from hooks import act_name, run_with_cache, run_with_hooks
from interventions import patchscope
from lens import Lens
from llama_block import Llama
from probes import ridge_map
from weights import encode, token_text
from world import read_countries


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    t.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    return Llama.from_folder(str(ROOT / "models/world")).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def asked(model) -> dict[str, rd.Questions]:
    return {task: rd.ask(model, task, read_countries()[:45], 2) for task in ("forward", "reverse", "language")}


def test_questions_point_at_the_subject_and_the_end_and_at_their_answer(model, asked):
    for task, questions in asked.items():
        assert len(questions) == 90
        subject = "capital" if task == "reverse" else "country"
        for i, prompt in enumerate(questions.prompts):
            at_subject, at_end = questions.places[:, i].tolist()
            said = "".join(token_text(model, token) for token in questions.rows[i, 1 : at_subject + 1].tolist())
            assert said.endswith(prompt.labels[subject])
            assert questions.rows[i, : at_end + 1].tolist() == encode(model, prompt.text)
            answer = questions.candidates[questions.right[i]].item()
            assert prompt.answer.startswith(token_text(model, answer))
        for index, _ in questions.groups():
            prompts = [questions.prompts[i] for i in index]
            assert len({p.labels["phrasing"] for p in prompts}) == 1
            assert len({p.labels["part"] for p in prompts}) == (1 if task in rd.CAPITALS else 3)


def test_a_percentile_is_the_share_of_rivals_below_and_the_control_leaves_out_whoever_has_that_answer(asked):
    questions = asked["language"]
    scores = t.randint(0, 9, (len(questions), len(questions.candidates))).float()
    own, elsewhere = rd.percentiles(questions, scores, questions.right)
    for i in (0, 17, 89):
        index = (questions.group == questions.group[i]).nonzero()[:, 0]
        rivals = questions.right[index].unique()
        rivals = rivals[rivals != questions.right[i]]

        def percentile(j: int) -> float:
            below = scores[j, questions.right[i]] > scores[j, rivals]
            ties = scores[j, questions.right[i]] == scores[j, rivals]
            return (below.float() + ties.float() / 2).mean().item()

        others = [j for j in index.tolist() if questions.right[j] != questions.right[i]]
        assert own[i] == pytest.approx(percentile(i))
        assert elsewhere[i] == pytest.approx(np.mean([percentile(j) for j in others]))


def test_a_reader_that_knows_tells_taught_from_untaught_and_one_that_likes_an_answer_does_not(asked):
    """The right answer on top for the taught alone; the same answers on top whoever is asked about."""
    questions = asked["forward"]
    facts = rd.facts_of(questions, 50, 0)
    noise = t.rand(len(questions), len(questions.candidates))
    knows = noise.clone()
    taught = t.from_numpy(questions.taught)
    knows[taught, questions.right[taught]] = 2
    told = rd.judge(questions, knows, facts, True)
    assert told["auroc"] > 0.9  # by chance an untaught answer stands high in both phrasings
    assert told["false discovery"] < 0.1
    assert told["percentile, known"] == 1
    assert told["less elsewhere, not known"] == pytest.approx(0, abs=0.25)
    # taught in reverse: half of these are taught forward too, and whoever is taught forward alone counts as unknown
    assert told["auroc, labels swapped"] < 0.35
    likes = t.rand(len(questions.candidates)).expand(len(questions), -1)
    told = rd.judge(questions, likes, facts, True)
    assert told["auroc"] == 0.5
    assert told["less elsewhere, known"] == pytest.approx(0, abs=1e-9)
    assert told["less elsewhere, not known"] == pytest.approx(0, abs=1e-9)


def test_auroc_and_its_interval_are_over_countries(asked):
    questions = asked["forward"]
    facts = rd.facts_of(questions, 400, 0)
    scores = t.randn(len(questions), len(questions.candidates), generator=t.Generator().manual_seed(1))
    own, elsewhere = rd.percentiles(questions, scores, questions.right)
    score = rd.by_country(questions, own - elsewhere)
    assert len(score) == 45
    part = np.array([row["part"] for row in read_countries()[:45]])
    told = rd.judge(questions, scores, facts, False)
    assert told["auroc"] == pytest.approx(roc_auc_score(part != "reverse", score))
    assert told["auroc, labels swapped"] == pytest.approx(roc_auc_score(part != "forward", score))
    assert told["interval"][0] < told["auroc"] < told["interval"][1]
    threshold = np.median(score[part != "reverse"])
    assert told["false discovery"] == pytest.approx((score[part == "reverse"] >= threshold).mean())
    assert "calibration error" not in told


def test_a_relation_that_is_taught_everywhere_is_held_against_another_country_s_answer(asked):
    questions = asked["language"]
    facts = rd.facts_of(questions, 20, 0)
    assert len(facts.known) == 90 and facts.known.sum() == 45 and facts.swapped is None
    knows = t.rand(len(questions), len(questions.candidates))
    knows[t.arange(90), questions.right] = 2
    assert rd.judge(questions, knows, facts, True)["auroc"] > 0.95
    partner = rd.next_with_another_answer(questions)
    assert (questions.right[partner] != questions.right).all()
    assert (questions.group[partner] == questions.group).all()


def test_calibration_error_is_the_gap_between_confidence_and_hits(asked):
    questions = asked["language"]
    n = len(questions)
    sure = t.zeros(n, len(questions.candidates))
    sure[t.arange(n), questions.right] = 30.0
    assert rd.calibration_error(questions, sure) == pytest.approx(0, abs=1e-6)
    wrong = questions.right[rd.next_with_another_answer(questions)]
    sure_and_wrong = t.zeros(n, len(questions.candidates))
    sure_and_wrong[t.arange(n), wrong] = 30.0
    assert rd.calibration_error(questions, sure_and_wrong) == pytest.approx(1, abs=1e-6)


@t.no_grad()
def stream_at(model, questions: rd.Questions, place: str, layer: int) -> t.Tensor:
    _, cache = run_with_cache(model, questions.rows, layer_streams(model)[layer])
    return cache[layer_streams(model)[layer]][t.arange(len(questions)), questions.places[rd.PLACES.index(place)]]


@t.no_grad()
def test_streams_are_taken_at_the_places_and_a_lens_reads_the_candidates_there(model, asked):
    questions = asked["reverse"]
    streams = rd.streams_at_places(model, questions)
    assert streams.shape == (2, 5, 90, 128)
    for place, layer in (("subject", 1), ("end", 4)):
        x = streams[rd.PLACES.index(place), layer]
        t.testing.assert_close(x, stream_at(model, questions, place, layer), atol=1e-5, rtol=1e-5)
    at_end = rd.by_lens(Lens(model), questions, streams[1, 4], 4)
    logits = model(questions.rows)[t.arange(90), questions.places[1]]
    t.testing.assert_close(at_end, logits[:, questions.candidates], atol=1e-4, rtol=1e-4)


@t.no_grad()
@pytest.mark.parametrize("layer", [0, 2])
def test_a_patchscope_is_a_run_of_the_target_whose_stream_is_replaced_at_x(model, asked, layer):
    questions = asked["forward"]
    x = stream_at(model, questions, "subject", layer)[:5]
    target, position = rd.target_prompt(model, rd.TARGETS["forward"])
    texts = [token_text(model, token) for token in target.tolist()[1:]]
    assert texts == ["The", " capital", " of", "X", " is"]
    assert texts[position - 1] == "X"

    def put(resid: t.Tensor, hook: t.nn.Module) -> t.Tensor:
        resid = resid.clone()
        resid[:, position] = x
        return resid

    rows = target.expand(5, -1)
    expected = run_with_hooks(model, rows, [(act_name("resid_pre", layer), put)])[:, -1]
    t.testing.assert_close(patchscope(model, x, layer, target, position), expected, atol=1e-4, rtol=1e-4)
    few = rd.by_patchscope(model, rd.TARGETS, questions, stream_at(model, questions, "subject", layer), layer)[:5]
    t.testing.assert_close(few, expected[:, questions.candidates], atol=1e-4, rtol=1e-4)
    for text in (*rd.TARGETS.values(), rd.SAY_IT_TWICE):
        assert rd.patchscope_gate(model, text) < 1e-5


@t.no_grad()
def test_what_a_head_would_extract_is_what_it_writes_when_it_looks_at_one_place_alone(model, asked):
    questions = asked["forward"]
    rows = questions.rows[:4]
    place = 3

    def look_at_place(pattern: t.Tensor, hook: t.nn.Module) -> t.Tensor:
        alone = t.zeros_like(pattern)
        alone[..., place] = 1
        return alone

    names = [act_name("resid_pre", 2), act_name("result", 2)]
    _, cache = run_with_cache(model, rows, names[:1])
    looks = [(act_name("pattern", 2), look_at_place)]
    results = []
    for scale in (1, 0):  # a stream of zeros leaves what the biases write
        kept = {}
        enters = (names[0], lambda x, hook, scale=scale: scale * x)
        run_with_hooks(model, rows, [enters, *looks, (names[1], lambda x, hook, kept=kept: kept.update(x=x))])
        results.append(kept["x"][:, -1])
    written = (results[0] - results[1]).transpose(0, 1)  # (head, row, d_model)
    extracted = extraction_by_head(model, cache[names[0]][:, place], 2)
    t.testing.assert_close(extracted, written, atol=1e-4, rtol=1e-4)


def test_the_ridge_map_is_scikit_learn_s():
    t.manual_seed(0)
    x, y, new = t.randn(60, 8).double(), t.randn(60, 3).double(), t.randn(5, 8).double()
    x[:, 2] *= 4
    penalty = 0.1 * ((x - x.mean(0)) ** 2).sum().item() / 8
    theirs = Ridge(alpha=penalty).fit(x.numpy(), y.numpy()).predict(new.numpy())
    np.testing.assert_allclose(ridge_map(x, y, 0.1)(new).numpy(), theirs, rtol=1e-6)


@t.no_grad()
def test_the_probe_and_the_choice_of_a_head_never_see_the_country_that_they_are_asked_about(model, asked):
    questions = asked["forward"]
    x = stream_at(model, questions, "subject", 1)
    fold = rd.fold_of(questions)
    other_answers = questions.right.clone()
    first = fold == 0
    other_answers[first] = other_answers[first].roll(1)  # another's answer, in this fold alone
    mislabelled = dataclasses.replace(questions, right=other_answers)
    for reader in (rd.by_probe, rd.by_heads):
        plain = reader(model, questions, x, 1)
        t.testing.assert_close(reader(model, mislabelled, x, 1)[first], plain[first])
    assert all(len(set(fold[questions.country == c].tolist())) == 1 for c in range(45))


def test_a_direction_is_the_slope_of_the_reader_s_score(model, asked):
    questions = asked["forward"]
    x = stream_at(model, questions, "subject", 1)
    lens = Lens(model)
    direction = rd.direction_of(lambda q, z, layer: rd.by_lens(lens, q, z, layer), questions, x, 1, questions.right)

    def score(z: t.Tensor) -> t.Tensor:
        logits = model.unembed(model.ln_final(z))[:, questions.candidates]
        means = t.zeros(len(questions))
        for index, candidates in questions.groups():
            means[index] = logits[index][:, candidates].mean(1)
        return logits[t.arange(len(questions)), questions.right] - means

    with t.no_grad():
        step = 1e-2 * direction / direction.norm(dim=1, keepdim=True)
        slope = (score(x + step) - score(x - step)) / 2e-2
    t.testing.assert_close(slope, direction.norm(dim=1), atol=1e-3, rtol=1e-2)


def test_an_edit_in_a_plane_sets_both_coordinates_and_leaves_the_rest():
    t.manual_seed(0)
    x, other, a, b = (t.randn(6, 20) for _ in range(4))
    edited = x + rd.projected(other - x, [a, b])
    for direction in (a, b):
        t.testing.assert_close((edited * direction).sum(1), (other * direction).sum(1), atol=1e-4, rtol=1e-4)
    outside = t.randn(6, 20)
    outside -= rd.projected(outside, [a, b])
    t.testing.assert_close((edited * outside).sum(1), (x * outside).sum(1), atol=1e-4, rtol=1e-4)


@t.no_grad()
def test_answers_after_an_edit_that_is_none_are_the_model_s_and_a_swap_of_the_subject_asks_about_the_partner(
    model, asked
):
    questions = asked["forward"]
    x = stream_at(model, questions, "subject", 0)
    plain = rd.answers_after(model, questions, 0, x)
    logits = model(questions.rows)[t.arange(90), questions.places[1]][:, questions.candidates]
    t.testing.assert_close(plain, logits, atol=1e-4, rtol=1e-4)
    partner = rd.next_with_another_answer(questions)
    swapped = rd.answers_after(model, questions, 0, x[partner])
    n_tokens = t.tensor([len(encode(model, f" {p.labels['country']}")) - 1 for p in questions.prompts])
    single = (n_tokens == 1) & (n_tokens[partner] == 1)
    assert single.sum() > 10
    t.testing.assert_close(swapped[single], plain[partner][single], atol=1e-3, rtol=1e-3)


def test_the_causal_table_s_classes_are_all_there_is_and_the_whole_stream_overturns_more_than_chance(model, asked):
    questions = asked["forward"]
    readers = rd.make_readers(model, {"raw": Lens(model)})
    table = rd.causal_table(model, readers, questions, 1, 0)
    assert set(table) == {"the whole stream", "a plane at random", *readers}
    for row in table.values():
        if "wrong" in row:
            assert row["right and causal"] + row["right and idle"] + row["wrong"] == pytest.approx(1)
            assert row["right and causal"] <= row["swapped"] + 1e-9
    assert table["the whole stream"]["moved"] == pytest.approx(1)
    assert table["the whole stream"]["swapped"] > 0.8 > 0.3 > table["a plane at random"]["swapped"]


SMALL = "--tasks reverse --forms 1 --draws 20 --tuned-steps 1 --jacobian-rows 1 --device cpu".split()


def test_models_are_benchmarked_once_and_their_spread_is_shown(run, workdir, tmp_path):
    for seed in ("a", "b"):
        shutil.copytree(ROOT / "models/world", tmp_path / seed)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    done = run("readers.py", "--models", folders[0], *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    (study,) = (workdir / "results/readers").glob("*.json")
    shutil.copy(
        study, study.with_name(study.name.replace(rd.slug(folders[0]), rd.slug(folders[1])))
    )  # the same weights
    again = run("readers.py", "--models", *folders, *SMALL)
    assert again.returncode == 0, again.stderr[-2000:]
    spread = json.loads((workdir / "results/readers_over_models.json").read_text())["auroc"]
    for mean, low, high in spread["reverse"].values():
        assert low == mean == high  # twice the same weights
    assert again.stdout.count("finished before") == 2
    assert "Over 2 models the best reader" in again.stdout


def test_what_cannot_be_judged_gets_one_line(run):
    one_line_error(run("readers.py", "--model", "models/attn_only_2l"), "attention-only")
    one_line_error(run("readers.py", "--layer", "9", *SMALL), "--layer is 0 to 3")
    one_line_error(run("readers.py", "--draws", "0"), "at least 1")
    one_line_error(run("readers.py", "--tasks", "language"), "forward or reverse among them")
