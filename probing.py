"""
Does a model keep your labels, and where? Texts with a label, of the whole or of a stretch, are probed at every layer: by
one neuron or feature, by several, by the whole stream, and by the difference of means, on groups that no probe was
trained on, beside labels that mean nothing.
The methods are in probes.py: run_probes and its parts. What a probe finds is a direction that steering.py pushes along.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import (  # first: sets OpenMP's variables before torch is loaded
    BRIEF,
    Count,
    DtypeName,
    Natural,
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
from plots import array, bar, imshow, line, show
from hooks import act_name, hook_points, in_words, missed_gates, run_with_cache
from weights import about_bos, encode, model_key, open_model, text_tokenizer, token_text
from launch import flags
from logit_attribution import layer_streams
from lens import slug

from sae import open_folder, open_release
from features import sparse
from probes import (
    harvest_labelled,
    interval_over_splits,
    label_examples,
    make_trial,
    over_splits,
    probe_directions,
    read_labels,
    refuse_one_sided,
    run_probes,
    world_examples,
)
from alignment import read_subspaces, save_subspaces
from llama_block import Llama

import numpy as np
import torch as t
from scipy.sparse import csr_matrix
from tabulate import tabulate
from tqdm import tqdm


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str = "models/world"  # a hub name, a short name or a folder
    bos: bool | None = None  # put a beginning-of-text token first; default as the model's own tokenizer says
    # your own: a CSV or JSON file with the columns text and label, and if wanted start and end (of the characters that
    # the label is about; a text is read at their last token) and group (examples that stand in one split)
    labels: str | None = None
    # or labels that the world makes known: a country's continent, a name's gender, the number of a sentence's subject,
    # which is read at another noun, the last before the verb
    task: Literal["number", "gender", "continent"] = "number"
    n: Count = 400  # examples of the task
    sae: str | None = None  # a folder with a SAE, whose features are probed at its hook
    release: str | None = None  # or one of SAELens's registry, as gemma-scope-2b-pt-res-canonical, with --sae-id
    sae_id: str = ""  # which SAE of the release, as layer_12/width_16k/canonical
    seeds: Count = 3  # splits of the groups
    wandb: bool = False  # numbers and figures go to Weights & Biases too
    seed: Natural = 0
    dtype: DtypeName = "auto"  # of the weights; auto: bfloat16 on a GPU that has it, else float32
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


cfg = flags(Config, __doc__, hpc=Config(model="gpt2", bos=True, n=1200))
if cfg.sae and cfg.release:
    fail("--sae and --release both name a SAE: give one of them")
device = pick_device(cfg.device)
set_seed(cfg.seed)

#%% The examples and the model: where each text is read, and how many groups each label has
examples = read_labels(cfg.labels) if cfg.labels else world_examples(cfg.task, cfg.n, cfg.seed)
about = Path(cfg.labels).stem if cfg.labels else cfg.task
model = open_model(cfg.model, (Llama,), device, cfg.dtype, offload="off", bos=cfg.bos).requires_grad_(False)
labelled = label_examples(text_tokenizer(model), examples)
for label, concept in labelled.concepts.items():
    for s in range(cfg.seeds):
        refuse_one_sided(make_trial(concept, cfg.seed + s), label)
groups = {example.group for example in examples}
print(f"{purple}=== {about}: {len(examples)} examples of {len(groups)} groups; {about_bos(model)} ==={endc}")
for label in sorted(set(labelled.role)):
    i = int(np.flatnonzero(labelled.role == label)[0])
    read_at = token_text(model, labelled.rows[i][labelled.pos[i]])
    n_groups = len({e.group for e in examples if e.label == label})
    n_with = int((labelled.role == label).sum())
    print(f"{gray}{label}: {n_with} examples of {n_groups} groups, as {examples[i].text!r}, read at {read_at!r}{endc}")

#%% What the model has there: the stream after every block, the neurons that wrote to it last, and a SAE's features
streams = layer_streams(model)
neurons = {stream: act_name("post", layer) for layer, stream in enumerate(streams[1:])}
known = hook_points(model)
neurons = {stream: name for stream, name in neurons.items() if name in known}
sae = None
if cfg.sae:
    sae = open_folder(cfg.sae, device)
if cfg.release:
    sae = open_release(cfg.release, cfg.sae_id, device)
wanted = [*streams, *neurons.values()]
if sae is not None:
    sae_hook = sae.cfg.metadata.hook_name
    if sae_hook not in known:
        fail(f"the SAE {cfg.sae or cfg.sae_id} belongs at {sae_hook}, which this model does not have")
    wanted.append(sae_hook)
    sae_blocks = int(re.search(r"blocks\.(\d+)\.", sae_hook)[1]) + sae_hook.endswith("resid_post")  # passed there
bos = encode(model, "")
found = harvest_labelled(model, labelled, list(dict.fromkeys(wanted)), bos, device)

#%% Gate: what stands in the table is what the model has when it reads the text alone
alone = 0.0
for i in range(0, len(examples), max(1, len(examples) // 6)):
    tokens = t.tensor([bos + labelled.rows[i]], device=device)
    _, cache = run_with_cache(model, tokens, streams)
    for stream in streams:
        here = cache[stream][0, len(bos) + labelled.pos[i]].float().cpu()
        alone = max(alone, ((found[stream][i] - here).norm() / here.norm()).item())
gates = {"read_among_others_and_alone": alone}
missed = missed_gates(gates, model)
print(f"{cyan}gate: {in_words(gates)}{endc}")
if missed:
    fail(f"gate: {missed[0]} misses by {alone:.0e}; activations of this model cannot be believed")

#%% Probes of every label at every layer, on groups that they were not trained on
probed: dict[str, list[list[dict]]] = {}  # by label, (layer, split), what run_probes says
for label, concept in tqdm(labelled.concepts.items(), desc="probes", **BRIEF):
    probed[label] = []
    for stream in streams:
        codes = {}
        if stream in neurons:
            codes["neurons"] = csr_matrix(array(found[neurons[stream]]))
        dense = {"stream": array(found[stream])}
        runs = [run_probes(concept, codes, dense, cfg.seed + s) for s in range(cfg.seeds)]
        probed[label].append(runs)
of_features: dict[str, list[dict]] = {}
if sae is not None:
    codes = {"features": sparse(sae.encode(found[sae_hook].to(device)))}
    for label, concept in labelled.concepts.items():
        of_features[label] = [run_probes(concept, codes, {}, cfg.seed + s) for s in range(cfg.seeds)]

METHODS = {  # as run_probes calls them, in words
    "dense stream": "whole stream",
    "difference of means stream": "difference of means",
    "8 neurons": "8 neurons",
    "single neurons": "1 neuron",
    "shuffled labels": "shuffled labels",
}
auroc = {}  # by label and method, (layer): mean over the splits; nan where a layer has none
for label, by_layer in probed.items():
    auroc[label] = {}
    for method, words in METHODS.items():
        row = [over_splits(runs, method, "test") if any(method in run for run in runs) else np.nan for runs in by_layer]
        auroc[label][words] = row


#%% ... as a table: each at the layer that is best on validation groups, with intervals over splits and resampled groups
def at_best_layer(by_layer: list[list[dict]], method: str) -> dict[str, float]:
    """Blocks passed, test AUROC and its 95% interval; the control's at the layer of the whole stream."""
    judge = "dense stream" if method == "shuffled labels" else method
    layers = [layer for layer, runs in enumerate(by_layer) if any(method in run for run in runs)]
    layer = max(layers, key=lambda i: over_splits(by_layer[i], judge, "validation"))
    low, high = interval_over_splits(by_layer[layer], method)
    return {"blocks": layer, "auroc": over_splits(by_layer[layer], method, "test"), "low": low, "high": high}


