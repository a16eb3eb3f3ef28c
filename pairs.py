"""
Pairs of prompts, clean and corrupt: drawn from a task, read from a file or typed in; metrics of their answers; direct
logit attribution over pairs.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from utils import endc, fail, seed_of, yellow  # first: sets OpenMP's variables before torch is loaded
from hooks import device_of, in_batches, rows_that_fit, run_from
from weights import encode, token_text
from logit_attribution import logit_parts, parts_error
from world import DRAW, ENTITIES, Prompt, fact_prompts, read_countries

import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from torch import Tensor


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
    if clean == corrupt:
        return "clean and corrupt are the same: there is nothing to patch"
    if len(set(answers)) < len(answers):
        return f"the answer and the wrong one are the same, {answers[0]!r}"
    clean_ids = encode(model, clean)
    corrupt_ids = encode(model, corrupt)
    if len(clean_ids) != len(corrupt_ids):
        here, there = ([token_text(model, i) for i in part] for part in without_common_ends(clean_ids, corrupt_ids))
        return (
            f"clean has {len(clean_ids)} tokens, corrupt {len(corrupt_ids)}; they differ by {here} against {there}: "
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


def without_common_ends(a: list[int], b: list[int]) -> tuple[list[int], list[int]]:
    """What is left of two rows without what they begin and end with alike."""
    start = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    same = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1])) if x != y), min(len(a), len(b)))
    return a[: len(a) - same], b[: len(b) - same]


def refuse_misfits(model: nn.Module, rows: list[tuple[str, str, str, str]]) -> None:
    """Rows that are no pairs: the first by its number, and how many."""
    errors = [pair_error(model, *row) for row in rows]
    misfits = [i for i, error in enumerate(errors) if error]
    if misfits:
        also = f" ({len(misfits)} of {len(rows)} pairs do not fit)" if len(misfits) > 1 else ""
        fail(f"pair {misfits[0] + 1}{also}: {errors[misfits[0]]}")


def make_pairs(model: nn.Module, rows: list[tuple[str, str, str, str]]) -> Pairs:
    """rows of (clean, corrupt, answer, wrong), sorted by length."""
    refuse_misfits(model, rows)
    encoded = []
    for clean, corrupt, answer, wrong in rows:
        texts = (clean, corrupt, clean + answer, clean + wrong)
        encoded.append([encode(model, text) for text in texts])
    encoded.sort(key=lambda ids: len(ids[0]))
    device = device_of(model)
    pairs = Pairs(
        clean=padded([ids[0] for ids in encoded], device),
        corrupt=padded([ids[1] for ids in encoded], device),
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
    answer_pos = pairs.answer_pos[:, None]
    changed = (pairs.clean != pairs.corrupt) & (position <= answer_pos)
    first_change = changed.float().argmax(1, keepdim=True)

    answer_here = pairs.clean == pairs.answer[:, None]
    wrong_here = pairs.clean == pairs.wrong[:, None]
    io = answer_here & (answer_here.cumsum(1) == 1)  # where it first stands
    s1 = wrong_here & (wrong_here.cumsum(1) == 1)
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


def position_masks(pairs: Pairs, positions: Sequence[int] = ()) -> dict[str, Tensor]:
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
    refuse_misfits(model, rows[: cfg.n + cfg.held_out])  # by their numbers in the file
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
    |logit|). Each pair is one run of logit_attribution.logit_parts.
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
