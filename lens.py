"""
The logit lens, the tuned lens and the Jacobian lens: what a model would say if it ended after any layer, and what a
layer makes it say later. First in their plain forms, to be held against the papers; then the engine that reads many
places within one forward pass; milestones of a reading; fitting and judging lenses; the classic picture.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from utils import (  # first: sets OpenMP's variables before torch is loaded
    BAR,
    BRIEF,
    ROOT,
    WORLD,
    cyan,
    endc,
    fail,
    find_model,
    is_bytes,
    write_aside,
)
from plots import imshow, label_tokens, plain, visible
from hooks import (
    device_of,
    hooks,
    in_batches,
    is_streamed,
    logit_multiplier,
    rows_that_fit,
    run_from,
    run_with_cache,
)
from weights import model_key, token_text
from data import Corpus, load_corpus
from logit_attribution import layer_streams
from world import load_world

import numpy as np
import plotly.graph_objects as go
import torch as t
import torch.nn as nn
from einops import einsum
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import trange


#%% The logit lens, in its plain form: the model's own final norm, unembedding and soft cap, on every layer's stream
def soft_cap_of(model: nn.Module) -> float:
    """The model squeezes its logits into -cap .. cap (Gemma 2); 0 or below (TransformerLens's -1) is no cap."""
    return getattr(model.cfg, "output_logits_soft_cap", None) or 0.0


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    if cap <= 0:
        return logits
    return cap * (logits / cap).tanh()


def unembedded(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of a normed stream: the model's unembedding, times its scale (Granite), in its soft cap (Gemma 2)."""
    logits = model.unembed(x)
    scale = logit_multiplier(model)
    if scale != 1:
        logits = logits * scale
    return soft_capped(logits, soft_cap_of(model))


@t.no_grad()
def logit_lens(model: nn.Module, tokens: Tensor) -> Tensor:
    """
    Logits (layer, row, pos, token) after 0 .. n_layers blocks, of tokens (row, pos); the last layer's are the model's
    own. nostalgebraist 2020.
    """
    streams = layer_streams(model)
    _, cache = run_with_cache(model, tokens, streams)
    by_layer = []
    for stream in streams:
        by_layer.append(unembedded(model, model.ln_final(cache[stream])))
    return t.stack(by_layer)


#%% The tuned lens, in its plain form (Belrose et al. 2023): an affine translator per layer comes before the final norm
class Translator(nn.Linear):
    """x + A x + b, the identity at first."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return (x + super().forward(x.float())).to(x.dtype)


def tuned_lens_loss(model: nn.Module, translators: nn.ModuleList, tokens: Tensor) -> Tensor:
    """
    What the translators are trained to make small: KL (layer, in nats) of the model's final distribution from the one
    that is read off the translated stream, mean over the positions of tokens (row, pos). All layers but the last.
    Belrose et al. 2023, section 3.
    """
    streams = layer_streams(model)[:-1]
    logits, cache = run_with_cache(model, tokens, streams)
    final = logits.float().log_softmax(-1)
    by_layer = []
    for translator, stream in zip(translators, streams):
        logits = unembedded(model, model.ln_final(translator(cache[stream])))
        by_layer.append(kl_from(final, logits).mean())
    return t.stack(by_layer)


def kl_from(final: Tensor, logits: Tensor) -> Tensor:
    """
    KL (...), in nats, of a distribution with log-probabilities final (..., token) from that of logits (..., token).
    """
    return (final.exp() * (final - logits.float().log_softmax(-1))).sum(-1)


#%% The Jacobian lens, in its plain form (Gurnee et al. 2026): what a change of a stream does to the last, on average
def last_stream(model: nn.Module, resid: Tensor, layer: int) -> Tensor:
    """The stream after all blocks (row, pos, d_model) of a run that resid (row, pos, d_model) enters at a layer."""
    last = layer_streams(model)[-1]
    kept = {}

    def keep(x: Tensor, hook: nn.Module) -> None:
        kept[last] = x

    first_position = t.zeros(len(resid), dtype=t.long, device=resid.device)  # the one that is unembedded, for nothing
    run_from(model, resid, first_position, layer, [(last, keep)])
    return kept[last]


def jacobian_lens(model: nn.Module, tokens: Tensor, target: str = "later", first: int = 0) -> Tensor:
    """
    (layer, d_model out, d_model in) for all layers but the last: the derivative of the last stream with respect to the
    stream after 0, 1 .. blocks, mean over the rows and positions of tokens (row, pos), the `first` ones left out. Of a
    position p to `target`: itself ('same'), or the sum over itself and all later ones ('later'), as in the paper.
    Gurnee et al. 2026, https://transformer-circuits.pub/2026/workspace/index.html.
    """
    streams = layer_streams(model)[:-1]
    _, cache = run_with_cache(model, tokens, streams)
    by_layer = []
    for layer, stream in enumerate(streams):
        of_rows = []
        for resid in cache[stream]:
            ends_in = partial(last_of_row, model, layer)
            jacobian = t.autograd.functional.jacobian(ends_in, resid)  # (pos out, d_model out, pos in, d_model in)
            jacobian = jacobian[first:, :, first:]  # of an earlier position than p the derivative is zero: causal
            if target == "same":
                of_rows.append(jacobian.diagonal(dim1=0, dim2=2).mean(-1))
            else:
                of_rows.append(jacobian.sum(0).mean(1))
        by_layer.append(t.stack(of_rows).mean(0))
    return t.stack(by_layer)


def last_of_row(model: nn.Module, layer: int, resid: Tensor) -> Tensor:
    """last_stream of one row (pos, d_model)."""
    return last_stream(model, resid[None], layer)[0]


class Transport(nn.Module):
    """x -> J x: where a stream leads to, to be read by the final norm and the unembedding."""

    def __init__(self, jacobian: Tensor):
        super().__init__()
        self.weight = nn.Parameter(jacobian.float(), requires_grad=False)  # (d_model out, d_model in)

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() @ self.weight.T).to(x.dtype)


#%% Any lens on any stream, and the gate: on the last layer it must be the model's own output
class Lens:
    """
    Logits (..., token) from a stream (..., d_model) by the model's own modules. norm 'none' leaves the final norm out,
    to compare; translators (of the tuned lens, or Transports: the Jacobian lens), one for each layer but the last, come
    first.
    """

    def __init__(self, model: nn.Module, norm: str = "final", translators: nn.ModuleList | None = None):
        if norm not in ("final", "none"):
            raise ValueError(f"unknown norm {norm!r}: the lens knows final and none")
        self.exact = norm == "final"  # the last layer's lens is the model's own output
        self.norm = model.ln_final if self.exact else nn.Identity()
        self.model = model
        self.translators = translators

    def __call__(self, x: Tensor, layer: int = -1) -> Tensor:
        """layer: after how many blocks x was taken; -1 uses no translator."""
        if self.translators and 0 <= layer < len(self.translators):
            x = self.translators[layer](x)
        return unembedded(self.model, self.norm(x))


@t.no_grad()
def require_exact_lens(model: nn.Module, rows: list[list[int]]) -> float:
    """
    The gate: how far the last layer's lens misses the model's own logits, at worst over the rows (token lists); too far
    ends the program. float32: at most 1e-4 (times the logits' standard deviation, if above 1). Half precision: root
    mean square at most 0.02 standard deviations, and the same top-1 wherever its margin exceeds the largest miss.
    """
    worst = 0.0
    if model.W_U.shape[0] != model.cfg.d_model:
        fail(
            f"a projection stands between the stream ({model.cfg.d_model} wide) and the unembedding "
            f"({model.W_U.shape[0]}), as in OPT-350m: no lens is read; patching.py takes this model"
        )
    last_stream = layer_streams(model)[-1]
    lens = Lens(model)
    for row in rows:
        logits, cache = run_with_cache(model, t.tensor([row], device=device_of(model)), last_stream)
        own = logits[0].float()
        seen = lens(cache[last_stream])[0].float()
        spread = own.std(-1).mean().item()
        if logits.dtype == t.float32:
            error = (own - seen).abs().max().item()
            limit = 1e-4 * max(1.0, spread)
            same_top = True
        else:
            error = (own - seen).pow(2).mean().sqrt().item() / spread
            limit = 0.02
            same_top = same_clear_top(own, seen)
        if not same_top or not error <= limit:  # an error of nan is no pass
            fail(
                f"the last layer's lens misses the model's own logits by {error:.1e} (limit {limit:.0e}): they come "
                "from more than a final norm, an unembedding and a soft cap, and no lens is read"
            )
        worst = max(worst, error)
    return worst


def same_clear_top(own: Tensor, seen: Tensor) -> bool:
    """Both logits (pos, token) have the same top-1 wherever its margin exceeds the largest difference between them."""
    best, second = own.topk(2).values.unbind(-1)
    clear = best - second > (own - seen).abs().max()
    return t.equal(own.argmax(-1)[clear], seen.argmax(-1)[clear])


#%% What is asked of logits
def top_tokens(logits: Tensor, k: int, width: int = 64) -> tuple[Tensor, Tensor]:
    """
    topk of logits (row, token), exactly and faster. The vocabulary is cut into stretches of `width` tokens: only the k
    stretches with the largest maxima, and the tokens that are left over, can hold the k largest.
    """
    n_rows, d_vocab = logits.shape
    whole = d_vocab // width * width
    if whole < 4 * k * width:  # then the detour saves nothing
        return logits.topk(k)
    best_stretches = logits[:, :whole].unflatten(1, (-1, width)).amax(-1).topk(k).indices
    in_stretches = (best_stretches[:, :, None] * width + t.arange(width, device=logits.device)).flatten(1)
    left_over = t.arange(whole, d_vocab, device=logits.device).expand(n_rows, -1)
    candidates = t.cat([in_stretches, left_over], 1)
    top = logits.gather(1, candidates).topk(k)
    return top.values, candidates.gather(1, top.indices)


def count_above(logits: Tensor, own: Tensor, answers: Tensor) -> Tensor:
    """
    How many tokens come before each place's answer (place), whose logit is own (place, 1): those with larger logits
    (place, token), and of equal ones, which half precision has, those with smaller ids, as argmax takes them.
    """
    ids = t.arange(logits.shape[1], device=logits.device)
    counts = []
    for some, answer, token in zip(logits.split(32), own.split(32), answers[:, None].split(32)):
        above = (some > answer) | ((some == answer) & (ids < token))
        counts.append(above.view(t.int8).sum(-1, dtype=t.int32))  # a sum of booleans is made of integers first
    return t.cat(counts)


def consume_logits(logits: Tensor, answers: Tensor, k: int, final: Tensor | None = None) -> dict[str, Tensor]:
    """
    What read() tells of logits (place, token) and answers (place). final: the model's own log-probabilities (place,
    token), for entropy and KL. Afterwards the logits are garbage: what is computed of them is written over them, so
    that no second tensor of that size is made. Who still needs them hands over a clone.
    """
    values, ids = top_tokens(logits, k)
    own = logits.gather(1, answers[:, None])
    out = {"ids": ids, "answer_logit": own[:, 0], "rank": count_above(logits, own, answers)}

    top = values[:, :1]
    raised = logits.sub_(top)  # in the memory of the logits, as is what follows
    exponentials = raised.exp_() if final is None else raised.exp()  # without final, nothing but their sum is needed
    log_total = top + exponentials.sum(-1, keepdim=True).log()  # log-sum-exp of the logits
    del exponentials
    out["logp"] = values - log_total
    out["answer_logp"] = (own - log_total)[:, 0]
    if final is None:
        return out

    logp = raised.sub_(log_total - top)
    out["entropy"] = -(logp.exp() * logp).sum(-1)
    out["kl"] = (final.exp() * (final - logp)).sum(-1)
    return out


#%% The engine: the lens at many places of many rows, read within the forward pass
class LensPass:
    """
    One forward pass of a group of rows, in which the lens is read. Of each stream only the asked places are kept;
    without against_final they are read at once and forgotten, else after the pass, when the final distribution is
    known. Never more than `chunk` places' logits at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        lens: Lens,
        rows: list[list[int]],
        positions: list[list[int]],
        answers: list[int],
        k: int,
        against_final: bool,
        chunk: int,
    ):
        """positions: those asked in each row, row by row in the order of answers."""
        self.model = model
        self.lens = lens
        self.k = k
        self.against_final = against_final
        self.streams = layer_streams(model)
        self.last = len(self.streams) - 1
        device = device_of(model)
        width = max(map(len, rows))
        padded = [row + [0] * (width - len(row)) for row in rows]  # on the right, which a causal model never sees
        self.tokens = t.tensor(padded, device=device)
        flat = []
        for i, asked in enumerate(positions):
            flat += [i * width + position for position in asked]
        self.flat = t.tensor(flat, dtype=t.long, device=device)
        self.answers = t.tensor(answers, dtype=t.long, device=device)
        self.chunks = [slice(start, start + chunk) for start in range(0, len(answers), chunk)]
        self.kept: dict[int, Tensor] = {}  # by layer, the asked places' streams (place, d_model)
        self.found: list[list[dict[str, Tensor]]] = [[] for _ in self.streams]  # by layer, a reading per chunk

    def run(self) -> list[list[dict[str, Tensor]]]:
        """What is read, by layer, a piece per chunk of places."""
        listeners = [(stream, partial(self.listen, layer)) for layer, stream in enumerate(self.streams)]
        with hooks(self.model, listeners):
            self.logits = self.model(self.tokens).flatten(0, 1)
        for places in self.chunks:
            final = self.logits[self.flat[places]].float().log_softmax(-1) if self.against_final else None
            for layer in self.kept:
                self.see(layer, places, final)
        return self.found

    def listen(self, layer: int, stream: Tensor, hook: nn.Module) -> None:
        """
        Keep the asked places of the stream (row, pos, d_model); without against_final read them now, but for the last
        layer.
        """
        self.kept[layer] = stream.flatten(0, 1)[self.flat]
        if self.against_final or layer == self.last:
            return
        for places in self.chunks:
            self.see(layer, places)
        del self.kept[layer]

    def see(self, layer: int, places: slice, final: Tensor | None = None) -> None:
        """Read one chunk of places; final: the model's log-probabilities there."""
        if layer == self.last and self.lens.exact:
            logits = self.logits[self.flat[places]]  # the gate has shown that they are the lens's
        else:
            logits = self.lens(self.kept[layer][places], layer)
        reading = consume_logits(logits.float(), self.answers[places], self.k, final)  # a copy of this chunk
        if final is not None:
            here = self.kept[layer][places].float()
            there = self.kept[self.last][places].float()
            reading["cosine"] = t.cosine_similarity(here, there, dim=-1)
        self.found[layer].append({name: x.cpu() for name, x in reading.items()})


@t.no_grad()
def read(
    model: nn.Module,
    lens: Lens,
    rows: list[list[int]],
    places: list[tuple[int, int]],
    answers: list[int],
    k: int = 5,
    against_final: bool = True,
    chunk: int = 192,
    batch: int = 4096,
) -> dict[str, Tensor]:
    """
    The lens at places (row, position) of token lists, after 0 .. n_layers blocks. Tensors (layer, place, ...):
        'ids', 'logp'                           of the k likeliest tokens
        'answer_logit', 'answer_logp', 'rank'   of the place's answer; rank 0 is top
        'entropy', 'kl', 'cosine'               if against_final: KL (nats) of the final distribution from the layer's,
                                                cosine of the stream with its last
    Equal to logit_lens, but read within the forward pass: `chunk` places at a time, about `batch` tokens per pass, the
    last layer from the model's own logits (require_exact_lens has shown that they are the lens's); against_final keeps
    the asked streams (d_model each) until those are known.
    """
    k = min(k, model.W_U.shape[1])
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))  # little padding within a group
    rows_at_once = max(1, batch // len(rows[by_length[-1]]))
    places_of_row: list[list[int]] = [[] for _ in rows]
    for place, (row, _) in enumerate(places):
        places_of_row[row].append(place)

    def read_group(group: list[int]) -> tuple[list[int], list[list[dict[str, Tensor]]]]:
        """
        The places in these rows, and what is read there. (A LensPass is let go here: where memory runs out, smaller
        groups find it free.)
        """
        asked = [place for row in group for place in places_of_row[row]]
        positions = [[places[place][1] for place in places_of_row[row]] for row in group]
        group_rows = [rows[row] for row in group]
        group_answers = [answers[place] for place in asked]
        lens_pass = LensPass(
            model,
            lens,
            rows=group_rows,
            positions=positions,
            answers=group_answers,
            k=k,
            against_final=against_final,
            chunk=chunk,
        )
        return asked, lens_pass.run()

    order: list[int] = []
    pieces: list[list[dict[str, Tensor]]] = [[] for _ in layer_streams(model)]
    for asked, found in in_batches(read_group, by_length, rows_at_once, "lens"):
        order += asked
        for all_pieces, new_pieces in zip(pieces, found):
            all_pieces += new_pieces
    back = t.tensor(order).argsort()  # from the order of reading to that of places
    by_layer = [joined(layer_pieces, back) for layer_pieces in pieces]
    return {name: t.stack([layer[name] for layer in by_layer]) for name in by_layer[0]}


def joined(pieces: list[dict[str, Tensor]], back: Tensor) -> dict[str, Tensor]:
    """One reading of all places, in the order `back`, from a reading per chunk."""
    return {name: t.cat([piece[name] for piece in pieces])[back] for name in pieces[0]}


def token_texts(model: nn.Module, ids: Tensor) -> dict[int, str]:
    """The text of every token that stands in ids."""
    return {i: token_text(model, i) for i in ids.unique().tolist()}


#%% Milestones of a reading, and the rules by which something is odd
RULES = {
    "copy collapse": (
        "a piece of the prompt dominates (see copy threshold) at a layer before the answer settles, "
        "or where it never does"
    ),
    "early punctuation": "in the first half of the layers, punctuation is top-1 with probability 0.5 or more",
    "junk": "after the first block, a blank, unprintable or broken token is top-1 with probability 0.1 or more",
    "last-layer miscalibration": "the last block keeps the top-1 but moves the entropy by more than 1 nat",
}
CATEGORIES = {"forward": ("capital", "city", "town"), "reverse": ("country", "state", "nation", "republic", "kingdom")}


def has_letters(token: str) -> bool:
    return any(c.isalnum() for c in token) and not is_bytes(token)


def is_piece(token: str, prompt: str) -> bool:
    """A word of the prompt, or three characters or more that stand in it."""
    text = token.strip()
    is_word = text in re.findall(r"\w+", prompt)
    is_part = len(text) > 2 and text in prompt
    return has_letters(token) and (is_word or is_part)


def is_punctuation(token: str) -> bool:
    return bool(token.strip()) and token.isprintable() and not has_letters(token) and not is_bytes(token)


def is_junk(token: str) -> bool:
    return not token.strip() or is_bytes(token) or "\ufffd" in token or not token.isprintable()


def names_category(tokens: list[str], category: tuple[str, ...]) -> bool:
    return any(token.strip().lower() in category for token in tokens)


def first_layer(true: Tensor, stays: bool = False) -> Tensor:
    """
    (place) the first layer at which true (layer, place), or from which it stays true to the end; nan where at none.
    """
    if stays:
        true = true.flip(0).long().cumprod(0).flip(0).bool()
    return t.where(true.any(0), true.int().argmax(0), t.nan)


def milestones(
    found: dict[str, Tensor],
    texts: dict[int, str],
    prompts: list[str],
    categories: list[tuple[str, ...]],
    threshold: float,
) -> dict[str, Tensor]:
    """
    By place, from a reading of answers, as layers or nan:
        'semantic'    the answer is top-1 from this layer on
        'copied'      a contiguous piece of the prompt, a word or three characters or more, is top-1 with probability of
                      at least the threshold
        'category'    such a word is in the top-k before the answer settles
    and RULES as booleans. texts: of every token of found['ids']; prompts and categories: by place.
    """
    top_ids = found["ids"].tolist()  # (layer, place, k)
    top_texts = [[[texts[i] for i in top] for top in layer] for layer in top_ids]
    copies_prompt = t.tensor([[is_piece(top[0], prompt) for top, prompt in zip(x, prompts)] for x in top_texts])
    punctuation = t.tensor([[is_punctuation(top[0]) for top in x] for x in top_texts])
    junk = t.tensor([[is_junk(top[0]) for top in x] for x in top_texts])
    named = t.tensor([[names_category(top, category) for top, category in zip(x, categories)] for x in top_texts])

    probability = found["logp"][:, :, 0].exp()  # of the top-1
    n_points = len(top_ids)
    layer = t.arange(n_points)[:, None]
    semantic = first_layer(found["rank"] == 0, stays=True)
    before_it_settles = layer < semantic.nan_to_num(n_points)
    copies = copies_prompt & (probability >= threshold) & (found["rank"] > 0)
    early_punctuation = punctuation & (probability >= 0.5) & (layer <= (n_points - 1) / 2)
    late_junk = junk & (probability >= 0.1) & (layer > 1)
    same_top = found["ids"][-1, :, 0] == found["ids"][-2, :, 0]
    entropy_moved = (found["entropy"][-1] - found["entropy"][-2]).abs()
    return {
        "semantic": semantic,
        "copied": first_layer(copies),
        "category": first_layer(named & before_it_settles),
        "copy collapse": (copies & before_it_settles).any(0),
        "early punctuation": early_punctuation.any(0),
        "junk": late_junk.any(0),
        "last-layer miscalibration": same_top & (entropy_moved > 1),
    }


#%% Audits: what of a reading is the norm's doing, and what a second lens confirms
def confirmed_semantic(
    normed: dict[str, Tensor], unnormed: dict[str, Tensor], tuned: dict[str, Tensor] | None = None
) -> Tensor:
    """
    (place) the milestone 'semantic' of the normed lens, of which a layer counts only where the lens without the norm
    says the answer too, or the tuned lens does. The last layer is the model's own output and needs nobody.
    """
    confirmed = unnormed["rank"] == 0
    if tuned is not None:
        confirmed |= tuned["rank"] == 0
    confirmed[-1] = True
    return first_layer((normed["rank"] == 0) & confirmed, stays=True)


@t.no_grad()
def norm_artefact(model: nn.Module, rows: Tensor) -> dict[str, list[float]]:
    """
    What the final norm does to the raw lens, by layer, over all positions of rows (row, pos): 'KL' (nats) of the normed
    lens's distribution from the one without the norm, 'same top-1' (share of positions).
    """
    streams = layer_streams(model)
    normed = Lens(model)
    unnormed = Lens(model, "none")

    def sums(part: Tensor) -> Tensor:
        """(layer, 2)"""
        _, cache = run_with_cache(model, part, streams)
        by_layer = []
        for stream in streams:
            with_norm = normed(cache[stream]).float()
            without = unnormed(cache[stream]).float()
            kl = kl_from(with_norm.log_softmax(-1), without).sum()
            same = (with_norm.argmax(-1) == without.argmax(-1)).sum()
            by_layer.append(t.stack([kl, same]))
        return t.stack(by_layer)

    total = sum(in_batches(sums, rows.to(device_of(model)), 8)) / rows.numel()
    return {"KL": total[:, 0].tolist(), "same top-1": total[:, 1].tolist()}


#%% Training the tuned lens
def tuned_learning_rate(d_model: int) -> float:
    """
    1e-2 up to a width of 128, and less for wider streams: a step of Adam moves every entry of A by this, and the
    stream by the sum over its width.
    """
    return 1e-2 * min(1.0, 128 / d_model)


def tuned_lens(
    model: nn.Module, batch: Callable[[int], Tensor], steps: int, path: Path, lr: float | None = None
) -> nn.ModuleList:
    """
    Translators of all layers but the last, read back from the path, or trained (by backward_by_layer, whose gradients
    are tuned_lens_loss's) and kept there; batch(step) gives tokens (row, pos). Belrose et al. 2023.
    """
    d_model = model.cfg.d_model
    translators = nn.ModuleList(Translator(d_model, d_model) for _ in range(model.cfg.n_layers))
    translators.to(device_of(model))
    if path.is_file():
        translators.load_state_dict(load_file(path))
        return translators.requires_grad_(False)
    model.requires_grad_(False)
    train_translators(model, translators, batch, steps, lr or tuned_learning_rate(d_model))
    model.requires_grad_(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.cpu() for name, x in translators.state_dict().items()}
    write_aside(path, lambda aside: save_file(tensors, aside))
    return translators.requires_grad_(False)


def train_translators(
    model: nn.Module, translators: nn.ModuleList, batch: Callable[[int], Tensor], steps: int, lr: float
) -> None:
    optimizer = t.optim.Adam(translators.parameters(), lr, betas=(0.9, 0.98))
    bar = trange(steps, desc="tuned lens", **BAR)
    for step in bar:
        warm_up = (step + 1) / 20
        decay = 2 * (steps - step) / steps  # over the second half
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, warm_up, decay)
        mean_kl = backward_by_layer(model, translators, batch(step).to(device_of(model)))
        if not math.isfinite(mean_kl):
            fail(f"the tuned lens diverged at step {step}")
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_description(f"tuned lens KL {cyan}{mean_kl:.3f}{endc} nats, mean of layers")


