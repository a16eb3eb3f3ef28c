"""Attention-only transformers, trained live: induction heads, QK and OV circuits, exact logit attribution."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

# The first half of this file, the model and how it is saved and reopened, can be read by itself: it uses utils, hooks
# and layers alone.
from utils import (  # first: sets OpenMP's variables before torch is loaded
    Count,
    Natural,
    NotNegative,
    Share,
    cyan,
    endc,
    fail,
    gray,
    green,
    pick_device,
    purple,
    save_results,
    seed_of,
    set_seed,
    write_aside,
    yellow,
)
from hooks import HookPoint, act_name, hooks, in_batches, listening_gap, run_with_cache
from hooked import Hooked
from layers import Attention, RMSNorm, next_token_loss, rotate

# The second half, what is measured and the experiment, uses these as well.
from plots import imshow, label_tokens, line, plain, show, show_attention, visible
from data import Corpus, find_tokens, load_corpus, load_tokenizer, refuse_empty, str_tokens, to_tokens
from train import TrainConfig, first_goes_on, repeat_batches, train
from launch import flags
from heads import (
    attention_in,
    catalogue,
    head_scores,
    heads_of_role,
    known_tokens,
    random_repeats,
    repeated_tokens,
    which_bar,
)
from norm_maps import mixing_ratio

import numpy as np
import torch as t
import torch.nn as nn
from einops import einsum, rearrange
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from tokenizers import Tokenizer
from torch import Tensor


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
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, x: Tensor, positional: Tensor | None) -> Tensor:
        """x (batch, pos, d_model)."""
        x = self.hook_resid_pre(x)
        attn_out = self.hook_attn_out(self.attn(self.ln1(x), positional))
        return self.hook_resid_post(x + attn_out)


class AttnOnly(nn.Module, Hooked):
    def __init__(self, cfg: AttnOnlyConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        if cfg.positions in ("learned", "shortformer"):
            self.W_pos = nn.Parameter(0.02 * t.randn(cfg.n_ctx, cfg.d_model))
        self.blocks = nn.ModuleList(AttnBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_final = RMSNorm() if cfg.norm == "rms" else nn.Identity()
        self.hook_embed = HookPoint()
        self.hook_pos_embed = HookPoint()
        self.init_weights()

    def init_weights(self) -> None:
        """Small query and key weights: attention starts near uniform, which lets heads form soonest."""
        for block in self.blocks:
            attn = block.attn
            for linear, gain in ((attn.q, 0.3), (attn.k, 0.3), (attn.v, 1.0), (attn.o, 1.0)):
                nn.init.normal_(linear.weight, std=gain / math.sqrt(linear.in_features))
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.unembed.weight, std=0.5 / math.sqrt(self.cfg.d_model))

    @property
    def W_E(self) -> Tensor:
        """(d_vocab, d_model)"""
        return self.embed.weight

    @property
    def W_U(self) -> Tensor:
        """(d_model, d_vocab)"""
        return self.unembed.weight.T

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, pos, d_vocab) of tokens (batch, pos)."""
        x = self.hook_embed(self.embed(tokens))  # (batch, pos, d_model)
        positional = None
        if self.cfg.positions in ("learned", "shortformer"):
            positional = self.hook_pos_embed(self.W_pos[: tokens.shape[1]])  # (pos, d_model)
        if self.cfg.positions == "learned":
            # They enter the stream once; shortformer shows them to every layer's queries and keys instead.
            x = x + positional
            positional = None
        for block in self.blocks:
            x = block(x, positional)
        return self.unembed(self.ln_final(x))  # (batch, pos, d_vocab)


