"""
What does each head and each neuron do? Heads named above a permutation null, neurons by what they read and write, of
any model, in one page to search.
The methods are in heads.py (catalogue, head_looks, head_map) and neurons.py (neuron_catalogue, neuron_parts, tokens_read).
"""

from dataclasses import dataclass
from pathlib import Path

from utils import (  # first: sets OpenMP's variables before torch is loaded
    BAR,
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
    on_base,
)
from plots import catalogue_page, imshow, neuron_context, show, show_page, visible
from hooks import block_norms, has_qkv
from weights import about_bos, open_model, token_text
from launch import flags
from logit_attribution import folded_W_U, has_neurons, parts_error
from neurons import (
    embeddings_as_read,
    neuron_catalogue,
    neuron_parts,
    neuron_readers,
    sharpness,
    sharpness_null,
    strongest_parts,
    tokens_read,
    without_sources,
)
from heads import catalogue, head_looks, head_map, random_repeats, which_bar
from world import corpus_for, judging_rows
from llama_block import Llama

import torch as t
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str = "models/world"  # a hub name, a short name or a folder
    base: str | None = None  # a model whose config and tokenizer the weights of --model are put on
    bos: bool | None = None  # put a beginning-of-text token first; default as the model's own tokenizer says
    neurons: Natural = 12  # of each layer, those with the largest peak activation x output norm
    neuron: tuple[str, ...] = ()  # and these, as layer.number: 3.117
    rows: Count = 128  # rows of held-out text to see them in
    context: Count = 64  # tokens of a row
    contexts: Count = 5  # of a neuron that are shown
    traced: Count = 3  # of these, those whose pre-activation is taken apart
    shuffles: Count = 1000  # of the heads' nulls
    data: str | None = None  # text to see them in; default world for models/world, else stdlib
    wandb: bool = False  # numbers and figures go to Weights & Biases too
    seed: Natural = 0
    dtype: DtypeName = "auto"  # of the weights; auto: bfloat16 on a GPU that has it, else float32
    device: str = "auto"


cfg = flags(Config, __doc__, hpc=Config(model="gpt2", neurons=32, rows=512, context=128, contexts=8))
device = pick_device(cfg.device)
set_seed(cfg.seed)


#%% The model and the text; what is asked for and not there is said now
def read_neurons(asked: tuple[str, ...], d_mlps: list[int]) -> list[list[int]]:
    """By layer, the neurons asked for as layer.number. d_mlps: how many there are in each layer."""
    by_layer: list[list[int]] = [[] for _ in d_mlps]
    for name in asked:
        layer, _, neuron = name.partition(".")
        if not layer.isdigit() or not neuron.isdigit():
            fail(f"--neuron {name}: write layer.number, as in --neuron 3.117")
        if int(layer) >= len(d_mlps) or int(neuron) >= d_mlps[int(layer)]:
            fail(f"--neuron {name}: this model has layers 0 to {len(d_mlps) - 1} of {d_mlps[0]} neurons, from 0 on")
        by_layer[int(layer)].append(int(neuron))
    return by_layer


cfg.model = on_base(cfg.model, cfg.base)
model = open_model(cfg.model, (Llama,), device, cfg.dtype, bos=cfg.bos).requires_grad_(False)
if not has_qkv(model) or len(model.W_U) != model.cfg.d_model:
    fail(
        "the catalogue needs queries, keys and values by head and an unembedding of the stream, and this model (streamed, "
        "without attention, with DeepSeek's compressed one, or OPT-350m) has none: patching.py reads its residual stream"
    )
with_neurons = has_neurons(model)
if cfg.neuron and not with_neurons:
    fail("--neuron: this model's MLPs are mixtures of experts, whose neurons are left out here: moe.py looks into them")
n_layers = model.cfg.n_layers
n_heads = model.cfg.n_heads
asked = [[] for _ in range(n_layers)]
if with_neurons:
    asked = read_neurons(cfg.neuron, [len(block.mlp.W_out) for block in model.blocks])

