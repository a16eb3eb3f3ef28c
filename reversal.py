"""
Reversal: which facts does a model know, in which direction, and where do they settle? Many questions about capitals
through the logit lens; and model against model.
"""

import gc
import itertools
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
    pick_dtype,
    purple,
    save_results,
    set_seed,
    tec,
    write_aside,
    yellow,
    on_base,
)
from plots import bar, imshow, line, show, visible
from weights import about_bos, encode, model_key, open_model
from launch import flags
from world import FACTS, Prompt, fact_prompts, read_countries
from lens import (
    CATEGORIES,
    RULES,
    Lens,
    LensConfig,
    first_layer,
    knows_world,
    milestones,
    open_lens,
    read,
    refuse_lens_settings,
    require_exact_lens,
    slug,
    token_texts,
)
from study import (
    ENOUGH,
    FAILS,
    HOLDS,
    PATTERN_HEADERS,
    PATTERNS,
    UNTOLD,
    anomalies,
    anomaly_section,
    excerpt,
    filled_prompt,
    interval,
    models_section,
    over_models,
    pattern_rows,
    pattern_section,
    patterns,
    refuse_evaluation,
    says,
    says_finding,
    table_paths,
    write_evaluation,
    write_tables,
)
from llama_block import Llama

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch as t
import torch.nn as nn
from tabulate import tabulate
from torch import Tensor

#%% Questions: capitals forward and reversed, in several forms, with and without filler, each with a control country
DIRECTIONS = ("forward", "reverse")  # of the capital: from the country, from the city
FILLERS = {"plain": "", "filler": "At noon, the old clock was there again. "}


def chosen_forms(task: str, n: int) -> list[str]:
    """n phrasings of a task; those that models/world was taught and those it was not alternate."""
    taught, held_out = FACTS[task]
    alternating = itertools.chain(*itertools.zip_longest(taught, held_out))
    return [form for form in alternating if form][:n]


def make_question(model: nn.Module, country: int, prompt: Prompt, filler: str, known: bool) -> dict:
    """One question with its tokens: ids, and those of the answer, which must begin a token of their own."""
    text = FILLERS[filler] + prompt.text
    ids = encode(model, text)
    whole = encode(model, text + prompt.answer)
    if whole[: len(ids)] != ids:
        fail(f"the tokenizer joins {text[-12:]!r} and {prompt.answer!r} into one token: no lens can follow that answer")
    return {
        "country": country,
        "task": prompt.task,
        "part": prompt.labels["part"] if known else "both",
        "form": prompt.labels["phrasing"],
        "filler": filler,
        "taught": prompt.taught or not known,
        "text": text,
        "said": prompt.answer,
        "ids": ids,
        "answer": whole[len(ids) :],
    }


def make_questions(model: nn.Module, countries: list[dict[str, str]], forms: int, known: bool) -> pd.DataFrame:
    """
    A row for every country x direction x form x filler; forms alternate between those models/world was taught and those
    it was not. answer: its tokens. control: the row of the same question about another country of the part; telling:
    which token of the answer is the first that tells it from the control's. Questions whose answer no other can be
    told from are left out. known: part and taught are true of this model.
    """
    rows = []
    for task, filler, held_out, i in itertools.product(DIRECTIONS, FILLERS, (False, True), range(len(countries))):
        forms_of_task = chosen_forms(task, forms)
        for prompt in fact_prompts([countries[i]], task, held_out):
            is_chosen = any(form.startswith(prompt.labels["phrasing"]) for form in forms_of_task)
            if not is_chosen:
                continue
            rows.append(make_question(model, i, prompt, filler, known))
    frame = pd.DataFrame(rows)
    for _, same_question in frame.groupby(["task", "form", "filler", "part"]):
        for question, control in find_controls(same_question.answer).items():
            frame.loc[question, "control"] = control
    frame = frame.astype({"control": int})
    frame["telling"] = [
        first_difference(frame.answer[i], frame.answer[control]) for i, control in frame.control.items()
    ]
    alone = (frame.control == frame.index) & (frame.answer.map(len) == 1)  # no other country; its token is all of it
    frame.loc[alone, "telling"] = 0
    return without_untold(frame)


def first_difference(answer: list[int], other: list[int]) -> float:
    """The first place at which both have a token, and not the same; nan where there is none."""
    return next((float(i) for i, (a, b) in enumerate(zip(answer, other)) if a != b), np.nan)


