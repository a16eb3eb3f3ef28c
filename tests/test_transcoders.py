"""transcoders.py against SAELens's own classes, and transcoders built by hand whose numbers are known."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch as t
import torch.nn.functional as F


import sae
from hooks import harvest, run_with_cache, run_with_hooks
from layers import next_token_loss
from llama_block import Llama, LlamaConfig
from sae import open_folder, ready
from transcoders import (
    Transcoder,
    TranscoderConfig,
    build,
    dead_feature_loss,
    encode_layers,
    fit_transcoders,
    judge_transcoders,
    keep_strongest,
    mlp_pairs,
    of_training,
    names_of_model,
    open_folders,
    places_of,
    refuse_misfits,
    save_transcoder,
    splice,
    train_transcoders,
    transcoder_loss,
    unscale,
)


def random_coder(skip: bool, layer: int = 0, d_in: int = 12, d_sae: int = 40) -> Transcoder:
    t.manual_seed(layer)
    coder = Transcoder(d_in, d_sae, d_in, skip, f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out")
    for p in coder.parameters():
        p.data += 0.3 * t.randn_like(p)
    coder.threshold += 0.5 * t.rand(d_sae)
    return coder.requires_grad_(False)


@pytest.fixture(scope="module")
def tiny() -> Llama:
    t.manual_seed(0)
    model = Llama(
        LlamaConfig(n_layers=2, n_heads=2, n_kv_heads=1, d_model=12, d_head=8, d_mlp=24, d_vocab=50, n_ctx=32)
    )
    for p in model.parameters():
        p.data += 0.15 * t.randn_like(p)
    return model.eval().requires_grad_(False)


def token_rows(i: int) -> t.Tensor:
    return t.randint(1, 50, (40, 16), generator=t.Generator().manual_seed(i))


# %% Files, in both directions
@pytest.mark.parametrize("skip", [False, True])
def test_a_saved_transcoder_is_saelens_s_own(tmp_path, skip):
    from sae_lens import SAE
    from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder

    coder = random_coder(skip)
    save_transcoder(coder, tmp_path / "layer_0", {"model_name": "models/world", "weights": "abc"})
    theirs = SAE.load_from_disk(tmp_path / "layer_0")
    assert type(theirs) is (JumpReLUSkipTranscoder if skip else JumpReLUTranscoder)
    assert theirs.cfg.metadata.hook_name_out == "blocks.0.hook_mlp_out"
    x = t.randn(3, 7, 12)
    t.testing.assert_close(theirs.encode(x), coder.encode(x))
    t.testing.assert_close(theirs(x), coder(x))
    assert 0 < (coder.encode(x) > 0).float().mean() < 0.6
    [again] = open_folders(tmp_path, "cpu")
    t.testing.assert_close(again(x), coder(x))
    assert names_of_model(tmp_path) == ("models/world", "abc")


@pytest.mark.parametrize("name", ["Transcoder", "SkipTranscoder"])
def test_saelens_s_plain_transcoders_are_read(tmp_path, name):
    import sae_lens.saes.transcoder as theirs
    from sae_lens.saes.sae import SAEMetadata

    t.manual_seed(0)
    places = SAEMetadata(hook_name="blocks.0.mlp.hook_in", hook_name_out="blocks.0.hook_mlp_out")
    config = getattr(theirs, f"{name}Config")(d_in=12, d_sae=40, d_out=10, apply_b_dec_to_input=False, metadata=places)
    made = getattr(theirs, name)(config).requires_grad_(False)
    for p in made.parameters():
        p.data += 0.3 * t.randn_like(p)
    made.save_model(tmp_path / "some_name")
    [read] = open_folders(tmp_path, "cpu")
    x = t.randn(20, 12)
    t.testing.assert_close(read(x), made(x))
    t.testing.assert_close(read.encode(x), made.encode(x))
    assert read.hook_in == "blocks.0.mlp.hook_in" and read.layer == 0


def test_a_release_s_transcoder_goes_through_the_same_door(monkeypatch):
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig

    import transcoders

    places = SAEMetadata(hook_name="blocks.0.ln2.hook_normalized", hook_name_out="blocks.0.hook_mlp_out")
    config = JumpReLUTranscoderConfig(d_in=12, d_sae=40, d_out=12, apply_b_dec_to_input=False, metadata=places)
    made = ready(JumpReLUTranscoder(config), transcoder=True)
    made.threshold.data += 0.4
    monkeypatch.setattr(transcoders, "open_release", lambda release, sae_id, device, transcoder: made)
    [read] = transcoders.open_releases("some-release", ("layer_0",), "cpu")
    x = t.randn(20, 12)
    t.testing.assert_close(read(x), made(x))


def test_what_is_no_transcoder_of_every_layer_is_refused_in_one_line(tmp_path, tiny):
    with pytest.raises(SystemExit, match="no cfg.json"):
        open_folders(tmp_path, "cpu")
    save_transcoder(random_coder(False, layer=1), tmp_path / "a", {})
    with pytest.raises(SystemExit, match=r"layers \[1\]: one of every layer from 0 on"):
        open_folders(tmp_path, "cpu")
    with pytest.raises(SystemExit, match="attribution.py --transcoders takes it"):
        open_folder(tmp_path / "a", "cpu")
    weights = {"W_enc": t.zeros(12, 40), "W_dec": t.zeros(40, 12)}
    with pytest.raises(SystemExit, match="is a topk, not a transcoder"):
        build({"architecture": "topk"}, {}, weights, "x", "cpu")
    with pytest.raises(SystemExit, match="normalises its input"):
        build({"architecture": "transcoder", "normalize_activations": "layer_norm"}, {}, weights, "x", "cpu")
    with pytest.raises(SystemExit, match="put hook_name_out into"):
        build({"architecture": "transcoder"}, {"hook_name": "blocks.0.ln2.hook_normalized"}, weights, "x", "cpu")
    placed = {"hook_name": "blocks.0.ln2.hook_normalized", "hook_name_out": "blocks.0.hook_mlp_out"}
    with pytest.raises(SystemExit, match="decoder's bias from its input"):
        build({"architecture": "transcoder", "apply_b_dec_to_input": True}, placed, weights, "x", "cpu")
    with pytest.raises(SystemExit, match="reshapes its input"):
        build({"architecture": "transcoder", "reshape_activations": "hook_z"}, placed, weights, "x", "cpu")
    for layer in range(2):
        save_transcoder(random_coder(False, layer), tmp_path / f"mixed/{layer}", {"model_name": f"model {layer}"})
    with pytest.raises(SystemExit, match="of several models .model_name: model 0, model 1"):
        open_folders(tmp_path / "mixed", "cpu")
    rows = token_rows(0)[:1]
    with pytest.raises(SystemExit, match="1 transcoders for a model of 2 layers"):
        refuse_misfits(tiny, [random_coder(False)], rows)
    both = [random_coder(False), random_coder(False, layer=1, d_in=13)]
    with pytest.raises(SystemExit, match="has 13 numbers at blocks.1.ln2.hook_normalized, this model 12"):
        refuse_misfits(tiny, both, rows)
    with pytest.raises(SystemExit, match="other weights"):
        refuse_misfits(tiny, both, rows, weights="0")


def test_a_batch_that_no_text_fills_is_refused(tiny):
    enters, written = places_of(tiny)
    pairs = mlp_pairs(tiny, enters, written, token_rows, 10_000, None, 0)
    with pytest.raises(SystemExit, match="fewer than a batch of 10000: --batch is too large"):
        next(pairs)


def test_settings_that_change_a_training_change_its_name():
    """A setting that is added counts as one of the training, unless it is listed as none."""
    names = set(of_training(TranscoderConfig()))
    assert names == {"skip", "d_sae", "k", "steps", "batch", "lr", "dead_window", "seed"}


def test_an_autoencoder_is_no_transcoder():
    with pytest.raises(SystemExit, match="a topk is no transcoder: sae_probe.py takes it"):
        ready(SimpleNamespace(cfg=SimpleNamespace(architecture=lambda: "topk")), transcoder=True)


# %% The objective
def test_the_loss_is_the_squared_error_of_the_strongest_features():
    """Written out in numpy."""
    coder = random_coder(True)
    x, y = t.randn(2, 30, 12)
    loss, fired, least = transcoder_loss(coder, x, y, k=3, dead=t.zeros(40, dtype=t.bool))
    pre = np.maximum(x.numpy() @ coder.W_enc.numpy() + coder.b_enc.numpy(), 0)
    bar = np.sort(pre.ravel())[-90]
    acts = np.where(pre >= bar, pre, 0)
    made = acts @ coder.W_dec.numpy() + coder.b_dec.numpy() + x.numpy() @ coder.W_skip.numpy().T
    assert loss.item() == pytest.approx(((y.numpy() - made) ** 2).sum(1).mean(), rel=1e-5)
    assert least.item() == pytest.approx(bar)
    assert (fired.numpy() == (acts > 0).any(0)).all() and 0 < fired.sum() < 40
    assert (keep_strongest(t.tensor(pre), 90)[0] > 0).sum() == 90


def test_dead_features_learn_what_those_of_an_autoencoder_would():
    """The same as sae.dead_feature_loss, which computes all columns and masks the living."""
    coder = random_coder(False).requires_grad_(True)
    x, error = t.randn(2, 30, 12)
    dead = t.arange(40) % 3 == 0
    ours = dead_feature_loss(coder, x, error, dead)
    [ours_gradient] = t.autograd.grad(ours, coder.W_enc)
    theirs = sae.dead_feature_loss(coder, x, error, dead)
    [their_gradient] = t.autograd.grad(theirs, coder.W_enc)
    t.testing.assert_close(ours, theirs)
    t.testing.assert_close(ours_gradient, their_gradient)


@pytest.mark.parametrize("skip", [False, True])
def test_unscaled_it_is_the_same_function(skip):
    coder = random_coder(skip)
    x = t.randn(20, 12)
    before = coder(x)
    acts = coder.encode(x)
    unscale(coder, t.tensor(3.0), t.tensor(0.2))
    t.testing.assert_close(coder.encode(x / 3), acts)
    t.testing.assert_close(coder(x / 3), before / 0.2, rtol=1e-4, atol=1e-4)


def sparse_world(seed: int, n: int = 256):
    """x is made of few of 24 directions, and y says each of them by another one: what a transcoder must find."""
    generator = t.Generator().manual_seed(seed)
    enters, written = F.normalize(t.randn(2, 24, 16, generator=generator), dim=-1)
    while True:
        active = (t.rand(n, 24, generator=generator) < 0.08) * (1 + t.rand(n, 24, generator=generator))
        yield (active @ enters)[None], (active @ written)[None]


def test_training_finds_what_is_read_and_what_is_written():
    t.manual_seed(0)
    [coder] = train_transcoders(sparse_world(3), 32, k=2, skip=False, steps=300, lr=1e-2, dead_window=30)
    x, y = next(sparse_world(3))
    missed = (y - coder(x)).pow(2).sum() / (y - y.mean(1)).pow(2).sum()
    assert missed < 0.25
    generator = t.Generator().manual_seed(3)
    _, written = F.normalize(t.randn(2, 24, 16, generator=generator), dim=-1)
    cosines = written @ F.normalize(coder.W_dec, dim=1).T
    assert cosines.max(1).values.mean() > 0.9
    assert 1 < (coder.encode(x) > 0).float().sum(-1).mean() < 3


def test_with_a_skip_what_is_linear_needs_no_feature():
    t.manual_seed(0)
    linear = t.randn(16, 16) / 4

    def pairs():
        while True:
            x = t.randn(1, 128, 16)
            yield x, x @ linear

    missed = {}
    for skip in (False, True):
        [coder] = train_transcoders(pairs(), 16, k=1, skip=skip, steps=150, lr=1e-2, dead_window=30)
        x, y = next(pairs())
        missed[skip] = ((y - coder(x)).pow(2).sum() / y.pow(2).sum()).item()
    assert missed[True] < 0.1 < 0.5 < missed[False]


def test_pairs_are_of_the_same_token_and_of_text_alone(tiny):
    enters, written = places_of(tiny)
    rows = token_rows(5)
    rows[:, 7] = 0  # a beginning-of-text inside the row
    x, y = next(mlp_pairs(tiny, enters, written, lambda i: rows, 64, bos=0, seed=0))
    assert x.shape == y.shape == (2, 64, 12)
    for layer, block in enumerate(tiny.blocks):
        t.testing.assert_close(block.mlp(block.ln2.weight * x[layer]), y[layer], rtol=1e-4, atol=1e-5)
    found = harvest(tiny, rows, enters)[enters[0]]
    all_pairs = list(zip(range(9), mlp_pairs(tiny, enters, written, lambda i: rows, 62, bos=0, seed=0)))
    seen = t.cat([x[0] for _, (x, _) in all_pairs[:9]])
    distance = t.cdist(found[:, 7], seen).min(1).values
    assert (distance > 1e-4).all()


def test_they_are_trained_saved_and_found_again(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def random_rows(rng, n, ctx):
        return t.from_numpy(rng.integers(1, 50, (n, ctx)))

    corpus = SimpleNamespace(batch=random_rows, bos=None, key="random")
    cfg = TranscoderConfig(steps=8, batch=64, context=16, d_sae=24, k=4)
    coders = fit_transcoders(tiny, cfg, corpus, "tiny", "cpu")
    assert [coder.hook_in for coder in coders] == places_of(tiny)[0]
    again = fit_transcoders(tiny, cfg, corpus, "tiny", "cpu")
    assert "trained before" in capsys.readouterr().out
    for one, other in zip(coders, again):
        t.testing.assert_close(one.W_enc, other.W_enc)
    fit_transcoders(tiny, replace(cfg, skip=True), corpus, "tiny", "cpu")
    assert len(list((tmp_path / "checkpoints/transcoders").iterdir())) == 2
    for path in (tmp_path / "checkpoints/transcoders").glob("*/*/cfg.json"):
        assert json.loads(path.read_text())["metadata"]["model_name"] == "tiny"


# %% Judging
def exact_coder(model: Llama, layer: int) -> Transcoder:
    """A skip transcoder that is the MLP, where that is made linear."""
    coder = Transcoder(12, 4, 12, True, f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out")
    for p in coder.parameters():
        p.data.zero_()
    coder.W_skip.data = model.linear_map[layer]
    return coder.requires_grad_(False)


@pytest.fixture
def linear(tiny, monkeypatch) -> Llama:
    """The tiny model with linear maps in the place of its MLPs."""
    tiny.linear_map = [0.3 * t.randn(12, 12, generator=t.Generator().manual_seed(layer)) for layer in range(2)]
    for layer, block in enumerate(tiny.blocks):
        monkeypatch.setattr(
            block.mlp, "forward", lambda x, block=block, layer=layer: (x / block.ln2.weight) @ tiny.linear_map[layer].T
        )
    return tiny


def test_a_transcoder_that_is_the_mlp_costs_nothing(linear):
    coders = [exact_coder(linear, layer) for layer in range(2)]
    judged, codes = judge_transcoders(linear, coders, token_rows(1), 1)
    clean = next_token_loss(linear(token_rows(1)), token_rows(1)).item()
    for told in judged:
        assert told["ce_clean"] == pytest.approx(clean, rel=1e-4)
        assert told["ce_replaced"] == pytest.approx(clean, rel=1e-4)
        assert told["fvu"] < 1e-6 and told["l0"] == 0 and told["dead_fraction"] == 1
    assert codes[0].shape == (40 * 15, 4)


def test_the_numbers_are_those_of_a_direct_computation(tiny):
    coders = [random_coder(layer == 1, layer) for layer in range(2)]
    rows = token_rows(2)
    judged, codes = judge_transcoders(tiny, coders, rows, 1, ce_rows=8)
    _, cache = run_with_cache(tiny, rows, [hook for coder in coders for hook in (coder.hook_in, coder.hook_out)])
    for coder, told, code in zip(coders, judged, codes):
        x, y = cache[coder.hook_in][:, 1:].flatten(0, 1), cache[coder.hook_out][:, 1:].flatten(0, 1)
        acts = coder.encode(x)
        np.testing.assert_allclose(code.toarray(), acts.numpy(), atol=1e-5)
        assert told["l0"] == pytest.approx((acts > 0).float().sum(1).mean().item())
        assert told["dead_fraction"] == pytest.approx((~(acts > 0).any(0)).float().mean().item())
        missed = (y - coder(x)).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
        assert told["fvu"] == pytest.approx(missed.item(), rel=1e-4)
    block = tiny.blocks[1]
    few = rows[:8]

    def replaced(x, *args):
        normalized = x / block.ln2.weight
        return t.cat([block_mlp(x[:, :1]), coders[1](normalized[:, 1:])], 1)

    block_mlp = block.mlp.forward
    block.mlp.forward = replaced
    by_hand = next_token_loss(tiny(few), few).item()
    del block.mlp.forward
    assert judged[1]["ce_replaced"] == pytest.approx(by_hand, rel=1e-4)
    assert judged[1]["ce_replaced"] != pytest.approx(judged[1]["ce_clean"], rel=1e-3)


def test_where_no_text_stands_the_mlp_stays(tiny):
    coders = [random_coder(False, layer) for layer in range(2)]
    rows = token_rows(3)[:2]
    nowhere = t.zeros_like(rows, dtype=t.bool)
    edits = [edit for coder in coders for edit in splice(coder, nowhere)]
    t.testing.assert_close(run_with_hooks(tiny, rows, edits), tiny(rows))
    rows[:, 5] = 0
    codes, _, _ = encode_layers(tiny, coders, rows, 1, bos=0)
    assert codes[0].toarray().reshape(2, 15, -1)[:, 4].sum() == 0
