"""
Interventions: the fast forms against the plain ones, against transformer_lens.patching, and against hooks written out
by hand.
"""

import csv
import json
import re
from dataclasses import dataclass

import pytest
import torch as t
import torch.nn as nn
from conftest import ROOT, memory_for, save_folder, tiny_hf
from models_for_tests import H, L, three_pairs, tiny_models

from logit_attribution import logit_parts
from hooks import act_name, missed_gates, peak_bytes, run_from, run_with_cache, run_with_hooks
from pairs import (
    Pairs,
    baselines,
    direct_attribution,
    draw_pairs,
    find_places,
    make_metric,
    make_pairs,
    mean_with_interval,
    normalised,
    position_masks,
    read_pairs,
    read_task,
    share_out,
)
from interventions import (
    HEADS,
    STREAM,
    activation_patch,
    causal_trace,
    embedding_std,
    knock_out,
    noised_pairs,
    sweep,
    sweep_gates,
)
from ablations import Part, ablate, ablation_effects, fine_parts, mean_ablation
from layers import next_token_loss
from llama_block import Llama
from utils import load_model
from weights import Streamed
from world import ENTITIES, read_countries


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return three_pairs()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return tiny_models()


@pytest.fixture(scope="module")
def world() -> Llama:
    return Llama.from_folder(str(ROOT / "models/world"))


def test_a_gate_that_is_nan_is_missed_and_half_precision_is_allowed_more(world):
    gates = {"exact": 0.0, "close": 1e-3, "nothing": float("nan")}
    assert missed_gates(gates, world) == ["close", "nothing"]
    half = Llama.from_folder(str(ROOT / "models/world"), dtype=t.bfloat16)
    assert missed_gates(gates, half) == ["nothing"]


# %% Activation patching
def one_run_per_cell(
    model: nn.Module, pairs: Pairs, site: str, by: str, direction: str, metric: str = "logit_diff"
) -> t.Tensor:
    """What sweep gives, by the plain form."""
    n_heads = model.cfg.n_heads
    if site in ("k", "v"):
        n_heads = model.blocks[0].attn.W_K.shape[0]
    positions = range(pairs.clean.shape[1])
    if by == "pos":
        cells = [{"position": p} for p in positions]
    elif by == "head":
        cells = [{"head": h} for h in range(n_heads)]
    else:
        cells = [{"head": h, "position": p} for h in range(n_heads) for p in positions]
    values = []
    for layer in range(L):
        for cell in cells:
            values.append(activation_patch(model, pairs, site, layer, **cell, metric=metric, direction=direction))
    shape = (n_heads, len(positions)) if by == "head pos" else (len(cells),)
    return t.stack(values).view(L, *shape, len(pairs))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_sweep_equals_activation_patch_on_our_llama(models, pairs, direction):
    model = models["ours"]
    sweeps = [(site, "pos") for site in (*STREAM, "z", "pattern", "post")]
    sweeps += [(site, by) for site in HEADS for by in ("head", "head pos")]
    for site, by in sweeps:
        expected = one_run_per_cell(model, pairs, site, by, direction)
        assert expected.std(0).max() > 0.01
        for memory_gb in (1.0, 1e-3):  # the second cuts the sweep into many runs
            found = sweep(model, pairs, site, by, direction=direction, memory_gb=memory_gb)
            t.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=f"{site} {by}")
    for metric in ("log_prob", "kl"):
        found = sweep(model, pairs, "resid_mid", metric=metric, direction=direction)
        expected = one_run_per_cell(model, pairs, "resid_mid", "pos", direction, metric)
        t.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_sweep_equals_activation_patch_on_a_bridge(models, pairs, name, direction):
    model = models[name]
    sweeps = [(site, "pos") for site in ("resid_pre", "resid_mid", "mlp_out")]
    sweeps += [(site, "head") for site in HEADS]
    sweeps += [("pattern", "head pos")]
    for site, by in sweeps:
        expected = one_run_per_cell(model, pairs, site, by, direction)
        assert expected.std(0).max() > 0.01
        found = sweep(model, pairs, site, by, direction=direction)
        t.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=f"{site} {by}")


