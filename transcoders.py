"""
Transcoders (Dunefsky et al. 2024): what enters an MLP becomes features, and these become what the MLP writes. The
objective and its training for all layers at once, SAELens's folders and releases, and judging by replacing the MLPs.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from utils import (  # first: sets OpenMP's variables before torch is loaded
    BAR,
    Count,
    Natural,
    Positive,
    endc,
    fail,
    find_folder,
    gray,
    set_seed,
    versions,
    yellow,
)
from hooks import act_name, harvest, hook_points, in_batches, run_with_hooks
from data import Corpus
from layers import next_token_loss
from sae import fingerprint, keep_top, learning_rate_factor, open_release, text_places
from features import recovered, sparse

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix, vstack
from torch import Tensor
from tqdm import tqdm


#%% The transcoder: an encoder with a threshold, a decoder, and where asked for a linear map beside them
@dataclass
class TranscoderShape:
    d_in: int
    d_sae: int
    d_out: int


class Transcoder(nn.Module):
    """
    x (..., d_in), read at hook_in, becomes features (..., d_sae), of which few are not zero, and these become what the
    MLP writes at hook_out (..., d_out). A feature is its pre-activation where that is above its threshold (JumpReLU;
    ReLU with threshold 0), else 0. With skip, a linear map of x is added (Paulo et al. 2025).
    """

    def __init__(self, d_in: int, d_sae: int, d_out: int, skip: bool, hook_in: str = "", hook_out: str = ""):
        super().__init__()
        self.cfg = TranscoderShape(d_in, d_sae, d_out)
        self.hook_in = hook_in
        self.hook_out = hook_out
        self.W_enc = nn.Parameter(F.normalize(t.randn(d_in, d_sae), dim=0))
        self.b_enc = nn.Parameter(t.zeros(d_sae))
        self.W_dec = nn.Parameter(F.normalize(t.randn(d_sae, d_out), dim=1))
        self.b_dec = nn.Parameter(t.zeros(d_out))
        self.W_skip = nn.Parameter(t.zeros(d_out, d_in)) if skip else None
        self.register_buffer("threshold", t.zeros(d_sae))

    @property
    def layer(self) -> int:
        return int(re.search(r"blocks\.(\d+)\.", self.hook_out)[1])

    def pre_activations(self, x: Tensor) -> Tensor:
        return x @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        pre = self.pre_activations(x)
        return pre.relu() * (pre > self.threshold)

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ self.W_dec + self.b_dec

    def skipped(self, x: Tensor) -> Tensor:
        """What goes past the features (..., d_out)."""
        if self.W_skip is None:
            return x.new_zeros(*x.shape[:-1], self.cfg.d_out)
        return x @ self.W_skip.T

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x)) + self.skipped(x)


#%% The objective: what the MLP writes, from few features of what enters it
def keep_strongest(acts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """BatchTopK (Bussmann et al. 2024): acts (row, d_sae) with all but the n largest of the batch zero; the least kept."""
    least = acts.flatten().topk(n, sorted=False).values.min()
    return acts * (acts >= least), least


def transcoder_loss(coder: Transcoder, x: Tensor, y: Tensor, k: float, dead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Squared error of what the MLP writes, y (row, d_out), summed over d_out, told from x (row, d_in) by k features a row
    (mean of the batch); plus a loss that brings the dead features (d_sae, bool) back to life. Also which features fired
    (d_sae), and the least activation that was kept.
    """
    n_kept = max(1, int(k * len(x)))
    acts, least = keep_strongest(coder.pre_activations(x).relu(), n_kept)
    error = y - coder.decode(acts) - coder.skipped(x)
    loss = error.pow(2).sum(-1).mean()
    if dead.any():
        loss = loss + dead_feature_loss(coder, x, error.detach(), dead)
    return loss, (acts > 0).any(0), least.detach()


