"""
The tables and pictures of README.md and docs/ from what was measured. Run the scripts, then
    python docs/make.py collect     # results/*.json -> docs/results (the numbers that the table names)
    python docs/make.py pictures    # figs/*.html -> docs/*.png, by Chromium
    python docs/make.py table       # docs/results -> docs/measured.md, docs/readers.md
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

STANDARD = "sae_own_l1[variants][standard 1 x 512, blocks.2.hook_resid_pre]"
SAELENS_L1 = f"{{{STANDARD}[l0]:.1f}}, {{{STANDARD}[ce_recovered]:.1%}}, {{{STANDARD}[fvu]:.3f}}, {{{STANDARD}[dead_fraction]:.1%}}"
TRACED = ("The capital of Japan is", "Then Susan and Philip waited at the school. Susan handed the book to")

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
        "... Mamba",
        "{parity[MambaForCausalLM][max_relative_logit_error]:.0e}",
        "0",
        "uv run pytest",
    ),
    (
        "training speed against Hugging Face's default attention, 6 layers of width 512: GPT-2, Llama",
        "{bench[throughput_vs_hf_gpt2]:.2f}, {bench[throughput_vs_hf_llama]:.2f}",
        "1 (transformers)",
        "uv run bench.py --only training",
    ),
    (
        "training from scratch, tiny_transformer's shape, AdamW alone; with Muon: tokens per CPU second; held-out loss after 123k tokens",
        "{bench[tokens_per_cpu_second][ours, AdamW]:,.0f}; {bench[tokens_per_cpu_second][ours, Muon]:,.0f}; {bench[loss_from_scratch][ours, AdamW]:.2f}; {bench[loss_from_scratch][ours, Muon]:.2f}",
        "nanoGPT's loop, learning rate 1e-3: {bench[tokens_per_cpu_second][nanoGPT]:,.0f}; {bench[loss_from_scratch][nanoGPT]:.2f}",
        "uv run bench.py --only scratch",
    ),
    (
        "world model: taught capitals; in phrasings never seen; in the direction never taught",
        "{world[fact_recall]:.1%}; {world[fact_recall_heldout_phrasing]:.1%}; {world[reverse_recall_of_forward_only]:.1%}",
        "known from the corpus: 100%; -; 0%",
        "uv run llama_block.py --steps 2500 --muon-lr 0.02",
    ),
    (
        "... indirect objects with held-out pairs of names; logit difference",
        "{world[ioi_accuracy]:.1%}; {world[ioi_logit_diff]:.1f}",
        "Wang et al. 2022, GPT-2 small: 99.3%, where it need only beat the other name (here all tokens); 3.56",
        "the same",
    ),
    (
        "... years: p(later) - p(not later)",
        "{world[greater_than]:.2f}",
        "Hanna et al. 2023, GPT-2 small: 0.82",
        "the same",
    ),
    (
        "logit lens: last layer against the model's own logits",
        "{logit_lens[last_layer_gate_error]:.0e}",
        "0",
        "uv run logit_lens.py",
    ),
    (
        "... depth at which answers settle",
        "{reversal[models][models-world][depth_fraction]:.2f}",
        "no number to compare: one of 4 layers is a quarter of the depth, in 7-9B models it is a thirtieth",
        "uv run reversal.py",
    ),
    (
        "... a word for the answer's category in the top-k before it settles",
        "{reversal[models][models-world][patterns][category first][statistic][0]:.0%}",
        "no number to compare: reported of 7-9B models. Counting the embedding, which has read the last token alone, it would be {reversal[models][models-world][patterns][category first][with_embedding][0]:.0%} here",
        "uv run reversal.py",
    ),
    (
        "... asked against the direction taught: recall minus that of both",
        "{reversal[models][models-world][reversal_gap][forward]:+.0%}",
        "Berglund et al. 2023: near 0% recall in reverse (GPT-3 and Llama, fine-tuned)",
        "uv run reversal.py",
    ),
    (
        "... time of the answer position / plain forward; all positions / their floor",
        "{bench[time_vs_forward]:.2f}; {bench[time_all_positions_vs_floor]:.2f}",
        "1; 1",
        "uv run bench.py --only lens",
    ),
    (
        "... extra memory / that of run_with_cache; streamed model's memory / its file",
        "{bench[memory_vs_cache_everything]:.3f}; {bench[streaming_peak_over_checkpoint]:.2f}",
        "1; 1",
        "uv run bench.py --only lens streaming",
    ),
    (
        "which reader tells taught from untaught facts, at the country after the first block: AUROC forward; reverse",
        "Jacobian lens {readers[at_subject][forward][Jacobian lens][auroc]:.2f}; {readers[at_subject][reverse][Jacobian lens][auroc]:.2f}, tuned {readers[at_subject][forward][tuned lens][auroc]:.2f}; {readers[at_subject][reverse][tuned lens][auroc]:.2f}, raw {readers[at_subject][forward][raw lens][auroc]:.2f}; {readers[at_subject][reverse][raw lens][auroc]:.2f}",
        "0.5: it cannot tell; below: it shows what was taught as unlikely (see docs/readers.md)",
        "uv run readers.py",
    ),
    (
        "... KL of the final distribution from the lens's, mean of the layers, nats",
        "Jacobian lens {readers[mean_kl][Jacobian]:.2f}, tuned {readers[mean_kl][tuned]:.2f}, raw {readers[mean_kl][raw]:.2f}",
        "0: it says what the model will say",
        "uv run readers.py",
    ),
    (
        "patching speed against transformer_lens.patching, GPT-2-small's shape, one pair: resid_pre, heads; 32 pairs",
        "{bench[resid_pre_speedup_gpt2]:.1f}x, {bench[head_speedup_gpt2]:.1f}x; {bench[resid_pre_speedup_gpt2_32_pairs]:.1f}x, {bench[head_speedup_gpt2_32_pairs]:.1f}x",
        "1x (TransformerLens)",
        "uv run bench.py --only patching",
    ),
    (
        "... on the world model",
        "{bench[resid_pre_speedup_world]:.1f}x, {bench[head_speedup_world]:.1f}x; {bench[resid_pre_speedup_world_32_pairs]:.1f}x, {bench[head_speedup_world_32_pairs]:.1f}x (largest difference of all sweeps {bench[max_abs_diff]:.0e})",
        "1x (TransformerLens)",
        "uv run bench.py --only patching",
    ),
    (
        "circuit for indirect objects, outside it each pair's corrupt run: share of the way from all ablated (0) to clean (1); circuit / clean logit difference",
        "{circuits[faithfulness_by_ablation][corrupt][normalised]:.2f}; {circuits[faithfulness_by_ablation][corrupt][circuit_over_clean]:.2f} by {circuits[circuit_edges]} of {circuits[circuit_edges_total]} edges; as many at random {circuits[faithfulness_by_ablation][corrupt][random_circuit]:z.2f} of the way",
        "at least 0.9 of the way where it was found; the rest is unseen pairs",
        "uv run circuits.py",
    ),
    (
        "... the same circuit, outside it the mean over prompts with other names",
        "{circuits[faithfulness_by_ablation][mean][normalised]:.2f}; {circuits[faithfulness_by_ablation][mean][circuit_over_clean]:.2f}",
        "Wang et al. 2022, circuit / clean: 0.87 (GPT-2 small; 26 heads at their positions; such a mean for the other heads, MLPs and embedding kept, which here are ablated too)",
        "uv run circuits.py",
    ),
    (
        "... edges ranked by EAP-IG: CPR; CMD at MIB's shares of edges; area under faithfulness over the log of edges",
        "{circuits[rankings][EAP-IG][CPR][0]:.3f}; {circuits[rankings][EAP-IG][CMD][0]:.3f}; {circuits[rankings][EAP-IG][log_area][0]:.3f} (at random {circuits[rankings][random][CPR][0]:.3f}; {circuits[rankings][random][CMD][0]:.3f}; {circuits[rankings][random][log_area][0]:.3f})",
        "1; 0; 1 if every circuit did what the model does (Mueller et al. 2025)",
        "uv run circuits.py",
    ),
    (
        "... EAP-IG ahead of EAP on the same pairs, with 95%: CPR; area over the log",
        "{circuits[rankings][EAP][CPR_behind_eap_ig][0]:+.3f} ({circuits[rankings][EAP][CPR_behind_eap_ig][1]:+.3f} to {circuits[rankings][EAP][CPR_behind_eap_ig][2]:+.3f}); {circuits[rankings][EAP][log_area_behind_eap_ig][0]:+.3f} ({circuits[rankings][EAP][log_area_behind_eap_ig][1]:+.3f} to {circuits[rankings][EAP][log_area_behind_eap_ig][2]:+.3f})",
        "Hanna et al. 2024: above 0 (GPT-2 small, outside the circuit the corrupt run)",
        "uv run circuits.py",
    ),
    (
        "... against all edges patched, EAP-IG; EAP: Pearson, Spearman, share of the strongest 5%, same sign",
        "; ".join(
            ", ".join(
                f"{{circuits[attribution_agreement][{method}][{measure}]:.2f}}"
                for measure in ("pearson", "spearman", "top", "sign")
            )
            for method in ("EAP-IG", "EAP")
        ),
        "1, 1, 1, 1",
        "uv run circuits.py",
    ),
    (
        "... in three seeds of the world model, which answer alike: edges (the fewest that keep 90% where they were found, outside them the corrupt run); share of the way kept; edges between layers that two seeds share",
        BY_SEED,
        "one circuit would share all",
        "uv run circuits.py --sweep model=models/world,checkpoints/world_1,checkpoints/world_2",
    ),
    (
        "sparse autoencoder: L0, cross-entropy recovered, FVU, dead",
        "{sae_probe[l0]:.1f}, {sae_probe[ce_recovered]:.1%}, {sae_probe[fvu]:.3f}, {sae_probe[dead_fraction]:.1%}",
        "no number to compare: these are features of the stream in the middle of four layers, Bricken et al.'s (2023) of the MLP of a one-layer model",
        "uv run sae_probe.py",
    ),
    (
        "... by the L1 objective written out in sae.py, penalty 1",
        "{sae_own_l1[l0]:.1f}, {sae_own_l1[ce_recovered]:.1%}, {sae_own_l1[fvu]:.3f}, {sae_own_l1[dead_fraction]:.1%}",
        f"SAELens's standard, the same penalty: {SAELENS_L1}",
        "uv run sae_probe.py --architecture own_l1 --variants standard:1",
    ),
    (
        "number of the subject in one dimension: interchange accuracy on other nouns (95% over nouns); sources shuffled",
        "{das[best][DAS][iia][0]:.0%} ({das[best][DAS][iia][1]:.0%} to {das[best][DAS][iia][2]:.0%}); {das[best][DAS, sources shuffled][iia][0]:.0%}",
        "the whole stream of {das[best][the whole stream][rank]} dimensions {das[best][the whole stream][iia][0]:.0%}; difference of means {das[best][means of the values][iia][0]:.0%}, the best of {das[random][draws]} random directions {das[random][largest]:.0%}",
        "uv run das.py",
    ),
    (
        "steering from men to women by a direction found on other names, pushed by the distance of the means: probability of she, her; loss added to other text, KL, nats per token",
        "{steering[best][p_target]:.2f}; {steering[best][loss_added]:+.2f}, {steering[best][kl]:.2f} ({steering[best_method]}, {steering[best_hook]})",
        "random directions of that length {steering[best][random]:.2f}; a woman's name in the prompt {steering[in_the_prompt][p_target]:.2f}; no push {steering[by_itself][p_target]:.2f}",
        "uv run steering.py",
    ),
    (
        "probes of the subject's number at another noun, subjects not trained on: AUROC after 0, 1 .. blocks",
        "; ".join(f"{{probing[auroc][singular][whole stream][{i}]:.2f}}" for i in range(5)),
        "shuffled labels "
        + "; ".join(f"{{probing[auroc][singular][shuffled labels][{i}]:.2f}}" for i in range(5))
        + "; one neuron, after its best block {probing[mean_at_best][1 neuron]:.2f}",
        "uv run probing.py",
    ),
    (
        "transcoders in the place of all MLPs at once: L0, cross-entropy added (the means in their place), FVU, dead",
        "{attribution[judged][all][l0]:.1f}, {attribution[nats_added]:.2f} nats ({attribution[nats_added_by_means]:.2f}), {attribution[judged][all][fvu]:.3f}, {attribution[judged][all][dead_fraction]:.1%}",
        "an exact replacement: 0 added",
        "uv run attribution.py",
    ),
    (
        "attribution graphs, a capital; an indirect object: completeness, replacement score, nodes kept by pruning",
        "; ".join(
            f"{{attribution[graphs][{prompt}][completeness_score]:.2f}}, "
            f"{{attribution[graphs][{prompt}][replacement_score]:.2f}}, "
            f"{{attribution[graphs][{prompt}][kept_nodes]}} ({{attribution[graphs][{prompt}][active_features]}} features active)"
            for prompt in TRACED
        ),
        "1, 1 without errors",
        "uv run attribution.py",
    ),
    (
        "... parts against their node; edges against the model with all else held: largest error",
        "; ".join(
            f"{{attribution[graphs][{prompt}][gates][parts_sum_to_nodes]:.0e}}, "
            f"{{attribution[edges][{prompt}][held_error]:.0e}}"
            for prompt in TRACED
        ),
        "0",
        "uv run attribution.py",
    ),
    (
        "... what suppressed features change, foreseen against measured (Pearson): attention and norms held; attention held; nothing held",
        "; ".join(
            f"{{attribution[edges][{prompt}][paths_frozen]:.2f}}, {{attribution[edges][{prompt}][paths_patterns_held]:.2f}}, "
            f"{{attribution[edges][{prompt}][paths_live]:.2f}}"
            for prompt in TRACED
        ),
        "1, 1, 1; a graph is made for the first: in the indirect object's, the scales of norms change too, which outweighs what single features write",
        "uv run attribution.py",
    ),
]
PICTURES = {
    "zero_layer": "zero_layer/loss",
    "attn_only": "attn_only/phase_change",
    "tiny_transformer": "tiny_transformer/heads",
    "llama_block": "llama_block/phases",
    "moe": "moe/specialisation",
    "mamba": "mamba/hidden_attention",
    "logit_lens": "logit_lens/grid",
    "readers": "readers/auroc",
    "patching": "patching/places",
    "circuits": "circuits/circuit",
    "sae_probe": "sae_probe/probes",
    "das": "das/accuracy",
    "steering": "steering/cost",
    "probing": "probing/layers",
    "attribution": "attribution/graph_1",
}
START, END = "<!-- measured -->\n", "<!-- measured ends -->\n"


SEEDS = ("models/world", "checkpoints/world_1", "checkpoints/world_2")  # the world model and its other seeds


def read(path: str) -> dict:
    return json.loads((ROOT / path).read_text())


def write(path: str, numbers: dict) -> None:
    (ROOT / path).write_text(json.dumps(numbers, indent=1) + "\n")


def named() -> dict[str, set[str]]:
    """{results file: its top-level keys that the table names}"""
    found: dict[str, set[str]] = {}
    for _, measured, theirs, _ in ROWS:
        for _, field, _, _ in string.Formatter().parse(f"{measured} {theirs}"):
            if field:
                file, key = re.match(r"(.*?)\[(.*?)\]", field).groups()
                found.setdefault(file, set()).add(key)
    return found


PAGE = {  # what docs/readers.md names
    "readers": {"at_subject", "auroc_by_layer", "causal", "config", "kl", "random_weights"},
    "readers_over_models": {"auroc", "mean_kl", "config"},
}


def collect() -> None:
    """Keep what the table names, where a run has made it anew; what a run left out stays as it was."""
    asked = named()
    for name in sorted({*asked, *PAGE}):
        keys = asked.get(name, set()) | PAGE.get(name, set())
        script = "sae_probe" if name == "sae_own_l1" else name
        if not (ROOT / f"results/{script}.json").exists():
            continue
        numbers = read(f"results/{script}.json")
        if script == "sae_probe" and (numbers["config"]["architecture"] == "own_l1") != (name == "sae_own_l1"):
            continue  # two rows are of one script's results, by another objective
        path = f"docs/results/{name}.json"
        kept = read(path) if (ROOT / path).exists() else {}
        kept |= {key: numbers[key] for key in [*sorted(keys), "versions"] if key in numbers}
        write(path, kept)
    for path in ROOT.glob("results/circuits/sweep-*/sweep.json"):
        runs = json.loads(path.read_text())
        if list(runs) == [f"model={folder}" for folder in SEEDS]:
            collect_circuits(list(runs.values()))


def collect_circuits(runs: list[dict]) -> None:
    """The circuits of the world's seeds join the spread in its metrics."""
    metrics = read("models/world/metrics.json")
    circuits = [set(run["circuit"]) for run in runs]
    # the heads of a layer have no order that seeds could share
    kinds = [{re.sub(r"H\d+", " head", edge) for edge in circuit} for circuit in circuits]
    metrics["over_seeds"] |= {
        "ioi_circuit_edges": [len(circuit) for circuit in circuits],
        "ioi_circuit_faithfulness": [round(run["circuit_faithfulness"], 2) for run in runs],
        "ioi_circuit_shared": [f"{len(a & b)} of {len(a | b)}" for a, b in itertools.combinations(kinds, 2)],
        "ioi_circuits": [", ".join(sorted(circuit)) for circuit in circuits],
    }
    write("models/world/metrics.json", metrics)


