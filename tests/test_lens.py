"""
The lens on tiny random models of seven architectures against Hugging Face, the engine against the plain forms, and
milestones on hand-made logits.
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch as t
from conftest import memory_for

import lens as ls
from data import put_first, train_bpe
from hooks import HookPoint, peak_bytes
from lens import Lens, Translator, count_above, read
from llama_block import Llama
from utils import find_model, load_model
from weights import Streamed, about_bos, answer_token, encode, model_key, open_model, token_text

SHAPE = {
    "vocab_size": 700,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
CAP = 3.0
ARCHITECTURES = {
    "GPT2LMHeadModel": {"vocab_size": 700, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "GPTNeoXForCausalLM": SHAPE,
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED | {"sliding_window": 6},
    "Qwen3ForCausalLM": GROUPED | {"head_dim": 16},
    "Gemma2ForCausalLM": GROUPED | {"head_dim": 16, "final_logit_softcapping": CAP},
    "MixtralForCausalLM": GROUPED | {"num_local_experts": 4},
}
FINAL_NORMS = {"GPT2LMHeadModel": "ln_f", "GPTNeoXForCausalLM": "final_layer_norm"}  # of the others: norm
ROWS = [t.randint(1, 700, (n,), generator=t.Generator().manual_seed(n)).tolist() for n in (12, 7, 9, 12, 3)]
PLACES = [(i, j) for i, row in enumerate(ROWS) for j in range(len(row))]
ANSWERS = [(37 * i) % 700 for i in range(len(PLACES))]


def random_model(name: str):
    """
    A transformers model whose weights are large enough that a wrong formula shows: default initialisation hides bugs.
    """
    import transformers

    stem = name.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    config = getattr(transformers, f"{stem}Config")(**ARCHITECTURES[name])
    t.manual_seed(0)
    hf = getattr(transformers, name)(config).eval()
    with t.no_grad():
        for p in hf.parameters():
            p.add_(0.15 * t.randn(p.shape))
    return hf


def save_tokenizer(folder: Path, bos: bool = True) -> None:
    from transformers import PreTrainedTokenizerFast

    own = train_bpe(["the capital of Japan is Tokyo, the city of Tokyo is the capital of Japan."] * 9, 300)
    put_first(own, own.token_to_id("<|endoftext|>") if bos else None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)


def save_model(name: str, folder: Path):
    """A random model and its tokenizer in a folder."""
    hf = random_model(name)
    hf.save_pretrained(folder)
    save_tokenizer(folder)
    return hf


@t.no_grad()
def logits_by_layer(name: str, hf) -> t.Tensor:
    """
    Hugging Face's (layer, place, token) at PLACES, through its own final norm, head and soft cap; the last layer's are
    its own output.
    """
    norm = getattr(hf.base_model, FINAL_NORMS.get(name, "norm"))
    runs = [hf(t.tensor([row]), output_hidden_states=True) for row in ROWS]
    layers = []
    for layer in range(3):
        stream = t.cat([run.hidden_states[layer][0] for run in runs])
        logits = hf.get_output_embeddings()(norm(stream))
        if name == "Gemma2ForCausalLM":
            logits = CAP * (logits / CAP).tanh()
        layers.append(logits)
    return t.stack([*layers, t.cat([run.logits[0] for run in runs])])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple]:
    """By architecture: (folder, Hugging Face model, its logits at PLACES by layer)."""
    out = {}
    for name in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(name)
        hf = save_model(name, folder)
        out[name] = (str(folder), hf, logits_by_layer(name, hf))
    return out


def direct(logits: t.Tensor, answers: list[int]) -> dict[str, t.Tensor]:
    """What read() should say of logits (layer, place, token), in float64."""
    logp = logits.double().log_softmax(-1)
    a = t.tensor(answers)[None, :, None].expand(len(logits), -1, 1)
    own = logits.gather(2, a)
    return {
        "logp": logp.topk(5).values,
        "answer_logp": logp.gather(2, a)[..., 0],
        "answer_logit": own[..., 0],
        "rank": (logits > own).sum(-1),
        "entropy": t.special.entr(logp.exp()).sum(-1),
        "kl": (logp[-1].exp() * (logp[-1] - logp)).sum(-1),
    }


def assert_reading(found: dict[str, t.Tensor], logits: t.Tensor, answers: list[int] = ANSWERS) -> None:
    for name, x in direct(logits, answers).items():
        if name not in found:
            continue
        if name == "rank":
            assert (found[name] - x).abs().float().mean() < 0.02  # ties within rounding
        else:
            t.testing.assert_close(found[name].double(), x.double(), atol=2e-4, rtol=1e-4)
    t.testing.assert_close(logits.gather(2, found["ids"]), logits.topk(5).values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_equals_hugging_face_s_own_norm_and_head(made, name):
    folder, _, logits = made[name]
    model = load_model(folder, (Llama,), "cpu")
    assert ls.require_exact_lens(model, ROWS) < 1e-5
    found = read(model, Lens(model), ROWS, PLACES, ANSWERS)
    assert set(found) == {"ids", "logp", "answer_logit", "answer_logp", "rank", "entropy", "kl", "cosine"}
    assert_reading(found, logits)
    at_once = read(model, Lens(model), ROWS, PLACES, ANSWERS, against_final=False, chunk=5, batch=13)
    assert not {"entropy", "kl", "cosine"} & set(at_once)
    assert_reading(at_once, logits)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_the_engine_equals_the_plain_logit_lens(made, name):
    """
    logit_lens() is nostalgebraist's three lines; read() is its logits, probabilities, KL, rank and entropy, place by
    place.
    """
    folder, _, logits = made[name]
    model = load_model(folder, (Llama,), "cpu")
    plain = t.cat([ls.logit_lens(model, t.tensor([row]))[:, 0] for row in ROWS], 1)
    t.testing.assert_close(plain, logits, atol=1e-4, rtol=1e-4)
    assert_reading(read(model, Lens(model), ROWS, PLACES, ANSWERS, chunk=7, batch=20), plain)
    wide = t.tensor([ROWS[0], ROWS[3]])
    some = [(0, 3), (1, 11), (1, 0)]
    expected = ls.logit_lens(model, wide)[:, [row for row, _ in some], [position for _, position in some]]
    assert_reading(read(model, Lens(model), wide.tolist(), some, [5, 300, 0]), expected, [5, 300, 0])


@t.no_grad()
def test_the_engine_keeps_the_streams_cosine_with_the_last(made):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    streams = ls.layer_streams(model)
    _, cache = ls.run_with_cache(model, t.tensor([ROWS[0]]), streams)
    expected = [t.cosine_similarity(cache[stream][0], cache[streams[-1]][0], dim=-1) for stream in streams]
    found = read(model, Lens(model), ROWS[:1], PLACES[:12], ANSWERS[:12], chunk=5)
    t.testing.assert_close(found["cosine"], t.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"]
)
def test_weights_from_disk_give_the_same_lens(made, name):
    folder, _, logits = made[name]
    model = Streamed(folder, "cpu", t.float32, resident=0.4)
    assert sum(p.is_meta for p in model.hf.parameters()) > 5  # two of three blocks are not in memory
    assert_reading(read(model, Lens(model), ROWS, PLACES, ANSWERS), logits)


def test_offload_is_chosen_by_flag(made, capsys):
    folder = made["LlamaForCausalLM"][0]
    kinds = []
    for offload in ("on", "off", "auto"):
        model = open_model(folder, (Llama,), "cpu", offload=offload)
        kinds.append(type(model).__name__)
    assert kinds == ["Streamed", "Llama", "Llama"]
    assert "0% of the blocks stay" in capsys.readouterr().out


def test_the_gate_stops_a_forgotten_soft_cap(made):
    model = load_model(made["Gemma2ForCausalLM"][0], device="cpu")
    model.cfg.output_logits_soft_cap = None
    with pytest.raises(SystemExit, match="no lens is read"):
        ls.require_exact_lens(model, ROWS[:1])


def test_the_gate_allows_half_precision_its_rounding_but_no_scale_after_the_unembedding(made):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu", "bfloat16")
    assert 0 <= ls.require_exact_lens(model, ROWS) <= 0.02  # standard deviations of the logits

    def scaled(tokens: t.Tensor) -> t.Tensor:  # as some architectures have
        return 1.1 * Llama.forward(model, tokens)

    model.forward = scaled
    with pytest.raises(SystemExit, match="no lens is read"):
        ls.require_exact_lens(model, ROWS[:1])


def test_the_gate_lets_no_nan_pass(made):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    model.forward = lambda tokens: Llama.forward(model, tokens) * t.nan
    with pytest.raises(SystemExit, match="no lens is read"):
        ls.require_exact_lens(model, ROWS[:1])


def test_half_precision_must_keep_the_top_where_its_margin_is_clear():
    own = t.tensor([[3.0, 0.0, 0.0], [1.0, 0.9, 0.0]])
    unclear_place_differs = t.tensor([[3.0, 0.0, 0.0], [1.0, 1.1, 0.0]])
    clear_place_differs = t.tensor([[1.5, 1.6, 0.0], [1.0, 0.9, 0.0]])
    assert ls.same_clear_top(own, own)
    assert ls.same_clear_top(own, unclear_place_differs)
    assert not ls.same_clear_top(own, clear_place_differs)


def assert_same_reading(found: dict[str, t.Tensor], expected: dict[str, t.Tensor]) -> None:
    for name in expected:
        t.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)


@t.no_grad()
def test_padding_on_the_left_in_hugging_face_gives_the_same_last_layer(made):
    folder, hf, _ = made["LlamaForCausalLM"]
    width = max(map(len, ROWS))
    tokens = t.tensor([[0] * (width - len(row)) + row for row in ROWS])
    mask = t.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ROWS])
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = hf(tokens, attention_mask=mask, position_ids=position_ids).logits[mask.bool()]
    model = load_model(folder, (Llama,), "cpu")
    found = read(model, Lens(model), ROWS, PLACES, ANSWERS)
    t.testing.assert_close(found["logp"][-1], theirs.log_softmax(-1).topk(5).values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch, chunk", [(1, 3), (30, 7)])
def test_batches_and_chunks_change_no_number(made, batch, chunk):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    at_once = read(model, Lens(model), ROWS, PLACES, ANSWERS, batch=4096, chunk=256)
    assert_same_reading(read(model, Lens(model), ROWS, PLACES, ANSWERS, batch=batch, chunk=chunk), at_once)


def test_little_memory_changes_no_number(made, capsys):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    expected = read(model, Lens(model), ROWS, PLACES, ANSWERS)
    with memory_for(model, 1):
        halved = read(model, Lens(model), ROWS, PLACES, ANSWERS)
    assert "out of memory: going on with 1 rows" in capsys.readouterr().out
    assert_same_reading(halved, expected)


def test_places_are_read_in_the_order_asked(made):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    expected = read(model, Lens(model), ROWS, PLACES, ANSWERS)
    order = t.randperm(len(PLACES)).tolist()
    places = [PLACES[i] for i in order]
    answers = [ANSWERS[i] for i in order]
    found = read(model, Lens(model), ROWS, places, answers)
    assert_same_reading(found, {name: x[:, order] for name, x in expected.items()})


def test_never_more_than_a_chunk_of_logits(made):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    seen = []

    class Watched(Lens):
        def __call__(self, x: t.Tensor, layer: int = -1) -> t.Tensor:
            seen.append(len(x))
            return super().__call__(x, layer)

    for final in (True, False):
        read(model, Watched(model), ROWS, PLACES, ANSWERS, chunk=8, against_final=final)
    assert max(seen) == 8
    # every place once at each layer but the last, which is the model's own
    assert sum(seen) == 2 * 3 * len(PLACES)


def test_without_the_final_norm_the_last_layer_is_read_by_the_lens_too(made):
    """Without the final norm the last layer is not the model's own output, and its KL says so."""
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    found = read(model, Lens(model, "none"), ROWS, PLACES, ANSWERS)
    assert (found["kl"][-1] > 1e-3).any()
    assert read(model, Lens(model), ROWS, PLACES, ANSWERS)["kl"][-1].abs().max() < 1e-5


