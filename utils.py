"""What every script shares: colours, figures, results, hooks and caches that raise, the model loader, tokens of any model."""
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
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import plotly.graph_objects as go
import psutil
import torch as t
import torch.nn as nn
from dotenv import dotenv_values
from safetensors import safe_open
from tokenizers import Tokenizer
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

ROOT = Path(__file__).parent
WORLD = ROOT / "models/world"
BAR = dict(ascii=" >=", bar_format="{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]", mininterval=0.2 if sys.stderr.isatty() else 10)  # tqdm: information on the left
BRIEF = BAR | dict(delay=2, leave=False)  # for what is often done in a moment

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
    return dotenv_values(ROOT / ".env").get(name) or None


def in_kernel() -> bool:
    """True in Jupyter and VS Code cells, where argv belongs to the kernel; `%run script.py --flags` is a script."""
    return "kernel_launcher" in sys.argv[0]

#%% Figures and results: a notebook shows figures, a script writes them
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000"]  # Okabe-Ito: readable by colour-blind eyes


def wandb_run():
    """The wandb run that is going on (--wandb), or None."""
    return getattr(sys.modules.get("wandb"), "run", None)


def show(fig: go.Figure, name: str) -> None:
    """name is 'script/figure'. A notebook shows it; a script writes figs/script/figure.html, with one plotly.min.js per folder."""
    fig.update_layout(template="plotly_white", colorway=COLORS, margin=dict(t=90), title=dict(font=dict(size=16)))
    if board := wandb_run(): board.log({name: fig})
    if in_kernel(): return fig.show()
    path = Path("figs") / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda p: fig.write_html(p, include_plotlyjs="directory"))
    print(f"{gray}figure: {path}{endc}")


def show_page(html: str, name: str) -> None:
    """Like show, for a self-contained HTML page."""
    if in_kernel():
        from IPython.display import HTML, display
        return display(HTML(f'<iframe srcdoc="{html.replace("&", "&amp;").replace(chr(34), "&quot;")}" width="100%" height="500"></iframe>'))
    path = Path("figs") / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda p: p.write_text(html))
    print(f"{gray}page: {path}{endc}")


#%% A page to read features by: search, sort, and link to one as page.html#f123
FEATURE_PAGE = """<!doctype html><meta charset="utf-8"><title>Features</title><style>body{font:15px sans-serif;margin:24px;max-width:1100px}input,select{font:inherit;padding:4px}
article{border-top:1px solid #ccc;padding:10px 0}.aim{background:#FFF8E7}pre{margin:2px 0;white-space:pre-wrap;font:13px monospace}
.bar{display:inline-block;width:8px;background:#0072B2;margin-right:1px;vertical-align:bottom}small{color:#555}a{color:#0072B2}</style><h1>TITLE</h1>
<p><input id="q" placeholder="search tokens, concepts, numbers" size="34"> sort by <select id="s"><option value="density">density<option value="max">largest activation<option value="id">number</select> <small id="n"></small></p><main></main><button id="more">more</button>
<script>const F=DATA,$=id=>document.getElementById(id),main=document.querySelector("main");let shown=40;
const el=(tag,text,to)=>{const e=document.createElement(tag);if(text!=null)e.textContent=text;to.append(e);return e};
for(const f of F)f.text=("f"+f.id+" "+[f.concepts,f.up,f.down].map(x=>x.join(" ")).join(" ")+" "+f.contexts.map(c=>c[0].join("")).join(" ")).toLowerCase();
function links(name,list,to){const p=el("small",name+": ",to);for(const[j,x]of list){el("a","f"+j,p).href="#f"+j;p.append(" "+x+"  ")}el("br",null,to)}
function card(f,aim){const a=el("article",null,main);if(aim)a.className="aim";const h=el("h3",null,a);el("a","f"+f.id,h).href="#f"+f.id;h.append(" "+f.concepts.join(", "));
el("small","active on "+(100*f.density).toPrecision(2)+"% of tokens, at most "+f.max+" ",a);const top=Math.max(...f.histogram,1);
for(const x of f.histogram){const b=el("span",null,a);b.className="bar";b.title=x+" tokens";b.style.height=Math.round(26*Math.log1p(x)/Math.log1p(top))+"px"}el("br",null,a);
if(f.up.length){el("small","promotes "+f.up.join(" ")+" | suppresses "+f.down.join(" "),a);el("br",null,a)}
for(const[words,shades]of f.contexts){const p=el("pre",null,a);words.forEach((w,i)=>{const s=el("span",w,p);s.title=shades[i]+"% of the largest";if(shades[i])s.style.background="rgba(230,159,0,"+(.15+.85*shades[i]/100)+")"})}
links("fires with",f.with,a);links("points like",f.near,a)}
function draw(){main.replaceChildren();const aim=F.find(f=>"#f"+f.id==location.hash);if(aim)card(aim,true);const words=$("q").value.toLowerCase().split(" ").filter(Boolean),key=$("s").value;
const found=F.filter(f=>f!=aim&&words.every(w=>f.text.includes(w))).sort((a,b)=>key=="id"?a.id-b.id:b[key]-a[key]);found.slice(0,shown).forEach(f=>card(f));
$("n").textContent=found.length+" of "+F.length+" features";$("more").hidden=found.length<=shown;if(aim)scrollTo(0,0)}
$("q").oninput=$("s").onchange=()=>{shown=40;draw()};onhashchange=draw;$("more").onclick=()=>{shown+=40;draw()};draw()</script>"""


