"""
Heads: attention patterns and what they score, a catalogue of heads named only above chance, where each looks and what
it carries.
"""

from utils import fail  # first: sets OpenMP's variables before torch is loaded
from hooks import act_name, ask_norm, block_norms, device_of, hooks, run_with_cache
from data import str_tokens, to_tokens
from logit_attribution import folded_W_U, per_head
from neurons import peaks_by_row, write_weight

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from tokenizers import Tokenizer
from torch import Tensor


#%% Attention patterns of all heads
@t.no_grad()
def attention_patterns(model: nn.Module, tokens: Tensor) -> Tensor:
    """What every head attends to in tokens (1, pos): (layer x head, query, key)."""
    _, cache = run_with_cache(model, tokens, "blocks.*.attn.hook_pattern")
    return t.cat([cache["pattern", layer][0].float().cpu() for layer in range(model.cfg.n_layers)])


def attention_in(model: nn.Module, tokenizer: Tokenizer, text: str) -> tuple[list[str], Tensor]:
    """The tokens of a text, and what every head attends to in it: (layer x head, query, key)."""
    tokens = to_tokens(tokenizer, text).to(device_of(model))
    return str_tokens(tokenizer, tokens[0]), attention_patterns(model, tokens)


#%% Repeated random tokens: what comes after the first copy can be known from the context alone
def repeated_tokens(batch: int, half: int, vocab: Tensor | int, bos: int | None = None, seed: int = 0) -> Tensor:
    """(batch, [bos] + 2 * half): random tokens, said twice. vocab: the number of tokens, or the ids to draw from."""
    generator = t.Generator().manual_seed(seed)
    pool = vocab if isinstance(vocab, Tensor) else t.arange(vocab)
    once = pool[t.randint(len(pool), (batch, half), generator=generator)]
    twice = t.cat([once, once], dim=1)
    if bos is None:
        return twice
    return t.cat([t.full((batch, 1), bos), twice], dim=1)


def known_tokens(corpus: object, at_least: int = 100) -> Tensor:
    """
    Ids of the tokens that training has seen `at_least` times, since an untrained embedding tells nothing; where the
    text is small, the 50 most frequent. corpus: a data.Corpus.
    """
    counts = sum(np.bincount(part, minlength=corpus.d_vocab) for part in corpus.train.values())
    if corpus.bos is not None:
        counts[corpus.bos] = 0
    fiftieth = np.sort(counts)[-min(50, len(counts))]
    known = np.flatnonzero((counts >= min(at_least, fiftieth)) & (counts > 0))
    return t.from_numpy(known)


