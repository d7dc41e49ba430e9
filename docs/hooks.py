"""Hooks of the documentation site: links to files of the repository, search from a folder."""

import re
from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn a link to a file that the site does not hold into the file's path as text."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)[^)]*\)", _as_text, markdown)


def _as_text(link: re.Match) -> str:
    text, path = link[1].strip("`"), link[2].rstrip("/")
    return f"`{path}`" if text in path else f"{link[1]} (`{path}`)"


def on_post_page(output: str, **_: Any) -> str:
    """Load search.js before the theme's own script, which starts the search."""
    return output.replace("<script src=", '<script src="search.js"></script><script src=', 1)


def on_post_build(config: Any) -> None:
    """Write the search index as a script too: a page opened from a folder can read no JSON."""
    index = Path(config.site_dir, "search", "search_index.json")
    script = "var __index = " + index.read_text(encoding="utf-8")
    index.with_suffix(".js").write_text(script, encoding="utf-8")