data, corpus = corpus_for(cfg.data, cfg.model, cfg.bos)
ctx = min(cfg.context, model.cfg.n_ctx)
rows = judging_rows(corpus, cfg.rows, ctx, cfg.seed).to(device)
name = Path(cfg.model).name
about = f"{name}, {len(rows)} x {ctx} held-out tokens of {data}"
layer_names = [f"L{layer}" for layer in range(n_layers)]
head_names = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
numbers: dict = {}
print(f"{purple}=== Heads and neurons of {about} ==={endc}")
print(f"{gray}{about_bos(model)}{endc}")

#%% Heads on random tokens said twice: who does what, above what shuffling gives
half = min(40, (model.cfg.n_ctx - 1) // 2)
repeats = random_repeats(corpus, 24, half, cfg.seed).to(device)
scores, bars, roles = catalogue(model, repeats, cfg.shuffles)
table = []
for i, head in enumerate(head_names):
    if roles[head]:
        table.append([head, *(f"{x.flatten()[i]:.2f}" for x in scores.values()), ", ".join(roles[head])])
table.append(["bar", *(f"{bar:.2f} ({which_bar(role, bar)})" for role, bar in bars.items()), ""])
numbers |= {"roles": {head: x for head, x in roles.items() if x}, "bars": bars}
print(
    f"{purple}=== {len(table) - 1} of {len(head_names)} heads have a name, on {len(repeats)} rows of random tokens said "
    f"twice, each row at its own distance; a role is named above its bar (floor, or null: 99th percentile of the best "
    f"head under {cfg.shuffles} shuffles) ==={endc}"
)
print(tabulate(table, headers=["head", *scores, "named"]))

#%% ... as one map for each role
fig = imshow(
    t.stack(list(scores.values())),
    f"Head scores on {len(repeats)} rows of random tokens said twice, each at its own distance ({name})",
    "head",
    "layer",
    [f"H{head}" for head in range(n_heads)],
    layer_names,
    [f"{role} (bar {bars[role]:.2f})" for role in scores],
    columns=3,
    diverging=False,
    value="score",
)
show(
    fig,
    "catalogue/heads",
    "1 is a perfect head of the kind; it has the name only above the bar in its panel's title, which chance "
    "or the floor sets.",
)


#%% What stands in the page of each head: its scores, what its value-output map carries most of, where it looks
def words_of(ids: Tensor) -> list[str]:
    return [visible(token_text(model, int(i))) for i in ids]


def most(effect: Tensor, n: int = 8) -> str:
    """The tokens (d_vocab) with the largest."""
    return " ".join(words_of(effect.topk(n).indices))


def looks_of(looks: list[tuple[float, int, int, Tensor]]) -> list[list]:
    """[label, words, shades in percent of attention] up to each query, which the label names."""
    contexts = []
    for _, row, query, attention in looks:
        words = words_of(rows[row, : query + 1])
        shades = (100 * attention).round().int().tolist()
        start = max(0, query - 24)
        contexts.append([f"from {words[-1]} (last)", words[start:], shades[start:]])
    return contexts


unembedding = folded_W_U(model)
head_entries = []
for layer in tqdm(range(n_layers), desc="heads", **BAR):
    as_read = embeddings_as_read(model, block_norms(model, layer).before_attn)
    as_read = as_read - as_read.mean(1, keepdim=True)  # less the mean of all tokens
    looks = head_looks(model, rows[:32], layer)
    for head in range(n_heads):
        read, write, share = head_map(model, layer, head)
        reads = read @ as_read
        writes = write @ unembedding
        writes = writes - writes.mean()
        entry = {
            "id": f"L{layer}H{head}",
            "kind": "head",
            "layer": layer,
            "number": head,
            "named": ", ".join(roles[f"L{layer}H{head}"]),
            "size": max(x[layer, head].item() for x in scores.values()),
            "lines": [
                [
                    "scores (bar)",
                    ", ".join(f"{role} {x[layer, head]:.2f} ({bars[role]:.2f})" for role, x in scores.items()),
                ],
                ["fed", f"{most(reads)}   it raises   {most(writes)}"],
                ["fed", f"{most(-reads)}   it raises   {most(-writes)}"],
                ["that is", f"{share:.0%} of its value-output map (first pair of singular directions)"],
            ],
            "contexts": looks_of(looks[head]),
            "links": [],
        }
        head_entries.append(entry)

#%% Neurons: the strongest of each layer and those asked for. Any direction has its top tokens: what random ones give
found: list[tuple[int, dict]] = []
if with_neurons:
    null = sharpness_null(unembedding, seed=cfg.seed)
    for layer in tqdm(range(n_layers), desc="neurons", **BAR):
        for neuron in neuron_catalogue(model, rows, layer, cfg.neurons, cfg.contexts, asked[layer]):
            found.append((layer, neuron))
    writes_words = [sharpness(neuron["effect"]).item() > null for _, neuron in found]
    numbers |= {"neurons": len(found), "sharpness_null": null, "neurons_above_null": sum(writes_words)}
else:
    print(f"{yellow}the MLPs are mixtures of experts, whose neurons are left out here: moe.py looks into them{endc}")


#%% ... and who writes what they read: their pre-activations at the strongest places, taken apart exactly
def strongest_places(neuron: dict) -> list[tuple[float, int, int]]:
    """The traced places, of the sign that is the stronger."""
    peaks, dips = neuron["peaks"], neuron["dips"]
    stronger = dips if dips and -dips[0][0] > peaks[0][0] else peaks
    return stronger[: cfg.traced]


worst_gate = 0.0
for layer, neuron in tqdm(found, desc="written by", **BAR):
    neuron["written_by"] = {}
    neuron["pre"] = {}
    for reader in neuron_readers(model, layer):
        apart = []
        pres = []
        for _, row, position in strongest_places(neuron):
            parts = neuron_parts(model, rows[row : row + 1], layer, neuron["neuron"], position, reader)
            worst_gate = max(worst_gate, parts_error(parts, "pre"))
            apart.append(without_sources(parts))
            pres.append(parts["pre"])
        neuron["written_by"][reader] = {part: t.stack([x[part] for x in apart]).mean(0) for part in apart[0]}
        neuron["pre"][reader] = t.stack(pres).mean().item()
limit = 1e-4 if unembedding.dtype == model.W_U.dtype else 5e-2  # of half precision, the activations are rounded
if worst_gate > limit:
    fail(f"gate: the parts of a pre-activation miss it by {worst_gate:.1e} (at most {limit:.0e})")
numbers["pre_activation_error"] = worst_gate


#%% ... as a map: what has written to the stream, by the layer of the neurons that read it
def by_component(parts: dict[str, Tensor]) -> list[float]:
    """Embedding, then attention and MLP of every layer, 0 for those that write later, then biases."""
    heads = parts["heads"].sum(1).tolist()
    mlps = parts["neurons"].sum(1).tolist()
    values = [(parts["embed"] + parts["pos_embed"]).item()]
    for layer in range(n_layers):
        values.append(heads[layer] if layer < len(heads) else 0.0)
        values.append(mlps[layer] if layer < len(mlps) else 0.0)
    return [*values, (parts["biases"] + parts["constant"]).item()]


if found:
    components = ["embed", *(f"{layer} {part}" for layer in layer_names for part in ("attn", "MLP")), "biases"]
    readers = list(neuron_readers(model, 0))
    panels = []
    for reader in readers:
        grid = t.zeros(n_layers, len(components))
        for layer in range(n_layers):
            shares = []
            for at, neuron in found:
                if at == layer:
                    towards = 1 if neuron["pre"][reader] > 0 else -1
                    shares.append(towards * t.tensor(by_component(neuron["written_by"][reader])))
            if shares:
                grid[layer] = t.stack(shares).mean(0)
        panels.append(grid)
    fig = imshow(
        t.stack(panels),
        f"Who writes what neurons read, towards the sign it has there: mean over each layer's of the page ({len(found)} in "
        f"all) at their {cfg.traced} strongest places, the norm's scale frozen ({about})",
        "writes",
        "neurons of",
        components,
        layer_names,
        [f"read by {reader}" for reader in readers],
        columns=1,
        value="pre-activation",
    )
    show(
        fig,
        "catalogue/written_by",
        "A row for the neurons of a layer, a column for each earlier part. Blue: it pushes them further the way "
        "that they go.",
    )


#%% What stands in the page of each neuron
def in_numbers(parts: list[tuple[str, float]]) -> list[list[str]]:
    return [[part, f"{x:+.2f}"] for part, x in parts]


def neuron_entry(layer: int, neuron: dict, as_read: Tensor) -> dict:
    """as_read (d_model, token): the embeddings as the layer's MLP reads them."""
    effect = neuron["effect"]
    stands_out = sharpness(effect).item()
    lines = [
        [
            "activation",
            f"at most {neuron['largest']:.2f} in size; above a tenth of that on {neuron['density']:.2%} of tokens",
        ],
        ["raises", most(effect)],
        ["lowers", most(-effect)],
        [
            "stands out",
            f"by {stands_out:.1f} standard deviations over tokens (random directions: below {null:.1f}, 95%)",
        ],
    ]
    for reader, read in tokens_read(model, layer, neuron["neuron"], as_read).items():
        lines.append([f"{reader} raised by", most(read)])
        lines.append([f"{reader} lowered by", most(-read)])
    links = []
    for reader, parts in neuron["written_by"].items():
        links.append([f"{reader} {neuron['pre'][reader]:+.2f} =", in_numbers(strongest_parts(parts, 10))])
    places = [*neuron["peaks"], *neuron["dips"]]
    return {
        "id": f"L{layer}N{neuron['neuron']}",
        "kind": "neuron",
        "layer": layer,
        "number": neuron["neuron"],
        "named": "",
        "size": neuron["largest"],
        "lines": lines,
        "contexts": [neuron_context(neuron, words_of(rows[row]), row, position) for _, row, position in places],
        "links": links,
    }


neuron_entries = []
as_read_by: dict[int, Tensor] = {}
for layer, neuron in found:
    if layer not in as_read_by:
        as_read_by = {layer: embeddings_as_read(model, block_norms(model, layer).before_mlp)}
    neuron_entries.append(neuron_entry(layer, neuron, as_read_by[layer]))

#%% The neurons in lines: where they fire, what they raise, what is written into them
table = []
for entry, (_, neuron) in zip(neuron_entries, found):
    _, row, position = strongest_places(neuron)[0]
    words = words_of(rows[row, max(0, position - 3) : position + 1])
    by = []
    for reader, parts in neuron["written_by"].items():
        by.append(f"{reader}: " + " ".join(f"{part} {x:+.1f}" for part, x in strongest_parts(parts, 3)))
    fires = "".join(words[:-1]) + f"[{words[-1]}]"
    effect = neuron["effect"]
    table.append([entry["id"], neuron["largest"], fires, most(effect, 4), most(-effect, 4), ", ".join(by)])
if found:
    print(
        f"{purple}=== {len(found)} neurons, the strongest of each layer; logit effect by the direct path, weights with the "
        f"final norm folded ==={endc}"
    )
    headers = ["neuron", "largest", "fires at [token]", "raises", "lowers", "written by, there"]
    print(tabulate(table, headers=headers, floatfmt=".1f"))


#%% The neurons that were asked for, in full
def print_entry(entry: dict) -> None:
    print(f"{purple}=== {entry['id']} ==={endc}")
    for label, text in entry["lines"]:
        print(f"{label:>16}  {cyan}{text}{endc}")
    for label, links in entry["links"]:
        print(f"{label:>16}  {cyan}{'  '.join(' '.join(link) for link in links)}{endc}")
    for label, words, _ in entry["contexts"]:
        print(f"{label:>16}  {''.join(words)}")


for entry in neuron_entries:
    if entry["number"] in asked[entry["layer"]]:
        print_entry(entry)

#%% The page, and the numbers for machines
entries = [*head_entries, *neuron_entries]
title = f"{len(head_entries)} heads and {len(neuron_entries)} neurons of {about}"
show_page(
    catalogue_page(entries, title),
    "catalogue/catalogue",
    "Search a token, a role, a head or a neuron; its contexts are shaded by how strongly it fires (blue: below zero).",
)
save_results("catalogue", cfg, **numbers)

#%% The conclusion
by_role = []
for role in scores:
    named = [head for head, has in roles.items() if role in has]
    if named:
        by_role.append(f"{role}: {', '.join(named)}")
print(f"{green}Of {len(head_names)} heads: {'; '.join(by_role) or 'none has a role'}.{endc}")
if found:
    print(
        f"{green}Of the {len(found)} neurons in the page, {sum(writes_words)} raise or lower a token further than random "
        f"directions do (95%, {null:.1f} standard deviations). Gate: the parts of what they read sum to it, to "
        f"{worst_gate:.0e}.{endc}"
    )
