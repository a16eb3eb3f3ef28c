"""
Which directions carry which concepts? A sparse autoencoder, trained here or loaded by its own metadata, is judged,
probed for known concepts, and read as a page.
The methods are sae.loss_terms (the objectives of --architecture own and own_l1; the default's is SAELens's batchtopk),
features.judge and probes.run_probes. A concept of your own: labelled.concepts["mine"] = Concept(...), after it is labelled below.
"""

import re
from dataclasses import dataclass

from utils import (  # first: sets OpenMP's variables before torch is loaded
    BAR,
    cyan,
    endc,
    fail,
    gray,
    green,
    orange,
    pick_device,
    purple,
    save_results,
    set_seed,
)
from plots import array, bar, feature_page, imshow, line, show, show_page
from hooks import act_name, hook_points
from launch import flags
from sae import GPT2_PRESET, SAEConfig, fit_sae, label_of, losses_of, settings_like, variant, with_sparsity
from features import firing_order, judge, nearest_cosines, open_subject, read_features, require_good_sae, sparse
from lens import knows_world
from probes import (
    KS,
    harvest_labelled,
    labelled_tokens,
    make_trial,
    method_in_words,
    random_twin,
    run_probes,
    single_feature,
    summarise_splits,
    without_one_sided,
)
from llama_block import Llama

import numpy as np
import plotly.graph_objects as go
import torch as t
from scipy.sparse import csr_matrix
from tabulate import tabulate
from tqdm import tqdm


#%% Settings: the shell sets them by flags, a notebook edits them here; those of the SAE are SAEConfig's, in sae.py
@dataclass
class Config(SAEConfig):
    # more SAEs for the Pareto figure, as architecture:sparsity:width:hook; finished ones are not trained again
    variants: tuple[str, ...] = ("topk:8", "matryoshka", "batchtopk:14:1024")
    sentences: int = 150  # labelled sentences of each kind
    seeds: int = 3  # splits of the entities
    random_baseline: bool = True  # also an SAE of a model with random weights of the same shape
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=Config(**GPT2_PRESET, variants=(), random_baseline=False))
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    if cfg.sentences < 10 or cfg.seeds < 1:
        fail("--sentences is 10 or more, --seeds 1 or more")

#%% The model, its text and the SAE: trained and opened again, or loaded with what its metadata asks for
if __name__ == "__main__":
    pretrained = bool(cfg.sae or cfg.release)
    if not pretrained:
        cfg = with_sparsity(cfg)
    subject = open_subject(cfg, (Llama,), device)
    model = subject.model
    sae = subject.sae
    hook = subject.hook

#%% Judged on held-out text, and the gate: no feature is read of an SAE that does not rebuild what the model lives on
if __name__ == "__main__":
    judged, codes = judge(model, sae, subject.rows, subject.first, subject.corpus.bos)
    print(f"{purple}=== {subject.about}, as reopened from disk, on {judged['n_tokens']:,} held-out tokens ==={endc}")
    table = [[key.replace("_", " "), value] for key, value in judged.items()]
    print(cyan + tabulate(table, headers=["measure", "value"], floatfmt=".4f") + endc)
    require_good_sae(judged, cfg, hook)
    density = codes.getnnz(0) / judged["n_tokens"]  # share of tokens, by feature
    nearest_cosines = {
        "decoder rows": array(nearest_cosines(sae.W_dec)),
        "random directions": array(nearest_cosines(t.randn_like(sae.W_dec))),
    }
    numbers = judged | {
        "nearest_cosine": nearest_cosines["decoder rows"].mean(),
        "nearest_cosine_random": nearest_cosines["random directions"].mean(),
    }

#%% ... what it was trained to make small, step by step (--architecture own, own_l1)
if __name__ == "__main__":
    losses = losses_of(sae)
    if losses:
        l0_by_step = losses.pop("L0")
        last = ", ".join(f"{term} {by_step[-1]:.2f}" for term, by_step in losses.items())
        print(f"{cyan}at the last of {len(l0_by_step)} steps: {last}, L0 {l0_by_step[-1]:.1f}{endc}")
        curves = {**losses, "L0 (features per row)": l0_by_step}
        above_zero = {name: np.where(np.array(y) > 0, y, np.nan) for name, y in curves.items()}  # none dead: no revival
        fig = line(
            above_zero,
            title=f"What training made small, step by step ({subject.about}; rows of norm sqrt(d_in))",
            xlabel="step",
            ylabel="loss per row; features per row",
            dashed=["L0 (features per row)"],
        )
        fig.update_yaxes(type="log", dtick="D2")
        show(
            fig,
            "sae_probe/losses",
            "The terms add up to the total; L0 is counted, not a loss. Where none is dead, none is revived.",
        )
        numbers["losses"] = losses

