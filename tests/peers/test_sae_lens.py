"""
judge against SAELens's run_evals, on the same rows and the same autoencoder. Where they differ:
- fvu is 1 - explained_variance, of the total variance about the mean over all tokens; explained_variance_legacy and
  cossim have no counterpart.
- ce_loss_score is ce_recovered_zero_ablation: SAELens removes an activation by zeros. ce_recovered, of mean ablation,
  has no counterpart.
- Where beginning-of-text tokens are excluded, both leave their activations as they are and out of L0, density and
  variance. Of the cross-entropies SAELens also leaves out the predictions made from them, which judge averages over,
  and its ablation sets them to zero too, which judge's does not. What the SAE adds, summed over predictions, is the
  same where such a token stands first alone, as nothing is replaced before it.
"""

import pytest
import torch as t
from models_for_tests import hf_and_bridge

sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler

from features import judge

pytestmark = pytest.mark.peer
HOOK = "blocks.1.hook_resid_post"
BOS = 0


class Rows:
    """What run_evals asks of an activation store: the same rows (row, pos), in batches, as often as it begins anew."""

    def __init__(self, rows: t.Tensor, batch: int):
        self.batches = rows.split(batch)
        self.context_size = rows.shape[1]
        self.store_batch_size_prompts = batch
        self.given = 0

    def get_batch_tokens(self, batch: int) -> t.Tensor:
        assert batch == self.store_batch_size_prompts
        self.given += 1
        return self.batches[(self.given - 1) % len(self.batches)]

    def reset_input_dataset(self) -> None:
        self.given = 0


@pytest.fixture(scope="module")
def bridge():
    return hf_and_bridge("GPT2")[1]


@pytest.fixture(scope="module")
def rows(bridge) -> t.Tensor:
    """Text that this model says, behind a beginning-of-text token, with one more inside some rows."""
    generator = t.Generator().manual_seed(0)
    rows = t.full((24, 1), BOS)
    while rows.shape[1] < 16:
        said = (3 * bridge(rows)[:, -1]).softmax(-1).multinomial(1, generator=generator)
        rows = t.cat([rows, said], 1)
    rows[::5, 9] = BOS
    return rows


@pytest.fixture(scope="module", params=["standard", "topk"])
def sae(request):
    """Rebuilds some of the stream: a feature for each dimension and its negative, pushed off at random."""
    metadata = SAEMetadata(hook_name=HOOK, hook_head_index=None)
    if request.param == "topk":
        made = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=32, d_sae=64, k=24, metadata=metadata))
    else:
        made = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=32, d_sae=64, metadata=metadata))
    noise = 0.03 * t.randn(64, 32, generator=t.Generator().manual_seed(1))
    directions = t.nn.functional.normalize(t.cat([t.eye(32), -t.eye(32)]) + noise, dim=1)
    weights = {"W_dec": directions, "W_enc": directions.T, "b_enc": t.full((64,), -0.3), "b_dec": t.zeros(32)}
    made.load_state_dict(weights)
    return made.requires_grad_(False)


def their_numbers(sae, bridge, rows: t.Tensor, excluded: list[int] | bool) -> tuple[dict[str, float], t.Tensor]:
    """SAELens's numbers by name, and the density of each feature."""
    store = Rows(rows, 8)
    n_batches = len(store.batches)
    config = get_eval_everything_config(
        batch_size_prompts=8, n_eval_reconstruction_batches=n_batches, n_eval_sparsity_variance_batches=n_batches
    )
    by_kind, by_feature = run_evals(sae, store, bridge, ActivationScaler(), config, exclude_special_tokens=excluded)
    numbers = {name: value for kind in by_kind.values() for name, value in kind.items()}
    return numbers, t.tensor(by_feature["feature_density"])


def test_of_all_tokens_every_number_is_theirs(sae, bridge, rows):
    theirs, density = their_numbers(sae, bridge, rows, excluded=False)
    ours, codes = judge(bridge, sae, rows, first=0)
    for name, expected in {
        "l0": theirs["l0"],
        "fvu": 1 - theirs["explained_variance"],
        "ce_clean": theirs["ce_loss_without_sae"],
        "ce_sae": theirs["ce_loss_with_sae"],
        "ce_zero_ablated": theirs["ce_loss_with_ablation"],
        "ce_recovered_zero_ablation": theirs["ce_loss_score"],
    }.items():
        assert ours[name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name
    found = t.tensor(codes.getnnz(0) / rows.numel())
    t.testing.assert_close(found, density, check_dtype=False)
    assert 0.05 < ours["fvu"] < 0.9
    assert ours["ce_sae"] - ours["ce_clean"] > 0.05


def test_without_beginnings_of_text_what_must_be_equal_is(sae, bridge, rows):
    theirs, density = their_numbers(sae, bridge, rows, excluded=[BOS])
    ours, codes = judge(bridge, sae, rows, first=1, bos=BOS)
    assert ours["n_tokens"] == int((rows != BOS).sum())
    assert ours["l0"] == pytest.approx(theirs["l0"], rel=1e-5)
    assert ours["fvu"] == pytest.approx(1 - theirs["explained_variance"], rel=1e-4)
    found = t.tensor(codes.getnnz(0) / ours["n_tokens"])
    t.testing.assert_close(found, density, check_dtype=False)

    once = rows[(rows[:, 1:] != BOS).all(1)]
    assert 0 < len(once) < len(rows)
    theirs, _ = their_numbers(sae, bridge, once, excluded=[BOS])
    ours, _ = judge(bridge, sae, once, first=1, bos=BOS)
    added = (ours["ce_sae"] - ours["ce_clean"]) * once[:, 1:].numel()
    their_predictions = int((once[:, :-1] != BOS).sum())
    assert added == pytest.approx(
        (theirs["ce_loss_with_sae"] - theirs["ce_loss_without_sae"]) * their_predictions, 1e-4
    )
    assert added > 1
