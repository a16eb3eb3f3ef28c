"""
Which activations cause the answer? Activation patching, causal tracing, attention knock-out and ablations, on our own
models and any TransformerBridge.
The methods are in interventions.py (activation_patch and its fast form sweep, causal_trace, attention_knock_out) and
ablations.py (ablate and its fast form ablation_effects).
"""

from dataclasses import dataclass, replace
from functools import partial
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
    on_base,
)
from plots import bar, imshow, label_tokens, line, show, show_attention
from hooks import act_name, has_heads, has_qkv, hook_points, in_words, is_streamed, missed_gates
from data import text_of
from weights import about_bos, open_model, text_tokenizer, token_text
from train import keep_freed_memory
from launch import flags
from logit_attribution import about_norms
from heads import attention_in, attention_patterns
from world import corpus_for, judging_rows
from pairs import (
    UNITS,
    baselines,
    by_groups,
    direct_attribution,
    mean_with_interval,
    normalised,
    position_masks,
    read_task,
    require_gap,
)
from interventions import (
    HEADS,
    STREAM,
    activation_patch,
    embedding_std,
    head_names,
    knock_out,
    noised_pairs,
    sweep,
    sweep_gates,
)
from ablations import Part, ablation_effects, fine_parts
from llama_block import Llama

import torch as t
import torch.nn.functional as F
from tabulate import tabulate


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str = "models/world"  # a hub name, a short name or a folder
    base: str | None = None  # a model whose config and tokenizer the weights of --model are put on
    bos: bool | None = None  # put a beginning-of-text token first; default as the model's own tokenizer says
    task: Literal["ioi", "capitals", "induction", "greater_than", "agreement", "gender"] = (
        "ioi"  # which prompts, each with an answer that is known (README: the world model)
    )
    clean: str | None = None  # a prompt of your own, with --corrupt, --answer and --wrong
    corrupt: str | None = None  # the same prompt with one thing changed, of as many tokens
    answer: str | None = None  # one token, with the space before it: " Paris"
    wrong: str | None = None  # the token that the answer is held against
    pairs: str | None = None  # or many: a CSV or JSON file with the columns clean, corrupt, answer, wrong
    metric: Literal["logit_diff", "log_prob", "kl"] = "logit_diff"  # each is written out in pairs.make_metric
    site: tuple[str, ...] = STREAM + HEADS  # activations to sweep
    positions: tuple[Natural, ...] = ()  # of the shown prompt; default all
    n: Count = 32  # pairs to look at
    held_out: Count = 100  # pairs to test on what was found
    # weights come block by block where they do not fit, always, never; then the stream alone is patched
    offload: Literal["auto", "on", "off"] = "auto"
    # text whose loss ablations are measured on: world, stdlib, a file or folder, a hub dataset;
    # default world for models/world, else stdlib
    data: str | None = None
    rows: Count = 16  # of 64 tokens of it
    memory_gb: Positive = 1.0  # cap on activations
    wandb: bool = False  # numbers and figures go to Weights & Biases too
    seed: Natural = 0  # of every draw
    dtype: DtypeName = "auto"  # of the weights; auto: bfloat16 on a GPU that has it, else float32
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


cfg = flags(Config, __doc__, hpc=Config(model="gpt2", bos=True, n=256, held_out=500, memory_gb=24.0))
device = pick_device(cfg.device)
set_seed(cfg.seed)


#%% The model and the prompts: pairs that differ in one thing, some to look at, others to test on
def texts(ids: t.Tensor) -> list[str]:
    return [token_text(model, int(i)) for i in ids]


cfg.model = on_base(cfg.model, cfg.base)
model = open_model(cfg.model, (Llama,), device, cfg.dtype, offload=cfg.offload, bos=cfg.bos).requires_grad_(False)
task, pairs, test_pairs = read_task(model, cfg)
if not is_streamed(model):
    keep_freed_memory()  # blocks that come and go would leave holes
    data, corpus = corpus_for(cfg.data, cfg.model, cfg.bos)  # for the ablations; what cannot be read is said now
    rows = judging_rows(corpus, cfg.rows, 64, cfg.seed).to(device)
