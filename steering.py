"""
What happens when we push along a direction? Contrasts of texts give one at every layer, by difference of means, by
principal component, by a logistic probe or by a feature; it is added, clamped and projected out while the model answers
and writes. What that does is held against what it costs, against random directions and against the contrast in words.
The methods are in directions.py.
"""

import math
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

from utils import (  # first: sets OpenMP's variables before torch is loaded
    BRIEF,
    Count,
    DtypeName,
    Natural,
    NotNegative,
    Positive,
    cyan,
    endc,
    fail,
    gray,
    green,
    pick_device,
    purple,
    save_results,
    seed_of,
    set_seed,
    yellow,
)
from plots import imshow, line, plain, show
from hooks import act_name, in_words, missed_gates
from data import text_of
from weights import about_bos, encode, model_key, open_model, text_tokenizer
from launch import flags
from world import judging_rows
from lens import slug
from pairs import share_out

from sae import open_folder
from features import text_for
from directions import (
    METHODS,
    Asked,
    Contrasts,
    Direction,
    Edit,
    ablating_everywhere,
    adding,
    clamping,
    draw_contrasts,
    edit_gates,
    effect,
    feature_direction,
    may_ask,
    open_judge,
    placed,
    plain_loss,
    projecting_out,
    random_directions,
    read_contrasts,
    read_directions,
    read_texts,
    save_direction,
    says,
    spaced,
    streams_of,
    text_cost,
    towards,
    write,
)
from llama_block import Llama

import plotly.graph_objects as go
import torch as t
from annotated_types import Len
from tabulate import tabulate
from tqdm import tqdm


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str = "models/world"  # a hub name, a short name or a folder
    bos: bool | None = None  # put a beginning-of-text token first; default as the model's own tokenizer says
    # contrasts of the world, whose answers are known: women against men, the plural against the singular, a country
    # against others
    task: Literal["gender", "number", "country"] = "gender"
    country: str = "Japan"  # to which --task country moves all others
    # your own: a CSV or JSON file with the columns positive, negative and, if known, target and other (the words that a
    # pushed model should say after the negative, and those that it says by itself; | between several)
    contrasts: str | None = None
    positive: str | None = None  # or two files of texts, one a line: those that have something
    negative: str | None = None  # and those that have not
    target: tuple[str, ...] = ()  # words that a pushed model should say, for contrasts that do not say which
    other: tuple[str, ...] = ()  # words that it should say no more
    judge: str | None = None  # a Python file with judge(text), a number that says how much written text has it
    direction: str | None = None  # a file of steering.py, probing.py or das.py instead of directions found here
    sae: str | None = None  # a folder with a SAE, one feature of which joins the other methods
    # where a text is read: at its last token, or the mean over it
    place: Literal["last", "mean"] = "last"
    # where the stream is edited: from a prompt's last token on and in all that is written, or everywhere
    where: Literal["end", "all"] = "end"
    n: Count = 64  # contrasts to find directions on
    held_out: Count = 64  # contrasts to judge them on, about other names, nouns or countries
    # of pushes, in distances of the classes' means at that layer; 1 is added
    strengths: Annotated[tuple[Positive, ...], Len(1)] = (0.5, 1.0, 2.0, 4.0, 8.0)
    random: Count = 6  # directions at random, of the same length
    written: Natural = 12  # tokens that are written after a prompt
    temperature: NotNegative = 0.7  # of the text that is drawn; the other is greedy
    prompts: Count = 8  # after which text is written
    data: str | None = None  # the text that edits must not hurt; default as the model's
    rows: Count = 24  # of that text, 64 tokens each
    memory_gb: Positive = 1.0  # cap on activations of one run
    wandb: bool = False  # numbers and figures go to Weights & Biases too
    seed: Natural = 0
    dtype: DtypeName = "auto"  # of the weights; auto: bfloat16 on a GPU that has it, else float32
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


cfg = flags(Config, __doc__, hpc=Config(model="gpt2", bos=True, n=512, held_out=256, rows=128, memory_gb=24.0))
device = pick_device(cfg.device)
set_seed(cfg.seed)
if bool(cfg.positive) != bool(cfg.negative):
    fail("--positive and --negative go together: a file of texts each, one a line")
