"""The logit lens and the tuned lens, in the forward pass, gated; and milestones of a prompt."""

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

from utils import BAR, cyan, endc, fail, write_aside
from hooks import device_of, in_batches, hooks, run_with_cache
from anatomy import points

from safetensors.torch import load_file, save_file
import torch as t
from torch import Tensor
import torch.nn as nn
from tqdm import trange


#%% The lens: the model's own final norm, unembedding and soft cap, on the stream after any layer
class Lens:
    """Logits from a stream (..., d_model) by the model's own modules. norm 'raw' leaves the final norm out; translators (tuned lens), one per layer but the last, come first."""

    def __init__(self, model: nn.Module, norm: str = "final", translators: nn.ModuleList | None = None):
        self.norm, self.unembed, self.translators = (
            model.ln_final if norm == "final" else nn.Identity(),
            model.unembed,
            translators,
        )
        self.cap, self.exact = getattr(model.cfg, "output_logits_soft_cap", None) or 0, norm == "final"

    def __call__(self, x: Tensor, layer: int = -1) -> Tensor:
        if self.translators and 0 <= layer < len(self.translators):
            x = self.translators[layer](x)
        logits = self.unembed(self.norm(x))
        return self.cap * (logits / self.cap).tanh() if self.cap > 0 else logits


@t.no_grad()
def gate(model: nn.Module, rows: list[list[int]]) -> float:
    """
    How far the last layer's lens misses the model's own logits; too far ends the program. float32: at most 1e-4 (times their standard deviation, if above 1).
    Half precision: root mean square at most 0.02 standard deviations, and the same top-1 wherever its margin exceeds the largest miss.
    """
    worst, end = 0.0, points(model)[-1]
    for row in rows:
        logits, cache = run_with_cache(model, t.tensor([row], device=device_of(model)), end)
        own, seen = logits[0].float(), Lens(model)(cache[end])[0].float()
        miss, spread, top = (own - seen).abs(), own.std(-1).mean().item(), own.topk(2).values
        clear = top[:, 0] - top[:, 1] > miss.max()
        same = logits.dtype == t.float32 or t.equal(own.argmax(-1)[clear], seen.argmax(-1)[clear])
        error, limit = (
            (miss.max().item(), 1e-4 * max(1.0, spread))
            if logits.dtype == t.float32
            else (miss.pow(2).mean().sqrt().item() / spread, 0.02)
        )
        if not same or not error <= limit:
            fail(
                f"the last layer's lens misses the model's own logits by {error:.1e} (limit {limit:.0e}): they come from more than a final norm, an unembedding and a soft cap, and no lens is read"
            )
        worst = max(worst, error)
    return worst


def top_tokens(logits: Tensor, k: int, width: int = 64) -> tuple[Tensor, Tensor]:
    """topk of (row, token), exactly and faster: only the k stretches of the vocabulary with the largest maxima can hold the k largest."""
    whole = logits.shape[1] // width * width
    if whole < 4 * k * width:
        return logits.topk(k)
    best = logits[:, :whole].unflatten(1, (-1, width)).amax(-1).topk(k).indices
    ids = (best[:, :, None] * width + t.arange(width, device=logits.device)).flatten(1)
    ids = t.cat([ids, t.arange(whole, logits.shape[1], device=logits.device).expand(len(ids), -1)], 1)
    top = logits.gather(1, ids).topk(k)
    return top.values, ids.gather(1, top.indices)


