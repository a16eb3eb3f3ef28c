"""Attention-only transformers, trained live: induction heads, QK and OV circuits, exact logit attribution."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import cyan, endc, fail, green, pick_device, purple, save_results, set_seed, write_aside, yellow
from plots import attention_page, imshow, label_tokens, line, show, show_page, visible
from hooks import HookPoint, act_name, in_batches, hooks, run_with_cache
from layers import Attention, RMSNorm, rotate
from data import Corpus, find_tokens, load_corpus, str_tokens, to_tokens
from train import TrainConfig, first_goes_on, repeat_batches, train
from launch import flags
from anatomy import head_scores, random_repeats

from einops import einsum, rearrange
import numpy as np
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from tokenizers import Tokenizer
import torch as t
from torch import Tensor
import torch.nn as nn
import torch.nn.functional as F


#%% The model: embed, attention layers that only read and write the residual stream, unembed
@dataclass
class AttnOnlyConfig:
    n_layers: int = 2
    n_heads: int = 4
    d_model: int = 128
    d_head: int = 32
    d_vocab: int = 512
    n_ctx: int = 256
    positions: Literal["rotary", "learned", "shortformer", "relative"] = "relative"
    rotary_share: float = 0.5  # of each head's dimensions that rotate
    rotary_base: float = 100.0
    norm: Literal["rms", "none"] = "rms"  # RMSNorm without gain, before each layer and before the unembedding
    bias: Literal["none", "qk", "all"] = "qk"  # which of query, key, value and output maps have one


class AttnBlock(nn.Module):
    def __init__(self, cfg: AttnOnlyConfig):
        super().__init__()
        self.ln1 = RMSNorm() if cfg.norm == "rms" else nn.Identity()
        self.attn = Attention(cfg)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Tensor, positional: Tensor | None) -> Tensor:
        x = self.hook_resid_pre(x)
        return self.hook_resid_post(x + self.hook_attn_out(self.attn(self.ln1(x), positional)))


class AttnOnly(nn.Module):
    def __init__(self, cfg: AttnOnlyConfig):
        super().__init__()
        self.cfg = cfg
        self.embed, self.unembed = (
            nn.Embedding(cfg.d_vocab, cfg.d_model),
            nn.Linear(cfg.d_model, cfg.d_vocab, bias=False),
        )
        if cfg.positions in ("learned", "shortformer"):
            self.W_pos = nn.Parameter(0.02 * t.randn(cfg.n_ctx, cfg.d_model))
        self.blocks = nn.ModuleList(AttnBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_final = RMSNorm() if cfg.norm == "rms" else nn.Identity()
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()
        self.init_weights()

    def init_weights(self) -> None:
        """Small query and key weights: attention starts near uniform, which lets heads form soonest."""
        for block in self.blocks:
            for linear, gain in ((block.attn.q, 0.3), (block.attn.k, 0.3), (block.attn.v, 1.0), (block.attn.o, 1.0)):
                nn.init.normal_(linear.weight, std=gain / math.sqrt(linear.in_features))
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.unembed.weight, std=0.5 / math.sqrt(self.cfg.d_model))

    @property
    def W_E(self) -> Tensor:
        return self.embed.weight

    @property
    def W_U(self) -> Tensor:
        return self.unembed.weight.T

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.hook_embed(self.embed(tokens))
        positional = (
            self.hook_pos_embed(self.W_pos[: tokens.shape[1]])
            if self.cfg.positions in ("learned", "shortformer")
            else None
        )
        if self.cfg.positions == "learned":
            x, positional = x + positional, None
        for block in self.blocks:
            x = block(x, positional)
        return self.unembed(self.ln_final(x))


#%% Saving and reopening: safetensors, config.json and the tokenizer in one folder
def save_own(model: AttnOnly, folder: Path, tokenizer: Tokenizer, dtype: t.dtype = t.float32, **scores) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(
        folder / "model.safetensors",
        lambda path: save_file({name: x.to("cpu", dtype).contiguous() for name, x in model.state_dict().items()}, path),
    )
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["AttnOnly"], **dataclasses.asdict(model.cfg), "scores": scores}, indent=1) + "\n"
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def open_own(folder: Path, device: str) -> tuple[AttnOnly, Tokenizer, dict]:
    """(model in float32, tokenizer, the scores saved with it)."""
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / file).is_file():
            fail(
                f"--model {folder}: no {file} there; train one with attn_only.py, which saves to checkpoints/attn_only/"
            )
    config = json.loads((folder / "config.json").read_text())
    if config.pop("architectures") != ["AttnOnly"]:
        fail(
            f"--model {folder} is not an attention-only model of attn_only.py; logit_lens.py and patching.py open full models"
        )
    scores, model = config.pop("scores"), AttnOnly(AttnOnlyConfig(**config))
    try:
        state = {name: x.float() for name, x in load_file(folder / "model.safetensors").items()}
    except Exception as error:
        fail(f"{folder}/model.safetensors is corrupt: {error}")
    differs = [
        name for name, x in model.state_dict().items() if name not in state or state[name].shape != x.shape
    ] + sorted(set(state) - set(model.state_dict()))
    if differs:
        fail(f"{folder}/model.safetensors does not fit its config.json: {differs[:3]}")
    model.load_state_dict(state)
    return model.to(device).eval(), Tokenizer.from_file(str(folder / "tokenizer.json")), scores


#%% Behaviour: loss by position, in-context learning, copying
@t.no_grad()
def loss_by_position(model: nn.Module, rows: Tensor, batch: int = 64) -> Tensor:
    """(row, pos - 1) cross-entropy in nats; entry i is the loss on token i + 1."""
    return t.cat(
        list(
            in_batches(
                lambda part: F.cross_entropy(
                    model(part)[:, :-1].float().transpose(1, 2), part[:, 1:], reduction="none"
                ),
                rows,
                batch,
            )
        )
    )


def icl_score(losses: Tensor) -> tuple[float, float]:
    """(mean, 95% half-width over rows) of the loss on the last 16 positions minus that on positions 42-58, in nats (Olsson et al. 2022)."""
    gain = losses[:, -16:].mean(1) - losses[:, 41:58].mean(1)
    return gain.mean().item(), 1.96 * gain.std().item() / math.sqrt(len(gain))


@t.no_grad()
def copying_scores(model: nn.Module, tokens: Tensor) -> Tensor:
    """
    (layer, head) in -1..1: each head's direct write to the logits of the tokens in the row, centred over them; the share of what is raised
    that goes to the tokens attended to, weighted by attention, against the share that is lowered (after Olsson et al. 2022).
    """
    n_layers, scores = model.cfg.n_layers, []
    _, cache = run_with_cache(
        model,
        tokens,
        [name for layer in range(n_layers) for name in (act_name("pattern", layer), act_name("z", layer))],
    )
    for layer in range(n_layers):
        out = einsum(
            cache["z", layer],
            model.blocks[layer].attn.W_O,
            model.W_U,
            "batch pos head d_head, head d_head d_model, d_model vocab -> batch head pos vocab",
        )
        logits = out.gather(
            -1, tokens[:, None, None].expand(-1, out.shape[1], tokens.shape[1], -1)
        )  # batch head pos key
        seen = t.ones_like(logits[0, 0]).tril()
        centred = (logits - (logits * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)) * seen
        attended = (cache["pattern", layer] * centred).sum(-1)
        scores.append(attended.sum((0, 2)) / (cache["pattern", layer] * centred.abs()).sum((0, 2, 3)))
    return t.stack(scores)


#%% Circuits from the weights: factored QK and OV, never vocab x vocab beyond the tokens shown
def read_embed(model: AttnOnly) -> Tensor:
    """What layer 0 reads of each token: W_E, divided by its own norm where the model has one (exact there, since nothing else is in the stream)."""
    return model.W_E / (model.W_E.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() if model.cfg.norm == "rms" else model.W_E


def qk_circuit(model: AttnOnly, layer: int, head: int, query: Tensor, key: Tensor, offset: int) -> Tensor:
    """(query, key) attention scores between tokens `offset` places apart by the direct path: biases, rotation or distance bias included."""
    cfg, attn, x = model.cfg, model.blocks[layer].attn, read_embed(model)
    project = lambda linear, ids: rearrange(
        linear(x[ids]), "token (head d_head) -> token head d_head", head=cfg.n_heads
    )
    q, k = project(attn.q, query), project(attn.k, key)
    if cfg.positions == "rotary":  # only the difference of positions matters
        dims = 2 * int(cfg.rotary_share * cfg.d_head / 2)
        q = rotate(q[:, None].expand(-1, offset + 1, -1, -1), dims, cfg.rotary_base)[:, offset]
    scores = einsum(q[:, head], k[:, head], "query d_head, key d_head -> query key") / math.sqrt(cfg.d_head)
    return scores + attn.score_bias(t.tensor([offset], device=x.device)).expand(cfg.n_heads, 1)[head]


def ov_circuit(model: AttnOnly, layer: int, head: int, source: Tensor, out: Tensor) -> Tensor:
    """(source, out) logits that fully attending to a source token writes to each output token by the direct path, before the final norm."""
    attn = model.blocks[layer].attn
    return (read_embed(model)[source] @ attn.W_V[head]) @ (attn.W_O[head] @ model.W_U[:, out])


def ov_eigenvalues(model: AttnOnly, layer: int, head: int) -> Tensor:
    """The d_head nonzero eigenvalues of the full OV circuit W_E W_V W_O W_U (vocab x vocab), from its d_head x d_head turn."""
    attn = model.blocks[layer].attn
    return t.linalg.eigvals(((attn.W_O[head] @ model.W_U) @ read_embed(model) @ attn.W_V[head]).double())


def eigenvalue_copying(model: AttnOnly) -> Tensor:
    """(layer, head) in -1..1: sum of the OV circuit's eigenvalues over the sum of their absolute values; 1 copies."""
    values = [
        [ov_eigenvalues(model, layer, head) for head in range(model.cfg.n_heads)] for layer in range(model.cfg.n_layers)
    ]
    return t.tensor([[(e.sum().real / e.abs().sum()).item() for e in row] for row in values])


