"""
The study of many questions: intervals over countries, controls, models one after the other, and the script on
models/world.
"""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch as t
from conftest import ROOT, one_line_error
from test_lens import save_model

import reversal as rv
from lens import RULES, Lens, read
from llama_block import Llama
from utils import load_model
from weights import token_text
from world import read_countries


@pytest.fixture(scope="module")
def world_model():
    return load_model(str(ROOT / "models/world"), (Llama,), "cpu")


def test_intervals_resample_countries():
    country = np.repeat(np.arange(100), 4)
    frame = pd.DataFrame({"country": country, "x": np.repeat(np.arange(100) % 2, 4).astype(float), "same": 1.0})
    mean, low, high = rv.interval(frame, "x", 2000)
    assert mean == 0.5
    assert abs((high - low) / 2 - 1.96 * 0.5 / 10) < 0.015  # 400 questions, but 100 countries
    assert rv.interval(frame, "same", 100) == [1, 1, 1]
    assert rv.interval(frame, "x", 100, frame) == [0, 0, 0]  # paired
    others = frame.assign(country=frame.country + 1000)  # the same means, of other countries: not paired
    mean, low, high = rv.interval(frame, "x", 2000, others)
    assert mean == 0
    assert abs((high - low) / 2 - 1.96 * (2 * 0.05**2) ** 0.5) < 0.02
    some = frame[frame.country >= 50]
    mean, low, high = rv.interval(frame, "x", 2000, some)
    assert low < mean == 0 < high
    assert np.isnan(rv.interval(frame.assign(x=np.nan), "x", 10)).all()


def test_a_control_is_the_next_country_with_another_answer():
    answers = pd.Series({3: [7, 1], 5: [7, 2], 8: [9]})
    assert rv.find_controls(answers) == {3: 8, 5: 8, 8: 3}
    assert rv.find_controls(pd.Series({3: [7], 5: [7]})) == {3: 3, 5: 5}


def test_questions_come_in_both_directions_forms_and_fillers(world_model):
    countries = read_countries()[:8]
    frame = rv.make_questions(world_model, countries, 4, known=True)
    assert len(frame) == 8 * 2 * 4 * 2  # countries, directions, forms, fillers
    assert len(rv.chosen_forms("forward", 4)) == 4
    taught, held_out = rv.FACTS["forward"]
    assert rv.chosen_forms("forward", 3) == [taught[0], held_out[0], taught[1]]
    for row, control in zip(frame.itertuples(), frame.control):
        other = frame.loc[control]
        if control != row.Index:
            assert other.answer[0] != row.answer[0]
        assert (other.task, other.form, other.filler, other.part) == (row.task, row.form, row.filler, row.part)
        assert "".join(token_text(world_model, i) for i in row.ids[1:] + row.answer) == row.text + row.said
    unknown = rv.make_questions(world_model, countries, 1, known=False)
    assert unknown.taught.all()
    assert set(unknown.part) == {"both"}


def test_asking_reads_the_answer_its_control_and_whether_all_of_it_is_said(world_model):
    frame = rv.make_questions(world_model, read_countries()[:6], 1, known=True)
    frame, found, texts = rv.ask(world_model, Lens(world_model), frame, 5, 0.5)
    for row in frame.iloc[::5].itertuples():
        ids = row.ids + row.answer
        with t.no_grad():
            logits = world_model(t.tensor([ids]))[0]
        said = logits[len(row.ids) - 1 : -1].argmax(-1).tolist()
        assert row.recall == float(said == row.answer)
        control = frame.loc[row.control]
        places = [(0, len(row.ids) - 1), (1, len(control.ids) - 1)]
        pair = read(world_model, Lens(world_model), [row.ids, control.ids], places, [row.answer[0]] * 2)
        p = pair["answer_logp"][-1].exp()
        assert row.margin == pytest.approx((p[0] - p[1]).item(), abs=1e-4)
    assert set(texts) == set(found["ids"].unique().tolist())


def test_answers_that_begin_with_a_bare_space_are_followed_to_where_they_differ(tmp_path):
    answers = pd.Series({3: [1, 7, 4], 5: [1, 7, 5], 8: [1, 7]})
    assert rv.find_controls(answers) == {3: 5, 5: 3, 8: 8}
    assert rv.first_difference([1, 7, 4], [1, 7, 5]) == 2
    frame = pd.DataFrame({"answer": answers, "control": {3: 5, 5: 3, 8: 8}, "telling": {3: 2.0, 5: 2.0, 8: np.nan}})
    told = rv.without_untold(frame)
    assert told.control.tolist() == [1, 0]
    assert told.telling.tolist() == [2, 2]


