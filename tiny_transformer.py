"""
The standard decoder, GPT-2's shape: trained live or opened from Hugging Face, each logit taken apart exactly, heads and
neurons catalogued.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

# The model, the first half of this file, uses utils, hooks, layers and weights alone; the experiment uses the rest.
from utils import (  # first: sets OpenMP's variables before torch is loaded
    Count,
    Natural,
    NotNegative,
    Share,
    cyan,
    endc,
    fail,
    gray,
    green,
    pick_device,
    purple,
    read_config,
    save_results,
    set_seed,
    with_defaults,
)
from hooks import HookPoint, listening_gap, run_with_cache
from hooked import Hooked
from layers import Attention
from weights import open_with_all_hooks, read_tensors, read_when_called, take_tensors

from logit_attribution import logit_parts, parts_error
from neurons import neuron_catalogue
from heads import attention_in, catalogue, random_repeats, which_bar
from norm_maps import ff_maps, fold_norm
from data import bos_id, find_tokens, load_corpus, load_tokenizer, refuse_empty, str_tokens, to_tokens, write_folder
from launch import flags
from parts import (
    conclude_prompt,
    is_whole,
    legend_numbers,
    print_legend,
    print_prompt,
    prompt_numbers,
    read_legend,
    show_head_norms,
    show_prompt,
    tell_prompt,
    why_not_whole,
)
from plots import (
    bar,
    catalogue_page,
    imshow,
    label_tokens,
    neuron_context,
    plain,
    show,
    show_attention,
    show_page,
    visible,
)
from train import TrainConfig, first_goes_on, language_loss, repeat_batches, train

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from tabulate import tabulate
from tokenizers import Tokenizer
from torch import Tensor

LARGEST_MAPS = 8e9  # bytes
ACTIVATIONS = ("gelu_new", "gelu")
POSITIONS = ("learned", "sinusoidal")


#%% The shape of a model
@dataclass
class TinyConfig:
    n_layers: int = 3
    n_heads: int = 4
    d_model: int = 128
    d_mlp: int = 512
    d_vocab: int = 1024
    n_ctx: int = 256
    positions: Literal["learned", "sinusoidal"] = "learned"
    tied: bool = True  # the unembedding is the embedding
    act: Literal["gelu_new", "gelu"] = "gelu_new"  # GPT-2's tanh approximation, or exact
    eps: float = 1e-5
    bias: str = "all"  # of attention's maps

    def __post_init__(self):
        if self.d_model % self.n_heads:
            fail(f"d_model {self.d_model} does not divide into {self.n_heads} heads")
        if self.act not in ACTIVATIONS or self.positions not in POSITIONS:
            fail(
                f"not built here: activation {self.act!r} with {self.positions!r} positions "
                f"(built: {', '.join(ACTIVATIONS)}; {', '.join(POSITIONS)})"
            )

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads


#%% LayerNorm: subtract the mean, divide by the standard deviation, then a weight and a bias
class LayerNorm(nn.Module):
    """hook_normalized is (x - mean) / scale, before weight and bias."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(t.ones(size))
        self.bias = nn.Parameter(t.zeros(size))
        self.eps = eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        nobody_listens = not self.hook_scale.fwd_hooks and not self.hook_normalized.fwd_hooks
        if nobody_listens:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)  # the same, faster
        centred = x.float() - x.float().mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        scale = self.hook_scale(scale)
        normalized = self.hook_normalized((centred / scale).to(x.dtype))
        return normalized * self.weight + self.bias


#%% MLP: each neuron reads one direction of the stream and writes another
class MLP(nn.Module):
    """W_in is (d_model, d_mlp), W_out is (d_mlp, d_model); a neuron is one of the d_mlp."""

    def __init__(self, cfg: TinyConfig):
        super().__init__()
        self.inp = nn.Linear(cfg.d_model, cfg.d_mlp)
        self.out = nn.Linear(cfg.d_mlp, cfg.d_model)
        self.act = gelu_new if cfg.act == "gelu_new" else F.gelu
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    @property
    def W_in(self) -> Tensor:
        return self.inp.weight.T

    @property
    def W_out(self) -> Tensor:
        return self.out.weight.T

    def forward(self, x: Tensor) -> Tensor:
        pre = self.hook_pre(self.inp(x))  # (batch, pos, d_mlp)
        neurons = self.hook_post(self.act(pre))
        return self.out(neurons)


