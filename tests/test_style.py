"""A figure says which of its curves another covers, and what each is."""

from research.analysis.style import covered, name_of, with_shape


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
