"""Weights and tokens of any model: safetensors tensor by tensor, models larger than memory, beginning-of-text exactly once."""

import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

from utils import endc, fail, find_model, load_model, model_folder, pick_device, pick_dtype, secret, yellow
from hooks import HookPoint

import psutil
from safetensors import safe_open
from tokenizers import Tokenizer
import torch as t
from torch import Tensor
import torch.nn as nn


#%% Hugging Face files: tensor by tensor, every one in its place
def take_tensors[Model: nn.Module](model: Model, tensors: Iterable[tuple[str, Tensor]]) -> Model:
    """Put (Hugging Face name, tensor) pairs where model.place says; a tensor without a place, of the wrong shape or missing ends the program."""
    wanted, state = model.state_dict(), {}
    for name, x in tensors:
        for ours, part in model.place(name, x).items():
            if ours not in wanted:
                fail(f"tensor {name} has no place in {type(model).__name__} (it would be {ours})")
            if wanted[ours].shape != part.shape:
                fail(
                    f"tensor {name} gives {ours} the shape {tuple(part.shape)}, the config says {tuple(wanted[ours].shape)}"
                )
            state[ours] = part
    if (
        model.cfg.tied
        and "embed.weight" in state
        and not t.equal(state.setdefault("unembed.weight", state["embed.weight"]), state["embed.weight"])
    ):
        fail("the config ties embedding and unembedding, the file holds two different ones")
    if missing := [name for name in wanted if name not in state]:
        fail(f"{len(missing)} tensors are missing from the file, first {missing[0]}")
    model.load_state_dict(state, assign=True)
    if model.cfg.tied:
        model.unembed.weight = model.embed.weight
    return model.requires_grad_(True)