#%% ... how often its features fire
if __name__ == "__main__":
    bins = np.linspace(-6, 0, 61)
    n_features, _ = np.histogram(np.log10(np.maximum(density, 1e-6)), bins)
    fig = bar(
        {"features": n_features},
        title=f"How often features fire ({subject.about}; n = {judged['n_tokens']:,} tokens; dead ones at -6)",
        xlabel="log10 share of tokens",
        ylabel="features",
        x=list(bins[:-1] + 0.05),
        hover="10^%{x:.1f} of tokens: %{y} features<extra></extra>",
    )
    show(
        fig,
        "sae_probe/density",
        "Left: features that hardly ever fire; right: on every other token. A healthy dictionary has its bulk in between.",
    )

#%% ... and whether they point the same way
if __name__ == "__main__":
    edges = np.linspace(0, 1, 51)
    fig = line(
        {label: np.histogram(x, edges)[0] / len(x) for label, x in nearest_cosines.items()},
        title=f"Cosine of each decoder row with its nearest ({subject.about})",
        xlabel="largest cosine with another",
        ylabel="share of features",
        x=edges[:-1] + 0.01,
        dashed=["random directions"],
    )
    show(
        fig,
        "sae_probe/decoder_cosine",
        "Right of the dashed line features point alike more than chance makes directions do: they share a "
        "concept, or split one.",
    )

#%% Labelled tokens: the codes of this SAE and of a random-weight model's, neurons, every layer's residual stream
if __name__ == "__main__":
    labelled = labelled_tokens(subject.tokenizer, subject.corpus, cfg.sentences, cfg.seed, knows_world(model))
    labelled = without_one_sided(labelled, [cfg.seed + s for s in range(cfg.seeds)])
    if not labelled.concepts:
        fail("no concept has enough entities for a split: give more --sentences")
    last_layer = model.cfg.n_layers - 1
    residual = [act_name("resid_pre", layer) for layer in range(model.cfg.n_layers)]
    residual.append(act_name("resid_post", last_layer))
    layer = int(re.search(r"\d+", hook)[0]) if "blocks" in hook else last_layer
    # those of the MLP that wrote last before the hook (of its own layer where the hook stands inside a block)
    neurons = act_name("post", max(0, layer - 1) if "pre" in hook else layer)
    wanted = [*residual, hook]
    if neurons in hook_points(model):
        wanted.insert(-1, neurons)
    found = harvest_labelled(model, labelled, list(dict.fromkeys(wanted)), subject.bos, device)
    sources = {"features": sparse(sae.encode(found[hook].to(device)))}
    if neurons in found:
        sources["neurons"] = csr_matrix(array(found[neurons]))
    if cfg.random_baseline:
        twin = random_twin(model, subject.name, (Llama,), device, cfg.seed)
        twin_cfg = settings_like(sae, cfg, judged["l0"]) if pretrained else cfg
        twin_sae = fit_sae(twin, twin_cfg, subject.corpus, f"{subject.name} with random weights", device)
        of_twin = harvest_labelled(twin, labelled, [hook], subject.bos, device)[hook]
        sources["features of random weights"] = sparse(twin_sae.encode(of_twin.to(device)))
    roles = [f"{role or 'none'} {(labelled.role == role).sum()}" for role in np.unique(labelled.role)]
    print(f"{gray}{len(labelled.role)} labelled tokens: {', '.join(roles)}{endc}")

#%% Which concept has a feature of its own, how many features it takes, and what a whole layer or nothing would say
if __name__ == "__main__":
    dense = {place: array(found[place]) for place in residual if place != hook}
    dense[hook] = array(found[hook])  # last: its labels are the ones that run_probes shuffles
    probes = {}
    for name, concept in tqdm(labelled.concepts.items(), desc="probes", **BAR):
        runs = [run_probes(concept, sources, dense, cfg.seed + s) for s in range(cfg.seeds)]
        probes[name] = summarise_splits(runs, residual)
        probes[name]["entities"] = len(set(concept.group[concept.y]))
    best_auroc = {name: probe["auroc"]["single features"] for name, probe in probes.items()}
    methods = list(dict.fromkeys(method for probe in probes.values() for method in probe["auroc"]))
    numbers |= {"best_auroc": best_auroc, "probes": probes}

