"""Every script as __main__ with its flags, small, in an empty folder: what its numbers say, every page it drew in a real browser without a network, and the model it saved opened again."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from conftest import one_line_error
from test_zero_layer import story

from data import load_corpus
from lens import RULES
from utils import green, purple, yellow
from zero_layer import bigram_counts
from information import entropy_floor

FLAGS = {
    "zero_layer": "--data story.txt --vocab 300 --d-model 32 --steps 80 --ranks 2 16 --token cat",
    # enough for an induction head
    "attn_only": "--steps 200 --contexts 64 96 --context-steps 0.85 --tokens-per-step 3072",
    "tiny_transformer": "--steps 12 --tokens-per-step 1024 --contexts 32 --n-layers 2",
    "llama_block": "--steps 8 --tokens-per-step 512 --n-layers 2 --d-model 32 --d-mlp 64 --n-kv-heads 2",
    "moe": "--steps 8 --tokens-per-step 512 --contexts 32 --d-model 32 --d-expert 16 --vocab 512 --rows 8 --n-experts 8",
    "mamba": "--steps 8 --tokens-per-step 512 --contexts 32 --n-layers 2 --d-model 32 --d-state 4 --rows 8",
    "logit_lens": "--tuned-steps 40",
    "reversal": "--countries 24 --forms 2 --draws 200",
    "readers": "--tasks forward language --forms 1 --draws 50 --tuned-steps 12 --jacobian-rows 2",
    "patching": "--n 8 --held-out 16 --site resid_pre z",
    "circuits": "--n 8 --held-out 16 --ig-steps 3",
    "das": "--n 48 --held-out 48 --steps 16 --ranks 1 --random 2",
    "sae_probe": "--steps 50 --batch 512 --buffer 6000 --d-sae 96 --heldout 3000 --sentences 25 --seeds 1 --variants "
    "--no-random-baseline --architecture topk --min-recovered 0.1 --max-fvu 0.9",
    "attribution": "--steps 40 --batch 512 --d-sae 128 --heldout 3000 --suppressed 6 --pages 20 --circuit-pairs 2 --export graphs",
    "steering": "--n 24 --held-out 24 --random 2 --strengths 1 2 --rows 4 --prompts 2 --written 6",
    "probing": "--n 240 --seeds 2",
    "feature_steering": "--steps 50 --batch 512 --buffer 6000 --d-sae 96 --heldout 3000 --sentences 25 "
    "--architecture topk --min-recovered 0.1 --max-fvu 0.9",
    "catalogue": "--neurons 2 --neuron 3.117 --rows 24 --shuffles 100",
}
# what was trained, opened by the same script, and the number that must come out again
AGAIN = {
    "attn_only": ("--model checkpoints/attn_only/2_layers", "best_prefix_matching"),
    "tiny_transformer": ("--model checkpoints/tiny_transformer", "heldout_loss"),
    "moe": ("--model checkpoints/moe/model --contexts 32 --rows 8", "heldout_loss"),
    "llama_block": ("--model checkpoints/llama_block/model", "listening_gap"),
    "mamba": ("--model checkpoints/mamba/model --contexts 32 --rows 8", "loss_second_copy"),
}
FIGURES = {
    "zero_layer": "loss unseen rank embedding logits",
    "attn_only": "attention attribution head_scores phase_change loss_natural path_patching composition "
    "norm_based ablation qk_layer_0",
    "tiny_transformer": "attention attribution heads next_token neurons feed_forward_maps norm_based "
    "stream stream_effects stream_cosines",
    "llama_block": "attention phases rope rope_heads distance sink norms gates stream stream_effects stream_cosines",
    "moe": "load_over_training specialisation who_goes_where prompt prompt_logits prompt_weights prompt_load knock_out "
    "stream stream_effects stream_cosines",
    "mamba": "training loss_repeated knock_outs after_copy hidden_attention",
    "logit_lens": "grid tuned_KL tuned_perplexity layers heads",
    "reversal": "probability rank kl entropy",
    "patching": "attention direct_attribution tokens places heads head_places ablation_metric ablation_loss noise",
    "readers": "auroc percentile kl causal_forward",
    "circuits": "paths roles attribution faithfulness circuit",
    "das": "accuracy best rank",
    "sae_probe": "density decoder_cosine probes layers features",
    "attribution": "judged features_L0 features_L3 graph_1 graph_2 where_1 where_2 edges",
    "steering": "sweep cost writing fluency",
    "probing": "layers labels methods",
    "feature_steering": "steering attribution",
    "catalogue": "heads written_by catalogue",
}


def check_zero_layer(n: dict, said: str, folder: Path) -> None:
    assert 0 <= n["kl_to_bigram"] < 0.05 < 0.5 < n["kl_frequencies"] and n["kl_to_bigram"] == pytest.approx(
        (n["train_loss"] - n["bigram_floor"]) / math.log(2)
    )
    assert n["train_seconds"] > 0 and n["heldout_best"] <= n["heldout_loss"] and n["heldout_add_alpha"] > 0
    assert n["kl_by_rank"]["2"] > n["kl_by_rank"]["16"] and set(n["kl_by_rank"]) == set(n["kl_by_rank_svd"]) == {
        "2",
        "16",
    }
    corpus = load_corpus(str(folder / "story.txt"), 300, cache=str(folder / "checkpoints/data"))
    assert n["bigram_floor"] == pytest.approx(entropy_floor(bigram_counts(corpus.train.values(), corpus.d_vocab)))
    assert " cat" in n["tokens"] and "it has learned the table" in said


def check_attn_only(n: dict, said: str, folder: Path) -> None:
    """Two layers form an induction head, one layer cannot."""
    assert n["best_prefix_matching"] > 0.4 and n["best_prefix_matching_1_layer"] < 0.1
    assert n["prefix_matching_without_previous_token_head"] < 0.5 * n["best_prefix_matching"]
    assert (
        n["attribution_max_error"] < 1e-4
        and n["strongest_path"].startswith("L0H")
        and " k of L1H" in n["strongest_path"]
    )
    assert {"icl_score", "icl_score_95", "train_seconds", "tokens_per_second"} <= set(
        n
    ) and "induction head" in said.splitlines()[-1]


def check_tiny_transformer(n: dict, said: str, folder: Path) -> None:
    assert (
        max(n[f"{name}_max_error"] for name in ("hooks", "fold_norm", "rows", "attribution", "integrated_gradients"))
        < 1e-4
    )
    assert {
        "heldout_loss",
        "gradient_norms",
        "roles",
        "bars",
        "best_scores",
        "mixing_before_ff",
        "mixing_after_ff",
        "answer_logit",
    } <= set(n)


def check_llama_block(n: dict, said: str, folder: Path) -> None:
    assert (
        n["rope_offset_drift"] < 1e-4
        and n["listening_gap"] < 1e-5
        and n["fact_recall"] <= 1
        and json.loads((folder / "checkpoints/llama_block/model/metrics.json").read_text())["fact_recall"]
        == n["fact_recall"]
    )


def check_moe(n: dict, said: str, folder: Path) -> None:
    assert max(n["dense_sum_error"], n["replay_error"]) < 1e-4
    assert len(n["load"]) == 3 and len(n["load"][0]) == 8 and set(n["heldout_loss"]) == {"code", "english"}


def check_mamba(n: dict, said: str, folder: Path) -> None:
    """The gates hold; a knock-out is worth the losses that it is made of."""
    assert n["listening_gap"] < 1e-5 and n["hidden_attention_max_error"] < 1e-4
    plain = n["knock_outs"]["nothing"]
    assert plain["second"] == n["loss_second_copy"] and plain["first"] == n["loss_first_copy"]
    for losses in n["knock_outs"].values():
        assert losses["gain"] == pytest.approx(losses["unrelated"] - losses["second"])
    assert len(n["knock_outs"]) == 4 + 2 * (3 + 3)
    assert n["heldout_loss"] < math.log(512) and len(n["induction_by_layer"]) == 2
    assert f"{plain['gain']:.2f} nats cheaper" in said.splitlines()[-1]


def check_logit_lens(n: dict, said: str, folder: Path) -> None:
    """The gate holds, and the tuned lens beats the raw one."""
    assert n["last_layer_gate_error"] < 1e-4 and "put first, once" in said
    assert all(a < b for a, b in zip(n["tuned_lens"]["KL, tuned"][:-1], n["tuned_lens"]["KL, raw"]))


def check_reversal(n: dict, said: str, folder: Path) -> None:
    """Facts run one way."""
    world = n["models"]["models-world"]
    kept = {"semantic_layer", "copy_layer", "depth_fraction", "last_layer_gate_error", "reversal_gap", "patterns"}
    assert set(world) == kept
    assert world["patterns"]["reversal asymmetry"]["verdict"] == "holds"
    assert world["last_layer_gate_error"] < 1e-4
    assert set(world["reversal_gap"]) == {"forward", "reverse"}
    assert all(gap < -0.8 for gap in world["reversal_gap"].values())
    assert 0.5 < world["depth_fraction"] <= 1 and "put first, once" in said and "Facts run one way" in said
    report = (folder / "results/reversal/models-world.md").read_text()
    assert report.count("(direction not taught)") == 2
    assert all(f"- {rule}:" in report for rule in RULES)


def check_readers(n: dict, said: str, folder: Path) -> None:
    """At the end of the prompt the last layer is the model's own answer, and a model of random weights tells nothing."""
    assert max(n["gates"].values()) < 1e-4
    assert set(n["readers"]) == {"forward", "language"}
    at_end = n["readers"]["forward"]["end"]["raw lens"][4]
    assert at_end["auroc"] > 0.95 and at_end["percentile, known"] > 0.99
    assert n["readers"]["forward"]["subject"]["a head's OV"][4] is None
    null = n["random_weights"]["forward"]["raw lens"]
    assert null["interval"][0] < 0.5 < null["interval"][1]
    assert n["mean_kl"]["tuned"] < n["mean_kl"]["raw"]
    assert n["causal"]["forward"]["the whole stream"]["swapped"] > 0.8
    assert "What does it know?" in said.splitlines()[-1]


