"""Sparse autoencoders: trained here or loaded by their own metadata, judged, read as a page, probed for known concepts, steered, traced to an answer."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from utils import (
    BAR,
    BRIEF,
    cyan,
    endc,
    fail,
    find_folder,
    gray,
    green,
    load_model,
    orange,
    pick_device,
    purple,
    save_results,
    set_seed,
    yellow,
)
from plots import array, feature_page, imshow, label_tokens, line, show, show_page, visible
from hooks import act_name, hook_points, run_with_hooks
from weights import text_tokenizer
from data import load_corpus, str_tokens
from launch import flags
from world import DRAW, FACTS, fact_prompts, judging_rows, label_sentences, load_world, read_countries
from interventions import loss_of, put
from sae import (
    KS,
    attribute,
    change,
    check_fit,
    country_prompts,
    fit_sae,
    harvest_labelled,
    judge,
    label_of,
    model_for,
    neighbours,
    open_folder,
    open_release,
    random_twin,
    read_features,
    run_probes,
    sparse,
    split,
    variant,
)
from llama_block import Llama

import numpy as np
import plotly.graph_objects as go
from scipy.sparse import csr_matrix
from tabulate import tabulate
import torch as t
from torch import Tensor
import torch.nn.functional as F
from tqdm import tqdm


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str | None = None  # a hub name or a folder; default models/world, or what the SAE's metadata names
    sae: str | None = None  # a local folder with a SAE, instead of training one
    release: str | None = None  # a release of SAELens's registry, as gpt2-small-res-jb
    sae_id: str = ""  # and its SAE, as blocks.8.hook_resid_pre
    hook: str = "blocks.2.hook_resid_pre"  # where a SAE is trained
    architecture: Literal["topk", "batchtopk", "matryoshka", "standard", "gated", "jumprelu", "own"] = (
        "batchtopk"  # own is the objective written out in this file
    )
    sparsity: float | None = (
        None  # k of topk, batchtopk, matryoshka and own, the penalty of the others; default by architecture
    )
    d_sae: int = 512
    variants: tuple[str, ...] = (
        "topk:8",
        "matryoshka",
        "batchtopk:14:1024",
    )  # more SAEs for the Pareto figure, as architecture:sparsity:width:hook; finished ones are not trained again
    steps: int = 500
    batch: int = 1024  # activations per step
    lr: float = 2e-3
    buffer: int = 48_000  # activations in memory
    dead_window: int = 50  # steps without firing after which training counts a feature as dead
    checkpoints: int = 3  # on the way; a run that was cut off goes on from the last
    context: int = 64  # tokens per row, unless the SAE's metadata says otherwise
    data: str | None = (
        None  # world, stdlib, a text file or folder, a hub dataset; default world for models/world, else stdlib
    )
    heldout: int = 200_000  # tokens that the SAE is judged and read on
    min_recovered: float = 0.5  # gate: no feature is read below this share of cross-entropy recovered,
    max_fvu: float = 0.5  # or above this fraction of variance unexplained
    sentences: int = 150  # labelled sentences of each kind
    seeds: int = 3  # splits of the entities
    random_baseline: bool = True  # also an SAE of a model with random weights of the same shape
    prompt: str = "The capital of France is"  # whose answer is traced to features
    wandb: bool = False
    seed: int = 0
    device: str = "auto"


if __name__ == "__main__":
    cfg = flags(
        Config,
        __doc__,
        hpc=Config(
            model="gpt2",
            hook="blocks.8.hook_resid_pre",
            d_sae=24_576,
            sparsity=32.0,
            steps=50_000,
            batch=4096,
            buffer=500_000,
            context=128,
            data="HuggingFaceFW/fineweb-edu",
            variants=(),
            random_baseline=False,
        ),
    )
    device = pick_device(cfg.device)
    set_seed(cfg.seed)

#%% The model, its text and the SAE: trained and opened again, or loaded with what its metadata asks for
if __name__ == "__main__":
    pretrained = bool(cfg.sae or cfg.release)
    if pretrained:
        sae = open_folder(cfg.sae, device) if cfg.sae else open_release(cfg.release, cfg.sae_id, device)
        model, name = model_for(sae, cfg.model, device)
    else:
        cfg, name = variant(f"{cfg.architecture}:{cfg.sparsity or ''}", cfg), cfg.model or "models/world"
        model = load_model(find_folder(name), (Llama,), device)
    model.requires_grad_(False)
    tokenizer = text_tokenizer(model)
    data = cfg.data or ("world" if find_folder(name) == find_folder("models/world") else "stdlib")
    corpus = load_world() if data == "world" else load_corpus(data, tokenizer=find_folder(name))
    if corpus.d_vocab > model.W_U.shape[1]:
        fail(
            f"the text has {corpus.d_vocab} kinds of tokens, the model {model.W_U.shape[1]}: --data world is for models/world"
        )
    if not pretrained:
        sae = fit_sae(model, cfg, corpus, name, device)
    meta = sae.cfg.metadata
    context, bos = meta.context_size or cfg.context, [corpus.bos] if meta.prepend_bos in (None, True) else []
    rows = judging_rows(corpus, -(-cfg.heldout // (context - len(bos))), context + (not bos), cfg.seed)[
        :, not bos :
    ].to(device)
    check_fit(model, hook := meta.hook_name, sae.cfg.d_in, rows[:1])
    about = f"{name}, {hook}, {meta.training_architecture or sae.cfg.architecture()} of width {sae.cfg.d_sae}"

#%% Judged on held-out text, and the gate: no feature is read of an SAE that does not rebuild what the model lives on
if __name__ == "__main__":
    judged, codes = judge(model, sae, rows, len(bos))
    numbers, density = dict(judged), codes.getnnz(0) / codes.shape[0]
    print(f"{purple}=== {about}, as reopened from disk, on {judged['n_tokens']:,} held-out tokens ==={endc}")
    print(tabulate([[key.replace("_", " "), value] for key, value in judged.items()], floatfmt=".4f"))
    if not judged["fvu"] <= cfg.max_fvu:
        fail(
            f"gate: the SAE leaves {judged['fvu']:.2f} of the variance unexplained (at most --max-fvu {cfg.max_fvu}): wrong model, hook or processing, or too little training"
        )
    if judged["ce_recovered"] < cfg.min_recovered:
        fail(
            f"gate: {judged['ce_recovered']:.2f} of the cross-entropy is recovered (at least --min-recovered {cfg.min_recovered}): wrong model, hook or processing, or too little training"
        )
    if math.isnan(judged["ce_recovered"]):
        print(f"{yellow}removing {hook} costs this model nothing: cross-entropy recovered has no meaning here{endc}")
    bins, edges = np.linspace(-6, 0, 61), np.linspace(0, 1, 51)
    firing = go.Figure(
        go.Bar(
            x=bins[:-1] + 0.05,
            y=np.histogram(np.log10(np.maximum(density, 1e-6)), bins)[0],
            hovertemplate="10^%{x:.1f} of tokens: %{y} features<extra></extra>",
        )
    )
    show(
        firing.update_layout(
            title=f"How often features fire ({about}; n = {judged['n_tokens']:,} tokens; dead ones at -6)",
            xaxis_title="log10 share of tokens",
            yaxis_title="features",
        ),
        "sae_probe/density",
    )
    cosines = {
        label: array(neighbours(x).max(1).values)
        for label, x in (("decoder rows", sae.W_dec), ("random directions", t.randn_like(sae.W_dec)))
    }
    show(
        line(
            {label: np.histogram(x, edges)[0] / len(x) for label, x in cosines.items()},
            f"Cosine of each decoder row with its nearest ({about})",
            "largest cosine with another",
            "share of features",
            edges[:-1] + 0.01,
            dashed=["random directions"],
        ),
        "sae_probe/decoder_cosine",
    )
    numbers |= {
        "nearest_cosine": cosines["decoder rows"].mean(),
        "nearest_cosine_random": cosines["random directions"].mean(),
    }

#%% Labelled tokens of the world: the codes of this SAE and of a random-weight model's, neurons and the residual stream of every layer
if __name__ == "__main__":
    rng = Random(cfg.seed)
    prompts = [p for task in FACTS for p in rng.sample(fact_prompts(read_countries(), task, True), cfg.sentences)] + [
        DRAW[task](rng, True) for task in ("ioi", "gender", "agreement") for _ in range(cfg.sentences)
    ]
    labelled = label_sentences(tokenizer, prompts, judging_rows(corpus, 60, 64, cfg.seed + 1)[:, 1:], 6000, cfg.seed)
    residual = [act_name("resid_pre", layer) for layer in range(model.cfg.n_layers)] + [
        act_name("resid_post", model.cfg.n_layers - 1)
    ]
    layer = int(re.search(r"\d+", hook)[0]) if "blocks" in hook else model.cfg.n_layers - 1
    neurons = act_name("post", max(0, layer - 1) if "pre" in hook else layer)
    found = harvest_labelled(
        model,
        labelled,
        list(dict.fromkeys([*residual, *[neurons] * (neurons in hook_points(model)), hook])),
        bos,
        device,
    )
    sources = {"features": sparse(sae.encode(found[hook].to(device)))}
    if neurons in found:
        sources["neurons"] = csr_matrix(array(found[neurons]))
    if cfg.random_baseline:
        twin = random_twin(model, name, device, cfg.seed)
        twin_sae = fit_sae(twin, variant(f"topk:::{hook}", cfg), corpus, f"{name} with random weights", device)
        sources["features of random weights"] = sparse(
            twin_sae.encode(harvest_labelled(twin, labelled, [hook], bos, device)[hook].to(device))
        )
    print(
        f"{gray}{len(labelled.role)} labelled tokens: "
        + ", ".join(f"{role or 'none'} {(labelled.role == role).sum()}" for role in np.unique(labelled.role))
        + endc
    )

#%% Which concept has a feature of its own, how many features it takes, and what a whole layer or nothing at all would say
if __name__ == "__main__":
    dense, table, best_auroc, probes, tags = (
        {place: array(found[place]) for place in [*(p for p in residual if p != hook), hook]},
        [],
        {},
        {},
        {},
    )
    for concept_name, concept in tqdm(labelled.concepts.items(), desc="probes", **BAR):
        runs = [run_probes(concept, sources, dense, cfg.seed + s) for s in range(cfg.seeds)]
        mean = lambda method, which="test": float(np.nanmean([run[method][which] for run in runs if method in run]))
        bounds = {
            method: np.nanpercentile(
                np.concatenate([run[method]["boot"] for run in runs if method in run]), (2.5, 97.5)
            ).tolist()
            for method in runs[0]
        }
        needed = next((k for k in KS if mean(f"{k} features", "validation") >= 0.95), None)
        best_layer, unit = (
            max(residual, key=lambda place: mean(f"dense {place}", "validation")),
            runs[0]["single features"]["units"][0],
        )
        tags.setdefault(unit, []).append(concept_name)
        best_auroc[concept_name] = mean("single features")
        probes[concept_name] = {
            "feature": unit,
            "features_needed": needed,
            "features": runs[0][f"{needed or KS[-1]} features"]["units"],
            "best_layer": best_layer,
            "entities": len(set(concept.group[concept.y])),
            "auroc": {method: mean(method) for method in bounds},
            "interval": bounds,
        }
        said = lambda method: (
            f"{mean(method):.3f} [{bounds[method][0]:.2f}, {bounds[method][1]:.2f}]" if method in bounds else ""
        )
        table.append(
            [
                concept_name,
                f"f{unit} {said('single features')}",
                f"{needed}: {said(f'{needed} features')}" if needed else f"not {KS[-1]}: {said(f'{KS[-1]} features')}",
                *(
                    said(method)
                    for method in (
                        "8 features",
                        "8 neurons",
                        "8 features of random weights",
                        f"difference of means {hook}",
                        f"dense {hook}",
                        "shuffled labels",
                    )
                ),
                f"{best_layer} {mean(f'dense {best_layer}'):.3f}",
            ]
        )
    print(
        f"{purple}=== Test AUROC [95% interval over {cfg.seeds} splits of the entities and resampled entities]; features, k and layer chosen on validation ==={endc}"
    )
    print(
        tabulate(
            table,
            headers=[
                "concept",
                "one feature",
                "features for 0.95",
                "8 features",
                "8 neurons",
                "8 of random weights",
                "difference of means",
                "dense probe",
                "shuffled labels",
                "best layer, dense",
            ],
        )
    )
    compare = lambda methods, names, what: (
        imshow(
            np.array([[probes[c]["auroc"].get(m, np.nan) - 0.5 for m in methods] for c in probes]),
            f"Test AUROC - 0.5 by concept and {what} ({about}; {cfg.seeds} splits by entity)",
            what,
            "concept",
            names,
            list(probes),
            value="AUROC - 0.5",
        )
        .update_layout(height=700)
        .update_yaxes(dtick=1)
    )
    methods = [m for m in bounds if not m.startswith(("dense", "difference")) or m.endswith(hook)]
    show(compare(methods, methods, "method"), "sae_probe/probes")
    show(compare([f"dense {place}" for place in residual], residual, "layer of a dense probe"), "sae_probe/layers")
    numbers |= {"best_auroc": best_auroc, "probes": probes}

#%% What those features fire on, and every feature on a page
if __name__ == "__main__":
    alive = [int(f) for f in np.argsort(-density) if density[f] > 0]
    entries = {
        entry["id"]: entry
        for entry in read_features(
            model,
            sae,
            codes,
            rows,
            tokenizer,
            sorted({*alive[:1024], *(f for p in probes.values() for f in (p["feature"], *p["features"]))}),
        )
    }
    for f, concepts in tags.items():
        entries[f]["concepts"] = [f"{c} {best_auroc[c]:.2f}" for c in concepts]
    mark = lambda words, shades: "".join(
        f"{orange}{word}{endc}" if shade > 30 else word for word, shade in zip(words, shades)
    )
    for c in ("country", "capital", "name", "place", "object"):
        for f in [probes[c]["feature"]] if best_auroc[c] >= 0.95 else probes[c]["features"][:4]:
            print(
                f"{purple}{c}{endc} {cyan}f{f}{endc} "
                + " | ".join(mark(*context) for context in entries[f]["contexts"][:3])
            )
    show_page(
        feature_page(
            list(entries.values()), f"{len(entries)} features: {about}, {judged['n_tokens']:,} held-out tokens"
        ),
        "sae_probe/features",
    )

#%% Other sparsities, widths, kinds and layers: what they cost, and whether they have the features that this one lacks
if __name__ == "__main__" and not pretrained:
    singles, points = {label_of(cfg): best_auroc}, {label_of(cfg): judged}
    for other in (variant(text, cfg) for text in cfg.variants):
        other_sae = fit_sae(model, other, corpus, name, device)
        points[label_of(other)], _ = judge(model, other_sae, rows, len(bos))
        x = {
            "features": sparse(
                other_sae.encode(
                    found.get(other.hook, harvest_labelled(model, labelled, [other.hook], bos, device)[other.hook]).to(
                        device
                    )
                )
            )
        }
        singles[label_of(other)] = {
            c: float(
                np.mean([run_probes(concept, x, {}, cfg.seed + s)["single features"]["test"] for s in range(cfg.seeds)])
            )
            for c, concept in labelled.concepts.items()
        }
    print(f"{purple}=== Reopened SAEs on held-out text, and the test AUROC of their best single features ==={endc}")
    print(
        tabulate(
            [
                [
                    label.removesuffix(f", {cfg.hook}"),
                    *(point[key] for key in ("l0", "ce_recovered", "fvu", "dead_fraction")),
                    *singles[label].values(),
                ]
                for label, point in points.items()
            ],
            headers=["SAE", "L0", "CE recovered", "FVU", "dead", *best_auroc],
            floatfmt=".3f",
        )
    )
    fig = go.Figure(
        [
            go.Scatter(
                x=[p["l0"]],
                y=[p["ce_recovered"]],
                name=label,
                mode="markers",
                marker=dict(size=12),
                hovertemplate=f"{label}<br>L0 %{{x:.1f}}<br>CE recovered %{{y:.4f}}<br>FVU {p['fvu']:.3f}, dead {p['dead_fraction']:.3f}<extra></extra>",
            )
            for label, p in points.items()
        ]
    )
    show(
        fig.update_layout(
            title=f"What sparsity costs (reopened SAEs, {judged['n_tokens']:,} held-out tokens; {name})",
            xaxis_title="L0 (features per token)",
            yaxis_title="cross-entropy recovered (mean ablation)",
            showlegend=True,
        ),
        "sae_probe/pareto",
    )
    numbers["variants"] = {label: point | {"single_feature_auroc": singles[label]} for label, point in points.items()}

#%% Steering: countries are moved to another continent, against random features and directions of the same length

if __name__ == "__main__":
    continents = [c.removeprefix("in ") for c in labelled.concepts if c.startswith("in ")]
    ids = t.tensor([tokenizer.encode(f" {c}", add_special_tokens=False).ids[0] for c in continents], device=device)
    located, strengths, generator = (
        labelled.concepts[f"in {continents[0]}"],
        (0.5, 1.0, 2.0, 4.0),
        t.Generator().manual_seed(cfg.seed),
    )
    part, home = split(located, cfg.seed), np.stack([labelled.concepts[f"in {c}"].y for c in continents]).argmax(0)
    asked = [
        p for p in fact_prompts(read_countries(), "continent", True) if p.labels["country"] in located.group[part == 2]
    ]
    tokens, last, places = (x.to(device) for x in country_prompts(tokenizer, asked, bos))
    truth = t.tensor([continents.index(p.labels["continent"]) for p in asked], device=device)
    means = t.stack([found[hook][located.index[(part == 0) & (home == c)]].mean(0) for c in range(len(continents))]).to(
        device
    )
    distance = t.pdist(means).mean()
    closest = (F.normalize(sae.W_dec.float(), dim=1) @ F.normalize(means - means.mean(0), dim=1).T).argmax(0).tolist()
    drawn = [alive[i] for i in t.randint(len(alive), (10,), generator=generator).tolist()]
    directions: dict[str, list[Tensor]] = {  # for each target, or for all: (prompt or 1, 1, d_in)
        "difference of means": [(m - means[truth])[:, None] for m in means],
        "closest feature": list(sae.W_dec[closest].float()[:, None, None]),
        "random features": list(sae.W_dec[drawn].float()[:, None, None]),
        "random directions": list(t.randn(10, 1, 1, sae.cfg.d_in, generator=generator).to(device)),
    }

    @t.no_grad()
    def answers(delta: Callable[[Tensor], Tensor] = t.zeros_like) -> Tensor:
        """(prompt, continent) logits less the right continent's, after delta(x) is added from the country on."""
        logits = run_with_hooks(model, tokens, [(hook, put(lambda x: x + delta(x) * places))])[
            t.arange(len(tokens)), last
        ][:, ids].float()
        return logits - logits.gather(1, truth[:, None])

    def effect(kind: str, strength: float) -> tuple[float, float]:
        """Mean rise of logit(target) - logit(right), and share of answers that become the target, over targets elsewhere."""
        rises, turned = [], []
        for i, direction in enumerate(directions[kind]):
            after = answers(lambda x: strength * distance * F.normalize(direction, dim=-1))
            for c in range(len(continents)) if "random" in kind else [i]:
                rises.append((after - plain)[truth != c, c].mean().item())
                turned.append((after.argmax(1) == c)[truth != c].float().mean().item())
        return float(np.mean(rises)), float(np.mean(turned))

    plain = answers()
    steered = {
        kind: [effect(kind, strength) for strength in strengths] for kind in tqdm(directions, desc="steering", **BRIEF)
    }
    best = max(("difference of means", "closest feature"), key=lambda kind: steered[kind][1][0])
    by_chance = max(steered[kind][1][0] for kind in directions if "random" in kind)
    print(
        f"{purple}=== {len(asked)} prompts about test countries, moved towards each other continent from the country on; strength 1 is the mean distance of two continents ({distance:.1f}) ==={endc}"
    )
    print(
        tabulate(
            [[kind, *(x[0] for x in row), *(x[1] for x in row)] for kind, row in steered.items()],
            headers=["", *(f"logits at {s:g}" for s in strengths), *(f"turned at {s:g}" for s in strengths)],
            floatfmt=".3f",
        )
    )
    show(
        line(
            {kind: [x[0] for x in row] for kind, row in steered.items()},
            f"Steering continents at {hook} (n = {len(asked)} prompts x {len(continents) - 1} targets; {name})",
            "strength (mean distances of two continents)",
            "rise of logit(target) - logit(right)",
            list(strengths),
            markers=True,
            dashed=["random features", "random directions"],
        ),
        "sae_probe/steering",
    )
    numbers |= {
        "steering_effect": steered[best][1][0],
        "steering_effect_random": by_chance,
        "steering_direction": best,
        "steering": {kind: dict(zip(map(str, strengths), row)) for kind, row in steered.items()},
    }