def gelu_new(x: Tensor) -> Tensor:
    """GPT-2's GELU, by tanh."""
    return F.gelu(x, approximate="tanh")


#%% The block: attention and the MLP each read the normalised stream and add to it
class Block(nn.Module):
    def __init__(self, cfg: TinyConfig):
        super().__init__()
        self.ln1 = LayerNorm(cfg.d_model, cfg.eps)
        self.attn = Attention(cfg)
        self.ln2 = LayerNorm(cfg.d_model, cfg.eps)
        self.mlp = MLP(cfg)
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(x + self.hook_attn_out(self.attn(self.ln1(x))))
        return self.hook_resid_post(x + self.hook_mlp_out(self.mlp(self.ln2(x))))


#%% The model: embedding + positions, the blocks, a last norm, unembedding
def sinusoids(n_ctx: int, d_model: int) -> Tensor:
    """(pos, d_model): sin in even, cos in odd dimensions, wavelengths 2 pi to 10000 * 2 pi (Vaswani et al. 2017)."""
    angle = t.arange(n_ctx)[:, None] / 10000 ** (t.arange(0, d_model, 2) / d_model)  # (pos, d_model / 2)
    return t.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :d_model]


class TinyTransformer(nn.Module, Hooked):
    architectures = ("GPT2LMHeadModel",)

    def __init__(self, cfg: TinyConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        if cfg.positions == "learned":
            self.W_pos = nn.Parameter(0.02 * t.randn(cfg.n_ctx, cfg.d_model))
        else:
            self.register_buffer("W_pos", sinusoids(cfg.n_ctx, cfg.d_model), persistent=False)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = LayerNorm(cfg.d_model, cfg.eps)
        self.hook_embed = HookPoint()
        self.hook_pos_embed = HookPoint()
        self.init_weights()
        if cfg.tied:
            self.unembed.weight = self.embed.weight

    def init_weights(self, as_gpt2: bool = False) -> None:
        """
        Small query and key weights, as in attn_only: attention starts near uniform, and with Muon induction heads form
        soonest. as_gpt2: GPT-2's, which AdamW alone needs: small weights, and smaller ones where a block writes, so
        that the stream begins as the embedding and not as what untrained blocks add to it.
        """
        writes_std = 0.02 / math.sqrt(2 * self.cfg.n_layers)
        for name, linear in self.blocks.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            if as_gpt2:
                writes_into_the_stream = name.endswith((".o", ".out"))
                std = writes_std if writes_into_the_stream else 0.02
            else:
                gain = 0.3 if name.endswith((".q", ".k")) else 1.0
                std = gain / math.sqrt(linear.in_features)
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.unembed.weight, std=0.02)
        nn.init.normal_(self.embed.weight, std=0.02)

    @property
    def W_E(self) -> Tensor:
        return self.embed.weight

    @property
    def W_U(self) -> Tensor:
        return self.unembed.weight.T

    def forward(
        self,
        tokens: Tensor,
        start_at_layer: int = 0,
        resid: Tensor | None = None,
        stop_at_layer: int | None = None,
    ) -> Tensor:
        """
        Logits (batch, pos, d_vocab). Given resid (batch, pos, d_model), the residual stream enters at start_at_layer
        and the blocks below are skipped; with stop_at_layer the residual stream before that layer is returned.
        """
        n_pos = (tokens if resid is None else resid).shape[1]
        if n_pos > self.cfg.n_ctx:
            fail(f"{n_pos} tokens are too many: the model has positions for {self.cfg.n_ctx}")
        x = resid
        if x is None:
            x = self.hook_embed(self.embed(tokens)) + self.hook_pos_embed(self.W_pos[:n_pos][None])
        for block in self.blocks[start_at_layer:stop_at_layer]:
            x = block(x)
        if stop_at_layer is not None:
            return x
        return self.unembed(self.ln_final(x))

    @classmethod
    def from_hf(cls, hf_model: nn.Module, tokenizer: Tokenizer | None = None) -> "TinyTransformer":
        """The same model out of a transformers model in memory; every tensor must find its place."""
        model = cls(cls.read_config(hf_model.config.to_dict()), tokenizer)
        return take_tensors(model, ((name, x.clone()) for name, x in hf_model.state_dict().items())).eval()

    @classmethod
    def from_folder(
        cls, folder: str, device: str = "cpu", dtype: t.dtype = t.float32, resident: float = 1.0
    ) -> "TinyTransformer":
        """
        A Hugging Face folder: config.json, safetensors (sharded or not), tokenizer.json; with resident below 1, only
        this share of the blocks is read (read_when_called).
        """
        with t.device("meta"):
            model = cls(cls.read_config(read_config(folder)), load_tokenizer(folder))
        if resident < 1:
            return read_when_called(model, folder, device, dtype, resident).eval()
        return take_tensors(model, ((name, x.to(device, dtype)) for name, x in read_tensors(folder))).eval()

    def to_hf(self, folder: Path, dtype: t.dtype | None = None) -> None:
        """Write an ordinary Hugging Face folder; sinusoidal positions become a table there."""
        tensors = {name: x.to(dtype or x.dtype) for name, x in self.hf_tensors().items()}
        write_folder(folder, tensors, self.write_config(), self.tokenizer)

    # The same model as a file of GPT-2's: its configuration and its tensors, read and written (names: the next cell)
    @classmethod
    def read_config(cls, hf: dict) -> TinyConfig:
        """From a config.json; whatever is not built here ends the program rather than being left out."""
        unnamed = "GPT2LMHeadModel" if hf.get("model_type") == "gpt2" else "unknown"
        architecture = (hf.get("architectures") or [unnamed])[0]
        if architecture not in cls.architectures:
            fail(
                f"architecture {architecture} is not built here (built: {', '.join(cls.architectures)}); "
                "llama_block.py opens Llama's relatives, load_model anything"
            )
        for key, built in BUILT.items():
            if hf.get(key, built) != built:
                fail(f"{key}={hf[key]} is not built here")
        hf = with_defaults(hf, ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"))
        return TinyConfig(
            n_layers=hf["n_layer"],
            n_heads=hf["n_head"],
            d_model=hf["n_embd"],
            d_mlp=hf.get("n_inner") or 4 * hf["n_embd"],
            d_vocab=hf["vocab_size"],
            n_ctx=hf["n_positions"],
            tied=hf.get("tie_word_embeddings", True),
            act=hf.get("activation_function", "gelu_new"),
            eps=hf.get("layer_norm_epsilon", 1e-5),
        )

    def write_config(self) -> dict:
        """read_config's inverse: a config.json that transformers reads."""
        cfg = self.cfg
        bos = bos_id(self.tokenizer) if self.tokenizer else None
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": cfg.d_vocab,
            "n_positions": cfg.n_ctx,
            "n_embd": cfg.d_model,
            "n_layer": cfg.n_layers,
            "n_head": cfg.n_heads,
            "n_inner": cfg.d_mlp,
            "bos_token_id": bos,
            "eos_token_id": bos,
            "activation_function": cfg.act,
            "layer_norm_epsilon": cfg.eps,
            "tie_word_embeddings": cfg.tied,
        }

    def place(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """
        Where a tensor of Hugging Face's goes: {our name: our tensor}. GPT-2 stores weights (in, out), and q, k, v as
        one.
        """
        name = name.removeprefix(ROOT)
        if not name.startswith("h."):
            return {TOP_NAMES.get(name, name): x}
        _, layer, rest = name.split(".", 2)
        if rest in ("attn.bias", "attn.masked_bias"):
            return {}  # old files carry the causal mask
        ours = BLOCK_NAMES.get(rest, [rest])
        turned = x.mT if x.ndim == 2 else x
        parts = turned.chunk(len(ours))
        return {f"blocks.{layer}.{ours_name}": part.contiguous() for ours_name, part in zip(ours, parts)}

    def hf_tensors(self) -> dict[str, Tensor]:
        """place's inverse: {Hugging Face's name: tensor}."""
        state = self.state_dict() | {"W_pos": self.W_pos.data}
        hf = {}
        for theirs, ours in TOP_NAMES.items():
            if self.cfg.tied and ours == "unembed.weight":
                continue
            root = "" if ours == "unembed.weight" else ROOT
            hf[root + theirs] = state[ours]
        for layer in range(self.cfg.n_layers):
            for theirs, ours in BLOCK_NAMES.items():
                joined = t.cat([state[f"blocks.{layer}.{name}"] for name in ours])
                hf[f"{ROOT}h.{layer}.{theirs}"] = joined.mT if joined.ndim == 2 else joined
        return hf


#%% Names: where each tensor of GPT-2's files goes
ROOT = "transformer."
TOP_NAMES = {
    "wte.weight": "embed.weight",
    "wpe.weight": "W_pos",
    "ln_f.weight": "ln_final.weight",
    "ln_f.bias": "ln_final.bias",
    "lm_head.weight": "unembed.weight",
}
MODULES = {
    "ln_1": ["ln1"],
    "attn.c_attn": ["attn.q", "attn.k", "attn.v"],
    "attn.c_proj": ["attn.o"],
    "ln_2": ["ln2"],
    "mlp.c_fc": ["mlp.inp"],
    "mlp.c_proj": ["mlp.out"],
}
BLOCK_NAMES: dict[str, list[str]] = {}  # "attn.c_attn.bias": ["attn.q.bias", "attn.k.bias", "attn.v.bias"], ...
for module, our_modules in MODULES.items():
    for kind in ("weight", "bias"):
        BLOCK_NAMES[f"{module}.{kind}"] = [f"{name}.{kind}" for name in our_modules]

# settings of GPT-2's relatives, with the one value that is built here
BUILT = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config(TrainConfig):
    n_layers: Count = 2  # blocks
    n_heads: Count = 4  # attention heads of a block
    d_model: Count = 128  # width of the residual stream
    d_mlp: Count = 512  # neurons of an MLP
    positions: Literal["learned", "sinusoidal"] = "learned"  # how the model knows where a token stands
    tied: bool = True  # the unembedding is the embedding
    steps: Natural = 400
    # with learned positions short rows teach soonest: every position is trained at every step
    contexts: tuple[Count, ...] = (64,)
    context_steps: tuple[Share, ...] = ()
    lr: NotNegative = 1e-2
    # share of training rows that repeat a snippet of themselves: two thirds natural, one third in shuffled order
    repeats: Share = 0.45
    english: Share = 0.3  # share of rows from docstrings and help topics (stdlib text); the rest is code
    data: str = "stdlib"  # stdlib, a text file or folder, or a hub dataset
    vocab: Count = 512  # size of the byte-level BPE trained on the text
    tokenizer: str | None = None  # use this one instead: a folder, a tokenizer.json or a hub name
    # look into this model instead of training: a hub name or a folder; the whole story where it is a GPT-2
    model: str | None = None
    offload: Literal["auto", "on", "off"] = "auto"  # its weights come from disk: where they do not fit, always, never
    bos: bool | None = None  # put a beginning-of-text token first; default as that model's own tokenizer says
    prompt: str = "def __init__(self, name, value):\n        self.name = name\n        self."  # a text to look at
    answer: str | None = None  # token whose logit is taken apart; default the model's own prediction


# --hpc: an A100 with 40 GB
HPC = Config(
    n_layers=12,
    n_heads=12,
    d_model=768,
    d_mlp=3072,
    vocab=8192,
    contexts=(1024,),
    tokens_per_step=262144,
    accumulate=16,
    steps=10000,
    lr=3e-3,
    autocast="on",
    compile=True,
)

if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=HPC)
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    refuse_empty(cfg.prompt)
    numbers: dict = {}

