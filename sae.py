"""
Sparse autoencoders: the objective and its training from scratch; then training by SAELens, and loading by metadata.
What is done with them stands in features.py.
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
    set_seed,
    write_aside,
    yellow,
)
from settings import check_ranges
from plots import array
from hooks import find_hooks, harvest, hook_points
from data import Corpus
from weights import hash_of_model
from train import start_wandb

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
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
        fail(
            f"--sae {folder}: no {' and '.join(needed)} there (SAELens's save_model and save_inference_model write them)"
        )
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
