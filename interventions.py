"""What changes a hooked model: prompt pairs and their metrics, activation patching, ablations, attention knock-out."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from utils import BRIEF, endc, fail, seed_of, yellow  # first: sets OpenMP's variables before torch is loaded
from hooks import (
    act_name,
    blocks_of,
    cache_from_resid,
    block_norms,
    device_of,
    has_heads,
    hook_points,
    in_batches,
    rows_may_join,
    rows_that_fit,
    run_from,
    run_with_cache,
    run_with_hooks,
)
from layers import next_token_loss
from anatomy import layer_streams, logit_parts, parts_error
from weights import encode, token_text
from world import DRAW, ENTITIES, Prompt, fact_prompts, read_countries

import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from torch import Tensor
from tqdm import tqdm


#%% Prompt pairs: clean and corrupt of one length, an answer and a wrong answer of one token, and named positions
@dataclass
class Pairs:
    """
    clean, corrupt (pair, pos): token ids, padded on the right. answer, wrong (pair): token ids, due after position
    answer_pos (pair). places: named masks (pair, pos).
    """

    clean: Tensor
    corrupt: Tensor
    answer: Tensor
    wrong: Tensor
    answer_pos: Tensor
    places: dict[str, Tensor] = field(default_factory=dict)
    corrupt_resid: Tensor | None = None  # (pair, pos, d_model) enters layer 0 in place of corrupt's embeddings

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def index(self) -> Tensor:
        return t.arange(len(self), device=self.answer_pos.device)

    def take(self, index: Tensor | slice) -> "Pairs":
        """Some of the pairs, cut after the last answer."""
        answer_pos = self.answer_pos[index]
        length = int(answer_pos.max()) + 1
        return Pairs(
            clean=self.clean[index, :length],
            corrupt=self.corrupt[index, :length],
            answer=self.answer[index],
            wrong=self.wrong[index],
            answer_pos=answer_pos,
            places={name: mask[index, :length] for name, mask in self.places.items()},
            corrupt_resid=None if self.corrupt_resid is None else self.corrupt_resid[index, :length],
        )


def pair_error(model: nn.Module, clean: str, corrupt: str, *answers: str) -> str | None:
    """What keeps the texts from being a pair, in one line."""
    if not clean.strip() or not corrupt.strip():
        return "a prompt is empty: clean and corrupt need a few words each"
    clean_ids = encode(model, clean)
    corrupt_ids = encode(model, corrupt)
    if len(clean_ids) != len(corrupt_ids):
        clean_tokens = [token_text(model, i) for i in clean_ids]
        corrupt_tokens = [token_text(model, i) for i in corrupt_ids]
        return (
            f"clean has {len(clean_ids)} tokens, corrupt {len(corrupt_ids)}: {clean_tokens} against {corrupt_tokens}; "
            "reword one of them"
        )
    for answer in answers:
        with_answer = encode(model, clean + answer)
        if with_answer[: len(clean_ids)] == clean_ids and len(with_answer) > len(clean_ids) + 1:
            pieces = [token_text(model, i) for i in with_answer[len(clean_ids) :]]
            return (
                f"the answer {answer!r} is not one token but {len(pieces)} ({' + '.join(map(repr, pieces))}): give the "
                f"first, {pieces[0]!r}"
            )
        if with_answer[:-1] != clean_ids:
            end = [token_text(model, i) for i in with_answer[-3:]]
            return (
                f"the answer {answer!r} is not one token after {clean!r}: the text with it ends in {end}; a word "
                f"begins with a space, {' ' + answer.strip()!r}"
            )
    return None


def make_pairs(model: nn.Module, rows: list[tuple[str, str, str, str]]) -> Pairs:
    """rows of (clean, corrupt, answer, wrong), sorted by length."""
    encoded = []
    for i, row in enumerate(rows):
        error = pair_error(model, *row)
        if error:
            fail(f"pair {i + 1}: {error}")
        clean, corrupt, answer, wrong = row
        texts = (clean, corrupt, clean + answer, clean + wrong)
        encoded.append([encode(model, text) for text in texts])
    encoded.sort(key=lambda ids: len(ids[0]))
    device = device_of(model)
    clean = padded([ids[0] for ids in encoded], device)
    corrupt = padded([ids[1] for ids in encoded], device)
    if clean.equal(corrupt):
        fail("clean and corrupt are the same: there is nothing to patch")
    pairs = Pairs(
        clean=clean,
        corrupt=corrupt,
        answer=t.tensor([ids[2][-1] for ids in encoded], device=device),
        wrong=t.tensor([ids[3][-1] for ids in encoded], device=device),
        answer_pos=t.tensor([len(ids[0]) - 1 for ids in encoded], device=device),
    )
    return replace(pairs, places=find_places(pairs))


def padded(rows: list[list[int]], device: t.device) -> Tensor:
    """(row, pos), filled up on the right by each row's first token."""
    longest = max(len(row) for row in rows)
    return t.tensor([row + row[:1] * (longest - len(row)) for row in rows], device=device)


def find_places(pairs: Pairs) -> dict[str, Tensor]:
    """
    Masks that share out the positions up to the answer: IO, S1, S1+1, S2 where the wrong name stands twice and
    corrupt has the answer's there; else by what changed. Sorted by where they stand on average; places without a
    position are left out.
    """
    position = t.arange(pairs.clean.shape[1], device=pairs.answer_pos.device)
    changed = pairs.clean != pairs.corrupt
    first_change = changed.float().argmax(1, keepdim=True)
    answer_pos = pairs.answer_pos[:, None]

    answer_here = pairs.clean == pairs.answer[:, None]
    wrong_here = pairs.clean == pairs.wrong[:, None]
    io = answer_here.float().argmax(1, keepdim=True) == position
    s1 = wrong_here.float().argmax(1, keepdim=True) == position
    s2 = changed & wrong_here & (pairs.corrupt == pairs.answer[:, None]) & ~s1
    io_comes_first = (io & (position < first_change)).any(1).all()
    if s2.any(1).all() and io_comes_first:
        named = {
            "IO": io,
            "S1": s1,
            "S1+1": F.pad(s1[:, :-1], (1, 0)),
            "S2": s2,
            "end": position == answer_pos,
            "before S2": position < first_change,
            "after S2": (position > first_change) & (position < answer_pos),
        }
    else:
        named = {
            "changed": changed & (position != answer_pos),
            "end": position == answer_pos,
            "before": position < first_change,
            "between": (position > first_change) & (position < answer_pos),
        }

    places = {}
    taken = t.zeros_like(changed)
    for name, mask in named.items():  # a position belongs to the first place that claims it
        places[name] = mask & ~taken
        taken = taken | mask
    occupied = {name: mask for name, mask in places.items() if mask.any()}

    def mean_position(name: str) -> float:
        return ((occupied[name] * position).sum() / occupied[name].sum()).item()

    return {name: occupied[name] for name in sorted(occupied, key=mean_position)}


