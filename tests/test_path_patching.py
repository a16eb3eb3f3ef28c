"""
Path patching against a second one, written with transformer_lens alone as ARENA's course does, against its plain form,
and against edge patching where the MLPs are frozen.
"""

import pytest
import torch as t
import torch.nn as nn
from models_for_tests import H, L, three_pairs, tiny_models

from interventions import Pairs, activation_patch, baselines
from graph import Graph, path_losses, path_patch, path_patch_all, plain_edge_patch


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return three_pairs()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return tiny_models()


@pytest.fixture(scope="module")
def sixteen() -> Pairs:
    rng = t.Generator().manual_seed(1)
    clean = t.randint(1, 250, (16, 9), generator=rng)
    corrupt = clean.clone()
    corrupt[:, 3:5] = t.randint(1, 250, (16, 2), generator=rng)
    answer, wrong = t.randint(1, 250, (2, 16), generator=rng)
    return Pairs(clean=clean, corrupt=corrupt, answer=answer, wrong=wrong, answer_pos=t.full((16,), 8))


# %% A second implementation, by transformer_lens alone
class ArenaPathPatching:
    """
    Path patching of a head's z, by the course's steps: every z frozen to the original run but for the sender's, which
    comes from the new one; a receiver's q, k, v or the final stream recorded in that run; patched in in another.
    """

    def __init__(self, bridge: nn.Module, pairs: Pairs, frozen_mlps: bool):
        self.bridge = bridge
        self.pairs = pairs
        self.frozen_mlps = frozen_mlps
        _, self.orig_cache = bridge.run_with_cache(pairs.clean)
        _, self.new_cache = bridge.run_with_cache(pairs.corrupt)

    def difference(self, logits: t.Tensor) -> t.Tensor:
        rows = range(len(logits))
        return logits[rows, -1, self.pairs.answer] - logits[rows, -1, self.pairs.wrong]

    def patch_or_freeze(self, layer: int, head: int, z: t.Tensor, hook) -> t.Tensor:
        name = f"blocks.{hook_layer(hook)}.attn.hook_z"
        new = self.orig_cache[name].clone()
        if hook_layer(hook) == layer:
            new[:, :, head] = self.new_cache[name][:, :, head]
        return new

    def record(self, layer: int, head: int, wanted: list[str]) -> dict[str, t.Tensor]:
        recorded = {}

        def freeze_mlp(x, hook):
            return self.orig_cache[f"blocks.{hook_layer(hook)}.hook_mlp_out"]

        fwd_hooks = []
        for name in wanted:
            fwd_hooks.append((name, lambda x, hook, name=name: recorded.update({name: x.clone()})))
        for l in range(L):
            fwd_hooks.append((f"blocks.{l}.attn.hook_z", lambda x, hook: self.patch_or_freeze(layer, head, x, hook)))
            if self.frozen_mlps:
                fwd_hooks.append((f"blocks.{l}.hook_mlp_out", freeze_mlp))
        self.bridge.run_with_hooks(self.pairs.clean, fwd_hooks=fwd_hooks)
        return recorded

    def to_logits(self, layer: int, head: int) -> t.Tensor:
        last = f"blocks.{L - 1}.hook_resid_post"
        final = self.record(layer, head, [last])[last]
        return self.difference(self.bridge.unembed(self.bridge.ln_final(final)))

    def to_heads(self, layer: int, head: int, input: str, receivers: list[tuple[int, int]]) -> t.Tensor:
        names = [f"blocks.{l}.attn.hook_{input}" for l in sorted({l for l, _ in receivers})]
        recorded = self.record(layer, head, names)

        def patch_head_input(x, hook):
            heads = [h for l, h in receivers if l == hook_layer(hook)]
            x = x.clone()
            x[:, :, heads] = recorded[f"blocks.{hook_layer(hook)}.attn.hook_{input}"][:, :, heads]
            return x

        logits = self.bridge.run_with_hooks(self.pairs.clean, fwd_hooks=[(name, patch_head_input) for name in names])
        return self.difference(logits)


def hook_layer(hook) -> int:
    return int(hook.name.split("blocks.")[1].split(".")[0])


