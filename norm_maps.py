"""Norm-based maps of who is in whose stream (Kobayashi et al. 2021, 2024), and the folding of norms into weights."""

import copy
from collections.abc import Callable

from utils import fail  # first: sets OpenMP's variables before torch is loaded
from hooks import act_name, run_with_cache
from logit_attribution import centres, per_head

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from torch import Tensor


def refuse_norms_after(model: nn.Module) -> None:
    if getattr(model.cfg, "norms", "before") != "before":
        fail("norms after attention and MLP (OLMo 2, Gemma 2) are neither folded nor followed here")


#%% Folding: norm weights go into the matrices that read, and what the norm removes is taken out of those that write
def fold_into_readers(norm: nn.Module, readers: list[nn.Linear], with_mean: bool) -> None:
    """
    The norm's weight (and bias) go into the linear maps that read it, in place.
    with_mean: the norm centres, so that the maps need no longer see the mean.
    """
    for linear in readers:
        if with_mean:
            linear.bias += linear.weight @ norm.bias
        linear.weight *= norm.weight
        if with_mean:
            linear.weight -= linear.weight.mean(1, keepdim=True)
    norm.weight.fill_(1)
    if with_mean:
        norm.bias.zero_()


def centre_writes(linear: nn.Linear) -> None:
    """What the linear map writes gets mean 0."""
    linear.weight -= linear.weight.mean(0, keepdim=True)
    if linear.bias is not None:
        linear.bias -= linear.bias.mean(0, keepdim=True)


@t.no_grad()
def fold_norm[Model: nn.Module](model: Model) -> Model:
    """
    A copy with the same log-probabilities, whose norms have weight 1 and bias 0.
    In float32, since bf16 would round the products.
    """
    refuse_norms_after(model)
    folded = copy.deepcopy(model).float()
    with_mean = centres(model)
    folded.unembed.weight = nn.Parameter(folded.unembed.weight.clone())  # unties
    if with_mean:
        folded.unembed.bias = nn.Parameter(t.zeros(folded.cfg.d_vocab, device=folded.W_U.device))

    for block in folded.blocks:
        linears = [(name, module) for name, module in block.mlp.named_modules() if isinstance(module, nn.Linear)]
        mlp_readers = [linear for name, linear in linears if not name.endswith("out")]
        mlp_writers = [linear for name, linear in linears if name.endswith("out")]
        fold_into_readers(block.ln1, [block.attn.q, block.attn.k, block.attn.v], with_mean)
        fold_into_readers(block.ln2, mlp_readers, with_mean)
        if with_mean:
            for linear in [block.attn.o, *mlp_writers]:
                centre_writes(linear)
    fold_into_readers(folded.ln_final, [folded.unembed], with_mean)

    centre_writes(folded.unembed)  # a constant added to every logit is not seen by softmax
    if with_mean:
        folded.embed.weight -= folded.embed.weight.mean(1, keepdim=True)
        if hasattr(folded, "W_pos"):
            folded.W_pos -= folded.W_pos.mean(1, keepdim=True)
    return folded


#%% Norm-based maps (Kobayashi et al. 2021, 2024): each source in a position's stream, through attention and the MLP
def mixing_ratio(by_source: Tensor) -> Tensor:
    """
    Share (query) of a stream that comes from other positions, of what each key brings to each query (query, key,
    d_model): ||sum of the others|| / (that + ||own||) (Kobayashi et al. 2021). The first query has no others: 0.
    """
    own = by_source.diagonal(dim1=0, dim2=1).T  # (query, d_model)
    others_norm = (by_source.sum(1) - own).norm(dim=-1)
    return others_norm / (others_norm + own.norm(dim=-1))


def mlp_readers(mlp: nn.Module) -> list[nn.Linear]:
    """The maps whose outputs the activation takes: one, or gate and input."""
    return [mlp.gate, mlp.inp] if hasattr(mlp, "gate") else [mlp.inp]


def neuron_activation(mlp: nn.Module, pre: list[Tensor]) -> Tensor:
    """Activations of the neurons from the outputs of mlp_readers."""
    if hasattr(mlp, "gate"):
        gate, linear = pre
        return F.silu(gate) * linear
    return mlp.act(pre[0])


