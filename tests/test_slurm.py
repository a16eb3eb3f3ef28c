"""Against a real Slurm: one node on loopback, started here and stopped at the end. Needs root and Debian's slurm-wlm and munge (.ci/run installs them)."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch as t
from test_launch import TINY

from launch import flags

pytestmark = pytest.mark.slurm
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={tmp}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
GresTypes=gpu
StateSaveLocation={tmp}/state
SlurmdSpoolDir={tmp}/spool
SlurmctldPidFile={tmp}/slurmctld.pid
SlurmdPidFile={tmp}/slurmd.pid
SlurmctldLogFile={tmp}/slurmctld.log
SlurmdLogFile={tmp}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Boards=1 Gres=gpu:2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=9
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd runs jobs as their users: needs root")
    tmp = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().split(".")[0]
    (tmp / "slurm.conf").write_text(CONF.format(tmp=tmp, host=host, ports=(free_port(), free_port()), cpus=4))
    (tmp / "gres.conf").write_text(
        f"Name=gpu File={tmp}/gpu[0-1]\n"
    )  # two pretended GPUs, so that two processes are asked for as on a real node
    for i in range(2):
        (tmp / f"gpu{i}").touch()
    (tmp / "munge.key").write_bytes(os.urandom(128))
    for name in ("state", "spool"):
        (tmp / name).mkdir()
    (tmp / "munge.key").chmod(0o400)
    env = {**os.environ, "SLURM_CONF": str(tmp / "slurm.conf")}
    daemons = []

    def start(*command: str) -> None:
        daemons.append(
            subprocess.Popen(command, stdout=(tmp / "daemons.log").open("a"), stderr=subprocess.STDOUT, env=env)
        )

    try:
        start(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={tmp}/munge.key",
            f"--socket={tmp}/munge.socket",
            f"--pid-file={tmp}/munged.pid",
            f"--log-file={tmp}/munged.log",
            f"--seed-file={tmp}/munged.seed",
        )
        until(lambda: (tmp / "munge.socket").exists(), "munged is up")
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D", "-N", host)
        os.environ |= {"SLURM_CONF": env["SLURM_CONF"], "GLOO_SOCKET_IFNAME": "lo"}
        until(lambda: ask("sinfo", "--noheader", "--format", "%T") == "idle", "the node is idle")
        (tmp / "work").mkdir()
        (tmp / "work/tiny.py").write_text(TINY)
        yield tmp / "work"
    except TimeoutError as late:
        raise AssertionError((tmp / "daemons.log").read_text()) from late
    finally:
        if "SLURM_CONF" in os.environ:
            ask("scancel", "--user=root")
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for name in ("SLURM_CONF", "GLOO_SOCKET_IFNAME"):
            os.environ.pop(name, None)


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def until(true, what: str, seconds: int = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.2)


@pytest.fixture
def call(cluster, monkeypatch, capsys):
    """call('--slurm', ...) -> (exit code or settings, what was printed) of tiny.py's first line, in this process."""
    monkeypatch.chdir(cluster)
    monkeypatch.syspath_prepend(cluster)

    def call(*args: str):
        import tiny

        monkeypatch.setattr(
            sys,
            "argv",
            [str(cluster / "tiny.py"), *args, "--slurm-gpus", "0", "--slurm-cpus", "1"]
            if "--slurm-gpus" not in args
            else [str(cluster / "tiny.py"), *args],
        )
        try:
            end = flags(tiny.Config, sweep="models")
        except SystemExit as exit:
            end = exit.code
        return end, capsys.readouterr().out

    return call


def job_and_log(out: str) -> tuple[str, Path]:
    job, log = re.search(r"job (\S+), log (\S+?)\x1b", out).groups()
    return job, Path(log)


