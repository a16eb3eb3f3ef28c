"""
A study of many questions, on disk and in words: tables of all that the lens read, the patterns that a model shows or
does not, an evaluation of one model and of many, and the prompts by which a language model writes one.
"""

import itertools
import json
import string
import urllib.error
import urllib.request
from pathlib import Path

from utils import (  # first: sets OpenMP's variables before torch is loaded
    ROOT,
    fail,
    secret,
    write_aside,
)
from plots import visible
from lens import CATEGORIES, RULES, is_punctuation, names_category

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from tabulate import tabulate
from torch import Tensor


# What the functions here are given is what reversal.py's make_questions and ask return.
# frame has a row for each question, numbered from 0:
#     country (its number), task (asked forward or reverse), part (taught forward, reverse or both), taught (asked in a
#     direction that was taught), form (the phrasing), filler ('plain', or a sentence stands in front), text, said (the
#     answer), control (the row of the same question about another country);
#     recall (1: the whole answer is said), margin, depth and margin_depth (layer / layers), and lens.milestones: the
#     layer at which the answer settles (semantic), at which a word for its category is named (category), at which a
#     piece of the prompt dominates (copied), nan where none does; and RULES, each true or false.
# found has the lens's reading after every block: ids and logp (layer, question, k), the k likeliest tokens; rank,
#     (0 is top), answer_logp, entropy, kl and cosine (layer, question). texts: {token: its text}.


#%% Means with intervals: countries are what is drawn again, not questions
def mean_by_country(frame: pd.DataFrame, column: str) -> pd.Series:
    return frame[column].astype(float).groupby(frame.country).mean().dropna()


def means_of_draws(by_country: np.ndarray, draws: int) -> np.ndarray:
    """
    by_country (country, column), nan where a country has no value -> (1 + draws, column): the means over countries,
    first as they are, then of countries drawn again with replacement, the same for all columns.
    """
    n = len(by_country)
    if not n:
        return np.full((1 + draws, by_country.shape[1]), np.nan)
    drawn = np.random.default_rng(0).integers(n, size=(draws, n))
    chosen = by_country[np.concatenate([np.arange(n)[None], drawn])]  # (draw, country, column)
    totals = np.nansum(chosen, 1)
    counts = (~np.isnan(chosen)).sum(1)
    return np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)


def interval(frame: pd.DataFrame, column: str, draws: int, minus: pd.DataFrame | None = None) -> list[float]:
    """
    [mean, 2.5%, 97.5%] over a bootstrap of countries, each the mean of its questions. minus: the same of other
    questions is taken off; the countries of both are drawn together, so those in both are paired.
    """
    columns = {"of": mean_by_country(frame, column)}
    if minus is not None:
        columns["minus"] = mean_by_country(minus, column)
    means = means_of_draws(pd.DataFrame(columns).to_numpy(), draws)
    x = means[:, 0] - means[:, 1] if minus is not None else means[:, 0]
    if np.isnan(x[0]):
        return [np.nan] * 3
    low, high = np.nanquantile(x[1:], [0.025, 0.975])
    return [float(x[0]), float(low), float(high)]


def says(x: list[float | None], percent: bool = False) -> str:
    """mean [low, high]"""
    if x[0] is None:
        return "none"
    if percent:
        return "{:.1%} [{:.1%}, {:.1%}]".format(*x)
    return "{:.2f} [{:.2f}, {:.2f}]".format(*x)