def backward_by_layer(model: nn.Module, translators: nn.ModuleList, tokens: Tensor) -> float:
    """
    The gradients of tuned_lens_loss, and its mean over layers; one backward per layer, so that one layer's logits are
    in memory at a time.
    """
    streams = layer_streams(model)[:-1]
    lens = Lens(model, translators=translators)
    logits, cache = run_with_cache(model, tokens, streams)
    final = logits.float().log_softmax(-1)
    mean_kl = 0.0
    for layer, stream in enumerate(streams):
        loss = kl_from(final, lens(cache[stream], layer)).mean()
        loss.backward()
        mean_kl += loss.item() / len(streams)
    return mean_kl


#%% Fitting the Jacobian lens by vector-Jacobian products
@contextlib.contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients go to activations alone: half the work, and nothing is kept for the weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def fit_jacobian_lens(
    model: nn.Module, rows: Tensor, target: str = "later", first: int = 0, memory_gb: float = 1.0
) -> Tensor:
    """
    jacobian_lens by d_model backward passes for each group of rows (row, pos) that fits into memory: one for each
    dimension of the last stream, which asks all positions of all rows at once. 'same' asks a copy of the row for each
    position, and takes as many times longer as there are positions. A backward pass is about 2 x (parameters of the
    blocks) operations per token: for GPT-2 (85M, d_model 768) that is 0.13 TFLOP per token of the rows.
    """
    if target not in ("same", "later"):
        raise ValueError(f"unknown target {target!r}: the Jacobian lens knows same and later")
    n_rows, n_pos = rows.shape
    asked = t.eye(n_pos)[first:]  # (copy, pos): whose derivatives are taken, of whom
    if target == "same":
        rows = rows.repeat_interleave(len(asked), 0)
    else:
        asked = asked.sum(0, keepdim=True)  # at once: what comes back to a position is the sum over all later ones
    asked = asked.repeat(n_rows, 1).to(device_of(model))
    rows = rows.to(device_of(model))
    cfg = model.cfg
    kept = cfg.n_layers * (10 * cfg.d_model + 4 * cfg.d_mlp + 4 * cfg.n_heads * n_pos)  # of a position, for the graph
    at_once = rows_that_fit(model, n_pos, memory_gb, kept)

    def sums(index: Tensor) -> Tensor:
        return jacobian_sums(model, rows[index], asked[index])

    with without_weight_gradients(model):
        total = sum(in_batches(sums, t.arange(len(rows), device=rows.device), at_once, "Jacobian lens"))
    return total / (n_rows * (n_pos - first))


