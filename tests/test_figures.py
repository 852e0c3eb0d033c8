"""Figures show names as they stand."""

import io

from matplotlib.figure import Figure

from guided_diffusion.figures import save_png


def test_dollars_in_a_name_are_no_formula():
    figure = Figure(figsize=(3, 2), layout="constrained")
    figure.suptitle("$x_{$")  # not even a valid one
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], label="$a_{$")
    axes.set_xticks([0, 1], ["$b_{$", "c"])
    axes.text(0, 0, "$d_{$")
    axes.legend()
    file = io.BytesIO()
    save_png(figure, file)
    assert file.getvalue().startswith(b"\x89PNG")