#%% Someone's model, whatever its kind and size: which of its tensors is which part, then every one of them
if __name__ == "__main__" and cfg.model:
    legend = read_legend(cfg.model)
    print_legend(legend)
    show_head_norms(legend, "tiny_transformer")
    numbers |= legend_numbers(legend)
    save_results("tiny_transformer", cfg, **numbers)  # they stand, whether the model opens or not
    model = open_with_all_hooks(cfg.model, TinyTransformer, cfg.device, "float32", cfg.offload, cfg.bos)
    if is_whole(model, TinyTransformer):
        corpus = load_corpus(cfg.data, tokenizer=str(model.folder), bos=cfg.bos)

#%% Without --model, one is trained before your eyes and saved for transformers
if __name__ == "__main__" and not cfg.model:
    print(f"{purple}=== Training a {cfg.n_layers}-layer GPT-2 on {cfg.data}, seed {cfg.seed}, {device} ==={endc}")
    corpus = load_corpus(cfg.data, cfg.vocab, cfg.tokenizer)
    if cfg.answer:
        find_tokens(corpus.tokenizer, cfg.answer)  # a token that does not exist is said before training
    n_prompt = to_tokens(corpus.tokenizer, cfg.prompt).shape[1]
    if n_prompt < 3:
        fail("--prompt is too short: give a few words")
    if n_prompt > max(cfg.contexts):
        fail(
            f"--prompt has {n_prompt} tokens, the model sees --contexts {max(cfg.contexts)}: shorten one or raise the other"
        )
    shape = TinyConfig(
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        d_model=cfg.d_model,
        d_mlp=cfg.d_mlp,
        d_vocab=corpus.d_vocab,
        n_ctx=max(cfg.contexts),
        positions=cfg.positions,
        tied=cfg.tied,
    )
    model = TinyTransformer(shape, corpus.tokenizer)
    if cfg.optimizer == "adamw":
        model.init_weights(as_gpt2=True)
    history = train(
        model.to(device),
        repeat_batches(corpus, cfg),
        cfg,
        "tiny_transformer",
        shape=dataclasses.asdict(model.cfg),
        data=corpus.key,
        repeats=cfg.repeats,
        english=cfg.english,
    )
    folder = Path("checkpoints/tiny_transformer")
    model.to_hf(folder)
    first_goes_on()
    numbers |= {
        "train_seconds": history["seconds"],
        "tokens_per_second": history["tokens_per_second"],
        "loss": float(np.mean(history["loss"][-20:])),
    }
    print(
        f"{green}trained on {history['tokens'][-1] / 1e6:.2f}M tokens in {history['seconds']:.1f} s "
        f"({cyan}{history['tokens_per_second']:,.0f} tokens/s{green}) to {cyan}{numbers['loss']:.2f}{green} nats, "
        f"saved to {folder} as a Hugging Face folder{endc}"
    )

