"""Launching: flags with a preset for big machines, sweeps, Slurm through submitit."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from utils import (  # first: sets OpenMP's variables before torch is loaded
    endc,
    fail,
    gray,
    green,
    in_kernel,
    purple,
    red,
    write_aside,
    yellow,
)
from settings import check_ranges, gathered, grouped
from report import finish_report, record
from train import FREE, TrainConfig, check_settings, in_queue, processes, start_wandb

from tabulate import tabulate


#%% Flags: a dataclass of settings from the command line
@dataclass
class Launch:
    hpc: bool = False  # start from the preset for an A100 with 40 GB; flags given still win
    open: bool = False  # open the run's report in a browser when it is done
    # seed=0,1,2 n_layers=1,2: one run for each value or combination, in a folder of its own; the same command again
    # runs what is missing and shows all
    sweep: tuple[str, ...] = ()
    # submit to Slurm instead of running here, a sweep as one job array; prints job id and log, and returns
    slurm: bool = False
    slurm_wait: bool = False  # submit, follow the log, and exit with the job's status
    slurm_partition: str | None = None  # queue to submit to; default the cluster's own
    slurm_account: str | None = None  # account that is charged
    slurm_constraint: str | None = None  # feature that a node must have, as a100
    slurm_nodes: int = 1  # nodes of a job
    slurm_gpus: int = 1  # per node, with a process for each; 0 is one process without
    slurm_cpus: int = 8  # per process
    slurm_mem: int | None = None  # GB per node
    slurm_time: int = 240  # minutes; before they are over the run is saved, requeued and resumed
    slurm_parallel: int = 16  # tasks of an array at a time


@dataclass
class Task:
    """One run of a script. submitit pickles it and calls it in the job; after a signal it is called again."""

    script: str
    args: list[str]
    cwd: Path  # where it runs
    folder: Path  # where it leaves `done`

    def __call__(self) -> None:
        os.chdir(self.cwd)
        sys.argv = [self.script, *self.args]
        try:
            runpy.run_path(self.script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        finally:
            finish_report()
        if int(os.environ.get("SLURM_PROCID", 0)) == 0:
            (self.folder / "done").touch()

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def flags[Config](
    config: type[Config],
    description: str = "",
    hpc: Config | None = None,
    sweep: str | None = None,
    shares_results: bool = True,
) -> Config:
    """
    A dataclass of settings from the command line: one --flag per field, and Launch's; in a notebook, its defaults.
    hpc: the preset of --hpc. sweep: a tuple field (models ...) that --slurm makes an array of, for a script that skips
    finished values and gathers them by itself, so that several of its runs may share a folder; of any other script
    (shares_results) a second run in the folder is refused, since it would write over the first's.
    """
    if in_kernel():
        return config()
    sys.excepthook = end_in_a_line
    argv = sys.argv[1:]
    script = Path(sys.argv[0]).resolve()
    if "--hpc" in argv and hpc is None:
        fail(f"{script.name} has no --hpc preset")
    defaults = hpc if "--hpc" in argv else config()
    cfg, launch = parse(argv, config, defaults, description)
    check_ranges(cfg)
    check_settings(cfg)
    launch.slurm |= launch.slurm_wait
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) and hasattr(cfg, "resume"):
        cfg = dataclasses.replace(cfg, resume=True)
    # an array over the script's own tuple of values, which it gathers by itself
    own = bool(launch.slurm and sweep and not launch.sweep and len(getattr(cfg, sweep)) > 1)
    axes = {sweep: [str(x) for x in getattr(cfg, sweep)]} if own else read_sweep(launch.sweep, cfg)
    if not axes and not launch.slurm:
        rank, _ = processes()
        if shares_results and sweep is None and rank == 0:
            refuse_a_second_run(script.stem)
        if getattr(cfg, "wandb", False) and rank == 0 and not isinstance(cfg, TrainConfig):  # train() starts its own
            start_wandb(script.stem, dataclasses.asdict(cfg))
        if shares_results and rank == 0 and script.is_file():
            record(script, cfg, defaults, launch.open)
        return cfg

    results = Path("results").absolute() / script.stem
    place = results / f"{'sweep' if axes else 'run'}-{settings_key(cfg, axes, script)}"
    tasks = {}
    for name, args in sweep_runs(cfg, axes, argv, script.stem).items():
        run_cfg, _ = parse(args, config, defaults, description)
        check_ranges(run_cfg)  # refuses a wrong value now
        check_settings(run_cfg)
        tasks[name] = make_task(name, args, run_cfg, axes, script, place, elsewhere=bool(axes) and not own)
    if axes:
        print(f"{purple}=== {len(tasks)} runs of {script.name}, kept in {place} ==={endc}")
    before = finished(tasks) if axes else {}
    missing = {name: task for name, task in tasks.items() if name not in before}
    failed = compute(missing, launch, results / "slurm")
    if launch.slurm and not launch.slurm_wait and failed is not None:
        raise SystemExit(0)
    done = finished(tasks)
    if axes:
        print(f"{green if len(done) == len(tasks) else yellow}{len(done)} of {len(tasks)} runs are done{endc}")
    if own and len(done) == len(tasks):
        record(script, cfg, defaults, launch.open)
        return cfg
    if axes and done and not own:
        gather(done, place)
    raise SystemExit(1 if failed else 0)


def refuse_a_second_run(script: str) -> None:
    """
    Two runs of one script in one folder would write over each other's numbers, figures and checkpoints. The lock is
    this process's and ends with it, however it ends.
    """
    if os.name != "posix":  # Windows has no such lock
        return
    import fcntl

    path = Path("results") / f".{script}.lock"
    try:
        path.parent.mkdir(exist_ok=True)
        lock = os.open(path, os.O_CREAT | os.O_WRONLY)  # never closed: that would give the lock away
    except OSError as error:
        fail(f"no results can be written here ({path}: {error.strerror}): start in a folder that is yours")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(
            f"another run of {script}.py is at work in this folder, and both would write results/{script}.json: wait "
            "for it, start this one in another folder, or run both by --sweep"
        )
    except OSError:  # a file system without locks (some of clusters): two runs at once are the user's to avoid
        return


def parse[Config](args: list[str], config: type[Config], defaults: Config, description: str) -> tuple[Config, Launch]:
    import tyro

    launch = Launch()
    both = grouped(defaults, launch)
    args = spell_out_choices(args, config)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(tyro.conf.OmitArgPrefixes[type(both)], args=args, description=description, default=both)
    except SystemExit as end:
        if end.code:
            fail(f"{what_the_box_says(said.getvalue())} (--help lists the settings)")
        raise
    return gathered(parsed, defaults), gathered(parsed, launch)


def what_the_box_says(box: str) -> str:
    """
    What tyro draws in a box (or, where the terminal has no such letters, between rules) as one line: its first part,
    and the flag that it thinks was meant.
    """
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]  # the first is a title
    parts = "\n".join("" if set(line) <= set("─-╰╯") else line for line in lines).strip().split("\n\n")
    said = " ".join(parts[0].splitlines())
    if "Perhaps you meant:" in lines:
        flag = lines[lines.index("Perhaps you meant:") + 1].split()[0]
        said += f"; perhaps you meant {flag}"
    return said


def spell_out_choices(args: list[str], config: type) -> list[str]:
    """--bos and --no-bos for a field that is True, False or, where neither is given, None; tyro wants --bos True."""
    spelled = []
    undecided = {field.name.replace("_", "-") for field in dataclasses.fields(config) if field.type == bool | None}
    for arg, following in zip(args, [*args[1:], ""]):
        name = arg.removeprefix("--")
        if name in undecided and arg != name and following not in ("True", "False", "None"):
            spelled += [arg, "True"]
        elif name.removeprefix("no-") in undecided and name.startswith("no-"):
            spelled += [f"--{name.removeprefix('no-')}", "False"]
        else:
            spelled.append(arg)
    return spelled


def settings_key(cfg: object, axes: dict[str, list[str]], script: Path) -> str:
    """Names a sweep by what all its runs share: the settings, the files that these name, and the code."""
    fixed = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in (*axes, *FREE)}
    read = [fingerprint(path) for name in READS if name not in axes for path in named_paths(cfg, name)]
    code = [fingerprint(path) for path in sorted({script, *Path(__file__).parent.glob("*.py")}) if path.exists()]
    return short_hash([fixed, sorted(axes), read, code])


# settings that may name files to read
READS = (
    *("data", "model", "models", "base", "tokenizer", "others", "pairs", "sae", "transcoders"),
    *("labels", "contrasts", "positive", "negative", "judge", "direction"),
)
WRITES = ("out", "export")  # and files to write
OWN_WORDS = ("stdlib", "world")  # texts that are not files, even where a file has this name
WHOLE = 2**26  # bytes up to which a file is known by its content, above by size and time


def short_hash(x: object) -> str:
    return hashlib.sha256(json.dumps(x, default=str).encode()).hexdigest()[:8]


def named_paths(cfg: object, name: str) -> list[Path]:
    """The files and folders here that a setting names, absolute; none where it names anything else (a hub model)."""
    value = getattr(cfg, name, None)
    words = value if isinstance(value, tuple) else (value,)
    paths = [Path(word).expanduser().absolute() for word in words if word and word not in OWN_WORDS]
    return [path for path in paths if path.exists()]


def fingerprint(path: Path) -> list:
    """Changes when the file, or one in the folder, does."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = []
    for file in files:
        stat = file.stat()
        known = stat.st_mtime_ns
        if stat.st_size <= WHOLE:
            known = hashlib.sha256(file.read_bytes()).hexdigest()
        found.append([file.name, stat.st_size, known])
    return found