if cfg.positive and cfg.contrasts:
    fail("--contrasts, or --positive and --negative: give one of them")

#%% The model and the contrasts: some to find directions on, others to judge them on
judge = open_judge(cfg.judge) if cfg.judge else None
model = open_model(cfg.model, (Llama,), device, cfg.dtype, offload="off", bos=cfg.bos).requires_grad_(False)
tokenizer = text_tokenizer(model)


def own_contrasts() -> Contrasts:
    if cfg.contrasts:
        return read_contrasts(cfg.contrasts)
    positive = read_texts(cfg.positive, "--positive")
    negative = read_texts(cfg.negative, "--negative")
    if positive == negative:
        fail("--positive and --negative hold the same texts: there is no contrast")
    return Contrasts(positive, negative, [()] * len(negative), [()] * len(negative))


def shared_out(own: Contrasts) -> tuple[Contrasts, Contrasts]:
    """Rows to find on and to judge on in turn; the flags' words where a row says none."""
    target = [words or spaced(cfg.target) for words in own.target]
    other = [words or spaced(cfg.other) for words in own.other]
    negatives = share_out(list(zip(own.negative, target, other)), cfg.n, cfg.held_out)
    positives = share_out(own.positive, cfg.n, cfg.held_out)
    if not negatives[1] or not positives[1]:
        fail("one text of each class: two or more are needed, to find a direction on some and judge it on others")
    parts = []
    for positive, rows in zip(positives, negatives):
        negative, targets, others = (list(column) for column in zip(*rows))
        parts.append(Contrasts(positive, negative, targets, others))
    return parts[0], parts[1]


if cfg.contrasts or cfg.positive:
    about = Path(cfg.contrasts or cfg.positive).stem
    contrasts, test_contrasts = shared_out(own_contrasts())
else:
    about = f"to {cfg.country}" if cfg.task == "country" else cfg.task
    contrasts = draw_contrasts(model, cfg.task, cfg.country, cfg.n, cfg.seed, "find")
    test_contrasts = draw_contrasts(model, cfg.task, cfg.country, cfg.held_out, cfg.seed, "test")
has_words = all(test_contrasts.target) and all(contrasts.target)
if not has_words and judge is None:
    fail(
        "what should a pushed model say? Give words by --target (and --other), columns target and other in --contrasts, "
        "or a judge of what it writes by --judge"
    )
for part in (contrasts, test_contrasts) if has_words else ():
    for text, target, other in zip(part.negative, part.target, part.other):
        if not may_ask(model, text, target, other):
            fail(
                f"after {text!r} the words {target} and {other} do not begin with tokens of their own: choose others, "
                "or end the text before a space"
            )
print(f"{purple}=== {about}: {len(contrasts)} contrasts to find on, {len(test_contrasts)} to judge on ==={endc}")
for positive, negative in list(zip(contrasts.positive, contrasts.negative))[:2]:
    print(f"{gray}has it  {positive!r}\nhas not {negative!r}{endc}")
print(f"{gray}{about_bos(model)}{endc}")

#%% What the model does by itself, and when the same contrast stands in the words of the prompt
kind = "probability of the target" if has_words else "the judge's mean"


def ask(texts: list[str], part: Contrasts) -> Asked:
    words = (part.target, part.other) if has_words else ([()] * len(texts), [()] * len(texts))
    return Asked(model, texts, *words, where=cfg.where, memory_gb=cfg.memory_gb)


def same_words(part: Contrasts) -> tuple[list[str], Contrasts]:
    """The positive texts after which the words of their negative can be asked for."""
    n = min(len(part.positive), len(part))
    kept = range(n)
    if has_words:
        kept = [i for i in range(n) if may_ask(model, part.positive[i], part.target[i], part.other[i])]
    words = Contrasts([], [], [part.target[i] for i in kept], [part.other[i] for i in kept])
    return [part.positive[i] for i in kept], words


def written_texts(asked: Asked, edit: Edit | None, n: int) -> list[str]:
    """What is written greedily after the first n prompts."""
    texts = []
    for ids, start in zip(asked.rows[:n], asked.start.tolist()):
        texts.append(text_of(tokenizer, write(model, ids, cfg.written, edit, start)))
    return texts


