"""sae_probe.py against SAELens, scikit-learn, Hugging Face, and SAEs built by hand whose numbers are known."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch as t
from conftest import ROOT, memory_for, one_line_error

import data
import sae_probe
from anatomy import harvest
from interventions import put
from sae import stream
from world import Concept, DRAW, fact_prompts, label_sentences, read_countries
from sae_probe import Config
from sae import (
    OwnSAE,
    attribute,
    auroc,
    change,
    check_fit,
    fit_sae,
    judge,
    model_for,
    open_folder,
    open_release,
    read_features,
    run_probes,
    sparse,
    split,
    train_lens,
    train_own,
    training_sae,
    variant,
)

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def lens():
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    return SimpleNamespace(Metadata=SAEMetadata, **vars(sae_lens))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny GPT-2 with large random weights and the tokenizer of models/world."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    t.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=3072, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    for p in model.parameters():
        p.data += 0.3 * t.randn_like(p)
    path = tmp_path_factory.mktemp("tiny") / "gpt2"
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(ROOT / "models/world").save_pretrained(path)
    return str(path)


def identity_sae(lens, d_in: int, **metadata):
    """Every dimension and its negative is a feature: reconstructs exactly."""
    sae = lens.StandardSAE(lens.StandardSAEConfig(d_in=d_in, d_sae=2 * d_in, metadata=lens.Metadata(**metadata)))
    eye = t.eye(d_in)
    sae.load_state_dict(
        {
            "W_enc": t.cat([eye, -eye], 1),
            "W_dec": t.cat([eye, -eye]),
            "b_enc": t.zeros(2 * d_in),
            "b_dec": t.zeros(d_in),
        }
    )
    return sae


@pytest.fixture(scope="module")
def loaded(lens, folder, tmp_path_factory):
    """(SAE, model, rows): the identity SAE, saved, and the model that its metadata asks for."""
    path = tmp_path_factory.mktemp("sae")
    identity_sae(
        lens,
        16,
        model_name=folder,
        hook_name=HOOK,
        prepend_bos=True,
        context_size=24,
        model_from_pretrained_kwargs={"center_writing_weights": True},
    ).save_model(path)
    sae = open_folder(path, "cpu")
    model, _ = model_for(sae, None, "cpu")
    rows = t.zeros(40, 2, dtype=t.long)
    rows[:, 1] = t.randint(1, 3072, (40,), generator=t.Generator().manual_seed(0))
    while rows.shape[1] < 24:
        rows = t.cat([rows, model(rows)[:, -1:].argmax(-1)], 1)  # text that this model predicts
    return sae, model.requires_grad_(False), rows


@pytest.mark.parametrize("k, l1", [(5, 0.0), (None, 0.7)])
def test_the_objective_is_that_of_saelens(lens, k, l1):
    from sae_lens.saes.sae import TrainStepInput

    t.manual_seed(0)
    own, x, dead = OwnSAE(12, 40, k, l1), t.randn(30, 12), t.arange(40) % 3 == 0
    for p in own.parameters():
        p.data += 0.2 * t.randn_like(p)
    if k:
        theirs = lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(d_in=12, d_sae=40, k=k))
    else:
        theirs = lens.StandardTrainingSAE(lens.StandardTrainingSAEConfig(d_in=12, d_sae=40, l1_coefficient=l1))
    theirs.load_state_dict({name: p.detach().clone() for name, p in own.named_parameters()})
    loss, expected = own.loss(x, dead), theirs.training_forward_pass(TrainStepInput(x, {"l1": l1}, dead, 0, False)).loss
    loss.backward(), expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    grads = dict(theirs.named_parameters())
    for name, p in own.named_parameters():
        t.testing.assert_close(p.grad, grads[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "own"])
def test_true_features_are_recovered(lens, tmp_path, architecture):
    from sae_lens.synthetic import ConstantFiringProbabilityConfig, SyntheticModel, SyntheticModelConfig

    truth = SyntheticModel(
        SyntheticModelConfig(
            num_features=32, hidden_dim=24, seed=0, bias=False, firing_probability=ConstantFiringProbabilityConfig(0.1)
        )
    )
    t.manual_seed(0)

    def batches(step):
        while True:
            yield truth.sample(512)

    cfg = variant(
        f"{architecture}:{truth.activation_generator(4096).bool().sum(1).float().mean().round():g}",
        Config(steps=500, batch=512, lr=3e-3, checkpoints=0, d_sae=32),
    )
    sae = (
        train_own(batches, cfg, {}, "cpu")
        if architecture == "own"
        else train_lens(training_sae(cfg, 24, {}, "cpu"), batches, cfg, tmp_path, "cpu")
    )
    cosines = (
        t.nn.functional.normalize(truth.feature_dict.feature_vectors, dim=1)
        @ t.nn.functional.normalize(sae.W_dec.detach(), dim=1).T
    )
    assert cosines.max(1).values.mean() >= 0.9


@pytest.mark.parametrize("architecture", list(sae_probe.SPARSITY))
def test_every_kind_trains_saves_and_is_found_again(lens, loaded, folder, tmp_path, monkeypatch, capsys, architecture):
    _, model, _ = loaded
    monkeypatch.chdir(tmp_path)
    corpus = SimpleNamespace(
        batch=lambda rng, n, ctx: t.from_numpy(np.pad(rng.integers(1, 3072, (n, ctx - 1)), ((0, 0), (1, 0)))),
        bos=0,
        key="random",
    )
    cfg = variant(
        f"{architecture}:{3 if sae_probe.SPARSITY[architecture] > 2 else ''}",
        Config(steps=12, batch=64, buffer=1000, context=24, d_sae=32, checkpoints=1, hook=HOOK),
    )
    sae = fit_sae(model, cfg, corpus, folder, "cpu")
    [path] = Path("checkpoints/sae_probe").iterdir()
    again = lens.SAE.load_from_disk(path)
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: p.shape for name, p in sae.named_parameters()
    }
    x = harvest(model, corpus.batch(np.random.default_rng(5), 4, 24), [HOOK])[HOOK]
    t.testing.assert_close(again.encode(x), sae.encode(x))
    assert (
        again.cfg.metadata.hook_name == HOOK
        and again.cfg.metadata.model_name == folder
        and sae.encode(x).count_nonzero() > 0
    )
    before = path.stat().st_mtime_ns
    fit_sae(model, cfg, corpus, folder, "cpu")
    assert "trained before" in capsys.readouterr().out and path.stat().st_mtime_ns == before


def test_the_stream_is_shuffled_and_complete(loaded):
    """Every activation comes once, in another order, and never more than the buffer and a batch of rows stand in memory."""
    _, model, rows = loaded
    straight = harvest(model, rows, [HOOK])[HOOK][:, 1:].flatten(0, 1)
    batches = stream(model, HOOK, lambda i: rows[(4 * i) % 40 :][:4], 10, 200, 0)
    taken = t.cat([next(batches) for _ in range(70)])
    gap, match = t.cdist(taken, straight, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert gap.max() < 1e-4
    assert (match[1:] - match[:-1] == 1).float().mean() < 0.1
    assert np.bincount(match.numpy()).max() <= 2 and len(set(match[:700].tolist())) > 600


def test_metadata_decides_the_processing(loaded, folder):
    """center_writing_weights: the stream is Hugging Face's less its mean, and nothing else has changed."""
    from transformers import AutoModelForCausalLM

    _, model, rows = loaded
    theirs = AutoModelForCausalLM.from_pretrained(folder)(rows[:4], output_hidden_states=True)
    expected = theirs.hidden_states[1] - theirs.hidden_states[1].mean(-1, keepdim=True)
    t.testing.assert_close(harvest(model, rows[:4], [HOOK])[HOOK], expected.detach(), rtol=1e-3, atol=1e-3)
    t.testing.assert_close(model(rows[:4]).log_softmax(-1), theirs.logits.log_softmax(-1), rtol=1e-3, atol=1e-3)


