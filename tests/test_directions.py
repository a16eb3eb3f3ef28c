"""
Directions against closed forms, scikit-learn, a model whose weights are orthogonalised, interchange interventions and
transformers' own generation.
"""

import copy
import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch as t
import torch.nn.functional as F
from conftest import ROOT
from sklearn.linear_model import LogisticRegression
from test_lens import save_model

from alignment import interchange, save_subspaces
from directions import (
    Asked,
    Direction,
    Edit,
    ablating_everywhere,
    add,
    adding,
    clamp,
    clamping,
    draw_contrasts,
    edit_gates,
    effect,
    feature_direction,
    logistic_direction,
    mean_difference,
    open_judge,
    placed,
    plain_loss,
    principal_difference,
    project_out,
    projecting_out,
    random_directions,
    read_contrasts,
    read_directions,
    read_texts,
    save_direction,
    says,
    streams_of,
    text_cost,
    write,
)
from hooks import run_with_cache, run_with_hooks
from llama_block import Llama
from utils import load_model
from weights import drawn_token, encode
from world import MEN, WOMEN, read_countries

D = 12
HOOK = "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module")
def world() -> Llama:
    return load_model(str(ROOT / "models/world"), (Llama,), "cpu").requires_grad_(False)


@pytest.fixture(scope="module")
def gaussians() -> tuple[t.Tensor, t.Tensor, t.Tensor]:
    """(positive, negative, standard deviations): two clouds of one diagonal covariance, 2 apart along coordinates 0, 1."""
    generator = t.Generator().manual_seed(0)
    std = t.linspace(0.5, 2.0, D)
    x, y = std * t.randn(2, 4000, D, generator=generator)
    x[:, :2] += 1.0
    y[:, :2] -= 1.0
    return x, y, std


def unit_of(seed: int = 0, d: int = 128) -> t.Tensor:
    return random_directions(d, 1, seed)[0]


# %% Four ways to a direction
def test_the_difference_of_means_is_where_the_classes_were_put(gaussians):
    positive, negative, _ = gaussians
    truth = F.normalize(t.eye(D)[0] + t.eye(D)[1], dim=0)
    assert mean_difference(positive, negative) @ truth > 0.995
    direction = placed(truth, HOOK, positive, negative)
    assert direction.high - direction.low == pytest.approx(2 * 2**0.5, rel=0.02)
    assert direction.size == pytest.approx(2 * 2**0.5, rel=0.02)


def test_the_probe_is_scikit_learns_and_tends_to_fishers_direction(gaussians):
    positive, negative, std = gaussians
    x = t.cat([positive, negative]).numpy()
    y = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    scale = x.std(0) + 1e-6
    theirs = (
        LogisticRegression(C=0.1, tol=1e-8, class_weight="balanced").fit((x - x.mean(0)) / scale, y).coef_[0] / scale
    )
    ours = logistic_direction(positive, negative)
    assert ours @ F.normalize(t.from_numpy(theirs).float(), dim=0) > 0.999
    fisher = (positive.mean(0) - negative.mean(0)) / std**2  # of one covariance
    assert ours @ F.normalize(fisher, dim=0) > 0.99


def test_the_principal_difference_is_an_eigenvector_and_points_to_the_positives(gaussians):
    positive, negative, _ = gaussians
    differences = (positive - negative).double()
    both = t.cat([differences, -differences])
    _, vectors = t.linalg.eigh(both.T @ both)
    found = principal_difference(positive, negative)
    assert (found.double() @ vectors[:, -1]).abs() == pytest.approx(1, abs=1e-5)
    assert (positive - negative).mean(0) @ found > 0
    assert principal_difference(negative, positive) @ found == pytest.approx(-1, abs=1e-5)


def test_a_feature_is_the_one_whose_code_rises():
    class Dictionary:
        W_dec = 3 * t.eye(5)

        def encode(self, x: t.Tensor) -> t.Tensor:
            return x.relu()

    low = t.rand(40, 5, generator=t.Generator().manual_seed(0))
    high = low.clone()
    high[:, 3] += 1.0
    unit, feature = feature_direction(Dictionary(), high, low)
    assert feature == 3 and unit.equal(t.eye(5)[3])


