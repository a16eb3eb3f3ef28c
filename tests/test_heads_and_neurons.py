"""
What reads a hooked model without changing it: scores, attribution, catalogues, folding and norm-based maps, held
against planted heads, loops and plain forms.
"""

import pytest
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from conftest import tiny_attn_only

# ruff: noqa: F811  a fixture is imported by name and taken as an argument of that name
from test_tiny_transformer import V, bridge, folder, small, small_llama, tokens  # noqa: F401  fixtures and models

from hooks import HookPoint, hook_points, listening_gap, run_with_cache
from logit_attribution import direct_logit_attribution, folded_W_U, logit_parts, parts_error
from neurons import neuron_catalogue
from heads import (
    catalogue,
    head_scores,
    heads_of_role,
    repeated_tokens,
    role_targets,
    spaced_repeats,
    stripe,
    which_bar,
)
from norm_maps import ff_maps, fold_norm, mixing_ratio
from tiny_transformer import TinyConfig, TinyTransformer


# %% Gates and plain forms
@pytest.mark.parametrize("make", [small, small_llama])
def test_listening_changes_nothing(make):
    assert listening_gap(make(), t.randint(30, (2, 12))) < 1e-5


def test_a_hook_that_changes_the_run_only_when_it_listens_is_seen():
    model = small()
    point = hook_points(model)["blocks.0.hook_resid_mid"]
    plain = point.forward
    point.forward = lambda x: plain(2 * x if point.fwd_hooks else x)
    assert listening_gap(model, t.randint(30, (2, 12))) > 1e-2


@pytest.mark.parametrize("make", [small, small_llama, lambda: small(positions="sinusoidal", tied=False)])
@pytest.mark.parametrize("position", [0, 7, -1])
def test_the_plain_attribution_and_the_parts_agree(make, position):
    model = make()
    ids = t.randint(30, (1, 20))
    plain = direct_logit_attribution(model, ids, 3, position)
    parts = logit_parts(model, ids, 3, position)
    assert plain["embed"] == pytest.approx((parts["embed"] + parts["pos_embed"]).item(), abs=1e-4)
    assert plain["constant"] == pytest.approx(parts["constant"].item(), abs=1e-5)
    for layer in range(2):
        attn = parts["heads"][layer].sum() + parts["attn_bias"][layer]
        assert plain[f"L{layer} attn"] == pytest.approx(attn.item(), abs=1e-4)
        assert plain[f"L{layer} mlp"] == pytest.approx(parts["mlp"][layer].item(), abs=1e-4)
    assert sum(plain.values()) == pytest.approx(parts["logit"].item(), abs=1e-4)


