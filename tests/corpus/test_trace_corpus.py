"""Tracing a file of prompts: equal to single traces, nothing lost or doubled after a kill, bad lines reported."""

import csv
import json
import multiprocessing
import random
import resource
import signal
import warnings
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from flowgraph import (
    CorpusFields,
    CorpusProgress,
    CorpusSummary,
    InvalidInputError,
    MemoryLimitError,
    MissingExtraError,
    OutputError,
    load_relevance,
    load_trace,
    trace,
    trace_corpus,
    trace_file,
)
from flowgraph.corpus.requests import Line, scan
from flowgraph.corpus.run import Prepared, batches
from tests.fixtures.kills import kill_at_change
from tests.fixtures.tiny import PROMPT, RESPONSE, tiny, tiny_model

TABLES = ("tokens.parquet", "traces.parquet")
LINES = [
    {"id": "first", "prompt": PROMPT, "response": RESPONSE},
    {"id": "messages", "messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]},
    {"id": "short", "prompt": "3 + 4?", "response": "7", "answer": 7},
    {"prompt": "Tom has 3 apples. How many?", "response": "Tom has 3, so the answer is 3."},
    {
        "id": "literal",
        "prompt": "Tom (a+b). Who?",
        "question": "(a+b)",
        "response": "(a+b) or 17 or 7. (75)",
        "answer": "7",
    },
    {"id": "../../etc/passwd", "prompt": "He buys 4 more.", "response": "So 4 it is.", "answer": "4"},
    {"id": "many parts", "prompt": "Say it.", "response": "So it is\n 7 ש 7."},
    {"id": "long", "prompt": PROMPT * 3, "response": RESPONSE * 3},
]


def write(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def run(folder: Path, lines: list | None = None, **options) -> CorpusSummary:
    path = write(folder / "in.jsonl", LINES if lines is None else lines)
    return trace_corpus(*tiny(), path, folder / "out", **{"batch_tokens": 2048, **options})


def files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {".lock"}


def table(path: Path) -> list[dict]:
    return pyarrow.parquet.read_table(path).to_pylist()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> CorpusSummary:
    return run(tmp_path_factory.mktemp("corpus"), html=True)


def test_every_batched_trace_equals_the_trace_made_alone(finished: CorpusSummary):
    assert finished.errors == ()
    rows = {row["line"]: row for row in table(finished.out / "traces.parquet")}
    assert [rows[n]["id"] for n in sorted(rows)] == [line.get("id", f"line-{n}") for n, line in enumerate(LINES, 1)]
    timing = table(finished.out / "timing.parquet")
    assert max(row["batch"] for row in timing) == len(LINES)  # all in one forward pass, so padded
    for number, line in enumerate(LINES, 1):
        if "answer" in line or "question" in line:
            continue
        messages = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
        alone = trace(*tiny(), messages, line.get("response"))
        together = load_trace(finished.out / rows[number]["file"])
        assert torch.equal(together.token_ids, alone.token_ids)
        assert torch.equal(together.graph.edge_index, alone.graph.edge_index)
        for mask in ("question", "reasoning", "answer", "generated"):
            assert torch.equal(getattr(together, mask), getattr(alone, mask))
        torch.testing.assert_close(together.graph.capacity, alone.graph.capacity, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together.throughput, alone.throughput, rtol=1e-4, atol=1e-6)
        assert together.provenance == {**alone.provenance, "line": number, "id": rows[number]["id"]}


def test_the_tables_say_what_the_traces_hold(finished: CorpusSummary):
    rows, tokens = (table(finished.out / name) for name in ("traces.parquet", "tokens.parquet"))
    assert sum(row["tokens"] for row in rows) == len(tokens) == finished.tokens
    for row in rows:
        held = load_trace(finished.out / row["file"])
        mine = [token for token in tokens if token["line"] == row["line"]]
        assert [token["index"] for token in mine] == list(range(held.num_tokens))
        assert [token["text"] for token in mine] == list(held.tokens)
        assert [token["throughput"] for token in mine] == held.throughput.tolist()
        assert [token["h"] for token in mine] == held.potential.tolist()
        assert [token["region"] for token in mine].count("answer") == row["answer"] == int(held.answer.sum())
        assert row["mean_hops"] == float(held.throughput.sum()) - 1
        bone = held.backbone(0.9)
        assert row["alpha"] == float(held.flow.alpha)
        assert (row["edges"], row["kept_flow"]) == (held.graph.num_edges, float(held.graph.kept_flow))
        assert (row["backbone_edges"], row["backbone_share"]) == (bone.num_edges, bone.share)
        assert row["error"] is None
        assert row["answer_by"] == held.provenance["answer_by"]
    by_id = {row["id"]: row for row in rows}
    assert by_id["literal"]["answer_text"] in ("7", "7.")  # a token may hold the full stop too
    assert by_id["many parts"]["answer_text"] == "7 ש 7."
    literal = load_trace(finished.out / by_id["literal"]["file"])
    asked = [literal.tokens[token] for token in literal.question.nonzero().flatten().tolist()]
    assert "".join(asked).strip() in ("(a+b)", "(a+b).")
    assert literal.answer.nonzero().flatten().min() > literal.text.index("17") // 8  # the whole word, not the end of 17
    assert literal.provenance["answer_selector"] == "Literal(text='7')"


def test_file_names_stay_inside_the_folder(finished: CorpusSummary):
    names = sorted(path.name for path in (finished.out / "traces").glob("*.safetensors"))
    assert names[5] == "000006-etc-passwd.safetensors"
    assert names[3] == "000004.safetensors"
    for nasty in ("..", "/", "a/../b", "C:\\x", "x" * 500, "\u202e", "con", ".", "-", "a\x00b"):
        name = Line(7, 0, 0, "", nasty).name
        assert name.startswith("000007")
        assert len(name) < 60
        assert not set(name) & set('/\\:.\x00"<>|?*')


def test_running_again_does_nothing_and_changes_nothing(finished: CorpusSummary):
    before = {name: (finished.out / name).read_bytes() for name in files(finished.out)}
    again = trace_corpus(*tiny(), finished.out.parent / "in.jsonl", finished.out, html=True, batch_tokens=1)
    assert (again.now, again.traced, again.errors) == (0, len(LINES), ())
    assert {name: (finished.out / name).read_bytes() for name in files(finished.out)} == before


def test_pages_can_be_asked_for_later(finished: CorpusSummary, tmp_path: Path):
    run(tmp_path, LINES[:2])
    assert not list((tmp_path / "out" / "traces").glob("*.html"))
    assert run(tmp_path, LINES[:2], html=True).now == 0
    pages = sorted(path.name for path in (tmp_path / "out" / "traces").glob("*.html"))
    assert pages == ["000001-first.html", "000002-messages.html"]
    assert 'href="traces/000001-first.html"' in (tmp_path / "out" / "index.html").read_text()


BAD = [
    ('{"prompt": "cut', "line: must be one JSON object, got invalid JSON"),
    ("[1, 2]", "line: must be a JSON object, got [1, 2]"),
    ('{"prompt": "x", "response": "\\ud800"}', "line: must be text that UTF-8 can hold"),
    ("[" * 100_000, "too deeply nested"),
    ({"response": "x"}, "'prompt' or 'messages': must be given, one of them, got the keys ['response']"),
    ({"prompt": "x", "messages": [{"role": "user"}]}, "one of them, got both"),
    ({"prompt": 7}, "prompt: must be text or chat messages, got 7"),
    ({"prompt": ["x"]}, "prompt: must be text or chat messages, got ['x']"),
    ({"messages": "x"}, "messages: must be chat messages, got 'x'"),
    ({"messages": [{"role": 7, "content": "x"}]}, "prompt: must be text or a list of chat messages"),
    ({"prompt": "x", "response": {"a": 1}}, "response: must be text or a list of token ids"),
    ({"prompt": "x y", "response": [10**6, 60, 61, 62]}, "response: ids must lie in 0..359"),
    ({"prompt": "x y", "response": [10**30]}, "response: ids must lie in 0..359"),
    ({"messages": [{"role": "assistant"}]}, "prompt: must hold text in the 'content' of a message"),
    ({"prompt": "x", "response": ""}, "response: must hold visible text, got ''"),
    ({"prompt": " ", "response": "x"}, "prompt: must hold text, got only blanks"),
    ({"id": True, "prompt": "x"}, "id: must be a text or an integer, got True"),
    ({"id": "good", "prompt": "x", "response": "y"}, "id: must be unique, got 'good' as on line 1"),
    ({"prompt": "x", "response": "y", "answer": "zz"}, "answer: Literal(text='zz') must select"),
    ({"prompt": "x", "response": "17", "answer": 7}, "': it stands there as a part of '17' alone; give the complete"),
    ({"prompt": "x", "response": "$1,007", "answer": 7}, "it stands there as a part of '$1,007' alone"),
    ({"prompt": "x", "response": "<think>7</think> 8", "answer": 7}, "it stands in the thinking alone"),
    ({"prompt": "x", "response": "<think>7", "answer": 7}, "it stands in the thinking alone"),
    ({"prompt": "x", "response": "<think>7"}, "got a response with a thinking block that is not closed"),
    ({"prompt": "x", "response": "y", "answer": ["y", []]}, "answer: must be text or a number that is part"),
    ({"prompt": "x", "response": "y", "answer": []}, "answer: must be text or a number"),
    ({"prompt": "x", "response": "word " * 600}, "input_ids: must fit the model's context of 512 tokens"),
    ({"prompt": "word " * 600}, "prompt: must leave space in the context of 512 tokens"),
]


def test_bad_lines_are_reported_and_skipped(tmp_path: Path):
    good = {"id": "good", "prompt": PROMPT, "response": RESPONSE}
    lines = [good, *(line for line, _ in BAD), "", {**good, "id": "last"}]
    path = write(tmp_path / "in.jsonl", lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'{"prompt": "\xff\xfe"}\n')
    seen: list[CorpusProgress] = []
    summary = trace_corpus(*tiny(), path, tmp_path / "out", progress=seen.append)
    assert summary.traced == 2
    messages = dict(summary.errors)
    for number, (_, message) in enumerate(BAD, 2):
        assert message in messages[number], number
    last = len(lines) + 1
    assert "line: must be UTF-8, got the byte 0xff at position 12" in messages[last]
    assert sorted(messages) == [*range(2, len(BAD) + 2), last]  # the blank line is none
    written = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert {error["line"]: error["error"] for error in written} == messages
    rows = table(tmp_path / "out" / "traces.parquet")
    assert {row["line"] for row in rows if row["error"]} == set(messages)
    assert [row["tokens"] is None for row in rows] == [bool(row["error"]) for row in rows]
    assert any(f"line {last} skipped: line: must be UTF-8" in at.stage for at in seen)
    assert (seen[-1].done, seen[-1].failed, seen[-1].total) == (2, len(messages), len(messages) + 2)


def test_missing_responses_are_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = [{"prompt": PROMPT}, {"prompt": "How many apples?"}]
    with pytest.warns(UserWarning, match="got 2 of 2") as told:
        summary = run(tmp_path, lines, max_new_tokens=5)
    assert [str(warning.message).split(", got 2 of 2 ")[0] for warning in told] == [
        "answer: should be stated in every response",
        "max_new_tokens: every response should end by itself",
    ]
    held = load_trace(next((summary.out / "traces").glob("000001*")))
    assert [row["answer_by"] for row in table(summary.out / "traces.parquet")] == [
        "whole response, unfinished text"
    ] * 2
    with pytest.warns(UserWarning, match="got a response that was cut off"):
        alone = trace(*tiny(), [{"role": "user", "content": PROMPT}], max_new_tokens=5)
    assert held.provenance["answer_by"] == alone.provenance["answer_by"]
    assert torch.equal(held.token_ids, alone.token_ids)
    for name in ("response", "truncated", "stop", "weights"):
        assert held.provenance[name] == alone.provenance[name]
    assert [row["truncated"] for row in table(summary.out / "traces.parquet")] == [True, True]
    before = (summary.out / "tokens.parquet").read_bytes()
    for folder in ("records", "traces"):
        for path in (summary.out / folder).iterdir():
            path.unlink()
    monkeypatch.setattr("flowgraph.corpus.run.generate_response", lambda *_: pytest.fail("generated again"))
    with pytest.warns(UserWarning, match="got 2 of 2"):
        assert run(tmp_path, lines, max_new_tokens=5).now == 2
    assert (summary.out / "tokens.parquet").read_bytes() == before


def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(finished: CorpusSummary, tmp_path: Path):
    for stop_after in (1, 3, 6):

        def stop(at: CorpusProgress, limit: int = stop_after) -> None:
            if at.now >= limit:
                raise KeyboardInterrupt

        folder = tmp_path / str(stop_after)
        folder.mkdir()
        with pytest.raises(KeyboardInterrupt):
            run(folder, progress=stop)
        assert not (folder / "out" / "traces.parquet").exists()
        assert len(list((folder / "out" / "records").iterdir())) == stop_after
        resumed = run(folder)
        assert (resumed.now, resumed.traced) == (len(LINES) - stop_after, len(LINES))
        for name in TABLES:
            assert (resumed.out / name).read_bytes() == (finished.out / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore:answer. should be what the model prefers")
def test_a_corpus_of_relevance_has_signed_scores_and_shares(tmp_path: Path):
    options = {"capacity": "relevance", "max_edges": 60}
    (tmp_path / "whole").mkdir()
    done = run(tmp_path / "whole", html=True, **options)
    assert (done.traced, done.errors) == (len(LINES), ())
    rows = table(done.out / "traces.parquet")
    tokens = table(done.out / "tokens.parquet")
    for row in rows:
        shares = [row[f"{name}_share"] for name in ("question", "context", "forced", "remainder", "bias")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert row["residual"] < 1e-3
        assert row["edges"] <= 60
        saved = load_relevance(done.out / row["file"])
        assert saved.provenance["line"] == row["line"]
        own = [token for token in tokens if token["line"] == row["line"]]
        assert [token["score"] for token in own] == saved.scores.tolist()
        assert [token["absorbed"] for token in own] == saved.flow.absorbed.tolist()
        assert saved.certify().ok
        assert (done.out / row["file"]).with_suffix(".html").is_file()
    assert any(token["score"] < 0 for token in tokens)
    # Each line runs alone, so its numbers are those of a trace of its own.
    alone = trace(*tiny(), [{"role": "user", "content": PROMPT}], RESPONSE, **options)
    first = load_relevance(done.out / rows[0]["file"])
    assert torch.equal(first.scores, alone.scores)
    assert "question share" in (done.out / "index.html").read_text(encoding="utf-8")

    # An interrupted run goes on and writes the same bytes.
    def stop(at: CorpusProgress) -> None:
        if at.now >= 3:
            raise KeyboardInterrupt

    (tmp_path / "stopped").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", progress=stop, **options)
    resumed = run(tmp_path / "stopped", html=True, **options)
    assert (resumed.now, resumed.traced) == (len(LINES) - 3, len(LINES))
    for name in TABLES:
        assert (resumed.out / name).read_bytes() == (done.out / name).read_bytes(), name
    # Pages of finished lines are written later, too.
    assert (resumed.out / rows[0]["file"]).with_suffix(".html").is_file()


def test_lines_that_a_relevance_cannot_explain_are_reported(tmp_path: Path):
    lines = [LINES[0], {"id": "other", "prompt": "He buys 4 more.", "response": "So 4 it is.", "answer": "4"}]
    options = {"capacity": "relevance", "capacity_options": {"contrast": "4"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = run(tmp_path, lines, format="csv", **options)
    assert done.traced == 1
    ((line, message),) = done.errors
    assert line == 2
    assert message.startswith("contrast: must differ from the answer '4' in a token of its own, got '4'")
    with pytest.raises(InvalidInputError, match="capacity: must be 'relevance' or have edges that are not negative"):
        run(tmp_path, lines, capacity="gradient")


def traced_in_a_process(path: Path, out: Path, file_limit: int | None = None, kill_at: int | None = None) -> None:
    """What a process of its own does; ``file_limit`` is the largest file that it may write, in bytes.

    It is killed at the ``kill_at``-th change of a file in ``out``; a run that ends leaves the number of its changes.
    """
    torch.set_num_threads(1)
    out.mkdir(exist_ok=True)
    changes = kill_at_change(out, kill_at)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        trace_corpus(*tiny(), path, out, batch_tokens=300)
    except OutputError as error:
        (out / "refused").write_text(str(error))
    out.with_suffix(".changes").write_text(str(changes[0]))


@pytest.fixture(scope="module")
def start():
    """Start :func:`traced_in_a_process`; a fork server has the libraries loaded."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["flowgraph.corpus.trace_corpus", "tests.fixtures.tiny"])

    def begin(*arguments: object) -> multiprocessing.process.BaseProcess:
        worker = processes.Process(target=traced_in_a_process, args=arguments)
        worker.start()
        return worker

    return begin


def test_kills_at_any_moment_lose_and_double_nothing(start, tmp_path: Path):
    """SIGKILL again and again, at random changes of a file; then a run gets through, equal to one never killed."""
    lines = [{**line, "id": f"{line.get('id')}{copy}"} for copy in range(3) for line in LINES]
    path = write(tmp_path / "in.jsonl", lines)
    whole, out = tmp_path / "whole", tmp_path / "out"
    start(path, whole).join()
    changes = int(whole.with_suffix(".changes").read_text())
    choose = random.Random(5)
    counts = [0]
    for _ in range(6):  # an eighth of the changes at most, so that every kill comes before the end
        worker = start(path, out, None, choose.randint(1, changes // 8))
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        counts.append(_count(out))
    last = start(path, out)
    last.join()
    assert last.exitcode == 0
    assert counts == sorted(counts)
    assert 0 < counts[3] < counts[6] < len(lines)  # the kills came while it worked
    assert files(out) == files(whole)  # nothing is missing and nothing half-written is left
    for name in TABLES:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    ids = [row["id"] for row in table(out / "traces.parquet")]
    assert ids == [line["id"] for line in lines]


def _count(out: Path) -> int:
    return len(list(out.glob("records/[0-9]*.json")))


def test_what_a_kill_leaves_half_written_is_swept_away(tmp_path: Path):
    out = run(tmp_path, LINES[:2]).out
    before = files(out)
    for place in ("records/.000001-first.json.x1", "traces/.000002-messages.safetensors.y", ".tokens.parquet.z"):
        (out / place).write_text("half")
    (out / "records" / "000001-first.json").write_text('{"half')
    (out / ".mine").touch()
    assert run(tmp_path, LINES[:2]).now == 1
    assert files(out) == before | {".mine"}


def test_another_input_or_other_options_are_refused(tmp_path: Path):
    run(tmp_path, LINES[:2])
    for lines, message in (
        ([LINES[1], LINES[1]], "line 1 has changed"),
        (LINES[:3], "there are 1 lines more"),
        (LINES[:1], "there are 1 lines fewer"),
    ):
        with pytest.raises(InvalidInputError, match=rf"path: must be the file that .* one where {message}; run it as"):
            run(tmp_path, lines)
    for options, message in (({"layers": "all"}, "layers 'all' and not 'middle'"), ({"damping": 0.5}, "damping '0.5'")):
        with pytest.raises(InvalidInputError, match=rf"out: must be continued with the options .*, got {message}"):
            run(tmp_path, LINES[:2], **options)
    changed = tiny_model.__wrapped__()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(InvalidInputError, match="got weights '"):
        trace_corpus(changed, tiny()[1], write(tmp_path / "in.jsonl", LINES[:2]), tmp_path / "out")
    (tmp_path / "out" / "mine.txt").touch()
    again = run(tmp_path, LINES[2:4], restart=True, damping=0.5)
    assert (again.now, again.traced) == (2, 2)
    assert [row["id"] for row in table(again.out / "traces.parquet")] == ["short", "line-2"]
    assert len(list((again.out / "traces").iterdir())) == 2
    assert (again.out / "mine.txt").exists()


def test_folders_of_no_run_are_left_alone(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html").write_text("mine")
    for restart in (False, True):
        with pytest.raises(InvalidInputError, match="must be a new folder or that of an earlier run, got"):
            run(tmp_path, restart=restart)
    assert (tmp_path / "out" / "index.html").read_text() == "mine"
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", "a\0b"):
        with pytest.raises(OutputError, match="out: must be a folder that can be made, got"):
            trace_corpus(*tiny(), tmp_path / "in.jsonl", out)


def test_an_input_that_changes_while_it_is_read_ends_the_run(tmp_path: Path):
    """What was scanned and what is traced must be the same lines; those of other bytes have another result."""
    path = tmp_path / "in.jsonl"

    def change(at: CorpusProgress) -> None:
        if at.stage == "reading the lines":
            path.write_text(path.read_text().replace("apples", "grapes"))

    with pytest.raises(InvalidInputError, match=r"path: must stay as it is during a run, got another line 1 in"):
        run(tmp_path, LINES[:2], progress=change)
    assert _count(tmp_path / "out") == 0


def test_two_runs_at_once_are_refused(tmp_path: Path):
    def again(at: CorpusProgress) -> None:
        run(tmp_path, LINES[:1])

    with pytest.raises(OutputError, match=r"out: must be free, got .* with another run at work in it"):
        run(tmp_path, LINES[:1], progress=again)


def test_a_full_disk_is_a_message_and_nothing_half_written(start, tmp_path: Path):
    """A limit on the size of files stands in for a full disk; it refuses the same write in the same place."""
    path, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out"
    worker = start(path, out, 20_000)
    worker.join()
    assert worker.exitcode == 0
    assert "path: must be writable, got" in (out / "refused").read_text()
    assert not [name for name in files(tmp_path / "out") if Path(name).name.startswith(".")]
    done = _count(tmp_path / "out")
    assert done < len(LINES)
    assert run(tmp_path).now == len(LINES) - done


def test_csv_tables_and_a_missing_pyarrow(finished: CorpusSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pyarrow" else found(name))
    with pytest.raises(MissingExtraError, match=r"format: 'parquet' needs pyarrow, .* pip install 'flowgraph-llm\["):
        run(tmp_path, format="parquet")
    assert not (tmp_path / "out").exists()
    summary = run(tmp_path)
    with (summary.out / "tokens.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wanted = table(finished.out / "tokens.parquet")
    assert [row["text"] for row in rows] == [row["text"] for row in wanted]
    assert [float(row["throughput"]) for row in rows] == [row["throughput"] for row in wanted]
    assert rows[0]["generated"] == "false"
    assert not (summary.out / "tokens.parquet").exists()
    monkeypatch.undo()
    run(tmp_path)
    assert (summary.out / "tokens.parquet").is_file()
    assert not (summary.out / "tokens.csv").exists()


@pytest.mark.unchecked
def test_batches_hold_similar_lengths_within_the_budget(tmp_path: Path):
    class Text:
        def __init__(self, num_tokens: int) -> None:
            self.num_tokens = num_tokens

    lengths = [5, 90, 7, 300, 6, 40, 41, 5]
    items = [Prepared(Line(k, 0, 0, "", str(k)), Text(n), None) for k, n in enumerate(lengths)]
    made = [[item.encoded.num_tokens for item in batch] for batch in batches(items, 100)]
    assert made == [[5, 5, 6, 7], [40, 41], [90], [300]]
    assert [len(batch) for batch in batches(items[1:2] * 3, 180)] == [2, 1]  # the one that is added counts too
    assert [item.line.number for batch in batches(items, 10_000) for item in batch][:2] == [0, 7]


def test_progress_knows_rate_and_time_left(tmp_path: Path):
    seen: list[CorpusProgress] = []
    run(tmp_path, LINES, progress=seen.append)
    tracing = [at for at in seen if at.stage == "tracing"]
    assert [at.done for at in tracing] == list(range(1, len(LINES) + 1))
    at = CorpusProgress("tracing", done=6, failed=1, total=11, now=2, tokens=300, seconds=4.0)
    assert (at.traces_per_second, at.tokens_per_second, at.seconds_left) == (0.5, 75.0, 8.0)
    assert CorpusProgress("", 0, 0, 5, 0, 0, 0.0).seconds_left is None


@pytest.mark.unchecked
def test_options_are_checked_before_anything_is_written(tmp_path: Path):
    for options, message in (
        ({"batch_tokens": 0}, "batch_tokens: must be a positive number, got 0"),
        ({"format": "xlsx"}, "format: must be 'auto', 'parquet' or 'csv', got 'xlsx'"),
        ({"answer": "("}, "pattern: must be a regular expression, got '\\('"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, an integer, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: must be at least 1, an integer, got 2.5"),
        ({"fields": {}}, r"fields: must be a CorpusFields, got \{\}"),
        ({"keep": "most"}, r"keep: must lie in \(0, 1\], got 'most'"),
        ({"keep": 0}, r"keep: must lie in \(0, 1\], got 0"),
        ({"damping": 2.0}, "damping: "),
        ({"layers": "99"}, "layers: "),
        ({"system": "x", "plain": True}, "system: needs a chat template, got 'x' without"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            run(tmp_path, **options)
    with pytest.raises(InvalidInputError, match=r"fields: each must have a name of its own, got 'question' more"):
        CorpusFields(prompt="question")
    with pytest.raises(InvalidInputError, match=r"path: must be a file that can be read, got"):
        scan(tmp_path / "nothing", CorpusFields())
    with pytest.raises(InvalidInputError, match=r"path: must be a file that can be read, got .*null byte"):
        scan("a\0b", CorpusFields())
    with pytest.raises(InvalidInputError, match=r"path: must hold at least one line, got none in"):
        run(tmp_path, [""])
    assert not (tmp_path / "out").exists()


def test_a_batch_that_does_not_fit_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import flowgraph.corpus.run as module

    require = module.require_trace_memory

    def crowded(model, num_tokens, layers, max_edges):
        if num_tokens > 400:
            raise MemoryLimitError("trace: would need about 9 GiB, got 1; choose fewer")
        require(model, num_tokens, layers, max_edges)

    monkeypatch.setattr(module, "require_trace_memory", crowded)
    with pytest.raises(MemoryLimitError, match=r"batch_tokens: a batch must fit the memory, got \d+ tokens"):
        run(tmp_path)
    assert run(tmp_path, batch_tokens=300).traced == len(LINES)


def test_the_old_name_of_the_function_warns_and_works(tmp_path: Path):
    path = write(tmp_path / "in.jsonl", LINES[:1])
    with pytest.warns(
        DeprecationWarning, match=r"^trace_file: is deprecated, got a call by the old name; call trace_c"
    ):
        summary = trace_file(*tiny(), path, tmp_path / "out")
    assert (summary.now, summary.errors) == (1, ())


def test_numbers_and_texts_are_found_in_any_script_and_spelling(tmp_path: Path):
    lines = [
        {"prompt": "How many?", "response": "答案是7个苹果。", "answer": 7},
        {"prompt": "How far?", "response": "It is 7km, not 17km.", "answer": 7},
        {"prompt": "How much?", "response": "It costs $1,234.", "answer": 1234},
        {"prompt": "How much?", "response": "It costs $42.50.", "answer": "$42.50"},
        {"prompt": "Which?", "response": "3 and 4, so 3 and 4.", "answer": [3, "4"]},
        {"prompt": "Which?", "response": "<think>So 8?</think> The right option is (B)."},
    ]
    rows = table(run(tmp_path, lines).out / "traces.parquet")
    assert [row["error"] for row in rows] == [None] * len(lines)
    # A token may hold more than the answer.
    expected = ["7", "7", "1,234", "$42.50", "3 … 4", "(B)"]
    for row, text in zip(rows, expected, strict=True):
        assert text in " ".join(row["answer_text"].split())
        assert len(row["answer_text"]) <= len(text) + 2
    by = ["given: Literal"] * 4 + ["given: AllOf", "choice"]
    assert [row["answer_by"] for row in rows] == by


def test_template_arguments_of_a_run_and_of_a_line(tmp_path: Path):
    from tests.fixtures.tokenizers import CHATML, with_template

    model, tokenizer = tiny()
    template = CHATML.replace("assistant\n", "assistant\n{{ effort }}")
    tokenizer = with_template(tokenizer, template)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True, effort="<own>"
    )
    lines = [
        {"prompt": PROMPT, "response": RESPONSE},
        {"prompt": PROMPT, "response": RESPONSE, "chat_template_kwargs": {"effort": "<low>"}},
        # A prompt that is rendered already stays as it is.
        {"prompt": rendered, "response": RESPONSE},
        {"prompt": PROMPT, "response": RESPONSE, "chat_template_kwargs": "low"},
        {"prompt": PROMPT, "response": RESPONSE, "chat_template_kwargs": {"tokenize": True}},
    ]
    path = write(tmp_path / "in.jsonl", lines)
    summary = trace_corpus(model, tokenizer, path, tmp_path / "out", chat_template_kwargs={"effort": "<high>"})
    texts = [load_trace(file).text for file in sorted((tmp_path / "out" / "traces").glob("*.safetensors"))]
    assert [text.split("assistant\n")[1].split(">")[0] for text in texts] == ["<high", "<low", "<own"]
    assert all(text.count("<|im_start|>") == 2 for text in texts)
    assert [number for number, _ in summary.errors] == [4, 5]
    assert "chat_template_kwargs: must be an object of template arguments, got 'low'" in summary.errors[0][1]
    assert "must hold arguments of the template alone, got 'tokenize'" in summary.errors[1][1]
    with pytest.raises(InvalidInputError, match="chat_template_kwargs"):
        trace_corpus(model, tokenizer, path, tmp_path / "out", chat_template_kwargs={"effort": "<none>"})
    plain = with_template(tokenizer, None)
    with pytest.raises(InvalidInputError, match=r"chat_template_kwargs: need a chat template, got .* without; leave"):
        trace_corpus(model, plain, path, tmp_path / "other", chat_template_kwargs={"effort": "<none>"})
