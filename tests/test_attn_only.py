import json
import math

import pytest
import torch as t
import torch.nn.functional as F
from conftest import ROOT, one_line_error
from torch import Tensor

from heads import head_scores, repeated_tokens
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
from data import load_corpus, train_bpe
from hooks import act_name, run_with_cache, run_with_hooks

V = 40
POSITIONS = ("rotary", "learned", "shortformer", "relative")


def random_model(positions: str = "rotary", n_layers: int = 2, **more) -> AttnOnly:
    """Weights large enough that a wrong formula shows."""
    t.manual_seed(0)
    cfg = AttnOnlyConfig(
        n_layers=n_layers,
        n_heads=3,
        d_model=24,
        d_head=8,
        d_vocab=30,
        n_ctx=32,
        positions=positions,
        **more,
    )
    model = AttnOnly(cfg).eval()
    with t.no_grad():
        for name, p in model.named_parameters():
            size = 0.02 if "distance" in name else 0.3
            p.copy_(t.randn(p.shape) * size)
    return model


@pytest.fixture(scope="module")
def induction() -> AttnOnly:
    """
    By hand: L0H0 attends one back and copies that token into a second subspace; L1H0 looks there for its own token and
    copies what it finds. L0H1 and L1H1 do nothing.
    """
    cfg = AttnOnlyConfig(
        n_layers=2,
        n_heads=2,
        d_model=3 * V,
        d_head=V,
        d_vocab=V,
        n_ctx=64,
        positions="relative",
        norm="none",
        bias="none",
    )
    model = AttnOnly(cfg).eval()
    identity = t.eye(V)
    token = slice(0, V)  # three subspaces of the stream: what stands here,
    previous = slice(V, 2 * V)  # what stands one back,
    said = slice(2 * V, 3 * V)  # and what to say
    first = model.blocks[0].attn
    second = model.blocks[1].attn
    with t.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.weight[:, token] = identity
        model.unembed.weight[:, said] = identity
        first.distance_bias[0, 1] = 1.0
        first.v.weight[:V, token] = identity
        first.o.weight[previous, :V] = identity
        second.q.weight[:V, token] = 400 * identity
        second.k.weight[:V, previous] = identity
        second.v.weight[:V, token] = identity
        second.o.weight[said, :V] = 30 * identity
    return model


@pytest.fixture(scope="module")
def repeats() -> Tensor:
    once = t.stack([t.randperm(V - 1, generator=t.Generator().manual_seed(i))[:20] + 1 for i in range(6)])
    begin = t.zeros(6, 1, dtype=t.long)
    return t.cat([begin, once, once], 1)


# %% The hand-built induction head is found, explained and broken
def test_scores_name_the_heads(induction, repeats):
    scores = head_scores(induction, 2, repeats, 20)
    assert scores["previous_token"][0, 0] > 0.999
    assert scores["prefix_matching"][1, 0] > 0.999
    assert scores["prefix_matching"][0].max() < 0.1
    assert scores["prefix_matching"][1, 1] < 0.1
    losses = loss_by_position(induction, repeats)
    assert losses[:, 21:].max() < 1e-3
    assert losses[:, 1:19].mean() > 2


def test_ablation_breaks_it_only_at_its_source(induction, repeats):
    assert ablated_scores(induction, repeats, 20, 0, 0)["prefix_matching"][1, 0] < 0.1
    assert ablated_scores(induction, repeats, 20, 0, 1)["prefix_matching"][1, 0] > 0.999


def test_path_patching_finds_the_key_path(induction, repeats):
    corrupt = repeats.clone()
    corrupt[:, 1:21] = repeats[:, 1:21].roll(1, 0)
    lost, clean, bad = path_patch(induction, repeats, corrupt, 20)
    assert clean > -1e-3
    assert bad < -2
    assert lost["k"][0, 0] > 0.9
    assert sum(x.abs().sum() for x in lost.values()) - lost["k"][0, 0] < 0.02


def one_path_patched(model: AttnOnly, clean: Tensor, corrupt: Tensor, sender: int, room: str, receiver: int) -> Tensor:
    """
    Logits of the clean rows when one head's q, k or v input alone hears the sender's corrupt output.
    Whole runs, one path at a time.
    """
    _, corrupt_cache = run_with_cache(model, corrupt, act_name("z", 0))
    found = {}

    def send(z: Tensor, hook) -> Tensor:
        z = z.clone()
        z[:, :, sender] = corrupt_cache["z", 0][:, :, sender]
        return z

    def keep(x: Tensor, hook) -> None:
        found["heard"] = x.clone()

    def receive(x: Tensor, hook) -> Tensor:
        x = x.clone()
        x[:, :, receiver] = found["heard"][:, :, receiver]
        return x

    run_with_hooks(model, clean, [(act_name("z", 0), send), (act_name(room, 1), keep)])
    return run_with_hooks(model, clean, [(act_name(room, 1), receive)])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm, bias", [("rms", "qk"), ("none", "all")])
