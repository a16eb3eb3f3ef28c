"""
The README's tables and pictures from what was measured. Run the scripts, then
    python docs/make.py collect     # results/*.json -> docs/results (the numbers that the table names)
    python docs/make.py pictures    # figs/*.html -> docs/*.png, by Chromium
    python docs/make.py table       # docs/results -> README.md
"""
import json
import re
import shutil
import string
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

# what, this repository's number, what the papers or libraries have, the command. Numbers stand as {file[key]:format}.
ROWS = [
    ("bigrams: KL of W_E W_U (d_model 128) to the counts of 1024 tokens", "{zero_layer[kl_to_bigram]:.4f} bits; training loss {zero_layer[train_loss]:.3f} nats", "the floor, from the counts: 0 bits, {zero_layer[bigram_floor]:.3f} nats", "uv run zero_layer.py"),
    ("induction: prefix matching of the best head, 2 layers, random tokens", "{attn_only[best_prefix_matching]:.2f}; 1 layer {attn_only[best_prefix_matching_1_layer]:.2f}; without the previous-token head {attn_only[prefix_matching_without_previous_token_head]:.2f}", "Olsson et al. 2022: with 2 layers, never with 1", "uv run attn_only.py"),
    ("in-context learning score, nats", "{attn_only[icl_score]:.2f} +- {attn_only[icl_score_95]:.2f} (256 tokens); 1 layer {attn_only[icl_score_1_layer]:+.2f} +- {attn_only[icl_score_1_layer_95]:.2f}", "Olsson et al. 2022: about -0.4 (512 tokens)", "uv run attn_only.py"),
    ("a logit's parts against the logit, largest error", "{attn_only[attribution_max_error]:.0e}", "0", "uv run attn_only.py"),
    ("logits against Hugging Face, max error / max logit: GPT-2", "{parity[GPT2LMHeadModel][max_relative_logit_error]:.0e}", "0 (transformers)", "uv run pytest"),
    ("... Llama, Llama 3.1", "{parity[LlamaForCausalLM][max_relative_logit_error]:.0e}, {parity[Llama 3.1][max_relative_logit_error]:.0e}", "0", "uv run pytest"),
    ("... Mistral, Qwen2, Qwen3", "{parity[MistralForCausalLM][max_relative_logit_error]:.0e}, {parity[Qwen2ForCausalLM][max_relative_logit_error]:.0e}, {parity[Qwen3ForCausalLM][max_relative_logit_error]:.0e}", "0", "uv run pytest"),
    ("... Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE", "{parity[MixtralForCausalLM][max_relative_logit_error]:.0e}, {parity[Qwen2MoeForCausalLM][max_relative_logit_error]:.0e}, {parity[Qwen3MoeForCausalLM][max_relative_logit_error]:.0e}, {parity[OlmoeForCausalLM][max_relative_logit_error]:.0e}", "0", "uv run pytest"),
]
PICTURES = {"zero_layer": "zero_layer/loss", "attn_only": "attn_only/phase_change", "tiny_transformer": "tiny_transformer/heads", "llama_block": "llama_block/phases", "moe": "moe/specialisation"}
START, END = "<!-- measured -->\n", "<!-- measured ends -->\n"


def named() -> dict[str, set[str]]:
    """{results file: its top-level keys that the table names}"""
    found: dict[str, set[str]] = {}
    for row in ROWS:
        for _, field, _, _ in string.Formatter().parse(" ".join(row[1:3])):
            if field: found.setdefault(field.split("[")[0], set()).add(re.search(r"\[(.*?)\]", field)[1])
    return found


def collect() -> None:
    """Keep what the table names, where a run has made it anew."""
    for name, keys in named().items():
        if not (path := ROOT / f"results/{name}.json").exists(): continue
        numbers = json.loads(path.read_text())
        kept = {key: numbers[key] for key in sorted(keys)} | {key: numbers[key] for key in ("versions",) if key in numbers}
        (ROOT / f"docs/results/{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def table() -> str:
    numbers = {name: json.loads((ROOT / f"docs/results/{name}.json").read_text()) for name in named()}
    rows = [f"| {what} | {measured.format_map(numbers)} | {theirs.format_map(numbers)} | `{command}` |" for what, measured, theirs, command in ROWS]
    return "\n".join(["| what | measured here | theirs, or what it should be | command |", "|---|---|---|---|", *rows]) + "\n"


def readme() -> str:
    """README.md with its table made anew."""
    before, rest = (ROOT / "README.md").read_text().split(START)
    return before + START + table() + END + rest.split(END)[1]


def pictures() -> None:
    """A small PNG of one figure per script; what has not been drawn is left as it is."""
    for name, figure in PICTURES.items():
        if not (page := ROOT / f"figs/{figure}.html").exists(): continue
        with tempfile.TemporaryDirectory() as profile:
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}", "--window-size=1100,620", "--virtual-time-budget=8000"]
            subprocess.run([shutil.which("chromium"), *flags, f"--screenshot={ROOT / f'docs/{name}.png'}", f"file://{page}"], check=True, capture_output=True)


if __name__ == "__main__":
    for step in sys.argv[1:] or sys.exit(__doc__):
        if step == "table": (ROOT / "README.md").write_text(readme())
        else: {"collect": collect, "pictures": pictures}[step]()
