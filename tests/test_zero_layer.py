import math
import os
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

from zero_layer import (
    Config,
    ZeroLayer,
    add_alpha_loss,
    bigram_counts,
    choose_alpha,
    count_loss,
    dense,
    draw_rows,
    drawn_loss,
    fit,
    measure,
    neighbours,
    svd_table,
    truncated,
)
from anatomy import entropy_floor, mutual_information, row_totals
from data import kind_of

import numpy as np
import pytest
import torch as t
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
WORDS = "the a cat dog bird sits runs on under mat tree and or then it big small red blue old new sees hears".split()


@pytest.fixture
def streams() -> list[np.ndarray]:
    """Two streams over 12 tokens, of which token 11 never occurs."""
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 11, n) * rng.integers(0, 2, n)).astype(np.uint16) for n in (700, 300)]


@pytest.fixture
def counts(streams):
    return bigram_counts(streams, 12)


def story(n: int, seed: int = 0) -> str:
    """Paragraphs in which each word has few, skewed successors."""
    rng, word, out = np.random.default_rng(seed), 0, []
    for _ in range(n):
        word = (3 * word + int(rng.geometric(0.4))) % len(WORDS)
        out.append(WORDS[word])
    return "\n\n".join(" ".join(out[i : i + 60]) for i in range(0, n, 60))


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "zero_layer.py"), *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_counts_are_the_pairs_of_each_stream(streams, counts):
    slow = Counter(pair for stream in streams for pair in zip(stream.tolist(), stream[1:].tolist()))
    assert counts.sum() == sum(map(len, streams)) - 2
    assert {(x, y): counts[x, y] for x in range(12) for y in range(12) if counts[x, y]} == slow


def test_floor_and_mutual_information_by_hand():
    counts = bigram_counts([np.array([0, 1, 0, 1, 0, 0])], 2)  # 0 -> 1, 1, 0 and 1 -> 0, 0
    h = 2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3)
    assert entropy_floor(counts) == pytest.approx(3 / 5 * h)
    unigram = 3 / 5 * math.log(5 / 3) + 2 / 5 * math.log(5 / 2)
    assert mutual_information(counts) == pytest.approx((unigram - 3 / 5 * h) / math.log(2))


def test_loss_on_counts_is_the_loss_on_tokens(streams, counts):
    t.manual_seed(1)
    model = ZeroLayer(12, 4)
    losses = [
        F.cross_entropy(model(t.from_numpy(s[:-1].astype(int))), t.from_numpy(s[1:].astype(int)), reduction="sum")
        for s in streams
    ]
    assert measure(model, counts) == pytest.approx(sum(losses).item() / counts.sum(), abs=1e-5)
    assert count_loss(model, t.arange(12), dense(counts, np.arange(12))).item() == pytest.approx(
        sum(losses).item() / counts.sum(), abs=1e-5
    )


def test_kl_is_the_loss_less_the_floor(counts):
    t.manual_seed(2)
    model = ZeroLayer(12, 4)
    p = counts.toarray() / np.maximum(1, row_totals(counts))[:, None]
    q = (model.W_E @ model.W_U).softmax(-1).detach().numpy()
    kl = (
        sum(
            n * (row_p[row_p > 0] * np.log(row_p[row_p > 0] / row_q[row_p > 0])).sum()
            for n, row_p, row_q in zip(row_totals(counts), p, q)
        )
        / counts.sum()
    )
    assert kl > 0.1
    assert measure(model, counts) - entropy_floor(counts) == pytest.approx(kl, abs=1e-5)


def test_add_alpha_by_hand_and_its_choice(streams, counts):
    counts_2, text = bigram_counts([np.array([0, 1, 0, 1, 0, 0])], 3), bigram_counts([np.array([0, 1, 2, 0])], 3)
    hand = -(math.log(2.5 / 4.5) + math.log(0.5 / 3.5) + math.log(0.5 / 1.5)) / 3
    assert add_alpha_loss(counts_2, text, 0.5) == pytest.approx(hand)
    assert add_alpha_loss(counts, counts, 1e-9) == pytest.approx(entropy_floor(counts), abs=1e-6)
    assert (
        choose_alpha([np.arange(20000) % 12], 12)
        < 1e-3
        < choose_alpha([np.random.default_rng(0).integers(0, 12, 400)], 12)
    )


