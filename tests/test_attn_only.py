import json
import math

import pytest
import torch as t
import torch.nn.functional as F
from conftest import ROOT, one_line_error

from anatomy import head_scores, repeated_tokens
from attn_only import (
    AttnOnly,
    AttnOnlyConfig,
    Config,
    ablated_scores,
    attribution_error,
    composition,
    composition_scores,
    copying_scores,
    eigenvalue_copying,
    icl_score,
    logit_attribution,
    loss_by_position,
    norm_based,
    open_own,
    ov_circuit,
    ov_eigenvalues,
    path_patch,
    qk_circuit,
    read_embed,
    save_own,
    skip_trigrams,
    train_own,
)
from plots import attention_page
from layers import rotate
from data import load_corpus, train_bpe
from hooks import run_with_cache

V = 40
POSITIONS = ("rotary", "learned", "shortformer", "relative")


def random_model(positions: str = "rotary", n_layers: int = 2, **more) -> AttnOnly:
    """Weights large enough that a wrong formula shows."""
    t.manual_seed(0)
    model = AttnOnly(
        AttnOnlyConfig(
            **{
                "n_layers": n_layers,
                "n_heads": 3,
                "d_model": 24,
                "d_head": 8,
                "d_vocab": 30,
                "n_ctx": 32,
                "positions": positions,
                **more,
            }
        )
    ).eval()
    with t.no_grad():
        for name, p in model.named_parameters():
            p.copy_(t.randn(p.shape) * (0.02 if "distance" in name else 0.3))
    return model


@pytest.fixture(scope="module")
def induction() -> AttnOnly:
    """By hand: L0H0 attends one back and copies that token into a second subspace; L1H0 looks there for its own token and copies what it finds. L0H1 and L1H1 do nothing."""
    model = AttnOnly(AttnOnlyConfig(2, 2, 3 * V, V, V, 64, "relative", norm="none", bias="none")).eval()
    identity, place = (
        t.eye(V),
        {name: slice(i * V, (i + 1) * V) for i, name in enumerate(("token", "previous", "said"))},
    )
    with t.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.weight[:, place["token"]] = identity
        model.unembed.weight[:, place["said"]] = identity
        first, second = model.blocks[0].attn, model.blocks[1].attn
        first.distance_bias[0, 1] = 1.0
        first.v.weight[:V, place["token"]], first.o.weight[place["previous"], :V] = identity, identity
        second.q.weight[:V, place["token"]], second.k.weight[:V, place["previous"]] = 400 * identity, identity
        second.v.weight[:V, place["token"]], second.o.weight[place["said"], :V] = identity, 30 * identity
    return model


@pytest.fixture(scope="module")
def repeats() -> t.Tensor:
    once = t.stack([t.randperm(V - 1, generator=t.Generator().manual_seed(i))[:20] + 1 for i in range(6)])
    return t.cat([t.zeros(6, 1, dtype=t.long), once, once], 1)


# %% The hand-built induction head is found, explained and broken
def test_scores_name_the_heads(induction, repeats):
    scores = head_scores(induction, 2, repeats, 20)
    assert scores["previous_token"][0, 0] > 0.999 and scores["prefix_matching"][1, 0] > 0.999
    assert scores["prefix_matching"][0].max() < 0.1 and scores["prefix_matching"][1, 1] < 0.1
    losses = loss_by_position(induction, repeats)
    assert losses[:, 21:].max() < 1e-3 and losses[:, 1:19].mean() > 2


def test_ablation_breaks_it_only_at_its_source(induction, repeats):
    assert ablated_scores(induction, repeats, 20, 0, 0)["prefix_matching"][1, 0] < 0.1
    assert ablated_scores(induction, repeats, 20, 0, 1)["prefix_matching"][1, 0] > 0.999


def test_path_patching_finds_the_key_path(induction, repeats):
    corrupt = repeats.clone()
    corrupt[:, 1:21] = repeats[:, 1:21].roll(1, 0)
    lost, clean, bad = path_patch(induction, repeats, corrupt, 20)
    assert clean > -1e-3 and bad < -2
    assert lost["k"][0, 0] > 0.9
    assert sum(x.abs().sum() for x in lost.values()) - lost["k"][0, 0] < 0.02


