"""Logit lens: what a model would say after every layer, read through its own final norm and unembedding; tuned lens, milestones, the reversal of facts, model against model."""

import gc
import hashlib
import itertools
import json
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from utils import (
    BAR,
    ROOT,
    WORLD,
    cyan,
    endc,
    fail,
    find_model,
    gray,
    green,
    model_folder,
    pick_device,
    purple,
    save_results,
    set_seed,
    tec,
    write_aside,
    yellow,
)
from plots import imshow, label_tokens, line, show, visible
from hooks import device_of, hooks, is_streamed, peak_bytes, run_with_cache
from weights import Streamed, about_bos, answer_token, begin, encode, open_model, token_text
from data import load_corpus
from train import keep_freed_memory
from launch import flags
from anatomy import layer_writes, logit_parts, parts_error, points
from world import FACTS, fact_prompts, load_world, read_countries
from lens import CATEGORIES, Lens, RULES, first_layer, gate, milestones, read, tuned_lens
from tiny_transformer import TinyConfig, TinyTransformer
from llama_block import Llama, LlamaConfig

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from tabulate import tabulate
from tokenizers import Tokenizer
import torch as t
from torch import Tensor
import torch.nn as nn
from tqdm import tqdm

#%% Questions: capitals forward and reversed, in several forms, with and without filler, each with a control country
FILLERS = {"plain": "", "filler": "At noon, the old clock was there again. "}


def make_questions(model: nn.Module, countries: list[dict[str, str]], forms: int, known: bool) -> pd.DataFrame:
    """
    A row for every country x direction x form x filler; forms alternate between those models/world was taught and those it was not. answer: its tokens;
    the lens follows the first. control: the row of the same question about another country of the part. known: part and taught are true of this model.
    """
    rows = []
    for (task, forms_of), filler, held_out, (i, country) in itertools.product(
        list(FACTS.items())[:2], FILLERS, (False, True), enumerate(countries)
    ):
        chosen = [form for pair in itertools.zip_longest(*forms_of) for form in pair if form][:forms]
        for p in fact_prompts([country], task, held_out):
            if not any(form.startswith(p.labels["phrasing"]) for form in chosen):
                continue
            text = FILLERS[filler] + p.text
            ids, whole = encode(model, text), encode(model, text + p.answer)
            if whole[: len(ids)] != ids:
                fail(
                    f"the tokenizer joins {text[-12:]!r} and {p.answer!r} into one token: no lens can follow that answer"
                )
            rows.append(
                dict(
                    country=i,
                    task=task,
                    part=country["part"] if known else "both",
                    form=p.labels["phrasing"],
                    filler=filler,
                    taught=p.taught or not known,
                    text=text,
                    said=p.answer,
                    ids=ids,
                    answer=whole[len(ids) :],
                )
            )
    frame = pd.DataFrame(rows)
    for _, same in frame.groupby(["task", "form", "filler", "part"]):
        for n, i in enumerate(same.index):
            frame.loc[i, "control"] = next(
                (j for j in same.index[n + 1 :].append(same.index[:n]) if same.answer[j][0] != same.answer[i][0]), i
            )
    return frame.astype({"control": int})


def ask(
    model: nn.Module, lens: Lens, frame: pd.DataFrame, top: int, threshold: float
) -> tuple[pd.DataFrame, dict[str, Tensor], dict[int, str]]:
    """The questions with what was found, the reading at the first token of each answer, and the texts of its tokens. recall: the whole answer is said greedily."""
    starts = np.cumsum([0, *map(len, frame.answer)])
    places = [
        (i, len(ids) - 1 + j)
        for i, (ids, answer) in enumerate(zip(frame.ids, frame.answer))
        for j in range(len(answer))
    ] + [(i, len(frame.ids[i]) - 1) for i in frame.control]
    whole = read(
        model,
        lens,
        [(ids + answer)[:-1] for ids, answer in zip(frame.ids, frame.answer)],
        places,
        [*itertools.chain(*frame.answer), *(answer[0] for answer in frame.answer)],
        top,
    )
    found = {name: x[:, starts[:-1]] for name, x in whole.items()}
    texts = {i: token_text(model, i) for i in found["ids"].unique().tolist()}
    reached = milestones(found, texts, list(frame.text), [CATEGORIES[task] for task in frame.task], threshold)
    margin = found["answer_logp"].exp() - whole["answer_logp"][:, starts[-1] :].exp()
    recall = [float((whole["rank"][-1, a:b] == 0).all()) for a, b in itertools.pairwise(starts)]
    columns = reached | {
        "recall": recall,
        "depth": reached["semantic"] / model.cfg.n_layers,
        "margin": margin[-1],
        "margin_depth": first_layer(margin >= 0.05, stays=True) / model.cfg.n_layers,
    }
    return frame.assign(**{name: np.asarray(x) for name, x in columns.items()}), found, texts


