"""sae_probe.py: what its cells compute, and what it answers to a typo."""

import numpy as np
import pytest
from conftest import one_line_error

from sae_probe import Config, interval, over_splits, summarise
from sae import SAEConfig, variant


def test_a_misspelt_release_is_answered_with_its_neighbours(run):
    one_line_error(run("sae_probe.py", "--release", "gpt2-smal-res-jb"), "gpt2-smal-res-jb", "gpt2-small-res-jb")


def test_variants_keep_the_stories_own_settings():
    cfg = variant("topk:8:256", Config(sentences=7))
    assert isinstance(cfg, Config)
    assert isinstance(cfg, SAEConfig)
    assert (cfg.sentences, cfg.architecture, cfg.sparsity, cfg.d_sae) == (7, "topk", 8.0, 256)


def made_run(by_k: dict[int, float], layers: dict[str, float], **more: float) -> dict[str, dict]:
    """What run_probes would give: AUROCs that are 0.1 lower on test than on validation."""
    methods = {"single features": 0.8} | {f"{k} features": x for k, x in by_k.items()}
    methods |= {f"dense {place}": x for place, x in layers.items()} | more
    return {
        method: {"validation": x, "test": x - 0.1, "boot": np.array([x - 0.2, x]), "units": [3, 5]}
        for method, x in methods.items()
    }


def test_the_summary_chooses_on_validation_and_reports_test():
    by_k = {1: 0.8, 2: 0.94, 4: 0.96, 8: 0.97, 16: 0.98, 32: 0.99}
    runs = [
        made_run(by_k, {"first": 0.9, "second": 0.95}),
        made_run(by_k, {"first": 0.97, "second": 0.95}, shuffled=0.5),
    ]
    probe = summarise(runs, ["first", "second"])
    assert probe["feature"] == 3
    assert probe["features_needed"] == 4
    assert probe["best_layer"] == "second"
    assert probe["auroc"]["4 features"] == pytest.approx(0.86)
    assert probe["interval"]["4 features"] == pytest.approx(np.percentile([0.76, 0.96] * 2, (2.5, 97.5)).tolist())
    assert over_splits(runs, "shuffled", "test") == pytest.approx(0.4)  # of the split that has it
    assert interval(runs, "shuffled")[0] > 0.3


def test_where_no_number_of_features_is_enough_the_most_are_reported():
    probe = summarise([made_run(dict.fromkeys((1, 2, 4, 8, 16, 32), 0.7), {"first": 0.9})], ["first"])
    assert probe["features_needed"] is None
    assert probe["features"] == [3, 5]
