"""sae_probe.py: its settings, and what it answers to a typo. What its cells compute stands in probes.py and sae.py."""

from conftest import one_line_error

from sae_probe import Config
from sae import SAEConfig, variant


def test_a_misspelt_release_is_answered_with_its_neighbours(run):
    one_line_error(run("sae_probe.py", "--release", "gpt2-smal-res-jb"), "gpt2-smal-res-jb", "gpt2-small-res-jb")


def test_variants_keep_the_stories_own_settings():
    cfg = variant("topk:8:256", Config(sentences=7))
    assert isinstance(cfg, Config)
    assert isinstance(cfg, SAEConfig)
    assert (cfg.sentences, cfg.architecture, cfg.sparsity, cfg.d_sae) == (7, "topk", 8.0, 256)