def test_chunks_and_draws_have_the_dense_gradient(counts):
    t.manual_seed(3)
    model, rows, totals = ZeroLayer(12, 4), np.arange(11), row_totals(counts)
    whole = t.autograd.grad(count_loss(model, t.arange(12), dense(counts, np.arange(12))), model.W_E)[0]
    parts = [t.from_numpy(np.stack([part, totals[part]], 1)).long() for part in np.array_split(rows, 4)]
    summed = sum(
        t.autograd.grad(drawn_loss(model, part, counts), model.W_E)[0] * part[:, 1].sum() / totals.sum()
        for part in parts
    )
    assert t.allclose(whole, summed, atol=1e-6)
    drawn = [
        t.autograd.grad(drawn_loss(model, draw_rows(totals, 50, (0, i)), counts), model.W_E)[0] for i in range(400)
    ]
    error = (t.stack(drawn).mean(0) - whole).norm() / whole.norm()
    alone = t.stack([(g - whole).norm() / whole.norm() for g in drawn]).mean()
    assert error < 3 * alone / math.sqrt(400), "the mean of the drawn gradients is not the gradient"
    assert t.equal(draw_rows(totals, 50, (0, 7)), draw_rows(totals, 50, (0, 7)))


def test_full_rank_reaches_the_table_and_low_rank_does_not(streams, counts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses = {
        d: measure(fit(Config(d_model=d, steps=300, device="cpu"), streams, counts)[0], counts) - entropy_floor(counts)
        for d in (1, 12)
    }
    assert 0 <= losses[12] / math.log(2) < 0.002 < 0.02 < losses[1] / math.log(2)


def test_tokens_and_draws_learn_too(streams, counts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zero_layer.DENSE", 4)
    for how in ("tokens", "counts"):
        model, history = fit(
            Config(d_model=12, steps=300, tokens_per_step=256, lr=0.03, device="cpu", fit=how), streams, counts
        )
        assert measure(model, counts) - entropy_floor(counts) < 0.03
        assert history["tokens"][-1] == 300 * 256


def test_a_run_resumes_from_its_checkpoint_whatever_is_asked_of_it(streams, counts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    watching = dict(watch=lambda model: dict(loss=measure(model, counts)), watch_every=5)
    first, history = fit(Config(d_model=4, steps=20, save_every=10, device="cpu"), streams, counts, **watching)
    again, same = fit(
        Config(d_model=4, steps=20, save_every=10, device="cpu", resume=True, token="x", ranks=(2,)),
        streams,
        counts,
        **watching,
    )
    assert "resumed" in capsys.readouterr().out and same["watch"] == history["watch"] and t.equal(first.W_E, again.W_E)


def test_svd_at_full_rank_is_the_log_table(counts):
    smoothed = t.from_numpy(counts.toarray() + 0.1)
    table = (smoothed / smoothed.sum(1, keepdim=True)).float()
    W_E, W_U = svd_table(counts, 0.1)
    assert t.allclose((W_E @ W_U).softmax(-1), table, atol=1e-5)
    losses = [measure(truncated(W_E, W_U, rank), counts) for rank in (1, 4, 12)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] == pytest.approx(add_alpha_loss(counts, counts, 0.1), abs=1e-5)


def test_neighbours_read_rows_and_columns(counts):
    model = truncated(*svd_table(counts, 1e-6), 12)  # the exact table
    p = counts.toarray() / np.maximum(1, row_totals(counts))[:, None]
    best = neighbours(model, counts, 3, k=1)[0]
    asked = np.flatnonzero(row_totals(counts) >= 50)
    x = asked[p[asked, 3].argmax()]
    assert p[3, best[0]] == p[3].max() and best[1] == pytest.approx(p[3].max(), abs=1e-3) and best[2] == p[3].max()
    assert best[3] == x and best[4] == pytest.approx(p[x, 3], abs=1e-3) and best[5] == p[x, 3]


def test_kinds_of_tokens():
    kinds = {
        " return": "Python keyword",
        "\n    ": "white space",
        "42": "number",
        " (": "punctuation",
        "Value": "capitalised",
        " dog": "word after a space",
        "ing": "word or piece",
        "\ufffd": "byte or special",
        "<|endoftext|>": "byte or special",
    }
    assert {token: kind_of(token) for token in kinds} == kinds


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--data", "missing.txt"), "missing.txt"),
        (("--data", "story.txt", "--vocab", "300", "--token", "zebra"), "zebra"),
        (("--data", "tiny.txt"), "too little text"),
        (("--steps", "0"), "--steps"),
    ],
)
def test_bad_input_is_one_line(flags, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.txt").write_text("hi there")
    (tmp_path / "story.txt").write_text(story(600))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zero_layer.py", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "zero_layer.py"), run_name="__main__")
    assert says in end.value.code and len(end.value.code.splitlines()) == 1