def test_judge_knows_the_perfect_and_the_empty(lens, loaded, capsys):
    sae, model, rows = loaded
    numbers, codes = judge(model, sae, rows, 1)
    with memory_for(model, 9):
        again, same_codes = judge(model, sae, rows, 1)
    assert (
        again == pytest.approx(numbers, abs=1e-4)
        and abs(same_codes - codes).max() < 1e-4
        and "out of memory: going on with 5 rows" in capsys.readouterr().out
    )
    assert numbers["ce_recovered"] == pytest.approx(1, abs=1e-4) and numbers["fvu"] < 1e-9
    assert numbers["l0"] == pytest.approx(16, abs=0.01) and numbers["n_tokens"] == 40 * 23 == codes.shape[0]
    x = harvest(model, rows, [HOOK])[HOOK][:, 1:].flatten(0, 1)
    assert (
        numbers["dead_fraction"]
        == ((x > 0).any(0).logical_not().sum() + (x < 0).any(0).logical_not().sum()).item() / 32
    )
    empty = identity_sae(lens, 16, hook_name=HOOK)
    empty.load_state_dict({name: p * 0 for name, p in empty.state_dict().items()} | {"b_dec": x.mean(0)})
    numbers, _ = judge(model, empty.requires_grad_(False), rows, 1)
    assert (
        numbers["ce_recovered"] == pytest.approx(0, abs=1e-3)
        and numbers["fvu"] == pytest.approx(1, abs=1e-4)
        and numbers["dead_fraction"] == 1
        and numbers["l0"] == 0
    )
    with t.no_grad():
        clean = t.nn.functional.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
    assert numbers["ce_clean"] == pytest.approx(clean, rel=1e-4) and numbers["ce_zero_ablated"] != pytest.approx(
        clean, rel=1e-3
    )


