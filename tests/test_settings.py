"""Settings: meaning, range and group of each, read from where it is declared."""

import ast
import dataclasses
import re
from typing import Literal

import pytest
from conftest import ROOT
from settings import GROUPS, check_ranges, comments_of, gathered, group_of, grouped, in_range, meanings
from utils import Count, Positive, Share


@dataclasses.dataclass
class Parent:
    n: int = 1  # how many
    # a comment of
    # two lines
    word: str = "a # b"
    silent: float = 0.0
    long: str = "x"  # within


@dataclasses.dataclass
class Child(Parent):
    n: int = 2
    task: Literal["a", "b"] = "a"  # which
    steps: Count = 3
    shares: tuple[Share, ...] = (0.5,)


def test_a_comment_is_what_a_setting_means():
    said = meanings(Child)
    assert said["n"] == "how many", "declared anew, meaning the same"
    assert said["word"] == "a comment of two lines" and said["long"] == "within" and said["task"] == "which"
    assert "silent" not in said and "steps" not in said


def test_a_range_is_said_and_checked():
    assert [in_range(kind) for kind in (Count, Positive, Share, int)] == ["at least 1", "above 0", "from 0 to 1", ""]
    check_ranges(Child())
    for wrong, words in (({"steps": 0}, "--steps is 0: it must be at least 1"), ({"shares": (0.1, 2.0)}, "is 2.0")):
        with pytest.raises(SystemExit, match=words):
            check_ranges(Child(**wrong))
    with pytest.raises(SystemExit, match="give a number"):
        check_ranges(Child(silent=float("nan")))


def test_settings_go_into_groups_and_come_back():
    given = Child(n=7, shares=(0.1, 0.2))
    settings = grouped(given)
    assert settings.training.steps == 3 and settings.data.n == 7 and settings.method.word == "a # b"
    assert gathered(settings, Child()) == given


def test_no_setting_stands_in_two_groups():
    names = " ".join(GROUPS.values()).split()
    assert group_of("model") == "model" and group_of("unheard_of") == "method"
    assert {name for name in names if names.count(name) > 1} == set()


def fields_and_comments(name: str, kind: str) -> tuple[set[str], dict[str, str]]:
    """The settings that a class of a script declares, and those that say what they mean."""
    source = (ROOT / f"{name}.py").read_text()
    (declared,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == kind)
    lines = source.splitlines()[declared.lineno - 1 : declared.end_lineno]
    fields = {
        field.target.id
        for field in declared.body
        if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation)
    }
    return fields, comments_of("\n".join(lines))


def test_every_setting_of_every_script_says_what_it_means():
    shared = fields_and_comments("train", "TrainConfig")[1] | fields_and_comments("sae", "SAEConfig")[1]
    scripts = [path.stem for path in ROOT.glob("*.py") if re.search(r"^class Config\b", path.read_text(), re.M)]
    assert len(scripts) > 14
    for name in scripts:
        fields, said = fields_and_comments(name, "Config")
        assert not fields - said.keys() - shared.keys(), name
    for name, kind in (("train", "TrainConfig"), ("launch", "Launch")):
        fields, said = fields_and_comments(name, kind)
        assert not fields - said.keys(), name
