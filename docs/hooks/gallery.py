"""Make the pages of the gallery: one for each script, with its picture, its text and both downloads, and their index.

The notebook of a script has no outputs; it is made when the site is built.
"""

from __future__ import annotations

from typing import Any

import jupytext
import nbformat
from gallery_entries import FOLDER, SECTIONS, Entry, cards, entry_names, find_entry
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from script_names import names_used

PLACEHOLDER = "<!-- gallery -->"
INDEX = "gallery.md"


def on_config(config: MkDocsConfig, **_: Any) -> MkDocsConfig:
    """Put the entries into the navigation, behind the index of the gallery."""
    for section in config.nav or []:
        for pages in section.values():
            if isinstance(pages, list) and any(INDEX in page.values() for page in pages if isinstance(page, dict)):
                pages += [{find_entry(name).title: f"gallery/{name}.md"} for name in entry_names()]
    return config


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add a page and a notebook for each entry; its script is a file of the site already."""
    for name in entry_names():
        page = page_of(find_entry(name))
        files.append(File.generated(config, f"gallery/{name}.md", content=page))
        files.append(File.generated(config, f"gallery/{name}.ipynb", content=notebook_of(name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the thumbnails of all entries where the index has a comment for them."""
    if PLACEHOLDER not in markdown:
        return markdown
    lines = []
    for title, names in SECTIONS.items():
        lines += [f"## {title}", "", *cards(names, "")]
    return markdown.replace(PLACEHOLDER, "\n".join(lines))


def page_of(entry: Entry) -> str:
    """Return the Markdown of the page of an entry."""
    lines = [f"# {entry.title}", "", entry.point, ""]
    lines += [f"![{entry.title}](../images/gallery/{entry.name}.svg){{ .gallery-picture }}", ""]
    facts = f"Download: [Script]({entry.name}.py) · [Notebook]({entry.name}.ipynb)"
    if entry.seconds is not None:
        facts += f" · {entry.seconds:.0f} s of one processor core"
        facts += ", the model loaded" if "load_demo_model" in source_of(entry.name) else ""
    lines += [facts, ""]
    for cell in entry.cells:
        lines += [cell.source, ""] if cell.is_text else ["```python", cell.source, "```", ""]
    if entry.output.strip():
        lines += ["## Output", "", "```text", entry.output.rstrip(), "```", ""]

    # The reference of each name that the script uses, named or through an object.
    names = sorted(names_used(FOLDER / f"{entry.name}.py"), key=lambda name: (name[0], name[1].lower()))
    links = [f"[`{package}.{public}`](../api/{package}/{public}.md)" for package, public in names]
    lines += ["## Reference", "", ", ".join(links), "", "[All entries of the gallery](../gallery.md)", ""]
    return "\n".join(lines)


def notebook_of(name: str) -> str:
    """Return a script as a notebook without outputs."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return nbformat.writes(notebook) + "\n"


def source_of(name: str) -> str:
    """Return the text of a script."""
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")