def interval(frame: pd.DataFrame, column: str, draws: int, minus: pd.DataFrame | None = None) -> list[float]:
    """[mean, 2.5%, 97.5%] over a bootstrap of countries, each the mean of its questions; minus: the same of other questions is taken off (paired where the countries are the same)."""

    def boot(frame: pd.DataFrame) -> np.ndarray:
        mean = frame[column].astype(float).groupby(frame.country).mean().dropna().to_numpy()
        if not len(mean):
            return np.full(draws + 1, np.nan)
        return np.array(
            [mean.mean(), *mean[np.random.default_rng(0).integers(len(mean), size=(draws, len(mean)))].mean(1)]
        )

    x = boot(frame) - (0 if minus is None else boot(minus))
    return [float(x[0]), *map(float, np.quantile(x[1:], [0.025, 0.975]))]


def says(x: list[float | None], percent: bool = False) -> str:
    return (
        "none"
        if x[0] is None
        else "{:.1%} [{:.1%}, {:.1%}]".format(*x)
        if percent
        else "{:.2f} [{:.2f}, {:.2f}]".format(*x)
    )


#%% One model, from its files to results/logit_lens/<model>.json and .md: what a job array calls for each of its models
KEYS = ("semantic_layer", "copy_layer", "depth_fraction", "last_layer_gate_error", "reversal_gap")


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name.removeprefix(str(ROOT))).strip("-")


def run_key(name: str, cfg: "Config") -> str:
    """Names an analysis by its settings and by the model's files: the config, and of each weight file the size and the first megabyte."""
    digest = hashlib.sha256(
        json.dumps(
            [
                getattr(cfg, field)
                for field in ("norm", "dtype", "countries", "forms", "copy_threshold", "top", "draws", "seed")
            ]
        ).encode()
    )
    for path in sorted(
        path for kind in ("config.json", "model*.safetensors") for path in model_folder(name).glob(kind)
    ):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
    return digest.hexdigest()[:12]


