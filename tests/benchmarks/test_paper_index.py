"""The figures of the paper index are those of the committed results, and every rule has a row."""

import json

import pytest

from benchmarks import paper_index
from rl import rule_names
from rl.credit.registry import find_rule

TEXT = paper_index.PAGE.read_text(encoding="utf-8")
ROWS = paper_index.rows_of(TEXT)


def test_the_page_holds_the_figures_of_the_results():
    assert paper_index.page(TEXT) == TEXT, "python -m benchmarks.paper_index"


def test_every_source_belongs_to_a_row():
    methods = [row[0] for row in ROWS]
    assert len(methods) == len(set(methods))
    assert set(paper_index.SOURCES) <= set(methods)
    assert all(len(row) == 4 and row[3] for row in ROWS)


def test_the_controls_of_the_legend_are_the_best_ones():
    tasks = {task["task"]: task["best_control"] for task in paper_index.results("faithfulness")["tasks"]}
    assert tasks["line_knockout"] == "recency"
    assert tasks["detour"] == "length"
    assert f"the last lines, has {paper_index.evaluated('line_knockout', 'recency')};" in TEXT
    assert f"the longest tokens, has {paper_index.evaluated('detour', 'length')} (" in TEXT


def test_every_rule_of_a_paper_has_a_line():
    # Controls, products of two rules, and rules that need more than a model's attention have no paper.
    without = {
        "uniform", "random", "oracle", "gradient", "reach", "flow_entropy", "reach_entropy", "relevance",
        "lora_influence", "shuffled_flow", "shuffled_flow_sharp", "wrong_sink", "position_matched", "reach_sharp",
    }  # fmt: skip
    lines = " ".join(row[2] for row in ROWS)
    # Other tests register rules of their own.
    shipped = [name for name in rule_names() if find_rule(name).function.__module__.startswith("rl.")]
    assert [name for name in shipped if name not in without and f'rule="{name}"' not in lines] == []


def test_a_figure_that_is_not_there_is_an_error():
    with pytest.raises(KeyError, match=r"method: must be in faithfulness.json, got 'other' on 'detour'"):
        paper_index.evaluated("detour", "other")
    with pytest.raises(KeyError, match=r"arm: must be compared with uniform in rl_study.json, got 'other'"):
        paper_index.trained("rl_study", "other")
    with pytest.raises(KeyError, match=r"rule: must be in the table of docs/credit.md, got 'other'"):
        paper_index.auc("other")
    with pytest.raises(KeyError, match="arm: must be in alignment_start, got 'other'"):
        paper_index.multiplier("other")


def test_numbers_are_those_of_the_file():
    rows = json.loads((paper_index.RESULTS / "faithfulness.json").read_text(encoding="utf-8"))["rows"]
    values = {
        row["method"]: row["value"]
        for row in rows
        if row["task"] == "detour" and row["primary"] and row["items"] == "all"
    }
    assert f"detour {values['relevance']:.2f}".replace(" 0.", " .") in paper_index.measured("conserved relevance")
