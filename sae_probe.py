"""Sparse autoencoders: trained here or loaded by their own metadata, judged, read as a page, probed for known concepts, steered, traced to an answer."""
import copy
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from anatomy import halving, harvest, loss_of, put, read_out, stream
from data import Concept, Corpus, DRAW, FACTS, Labelled, Prompt, fact_prompts, judging_rows, label_sentences, load_corpus, load_world, read_countries, str_tokens
from llama_block import Llama
from train import flags, start_wandb
from utils import BAR, BRIEF, act_name, array, cyan, endc, fail, feature_page, find_folder, find_hooks, gray, green, hook_points, imshow, label_tokens, line, load_model, orange, pick_device, purple, run_with_hooks, save_results, set_seed, show, show_page, text_tokenizer, visible, yellow

import numpy as np
import plotly.graph_objects as go
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from scipy.sparse import csr_matrix, vstack
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm, trange

SPARSITY = {"topk": 16.0, "batchtopk": 14.0, "matryoshka": 16.0, "own": 16.0, "standard": 1.5, "gated": 1.5, "jumprelu": 0.6}  # k of the first four, the penalty of the others

#%% The objective from scratch: an encoder, a decoder, and a loss that asks for x back from few features (Gao et al. 2024; with l1 and no k, Bricken et al. 2023)
class OwnSAE(nn.Module):
    """Of each x the k strongest features are kept; or, with k None, their sum is penalised by l1. Decoder rows count as unit vectors."""

    def __init__(self, d_in: int, d_sae: int, k: int | None, l1: float = 0.0):
        super().__init__()
        self.k, self.l1 = k, l1
        self.W_dec = nn.Parameter(0.1 * F.normalize(t.randn(d_sae, d_in), dim=1))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.clone())
        self.b_enc, self.b_dec = nn.Parameter(t.zeros(d_sae)), nn.Parameter(t.zeros(d_in))

    def offer(self, x: Tensor) -> Tensor: return ((x - self.b_dec) @ self.W_enc + self.b_enc) * self.W_dec.norm(dim=1)

    def keep(self, offered: Tensor, k: int) -> Tensor:
        top = offered.topk(k)
        return t.zeros_like(offered).scatter(-1, top.indices, top.values)

    def encode(self, x: Tensor) -> Tensor:
        offered = self.offer(x).relu()
        return offered if self.k is None else self.keep(offered, self.k)

    def decode(self, acts: Tensor) -> Tensor: return acts @ F.normalize(self.W_dec, dim=1) + self.b_dec

    def loss(self, x: Tensor, dead: Tensor) -> Tensor:
        """Squared error, and l1; the dead features (d_sae, bool) learn what the living leave over."""
        acts = self.encode(x)
        error = x - self.decode(acts)
        loss = error.pow(2).sum(-1).mean() + self.l1 * acts.sum(-1).mean()
        if self.k is None or not (n_dead := int(dead.sum())): return loss
        half = x.shape[-1] // 2
        rest = self.decode(self.keep(self.offer(x).masked_fill(~dead, -math.inf), min(half, n_dead))) - self.b_dec
        return loss + min(1.0, n_dead / half) * (rest - error.detach()).pow(2).sum(-1).mean()

#%% Training: SAELens's trainer and configs, or the objective above; checkpoints on the way; the result is always opened again from disk
def variant(text: str, cfg: "Config") -> "Config":
    """The settings with another architecture[:sparsity[:width[:hook]]]; what is left out stays, or is the architecture's default."""
    kind, sparsity, width, hook = (text.split(":") + [""] * 4)[:4]
    if kind not in SPARSITY: fail(f"unknown architecture {kind!r} in {text!r}: {', '.join(SPARSITY)}")
    try: new = dataclasses.replace(cfg, architecture=kind, sparsity=float(sparsity or SPARSITY[kind]), d_sae=int(width or cfg.d_sae), hook=hook or cfg.hook)
    except ValueError: fail(f"{text!r} does not read architecture:sparsity:width:hook, as topk:8:512:blocks.2.hook_resid_pre")
    if new.sparsity <= 0 or (kind in ("topk", "own") and not 1 <= new.sparsity <= new.d_sae): fail(f"sparsity {new.sparsity:g} makes no sense for {kind} of width {new.d_sae}")
    return new

def label_of(cfg: "Config") -> str: return f"{cfg.architecture} {cfg.sparsity:g} x {cfg.d_sae}, {cfg.hook}"