def test_activation_patch_equals_hooks_written_out(models, pairs):
    """A head's output at one position, and the pattern of one query, of one layer."""
    model = models["ours"]
    names = [act_name("z", 1), act_name("pattern", 1)]
    _, clean = run_with_cache(model, pairs.clean, names)
    metric_fn = make_metric(pairs, "logit_diff")

    def patch_z(z, hook):
        z = z.clone()
        z[:, 3, 2] = clean["z", 1][:, 3, 2]
        return z

    def patch_pattern(pattern, hook):
        pattern = pattern.clone()
        pattern[:, 2, 5] = clean["pattern", 1][:, 2, 5]
        return pattern

    for site, position, fn in (("z", 3, patch_z), ("pattern", 5, patch_pattern)):
        with t.no_grad():
            logits = run_with_hooks(model, pairs.corrupt, [(act_name(site, 1), fn)])
        expected = metric_fn(logits[range(3), pairs.answer_pos], pairs.index)
        assert (expected - baselines(model, pairs, "logit_diff")[1]).abs().max() > 1e-4
        found = activation_patch(model, pairs, site, 1, position=position, head=2)
        t.testing.assert_close(found, expected)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_every_sweep_equals_transformer_lens(models, pairs, name):
    from transformer_lens import patching as theirs

    model = models[name]
    two = pairs.take(slice(0, 2))
    clean_cache = model.run_with_cache(two.clean)[1]

    def metric(logits):
        return make_metric(two, "logit_diff")(logits[:, -1], two.index).mean()

    functions = {
        ("resid_pre", "pos"): "resid_pre",
        ("resid_mid", "pos"): "resid_mid",
        ("attn_out", "pos"): "attn_out",
        ("mlp_out", "pos"): "mlp_out",
        ("z", "head"): "attn_head_out_all_pos",
        ("q", "head"): "attn_head_q_all_pos",
        ("k", "head"): "attn_head_k_all_pos",
        ("v", "head"): "attn_head_v_all_pos",
        ("pattern", "head"): "attn_head_pattern_all_pos",
        ("z", "head pos"): "attn_head_out_by_pos",
        ("k", "head pos"): "attn_head_k_by_pos",
        ("pattern", "head pos"): "attn_head_pattern_by_pos",
    }
    for (site, by), function in functions.items():
        with t.no_grad():
            expected = getattr(theirs, f"get_act_patch_{function}")(model, two.corrupt, clean_cache, metric)
        if by == "head pos" and site != "pattern":
            expected = expected.transpose(1, 2)
        mine = sweep(model, two, site, by).mean(-1)
        assert mine.shape == expected.shape
        assert expected.std() > 1e-3
        t.testing.assert_close(mine, expected, atol=1e-4, rtol=0, msg=f"{site} {by}")


@t.no_grad()
def test_a_run_from_any_layer_equals_the_whole_run(models, pairs):
    for model in models.values():
        logits, cache = run_with_cache(model, pairs.clean, ["blocks.*.hook_resid_pre"])
        answers = logits[range(3), pairs.answer_pos]
        for layer in range(L):
            resid = cache["resid_pre", layer]
            t.testing.assert_close(run_from(model, resid, pairs.answer_pos, layer), answers, atol=1e-5, rtol=1e-5)
            t.testing.assert_close(run_from(model, resid, None, layer), logits, atol=1e-5, rtol=1e-5)
        t.testing.assert_close(model(pairs.clean), logits)  # nothing is left behind


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_the_gates_hold_and_see_a_model_that_hears_its_listeners(models, pairs, name, monkeypatch):
    gates = sweep_gates(models[name], pairs, "log_prob")
    assert list(gates) == ["answer_alone_unembedded", "nothing_patched", "everything_patched"]
    assert max(gates.values()) < 1e-4
    import interventions

    def wrong_sweep(*args, **kwargs):
        return sweep(*args, **kwargs) + 1

    monkeypatch.setattr(interventions, "sweep", wrong_sweep)
    gates = sweep_gates(models[name], pairs, "log_prob")
    assert gates["nothing_patched"] > 0.01
    assert gates["everything_patched"] > 0.01
    assert gates["answer_alone_unembedded"] < 1e-4


