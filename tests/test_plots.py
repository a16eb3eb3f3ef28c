"""Figures: scales, labels, and pages that no text can break."""

import re

import torch as t

from plots import COLORS, attention_page, bar, feature_page, imshow, label_tokens, line


def test_imshow_is_diverging_around_zero():
    fig = imshow(t.tensor([[-3.0, 1.0]]), "t", "x", "y")
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (-3, 3)


def test_labels_keep_repeats_apart():
    assert label_tokens([" the", " the", "\n"]) == ["·the_0", "·the_1", "⏎_2"]


def test_values_that_are_not_finite_do_not_stretch_the_scale():
    fig = imshow(t.tensor([[float("inf"), 2.0], [float("nan"), 1.0]]), "t", "x", "y", diverging=False)
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 2)


def test_a_map_without_a_finite_value_is_drawn():
    fig = imshow(t.full((2, 2), float("nan")), "t", "x", "y")
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (-1, 1)


def test_panels_share_a_scale_or_have_their_own():
    z = t.tensor([[[1.0]], [[5.0]]])
    one = imshow(z, "t", "x", "y", panels=["a", "b"])
    own = imshow(z, "t", "x", "y", panels=["a", "b"], one_scale=False)
    assert {heatmap.coloraxis for heatmap in one.data} == {"coloraxis"} and one.layout.coloraxis.cmax == 5
    assert [heatmap.coloraxis for heatmap in own.data] == ["coloraxis", "coloraxis2"]
    assert (own.layout.coloraxis.cmax, own.layout.coloraxis2.cmax) == (1, 5)


def test_lines_beyond_the_colours_are_dotted_and_references_dashed():
    names = [f"line {i}" for i in range(len(COLORS) + 1)]
    fig = line({name: [1.0, 2.0] for name in names}, "t", "x", "y", dashed=["line 0"])
    assert [trace.line.dash for trace in fig.data] == ["dash", *["solid"] * (len(COLORS) - 1), "dot"]


def test_bars_show_their_intervals():
    fig = bar(
        {"a": [1.0, 2.0], "b": t.tensor([3.0, 4.0])},
        "t",
        "x",
        "y",
        x=["p", "q"],
        errors={"a": ([0.1, 0.2], [0.3, 0.4])},
    )
    with_error, without = fig.data
    assert list(with_error.error_y.array) == [0.1, 0.2] and list(with_error.error_y.arrayminus) == [0.3, 0.4]
    assert without.error_y.array is None and list(without.y) == [3, 4]


def test_no_token_ends_a_pages_script():
    evil = "</script><script>alert(1)</script>"
    attention = attention_page(["<s>", evil], t.ones(1, 2, 2).tril() / 2, ["L0H0"], evil)
    entry = {
        "id": 0,
        "density": 0.1,
        "max": 1,
        "histogram": [],
        "concepts": [evil],
        "up": [],
        "down": [],
        "contexts": [],
        "with": [],
        "near": [],
    }
    for page in (attention, feature_page([entry], evil)):
        assert page.count("</script>") == 1
        assert "TITLE" not in page and not re.search(r"= DATA", page)
