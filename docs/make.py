"""
The README's tables and pictures from what was measured. Run the scripts, then
    python docs/make.py collect     # results/*.json -> docs/results (the numbers that the table names)
    python docs/make.py pictures    # figs/*.html -> docs/*.png, by Chromium
    python docs/make.py table       # docs/results -> README.md
"""

import itertools
import json
import re
import shutil
import string
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

BY_SEED = "; ".join(
    ", ".join(f"{{world[over_seeds][ioi_circuit_{what}][{i}]}}" for i in range(3))
    for what in ("edges", "faithfulness", "shared")
)

# what, this repository's number, what the papers or libraries have, the command. Numbers stand as {file[key]:format}.
ROWS = [
    (
        "bigrams: KL of W_E W_U (d_model 128) to the counts of 1024 tokens",
        "{zero_layer[kl_to_bigram]:.4f} bits; training loss {zero_layer[train_loss]:.3f} nats",
        "the floor, from the counts: 0 bits, {zero_layer[bigram_floor]:.3f} nats",
        "uv run zero_layer.py",
    ),
    (
        "induction: prefix matching of the best head, 2 layers, random tokens",
        "{attn_only[best_prefix_matching]:.2f}; 1 layer {attn_only[best_prefix_matching_1_layer]:.2f}; without the previous-token head {attn_only[prefix_matching_without_previous_token_head]:.2f}",
        "Olsson et al. 2022: with 2 layers, never with 1",
        "uv run attn_only.py",
    ),
    (
        "in-context learning score, nats",
        "{attn_only[icl_score]:.2f} +- {attn_only[icl_score_95]:.2f} (256 tokens); 1 layer {attn_only[icl_score_1_layer]:+.2f} +- {attn_only[icl_score_1_layer_95]:.2f}",
        "Olsson et al. 2022: about -0.4 (token 500 against 50)",
        "uv run attn_only.py",
    ),
    (
        "a logit's parts against the logit, largest error",
        "{attn_only[attribution_max_error]:.0e}",
        "0",
        "uv run attn_only.py",
    ),
    (
        "logits against Hugging Face, max error / max logit: GPT-2",
        "{parity[GPT2LMHeadModel][max_relative_logit_error]:.0e}",
        "0 (transformers)",
        "uv run pytest",
    ),
    (
        "... Llama, Llama 3.1",
        "{parity[LlamaForCausalLM][max_relative_logit_error]:.0e}, {parity[Llama 3.1][max_relative_logit_error]:.0e}",
        "0",
        "uv run pytest",
    ),
    (
        "... Mistral, Qwen2, Qwen3",
        "{parity[MistralForCausalLM][max_relative_logit_error]:.0e}, {parity[Qwen2ForCausalLM][max_relative_logit_error]:.0e}, {parity[Qwen3ForCausalLM][max_relative_logit_error]:.0e}",
        "0",
        "uv run pytest",
    ),
    (
        "... Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE",
        "{parity[MixtralForCausalLM][max_relative_logit_error]:.0e}, {parity[Qwen2MoeForCausalLM][max_relative_logit_error]:.0e}, {parity[Qwen3MoeForCausalLM][max_relative_logit_error]:.0e}, {parity[OlmoeForCausalLM][max_relative_logit_error]:.0e}",
        "0",
        "uv run pytest",
    ),
    (
        "training speed against Hugging Face's default attention, 6 layers of width 512: GPT-2, Llama",
        "{tiny_transformer_bench[throughput_vs_hf]:.2f}, {llama_block_bench[throughput_vs_hf]:.2f}",
        "1 (transformers)",
        "uv run tiny_transformer.py --bench; uv run llama_block.py --bench",
    ),
    (
        "world model: taught capitals; in phrasings never seen; in the direction never taught",
        "{world[fact_recall]:.1%}; {world[fact_recall_heldout_phrasing]:.1%}; {world[reverse_recall_of_forward_only]:.1%}",
        "known from the corpus: 100%; -; 0%",
        "see 'The world model'",
    ),
    (
        "... indirect objects with held-out pairs of names; logit difference",
        "{world[ioi_accuracy]:.1%}; {world[ioi_logit_diff]:.1f}",
        "Wang et al. 2022, GPT-2: 99.3%; 3.56",
        "the same",
    ),
    ("... years: p(later) - p(not later)", "{world[greater_than]:.2f}", "Hanna et al. 2023, GPT-2: 0.82", "the same"),
    (
        "logit lens: last layer against the model's own logits",
        "{logit_lens[models][models-world][last_layer_gate_error]:.0e}",
        "0",
        "uv run logit_lens.py",
    ),
    (
        "... depth at which answers settle",
        "{logit_lens[models][models-world][depth_fraction]:.2f}",
        "0.75 to 0.85 in 7-9B models, by the original study",
        "uv run logit_lens.py",
    ),
    (
        "... asked against the direction taught: recall minus that of both",
        "{logit_lens[models][models-world][reversal_gap][forward]:+.0%}",
        "Berglund et al. 2023: near 0% recall in reverse",
        "uv run logit_lens.py",
    ),
    (
        "... time of the answer position / plain forward; all positions / their floor",
        "{logit_lens_bench[time_vs_forward]:.2f}; {logit_lens_bench[time_all_positions_vs_floor]:.2f}",
        "1; 1",
        "uv run logit_lens.py --bench",
    ),
    (
        "... extra memory / that of run_with_cache; streamed model's memory / its file",
        "{logit_lens_bench[memory_vs_cache_everything]:.3f}; {logit_lens_bench[streaming_peak_over_checkpoint]:.2f}",
        "1; 1",
        "uv run logit_lens.py --bench",
    ),
    (
        "patching speed against transformer_lens.patching, GPT-2-small's shape: resid_pre, heads",
        "{patching_bench[resid_pre_speedup_gpt2]:.1f}x, {patching_bench[head_speedup_gpt2]:.1f}x",
        "1x (TransformerLens)",
        "uv run patching.py --bench",
    ),
    (
        "... on the world model",
        "{patching_bench[resid_pre_speedup_world]:.1f}x, {patching_bench[head_speedup_world]:.1f}x (largest difference of all sweeps {patching_bench[max_abs_diff]:.0e})",
        "1x (TransformerLens)",
        "uv run patching.py --bench",
    ),
    (
        "circuit for indirect objects: share of the metric kept, edges",
        "{patching[circuit_faithfulness]:.2f} by {patching[circuit_edges]} of {patching[circuit_edges_total]} edges; as many at random {patching[random_circuit_faithfulness]:.2f}",
        "Wang et al. 2022, GPT-2, nodes: 0.87",
        "uv run patching.py",
    ),
    (
        "... area under the faithfulness curve: EAP-IG, EAP",
        "{patching[eap_ig_faithfulness]:.3f}, {patching[eap_faithfulness]:.3f}",
        "Hanna et al. 2024: EAP-IG above EAP",
        "uv run patching.py",
    ),
    (
        "... in three seeds of the world model, which answer alike: edges; share kept; edges between layers that two seeds share",
        BY_SEED,
        "one circuit would share all",
        "uv run patching.py --sweep model=models/world,checkpoints/world_1,checkpoints/world_2",
    ),
    (
        "sparse autoencoder: L0, cross-entropy recovered, FVU, dead",
        "{sae_probe[l0]:.1f}, {sae_probe[ce_recovered]:.1%}, {sae_probe[fvu]:.3f}, {sae_probe[dead_fraction]:.1%}",
        "Bricken et al. 2023, A/1: recovered 79%",
        "uv run sae_probe.py",
    ),
]
PICTURES = {
    "zero_layer": "zero_layer/loss",
    "attn_only": "attn_only/phase_change",
    "tiny_transformer": "tiny_transformer/heads",
    "llama_block": "llama_block/phases",
    "moe": "moe/specialisation",
    "logit_lens": "logit_lens/grid",
    "patching": "patching/circuit",
    "sae_probe": "sae_probe/probes",
}
START, END = "<!-- measured -->\n", "<!-- measured ends -->\n"


