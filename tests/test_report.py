"""The report of a run: what stood where, in the order of the cells, and nothing that was lost."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT
from tabulate import tabulate

from report import Cell, cells_of, gates, in_parts, next_story, styled
from utils import cyan, endc, gray, green

STORY = """'What is asked? And more.'
from dataclasses import dataclass
from utils import cyan, endc, green, save_results
from plots import line, show
from launch import flags

#%% Settings
@dataclass
class Config:
    n: int = 3  # how many
    word: str = "a"

cfg = flags(Config, __doc__)

def say(x):
    print(f"{cyan}{x} < 2{endc}")

#%% First, a number
say(1)
#%% ... as a line
show(line({"a": [1.0, 2.0]}, "Two numbers (n = 2)", "x", "y"), "story/two", "It rises.")
print("name      value\\n------  -------\\none        1.5\\ntwo          -")
print(f"{green}after{endc}")
STOP
#%% The end
save_results("story", cfg, gates={"nothing": 1e-9}, max_error=2.0, found=3)
print(f"{green}It works.{endc}")
"""


def told(folder) -> dict:
    page = (folder / "figs/story/index.html").read_text()
    return json.loads(re.search("^const run = (.*);$", page, re.M)[1])


def test_text_keeps_its_colours():
    assert styled(f"a{cyan}b{endc}c{gray}d") == [["", "a"], ["result", "b"], ["", "c"], ["status", "d"]]


def test_a_printed_table_is_a_table():
    from tabulate import tabulate

    rows = [["L0H1", 0.25, "a b"], ["L1H0", -1.5, ""]]
    printed = f"before\n{tabulate(rows, headers=['head', 'share of it', 'note'])}\n{green}after{endc}\n--- no table\n"
    before, table, after = in_parts(printed)
    assert before == {"text": [["", "before"]]}
    assert table["table"]["header"] == ["head", "share of it", "note"]
    assert table["table"]["rows"] == [["L0H1", "0.25", "a b"], ["L1H0", "-1.5", ""]]
    assert ["success", "after"] in after["text"]


def tables(text: str) -> list[dict]:
    return [part["table"] for part in in_parts(text) if "table" in part]


def test_a_coloured_table_is_a_table_too():
    printed = tabulate([["a b", 1.5], ["c", 2]], headers=["name", "the value"])
    for text in (f"{cyan}{printed}{endc}\nmore", f"{gray}before{endc}\n{cyan}{printed}{endc}\n{green}more{endc}"):
        assert tables(text) == [{"header": ["name", "the value"], "rows": [["a b", "1.5"], ["c", "2"]]}]


def test_tables_that_follow_each_other_stay_apart():
    first = tabulate([["The", 1, 2]], headers=["token", "x", "y"])
    second = tabulate([["L0", 3, 4]], headers=["layer", "E0", "E1"])
    assert [table["rows"] for table in tables(f"{first}\n{second}\nin words")] == [
        [["The", "1", "2"]],
        [["L0", "3", "4"]],
    ]


def test_names_and_cells_of_several_lines_are_one():
    rows = [["Then Susan and Philip waited at the school", 138, 0.5]]
    headers = ["prompt", "edges, all held: error", "paths"]
    text = tabulate(rows, headers=headers, maxheadercolwidths=10, maxcolwidths=[22, None, None])
    assert tables(f"{cyan}before{endc}\n{text}\n{cyan}after{endc}") == [
        {"header": headers, "rows": [["Then Susan and Philip waited at the school", "138", "0.5"]]}
    ]


def test_a_row_with_a_name_alone_is_a_row():
    rows = [["first", 1.5, 2.5], ["second", None, None]]
    (table,) = tables(tabulate(rows, headers=["name", "a", "b"]))
    assert [row[0] for row in table["rows"]] == ["first", "second"]


def test_chinese_words_stand_in_their_columns():
    assert tables(tabulate([["中国 a", 1.5, "x"], ["b", 2.5, "首都"]], headers=["词", "v", "w"])) == [
        {"header": ["词", "v", "w"], "rows": [["中国 a", "1.5", "x"], ["b", "2.5", "首都"]]}
    ]


def test_words_around_a_table_and_a_table_without_names_stay_text():
    assert tables("a word\n" + tabulate([["a", 1]], headers=["n", "v"]) + "\nand more of them")[0]["rows"] == [
        ["a", "1"]
    ]
    assert tables(f"{gray}=== m ==={endc}\n" + tabulate([["l0", 1.5], ["fvu", 0.2]]) + "\nmore") == []


def test_what_is_said_belongs_to_the_cell_whose_marker_stands_above():
    starts, cells = cells_of("x\n#%% One\ny\n# a comment\n#%% Two,\n# and more\nz\n")
    assert starts == [1, 2, 5] and [cell.sentence for cell in cells] == ["", "One", "Two, and more"]
    cell = Cell("One")
    cell.unread = "before"
    cell.add({"page": {}})
    cell.unread = "after"
    cell.close_text()
    assert [list(part) for part in cell.parts] == [["text"], ["page"], ["text"]]


@pytest.fixture
def story(run, tmp_path):
    def run_story(*args: str, stop: str = ""):
        script = tmp_path / "story.py"
        script.write_text(STORY.replace("STOP", stop))
        return run(str(script), *args, cwd=tmp_path)

    return run_story


def test_a_report_tells_the_story_in_order(story, tmp_path):
    done = story("--word", "b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].endswith("report: figs/story/index.html\x1b[0m")
    assert done.stdout.index("First, a number") < done.stdout.index("1 < 2"), "what is asked stands before what is said"
    assert done.stdout.count("First, a number") == 1 and "... as a line" not in done.stdout
    run = told(tmp_path)
    assert run["question"] == "What is asked? And more." and run["complete"]
    assert run["came_out"] == ["It works."]
    assert [cell["sentence"] for cell in run["cells"]] == ["First, a number", "... as a line", "The end"]
    first, second, _ = run["cells"]
    assert ["result", "1 < 2"] in first["parts"][0]["text"]
    figure, table, after = second["parts"]
    assert (figure["figure"]["name"], figure["figure"]["reading"]) == ("two.html", "It rises.")
    assert figure["figure"]["plot"]["layout"]["title"]["text"] == "Two numbers"
    assert table["table"] == {"header": ["name", "value"], "rows": [["one", "1.5"], ["two", "-"]]}
    assert ["success", "after"] in after["text"]
    assert run["gates"] == [["gates.nothing", 1e-9], ["max_error", 2.0]]
    assert ["--n", "3", True, "how many"] in run["settings"] and ["--word", "b", False, ""] in run["settings"]
    assert run["command"] == "uv run story.py --word b"


def test_a_run_that_breaks_off_leaves_what_it_had_shown_and_says_so(story, tmp_path):
    done = story(stop="raise SystemExit('no further')")
    assert done.returncode == 1 and "no further" in done.stderr
    run = told(tmp_path)
    assert not run["complete"] and len(run["cells"]) == 2


def test_a_run_that_shows_nothing_leaves_no_report(story, tmp_path):
    done = story("--n", "many")
    assert done.returncode == 1 and not (tmp_path / "figs").exists()


def test_the_page_draws_in_a_browser(story, tmp_path):
    if not shutil.which("chromium"):
        pytest.skip("no chromium")
    story()
    page = tmp_path / "figs/story/index.html"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    dom = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=120).stdout
    assert "svg-container" in dom and "What came out" in dom and "1 &lt; 2" in dom
    assert re.search("<td[^>]*>one</td>", dom)


def test_gates_are_told_from_numbers_whose_names_resemble_them():
    numbers = {
        "gates": {"nothing_patched": 1e-8},
        "attribution_max_error": 1e-7,
        "the gate of an error": {"completeness": 0.9},  # a prompt
        "calibration error": 0.2,
        "from_errors": 0.3,
        "writes_missed": 1e-9,
    }
    assert [name for name, _ in gates(numbers)] == ["gates.nothing_patched", "attribution_max_error", "writes_missed"]


def test_every_story_names_the_next():
    for script in ROOT.glob("*.py"):
        following = next_story(script)
        if following:
            assert (ROOT / following["command"].removeprefix("uv run ")).exists() and following["question"]