def test_random_directions_have_length_one_and_are_others_by_seed():
    drawn = t.stack(random_directions(64, 20, 1))
    t.testing.assert_close(drawn.norm(dim=1), t.ones(20))
    assert (drawn @ drawn.T).fill_diagonal_(0).abs().max() < 0.6
    assert drawn.equal(t.stack(random_directions(64, 20, 1))) and not drawn.equal(t.stack(random_directions(64, 20, 2)))


# %% What is done to the stream
def test_projecting_out_is_the_projector_and_a_clamp_sets_the_coordinate():
    x = t.randn(3, 4, D, generator=t.Generator().manual_seed(1))
    unit = unit_of(d=D)
    t.testing.assert_close(project_out(x, unit), x @ (t.eye(D) - t.outer(unit, unit)))
    t.testing.assert_close(clamp(x, unit, 1.5) @ unit, t.full((3, 4), 1.5))
    t.testing.assert_close(project_out(clamp(x, unit, 1.5), unit), project_out(x, unit))
    t.testing.assert_close(add(x, 2 * unit) @ unit, x @ unit + 2)


def test_strengths_are_distances_of_the_means_and_a_clamp_goes_from_one_mean_to_the_other():
    direction = Direction(unit_of(d=D), HOOK, size=4.0, low=-1.0, high=2.0)
    x = t.randn(1, 3, D)
    pushed = adding(direction, 0.5, "cpu").change(x)
    t.testing.assert_close((pushed - x).norm(dim=-1), t.full((1, 3), 2.0))
    for strength, to in ((0.0, -1.0), (1.0, 2.0), (2.0, 5.0)):
        along = clamping(direction, strength, "cpu").change(x) @ direction.unit
        t.testing.assert_close(along, t.full((1, 3), to))


def test_an_edit_begins_at_its_position(world):
    tokens = t.randint(1, 3000, (2, 9), generator=t.Generator().manual_seed(2))
    edit = adding(Direction(unit_of(), HOOK, 5.0, 0.0, 1.0), 1.0, "cpu")
    seen = {}

    def keep(x: t.Tensor, hook: t.nn.Module) -> None:
        seen["after"] = x

    plain = run_with_cache(world, tokens, HOOK)[1][HOOK]
    run_with_hooks(world, tokens, [*edit.fwd_hooks(t.tensor([3, 6])), (HOOK, keep)])
    moved = (seen["after"] - plain).norm(dim=-1)
    t.testing.assert_close(moved, t.tensor([[0.0] * 3 + [5.0] * 6, [0.0] * 6 + [5.0] * 3]), atol=1e-4, rtol=0)


def test_a_push_of_the_last_stream_is_read_by_the_norm_and_the_unembedding(world):
    """Closed form: logits of ln_final(x + v) W_U."""
    texts = ["Then Mary left the park when", "Soon Tom said that"]
    last = "blocks.3.hook_resid_post"
    direction = Direction(unit_of(), last, 30.0, 0.0, 1.0)
    asked = Asked(world, texts, [(" she",)] * 2, [(" he",)] * 2)
    ids = [world.tokenizer.token_to_id(word) for word in ("Ġshe", "Ġhe")]
    for text, log_p in zip(texts, asked.log_p(adding(direction, 2.0, "cpu"))):
        tokens = t.tensor([encode(world, text)])
        x = run_with_cache(world, tokens, last)[1][last][0, -1] + 60.0 * direction.unit
        normed = x / (x.pow(2).mean() + world.cfg.norm_eps).sqrt() * world.ln_final.weight
        t.testing.assert_close(log_p, (normed @ world.W_U).log_softmax(-1)[ids], rtol=1e-4, atol=1e-3)


def test_a_clamp_to_another_prompts_coordinate_is_an_interchange_of_rank_one(world):
    texts = ["Then Mary left the park when", "Soon Tom said that"]
    base, source = (t.tensor([encode(world, text)]) for text in texts)
    unit = unit_of(5)
    stream = run_with_cache(world, source, HOOK)[1][HOOK][0, -1]
    edit = Edit([HOOK], partial(clamp, unit=unit, to=(stream @ unit).item()))
    end = base.shape[1] - 1
    ours = run_with_hooks(world, base, edit.fwd_hooks(t.tensor([end])))
    places = (t.tensor([end]), t.tensor([source.shape[1] - 1]))
    t.testing.assert_close(ours, interchange(world, base, source, HOOK, *places, unit[:, None]), rtol=1e-4, atol=1e-4)


