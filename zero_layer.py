"""
Zero-layer transformer, W_E -> W_U: fitted to next-token prediction it becomes the bigram table, as far as its rank
allows.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from utils import (  # first: sets OpenMP's variables before torch is loaded
    Count,
    Natural,
    NotNegative,
    Share,
    cyan,
    endc,
    fail,
    gray,
    green,
    pick_device,
    purple,
    save_results,
    set_seed,
    yellow,
)
from hooks import HookPoint
from hooked import Hooked

from information import entropy_floor, mutual_information, row_totals
from data import find_tokens, kind_of, load_corpus, str_tokens
from launch import flags
from plots import COLORS, array, imshow, label_tokens, line, plain, show, visible
from train import TrainConfig, first_goes_on, train

import numpy as np
import plotly.graph_objects as go
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from plotly.subplots import make_subplots
from scipy.sparse import coo_matrix, csr_matrix
from tabulate import tabulate
from torch import Tensor

DENSE = 4096  # up to this vocabulary the whole count matrix is one dense tensor
CHUNK = 512  # rows of logits held at once when a model is measured: 100 MB for 50257 tokens
ALPHAS = np.geomspace(1e-4, 3, 19)
RARE = 50  # what predicts X: only tokens seen this often are asked
MAPPED = 600  # tokens in the maps, the most frequent
TABLE_GATE = 0.05  # bits per token under which we say that the model is the bigram table


#%% The model: look up the token's row of W_E, multiply by W_U
class ZeroLayer(nn.Module, Hooked):
    """W_E (d_vocab, d_model), W_U (d_model, d_vocab); W_E W_U is the table of logits (token, next)."""

    def __init__(self, d_vocab: int, d_model: int):
        super().__init__()
        self.W_E = nn.Parameter(0.1 * t.randn(d_vocab, d_model))
        self.W_U = nn.Parameter(0.1 * t.randn(d_model, d_vocab))
        self.hook_embed = HookPoint()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.hook_embed(F.embedding(tokens, self.W_E))
        return x @ self.W_U


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config(TrainConfig):
    least_context: ClassVar[int] = 1
    data: str = "stdlib"  # stdlib, a text file or folder, or a hub dataset
    # gpt2 or any: a hub name, a folder, a tokenizer.json; default: a BPE trained on the text
    tokenizer: str | None = None
    vocab: Count = 1024  # size of that BPE
    d_model: Count = 128  # width of the residual stream
    fit: Literal["counts", "tokens"] = "counts"  # exact loss from the count matrix; or plain SGD on sampled tokens
    token: str | None = None  # what follows it, what predicts it; default: the most frequent word
    ranks: tuple[Count, ...] = (2, 8, 32, 128)  # values of d_model to compare, each fitted for half the steps
    steps: Natural = 200
    # drawn per step by --fit tokens, and where the vocabulary is above 4096 (gpt2's 50257: 4 GB at peak)
    tokens_per_step: Count = 4096
    lr: NotNegative = 0.1
    optimizer: Literal["muon", "adamw"] = "adamw"  # Muon has no hidden matrix to work on here
    decay: Share = 1.0  # share of the steps in which the learning rate falls to 0 (wsd)
    clip: NotNegative = 0.0  # gradient norm; 0 does not clip
    contexts: tuple[Count, ...] = (2,)  # of no effect: a bigram model sees one token
    autocast: Literal["auto", "on", "off"] = "off"  # bfloat16 in training
    save_every: Natural = 0  # steps between checkpoints; 0 writes none


#%% The text as counts[x, y]: how often y comes right after x, across the beginning-of-text that joins documents too
def bigram_counts(streams: Iterable[np.ndarray], d_vocab: int) -> csr_matrix:
    x, y = bigrams(streams).T
    return coo_matrix((np.ones(len(x)), (x, y)), (d_vocab, d_vocab)).tocsr()


def bigrams(streams: Iterable[np.ndarray]) -> np.ndarray:
    """(pair, 2): all neighbours in each stream."""
    return np.concatenate([np.stack([stream[:-1], stream[1:]], 1).astype(np.int32) for stream in streams])


def dense(counts: csr_matrix, rows: np.ndarray, device: str = "cpu") -> Tensor:
    return t.from_numpy(counts[rows].toarray()).float().to(device)


def add_alpha_loss(counts: csr_matrix, text: csr_matrix, alpha: float) -> float:
    """Loss in nats per token, on the pairs of text, of the table (counts + alpha) / (row total + alpha * d_vocab)."""
    d_vocab = counts.shape[0]
    text = text.tocoo()
    seen = np.asarray(counts[text.row, text.col]).ravel()
    p_next = (seen + alpha) / (row_totals(counts)[text.row] + alpha * d_vocab)
    return float(-(text.data * np.log(p_next)).sum() / text.sum())


def choose_alpha(streams: list[np.ndarray], d_vocab: int) -> float:
    """The alpha that best predicts the last sixteenth of each training stream from the rest of it."""
    cuts = [len(stream) * 15 // 16 for stream in streams]
    counts = bigram_counts([stream[:cut] for stream, cut in zip(streams, cuts)], d_vocab)
    text = bigram_counts([stream[cut:] for stream, cut in zip(streams, cuts)], d_vocab)
    losses = [add_alpha_loss(counts, text, alpha) for alpha in ALPHAS]
    return float(ALPHAS[np.argmin(losses)])


#%% The loss depends on the counts alone, so one step on the count matrix is a step on the whole text at once
def count_loss(model: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
    """Cross-entropy in nats per token. counts (row, next): one row for each token in rows."""
    return F.cross_entropy(model(rows).float(), counts, reduction="sum") / counts.sum()


@t.no_grad()
def measure(model: nn.Module, counts: csr_matrix) -> float:
    """Exact loss on all counts in nats per token, summed in float64 over chunks of rows."""
    total = 0.0
    device = model.W_E.device
    seen = np.flatnonzero(row_totals(counts))
    n_chunks = -(-len(seen) // CHUNK)  # rounded up
    for rows in np.array_split(seen, n_chunks):
        logits = model(t.from_numpy(rows).to(device))
        losses = F.cross_entropy(logits, dense(counts, rows, device), reduction="none")
        total += losses.double().sum().item()
    return total / float(counts.sum())


def draw_rows(totals: np.ndarray, n: int, seed: tuple[int, ...]) -> Tensor:
    """(row, 2): the distinct tokens among n drawn from the text, and how often each was drawn."""
    drawn = np.random.default_rng(seed).multinomial(n, totals / totals.sum())
    return t.from_numpy(np.stack([np.flatnonzero(drawn), drawn[drawn > 0]], 1))


def drawn_loss(model: nn.Module, drawn: Tensor, counts: csr_matrix) -> Tensor:
    """Loss on drawn rows, each with its whole next-token distribution; its expectation is the loss on all counts."""
    table = dense(counts, drawn[:, 0].cpu().numpy(), drawn.device)
    return count_loss(model, drawn[:, 0], table * (drawn[:, 1:] / table.sum(1, keepdim=True)))


#%% Three ways to take a step. Each gives what a step reads, its loss, and how many tokens of text it stands for
def sampled_tokens(cfg: Config, streams: list[np.ndarray]) -> tuple[Callable, Callable, int]:
    """Plain SGD on pairs drawn from the text: a noisy gradient, and a row of d_vocab logits for each pair."""
    pairs = bigrams(streams)

    def batch(i: int) -> Tensor:
        drawn = np.random.default_rng((cfg.seed, i)).integers(len(pairs), size=cfg.tokens_per_step)
        return t.from_numpy(pairs[drawn]).long()

    def loss(model: nn.Module, drawn: Tensor) -> Tensor:
        return F.cross_entropy(model(drawn[:, 0]).float(), drawn[:, 1])

    return batch, loss, cfg.tokens_per_step


def whole_table(cfg: Config, counts: csr_matrix) -> tuple[Callable, Callable, int]:
    """The exact gradient: every step reads the whole count matrix."""
    d_vocab = counts.shape[0]
    table = dense(counts, np.arange(d_vocab), pick_device(cfg.device))

    def batch(i: int) -> Tensor:
        return t.arange(d_vocab)

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return count_loss(model, rows, table)

    return batch, loss, int(counts.sum())


def drawn_rows(cfg: Config, counts: csr_matrix) -> tuple[Callable, Callable, int]:
    """An unbiased estimate of it from drawn rows, a row of logits for each distinct token: for large vocabularies."""
    totals = row_totals(counts)

    def batch(i: int) -> Tensor:
        return draw_rows(totals, cfg.tokens_per_step, (cfg.seed, i))

    def loss(model: nn.Module, drawn: Tensor) -> Tensor:
        return drawn_loss(model, drawn, counts)

    return batch, loss, cfg.tokens_per_step


def fit(
    cfg: Config,
    streams: list[np.ndarray],
    counts: csr_matrix,
    name: str = "zero_layer",
    watch: Callable[[nn.Module], dict] | None = None,
    watch_every: int = 50,
) -> tuple[ZeroLayer, dict]:
    """
    A model of width cfg.d_model, and the history of its training.
    Above a vocabulary of DENSE tokens the logits of all do not fit at once, and rows are drawn.
    """
    set_seed(cfg.seed)
    d_vocab = counts.shape[0]
    if cfg.fit == "tokens":
        batch, loss, tokens_per_batch = sampled_tokens(cfg, streams)
    elif d_vocab <= DENSE:
        batch, loss, tokens_per_batch = whole_table(cfg, counts)
    else:
        batch, loss, tokens_per_batch = drawn_rows(cfg, counts)
    model = ZeroLayer(d_vocab, cfg.d_model)

    def watch_model(step: int) -> dict:
        return watch(model)

    history = train(
        model,
        batch,
        cfg,
        name,
        loss,
        watch_model if watch else None,
        watch_every,
        tokens_per_batch,
        text=zlib.crc32(counts.indices.tobytes() + counts.data.tobytes()),
        shape=[d_vocab, cfg.d_model],
        fit=cfg.fit,
    )
    return model, history


#%% The closed form that fails: the best rank-d_model table in squared error of log-probabilities, by SVD
def svd_table(counts: csr_matrix, alpha: float) -> tuple[Tensor, Tensor]:
    """
    W_E, W_U at full rank, largest singular values first: their product is the add-alpha log-table, rows centred
    (softmax does not see it), weighted by frequency.
    """
    table = dense(counts, np.arange(counts.shape[0])) + alpha
    weight = table.sum(1, keepdim=True).sqrt()
    centred = table.log() - table.log().mean(1, keepdim=True)
    u, s, v = t.linalg.svd(weight * centred, full_matrices=False)
    return u * s / weight, v


def truncated(W_E: Tensor, W_U: Tensor, rank: int) -> ZeroLayer:
    model = ZeroLayer(len(W_E), rank)
    model.W_E.data = W_E[:, :rank]
    model.W_U.data = W_U[:rank]
    return model


#%% Reading the table: what follows a token, what predicts it, what kind of token it is
@t.no_grad()
def neighbours(model: ZeroLayer, counts: csr_matrix, token: int, k: int = 8) -> list[tuple]:
    """
    k rows (next, P by model, P by counts, previous, P by model, P by counts): the likeliest after token, and the tokens
    (seen RARE times) that make token likeliest.
    """
    totals = row_totals(counts)
    device = model.W_E.device
    p_after = array(model(t.tensor([token], device=device)).softmax(-1)[0])
    asked = np.flatnonzero(totals >= min(RARE, totals.max()))
    chunks = np.array_split(asked, -(-len(asked) // CHUNK))
    p_token = [array(model(t.from_numpy(rows).to(device)).softmax(-1)[:, token]) for rows in chunks]
    p_before = np.concatenate(p_token)  # of each token asked: how likely it makes token

    found = []
    for following, i in zip(p_after.argsort()[::-1][:k], p_before.argsort()[::-1][:k]):
        previous = asked[i]
        counted_after = counts[token, following] / max(1, totals[token])
        counted_before = counts[previous, token] / totals[previous]
        row_of_next = (int(following), float(p_after[following]), counted_after)
        row_of_previous = (int(previous), float(p_before[i]), counted_before)
        found.append((*row_of_next, *row_of_previous))
    return found


#%% Text: every adjacent pair of tokens is one count

# --hpc: an A100 with 40 GB
HPC = Config(vocab=4096, d_model=1024, ranks=(64, 256, 512, 1024), steps=1000)

if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=HPC)
    first_goes_on()
    set_seed(cfg.seed)
    print(f"{purple}Zero layers: W_E -> W_U{endc}")
    corpus = load_corpus(cfg.data, cfg.vocab, cfg.tokenizer)
    streams = list(corpus.train.values())
    d_vocab = corpus.d_vocab
    counts = bigram_counts(streams, d_vocab)
    heldout = bigram_counts(corpus.heldout.values(), d_vocab)
    n_pairs = int(counts.sum())
    names = str_tokens(corpus.tokenizer, range(d_vocab))
    n_mapped = min(MAPPED, np.count_nonzero(row_totals(counts)))
    common = np.argsort(-row_totals(counts), kind="stable")[:n_mapped]
    if not heldout.sum() or len(common) < 10:
        fail(f"--data {cfg.data}: too little text")
    words = [names[x].strip() for x in common if len(names[x].strip()) > 2 and names[x].strip().isalpha()]
    word = cfg.token or (words[0] if words else names[common[0]])
    asked = find_tokens(corpus.tokenizer, word)
    about = f"{cfg.data}, {n_pairs / 1e6:.2f}M training tokens, zero-layer model, d_vocab {d_vocab}"

#%% Baselines: the bigram entropy floor, and the table that add-alpha smoothing makes of the same counts
if __name__ == "__main__":
    floor = entropy_floor(counts)
    frequencies = mutual_information(counts)
    alpha = choose_alpha(streams, d_vocab)
    table_loss = add_alpha_loss(counts, heldout, alpha)
    unseen_pairs = heldout - heldout.multiply(counts > 0)
    unseen = float(unseen_pairs.sum() / heldout.sum())
    table_unseen = add_alpha_loss(counts, unseen_pairs, alpha) if unseen else 0.0
    print(
        f"{gray}bigram entropy floor {cyan}{floor:.3f}{gray} nats per predicted token; a model of frequencies alone "
        f"has KL {cyan}{frequencies:.3f}{gray} bits per token{endc}"
    )
    print(
        f"{gray}held out {cyan}{unseen:.1%}{gray} of the pairs never occur in training, where the raw table's loss is "
        f"infinite; with alpha {cyan}{alpha:.2g}{gray}, chosen on training text, the table has "
        f"{cyan}{table_loss:.3f}{gray} nats per token{endc}"
    )

#%% Gates: the loss on counts is the loss on tokens, KL is loss less floor, and chunks of rows have the whole gradient
if __name__ == "__main__":
    sample = np.asarray(streams[0][:4001])
    probe = ZeroLayer(d_vocab, cfg.d_model)
    some = bigram_counts([sample], d_vocab)
    pairs = t.from_numpy(bigrams([sample])).long()
    totals = row_totals(some)
    rows = np.flatnonzero(totals)

    with t.no_grad():
        log_q_parts = []
        loss_sum = 0.0
        for part in pairs.split(CHUNK):
            logits = probe(part[:, 0])
            loss_sum += F.cross_entropy(logits, part[:, 1], reduction="sum").item()
            log_q_parts.append(logits.log_softmax(-1).gather(1, part[:, 1:])[:, 0])
    on_tokens = loss_sum / len(pairs)
    on_counts = measure(probe, some)
    assert abs(on_counts - on_tokens) < 1e-4, "the loss on counts is not the loss on tokens"

    log_q = t.cat(log_q_parts).double().numpy()
    log_p = np.log(np.asarray(some[sample[:-1], sample[1:]]).ravel() / totals[sample[:-1]])
    probe_kl = (log_p - log_q).mean()
    assert abs(probe_kl - (on_counts - entropy_floor(some))) < 1e-4, "KL is not the loss less the entropy floor"

    whole = t.autograd.grad(count_loss(probe, t.from_numpy(rows), dense(some, rows)), probe.W_U)[0]
    summed = t.zeros_like(whole)
    for part in np.array_split(rows, 3):
        chunk = t.from_numpy(np.stack([part, totals[part]], 1)).long()
        share = totals[part].sum() / totals.sum()
        summed += share * t.autograd.grad(drawn_loss(probe, chunk, some), probe.W_U)[0]
    same = t.allclose(whole, summed, rtol=1e-4, atol=1e-7)
    assert same, "the gradient summed over chunks of rows is not the gradient on all counts"
    print(
        f"{gray}gates passed: loss on counts = loss on tokens, KL = loss - floor, gradient over chunks = whole "
        f"gradient{endc}"
    )


#%% Training on the count matrix: the train loss meets the floor, the held-out loss turns up again
def losses_now(model: ZeroLayer) -> dict[str, float]:
    return {
        "train": measure(model, counts),
        "heldout": measure(model, heldout),
        "unseen": measure(model, unseen_pairs) if unseen else 0.0,
    }


if __name__ == "__main__":
    print(f"{purple}Fit {d_vocab} tokens with d_model {cfg.d_model}{endc}")
    if cfg.fit == "counts" and d_vocab > DENSE:
        print(
            f"{gray}a step draws {cfg.tokens_per_step} tokens of the text and takes the whole next-token distribution "
            f"of each distinct one: unbiased{endc}"
        )
    n_looks = 40 if d_vocab <= DENSE else 5
    model, history = fit(cfg, streams, counts, watch=losses_now, watch_every=max(1, cfg.steps // n_looks))
    watched = {}
    for key in ("step", "train", "heldout", "unseen"):
        watched[key] = np.array([point[key] for point in history["watch"]])
    best = int(watched["heldout"].argmin())
    kl = (watched["train"][-1] - floor) / math.log(2)
    assert kl > -1e-5, "KL divergence below 0: the floor or the loss is wrong"
    with t.no_grad():
        logits = array(model(t.from_numpy(common).to(model.W_E.device)))  # (common token, next)
    likes_the_same = logits.argmax(1) == np.asarray(counts[common].argmax(1)).ravel()
    agree = float(np.average(likes_the_same, weights=row_totals(counts)[common]))
    print(
        f"{gray}train loss {cyan}{watched['train'][-1]:.3f}{gray} nats, KL to the bigram table {cyan}{kl:.4f}{gray} "
        f"bits per token, in {cyan}{history['seconds']:.1f}{gray} s; after {cyan}{agree:.1%}{gray} of the tokens it "
        f"likes the same next token best{endc}"
    )
    print(
        f"{gray}held-out loss {cyan}{watched['heldout'][-1]:.3f}{gray} nats, at best "
        f"{cyan}{watched['heldout'][best]:.3f}{gray} (step {cyan}{watched['step'][best]}{gray}); on its never-seen "
        f"pairs {cyan}{watched['unseen'][-1]:.2f}{gray} nats, at that step {cyan}{watched['unseen'][best]:.2f}{endc}"
    )

#%% ... as curves, on all held-out pairs and on those that training never saw
if __name__ == "__main__":
    n_points = len(watched["step"])
    table_name = f"add-alpha table, alpha {alpha:.2g}"
    fig = line(
        {
            "train": watched["train"],
            "held out": watched["heldout"],
            "bigram entropy floor (train)": [floor] * n_points,
            f"{table_name} (held out)": [table_loss] * n_points,
        },
        "Loss over training, against the bigram entropy floor and the add-alpha table"
        f"<br><sup>{about}, d_model {cfg.d_model}; held out: {heldout.sum() / 1e3:.0f}k tokens</sup>",
        "training step",
        "cross-entropy (nats per token)",
        x=watched["step"],
        dashed=("bigram entropy floor (train)", f"{table_name} (held out)"),
    )
    fig.update_yaxes(range=[floor - 0.1, max(watched["heldout"][-1], table_loss) + 0.6])
    show(
        fig,
        "zero_layer/loss",
        "The training loss reaches the floor that the counts set; the held-out loss turns up where the model "
        "begins to learn pairs by heart.",
    )
    fig = line(
        {"zero-layer model": watched["unseen"], table_name: [table_unseen] * n_points},
        f"What overfits: loss on the {unseen:.1%} of held-out pairs that never occur in training"
        f"<br><sup>{about}, d_model {cfg.d_model}; {unseen_pairs.sum():.0f} such held-out tokens</sup>",
        "training step",
        "cross-entropy on never-seen pairs (nats per token)",
        x=watched["step"],
        dashed=(table_name,),
    )
    show(
        fig,
        "zero_layer/unseen",
        "What it pays for pairs that training never showed: it grows as the model grows surer of those it saw.",
    )

#%% The rank limit: d_model dimensions hold only so much of the table, and the SVD of the log-table wastes them
if __name__ == "__main__":
    ranks = sorted({min(rank, d_vocab) for rank in cfg.ranks})  # no table has a rank above its width
    fitted: dict[int, float] = {}  # KL in bits per token by d_model
    closed: dict[int, float] = {}
    svd_effort = None
    text_share = None

if __name__ == "__main__" and d_vocab > DENSE:
    print(f"{gray}rank sweep and SVD need the dense table: skipped above {DENSE} tokens{endc}")

if __name__ == "__main__" and d_vocab <= DENSE:
    W_E, W_U = svd_table(counts, alpha)
    table = dense(counts, np.arange(d_vocab))
    row_sums = table.sum(1, keepdim=True)
    square = (W_E @ W_U).square() * row_sums  # what squared error weighs
    unlikely = table <= 0.01 * row_sums
    svd_effort = float(square[unlikely].sum() / square.sum())
    text_share = float(table[unlikely].sum() / table.sum())
    print(
        f"{gray}next tokens of P at most 1% are {cyan}{svd_effort:.0%}{gray} of the squared log-table, which SVD fits, "
        f"and {cyan}{text_share:.0%}{gray} of the text, which counts in KL{endc}"
    )
    short = dataclasses.replace(cfg, steps=-(-cfg.steps // 2), save_every=0, resume=False, wandb=False)
    for rank in ranks:
        narrow, _ = fit(dataclasses.replace(short, d_model=rank), streams, counts, f"d_model {rank}")
        fitted[rank] = (measure(narrow, counts) - floor) / math.log(2)
        closed[rank] = (measure(truncated(W_E, W_U, rank), counts) - floor) / math.log(2)
        print(
            f"{gray}d_model {rank}: KL {cyan}{fitted[rank]:.3f}{gray} fitted, {cyan}{closed[rank]:.3f}{gray} by SVD "
            f"(bits per token){endc}"
        )

#%% ... as curves over d_model
if __name__ == "__main__" and fitted:
    fig = line(
        {
            "fitted to next tokens": list(fitted.values()),
            "SVD of the log-table": list(closed.values()),
            "frequencies alone": [frequencies] * len(ranks),
        },
        "KL to the bigram table by d_model: fitted to next tokens, and by SVD of its logarithm"
        f"<br><sup>{about}, {short.steps} steps each; next tokens of P at most 1%: {svd_effort:.0%} of the squared "
        f"log-table, {text_share:.0%} of the text</sup>",
        "d_model",
        "KL (bits per token)",
        x=ranks,
        markers=True,
        logx=True,
        dashed=("frequencies alone",),
    )
    fig.update_yaxes(type="log").update_xaxes(tickvals=ranks)
    show(
        fig,
        "zero_layer/rank",
        "W_E W_U has at most the rank d_model: the fewer dimensions, the farther from the table. Fitting beats "
        "cutting the table's own singular values.",
    )

#%% What follows a token, and what predicts it: the same table read by row and by column
if __name__ == "__main__":
    headers = ["next", "P model", "P counts", "previous", "P model", "P counts"]
    tables = {}
    for token in asked:
        rows = []
        shown = []
        for following, p, q, previous, p_before, q_before in neighbours(model, counts, token):
            rows.append((names[following], p, q, names[previous], p_before, q_before))
            shown.append((visible(names[following]), p, q, visible(names[previous]), p_before, q_before))
        tables[names[token]] = rows
        print(f"{purple}token {visible(names[token])!r}: what follows it, and what predicts it{endc}")
        print(cyan + tabulate(shown, headers, floatfmt=".3f", disable_numparse=[0, 3]) + endc)

#%% W_E in two dimensions, by PCA and by t-SNE, with the kind of each token
if __name__ == "__main__":
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    embed = array(model.W_E)[common]
    pca = PCA(2, random_state=cfg.seed).fit(embed)
    by_pca = pca.transform(embed)
    perplexity = min(30, len(common) / 4)
    tsne = TSNE(2, metric="cosine", perplexity=perplexity, max_iter=500, random_state=cfg.seed)
    by_tsne = tsne.fit_transform(embed)
    kinds = np.array([kind_of(names[token]) for token in common])
    likeliest = logits.argmax(1)

#%% ... coloured by kind of token
if __name__ == "__main__":
    hover = []
    for token, kind, following in zip(common, kinds, likeliest):
        times = f"seen {row_totals(counts)[token]:.0f} times"
        this, after = (plain(visible(names[i])) for i in (token, following))
        hover.append(f"'{this}' ({kind})<br>{times}<br>likeliest next '{after}'")
    hover = np.array(hover)
    variance = f"PCA ({pca.explained_variance_ratio_.sum():.0%} of the variance)"
    fig = make_subplots(1, 2, subplot_titles=[variance, "t-SNE (cosine distance)"])
    most_first = sorted(set(kinds), key=lambda kind: -(kinds == kind).sum())
    for color, kind in zip(COLORS, most_first):
        of_kind = kinds == kind
        for col, xy in enumerate((by_pca, by_tsne), start=1):
            dots = go.Scatter(
                x=xy[of_kind, 0],
                y=xy[of_kind, 1],
                mode="markers",
                name=kind,
                legendgroup=kind,
                showlegend=col == 1,
                text=hover[of_kind],
                hovertemplate="%{text}<extra></extra>",
                marker={"size": 6, "color": color},
            )
            fig.add_trace(dots, row=1, col=col)
    fig.update_layout(
        title=f"W_E in two dimensions: the {len(common)} most frequent tokens<br><sup>{about}, d_model {cfg.d_model}; "
        "text fixes only the product W_E W_U, so axes mean nothing and distances little more</sup>"
    )
    for col, name in enumerate(("principal component", "t-SNE"), start=1):
        fig.update_xaxes(title=f"{name} 1 (no unit)", col=col)
        fig.update_yaxes(title=f"{name} 2 (no unit)", col=col)
    show(
        fig,
        "zero_layer/embedding",
        "Each dot is a token, coloured by its kind: tokens that are followed alike lie together.",
    )

#%% The logit table of the most frequent tokens, each row less its mean over the tokens of the text
if __name__ == "__main__":
    most = common[:100]
    unigram = np.asarray(counts.sum(0)).ravel() / n_pairs
    table = logits[: len(most)]  # (common token, next)
    centred = (table - table @ unigram[:, None])[:, most]
    p_model = np.exp(table - np.logaddexp.reduce(table, 1, keepdims=True))[:, most]
    seen = counts[most][:, most].toarray()

#%% ... as a map: drag to zoom, double-click to go back
if __name__ == "__main__":
    hover = []
    for p_row, seen_row, total in zip(p_model, seen, row_totals(counts)[most]):
        row = [f"P model {p:.4f}, counts {n / total:.4f} (seen {n:.0f} times)" for p, n in zip(p_row, seen_row)]
        hover.append(row)
    labels = label_tokens([names[token] for token in most])
    fig = imshow(
        centred,
        f"The logit table W_E W_U of the {len(most)} most frequent tokens<br><sup>{about}, d_model {cfg.d_model}, KL "
        f"{kl:.3f} bits; each row less its mean over the tokens of the text</sup>",
        "next token",
        "this token",
        x=labels,
        y=labels,
        value="logit",
        hover=hover,
    )
    fig.update_layout(height=950)
    show(
        fig,
        "zero_layer/logits",
        "A row is the token that was seen, a column the token that may follow. Blue: more likely after this token "
        "than after others.",
    )

#%% Conclusion: the finding and the gate it passed
if __name__ == "__main__":
    heldout_loss = watched["heldout"][-1]
    best_heldout = watched["heldout"][best]
    best_step = watched["step"][best]
    save_results(
        "zero_layer",
        cfg,
        kl_to_bigram=kl,
        heldout_loss=heldout_loss,
        bigram_floor=floor,
        train_loss=watched["train"][-1],
        train_seconds=history["seconds"],
        d_vocab=d_vocab,
        train_pairs=n_pairs,
        kl_frequencies=frequencies,
        heldout_best=best_heldout,
        heldout_best_step=best_step,
        heldout_add_alpha=table_loss,
        alpha=alpha,
        unseen_share=unseen,
        unseen_loss=watched["unseen"][-1],
        unseen_loss_at_best=watched["unseen"][best],
        top1_agreement=agree,
        kl_by_rank=fitted,
        kl_by_rank_svd=closed,
        svd_square_unlikely=svd_effort,
        text_share_unlikely=text_share,
        tokens=tables,
        watch=watched,
        units="losses: nats per predicted token; kl: bits per predicted token, over all adjacent pairs of the training "
        "text",
    )
    finding = f"W_E W_U with d_model {cfg.d_model} is {kl:.4f} bits per token from the bigram table of {d_vocab} tokens"
    overfit = f"Held out it ends at {heldout_loss:.3f} nats per token (add-alpha table: {table_loss:.3f})"
    if best_step < cfg.steps:
        overfit += (
            f" after a best of {best_heldout:.3f} at step {best_step}; the pairs it never saw cost "
            f"{watched['unseen'][best]:.2f} nats there and {watched['unseen'][-1]:.2f} at the end."
        )
    elif cfg.steps:
        overfit += ", still falling."
    else:
        overfit += ", untrained."
    if kl <= TABLE_GATE:
        print(f"{green}{finding}: it has learned the table (gate: at most {TABLE_GATE}). {overfit}{endc}")
    else:
        print(f"{yellow}{finding} after {cfg.steps} steps: not the table (gate: at most {TABLE_GATE}). {overfit}{endc}")
