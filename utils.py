"""What every script shares: colours, flags, figures, results, hooks and caches, the model loader, head scores."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: threads that spin while they wait are ten times slower
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # beside a busy neighbour; a short spin (GNU OpenMP) keeps the idle machine fast

import contextlib
import dataclasses
import difflib
import fnmatch
import importlib.metadata
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import plotly.graph_objects as go
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from dotenv import dotenv_values
from einops import einsum
from safetensors import safe_open
from torch import Tensor

purple = '\x1b[38;2;255;0;255m'
blue = '\x1b[38;2;0;0;255m'
cyan = '\x1b[38;2;0;255;255m'
yellow = '\x1b[38;2;255;255;0m'
green = '\x1b[38;2;0;255;0m'
red = '\x1b[38;2;255;0;0m'
gray = '\x1b[38;2;127;127;127m'
orange = '\x1b[38;2;255;165;0m'
bold = '\033[1m'
underline = '\033[4m'
endc = '\033[0m'

BAR = dict(ascii=" >=", bar_format="{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]", mininterval=0.2 if sys.stderr.isatty() else 10)  # tqdm: information on the left

#%% Basics: failing with one line, memory, seeds, devices, secrets
def fail(message: str) -> NoReturn:
    """End the program (or the cell) with one red line and exit code 1."""
    raise SystemExit(f"{red}{message}{endc}")


def tec() -> None:
    if t.cuda.is_available(): t.cuda.empty_cache()


def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    t.manual_seed(seed)


def pick_device(device: str = "auto") -> str:
    """auto is cuda, then mps, then cpu; a device asked for by name must exist."""
    usable = {"cuda": t.cuda.is_available(), "mps": t.backends.mps.is_available(), "cpu": True}
    if device == "auto": return next(name for name, ok in usable.items() if ok)
    kind = device.split(":")[0]
    if kind not in usable: fail(f"unknown --device {device}: use auto, cuda, mps or cpu")
    if not usable[kind]: fail(f"--device {device}: torch {t.__version__} sees no {kind} here; use --device cpu or auto")
    return device


def pick_dtype(device: str, dtype: str = "auto") -> t.dtype:
    """auto is bfloat16 on a GPU that has it, else float32."""
    if dtype == "auto": return t.bfloat16 if device.startswith("cuda") and t.cuda.is_bf16_supported() else t.float32
    names = {"float32": t.float32, "bfloat16": t.bfloat16, "float16": t.float16}
    if dtype not in names: fail(f"unknown --dtype {dtype}: use auto, {', '.join(names)}")
    return names[dtype]


def secret(name: str) -> str | None:
    """A key from the .env file beside the scripts, or None; the shell's environment is not looked at."""
    return dotenv_values(Path(__file__).parent / ".env").get(name) or None


def in_kernel() -> bool:
    """True in Jupyter and VS Code cells, where argv belongs to the kernel; `%run script.py --flags` is a script."""
    return "kernel_launcher" in sys.argv[0]


def flags[Config](config: type[Config], description: str = "") -> Config:
    """A dataclass of settings from the command line: one --flag per field; in a notebook, its defaults."""
    if in_kernel(): return config()
    import tyro
    return tyro.cli(config, description=description)

#%% Figures and results: a notebook shows figures, a script writes them
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000"]  # Okabe-Ito: readable by colour-blind eyes


def show(fig: go.Figure, name: str) -> None:
    """name is 'script/figure'. A notebook shows it; a script writes figs/script/figure.html, with one plotly.min.js per folder."""
    fig.update_layout(template="plotly_white", colorway=COLORS, margin=dict(t=90), title=dict(font=dict(size=16)))
    if in_kernel(): return fig.show()
    path = Path("figs") / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.write_html(path, include_plotlyjs="directory")
    print(f"{gray}figure: {path}{endc}")