def dead_feature_loss(coder: Transcoder, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """
    AuxK (Gao et al. 2024), as sae.dead_feature_loss: the strongest dead features learn to say what the living leave
    over, error (row, d_out). Only their columns are computed.
    """
    n_dead = int(dead.sum())
    k_aux = x.shape[-1] // 2
    only_dead = x @ coder.W_enc[:, dead] + coder.b_enc[dead]
    said = keep_top(only_dead, min(k_aux, n_dead)) @ coder.W_dec[dead]
    return min(1.0, n_dead / k_aux) * (said - error).pow(2).sum(-1).mean()


THRESHOLD_MEMORY = 0.98  # of the exponential mean over steps that a threshold is


def train_transcoders(
    pairs: Iterator[tuple[Tensor, Tensor]],
    d_sae: int,
    k: float,
    skip: bool,
    steps: int,
    lr: float,
    dead_window: int,
) -> list[Transcoder]:
    """
    One transcoder for each layer, minimising the objective over pairs (x, y), each (layer, row, d). They are trained on
    x and y scaled to a mean norm of sqrt(d), and returned for unscaled ones. Decoder rows are kept at unit length; the
    threshold is the mean over the last steps of the least activation that was kept.
    """
    x, y = next(pairs)  # says the scales, and where the biases begin
    n_layers, _, d_in = x.shape
    d_out = y.shape[-1]
    scale_in = d_in**0.5 / x.norm(dim=-1).mean(-1)  # (layer)
    scale_out = d_out**0.5 / y.norm(dim=-1).mean(-1)
    coders = nn.ModuleList(Transcoder(d_in, d_sae, d_out, skip) for _ in range(n_layers)).to(x.device)
    for layer, coder in enumerate(coders):
        coder.b_dec.data = y[layer].mean(0) * scale_out[layer]
    optimizer = t.optim.Adam(coders.parameters(), lr=lr)
    idle = t.zeros(n_layers, d_sae, device=x.device)  # steps since each feature fired
    for step in tqdm(range(steps), desc="transcoders of all layers", **BAR):
        optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(step, steps)
        x, y = next(pairs)
        for layer, coder in enumerate(coders):
            loss, fired, least = transcoder_loss(
                coder,
                x[layer] * scale_in[layer],
                y[layer] * scale_out[layer],
                k=k,
                dead=idle[layer] > dead_window,
            )
            loss.backward()
            nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
            idle[layer] = t.where(fired, 0.0, idle[layer] + 1)
            follow(coder.threshold, least, 0.0 if step == 0 else THRESHOLD_MEMORY)
        optimizer.step()
        optimizer.zero_grad()
        for coder in coders:
            coder.W_dec.data = F.normalize(coder.W_dec.data, dim=1)
    for layer, coder in enumerate(coders):
        unscale(coder, scale_in[layer], scale_out[layer])
    return list(coders.requires_grad_(False).eval())


def follow(mean: Tensor, value: Tensor, memory: float) -> None:
    """An exponential mean over steps, in place."""
    mean.mul_(memory).add_(value, alpha=1 - memory)


@t.no_grad()
def unscale(coder: Transcoder, scale_in: Tensor, scale_out: Tensor) -> None:
    """The same function of activations that are not multiplied by these, in place."""
    coder.W_enc.mul_(scale_in)
    coder.W_dec.div_(scale_out)
    coder.b_dec.div_(scale_out)
    if coder.W_skip is not None:
        coder.W_skip.mul_(scale_in / scale_out)


#%% Settings: which transcoders of which model, and how they are trained
@dataclass
class TranscoderConfig:
    """
    What decides which transcoders are meant; the stories add their own settings. Equal settings find the same finished
    ones again.
    """

    model: str | None = None  # a hub name or a folder; default models/world, or what the transcoders' metadata names
    transcoders: str | None = None  # a folder of SAELens's transcoder folders, one a layer, instead of training
    release: str | None = None  # a release of SAELens's registry, as gemma-scope-2b-pt-transcoders
    sae_ids: tuple[str, ...] = ()  # and its transcoders, one for each layer, as layer_0/width_16k/average_l0_76
    skip: bool = False  # a linear map beside the features (Paulo et al. 2025)
    d_sae: Count = 512  # features of each layer
    k: Positive = 12.0  # features a token, mean of a batch
    steps: Count = 400
    batch: Count = 1024  # tokens per step
    lr: Positive = 5e-3
    dead_window: Count = 50  # steps without firing after which training counts a feature as dead
    context: Count = 64  # tokens per row
    # world, stdlib, a text file or folder, a hub dataset; default world for models/world, else stdlib
    data: str | None = None
    bos: bool | None = None  # a beginning-of-text token first; default as the model's own tokenizer says
    heldout: Count = 40_000  # tokens that the transcoders are judged and read on
    seed: Natural = 0


# what does not change a training by itself: of the model and the data, fit_transcoders names what they are
NOT_OF_TRAINING = ("model", "transcoders", "release", "sae_ids", "context", "data", "bos", "heldout")


def of_training(cfg: TranscoderConfig) -> dict[str, object]:
    """The settings that decide what a training ends with: transcoders of the same ones are found again."""
    names = [setting.name for setting in fields(TranscoderConfig) if setting.name not in NOT_OF_TRAINING]
    return {name: getattr(cfg, name) for name in names}


def refuse_settings(cfg: TranscoderConfig) -> None:
    """Settings that say no one thing, or by which nothing can be trained, before anything is loaded."""
    if cfg.k > cfg.d_sae:
        fail(f"--k {cfg.k:g} features of {cfg.d_sae} make no sense: --d-sae is as many or more")
    if cfg.context < 2:
        fail("--context is 2 tokens or more: the first of a row is no text")
    if cfg.transcoders and cfg.release:
        fail("--transcoders and --release both name transcoders: give one of them")
    if cfg.release and not (cfg.sae_ids and cfg.model):
        fail("--release needs --sae-ids, the release's transcoder of every layer, and --model, which they belong to")


#%% Training on a model's text, or finding what was trained before
def places_of(model: nn.Module) -> tuple[list[str], list[str]]:
    """The hooks of what enters each MLP (after the norm's division, before its weight) and of what it writes."""
    layers = range(model.cfg.n_layers)
    enters = [f"blocks.{layer}.ln2.hook_normalized" for layer in layers]
    written = [act_name("mlp_out", layer) for layer in layers]
    known = hook_points(model)
    absent = [name for name in (*enters, *written) if name not in known]
    if absent:
        fail(
            f"no hook {absent[0]} in this model: transcoders need blocks with a norm before the MLP and an output of its own"
        )
    return enters, written


def mlp_pairs(
    model: nn.Module,
    enters: list[str],
    written: list[str],
    batch: Callable[[int], Tensor],
    size: int,
    bos: int | None,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Without end (x, y), each (layer, size, d): what enters every MLP and what it writes, at the same tokens of text, in
    random order among the rows (row, pos) that one batch(i) gives. The first token of a row and every beginning-of-text
    are no text.
    """
    generator = t.Generator().manual_seed(seed)
    i = 0
    while True:
        rows = batch(i)
        i += 1
        found = harvest(model, rows, [*enters, *written])
        is_text = text_places(rows, 1, bos)
        x = t.stack([found[name][is_text] for name in enters])
        y = t.stack([found[name][is_text] for name in written])
        if x.shape[1] < size:
            fail(
                f"{len(rows)} rows of text hold {x.shape[1]} tokens, fewer than a batch of {size}: --batch is too large"
            )
        order = t.randperm(x.shape[1], generator=generator).to(x.device)
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield x[:, chosen], y[:, chosen]


def fit_transcoders(
    model: nn.Module, cfg: TranscoderConfig, corpus: Corpus, name: str, device: str
) -> list[Transcoder]:
    """The transcoders of these settings, trained or found finished under checkpoints/transcoders/<key>."""
    enters, written = places_of(model)
    metadata = {
        "model_name": name,
        "prepend_bos": corpus.bos is not None,
        "context_size": cfg.context,
        "weights": fingerprint(model),
        "data": corpus.key,
    }
    identity = metadata | of_training(cfg)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    kind = "skip" if cfg.skip else "plain"
    folder = Path("checkpoints/transcoders") / f"{kind}_{cfg.k:g}_{cfg.d_sae}_{digest}"
    if folder.is_dir():
        print(f"{gray}trained before: {folder}{endc}")
        return open_folders(folder, device)
    print(
        f"{gray}training {len(enters)} transcoders ({kind}, {cfg.k:g} of {cfg.d_sae} features) of {name} on "
        f"{cfg.steps * cfg.batch / 1e3:.0f}k tokens ...{endc}"
    )
    set_seed(cfg.seed)
    n_rows = max(1, 16 * cfg.batch // cfg.context)

    def token_rows(i: int) -> Tensor:
        rng = np.random.default_rng((cfg.seed, 1, i))
        return corpus.batch(rng, n_rows, cfg.context).to(device)

    pairs = mlp_pairs(model, enters, written, token_rows, cfg.batch, corpus.bos, cfg.seed)
    coders = train_transcoders(pairs, cfg.d_sae, cfg.k, cfg.skip, cfg.steps, cfg.lr, cfg.dead_window)
    if not all(p.isfinite().all() for coder in coders for p in coder.parameters()):
        fail("training the transcoders diverged: lower --lr")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    for coder, hook_in, hook_out in zip(coders, enters, written):
        coder.hook_in = hook_in
        coder.hook_out = hook_out
        save_transcoder(coder, aside / f"layer_{coder.layer}", metadata)
    if folder.is_dir():  # another run was as far before
        shutil.rmtree(aside)
    else:
        aside.rename(folder)
    return open_folders(folder, device)


#%% Files: a transcoder as SAELens writes it, read without importing the package
ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
FILES = ("cfg.json", "sae_weights.safetensors")


def save_transcoder(coder: Transcoder, folder: Path, metadata: dict) -> None:
    """A folder that SAE.load_from_disk opens as a JumpReLUTranscoder or JumpReLUSkipTranscoder."""
    skip = coder.W_skip is not None
    config = {
        "architecture": "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder",
        "d_in": coder.cfg.d_in,
        "d_sae": coder.cfg.d_sae,
        "d_out": coder.cfg.d_out,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": versions()["sae-lens"],
            "hook_name": coder.hook_in,
            "hook_name_out": coder.hook_out,
            **metadata,
        },
    }
    folder.mkdir(parents=True)
    (folder / FILES[0]).write_text(json.dumps(config, indent=1) + "\n")
    save_file({name: x.detach().cpu().contiguous() for name, x in coder.state_dict().items()}, folder / FILES[1])


def read_transcoder(folder: Path, device: str) -> tuple[Transcoder, dict]:
    """A transcoder of SAELens's folder, and its metadata."""
    config = json.loads((folder / FILES[0]).read_text())
    metadata = config.get("metadata", config)  # older files have them side by side
    return build(config, metadata, load_file(folder / FILES[1]), str(folder), device), metadata


def build(config: dict, metadata: dict, weights: dict[str, Tensor], source: str, device: str) -> Transcoder:
    """A transcoder of SAELens's settings and weights; what is computed otherwise here is refused."""
    architecture = config["architecture"]
    if architecture not in ARCHITECTURES:
        fail(f"{source} is a {architecture}, not a transcoder: sae_probe.py --sae takes autoencoders")
    norm = config.get("normalize_activations", "none")
    if norm != "none":
        fail(f"{source} normalises its input ({norm}), so that its features are not linear in it: not read here")
    if config.get("apply_b_dec_to_input", False):
        fail(f"{source} takes its decoder's bias from its input (apply_b_dec_to_input): not read here")
    if config.get("reshape_activations", "none") != "none":
        fail(f"{source} reshapes its input ({config['reshape_activations']}): not read here")
    missing = [key for key in ("hook_name", "hook_name_out") if not metadata.get(key)]
    if missing:
        fail(f"{source} does not say where it belongs: put {' and '.join(missing)} into its {FILES[0]}")
    d_in, d_sae = weights["W_enc"].shape
    d_out = weights["W_dec"].shape[1]
    coder = Transcoder(d_in, d_sae, d_out, "skip" in architecture, metadata["hook_name"], metadata["hook_name_out"])
    if "jumprelu" not in architecture:
        weights = weights | {"threshold": coder.threshold}  # a ReLU's, zero
    coder.load_state_dict(weights)
    return coder.to(device).float().requires_grad_(False).eval()


def open_folders(folder: str | Path, device: str) -> list[Transcoder]:
    """The transcoders under a folder, one for each layer, from the first on; all of the same model."""
    folder = Path(find_folder(str(folder)))
    found = sorted(path.parent for path in folder.glob("**/cfg.json") if (path.parent / FILES[1]).is_file())
    if not found:
        fail(f"--transcoders {folder}: no {' and '.join(FILES)} there (SAELens's save_model writes them)")
    coders, metadata = zip(*(read_transcoder(path, device) for path in found))
    for key in ("model_name", "weights"):
        named = {str(of_layer.get(key)) for of_layer in metadata}
        if len(named) > 1:
            fail(f"--transcoders {folder}: its layers are of several models ({key}: {', '.join(sorted(named))})")
    return in_order(list(coders), str(folder))


def names_of_model(folder: str | Path) -> tuple[str | None, str | None]:
    """The model that a folder's transcoders name, and the fingerprint of its weights, where they have them."""
    folder = Path(find_folder(str(folder)))
    first = min((path for path in folder.glob("**/cfg.json") if (path.parent / FILES[1]).is_file()), default=None)
    if first is None:
        fail(f"--transcoders {folder}: no {FILES[0]} there (SAELens's save_model writes it)")
    config = json.loads(first.read_text())
    metadata = config.get("metadata", config)
    return metadata.get("model_name"), metadata.get("weights")


def open_releases(release: str, sae_ids: tuple[str, ...], device: str) -> list[Transcoder]:
    """Transcoders of SAELens's registry, one for each layer."""
    coders = []
    for sae_id in sae_ids:
        theirs = open_release(release, sae_id, device, transcoder=True)
        metadata = vars(theirs.cfg.metadata)
        weights = {name: x.detach() for name, x in theirs.state_dict().items()}
        coders.append(build(theirs.cfg.to_dict(), metadata, weights, f"{release} {sae_id}", device))
    return in_order(coders, release)


def in_order(coders: list[Transcoder], source: str) -> list[Transcoder]:
    coders = sorted(coders, key=lambda coder: coder.layer)
    layers = [coder.layer for coder in coders]
    if layers != list(range(len(coders))):
        fail(f"{source} has transcoders of the layers {layers}: one of every layer from 0 on is needed, and no more")
    return coders


def refuse_misfits(model: nn.Module, coders: list[Transcoder], tokens: Tensor, weights: str | None = None) -> None:
    """Transcoders that are not this model's, in one line. weights: the fingerprint that they name."""
    if weights and weights != fingerprint(model):
        fail(f"the transcoders were trained on other weights ({weights}) than this model's ({fingerprint(model)})")
    if len(coders) != model.cfg.n_layers:
        fail(f"{len(coders)} transcoders for a model of {model.cfg.n_layers} layers: one of every layer is needed")
    widths = {}
    for coder in coders:
        widths |= {coder.hook_in: coder.cfg.d_in, coder.hook_out: coder.cfg.d_out}
    known = hook_points(model)
    for hook in widths:
        if hook not in known:
            fail(f"the transcoders belong at {hook}, which this model has not: give their model by --model")
    found = harvest(model, tokens, list(widths))
    for hook, width in widths.items():
        has = found[hook].shape[-1]
        if has != width:
            fail(f"a transcoder has {width} numbers at {hook}, this model {has}: give its model by --model")


#%% Judging: the MLPs of held-out text replaced, one by one and all at once
def splice(coder: Transcoder, is_text: Tensor) -> list[tuple]:
    """Hooks that put what the transcoder writes in the place of the MLP's output, where is_text (batch, pos)."""
    read = {}

    def listen(x: Tensor, hook: nn.Module) -> None:
        read["x"] = x.float()

    def replace(y: Tensor, hook: nn.Module) -> Tensor:
        return t.where(is_text[..., None], coder(read["x"]).to(y.dtype), y)

    return [(coder.hook_in, listen), (coder.hook_out, replace)]


def put_mean(coder: Transcoder, mean: Tensor, is_text: Tensor) -> list[tuple]:
    """A hook that puts the mean of what the MLP writes (d_out) in its place, where is_text (batch, pos)."""

    def replace(y: Tensor, hook: nn.Module) -> Tensor:
        return t.where(is_text[..., None], mean.to(y.dtype), y)

    return [(coder.hook_out, replace)]


@t.no_grad()
def encode_layers(
    model: nn.Module, coders: list[Transcoder], rows: Tensor, first: int, bos: int | None
) -> tuple[list[csr_matrix], list[float], list[Tensor]]:
    """
    Of each layer: the codes (token, feature) of rows from position `first` on, zero where no text stands; of the text,
    the fraction of the variance of what the MLP writes that is unexplained, and its mean (d_out).
    """
    hooks = [hook for coder in coders for hook in (coder.hook_in, coder.hook_out)]

    def of_rows(part: Tensor) -> list[tuple]:
        found = harvest(model, part, hooks)
        is_text = text_places(part, first, bos)[:, first:, None]
        told = []
        for coder in coders:
            x = found[coder.hook_in][:, first:]
            y = found[coder.hook_out][:, first:] * is_text
            acts = coder.encode(x) * is_text
            missed = (y - (coder.decode(acts) + coder.skipped(x)) * is_text).pow(2).sum().item()
            told.append((sparse(acts.flatten(0, 1)), missed, y.pow(2).sum().item(), y.sum((0, 1))))
        return told

    n_text = int(text_places(rows, first, bos).sum())
    by_layer = list(zip(*in_batches(of_rows, rows, 64)))
    codes = []
    unexplained = []
    means = []
    for parts in by_layer:
        codes_of_parts, missed, squares, totals = zip(*parts)
        mean = sum(totals) / n_text
        variance = sum(squares) - n_text * mean.pow(2).sum().item()
        codes.append(vstack(codes_of_parts, format="csr"))
        unexplained.append(sum(missed) / variance)
        means.append(mean)
    return codes, unexplained, means


@t.no_grad()
def loss_with(
    model: nn.Module, rows: Tensor, first: int, bos: int | None, edits: Callable[[Tensor], list[tuple]]
) -> float:
    """Mean cross-entropy in nats of rows under the hooks edits(is_text)."""

    def summed(part: Tensor) -> float:
        is_text = text_places(part, first, bos)
        return next_token_loss(run_with_hooks(model, part, edits(is_text)), part, "sum").item()

    return sum(in_batches(summed, rows, 64)) / rows[:, 1:].numel()


@t.no_grad()
def judge_transcoders(
    model: nn.Module, coders: list[Transcoder], rows: Tensor, first: int, bos: int | None = None, ce_rows: int = 64
) -> tuple[list[dict[str, float]], list[csr_matrix]]:
    """
    Numbers of each layer, and last of all layers at once, for text that was not trained on; and each layer's codes.
    Cross-entropies, in nats, are of the first ce_rows rows: of the model as it is, with the transcoder in the place of
    the MLP, and with the mean of what the MLP writes there; recovered is the share of the loss between that the
    transcoder gives back.
    """
    codes, unexplained, means = encode_layers(model, coders, rows, first, bos)
    n_text = int(text_places(rows, first, bos).sum())
    few = rows[:ce_rows]
    clean = loss_with(model, few, first, bos, lambda is_text: [])

    def losses(chosen: list[int]) -> dict[str, float]:
        def spliced(is_text: Tensor) -> list[tuple]:
            return [edit for layer in chosen for edit in splice(coders[layer], is_text)]

        def removed(is_text: Tensor) -> list[tuple]:
            return [edit for layer in chosen for edit in put_mean(coders[layer], means[layer], is_text)]

        with_coders = loss_with(model, few, first, bos, spliced)
        with_means = loss_with(model, few, first, bos, removed)
        return {
            "ce_clean": clean,
            "ce_replaced": with_coders,
            "ce_mean_ablated": with_means,
            "ce_recovered": recovered(clean, with_coders, with_means),
        }

    judged = []
    for layer, code in enumerate(codes):
        fired = code.getnnz(0) > 0
        of_layer = {"l0": code.nnz / n_text, "fvu": unexplained[layer], "dead_fraction": float((~fired).mean())}
        judged.append(of_layer | losses([layer]))
    of_all = {key: float(np.mean([layer[key] for layer in judged])) for key in ("l0", "fvu", "dead_fraction")}
    judged.append(of_all | losses(list(range(len(coders)))))
    return judged, codes


def warn_of_bad_transcoders(judged: list[dict[str, float]], least: float) -> None:
    """A line for all layers replaced at once where little of the cross-entropy is left."""
    share = judged[-1]["ce_recovered"]
    if not share >= least:  # nan too
        print(
            f"{yellow}with all MLPs replaced {share:.2f} of the cross-entropy is recovered: much of a graph will be "
            f"errors (more --steps, --d-sae or --k){endc}"
        )
