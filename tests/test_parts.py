"""Someone's model taken apart: its tensors by the field's names, its prompt by the writes to the stream, in memory and from disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch as t
from architectures import make_architecture
from conftest import ROOT, one_line_error, relative_error, save_folder, tiny_hf
from safetensors.torch import load_file, save_file
from test_architectures import ROW

from logit_attribution import logit_parts, stream_parts
from hooks import run_with_cache
from llama_block import Llama, rope_frequencies
from moe import MoE
from parts import about_model, legend_table, parts_of_name, read_legend, rope_by_layers, rotary_dims, tell_prompt
from tiny_transformer import TinyTransformer
from utils import load_model
from weights import open_model, open_with_all_hooks, read_tensors

MIXTRAL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return save_folder(tiny_hf("Mixtral", **MIXTRAL), tmp_path_factory.mktemp("mixtral"))


def test_names_mean_what_they_mean_in_their_place():
    assert parts_of_name("h.11.attn.c_attn.weight") == ("W_Q", "W_K", "W_V")  # GPT-2's on the hub have no root
    assert parts_of_name("transformer.h.0.attn.c_proj.bias") == ("b_O",)
    assert parts_of_name("transformer.h.0.mlp.c_proj.weight") == ("W_out",)
    assert parts_of_name("model.layers.3.post_attention_layernorm.weight") == ("ln2",)
    assert parts_of_name("model.layers.3.post_attention_layernorm.weight", norms_after=True) == ("ln1_post",)
    assert parts_of_name("model.decoder.layers.0.final_layer_norm.weight") == ("ln2",)  # OPT has both
    assert parts_of_name("model.decoder.final_layer_norm.weight") == ("ln_final",)
    assert parts_of_name("model.layers.0.mlp.experts.17.up_proj.weight") == ("W_in",)
    assert parts_of_name("model.layers.0.mlp.strange.weight") == ()


def test_the_legend_is_our_own_class_s_weights(mixtral):
    """Names, shapes, how many and norms of every kind, against the model as our class holds it."""
    legend = read_legend(str(mixtral))
    model = load_model(str(mixtral), (MoE,), "cpu")
    rows = {row[0]: row for row in legend_table(legend)}
    assert sum(kind[5] for kind in rows.values()) == len(dict(read_tensors(mixtral)))
    for part in ("W_Q", "W_K", "W_V", "W_O"):
        weights = getattr(model, part)  # (layer, head, in, out)
        assert rows[part][3] == "x".join(map(str, weights.shape[1:]))
        t.testing.assert_close(t.tensor(list(legend.norms_by_head(part).values())), weights.norm(dim=(2, 3)).detach())
    assert rows["W_out, expert"][1:6] == [
        "model.layers.*.block_sparse_moe.experts.*.w2.weight",
        "32x48",
        "48x32",
        "float32",
        15,
    ]
    (of_outputs,) = [kind for kind in legend.kinds if (kind.part, kind.owner) == ("W_out", "expert")]
    ours = [expert.W_out.norm().item() for block in model.blocks for expert in block.mlp.experts]
    assert sorted(of_outputs.norms) == pytest.approx(sorted(ours), rel=1e-5)
    said = "\n".join(about_model(legend))
    assert "mixture of 5 experts in 3 of 3 layers: a token goes to the top 2" in said
    assert "heads 0 to 1 of queries read head 0 of keys" in said


def test_layers_stand_in_their_order(tmp_path):
    """A file names layer 10 before layer 2."""
    hf = tiny_hf("Llama", **MIXTRAL | {"num_hidden_layers": 11})
    legend = read_legend(str(save_folder(hf, tmp_path)))
    ours = Llama.from_hf(hf)
    t.testing.assert_close(t.tensor(list(legend.norms_by_head("W_K").values())), ours.W_K.norm(dim=(2, 3)).detach())
    first_of_layers = [row[0] for row in legend.tensors if row[0].endswith("input_layernorm.weight")]
    assert first_of_layers == [f"model.layers.{layer}.input_layernorm.weight" for layer in range(11)]


def test_an_unembedding_of_its_own_is_read_the_right_way_round(tmp_path):
    """GPT-2's blocks keep (in, out), its lm_head, where the file has one, (out, in)."""
    hf = tiny_hf("GPT2", n_embd=12, n_head=2, n_layer=1, n_positions=16, vocab_size=260, tie_word_embeddings=False)
    legend = read_legend(str(save_folder(hf, tmp_path)))
    here = {kind.part: (kind.in_file, kind.here) for kind in legend.kinds}
    assert here["W_U"] == ("260x12", "12x260")
    assert here["W_E"] == ("260x12", "260x12")
    assert here["W_in"] == ("12x48", "12x48")
    assert here["W_out"] == ("48x12", "48x12")


