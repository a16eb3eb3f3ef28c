"""Neurons: where they fire, which tokens they raise, and what has written what they read."""

from hooks import act_name, ask_norm, block_norms, hook_points, run_with_cache
from logit_attribution import folded_W_U, parts_along, write_sites

import torch as t
import torch.nn as nn
from torch import Tensor


#%% Neuron catalogue: where neurons fire, and which tokens they raise
@t.no_grad()
def neuron_catalogue(
    model: nn.Module, rows: Tensor, layer: int, n: int = 4, contexts: int = 5, also: list[int] = ()
) -> list[dict]:
    """
    The n neurons of a layer with the largest peak |activation| x ||W_out||, and those asked for, each as
    'neuron': its index;
    'peaks': [(activation, row, position)] in the `contexts` rows where it is strongest, largest first;
    'dips': the same where it is below zero by more than a tenth of its largest size (a gated neuron can be);
    'activation' (row, pos), 'largest' of it in size, 'density': the share of tokens with more than a tenth of that;
    'effect' (d_vocab): on the logits of an activation of 1, by the direct path (neuron_effect).
    """
    _, cache = run_with_cache(model, rows, act_name("post", layer), stop_at_layer=layer + 1)
    post = cache["post", layer].float()  # row pos neuron
    largest = post.abs().amax((0, 1))
    strength = largest * model.blocks[layer].mlp.W_out.float().norm(dim=-1)
    strongest = strength.topk(min(n, len(strength))).indices.tolist()
    unembedding = folded_W_U(model)
    found = []
    for neuron in dict.fromkeys([*also, *strongest]):
        activation = post[:, :, neuron]  # row pos
        threshold = largest[neuron] / 10
        dips = [(-x, row, pos) for x, row, pos in peaks_by_row(-activation, contexts) if x > threshold]
        found.append(
            {
                "neuron": neuron,
                "peaks": peaks_by_row(activation, contexts),
                "dips": dips,
                "activation": activation.cpu(),
                "largest": largest[neuron].item(),
                "density": (activation.abs() > threshold).float().mean().item(),
                "effect": neuron_effect(model, layer, neuron, unembedding).cpu(),
            }
        )
    return found


def peaks_by_row(activation: Tensor, n: int) -> list[tuple[float, int, int]]:
    """[(activation, row, position)] of activation (row, pos): the n rows with the largest, largest first."""
    peak, position = activation.max(1)
    rows = peak.topk(min(n, len(peak))).indices.tolist()
    return [(peak[row].item(), row, position[row].item()) for row in rows]


def write_weight(norm: nn.Module | None, like: Tensor) -> Tensor | float:
    """(d_model): the weight of a norm after attention or the MLP (Gemma 2), whose scale is left out; 1 without one."""
    if norm is None:
        return 1.0
    return ask_norm(norm, like.shape[-1], like).weight


def neuron_effect(model: nn.Module, layer: int, neuron: int, unembedding: Tensor) -> Tensor:
    """
    (d_vocab): what a neuron's W_out gives each logit, less the mean of all tokens, which softmax does not see.
    unembedding: folded_W_U(model); the scales of the norms are left out.
    """
    mlp = model.blocks[layer].mlp
    write = mlp.W_out[neuron].float() * write_weight(block_norms(model, layer).after_mlp, mlp.W_out)
    effect = write @ unembedding
    return effect - effect.mean()


def sharpness(effect: Tensor) -> Tensor:
    """(...): by how many standard deviations over tokens (..., d_vocab) the strongest, up or down, stands out."""
    centred = effect - effect.mean(-1, keepdim=True)
    return centred.abs().amax(-1) / centred.std(-1)


def sharpness_null(matrix: Tensor, n: int = 200, seed: int = 0) -> float:
    """95th percentile of the sharpness of n random directions through matrix (d_model, d_vocab): any has its top tokens."""
    generator = t.Generator().manual_seed(seed)
    directions = t.randn((n, len(matrix)), generator=generator).to(matrix.device)
    return sharpness(directions @ matrix).quantile(0.95).item()


#%% Neuron catalogue: what a neuron reads, by tokens and by what has written to the stream
def neuron_readers(model: nn.Module, layer: int) -> dict[str, tuple[nn.Module, Tensor, str]]:
    """
    {'in': ...} or, where the MLP is gated, {'gate': ..., 'in': ...}: the linear map that neurons read by, its weights
    (d_model, d_mlp), and the hook of what it gives. A gated neuron's activation is act(gate) x in.
    """
    mlp = model.blocks[layer].mlp
    into = getattr(mlp, "inp", None) or getattr(mlp, "in")
    if getattr(mlp, "W_gate", None) is None:
        return {"in": (into, mlp.W_in, act_name("pre", layer))}
    linear = f"blocks.{layer}.mlp.hook_pre_linear"
    return {"gate": (mlp.gate, mlp.W_gate, act_name("pre", layer)), "in": (into, mlp.W_in, linear)}


