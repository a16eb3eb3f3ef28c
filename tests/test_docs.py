"""The README says what was measured: its table is made from docs/results, its pictures and commands exist."""

import importlib.util
import re
import shlex

from conftest import ROOT

SPEC = importlib.util.spec_from_file_location("make", ROOT / "docs/make.py")
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)
README = (ROOT / "README.md").read_text()


def test_the_table_is_what_docs_results_say():
    assert make.readme() == README, "run python docs/make.py table"
    assert make.readers_page() == (ROOT / "docs/readers.md").read_text(), "run python docs/make.py table"
    assert all(f"| {row[0]} |" in README for row in make.ROWS)


def test_pictures_exist_and_are_small():
    for path in re.findall(r"\]\((docs/\S+?\.png)\)", README):
        assert 5_000 < (ROOT / path).stat().st_size < 300_000, path
    assert {f"docs/{name}.png" for name in make.PICTURES} <= set(re.findall(r"\]\((\S+?)\)", README))


def test_every_flag_in_the_readme_exists(run, tmp_path):
    """--help of each script knows every flag that the README gives it."""
    commands = [
        shlex.split(line.split("#")[0].replace("`", "")) for line in README.splitlines() if line.startswith("uv run ")
    ]
    asked: dict[str, set[str]] = {}
    for words in commands:
        if script := next((word for word in words if word.endswith(".py")), None):
            asked.setdefault(script, set()).update(
                word for word in words[words.index(script) :] if word.startswith("--")
            )
    assert len(asked) >= 6
    for script, flags in asked.items():
        known = run(script, "--help", cwd=tmp_path).stdout
        assert not (wrong := [flag for flag in flags if flag.replace("--no-", "--") not in known]), (script, wrong)