# %% Causal tracing
@pytest.mark.parametrize("name", ["ours", "gpt2", "gemma2"])
def test_a_sweep_of_noised_pairs_equals_causal_trace(models, pairs, name):
    model = models[name]
    subject = pairs.places["changed"]
    t.manual_seed(0)
    noised = noised_pairs(model, pairs, subject, 3 * embedding_std(model, pairs.clean, subject))
    for site in ("resid_pre", "resid_post", "attn_out", "mlp_out"):
        found = sweep(model, noised, site, metric="log_prob", places=pairs.places)  # (layer, place, pair)
        assert found.std(0).max() > 0.01
        for layer in range(L):
            for i, mask in enumerate(pairs.places.values()):
                expected = causal_trace(model, noised, site, layer, mask)
                t.testing.assert_close(found[layer, i], expected, atol=1e-4, rtol=0, msg=f"{site} {layer} {i}")


def test_noise_is_measured_by_the_embeddings_that_enter_the_first_block(models, pairs):
    """Scaled where the model scales them, without the positions that a model adds, and put on the subject alone."""
    subject = pairs.places["changed"]
    for name, scale in (("ours", 1), ("gpt2", 1), ("gemma2", 32**0.5)):
        model = models[name]
        embeddings = model.W_E[pairs.clean][subject].float()
        sigma = embedding_std(model, pairs.clean, subject)
        assert sigma == pytest.approx(scale * embeddings.std().item(), rel=1e-3), name
        change = noised_pairs(model, pairs, subject, sigma).corrupt_resid - model(pairs.clean, stop_at_layer=0)
        assert change[subject].std().item() == pytest.approx(sigma, rel=0.3), name
        assert not change[~subject].any(), name


# %% Memory
def mask_at(pairs: Pairs, position: int) -> t.Tensor:
    return t.zeros_like(pairs.clean, dtype=t.bool).index_fill(1, t.tensor([position]), True)


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_memory_stays_under_the_cap_whatever_the_batch(models, pairs, name):
    """And what is computed in groups equals what is computed at once."""
    model = models[name]
    many = pairs.take(t.arange(3).repeat(16))
    rows = t.randint(1, 250, (40, 12), generator=t.Generator().manual_seed(0))
    ablations = [(Part("z", 1), "zero", 1.0), (Part("mlp_out", 0), "mean", 1.0)]
    calls = {
        "baselines": lambda gb: t.stack(baselines(model, many, "kl", gb)),
        "stream": lambda gb: sweep(model, many, "resid_pre", memory_gb=gb),
        "heads": lambda gb: sweep(model, many, "z", "head pos", memory_gb=gb),
        "pattern": lambda gb: sweep(model, many, "pattern", "head", memory_gb=gb),
        "ablations": lambda gb: t.tensor(ablation_effects(model, many, rows, ablations, "logit_diff", gb)),
        "knock-out": lambda gb: knock_out(model, many, [1], mask_at(many, 2), "logit_diff", gb),
        "neurons": lambda gb: t.zeros(len(fine_parts(model, many, 1, gb))),
    }
    cap = 2e-3
    for title, call in calls.items():
        got = []
        peak = peak_bytes(lambda: got.append(call(cap)))
        assert peak / 2**30 < cap, title
        t.testing.assert_close(got[0], call(1.0), atol=1e-4, rtol=1e-4, msg=title)
    for title in ("stream", "heads", "pattern"):
        peak = peak_bytes(lambda: calls[title](1.0))
        assert peak / 2**30 > cap, "these pairs were too few to try the cap"


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_out_of_memory_halves_the_rows_and_changes_no_number(models, pairs, name, capsys):
    model = models[name]
    many = pairs.take(t.arange(3).repeat(4))
    rows = t.randint(1, 250, (9, 12), generator=t.Generator().manual_seed(0))
    ablations = [(Part("z", 1), how, 1.0) for how in ("mean", "resample")]
    calls = [
        lambda: t.stack(baselines(model, many, "logit_diff")),
        lambda: sweep(model, many, "z", "head"),
        lambda: t.tensor(ablation_effects(model, many, rows, ablations, "logit_diff")),
        lambda: knock_out(model, many, [1], many.clean == 5, "log_prob"),
    ]
    for call in calls:
        expected = call()
        assert "out of memory" not in capsys.readouterr().out
        with memory_for(model, 30 if len(expected) == L else 7):
            found = call()
        assert "out of memory: going on with" in capsys.readouterr().out
        t.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