def test_k_composition_stands_out(induction):
    scores, random, std = composition_scores(induction)
    assert scores["K"][0, 0].item() == pytest.approx(
        1 / math.sqrt(V), rel=1e-4
    )  # two projections onto the same V directions
    assert scores["Q"][0, 0].item() == 0 and scores["V"][0, 0].item() == 0 and 0 < std < random


def test_copying_scores_know_copying_from_its_opposite(induction, repeats):
    assert copying_scores(induction, repeats)[1, 0] > 0.9
    assert eigenvalue_copying(induction)[1, 0] == pytest.approx(1)
    with t.no_grad():
        induction.blocks[1].attn.o.weight.neg_()
    assert copying_scores(induction, repeats)[1, 0] < -0.9 and eigenvalue_copying(induction)[1, 0] == pytest.approx(-1)
    with t.no_grad():
        induction.blocks[1].attn.o.weight.neg_()


def test_attribution_credits_the_copied_token(induction, repeats):
    parts = logit_attribution(induction, repeats[:1], int(repeats[0, 31]), position=30)
    assert parts["heads"][1, 0, 11] == pytest.approx(30, rel=1e-3) and attribution_error(parts) < 1e-4
    assert parts["heads"].abs().sum() - parts["heads"][1, 0, 11] < 1e-2 and parts["direct"] == 0


# %% Against slow independent formulas, in every position scheme
def slow_logits(model: AttnOnly, tokens: t.Tensor) -> t.Tensor:
    """One row, one head, one query at a time, from the weight properties alone."""
    cfg, x = model.cfg, model.W_E[tokens]
    norm = lambda y: y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() if cfg.norm == "rms" else y
    if cfg.positions == "learned":
        x = x + model.W_pos[: len(tokens)]
    for block in model.blocks:
        attn, out = block.attn, t.zeros_like(x)
        read = norm(x)
        for h in range(cfg.n_heads):
            part = slice(h * cfg.d_head, (h + 1) * cfg.d_head)
            bias = lambda linear: linear.bias[part] if linear.bias is not None else 0
            read_qk = read + model.W_pos[: len(tokens)] if cfg.positions == "shortformer" else read
            q, k, v = (
                read_qk @ attn.W_Q[h] + bias(attn.q),
                read_qk @ attn.W_K[h] + bias(attn.k),
                read @ attn.W_V[h] + bias(attn.v),
            )
            for i in range(len(tokens)):
                scores = []
                for j in range(i + 1):
                    a, b = q[i].clone(), k[j].clone()
                    if cfg.positions == "rotary":
                        half = int(cfg.rotary_share * cfg.d_head / 2)
                        for d in range(half):
                            freq = cfg.rotary_base ** (-2 * d / (2 * half))
                            za, zb = (
                                complex(y[d], y[d + half]) * complex(math.cos(p * freq), math.sin(p * freq))
                                for y, p in ((q[i], i), (k[j], j))
                            )
                            a[d], a[d + half], b[d], b[d + half] = za.real, za.imag, zb.real, zb.imag
                    scores.append(
                        a @ b / math.sqrt(cfg.d_head)
                        + (40 * attn.distance_bias[h, i - j] if cfg.positions == "relative" else 0)
                    )
                out[i] += t.stack(scores).softmax(0) @ v[: i + 1] @ attn.W_O[h]
        x = x + out + (attn.o.bias if attn.o.bias is not None else 0)
    return norm(x) @ model.W_U