def mean_slopes(activation: Callable, start: list[Tensor], change: list[Tensor], nodes: int) -> list[Tensor]:
    """
    Integrated gradients: of each input, the gradient of activation, averaged over the straight path from start to
    start + change (Gauss-Legendre with so many nodes).
    start, change: one tensor an input, as activation takes them.
    """
    slopes = [0.0] * len(start)
    places, weights = np.polynomial.legendre.leggauss(nodes)  # on -1 .. 1
    for place, weight in zip(places, weights):
        part = (place + 1) / 2  # of the way, on 0 .. 1
        along = [(at_start + part * step).requires_grad_() for at_start, step in zip(start, change)]
        gradients = t.autograd.grad(activation(along).sum(), along)
        slopes = [mean + weight / 2 * gradient for mean, gradient in zip(slopes, gradients)]
    return slopes


def ff_maps(model: nn.Module, tokens: Tensor, layer: int, nodes: int = 48) -> dict[str, Tensor]:
    """
    How much each key's residual stream brings to each query of tokens (1, pos), as norms (query, key):
    'attn': ||sum over heads of alpha f(x)||, f each head's value-output map, its value bias included;
    'attn_res': the same, + x where key = query;
    'attn_res_norm': attn_res after ln2, its scale frozen;
    'ff': what goes on through the MLP;
    'ff_res': attn_res + ff, added as vectors;
    'mixing_attn_res', 'mixing_ff_res' (query): the mixing_ratio of these;
    'weighted' (head, query, key): ||alpha f(x)||;
    'error' (): how far all sources + biases miss the model's own resid_post, relative to its largest entry.
    Through the activation, each source's share is its integrated gradient on the straight path from the biases alone to
    the real pre-activation (mean_slopes). GELU or SwiGLU, LayerNorm or RMSNorm.
    """
    refuse_norms_after(model)
    block = model.blocks[layer]
    norm = block.ln2
    mlp = block.mlp
    readers = mlp_readers(mlp)
    b_O = 0.0 if block.attn.o.bias is None else block.attn.o.bias
    scale_name = f"blocks.{layer}.ln2.hook_scale"

    def normalised(y: Tensor, scale: Tensor) -> Tensor:
        """ln2 with its scale frozen, without its bias."""
        if centres(model):
            y = y - y.mean(-1, keepdim=True)
        return y / scale * norm.weight

    # step 1: what each key's stream brings through attention, and through ln2 to the neurons; and what the biases bring
    # apart from all keys
    with t.no_grad():
        sites = [act_name(site, layer) for site in ("v", "pattern", "resid_pre", "resid_post")]
        _, cache = run_with_cache(model, tokens, [*sites, scale_name])
        x = cache["resid_pre", layer][0]
        scale = cache[scale_name][0]
        by_head = einsum(
            cache["pattern", layer][0],
            per_head(cache["v", layer], model.cfg.n_heads)[0],
            block.attn.W_O,
            "head query key, key head d_head, head d_head d_model -> head query key d_model",
        )
        attn = by_head.sum(0)
        own_stream = t.diag_embed(x.T).permute(1, 2, 0)  # query key d_model: x where key = query
        stream = attn + own_stream
        normed = normalised(stream, scale[:, None])
        normed_biases = normalised(b_O + 0 * x, scale)
        if centres(model):
            normed_biases = normed_biases + norm.bias
        pre = [normed @ linear.weight.T for linear in readers]  # query key neuron
        start = [F.linear(normed_biases, linear.weight, linear.bias) for linear in readers]  # query neuron

    # step 2: through the activation each key gets the mean slope times what it brings
    def activation(pre: list[Tensor]) -> Tensor:
        return neuron_activation(mlp, pre)

    slopes = mean_slopes(activation, start, [by_key.sum(1) for by_key in pre], nodes)

    # step 3: back to the stream; keys and biases together must be the model's own stream
    with t.no_grad():
        ff = sum(by_key * slope[:, None] for by_key, slope in zip(pre, slopes)) @ mlp.W_out
        whole = (stream + ff).sum(1) + b_O + mlp.out(activation(start))
        resid_post = cache["resid_post", layer]
        error = (whole - resid_post[0]).abs().max() / resid_post.abs().max()
        maps = {
            "attn": attn,
            "attn_res": stream,
            "attn_res_norm": normed,
            "ff": ff,
            "ff_res": stream + ff,
            "weighted": by_head,
        }
        norms = {name: vectors.norm(dim=-1) for name, vectors in maps.items()}
        norms["mixing_attn_res"] = mixing_ratio(maps["attn_res"])
        norms["mixing_ff_res"] = mixing_ratio(maps["ff_res"])
    return norms | {"error": error}