def done_by(asked: Asked, edit: Edit | None) -> dict[str, float]:
    """What an edit does: by the words that come next, or by the judge of what is written."""
    if has_words:
        return effect(asked.log_p(edit))
    scores = [float(judge(text)) for text in written_texts(asked, edit, cfg.prompts)]
    mean = sum(scores) / len(scores)
    return {"p_target": mean, "turned": mean}


asked = ask(contrasts.negative, contrasts)
test_asked = ask(test_contrasts.negative, test_contrasts)
positive_texts, positive_words = same_words(test_contrasts)
if not positive_texts:
    fail("after no positive text do target and other begin with tokens of their own: end the texts before a space")
positive_asked = ask(positive_texts, positive_words)
by_itself = done_by(test_asked, None)
in_the_prompt = done_by(positive_asked, None)
numbers = {"about": about, "measure": kind, "n": len(contrasts), "n_held_out": len(test_contrasts)}
numbers |= {"by_itself": by_itself, "in_the_prompt": in_the_prompt}
print(
    f"{cyan}{kind}: {by_itself['p_target']:.3f} by itself, {in_the_prompt['p_target']:.3f} with the contrast in the "
    f"prompt (held out){endc}"
)

#%% A direction at every layer by every method, measured on the contrasts that it was found on
layers = [act_name("resid_pre", layer) for layer in range(model.cfg.n_layers)]
from_file, provenance = read_directions(cfg.direction, model) if cfg.direction else ({}, {})
sae = open_folder(cfg.sae, device) if cfg.sae else None
places = list(from_file) or layers
if sae is not None:
    sae_hook = sae.cfg.metadata.hook_name
    if sae.cfg.d_in != model.cfg.d_model or "resid" not in str(sae_hook):
        fail(f"--sae {cfg.sae} is of {sae_hook}, {sae.cfg.d_in} wide: here features of this model's stream are pushed")
    places = list(dict.fromkeys([*places, sae_hook]))
high = dict(zip(places, streams_of(model, contrasts.positive, places, cfg.place, cfg.memory_gb)))
low = dict(zip(places, streams_of(model, contrasts.negative, places, cfg.place, cfg.memory_gb)))
found: dict[str, dict[str, Direction]] = {}  # by method, by hook
for hook in places:
    if hook in from_file:
        unit = towards(from_file[hook], high[hook], low[hook])
        found.setdefault("from the file", {})[hook] = placed(unit, hook, high[hook], low[hook])
        continue
    for method, find in METHODS.items():
        unit = find(high[hook], low[hook])
        found.setdefault(method, {})[hook] = placed(unit, hook, high[hook], low[hook])
if sae is not None:
    unit, feature = feature_direction(sae, high[sae_hook], low[sae_hook])
    found[f"feature {feature}"] = {sae_hook: placed(unit, sae_hook, high[sae_hook], low[sae_hook])}
at_random: dict[str, list[Direction]] = {}
for hook in places:
    units = random_directions(model.cfg.d_model, cfg.random, seed_of(cfg.seed, hook))
    at_random[hook] = [placed(unit, hook, high[hook], low[hook]) for unit in units]

#%% Gates: a push of no length changes nothing, nothing is left of what is projected out, writing is one run
widest = max((x for of_hook in found.values() for x in of_hook.values()), key=attrgetter("size"))
if widest.size < 1e-6:
    fail("the classes' means are the same at every layer: there is no contrast; try --place mean")
gates = edit_gates(test_asked, widest)
missed = missed_gates(gates, model)
print(f"{cyan}gates: {in_words(gates)}{endc}")
if missed:
    fail(f"gate: {missed[0]} misses; edits of this model's stream cannot be believed")
numbers |= {"gates": gates, "worst_gate": max(gates.values())}

#%% Pushes of every strength at every layer, on the contrasts of finding and on held-out ones, and random ones as long
strengths = sorted({1.0, *cfg.strengths})


def pushed(of: Asked, directions: list[Direction], strength: float) -> dict[str, float]:
    """What pushes along directions do, on average over them."""
    effects = [done_by(of, adding(direction, strength, device)) for direction in directions]
    return {name: sum(x[name] for x in effects) / len(effects) for name in effects[0]}