def check_patching(n: dict, said: str, folder: Path) -> None:
    assert max(n["gates"].values()) < 1e-4
    written = n["direct_attribution"]
    assert {"embed", "L1H2", "L3 MLP", "biases"} <= set(written) and len(written) == 1 + 16 + 4 + 1
    assert sum(mean for mean, _, _ in written.values()) == pytest.approx(n["clean"], rel=1e-3)
    assert all(low <= mean <= high for mean, low, high in written.values())
    assert set(n["ablation"]) == {"zero", "mean", "resample", "noise"}
    assert all(set(sites) for sites in (n["by_place"], n["by_head"]))


def check_circuits(n: dict, said: str, folder: Path) -> None:
    assert max(n["gates"].values()) < 1e-4 and n["edge_attribution_seconds"] < 20
    assert n["circuit_edges_total"] == 479 and n["circuit_edges"] <= 0.2 * n["circuit_edges_total"]
    swap, mean = n["faithfulness_by_ablation"]["corrupt"], n["faithfulness_by_ablation"]["mean"]
    assert n["circuit_faithfulness"] == swap["normalised"] >= 0.8 and swap["random_circuit"] < 0.3
    # the corrupt run turns the answer round, so 0 of the way is as far below 0 as 1 is above; the mean answers neither
    assert swap["all_ablated"] < -5 and abs(mean["all_ablated"]) < 2 and swap["circuit_over_clean"] < swap["normalised"]
    assert n["attribution_agreement"]["EAP-IG"]["pearson"] > 0.8
    assert 0.5 < n["rankings"]["EAP-IG"]["CPR"][0] < 1.1 and n["rankings"]["random"]["log_area_behind_eap_ig"][1] > 0.1
    effects = n["direct_effects"]
    assert effects["path_patch"].keys() == effects["edge_patch"].keys() and len(effects["path_patch"]) == 6


