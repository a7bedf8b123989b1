"""The command line from end to end: exit codes, messages, files."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.fixtures.tiny import PROMPT, RESPONSE, save_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        from flowgraph.cli import main

        monkeypatch.setattr(sys, "argv", ["flowgraph", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_help_lists_the_commands():
    result = subprocess.run(
        [sys.executable, "-m", "flowgraph.cli", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("trace", "certify", "show", "demo", "Exit codes"):
        assert word in result.stdout
    assert "trace-file" not in result.stdout


def test_the_old_name_of_trace_corpus_warns_and_works(run, checkpoint: Path, tmp_path: Path):
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"prompt": PROMPT, "response": RESPONSE}) + "\n")
    code, printed, err = run("trace-file", file, "--model", checkpoint, "--out", tmp_path / "out")
    assert code == 0
    assert "1 traced in" in printed
    assert "The command 'trace-file' is deprecated." in err


@pytest.mark.parametrize(("layers", "read"), [("0,2", [0, 2]), ("1-", [1, 2]), ("upper", [1, 2]), ("0-1", [0, 1])])
def test_layers_are_a_name_a_range_or_a_list(run, checkpoint: Path, tmp_path: Path, layers: str, read: list[int]):
    options = ("--model", checkpoint, "--response", RESPONSE, "--layers", layers, "--heads", "0,2-3")
    code, printed, _ = run("trace", PROMPT, *options, "--out", tmp_path)
    assert code == 0, printed
    provenance = json.loads((tmp_path / "trace.json").read_text())["provenance"]
    assert (provenance["layers"], provenance["heads"]) == (read, "[0, 2, 3]")


# Two commands pass what is refused: a size of a figure, and a level of a certificate.
@pytest.mark.unchecked
def test_trace_writes_three_files_and_show_and_certify_read_them(run, checkpoint: Path, tmp_path: Path):
    out = tmp_path / "results"
    code, printed, _ = run("trace", PROMPT, "--model", checkpoint, "--response", RESPONSE, "--out", out)
    assert code == 0, printed
    assert sorted(path.name for path in out.iterdir()) == ["trace.html", "trace.json", "trace.safetensors"]
    assert "widest routes" in printed
    assert "throughput" in printed
    payload = json.loads((out / "trace.json").read_text())
    assert payload["schema"] == "flowgraph-trace/1"
    code, printed, _ = run("show", out / "trace.safetensors", "--all", "--html", tmp_path / "again.html")
    assert code == 0
    assert "all tokens" in printed
    assert (tmp_path / "again.html").is_file()
    for kind, size in (("throughput", "single"), ("steps", "double"), ("potentials", "single")):
        picture = tmp_path / f"{kind}.svg"
        assert run("show", out / "trace.safetensors", "--figure", picture, "--of", kind, "--size", size)[0] == 0
        assert picture.read_text().startswith("<?xml")
    code, printed, complaint = run(
        "show", out / "trace.safetensors", "--figure", tmp_path / "a.svg", "--size", "poster"
    )
    assert (code, printed) == (2, "")
    assert "size: must be 'single', 'double' or width and height" in " ".join(complaint.split())
    code, printed, _ = run("certify", out / "trace.safetensors", "--json", tmp_path / "c.json")
    assert code == 0
    assert json.loads((tmp_path / "c.json").read_text())["ok"]
    code, printed, _ = run("certify", out / "trace.safetensors", "--level", "rational")
    assert code == 0
    assert "rational h" in printed
    code, _, complaint = run("certify", out / "trace.safetensors", "--level", "thorough")
    assert code == 2
    assert "level: must be one of 'auto', 'fast', 'exact', 'rational', got 'thorough'" in " ".join(complaint.split())


def test_prompt_and_response_from_files_and_standard_input(run, checkpoint: Path, tmp_path: Path, monkeypatch):
    import io

    (tmp_path / "p").write_text(PROMPT)
    (tmp_path / "r").write_text(RESPONSE)
    options = ("--model", checkpoint, "--response-file", tmp_path / "r", "--answer", r"is (\d+)", "--plain")
    assert run("trace", "--prompt-file", tmp_path / "p", *options)[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert run("trace", "-", *options)[0] == 0


def test_a_mark_and_a_line_break_of_an_editor_are_no_part_of_the_prompt(run, checkpoint, tmp_path: Path, monkeypatch):
    import io

    from flowgraph import load_trace

    options = ("--model", checkpoint, "--plain", "--out", tmp_path)

    def tokens(*arguments: object) -> tuple[list[int], str]:
        code, _, said = run("trace", *arguments, *options)
        assert code == 0, said
        return load_trace(tmp_path / "trace.safetensors").token_ids.tolist(), said

    expected, said = tokens(PROMPT, "--response", RESPONSE)
    assert "removed" not in said
    (tmp_path / "p").write_bytes(b"\xef\xbb\xbf" + PROMPT.encode() + b"\r\n")
    (tmp_path / "r").write_bytes(RESPONSE.encode() + b"\n")
    found, said = tokens("--prompt-file", tmp_path / "p", "--response-file", tmp_path / "r")
    assert found == expected
    assert f"flowgraph: removed the byte order mark and the final line break of {tmp_path / 'p'}" in said
    assert f"flowgraph: removed the final line break of {tmp_path / 'r'}" in said
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + PROMPT.encode() + b"\n")))
    found, said = tokens("-", "--response", RESPONSE)
    assert found == expected
    assert "of standard input" in said
    # Only the break that ends the last line is removed.
    (tmp_path / "p").write_text(f"{PROMPT}\n\n")
    found, _ = tokens("--prompt-file", tmp_path / "p", "--response", RESPONSE)
    assert len(found) > len(expected)


def test_standard_input_in_another_encoding_is_refused(run, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Caf\xe9?")))
    code, _, said = run("trace", "-")
    assert code == 2
    assert "standard input must be UTF-8, got others (byte 0xe9 at position 3)" in " ".join(
        said.replace("│", " ").split()
    )


@pytest.mark.parametrize("command", ["show", "certify", "steps"])
def test_a_stream_that_lacks_characters_gets_question_marks(checkpoint: Path, tmp_path: Path, run, command: str):
    import os

    run("trace", "汤姆有3个苹果", "--model", checkpoint, "--response", RESPONSE, "--out", tmp_path)
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    result = subprocess.run(
        [sys.executable, "-m", "flowgraph.cli", command, tmp_path / "trace.safetensors"],
        capture_output=True,
        env=environment,
        check=True,
    )
    assert b"?" in result.stdout
    assert b"Traceback" not in result.stderr
    assert result.stdout.decode("cp1252")


def test_template_arguments_are_a_json_object(run, tmp_path: Path, checkpoint: Path):
    from tests.fixtures.tokenizers import CHATML, byte_level, with_template

    template = CHATML.replace("assistant\n", "assistant\n{% if not enable_thinking %}<off>{% endif %}")
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    with_template(byte_level(), template).save_pretrained(folder)
    options = ("--model", folder, "--response", RESPONSE, "--out", tmp_path)
    assert run("trace", PROMPT, *options, "--chat-template-kwargs", '{"enable_thinking": true}')[0] == 0
    payload = json.loads((tmp_path / "trace.json").read_text())
    assert "<off>" not in payload["text"]
    assert payload["provenance"]["text"]["chat_template_kwargs"] == {"enable_thinking": True}
    code, _, said = run("trace", PROMPT, *options, "--chat-template-kwargs", '{"enable_thinkng": true}')
    assert code == 0
    assert "flowgraph: warning: chat_template_kwargs: the chat template reads no 'enable_thinkng'" in said
    for arguments in ("{", "[1]", "7"):
        code, _, said = run("trace", PROMPT, *options, "--chat-template-kwargs", arguments)
        assert code == 2
        assert "--chat-template-kwargs must be a JSON object, got" in " ".join(said.replace("│", " ").split())
    code, _, said = run("trace", PROMPT, *options, "--plain", "--chat-template-kwargs", "{}")
    assert code == 0
    code, _, said = run("trace", PROMPT, *options, "--plain", "--chat-template-kwargs", '{"a": 1}')
    assert code == 2


def test_a_rendered_prompt_is_not_rendered_again(run, checkpoint: Path, tmp_path: Path):
    from flowgraph import load_trace
    from tests.fixtures.tiny import chat
    from tests.fixtures.tokenizers import byte_level

    rendered = byte_level().apply_chat_template(chat(), tokenize=False, add_generation_prompt=True)
    traces = []
    for prompt in (PROMPT, rendered):
        assert run("trace", prompt, "--model", checkpoint, "--response", RESPONSE, "--out", tmp_path)[0] == 0
        traces.append(load_trace(tmp_path / "trace.safetensors"))
    assert traces[0].token_ids.tolist() == traces[1].token_ids.tolist()
    assert traces[0].question.tolist() == traces[1].question.tolist()
    code, _, said = run("trace", rendered, "--model", checkpoint, "--response", RESPONSE, "--system", "Be brief.")
    assert code == 2
    assert "--system needs a chat template" in said


def test_characters_of_several_tokens_are_printed_once(run, checkpoint: Path, tmp_path: Path):
    response = "答案是7个🍎。"
    options = ("--model", checkpoint, "--response", response, "--out", tmp_path, "--answer", "7.*")
    code, printed, _ = run("trace", "汤姆有3个苹果", *options, "--full")
    assert code == 0
    lines = "".join(line.strip() for line in printed.split("\n"))
    assert "汤姆有3个苹果" in lines
    assert response in lines
    assert "answer: '7个🍎。'" in printed


def test_a_certificate_that_fails_is_exit_code_1(run, checkpoint: Path, tmp_path: Path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    run("trace", PROMPT, "--model", checkpoint, "--response", RESPONSE, "--out", tmp_path)
    path = tmp_path / "trace.safetensors"
    with safe_open(path, "pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["g"] = tensors["g"] * 1.01
    save_file(tensors, path, metadata)
    code, printed, _ = run("certify", path)
    assert code == 1
    assert "✗" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "missing.safetensors"), "must be an existing trace file"),
        (("certify", "missing.safetensors"), "must be an existing trace file"),
        (("trace", "x", "--prompt-file", "y"), "not both"),
        (("trace", "--prompt-file", "nowhere"), "must be a readable UTF-8 file"),
        (("trace", "x", "--answer-span", "nonsense"), "must be START:END"),
        (("trace", "x", "--answer", "a", "--last-line"), "give one of"),
        (("trace", "x", "--keep", "1.5"), "1.5"),
        (("trace", "x", "--model", "/no/such/folder"), "--model: must be a folder with a config.json"),
        (("trace", "x", "--model", "no/such/folder"), "--model: must be a folder with a config.json"),
        (("show", "x", "--figure", "x.pdf", "--of", "bars"), "--of must be of throughput, steps, potentials"),
        (("trace", "x", "--device", "warp"), "--device: must be usable here, got 'warp'"),
        (("trace", "x", "--dtype", "int3"), "--dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', got 'int3'"),
        (("trace", "x", "--layers", "3,x"), "--layers must be numbers and ranges like 5,7-9, got '3,x'"),
        (("trace", "x", "--heads", "0,,3"), "--heads must be numbers and ranges like 5,7-9, got '0,,3'"),
        (("trace", " "), "the prompt is empty; give some text"),
        (("trace", "x", "--response", ""), "the response is empty; give some text"),
        (("show", "."), "must be a trace file, got the folder ."),
        (("nonsense",), "nonsense"),
    ],
)
def test_bad_input_is_exit_code_2_and_a_message(run, arguments: tuple[str, ...], message: str):
    code, _, said = run(*arguments)
    assert code == 2
    assert message in " ".join(said.replace("│", " ").split())
    assert "Traceback" not in said


def test_bad_answers_and_outputs_stop_before_anything_is_written(run, checkpoint: Path, tmp_path: Path):
    code, _, said = run(
        "trace", PROMPT, "-m", checkpoint, "--response", RESPONSE, "--answer", "####", "-o", tmp_path / "out"
    )
    assert code == 2
    assert said.startswith("flowgraph: answer: ") or "flowgraph: answer: " in said
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "file").touch()
    code, _, said = run("trace", PROMPT, "-m", checkpoint, "-o", tmp_path / "file")
    assert code == 2
    assert "--out: must be a folder that can be made" in said


@pytest.mark.parametrize("module", ["flowgraph.cli", "rl.cli"])
def test_the_version_is_told(module: str):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"flowgraph(-rl)? \d+\.\d+\.\d+\S*\n", done.stdout)


def test_a_warning_is_a_plain_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from flowgraph.cli import main

    monkeypatch.setattr("flowgraph.cli.app", lambda: warnings.warn("answer: should be stated", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main()
    assert capsys.readouterr().err == "flowgraph: warning: answer: should be stated\n"
