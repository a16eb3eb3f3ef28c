"""
Weights and tokens of any model: safetensors tensor by tensor, models larger than memory, beginning-of-text exactly once.
"""

import hashlib
import json
import math
import resource
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

from utils import (  # first: sets OpenMP's variables before torch is loaded
    HARMLESS,
    builds,
    context_length,
    endc,
    fail,
    find_model,
    load_model,
    model_folder,
    pick_device,
    pick_dtype,
    read_config,
    refuse_foreign,
    refuse_incomplete,
    refuse_unreadable,
    secret,
    yellow,
)
import data
from hooks import HookPoint, device_of, run_with_hooks

import psutil
import torch as t
import torch.nn as nn
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor


#%% Hugging Face files: tensor by tensor, every one in its place
def take_tensors[Model: nn.Module](model: Model, tensors: Iterable[tuple[str, Tensor]]) -> Model:
    """
    Put (Hugging Face name, tensor) pairs where model.place says. A tensor without a place, of the wrong shape or
    missing ends the program.
    """
    wanted = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, x in tensors:
        if HARMLESS.search(name):
            continue
        for ours, part in model.place(name, x).items():
            if ours not in wanted:
                fail(f"tensor {name} has no place in {type(model).__name__} (it would be {ours})")
            given, expected = tuple(part.shape), tuple(wanted[ours].shape)
            if given != expected:
                fail(f"tensor {name} gives {ours} the shape {given}, the config says {expected}")
            state[ours] = part
    if model.cfg.tied and "embed.weight" in state:
        state.setdefault("unembed.weight", state["embed.weight"])
        if not t.equal(state["unembed.weight"], state["embed.weight"]):
            fail("the config ties embedding and unembedding, the file holds two different ones")
    missing = [name for name in wanted if name not in state]
    if missing:
        fail(f"{len(missing)} tensors are missing from the file, first {missing[0]}")
    model.load_state_dict(state, assign=True)
    if model.cfg.tied:
        model.unembed.weight = model.embed.weight
    return model.requires_grad_(True)