def test_a_whole_answer_is_read_at_the_token_that_tells_it(world_model):
    """Answers of three tokens, of which the first two are the same for all, as a tokenizer that spells makes them."""
    frame = rv.make_questions(world_model, read_countries()[:6], 1, known=False)
    frame = frame.assign(answer=[[5, 9, *answer] for answer in frame.answer], telling=2)
    frame = frame.loc[[i for i in frame.index if frame.control[i] != i]].head(4)
    frame = frame.assign(control=[1, 0, 3, 2], telling=2).reset_index(drop=True)
    asked, found, _ = rv.ask(world_model, Lens(world_model), frame, 5, 0.5)
    for i, row in enumerate(asked.itertuples()):
        logp = []
        for ids in (row.ids, frame.ids[row.control]):
            whole = t.tensor([ids + row.answer])
            with t.no_grad():
                by_token = world_model(whole)[0, len(ids) - 1 : -1].log_softmax(-1)
            logp.append(by_token[t.arange(len(row.answer)), row.answer])
            if ids is row.ids:
                assert found["rank"][-1, i] == (by_token[2] > by_token[2, row.answer[2]]).sum()
        assert found["answer_logp"][-1, i].item() == pytest.approx(logp[0].sum().item(), abs=1e-3)
        assert row.margin == pytest.approx((logp[0].sum().exp() - logp[1].sum().exp()).item(), abs=1e-5)


def test_no_depth_is_said_of_a_few_per_cent(world_model):
    frame = rv.make_questions(world_model, read_countries()[:24], 1, known=False)
    frame, found, _ = rv.ask(world_model, Lens(world_model), frame, 5, 0.5)
    frame["semantic"] = np.where(frame.index == 0, 3.0, np.nan)
    frame["depth"] = frame.semantic / 4
    study = rv.summarise(frame, found, 20, known=False)
    assert study["depth"] == [None] * 3
    assert study["depth_fraction"] is None
    assert study["semantic_layer"] is None


