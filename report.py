"""
The report of a run: figs/<script>/index.html, the story in the order of its cells. What a cell printed and the figures
it showed stand under the cell's sentence; the gates, the settings and the command follow at the end.
"""

import ast
import atexit
import bisect
import dataclasses
import html
import json
import re
import shlex
import sys
import time
import unicodedata
import webbrowser
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from utils import (  # first: sets OpenMP's variables before torch is loaded
    ROOT,
    blue,
    bold,
    by_path,
    cyan,
    endc,
    finite,
    gray,
    green,
    orange,
    purple,
    red,
    write_aside,
    yellow,
)
from settings import meanings

import plotly.graph_objects as go

PAGES = Path(__file__).parent / "pages"  # HTML and JavaScript of the pages

CLASSES = {
    purple: "section",
    gray: "status",
    cyan: "result",
    green: "success",
    yellow: "warning",
    red: "error",
    orange: "warning",
    blue: "status",
    bold: "section",
}  # a terminal's colours as the report's style names them
ESCAPE = re.compile("(\x1b\\[[0-9;]*m)")

# the order in which the stories are best read; a report names the next
STORIES = (
    "zero_layer",
    "attn_only",
    "tiny_transformer",
    "llama_block",
    "moe",
    "mamba",
    "logit_lens",
    "readers",
    "reversal",
    "patching",
    "circuits",
    "catalogue",
    "das",
    "probing",
    "steering",
    "sae_probe",
    "feature_steering",
    "attribution",
    "bench",
)