def check_das(n: dict, said: str, folder: Path) -> None:
    """One dimension carries number for nouns not trained on; before the subject nothing does."""
    assert max(n["gates"].values()) < 1e-4 and n["not_orthogonal"] < 1e-5
    das, whole = n["best"]["DAS"], n["best"]["the whole stream"]
    assert das["rank"] == 1 and das["iia"][0] > 0.8 and das["answer_kept"] > 0.8 and whole["iia"][0] > 0.9
    assert das["iia"][1] <= das["iia"][0] <= das["iia"][2] and n["random"]["largest"] < 0.2
    assert n["iia"]["DAS"][n["best_layer"]][n["places"].index(n["best_place"])] == das["iia"][0]
    before = n["places"].index("before")
    assert max(row[before] for row in n["iia"]["DAS"]) < 0.3
    assert f"carry number for {das['iia'][0]:.0%}" in said
    files = (folder / "checkpoints/das").glob("models-world-number-*.safetensors")
    assert any(f"subspaces: {file.relative_to(folder)}" in said for file in files)


def check_sae_probe(n: dict, said: str, folder: Path) -> None:
    assert abs(n["l0"] - 16) < 0.01
    assert n["probes"]["country"]["auroc"]["dense blocks.2.hook_resid_pre"] > 0.95