def named() -> dict[str, set[str]]:
    """{results file: its top-level keys that the table names}"""
    found: dict[str, set[str]] = {}
    for row in ROWS:
        for _, field, _, _ in string.Formatter().parse(" ".join(row[1:3])):
            if field:
                found.setdefault(field.split("[")[0], set()).add(re.search(r"\[(.*?)\]", field)[1])
    return found


def collect() -> None:
    """Keep what the table names, where a run has made it anew."""
    for name, keys in named().items():
        if not (path := ROOT / f"results/{name}.json").exists():
            continue
        numbers = json.loads(path.read_text())
        kept = {key: numbers[key] for key in sorted(keys)} | {
            key: numbers[key] for key in ("versions",) if key in numbers
        }
        (ROOT / f"docs/results/{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    for path in ROOT.glob(
        "results/patching/sweep-*/sweep.json"
    ):  # the seeds of the world: their circuits join the spread
        if list(runs := json.loads(path.read_text())) != [
            f"model={folder}" for folder in ("models/world", "checkpoints/world_1", "checkpoints/world_2")
        ]:
            continue
        metrics, circuits = (
            json.loads((ROOT / "models/world/metrics.json").read_text()),
            [set(run["circuit"]) for run in runs.values()],
        )
        metrics["over_seeds"] |= {
            "ioi_circuit_edges": [len(circuit) for circuit in circuits],
            "ioi_circuit_faithfulness": [round(run["circuit_faithfulness"], 2) for run in runs.values()],
        }
        kinds = [
            {re.sub(r"H\d+", " head", edge) for edge in circuit} for circuit in circuits
        ]  # the heads of a layer have no order that seeds could share
        metrics["over_seeds"] |= {
            "ioi_circuit_shared": [f"{len(a & b)} of {len(a | b)}" for a, b in itertools.combinations(kinds, 2)],
            "ioi_circuits": [", ".join(sorted(circuit)) for circuit in circuits],
        }
        (ROOT / "models/world/metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


def table() -> str:
    numbers = {
        name: json.loads(
            (ROOT / ("models/world/metrics.json" if name == "world" else f"docs/results/{name}.json")).read_text()
        )
        for name in named()
    }
    rows = [
        f"| {what} | {measured.format_map(numbers)} | {theirs.format_map(numbers)} | `{command}` |"
        for what, measured, theirs, command in ROWS
    ]
    return (
        "\n".join(["| what | measured here | theirs, or what it should be | command |", "|---|---|---|---|", *rows])
        + "\n"
    )


def readme() -> str:
    """README.md with its table made anew."""
    before, rest = (ROOT / "README.md").read_text().split(START)
    return before + START + table() + END + rest.split(END)[1]


def pictures() -> None:
    """A small PNG of one figure per script; what has not been drawn is left as it is."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=1250, height=700))
        for name, figure in PICTURES.items():
            if not (path := ROOT / f"figs/{figure}.html").exists():
                continue
            page.goto(f"file://{path}")
            page.add_style_tag(content=".modebar{display:none}")
            page.locator(".plotly-graph-div svg.main-svg").first.wait_for()
            page.locator(".plotly-graph-div").screenshot(path=ROOT / f"docs/{name}.png")
        browser.close()


if __name__ == "__main__":
    for step in sys.argv[1:] or sys.exit(__doc__):
        if step == "table":
            (ROOT / "README.md").write_text(readme())
        else:
            {"collect": collect, "pictures": pictures}[step]()