#%% ... as a table
if __name__ == "__main__":

    def said(probe: dict, method: str) -> str:
        if method not in probe["auroc"]:
            return ""
        low, high = probe["interval"][method]
        return f"{probe['auroc'][method]:.3f} [{low:.2f}, {high:.2f}]"

    columns = {
        "8 features": "8 features",
        "8 neurons": "8 neurons",
        "8 of random weights": "8 features of random weights",
        "difference of means": f"difference of means {hook}",
        "dense probe": f"dense {hook}",
        "shuffled labels": "shuffled labels",
    }
    table = []
    for name, probe in probes.items():
        needed = probe["features_needed"]
        count = f"{needed}" if needed else f"not {KS[-1]}"
        best_layer = probe["best_layer"]
        row = [
            name,
            f"f{probe['feature']} {said(probe, 'single features')}",
            f"{count}: {said(probe, f'{needed or KS[-1]} features')}",
            *(said(probe, method) for method in columns.values()),
            f"{best_layer} {probe['auroc'][f'dense {best_layer}']:.3f}",
        ]
        table.append(row)
    print(
        f"{purple}=== Test AUROC [95% interval over {cfg.seeds} splits of the entities and resampled entities]; "
        f"features, k and layer chosen on validation ==={endc}"
    )
    headers = ["concept", "single feature", "features for 0.95", *columns, "best layer, dense"]
    print(cyan + tabulate(table, headers=headers) + endc)

#%% ... and as maps, by method and by layer
if __name__ == "__main__":

    def concept_map(shown: list[str], names: list[str], what: str) -> go.Figure:
        above_chance = [[probe["auroc"].get(method, np.nan) - 0.5 for method in shown] for probe in probes.values()]
        fig = imshow(
            np.array(above_chance),
            title=f"Test AUROC - 0.5 by concept and {what} ({subject.about}; {cfg.seeds} splits by entity)",
            xlabel=what,
            ylabel="concept",
            x=names,
            y=list(probes),
            value="AUROC - 0.5",
        )
        return fig.update_layout(height=max(500, 100 + 22 * len(probes))).update_yaxes(dtick=1)

    of_hook = [m for m in methods if not m.startswith(("dense", "difference")) or m.endswith(hook)]
    show(
        concept_map(of_hook, [method_in_words(m) for m in of_hook], "method"),
        "sae_probe/probes",
        "0.5: the concept is told without a mistake in entities that it was not learned on; 0: chance. Compare single "
        "features with the whole stream, and with the shuffled labels.",
    )
    of_layers = [f"dense {place}" for place in residual]
    show(
        concept_map(of_layers, residual, "layer of a dense probe"),
        "sae_probe/layers",
        "Where in the model a concept can be read by a linear probe.",
    )

#%% What those features fire on
if __name__ == "__main__":
    of_concepts = [f for probe in probes.values() for f in (probe["feature"], *probe["features"])]
    chosen = sorted({*firing_order(codes)[:1024], *of_concepts})
    read = read_features(model, sae, codes, subject.rows, subject.tokenizer, chosen, judged["n_tokens"])
    entries = {entry["id"]: entry for entry in read}
    for name, probe in probes.items():
        entries[probe["feature"]]["concepts"].append(f"{name} {best_auroc[name]:.2f}")

    def marked(words: list[str], shades: list[int]) -> str:
        return "".join(f"{orange}{word}{endc}" if shade > 30 else word for word, shade in zip(words, shades))

    for name in ("country", "capital", "name", "place", "object"):
        has_its_own = best_auroc[name] >= 0.95
        for f in [probes[name]["feature"]] if has_its_own else probes[name]["features"][:4]:
            contexts = [marked(words, shades) for words, shades in entries[f]["contexts"][:3]]
            print(f"{purple}{name}{endc} {cyan}f{f}{endc} {' | '.join(contexts)}")

#%% ... and every feature on a page
if __name__ == "__main__":
    title = f"{len(entries)} features: {subject.about}, {judged['n_tokens']:,} held-out tokens"
    show_page(
        feature_page(list(entries.values()), title),
        "sae_probe/features",
        "Features that stand for a concept come first. Each shows how often and how strongly it fires, the texts in which it "
        "does, and the tokens that it promotes.",
    )

