"""Figures: scales, labels, and pages that no text can break."""

import json
import os
import re

import torch as t

from plots import (
    COLORS,
    WIDTH_OF_TITLE,
    attention_page,
    bar,
    feature_page,
    imshow,
    label_tokens,
    text_of_tokens,
    with_characters,
    line,
    show,
    signed_log,
    words_and_settings,
)


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
        assert "{{" not in page


def test_half_written_plotly_is_written_anew(tmp_path, monkeypatch):
    from plotly.offline import get_plotlyjs

    monkeypatch.chdir(tmp_path)
    fig = imshow(t.ones(1, 1), "t", "x", "y")
    show(fig, "story/a")
    script = tmp_path / "figs/story/plotly.min.js"
    for broken in (script.read_bytes()[:1000], b"v0" + script.read_bytes()[2:]):
        script.write_bytes(broken)
        show(fig, "story/a")
        assert script.read_bytes() == get_plotlyjs().encode()


def test_figures_of_an_earlier_run_do_not_stand_beside_this_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "figs/story"
    folder.mkdir(parents=True)
    (folder / "old.html").write_text("old")
    os.utime(folder / "old.html", (1, 1))
    for name in ("a", "b"):
        show(imshow(t.ones(1, 1), "t", "x", "y"), f"story/{name}")
    assert sorted(file.name for file in folder.glob("*.html")) == ["a.html", "b.html"]
    assert (folder / "earlier/old.html").read_text() == "old"


def test_equal_labels_are_cells_of_their_own_and_tokens_no_markup():
    fig = imshow(t.ones(3, 3), "t", "x", "y", x=["\ufffd", "\ufffd", "<s>"], y=["$x$", "a", "<br>"])
    assert list(fig.data[0].x) == ["\ufffd (1)", "\ufffd (2)", "&lt;s&gt;"]
    assert list(fig.data[0].y) == ["&#36;x&#36;", "a", "&lt;br&gt;"]
    bars = bar({"<b>": [1.0, 2.0]}, "t", "x", "y", x=["a", "a"])
    assert bars.data[0].name == "&lt;b&gt;" and len(set(bars.data[0].x)) == 2
    assert line({"<i>": [1.0]}, "t", "x", "y").data[0].name == "&lt;i&gt;"


def test_a_title_can_hold_the_name_of_a_place_and_a_long_text_is_cut(capsys):
    page = attention_page(["a"] * 300, t.ones(1, 300, 300).tril() / 300, ["L0H0"], "/mnt/{{DATA}}/{{TITLE}}")
    assert page.count("/mnt/{{DATA}}/{{TITLE}} (the first 256 of 300 tokens)") == 2
    assert page.count("const page = {") == 1
    assert len(json.loads(re.search("const page = (.*);", page)[1])["prompts"][0]["tokens"]) == 256
    assert "the first 256" in capsys.readouterr().out


def test_a_title_longer_than_the_figure_is_wide_goes_on_in_another_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    title = "Ablation: share of the metric lost, " * 6
    fig = line({"a": [1, 2]}, title, xlabel="x", ylabel="y")
    show(fig, "story/long")
    lines = fig.layout.title.text.split("<br>")
    assert len(lines) == 3
    assert max(map(len, lines)) <= WIDTH_OF_TITLE
    assert " ".join(lines) == title.strip()
    short = line({"a": [1, 2]}, "Short", xlabel="x", ylabel="y")
    show(short, "story/short")
    assert short.layout.title.text == "Short"


def test_settings_at_the_end_of_a_title_stand_beneath_it(tmp_path, monkeypatch):
    assert words_and_settings("Heads (all) that move names (n = 3 (of 5), ioi)") == (
        "Heads (all) that move names",
        "n = 3 (of 5), ioi",
    )
    assert words_and_settings("No settings") == ("No settings", "")
    assert words_and_settings("odd) (x))") == ("odd) (x))", "")
    monkeypatch.chdir(tmp_path)
    fig = line({"a": [1, 2]}, "Loss falls (seed 0)", xlabel="x", ylabel="y")
    show(fig, "story/loss")
    assert (fig.layout.title.text, fig.layout.title.subtitle.text) == ("Loss falls", "seed 0")