def test_edits_do_what_they_say(loaded):
    sae, model, rows = loaded
    x, f = harvest(model, rows[:2], [HOOK])[HOOK], 3
    feature = lambda y: sae.encode(y)[..., f]
    assert feature(x).max() > 0
    assert feature(x + change(sae, f, "ablate", x, 9.0)).abs().max() < 1e-5
    assert (x + change(sae, f, "project", x, 9.0))[..., f].abs().max() < 1e-5
    t.testing.assert_close(
        feature(x + change(sae, f, "clamp", x, 9.0))[feature(x) > 0], t.full_like(feature(x)[feature(x) > 0], 9.0)
    )
    t.testing.assert_close(change(sae, f, "add", x, 2.5).norm(dim=-1), t.full(x.shape[:2], 2.5))
    y = put(lambda x: x * 0, 1)(x, hook=None)
    assert (y[:, 1:] == 0).all() and (y[:, 0] == x[:, 0]).all()


def test_attribution_falls_as_a_direct_edit_does(lens, loaded):
    """With the error held, removing a feature takes its decoder row, and nothing else, out of the stream; near the end the gradient is exact for small steps."""
    from hooks import run_with_hooks

    _, model, rows = loaded
    t.manual_seed(0)
    sae = lens.TopKSAE(
        lens.TopKSAEConfig(d_in=16, d_sae=64, k=4, metadata=lens.Metadata(hook_name=HOOK))
    ).requires_grad_(False)
    tokens, weights = rows[:1, :9], t.nn.functional.one_hot(t.tensor(7), 3072).float()
    traced, falls = attribute(model, sae, tokens, weights)
    assert traced["moved"] < 1e-3 and traced["value"].item() == pytest.approx(model(tokens)[0, -1, 7].item(), abs=1e-3)
    acts = sae.encode(harvest(model, tokens, [HOOK])[HOOK])[0]
    assert (traced["features"][acts == 0] == 0).all()
    for pos, f in (acts[-2:] > 0).nonzero()[:3].tolist():
        pos += len(acts) - 2
        out = t.zeros(1, 9, 16)
        out[0, pos] = acts[pos, f] * sae.W_dec[f]
        direct = traced["value"] - run_with_hooks(model, tokens, [(HOOK, put(lambda x: x - out))])[0, -1, 7]
        assert falls(pos, f) == pytest.approx(direct.item(), abs=1e-3)
        bit = (
            traced["value"] - run_with_hooks(model, tokens, [(HOOK, put(lambda x: x - 1e-2 * out))])[0, -1, 7]
        ).item() / 1e-2
        assert traced["features"][pos, f].item() == pytest.approx(bit, rel=0.1, abs=0.05)