def jacobian_sums(model: nn.Module, rows: Tensor, asked: Tensor) -> Tensor:
    """
    (layer, d_model out, d_model in): derivatives of the last stream, summed over the positions that are asked (row,
    pos), with respect to each earlier stream, summed over these too.
    """
    streams = layer_streams(model)
    kept: dict[str, Tensor] = {}

    def keep(stream: str, x: Tensor, hook: nn.Module) -> None:
        kept[stream] = x

    with t.enable_grad():
        resid = model(rows, stop_at_layer=0).detach().requires_grad_()
        first_position = t.zeros(len(rows), dtype=t.long, device=rows.device)  # is unembedded, for nothing
        run_from(model, resid, first_position, 0, [(stream, partial(keep, stream)) for stream in streams])
    sources = [kept[stream] for stream in streams[:-1]]
    last = kept[streams[-1]]
    sums = t.zeros(len(sources), model.cfg.d_model, model.cfg.d_model, device=rows.device)
    for out in trange(model.cfg.d_model, desc="derivatives", **BRIEF):
        cotangent = t.zeros_like(last)
        cotangent[..., out] = asked
        gradients = t.autograd.grad(last, sources, cotangent, retain_graph=True)
        for layer, gradient in enumerate(gradients):
            sums[layer, out] = einsum(gradient.float(), asked, "row pos d_model, row pos -> d_model")
    return sums


