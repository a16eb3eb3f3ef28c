"""Flags, presets, sweeps: what a script does with its command line. A real Slurm is in test_slurm."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, one_line_error

import launch
from launch import flags
from train import TrainConfig
from utils import Count, Natural, Positive, Share


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


TINY = '''"""A tiny training run."""
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from train import TrainConfig, first_goes_on, train
from launch import flags

import torch as t
import torch.nn as nn


@dataclass
class Config(TrainConfig):
    steps: int = 6
    width: int = 8
    models: tuple[str, ...] = ("a",)
    tied: bool = False
    pause: float = 0.0
    autocast: str = "off"
    save_every: int = 1000
    device: str = "cpu"


if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=Config(width=64, steps=1000), sweep="models")
    if not cfg.width:
        raise ValueError("a model without width")
    t.manual_seed(cfg.seed)
    model = nn.Sequential(nn.Embedding(20, cfg.width), nn.Linear(cfg.width, 20))

    def batch(i):
        time.sleep(cfg.pause)
        return t.randint(20, (5, 16), generator=t.Generator().manual_seed(i))

    loss = train(model, batch, cfg, f"tiny_{cfg.models[0]}", width=cfg.width)["loss"]
    first_goes_on()
    for model in cfg.models:
        path = Path(f"results/tiny_{model}.json")
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            numbers = {"loss": loss[-1], "steps": len(loss), "model": model, "config": asdict(cfg)}
            path.write_text(json.dumps(numbers))
    print("models", *sorted(file.stem for file in Path("results").glob("tiny_*.json")))
'''


@dataclasses.dataclass
class Settings(TrainConfig):
    width: int = 8
    models: tuple[str, ...] = ("a",)
    tied: bool = False


def call(monkeypatch, *args: str, **more) -> Settings:
    monkeypatch.setattr(sys, "argv", ["script.py", *args])
    return flags(Settings, "A script.", hpc=Settings(width=64, compile=True), **more)


def test_the_preset_of_the_big_machine_yields_to_flags(monkeypatch):
    assert call(monkeypatch) == Settings()
    assert call(monkeypatch, "--seed", "3") == Settings(seed=3)
    assert call(monkeypatch, "--hpc") == Settings(width=64, compile=True)
    assert call(monkeypatch, "--width", "7", "--hpc") == Settings(width=7, compile=True)
    monkeypatch.setattr(sys, "argv", ["script.py", "--hpc"])
    with pytest.raises(SystemExit, match="no --hpc preset"):
        flags(Settings)


def test_a_notebook_launches_nothing(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "--slurm", "-f", "x.json"])
    assert flags(Settings, "A script.", hpc=Settings(width=64)) == Settings()


def test_help_shows_the_settings_in_groups_with_meaning_and_range(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "--hpc", "--help")
    out = capsys.readouterr().out
    headings = ["model options", "method options", "training options", "output options", "cluster options"]
    assert sorted(headings, key=out.index) == headings
    assert out.index("method options") < out.index("--width") < out.index("training options") < out.index("--steps")
    assert out.index("cluster options") < out.index("--slurm-partition")
    assert "default: 64" in out
    words = " ".join(out.replace("│", " ").split())
    assert "0 trains nothing: the untrained control" in words, "the comment beside the setting"


def test_wrong_launches_get_one_line(monkeypatch, capsys):
    for args, words in [
        (["--sweep", "sed=1,2"], "sed=1,2: write a setting"),
        (["--sweep", "seed"], "seed=0,1,2"),
        (["--slurm"], "no sbatch here"),
        (["--sweep", "seed=1,2", "seed=3"], "gives seed twice"),
        (["--sweep", "seed=1,2,1"], "gives 1 twice"),
        (["--sweep", "lr=0.01,1e-2"], "gives 1e-2 twice"),
        (["--sweep", "tied=true,1"], "gives true twice"),
        (["--sweep", "tied=maybe"], "tied is true or false"),
    ]:
        monkeypatch.setenv("PATH", "")
        with pytest.raises(SystemExit, match=words):
            call(monkeypatch, *args)
    for args, words in [
        (["--sweep", "seed=1,two"], "--seed.*'two'"),
        (["--seed", "two"], "--seed.*'two'"),
        (["--sed", "2"], "Unrecognized options: --sed, 2"),
        (["--steps"], "Missing value for argument '--steps'"),
        (["--autocast", "maybe"], "invalid choice 'maybe'"),
    ]:
        with pytest.raises(SystemExit, match=words) as end:
            call(monkeypatch, *args)
        assert "\n" not in str(end.value) and "│" not in str(end.value)
        assert not capsys.readouterr().err


def test_a_second_run_in_one_folder_is_refused_until_the_first_has_ended_even_by_a_kill(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY.replace(', sweep="models"', ""))
    command = [sys.executable, "tiny.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([*command, "--pause", "5"], env=env)
    try:
        for _ in range(300):
            if Path("results/.tiny.lock").exists():
                break
            time.sleep(0.1)
        second = subprocess.run(command, env=env, capture_output=True, text=True)
        one_line_error(second, "another run of tiny.py is at work in this folder")
    finally:
        first.kill()
        first.wait()
    subprocess.run(command, env=env, capture_output=True, check=True)


@dataclasses.dataclass
class Ranged:
    n: Count = 1
    share: Share = 0.5
    width: Positive | None = None
    places: tuple[Natural, ...] = ()
    plain: float = 0.0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--n 0", "--n is 0: it must be at least 1"),
        ("--share 1.5", "--share is 1.5: it must be at most 1"),
        ("--share -0.1", "--share is -0.1: it must be at least 0"),
        ("--width 0", "--width is 0.0: it must be above 0"),
        ("--places 3 -1", "--places is -1: it must be at least 0"),
        ("--share nan", "--share is nan: give a number"),
        ("--plain inf", "--plain is inf: give a number"),
    ],
)
def test_a_setting_outside_the_range_that_its_type_declares_gets_one_line(flags, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])
    with pytest.raises(SystemExit, match=said):
        launch.flags(Ranged)
    monkeypatch.setattr(sys, "argv", "script.py --n 3 --share 1 --width 0.1 --places 0 4 --plain -2".split())
    assert launch.flags(Ranged) == Ranged(3, 1.0, 0.1, (0, 4), -2.0)


def test_a_restarted_job_resumes(monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert call(monkeypatch).resume


def test_a_sweep_goes_on_after_a_failure_and_computes_only_what_is_missing(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)

    def run(*args):
        return subprocess.run(
            [sys.executable, "tiny.py", *args],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    done = run("--sweep", "width=8,0", "seed=1")
    (folder,) = (tmp_path / "results/tiny").glob("sweep-*")
    assert done.returncode == 1, done.stdout
    assert "width=0,seed=1 failed (exit 1); the others go on" in done.stdout, done.stdout
    assert "1 of 2 runs are done" in done.stdout, done.stdout
    numbers = json.loads((folder / "sweep.json").read_text())
    assert list(numbers) == ["width=8,seed=1"]
    assert numbers["width=8,seed=1"]["config"]["seed"] == 1
    assert numbers["width=8,seed=1"]["steps"] == 6
    kept = folder / "width=8,seed=1/results/tiny_a.json"
    kept.write_text(kept.read_text().replace('"steps": 6', '"steps": 77', 1))
    (folder / "width=0,seed=1/done").touch()  # as if it had been finished elsewhere
    again = run("--sweep", "width=8,0", "seed=1")
    assert again.returncode == 0, again.stdout
    assert "2 of 2 runs are done" in again.stdout, again.stdout
    assert "77" in again.stdout, again.stdout
    assert "===" not in again.stdout.split("\n", 1)[1], again.stdout


def tasks_of(monkeypatch, *args: str) -> dict:
    """What a sweep would run, without running it."""
    kept = {}

    def keep(tasks, launch, logs):
        kept.update(tasks)

    monkeypatch.setattr(launch, "compute", keep)
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["script.py", *args])
        flags(Paths, "A script.")
    return kept


@dataclasses.dataclass
class Paths(Settings):
    data: str = "stdlib"
    model: str | None = None
    prompt: str = "mine.txt"
    out: str = "checkpoints/model"


def last_of(args: list[str], flag: str) -> str:
    return args[len(args) - args[::-1].index(flag)]


@pytest.mark.parametrize("given", [("--data", "mine.txt"), ("--data=mine.txt",), ("--data", "./mine.txt")])
def test_a_run_elsewhere_reads_the_files_that_were_named_here(monkeypatch, tmp_path, given):
    (tmp_path / "mine.txt").write_text("text")
    (tmp_path / "mymodel").mkdir()
    for task in tasks_of(monkeypatch, *given, "--model", "mymodel", "--sweep", "seed=0,1").values():
        cfg, _ = launch.parse(task.args, Paths, Paths(), "")
        assert cfg.data == str(tmp_path / "mine.txt") and cfg.model == str(tmp_path / "mymodel")
        assert cfg.prompt == "mine.txt" and cfg.out == "checkpoints/model"


@pytest.mark.parametrize("out", ["{}/kept", "../kept", "kept"])
def test_no_two_runs_write_to_one_place(monkeypatch, tmp_path, out):
    (tmp_path / "kept").mkdir()
    tasks = tasks_of(monkeypatch, "--out", out.format(tmp_path), "--sweep", "seed=0,1")
    places = {(task.cwd / launch.parse(task.args, Paths, Paths(), "")[0].out).resolve() for task in tasks.values()}
    assert len(places) == 2 and tmp_path / "kept" not in places


def test_a_yes_or_no_is_what_its_label_says(monkeypatch):
    for name, task in tasks_of(monkeypatch, "--sweep", "tied=1,no").items():
        cfg, _ = launch.parse(task.args, Paths, Paths(), "")
        assert name == f"tied={str(cfg.tied).lower()}"


def test_other_text_or_other_code_is_another_sweep(monkeypatch, tmp_path):
    (tmp_path / "script.py").write_text("one")
    (tmp_path / "mine.txt").write_text("text")
    given = ("--data", "mine.txt", "--sweep", "seed=0")

    def folders(*given: str) -> set:
        return {task.folder for task in tasks_of(monkeypatch, *given).values()}

    first = folders(*given)
    assert folders(*given) == first
    (tmp_path / "mine.txt").write_text("other text")
    second = folders(*given)
    (tmp_path / "script.py").write_text("two")
    third = folders(*given)
    assert len(first | second | third) == 3
    axis = ("--sweep", "data=mine.txt")
    before = folders(*axis)
    (tmp_path / "mine.txt").write_text("text again")
    assert folders(*axis) != before


def test_numbers_in_dictionaries_are_shown():
    numbers = {"a": 1, "writes": {"L0": 0.5, "word": "x"}, "curve": [1, 2], "config": {"seed": 0}}
    assert launch.single_numbers(numbers) == {"a": 1, "writes L0": 0.5}


def test_a_full_disk_ends_in_one_line(capsys):
    for error in (
        OSError(28, "No space left on device", "figs/x.html"),
        RuntimeError("write: No space left on device"),
    ):
        launch.end_in_a_line(type(error), error, None)
        said = capsys.readouterr().err
        assert "No space left on device" in said and len(said.strip().splitlines()) == 1