def test_auroc_is_scikit_learns_and_its_weights_repeat_tokens():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    y, score = rng.random(300) < 0.3, rng.integers(0, 6, 300).astype(float)
    score[y] += rng.integers(0, 3, y.sum())
    times = rng.integers(0, 3, (4, 300))
    assert auroc(y, score)[0] == pytest.approx(roc_auc_score(y, score))
    for w, value in zip(times, auroc(y, score, times)):
        assert value == pytest.approx(roc_auc_score(np.repeat(y, w), np.repeat(score, w)))


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(ROOT / "models/world/tokenizer.json"))


def test_labels_stand_on_the_last_token_of_their_entity(tokenizer):
    countries = read_countries()
    prompts = [p for p in fact_prompts(countries, "forward", True) if "Everyone" in p.text] + [
        DRAW[task](sae_probe.Random(i), True) for i in range(20) for task in ("ioi", "agreement")
    ]
    labelled = label_sentences(tokenizer, prompts, t.tensor([[5, 6, 7]]), 10_000, 0)
    names = {
        "country": {r["country"] for r in countries},
        "capital": {r["capital"] for r in countries},
        "name": set(data.WOMEN + data.MEN),
        "object": set(data.OBJECTS),
        "place": set(data.PLACES),
    }
    seen = {role: set() for role in names}
    for row, pos, role in zip(labelled.row, labelled.pos, labelled.role):
        if role in names:
            before = tokenizer.decode(labelled.rows[row][: pos + 1])
            seen[role] |= {name for name in names[role] if before.endswith(f" {name}")}
            assert any(before.endswith(f" {name}") for name in names[role]), (before, role)
        if role in ("plural", "singular"):
            assert (
                tokenizer.decode(labelled.rows[row][: pos + 1]) == prompts[row].text
                and prompts[row].labels["number"] == role
            )
    both = names["country"] & names["capital"]
    assert (
        seen["country"] >= names["country"] - both
        and seen["capital"] >= names["capital"] - both
        and seen["name"]
        and seen["object"]
        and seen["place"]
    )
    continents = {r["country"]: r["continent"] for r in countries}
    africa = labelled.concepts["in Africa"]
    assert (
        all((continents[g] == "Africa") == y for g, y in zip(africa.group, africa.y)) and len(set(africa.group)) > 150
    )


def test_probes_find_what_is_there_for_new_entities_and_nothing_in_noise():
    """A concept written in columns 3 and 5 (either) is found by two columns; entities never stand in two parts; shuffled labels say nothing."""
    rng = np.random.default_rng(0)
    group = np.repeat([f"e{i}" for i in range(120)], 10)
    y = np.repeat(np.arange(120) < 40, 10)
    x = rng.exponential(size=(1200, 40)) * (rng.random((1200, 40)) < 0.1)
    which = np.repeat(rng.integers(0, 2, 120), 10)
    x[y & (which == 0), 3] += 4
    x[y & (which == 1), 5] += 4
    concept = Concept(np.arange(1200), y, group)
    part = split(concept, 1)
    assert (
        all(len(set(part[group == g])) == 1 for g in set(group))
        and 0.4 < (part == 0).mean() < 0.6
        and all(y[part == i].any() for i in range(3))
    )
    found = run_probes(concept, {"features": sparse(t.from_numpy(x))}, {"here": x}, 1)
    assert (
        set(found["2 features"]["units"]) == {3, 5}
        and found["2 features"]["test"] > 0.99 > 0.9 > found["single features"]["test"] > 0.6
    )
    assert found["dense here"]["test"] > 0.98
    shuffled = [run_probes(concept, {}, {"here": x}, seed)["shuffled labels"]["test"] for seed in range(6)]
    assert abs(np.mean(shuffled) - 0.5) < 0.15, shuffled
    low, high = np.nanpercentile(found["single features"]["boot"], (2.5, 97.5))
    assert low < found["single features"]["test"] < high


