"""What every script shares: colours, one-line failures, seeds, devices, secrets, results, and the model loader."""

import os

# Read when torch loads. Threads that spin while they wait are ten times slower beside a busy neighbour; a short spin
# (GNU OpenMP) keeps the idle machine fast.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import dataclasses
import importlib.metadata
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch as t
import torch.nn as nn
from dotenv import dotenv_values

purple = "\x1b[38;2;255;0;255m"
blue = "\x1b[38;2;0;0;255m"
cyan = "\x1b[38;2;0;255;255m"
yellow = "\x1b[38;2;255;255;0m"
green = "\x1b[38;2;0;255;0m"
red = "\x1b[38;2;255;0;0m"
gray = "\x1b[38;2;127;127;127m"
orange = "\x1b[38;2;255;165;0m"
bold = "\033[1m"
underline = "\033[4m"
endc = "\033[0m"

ROOT = Path(__file__).parent
WORLD = ROOT / "models/world"

# tqdm's settings: information on the left
BAR = {
    "ascii": " >=",
    "bar_format": "{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
    "mininterval": 0.2 if sys.stderr.isatty() else 10,
}
BRIEF = BAR | {"delay": 2, "leave": False}  # for what is often done in a moment


#%% Basics: failing with one line, memory, seeds, devices, secrets
def fail(message: str) -> NoReturn:
    """End the program (or the cell) with one red line and exit code 1."""
    raise SystemExit(f"{red}{message}{endc}")


def tec() -> None:
    if t.cuda.is_available():
        t.cuda.empty_cache()


def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    t.manual_seed(seed)


def pick_device(device: str = "auto") -> str:
    """auto is cuda, then mps, then cpu; a device asked for by name must exist."""
    usable = {"cuda": t.cuda.is_available(), "mps": t.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, ok in usable.items() if ok)
    kind = device.split(":")[0]
    if kind not in usable:
        fail(f"unknown --device {device}: use auto, cuda, mps or cpu")
    if not usable[kind]:
        fail(f"--device {device}: torch {t.__version__} sees no {kind} here; use --device cpu or auto")
    return device


def pick_dtype(device: str, dtype: str = "auto") -> t.dtype:
    """auto is bfloat16 on a GPU that has it, else float32."""
    if dtype == "auto":
        return t.bfloat16 if device.startswith("cuda") and t.cuda.is_bf16_supported() else t.float32
    names = {"float32": t.float32, "bfloat16": t.bfloat16, "float16": t.float16}
    if dtype not in names:
        fail(f"unknown --dtype {dtype}: use auto, {', '.join(names)}")
    return names[dtype]


def secret(name: str) -> str | None:
    """A key from the .env file beside the scripts, or None; the shell's environment is not looked at."""
    return dotenv_values(ROOT / ".env").get(name) or None


def in_kernel() -> bool:
    """True in Jupyter and VS Code cells, where argv belongs to the kernel; `%run script.py --flags` is a script."""
    return "kernel_launcher" in sys.argv[0]


#%% Results: numbers for machines, files that are never half written
def wandb_run():
    """The wandb run that is going on (--wandb), or None."""
    return getattr(sys.modules.get("wandb"), "run", None)


def versions() -> dict[str, str]:
    packages = ("transformers", "transformer-lens", "sae-lens")
    return {
        "python": sys.version.split()[0],
        "torch": t.__version__,
        **{package: importlib.metadata.version(package) for package in packages},
    }


def save_results(script: str, config: object, **numbers) -> None:
    """Write results/<script>.json: the numbers at the top level, with the config and the versions that made them."""
    path = Path("results") / f"{script}.json"
    path.parent.mkdir(exist_ok=True)
    everything = {**numbers, "config": dataclasses.asdict(config), "versions": versions()}
    text = json.dumps(everything, indent=1, default=lambda x: x.tolist())
    write_aside(path, lambda aside: aside.write_text(text + "\n"))
    board = wandb_run()
    if board:
        board.summary.update({key: value for key, value in numbers.items() if isinstance(value, int | float | str)})
    print(f"{gray}numbers: {path}{endc}")


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target, then rename: a kill or a full disk never leaves half a file under the real name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


#%% Names of models: a hub name, a short name, a folder
SHORT_NAMES = {
    "gpt2-small": "gpt2",
    "gpt2-medium": "gpt2-medium",
    "gpt2-large": "gpt2-large",
    "gpt2-xl": "gpt2-xl",
}
SHORT_OWNERS = {
    "pythia-": "EleutherAI/",
    "gemma-": "google/",
    "Qwen": "Qwen/",
    "Mistral-": "mistralai/",
    "Meta-Llama-": "meta-llama/",
    "SmolLM": "HuggingFaceTB/",
}
HINTS = {
    "gated": "accept its licence on the hub and put HF_TOKEN=... into .env",
    "offline": "fetch it where there is a network, or give a folder",
    "connect": "without a network, give a folder",
}