def test_ablating_everywhere_is_a_model_that_cannot_write_the_direction(world):
    """Arditi et al. 2024, section 4.1: weights orthogonal to it, in the embedding and in all that is written."""
    unit = unit_of(3)
    other = copy.deepcopy(world)
    projector = t.eye(128) - t.outer(unit, unit)
    other.embed.weight.data = other.embed.weight @ projector
    for block in other.blocks:
        block.attn.o.weight.data = projector @ block.attn.o.weight
        block.attn.o.bias.data = projector @ block.attn.o.bias
        block.mlp.out.weight.data = projector @ block.mlp.out.weight
    tokens = t.randint(1, 3000, (2, 12), generator=t.Generator().manual_seed(4))
    everywhere = ablating_everywhere(world, Direction(unit, HOOK, 1.0, 0.0, 1.0), "cpu")
    assert len(everywhere.hooks) == 12
    ablated = run_with_hooks(world, tokens, everywhere.fwd_hooks(t.zeros(2, dtype=t.long)))
    t.testing.assert_close(ablated, other(tokens), rtol=1e-3, atol=2e-3)
    assert (ablated - world(tokens)).abs().max() > 0.05


# %% What it does and what it costs
def test_the_probability_of_a_class_is_the_sum_over_its_words(world):
    text = "Then Mary left the park when"
    asked = Asked(
        world, [text, "At noon, the old key near the book"], [(" she", " her"), (" is",)], [(" he",), (" are",)]
    )
    p = world(t.tensor([encode(world, text)]))[0, -1].softmax(-1)
    she, her, he = (world.tokenizer.token_to_id(word) for word in ("Ġshe", "Ġher", "Ġhe"))
    found = asked.log_p().exp()
    t.testing.assert_close(found[0], t.stack([p[she] + p[her], p[he]]), rtol=1e-4, atol=1e-7)
    alone = Asked(world, [text], [(" she", " her")], [()]).log_p().exp()
    t.testing.assert_close(alone[0], t.stack([p[she] + p[her], 1 - p[she] - p[her]]), rtol=1e-4, atol=1e-6)
    assert effect(t.tensor([[0.9, 0.1], [0.2, 0.5]]).log()) == {"p_target": pytest.approx(0.55), "turned": 0.5}


def test_the_cost_is_a_loss_and_a_kl_by_torch(world):
    rows = t.randint(1, 3000, (3, 10), generator=t.Generator().manual_seed(6))
    edit = projecting_out(Direction(unit_of(7), HOOK, 1.0, 0.0, 1.0), "cpu")
    added, kl = text_cost(world, rows, edit, 1)
    plain = world(rows).log_softmax(-1)
    edited = run_with_hooks(world, rows, edit.fwd_hooks(t.ones(3, dtype=t.long))).log_softmax(-1)
    losses = [F.nll_loss(log_p[:, 1:-1].flatten(0, 1), rows[:, 2:].flatten()) for log_p in (plain, edited)]
    assert added == pytest.approx((losses[1] - losses[0]).item(), abs=1e-5)
    theirs = F.kl_div(edited[:, 1:], plain[:, 1:], reduction="sum", log_target=True) / 27
    assert kl == pytest.approx(theirs.item(), rel=1e-3) and kl > 0
    nothing = adding(Direction(unit_of(), HOOK, 1.0, 0.0, 1.0), 0.0, "cpu")
    assert text_cost(world, rows, nothing, 1) == (0.0, 0.0)