#%% The tables: every question, and what was read of it after every block
def question_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per question: its text and answer, their tokens, its labels, its control, its milestones and anomalies."""
    return frame.rename_axis("question").reset_index()


def layer_table(found: dict[str, Tensor], texts: dict[int, str]) -> pd.DataFrame:
    """
    A row per question and layer (blocks passed): rank of the token that tells the answer from its control's (1 is top),
    probability of the whole answer, entropy, KL of the final distribution (nats), cosine with the last stream, and the
    k likeliest tokens at that token's place with their probabilities. Tokens as JSON writes them (a line break is
    \\n), so that a row is a line; read with keep_default_na=False, for a token may be 'null'.
    """
    written = {i: json.dumps(text, ensure_ascii=False)[1:-1] for i, text in texts.items()}
    n_points, n_questions, k = found["ids"].shape
    columns = {
        "question": np.repeat(np.arange(n_questions), n_points),
        "layer": np.tile(np.arange(n_points), n_questions),
        "rank": found["rank"].T.flatten().numpy() + 1,
        "probability": found["answer_logp"].T.flatten().exp().numpy(),
    }
    for name in ("entropy", "kl", "cosine"):
        columns[name] = found[name].T.flatten().numpy()
    for place in range(k):
        columns[f"token_{place + 1}"] = [written[i] for i in found["ids"][:, :, place].T.flatten().tolist()]
        columns[f"p_{place + 1}"] = found["logp"][:, :, place].T.flatten().exp().numpy()
    return pd.DataFrame(columns)


def table_paths(path: Path) -> dict[str, Path]:
    """Where the tables of results/reversal/<model>.json stand."""
    return {name: path.with_name(f"{path.stem}.{name}.csv") for name in ("questions", "layers")}


def write_tables(path: Path, frame: pd.DataFrame, found: dict[str, Tensor], texts: dict[int, str]) -> None:
    tables = {"questions": question_table(frame), "layers": layer_table(found, texts)}
    for name, place in table_paths(path).items():
        write_aside(place, lambda aside: tables[name].to_csv(aside, index=False, float_format="%.5g"))


#%% Patterns: what the original study said of 7-9B models, each as a statistic with an interval and a verdict
HOLDS, FAILS, UNTOLD = "holds", "does not hold", "cannot be told"
BAND = (0.75, 0.85)  # of the depth
MARGIN = 0.05  # a smaller difference of shares is none
FORM_MARGIN = 0.1  # the same between the best and the worst of several phrasings
ENOUGH = 0.1  # share of answers that must settle, or be said, before more is said of them
ENOUGH_COUNTRIES = 10  # for a bootstrap over them
PATTERNS = {
    "late settling": (
        "the depth (layer / layers) from which the answer stays top-1, mean over the questions in which it does, lies "
        f"between {BAND[0]:.0%} and {BAND[1]:.0%}"
    ),
    "category first": (
        "of the questions that settle, in more than half a word for the answer's category (capital, city; country, "
        "nation) is in the top-k at a layer before, and in more than name the other direction's category (the "
        "embedding, which has read no more than the last token, does not count)"
    ),
    "early punctuation": (
        "the share of layers at which the top-1 is punctuation is larger in the first half (the embedding and the middle "
        f"layer included) than in the second, by more than {MARGIN:.0%}"
    ),
    "reversal asymmetry": (
        f"recall differs by direction by more than {MARGIN:.0%}: of facts asked against the one direction they were "
        "taught in minus facts taught in both; where it is not known what was taught, reverse minus forward"
    ),
    "sensitivity to form": (
        "recall in the phrasing that is best minus recall in the one that is worst is more than "
        f"{FORM_MARGIN:.0%}; which they are is chosen on one half of the countries and measured on the other"
    ),
}


def finding(statistic: list[float], rows: pd.DataFrame, verdict: str, why: str, percent: bool = True) -> dict:
    """One pattern in one model. n: questions and countries behind the statistic."""
    n_countries = rows.country.nunique()
    if n_countries < ENOUGH_COUNTRIES:
        verdict = UNTOLD
        why = f"{n_countries} countries are too few"
    n = [len(rows), n_countries]
    return {"statistic": statistic, "n": n, "verdict": verdict, "why": why, "percent": percent}


def above(statistic: list[float], threshold: float) -> str:
    """Whether the interval lies above a threshold, below it, or on both sides."""
    _, low, high = statistic
    if low > threshold:
        return HOLDS
    return FAILS if high < threshold else UNTOLD


def apart(statistic: list[float], margin: float) -> str:
    """Whether the interval lies outside -margin .. margin, inside, or on an edge."""
    _, low, high = statistic
    if low > margin or high < -margin:
        return HOLDS
    return FAILS if -margin <= low and high <= margin else UNTOLD


def late_settling(fair: pd.DataFrame, n_layers: int, draws: int) -> dict:
    """
    A step of one layer that is wider than the band hides where in it the answer settled: then only a depth counts as
    outside the band that is outside it with a layer less, too.
    """
    settled = fair[fair.semantic.notna()]
    depth = interval(fair, "depth", draws)
    share = fair.semantic.notna().mean()
    if share < ENOUGH:
        return finding([np.nan] * 3, settled, UNTOLD, f"{share:.1%} of the answers settle", percent=False)
    _, low, high = depth
    step = 1 / n_layers
    coarse = step > BAND[1] - BAND[0]
    hidden = step if coarse else 0.0
    if high < BAND[0] or low - hidden > BAND[1]:
        return finding(depth, settled, FAILS, f"{share:.1%} of the answers settle", percent=False)
    if coarse:
        why = f"one of {n_layers} layers is {step:.0%} of the depth, more than the band"
        return finding(depth, settled, UNTOLD, why, percent=False)
    inside = BAND[0] <= low and high <= BAND[1]
    return finding(depth, settled, HOLDS if inside else UNTOLD, f"{share:.1%} of the answers settle", percent=False)


def category_first(fair: pd.DataFrame, found: dict[str, Tensor], texts: dict[int, str], draws: int) -> dict:
    """Own category's words against those of the other direction, which say how often such words come anyway."""
    settled = fair[fair.semantic.notna()]
    if len(settled) < ENOUGH * len(fair) or settled.empty:
        share = len(settled) / max(1, len(fair))
        return finding([np.nan] * 3, settled, UNTOLD, f"{share:.1%} of the answers settle")
    other = {"forward": CATEGORIES["reverse"], "reverse": CATEGORIES["forward"]}
    named_own = []
    named_other = []
    for row in settled.itertuples():
        before = [[texts[i] for i in top] for top in found["ids"][1 : int(row.semantic), row.Index].tolist()]
        named_own.append(any(names_category(top, CATEGORIES[row.task]) for top in before))
        named_other.append(any(names_category(top, other[row.task]) for top in before))
    settled = settled.assign(own=named_own, other=named_other)
    own = interval(settled, "own", draws)
    settled["more"] = settled.own.astype(float) - settled.other.astype(float)
    more = interval(settled, "more", draws)
    verdicts = {above(own, 0.5), above(more, 0)}
    verdict = HOLDS if verdicts == {HOLDS} else UNTOLD
    if FAILS in verdicts:
        verdict = FAILS
    settled["anywhere"] = settled.category.notna()
    control = interval(settled, "other", draws)
    anywhere = interval(settled, "anywhere", draws)
    why = (
        f"the other direction's words {says(control, percent=True)}; with the embedding {says(anywhere, percent=True)}"
    )
    return finding(own, settled, verdict, why) | {"with_embedding": anywhere}