def full_name(name: str) -> str:
    """The hub name behind a short name: gpt2-small, pythia-70m, gemma-2b ..."""
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    if "/" in name:
        return name
    for prefix, owner in SHORT_OWNERS.items():
        if name.startswith(prefix):
            return owner + name
    return name


def find_folder(name: str) -> str:
    """A folder as given, or beside the scripts; else a hub name."""
    for folder in (Path(name), ROOT / name):
        if folder.is_dir():
            return str(folder.resolve())
    return full_name(name)


def find_model(name: str) -> str:
    """
    The name, or the folder of that name beside this file (models/world), wherever the script is started. What cannot
    be read gets one line.
    """
    name = find_folder(name)
    has_safetensors = any(Path(name).glob("*.safetensors"))
    has_gguf = any(Path(name).glob("*.gguf"))
    if name.endswith(".gguf") or (has_gguf and not has_safetensors):
        fail(
            f"{name}: GGUF files are made for llama.cpp and not read here: give the hub name or the safetensors folder "
            "that it was made from"
        )
    try:
        read_config(name)
    except SystemExit as error:
        hints = [f" ({hint})" for word, hint in HINTS.items() if word in str(error).lower()]
        fail(f"{error}{''.join(hints)}")
    if Path(name).is_dir() and not has_safetensors:
        fail(f"no *.safetensors in {name}: save the weights there with model.save_pretrained")
    return name


def said_by_the_hub(error: Exception) -> str:
    return f"no such folder, and the hub said: {str(error).splitlines()[0]}"


def model_folder(name: str) -> Path:
    """A local folder, or the hub model's files in the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "model*.safetensors"]
    try:
        return Path(snapshot_download(full_name(name), allow_patterns=wanted, token=secret("HF_TOKEN")))
    except (OSError, ValueError) as error:
        fail(f"cannot read model {name!r}: {said_by_the_hub(error)}")


def read_config(name: str) -> dict:
    """config.json of a folder or a hub model."""
    if Path(name).is_dir():
        path = Path(name) / "config.json"
        if not path.exists():
            fail(f"no config.json in {name}: not a model folder")
        return json.loads(path.read_text())
    if name.startswith((".", "/", "~")):
        fail(f"no such model folder: {name}")
    from transformers import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(name, token=secret("HF_TOKEN"))[0]
    except OSError as error:
        fail(f"cannot load model {name!r}: {said_by_the_hub(error)}")


#%% The loader: one of our classes where it takes the architecture, else a TransformerBridge
def load_model(
    name: str,
    ours: tuple[type, ...] = (),
    device: str = "auto",
    dtype: str = "auto",
    base: str | None = None,
    hf_model: nn.Module | None = None,
) -> nn.Module:
    """
    A hooked model in eval mode with .cfg and .tokenizer, from a hub name, a short name or a folder.
    ours: classes with `architectures` and `from_folder(folder, device, dtype)`; one that takes the architecture is used
    (torch only, seconds), else TransformerBridge (imports transformer_lens, 10 s).
    base: architecture and tokenizer to put the weights of name (or hf_model) on.
    """
    device = pick_device(device)
    name = full_name(name)
    torch_dtype = pick_dtype(device, dtype)
    architecture = (read_config(name).get("architectures") or ["unknown"])[0]
    if Path(name).is_dir() and base is None and hf_model is None:
        for own in ours:
            if architecture in own.architectures:
                return own.from_folder(name, device=device, dtype=torch_dtype).eval()
    dtype_name = str(torch_dtype).removeprefix("torch.")
    print(f"{gray}loading {name} ({architecture}, {dtype_name}, {device}) through TransformerBridge ...{endc}")
    return open_bridge(name, base, hf_model, device, torch_dtype)


def open_bridge(
    name: str,
    base: str | None,
    hf_model: nn.Module | None,
    device: str,
    dtype: t.dtype,
) -> nn.Module:
    """A TransformerBridge in eval mode: of name, or of base with the weights of name or hf_model."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    if base and hf_model is None:
        hf_model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, token=secret("HF_TOKEN"))
    if hf_model is not None:
        hf_model.config.architectures = [type(hf_model).__name__]
    source = full_name(base) if base else name
    model = TransformerBridge.boot_transformers(source, device=device, dtype=dtype, hf_model=hf_model)
    del hf_model
    tec()
    return model.eval()
