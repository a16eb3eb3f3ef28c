"""
study.py: tables that say what was read, patterns of models made by hand, and a language model's answers by a server that
stands here.
"""

import http.server
import json
import threading

import numpy as np
import pandas as pd
import pytest
import torch as t
from conftest import ROOT, one_line_error

import study
from lens import RULES, Lens, milestones, read, token_texts
from llama_block import Llama
from utils import load_model

TEXTS = {0: " Paris", 1: ",", 2: " city", 3: " France", 4: " country", 5: " the"}


def by_hand(n_layers: int, settles: list[int | None], tops: list[int], second: int, countries: int = 20):
    """
    (frame, found): of each country a question of each direction in two phrasings; question i settles at
    settles[i % ..]. tops: the top-1 of every layer (0 is the answer). second: what stands second everywhere.
    """
    rows = []
    for country in range(countries):
        for task in ("forward", "reverse"):
            for form in ("a", "b"):
                rows.append({"country": country, "task": task, "form": f"{task} {form}", "text": f"{country} {form}"})
    frame = pd.DataFrame(rows)
    n = len(frame)
    semantic = [settles[i % len(settles)] for i in range(n)]
    frame = frame.assign(part="both", filler="plain", taught=True, said=" Paris", recall=1.0)
    frame["semantic"] = np.array(semantic, float)
    frame["category"] = 0.0
    frame["depth"] = frame.semantic / n_layers
    for rule in RULES:
        frame[rule] = False
    ids = t.full((n_layers + 1, n, 2), second)
    ids[:, :, 0] = t.tensor(tops)[:, None]
    p = t.tensor([0.6, 0.3]).log().expand(n_layers + 1, n, 2)
    rank = t.ones(n_layers + 1, n, dtype=t.int32)
    for i, layer in enumerate(semantic):
        if layer is not None:
            rank[layer:, i] = 0
    flat = t.zeros(n_layers + 1, n)
    found = {"ids": ids, "logp": p, "rank": rank, "answer_logp": flat, "entropy": flat, "kl": flat, "cosine": flat}
    return frame, found


def verdicts(frame, found, n_layers, known=False):
    found_patterns = study.patterns(frame, found, TEXTS, n_layers, 200, known)
    assert set(found_patterns) == set(study.PATTERNS)
    return {pattern: x["verdict"] for pattern, x in found_patterns.items()}


def test_patterns_of_models_made_by_hand():
    tops = [1] * 10 + [5] * 11  # punctuation in the first half
    frame, found = by_hand(20, [16], tops, second=2)  # ' city' second everywhere: names the forward category alone
    said = verdicts(frame, found, 20)
    assert said["late settling"] == study.HOLDS
    assert said["early punctuation"] == study.HOLDS
    assert said["reversal asymmetry"] == study.FAILS
    assert said["sensitivity to form"] == study.FAILS
    assert said["category first"] == study.UNTOLD  # in half of the questions, and the control's words in the other half
    forward = frame[frame.task == "forward"].reset_index(drop=True)
    of_forward = {name: x[:, frame.task == "forward"] for name, x in found.items()}
    own = study.category_first(forward, of_forward, TEXTS, 200)
    assert (own["verdict"], own["statistic"]) == (study.HOLDS, [1, 1, 1])
    other = study.category_first(forward.assign(task="reverse"), of_forward, TEXTS, 200)
    assert (other["verdict"], other["statistic"]) == (study.FAILS, [0, 0, 0])

    frame, found = by_hand(20, [8], [5] * 21, second=3)
    frame["recall"] = ((frame.task == "forward") & (frame.form == "forward a")).astype(float)
    said = verdicts(frame, found, 20)
    assert said["late settling"] == study.FAILS
    assert said["early punctuation"] == study.FAILS
    assert said["category first"] == study.FAILS
    assert said["reversal asymmetry"] == study.HOLDS
    assert said["sensitivity to form"] == study.HOLDS