def early_punctuation(fair: pd.DataFrame, found: dict[str, Tensor], texts: dict[int, str], draws: int) -> dict:
    top = found["ids"][:, fair.index, 0].tolist()
    punctuation = np.array([[is_punctuation(texts[i]) for i in layer] for layer in top], float)
    n_points = len(punctuation)
    early = np.arange(n_points) <= (n_points - 1) / 2
    shares = fair.assign(early=punctuation[early].mean(0), late=punctuation[~early].mean(0))
    shares["more"] = shares.early - shares.late
    difference = interval(shares, "more", draws)
    why = f"first half {shares.early.mean():.1%}, second half {shares.late.mean():.1%} of the layers"
    return finding(difference, fair, above(difference, MARGIN), why)


def reversal_asymmetry(plain: pd.DataFrame, known: bool, draws: int) -> dict:
    if known:
        asked = plain[~plain.taught]
        base = plain[plain.part == "both"]
        words = ("against the direction taught", "taught in both")
    else:
        asked = plain[plain.task == "reverse"]
        base = plain[plain.task == "forward"]
        words = ("in reverse", "forward")
    gap = interval(asked, "recall", draws, minus=base)
    verdict = apart(gap, MARGIN)
    why = f"recall {asked.recall.mean():.1%} {words[0]}, {base.recall.mean():.1%} {words[1]}"
    if max(asked.recall.mean(), base.recall.mean()) < ENOUGH:
        verdict = UNTOLD
        why += ": it knows too few"
    return finding(gap, asked, verdict, why)