LLAMA_SHAPE = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": 2,
}
STREAMED = [
    ("GPT2", {"vocab_size": 260, "n_embd": 32, "n_layer": L, "n_head": H, "n_positions": 64}),
    ("Llama", LLAMA_SHAPE),
    ("Gemma2", LLAMA_SHAPE | {"head_dim": 8}),
]


@pytest.mark.parametrize("architecture, config", STREAMED)
def test_weights_from_disk_give_the_same_sweeps_of_the_stream(architecture, config, pairs, tmp_path):
    folder = str(save_folder(tiny_hf(architecture, **config), tmp_path))
    whole = load_model(folder, device="cpu")
    streamed = Streamed(folder, "cpu", t.float32)
    assert sum(p.is_meta for p in streamed.hf.parameters()) > 10
    found = t.stack(baselines(streamed, pairs, "kl"))
    expected = t.stack(baselines(whole, pairs, "kl"))
    t.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for site, direction, memory_gb in (("resid_pre", "denoise", 1.0), ("resid_post", "noise", 1e-3)):
        expected = sweep(whole, pairs, site, direction=direction)
        assert expected.std() > 0.01
        found = sweep(streamed, pairs, site, direction=direction, memory_gb=memory_gb)
        t.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# %% Ablations and knock-out
def head(h: int):
    only = t.nn.functional.one_hot(t.tensor(h), H)[:, None]
    return lambda change: change * only


def effects_of(
    model: nn.Module,
    pairs: Pairs,
    rows: t.Tensor,
    on_pairs: t.Tensor,
    on_rows: t.Tensor,
    metric: str = "logit_diff",
) -> tuple:
    """(share of clean - corrupt lost, nats added) by ablated logits of the pairs' clean texts and of rows."""
    clean, corrupt = t.stack(baselines(model, pairs, metric)).mean(1)
    clean_logits = model(pairs.clean)[range(3), pairs.answer_pos]
    value = make_metric(pairs, metric, clean_logits)(on_pairs[range(3), pairs.answer_pos], pairs.index).mean()
    nats = next_token_loss(on_rows, rows) - next_token_loss(model(rows), rows)
    return ((clean - value) / (clean - corrupt)).item(), nats.item()


@t.no_grad()
@pytest.mark.parametrize("metric", ["logit_diff", "log_prob", "kl"])
def test_shares_lost_are_of_clean_less_corrupt_by_every_metric(models, pairs, metric):
    model = models["ours"]
    rows = t.randint(1, 250, (4, 12), generator=t.Generator().manual_seed(3))
    part = Part("mlp_out", 1)
    [(lost, _)] = ablation_effects(model, pairs, rows, [(part, "zero", 1.0)], metric)
    on_pairs = ablate(model, pairs.clean, part, rows, "zero")
    expected, _ = effects_of(model, pairs, rows, on_pairs, ablate(model, rows, part, rows, "zero"), metric)
    assert abs(lost) > 1e-3
    assert lost == pytest.approx(expected, abs=1e-3)


def test_one_pair_is_not_resampled_from_itself(models, pairs):
    rows = t.randint(1, 250, (4, 12))
    with pytest.raises(SystemExit, match="one pair"):
        ablation_effects(models["ours"], pairs.take(slice(0, 1)), rows, [(Part("z", 1), "resample", 1.0)], "logit_diff")


