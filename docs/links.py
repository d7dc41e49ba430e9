"""A link of a page to a file of the repository, which the site does not hold, becomes the file's
path as text.
"""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)[^)]*\)", _as_text, markdown)


def _as_text(link: re.Match) -> str:
    text, path = link[1].strip("`"), link[2].rstrip("/")
    return f"`{path}`" if text in path else f"{link[1]} (`{path}`)"