@pytest.mark.parametrize("vocab", [50, 1000, 3072, 5001])
def test_top_tokens_are_the_top_tokens(vocab):
    x = t.randn(20, vocab)
    x[:, -1] += 4  # in the stretch that is left over
    values, ids = ls.top_tokens(x, 5)
    assert t.equal(values, x.topk(5).values)
    assert t.equal(x.gather(1, ids), values)


def token_batch(step: int) -> t.Tensor:
    return t.randint(1, 700, (16, 12), generator=t.Generator().manual_seed(step))


def test_the_tuned_lens_is_the_identity_at_first(made):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    untrained = t.nn.ModuleList(Translator(48, 48) for _ in range(3))
    x = t.randn(6, 48)
    for layer in (1, 3):  # with a translator, and the last, which has none
        assert t.equal(Lens(model, translators=untrained)(x, layer), Lens(model)(x))


def test_the_tuned_lens_improves_every_layer_and_is_read_back(made, tmp_path):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    path = tmp_path / "tuned/lens.safetensors"
    trained = ls.tuned_lens(model, token_batch, 60, path)
    assert all(p.requires_grad for p in model.parameters())
    raw = read(model, Lens(model), ROWS, PLACES, ANSWERS)["kl"].mean(1)
    tuned = read(model, Lens(model, translators=trained), ROWS, PLACES, ANSWERS)["kl"].mean(1)
    assert (tuned[:-1] < 0.9 * raw[:-1]).all()
    assert abs(tuned[-1]) < 1e-5  # the last layer is the model's own output
    again = ls.tuned_lens(model, lambda step: 1 / 0, 60, path)  # training would divide by zero
    assert all(t.equal(a, b) for a, b in zip(trained.parameters(), again.parameters()))