@t.no_grad()
def test_ablations_equal_hooks_written_out(models, pairs):
    model = models["ours"]
    rows = t.randint(1, 250, (4, 12), generator=t.Generator().manual_seed(3))
    mean = run_with_cache(model, rows, "blocks.1.hook_mlp_out")[1]["mlp_out", 1][:, 1:].mean((0, 1))
    neurons = t.nn.functional.one_hot(t.tensor([3, 5]), 48).sum(0)
    u = t.randn(32)
    u = u / u.norm()
    cases = [
        (Part("z", 1, head(2)), "zero", lambda x, hook: x.index_fill(2, t.tensor([2]), 0)),
        (Part("mlp_out", 1), "mean", lambda x, hook: mean.expand_as(x)),
        (Part("z", 2, head(0)), "resample", lambda x, hook: t.cat([x.roll(1, 0)[:, :, :1], x[:, :, 1:]], 2)),
        (
            Part("post", 0, lambda change: change * neurons),
            "zero",
            lambda x, hook: x.index_fill(2, t.tensor([3, 5]), 0),
        ),
        (
            Part("resid_pre", 2, lambda change: (change @ u)[..., None] * u),
            "zero",
            lambda x, hook: x - (x @ u)[..., None] * u,
        ),
    ]
    ablations = [(part, how, 1.0) for part, how, _ in cases]
    effects = ablation_effects(model, pairs, rows, ablations, "logit_diff")
    for (part, _, fn), (lost, nats) in zip(cases, effects):
        entry = [(act_name(part.site, part.layer), fn)]
        on_pairs = run_with_hooks(model, pairs.clean, entry)
        on_rows = run_with_hooks(model, rows, entry)
        expected_lost, expected_nats = effects_of(model, pairs, rows, on_pairs, on_rows)
        assert abs(lost - expected_lost) < 1e-3, part
        assert abs(nats - expected_nats) < 1e-4, part
        assert abs(nats) > 1e-4, part
    noise = [(Part("mlp_out", 0), "noise", sigma) for sigma in (0.0, 5.0)]
    without, with_noise = ablation_effects(model, pairs, rows, noise, "logit_diff")
    assert without[0] == pytest.approx(0, abs=1e-4)
    assert abs(with_noise[0]) > 0.01


@t.no_grad()
@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_the_effects_of_ablations_equal_the_plain_ablate(models, pairs, name):
    """Noise too: both draw the same from one seed."""
    model = models[name]
    rows = t.randint(1, 250, (4, 12), generator=t.Generator().manual_seed(3))
    for part in (Part("z", 1, head(2)), Part("mlp_out", 2)):
        for how in ("zero", "mean", "resample", "noise"):
            t.manual_seed(1)
            [(lost, nats)] = ablation_effects(model, pairs, rows, [(part, how, 2.0)], "logit_diff")
            t.manual_seed(1)
            on_pairs = ablate(model, pairs.clean, part, rows, how, 2.0)
            on_rows = ablate(model, rows, part, rows, how, 2.0)
            expected_lost, expected_nats = effects_of(model, pairs, rows, on_pairs, on_rows)
            assert abs(lost - expected_lost) < 1e-3, (part, how)
            assert abs(nats - expected_nats) < 1e-4, (part, how)
            assert abs(nats) > 1e-4, (part, how)
    t.testing.assert_close(mean_ablation(model, rows, part, rows), ablate(model, rows, part, rows, "mean"))


@t.no_grad()
def test_knock_out_removes_the_attention_from_the_answer_and_no_other(models, pairs):
    for name in ("ours", "gpt2"):
        model = models[name]

        def cut(pattern, hook):
            pattern = pattern.clone()
            pattern[range(3), :, pairs.answer_pos, 2] = 0
            return pattern / pattern.sum(-1, keepdim=True)

        logits = run_with_hooks(model, pairs.clean, [("blocks.1.attn.hook_pattern", cut)])
        expected = make_metric(pairs, "logit_diff")(logits[range(3), pairs.answer_pos], pairs.index)
        found = knock_out(model, pairs, [1], mask_at(pairs, 2), "logit_diff")
        t.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# %% Who writes the answer
