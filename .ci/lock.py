"""Refresh uv.lock as names and versions only: `python .ci/lock.py` after `uv lock --upgrade` or `uv add`; uv fills the rest in at the next sync."""

import tomllib
from pathlib import Path

path = Path(__file__).parent.parent / "uv.lock"
lock = tomllib.loads(path.read_text())
lines = [f"version = {lock['version']}", f'requires-python = "{lock["requires-python"]}"']
for package in lock["package"]:
    own = "virtual" in package["source"]
    lines += [
        "",
        "[[package]]",
        f'name = "{package["name"]}"',
        f'version = "{package["version"]}"',
        'source = { virtual = "." }' if own else 'source = { registry = "default" }',
    ]
path.write_text("\n".join(lines) + "\n")