def position_masks(pairs: Pairs, positions: Iterable[int] = ()) -> dict[str, Tensor]:
    """One place for each of these positions, or for every one."""
    length = pairs.clean.shape[1]
    outside = [p for p in positions if not 0 <= p < length]
    if outside:
        fail(f"position {outside[0]} is outside the sequence, whose positions are 0 to {length - 1}")
    every = t.arange(length, device=pairs.answer_pos.device)
    return {str(p): (every == p).expand(len(pairs), length) for p in positions or range(length)}


#%% Where pairs come from: drawn from a task, read from a file, or typed in
def draw_pairs(model: nn.Module, task: str, n: int, seed: int, role: Literal["any", "find", "test"] = "any") -> Pairs:
    """
    n pairs of a task whose texts and answers fit the model's tokenizer; names, nouns and years in combinations held
    out of models/world's training. Pairs to find something on and pairs to test it on share no entity (name, noun,
    country), in any run of one seed.
    """
    rng = Random(seed_of(seed, role))
    facts = []
    if task == "capitals":
        facts = [fact for fact in fact_prompts(read_countries(), "forward") if fact.taught]
    entities = sorted({fact.about[0] for fact in facts}) or ENTITIES[task]
    allowed = entities_for(role, entities, seed)
    rows = []
    for _ in range(100 * n):
        if len(rows) == n:
            break
        prompt = draw_two_facts(rng, facts) if facts else DRAW[task](rng, True)
        row = (prompt.text, prompt.corrupt, prompt.answer, prompt.wrong)
        all_differ = len(set(row)) == 4
        if all_differ and allowed.issuperset(prompt.about) and not pair_error(model, *row):
            rows.append(row)
    if len(rows) < max(1, n):
        fail(
            f"only {len(rows)} of {n} {task} pairs fit this tokenizer (answers of one token, both texts of one "
            "length): give your own with --pairs"
        )
    return make_pairs(model, rows)


def entities_for(role: str, entities: list[str], seed: int) -> set[str]:
    """A half of the entities to find on, the other half to test on, drawn by the seed; for any other use all."""
    shuffled = Random(seed_of(seed, "entities")).sample(entities, len(entities))
    middle = len(shuffled) // 2
    if role == "find":
        return set(shuffled[:middle])
    if role == "test":
        return set(shuffled[middle:])
    return set(shuffled)


def draw_two_facts(rng: Random, facts: list[Prompt]) -> Prompt:
    """A fact whose corrupt text and wrong answer are of the same phrasing about another country; about both."""
    fact = rng.choice(facts)
    other = rng.choice([f for f in facts if f.labels["phrasing"] == fact.labels["phrasing"]])
    return replace(fact, corrupt=other.text, wrong=other.answer, about=fact.about + other.about)


COLUMNS = {  # what a column of pairs is also called, in lower case: EAP-IG's files, common files of indirect objects
    "clean": ("clean", "clean_prompt", "clean_input", "prompt", "ioi_sentences", "ioi_sentences_input"),
    "corrupt": ("corrupt", "corrupted", "corrupt_prompt", "corrupted_prompt", "corrupted_input", "corr_ioi_sentences"),
    "answer": ("answer", "correct", "correct_answer", "correct_idx", "io", "clean_answer"),
    "wrong": ("wrong", "incorrect", "incorrect_answer", "wrong_answer", "incorrect_idx", "s", "corrupted_answer"),
}


def read_pairs(path: str, model: nn.Module | None = None) -> list[tuple[str, str, str, str]]:
    """
    Rows of a CSV file with the columns clean, corrupt, answer, wrong (or what COLUMNS also calls them), or of a JSON
    list of such objects. Of correct_idx and incorrect_idx, which are token ids, the model says the text.
    """
    rows = read_table(Path(path))
    if not rows:
        fail(f"--pairs {path} holds no pair")
    by_name = {str(name).strip().lower(): name for name in rows[0]}
    chosen_columns = {}
    for name, aliases in COLUMNS.items():
        found = [by_name[alias] for alias in aliases if alias in by_name]
        if not found:
            fail(
                f"--pairs {path} has no column {name} (or {', '.join(aliases[1:])}) among {', '.join(map(str, rows[0]))}"
            )
        chosen_columns[name] = found[0]
    read = []
    for i, row in enumerate(rows):
        values = [row.get(column) for column in chosen_columns.values()]
        for name, value in zip(chosen_columns, values):
            if value is None or value == "":
                fail(f"--pairs {path}: row {i + 1} lacks {name}")
        texts = zip(chosen_columns.values(), values)
        read.append(tuple(text_of_cell(path, column, value, model) for column, value in texts))
    return read


def text_of_cell(path: str, column: str, value: Any, model: nn.Module | None) -> str:
    """A cell as text; in a column of token ids (..._idx) the token's, of a list of them (EAP-IG) the first one's."""
    if not str(column).strip().lower().endswith("_idx"):
        return str(value)
    assert model is not None, "token ids need a model that says what they read"
    first = str(value).strip("[] ").split(",")[0]
    if not first.isdigit() or int(first) >= model.cfg.d_vocab:
        fail(f"--pairs {path}: {value!r} in the column {column} is no token id of this model")
    return token_text(model, int(first))