# %% Head scores
def test_head_scores_read_the_right_stripes():
    class Fixed(nn.Module):
        """By rule: head 0 attends to the previous token, 1 to the token after the last copy, 2 to the copy, 3 to the first."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.Module()})])
            self.blocks[0]["attn"].hook_pattern = HookPoint()

        def forward(self, tokens):
            T, half = tokens.shape[1], 10
            pattern = t.zeros(len(tokens), 4, T, T)
            for q in range(T):
                for head, key in enumerate((q - 1, q - half + 1, q - half, 0)):
                    pattern[:, head, q, max(key, 0)] = 1
            return self.blocks[0]["attn"].hook_pattern(pattern)

    scores = head_scores(Fixed(), 1, repeated_tokens(3, 10, 50, bos=0), 10)
    for i, name in enumerate(("previous_token", "prefix_matching", "duplicate_token", "first_token")):
        assert scores[name][0, i] == 1, name
        assert name == "first_token" or scores[name][0].sum() == 1, name


def test_stripe_matches_a_loop():
    pattern = t.rand(2, 3, 9, 9)
    slow = t.stack([pattern[:, :, q, q - 2] for q in range(5, 9)]).mean((0, 1))
    t.testing.assert_close(stripe(pattern, 2, 5), slow)


def test_repeated_tokens_repeat_after_bos():
    tokens = repeated_tokens(5, 7, t.arange(3, 9), bos=1)
    assert (tokens[:, 0] == 1).all() and t.equal(tokens[:, 1:8], tokens[:, 8:]) and tokens[:, 1:].min() >= 3


# %% Folding
@pytest.mark.parametrize("make", [small, lambda: small(tied=False, positions="sinusoidal"), small_llama])
@t.no_grad()
def test_folding_keeps_log_probabilities(make):
    model, ids = make(), t.randint(30, (2, 20))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    folded = fold_norm(model)
    t.testing.assert_close(folded(ids).log_softmax(-1), model(ids).log_softmax(-1), atol=1e-4, rtol=0)
    assert all(t.equal(x, before[name]) for name, x in model.state_dict().items())
    norms = [folded.ln_final, *(norm for block in folded.blocks for norm in (block.ln1, block.ln2))]
    assert all(
        (norm.weight == 1).all() and (getattr(norm, "bias", None) is None or (norm.bias == 0).all()) for norm in norms
    )
    if make is not small_llama:
        assert (
            max(
                x.mean(-1).abs().max()
                for x in (
                    folded.W_E,
                    folded.W_pos,
                    *(w for b in folded.blocks for w in (b.attn.W_O, b.attn.o.bias, b.mlp.W_out, b.mlp.out.bias)),
                )
            )
            < 1e-6
        )
        assert max(w.mean(0).abs().max() for b in folded.blocks for w in (b.mlp.W_in, b.attn.q.weight.T)) < 1e-6
    assert folded.W_U.mean(-1).abs().max() < 1e-6
    t.testing.assert_close(
        folded_W_U(folded, t.tensor([3, 4])).diff(dim=1),
        folded_W_U(model, t.tensor([3, 4])).diff(dim=1),
        atol=1e-5,
        rtol=1e-4,
    )


# %% Attribution
@pytest.mark.parametrize("make", [small, small_llama, lambda: small(positions="sinusoidal", tied=False)])
def test_parts_sum_to_the_logit(make):
    model, ids = make(), t.randint(30, (1, 20))
    for position in (0, 7, -1):
        assert parts_error(logit_parts(model, ids, 3, position)) < 1e-4


@t.no_grad()
def test_parts_on_a_bridge_equal_ours(folder, bridge, tokens):
    theirs, ours = logit_parts(bridge, tokens[:1], 5), logit_parts(TinyTransformer.from_folder(folder), tokens[:1], 5)
    assert parts_error(theirs) < 1e-4
    for name in ours:
        t.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


@t.no_grad()
def test_a_part_is_what_its_removal_takes_from_the_logit():
    """With the final norm's scale held, taking one head's output or one neuron out changes the logit by its part."""
    model, ids = small(), t.randint(30, (1, 9))
    _, cache = run_with_cache(model, ids)
    parts, block = logit_parts(model, ids, 4), model.blocks[1]
    end = cache["resid_post", 1][0, -1]
    logit = lambda x: (
        (((x - x.mean()) / cache["ln_final.hook_scale"][0, -1]) * model.ln_final.weight + model.ln_final.bias)
        @ model.W_U[:, 4]
    )
    head, neuron = cache["z", 1][0, -1, 2] @ block.attn.W_O[2], cache["post", 1][0, -1, 7] * block.mlp.W_out[7]
    assert (logit(end) - logit(end - head)).item() == pytest.approx(parts["heads"][1, 2].sum().item(), abs=1e-4)
    assert (logit(end) - logit(end - neuron)).item() == pytest.approx(parts["neurons"][1, 7].item(), abs=1e-4)


# %% Catalogues
def test_role_targets_by_hand():
    targets = role_targets(t.tensor([[9, 1, 2, 1, 2]]))
    assert [tuple(x.tolist()) for x in targets["duplicate token"][0].nonzero()] == [(3, 1), (4, 2)]
    assert [tuple(x.tolist()) for x in targets["induction"][0].nonzero()] == [(3, 2), (4, 3)]
    assert [tuple(x.tolist()) for x in targets["previous token"][0].nonzero()] == [(2, 1), (3, 2), (4, 3)]
    assert [tuple(x.tolist()) for x in targets["text-begin sink"][0].nonzero()] == [(2, 0), (3, 0), (4, 0)]


@t.no_grad()
def hand_made() -> TinyTransformer:
    """
    Layer 0 by hand: head 0 attends one back by position, 1 to the first token, 2 to its own token wherever it stands.
    Layer 1 by hand: head 0 copies what it attends to, head 1 does the opposite.
    """
    n, T = 32, 48
    model = TinyTransformer(TinyConfig(2, 3, 3 * 2 * 64, 4, n, T, tied=False)).eval()
    for p in model.parameters():
        p.zero_()
    for norm in (model.ln_final, *(norm for b in model.blocks for norm in (b.ln1, b.ln2))):
        norm.weight.fill_(1)
    model.embed.weight[:, :n], model.W_pos[:, 64 : 64 + T] = 4 * t.eye(n), 4 * t.eye(T)
    model.unembed.weight[:, :n] = t.eye(n)
    first, second, size = model.blocks[0].attn, model.blocks[1].attn, model.cfg.d_head
    first.q.weight[: T - 1, 65 : 64 + T], first.k.weight[: T - 1, 64 : 63 + T] = 5 * t.eye(T - 1), 5 * t.eye(T - 1)
    first.q.bias[size], first.k.weight[size, 64] = 100.0, 10.0
    first.q.weight[2 * size : 2 * size + n, :n], first.k.weight[2 * size : 2 * size + n, :n] = (
        5 * t.eye(n),
        5 * t.eye(n),
    )
    for head, sign in ((0, 1), (1, -1)):
        second.v.weight[head * size : head * size + n, :n], second.o.weight[:n, head * size : head * size + n] = (
            t.eye(n),
            sign * t.eye(n),
        )
    return model


def test_catalogue_names_the_hand_made_heads():
    rows = repeated_tokens(8, 20, t.arange(1, 32), 0)
    scores, bars, roles = catalogue(hand_made(), rows)
    assert roles == {
        "L0H0": ["previous token"],
        "L0H1": ["text-begin sink"],
        "L0H2": ["duplicate token"],
        "L1H0": ["copying"],
        "L1H1": [],
        "L1H2": [],
    }
    assert (
        scores["previous token"][0, 0] > 0.99
        and scores["text-begin sink"][0, 1] > 0.99
        and scores["copying"][1, 0] > 0.99
        and scores["copying"][1, 1] < 0.01
    )
    assert scores["duplicate token"][0, 2] > 0.3  # the rest goes to the token itself


def test_a_positional_head_is_not_named_for_what_it_happens_to_hit():
    """A head that looks half a row back whatever stands there is no duplicate-token head."""
    model, half = hand_made(), 20
    with t.no_grad():
        attn = model.blocks[0].attn
        attn.q.weight[:48], attn.k.weight[:48] = 0, 0
        attn.q.weight[: 48 - half, 64 + half : 112], attn.k.weight[: 48 - half, 64 : 112 - half] = (
            5 * t.eye(48 - half),
            5 * t.eye(48 - half),
        )
    scores, bars, roles = catalogue(model, repeated_tokens(8, half, t.arange(1, 32), 0))
    assert scores["duplicate token"][0, 0] > 0.7 and roles["L0H0"] == []


def test_a_head_that_looks_back_over_a_fixed_distance_scores_nothing_where_distances_are_drawn():
    model, half = hand_made(), 23
    with t.no_grad():
        attn = model.blocks[0].attn
        attn.q.weight[:48], attn.k.weight[:48] = 0, 0
        attn.q.weight[: 48 - half + 1, 63 + half : 112], attn.k.weight[: 48 - half + 1, 64 : 113 - half] = (
            5 * t.eye(48 - half + 1),
            5 * t.eye(48 - half + 1),
        )
    fixed = repeated_tokens(64, half, t.arange(1, 32), 0)
    spaced = spaced_repeats(64, half, t.arange(1, 32), 0)
    assert head_scores(model, 2, fixed, half)["prefix_matching"][0, 0] > 0.9
    assert head_scores(model, 2, spaced)["prefix_matching"][0, 0] < 0.15
    for rows in (fixed, spaced):
        assert "induction" not in catalogue(model, rows)[2]["L0H0"]


def test_spaced_repeats_have_a_distance_of_their_own_in_each_row():
    rows = spaced_repeats(40, 20, t.arange(100, 200), bos=1)
    assert rows.shape == (40, 41) and (rows[:, 0] == 1).all()
    distances = set()
    for row in rows:
        (first, *_), again = (row == row[-1]).nonzero().flatten().tolist()[0:1], 40
        distances.add(again - first)
        assert t.equal(row[first - 9 : first + 1], row[-10:]) and len(row.unique()) == 31
    assert len(distances) > 10 and min(distances) >= 10


def test_three_heads_that_share_the_work_are_all_named():
    """Each pays about a fifth of its attention to the token after the earlier copy; a fourth looks nowhere."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.cfg = TinyConfig(1, 4, 16, 4, 200, 41)
            self.W_U = t.randn(16, 200)
            self.ln_final = nn.Identity()
            attn = nn.Module()
            attn.hook_pattern, attn.hook_v, attn.W_O = HookPoint(), HookPoint(), t.randn(4, 4, 16)
            self.blocks = nn.ModuleList([nn.ModuleDict({"attn": attn})])
            self.blocks[0].attn = attn

        def forward(self, tokens):
            attn, mask = self.blocks[0].attn, role_targets(tokens)["induction"].float()[:, None]
            uniform = t.ones(tokens.shape[1], tokens.shape[1]).tril()
            uniform = uniform / uniform.sum(-1, keepdim=True)
            share = t.tensor([0.23, 0.22, 0.2, 0.0])[None, :, None, None] * mask.amax(-1, keepdim=True)
            attn.hook_v(t.randn(*tokens.shape, 4, 4, generator=t.Generator().manual_seed(0)))
            return attn.hook_pattern(share * mask + (1 - share) * uniform)

    scores, bars, roles = catalogue(Shared(), spaced_repeats(32, 20, t.arange(1, 200), 0))
    assert heads_of_role("induction", roles, scores) == ["L0H0", "L0H1", "L0H2"]
    assert which_bar("induction", bars["induction"]) == "floor" and which_bar("induction", 0.2) == "null"


