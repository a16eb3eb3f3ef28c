"""Sparse autoencoders: the objective, training by SAELens, loading by metadata, judging, reading, steering."""

import copy
import dataclasses
import difflib
import hashlib
import importlib.util
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from utils import BAR, endc, fail, find_folder, gray, load_model, set_seed, yellow
from plots import array, visible
from hooks import find_hooks, in_batches, hook_points, run_with_hooks
from data import Corpus, str_tokens
from train import start_wandb
from anatomy import harvest, folded_W_U
from world import Concept, Labelled, Prompt
from interventions import loss_of, put
from llama_block import Llama

import numpy as np
from scipy.sparse import csr_matrix, vstack
import torch as t
from torch import Tensor
import torch.nn as nn
import torch.nn.functional as F
from tqdm import trange

#%% The objective from scratch: an encoder, a decoder, and a loss that asks for x back from few features (Gao et al. 2024; with l1 and no k, Bricken et al. 2023)
SPARSITY = {
    "topk": 16.0,
    "batchtopk": 14.0,
    "matryoshka": 16.0,
    "own": 16.0,
    "standard": 1.5,
    "gated": 1.5,
    "jumprelu": 0.6,
}  # k of the first four, the penalty of the others


class OwnSAE(nn.Module):
    """Of each x the k strongest features are kept; or, with k None, their sum is penalised by l1. Decoder rows count as unit vectors."""

    def __init__(self, d_in: int, d_sae: int, k: int | None, l1: float = 0.0):
        super().__init__()
        self.k, self.l1 = k, l1
        self.W_dec = nn.Parameter(0.1 * F.normalize(t.randn(d_sae, d_in), dim=1))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.clone())
        self.b_enc, self.b_dec = nn.Parameter(t.zeros(d_sae)), nn.Parameter(t.zeros(d_in))

    def offer(self, x: Tensor) -> Tensor:
        return ((x - self.b_dec) @ self.W_enc + self.b_enc) * self.W_dec.norm(dim=1)

    def keep(self, offered: Tensor, k: int) -> Tensor:
        top = offered.topk(k)
        return t.zeros_like(offered).scatter(-1, top.indices, top.values)

    def encode(self, x: Tensor) -> Tensor:
        offered = self.offer(x).relu()
        return offered if self.k is None else self.keep(offered, self.k)

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ F.normalize(self.W_dec, dim=1) + self.b_dec

    def loss(self, x: Tensor, dead: Tensor) -> Tensor:
        """Squared error, and l1; the dead features (d_sae, bool) learn what the living leave over."""
        acts = self.encode(x)
        error = x - self.decode(acts)
        loss = error.pow(2).sum(-1).mean() + self.l1 * acts.sum(-1).mean()
        if self.k is None or not (n_dead := int(dead.sum())):
            return loss
        half = x.shape[-1] // 2
        rest = self.decode(self.keep(self.offer(x).masked_fill(~dead, -math.inf), min(half, n_dead))) - self.b_dec
        return loss + min(1.0, n_dead / half) * (rest - error.detach()).pow(2).sum(-1).mean()


#%% Training: SAELens's trainer and configs, or the objective above; checkpoints on the way; the result is always opened again from disk
def variant(text: str, cfg: object) -> object:
    """The settings with another architecture[:sparsity[:width[:hook]]]; what is left out stays, or is the architecture's default."""
    kind, sparsity, width, hook = (text.split(":") + [""] * 4)[:4]
    if kind not in SPARSITY:
        fail(f"unknown architecture {kind!r} in {text!r}: {', '.join(SPARSITY)}")
    try:
        new = dataclasses.replace(
            cfg,
            architecture=kind,
            sparsity=float(sparsity or SPARSITY[kind]),
            d_sae=int(width or cfg.d_sae),
            hook=hook or cfg.hook,
        )
    except ValueError:
        fail(f"{text!r} does not read architecture:sparsity:width:hook, as topk:8:512:blocks.2.hook_resid_pre")
    if new.sparsity <= 0 or (kind in ("topk", "own") and not 1 <= new.sparsity <= new.d_sae):
        fail(f"sparsity {new.sparsity:g} makes no sense for {kind} of width {new.d_sae}")
    return new


def label_of(cfg: object) -> str:
    return f"{cfg.architecture} {cfg.sparsity:g} x {cfg.d_sae}, {cfg.hook}"


