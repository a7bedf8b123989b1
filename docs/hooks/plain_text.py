"""Write every page as plain Markdown beside its HTML, and ``llms.txt``, an index of them for language models.

The format is that of https://llmstxt.org: a title, a summary, and lists of links with one line each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from api_names import docstring_of
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

_MARKDOWN: dict[str, tuple[str, str]] = {}
"""Title and Markdown of each page, by its path in the sources."""

_DIRECTIVE = re.compile(r"^::: ([\w.]+)\n(?:    .*\n?)*", re.MULTILINE)


def on_pre_build(**_: Any) -> None:
    """Start with no pages; a server builds the site many times."""
    _MARKDOWN.clear()


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Keep the Markdown of a page; where it shows an object, its docstring takes the place of the directive."""
    plain = _DIRECTIVE.sub(lambda found: f"# {page.title}\n\n{docstring_of(found[1])}\n", markdown)
    _MARKDOWN[page.file.src_uri] = (str(page.title), plain)
    return markdown


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Write the Markdown of all pages and their index."""
    site = Path(config["site_dir"])
    for uri, (_title, text) in _MARKDOWN.items():
        target = site / uri
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    # Pages in the order of the navigation, then the reference.
    navigation = _paths_of(config.nav or [])
    guide = [path for path in navigation if path in _MARKDOWN]
    reference = [uri for uri in _MARKDOWN if uri.startswith("api/")]
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Guide", ""]
    lines += [f"- [{_MARKDOWN[path][0]}]({path})" for path in guide]
    lines += ["", "## Reference", ""]
    lines += [f"- [{_MARKDOWN[uri][0]}]({uri})" for uri in sorted(reference)]
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _paths_of(navigation: Any) -> list[str]:
    """List the pages of a navigation in order, whatever its depth."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [path for part in parts for path in _paths_of(part)]