@pytest.mark.parametrize("rope", [{}, {"rope_type": "llama3", "factor": 8.0}])
def test_rope_in_words_is_the_rope_that_is_computed(rope, tmp_path):
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64} if rope else {}
    hf = tiny_hf(
        "Llama", **{**MIXTRAL, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"} | rope | more}
    )
    legend = read_legend(str(save_folder(hf, tmp_path)))
    ((where, found),) = rope_by_layers(legend.config).items()
    turning, d_head = rotary_dims(legend.config, found)
    assert (where, turning, d_head, found["rope_theta"]) == ("all layers", 8, 8, 5000.0)
    said = " ".join(about_model(legend))
    assert ("scaled as llama3: factor 8.0" in said) == bool(rope)
    slowest = 2 * t.pi / rope_frequencies(Llama.from_hf(hf).cfg)[-1]
    assert rope or f"a turn takes 6.3 to {slowest:,.0f} tokens" in said


@pytest.mark.parametrize(
    "own, name", [(MoE, "Mixtral"), (MoE, "Qwen2-MoE"), (Llama, "Qwen3"), (TinyTransformer, "GPT-2")]
)
@t.no_grad()
def test_from_disk_every_hook_holds_what_it_holds_in_memory(own, name, tmp_path):
    make_architecture(name, tmp_path)
    whole = open_with_all_hooks(str(tmp_path), own, "cpu")
    from_disk = open_with_all_hooks(str(tmp_path), own, "cpu", offload="on")
    assert type(from_disk) is own
    for _ in range(2):  # and leaves nothing after
        logits, cache = run_with_cache(whole, ROW)
        again, read = run_with_cache(from_disk, ROW)
        assert all(p.is_meta for p in from_disk.blocks.parameters())
    assert relative_error(again, logits) < 1e-5
    assert list(read) == list(cache)
    for hook in cache:
        t.testing.assert_close(read[hook], cache[hook], rtol=1e-4, atol=1e-4, msg=hook)


def test_from_disk_what_has_no_place_or_is_missing_is_refused(mixtral, tmp_path):
    for file in mixtral.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(mixtral / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    without = {key: x for key, x in tensors.items() if key != name}
    for wrong, words in ((without, "missing"), (tensors | {"model.layers.0.extra": t.zeros(2)}, "extra")):
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(SystemExit, match=words):
            open_with_all_hooks(str(tmp_path), MoE, "cpu", offload="on")


@t.no_grad()
def test_the_writes_and_their_effects_are_logit_parts(mixtral):
    """Against the attribution by heads, and the model's own logits."""
    model = load_model(str(mixtral), (MoE,), "cpu")
    found = stream_parts(model, ROW, token=7, position=4)
    by_head = logit_parts(model, ROW, 7, position=4, less_mean=True)
    effects = dict(zip(found.names, found.effects.tolist()))
    for layer in range(3):
        assert effects[f"L{layer} attn"] == pytest.approx(by_head["heads"][layer].sum().item(), abs=1e-4)
        assert effects[f"L{layer} mlp"] == pytest.approx(by_head["mlp"][layer].item(), abs=1e-4)
    logits = model(ROW)[0, 4]
    assert found.logit == pytest.approx((logits[7] - logits.mean()).item(), abs=1e-4)
    assert found.missed < 1e-6 and found.effects_missed < 1e-5
    assert found.shares.sum().item() == pytest.approx(1, abs=1e-5)
    whole = stream_parts(model, ROW, token=7, position=4, whole_layers=True)
    t.testing.assert_close(whole.writes[1], found.writes[1] + found.writes[2], rtol=1e-4, atol=1e-4)


def test_a_write_that_is_not_heard_is_missed(mixtral):
    """The gate can fail: the MLP's hook is made to say something else than what it writes."""
    model = load_model(str(mixtral), (MoE,), "cpu")
    model.blocks[1].register_forward_hook(lambda module, args, out: out + 1)
    assert stream_parts(model, ROW).missed > 1e-2


def test_a_foreign_model_that_is_streamed_is_seen_layer_by_layer(tmp_path, capsys):
    make_architecture("Gemma-2", tmp_path)
    story = tell_prompt(open_model(str(tmp_path), (), "cpu", offload="on"), "The capital of Japan is")
    assert story.parts.names == ["embed", "L0", "L1"]
    assert "as a whole" in capsys.readouterr().out
    inside = tell_prompt(open_model(str(tmp_path), (), "cpu"), "The capital of Japan is")
    assert inside.parts.names == ["embed", "L0 attn", "L0 mlp", "L1 attn", "L1 mlp"]
    assert inside.next_tokens[0][0] == story.next_tokens[0][0]
    of_layer = inside.parts.effects[1] + inside.parts.effects[2]
    assert of_layer.item() == pytest.approx(story.parts.effects[1].item(), abs=1e-3)


@pytest.mark.parametrize("script, name", [("llama_block", "GPT-2"), ("tiny_transformer", "Gemma-2"), ("moe", "Phi-3")])
def test_a_script_names_the_parts_of_a_model_that_is_not_its_kind(script, name, run, tmp_path):
    make_architecture(name, tmp_path / "model")
    done = run(f"{script}.py", "--model", "model", "--prompt", "The capital of Japan is", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "left out" in done.stdout and "W_Q" in done.stdout
    numbers = json.loads((tmp_path / f"results/{script}.json").read_text())
    assert len(numbers["head_norms"]["W_Q"]) == 2 and len(numbers["head_norms"]["W_Q"][0]) == 4
    assert len(numbers["write_norms"]) == len(numbers["writes"]) > 4
    figures = {page.stem for page in (tmp_path / f"figs/{script}").glob("*.html")}
    assert figures == {"weight_norms", "stream", "stream_effects", "stream_cosines", "index"}


def test_an_encoder_is_refused_in_one_line(run, tmp_path):
    make_architecture("BERT", tmp_path / "model")
    one_line_error(run("llama_block.py", "--model", "model", cwd=tmp_path), "BertForMaskedLM")


# With memory that is limited, after a small model has imported everything
LARGER_THAN_MEMORY = """
import json, resource, sys
import utils, psutil, torch as t
from moe import MoE, ROUTERS, route_prompt
from parts import read_legend, tell_prompt
from weights import open_with_all_hooks

def found(folder, offload):
    legend = read_legend(folder)
    model = open_with_all_hooks(folder, MoE, "cpu", offload=offload)
    story = tell_prompt(model, "a b c a b c", also=ROUTERS)
    routed = route_prompt(model, story.parts.cache)
    assert legend.tensors and len(story.next_tokens) == 8
    return {"logits": story.parts.logits, "router_logits": routed.router_logits, "probabilities": routed.probs,
            "chosen": routed.chosen, "load": t.from_numpy(routed.load), "writes": story.parts.writes}

small, large, allowed = sys.argv[1], sys.argv[2], int(sys.argv[3])
found(small, "on")  # everything is imported
vms = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (vms + allowed, resource.RLIM_INFINITY))
from_disk = found(large, "auto")
try:
    found(large, "off")
    print("it fits")
except (RuntimeError, MemoryError, SystemExit) as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
in_memory = found(large, "off")
print(json.dumps({name: [x.tolist(), in_memory[name].tolist()] for name, x in from_disk.items()}))
"""


def test_a_mixture_larger_than_the_memory_it_is_allowed_routes_as_in_memory(mixtral, tmp_path):
    """The address space is limited: whole it does not open, from disk its routers say what they say without a limit."""
    shape = MIXTRAL | {"hidden_size": 256, "intermediate_size": 1536, "num_hidden_layers": 4, "num_local_experts": 8}
    hf = tiny_hf("Mixtral", **shape)
    save_folder(hf, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    hf.save_pretrained(tmp_path, max_shard_size="8MB")  # a mapped file counts as memory too
    assert len(list(tmp_path.glob("*.safetensors"))) > 10
    allowed = sum(4 * p.numel() for p in hf.parameters()) // 2
    command = [sys.executable, "-c", LARGER_THAN_MEMORY, str(mixtral), str(tmp_path), str(allowed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert "0% of the blocks stay" in done.stdout
    assert "memory" in next(line for line in said if line.startswith("refused")).lower()
    for name, (from_disk, in_memory) in json.loads(said[-1]).items():
        assert relative_error(t.tensor(from_disk).float(), t.tensor(in_memory).float()) < 1e-5, name
