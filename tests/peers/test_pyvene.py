"""Activation patching against pyvene (Wu et al. 2024), on GPT-2: uv run --with pyvene pytest tests/peers."""

import pytest
import torch as t
from models_for_tests import hf_and_bridge, three_pairs

pv = pytest.importorskip("pyvene", reason="needs the package pyvene")

from pairs import baselines, make_metric
from interventions import activation_patch

pytestmark = pytest.mark.peer
COMPONENTS = {  # pyvene's name: the site here
    "block_input": "resid_pre",
    "block_output": "resid_post",
    "attention_output": "attn_out",
    "mlp_output": "mlp_out",
    "head_attention_value_output": "z",
    "head_query_output": "q",
    "head_key_output": "k",
    "head_value_output": "v",
}


@pytest.fixture(scope="module")
def both():
    return hf_and_bridge("GPT2")


@t.no_grad()
@pytest.mark.parametrize("component", list(COMPONENTS))
def test_an_interchange_of_one_activation_is_activation_patching(both, component):
    """Layer 1, position 3 (where the tokens differ), of heads the third; the clean run's into the corrupt one."""
    hf, bridge = both
    pairs = three_pairs().take(slice(0, 2))  # of one length
    of_head = component.startswith("head")
    layer, position, head = 1, 3, 2
    setting = {
        "layer": layer,
        "component": component,
        "unit": "h.pos" if of_head else "pos",
        "intervention_type": pv.VanillaIntervention,
    }
    interchange = pv.IntervenableModel(setting, model=hf)
    where = position
    if of_head:
        per_example = [[[head]] * len(pairs), [[position]] * len(pairs)]
        where = ([per_example], [per_example])  # in the source, in the base
    source = {"input_ids": pairs.clean}
    _, patched = interchange({"input_ids": pairs.corrupt}, [source], {"sources->base": where})
    logits = patched.logits[pairs.index, pairs.answer_pos]
    expected = make_metric(pairs, "logit_diff")(logits, pairs.index)

    heads = {"head": head} if of_head else {}
    found = activation_patch(bridge, pairs, COMPONENTS[component], layer, position=position, **heads)
    t.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    _, corrupt = baselines(bridge, pairs, "logit_diff")
    assert (found - corrupt).abs().max() > 1e-4