def test_lenses_are_judged_by_their_mean_kl_and_perplexity(made):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    rows = token_batch(0)
    scores, intervals = ls.judge_lenses(model, {"raw": Lens(model), "tuned": Lens(model)}, rows)
    assert list(scores) == ["KL, raw", "KL, tuned", "perplexity, raw", "perplexity, tuned"]
    logp = ls.logit_lens(model, rows)[:, :, :-1].log_softmax(-1)  # (layer, row, pos, token)
    kl = (logp[-1].exp() * (logp[-1] - logp)).sum(-1).mean((1, 2))
    next_token = rows[None, :, 1:, None].expand(len(logp), -1, -1, 1)
    perplexity = (-logp.gather(3, next_token)).mean((1, 2, 3)).exp()
    t.testing.assert_close(t.tensor(scores["KL, raw"]), kl, atol=1e-4, rtol=1e-4)
    t.testing.assert_close(t.tensor(scores["perplexity, raw"]), perplexity, atol=1e-3, rtol=1e-3)
    by_row = (logp[-1].exp() * (logp[-1] - logp)).sum(-1).mean(2)  # (layer, row)
    half_width = 1.96 * by_row.std(1) / len(rows) ** 0.5
    ends = t.tensor(intervals["KL, raw"])
    t.testing.assert_close((ends[:, 1] - ends[:, 0]) / 2, half_width, rtol=0.3, atol=1e-4)
    assert ((ends[:, 0] <= kl + 1e-5) & (kl <= ends[:, 1] + 1e-5)).all()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_the_engine_s_kl_and_gradients_are_those_of_the_plain_tuned_lens_loss(made, name):
    model = load_model(made[name][0], (Llama,), "cpu")
    t.manual_seed(1)
    translators = t.nn.ModuleList(Translator(48, 48) for _ in range(3))
    for p in translators.parameters():
        p.data = 0.1 * t.randn(p.shape)
    tokens = token_batch(0)
    model.requires_grad_(False)
    losses = ls.tuned_lens_loss(model, translators, tokens)
    assert losses.shape == (3,) and (losses > 0.01).all()
    losses.sum().backward()
    plain = [p.grad.clone() for p in translators.parameters()]
    translators.zero_grad()
    mean_kl = ls.backward_by_layer(model, translators, tokens)
    assert mean_kl == pytest.approx(losses.mean().item(), rel=1e-5)
    for p, gradient in zip(translators.parameters(), plain):
        t.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)
    places = [(i, j) for i in range(16) for j in range(12)]
    found = read(model, Lens(model, translators=translators), tokens.tolist(), places, [0] * len(places))
    t.testing.assert_close(found["kl"][:-1].mean(1), losses.detach(), atol=1e-4, rtol=1e-4)


