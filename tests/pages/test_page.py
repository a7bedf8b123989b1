"""The engine of all pages: what a template gets, what is refused, and how its sources are written."""

from pathlib import Path

import pytest

import flowgraph
import rl
from flowgraph import InvalidInputError, render_page
from flowgraph.pages.page import join_scripts
from tests.fixtures.browser import assert_policy_names_the_inline_code

TEMPLATE = """{% extends "page.html.jinja" %}
{% block title %}{{ name | visible }}{% endblock %}
{% block body %}<h1>{{ name }}</h1>{{ theme_button }}{% endblock %}
"""


def test_a_template_gets_its_values_escaped_and_the_shared_parts():
    page = render_page(TEMPLATE, styles=["p { margin: 0 }\r\n"], scripts=["make('p');\r\n"], name="<b>\u202e")
    assert "<title>&lt;b&gt;⟨U+202E⟩</title>" in page
    assert "<h1>&lt;b&gt;" in page
    assert 'id="theme"' in page
    assert "\r" not in page
    assert page.index("--flow:") < page.index("color-scheme: light dark") < page.index("p { margin: 0 }")
    assert page.index("function visible(") < page.index("function make(") < page.index("make('p');")
    assert "application/json" not in page.split("<script>")[0]
    assert_policy_names_the_inline_code(page)


def test_libraries_run_in_the_global_scope_before_the_script():
    script = join_scripts(["own();"], ["library();"])
    assert script.index("library();") < script.index('"use strict"') < script.index("own();")
    assert script.rstrip().endswith("})();")


def test_data_with_a_number_that_is_not_finite_is_refused():
    with pytest.raises(
        InvalidInputError, match=r"page_data: must hold JSON values with finite numbers, got .*; use None"
    ):
        render_page(TEMPLATE, data_id="data", page_data=[float("nan")], name="")


def test_lines_of_page_sources_are_short():
    packages = [Path(str(package.__file__)).parent for package in (flowgraph, rl)]
    sources = [
        path for package in packages for ending in ("css", "js", "jinja") for path in package.rglob(f"*.{ending}")
    ]
    long = [
        f"{path.name}:{number}"
        for path in sources
        if not path.name.endswith(".min.js")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120
    ]
    assert long == []
