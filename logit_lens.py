"""
Logit lens: what does a model believe after every layer? Read through its own final norm and unembedding, through a
tuned or a Jacobian lens, and taken apart into what each layer and head wrote.
The methods are lens.logit_lens, its fast form lens.read, lens.tuned_lens_loss, lens.jacobian_lens and
logit_attribution.logit_parts. At another place of a block than its end: run_with_cache there, then Lens(model)(cache[name]).
"""

from dataclasses import dataclass
from typing import Literal

from utils import (  # first: sets OpenMP's variables before torch is loaded
    Count,
    DtypeName,
    Natural,
    Share,
    cyan,
    endc,
    fail,
    find_model,
    gray,
    green,
    pick_device,
    purple,
    save_results,
    set_seed,
    yellow,
    on_base,
)
from plots import bar, imshow, label_tokens, line, plain, show
from hooks import device_of, has_qkv, is_streamed
from weights import about_bos, answer_token, encode, open_model, token_text
from data import refuse_empty
from launch import flags
from logit_attribution import layer_writes, logit_parts, parts_error
from world import judging_rows
from lens import (
    CATEGORIES,
    RULES,
    TUNED_ROWS,
    TUNED_TOKENS,
    Lens,
    LensConfig,
    LensText,
    confirmed_semantic,
    grid_figure,
    grid_table,
    judge_lenses,
    milestones,
    norm_artefact,
    read,
    refuse_lens_settings,
    require_exact_lens,
    slug,
    token_texts,
    top_k_of_layers,
)
from llama_block import Llama

import numpy as np
import torch as t
import torch.nn as nn
from tabulate import tabulate
from torch import Tensor


#%% A milestone in words
def says_layer(layer: float, n_layers: int) -> str:
    """nan is at none."""
    return "at no layer" if np.isnan(layer) else f"after {layer:.0f} of {n_layers} blocks"


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config(LensConfig):
    model: str = "models/world"  # a hub name, a short name (gpt2-small, pythia-70m) or a folder
    base: str | None = None  # a model whose config and tokenizer the weights of --model are put on
    bos: bool | None = None  # put a beginning-of-text token first; default as the model's own tokenizer says
    prompt: str = "Everyone knows that the capital of Japan is"  # a text to look at
    answer: str | None = None  # the token to follow after the prompt; default what the model says
    norm: Literal["final", "none"] = "final"  # before the unembedding: the model's own final norm, or none (to compare)
    dtype: DtypeName = "auto"  # of the weights; auto: bfloat16 on a GPU that has it, else float32
    offload: Literal["auto", "on", "off"] = "auto"  # weights come block by block: where they do not fit, always, never
    copy_threshold: Share = 0.5  # probability from which a piece of the prompt dominates
    top: Count = 5  # likeliest tokens shown
    less_mean: bool = True  # writes to the logit less the mean logit of all tokens; --no-less-mean: to the raw logit
    wandb: bool = False  # numbers and figures go to Weights & Biases too
    seed: Natural = 0  # of every draw
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=Config(model="Qwen/Qwen3-8B", dtype="bfloat16"))
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    refuse_empty(cfg.prompt)
    refuse_lens_settings(cfg)
    if cfg.answer is not None and not cfg.answer.strip():
        fail("--answer is empty: give a word, or leave it out to follow what the model says")

#%% The model, the prompt as it reads it, and the gate: the last layer's lens is the model's own output everywhere
if __name__ == "__main__":
    cfg.model = on_base(cfg.model, cfg.base)
    model = open_model(cfg.model, (Llama,), cfg.device, cfg.dtype, cfg.offload, bos=cfg.bos)
    name = slug(find_model(cfg.model))
    n_layers = model.cfg.n_layers
    row = encode(model, cfg.prompt)
    if len(row) > model.cfg.n_ctx:
        fail(f"--prompt has {len(row)} tokens, the model reads {model.cfg.n_ctx}")
    tokens = [token_text(model, i) for i in row]
    print(f"{purple}=== {name}: {n_layers} layers, norm {cfg.norm}; {about_bos(model)} ==={endc}")
    print(f"{gray}{' '.join(label_tokens(tokens))}{endc}")
    gate_error = require_exact_lens(model, [row])
    print(f"{cyan}gate: the last layer's lens misses the model's own logits by {gate_error:.1e}{endc}")