@t.no_grad()
@pytest.mark.parametrize("mlps", ["free", "frozen"])
def test_path_patching_is_arenas_on_sixteen_pairs(models, sixteen, mlps):
    model = models["gpt2"]
    graph = Graph(model)
    arena = ArenaPathPatching(model, sixteen, mlps == "frozen")
    clean, _ = baselines(model, sixteen, "logit_diff")
    moved = []
    for layer, head in ((0, 1), (0, 3), (1, 2), (2, 0)):
        found = path_patch(model, graph, sixteen, f"L{layer}H{head}", ["logits"], mlps=mlps)
        t.testing.assert_close(found, arena.to_logits(layer, head), atol=1e-4, rtol=1e-4)
        moved.append((found - clean).abs().max().item())
    receivers = [(1, 0), (1, 3), (2, 1)]
    for input in ("q", "k", "v"):
        for layer, head in ((0, 0), (0, 2), (1, 1)):
            names = [f"L{l}H{h}.{input}" for l, h in receivers]
            found = path_patch(model, graph, sixteen, f"L{layer}H{head}", names, mlps=mlps)
            t.testing.assert_close(found, arena.to_heads(layer, head, input, receivers), atol=1e-4, rtol=1e-4)
            moved.append((found - clean).abs().max().item())
    assert min(moved) > 1e-3


# %% The engine, and what the two settings share
def receivers_to_try(graph: Graph) -> list[list[str]]:
    """The logits, one input, and several of one kind, in one layer and in two."""
    return [
        ["logits"],
        graph.receivers_of(["L1H0", "L2H3"], "k"),
        graph.receivers_of(["L2H1", "L2H2"], "v"),
        ["L0 MLP", "L1 MLP"],
    ]


@t.no_grad()
@pytest.mark.parametrize("name", ["ours", "gpt2", "gpt_neox", "gemma2"])
def test_all_senders_at_once_equal_the_plain_form(models, pairs, name):
    model = models[name]
    graph = Graph(model)
    clean, _ = baselines(model, pairs, "logit_diff")
    for receivers in receivers_to_try(graph):
        values = path_patch_all(model, graph, pairs, receivers, memory_gb=1e-2)
        assert (values - clean).abs().max() > 1e-3, receivers
        for writer in ("embed", "L0H1", "L0 MLP", "L1H2"):
            expected = path_patch(model, graph, pairs, writer, receivers)
            found = values[graph.writers.index(writer)]
            t.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=f"{writer} to {receivers}")


@t.no_grad()
@pytest.mark.parametrize("name", ["ours", "gpt2", "gpt_neox", "gptj", "gemma2", "olmo2"])
def test_with_frozen_mlps_one_receiver_reads_one_edge_and_with_free_ones_more(models, pairs, name):
    model = models[name]
    graph = Graph(model)
    clean, _ = baselines(model, pairs, "logit_diff")
    for writer, receiver in (
        ("L0H1", "logits"),
        ("L0H1", "L2 MLP"),
        ("embed", graph.receivers_of(["L2H2"], "v")[0]),
    ):
        edge = plain_edge_patch(model, graph, pairs, writer, receiver)
        frozen = path_patch(model, graph, pairs, writer, [receiver], mlps="frozen")
        t.testing.assert_close(frozen, edge, atol=1e-4, rtol=1e-4, msg=f"{writer} to {receiver}")
        free = path_patch(model, graph, pairs, writer, [receiver])
        assert (edge - clean).abs().max() > 1e-4
        assert (free - edge).abs().max() > 1e-4, f"{writer} to {receiver}: no path runs through an MLP"


@t.no_grad()
def test_from_the_last_layer_both_are_one_edge_and_losses_follow_the_choice(models, pairs):
    model = models["ours"]
    graph = Graph(model)
    heads = [graph.writers.index(f"L{L - 1} MLP")]
    by_path = path_losses(model, graph, pairs, ["logits"], "logit_diff")
    by_edge = path_losses(model, graph, pairs, ["logits"], "logit_diff", by="edge_patch")
    t.testing.assert_close(by_path[heads], by_edge[heads], atol=1e-4, rtol=0)
    before = [graph.writers.index(f"L0H{head}") for head in range(H)]
    assert (by_path[before] - by_edge[before]).abs().max() > 1e-2
    clean, _ = baselines(model, pairs, "logit_diff")
    edge = plain_edge_patch(model, graph, pairs, "L0H2", "logits")
    t.testing.assert_close(by_edge[graph.writers.index("L0H2")], clean - edge, atol=1e-4, rtol=0)


@t.no_grad()
def test_without_heads_between_free_paths_are_all_paths(models, pairs):
    """From the last layer's heads every path to the logits is direct: path patching is activation patching of z."""
    for name in ("ours", "gpt2", "gpt_neox"):
        model = models[name]
        clean, _ = baselines(model, pairs, "logit_diff")
        found = path_patch(model, Graph(model), pairs, f"L{L - 1}H1", ["logits"])
        expected = activation_patch(model, pairs, "z", L - 1, head=1, direction="noise")
        t.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert (found - clean).abs().max() > 1e-3
