"""A figure says which of its curves another covers."""

from research.analysis.style import covered


def test_curves_that_the_last_one_covers_are_named_and_no_others():
    top = [2.0, 4.0, 8.0]
    curves = dict(far=[2.0, 4.0, 8.5], near=[2.09, 4.0, 7.7], fewer=[2.0, 4.0], same=list(top), top=top)
    assert covered(curves) == ";  under top, within 5 %: near, same"
    assert covered(dict(top=top)) == ""