#%% The lenses: raw; tuned, where the weights are in memory; Jacobian, where --lens asks for it, since it is dear
if __name__ == "__main__":
    maps: dict[str, nn.ModuleList | None] = {"raw": None}
    in_memory = not is_streamed(model)
    if cfg.lens != "raw" or (in_memory and cfg.tuned_steps):
        text = LensText.of(model, cfg.model, cfg.bos, cfg.seed)
        if cfg.tuned_steps:
            maps["tuned"] = text.tuned(cfg.tuned_steps)
        if cfg.lens == "jacobian":
            maps["jacobian"] = text.jacobian(cfg.jacobian_rows, cfg.jacobian_target, cfg.memory_gb)
    if "tuned" not in maps:
        why = "--tuned-steps 0" if in_memory else "weights are offloaded"
        print(f"{gray}tuned lens left out ({why}){endc}")

#%% What would each layer say at each position? The likeliest token, and how the answer fares at the end of the prompt
if __name__ == "__main__":
    if cfg.answer:
        answer = answer_token(model, cfg.prompt, cfg.answer)
    else:
        with t.no_grad():
            answer = int(model(t.tensor([row], device=device_of(model)))[0, -1].argmax())
    said = token_text(model, answer)
    every_position = [(0, position) for position in range(len(row))]
    lens = Lens(model, cfg.norm, maps[cfg.lens])
    found = read(model, lens, [row], every_position, [answer] * len(row), cfg.top)
    texts = token_texts(model, found["ids"])
    print(grid_table(found, texts, tokens))
    at_the_end = {
        "after layer": range(n_layers + 1),
        f"rank of {said!r}": found["rank"][:, -1] + 1,
        "probability": found["answer_logp"][:, -1].exp(),
        "logit": found["answer_logit"][:, -1],
        "entropy": found["entropy"][:, -1],
        "KL to final": found["kl"][:, -1],
        "cosine": found["cosine"][:, -1],
    }
    at_the_end = {title: x.tolist() if isinstance(x, Tensor) else x for title, x in at_the_end.items()}
    at_the_end[f"top {cfg.top}"] = [" ".join(layer[-1]) for layer in top_k_of_layers(found, texts)]
    print(tabulate(at_the_end, headers="keys", floatfmt=".3f"))
    if cfg.norm == "none":
        print(
            f"{yellow}--norm none: without the final norm the last layer is {found['kl'][-1, -1]:.2f} nats "
            f"from the model's own output{endc}"
        )

#%% ... as the classic picture, layer x position
if __name__ == "__main__":
    what = "Logit lens" if cfg.lens == "raw" else f"{cfg.lens.capitalize()} lens"
    title = f"{what} of {plain(repr(cfg.prompt[-60:]))} ({name}, n = {len(row)} tokens, norm: {cfg.norm})"
    show(
        grid_figure(found, texts, tokens, title),
        "logit_lens/grid",
        "A row is a layer, a column a position; each cell the token that the layer would say next, darker where "
        "it is surer. Hover for the runners-up.",
    )

#%% When does the answer settle, and what comes before it? The milestones of the prompt
if __name__ == "__main__":
    at_end = [(0, len(row) - 1)]
    categories = CATEGORIES["forward"] + CATEGORIES["reverse"]
    reached_by = {}
    by_lens = {}
    for kind, of_layers in maps.items():
        reading = read(model, Lens(model, cfg.norm, of_layers), [row], at_end, [answer], cfg.top)
        said_tokens = token_texts(model, reading["ids"])
        by_lens[kind] = reading
        reached_by[kind] = milestones(reading, said_tokens, [cfg.prompt], [categories], cfg.copy_threshold)
    reached = reached_by[cfg.lens]
    settles = reached["semantic"].item()
    odd = [rule for rule in RULES if reached[rule].item()]
    print(f"{cyan}{said!r} is top-1 to the end: {says_layer(settles, n_layers)}{endc}")
    print(f"{cyan}a piece of the prompt dominates: {says_layer(reached['copied'].item(), n_layers)}{endc}")
    print(
        f"{cyan}a word such as capital or country comes first: {says_layer(reached['category'].item(), n_layers)}{endc}"
    )
    print(f"{cyan}odd: {', '.join(odd) or 'nothing'}{endc}")

