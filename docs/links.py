"""Links of the documentation: to files beside it, which lead to the repository, and to names of the package."""

import re
from typing import Any


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """`](../file)` becomes the file's page there."""
    return markdown.replace("](../", f"]({config.repo_url}/blob/main/")


def on_page_content(html: str, **_: Any) -> str:
    """[`Name`] of a docstring becomes a link to what the page says of it, where it does, and loses its brackets."""
    places = re.findall(r'id="(pdiff_hf[.\w]+)"', html)

    def linked(found: re.Match[str]) -> str:
        name = found[1]
        place = next((place for place in places if place.endswith(f".{name}")), None)
        return f"<code>{name}</code>" if place is None else f'<a href="#{place}"><code>{name}</code></a>'

    return re.sub(r"\[<code>~?([.\w]+)</code>\]", linked, html)