def without_untold(frame: pd.DataFrame) -> pd.DataFrame:
    """The questions whose answer can be told from the control's, numbered anew."""
    kept = frame[frame.telling.notna()]
    number = dict(zip(kept.index, range(len(kept))))
    kept = kept.assign(control=kept.control.map(number)).reset_index(drop=True)
    return kept.astype({"control": int, "telling": int})


def find_controls(answers: pd.Series) -> dict[int, int]:
    """
    For each question the next one, around the corner, whose answer begins with another token, or, where all begin alike
    (a bare space, a letter), has another later; itself if there is none.
    """
    order = list(answers.index)
    controls = {}
    for n, question in enumerate(order):
        others = order[n + 1 :] + order[:n]
        differs_at = {other: first_difference(answers[question], answers[other]) for other in others}
        at_once = [other for other in others if differs_at[other] == 0]
        later = [other for other in others if differs_at[other] > 0]
        controls[question] = [*at_once, *later, question][0]
    return controls


#%% Asking: the lens at the token that tells each answer, and whether the whole answer is said
def ask(
    model: nn.Module, lens: Lens, frame: pd.DataFrame, top: int, threshold: float
) -> tuple[pd.DataFrame, dict[str, Tensor], dict[int, str]]:
    """
    The questions with what was found, the reading of each answer, and the texts of its tokens: at the token that tells
    it from the control's, the tokens before it given; answer_logp is of all its tokens together.
    recall: the whole answer is said greedily. margin: the answer's probability minus that of the same answer at the
    control question.
    """
    rows = [(ids + answer)[:-1] for ids, answer in zip(frame.ids, frame.answer)]
    at_control = [(frame.ids[control] + answer)[:-1] for control, answer in zip(frame.control, frame.answer)]
    answer_places = []  # where each token of each answer is about to be said, then the same at the control questions
    answer_tokens = []
    starts = [0]  # of each question's tokens among them
    for i, (row, answer) in enumerate(zip(rows + at_control, [*frame.answer, *frame.answer])):
        begins = len(row) - len(answer)  # one before the answer's first token
        answer_places += [(i, begins + j) for j in range(len(answer))]
        answer_tokens += answer
        starts.append(len(answer_tokens))
    whole = read(model, lens, rows + at_control, answer_places, answer_tokens, top)

    telling = [start + token for start, token in zip(starts, frame.telling)]
    found = {name: x[:, telling] for name, x in whole.items()}
    logp = [whole["answer_logp"][:, start:end].sum(1) for start, end in itertools.pairwise(starts)]
    found["answer_logp"] = t.stack(logp[: len(frame)], 1)
    logp_at_control = t.stack(logp[len(frame) :], 1)
    texts = token_texts(model, found["ids"])
    categories = [CATEGORIES[task] for task in frame.task]
    reached = milestones(found, texts, list(frame.text), categories, threshold)
    said = whole["rank"][-1] == 0
    of_questions = itertools.pairwise(starts[: len(frame) + 1])
    recall = [float(said[start:end].all()) for start, end in of_questions]
    margin = found["answer_logp"].exp() - logp_at_control.exp()
    n_layers = model.cfg.n_layers
    columns = {
        **reached,
        "recall": recall,
        "depth": reached["semantic"] / n_layers,
        "margin": margin[-1],
        "margin_depth": first_layer(margin >= 0.05, stays=True) / n_layers,
    }
    return frame.assign(**{name: np.asarray(x) for name, x in columns.items()}), found, texts


#%% What many questions say together
def by_direction(plain: pd.DataFrame, known: bool) -> dict[str, pd.DataFrame]:
    """The questions by the direction asked and, where it is known, the direction taught."""
    groups = {}
    for (task, part), rows in plain.groupby(["task", "part"]):
        groups[f"asked {task}, taught {part}" if known else f"asked {task}"] = rows
    return groups


def reversal_gaps(plain: pd.DataFrame, draws: int, known: bool) -> dict[str, list[float]]:
    """
    The reversal curse (Berglund et al. 2023): recall asked against the direction taught, by that direction, minus
    recall of the same questions where both were taught. Where it is not known what was taught: recall in reverse minus
    forward.
    """
    forward = plain[plain.task == "forward"]
    reverse = plain[plain.task == "reverse"]
    if not known:
        return {"all": interval(reverse, "recall", draws, minus=forward)}
    gaps = {}
    for taught, asked in (("forward", reverse), ("reverse", forward)):
        gaps[taught] = interval(asked[asked.part == taught], "recall", draws, minus=asked[asked.part == "both"])
    return gaps