def test_a_model_that_reads_too_little_gets_one_line(tmp_path):
    save_model("GPT2LMHeadModel", tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    with pytest.raises(SystemExit, match="reads 64 tokens"):
        rv.analyse(str(tmp_path), rv.Config(countries=24, forms=2), model)


def test_models_one_after_the_other_skip_what_is_finished(run, workdir, tmp_path):
    folder = tmp_path / "qwen"
    hf = save_model("Qwen3ForCausalLM", folder)
    folder = str(folder)
    small = ("--countries", "6", "--forms", "1", "--draws", "50", "--device", "cpu")
    assert run("reversal.py", "--models", "models/world", *small).returncode == 0
    done = run("reversal.py", "--models", "models/world", folder, "--evaluate", *small)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "models-world: finished before" in done.stdout
    assert f"{rv.slug(folder)}: finished" not in done.stdout
    assert "Answers settle" in done.stdout
    table = (workdir / "results/reversal/cross-model.md").read_text()
    assert "models-world" in table
    assert rv.slug(folder) in table
    assert all(f"- {rule}:" in table for rule in RULES)
    page = (workdir / "results/reversal" / f"{rv.slug(folder)}.md").read_text()
    assert "## Patterns" in page
    assert "## Anomalies" in page
    for kind in ("questions", "layers"):
        assert (workdir / "results/reversal" / f"{rv.slug(folder)}.{kind}.csv").is_file()
    assert "## Patterns over models" in table
    assert "6 countries are too few" in table
    prompt = (workdir / "results/reversal/cross-model.prompt.md").read_text()
    assert table in prompt
    assert (workdir / "results/reversal/models-world.prompt.md").is_file()
    assert (workdir / "figs/reversal/cross_model.html").is_file()
    assert (workdir / "figs/reversal/patterns.html").is_file()
    models = json.loads((workdir / "results/reversal.json").read_text())["models"]
    assert set(models) == {"models-world", rv.slug(folder)}
    assert set(models["models-world"]) == set(rv.KEYS)
    assert set(models[rv.slug(folder)]["reversal_gap"]) == {"all"}  # what it was taught is not known

    path = workdir / "results/reversal/models-world.json"
    world_key = json.loads(path.read_text())["key"]
    assert rv.finished_before(path, world_key)
    path.with_name("models-world.layers.csv").unlink()
    assert rv.finished_before(path, world_key) is None  # not without its tables

    key = rv.run_key(folder, rv.Config())
    assert key == rv.run_key(folder, rv.Config(offload="off", device="cpu"))
    assert key != rv.run_key(folder, rv.Config(forms=3))
    hf.get_output_embeddings().weight.data.mul_(2)
    other = tmp_path / "other"
    hf.save_pretrained(other)
    assert rv.run_key(str(other), rv.Config()) != key  # other weights, the same settings


def test_a_comparison_names_what_was_published():
    study = json.loads(
        json.dumps({"model": "google-gemma-2-9b", "n_layers": 42, "lens": "raw", "semantic_layer": None})
    )
    study |= {"depth": [None] * 3, "named": [0.5, 0.4, 0.6], "anomalies": {"junk": 0.25}, "last_layer_gate_error": 1e-6}
    study |= {"reverse_minus_forward": {"recall": [0.1, 0, 0.2]}, "filler_minus_plain": {"depth": [0.1, 0, 0.2]}}
    row = rv.comparison_row(study)
    assert row["published"] == "42 of 42"
    assert row["layer"] == ""
    assert row["answer depth"] == "none"
    assert row["junk"] == "25%"
    assert rv.comparison_row(study | {"model": "gpt2", "semantic_layer": 3.0})["published"] == ""


def test_the_script_finds_that_facts_run_one_way(run, workdir):
    done = run("reversal.py", "--countries", "24", "--forms", "2", "--draws", "200", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    world = json.loads((workdir / "results/reversal.json").read_text())["models"]["models-world"]
    assert set(world) == set(rv.KEYS)
    assert world["last_layer_gate_error"] < 1e-4
    assert set(world["reversal_gap"]) == {"forward", "reverse"}
    assert all(gap < -0.8 for gap in world["reversal_gap"].values())
    assert 0.5 < world["depth_fraction"] <= 1
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert "put first, once" in said
    assert "Facts run one way" in said
    drawn = set(re.findall(r"figure: figs/reversal/(\w+).html", said))
    assert drawn == {"probability", "rank", "kl", "entropy"}, "no bars that are all 0 or 1"
    report = (workdir / "results/reversal/models-world.md").read_text()
    assert report.count("(direction not taught)") == 2
    assert all(f"- {rule}:" in report for rule in RULES)


def test_the_study_is_asked_through_the_lens_that_is_named(run, workdir):
    """The last layer is the model's own output by any lens; before it the Jacobian lens says something else."""
    small = ("--countries", "6", "--forms", "1", "--draws", "50", "--device", "cpu", "--jacobian-rows", "2")
    studies = {}
    for lens in ("raw", "jacobian"):
        done = run("reversal.py", "--lens", lens, *small)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"{lens} lens" in done.stdout
        studies[lens] = json.loads((workdir / "results/reversal/models-world.json").read_text())
        assert studies[lens]["lens"] == lens
        assert f"lens: {lens}" in (workdir / "results/reversal/models-world.md").read_text()
    raw, jacobian = (studies[lens]["curves"]["asked forward, taught both"]["kl"] for lens in studies)
    assert raw[-1] == pytest.approx(jacobian[-1], abs=1e-5)
    assert abs(raw[1] - jacobian[1]) > 0.01
    assert studies["raw"]["recall"] == studies["jacobian"]["recall"]
    config = rv.Config(lens="jacobian")
    assert rv.run_key("models/world", config) != rv.run_key("models/world", rv.Config())
    assert rv.run_key("models/world", config) != rv.run_key("models/world", rv.Config(lens="jacobian", jacobian_rows=3))


def test_a_country_alone_is_asked_about_without_a_conclusion(run):
    done = run("reversal.py", "--countries", "1", "--forms", "1", "--draws", "20", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 countries are too few" in done.stdout
    assert "no reversal is told" in done.stdout


def test_bad_settings_get_one_line(run):
    one_line_error(run("reversal.py", "--forms", "12"), "--forms is 1 to 11")
    for flags in (("--countries", "-1"), ("--top", "0")):
        one_line_error(run("reversal.py", *flags), f"{flags[0]} is {flags[1]}: it must be at least")
    one_line_error(run("reversal.py", "--lens", "tuned", "--tuned-steps", "0"), "--lens tuned needs 1 or more")