def fitted_jacobian_lens(
    model: nn.Module,
    rows: Callable[[], Tensor],
    path: Path,
    target: str = "later",
    first: int = 1,
    memory_gb: float = 1.0,
) -> nn.ModuleList:
    """Transports of all layers but the last, read back from the path, or fitted to rows() (row, pos) and kept there."""
    if path.is_file():
        jacobians = load_file(path)["jacobians"]
    else:
        jacobians = fit_jacobian_lens(model, rows(), target, first, memory_gb).cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, lambda aside: save_file({"jacobians": jacobians}, aside))
    return nn.ModuleList(Transport(jacobian) for jacobian in jacobians).to(device_of(model))


#%% Judging lenses
def judge_lenses(
    model: nn.Module, lenses: dict[str, Lens], rows: Tensor, draws: int = 1000
) -> tuple[dict[str, list[float]], dict[str, list[list[float]]]]:
    """
    By layer, means over all positions of rows (row, pos) but the last: 'KL, <lens>' of the final distribution from the
    layer's (nats), and 'perplexity, <lens>' of the next token; and of each its [2.5%, 97.5%] over a bootstrap of rows.
    """
    n_rows, n_positions = rows.shape
    places = list(itertools.product(range(n_rows), range(n_positions - 1)))
    next_tokens = rows[:, 1:].flatten().tolist()
    readings = {name: read(model, lens, rows.tolist(), places, next_tokens) for name, lens in lenses.items()}
    by_row = {}  # (layer, row)
    for name, reading in readings.items():
        by_row[f"KL, {name}"] = reading["kl"].unflatten(1, (n_rows, -1)).mean(2)
    for name, reading in readings.items():
        by_row[f"perplexity, {name}"] = (-reading["answer_logp"]).unflatten(1, (n_rows, -1)).mean(2)
    drawn = t.randint(n_rows, (draws, n_rows), generator=t.Generator().manual_seed(0))
    ends = t.tensor([0.025, 0.975])
    scores = {}
    intervals = {}
    for name, x in by_row.items():
        mean = x.mean(1)
        low_high = x[:, drawn].mean(2).quantile(ends, dim=1).T
        if name.startswith("perplexity"):
            mean = mean.exp()
            low_high = low_high.exp()
        scores[name] = mean.tolist()
        intervals[name] = low_high.tolist()
    return scores, intervals


