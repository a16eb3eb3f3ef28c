"""
Runs side by side: which settings differ, and which numbers.
    uv run compare.py patching                              # the last run of patching.py and the one before it
    uv run compare.py results/patching.json other.json      # any result files, two or more
    uv run compare.py results/circuits/sweep-*/sweep.json   # the runs of a sweep
"""

import json
import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from utils import NotNegative, earlier_results, endc, fail, gray, green, purple, yellow
from settings import check_ranges

import tyro
from tabulate import tabulate


#%% Opening: a result file is one run, a sweep.json holds several
def read_runs(path: Path) -> dict[str, dict]:
    """{name of the run: its numbers, config and versions}"""
    if not path.is_file():
        fail(f"there is no result file {path}: name files such as results/patching.json, or a script")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"{path} is no result file: {error}")
    if not isinstance(found, dict):
        fail(f"{path} is no result file: it holds no names")
    if "config" in found:
        return {str(path): found}
    runs = {f"{path.parent}/{name}": run for name, run in found.items() if isinstance(run, dict) and "config" in run}
    if not runs:
        fail(f"{path} is no result file: no settings stand in it")
    return runs


def last_two(script: str) -> list[Path]:
    """The results of a script's last run and, first, of the one before it."""
    last = Path("results") / f"{script}.json"
    before = earlier_results(last)
    if not last.is_file():
        fail(f"there is no {last}: run {script}.py first, or name result files")
    if not before.is_file():
        fail(f"{script}.py was run once: run it again with other settings, or name two result files")
    return [before, last]


def open_runs(names: tuple[str, ...]) -> dict[str, dict]:
    if len(names) == 1 and not names[0].endswith(".json"):
        paths = last_two(names[0].removesuffix(".py"))
    else:
        paths = [Path(name) for name in names]
    runs = {name: run for path in paths for name, run in read_runs(path).items()}
    if len(runs) < 2:
        fail("that is one run: name two result files, or a script, whose last two runs are compared")
    return runs


#%% Comparing: the names whose values are not the same in all runs
def flat(numbers: dict, path: str = "") -> dict[str, object]:
    """{'gates.nothing_patched': its value}: numbers, words and lists of nested dictionaries."""
    found = {}
    for key, value in numbers.items():
        if isinstance(value, dict):
            found |= flat(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = value
    return found


def leaves(value: object) -> list:
    """What stands in lists of lists, in one list."""
    if not isinstance(value, list):
        return [value]
    return list(chain.from_iterable(leaves(part) for part in value))


def is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def far_apart(a: object, b: object, at_least: float) -> bool:
    """Numbers that differ by more than at_least of the larger; anything else that is not the same."""
    if a == b or (a != a and b != b):  # NaN is no number, and not itself
        return False
    if is_number(a) and is_number(b) and math.isfinite(a) and math.isfinite(b):
        return abs(a - b) > at_least * max(abs(a), abs(b))
    return True


def differ(a: object, b: object, at_least: float) -> bool:
    a, b = leaves(a), leaves(b)
    return len(a) != len(b) or any(far_apart(x, y, at_least) for x, y in zip(a, b))


def against(first: object, other: object) -> object:
    """How a value is shown beside the first run's: itself; of a list, how far it lies from that."""
    if not isinstance(other, list):
        return other
    if not isinstance(first, list):
        return f"{len(leaves(other))} values"
    here, there = leaves(first), leaves(other)
    if len(here) != len(there):
        return f"{len(there)} values"
    distances = [abs(x - y) for x, y in zip(here, there) if is_number(x) and is_number(y)]
    if len(distances) == len(here):
        return f"at most {max(distances, default=0):.3g} away"
    return f"{sum(x != y for x, y in zip(here, there))} of {len(here)} are others"


def table_of(columns: list[dict], at_least: float = 0.0) -> tuple[list[list], int]:
    """(rows [name, value in each run] of what is not the same in all, how many are)"""
    rows = []
    names = dict.fromkeys(chain.from_iterable(columns))
    for name in names:
        first, *others = [column.get(name, "") for column in columns]
        if any(differ(first, other, at_least) for other in others):
            shown = f"{len(leaves(first))} values" if isinstance(first, list) else first
            rows.append([name, shown, *(against(first, other) for other in others)])
    return rows, len(names) - len(rows)


#%% Settings of the comparison
@dataclass
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]]  # a script's name, or result files
    at_least: NotNegative = 0.0  # numbers that differ by less, as a share of the larger, count as equal


def print_table(rows: list[list], names: list[str]) -> None:
    shown = [[f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows]
    print(tabulate(shown, headers=["", *names], disable_numparse=True))


if __name__ == "__main__":
    cfg = tyro.cli(Config, description=__doc__)
    check_ranges(cfg)
    runs = open_runs(cfg.runs)
    configs = [flat(run["config"]) for run in runs.values()]
    versions = [flat(run.get("versions", {})) for run in runs.values()]
    numbers = [flat({k: v for k, v in run.items() if k not in ("config", "versions")}) for run in runs.values()]
    names = [f"run {i + 1}" for i in range(len(runs))]

#%% What was set otherwise
if __name__ == "__main__":
    for name, path in zip(names, runs):
        print(f"{gray}{name}: {path}{endc}")
    settings, n_same_settings = table_of(configs)
    packages, _ = table_of(versions)
    if settings or packages:
        print(f"{purple}=== Settings and versions that differ ==={endc}")
        print_table([*settings, *packages], names)
    else:
        print(f"{yellow}all settings and versions are the same{endc}")

#%% What came out otherwise
if __name__ == "__main__":
    rows, n_same = table_of(numbers, cfg.at_least)
    if rows:
        print(f"{purple}=== Numbers that differ ==={endc}")
        print_table(rows, names)
    print(f"{green}{len(rows)} numbers differ, {n_same} are the same; {n_same_settings} settings are the same.{endc}")