def read_logits(logits: Tensor, answers: Tensor, k: int, final: Tensor | None = None) -> dict[str, Tensor]:
    """What is asked of logits (place, token), which are used up (overwritten); final: the model's own log-probabilities there."""
    values, ids = top_tokens(logits, k)
    own = logits.gather(1, answers[:, None])
    rank = t.cat(
        [(some > at).view(t.int8).sum(-1, dtype=t.int32) for some, at in zip(logits.split(32), own.split(32))]
    )  # a sum of booleans is made of integers first
    out = {"ids": ids, "answer_logit": own[:, 0], "rank": rank}
    top = values[:, :1]
    raised = logits.sub_(top)
    total = top + (raised.exp_() if final is None else raised.exp()).sum(-1, keepdim=True).log()
    out |= {"logp": values - total, "answer_logp": (own - total)[:, 0]}
    if final is None:
        return out
    logp = raised.sub_(total - top)
    return out | {"entropy": -(logp.exp() * logp).sum(-1), "kl": (final.exp() * (final - logp)).sum(-1)}


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
    The lens at places (row, position) of token lists, after 0 .. n_layers blocks. Tensors (layer, place, ...): 'ids' and 'logp' of the k likeliest tokens;
    'answer_logit', 'answer_logp', 'rank' (0 is top) of the place's answer; against_final: 'entropy', 'kl' of the final distribution from the layer's
    (nats), 'cosine' of the stream with its last. Read within the forward pass, `chunk` places at a time, the last layer from the model's own logits (gate);
    against_final keeps the asked streams (d_model each) until those are known. Rows are padded on the right, which a causal model never sees.
    """
    names, device, order, at = (
        points(model),
        device_of(model),
        sorted(range(len(rows)), key=lambda i: len(rows[i])),
        [[] for _ in rows],
    )
    for i, (row, _) in enumerate(places):
        at[row].append(i)
    size, last = max(1, batch // len(rows[order[-1]])), len(names) - 1

    def read_rows(group: list[int]) -> tuple[list[int], list[list[dict[str, Tensor]]]]:
        """The places in these rows, and what is read there by layer, in pieces."""
        layers, width, mine = (
            [[] for _ in names],
            max(len(rows[i]) for i in group),
            [i for row in group for i in at[row]],
        )
        start = {row: n * width for n, row in enumerate(group)}
        flat, wanted = (
            t.tensor([start[places[i][0]] + places[i][1] for i in mine], device=device),
            t.tensor([answers[i] for i in mine], device=device),
        )
        cuts, kept, logits = [slice(i, i + chunk) for i in range(0, len(mine), chunk)], {}, None

        def see(layer: int, c: slice, final: Tensor | None = None) -> None:
            seen = logits[flat[c]] if layer == last and lens.exact else lens(kept[layer][c], layer)
            out = read_logits(seen.float(), wanted[c], k, final)
            if final is not None:
                out["cosine"] = t.cosine_similarity(kept[layer][c].float(), kept[last][c].float(), dim=-1)
            layers[layer].append({name: x.cpu() for name, x in out.items()})

        def listen(x: Tensor, hook: nn.Module, layer: int) -> None:
            kept[layer] = x.flatten(0, 1)[flat]
            if against_final or layer == last:
                return
            for c in cuts:
                see(layer, c)
            del kept[layer]

        with hooks(
            model, [(name, lambda x, hook, layer=layer: listen(x, hook, layer)) for layer, name in enumerate(names)]
        ):
            logits = model(t.tensor([rows[i] + [0] * (width - len(rows[i])) for i in group], device=device)).flatten(
                0, 1
            )
        for c in cuts:
            final = logits[flat[c]].float().log_softmax(-1) if against_final else None
            for layer in kept:
                see(layer, c, final)
        return mine, layers

    asked, layers = zip(*in_batches(read_rows, order, size, "lens"))
    back, layers = (
        t.tensor([*itertools.chain(*asked)]).argsort(),
        [[*itertools.chain(*pieces)] for pieces in zip(*layers)],
    )
    return {
        name: t.stack([t.cat([piece[name] for piece in pieces])[back] for pieces in layers]) for name in layers[0][0]
    }


#%% Milestones of a prompt, and the rules by which something is odd
RULES = {
    "copy collapse": "a piece of the prompt dominates (see copy threshold) at a layer before the answer settles, or where it never does",
    "early punctuation": "in the first half of the layers, punctuation is top-1 with probability 0.5 or more",
    "junk": "after the first block, a blank, unprintable or broken token is top-1 with probability 0.1 or more",
    "last-layer miscalibration": "the last block keeps the top-1 but moves the entropy by more than 1 nat",
}
CATEGORIES = {"forward": ("capital", "city", "town"), "reverse": ("country", "state", "nation", "republic", "kingdom")}


def first_layer(true: Tensor, stays: bool = False) -> Tensor:
    """(place) the first layer at which true (layer, place), or from which it stays true to the last; nan where at none."""
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
    By place, from a reading of answers: 'semantic' (the answer is top-1 from this layer on), 'copied' (a contiguous piece of the prompt, a word or three characters
    or more, is top-1 with probability of at least the threshold), 'category' (such a word is in the top-k before the answer settles), as layers or nan; RULES as booleans.
    """
    ids, p, layer = found["ids"].tolist(), found["logp"][:, :, 0].exp(), t.arange(len(found["rank"]))[:, None]
    top1 = lambda rule: t.tensor(
        [[rule(texts[top[0]], prompt) for top, prompt in zip(places, prompts)] for places in ids]
    )
    semantic = first_layer(found["rank"] == 0, stays=True)
    before = layer < semantic.nan_to_num(len(layer))
    is_piece = lambda token, prompt: (
        any(c.isalnum() for c in token)
        and (token.strip() in re.findall(r"\w+", prompt) or (len(token.strip()) > 2 and token.strip() in prompt))
    )
    copies = top1(is_piece) & (p >= threshold) & (found["rank"] > 0)
    named = t.tensor(
        [
            [any(texts[i].strip().lower() in kinds for i in top) for top, kinds in zip(places, categories)]
            for places in ids
        ]
    )
    entropy, same = found["entropy"], found["ids"][-1, :, 0] == found["ids"][-2, :, 0]
    return {
        "semantic": semantic,
        "copied": first_layer(copies),
        "category": first_layer(named & before),
        "copy collapse": (copies & before).any(0),
        "early punctuation": (
            top1(lambda token, _: bool(token.strip()) and token.isprintable() and not any(c.isalnum() for c in token))
            & (p >= 0.5)
            & (layer <= (len(layer) - 1) / 2)
        ).any(0),
        "junk": (
            top1(lambda token, _: not token.strip() or "�" in token or not token.isprintable())
            & (p >= 0.1)
            & (layer > 1)
        ).any(0),
        "last-layer miscalibration": same & ((entropy[-1] - entropy[-2]).abs() > 1),
    }


