"""HTML pages from templates/*.html.j2: one file each, without network or other files.

The policy of a page admits its own style sheet and script, by their hashes, and nothing else; all
text is escaped. The same values give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import itertools
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

TEMPLATES = Path(__file__).with_name("templates")


def require(option: str) -> None:
    """Check that pages can be written. Raises: ValueError naming the option and the remedy."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{option}: needs matplotlib: pip install 'peftkern[report]'")


def render(template: str, **values: object) -> str:
    """Render a template; in it, `figure | svg` draws a Figure of `charts`."""
    from peftkern.tools import charts

    def shown(value: object) -> object:
        return "" if value is None else value if isinstance(value, Markup) else charts.clean(value)

    numbers = itertools.count()
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["svg"] = lambda figure: Markup(
        charts.svg(figure, "page", f"chart{next(numbers)}")
    )
    environment.filters["label"] = lambda text: Markup(
        escape(charts.clean(text)).replace("+", Markup("+<wbr>"))
    )
    style = environment.get_template("style.css.j2").render(colors=charts.COLORS)
    script = (TEMPLATES / "sort.js").read_text(encoding="utf-8")
    allowed = (
        f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for kind, text in (("style", style), ("script", script))
    )
    policy = "; ".join(["default-src 'none'", *allowed, "base-uri 'none'", "form-action 'none'"])
    page = {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}
    return environment.get_template(template).render(**page, **values)
