"""How a figure of matplotlib becomes a picture. Knows nothing of what it shows."""

from pathlib import Path
from typing import IO, Any


def save_png(figure: Any, file: Path | IO[bytes]) -> None:
    """
    Write a figure as a PNG, all its texts as they stand: two dollars in a name are no formula.

    :param figure: a matplotlib.figure.Figure.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    figure.savefig(file, format="png", dpi=110)