class ShiftingLinear(t.nn.Module):
    """Blocks x_p -> x_p + A x_p + B x_(p-1), all linear, with the parts that run_from asks of a model of ours."""

    def __init__(self, n_layers: int = 3, d_model: int = 5):
        super().__init__()
        self.cfg = SimpleNamespace(n_layers=n_layers, d_model=d_model, d_mlp=0, n_heads=0, d_vocab=7)
        self.embed = t.nn.Embedding(7, d_model)
        self.blocks = t.nn.ModuleList()
        for _ in range(n_layers):
            block = t.nn.Module()
            block.A = t.nn.Parameter(0.5 * t.randn(d_model, d_model))
            block.B = t.nn.Parameter(0.5 * t.randn(d_model, d_model))
            block.hook_resid_pre = HookPoint()
            block.hook_resid_post = HookPoint()
            self.blocks.append(block)
        self.unembed = t.nn.Linear(d_model, 7, bias=False)

    def forward(self, tokens, start_at_layer=0, resid=None, stop_at_layer=None):
        x = self.embed(tokens) if resid is None else resid
        for block in self.blocks[start_at_layer:stop_at_layer]:
            x = block.hook_resid_pre(x)
            before = t.cat([t.zeros_like(x[:, :1]), x[:, :-1]], 1)
            x = block.hook_resid_post(x + x @ block.A.T + before @ block.B.T)
        return x if stop_at_layer is not None else self.unembed(x)