def test_the_catalogue_opens_our_attention_only_models():
    model = tiny_attn_only()
    scores, bars, roles = catalogue(model, spaced_repeats(8, 15, t.arange(1, 20), 0), shuffles=20)
    assert len(roles) == 8 and set(scores) == set(bars) and all(x.isfinite().all() for x in scores.values())


@pytest.mark.parametrize("make", [small, small_llama])
def test_scores_agree_with_head_scores(make):
    model = make()
    once = t.stack([t.randperm(29, generator=t.Generator().manual_seed(i))[:20] + 1 for i in range(6)])
    rows = t.cat([t.zeros(6, 1, dtype=t.long), once, once], 1)
    mine, theirs = catalogue(model, rows, shuffles=2)[0], head_scores(model, 2, rows, 20)
    for name, other in (
        ("previous token", "previous_token"),
        ("induction", "prefix_matching"),
        ("duplicate token", "duplicate_token"),
        ("text-begin sink", "first_token"),
    ):
        t.testing.assert_close(mine[name], theirs[other], atol=1e-5, rtol=1e-4)


@t.no_grad()
def test_catalogue_on_a_bridge_equals_ours(folder, bridge):
    rows = repeated_tokens(4, 12, V, 0)
    ours, theirs = catalogue(TinyTransformer.from_folder(folder), rows, 3), catalogue(bridge, rows, 3)
    for name in ours[0]:
        t.testing.assert_close(ours[0][name], theirs[0][name], atol=2e-3, rtol=1e-3)
    assert ours[2] == theirs[2]


