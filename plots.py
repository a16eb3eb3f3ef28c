"""Figures: heatmaps, lines, bars, labels, and pages to read by. A notebook shows them, a script writes them."""

import contextlib
import html
import importlib.util
import itertools
import os
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from utils import (  # first: sets OpenMP's variables before torch is loaded
    WRITTEN,
    endc,
    gray,
    in_kernel,
    is_bytes,
    wandb_run,
    write_aside,
    yellow,
)
from report import fill_page, recorder, tell

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

# Okabe-Ito: readable by colour-blind eyes
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000"]


LONGEST_DRAWN = 256  # tokens; a page of all heads grows with the square
MOST_CELLS = 500_000  # of a figure; more take tens of megabytes
WIDTH_OF_TITLE = 80  # letters in a line, at half of a wide window
WIDTH_OF_SUBTITLE = 100
LONGEST_LABEL = 14  # letters of a token


#%% Showing: a notebook shows figures, a script writes them
def figure_path(name: str) -> Path:
    path = Path("figs") / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    set_aside_earlier(path.parent)
    return path


def set_aside_earlier(folder: Path) -> None:
    """Figures of a run before this one go to folder/earlier, so that none stands beside this run's."""
    before = [file for file in folder.glob("*.html") if file.absolute() not in WRITTEN]
    if not before:
        return
    earlier = folder / "earlier"
    earlier.mkdir(exist_ok=True)
    write_plotly(earlier)
    for file in before:
        with contextlib.suppress(FileNotFoundError):  # another run moved it
            os.replace(file, earlier / file.name)
    print(f"{gray}figures of an earlier run: {earlier}{endc}")


def write_plotly(folder: Path) -> None:
    """plotly.min.js, anew where a file of another size or version (or half of one) stands there."""
    from plotly.offline import get_plotlyjs

    wanted = get_plotlyjs().encode()
    file = folder / "plotly.min.js"
    if file.is_file() and file.stat().st_size == len(wanted):
        with file.open("rb") as known:
            if known.read(4096) == wanted[:4096]:  # it begins with its version
                return
    write_aside(file, lambda aside: aside.write_bytes(wanted))


def in_lines(title: str, width: int) -> list[str]:
    """A title that is longer than a figure is wide, in several lines."""
    return [line for part in title.split("<br>") for line in textwrap.wrap(part, width, break_long_words=False)]