def feature_page(entries: list[dict], title: str) -> str:
    return FEATURE_PAGE.replace("TITLE", title.replace("<", "&lt;")).replace("DATA", json.dumps(entries, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


#%% Heatmaps, lines, labels, results
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
    for i, (name, y) in enumerate(lines.items()):  # when the colours are used up they come again, dotted
        fig.add_trace(go.Scatter(x=None if x is None else array(x), y=array(y), name=name, mode="lines+markers" if markers else "lines", line=dict(dash="dash" if name in dashed else "solid" if i < len(COLORS) else "dot"), hovertemplate=f"{name}<br>{xlabel} %{{x}}<br>{ylabel} %{{y:.4f}}<extra></extra>"))
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
    if board := wandb_run(): board.summary.update({key: value for key, value in numbers.items() if isinstance(value, int | float | str)})
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


def find_hooks(model: nn.Module, names: str | list[str] | Callable[[str], bool] | None, known: dict[str, nn.Module] | None = None) -> list[str]:
    """Hook names for a name, a *-pattern, a list of these, or a predicate; None is every name. Raises KeyError where nothing fits."""
    known = known or hook_points(model)
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

    chosen = [(name, fn) for names, fn in fwd_hooks for name in find_hooks(model, names, points)]
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

#%% The Llama family in Hugging Face's words: its config.json, and the names of its tensors (each part of a name has one of ours)
def read_llama_config(hf: dict, architectures: tuple[str, ...]) -> dict:
    """Fields of llama_block.LlamaConfig from a config.json; whatever is not built here ends the program rather than being left out."""
    name = (hf.get("architectures") or ["unknown"])[0]
    if name not in architectures: fail(f"architecture {name} is not built here (built: {', '.join(architectures)}); load_model opens it as a TransformerBridge")
    rope = hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {}), "rope_theta": hf.get("rope_theta", 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"): fail(f"rope type {kind!r} of {name} is not built here (built: default, llama3)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0: fail(f"partial rotary positions of {name} are not built here")
    if (act := hf.get("hidden_act", "silu")) != "silu": fail(f"activation {act!r} of {name} is not built here (built: silu)")
    if hf.get("mlp_bias"): fail(f"mlp_bias of {name} is not built here")
    n_layers, n_heads, window = hf["num_hidden_layers"], hf["num_attention_heads"], hf.get("sliding_window")
    if name.startswith("Qwen"):  # Qwen states a window that only some layers use, and only when told to
        kinds = hf.get("layer_types") or ["sliding_attention" if hf.get("use_sliding_window") and i >= hf.get("max_window_layers", n_layers) else "full_attention" for i in range(n_layers)]
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    else: windows = (window,) * n_layers
    return dict(
        n_layers=n_layers, n_heads=n_heads, n_kv_heads=hf.get("num_key_value_heads") or n_heads, d_model=hf["hidden_size"],
        d_head=hf.get("head_dim") or hf["hidden_size"] // n_heads, d_mlp=hf["intermediate_size"], d_vocab=hf["vocab_size"], n_ctx=hf["max_position_embeddings"],
        rope_base=rope["rope_theta"], rope_scaling=rope if kind == "llama3" else None, norm_eps=hf["rms_norm_eps"], tied=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("qkv_bias", True) if name.startswith("Qwen2") else hf.get("attention_bias", False), o_bias=hf.get("attention_bias", False) and not name.startswith("Qwen2"),
        qk_norm={"Qwen3ForCausalLM": "head", "Qwen3MoeForCausalLM": "head", "OlmoeForCausalLM": "full"}.get(name, "none"),
        windows=windows if any(windows) else (), architecture=name,
    )


def write_llama_config(cfg: object) -> dict:
    """config.json for transformers of a llama_block.LlamaConfig."""
    window = next((w for w in cfg.windows if w), None)
    hf = dict(
        architectures=[cfg.architecture], model_type=cfg.architecture.removesuffix("ForCausalLM").lower(), hidden_size=cfg.d_model, intermediate_size=cfg.d_mlp, num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads, head_dim=cfg.d_head, vocab_size=cfg.d_vocab, max_position_embeddings=cfg.n_ctx, rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tied, hidden_act="silu", rope_theta=cfg.rope_base, rope_parameters=cfg.rope_scaling or {"rope_type": "default", "rope_theta": cfg.rope_base}, sliding_window=window,
    )
    if cfg.architecture.startswith("Qwen"): hf |= dict(use_sliding_window=window is not None, layer_types=["sliding_attention" if w else "full_attention" for w in cfg.windows or [None] * cfg.n_layers])
    if not cfg.architecture.startswith("Qwen2"): hf |= dict(attention_bias=cfg.qkv_bias)
    return hf


PARTS = {
    "embed_tokens": "embed", "layers": "blocks", "norm": "ln_final", "lm_head": "unembed", "input_layernorm": "ln1", "post_attention_layernorm": "ln2", "self_attn": "attn",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "inp", "down_proj": "out",
}
THEIRS = {ours: theirs for theirs, ours in PARTS.items()}


def our_name(hf: str) -> str: return ".".join(PARTS.get(part, part) for part in hf.removeprefix("model.").split("."))
def hf_name(ours: str) -> str: return "model." * (not ours.startswith("unembed")) + ".".join(THEIRS.get(part, part) for part in ours.split("."))

#%% Models larger than memory: in memory where they fit, else their blocks come from the file when they are called
HINTS = {"gated": "accept its licence on the hub and put HF_TOKEN=... into .env", "offline": "fetch it where there is a network, or give a folder", "connect": "without a network, give a folder"}


def find_folder(name: str) -> str:
    """A folder as given, or beside the scripts; else a hub name."""
    folders = [folder.resolve() for folder in (Path(name), ROOT / name) if folder.is_dir()]
    return str(folders[0]) if folders else full_name(name)


def find_model(name: str) -> str:
    """The name, or the folder of that name beside this file (models/world), wherever the script is started. What cannot be read gets one line."""
    name = find_folder(name)
    has = lambda kind: any(Path(name).glob(kind))
    if name.endswith(".gguf") or (has("*.gguf") and not has("*.safetensors")): fail(f"{name}: GGUF files are made for llama.cpp and not read here: give the hub name or the safetensors folder that it was made from")
    try: read_config(name)
    except SystemExit as error: fail(f"{error}{''.join(f' ({hint})' for word, hint in HINTS.items() if word in str(error).lower())}")
    if Path(name).is_dir() and not has("*.safetensors"): fail(f"no *.safetensors in {name}: save the weights there with model.save_pretrained")
    return name


class Entered(Exception): "Carries what enters the first block."


class Streamed(nn.Module):
    """
    A plain transformers model under accelerate's offload: a share `resident` of the blocks stays on the device, the others come from the checkpoint
    (memory-mapped) when they are called, and leave again. Hooks: blocks.L.hook_resid_pre and hook_resid_post.
    """

    def __init__(self, name: str, device: str, dtype: t.dtype, resident: float = 0.0):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        config = AutoConfig.from_pretrained(name, token=secret("HF_TOKEN"))
        shape = config.get_text_config()
        n_layers = shape.num_hidden_layers
        with t.device("meta"): empty = AutoModelForCausalLM.from_config(config)
        stack = next(path for path, module in empty.named_modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers) + "."
        owners = {path.rpartition(".")[0] for path, _ in [*empty.named_parameters(remove_duplicate=False), *empty.named_buffers()]}
        places = {path: device for path in owners if not path.startswith(stack)} | {f"{stack}{i}": device if i < int(resident * n_layers) else "disk" for i in range(n_layers)}
        self.converted = tempfile.TemporaryDirectory()  # for tensors that transformers keeps otherwise than the file does (experts)
        self.hf = AutoModelForCausalLM.from_pretrained(name, device_map=places, offload_folder=self.converted.name, dtype=dtype, token=secret("HF_TOKEN")).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(name, token=secret("HF_TOKEN"))
        self.cfg = SimpleNamespace(
            n_layers=n_layers, n_heads=shape.num_attention_heads, d_model=shape.hidden_size, d_mlp=getattr(shape, "intermediate_size", 4 * shape.hidden_size), d_vocab=shape.vocab_size,
            n_ctx=shape.max_position_embeddings, output_logits_soft_cap=getattr(shape, "final_logit_softcapping", None),
        )
        self.ln_final = [module for path, module in self.hf.named_modules() if not path.startswith(stack) and "norm" in type(module).__name__.lower()][-1]
        self.unembed, self.blocks = self.hf.get_output_embeddings(), nn.ModuleList(nn.Module() for _ in range(n_layers))
        self.layers = list(self.hf.get_submodule(stack[:-1]))
        for ours, theirs in zip(self.blocks, self.layers):
            ours.hook_resid_pre, ours.hook_resid_post = HookPoint(), HookPoint()
            theirs.register_forward_pre_hook(lambda _, args, ours=ours: (ours.hook_resid_pre(args[0]), *args[1:]))
            theirs.register_forward_hook(lambda _, args, out, ours=ours: (ours.hook_resid_post(out[0]), *out[1:]) if isinstance(out, tuple) else ours.hook_resid_post(out))

    @property
    def W_U(self) -> Tensor: return self.unembed.weight.T

    def forward(self, tokens: Tensor, stop_at_layer: int | None = None, **kwargs) -> Tensor:
        """Logits; with stop_at_layer 0 the stream that enters the first block, before any block is read."""
        if stop_at_layer is None: return self.hf(tokens, **{"use_cache": False} | kwargs).logits
        assert stop_at_layer == 0
        def leave(module: nn.Module, args: tuple) -> None: raise Entered(args[0])
        handle = self.layers[0].register_forward_pre_hook(leave, prepend=True)
        try: self.hf(tokens, use_cache=False)
        except Entered as found: return found.args[0]
        finally: handle.remove()


def open_model(name: str, ours: tuple[type, ...] = (), device: str = "auto", dtype: str = "auto", offload: str = "auto") -> nn.Module:
    """load_model, or Streamed where the weights do not fit (offload auto) or always (on)."""
    name, device, count = find_model(name), pick_device(device), 0
    torch_dtype = pick_dtype(device, dtype)
    for path in model_folder(name).glob("model*.safetensors"):
        with safe_open(path, "pt") as file: count += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    need, free = count * torch_dtype.itemsize, t.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
    if offload == "off" or (offload == "auto" and need < 0.85 * free): return load_model(name, ours, device, dtype)
    resident = 0.0 if offload == "on" else min(1.0, max(0.0, 0.8 * free / need - 0.15))  # embeddings stay too; the margin is for activations
    print(f"{yellow}{name}: {need / 1e9:.2f} GB of weights, {free / 1e9:.1f} GB free on {device}: {resident:.0%} of the blocks stay, the others come from disk at every pass; hooks on the residual stream only{endc}")
    return Streamed(name, device, torch_dtype, resident)

#%% Tokens of any model: its own tokenizer, beginning-of-text exactly once
def text_tokenizer(model: nn.Module) -> Tokenizer: return getattr(model.tokenizer, "backend_tokenizer", model.tokenizer)


def begin(model: nn.Module) -> int | None:
    """The beginning-of-text token this model reads, or None: what TransformerLens says of the architecture, else what the tokenizer does by itself."""
    bare, own = (text_tokenizer(model).encode("a", add_special_tokens=special).ids for special in (False, True))
    bos = getattr(model.tokenizer, "bos_token_id", own[0])
    return bos if getattr(model.cfg, "default_prepend_bos", own != bare and own[0] == bos) else None


def encode(model: nn.Module, text: str) -> list[int]:
    ids, bos = text_tokenizer(model).encode(text, add_special_tokens=False).ids, begin(model)
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def token_text(model: nn.Module, token: int) -> str:
    piece = text_tokenizer(model).id_to_token(token) or ""  # padded vocabularies have ids without a token
    return " " + piece[1:] if piece.startswith("▁") else text_tokenizer(model).decode([token], skip_special_tokens=False)


def about_bos(model: nn.Module) -> str:
    bos = begin(model)
    return "no beginning-of-text token: this model reads none" if bos is None else f"beginning-of-text token {token_text(model, bos)!r} ({bos}) put first, once"


def answer_token(model: nn.Module, prompt: str, answer: str) -> int:
    """The one token that `answer` is after the prompt, with a space before it or as given."""
    ids = encode(model, prompt)
    pieces = [whole[len(ids):] for form in (f" {answer.strip()}", answer) if (whole := encode(model, prompt + form))[:len(ids)] == ids]
    one = [piece[0] for piece in pieces if len(piece) == 1]
    if not one: fail(f"--answer {answer!r} is several tokens here ({' + '.join(repr(token_text(model, i)) for i in pieces[0])}): the lens follows one, so give the first: --answer {token_text(model, pieces[0][0])!r}")
    return one[0]
