"""Figures: heatmaps, lines, bars, labels, and pages to read by. A notebook shows them, a script writes them."""

import html
import json
from pathlib import Path

from utils import endc, gray, in_kernel, wandb_run, write_aside

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

PAGES = Path(__file__).parent / "pages"  # HTML and JavaScript of the pages
COLORS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
    "#000000",
]  # Okabe-Ito: readable by colour-blind eyes


#%% Showing: a notebook shows figures, a script writes them
def show(fig: go.Figure, name: str) -> None:
    """name is 'script/figure'. A notebook shows it; a script writes figs/script/figure.html, with one plotly.min.js per folder."""
    fig.update_layout(template="plotly_white", colorway=COLORS, margin=dict(t=90), title=dict(font=dict(size=16)))
    if board := wandb_run():
        board.log({name: fig})
    if in_kernel():
        return fig.show()
    path = Path("figs") / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda p: fig.write_html(p, include_plotlyjs="directory"))
    print(f"{gray}figure: {path}{endc}")


def show_page(html: str, name: str) -> None:
    """Like show, for a self-contained HTML page."""
    if in_kernel():
        from IPython.display import HTML, display

        return display(
            HTML(
                f'<iframe srcdoc="{html.replace("&", "&amp;").replace(chr(34), "&quot;")}" width="100%" height="500"></iframe>'
            )
        )
    path = Path("figs") / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda p: p.write_text(html))
    print(f"{gray}page: {path}{endc}")


#%% Heatmaps, lines and labels
def array(x: Tensor | np.ndarray | list) -> np.ndarray:
    return x.detach().float().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


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
) -> go.Figure:
    """
    Heatmap of z (rows, cols), or one panel for each z[i] when panels names them; one_scale=False gives each panel its own colour scale.
    Diverging data: RdBu with midpoint 0; else Blues from 0. hover: extra text per cell, shaped like z.
    """
    from plotly.subplots import make_subplots

    z = array(z)
    z = z if panels else z[None]
    n_cols = min(columns, len(z))
    n_rows = -(-len(z) // n_cols)
    fig = make_subplots(
        n_rows,
        n_cols,
        subplot_titles=panels,
        horizontal_spacing=0.04,
        vertical_spacing=0.35 / n_rows if n_rows > 1 else 0.1,
    )
    text = None if hover is None else (np.asarray(hover) if panels else np.asarray(hover)[None])
    for i, panel in enumerate(z):
        cell = (
            f"{ylabel} %{{y}}<br>{xlabel} %{{x}}<br>{value} %{{z:.4g}}"
            + ("<br>%{text}" if text is not None else "")
            + "<extra></extra>"
        )
        fig.add_trace(
            go.Heatmap(
                z=panel,
                x=x,
                y=y,
                text=None if text is None else text[i],
                hovertemplate=cell,
                coloraxis=f"coloraxis{i + 1 if i and not one_scale else ''}",
            ),
            row=i // n_cols + 1,
            col=i % n_cols + 1,
        )
    for i, part in enumerate([z] if one_scale else z):
        finite = part[np.isfinite(part)]
        top = float(np.abs(finite).max()) or 1.0
        scale = dict(
            colorscale="RdBu" if diverging else "Blues",
            cmin=-top if diverging else min(0.0, float(finite.min())),
            cmax=top,
            colorbar=dict(title=value),
            showscale=one_scale,
        )
        fig.update_layout({f"coloraxis{i + 1 if i else ''}": scale})
    fig.update_layout(title=title, height=max(450, 380 * n_rows))
    fig.update_yaxes(autorange="reversed")
    fig.update_xaxes(title=xlabel, row=n_rows)
    fig.update_yaxes(title=ylabel, col=1)
    return fig


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
    for i, (name, y) in enumerate(lines.items()):  # when the colours are used up they come again, dotted
        fig.add_trace(
            go.Scatter(
                x=None if x is None else array(x),
                y=array(y),
                name=name,
                mode="lines+markers" if markers else "lines",
                line=dict(dash="dash" if name in dashed else "solid" if i < len(COLORS) else "dot"),
                hovertemplate=f"{name}<br>{xlabel} %{{x}}<br>{ylabel} %{{y:.4f}}<extra></extra>",
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
    """One group of bars per entry of bars, each over the names x. errors: how far the interval of a group reaches (above, below) each bar."""
    fig = go.Figure()
    for name, heights in bars.items():
        error = None
        if errors and name in errors:
            above, below = errors[name]
            error = {"array": array(above), "arrayminus": array(below)}
        fig.add_trace(go.Bar(x=x, y=array(heights), name=name, error_y=error, hovertemplate=hover))
    fig.update_layout(title=title, xaxis_title=xlabel, yaxis_title=ylabel)
    return fig


def visible(token: str) -> str:
    """A token as a figure can print it: spaces and newlines made visible."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍") or "∅"


def label_tokens(tokens: list[str]) -> list[str]:
    """Axis labels: visible tokens, suffixed with their position so that repeats stay apart."""
    return [f"{visible(token)}_{i}" for i, token in enumerate(tokens)]


#%% Pages: features to search and attention to hover
def feature_page(entries: list[dict], title: str) -> str:
    return (
        (PAGES / "features.html")
        .read_text()
        .replace("TITLE", title.replace("<", "&lt;"))
        .replace("DATA", json.dumps(entries, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
    )


def attention_page(tokens: list[str], patterns: Tensor, names: list[str], title: str, start: int = 0) -> str:
    """Self-contained HTML for patterns (head, query, key), one button per head name."""
    rounded = [[[round(100 * w) for w in row[: q + 1]] for q, row in enumerate(head)] for head in patterns.tolist()]
    data = {
        "tokens": [visible(token) for token in tokens],
        "labels": label_tokens(tokens),
        "patterns": rounded,
        "heads": names,
        "start": start,
    }
    return (
        (PAGES / "attention.html")
        .read_text()
        .replace("TITLE", html.escape(title))
        .replace("DATA", json.dumps(data).replace("</", "<\\/"))
    )