at_best: dict[str, dict[str, dict[str, float]]] = {}  # by label and method
for label, by_layer in probed.items():
    at_best[label] = {}
    for method, words in METHODS.items():
        if any(method in run for runs in by_layer for run in runs):
            at_best[label][words] = at_best_layer(by_layer, method)
    if sae is not None:
        for words, method in {"1 feature": "single features", "8 features": "8 features"}.items():
            at_best[label][words] = at_best_layer([of_features[label]], method) | {"blocks": sae_blocks}
columns = list(dict.fromkeys(words for of_label in at_best.values() for words in of_label))
table = []
for label, of_label in at_best.items():
    cells = [label]
    for words in columns:
        x = of_label.get(words)
        cells.append(f"{x['auroc']:.3f} [{x['low']:.2f}, {x['high']:.2f}] after {x['blocks']}" if x else "")
    table.append(cells)
print(
    f"{purple}=== Test AUROC [95% interval over {cfg.seeds} splits by group and resampled groups] after so many blocks, "
    f"which are chosen on validation ==={endc}"
)
print(cyan + tabulate(table, headers=["label", *columns]) + endc)
best_features = {}
for label, runs in of_features.items():
    best_features[label] = [unit for run in runs for unit in run["single features"]["units"]]
    told_by = " ".join(f"f{feature}" for feature in best_features[label])
    print(f"{label}: the feature that tells it best, split by split: {cyan}{told_by}{endc}")