@pytest.mark.parametrize("norm, bias", [("rms", "qk"), ("none", "none"), ("rms", "all")])
@pytest.mark.parametrize("positions", POSITIONS)
@t.no_grad()
def test_forward_matches_the_slow_model(positions, norm, bias):
    model = random_model(positions, norm=norm, bias=bias)
    tokens = t.randint(30, (9,), generator=t.Generator().manual_seed(1))
    t.testing.assert_close(model(tokens[None])[0], slow_logits(model, tokens), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
@t.no_grad()
def test_no_token_sees_the_future(positions):
    model = random_model(positions)
    tokens = t.randint(30, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 30
    t.testing.assert_close(model(tokens)[:, :8], model(changed)[:, :8])
    assert not t.allclose(model(tokens)[:, 8:], model(changed)[:, 8:])


@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_attribution_sums_to_the_logit(positions, norm):
    model = random_model(positions, norm=norm)
    tokens = t.randint(30, (1, 20))
    for position in (0, 7, -1):
        assert attribution_error(logit_attribution(model, tokens, 3, position)) < 1e-4


@pytest.mark.parametrize("positions", ("rotary", "relative"))
@t.no_grad()
def test_qk_circuit_is_the_models_own_score(positions):
    model = random_model(positions)
    tokens = t.tensor([[4, 9, 2, 17, 5]])
    _, cache = run_with_cache(model, tokens, "blocks.0.attn.hook_attn_scores")
    for query, key in ((4, 1), (3, 3), (2, 1)):
        score = qk_circuit(model, 0, 1, tokens[0, [query]], tokens[0, [key]], query - key)
        assert score.item() == pytest.approx(cache["attn_scores", 0][0, 1, query, key].item(), abs=1e-4)


@t.no_grad()
def test_ov_circuit_and_its_eigenvalues_match_the_dense_matrix():
    model = random_model()
    dense = read_embed(model) @ model.blocks[1].attn.W_V[2] @ model.blocks[1].attn.W_O[2] @ model.W_U
    ids = t.tensor([3, 11, 28])
    t.testing.assert_close(ov_circuit(model, 1, 2, ids, ids), dense[ids][:, ids])
    full = t.linalg.eigvals(dense.double())
    largest = full[full.abs().argsort(descending=True)[:8]]
    t.testing.assert_close(
        ov_eigenvalues(model, 1, 2).abs().sort().values, largest.abs().sort().values, rtol=1e-4, atol=1e-6
    )


def test_composition_matches_the_dense_formula():
    a, b, c, d = (t.randn(20, 4) for _ in range(4))
    A, B = a @ b.mT, c @ d.mT
    assert composition((a, b.mT), (c, d.mT)).item() == pytest.approx(
        ((A @ B).norm() / (A.norm() * B.norm())).item(), rel=1e-4
    )


@pytest.mark.parametrize("layer", [0, 1])
@t.no_grad()
def test_norm_based_analysis_matches_loops(layer):
    model = random_model("relative")
    tokens = t.randint(30, (1, 6))
    _, cache = run_with_cache(model, tokens)
    out, attn, x = norm_based(model, tokens, layer), model.blocks[layer].attn, cache["resid_pre", layer][0]
    after = cache["resid_post", layer][0]
    for i in range(6):
        moved = t.stack(
            [
                sum(cache["pattern", layer][0, h, i, j] * cache["v", layer][0, j, h] @ attn.W_O[h] for h in range(3))
                for j in range(6)
            ]
        )
        moved[i] += x[i]
        t.testing.assert_close(moved.sum(0), after[i], atol=1e-4, rtol=1e-4)
        t.testing.assert_close(out["block"][i], moved.norm(dim=1), atol=1e-4, rtol=1e-4)
        t.testing.assert_close(
            out["normed"][i], moved.norm(dim=1) / after[i].pow(2).mean().sqrt(), atol=1e-3, rtol=1e-3
        )
        mixed = (moved.sum(0) - moved[i]).norm()
        assert out["mixing"][i].item() == pytest.approx((mixed / (mixed + moved[i].norm())).item(), abs=1e-4)


def test_rotary_scores_depend_on_the_offset_alone():
    q, k = t.randn(8), t.randn(8)
    line = lambda x: rotate(x.expand(1, 20, 1, 8), 4, 100.0)[0, :, 0]
    scores = line(q) @ line(k).T
    assert all(t.allclose(scores.diagonal(-o), scores[o, 0], atol=1e-4) for o in range(10))
    t.testing.assert_close(line(q)[:, 4:], q[4:].expand(20, 4))


def test_loss_by_position_and_icl_score():
    model = random_model()
    rows = t.randint(30, (5, 20))
    mean = F.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert loss_by_position(model, rows, batch=2).mean().item() == pytest.approx(mean.item(), rel=1e-5)
    losses = t.zeros(8, 255)
    losses[:, 41:58], losses[:, -16:] = 3.0, 2.0  # position p is entry p - 1
    assert icl_score(losses) == (-1.0, 0.0)


def test_skip_trigrams_read_both_circuits():
    """One head, attends from token 1 to token 2 and, seeing 2, says 3."""
    model = AttnOnly(AttnOnlyConfig(1, 1, 2 * V, V, V, 8, "relative", norm="none", bias="none"))
    with t.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.weight[:, :V], model.unembed.weight[:, V:] = t.eye(V), t.eye(V)
        attn = model.blocks[0].attn
        attn.q.weight[0, 1] = attn.k.weight[0, 2] = attn.v.weight[0, 2] = 5.0
        attn.o.weight[V + 3, 0] = 1.0
    tokenizer = train_bpe(["a"], 257)
    name = lambda i: tokenizer.decode([i])
    (row,) = skip_trigrams(model, tokenizer, 0, t.arange(V), offset=1, n=1)
    assert row[0] == f"{name(2)} ... {name(1)} -> {name(3)}"


def test_save_and_reopen(tmp_path):
    model, tokens = random_model("shortformer"), t.randint(30, (1, 9))
    save_own(model, tmp_path / "m", train_bpe(["abc"], 257), best=0.5)
    again, tokenizer, scores = open_own(tmp_path / "m", "cpu")
    assert t.equal(again(tokens), model(tokens)) and scores == {"best": 0.5} and tokenizer.get_vocab_size() == 257
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "d_model": 12}))
    with pytest.raises(SystemExit, match="does not fit"):
        open_own(tmp_path / "m", "cpu")
    (tmp_path / "m/model.safetensors").write_bytes(b"junk")
    with pytest.raises(SystemExit, match="corrupt"):
        open_own(tmp_path / "m", "cpu")
    with pytest.raises(SystemExit, match="no config.json"):
        open_own(tmp_path, "cpu")