@pytest.mark.parametrize("fit", [ls.jacobian_lens, ls.fit_jacobian_lens])
@pytest.mark.parametrize("first", [0, 2])
def test_the_jacobian_lens_of_a_linear_model_is_its_product_of_matrices(fit, first):
    """Of all positions at once a block is one matrix (Kronecker products); the lens is a mean of blocks of the product."""
    t.manual_seed(0)
    model = ShiftingLinear()
    n_pos, d_model = 6, model.cfg.d_model
    back = t.diag(t.ones(n_pos - 1), -1)  # position p reads p - 1
    product = t.eye(n_pos * d_model)
    same, later = [], []
    for block in reversed(model.blocks):
        product = product @ (t.kron(t.eye(n_pos), t.eye(d_model) + block.A) + t.kron(back, block.B))
        to_from = product.unflatten(0, (n_pos, d_model)).unflatten(2, (n_pos, d_model)).transpose(1, 2)
        same.append(to_from.diagonal()[..., first:].mean(-1))
        later.append(to_from[:, first:].sum(0).mean(0))
    tokens = t.randint(7, (2, n_pos))
    t.testing.assert_close(fit(model, tokens, "same", first), t.stack(same[::-1]).detach(), atol=1e-5, rtol=1e-5)
    t.testing.assert_close(fit(model, tokens, "later", first), t.stack(later[::-1]).detach(), atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name, target", [("LlamaForCausalLM", "later"), ("LlamaForCausalLM", "same")])
def test_the_fast_jacobian_lens_is_the_plain_one(made, name, target):
    model = load_model(made[name][0], (Llama,), "cpu")
    tokens = token_batch(0)[:1, :3]
    plain = ls.jacobian_lens(model, tokens, target, 1)
    assert plain.shape == (3, 48, 48)
    fast = ls.fit_jacobian_lens(model, tokens, target, 1)
    t.testing.assert_close(fast, plain, atol=2e-5 * plain.abs().max().item(), rtol=1e-4)


def test_the_jacobian_lens_is_transformer_lens_s_on_the_same_rows(made):
    """Theirs leaves the last position out: of rows of 12 tokens they take the first 11."""
    from transformer_lens.tools.analysis import JacobianLens

    model = load_model(made["GPT2LMHeadModel"][0], device="cpu")
    rows = token_batch(0)[:4]
    for skip, memory_gb in ((0, 1.0), (2, 1e-6)):  # all rows at once, and row by row
        model.to_tokens = lambda number: rows[int(number)][None]
        theirs = JacobianLens.fit(
            model, list("0123"), corpus="random", dim_batch=48, skip_first_positions=skip, show_progress=False
        )
        ours = ls.fit_jacobian_lens(model, rows[:, :-1], "later", skip, memory_gb)
        for layer, jacobian in theirs.jacobians.items():
            largest = jacobian.abs().max().item()
            assert (ours[layer + 1] - jacobian).abs().max().item() < 1e-4 * max(1.0, largest)
    x = t.randn(5, 48)
    lens = Lens(model, translators=t.nn.ModuleList(map(ls.Transport, ours)))
    t.testing.assert_close(lens.translators[1](x), theirs.transport(x, 0), atol=1e-3, rtol=1e-4)


def test_fitting_the_jacobian_lens_keeps_to_its_memory(made):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu").requires_grad_(False)
    tokens = t.randint(1, 700, (4, 24))
    peak = peak_bytes(lambda: ls.fit_jacobian_lens(model, tokens, memory_gb=0.002))
    assert 0.2 < peak / (0.002 * 2**30) < 1


def test_a_fitted_jacobian_lens_is_read_back_and_ends_in_the_model_s_own_output(made, tmp_path):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    path = tmp_path / "jacobian/lens.safetensors"
    fitted = ls.fitted_jacobian_lens(model, lambda: token_batch(0)[:2], path)
    again = ls.fitted_jacobian_lens(model, lambda: 1 / 0, path)  # fitting would divide by zero
    assert all(t.equal(a.weight, b.weight) for a, b in zip(fitted, again))
    found = read(model, Lens(model, translators=again), ROWS, PLACES, ANSWERS)
    assert found["kl"][-1].abs().max() < 1e-5
    _, cache = ls.run_with_cache(model, t.tensor([ROWS[0]]), ls.layer_streams(model))
    transported = cache[ls.layer_streams(model)[1]][0] @ fitted[1].weight.T
    logits = model.unembed(model.ln_final(transported))[None]
    assert_reading({name: x[1:2, :12] for name, x in found.items() if name != "kl"}, logits, ANSWERS[:12])


def test_a_lens_by_name_is_fitted_to_the_model_s_text_and_kept(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = made["LlamaForCausalLM"][0]
    model = load_model(folder, (Llama,), "cpu")
    text = t.randint(1, 300, (40, ls.TUNED_TOKENS))
    corpus = SimpleNamespace(key="text", rows=lambda rng, n, tokens, split: text[:n].numpy())
    monkeypatch.setattr(ls, "tuned_lens_corpus", lambda *_: corpus)
    settings = ls.LensConfig(tuned_steps=2, jacobian_rows=2)
    assert ls.open_lens(model, folder, settings).translators is None
    tuned = ls.open_lens(model, folder, dataclasses.replace(settings, lens="tuned"))
    jacobian = ls.open_lens(model, folder, dataclasses.replace(settings, lens="jacobian"))
    assert isinstance(tuned.translators[0], Translator)
    expected = ls.fit_jacobian_lens(model, text[:2], "later", 1)
    t.testing.assert_close(t.stack([x.weight for x in jacobian.translators]), expected)
    assert len(list(tmp_path.glob("checkpoints/*_lens/*.safetensors"))) == 2
    with pytest.raises(SystemExit, match="in memory"):
        ls.open_lens(Streamed(folder, "cpu", t.float32), folder, dataclasses.replace(settings, lens="tuned"))
    for wrong in ({"lens": "tuned", "tuned_steps": 0}, {"jacobian_rows": 0}, {"memory_gb": 0.0}):
        with pytest.raises(SystemExit, match="or more|more than 0"):
            ls.refuse_lens_settings(dataclasses.replace(settings, **wrong))


def test_an_audit_counts_a_layer_only_where_a_second_lens_says_it_too():
    """Ranks by layer of three places; the last layer is the model's own output and counts alone."""
    normed = {"rank": t.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 3]])}
    unnormed = {"rank": t.tensor([[0, 0, 0], [4, 0, 0], [9, 9, 0]])}
    tuned = {"rank": t.tensor([[0, 5, 0], [0, 5, 0], [0, 5, 3]])}
    assert ls.confirmed_semantic(normed, unnormed)[:2].tolist() == [2, 0]
    assert ls.confirmed_semantic(normed, unnormed, tuned)[:2].tolist() == [1, 0]
    assert ls.confirmed_semantic(normed, unnormed, tuned)[2].isnan()
    assert unnormed["rank"][2, 0] == 9  # the reading is left as it was


