"""
Mamba, a model without attention: a state of fixed size is carried along the text. What replaces attention, and can it
look something up in its context?
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

# The model, the first half of this file, uses utils, hooks, hooked and weights alone; the experiment uses the rest.
from utils import (  # first: sets OpenMP's variables before torch is loaded
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
from hooks import HookPoint, hooks, run_with_cache
from hooked import Hooked
from weights import read_tensors, take_tensors, tensor_table

from anatomy import (
    BY_CONTENT,
    attention_on,
    known_tokens,
    listening_gap,
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
from data import load_corpus, load_tokenizer, write_folder
from launch import flags
from plots import bar, imshow, line, show
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
            fail(f"d_inner {self.d_inner} is not a multiple of d_model {self.d_model}: transformers knows no other width")


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
        """As the paper starts it: state n of each channel fades with A = -n, and steps delta run from 0.001 to 0.1."""
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.unembed.weight, std=0.5 / math.sqrt(self.cfg.d_model))
        for block in self.blocks:
            mixer = block.mixer
            for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
                nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
            for biased in (mixer.in_proj, mixer.out_proj, mixer.conv1d):
                if biased.bias is not None:
                    nn.init.zeros_(biased.bias)
            mixer.A_log.copy_(t.arange(1, self.cfg.d_state + 1).log().expand_as(mixer.A_log))
            mixer.D.fill_(1)
            delta = t.empty_like(mixer.dt_proj.bias).uniform_(math.log(0.001), math.log(0.1)).exp()
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
