"""Every script from the shell, small, in an empty folder; then every page it drew in a real browser, without a network."""
import json
import re
import shutil

import pytest

from utils import green, purple, yellow

FLAGS = {
    "zero_layer.py": "--steps 20",
    "attn_only.py": "--steps 12 --tokens-per-step 1024 --contexts 32 96 --context-steps 0.5",
    "tiny_transformer.py": "--steps 8 --tokens-per-step 512",
    "llama_block.py": "--steps 8 --tokens-per-step 512 --n-layers 2 --d-model 32 --d-mlp 64 --n-kv-heads 2",
    "moe.py": "--steps 8 --tokens-per-step 512 --n-layers 2 --d-model 32 --d-expert 32",
    "logit_lens.py": "--countries 8 --forms 1 --tuned-steps 20 --draws 50",
    "patching.py": "--n 6 --held-out 6 --ig-steps 2 --site resid_pre z",
    "sae_probe.py": "--steps 50 --batch 512 --buffer 6000 --d-sae 96 --heldout 3000 --sentences 25 --seeds 1 --variants --no-random-baseline --architecture topk --min-recovered 0.1 --max-fvu 0.9",
}
TRUE = {  # what the numbers of even so small a run must say
    "attn_only.py": lambda n: n["attribution_max_error"] < 1e-4,
    "tiny_transformer.py": lambda n: max(n[f"{name}_max_error"] for name in ("hooks", "fold_norm", "rows", "attribution", "integrated_gradients")) < 1e-4,
    "llama_block.py": lambda n: n["rope_offset_drift"] < 1e-4 and n["fact_recall"] <= 1,
    "moe.py": lambda n: max(n["dense_sum_error"], n["replay_error"]) < 1e-4,
    "logit_lens.py": lambda n: n["models"]["models-world"]["last_layer_gate_error"] < 1e-4 and n["models"]["models-world"]["reversal_gap"] == {"forward": -1.0, "reverse": -1.0},
    "patching.py": lambda n: max(n["gates"].values()) < 1e-4,
    "sae_probe.py": lambda n: abs(n["l0"] - 16) < 0.01 and n["steering_effect"] > n["steering_effect_random"] and n["probes"]["country"]["auroc"]["dense blocks.2.hook_resid_pre"] > 0.95,
}


def open_pages(pages: list) -> None:
    """Every page draws something, asks the network for nothing, logs no error, and answers the mouse."""
    from playwright.sync_api import TimeoutError, sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page, wrong = browser.new_page(viewport=dict(width=1300, height=800)), []
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        for path in pages:
            page.goto(f"file://{path}")
            if "plotly-graph-div" in page.content():
                try: page.wait_for_selector(".mlayer path, .mlayer image, .mlayer text", state="attached", timeout=20_000)
                except TimeoutError: pytest.fail(f"{path.name} is blank")
                titles = page.evaluate("Object.entries(document.querySelector('.plotly-graph-div').layout).map(([key, value]) => [key.replace(/[0-9]/g, ''), value.title?.text])")
                assert {"title", "xaxis", "yaxis"} <= {key if key != "text" else "" for key, text in titles if text or key == "title"}, f"{path.name}: an axis has no name"
            else:
                assert len(page.inner_text("body")) > 100, f"{path.name} is blank"
                if page.locator("span.t").count():
                    before = page.inner_html("body")
                    page.locator("span.t").nth(3).hover()
                    assert page.inner_html("body") != before, f"{path.name} does not answer the mouse"
            assert not wrong, (path.name, wrong)
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize("script", FLAGS)
def test_a_script_runs_and_its_figures_open(script, run, workdir):
    name = script.removesuffix(".py")
    shutil.rmtree(workdir / "figs" / name, ignore_errors=True)
    done = run(script, *FLAGS[script].split(), fresh=True)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads((workdir / f"results/{name}.json").read_text())
    assert {"config", "versions"} < set(numbers) and TRUE.get(script, bool)(numbers)
    assert purple in done.stdout and (green in done.stdout or yellow in done.stdout), "a story has sections, and a conclusion: green, or yellow where the small run misses a gate"
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    pages = sorted((workdir / "figs" / name).glob("*.html"))
    assert {str(page.relative_to(workdir)) for page in pages} == set(re.findall(r"(?:figure|page): (\S+)", said)), "what is drawn is named"
    if not shutil.which("chromium"): pytest.skip("the figures are not opened: no chromium here (apt-get install chromium)")
    open_pages(pages)
