"""
The lens on tiny random models of seven architectures against Hugging Face, the engine against the plain forms, and
milestones on hand-made logits.
"""

from pathlib import Path

import numpy as np
import pytest
import torch as t
from conftest import memory_for

import lens as ls
from data import put_first, train_bpe
from lens import Lens, Translator, read
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
