"""Features of a sparse autoencoder: judged on held-out text, read, and acted through."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from utils import (  # first: sets OpenMP's variables before torch is loaded
    endc,
    fail,
    find_folder,
    load_model,
    on_base,
    yellow,
)
from plots import array, visible
from hooks import harvest, in_batches, run_with_hooks
from layers import next_token_loss
from data import Corpus, str_tokens
from weights import choose_bos, text_tokenizer
from logit_attribution import folded_W_U
from world import corpus_for, judging_rows
from interventions import put
from sae import (
    SAEConfig,
    check_fit,
    fit_sae,
    hook_for,
    model_for,
    open_folder,
    open_release,
    refuse_settings,
    text_places,
)

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from scipy.sparse import csc_matrix, csr_matrix, vstack
from torch import Tensor


#%% What the stories start from: a model, the SAE of one of its hooks, and held-out text as that SAE wants it
@dataclass
class Subject:
    model: nn.Module
    name: str
    sae: nn.Module
    hook: str
    corpus: Corpus
    tokenizer: object
    rows: Tensor  # (row, pos), held out
    bos: list[int]  # what stands before every row: beginning-of-text, or nothing
    about: str  # for titles

    @property
    def first(self) -> int:
        """The first position that is text."""
        return len(self.bos)


def open_subject(cfg: SAEConfig, ours: tuple[type, ...], device: str) -> Subject:
    """
    --sae or --release decide the model, else the SAE of these settings is trained, or found finished. ours: see
    load_model.
    """
    refuse_settings(cfg)
    if cfg.base:
        cfg.model = on_base(cfg.model or "models/world", cfg.base)
    if cfg.sae or cfg.release:
        sae = open_folder(cfg.sae, device) if cfg.sae else open_release(cfg.release, cfg.sae_id, device)
        hook_for(sae, cfg.hook)
        model, name = model_for(sae, cfg.model, ours, device)
    else:
        name = cfg.model or "models/world"
        model = load_model(find_folder(name), ours, device)
    model.requires_grad_(False)
    asked = cfg.bos
    if asked is None and (cfg.sae or cfg.release):
        asked = sae.cfg.metadata.prepend_bos  # as it was trained
    choose_bos(model, asked)
    corpus = text_for(model, name, cfg.data, asked)
    if not (cfg.sae or cfg.release):
        sae = fit_sae(model, cfg, corpus, name, device)
    meta = sae.cfg.metadata
    bos = [] if corpus.bos is None or asked is False else [corpus.bos]
    rows = heldout_rows(corpus, cfg.heldout, meta.context_size or cfg.context, bool(bos), cfg.seed).to(device)
    check_fit(model, meta.hook_name, sae.cfg.d_in, rows[:1])
    kind = meta.training_architecture or sae.cfg.architecture()
    about = f"{name}, {meta.hook_name}, {kind} of width {sae.cfg.d_sae}"
    return Subject(model, name, sae, meta.hook_name, corpus, text_tokenizer(model), rows, bos, about)


def text_for(model: nn.Module, name: str, data: str | None, bos: bool | None) -> Corpus:
    _, corpus = corpus_for(data, name, bos)
    if corpus.d_vocab > model.W_U.shape[1]:
        fail(
            f"the text has {corpus.d_vocab} kinds of tokens, the model {model.W_U.shape[1]}: "
            "--data world is for models/world"
        )
    return corpus


def heldout_rows(corpus: Corpus, tokens: int, context: int, with_bos: bool, seed: int) -> Tensor:
    """Rows (row, context) with at least `tokens` tokens of text."""
    if with_bos or corpus.bos is None:
        n_rows = math.ceil(tokens / (context - with_bos))
        return judging_rows(corpus, n_rows, context, seed)
    n_rows = math.ceil(tokens / context)
    return judging_rows(corpus, n_rows, context + 1, seed)[:, 1:]


#%% Judging: the codes of held-out text, how much of the variance they miss, what it costs the model to live on them
def sparse(acts: Tensor) -> csr_matrix:
    row, feature = (acts != 0).nonzero(as_tuple=True)
    places = (row.cpu().numpy(), feature.cpu().numpy())
    return csr_matrix((array(acts[row, feature]), places), acts.shape)


@t.no_grad()
def encode_rows(
    model: nn.Module, sae, rows: Tensor, first: int, bos: int | None = None
) -> tuple[csr_matrix, float, Tensor]:
    """
    Codes (token, feature) of rows from position `first` on, zero where no text stands (text_places); of the text, the
    fraction of variance unexplained and the mean activation (d_in).
    """
    hook = sae.cfg.metadata.hook_name

    def rebuild(part: Tensor) -> tuple[csr_matrix, float, float, Tensor]:
        x = harvest(model, part, [hook])[hook][:, first:]
        is_text = text_places(part, first, bos)[:, first:, None]
        acts = sae.encode(x)
        missed = ((x - sae.decode(acts)) * is_text).pow(2).sum().item()
        text = x * is_text
        return sparse((acts * is_text).flatten(0, 1)), missed, text.pow(2).sum().item(), text.sum((0, 1))

    parts, missed, squares, totals = zip(*in_batches(rebuild, rows, 64))
    codes = vstack(parts, format="csr")
    n_tokens = int(text_places(rows, first, bos).sum())
    mean = sum(totals) / n_tokens
    variance = sum(squares) - n_tokens * mean.pow(2).sum().item()
    return codes, sum(missed) / variance, mean


def recovered(clean: float, spliced: float, removed: float) -> float:
    """
    The share of the cross-entropy lost with the activation that the SAE gives back; nan where removing it costs
    nothing.
    """
    if removed - clean <= 0.02:
        return math.nan
    return (removed - spliced) / (removed - clean)


@t.no_grad()
def judge(
    model: nn.Module, sae, rows: Tensor, first: int, bos: int | None = None, ce_rows: int = 256
) -> tuple[dict[str, float], csr_matrix]:
    """
    Numbers for the text (text_places) of rows it was not trained on, and their codes (token, feature) from position
    `first` on. Cross-entropies, in nats, are of the first ce_rows: of the model as it is, with the SAE's reconstruction
    in the place of the text's activations, and with their mean or zero there.
    """
    hook = sae.cfg.metadata.hook_name
    codes, fvu, mean = encode_rows(model, sae, rows, first, bos)
    n_tokens = int(text_places(rows, first, bos).sum())
    density = codes.getnnz(0) / n_tokens

    def loss_with(new: Callable[[Tensor], Tensor]) -> float:
        def summed_loss(part: Tensor) -> float:
            is_text = text_places(part, first, bos)[..., None]
            edit = put(lambda x: t.where(is_text, new(x), x))
            return next_token_loss(run_with_hooks(model, part, [(hook, edit)]), part, "sum").item()

        return sum(in_batches(summed_loss, rows[:ce_rows], 64)) / rows[:ce_rows, 1:].numel()

    clean = loss_with(lambda x: x)
    spliced = loss_with(lambda x: sae.decode(sae.encode(x)))
    mean_ablated = loss_with(lambda x: mean.expand_as(x))
    zero_ablated = loss_with(t.zeros_like)
    numbers = {
        "l0": codes.nnz / n_tokens,
        "fvu": fvu,
        "ce_recovered": recovered(clean, spliced, mean_ablated),
        "ce_recovered_zero_ablation": recovered(clean, spliced, zero_ablated),
        "dead_fraction": float((density == 0).mean()),
        "dense_fraction": float((density > 0.1).mean()),
        "ce_clean": clean,
        "ce_sae": spliced,
        "ce_mean_ablated": mean_ablated,
        "ce_zero_ablated": zero_ablated,
        "n_tokens": n_tokens,
    }
    return numbers, codes


def require_good_sae(judged: dict[str, float], cfg: SAEConfig, hook: str) -> None:
    """No feature is read of an SAE that does not rebuild what the model lives on."""
    reasons = "wrong model, hook or processing, or too little training"
    fvu = judged["fvu"]
    share = judged["ce_recovered"]
    if not fvu <= cfg.max_fvu:  # nan too
        fail(f"gate: the SAE leaves {fvu:.2f} of the variance unexplained (at most --max-fvu {cfg.max_fvu}): {reasons}")
    if share < cfg.min_recovered:
        fail(
            f"gate: {share:.2f} of the cross-entropy is recovered (at least --min-recovered {cfg.min_recovered}): "
            f"{reasons}"
        )
    if math.isnan(share):
        print(f"{yellow}removing {hook} costs this model nothing: cross-entropy recovered has no meaning here{endc}")


def firing_order(codes: csr_matrix) -> list[int]:
    """The features that ever fire, the most frequent first."""
    density = codes.getnnz(0) / codes.shape[0]
    return [int(f) for f in np.argsort(-density) if density[f] > 0]


def cosines_with_others(directions: Tensor, chosen: Tensor) -> Tensor:
    """(chosen, feature) cosines of some decoder rows (feature, d) with all, -1 with themselves."""
    unit = F.normalize(directions.float(), dim=1)
    cosines = unit[chosen] @ unit.T
    cosines[range(len(chosen)), chosen] = -1.0
    return cosines


def nearest_cosines(directions: Tensor) -> Tensor:
    """(feature) cosine of each decoder row with its nearest, some at a time: there can be a million."""
    every = t.arange(len(directions), device=directions.device)
    return t.cat([cosines_with_others(directions, some).amax(1) for some in every.split(1024)])


#%% Reading: each feature's strongest contexts, the tokens it promotes, what fires with it, what points its way
def words_of(tokenizer, ids: Tensor) -> list[str]:
    return [visible(word) for word in str_tokens(tokenizer, ids)]


def five_most(scores: np.ndarray) -> list[list]:
    """[feature, score] of the five largest, those above 0.02."""
    return [[int(j), round(float(scores[j]), 2)] for j in np.argsort(-scores)[:5] if scores[j] > 0.02]


def strongest_places(column: csc_matrix, width: int, n: int = 8) -> list[tuple[int, int]]:
    """(row, pos) of the largest of a feature's codes, at most one in a row of `width` tokens."""
    tokens = column.indices[np.argsort(-column.data)]
    _, best_of_row = np.unique(tokens // width, return_index=True)
    return [divmod(int(token), width) for token in tokens[np.sort(best_of_row)][:n]]


def read_features(
    model: nn.Module,
    sae,
    codes: csr_matrix,
    rows: Tensor,
    tokenizer,
    chosen: list[int],
    n_text: int | None = None,
) -> list[dict]:
    """
    One entry of the page for each chosen feature of codes (token, feature), which are of the last tokens of each of
    rows. Contexts are from different rows, with shades in per cent of the feature's largest code; 'with' is the share
    of tokens with either feature that have both. n_text: how many of the tokens are text; None is all.
    """
    n_tokens, n_features = codes.shape
    width = n_tokens // len(rows)  # tokens of a row that have codes
    first = rows.shape[1] - width
    columns = codes.tocsc()
    counts = codes.getnnz(0)
    fired = (codes != 0).astype(np.float32)
    both = (fired[:, chosen].T @ fired).toarray()
    cosines = array(cosines_with_others(sae.W_dec, t.tensor(chosen, device=sae.W_dec.device)))
    effects = logit_effects(model, sae, chosen)
    n_words = min(8, effects.shape[1])

    def context(f: int, row: int, pos: int, top: float) -> list:
        """[words, shades] around a place."""
        start = max(0, pos - 12)
        stop = min(width, pos + 5)
        shades = codes[row * width + start : row * width + stop, [f]].toarray()[:, 0]
        words = words_of(tokenizer, rows[row, first:][start:stop])
        return [words, (100 * shades / top).round().astype(int).tolist()]

    entries = []
    for i, f in enumerate(chosen):
        column = columns[:, [f]]
        top = float(column.data.max(initial=0))
        either = np.maximum(counts[f] + counts - both[i], 1)
        others = np.arange(n_features) != f
        entry = {
            "id": f,
            "density": counts[f] / (n_text or n_tokens),
            "max": round(top, 2),
            "contexts": [context(f, row, pos, top) for row, pos in strongest_places(column, width)],
            "histogram": np.histogram(column.data, 20, (0, top or 1.0))[0].tolist(),
            "concepts": [],
            "up": words_of(tokenizer, effects[i].topk(n_words).indices),
            "down": words_of(tokenizer, (-effects[i]).topk(n_words).indices),
            "with": five_most(both[i] / either * others),
            "near": five_most(cosines[i]),
        }
        entries.append(entry)
    return entries


STREAM_HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def writes_to_stream(sae) -> bool:
    """Whether decoder rows lie in the residual stream: heads side by side (hook_z) can be as wide and do not."""
    hook = getattr(sae, "hook_out", None) or sae.cfg.metadata.hook_name or ""  # a transcoder's, or a SAE's
    return hook.split(".")[-1] in STREAM_HOOKS


def logit_effects(model: nn.Module, sae, chosen: list[int]) -> Tensor:
    """
    (feature, token): what a unit step along each decoder row adds to the logits directly; no tokens where the hook is
    not the residual stream.
    """
    if not writes_to_stream(sae) or sae.cfg.d_in != len(model.W_U):
        return t.zeros(len(chosen), 0)
    return F.normalize(sae.W_dec[chosen].float(), dim=1) @ folded_W_U(model)


#%% Acting: a feature added, clamped, ablated or projected out; an answer traced to features and to what the SAE misses
def change(sae, feature: int, how: str, x: Tensor, amount: float) -> Tensor:
    """
    What to add to x (..., d_in). add: amount times the unit direction; clamp: the feature becomes amount; ablate: zero;
    project: nothing of x is left along it.
    """
    unit = F.normalize(sae.W_dec[feature].float(), dim=0)
    if how == "add":
        return amount * unit.expand_as(x)
    if how == "project":
        return -(x @ unit)[..., None] * unit
    if how == "clamp":
        return decoded_change(sae, feature, x, amount)
    if how == "ablate":
        return decoded_change(sae, feature, x, 0.0)
    raise ValueError(f"unknown edit {how!r}")


def decoded_change(sae, feature: int, x: Tensor, to: float) -> Tensor:
    """
    By how much the SAE's output for x (..., d_in) moves when the feature becomes `to`. Both codes are decoded at once,
    since some SAEs keep of an encoding the norms of x, and one decoding puts them back and forgets them.
    """
    acts = sae.encode(x)
    edited = acts.clone()
    edited[..., feature] = to
    after, before = sae.decode(t.stack([edited, acts])).float()
    return after - before


class Attribution:
    """
    Why this answer: the metric, weights (d_vocab) . last logits of tokens (1, pos), as a function of the SAE's features
    and of its error at every position (Marks et al. 2024).
        features (pos, feature)   gradient x activation of each node: by how much the metric falls, to first order, when
        error (pos)               it is ablated
        value                     the metric
        moved                     how far putting features + error in the place of the activation moves it (gate: by 0)
    """

    def __init__(self, model: nn.Module, sae, tokens: Tensor, weights: Tensor):
        self.model = model
        self.sae = sae
        self.tokens = tokens
        self.weights = weights
        self.hook = sae.cfg.metadata.hook_name
        x = harvest(model, tokens, [self.hook])[self.hook]
        with t.no_grad():
            self.acts = sae.encode(x)
            clean = self.metric(model(tokens))
        self.missed = (x - sae.decode(self.acts)).requires_grad_()
        self.acts.requires_grad_()
        value = self.run(self.acts, self.missed)
        value.backward()
        self.features = (self.acts.grad * self.acts)[0].detach()
        self.error = (self.missed.grad * self.missed)[0].sum(-1).detach()
        self.value = value.detach()
        self.moved = (self.value - clean).abs()

    def metric(self, logits: Tensor) -> Tensor:
        return logits[0, -1].float() @ self.weights

    def run(self, acts: Tensor, missed: Tensor) -> Tensor:
        """
        The metric when the SAE's output for these features, plus what it misses, is in the place of the activation.
        """

        def rebuild(x: Tensor) -> Tensor:
            self.sae.encode(x)  # some SAEs keep the norms here that decode puts back
            return self.sae.decode(acts) + missed

        return self.metric(run_with_hooks(self.model, self.tokens, [(self.hook, put(rebuild))]))

    @t.no_grad()
    def falls(self, pos: int, feature: int | None) -> float:
        """How far the metric falls when a node is really ablated; feature None: the error node."""
        acts = self.acts.clone()
        missed = self.missed.clone()
        if feature is None:
            missed[0, pos] = 0
        else:
            acts[0, pos, feature] = 0
        return (self.value - self.run(acts, missed)).item()