metric = cfg.metric
n_layers = model.cfg.n_layers
n_heads = model.cfg.n_heads
few = pairs.take(slice(0, None, max(1, len(pairs) // 16)))  # for gates and ablations
middle = len(pairs) // 2
shown = pairs.take(slice(middle, middle + 1))

about = f"{task}, {Path(cfg.model).name}, {metric}"
units = UNITS[metric]
layer_names = [f"L{layer}" for layer in range(n_layers)]
place_names = list(pairs.places)
token_labels = label_tokens(texts(shown.clean[0]))
numbers = {}
restores = {0: "corrupt", 1: "clean"}  # what a share says at its ends
loses = {0: "clean", 1: "corrupt"}

print(f"{purple}=== {about}: {len(pairs)} pairs, {len(test_pairs)} held out ==={endc}")
tokenizer = text_tokenizer(model)
print(f"{gray}clean   {text_of(tokenizer, shown.clean[0].tolist())}")
print(f"corrupt {text_of(tokenizer, shown.corrupt[0].tolist())}")
print(f"answer  {texts(shown.answer)[0]!r}, wrong {texts(shown.wrong)[0]!r}; {about_bos(model)}{endc}")

#%% What every head attends to in the shown prompt: maps, and a page to hover
if has_heads(model) and not is_streamed(model):
    every_head = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
    others = {}
    for i in range(min(3, len(pairs))):
        one = pairs.take(slice(i, i + 1))
        for kind, prompt in {"clean": one.clean, "corrupt": one.corrupt}.items():
            written = text_of(tokenizer, prompt[0].tolist())
            others[f"{kind}: {written}"] = (texts(prompt[0]), attention_patterns(model, prompt))
    show_attention(
        attention_patterns(model, shown.clean),
        texts(shown.clean[0]),
        every_head,
        f"{Path(cfg.model).name} on clean and corrupt prompts",
        "patching/attention",
        more=others,
        ask=partial(attention_in, model, tokenizer),
    )

#%% Baselines and gates: patching nothing must change nothing, patching everything must give the clean run
clean, corrupt = baselines(model, pairs, metric, cfg.memory_gb)
test_clean, test_corrupt = baselines(model, test_pairs, metric, cfg.memory_gb)
restored = partial(normalised, clean=clean, corrupt=corrupt)
test_restored = partial(normalised, clean=test_clean, corrupt=test_corrupt)
require_gap(clean, corrupt)
gates = sweep_gates(model, few, metric, cfg.memory_gb)
worst_gate = max(gates.values())
numbers |= {"clean": clean.mean().item(), "corrupt": corrupt.mean().item(), "gates": gates}
print(
    f"{cyan}clean {clean.mean():.3f}, corrupt {corrupt.mean():.3f} (held out {test_clean.mean():.3f}, "
    f"{test_corrupt.mean():.3f}) {units}; gates: {in_words(gates)}{endc}"
)
missed = missed_gates(gates, model)
if missed:
    fail(f"gate: {missed[0]} misses; sweeps of this model cannot be believed")

#%% Who writes the answer: logit(answer) - logit(wrong), taken apart exactly in every pair (direct logit attribution)
attributed = has_qkv(model) and not is_streamed(model)
if attributed:
    parts = direct_attribution(model, pairs)
    attributed = bool((parts["error"] <= 1e-3).all())
    if not attributed:
        print(
            f"{yellow}gate: a logit's parts miss it by {parts['error'].max():.1e} (a soft cap, or half precision), so they "
            f"are left out{endc}"
        )
if attributed:
    if about_norms(model):
        print(f"{gray}{about_norms(model)}{endc}")
    by_part = {"embed": parts["embed"]}
    for layer in range(n_layers):
        for head, written in zip(head_names(model, "z"), parts["heads"][:, layer].T):
            by_part[f"L{layer}{head}"] = written
    by_part |= {f"L{layer} MLP": parts["mlp"][:, layer] for layer in range(n_layers)}
    by_part["biases"] = parts["attn_bias"].sum(1) + parts["constant"]
    writers = list(by_part)
    written, low, high = mean_with_interval(t.stack(list(by_part.values()), 1))
    assert (written.sum() - parts["logit"].mean()).abs() < 1e-3 * max(1, written.abs().max()), "a part is missing"
    strongest = written.abs().argsort(descending=True)[:12].tolist()
    logit_difference = parts["logit"].mean().item()
    numbers["direct_attribution"] = {
        name: [written[i].item(), low[i].item(), high[i].item()] for i, name in enumerate(writers)
    }
    numbers["direct_attribution_error"] = parts["error"].max().item()
    print(f"{purple}=== Who writes the answer: direct logit attribution over {len(pairs)} pairs ==={endc}")
    table = [[writers[i], written[i], f"{low[i]:+.2f} to {high[i]:+.2f}"] for i in strongest]
    print(tabulate(table, headers=["writes", "logits of answer - wrong, mean", "95% over pairs"], floatfmt="+.2f"))
    print(f"{cyan}all parts sum to {logit_difference:.2f} to within {parts['error'].max():.0e}{endc}")
if attributed and "neurons" in parts:
    neuron_means, neuron_low, neuron_high = mean_with_interval(parts["neurons"].flatten(1))
    d_mlp = parts["neurons"].shape[-1]
    table = []
    for i in neuron_means.abs().argsort(descending=True)[:8].tolist():
        layer, neuron = divmod(i, d_mlp)
        table.append([f"L{layer}N{neuron}", neuron_means[i], f"{neuron_low[i]:+.2f} to {neuron_high[i]:+.2f}"])
    numbers["neurons"] = {name: mean.item() for name, mean, _ in table}
    print(tabulate(table, headers=["neuron", "logits of answer - wrong, mean", "95% over pairs"], floatfmt="+.2f"))

#%% ... as bars of the strongest writers
if attributed:
    mean = written[strongest]
    fig = bar(
        {"logits of answer - wrong": mean},
        title=(
            f"Who writes the answer: direct logit attribution (n = {len(pairs)} pairs, {task}, {Path(cfg.model).name}; "
            f"all parts sum to {logit_difference:.2f}, intervals 95%)"
        ),
        xlabel="writer",
        ylabel="logit(answer) - logit(wrong)",
        x=[writers[i] for i in strongest],
        errors={"logits of answer - wrong": (high[strongest] - mean, mean - low[strongest])},
    )
    show(
        fig,
        "patching/direct_attribution",
        "What each head and MLP writes along the answer's direction less the wrong one's; together they are the logit "
        "difference. What a writer does through later layers is not in it.",
    )

#%% Which activations are swept: of the stream by layer and place, of the heads one by one
print(f"{purple}=== Activation patching ==={endc}")
hooked = [site for site in STREAM + HEADS if act_name(site, 0) in hook_points(model)]
if not has_qkv(model):
    hooked = [site for site in hooked if site not in ("q", "k", "v")]
if cfg.site == STREAM + HEADS and tuple(hooked) != cfg.site:
    absent = [site for site in cfg.site if site not in hooked]
    print(f"{gray}left out, since this model has no such place: {', '.join(absent)}{endc}")
    cfg = replace(cfg, site=tuple(hooked))
for site in cfg.site:
    if site not in hooked:
        fail(f"--site {site}: this model has no {act_name(site, 0)}; use some of {', '.join(hooked)}")
stream_sites = [site for site in cfg.site if site not in HEADS]
head_sites = [site for site in cfg.site if site in HEADS]

#%% Where does the answer stand in one prompt? Clean activations into the corrupt run, by layer and token
if stream_sites:
    shown_clean, shown_corrupt = baselines(model, shown, metric)
    each_position = position_masks(shown, cfg.positions)
    by_token = []
    for site in stream_sites:
        values = sweep(model, shown, site, by="pos", metric=metric, places=each_position)
        by_token.append(normalised(values, shown_clean, shown_corrupt))

#%% ... as a map of layers and tokens
if stream_sites:
    fig = imshow(
        t.stack(by_token),
        title=f"Where the answer stands in one prompt: clean activation into the corrupt run (n = 1, {about})",
        xlabel="token",
        ylabel="layer",
        x=[token_labels[int(p)] for p in each_position],
        y=layer_names,
        menu=stream_sites,
        value="share restored",
        meaning=restores,
    )
    show(
        fig,
        "patching/tokens",
        "Each cell: the activation of one layer at one token, taken from the clean run. Blue restores the clean answer; "
        "the menu chooses the place within the block.",
    )

#%% ... and in all prompts? By place, clean into corrupt (what suffices) and corrupt into clean (what is needed)
if stream_sites:
    by_place = {}
    for site in stream_sites:
        for direction in ("denoise", "noise"):
            values = sweep(model, pairs, site, "pos", metric, direction, places=pairs.places, memory_gb=cfg.memory_gb)
            by_place[f"{site}, {direction}"] = restored(values)
    numbers["by_place"] = {title: panel.tolist() for title, panel in by_place.items()}
    numbers["places"] = place_names

    first_site = stream_sites[0]
    best_restored, best_place = by_place[f"{first_site}, denoise"].max(1)
    stands_at = {
        layer_names[layer]: [place_names[best_place[layer]], best_restored[layer].item()] for layer in range(n_layers)
    }
    numbers["answer_stands_at"] = {first_site: stands_at}
    where_it_stands = (
        f"At {first_site} the answer stands at "
        f"{' '.join(f'{layer} {place} {value:.0%}' for layer, (place, value) in stands_at.items())}"
    )

#%% ... as a map of layers and places
if stream_sites:
    fig = imshow(
        t.stack([t.stack([by_place[f"{site}, denoise"], 1 - by_place[f"{site}, noise"]]) for site in stream_sites]),
        title=f"Where the answer stands in all prompts: what suffices, and what is needed (n = {len(pairs)}, {about})",
        xlabel="place",
        ylabel="layer",
        x=place_names,
        y=layer_names,
        panels=["clean into corrupt: share restored", "corrupt into clean: share lost"],
        menu=stream_sites,
        columns=2,
        value="share",
        meaning={0: "nothing changes", 1: "all of it"},
    )
    show(
        fig,
        "patching/places",
        "Left: what one clean activation restores in the corrupt run (it suffices). Right: what the corrupt one destroys "
        "in the clean run (it is needed). Where both are blue the answer passes through this place alone.",
    )

#%% Which heads matter? Each alone, at all positions; and at which places
if head_sites:
    by_head = {}
    for site in head_sites:
        for direction in ("denoise", "noise"):
            values = sweep(model, pairs, site, "head", metric, direction, memory_gb=cfg.memory_gb)
            by_head[f"{site}, {direction}"] = restored(values)
    numbers["by_head"] = {title: panel.tolist() for title, panel in by_head.items()}

    site = head_sites[0]
    values = sweep(model, pairs, site, "head pos", metric, places=pairs.places, memory_gb=cfg.memory_gb)
    head_by_place = restored(values).flatten(0, 1)

#%% ... as a map of layers and heads, of those sites where anything matters
if head_sites:
    maps = {}
    for site in head_sites:
        shares = t.stack([by_head[f"{site}, denoise"], 1 - by_head[f"{site}, noise"]])
        maps[site] = shares.repeat_interleave(n_heads // shares.shape[-1], -1)  # heads that share keys show one value
    matter = {site: shares for site, shares in maps.items() if shares.abs().max() >= 0.05}
    idle = [site for site in maps if site not in matter]
    if idle:
        print(f"{gray}no single head's {', '.join(idle)} restores or loses 5% anywhere: not drawn{endc}")
if head_sites and matter:
    fig = imshow(
        t.stack(list(matter.values())),
        title=f"Which single heads matter: what suffices, and what is needed (n = {len(pairs)}, {about})",
        xlabel="head",
        ylabel="layer",
        x=[f"H{head}" for head in range(n_heads)],
        y=layer_names,
        panels=["clean into corrupt: share restored", "corrupt into clean: share lost"],
        menu=list(matter),
        columns=2,
        value="share",
        meaning={0: "nothing changes", 1: "all of it"},
    )
    not_drawn = f" Nothing is drawn for {', '.join(idle)}: no head's there matters alone." if idle else ""
    show(
        fig,
        "patching/heads",
        "One head at a time, at all positions; the menu chooses its output z or what enters it (q, k, v, pattern)."
        + not_drawn,
    )

#%% ... and of the first site's heads and places
if head_sites:
    fig = imshow(
        head_by_place,
        title=f"At which place each head matters: its clean {head_sites[0]} into the corrupt run (n = {len(pairs)}, {about})",
        xlabel="place",
        ylabel="head",
        x=place_names,
        y=[layer + head for layer in layer_names for head in head_names(model, head_sites[0])],
        value="share restored",
        meaning=restores,
    )
    show(fig, "patching/head_places", "A row for each head, a column for each place of the prompt where it is patched.")

#%% Do the strongest heads restore the answer in pairs they were not found on? Each patched by the plain form
if head_sites:
    site = head_sites[0]
    found = by_head[f"{site}, denoise"]
    strongest_heads = []
    for i in found.flatten().argsort(descending=True)[:3].tolist():
        layer, head = divmod(i, found.shape[1])
        patch_this_head = partial(activation_patch, model, site=site, layer=layer, head=head, metric=metric)
        values = t.cat(by_groups(patch_this_head, test_pairs, 16))
        on_test_pairs = test_restored(values).item()
        strongest_heads.append([f"L{layer}{head_names(model, site)[head]}", found[layer, head].item(), on_test_pairs])
    numbers["strongest_heads"] = {site: strongest_heads}
    the_strongest = (
        f"those whose clean {site} restores most are "
        f"{', '.join(f'{head} {here:.0%} (held out {there:.0%})' for head, here, there in strongest_heads)}"
    )

#%% Where only the stream is hooked (weights that come block by block, Mamba) the story ends here
if not has_heads(model):
    save_results("patching", cfg, **numbers, worst_gate=worst_gate)
    print(
        f"{green}{where_it_stands} (share of the metric that the clean stream there restores; heads and MLPs are not "
        f"hooked here). Gates: the worst misses by {worst_gate:.0e}.{endc}"
    )
    raise SystemExit

#%% Facts: noise on the subject's embeddings, one clean activation restored (causal tracing; Meng et al. 2022)
if task == "capitals":
    subject = pairs.places["changed"]
    sigma = 3 * embedding_std(model, pairs.clean, subject)
    noised = noised_pairs(model, pairs, subject, sigma)
    noised_clean, noised_corrupt = baselines(model, noised, "log_prob")
    tracing = {}
    for site in ("resid_post", "attn_out", "mlp_out"):  # causal_trace at every layer and place
        values = sweep(model, noised, site, "pos", "log_prob", places=pairs.places, memory_gb=cfg.memory_gb)
        tracing[site] = normalised(values, noised_clean, noised_corrupt)
    numbers["places"] = place_names
    numbers["tracing"] = {site: panel.tolist() for site, panel in tracing.items()}

#%% ... as a map of layers and places
if task == "capitals":
    fig = imshow(
        t.stack(list(tracing.values())),
        title=(
            "Causal tracing: the subject is under noise, one clean activation is restored "
            f"(n = {len(pairs)}, {Path(cfg.model).name}; noise of 3 standard deviations, {sigma:.2f}; log-probability of "
            f"the answer {noised_corrupt.mean():.2f} nats noised, {noised_clean.mean():.2f} clean)"
        ),
        xlabel="place",
        ylabel="layer",
        x=place_names,
        y=layer_names,
        panels=list(tracing),
        columns=3,
        value="share restored",
        meaning={0: "noised", 1: "clean"},
    )
    show(fig, "patching/tracing", "Blue: this layer at this place holds what the noise had taken away.")

#%% Facts: which places must the answer's position look at? Attention knocked out layer by layer, and in all layers
if task == "capitals":
    layers_knocked_out = [[layer] for layer in range(n_layers)] + [list(range(n_layers))]
    metric_left = {}
    for place, mask in pairs.places.items():
        if place == "end":
            continue
        metric_left[place] = []
        for these_layers in layers_knocked_out:
            values = knock_out(model, pairs, these_layers, mask, "log_prob", cfg.memory_gb)
            metric_left[place].append(normalised(values, noised_clean, noised_corrupt).item())
    numbers["knock_out"] = metric_left
    subject_column = place_names.index("changed")
    print(
        f"{cyan}the clean subject after layer 0 restores {tracing['resid_post'][0, subject_column]:.0%}, one MLP "
        f"output there at most {tracing['mlp_out'][:, subject_column].max():.0%}; without attention from the answer's "
        f"position to the subject {metric_left['changed'][-1]:.2f} is left, to the words between "
        f"{metric_left['between'][-1]:.2f} (1 = clean, 0 = subject noised){endc}"
    )

#%% ... as a map of places and layers
if task == "capitals":
    fig = imshow(
        t.tensor(list(metric_left.values())),
        title=(
            "Where the answer's position must look: its attention knocked out "
            f"(n = {len(pairs)}, {Path(cfg.model).name}, log-probability of the answer)"
        ),
        xlabel="layer",
        ylabel="to",
        x=[*layer_names, "all"],
        y=list(metric_left),
        value="share left",
        meaning={0: "subject noised", 1: "clean"},
    )
    show(
        fig,
        "patching/knock_out",
        "Pale: without attention to this place, in this layer (or in all), the answer is gone.",
    )

#%% What is needed: every head and MLP taken away in four ways, with the effect on the answer and on the loss over text
print(f"{purple}=== Ablations ==={endc}")
parts = {}
for layer in range(n_layers):
    for head in range(n_heads):
        this_head = F.one_hot(t.tensor(head), n_heads)[:, None].to(device)
        parts[f"L{layer}H{head}"] = Part("z", layer, partial(t.mul, this_head))
    parts[f"L{layer} MLP"] = Part("mlp_out", layer)
ways = ["zero", "mean", "resample", "noise"]
if min(len(few), len(rows)) < 2:
    ways.remove("resample")
    print(
        f"{yellow}resample is left out: it takes what another pair, or row of text, has there, and there is one{endc}"
    )
effects = {}  # {how: {part: (share of the metric lost, 0 = clean and 1 = corrupt; nats per token added)}}
for how in ways:
    ablations = [(part, how, 1.0) for part in parts.values()]
    effects[how] = dict(zip(parts, ablation_effects(model, few, rows, ablations, metric, cfg.memory_gb)))
numbers["ablation"] = effects
hurts_most = sorted(parts, key=lambda name: -effects["mean"][name][0])
strongest_head = next(name for name in hurts_most if parts[name].site == "z")
strongest_mlp = next(name for name in hurts_most if parts[name].site == "mlp_out")

#%% ... as maps of parts and ablations
where = (
    f"n = {len(few)} prompts, {rows.numel()} held-out tokens of {data}, {about}; means and deviations over that text"
)
share_lost = "share of the metric lost (0 = clean, 1 = corrupt)"
lost_titles = {
    "metric": "What the answer loses when a part is ablated in one of four ways",
    "loss": "What text loses when a part is ablated in one of four ways, nats per token",
}
for i, (name, title) in enumerate(lost_titles.items()):
    fig = imshow(
        t.tensor([[effect[i] for effect in of_parts.values()] for of_parts in effects.values()]),
        title=f"{title} ({where})",
        xlabel="part",
        ylabel="ablation",
        x=list(parts),
        y=list(effects),
        value="share lost" if name == "metric" else "nats lost",
        meaning=loses if name == "metric" else None,
    )
    show(
        fig,
        f"patching/ablation_{name}",
        "Blue: it was needed. Red: without it things go better. Zero takes its output away, mean sets it to its mean over "
        "text, resample takes it from another prompt, noise adds one standard deviation.",
    )

#%% How much noise do the strongest head and MLP bear?
sigmas = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0]
noise_curves = {}
for name in (strongest_head, strongest_mlp):
    ablations = [(parts[name], "noise", sigma) for sigma in sigmas]
    noised_effects = ablation_effects(model, few, rows, ablations, metric, cfg.memory_gb)
    noise_curves[name] = [metric_lost for metric_lost, _ in noised_effects]
numbers["noise_curve"] = noise_curves

#%% ... as lines
fig = line(
    noise_curves,
    title=f"How much Gaussian noise the strongest head and MLP bear ({where})",
    xlabel="sigma (standard deviations)",
    ylabel=share_lost,
    x=sigmas,
    markers=True,
)
show(fig, "patching/noise", "0 on the left axis: the answer is untouched; 1: as if the prompt were the corrupt one.")

#%% How few neurons of the strongest MLP, or which direction before it, does the answer need?
fine = fine_parts(model, few, parts[strongest_mlp].layer, cfg.memory_gb)
ablations = [(part, "mean", 1.0) for part in fine.values()]
fine_effects = dict(zip(fine, ablation_effects(model, few, rows, ablations, metric, cfg.memory_gb)))
numbers["fine_ablation"] = fine_effects
table = []
for name in hurts_most[:8]:
    table.append([name, *(f"{effects[how][name][0]:.2f} / {effects[how][name][1]:+.2f}" for how in effects)])
for name, (metric_lost, nats) in fine_effects.items():
    table.append([name, "", f"{metric_lost:.2f} / {nats:+.2f}"])
print(tabulate(table, headers=["share of metric lost / nats added", *effects]))

#%% The numbers for machines, and the conclusion
most_needed = hurts_most[0]
metric_lost, nats = effects["mean"][most_needed]
numbers["most_needed"] = [most_needed, metric_lost, nats]
save_results("patching", cfg, **numbers, worst_gate=worst_gate)
if stream_sites:
    print(f"{green}{where_it_stands} (share of the metric that the clean activation there restores).{endc}")
if head_sites:
    print(f"{green}Of {n_layers * found.shape[1]} heads, {the_strongest}.{endc}")
print(
    f"{green}Set to its mean, {most_needed} takes most: {metric_lost:.0%} of the metric (0% = clean, 100% = corrupt), and {nats:+z.2f} nats per "
    f"token of text. Gates: the worst misses by {worst_gate:.0e}.{endc}"
)
