"""The pages say what was measured: tables are made from docs/results; pictures, links and commands exist."""

import importlib.util
import re
import shlex

from conftest import ROOT

SPEC = importlib.util.spec_from_file_location("make", ROOT / "docs/make.py")
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "models").glob("*/README.md"))]


def test_the_table_is_what_docs_results_say():
    measured = (ROOT / "docs/measured.md").read_text()
    assert make.measured_page() == measured, "run python docs/make.py table"
    assert make.readers_page() == (ROOT / "docs/readers.md").read_text(), "run python docs/make.py table"
    assert all(f"| {row[0]} |" in measured for row in make.ROWS)


def test_pictures_exist_and_are_small():
    for path in re.findall(r"\]\((docs/\S+?\.png)\)", README):
        assert 5_000 < (ROOT / path).stat().st_size < 300_000, path
    assert {f"docs/{name}.png" for name in make.PICTURES} <= set(re.findall(r"\]\((\S+?)\)", README))


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
            path, _, heading = target.partition("#")
            aim = page.parent / path if path else page
            assert aim.exists(), (page, target)
            headings = re.findall(r"^#+ (.+)$", aim.read_text(), re.M) if heading else []
            assert not heading or heading in [re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in headings], (
                target
            )


def commands_of(page: str) -> list[list[str]]:
    """Those of code blocks, and those between backticks in tables and text."""
    lines = [line for line in page.splitlines() if line.startswith("uv run ")]
    found = lines + re.findall(r"`(uv run [^`]+)`", page)
    return [shlex.split(command.split("   #")[0].split("  # ")[0]) for command in found]


def test_every_flag_in_the_pages_exists(run, tmp_path):
    """--help of each script knows every flag that a page gives it."""
    commands = [words for page in PAGES for words in commands_of(page.read_text())]
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
