"""Bad input to the training scripts: refused before training, in one clear line, with a non-zero exit and no traceback."""

import json

import pytest
from conftest import ROOT, one_line_error

SCRIPTS = ("zero_layer", "attn_only", "tiny_transformer", "llama_block", "moe")
DECODERS = SCRIPTS[1:]
EVERYWHERE = {  # flags: words of the line
    "--steps -1": "--steps is -1",
    "--tokens-per-step 0": "--tokens-per-step is 0",
    "--tokens-per-step -4": "--tokens-per-step is -4",
    "--accumulate 0": "--accumulate is 0",
    "--accumulate -2": "--accumulate is -2",
    "--lr -1": "--lr is -1",
    "--lr nan": "--lr is nan",
    "--lr inf": "--lr is inf",
    "--weight-decay -0.1": "--weight-decay",
    "--clip -1": "--clip is -1",
    "--warmup 2": "--warmup is 2",
    "--decay -0.5": "--decay is -0.5",
    "--save-every -1": "--save-every is -1",
    "--seed -1": "--seed is -1",
    "--vocab 0": "--vocab is 0",
    "--d-model 0": "--d-model is 0",
    "--d-model -8": "--d-model is -8",
    "--contexts": "--contexts is empty",
    "--device moon": "--device moon",
    "--data missing.txt": "--data missing.txt",
    "--data ./nowhere": "--data ./nowhere",
    "--data binary.txt": "is not UTF-8 text",
    "--data empty.txt": "holds no text",
    "--sweep seed=1,1": "gives 1 twice",
    "--sweep sed=1": "sed=1: write a setting",
}
OF_DECODERS = {
    "--n-layers 0": "--n-layers is 0",
    "--n-layers -1": "--n-layers is -1",
    "--n-heads 0": "--n-heads is 0",
    "--n-heads 256": "--n-heads 256 is more than --d-model",
    "--contexts 1": "--contexts 1 is too short",
    "--contexts -3": "--contexts is -3: it must be at least 1",
    "--contexts 16 32 64 --context-steps 0.5": "--context-steps",
    "--contexts 16 32 --context-steps": "--context-steps",
    "--contexts 16 32 64 --context-steps 0.6 0.3": "ascending",
    "--contexts 16 32 --context-steps 1.5": "--context-steps is 1.5: it must be at most 1",
    "--tokens-per-step 10": "has no whole row",
    "--accumulate 4096": "has no whole row",
    "--prompt=": "--prompt is empty",
    "--model ./nowhere": "nowhere",
    "--fsdp --data small.txt --prompt two+three": "--fsdp shares a model out",
    "--resume --data small.txt --steps 3 --prompt two+three": "is corrupt",
}
OF_ONE = [
    ("zero_layer", "--ranks 0", "--ranks is 0"),
    ("zero_layer", "--data small.txt --token qqqzzz", "no token reads"),
    ("zero_layer", "--data small.txt --tokenizer broken.json", "is no tokenizer"),
    ("attn_only", "--data small.txt --tokenizer broken.json", "is no tokenizer"),
    ("attn_only", "--n-layers 3", "--n-layers is 1 or 2"),
    ("attn_only", "--n-heads 3", "not a multiple"),
    ("attn_only", "--rotary-share 2", "--rotary-share is 2"),
    ("attn_only", "--repeats 1.5", "--repeats is 1.5"),
    ("attn_only", "--model halved", "no model.safetensors"),
    ("tiny_transformer", "--english -1", "--english is -1"),
    ("tiny_transformer", "--d-mlp 0", "--d-mlp is 0"),
    ("tiny_transformer", "--data small.txt --prompt two+three --n-heads 3", "does not divide"),
    ("llama_block", "--rope-base 0", "--rope-base is 0"),
    ("llama_block", "--n-kv-heads 3", "--n-heads 4 is not a multiple of --n-kv-heads 3"),
    ("moe", "--n-experts 0", "--n-experts is 0"),
    ("moe", "--top-k 9", "--top-k 9 is more than --n-experts"),
    ("moe", "--n-experts 1 --top-k 1", "--n-experts 1 leaves"),
    ("moe", "--rows 0", "--rows is 0"),
    ("moe", "--d-expert -1", "--d-expert is -1"),
]
CASES = [(script, flags, words) for flags, words in EVERYWHERE.items() for script in SCRIPTS]
CASES += [(script, flags, words) for flags, words in OF_DECODERS.items() for script in DECODERS]


@pytest.fixture(scope="module")
def place(workdir, tmp_path_factory):
    """A folder with files that cannot be read, and with a small text that can."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "empty.txt").write_text(" \n")
    (folder / "small.txt").write_text("one two three four five six seven eight\n\n" * 300)
    (folder / "broken.json").write_text('{"version": "1.0", "trunc')
    halved = folder / "halved"
    halved.mkdir()
    (halved / "config.json").write_text(json.dumps({"model_type": "x"}))
    checkpoints = folder / "checkpoints"
    (checkpoints / "attn_only").mkdir(parents=True)
    for name in ("attn_only/1_layers", "attn_only/2_layers", "tiny_transformer", "llama_block", "moe"):
        (checkpoints / f"{name}.pt").write_bytes(b"PK\x03\x04 half a checkpoint")
    return folder


@pytest.mark.parametrize("script, flags, words", CASES + OF_ONE)
def test_bad_input_gets_one_line(run, place, script, flags, words):
    one_line_error(run(f"{script}.py", *flags.split(" "), cwd=place), words)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "flags", ["--steps two", "--contexts a", "--no-such-flag", "--optimizer sgd", "--lr", "--compile 3"]
)
def test_a_flag_of_the_wrong_kind_is_named(run, place, script, flags):
    done = run(f"{script}.py", *flags.split(" "), cwd=place)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    wrong = "3" if flags == "--compile 3" else flags.split(" ")[0]
    assert wrong in done.stdout + done.stderr


def test_a_continuation_with_other_rows_is_refused(run, place):
    flags = "--data small.txt --vocab 280 --steps 2 --n-layers 1 --contexts 64 --tokens-per-step 256 --prompt two+three"
    flags = [word.replace("+", " ") for word in flags.split(" ")]
    (place / "checkpoints/tiny_transformer.pt").unlink()
    done = run("tiny_transformer.py", *flags, cwd=place)
    assert done.returncode == 0, done.stderr
    for change, words in ((("--repeats", "0"), "repeats was 0.45"), (("--english", "1"), "english was 0.3")):
        one_line_error(run("tiny_transformer.py", *flags, "--resume", *change, cwd=place), words)


@pytest.mark.parametrize("ranks", [(), ("9999", "4")])
def test_ranks_are_none_or_at_most_the_width(run, place, ranks):
    flags = "--data small.txt --vocab 280 --steps 2 --d-model 8 --ranks".split(" ")
    done = run("zero_layer.py", *flags, *ranks, cwd=place)
    assert done.returncode == 0, done.stderr
    kept = json.loads((place / "results/zero_layer.json").read_text())
    assert set(kept["kl_by_rank"]) == ({"4", str(kept["d_vocab"])} if ranks else set())


@pytest.mark.parametrize("script", ["patching", "logit_lens"])
def test_an_attention_only_model_is_named_as_one(run, place, script):
    done = run(f"{script}.py", "--model", str(ROOT / "models/attn_only_2l"), cwd=place)
    one_line_error(done, "attn_only.py --model opens it")