#%% The prompt: its tokens, what comes next, and where the output of each part lies in the stream
if __name__ == "__main__":
    story = tell_prompt(model, cfg.prompt)
    print_prompt(story, model)
    numbers |= prompt_numbers(story)

#%% ... as bars, and as a map of every two parts
if __name__ == "__main__":
    show_prompt(story, "the model trained here" if not cfg.model else Path(cfg.model).name, "tiny_transformer")

#%% Of a model that is not built here, or whose weights do not fit into memory, that is all
if __name__ == "__main__" and not is_whole(model, TinyTransformer):
    save_results("tiny_transformer", cfg, **numbers)
    print(f"{gray}{why_not_whole(model, TinyTransformer)}: the cells below, on a GPT-2 in memory, are left out{endc}")
    print(f"{green}{conclude_prompt(story)}{endc}")
    raise SystemExit

#%% What flows through: shapes forward, gradient norms backward
if __name__ == "__main__":
    n_layers = model.cfg.n_layers
    n_heads = model.cfg.n_heads
    n_params = sum(p.numel() for p in model.parameters())
    layer_names = [f"L{layer}" for layer in range(n_layers)]
    head_names = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
    about = f"{n_layers}-layer GPT-2 shape, {n_params / 1e6:.1f}M parameters"

    prompt = to_tokens(model.tokenizer, cfg.prompt).to(device)
    if prompt.shape[1] < 3:
        fail("--prompt is too short: give a few words")
    prompt_tokens = str_tokens(model.tokenizer, prompt[0])
    labels = label_tokens(prompt_tokens)
    with t.no_grad():
        logits, cache = run_with_cache(model, prompt)
    shapes = []
    for name, x in cache.items():
        if "blocks" not in name or "blocks.0." in name:
            shapes.append([name, tuple(x.shape)])
    shapes.append(["logits", tuple(logits.shape)])
    print(f"{purple}=== Forward: {prompt.shape[1]} tokens of {cfg.prompt!r} ==={endc}")
    print(tabulate(shapes, headers=["hook (blocks after the first alike)", "shape"]))

    ctx = min(256, model.cfg.n_ctx)
    natural = t.from_numpy(corpus.rows(np.random.default_rng(cfg.seed), 64, ctx, "heldout")).to(device)
    loss = language_loss(model, natural[:16])
    loss.backward()
    grads = {name: p.grad.norm().item() for name, p in model.named_parameters() if name.endswith(("weight", "W_pos"))}
    model.zero_grad()
    kinds = list(dict.fromkeys(name.split(".", 2)[2].removesuffix(".weight") for name in grads if "blocks" in name))
    by_layer = [[f"L{i}", *(grads[f"blocks.{i}.{kind}.weight"] for kind in kinds)] for i in range(n_layers)]
    outside = [f"{name} {norm:.3f}" for name, norm in grads.items() if "blocks" not in name]
    print(
        f"{purple}=== Backward: gradient norms of the loss on 16 x {ctx} held-out tokens, "
        f"{cyan}{loss:.3f} nats{purple} ==={endc}"
    )
    print(tabulate(by_layer, headers=["layer", *kinds], floatfmt=".3f"))
    print(f"{gray}{', '.join(outside)}{' (tied: W_U too)' * model.cfg.tied}{endc}")
    numbers |= {"n_params": n_params, "heldout_loss": loss.item(), "gradient_norms": grads}

