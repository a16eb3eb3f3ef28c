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
import torch as t  # noqa: E402
from data import train_bpe  # noqa: E402


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


def tiny_hf(architecture: str, **config):
    """A transformers model with weights large enough that a wrong formula shows: default initialisation hides bugs."""
    import transformers
    t.manual_seed(0)
    hf = getattr(transformers, f"{architecture}ForCausalLM")(getattr(transformers, f"{architecture}Config")(**config))
    with t.no_grad():
        for name, p in hf.named_parameters(): p.add_(t.randn(p.shape) * (0.2 if "norm" in name or "bias" in name else 0.12))
    return hf.eval()


def save_folder(hf, folder: Path) -> Path:
    """The model as transformers saves it, with a tokenizer of 260 tokens."""
    from transformers import PreTrainedTokenizerFast
    hf.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=train_bpe(["a b c"], 260), bos_token="<|endoftext|>", eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def relative_error(ours: t.Tensor, theirs: t.Tensor) -> float:
    """max |difference| / max |theirs|"""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