def sweep_runs(cfg: object, axes: dict[str, list[str]], argv: list[str], stem: str) -> dict[str, list[str]]:
    """{name of the run: its arguments}, one for each combination of values."""
    runs = {}
    for values in itertools.product(*axes.values()):
        name = ",".join(f"{field}={value}" for field, value in zip(axes, values)) or stem
        words = [word for field, value in zip(axes, values) for word in as_flag(cfg, field, value)]
        runs[name] = [*argv, *words, "--sweep", "--no-slurm", "--no-slurm-wait"]  # the last of a flag's values holds
    return runs


def make_task(
    name: str,
    args: list[str],
    cfg: object,
    axes: dict[str, list[str]],
    script: Path,
    place: Path,
    elsewhere: bool,
) -> Task:
    """elsewhere: the run works in its own folder, where it also writes; paths that it reads must be absolute."""
    read = [fingerprint(path) for axis in axes if axis in READS for path in named_paths(cfg, axis)]
    folder = place / name.replace("/", "-")
    if read or "/" in name:
        folder = place / f"{name.replace('/', '-')}-{short_hash([name, read])}"
    if not elsewhere:
        return Task(str(script), args, Path.cwd(), folder)
    return Task(str(script), [*args, *own_paths(cfg, name)], folder, folder)


