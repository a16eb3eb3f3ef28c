"""What every script shares: colours, one-line failures, seeds, devices, secrets, results, and the model loader."""

import os

# Read when torch loads. Threads that spin while they wait are ten times slower beside a busy neighbour; a short spin
# (GNU OpenMP) keeps the idle machine fast.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import random
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import torch as t
import torch.nn as nn
from annotated_types import Ge, Gt, Interval
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
WRITTEN: set[Path] = set()  # results and figures of this process: others in their folders belong to an earlier run

# tqdm's settings: information on the left
BAR = {
    "ascii": " >=",
    "bar_format": "{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
    "mininterval": 0.2 if sys.stderr.isatty() else 10,
}
BRIEF = BAR | {"delay": 2, "leave": False}  # for what is often done in a moment


#%% Ranges of settings, declared where the setting is: launch.flags refuses what lies outside
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
AtLeastTwo = Annotated[int, Ge(2)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


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


def seed_of(seed: int, role: str) -> int:
    """The seed of one role in a run, so that a run's second stream is not the first stream of the next seed."""
    return zlib.crc32(f"{role} {seed}".encode())


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
    index = device.partition(":")[2]
    if index and not (kind == "cuda" and index.isdecimal() and int(index) < t.cuda.device_count()):
        fail(f"--device {device}: there is no such {kind} device")
    return device


def pick_dtype(device: str, dtype: str = "auto") -> t.dtype:
    """auto is bfloat16 on a GPU that has it, else float32."""
    if dtype == "auto":
        return (
            t.bfloat16
            if device.startswith("cuda") and t.cuda.is_bf16_supported(including_emulation=False)
            else t.float32
        )
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


def is_bytes(token: str) -> bool:
    """Whether the text of a token is that of a part of a character: its bytes, '<0xE5><0x9B>' (data.token_text)."""
    return bool(re.fullmatch("(<0x[0-9A-F]{2}>)+", token))


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


def earlier_results(path: Path) -> Path:
    """Where the results of the run before stand, beside those of the last one."""
    return path.parent / "earlier" / path.name


def keep_earlier(path: Path) -> None:
    """Results that a process before this one wrote are kept for compare.py."""
    if path.absolute() in WRITTEN or not path.is_file():
        return
    kept = earlier_results(path)
    kept.parent.mkdir(exist_ok=True)
    write_aside(kept, lambda aside: shutil.copyfile(path, aside))


def save_results(script: str, config: object, **numbers) -> None:
    """
    Write results/<script>.json: the numbers at the top level, with the config and the versions that made them. What an
    earlier run wrote there stands in results/earlier.
    """
    path = Path("results") / f"{script}.json"
    everything = {**numbers, "config": dataclasses.asdict(config), "versions": versions()}
    text = json.dumps(finite(everything), indent=1, allow_nan=False)
    try:
        path.parent.mkdir(exist_ok=True)
        keep_earlier(path)
        write_aside(path, lambda aside: aside.write_text(text + "\n"))
        WRITTEN.add(path.absolute())
    except OSError as error:
        fail(f"{path} was not written, what stood there before is whole: {error.strerror or error}")
    board = wandb_run()
    if board:
        board.summary.update(by_path(numbers))
    print(f"{gray}numbers: {path}{endc}")


def by_path(numbers: dict, path: str = "") -> dict[str, int | float | str]:
    """The numbers and texts of nested dictionaries under names such as gates.nothing_patched; lists are left out."""
    flat = {}
    for key, value in numbers.items():
        if isinstance(value, dict):
            flat |= by_path(value, f"{path}{key}.")
        elif isinstance(value, int | float | str):
            flat[f"{path}{key}"] = value
    return flat


def finite(x: Any) -> Any:
    """What JSON can hold: null for NaN and infinities, which its standard does not know, and lists for arrays."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if hasattr(x, "tolist"):
        return finite(x.tolist())
    return x


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
    """A folder as given (also ~), or beside the scripts; else a hub name."""
    for folder in (Path(name).expanduser(), ROOT / name):
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


TOKENIZER_FILES = ["*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model"]


def model_folder(name: str | Path, files: Iterable[str] = (*TOKENIZER_FILES, "*.safetensors")) -> Path:
    """
    The one folder of files behind a name: local, beside the scripts, or the hub model's in the hub's cache, into which
    these files are fetched.
    """
    name = find_folder(str(name))
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")):
        fail(f"no such model folder: {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), token=secret("HF_TOKEN")))
    except (OSError, ValueError) as error:
        fail(f"cannot load {name!r}: {said_by_the_hub(error)}")


def on_base(name: str, base: str | None) -> str:
    """
    Where weights lie alone (--model), a folder of links to them and to the config and tokenizer of a base (--base), so
    that they open, and name what is computed from them, as any folder does. Without a base the name itself.
    """
    if base is None:
        return name
    weights = find_weights(name)
    settings_from = model_folder(base, TOKENIZER_FILES)
    read_config(str(settings_from))
    if weights[0].with_name("config.json").resolve() == (settings_from / "config.json").resolve():
        return name  # they lie on it already
    links = {file.name: file for file in weights}
    for pattern in TOKENIZER_FILES:
        for file in settings_from.glob(pattern):
            if not file.name.endswith(".index.json"):
                links[file.name] = file
    if len(weights) == 1:
        links["model.safetensors"] = links.pop(weights[0].name)

    both = f"{weights[0].absolute()} on {settings_from.absolute()}"
    digest = hashlib.sha256(both.encode()).hexdigest()[:8]
    short = Path(name).name.removesuffix(".safetensors")
    folder = Path("checkpoints/on_base") / digest / f"{short}-on-{Path(base).name}"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.name not in links and not old.name.startswith("."):
            old.unlink()
    for link, file in links.items():
        make_link(folder / link, file)
    return str(folder)


def find_weights(name: str) -> list[Path]:
    """The safetensors of a file, a folder or a hub model, and the index of shards where there is one."""
    file = Path(name).expanduser()
    if file.is_file() and file.suffix == ".safetensors":
        return [file]
    folder = model_folder(name)
    if (folder / "adapter_config.json").exists():
        fail(f"{name} holds a PEFT adapter and no weights of a model: merge it first (model.merge_and_unload())")
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if not shards:
        fail(f"no *.safetensors in {name}: save the weights there with safetensors.torch.save_file(state_dict, ...)")
    if len(shards) > 1 and not index.is_file():
        fail(f"{name} holds {len(shards)} safetensors files and no index that says which are the model's")
    return [*shards, index] if len(shards) > 1 else shards


def make_link(link: Path, file: Path) -> None:
    """link points to the file, at no moment to nothing."""
    if link.is_symlink() and link.resolve() == file.resolve():
        return
    write_aside(link, lambda aside: aside.symlink_to(file.absolute()))


def read_json(path: Path) -> dict:
    """What a JSON file of a model's folder says; nothing where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text at all
        fail(f"{path} is corrupt ({error}): fetch it anew")


def read_config(name: str) -> dict:
    """config.json of a folder or a hub model; of the latter nothing else is fetched."""
    name = find_folder(name)
    if Path(name).is_dir():
        path = Path(name) / "config.json"
        if not path.exists():
            fail(f"no config.json in {name}: not a model folder")
        return read_json(path)
    if name.startswith((".", "/", "~")):
        fail(f"no such model folder: {name}")
    from transformers import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(name, token=secret("HF_TOKEN"))[0]
    except OSError as error:
        fail(f"cannot load model {name!r}: {said_by_the_hub(error)}")


def with_defaults(config: dict, needed: Iterable[str]) -> dict:
    """
    A config.json in which a field that is left out says what transformers takes it to say. Its own class is asked
    (an import of seconds) only where a needed field is missing.
    """
    if all(field in config for field in needed):
        return config
    from transformers import AutoConfig

    if "model_type" not in config:
        missing = next(field for field in needed if field not in config)
        fail(f"config.json says neither {missing} nor a model_type: it is no transformers config")
    return AutoConfig.for_model(**config).to_dict() | {"architectures": config.get("architectures")}


#%% The loader: one of our classes where it takes the architecture, else a TransformerBridge held against transformers
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$")  # buffers
LARGEST_MISS = {t.float32: 1e-4, t.bfloat16: 5e-2, t.float16: 1e-2}  # of the largest logit, against transformers
LFS_POINTER = b"version https://git-lfs"  # what git leaves in place of a file that was not fetched


def load_model(
    name: str,
    ours: tuple[type, ...] = (),
    device: str = "auto",
    dtype: str = "auto",
    base: str | None = None,
    hf_model: nn.Module | None = None,
) -> nn.Module:
    """
    A hooked model in eval mode with .cfg, .tokenizer and .folder, from a hub name, a short name or a folder.
    ours: classes with `architectures`, `read_config(config)` and `from_folder(folder, device, dtype)`; one that takes the
    architecture is used (torch only, seconds), else TransformerBridge (imports transformer_lens, 10 s).
    base: architecture and tokenizer to put the weights of name (or hf_model) on, see on_base.
    """
    device = pick_device(device)
    torch_dtype = pick_dtype(device, dtype)
    folder = model_folder(on_base(name, base)) if hf_model is None else model_folder(base or name)
    config = read_config(str(folder))
    refuse_foreign(folder, config)
    architecture = (config.get("architectures") or ["unknown"])[0]
    if hf_model is None:
        for own in ours:
            if architecture in own.architectures and builds(own, config):
                model = own.from_folder(str(folder), device=device, dtype=torch_dtype).eval()
                model.folder = folder
                model.register_forward_pre_hook(refuse_unreadable)
                with t.no_grad():
                    refuse_not_finite(model(a_row_of_tokens(model.cfg.d_vocab, model.cfg.n_ctx, device)), model)
                return model
    dtype_name = str(torch_dtype).removeprefix("torch.")
    print(f"{gray}loading {name} ({architecture}, {dtype_name}, {device}) through TransformerBridge ...{endc}")
    if hf_model is None:
        hf_model = read_hf_model(folder, torch_dtype)
    elif "peft" in type(hf_model).__module__ or hasattr(hf_model, "peft_config"):
        fail("hf_model holds an adapter, which would be ignored: hand over hf_model.merge_and_unload()")
    model = open_bridge(str(folder), hf_model, device, torch_dtype)
    model.folder = folder
    model.cfg.n_ctx = context_length(hf_model.config)
    model.register_forward_pre_hook(refuse_unreadable)
    return model


def builds(own: type, config: dict) -> bool:
    """Whether a class of ours computes all that this config asks for; else transformers can, and the bridge is taken."""
    try:
        own.read_config(config)
    except SystemExit as refusal:
        reason = str(refusal).removeprefix(red).removesuffix(endc)
        print(f"{gray}{own.__name__}: {reason}: it goes through TransformerBridge instead{endc}")
        return False
    return True


def refuse_foreign(folder: Path, config: dict) -> None:
    """What would be opened in part or as something else is refused in a line that says what to do."""
    if (folder / "adapter_config.json").exists():
        fail(f"{folder} holds a PEFT adapter, which would be ignored: merge it first (model.merge_and_unload())")
    quantisation = config.get("quantization_config")
    if quantisation:
        kind = quantisation.get("quant_method", "unknown kind")
        fail(f"{folder} is quantised ({kind}): its weights are not read here; give the model it was made from")
    architecture = (config.get("architectures") or [""])[0]
    if config.get("is_encoder_decoder"):
        fail(
            f"{folder} is an encoder with a decoder ({architecture}): only models that read from left to right open here"
        )
    if architecture == "AttnOnly":
        fail(f"{folder} is an attention-only model without MLPs: attn_only.py --model opens it, the others full models")
    if architecture.endswith(("ForMaskedLM", "ForPreTraining")):
        fail(f"{folder} is a {architecture}, not a causal language model: only those open here")
    if "vision_config" in config or "audio_config" in config:
        fail(
            f"{folder} is a multimodal wrapper: save its language model alone (model.language_model) and give that folder"
        )
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                fail(f"{path} is a git-lfs pointer, not weights: fetch them with git lfs pull")
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        absent = sorted(shard for shard in shards if not (folder / shard).exists())
        if absent:
            fail(f"{len(absent)} of {len(shards)} shards are missing from {folder}, first {absent[0]}: fetch it anew")


def read_hf_model(folder: Path, dtype: t.dtype) -> nn.Module:
    """The plain transformers model, every tensor of which was in the files; its own code (auto_map) is never run."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # its report on missing tensors becomes the one line below
    try:
        hf_model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",  # what the bridge computes by
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"transformers cannot open {folder} as a causal language model: {str(error).strip().splitlines()[0]}")
    refuse_incomplete(str(folder), info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return hf_model.eval()


def refuse_incomplete(name: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable = ()) -> None:
    """End the program where tensors would be drawn at random or left out, with the names of the files and the cause."""
    missing = sorted(missing)
    unexpected = sorted(key for key in unexpected if not HARMLESS.search(key))
    mismatched = sorted(str(key) for key in mismatched)
    found = []
    if missing:
        found.append(f"{len(missing)} tensors that the model needs are missing (first {missing[0]})")
    if unexpected:
        found.append(f"{len(unexpected)} tensors have no place in it (first {unexpected[0]})")
    if mismatched:
        found.append(f"{len(mismatched)} have another shape (first {mismatched[0]})")
    if found:
        fail(f"{name}: {', '.join(found)}: {likely_cause(unexpected)}")


def likely_cause(unexpected: list[str]) -> str:
    said = " ".join(unexpected)
    if "_orig_mod." in said:
        return "it was saved from torch.compile; save model._orig_mod instead, or strip '_orig_mod.' from the names"
    if any(key.startswith("module.") for key in unexpected):
        return "it was saved from DistributedDataParallel; save model.module instead, or strip 'module.' from the names"
    if "lora_" in said or "base_model." in said:
        return "it holds an adapter; merge it first (model.merge_and_unload())"
    if any(key.startswith(("score.", "classifier.")) for key in unexpected):
        return "it is a classifier, not a language model"
    return "the files are not this model's, or not all of it was fetched"


@t.no_grad()
def open_bridge(source: str, hf_model: nn.Module, device: str, dtype: t.dtype) -> nn.Module:
    """
    hf_model as a TransformerBridge in eval mode, with the tokenizer of the folder source; it answers one row of tokens
    as plain transformers does, or the program ends.
    """
    from transformer_lens.model_bridge import TransformerBridge

    hf_model.config.architectures = [type(hf_model).__name__]
    hf_model = hf_model.to(device=device, dtype=dtype)
    row = a_row_of_tokens(hf_model.config.get_text_config().vocab_size, context_length(hf_model.config), device)
    reference = hf_model(row, use_cache=False).logits.float()
    refuse_not_finite(reference, hf_model)
    kind = type(hf_model).__name__
    instead = "read its residual stream alone by --offload on, which transformers computes"
    try:
        model = TransformerBridge.boot_transformers(source, device=device, dtype=dtype, hf_model=hf_model).eval()
        answer = model(row, use_cache=False).float()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
        fail(f"TransformerBridge cannot run a {kind} ({reason}): {instead}")
    if getattr(model, "ln_final", None) is None:
        model.ln_final = nn.Identity()  # OPT-350m has no final norm
    miss = ((answer - reference).abs().max() / reference.abs().max()).item()
    if not miss <= LARGEST_MISS[dtype]:
        fail(
            f"TransformerBridge misses the logits of {kind} by {miss:.1e} of the largest, so it is not used: {instead}"
        )
    print(f"{gray}checked: its logits miss plain transformers' by {miss:.0e} of the largest{endc}")
    del hf_model
    tec()
    return model


def context_length(hf_config: object) -> int:
    """How many tokens a transformers model reads; where nothing limits them (Mamba, Bloom) a number no row reaches."""
    shape = hf_config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(shape, name, None)
        if length:
            return length
    return 2**31


def refuse_unreadable(model: nn.Module, args: tuple) -> None:
    """Before every forward: a row longer than the context, or an id beyond the embedding, ends the program in a line."""
    tokens = args[0] if args else None
    if not isinstance(tokens, t.Tensor) or tokens.is_floating_point() or tokens.numel() == 0:
        return
    if tokens.shape[-1] > model.cfg.n_ctx:
        fail(
            f"a row of {tokens.shape[-1]} tokens is longer than the {model.cfg.n_ctx} that this model reads: shorten it"
        )
    highest = tokens.max().item()
    if highest >= model.cfg.d_vocab:
        fail(
            f"token {highest} is beyond the {model.cfg.d_vocab} of the model's embedding: its tokenizer is not its own, "
            "or has grown since"
        )


def a_row_of_tokens(d_vocab: int, n_ctx: int, device: str) -> t.Tensor:
    """16 tokens (1, pos), or as many as the model reads, by which it is judged at the door."""
    return t.arange(1, min(16, n_ctx) + 1, device=device)[None] % d_vocab


def refuse_not_finite(logits: t.Tensor, model: nn.Module) -> None:
    """End the program where a model answers NaN or infinity, with the cause."""
    if logits.isfinite().all():
        return
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            fail(f"the weights are broken: {name} holds NaN or infinity")
    if next(model.parameters()).dtype == t.float16:
        fail(
            "the model's activations are too large for float16 (NaN or infinite logits): use --dtype bfloat16 or float32"
        )
    fail(
        "the model answers NaN or infinity to plain tokens, though its weights are finite: its config is not its weights'"
    )