def read_table(path: Path, flag: str = "--pairs") -> list[dict[str, Any]]:
    """The rows of a JSON list of objects, or of a CSV file, whose separator is a comma, a semicolon or a tab."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # with or without the byte-order mark that Excel writes
    except OSError as error:
        fail(f"{flag} {path} cannot be read: {error}")
    except UnicodeDecodeError:
        fail(f"{flag} {path} is not UTF-8 text: save it as UTF-8, for instance by iconv -f latin1 -t utf-8")
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            fail(f"{flag} {path} cannot be read: {error}")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            fail(f"{flag} {path} is no list of objects, one a row, with the columns as their keys")
        return rows
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))


def read_task(model: nn.Module, cfg: Any) -> tuple[str, Pairs, Pairs]:
    """
    (task, pairs, test_pairs) that a script's settings ask for: a prompt of one's own (cfg.clean, corrupt, answer,
    wrong), a file (cfg.pairs), whose rows go to pairs and test_pairs in turn until these are full, or pairs drawn
    from cfg.task (cfg.n and, about other entities, cfg.held_out of them).
    """
    own = (cfg.clean, cfg.corrupt, cfg.answer, cfg.wrong)
    if any(own) and not all(own):
        fail("a prompt of your own needs all of --clean, --corrupt, --answer and --wrong")
    if not cfg.pairs and not any(own):
        pairs = draw_pairs(model, cfg.task, cfg.n, cfg.seed, role="find")
        test_pairs = draw_pairs(model, cfg.task, cfg.held_out, cfg.seed, role="test")
        return cfg.task, pairs, test_pairs
    rows = read_pairs(cfg.pairs, model) if cfg.pairs else [own]
    if len(rows) > cfg.n + cfg.held_out:
        print(
            f"{yellow}of {len(rows)} pairs in {cfg.pairs} the first {cfg.n + cfg.held_out} are read (--n {cfg.n}, "
            f"--held-out {cfg.held_out}){endc}"
        )
    if len(rows) == 1:
        print(f"{yellow}one pair: what is found is tested on the same pair{endc}")
    looked_at, tested = share_out(rows, cfg.n, cfg.held_out)
    pairs = make_pairs(model, looked_at)
    test_pairs = make_pairs(model, tested or rows)
    return "own pairs", pairs, test_pairs


def share_out[Row](rows: list[Row], n: int, held_out: int) -> tuple[list[Row], list[Row]]:
    """Rows to the one and to the other in turn; when one has enough, all to the other; the rest to none."""
    first, second = [], []
    for row in rows:
        takes_first = len(first) < n and (len(first) <= len(second) or len(second) >= held_out)
        if takes_first:
            first.append(row)
        elif len(second) < held_out:
            second.append(row)
    return first, second


#%% Who writes the answer: direct logit attribution, over pairs
def direct_attribution(model: nn.Module, pairs: Pairs) -> dict[str, Tensor]:
    """
    The parts of logit(answer) - logit(wrong) in the clean runs (Elhage et al. 2021), which sum to 'logit' (pair):
    'embed' (pair), 'heads' (pair, layer, head), 'attn_bias', 'mlp' (pair, layer), 'constant' (pair); 'neurons' (pair,
    layer, d_mlp) are the MLPs' where they have some. 'error' (pair): by how much the parts miss, relative to max(1,
    |logit|). Each pair is one run of anatomy.logit_parts.
    """
    of_pairs = []
    for i in range(len(pairs)):
        tokens = pairs.clean[i : i + 1, : int(pairs.answer_pos[i]) + 1]
        parts = logit_parts(model, tokens, int(pairs.answer[i]), versus=int(pairs.wrong[i]))
        found = {name: part.cpu() for name, part in parts.items()}
        found["error"] = t.tensor(parts_error(parts))
        found["heads"] = found["heads"].sum(-1)  # over the positions they read from
        found["embed"] = found["embed"] + found.pop("pos_embed")
        of_pairs.append(found)
    return {name: t.stack([parts[name] for parts in of_pairs]) for name in of_pairs[0]}


def mean_with_interval(of_pairs: Tensor, draws: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, 2.5th, 97.5th percentile) over pairs (pair, ...), resampled with replacement, each (...)."""
    n = len(of_pairs)
    generator = t.Generator().manual_seed(0)
    weights = t.stack([t.bincount(t.randint(n, (n,), generator=generator), minlength=n) for _ in range(draws)])
    resampled = einsum(weights / n, of_pairs.float(), "draw pair, pair ... -> draw ...")
    low, high = resampled.quantile(t.tensor([0.025, 0.975]), dim=0)
    return of_pairs.float().mean(0), low, high


#%% Pairs as a model's input, and in groups that fit into memory
def inputs(model: nn.Module, pairs: Pairs, which: str) -> Tensor:
    """What enters layer 0 (pair, pos, d_model) in the clean or the corrupt run."""
    if which == "corrupt" and pairs.corrupt_resid is not None:
        return pairs.corrupt_resid
    return model(getattr(pairs, which), stop_at_layer=0)


def by_groups[Out](fn: Callable[[Pairs], Out], pairs: Pairs, most: int) -> list[Out]:
    """fn of the pairs in groups of at most `most`, of fewer where memory does not suffice."""

    def of_group(index: Tensor) -> Out:
        return fn(pairs.take(index))

    return list(in_batches(of_group, pairs.index, most))


#%% Metrics: one number per row, from its logits where the answer is due
UNITS = {"logit_diff": "logits", "log_prob": "nats", "kl": "nats"}


def make_metric(pairs: Pairs, metric: str, clean_logits: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """
    fn(logits (row, d_vocab), pair (row)) -> (row): the metric of rows that are runs of these pairs. metric:
    logit_diff (answer - wrong), log_prob of the answer in nats, or kl, the divergence from clean_logits (pair,
    d_vocab) in nats. A difference of two log-probabilities is logit_diff: the normaliser cancels. A new metric is a
    function here, its line below, its unit in UNITS, and its name in the stories' --metric.
    """

    def logit_diff(logits: Tensor, pair: Tensor) -> Tensor:
        logits = logits.float()
        return chosen(logits, pairs.answer[pair]) - chosen(logits, pairs.wrong[pair])

    def log_prob(logits: Tensor, pair: Tensor) -> Tensor:
        return chosen(logits.float().log_softmax(-1), pairs.answer[pair])

    def kl(logits: Tensor, pair: Tensor) -> Tensor:
        log_q = logits.float().log_softmax(-1)
        log_p = clean_logits.float().log_softmax(-1)[pair]
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)

    if metric == "logit_diff":
        return logit_diff
    if metric == "log_prob":
        return log_prob
    if metric == "kl":
        return kl
    raise ValueError(f"unknown metric {metric!r}")


def chosen(values: Tensor, ids: Tensor) -> Tensor:
    """(row) values[i, ids[i]]"""
    return values.gather(-1, ids[:, None])[:, 0]


def normalised(values: Tensor, clean: Tensor, corrupt: Tensor) -> Tensor:
    """Means over the last axis (pair), on the CPU, as a share of the way from corrupt (0) to clean (1)."""
    gap = require_gap(clean, corrupt)
    return ((values.mean(-1) - corrupt.mean()) / gap).cpu()


def require_gap(clean: Tensor, corrupt: Tensor) -> float:
    """The mean metric of clean runs less that of corrupt runs, by which all is normalised; none ends the program."""
    gap = (clean.mean() - corrupt.mean()).item()
    if not abs(gap) >= 1e-6:
        fail(
            "clean and corrupt give the same metric, so there is nothing to normalise by: choose pairs whose answers "
            "differ"
        )
    return gap