#%% Concept features added, clamped, ablated and projected out: what it does to the loss and to the right continent, against the same lengths elsewhere
if __name__ == "__main__":
    text, table = rows[:24], []
    unedited, right = (
        loss_of(model, text, []),
        lambda logits: -logits.logsumexp(-1).mean().item(),
    )  # logits less the right one's
    for f in tqdm(
        dict.fromkeys([probes["country"]["feature"], probes["name"]["feature"], closest[0]]), desc="edits", **BRIEF
    ):
        for how in ("add", "clamp", "ablate", "project"):
            own = lambda x: change(sae, f, how, x, float(codes[:, [f]].max()))
            edits = [
                own,
                *(
                    lambda x, v=v: own(x).norm(dim=-1, keepdim=True) * F.normalize(v, dim=-1)
                    for v in directions["random features"][:2] + directions["random directions"][:2]
                ),
            ]
            cost = [loss_of(model, text, [(hook, put(lambda x: x + edit(x), len(bos)))]) - unedited for edit in edits]
            moved = [right(answers(edit)) - right(plain) for edit in edits]
            table.append(
                [
                    f"f{f} {', '.join(tags.get(f, []))}",
                    how,
                    cost[0],
                    float(np.mean(cost[1:])),
                    moved[0],
                    float(np.mean(moved[1:])),
                ]
            )
    print(
        tabulate(
            table,
            headers=["feature", "edit", "loss", "loss, random", "log p(right of the continents)", "random"],
            floatfmt="+.4f",
        )
    )
    numbers["edits"] = table