@t.no_grad()
def test_path_patching_equals_whole_runs_one_path_at_a_time(positions, norm, bias):
    model = random_model(positions, norm=norm, bias=bias)
    half = 8
    clean = t.randint(30, (4, 2 * half + 1), generator=t.Generator().manual_seed(2))
    corrupt = clean.clone()
    corrupt[:, 1 : half + 1] = t.randint(30, (4, half), generator=t.Generator().manual_seed(3))
    lost, top, bottom = path_patch(model, clean, corrupt, half)
    for room in "qkv":
        for sender in range(3):
            for receiver in range(3):
                logits = one_path_patched(model, clean, corrupt, sender, room, receiver)
                said = logits[:, -half:-1].log_softmax(-1).gather(-1, clean[:, -half + 1 :, None]).mean().item()
                assert top - lost[room][sender, receiver].item() * (top - bottom) == pytest.approx(said, abs=2e-4)


def test_k_composition_stands_out(induction):
    scores, random, std = composition_scores(induction)
    of_equal_projections = 1 / math.sqrt(V)  # two projections onto the same V directions
    assert scores["K"][0, 0].item() == pytest.approx(of_equal_projections, rel=1e-4)
    assert scores["Q"][0, 0].item() == 0
    assert scores["V"][0, 0].item() == 0
    assert 0 < std < random


def test_copying_scores_know_copying_from_its_opposite(induction, repeats):
    assert copying_scores(induction, repeats)[1, 0] > 0.9
    assert eigenvalue_copying(induction)[1, 0] == pytest.approx(1)
    with t.no_grad():
        induction.blocks[1].attn.o.weight.neg_()
    assert copying_scores(induction, repeats)[1, 0] < -0.9
    assert eigenvalue_copying(induction)[1, 0] == pytest.approx(-1)
    with t.no_grad():
        induction.blocks[1].attn.o.weight.neg_()


def test_attribution_credits_the_copied_token(induction, repeats):
    parts = logit_attribution(induction, repeats[:1], int(repeats[0, 31]), position=30)
    assert parts["heads"][1, 0, 11] == pytest.approx(30, rel=1e-3)
    assert attribution_error(parts) < 1e-4
    assert parts["heads"].abs().sum() - parts["heads"][1, 0, 11] < 1e-2
    assert parts["direct"] == 0


# %% Against slow independent formulas, in every position scheme
def slow_rotated(x: Tensor, position: int, cfg: AttnOnlyConfig) -> Tensor:
    """One vector (d_head), turned plane by plane as a complex number."""
    x = x.clone()
    half = int(cfg.rotary_share * cfg.d_head / 2)
    for d in range(half):
        angle = position * cfg.rotary_base ** (-2 * d / (2 * half))
        turned = complex(x[d], x[d + half]) * complex(math.cos(angle), math.sin(angle))
        x[d] = turned.real
        x[d + half] = turned.imag
    return x


def slow_score(model: AttnOnly, layer: int, head: int, q: Tensor, k: Tensor, i: int, j: int) -> Tensor:
    """Attention score of the query at i for the key at j."""
    cfg = model.cfg
    if cfg.positions == "rotary":
        q = slow_rotated(q, i, cfg)
        k = slow_rotated(k, j, cfg)
    score = q @ k / math.sqrt(cfg.d_head)
    if cfg.positions == "relative":
        score = score + 40 * model.blocks[layer].attn.distance_bias[head, i - j]
    return score


def slow_head(model: AttnOnly, layer: int, head: int, read: Tensor) -> Tensor:
    """What one head writes (pos, d_model), one query at a time."""
    cfg = model.cfg
    attn = model.blocks[layer].attn
    part = slice(head * cfg.d_head, (head + 1) * cfg.d_head)
    read_qk = read + model.W_pos[: len(read)] if cfg.positions == "shortformer" else read
    q = read_qk @ attn.W_Q[head]
    k = read_qk @ attn.W_K[head]
    v = read @ attn.W_V[head]
    if attn.q.bias is not None:
        q = q + attn.q.bias[part]
        k = k + attn.k.bias[part]
    if attn.v.bias is not None:
        v = v + attn.v.bias[part]
    out = t.zeros_like(read)
    for i in range(len(read)):
        scores = [slow_score(model, layer, head, q[i], k[j], i, j) for j in range(i + 1)]
        out[i] = t.stack(scores).softmax(0) @ v[: i + 1] @ attn.W_O[head]
    return out