def test_the_norm_s_artefact_is_the_kl_between_the_two_lenses(made):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    rows = token_batch(0)
    found = ls.norm_artefact(model, rows)
    normed = ls.logit_lens(model, rows)
    _, cache = ls.run_with_cache(model, rows, ls.layer_streams(model))
    unnormed = t.stack([model.unembed(cache[stream]) for stream in ls.layer_streams(model)])
    kl = t.nn.functional.kl_div(unnormed.log_softmax(-1), normed.softmax(-1), reduction="none").sum(-1).mean((1, 2))
    t.testing.assert_close(t.tensor(found["KL"]), kl, atol=1e-4, rtol=1e-4)
    same = (normed.argmax(-1) == unnormed.argmax(-1)).float().mean((1, 2))
    t.testing.assert_close(t.tensor(found["same top-1"]), same, atol=2e-3, rtol=0)
    assert same.min() < 1


VOCAB = dict(enumerate([" Tokyo", " Japan", " capital", ",", "\x00", " pan", " x", " y"]))
# By prompt, over six layers: the likeliest token, with its logit above all others; the answer is token 0
COLUMNS = [
    # top-1 at 2, lost at 3, settles at 4; category at 1; the prompt's word dominates at 3
    [(6, 9), (2, 1), (0, 9), (1, 9), (0, 9), (0, 9)],
    # from the start
    [(0, 9)] * 6,
    # never; punctuation first; the prompt's word at the end
    [(3, 9), (6, 9), (6, 9), (6, 9), (6, 9), (1, 9)],
    # junk at 2; the last layer sharpens what was there
    [(6, 9), (6, 9), (4, 9), (6, 9), (0, 2), (0, 9)],
    # ' pan' is three characters of the prompt, but not likely enough; punctuation late
    [(5, 1), (5, 1), (6, 9), (6, 9), (3, 9), (0, 9)],
    # ' pan' dominates
    [(5, 9), (6, 9), (6, 9), (6, 9), (0, 9), (0, 9)],
]