#%% ... as lines over the layers, mean of the labels
named = f"{about}, {Path(cfg.model).name}, n = {len(examples)} examples of {len(groups)} groups, {cfg.seeds} splits by group"
curves = {}
for words in METHODS.values():
    of_labels = np.array([auroc[label][words] for label in auroc])
    curves[words] = of_labels.mean(0)
fig = line(
    curves,
    title=f"How well probes tell the labels of groups that they never saw, layer by layer ({named})",
    xlabel="blocks passed",
    ylabel="test AUROC",
    x=list(range(len(streams))),
    markers=True,
    dashed=["shuffled labels"],
)
fig.update_xaxes(dtick=1)
show(
    fig,
    "probing/layers",
    "1 tells every label, 0.5 none. At 0 blocks a probe sees the word alone; dashed is a probe of labels that mean "
    "nothing, which must stay near 0.5.",
)

#%% ... every label by itself, which a menu chooses
of_labels = np.array([[auroc[label][words] for words in METHODS.values()] for label in auroc])  # (label, method, layer)
several = len(auroc) > 1
fig = imshow(
    (of_labels if several else of_labels[0]) - 0.5,
    title=f"What tells {'each label' if several else next(iter(auroc))}, after how many blocks ({named})",
    xlabel="blocks passed",
    ylabel="probe",
    x=[str(i) for i in range(len(streams))],
    y=list(METHODS.values()),
    menu=list(auroc) if several else None,
    value="AUROC - 0.5",
)
show(
    fig,
    "probing/labels",
    "Blue: told apart on groups that were not trained on; white: no better than chance; empty: no neurons before the "
    "first block.",
)

#%% ... and every method with its interval, at each label's best layer
bars = {}
errors = {}
absent = {"auroc": np.nan, "low": np.nan, "high": np.nan}
for words in columns:
    cells = [at_best[label].get(words, absent) for label in at_best]
    mean, low, high = (np.array([x[which] for x in cells]) for which in ("auroc", "low", "high"))
    bars[words] = mean
    errors[words] = (high - mean, mean - low)
fig = bar(
    bars,
    title=f"What each label takes: one neuron, eight, the whole stream, each at its best layer ({named}; 95% intervals)",
    xlabel="label",
    ylabel="test AUROC",
    x=list(at_best),
    errors=errors,
)
fig.update_yaxes(range=[0, 1.05])
show(fig, "probing/methods", "Where the whole stream is far ahead of one neuron, no neuron is the label's own.")

#%% The probes' directions in files, the numbers for machines, and the conclusion
method_of = {}
files = {}
for label, concept in labelled.concepts.items():
    runs = probed[label][int(at_best[label]["whole stream"]["blocks"])]
    scores = {
        "logistic probe": over_splits(runs, "dense stream", "validation"),
        "difference of means": over_splits(runs, "difference of means stream", "validation"),
    }
    method = max(scores, key=scores.get)
    directions = {}
    for stream in streams:
        unit = probe_directions(concept, array(found[stream]), cfg.seed)[method]
        directions[stream] = t.from_numpy(unit).float()[:, None]
    key = model_key(cfg.model, [label, cfg.dtype, cfg.bos, [vars(example) for example in examples], cfg.seed])
    path = Path("checkpoints/probing") / f"{slug(cfg.model)}-{slug(about)}-{slug(label)}-{key}.safetensors"
    save_subspaces(path, directions, model=cfg.model, labels=about, label=label, method=method, seed=cfg.seed)
    again, _ = read_subspaces(path)
    assert all(directions[stream].equal(again[stream]) for stream in streams), "the file holds something else"
    method_of[label] = method
    files[label] = str(path)
    print(f"{gray}{label}, by {method}: {path}{endc}")
mean_at_best = {}
for words in columns:
    scores = [of_label[words]["auroc"] for of_label in at_best.values() if words in of_label]
    mean_at_best[words] = sum(scores) / len(scores)
save_results(
    "probing",
    cfg,
    about=about,
    auroc=auroc,
    at_best=at_best,
    mean_at_best=mean_at_best,
    gates=gates,
    method_of=method_of,
    files=files,
    n_examples=len(examples),
    n_groups=len(groups),
    n_labels=len(auroc),
    best_features=best_features,  # by label, split by split; empty without a SAE
)
said = ", ".join(f"{words} {value:.2f}" for words, value in mean_at_best.items())
chance = [label for label in at_best if at_best[label]["whole stream"]["low"] <= 0.5]
print(
    f"{green}{about}, on groups that no probe was trained on, AUROC at each label's best layer, mean of {len(auroc)}: "
    f"{said}. Gate: read among others and alone {alone:.0e}. What happens when we push along them: steering.py "
    f"--direction.{endc}"
)
if chance:
    print(f"{yellow}No better than chance: {', '.join(chance)}{endc}")