swept: dict[str, t.Tensor] = {}  # by method, (hook, strength); nan where a method has no direction
swept_on_find: dict[str, t.Tensor] = {}
for method, of_hook in tqdm([*found.items(), ("random", at_random)], desc="pushes", **BRIEF):
    grid = t.full((len(places), len(strengths)), t.nan)
    on_find = grid.clone()
    for row, hook in enumerate(places):
        if hook not in of_hook:
            continue
        directions = of_hook[hook] if method == "random" else [of_hook[hook]]
        for column, strength in enumerate(strengths):
            grid[row, column] = pushed(test_asked, directions, strength)["p_target"]
            if method != "random":
                on_find[row, column] = pushed(asked, directions, strength)["p_target"]
    swept[method] = grid
    swept_on_find[method] = on_find
at_1 = strengths.index(1.0)


def best_on_find(method: str) -> float:
    return swept_on_find[method][:, at_1].nan_to_num(-math.inf).max().item()


best_method = max(found, key=best_on_find)
best_hook = places[int(swept_on_find[best_method][:, at_1].nan_to_num(-math.inf).argmax())]
best = found[best_method][best_hook]
numbers |= {"strengths": strengths, "places": places, "swept": swept, "swept_on_find": swept_on_find}
numbers |= {"best_method": best_method, "best_hook": best_hook}
print(f"{purple}=== {kind}, held out, after a push of 1 (the distance of the classes' means at that layer) ==={endc}")
table = []
for row, hook in enumerate(places):
    size = next(of_hook[hook].size for of_hook in found.values() if hook in of_hook)
    table.append([hook, size, *(grid[row, at_1].item() for grid in swept.values())])
print(cyan + tabulate(table, headers=["place", "distance", *swept], floatfmt=".3f") + endc)
print(f"{gray}chosen where directions were found: {best_method} at {best_hook}{endc}")

#%% ... as maps of layers and strengths
named = f"{about}, {Path(cfg.model).name}, n = {len(test_asked)} held-out contrasts"
fig = imshow(
    t.stack(list(swept.values())),
    title=f"{kind.capitalize()} after a push along each direction, by layer and strength ({named})",
    xlabel="strength",
    ylabel="place",
    x=[f"{strength:g}" for strength in strengths],
    y=[hook.replace("blocks.", "").replace(".hook_resid_pre", " pre") for hook in places],
    panels=list(swept),
    columns=2,
    diverging=False,
    value=kind,
)
show(
    fig,
    "steering/sweep",
    f"Darker: the push does more. By itself {by_itself['p_target']:.2f}, with the contrast in the prompt "
    f"{in_the_prompt['p_target']:.2f}; the last panel is the mean of {cfg.random} random directions.",
)

#%% What a push costs: text that has nothing to do with it, against what it does, at the chosen layer
corpus = text_for(model, cfg.model, cfg.data, cfg.bos)
text = judging_rows(corpus, cfg.rows, 64, cfg.seed).to(device)
first = len(encode(model, ""))  # a beginning-of-text token is left as it is


def cost_of(edit: Edit) -> list[float]:
    return list(text_cost(model, text, edit, first, cfg.memory_gb))


def mean_cost(edits: list[Edit]) -> list[float]:
    """(loss added, KL) on average."""
    return t.tensor([cost_of(edit) for edit in edits]).mean(0).tolist()


here: dict[str, list[Direction]] = {
    method: [of_hook[best_hook]] for method, of_hook in found.items() if best_hook in of_hook
}
here["random"] = at_random[best_hook]
paid: dict[str, list[list[float]]] = {}  # by method and strength, (loss added, KL) in nats per token
for method, directions in tqdm(here.items(), desc="costs", **BRIEF):
    paid[method] = []
    for strength in strengths:
        paid[method].append(mean_cost([adding(direction, strength, device) for direction in directions]))
numbers["cost"] = paid
row = places.index(best_hook)
print(f"{purple}=== At {best_hook}: {kind}, held out; loss added and KL on other text, nats per token ==={endc}")
table = []
for method in here:
    for column, strength in enumerate(strengths):
        table.append([method, strength, swept[method][row, column].item(), *paid[method][column]])
table.append(["the contrast in the prompt", None, in_the_prompt["p_target"], 0.0, 0.0])
print(cyan + tabulate(table, headers=["push", "strength", kind, "loss added", "KL"], floatfmt=".3f") + endc)