def fill_page(name: str, title: str, data: list | dict) -> str:
    """A page of pages/ with its title and its data, which can hold any text: it cannot end the script."""
    text = json.dumps(finite(data), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (PAGES / f"{name}.html").read_text(encoding="utf-8")
    filled = {"{{TITLE}}": html.escape(title), "{{DATA}}": text}
    return re.sub("{{TITLE}}|{{DATA}}", lambda place: filled[place[0]], page)  # in one pass: a title can hold {{DATA}}


#%% What was printed, as pieces with a style, and its tables as tables
def styled(text: str) -> list[list[str]]:
    """Printed text as [style, piece] pairs; a colour lasts until the next."""
    pieces = []
    style = ""
    for piece in ESCAPE.split(text):
        if ESCAPE.fullmatch(piece):
            style = CLASSES.get(piece, "" if piece == endc else style)
        elif piece:
            pieces.append([style, piece])
    return pieces


def is_rule(line: str) -> bool:
    """The line of dashes that tabulate draws under the names of its columns."""
    return bool(re.fullmatch(r"-+( +-+)*\s*", line)) and "--" in line


def column_ends(rule: str) -> list[tuple[int, int]]:
    """Where each column of a table stands: from its first dash to the first dash of the next."""
    starts = [dashes.start() for dashes in re.finditer("-+", rule)]
    ends = [*starts[1:], 10_000]
    return list(zip(starts, ends))


def by_width(line: str) -> str:
    """Without colours, and a filler after each character that takes two columns: Chinese words stand in columns too."""
    line = ESCAPE.sub("", line)
    return "".join(letter + "\0" if unicodedata.east_asian_width(letter) in "WF" else letter for letter in line)


def cells_of_row(line: str, rule: str) -> list[str]:
    line = by_width(line)
    return [line[start:end].replace("\0", "").strip() for start, end in column_ends(rule)]


def fits(line: str, rule: str) -> bool:
    """Whether a line can be one of a table's: nothing stands between its columns."""
    line = by_width(line)
    return not any(line[gap.start() : gap.end()].strip() for gap in re.finditer("(?<=-) +(?=-)", rule))


def header_above(lines: list[str], rule_at: int, first: int) -> int:
    """
    The first line of a table's header, which stands above its rule, from line `first` on; names that are too long take
    several lines. The rule itself where there is no header.
    """
    rule = lines[rule_at]
    at = rule_at
    while at > first and may_be_names(lines[at - 1], rule):
        if at < rule_at and not any(cells_of_row(lines[at - 1], rule)[1:]):
            break  # a word or two over the table
        at -= 1
        if ESCAPE.match(lines[at]):  # where the table's colour begins
            break
    between_rules = at > first and is_rule(lines[at - 1])  # rows of a table without a header, which stays text
    return rule_at if between_rules else at


def may_be_names(line: str, rule: str) -> bool:
    """Whether a line can be one of a header's; one that is coloured by itself is a sentence."""
    return bool(line.strip()) and endc not in line and not is_rule(line) and fits(line, rule)


WIDE_COLUMN = 16  # letters: a first column that is narrower is not broken into lines


def goes_on(above: list[str], row: list[str], column: int, rule: str) -> bool:
    """Whether a row's single text is what did not fit into the row above, and no row of its own."""
    if column > 0:
        return True
    start, end = column_ends(rule)[0]
    return end - start >= WIDE_COLUMN and len(above[0]) + len(row[0]) > end - start


def rows_below(lines: list[str], rule_at: int) -> tuple[list[list[str]], int]:
    """
    The rows under a rule, and the line after them: an empty one, one that is coloured by itself, or the header of
    another table. A row with a single text goes on with the row above.
    """
    rule = lines[rule_at]
    rows: list[list[str]] = []
    at = rule_at + 1
    while at < len(lines) and lines[at].strip() and fits(lines[at], rule):
        begins_coloured = ESCAPE.match(lines[at])
        is_next_header = at + 1 < len(lines) and is_rule(lines[at + 1])
        if begins_coloured or is_next_header:
            break
        ends_coloured = ESCAPE.search(lines[at])  # the table's colour ends with it
        row = cells_of_row(lines[at], rule)
        filled = [i for i, cell in enumerate(row) if cell]
        if len(filled) == 1 and rows and len(row) > 2 and goes_on(rows[-1], row, filled[0], rule):
            rows[-1][filled[0]] += f" {row[filled[0]]}"
        else:
            rows.append(row)
        at += 1
        if ends_coloured:
            break
    return rows, at


def in_parts(text: str) -> list[dict]:
    """Text as {"text": pieces} and {"table": {header, rows}}, in its order."""
    lines = text.split("\n")
    parts: list[dict] = []
    at = 0
    for rule_at in range(1, len(lines)):
        if not is_rule(lines[rule_at]):
            continue
        top = header_above(lines, rule_at, at)
        if top == rule_at:
            continue
        header = [cells_of_row(line, lines[rule_at]) for line in lines[top:rule_at]]
        rows, end = rows_below(lines, rule_at)
        parts.append({"text": styled("\n".join(lines[at:top]))})
        names = [" ".join(filter(None, column)) for column in zip(*header)]
        parts.append({"table": {"header": names, "rows": rows}})
        at = end
    parts.append({"text": styled("\n".join(lines[at:]))})
    return [part for part in parts if "table" in part or "".join(piece for _, piece in part["text"]).strip()]


#%% The recorder: a standard output that also remembers in which cell each thing was said
@dataclass
class Cell:
    sentence: str
    parts: list[dict] = field(default_factory=list)
    unread: str = ""  # printed since the last figure

    def add(self, part: dict) -> None:
        self.close_text()
        self.parts.append(part)

    def close_text(self) -> None:
        self.parts += in_parts(self.unread)
        self.unread = ""


def cells_of(source: str) -> tuple[list[int], list[Cell]]:
    """The first line of each cell, and the cells with the sentences of their markers; the first is what stands before."""
    starts = [1]
    cells = [Cell("")]
    in_marker = False
    for number, text in enumerate(source.splitlines(), 1):
        if text.startswith("#%%"):
            starts.append(number)
            cells.append(Cell(text.removeprefix("#%%").strip()))
            in_marker = True
        elif in_marker and text.startswith("# "):  # a sentence that is longer than a line
            cells[-1].sentence += text.removeprefix("#")
        else:
            in_marker = False
    return starts, cells


class Recorder:
    """Stands for sys.stdout while a script runs: passes everything on, and keeps it cell by cell for the report."""

    def __init__(self, out: TextIO, script: Path, config: object, default: object, opens: bool):
        self.out = out
        self.script = script
        self.config = config
        self.default = default
        self.opens = opens
        self.started = time.time()
        self.folder = Path("figs").absolute() / script.stem
        self.results = Path("results").absolute() / f"{script.stem}.json"
        self.command = shlex.join([script.name, *sys.argv[1:]])
        self.starts, self.cells = cells_of(script.read_text(encoding="utf-8"))
        self.announced: Cell | None = None  # whose sentence was printed last
        self.finished = False

    def __getattr__(self, name: str) -> object:
        return getattr(self.out, name)

    def write(self, text: str) -> int:
        cell = self.cell()
        if text.strip():
            self.announce(cell)
        cell.unread += text
        return self.out.write(text)

    def announce(self, cell: Cell) -> None:
        """In the terminal a cell's sentence, what is asked, stands before the first that it says."""
        if cell is self.announced or not cell.sentence:
            return
        self.announced = cell
        if not cell.sentence.startswith("..."):
            self.out.write(f"\n{gray}{cell.sentence}{endc}\n")

    def cell(self) -> Cell:
        """
        The cell of the script that is being run: the caller's frames are gone up to the script's own, __main__, whose
        line says where it is. In another thread there is no such frame: then the first.
        """
        frame = sys._getframe()
        while frame and not (frame.f_code.co_name == "<module>" and frame.f_globals["__name__"] == "__main__"):
            frame = frame.f_back
        line = frame.f_lineno if frame else 1
        return self.cells[bisect.bisect(self.starts, line) - 1]

    def add_figure(self, fig: go.Figure, path: Path, reading: str) -> None:
        """reading: how the figure is read, a line under it."""
        figure = {"name": path.name, "plot": json.loads(fig.to_json()), "reading": reading}
        self.cell().add({"figure": figure})

    def add_page(self, path: Path, reading: str) -> None:
        self.cell().add({"page": {"name": path.name, "reading": reading}})

    def finish(self) -> None:
        """Write the report, if the run got as far as a figure or its numbers, and say where it is."""
        if self.finished:
            return
        self.finished = True
        saved = self.results.is_file() and self.results.stat().st_mtime >= self.started - 2
        kept = json.loads(self.results.read_text()) if saved else {}
        for cell in self.cells:
            cell.close_text()
        shown = any("figure" in part or "page" in part for cell in self.cells for part in cell.parts)
        if not saved and not shown:
            return
        page = fill_page("report", self.script.stem, story(self, kept))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "index.html"
        write_aside(path, lambda aside: aside.write_text(page, encoding="utf-8"))
        print(f"{gray}report: {Path('figs') / self.script.stem / path.name}{endc}", file=self.out)
        if self.opens:
            webbrowser.open(path.as_uri())


def recorder() -> Recorder | None:
    """The recorder that is at work: a script's standard output; none in a notebook."""
    return sys.stdout if isinstance(sys.stdout, Recorder) else None


def tell(text: str) -> None:
    """Print for the terminal, not for the report, which shows what this is about."""
    run = recorder()
    if run:
        run.announce(run.cell())
    print(text, file=run.out if run else sys.stdout)


def finish_report() -> None:
    """The end of a script that is not the end of its process."""
    if isinstance(sys.stdout, Recorder):
        atexit.unregister(sys.stdout.finish)
        sys.stdout.finish()
        sys.stdout = sys.stdout.out


def record(script: Path, config: object, default: object, opens: bool) -> None:
    """From here on what the script prints and shows is kept for its report, which is written when the script ends."""
    finish_report()  # one process may run several scripts, one after the other
    sys.stdout = Recorder(sys.stdout, script, config, default, opens)
    atexit.register(sys.stdout.finish)


#%% The story: what the page shows; pages/report.html draws each key of it
def story(run: Recorder, kept: dict) -> dict:
    """kept: what the script saved in results/<script>.json; empty where it did not get there."""
    told = [cell for cell in run.cells if cell.parts]
    numbers = {key: value for key, value in kept.items() if key not in ("config", "versions")}
    return {
        "question": question(run.script),
        "complete": bool(kept),
        "came_out": conclusions(told[-1]) if told else [],
        "cells": [{"sentence": cell.sentence, "parts": cell.parts} for cell in told],
        "gates": gates(numbers),
        "settings": settings_of(run.config, run.default),
        "command": f"uv run {run.command}",
        "versions": kept.get("versions", {}),
        "when": time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started)),
        "seconds": round(time.time() - run.started),
        "numbers": f"../../results/{run.results.name}" if kept else "",
        "next": next_story(run.script),
    }