@t.no_grad()
def test_the_committed_model_learned_induction_from_natural_text_alone():
    model, tokenizer, scores = open_own(ROOT / "models/attn_only_2l", "cpu")
    assert (
        "--repeats 0" in scores["command"]
        and sum(file.stat().st_size for file in (ROOT / "models/attn_only_2l").iterdir()) < 3e6
    )
    common = sorted(
        {
            i
            for word in "the self return of and is in to not for if def import None True class name value type file".split()
            for i in tokenizer.encode(word + " " + word, add_special_tokens=False).ids
        }
    )
    prefix = head_scores(model, 2, repeated_tokens(32, 12, t.tensor(common), bos=0), 12)["prefix_matching"]
    assert prefix[1].max() > 0.4 and prefix[0].max() < 0.2
    assert scores["over_training"][0]["prefix_matching"] < 0.2 < 0.6 < scores["over_training"][-1]["prefix_matching"]


def test_attention_page_is_self_contained():
    page = attention_page(["<s>", "a</script>", " b"], t.ones(2, 3, 3).tril() / 3, ["L0H0", "L0H1"], "A & B")
    assert "http" not in page and page.count("</script>") == 1 and "A &amp; B" in page and '"L0H1"' in page


# %% The script, as a newcomer runs it
FAST = ("--steps", "12", "--tokens-per-step", "1024", "--contexts", "32", "128", "--context-steps", "0.5")


@pytest.mark.parametrize(
    "flags",
    [
        ("--n-layers", "1", "--n-heads", "1"),
        ("--positions", "rotary", "--repeats", "0", "--no-control", "--optimizer", "adamw"),
    ],
)
def test_every_variant_runs(run, workdir, flags):
    done = run("attn_only.py", *FAST, *flags)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_position_scheme_trains(positions, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    cfg = Config(steps=6, tokens_per_step=512, contexts=(32, 64), positions=positions, device="cpu", save_every=0)
    model, history = train_own(cfg, 2, load_corpus(), "cpu")
    assert history["loss"][-1] < history["loss"][0] and all(
        p.grad is None or p.grad.isfinite().all() for p in model.parameters()
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--answer", "qqqzzz"), ("no token reads 'qqqzzz'",)),
        (("--data", "missing.txt"), ("--data missing.txt",)),
        (("--device", "cuda"), ("--device cuda",)),
        (("--model", "nowhere"), ("--model nowhere",)),
        (("--prompt", ""), ("--prompt is empty",)),
    ],
)
def test_bad_input_gets_one_line(run, workdir, flags, words):
    if "cuda" in flags and t.cuda.is_available():
        pytest.skip("there is a cuda device here")
    one_line_error(run("attn_only.py", "--n-layers", "1", *FAST, *flags), *words)