def sensitivity_to_form(fair: pd.DataFrame, draws: int) -> dict:
    """
    Chosen on every second country, measured on the others: what was chosen as best looks better than it is. (Taking
    turns would use all countries twice, and its interval would be too narrow.)
    """
    differences = []
    chosen = []
    asked = []
    for _, rows in fair.groupby("task"):
        by_form = rows.pivot_table(index="country", columns="form", values="recall")  # (country, form)
        choosing = by_form.iloc[::2].mean()
        best, worst = choosing.idxmax(), choosing.idxmin()
        measured = by_form.iloc[1::2]
        differences.append((measured[best] - measured[worst]).rename("difference").reset_index())
        asked.append(rows[rows.country.isin(measured.index)])
        chosen.append("all alike" if best == worst else f"best {best!r}, worst {worst!r}")
    difference = interval(pd.concat(differences), "difference", draws)
    verdict = above(difference, FORM_MARGIN)
    why = "; ".join(dict.fromkeys(chosen))
    best_recall = fair.groupby("form").recall.mean().max()
    if fair.form.nunique() <= fair.task.nunique():
        verdict, why = UNTOLD, "one phrasing per direction"
    elif best_recall < ENOUGH:
        verdict, why = UNTOLD, f"recall is {best_recall:.1%} in the best phrasing"
    return finding(difference, pd.concat(asked), verdict, why)


def patterns(
    frame: pd.DataFrame, found: dict[str, Tensor], texts: dict[int, str], n_layers: int, draws: int, known: bool
) -> dict[str, dict]:
    """Every one of PATTERNS in one model, of plain questions, in taught directions but for the reversal."""
    plain = frame[frame.filler == "plain"]
    fair = plain[plain.taught]
    out = {
        "late settling": late_settling(fair, n_layers, draws),
        "category first": category_first(fair, found, texts, draws),
        "early punctuation": early_punctuation(fair, found, texts, draws),
        "reversal asymmetry": reversal_asymmetry(plain, known, draws),
        "sensitivity to form": sensitivity_to_form(fair, draws),
    }
    filled = frame[(frame.filler != "plain") & frame.taught]
    if not filled.empty:
        moved = says(interval(filled, "recall", draws, minus=fair), percent=True)
        out["sensitivity to form"]["why"] += f"; a sentence in front moves recall by {moved}"
    return out


#%% Anomalies: how many, in which phrasing most, and the first of them, layer by layer
LOST = "known and lost"
ODD = RULES | {LOST: "the answer's token is top-1 at some layer and not at the last"}
SHOWN = 3


def top_by_layer(found: dict[str, Tensor], texts: dict[int, str], question: int) -> str:
    """The top-1 of every layer, with its largest probability where it stays: ' city' 0.31 (0-2), ..."""
    ids = found["ids"][:, question, 0].tolist()
    ps = found["logp"][:, question, 0].exp().tolist()
    said = []
    for token, run in itertools.groupby(range(len(ids)), key=ids.__getitem__):
        layers = list(run)
        p = max(ps[layer] for layer in layers)
        where = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        said.append(f"`{visible(texts[token])}` {p:.2f} ({where})")
    return ", ".join(said)