def question(script: Path) -> str:
    return ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or script.stem


def conclusions(last: Cell) -> list[str]:
    """What the last cell says in green, the colour of what is sure."""
    said = [piece for part in last.parts for style, piece in part.get("text", []) if style == "success"]
    return [line for piece in said for line in piece.split("\n") if line.strip()]


def gates(numbers: dict) -> list[list]:
    """Everything under 'gates', and every ..._error, ..._missed: what must be near zero before the rest is believed."""
    found = []
    for name, value in by_path(numbers).items():
        *above, last = name.split(".")
        if "gates" in above or re.search("(_error|_missed|listening_gap)$", last):
            found.append([name, value])
    return found


def settings_of(config: object, default: object) -> list[list]:
    """[name, value, whether it is the default, what it means] of each setting."""
    rows = []
    said = meanings(type(config))
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        is_default = value == getattr(default, setting.name)
        rows.append([f"--{setting.name.replace('_', '-')}", str(value), is_default, said.get(setting.name, "")])
    return rows


def next_story(script: Path) -> dict:
    """The story that is best read after this one, with the first lines of what it says of itself."""
    if script.stem not in STORIES:
        return {}
    following = STORIES[(STORIES.index(script.stem) + 1) % len(STORIES)]
    file = ROOT / f"{following}.py"
    first = re.split(r"(?<=[.?]) ", question(file).replace("\n", " "))[0]
    return {"command": f"uv run {file.name}", "question": first}