def training_sae(cfg: "Config", d_in: int, metadata: dict, device: str):
    """A fresh TrainingSAE of SAELens. Activations are scaled to a mean norm of sqrt(d_in), so that a penalty means the same everywhere."""
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata
    penalty, l0 = dict(l1_coefficient=cfg.sparsity, l1_warm_up_steps=cfg.steps // 5), dict(l0_coefficient=cfg.sparsity, l0_warm_up_steps=cfg.steps // 5)
    tanh = dict(jumprelu_bandwidth=0.5, jumprelu_init_threshold=0.1, jumprelu_ste_to_input=True, jumprelu_sparsity_loss_mode="tanh", pre_act_loss_coefficient=3e-3)  # Anthropic's setup
    kind, extra = {
        "standard": ("Standard", penalty), "gated": ("Gated", penalty), "jumprelu": ("JumpReLU", l0 | tanh), "topk": ("TopK", dict(k=int(cfg.sparsity))), "batchtopk": ("BatchTopK", dict(k=cfg.sparsity)),
        "matryoshka": ("MatryoshkaBatchTopK", dict(k=cfg.sparsity, matryoshka_widths=[max(1, cfg.d_sae // 16), max(2, cfg.d_sae // 4), cfg.d_sae])),
    }[cfg.architecture]
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=d_in, d_sae=cfg.d_sae, normalize_activations="expected_average_only_in", device=device, metadata=SAEMetadata(**metadata), **extra)
    return sae_lens.registry.get_sae_training_class(config.architecture())[0](config)

def train_lens(sae, batches: Callable[[int], Iterator[Tensor]], cfg: "Config", parts: Path, device: str):
    """SAELens's own loop; goes on from the last checkpoint of a run that was cut off."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer
    trainer = SAETrainer(SAETrainerConfig(
        total_training_samples=cfg.steps * cfg.batch, train_batch_size_samples=cfg.batch, lr=cfg.lr, lr_end=cfg.lr / 10, lr_warm_up_steps=cfg.steps // 20, lr_decay_steps=cfg.steps // 3,
        dead_feature_window=cfg.dead_window, n_batches_for_norm_estimate=16, device=device, n_checkpoints=cfg.checkpoints, checkpoint_path=str(parts), logger=LoggingConfig(log_to_wandb=cfg.wandb),
    ), sae, batches(0))
    if done := sorted((path.parent for path in parts.glob("*/activation_scaler.json")), key=lambda path: int(path.name)):
        sae.load_weights_from_checkpoint(done[-1])
        trainer.load_trainer_state(done[-1])
        trainer.data_provider = batches(trainer.n_training_steps)
        print(f"{gray}going on from {done[-1]}{endc}")
    return trainer.fit()

def train_own(batches: Callable[[int], Iterator[Tensor]], cfg: "Config", metadata: dict, device: str):
    """The objective from scratch with the same schedule; returned as an inference SAE of SAELens."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    data = batches(0)
    d_in, scale = (x := next(data)).shape[1], math.sqrt(x.shape[1]) / x.norm(dim=1).mean()
    own, idle = OwnSAE(d_in, cfg.d_sae, int(cfg.sparsity)).to(device), t.zeros(cfg.d_sae, device=device)
    optimizer = t.optim.Adam(own.parameters(), lr=cfg.lr)
    for step in trange(cfg.steps, desc="own objective", **BAR):
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, (step + 1) / (1 + cfg.steps // 20), max(0.1, 3 * (1 - step / cfg.steps)))
        x = next(data) * scale
        own.loss(x, idle > cfg.dead_window).backward()
        nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with t.no_grad(): idle = t.where((own.encode(x) > 0).any(0), 0.0, idle + 1)
    sae, length = TopKSAE(TopKSAEConfig(d_in, cfg.d_sae, k=int(cfg.sparsity), device=device, metadata=SAEMetadata(**metadata))), own.W_dec.norm(dim=1)
    sae.load_state_dict({"W_enc": own.W_enc * length * scale, "b_enc": own.b_enc * length, "W_dec": F.normalize(own.W_dec, dim=1) / scale, "b_dec": own.b_dec / scale})
    return sae

def fingerprint(model: nn.Module) -> str: return hashlib.sha256(array(model.W_U[:, :256]).tobytes()).hexdigest()[:10]

def fit_sae(model: nn.Module, cfg: "Config", corpus: Corpus, name: str, device: str):
    """The SAE of these settings, trained or found finished under checkpoints/sae_probe/<key>; either way as SAE.load_from_disk opens it."""
    if cfg.hook not in hook_points(model): check_fit(model, cfg.hook, 0, t.zeros(1, 1))
    metadata = dict(model_name=name, hook_name=cfg.hook, prepend_bos=True, context_size=cfg.context, weights=fingerprint(model), data=corpus.key)
    same = metadata | {field: getattr(cfg, field) for field in ("architecture", "sparsity", "d_sae", "steps", "batch", "lr", "buffer", "dead_window", "seed")}
    key = f"{cfg.architecture}_{cfg.sparsity:g}_{cfg.d_sae}_{cfg.hook}_{hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]}"
    folder = Path("checkpoints/sae_probe") / key
    if folder.is_dir():
        print(f"{gray}trained before: {folder}{endc}")
        return open_folder(folder, device)
    print(f"{gray}training {label_of(cfg)} of {name} on {cfg.steps * cfg.batch / 1e3:.0f}k activations, {cfg.buffer / 1e3:.0f}k of them in memory ...{endc}")
    set_seed(cfg.seed)
    batch = lambda step, i: corpus.batch(np.random.default_rng((cfg.seed, step, i)), max(1, cfg.buffer // 4 // cfg.context), cfg.context).to(device)
    batches = lambda step: stream(model, cfg.hook, lambda i: batch(step, i), cfg.batch, cfg.buffer, cfg.seed + step)
    parts, aside = folder.with_name(f"{key}.parts"), folder.with_name(f".{key}")
    if cfg.architecture == "own": train_own(batches, cfg, metadata, device).save_model(aside)
    else:
        if cfg.wandb: start_wandb("sae_probe", same)
        d_in = harvest(model, batch(0, 0)[:1], [cfg.hook])[cfg.hook].shape[-1]
        train_lens(training_sae(cfg, d_in, metadata, device), batches, cfg, parts, device).save_inference_model(aside)
    sae = open_folder(aside, device)
    if not all(p.isfinite().all() for p in sae.parameters()): fail(f"training {label_of(cfg)} diverged: lower --lr")
    aside.rename(folder)
    shutil.rmtree(parts, ignore_errors=True)
    return sae

#%% Loading: a folder or SAELens's registry; the SAE's own metadata decides the model, its processing, the hook and the rows
def open_folder(folder: str | Path, device: str):
    from sae_lens import SAE
    if not all((Path(folder) / file).is_file() for file in ("cfg.json", "sae_weights.safetensors")): fail(f"--sae {folder}: no cfg.json and sae_weights.safetensors there (SAELens's save_inference_model writes them)")
    try: return ready(SAE.load_from_disk(folder, device=device))
    except Exception as error: fail(f"--sae {folder} cannot be read: {type(error).__name__}: {str(error).splitlines()[0][:200]}")

def open_release(release: str, sae_id: str, device: str):
    """From SAELens's registry, whose list is read without importing the package (15 s): a typo is answered at once."""
    import yaml
    path = Path(importlib.util.find_spec("sae_lens").origin).parent / "pretrained_saes.yaml"
    known = {name: [sae["id"] for sae in entry["saes"]] for name, entry in yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)).items()}
    near = lambda asked, names: ", ".join(difflib.get_close_matches(asked, names, 5, 0.3)) or f"none of {len(names)}"
    if "/" not in release and release not in known: fail(f"no release {release!r} in SAELens's registry; near: {near(release, known)}")
    if release in known and sae_id not in known[release]: fail(f"no SAE {sae_id!r} in {release}; near: {near(sae_id, known[release])}")
    from sae_lens import SAE
    try: return ready(SAE.from_pretrained(release, sae_id, device=device))
    except Exception as error: fail(f"cannot fetch {release} {sae_id} (no network? --sae takes a local folder): {type(error).__name__}: {str(error).splitlines()[0][:160]}")

def ready(sae):
    """Heads side by side, no gradients; what is not a plain autoencoder of one place is refused."""
    if "transcoder" in sae.cfg.architecture(): fail(f"a {sae.cfg.architecture()} maps one place to another: not an autoencoder")
    if sae.cfg.normalize_activations == "expected_average_only_in": print(f"{yellow}this SAE wants scaled activations, and its file does not say by how much: its reconstruction will show it{endc}")
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae.requires_grad_(False).eval()

PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")

def model_for(sae, asked: str | None, device: str) -> tuple[nn.Module, str]:
    """The model an SAE was trained on, its weights processed as the metadata states; and its name."""
    meta = sae.cfg.metadata
    name, loading = asked or meta.model_name, {key for key, value in (meta.model_from_pretrained_kwargs or {}).items() if value}
    if name is None: fail("this SAE does not name its model: give it by --model")
    if meta.model_name and find_folder(name) != find_folder(meta.model_name): fail(f"this SAE was trained on {meta.model_name}, not on {name}: leave --model out")
    if unknown := loading - {*PROCESSING, "dtype", "device", "n_devices"}: fail(f"this SAE's model is loaded with {', '.join(sorted(unknown))}, which is not built here")
    processing = loading & set(PROCESSING)
    model = load_model(find_folder(name), () if processing else (Llama,), device)
    if processing:
        model.enable_compatibility_mode(disable_warnings=True, **{key: key in processing for key in PROCESSING})
        print(f"{gray}its weights processed as the SAE's metadata says: {', '.join(sorted(processing))}{endc}")
    if meta.weights and meta.weights != fingerprint(model): fail(f"this SAE was trained on other weights of {name} ({meta.weights}, here {fingerprint(model)}): train it again")
    return model, name

def check_fit(model: nn.Module, hook: str | None, d_in: int, tokens: Tensor) -> None:
    """The hook exists, fires and is as wide as the SAE."""
    try: find_hooks(model, hook or "")
    except KeyError as error: fail(f"no place {hook!r} in this model: {error.args[0]}")
    width = harvest(model, tokens, [hook])[hook].shape[-1]
    if width != d_in: fail(f"the SAE takes {d_in} numbers, {hook} of this model gives {width}: it belongs to another model or hook")

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
    parts, *sums = zip(*halving(rebuild, rows, 64))
    codes, (missed, squares, total) = vstack(parts, format="csr"), map(sum, sums)
    n, density, rows = codes.shape[0], codes.getnnz(0) / codes.shape[0], rows[:ce_rows]
    mean = total / n
    clean, spliced, without, zero = (loss_of(model, rows, [(hook, put(new, first))]) for new in (lambda x: x, lambda x: sae.decode(sae.encode(x)), lambda x: mean.expand_as(x), t.zeros_like))
    recovered = lambda removed: (removed - spliced) / (removed - clean) if removed - clean > 0.02 else math.nan
    return {
        "l0": codes.nnz / n, "fvu": missed / (squares - n * mean.pow(2).sum().item()), "ce_recovered": recovered(without), "ce_recovered_zero_ablation": recovered(zero), "dead_fraction": float((density == 0).mean()),
        "dense_fraction": float((density > 0.1).mean()), "ce_clean": clean, "ce_sae": spliced, "ce_mean_ablated": without, "ce_zero_ablated": zero, "n_tokens": n,
    }, codes

def neighbours(directions: Tensor) -> Tensor:
    """(feature, feature) cosines of decoder rows, -1 with themselves."""
    return (F.normalize(directions.float(), dim=1) @ F.normalize(directions.float(), dim=1).T).fill_diagonal_(-1.0)

#%% Reading: for each feature its strongest contexts, the tokens it promotes, what fires with it and what points its way, as one page
def read_features(model: nn.Module, sae, codes: csr_matrix, rows: Tensor, tokenizer, chosen: list[int]) -> list[dict]:
    """One entry per feature of codes (token, feature), the codes of the last tokens of each of rows; contexts are from different rows, in per cent of the feature's largest."""
    columns, fired, counts, width = codes.tocsc(), (codes != 0).astype(np.float32), codes.getnnz(0), codes.shape[0] // len(rows)
    both, cosines, first = (fired[:, chosen].T @ fired).toarray(), array(neighbours(sae.W_dec)), rows.shape[1] - codes.shape[0] // len(rows)
    effects = F.normalize(sae.W_dec[chosen].float(), dim=1) @ read_out(model) if sae.cfg.d_in == len(model.W_U) else t.zeros(len(chosen), 0)
    words = lambda ids: [visible(word) for word in str_tokens(tokenizer, ids)]
    most = lambda scores: [[int(j), round(float(scores[j]), 2)] for j in np.argsort(-scores)[:5] if scores[j] > 0.02]
    entries = []
    for i, f in enumerate(chosen):
        values, places = columns[:, [f]].data, columns[:, [f]].indices
        order, top, contexts = np.argsort(-values), float(values.max(initial=0)), []
        _, best_of_row = np.unique(places[order] // width, return_index=True)
        for row, at in (divmod(int(place), width) for place in places[order[np.sort(best_of_row)][:8]]):
            span = slice(max(0, at - 12), min(width, at + 5))
            shades = codes[row * width + span.start:row * width + span.stop, [f]].toarray()[:, 0]
            contexts.append([words(rows[row, first:][span]), (100 * shades / top).round().astype(int).tolist()])
        together = both[i] / np.maximum(counts[f] + counts - both[i], 1) * (np.arange(len(counts)) != f)
        up, down = (words((sign * effects[i]).topk(min(8, effects.shape[1])).indices) for sign in (1, -1))
        entries.append({"id": f, "density": counts[f] / codes.shape[0], "max": round(top, 2), "contexts": contexts, "histogram": np.histogram(values, 20, (0, top or 1.0))[0].tolist(), "concepts": [], "up": up, "down": down, "with": most(together), "near": most(cosines[f])})
    return entries

#%% Concepts with known labels: the activations at every labelled token of the world
def harvest_labelled(model: nn.Module, labelled: Labelled, names: list[str], bos: list[int], device: str) -> dict[str, Tensor]:
    """{hook: (kept token, d)}. bos: what stands before every row."""
    found: dict[str, list] = {name: [None] * len(labelled.rows) for name in names}
    def keep(same: list[int]) -> None:
        for name, x in harvest(model, t.tensor([bos + labelled.rows[i] for i in same], device=device), names).items():
            for i, y in zip(same, x.cpu()): found[name][i] = y[len(bos):]
    for length in sorted({len(row) for row in labelled.rows}): list(halving(keep, [i for i, row in enumerate(labelled.rows) if len(row) == length], 128))
    place = np.cumsum([0, *map(len, labelled.rows)])[labelled.row] + labelled.pos
    return {name: t.cat(rows)[place] for name, rows in found.items()}

#%% Probes: one feature, k features, k neurons, the whole residual stream, a difference of means; chosen on validation, told of test entities
def auroc(y: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Probability that a positive outscores a negative, ties half; one per row of weights (resample, token)."""
    order = np.argsort(score, kind="stable")
    y, score, weights = y[order], score[order], np.ones((1, len(y))) if weights is None else weights[:, order]
    starts = np.flatnonzero(np.r_[True, score[1:] != score[:-1]])
    positive, negative = np.add.reduceat(weights * y, starts, 1), np.add.reduceat(weights * ~y, starts, 1)
    with np.errstate(invalid="ignore"): return (positive * (negative.cumsum(1) - negative / 2)).sum(1) / (positive.sum(1) * negative.sum(1))

def split(concept: Concept, seed: int) -> np.ndarray:
    """0 train (half), 1 validation (a fifth), 2 test, by group; groups with and without positives are dealt out apart."""
    rng, part = np.random.default_rng(seed), {}
    positive = set(concept.group[concept.y])
    for groups in (sorted(positive), sorted(set(concept.group) - positive)):
        part |= {group: int(np.searchsorted((0.5, 0.7), (i + 0.5) / len(groups))) for i, group in enumerate(rng.permutation(groups))}
    return np.array([part[group] for group in concept.group])

def by_difference(x: csr_matrix, y: np.ndarray, n: int) -> np.ndarray:
    """The n columns whose means differ most, in standard deviations, higher in the positives."""
    mean = lambda z: np.asarray(z.mean(0)).ravel()
    return np.argsort(-(mean(x[y]) - mean(x[~y])) / (np.sqrt(np.maximum(mean(x.multiply(x)) - mean(x) ** 2, 0)) + 1e-6))[:n]

def fit_probe(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Logistic regression on standardised columns; returns its score as a function."""
    from sklearn.linear_model import LogisticRegression
    mean, std = x.mean(0), x.std(0) + 1e-6
    probe = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-2, class_weight="balanced").fit((x - mean) / std, y)
    return lambda z: probe.decision_function((z - mean) / std)

KS = (1, 2, 4, 8, 16, 32)

def run_probes(concept: Concept, codes: dict[str, csr_matrix], dense: dict[str, np.ndarray], seed: int) -> dict[str, dict]:
    """{method: 'validation' and 'test' AUROC, 'boot' the same on 100 resamples of the test groups}. Columns are picked from codes; dense is probed whole."""
    rng, y, found, part = np.random.default_rng(seed), concept.y, {}, split(concept, seed)
    train, validation, test = (np.flatnonzero(part == i) for i in range(3))
    train = np.concatenate([rng.permutation(train[y[train] == label])[:size] for label, size in ((True, 400), (False, 800))])
    groups, member = np.unique(concept.group, return_inverse=True)
    weights = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), 100)[:, member[test]]
    share = np.bincount(member, y) / np.bincount(member)
    dealt = rng.permutation(share > 0.5)[member] if set(share) == {0.0, 1.0} else rng.permutation(y)  # every group has another's label; or every token, where groups are mixed

    def keep(method: str, score: Callable[[np.ndarray], np.ndarray], x: np.ndarray, y: np.ndarray = y, units: list[int] | None = None) -> None:
        on_test = score(x[test])
        found[method] = {"validation": float(auroc(y[validation], score(x[validation]))[0]), "test": float(auroc(y[test], on_test)[0]), "boot": auroc(y[test], on_test, weights), "units": units}

    for source, x in codes.items():
        order = by_difference(x[concept.index[train]], y[train], KS[-1])
        x = x[concept.index][:, order].toarray()
        best = int(np.argmax([auroc(y[validation], column)[0] for column in x[validation].T]))
        keep(f"single {source}", lambda x: x[:, 0], x[:, [best]], units=[int(order[best])])
        for k in () if not dense else KS if source == "features" else KS[3:4]: keep(f"{k} {source}", fit_probe(x[train, :k], y[train]), x[:, :k], units=order[:k].tolist())
    for source, x in dense.items():
        x = x[concept.index]
        keep(f"dense {source}", fit_probe(x[train], y[train]), x)
        keep(f"difference of means {source}", lambda z: z @ (x[train][y[train]].mean(0) - x[train][~y[train]].mean(0)), x)
    if dense and 0 < dealt[train].sum() < len(train): keep("shuffled labels", fit_probe(x[train], dealt[train]), x, dealt)
    return found

def random_twin(model: nn.Module, name: str, device: str, seed: int) -> nn.Module:
    """The same shape with every matrix drawn anew at its own scale (Heap et al. 2025): its SAE shows what is in the text alone."""
    generator = t.Generator().manual_seed(seed)
    twin = copy.deepcopy(model) if isinstance(model, Llama) else load_model(find_folder(name), (), device)
    with t.no_grad():
        for p in twin.parameters():
            if p.ndim > 1: p.copy_(t.randn(p.shape, generator=generator).to(p) * p.float().std().to(p))
    return twin

#%% Acting: a feature added, clamped, ablated or projected out; and an answer traced to features, with what the SAE misses as a node
def change(sae, feature: int, how: str, x: Tensor, amount: float) -> Tensor:
    """What to add to x (..., d_in). add: amount times the unit direction; clamp: the feature becomes amount; ablate: zero; project: nothing of x is left along it."""
    row = sae.W_dec[feature].float()
    unit = F.normalize(row, dim=0)
    if how == "add": return amount * unit.expand_as(x)
    if how == "project": return -(x @ unit)[..., None] * unit
    return ((amount if how == "clamp" else 0.0) - sae.encode(x)[..., feature])[..., None] * row

def attribute(model: nn.Module, sae, tokens: Tensor, weights: Tensor) -> tuple[dict[str, Tensor], Callable[[int, int | None], float]]:
    """
    Gradient x activation of `weights` (d_vocab) . last logits: 'features' (pos, feature) and 'error' (pos), what the SAE misses; 'value', the metric; 'moved', how
    far putting features + error in the place of the activation moves it. And a function that says how far the metric falls when a node is really ablated.
    """
    hook = sae.cfg.metadata.hook_name
    x = harvest(model, tokens, [hook])[hook]
    with t.no_grad(): acts, clean = sae.encode(x), model(tokens)[0, -1].float() @ weights
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
    return {"features": (acts.grad * acts)[0].detach(), "error": (error.grad * error)[0].sum(-1).detach(), "value": value.detach(), "moved": (value - clean).detach().abs()}, falls

#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str | None = None  # a hub name or a folder; default models/world, or what the SAE's metadata names
    sae: str | None = None  # a local folder with a SAE, instead of training one
    release: str | None = None  # a release of SAELens's registry, as gpt2-small-res-jb
    sae_id: str = ""  # and its SAE, as blocks.8.hook_resid_pre
    hook: str = "blocks.2.hook_resid_pre"  # where a SAE is trained
    architecture: Literal["topk", "batchtopk", "matryoshka", "standard", "gated", "jumprelu", "own"] = "batchtopk"  # own is the objective written out in this file
    sparsity: float | None = None  # k of topk, batchtopk, matryoshka and own, the penalty of the others; default by architecture
    d_sae: int = 512
    variants: tuple[str, ...] = ("topk:8", "matryoshka", "batchtopk:14:1024")  # more SAEs for the Pareto figure, as architecture:sparsity:width:hook; finished ones are not trained again
    steps: int = 500
    batch: int = 1024  # activations per step
    lr: float = 2e-3
    buffer: int = 48_000  # activations in memory
    dead_window: int = 50  # steps without firing after which training counts a feature as dead
    checkpoints: int = 3  # on the way; a run that was cut off goes on from the last
    context: int = 64  # tokens per row, unless the SAE's metadata says otherwise
    data: str | None = None  # world, stdlib, a text file or folder, a hub dataset; default world for models/world, else stdlib
    heldout: int = 200_000  # tokens that the SAE is judged and read on
    min_recovered: float = 0.5  # gate: no feature is read below this share of cross-entropy recovered,
    max_fvu: float = 0.5  # or above this fraction of variance unexplained
    sentences: int = 150  # labelled sentences of each kind
    seeds: int = 3  # splits of the entities
    random_baseline: bool = True  # also an SAE of a model with random weights of the same shape
    prompt: str = "The capital of France is"  # whose answer is traced to features
    wandb: bool = False
    seed: int = 0
    device: str = "auto"

if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=Config(model="gpt2", hook="blocks.8.hook_resid_pre", d_sae=24_576, sparsity=32.0, steps=50_000, batch=4096, buffer=500_000, context=128, data="HuggingFaceFW/fineweb-edu", variants=(), random_baseline=False))
    device = pick_device(cfg.device)
    set_seed(cfg.seed)

#%% The model, its text and the SAE: trained and opened again, or loaded with what its metadata asks for
if __name__ == "__main__":
    pretrained = bool(cfg.sae or cfg.release)
    if pretrained:
        sae = open_folder(cfg.sae, device) if cfg.sae else open_release(cfg.release, cfg.sae_id, device)
        model, name = model_for(sae, cfg.model, device)
    else:
        cfg, name = variant(f"{cfg.architecture}:{cfg.sparsity or ''}", cfg), cfg.model or "models/world"
        model = load_model(find_folder(name), (Llama,), device)
    model.requires_grad_(False)
    tokenizer = text_tokenizer(model)
    data = cfg.data or ("world" if find_folder(name) == find_folder("models/world") else "stdlib")
    corpus = load_world() if data == "world" else load_corpus(data, tokenizer=find_folder(name))
    if corpus.d_vocab > model.W_U.shape[1]: fail(f"the text has {corpus.d_vocab} kinds of tokens, the model {model.W_U.shape[1]}: --data world is for models/world")
    if not pretrained: sae = fit_sae(model, cfg, corpus, name, device)
    meta = sae.cfg.metadata
    context, bos = meta.context_size or cfg.context, [corpus.bos] if meta.prepend_bos in (None, True) else []
    rows = judging_rows(corpus, -(-cfg.heldout // (context - len(bos))), context + (not bos), cfg.seed)[:, not bos:].to(device)
    check_fit(model, hook := meta.hook_name, sae.cfg.d_in, rows[:1])
    about = f"{name}, {hook}, {meta.training_architecture or sae.cfg.architecture()} of width {sae.cfg.d_sae}"

#%% Judged on held-out text, and the gate: no feature is read of an SAE that does not rebuild what the model lives on
if __name__ == "__main__":
    judged, codes = judge(model, sae, rows, len(bos))
    numbers, density = dict(judged), codes.getnnz(0) / codes.shape[0]
    print(f"{purple}=== {about}, as reopened from disk, on {judged['n_tokens']:,} held-out tokens ==={endc}")
    print(tabulate([[key.replace("_", " "), value] for key, value in judged.items()], floatfmt=".4f"))
    if not judged["fvu"] <= cfg.max_fvu: fail(f"gate: the SAE leaves {judged['fvu']:.2f} of the variance unexplained (at most --max-fvu {cfg.max_fvu}): wrong model, hook or processing, or too little training")
    if judged["ce_recovered"] < cfg.min_recovered: fail(f"gate: {judged['ce_recovered']:.2f} of the cross-entropy is recovered (at least --min-recovered {cfg.min_recovered}): wrong model, hook or processing, or too little training")
    if math.isnan(judged["ce_recovered"]): print(f"{yellow}removing {hook} costs this model nothing: cross-entropy recovered has no meaning here{endc}")
    bins, edges = np.linspace(-6, 0, 61), np.linspace(0, 1, 51)
    firing = go.Figure(go.Bar(x=bins[:-1] + 0.05, y=np.histogram(np.log10(np.maximum(density, 1e-6)), bins)[0], hovertemplate="10^%{x:.1f} of tokens: %{y} features<extra></extra>"))
    show(firing.update_layout(title=f"How often features fire ({about}; n = {judged['n_tokens']:,} tokens; dead ones at -6)", xaxis_title="log10 share of tokens", yaxis_title="features"), "sae_probe/density")
    cosines = {label: array(neighbours(x).max(1).values) for label, x in (("decoder rows", sae.W_dec), ("random directions", t.randn_like(sae.W_dec)))}
    show(line({label: np.histogram(x, edges)[0] / len(x) for label, x in cosines.items()}, f"Cosine of each decoder row with its nearest ({about})", "largest cosine with another", "share of features", edges[:-1] + 0.01, dashed=["random directions"]), "sae_probe/decoder_cosine")
    numbers |= {"nearest_cosine": cosines["decoder rows"].mean(), "nearest_cosine_random": cosines["random directions"].mean()}

#%% Labelled tokens of the world: the codes of this SAE and of a random-weight model's, neurons and the residual stream of every layer
if __name__ == "__main__":
    rng = Random(cfg.seed)
    prompts = [p for task in FACTS for p in rng.sample(fact_prompts(read_countries(), task, True), cfg.sentences)] + [DRAW[task](rng, True) for task in ("ioi", "gender", "agreement") for _ in range(cfg.sentences)]
    labelled = label_sentences(tokenizer, prompts, judging_rows(corpus, 60, 64, cfg.seed + 1)[:, 1:], 6000, cfg.seed)
    residual = [act_name("resid_pre", layer) for layer in range(model.cfg.n_layers)] + [act_name("resid_post", model.cfg.n_layers - 1)]
    layer = int(re.search(r"\d+", hook)[0]) if "blocks" in hook else model.cfg.n_layers - 1
    neurons = act_name("post", max(0, layer - 1) if "pre" in hook else layer)
    found = harvest_labelled(model, labelled, list(dict.fromkeys([*residual, *[neurons] * (neurons in hook_points(model)), hook])), bos, device)
    sources = {"features": sparse(sae.encode(found[hook].to(device)))}
    if neurons in found: sources["neurons"] = csr_matrix(array(found[neurons]))
    if cfg.random_baseline:
        twin = random_twin(model, name, device, cfg.seed)
        twin_sae = fit_sae(twin, variant(f"topk:::{hook}", cfg), corpus, f"{name} with random weights", device)
        sources["features of random weights"] = sparse(twin_sae.encode(harvest_labelled(twin, labelled, [hook], bos, device)[hook].to(device)))
    print(f"{gray}{len(labelled.role)} labelled tokens: " + ", ".join(f"{role or 'none'} {(labelled.role == role).sum()}" for role in np.unique(labelled.role)) + endc)

#%% Which concept has a feature of its own, how many features it takes, and what a whole layer or nothing at all would say
if __name__ == "__main__":
    dense, table, best_auroc, probes, tags = {place: array(found[place]) for place in [*(p for p in residual if p != hook), hook]}, [], {}, {}, {}
    for concept_name, concept in tqdm(labelled.concepts.items(), desc="probes", **BAR):
        runs = [run_probes(concept, sources, dense, cfg.seed + s) for s in range(cfg.seeds)]
        mean = lambda method, which="test": float(np.nanmean([run[method][which] for run in runs if method in run]))
        bounds = {method: np.nanpercentile(np.concatenate([run[method]["boot"] for run in runs if method in run]), (2.5, 97.5)).tolist() for method in runs[0]}
        needed = next((k for k in KS if mean(f"{k} features", "validation") >= 0.95), None)
        best_layer, unit = max(residual, key=lambda place: mean(f"dense {place}", "validation")), runs[0]["single features"]["units"][0]
        tags.setdefault(unit, []).append(concept_name)
        best_auroc[concept_name] = mean("single features")
        probes[concept_name] = {"feature": unit, "features_needed": needed, "features": runs[0][f"{needed or KS[-1]} features"]["units"], "best_layer": best_layer, "entities": len(set(concept.group[concept.y])), "auroc": {method: mean(method) for method in bounds}, "interval": bounds}
        said = lambda method: f"{mean(method):.3f} [{bounds[method][0]:.2f}, {bounds[method][1]:.2f}]" if method in bounds else ""
        table.append([concept_name, f"f{unit} {said('single features')}", f"{needed}: {said(f'{needed} features')}" if needed else f"not {KS[-1]}: {said(f'{KS[-1]} features')}", *(said(method) for method in ("8 features", "8 neurons", "8 features of random weights", f"difference of means {hook}", f"dense {hook}", "shuffled labels")), f"{best_layer} {mean(f'dense {best_layer}'):.3f}"])
    print(f"{purple}=== Test AUROC [95% interval over {cfg.seeds} splits of the entities and resampled entities]; features, k and layer chosen on validation ==={endc}")
    print(tabulate(table, headers=["concept", "one feature", "features for 0.95", "8 features", "8 neurons", "8 of random weights", "difference of means", "dense probe", "shuffled labels", "best layer, dense"]))
    compare = lambda methods, names, what: imshow(np.array([[probes[c]["auroc"].get(m, np.nan) - 0.5 for m in methods] for c in probes]), f"Test AUROC - 0.5 by concept and {what} ({about}; {cfg.seeds} splits by entity)", what, "concept", names, list(probes), value="AUROC - 0.5").update_layout(height=700).update_yaxes(dtick=1)
    methods = [m for m in bounds if not m.startswith(("dense", "difference")) or m.endswith(hook)]
    show(compare(methods, methods, "method"), "sae_probe/probes")
    show(compare([f"dense {place}" for place in residual], residual, "layer of a dense probe"), "sae_probe/layers")
    numbers |= {"best_auroc": best_auroc, "probes": probes}

#%% What those features fire on, and every feature on a page
if __name__ == "__main__":
    alive = [int(f) for f in np.argsort(-density) if density[f] > 0]
    entries = {entry["id"]: entry for entry in read_features(model, sae, codes, rows, tokenizer, sorted({*alive[:1024], *(f for p in probes.values() for f in (p["feature"], *p["features"]))}))}
    for f, concepts in tags.items(): entries[f]["concepts"] = [f"{c} {best_auroc[c]:.2f}" for c in concepts]
    mark = lambda words, shades: "".join(f"{orange}{word}{endc}" if shade > 30 else word for word, shade in zip(words, shades))
    for c in ("country", "capital", "name", "place", "object"):
        for f in [probes[c]["feature"]] if best_auroc[c] >= 0.95 else probes[c]["features"][:4]: print(f"{purple}{c}{endc} {cyan}f{f}{endc} " + " | ".join(mark(*context) for context in entries[f]["contexts"][:3]))
    show_page(feature_page(list(entries.values()), f"{len(entries)} features: {about}, {judged['n_tokens']:,} held-out tokens"), "sae_probe/features")

#%% Other sparsities, widths, kinds and layers: what they cost, and whether they have the features that this one lacks
if __name__ == "__main__" and not pretrained:
    singles, points = {label_of(cfg): best_auroc}, {label_of(cfg): judged}
    for other in (variant(text, cfg) for text in cfg.variants):
        other_sae = fit_sae(model, other, corpus, name, device)
        points[label_of(other)], _ = judge(model, other_sae, rows, len(bos))
        x = {"features": sparse(other_sae.encode(found.get(other.hook, harvest_labelled(model, labelled, [other.hook], bos, device)[other.hook]).to(device)))}
        singles[label_of(other)] = {c: float(np.mean([run_probes(concept, x, {}, cfg.seed + s)["single features"]["test"] for s in range(cfg.seeds)])) for c, concept in labelled.concepts.items()}
    print(f"{purple}=== Reopened SAEs on held-out text, and the test AUROC of their best single features ==={endc}")
    print(tabulate([[label.removesuffix(f", {cfg.hook}"), *(point[key] for key in ("l0", "ce_recovered", "fvu", "dead_fraction")), *singles[label].values()] for label, point in points.items()], headers=["SAE", "L0", "CE recovered", "FVU", "dead", *best_auroc], floatfmt=".3f"))
    fig = go.Figure([go.Scatter(x=[p["l0"]], y=[p["ce_recovered"]], name=label, mode="markers", marker=dict(size=12), hovertemplate=f"{label}<br>L0 %{{x:.1f}}<br>CE recovered %{{y:.4f}}<br>FVU {p['fvu']:.3f}, dead {p['dead_fraction']:.3f}<extra></extra>") for label, p in points.items()])
    show(fig.update_layout(title=f"What sparsity costs (reopened SAEs, {judged['n_tokens']:,} held-out tokens; {name})", xaxis_title="L0 (features per token)", yaxis_title="cross-entropy recovered (mean ablation)", showlegend=True), "sae_probe/pareto")
    numbers["variants"] = {label: point | {"single_feature_auroc": singles[label]} for label, point in points.items()}

#%% Steering: countries are moved to another continent, against random features and directions of the same length
def country_prompts(tokenizer, prompts: list[Prompt], bos: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (prompt, pos), padded on the right; each prompt's last position; and 1.0 (prompt, pos, 1) from its country's last token on."""
    encoded = [tokenizer.encode(p.text, add_special_tokens=False) for p in prompts]
    last = t.tensor([len(bos) + len(e.ids) - 1 for e in encoded])
    start = t.tensor([len(bos) + next(j for j, (_, end) in enumerate(e.offsets) if end >= p.text.index(p.labels["country"]) + len(p.labels["country"])) for e, p in zip(encoded, prompts)])
    tokens = nn.utils.rnn.pad_sequence([t.tensor(bos + e.ids) for e in encoded], batch_first=True)
    return tokens, last, (t.arange(tokens.shape[1]) >= start[:, None]).float()[..., None]

if __name__ == "__main__":
    continents = [c.removeprefix("in ") for c in labelled.concepts if c.startswith("in ")]
    ids = t.tensor([tokenizer.encode(f" {c}", add_special_tokens=False).ids[0] for c in continents], device=device)
    located, strengths, generator = labelled.concepts[f"in {continents[0]}"], (0.5, 1.0, 2.0, 4.0), t.Generator().manual_seed(cfg.seed)
    part, home = split(located, cfg.seed), np.stack([labelled.concepts[f"in {c}"].y for c in continents]).argmax(0)
    asked = [p for p in fact_prompts(read_countries(), "continent", True) if p.labels["country"] in located.group[part == 2]]
    tokens, last, places = (x.to(device) for x in country_prompts(tokenizer, asked, bos))
    truth = t.tensor([continents.index(p.labels["continent"]) for p in asked], device=device)
    means = t.stack([found[hook][located.index[(part == 0) & (home == c)]].mean(0) for c in range(len(continents))]).to(device)
    distance = t.pdist(means).mean()
    closest = (F.normalize(sae.W_dec.float(), dim=1) @ F.normalize(means - means.mean(0), dim=1).T).argmax(0).tolist()
    drawn = [alive[i] for i in t.randint(len(alive), (10,), generator=generator).tolist()]
    directions: dict[str, list[Tensor]] = {  # for each target, or for all: (prompt or 1, 1, d_in)
        "difference of means": [(m - means[truth])[:, None] for m in means], "closest feature": list(sae.W_dec[closest].float()[:, None, None]),
        "random features": list(sae.W_dec[drawn].float()[:, None, None]), "random directions": list(t.randn(10, 1, 1, sae.cfg.d_in, generator=generator).to(device)),
    }

    @t.no_grad()
    def answers(delta: Callable[[Tensor], Tensor] = t.zeros_like) -> Tensor:
        """(prompt, continent) logits less the right continent's, after delta(x) is added from the country on."""
        logits = run_with_hooks(model, tokens, [(hook, put(lambda x: x + delta(x) * places))])[t.arange(len(tokens)), last][:, ids].float()
        return logits - logits.gather(1, truth[:, None])

    def effect(kind: str, strength: float) -> tuple[float, float]:
        """Mean rise of logit(target) - logit(right), and share of answers that become the target, over targets elsewhere."""
        rises, turned = [], []
        for i, direction in enumerate(directions[kind]):
            after = answers(lambda x: strength * distance * F.normalize(direction, dim=-1))
            for c in range(len(continents)) if "random" in kind else [i]:
                rises.append((after - plain)[truth != c, c].mean().item())
                turned.append((after.argmax(1) == c)[truth != c].float().mean().item())
        return float(np.mean(rises)), float(np.mean(turned))

    plain = answers()
    steered = {kind: [effect(kind, strength) for strength in strengths] for kind in tqdm(directions, desc="steering", **BRIEF)}
    best = max(("difference of means", "closest feature"), key=lambda kind: steered[kind][1][0])
    by_chance = max(steered[kind][1][0] for kind in directions if "random" in kind)
    print(f"{purple}=== {len(asked)} prompts about test countries, moved towards each other continent from the country on; strength 1 is the mean distance of two continents ({distance:.1f}) ==={endc}")
    print(tabulate([[kind, *(x[0] for x in row), *(x[1] for x in row)] for kind, row in steered.items()], headers=["", *(f"logits at {s:g}" for s in strengths), *(f"turned at {s:g}" for s in strengths)], floatfmt=".3f"))
    show(line({kind: [x[0] for x in row] for kind, row in steered.items()}, f"Steering continents at {hook} (n = {len(asked)} prompts x {len(continents) - 1} targets; {name})", "strength (mean distances of two continents)", "rise of logit(target) - logit(right)", list(strengths), markers=True, dashed=["random features", "random directions"]), "sae_probe/steering")
    numbers |= {"steering_effect": steered[best][1][0], "steering_effect_random": by_chance, "steering_direction": best, "steering": {kind: dict(zip(map(str, strengths), row)) for kind, row in steered.items()}}

#%% Concept features added, clamped, ablated and projected out: what it does to the loss and to the right continent, against the same lengths elsewhere
if __name__ == "__main__":
    text, table = rows[:24], []
    unedited, right = loss_of(model, text, []), lambda logits: -logits.logsumexp(-1).mean().item()  # logits less the right one's
    for f in tqdm(dict.fromkeys([probes["country"]["feature"], probes["name"]["feature"], closest[0]]), desc="edits", **BRIEF):
        for how in ("add", "clamp", "ablate", "project"):
            own = lambda x: change(sae, f, how, x, float(codes[:, [f]].max()))
            edits = [own, *(lambda x, v=v: own(x).norm(dim=-1, keepdim=True) * F.normalize(v, dim=-1) for v in directions["random features"][:2] + directions["random directions"][:2])]
            cost = [loss_of(model, text, [(hook, put(lambda x: x + edit(x), len(bos)))]) - unedited for edit in edits]
            moved = [right(answers(edit)) - right(plain) for edit in edits]
            table.append([f"f{f} {', '.join(tags.get(f, []))}", how, cost[0], float(np.mean(cost[1:])), moved[0], float(np.mean(moved[1:]))])
    print(tabulate(table, headers=["feature", "edit", "loss", "loss, random", "log p(right of the continents)", "random"], floatfmt="+.4f"))
    numbers["edits"] = table

#%% One answer traced to features by gradient x activation, the error a node of its own; checked by ablating each node for real
if __name__ == "__main__":
    tokens = t.tensor([bos + tokenizer.encode(cfg.prompt, add_special_tokens=False).ids], device=device)
    with t.no_grad(): top = model(tokens)[0, -1].float().softmax(-1).topk(2)
    weights = F.one_hot(top.indices, model.W_U.shape[1]).float()
    traced, falls = attribute(model, sae, tokens, weights[0] - weights[1])
    assert traced["moved"] < 1e-3 * max(1.0, traced["value"].abs()), f"features + error do not rebuild the activation: the metric moves by {traced['moved']}"
    labels, (answer, rival) = label_tokens(str_tokens(tokenizer, tokens[0])), (visible(x) for x in str_tokens(tokenizer, top.indices))
    nodes = [divmod(i, sae.cfg.d_sae) for i in traced["features"].abs().flatten().topk(20).indices.tolist()]
    table = [[f"f{f} {labels[pos]}", ", ".join(tags.get(f, [])), traced["features"][pos, f].item(), falls(pos, f)] for pos, f in nodes] + [[f"error {labels[pos]}", "", x, falls(pos, None)] for pos, x in enumerate(traced["error"].tolist())]
    agreement = float(np.corrcoef([row[2] for row in table], [row[3] for row in table])[0, 1])
    print(f"{purple}=== Why '{answer}' ({top.values[0]:.2f}) and not '{rival}' after {cfg.prompt!r}: {traced['value']:.2f} logits; by gradient {traced['features'].sum():.2f} from features, {traced['error'].sum():.2f} from errors ==={endc}")
    print(tabulate(sorted(table, key=lambda row: -abs(row[3]))[:15], headers=["node", "concept", "gradient x activation", "falls when ablated"], floatfmt=".3f"))
    fig = go.Figure([go.Bar(x=[row[0] for row in table], y=[row[i] for row in table], name=label) for i, label in ((2, "gradient x activation"), (3, "ablated"))])
    show(fig.update_layout(title=f"Nodes at {hook} behind '{answer}' over '{rival}' after {cfg.prompt!r} (r = {agreement:.2f}; {name})", xaxis_title="feature or error at token", yaxis_title="logit difference"), "sae_probe/attribution")
    numbers["attribution"] = {"prompt": cfg.prompt, "answer": answer, "over": rival, "value": traced["value"], "from_features": traced["features"].sum(), "from_errors": traced["error"].sum(), "ablation_correlation": agreement}

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    save_results("sae_probe", cfg, **numbers)
    takes = ", ".join(f"{c} {probes[c]['features_needed'] or f'more than {KS[-1]}'}" for c in ("country", "capital", "name", "place", "object"))
    print(f"{green}L0 {judged['l0']:.1f}, {judged['ce_recovered']:.1%} of the cross-entropy recovered, {judged['dead_fraction']:.1%} dead. Features for AUROC 0.95 on new entities: {takes}.")
    best_single = max(max(x[f"in {c}"] for c in continents) for x in (singles.values() if not pretrained else [best_auroc]))
    print(f"Continents: the best single feature of any SAE here reaches {best_single:.2f}, a dense probe {min(probes[f'in {c}']['auroc'][f'dense {hook}'] for c in continents):.2f} or more. Steering by {best}: {steered[best][1][0]:+.1f} logits, at random {by_chance:+.1f}.{endc}")