def table() -> str:
    numbers = {name: read(f"docs/results/{name}.json") for name in named() if name != "world"}
    numbers["world"] = read("models/world/metrics.json")
    lines = ["| what | measured here | theirs, or what it should be | command |", "|---|---|---|---|"]
    for what, measured, theirs, command in ROWS:
        lines.append(f"| {what} | {measured.format_map(numbers)} | {theirs.format_map(numbers)} | `{command}` |")
    return "\n".join(lines) + "\n"


def measured_page() -> str:
    """docs/measured.md with its table made anew."""
    return filled("docs/measured.md", table())


def as_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def auroc_says(told: dict | None) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(told["auroc"], *told["interval"]) if told else "-"


def two(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def reader_rows(told: dict, null: dict) -> list[list[str]]:
    """One task's, at the subject: a row for each reader."""
    rows = []
    for reader, x in told.items():
        percentile = f"{x['percentile, known']:.2f} / {x['percentile, not known']:.2f}"
        nulls = f"{x['auroc, labels swapped']:.2f}; {null[reader]['auroc']:.2f}"
        rows.append(
            [reader, auroc_says(x), percentile, two(x["false discovery"]), two(x.get("calibration error")), nulls]
        )
    return rows


def spread_says(x: list[float]) -> str:
    mean, low, high = x
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def readers_over_seeds(n: dict) -> str:
    """The table of docs/readers.md over the world model's three seeds, from docs/results/readers_over_models.json."""
    tasks = list(n["auroc"])
    layer = n["config"]["layer"]
    rows = [[reader, *(spread_says(n["auroc"][task][reader]) for task in tasks)] for reader in n["auroc"][tasks[0]]]
    kl = "; ".join(f"{what.removeprefix('KL, ')} {spread_says(x)}" for what, x in n["mean_kl"].items())
    return (
        f"\n**Over three seeds**, AUROC at the subject's last token after {layer} block, mean (lowest to highest):\n\n"
        f"{as_table(['reader', *tasks], rows)}\n"
        f"KL of the final distribution from the lens's, mean of the layers, nats: {kl}.\n"
    )


def readers_tables(n: dict) -> str:
    """The tables of docs/readers.md, from docs/results/readers.json."""
    layer = n["config"]["layer"]
    parts = []
    header = ["reader", "AUROC", "percentile, taught / untaught", "false discovery", "calibration error", "nulls"]
    for task in ("forward", "reverse"):
        parts.append(f"\n**{task.capitalize()}**, at the subject's last token after {layer} block:\n\n")
        parts.append(as_table(header, reader_rows(n["at_subject"][task], n["random_weights"][task])))
    relations = [task for task in n["at_subject"] if task not in ("forward", "reverse")]
    rows = [[r, *(auroc_says(n["at_subject"][task][r]) for task in relations)] for r in n["at_subject"]["forward"]]
    parts.append(
        "\n**Relations** (all taught): AUROC of the right answer against another country's, at the same place:\n\n"
    )
    parts.append(as_table(["reader", *relations], rows))
    for task, places in n["auroc_by_layer"].items():
        parts.append(f"\n**{task.capitalize()}**, AUROC after 0, 1 .. blocks:\n\n")
        rows = [[r, *(" ".join(map(two, by_reader[r])) for by_reader in places.values())] for r in places["subject"]]
        parts.append(as_table(["reader", *(f"at the {place}" for place in places)], rows))
    parts.append("\n**KL** of the model's final distribution from the lens's, by blocks passed, in nats:\n\n")
    parts.append(
        as_table(["lens", "KL"], [[kind, " ".join(map(two, of_layers))] for kind, of_layers in n["kl"].items()])
    )
    columns = ["right and causal", "right and idle", "wrong", "swapped", "moved", "removed"]
    for task, table in n["causal"].items():
        parts.append(f"\n**Edits, {task}**, at the subject after {layer} block, shares of the taught facts:\n\n")
        parts.append(as_table(["along", *columns], [[r, *(two(x.get(c)) for c in columns)] for r, x in table.items()]))
    return "".join(parts)


def filled(page: str, between: str) -> str:
    """A page with what stands between its marks made anew."""
    before, rest = (ROOT / page).read_text().split(START)
    return before + START + between + END + rest.split(END)[1]


def readers_page() -> str:
    over_seeds = readers_over_seeds(read("docs/results/readers_over_models.json"))
    return filled("docs/readers.md", readers_tables(read("docs/results/readers.json")) + over_seeds)


def write_table() -> None:
    (ROOT / "docs/measured.md").write_text(measured_page())
    (ROOT / "docs/readers.md").write_text(readers_page())


def pictures() -> None:
    """A small PNG of one figure per script; what has not been drawn is left as it is."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1250, "height": 700})
        for name, figure in PICTURES.items():
            path = ROOT / f"figs/{figure}.html"
            if not path.exists():
                continue
            page.goto(f"file://{path}")
            page.add_style_tag(content=".modebar{display:none}")
            is_plot = "plotly" in path.read_text()
            if is_plot:
                page.locator(".plotly-graph-div svg.main-svg").first.wait_for()
            shown = page.locator(".plotly-graph-div" if is_plot else "body")
            shown.screenshot(path=ROOT / f"docs/{name}.png")
        browser.close()


STEPS = {"collect": collect, "pictures": pictures, "table": write_table}

if __name__ == "__main__":
    asked = sys.argv[1:]
    if not asked or not set(asked) <= set(STEPS):
        sys.exit(__doc__)
    for step in asked:
        STEPS[step]()
