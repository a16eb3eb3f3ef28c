"""
Mamba, a model without attention: a state of fixed size is carried along the text. What replaces attention, and can it
look something up in its context?
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# The model, the first half of this file, uses utils, hooks, hooked and weights alone; the experiment uses the rest.
from utils import (  # first: sets OpenMP's variables before torch is loaded
    Count,
    Natural,
    NotNegative,
    Share,
    cyan,
    endc,
    fail,
    find_folder,
    gray,
    green,
    load_model,
    pick_device,
    purple,
    read_config,
    save_results,
    set_seed,
    with_defaults,
)
from hooks import HookPoint, act_name, hooks, listening_gap, run_with_cache
from hooked import Hooked
from weights import read_tensors, take_tensors, tensor_table

from heads import (
    BY_CONTENT,
    attention_on,
    head_scores,
    known_tokens,
    other_rows_null,
    random_keys_null,
    random_repeats,
    repeated_tokens,
    role_bar,
    role_targets,
    which_bar,
    without_repeats,
)
from attn_only import loss_by_position, open_own
from data import bos_id, load_corpus, load_tokenizer, write_folder
from launch import flags
from plots import LONGEST_DRAWN, bar, imshow, line, show
from train import TrainConfig, first_goes_on, repeat_batches, train

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from tabulate import tabulate
from tokenizers import Tokenizer
from torch import Tensor


#%% The shape of a model
@dataclass
class MambaConfig:
    n_layers: int = 2
    d_model: int = 128
    d_inner: int = 256  # channels of the scan
    d_state: int = 16  # numbers that each channel carries along
    d_conv: int = 4  # places that the convolution sees, its own among them
    dt_rank: int = 8  # delta of all channels is read through so few directions
    d_vocab: int = 512
    n_ctx: int = 2**31  # nothing limits a row: a number that none reaches
    norm_eps: float = 1e-5
    bias: bool = False  # on in_proj and out_proj
    conv_bias: bool = True
    resid_fp32: bool = True  # the residual stream stays in float32, whatever the weights are
    tied: bool = False  # the unembedding is the embedding

    def __post_init__(self):
        if self.d_inner % self.d_model:
            fail(
                f"d_inner {self.d_inner} is not a multiple of d_model {self.d_model}: transformers knows no other width"
            )


#%% RMSNorm: divide by the root mean square, multiply by a weight
class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(t.ones(size))
        self.eps = eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().pow(2).mean(-1, keepdim=True)
        scale = self.hook_scale((mean_square + self.eps).sqrt())
        normalized = self.hook_normalized((x / scale).to(self.weight.dtype))
        return self.weight * normalized


#%% The selective scan: what a position remembers is what the one before it remembered, faded, and what it writes
def selective_scan(A_bar: Tensor, write: Tensor) -> Tensor:
    """
    The states h (batch, pos, d_inner, d_state) of h[pos] = A_bar[pos] h[pos - 1] + write[pos], from h = 0 on.
    A_bar, write: the same shape. Nothing mixes channels: each carries its d_state numbers by itself.
    """
    state = t.zeros_like(write[:, 0])
    states = []
    for faded, written in zip(A_bar.unbind(1), write.unbind(1)):
        state = faded * state + written
        states.append(state)
    return t.stack(states, 1)


class FusedScan(t.autograd.Function):
    """
    C h of selective_scan, without ever holding A_bar and what is written: each position makes its own, in the cache of
    the processor, and again in the backward pass. Several times faster in training; no hook can see inside.
    delta, x (batch, pos, d_inner), A (d_inner, d_state), B, C (batch, pos, d_state) -> (batch, pos, d_inner).
    """

    @staticmethod
    def forward(ctx, delta: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        # positions first, then d_state, batch, d_inner: the longest dimension last
        delta = delta.transpose(0, 1).contiguous()  # (pos, batch, d_inner)
        x = x.transpose(0, 1).contiguous()
        A = A.T[:, None].contiguous()  # (d_state, 1, d_inner)
        B = B.permute(1, 2, 0)[..., None].contiguous()  # (pos, d_state, batch, 1)
        C = C.permute(1, 2, 0)[..., None].contiguous()
        states = x.new_zeros(len(x) + 1, len(A), *x.shape[1:])  # the first is the empty one before the text
        scan = t.empty_like(x)
        for pos in range(len(x)):
            faded = (delta[pos] * A).exp_().mul_(states[pos])
            t.addcmul(faded, delta[pos] * x[pos], B[pos], out=states[pos + 1])
            t.sum(states[pos + 1] * C[pos], 0, out=scan[pos])
        ctx.save_for_backward(delta, x, A, B, C, states)
        return scan.transpose(0, 1)

    @staticmethod
    def backward(ctx, grad_scan: Tensor) -> tuple[Tensor, ...]:
        delta, x, A, B, C, states = ctx.saved_tensors
        grad_scan = grad_scan.transpose(0, 1).contiguous()
        grad_delta, grad_x = t.empty_like(delta), t.empty_like(x)
        grad_A, grad_B, grad_C = t.zeros_like(A), t.empty_like(B), t.empty_like(C)
        grad_state = t.zeros_like(states[0])
        for pos in reversed(range(len(x))):
            grad_state.addcmul_(grad_scan[pos].expand_as(grad_state), C[pos])
            grad_C[pos] = (states[pos + 1] * grad_scan[pos]).sum(-1, keepdim=True)
            grad_B[pos] = (grad_state * (delta[pos] * x[pos])).sum(-1, keepdim=True)
            grad_write = (grad_state * B[pos]).sum(0)  # of delta x
            grad_x[pos] = grad_write * delta[pos]
            grad_state.mul_((delta[pos] * A).exp_())  # now of the state before
            grad_exponent = grad_state * states[pos]  # of delta A
            grad_delta[pos] = grad_write * x[pos] + (grad_exponent * A).sum(0)
            grad_A += (grad_exponent * delta[pos]).sum(1, keepdim=True)
        by_batch = (grad.squeeze(-1).permute(2, 0, 1) for grad in (grad_B, grad_C))
        return grad_delta.transpose(0, 1), grad_x.transpose(0, 1), grad_A[:, 0].T, *by_batch


#%% The mixer, in attention's place: a short convolution, the scan, a gate
MIXER_HOOKS = ("in", "taps", "conv", "x", "delta", "B", "C", "A_bar", "write", "state", "scan", "gate")


class MambaMixer(nn.Module):
    """
    Gu & Dao 2023, section 3. Of each position, in the order of computation, the hooks see
    hook_in (batch pos d_inner): what the convolution reads;
    hook_taps (batch pos d_inner tap): what each place brings to it, the last tap the position itself, tap -2 the place
    before; hook_conv (batch pos d_inner): their sum and the bias;
    hook_x (batch pos d_inner): silu of it, what the scan reads;
    hook_delta (batch pos d_inner): the step, how much the channel takes in and forgets here;
    hook_B, hook_C (batch pos d_state): where in the state it is written, and where read;
    hook_A_bar = exp(delta A), hook_write = delta B x (batch pos d_inner d_state): what the scan is made of. An edit
    here is carried on: every later state changes;
    hook_state (batch pos d_inner d_state): the states, as the output reads them. An edit changes what is read at its
    own position, and nothing that later positions remember;
    hook_scan (batch pos d_inner) = C h; hook_gate (batch pos d_inner).
    """

    def __init__(self, cfg: MambaConfig):
        super().__init__()
        self.cfg = cfg
        self.in_proj = nn.Linear(cfg.d_model, 2 * cfg.d_inner, bias=cfg.bias)
        self.conv1d = nn.Conv1d(cfg.d_inner, cfg.d_inner, cfg.d_conv, groups=cfg.d_inner, bias=cfg.conv_bias)
        self.x_proj = nn.Linear(cfg.d_inner, cfg.dt_rank + 2 * cfg.d_state, bias=False)
        self.dt_proj = nn.Linear(cfg.dt_rank, cfg.d_inner)
        self.A_log = nn.Parameter(t.empty(cfg.d_inner, cfg.d_state))
        self.D = nn.Parameter(t.empty(cfg.d_inner))
        self.out_proj = nn.Linear(cfg.d_inner, cfg.d_model, bias=cfg.bias)
        for name in MIXER_HOOKS:
            setattr(self, f"hook_{name}", HookPoint())

    @property
    def A(self) -> Tensor:
        """(d_inner, d_state), negative: how fast each number of the state fades."""
        return -self.A_log.float().exp()

    def convolve(self, x: Tensor) -> Tensor:
        """Each channel of x (batch, pos, d_inner) by itself, from the d_conv - 1 places before it and its own."""
        padded = F.pad(x, (0, 0, self.cfg.d_conv - 1, 0))
        places = padded.unfold(1, self.cfg.d_conv, 1)  # (batch, pos, d_inner, tap)
        taps = self.hook_taps(places * self.conv1d.weight[:, 0])
        convolved = taps.sum(-1)
        return convolved if self.conv1d.bias is None else convolved + self.conv1d.bias

    def forward(self, x: Tensor) -> Tensor:
        cfg = self.cfg
        x, gate = self.in_proj(x).chunk(2, -1)  # (batch, pos, d_inner) each
        x = self.hook_x(F.silu(self.hook_conv(self.convolve(self.hook_in(x)))))
        step, B, C = self.x_proj(x).split([cfg.dt_rank, cfg.d_state, cfg.d_state], -1)
        delta = self.hook_delta(F.softplus(self.dt_proj(step).float()))  # (batch, pos, d_inner)
        B = self.hook_B(B.float())  # (batch, pos, d_state)
        C = self.hook_C(C.float())

        if self.is_listened_to():
            scan = self.scan_in_the_open(delta, x, B, C)
        else:
            scan = FusedScan.apply(delta, x.float(), self.A, B, C)
        scan = self.hook_scan(scan) + self.D * x
        return self.out_proj((scan * self.hook_gate(F.silu(gate))).to(self.out_proj.weight.dtype))

    def is_listened_to(self) -> bool:
        return any(point.fwd_hooks for point in (self.hook_A_bar, self.hook_write, self.hook_state))

    def scan_in_the_open(self, delta: Tensor, x: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """The scan (batch, pos, d_inner) step by step, past the hooks; FusedScan gives the same."""
        A_bar = einsum(delta, self.A, "batch pos d_inner, d_inner d_state -> batch pos d_inner d_state").exp()
        write = einsum(delta * x, B, "batch pos d_inner, batch pos d_state -> batch pos d_inner d_state")
        state = self.hook_state(selective_scan(self.hook_A_bar(A_bar), self.hook_write(write)))
        return einsum(state, C, "batch pos d_inner d_state, batch pos d_state -> batch pos d_inner")


#%% The block, and the model
class MambaBlock(nn.Module):
    def __init__(self, cfg: MambaConfig):
        super().__init__()
        self.cfg = cfg
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mixer = MambaMixer(cfg)
        self.hook_resid_pre = HookPoint()
        self.hook_mixer_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, pos, d_model)."""
        x = self.hook_resid_pre(x.float() if self.cfg.resid_fp32 else x)
        mixed = self.mixer(self.norm(x.to(self.norm.weight.dtype)))
        return self.hook_resid_post(x + self.hook_mixer_out(mixed))


