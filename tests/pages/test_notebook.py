"""The fragment of a notebook: well formed, escaped, small, and honest about what it leaves out."""

import html
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

from flowgraph.analysis.backbone import prune
from flowgraph.display.palette import PALETTE, rgba
from flowgraph.flow.solve import solve
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.pages.notebook import repr_html
from flowgraph.tracing.flow_trace import FlowTrace

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
WORDS = ("Tom", " has", " 3", " apples", ".", "\n", "So", " 7")
HOSTILE = (
    "</span></div><script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>", '" onclick="x', "&lt;b&gt;",
    "'", "$x_1$", "\x00\x1b", "\ud83d", "\u202eevil", "\u2028", "\N{RED APPLE}", "<" * 5000,
)  # fmt: skip


def make(num_tokens: int, question: int = 4, answer: int = 1, texts=WORDS, cut: bool = False) -> FlowTrace:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(num_tokens, num_tokens, generator=generator, dtype=torch.float64)
    rows = torch.softmax(scores.masked_fill(torch.ones_like(scores).triu() > 0, -torch.inf), 1).nan_to_num(0)
    if cut:
        rows[-answer:] = 0
    index = torch.arange(num_tokens)
    asked = (index >= 2) & (index < 2 + question)
    graph = FlowGraph.from_dense(rows, question=asked, answer=index >= num_tokens - answer)
    return FlowTrace(
        tokens=tuple(texts[i % len(texts)] for i in range(num_tokens)),
        token_ids=index,
        text="",
        spans=torch.zeros(num_tokens, 2, dtype=torch.int64),
        generated=index >= 2 + question,
        graph=graph,
        flow=solve(graph),
        provenance={"model": "<i>tiny</i>"},
    )


class Fragment(HTMLParser):
    """Checks that elements nest, and collects the tokens with their titles and styles."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.names, self.attributes = [], set(), set()
        self.tokens: dict[int, tuple[str, float, dict]] = {}
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "br":
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.words += data
        title = self.open[-1][1].get("title", "")
        if match := re.fullmatch(r"token (\d+), (\w+): ([\d.e+-]+) %", title):
            self.tokens[int(match[1])] = (data, float(match[3]), {"region": match[2], **self.open[-1][1]})


def opacity(attributes: dict) -> float:
    match = re.search(re.escape(rgba(PALETTE["flow"].light, 1)[:-2]) + r"([\d.]+)\)", attributes.get("style", ""))
    return float(match[1]) if match else 0.0


def test_every_token_is_there_with_its_region_and_number():
    trace = make(40, 12, 2)
    fragment = Fragment(repr_html(trace))
    assert fragment.names <= {"div", "span", "b", "br", "ol", "li", "bdi", "sub", "i"}
    assert fragment.attributes <= {"style", "title", "dir", "class"}
    assert sorted(fragment.tokens) == list(range(40))
    regions = ["context"] * 2 + ["question"] * 12 + ["reasoning"] * 24 + ["answer"] * 2
    for index, (text, percent, attributes) in fragment.tokens.items():
        assert text == trace.tokens[index].replace("\n", "⏎")
        assert percent == pytest.approx(100 * float(trace.throughput[index]), rel=0.006)
        assert attributes["region"] == regions[index]
    assert "40 tokens (12 question, 24 reasoning, 2 answer)" in fragment.words
    assert f"mean route {float(trace.throughput.sum()) - 1:.2f} hops" in fragment.words
    assert "left out" not in fragment.words


def test_more_throughput_is_darker():
    trace = make(40, 12, 2)
    fragment = Fragment(repr_html(trace))
    inner = [t for t in range(40) if not bool(trace.answer[t])]
    by_flow = sorted(inner, key=lambda t: float(trace.throughput[t]))
    shades = [opacity(fragment.tokens[t][2]) for t in by_flow]
    assert shades == sorted(shades)
    assert shades[0] == 0
    assert shades[-1] == 0.75


def test_the_widest_routes_are_listed_with_their_share():
    trace = make(40, 12, 2)
    listed = re.findall(r"<li>(.*?)</li>", repr_html(trace))
    assert len(listed) == 3
    for line, route in zip(listed, trace.routes(3), strict=True):
        assert [int(t) for t in re.findall(r"<sub>(\d+)</sub>", line)] == list(route.tokens)
        assert float(line.split(" %")[0]) == pytest.approx(100 * route.flow, rel=0.006)


def test_a_long_route_shows_its_ends():
    edges = torch.stack([torch.arange(30), torch.arange(1, 31)])
    graph = FlowGraph.from_edges(edges, torch.ones(30), num_nodes=31, question=[0], answer=[30])
    trace = FlowTrace(**{**vars(make(31)), "graph": graph, "flow": solve(graph)})
    line = re.findall(r"<li>(.*?)</li>", repr_html(trace))[0]
    assert line.startswith("100 %: ")
    assert [int(t) for t in re.findall(r"<sub>(\d+)</sub>", line)] == [0, 1, 2, 3, 4, 26, 27, 28, 29, 30]
    assert "… 21 more …" in line


def test_hostile_tokens_are_text():
    page = repr_html(make(40, 15, 2, HOSTILE))
    fragment = Fragment(page)
    assert fragment.names <= {"div", "span", "b", "br", "ol", "li", "bdi", "sub", "i"}
    assert fragment.attributes <= {"style", "title", "dir", "class"}
    shown = [fragment.tokens[k][0] for k in range(len(HOSTILE))]
    assert shown[:6] == list(HOSTILE[:6])
    assert shown[6:10] == ["␀␛", "⟨U+D83D⟩", "⟨U+202E⟩evil", "⟨U+2028⟩"]
    assert shown[11] == "<" * 80 + "…"
    assert "<i>tiny</i>" in fragment.words
    assert "mathjax_ignore" in page
    page.encode("utf-8")


@pytest.mark.parametrize("num_tokens", [450, 1500])
def test_a_long_trace_is_cut_to_its_interesting_parts_and_says_so(num_tokens: int):
    trace = make(num_tokens, 60, 2, HOSTILE)
    page = repr_html(trace)
    fragment = Fragment(page)
    assert len(fragment.tokens) <= 440  # 300, and short gaps between them
    assert len(page) < 250_000
    gaps = [
        (int(n.replace(",", "")), most) for n, most in re.findall(r"\[… ([\d,]+) tokens? left out, ([^…]*) …", page)
    ]
    assert sum(number for number, _ in gaps) + len(fragment.tokens) == num_tokens
    hidden = [t for t in range(num_tokens) if t not in fragment.tokens]
    stated = [float(number) for _, most in gaps for number in re.findall(r"none above (\S+) %", most)]
    assert max([0, *stated]) == pytest.approx(100 * float(trace.throughput[hidden].max()), rel=0.006)
    strongest = [t for t in trace.throughput.argsort(descending=True)[:12].tolist() if bool(trace.reasoning[t])]
    assert {num_tokens - 1, num_tokens - 2, *strongest} <= fragment.tokens.keys()


def test_no_flow_is_said():
    for num_tokens in (20, 500):
        fragment = Fragment(repr_html(make(num_tokens, cut=True)))
        assert "No flow: no question token reaches the answer" in fragment.words
        assert "Widest routes" not in fragment.words
        assert num_tokens - 1 in fragment.tokens


def test_a_pruned_trace_says_what_it_lost():
    whole = make(40, 12, 2)
    graph = prune(whole.flow, keep=0.8)
    page = repr_html(FlowTrace(**{**vars(whole), "graph": graph, "flow": solve(graph)}))
    assert f"pruned: {100 * graph.kept_flow.item():.3g} % of the flow kept" in html.unescape(page)


@pytest.mark.browser
@pytest.mark.parametrize(("ground", "ink"), [("#ffffff", "#000000"), ("#111111", "#ffffff")])
def test_it_is_readable_on_both_grounds_and_runs_nothing(ground: str, ink: str):
    if BROWSER is None:
        pytest.skip("needs chromium or google-chrome on the PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        complaints = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: complaints.append(request.url))
        page.set_content(f'<body style="background:{ground};color:{ink}">{repr_html(make(60, 15, 2, HOSTILE))}</body>')
        contrasts = page.evaluate(
            """ground => {
            const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
            const numbers = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
            const under = [1, 3, 5].map(k => parseInt(ground.slice(k, k + 2), 16));
            return [...document.querySelectorAll("span[title]")].map(token => {
                const style = getComputedStyle(token), [r, g, b, a = 1] = numbers(style.backgroundColor);
                const over = [r, g, b].map((v, k) => a * v + (1 - a) * under[k]);
                const [hi, lo] = [light(numbers(style.color)), light(over)].sort((x, y) => y - x);
                return (hi + 0.05) / (lo + 0.05);
            });
        }""",
            ground,
        )
        hacked = page.evaluate("window.hacked ?? null")
        browser.close()
    assert len(contrasts) == 60
    assert min(contrasts) >= 4.5
    assert hacked is None
    assert complaints == []


def test_it_is_what_a_notebook_asks_for():
    """What IPython's display does by hand: it looks for ``_repr_html_`` on the type and takes a string from it."""
    trace = make(20)
    method = getattr(type(trace), "_repr_html_", None)
    assert callable(method)
    assert method(trace) == repr_html(trace)
    assert repr(trace).startswith("FlowTrace of")