def read_tensors(name: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one by one, from the safetensors files (one or sharded) of a folder or hub model."""
    folder = model_folder(str(name))
    index = folder / "model.safetensors.index.json"
    for file in (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    ):
        if not (folder / file).is_file():
            fail(f"no {file} in {name}: only safetensors are read")
        try:
            tensors = safe_open(folder / file, "pt")
        except Exception as error:
            fail(f"{folder / file} is corrupt: {error}")
        with tensors:
            for key in tensors.keys():
                yield key, tensors.get_tensor(key)


def tensor_table(name: str) -> Iterator[tuple[str, tuple[int, ...], str, float]]:
    """(tensor name, shape, dtype, Frobenius norm), one tensor in memory at a time."""
    for key, x in read_tensors(name):
        yield (
            key,
            tuple(x.shape),
            str(x.dtype)[6:],
            math.sqrt(sum(part.double().pow(2).sum().item() for part in x.flatten().split(2**24))),
        )


#%% Models larger than memory: in memory where they fit, else their blocks come from the file when they are called
class Entered(Exception):
    "Carries what enters the first block."


class Streamed(nn.Module):
    """
    A plain transformers model under accelerate's offload: a share `resident` of the blocks stays on the device, the others come from the checkpoint
    (memory-mapped) when they are called, and leave again. Hooks: blocks.L.hook_resid_pre and hook_resid_post.
    """

    streamed = True

    def __init__(self, name: str, device: str, dtype: t.dtype, resident: float = 0.0):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        config = AutoConfig.from_pretrained(name, token=secret("HF_TOKEN"))
        shape = config.get_text_config()
        n_layers = shape.num_hidden_layers
        with t.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        stack = (
            next(
                path
                for path, module in empty.named_modules()
                if isinstance(module, nn.ModuleList) and len(module) == n_layers
            )
            + "."
        )
        owners = {
            path.rpartition(".")[0]
            for path, _ in [*empty.named_parameters(remove_duplicate=False), *empty.named_buffers()]
        }
        places = {path: device for path in owners if not path.startswith(stack)} | {
            f"{stack}{i}": device if i < int(resident * n_layers) else "disk" for i in range(n_layers)
        }
        self.converted = (
            tempfile.TemporaryDirectory()
        )  # for tensors that transformers keeps otherwise than the file does (experts)
        self.hf = AutoModelForCausalLM.from_pretrained(
            name, device_map=places, offload_folder=self.converted.name, dtype=dtype, token=secret("HF_TOKEN")
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(name, token=secret("HF_TOKEN"))
        self.cfg = SimpleNamespace(
            n_layers=n_layers,
            n_heads=shape.num_attention_heads,
            d_model=shape.hidden_size,
            d_mlp=getattr(shape, "intermediate_size", 4 * shape.hidden_size),
            d_vocab=shape.vocab_size,
            n_ctx=shape.max_position_embeddings,
            output_logits_soft_cap=getattr(shape, "final_logit_softcapping", None),
        )
        self.ln_final = [
            module
            for path, module in self.hf.named_modules()
            if not path.startswith(stack) and "norm" in type(module).__name__.lower()
        ][-1]
        self.unembed, self.blocks = self.hf.get_output_embeddings(), nn.ModuleList(nn.Module() for _ in range(n_layers))
        self.layers = list(self.hf.get_submodule(stack[:-1]))
        for ours, theirs in zip(self.blocks, self.layers):
            ours.hook_resid_pre, ours.hook_resid_post = HookPoint(), HookPoint()
            theirs.register_forward_pre_hook(lambda _, args, ours=ours: (ours.hook_resid_pre(args[0]), *args[1:]))
            theirs.register_forward_hook(
                lambda _, args, out, ours=ours: (
                    (ours.hook_resid_post(out[0]), *out[1:]) if isinstance(out, tuple) else ours.hook_resid_post(out)
                )
            )

    @property
    def W_U(self) -> Tensor:
        return self.unembed.weight.T

    def forward(self, tokens: Tensor, stop_at_layer: int | None = None, **kwargs) -> Tensor:
        """Logits; with stop_at_layer 0 the stream that enters the first block, before any block is read."""
        if stop_at_layer is None:
            return self.hf(tokens, **{"use_cache": False} | kwargs).logits
        assert stop_at_layer == 0

        def leave(module: nn.Module, args: tuple) -> None:
            raise Entered(args[0])

        handle = self.layers[0].register_forward_pre_hook(leave, prepend=True)
        try:
            self.hf(tokens, use_cache=False)
        except Entered as found:
            return found.args[0]
        finally:
            handle.remove()


def open_model(
    name: str, ours: tuple[type, ...] = (), device: str = "auto", dtype: str = "auto", offload: str = "auto"
) -> nn.Module:
    """load_model, or Streamed where the weights do not fit (offload auto) or always (on)."""
    name, device, count = find_model(name), pick_device(device), 0
    torch_dtype = pick_dtype(device, dtype)
    for path in model_folder(name).glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    need, free = (
        count * torch_dtype.itemsize,
        t.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available,
    )
    if offload == "off" or (offload == "auto" and need < 0.85 * free):
        return load_model(name, ours, device, dtype)
    resident = (
        0.0 if offload == "on" else min(1.0, max(0.0, 0.8 * free / need - 0.15))
    )  # embeddings stay too; the margin is for activations
    print(
        f"{yellow}{name}: {need / 1e9:.2f} GB of weights, {free / 1e9:.1f} GB free on {device}: {resident:.0%} of the blocks stay, the others come from disk at every pass; hooks on the residual stream only{endc}"
    )
    return Streamed(name, device, torch_dtype, resident)


#%% Tokens of any model: its own tokenizer, beginning-of-text exactly once
def text_tokenizer(model: nn.Module) -> Tokenizer:
    return getattr(model.tokenizer, "backend_tokenizer", model.tokenizer)


def begin(model: nn.Module) -> int | None:
    """The beginning-of-text token this model reads, or None: what TransformerLens says of the architecture, else what the tokenizer does by itself."""
    bare, own = (text_tokenizer(model).encode("a", add_special_tokens=special).ids for special in (False, True))
    bos = getattr(model.tokenizer, "bos_token_id", own[0])
    return bos if getattr(model.cfg, "default_prepend_bos", own != bare and own[0] == bos) else None


def encode(model: nn.Module, text: str) -> list[int]:
    ids, bos = text_tokenizer(model).encode(text, add_special_tokens=False).ids, begin(model)
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def token_text(model: nn.Module, token: int) -> str:
    piece = text_tokenizer(model).id_to_token(token) or ""  # padded vocabularies have ids without a token
    return (
        " " + piece[1:] if piece.startswith("▁") else text_tokenizer(model).decode([token], skip_special_tokens=False)
    )


def about_bos(model: nn.Module) -> str:
    bos = begin(model)
    return (
        "no beginning-of-text token: this model reads none"
        if bos is None
        else f"beginning-of-text token {token_text(model, bos)!r} ({bos}) put first, once"
    )


def answer_token(model: nn.Module, prompt: str, answer: str) -> int:
    """The one token that `answer` is after the prompt, with a space before it or as given."""
    ids = encode(model, prompt)
    pieces = [
        whole[len(ids) :]
        for form in (f" {answer.strip()}", answer)
        if (whole := encode(model, prompt + form))[: len(ids)] == ids
    ]
    one = [piece[0] for piece in pieces if len(piece) == 1]
    if not one:
        fail(
            f"--answer {answer!r} is several tokens here ({' + '.join(repr(token_text(model, i)) for i in pieces[0])}): the lens follows one, so give the first: --answer {token_text(model, pieces[0][0])!r}"
        )
    return one[0]