def composition(early: tuple[Tensor, Tensor], late: tuple[Tensor, Tensor]) -> Tensor:
    """||A B|| / (||A|| ||B||), Frobenius, of A = early[0] @ early[1] and B = late[0] @ late[1], kept factored (A Mathematical Framework)."""
    product = t.linalg.matrix_norm(t.linalg.qr(early[0]).R @ (early[1] @ late[0]) @ t.linalg.qr(late[1].mT).R.mT)
    size = lambda a, b: t.linalg.matrix_norm(t.linalg.qr(a).R @ t.linalg.qr(b.mT).R.mT)
    return product / (size(*early) * size(*late))


@t.no_grad()
def composition_scores(model: AttnOnly, draws: int = 100) -> tuple[dict[str, Tensor], float, float]:
    """({'Q' | 'K' | 'V': (layer-0 head, layer-1 head)}, mean, std of the same score for Gaussian factors of the same shape)."""
    first, second = (model.blocks[layer].attn for layer in (0, 1))
    ov = lambda attn, head: (attn.W_V[head], attn.W_O[head])
    heads, scores = range(model.cfg.n_heads), {}
    for name, late in (
        ("Q", lambda h: (second.W_Q[h], second.W_K[h].mT)),
        ("K", lambda h: (second.W_K[h], second.W_Q[h].mT)),
        ("V", lambda h: ov(second, h)),
    ):
        scores[name] = t.stack(
            [t.stack([composition(ov(first, early), late(h)) for h in heads]) for early in heads]
        ).cpu()
    d_model, d_head = first.W_Q.shape[1:]
    noise = [
        t.randn(draws, *shape, generator=t.Generator().manual_seed(i))
        for i, shape in enumerate([(d_model, d_head), (d_head, d_model)] * 2)
    ]
    random = composition((noise[0], noise[1]), (noise[2], noise[3]))
    return scores, random.mean().item(), random.std().item()