def own_paths(cfg: object, run: str) -> list[str]:
    """Flags, to stand after all others, that make a run in another folder read what was named and write only there."""
    flags_of_paths = []
    for name in READS:
        paths = named_paths(cfg, name)
        if not paths:
            continue
        value = getattr(cfg, name)
        words = value if isinstance(value, tuple) else (value,)
        words = [
            str(Path(word).expanduser().absolute()) if Path(word).expanduser().exists() else word for word in words
        ]
        flags_of_paths += [f"--{name}", *words]
    for name in WRITES:
        value = getattr(cfg, name, None)
        if value and (Path(value).expanduser().is_absolute() or ".." in Path(value).parts):
            flags_of_paths += [f"--{name}", str(Path(value).expanduser().resolve() / run.replace("/", "-"))]
    return flags_of_paths


def finished(tasks: dict[str, Task]) -> dict[str, Task]:
    return {name: task for name, task in tasks.items() if (task.folder / "done").exists()}


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def says_disk(error: BaseException) -> bool:
    """A full or read-only disk, by its number or, from libraries that have none, by its words."""
    if isinstance(error, OSError) and error.errno in DISK:
        return True
    return any(os.strerror(number) in str(error) for number in DISK)


def end_in_a_line(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Ctrl-C, a full disk: files are written aside, so none is half there, and nobody wants the frames."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"\n{yellow}stopped by Ctrl-C; what is named above as written is whole{endc}", file=sys.stderr)
    elif says_disk(error):
        reason = str(error).strip().splitlines()[0]
        print(f"{red}nothing more can be written here ({reason}); what is named above is whole{endc}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def read_sweep(given: tuple[str, ...], cfg: object) -> dict[str, list[str]]:
    """(seed=0,1 ...) -> {seed: [0, 1]}"""
    axes = {}
    for part in given:
        name, _, values = part.partition("=")
        name = name.replace("-", "_")
        if not hasattr(cfg, name) or not values:
            settings = ", ".join(field.name for field in dataclasses.fields(cfg))
            fail(
                f"--sweep {name}={values}: write a setting and its values, as in --sweep seed=0,1,2; "
                f"settings: {settings}"
            )
        if name in axes:
            fail(f"--sweep gives {name} twice: write all its values in one, as in --sweep {name}={values}")
        given_values = [spelled(cfg, name, value) for value in values.split(",")]
        same = [as_number(value) for value in given_values]
        twice = [value for i, value in enumerate(given_values) if same[i] in same[:i]]
        if twice:
            fail(f"--sweep {name}={values} gives {twice[0]} twice: each value is one run")
        axes[name] = given_values
    return axes


def as_number(value: str) -> float | str:
    """The number that the words say, since 0.01 and 1e-2 are one run; or the words."""
    try:
        return float(value)
    except ValueError:
        return value


def is_yes_or_no(cfg: object, name: str) -> bool:
    (kind,) = (field.type for field in dataclasses.fields(cfg) if field.name == name)
    return kind == bool | None or isinstance(getattr(cfg, name), bool)


def spelled(cfg: object, name: str, value: str) -> str:
    """A value of an axis as its label and its flag say it: yes and no are true and false."""
    if not is_yes_or_no(cfg, name):
        return value
    if value.lower() in ("true", "yes", "on", "1"):
        return "true"
    if value.lower() in ("false", "no", "off", "0"):
        return "false"
    fail(f"--sweep {name}={value}: {name} is true or false")


def as_flag(cfg: object, name: str, value: str) -> list[str]:
    flag = name.replace("_", "-")
    if is_yes_or_no(cfg, name):
        return [f"--{flag}" if value == "true" else f"--no-{flag}"]
    return [f"--{flag}", value]


#%% Sweeps and Slurm
def compute(tasks: dict[str, Task], launch: Launch, logs: Path) -> list[str] | None:
    """
    Runs or submits the tasks that are not in the queue already.
    The names of those that failed; None if there was nothing to do.
    """
    missing = {name: task for name, task in tasks.items() if not still_queued(name, task)}
    for task in missing.values():
        prepare(task)
    if not tasks:
        return None
    if not launch.slurm:
        return run_here(missing)
    if missing:
        submit(missing, launch, logs)
    return follow(tasks) if launch.slurm_wait else []


def still_queued(name: str, task: Task) -> bool:
    """Says where a submitted task stands; of one that left the queue undone, how its log ends."""
    job, log = ticket(task)
    if not job:
        return False
    state = in_queue(job)
    if state:
        print(f"{gray}{name}: job {job} is {state}, log {log}{endc}")
        return True
    if not (task.folder / "done").exists():
        show_end(name, log)
    return False


def prepare(task: Task) -> None:
    """A folder for the task; one that works in a folder of its own shares the tokenized text."""
    task.folder.mkdir(parents=True, exist_ok=True)
    (task.folder / "done").unlink(missing_ok=True)
    link = task.folder / "checkpoints/data"
    if task.cwd == task.folder:
        cache = Path("checkpoints/data").absolute()
        cache.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(cache)


def run_here(tasks: dict[str, Task]) -> list[str]:
    """One after the other; the names of those that failed."""
    failed = []
    for name, task in tasks.items():
        print(f"{purple}=== {name} ==={endc}", flush=True)
        code = subprocess.run([sys.executable, task.script, *task.args], cwd=task.cwd).returncode
        if code == 0:
            (task.folder / "done").touch()
        else:
            failed.append(name)
            print(f"{red}{name} failed (exit {code}); the others go on{endc}")
    return failed


def submit(tasks: dict[str, Task], launch: Launch, logs: Path) -> None:
    """One job, or one array with a task for each."""
    if not shutil.which("sbatch"):
        fail("--slurm: there is no sbatch here: run this on a login node of the cluster, or leave --slurm out")
    import submitit

    repo = Path(__file__).parent
    executor = submitit.SlurmExecutor(logs, max_num_timeout=10**6)
    asked = {
        "partition": launch.slurm_partition,
        "account": launch.slurm_account,
        "constraint": launch.slurm_constraint,
        "mem": launch.slurm_mem and f"{launch.slurm_mem}GB",
        "gpus_per_node": launch.slurm_gpus or None,
    }
    executor.update_parameters(
        job_name=logs.parent.name,
        time=launch.slurm_time,
        nodes=launch.slurm_nodes,
        ntasks_per_node=max(1, launch.slurm_gpus),
        cpus_per_task=launch.slurm_cpus,
        array_parallelism=launch.slurm_parallel,
        signal_delay_s=120,
        stderr_to_stdout=True,
        setup=[f"export PYTHONPATH={shlex.quote(str(repo))}:$PYTHONPATH"],
        srun_args=["--kill-on-bad-exit=1"],
        additional_parameters={"requeue": True},
        **{name: value for name, value in asked.items() if value is not None},
    )
    try:
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks.values()]
    except submitit.core.utils.FailedJobError as error:
        fail(f"sbatch refused the job: {str(error).strip().splitlines()[-1]}")
    for (name, task), job in zip(tasks.items(), jobs):
        (task.folder / "job").write_text(f"{job.job_id}\n{job.paths.stdout}\n")
        print(f"{green}{name}: job {job.job_id}, log {job.paths.stdout}{endc}")


def ticket(task: Task) -> tuple[str, str]:
    """Job id and log of its last submission."""
    path = task.folder / "job"
    return tuple(path.read_text().splitlines()) if path.exists() else ("", "")


def show_end(name: str, log: str | Path) -> None:
    lines = Path(log).read_text().splitlines()[-8:] if Path(log).exists() else ["(no log was written)"]
    print(f"{red}{name} failed; its log {log} ends:{endc}", *lines, sep="\n")


def follow(tasks: dict[str, Task]) -> list[str]:
    """
    Wait for the jobs of tasks, print the log of a single one as it grows and the last lines of those that fail; the
    names of these.
    """
    states = dict.fromkeys(tasks, "new")
    characters_read = 0
    while any(states.values()):
        time.sleep(1)
        for name, task in tasks.items():
            if not states[name]:
                continue
            job, log = ticket(task)
            state = in_queue(job)
            if state and state != states[name]:
                print(f"{gray}{name}: {state}{endc}", flush=True)
            states[name] = state
            if len(tasks) == 1 and Path(log).exists():
                new = Path(log).read_text()[characters_read:]
                print(new, end="", flush=True)
                characters_read += len(new)
            if not state:
                say_how_it_ended(name, task)
    done = finished(tasks)
    return [name for name in tasks if name not in done]


def say_how_it_ended(name: str, task: Task) -> None:
    time.sleep(1)  # for a network file system
    job, log = ticket(task)
    if (task.folder / "done").exists():
        print(f"{green}{name}: job {job} is done{endc}")
    else:
        show_end(name, log)


def single_numbers(numbers: dict, before: str = "") -> dict[str, float]:
    """The numbers by themselves, those in dictionaries too ('layer_writes L0'); lists, settings and words are left out."""
    found = {}
    for key, value in numbers.items():
        if not before and key in ("config", "versions"):
            continue
        if isinstance(value, dict):
            found |= single_numbers(value, f"{before}{key} ")
        elif isinstance(value, int | float):
            found[before + key] = value
    return found


def gather(done: dict[str, Task], place: Path) -> None:
    """The single numbers of all runs as a table, and everything they wrote in sweep.json."""
    found: dict[str, dict] = {}
    for name, task in done.items():
        found[name] = {}
        for file in sorted((task.cwd / "results").glob("*.json")):
            found[name] |= json.loads(file.read_text())
    by_run = {name: single_numbers(numbers) for name, numbers in found.items()}
    keys = dict.fromkeys(key for numbers in by_run.values() for key in numbers)
    table = []
    for key in keys:
        table.append([key, *(numbers.get(key) for numbers in by_run.values())])
    print(tabulate(table, headers=["", *found], floatfmt=".4g"))
    write_aside(place / "sweep.json", lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))
    print(f"{gray}numbers: {place / 'sweep.json'}{endc}")