#%% Gates: hooks change nothing; attention, the parts of a logit and integrated gradients are complete; folding is exact
if __name__ == "__main__":
    print(f"{purple}=== Gates ==={endc}")
    folded = fold_norm(model)
    floats = prompt.shape[1] ** 2 * (n_heads * model.cfg.d_model + 3 * model.cfg.d_mlp)  # of ff_maps
    if 4 * floats > LARGEST_MAPS:
        save_results("tiny_transformer", cfg, **numbers)
        fail(f"--prompt of {prompt.shape[1]} tokens is too long for maps of who is in whose stream: shorten it")
    maps = [ff_maps(model, prompt, layer) for layer in range(n_layers)]
    with t.no_grad():
        folding_gap = (folded(prompt).log_softmax(-1) - logits.log_softmax(-1)).abs().max()
    row_gaps = [(cache["pattern", layer].sum(-1) - 1).abs().max().item() for layer in range(n_layers)]
    sum_gaps = []
    for i in range(8):
        for position in (-1, ctx // 2, 1):
            parts = logit_parts(model, natural[[i]], int(natural[i, -1]), position)
            sum_gaps.append(parts_error(parts))
    errors = {
        "hooks": listening_gap(model, prompt),
        "fold_norm": folding_gap.item(),
        "rows": max(row_gaps),
        "attribution": max(sum_gaps),
        "integrated_gradients": max(x["error"].item() for x in maps),
    }
    numbers |= {f"{name}_max_error": error for name, error in errors.items()}
    assert max(errors.values()) < 1e-4, errors
    said_errors = [f"{name.replace('_', ' ')} {error:.0e}" for name, error in errors.items()]
    print(f"{cyan}{', '.join(said_errors)}{gray}: all within 1e-4{endc}")

#%% What comes next, and where every head looks
if __name__ == "__main__":
    probs = logits[0, -1].float().softmax(-1)
    top = probs.topk(20)
    top_names = [visible(token) for token in str_tokens(model.tokenizer, top.indices)]
    answer = find_tokens(model.tokenizer, cfg.answer)[0] if cfg.answer else int(top.indices[0])
    said = visible(str_tokens(model.tokenizer, [answer])[0])
    patterns = t.cat([cache["pattern", layer][0] for layer in range(n_layers)])  # (head of any layer, query, key)
    likeliest = [f"{name} {cyan}{p:.3f}{endc}" for name, p in zip(top_names[:8], top.values.tolist())]
    print(f"{purple}=== After {cfg.prompt!r} ==={endc}")
    print(", ".join(likeliest))

#%% ... as bars of the next token, and as maps of every head's attention
if __name__ == "__main__":
    fig = bar(
        {"probability": top.values},
        f"Next token after {plain(repr(cfg.prompt[-60:]))} ({about})",
        xlabel="token (id)",
        ylabel="probability",
        x=[f"{name} ({i})" for name, i in zip(top_names, top.indices.tolist())],
        hover="%{x}<br>probability %{y:.4f}<extra></extra>",
    )
    show(
        fig,
        "tiny_transformer/next_token",
        "What the model says after the prompt.",
    )
    show_attention(
        patterns,
        prompt_tokens,
        head_names,
        f"a {about}",
        "tiny_transformer/attention",
        ask=partial(attention_in, model, model.tokenizer),
    )

#%% Which parts made that logit? Embedding, positions, every head x source token, every neuron, every bias
if __name__ == "__main__":
    parts = logit_parts(model, prompt, answer)
    assert parts_error(parts) < 1e-4
    ranked = [
        ["embed", labels[-1], parts["embed"].item()],
        ["positions", "", parts["pos_embed"].item()],
        ["attention biases", "", parts["attn_bias"].sum().item()],
        ["MLP biases", "", parts["mlp_bias"].sum().item()],
        ["final norm's bias", "", parts["constant"].item()],
    ]
    for name, row in zip(head_names, parts["heads"].flatten(0, 1)):
        ranked += [[name, labels[source], x.item()] for source, x in enumerate(row)]
    for layer, row in enumerate(parts["neurons"].tolist()):
        ranked += [[f"L{layer}N{neuron}", "", x] for neuron, x in enumerate(row)]
    ranked.sort(key=lambda part: -abs(part[2]))
    others = [f"the other {len(ranked) - 12}", "", sum(part[2] for part in ranked[12:])]
    table = [*ranked[:12], others, ["sum = logit", "", parts["logit"].item()]]
    print(
        f"{purple}=== Logit of '{said}' (probability {probs[answer]:.2f}), final norm's scale frozen; "
        f"weights as trained, the final norm's folded into W_U ==={endc}"
    )
    print(tabulate(table, headers=["part", "source", "logit"], floatfmt=".3f"))
    numbers |= {
        "answer": said,
        "answer_logit": parts["logit"],
        "mlp_logit": parts["mlp"].sum(),
        "heads_logit": parts["heads"].sum(),
    }

#%% ... as a map of layers and parts
if __name__ == "__main__":
    by_layer = t.cat([parts["heads"].sum(-1), parts["attn_bias"][:, None], parts["mlp"][:, None]], 1)  # (layer, part)
    rest = sum(parts[name].item() for name in ("embed", "pos_embed", "constant"))
    fig = imshow(
        by_layer,
        f"Logit of '{said}' = {parts['logit']:.2f} = {rest:.2f} (embedding, positions, final bias) + these, "
        f"final norm's scale frozen ({about})",
        "part",
        "layer",
        [*(f"H{head}" for head in range(n_heads)), "attn bias", "MLP"],
        layer_names,
        value="logit",
    )
    show(
        fig,
        "tiny_transformer/attribution",
        "A row for each layer, a column for each of its parts; with the embedding and the biases they sum to the "
        "logit. Blue raises it.",
    )

#%% Head catalogue on random tokens said twice: who does what, above what shuffling gives
if __name__ == "__main__":
    half = min(50, (model.cfg.n_ctx - 1) // 2)
    rows = random_repeats(corpus, 24, half, cfg.seed).to(device)
    scores, bars, roles = catalogue(model, rows)
    table = []
    for i, name in enumerate(head_names):
        table.append([name, *(f"{x.flatten()[i]:.2f}" for x in scores.values()), ", ".join(roles[name])])
    table.append(["bar", *(f"{bar:.2f} ({which_bar(role, bar)})" for role, bar in bars.items()), ""])
    print(
        f"{purple}=== Heads on {len(rows)} rows of random tokens said twice, each row at its own distance; a role is "
        f"named above its bar (floor, or null: 99th percentile of the best head under shuffling) ==={endc}"
    )
    print(tabulate(table, headers=["head", *scores, "named"]))
    numbers |= {
        "roles": {name: x for name, x in roles.items() if x},
        "bars": bars,
        "best_scores": {role: x.max() for role, x in scores.items()},
    }

#%% ... as one map for each role
if __name__ == "__main__":
    fig = imshow(
        t.stack(list(scores.values())),
        f"Head scores on {len(rows)} rows of random tokens said twice, each at its own distance ({about})",
        "head",
        "layer",
        [f"H{head}" for head in range(n_heads)],
        layer_names,
        [f"{role} (bar {bars[role]:.2f})" for role in scores],
        columns=3,
        diverging=False,
        value="score",
    )
    show(
        fig,
        "tiny_transformer/heads",
        "1 is a perfect head of the kind; what lies under the bar of a panel is what chance gives.",
    )


#%% Neuron catalogue: the contexts that fire the strongest neurons, and the tokens these raise and lower
def token_list(model: TinyTransformer, tokens: Tensor) -> str:
    return " ".join(visible(token) for token in str_tokens(model.tokenizer, tokens))


if __name__ == "__main__":
    words = [[visible(token) for token in str_tokens(model.tokenizer, row)] for row in natural]
    neurons = [(layer, neuron) for layer in range(n_layers) for neuron in neuron_catalogue(model, natural, layer)]
    table = []
    for layer, neuron in neurons:
        fires_at = []
        for _, row, position in neuron["peaks"][:3]:
            before = "".join(words[row][max(0, position - 3) : position])
            fires_at.append(f"{before}[{words[row][position]}]")
        peak = f"{neuron['peaks'][0][0]:.1f}"
        raises = token_list(model, neuron["effect"].topk(6).indices)
        lowers = token_list(model, (-neuron["effect"]).topk(6).indices)
        table.append([f"L{layer}N{neuron['neuron']}", peak, " | ".join(fires_at), raises, lowers])
    print(
        f"{purple}=== Neurons: top contexts in {len(natural)} x {ctx} held-out tokens; logit effect by the direct "
        f"path, weights with the final norm folded ==={endc}"
    )
    print(tabulate(table, headers=["neuron", "peak", "fires at [token]", "raises", "lowers"]))


#%% ... as a page to read and search
if __name__ == "__main__":
    entries = []
    for (layer, neuron), (name, _, _, raises, lowers) in zip(neurons, table):
        places = [*neuron["peaks"], *neuron["dips"]]
        entries.append(
            {
                "id": name,
                "kind": "neuron",
                "layer": layer,
                "number": neuron["neuron"],
                "named": "",
                "size": neuron["largest"],
                "lines": [["raises", raises], ["lowers", lowers]],
                "contexts": [neuron_context(neuron, words[row], row, position) for _, row, position in places],
                "links": [],
            }
        )
    title = f"Neurons with the largest peak x output norm ({about}, {len(natural)} x {ctx} held-out tokens)"
    show_page(
        catalogue_page(entries, title),
        "tiny_transformer/neurons",
        "The texts that fire a neuron most, and the tokens that it raises and lowers when it does.",
    )

#%% The feed-forward block through attention maps: how much of a stream comes from other positions, before it and after
if __name__ == "__main__":
    before_ff = [x["mixing_attn_res"][1:].mean().item() for x in maps]  # the first position has no others
    after_ff = [x["mixing_ff_res"][1:].mean().item() for x in maps]
    numbers |= {"mixing_before_ff": before_ff, "mixing_after_ff": after_ff}
    print(f"{purple}=== Share of the stream that comes from other positions ==={endc}")
    for layer in range(n_layers):
        print(
            f"layer {layer}: {cyan}{before_ff[layer]:.3f}{endc} after attention, "
            f"{cyan}{after_ff[layer]:.3f}{endc} after the feed-forward block"
        )

#%% ... as maps of who is in whose stream
if __name__ == "__main__":
    panels = {}
    for layer in range(n_layers):
        panels[f"L{layer} attention + stream"] = maps[layer]["attn_res"]
        panels[f"L{layer} MLP (IG)"] = maps[layer]["ff"]
        panels[f"L{layer} MLP + stream"] = maps[layer]["ff_res"]
    fig = imshow(
        t.stack(list(panels.values())),
        "||what the key's stream brings to the query||, through attention and then the feed-forward block, each panel on "
        f"its own scale ({about})",
        "key",
        "query",
        labels,
        labels,
        list(panels),
        columns=3,
        diverging=False,
        value="norm",
        one_scale=False,
    )
    show(
        fig,
        "tiny_transformer/feed_forward_maps",
        "How far each key moves the query's stream, before and after the MLP: off the diagonal is what came from "
        "other tokens.",
    )
    fig = imshow(
        t.cat([x["weighted"] for x in maps]),
        f"Norm-based attention of every head: ||alpha f(x)||, layer norm and values included ({about})",
        "key",
        "query",
        labels,
        labels,
        head_names,
        diverging=False,
        value="norm",
    )
    show(
        fig,
        "tiny_transformer/norm_based",
        "A map for each head: how far each key moves the query's stream, which attention alone does not say.",
    )

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    save_results("tiny_transformer", cfg, **numbers)
    named = []
    for role in scores:
        heads = [name for name, has in roles.items() if role in has]
        if heads:
            named.append(f"{role}: {', '.join(heads)}")
    rest = parts["logit"] - parts["heads"].sum() - parts["mlp"].sum()
    print(
        f"{green}'{said}' gets its logit of {parts['logit']:.2f} from heads {parts['heads'].sum():+.2f}, MLPs "
        f"{parts['mlp'].sum():+.2f}, the rest {rest:+.2f}. {'; '.join(named) or 'no head has a role'}. "
        f"Gate: attribution exact to {errors['attribution']:.0e}.{endc}"
    )