def skip_trigrams(model: AttnOnly, tokenizer: Tokenizer, head: int, ids: Tensor, offset: int, n: int = 8) -> list[list]:
    """
    Rows [source ... destination -> out, QK score above the destination's mean, OV logit]: among the tokens ids and at one offset, the n triples
    with the largest product of the two, one per source.
    """
    qk, ov = qk_circuit(model, 0, head, ids, ids, offset), ov_circuit(model, 0, head, ids, ids)
    qk, ov = qk - qk.mean(1, keepdim=True), ov - ov.mean(1, keepdim=True)
    best = (qk.amax(0).clamp(min=0) * ov.amax(1).clamp(min=0)).topk(n).indices
    name = lambda i: visible(tokenizer.decode([int(ids[i])], skip_special_tokens=False))
    return [
        [
            f"{name(s)} ... {name(qk[:, s].argmax())} -> {name(ov[s].argmax())}",
            qk[:, s].max().item(),
            ov[s].max().item(),
            ", ".join(name(i) for i in ov[s].topk(4).indices),
        ]
        for s in best
    ]


#%% Attribution: the logit as direct path + every head x every source token, exactly
@t.no_grad()
def logit_attribution(model: AttnOnly, tokens: Tensor, token: int, position: int = -1) -> dict[str, Tensor]:
    """
    Parts of the logit of `token` at one position of tokens (1, pos): 'direct' (), 'heads' (layer, head, source), 'logit' ().
    The final norm's scale is frozen at its value there, which makes the parts linear; they sum to the logit.
    """
    n_layers = model.cfg.n_layers
    logits, cache = run_with_cache(
        model, tokens, lambda name: name.endswith(("0.hook_resid_pre", "hook_v", "hook_pattern", "ln_final.hook_scale"))
    )
    scale = (
        cache["ln_final.hook_scale"][0, position] if "ln_final.hook_scale" in cache else t.ones(1, device=tokens.device)
    )
    direction = model.W_U[:, token] / scale
    heads = [
        einsum(
            cache["pattern", layer][0, :, position],
            cache["v", layer][0],
            model.blocks[layer].attn.W_O,
            direction,
            "head source, source head d_head, head d_head d_model, d_model -> head source",
        )
        for layer in range(n_layers)
    ]
    return {
        "direct": cache["resid_pre", 0][0, position] @ direction,
        "heads": t.stack(heads),
        "logit": logits[0, position, token],
    }


def attribution_error(parts: dict[str, Tensor]) -> float:
    return (parts["direct"] + parts["heads"].sum() - parts["logit"]).abs().item()


#%% Norm-based analysis: attention weights alone mislead, since a head may attend to what it hardly moves (Kobayashi et al. 2020, 2021)
@t.no_grad()
def norm_based(model: AttnOnly, tokens: Tensor, layer: int) -> dict[str, Tensor]:
    """
    For tokens (1, pos), each (query, key) unless said: 'attention' (head, query, key) alpha; 'weighted' (head, query, key) ||alpha f(x)|| with
    f(x) = v W_O; 'block' ||sum over heads of alpha f(x), + x where key = query||; 'normed' the same after the next norm (its scale frozen);
    'mixing' (query): the share of the block's output norm that comes from other positions, ||sum of the others|| / (that + ||own||).
    """
    after = (
        act_name("resid_pre", layer + 1)[: -len("hook_resid_pre")] + "ln1.hook_scale"
        if layer + 1 < model.cfg.n_layers
        else "ln_final.hook_scale"
    )
    names = [act_name(short, layer) for short in ("resid_pre", "v", "pattern")] + [after] * (model.cfg.norm != "none")
    _, cache = run_with_cache(model, tokens, names)
    pattern, x = cache["pattern", layer][0], cache["resid_pre", layer][0]
    moved = einsum(
        pattern,
        cache["v", layer][0],
        model.blocks[layer].attn.W_O,
        "head query key, key head d_head, head d_head d_model -> head query key d_model",
    )
    block = moved.sum(0) + t.diag_embed(x.T).permute(1, 2, 0)
    own = block.diagonal(dim1=0, dim2=1).T
    others = (block.sum(1) - own).norm(dim=-1)
    scale = cache[after][0] if after in cache else 1.0
    return {
        "attention": pattern,
        "weighted": moved.norm(dim=-1),
        "block": block.norm(dim=-1),
        "normed": block.norm(dim=-1) / scale,
        "mixing": others / (others + own.norm(dim=-1)),
    }