def check_attribution(n: dict, said: str, folder: Path) -> None:
    """The gates hold, and with attention held the graphs foresee what a suppressed feature does."""
    capital, indirect_object = n["graphs"].values()
    assert capital["answer"] == " Tokyo" and indirect_object["answer"] == " Philip"
    for told in n["graphs"].values():
        assert max(told["gates"].values()) < 1e-4
        assert 0 < told["replacement_score"] < told["completeness_score"] < 1
        assert 10 < told["kept_nodes"] < told["active_features"]
    for told in n["edges"].values():
        assert told["held_error"] < 1e-4
        assert told["paths_frozen"] > 0.5
    judged = n["judged"]
    assert judged["all"]["ce_clean"] < judged["all"]["ce_replaced"] < judged["all"]["ce_mean_ablated"]
    assert set(n["beside_circuits"]) == {"capitals", "ioi"}
    exported = json.loads((folder / "graphs/graph-1.json").read_text())
    assert len(exported["links"]) == capital["kept_edges"] and "Tokyo" in said.splitlines()[-3]


def check_feature_steering(n: dict, said: str, folder: Path) -> None:
    assert n["steering_effect"] > n["steering_effect_random"]


def check_catalogue(n: dict, said: str, folder: Path) -> None:
    """The parts of what neurons read sum to it; the induction head is named; the neuron that was asked for is there."""
    assert n["pre_activation_error"] < 1e-4 and n["neurons"] == 2 * 4 + 1
    assert "induction" in n["roles"]["L3H0"] and 0 <= n["neurons_above_null"] <= 9
    page = (folder / "figs/catalogue/catalogue.html").read_text()
    assert page.count('"kind":"head"') == 16 and '"id":"L3N117"' in page and "=== L3N117 ===" in said


def check_steering(n: dict, said: str, folder: Path) -> None:
    """Men become women for names not looked at, by a push that random ones of its length do not do."""
    assert max(n["gates"].values()) < 1e-4
    assert n["by_itself"]["p_target"] < 0.05 and n["in_the_prompt"]["p_target"] > 0.9
    last = n["places"].index("blocks.3.hook_resid_pre")
    at_1 = n["strengths"].index(1.0)
    assert n["best_hook"] == "blocks.3.hook_resid_pre" and n["swept"][n["best_method"]][last][at_1] > 0.4
    assert n["swept"]["random"][last][at_1] < 0.1
    assert max(max(row) for row in n["swept"]["difference of means"][:1]) < 0.05, "the last tokens are the same word"
    added, taken_off = (n["edits"][name]["direction"] for name in ("added", "taken off"))
    assert added[0] == pytest.approx(n["swept"][n["best_method"]][last][at_1]) and taken_off[1] < 0.5 < added[1]
    assert all(row[at_1][1] > 0 for row in n["cost"].values())
    assert {x["text"].split()[0] for x in n["writings"]["0"]} <= {"he", "his"}
    assert {x["text"].split()[0] for x in n["writings"]["2"]} <= {"she", "her"}
    assert (folder / n["direction_file"]).is_file() and n["direction_file"] in said


def check_probing(n: dict, said: str, folder: Path) -> None:
    """The number of the subject reaches another noun in the middle of the model; labels that mean nothing never do."""
    assert n["gates"]["read_among_others_and_alone"] < 1e-4
    whole = n["auroc"]["singular"]["whole stream"]
    assert whole[0] < 0.8 < 0.97 < whole[3] and n["at_best"]["singular"]["whole stream"]["blocks"] >= 2
    shuffled = n["at_best"]["singular"]["shuffled labels"]
    assert shuffled["low"] < 0.5 < shuffled["high"] and shuffled["auroc"] < 0.75
    assert n["auroc"]["singular"]["1 neuron"][0] is None, "no neurons before the first block"
    assert (folder / n["files"]["singular"]).is_file()


CHECKS = {
    "zero_layer": check_zero_layer,
    "attn_only": check_attn_only,
    "tiny_transformer": check_tiny_transformer,
    "llama_block": check_llama_block,
    "moe": check_moe,
    "mamba": check_mamba,
    "logit_lens": check_logit_lens,
    "reversal": check_reversal,
    "readers": check_readers,
    "patching": check_patching,
    "circuits": check_circuits,
    "das": check_das,
    "sae_probe": check_sae_probe,
    "attribution": check_attribution,
    "steering": check_steering,
    "catalogue": check_catalogue,
    "probing": check_probing,
    "feature_steering": check_feature_steering,
}