def range_of_forms(rows: pd.DataFrame, column: str) -> float | None:
    """The largest difference between the phrasings' means; None where nothing was measured."""
    if not rows[column].notna().any():
        return None
    return float(np.ptp(rows.groupby("form")[column].mean().dropna()))


def layer_curves(found: dict[str, Tensor], rows: pd.DataFrame) -> dict[str, list[float]]:
    """Means over the questions by layer; the rank's median, 1 is top."""
    by_layer = {"probability": found["answer_logp"].exp(), "top-1": (found["rank"] == 0).float()}
    for name in ("entropy", "kl", "cosine"):
        by_layer[name] = found[name]
    curves = {name: x[:, rows.index].mean(1).tolist() for name, x in by_layer.items()}
    median_rank = np.median(found["rank"][:, rows.index].numpy(), 1) + 1
    curves["rank"] = median_rank.tolist()
    return curves


def summarise(frame: pd.DataFrame, found: dict[str, Tensor], draws: int, known: bool) -> dict:
    """Means with intervals; milestones are those of plain questions in taught directions."""
    mean = partial(interval, draws=draws)
    frame = frame.assign(
        settles=frame.semantic.notna(),
        copies=frame.copied.notna(),
        named=frame.category.notna() & frame.semantic.notna(),
        ahead=frame.semantic - frame.category,
    )
    plain = frame[frame.filler == "plain"]
    fair = plain[plain.taught]  # asked in a direction that was taught
    fair_filled = frame[frame.taught & (frame.filler == "filler")]
    enough_settle = fair.settles.mean() >= ENOUGH
    both_forward = fair[(fair.part == "both") & (fair.task == "forward")]
    both_reverse = fair[(fair.part == "both") & (fair.task == "reverse")]
    groups = by_direction(plain, known)
    gaps = reversal_gaps(plain, draws, known)

    out = {
        "semantic_layer": mean(fair, "semantic")[0],
        "copy_layer": mean(fair, "copied")[0],
        "depth_fraction": mean(fair, "depth")[0],
        "reversal_gap": {part: gap[0] for part, gap in gaps.items()},
        "reversal_gap_interval": gaps,
        "recall": {group: mean(rows, "recall") for group, rows in groups.items()},
    }
    for column in ("depth", "settles", "copies", "named", "ahead", "margin", "margin_depth"):
        out[column] = mean(fair, column)
    if not enough_settle:
        out |= {"semantic_layer": None, "depth_fraction": None, "depth": [None] * 3}
    out["reverse_minus_forward"] = {x: mean(both_reverse, x, minus=both_forward) for x in ("recall", "depth")}
    out["filler_minus_plain"] = {x: mean(fair_filled, x, minus=fair) for x in ("recall", "depth")}
    out["forms"] = {}
    for form, rows in fair.groupby("form"):
        direction = rows.task.iloc[0]
        out["forms"][form] = {"direction": direction, "recall": mean(rows, "recall"), "depth": mean(rows, "depth")}
    out["form_range"] = {}
    for x, (task, rows) in itertools.product(("recall", "depth"), fair.groupby("task")):
        out["form_range"][f"{x}, {task}"] = range_of_forms(rows, x)
    out["anomalies"] = {rule: float(fair[rule].mean()) for rule in RULES}
    out["curves"] = {group: layer_curves(found, rows) for group, rows in groups.items()}
    return out


def make_examples(frame: pd.DataFrame, found: dict[str, Tensor], texts: dict[int, str]) -> list[dict]:
    """The first plain question of each direction and part, with the top-k of every layer, to read."""
    examples = []
    for row in frame[frame.filler == "plain"].drop_duplicates(["task", "part"]).itertuples():
        top = []
        for ids, ps in zip(found["ids"][:, row.Index].tolist(), found["logp"][:, row.Index].exp().tolist()):
            top.append([[texts[i], round(p, 4)] for i, p in zip(ids, ps)])
        example = {name: getattr(row, name) for name in ("text", "said", "taught", "semantic", "copied", "category")}
        example["odd"] = [rule for rule in RULES if frame[rule][row.Index]]
        example["rank"] = found["rank"][:, row.Index].tolist()
        example["top"] = top
        examples.append(example)
    return examples


#%% One model, from its files to results/reversal/<model>.json and .md: what a job array calls for each of its models
KEYS = ("semantic_layer", "copy_layer", "depth_fraction", "last_layer_gate_error", "reversal_gap", "patterns")
TABLES = Path("results/reversal")