def test_what_cannot_be_told_is_not_told():
    frame, found = by_hand(4, [3, 4], [5] * 5, second=3)
    assert verdicts(frame, found, 4)["late settling"] == study.UNTOLD  # a layer is wider than the band
    frame, found = by_hand(4, [2], [5] * 5, second=3)
    assert verdicts(frame, found, 4)["late settling"] == study.FAILS  # but half is not late in any reading
    frame, found = by_hand(20, [16, 20], [5] * 21, second=3)
    frame["recall"] = 0.0
    said = verdicts(frame, found, 20)
    assert said["late settling"] == study.FAILS  # 0.9 in every country
    assert said["reversal asymmetry"] == said["sensitivity to form"] == study.UNTOLD  # it knows nothing
    few, found = by_hand(20, [16], [5] * 21, second=3, countries=5)
    assert set(verdicts(few, found, 20).values()) == {study.UNTOLD}
    frame, found = by_hand(20, [None], [5] * 21, second=3)
    said = study.patterns(frame, found, TEXTS, 20, 50, False)
    assert said["late settling"]["verdict"] == said["category first"]["verdict"] == study.UNTOLD
    assert np.isnan(said["late settling"]["statistic"]).all()


def test_a_fact_taught_in_one_direction_is_asymmetric_where_that_is_known():
    frame, found = by_hand(20, [16], [5] * 21, second=3, countries=40)
    frame["part"] = np.where(frame.country % 2 == 0, "both", "forward")
    frame["taught"] = (frame.part == "both") | (frame.task == "forward")
    frame["recall"] = frame.taught.astype(float)
    known = study.reversal_asymmetry(frame, True, 200)
    assert (known["verdict"], known["statistic"]) == (study.HOLDS, [-1, -1, -1])
    assert known["n"] == [40, 20]


def test_a_phrasing_that_is_best_by_chance_is_not_called_best():
    """Noise alone: the largest difference between eight phrasings is large, what was chosen is none on other countries."""
    covers = []
    for seed in range(30):
        said = np.random.default_rng(seed).random((60, 8)) < 0.5
        rows = [(c, "forward", f"f{f}", float(said[c, f])) for c in range(60) for f in range(8)]
        frame = pd.DataFrame(rows, columns=["country", "task", "form", "recall"])
        mean, low, high = study.sensitivity_to_form(frame, 100)["statistic"]
        covers.append(low <= 0 <= high)
        assert np.ptp(said.mean(0)) > 0.05
    assert np.mean(covers) > 0.85


def test_tables_hold_what_was_read_and_anomalies_name_their_questions(tmp_path):
    model = load_model(str(ROOT / "models/world"), (Llama,), "cpu")
    rows = [model.to_tokens(text)[0].tolist() for text in ("The capital of Japan is", "One, two, three,")]
    places = [(i, len(row) - 1) for i, row in enumerate(rows)]
    found = read(model, Lens(model), rows, places, [5, 6], 3)
    texts = token_texts(model, found["ids"])
    reached = milestones(found, texts, ["a", "b"], [("city",)] * 2, 0.5)
    frame = pd.DataFrame({name: x.numpy() for name, x in reached.items()})
    frame = frame.assign(country=[0, 1], task="forward", form="f", filler="plain", taught=True, text="t", said="s")
    frame = frame.assign(ids=[[0, 1]] * 2, answer=[[5], [6]])
    path = tmp_path / "m.json"
    study.write_tables(path, frame, found, texts)
    layers = pd.read_csv(tmp_path / "m.layers.csv", keep_default_na=False)
    assert len(layers) == 2 * 5
    for i in range(2):
        logits, cache = model.run_with_cache(t.tensor([rows[i]]), names_filter="blocks.2.hook_resid_post")
        by_lens = model.unembed(model.ln_final(cache["blocks.2.hook_resid_post"]))[0, -1]
        row = layers[(layers.question == i) & (layers.layer == 3)].iloc[0]
        assert row["rank"] == (by_lens > by_lens[5 + i]).sum().item() + 1
        assert row.probability == pytest.approx(by_lens.softmax(-1)[5 + i].item(), rel=1e-3)
        best = by_lens.softmax(-1).topk(3)
        assert [row.p_1, row.p_2, row.p_3] == pytest.approx(best.values.tolist(), rel=1e-3)
        tokens = [json.loads(f'"{token}"') for token in (row.token_1, row.token_2, row.token_3)]
        assert tokens == [texts[j] for j in best.indices.tolist()]
        kl = (logits[0, -1].softmax(-1) * (logits[0, -1].log_softmax(-1) - by_lens.log_softmax(-1))).sum()
        assert row.kl == pytest.approx(kl.item(), rel=1e-2)
    assert len(pd.read_csv(tmp_path / "m.questions.csv")) == 2

    frame["copy collapse"] = [False, True]
    odd = study.anomalies(frame, found, texts, 50)
    assert odd["copy collapse"]["n"] == [1, 2]
    [example] = odd["copy collapse"]["examples"]
    assert example["question"] == 1
    assert example["top"].endswith("-4)") or example["top"].endswith("(4)")
    excerpt = study.excerpt(path)
    assert excerpt["layers"].count("\n") == 1 + 10
    prompt = study.filled_prompt("evaluate_model", model="m", report="the report, 5 $", **excerpt)
    assert "the report, 5 $" in prompt
    assert excerpt["layers"] in prompt
    assert study.filled_prompt("evaluate_models", models="a, b", comparison="c", reports="r").count("a, b") == 1