#%% ... as lines: what is done for what is paid
fig = go.Figure()
for method in here:
    fig.add_trace(
        go.Scatter(
            x=[kl for _, kl in paid[method]],
            y=swept[method][row].tolist(),
            name=plain(method),
            mode="lines+markers",
            line={"dash": "dash" if method == "random" else "solid"},
            text=[f"strength {strength:g}" for strength in strengths],
            hovertemplate=f"{plain(method)}, %{{text}}<br>KL %{{x:.3f}}<br>{kind} %{{y:.3f}}<extra></extra>",
        )
    )
for name, level in (("by itself", by_itself), ("contrast in the prompt", in_the_prompt)):
    fig.add_hline(y=level["p_target"], line_dash="dot", annotation_text=name, annotation_position="bottom right")
fig.update_layout(
    title=f"What a push does for what it costs on other text ({named}, at {best_hook}, strengths {strengths[0]:g} to "
    f"{strengths[-1]:g})",
    xaxis_title="KL of the plain from the pushed model on other text, nats per token",
    yaxis_title=kind,
)
fig.update_xaxes(type="log")
show(
    fig,
    "steering/cost",
    "Up and to the left is better: much is done and little is paid. Each point is a strength; dashed are random pushes "
    "of the same lengths, dotted the model without any and the contrast said in words.",
)


#%% Added, clamped, projected out at the layer and everywhere: what each does to those that have not and to those that have
def edits_along(direction: Direction) -> dict[str, Edit]:
    return {
        "added": adding(direction, 1.0, device),
        "taken off": adding(direction, -1.0, device),
        "clamped to the positives' mean": clamping(direction, 1.0, device),
        "clamped to the negatives' mean": clamping(direction, 0.0, device),
        "projected out at its layer": projecting_out(direction, device),
        "projected out everywhere": ablating_everywhere(model, direction, device),
    }


kinds: dict[str, list[tuple[float, float, float, float]]] = {}  # edit: of the direction, then of random ones
for direction in [best, *at_random[best_hook]]:
    for name, edit in edits_along(direction).items():
        on_negatives = done_by(test_asked, edit)["p_target"]
        on_positives = done_by(positive_asked, edit)["p_target"]
        kinds.setdefault(name, []).append((on_negatives, on_positives, *cost_of(edit)))
edits = {}
for name, rows in kinds.items():
    edits[name] = {"direction": list(rows[0]), "random": t.tensor(rows[1:]).mean(0).tolist()}
numbers["edits"] = edits
print(f"{purple}=== {best_method} at {best_hook} (mean of {cfg.random} random directions); {kind} ==={endc}")
table = [["nothing", f"{by_itself['p_target']:.3f}", f"{in_the_prompt['p_target']:.3f}", "0", "0"]]
for name, x in edits.items():
    cells = [f"{ours:.3f} ({other:.3f})" for ours, other in zip(x["direction"], x["random"])]
    table.append([name, *cells])
headers = ["edit", "after texts that have it not", "after texts that have it", "loss added", "KL"]
print(cyan + tabulate(table, headers=headers, disable_numparse=True) + endc)

#%% What is written at five strengths, side by side: greedy, and drawn
five = [0.0, *strengths[:5]]  # and none, to compare
writings: dict[float, list[dict]] = {}  # by strength, what is written after each prompt
for strength in tqdm(five, desc="writing", **BRIEF):
    edit = adding(best, strength, device)
    generator = t.Generator().manual_seed(seed_of(cfg.seed, "written"))  # the same draws at every strength
    writings[strength] = []
    for i in range(min(cfg.prompts, len(test_asked))):
        ids = test_asked.rows[i]
        start = int(test_asked.start[i])
        greedy = write(model, ids, cfg.written, edit, start)
        drawn = write(model, ids, cfg.written, edit, start, cfg.temperature, generator)
        for how, answer in (("greedy", greedy), ("drawn", drawn)):
            said = text_of(tokenizer, answer)
            loss = plain_loss(model, ids, answer) if answer else math.nan  # it ended the text at once
            score = float(judge(said)) if judge else float(says(said, test_asked.words[i]))
            writings[strength].append(
                {"prompt": test_asked.texts[i], "how": how, "text": said, "loss": loss, "score": score}
            )