@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_the_attribution_over_pairs_is_of_the_logit_difference(models, pairs, name):
    model = models[name]
    parts = direct_attribution(model, pairs)
    clean, _ = baselines(model, pairs, "logit_diff")
    t.testing.assert_close(parts["logit"], clean, atol=1e-4, rtol=1e-4)
    whole = parts["embed"] + parts["heads"].sum((1, 2)) + (parts["attn_bias"] + parts["mlp"]).sum(1) + parts["constant"]
    t.testing.assert_close(whole, clean, atol=1e-4, rtol=1e-4)
    assert parts["error"].max() < 1e-5
    tokens = pairs.clean[1:2, : int(pairs.answer_pos[1]) + 1]
    of_answer, of_wrong = (logit_parts(model, tokens, int(ids[1])) for ids in (pairs.answer, pairs.wrong))
    by_head = (of_answer["heads"] - of_wrong["heads"]).sum(-1)
    t.testing.assert_close(parts["heads"][1], by_head, atol=1e-4, rtol=1e-4)


def test_intervals_over_pairs_are_those_of_a_normal_mean():
    drawn = t.randn(400, 3, generator=t.Generator().manual_seed(0)) * t.tensor([1.0, 2.0, 0.0]) + 5
    mean, low, high = mean_with_interval(drawn)
    t.testing.assert_close(mean, drawn.mean(0))
    half = 1.96 * drawn.std(0) / 20
    t.testing.assert_close(high - mean, half, atol=0.02, rtol=0.15)
    t.testing.assert_close(mean - low, half, atol=0.02, rtol=0.15)


# %% Pairs, their places, and where they come from
def test_places_share_out_the_positions_and_name_the_names(world):
    for task in ("ioi", "capitals", "greater_than", "induction", "agreement", "gender"):
        pairs = draw_pairs(world, task, 8, 0)
        count = sum(mask.int() for mask in pairs.places.values())
        behind = t.arange(pairs.clean.shape[1]) > pairs.answer_pos[:, None]
        assert (count == (~behind).int()).all(), task
        assert (pairs.clean != pairs.corrupt).any(1).all(), task
        if task == "ioi":
            for name, ids in (("IO", pairs.answer), ("S1", pairs.wrong), ("S2", pairs.wrong)):
                assert (pairs.clean[pairs.places[name]] == ids).all()
        else:
            assert (pairs.clean != pairs.corrupt).equal(pairs.places["changed"]), task


def test_what_is_found_is_tested_on_other_names_and_no_seed_repeats_another(world):
    """The texts name no country, noun or name of the other half, and one seed's test pairs are not the next one's."""
    entities = ENTITIES | {"capitals": [row["country"] for row in read_countries()]}
    del entities["induction"]  # whose words stand in both halves, as neither answer nor wrong answer
    for task, names in entities.items():
        said = {}
        for role in ("find", "test"):
            pairs = draw_pairs(world, task, 12, 0, role)
            texts = [world.tokenizer.decode(row.tolist()) for row in [*pairs.clean, *pairs.corrupt]]
            words = {word.removesuffix("s") for text in texts for word in re.findall(r"\w+", text)}
            said[role] = {name for name in names if name.removesuffix("s") in words}
            assert said[role] or task == "capitals", task
        assert not said["find"] & said["test"], task
    pairs = [draw_pairs(world, "induction", 12, 0, role) for role in ("find", "test")]
    ids = [{*pair.answer.tolist(), *pair.wrong.tolist()} for pair in pairs]
    assert not ids[0] & ids[1]
    this, following = draw_pairs(world, "ioi", 30, 0, "test"), draw_pairs(world, "ioi", 30, 1, "find")
    both = {tuple(row) for row in this.clean.tolist()} & {tuple(row) for row in following.clean.tolist()}
    assert not both


@dataclass
class Asked:
    clean: str | None = None
    corrupt: str | None = None
    answer: str | None = None
    wrong: str | None = None
    pairs: str | None = None
    task: str = "ioi"
    n: int = 4
    held_out: int = 6
    seed: int = 0