#%% A lens by name, as the stories' flags ask for it
TUNED_TOKENS = 64  # per row that a lens is fitted to and judged on
TUNED_ROWS = 64  # that it is judged on
type LensKind = Literal["raw", "tuned", "jacobian"]


@dataclass
class LensConfig:
    """The settings that the stories of the lens share; a story's own come after them."""

    lens: LensKind = "raw"  # raw: final norm and unembedding alone; tuned and jacobian: after a map fitted per layer
    tuned_steps: int = 200  # of the tuned lens, 16 x 64 tokens each
    jacobian_rows: int = 16  # of 64 tokens, over which the Jacobian lens is a mean
    jacobian_target: Literal["later", "same"] = (
        "later"  # of a position: the last stream at all later ones, or at itself
    )
    memory_gb: float = 1.0  # cap on what fitting the Jacobian lens keeps


def refuse_lens_settings(cfg: LensConfig) -> None:
    if cfg.tuned_steps < (1 if cfg.lens == "tuned" else 0):
        fail("--tuned-steps is 0 (no tuned lens) or more; --lens tuned needs 1 or more")
    if cfg.jacobian_rows < 1:
        fail("--jacobian-rows is 1 or more")
    if not cfg.memory_gb > 0:
        fail("--memory-gb is more than 0")