#%% One answer traced to features by gradient x activation, the error a node of its own; checked by ablating each node for real
if __name__ == "__main__":
    tokens = t.tensor([bos + tokenizer.encode(cfg.prompt, add_special_tokens=False).ids], device=device)
    with t.no_grad():
        top = model(tokens)[0, -1].float().softmax(-1).topk(2)
    weights = F.one_hot(top.indices, model.W_U.shape[1]).float()
    traced, falls = attribute(model, sae, tokens, weights[0] - weights[1])
    assert traced["moved"] < 1e-3 * max(1.0, traced["value"].abs()), (
        f"features + error do not rebuild the activation: the metric moves by {traced['moved']}"
    )
    labels, (answer, rival) = (
        label_tokens(str_tokens(tokenizer, tokens[0])),
        (visible(x) for x in str_tokens(tokenizer, top.indices)),
    )
    nodes = [divmod(i, sae.cfg.d_sae) for i in traced["features"].abs().flatten().topk(20).indices.tolist()]
    table = [
        [f"f{f} {labels[pos]}", ", ".join(tags.get(f, [])), traced["features"][pos, f].item(), falls(pos, f)]
        for pos, f in nodes
    ] + [[f"error {labels[pos]}", "", x, falls(pos, None)] for pos, x in enumerate(traced["error"].tolist())]
    agreement = float(np.corrcoef([row[2] for row in table], [row[3] for row in table])[0, 1])
    print(
        f"{purple}=== Why '{answer}' ({top.values[0]:.2f}) and not '{rival}' after {cfg.prompt!r}: {traced['value']:.2f} logits; by gradient {traced['features'].sum():.2f} from features, {traced['error'].sum():.2f} from errors ==={endc}"
    )
    print(
        tabulate(
            sorted(table, key=lambda row: -abs(row[3]))[:15],
            headers=["node", "concept", "gradient x activation", "falls when ablated"],
            floatfmt=".3f",
        )
    )
    fig = go.Figure(
        [
            go.Bar(x=[row[0] for row in table], y=[row[i] for row in table], name=label)
            for i, label in ((2, "gradient x activation"), (3, "ablated"))
        ]
    )
    show(
        fig.update_layout(
            title=f"Nodes at {hook} behind '{answer}' over '{rival}' after {cfg.prompt!r} (r = {agreement:.2f}; {name})",
            xaxis_title="feature or error at token",
            yaxis_title="logit difference",
        ),
        "sae_probe/attribution",
    )
    numbers["attribution"] = {
        "prompt": cfg.prompt,
        "answer": answer,
        "over": rival,
        "value": traced["value"],
        "from_features": traced["features"].sum(),
        "from_errors": traced["error"].sum(),
        "ablation_correlation": agreement,
    }

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    save_results("sae_probe", cfg, **numbers)
    takes = ", ".join(
        f"{c} {probes[c]['features_needed'] or f'more than {KS[-1]}'}"
        for c in ("country", "capital", "name", "place", "object")
    )
    print(
        f"{green}L0 {judged['l0']:.1f}, {judged['ce_recovered']:.1%} of the cross-entropy recovered, {judged['dead_fraction']:.1%} dead. Features for AUROC 0.95 on new entities: {takes}."
    )
    best_single = max(
        max(x[f"in {c}"] for c in continents) for x in (singles.values() if not pretrained else [best_auroc])
    )
    print(
        f"Continents: the best single feature of any SAE here reaches {best_single:.2f}, a dense probe {min(probes[f'in {c}']['auroc'][f'dense {hook}'] for c in continents):.2f} or more. Steering by {best}: {steered[best][1][0]:+.1f} logits, at random {by_chance:+.1f}.{endc}"
    )
