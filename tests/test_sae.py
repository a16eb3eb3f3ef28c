"""sae.py against SAELens, Hugging Face, and SAEs built by hand whose numbers are known."""

import copy
import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch as t
import torch.nn.functional as F
from conftest import ROOT, memory_for

import plots
from hooks import harvest, run_with_hooks
from interventions import put
from llama_block import Llama
from sae import (
    IDENTITY,
    SPARSITY,
    ActivationStream,
    OwnSAE,
    SAEConfig,
    as_saelens,
    check_fit,
    fingerprint,
    fit_sae,
    hook_for,
    key_of,
    losses_of,
    model_for,
    open_folder,
    open_release,
    sae_loss,
    settings_like,
    train_by_saelens,
    train_own,
    training_sae,
    variant,
    with_sparsity,
)
from features import (
    Attribution,
    change,
    cosines_with_others,
    encode_rows,
    heldout_rows,
    judge,
    nearest_cosines,
    read_features,
    require_good_sae,
)

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def saelens():
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    return SimpleNamespace(Metadata=SAEMetadata, **vars(sae_lens))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny GPT-2 with large random weights and the tokenizer of models/world."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    t.manual_seed(0)
    config = GPT2Config(vocab_size=3072, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    for p in model.parameters():
        p.data += 0.3 * t.randn_like(p)
    path = tmp_path_factory.mktemp("tiny") / "gpt2"
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(ROOT / "models/world").save_pretrained(path)
    return str(path)


def identity_sae(saelens, d_in: int, **metadata):
    """Every dimension and its negative is a feature: reconstructs exactly."""
    sae = saelens.StandardSAE(
        saelens.StandardSAEConfig(d_in=d_in, d_sae=2 * d_in, metadata=saelens.Metadata(**metadata))
    )
    eye = t.eye(d_in)
    weights = {
        "W_enc": t.cat([eye, -eye], 1),
        "W_dec": t.cat([eye, -eye]),
        "b_enc": t.zeros(2 * d_in),
        "b_dec": t.zeros(d_in),
    }
    sae.load_state_dict(weights)
    return sae


@pytest.fixture(scope="module")
def loaded(saelens, folder, tmp_path_factory):
    """(SAE, model, rows): the identity SAE, saved, and the model that its metadata asks for."""
    path = tmp_path_factory.mktemp("sae")
    metadata = {
        "model_name": folder,
        "hook_name": HOOK,
        "prepend_bos": True,
        "context_size": 24,
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }
    identity_sae(saelens, 16, **metadata).save_model(path)
    sae = open_folder(path, "cpu")
    model, _ = model_for(sae, None, (Llama,), "cpu")
    rows = t.zeros(40, 2, dtype=t.long)
    rows[:, 1] = t.randint(1, 3072, (40,), generator=t.Generator().manual_seed(0))
    while rows.shape[1] < 24:
        rows = t.cat([rows, model(rows)[:, -1:].argmax(-1)], 1)  # text that this model predicts
    return sae, model.requires_grad_(False), rows


# %% The objective
@pytest.mark.parametrize("k, l1", [(5, 0.0), (None, 0.7)])
@pytest.mark.parametrize("some_are_dead", [True, False])
def test_the_objective_is_that_of_saelens(saelens, k, l1, some_are_dead):
    from sae_lens.saes.sae import TrainStepInput

    t.manual_seed(0)
    own = OwnSAE(12, 40, k, l1)
    x = t.randn(30, 12)
    dead = (t.arange(40) % 3 == 0) & some_are_dead
    for p in own.parameters():
        p.data += 0.2 * t.randn_like(p)
    if k:
        theirs = saelens.TopKTrainingSAE(saelens.TopKTrainingSAEConfig(d_in=12, d_sae=40, k=k))
    else:
        theirs = saelens.StandardTrainingSAE(saelens.StandardTrainingSAEConfig(d_in=12, d_sae=40, l1_coefficient=l1))
    theirs.load_state_dict({name: p.detach().clone() for name, p in own.named_parameters()})
    loss = sae_loss(own, x, dead)
    expected = theirs.training_forward_pass(TrainStepInput(x, {"l1": l1}, dead, 0, False)).loss
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    grads = dict(theirs.named_parameters())
    for name, p in own.named_parameters():
        t.testing.assert_close(p.grad, grads[name].grad, rtol=1e-4, atol=1e-5)


def test_without_a_k_the_loss_is_squared_error_and_the_l1_norm_of_the_features():
    """Bricken et al. 2023, for decoder rows of unit length, in their own words."""
    t.manual_seed(0)
    own = OwnSAE(12, 40, None, l1=0.7)
    own.W_dec.data = F.normalize(own.W_dec.data, dim=1)
    x = t.randn(30, 12)
    features = F.relu((x - own.b_dec) @ own.W_enc + own.b_enc)
    rebuilt = features @ own.W_dec + own.b_dec
    expected = ((x - rebuilt) ** 2).sum(1).mean() + 0.7 * features.norm(p=1, dim=1).mean()
    assert sae_loss(own, x, t.ones(40, dtype=t.bool)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_with_the_penalty_training_reaches_the_least_that_the_loss_can_be():
    """
    Of data that is a times a direction or its negative, the least that squared error and l1 times the features can be
    is l1 a - l1^2 / 4, where every feature is l1 / 2 short of a: whatever the decoder, the features' sum is at least the
    length of what they say.
    """
    d, l1 = 4, 0.6
    t.manual_seed(0)

    def samples():
        while True:
            signs = t.randint(2, (256, 1)) * 2 - 1
            yield (1 + t.rand(256, 1)) * signs * t.eye(d)[t.randint(d, (256,))]

    own, scale, losses = train_own(samples(), 32, None, 400, 2e-2, 100, l1=l1)
    assert set(losses) == {"reconstruction", "sparsity", "total", "L0"}
    assert {len(by_step) for by_step in losses.values()} == {400}
    lengths = t.linspace(1, 2, 50)
    x = scale * t.cat([sign * a * t.eye(d) for a in lengths for sign in (1, -1)])
    a = x.norm(dim=1)
    with t.no_grad():
        loss = sae_loss(own, x, t.zeros(32, dtype=t.bool))
        features = own.encode(x).sum(1)
    least = (l1 * a - l1**2 / 4).mean()
    assert loss.item() == pytest.approx(least.item(), rel=0.01)
    assert loss >= least - 1e-4
    assert features.mean().item() == pytest.approx((a - l1 / 2).mean().item(), rel=0.01)


@pytest.mark.parametrize("k", [5, None])
def test_as_saelens_is_the_same_function_of_unscaled_activations(saelens, k):
    t.manual_seed(0)
    own = OwnSAE(12, 40, k, l1=0.7)
    for p in own.parameters():
        p.data += 0.2 * t.randn_like(p)
    scale = t.tensor(0.3)
    theirs = as_saelens(own, scale, {}, "cpu")
    assert isinstance(theirs, saelens.TopKSAE if k else saelens.StandardSAE)
    x = 4 * t.randn(30, 12)
    with t.no_grad():
        acts = own.encode(scale * x)
        t.testing.assert_close(theirs.encode(x), acts, rtol=1e-4, atol=1e-5)
        t.testing.assert_close(theirs.decode(acts), own.decode(acts) / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "own"])
def test_true_features_are_recovered(saelens, tmp_path, architecture):
    from sae_lens.synthetic import ConstantFiringProbabilityConfig, SyntheticModel, SyntheticModelConfig

    often = ConstantFiringProbabilityConfig(0.1)
    truth = SyntheticModel(
        SyntheticModelConfig(num_features=32, hidden_dim=24, seed=0, bias=False, firing_probability=often)
    )
    t.manual_seed(0)

    def samples():
        while True:
            yield truth.sample(512)

    k = truth.activation_generator(4096).bool().sum(1).float().mean().round()
    cfg = variant(f"{architecture}:{k:g}", SAEConfig(steps=500, batch=512, lr=3e-3, checkpoints=0, d_sae=32))
    if architecture == "own":
        own, scale, _ = train_own(samples(), cfg.d_sae, int(cfg.sparsity), cfg.steps, cfg.lr, cfg.dead_window)
        sae = as_saelens(own, scale, {}, "cpu")
    else:
        sae = train_by_saelens(training_sae(cfg, 24, {}, "cpu"), samples(), cfg, tmp_path, "cpu")
    true_directions = F.normalize(truth.feature_dict.feature_vectors, dim=1)
    cosines = true_directions @ F.normalize(sae.W_dec.detach(), dim=1).T
    assert cosines.max(1).values.mean() >= 0.9


# %% Training and finding again
@pytest.mark.parametrize("architecture", list(SPARSITY))
def test_every_kind_trains_saves_and_is_found_again(
    saelens, loaded, folder, tmp_path, monkeypatch, capsys, architecture
):
    _, model, _ = loaded
    monkeypatch.chdir(tmp_path)

    def random_rows(rng, n, ctx):
        return t.from_numpy(np.pad(rng.integers(1, 3072, (n, ctx - 1)), ((0, 0), (1, 0))))

    corpus = SimpleNamespace(batch=random_rows, bos=0, key="random")
    counts_features = SPARSITY[architecture] > 2
    cfg = variant(
        f"{architecture}:{3 if counts_features else ''}",
        SAEConfig(steps=12, batch=64, buffer=1000, context=24, d_sae=32, checkpoints=1, hook=HOOK),
    )
    sae = fit_sae(model, cfg, corpus, folder, "cpu")
    [path] = Path("checkpoints/sae_probe").iterdir()
    again = saelens.SAE.load_from_disk(path)
    shapes = {name: p.shape for name, p in again.named_parameters()}
    assert shapes == {name: p.shape for name, p in sae.named_parameters()}
    x = harvest(model, corpus.batch(np.random.default_rng(5), 4, 24), [HOOK])[HOOK]
    t.testing.assert_close(again.encode(x), sae.encode(x))
    assert again.cfg.metadata.hook_name == HOOK
    assert again.cfg.metadata.model_name == folder
    assert sae.encode(x).count_nonzero() > 0
    alike = settings_like(sae, SAEConfig(), l0=7.2)  # those of a baseline for a SAE that was loaded
    assert alike.architecture == {"own": "topk", "own_l1": "standard"}.get(architecture, architecture)
    assert alike.hook == HOOK
    assert alike.sparsity == (7 if counts_features else SPARSITY[alike.architecture])
    before = path.stat().st_mtime_ns
    fit_sae(model, cfg, corpus, folder, "cpu")
    assert "trained before" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before
    kept = losses_of(sae)
    second = {"own": {"revival"}, "own_l1": {"sparsity"}}
    if architecture not in second:
        assert kept == {}
        return
    assert set(kept) == {"reconstruction", "total", "L0"} | second[architecture]
    assert {len(by_step) for by_step in kept.values()} == {12}
    parts = np.sum([kept[name] for name in ("reconstruction", *second[architecture])], 0)
    np.testing.assert_allclose(parts, kept["total"], rtol=1e-5)


def test_the_key_of_a_finished_sae_stays_what_it_was():
    """Folders of earlier versions are found again."""
    cfg = with_sparsity(SAEConfig())
    identity = {
        "model_name": "models/world",
        "hook_name": cfg.hook,
        "prepend_bos": True,
        "context_size": 64,
        "weights": "0123456789",
        "data": "world",
    } | {field: getattr(cfg, field) for field in IDENTITY}
    assert key_of(cfg, identity) == "batchtopk_14_512_blocks.2.hook_resid_pre_2a39318c"


def test_settings_that_change_a_training_change_its_key():
    """A setting that is added must be said to be one of the training, or none."""
    of_the_model = {"model", "base", "sae", "release", "sae_id", "hook", "context", "data", "bos"}
    of_what_follows = {"checkpoints", "heldout", "min_recovered", "max_fvu", "wandb"}
    assert {setting.name for setting in fields(SAEConfig)} == set(IDENTITY) | of_the_model | of_what_follows


def test_the_stream_is_shuffled_and_complete(loaded):
    """
    Every activation comes once, in another order, and never more than the buffer and a batch of rows stand in memory.
    """
    _, model, rows = loaded
    straight = harvest(model, rows, [HOOK])[HOOK][:, 1:].flatten(0, 1)
    batches = ActivationStream(model, HOOK, lambda i: rows[(4 * i) % 40 :][:4], 10, 200, 0, None)
    taken = t.cat([next(batches) for _ in range(70)])
    gap, match = t.cdist(taken, straight, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert gap.max() < 1e-4
    assert (match[1:] - match[:-1] == 1).float().mean() < 0.1
    assert np.bincount(match.numpy()).max() <= 2
    assert len(set(match[:700].tolist())) > 600


def with_bos_inside(rows: t.Tensor) -> t.Tensor:
    rows = rows.clone()
    rows[:, 9] = 0
    rows[::2, 15] = 0
    return rows


def test_beginning_of_text_inside_rows_is_no_text(loaded):
    """Not in what a SAE is trained on, not in what is averaged when it is judged."""
    sae, model, rows = loaded
    rows = with_bos_inside(rows)
    x = harvest(model, rows, [HOOK])[HOOK]
    text = x[rows != 0]
    batches = ActivationStream(model, HOOK, lambda i: rows, 50, 200, 0, 0)
    taken = t.cat([next(batches) for _ in range(10)])
    assert t.cdist(taken, text, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 1e-4
    codes, _, mean = encode_rows(model, sae, rows, 1, 0)
    t.testing.assert_close(mean, text.mean(0), rtol=1e-4, atol=1e-5)
    assert codes.shape[0] == rows[:, 1:].numel()  # a code for every place; none fires where no text stands
    assert codes.getnnz(1)[(rows[:, 1:] == 0).flatten().numpy()].sum() == 0
    half = copy.deepcopy(sae)
    half.W_dec.data /= 2
    numbers, _ = judge(model, half, rows, 1, 0)
    assert numbers["n_tokens"] == len(text)
    assert numbers["l0"] == pytest.approx(16, abs=0.01)
    expected = (text / 2).pow(2).sum() / (text - text.mean(0)).pow(2).sum()
    assert numbers["fvu"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("architecture", ["own", "own_l1", "batchtopk", "jumprelu"])
def test_training_that_was_killed_ends_with_the_same_weights(loaded, folder, tmp_path, monkeypatch, architecture):
    _, model, rows = loaded
    rows = with_bos_inside(rows)
    calls = 0

    def batch(rng, n, ctx):
        nonlocal calls
        calls += 1
        if calls in killed:
            raise KeyboardInterrupt
        return rows[t.from_numpy(rng.integers(0, 40, 8))]

    corpus = SimpleNamespace(batch=batch, bos=0, key="rows")
    settings = SAEConfig(steps=100, batch=32, buffer=300, context=24, d_sae=32, checkpoints=9, hook=HOOK)
    cfg = variant(f"{architecture}:{3 if SPARSITY[architecture] > 2 else ''}", settings)
    killed = set()
    weights = []
    losses = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        calls = 0
        for attempt in range(4):
            killed = {(10, 4, 4, 0)[attempt]} if name == "killed" and attempt < 3 else set()
            calls = 0
            try:
                sae = fit_sae(model, cfg, corpus, folder, "cpu")
                weights.append(sae.state_dict())
                losses.append(losses_of(sae))
                break
            except KeyboardInterrupt:
                assert list(Path("checkpoints/sae_probe").glob("*.parts/**/*.pt"))
        assert attempt == (3 if name == "killed" else 0)
    for name, p in weights[0].items():
        assert t.equal(p, weights[1][name]), name
    assert losses[0] == losses[1]
    assert all(len(by_step) == cfg.steps for by_step in losses[0].values())


def test_heldout_rows_hold_the_tokens_asked_for_with_and_without_beginning_of_text():
    def natural(rng, n, ctx, split):
        assert split == "heldout"
        rows = rng.integers(1, 50, (n, ctx))
        rows[:, 0] = 0
        return rows

    corpus = SimpleNamespace(rows=natural, bos=0)
    with_bos = heldout_rows(corpus, 1000, 24, True, 0)
    assert with_bos.shape == (44, 24)  # 23 of each row are text
    assert (with_bos[:, 0] == 0).all()
    without = heldout_rows(corpus, 1000, 24, False, 0)
    assert without.shape == (42, 24)
    assert (without != 0).all()


# %% Loading
def test_metadata_decides_the_processing(loaded, folder):
    """center_writing_weights: the stream is Hugging Face's less its mean, and nothing else has changed."""
    from transformers import AutoModelForCausalLM

    _, model, rows = loaded
    theirs = AutoModelForCausalLM.from_pretrained(folder)(rows[:4], output_hidden_states=True)
    expected = theirs.hidden_states[1] - theirs.hidden_states[1].mean(-1, keepdim=True)
    t.testing.assert_close(harvest(model, rows[:4], [HOOK])[HOOK], expected.detach(), rtol=1e-3, atol=1e-3)
    t.testing.assert_close(model(rows[:4]).log_softmax(-1), theirs.logits.log_softmax(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "hook, d_in, words",
    [
        ("blocks.1.hook_resid_prr", 16, "hook_resid_prr.*close.*blocks.1.hook_resid_pre"),
        (None, 16, "no place None"),
        ("blocks.*.hook_resid_pre", 16, "whole name"),
        (HOOK, 12, "takes 12 numbers.*gives 16.*another model or hook"),
        ("blocks.1.mlp.hook_post", 16, "takes 16 numbers.*gives 64"),
    ],
)
def test_a_sae_that_does_not_fit_is_refused(loaded, hook, d_in, words):
    _, model, rows = loaded
    with pytest.raises(SystemExit, match=words):
        check_fit(model, hook, d_in, rows[:1])


def test_a_model_that_does_not_belong_to_the_sae_is_refused_in_one_line(saelens, folder):
    def ask(asked: str | None = None, **metadata):
        model_for(identity_sae(saelens, 16, **metadata), asked, (Llama,), "cpu")

    with pytest.raises(SystemExit, match="not at /nowhere/gpt2 any more: say by --model"):
        ask(model_name="/nowhere/gpt2")
    with pytest.raises(SystemExit, match="does not name its model"):
        ask()
    with pytest.raises(SystemExit, match="loaded with attn_implementation"):
        ask(model_name=folder, model_from_pretrained_kwargs={"attn_implementation": "x"})
    with pytest.raises(SystemExit, match="no such folder, and the hub said"):
        ask(model_name="nobody/nothing")
    with pytest.raises(SystemExit, match="other weights"):
        ask(model_name=str(ROOT / "models/world"), weights="0")


def test_the_weights_decide_whose_sae_it_is_not_the_name(saelens, capsys):
    """A model that was moved, or is called by another name, is accepted where its files are the same."""
    world = str(ROOT / "models/world")
    same = fingerprint(SimpleNamespace(folder=Path(world)))
    for name in ("/nowhere/world", "gpt2-small"):
        _, opened = model_for(identity_sae(saelens, 128, model_name=name, weights=same), world, (Llama,), "cpu")
        assert opened == world
        with pytest.raises(SystemExit, match="other weights"):
            model_for(identity_sae(saelens, 128, model_name=name, weights="0"), world, (Llama,), "cpu")
    assert "at your word" not in capsys.readouterr().out
    model_for(identity_sae(saelens, 128, model_name="gpt2-small"), world, (Llama,), "cpu")
    assert "taken at your word" in capsys.readouterr().out


def test_a_sae_without_a_hook_takes_the_one_asked_for(saelens):
    nameless = identity_sae(saelens, 16)
    hook_for(nameless, HOOK)
    assert nameless.cfg.metadata.hook_name == HOOK
    named = identity_sae(saelens, 16, hook_name="blocks.0.hook_resid_pre")
    hook_for(named, HOOK)
    assert named.cfg.metadata.hook_name == "blocks.0.hook_resid_pre"


def test_a_sae_that_cannot_be_opened_is_answered_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no cfg.json"):
        open_folder(tmp_path, "cpu")
    with pytest.raises(
        SystemExit, match="no SAE 'blocks.8.hook_resid' in gpt2-small-res-jb; near: .*blocks.8.hook_resid_pre"
    ):
        open_release("gpt2-small-res-jb", "blocks.8.hook_resid", "cpu")
    with pytest.raises(SystemExit, match="cannot fetch gpt2-small-res-jb .*no network"):
        open_release("gpt2-small-res-jb", "blocks.8.hook_resid_pre", "cpu")


@pytest.mark.parametrize(
    "text, words",
    [
        ("tpk:8", "unknown architecture 'tpk'"),
        ("topk:many", "does not read"),
        ("topk:9999", "makes no sense"),
    ],
)
def test_a_variant_that_makes_no_sense_is_answered_in_one_line(text, words):
    with pytest.raises(SystemExit, match=words):
        variant(text, SAEConfig())


def test_a_sparsity_of_zero_is_refused_not_replaced():
    assert with_sparsity(SAEConfig()).sparsity == SPARSITY["batchtopk"]
    with pytest.raises(SystemExit, match="makes no sense"):
        with_sparsity(SAEConfig(sparsity=0.0))


def test_broken_weights_are_said_to_be_broken():
    broken = copy.deepcopy(Llama.from_folder(str(ROOT / "models/world")))
    broken.embed.weight.data[7] = t.nan
    with pytest.raises(SystemExit, match="NaN or infinite"):
        harvest(broken, t.tensor([[0, 7]]), [HOOK])


# %% Judging
def test_a_sae_that_rebuilds_exactly_is_judged_perfect(loaded):
    sae, model, rows = loaded
    numbers, codes = judge(model, sae, rows, 1)
    assert numbers["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert numbers["fvu"] < 1e-9
    assert numbers["l0"] == pytest.approx(16, abs=0.01)  # of each dimension, it or its negative
    n_tokens = 40 * 23  # rows of 24 tokens, of which the first is no text
    assert numbers["n_tokens"] == n_tokens
    assert codes.shape == (n_tokens, 32)
    x = harvest(model, rows, [HOOK])[HOOK][:, 1:].flatten(0, 1)
    never_positive = (~(x > 0).any(0)).sum()
    never_negative = (~(x < 0).any(0)).sum()
    assert numbers["dead_fraction"] == (never_positive + never_negative).item() / 32


def test_judging_with_little_memory_gives_the_same_numbers_and_codes(loaded, capsys):
    sae, model, rows = loaded
    numbers, codes = judge(model, sae, rows, 1)
    with memory_for(model, 9):
        again, same_codes = judge(model, sae, rows, 1)
    assert again == pytest.approx(numbers, abs=1e-4)
    assert abs(same_codes - codes).max() < 1e-4
    # 40 rows are halved until at most 9 fit
    assert "out of memory: going on with 5 rows" in capsys.readouterr().out


def test_a_sae_without_features_is_judged_as_the_ablation_it_is(saelens, loaded):
    _, model, rows = loaded
    x = harvest(model, rows, [HOOK])[HOOK][:, 1:].flatten(0, 1)
    empty = identity_sae(saelens, 16, hook_name=HOOK)
    zeros = {name: p * 0 for name, p in empty.state_dict().items()}
    empty.load_state_dict(zeros | {"b_dec": x.mean(0)})
    numbers, _ = judge(model, empty.requires_grad_(False), rows, 1)
    # it puts the mean in the place of the activation: what mean ablation loses, and no variance is explained
    assert numbers["ce_recovered"] == pytest.approx(0, abs=1e-3)
    assert numbers["fvu"] == pytest.approx(1, abs=1e-4)
    assert numbers["dead_fraction"] == 1
    assert numbers["l0"] == 0
    with t.no_grad():
        logits = model(rows)
    clean = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
    assert numbers["ce_clean"] == pytest.approx(clean, rel=1e-4)
    assert numbers["ce_zero_ablated"] != pytest.approx(clean, rel=1e-3)


def test_the_gate_lets_only_saes_through_that_rebuild(capsys):
    cfg = SAEConfig()
    require_good_sae({"fvu": 0.1, "ce_recovered": 0.9}, cfg, HOOK)
    assert capsys.readouterr().out == ""
    require_good_sae({"fvu": 0.1, "ce_recovered": float("nan")}, cfg, HOOK)
    assert "costs this model nothing" in capsys.readouterr().out
    for judged, words in (
        ({"fvu": 0.6, "ce_recovered": 0.9}, "0.60 of the variance unexplained"),
        ({"fvu": float("nan"), "ce_recovered": 0.9}, "nan of the variance unexplained"),
        ({"fvu": 0.1, "ce_recovered": 0.4}, "0.40 of the cross-entropy is recovered"),
    ):
        with pytest.raises(SystemExit, match=words):
            require_good_sae(judged, cfg, HOOK)


# %% Acting
def test_edits_do_what_they_say(loaded):
    sae, model, rows = loaded
    f = 3
    x = harvest(model, rows[:2], [HOOK])[HOOK]

    def feature(y):
        return sae.encode(y)[..., f]

    fires = feature(x) > 0  # elsewhere its input is below zero, and a clamp falls short
    assert fires.any()
    assert feature(x + change(sae, f, "ablate", x, 9.0)).abs().max() < 1e-5
    assert (x + change(sae, f, "project", x, 9.0))[..., f].abs().max() < 1e-5
    clamped = feature(x + change(sae, f, "clamp", x, 9.0))[fires]
    t.testing.assert_close(clamped, t.full_like(clamped, 9.0))
    t.testing.assert_close(change(sae, f, "add", x, 2.5).norm(dim=-1), t.full(x.shape[:2], 2.5))
    with pytest.raises(ValueError, match="unknown edit 'remove'"):
        change(sae, f, "remove", x, 1.0)


@pytest.mark.parametrize("how, to", [("ablate", 0.0), ("clamp", 9.0)])
@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
def test_an_edit_of_a_feature_is_what_decoding_the_edited_codes_adds(saelens, norm, how, to):
    t.manual_seed(0)
    config = saelens.StandardSAEConfig(d_in=16, d_sae=64, normalize_activations=norm, metadata=saelens.Metadata())
    sae = saelens.StandardSAE(config).requires_grad_(False)
    x = 7 * t.randn(1, 5, 16) + 1
    acts = sae.encode(x)
    f = int(acts.sum((0, 1)).argmax())
    before = sae.decode(acts.clone())
    acts[..., f] = to
    sae.encode(x)  # keeps the norms again, which decoding forgets
    expected = sae.decode(acts) - before
    t.testing.assert_close(change(sae, f, how, x, 9.0), expected, rtol=1e-4, atol=1e-4)


def test_an_edit_is_put_from_its_first_position_on():
    x = t.randn(2, 5, 16)
    y = put(lambda x: x * 0, 1)(x, hook=None)
    assert (y[:, 1:] == 0).all()
    assert (y[:, 0] == x[:, 0]).all()


def test_attribution_falls_as_a_direct_edit_does(saelens, loaded):
    """
    With the error held, removing a feature takes its decoder row, and nothing else, out of the stream; near the end the
    gradient is exact for small steps.
    """
    _, model, rows = loaded
    t.manual_seed(0)
    config = saelens.TopKSAEConfig(d_in=16, d_sae=64, k=4, metadata=saelens.Metadata(hook_name=HOOK))
    sae = saelens.TopKSAE(config).requires_grad_(False)
    tokens = rows[:1, :9]
    weights = F.one_hot(t.tensor(7), 3072).float()
    traced = Attribution(model, sae, tokens, weights)
    assert traced.moved < 1e-3
    assert traced.value.item() == pytest.approx(model(tokens)[0, -1, 7].item(), abs=1e-3)
    acts = sae.encode(harvest(model, tokens, [HOOK])[HOOK])[0]
    assert (traced.features[acts == 0] == 0).all()

    def falls_by(removed):
        without = run_with_hooks(model, tokens, [(HOOK, put(lambda x: x - removed))])
        return (traced.value - without[0, -1, 7]).item()

    for late, f in (acts[-2:] > 0).nonzero()[:3].tolist():
        pos = late + len(acts) - 2
        out = t.zeros(1, 9, 16)
        out[0, pos] = acts[pos, f] * sae.W_dec[f]
        assert traced.falls(pos, f) == pytest.approx(falls_by(out), abs=1e-3)
        small_step = falls_by(1e-2 * out) / 1e-2
        assert traced.features[pos, f].item() == pytest.approx(small_step, rel=0.1, abs=0.05)


def test_without_the_error_node_the_metric_is_that_of_the_reconstruction(saelens, loaded):
    """
    The error's part of the metric is what the SAE leaves out: at one position, ablating it puts the reconstruction
    there.
    """
    _, model, rows = loaded
    t.manual_seed(0)
    config = saelens.TopKSAEConfig(d_in=16, d_sae=64, k=4, metadata=saelens.Metadata(hook_name=HOOK))
    sae = saelens.TopKSAE(config).requires_grad_(False)
    tokens = rows[:1, :9]
    traced = Attribution(model, sae, tokens, F.one_hot(t.tensor(7), 3072).float())

    def reconstruct_last(x):
        y = x.clone()
        y[:, -1] = sae.decode(sae.encode(x))[:, -1]
        return y

    rebuilt = run_with_hooks(model, tokens, [(HOOK, put(reconstruct_last))])[0, -1, 7]
    assert traced.falls(8, None) == pytest.approx((traced.value - rebuilt).item(), abs=1e-3)


# %% Reading
@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(ROOT / "models/world/tokenizer.json"))


def test_the_page_holds_every_feature_and_needs_no_network(loaded, tokenizer):
    sae, model, rows = loaded
    _, codes = judge(model, sae, rows, 1)
    entries = read_features(model, sae, codes, rows, tokenizer, [0, 7, 20])
    acts = sae.encode(harvest(model, rows, [HOOK])[HOOK])[:, 1:]
    for entry in entries:
        of_feature = acts[..., entry["id"]]
        row, pos = divmod(int(of_feature.flatten().argmax()), 23)
        words, shades = entry["contexts"][0]
        assert entry["max"] == pytest.approx(of_feature.max().item(), abs=0.01)
        assert entry["density"] == pytest.approx((of_feature > 0).float().mean().item(), abs=1e-6)
        assert max(shades) == 100
        strongest = plots.visible(tokenizer.decode([int(rows[row, pos + 1])]))
        assert words[shades.index(100)] == strongest
        assert sum(entry["histogram"]) == (of_feature > 0).sum()
        assert len(entry["up"]) == 8
    opposite = next(entry for entry in entries if entry["id"] == 20)  # 4 and 20 are one dimension and its negative
    assert 4 not in [j for j, _ in opposite["near"]]
    assert 4 not in [j for j, _ in opposite["with"]]
    page = plots.feature_page(entries, "Features <1>")
    assert not re.search(r"https?://", page)
    assert json.loads(re.search(r"const features = (.*?);\n", page)[1])[1]["id"] == 7


def test_nearest_cosines_are_those_of_all_pairs():
    directions = t.randn(1500, 6)
    unit = directions / directions.norm(dim=1, keepdim=True)
    every = (unit @ unit.T).fill_diagonal_(-1)
    t.testing.assert_close(nearest_cosines(directions), every.max(1).values)
    t.testing.assert_close(cosines_with_others(directions, t.tensor([3, 1200])), every[[3, 1200]])


def test_probing_tells_labels_by_the_features_of_an_autoencoder(saelens, run, tmp_path, workdir):
    """Every dimension of the stream and its negative is a feature: the best is the best dimension, at the SAE's layer."""
    sae = identity_sae(saelens, 128, hook_name="blocks.3.hook_resid_pre", model_name="models/world")
    sae.save_model(tmp_path / "sae")
    done = run("probing.py", "--n", "80", "--seeds", "2", "--sae", str(tmp_path / "sae"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    numbers = json.loads((workdir / "results/probing.json").read_text())
    for label, by_method in numbers["at_best"].items():
        assert by_method["1 feature"]["blocks"] == 3 and by_method["1 feature"]["auroc"] > 0.8
        assert len(numbers["best_features"][label]) == 2
        assert all(0 <= feature < 256 for feature in numbers["best_features"][label])
    assert re.search(r"the feature that tells it best, split by split: \x1b\S*f\d+ f\d+", done.stdout)