#%% Saving and reopening: safetensors, config.json and the tokenizer in one folder
def save_own(model: AttnOnly, folder: Path, tokenizer: Tokenizer, dtype: t.dtype = t.float32, **scores) -> None:
    """scores: numbers to keep in config.json beside the architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: x.to("cpu", dtype).contiguous() for name, x in model.state_dict().items()}
    write_aside(folder / "model.safetensors", lambda path: save_file(state, path))
    config = {"architectures": ["AttnOnly"], **dataclasses.asdict(model.cfg), "scores": scores}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
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
            f"--model {folder} is not an attention-only model of attn_only.py; "
            "logit_lens.py and patching.py open full models"
        )
    scores = config.pop("scores")
    model = AttnOnly(AttnOnlyConfig(**config))
    model.load_state_dict(read_state(folder / "model.safetensors", model))
    tokenizer = load_tokenizer(folder)
    return model.to(device).eval(), tokenizer, scores


def read_state(file: Path, model: AttnOnly) -> dict[str, Tensor]:
    """The file's tensors in float32, which must be the model's by name and shape."""
    try:
        saved = load_file(file)
    except Exception as error:
        fail(f"{file} is corrupt: {error}")
    state = {name: x.float() for name, x in saved.items()}
    wanted = model.state_dict()
    differs = [name for name, x in wanted.items() if name not in state or state[name].shape != x.shape]
    differs += sorted(set(state) - set(wanted))
    if differs:
        fail(f"{file} does not fit its config.json: {differs[:3]}")
    return state


#%% Behaviour: loss by position, in-context learning, copying
ICL_CONTEXT = 80  # tokens that a row needs before its end can be compared with its early positions


@t.no_grad()
def loss_by_position(model: nn.Module, rows: Tensor, batch: int = 64) -> Tensor:
    """(row, pos - 1) cross-entropy in nats; entry i is the loss on token i + 1."""

    def losses(part: Tensor) -> Tensor:
        return next_token_loss(model(part), part, "none")

    return t.cat(list(in_batches(losses, rows, batch)))


def icl_score(losses: Tensor) -> tuple[float, float]:
    """
    In-context-learning score (Olsson et al. 2022): loss on the last 16 positions minus that on positions 42-58, nats.
    losses (row, pos - 1) as of loss_by_position; (mean, 95% half-width) over the rows.
    """
    late = losses[:, -16:].mean(1)
    early = losses[:, 41:58].mean(1)  # entry i is the loss at position i + 1
    gain = late - early
    return gain.mean().item(), 1.96 * gain.std().item() / math.sqrt(len(gain))


@t.no_grad()
def copying_scores(model: nn.Module, tokens: Tensor) -> Tensor:
    """
    Whether a head raises the tokens that it attends to: (layer, head) in -1..1 (after Olsson et al. 2022).
    Each head's direct write to the logits of the row's tokens so far is centred over them and weighted by attention:
    sum / sum of absolute values, so 1 raises only what is attended to and -1 lowers it.
    """
    layers = range(model.cfg.n_layers)
    names = [act_name(short, layer) for layer in layers for short in ("pattern", "z")]
    _, cache = run_with_cache(model, tokens, names)
    scores = []
    for layer in layers:
        written = einsum(
            cache["z", layer],
            model.blocks[layer].attn.W_O,
            model.W_U,
            "batch pos head d_head, head d_head d_model, d_model vocab -> batch head pos vocab",
        )
        n_heads, positions = written.shape[1:3]
        ids = tokens[:, None, None].expand(-1, n_heads, positions, -1)
        logits = written.gather(-1, ids)  # (batch, head, query, key): what the query's write adds to the key's token
        seen = t.ones_like(logits[0, 0]).tril()  # (query, key)
        mean = (logits * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
        centred = (logits - mean) * seen
        pattern = cache["pattern", layer]
        raised = (pattern * centred).sum(-1).sum((0, 2))  # (head)
        moved = (pattern * centred.abs()).sum((0, 2, 3))  # (head)
        scores.append(raised / moved)
    return t.stack(scores)


#%% Circuits from the weights: factored QK and OV, never vocab x vocab beyond the tokens shown
def read_embed(model: AttnOnly) -> Tensor:
    """
    What layer 0 reads of each token, (d_vocab, d_model): W_E, each row divided by its RMS where the model has a norm.
    That is exact, since nothing else is in the stream there.
    """
    if model.cfg.norm == "none":
        return model.W_E
    mean_square = model.W_E.pow(2).mean(-1, keepdim=True)
    return model.W_E / (mean_square + 1e-6).sqrt()


def qk_circuit(model: AttnOnly, layer: int, head: int, query: Tensor, key: Tensor, offset: int) -> Tensor:
    """
    (query, key) attention scores of the direct path between tokens that stand `offset` places apart.
    query and key are token ids; biases, rotation and distance bias are included.
    """
    cfg = model.cfg
    attn = model.blocks[layer].attn
    x = read_embed(model)
    by_head = "token (head d_head) -> token head d_head"
    q = rearrange(attn.q(x[query]), by_head, head=cfg.n_heads)
    k = rearrange(attn.k(x[key]), by_head, head=cfg.n_heads)
    if cfg.positions == "rotary":
        # Only the difference of positions matters: the key stays at 0, the query stands at `offset`.
        dims = 2 * int(cfg.rotary_share * cfg.d_head / 2)
        q_everywhere = q[:, None].expand(-1, offset + 1, -1, -1)  # (query, pos, head, d_head)
        q = rotate(q_everywhere, dims, cfg.rotary_base)[:, offset]
    scores = einsum(q[:, head], k[:, head], "query d_head, key d_head -> query key") / math.sqrt(cfg.d_head)
    distance = t.tensor([offset], device=x.device)
    by_distance = attn.score_bias(distance)  # (head, 1), or (1, 1) where distance adds nothing
    return scores + by_distance.expand(cfg.n_heads, 1)[head]


def ov_circuit(model: AttnOnly, layer: int, head: int, source: Tensor, out: Tensor) -> Tensor:
    """
    (source, out) logits that a head writes to each output token when it attends to a source token alone.
    source and out are token ids; the direct path, before the final norm.
    """
    attn = model.blocks[layer].attn
    values = einsum(read_embed(model)[source], attn.W_V[head], "source d_model, d_model d_head -> source d_head")
    effects = einsum(attn.W_O[head], model.W_U[:, out], "d_head d_model, d_model out -> d_head out")
    return einsum(values, effects, "source d_head, d_head out -> source out")


def ov_eigenvalues(model: AttnOnly, layer: int, head: int) -> Tensor:
    """
    (d_head) the nonzero eigenvalues, complex, of the full OV circuit W_E W_V W_O W_U (vocab x vocab).
    A B and B A share them, so they are found in the d_head x d_head matrix W_O W_U W_E W_V.
    """
    attn = model.blocks[layer].attn
    writes = einsum(attn.W_O[head], model.W_U, "d_head d_model, d_model vocab -> d_head vocab")
    embeds = einsum(writes, read_embed(model), "d_head vocab, vocab d_model -> d_head d_model")
    turned = einsum(embeds, attn.W_V[head], "d_head d_model, d_model d_head_2 -> d_head d_head_2")
    return t.linalg.eigvals(turned.double())


def eigenvalue_copying(model: AttnOnly) -> Tensor:
    """
    (layer, head) in -1..1: sum of the OV circuit's eigenvalues over the sum of their absolute values.
    1 copies what it attends to (A Mathematical Framework).
    """
    scores = t.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            values = ov_eigenvalues(model, layer, head)
            scores[layer, head] = (values.sum().real / values.abs().sum()).item()
    return scores


def product_norm(a: Tensor, b: Tensor) -> Tensor:
    """||a @ b||, Frobenius, of a (..., large, small) and b (..., small, large); the large product is never formed."""
    return t.linalg.matrix_norm(t.linalg.qr(a).R @ t.linalg.qr(b.mT).R.mT)


def composition(early: tuple[Tensor, Tensor], late: tuple[Tensor, Tensor]) -> Tensor:
    """
    ||A B|| / (||A|| ||B||), Frobenius (A Mathematical Framework).
    A = early[0] @ early[1] and B = late[0] @ late[1], (..., d_model, d_model), stay in their factors
    (..., d_model, d_head) and (..., d_head, d_model).
    """
    between = early[1] @ late[0]  # (..., d_head, d_head)
    product = t.linalg.matrix_norm(t.linalg.qr(early[0]).R @ between @ t.linalg.qr(late[1].mT).R.mT)
    return product / (product_norm(*early) * product_norm(*late))


@t.no_grad()
def composition_scores(model: AttnOnly, draws: int = 100) -> tuple[dict[str, Tensor], float, float]:
    """
    How much layer 1's heads read of what layer 0's write, beside what random matrices give:
    ({'Q' | 'K' | 'V': (layer-0 head, layer-1 head)}, mean and std of the score of Gaussian factors of the same shapes).
    """
    heads = range(model.cfg.n_heads)
    first = model.blocks[0].attn
    second = model.blocks[1].attn
    writes = [(first.W_V[head], first.W_O[head]) for head in heads]
    reads = {
        "Q": [(second.W_Q[head], second.W_K[head].mT) for head in heads],
        "K": [(second.W_K[head], second.W_Q[head].mT) for head in heads],
        "V": [(second.W_V[head], second.W_O[head]) for head in heads],
    }
    scores = {}
    for name, late in reads.items():
        scores[name] = t.zeros(len(heads), len(heads))
        for writer in heads:
            for reader in heads:
                scores[name][writer, reader] = composition(writes[writer], late[reader])

    d_model, d_head = first.W_Q.shape[1:]
    shapes = [(d_model, d_head), (d_head, d_model), (d_model, d_head), (d_head, d_model)]
    noise = [t.randn(draws, *shape, generator=t.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    random = composition((noise[0], noise[1]), (noise[2], noise[3]))  # (draw)
    return scores, random.mean().item(), random.std().item()


def skip_trigrams(model: AttnOnly, tokenizer: Tokenizer, head: int, ids: Tensor, offset: int, n: int = 8) -> list[list]:
    """
    The n strongest skip-trigrams of a layer-0 head among the tokens ids, `offset` places apart, one per source.
    Rows: [source ... destination -> out, QK score above the destination's mean, OV logit above the source's mean, next
    best outputs]; strongest: by the product of the two numbers.
    """
    qk = qk_circuit(model, 0, head, ids, ids, offset)  # (destination, source)
    qk = qk - qk.mean(1, keepdim=True)
    ov = ov_circuit(model, 0, head, ids, ids)  # (source, out)
    ov = ov - ov.mean(1, keepdim=True)
    strength = qk.amax(0).clamp(min=0) * ov.amax(1).clamp(min=0)  # (source)

    def name(i: Tensor) -> str:
        return visible(tokenizer.decode([int(ids[i])], skip_special_tokens=False))

    rows = []
    for source in strength.topk(n).indices:
        destination = qk[:, source].argmax()
        out = ov[source].argmax()
        trigram = f"{name(source)} ... {name(destination)} -> {name(out)}"
        next_best = ", ".join(name(i) for i in ov[source].topk(4).indices)
        rows.append([trigram, qk[:, source].max().item(), ov[source].max().item(), next_best])
    return rows


#%% Attribution: the logit as direct path + every head x every source token, exactly
@t.no_grad()
def logit_attribution(model: AttnOnly, tokens: Tensor, token: int, position: int = -1) -> dict[str, Tensor]:
    """
    The logit of `token` at one position of tokens (1, pos), and the parts that sum to it:
    'direct' (): the token's own embedding, by the direct path;
    'heads' (layer, head, source): what each head writes from each source position;
    'logit' (): the model's own.
    The final norm's scale is frozen at its value there, which makes the parts linear; the sum is exact where the output
    maps have no bias.
    logit_attribution.logit_parts is the same for models with MLPs. It reads each block's mlp and the final norm's weight and
    scale, none of which need be here, so this one stands by itself.
    """
    layers = range(model.cfg.n_layers)
    names = [act_name("resid_pre", 0)] + [act_name(short, layer) for layer in layers for short in ("v", "pattern")]
    if model.cfg.norm == "rms":
        names.append("ln_final.hook_scale")
    logits, cache = run_with_cache(model, tokens, names)

    direction = model.W_U[:, token]  # (d_model)
    if model.cfg.norm == "rms":
        direction = direction / cache["ln_final.hook_scale"][0, position]
    heads = [
        einsum(
            cache["pattern", layer][0, :, position],
            cache["v", layer][0],
            model.blocks[layer].attn.W_O,
            direction,
            "head source, source head d_head, head d_head d_model, d_model -> head source",
        )
        for layer in layers
    ]
    return {
        "direct": einsum(cache["resid_pre", 0][0, position], direction, "d_model, d_model ->"),
        "heads": t.stack(heads),
        "logit": logits[0, position, token],
    }


def attribution_error(parts: dict[str, Tensor]) -> float:
    return (parts["direct"] + parts["heads"].sum() - parts["logit"]).abs().item()


#%% Norm-based analysis (Kobayashi et al. 2020, 2021): a head may attend to what it hardly moves
@t.no_grad()
def norm_based(model: AttnOnly, tokens: Tensor, layer: int) -> dict[str, Tensor]:
    """
    How far a layer moves the stream of each query of tokens (1, pos) by what it takes from each key, f(x) = v W_O:
    'attention' (head, query, key): alpha, the attention itself;
    'weighted' (head, query, key): ||alpha f(x)||;
    'block' (query, key): ||sum over heads of alpha f(x), + x where key = query||;
    'normed' (query, key): 'block' after the next norm, its scale frozen;
    'mixing' (query): share of the block's output that comes from other positions (norm_maps.mixing_ratio).
    norm_maps.ff_maps goes on through the MLP that these models do not have, and needs its norm.
    """
    last = layer + 1 == model.cfg.n_layers
    next_scale = "ln_final.hook_scale" if last else f"blocks.{layer + 1}.ln1.hook_scale"
    names = [act_name(short, layer) for short in ("resid_pre", "v", "pattern")]
    if model.cfg.norm == "rms":
        names.append(next_scale)
    _, cache = run_with_cache(model, tokens, names)

    pattern = cache["pattern", layer][0]  # (head, query, key)
    x = cache["resid_pre", layer][0]  # (pos, d_model)
    moved = einsum(
        pattern,
        cache["v", layer][0],
        model.blocks[layer].attn.W_O,
        "head query key, key head d_head, head d_head d_model -> head query key d_model",
    )
    stays = t.diag_embed(x.T).permute(1, 2, 0)  # (query, key, d_model): x where key = query
    block = moved.sum(0) + stays
    block_norm = block.norm(dim=-1)  # (query, key)
    scale = cache[next_scale][0] if model.cfg.norm == "rms" else 1.0  # (query, 1)
    return {
        "attention": pattern,
        "weighted": moved.norm(dim=-1),
        "block": block_norm,
        "normed": block_norm / scale,
        "mixing": mixing_ratio(block),
    }


#%% Interventions: ablate a head; patch the path from one head into another's query, key or value
def zero_head(layer: int, head: int) -> tuple[str, Callable]:
    """The hook that makes a head write nothing."""

    def zero(z: Tensor, hook: HookPoint) -> Tensor:
        return z.index_fill(2, t.tensor([head], device=z.device), 0)

    return act_name("z", layer), zero


def ablated_scores(model: nn.Module, tokens: Tensor, half: int | None, layer: int, head: int) -> dict[str, Tensor]:
    with hooks(model, [zero_head(layer, head)]):
        return head_scores(model, model.cfg.n_layers, tokens, half)


@t.no_grad()
def path_patch(model: AttnOnly, clean: Tensor, corrupt: Tensor, half: int) -> tuple[dict[str, Tensor], float, float]:
    """
    Path patching (Wang et al. 2022) in a two-layer model, from each layer-0 head (sender) into the q, k or v input of
    each layer-1 head (receiver): that input alone is given the sender's corrupt output.
    clean (row, 1 + 2 * half): random tokens said twice; corrupt shares only the second half, so that nothing there can
    be looked up.
    ({'q' | 'k' | 'v': (sender, receiver) share of the log-probability lost, 0 = clean, 1 = corrupt},
    mean log-probability of the second half in the clean run, the same in the corrupt run, both in nats).
    """
    heads = range(model.cfg.n_heads)
    W_O = model.blocks[0].attn.W_O
    senders = act_name("z", 0)
    receivers = act_name("result", 1)
    final = act_name("resid_post", 1)
    inputs = {room: act_name(room, 1) for room in "qkv"}

    def log_prob(resid: Tensor) -> float:
        """Of the second half's tokens, its first apart, from the last layer's output (row, pos, d_model)."""
        logits = model.unembed(model.ln_final(resid[:, -half:-1]))
        return logits.log_softmax(-1).gather(-1, clean[:, -half + 1 :, None]).mean().item()

    # Step 1: the clean and the corrupt run
    _, clean_cache = run_with_cache(model, clean, [senders, receivers, final])
    _, corrupt_cache = run_with_cache(model, corrupt, [senders, receivers, final])
    top = log_prob(clean_cache[final])
    bottom = log_prob(corrupt_cache[final])

    lost = {room: t.zeros(len(heads), len(heads)) for room in inputs}
    for sender in heads:
        # Step 2: what layer 1's queries, keys and values are when the sender alone writes its corrupt output
        z_change = (corrupt_cache[senders] - clean_cache[senders])[:, :, sender]
        write_change = einsum(z_change, W_O[sender], "row pos d_head, d_head d_model -> row pos d_model")
        with hooks(model, [(act_name("resid_pre", 1), lambda x, hook: x + write_change)]):
            _, changed = run_with_cache(model, clean, list(inputs.values()))

        for room, name in inputs.items():
            # Step 3: a clean run in which layer 1 is given this one input. All its heads at once, since heads of one
            # layer do not read each other
            with hooks(model, [(name, lambda x, hook: changed[name])]):
                _, patched = run_with_cache(model, clean, receivers)
            result_change = patched[receivers] - clean_cache[receivers]  # (row, pos, head, d_model)

            # Step 4: the clean output with one receiver's change at a time; no layer comes after it
            for receiver in heads:
                after = log_prob(clean_cache[final] + result_change[:, :, receiver])
                lost[room][sender, receiver] = (top - after) / (top - bottom)
    return lost, top, bottom


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config(TrainConfig):
    n_layers: Count = 2  # 1 or 2; with 2, a 1-layer control is trained on the same rows
    n_heads: Count = 4  # attention heads of a block
    d_model: Count = 128  # width of the residual stream
    positions: Literal["rotary", "learned", "shortformer", "relative"] = (
        "relative"  # how the model knows where a token stands
    )
    rotary_share: Share = 0.5  # of each head's dimensions that rotate (rotary)
    steps: Natural = 400
    lr: NotNegative = 1e-2
    # share of training rows that repeat a snippet of themselves: two thirds natural, one third in shuffled order; 0 is
    # natural text alone
    repeats: Share = 0.45
    english: Share = 0.3  # share of rows from docstrings and help topics (stdlib text); the rest is code
    data: str = "stdlib"  # stdlib, a text file or folder, or a hub dataset
    vocab: Count = 512  # size of the byte-level BPE trained on the text
    tokenizer: str | None = None  # use this one instead: a folder, a tokenizer.json or a hub name
    model: str | None = None  # open this folder (checkpoints/attn_only/2_layers ...) instead of training
    control: bool = True  # train the 1-layer control
    prompt: str = "Mr Dursley and Mrs Durs"  # for attribution and the attention page
    answer: str | None = None  # token whose logit is attributed; default the model's own prediction


if __name__ == "__main__":
    a100 = Config(
        n_heads=12,
        d_model=768,
        vocab=8192,
        contexts=(256, 1024),
        tokens_per_step=65536,
        accumulate=2,
        steps=8000,
        autocast="on",
        compile=True,
    )
    cfg = flags(Config, __doc__, hpc=a100)  # --hpc: an A100 with 40 GB
    device = pick_device(cfg.device)
    if cfg.n_layers not in (1, 2):
        fail("--n-layers is 1 or 2: deeper models are tiny_transformer.py's")
    if cfg.d_model % cfg.n_heads:
        fail(f"--d-model {cfg.d_model} is not a multiple of --n-heads {cfg.n_heads}")
    set_seed(cfg.seed)
    refuse_empty(cfg.prompt)
    print(f"{purple}=== Attention-only transformers on {cfg.data}, seed {cfg.seed}, {device} ==={endc}")


#%% Train before your eyes: 2 layers, and 1 layer as the control, while the scores of every head are watched
def counted_layers(n: int) -> str:
    return "1 layer" if n == 1 else f"{n} layers"


def train_own(cfg: Config, n_layers: int, corpus: Corpus, device: str) -> tuple[AttnOnly, dict]:
    """
    A fresh model of n_layers, trained on rows of the corpus, and the history of its training.
    history['watch']: the best head scores and, where contexts are long enough, the ICL score, 20 times in a run.
    """
    n_ctx = max(cfg.contexts)
    model_cfg = AttnOnlyConfig(
        n_layers=n_layers,
        n_heads=cfg.n_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_model // cfg.n_heads,
        d_vocab=corpus.d_vocab,
        n_ctx=n_ctx,
        positions=cfg.positions,
        rotary_share=cfg.rotary_share,
    )
    model = AttnOnly(model_cfg).to(device)
    half = min(50, (n_ctx - 1) // 2)
    probe = random_repeats(corpus, 32, half, seed=10**6 + cfg.seed).to(device)
    natural = t.from_numpy(corpus.rows(np.random.default_rng(cfg.seed), 48, n_ctx, "heldout")).to(device)

    def watch(step: int) -> dict:
        scores = head_scores(model, n_layers, probe)
        seen = {
            "prefix_matching": scores["prefix_matching"].max().item(),
            "previous_token": scores["previous_token"][0].max().item(),
        }
        if n_ctx >= ICL_CONTEXT:
            seen["icl_score"], _ = icl_score(loss_by_position(model, natural))
        return seen

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
    models: dict[int, AttnOnly] = {}  # by number of layers: the model, and the control where one is trained
    histories: dict[int, dict] = {}  # of those that are trained here
    if cfg.model:
        model, tokenizer, _ = open_own(Path(cfg.model), device)
        corpus = load_corpus(cfg.data, tokenizer=cfg.model)
        models[model.cfg.n_layers] = model
    else:
        corpus = load_corpus(cfg.data, cfg.vocab, cfg.tokenizer)
        tokenizer = corpus.tokenizer
        n_prompt = to_tokens(tokenizer, cfg.prompt).shape[1]
        if n_prompt < 2:
            fail("--prompt is too short: give a few words")
        if n_prompt > max(cfg.contexts):
            fail(f"--prompt has {n_prompt} tokens, the model sees --contexts {max(cfg.contexts)}: shorten it")
        if cfg.answer:
            find_tokens(tokenizer, cfg.answer)  # what is no token is said before training
        depths = {1, cfg.n_layers} if cfg.control else {cfg.n_layers}
        for depth in sorted(depths):
            role = " (the control)" if depth < cfg.n_layers else ""
            print(
                f"{purple}=== Training {counted_layers(depth)}{role}: "
                f"{cfg.repeats:.0%} of rows repeat a snippet of themselves ==={endc}"
            )
            set_seed(cfg.seed)
            models[depth], history = train_own(cfg, depth, corpus, device)
            histories[depth] = history
            folder = Path(f"checkpoints/attn_only/{depth}_layers")
            save_own(models[depth], folder, tokenizer, **history["watch"][-1])
            speed = f"{cyan}{history['tokens_per_second']:,.0f} tokens/s{green}"
            print(
                f"{green}trained on {history['tokens'][-1] / 1e6:.2f}M tokens in {history['seconds']:.1f} s ({speed}), "
                f"saved to {folder}{endc}"
            )
        first_goes_on()
        model = models[cfg.n_layers]
    n_layers = model.cfg.n_layers
    n_heads = model.cfg.n_heads
    n_ctx = model.cfg.n_ctx
    control = models.get(1) if n_layers == 2 else None  # none with --no-control, --n-layers 1 and --model
    key_ends = {depth: "" if depth == n_layers else "_1_layer" for depth in models}  # of keys in results
    layer_names = [f"L{layer}" for layer in range(n_layers)]
    head_names = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
    first_layer = head_names[:n_heads]
    second_layer = head_names[n_heads:]
    n_params = sum(p.numel() for p in model.parameters())
    numbers: dict = {"n_params": n_params}
    about = f"{n_layers}-layer attention-only, {n_params / 1e3:.0f}k parameters"

#%% The gates: hooks change nothing, attention rows sum to one, the parts of a logit sum to the logit
if __name__ == "__main__":
    print(f"{purple}=== Gates ==={endc}")
    half = min(50, (n_ctx - 1) // 2)
    # said twice, the second time right after the first (what the model predicts), and each row at its own distance
    # (where heads look: one that looks back over a fixed distance finds nothing there)
    repeats = repeated_tokens(64, half, known_tokens(corpus), corpus.bos, cfg.seed).to(device)
    spaced = random_repeats(corpus, 64, half, seed=cfg.seed).to(device)

    with t.no_grad():
        _, cache = run_with_cache(model, repeats)
    gap = listening_gap(model, repeats)
    assert gap < 1e-5, f"listening changes the logits by {gap}"

    row_error = max((cache["pattern", layer].sum(-1) - 1).abs().max().item() for layer in range(n_layers))
    assert row_error < 1e-5, f"attention rows sum to 1 +- {row_error}"

    errors = []
    for i in range(16):
        for position in (-1, half, 1):
            parts = logit_attribution(model, repeats[[i]], int(repeats[i, -1]), position)
            errors.append(attribution_error(parts))
    attribution_max_error = max(errors)
    assert attribution_max_error < 1e-4, f"the parts miss the logit by {attribution_max_error}"
    numbers["attribution_max_error"] = attribution_max_error
    print(
        f"{cyan}attention rows sum to 1 within {row_error:.1e}; direct path + heads x sources = logit within "
        f"{attribution_max_error:.1e} ({len(errors)} logits){endc}"
    )

#%% Which heads look where, on random tokens said twice: previous-token heads and induction heads
if __name__ == "__main__":
    print(f"{purple}=== Heads ==={endc}")
    scores = head_scores(model, n_layers, spaced)
    _, bars, roles = catalogue(model, spaced)
    scores["copying"] = copying_scores(model, repeats).cpu()
    scores["OV eigenvalues"] = eigenvalue_copying(model)
    prefix = scores["prefix_matching"]  # (layer, head)
    found = {"induction": prefix, "previous token": scores["previous_token"]}
    induction_heads = heads_of_role("induction", roles, found)
    previous_heads = heads_of_role("previous token", roles, found)
    best_layer, best_head = divmod(int(prefix.argmax()), n_heads)
    best = f"L{best_layer}H{best_head}"
    previous = int(scores["previous_token"][0].argmax())  # layer 0's previous-token head
    numbers["best_prefix_matching"] = prefix.max().item()
    if control is not None:
        control_prefix = head_scores(control, 1, spaced)["prefix_matching"].max().item()
        numbers["best_prefix_matching_1_layer"] = control_prefix
    numbers["induction_heads"] = induction_heads
    numbers["induction_bar"] = bars["induction"]
    numbers["previous_token_heads"] = previous_heads
    numbers["previous_token_score"] = scores["previous_token"][0, previous].item()
    numbers["copying_of_best_head"] = scores["copying"][best_layer, best_head].item()
    numbers["ov_eigenvalue_copying_of_best_head"] = scores["OV eigenvalues"][best_layer, best_head].item()

    rows = [[name, *(f"{x.flatten()[i]:.2f}" for x in scores.values())] for i, name in enumerate(head_names)]
    print(tabulate(rows, headers=["head", *scores]))
    beside = "" if control is None else f"; 1-layer control {control_prefix:.3f}"
    print(f"{cyan}best prefix matching {prefix.max():.3f} in {best}{beside}{endc}")
    bar = bars["induction"]
    print(
        f"{gray}a head is named for induction above {bar:.2f}, its {which_bar('induction', bar)} (99th percentile of the "
        "best head when rows look where other rows would), less the same head's score where nothing is repeated: "
        f"{', '.join(induction_heads) or 'none'}{endc}"
    )

#%% ... as maps of layers and heads
if __name__ == "__main__":
    fig = imshow(
        t.stack(list(scores.values())),
        f"Head scores on {len(spaced)} rows of random tokens said twice, each row at its own distance ({about})",
        xlabel="head",
        ylabel="layer",
        x=[f"H{head}" for head in range(n_heads)],
        y=layer_names,
        panels=list(scores),
        columns=3,
        value="score",
    )
    show(
        fig,
        "attn_only/head_scores",
        "1 is a perfect head of its kind. A previous-token head looks one back; an induction head looks at what "
        "followed the same token before.",
    )

#%% Training watched: prefix matching, previous-token attention and in-context learning against tokens seen
if __name__ == "__main__" and histories:
    curves = {}
    for depth, history in sorted(histories.items(), reverse=True):
        for key in ("prefix_matching", "previous_token", "icl_score"):
            if key in history["watch"][-1]:  # short contexts have no ICL score
                name = f"{key.replace('_', ' ')}, {counted_layers(depth)}"
                curves[name] = [seen[key] for seen in history["watch"]]
    width = min(10, max(1, cfg.steps))
    smooth_loss = {
        counted_layers(depth): np.convolve(history["loss"], np.ones(width) / width, "valid")
        for depth, history in histories.items()
    }

    with_icl = ", ICL score on 48 held-out rows" if n_ctx >= ICL_CONTEXT else ""
    fig = line(
        curves,
        f"Phase change of {about}: best head's scores on 32 rows of random tokens{with_icl} (seed {cfg.seed})",
        "tokens seen",
        "score (ICL: nats)" if with_icl else "score",
        x=[seen["tokens"] for seen in histories[n_layers]["watch"]],
        markers=True,
        dashed=[name for name in curves if name.endswith("1 layer") and n_layers > 1],
    )
    for share in cfg.context_steps[: len(cfg.contexts) - 1]:
        longer_from = share * cfg.steps * cfg.tokens_per_step
        fig.add_vline(longer_from, line_dash="dot", annotation_text="longer context")
    show(
        fig,
        "attn_only/phase_change",
        "Scores of the best heads as training goes on: two layers learn induction within few steps, one layer "
        "never does.",
    )

    fig = line(
        smooth_loss,
        f"Training loss, mean of {width} steps of {cfg.tokens_per_step} tokens, {cfg.repeats:.0%} rows with repeats",
        "tokens seen",
        "loss (nats)",
        x=histories[n_layers]["tokens"][width - 1 :],
    )
    show(
        fig,
        "attn_only/loss",
        "The drop that is steeper than the rest is the phase change of the figure before.",
    )

#%% Loss by position: repeated random tokens are cheap the second time; in natural text later tokens are cheaper (ICL)
if __name__ == "__main__":
    natural = t.from_numpy(corpus.rows(np.random.default_rng(10**6), 512, n_ctx, "heldout")).to(device)
    repeats_losses = {}  # by number of layers: (row, pos - 1)
    natural_losses = {}
    for depth, own in sorted(models.items()):
        repeats_losses[depth] = loss_by_position(own, repeats)
        natural_losses[depth] = loss_by_position(own, natural)

    second = repeats_losses[n_layers].shape[1] - half  # where the loss of the second copy's first token stands
    first_copy = repeats_losses[n_layers][:, :second].mean().item()
    second_copy = repeats_losses[n_layers][:, second + 1 :].mean().item()  # its first token cannot be known
    heldout_loss = natural_losses[n_layers].mean().item()
    numbers["loss_first_copy"] = first_copy
    numbers["loss_second_copy"] = second_copy
    numbers["heldout_loss"] = heldout_loss
    print(
        f"{cyan}loss on random tokens: first time {first_copy:.2f}, second time {second_copy:.2f} nats; "
        f"held-out text {heldout_loss:.3f} nats{endc}"
    )
    if n_ctx >= ICL_CONTEXT:
        for depth in sorted(models, reverse=True):
            mean, half_width = icl_score(natural_losses[depth])
            numbers[f"icl_score{key_ends[depth]}"] = mean
            numbers[f"icl_score{key_ends[depth]}_95"] = half_width
            print(
                f"{cyan}in-context-learning score, {counted_layers(depth)}: {mean:.3f} +- {half_width:.3f} nats "
                f"({len(natural)} rows, 95%){endc}"
            )

#%% ... as curves
if __name__ == "__main__":
    fig = line(
        {counted_layers(depth): losses.mean(0) for depth, losses in repeats_losses.items()},
        f"Loss on {len(repeats)} rows of {half} random tokens said twice: the second time is predicted by induction",
        "position",
        "loss (nats)",
        x=list(range(1, repeats.shape[1])),
    )
    show(
        fig,
        "attn_only/loss_repeated",
        "Left of the middle nothing can be known; right of it a model with induction reads off what it saw.",
    )

    smooth = {}
    span = min(9, n_ctx - 1)
    for depth, losses in natural_losses.items():
        smooth[counted_layers(depth)] = np.convolve(losses.mean(0).cpu(), np.ones(span) / span, "valid")
    fig = line(
        smooth,
        f"Loss on {len(natural)} held-out natural rows, mean of {span} positions",
        "position",
        "loss (nats)",
        x=[(span + 1) / 2 + i for i in range(n_ctx - span)],
    )
    show(
        fig,
        "attn_only/loss_natural",
        "Later tokens are easier where the model uses its context; the slope is in-context learning.",
    )

#%% Ablation: induction needs the previous-token head, and no other head of layer 0
if __name__ == "__main__" and n_layers == 2:
    print(f"{purple}=== Which layer-0 head does induction need? ==={endc}")
    without = []
    for head in range(n_heads):
        left = ablated_scores(model, spaced, None, layer=0, head=head)["prefix_matching"][1]  # (layer-1 head)
        without.append(left)
        numbers_of_head = f"previous-token score {scores['previous_token'][0, head]:.2f}"
        print(f"{cyan}without L0H{head} ({numbers_of_head}): best prefix matching {left.max():.3f}{endc}")
    without = t.stack(without)  # (zeroed layer-0 head, layer-1 head)
    best_without = without.amax(1).tolist()
    others = [best_without[head] for head in range(n_heads) if head != previous]
    numbers["prefix_matching_without_previous_token_head"] = best_without[previous]
    if others:  # one head alone has no others
        numbers["prefix_matching_without_another_head_min"] = min(others)

#%% ... as a map of what is zeroed and what is left
if __name__ == "__main__" and n_layers == 2:
    fig = imshow(
        t.cat([prefix[1:], without]),
        f"Prefix matching of layer-1 heads when one layer-0 head is zeroed ({len(spaced)} rows)",
        xlabel="layer-1 head",
        ylabel="zeroed",
        x=second_layer,
        y=["none", *first_layer],
        diverging=False,
        value="prefix matching",
    )
    show(
        fig,
        "attn_only/ablation",
        "A row is the layer-0 head that is taken away, a column the layer-1 head that is measured: where the row "
        "is pale, induction is gone.",
    )

#%% The path: previous-token head -> key of the induction head, seen by patching one input at a time
if __name__ == "__main__" and n_layers == 2:
    other = repeated_tokens(len(repeats), half, known_tokens(corpus), corpus.bos, seed_of(cfg.seed, "other tokens")).to(
        device
    )
    corrupt = t.cat([other[:, :-half], repeats[:, -half:]], 1)
    lost, clean_log_prob, corrupt_log_prob = path_patch(model, repeats, corrupt, half)
    shares = t.stack(list(lost.values()))  # (query key value, sender, receiver)
    room, sender, receiver = (int(i) for i in t.unravel_index(shares.argmax(), shares.shape))
    strongest_path = f"L0H{sender} -> {'qkv'[room]} of L1H{receiver}"
    strongest_share = shares[room, sender, receiver].item()
    numbers["strongest_path"] = strongest_path
    numbers["strongest_path_share"] = strongest_share
    numbers["log_prob_clean"] = clean_log_prob
    numbers["log_prob_corrupt"] = corrupt_log_prob
    print(f"{cyan}strongest path: {strongest_path}, which loses {strongest_share:.0%} of what induction gives{endc}")

#%% ... as maps of senders and receivers
if __name__ == "__main__" and n_layers == 2:
    ends = f"0 = clean {clean_log_prob:.2f}, 1 = corrupt {corrupt_log_prob:.2f} nats"
    fig = imshow(
        shares,
        "Path patching, layer-0 head -> one input of a layer-1 head: share of log-probability lost "
        f"(n = {len(repeats)}; {ends})",
        xlabel="receiver",
        ylabel="sender",
        x=second_layer,
        y=first_layer,
        panels=["query", "key", "value"],
        value="share lost",
    )
    show(
        fig,
        "attn_only/path_patching",
        "Blue: the receiver needs what this sender writes into its query, key or value; all other paths stay clean.",
    )

#%% Composition: how much more than random matrices do the layers read from each other?
if __name__ == "__main__" and n_layers == 2:
    composed, random_mean, random_std = composition_scores(model)
    induction = int(prefix[1].argmax())  # layer 1's best induction head
    k_composition = composed["K"][previous, induction].item()
    numbers["k_composition"] = k_composition
    numbers["k_composition_random"] = random_mean
    numbers["k_composition_random_std"] = random_std
    print(
        f"{cyan}K-composition L0H{previous} -> L1H{induction}: {k_composition:.3f} "
        f"against {random_mean:.3f} +- {random_std:.3f} at random{endc}"
    )

#%% ... as maps of pairs of heads
if __name__ == "__main__" and n_layers == 2:
    fig = imshow(
        t.stack(list(composed.values())) - random_mean,
        "Composition of layer-0 with layer-1 heads, minus random factors "
        f"({random_mean:.3f} +- {random_std:.3f}, 100 draws)",
        xlabel="layer-1 head",
        ylabel="layer-0 head",
        x=second_layer,
        y=first_layer,
        panels=[f"{name}-composition" for name in composed],
        value="above random",
    )
    show(
        fig,
        "attn_only/composition",
        "How much of what one head writes lies where the other reads; compare with the number for random matrices "
        "in the line above.",
    )

#%% The circuits: what a head attends to (QK), what it then writes (OV), and the skip-trigrams of the 1-layer model
if __name__ == "__main__":
    counts = sum(np.bincount(part, minlength=corpus.d_vocab) for part in corpus.train.values())
    by_frequency = t.from_numpy(np.argsort(-counts)).to(device)
    frequent = by_frequency[:60]
    one_layer = models.get(1, model)
    with t.no_grad():
        ov_circuits = {
            (layer, head): ov_circuit(model, layer, head, frequent, frequent)
            for layer, head in sorted({(0, previous), (best_layer, best_head)})
        }
        qk_circuits = t.stack([qk_circuit(model, 0, head, frequent, frequent, offset=1) for head in range(n_heads)])
        trigrams = []
        for head in range(one_layer.cfg.n_heads):
            found = skip_trigrams(one_layer, tokenizer, head, by_frequency[:256], offset=2, n=4)
            trigrams += [[f"L0H{head}", *row] for row in found]
    print(
        f"{purple}=== Skip-trigrams of layer 0 ({one_layer.cfg.n_layers}-layer model), "
        f"{one_layer.cfg.positions} positions at offset 2 ==={endc}"
    )
    headers = ["head", "source ... destination -> out", "QK above mean", "OV logit above mean", "next best outputs"]
    print(tabulate(trigrams, headers=headers, floatfmt=".2f"))

#%% ... as maps of tokens
if __name__ == "__main__":
    frequent_tokens = [visible(token) for token in str_tokens(tokenizer, frequent)]
    with_biases = "" if model.cfg.bias == "none" else "biases, "
    with_norm = "embedding divided by its own RMS" if model.cfg.norm == "rms" else "no norm"
    where = f"direct path, {with_biases}{with_norm}"
    for (layer, head), circuit in ov_circuits.items():
        fig = imshow(
            circuit,
            f"OV circuit of L{layer}H{head}: logit written when it attends to the source "
            f"({where}; {len(frequent)} most frequent tokens)",
            xlabel="output",
            ylabel="source",
            x=frequent_tokens,
            y=frequent_tokens,
            value="logit",
        )
        show(
            fig,
            f"attn_only/ov_L{layer}H{head}",
            "A row for the token that is attended to, a column for the logit it raises (blue) or lowers: a head that copies "
            "has a blue diagonal.",
        )
    fig = imshow(
        qk_circuits,
        f"QK circuits of layer 0 at offset 1 ({where}, {model.cfg.positions} positions)",
        xlabel="key",
        ylabel="query",
        x=frequent_tokens,
        y=frequent_tokens,
        panels=first_layer,
        columns=2,
        value="score",
    )
    show(
        fig,
        "attn_only/qk_layer_0",
        "Which token attends to which, one place back: blue pairs attract, red ones repel.",
    )

#%% Attribution for a prompt: which token, through which head, made the model say this?
if __name__ == "__main__":
    prompt = to_tokens(tokenizer, cfg.prompt).to(device)
    if prompt.shape[1] < 2:
        fail("--prompt is too short: give a few words")
    if prompt.shape[1] > n_ctx:
        fail(f"--prompt has {prompt.shape[1]} tokens, the model sees {n_ctx}: shorten it")
    prompt_tokens = str_tokens(tokenizer, prompt[0])
    labels = label_tokens(prompt_tokens)
    with t.no_grad():
        probs = model(prompt)[0, -1].softmax(-1)
    answer = find_tokens(tokenizer, cfg.answer)[0] if cfg.answer else int(probs.argmax())
    said = visible(str_tokens(tokenizer, [answer])[0])
    parts = logit_attribution(model, prompt, answer)
    prompt_error = attribution_error(parts)
    assert prompt_error < 1e-4, f"the parts miss the logit by {prompt_error}"
    by_head = parts["heads"].flatten(0, 1)  # (head, source)

    contributions = [["direct path", labels[-1], parts["direct"].item()]]
    for name, row in zip(head_names, by_head.tolist()):
        contributions += [[name, label, logit] for label, logit in zip(labels, row)]
    contributions.sort(key=lambda contribution: -abs(contribution[2]))
    rest = sum(logit for _, _, logit in contributions[8:])
    table = [*contributions[:8], ["the rest", "", rest], ["sum = logit", "", parts["logit"].item()]]
    print(f"{purple}=== Why '{said}' (probability {probs[answer]:.2f}) after {cfg.prompt!r}? ==={endc}")
    print(tabulate(table, headers=["part", "source", "logit"], floatfmt=".3f"))

#%% ... as a map of heads and sources
if __name__ == "__main__":
    frozen = ", final norm scale frozen" if model.cfg.norm == "rms" else ""
    fig = imshow(
        by_head,
        f"Logit of '{plain(said)}' = {parts['logit']:.2f}: "
        f"direct path {parts['direct']:.2f} + heads x sources{frozen} ({about})",
        xlabel="source token",
        ylabel="head",
        x=labels,
        y=head_names,
        value="logit",
    )
    show(
        fig,
        "attn_only/attribution",
        "Where the logit comes from: a row for each head, a column for the token it read; together with the "
        "direct path they are the logit.",
    )

#%% Attention on the prompt, raw and weighted by how far it moves the residual stream (norm-based analysis)
if __name__ == "__main__":
    norms = [norm_based(model, prompt, layer) for layer in range(n_layers)]
    patterns = t.cat([of_layer["attention"] for of_layer in norms])  # (head of any layer, query, key)
    numbers["mixing_ratio"] = [of_layer["mixing"][1:].mean().item() for of_layer in norms]
    mixed = ", ".join(f"layer {layer} {share:.2f}" for layer, share in enumerate(numbers["mixing_ratio"]))
    print(f"{cyan}share of a layer's output that comes from other positions: {mixed}{endc}")

#%% Attention to hover: patterns of every head, a page to read the prompt by, and the norms of the best head's layer
if __name__ == "__main__":
    show_attention(
        patterns,
        prompt_tokens,
        head_names,
        about,
        "attn_only/attention",
        start=head_names.index(best),
        ask=partial(attention_in, model, tokenizer),
    )

    best_norms = norms[best_layer]
    panels = {
        f"{best} attention": best_norms["attention"][best_head],
        f"{best} ||alpha f(x)||": best_norms["weighted"][best_head],
        "layer ||sum alpha f(x) + x||": best_norms["block"],
        "the same after the next norm": best_norms["normed"],
    }
    fig = imshow(
        t.stack(list(panels.values())),
        f"Norm-based analysis of layer {best_layer}: raw attention of {best}, then what is really moved "
        "(Kobayashi et al.); each panel on its own scale",
        xlabel="key",
        ylabel="query",
        x=labels,
        y=labels,
        panels=list(panels),
        columns=2,
        diverging=False,
        value="weight or norm",
        one_scale=False,
    )
    show(
        fig,
        "attn_only/norm_based",
        "The first map is attention alone; the others show how far it moves the stream. A head may look hard at "
        "what it hardly uses.",
    )

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    for depth, history in histories.items():
        numbers[f"seconds{key_ends[depth]}"] = history["seconds"]
        numbers[f"tokens_per_second{key_ends[depth]}"] = history["tokens_per_second"]
    numbers["train_seconds"] = sum(history["seconds"] for history in histories.values())
    save_results("attn_only", cfg, **numbers)

    if not induction_heads:
        conclusion = f"no induction head (best prefix matching {prefix.max():.2f}, bar {bars['induction']:.2f})"
    else:
        are = "are induction heads" if len(induction_heads) > 1 else "is an induction head"
        strongest = prefix.flatten()[head_names.index(induction_heads[0])]
        conclusion = f"{', '.join(induction_heads)} {are} (prefix matching up to {strongest:.2f})"
    if n_layers == 2 and induction_heads and not previous_heads:
        conclusion += ", though no head attends to the previous token above its bar"
    if n_layers == 2 and induction_heads and f"L0H{previous}" in previous_heads:
        conclusion += f", and the previous-token head of layer 0 is L0H{previous}; strongest path: {strongest_path}"
        conclusion += f"; without L0H{previous} prefix matching is {best_without[previous]:.2f}"
        if others:
            conclusion += f", without another layer-0 head at least {min(others):.2f}"
    if control is not None:
        conclusion += f"; one layer reaches {control_prefix:.2f}"
    print(f"{green}{conclusion}. Gate: attribution exact to {attribution_max_error:.0e}.{endc}")
    if cfg.repeats == 0 and not cfg.model:
        print(
            f"{yellow}trained on natural text alone, without planted repeats: "
            f"induction comes later and weaker, if at all{endc}"
        )