#%% Interventions: ablate a head; patch the path from one head into another's query, key or value
def zero_head(layer: int, head: int) -> tuple[str, Callable]:
    return act_name("z", layer), lambda z, hook: z.index_fill(2, t.tensor([head], device=z.device), 0)


def ablated_scores(model: nn.Module, tokens: Tensor, half: int, layer: int, head: int) -> dict[str, Tensor]:
    with hooks(model, [zero_head(layer, head)]):
        return head_scores(model, model.cfg.n_layers, tokens, half)


@t.no_grad()
def path_patch(model: AttnOnly, clean: Tensor, corrupt: Tensor, half: int) -> tuple[dict[str, Tensor], float, float]:
    """
    Clean rows say random tokens twice; corrupt rows share only their second half, so nothing there can be looked up. For each layer-0 head
    (sender) and each layer-1 head's q, k or v input (receiver), that input alone is given the sender's corrupt output: {'q' | 'k' | 'v':
    (sender, receiver) share of the log-probability lost}, 0 = clean, 1 = corrupt. Also the two mean log-probabilities, in nats.
    """
    n_heads, W_O, names = (
        model.cfg.n_heads,
        model.blocks[0].attn.W_O,
        [act_name("z", 0), act_name("result", 1), act_name("resid_post", 1)],
    )

    def log_prob(resid: Tensor) -> float:
        return (
            model.unembed(model.ln_final(resid[:, -half:-1]))
            .log_softmax(-1)
            .gather(-1, clean[:, -half + 1 :, None])
            .mean()
            .item()
        )

    (_, on), (_, off) = (run_with_cache(model, tokens, names) for tokens in (clean, corrupt))
    top, bottom = (log_prob(cache["resid_post", 1]) for cache in (on, off))
    lost = {room: t.zeros(n_heads, n_heads) for room in "qkv"}
    for sender in range(n_heads):
        change = (off["z", 0] - on["z", 0])[:, :, sender] @ W_O[sender]
        with hooks(model, [(act_name("resid_pre", 1), lambda x, hook: x + change)]):
            _, new = run_with_cache(model, clean, [act_name(room, 1) for room in "qkv"])
        for room in "qkv":  # heads do not read each other within a layer: one run patches the room in all of them, one head's result is taken at a time
            with hooks(model, [(act_name(room, 1), lambda x, hook: new[room, 1])]):
                _, moved = run_with_cache(model, clean, names[1])
            for receiver in range(n_heads):
                lost[room][sender, receiver] = (
                    top - log_prob(on["resid_post", 1] + (moved["result", 1] - on["result", 1])[:, :, receiver])
                ) / (top - bottom)
    return lost, top, bottom


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config(TrainConfig):
    n_layers: int = 2  # 1 or 2; with 2, a 1-layer control is trained on the same rows
    n_heads: int = 4
    d_model: int = 128
    positions: Literal["rotary", "learned", "shortformer", "relative"] = "relative"
    rotary_share: float = 0.5  # of each head's dimensions that rotate (rotary)
    steps: int = 400
    lr: float = 1e-2
    repeats: float = 0.45  # share of training rows that repeat a snippet of themselves: two thirds natural, one third in shuffled order; 0 is natural text alone
    english: float = 0.3  # share of rows from docstrings and help topics (stdlib text); the rest is code
    data: str = "stdlib"  # stdlib, a text file or folder, or a hub dataset
    vocab: int = 512  # size of the byte-level BPE trained on the text
    tokenizer: str | None = None  # use this one instead: a folder, a tokenizer.json or a hub name
    model: str | None = None  # open this folder (checkpoints/attn_only/2_layers ...) instead of training
    control: bool = True  # train the 1-layer control
    prompt: str = "Mr Dursley and Mrs Durs"  # for attribution and the attention page
    answer: str | None = None  # token whose logit is attributed; default the model's own prediction


if __name__ == "__main__":
    cfg = flags(
        Config,
        __doc__,
        hpc=Config(
            n_heads=12,
            d_model=768,
            vocab=8192,
            contexts=(256, 1024),
            tokens_per_step=65536,
            accumulate=2,
            steps=8000,
            autocast="on",
            compile=True,
        ),
    )  # --hpc: an A100 with 40 GB
    device = pick_device(cfg.device)
    if cfg.n_layers not in (1, 2):
        fail("--n-layers is 1 or 2: deeper models are tiny_transformer.py's")
    if cfg.d_model % cfg.n_heads:
        fail(f"--d-model {cfg.d_model} is not a multiple of --n-heads {cfg.n_heads}")
    set_seed(cfg.seed)
    print(f"{purple}=== Attention-only transformers on {cfg.data}, seed {cfg.seed}, {device} ==={endc}")

#%% Train before your eyes: 2 layers, and 1 layer as the control, while the scores of every head are watched


