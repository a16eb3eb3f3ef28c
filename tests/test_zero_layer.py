import dataclasses
import math
import runpy
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
from information import entropy_floor, mutual_information, row_totals
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
    made = []
    for length in (700, 300):
        tokens = rng.integers(0, 11, length)
        kept = rng.integers(0, 2, length)  # half of them become token 0, so that frequencies differ
        made.append((tokens * kept).astype(np.uint16))
    return made


@pytest.fixture
def counts(streams):
    return bigram_counts(streams, 12)


def story(n: int, seed: int = 0) -> str:
    """Paragraphs in which each word has few, skewed successors."""
    rng = np.random.default_rng(seed)
    word = 0
    said = []
    while len(said) < n:
        word = (3 * word + int(rng.geometric(0.4))) % len(WORDS)
        said.append(WORDS[word])
    paragraphs = [" ".join(said[start : start + 60]) for start in range(0, n, 60)]
    return "\n\n".join(paragraphs)


def test_counts_are_the_pairs_of_each_stream(streams, counts):
    slow = Counter()
    for stream in streams:
        slow.update(zip(stream.tolist(), stream[1:].tolist()))
    assert counts.sum() == sum(map(len, streams)) - 2  # two streams: the first token of each follows nothing
    assert {(x, y): counts[x, y] for x in range(12) for y in range(12) if counts[x, y]} == slow


def test_floor_and_mutual_information_by_hand():
    counts = bigram_counts([np.array([0, 1, 0, 1, 0, 0])], 2)  # 0 -> 1, 1, 0 and 1 -> 0, 0
    after_0 = 2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3)  # nats; after 1 comes 0 for certain
    floor = 3 / 5 * after_0
    assert entropy_floor(counts) == pytest.approx(floor)
    unigram = 3 / 5 * math.log(5 / 3) + 2 / 5 * math.log(5 / 2)  # of the five that follow, three are 0 and two are 1
    assert mutual_information(counts) == pytest.approx((unigram - floor) / math.log(2))


def test_loss_on_counts_is_the_loss_on_tokens(streams, counts):
    t.manual_seed(1)
    model = ZeroLayer(12, 4)
    summed = 0.0
    for stream in streams:
        tokens = t.from_numpy(stream.astype(int))
        summed += F.cross_entropy(model(tokens[:-1]), tokens[1:], reduction="sum").item()
    by_token = summed / counts.sum()
    assert measure(model, counts) == pytest.approx(by_token, abs=1e-5)
    by_count = count_loss(model, t.arange(12), dense(counts, np.arange(12)))
    assert by_count.item() == pytest.approx(by_token, abs=1e-5)


def test_kl_is_the_loss_less_the_floor(counts):
    t.manual_seed(2)
    model = ZeroLayer(12, 4)
    totals = row_totals(counts)
    p = counts.toarray() / np.maximum(1, totals)[:, None]  # the text's next-token probabilities
    q = (model.W_E @ model.W_U).softmax(-1).detach().numpy()  # the model's
    kl = 0.0  # nats per token: each row's KL, weighted by how often its token occurs
    for total, row_p, row_q in zip(totals, p, q):
        seen = row_p > 0
        row_kl = (row_p[seen] * np.log(row_p[seen] / row_q[seen])).sum()
        kl += total * row_kl / counts.sum()
    assert kl > 0.1
    assert measure(model, counts) - entropy_floor(counts) == pytest.approx(kl, abs=1e-5)


def test_add_alpha_by_hand(counts):
    trained_on = bigram_counts([np.array([0, 1, 0, 1, 0, 0])], 3)  # 0 -> 1, 1, 0 and 1 -> 0, 0; 2 never occurs
    text = bigram_counts([np.array([0, 1, 2, 0])], 3)  # 0 -> 1, 1 -> 2, 2 -> 0
    # (count + 0.5) / (total + 3 * 0.5) of each of the three
    by_hand = -(math.log(2.5 / 4.5) + math.log(0.5 / 3.5) + math.log(0.5 / 1.5)) / 3
    assert add_alpha_loss(trained_on, text, 0.5) == pytest.approx(by_hand)
    assert add_alpha_loss(counts, counts, 1e-9) == pytest.approx(entropy_floor(counts), abs=1e-6)


