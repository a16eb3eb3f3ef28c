"""Interchanges in a subspace against pyvene (Wu et al. 2024), on GPT-2: uv run --with pyvene pytest tests/peers."""

import pytest
import torch as t
from models_for_tests import hf_and_bridge, three_pairs

pv = pytest.importorskip("pyvene", reason="needs the package pyvene")

from alignment import interchange, random_subspace

pytestmark = pytest.mark.peer
COMPONENTS = {"block_input": "resid_pre", "block_output": "resid_post"}  # pyvene's name: the site here


@t.no_grad()
@pytest.mark.parametrize("component", list(COMPONENTS))
def test_an_interchange_in_a_subspace_is_a_low_rank_rotated_space_intervention(component):
    """Of rank 4, from another position of the source in each row."""
    hf, bridge = hf_and_bridge("GPT2")
    pairs = three_pairs().take(slice(0, 2))
    base_pos, source_pos = t.tensor([3, 4]), t.tensor([3, 5])
    setting = {
        "layer": 1,
        "component": component,
        "unit": "pos",
        "low_rank_dimension": 4,
        "intervention_type": pv.LowRankRotatedSpaceIntervention,
    }
    theirs = pv.IntervenableModel(setting, model=hf)
    [intervention] = theirs.interventions.values()
    subspace = random_subspace(32, 4, t.Generator().manual_seed(0))
    intervention.rotate_layer.weight = subspace
    t.testing.assert_close(intervention.rotate_layer.weight, subspace, atol=1e-5, rtol=0)
    where = [[[int(p)] for p in source_pos]], [[[int(p)] for p in base_pos]]
    _, out = theirs({"input_ids": pairs.clean}, [{"input_ids": pairs.corrupt}], {"sources->base": where})
    hook_name = f"blocks.1.hook_{COMPONENTS[component]}"
    found = interchange(bridge, pairs.clean, pairs.corrupt, hook_name, base_pos, source_pos, subspace)
    t.testing.assert_close(found, out.logits, atol=1e-4, rtol=0)
    assert (found - bridge(pairs.clean)).abs().max() > 1e-3