def test_milestones_of_hand_made_logits():
    logits = t.zeros(6, 6, 8)
    for place, column in enumerate(COLUMNS):
        for layer, (token, height) in enumerate(column):
            logits[layer, place, token] = height
    # at layer 1 of the first prompt ' y' is likeliest and the category is second: in the top 2, the answer far below
    logits[1, 0, 7] = 1.5
    logits[1, 0, 0] = -3.0
    final = logits[-1].log_softmax(-1)
    readings = [ls.consume_logits(x.clone(), t.zeros(6, dtype=t.long), 2, final) for x in logits]
    found = {name: t.stack([reading[name] for reading in readings]) for name in readings[0]}
    prompts = ["the capital of Japan is"] * 6
    got = ls.milestones(found, VOCAB, prompts, [("capital", "city")] * 6, threshold=0.5)
    nan = float("nan")
    for name, expected in {"semantic": [4, 0, nan, 4, 5, 4], "copied": [3, nan, 5, nan, nan, 0]}.items():
        np.testing.assert_array_equal(got[name].numpy(), expected, err_msg=name)
    assert got["category"][0] == 1
    assert got["category"][1].isnan()
    odd = {
        "copy collapse": [1, 0, 1, 0, 0, 1],
        "early punctuation": [0, 0, 1, 0, 0, 0],
        "junk": [0, 0, 0, 1, 0, 0],
        "last-layer miscalibration": [0, 0, 0, 1, 0, 0],
    }
    assert {rule: got[rule].int().tolist() for rule in ls.RULES} == odd


