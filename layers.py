"""Layers that several architectures share: norm without gain, rotary positions, causal attention, head weights; and the loss."""

import math

from hooks import HookPoint

from einops import einsum, rearrange
import torch as t
from torch import Tensor
import torch.nn as nn
import torch.nn.functional as F


#%% The loss
def next_token_loss(logits: Tensor, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """
    Cross-entropy in nats of logits (row, pos, d_vocab) against the token that follows each position of tokens (row, pos).
    reduction: mean, sum, or none, which gives (row, pos - 1).
    """
    rows, positions = tokens.shape
    said = logits[:, :-1].flatten(0, 1).float()
    loss = F.cross_entropy(said, tokens[:, 1:].flatten(), reduction=reduction)
    return loss.view(rows, positions - 1) if reduction == "none" else loss


#%% RMSNorm without gain, and rotary positions
class RMSNorm(nn.Module):
    """x / rms(x), without gain."""

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps, self.hook_scale, self.hook_normalized = eps, HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.hook_scale((x.float().pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized((x / scale).to(x.dtype))


def rotate(x: Tensor, dims: int, base: float) -> Tensor:
    """Rotary positions on the first `dims` of x (batch, pos, head, d_head); dimension i turns with i + dims / 2 (GPT-NeoX and Llama order)."""
    turn = t.arange(x.shape[1], device=x.device)[:, None] * base ** (-t.arange(0, dims, 2, device=x.device) / dims)
    cos, sin = turn.cos()[:, None].to(x.dtype), turn.sin()[:, None].to(x.dtype)
    a, b, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
    return t.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


#%% Causal attention
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
    Causal attention: z (batch, pos, head, d_head) from q and k, v (which may have fewer heads). bias (head, query, key) is added to the scores;
    window hides keys that many places back or more. Scores and pattern are formed only where a hook listens, a bias asks or it is faster.
    """
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    distance = t.arange(T, device=q.device)[:, None] - t.arange(T, device=q.device)
    hidden = distance < 0 if window is None or T <= window else (distance < 0) | (distance >= window)
    slow_fused = (
        q.device.type == "cpu" and v.dtype == t.bfloat16 and t.is_grad_enabled()
    )  # rotary positions leave q and k in float32 under autocast
    if bias is None and not slow_fused and not hook_scores.fwd_hooks and not hook_pattern.fwd_hooks:
        fused = dict(is_causal=True) if window is None or T <= window else dict(attn_mask=~hidden)
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=group > 1, **fused
        ).transpose(1, 2)
    if group > 1:
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    mask = (t.zeros(1, device=q.device) if bias is None else bias).masked_fill(hidden, -t.inf).to(q.dtype)
    scores = hook_scores(mask + (q / math.sqrt(q.shape[-1])).transpose(1, 2) @ k.permute(0, 2, 3, 1))
    pattern = hook_pattern(scores.softmax(-1).to(v.dtype))
    return (pattern @ v.transpose(1, 2)).transpose(1, 2)


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
            return self.o(z.flatten(2))
        out = self.hook_result(
            einsum(z, self.W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model")
        ).sum(2)
        return out if self.o.bias is None else out + self.o.bias


class Attention(nn.Module, HeadWeights):
    """Causal multi-head attention with TransformerLens's hooks."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, width = cfg, cfg.n_heads * cfg.d_head
        self.q, self.k = (nn.Linear(cfg.d_model, width, bias=cfg.bias != "none") for _ in "qk")
        self.v, self.o = (
            nn.Linear(cfg.d_model, width, bias=cfg.bias == "all"),
            nn.Linear(width, cfg.d_model, bias=cfg.bias == "all"),
        )
        if cfg.positions == "relative":
            self.distance_bias = nn.Parameter(t.zeros(cfg.n_heads, cfg.n_ctx))
        for name in ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result"):
            setattr(self, f"hook_{name}", HookPoint())

    def score_bias(self, distance: Tensor) -> Tensor:
        """What position alone adds to the attention score, (head, *distance.shape). The factor lets Adam's small steps reach sharp preferences."""
        if self.cfg.positions == "relative":
            return 40 * self.distance_bias[:, distance]
        return t.zeros(1, *distance.shape, device=distance.device)

    def forward(self, x: Tensor, positional: Tensor | None = None) -> Tensor:
        """positional is added to what queries and keys read, not to what values read (shortformer)."""
        cfg, T = self.cfg, x.shape[1]
        x_qk = x if positional is None else x + positional
        heads = "batch pos (head d_head) -> batch pos head d_head"
        q = self.hook_q(rearrange(self.q(x_qk), heads, head=cfg.n_heads))
        k = self.hook_k(rearrange(self.k(x_qk), heads, head=cfg.n_heads))
        v = self.hook_v(rearrange(self.v(x), heads, head=cfg.n_heads))
        if cfg.positions == "rotary":
            dims = 2 * int(cfg.rotary_share * cfg.d_head / 2)
            q, k = self.hook_rot_q(rotate(q, dims, cfg.rotary_base)), self.hook_rot_k(rotate(k, dims, cfg.rotary_base))
        distance = t.arange(T, device=x.device)[:, None] - t.arange(T, device=x.device)
        bias = self.score_bias(distance.clamp(min=0)) if cfg.positions == "relative" else None
        z = self.hook_z(attend(q, k, v, self.hook_attn_scores, self.hook_pattern, bias))
        return self.write(z)