def test_the_page_holds_every_feature_and_needs_no_network(loaded, tokenizer):
    sae, model, rows = loaded
    _, codes = judge(model, sae, rows, 1)
    entries = read_features(model, sae, codes, rows, tokenizer, [0, 7, 20])
    acts = sae.encode(harvest(model, rows, [HOOK])[HOOK])[:, 1:]
    for entry in entries:
        f = entry["id"]
        row, pos = divmod(int(acts[..., f].flatten().argmax()), 23)
        words, shades = entry["contexts"][0]
        assert entry["max"] == pytest.approx(acts[..., f].max().item(), abs=0.01) and entry["density"] == pytest.approx(
            (acts[..., f] > 0).float().mean().item(), abs=1e-6
        )
        assert (
            max(shades) == 100
            and sae_probe.visible(tokenizer.decode([int(rows[row, pos + 1])])) == words[shades.index(100)]
        )
        assert sum(entry["histogram"]) == (acts[..., f] > 0).sum() and len(entry["up"]) == 8
    opposite = next(entry for entry in entries if entry["id"] == 20)
    assert 4 not in [j for j, _ in opposite["near"]] and 4 not in [
        j for j, _ in opposite["with"]
    ]  # 4 and 20 are one dimension and its negative
    page = sae_probe.feature_page(entries, "Features <1>")
    assert not re.search(r"https?://", page) and json.loads(re.search(r"const F=(.*?),\$=id", page)[1])[1]["id"] == 7


@pytest.mark.parametrize(
    "change_, words",
    [
        (dict(hook_name="blocks.1.hook_resid_prr"), "hook_resid_prr.*close.*blocks.1.hook_resid_pre"),
        (dict(hook_name=None), "no place None"),
        (dict(d_in=12), "takes 12 numbers.*gives 16.*another model or hook"),
        (dict(hook_name="blocks.1.mlp.hook_post"), "takes 16 numbers.*gives 64"),
    ],
)
def test_a_sae_that_does_not_fit_is_refused(loaded, change_, words):
    _, model, rows = loaded
    with pytest.raises(SystemExit, match=words):
        check_fit(model, (asked := {"d_in": 16, "hook_name": HOOK} | change_)["hook_name"], asked["d_in"], rows[:1])


def test_other_errors_are_one_line(lens, loaded, folder, tmp_path):
    _, model, rows = loaded
    bad = lambda **metadata: model_for(
        identity_sae(lens, 16, **metadata), "gpt2" if "asked" in metadata else None, "cpu"
    )
    with pytest.raises(SystemExit, match="trained on .*tiny.*not on gpt2"):
        bad(model_name=folder, asked=1)
    with pytest.raises(SystemExit, match="does not name its model"):
        bad()
    with pytest.raises(SystemExit, match="loaded with attn_implementation"):
        bad(model_name=folder, model_from_pretrained_kwargs={"attn_implementation": "x"})
    with pytest.raises(SystemExit, match="no such folder, and the hub said"):
        bad(model_name="nobody/nothing")
    with pytest.raises(SystemExit, match="other weights"):
        bad(model_name=str(ROOT / "models/world"), weights="0")
    with pytest.raises(SystemExit, match="no cfg.json"):
        open_folder(tmp_path, "cpu")
    with pytest.raises(
        SystemExit, match="no SAE 'blocks.8.hook_resid' in gpt2-small-res-jb; near: .*blocks.8.hook_resid_pre"
    ):
        open_release("gpt2-small-res-jb", "blocks.8.hook_resid", "cpu")
    with pytest.raises(SystemExit, match="cannot fetch gpt2-small-res-jb .*no network"):
        open_release("gpt2-small-res-jb", "blocks.8.hook_resid_pre", "cpu")
    for text, words in (
        ("tpk:8", "unknown architecture 'tpk'"),
        ("topk:many", "does not read"),
        ("topk:9999", "makes no sense"),
    ):
        with pytest.raises(SystemExit, match=words):
            variant(text, Config())
    with pytest.raises(SystemExit, match="NaN or infinite"):
        broken = sae_probe.copy.deepcopy(sae_probe.Llama.from_folder(str(ROOT / "models/world")))
        broken.embed.weight.data[7] = t.nan
        harvest(broken, t.tensor([[0, 7]]), [HOOK])


def test_a_misspelt_release_is_answered_with_its_neighbours(run):
    one_line_error(run("sae_probe.py", "--release", "gpt2-smal-res-jb"), "gpt2-smal-res-jb", "gpt2-small-res-jb")