@t.no_grad()
def test_neuron_catalogue_finds_the_planted_neuron():
    model, ids = small(), t.randint(1, 30, (6, 12))
    ids[3, 7] = 0
    block = model.blocks[1].mlp
    for p in block.parameters():
        p.mul_(0.01)
    (_, cache), norm = (
        run_with_cache(model, ids, ["blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_post"]),
        model.blocks[1].ln2,
    )
    read = cache["blocks.1.ln2.hook_normalized"][3, 7] * norm.weight + norm.bias
    block.inp.weight[5], block.inp.bias[5], block.out.weight[:, 5] = read, 0, model.W_U[:, 11] * norm.weight
    (found, *_) = neuron_catalogue(model, ids, 1, n=2, contexts=3)
    assert found["neuron"] == 5 and found["peaks"][0][1:] == (3, 7) and len(found["peaks"]) == 3
    t.testing.assert_close(found["effect"].diff(), (block.W_out[5] @ folded_W_U(model)).diff(), atol=1e-4, rtol=1e-4)


# %% The feed-forward block through attention maps
@pytest.mark.parametrize("make", [small, lambda: small(act="gelu"), small_llama])
@pytest.mark.parametrize("layer", [0, 1])
def test_integrated_gradients_are_complete(make, layer):
    maps = ff_maps(make(), t.randint(30, (1, 12)), layer)
    assert maps["error"] < 1e-5
    assert all(maps[name].triu(1).abs().max() == 0 for name in ("attn", "attn_res", "attn_res_norm", "ff", "ff_res"))
    for name in ("mixing_attn_res", "mixing_ff_res"):
        assert maps[name][0] == 0 and (maps[name][1:] > 0).all() and (maps[name] < 1).all()


