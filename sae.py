"""
Sparse autoencoders: the objective and its training from scratch; then training by SAELens, loading by metadata,
judging, reading features, and acting on a model through them.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import (  # first: sets OpenMP's variables before torch is loaded
    BAR,
    AtLeastTwo,
    Count,
    Natural,
    Positive,
    endc,
    fail,
    find_folder,
    full_name,
    gray,
    load_model,
    on_base,
    set_seed,
    write_aside,
    yellow,
)
from settings import check_ranges
from plots import array, visible
from hooks import find_hooks, hook_points, in_batches, run_with_hooks
from weights import choose_bos, hash_of_model, text_tokenizer
from data import Corpus, str_tokens
from train import start_wandb
from anatomy import folded_W_U, harvest
from world import corpus_for, judging_rows
from layers import next_token_loss
from interventions import put

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from scipy.sparse import csc_matrix, csr_matrix, vstack
from torch import Tensor
from tqdm import trange


# The method in full is the next cell; stories run it with --architecture own (the k strongest features) or own_l1 (a
# penalty on their sum). Their default, batchtopk, and the other architectures are trained by SAELens
# (train_by_saelens), whose objectives are not in this file.
#%% The objective from scratch: an encoder, a decoder, and a loss that asks for x back from few features
class OwnSAE(nn.Module):
    """
    x (row, d_in) becomes features (row, d_sae), of which few are not zero, and these become x again. With k, only the k
    strongest of each row are kept (Gao et al. 2024); with k None, the loss penalises their sum by l1 (Bricken et al.
    2023). A decoder row counts as a unit vector: its length belongs to the feature.
    """

    def __init__(self, d_in: int, d_sae: int, k: int | None, l1: float = 0.0):
        super().__init__()
        self.k = k
        self.l1 = l1
        directions = F.normalize(t.randn(d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(0.1 * directions)
        self.W_enc = nn.Parameter(self.W_dec.detach().T.clone())
        self.b_enc = nn.Parameter(t.zeros(d_sae))
        self.b_dec = nn.Parameter(t.zeros(d_in))

    def pre_activations(self, x: Tensor) -> Tensor:
        return ((x - self.b_dec) @ self.W_enc + self.b_enc) * self.W_dec.norm(dim=1)

    def encode(self, x: Tensor) -> Tensor:
        acts = self.pre_activations(x).relu()
        return acts if self.k is None else keep_top(acts, self.k)

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ F.normalize(self.W_dec, dim=1) + self.b_dec


def keep_top(acts: Tensor, k: int) -> Tensor:
    """acts (row, d_sae) with all but the k largest of each row set to zero."""
    top = acts.topk(k)
    return t.zeros_like(acts).scatter(-1, top.indices, top.values)


def loss_terms(sae: OwnSAE, x: Tensor, dead: Tensor) -> dict[str, Tensor]:
    """
    reconstruction: squared error of x (row, d_in), summed over d_in. Beside it sparsity: l1 times the sum of the
    features (Bricken et al. 2023); or, where k keeps them few, revival of the dead features (d_sae, bool; Gao et al.
    2024).
    """
    acts = sae.encode(x)
    error = x - sae.decode(acts)
    reconstruction = error.pow(2).sum(-1).mean()
    if sae.k is None:
        return {"reconstruction": reconstruction, "sparsity": sae.l1 * acts.sum(-1).mean()}
    if not dead.any():
        return {"reconstruction": reconstruction, "revival": reconstruction.new_zeros(())}
    return {"reconstruction": reconstruction, "revival": dead_feature_loss(sae, x, error.detach(), dead)}


def sae_loss(sae: OwnSAE, x: Tensor, dead: Tensor) -> Tensor:
    """What training makes small: the sum of loss_terms."""
    return sum(loss_terms(sae, x, dead).values())


def dead_feature_loss(sae: OwnSAE, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """
    AuxK (Gao et al. 2024, A.2): the k_aux strongest dead features learn to say what the living leave over, error (row,
    d_in). k_aux is half of d_in, as in the paper; the weight is SAELens's, the share of k_aux that is dead, where the
    paper has 1/32 of a normalised loss.
    """
    n_dead = int(dead.sum())
    k_aux = x.shape[-1] // 2
    only_dead = sae.pre_activations(x).masked_fill(~dead, -math.inf)
    acts = keep_top(only_dead, min(k_aux, n_dead))
    said = sae.decode(acts) - sae.b_dec
    return min(1.0, n_dead / k_aux) * (said - error).pow(2).sum(-1).mean()


def learning_rate_factor(step: int, steps: int) -> float:
    """Up over the first twentieth, down to a tenth over the last third."""
    warm_up = (step + 1) / (1 + steps // 20)
    decay = max(0.1, 3 * (1 - step / steps))
    return min(1.0, warm_up, decay)


def train_own(
    data: Iterator[Tensor],
    d_sae: int,
    k: int | None,
    steps: int,
    lr: float,
    dead_window: int,
    l1: float = 0.0,
    parts: Path | None = None,
    checkpoints: int = 0,
) -> tuple[OwnSAE, Tensor, dict[str, list[float]]]:
    """
    The objective, minimised over batches x (row, d_in) of data; k and l1 as OwnSAE has them. Also returns the factor
    that every x is multiplied by before the SAE sees it, which brings the mean norm of the first batch to sqrt(d_in);
    and by step the loss_terms, their total, and L0, the features per row. A feature is dead that has not fired for
    dead_window steps. With parts, `checkpoints` times on the way all that training knows is kept there (data is an
    ActivationStream then), and a run that was cut off goes on from it as if it had not been.
    """
    kept = parts / "training.pt" if parts else None
    before = t.load(kept) if kept and kept.is_file() else None
    if before is None:
        x = next(data)
        d_in = x.shape[1]
        scale = math.sqrt(d_in) / x.norm(dim=1).mean()
        first_step = 0
        history = []  # by step, the losses and L0, on the device: reading them off would wait for it
    else:
        d_in = before["sae"]["b_dec"].shape[0]
        history = list(before["history"])
        scale = before["scale"]
        first_step = before["step"]
        data.load_state_dict(before["data"])
        print(f"{gray}going on from step {first_step} of {kept}{endc}")
    sae = OwnSAE(d_in, d_sae, k, l1).to(scale.device)
    idle = t.zeros(d_sae, device=scale.device)  # steps since each feature fired
    optimizer = t.optim.Adam(sae.parameters(), lr=lr)
    if before is not None:
        sae.load_state_dict(before["sae"])
        optimizer.load_state_dict(before["optimizer"])
        idle = before["idle"]
    every = max(1, math.ceil(steps / (checkpoints + 1)))
    for step in trange(first_step, steps, desc="own objective", **BAR):
        if kept and checkpoints and step > first_step and step % every == 0:
            state = {"sae": sae.state_dict(), "optimizer": optimizer.state_dict(), "idle": idle, "scale": scale}
            keep_state(kept, state | {"step": step, "history": t.stack(history), "data": data.state_dict()})
        optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(step, steps)
        x = next(data) * scale
        terms = loss_terms(sae, x, dead=idle > dead_window)
        total = sum(terms.values())
        total.backward()
        nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with t.no_grad():
            fires = sae.encode(x) > 0
        idle = t.where(fires.any(0), 0.0, idle + 1)
        l0 = fires.sum(1).float().mean()
        history.append(t.stack([*terms.values(), total, l0]).detach())
    by_step = t.stack(history).T.tolist()
    return sae, scale, dict(zip([*terms, "total", "L0"], by_step))


def keep_state(path: Path, state: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda aside: t.save(state, aside))


#%% Settings: which SAE of which model, how it is trained, and when it is good enough to be read
SPARSITY = {  # default by architecture: k of the first four, the penalty of the others
    "topk": 16.0,
    "batchtopk": 14.0,
    "matryoshka": 16.0,
    "own": 16.0,
    "own_l1": 1.0,
    "standard": 1.5,
    "gated": 1.5,
    "jumprelu": 0.32,
}
JUMPRELU = {  # the penalty is of L0 (Rajamanoharan et al. 2024), the rest Anthropic's: as good as topk at equal L0
    "jumprelu_bandwidth": 0.5,
    "jumprelu_init_threshold": 0.1,
    "jumprelu_ste_to_input": True,
    "jumprelu_sparsity_loss_mode": "step",
    "pre_act_loss_coefficient": 3e-3,
}
COUNTED = ("topk", "batchtopk", "matryoshka", "own")  # are told how many features a token may have
Architecture = Literal["topk", "batchtopk", "matryoshka", "standard", "gated", "jumprelu", "own", "own_l1"]


@dataclass
class SAEConfig:
    """
    What decides which SAE is meant; the stories add their own settings. Equal settings find the same finished SAE
    again.
    """

    model: str | None = None  # a hub name or a folder; default models/world, or what the SAE's metadata names
    base: str | None = None  # a model whose config and tokenizer the weights of --model are put on
    sae: str | None = None  # a local folder with a SAE (cfg.json, sae_weights.safetensors), instead of training one
    release: str | None = None  # a release of SAELens's registry, as gpt2-small-res-jb, with --sae-id
    sae_id: str = ""  # which SAE of the release, as blocks.8.hook_resid_pre
    hook: str = "blocks.2.hook_resid_pre"  # where a SAE is trained
    architecture: Architecture = "batchtopk"  # own and own_l1 are the objectives written out in sae.py
    sparsity: float | None = None  # k of topk, batchtopk, matryoshka, own; penalty of others; default by architecture
    d_sae: Count = 512  # features
    steps: Count = 500  # of training
    batch: Count = 1024  # activations per step
    lr: Positive = 6e-3  # learning rate at its peak
    buffer: Count = 48_000  # activations in memory
    dead_window: Count = 50  # steps without firing after which training counts a feature as dead
    checkpoints: Natural = 3  # on the way; a run that was cut off goes on from the last
    context: AtLeastTwo = 64  # tokens per row, unless the SAE's metadata says otherwise
    # world, stdlib, a text file or folder, a hub dataset; default world for models/world, else stdlib
    data: str | None = None
    bos: bool | None = None  # a beginning-of-text token first; default as the SAE or the model's own tokenizer says
    heldout: AtLeastTwo = 200_000  # tokens that the SAE is judged and read on
    min_recovered: float = 0.5  # gate: the least share of cross-entropy recovered with which features are read
    max_fvu: float = 0.5  # gate: the largest fraction of variance unexplained with which features are read
    wandb: bool = False  # numbers and figures go to Weights & Biases too
    seed: Natural = 0  # of every draw


GPT2_PRESET = {  # for --hpc
    "model": "gpt2",
    "bos": True,
    "hook": "blocks.8.hook_resid_pre",
    "d_sae": 24_576,
    "sparsity": 32.0,
    "steps": 50_000,
    "batch": 4096,
    "lr": 2e-3,
    "buffer": 500_000,
    "context": 128,
    "data": "HuggingFaceFW/fineweb-edu",
}


def variant[Config: SAEConfig](text: str, cfg: Config) -> Config:
    """
    The settings with another architecture[:sparsity[:width[:hook]]]; what is left out stays, or is the architecture's
    default.
    """
    architecture, sparsity, width, hook = (text.split(":") + [""] * 4)[:4]
    if architecture not in SPARSITY:
        fail(f"unknown architecture {architecture!r} in {text!r}: {', '.join(SPARSITY)}")
    try:
        new = dataclasses.replace(
            cfg,
            architecture=architecture,
            sparsity=float(sparsity or SPARSITY[architecture]),
            d_sae=int(width or cfg.d_sae),
            hook=hook or cfg.hook,
        )
    except ValueError:
        fail(f"{text!r} does not read architecture:sparsity:width:hook, as topk:8:512:blocks.2.hook_resid_pre")
    if new.d_sae < 1:
        fail(f"a SAE of {new.d_sae} features makes no sense: --d-sae is 1 or more")
    if not 0 < new.sparsity < math.inf or (architecture in COUNTED and not 1 <= new.sparsity <= new.d_sae):
        fail(f"sparsity {new.sparsity:g} makes no sense for {architecture} of width {new.d_sae}")
    return new


def with_sparsity[Config: SAEConfig](cfg: Config) -> Config:
    """The settings with the architecture's usual sparsity where none was given."""
    given = "" if cfg.sparsity is None else cfg.sparsity
    return variant(f"{cfg.architecture}:{given}", cfg)


