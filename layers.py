"""What several architectures share: the loss, norm without gain, rotary positions, causal attention, head weights."""

import math

from hooks import HookPoint

import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor


#%% The loss
def next_token_loss(logits: Tensor, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """
    Cross-entropy in nats of logits (row, pos, d_vocab) against the token that follows each position.
    tokens (row, pos); reduction: mean, sum, or none, which gives (row, pos - 1).
    """
    rows, positions = tokens.shape
    said = logits[:, :-1].flatten(0, 1).float()  # (row * (pos - 1), d_vocab)
    follows = tokens[:, 1:].flatten()  # (row * (pos - 1))
    loss = F.cross_entropy(said, follows, reduction=reduction)
    if reduction == "none":
        return loss.view(rows, positions - 1)
    return loss


#%% RMSNorm without gain, and rotary positions
class RMSNorm(nn.Module):
    """x / rms(x), without gain."""

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().pow(2).mean(-1, keepdim=True)  # (..., 1)
        scale = self.hook_scale((mean_square + self.eps).sqrt())
        return self.hook_normalized((x / scale).to(x.dtype))


def rotate(x: Tensor, dims: int, base: float) -> Tensor:
    """
    Rotary positions (Su et al. 2021) on the first `dims` of x (batch, pos, head, d_head).
    Dimensions i and i + dims / 2 are one plane, as in GPT-NeoX and Llama; at position p plane i is turned by
    p * base ** (-2i / dims) radians.
    """
    position = t.arange(x.shape[1], device=x.device)
    frequency = base ** (-t.arange(0, dims, 2, device=x.device) / dims)
    angle = position[:, None] * frequency  # (pos, dims / 2)
    cos = angle.cos()[:, None].to(x.dtype)  # (pos, 1, dims / 2): the same for every head
    sin = angle.sin()[:, None].to(x.dtype)

    first = x[..., : dims // 2]
    second = x[..., dims // 2 : dims]
    unturned = x[..., dims:]
    return t.cat([first * cos - second * sin, second * cos + first * sin, unturned], -1)


#%% Causal attention
def key_distance(positions: int, device: t.device) -> Tensor:
    """(query, key): how many places the key lies before the query; negative in the future."""
    place = t.arange(positions, device=device)
    return place[:, None] - place


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hook_scores: HookPoint,
    hook_pattern: HookPoint,
    bias: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """
    Causal attention: z (batch, pos, head, d_head) of q, k, v (batch, pos, head, d_head).
    k and v may have fewer heads than q: each then serves several of q's.
    bias (head, query, key) is added to the scores; window hides keys that many places back or more.
    Scores and pattern are formed only where a hook listens, a bias asks or it is faster.
    """
    positions = q.shape[1]
    if window is not None and window >= positions:
        window = None  # nothing lies that far back
    distance = key_distance(positions, q.device)
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)

    listened_to = bool(hook_scores.fwd_hooks or hook_pattern.fwd_hooks)
    # torch's fused attention is slow in training with bfloat16 on a CPU; v tells, since rotary positions leave q and k
    # in float32 under autocast
    fused_is_slow = q.device.type == "cpu" and v.dtype == t.bfloat16 and t.is_grad_enabled()
    if bias is None and not listened_to and not fused_is_slow:
        return fused_attention(q, k, v, None if window is None else ~hidden)
    return spelled_attention(q, k, v, hook_scores, hook_pattern, hidden, bias)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """z by torch's kernel, which never holds the scores. seen (query, key); None is causal."""
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (batch, head, pos, d_head)
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=seen,
        is_causal=seen is None,
        enable_gqa=q.shape[2] > k.shape[2],
    )
    return z.transpose(1, 2)  # (batch, pos, head, d_head)


def spelled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hook_scores: HookPoint,
    hook_pattern: HookPoint,
    hidden: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """
    z with scores and pattern (batch, head, query, key) for hooks to see and replace.
    hidden (query, key): True at keys that a query may not see.
    """
    group = q.shape[2] // k.shape[2]  # query heads that share a key and value head
    if group > 1:
        k = k.repeat_interleave(group, 2)
        v = v.repeat_interleave(group, 2)

    if bias is None:
        bias = t.zeros(1, device=q.device)
    mask = bias.masked_fill(hidden, -t.inf).to(q.dtype)  # (query, key), or (head, query, key)
    scaled_q = (q / math.sqrt(q.shape[-1])).transpose(1, 2)  # (batch, head, query, d_head)
    keys = k.permute(0, 2, 3, 1)  # (batch, head, d_head, key)
    scores = hook_scores(mask + scaled_q @ keys)  # (batch, head, query, key)
    pattern = hook_pattern(scores.softmax(-1).to(v.dtype))
    z = pattern @ v.transpose(1, 2)  # (batch, head, query, d_head)
    return z.transpose(1, 2)  # (batch, query, head, d_head)


class HeadWeights:
    """W_Q, W_K, W_V (head, d_model, d_head) and W_O (head, d_head, d_model) of a module with linear maps q, k, v, o."""

    @property
    def W_Q(self) -> Tensor:
        return rearrange(self.q.weight, "(head d_head) d_model -> head d_model d_head", d_head=self.cfg.d_head)

    @property
    def W_K(self) -> Tensor:
        return rearrange(self.k.weight, "(head d_head) d_model -> head d_model d_head", d_head=self.cfg.d_head)

    @property
    def W_V(self) -> Tensor:
        return rearrange(self.v.weight, "(head d_head) d_model -> head d_model d_head", d_head=self.cfg.d_head)

    @property
    def W_O(self) -> Tensor:
        return rearrange(self.o.weight, "d_model (head d_head) -> head d_head d_model", d_head=self.cfg.d_head)

    def write(self, z: Tensor) -> Tensor:
        """z (batch, pos, head, d_head) through W_O; by head first where hook_result listens."""
        if not self.hook_result.fwd_hooks:
            return self.o(z.flatten(2))  # (batch, pos, d_model)
        result = einsum(z, self.W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model")
        out = self.hook_result(result).sum(2)  # (batch, pos, d_model)
        if self.o.bias is not None:
            out = out + self.o.bias
        return out


class Attention(nn.Module, HeadWeights):
    """
    Causal multi-head attention with TransformerLens's hooks.
    cfg has d_model, n_heads, d_head, n_ctx, bias, positions, and for rotary positions rotary_share and rotary_base.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        width = cfg.n_heads * cfg.d_head
        qk_bias = cfg.bias in ("qk", "all")
        vo_bias = cfg.bias == "all"
        self.q = nn.Linear(cfg.d_model, width, bias=qk_bias)
        self.k = nn.Linear(cfg.d_model, width, bias=qk_bias)
        self.v = nn.Linear(cfg.d_model, width, bias=vo_bias)
        self.o = nn.Linear(width, cfg.d_model, bias=vo_bias)
        if cfg.positions == "relative":
            self.distance_bias = nn.Parameter(t.zeros(cfg.n_heads, cfg.n_ctx))
        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_rot_q = HookPoint()
        self.hook_rot_k = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()
        self.hook_result = HookPoint()

    def score_bias(self, distance: Tensor) -> Tensor:
        """What position alone adds to the attention score, (head, *distance.shape)."""
        if self.cfg.positions == "relative":
            return 40 * self.distance_bias[:, distance]  # 40: Adam's small steps reach sharp preferences
        return t.zeros(1, *distance.shape, device=distance.device)

    def by_head(self, x: Tensor) -> Tensor:
        return rearrange(x, "batch pos (head d_head) -> batch pos head d_head", head=self.cfg.n_heads)

    def forward(self, x: Tensor, positional: Tensor | None = None) -> Tensor:
        """positional is added to what queries and keys read, not to what values read (shortformer)."""
        cfg = self.cfg
        x_qk = x if positional is None else x + positional  # (batch, pos, d_model)
        q = self.hook_q(self.by_head(self.q(x_qk)))  # (batch, pos, head, d_head)
        k = self.hook_k(self.by_head(self.k(x_qk)))
        v = self.hook_v(self.by_head(self.v(x)))
        if cfg.positions == "rotary":
            dims = 2 * int(cfg.rotary_share * cfg.d_head / 2)
            q = self.hook_rot_q(rotate(q, dims, cfg.rotary_base))
            k = self.hook_rot_k(rotate(k, dims, cfg.rotary_base))
        bias = None
        if cfg.positions == "relative":
            distance = key_distance(x.shape[1], x.device)
            bias = self.score_bias(distance.clamp(min=0))  # (head, query, key)
        z = self.hook_z(attend(q, k, v, self.hook_attn_scores, self.hook_pattern, bias))  # (batch, pos, head, d_head)
        return self.write(z)  # (batch, pos, d_model)