def test_a_task_is_drawn_or_read_and_tested_on_other_pairs(world, tmp_path, capsys):
    task, pairs, test_pairs = read_task(world, Asked())
    assert (task, len(pairs), len(test_pairs)) == ("ioi", 4, 6)
    assert pairs.clean.equal(draw_pairs(world, "ioi", 4, 0, "find").clean)
    assert test_pairs.clean.equal(draw_pairs(world, "ioi", 6, 0, "test").clean)

    row = "Then Mary and John left. John gave it to,Then Mary and John left. Mary gave it to, Mary, John\n"
    file = tmp_path / "pairs.csv"
    file.write_text("clean,corrupt,answer,wrong\n" + row + "Soon Tom saw,Soon Paul saw, the, a\n" + row)
    task, pairs, test_pairs = read_task(world, Asked(pairs=str(file)))
    assert (task, len(pairs), len(test_pairs)) == ("own pairs", 2, 1)
    assert "one pair" not in capsys.readouterr().out

    own = Asked(clean="Soon Tom saw", corrupt="Soon Paul saw", answer=" the", wrong=" a")
    task, pairs, test_pairs = read_task(world, own)
    assert (task, len(pairs)) == ("own pairs", 1)
    assert pairs.clean.equal(test_pairs.clean)
    assert "one pair: what is found is tested on the same pair" in capsys.readouterr().out


