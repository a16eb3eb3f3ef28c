"""
The shared layers against formulas in loops: the loss, the norm, rotary positions, and attention in all the ways it is
computed.
"""

import math

import pytest
import torch as t
import torch.nn.functional as F
from torch import Tensor

from attn_only import AttnOnlyConfig
from hooks import HookPoint
from layers import Attention, RMSNorm, attend, key_distance, next_token_loss, rotate


def listening(*hooks: HookPoint) -> None:
    for hook in hooks:
        hook.add_hook(lambda x, hook: None)


# %% The loss
def test_next_token_loss_is_the_cross_entropy_of_the_token_that_follows():
    logits = t.randn(3, 5, 7)
    tokens = t.randint(7, (3, 5))
    by_place = next_token_loss(logits, tokens, "none")
    assert by_place.shape == (3, 4)
    for row in range(3):
        for place in range(4):
            wanted = -logits[row, place].log_softmax(-1)[tokens[row, place + 1]]
            t.testing.assert_close(by_place[row, place], wanted)
    flat = logits[:, :-1].flatten(0, 1)
    follows = tokens[:, 1:].flatten()
    assert t.equal(next_token_loss(logits, tokens), F.cross_entropy(flat, follows))
    assert t.equal(next_token_loss(logits, tokens, "sum"), F.cross_entropy(flat, follows, reduction="sum"))


def test_the_loss_is_taken_in_float32():
    logits = t.randn(2, 4, 6).bfloat16()
    assert next_token_loss(logits, t.randint(6, (2, 4))).dtype == t.float32


# %% The norm and rotary positions
def test_rmsnorm_divides_by_the_root_mean_square_and_shows_its_scale():
    norm = RMSNorm(eps=0.0)
    seen = {}
    norm.hook_scale.add_hook(lambda x, hook: seen.update(scale=x))
    x = 5 * t.randn(2, 3, 8)
    out = norm(x)
    t.testing.assert_close(out.pow(2).mean(-1), t.ones(2, 3))
    t.testing.assert_close(out * seen["scale"], x)
    assert not list(norm.parameters())
    assert norm(x.bfloat16()).dtype == t.bfloat16


def rotated_at(x: Tensor, dims: int = 4, base: float = 100.0) -> Tensor:
    """(pos, d_head): one vector at each of 20 positions, rotated there."""
    return rotate(x.expand(1, 20, 1, 8), dims, base)[0, :, 0]


def test_rotary_scores_depend_on_the_offset_alone():
    q = t.randn(8)
    k = t.randn(8)
    scores = rotated_at(q) @ rotated_at(k).T
    for offset in range(10):
        on_diagonal = scores.diagonal(-offset)
        t.testing.assert_close(on_diagonal, scores[offset, 0].expand_as(on_diagonal), atol=1e-4, rtol=0)
    t.testing.assert_close(rotated_at(q)[:, 4:], q[4:].expand(20, 4))  # the dimensions that do not rotate


def test_rotary_planes_are_i_and_i_plus_half_and_turn_at_their_own_frequency():
    x = t.randn(8)
    rotated = rotated_at(x)
    for position in (0, 1, 13):
        for plane, frequency in ((0, 1.0), (1, 100.0**-0.5)):
            turned = complex(x[plane], x[plane + 2]) * complex(
                math.cos(position * frequency), math.sin(position * frequency)
            )
            assert rotated[position, plane].item() == pytest.approx(turned.real, abs=1e-5)
            assert rotated[position, plane + 2].item() == pytest.approx(turned.imag, abs=1e-5)