def test_the_grid_shows_the_likeliest_token_and_its_probability(made):
    folder = made["LlamaForCausalLM"][0]
    model = load_model(folder, (Llama,), "cpu")
    row = encode(model, "the capital")
    found = read(model, Lens(model), [row], [(0, i) for i in range(len(row))], row)
    texts = ls.token_texts(model, found["ids"])
    tokens = [token_text(model, i) for i in row]
    cells = ls.grid_figure(found, texts, tokens, "title").data[0]
    assert list(cells.y) == ["embed", "L0", "L1", "L2"]
    best = int(found["ids"][2, 1, 0])
    assert cells.text[2][1] == ls.visible(texts[best])
    assert cells.z[2][1] == pytest.approx(found["logp"][2, 1, 0].exp().item())
    assert cells.hovertext[2][1].count("<br>") == 4
    assert len(ls.grid_table(found, texts, tokens).splitlines()) == 2 + 4


def test_a_model_s_key_follows_its_settings_and_its_weights(made, tmp_path):
    folder, hf, _ = made["Qwen3ForCausalLM"]
    key = model_key(folder, ["auto", 0])
    assert key == model_key(folder, ["auto", 0])
    assert key != model_key(folder, ["auto", 1])
    other = random_model("Qwen3ForCausalLM")
    other.get_output_embeddings().weight.data.mul_(2)
    other.save_pretrained(tmp_path)
    assert model_key(str(tmp_path), ["auto", 0]) != key


@pytest.mark.parametrize(
    "name,bos",
    [("LlamaForCausalLM", True), ("LlamaForCausalLM", False), ("GPT2LMHeadModel", True), ("GPTNeoXForCausalLM", True)],
)
def test_bos_stands_once_and_the_run_says_so(made, tmp_path, name, bos):
    made[name][1].save_pretrained(tmp_path)
    save_tokenizer(tmp_path, bos)
    model = load_model(str(tmp_path), (Llama,), "cpu")
    ids = encode(model, "the capital")
    assert ids.count(0) == bos
    assert (ids[0] == 0) == bos
    assert ("put first, once" in about_bos(model)) == bos
    if bos:
        assert encode(model, "<|endoftext|>the capital") == ids
    assert "".join(token_text(model, i) for i in ids[bos:]) == "the capital"


def test_a_model_that_cannot_be_read_gets_one_line(made, tmp_path):
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.gguf").touch()
    bare = tmp_path / "bare"
    bare.mkdir()
    config = Path(made["LlamaForCausalLM"][0]) / "config.json"
    (bare / "config.json").write_text(config.read_text())
    for bad, word in (
        ("model.gguf", "GGUF"),
        (str(gguf), "GGUF"),
        (str(tmp_path / "none"), "no such"),
        (str(bare), "save_pretrained"),
        ("nobody/nothing", "network"),
        ("gpt2", "network"),
    ):
        with pytest.raises(SystemExit, match=word) as error:
            find_model(bad)
        assert "\n" not in str(error.value)


def test_an_answer_is_one_token_or_its_first_is_named(made):
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu")
    prompt = "the capital of Japan is"
    assert token_text(model, answer_token(model, prompt, "Tokyo")) == " Tokyo"
    with pytest.raises(SystemExit, match="several tokens.*--answer"):
        answer_token(model, prompt, "Reykjavik")


def test_of_equal_logits_the_first_is_the_top():
    """Half precision has ties: greedy decoding takes the smaller id, and so does the rank."""
    logits = t.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    answers = t.tensor([2, 3])
    ranks = count_above(logits, logits.gather(1, answers[:, None]), answers)
    assert ranks.tolist() == [1, 3]
    assert count_above(logits, logits.gather(1, logits.argmax(1, keepdim=True)), logits.argmax(1)).tolist() == [0, 0]