def test_bad_input_is_answered_in_one_clear_line(models, pairs, world, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("clean,corrupt,answer\na,b, c\n")
    cases = [
        (lambda: make_pairs(world, [("Mary left", "Mary", " the", " a")]), "clean has"),
        (lambda: make_pairs(world, [("Mary left", "John left", " the park", " a")]), "is not one token"),
        (lambda: make_pairs(world, [("Mary left", "John left", " the park", " a")]), "but 2 (' the' + ' park')"),
        (lambda: make_pairs(world, [("", "", " the", " a")]), "a prompt is empty"),
        (lambda: position_masks(pairs, [8]), "outside the sequence"),
        (lambda: normalised(t.zeros(3), t.ones(3), t.ones(3)), "same metric"),
        (lambda: make_pairs(world, [("Mary left", "Mary left", " the", " a")]), "the same"),
        (lambda: read_task(world, Asked(clean="Mary left")), "needs all of --clean"),
        (lambda: read_task(world, Asked(pairs=str(file))), "has no column wrong"),
        (lambda: read_task(world, Asked(pairs="nowhere.csv")), "cannot be read"),
        (lambda: sweep(world, pairs, "z", places={"odd": pairs.clean[:, :2] > 0}), "place 'odd' is not a mask"),
    ]
    for call, words in cases:
        with pytest.raises(SystemExit) as error:
            call()
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    for name, site in (("ours", "resid_prre"), ("gpt_neox", "resid_mid")):  # GPT-NeoX has none
        with pytest.raises(KeyError, match="unknown hook name"):
            sweep(models[name], pairs, site)
    with pytest.raises(ValueError, match="unknown metric"):
        make_metric(pairs, "logit_dif")


# %% Files of pairs
ROW = ("Two lines.\nThen John gave René to", "Two lines.\nThen Mary gave René to", " Mary", " John")
HEADER = ("clean", "corrupt", "answer", "wrong")


def write_csv(path, header, rows, encoding="utf-8", delimiter=","):
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return str(path)


def test_line_breaks_byte_order_marks_and_separators_of_tables(tmp_path):
    assert read_pairs(write_csv(tmp_path / "plain.csv", HEADER, [ROW])) == [ROW]
    assert read_pairs(write_csv(tmp_path / "excel.csv", HEADER, [ROW], encoding="utf-8-sig")) == [ROW]
    assert read_pairs(write_csv(tmp_path / "german.csv", HEADER, [ROW], delimiter=";")) == [ROW]
    (tmp_path / "UP.JSON").write_text(json.dumps([dict(zip(HEADER, ROW))]))
    assert read_pairs(str(tmp_path / "UP.JSON")) == [ROW]


def test_other_names_of_columns_are_understood(tmp_path, world):
    mary, john = (world.tokenizer.encode(name, add_special_tokens=False).ids[0] for name in (" Mary", " John"))
    eap_ig = ("", "clean", "corrupted", "corrected_hard", "correct_idx", "incorrect_idx")
    rows = [(0, *ROW[:2], "x", mary, f"[{john}, 5]")]
    assert read_pairs(write_csv(tmp_path / "eap.csv", eap_ig, rows), world) == [ROW]
    assert read_pairs(write_csv(tmp_path / "ioi.csv", ("Prompt", "Corrupted", "IO", "S"), [ROW])) == [ROW]


def test_tables_that_are_no_pairs_are_refused_in_one_line(tmp_path):
    cases = {
        "no column corrupt": write_csv(tmp_path / "a.csv", ("clean", "foil", "answer", "wrong"), [ROW]),
        "not UTF-8": write_csv(tmp_path / "b.csv", HEADER, [ROW], encoding="latin-1"),
        "row 1 lacks wrong": write_csv(tmp_path / "c.csv", HEADER, [ROW[:3]]),
        "holds no pair": write_csv(tmp_path / "d.csv", HEADER, []),
    }
    for message, path in cases.items():
        with pytest.raises(SystemExit, match=message) as error:
            read_pairs(path)
        assert "\n" not in str(error.value)


def test_n_and_held_out_hold_for_files_too():
    assert share_out(list(range(10)), 2, 5) == ([0, 2], [1, 3, 4, 5, 6])
    assert share_out(list(range(5)), 32, 100) == ([0, 2, 4], [1, 3])


def pairs_of(clean: list[int], corrupt: list[int], answer: int, wrong: int) -> Pairs:
    return Pairs(
        clean=t.tensor([clean]),
        corrupt=t.tensor([corrupt]),
        answer=t.tensor([answer]),
        wrong=t.tensor([wrong]),
        answer_pos=t.tensor([len(clean) - 1]),
    )


def test_an_indirect_object_stands_where_its_name_does_or_nowhere():
    mary, john, gave = 5, 7, 9
    made = find_places(pairs_of([1, mary, john, gave, john, gave], [1, mary, john, gave, mary, gave], mary, john))
    assert {name: mask[0].nonzero()[0].tolist()[0] for name, mask in made.items() if name in ("IO", "S1", "S2")} == {
        "IO": 1,
        "S1": 2,
        "S2": 4,
    }
    without = find_places(pairs_of([1, gave, john, gave, john, gave], [1, gave, john, gave, mary, gave], mary, john))
    assert "IO" not in without and "changed" in without  # the first token is no indirect object


def test_what_a_longer_pair_fills_up_with_has_not_changed(world):
    """Clean and corrupt are filled by their own first tokens, which can differ."""
    rows = [("Mary went to", "John went to", " the", " a"), ("Then Mary went to", "Then John went to", " the", " a")]
    made = make_pairs(world, rows)
    for mask in made.places.values():
        assert not (mask & (t.arange(made.clean.shape[1]) > made.answer_pos[:, None])).any()


@pytest.mark.parametrize(
    "row, why",
    [
        (("Then Mary went to", "Then Mary went to", " the", " a"), "pair 2: clean and corrupt are the same"),
        (
            ("Then Mary went to", "Then John went to", " the", " the"),
            "pair 2: the answer and the wrong one are the same",
        ),
    ],
)
def test_a_pair_that_asks_nothing_is_refused(world, row, why):
    with pytest.raises(SystemExit, match=why):
        make_pairs(world, [("Then Mary went to", "Then John went to", " the", " a"), row])


def test_resampling_takes_two_rows_of_text(models, pairs):
    part = Part("attn_out", 0)
    rows = t.randint(1, 250, (1, 8))
    with pytest.raises(SystemExit, match="another row of text"):
        ablation_effects(next(iter(models.values())), pairs, rows, [(part, "resample", 1.0)], "logit_diff")