@t.no_grad()
def baselines(model: nn.Module, pairs: Pairs, metric: str, memory_gb: float = 1.0) -> tuple[Tensor, Tensor]:
    """Metric (pair) of the clean and of the corrupt run."""

    def both_runs(group: Pairs) -> Tensor:
        clean_logits = run_from(model, inputs(model, group, "clean"), group.answer_pos)
        corrupt_logits = run_from(model, inputs(model, group, "corrupt"), group.answer_pos)
        metric_fn = make_metric(group, metric, clean_logits)
        return t.stack([metric_fn(clean_logits, group.index), metric_fn(corrupt_logits, group.index)])

    groups = by_groups(both_runs, pairs, rows_that_fit(model, pairs.clean.shape[1], memory_gb))
    clean, corrupt = t.cat(groups, -1)
    return clean, corrupt


#%% Activation patching, the plain form: one run of the model for each activation
STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEADS = ("z", "q", "k", "v", "pattern")


@t.no_grad()
def activation_patch(
    model: nn.Module,
    pairs: Pairs,
    site: str,
    layer: int,
    position: int | slice = slice(None),
    head: int | slice = slice(None),
    metric: str = "logit_diff",
    direction: Literal["denoise", "noise"] = "denoise",
) -> Tensor:
    """
    Metric (pair) after `site` of one layer, at one position and of one head (default: all of them), was taken from
    the other run: from the clean run into the corrupt one (denoise), or from the corrupt run into the clean one
    (noise) (Vig et al. 2020, Meng et al. 2022, Heimersheim & Nanda 2024).
    """
    assert pairs.corrupt_resid is None, "the plain form runs on tokens"
    hook_name = act_name(site, layer)
    clean_logits, clean_cache = run_with_cache(model, pairs.clean, hook_name)
    _, corrupt_cache = run_with_cache(model, pairs.corrupt, hook_name)
    if direction == "denoise":
        base_tokens = pairs.corrupt
        donor = clean_cache[hook_name]
    else:
        base_tokens = pairs.clean
        donor = corrupt_cache[hook_name]
    if site == "pattern":  # (pair, head, query, key)
        where = (slice(None), head, position)
    elif site in HEADS:  # (pair, pos, head, d_head)
        where = (slice(None), position, head)
    else:  # (pair, pos, d_model)
        where = (slice(None), position)

    def patch(activation: Tensor, hook: nn.Module) -> None:
        # in place, as a bridge's hook_resid_mid is the stream itself: see GrowingBatch.patch
        activation[where] = donor[where]

    logits = run_with_hooks(model, base_tokens, [(hook_name, patch)])
    metric_fn = make_metric(pairs, metric, clean_logits[pairs.index, pairs.answer_pos])
    return metric_fn(logits[pairs.index, pairs.answer_pos], pairs.index)


#%% Activation patching, the fast form: all layers, heads and places in one growing batch
@dataclass
class Cells:
    """
    The cells of a sweep, an entry each: one layer, head, place and pair. first: the position from which on its run
    can differ from the plain one. In this order layers come one after the other, so cells join a growing batch in
    their order.
    """

    layer: Tensor
    head: Tensor
    place: Tensor
    pair: Tensor
    first: Tensor

    def __len__(self) -> int:
        return len(self.layer)

    def take(self, index: Tensor) -> "Cells":
        return Cells(self.layer[index], self.head[index], self.place[index], self.pair[index], self.first[index])


class GrowingBatch:
    """
    One forward pass for many cells of a sweep. Its rows: the base run of every pair, which is to be patched; the
    donor run of every pair, which is patched from; then a row for each cell. Below the layer that it patches a cell's
    row is its pair's base run, so it joins there, as a copy of that row, and nothing below is computed again (where
    rows_may_join; else all join before the first layer). Layer by layer the model calls

        enter     the cells of this layer join
        patch     what they patch becomes the donor's
        cut       the MLP reads only positions that can differ from the base run ...
        restore   ... and everywhere else the base run's output is copied

    n_heads is 1 where all heads are patched together. masks: (place, pair, pos).
    """

    def __init__(self, model: nn.Module, pairs: Pairs, site: str, cells: Cells, masks: Tensor, n_heads: int):
        self.model = model
        self.site = site
        self.cells_of = {layer: cells.take(cells.layer == layer) for layer in cells.layer.unique().tolist()}
        self.rows_of: dict[int, slice] = {}  # by layer, where its cells stand in the batch
        self.join_late = rows_may_join(model)
        self.masks = masks
        self.n_heads = n_heads
        self.n_pairs = len(pairs)
        self.n_layers = model.cfg.n_layers
        self.answer_pos = pairs.answer_pos
        self.position = t.arange(pairs.clean.shape[1], device=pairs.answer_pos.device)
        # what changes during the pass
        self.layer = 0
        self.pair = t.cat([pairs.index, pairs.index])  # (row) the pair whose run it is
        self.can_differ = t.ones(2 * len(pairs), len(self.position), dtype=t.bool, device=self.position.device)
        self.read = ()  # (row), (position) that the MLP of this layer reads

    def run(self, resid: Tensor) -> Tensor:
        """
        Logits (row, d_vocab) where the answer is due, after base and donor runs enter with resid (2 * pair, pos,
        d_model).
        """
        if not self.join_late:
            for layer in self.cells_of:
                resid = self.join(layer, resid)
        inner = [(block, "in", partial(self.enter, layer)) for layer, block in enumerate(blocks_of(self.model))]
        if self.join_late and has_heads(self.model) and not self.patches_in_mlp():
            for layer in range(self.n_layers):
                mlp = self.model.blocks[layer].mlp
                inner.append((mlp, "in", partial(self.cut, layer)))
                inner.append((mlp, "out", partial(self.restore, layer)))
        patched_hooks = [act_name(self.site, layer) for layer in self.cells_of]
        fwd_hooks = [(patched_hooks, self.patch)] if patched_hooks else []
        return run_from(self.model, resid, self.row_answer_pos, layer=0, fwd_hooks=fwd_hooks, inner=inner)

    def patches_in_mlp(self) -> bool:
        """Then all positions must go through it. Where the MLP reads the bare stream, its input is hook_resid_mid."""
        bare = block_norms(self.model, 0).before_mlp is None
        return "mlp" in act_name(self.site, 0) or (bare and self.site == "resid_mid")

    def row_answer_pos(self) -> Tensor:
        return self.answer_pos[self.pair]

    def enter(self, layer: int, resid: Tensor) -> Tensor:
        """The stream (row, pos, d_model) before this layer, in which its cells now have their rows."""
        self.layer = layer
        if layer in self.cells_of and self.join_late:
            return self.join(layer, resid)
        return resid

    def join(self, layer: int, resid: Tensor) -> Tensor:
        """With a copy of the base run's row for each cell of this layer."""
        cells = self.cells_of[layer]
        behind_first = self.position >= cells.first[:, None]
        before_end = self.position <= self.answer_pos[cells.pair, None]
        self.rows_of[layer] = slice(len(resid), len(resid) + len(cells))
        self.pair = t.cat([self.pair, cells.pair])
        self.can_differ = t.cat([self.can_differ, behind_first & before_end])
        return t.cat([resid, resid[cells.pair]])

    def patch(self, activation: Tensor, hook: nn.Module) -> None:
        """
        In place, in the rows of this layer's cells: a bridge's hook_resid_mid hands out what the MLP reads, which is
        the stream itself.
        """
        cells = self.cells_of[self.layer]
        rows = self.rows_of[self.layer]
        donor = activation[self.n_pairs + cells.pair]
        activation[rows] = t.where(self.patched(cells, activation.ndim), donor, activation[rows])

    def patched(self, cells: Cells, ndim: int) -> Tensor:
        """True where these cells patch, in a shape that broadcasts over the site's activation."""
        positions = self.masks[cells.place, cells.pair]  # (cell, pos)
        heads = t.arange(self.n_heads, device=self.position.device) == cells.head[:, None]  # (cell, head or 1)
        if self.site == "pattern":
            return positions[:, None, :, None] & heads[:, :, None, None]  # (cell, head, query, 1)
        if ndim == 4:
            return positions[:, :, None, None] & heads[:, None, :, None]  # (cell, pos, head, 1)
        return positions[:, :, None]  # (cell, pos, 1)

    def cut(self, layer: int, resid: Tensor) -> Tensor:
        """
        What the MLP reads (1, chosen, d_model): positions that can differ, in the last layer only where the answer is
        due.
        """
        read = self.can_differ
        if layer == self.n_layers - 1:
            read = self.position == self.row_answer_pos()[:, None]
        self.read = read.nonzero(as_tuple=True)
        return resid[self.read][None]

    def restore(self, layer: int, out: Tensor) -> Tensor:
        """
        The MLP's output (row, pos, d_model), where it was not computed the base run's; in the last layer zeros, which
        nothing reads.
        """
        full = out.new_zeros(*self.can_differ.shape, out.shape[-1])
        full.index_put_(self.read, out[0])
        if layer < self.n_layers - 1:
            cells = slice(2 * self.n_pairs, None)
            base = full[self.pair[cells]]  # row i is the base run of pair i
            full[cells] = t.where(self.can_differ[cells, :, None], full[cells], base)
        return full