def test_the_mixing_ratio_is_of_the_sum_of_what_others_bring():
    """By hand: own (3, 0); the others' (0, 4) and (0, -4) cancel, (0, 4) and (0, 0) do not."""
    by_source = t.zeros(3, 3, 2)
    by_source[1, 0], by_source[1, 1] = t.tensor([0.0, 4.0]), t.tensor([3.0, 0.0])
    by_source[2, 0], by_source[2, 1], by_source[2, 2] = t.tensor([0, 4.0]), t.tensor([0, -4.0]), t.tensor([3.0, 0])
    by_source[0, 0] = t.tensor([3.0, 0.0])
    t.testing.assert_close(mixing_ratio(by_source), t.tensor([0.0, 4 / 7, 0.0]))


def test_feed_forward_maps_match_loops():
    """One query, one source at a time; the integral by 2000 midpoints through autograd."""
    model, ids, layer = small(), t.randint(30, (1, 5)), 1
    with t.no_grad():
        _, cache = run_with_cache(model, ids)
    maps, block = ff_maps(model, ids, layer), model.blocks[layer]
    query, x, scale = 3, cache["resid_pre", layer][0], cache[f"blocks.{layer}.ln2.hook_scale"][0, 3]
    with t.no_grad():
        sources = [
            sum(
                cache["pattern", layer][0, h, query, j] * cache["v", layer][0, j, h] @ block.attn.W_O[h]
                for h in range(3)
            )
            + (x[j] if j == query else 0)
            for j in range(query + 1)
        ]
        pre = [((s - s.mean()) / scale * block.ln2.weight) @ block.mlp.W_in for s in sources]
        b_O = block.attn.o.bias
        start = ((b_O - b_O.mean()) / scale * block.ln2.weight + block.ln2.bias) @ block.mlp.W_in + block.mlp.inp.bias
    alpha = ((t.arange(2000) + 0.5) / 2000)[:, None]
    path = (start + alpha * sum(pre)).requires_grad_()
    slope = t.autograd.grad(F.gelu(path, approximate="tanh").sum(), path)[0].mean(0)
    for j, (s, p) in enumerate(zip(sources, pre)):
        ff = (p * slope) @ block.mlp.W_out
        assert maps["ff"][query, j].item() == pytest.approx(ff.norm().item(), rel=1e-3)
        assert maps["ff_res"][query, j].item() == pytest.approx((ff + s).norm().item(), rel=1e-3)
        assert maps["attn_res"][query, j].item() == pytest.approx(s.norm().item(), rel=1e-4)