def show_page(html: str, name: str) -> None:
    """Like show, for a self-contained HTML page."""
    if in_kernel():
        from IPython.display import HTML, display
        return display(HTML(f'<iframe srcdoc="{html.replace("&", "&amp;").replace(chr(34), "&quot;")}" width="100%" height="500"></iframe>'))
    path = Path("figs") / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html)
    print(f"{gray}page: {path}{endc}")


def array(x: Tensor | np.ndarray | list) -> np.ndarray:
    return x.detach().float().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def imshow(
    z: Tensor | np.ndarray, title: str, xlabel: str, ylabel: str, x: list | None = None, y: list | None = None,
    panels: list[str] | None = None, diverging: bool = True, value: str = "value", hover: list | np.ndarray | None = None, columns: int = 4, one_scale: bool = True,
) -> go.Figure:
    """
    Heatmap of z (rows, cols), or one panel for each z[i] when panels names them; one_scale=False gives each panel its own colour scale.
    Diverging data: RdBu with midpoint 0; else Blues from 0. hover: extra text per cell, shaped like z.
    """
    from plotly.subplots import make_subplots
    z = array(z)
    z = z if panels else z[None]
    n_cols = min(columns, len(z))
    n_rows = -(-len(z) // n_cols)
    fig = make_subplots(n_rows, n_cols, subplot_titles=panels, horizontal_spacing=0.04, vertical_spacing=0.35 / n_rows if n_rows > 1 else 0.1)
    text = None if hover is None else (np.asarray(hover) if panels else np.asarray(hover)[None])
    for i, panel in enumerate(z):
        cell = f"{ylabel} %{{y}}<br>{xlabel} %{{x}}<br>{value} %{{z:.4g}}" + ("<br>%{text}" if text is not None else "") + "<extra></extra>"
        fig.add_trace(go.Heatmap(z=panel, x=x, y=y, text=None if text is None else text[i], hovertemplate=cell, coloraxis=f"coloraxis{i + 1 if i and not one_scale else ''}"), row=i // n_cols + 1, col=i % n_cols + 1)
    for i, part in enumerate([z] if one_scale else z):
        finite = part[np.isfinite(part)]
        top = float(np.abs(finite).max()) or 1.0
        scale = dict(colorscale="RdBu" if diverging else "Blues", cmin=-top if diverging else min(0.0, float(finite.min())), cmax=top, colorbar=dict(title=value), showscale=one_scale)
        fig.update_layout({f"coloraxis{i + 1 if i else ''}": scale})
    fig.update_layout(title=title, height=max(450, 380 * n_rows))
    fig.update_yaxes(autorange="reversed")
    fig.update_xaxes(title=xlabel, row=n_rows)
    fig.update_yaxes(title=ylabel, col=1)
    return fig


def line(
    lines: dict[str, Tensor | np.ndarray | list], title: str, xlabel: str, ylabel: str, x: list | Tensor | None = None,
    markers: bool = False, logx: bool = False, dashed: list[str] | tuple[str, ...] = (),
) -> go.Figure:
    """One line per entry of lines; the names in dashed are references (floors, baselines)."""
    fig = go.Figure()
    for name, y in lines.items():
        fig.add_trace(go.Scatter(x=None if x is None else array(x), y=array(y), name=name, mode="lines+markers" if markers else "lines", line=dict(dash="dash" if name in dashed else "solid"), hovertemplate=f"{name}<br>{xlabel} %{{x}}<br>{ylabel} %{{y:.4f}}<extra></extra>"))
    fig.update_layout(title=title, xaxis_title=xlabel, yaxis_title=ylabel)
    if logx: fig.update_xaxes(type="log")
    return fig


def visible(token: str) -> str:
    """A token as a figure can print it: spaces and newlines made visible."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍") or "∅"


def label_tokens(tokens: list[str]) -> list[str]:
    """Axis labels: visible tokens, suffixed with their position so that repeats stay apart."""
    return [f"{visible(token)}_{i}" for i, token in enumerate(tokens)]


def save_results(script: str, config: object, **numbers) -> None:
    """Write results/<script>.json: the numbers at the top level, with the config and the versions that made them."""
    versions = {"python": sys.version.split()[0], "torch": t.__version__, **{p: importlib.metadata.version(p) for p in ("transformers", "transformer-lens", "sae-lens")}}
    path = Path("results") / f"{script}.json"
    path.parent.mkdir(exist_ok=True)
    write_aside(path, lambda p: p.write_text(json.dumps({**numbers, "config": dataclasses.asdict(config), "versions": versions}, indent=1, default=lambda x: x.tolist()) + "\n"))
    print(f"{gray}numbers: {path}{endc}")


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target, then rename: a kill or a full disk never leaves half a file under the real name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)

#%% Hooks: one way for our own models and for a TransformerBridge
class HookPoint(nn.Module):
    """Identity that lets functions fn(activation, hook) see or replace what flows through, as in TransformerLens."""

    def __init__(self):
        super().__init__()
        self.name: str | None = None
        self.fwd_hooks: list[tuple[Callable, int | None]] = []

    def add_hook(self, fn: Callable, level: int | None = None) -> None:
        self.fwd_hooks.append((fn, level))

    def remove_hooks(self, level: int | None = None) -> None:
        self.fwd_hooks = [(fn, at) for fn, at in self.fwd_hooks if level is not None and at != level]

    def forward(self, x: Tensor) -> Tensor:
        for fn, _ in self.fwd_hooks:
            y = fn(x, hook=self)
            if y is not None: x = y
        return x


GATES = {"hook_result": "use_attn_result", "hook_attn_in": "use_attn_in", "hook_mlp_in": "use_hook_mlp_in", **{f"hook_{x}_input": "use_split_qkv_input" for x in "qkv"}}
LEVELS = itertools.count(1000)  # each `hooks` context removes its own and leaves the others


def hook_points(model: nn.Module) -> dict[str, nn.Module]:
    """All hook points by name, aliases such as blocks.0.hook_resid_pre included."""
    if hasattr(model, "hook_dict"): return model.hook_dict
    points = {name: module for name, module in model.named_modules() if isinstance(module, HookPoint)}
    for name, point in points.items(): point.name = name
    return points


def find_hooks(model: nn.Module, names: str | list[str] | Callable[[str], bool] | None) -> list[str]:
    """Hook names for a name, a *-pattern, a list of these, or a predicate; None is every name. Raises KeyError where nothing fits."""
    known = hook_points(model)
    if names is None: return list(known)
    if callable(names):
        if not (found := [name for name in known if names(name)]): raise KeyError("no hook name satisfies the predicate")
        return found
    found = []
    for pattern in [names] if isinstance(names, str) else names:
        hits = [pattern] if pattern in known else fnmatch.filter(known, pattern)
        if not hits: raise KeyError(f"unknown hook name {pattern!r}; close: {difflib.get_close_matches(pattern, known, 3, 0.3)}")
        found += hits
    for name in found:
        gate = GATES.get(name.split(".")[-1])
        if gate and hasattr(model, f"set_{gate}") and not getattr(model.cfg, gate):
            raise KeyError(f"{name} is gated and would never fire: call model.set_{gate}(True) first")
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def hooks(model: nn.Module, fwd_hooks: list[tuple[str | list[str] | Callable[[str], bool], Callable]], must_fire: bool = True) -> Iterator[None]:
    """
    Attach (names, fn) pairs for the length of the context; fn(activation, hook) returns a replacement or None.
    Raises KeyError on an unknown or gated name, and RuntimeError when a hook has not fired by the end.
    """
    points, level, silent = hook_points(model), next(LEVELS), set()

    def counted(name: str, fn: Callable) -> Callable:
        def run(activation: Tensor, hook: nn.Module) -> Tensor | None:
            silent.discard((name, fn))
            return fn(activation, hook=hook)
        return run

    chosen = [(name, fn) for names, fn in fwd_hooks for name in find_hooks(model, names)]
    silent.update(chosen)
    try:
        for name, fn in chosen: points[name].add_hook(counted(name, fn), level=level)
        yield
    finally:
        for name, _ in chosen: points[name].remove_hooks(level=level)
    if silent and must_fire: raise RuntimeError(f"hooks that never fired: {sorted({name for name, _ in silent})[:5]}")


def run_with_hooks(model: nn.Module, tokens: Tensor, fwd_hooks: list[tuple], **kwargs) -> Tensor:
    with hooks(model, fwd_hooks): return model(tokens, **kwargs)


class Cache(dict):
    """Activations by hook name; cache['pattern', 0] is cache['blocks.0.attn.hook_pattern'], as in TransformerLens."""

    def __missing__(self, key: str | tuple[str, int]) -> Tensor:
        if isinstance(key, tuple): return self[act_name(*key)]
        raise KeyError(f"{key!r} was not cached; cached: {list(self)[:8]} ...")


def act_name(short: str, layer: int) -> str:
    room = "attn." if short in ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result") else "mlp." if short in ("pre", "post") else ""
    return f"blocks.{layer}.{room}hook_{short}"


def run_with_cache(model: nn.Module, tokens: Tensor, names: str | list[str] | Callable[[str], bool] | None = None, detach: bool = True, **kwargs) -> tuple[Tensor, Cache]:
    """
    (logits, cache of the named activations). None caches every hook that fires; a named hook that does not fire raises.
    detach=False keeps the graph, for gradients with respect to activations.
    """
    cache = Cache()

    def save(name: str) -> Callable:
        def fn(activation: Tensor, hook: nn.Module) -> None: cache[name] = activation.detach() if detach else activation
        return fn

    optional = names is None
    wanted = [name for name in hook_points(model) if not (optional and name.split(".")[-1] in GATES)] if optional else find_hooks(model, names)
    with hooks(model, [(name, save(name)) for name in wanted], must_fire=not optional): out = model(tokens, **kwargs)
    return out, cache

#%% Models: a hub name, a folder, or one of our own, by one call
SHORT_NAMES = {"gpt2-small": "gpt2", **{f"gpt2-{size}": f"gpt2-{size}" for size in ("medium", "large", "xl")}}
SHORT_OWNERS = {"pythia-": "EleutherAI/", "gemma-": "google/", "Qwen": "Qwen/", "Mistral-": "mistralai/", "Meta-Llama-": "meta-llama/", "SmolLM": "HuggingFaceTB/"}


def full_name(name: str) -> str:
    """The hub name behind a short name: gpt2-small, pythia-70m, gemma-2b ..."""
    if name in SHORT_NAMES or "/" in name: return SHORT_NAMES.get(name, name)
    return next((owner + name for prefix, owner in SHORT_OWNERS.items() if name.startswith(prefix)), name)


def read_config(name: str) -> dict:
    """config.json of a folder or a hub model."""
    if Path(name).is_dir():
        if not (path := Path(name) / "config.json").exists(): fail(f"no config.json in {name}: not a model folder")
        return json.loads(path.read_text())
    if name.startswith((".", "/", "~")): fail(f"no such model folder: {name}")
    from transformers import PretrainedConfig
    try: return PretrainedConfig.get_config_dict(name, token=secret("HF_TOKEN"))[0]
    except OSError as error: fail(f"cannot load model {name!r}: no such folder, and the hub said: {str(error).splitlines()[0]}")


def load_model(name: str, ours: tuple[type, ...] = (), device: str = "auto", dtype: str = "auto", base: str | None = None, hf_model: nn.Module | None = None) -> nn.Module:
    """
    A hooked model in eval mode with .cfg and .tokenizer, from a hub name, a short name or a folder.
    ours: classes with `architectures` and `from_folder(folder, device, dtype)`; one that takes the architecture is used (torch only, seconds),
    else TransformerBridge (imports transformer_lens, 10 s). base: architecture and tokenizer to put the weights of name (or hf_model) on.
    """
    device, name = pick_device(device), full_name(name)
    torch_dtype = pick_dtype(device, dtype)
    architecture = (read_config(name).get("architectures") or ["unknown"])[0]
    if Path(name).is_dir() and base is None and hf_model is None:
        for own in ours:
            if architecture in own.architectures: return own.from_folder(name, device=device, dtype=torch_dtype).eval()
    print(f"{gray}loading {name} ({architecture}, {str(torch_dtype)[6:]}, {device}) through TransformerBridge ...{endc}")
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM
    token = secret("HF_TOKEN")
    if base and hf_model is None: hf_model = AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype, token=token)
    if hf_model is not None: hf_model.config.architectures = [type(hf_model).__name__]
    model = TransformerBridge.boot_transformers(full_name(base) if base else name, device=device, dtype=torch_dtype, hf_model=hf_model)
    del hf_model
    tec()
    return model.eval()

#%% Hugging Face files: tensor by tensor, every one in its place
def take_tensors[Model: nn.Module](model: Model, tensors: Iterable[tuple[str, Tensor]]) -> Model:
    """Put (Hugging Face name, tensor) pairs where model.place says; a tensor without a place, of the wrong shape or missing ends the program."""
    wanted, state = model.state_dict(), {}
    for name, x in tensors:
        for ours, part in model.place(name, x).items():
            if ours not in wanted: fail(f"tensor {name} has no place in {type(model).__name__} (it would be {ours})")
            if wanted[ours].shape != part.shape: fail(f"tensor {name} gives {ours} the shape {tuple(part.shape)}, the config says {tuple(wanted[ours].shape)}")
            state[ours] = part
    if model.cfg.tied and "embed.weight" in state and not t.equal(state.setdefault("unembed.weight", state["embed.weight"]), state["embed.weight"]): fail("the config ties embedding and unembedding, the file holds two different ones")
    if missing := [name for name in wanted if name not in state]: fail(f"{len(missing)} tensors are missing from the file, first {missing[0]}")
    model.load_state_dict(state, assign=True)
    if model.cfg.tied: model.unembed.weight = model.embed.weight
    return model.requires_grad_(True)


def model_folder(name: str) -> Path:
    """A local folder, or the hub model's files in the hub's cache."""
    if Path(name).is_dir(): return Path(name)
    from huggingface_hub import snapshot_download
    try: return Path(snapshot_download(full_name(name), allow_patterns=["*.json", "model*.safetensors"], token=secret("HF_TOKEN")))
    except (OSError, ValueError) as error: fail(f"cannot read model {name!r}: no such folder, and the hub said: {str(error).splitlines()[0]}")


def read_tensors(name: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one by one, from the safetensors files (one or sharded) of a folder or hub model."""
    folder = model_folder(str(name))
    index = folder / "model.safetensors.index.json"
    for file in sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]:
        if not (folder / file).is_file(): fail(f"no {file} in {name}: only safetensors are read")
        try: tensors = safe_open(folder / file, "pt")
        except Exception as error: fail(f"{folder / file} is corrupt: {error}")
        with tensors:
            for key in tensors.keys(): yield key, tensors.get_tensor(key)


def tensor_table(name: str) -> Iterator[tuple[str, tuple[int, ...], str, float]]:
    """(tensor name, shape, dtype, Frobenius norm), one tensor in memory at a time."""
    for key, x in read_tensors(name): yield key, tuple(x.shape), str(x.dtype)[6:], math.sqrt(sum(part.double().pow(2).sum().item() for part in x.flatten().split(2**24)))


#%% Head scores on repeated random tokens: what makes a head an induction, previous-token or duplicate-token head
def repeated_tokens(batch: int, half: int, vocab: Tensor | int, bos: int | None = None, seed: int = 0) -> Tensor:
    """(batch, [bos] + 2 * half): random tokens, said twice. vocab: the number of tokens, or the ids to draw from."""
    generator = t.Generator().manual_seed(seed)
    pool = vocab if isinstance(vocab, Tensor) else t.arange(vocab)
    once = pool[t.randint(len(pool), (batch, half), generator=generator)]
    return t.cat([*([t.full((batch, 1), bos)] if bos is not None else []), once, once], dim=1)


def stripe(pattern: Tensor, offset: int, start: int = 0) -> Tensor:
    """Mean attention (head) that queries from position start on pay to the key `offset` places back. pattern: (batch, head, query, key)."""
    return pattern.diagonal(-offset, dim1=-2, dim2=-1)[..., max(start - offset, 0):].mean((0, -1))


def head_scores(model: nn.Module, n_layers: int, tokens: Tensor, half: int) -> dict[str, Tensor]:
    """
    Each score (layer, head) in 0..1, on tokens from repeated_tokens: 'prefix_matching' (attention to the token after the earlier
    copy, Olsson et al. 2022), 'previous_token', 'duplicate_token' (attention to the earlier copy itself), 'first_token'.
    """
    second = tokens.shape[1] - half
    scores: dict[str, list[Tensor]] = {"prefix_matching": [], "previous_token": [], "duplicate_token": [], "first_token": []}
    with t.no_grad(): _, cache = run_with_cache(model, tokens, [act_name("pattern", layer) for layer in range(n_layers)])
    for layer in range(n_layers):
        pattern = cache["pattern", layer].float()
        scores["prefix_matching"].append(stripe(pattern, half - 1, second))
        scores["previous_token"].append(stripe(pattern, 1, 2))
        scores["duplicate_token"].append(stripe(pattern, half, second))
        scores["first_token"].append(pattern[:, :, 2:, 0].mean((0, 2)))
    return {name: t.stack(rows).cpu() for name, rows in scores.items()}


#%% Direct logit attribution: embedding, positions, every head x source, every neuron, every bias; with the final norm's scale frozen they sum to the logit
def centres(model: nn.Module) -> bool:
    """LayerNorm subtracts the mean and has a bias; RMSNorm neither."""
    return getattr(model.ln_final, "bias", None) is not None


def read_out(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """(d_model, token): the unembedding with the final norm's weight folded in and, for LayerNorm, centred; all tokens or those of ids."""
    W = model.ln_final.weight[:, None] * (model.W_U if ids is None else model.W_U[:, ids])
    return (W - W.mean(0) if centres(model) else W).float()


def per_head(x: Tensor, n_heads: int) -> Tensor:
    """Keys or values (batch, pos, kv head, d_head), repeated for the query heads that share them."""
    return x.repeat_interleave(n_heads // x.shape[2], 2)


@t.no_grad()
def logit_parts(model: nn.Module, tokens: Tensor, token: int, position: int = -1) -> dict[str, Tensor]:
    """
    Parts of the logit of `token` at one position of tokens (1, pos): 'embed', 'pos_embed' (), 'heads' (layer, head, source), 'attn_bias' (layer),
    'mlp' (layer), 'constant' () (the final norm's bias), and 'logit', which they sum to; 'neurons' (layer, d_mlp) and 'mlp_bias' (layer) sum to 'mlp'.
    The final norm's scale is frozen at its value there. Ours or a TransformerBridge, grouped queries too. Weights: unprocessed, read_out's fold apart.
    """
    layers, n_heads = range(model.cfg.n_layers), model.cfg.n_heads
    has_pos, has_neurons = hasattr(model, "W_pos") or hasattr(model, "pos_embed"), all(hasattr(block.mlp, "W_out") for block in model.blocks)
    names = [act_name(short, layer) for layer in layers for short in ("v", "pattern", "mlp_out") + ("post",) * has_neurons]
    logits, cache = run_with_cache(model, tokens, [*names, act_name("resid_pre", 0), "ln_final.hook_scale", *["hook_pos_embed"] * has_pos])
    g = read_out(model, t.tensor([token], device=tokens.device))[:, 0] / cache["ln_final.hook_scale"][0, position]
    none = g.new_zeros(())
    bias = lambda linear: none if getattr(linear, "bias", None) is None else linear.bias.float() @ g
    positional = cache["hook_pos_embed"][0, position].float() @ g if has_pos else none
    heads = [einsum(cache["pattern", l][0, :, position].float(), per_head(cache["v", l], n_heads)[0].float(), model.blocks[l].attn.W_O.float() @ g, "head source, source head d_head, head d_head -> head source") for l in layers]
    parts = {
        "embed": cache["resid_pre", 0][0, position].float() @ g - positional, "pos_embed": positional, "heads": t.stack(heads), "attn_bias": t.stack([bias(model.blocks[l].attn.o) for l in layers]),
        "mlp": t.stack([cache["mlp_out", l][0, position].float() @ g for l in layers]), "constant": model.ln_final.bias.float() @ model.W_U[:, token].float() if centres(model) else none, "logit": logits[0, position, token].float(),
    }
    if has_neurons: parts |= {"neurons": t.stack([cache["post", l][0, position].float() * (model.blocks[l].mlp.W_out.float() @ g) for l in layers]), "mlp_bias": t.stack([bias(model.blocks[l].mlp.out) for l in layers])}
    return parts


def parts_error(parts: dict[str, Tensor]) -> float:
    """How far the parts miss the logit, and the neurons the MLPs, relative to max(1, |logit|)."""
    miss = [sum(parts[name].sum() for name in ("embed", "pos_embed", "heads", "attn_bias", "mlp", "constant")) - parts["logit"]]
    if "neurons" in parts: miss.append((parts["neurons"].sum(1) + parts["mlp_bias"] - parts["mlp"]).abs().max())
    return max(abs(x.item()) for x in miss) / max(1.0, abs(parts["logit"].item()))


#%% Head catalogue: a role is named only above a floor and above the best of all heads where the role's structure is shuffled away
FLOORS = {"previous token": 0.3, "duplicate token": 0.3, "induction": 0.3, "text-begin sink": 0.5, "copying": 0.95}


def role_targets(tokens: Tensor) -> dict[str, Tensor]:
    """Where each role looks, True in (row, query, key); induction: the key after an earlier copy of the query."""
    place = t.arange(tokens.shape[1], device=tokens.device)
    back, same = place[:, None] - place, tokens[:, :, None] == tokens[:, None]
    targets = {"previous token": ((back == 1) & (back[:, :1] > 1)).expand_as(same), "text-begin sink": ((place == 0) & (back[:, :1] > 1)).expand_as(same)}
    return targets | {"duplicate token": same & (back > 0), "induction": F.pad(same[:, :, :-1], (1, 0)) & (back > 0)}


def attention_on(pattern: Tensor, targets: Tensor) -> Tensor:
    """(head) attention (row, head, query, key) paid to targets (row, query, key), averaged over the queries that have one."""
    asked = targets.any(-1)
    return einsum(pattern, targets.to(pattern.dtype), "row head query key, row query key -> head") / asked.sum()


@t.no_grad()
def catalogue(model: nn.Module, tokens: Tensor, shuffles: int = 20, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, float], dict[str, list[str]]]:
    """
    Scores {role: (layer, head)}, bars {role: float} and names {head: its roles}, for rows (batch, pos) that start with beginning-of-text and repeat
    (utils.repeated_tokens). Ours or a TransformerBridge. 'copying' is by OV score: of the other tokens in the rows, the share whose logit the head's
    value-output map, fed a token, raises less than that token's own (0.5 is chance; the direct path from real values, through read_out's weights).
    The bar is the larger of the role's floor and the 99th percentile, over shuffles, of the maximum over all heads: shuffled are each query's keys
    (previous token, sink), the tokens behind the first (duplicate, induction) or the tokens' names (copying).
    """
    generator, layers, n_heads, targets = t.Generator().manual_seed(seed), range(model.cfg.n_layers), model.cfg.n_heads, role_targets(tokens)
    if not targets["induction"].any(): fail("the head catalogue needs rows that repeat tokens: utils.repeated_tokens")
    chosen = t.randperm(tokens.numel(), generator=generator)[:256].to(tokens.device)
    ids, own = tokens.flatten()[chosen].unique(return_inverse=True)
    U, looks = read_out(model, ids), {role: [mask] for role, mask in targets.items()}
    hidden = t.ones_like(targets["induction"][0]).triu(1).cpu()
    for _ in range(shuffles):
        order = t.rand(targets["induction"].shape, generator=generator).masked_fill(hidden, 2.0).argsort(-1).to(tokens.device)
        for role in ("previous token", "text-begin sink"): looks[role].append(targets[role].gather(-1, order))

    def measure(rows: Tensor, looks: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """{role: (look, layer, head)}"""
        found: dict[str, list[Tensor]] = {role: [] for role in looks}
        def fn(pattern: Tensor, hook: nn.Module) -> None:
            for role, masks in looks.items(): found[role].append(t.stack([attention_on(pattern.float(), mask) for mask in masks]).cpu())
        with hooks(model, [(act_name("pattern", layer), fn) for layer in layers]): model(rows)
        return {role: t.stack(x, 1) for role, x in found.items()}

    found, content = measure(tokens, looks), {role: targets[role] for role in ("duplicate token", "induction")}
    for _ in range(shuffles):
        order = t.rand(tokens[:, 1:].shape, generator=generator).argsort(1).to(tokens.device)
        null = measure(t.cat([tokens[:, :1], tokens[:, 1:].gather(1, order)], 1), {role: [mask] for role, mask in content.items()})
        found |= {role: t.cat([found[role], null[role]]) for role in content}
    names = [own, *(own[t.randperm(len(own), generator=generator).to(own.device)] for _ in range(shuffles))]
    _, cache = run_with_cache(model, tokens, [act_name("v", layer) for layer in layers])
    copying = []
    for layer in layers:
        out = einsum(per_head(cache["v", layer], n_heads).flatten(0, 1)[chosen].float(), model.blocks[layer].attn.W_O.float(), U, "place head d_head, head d_head d_model, d_model token -> place head token")
        rank = out.argsort(-1).argsort(-1) / (len(ids) - 1)
        copying.append(t.stack([rank.gather(-1, name[:, None, None].expand(-1, n_heads, 1)).mean((0, 2)) for name in names]).cpu())
    found["copying"] = t.stack(copying, 1)
    bars = {role: max(FLOORS[role], x[1:].flatten(1).amax(1).quantile(0.99).item()) for role, x in found.items()}
    scores = {role: x[0] for role, x in found.items()}
    return scores, bars, {f"L{layer}H{head}": [role for role in scores if scores[role][layer, head] > bars[role]] for layer in layers for head in range(n_heads)}


#%% Neuron catalogue: where the strongest neurons fire, and which tokens they raise
@t.no_grad()
def neuron_catalogue(model: nn.Module, rows: Tensor, layer: int, n: int = 4, contexts: int = 5) -> list[dict]:
    """The n neurons of a layer with the largest peak activation x ||W_out||: 'neuron', 'peaks' [(activation, row, position)], 'effect' (d_vocab) on the logits by the direct path (read_out's weights, scale of the final norm left out)."""
    _, cache = run_with_cache(model, rows, act_name("post", layer))
    acts, W_out, U, found = cache["post", layer].float(), model.blocks[layer].mlp.W_out.float(), read_out(model), []
    best, position = acts.max(1)  # row neuron
    for neuron in (best.amax(0) * W_out.norm(dim=-1)).topk(n).indices.tolist():
        top = best[:, neuron].topk(min(contexts, len(rows))).indices.tolist()
        effect = W_out[neuron] @ U
        found.append({"neuron": neuron, "peaks": [(best[row, neuron].item(), row, position[row, neuron].item()) for row in top], "effect": (effect - effect.mean()).cpu()})
    return found
