"""HTML and SVG from nested calls. Text is escaped unless it is `Markup`: a label or an error of
somebody else's code cannot become a tag."""

from __future__ import annotations

import html
import unicodedata

# Control and bidirectional characters: they end a parse or a line, or reverse the text.
UNPRINTABLE = {"Cc", "Cf", "Cs"}


class Markup(str):
    """Text that is already escaped."""


def text(value: object) -> Markup:
    """Return `value` as text; control characters become U+FFFD."""
    if isinstance(value, Markup):
        return value
    shown = (
        "\ufffd" if unicodedata.category(one) in UNPRINTABLE and one != "\n" else one
        for one in str(value)
    )
    return Markup(html.escape("".join(shown)))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """Build `<name attributes>children</name>`. An attribute of None or False is left out, of True
    has no value; `class_` is class, `stroke_width` stroke-width."""
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            words.append(key if value is True else f'{key}="{text(value)}"')
    inner = "".join(text(child) for child in children if child is not None)
    return Markup(f"<{' '.join(words)}>{inner}</{name}>")


def join(parts: object) -> Markup:
    return Markup("".join(text(part) for part in parts))