def assert_page_lives(page, path: Path) -> None:
    """The page draws something, names its axes, and answers the mouse."""
    from playwright.sync_api import TimeoutError

    page.goto(f"file://{path}")
    if "plotly-graph-div" in page.content():
        try:
            page.wait_for_selector(".mlayer path, .mlayer image, .mlayer text", state="attached", timeout=20_000)
        except TimeoutError:
            pytest.fail(f"{path.name} is blank")
        titles = page.evaluate(
            "Object.entries(document.querySelector('.plotly-graph-div').layout)"
            ".map(([key, value]) => [key.replace(/[0-9]/g, ''), value.title?.text])"
        )
        titled = {key for key, text in titles if text or key == "title"}
        assert {"title", "xaxis", "yaxis"} <= titled, f"{path.name}: an axis has no name"
        return
    assert len(page.inner_text("body")) > 100, f"{path.name} is blank"
    if path.stem == "circuit":
        page.locator("g.node circle").first.hover()
        assert page.locator("path.far").count(), f"{path.name} does not show a node's edges alone"
    if page.locator("span.t").count():
        before = page.inner_html("body")
        page.locator("span.t").nth(3).hover()
        assert page.inner_html("body") != before, f"{path.name} does not answer the mouse"


def open_pages(pages: list[Path]) -> None:
    """Every page lives, asks the network for nothing, and logs no error."""
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []

    def note_message(message) -> None:
        if message.type in ("error", "warning"):
            wrong.append(message.text)

    def note_request(request) -> None:
        if request.url.startswith("http"):
            wrong.append(request.url)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 800})
        page.on("console", note_message)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", note_request)
        for path in pages:
            assert_page_lives(page, path)
            assert not wrong, (path.name, wrong)
        browser.close()


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.browser
@pytest.mark.parametrize("name", FLAGS)
def test_a_script_runs_says_what_is_true_and_its_figures_open(name, run, workdir):
    shutil.rmtree(workdir / "figs" / name, ignore_errors=True)
    (workdir / "story.txt").write_text(story(12000))
    done = run(f"{name}.py", *FLAGS[name].split(), "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads((workdir / f"results/{name}.json").read_text())
    said = without_colours(done.stdout)
    assert {"config", "versions"} < set(numbers)
    told, _, report = said.rstrip().rpartition("\n")
    assert report == f"report: figs/{name}/index.html", "the last line names the report"
    CHECKS[name](numbers, told, workdir)
    assert purple in done.stdout, "a story has sections"
    assert green in done.stdout or yellow in done.stdout, (
        "a story has a conclusion: green, or yellow where the small run misses a gate"
    )
    if name != "sae_probe":  # whose table has concepts that are too rare here for a number
        assert " nan" not in said.lower(), "a number that is none is printed"
    pages = sorted((workdir / "figs" / name).glob("*.html"))
    drawn = {str(page.relative_to(workdir)) for page in pages}
    assert drawn == set(re.findall(r"(?:figure|page|report): (\S+)", said)), "what is drawn is named"
    assert set(FIGURES[name].split()) <= {page.stem for page in pages}
    if shutil.which("chromium"):
        open_pages(pages)
    if name in AGAIN:
        flags, same = AGAIN[name]
        again = run(f"{name}.py", *flags.split(), "--device", "cpu")
        assert again.returncode == 0, again.stderr[-2000:]
        if name != "attn_only":
            tensors = [
                line
                for line in again.stdout.splitlines()
                if line.startswith(("model.embed", "transformer.wte", "backbone.embed"))
            ]
            assert tensors, "the tensors are listed"
        opened = json.loads((workdir / f"results/{name}.json").read_text())
        assert opened[same] == pytest.approx(numbers[same], rel=1e-4, abs=1e-5)
    if not shutil.which("chromium"):
        pytest.skip("the figures are not opened: no chromium here (apt-get install chromium)")


@pytest.mark.parametrize(
    "script", ["attn_only", "tiny_transformer", "llama_block", "moe", "feature_steering", "logit_lens"]
)
def test_an_empty_prompt_is_said_in_one_line(run, script):
    one_line_error(run(f"{script}.py", "--prompt", " ", "--device", "cpu"), "--prompt is empty")