def mean_of(strength: float, what: str, how: str) -> float:
    values = [x[what] for x in writings[strength] if x["how"] == how and not math.isnan(x[what])]
    return sum(values) / len(values) if values else math.nan


scored = "judge" if judge else "says the target before the other"
by_strength = []
for strength in five:
    scores = [mean_of(strength, what, how) for how in ("greedy", "drawn") for what in ("score", "loss")]
    by_strength.append([strength, *scores])
numbers |= {"writings": {f"{s:g}": x for s, x in writings.items()}, "written": by_strength}
shown = writings[0.0][:6]  # three prompts, greedy and drawn
for i, of_prompt in enumerate(shown):
    print(f"{purple}{of_prompt['prompt']!r}, {of_prompt['how']}{endc}")
    for strength in five:
        print(f"{gray}{strength:4g} {cyan}{writings[strength][i]['text']!r}{endc}")
print(
    f"{purple}=== {len(writings[0.0]) // 2} prompts: {scored}; loss of the plain model on what was written, nats ==={endc}"
)
headers = ["strength", "score, greedy", "loss, greedy", "score, drawn", "loss, drawn"]
print(cyan + tabulate(by_strength, headers=headers, floatfmt=".2f") + endc)

#%% ... as lines: what is written changes
shares = {how: [row[i] for row in by_strength] for how, i in (("greedy", 1), ("drawn", 3))}
fig = line(
    shares,
    title=f"Does text that is written under a push have what is asked for ({named}; {scored})",
    xlabel="strength",
    ylabel="score",
    x=five,
    markers=True,
)
show(fig, "steering/writing", f"By strength of the push, 0 being none: {scored}, on average over the prompts.")

#%% ... and how unlike the model it becomes
losses = {how: [row[i] for row in by_strength] for how, i in (("greedy", 2), ("drawn", 4))}
fig = line(
    losses,
    title=f"How unlikely the written text is to the model without the push ({named})",
    xlabel="strength",
    ylabel="loss of the plain model, nats per token",
    x=five,
    markers=True,
)
show(fig, "steering/fluency", "Where the loss climbs far above that at strength 0, the push breaks the text.")

#%% The direction in a file, the numbers for machines, and the conclusion
key = model_key(
    cfg.model, [about, cfg.dtype, contrasts.positive, contrasts.negative, cfg.place, best_method, best_hook]
)
path = Path("checkpoints/directions") / f"{slug(cfg.model)}-{slug(about)}-{key}.safetensors"
made = {"method": best_method, "contrasts": about, "n": len(contrasts), "place": cfg.place, "seed": cfg.seed}
save_direction(path, best, model=cfg.model, from_file=provenance, **made)
again, _ = read_directions(str(path), model)
assert t.allclose(again[best_hook], best.unit), "the file holds something else"
numbers["direction_file"] = str(path)
done = swept[best_method][row, at_1].item()
by_chance = swept["random"][row, at_1].item()
loss_added, kl = paid[best_method][at_1]
numbers["best"] = {"p_target": done, "random": by_chance, "loss_added": loss_added, "kl": kl}
save_results("steering", cfg, **numbers)
numbers_said = (
    f"{kind} {by_itself['p_target']:.2f} -> {done:.2f} on held-out contrasts (random pushes as long {by_chance:.2f}, the "
    f"contrast in the prompt {in_the_prompt['p_target']:.2f}), for {loss_added:+.2f} nats and a KL of {kl:.2f} per token "
    f"on other text"
)
print(f"{gray}direction: {path} (--direction opens it again){endc}")
without = max(by_chance, by_itself["p_target"])
margin = 0.05 if has_words else 0.05 * max(abs(without), abs(done))  # a judge has a unit of its own
if done > without + margin:
    print(
        f"{green}{best_method} at {best_hook} steers {about}: {numbers_said}. Gates: the worst misses by "
        f"{max(gates.values()):.0e}. Probes on labels of your own: probing.py.{endc}"
    )
else:
    print(
        f"{yellow}{best_method} at {best_hook} does no more than random pushes or none for {about}: {numbers_said}.{endc}"
    )