def text(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def alone(folder: Path, monkeypatch, *args: str) -> dict:
    """The result of the same run, neither submitted nor interrupted."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(folder.parent / "tiny.py"), *args])
    runpy.run_path(sys.argv[0], run_name="__main__")
    return json.loads((folder / "results/tiny_a.json").read_text())


LONG = ("--steps", "60", "--pause", "0.1", "--save-every", "0")


def test_jobs_that_are_preempted_cancelled_and_failing(call, cluster, monkeypatch):
    """Side by side, since every job takes seconds to import torch: one requeued, one cancelled, an array with a failing task, an array of the script's own, one on two processes."""
    other = cluster / "other"
    other.mkdir()
    end, out = call(*LONG, "--slurm")
    requeued, log = job_and_log(out)
    monkeypatch.chdir(other)
    _, out = call(*LONG, "--slurm")
    cancelled, cancelled_log = job_and_log(out)
    monkeypatch.chdir(cluster)
    assert end == 0
    assert requeued != cancelled
    assert log.is_relative_to(cluster / "results/tiny/slurm")
    end, out = call("--models", "b", "c", "--slurm")
    own = re.findall(r"models=(.): job (\d+_\d)", out)
    assert end == 0
    assert [name for name, _ in own] == ["b", "c"]
    end, out = call("--models", "b", "c", "--slurm")
    # not submitted again
    assert end == 0
    assert out.count(": job") == 2
    assert all(f"job {job} is " in out for _, job in own)

    until(lambda: "loss" in text(log), "the first job trains")
    ask("scancel", "--signal=USR2", requeued)  # as Slurm does before the time limit
    until(
        lambda: (
            f"job {requeued} goes back to the queue" in text(log)
            and ask("squeue", "-h", "-j", requeued, "-o", "%T") == "PENDING"
        ),
        "it is requeued",
    )
    ask("scontrol", "update", f"jobid={requeued}", "StartTime=now")  # Slurm would wait for two minutes
    until(lambda: "loss" in text(cancelled_log), "the second job trains")
    ask("scancel", cancelled)
    until(lambda: not ask("squeue", "-h", "-j", cancelled), "it is gone")
    assert "SIGTERM: saved" in text(cancelled_log)
    assert "go on with --resume" in text(cancelled_log)
    assert 0 < t.load(other / "checkpoints/tiny_a.pt")["step"] < 60

    end, out = call("--sweep", "width=8,0,4", "--slurm-wait")
    assert end == 1
    assert "2 of 3 runs are done" in out
    assert "width=0 failed; its log" in out
    assert "ValueError: a model without width" in out
    assert "width=8: job" in out
    end, out = call("--sweep", "width=8,4", "--slurm-wait")  # nothing is missing: no job
    assert end == 0
    assert "2 of 2 runs are done" in out
    assert ": job" not in out
    assert re.search(r"loss +3\.\d+ +3\.\d+", out)

    end, out = call("--models", "d", "--slurm-wait", "--slurm-gpus", "2", "--slurm-cpus", "1")
    # the first process alone prints
    assert end == 0, out
    assert out.count("models tiny_") == 1, out
    assert "is done" in out, out
    until(lambda: not ask("squeue", "-h", "-u", "root"), "all are done")
    end, out = call("--models", "b", "c", "--slurm")
    # the script goes on and gathers
    assert end.models == ("b", "c")
    assert "2 of 2 runs are done" in out
    results = {name: json.loads((cluster / f"results/tiny_{name}.json").read_text()) for name in "abcd"}
    assert results["b"]["loss"] == results["c"]["loss"] == pytest.approx(results["d"]["loss"], abs=1e-5)

    assert re.search(r"resumed checkpoints/tiny_a.pt at step \d+ of 60", text(log))
    assert results["a"]["loss"] == alone(cluster / "alone", monkeypatch, *LONG)["loss"]
    assert results["a"]["steps"] == 60


def test_a_job_that_slurm_preempts_saves_gives_way_and_resumes(call, cluster, monkeypatch):
    """A job of a partition with priority wants the whole node: Slurm warns with SIGTERM, and would kill after the grace time."""
    home = cluster / "preempted"
    home.mkdir()
    monkeypatch.chdir(home)
    job, log = job_and_log(call(*LONG, "--slurm")[1])
    until(lambda: "loss" in text(log), "the job trains")
    urgent = ask("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2")
    until(lambda: "SIGTERM: saved checkpoints/tiny_a.pt" in text(log), "it saves")
    until(lambda: ask("squeue", "-h", "-j", job, "-o", "%T") == "PENDING", "it is back in the queue")
    assert 0 < t.load(home / "checkpoints/tiny_a.pt")["step"] < 60
    assert urgent
    until(lambda: not ask("squeue", "-h", "-j", urgent), "the urgent job is done")
    ask("scontrol", "update", f"jobid={job}", "StartTime=now")
    until(lambda: not ask("squeue", "-h", "-j", job), "it is done")
    assert re.search(r"resumed checkpoints/tiny_a.pt at step \d+ of 60", text(log)), text(log)
    assert (
        json.loads((home / "results/tiny_a.json").read_text())["loss"]
        == alone(cluster / "alone2", monkeypatch, *LONG)["loss"]
    )


def test_sbatch_refusals_are_one_line(call):
    end, _ = call("--slurm", "--slurm-partition", "nowhere")
    assert "sbatch refused the job" in end
    assert "partition" in end