# %% Text under an edit
@t.no_grad()
def written_by_transformers(hf, ids: list[int], n: int, vector: t.Tensor, layer: int, start: int) -> list[int]:
    """Greedy tokens of transformers, reading all again each time, a vector added to what enters a layer."""

    def push(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        late = (t.arange(x.shape[1]) >= start)[None, :, None]
        x = x + late * vector
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

    stack = hf.base_model.h if hasattr(hf.base_model, "h") else hf.base_model.layers
    handle = stack[layer].register_forward_pre_hook(push, with_kwargs=True)
    row = list(ids)
    for _ in range(n):
        row.append(int(hf(t.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    handle.remove()
    return row[len(ids) :]


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])  # keeps keys and values; reads all again
def test_text_under_a_push_is_transformers_own(name, tmp_path):
    hf = save_model(name, tmp_path)
    model = load_model(str(tmp_path), (Llama,), device="cpu")
    direction = Direction(unit_of(8, model.cfg.d_model), "blocks.1.hook_resid_pre", 4.0, 0.0, 1.0)
    ids = [5, 17, 300, 42, 9]
    unpushed = write(model, ids, 8, None, 3)
    for start in (1, 4):
        edit = adding(direction, 1.0, "cpu")
        theirs = written_by_transformers(hf, ids, 8, 4.0 * direction.unit, 1, start)
        ours = write(model, ids, 8, edit, start)
        assert ours == theirs[: len(ours)] and len(ours) > 1 and ours != unpushed
    log_p = hf(t.tensor([ids + unpushed])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    expected = -log_p[range(len(unpushed)), unpushed].mean().item()
    assert plain_loss(model, ids, unpushed) == pytest.approx(expected, rel=1e-3)


def test_tokens_are_drawn_as_often_as_the_model_says():
    logits = t.tensor([2.0, 0.0, 1.0])
    generator = t.Generator().manual_seed(0)
    counts = np.bincount([drawn_token(logits, 2.0, generator) for _ in range(3000)], minlength=3) / 3000
    assert counts == pytest.approx((logits / 2).softmax(-1).numpy(), abs=0.03)
    assert drawn_token(logits, 0.0, None) == 0


def test_gates_hold_and_miss_where_writing_is_another_model(world, monkeypatch):
    contrasts = draw_contrasts(world, "gender", "", 4, 0, "test")
    asked = Asked(world, contrasts.negative, contrasts.target, contrasts.other)
    direction = Direction(unit_of(1), HOOK, 40.0, 0.0, 1.0)
    assert max(edit_gates(asked, direction).values()) < 1e-4

    def forgets_the_push(model, ids, n, edit, start):
        return [7, 8, 9]

    monkeypatch.setattr("directions.write", forgets_the_push)
    assert edit_gates(asked, direction)["written_against_one_run"] > 0.05


def test_a_text_says_what_comes_first_in_it():
    classes = ((" she", " her"), (" he",))
    assert says(" and she saw he", classes) and not says(" and he saw her", classes) and not says(" it", classes)
    assert says(" gave her book to him, and he", classes)
    assert says(" the hero and she", classes) and not says(" here she", ((" he",), (" she",)))  # whole words alone
    assert says(" she.", classes) and says(" here, he", ((" he",), (" she",)))


# %% Contrasts
def test_contrasts_of_the_world_differ_in_what_they_say_and_share_no_name(world):
    find, test = (draw_contrasts(world, "gender", "", 20, 0, role) for role in ("find", "test"))
    assert len(set(zip(find.positive, find.negative))) == len(find) == 20
    for part in (find, test):
        assert all(any(f" {name} " in text for name in WOMEN) for text in part.positive)
        assert all(any(f" {name} " in text for name in MEN) for text in part.negative)
        assert {word for (word,) in part.target} <= {" she", " her"} and {word for (word,) in part.other} <= {
            " he",
            " his",
        }
    names = [
        {name for name in WOMEN + MEN for text in [*part.positive, *part.negative] if f" {name} " in text}
        for part in (find, test)
    ]
    assert not names[0] & names[1]
    plural = draw_contrasts(world, "number", "", 10, 0, "find")
    assert {word for (word,) in plural.target} <= {" are", " were", " have"}
    to_japan = draw_contrasts(world, "country", "Japan", 10, 0, "test")
    japan = next(row for row in read_countries() if row["country"] == "Japan")
    assert all("Japan" in text for text in to_japan.positive) and not any("Japan" in text for text in to_japan.negative)
    assert {word.strip() for (word,) in to_japan.target} <= {
        japan[column] for column in ("capital", *("continent", "language", "currency"))
    }


def test_streams_are_read_at_the_last_token_or_over_the_text(world):
    texts = ["Then Mary left the park when", "Soon Tom said that"]
    hooks = ["blocks.0.hook_resid_pre", HOOK]
    last = streams_of(world, texts, hooks)
    mean = streams_of(world, texts, hooks, "mean")
    for i, text in enumerate(texts):
        _, cache = run_with_cache(world, t.tensor([encode(world, text)]), hooks)
        for j, hook in enumerate(hooks):
            t.testing.assert_close(last[j, i], cache[hook][0, -1], rtol=1e-4, atol=1e-4)
            t.testing.assert_close(mean[j, i], cache[hook][0, 1:].mean(0), rtol=1e-4, atol=1e-4)


def test_contrasts_are_read_from_csv_and_json(tmp_path):
    rows = [
        {"positive": "I love it, so", "negative": "I hate it, so", "target": "good|fine", "other": " bad"},
        {"positive": "joy, it", "negative": "grief, it", "target": "", "other": ""},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for path in ("a.json", "a.csv"):
        read = read_contrasts(str(tmp_path / path))
        assert read.positive == ["I love it, so", "joy, it"] and read.negative == ["I hate it, so", "grief, it"]
        assert read.target == [(" good", " fine"), ()] and read.other == [(" bad",), ()]
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n")
    assert read_texts(str(tmp_path / "texts.txt"), "--positive") == ["one", "two"]


BAD = {
    "holds no row": "positive,negative\n",
    "no column negative among positive, label": "positive,label\na,1\n",
    "row 2 lacks negative": "positive,negative\na,b\nc,\n",
}


@pytest.mark.parametrize("words", BAD)
def test_contrasts_that_make_no_sense_get_one_line(words, tmp_path):
    (tmp_path / "mine.csv").write_text(BAD[words])
    with pytest.raises(SystemExit, match=words):
        read_contrasts(str(tmp_path / "mine.csv"))


def test_files_that_are_none_get_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(SystemExit, match="--positive .* holds no text"):
        read_texts(str(tmp_path / "empty.txt"), "--positive")
    with pytest.raises(SystemExit, match="no such file"):
        open_judge(str(tmp_path / "judge.py"))
    (tmp_path / "judge.py").write_text("judge = 3\n")
    with pytest.raises(SystemExit, match="defines no function judge"):
        open_judge(str(tmp_path / "judge.py"))
    (tmp_path / "judge.py").write_text("def judge(text):\n    return len(text)\n")
    assert open_judge(str(tmp_path / "judge.py"))("four") == 4


# %% In a file
def test_a_direction_comes_back_with_where_it_comes_from(world, tmp_path):
    direction = Direction(unit_of(), HOOK, 3.0, -1.0, 2.0)
    path = tmp_path / "a.safetensors"
    save_direction(path, direction, method="difference of means", contrasts="gender")
    found, about = read_directions(str(path), world)
    t.testing.assert_close(found[HOOK], direction.unit)
    assert about == {"method": "difference of means", "contrasts": "gender", "size": 3.0, "low": -1.0, "high": 2.0}


def test_a_file_of_another_model_or_of_none_gets_one_line(world, tmp_path):
    path = tmp_path / "a.safetensors"
    for named, words in (
        ({"blocks.9.hook_resid_pre": t.ones(128, 1)}, "is no place in the stream"),
        ({HOOK: t.ones(64, 1)}, "64 wide"),
        ({f"{HOOK} end rank 2": t.ones(128, 2)}, "more than one dimension"),
    ):
        save_subspaces(path, named)
        with pytest.raises(SystemExit, match=words):
            read_directions(str(path), world)
    Path(tmp_path / "text.safetensors").write_text("no tensors")
    for broken in ("text.safetensors", "absent.safetensors"):
        with pytest.raises(SystemExit, match="cannot be read"):
            read_directions(str(tmp_path / broken), world)


def test_words_that_begin_alike_count_once(world):
    """A token that two words of a class begin with is one token, with one probability."""
    text = "Then Mary left the park when"
    once = Asked(world, [text], [(" she",)], [(" he",)]).log_p()
    twice = Asked(world, [text], [(" she", " she")], [(" he", " he", " he")]).log_p()
    t.testing.assert_close(once, twice)


def test_of_a_das_file_the_direction_is_that_of_the_place_where_the_variable_stands(world, tmp_path):
    """A file keeps its subspaces in the order of their names, not of their places."""
    after, subject = unit_of(1), unit_of(2)
    named = {f"{HOOK} {place} rank 1": unit[:, None] for place, unit in (("after", after), ("subject", subject))}
    save_subspaces(tmp_path / "found.safetensors", named, best_place="subject")
    found, _ = read_directions(str(tmp_path / "found.safetensors"), world)
    t.testing.assert_close(found[HOOK], subject)