def words_and_settings(title: str) -> tuple[str, str]:
    """'What is seen (n = 32, model, metric)' -> the words, and what stands in the parentheses at the end."""
    if not title.endswith(")"):
        return title, ""
    depth = 0
    for at in range(len(title) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(title[at], 0)
        if depth == 0:
            return title[:at].strip(), title[at + 1 : -1]
    return title, ""


def set_title(fig: go.Figure) -> None:
    """The title says what is seen; the settings in parentheses at its end stand smaller beneath it."""
    words, settings = words_and_settings(fig.layout.title.text or "")
    if not words:  # parentheses alone
        words, settings = settings, ""
    title = in_lines(words, WIDTH_OF_TITLE)
    subtitle = in_lines(settings, WIDTH_OF_SUBTITLE)
    menu = 50 if fig.layout.updatemenus else 0
    fig.update_layout(margin={"t": 60 + 22 * len(title) + 17 * len(subtitle) + menu})
    fig.update_layout(
        title={
            "text": "<br>".join(title),
            "font": {"size": 17},
            "subtitle": {"text": "<br>".join(subtitle), "font": {"size": 13, "color": "#666"}},
            "x": 0.01,
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "yref": "container",
            "pad": {"t": 18},
        }
    )


def show(fig: go.Figure, name: str, reading: str = "") -> None:
    """
    name is 'script/figure'. A notebook shows it; a script writes figs/script/figure.html, with one plotly.min.js per
    folder, and the figure stands in the run's report. reading: a sentence that says how to read it.
    """
    fig.update_layout(template="plotly_white", colorway=COLORS)
    set_title(fig)
    board = wandb_run()
    if board:
        board.log({name: fig})
    if in_kernel():
        fig.show()
        return
    path = figure_path(name)
    write_plotly(path.parent)
    WRITTEN.add(path.absolute())
    write_aside(path, lambda aside: fig.write_html(aside, include_plotlyjs="directory"))
    report = recorder()
    if report:
        report.add_figure(fig, path, reading)
    tell(f"{gray}figure: {path}{endc}")


def show_in_frame(page: str) -> None:
    """A page as a notebook shows it, in a frame of its own."""
    from IPython.display import display

    frame = f'<iframe srcdoc="{html.escape(page)}" width="100%" height="600"></iframe>'
    display({"text/html": frame, "text/plain": "a page to read"}, raw=True)


def show_page(page: str, name: str, reading: str = "") -> None:
    """Like show, for a self-contained HTML page."""
    if in_kernel():
        show_in_frame(page)
        return
    path = figure_path(name)
    WRITTEN.add(path.absolute())
    write_aside(path, lambda aside: aside.write_text(page, encoding="utf-8"))
    report = recorder()
    if report:
        report.add_page(path, reading)
    tell(f"{gray}page: {path}{endc}")


#%% Heatmaps, lines, bars and labels
def array(x: Tensor | np.ndarray | list) -> np.ndarray:
    if isinstance(x, Tensor):
        return x.detach().float().cpu().numpy()
    return np.asarray(x)


def plain(label: object) -> object:
    """A label that plotly shows letter for letter: <s>, <b> and $x$ are tokens and no markup."""
    if not isinstance(label, str):
        return label
    return html.escape(label, quote=False).replace("$", "&#36;")


def plain_apart(labels: list | None) -> list | None:
    """Plain labels of an axis; plotly makes one cell of equal ones, so those are numbered."""
    if labels is None or not any(isinstance(label, str) for label in labels):
        return labels
    times = Counter(labels)
    seen: Counter = Counter()
    apart = []
    for label in labels:
        seen[label] += 1
        apart.append(plain(f"{label} ({seen[label]})" if times[label] > 1 else label))
    return apart


def color_axis(z: np.ndarray, diverging: bool, value: str, meaning: dict[float, str], legend: bool) -> dict:
    """
    RdBu with midpoint 0 for diverging data, else Blues from 0; values that are not finite do not stretch it. meaning:
    what some of its values say in words, beside the scale.
    """
    numbers = z[np.isfinite(z)]
    top = float(np.abs(numbers).max(initial=0.0)) or 1.0
    low = -top if diverging else min(0.0, float(numbers.min(initial=0.0)))
    colorbar: dict = {"title": {"text": "<br>".join(in_lines(value, 16))}}
    if meaning:
        spelled: dict[float, str] = {}
        for level, words in meaning.items():
            apart = all(abs(level - other) > 0.1 * top for other in spelled)  # else the words would overlap
            if low <= level <= top and apart:
                spelled[level] = f"{level:g} {words}"
        ends = {
            level: f"{level:.2g}" for level in (low, top) if all(abs(level - other) > 0.1 * top for other in spelled)
        }
        marks = spelled | ends
        colorbar |= {"tickvals": list(marks), "ticktext": list(marks.values())}
    colors = "RdBu" if diverging else "Blues"
    return {"colorscale": colors, "cmin": low, "cmax": top, "colorbar": colorbar, "showscale": legend}


def cut_long_axes(
    z: np.ndarray, text: np.ndarray | None, x: list | None, y: list | None, title: str
) -> tuple[np.ndarray, np.ndarray | None, list | None, list | None, str]:
    """
    z (panel, row, column), its hover text and labels. Where there are more cells than a browser draws, no axis is
    longer than LONGEST_DRAWN; the title, and a printed line, say so.
    """
    n_rows, n_columns = z.shape[1:]
    most = slice(LONGEST_DRAWN)
    if z.size <= MOST_CELLS or max(n_rows, n_columns) <= LONGEST_DRAWN:
        return z, text, x, y, title
    said = f"the first {min(n_rows, LONGEST_DRAWN)} x {min(n_columns, LONGEST_DRAWN)} of {n_rows} x {n_columns}"
    print(f"{yellow}a figure of {z.size:,} cells is too large to draw: {said} are drawn{endc}")
    text = None if text is None else text[:, most, most]
    x = None if x is None else x[most]
    y = None if y is None else y[most]
    return z[:, most, most], text, x, y, f"{title} ({said})"


def imshow(
    z: Tensor | np.ndarray,
    title: str,
    xlabel: str,
    ylabel: str,
    x: list | None = None,
    y: list | None = None,
    panels: list[str] | None = None,
    diverging: bool = True,
    value: str = "value",
    hover: list | np.ndarray | None = None,
    columns: int = 4,
    one_scale: bool = True,
    menu: list[str] | None = None,
    meaning: dict[float, str] | None = None,
) -> go.Figure:
    """
    Heatmap of z (rows, cols), or one panel for each z[i] when panels names them; one_scale=False gives each panel its
    own colour scale. Diverging data: RdBu with midpoint 0; else Blues from 0. hover: extra text per cell, shaped like
    z. What is too large to draw is cut, and said.
    menu: names of several such pictures, z (choice, [panel,] rows, cols): one is seen, a menu chooses which.
    meaning: {0: 'corrupt', 1: 'clean'}, values of the scale in words.
    """
    from plotly.subplots import make_subplots

    z = array(z)
    text = None if hover is None else np.asarray(hover)
    n_rows, n_columns = z.shape[-2:]
    z = z.reshape(-1, n_rows, n_columns)  # every panel of every choice
    text = None if text is None else text.reshape(-1, n_rows, n_columns)
    z, text, x, y, title = cut_long_axes(z, text, x, y, title)
    n_panels = len(z) // len(menu) if menu else len(z)
    across = min(columns, n_panels)
    down = -(-n_panels // across)
    fig = make_subplots(
        rows=down,
        cols=across,
        subplot_titles=None if panels is None else [plain(name) for name in panels],
        shared_yaxes=True,  # the rows' names stand once, at the left
        horizontal_spacing=0.04,
        vertical_spacing=0.35 / down if down > 1 else 0.1,
    )
    cell = f"{ylabel} %{{y}}<br>{xlabel} %{{x}}<br>{value} %{{z:.4g}}"
    if text is not None:
        cell += "<br>%{text}"
    for i, picture in enumerate(z):
        panel = i % n_panels
        axis = "coloraxis" if one_scale or i == 0 else f"coloraxis{i + 1}"
        heatmap = go.Heatmap(
            z=picture,
            x=plain_apart(x),
            y=plain_apart(y),
            text=None if text is None else text[i],
            hovertemplate=f"{cell}<extra></extra>",
            coloraxis=axis,
            visible=i < n_panels,
        )
        fig.add_trace(heatmap, row=panel // across + 1, col=panel % across + 1)
        scale = color_axis(z if one_scale else picture, diverging, value, meaning or {}, legend=one_scale)
        fig.update_layout({axis: scale})
    if down > 1:
        fig.update_layout(height=max(450, 380 * down))  # else as high as the window
    fig.update_layout(title=title)
    fig.update_yaxes(autorange="reversed")
    fig.update_xaxes(tickfont={"size": 11})
    fig.update_annotations(font={"size": 13})  # the panels' names
    fig.update_xaxes(title=xlabel, row=down)
    fig.update_yaxes(title=ylabel, col=1)
    if menu:
        add_menu(fig, menu, n_panels)
    return fig


def add_menu(fig: go.Figure, names: list[str], n_traces: int) -> None:
    """A menu of the figure's pictures, each of n_traces traces in a row: one is seen at a time."""
    buttons = []
    for i, name in enumerate(names):
        seen = [trace // n_traces == i for trace in range(len(names) * n_traces)]
        buttons.append({"label": plain(name), "method": "restyle", "args": [{"visible": seen}]})
    place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 26}}  # above the panels' names
    fig.update_layout(updatemenus=[{"buttons": buttons, "showactive": True, **place}])


def line(
    lines: dict[str, Tensor | np.ndarray | list],
    title: str,
    xlabel: str,
    ylabel: str,
    x: list | Tensor | None = None,
    markers: bool = False,
    logx: bool = False,
    dashed: list[str] | tuple[str, ...] = (),
) -> go.Figure:
    """One line per entry of lines; the names in dashed are references (floors, baselines)."""
    fig = go.Figure()
    for i, (name, y) in enumerate(lines.items()):
        dash = "solid" if i < len(COLORS) else "dot"  # when the colours are used up they come again, dotted
        if name in dashed:
            dash = "dash"
        fig.add_trace(
            go.Scatter(
                x=None if x is None else array(x),
                y=array(y),
                name=plain(name),
                mode="lines+markers" if markers else "lines",
                line={"dash": dash},
                hovertemplate=f"{plain(name)}<br>{xlabel} %{{x}}<br>{ylabel} %{{y:.4f}}<extra></extra>",
            )
        )
    fig.update_layout(title=title, xaxis_title=xlabel, yaxis_title=ylabel)
    if logx:
        fig.update_xaxes(type="log")
    return fig


def bar(
    bars: dict[str, Tensor | np.ndarray | list],
    title: str,
    xlabel: str,
    ylabel: str,
    x: list,
    errors: dict[str, tuple[np.ndarray | list, np.ndarray | list]] | None = None,
    hover: str = "%{x}<br>%{y:.3f}<extra></extra>",
) -> go.Figure:
    """
    One group of bars per entry of bars, each over the names x. errors: how far the interval of a group reaches
    (above, below) each bar.
    """
    fig = go.Figure()
    for name, heights in bars.items():
        error = None
        if errors and name in errors:
            above, below = errors[name]
            error = {"array": array(above), "arrayminus": array(below)}
        fig.add_trace(go.Bar(x=plain_apart(x), y=array(heights), name=plain(name), error_y=error, hovertemplate=hover))
    fig.update_layout(title=title, xaxis_title=xlabel, yaxis_title=ylabel)
    return fig


SMALLEST = 1e-3  # below this a signed logarithm is straight


def signed_log(x: Tensor) -> list[float]:
    """Values from -1 to 1 and beyond on an axis that shows small ones too: 0 at 0, one step for each power of ten."""
    return (x.sign() * (1 + x.abs() / SMALLEST).log10()).tolist()


def signed_log_ticks() -> dict[str, list]:
    """Where the axis of signed_log has its numbers."""
    shown = [-1, -0.1, -0.01, -0.001, 0, 0.001, 0.01, 0.1, 1]
    return {"tickvals": signed_log(Tensor(shown)), "ticktext": [f"{value:g}" for value in shown]}


def visible(token: str) -> str:
    """A token as a figure can print it: spaces and newlines made visible."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍") or "∅"


def cut_in_the_middle(token: str) -> str:
    if len(token) <= LONGEST_LABEL:
        return token
    return f"{token[: LONGEST_LABEL - 4]}…{token[-3:]}"


def label_tokens(tokens: list[str]) -> list[str]:
    """Axis labels: visible tokens, suffixed with their position so that repeats stay apart."""
    return [f"{cut_in_the_middle(visible(token))}_{i}" for i, token in enumerate(with_characters(tokens))]


def with_characters(tokens: list[str]) -> list[str]:
    """Tokens of a text in their order: those that are parts of a character ('<0xE5><0x9B>', '<0xBD>') as '国…', '…国'."""
    shown = list(tokens)
    start = 0
    for is_part, run in itertools.groupby(tokens, is_bytes):
        part = list(run)
        if is_part:
            shown[start : start + len(part)] = name_parts(part)
        start += len(part)
    return shown


def bytes_of(part: str) -> bytes:
    return bytes.fromhex(part.replace("<0x", "").replace(">", ""))


def text_of_tokens(tokens: list[str]) -> str:
    """The text that tokens make together, parts of characters joined."""
    text = ""
    for is_part, run in itertools.groupby(tokens, is_bytes):
        part = list(run)
        text += b"".join(map(bytes_of, part)).decode(errors="replace") if is_part else "".join(part)
    return text


def name_parts(parts: list[str]) -> list[str]:
    """Tokens of bytes by the characters that they make together, with … where one begins or ends in another token."""
    encoded = [bytes_of(part) for part in parts]
    text = b"".join(encoded).decode(errors="replace")
    if "\ufffd" in text:  # not all of it is there
        return parts
    of_byte = [(character, i, len(character.encode())) for character in text for i in range(len(character.encode()))]
    names = []
    at = 0
    for piece in encoded:
        covered = of_byte[at : at + len(piece)]
        at += len(piece)
        first, last = covered[0], covered[-1]
        characters = [character for j, (character, i, _) in enumerate(covered) if i == 0 or j == 0]
        begins = "…" if first[1] > 0 else ""
        ends = "…" if last[1] < last[2] - 1 else ""
        names.append(f"{begins}{''.join(characters)}{ends}")
    return names


def first_tokens(tokens: list[str], title: str) -> tuple[int, str]:
    """How many tokens are drawn, and the title, which says (as does a printed line) what is left out."""
    if len(tokens) <= LONGEST_DRAWN:
        return len(tokens), title
    print(f"{yellow}of {len(tokens)} tokens the first {LONGEST_DRAWN} are drawn{endc}")
    return LONGEST_DRAWN, f"{title} (the first {LONGEST_DRAWN} of {len(tokens)} tokens)"


#%% Pages: features to search and attention to hover
def feature_page(entries: list[dict], title: str) -> str:
    """Self-contained HTML to read features by: search, sort, and link to one as page.html#f123."""
    return fill_page("features", title, entries)


def catalogue_page(entries: list[dict], title: str) -> str:
    """
    Self-contained HTML to look heads and neurons up in: search, sort, and link to one as page.html#L3N117. Each entry is
    {id, kind ('head' or 'neuron'), layer, number, named, size, lines: [[label, text]], contexts: [[label, words, shades
    in percent, negative ones below zero]], links: [[label, [[id, text]]]]}.
    """
    return fill_page("catalogue", title, entries)


def neuron_context(neuron: dict, words: list[str], row: int, position: int) -> list:
    """[label, words, shades in percent of its largest]: a row's words around a place; neuron as neuron_catalogue has it."""
    around = slice(max(0, position - 14), position + 6)
    activation = neuron["activation"][row]
    shades = (100 * activation[around] / neuron["largest"]).round().int().tolist()
    return [f"{activation[position]:+.2f}", words[around], shades]


def attention_page(
    tokens: list[str],
    patterns: Tensor,
    names: list[str],
    title: str,
    start: int = 0,
    more: dict[str, tuple[list[str], Tensor]] | None = None,
) -> str:
    """
    Self-contained HTML for patterns (head, query, key): a small map of every head, and the text to hover. start: the
    head shown first. more: other prompts by name, with their tokens and patterns, that a menu chooses.
    """
    prompts = {text_of_tokens(tokens): (tokens, patterns), **(more or {})}
    longest = max((words for words, _ in prompts.values()), key=len)
    _, title = first_tokens(longest, title)
    examples = []
    for name, (words, attention) in prompts.items():
        words = words[:LONGEST_DRAWN]
        attention = attention[:, : len(words), : len(words)]
        percent = (100 * attention.float()).round().int().tolist()
        examples.append(
            {
                "name": name[:120],
                "tokens": [visible(token) for token in with_characters(words)],
                "labels": label_tokens(words),
                "patterns": [[row[: query + 1] for query, row in enumerate(head)] for head in percent],
            }
        )
    return fill_page("attention", title, {"prompts": examples, "heads": names, "start": start})


def show_attention(
    patterns: Tensor,
    tokens: list[str],
    heads: list[str],
    about: str,
    name: str,
    start: int = 0,
    more: dict[str, tuple[list[str], Tensor]] | None = None,
    ask: Callable[[str], tuple[list[str], Tensor]] | None = None,
) -> None:
    """
    Attention (head, query, key) on a prompt of any model, as a page: a small map of every head, and the text to hover.
    start: the head that the page shows first. more: other prompts by name, with their tokens and patterns. ask: gives
    the tokens and patterns of any text; a notebook then has a box to type one in.
    """
    title = f"Attention of {about}"
    page = attention_page(tokens, patterns, heads, title, start, more)
    show_page(page, name, "Pick a head by its small map; hover a token to see where it looks.")
    if ask and in_kernel():
        show_box(lambda text: attention_page(*ask(text), heads, title, start))


def show_box(page_of: Callable[[str], str]) -> None:
    """In a notebook, a box to type a prompt in: Enter shows the page that page_of makes of it, beneath the box."""
    from IPython.display import display

    if not importlib.util.find_spec("ipywidgets"):
        print(f"{gray}a box to type a prompt in needs ipywidgets: uv sync --group notebook{endc}")
        return
    from ipywidgets import Layout, Output, Text

    box = Text(placeholder="type a prompt, then Enter", continuous_update=False, layout=Layout(width="100%"))
    beneath = Output()

    def answer(typed: dict) -> None:
        beneath.clear_output(wait=True)
        with beneath:
            try:
                show_in_frame(page_of(typed["new"]))
            except SystemExit as refused:  # fail's line
                print(refused)

    box.observe(answer, "value")
    display(box, beneath)