def a_study(name: str, verdict: str) -> dict:
    x = {"statistic": [0.5, 0.4, 0.6], "n": [9, 3], "verdict": verdict, "why": f"why {name}", "percent": True}
    return {"model": name, "patterns": dict.fromkeys(study.PATTERNS, x)}


def test_over_models_a_share_has_wilsons_interval_and_failures_have_names():
    studies = [a_study("a", study.HOLDS), a_study("b", study.HOLDS), a_study("c", study.FAILS)]
    studies.append(a_study("d", study.UNTOLD))
    x = study.over_models(studies)["late settling"]
    n, p, z = 3, 2 / 3, 1.959964
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert x["share"] == pytest.approx([p, middle - half, middle + half], abs=1e-5)
    assert x["models"] == {study.HOLDS: ["a", "b"], study.FAILS: ["c"], study.UNTOLD: ["d"]}
    text = study.models_section(studies)
    assert "**late settling** holds in 2 of 3 models that can tell (66.7% [20.8%, 93.9%])" in text
    assert "does not hold in c: 50.0% [40.0%, 60.0%]; why c" in text
    assert "cannot be told in d" in text
    assert study.over_models([a_study("d", study.UNTOLD)])["late settling"]["share"] == [None] * 3


# %% The language model
@pytest.fixture
def server(monkeypatch):
    """An endpoint that keeps what it is sent; its path decides what it answers."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers["Authorization"], body))
            answers = {
                "/chat": (200, {"choices": [{"message": {"content": "It settles late.\n"}}]}),
                "/empty": (200, {"choices": []}),
                "/refused": (401, {"error": "wrong key"}),
            }
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                return
            code, answer = answers[self.path]
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def do_GET(self):
            seen.append((self.path, self.headers["Authorization"], None))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(study, "secret", {study.KEY: "a-key"}.get)
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def test_a_prompt_is_sent_with_the_key_and_the_answer_is_kept(server, tmp_path):
    address, seen = server
    [prompt] = study.write_evaluation(tmp_path / "m-0.1", "Evaluate.", "", "")
    assert prompt.read_text() == "Evaluate."
    assert not seen
    _, said = study.write_evaluation(tmp_path / "m-0.1", "Evaluate.", f"{address}/chat", "judge")
    assert (prompt.name, said.name) == ("m-0.1.prompt.md", "m-0.1.evaluation.md")
    assert said.read_text().endswith("\n\nIt settles late.\n")
    assert "written by judge" in said.read_text()
    body = {"model": "judge", "messages": [{"role": "user", "content": "Evaluate."}]}
    assert seen == [("/chat", "Bearer a-key", body)]


def test_what_goes_wrong_at_the_endpoint_is_one_line(server):
    address, seen = server
    for path, words in {"/refused": r"401.*wrong key", "/empty": "no chat completion"}.items():
        with pytest.raises(SystemExit, match=words):
            study.send("Evaluate.", address + path, "judge")
    with pytest.raises(SystemExit, match="did not answer"):
        study.send("Evaluate.", "http://127.0.0.1:9/chat", "judge")
    seen.clear()
    with pytest.raises(SystemExit, match="no chat completion"):
        study.send("Evaluate.", f"{address}/moved", "judge")
    assert [key for _, key, _ in seen] == ["Bearer a-key", None]  # the key follows no redirection


def test_what_cannot_be_sent_is_refused_before_anything_is_computed(run, monkeypatch):
    one_line_error(run("reversal.py", "--endpoint", "https://x/v1", "--evaluator", "y"), "are of --evaluate")
    one_line_error(run("reversal.py", "--evaluate", "--endpoint", "https://x/v1"), "come together")
    one_line_error(run("reversal.py", "--evaluate", "--endpoint", "x", "--evaluator", "y"), "whole address")
    monkeypatch.setattr(study, "secret", {}.get)
    one_line_error(
        run("reversal.py", "--evaluate", "--endpoint", "https://x/v1", "--evaluator", "y"), study.KEY, ".env"
    )
