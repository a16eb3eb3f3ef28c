import pytest
import torch as t
from conftest import one_line_error, relative_error, save_folder, tiny_hf

from data import train_bpe
from hooks import hook_points, run_with_cache, run_with_hooks
from mamba import (
    FusedScan,
    Mamba,
    MambaConfig,
    after_earlier_copy,
    as_pattern,
    channel_patterns,
    channel_scores,
    forget_before,
    hf_name,
    hidden_attention,
    loss_of_copies,
    nothing_carried,
    only_own_place,
    selective_scan,
    without_tap,
)
from utils import load_model

SHAPE = dict(vocab_size=260, hidden_size=32, state_size=6, num_hidden_layers=3)
VARIANTS = {
    "MambaForCausalLM": {},
    "Mamba biased, untied": dict(use_bias=True, tie_word_embeddings=False),
    "Mamba of another shape": dict(use_conv_bias=False, expand=3, time_step_rank=5, conv_kernel=3),
}
TOKENS = t.randint(1, 250, (2, 20), generator=t.Generator().manual_seed(0))


def make_hf(variant: str = "MambaForCausalLM"):
    return tiny_hf("Mamba", **SHAPE | VARIANTS[variant])


def tiny_mamba() -> Mamba:
    t.manual_seed(0)
    model = Mamba(MambaConfig(d_model=16, d_inner=32, d_state=5, dt_rank=2, d_vocab=50))
    with t.no_grad():
        for name, p in model.named_parameters():
            if "dt_proj" in name:
                p.add_(0.5 * t.randn(p.shape))  # steps large enough that the state matters
    return model.eval()


ROWS = t.randint(0, 50, (3, 12), generator=t.Generator().manual_seed(0))


def mixer_cache(model: Mamba, rows: t.Tensor, layer: int) -> dict[str, t.Tensor]:
    """A mixer's activations by their short names."""
    with t.no_grad():
        _, cache = run_with_cache(model, rows)
    start = f"blocks.{layer}.mixer.hook_"
    return {name.removeprefix(start): x for name, x in cache.items() if name.startswith(start)}


@pytest.mark.parametrize("variant", VARIANTS)
@t.no_grad()
def test_logits_equal_hugging_face(variant, parity):
    hf = make_hf(variant)
    error = relative_error(Mamba.from_hf(hf)(TOKENS), hf(TOKENS).logits)
    parity(variant, error)
    assert error <= 1e-5


@pytest.mark.parametrize("listening", [False, True])
def test_gradients_equal_hugging_face(listening):
    """Both scans: the one past all hooks, and the one that is taken where nobody listens."""
    hf = make_hf()
    ours = Mamba.from_hf(hf)
    mine = run_with_cache(ours, TOKENS, detach=False)[0] if listening else ours(TOKENS)
    for logits in (hf(TOKENS).logits, mine):
        loss = t.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
    theirs = dict(hf.named_parameters())
    for name, p in ours.named_parameters():
        wanted = theirs[hf_name(name)].grad
        assert relative_error(p.grad, wanted) <= 1e-5, name