def spaced_repeats(batch: int, half: int, pool: Tensor, bos: int | None = None, seed: int = 0) -> Tensor:
    """
    (batch, [bos] + 2 * half): random tokens, of which the last half // 2 (at least 2) have been said once before, in
    each row at its own distance. A head that looks back over one fixed distance, whatever stands there, finds the
    earlier copy in few rows. Each row's tokens differ otherwise, where the pool (ids) has enough of them.
    """
    generator = t.Generator().manual_seed(seed)
    said = max(2, half // 2)
    length = 2 * half
    if length < 2 * said:
        fail(f"rows of {length} tokens have no place for a repeat: give longer rows (--contexts)")
    distances = t.randint(said, length - said + 1, (batch,), generator=generator).tolist()
    rows = []
    for distance in distances:
        if len(pool) >= length:
            row = pool[t.randperm(len(pool), generator=generator)[:length]]
        else:
            row = pool[t.randint(len(pool), (length,), generator=generator)]
        start = length - said - distance
        row[-said:] = row[start : start + said].clone()
        rows.append(row)
    rows = t.stack(rows)
    if bos is None:
        return rows
    return t.cat([t.full((batch, 1), bos), rows], dim=1)


def random_repeats(corpus: object, rows: int, half: int, seed: int, at_least: int = 100) -> Tensor:
    """spaced_repeats of tokens that training has seen. corpus: a data.Corpus."""
    return spaced_repeats(rows, half, known_tokens(corpus, at_least), corpus.bos, seed)


#%% Head scores on repeated random tokens, one function per kind: pattern (batch, head, query, key) -> (head) in 0..1
def stripe(pattern: Tensor, offset: int, start: int = 0) -> Tensor:
    """Mean attention (head) that queries from position start on pay to the key `offset` places back."""
    paid = pattern.diagonal(-offset, dim1=-2, dim2=-1)  # batch head (query - offset)
    return paid[..., max(start - offset, 0) :].mean((0, -1))


def prefix_matching_score(pattern: Tensor, half: int) -> Tensor:
    """Induction heads: attention to the token after the earlier copy (Olsson et al. 2022)."""
    second = pattern.shape[-1] - half  # where the second copy begins
    return stripe(pattern, half - 1, second)


def duplicate_token_score(pattern: Tensor, half: int) -> Tensor:
    """Attention to the earlier copy itself (Wang et al. 2022)."""
    second = pattern.shape[-1] - half
    return stripe(pattern, half, second)


def previous_token_score(pattern: Tensor) -> Tensor:
    """Attention one place back, from the third token on: for the second, the previous token is the first."""
    return stripe(pattern, 1, 2)


def first_token_score(pattern: Tensor) -> Tensor:
    """Attention to the first token, where heads rest that have nothing to do (Xiao et al. 2023)."""
    return pattern[:, :, 2:, 0].mean((0, 2))


def head_scores(model: nn.Module, n_layers: int, tokens: Tensor, half: int | None = None) -> dict[str, Tensor]:
    """
    {'prefix_matching', 'previous_token', 'duplicate_token', 'first_token': (layer, head) in 0..1}, on the CPU.
    With half: by the field's stripes, of tokens (batch, pos) as repeated_tokens makes them. Without: attention to
    where each role looks in whatever rows (role_targets), as spaced_repeats needs it.
    """
    if half is None:
        with t.no_grad():
            found = attention_scores(model, tokens, {role: [mask] for role, mask in role_targets(tokens).items()})
        return {SCORE_NAMES[role]: looked[0] for role, looked in found.items()}
    with t.no_grad():
        _, cache = run_with_cache(model, tokens, [act_name("pattern", layer) for layer in range(n_layers)])
    patterns = [cache["pattern", layer].float() for layer in range(n_layers)]
    scores = {
        "prefix_matching": [prefix_matching_score(pattern, half) for pattern in patterns],
        "previous_token": [previous_token_score(pattern) for pattern in patterns],
        "duplicate_token": [duplicate_token_score(pattern, half) for pattern in patterns],
        "first_token": [first_token_score(pattern) for pattern in patterns],
    }
    return {name: t.stack(by_layer).cpu() for name, by_layer in scores.items()}


#%% What a head would take from one place, whatever it looks at
def extraction_by_head(model: nn.Module, x: Tensor, layer: int) -> Tensor:
    """
    (head, row, d_model): what each head of a block writes where it attends to nothing but the stream x (row, d_model),
    W_O W_V norm(x), its biases left out. Through the unembedding: attribute extraction (Geva et al. 2023).
    """
    attn = model.blocks[layer].attn
    norm = block_norms(model, layer).before_attn
    normed = x if norm is None else norm(x[None])[0]
    W_V = attn.W_V.repeat_interleave(model.cfg.n_heads // len(attn.W_V), 0)  # (head, d_model, d_head)
    z = einsum(normed, W_V, "row d_model, head d_model d_head -> head row d_head")
    return einsum(z, attn.W_O, "head row d_head, head d_head d_model -> head row d_model")


#%% Head catalogue: where each kind of head looks, True in (row, query, key) of tokens (row, pos). A new kind: its function
# here, its line in role_targets, SCORE_NAMES and FLOORS, and in BY_... which null it has. (Roles of Wang et al.: roles.py)
# What a role must at least be worth, whatever chance gives: a share of attention; of copying, a rank.
FLOORS = {"previous token": 0.3, "duplicate token": 0.1, "induction": 0.1, "text-begin sink": 0.5, "copying": 0.95}


BY_POSITION = ("previous token", "text-begin sink")  # their null: for each query one of its keys at random


BY_CONTENT = ("duplicate token", "induction")  # their null: each row's looks are another row's


SCORE_NAMES = {
    "previous token": "previous_token",
    "duplicate token": "duplicate_token",
    "induction": "prefix_matching",
    "text-begin sink": "first_token",
}


COPIED = 256  # places whose tokens a copying head is asked to copy


CONTROLS = 4  # runs on rows without a repeat


def places_back(tokens: Tensor) -> Tensor:
    """(query, key): how many places the key lies before the query."""
    place = t.arange(tokens.shape[1], device=tokens.device)
    return place[:, None] - place


def same_token(tokens: Tensor) -> Tensor:
    """(row, query, key): query and key hold the same token."""
    return tokens[:, :, None] == tokens[:, None]


def for_every_row(targets: Tensor, tokens: Tensor) -> Tensor:
    return targets.expand(len(tokens), -1, -1)


def previous_token_targets(tokens: Tensor) -> Tensor:
    """The key one place back, asked from the third token on: for the second, the previous token is the first."""
    back = places_back(tokens)
    asked = back[:, :1] > 1
    return for_every_row((back == 1) & asked, tokens)


def text_begin_targets(tokens: Tensor) -> Tensor:
    """The first token, asked from the third token on."""
    place = t.arange(tokens.shape[1], device=tokens.device)
    asked = place[:, None] > 1
    return for_every_row((place == 0) & asked, tokens)


def duplicate_token_targets(tokens: Tensor) -> Tensor:
    """Earlier copies of the query's token."""
    return same_token(tokens) & (places_back(tokens) > 0)


def induction_targets(tokens: Tensor) -> Tensor:
    """The key after an earlier copy of the query's token."""
    after_same = F.pad(same_token(tokens)[:, :, :-1], (1, 0))
    return after_same & (places_back(tokens) > 0)


def role_targets(tokens: Tensor) -> dict[str, Tensor]:
    """Where each role looks, True in (row, query, key)."""
    return {
        "previous token": previous_token_targets(tokens),
        "text-begin sink": text_begin_targets(tokens),
        "duplicate token": duplicate_token_targets(tokens),
        "induction": induction_targets(tokens),
    }


#%% Head catalogue: how much each head looks there, and the same with the role's structure shuffled away
def attention_on(pattern: Tensor, targets: Tensor) -> Tensor:
    """(head): attention (row, head, query, key) on targets (row, query, key), mean over queries that have a target."""
    asked = targets.any(-1)
    return einsum(pattern, targets.to(pattern.dtype), "row head query key, row query key -> head") / asked.sum()


def attention_scores(model: nn.Module, rows: Tensor, looks: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """
    {role: (look, layer, head)}: attention paid to each of a role's looks, which are targets (row, query, key).
    One layer's patterns are in memory at a time.
    """
    by_layer: dict[str, list[Tensor]] = {role: [] for role in looks}

    def score(pattern: Tensor, hook: nn.Module) -> None:
        for role, masks in looks.items():
            by_look = t.stack([attention_on(pattern.float(), mask) for mask in masks])
            by_layer[role].append(by_look.cpu())

    with hooks(model, [(act_name("pattern", layer), score) for layer in range(model.cfg.n_layers)]):
        model(rows)
    return {role: t.stack(scores, 1) for role, scores in by_layer.items()}


def without_repeats(tokens: Tensor, generator: t.Generator) -> Tensor:
    """The rows (row, pos), in which what is said again later is replaced by another of their tokens at random."""
    said_again = (same_token(tokens) & (places_back(tokens) < 0)).any(-1)
    said_again[:, 0] = False
    drawn = t.randint(tokens.numel(), tokens.shape, generator=generator).to(tokens.device)
    return t.where(said_again, tokens.flatten()[drawn], tokens)


def control_scores(model: nn.Module, tokens: Tensor, generator: t.Generator) -> dict[str, Tensor]:
    """
    {role by content: (layer, head)}: each head's attention to the same places of rows in which nothing is repeated,
    mean of CONTROLS runs. A head that looks there by position alone has its whole score here.
    """
    targets = role_targets(tokens)
    looks = {role: [targets[role]] for role in BY_CONTENT}
    runs = [attention_scores(model, without_repeats(tokens, generator), looks) for _ in range(CONTROLS)]
    return {role: t.cat([run[role] for run in runs]).mean(0) for role in BY_CONTENT}


#%% ... two permutation nulls from the patterns of one run, so that a thousand shuffles cost little
def other_rows_null(pattern: Tensor, targets: Tensor, orders: Tensor) -> Tensor:
    """
    (shuffle, head): attention_on where each row's targets are those of another row.
    pattern (row, head, query, key); targets (row, query, key); orders (shuffle, row), each a permutation of the rows.
    """
    paid = einsum(pattern, targets.to(pattern.dtype), "row head query key, other query key -> head row other")
    rows = t.arange(len(pattern), device=pattern.device)
    permuted = paid[:, rows, orders].sum(-1)  # (head, shuffle)
    return permuted.T / targets.any(-1).sum()


def overlap(targets: Tensor) -> float:
    """Share of a row's targets (row, query, key) that another row has too, mean over pairs of rows."""
    by_place = targets.sum(0).float()
    shared = (by_place * (by_place - 1)).sum() / max(1, len(targets) - 1)
    return (shared / targets.sum()).item()


def random_keys_null(pattern: Tensor, targets: Tensor, draws: Tensor) -> Tensor:
    """
    (shuffle, head): attention_on where each query that has a target has one of its visible keys at random instead.
    pattern (row, head, query, key); draws (shuffle, row, query) in 0..1.
    """
    asked = targets.any(-1).to(pattern.dtype)
    visible = t.arange(1, pattern.shape[-1] + 1, device=pattern.device)
    keys = (draws * visible).long().permute(1, 2, 0)  # (row, query, shuffle)
    by_head = []
    for head in range(pattern.shape[1]):
        paid = pattern[:, head].gather(-1, keys)
        by_head.append(einsum(paid, asked, "row query shuffle, row query -> shuffle") / asked.sum())
    return t.stack(by_head, 1)


def attention_nulls(
    model: nn.Module, tokens: Tensor, targets: dict[str, Tensor], shuffles: int, generator: t.Generator
) -> dict[str, Tensor]:
    """{role by attention: (shuffle, layer, head)}: the scores with the role's structure shuffled away."""
    n_rows, length = tokens.shape
    orders = t.rand((shuffles, n_rows), generator=generator).argsort(1).to(tokens.device)
    draws = t.rand((shuffles, n_rows, length), generator=generator).to(tokens.device)
    by_layer: dict[str, list[Tensor]] = {role: [] for role in targets}

    def shuffle(pattern: Tensor, hook: nn.Module) -> None:
        for role in BY_CONTENT:
            by_layer[role].append(other_rows_null(pattern.float(), targets[role], orders).cpu())
        for role in BY_POSITION:
            by_layer[role].append(random_keys_null(pattern.float(), targets[role], draws).cpu())

    with hooks(model, [(act_name("pattern", layer), shuffle) for layer in range(model.cfg.n_layers)]):
        model(tokens)
    return {role: t.stack(nulls, 1) for role, nulls in by_layer.items()}


#%% ... whether a head copies: how much it raises the token that it is fed
def copying_ranks(model: nn.Module, tokens: Tensor, places: Tensor, ids: Tensor) -> list[Tensor]:
    """
    How much a head raises each token when it is fed what stands at a place: per layer (place, head, token of ids), the
    token's rank among ids in 0..1, by the logit that the head's value-output map writes.
    places: indices into tokens.flatten(). The direct path from the values of a real run, through folded_W_U's weights.
    """
    layers = range(model.cfg.n_layers)
    _, cache = run_with_cache(model, tokens, [act_name("v", layer) for layer in layers])
    unembedding = folded_W_U(model, ids)
    ranks = []
    for layer in layers:
        values = per_head(cache["v", layer], model.cfg.n_heads).flatten(0, 1)
        raised = einsum(
            values[places].float(),
            model.blocks[layer].attn.W_O.float(),
            unembedding,
            "place head d_head, head d_head d_model, d_model token -> place head token",
        )
        ranks.append(raised.argsort(-1).argsort(-1) / max(1, len(ids) - 1))
    return ranks


def copying_scores(ranks: list[Tensor], namings: list[Tensor]) -> Tensor:
    """
    (naming, layer, head): mean rank of the token that each place is said to hold.
    A naming (place) says which: indices into copying_ranks's ids. ranks as copying_ranks gives them.
    """
    by_layer = []
    for rank in ranks:
        n_heads = rank.shape[1]
        by_naming = []
        for naming in namings:
            own = naming[:, None, None].expand(-1, n_heads, 1)
            by_naming.append(rank.gather(-1, own).mean((0, 2)))
        by_layer.append(t.stack(by_naming).cpu())
    return t.stack(by_layer, 1)


@t.no_grad()
def catalogue(
    model: nn.Module, tokens: Tensor, shuffles: int = 1000, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, list[str]]]:
    """
    Which head plays which role: (scores {role: (layer, head)}, bars {role: float}, names {head: its roles}).
    tokens (batch, pos): rows that repeat tokens, each at its own distance (spaced_repeats). Ours or a TransformerBridge.
    Scores of the roles by attention: attention to where the role looks (role_targets). 'copying' is by OV score: of the
    other tokens in the rows, the share whose logit the head's value-output map, fed a token, raises less than that
    token's own; 0.5 is chance (copying_ranks).
    A bar is the larger of the role's floor and the 99th percentile, over shuffles, of the maximum over all heads
    (which_bar says which). Shuffled are each query's keys (previous token, sink), which row looks where (duplicate,
    induction) or the tokens' names (copying). Of duplicate and induction, what must lie above the bar is the score less
    the same head's where nothing is repeated (control_scores).
    """
    generator = t.Generator().manual_seed(seed)
    targets = role_targets(tokens)
    if not targets["induction"].any():
        fail("the head catalogue needs rows that repeat tokens: spaced_repeats")
    places = t.randperm(tokens.numel(), generator=generator)[:COPIED].to(tokens.device)

    found = attention_scores(model, tokens, {role: [mask] for role, mask in targets.items()})
    scores = {role: looked[0] for role, looked in found.items()}
    nulls = attention_nulls(model, tokens, targets, shuffles, generator)
    for role in BY_CONTENT:
        if overlap(targets[role]) > 0.5:  # one distance in all rows: shuffling them says nothing, the control does
            nulls[role] = nulls[role][:0]
    control = control_scores(model, tokens, generator)

    # copying: the tokens' own names, then shuffled names
    ids, own = tokens.flatten()[places].unique(return_inverse=True)
    namings = [own]
    for _ in range(shuffles):
        order = t.randperm(len(own), generator=generator).to(own.device)
        namings.append(own[order])
    by_naming = copying_scores(copying_ranks(model, tokens, places, ids), namings)
    scores["copying"] = by_naming[0]
    nulls["copying"] = by_naming[1:]

    bars = {role: role_bar(role, null) for role, null in nulls.items()}
    above_control = {role: score - control.get(role, 0.0) for role, score in scores.items()}
    return scores, bars, roles_above(above_control, bars)


def role_bar(role: str, null: Tensor) -> float:
    """
    The larger of the role's floor and the 99th percentile, over shuffles, of the best of all heads.
    null (shuffle, layer, head): the scores with the role's structure shuffled away.
    """
    if len(null) == 0:
        return FLOORS[role]
    best_of_heads = null.flatten(1).amax(1)
    return max(FLOORS[role], best_of_heads.quantile(0.99).item())


def which_bar(role: str, bar: float) -> str:
    """Which of the two decided."""
    return "floor" if bar == FLOORS[role] else "null"


def heads_of_role(role: str, roles: dict[str, list[str]], scores: dict[str, Tensor]) -> list[str]:
    """The heads that are named for the role, strongest first; roles and scores as catalogue gives them."""
    strength = dict(zip(roles, scores[role].flatten().tolist()))
    return sorted((name for name in roles if role in roles[name]), key=lambda name: -strength[name])


def roles_above(scores: dict[str, Tensor], bars: dict[str, float]) -> dict[str, list[str]]:
    """{head: the roles whose score lies above the bar}."""
    n_layers, n_heads = next(iter(scores.values())).shape
    roles = {}
    for layer in range(n_layers):
        for head in range(n_heads):
            roles[f"L{layer}H{head}"] = [role for role in scores if scores[role][layer, head] > bars[role]]
    return roles


#%% What a head does in texts, and what its value-output map carries most of
@t.no_grad()
def head_looks(model: nn.Module, rows: Tensor, layer: int, n: int = 3) -> list[list[tuple[float, int, int, Tensor]]]:
    """
    Per head of a layer the n rows (row, pos) where it brings most from one earlier place, neither the first token's nor
    the query's own, by norm (Kobayashi et al. 2020): [(||attention x value x W_O||, row, query, attention (query's keys))].
    """
    names = [act_name(site, layer) for site in ("v", "pattern")]
    _, cache = run_with_cache(model, rows, names, stop_at_layer=layer + 1)
    values = per_head(cache["v", layer], model.cfg.n_heads).float()
    W_O = model.blocks[layer].attn.W_O.float()
    of_heads = []  # one at a time: all at once would be (row, head, key, d_model)
    for head in range(model.cfg.n_heads):
        written = einsum(values[:, :, head], W_O[head], "row key d_head, d_head d_model -> row key d_model")
        of_heads.append(written.norm(dim=-1))
    size = t.stack(of_heads, 1)  # (row, head, key)
    pattern = cache["pattern", layer].float()
    brought = pattern * size[:, :, None]
    brought[..., 0] = 0
    brought.diagonal(dim1=-2, dim2=-1).zero_()
    n_keys = brought.shape[-1]
    found = []
    for head in range(model.cfg.n_heads):
        looks = []
        for x, row, place in peaks_by_row(brought[:, head].flatten(1), n):
            query = place // n_keys
            looks.append((x, row, query, pattern[row, head, query, : query + 1].cpu()))
        found.append(looks)
    return found


@t.no_grad()
def head_map(model: nn.Module, layer: int, head: int) -> tuple[Tensor, Tensor, float]:
    """
    (read (d_model), write (d_model), share): the first pair of singular directions of W_V W_O (Millidge & Black 2022)
    and their share of its squared norm. What lies along read is written along write. The weights of the norm before are
    folded in, of one after too; scales are left out.
    """
    attn = model.blocks[layer].attn
    norms = block_norms(model, layer)
    W_V = attn.W_V[head // (model.cfg.n_heads // len(attn.W_V))].float()  # d_model d_head
    W_O = attn.W_O[head].float()  # d_head d_model
    if norms.before_attn is not None:
        shape = ask_norm(norms.before_attn, len(W_V), attn.W_V)
        W_V = shape.weight[:, None] * W_V
        W_V = W_V - W_V.mean(0) if shape.centres else W_V
    W_O = W_O * write_weight(norms.after_attn, attn.W_O)
    q_read, r_read = t.linalg.qr(W_V)  # of d_head columns, so that no (d_model, d_model) is taken apart
    q_write, r_write = t.linalg.qr(W_O.T)
    u, s, vh = t.linalg.svd(r_read @ r_write.T)
    share = (s[0] ** 2 / s.pow(2).sum()).item()
    return q_read @ u[:, 0], q_write @ vh[0], share
