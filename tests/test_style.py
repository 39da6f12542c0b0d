"""A figure says which of its curves another covers, and what each is."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from research.analysis.style import columns, covered, name_of, with_shape


def test_curves_that_the_last_one_covers_are_named_and_no_others():
    top = [2.0, 4.0, 8.0]
    curves = dict(far=[2.0, 4.0, 8.5], near=[2.09, 4.0, 7.7], fewer=[2.0, 4.0], same=list(top), top=top)
    assert covered(curves) == ";  under top, within 5 %: near, same"
    assert covered(dict(top=top)) == ""


def test_a_strategy_that_is_called_by_its_shape_is_named_once():
    assert with_shape("16x128", "16 x 128") == "16×128"
    assert with_shape("balanced", "16 x 512") == "balanced  16×512"
    assert name_of({"strategy": "16x128", "batch_size": 16, "seq_len": 128}) == "16×128"
    assert name_of({"strategy": "16x128", "batch_size": 32, "seq_len": 128}) == "16x128  32×128"  # not its shape


def test_a_legend_is_as_wide_as_its_figure_at_most():
    names = ["a", "attention chunked, remat block", "accumulation 4, float32, mesh 8 x 1"]
    for labels in ([name] * count for name in names for count in (1, 4, 6)):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        handles = [axes.plot([0, 1], label=label)[0] for label in labels]
        legend = figure.legend(
            handles, labels, loc="outside upper center", ncols=columns(figure, labels), handlelength=3.4
        )
        figure.draw_without_rendering()
        assert legend.get_window_extent().width <= figure.bbox.width, labels
    assert columns(figure, ["none", "block", "full"]) == 3