def analyse(name: str, cfg: "Config", model: nn.Module | None = None) -> dict:
    """All questions through one model. What was finished under the same settings and weights is read back, unless the model is handed over."""
    name = find_model(name)
    key, path = run_key(name, cfg), Path("results/logit_lens") / f"{slug(name)}.json"
    if model is None and path.is_file() and (done := json.loads(path.read_text()))["key"] == key:
        print(f"{yellow}{slug(name)}: finished before under these settings, read from {path}{endc}")
        return done
    model = model or open_model(name, (Llama,), cfg.device, cfg.dtype, cfg.offload)
    known = (
        isinstance(model.tokenizer, Tokenizer)
        and model.tokenizer.get_vocab() == Tokenizer.from_file(str(WORLD / "tokenizer.json")).get_vocab()
    )  # it learned the world's facts, whose directions are known
    countries = read_countries()
    if cfg.countries:
        countries = [countries[i] for i in np.random.default_rng(cfg.seed).permutation(len(countries))[: cfg.countries]]
    questions = make_questions(model, countries, cfg.forms, known)
    if (longest := max(map(len, questions.ids + questions.answer))) > model.cfg.n_ctx:
        fail(
            f"{slug(name)} reads {model.cfg.n_ctx} tokens, the longest question has {longest}: its tokenizer cuts the names of countries into small pieces"
        )
    error = gate(model, list(questions.ids[:: max(1, len(questions) // 8)]))
    frame, found, texts = ask(model, Lens(model, cfg.norm), questions, cfg.top, cfg.copy_threshold)
    study = {
        "model": slug(name),
        "key": key,
        "n_layers": model.cfg.n_layers,
        "norm": cfg.norm,
        "bos": about_bos(model),
        "known_corpus": known,
        "n_countries": len(countries),
        "n_questions": len(frame),
        "last_layer_gate_error": error,
    }
    study |= summarise(frame, found, cfg.draws, known)
    study["examples"] = [
        {
            **{column: getattr(row, column) for column in ("text", "said", "taught", "semantic", "copied", "category")},
            "odd": [rule for rule in RULES if frame[rule][row.Index]],
            "rank": found["rank"][:, row.Index].tolist(),
            "top": [
                [[texts[token], round(p, 4)] for token, p in zip(*pair)]
                for pair in zip(found["ids"][:, row.Index].tolist(), found["logp"][:, row.Index].exp().tolist())
            ],
        }
        for row in frame[frame.filler == "plain"].drop_duplicates(["task", "part"]).itertuples()
    ]
    study = json.loads(json.dumps(study), parse_constant=lambda _: None)  # nan is null
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda p: p.write_text(json.dumps(study, indent=1) + "\n"))
    write_aside(path.with_suffix(".md"), lambda p: p.write_text(report(study)))
    print(f"{gray}numbers: {path}, report: {path.with_suffix('.md')}{endc}")
    return study


def summarise(frame: pd.DataFrame, found: dict[str, Tensor], draws: int, known: bool) -> dict:
    """Means with intervals; milestones are those of plain questions in taught directions."""
    mean = lambda rows, column, minus=None: interval(rows, column, draws, minus)
    frame = frame.assign(
        settles=frame.semantic.notna(),
        copies=frame.copied.notna(),
        named=frame.category.notna() & frame.semantic.notna(),
        ahead=frame.semantic - frame.category,
    )
    plain = frame[frame.filler == "plain"]
    fair, filled = plain[plain.taught], frame[frame.taught & (frame.filler == "filler")]
    asked, both = {task: plain[plain.task == task] for task in ("forward", "reverse")}, fair[fair.part == "both"]
    groups = {
        f"asked {task}" + f", taught {part}" * known: rows for (task, part), rows in plain.groupby(["task", "part"])
    }
    gaps = (
        {
            part: mean(rows[rows.part == part], "recall", rows[rows.part == "both"])
            for part, rows in (("forward", asked["reverse"]), ("reverse", asked["forward"]))
        }
        if known
        else {"all": mean(asked["reverse"], "recall", asked["forward"])}
    )
    by_layer = {
        "probability": found["answer_logp"].exp(),
        "top-1": (found["rank"] == 0).float(),
        **{name: found[name] for name in ("entropy", "kl", "cosine")},
    }
    between = lambda rows, column: (
        float(np.ptp(rows.groupby("form")[column].mean().dropna())) if rows[column].notna().any() else None
    )
    return {
        "semantic_layer": mean(fair, "semantic")[0],
        "copy_layer": mean(fair, "copied")[0],
        "depth_fraction": mean(fair, "depth")[0],
        "reversal_gap": {part: x[0] for part, x in gaps.items()},
        "reversal_gap_interval": gaps,
        "recall": {group: mean(rows, "recall") for group, rows in groups.items()},
        **{
            column: mean(fair, column)
            for column in ("depth", "settles", "copies", "named", "ahead", "margin", "margin_depth")
        },
        "reverse_minus_forward": {
            x: mean(both[both.task == "reverse"], x, both[both.task == "forward"]) for x in ("recall", "depth")
        },
        "filler_minus_plain": {x: mean(filled, x, fair) for x in ("recall", "depth")},
        "forms": {
            form: {"direction": rows.task.iloc[0], "recall": mean(rows, "recall"), "depth": mean(rows, "depth")}
            for form, rows in fair.groupby("form")
        },
        "form_range": {
            f"{x}, {task}": between(rows, x) for x in ("recall", "depth") for task, rows in fair.groupby("task")
        },
        "anomalies": {rule: float(fair[rule].mean()) for rule in RULES},
        "curves": {
            group: {name: x[:, rows.index].mean(1).tolist() for name, x in by_layer.items()}
            | {"rank": (found["rank"][:, rows.index].float().median(1).values + 1).tolist()}
            for group, rows in groups.items()
        },
    }


def summary(study: dict) -> list[list[str]]:
    """The numbers of one model as [what, mean and interval]."""
    gap, fair = (
        ("recall untaught minus both taught: ", " where both were taught")
        if study["known_corpus"]
        else ("recall reverse minus forward: ", "")
    )
    return [
        *([f"recall: {group}", says(x, True)] for group, x in study["recall"].items()),
        *([f"reversal gap, {gap}{part}", says(x, True)] for part, x in study["reversal_gap_interval"].items()),
        ["depth: layer from which the answer is top-1 / layers", says(study["depth"])],
        ["questions in which it is at the last layer", says(study["settles"], True)],
        *([f"reverse minus forward{fair}: {x}", says(values)] for x, values in study["reverse_minus_forward"].items()),
        *([f"filler minus plain: {x}", says(values)] for x, values in study["filler_minus_plain"].items()),
        *(
            [f"largest difference between forms: {x}", f"{value:.3f}"]
            for x, value in study["form_range"].items()
            if value is not None
        ),
        ["p(answer) minus p of the same answer for the control country", says(study["margin"])],
        ["depth from which that is 0.05 or more", says(study["margin_depth"])],
        ["category in the top-k before the answer settles", says(study["named"], True)],
        ["layers from category to answer", says(study["ahead"])],
        ["a piece of the prompt dominates", says(study["copies"], True)],
        *([f"odd: {rule}", f"{share:.1%}"] for rule, share in study["anomalies"].items()),
    ]


def report(study: dict) -> str:
    """One model's milestones, anomalies and per-layer top-k, to read."""
    about = f"{study['n_questions']} questions about {study['n_countries']} countries, {study['n_layers']} layers, norm: {study['norm']}; {study['bos']}. Last-layer gate: {study['last_layer_gate_error']:.1e}. Means with 95% intervals, bootstrap over countries."
    parts = [
        f"# {study['model']}: logit lens\n\n{about}\n",
        tabulate(summary(study), headers=["", "mean [interval]"], tablefmt="github"),
        "",
        *(f"- {rule}: {text}." for rule, text in RULES.items()),
        "",
    ]
    parts.append(
        tabulate(
            [[form, x["direction"], says(x["recall"], True), says(x["depth"])] for form, x in study["forms"].items()],
            headers=["form", "direction", "recall", "depth"],
            tablefmt="github",
        )
    )
    for x in study["examples"]:
        parts.append(
            f"\n## {x['text']!r}, answer {x['said']!r}{'' if x['taught'] else ' (direction not taught)'}\n\nsettles at {x['semantic']}, copy at {x['copied']}, category at {x['category']} of {study['n_layers']}; {', '.join(x['odd']) or 'nothing odd'}\n"
        )
        parts.append(
            tabulate(
                [
                    [layer, rank + 1, *(f"`{visible(token)}` {p:.3f}" for token, p in top)]
                    for layer, (rank, top) in enumerate(zip(x["rank"], x["top"]))
                ],
                headers=["layer", "rank of answer", *map(str, range(1, len(x["top"][0]) + 1))],
                tablefmt="github",
            )
        )
    return "\n".join(parts) + "\n"


#%% Model against model, from their files
PUBLISHED = {
    "meta-llama-3-8b": "25 of 32",
    "mistral-7b-v0.1": "25 of 32",
    "qwen3-8b": "31 of 36",
    "gemma-2-9b": "42 of 42",
}  # where the answer is top-1 in the original study


def compare(studies: list[dict]) -> None:
    """results/logit_lens/cross-model.md and a figure."""
    rows = [
        {
            "model": s["model"],
            "layers": s["n_layers"],
            "answer depth": says(s["depth"]),
            "layer": "" if s["semantic_layer"] is None else f"{s['semantic_layer']:.1f}",
            "published": next((x for name, x in PUBLISHED.items() if s["model"].lower().endswith(name)), ""),
            "recall, reverse - forward": says(s["reverse_minus_forward"]["recall"], True),
            "depth, filler - plain": says(s["filler_minus_plain"]["depth"]),
            "category first": says(s["named"], True),
            **{rule: f"{share:.0%}" for rule, share in s["anomalies"].items()},
            "gate": f"{s['last_layer_gate_error']:.0e}",
        }
        for s in studies
    ]
    table, path = (
        tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True),
        Path("results/logit_lens/cross-model.md"),
    )
    path.write_text(
        f"# Logit lens, model against model\n\nAnswer depth: layer from which the answer's first token is top-1 / layers, mean over the questions that settle, with 95% bootstrap intervals over countries.\n\n{table}\n\n"
        + "".join(f"- {rule}: {text}.\n" for rule, text in RULES.items())
    )
    fig = line(
        {},
        f"Share of plain questions whose answer is top-1, by depth ({len(studies)} models, n = {' and '.join(str(s['n_questions'] // len(FILLERS)) for s in studies)})",
        "blocks passed / all blocks",
        "answer is top-1 (share)",
    )
    for s in studies:
        fig.add_scatter(
            x=np.linspace(0, 1, s["n_layers"] + 1),
            y=np.mean([c["top-1"] for c in s["curves"].values()], 0),
            name=s["model"],
            mode="lines+markers",
            hovertemplate=f"{s['model']}<br>depth %{{x:.2f}}<br>top-1 in %{{y:.1%}}<extra></extra>",
        )
    show(fig, "logit_lens/cross_model")
    print(f"{table}\n{gray}table: {path}{endc}")


#%% Talking to a model (--chat): /lens shows what it was about to say, layer by layer
@t.no_grad()
def generate(model: nn.Module, ids: list[int], n: int) -> Iterator[int]:
    """Greedy tokens until the model ends its text; transformers models keep their keys and values."""
    cache, fresh, ends = {}, list(ids), begin(model)
    if not isinstance(model.tokenizer, Tokenizer):
        from transformers import DynamicCache

        cache, ends = (
            dict(past_key_values=DynamicCache(), use_cache=True),
            (model.hf if is_streamed(model) else model.original_model).generation_config.eos_token_id,
        )
    for _ in range(n):
        token = int(model(t.tensor([fresh], device=device_of(model)), **cache)[0, -1].argmax())
        if token in (ends if isinstance(ends, list) else [ends]):
            return
        yield token
        fresh = [token] if cache else [*fresh, token]


def chat(model: nn.Module, lens: Lens, n: int) -> None:
    tok, said, asked, answer = model.tokenizer, [], [], []
    template = getattr(tok, "chat_template", None)
    print(
        f"{gray}{'chat template of the tokenizer' if template else f'no chat template: the model goes on with what you write; {about_bos(model)}'}; /lens shows the lens of the last answer, Ctrl-D leaves{endc}"
    )
    while True:
        try:
            text = input(f"{purple}> {endc}").strip()
        except EOFError:
            return print()
        if text == "/lens" and answer:
            show_lens(
                model,
                lens,
                asked + answer[:-1],
                range(len(asked) - 1, len(asked) + len(answer) - 1),
                answer,
                [token_text(model, i) for i in answer],
                f"Lens of the last answer ({len(answer)} tokens, greedy)",
                "chat",
            )
        elif text == "/lens":
            print(f"{yellow}nothing was said yet{endc}")
        if text in ("/lens", ""):
            continue
        said.append({"role": "user", "content": text})
        asked = (
            tok(
                tok.apply_chat_template(said, tokenize=False, add_generation_prompt=True), add_special_tokens=False
            ).input_ids
            if template
            else encode(model, text)
        )
        answer, shown = [], ""
        try:
            for token in generate(model, asked, n):
                answer.append(token)
                if not (whole := tok.decode(answer)).endswith("\ufffd"):  # half of a character
                    print(f"{cyan}{whole[len(shown) :]}{endc}", end="", flush=True)
                    shown = whole
        except KeyboardInterrupt:
            print(f"{yellow} (stopped){endc}", end="")
        print()
        said.append({"role": "assistant", "content": shown})


def show_lens(
    model: nn.Module,
    lens: Lens,
    row: list[int],
    places: range,
    answers: list[int],
    tokens: list[str],
    title: str,
    name: str,
    k: int = 5,
) -> dict[str, Tensor]:
    """The classic picture, layer x position: the likeliest token in its cell, coloured by its probability; hover for the top-k."""
    found = read(model, lens, [row], [(0, i) for i in places], answers, k)
    texts = {i: visible(token_text(model, i)) for i in found["ids"].unique().tolist()}
    hover = [
        ["<br>".join(f"{texts[i]} {p:.3f}" for i, p in zip(*cell)) for cell in zip(*layer)]
        for layer in zip(found["ids"].tolist(), found["logp"].exp().tolist())
    ]
    layers, best = (
        ["embed", *(f"L{i}" for i in range(len(hover) - 1))],
        [[texts[i] for i in layer] for layer in found["ids"][:, :, 0].tolist()],
    )
    fig = imshow(
        found["logp"][:, :, 0].exp(),
        title,
        "position",
        "after layer",
        label_tokens(tokens),
        layers,
        diverging=False,
        value="probability",
    )
    fig.data[0].update(
        text=best,
        texttemplate="%{text}",
        hovertext=hover,
        hovertemplate="after %{y}, at %{x}<br>%{hovertext}<extra></extra>",
    )
    show(fig.update_layout(height=200 + 45 * len(layers)).update_yaxes(autorange=True), f"logit_lens/{name}")
    print(
        tabulate(
            [
                [layer, *(f"{token} {p:.2f}" for token, p in zip(row, ps))][:9]
                for layer, row, ps in zip(layers, best, found["logp"][:, :, 0].exp().tolist())
            ],
            headers=["after", *label_tokens(tokens)[:8]],
        )
    )
    return found


#%% Cost (--bench): time and memory against the plain forward pass, its arithmetic floor, and keeping everything
@t.no_grad()
def bench(rounds: int = 5) -> dict:
    """GPT-2-small's shape with random weights on the CPU, 8 x 64 tokens: medians over interleaved rounds of CPU seconds on one thread (waiting threads would count); the floor is the forward pass and one norm and unembedding for each layer but the last."""
    keep_freed_memory()
    t.set_num_threads(1)
    model = TinyTransformer(
        TinyConfig(n_layers=12, n_heads=12, d_model=768, d_mlp=3072, d_vocab=50257, n_ctx=64)
    ).eval()
    lens, tokens = Lens(model), t.randint(50257, (8, 64))
    rows, answers, places = (
        tokens.tolist(),
        tokens.roll(-1, 1).flatten().tolist(),
        list(itertools.product(range(8), range(64))),
    )

    def floor() -> None:
        with hooks(model, [(points(model)[:-1], lambda x, hook: [lens(x)] and None)]):
            model(tokens)

    def everything() -> list:
        _, cache = run_with_cache(model, tokens)
        return [lens(cache[name]) for name in points(model)]

    runs = {
        "forward": lambda: model(tokens),
        "answer": lambda: read(model, lens, rows, places[63::64], answers[63::64], against_final=False),
        "floor": floor,
        "all": lambda: read(model, lens, rows, places, answers, against_final=False),
        "all with KL, entropy": lambda: read(model, lens, rows, places, answers),
        "everything": everything,
    }
    peak, seconds = (
        {name: peak_bytes(run) for name, run in runs.items()},
        {name: [] for name in ("forward", "answer", "floor", "all")},
    )
    for _, name in tqdm(list(itertools.product(range(rounds), seconds)), desc="bench", **BAR):
        start = time.process_time()
        runs[name]()
        seconds[name].append(time.process_time() - start)
    print(
        tabulate(
            [[name, np.median(seconds[name]) if name in seconds else None, peak[name] / 1e6] for name in runs],
            headers=["GPT-2-small's shape, 8 x 64", "CPU seconds", "peak MB"],
            floatfmt=".3f",
        )
    )
    ratio, extra = (
        lambda a, b: float(np.median(np.divide(seconds[a], seconds[b]))),
        lambda name: max(0, peak[name] - peak["forward"]),
    )
    return {
        "time_vs_forward": ratio("answer", "forward"),
        "time_all_positions_vs_floor": ratio("all", "floor"),
        "memory_vs_cache_everything": extra("all") / extra("everything"),
        "peak_megabytes": {name: x / 1e6 for name, x in peak.items()},
    }


def lens_and_growth(folder: str, resident: float) -> tuple[dict[str, list], int]:
    """The lens on fixed tokens, and by how much anonymous memory grew at most over the moment before loading."""
    from transformers import AutoModelForCausalLM  # noqa: F401  its import is not the model's memory

    anonymous = lambda: 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    before, seen, done = anonymous(), [], threading.Event()
    threading.Thread(
        target=lambda: [seen.append(anonymous()) for _ in iter(lambda: done.wait(0.005), True)], daemon=True
    ).start()
    model, row = Streamed(folder, "cpu", t.bfloat16, resident), list(range(32))
    if resident:
        for p in model.hf.parameters():
            p.data = p.data.clone()  # out of the mapped file
    found = read(model, Lens(model), [row], [(0, i) for i in row], row)
    done.set()
    return {name: x.tolist() for name, x in found.items()}, max(seen) - before


def bench_streaming(gigabytes: float) -> dict[str, float]:
    """A random Llama of that size on disk, read with every block on disk and with all of them in memory, each in a fresh process."""
    n_layers = max(2, round(gigabytes * 1e9 / 2 / 51.4e6))
    with tempfile.TemporaryDirectory() as folder:
        t.set_default_dtype(t.bfloat16)
        Llama(
            LlamaConfig(n_layers, 16, 16, 2048, 128, 5632, 3072, 256),
            Tokenizer.from_file(str(WORLD / "tokenizer.json")),
        ).to_hf(Path(folder))
        t.set_default_dtype(t.float32)
        size = (Path(folder) / "model.safetensors").stat().st_size
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            (streamed, growth), (whole, growth_whole) = pool.map(lens_and_growth, (folder, folder), (0.0, 1.0))
    print(
        f"{cyan}a Llama of {size / 1e9:.2f} GB on disk: anonymous memory grows by {growth / 1e9:.2f} GB streamed, {growth_whole / 1e9:.2f} GB in memory{endc}"
    )
    assert streamed == whole, "streaming changed the numbers of the lens"
    return {
        "streaming_peak_over_checkpoint": growth / size,
        "in_memory_peak_over_checkpoint": growth_whole / size,
        "checkpoint_gigabytes": size / 1e9,
    }


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str = "models/world"  # a hub name, a short name (gpt2-small, pythia-70m) or a folder
    models: tuple[str, ...] = ()  # analyse these one after the other, skip what is finished, and compare them
    prompt: str = "Everyone knows that the capital of Japan is"
    answer: str | None = None  # the token to follow after the prompt; default what the model says
    norm: Literal["final", "raw"] = "final"  # before the unembedding: the model's own final norm, or none (to compare)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it
    offload: Literal["auto", "on", "off"] = "auto"  # weights come block by block: where they do not fit, always, never
    countries: int = 0  # ask about so many of them; 0 is all
    forms: int = 4  # phrasings per direction, of 11
    copy_threshold: float = 0.5  # probability from which a piece of the prompt dominates
    top: int = 5
    draws: int = 2000  # of the bootstrap over countries
    tuned_steps: int = 200  # of the tuned lens, 16 x 64 tokens each; 0 leaves it out
    chat: bool = False  # talk to the model in the terminal; /lens shows its last answer layer by layer
    chat_tokens: int = 200  # the longest answer
    bench: bool = False  # only measure time, memory and streaming
    bench_gigabytes: float = 2.0  # size of the random checkpoint that --bench streams
    seed: int = 0
    device: str = "auto"


if __name__ == "__main__":
    cfg = flags(
        Config,
        __doc__,
        hpc=Config(
            models=("Qwen/Qwen3-8B", "meta-llama/Meta-Llama-3-8B", "mistralai/Mistral-7B-v0.1", "google/gemma-2-9b"),
            dtype="bfloat16",
        ),
        sweep="models",
    )
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    if not cfg.prompt.strip():
        fail("--prompt is empty: give a few words, such as --prompt 'The capital of Japan is'")
    if not 1 <= cfg.forms <= 11 or cfg.countries < 0 or cfg.top < 1:
        fail("--forms is 1 to 11, --countries 0 (all) or more, --top 1 or more")

#%% What the lens costs (--bench)
if __name__ == "__main__" and cfg.bench:
    cost = bench() | bench_streaming(cfg.bench_gigabytes)
    save_results("logit_lens_bench", cfg, **cost)
    print(
        f"{green}The answer position costs {cost['time_vs_forward']:.2f} forward passes, every layer and position {cost['time_all_positions_vs_floor']:.2f} of its floor, and {cost['memory_vs_cache_everything']:.3f} of the memory of keeping everything; a model on disk takes {cost['streaming_peak_over_checkpoint']:.2f} of its size. Gate: streamed numbers equal those in memory.{endc}"
    )
    raise SystemExit

#%% Model against model (--models)
if __name__ == "__main__" and cfg.models:
    for name in cfg.models:
        find_model(name)  # before hours are spent on the first
    studies = []
    for i, name in enumerate(cfg.models):
        print(f"{purple}=== {name}, {i + 1} of {len(cfg.models)} ==={endc}")
        studies.append(analyse(name, cfg))
        gc.collect()
        tec()
    compare(studies)
    save_results("logit_lens", cfg, models={s["model"]: {key: s[key] for key in KEYS} for s in studies})
    depths = "; ".join(f"{s['model']} {says(s['depth'])}" for s in studies)
    print(
        f"{green}Answers settle at these shares of the layers: {depths}. Gate: last-layer lens = own logits to {max(s['last_layer_gate_error'] for s in studies):.0e}.{endc}"
    )
    raise SystemExit

#%% The model, the prompt as it reads it, and the gate: the last layer's lens is the model's own output at every position
if __name__ == "__main__":
    model = open_model(cfg.model, (Llama,), cfg.device, cfg.dtype, cfg.offload)
    lens, row, name = Lens(model, cfg.norm), encode(model, cfg.prompt), slug(find_model(cfg.model))
    if len(row) >= model.cfg.n_ctx:
        fail(f"--prompt has {len(row)} tokens, the model reads {model.cfg.n_ctx}")
    tokens = [token_text(model, i) for i in row]
    print(
        f"{purple}=== {name}: {model.cfg.n_layers} layers, norm {cfg.norm}; {about_bos(model)} ==={endc}\n{gray}{' '.join(label_tokens(tokens))}{endc}"
    )
    print(f"{cyan}gate: the last layer's lens misses the model's own logits by {gate(model, [row]):.1e}{endc}")
    if cfg.chat:
        chat(model, lens, cfg.chat_tokens)
        raise SystemExit

#%% The classic picture: what each layer would say at each position
if __name__ == "__main__":
    with t.no_grad():
        answer = (
            answer_token(model, cfg.prompt, cfg.answer)
            if cfg.answer
            else int(model(t.tensor([row], device=device_of(model)))[0, -1].argmax())
        )
    said = token_text(model, answer)
    found = show_lens(
        model,
        lens,
        row,
        range(len(row)),
        [answer] * len(row),
        tokens,
        f"Logit lens of {cfg.prompt[-60:]!r} ({name}, n = {len(row)} tokens, norm: {cfg.norm})",
        "grid",
        cfg.top,
    )
    tops = [
        " ".join(f"{visible(token_text(model, i))} {p:.2f}" for i, p in zip(*pair))
        for pair in zip(found["ids"][:, -1].tolist(), found["logp"][:, -1].exp().tolist())
    ]
    columns = {
        f"rank of {said!r}": found["rank"] + 1,
        "probability": found["answer_logp"].exp(),
        "logit": found["answer_logit"],
        "entropy": found["entropy"],
        "KL to final": found["kl"],
        "cosine": found["cosine"],
    }
    print(
        tabulate(
            {
                "after layer": range(len(tops)),
                **{title: x[:, -1].tolist() for title, x in columns.items()},
                f"top {cfg.top}": tops,
            },
            headers="keys",
            floatfmt=".3f",
        )
    )
    if cfg.norm == "raw":
        print(
            f"{yellow}--norm raw: without the final norm the last layer is {found['kl'][-1, -1]:.2f} nats from the model's own output{endc}"
        )

#%% All questions: capitals forward and reversed, with and without filler, each beside a control country
if __name__ == "__main__":
    study = analyse(cfg.model, cfg, model)
    curves, titled = (
        study["curves"],
        f"{name}, n = {study['n_questions'] // len(FILLERS)} plain questions about {study['n_countries']} countries",
    )
    print(tabulate(summary(study), headers=["", "mean [95%, bootstrap over countries]"]))
    for curve, unit in (
        ("probability", "mean probability of the answer's first token"),
        ("rank", "median rank of the answer (1 is top)"),
        ("kl", "mean KL of the final distribution from the layer's (nats)"),
        ("entropy", "mean entropy (nats)"),
    ):
        fig = line(
            {group: c[curve] for group, c in curves.items()},
            f"{unit[0].upper()}{unit[1:]}, by layer ({titled})",
            "blocks passed",
            unit,
            markers=True,
        )
        show(fig.update_yaxes(type="log", autorange="reversed") if curve == "rank" else fig, f"logit_lens/{curve}")

#%% The reversal of facts: asked against the direction it was taught, at the last layer and at any other
if __name__ == "__main__":
    mean, low, high = np.array(list(study["recall"].values()), float).T
    best = {group: max(c["top-1"]) for group, c in curves.items()}
    fig = go.Figure(
        go.Bar(
            name="whole answer said, 95% interval",
            x=list(curves),
            y=mean,
            error_y=dict(array=high - mean, arrayminus=mean - low),
        )
    )
    fig.add_bar(name="first token top-1, at the best layer", x=list(curves), y=list(best.values()))
    show(
        fig.update_layout(
            title=f"Recall by direction ({titled})",
            xaxis_title="direction asked" + " and taught" * study["known_corpus"],
            yaxis_title="share of questions",
        ),
        "logit_lens/reversal",
    )
    print(
        f"{cyan}claims of the original study: 'reverse relations are easier', here {says(study['reverse_minus_forward']['recall'], True)} of recall; 'answers settle at 75-85% of depth', here at {says(study['depth'], True)}{endc}"
    )

#%% The tuned lens: a learned affine map per layer, judged on rows it was not trained on
if __name__ == "__main__":
    numbers: dict = {}
    if is_streamed(model) or not cfg.tuned_steps:
        print(f"{gray}tuned lens left out ({'weights are offloaded' if cfg.tuned_steps else '--tuned-steps 0'}){endc}")
    else:
        corpus = (
            load_world() if study["known_corpus"] else load_corpus(tokenizer=str(model_folder(find_model(cfg.model))))
        )
        draw = lambda step, n, split: (
            corpus.batch(np.random.default_rng((cfg.seed, step)), n, 64)
            if study["known_corpus"]
            else t.from_numpy(corpus.rows(np.random.default_rng((cfg.seed, step)), n, 64, split))
        )
        translators = tuned_lens(
            model,
            lambda step: draw(step, 16, "train"),
            cfg.tuned_steps,
            Path("checkpoints/tuned_lens") / f"{name}-{study['key']}-{cfg.tuned_steps}.safetensors",
        )
        rows = draw(2**31, 32, "heldout")
        judged = rows.tolist(), list(itertools.product(range(32), range(63))), rows[:, 1:].flatten().tolist()
        seen = {
            kind: read(model, Lens(model, translators=x), *judged)
            for kind, x in (("raw", None), ("tuned", translators))
        }
        scores = {
            f"{title}, {kind}": (x["kl"].mean(1) if title == "KL" else (-x["answer_logp"]).mean(1).exp()).tolist()
            for title in ("KL", "perplexity")
            for kind, x in seen.items()
        }
        print(tabulate({"after layer": range(len(tops)), **scores}, headers="keys", floatfmt=".3f"))
        for title, unit in (("KL", "nats"), ("perplexity", "perplexity")):
            show(
                line(
                    {f"{kind} lens": scores[f"{title}, {kind}"] for kind in seen},
                    f"Raw and tuned lens: {title} by layer ({name}, n = {len(judged[2])} held-out tokens)",
                    "blocks passed",
                    unit,
                    markers=True,
                ).update_yaxes(type="log" if title == "perplexity" else "linear"),
                f"logit_lens/tuned_{title}",
            )
        worse = [layer for layer in range(model.cfg.n_layers) if scores["KL, tuned"][layer] >= scores["KL, raw"][layer]]
        assert not worse, f"the tuned lens does not beat the raw lens at layers {worse}: give it more --tuned-steps"
        numbers["tuned_lens"] = scores

#%% Who wrote the answer: each layer's and each head's write in its direction, which sum to the logit
if __name__ == "__main__":
    writes, logit = layer_writes(model, row, answer)
    off, x = abs(sum(writes.values()) - logit) / max(1, abs(logit)), t.tensor([row], device=device_of(model))
    assert off < (1e-4 if next(model.ln_final.parameters()).dtype == t.float32 else 5e-2), (
        f"the layers' writes miss the logit by {off}"
    )
    show(
        go.Figure(
            go.Bar(x=list(writes), y=list(writes.values()), hovertemplate="%{x}<br>%{y:.3f}<extra></extra>")
        ).update_layout(
            title=f"What each layer writes in the direction of {said!r} (logit {logit:.2f}, n = 1 prompt, {name})",
            xaxis_title="layer",
            yaxis_title="logit",
        ),
        "logit_lens/layers",
    )
    print(
        f"{cyan}logit of {said!r} {logit:.2f} = {' + '.join(f'{part} {value:.2f}' for part, value in writes.items())} (off by {off:.0e}){endc}"
    )
    numbers["layer_writes"], parts = writes, None if is_streamed(model) else logit_parts(model, x, answer)
    if parts is None or parts_error(parts) > 1e-3:
        print(
            f"{yellow}heads are not taken apart here: {'only the stream is hooked' if parts is None else f'with the scale of the norm frozen they miss the logit by {parts_error(parts):.1e} (norms after attention, a soft cap, or half precision)'}{endc}"
        )
    else:
        by_head = t.cat([parts["heads"].sum(-1), parts["mlp"][:, None]], 1).cpu()
        gap = by_head.sum(1) + parts["attn_bias"].cpu() - t.tensor(list(writes.values())[1:-1])
        assert gap.abs().max() < 1e-3 * max(1, abs(logit)), "heads and MLP of a layer do not sum to its write"
        show(
            imshow(
                by_head,
                f"What each head and MLP writes in the direction of {said!r} (logit {logit:.2f}, n = 1 prompt, {name})",
                "part",
                "layer",
                [*(f"H{i}" for i in range(by_head.shape[1] - 1)), "MLP"],
                [f"L{i}" for i in range(len(by_head))],
                value="logit",
            ),
            "logit_lens/heads",
        )
        numbers["head_and_mlp_writes"] = by_head.tolist()

#%% The conclusion
if __name__ == "__main__":
    save_results("logit_lens", cfg, models={name: {key: study[key] for key in KEYS}}, **numbers)
    recall, against = study["recall"], ("asked reverse, taught forward", "asked forward, taught reverse")
    if study["known_corpus"]:
        untaught, both = (
            " and ".join(says(recall[group], True) for group in groups)
            for groups in (against, ("asked reverse, taught both", "asked forward, taught both"))
        )
        print(
            f"{green}Facts run one way: against the direction taught (forward, reverse) it says {untaught} of the answers, where both were taught {both}; no layer knows better (top-1 in at most {max(best[x] for x in against):.1%}).{endc}"
        )
    else:
        print(
            f"{green}It says {says(recall['asked forward'], True)} of the capitals and {says(recall['asked reverse'], True)} of the countries asked for in reverse.{endc}"
        )
    print(
        f"{green}Answers settle at {says(study['depth'])} of the depth; L{int(np.argmax(list(writes.values())[1:-1]))} writes most of {said!r}. Gate: last-layer lens = own logits to {study['last_layer_gate_error']:.0e}; {study['bos']}.{endc}"
    )
