"""The lens on tiny random models of seven architectures against Hugging Face, milestones on hand-made logits, and the script on models/world."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch as t
from conftest import ROOT, memory_for, one_line_error
from tokenizers import processors

import logit_lens as ll
from anatomy import logit_parts
from data import train_bpe
from llama_block import Llama
from utils import load_model

SHAPE = dict(
    vocab_size=700,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
)
GROUPED = SHAPE | dict(num_key_value_heads=2)
ARCHITECTURES = {
    "GPT2LMHeadModel": dict(vocab_size=700, n_embd=48, n_layer=3, n_head=4, n_positions=64),
    "GPTNeoXForCausalLM": SHAPE,
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED | dict(sliding_window=6),
    "Qwen3ForCausalLM": GROUPED | dict(head_dim=16),
    "Gemma2ForCausalLM": GROUPED | dict(head_dim=16, final_logit_softcapping=3.0),
    "MixtralForCausalLM": GROUPED | dict(num_local_experts=4),
}
ROWS = [t.randint(1, 700, (n,), generator=t.Generator().manual_seed(n)).tolist() for n in (12, 7, 9, 12, 3)]
PLACES = [(i, j) for i, row in enumerate(ROWS) for j in range(len(row))]
ANSWERS = [(37 * i) % 700 for i in range(len(PLACES))]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple]:
    """By architecture: (folder, Hugging Face model, its logits at PLACES by layer through its own final norm, head and soft cap)."""
    import transformers

    out = {}
    for name, config in ARCHITECTURES.items():
        t.manual_seed(0)
        hf = getattr(transformers, name)(
            getattr(transformers, name.removesuffix("LMHeadModel").removesuffix("ForCausalLM") + "Config")(**config)
        ).eval()
        with t.no_grad():
            for p in hf.parameters():
                p.add_(0.15 * t.randn(p.shape))  # default initialisation hides bugs
            runs = [hf(t.tensor([row]), output_hidden_states=True) for row in ROWS]
            norm = getattr(
                hf.base_model, {"GPT2LMHeadModel": "ln_f", "GPTNeoXForCausalLM": "final_layer_norm"}.get(name, "norm")
            )
            cap = lambda x: 3 * (x / 3).tanh() if name == "Gemma2ForCausalLM" else x
            layers = [
                t.cat([cap(hf.get_output_embeddings()(norm(r.hidden_states[layer][0]))) for r in runs])
                for layer in range(3)
            ]
        folder = tmp_path_factory.mktemp(name)
        hf.save_pretrained(folder)
        save_tokenizer(folder)
        out[name] = (str(folder), hf, t.stack([*layers, t.cat([r.logits[0] for r in runs])]).detach())
    return out


def save_tokenizer(folder: Path, bos: bool = True) -> None:
    from transformers import PreTrainedTokenizerFast

    own = train_bpe(["the capital of Japan is Tokyo, the city of Tokyo is the capital of Japan."] * 9, 300)
    if bos:
        own.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<|endoftext|>", eos_token="<|endoftext|>").save_pretrained(
        folder
    )


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
    assert ll.gate(model, ROWS) < 1e-5
    assert_reading(ll.read(model, ll.Lens(model), ROWS, PLACES, ANSWERS), logits)
    assert_reading(
        ll.read(model, ll.Lens(model), ROWS, PLACES, ANSWERS, against_final=False, chunk=5, batch=13), logits
    )


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"]
)
def test_weights_from_disk_give_the_same_lens(made, name):
    folder, _, logits = made[name]
    model = ll.Streamed(folder, "cpu", t.float32, resident=0.4)
    assert sum(p.is_meta for p in model.hf.parameters()) > 5  # two of three blocks are not in memory
    assert_reading(ll.read(model, ll.Lens(model), ROWS, PLACES, ANSWERS), logits)


def test_offload_is_chosen_by_flag(made, capsys):
    folder = made["LlamaForCausalLM"][0]
    kinds = [
        type(ll.open_model(folder, (ll.Llama,), "cpu", offload=offload)).__name__ for offload in ("on", "off", "auto")
    ]
    assert kinds == ["Streamed", "Llama", "Llama"] and "0% of the blocks stay" in capsys.readouterr().out


def test_the_gate_stops_a_wrong_way_out(made):
    model = load_model(made["Gemma2ForCausalLM"][0], device="cpu")
    model.cfg.output_logits_soft_cap = None
    with pytest.raises(SystemExit, match="no lens is read"):
        ll.gate(model, ROWS[:1])
    model = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu", "bfloat16")
    assert 0 <= ll.gate(model, ROWS) <= 0.02
    model.forward = lambda tokens: (
        1.1 * Llama.forward(model, tokens)
    )  # a scale after the unembedding, as some architectures have
    with pytest.raises(SystemExit, match="no lens is read"):
        ll.gate(model, ROWS[:1])


@t.no_grad()
def test_left_padding_batching_and_little_memory_change_no_number(made, capsys):
    folder, hf, logits = made["LlamaForCausalLM"]
    model, width = load_model(folder, (Llama,), "cpu"), max(map(len, ROWS))
    tokens = t.tensor([[0] * (width - len(row)) + row for row in ROWS])
    mask = t.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ROWS])
    theirs = hf(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[mask.bool()]
    rows = [row[keep.bool()].tolist() for row, keep in zip(tokens, mask)]
    found = [
        ll.read(model, ll.Lens(model), rows, PLACES, ANSWERS, batch=batch, chunk=chunk)
        for batch, chunk in ((4096, 256), (1, 3), (30, 7))
    ]
    for x in found[1:]:
        for name in x:
            t.testing.assert_close(x[name], found[0][name], atol=1e-5, rtol=1e-5)
    t.testing.assert_close(found[0]["logp"][-1], theirs.log_softmax(-1).topk(5).values, atol=1e-4, rtol=1e-4)
    with memory_for(model, 1):
        halved = ll.read(model, ll.Lens(model), rows, PLACES, ANSWERS)
    assert "out of memory: going on with 1 rows" in capsys.readouterr().out
    for name in halved:
        t.testing.assert_close(halved[name], found[0][name], atol=1e-5, rtol=1e-5)
    order = t.randperm(len(PLACES)).tolist()
    some = ll.read(model, ll.Lens(model), rows, [PLACES[i] for i in order], [ANSWERS[i] for i in order])
    t.testing.assert_close(some["answer_logit"], found[0]["answer_logit"][:, order], atol=1e-5, rtol=1e-5)


def test_never_more_than_a_chunk_of_logits(made):
    model, seen = load_model(made["LlamaForCausalLM"][0], (Llama,), "cpu"), []

    class Watched(ll.Lens):
        def __call__(self, x: t.Tensor, layer: int = -1) -> t.Tensor:
            seen.append(len(x))
            return super().__call__(x, layer)

    for final in (True, False):
        ll.read(model, Watched(model), ROWS, PLACES, ANSWERS, chunk=8, against_final=final)
    assert max(seen) == 8 and sum(seen) == 2 * 3 * len(
        PLACES
    )  # every place once at each layer but the last, which is the model's own


@pytest.mark.parametrize("vocab", [50, 1000, 3072, 5001])
def test_top_tokens_are_the_top_tokens(vocab):
    x = t.randn(20, vocab)
    x[:, -1] += 4  # in the stretch that is left over
    values, ids = ll.top_tokens(x, 5)
    assert t.equal(values, x.topk(5).values) and t.equal(x.gather(1, ids), values)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_layer_writes_sum_to_the_logit(made, name):
    folder, _, logits = made[name]
    model, last = load_model(folder, (Llama,), "cpu"), logits[-1, len(ROWS[0]) - 1]
    if name == "Gemma2ForCausalLM":
        last = 3 * (last / 3).atanh()  # before the soft cap
    for token in (5, 300):
        writes, logit = ll.layer_writes(model, ROWS[0], token)
        assert abs(sum(writes.values()) - logit) < 1e-3 and abs(logit - last[token]) < 1e-2
        if name == "Gemma2ForCausalLM":
            continue
        parts = logit_parts(model, t.tensor([ROWS[0]]), token)
        t.testing.assert_close(
            t.tensor([writes[f"L{i}"] for i in range(3)]),
            parts["heads"].sum((1, 2)) + parts["attn_bias"] + parts["mlp"],
            atol=1e-3,
            rtol=1e-3,
        )


def test_the_tuned_lens_is_the_identity_at_first_and_improves(made, tmp_path):
    folder, _, logits = made["LlamaForCausalLM"]
    model = load_model(folder, (Llama,), "cpu")
    translators = t.nn.ModuleList(ll.Translator(48, 48) for _ in range(3))
    x, lens = t.randn(6, 48), ll.Lens(model)
    assert t.equal(ll.Lens(model, translators=translators)(x, 1), lens(x)) and t.equal(
        ll.Lens(model, translators=translators)(x, 3), lens(x)
    )
    batch = lambda step: t.randint(1, 700, (16, 12), generator=t.Generator().manual_seed(step))
    trained = ll.tuned_lens(model, batch, 60, tmp_path / "tuned/lens.safetensors")
    raw, tuned = (
        ll.read(model, lens, ROWS, PLACES, ANSWERS)["kl"].mean(1)
        for lens in (ll.Lens(model), ll.Lens(model, translators=trained))
    )
    assert (tuned[:-1] < 0.9 * raw[:-1]).all() and abs(tuned[-1]) < 1e-5
    again = ll.tuned_lens(model, lambda step: 1 / 0, 60, tmp_path / "tuned/lens.safetensors")  # read back, not trained
    assert all(t.equal(a, b) for a, b in zip(trained.parameters(), again.parameters())) and all(
        p.requires_grad for p in model.parameters()
    )


VOCAB = dict(enumerate([" Tokyo", " Japan", " capital", ",", "\x00", " pan", " x", " y"]))


def test_milestones_of_hand_made_logits():
    """Six layers, six prompts, one answer (token 0); the likeliest token of each layer, with its logit above all others."""
    columns = [
        [
            (6, 9),
            (2, 1),
            (0, 9),
            (1, 9),
            (0, 9),
            (0, 9),
        ],  # top-1 at 2, lost at 3, settles at 4; category at 1; the prompt's word dominates at 3
        [(0, 9)] * 6,  # from the start
        [(3, 9), (6, 9), (6, 9), (6, 9), (6, 9), (1, 9)],  # never; punctuation first; the prompt's word at the end
        [(6, 9), (6, 9), (4, 9), (6, 9), (0, 2), (0, 9)],  # junk at 2; the last layer sharpens what was there
        [
            (5, 1),
            (5, 1),
            (6, 9),
            (6, 9),
            (3, 9),
            (0, 9),
        ],  # ' pan' is three characters of the prompt, but not likely enough; punctuation late
        [(5, 9), (6, 9), (6, 9), (6, 9), (0, 9), (0, 9)],  # ' pan' dominates
    ]
    logits = t.zeros(6, 6, 8)
    for place, column in enumerate(columns):
        for layer, (token, height) in enumerate(column):
            logits[layer, place, token] = height
    logits[1, 0, 7], logits[1, 0, 0] = 1.5, -3.0
    final = logits[-1].log_softmax(-1)
    found = [ll.read_logits(x.clone(), t.zeros(6, dtype=t.long), 2, final) for x in logits]
    found = {name: t.stack([x[name] for x in found]) for name in found[0]}
    got = ll.milestones(found, VOCAB, ["the capital of Japan is"] * 6, [("capital", "city")] * 6, 0.5)
    nan = float("nan")
    for name, expected in {"semantic": [4, 0, nan, 4, 5, 4], "copied": [3, nan, 5, nan, nan, 0]}.items():
        np.testing.assert_array_equal(got[name].numpy(), expected, err_msg=name)
    assert got["category"][0] == 1 and got["category"][1].isnan()
    odd = {
        "copy collapse": [1, 0, 1, 0, 0, 1],
        "early punctuation": [0, 0, 1, 0, 0, 0],
        "junk": [0, 0, 0, 1, 0, 0],
        "last-layer miscalibration": [0, 0, 0, 1, 0, 0],
    }
    assert {rule: got[rule].int().tolist() for rule in ll.RULES} == odd


def test_intervals_resample_countries():
    frame = pd.DataFrame(
        {"country": np.repeat(np.arange(100), 4), "x": np.repeat(np.arange(100) % 2, 4).astype(float), "same": 1.0}
    )
    mean, low, high = ll.interval(frame, "x", 2000)
    assert mean == 0.5 and abs((high - low) / 2 - 1.96 * 0.5 / 10) < 0.015  # 400 questions, but 100 countries
    assert ll.interval(frame, "same", 100) == [1, 1, 1] and ll.interval(frame, "x", 100, frame) == [0, 0, 0]  # paired
    assert np.isnan(ll.interval(frame.assign(x=np.nan), "x", 10)).all()


@pytest.mark.parametrize(
    "name,bos",
    [("LlamaForCausalLM", True), ("LlamaForCausalLM", False), ("GPT2LMHeadModel", True), ("GPTNeoXForCausalLM", True)],
)
def test_bos_stands_once_and_the_run_says_so(made, tmp_path, name, bos):
    folder, hf, _ = made[name]
    hf.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, bos)
    model = load_model(str(tmp_path), (Llama,), "cpu")
    ids, here = ll.encode(model, "the capital"), bos and name != "GPTNeoXForCausalLM"  # Pythia was trained without
    assert ids.count(0) == here and (ids[0] == 0) == here and ("put first, once" in ll.about_bos(model)) == here
    if here:
        assert ll.encode(model, "<|endoftext|>the capital") == ids
    assert "".join(ll.token_text(model, i) for i in ids[here:]) == "the capital"


def test_bad_inputs_get_one_line(made, tmp_path, run):
    folder = made["LlamaForCausalLM"][0]
    (tmp_path / "gguf").mkdir(), (tmp_path / "gguf/model.gguf").touch(), (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((Path(folder) / "config.json").read_text())
    for bad, word in (
        ("model.gguf", "GGUF"),
        (str(tmp_path / "gguf"), "GGUF"),
        (str(tmp_path / "none"), "no such"),
        (str(tmp_path / "bare"), "save_pretrained"),
        ("nobody/nothing", "network"),
        ("gpt2", "network"),
    ):
        with pytest.raises(SystemExit, match=word) as error:
            ll.find_model(bad)
        assert "\n" not in str(error.value)
    model = load_model(folder, (Llama,), "cpu")
    assert ll.token_text(model, ll.answer_token(model, "the capital of Japan is", "Tokyo")) == " Tokyo"
    with pytest.raises(SystemExit, match="several tokens.*--answer"):
        ll.answer_token(model, "the capital of Japan is", "Reykjavik")
    with pytest.raises(SystemExit, match="reads 64 tokens"):
        ll.analyse(
            made["GPT2LMHeadModel"][0],
            ll.Config(countries=24, forms=2),
            load_model(made["GPT2LMHeadModel"][0], device="cpu"),
        )
    one_line_error(run("logit_lens.py", "--prompt", " "), "--prompt is empty")


def test_models_one_after_the_other_skip_what_is_finished(made, run, workdir, tmp_path):
    (folder, hf, _), small = (
        made["Qwen3ForCausalLM"],
        ("--countries", "6", "--forms", "1", "--draws", "50", "--device", "cpu"),
    )
    assert run("logit_lens.py", "--models", "models/world", *small).returncode == 0
    done = run("logit_lens.py", "--models", "models/world", folder, *small)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "models-world: finished before" in done.stdout
        and f"{ll.slug(folder)}: finished" not in done.stdout
        and "Answers settle" in done.stdout
    )
    table = (workdir / "results/logit_lens/cross-model.md").read_text()
    assert (
        "models-world" in table
        and ll.slug(folder) in table
        and (workdir / "results/logit_lens" / f"{ll.slug(folder)}.md").is_file()
    )
    key = ll.run_key(folder, ll.Config())
    assert key == ll.run_key(folder, ll.Config(tuned_steps=1, device="cpu")) != ll.run_key(folder, ll.Config(forms=3))
    hf.get_output_embeddings().weight.data.mul_(2)
    hf.save_pretrained(tmp_path)
    assert ll.run_key(str(tmp_path), ll.Config()) != key  # other weights, the same settings


def test_chat_goes_on_shows_its_lens_and_leaves(workdir, monkeypatch, capsys):
    model, said = (
        load_model(str(ROOT / "models/world"), (Llama,), "cpu"),
        iter(["/lens", "", "The capital of Japan is", "/lens"]),
    )

    def typed(prompt: str) -> str:
        for text in said:
            return text
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.chdir(workdir)
    ll.chat(model, ll.Lens(model), 3)
    out = capsys.readouterr().out
    assert (
        "nothing was said yet" in out
        and " Tokyo" in out
        and "·Tokyo" in out
        and (workdir / "figs/logit_lens/chat.html").is_file()
    )


def test_chat_uses_the_template_and_what_was_said_before(made, monkeypatch, capsys):
    model, said = load_model(made["GPT2LMHeadModel"][0], device="cpu"), iter(["Tokyo", "Japan"])
    model.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    asked, generate = [], ll.generate

    def spy(model, ids: list[int], n: int):
        asked.append(model.tokenizer.decode(ids))
        return generate(model, ids, n)

    monkeypatch.setattr(ll, "generate", spy)
    monkeypatch.setattr("builtins.input", lambda prompt: next(said, None) or (_ for _ in ()).throw(EOFError))
    ll.chat(model, ll.Lens(model), 4)
    assert (
        asked[0] == "[user]Tokyo" and asked[1].startswith("[user]Tokyo[assistant]") and asked[1].endswith("[user]Japan")
    )
    assert "chat template of the tokenizer" in capsys.readouterr().out


def test_keys_and_values_change_no_greedy_token(made):
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM"):
        hf = made[name][1]
        model = load_model(made[name][0], device="cpu")
        theirs = hf.generate(t.tensor([ROWS[0]]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[
            0, 12:
        ].tolist()
        assert list(ll.generate(model, ROWS[0], 6)) == theirs[: theirs.index(0) if 0 in theirs else None]