#%% ... with each lens; and where two lenses agree, since a norm alone can lift a token to the top
if __name__ == "__main__":
    for kind, x in reached_by.items():
        where = says_layer(x["semantic"].item(), n_layers)
        print(f"{gray}by the {kind} lens {said!r} is top-1 to the end: {where}{endc}")
    normed = read(model, Lens(model), [row], at_end, [answer], cfg.top)
    unnormed = read(model, Lens(model, "none"), [row], at_end, [answer], cfg.top)
    audited = confirmed_semantic(normed, unnormed, by_lens.get("tuned")).item()
    print(
        f"{cyan}audit: counted only where the lens without the final norm or the tuned lens says it too: "
        f"{says_layer(audited, n_layers)}{endc}"
    )

#%% Does the layer not know yet, or does it speak another basis? Each lens judged on rows that no fit saw
if __name__ == "__main__":
    tuned_scores: dict[str, list[float]] = {}
    if len(maps) > 1:
        judged_rows = judging_rows(text.corpus, TUNED_ROWS, TUNED_TOKENS, cfg.seed)
        lenses = {kind: Lens(model, translators=of) for kind, of in maps.items()}
        tuned_scores, tuned_intervals = judge_lenses(model, lenses, judged_rows)
        columns = {"after layer": range(n_layers + 1)}
        for what, means in tuned_scores.items():
            ends = tuned_intervals[what]
            columns[what] = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, (low, high) in zip(means, ends)]
        print(tabulate(columns, headers="keys", disable_numparse=True))
        print(f"{gray}means with 95% intervals, bootstrap over {len(judged_rows)} rows that no training saw{endc}")

#%% ... how far each layer is from the model's own distribution, and how well it says the next token, by either lens
if __name__ == "__main__" and tuned_scores:
    n_judged = judged_rows[:, 1:].numel()
    for measure, unit in (("KL", "nats"), ("perplexity", "perplexity")):
        fig = line(
            {f"{kind} lens": tuned_scores[f"{measure}, {kind}"] for kind in lenses},
            f"{', '.join(lenses).capitalize()} lens: {measure} by layer ({name}, n = {n_judged} held-out tokens)",
            xlabel="blocks passed",
            ylabel=unit,
            markers=True,
        )
        fig.update_yaxes(type="log" if measure == "perplexity" else "linear")
        show(
            fig,
            f"logit_lens/tuned_{measure}",
            "Left the embedding, right the last block, where every lens is the model. The lower a lens, the better it says "
            "what the model will say" + (", or the next token of the text." if measure == "perplexity" else "."),
        )

#%% ... and the gate: the tuned lens is nearer to the model's own distribution at every layer (where not: the figure)
if __name__ == "__main__" and "tuned" in maps:
    raw_kl = np.array(tuned_scores["KL, raw"][:-1])
    tuned_kl = np.array(tuned_scores["KL, tuned"][:-1])
    worse = np.flatnonzero(~(tuned_kl < raw_kl)).tolist()  # nan too
    assert not worse, f"the tuned lens does not beat the raw lens at layers {worse}: give it more --tuned-steps"

#%% How much of the raw lens is the final norm's doing? The lens with it against the lens without it, by layer
if __name__ == "__main__" and tuned_scores:
    artefact = norm_artefact(model, judged_rows)
    columns = {"after layer": range(n_layers + 1)}
    columns |= {f"{what}, with norm against without": of_layers for what, of_layers in artefact.items()}
    print(tabulate(columns, headers="keys", floatfmt=".3f"))