def embeddings_as_read(model: nn.Module, norm: nn.Module | None) -> Tensor:
    """(d_model, token) in float32: each token's embedding by itself, through a block's norm."""
    W_E = model.W_E
    normed = W_E if norm is None else norm(W_E[None])[0]
    return normed.float().T


def tokens_read(model: nn.Module, layer: int, neuron: int, as_read: Tensor) -> dict[str, Tensor]:
    """
    {reader: (d_vocab)}: each token's embedding against the neuron's W_in (and W_gate), less the mean of all tokens.
    as_read: embeddings_as_read of the norm before the layer's MLP.
    """
    found = {}
    for reader, (_, W, _) in neuron_readers(model, layer).items():
        read = W[:, neuron].float() @ as_read
        found[reader] = (read - read.mean()).cpu()
    return found


def read_direction(norm: nn.Module | None, column: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """
    (direction (d_model), constant ()): what a column (d_model) of weights reads of norm(x) is x . direction + constant,
    with the norm's scale frozen as it is at x (d_model).
    """
    column = column.float()
    if norm is None:
        return column, column.new_zeros(())
    shape = ask_norm(norm, len(x), x)
    direction = shape.weight * column
    centred = x.float()
    if shape.centres:
        centred = centred - centred.mean()
        direction = direction - direction.mean()
    normed = norm(x[None, None])[0, 0].float() - shape.bias
    scale = (shape.weight * centred).norm() / normed.norm()
    return direction / scale, shape.bias @ column


@t.no_grad()
def neuron_parts(
    model: nn.Module, tokens: Tensor, layer: int, neuron: int, position: int, reader: str = "in"
) -> dict[str, Tensor]:
    """
    What a neuron reads ('in' or, of a gated one, 'gate') at one position of tokens (1, pos), and the parts that sum to
    it: as logit_parts, of the layers that have written before, the scale of the norm before the MLP frozen;
    'constant': what the biases of that norm and of the map give;
    'pre' (): the model's own pre-activation.
    Ours or a TransformerBridge; attention and MLP one after the other or side by side.
    """
    linear, W, hook = neuron_readers(model, layer)[reader]
    serial = act_name("resid_mid", layer) in hook_points(model)
    n_attn = layer + 1 if serial else layer
    enters = act_name("resid_mid" if serial else "resid_pre", layer)
    names = dict.fromkeys([*write_sites(model, n_attn, layer), enters, hook])
    _, cache = run_with_cache(model, tokens, list(names), stop_at_layer=layer + 1)

    norm = block_norms(model, layer).before_mlp
    direction, constant = read_direction(norm, W[:, neuron], cache[enters][0, position])
    bias = getattr(linear, "bias", None)
    if bias is not None:
        constant = constant + bias[neuron].float()
    parts = parts_along(model, cache, position, direction, n_attn, layer)
    return parts | {"constant": constant, "pre": cache[hook][0, position, neuron].float()}


def without_sources(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    The parts of neuron_parts or logit_parts with each head's sources and all biases together: 'embed', 'pos_embed',
    'biases' and 'constant' (), 'heads' (layer, head), 'neurons' (layer, d_mlp) or, where there are none, 'mlp' (layer).
    """
    written = "neurons" if "neurons" in parts else "mlp"
    biases = parts["attn_bias"].sum()
    if "mlp_bias" in parts:
        biases = biases + parts["mlp_bias"].sum()
    return {
        "embed": parts["embed"],
        "pos_embed": parts["pos_embed"],
        "heads": parts["heads"].sum(-1),
        written: parts[written],
        "biases": biases,
        "constant": parts["constant"],
    }


def strongest_parts(parts: dict[str, Tensor], n: int) -> list[tuple[str, float]]:
    """[(name, what it gives)] of the n largest in size: 'embed', 'L0H1', 'L0N17', 'L0 MLP' ...; parts: without_sources."""
    letters = {"heads": "H", "neurons": "N"}
    found = []
    for kind, values in parts.items():
        flat = values.flatten()
        for i in flat.abs().topk(min(n, len(flat))).indices.tolist():
            name = kind
            if kind in letters:
                layer, number = divmod(i, values.shape[1])
                name = f"L{layer}{letters[kind]}{number}"
            if kind == "mlp":
                name = f"L{i} MLP"
            found.append((name, flat[i].item()))
    found.sort(key=lambda part: -abs(part[1]))
    return found[:n]