def tuned_lens_corpus(model: nn.Module, name: str, bos: bool | None) -> Corpus:
    """The text that lenses are fitted to: the world where the model learned it, else the standard library."""
    if knows_world(model):
        return load_world()
    return load_corpus(tokenizer=name, bos=bos)


def draw_rows(corpus: Corpus, world: bool, seed: tuple[int, int], n: int) -> Tensor:
    """(n, TUNED_TOKENS) of training text, the same for the same seed."""
    rng = np.random.default_rng(seed)
    if world:
        return corpus.batch(rng, n, TUNED_TOKENS)
    return t.from_numpy(corpus.rows(rng, n, TUNED_TOKENS, "train"))


@dataclass
class LensText:
    """What lenses of a model are fitted to, and under which name they are kept."""

    model: nn.Module
    folder: str
    bos: bool | None
    seed: int
    corpus: Corpus

    @classmethod
    def of(cls, model: nn.Module, name: str, bos: bool | None, seed: int) -> "LensText":
        if is_streamed(model):
            fail("the tuned and the Jacobian lens need the weights in memory: --lens raw, or --offload off")
        folder = find_model(name)
        return cls(model, folder, bos, seed, tuned_lens_corpus(model, folder, bos))

    def rows(self, step: int, n: int) -> Tensor:
        return draw_rows(self.corpus, knows_world(self.model), (self.seed, step), n)

    def path(self, kind: str, of: str, settings: list) -> Path:
        """settings: those that change the map, beside the model's files, the text and the seed."""
        shared = [str(self.model.W_U.dtype), self.bos, self.seed, TUNED_TOKENS, self.corpus.key]
        key = model_key(self.folder, [*shared, *settings])
        return Path(f"checkpoints/{kind}_lens") / f"{slug(self.folder)}{of}-{key}.safetensors"

    def tuned(self, steps: int, of: str = "") -> nn.ModuleList:
        """of: names another model than the folder's (its random twin)."""
        rate = tuned_learning_rate(self.model.cfg.d_model)
        path = self.path("tuned", of, [rate, steps])
        return tuned_lens(self.model, partial(self.rows, n=16), steps, path, rate)

    def jacobian(
        self, n: int, target: str, memory_gb: float, of: str = "", n_tokens: int = TUNED_TOKENS
    ) -> nn.ModuleList:
        """n_tokens: of each row that are taken."""

        def rows() -> Tensor:
            return self.rows(0, n)[:, :n_tokens]

        path = self.path("jacobian", of, [n, target, n_tokens])
        return fitted_jacobian_lens(self.model, rows, path, target, 1, memory_gb)


