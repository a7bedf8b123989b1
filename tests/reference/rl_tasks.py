"""The tasks with detours, read character by character: values by substitution, marks by walking through the text."""

from __future__ import annotations

Span = tuple[int, int]

VARIABLES = "ABCDEF"
NODES = "ABCDEFGH"


def definitions(prompt: str) -> dict[str, str]:
    """Variable -> what stands behind its first "=" in a prompt of the wandering chain."""
    found = {}
    for line in prompt.split("?")[0].split(";"):
        if line:
            found[line[0]] = line[2:]
    return found


def values(prompt: str) -> dict[str, int]:
    """The value of every variable, substituted until nothing is left to substitute."""
    rest = definitions(prompt)
    known: dict[str, int] = {}
    while rest:
        for name, text in list(rest.items()):
            if text.isdigit():
                known[name] = int(text)
                del rest[name]
            elif text[0] in known:
                known[name] = (known[text[0]] + int(text[2:])) % 10
                del rest[name]
    return known


def needed(prompt: str) -> set[str]:
    """The queried variable and all that it depends on."""
    right_sides = definitions(prompt)
    found = {prompt.split("?")[1][0]}
    while True:
        more = {right_sides[name][0] for name in found if not right_sides[name][0].isdigit()}
        if more <= found:
            return found
        found |= more


def wandering_marks(prompt: str, response: str) -> tuple[list[Span], list[Span]]:
    """Decisive tokens and detours of a response: what is stated of variables that are needed, and of the others."""
    wanted = needed(prompt)
    marks: tuple[list[Span], list[Span]] = ([], [])
    for position, letter in enumerate(response):
        if letter == "#":
            break
        if letter not in VARIABLES or response[position + 1 : position + 2] != "=":
            continue
        start = position + 1
        text = response[start:].split("#")[0]
        width = 0
        if len(text) > 1 and text[1] in "0123456789":
            width = 2
        elif len(text) > 3 and text[1] in VARIABLES and text[2] == "+" and text[3] in "34567":
            width = 4
        if width:
            marks[0 if letter in wanted else 1].append((start, start + width))
    return marks


def path_marks(response: str) -> tuple[list[Span], list[Span], list[Span]]:
    """Steps of the walks that the stated path repeats, the last occurrence of each, and all other steps."""
    trace, mark, path = response.partition("#")
    while "#" in path:
        path = path.partition("#")[2]
    if not mark or not path or any(node not in NODES for node in path):
        return [], [], []
    edges = [path[i + 1] + path[i] for i in range(len(path) - 1)]
    used: list[Span] = []
    unused: list[Span] = []
    last: dict[str, Span] = {}
    start = 0
    for walk in trace.split(","):
        if walk and all(node in NODES for node in walk):
            for i in range(1, len(walk)):
                span = (start + i, start + i + 1)
                edge = walk[i - 1] + walk[i]
                if edge in edges:
                    used.append(span)
                    last[edge] = span
                else:
                    unused.append(span)
        start += len(walk) + 1
    return used, sorted(last.values()), unused


def program_marks(prompt: str, response: str) -> tuple[list[Span], list[Span]]:
    """Decisive tokens and detours of a response to a program: what is stated of needed variables, and of the others."""
    wanted = needed(prompt)
    marks: tuple[list[Span], list[Span]] = ([], [])
    trace = response.split("#")[0]
    position = 0
    while position < len(trace):
        spans: list[Span] = []
        start = position + 1
        # A right-hand side is four characters, a value is two; a line without a value states nothing.
        side = trace[start : start + 4]
        if len(side) == 4 and side[0] == "=" and side[1] in NODES and side[2] == "+" and side[3] in "34567":
            spans.append((start, start + 4))
            start += 4
        value = trace[start : start + 2]
        is_line = trace[position] in NODES and len(value) == 2 and value[0] == "=" and value[1] in "0123456789"
        if is_line:
            spans.append((start, start + 2))
            marks[0 if trace[position] in wanted else 1].extend(spans)
            position = start + 2
        else:
            position += 1
    return marks
