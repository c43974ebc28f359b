"""Links of the documentation to files beside it lead to the repository."""

from typing import Any


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """`](../file)` becomes the file's page there."""
    return markdown.replace("](../", f"]({config.repo_url}/blob/main/")