def open_lens(
    model: nn.Module, name: str, cfg: LensConfig, norm: str = "final", bos: bool | None = None, seed: int = 0
) -> Lens:
    """The lens that --lens asks for; what must be fitted is read back where it was fitted before."""
    if cfg.lens == "raw":
        return Lens(model, norm)
    text = LensText.of(model, name, bos, seed)
    if cfg.lens == "tuned":
        return Lens(model, norm, text.tuned(cfg.tuned_steps))
    return Lens(model, norm, text.jacobian(cfg.jacobian_rows, cfg.jacobian_target, cfg.memory_gb))


#%% The classic picture, layer x position
def layer_labels(found: dict[str, Tensor]) -> list[str]:
    """Names of the layers of a reading: 'embed' is the stream before any block."""
    n_layers = len(found["ids"]) - 1
    return ["embed", *(f"L{layer}" for layer in range(n_layers))]


def top_of_layers(found: dict[str, Tensor], texts: dict[int, str]) -> list[list[str]]:
    """(layer, place) the likeliest token."""
    return [[visible(texts[i]) for i in layer] for layer in found["ids"][:, :, 0].tolist()]


def top_k_of_layers(found: dict[str, Tensor], texts: dict[int, str]) -> list[list[list[str]]]:
    """(layer, place, k) the likeliest tokens and their probabilities."""
    cells = []
    for layer_ids, layer_p in zip(found["ids"].tolist(), found["logp"].exp().tolist()):
        cells.append([])
        for ids, ps in zip(layer_ids, layer_p):
            cells[-1].append([f"{visible(texts[i])} {p:.3f}" for i, p in zip(ids, ps)])
    return cells