def settings_like[Config: SAEConfig](sae, cfg: Config, l0: float) -> Config:
    """
    The settings that train, with cfg's width, a SAE of the kind of one that was loaded, at its hook; with as many
    features a token (l0) where the kind can be told their number.
    """
    meta = sae.cfg.metadata
    kind = (meta.training_architecture or sae.cfg.architecture()).removesuffix("_batchtopk")
    architecture = kind if kind in SPARSITY else "topk"
    sparsity = f"{min(max(1, round(l0)), cfg.d_sae)}" if architecture in COUNTED else ""
    return variant(f"{architecture}:{sparsity}::{meta.hook_name}", cfg)


def label_of(cfg: SAEConfig) -> str:
    return f"{cfg.architecture} {cfg.sparsity:g} x {cfg.d_sae}, {cfg.hook}"


#%% Training by SAELens, or by the objective above; with checkpoints; the result is always opened again from disk
def text_places(rows: Tensor, first: int, bos: int | None) -> Tensor:
    """
    True (row, pos) where rows (row, pos) hold text: from position `first` on, and no beginning-of-text token, which
    also stands inside rows, and whose activation is like no other's.
    """
    places = t.arange(rows.shape[1], device=rows.device).expand_as(rows) >= first
    return places if bos is None else places & (rows != bos)


