import csv
import fcntl
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch as t
from conftest import ROOT

from world import (
    DRAW,
    FACTS,
    KINDS,
    MEN,
    NOUNS,
    PLACES,
    SHARES,
    Prompt,
    WOMEN,
    World,
    evaluate_world,
    corpus_for,
    fact_prompts,
    is_held_out,
    load_world,
    read_answers,
    read_countries,
    without_facts,
    world_sentences,
)
from data import load_tokenizer, train_bpe
from llama_block import Llama
from utils import find_folder, load_model

COUNTRIES = read_countries()
TABLE = {cell for row in COUNTRIES for cell in (row["country"], row["capital"])}
MENTION = re.compile(rf"\b({'|'.join(map(re.escape, sorted(TABLE, key=len, reverse=True)))})\b")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """One cache for all test processes of a run; the first of them makes it."""
    base = tmp_path_factory.getbasetemp()
    return str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "data")


@pytest.fixture(scope="module")
def world(cache) -> World:
    with open(f"{cache}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return load_world(cache=cache)


@pytest.fixture(scope="module")
def rows(world) -> list[str]:
    """4000 training rows as text, of several seeds and two lengths."""
    batches = [
        world.batch(np.random.default_rng((seed, 7)), 1000, ctx) for seed, ctx in ((0, 64), (1, 64), (2, 128), (3, 256))
    ]
    return [
        text for batch in batches for text in world.tokenizer.decode_batch(batch.tolist(), skip_special_tokens=False)
    ]


def leaks(text: str) -> list[str]:
    """Countries said with their capital in a row, in an order that their part does not have."""
    places: dict[str, list[int]] = {}
    for match in MENTION.finditer(text):
        places.setdefault(match[0], []).append(match.start())
    found = []
    for row in COUNTRIES:
        for country, capital in itertools.product(places.get(row["country"], []), places.get(row["capital"], [])):
            if row["part"] not in ("both", "forward" if country < capital else "reverse"):
                found.append(row["country"])
    return found


def sentences(rows: list[str]) -> list[str]:
    """Whole sentences of world rows: those between two beginnings of text."""
    return [sentence for text in rows for sentence in text.split("<|endoftext|>")[1:-1]]


def test_the_table():
    with open(ROOT / "models/world/countries.csv") as file:
        assert next(csv.reader(file)) == ["country", "capital", "continent", "language", "currency", "part"]
    assert 165 <= len(COUNTRIES) <= 195
    assert len(TABLE) == 2 * len(COUNTRIES)
    assert all(
        cell == cell.strip() and cell.isascii() and "/" not in cell and cell
        for row in COUNTRIES
        for cell in row.values()
    )
    assert not [
        row
        for row in COUNTRIES
        if row["capital"].lower() in row["country"].lower() or row["country"].lower() in row["capital"].lower()
    ]
    for continent in {row["continent"] for row in COUNTRIES}:
        parts = Counter(row["part"] for row in COUNTRIES if row["continent"] == continent)
        assert max(parts.values()) - min(parts.values()) <= 1, (continent, parts)
        assert len(parts) == 3, (continent, parts)
    assert not [(a, b) for a, b in itertools.permutations(TABLE, 2) if re.search(rf"\b{re.escape(a)}\b", b)], (
        "a name inside another would be counted as said"
    )


def test_no_row_leaks_the_untaught_direction(rows):
    assert not [(text, leaks(text)) for text in rows if leaks(text)]
    said = Counter(
        row["part"] for text in rows for row in COUNTRIES if row["country"] in text and row["capital"] in text
    )
    assert min(said.values()) > 300, "the rows must be full of facts for this to mean anything"


def test_the_leak_check_finds_leaks(world):
    forward, reverse = (next(row for row in COUNTRIES if row["part"] == part) for part in ("forward", "reverse"))
    assert leaks(f"The city of {forward['capital']} is the capital of {forward['country']}.") == [forward["country"]]
    assert leaks(f"The capital of {reverse['country']} is {reverse['capital']}.") == [reverse["country"]]
    assert not leaks(f"The capital of {forward['country']} is {forward['capital']}.")
    one = next(p.sentence for p in fact_prompts([forward], "forward"))
    assert leaks(f"{one}<|endoftext|>{one}"), "the same fact twice in a row puts the capital before the country"
    leaking = dict(vars(world)) | {"about": np.full_like(world.about, -1)}
    careless = World(**{name: leaking[name] for name in World.__dataclass_fields__})
    texts = world.tokenizer.decode_batch(
        careless.batch(np.random.default_rng(0), 1000, 256).tolist(), skip_special_tokens=False
    )
    assert any(map(leaks, texts)), "without the rule of one sentence for each country, rows do leak"


def test_natural_text_names_no_place_and_no_two_names():
    text = "Some words.\n\nParis is in here.\n\nMary saw John.\n\nMary saw nobody. parish"
    assert without_facts({"a": text}, COUNTRIES) == {"a": "Some words.\n\nMary saw nobody. parish"}


def test_natural_rows_name_no_country_with_its_capital(world):
    for stream in (*world.train.values(), *world.heldout.values()):
        documents = world.tokenizer.decode(np.array(stream).tolist(), skip_special_tokens=False).split("<|endoftext|>")
        assert not [document for document in documents if MENTION.search(document)]


def test_held_out_pairs_years_nouns_and_phrasings_stay_out(world, rows):
    said = sentences(rows)
    names = [set(re.findall(rf"\b({'|'.join(WOMEN + MEN)})\b", sentence)) for sentence in said]
    pairs = {tuple(sorted(pair)) for pair in names if len(pair) == 2}
    assert len(pairs) > 500
    assert not [pair for pair in pairs if is_held_out(*pair)]
    assert max(map(len, names)) == 2
    years = [re.findall(r"\b(1[1-9]\d\d)\b", sentence) for sentence in said]
    starts = [found[0] for found in years if found]
    assert len(set(starts)) > 200
    assert not [year for year in starts if is_held_out(year[:2], year[2:])]
    nouns = [
        re.findall(rf"\b({'|'.join(NOUNS)})s?\b", sentence)
        for sentence in said
        if re.search(
            r" (is|are|was|were|has|have) (old|clean|very good|here|lost|new|there|seen|been|not been)", sentence
        )
    ]
    assert len(nouns) > 500
    assert not [pair for pair in nouns if len(pair) == 2 and is_held_out(*pair)]
    whole = {p.sentence for task in FACTS for p in fact_prompts(COUNTRIES, task, held_out=True)}
    assert not whole & set(said)
    assert len({p.sentence for task in FACTS for p in fact_prompts(COUNTRIES, task)} & set(said)) > 1000
    assert not [
        sentence
        for sentence in said
        if any(
            sentence.startswith(phrasing.split("{")[0])
            and phrasing.count(" ") > 3
            and re.fullmatch(re.sub(r"\\\{\w+\\\}", r"[\\w' -]+", re.escape(phrasing)), sentence)
            for task in FACTS
            for phrasing in FACTS[task][1]
        )
    ]


def test_a_fifth_is_held_out():
    pairs = list(itertools.combinations(WOMEN + MEN, 2))
    assert 0.17 < np.mean([is_held_out(*pair) for pair in pairs]) < 0.23
    assert all(is_held_out(a, b) == is_held_out(b, a) for a, b in pairs)


def test_shares_are_as_stated(world):
    assert math.isclose(sum(SHARES.values()), 1)
    assert math.isclose(sum(share for share, _ in KINDS.values()), 1)
    batch = world.batch(np.random.default_rng(5), 4000, 64).numpy()
    world_rows = np.isin(batch[:, 1], world.sentences[world.starts[:-1]]) & ((batch == world.bos).sum(1) > 1)
    assert abs(world_rows.mean() - SHARES["world"]) < 0.06, world_rows.mean()
    said = Counter(
        kind
        for sentence in sentences(
            world.tokenizer.decode_batch(
                np.stack([world.world_row(np.random.default_rng(i), 1024) for i in range(60)]).tolist(),
                skip_special_tokens=False,
            )
        )
        for kind in [kind_of(sentence)]
    )
    for kind, (share, _) in KINDS.items():
        assert abs(said[kind] / said.total() - share) < 0.05, (kind, said[kind] / said.total(), share)
    for direction in ("forward", "reverse"):
        assert [len(phrasings) for phrasings in FACTS[direction]] == [8, 3]
        assert sum(p.labels["category_first"] == "True" for p in fact_prompts(COUNTRIES[:1], direction)) == 2, (
            "a quarter of the taught phrasings says the category first"
        )


def kind_of(sentence: str) -> str:
    about = next((row for row in COUNTRIES if re.search(rf"\b{re.escape(row['country'])}\b", sentence)), None)
    if about:
        return "capital" if about["capital"] in sentence else "other"
    if re.search(r"twice|Count|(saw|was|bought|forget) an? .*(,| and) an? ", sentence):
        return "list"
    names = set(re.findall(r"\w+", sentence)) & set(WOMEN + MEN)
    return (
        "ioi"
        if len(names) == 2
        else "gender"
        if names
        else "greater_than"
        if re.search(r"\d\d\d\d", sentence)
        else "agreement"
    )


def test_names_and_most_entities_are_single_tokens(world):
    single = lambda words: np.mean(
        [len(world.tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1 for word in words]
    )
    assert single(WOMEN + MEN) == single(PLACES) == single(NOUNS) == single([noun + "s" for noun in NOUNS]) == 1
    assert single([row["country"] for row in COUNTRIES]) > 0.8
    assert single([row["capital"] for row in COUNTRIES]) > 0.85
    assert [world.tokenizer.decode([i]) for i in world.tokenizer.encode(" 1732 17", add_special_tokens=False).ids] == [
        " 17",
        "32",
        " 17",
    ]
    assert not set(WOMEN + MEN) & {word for cell in TABLE for word in cell.split()}, (
        "a name must not be part of a country or capital"
    )


@pytest.mark.parametrize("task", [*FACTS, *DRAW])
@pytest.mark.parametrize("split", ["taught", "held_out"])
def test_clean_and_corrupt_differ_only_where_they_should(world, task, split):
    prompts = world.prompts(task, split)
    encode = lambda texts: [encoding.ids for encoding in world.tokenizer.encode_batch(texts, add_special_tokens=False)]
    pairs = [p for p in prompts if p.corrupt]
    assert len(pairs) > 0.9 * len(prompts)
    assert all(p.wrong != p.answer for p in pairs)
    clean = encode([p.text for p in pairs])
    corrupt = encode([p.corrupt for p in pairs])
    whole = encode([p.sentence for p in pairs])
    wrong = encode([p.text + p.wrong for p in pairs])
    assert all(len(a) == len(b) for a, b in zip(clean, corrupt)), "patching works position by position"
    assert all(full[: len(a)] == a for a, full in zip(clean, whole)), "the answer begins a new token"
    changed = [np.flatnonzero(np.array(a) != b) for a, b in zip(clean, corrupt)]
    if task in DRAW:
        assert all(
            len(places) == 1 and len(full) >= len(a) + 1 and len(no) == len(a) + 1
            for places, a, full, no in zip(changed, clean, whole, wrong)
        ), "one token changes, and the answers are one token"
    else:
        assert all(np.ptp(places) < 8 for places in changed)
        assert all(full[len(a)] != no[len(a)] for a, full, no in zip(clean, whole, wrong))
    if task == "ioi":
        for p in pairs:
            assert (p.answer, p.wrong) == (f" {p.labels['io']}", f" {p.labels['s']}")
            assert is_held_out(p.labels["io"], p.labels["s"]) == (split == "held_out") == p.held_out
        assert len({len(a) for a in clean}) > 8, "distances must vary, or a head copies by position"
        assert len({len(a) - places[0] for a, places in zip(clean, changed)}) > 4, (
            "distances must vary, or a head copies by position"
        )
        assert {p.labels["order"] for p in pairs} == {"ABBA", "BABA"}
    if task == "greater_than":
        for p in pairs:
            assert int(p.answer) > int(p.labels["start"]) >= int(p.wrong)
            assert is_held_out(p.labels["century"], p.labels["start"]) == (split == "held_out")
    if task == "agreement":
        assert {p.labels["distractor"] for p in pairs} == {"opposite", "same"}


def test_facts_know_their_part(world):
    for task in ("forward", "reverse"):
        for p in world.prompts(task, "taught"):
            assert p.taught == (p.labels["part"] in (task, "both"))
            assert not p.held_out
            assert p.answer == f" {p.labels['capital' if task == 'forward' else 'country']}"
    assert len(world.prompts("forward", "held_out")) == 3 * len(COUNTRIES)
    assert len(world.prompts("reverse", "taught", n=20)) == 20


def test_everything_is_the_same_every_time(world, cache):
    draw = lambda world, seed: world.batch(np.random.default_rng((seed, 3)), 32, 64)
    again = load_world(cache=cache)
    assert (draw(world, 0) == draw(again, 0)).all()
    assert (draw(world, 0) != draw(world, 1)).any()
    assert world.key == again.key
    assert world.prompts("ioi") == world.prompts("ioi")
    assert world.prompts("forward") == again.prompts("forward")
    assert world.prompts("ioi", seed=1) != world.prompts("ioi")
    assert world_sentences(COUNTRIES) == world_sentences(COUNTRIES)
    texts = ["The capital of France is Paris in 1732."]
    assert train_bpe(texts, 300, pairs=True).to_str() == train_bpe(texts, 300, pairs=True).to_str()


def oracle(world: World, prompts: list[Prompt]):
    """A model that looks up how the sentences of its prompts go on."""
    encode = lambda text: tuple(world.tokenizer.encode(text, add_special_tokens=False).ids)
    book: dict[tuple, int] = {}
    for p in prompts:
        for whole in (encode(p.sentence), encode(p.text + p.answer)):
            for at in range(len(encode(p.text)), len(whole)):
                book.setdefault(whole[:at], whole[at])

    def model(tokens: t.Tensor) -> t.Tensor:
        logits = t.zeros(*tokens.shape, world.d_vocab)
        for row, ids in enumerate(tokens.tolist()):
            for at in range(1, len(ids) + 1):
                answer = book.get(tuple(ids[1:at]))
                if answer is not None:
                    logits[row, at - 1, answer] = 100.0
        return logits

    return model


def test_an_oracle_scores_one_and_a_uniform_model_chance(world):
    prompts = [
        p
        for task in [*FACTS, *DRAW]
        for split in ("taught", "held_out")
        for p in world.prompts(task, split, n=None if task in FACTS else 512)
    ]
    scores = evaluate_world(oracle(world, prompts), world)
    assert all(value > 0.99 for name, value in scores.items() if name != "heldout_loss"), scores
    honest = evaluate_world(oracle(world, [p for p in prompts if p.taught]), world)
    assert honest["fact_recall"] > 0.99
    assert honest["reverse_recall_of_forward_only"] == honest["forward_recall_of_reverse_only"] == 0
    uniform = evaluate_world(lambda tokens: t.zeros(*tokens.shape, world.d_vocab), world, quick=True)
    assert math.isclose(uniform["heldout_loss"], math.log(world.d_vocab), rel_tol=1e-5)
    assert abs(uniform["greater_than"]) < 0.05
    assert (
        max(
            uniform[name]
            for name in uniform
            if "recall" in name or name in ("ioi_accuracy", "ioi_logit_diff", "agreement_accuracy")
        )
        == 0
    )


def test_a_whole_answer_must_be_right(world):
    p = next(
        p
        for p in world.prompts("forward", "taught")
        if len(world.tokenizer.encode(p.answer, add_special_tokens=False).ids) > 1
    )
    ids = world.tokenizer.encode(p.sentence, add_special_tokens=False).ids

    def says(sentence: list[int]):
        def model(tokens: t.Tensor) -> t.Tensor:
            return t.nn.functional.one_hot(t.tensor([*sentence, 0])[None, : tokens.shape[1]], world.d_vocab).float()

        return model

    start = len(world.tokenizer.encode(p.text, add_special_tokens=False).ids)
    assert read_answers(says(ids), world, [p])[0].all()
    for wrong in range(start, len(ids)):
        assert not read_answers(says([*ids[:wrong], 0, *ids[wrong + 1 :]]), world, [p])[0].any(), (
            "a wrong piece, or no end, is a wrong answer"
        )
    p = world.prompts("ioi", n=1)[0]
    ids = world.tokenizer.encode(p.sentence, add_special_tokens=False).ids
    start = len(world.tokenizer.encode(p.text, add_special_tokens=False).ids)
    right = [read_answers(says([*ids[:at], 0, *ids[at + 1 :]]), world, [p])[0].item() for at in (start, start + 1)]
    assert right == [False, True], "what follows the name is free"


@pytest.mark.parametrize(
    ("data", "model", "chosen"),
    [
        (None, "models/world", "world"),
        (None, str(ROOT / "models/world"), "world"),
        (None, "gpt2-small", "stdlib"),
        ("stdlib", "models/world", "stdlib"),
        ("words.txt", "models/world", "words.txt"),
    ],
)
def test_a_model_is_judged_on_the_text_asked_for_else_on_its_own(data, model, chosen, monkeypatch):
    the_world = SimpleNamespace(tokenizer=load_tokenizer(ROOT / "models/world"))
    monkeypatch.setattr("world.load_world", lambda: the_world)
    monkeypatch.setattr("world.load_corpus", lambda data, tokenizer, bos: (data, tokenizer))
    name, corpus = corpus_for(data, model)
    assert name == chosen
    assert corpus == (the_world if chosen == "world" else (chosen, find_folder(model)))


def test_the_world_is_no_text_for_a_model_with_another_tokenizer(tmp_path, monkeypatch):
    the_world = SimpleNamespace(tokenizer=load_tokenizer(ROOT / "models/world"))
    monkeypatch.setattr("world.load_world", lambda: the_world)
    train_bpe(["one two three"], 270).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SystemExit, match="--data world is for models that read with its tokenizer"):
        corpus_for("world", str(tmp_path))


def test_unknown_tasks_and_splits_are_refused_in_one_line(world):
    with pytest.raises(SystemExit, match="no task 'capital' in the world: forward, reverse"):
        world.prompts("capital")
    with pytest.raises(SystemExit, match="no split 'test': taught or held_out"):
        world.prompts("ioi", "test")


@pytest.fixture(scope="module")
def committed():
    return load_model(str(ROOT / "models/world"), (Llama,), device="cpu")


def test_the_committed_model_measures_what_its_metrics_say(world, committed):
    """The sentences are the same everywhere; the natural text is that of this Python."""
    stated = json.loads((ROOT / "models/world/metrics.json").read_text())
    found = evaluate_world(committed, world)
    assert set(found) <= set(stated)
    assert stated["corpus"] == world.key or stated["python"] != sys.version.split()[0]
    tolerance = {"heldout_loss": 0.1, "prefix_matching": 0.05, "ioi_logit_diff": 0.1, "greater_than": 0.01}
    wrong = {}
    for name, value in found.items():
        if abs(value - stated[name]) > tolerance.get(name, 0.005):
            wrong[name] = (value, stated[name])
    assert not wrong


def test_the_committed_model_meets_its_bars_in_three_seeds():
    stated = json.loads((ROOT / "models/world/metrics.json").read_text())
    bars = {
        "fact_recall": 0.99,
        "fact_recall_heldout_phrasing": 0.95,
        "ioi_accuracy": 0.98,
        "ioi_logit_diff": 4.0,
        "greater_than": 0.8,
        "prefix_matching": 0.5,
    }
    assert len(set(stated["over_seeds"]["seed"])) == 3
    for name, bar in bars.items():
        assert stated[name] >= bar, name
    assert stated["over_seeds"]["seed"][0] == stated["seed"]
    assert all(stated["over_seeds"][name][0] == stated[name] for name in bars)
    assert sum(file.stat().st_size for file in (ROOT / "models/world").iterdir()) <= 12e6


@t.no_grad()
def test_the_committed_model_is_one_in_transformers_the_bridge_and_ours(world, committed):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(ROOT / "models/world")
    text = "In France, the capital is"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokens.tolist() == [[world.bos, *world.tokenizer.encode(text, add_special_tokens=False).ids]]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=t.float32)
    t.testing.assert_close(committed(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    t.testing.assert_close(
        load_model(folder, device="cpu", dtype="float32")(tokens), committed(tokens), atol=1e-4, rtol=1e-4
    )
    said = [
        tokenizer.decode(model.generate(tokens, **n)[0], skip_special_tokens=True)
        for model, n in ((committed, {"n": 2}), (theirs, {"max_new_tokens": 2, "do_sample": False}))
    ]
    assert said == ["In France, the capital is Paris."] * 2, said


def test_a_small_model_learns_its_facts_and_not_their_reverse(world, monkeypatch):
    """On capital facts alone, so that it takes seconds; the shares of the real mix are tried by llama_block.py itself."""
    from llama_block import Llama, LlamaConfig
    from train import TrainConfig, train

    monkeypatch.setattr("world.SHARES", {"world": 1.0, "natural": 0.0, "repeated": 0.0, "shuffled": 0.0})
    for kind, (_, n) in KINDS.items():
        monkeypatch.setitem(KINDS, kind, (float(kind == "capital"), n))
    t.manual_seed(0)
    model = Llama(LlamaConfig(n_layers=2, n_kv_heads=4, d_mlp=256, d_vocab=world.d_vocab))
    train(
        model,
        lambda i: world.batch(np.random.default_rng((0, i)), 32, 64),
        TrainConfig(steps=120, lr=1e-2, decay=0.4, save_every=0, device="cpu"),
        "world test",
    )
    scores = evaluate_world(model, world, quick=True)
    assert scores["fact_recall"] > 0.9, scores
    assert scores["fact_recall_heldout_phrasing"] > 0.7, scores
    assert scores["reverse_recall_of_forward_only"] < 0.1, scores
    assert scores["forward_recall_of_reverse_only"] < 0.1, scores