#%% Tuned lens (Belrose et al. 2023): an affine translator per layer, trained to give the final distribution
class Translator(nn.Linear):
    """x + A x + b, the identity at first."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight), nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return (x + super().forward(x.float())).to(x.dtype)


def tuned_lens(
    model: nn.Module, batch: Callable[[int], Tensor], steps: int, path: Path, lr: float = 2e-3
) -> nn.ModuleList:
    """Translators of all layers but the last, read back from the path or trained there by the KL divergence of the final distribution from the lens's; batch(step) gives tokens."""
    names, translators = (
        points(model)[:-1],
        nn.ModuleList(Translator(model.cfg.d_model, model.cfg.d_model) for _ in range(model.cfg.n_layers)).to(
            device_of(model)
        ),
    )
    if path.is_file():
        translators.load_state_dict(load_file(path))
        return translators.requires_grad_(False)
    lens, optimizer, bar = (
        Lens(model, translators=translators),
        t.optim.Adam(translators.parameters(), lr, betas=(0.9, 0.98)),
        trange(steps, desc="tuned lens", **BAR),
    )
    model.requires_grad_(False)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        logits, cache = run_with_cache(model, batch(step).to(device_of(model)), names)
        final, total = logits.float().log_softmax(-1), 0.0
        for layer, name in enumerate(names):  # one backward per layer: one layer's logits in memory at a time
            loss = (final.exp() * (final - lens(cache[name], layer).float().log_softmax(-1))).sum(-1).mean()
            loss.backward()
            total += loss.item() / len(names)
        if not math.isfinite(total):
            fail(f"the tuned lens diverged at step {step}")
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_description(f"tuned lens KL {cyan}{total:.3f}{endc} nats, mean of layers")
    model.requires_grad_(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda p: save_file({key: x.cpu() for key, x in translators.state_dict().items()}, p))
    return translators.requires_grad_(False)