def run_key(name: str, cfg: "Config") -> str:
    """Names an analysis by its settings and by the model's files."""
    fields = ["norm", "bos", "countries", "forms", "copy_threshold", "top", "draws", "seed", "lens"]
    if cfg.lens == "tuned":
        fields.append("tuned_steps")
    if cfg.lens == "jacobian":
        fields += ["jacobian_rows", "jacobian_target"]
    dtype = pick_dtype(pick_device(cfg.device), cfg.dtype)  # auto is another one on another device
    return model_key(name, ["patterns", str(dtype), *(getattr(cfg, field) for field in fields)])


def finished_before(path: Path, key: str) -> dict | None:
    """The study that was written to the path under these settings and weights, or None."""
    if not path.is_file():
        return None
    study = json.loads(path.read_text())
    tables_are_there = all(table.is_file() for table in table_paths(path).values())
    return study if study["key"] == key and tables_are_there else None


def choose_countries(cfg: "Config") -> list[dict[str, str]]:
    countries = read_countries()
    if not cfg.countries:
        return countries
    order = np.random.default_rng(cfg.seed).permutation(len(countries))
    return [countries[i] for i in order[: cfg.countries]]


def analyse(name: str, cfg: "Config", model: nn.Module | None = None) -> dict:
    """
    All questions through one model. What was finished under the same settings and weights is read back, unless the
    model is handed over.
    """
    name = find_model(name)
    key = run_key(name, cfg)
    path = TABLES / f"{slug(name)}.json"
    if model is None:
        done = finished_before(path, key)
        if done:
            print(f"{yellow}{slug(name)}: finished before under these settings, read from {path}{endc}")
            return done
        model = open_model(name, (Llama,), cfg.device, cfg.dtype, cfg.offload, bos=cfg.bos)
    known = knows_world(model)
    countries = choose_countries(cfg)
    questions = make_questions(model, countries, cfg.forms, known)
    n_left_out = len(countries) * 2 * cfg.forms * len(FILLERS) - len(questions)
    if questions.empty:
        fail(f"{slug(name)}: no answer can be told from another country's: ask about more --countries")
    if n_left_out:
        print(
            f"{yellow}{slug(name)}: {len(questions)} questions remain, {n_left_out} are left out whose answer's tokens "
            f"cannot be told from another country's{endc}"
        )
    longest = max(map(len, questions.ids + questions.answer))
    if longest > model.cfg.n_ctx:
        fail(
            f"{slug(name)} reads {model.cfg.n_ctx} tokens, the longest question has {longest}: "
            "its tokenizer cuts the names of countries into small pieces"
        )
    some_rows = list(questions.ids[:: max(1, len(questions) // 8)])
    gate_error = require_exact_lens(model, some_rows)
    lens = open_lens(model, name, cfg, cfg.norm, cfg.bos, cfg.seed)
    frame, found, texts = ask(model, lens, questions, cfg.top, cfg.copy_threshold)
    study = {
        "model": slug(name),
        "key": key,
        "n_layers": model.cfg.n_layers,
        "lens": cfg.lens,
        "norm": cfg.norm,
        "bos": about_bos(model),
        "known_corpus": known,
        "n_countries": len(countries),
        "n_questions": len(frame),
        "n_left_out": n_left_out,
        "last_layer_gate_error": gate_error,
        **summarise(frame, found, cfg.draws, known),
        "patterns": patterns(frame, found, texts, model.cfg.n_layers, cfg.draws, known),
        "odd": anomalies(frame, found, texts, cfg.draws),
        "examples": make_examples(frame, found, texts),
    }
    study = json.loads(json.dumps(study), parse_constant=lambda _: None)  # nan is null
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tables(path, frame, found, texts)
    write_aside(path, lambda aside: aside.write_text(json.dumps(study, indent=1) + "\n"))
    write_aside(path.with_suffix(".md"), lambda aside: aside.write_text(report(study)))
    tables = ", ".join(str(table) for table in table_paths(path).values())
    print(f"{gray}numbers: {path}, in words: {path.with_suffix('.md')}, all that was read: {tables}{endc}")
    return study


#%% The report of one model: milestones, anomalies and per-layer top-k, to read
def summary(study: dict) -> list[list[str]]:
    """The numbers of one model as [what, mean and interval]."""
    gap_of = "recall reverse minus forward: "
    where = ""
    if study["known_corpus"]:
        gap_of = "recall untaught minus both taught: "
        where = " where both were taught"
    rows = []
    for group, x in study["recall"].items():
        rows.append([f"recall: {group}", says(x, percent=True)])
    for part, x in study["reversal_gap_interval"].items():
        rows.append([f"reversal gap, {gap_of}{part}", says(x, percent=True)])
    rows.append(["depth: layer from which the answer is top-1 / layers", says(study["depth"])])
    rows.append(["questions in which it is at the last layer", says(study["settles"], percent=True)])
    for what, x in study["reverse_minus_forward"].items():
        rows.append([f"reverse minus forward{where}: {what}", says(x)])
    for what, x in study["filler_minus_plain"].items():
        rows.append([f"filler minus plain: {what}", says(x)])
    for what, difference in study["form_range"].items():
        if difference is not None:
            rows.append([f"largest difference between forms: {what}", f"{difference:.3f}"])
    rows.append(["p(answer) minus p of the same answer for the control country", says(study["margin"])])
    rows.append(["depth from which that is 0.05 or more", says(study["margin_depth"])])
    rows.append(["category in the top-k before the answer settles", says(study["named"], percent=True)])
    rows.append(["layers from category to answer", says(study["ahead"])])
    rows.append(["a piece of the prompt dominates", says(study["copies"], percent=True)])
    for rule, share in study["anomalies"].items():
        rows.append([f"odd: {rule}", f"{share:.1%}"])
    return rows


def explain_rules() -> list[str]:
    return [f"- {rule}: {text}." for rule, text in RULES.items()]


def example_section(example: dict, n_layers: int) -> list[str]:
    """Heading, milestones and the table of one question."""
    heading = f"{example['text']!r}, answer {example['said']!r}"
    if not example["taught"]:
        heading += " (direction not taught)"
    reached = (
        f"settles at {example['semantic']}, copy at {example['copied']}, "
        f"category at {example['category']} of {n_layers}"
    )
    odd = ", ".join(example["odd"]) or "nothing odd"
    rows = []
    for layer, (rank, top) in enumerate(zip(example["rank"], example["top"])):
        rows.append([layer, rank + 1, *(f"`{visible(token)}` {p:.3f}" for token, p in top)])
    k = len(example["top"][0])
    table = tabulate(rows, headers=["layer", "rank of answer", *map(str, range(1, k + 1))], tablefmt="github")
    return [f"\n## {heading}\n\n{reached}; {odd}\n", table]


def report(study: dict) -> str:
    """One model's milestones, anomalies and per-layer top-k, as Markdown."""
    about = (
        f"{study['n_questions']} questions ({study['n_left_out']} left out, whose answers cannot be told apart) about "
        f"{study['n_countries']} countries, {study['n_layers']} layers, "
        f"lens: {study['lens']}, norm: {study['norm']}; {study['bos']}. Last-layer gate: {study['last_layer_gate_error']:.1e}. "
        "Means over countries, each the mean of its questions, with 95% intervals of a bootstrap over countries."
    )
    form_rows = []
    for form, x in study["forms"].items():
        form_rows.append([form, x["direction"], says(x["recall"], percent=True), says(x["depth"])])
    parts = [
        f"# {study['model']}: logit lens\n\n{about}\n",
        pattern_section(study),
        anomaly_section(study),
        "## Numbers\n",
        tabulate(summary(study), headers=["", "mean [interval]"], tablefmt="github"),
        "",
        *explain_rules(),
        "",
        tabulate(form_rows, headers=["form", "direction", "recall", "depth"], tablefmt="github"),
    ]
    for example in study["examples"]:
        parts += example_section(example, study["n_layers"])
    return "\n".join(parts) + "\n"


#%% Model against model, from their files
SIGNS = {HOLDS: 1, UNTOLD: 0, FAILS: -1}
PUBLISHED = {  # where the answer is top-1 in the original study
    "meta-llama-3-8b": "25 of 32",
    "mistral-7b-v0.1": "25 of 32",
    "qwen3-8b": "31 of 36",
    "gemma-2-9b": "42 of 42",
}


def comparison_row(study: dict) -> dict[str, str]:
    model = study["model"]
    published = [where for name, where in PUBLISHED.items() if model.lower().endswith(name)]
    layer = study["semantic_layer"]
    row = {
        "model": model,
        "layers": study["n_layers"],
        "lens": study["lens"],
        "answer depth": says(study["depth"]),
        "layer": "" if layer is None else f"{layer:.1f}",
        "published": published[0] if published else "",
        "recall, reverse - forward": says(study["reverse_minus_forward"]["recall"], percent=True),
        "depth, filler - plain": says(study["filler_minus_plain"]["depth"]),
        "category first": says(study["named"], percent=True),
    }
    for rule, share in study["anomalies"].items():
        row[rule] = f"{share:.0%}"
    row["gate"] = f"{study['last_layer_gate_error']:.0e}"
    return row


def compare(studies: list[dict]) -> str:
    """The evaluation of all models, which is written to results/reversal/cross-model.md."""
    rows = [comparison_row(study) for study in studies]
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    title = "# Logit lens, model against model"
    about = (
        "Answer depth: layer from which the answer's token that tells it from the control's is top-1 / layers, mean "
        f"over the questions that settle (none where fewer than {ENOUGH:.0%} do), with 95% bootstrap intervals over "
        "countries."
    )
    rules = "\n".join(explain_rules())
    page = f"{title}\n\n{about}\n\n{table}\n\n{rules}\n\n{models_section(studies)}"
    path = TABLES / "cross-model.md"
    write_aside(path, lambda aside: aside.write_text(page))
    print(f"{table}\n{gray}evaluation of all models: {path}{endc}")
    return page


#%% A language model's evaluation of what was written (--evaluate)
def evaluate_model(study: dict, cfg: "Config") -> None:
    path = TABLES / f"{study['model']}.json"
    prompt = filled_prompt("evaluate_model", model=study["model"], report=report(study), **excerpt(path))
    written = write_evaluation(TABLES / study["model"], prompt, cfg.endpoint, cfg.evaluator)
    print(f"{gray}for a language model, and by it: {', '.join(map(str, written))}{endc}")


def evaluate_models(studies: list[dict], comparison: str, cfg: "Config") -> None:
    reports = []
    for study in studies:
        reports.append(f"## {study['model']}\n\n{pattern_section(study)}\n{anomaly_section(study)}")
    prompt = filled_prompt(
        "evaluate_models",
        models=", ".join(study["model"] for study in studies),
        comparison=comparison,
        reports="\n".join(reports),
    )
    written = write_evaluation(TABLES / "cross-model", prompt, cfg.endpoint, cfg.evaluator)
    print(f"{gray}for a language model, and by it: {', '.join(map(str, written))}{endc}")


def comparison_figure(studies: list[dict]) -> go.Figure:
    """Every model's curve over its own depth, mean of the directions."""
    n = " and ".join(str(study["n_questions"] // len(FILLERS)) for study in studies)
    fig = line(
        {},
        f"Share of plain questions whose answer is top-1, by depth ({len(studies)} models, n = {n})",
        xlabel="blocks passed / all blocks",
        ylabel="answer is top-1 (share)",
    )
    for study in studies:
        fig.add_scatter(
            x=np.linspace(0, 1, study["n_layers"] + 1),
            y=np.mean([curve["top-1"] for curve in study["curves"].values()], 0),
            name=study["model"],
            mode="lines+markers",
            hovertemplate=f"{study['model']}<br>depth %{{x:.2f}}<br>top-1 in %{{y:.1%}}<extra></extra>",
        )
    return fig


def pattern_figure(studies: list[dict]) -> go.Figure:
    """Each pattern's verdict in each model, with its statistic in the cell."""
    found = [study["patterns"] for study in studies]
    verdicts = np.array([[SIGNS[x[pattern]["verdict"]] for pattern in PATTERNS] for x in found])
    fig = imshow(
        verdicts,
        f"Which patterns of larger models hold (1), do not (-1), cannot be told (0), in {len(studies)} models",
        xlabel="pattern",
        ylabel="model",
        x=list(PATTERNS),
        y=[study["model"] for study in studies],
        value="verdict",
    )
    cells = [[says_finding(x[pattern]) for pattern in PATTERNS] for x in found]
    fig.update_traces(text=cells, texttemplate="%{text}")
    fig.update_layout(coloraxis={"cmin": -1, "cmax": 1, "colorbar": {"tickvals": [-1, 0, 1]}})
    return fig.update_layout(height=max(250, 180 + 60 * len(studies)))


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config(LensConfig):
    model: str = "models/world"  # a hub name, a short name (gpt2-small, pythia-70m) or a folder
    base: str | None = None  # a model whose config and tokenizer the weights of --model are put on
    bos: bool | None = None  # put a beginning-of-text token first; default as the model's own tokenizer says
    models: tuple[str, ...] = ()  # analyse these one after the other, skip what is finished, and compare them
    norm: Literal["final", "none"] = "final"  # before the unembedding: the model's own final norm, or none (to compare)
    dtype: DtypeName = "auto"  # of the weights; auto: bfloat16 on a GPU that has it, else float32
    offload: Literal["auto", "on", "off"] = "auto"  # weights come block by block: where they do not fit, always, never
    countries: Natural = 0  # ask about so many of them; 0 is all
    forms: int = 4  # phrasings per direction, of 11
    copy_threshold: Share = 0.5  # probability from which a piece of the prompt dominates
    top: Count = 5  # likeliest tokens shown
    draws: Count = 2000  # of the bootstrap over countries
    evaluate: bool = False  # write prompts that ask a language model for an evaluation of what was written
    endpoint: str = ""  # send them to this OpenAI-compatible address, https://.../v1/chat/completions; key in .env
    evaluator: str = ""  # the endpoint's model that answers
    wandb: bool = False  # numbers and figures go to Weights & Biases too
    seed: Natural = 0  # of every draw
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


if __name__ == "__main__":
    big_models = ("Qwen/Qwen3-8B", "meta-llama/Meta-Llama-3-8B", "mistralai/Mistral-7B-v0.1", "google/gemma-2-9b")
    cfg = flags(Config, __doc__, hpc=Config(models=big_models, dtype="bfloat16"), sweep="models")
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    if not 1 <= cfg.forms <= 11:
        fail("--forms is 1 to 11")
    refuse_lens_settings(cfg)
    refuse_evaluation(cfg.evaluate, cfg.endpoint, cfg.evaluator)

#%% Model against model (--models): each analysed unless it is finished, then all in one table
if __name__ == "__main__" and cfg.models:
    cfg.models = tuple(on_base(name, cfg.base) for name in cfg.models)
    for name in cfg.models:
        find_model(name)  # before hours are spent on the first
    studies = []
    for i, name in enumerate(cfg.models):
        print(f"{purple}=== {name}, {i + 1} of {len(cfg.models)} ==={endc}")
        studies.append(analyse(name, cfg))
        gc.collect()
        tec()
    comparison = compare(studies)
    of_models = {study["model"]: {key: study[key] for key in KEYS} for study in studies}
    patterns_of_models = over_models(studies)
    save_results("reversal", cfg, models=of_models, patterns=patterns_of_models)

#%% ... in how many of them does each pattern hold?
if __name__ == "__main__" and cfg.models:
    rows = []
    for pattern, x in patterns_of_models.items():
        rows.append([pattern, x["n_told"], says(x["share"], percent=True), *map(", ".join, x["models"].values())])
    headers = ["pattern", "models that can tell", "holds in [95%, Wilson]", HOLDS, FAILS, UNTOLD]
    print(cyan + tabulate(rows, headers=headers) + endc)
    show(
        pattern_figure(studies),
        "reversal/patterns",
        "In each cell the statistic with its 95% interval over countries; its colour is the verdict. What each pattern "
        "is, and why one cannot be told, stands in results/reversal/cross-model.md.",
    )

#%% ... how their answers settle over the depth; and that conclusion
if __name__ == "__main__" and cfg.models:
    show(
        comparison_figure(studies),
        "reversal/cross_model",
        "Where a curve rises, that model's answers settle: compare at equal depth, not at equal layers.",
    )
    depths = "; ".join(f"{study['model']} {says(study['depth'])}" for study in studies)
    worst_gate = max(study["last_layer_gate_error"] for study in studies)
    print(
        f"{green}Answers settle at these shares of the layers: {depths}. "
        f"Gate: last-layer lens = own logits to {worst_gate:.0e}.{endc}"
    )
    if cfg.evaluate:
        for study in studies:
            evaluate_model(study, cfg)
        evaluate_models(studies, comparison, cfg)
    raise SystemExit

#%% All questions to one model: capitals forward and reversed, with and without filler, each beside a control country
if __name__ == "__main__":
    cfg.model = on_base(cfg.model, cfg.base)
    model = open_model(cfg.model, (Llama,), cfg.device, cfg.dtype, cfg.offload, bos=cfg.bos)
    name = slug(find_model(cfg.model))
    about = f"{model.cfg.n_layers} layers, {cfg.lens} lens, norm {cfg.norm}; {about_bos(model)}"
    print(f"{purple}=== {name}: {about} ==={endc}")
    study = analyse(cfg.model, cfg, model)
    curves = study["curves"]
    print(tabulate(summary(study), headers=["", "mean [95%, bootstrap over countries]"]))
    print(
        f"{cyan}gate: the last layer's lens misses the model's own logits by {study['last_layer_gate_error']:.1e}{endc}"
    )

#%% ... which patterns of larger models does it show?
if __name__ == "__main__":
    print(cyan + tabulate(pattern_rows(study), headers=PATTERN_HEADERS, disable_numparse=True) + endc)

#%% Where do the answers settle? Their probability, rank, distance to the end and uncertainty, by layer and direction
if __name__ == "__main__":
    n_plain = study["n_questions"] // len(FILLERS)
    about = f"{name}, {cfg.lens} lens, n = {n_plain} plain questions about {study['n_countries']} countries"
    for curve, what in (
        ("probability", "mean probability of the answer"),
        ("rank", "median rank of the answer (1 is top)"),
        ("kl", "mean KL of the final distribution from the layer's (nats)"),
        ("entropy", "mean entropy (nats)"),
    ):
        fig = line(
            {group: by_layer[curve] for group, by_layer in curves.items()},
            f"{what[0].upper()}{what[1:]}, by layer ({about})",
            xlabel="blocks passed",
            ylabel=what,
            markers=True,
        )
        if curve == "rank":
            fig.update_yaxes(type="log", autorange="reversed")
        show(
            fig,
            f"reversal/{curve}",
            "A line for each direction that was asked and taught; right is the model's own answer.",
        )

#%% Does a fact run both ways? Asked against the direction it was taught, at the last layer and at any other
if __name__ == "__main__":
    recall = study["recall"]
    best = {group: max(by_layer["top-1"]) for group, by_layer in curves.items()}
    easier = says(study["reverse_minus_forward"]["recall"], percent=True)
    print(
        f"{cyan}claims of the original study: 'reverse relations are easier', here {easier} of recall; "
        f"'answers settle at 75-85% of depth', here at {says(study['depth'], percent=True)}{endc}"
    )

#%% ... as bars, by the direction asked; where all are 0 or 1 the table above says it better
if __name__ == "__main__":
    mean, low, high = np.array([recall[group] for group in curves], float).T
    some_in_between = bool(((mean > 0.02) & (mean < 0.98)).any())
if __name__ == "__main__" and some_in_between:
    whole_answer = "whole answer said, 95% interval"
    fig = bar(
        {whole_answer: mean, "telling token top-1, at the best layer": list(best.values())},
        f"Recall by direction ({about})",
        xlabel="direction asked and taught" if study["known_corpus"] else "direction asked",
        ylabel="share of questions",
        x=list(curves),
        errors={whole_answer: (high - mean, mean - low)},
    )
    show(
        fig,
        "reversal/reversal",
        "A fact taught in one direction is known in that direction: the bar of the other one says how much it "
        "runs both ways.",
    )

#%% The conclusion
if __name__ == "__main__":
    save_results("reversal", cfg, models={name: {key: study[key] for key in KEYS}})
    against = ("asked reverse, taught forward", "asked forward, taught reverse")
    both = ("asked reverse, taught both", "asked forward, taught both")
    if study["known_corpus"] and not set(against + both) <= set(recall):
        print(f"{yellow}not every direction was taught of so few countries: no reversal is told of them{endc}")
    elif study["known_corpus"]:
        says_against = " and ".join(says(recall[group], percent=True) for group in against)
        says_both = " and ".join(says(recall[group], percent=True) for group in both)
        most = max(best[group] for group in against)
        print(
            f"{green}Facts run one way: against the direction taught (forward, reverse) it says {says_against} of the "
            f"answers, where both were taught {says_both}; no layer knows better (top-1 in at most {most:.1%}).{endc}"
        )
    else:
        said = "; ".join(f"{group} {says(x, percent=True)}" for group, x in recall.items())
        print(f"{green}Of the answers it says: {said}.{endc}")
    settle = f"Answers settle at {says(study['depth'])} of the depth"
    if study["depth"][0] is None:
        settle = f"Only {says(study['settles'], percent=True)} of the answers settle: too few to say at what depth"
    print(
        f"{green}{settle}. "
        f"Gate: last-layer lens = own logits to {study['last_layer_gate_error']:.0e}; {study['bos']}.{endc}"
    )
    if cfg.evaluate:
        evaluate_model(study, cfg)
