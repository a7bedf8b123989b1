"""The check of the cost model: the file and the page hold what the code computes."""

import json

from benchmarks.common import RESULTS
from benchmarks.cost import check_cost


def test_the_file_holds_the_predictions_of_the_code():
    written = json.loads((RESULTS / "cost_check.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(check_cost.result()))


def test_the_page_holds_the_tables_of_the_code():
    text = check_cost.PAGE.read_text(encoding="utf-8")
    assert check_cost.with_tables(text) == text
    assert check_cost.generated() in text


def test_every_measured_point_is_predicted_or_named():
    sources = {row["source"] for row in check_cost.all_points()}
    named = " ".join(check_cost.NOT_PREDICTED)
    speed = [
        path.name
        for pattern in ("engine_*.json", "capa*.json", "capture.json", "streaming.json", "flash*.json")
        for path in RESULTS.glob(pattern)
    ]
    for name in speed:
        assert name in sources or name in named, name
