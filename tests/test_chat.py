"""
Talking to models/world and to transformers models: greedy tokens, the chat template, and the lens of the last answer.
"""

import json
from pathlib import Path

import pytest
import torch as t
from conftest import ROOT
from test_lens import ROWS, save_model

import chat as ch
from data import text_of
from lens import Lens
from llama_block import Llama
from utils import load_model
from weights import text_tokenizer


def type_in(monkeypatch, *texts: str) -> None:
    """What is typed, line by line, then Ctrl-D."""
    left = list(texts)

    def typed(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", typed)


def test_chat_goes_on_shows_its_lens_and_leaves(workdir, monkeypatch, capsys):
    model = load_model(str(ROOT / "models/world"), (Llama,), "cpu")
    type_in(monkeypatch, "/lens", "", "The capital of Japan is", "/lens")
    monkeypatch.chdir(workdir)
    assert ch.chat(model, Lens(model), 3) == 1
    out = capsys.readouterr().out
    assert "nothing was said yet" in out
    assert " Tokyo" in out
    assert "·Tokyo" in out
    assert (workdir / "figs/chat/lens.html").is_file()


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def write_json(path: Path, **fields) -> None:
    """Set fields of a JSON file, which may not be there yet."""
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | fields))


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])  # through the bridge, in our class
def test_chat_uses_the_folders_template_and_what_was_said_before(name, tmp_path, monkeypatch, capsys):
    save_model(name, tmp_path)
    write_json(tmp_path / "tokenizer_config.json", chat_template=TEMPLATE)
    model = load_model(str(tmp_path), (Llama,), device="cpu")
    asked = []
    generate = ch.generate

    def spy(model, ids: list[int], n: int):
        asked.append(text_of(text_tokenizer(model), ids))
        return generate(model, ids, n)

    monkeypatch.setattr(ch, "generate", spy)
    type_in(monkeypatch, "Tokyo", "Japan")
    assert ch.chat(model, Lens(model), 4) == 2
    assert asked[0] == "[user]Tokyo"
    assert asked[1].startswith("[user]Tokyo[assistant]")
    assert asked[1].endswith("[user]Japan")
    assert "chat template" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_an_answer_ends_at_the_end_of_turn_of_generation_config(name, tmp_path):
    save_model(name, tmp_path)
    model = load_model(str(tmp_path), (Llama,), device="cpu")
    untold = list(ch.generate(model, ROWS[0], 6))
    assert len(untold) > 2
    write_json(tmp_path / "generation_config.json", eos_token_id=[7, untold[2]])
    assert list(ch.generate(model, ROWS[0], 6)) == untold[: untold.index(untold[2])]


def test_a_conversation_beyond_the_context_is_said_and_begun_anew(tmp_path, monkeypatch, capsys):
    save_model("LlamaForCausalLM", tmp_path)
    model = load_model(str(tmp_path), (Llama,), device="cpu")
    full = [1] * (model.cfg.n_ctx - 2)
    assert len(list(ch.generate(model, full, 8))) <= 2
    type_in(monkeypatch, "Tokyo " * model.cfg.n_ctx, "Tokyo")
    assert ch.chat(model, Lens(model), 2) == 1
    assert f"the model reads {model.cfg.n_ctx}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_keys_and_values_change_no_greedy_token(tmp_path, name):
    hf = save_model(name, tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = hf.generate(t.tensor([ROWS[0]]), **greedy)[0, len(ROWS[0]) :].tolist()
    until_the_end = theirs[: theirs.index(0)] if 0 in theirs else theirs
    assert list(ch.generate(model, ROWS[0], 6)) == until_the_end


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(monkeypatch, capsys):
    model = load_model(str(ROOT / "models/world"), (Llama,), "cpu")
    generate = ch.generate

    def interrupted(model, ids: list[int], n: int):
        yield next(generate(model, ids, n))
        raise KeyboardInterrupt

    monkeypatch.setattr(ch, "generate", interrupted)
    answer, shown = ch.say(model, ch.encode(model, "The capital of Japan is"), 5)
    assert len(answer) == 1
    assert shown.strip() == "Tokyo"
    assert "(stopped)" in capsys.readouterr().out


def test_the_script_greets_gates_and_concludes(run, workdir, monkeypatch):
    type_in(monkeypatch, "The capital of Japan is", "/lens")
    monkeypatch.chdir(workdir)
    done = run("chat.py", "--chat-tokens", "3", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "gate: the last layer's lens" in done.stdout
    assert "models-world gave 1 answers" in done.stdout
    assert (workdir / "results/chat.json").is_file()