# %% Attention
def slow_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, window: int | None = None) -> Tensor:
    """One row, one head, one query at a time."""
    batch, positions, heads, d_head = q.shape
    group = heads // k.shape[2]
    z = t.zeros_like(q)
    for row in range(batch):
        for head in range(heads):
            for i in range(positions):
                first = 0 if window is None else max(0, i - window + 1)
                scores = []
                for j in range(first, i + 1):
                    score = q[row, i, head] @ k[row, j, head // group] / math.sqrt(d_head)
                    scores.append(score if bias is None else score + bias[head, i, j])
                z[row, i, head] = t.stack(scores).softmax(0) @ v[row, first : i + 1, head // group]
    return z


@pytest.mark.parametrize("heard", [False, True], ids=["fused", "spelled"])
@pytest.mark.parametrize("window", [None, 3, 6, 50])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@t.no_grad()
def test_attention_is_the_formula_whether_or_not_a_hook_listens(kv_heads, window, heard):
    q = t.randn(2, 6, 4, 8)
    k = t.randn(2, 6, kv_heads, 8)
    v = t.randn(2, 6, kv_heads, 8)
    hooks = HookPoint(), HookPoint()
    if heard:
        listening(*hooks)
    z = attend(q, k, v, *hooks, window=window)
    t.testing.assert_close(z, slow_attend(q, k, v, window=window), atol=1e-5, rtol=1e-4)


@t.no_grad()
def test_a_bias_is_added_to_the_scores():
    q, k, v = (t.randn(2, 6, 3, 8) for _ in range(3))
    bias = t.randn(3, 6, 6)
    z = attend(q, k, v, HookPoint(), HookPoint(), bias)
    t.testing.assert_close(z, slow_attend(q, k, v, bias), atol=1e-5, rtol=1e-4)


@t.no_grad()
def test_a_hook_can_replace_the_pattern():
    q, k, v = (t.randn(1, 5, 2, 4) for _ in range(3))
    pattern = HookPoint()
    pattern.add_hook(lambda x, hook: t.eye(5).expand_as(x))
    t.testing.assert_close(attend(q, k, v, HookPoint(), pattern), v)


def test_bfloat16_training_on_a_cpu_is_spelled_out_and_close_to_float32():
    q, k, v = (t.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3))
    z = attend(q, k, v.bfloat16(), HookPoint(), HookPoint())
    assert z.dtype == t.bfloat16
    t.testing.assert_close(z.float(), slow_attend(q, k, v), atol=3e-2, rtol=3e-2)


def test_key_distance_counts_back_from_the_query():
    assert key_distance(3, t.device("cpu")).tolist() == [[0, -1, -2], [1, 0, -1], [2, 1, 0]]


def random_attention(bias: str, positions: str = "rotary") -> Attention:
    t.manual_seed(0)
    attn = Attention(AttnOnlyConfig(n_heads=3, d_model=12, d_head=4, n_ctx=8, bias=bias, positions=positions))
    with t.no_grad():
        for p in attn.parameters():
            p.copy_(0.3 * t.randn(p.shape))
    return attn


@pytest.mark.parametrize("bias", ["none", "qk", "all"])
@t.no_grad()
def test_the_output_is_the_sum_of_the_heads_results(bias):
    attn = random_attention(bias)
    x = t.randn(2, 8, 12)
    plain = attn(x)
    seen = {}
    attn.hook_result.add_hook(lambda result, hook: seen.update(result=result))
    t.testing.assert_close(attn(x), plain)
    assert seen["result"].shape == (2, 8, 3, 12)
    b_O = 0 if attn.o.bias is None else attn.o.bias
    t.testing.assert_close(seen["result"].sum(2) + b_O, plain)


@pytest.mark.parametrize("bias, q, v", [("none", False, False), ("qk", True, False), ("all", True, True)])
def test_bias_names_the_maps_that_have_one(bias, q, v):
    attn = random_attention(bias)
    assert [attn.q.bias is not None, attn.k.bias is not None] == [q, q]
    assert [attn.v.bias is not None, attn.o.bias is not None] == [v, v]


@t.no_grad()
def test_head_weights_are_the_linear_maps_by_head():
    attn = random_attention("none")
    x = t.randn(5, 12)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        t.testing.assert_close(x @ attn.W_Q[head], attn.q(x)[:, part])
        t.testing.assert_close(x @ attn.W_K[head], attn.k(x)[:, part])
        t.testing.assert_close(x @ attn.W_V[head], attn.v(x)[:, part])
    z = t.randn(5, 3, 4)
    by_head = sum(z[:, head] @ attn.W_O[head] for head in range(3))
    t.testing.assert_close(by_head, attn.o(z.flatten(1)))


@t.no_grad()
def test_values_do_not_read_positions_in_shortformer():
    attn = random_attention("none", "shortformer")
    seen = {}
    attn.hook_v.add_hook(lambda v, hook: seen.update(v=v))
    attn.hook_q.add_hook(lambda q, hook: seen.update(q=q))
    x = t.randn(1, 8, 12)
    positional = t.randn(8, 12)
    attn(x)
    plain = dict(seen)
    attn(x, positional)
    t.testing.assert_close(seen["v"], plain["v"])
    assert not t.allclose(seen["q"], plain["q"])
