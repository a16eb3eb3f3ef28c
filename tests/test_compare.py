"""compare.py, as a user calls it: runs made here, whose differences are known."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT

import utils
from compare import differ, table_of


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass
class Settings:
    seed: int = 0
    steps: int = 10


def compare(*words):
    ran = subprocess.run([sys.executable, ROOT / "compare.py", *words], capture_output=True, text=True, timeout=100)
    return ran.returncode, ran.stdout + ran.stderr


def test_the_last_run_against_the_one_before(folder, monkeypatch):
    numbers = {"loss": 1.5, "gates": {"error": 1e-7}, "curve": [1.0, 2.0], "same": 3, "named": "a"}
    utils.save_results("story", Settings(), **numbers)
    code, said = compare("story")
    assert code == 1 and "was run once" in said and len(said.splitlines()) == 1
    monkeypatch.setattr(utils, "WRITTEN", set())  # as in a process that follows at once
    utils.save_results("story", Settings(seed=4), **numbers | {"loss": 1.25, "curve": [1.0, 2.5], "named": "b"})
    assert json.loads((folder / "results/earlier/story.json").read_text())["loss"] == 1.5
    code, said = compare("story")
    assert code == 0
    rows = [line.split() for line in said.splitlines()]
    assert ["seed", "0", "4"] in rows and ["loss", "1.5", "1.25"] in rows and ["named", "a", "b"] in rows
    assert "curve  2 values  at most 0.5 away" in said
    assert "3 numbers differ, 2 are the same; 1 settings are the same." in said
    code, said = compare("story", "--at-least", "0.3")  # loss differs by a sixth, the curve's end by a fifth
    assert "1 numbers differ, 4 are the same" in said


def test_a_run_that_saves_twice_does_not_set_its_own_numbers_aside(folder):
    utils.save_results("twice", Settings(), loss=1.0)
    utils.save_results("twice", Settings(), loss=2.0)
    assert not os.path.exists("results/earlier/twice.json")


def test_the_runs_of_a_sweep(folder):
    runs = {f"seed={seed}": {"loss": 1.0 + seed, "config": {"seed": seed}} for seed in range(3)}
    (folder / "sweep.json").write_text(json.dumps(runs))
    code, said = compare("sweep.json")
    assert code == 0
    assert ["loss", "1", "2", "3"] in [line.split() for line in said.splitlines()]


@pytest.mark.parametrize(
    "words, why",
    [
        (["a.json", "b.json"], "there is no result file a.json"),
        (["nothing"], "run nothing.py first"),
        (["text.json", "text.json"], "is no result file"),
        (["list.json", "list.json"], "is no result file"),
        ([], "name"),
    ],
)
def test_what_is_no_result_is_one_line(words, why, folder):
    (folder / "text.json").write_text("no json")
    (folder / "list.json").write_text("[1, 2]")
    code, said = compare(*words)
    assert code == 1 and why in said and len(said.splitlines()) == 1


def test_what_is_not_in_both_differs():
    rows, same = table_of([{"a": 1, "b": 2}, {"a": 1}])
    assert rows == [["b", 2, ""]] and same == 1
    assert differ(100_000, 100_001, 0.0)
    assert differ([1.0, None], [1.0, 0.0], 0.5) and not differ([1.0, None], [1.0, None], 0.0)
    nan, inf = float("nan"), float("inf")
    assert differ(nan, 0.5, 0.1) and differ(1.0, inf, 0.1) and not differ(nan, nan, 0.0) and not differ(inf, inf, 0.0)
    assert differ(True, 1.5, 1.0)


def test_large_numbers_that_differ_are_shown_as_different(folder):
    for name, steps in (("a", 100_000), ("b", 100_001)):
        (folder / f"{name}.json").write_text(json.dumps({"loss": 1.5, "config": {"steps": steps}}))
    code, said = compare("a.json", "b.json")
    assert code == 0 and ["steps", "100000", "100001"] in [line.split() for line in said.splitlines()]