#%% Other sparsities, widths, kinds and layers: what they cost, and whether they have the features that this one lacks
if __name__ == "__main__" and not pretrained:

    def labelled_codes(other_sae: object, place: str) -> csr_matrix:
        if place not in found:
            found.update(harvest_labelled(model, labelled, [place], subject.bos, device))
        return sparse(other_sae.encode(found[place].to(device)))

    variants = {label_of(cfg): judged | {"single_feature_auroc": best_auroc}}
    for text in cfg.variants:
        other = variant(text, cfg)
        other_sae = fit_sae(model, other, subject.corpus, subject.name, device)
        other_judged, _ = judge(model, other_sae, subject.rows, subject.first, subject.corpus.bos)
        other_codes = labelled_codes(other_sae, other.hook)
        other_auroc = {}
        for name, concept in labelled.concepts.items():
            trials = [make_trial(concept, cfg.seed + s) for s in range(cfg.seeds)]
            by_split = [single_feature(trial, other_codes)["test"] for trial in trials]
            other_auroc[name] = float(np.nanmean(by_split))
        variants[label_of(other)] = other_judged | {"single_feature_auroc": other_auroc}
    columns = {}
    for label, point in variants.items():
        costs = [point[key] for key in ("l0", "ce_recovered", "fvu", "dead_fraction")]
        columns[label.removesuffix(f", {cfg.hook}")] = [*costs, *point["single_feature_auroc"].values()]
    rows = ["L0", "CE recovered", "FVU", "dead", *(f"AUROC: {name}" for name in best_auroc)]
    print(f"{purple}=== Reopened SAEs on held-out text, and the test AUROC of their best single features ==={endc}")
    print(cyan + tabulate({"": rows} | columns, headers="keys", floatfmt=".3f") + endc)
    numbers["variants"] = variants

#%% ... as a Pareto figure: what sparsity costs
if __name__ == "__main__" and not pretrained:
    fig = go.Figure()
    for label, point in variants.items():
        costs = f"FVU {point['fvu']:.3f}, dead {point['dead_fraction']:.3f}"
        hover = f"{label}<br>L0 %{{x:.1f}}<br>CE recovered %{{y:.4f}}<br>{costs}<extra></extra>"
        fig.add_trace(
            go.Scatter(
                x=[point["l0"]],
                y=[point["ce_recovered"]],
                text=[label.removesuffix(f", {cfg.hook}")],
                textposition="bottom center",
                mode="markers+text",
                marker={"size": 12},
                hovertemplate=hover,
            )
        )
    fig.update_layout(
        title=f"What sparsity costs (reopened SAEs, {judged['n_tokens']:,} held-out tokens; {subject.name})",
        xaxis_title="L0 (features per token)",
        yaxis_title="cross-entropy recovered (mean ablation)",
        showlegend=False,
    )
    l0s = [point["l0"] for point in variants.values()]
    fig.update_xaxes(range=[0.6 * min(l0s), 1.3 * max(l0s)])  # room for the names
    show(
        fig,
        "sae_probe/pareto",
        "Left and high is good: few features at a token, and the model goes on nearly as before when they stand for its stream.",
    )

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    save_results("sae_probe", cfg, **numbers)
    kinds = [name for name in ("country", "capital", "name", "place", "object") if name in probes]
    needed = {name: probes[name]["features_needed"] for name in kinds}
    takes = ", ".join(f"{name} {k or f'more than {KS[-1]}'}" for name, k in needed.items())
    continents = [name for name in probes if name.startswith("in ")]
    saes = [best_auroc] if pretrained else [point["single_feature_auroc"] for point in variants.values()]
    best_single = max((auroc[name] for auroc in saes for name in continents), default=np.nan)
    worst_dense = min((probes[name]["auroc"][f"dense {hook}"] for name in continents), default=np.nan)
    print(
        f"{green}L0 {judged['l0']:.1f}, {judged['ce_recovered']:.1%} of the cross-entropy recovered, "
        f"{judged['dead_fraction']:.1%} dead. Features for AUROC 0.95 on new entities: {takes}."
    )
    print(
        f"Continents: the best single feature of any SAE here reaches {best_single:.2f}, "
        f"a dense probe {worst_dense:.2f} or more. What happens when we push along them: feature_steering.py.{endc}"
    )
