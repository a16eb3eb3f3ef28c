"""steering.py and probing.py on contrasts and labels of one's own, and what they say to those that make no sense."""

import csv
import json
from pathlib import Path

import pytest
from conftest import one_line_error
from test_zero_layer import story

SMALL = "--random 1 --strengths 1 --rows 2 --prompts 1 --written 2 --data story.txt --device cpu".split()
NAMES = (("Mary", "John"), ("Anna", "Tom"), ("Emma", "Peter"), ("Alice", "Paul"), ("Laura", "Mark"), ("Kate", "David"))


def write_csv(path: Path, rows: list[dict]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def own_contrasts(folder: Path) -> str:
    rows = []
    for woman, man in NAMES:
        rows.append({"positive": f"Then {woman} said that", "negative": f"Then {man} said that"})
    return write_csv(folder / "mine.csv", rows)


def own_labels(folder: Path) -> str:
    rows = []
    for pair in NAMES:
        for name, label in zip(pair, ("woman", "man")):
            for text in (f"Then {name} said that", f"Soon {name} left the park when"):
                start = text.index(name)
                rows.append({"text": text, "label": label, "start": start, "end": start + len(name)})
    return write_csv(folder / "labels.csv", rows)


@pytest.fixture(autouse=True)
def text(workdir):
    (workdir / "story.txt").write_text(story(12000))


def numbers_of(folder: Path, script: str) -> dict:
    return json.loads((folder / f"results/{script}.json").read_text())


def test_own_labels_give_a_direction_that_steers_own_contrasts(run, workdir, tmp_path):
    """The probe of women's names, put where the answer is due by its file, makes men's sentences go on with she."""
    done = run("probing.py", "--labels", own_labels(tmp_path), "--seeds", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    found = numbers_of(workdir, "probing")
    assert found["n_groups"] == 12 and found["n_examples"] == 24 and list(found["files"]) == ["woman"]
    words = ["--target", "she", "--other", "he"]
    flags = ["--contrasts", own_contrasts(tmp_path), "--direction", found["files"]["woman"], "--n", "3"]
    done = run("steering.py", *flags, *words, *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    steered = numbers_of(workdir, "steering")
    assert steered["best_method"] == "from the file" and steered["n"] == steered["n_held_out"] == 3
    assert steered["in_the_prompt"]["p_target"] > 0.5 > steered["by_itself"]["p_target"]


def test_a_judge_of_ones_own_reads_what_is_written(run, workdir, tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("def judge(text):\n    return float(text.startswith(' she'))\n")
    flags = ["--contrasts", own_contrasts(tmp_path), "--judge", str(judge), "--n", "3", "--held-out", "3"]
    done = run("steering.py", *flags, *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = numbers_of(workdir, "steering")
    assert numbers["measure"] == "the judge's mean"
    assert numbers["by_itself"]["p_target"] == 0 and numbers["in_the_prompt"]["p_target"] == 1


def test_contrasts_that_make_no_sense_get_one_line(run, tmp_path):
    path = own_contrasts(tmp_path)
    one_line_error(run("steering.py", "--contrasts", path, *SMALL), "what should a pushed model say?")
    same = ["--contrasts", path, "--target", "she", "--other", "she", *SMALL]
    one_line_error(run("steering.py", *same), "do not begin with tokens of their own")
    one_line_error(run("steering.py", "--positive", path), "--positive and --negative go together")
    texts = ["--positive", path, "--negative", path, "--target", "she", "--other", "he"]
    one_line_error(run("steering.py", *texts), "the same texts")
    one_line_error(run("steering.py", "--task", "country", "--country", "Atlantis"), "--country Atlantis")
    one_line_error(run("steering.py", "--strengths", "-1"), "--strengths")
    one = write_csv(tmp_path / "one.csv", [{"positive": "a b", "negative": "a c"}])
    one_line_error(run("steering.py", "--contrasts", one, "--target", "she"), "two or more are needed")


LABELS = {
    "holds no row": "text,label\n",
    "has no column label": "text,mood\na,b\n",
    "row 1 lacks label": "text,label\na,\n",
    "every example has the label 'x'": "text,label\na b,x\na c,x\n",
    "start and end go together": "text,label,start\na b,x,0\n",
    "characters 2 to 9 are no stretch of a text of 3": "text,label,start,end\na b,x,2,9\n",
    "is that of 1 groups": "text,label,group\n" + "".join(f"a {i},{'xy'[i % 2]},{'xy'[i % 2]}\n" for i in range(12)),
}


@pytest.mark.parametrize("words", LABELS)
def test_labels_that_make_no_sense_get_one_line(run, tmp_path, words):
    (tmp_path / "labels.csv").write_text(LABELS[words])
    one_line_error(run("probing.py", "--labels", str(tmp_path / "labels.csv")), words)