def train_own(cfg: Config, n_layers: int, corpus: Corpus, device: str) -> tuple[AttnOnly, dict]:
    """A fresh model of n_layers on rows of the corpus, and the history of its training with head scores and ICL score."""
    model = AttnOnly(
        AttnOnlyConfig(
            n_layers,
            cfg.n_heads,
            cfg.d_model,
            cfg.d_model // cfg.n_heads,
            corpus.d_vocab,
            max(cfg.contexts),
            cfg.positions,
            cfg.rotary_share,
        )
    ).to(device)
    half = min(50, (max(cfg.contexts) - 1) // 2)
    probe, natural = (
        random_repeats(corpus, 32, half, seed=10**6 + cfg.seed).to(device),
        t.from_numpy(corpus.rows(np.random.default_rng(cfg.seed), 48, max(cfg.contexts), "heldout")).to(device),
    )

    def watch(step: int) -> dict:
        scores = head_scores(model, n_layers, probe, half)
        icl = icl_score(loss_by_position(model, natural))[0] if max(cfg.contexts) >= 80 else float("nan")
        return {
            "prefix_matching": scores["prefix_matching"].max().item(),
            "previous_token": scores["previous_token"][0].max().item(),
            "icl_score": icl,
        }

    history = train(
        model,
        repeat_batches(corpus, cfg),
        cfg,
        f"attn_only/{n_layers}_layers",
        watch=watch,
        watch_every=max(1, cfg.steps // 20),
        shape=dataclasses.asdict(model.cfg),
        data=corpus.key,
        repeats=cfg.repeats,
        english=cfg.english,
    )
    return model, history


if __name__ == "__main__":
    models, histories = dict[int, AttnOnly](), dict[int, dict]()
    if cfg.model:
        model, tokenizer, _ = open_own(Path(cfg.model), device)
        corpus = load_corpus(cfg.data, tokenizer=cfg.model)
        models[model.cfg.n_layers] = model
    else:
        corpus = load_corpus(cfg.data, cfg.vocab, cfg.tokenizer)
        for n_layers in sorted({cfg.n_layers, 1 if cfg.control else cfg.n_layers}):
            print(
                f"{purple}=== Training {n_layers} layer{'s' * (n_layers > 1)}{' (the control)' * (n_layers < cfg.n_layers)}: {cfg.repeats:.0%} of rows repeat a snippet of themselves ==={endc}"
            )
            set_seed(cfg.seed)
            models[n_layers], histories[n_layers] = train_own(cfg, n_layers, corpus, device)
            save_own(
                models[n_layers],
                folder := Path(f"checkpoints/attn_only/{n_layers}_layers"),
                corpus.tokenizer,
                **histories[n_layers]["watch"][-1],
            )
            print(
                f"{green}trained on {histories[n_layers]['tokens'][-1] / 1e6:.2f}M tokens in {histories[n_layers]['seconds']:.1f} s ({cyan}{histories[n_layers]['tokens_per_second']:,.0f} tokens/s{green}), saved to {folder}{endc}"
            )
        first_goes_on()
        model = models[cfg.n_layers]
    n_layers, n_heads, n_ctx, tokenizer = model.cfg.n_layers, model.cfg.n_heads, model.cfg.n_ctx, corpus.tokenizer
    control = models.get(1) if n_layers == 2 else None
    head_names = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
    numbers: dict = {"n_params": sum(p.numel() for p in model.parameters())}
    about = f"{n_layers}-layer attention-only, {numbers['n_params'] / 1e3:.0f}k parameters"

#%% The gates: hooks change nothing, attention rows sum to one, the parts of a logit sum to the logit
if __name__ == "__main__":
    print(f"{purple}=== Gates ==={endc}")
    half = min(50, (n_ctx - 1) // 2)
    repeats = random_repeats(corpus, 64, half, seed=cfg.seed).to(device)
    with t.no_grad():
        logits, cache = run_with_cache(model, repeats)
        gap = (logits - model(repeats)).abs().max().item() / logits.abs().max().item()
    assert gap < 1e-5, f"listening changes the logits by {gap}"
    row_error = max((cache["pattern", layer].sum(-1) - 1).abs().max().item() for layer in range(n_layers))
    assert row_error < 1e-5, f"attention rows sum to 1 +- {row_error}"
    errors = [
        attribution_error(logit_attribution(model, repeats[[i]], int(repeats[i, -1]), position))
        for i in range(16)
        for position in (-1, half, 1)
    ]
    numbers["attribution_max_error"] = max(errors)
    assert max(errors) < 1e-4, f"the parts miss the logit by {max(errors)}"
    print(
        f"{cyan}attention rows sum to 1 within {row_error:.1e}; direct path + heads x sources = logit within {max(errors):.1e} ({len(errors)} logits){endc}"
    )

#%% Which heads look where, on random tokens said twice: previous-token heads and induction heads
if __name__ == "__main__":
    print(f"{purple}=== Heads ==={endc}")
    scores = head_scores(model, n_layers, repeats, half)
    scores["copying"], scores["OV eigenvalues"] = copying_scores(model, repeats).cpu(), eigenvalue_copying(model)
    print(
        tabulate(
            [[name, *(f"{x.flatten()[i]:.2f}" for x in scores.values())] for i, name in enumerate(head_names)],
            headers=["head", *scores],
        )
    )
    show(
        imshow(
            t.stack(list(scores.values())),
            f"Head scores on {len(repeats)} x {half} random tokens said twice ({about})",
            "head",
            "layer",
            [f"H{h}" for h in range(n_heads)],
            [f"L{layer}" for layer in range(n_layers)],
            list(scores),
            columns=3,
            value="score",
        ),
        "attn_only/head_scores",
    )
    prefix = scores["prefix_matching"]
    induction_heads = [
        head_names[i] for i in prefix.flatten().argsort(descending=True).tolist() if prefix.flatten()[i] > 0.3
    ]
    best = head_names[int(prefix.argmax())]
    previous = int(scores["previous_token"][0].argmax())
    control_prefix = head_scores(control, 1, repeats, half)["prefix_matching"] if control else t.tensor(t.nan)
    at = divmod(int(prefix.argmax()), n_heads)
    numbers |= {
        "best_prefix_matching": prefix.max().item(),
        "best_prefix_matching_1_layer": control_prefix.max().item(),
        "induction_heads": induction_heads,
    }
    numbers |= {
        "previous_token_score": scores["previous_token"][0, previous].item(),
        "copying_of_best_head": scores["copying"][at].item(),
        "ov_eigenvalue_copying_of_best_head": scores["OV eigenvalues"][at].item(),
    }
    print(f"{cyan}best prefix matching {prefix.max():.3f} in {best}; 1-layer control {control_prefix.max():.3f}{endc}")

#%% Training watched: prefix matching, previous-token attention and in-context learning against tokens seen
if __name__ == "__main__" and histories:
    curves = {
        (key.replace("_", " "), n): [w[key] for w in h["watch"]]
        for n, h in sorted(histories.items(), reverse=True)
        for key in ("prefix_matching", "previous_token", "icl_score")
    }
    curves = {f"{key}, {n} layer{'s' * (n > 1)}": curve for (key, n), curve in curves.items()}
    fig = line(
        curves,
        f"Phase change of {about}: best head's scores on 32 rows of random tokens, ICL score on 48 held-out rows (seed {cfg.seed})",
        "tokens seen",
        "score (ICL: nats)",
        [w["tokens"] for w in histories[n_layers]["watch"]],
        markers=True,
        dashed=[name for name in curves if name.endswith("1 layer") and n_layers > 1],
    )
    for step in (share * cfg.steps for share in cfg.context_steps[: len(cfg.contexts) - 1]):
        fig.add_vline(step * cfg.tokens_per_step, line_dash="dot", annotation_text="longer context")
    show(fig, "attn_only/phase_change")
    show(
        line(
            {
                f"{n} layer{'s' * (n > 1)}": np.convolve(
                    h["loss"], np.ones(min(10, cfg.steps)) / min(10, cfg.steps), "valid"
                )
                for n, h in histories.items()
            },
            f"Training loss, mean of 10 steps of {cfg.tokens_per_step} tokens, {cfg.repeats:.0%} rows with repeats",
            "tokens seen",
            "loss (nats)",
            histories[n_layers]["tokens"][min(10, cfg.steps) - 1 :],
        ),
        "attn_only/loss",
    )

#%% Loss by position: on repeated random tokens the second time is cheap; on natural text later tokens are cheaper (in-context learning)
if __name__ == "__main__":
    natural = t.from_numpy(corpus.rows(np.random.default_rng(10**6), 512, n_ctx, "heldout")).to(device)
    by_position = {
        f"{n} layer{'s' * (n > 1)}": (loss_by_position(m, repeats), loss_by_position(m, natural))
        for n, m in sorted(models.items())
    }
    show(
        line(
            {name: random.mean(0) for name, (random, _) in by_position.items()},
            f"Loss on {len(repeats)} rows of {half} random tokens said twice: the second time is predicted by induction",
            "position",
            "loss (nats)",
            list(range(1, 2 * half + 1)),
        ),
        "attn_only/loss_repeated",
    )
    smooth = lambda x: np.convolve(x.mean(0).cpu(), np.ones(9) / 9, "valid")
    show(
        line(
            {name: smooth(text) for name, (_, text) in by_position.items()},
            f"Loss on {len(natural)} held-out natural rows, mean of 9 positions",
            "position",
            "loss (nats)",
            list(range(5, n_ctx - 4)),
        ),
        "attn_only/loss_natural",
    )
    random, text = by_position[f"{n_layers} layer{'s' * (n_layers > 1)}"]
    numbers |= {
        "loss_first_copy": random[:, :half].mean().item(),
        "loss_second_copy": random[:, half + 1 :].mean().item(),
        "heldout_loss": text.mean().item(),
    }
    print(
        f"{cyan}loss on random tokens: first time {numbers['loss_first_copy']:.2f}, second time {numbers['loss_second_copy']:.2f} nats; held-out text {text.mean():.3f} nats{endc}"
    )
    for n in sorted(models, reverse=True) if n_ctx >= 80 else []:
        mean, half_width = icl_score(by_position[f"{n} layer{'s' * (n > 1)}"][1])
        numbers |= {
            f"icl_score{'' if n == n_layers else '_1_layer'}": mean,
            f"icl_score{'' if n == n_layers else '_1_layer'}_95": half_width,
        }
        print(
            f"{cyan}in-context-learning score, {n} layer{'s' * (n > 1)}: {mean:.3f} +- {half_width:.3f} nats ({len(natural)} rows, 95%){endc}"
        )

#%% Ablation: induction needs the previous-token head, and no other head of layer 0
if __name__ == "__main__" and n_layers == 2:
    print(f"{purple}=== Which layer-0 head does induction need? ==={endc}")
    without = t.stack([ablated_scores(model, repeats, half, 0, head)["prefix_matching"][1] for head in range(n_heads)])
    show(
        imshow(
            t.cat([prefix[1:], without]),
            f"Prefix matching of layer-1 heads when one layer-0 head is zeroed ({len(repeats)} rows)",
            "layer-1 head",
            "zeroed",
            [f"L1H{h}" for h in range(n_heads)],
            ["none", *(f"L0H{h}" for h in range(n_heads))],
            diverging=False,
            value="prefix matching",
        ),
        "attn_only/ablation",
    )
    others = [without[h].max().item() for h in range(n_heads) if h != previous]
    numbers |= {
        "prefix_matching_without_previous_token_head": without[previous].max().item(),
        "prefix_matching_without_another_head_min": min(others),
    }
    for h in range(n_heads):
        print(
            f"{cyan}without L0H{h} (previous-token score {scores['previous_token'][0, h]:.2f}): best prefix matching {without[h].max():.3f}{endc}"
        )

#%% The path: previous-token head -> key of the induction head, seen by patching one input at a time
if __name__ == "__main__" and n_layers == 2:
    other = random_repeats(corpus, len(repeats), half, seed=cfg.seed + 1).to(device)
    corrupt = t.cat([repeats[:, :1], other[:, 1 : half + 1], repeats[:, half + 1 :]], 1)
    lost, top, bottom = path_patch(model, repeats, corrupt, half)
    show(
        imshow(
            t.stack(list(lost.values())),
            f"Path patching, layer-0 head -> one input of a layer-1 head: share of log-probability lost (n = {len(repeats)}; 0 = clean {top:.2f}, 1 = corrupt {bottom:.2f} nats)",
            "receiver",
            "sender",
            [f"L1H{h}" for h in range(n_heads)],
            [f"L0H{h}" for h in range(n_heads)],
            ["query", "key", "value"],
            value="share lost",
        ),
        "attn_only/path_patching",
    )
    room, sender, receiver = max(
        ((room, s, r) for room in "qkv" for s in range(n_heads) for r in range(n_heads)),
        key=lambda place: lost[place[0]][place[1:]].item(),
    )
    numbers |= {
        "strongest_path": f"L0H{sender} -> {room} of L1H{receiver}",
        "strongest_path_share": lost[room][sender, receiver].item(),
        "log_prob_clean": top,
        "log_prob_corrupt": bottom,
    }
    print(
        f"{cyan}strongest path: {numbers['strongest_path']}, which loses {numbers['strongest_path_share']:.0%} of what induction gives{endc}"
    )

#%% Composition: how much more than random matrices do the layers read from each other?
if __name__ == "__main__" and n_layers == 2:
    composed, random_mean, random_std = composition_scores(model)
    show(
        imshow(
            t.stack([c - random_mean for c in composed.values()]),
            f"Composition of layer-0 with layer-1 heads, minus random factors ({random_mean:.3f} +- {random_std:.3f}, 100 draws)",
            "layer-1 head",
            "layer-0 head",
            [f"L1H{h}" for h in range(n_heads)],
            [f"L0H{h}" for h in range(n_heads)],
            [f"{name}-composition" for name in composed],
            value="above random",
        ),
        "attn_only/composition",
    )
    numbers |= {
        "k_composition": (k := composed["K"][previous, int(prefix[1].argmax())].item()),
        "k_composition_random": random_mean,
        "k_composition_random_std": random_std,
    }
    print(
        f"{cyan}K-composition L0H{previous} -> {best}: {k:.3f} against {random_mean:.3f} +- {random_std:.3f} at random{endc}"
    )

#%% The circuits themselves: what a head attends to (QK) and what it then writes (OV), and the skip-trigrams of the 1-layer model
if __name__ == "__main__":
    counts = sum(np.bincount(part, minlength=corpus.d_vocab) for part in corpus.train.values())
    frequent = t.from_numpy(np.argsort(-counts)[:60].copy()).to(device)
    tokens_shown = [visible(token) for token in str_tokens(tokenizer, frequent)]
    where = f"direct path, {'biases, ' * (model.cfg.bias != 'none')}{'embedding divided by its own RMS' if model.cfg.norm == 'rms' else 'no norm'}"
    with t.no_grad():
        for layer, head in sorted({(0, previous), at}):
            show(
                imshow(
                    ov_circuit(model, layer, head, frequent, frequent),
                    f"OV circuit of L{layer}H{head}: logit written when it attends to the source ({where}; {len(frequent)} most frequent tokens)",
                    "output",
                    "source",
                    tokens_shown,
                    tokens_shown,
                    value="logit",
                ),
                f"attn_only/ov_L{layer}H{head}",
            )
        show(
            imshow(
                t.stack([qk_circuit(model, 0, h, frequent, frequent, 1) for h in range(n_heads)]),
                f"QK circuits of layer 0 at offset 1 ({where}, {model.cfg.positions} positions)",
                "key",
                "query",
                tokens_shown,
                tokens_shown,
                [f"L0H{h}" for h in range(n_heads)],
                columns=2,
                value="score",
            ),
            "attn_only/qk_layer_0",
        )
        one_layer = models.get(1, model)
        common, rows = t.from_numpy(np.argsort(-counts)[:256].copy()).to(device), []
        for head in range(one_layer.cfg.n_heads):
            rows += [[f"L0H{head}", *row] for row in skip_trigrams(one_layer, tokenizer, head, common, offset=2, n=4)]
    print(
        f"{purple}=== Skip-trigrams of layer 0 ({one_layer.cfg.n_layers}-layer model), {one_layer.cfg.positions} positions at offset 2 ==={endc}"
    )
    print(
        tabulate(
            rows,
            headers=[
                "head",
                "source ... destination -> out",
                "QK above mean",
                "OV logit above mean",
                "next best outputs",
            ],
            floatfmt=".2f",
        )
    )

#%% Attribution for a prompt: which token, through which head, made the model say this?
if __name__ == "__main__":
    prompt = to_tokens(tokenizer, cfg.prompt).to(device)
    if prompt.shape[1] < 2:
        fail("--prompt is empty: give a few words")
    if prompt.shape[1] > n_ctx:
        fail(f"--prompt has {prompt.shape[1]} tokens, the model sees {n_ctx}: shorten it")
    labels = label_tokens(str_tokens(tokenizer, prompt[0]))
    with t.no_grad():
        probs = model(prompt)[0, -1].softmax(-1)
    answer = find_tokens(tokenizer, cfg.answer)[0] if cfg.answer else int(probs.argmax())
    said = visible(str_tokens(tokenizer, [answer])[0])
    assert attribution_error(parts := logit_attribution(model, prompt, answer)) < 1e-4
    print(f"{purple}=== Why '{said}' (probability {probs[answer]:.2f}) after {cfg.prompt!r}? ==={endc}")
    ranked = sorted(
        [
            ["direct path", labels[-1], parts["direct"].item()],
            *(
                [name, labels[j], x.item()]
                for name, row in zip(head_names, parts["heads"].flatten(0, 1))
                for j, x in enumerate(row)
            ),
        ],
        key=lambda part: -abs(part[2]),
    )
    print(
        tabulate(
            [
                *ranked[:8],
                ["the rest", "", sum(part[2] for part in ranked[8:])],
                ["sum = logit", "", parts["logit"].item()],
            ],
            headers=["part", "source", "logit"],
            floatfmt=".3f",
        )
    )
    show(
        imshow(
            parts["heads"].flatten(0, 1),
            f"Logit of '{said}' = {parts['logit']:.2f}: direct path {parts['direct']:.2f} + heads x sources{', final norm scale frozen' * (model.cfg.norm != 'none')} ({about})",
            "source token",
            "head",
            labels,
            head_names,
            value="logit",
        ),
        "attn_only/attribution",
    )

#%% Attention to hover: patterns of every head on the prompt, then weighted by how far they move the residual stream (norm-based analysis)
if __name__ == "__main__":
    with t.no_grad():
        _, cache = run_with_cache(model, prompt, [act_name("pattern", layer) for layer in range(n_layers)])
    patterns = t.cat([cache["pattern", layer][0] for layer in range(n_layers)])
    show(
        imshow(
            patterns,
            f"Attention of {about} on {cfg.prompt!r}",
            "key",
            "query",
            labels,
            labels,
            head_names,
            diverging=False,
            value="attention",
        ),
        "attn_only/attention",
    )
    show_page(
        attention_page(
            str_tokens(tokenizer, prompt[0]),
            patterns,
            head_names,
            f"Attention of {about}",
            start=head_names.index(best),
        ),
        "attn_only/attention_text",
    )
    norms = norm_based(model, prompt, layer := at[0])
    panels = {
        f"{best} attention": norms["attention"][at[1]],
        f"{best} ||alpha f(x)||": norms["weighted"][at[1]],
        "layer ||sum alpha f(x) + x||": norms["block"],
        "the same after the next norm": norms["normed"],
    }
    show(
        imshow(
            t.stack(list(panels.values())),
            f"Norm-based analysis of layer {layer}: raw attention of {best}, then what is really moved (Kobayashi et al.); each panel on its own scale",
            "key",
            "query",
            labels,
            labels,
            list(panels),
            columns=2,
            diverging=False,
            value="weight or norm",
            one_scale=False,
        ),
        "attn_only/norm_based",
    )
    numbers["mixing_ratio"] = [norm_based(model, prompt, l)["mixing"].mean().item() for l in range(n_layers)]
    print(
        f"{cyan}share of a layer's output that comes from other positions: {', '.join(f'layer {l} {x:.2f}' for l, x in enumerate(numbers['mixing_ratio']))}{endc}"
    )

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    numbers |= {
        f"{key}{'' if n == n_layers else '_1_layer'}": h[key]
        for n, h in histories.items()
        for key in ("seconds", "tokens_per_second")
    }
    numbers["train_seconds"] = sum(h["seconds"] for h in histories.values())
    save_results("attn_only", cfg, **numbers)
    found = (
        f"{', '.join(induction_heads)} {'are induction heads' if len(induction_heads) > 1 else 'is an induction head'} (prefix matching {prefix.max():.2f})"
        if induction_heads
        else f"no induction head (best prefix matching {prefix.max():.2f})"
    )
    if n_layers == 2 and induction_heads:
        found += f", fed by the previous-token head L0H{previous} through {numbers['strongest_path']}: without it {without[previous].max():.2f}, without another layer-0 head at least {min(others):.2f}"
    if control:
        found += f"; one layer reaches {control_prefix.max():.2f}"
    print(f"{green}{found}. Gate: attribution exact to {numbers['attribution_max_error']:.0e}.{endc}")
    if cfg.repeats == 0 and not cfg.model:
        print(
            f"{yellow}trained on natural text alone, without planted repeats: induction comes later and weaker, if at all{endc}"
        )