def stream(
    model: nn.Module, hook: str, batch: Callable[[int], Tensor], size: int, buffer: int, seed: int
) -> Iterator[Tensor]:
    """Shuffled activations (size, d_in) without end, `buffer` of them in memory. batch(i) gives rows of tokens; the beginning-of-text at their head is no text and left out."""
    generator, store = t.Generator().manual_seed(seed), t.empty(0)
    for i in itertools.count():
        new = harvest(model, batch(i), [hook])[hook][:, 1:].flatten(0, 1)
        store = t.cat([store.to(new), new])
        if len(store) < buffer:
            continue
        store = store[t.randperm(len(store), generator=generator).to(store.device)]
        while len(store) > max(buffer // 2, size):
            yield store[:size]
            store = store[size:]


def training_sae(cfg: object, d_in: int, metadata: dict, device: str):
    """A fresh TrainingSAE of SAELens. Activations are scaled to a mean norm of sqrt(d_in), so that a penalty means the same everywhere."""
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    penalty, l0 = (
        dict(l1_coefficient=cfg.sparsity, l1_warm_up_steps=cfg.steps // 5),
        dict(l0_coefficient=cfg.sparsity, l0_warm_up_steps=cfg.steps // 5),
    )
    tanh = dict(
        jumprelu_bandwidth=0.5,
        jumprelu_init_threshold=0.1,
        jumprelu_ste_to_input=True,
        jumprelu_sparsity_loss_mode="tanh",
        pre_act_loss_coefficient=3e-3,
    )  # Anthropic's setup
    kind, extra = {
        "standard": ("Standard", penalty),
        "gated": ("Gated", penalty),
        "jumprelu": ("JumpReLU", l0 | tanh),
        "topk": ("TopK", dict(k=int(cfg.sparsity))),
        "batchtopk": ("BatchTopK", dict(k=cfg.sparsity)),
        "matryoshka": (
            "MatryoshkaBatchTopK",
            dict(k=cfg.sparsity, matryoshka_widths=[max(1, cfg.d_sae // 16), max(2, cfg.d_sae // 4), cfg.d_sae]),
        ),
    }[cfg.architecture]
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(
        d_in=d_in,
        d_sae=cfg.d_sae,
        normalize_activations="expected_average_only_in",
        device=device,
        metadata=SAEMetadata(**metadata),
        **extra,
    )
    return sae_lens.registry.get_sae_training_class(config.architecture())[0](config)


def train_lens(sae, batches: Callable[[int], Iterator[Tensor]], cfg: object, parts: Path, device: str):
    """SAELens's own loop; goes on from the last checkpoint of a run that was cut off."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    trainer = SAETrainer(
        SAETrainerConfig(
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
        ),
        sae,
        batches(0),
    )
    if done := sorted(
        (path.parent for path in parts.glob("*/activation_scaler.json")), key=lambda path: int(path.name)
    ):
        sae.load_weights_from_checkpoint(done[-1])
        trainer.load_trainer_state(done[-1])
        trainer.data_provider = batches(trainer.n_training_steps)
        print(f"{gray}going on from {done[-1]}{endc}")
    return trainer.fit()


def train_own(batches: Callable[[int], Iterator[Tensor]], cfg: object, metadata: dict, device: str):
    """The objective from scratch with the same schedule; returned as an inference SAE of SAELens."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    data = batches(0)
    d_in, scale = (x := next(data)).shape[1], math.sqrt(x.shape[1]) / x.norm(dim=1).mean()
    own, idle = OwnSAE(d_in, cfg.d_sae, int(cfg.sparsity)).to(device), t.zeros(cfg.d_sae, device=device)
    optimizer = t.optim.Adam(own.parameters(), lr=cfg.lr)
    for step in trange(cfg.steps, desc="own objective", **BAR):
        optimizer.param_groups[0]["lr"] = cfg.lr * min(
            1.0, (step + 1) / (1 + cfg.steps // 20), max(0.1, 3 * (1 - step / cfg.steps))
        )
        x = next(data) * scale
        own.loss(x, idle > cfg.dead_window).backward()
        nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with t.no_grad():
            idle = t.where((own.encode(x) > 0).any(0), 0.0, idle + 1)
    sae, length = (
        TopKSAE(TopKSAEConfig(d_in, cfg.d_sae, k=int(cfg.sparsity), device=device, metadata=SAEMetadata(**metadata))),
        own.W_dec.norm(dim=1),
    )
    sae.load_state_dict(
        {
            "W_enc": own.W_enc * length * scale,
            "b_enc": own.b_enc * length,
            "W_dec": F.normalize(own.W_dec, dim=1) / scale,
            "b_dec": own.b_dec / scale,
        }
    )
    return sae


def fingerprint(model: nn.Module) -> str:
    return hashlib.sha256(array(model.W_U[:, :256]).tobytes()).hexdigest()[:10]


def fit_sae(model: nn.Module, cfg: object, corpus: Corpus, name: str, device: str):
    """The SAE of these settings, trained or found finished under checkpoints/sae_probe/<key>; either way as SAE.load_from_disk opens it."""
    if cfg.hook not in hook_points(model):
        check_fit(model, cfg.hook, 0, t.zeros(1, 1))
    metadata = dict(
        model_name=name,
        hook_name=cfg.hook,
        prepend_bos=True,
        context_size=cfg.context,
        weights=fingerprint(model),
        data=corpus.key,
    )
    same = metadata | {
        field: getattr(cfg, field)
        for field in ("architecture", "sparsity", "d_sae", "steps", "batch", "lr", "buffer", "dead_window", "seed")
    }
    key = f"{cfg.architecture}_{cfg.sparsity:g}_{cfg.d_sae}_{cfg.hook}_{hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]}"
    folder = Path("checkpoints/sae_probe") / key
    if folder.is_dir():
        print(f"{gray}trained before: {folder}{endc}")
        return open_folder(folder, device)
    print(
        f"{gray}training {label_of(cfg)} of {name} on {cfg.steps * cfg.batch / 1e3:.0f}k activations, {cfg.buffer / 1e3:.0f}k of them in memory ...{endc}"
    )
    set_seed(cfg.seed)
    batch = lambda step, i: corpus.batch(
        np.random.default_rng((cfg.seed, step, i)), max(1, cfg.buffer // 4 // cfg.context), cfg.context
    ).to(device)
    batches = lambda step: stream(model, cfg.hook, lambda i: batch(step, i), cfg.batch, cfg.buffer, cfg.seed + step)
    parts, aside = folder.with_name(f"{key}.parts"), folder.with_name(f".{key}")
    if cfg.architecture == "own":
        train_own(batches, cfg, metadata, device).save_model(aside)
    else:
        if cfg.wandb:
            start_wandb("sae_probe", same)
        d_in = harvest(model, batch(0, 0)[:1], [cfg.hook])[cfg.hook].shape[-1]
        train_lens(training_sae(cfg, d_in, metadata, device), batches, cfg, parts, device).save_inference_model(aside)
    sae = open_folder(aside, device)
    if not all(p.isfinite().all() for p in sae.parameters()):
        fail(f"training {label_of(cfg)} diverged: lower --lr")
    aside.rename(folder)
    shutil.rmtree(parts, ignore_errors=True)
    return sae


#%% Loading: a folder or SAELens's registry; the SAE's own metadata decides the model, its processing, the hook and the rows
def open_folder(folder: str | Path, device: str):
    from sae_lens import SAE

    if not all((Path(folder) / file).is_file() for file in ("cfg.json", "sae_weights.safetensors")):
        fail(
            f"--sae {folder}: no cfg.json and sae_weights.safetensors there (SAELens's save_inference_model writes them)"
        )
    try:
        return ready(SAE.load_from_disk(folder, device=device))
    except Exception as error:
        fail(f"--sae {folder} cannot be read: {type(error).__name__}: {str(error).splitlines()[0][:200]}")


def open_release(release: str, sae_id: str, device: str):
    """From SAELens's registry, whose list is read without importing the package (15 s): a typo is answered at once."""
    import yaml

    path = Path(importlib.util.find_spec("sae_lens").origin).parent / "pretrained_saes.yaml"
    known = {
        name: [sae["id"] for sae in entry["saes"]]
        for name, entry in yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)).items()
    }
    near = lambda asked, names: ", ".join(difflib.get_close_matches(asked, names, 5, 0.3)) or f"none of {len(names)}"
    if "/" not in release and release not in known:
        fail(f"no release {release!r} in SAELens's registry; near: {near(release, known)}")
    if release in known and sae_id not in known[release]:
        fail(f"no SAE {sae_id!r} in {release}; near: {near(sae_id, known[release])}")
    from sae_lens import SAE

    try:
        return ready(SAE.from_pretrained(release, sae_id, device=device))
    except Exception as error:
        fail(
            f"cannot fetch {release} {sae_id} (no network? --sae takes a local folder): {type(error).__name__}: {str(error).splitlines()[0][:160]}"
        )


def ready(sae):
    """Heads side by side, no gradients; what is not a plain autoencoder of one place is refused."""
    if "transcoder" in sae.cfg.architecture():
        fail(f"a {sae.cfg.architecture()} maps one place to another: not an autoencoder")
    if sae.cfg.normalize_activations == "expected_average_only_in":
        print(
            f"{yellow}this SAE wants scaled activations, and its file does not say by how much: its reconstruction will show it{endc}"
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


def model_for(sae, asked: str | None, device: str) -> tuple[nn.Module, str]:
    """The model an SAE was trained on, its weights processed as the metadata states; and its name."""
    meta = sae.cfg.metadata
    name, loading = (
        asked or meta.model_name,
        {key for key, value in (meta.model_from_pretrained_kwargs or {}).items() if value},
    )
    if name is None:
        fail("this SAE does not name its model: give it by --model")
    if meta.model_name and find_folder(name) != find_folder(meta.model_name):
        fail(f"this SAE was trained on {meta.model_name}, not on {name}: leave --model out")
    if unknown := loading - {*PROCESSING, "dtype", "device", "n_devices"}:
        fail(f"this SAE's model is loaded with {', '.join(sorted(unknown))}, which is not built here")
    processing = loading & set(PROCESSING)
    model = load_model(find_folder(name), () if processing else (Llama,), device)
    if processing:
        model.enable_compatibility_mode(disable_warnings=True, **{key: key in processing for key in PROCESSING})
        print(f"{gray}its weights processed as the SAE's metadata says: {', '.join(sorted(processing))}{endc}")
    if meta.weights and meta.weights != fingerprint(model):
        fail(
            f"this SAE was trained on other weights of {name} ({meta.weights}, here {fingerprint(model)}): train it again"
        )
    return model, name


def check_fit(model: nn.Module, hook: str | None, d_in: int, tokens: Tensor) -> None:
    """The hook exists, fires and is as wide as the SAE."""
    try:
        find_hooks(model, hook or "")
    except KeyError as error:
        fail(f"no place {hook!r} in this model: {error.args[0]}")
    width = harvest(model, tokens, [hook])[hook].shape[-1]
    if width != d_in:
        fail(f"the SAE takes {d_in} numbers, {hook} of this model gives {width}: it belongs to another model or hook")


#%% Judging: what the codes of held-out text are, how much of the variance they miss, and what it costs the model to live on them
def sparse(acts: Tensor) -> csr_matrix:
    row, feature = (acts != 0).nonzero(as_tuple=True)
    return csr_matrix((array(acts[row, feature]), (row.cpu().numpy(), feature.cpu().numpy())), acts.shape)


@t.no_grad()
def judge(model: nn.Module, sae, rows: Tensor, first: int, ce_rows: int = 256) -> tuple[dict[str, float], csr_matrix]:
    """
    Numbers for rows it was not trained on, from position `first` on, and their codes (token, feature). Cross-entropies are of the first ce_rows,
    the recovered share nan where removing the activation costs nothing.
    """
    hook = sae.cfg.metadata.hook_name

    def rebuild(part: Tensor) -> tuple[csr_matrix, float, float, Tensor]:
        x = harvest(model, part, [hook])[hook][:, first:].flatten(0, 1)
        acts = sae.encode(x)
        return sparse(acts), (x - sae.decode(acts)).pow(2).sum().item(), x.pow(2).sum().item(), x.sum(0)

    parts, *sums = zip(*in_batches(rebuild, rows, 64))
    codes, (missed, squares, total) = vstack(parts, format="csr"), map(sum, sums)
    n, density, rows = codes.shape[0], codes.getnnz(0) / codes.shape[0], rows[:ce_rows]
    mean = total / n
    clean, spliced, without, zero = (
        loss_of(model, rows, [(hook, put(new, first))])
        for new in (lambda x: x, lambda x: sae.decode(sae.encode(x)), lambda x: mean.expand_as(x), t.zeros_like)
    )
    recovered = lambda removed: (removed - spliced) / (removed - clean) if removed - clean > 0.02 else math.nan
    return {
        "l0": codes.nnz / n,
        "fvu": missed / (squares - n * mean.pow(2).sum().item()),
        "ce_recovered": recovered(without),
        "ce_recovered_zero_ablation": recovered(zero),
        "dead_fraction": float((density == 0).mean()),
        "dense_fraction": float((density > 0.1).mean()),
        "ce_clean": clean,
        "ce_sae": spliced,
        "ce_mean_ablated": without,
        "ce_zero_ablated": zero,
        "n_tokens": n,
    }, codes


def neighbours(directions: Tensor) -> Tensor:
    """(feature, feature) cosines of decoder rows, -1 with themselves."""
    return (F.normalize(directions.float(), dim=1) @ F.normalize(directions.float(), dim=1).T).fill_diagonal_(-1.0)


#%% Reading: for each feature its strongest contexts, the tokens it promotes, what fires with it and what points its way, as one page
def read_features(model: nn.Module, sae, codes: csr_matrix, rows: Tensor, tokenizer, chosen: list[int]) -> list[dict]:
    """One entry per feature of codes (token, feature), the codes of the last tokens of each of rows; contexts are from different rows, in per cent of the feature's largest."""
    columns, fired, counts, width = (
        codes.tocsc(),
        (codes != 0).astype(np.float32),
        codes.getnnz(0),
        codes.shape[0] // len(rows),
    )
    both, cosines, first = (
        (fired[:, chosen].T @ fired).toarray(),
        array(neighbours(sae.W_dec)),
        rows.shape[1] - codes.shape[0] // len(rows),
    )
    effects = (
        F.normalize(sae.W_dec[chosen].float(), dim=1) @ folded_W_U(model)
        if sae.cfg.d_in == len(model.W_U)
        else t.zeros(len(chosen), 0)
    )
    words = lambda ids: [visible(word) for word in str_tokens(tokenizer, ids)]
    most = lambda scores: [[int(j), round(float(scores[j]), 2)] for j in np.argsort(-scores)[:5] if scores[j] > 0.02]
    entries = []
    for i, f in enumerate(chosen):
        values, places = columns[:, [f]].data, columns[:, [f]].indices
        order, top, contexts = np.argsort(-values), float(values.max(initial=0)), []
        _, best_of_row = np.unique(places[order] // width, return_index=True)
        for row, at in (divmod(int(place), width) for place in places[order[np.sort(best_of_row)][:8]]):
            span = slice(max(0, at - 12), min(width, at + 5))
            shades = codes[row * width + span.start : row * width + span.stop, [f]].toarray()[:, 0]
            contexts.append([words(rows[row, first:][span]), (100 * shades / top).round().astype(int).tolist()])
        together = both[i] / np.maximum(counts[f] + counts - both[i], 1) * (np.arange(len(counts)) != f)
        up, down = (words((sign * effects[i]).topk(min(8, effects.shape[1])).indices) for sign in (1, -1))
        entries.append(
            {
                "id": f,
                "density": counts[f] / codes.shape[0],
                "max": round(top, 2),
                "contexts": contexts,
                "histogram": np.histogram(values, 20, (0, top or 1.0))[0].tolist(),
                "concepts": [],
                "up": up,
                "down": down,
                "with": most(together),
                "near": most(cosines[f]),
            }
        )
    return entries


#%% Concepts with known labels, and probes of them
def harvest_labelled(
    model: nn.Module, labelled: Labelled, names: list[str], bos: list[int], device: str
) -> dict[str, Tensor]:
    """{hook: (kept token, d)}. bos: what stands before every row."""
    found: dict[str, list] = {name: [None] * len(labelled.rows) for name in names}

    def keep(same: list[int]) -> None:
        for name, x in harvest(model, t.tensor([bos + labelled.rows[i] for i in same], device=device), names).items():
            for i, y in zip(same, x.cpu()):
                found[name][i] = y[len(bos) :]

    for length in sorted({len(row) for row in labelled.rows}):
        list(in_batches(keep, [i for i, row in enumerate(labelled.rows) if len(row) == length], 128))
    place = np.cumsum([0, *map(len, labelled.rows)])[labelled.row] + labelled.pos
    return {name: t.cat(rows)[place] for name, rows in found.items()}


def auroc(y: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Probability that a positive outscores a negative, ties half; one per row of weights (resample, token)."""
    order = np.argsort(score, kind="stable")
    y, score, weights = y[order], score[order], np.ones((1, len(y))) if weights is None else weights[:, order]
    starts = np.flatnonzero(np.r_[True, score[1:] != score[:-1]])
    positive, negative = np.add.reduceat(weights * y, starts, 1), np.add.reduceat(weights * ~y, starts, 1)
    with np.errstate(invalid="ignore"):
        return (positive * (negative.cumsum(1) - negative / 2)).sum(1) / (positive.sum(1) * negative.sum(1))


def split(concept: Concept, seed: int) -> np.ndarray:
    """0 train (half), 1 validation (a fifth), 2 test, by group; groups with and without positives are dealt out apart."""
    rng, part = np.random.default_rng(seed), {}
    positive = set(concept.group[concept.y])
    for groups in (sorted(positive), sorted(set(concept.group) - positive)):
        part |= {
            group: int(np.searchsorted((0.5, 0.7), (i + 0.5) / len(groups)))
            for i, group in enumerate(rng.permutation(groups))
        }
    return np.array([part[group] for group in concept.group])


def by_difference(x: csr_matrix, y: np.ndarray, n: int) -> np.ndarray:
    """The n columns whose means differ most, in standard deviations, higher in the positives."""
    mean = lambda z: np.asarray(z.mean(0)).ravel()
    return np.argsort(
        -(mean(x[y]) - mean(x[~y])) / (np.sqrt(np.maximum(mean(x.multiply(x)) - mean(x) ** 2, 0)) + 1e-6)
    )[:n]


def fit_probe(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Logistic regression on standardised columns; returns its score as a function."""
    from sklearn.linear_model import LogisticRegression

    mean, std = x.mean(0), x.std(0) + 1e-6
    probe = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-2, class_weight="balanced").fit(
        (x - mean) / std, y
    )
    return lambda z: probe.decision_function((z - mean) / std)


KS = (1, 2, 4, 8, 16, 32)


def run_probes(
    concept: Concept, codes: dict[str, csr_matrix], dense: dict[str, np.ndarray], seed: int
) -> dict[str, dict]:
    """{method: 'validation' and 'test' AUROC, 'boot' the same on 100 resamples of the test groups}. Columns are picked from codes; dense is probed whole."""
    rng, y, found, part = np.random.default_rng(seed), concept.y, {}, split(concept, seed)
    train, validation, test = (np.flatnonzero(part == i) for i in range(3))
    train = np.concatenate(
        [rng.permutation(train[y[train] == label])[:size] for label, size in ((True, 400), (False, 800))]
    )
    groups, member = np.unique(concept.group, return_inverse=True)
    weights = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), 100)[:, member[test]]
    share = np.bincount(member, y) / np.bincount(member)
    dealt = (
        rng.permutation(share > 0.5)[member] if set(share) == {0.0, 1.0} else rng.permutation(y)
    )  # every group has another's label; or every token, where groups are mixed

    def keep(
        method: str,
        score: Callable[[np.ndarray], np.ndarray],
        x: np.ndarray,
        y: np.ndarray = y,
        units: list[int] | None = None,
    ) -> None:
        on_test = score(x[test])
        found[method] = {
            "validation": float(auroc(y[validation], score(x[validation]))[0]),
            "test": float(auroc(y[test], on_test)[0]),
            "boot": auroc(y[test], on_test, weights),
            "units": units,
        }

    for source, x in codes.items():
        order = by_difference(x[concept.index[train]], y[train], KS[-1])
        x = x[concept.index][:, order].toarray()
        best = int(np.argmax([auroc(y[validation], column)[0] for column in x[validation].T]))
        keep(f"single {source}", lambda x: x[:, 0], x[:, [best]], units=[int(order[best])])
        for k in () if not dense else KS if source == "features" else KS[3:4]:
            keep(f"{k} {source}", fit_probe(x[train, :k], y[train]), x[:, :k], units=order[:k].tolist())
    for source, x in dense.items():
        x = x[concept.index]
        keep(f"dense {source}", fit_probe(x[train], y[train]), x)
        keep(
            f"difference of means {source}", lambda z: z @ (x[train][y[train]].mean(0) - x[train][~y[train]].mean(0)), x
        )
    if dense and 0 < dealt[train].sum() < len(train):
        keep("shuffled labels", fit_probe(x[train], dealt[train]), x, dealt)
    return found


def random_twin(model: nn.Module, name: str, device: str, seed: int) -> nn.Module:
    """The same shape with every matrix drawn anew at its own scale (Heap et al. 2025): its SAE shows what is in the text alone."""
    generator = t.Generator().manual_seed(seed)
    twin = copy.deepcopy(model) if isinstance(model, Llama) else load_model(find_folder(name), (), device)
    with t.no_grad():
        for p in twin.parameters():
            if p.ndim > 1:
                p.copy_(t.randn(p.shape, generator=generator).to(p) * p.float().std().to(p))
    return twin


#%% Acting: a feature added, clamped, ablated or projected out; and an answer traced to features, with what the SAE misses as a node
def change(sae, feature: int, how: str, x: Tensor, amount: float) -> Tensor:
    """What to add to x (..., d_in). add: amount times the unit direction; clamp: the feature becomes amount; ablate: zero; project: nothing of x is left along it."""
    row = sae.W_dec[feature].float()
    unit = F.normalize(row, dim=0)
    if how == "add":
        return amount * unit.expand_as(x)
    if how == "project":
        return -(x @ unit)[..., None] * unit
    return ((amount if how == "clamp" else 0.0) - sae.encode(x)[..., feature])[..., None] * row


def attribute(
    model: nn.Module, sae, tokens: Tensor, weights: Tensor
) -> tuple[dict[str, Tensor], Callable[[int, int | None], float]]:
    """
    Gradient x activation of `weights` (d_vocab) . last logits: 'features' (pos, feature) and 'error' (pos), what the SAE misses; 'value', the metric; 'moved', how
    far putting features + error in the place of the activation moves it. And a function that says how far the metric falls when a node is really ablated.
    """
    hook = sae.cfg.metadata.hook_name
    x = harvest(model, tokens, [hook])[hook]
    with t.no_grad():
        acts, clean = sae.encode(x), model(tokens)[0, -1].float() @ weights
    error = (x - sae.decode(acts)).requires_grad_()
    acts.requires_grad_()

    def run(acts: Tensor, error: Tensor) -> Tensor:
        def rebuild(y: Tensor) -> Tensor:
            sae.encode(y)  # some SAEs keep the norms here that decode puts back
            return sae.decode(acts) + error

        return run_with_hooks(model, tokens, [(hook, put(rebuild))])[0, -1].float() @ weights

    @t.no_grad()
    def falls(pos: int, feature: int | None) -> float:
        """feature None: the error node."""
        without = [acts.clone(), error.clone()]
        without[feature is None][(0, pos) if feature is None else (0, pos, feature)] = 0
        return (value - run(*without)).item()

    value = run(acts, error)
    value.backward()
    return {
        "features": (acts.grad * acts)[0].detach(),
        "error": (error.grad * error)[0].sum(-1).detach(),
        "value": value.detach(),
        "moved": (value - clean).detach().abs(),
    }, falls


def country_prompts(tokenizer, prompts: list[Prompt], bos: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (prompt, pos), padded on the right; each prompt's last position; and 1.0 (prompt, pos, 1) from its country's last token on."""
    encoded = [tokenizer.encode(p.text, add_special_tokens=False) for p in prompts]
    last = t.tensor([len(bos) + len(e.ids) - 1 for e in encoded])
    start = t.tensor(
        [
            len(bos)
            + next(
                j
                for j, (_, end) in enumerate(e.offsets)
                if end >= p.text.index(p.labels["country"]) + len(p.labels["country"])
            )
            for e, p in zip(encoded, prompts)
        ]
    )
    tokens = nn.utils.rnn.pad_sequence([t.tensor(bos + e.ids) for e in encoded], batch_first=True)
    return tokens, last, (t.arange(tokens.shape[1]) >= start[:, None]).float()[..., None]