#%% Who wrote the answer? Each layer's write in its direction; they sum to the logit
if __name__ == "__main__":
    writes, logit = layer_writes(model, row, answer, cfg.less_mean)
    missed = abs(sum(writes.values()) - logit) / max(1, abs(logit))
    full_precision = model.W_U.dtype == t.float32
    assert missed < (1e-4 if full_precision else 5e-2), f"the layers' writes miss the logit by {missed}"
    of_logit = "logit, less the mean over all tokens, of" if cfg.less_mean else "logit of"
    by_layer = list(writes.values())[1:-1]  # between the embedding and the constant
    as_sum = " + ".join(f"{part} {value:.2f}" for part, value in writes.items())
    print(f"{cyan}{of_logit} {said!r} {logit:.2f} = {as_sum} (off by {missed:.0e}){endc}")

#%% ... as bars
if __name__ == "__main__":
    fig = bar(
        {"write": list(writes.values())},
        f"What each layer writes in the direction of {said!r} (logit {logit:.2f}, n = 1 prompt, {name})",
        xlabel="layer",
        ylabel="logit",
        x=list(writes),
    )
    show(
        fig,
        "logit_lens/layers",
        "How much each layer wrote towards the answer; the bars sum to its logit.",
    )

#%% ... and each head's and MLP's, which with the bias after attention sum to their layer's
if __name__ == "__main__":
    by_head = None
    parts = None
    if has_qkv(model):
        parts = logit_parts(model, t.tensor([row], device=device_of(model)), answer, less_mean=cfg.less_mean)
    if parts is None:
        print(f"{yellow}heads are not taken apart here: they are not hooked, or have no values of their own{endc}")
    elif not parts_error(parts) <= 1e-3:
        print(
            f"{yellow}heads are not taken apart here: with the scale of the norm frozen they miss the logit "
            f"by {parts_error(parts):.1e} (norms after attention, a soft cap, or half precision){endc}"
        )
    else:
        heads = parts["heads"].sum(-1)  # over sources: (layer, head)
        by_head = t.cat([heads, parts["mlp"][:, None]], 1).cpu()
        gap = by_head.sum(1) + parts["attn_bias"].cpu() - t.tensor(by_layer)
        assert gap.abs().max() < 1e-3 * max(1, abs(logit)), "heads and MLP of a layer do not sum to its write"

#%% ... as a map of layers and heads
if __name__ == "__main__" and by_head is not None:
    fig = imshow(
        by_head,
        f"What each head and MLP writes in the direction of {said!r} (logit {logit:.2f}, n = 1 prompt, {name})",
        xlabel="part",
        ylabel="layer",
        x=[*(f"H{head}" for head in range(by_head.shape[1] - 1)), "MLP"],
        y=[f"L{layer}" for layer in range(n_layers)],
        value="logit",
    )
    show(
        fig,
        "logit_lens/heads",
        "The same by head, and the MLP beside them; together they are their layer's bar.",
    )

#%% The conclusion
if __name__ == "__main__":
    numbers = {"last_layer_gate_error": gate_error, "layer_writes": writes}
    if tuned_scores:
        numbers["tuned_lens"] = tuned_scores
        numbers["tuned_lens_intervals"] = tuned_intervals
        numbers["norm_artefact"] = artefact
    if by_head is not None:
        numbers["head_and_mlp_writes"] = by_head.tolist()
    numbers["milestones"] = {what: x.item() for what, x in reached.items()}
    for kind, of_lens in reached_by.items():
        numbers[f"milestones_{kind}"] = {what: x.item() for what, x in of_lens.items()}
    numbers["milestones_audited"] = {"semantic": audited}
    save_results("logit_lens", cfg, **numbers)
    settled = f"{said!r} is what it would say {says_layer(settles, n_layers)} and ever after"
    if np.isnan(settles):
        settled = f"{said!r} is at no layer what it would say to the end"
    tuned_says = "no tuned lens"
    if "tuned" in maps:
        tuned_says = (
            f"a tuned lens brings the layers from {raw_kl.mean():.2f} to {tuned_kl.mean():.2f} nats from the last"
        )
    print(
        f"{green}{settled}; L{int(np.argmax(by_layer))} writes most of it; {tuned_says}. "
        f"Gate: last-layer lens = own logits to {gate_error:.0e}; {about_bos(model)}.{endc}"
    )