def test_a_notebook_runs_end_to_end():
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
    code = (
        "import torch, flowgraph as fg\n"
        "from flowgraph.tracing.flow_trace import FlowTrace\n"
        "from flowgraph.pages.notebook import repr_html\n"
        "FlowTrace._repr_html_ = repr_html\n"
        "weights = torch.tensor([[0., 0, 0], [.5, 0, 0], [.5, .5, 0]])\n"
        "graph = fg.FlowGraph.from_dense(weights, question=[0], answer=[2])\n"
        "i = torch.arange(3)\n"
        "FlowTrace(('a', '<b>', 'c'), i, '', torch.zeros(3, 2, dtype=torch.int64), i > 0, graph, fg.solve(graph))"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120).execute()
    shown = notebook.cells[0].outputs[-1]["data"]
    assert "&lt;b&gt;" in shown["text/html"]
    assert sorted(Fragment(shown["text/html"]).tokens) == [0, 1, 2]
    assert "FlowTrace of" in shown["text/plain"]


def test_characters_of_several_tokens_are_printed_once():
    trace = make(8, question=3, texts=("A", "汤", "汤", "汤", "姆", "姆", " ", "7"))
    spans = torch.tensor([[0, 1], [1, 2], [1, 2], [1, 2], [2, 3], [2, 3], [3, 4], [4, 5]])
    page = repr_html(FlowTrace(**{**vars(trace), "text": "A汤姆 7", "spans": spans}))
    text = "".join(re.findall(r"<span title=[^>]*>(.*?)</span>", page))
    assert text == "A汤姆 7"
    # All tokens of a character stand in its tooltip.
    assert len(re.findall(r'title="tokens 1 to 3, ', page)) == 1
    assert len(re.findall(r'title="tokens 4 to 5, ', page)) == 1
