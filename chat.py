"""
Talk to a model in the terminal; /lens shows what it was about to say, layer by layer, at each token of its last answer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from utils import (  # first: sets OpenMP's variables before torch is loaded
    cyan,
    endc,
    fail,
    find_model,
    gray,
    green,
    pick_device,
    purple,
    save_results,
    set_seed,
    yellow,
)
from plots import show
from hooks import device_of, is_streamed
from weights import about_bos, begin, encode, open_model, token_text
from launch import flags
from lens import Lens, grid_figure, grid_table, read, require_exact_lens, slug, token_texts
from llama_block import Llama

import torch as t
import torch.nn as nn
from tokenizers import Tokenizer

GATE_PROMPT = "Everyone knows that the capital of Japan is"


#%% Answers, token by token
def ends_of(model: nn.Module) -> list[int]:
    """The tokens by which a model ends its text."""
    if isinstance(model.tokenizer, Tokenizer):
        return [begin(model)]  # our texts follow each other, each begun by this
    hf = model.hf if is_streamed(model) else model.original_model
    ends = hf.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


@t.no_grad()
def generate(model: nn.Module, ids: list[int], n: int) -> Iterator[int]:
    """
    Up to n greedy tokens, until the model ends its text; transformers models keep their keys and values, ours read all
    again.
    """
    keeps: dict = {}
    if not isinstance(model.tokenizer, Tokenizer):
        from transformers import DynamicCache

        keeps = {"past_key_values": DynamicCache(), "use_cache": True}
    ends = ends_of(model)
    unread = list(ids)
    for _ in range(n):
        logits = model(t.tensor([unread], device=device_of(model)), **keeps)
        token = int(logits[0, -1].argmax())
        if token in ends:
            return
        yield token
        unread = [token] if keeps else [*unread, token]


#%% A conversation
def prompt_tokens(model: nn.Module, messages: list[dict[str, str]]) -> list[int]:
    """
    All messages in the tokenizer's chat template; without one, the last as plain text that the model goes on with.
    """
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return encode(model, messages[-1]["content"])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def say(model: nn.Module, asked: list[int], n: int) -> tuple[list[int], str]:
    """Print the answer as it grows; its tokens and text. Ctrl-C stops it."""
    answer: list[int] = []
    shown = ""
    try:
        for token in generate(model, asked, n):
            answer.append(token)
            text = model.tokenizer.decode(answer)
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
    if getattr(model.tokenizer, "chat_template", None):
        style = "chat template of the tokenizer"
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
        asked = prompt_tokens(model, messages)
        answer, shown = say(model, asked, n)
        messages.append({"role": "assistant", "content": shown})


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str = "models/world"  # a hub name, a short name (gpt2-small, pythia-70m) or a folder
    chat_tokens: int = 200  # the longest answer
    norm: Literal["final", "none"] = "final"  # before the unembedding: the model's own final norm, or none (to compare)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it
    offload: Literal["auto", "on", "off"] = "auto"  # weights come block by block: where they do not fit, always, never
    seed: int = 0
    device: str = "auto"


if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=Config(model="Qwen/Qwen3-8B", dtype="bfloat16"))
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    if cfg.chat_tokens < 1:
        fail("--chat-tokens is 1 or more")

#%% The model, and the gate: the last layer's lens is its own output
if __name__ == "__main__":
    model = open_model(cfg.model, (Llama,), cfg.device, cfg.dtype, cfg.offload)
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