@pytest.mark.parametrize("variant", VARIANTS)
@t.no_grad()
def test_both_directions_round_trip(variant, tmp_path):
    from transformers import AutoModelForCausalLM

    hf = make_hf(variant)
    ours = Mamba.from_hf(hf, train_bpe(["a b c"], 260))
    ours.to_hf(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(again) is type(hf)
    saved = again.state_dict()
    wanted = hf.state_dict()
    assert set(saved) == set(wanted)
    assert all(t.equal(saved[name], x) for name, x in wanted.items())
    back = Mamba.from_folder(str(tmp_path / "a"))
    t.testing.assert_close(back(TOKENS), ours(TOKENS), atol=0, rtol=0)
    assert back.cfg == ours.cfg
    folder = str(save_folder(hf, tmp_path / "b"))
    opened = load_model(folder, (Mamba,), device="cpu", dtype="float32")
    assert isinstance(opened, Mamba)
    t.testing.assert_close(opened(TOKENS), ours(TOKENS), atol=0, rtol=0)


@t.no_grad()
def test_bf16_stays_within_the_bf16_error():
    hf = make_hf()
    exact = hf(TOKENS).logits
    ours = Mamba.from_hf(hf).bfloat16()(TOKENS).float()
    theirs = hf.bfloat16()(TOKENS).logits.float()  # last: it turns hf itself into bf16
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


def test_what_is_not_built_is_refused(run, tmp_path):
    with pytest.raises(SystemExit, match="activation 'gelu'"):
        Mamba.read_config(make_hf().config.to_dict() | {"architectures": ["MambaForCausalLM"], "hidden_act": "gelu"})
    with pytest.raises(SystemExit, match="FalconMambaForCausalLM is not built"):
        Mamba.read_config({"architectures": ["FalconMambaForCausalLM"]})
    one_line_error(run("mamba.py", "--d-state", "0", cwd=tmp_path), "--d-state is 0")


def test_the_recurrence_by_hand_for_one_channel():
    """h = exp(delta A) h + delta B x and y = C h, number by number."""
    delta, x, B, C = [0.5, 1.0, 2.0], [1.0, -2.0, 3.0], [0.3, 0.7, -1.0], [1.0, 2.0, 0.5]
    A = -0.4
    h = 0.0
    states, scan = [], []
    for step, read, write_at, read_at in zip(delta, x, B, C):
        h = 2.718281828459045 ** (step * A) * h + step * write_at * read
        states.append(h)
        scan.append(read_at * h)
    delta, x, B, C = (t.tensor(numbers).view(1, 3, 1) for numbers in (delta, x, B, C))
    A = t.tensor([[A]])
    mine = selective_scan((delta * A).exp()[..., None], (delta * B * x)[..., None])
    assert mine.flatten().tolist() == pytest.approx(states, rel=1e-5)
    assert FusedScan.apply(delta, x, A, B, C).flatten().tolist() == pytest.approx(scan, rel=1e-5)


def test_the_gradients_of_the_fused_scan_are_those_of_finite_differences():
    t.manual_seed(0)
    delta = t.rand(2, 4, 3, dtype=t.float64, requires_grad=True)
    x = t.randn(2, 4, 3, dtype=t.float64, requires_grad=True)
    A = (-t.rand(3, 2, dtype=t.float64)).requires_grad_()
    B, C = (t.randn(2, 4, 2, dtype=t.float64, requires_grad=True) for _ in range(2))
    assert t.autograd.gradcheck(FusedScan.apply, (delta, x, A, B, C))


@pytest.mark.parametrize("layer", [0, 1])
@t.no_grad()
def test_the_hidden_attention_times_its_input_is_the_scan(layer):
    model = tiny_mamba()
    seen = mixer_cache(model, ROWS, layer)
    mixer = model.blocks[layer].mixer
    alpha = hidden_attention(seen["delta"], mixer.A, seen["B"], seen["C"])
    assert relative_error(t.einsum("bcqk,bkc->bqc", alpha, seen["x"]), seen["scan"]) < 1e-5
    assert (alpha.triu(1) == 0).all()
    # one entry, as the paper writes it: C_q (product of A_bar over k + 1 .. q) B_bar_k
    row, channel, query, key = 1, 7, 9, 4
    product = seen["A_bar"][row, key + 1 : query + 1, channel].prod(0)  # (d_state)
    B_bar = seen["delta"][row, key, channel] * seen["B"][row, key]
    by_hand = (seen["C"][row, query] * product * B_bar).sum()
    assert alpha[row, channel, query, key].item() == pytest.approx(by_hand.item(), rel=1e-4)

    pattern = t.cat(list(channel_patterns(model, ROWS, layer, together=7)), 1)
    t.testing.assert_close(pattern, as_pattern(alpha))
    t.testing.assert_close(pattern.sum(-1), t.ones(pattern.shape[:-1]))


@t.no_grad()
def test_listening_changes_nothing():
    model = tiny_mamba()
    listened, cache = run_with_cache(model, ROWS)
    t.testing.assert_close(listened, model(ROWS), atol=1e-5, rtol=1e-5)
    assert set(cache) == set(hook_points(model))
    assert cache["blocks.1.mixer.hook_state"].shape == (3, 12, 32, 5)
    assert cache["blocks.1.mixer.hook_taps"].shape == (3, 12, 32, 4)
    assert cache["resid_pre", 1].equal(cache["resid_post", 0])


@t.no_grad()
def test_an_edit_of_a_state_changes_its_own_position_alone_one_of_what_is_written_all_later_ones():
    model = tiny_mamba()
    plain = model(ROWS)

    def empty_at_5(x, hook):
        return x.index_fill(1, t.tensor([5]), 0)

    last = "blocks.1.mixer.hook"  # no layer after it, which would carry the edit on
    changed = {}
    for name in ("state", "write"):
        edited = run_with_hooks(model, ROWS, [(f"{last}_{name}", empty_at_5)])
        changed[name] = ((edited - plain).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist()
    assert changed == {"state": [5], "write": [5, 6, 7, 8, 9, 10, 11]}


def test_an_unknown_hook_raises():
    with pytest.raises(KeyError, match="unknown hook name"):
        run_with_hooks(tiny_mamba(), ROWS, [("blocks.0.mixer.hook_pattern", lambda x, hook: x)])


@t.no_grad()
def test_the_convolution_is_torchs_and_its_taps_are_the_places_before():
    model = tiny_mamba()
    mixer = model.blocks[0].mixer
    seen = mixer_cache(model, ROWS, 0)
    x = seen["in"].transpose(1, 2)  # (batch, d_inner, pos)
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    wanted = t.nn.functional.conv1d(x, weight, bias, padding=3, groups=32)[..., :12]
    t.testing.assert_close(seen["conv"], wanted.transpose(1, 2))
    t.testing.assert_close(seen["taps"][:, 4, :, 1], seen["in"][:, 2] * weight[:, 0, 1])  # tap 1 of 4: two places back
    assert (only_own_place(seen["taps"], None)[..., :3] == 0).all()
    gone = without_tap(seen["taps"], None, back=2)
    assert (gone[..., 1] == 0).all() and gone[..., [0, 2, 3]].equal(seen["taps"][..., [0, 2, 3]])


@t.no_grad()
def test_without_convolution_and_state_a_position_sees_itself_alone():
    """... and with the state forgotten at position 6, no token before it but by the convolution."""
    model = tiny_mamba()
    swapped = ROWS.clone()
    swapped[:, 2] = (swapped[:, 2] + 1) % 50
    alone = [("blocks.*.mixer.hook_taps", only_own_place), ("blocks.*.mixer.hook_A_bar", nothing_carried)]
    difference = (run_with_hooks(model, ROWS, alone) - run_with_hooks(model, swapped, alone)).abs().amax((0, 2))
    assert (difference > 0).nonzero().flatten().tolist() == [2]

    own = ("blocks.*.mixer.hook_taps", only_own_place)
    forget = ("blocks.*.mixer.hook_A_bar", lambda x, hook: forget_before(x, hook, pos=6))
    pair = [run_with_hooks(model, rows, [own, forget]) for rows in (ROWS, swapped)]
    difference = (pair[0] - pair[1]).abs().amax((0, 2))
    assert (difference[2:6] > 0).all() and (difference[6:] == 0).all()


@t.no_grad()
def test_the_middle_of_the_model_can_be_entered_and_left():
    model = tiny_mamba()
    middle = model(ROWS, stop_at_layer=1)
    t.testing.assert_close(model(ROWS, start_at_layer=1, resid=middle), model(ROWS))


def test_places_after_the_earlier_copy():
    tokens = t.tensor([[7, 8, 9, 5, 7, 8]])
    at = {places: after_earlier_copy(tokens, places)[0].nonzero().tolist() for places in (-1, 0, 1, 2)}
    assert at == {-1: [[5, 0]], 0: [[4, 0], [5, 1]], 1: [[4, 1], [5, 2]], 2: [[4, 2], [5, 3]]}


@t.no_grad()
def test_channel_scores_are_the_attention_on_the_targets():
    model = tiny_mamba()
    targets = t.zeros(3, 12, 12, dtype=t.bool)
    targets[:, 8, 3] = True
    scores = channel_scores(model, ROWS, {"there": targets})["there"]
    pattern = t.cat(list(channel_patterns(model, ROWS, 1)), 1)
    t.testing.assert_close(scores[1], pattern[:, :, 8, 3].mean(0))


@t.no_grad()
def test_loss_of_copies_leaves_out_the_token_that_nothing_foretells():
    class Repeats(t.nn.Module):
        """Sure of the token five places before, from the sixth token on; else of none."""

        def forward(self, tokens):
            logits = t.zeros(*tokens.shape, 50)
            for pos in range(4, tokens.shape[1]):
                logits[range(len(tokens)), pos, tokens[:, pos - 4]] = 100.0
            return logits

    once = t.stack([t.randperm(50, generator=t.Generator().manual_seed(i))[:5] for i in range(3)])
    for start in ([], [t.zeros(3, 1, dtype=t.long)]):  # without and with a beginning of text
        rows = t.cat([*start, once, once], 1)
        _, second = loss_of_copies(Repeats(), rows, half=5)
        assert second == pytest.approx(0.0, abs=1e-5)