@t.no_grad()
def sweep(
    model: nn.Module,
    pairs: Pairs,
    site: str,
    by: Literal["pos", "head", "head pos"] = "pos",
    metric: str = "logit_diff",
    direction: Literal["denoise", "noise"] = "denoise",
    places: dict[str, Tensor] | None = None,
    memory_gb: float = 1.0,
    skip: bool = True,
) -> Tensor:
    """
    activation_patch of `site` in every layer, each alone: metric (layer, place, pair), (layer, head, pair) or (layer,
    head, place, pair). places: named masks (pair, pos) whose positions are patched together, default each position
    alone; of a pattern the query is placed. k and v have as many heads as keys. Activations stay within memory_gb,
    however many the pairs. skip: cells before a pair's first difference are not run, as nothing differs there.
    """
    if by == "head":
        places = {"all": t.ones_like(pairs.clean, dtype=t.bool)}
    places = places or position_masks(pairs)
    for name, mask in places.items():
        if mask.shape != pairs.clean.shape:
            fail(f"place {name!r} is not a mask of {tuple(pairs.clean.shape)} (pair, pos)")
    of_group = partial(
        sweep_group,
        model,
        site=site,
        n_heads=1 if by == "pos" else heads_at(model, site),
        metric=metric,
        direction=direction,
        memory_gb=memory_gb,
        skip=skip,
    )
    most_pairs = max(1, rows_that_fit(model, pairs.clean.shape[1], memory_gb) // 16)
    table = t.cat(by_groups(of_group, replace(pairs, places=places), most_pairs), -1)
    if by == "pos":
        return table[:, 0]
    if by == "head":
        return table[:, :, 0]
    return table


def sweep_group(
    model: nn.Module,
    group: Pairs,
    site: str,
    n_heads: int,
    metric: str,
    direction: str,
    memory_gb: float,
    skip: bool,
) -> Tensor:
    """
    sweep of a few pairs over their places: metric (layer, head, place, pair). n_heads is 1 where heads go together.
    """
    base, donor = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    resid = t.cat([inputs(model, group, base), inputs(model, group, donor)])
    masks = t.stack(list(group.places.values()))  # (place, pair, pos)
    touched = masks & can_matter(group, resid) if skip else masks
    shape = (model.cfg.n_layers, n_heads, len(masks), len(group))
    cells, touches_any = plan_cells(group, shape, touched)
    needed = touches_any.nonzero()[:, 0] if skip else t.arange(len(cells), device=masks.device)

    def run(chosen_cells: Tensor) -> tuple[Tensor, Tensor]:
        """Metric of the base runs (pair), and of these cells."""
        some = cells.take(chosen_cells)
        logits = GrowingBatch(model, group, site, some, masks, n_heads).run(resid)
        base_logits, donor_logits, cell_logits = logits.split([len(group), len(group), len(some)])
        metric_fn = make_metric(group, metric, donor_logits if direction == "denoise" else base_logits)
        return metric_fn(base_logits, group.index), metric_fn(cell_logits, some.pair)

    if len(needed):
        n_rows = rows_that_fit(model, group.clean.shape[1], memory_gb)
        done = list(in_batches(run, needed, max(1, n_rows - 2 * len(group)), f"patching {site}"))
    else:
        done = [run(needed)]
    unpatched = done[0][0]
    patched = t.cat([values for _, values in done])
    return unpatched[cells.pair].index_put((needed,), patched).view(shape)


def heads_at(model: nn.Module, site: str) -> int:
    """Keys and values may have fewer heads than queries."""
    return model.blocks[0].attn.W_K.shape[0] if site in ("k", "v") else model.cfg.n_heads


def head_names(model: nn.Module, site: str) -> list[str]:
    """H0, H1 ...; the keys and values that several heads share are named by these: H0-1, H2-3."""
    n = heads_at(model, site)
    sharing = model.cfg.n_heads // n
    if sharing == 1:
        return [f"H{head}" for head in range(n)]
    return [f"H{first}-{first + sharing - 1}" for first in range(0, n * sharing, sharing)]


def can_matter(pairs: Pairs, resid: Tensor) -> Tensor:
    """
    Mask (pair, pos): from the first position at which the two runs enter differently, up to the answer. resid: (2 *
    pair, pos, d_model).
    """
    first_run, second_run = resid.split(len(pairs))
    differs = (first_run != second_run).any(-1)
    position = t.arange(pairs.clean.shape[1], device=pairs.answer_pos.device)
    return (differs.cumsum(1) > 0) & (position <= pairs.answer_pos[:, None])


def plan_cells(pairs: Pairs, shape: tuple[int, int, int, int], touched: Tensor) -> tuple[Cells, Tensor]:
    """
    All cells of a sweep of this shape (layer, head, place, pair), and a mask (cell) of those that touch anything.
    touched: (place, pair, pos).
    """
    axes = [t.arange(n, device=pairs.answer_pos.device) for n in shape]
    layer, head, place, pair = (axis.flatten() for axis in t.meshgrid(*axes, indexing="ij"))
    first = touched.float().argmax(-1)[place, pair]
    return Cells(layer, head, place, pair, first), touched.any(-1)[place, pair]


@t.no_grad()
def sweep_gates(model: nn.Module, pairs: Pairs, metric: str, memory_gb: float = 1.0) -> dict[str, float]:
    """
    What must hold before a sweep is believed, as the largest miss over the largest difference of clean and corrupt:
    the answer's position unembedded alone has the model's own logits, patching nothing is the corrupt run, patching
    everything before a layer is the clean run.
    """
    clean, corrupt = baselines(model, pairs, metric, memory_gb)
    logits = model(pairs.clean)[pairs.index, pairs.answer_pos]
    whole_model = make_metric(pairs, metric, logits)(logits, pairs.index)

    def patch_everywhere(on: bool) -> Tensor:
        places = {"all": t.full_like(pairs.clean, on, dtype=t.bool)}
        return sweep(model, pairs, "resid_pre", metric=metric, places=places, memory_gb=memory_gb, skip=False)

    misses = {
        "answer_alone_unembedded": whole_model - clean,
        "nothing_patched": patch_everywhere(False) - corrupt,
        "everything_patched": patch_everywhere(True) - clean,
    }
    scale = 0.01 + (clean - corrupt).abs().max()
    return {name: (miss.abs().max() / scale).item() for name, miss in misses.items()}


def missed_gates(gates: dict[str, float], model: nn.Module) -> list[str]:
    """The gates that miss by more than the model's dtype explains; NaN is a miss."""
    allowed = 1e-4 if model.W_U.dtype == t.float32 else 5e-2
    return [name for name, miss in gates.items() if not miss <= allowed]


def in_words(gates: dict[str, float]) -> str:
    """As they are printed: nothing patched 3e-07, ..."""
    return ", ".join(f"{name.replace('_', ' ')} {miss:.0e}" for name, miss in gates.items())


#%% Causal tracing: noise on the subject's embeddings, one clean activation restored (Meng et al. 2022)
@t.no_grad()
def embedding_std(model: nn.Module, tokens: Tensor, place_mask: Tensor) -> float:
    """
    Standard deviation of the token embeddings at the positions of place_mask (pair, pos), as they enter the first
    block, so scaled where the model scales them (Gemma). Where positions are added to them, they are read at
    hook_embed, before.
    """
    if "hook_pos_embed" in hook_points(model):
        _, cache = run_with_cache(model, tokens, "hook_embed")
        embeddings = cache["hook_embed"]
    else:
        embeddings = model(tokens, stop_at_layer=0)
    return embeddings[place_mask].float().std().item()


@t.no_grad()
def noised_pairs(model: nn.Module, pairs: Pairs, place_mask: Tensor, sigma: float) -> Pairs:
    """
    The same pairs, but the corrupt run is the clean one with Gaussian noise of standard deviation sigma on what
    enters layer 0 at the positions of place_mask (pair, pos). Meng et al. take sigma = 3 embedding_std, and the
    subject's tokens.
    """
    resid = inputs(model, pairs, "clean")
    noise = sigma * t.randn_like(resid)
    return replace(pairs, corrupt=pairs.clean, corrupt_resid=resid + noise * place_mask[..., None])


@t.no_grad()
def causal_trace(
    model: nn.Module, noised: Pairs, site: str, layer: int, place_mask: Tensor, metric: str = "log_prob"
) -> Tensor:
    """
    Causal tracing (Meng et al. 2022): metric (pair) of the noised runs (see noised_pairs) in which `site` of one
    layer is the clean run's at the positions of place_mask (pair, pos). Plain form of a sweep of noised pairs. (The
    paper restores attention and MLP outputs in windows of ten layers, here it is one layer.)
    """
    # Step 1: a clean run
    hook_name = act_name(site, layer)
    clean_logits, clean_cache = run_with_cache(model, noised.clean, hook_name)

    # Step 2: the run again, with the noised embeddings, and the clean activation restored
    def put_noised(resid: Tensor, hook: nn.Module) -> Tensor:
        return noised.corrupt_resid.clone()

    def restore(activation: Tensor, hook: nn.Module) -> None:
        activation[place_mask] = clean_cache[hook_name][place_mask]  # in place: see GrowingBatch.patch

    logits = run_with_hooks(model, noised.clean, [(act_name("resid_pre", 0), put_noised), (hook_name, restore)])

    # Step 3: the metric
    metric_fn = make_metric(noised, metric, clean_logits[noised.index, noised.answer_pos])
    return metric_fn(logits[noised.index, noised.answer_pos], noised.index)


#%% Ablations, the plain form: a part is zeroed, set to its mean, to another row's value, or drowned in noise
class Part(NamedTuple):
    """
    Of `site` in a layer: of the change (row, pos, ...) that an ablation makes there, keep lets only the part's own
    through.
    """

    site: str
    layer: int
    keep: Callable[[Tensor], Tensor] = lambda change: change

    @property
    def hook_name(self) -> str:
        return act_name(self.site, self.layer)


class Moments(NamedTuple):
    """Mean and standard deviation over text of an activation at one position (...)."""

    mean: Tensor
    std: Tensor


def ablated(x: Tensor, how: str, moments: Moments | None, other: Tensor | None, sigma: float = 1.0) -> Tensor:
    """
    What an ablation puts in the place of x (row, pos, ...). mean and noise need moments over text, resample needs
    another run's activation.
    """
    if how == "zero":
        return 0 * x
    if how == "mean":
        return moments.mean.to(x)
    if how == "resample":
        return other
    if how == "noise":
        return x + sigma * moments.std.to(x) * t.randn_like(x)
    raise ValueError(f"unknown ablation {how!r}")


@t.no_grad()
def ablate(model: nn.Module, tokens: Tensor, part: Part, text: Tensor, how: str, sigma: float = 1.0) -> Tensor:
    """
    Logits (row, pos, d_vocab) of a run in which a part is ablated. how: zero; mean over text (row, pos); resample,
    the row before at the same position (Chan et al. 2022); noise of sigma standard deviations over text. The first
    position of text, which attends only to itself, is left out.
    """
    _, text_cache = run_with_cache(model, text, part.hook_name)
    over_text = text_cache[part.hook_name][:, 1:].float()
    moments = Moments(over_text.mean((0, 1)), over_text.std((0, 1), correction=0))
    _, other_cache = run_with_cache(model, tokens.roll(1, 0), part.hook_name)
    other = other_cache[part.hook_name]

    def change(x: Tensor, hook: nn.Module) -> Tensor:
        new = ablated(x, how, moments, other, sigma)
        return x + part.keep(new - x)

    return run_with_hooks(model, tokens, [(part.hook_name, change)])


mean_ablation = partial(ablate, how="mean")  # (Wang et al. 2022)


#%% Ablations, the fast form: many of them on the same rows, each from its own layer on
class AblatedRuns:
    """
    Runs of the same tokens (row, pos) with one ablation each. The plain run leaves the stream before every layer, and
    an ablation's run starts from it at its own layer. Logits are (row, d_vocab) at answer_pos, or (row, pos, d_vocab)
    where that is None. other_tokens: the rows to resample from.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        other_tokens: Tensor,
        answer_pos: Tensor | None,
        moments: dict[str, Moments],
        resampled_hooks: list[str],
    ):
        self.model = model
        self.answer_pos = answer_pos
        self.moments = moments
        streams = [act_name("resid_pre", layer) for layer in range(model.cfg.n_layers)]
        unembedded = tokens.new_zeros(len(tokens)) if answer_pos is None else answer_pos
        self.logits, self.cache = cache_from_resid(model, model(tokens, stop_at_layer=0), unembedded, streams)
        self.other = {}
        if resampled_hooks:
            resid = model(other_tokens, stop_at_layer=0)
            _, self.other = cache_from_resid(model, resid, unembedded, resampled_hooks)

    def plain(self) -> Tensor:
        return run_from(self.model, self.cache["resid_pre", 0], self.answer_pos)

    def ablate(self, part: Part, how: str, sigma: float) -> Tensor:
        moments = self.moments[part.hook_name]
        other = self.other[part.hook_name] if how == "resample" else None

        def change(x: Tensor, hook: nn.Module) -> Tensor:
            new = ablated(x, how, moments, other, sigma)
            return x + part.keep(new - x)

        resid = self.cache["resid_pre", part.layer]
        return run_from(self.model, resid, self.answer_pos, part.layer, fwd_hooks=[(part.hook_name, change)])

    def scores(self, ablations: list[tuple[Part, str, float]], score: Callable[[Tensor], Tensor]) -> Tensor:
        """(1 + ablation, ...) score of the plain run's logits, and of each ablation's."""
        values = [score(self.plain())]
        for part, how, sigma in tqdm(ablations, desc="ablations", **BRIEF):
            values.append(score(self.ablate(part, how, sigma)))
        return t.stack(values)


@t.no_grad()
def ablation_effects(
    model: nn.Module,
    pairs: Pairs,
    rows: Tensor,
    ablations: list[tuple[Part, str, float]],
    metric: str,
    memory_gb: float = 1.0,
) -> list[tuple[float, float]]:
    """
    For each ablation (part, how, sigma; see ablate), whose means and deviations are over text rows (row, pos): the
    share of the metric lost (0 = clean, 1 = corrupt: see normalised), and the loss added on that text in nats per
    token. resample takes the row before, same position.
    """
    if len(pairs) < 2 and any(how == "resample" for _, how, _ in ablations):
        fail("resample takes what another pair has there, and there is one pair: give more with --pairs")
    ablated_hooks = unique(part.hook_name for part, _, _ in ablations)
    resampled_hooks = unique(part.hook_name for part, how, _ in ablations if how == "resample")
    floats = 2 * cached_floats(model, rows, ablated_hooks)
    pairs_at_once = rows_that_fit(model, pairs.clean.shape[1], memory_gb, floats)
    text_at_once = rows_that_fit(model, rows.shape[1], memory_gb, floats)
    scored_text_at_once = rows_that_fit(model, rows.shape[1], memory_gb, floats + 4 * model.cfg.d_vocab)
    moments = moments_over_text(model, rows, ablated_hooks, text_at_once)

    def metric_of_pairs(index: Tensor) -> Tensor:
        """(run, pair); the pairs before these are resampled from."""
        group = pairs.take(index)
        both = pairs.take(t.cat([index, index - 1]))
        tokens, other_tokens = both.clean.split(len(index))
        runs = AblatedRuns(model, tokens, other_tokens, group.answer_pos, moments, resampled_hooks)
        metric_fn = make_metric(group, metric, runs.logits)

        def score(logits: Tensor) -> Tensor:
            return metric_fn(logits, group.index)

        return runs.scores(ablations, score)

    def loss_of_text(index: Tensor) -> Tensor:
        """Summed over these rows; the rows before them are resampled from."""
        tokens = rows[index]
        runs = AblatedRuns(model, tokens, rows[index - 1], None, moments, resampled_hooks)

        def score(logits: Tensor) -> Tensor:
            return next_token_loss(logits, tokens, "sum")

        return runs.scores(ablations, score) / rows[:, 1:].numel()

    metric_by_run = t.cat(list(in_batches(metric_of_pairs, pairs.index, pairs_at_once)), -1)
    clean, corrupt = baselines(model, pairs, metric, memory_gb)
    loss_by_run = sum(in_batches(loss_of_text, t.arange(len(rows), device=rows.device), scored_text_at_once))
    metric_lost = (1 - normalised(metric_by_run[1:], clean, corrupt)).tolist()
    nats_added = (loss_by_run[1:] - loss_by_run[0]).tolist()
    return list(zip(metric_lost, nats_added))


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def cached_floats(model: nn.Module, rows: Tensor, names: list[str]) -> int:
    """Numbers per position that the stream before every layer and the named activations hold."""
    streams = [act_name("resid_pre", layer) for layer in range(model.cfg.n_layers)]
    resid = model(rows[:1], stop_at_layer=0)
    _, cache = cache_from_resid(model, resid, rows.new_zeros(1), [*streams, *names])
    return sum(x[0, 0].numel() for x in cache.values())


def moments_over_text(model: nn.Module, rows: Tensor, names: list[str], at_once: int) -> dict[str, Moments]:
    """Of each named activation, over rows (row, pos) without the first position, which attends only to itself."""

    def share_of_sums(part: Tensor) -> dict[str, Tensor]:
        """{hook: (mean and mean square, ...)}, weighted by the share of rows."""
        resid = model(part, stop_at_layer=0)
        _, cache = cache_from_resid(model, resid, part.new_zeros(len(part)), names)
        sums = {}
        for name, x in cache.items():
            x = x[:, 1:].float().contiguous()
            sums[name] = t.stack([x.mean((0, 1)), x.pow(2).mean((0, 1))]) * len(part) / len(rows)
        return sums

    shares = list(in_batches(share_of_sums, rows, at_once))
    moments = {}
    for name in names:
        mean, mean_square = sum(share[name] for share in shares)
        moments[name] = Moments(mean, (mean_square - mean.pow(2)).clamp(min=0).sqrt())
    return moments


#%% Parts finer than a head or an MLP: neurons and directions
@t.no_grad()
def fine_parts(model: nn.Module, pairs: Pairs, layer: int, memory_gb: float = 1.0) -> dict[str, Part]:
    """
    Neurons of an MLP by how far clean and corrupt differ there at the answer's position x ||W_out||, and the
    direction in which the stream before it differs most; beside random ones. None for a mixture of experts.
    """
    if not hasattr(model.blocks[layer].mlp, "W_out"):
        return {}  # a mixture of experts has no one list of neurons
    neuron_gap, stream_gap = differences_at_answer(model, pairs, ["post", "resid_pre"], layer, memory_gb)
    strength = neuron_gap.abs().mean(0) * model.blocks[layer].mlp.W_out.float().norm(dim=-1)
    strongest = strength.argsort(descending=True)
    shuffled = t.randperm(len(strongest)).to(strongest.device)
    parts = {}
    for title, neurons in (("strongest", strongest), ("random", shuffled)):
        for n in (1, 4, 16, 64):
            of_these = F.one_hot(neurons[:n], len(neurons)).sum(0)
            parts[f"L{layer}: {n} {title} neurons"] = Part("post", layer, partial(t.mul, of_these))
    largest = t.linalg.svd(stream_gap)[2][0]
    at_random = t.randn(len(largest))
    for title, direction in (("direction of largest difference", largest), ("random direction", at_random)):
        parts[f"before L{layer}: {title}"] = Part("resid_pre", layer, partial(along, direction / direction.norm()))
    return parts


def differences_at_answer(
    model: nn.Module, pairs: Pairs, sites: list[str], layer: int, memory_gb: float
) -> list[Tensor]:
    """For each site: clean - corrupt (pair, d) where the answer is due."""
    names = [act_name(site, layer) for site in sites]

    def differences(group: Pairs) -> list[Tensor]:
        _, clean = cache_from_resid(model, inputs(model, group, "clean"), group.answer_pos, names)
        _, corrupt = cache_from_resid(model, inputs(model, group, "corrupt"), group.answer_pos, names)
        return [(clean[name] - corrupt[name])[group.index, group.answer_pos].float() for name in names]

    groups = by_groups(differences, pairs, rows_that_fit(model, pairs.clean.shape[1], memory_gb))
    return [t.cat(parts) for parts in zip(*groups)]


def along(direction: Tensor, change: Tensor) -> Tensor:
    """What of a change (row, pos, d_model) lies along a unit direction (d_model)."""
    direction = direction.to(change)
    return (change @ direction)[..., None] * direction


#%% Attention knock-out
@t.no_grad()
def attention_knock_out(model: nn.Module, pairs: Pairs, layers: Iterable[int], mask: Tensor, metric: str) -> Tensor:
    """
    Metric (pair) of clean runs in which, in these layers, no head attends from the answer's position to the positions
    of mask (pair, pos) (Geva et al. 2023).
    """
    position = t.arange(pairs.clean.shape[1], device=mask.device)
    is_answer = position == pairs.answer_pos[:, None]
    hidden = is_answer[:, :, None] & mask[:, None, :]  # (pair, query, key)

    def hide(scores: Tensor, hook: nn.Module) -> Tensor:
        return scores.masked_fill(hidden[:, None], -1e9)  # (pair, head, query, key)

    resid = inputs(model, pairs, "clean")
    scores_hooks = [act_name("attn_scores", layer) for layer in layers]
    clean_logits = run_from(model, resid, pairs.answer_pos)
    logits = run_from(model, resid, pairs.answer_pos, layer=0, fwd_hooks=[(scores_hooks, hide)])
    return make_metric(pairs, metric, clean_logits)(logits, pairs.index)


def knock_out(
    model: nn.Module, pairs: Pairs, layers: Iterable[int], mask: Tensor, metric: str, memory_gb: float = 1.0
) -> Tensor:
    """attention_knock_out in groups of pairs that fit into memory."""
    layers = list(layers)

    def of_group(group: Pairs) -> Tensor:
        return attention_knock_out(model, group, layers, group.places["hidden"], metric)

    masked = replace(pairs, places={"hidden": mask})
    return t.cat(by_groups(of_group, masked, rows_that_fit(model, mask.shape[1], memory_gb)))


#%% Patchscopes: an activation moved into another prompt, and what the model makes of it there
def patchscope(model: nn.Module, x: Tensor, layer: int, target: Tensor, position: int) -> Tensor:
    """
    Logits (row, d_vocab) at the end of a target prompt (pos), whose stream after `layer` blocks is x (row, d_model) at
    one position. Ghandeharioun et al. 2024.
    """
    stream = layer_streams(model)[layer]
    with t.no_grad():
        _, cache = run_with_cache(model, target[None], stream)
    resid = cache[stream].expand(len(x), -1, -1).clone()
    resid[:, position] = x
    at_the_end = t.full((len(x),), len(target) - 1, device=x.device)
    return run_from(model, resid, at_the_end, layer)


#%% Edits of an activation by a function, and what they cost in loss over text
def put(new: Callable[[Tensor], Tensor], first: int = 0) -> Callable:
    """A hook that puts new(x) in the place of x (batch, pos, d_in), from position `first` on."""

    def fn(x: Tensor, hook: nn.Module) -> Tensor:
        replaced = new(x.flatten(2).float()).view_as(x).to(x.dtype)
        return t.cat([x[:, :first], replaced[:, first:]], 1)

    return fn


@t.no_grad()
def loss_of(model: nn.Module, rows: Tensor, edits: list[tuple], batch: int = 64) -> float:
    """Mean next-token cross-entropy in nats."""

    def summed_loss(part: Tensor) -> float:
        return next_token_loss(run_with_hooks(model, part, edits), part, "sum").item()

    return sum(in_batches(summed_loss, rows, batch)) / rows[:, 1:].numel()
