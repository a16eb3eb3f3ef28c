"""
Lenses against those of the tuned-lens package (Belrose et al. 2023): uv run --with tuned-lens pytest tests/peers. Its
training loop cannot be imported beside a torchdata without dataloader2 (0.11), so the loss is taken from its lens and its
divergence; the loop's is the same formula, under bfloat16.
"""

import pytest
import torch as t
from models_for_tests import L, hf_and_bridge

pytest.importorskip("tuned_lens", reason="needs the package tuned-lens")
from tuned_lens.nn.lenses import LogitLens, TunedLens
from tuned_lens.stats import kl_divergence

from lens import Lens, Translator, logit_lens, read, train_translators, tuned_lens_loss

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module", params=["GPT2", "Llama"])
def both(request):
    """(the transformers model, which the package reads, and a bridge of the same)"""
    return hf_and_bridge(request.param)


@pytest.fixture(scope="module")
def rows() -> t.Tensor:
    return t.randint(1, 260, (6, 12), generator=t.Generator().manual_seed(0))


def their_logits(lens, hf, rows: t.Tensor) -> tuple[t.Tensor, t.Tensor]:
    """(the model's logits (row, pos, token), its lens's (layer, row, pos, token)), as its training loop calls them."""
    output = hf(rows, output_hidden_states=True)
    by_layer = [lens(h, idx=i) for i, h in enumerate(output.hidden_states[:-1])]
    return output.logits, t.stack(by_layer)


@t.no_grad()
def test_the_logit_lens_is_theirs(both, rows):
    hf, bridge = both
    final, theirs = their_logits(LogitLens.from_model(hf), hf, rows)
    ours = logit_lens(bridge, rows)
    t.testing.assert_close(ours[:-1], theirs, atol=1e-4, rtol=0)
    t.testing.assert_close(ours[-1], final, atol=1e-4, rtol=0)
    assert (theirs[0] - final).abs().max() > 0.1


def test_the_tuned_lens_and_its_loss_are_theirs_before_and_after_training(both, rows):
    hf, bridge = both
    translators = t.nn.ModuleList(Translator(32, 32) for _ in range(L))
    losses = []
    for steps in (0, 30):
        train_translators(bridge, translators, lambda step: rows, steps, lr=1e-2)
        theirs = TunedLens.from_model(hf)
        theirs.layer_translators.load_state_dict(translators.state_dict())
        final, logits = their_logits(theirs, hf, rows)
        kl = kl_divergence(final, logits)  # (layer, row, pos)
        expected = kl.mean((1, 2))
        ours = tuned_lens_loss(bridge, translators, rows)
        t.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        losses.append(ours.detach())

        our_gradients = t.autograd.grad(ours.sum(), list(translators.parameters()))
        their_gradients = t.autograd.grad(expected.sum(), list(theirs.layer_translators.parameters()))
        for found, wanted in zip(our_gradients, their_gradients):
            t.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)

        places = [(row, position) for row in range(6) for position in range(12)]
        reading = read(bridge, Lens(bridge, translators=translators), rows.tolist(), places, [0] * len(places))
        t.testing.assert_close(reading["kl"][:-1], kl.detach().flatten(1), atol=1e-4, rtol=1e-4)
    assert (losses[1] < 0.8 * losses[0]).all()