class ActivationStream:
    """
    Shuffled activations (size, d_in) without end, about `buffer` of them in memory. batch(i) gives rows of tokens, of
    which the first token and every beginning-of-text are no text and left out. Its state can be kept and put back.
    """

    def __init__(
        self,
        model: nn.Module,
        hook: str,
        batch: Callable[[int], Tensor],
        size: int,
        buffer: int,
        seed: int,
        bos: int | None,
    ):
        self.model = model
        self.hook = hook
        self.batch = batch
        self.size = size
        self.buffer = buffer
        self.bos = bos
        self.generator = t.Generator().manual_seed(seed)
        self.store = t.empty(0)
        self.i = 0  # the next rows
        self.full = False

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> Tensor:
        at_rest = max(self.buffer // 2, self.size)  # so many stay, to be shuffled with what comes
        while not (self.full and len(self.store) > at_rest):
            self.take_rows()
        out = self.store[: self.size]
        self.store = self.store[self.size :]
        return out

    def take_rows(self) -> None:
        rows = self.batch(self.i)
        self.i += 1
        new = harvest(self.model, rows, [self.hook])[self.hook]
        self.store = t.cat([self.store.to(new), new[text_places(rows, 1, self.bos)]])
        self.full = len(self.store) >= self.buffer
        if self.full:
            order = t.randperm(len(self.store), generator=self.generator)
            self.store = self.store[order.to(self.store.device)]

    def state_dict(self) -> dict:
        return {
            "store": self.store.clone(),  # of a slice, all that it was cut from would be written
            "i": self.i,
            "full": self.full,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.store = state["store"]
        self.i = state["i"]
        self.full = state["full"]
        self.generator.set_state(state["generator"].cpu())


def training_sae(cfg: SAEConfig, d_in: int, metadata: dict, device: str):
    """
    A fresh TrainingSAE of SAELens. Activations are scaled to a mean norm of sqrt(d_in), so that a penalty means the
    same everywhere.
    """
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    common = {
        "d_in": d_in,
        "d_sae": cfg.d_sae,
        "normalize_activations": "expected_average_only_in",
        "device": device,
        "metadata": SAEMetadata(**metadata),
    }
    warm_up = cfg.steps // 5
    if cfg.architecture == "topk":
        return sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(k=int(cfg.sparsity), **common))
    if cfg.architecture == "batchtopk":
        return sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(k=cfg.sparsity, **common))
    if cfg.architecture == "matryoshka":
        widths = sorted({max(1, cfg.d_sae // 16), max(1, cfg.d_sae // 4), cfg.d_sae})
        return sae_lens.MatryoshkaBatchTopKTrainingSAE(
            sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(k=cfg.sparsity, matryoshka_widths=widths, **common)
        )
    if cfg.architecture == "standard":
        return sae_lens.StandardTrainingSAE(
            sae_lens.StandardTrainingSAEConfig(l1_coefficient=cfg.sparsity, l1_warm_up_steps=warm_up, **common)
        )
    if cfg.architecture == "gated":
        return sae_lens.GatedTrainingSAE(
            sae_lens.GatedTrainingSAEConfig(l1_coefficient=cfg.sparsity, l1_warm_up_steps=warm_up, **common)
        )
    if cfg.architecture == "jumprelu":
        return sae_lens.JumpReLUTrainingSAE(
            sae_lens.JumpReLUTrainingSAEConfig(
                l0_coefficient=cfg.sparsity, l0_warm_up_steps=warm_up, **JUMPRELU, **common
            )
        )
    raise ValueError(f"SAELens trains no {cfg.architecture!r}")


def train_by_saelens(sae, data: Iterator[Tensor], cfg: SAEConfig, parts: Path, device: str):
    """
    SAELens's own loop, with checkpoints under parts. A run that was cut off goes on from the last one as if it had not
    been: beside SAELens's state are kept the weights as they are trained, the random numbers, and the data's state
    (data is an ActivationStream where there are checkpoints).
    """
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    settings = SAETrainerConfig(
        total_training_samples=cfg.steps * cfg.batch,
        train_batch_size_samples=cfg.batch,
        lr=cfg.lr,
        lr_end=cfg.lr / 10,
        lr_warm_up_steps=cfg.steps // 20,
        lr_decay_steps=cfg.steps // 3,
        dead_feature_window=cfg.dead_window,
        n_batches_for_norm_estimate=16,
        device=device,
        n_checkpoints=cfg.checkpoints,
        checkpoint_path=str(parts),
        logger=LoggingConfig(log_to_wandb=cfg.wandb),
    )

    def keep_exact(checkpoint_path: Path) -> None:
        state = {"sae": sae.state_dict(), "rng": t.get_rng_state(), "data": data.state_dict()}
        keep_state(Path(checkpoint_path) / EXACT, state)  # last: with it the checkpoint is whole

    trainer = SAETrainer(settings, sae, data, save_checkpoint_fn=keep_exact)
    whole = [path.parent for path in parts.glob(f"*/{EXACT}")]
    if whole:
        last = max(whole, key=lambda path: int(path.name))
        exact = t.load(last / EXACT, map_location=device)
        sae.load_state_dict(exact["sae"])
        data.load_state_dict(exact["data"])
        t.set_rng_state(exact["rng"].cpu())
        trainer.load_trainer_state(last)
        trainer.n_training_steps += 1  # it is written before the step is counted
        seen = trainer.n_training_samples
        trainer.checkpoint_thresholds = [samples for samples in trainer.checkpoint_thresholds if samples >= seen]
        print(f"{gray}going on from {last}{endc}")
    return trainer.fit()


EXACT = "exact.pt"  # beside SAELens's checkpoint: what it takes to go on as if nothing had happened


def as_saelens(own: OwnSAE, scale: Tensor, metadata: dict, device: str):
    """
    The same function of unscaled activations, as an inference SAE of SAELens: scale and the decoder's lengths go into
    the weights. TopKSAE where k is given, else StandardSAE.
    """
    from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    d_sae, d_in = own.W_dec.shape
    length = own.W_dec.norm(dim=1)
    meta = SAEMetadata(**metadata)
    if own.k is None:
        sae = StandardSAE(StandardSAEConfig(d_in, d_sae, device=device, metadata=meta))
    else:
        sae = TopKSAE(TopKSAEConfig(d_in, d_sae, k=own.k, device=device, metadata=meta))
    weights = {
        "W_enc": own.W_enc * length * scale,
        "b_enc": own.b_enc * length,
        "W_dec": F.normalize(own.W_dec, dim=1) / scale,
        "b_dec": own.b_dec / scale,
    }
    sae.load_state_dict(weights)
    return sae


def fingerprint(model: nn.Module) -> str:
    """Of the files of a model, or of the weights of one that has none."""
    if hasattr(model, "folder"):
        return hash_of_model(model.folder)
    digest = hashlib.sha256()
    for _, weight in sorted(model.state_dict().items()):
        digest.update(array(weight.float()).tobytes())
    return digest.hexdigest()[:12]


IDENTITY = ("architecture", "sparsity", "d_sae", "steps", "batch", "lr", "buffer", "dead_window", "seed")


def key_of(cfg: SAEConfig, identity: dict) -> str:
    """The name of a finished SAE's folder, from everything that its weights depend on."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return f"{cfg.architecture}_{cfg.sparsity:g}_{cfg.d_sae}_{cfg.hook}_{digest}"


def fit_sae(model: nn.Module, cfg: SAEConfig, corpus: Corpus, name: str, device: str):
    """
    The SAE of these settings, trained or found finished under checkpoints/sae_probe/<key>; either way as
    SAE.load_from_disk opens it.
    """
    check_hook(model, cfg.hook)
    metadata = {
        "model_name": name,
        "hook_name": cfg.hook,
        "prepend_bos": corpus.bos is not None,
        "context_size": cfg.context,
        "weights": fingerprint(model),
        "data": corpus.key,
    }
    identity = metadata | {field: getattr(cfg, field) for field in IDENTITY}
    identity["text"] = "without beginning-of-text"  # also inside rows
    if cfg.architecture == "jumprelu":
        identity |= JUMPRELU
    key = key_of(cfg, identity)
    folder = Path("checkpoints/sae_probe") / key
    if folder.is_dir():
        print(f"{gray}trained before: {folder}{endc}")
        return open_folder(folder, device)
    seen = f"{cfg.steps * cfg.batch / 1e3:.0f}k activations, {cfg.buffer / 1e3:.0f}k of them in memory"
    print(f"{gray}training {label_of(cfg)} of {name} on {seen} ...{endc}")
    set_seed(cfg.seed)
    n_rows = max(1, cfg.buffer // 4 // cfg.context)

    def token_rows(i: int) -> Tensor:
        rng = np.random.default_rng((cfg.seed, 0, i))
        return corpus.batch(rng, n_rows, cfg.context).to(device)

    data = ActivationStream(model, cfg.hook, token_rows, cfg.batch, cfg.buffer, cfg.seed, corpus.bos)
    parts = folder.with_name(f"{key}.parts")
    aside = folder.with_name(f".{key}")
    if cfg.architecture in ("own", "own_l1"):
        counted = cfg.architecture == "own"
        own, scale, losses = train_own(
            data,
            d_sae=cfg.d_sae,
            k=int(cfg.sparsity) if counted else None,
            steps=cfg.steps,
            lr=cfg.lr,
            dead_window=cfg.dead_window,
            l1=0.0 if counted else cfg.sparsity,
            parts=parts,
            checkpoints=cfg.checkpoints,
        )
        as_saelens(own, scale, metadata, device).save_model(aside)
        (aside / LOSSES).write_text(json.dumps(losses))
    else:
        if cfg.wandb:
            start_wandb("sae_probe", identity)
        d_in = harvest(model, token_rows(0)[:1], [cfg.hook])[cfg.hook].shape[-1]
        sae = training_sae(cfg, d_in, metadata, device)
        train_by_saelens(sae, data, cfg, parts, device).save_inference_model(aside)
    sae = open_folder(aside, device)
    if not all(p.isfinite().all() for p in sae.parameters()):
        fail(f"training {label_of(cfg)} diverged: lower --lr")
    aside.rename(folder)
    shutil.rmtree(parts, ignore_errors=True)
    return open_folder(folder, device)


LOSSES = "losses.json"  # beside the weights: by step, what the own objectives were made of


def losses_of(sae) -> dict[str, list[float]]:
    """By step, the losses of an own objective and L0, kept where a SAE was opened; nothing of those of SAELens."""
    if not hasattr(sae, "folder") or not (sae.folder / LOSSES).is_file():
        return {}
    return json.loads((sae.folder / LOSSES).read_text())


#%% Loading: a folder or SAELens's registry; the SAE's metadata decides the model, its processing, the hook and the rows
def open_folder(folder: str | Path, device: str):
    from sae_lens import SAE

    needed = ("cfg.json", "sae_weights.safetensors")
    if not all((Path(folder) / file).is_file() for file in needed):
        fail(f"--sae {folder}: no {' and '.join(needed)} there (SAELens's save_inference_model writes them)")
    try:
        sae = ready(SAE.load_from_disk(folder, device=device))
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        fail(f"--sae {folder} cannot be read: {type(error).__name__}: {reason}")
    sae.folder = Path(folder)
    return sae


def known_releases() -> dict[str, list[str]]:
    """
    {release: ids of its SAEs} of SAELens's registry, read without importing the package (15 s): a typo is answered at
    once.
    """
    import yaml

    path = Path(importlib.util.find_spec("sae_lens").origin).parent / "pretrained_saes.yaml"
    entries = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {release: [sae["id"] for sae in entry["saes"]] for release, entry in entries.items()}


def nearest(asked: str, names: list[str]) -> str:
    return ", ".join(difflib.get_close_matches(asked, names, 5, 0.3)) or f"none of {len(names)}"


def open_release(release: str, sae_id: str, device: str, transcoder: bool = False):
    """transcoder: what is asked for is one (transcoders.py), not an autoencoder."""
    known = known_releases()
    if "/" not in release and release not in known:
        fail(f"no release {release!r} in SAELens's registry; near: {nearest(release, list(known))}")
    if release in known and sae_id not in known[release]:
        fail(f"no SAE {sae_id!r} in {release}; near: {nearest(sae_id, known[release])}")
    from sae_lens import SAE

    try:
        return ready(SAE.from_pretrained(release, sae_id, device=device), transcoder)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        fail(f"cannot fetch {release} {sae_id} (no network? --sae takes a local folder): {reason}")


def ready(sae, transcoder: bool = False):
    """Heads side by side, no gradients; what is not a plain autoencoder of one place (or a transcoder) is refused."""
    kind = sae.cfg.architecture()
    if "transcoder" in kind and not transcoder:
        fail(f"a {kind} maps one place to another, so it is no autoencoder: attribution.py --transcoders takes it")
    if transcoder and "transcoder" not in kind:
        fail(f"a {kind} is no transcoder: sae_probe.py takes it")
    if sae.cfg.normalize_activations == "expected_average_only_in":
        print(
            f"{yellow}this SAE wants scaled activations, and its file does not say by how much: "
            f"its reconstruction will show it{endc}"
        )
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae.requires_grad_(False).eval()


PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)


def model_for(sae, asked: str | None, ours: tuple[type, ...], device: str) -> tuple[nn.Module, str]:
    """
    The model an SAE was trained on, its weights processed as the metadata states; and its name. ours: see load_model.
    """
    meta = sae.cfg.metadata
    name = asked or meta.model_name
    if name is None:
        fail("this SAE does not name its model: give it by --model")
    moved = meta.model_name and meta.model_name.startswith(("/", "~", ".")) and not Path(find_folder(name)).is_dir()
    if moved and not asked:
        fail(f"this SAE's model is not at {name} any more: say by --model where it is")
    loading = {key for key, value in (meta.model_from_pretrained_kwargs or {}).items() if value}
    unknown = loading - {*PROCESSING, "dtype", "device", "n_devices"}
    if unknown:
        fail(f"this SAE's model is loaded with {', '.join(sorted(unknown))}, which is not built here")
    processing = loading & set(PROCESSING)
    if processing:
        model = load_model(find_folder(name), (), device)
        model.enable_compatibility_mode(disable_warnings=True, **{key: key in processing for key in PROCESSING})
        print(f"{gray}its weights processed as the SAE's metadata says: {', '.join(sorted(processing))}{endc}")
    else:
        model = load_model(find_folder(name), ours, device)
    if meta.weights and meta.weights != fingerprint(model):
        fail(
            f"this SAE was trained on other weights ({meta.weights} of {meta.model_name}) than those of {name} "
            f"({fingerprint(model)}): give its model by --model, or train it again"
        )
    if not meta.weights and meta.model_name and full_name(name) != full_name(meta.model_name):
        print(
            f"{yellow}this SAE names {meta.model_name} as its model and keeps no fingerprint of its weights: {name} is "
            f"taken at your word, and its reconstruction will show it{endc}"
        )
    return model, name


def hook_for(sae, asked: str) -> None:
    """A SAE that does not say where it belongs is put at --hook."""
    if sae.cfg.metadata.hook_name is None:
        print(f"{yellow}this SAE does not name its hook: --hook {asked} is taken{endc}")
        sae.cfg.metadata.hook_name = asked


def refuse_settings(cfg: SAEConfig) -> None:
    """Settings that no SAE can be trained or judged by, in one line each, before anything is loaded."""
    check_ranges(cfg)  # of a variant too
    if cfg.sae and cfg.release:
        fail("--sae and --release both name a SAE: give one of them")
    if cfg.sae_id and not cfg.release:
        fail("--sae-id names a SAE of a release: give --release too")


def check_hook(model: nn.Module, hook: str | None) -> None:
    try:
        find_hooks(model, hook or "")
    except KeyError as error:
        fail(f"no place {hook!r} in this model: {error.args[0]}")
    if hook not in hook_points(model):
        fail(f"no place {hook!r} in this model: give the whole name of one")


def check_fit(model: nn.Module, hook: str | None, d_in: int, tokens: Tensor) -> None:
    """The hook exists, fires and is as wide as the SAE."""
    check_hook(model, hook)
    width = harvest(model, tokens, [hook])[hook].shape[-1]
    if width != d_in:
        fail(f"the SAE takes {d_in} numbers, {hook} of this model gives {width}: it belongs to another model or hook")


#%% What the stories start from: a model, the SAE of one of its hooks, and held-out text as that SAE wants it
@dataclass
class Subject:
    model: nn.Module
    name: str
    sae: nn.Module
    hook: str
    corpus: Corpus
    tokenizer: object
    rows: Tensor  # (row, pos), held out
    bos: list[int]  # what stands before every row: beginning-of-text, or nothing
    about: str  # for titles

    @property
    def first(self) -> int:
        """The first position that is text."""
        return len(self.bos)


def open_subject(cfg: SAEConfig, ours: tuple[type, ...], device: str) -> Subject:
    """
    --sae or --release decide the model, else the SAE of these settings is trained, or found finished. ours: see
    load_model.
    """
    refuse_settings(cfg)
    if cfg.base:
        cfg.model = on_base(cfg.model or "models/world", cfg.base)
    if cfg.sae or cfg.release:
        sae = open_folder(cfg.sae, device) if cfg.sae else open_release(cfg.release, cfg.sae_id, device)
        hook_for(sae, cfg.hook)
        model, name = model_for(sae, cfg.model, ours, device)
    else:
        name = cfg.model or "models/world"
        model = load_model(find_folder(name), ours, device)
    model.requires_grad_(False)
    asked = cfg.bos
    if asked is None and (cfg.sae or cfg.release):
        asked = sae.cfg.metadata.prepend_bos  # as it was trained
    choose_bos(model, asked)
    corpus = text_for(model, name, cfg.data, asked)
    if not (cfg.sae or cfg.release):
        sae = fit_sae(model, cfg, corpus, name, device)
    meta = sae.cfg.metadata
    bos = [] if corpus.bos is None or asked is False else [corpus.bos]
    rows = heldout_rows(corpus, cfg.heldout, meta.context_size or cfg.context, bool(bos), cfg.seed).to(device)
    check_fit(model, meta.hook_name, sae.cfg.d_in, rows[:1])
    kind = meta.training_architecture or sae.cfg.architecture()
    about = f"{name}, {meta.hook_name}, {kind} of width {sae.cfg.d_sae}"
    return Subject(model, name, sae, meta.hook_name, corpus, text_tokenizer(model), rows, bos, about)


def text_for(model: nn.Module, name: str, data: str | None, bos: bool | None) -> Corpus:
    _, corpus = corpus_for(data, name, bos)
    if corpus.d_vocab > model.W_U.shape[1]:
        fail(
            f"the text has {corpus.d_vocab} kinds of tokens, the model {model.W_U.shape[1]}: "
            "--data world is for models/world"
        )
    return corpus


def heldout_rows(corpus: Corpus, tokens: int, context: int, with_bos: bool, seed: int) -> Tensor:
    """Rows (row, context) with at least `tokens` tokens of text."""
    if with_bos or corpus.bos is None:
        n_rows = math.ceil(tokens / (context - with_bos))
        return judging_rows(corpus, n_rows, context, seed)
    n_rows = math.ceil(tokens / context)
    return judging_rows(corpus, n_rows, context + 1, seed)[:, 1:]


#%% Judging: the codes of held-out text, how much of the variance they miss, what it costs the model to live on them
def sparse(acts: Tensor) -> csr_matrix:
    row, feature = (acts != 0).nonzero(as_tuple=True)
    places = (row.cpu().numpy(), feature.cpu().numpy())
    return csr_matrix((array(acts[row, feature]), places), acts.shape)


@t.no_grad()
def encode_rows(
    model: nn.Module, sae, rows: Tensor, first: int, bos: int | None = None
) -> tuple[csr_matrix, float, Tensor]:
    """
    Codes (token, feature) of rows from position `first` on, zero where no text stands (text_places); of the text, the
    fraction of variance unexplained and the mean activation (d_in).
    """
    hook = sae.cfg.metadata.hook_name

    def rebuild(part: Tensor) -> tuple[csr_matrix, float, float, Tensor]:
        x = harvest(model, part, [hook])[hook][:, first:]
        is_text = text_places(part, first, bos)[:, first:, None]
        acts = sae.encode(x)
        missed = ((x - sae.decode(acts)) * is_text).pow(2).sum().item()
        text = x * is_text
        return sparse((acts * is_text).flatten(0, 1)), missed, text.pow(2).sum().item(), text.sum((0, 1))

    parts, missed, squares, totals = zip(*in_batches(rebuild, rows, 64))
    codes = vstack(parts, format="csr")
    n_tokens = int(text_places(rows, first, bos).sum())
    mean = sum(totals) / n_tokens
    variance = sum(squares) - n_tokens * mean.pow(2).sum().item()
    return codes, sum(missed) / variance, mean


def recovered(clean: float, spliced: float, removed: float) -> float:
    """
    The share of the cross-entropy lost with the activation that the SAE gives back; nan where removing it costs
    nothing.
    """
    if removed - clean <= 0.02:
        return math.nan
    return (removed - spliced) / (removed - clean)


@t.no_grad()
def judge(
    model: nn.Module, sae, rows: Tensor, first: int, bos: int | None = None, ce_rows: int = 256
) -> tuple[dict[str, float], csr_matrix]:
    """
    Numbers for the text (text_places) of rows it was not trained on, and their codes (token, feature) from position
    `first` on. Cross-entropies, in nats, are of the first ce_rows: of the model as it is, with the SAE's reconstruction
    in the place of the text's activations, and with their mean or zero there.
    """
    hook = sae.cfg.metadata.hook_name
    codes, fvu, mean = encode_rows(model, sae, rows, first, bos)
    n_tokens = int(text_places(rows, first, bos).sum())
    density = codes.getnnz(0) / n_tokens

    def loss_with(new: Callable[[Tensor], Tensor]) -> float:
        def summed_loss(part: Tensor) -> float:
            is_text = text_places(part, first, bos)[..., None]
            edit = put(lambda x: t.where(is_text, new(x), x))
            return next_token_loss(run_with_hooks(model, part, [(hook, edit)]), part, "sum").item()

        return sum(in_batches(summed_loss, rows[:ce_rows], 64)) / rows[:ce_rows, 1:].numel()

    clean = loss_with(lambda x: x)
    spliced = loss_with(lambda x: sae.decode(sae.encode(x)))
    mean_ablated = loss_with(lambda x: mean.expand_as(x))
    zero_ablated = loss_with(t.zeros_like)
    numbers = {
        "l0": codes.nnz / n_tokens,
        "fvu": fvu,
        "ce_recovered": recovered(clean, spliced, mean_ablated),
        "ce_recovered_zero_ablation": recovered(clean, spliced, zero_ablated),
        "dead_fraction": float((density == 0).mean()),
        "dense_fraction": float((density > 0.1).mean()),
        "ce_clean": clean,
        "ce_sae": spliced,
        "ce_mean_ablated": mean_ablated,
        "ce_zero_ablated": zero_ablated,
        "n_tokens": n_tokens,
    }
    return numbers, codes


def require_good_sae(judged: dict[str, float], cfg: SAEConfig, hook: str) -> None:
    """No feature is read of an SAE that does not rebuild what the model lives on."""
    reasons = "wrong model, hook or processing, or too little training"
    fvu = judged["fvu"]
    share = judged["ce_recovered"]
    if not fvu <= cfg.max_fvu:  # nan too
        fail(f"gate: the SAE leaves {fvu:.2f} of the variance unexplained (at most --max-fvu {cfg.max_fvu}): {reasons}")
    if share < cfg.min_recovered:
        fail(
            f"gate: {share:.2f} of the cross-entropy is recovered (at least --min-recovered {cfg.min_recovered}): "
            f"{reasons}"
        )
    if math.isnan(share):
        print(f"{yellow}removing {hook} costs this model nothing: cross-entropy recovered has no meaning here{endc}")


def firing_order(codes: csr_matrix) -> list[int]:
    """The features that ever fire, the most frequent first."""
    density = codes.getnnz(0) / codes.shape[0]
    return [int(f) for f in np.argsort(-density) if density[f] > 0]


def neighbours(directions: Tensor) -> Tensor:
    """(feature, feature) cosines of decoder rows, -1 with themselves."""
    unit = F.normalize(directions.float(), dim=1)
    return (unit @ unit.T).fill_diagonal_(-1.0)


#%% Reading: each feature's strongest contexts, the tokens it promotes, what fires with it, what points its way
def words_of(tokenizer, ids: Tensor) -> list[str]:
    return [visible(word) for word in str_tokens(tokenizer, ids)]


def five_most(scores: np.ndarray) -> list[list]:
    """[feature, score] of the five largest, those above 0.02."""
    return [[int(j), round(float(scores[j]), 2)] for j in np.argsort(-scores)[:5] if scores[j] > 0.02]


def strongest_places(column: csc_matrix, width: int, n: int = 8) -> list[tuple[int, int]]:
    """(row, pos) of the largest of a feature's codes, at most one in a row of `width` tokens."""
    tokens = column.indices[np.argsort(-column.data)]
    _, best_of_row = np.unique(tokens // width, return_index=True)
    return [divmod(int(token), width) for token in tokens[np.sort(best_of_row)][:n]]


def read_features(
    model: nn.Module,
    sae,
    codes: csr_matrix,
    rows: Tensor,
    tokenizer,
    chosen: list[int],
    n_text: int | None = None,
) -> list[dict]:
    """
    One entry of the page for each chosen feature of codes (token, feature), which are of the last tokens of each of
    rows. Contexts are from different rows, with shades in per cent of the feature's largest code; 'with' is the share
    of tokens with either feature that have both. n_text: how many of the tokens are text; None is all.
    """
    n_tokens, n_features = codes.shape
    width = n_tokens // len(rows)  # tokens of a row that have codes
    first = rows.shape[1] - width
    columns = codes.tocsc()
    counts = codes.getnnz(0)
    fired = (codes != 0).astype(np.float32)
    both = (fired[:, chosen].T @ fired).toarray()
    cosines = array(neighbours(sae.W_dec))
    effects = logit_effects(model, sae, chosen)
    n_words = min(8, effects.shape[1])

    def context(f: int, row: int, pos: int, top: float) -> list:
        """[words, shades] around a place."""
        start = max(0, pos - 12)
        stop = min(width, pos + 5)
        shades = codes[row * width + start : row * width + stop, [f]].toarray()[:, 0]
        words = words_of(tokenizer, rows[row, first:][start:stop])
        return [words, (100 * shades / top).round().astype(int).tolist()]

    entries = []
    for i, f in enumerate(chosen):
        column = columns[:, [f]]
        top = float(column.data.max(initial=0))
        either = np.maximum(counts[f] + counts - both[i], 1)
        others = np.arange(n_features) != f
        entry = {
            "id": f,
            "density": counts[f] / (n_text or n_tokens),
            "max": round(top, 2),
            "contexts": [context(f, row, pos, top) for row, pos in strongest_places(column, width)],
            "histogram": np.histogram(column.data, 20, (0, top or 1.0))[0].tolist(),
            "concepts": [],
            "up": words_of(tokenizer, effects[i].topk(n_words).indices),
            "down": words_of(tokenizer, (-effects[i]).topk(n_words).indices),
            "with": five_most(both[i] / either * others),
            "near": five_most(cosines[f]),
        }
        entries.append(entry)
    return entries


def logit_effects(model: nn.Module, sae, chosen: list[int]) -> Tensor:
    """
    (feature, token): what a unit step along each decoder row adds to the logits directly; no tokens where the hook is
    not the residual stream.
    """
    if sae.cfg.d_in != len(model.W_U):
        return t.zeros(len(chosen), 0)
    return F.normalize(sae.W_dec[chosen].float(), dim=1) @ folded_W_U(model)


#%% Acting: a feature added, clamped, ablated or projected out; an answer traced to features and to what the SAE misses
def change(sae, feature: int, how: str, x: Tensor, amount: float) -> Tensor:
    """
    What to add to x (..., d_in). add: amount times the unit direction; clamp: the feature becomes amount; ablate: zero;
    project: nothing of x is left along it.
    """
    unit = F.normalize(sae.W_dec[feature].float(), dim=0)
    if how == "add":
        return amount * unit.expand_as(x)
    if how == "project":
        return -(x @ unit)[..., None] * unit
    if how == "clamp":
        return decoded_change(sae, feature, x, amount)
    if how == "ablate":
        return decoded_change(sae, feature, x, 0.0)
    raise ValueError(f"unknown edit {how!r}")


def decoded_change(sae, feature: int, x: Tensor, to: float) -> Tensor:
    """
    By how much the SAE's output for x (..., d_in) moves when the feature becomes `to`. Both codes are decoded at once,
    since some SAEs keep of an encoding the norms of x, and one decoding puts them back and forgets them.
    """
    acts = sae.encode(x)
    edited = acts.clone()
    edited[..., feature] = to
    after, before = sae.decode(t.stack([edited, acts])).float()
    return after - before


class Attribution:
    """
    Why this answer: the metric, weights (d_vocab) . last logits of tokens (1, pos), as a function of the SAE's features
    and of its error at every position (Marks et al. 2024).
        features (pos, feature)   gradient x activation of each node: by how much the metric falls, to first order, when
        error (pos)               it is ablated
        value                     the metric
        moved                     how far putting features + error in the place of the activation moves it (gate: by 0)
    """

    def __init__(self, model: nn.Module, sae, tokens: Tensor, weights: Tensor):
        self.model = model
        self.sae = sae
        self.tokens = tokens
        self.weights = weights
        self.hook = sae.cfg.metadata.hook_name
        x = harvest(model, tokens, [self.hook])[self.hook]
        with t.no_grad():
            self.acts = sae.encode(x)
            clean = self.metric(model(tokens))
        self.missed = (x - sae.decode(self.acts)).requires_grad_()
        self.acts.requires_grad_()
        value = self.run(self.acts, self.missed)
        value.backward()
        self.features = (self.acts.grad * self.acts)[0].detach()
        self.error = (self.missed.grad * self.missed)[0].sum(-1).detach()
        self.value = value.detach()
        self.moved = (self.value - clean).abs()

    def metric(self, logits: Tensor) -> Tensor:
        return logits[0, -1].float() @ self.weights

    def run(self, acts: Tensor, missed: Tensor) -> Tensor:
        """
        The metric when the SAE's output for these features, plus what it misses, is in the place of the activation.
        """

        def rebuild(x: Tensor) -> Tensor:
            self.sae.encode(x)  # some SAEs keep the norms here that decode puts back
            return self.sae.decode(acts) + missed

        return self.metric(run_with_hooks(self.model, self.tokens, [(self.hook, put(rebuild))]))

    @t.no_grad()
    def falls(self, pos: int, feature: int | None) -> float:
        """How far the metric falls when a node is really ablated; feature None: the error node."""
        acts = self.acts.clone()
        missed = self.missed.clone()
        if feature is None:
            missed[0, pos] = 0
        else:
            acts[0, pos, feature] = 0
        return (self.value - self.run(acts, missed)).item()