def test_text_that_repeats_wants_a_small_alpha_and_noise_a_large_one():
    periodic = np.arange(20000) % 12
    noise = np.random.default_rng(0).integers(0, 12, 400)
    assert choose_alpha([periodic], 12) < 1e-3 < choose_alpha([noise], 12)


def test_chunks_and_draws_have_the_dense_gradient(counts):
    t.manual_seed(3)
    model = ZeroLayer(12, 4)
    totals = row_totals(counts)

    def gradient(loss: t.Tensor) -> t.Tensor:
        return t.autograd.grad(loss, model.W_E)[0]

    whole = gradient(count_loss(model, t.arange(12), dense(counts, np.arange(12))))

    summed = t.zeros_like(whole)
    for ids in np.array_split(np.arange(11), 4):  # token 11 never occurs
        chunk = t.from_numpy(np.stack([ids, totals[ids]], 1)).long()  # (row, [token, how often])
        share = chunk[:, 1].sum() / totals.sum()
        summed += share * gradient(drawn_loss(model, chunk, counts))
    assert t.allclose(whole, summed, atol=1e-6)

    draws = [draw_rows(totals, 50, (0, seed)) for seed in range(400)]
    drawn = t.stack([gradient(drawn_loss(model, draw, counts)) for draw in draws])
    error_of_mean = (drawn.mean(0) - whole).norm() / whole.norm()
    error_of_one = t.stack([(one - whole).norm() / whole.norm() for one in drawn]).mean()
    # unbiased: the mean's error falls with the root of the number of draws
    assert error_of_mean < 3 * error_of_one / math.sqrt(400), "the mean of the drawn gradients is not the gradient"
    assert t.equal(draw_rows(totals, 50, (0, 7)), draws[7])


def test_full_rank_reaches_the_table_and_low_rank_does_not(streams, counts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    above_floor = {}  # bits per token, by rank
    for d_model in (1, 12):
        model, _ = fit(Config(d_model=d_model, steps=300, device="cpu"), streams, counts)
        above_floor[d_model] = (measure(model, counts) - entropy_floor(counts)) / math.log(2)
    assert 0 <= above_floor[12] < 0.002
    assert above_floor[1] > 0.02


def test_tokens_and_draws_learn_too(streams, counts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zero_layer.DENSE", 4)
    for how in ("tokens", "counts"):
        cfg = Config(d_model=12, steps=300, tokens_per_step=256, lr=0.03, device="cpu", fit=how)
        model, history = fit(cfg, streams, counts)
        assert measure(model, counts) - entropy_floor(counts) < 0.03
        assert history["tokens"][-1] == 300 * 256


def test_a_run_resumes_from_its_checkpoint_whatever_is_asked_of_it(streams, counts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    watching = dict(watch=lambda model: dict(loss=measure(model, counts)), watch_every=5)
    cfg = Config(d_model=4, steps=20, save_every=10, device="cpu")
    asked_more = dataclasses.replace(cfg, resume=True, token="x", ranks=(2,))  # questions that training does not see
    first, history = fit(cfg, streams, counts, **watching)
    again, history_again = fit(asked_more, streams, counts, **watching)
    assert "resumed" in capsys.readouterr().out
    assert history_again["watch"] == history["watch"]
    assert t.equal(first.W_E, again.W_E)
    other_text = counts[:, ::-1].tocsr()  # as many tokens
    with pytest.raises(SystemExit, match="text"):
        fit(asked_more, streams, other_text, **watching)


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
    totals = row_totals(counts)
    p = counts.toarray() / np.maximum(1, totals)[:, None]
    (best,) = neighbours(model, counts, 3, k=1)
    after, after_by_model, after_in_text, before, before_by_model, before_in_text = best

    assert p[3, after] == p[3].max()  # what most often follows token 3
    assert after_by_model == pytest.approx(p[3].max(), abs=1e-3)
    assert after_in_text == p[3].max()

    frequent = np.flatnonzero(totals >= 50)
    assert before == frequent[p[frequent, 3].argmax()]  # which frequent token 3 most often follows
    assert before_by_model == pytest.approx(p[before, 3], abs=1e-3)
    assert before_in_text == p[before, 3]


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
        (("--steps", "-1"), "--steps"),
    ],
)
def test_bad_input_is_one_line(flags, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.txt").write_text("hi there")
    (tmp_path / "story.txt").write_text(story(600))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zero_layer.py", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "zero_layer.py"), run_name="__main__")
    assert says in end.value.code
    assert len(end.value.code.splitlines()) == 1