def weight_files(folder: Path) -> list[str]:
    """The names of a folder's safetensors files: model.safetensors, or else the shards of its index."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except Exception as error:
        if "allocate memory" in str(error):
            fail(
                f"{path} does not fit into the memory that is allowed: save the model in smaller files (max_shard_size)"
            )
        fail(f"{path} is corrupt: {error}")


def read_tensors(name: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one by one, from the safetensors files of a folder or hub model."""
    folder = model_folder(str(name))
    for file in weight_files(folder):
        if not (folder / file).is_file():
            fail(f"no {file} in {name}: only safetensors are read")
        with open_safetensors(folder / file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is no dict
                yield key, tensors.get_tensor(key)


def norm_of(x: Tensor) -> float:
    """Frobenius, in double precision, a piece at a time."""
    return math.sqrt(sum(part.double().pow(2).sum().item() for part in x.flatten().split(2**24)))


def tensor_table(name: str) -> Iterator[tuple[str, tuple[int, ...], str, float]]:
    """(tensor name, shape, dtype, Frobenius norm), one tensor in memory at a time."""
    for key, x in read_tensors(name):
        yield key, tuple(x.shape), str(x.dtype).removeprefix("torch."), norm_of(x)


#%% Models larger than memory: in memory where they fit, else their blocks come from the file when they are called
class Entered(Exception):
    """Carries what enters the first block."""


class Streamed(nn.Module):
    """
    A plain transformers model under accelerate's offload: a share `resident` of the blocks stays on the device, the
    others come from the checkpoint (memory-mapped) when they are called, and leave again.
    Hooks: blocks.L.hook_resid_pre and hook_resid_post.
    """

    streamed = True

    def __init__(self, name: str, device: str, dtype: t.dtype, resident: float = 0.0):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        token = secret("HF_TOKEN")
        config = AutoConfig.from_pretrained(name, token=token)
        with t.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        shape = config.get_text_config()
        stack = path_of_blocks(empty, shape.num_hidden_layers)
        places = offload_places(empty, stack, shape.num_hidden_layers, device, resident)
        self.converted = tempfile.TemporaryDirectory()  # for tensors that are not kept as the file has them (experts)
        try:
            hf, info = AutoModelForCausalLM.from_pretrained(
                name,
                device_map=places,
                offload_folder=self.converted.name,
                dtype=dtype,
                token=token,
                output_loading_info=True,
            )
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            fail(f"a {type(empty).__name__} cannot be read block by block ({reason}): it opens whole, by --offload off")
        refuse_incomplete(name, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        self.hf = hf.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(name, token=token)
        self.cfg = SimpleNamespace(
            n_layers=shape.num_hidden_layers,
            n_heads=getattr(shape, "num_attention_heads", 0),  # Mamba has none
            d_model=shape.hidden_size,
            d_mlp=getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size,
            d_vocab=shape.vocab_size,
            n_ctx=context_length(config),
            output_logits_soft_cap=getattr(shape, "final_logit_softcapping", None),
        )
        outside = [module for path, module in self.hf.named_modules() if not path.startswith(f"{stack}.")]
        norms = [module for module in outside if "norm" in type(module).__name__.lower()]
        self.ln_final = norms[-1] if norms else nn.Identity()  # OPT-350m has none
        self.unembed = self.hf.get_output_embeddings()
        self.layers = list(self.hf.get_submodule(stack))
        self.blocks = nn.ModuleList(nn.Module() for _ in self.layers)  # they hold the hook points
        for ours, theirs in zip(self.blocks, self.layers):
            listen_to_stream(ours, theirs)

    @property
    def W_U(self) -> Tensor:
        return self.unembed.weight.T

    def forward(self, tokens: Tensor, stop_at_layer: int | None = None, **kwargs) -> Tensor:
        """Logits; with stop_at_layer the stream that enters this block, before it is read."""
        if stop_at_layer is None or stop_at_layer == len(self.layers):
            return self.hf(tokens, **{"use_cache": False} | kwargs).logits

        def leave(module: nn.Module, args: tuple) -> None:
            raise Entered(args[0])

        handle = self.layers[stop_at_layer].register_forward_pre_hook(leave, prepend=True)
        try:
            self.hf(tokens, use_cache=False)
        except Entered as found:
            return found.args[0]
        finally:
            handle.remove()


def path_of_blocks(empty: nn.Module, n_layers: int) -> str:
    """Where the blocks stand in a transformers model: model.layers, transformer.h ..."""
    for path, module in empty.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return path
    fail(f"{type(empty).__name__} has no list of {n_layers} blocks, so it cannot be read block by block")


def offload_places(empty: nn.Module, stack: str, n_layers: int, device: str, resident: float) -> dict[str, str]:
    """accelerate's device_map: all but the blocks on the device, of these the first `resident` share, the rest on disk."""
    tensors = [*empty.named_parameters(remove_duplicate=False), *empty.named_buffers()]
    owners = {path.rpartition(".")[0] for path, _ in tensors}
    places = {path: device for path in owners if not path.startswith(f"{stack}.")}
    n_resident = int(resident * n_layers)
    for i in range(n_layers):
        places[f"{stack}.{i}"] = device if i < n_resident else "disk"
    return places


def listen_to_stream(ours: nn.Module, theirs: nn.Module) -> None:
    """Give `ours` the hook points resid_pre and resid_post of their block."""
    ours.hook_resid_pre = HookPoint()
    ours.hook_resid_post = HookPoint()

    def before(_: nn.Module, args: tuple) -> tuple:
        return (ours.hook_resid_pre(args[0]), *args[1:])

    def after(_: nn.Module, args: tuple, out: Tensor | tuple) -> Tensor | tuple:
        if isinstance(out, tuple):
            return (ours.hook_resid_post(out[0]), *out[1:])
        return ours.hook_resid_post(out)

    theirs.register_forward_pre_hook(before)
    theirs.register_forward_hook(after)


#%% Our own models larger than memory: a part of a block reads its weights when it is called; every hook stays
def where_tensors_lie(model: nn.Module, folder: Path) -> dict[str, tuple[Path, str]]:
    """
    {our name: (file, Hugging Face's name)} of every tensor of a model of ours, by the files' headers; nothing is read.
    A tensor without a place, of the wrong shape or missing ends the program.
    """
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found: dict[str, tuple[Path, str]] = {}
    for file in weight_files(folder):
        with open_safetensors(folder / file) as tensors:
            for theirs in tensors.keys():  # noqa: SIM118  it is no dict
                if HARMLESS.search(theirs):
                    continue
                empty = t.empty(tensors.get_slice(theirs).get_shape(), device="meta")
                for ours, part in model.place(theirs, empty).items():
                    if wanted.get(ours) != tuple(part.shape):
                        fail(f"tensor {theirs} gives {ours} the shape {tuple(part.shape)}, not {wanted.get(ours)}")
                    found[ours] = (folder / file, theirs)
    optional = {"unembed.weight"} if model.cfg.tied else set()
    missing = [name for name in wanted if name not in found and name not in optional]
    if missing:
        fail(f"{len(missing)} tensors are missing from the file, first {missing[0]}")
    return found


def parts_of_block(block: nn.Module) -> Iterator[nn.Module]:
    """What of a block is in memory together: a norm, attention, an MLP; of a mixture of experts the router, an expert."""
    for child in block.children():
        if not hasattr(child, "experts"):
            yield child
            continue
        yield from child.experts
        for part in child.children():
            if part is not child.experts:
                yield part


class WhenCalled:
    """
    Forward hooks of a part of a block: its weights come from the files when it is called, and leave again. What is
    called on no rows at all, as an expert is that no token chose, gets zeros that take no memory.
    """

    def __init__(self, read: Callable[[str], nn.Parameter], names: dict[nn.Module, dict[str, str]]):
        self.read = read
        self.names = names  # {module: {"weight": its name in the whole model}}
        self.empty = {module: dict(module.named_parameters(recurse=False)) for module in names}

    def enter(self, _: nn.Module, args: tuple) -> None:
        nothing_enters = bool(args) and args[0].numel() == 0
        for module, by_attribute in self.names.items():
            for attribute, name in by_attribute.items():
                if nothing_enters:
                    zero = args[0].new_zeros(())
                    weight = nn.Parameter(zero.expand(self.empty[module][attribute].shape), requires_grad=False)
                else:
                    weight = self.read(name)
                module._parameters[attribute] = weight

    def leave(self, _: nn.Module, args: tuple, out: Tensor) -> None:
        for module, empty in self.empty.items():
            module._parameters.update(empty)


@t.no_grad()
def read_when_called[Model: nn.Module](
    model: Model, folder: str | Path, device: str, dtype: t.dtype, resident: float = 0.0
) -> Model:
    """
    A model of ours without weights (on meta) that runs from its files, with every hook that it has in memory: all but
    the blocks and the first `resident` share of these are read now, a part of the others (parts_of_block) when it is
    called, so that an expert that no token chose is not read at all. Each file is open only while it is read.
    """
    lies = where_tensors_lie(model, Path(folder))

    def read(name: str) -> nn.Parameter:
        file, theirs = lies[name]
        with open_safetensors(file) as tensors:
            part = model.place(theirs, tensors.get_tensor(theirs))[name]
            return nn.Parameter(part.to(device, dtype, copy=True), requires_grad=False)

    names: dict[nn.Module, dict[str, str]] = {}
    for path, module in model.named_modules():
        by_attribute = {}
        for attribute, _ in module.named_parameters(recurse=False):
            by_attribute[attribute] = f"{path}.{attribute}".lstrip(".")
        if by_attribute:
            names[module] = by_attribute

    for block in model.blocks[int(resident * len(model.blocks)) :]:
        for part in parts_of_block(block):
            within = {module: names.pop(module) for module in part.modules() if module in names}
            when_called = WhenCalled(read, within)
            part.register_forward_pre_hook(when_called.enter)
            part.register_forward_hook(when_called.leave)
    if model.cfg.tied:
        del names[model.unembed]
    WhenCalled(read, names).enter(model, ())
    if model.cfg.tied:
        if "unembed.weight" in lies and not t.equal(read("unembed.weight"), model.embed.weight):
            fail("the config ties embedding and unembedding, the file holds two different ones")
        model.unembed.weight = model.embed.weight
    model.reads_when_called = True
    return model


#%% What names a result: everything that its numbers come from
CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def hash_of_file(path: Path) -> str:
    """Of the whole file; the hub's cache names a large file by it already, and leaves a link."""
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == 64:
        return blob
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_model(folder: Path) -> str:
    """12 digits, of the config, the tokenizer and every weight of a model."""
    digest = hashlib.sha256()
    for name in [*CONFIG_FILES, *weight_files(folder)]:
        if (folder / name).is_file():
            digest.update(f"{name} {hash_of_file(folder / name)}\n".encode())
    return digest.hexdigest()[:12]


def model_key(name: str, settings: list) -> str:
    """Names what was computed from a model: by its files and the settings that change numbers."""
    digest = hashlib.sha256(json.dumps([settings, hash_of_model(model_folder(name))]).encode())
    return digest.hexdigest()[:12]


#%% Does it fit?
def count_parameters(name: str) -> int:
    """From the headers of a folder's or hub model's files."""
    count = 0
    for path in model_folder(name).glob("model*.safetensors"):
        with open_safetensors(path) as file:
            count += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return count


def free_bytes(device: str) -> int:
    """Of a card, or of this machine's memory, within what `ulimit -v` allows this process."""
    if device.startswith("cuda"):
        return t.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY:
        free = min(free, max(0, allowed - psutil.Process().memory_info().vms))
    return free


def share_in_memory(name: str, device: str, dtype: t.dtype, offload: str, keeps: str) -> float:
    """
    The share of a model's blocks that memory holds: 1 where all weights fit (offload auto) or must (off), 0 with on.
    Less than 1 is said, with what hooks it keeps.
    """
    need = count_parameters(name) * dtype.itemsize
    free = free_bytes(device)
    if offload == "off" or (offload == "auto" and need < 0.85 * free):
        return 1.0
    resident = 0.0
    if offload == "auto":  # embeddings stay too; the margin is for activations
        resident = min(1.0, max(0.0, 0.8 * free / need - 0.15))
    print(
        f"{yellow}{name}: {need / 1e9:.2f} GB of weights, {free / 1e9:.1f} GB free on {device}: {resident:.0%} of the "
        f"blocks stay, the others come from disk at every pass; {keeps}{endc}"
    )
    return resident


def open_model(
    name: str,
    ours: tuple[type, ...] = (),
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "auto",
    bos: bool | None = None,
) -> nn.Module:
    """
    load_model, or Streamed where the weights do not fit (offload auto) or always (on). bos (--bos, --no-bos): whether
    a beginning-of-text token stands before every text; None: as the model's own files say.
    """
    model = open_in_memory_or_streamed(name, ours, device, dtype, offload)
    choose_bos(model, bos)
    return model


def open_in_memory_or_streamed(
    name: str,
    ours: tuple[type, ...],
    device: str,
    dtype: str,
    offload: str,
) -> nn.Module:
    name = find_model(name)
    device = pick_device(device)
    torch_dtype = pick_dtype(device, dtype)
    refuse_foreign(model_folder(name), read_config(name))
    resident = share_in_memory(name, device, torch_dtype, offload, "hooks on the residual stream only")
    if resident == 1:
        return load_model(name, ours, device, dtype)
    model = Streamed(name, device, torch_dtype, resident)
    model.register_forward_pre_hook(refuse_unreadable)
    model.folder = model_folder(name)
    return model


def open_with_all_hooks(
    name: str,
    own: type,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "auto",
    bos: bool | None = None,
) -> nn.Module:
    """
    open_model for a class of ours, which keeps all its hooks where the weights do not fit (read_when_called): for runs,
    not for what reads or changes weights. What the class does not take is opened as open_model opens it.
    """
    name = find_model(name)
    config = read_config(name)
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in own.architectures or not builds(own, config):
        return open_model(name, (), device, dtype, offload, bos)
    folder = model_folder(name)
    refuse_foreign(folder, config)
    device = pick_device(device)
    torch_dtype = pick_dtype(device, dtype)
    resident = share_in_memory(name, device, torch_dtype, offload, "all hooks stay")
    if resident == 1:
        model = load_model(name, (own,), device, dtype)
    else:
        model = own.from_folder(str(folder), device=device, dtype=torch_dtype, resident=resident)
        model.register_forward_pre_hook(refuse_unreadable)
        model.folder = folder
    choose_bos(model, bos)
    return model


#%% Tokens of any model: its own tokenizer, beginning-of-text exactly once
def text_tokenizer(model: nn.Module) -> Tokenizer:
    """
    As the model's folder has it, whichever door the model came by: TransformerBridge's own copy was made to put a
    beginning-of-text token before every text.
    """
    if isinstance(model.tokenizer, Tokenizer):
        return model.tokenizer
    if not hasattr(model, "text_tokenizer"):
        folder = getattr(model, "folder", None)
        model.text_tokenizer = data.load_tokenizer(folder) if folder else data.unpadded(model.tokenizer)
    return model.text_tokenizer


def choose_bos(model: nn.Module, asked: bool | None) -> None:
    """--bos, --no-bos: whether a beginning-of-text token stands before every text; None: as the model's files say."""
    if asked is None:
        return
    tokenizer = data.load_tokenizer(model.folder, asked)
    if isinstance(model.tokenizer, Tokenizer):
        model.tokenizer = tokenizer
    else:
        model.text_tokenizer = tokenizer


def bos_id(model: nn.Module) -> int | None:
    """The beginning-of-text token that stands before every text, or None."""
    return data.bos_id(text_tokenizer(model))


def encode(model: nn.Module, text: str) -> list[int]:
    """Token ids, beginning-of-text first and once where the model reads one."""
    tokenizer = text_tokenizer(model)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    bos = data.bos_id(tokenizer)
    if bos is None or ids[:1] == [bos]:
        return ids
    return [bos, *ids]


def token_text(model: nn.Module, token: int) -> str:
    return data.token_text(text_tokenizer(model), token)


def about_bos(model: nn.Module) -> str:
    bos = bos_id(model)
    if bos is not None:
        return f"beginning-of-text token {token_text(model, bos)!r} ({bos}) put first, once"
    tokenizer = text_tokenizer(model)
    folder = getattr(model, "folder", None)
    known = data.declared_token(tokenizer, folder, "bos_token") if folder else None
    if known is None:
        return "no beginning-of-text token: the model has none"
    return f"no beginning-of-text token: the tokenizer puts none first (--bos puts {token_text(model, known)!r})"


def answer_token(model: nn.Module, prompt: str, answer: str) -> int:
    """The one token that `answer` is after the prompt, with a space before it or as given."""
    ids = encode(model, prompt)
    pieces = []
    for form in (f" {answer.strip()}", answer):
        whole = encode(model, prompt + form)
        if whole[: len(ids)] == ids:
            pieces.append(whole[len(ids) :])
    for piece in pieces:
        if len(piece) == 1:
            return piece[0]
    if not any(pieces):
        fail(f"--answer {answer!r} merges with the end of the prompt: end the prompt before its last space")
    texts = [token_text(model, i) for i in pieces[0]]
    fail(
        f"--answer {answer!r} is several tokens here ({' + '.join(map(repr, texts))}): the lens follows one, "
        f"so give the first: --answer {texts[0]!r}"
    )


#%% What a model goes on to say, token by token
@t.no_grad()
def generate(
    model: nn.Module,
    ids: list[int],
    n: int,
    hooks_from: Callable[[int], list[tuple]] | None = None,
    temperature: float = 0.0,
    generator: t.Generator | None = None,
) -> Iterator[int]:
    """
    Up to n tokens, greedy, or drawn by a generator at a temperature, until the model ends its text or its context is
    full; transformers models keep their keys and values, ours read all again. hooks_from(position) gives the hooks of a
    pass whose first token stands at that position.
    """
    room = model.cfg.n_ctx - len(ids)
    keeps: dict = {}
    if not isinstance(model.tokenizer, Tokenizer):
        from transformers import DynamicCache

        keeps = {"past_key_values": DynamicCache(), "use_cache": True}
    ends = data.end_ids(text_tokenizer(model), model.folder)
    unread = list(ids)
    position = 0  # of the first unread token
    for _ in range(min(n, room)):
        tokens = t.tensor([unread], device=device_of(model))
        logits = run_with_hooks(model, tokens, hooks_from(position) if hooks_from else [], **keeps)[0, -1].float()
        token = drawn_token(logits, temperature, generator)
        if token in ends:
            return
        yield token
        if keeps:
            position += len(unread)
            unread = [token]
        else:
            unread.append(token)


def drawn_token(logits: Tensor, temperature: float, generator: t.Generator | None) -> int:
    """Of logits (d_vocab): the likeliest at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    p = (logits.cpu() / temperature).softmax(-1)
    return int(t.multinomial(p, 1, generator=generator))