class Mamba(nn.Module, Hooked):
    architectures = ("MambaForCausalLM",)

    def __init__(self, cfg: MambaConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(MambaBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        self.init_weights()
        if cfg.tied:
            self.unembed.weight = self.embed.weight

    @t.no_grad()
    def init_weights(self) -> None:
        """
        For short rows: A = -n / 16 and steps delta from 0.1 to 1. With the paper's start (A = -n, delta from 0.001 to
        0.1) the scan is 0.03 of the skip D x in size (root mean square, 32 random tokens), with this one 0.44.
        """
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.unembed.weight, std=0.5 / math.sqrt(self.cfg.d_model))
        for block in self.blocks:
            mixer = block.mixer
            for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
                nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
            for biased in (mixer.in_proj, mixer.out_proj, mixer.conv1d):
                if biased.bias is not None:
                    nn.init.zeros_(biased.bias)
            mixer.A_log.copy_((t.arange(1, self.cfg.d_state + 1) / 16).log().expand_as(mixer.A_log))
            mixer.D.fill_(1)
            delta = t.empty_like(mixer.dt_proj.bias).uniform_(math.log(0.1), math.log(1.0)).exp()
            mixer.dt_proj.bias.copy_(delta.expm1().log())  # softplus of it is delta

    @property
    def W_E(self) -> Tensor:
        return self.embed.weight

    @property
    def W_U(self) -> Tensor:
        return self.unembed.weight.T

    def forward(
        self,
        tokens: Tensor,
        start_at_layer: int = 0,
        resid: Tensor | None = None,
        stop_at_layer: int | None = None,
    ) -> Tensor:
        """
        Logits (batch, pos, d_vocab). Given resid (batch, pos, d_model), the residual stream enters at start_at_layer
        and the blocks below are skipped; with stop_at_layer the residual stream before that layer is returned.
        """
        x = self.hook_embed(self.embed(tokens)) if resid is None else resid
        for block in self.blocks[start_at_layer:stop_at_layer]:
            x = block(x)
        if stop_at_layer is not None:
            return x
        return self.unembed(self.ln_final(x))

    @classmethod
    def from_hf(cls, hf_model: nn.Module, tokenizer: Tokenizer | None = None) -> "Mamba":
        """The same model out of a transformers model in memory; every tensor must find its place."""
        config = hf_model.config.to_dict() | {"architectures": [type(hf_model).__name__]}
        model = cls(cls.read_config(config), tokenizer)
        return take_tensors(model, ((name, x.clone()) for name, x in hf_model.state_dict().items())).eval()

    @classmethod
    def from_folder(cls, folder: str, device: str = "cpu", dtype: t.dtype = t.float32) -> "Mamba":
        """A Hugging Face folder: config.json, safetensors (sharded or not), tokenizer.json."""
        with t.device("meta"):
            model = cls(cls.read_config(read_config(folder)), load_tokenizer(folder))
        take_tensors(model, ((name, x.to(device, dtype)) for name, x in read_tensors(folder)))
        return model.eval()

    def to_hf(self, folder: Path, dtype: t.dtype | None = None) -> None:
        """Write an ordinary Hugging Face folder."""
        tensors = {hf_name(name): x.to(dtype or x.dtype) for name, x in self.state_dict().items()}
        if self.cfg.tied:
            del tensors["lm_head.weight"]
        write_folder(folder, tensors, write_mamba_config(self.cfg), self.tokenizer)

    @classmethod
    def read_config(cls, hf: dict) -> MambaConfig:
        return read_mamba_config(hf, cls.architectures)

    def place(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """Where a tensor of Hugging Face's files goes: {our name: tensor}."""
        return {our_name(name): x}


#%% Hugging Face's words: the names of the tensors (each part of a name has one of ours), and config.json
PARTS = {"embeddings": "embed", "layers": "blocks", "norm_f": "ln_final", "lm_head": "unembed"}
THEIRS = {ours: theirs for theirs, ours in PARTS.items()}


def our_name(theirs: str) -> str:
    """backbone.layers.0.mixer.in_proj.weight -> blocks.0.mixer.in_proj.weight"""
    parts = theirs.removeprefix("backbone.").split(".")
    return ".".join(PARTS.get(part, part) for part in parts)


def hf_name(ours: str) -> str:
    """blocks.0.mixer.in_proj.weight -> backbone.layers.0.mixer.in_proj.weight"""
    theirs = ".".join(THEIRS.get(part, part) for part in ours.split("."))
    return theirs if ours.startswith("unembed") else f"backbone.{theirs}"


FIELDS = {  # theirs: ours
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "intermediate_size": "d_inner",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "time_step_rank": "dt_rank",
    "vocab_size": "d_vocab",
    "layer_norm_epsilon": "norm_eps",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "residual_in_fp32": "resid_fp32",
    "tie_word_embeddings": "tied",
}


def read_mamba_config(hf: dict, architectures: tuple[str, ...]) -> MambaConfig:
    name = (hf.get("architectures") or ["unknown"])[0]
    if name not in architectures:
        fail(f"architecture {name} is not built here (built: {', '.join(architectures)}); llama_block.py has others")
    hf = with_defaults(hf, FIELDS)
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        fail(f"activation {activation!r} of {name} is not built here (built: silu)")
    sizes = {ours: hf[theirs] for theirs, ours in FIELDS.items()}
    if sizes["dt_rank"] == "auto":
        sizes["dt_rank"] = math.ceil(sizes["d_model"] / 16)
    return MambaConfig(**sizes)


def write_mamba_config(cfg: MambaConfig) -> dict:
    """config.json for transformers, which knows the width of the scan as a multiple of d_model."""
    sizes = {theirs: getattr(cfg, ours) for theirs, ours in FIELDS.items()}
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_act": "silu",
        "expand": cfg.d_inner // cfg.d_model,
        **sizes,
    }


#%% The hidden attention (Ali, Zimerman & Wolf 2024): the scan is linear in what it reads, once delta, B and C are known
def hidden_attention(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """
    alpha (batch, channel, query, key) = C[query] (product of A_bar over key + 1 .. query) delta[key] B[key], so that
    scan[query] = sum over keys of alpha[query, key] x[key]. It has either sign, its rows do not sum to 1, and what the
    convolution mixes into x is not in it.
    delta (batch, pos, channel); A (channel, d_state); B, C (batch, pos, d_state).
    """
    until = delta.cumsum(1)
    between = (until[:, :, None] - until[:, None]).clamp(min=0)  # (batch, query, key, channel): sum of delta after key
    alpha = t.zeros_like(between)
    for n in range(A.shape[1]):
        faded = (between * A[:, n]).exp()  # the product of A_bar
        read_of_written = einsum(C[:, :, n], B[:, :, n], "batch query, batch key -> batch query key")
        alpha += faded * read_of_written[..., None]
    alpha = alpha * delta[:, None]
    past = t.ones(alpha.shape[1:3], device=alpha.device).tril()
    return einsum(alpha, past, "batch query key channel, query key -> batch channel query key")


def as_pattern(alpha: Tensor) -> Tensor:
    """|alpha|, each query's divided by their sum: what the scores of attention heads can read."""
    size = alpha.abs()
    return size / size.sum(-1, keepdim=True).clamp(min=1e-20)


@t.no_grad()
def channel_patterns(model: Mamba, tokens: Tensor, layer: int, together: int = 16) -> Iterator[Tensor]:
    """as_pattern of a layer's channels (row, channel, query, key), so many channels at a time."""
    names = [f"blocks.{layer}.mixer.hook_{name}" for name in ("delta", "B", "C")]
    _, cache = run_with_cache(model, tokens, names)
    delta, B, C = (cache[name] for name in names)
    for some, A in zip(delta.split(together, -1), model.blocks[layer].mixer.A.split(together)):
        yield as_pattern(hidden_attention(some, A, B, C))


#%% Do channels look where attention heads look? The heads' own scores, nulls and bars (heads.py), channel by channel
ROLES = ("previous token", "duplicate token", "induction")
SHUFFLES = 200


def channel_scores(model: Mamba, tokens: Tensor, looks: dict[str, Tensor]) -> dict[str, Tensor]:
    """{look: (layer, channel)}: hidden attention paid to each look's targets (row, query, key)."""
    by_layer: dict[str, list[Tensor]] = {look: [] for look in looks}
    for layer in range(model.cfg.n_layers):
        found: dict[str, list[Tensor]] = {look: [] for look in looks}
        for pattern in channel_patterns(model, tokens, layer):
            for look, targets in looks.items():
                found[look].append(attention_on(pattern, targets).cpu())
        for look, scores in found.items():
            by_layer[look].append(t.cat(scores))
    return {look: t.stack(scores) for look, scores in by_layer.items()}


def unrepeated_scores(model: Mamba, tokens: Tensor, looks: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """channel_scores at the same places of rows in which nothing is repeated: what position alone gives."""
    other = without_repeats(tokens, t.Generator().manual_seed(seed))
    return channel_scores(model, other, looks)


def channel_nulls(model: Mamba, tokens: Tensor, seed: int) -> dict[str, Tensor]:
    """{role: (shuffle, layer, channel)}: the scores when rows look where other rows would, or at any earlier key."""
    generator = t.Generator().manual_seed(seed)
    n_rows, length = tokens.shape
    orders = t.rand((SHUFFLES, n_rows), generator=generator).argsort(1).to(tokens.device)
    draws = t.rand((SHUFFLES, n_rows, length), generator=generator).to(tokens.device)
    targets = role_targets(tokens)
    by_layer: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    for layer in range(model.cfg.n_layers):
        found: dict[str, list[Tensor]] = {role: [] for role in ROLES}
        for pattern in channel_patterns(model, tokens, layer):
            for role in ROLES:
                if role in BY_CONTENT:
                    null = other_rows_null(pattern, targets[role], orders)
                else:
                    null = random_keys_null(pattern, targets[role], draws)
                found[role].append(null.cpu())
        for role, nulls in found.items():
            by_layer[role].append(t.cat(nulls, -1))
    return {role: t.stack(nulls, 1) for role, nulls in by_layer.items()}


def after_earlier_copy(tokens: Tensor, places: int) -> Tensor:
    """(row, query, key): the key so many places after an earlier copy of the query's token; 1 is induction's."""
    copies = role_targets(tokens)["duplicate token"]
    shifted = F.pad(copies, (places, -places))
    return shifted & t.ones_like(shifted[0]).tril()


#%% Interventions: what the convolution sees, what the state carries, what a channel writes
def only_own_place(taps: Tensor, hook: HookPoint) -> Tensor:
    """For hook_taps: the convolution sees no place but its own."""
    return t.cat([t.zeros_like(taps[..., :-1]), taps[..., -1:]], -1)


def without_tap(taps: Tensor, hook: HookPoint, back: int) -> Tensor:
    """For hook_taps: the convolution does not see the place `back` places before."""
    return taps.index_fill(-1, t.tensor([taps.shape[-1] - 1 - back], device=taps.device), 0)


def nothing_carried(A_bar: Tensor, hook: HookPoint) -> Tensor:
    """For hook_A_bar: every state holds what its own position writes, and no more."""
    return t.zeros_like(A_bar)


def forget_before(A_bar: Tensor, hook: HookPoint, pos: int) -> Tensor:
    """For hook_A_bar: at one position all that was remembered is lost."""
    return A_bar.index_fill(1, t.tensor([pos], device=A_bar.device), 0)


def silence(scan: Tensor, hook: HookPoint, channels: Tensor) -> Tensor:
    """For hook_scan: these channels read nothing out of their state."""
    return scan.index_fill(-1, channels.to(scan.device), 0)


def mixer_hook(name: str, layer: int | None = None) -> str:
    """blocks.0.mixer.hook_taps; of all layers without one."""
    return f"blocks.{'*' if layer is None else layer}.mixer.hook_{name}"


def loss_of_copies(model: Mamba, repeats: Tensor, half: int, fwd_hooks: list[tuple] = ()) -> tuple[float, float]:
    """
    (first, second): mean loss in nats of random tokens (row, pos) when they are first said and when they are said
    again, the first token of the second copy apart, which nothing foretells.
    """
    with hooks(model, list(fwd_hooks)):
        losses = loss_by_position(model, repeats)
    second = losses.shape[1] - half  # the loss at which the second copy begins
    return losses[:, :second].mean().item(), losses[:, second + 1 :].mean().item()


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config(TrainConfig):
    n_layers: Count = 1  # blocks
    d_model: Count = 64  # width of the residual stream
    expand: Count = 2  # the scan has expand * d_model channels
    d_state: Count = 32  # numbers that each channel carries along
    d_conv: Count = 4  # places that the convolution sees
    steps: Natural = 400
    lr: NotNegative = 1e-2
    decay: Share = 0.4  # share of the steps (wsd)
    contexts: tuple[Count, ...] = (16, 32)  # short rows first: few things to look up among
    # share of training rows that repeat a snippet of themselves: two thirds natural, one third in shuffled order
    repeats: Share = 0.9
    english: Share = 0.3  # share of rows from docstrings and help topics (stdlib text); the rest is code
    data: str = "stdlib"  # stdlib, a text file or folder, or a hub dataset
    vocab: Count = 512  # size of the byte-level BPE trained on the text
    rows: Count = 32  # rows of random tokens, said twice, that all is measured on
    out: str = "checkpoints/mamba/model"  # where the model goes
    model: str | None = None  # look into this model instead of training: a hub name or a folder
    beside: str = (
        "models/attn_only_2l"  # an attention-only model of attn_only.py, whose best induction head is drawn too
    )


# --hpc: an A100 with 40 GB
HPC = Config(
    n_layers=4,
    d_model=512,
    vocab=8192,
    contexts=(256,),
    tokens_per_step=32768,
    accumulate=4,
    steps=8000,
    lr=3e-3,
    autocast="on",
)

if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=HPC)
    device = pick_device(cfg.device)
    for name, least in {"expand": 1, "d_state": 1, "d_conv": 2}.items():
        if getattr(cfg, name) < least:
            fail(f"--{name.replace('_', '-')} is {getattr(cfg, name)}: it must be at least {least}")
    set_seed(cfg.seed)
    numbers: dict = {}
    history: dict = {}

#%% Someone's model: where each of its tensors stands here
if __name__ == "__main__" and cfg.model:
    Mamba.read_config(read_config(cfg.model))  # refuse before anything is fetched
    table = []
    for name, sizes, dtype, norm in tensor_table(cfg.model):
        table.append([name, "x".join(map(str, sizes)), dtype, norm, our_name(name)])
    print(tabulate(table, headers=["tensor", "shape", "dtype", "norm", "here"], floatfmt=".2f"))
    model = load_model(cfg.model, (Mamba,), cfg.device)
    corpus = load_corpus(cfg.data, tokenizer=str(model.folder))

#%% Without --model, one is trained before your eyes, saved for transformers and opened again
if __name__ == "__main__" and not cfg.model:
    print(f"{purple}=== Training {cfg.n_layers} layers on {cfg.data}, seed {cfg.seed}, {device} ==={endc}")
    corpus = load_corpus(cfg.data, cfg.vocab)
    shape = MambaConfig(
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        d_inner=cfg.expand * cfg.d_model,
        d_state=cfg.d_state,
        d_conv=cfg.d_conv,
        dt_rank=math.ceil(cfg.d_model / 16),
        d_vocab=corpus.d_vocab,
    )
    model = Mamba(shape, corpus.tokenizer).to(device)
    half = (max(cfg.contexts) - 1) // 2
    probe = repeated_tokens(32, half, known_tokens(corpus), corpus.bos, 10**6 + cfg.seed).to(device)

    def watch(step: int) -> dict:
        first, second = loss_of_copies(model, probe, half)
        return {"loss_first_copy": first, "loss_second_copy": second}

    history = train(
        model,
        repeat_batches(corpus, cfg),
        cfg,
        "mamba",
        watch=watch,
        watch_every=max(1, cfg.steps // 15),
        shape=dataclasses.asdict(shape),
        data=corpus.key,
        repeats=cfg.repeats,
        english=cfg.english,
    )
    model.to_hf(Path(cfg.out))
    first_goes_on()
    numbers["train_loss"] = float(np.mean(history["loss"][-20:]))
    numbers["train_seconds"] = history["seconds"]
    numbers["tokens_per_second"] = history["tokens_per_second"]
    print(
        f"{green}loss {numbers['train_loss']:.3f} nats after {history['tokens'][-1] / 1e6:.2f}M tokens in "
        f"{history['seconds']:.1f} s ({history['tokens_per_second']:,.0f} tokens/s); saved to {cfg.out} for "
        f"transformers{endc}"
    )
    model = Mamba.from_folder(cfg.out, device)  # what follows is measured on the file

#%% When does it learn to repeat?
if __name__ == "__main__" and history:
    fig = line(
        {
            "first copy": [seen["loss_first_copy"] for seen in history["watch"]],
            "second copy": [seen["loss_second_copy"] for seen in history["watch"]],
        },
        f"Loss on 32 rows of {half} random tokens said twice, over training (seed {cfg.seed})",
        xlabel="tokens seen",
        ylabel="loss (nats)",
        x=[seen["tokens"] for seen in history["watch"]],
        markers=True,
    )
    show(
        fig,
        "mamba/training",
        "When the curves part, the model has learned to use what was said before.",
    )

#%% Gates: listening changes nothing; the hidden attention, times what the scan reads, is what the scan says
if __name__ == "__main__":
    shape = model.cfg
    n_layers = shape.n_layers
    half = (max(cfg.contexts) - 1) // 2
    # said twice, the second time right after the first; and each row at its own distance, as channels are judged
    repeats = repeated_tokens(cfg.rows, half, known_tokens(corpus), corpus.bos, cfg.seed).to(device)
    spaced = random_repeats(corpus, cfg.rows, half, seed=cfg.seed).to(device)
    n_params = sum(p.numel() for p in model.parameters())
    about = f"{n_layers}-layer Mamba, {n_params / 1e3:.0f}k parameters"

    gap = listening_gap(model, repeats[:8])  # the scan past all hooks against FusedScan
    limit = 1e-5 if model.W_E.dtype == t.float32 else 2e-2
    assert gap < limit, f"listening changes the logits by {gap}"
    misses = []
    for layer in range(n_layers):
        names = [mixer_hook(name, layer) for name in ("delta", "B", "C", "x", "scan")]
        _, cache = run_with_cache(model, repeats[:2], names)
        delta, B, C, x, scan = (cache[name].float() for name in names)
        alpha = hidden_attention(delta, model.blocks[layer].mixer.A, B, C)
        by_attention = einsum(alpha, x, "row channel query key, row key channel -> row query channel")
        misses.append(((by_attention - scan).abs().max() / scan.abs().max()).item())
    assert max(misses) < 1e-4, f"hidden attention misses the scan by {max(misses)}"
    numbers |= {"n_params": n_params, "listening_gap": gap, "hidden_attention_max_error": max(misses)}
    print(
        f"{cyan}gates: listening moves logits by {gap:.0e}, hidden attention times input misses the scan by "
        f"{max(misses):.0e} (both relative){endc}"
    )

#%% Can it look something up? Random tokens said twice: nothing but the context foretells the second copy
if __name__ == "__main__":
    print(f"{purple}=== What is said again ==={endc}")
    by_position = loss_by_position(model, repeats)
    other = repeated_tokens(cfg.rows, half, known_tokens(corpus), corpus.bos, cfg.seed + 10**6).to(device)
    unrelated = t.cat([other[:, :-half], repeats[:, -half:]], 1)  # the same second half, which repeats nothing here
    by_position_unrelated = loss_by_position(model, unrelated)
    first, second = loss_of_copies(model, repeats, half)
    _, second_unrelated = loss_of_copies(model, unrelated, half)
    gained = second_unrelated - second
    numbers |= {"loss_first_copy": first, "loss_second_copy": second, "loss_second_half_unrelated": second_unrelated}
    print(
        f"{cyan}loss on random tokens: first time {first:.2f}, second time {second:.2f} nats; the same second half "
        f"after other tokens {second_unrelated:.2f}{endc}"
    )
    heldout = t.from_numpy(corpus.rows(np.random.default_rng(10**6), 256, max(cfg.contexts), "heldout")).to(device)
    numbers["heldout_loss"] = loss_by_position(model, heldout).mean().item()
    print(f"{cyan}held-out text {numbers['heldout_loss']:.3f} nats{endc}")

#%% ... by position
if __name__ == "__main__":
    fig = line(
        {"said twice": by_position.mean(0), "the first half is other tokens": by_position_unrelated.mean(0)},
        f"Loss on {len(repeats)} rows of {half} random tokens said twice ({about})",
        xlabel="position",
        ylabel="loss (nats)",
        x=list(range(1, repeats.shape[1])),
        dashed=["the first half is other tokens"],
    )
    show(
        fig,
        "mamba/loss_repeated",
        "Right of the middle the tokens come again: a model that carries them along pays less there.",
    )

#%% What does it need for that? The convolution, and the state, are taken away one at a time
if __name__ == "__main__":
    print(f"{purple}=== Knock-outs ==={endc}")
    border = repeats.shape[1] - half  # the position of the second copy's first token
    forget = partial(forget_before, pos=border)
    knock_outs: dict[str, list[tuple]] = {
        "nothing": [],
        "convolution: own place alone": [(mixer_hook("taps"), only_own_place)],
        "state: nothing carried": [(mixer_hook("A_bar"), nothing_carried)],
        "state: forgotten between the copies": [(mixer_hook("A_bar"), forget)],
    }
    for layer in range(n_layers):
        for back in range(1, shape.d_conv):
            knock_out = partial(without_tap, back=back)
            knock_outs[f"L{layer} convolution: {back} back unseen"] = [(mixer_hook("taps", layer), knock_out)]
        if n_layers > 1:
            knock_outs[f"L{layer} convolution: own place alone"] = [(mixer_hook("taps", layer), only_own_place)]
            knock_outs[f"L{layer} state: nothing carried"] = [(mixer_hook("A_bar", layer), nothing_carried)]
            knock_outs[f"L{layer} state: forgotten between the copies"] = [(mixer_hook("A_bar", layer), forget)]

    knocked = {}  # by what is taken away: loss on the first copy, on the second, on the same after other tokens
    for name, fwd_hooks in knock_outs.items():
        _, fresh = loss_of_copies(model, unrelated, half, fwd_hooks)
        knocked[name] = [*loss_of_copies(model, repeats, half, fwd_hooks), fresh]
    gains = {name: fresh - again for name, (_, again, fresh) in knocked.items()}  # what having said it before is worth
    numbers["knock_outs"] = {
        name: {"first": losses[0], "second": losses[1], "unrelated": losses[2], "gain": gains[name]}
        for name, losses in knocked.items()
    }
    table = [[name, *losses, gains[name]] for name, losses in knocked.items()]
    headers = ["taken away", "first copy", "second copy", "the same after other tokens", "gain"]
    print(tabulate(table, headers=headers, floatfmt=".2f"))
    print(
        f"{gray}loss in nats; gain: how much cheaper the second half is when it was said before than after other tokens, "
        f"under the same knock-out{endc}"
    )

#%% ... as bars
if __name__ == "__main__":
    fig = bar(
        {"gain": list(gains.values())},
        f"What having been said before is worth, with parts of {about} taken away (n = {len(repeats)} rows of {half} "
        "tokens said twice)",
        xlabel="taken away",
        ylabel="gain (nats)",
        x=list(gains),
    )
    show(
        fig,
        "mamba/knock_outs",
        "How much cheaper the second copy is because the first was said; near 0: looking up needs the part that "
        "was taken away.",
    )

#%% Where do channels look? Hidden attention, scored as an attention head's, channel by channel
if __name__ == "__main__":
    print(f"{purple}=== Hidden attention ==={endc}")
    with t.no_grad():
        targets = {role: role_targets(spaced)[role] for role in ROLES}
        scores = channel_scores(model, spaced, targets)  # (layer, channel) each
        by_position_alone = unrepeated_scores(model, spaced, targets, cfg.seed)
        nulls = channel_nulls(model, spaced, cfg.seed)
    bars = {role: role_bar(role, null) for role, null in nulls.items()}
    above = dict(scores)
    for role in BY_CONTENT:
        above[role] = scores[role] - by_position_alone[role]
    named = {role: (above[role] > bars[role]).nonzero().tolist() for role in ROLES}  # [layer, channel]

    # B and C are one for all channels of a layer, so channels tend to look alike: the layer's mean is judged as well
    means = {role: scores[role].mean(1) for role in ROLES}  # (layer)
    means_alone = {role: by_position_alone[role].mean(1) for role in ROLES}
    mean_bars = {role: nulls[role].mean(2).quantile(0.99, dim=0) for role in ROLES}  # (layer)
    table = []
    for role in ROLES:
        key = role.replace(" ", "_")
        for layer in range(n_layers):
            channel = int(above[role][layer].argmax())
            score = scores[role][layer, channel].item()
            alone = by_position_alone[role][layer, channel].item()
            n_above = sum(at == layer for at, _ in named[role])
            of_layer = [x[role][layer].item() for x in (means, means_alone, mean_bars)]
            table.append([role, f"L{layer}", *of_layer, f"C{channel}", score, alone, bars[role], n_above])
        numbers[f"{key}_by_layer"] = means[role].tolist()
        numbers[f"{key}_by_layer_nothing_repeated"] = means_alone[role].tolist()
        numbers[f"{key}_by_layer_null"] = mean_bars[role].tolist()
        numbers[f"{key}_best_channel"] = scores[role].max().item()
        numbers[f"{key}_channels"] = len(named[role])
    numbers["bars"] = bars
    of_layer = ["mean of channels", "nothing repeated", "null"]
    of_best = ["best channel", "score", "nothing repeated", "bar", "channels above"]
    print(tabulate(table, headers=["role", "layer", *of_layer, *of_best], floatfmt=".3f"))
    which = ", ".join(f"{role} the {which_bar(role, bar_of)}" for role, bar_of in bars.items())
    print(
        f"{gray}|hidden attention| of each query, as shares; {shape.d_inner} channels a layer. null: 99th percentile of the "
        f"mean in {SHUFFLES} shuffles, in which rows look where other rows would (previous token: anywhere before). bar: the heads' own ({which}); of what "
        f"rests on content, a channel's score less that where nothing is repeated must pass it{endc}"
    )

#%% Induction looks one place after the earlier copy: but the convolution smears a token over the places after it
if __name__ == "__main__":
    places = list(range(-2, 7))
    with t.no_grad():
        looks = {f"{place}": after_earlier_copy(spaced, place) for place in places}
        looked = channel_scores(model, spaced, looks)
        looked_alone = unrepeated_scores(model, spaced, looks, cfg.seed)
    excess = t.stack([looked[place] - looked_alone[place] for place in looked])  # (place, layer, channel)
    mean_excess = excess.mean(-1).T  # (layer, place)
    best_excess = excess.amax(-1).T
    numbers["attention_after_earlier_copy"] = {
        "places": places,
        "mean": mean_excess.tolist(),
        "best": best_excess.tolist(),
    }
    peak_layer, peak = divmod(int(best_excess.argmax()), len(places))
    peak_place = places[peak]
    peak_channel = int(excess[peak, peak_layer].argmax())
    peak_score = best_excess[peak_layer, peak].item()
    print(
        f"{cyan}most attention that a repeat draws: L{peak_layer}C{peak_channel}, {peak_score:.3f} on the key "
        f"{peak_place} after the earlier copy{endc}"
    )

#%% ... by place
if __name__ == "__main__":
    curves = {f"L{layer}, best channel": best_excess[layer] for layer in range(n_layers)}
    curves |= {f"L{layer}, mean of channels": mean_excess[layer] for layer in range(n_layers)}
    fig = line(
        curves,
        f"Hidden attention to keys near the earlier copy of the query's token, less the same where nothing is repeated "
        f"({about}, {len(spaced)} rows; 0 is the copy itself, 1 what an induction head looks at)",
        xlabel="places after the earlier copy",
        ylabel="share of attention",
        x=places,
        markers=True,
        dashed=[name for name in curves if "mean" in name],
    )
    show(
        fig,
        "mamba/after_copy",
        "Where the scan looks when a token comes again: at 0 at the earlier copy itself, at 1 at what followed "
        "it, as an induction head does.",
    )

#%% Does the lookup run through these channels? They are silenced, and as many others of the same layers
if __name__ == "__main__":
    n_silenced = max(1, n_layers * shape.d_inner // 10)
    drawn_by_copy = excess[places.index(0) :].amax(0)  # (layer, channel): at the place that draws it most
    order = drawn_by_copy.flatten().argsort(descending=True).tolist()
    chosen = [divmod(channel, shape.d_inner) for channel in order[:n_silenced]]
    looking = [[channel for at, channel in chosen if at == layer] for layer in range(n_layers)]
    rng = np.random.default_rng(cfg.seed)

    def gain_without(silenced: list[list[int]]) -> float:
        """Nats that having been said before is worth, when these channels of each layer are silenced."""
        fwd_hooks = []
        for layer, channels in enumerate(silenced):
            fwd_hooks.append((mixer_hook("scan", layer), partial(silence, channels=t.tensor(channels, dtype=t.long))))
        _, again = loss_of_copies(model, repeats, half, fwd_hooks)
        _, fresh = loss_of_copies(model, unrelated, half, fwd_hooks)
        return fresh - again

    gain_without_looking = gain_without(looking)
    gains_without_others = []
    for _ in range(5):
        others = []
        for channels in looking:
            rest = np.setdiff1d(np.arange(shape.d_inner), channels)
            others.append(rng.choice(rest, min(len(channels), len(rest)), replace=False).tolist())
        gains_without_others.append(gain_without(others))
    numbers |= {
        "silenced": n_silenced,
        "gain_without_looking_channels": gain_without_looking,
        "gain_without_other_channels": gains_without_others,
    }
    print(
        f"{cyan}gain {gained:.2f} nats; without the {n_silenced} channels that look most near earlier copies "
        f"{gain_without_looking:.2f}, without as many others {min(gains_without_others):.2f} to "
        f"{max(gains_without_others):.2f} (5 draws){endc}"
    )

#%% The hidden attention of a layer, and of a channel that looks back, beside an attention head's
if __name__ == "__main__":
    panels = {}
    for layer in range(n_layers):
        by_channel = [pattern.mean(0) for pattern in channel_patterns(model, repeats, layer)]
        pattern_of_layer = t.cat(by_channel)  # (channel, query, key), mean of the rows
        panels[f"L{layer}, mean of {shape.d_inner} channels"] = pattern_of_layer.mean(0)
        if layer == peak_layer:
            panels[f"L{layer}C{peak_channel}"] = pattern_of_layer[peak_channel]
    beside = Path(find_folder(cfg.beside)) if cfg.beside else None
    found_beside = beside is not None and beside.is_dir()
    if found_beside and read_config(str(beside))["n_ctx"] < repeats.shape[1]:
        print(f"{gray}{cfg.beside} reads shorter rows than these, of {repeats.shape[1]} tokens: it is not drawn{endc}")
        found_beside = False

if __name__ == "__main__" and found_beside:
    transformer, its_tokenizer, _ = open_own(beside, device)
    its_bos = None if corpus.bos is None else bos_id(its_tokenizer)
    its_rows = repeated_tokens(cfg.rows, half, transformer.cfg.d_vocab, its_bos, cfg.seed).to(device)
    its_scores = head_scores(transformer, transformer.cfg.n_layers, its_rows, half)["prefix_matching"]
    its_layer, its_head = divmod(int(its_scores.argmax()), transformer.cfg.n_heads)
    with t.no_grad():
        _, cache = run_with_cache(transformer, its_rows, [act_name("pattern", its_layer)])
    its_name = f"L{its_layer}H{its_head} of {cfg.beside}"
    panels[its_name] = cache["pattern", its_layer][:, its_head].mean(0)
    numbers["prefix_matching_of_attention_head"] = its_scores.max().item()

#%% ... drawn
if __name__ == "__main__":
    shown = {name: pattern[:LONGEST_DRAWN, :LONGEST_DRAWN].cpu() for name, pattern in panels.items()}
    fig = imshow(
        t.stack(list(shown.values())),
        f"Hidden attention, |alpha| as shares of each query{', beside an attention head' if found_beside else ''} (mean of "
        f"{len(repeats)} rows of {half} random tokens said twice; {about})",
        xlabel="key",
        ylabel="query",
        panels=list(shown),
        columns=3,
        diverging=False,
        value="share",
        one_scale=False,
    )
    show(
        fig,
        "mamba/hidden_attention",
        "Left the weights with which the scan reads earlier tokens, right an attention head's: rows look, columns "
        "are looked at.",
    )

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    save_results("mamba", cfg, **numbers)
    no_conv = gains["convolution: own place alone"]
    no_memory = gains["state: forgotten between the copies"]
    strongest = int((means["induction"] - means_alone["induction"]).argmax())
    taps = {name: gain for name, gain in gains.items() if name.endswith("back unseen")}
    tap = min(taps, key=lambda name: taps[name])
    print(
        f"{green}A token that was said before is {gained:.2f} nats cheaper ({second:.2f} against "
        f"{second_unrelated:.2f}); when the state is forgotten between the copies {no_memory:.2f}, when the convolution "
        f"sees its own place alone {no_conv:.2f}. Its most needed place: {tap}, {taps[tap]:.2f}. Where induction heads "
        f"look, L{strongest}'s hidden attention is {means['induction'][strongest]:.3f} (mean of channels; null "
        f"{mean_bars['induction'][strongest]:.3f}, where nothing is repeated {means_alone['induction'][strongest]:.3f}); "
        f"{len(named['induction'])} of {n_layers * shape.d_inner} channels pass the bar of heads. Gate: hidden attention "
        f"is the scan to {max(misses):.0e}.{endc}"
    )