def slow_logits(model: AttnOnly, tokens: Tensor) -> Tensor:
    """One row, one head, one query at a time, from the weight properties alone."""

    def norm(x: Tensor) -> Tensor:
        if model.cfg.norm == "none":
            return x
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    x = model.W_E[tokens]
    if model.cfg.positions == "learned":
        x = x + model.W_pos[: len(tokens)]
    for layer, block in enumerate(model.blocks):
        read = norm(x)
        for head in range(model.cfg.n_heads):
            x = x + slow_head(model, layer, head, read)
        if block.attn.o.bias is not None:
            x = x + block.attn.o.bias
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
    early = (t.randn(20, 4), t.randn(4, 20))
    late = (t.randn(20, 4), t.randn(4, 20))
    A = early[0] @ early[1]
    B = late[0] @ late[1]
    dense = (A @ B).norm() / (A.norm() * B.norm())
    assert composition(early, late).item() == pytest.approx(dense.item(), rel=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
@t.no_grad()
def test_norm_based_analysis_matches_loops(layer):
    model = random_model("relative")
    tokens = t.randint(30, (1, 6))
    _, cache = run_with_cache(model, tokens)
    out = norm_based(model, tokens, layer)
    W_O = model.blocks[layer].attn.W_O
    pattern = cache["pattern", layer][0]  # (head, query, key)
    v = cache["v", layer][0]  # (key, head, d_head)
    x = cache["resid_pre", layer][0]
    after = cache["resid_post", layer][0]
    for i in range(6):
        moved = t.zeros_like(x)  # (key, d_model)
        for j in range(6):
            for h in range(3):
                moved[j] += pattern[h, i, j] * (v[j, h] @ W_O[h])
        moved[i] += x[i]
        t.testing.assert_close(moved.sum(0), after[i], atol=1e-4, rtol=1e-4)
        t.testing.assert_close(out["block"][i], moved.norm(dim=1), atol=1e-4, rtol=1e-4)
        t.testing.assert_close(
            out["normed"][i], moved.norm(dim=1) / after[i].pow(2).mean().sqrt(), atol=1e-3, rtol=1e-3
        )
        mixed = (moved.sum(0) - moved[i]).norm()
        assert out["mixing"][i].item() == pytest.approx((mixed / (mixed + moved[i].norm())).item(), abs=1e-4)


def test_loss_by_position_and_icl_score():
    model = random_model()
    rows = t.randint(30, (5, 20))
    mean = F.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert loss_by_position(model, rows, batch=2).mean().item() == pytest.approx(mean.item(), rel=1e-5)
    losses = t.zeros(8, 255)
    losses[:, 41:58] = 3.0  # position p is entry p - 1
    losses[:, -16:] = 2.0
    assert icl_score(losses) == (-1.0, 0.0)


def test_skip_trigrams_read_both_circuits():
    """One head, attends from token 1 to token 2 and, seeing 2, says 3."""
    cfg = AttnOnlyConfig(
        n_layers=1,
        n_heads=1,
        d_model=2 * V,
        d_head=V,
        d_vocab=V,
        n_ctx=8,
        positions="relative",
        norm="none",
        bias="none",
    )
    model = AttnOnly(cfg)
    attn = model.blocks[0].attn
    with t.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.weight[:, :V] = t.eye(V)
        model.unembed.weight[:, V:] = t.eye(V)
        attn.q.weight[0, 1] = 5.0
        attn.k.weight[0, 2] = 5.0
        attn.v.weight[0, 2] = 5.0
        attn.o.weight[V + 3, 0] = 1.0
    tokenizer = train_bpe(["a"], 257)
    source, destination, out = (tokenizer.decode([i]) for i in (2, 1, 3))
    (row,) = skip_trigrams(model, tokenizer, 0, t.arange(V), offset=1, n=1)
    assert row[0] == f"{source} ... {destination} -> {out}"


def test_save_and_reopen(tmp_path):
    model = random_model("shortformer")
    tokens = t.randint(30, (1, 9))
    save_own(model, tmp_path / "m", train_bpe(["abc"], 257), best=0.5)
    again, tokenizer, scores = open_own(tmp_path / "m", "cpu")
    assert t.equal(again(tokens), model(tokens))
    assert scores == {"best": 0.5}
    assert tokenizer.get_vocab_size() == 257
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
    folder = ROOT / "models/attn_only_2l"
    model, tokenizer, scores = open_own(folder, "cpu")
    assert "--repeats 0" in scores["command"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3e6
    words = "the self return of and is in to not for if def import None True class name value type file"
    common = set()
    for word in words.split():
        common.update(tokenizer.encode(word + " " + word, add_special_tokens=False).ids)
    rows = repeated_tokens(32, 12, t.tensor(sorted(common)), bos=0)
    prefix = head_scores(model, 2, rows, 12)["prefix_matching"]
    assert prefix[1].max() > 0.4
    assert prefix[0].max() < 0.2
    first, *_, last = scores["over_training"]
    assert first["prefix_matching"] < 0.2
    assert last["prefix_matching"] > 0.6


def test_attention_page_is_self_contained():
    page = attention_page(["<s>", "a</script>", " b"], t.ones(2, 3, 3).tril() / 3, ["L0H0", "L0H1"], "A & B")
    assert "http" not in page
    assert page.count("</script>") == 1
    assert "A &amp; B" in page
    assert '"L0H1"' in page


# %% The script, as a newcomer runs it
FAST = ("--steps", "12", "--tokens-per-step", "1024", "--contexts", "32", "128", "--context-steps", "0.5")


def numbers_of(run, workdir, *flags: str) -> tuple[dict, str]:
    """(results, what was printed) of a finished run."""
    done = run("attn_only.py", *FAST, *flags)
    assert done.returncode == 0, done.stderr
    return json.loads((workdir / "results/attn_only.json").read_text()), done.stdout


def not_numbers(x: object) -> list[float]:
    """Every nan and infinity in nested lists and dictionaries."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list):
        return [bad for part in x for bad in not_numbers(part)]
    return [x] if isinstance(x, float) and not math.isfinite(x) else []


CONTROL_SAID = ("1-layer control", "(the control)", "one layer reaches")


def test_the_control_is_named_where_it_is_trained(run, workdir):
    numbers, said = numbers_of(run, workdir)
    assert all(words in said for words in CONTROL_SAID)
    assert 0 <= numbers["best_prefix_matching_1_layer"] <= 1
    assert {"icl_score_1_layer", "icl_score_1_layer_95", "seconds_1_layer"} <= set(numbers)


@pytest.mark.parametrize(
    "flags",
    [
        ("--no-control",),
        ("--n-layers", "1"),
        ("--n-layers", "1", "--n-heads", "1"),
        ("--n-layers", "1", "--no-control"),
        ("--positions", "rotary", "--repeats", "0", "--no-control", "--optimizer", "adamw"),
    ],
)
def test_nothing_is_said_of_a_control_that_was_not_trained(run, workdir, flags):
    numbers, said = numbers_of(run, workdir, *flags)
    assert not any(words in said for words in CONTROL_SAID)
    assert " nan" not in said
    assert not not_numbers(numbers)
    assert not [key for key in numbers if "_1_layer" in key]
    assert {"best_prefix_matching", "heldout_loss", "icl_score", "train_seconds"} <= set(numbers)


def test_a_model_that_is_opened_has_no_control(run, workdir):
    # a tokenizer of its own reads the text again: a short one
    text = ("--data", str(ROOT / "README.md"), "--vocab", "300")
    numbers_of(run, workdir, "--no-control", *text)
    numbers, said = numbers_of(run, workdir, "--model", "checkpoints/attn_only/2_layers", *text)
    assert not any(words in said for words in CONTROL_SAID)
    assert " nan" not in said
    assert not not_numbers(numbers)
    assert not [key for key in numbers if "_1_layer" in key]


def test_one_head_a_layer_has_no_other_heads_to_compare(run, workdir):
    numbers, said = numbers_of(run, workdir, "--n-heads", "1", "--no-control")
    assert "prefix_matching_without_previous_token_head" in numbers
    assert "prefix_matching_without_another_head_min" not in numbers
    assert "another layer-0 head" not in said


def test_contexts_too_short_for_an_icl_score_have_none(run, workdir):
    numbers, said = numbers_of(run, workdir, "--contexts", "32", "--no-control")
    assert " nan" not in said
    assert not not_numbers(numbers)
    assert not [key for key in numbers if key.startswith("icl_score")]
    saved = json.loads((workdir / "checkpoints/attn_only/2_layers/config.json").read_text())
    assert set(saved["scores"]) == {"step", "tokens", "prefix_matching", "previous_token"}


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_position_scheme_trains(positions, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    cfg = Config(steps=6, tokens_per_step=512, contexts=(32, 64), positions=positions, device="cpu", save_every=0)
    model, history = train_own(cfg, 2, load_corpus(), "cpu")
    assert history["loss"][-1] < history["loss"][0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


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
