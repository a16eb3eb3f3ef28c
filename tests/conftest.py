import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
import utils  # noqa: E402, F401  before torch: see its first lines


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    """One folder per test process for all runs of scripts, so that the text is tokenized once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def run(workdir):
    """run('attn_only.py', '--steps', '5') -> the finished process, run in the work folder."""
    def run(script: str, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(ROOT / script), *args], cwd=cwd or workdir, capture_output=True, text=True, timeout=300)
    return run


@pytest.fixture(scope="session")
def parity():
    """parity(architecture, max |logit - Hugging Face's| / max |logit|): kept in results/parity.json."""
    path = ROOT / "results/parity.json"
    def record(architecture: str, error: float) -> None:
        path.parent.mkdir(exist_ok=True)
        with path.open("a+") as file:  # two test processes share it
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = json.loads(file.read() or "{}") | {architecture: {"max_relative_logit_error": error}}
            file.truncate(0)
            file.write(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    return record


def one_line_error(done: subprocess.CompletedProcess, *words: str) -> None:
    """Bad input is answered with one clear line and a non-zero exit, without a traceback."""
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    assert all(word in last for word in words), last