def test_a_menu_shows_one_picture_at_a_time():
    z = t.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)  # choice, panel, row, column
    fig = imshow(z, "t", "x", "y", panels=["a", "b", "c"], menu=["first", "second"])
    assert [heatmap.visible for heatmap in fig.data] == [True] * 3 + [False] * 3
    first, second = fig.layout.updatemenus[0].buttons
    assert (first.label, second.label) == ("first", "second")
    assert second.args[0]["visible"] == [False] * 3 + [True] * 3
    assert fig.data[4].xaxis == fig.data[1].xaxis != fig.data[0].xaxis
    assert (fig.data[4].z == z[1, 1].numpy()).all()
    single = imshow(z[:, 0], "t", "x", "y", menu=["first", "second"])
    assert [heatmap.visible for heatmap in single.data] == [True, False]


def test_a_signed_logarithm_keeps_signs_and_order():
    values = t.tensor([-1.0, -0.01, 0.0, 1e-4, 0.01, 1.0])
    placed = signed_log(values)
    assert placed == sorted(placed) and placed[2] == 0 and placed[0] == -placed[-1]
    assert abs(placed[-1] - placed[-2] - 2) < 0.05, "a step for each power of ten"


def test_a_scale_says_what_its_values_mean():
    colorbar = imshow(t.tensor([[0.2, 1.3]]), "t", "x", "y", meaning={0: "corrupt", 1: "clean", 2: "never"})
    marks = dict(zip(colorbar.layout.coloraxis.colorbar.tickvals, colorbar.layout.coloraxis.colorbar.ticktext))
    assert marks[0] == "0 corrupt" and marks[1] == "1 clean" and 2 not in marks
    assert min(marks) == -max(marks) == float(t.tensor(-1.3))


def test_a_map_of_too_many_cells_is_cut_and_says_so(capsys):
    z = t.randn(20, 300, 300)
    labels = label_tokens(["a"] * 300)
    fig = imshow(z, "Attention", "key", "query", labels, labels, [f"H{i}" for i in range(20)])
    assert "the first 256 x 256 of 300 x 300" in fig.layout.title.text
    assert "too large to draw" in capsys.readouterr().out
    for i, heatmap in enumerate(fig.data):
        assert heatmap.z.shape == (256, 256) and len(heatmap.x) == len(heatmap.y) == 256
        assert (t.tensor(heatmap.z) == z[i, :256, :256]).all()
    small = imshow(z[:2], "Attention", "key", "query", labels, labels, ["<s>", "b"])
    assert small.data[0].z.shape == (300, 300) and small.layout.title.text == "Attention"
    assert small.layout.annotations[0].text == "&lt;s&gt;"


def test_parts_of_a_character_are_labelled_by_the_character():
    tokens = ["a", "<0xE5><0x9B>", "<0xBD>", " b", "<0xE5>", "<0x9B><0xBD><0xE4>", "<0xBA><0xBA>", "c", "<0xE5>"]
    named = ["a", "国…", "…国", " b", "国…", "…国人…", "…人", "c", "<0xE5>"]
    assert with_characters(tokens) == named
    assert label_tokens(tokens)[1:3] == ["国…_1", "…国_2"]
    assert with_characters(["<0xE4><0xB8><0xAD>"]) == ["中"]
    assert text_of_tokens(tokens[:8]) == "a国 b国人c"


def test_words_of_a_scale_do_not_overlap():
    words = {0: "nothing changes", 1: "all of it"}
    marks = imshow(t.tensor([[0.0, 1.0]]), "t", "x", "y", meaning=words).layout.coloraxis.colorbar
    assert list(marks.ticktext)[:2] == ["0 nothing changes", "1 all of it"]
    marks = imshow(t.tensor([[0.0, 60.0]]), "t", "x", "y", meaning=words).layout.coloraxis.colorbar
    assert list(marks.ticktext) == ["0 nothing changes", "-60", "60"]