def grid_figure(found: dict[str, Tensor], texts: dict[int, str], tokens: list[str], title: str) -> go.Figure:
    """
    A reading of the places at `tokens`: the likeliest token in its cell, coloured by its probability; hover for the
    top-k.
    """
    layers = layer_labels(found)
    fig = imshow(
        found["logp"][:, :, 0].exp(),
        title,
        xlabel="position",
        ylabel="after layer",
        x=label_tokens(tokens),
        y=layers,
        diverging=False,
        value="probability",
    )
    fig.data[0].update(
        text=[[plain(cell) for cell in layer] for layer in top_of_layers(found, texts)],
        texttemplate="%{text}",
        hovertext=[["<br>".join(map(plain, cell)) for cell in layer] for layer in top_k_of_layers(found, texts)],
        hovertemplate="after %{y}, at %{x}<br>%{hovertext}<extra></extra>",
    )
    if len(layers) > 16:
        fig.update_layout(height=200 + 36 * len(layers))
    return fig.update_yaxes(autorange=True)


def grid_table(found: dict[str, Tensor], texts: dict[int, str], tokens: list[str], columns: int = 8) -> str:
    """The same for the terminal: the first positions."""
    rows = []
    probabilities = found["logp"][:, :, 0].exp().tolist()
    for layer, best, ps in zip(layer_labels(found), top_of_layers(found, texts), probabilities):
        rows.append([layer, *(f"{token} {p:.2f}" for token, p in zip(best[:columns], ps))])
    return tabulate(rows, headers=["after", *label_tokens(tokens)[:columns]])


#%% What the stories of the lens share: a model's name in file names, and whether the world is its corpus
def slug(name: str) -> str:
    """A model's name or folder as a file name."""
    return re.sub(r"[^\w.-]+", "-", name.removeprefix(str(ROOT))).strip("-")


def knows_world(model: nn.Module) -> bool:
    """It reads with the world's tokenizer, so it learned the world's facts, whose directions are known."""
    if not isinstance(model.tokenizer, Tokenizer):
        return False
    return model.tokenizer.get_vocab() == Tokenizer.from_file(str(WORLD / "tokenizer.json")).get_vocab()