def anomalies(frame: pd.DataFrame, found: dict[str, Tensor], texts: dict[int, str], draws: int) -> dict[str, dict]:
    """Every one of ODD in the plain questions in taught directions."""
    top = (found["rank"] == 0).numpy()
    frame = frame.assign(**{LOST: top[:-1].any(0) & ~top[-1]})
    fair = frame[(frame.filler == "plain") & frame.taught]
    out = {}
    for rule in ODD:
        odd = fair[fair[rule].astype(bool)]
        by_form = fair.groupby("form")[rule].mean().sort_values(ascending=False)
        examples = []
        for row in odd.drop_duplicates("country").head(SHOWN).itertuples():
            example = {"question": row.Index, "text": row.text, "said": row.said}
            examples.append(example | {"top": top_by_layer(found, texts, row.Index)})
        out[rule] = {
            "n": [len(odd), len(fair)],
            "share": interval(fair, rule, draws),
            "most": [by_form.index[0], float(by_form.iloc[0])],
            "examples": examples,
        }
    return out


#%% In words: one model
def says_finding(x: dict) -> str:
    return says(x["statistic"], percent=x["percent"])


def pattern_rows(study: dict) -> list[list[str]]:
    rows = []
    for pattern, x in study["patterns"].items():
        n_questions, n_countries = x["n"]
        rows.append([pattern, says_finding(x), x["verdict"], x["why"], f"{n_questions} about {n_countries} countries"])
    return rows


PATTERN_HEADERS = ["pattern", "statistic [95%]", "verdict", "beside it", "questions"]


def pattern_section(study: dict) -> str:
    """The patterns of one model as Markdown."""
    table = tabulate(pattern_rows(study), headers=PATTERN_HEADERS, tablefmt="github", disable_numparse=True)
    definitions = "\n".join(f"- {pattern}: {text}." for pattern, text in PATTERNS.items())
    return f"## Patterns\n\n{table}\n\n{definitions}\n"


def anomaly_section(study: dict) -> str:
    """The anomalies of one model as Markdown, each with its first questions and the top-1 of their layers."""
    lines = ["## Anomalies\n"]
    for rule, x in study["odd"].items():
        n_odd, n = x["n"]
        share = says(x["share"], percent=True)
        lines.append(f"- **{rule}** ({ODD[rule]}): {n_odd} of {n} questions, over countries {share}.")
        if n_odd:
            form, of_form = x["most"]
            lines[-1] += f" Most often in {form!r} ({of_form:.1%})."
        for example in x["examples"]:
            question = f"question {example['question']}, {example['text']!r}, answer {example['said']!r}"
            lines.append(f"  - {question}: {example['top']}")
    return "\n".join(lines) + "\n"


#%% In words: many models
def over_models(studies: list[dict]) -> dict[str, dict]:
    """
    By pattern, the models in which it holds, does not, cannot be told, and of those that can be told the share in which
    it holds with Wilson's 95% interval over models.
    """
    out = {}
    for pattern in PATTERNS:
        models = {verdict: [] for verdict in (HOLDS, FAILS, UNTOLD)}
        for study in studies:
            models[study["patterns"][pattern]["verdict"]].append(study["model"])
        n_holds = len(models[HOLDS])
        n_told = n_holds + len(models[FAILS])
        share = [None] * 3
        if n_told:
            low_high = binomtest(n_holds, n_told).proportion_ci(0.95, "wilson")
            share = [n_holds / n_told, float(low_high.low), float(low_high.high)]
        out[pattern] = {"models": models, "n_told": n_told, "share": share}
    return out


def models_section(studies: list[dict]) -> str:
    """For each pattern in how many models it holds, with its interval, and where not, as Markdown."""
    by_model = {study["model"]: study["patterns"] for study in studies}
    rows = []
    for model, found in by_model.items():
        rows.append([model, *(f"{found[pattern]['verdict']}: {says_finding(found[pattern])}" for pattern in PATTERNS)])
    table = tabulate(rows, headers=["model", *PATTERNS], tablefmt="github", disable_numparse=True)
    lines = ["## Patterns over models\n", table, ""]
    for pattern, x in over_models(studies).items():
        models = x["models"]
        said = f"- **{pattern}** holds in {len(models[HOLDS])} of {x['n_told']} models that can tell"
        if x["n_told"]:
            said += f" ({says(x['share'], percent=True)})"
        lines.append(f"{said}: {PATTERNS[pattern]}.")
        for verdict in (FAILS, UNTOLD):
            for model in models[verdict]:
                of_model = by_model[model][pattern]
                lines.append(f"  - {verdict} in {model}: {says_finding(of_model)}; {of_model['why']}")
    lines.append("\nShares with Wilson's 95% interval over models; a model's own intervals are over countries.")
    return "\n".join(lines) + "\n"


