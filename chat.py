"""
Talk to a model in the terminal; /lens shows what it was about to say, layer by layer, at each token of its last answer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import (  # first: sets OpenMP's variables before torch is loaded
    Count,
    DtypeName,
    Natural,
    cyan,
    endc,
    find_model,
    gray,
    green,
    pick_device,
    purple,
    read_json,
    save_results,
    set_seed,
    yellow,
    on_base,
)
from plots import show
from data import text_of
from weights import about_bos, encode, generate, open_model, text_tokenizer, token_text
from launch import flags
from lens import Lens, grid_figure, grid_table, read, require_exact_lens, slug, token_texts
from llama_block import Llama

import torch.nn as nn

GATE_PROMPT = "Everyone knows that the capital of Japan is"


#%% A conversation
def has_template(folder: Path) -> bool:
    """Whether a model's folder says how messages are written."""
    said = read_json(folder / "tokenizer_config.json")
    return bool(said.get("chat_template")) or any(folder.glob("chat_template*"))


def prompt_tokens(model: nn.Module, messages: list[dict[str, str]]) -> list[int]:
    """All messages in the folder's chat template; without one, the last as plain text that the model goes on with."""
    if not has_template(model.folder):
        return encode(model, messages[-1]["content"])
    from transformers import AutoTokenizer

    writer = AutoTokenizer.from_pretrained(model.folder)
    text = writer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text_tokenizer(model).encode(text, add_special_tokens=False).ids


def say(model: nn.Module, asked: list[int], n: int) -> tuple[list[int], str]:
    """Print the answer as it grows; its tokens and text. Ctrl-C stops it."""
    answer: list[int] = []
    shown = ""
    try:
        for token in generate(model, asked, n):
            answer.append(token)
            text = text_of(text_tokenizer(model), answer)
            if text.endswith("\ufffd"):  # half of a character
                continue
            print(f"{cyan}{text[len(shown) :]}{endc}", end="", flush=True)
            shown = text
    except KeyboardInterrupt:
        print(f"{yellow} (stopped){endc}", end="")
    print()
    return answer, shown


def show_answer_lens(model: nn.Module, lens: Lens, asked: list[int], answer: list[int]) -> None:
    """The lens where each token of the answer was about to be said, one position before it."""
    row = asked + answer[:-1]
    places = [(0, position) for position in range(len(asked) - 1, len(row))]
    found = read(model, lens, [row], places, answer)
    texts = token_texts(model, found["ids"])
    tokens = [token_text(model, i) for i in answer]
    show(grid_figure(found, texts, tokens, f"Lens of the last answer ({len(answer)} tokens, greedy)"), "chat/lens")
    print(grid_table(found, texts, tokens))


def chat(model: nn.Module, lens: Lens, n: int) -> int:
    """Ask and answer until Ctrl-D, up to n tokens an answer; how many answers there were."""
    style = f"no chat template: the model goes on with what you write; {about_bos(model)}"
    if has_template(model.folder):
        style = "messages are written in the model's chat template"
    print(f"{gray}{style}; /lens shows the lens of the last answer, Ctrl-D leaves{endc}")
    messages: list[dict[str, str]] = []
    asked: list[int] = []
    answer: list[int] = []
    while True:
        try:
            text = input(f"{purple}> {endc}").strip()
        except EOFError:
            print()
            return len(messages) // 2
        if text == "":
            continue
        if text == "/lens":
            if answer:
                show_answer_lens(model, lens, asked, answer)
            else:
                print(f"{yellow}nothing was said yet{endc}")
            continue
        messages.append({"role": "user", "content": text})
        prompt = prompt_tokens(model, messages)
        if len(prompt) >= model.cfg.n_ctx:
            print(
                f"{yellow}this conversation has {len(prompt)} tokens, the model reads {model.cfg.n_ctx}: "
                f"what was said is forgotten, ask again{endc}"
            )
            messages.clear()
            continue
        asked = prompt  # with its answer what /lens reads
        answer, shown = say(model, asked, n)
        messages.append({"role": "assistant", "content": shown})


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str = "models/world"  # a hub name, a short name (gpt2-small, pythia-70m) or a folder
    base: str | None = None  # a model whose config and tokenizer the weights of --model are put on
    bos: bool | None = None  # put a beginning-of-text token first; default as the model's own tokenizer says
    chat_tokens: Count = 200  # the longest answer
    norm: Literal["final", "none"] = "final"  # before the unembedding: the model's own final norm, or none (to compare)
    dtype: DtypeName = "auto"  # of the weights; auto: bfloat16 on a GPU that has it, else float32
    offload: Literal["auto", "on", "off"] = "auto"  # weights come block by block: where they do not fit, always, never
    seed: Natural = 0  # of every draw
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=Config(model="Qwen/Qwen3-8B", dtype="bfloat16"), shares_results=False)
    device = pick_device(cfg.device)
    set_seed(cfg.seed)

#%% The model, and the gate: the last layer's lens is its own output
if __name__ == "__main__":
    cfg.model = on_base(cfg.model, cfg.base)
    model = open_model(cfg.model, (Llama,), cfg.device, cfg.dtype, cfg.offload, bos=cfg.bos)
    name = slug(find_model(cfg.model))
    print(f"{purple}=== {name}: {model.cfg.n_layers} layers, norm {cfg.norm}; {about_bos(model)} ==={endc}")
    gate_error = require_exact_lens(model, [encode(model, GATE_PROMPT)])
    print(f"{cyan}gate: the last layer's lens misses the model's own logits by {gate_error:.1e}{endc}")

#%% The conversation: what you write, what it answers, and at /lens what it was about to say at every layer
if __name__ == "__main__":
    n_answers = chat(model, Lens(model, cfg.norm), cfg.chat_tokens)

#%% The conclusion
if __name__ == "__main__":
    save_results("chat", cfg, answers=n_answers, last_layer_gate_error=gate_error)
    print(f"{green}{name} gave {n_answers} answers. Gate: last-layer lens = own logits to {gate_error:.0e}.{endc}")
