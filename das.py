"""
Which part of an activation stands for a variable? Interchange interventions: the variable's value comes from another
prompt, and the model must answer as a causal model predicts. Distributed alignment search finds the subspace that does
it, and is held against cheaper subspaces, against the whole stream, and against what it finds where nothing is.
The methods are in alignment.py: interchange and its fast form InterchangeRuns, fit_das, interchange accuracy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import (  # first: sets OpenMP's variables before torch is loaded
    Count,
    DtypeName,
    Natural,
    Positive,
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
from plots import bar, imshow, line, show
from hooks import act_name, in_words, missed_gates
from data import text_of
from weights import about_bos, model_key, open_model, text_tokenizer, token_text
from launch import flags
from lens import slug
from pairs import read_pairs, share_out, refuse_misfits

from alignment import (
    CAUSAL_MODELS,
    InterchangeRuns,
    agrees_with_causal_model,
    cases_of_pairs,
    draw_cases,
    fit_das,
    interchange_gates,
    interchange_runs,
    means_subspace,
    principal_subspace,
    random_subspace,
    read_subspaces,
    save_subspaces,
    share_with_interval,
)
from llama_block import Llama

import torch as t
from tabulate import tabulate
from torch import Tensor


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str = "models/world"  # a hub name, a short name or a folder
    bos: bool | None = None  # put a beginning-of-text token first; default as the model's own tokenizer says
    # what a causal model computes in the middle; each is written out in alignment.CAUSAL_MODELS
    variable: Literal["number", "country", "subject_name", "subject_position"] = "number"
    # or your own: a CSV or JSON file with the columns clean, corrupt, answer, wrong (the answer to corrupt); each is
    # the base once and the source once
    pairs: str | None = None
    rank: Count = 1  # of the subspace at every layer and place
    ranks: tuple[Count, ...] = (1, 2, 4, 8, 16, 32)  # at the best place
    n: Count = 192  # cases to find subspaces on
    held_out: Count = 192  # cases to judge them on, about other entities
    steps: Count = 40  # of DAS
    batch: Count = 24  # cases of a step
    lr: Positive = 0.02
    random: Count = 10  # subspaces at random, at the best place
    memory_gb: Positive = 1.0  # cap on activations of one run
    wandb: bool = False  # numbers and figures go to Weights & Biases too
    seed: Natural = 0  # of every draw
    dtype: DtypeName = "auto"  # of the weights; auto: bfloat16 on a GPU that has it, else float32
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


cfg = flags(Config, __doc__, hpc=Config(model="gpt2", bos=True, n=1024, held_out=512, steps=300, memory_gb=24.0))
device = pick_device(cfg.device)
set_seed(cfg.seed)

#%% The model, the causal model and its variable, and the cases: base, source, and what must be answered afterwards
model = open_model(cfg.model, (Llama,), device, cfg.dtype, offload="off", bos=cfg.bos).requires_grad_(False)
d_model = model.cfg.d_model
n_layers = model.cfg.n_layers
ranks = [k for k in sorted(set(cfg.ranks)) if k <= d_model]
if max(cfg.rank, min(cfg.ranks)) > d_model:
    fail(f"--rank is at most the {d_model} dimensions of this model's stream")
if cfg.pairs:
    variable = "what differs in own pairs"
    words = "after the interchange the other answer is due, both ways"
    of_file = read_pairs(cfg.pairs, model)
    refuse_misfits(model, of_file[: cfg.n + cfg.held_out])
    rows, held_out_rows = share_out(of_file, cfg.n, cfg.held_out)
    if not held_out_rows:
        print(f"{yellow}one pair: what is found is tested on the same pair{endc}")
    cases = cases_of_pairs(model, rows)
    test_cases = cases_of_pairs(model, held_out_rows or rows)
else:
    variable = cfg.variable
    words = CAUSAL_MODELS[variable]
    cases = draw_cases(model, variable, cfg.n, cfg.seed, "find")
    test_cases = draw_cases(model, variable, cfg.held_out, cfg.seed, "test")
judged_on = "entities not trained on"
if cfg.pairs:
    judged_on = "held-out pairs" if held_out_rows else "the pair that it was found on"
places = [place for place in cases.base_places if place in test_cases.base_places]
layer_names = [f"before L{layer}" for layer in range(n_layers)]


def text_until(ids: Tensor, end: Tensor) -> str:
    return text_of(text_tokenizer(model), ids[: int(end) + 1].tolist())


print(f"{purple}=== The variable, {variable}: {words} ==={endc}")
shown = int(cases.changes.int().argmax())
where = []
for place in places:
    in_base = token_text(model, int(cases.base[shown, cases.base_places[place][shown]]))
    in_source = token_text(model, int(cases.source[shown, cases.source_places[place][shown]]))
    where.append(f"{place} {in_base!r} / {in_source!r}")
print(f"{gray}base    {text_until(cases.base[shown], cases.base_end[shown])}")
print(f"source  {text_until(cases.source[shown], cases.source_places['end'][shown])}")
answer = token_text(model, int(cases.answer[shown]))
predicted = token_text(model, int(cases.predicted[shown]))
print(f"answer  {answer!r}, after the interchange {predicted!r}")
print(f"places (base / source): {', '.join(where)}; {about_bos(model)}{endc}")

#%% Does the model do what the causal model does, when the value is changed in the text itself? Only such cases are kept
agreement = {}
kept_cases = []
for name, asked in (("find", cases), ("held out", test_cases)):
    base_right, edited_right = agrees_with_causal_model(model, asked, cfg.memory_gb)
    both = base_right & edited_right
    agreement[name] = [base_right.float().mean().item(), edited_right.float().mean().item()]
    kept = asked.take(both.nonzero()[:, 0])
    if not kept.changes.any():
        fail(
            f"of {len(asked)} cases ({name}) the model answers none as the causal model does, before and after the value "
            "is changed in the text: there is nothing to align"
        )
    kept_cases.append(kept)
cases, test_cases = kept_cases
n_values = len(set(cases.values))
changing = test_cases.changes.cpu()
numbers = {"variable": variable, "agreement": agreement, "n": len(cases), "n_held_out": len(test_cases)}
numbers["n_changing"] = int(changing.sum())
print(
    f"{cyan}the model answers {agreement['held out'][0]:.1%} of the base prompts as the causal model does, and "
    f"{agreement['held out'][1]:.1%} of those with the value changed in the text; kept are {len(cases)} cases to find "
    f"on, {len(test_cases)} of {judged_on} to test on, of which {changing.sum()} should change their answer{endc}"
)

#%% Gates: nothing interchanged is the base run, everything after the last block the source run
runs = interchange_runs(model, cases, cfg.memory_gb)
test_runs = interchange_runs(model, test_cases, cfg.memory_gb)
gates = interchange_gates(test_runs, test_cases.index[:16])
missed = missed_gates(gates, model)
print(f"{cyan}gates: {in_words(gates)}{endc}")
if missed:
    fail(f"gate: {missed[0]} misses; interchanges in this model cannot be believed")

#%% Distributed alignment search before every layer, at every place; and what cheaper subspaces of that rank reach
generator = t.Generator().manual_seed(cfg.seed)


def found_by_das(searched: InterchangeRuns, layer: int, place: str, rank: int) -> Tensor:
    return fit_das(searched, layer, place, rank, cfg.steps, cfg.batch, cfg.lr, cfg.seed)


def cheap_subspaces(layer: int, place: str, rank: int) -> dict[str, Tensor]:
    x = runs.source[place][layer]
    return {
        "means of the values": means_subspace(x, cases.values, rank),
        "principal components": principal_subspace(x, rank),
        "at random": random_subspace(d_model, rank, generator).to(device),
    }


subspaces = {}
on_find = t.zeros(n_layers, len(places))
right = {}  # (layer, place, test case) by method
print(f"{purple}=== Interchange accuracy, rank {cfg.rank} ==={endc}")
for layer in range(n_layers):
    for column, place in enumerate(places):
        das = found_by_das(runs, layer, place, cfg.rank)
        subspaces[layer, place] = das
        on_find[layer, column] = runs.right(layer, place, das)[cases.changes].float().mean()
        tried = {"DAS": das, "the whole stream": None} | cheap_subspaces(layer, place, cfg.rank)
        for method, subspace in tried.items():
            right.setdefault(method, []).append(test_runs.right(layer, place, subspace).cpu())
right = {method: t.stack(rows).unflatten(0, (n_layers, len(places))) for method, rows in right.items()}
iia = {method: x[..., changing].float().mean(-1) for method, x in right.items()}
not_orthogonal = 0.0
for subspace in subspaces.values():
    miss = subspace.T @ subspace - t.eye(cfg.rank, device=device)
    not_orthogonal = max(not_orthogonal, miss.abs().max().item())
assert not_orthogonal < 1e-5, "a subspace is not orthonormal: what is interchanged is no part of the stream"
numbers |= {"gates": gates, "not_orthogonal": not_orthogonal, "places": places}
numbers["iia"] = {method: x.tolist() for method, x in iia.items()}
if not changing.all():
    numbers["answer_kept"] = {method: x[..., ~changing].float().mean(-1).tolist() for method, x in right.items()}
numbers["iia_find"] = on_find.tolist()
table = []
for layer in range(n_layers):
    for column, place in enumerate(places):
        table.append([layer_names[layer], place, on_find[layer, column], *(x[layer, column] for x in iia.values())])
print(tabulate(table, headers=["stream", "place", "DAS where found", *iia], floatfmt=".2f"))

#%% ... as maps of layers and places
about = f"{variable}, {Path(cfg.model).name}, n = {changing.sum()} cases of {judged_on}"
fig = imshow(
    t.stack(list(iia.values())),
    title=(
        f"Interchange accuracy by layer and place: how often the model answers as the causal model predicts, after a "
        f"subspace of rank {cfg.rank} came from the source ({about})"
    ),
    xlabel="place",
    ylabel="stream before layer",
    x=places,
    y=[f"L{layer}" for layer in range(n_layers)],
    panels=list(iia),
    columns=3,
    diverging=False,
    value="IIA",
)
show(
    fig,
    "das/accuracy",
    "1: after the interchange the model always answers as the causal model predicts. A place where the whole "
    "stream stays at 0 does not hold the variable.",
)

#%% At the place where DAS does best on the cases that it was found on: intervals, and what chance gives
best_layer, best_column = divmod(int(on_find.argmax()), len(places))
best_place = places[best_column]
best = f"{best_place}, {layer_names[best_layer]}"
# the null: every case has another's source, where subspaces are found and where they are judged
shuffled_runs = runs.with_shuffled_sources(cfg.seed)
shuffled_test_runs = test_runs.with_shuffled_sources(cfg.seed + 1)


def share_right(judging: InterchangeRuns, subspace: Tensor | None) -> float:
    """IIA at the best place, over the cases that should change."""
    is_right = judging.right(best_layer, best_place, subspace)
    return is_right[judging.cases.changes].float().mean().item()


def judged(finding: InterchangeRuns, judging: InterchangeRuns, subspace: Tensor | None) -> dict[str, object]:
    """IIA with its interval over entities, where it was found too; the share of cases of the same value kept."""
    is_right = judging.right(best_layer, best_place, subspace).cpu()
    entities = [pair for pair, changes in zip(test_cases.entities, changing.tolist()) if changes]
    return {
        "iia": share_with_interval(is_right[changing], entities),
        "answer_kept": is_right[~changing].float().mean().item(),
        "iia_find": share_right(finding, subspace),
        "rank": d_model if subspace is None else subspace.shape[1],
    }


at_random = []
for _ in range(cfg.random):
    at_random.append(share_right(test_runs, random_subspace(d_model, cfg.rank, generator).to(device)))
cheap = cheap_subspaces(best_layer, best_place, cfg.rank)
on_shuffled = found_by_das(shuffled_runs, best_layer, best_place, cfg.rank)
at_best = {
    "DAS": judged(runs, test_runs, subspaces[best_layer, best_place]),
    "the whole stream": judged(runs, test_runs, None),
    "means of the values": judged(runs, test_runs, cheap["means of the values"]),
    "principal components": judged(runs, test_runs, cheap["principal components"]),
    "DAS, sources shuffled": judged(shuffled_runs, shuffled_test_runs, on_shuffled),
}
numbers |= {"best_layer": best_layer, "best_place": best_place, "best": at_best}
numbers["random"] = {"draws": cfg.random, "mean": sum(at_random) / cfg.random, "largest": max(at_random)}
print(f"{purple}=== At {best} ==={endc}")
table = []
for method, x in at_best.items():
    share, low, high = x["iia"]
    kept_share = f"{x['answer_kept']:.2f}" if not changing.all() else ""
    table.append([method, x["rank"], x["iia_find"], share, f"{low:.2f} to {high:.2f}", kept_share])
table.append([f"at random, the best of {cfg.random}", cfg.rank, None, max(at_random), "", ""])
headers = ["what came from the source", "rank", "IIA where found", "held out", "95%, entities", "same value: kept"]
print(tabulate(table, headers=headers, floatfmt=".2f"))

#%% ... as bars
shares = t.tensor([x["iia"] for x in at_best.values()])  # (method, (share, low, high))
mean, low, high = shares.T
fig = bar(
    {"IIA": mean},
    title=(
        f"What a source's stream brings at {best}: whole, in subspaces of rank {cfg.rank}, and where sources are "
        f"shuffled ({about}; intervals 95% over entities; the best of {cfg.random} random subspaces {max(at_random):.2f})"
    ),
    xlabel="what came from the source",
    ylabel="interchange accuracy",
    x=list(at_best),
    errors={"IIA": (high - mean, mean - low)},
)
fig.update_yaxes(range=[0, 1.05])
show(
    fig,
    "das/best",
    "DAS must stand above the cheap subspaces, the shuffled sources and the random ones, or it has found "
    "nothing of its own.",
)

#%% How many dimensions does the variable take there?
by_rank = {cfg.rank: (subspaces[best_layer, best_place], on_shuffled)}
for rank in ranks:
    if rank not in by_rank:
        searched = (runs, shuffled_runs)
        by_rank[rank] = tuple(found_by_das(of_runs, best_layer, best_place, rank) for of_runs in searched)
curves = {"DAS": [], "DAS where found": [], "DAS, sources shuffled": []}
for rank in ranks:
    das, on_shuffled = by_rank[rank]
    subspaces[best_layer, best_place, rank] = das
    curves["DAS"].append(share_right(test_runs, das))
    curves["DAS where found"].append(share_right(runs, das))
    curves["DAS, sources shuffled"].append(share_right(shuffled_test_runs, on_shuffled))
    for method, subspace in cheap_subspaces(best_layer, best_place, rank).items():
        curves.setdefault(method, []).append(share_right(test_runs, subspace))
whole = at_best["the whole stream"]["iia"][0]
numbers |= {"ranks": ranks, "by_rank": curves}

#%% ... as lines
fig = line(
    curves | {"the whole stream": [whole] * len(ranks)},
    title=(
        f"Interchange accuracy by rank of the subspace, at {best} ({about}; the values' means have rank "
        f"{n_values - 1} at most)"
    ),
    xlabel="rank",
    ylabel="IIA",
    x=ranks,
    markers=True,
    logx=True,
    dashed=["the whole stream", "DAS where found"],
)
fig.update_xaxes(tickvals=ranks)
show(
    fig,
    "das/rank",
    "Where the line levels off, the variable has the dimensions that it needs; the dashed line where it was "
    "found shows what is learned by heart.",
)

#%% The subspaces in a file, the numbers for machines, and the conclusion
of_training = [cfg.n, cfg.rank, list(cfg.ranks), cfg.steps, cfg.batch, cfg.lr, cfg.seed]
key = model_key(cfg.model, [variable, cfg.dtype, cfg.bos, of_file if cfg.pairs else None, *of_training])
path = Path("checkpoints/das") / f"{slug(cfg.model)}-{slug(variable)}-{key}.safetensors"
named = {}
for (layer, place, *of_rank), subspace in subspaces.items():
    rank = of_rank[0] if of_rank else cfg.rank
    named[f"{act_name('resid_pre', layer)} {place} rank {rank}"] = subspace
save_subspaces(
    path,
    named,
    model=cfg.model,
    variable=variable,
    causal_model=words,
    best_place=best_place,
    n=len(cases),
    seed=cfg.seed,
)
again, _ = read_subspaces(path)
assert all(subspace.cpu().equal(again[name]) for name, subspace in named.items()), "the file holds something else"
numbers["worst_gate"] = max(gates.values())
save_results("das", cfg, **numbers)
das_share, low, high = at_best["DAS"]["iia"]
shuffled_share = at_best["DAS, sources shuffled"]["iia"][0]
ahead = iia["DAS"] - iia["the whole stream"]
ahead_layer, ahead_column = divmod(int(ahead.argmax()), len(places))
ahead_at = f"{places[ahead_column]}, {layer_names[ahead_layer]},"
print(f"{gray}{len(named)} subspaces: {path}{endc}")
print(
    f"{green}At {best}, {cfg.rank} of {d_model} dimensions carry {variable} for {das_share:.0%} of the cases of "
    f"{judged_on} ({low:.0%} to {high:.0%}; where it was found {at_best['DAS']['iia_find']:.0%}); the whole "
    f"stream {whole:.0%}, the means of the values {at_best['means of the values']['iia'][0]:.0%}, the best of "
    f"{cfg.random} random subspaces {max(at_random):.0%}, DAS with shuffled sources {shuffled_share:.0%}. Gates: the "
    f"worst misses by {max(gates.values()):.0e}.{endc}"
)
if low <= max(shuffled_share, *at_random):
    print(
        f"{yellow}That is no more than chance gives: of this rank there is no subspace that serves {judged_on} too, "
        f"or too few cases to find it.{endc}"
    )
cheap_shares = {method: at_best[method]["iia"][0] for method in ("means of the values", "principal components")}
best_cheap = max(cheap_shares, key=cheap_shares.get)
if cheap_shares[best_cheap] > das_share + 0.05:
    print(
        f"{yellow}The {best_cheap} serve {judged_on} better ({cheap_shares[best_cheap]:.0%}): DAS has fitted those that "
        f"it was found on.{endc}"
    )
if ahead.max() > 0.1:
    print(
        f"{yellow}At {ahead_at} DAS is ahead of the whole stream by {ahead.max():.0%}: the variable stands there beside "
        f"what must not move, or the subspace opens a path that the model does not use (Makelov et al. 2023).{endc}"
    )