#%% A language model's evaluation: the prompt is written; with an endpoint and a key it is sent
PROMPTS = ROOT / "prompts"
KEY = "EVALUATOR_API_KEY"
EXCERPT = 12  # questions whose layers stand in a prompt


def excerpt(path: Path) -> dict[str, str]:
    """Of the tables of results/reversal/<model>.json, some questions drawn from all, as they stand there."""
    tables = {}
    for name, place in table_paths(path).items():
        tables[name] = pd.read_csv(place, dtype=str, keep_default_na=False)
    n = len(tables["questions"])
    drawn = np.sort(np.random.default_rng(0).permutation(n)[:EXCERPT]).astype(str)
    shown = {name: table[table.question.isin(drawn)] for name, table in tables.items()}
    shown["questions"] = shown["questions"].drop(columns=["ids", "answer", "country"])
    return {name: table.to_csv(index=False) for name, table in shown.items()}


def filled_prompt(name: str, **texts: str) -> str:
    """prompts/<name>.md with its $words filled in."""
    return string.Template((PROMPTS / f"{name}.md").read_text()).substitute(texts)


def refuse_evaluation(evaluate: bool, endpoint: str, evaluator: str) -> None:
    """What cannot be sent is said before anything is computed."""
    if (endpoint or evaluator) and not evaluate:
        fail("--endpoint and --evaluator are of --evaluate: give it too")
    if bool(endpoint) != bool(evaluator):
        fail("--endpoint URL and --evaluator NAME come together: where the language model answers, and which")
    if not endpoint:
        return
    if not endpoint.startswith(("http://", "https://")):
        fail(f"--endpoint {endpoint}: give the whole address of a chat endpoint, https://.../v1/chat/completions")
    if secret(KEY) is None:
        fail(f"put {KEY}=... into .env, or leave --endpoint out: the filled-in prompt is written either way")


def send(prompt: str, endpoint: str, evaluator: str, timeout: float = 600) -> str:
    """The answer of an OpenAI-compatible chat endpoint. What goes wrong there ends the program in one line."""
    body = {"model": evaluator, "messages": [{"role": "user", "content": prompt}]}
    request = urllib.request.Request(endpoint, json.dumps(body).encode(), {"Content-Type": "application/json"})
    request.add_unredirected_header("Authorization", f"Bearer {secret(KEY)}")  # the key goes there and nowhere else
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = response.read()
    except urllib.error.HTTPError as error:
        reason = error.read(200).decode(errors="replace").replace("\n", " ")
        fail(f"{endpoint} refused the prompt ({error.code}): {reason}")
    except (OSError, ValueError) as error:
        fail(f"{endpoint} did not answer: {error}")
    try:
        said = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        fail(f"{endpoint} answered what is no chat completion: {answer[:120].decode(errors='replace')!r}")
    if not said:
        fail(f"{endpoint} answered with an empty text")
    return said


def write_evaluation(path: Path, prompt: str, endpoint: str, evaluator: str) -> list[Path]:
    """
    <path>.prompt.md, and with an endpoint <path>.evaluation.md, which says who wrote it; the files that were written.
    """
    prompt_path = path.with_name(f"{path.name}.prompt.md")
    write_aside(prompt_path, lambda aside: aside.write_text(prompt))
    if not endpoint:
        return [prompt_path]
    said = send(prompt, endpoint, evaluator)
    said_path = path.with_name(f"{path.name}.evaluation.md")
    header = f"<!-- written by {evaluator} from {prompt_path.name}; nothing here is measured by this text -->\n\n"
    write_aside(said_path, lambda aside: aside.write_text(header + said.strip() + "\n"))
    return [prompt_path, said_path]
