import contextlib
import fcntl
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # dozens of processes import torch: it is compiled once
sys.dont_write_bytecode = False
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
import utils  # noqa: E402, F401  before torch: see its first lines
import torch as t  # noqa: E402
import report  # noqa: E402
from data import train_bpe  # noqa: E402


QUICK = ("test_hooks", "test_plots", "test_layers", "test_house", "test_utils", "test_heads_and_neurons")  # rooms


def pytest_collection_modifyitems(items: list) -> None:
    """What waits for Slurm comes first, so that nothing waits for it at the end; the quick rooms are marked."""
    for item in items:
        if item.path.stem in QUICK:
            item.add_marker(pytest.mark.quick)
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    """One folder per test process for all runs of scripts; the tokenized text is shared by all."""
    base, folder = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("runs")
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "data"
    shared.mkdir(exist_ok=True), (folder / "checkpoints").mkdir()
    (folder / "checkpoints/data").symlink_to(shared)
    return folder


@pytest.fixture(scope="session")
def run(workdir):
    """
    run('attn_only.py', '--steps', '5') -> the finished process, run in the work folder. In this process, since torch takes seconds to
    import; fresh=True starts one.
    """

    def run(script: str, *args: str, cwd: Path | None = None, fresh: bool = False) -> subprocess.CompletedProcess:
        command, cwd = [str(ROOT / script), *args], cwd or workdir
        if fresh:
            return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=300)
        code, argv, out, err = 0, sys.argv, io.StringIO(), io.StringIO()
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                sys.argv = command
                runpy.run_path(command[0], run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                code = 1
                traceback.print_exc()
            finally:
                report.finish_report()
                sys.argv = argv
                for lock in Path("results").glob(".*.lock"):
                    lock.open().close()  # lets go of the lock, as the end of a process does
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

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


@contextlib.contextmanager
def memory_for(model: t.nn.Module, rows: int):
    """More rows at once than these are out of memory, in the first attention that sees them."""

    def refuse(module, args, kwargs):
        if len(x := next(iter([*args, *kwargs.values()]))) > rows:
            raise t.OutOfMemoryError(f"CUDA out of memory, says this test, with {len(x)} rows")

    handles = [block.attn.register_forward_pre_hook(refuse, with_kwargs=True) for block in model.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tiny_hf(architecture: str, **config):
    """A transformers model with weights large enough that a wrong formula shows: default initialisation hides bugs."""
    import transformers

    t.manual_seed(0)
    hf = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(architecture, f"{architecture}ForCausalLM"))(
        getattr(transformers, f"{architecture}Config")(**config)
    )
    with t.no_grad():
        for name, p in hf.named_parameters():
            p.add_(t.randn(p.shape) * (0.2 if "norm" in name or "bias" in name else 0.12))
    return hf.eval()


def save_folder(hf, folder: Path) -> Path:
    """The model as transformers saves it, with a tokenizer of 260 tokens."""
    from transformers import PreTrainedTokenizerFast

    hf.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(["a b c"], 260), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


def tiny_attn_only():
    """Two attention layers of four heads over 20 tokens, at random."""
    from attn_only import AttnOnly, AttnOnlyConfig

    t.manual_seed(0)
    return AttnOnly(AttnOnlyConfig(d_model=16, d_head=4, d_vocab=20, n_ctx=32)).eval()


def relative_error(ours: t.Tensor, theirs: t.Tensor) -> float:
    """max |difference| / max |theirs|"""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
