// The layers and heads of an edge: where its weight comes from. Shares are of the weight; a negative one works against
// it. The page holds them for the strongest edges of the flow, and of the relevance where there is one.

const SMALLEST_PART = 0.0005; // heads of a smaller absolute share are not listed one by one

const edgeParts = page.edge_parts.map(([isRelevance, source, target, weight, arc, layers, heads]) => ({
  isRelevance: isRelevance === 1,
  source,
  target,
  weight, // the capacity, or the share of the answer's relevance
  arc, // share that no head holds: the answer's own demand, and what a generated token passed on
  layers, // [layer, share]
  heads, // [layer, head, share], largest absolute share first; empty where heads are joined before they are summed
}));
const splitEdges = new Map(
  edgeParts.map(({ isRelevance, source, target }, index) => [edgeKey(isRelevance, source, target), index]),
);

function edgeKey(isRelevance, source, target) {
  return `${isRelevance ? "relevance" : "flow"} ${source} ${target}`;
}

// --- links to an edge ------------------------------------------------------------------------------------------

/** The button that opens an edge of the flow; null where its layers and heads are not on the page. */
function headsButton(source, target) {
  const index = splitEdges.get(edgeKey(false, source, target));
  return index === undefined ? null : openEdgeButton(index);
}

function openEdgeButton(index) {
  const { source, target } = edgeParts[index];
  const button = pressable("heads", () => pin({ edge: index }), "heads");
  button.title = "Which layers and heads this edge comes from";
  button.setAttribute("aria-label", `Layers and heads of the edge from token ${source} to token ${target}`);
  return button;
}

/** Edges of the relevance, each with its share, its ends and its button; "" without any. */
function relevanceEdgeList(title, className, indices, nameEnds) {
  if (!indices.length) return "";
  const rows = indices.slice(0, MAX_LISTED).map((index) => {
    const { weight } = edgeParts[index];
    const ends = make("span", "", ...nameEnds(edgeParts[index]), " ", openEdgeButton(index));
    return make("li", "", make("span", weight < 0 ? "pct share minus" : "pct", signedShare(weight)), ends);
  });
  return make("div", "", make("h3", className, title), make("ul", "flows pairs", ...rows));
}

function relevanceIndices(isListed) {
  return edgeParts.flatMap((edge, index) => (edge.isRelevance && isListed(edge) ? [index] : []));
}

/** The edges of the relevance at a token that the page can open. */
function relevanceEdgesOf(token) {
  return [
    relevanceEdgeList(
      "Relevance taken from",
      "in",
      relevanceIndices((edge) => edge.target === token),
      ({ source }) => [tokenButton(source)],
    ),
    relevanceEdgeList(
      "Relevance given to",
      "out",
      relevanceIndices((edge) => edge.source === token),
      ({ target }) => [tokenButton(target)],
    ),
  ];
}

/** The strongest edges of the relevance, between words. */
function strongestRelevanceEdges() {
  const nameEnds = ({ source, target }) => [tokenButton(source), make("span", "arrow", "→"), tokenButton(target)];
  return relevanceEdgeList(
    "Strongest edges of the relevance",
    "",
    relevanceIndices(() => true),
    nameEnds,
  );
}

// --- the panel of an edge --------------------------------------------------------------------------------------

/** A share with its sign and one decimal; small ones are not written as zero. */
function signedShare(share) {
  const sign = share < 0 ? "−" : "+";
  return share === 0 ? "0 %" : `${sign}${percent(Math.abs(share))}`;
}

/** One column per layer, as high as its share of the weight; columns below the line are negative. */
function layerChart(layers) {
  const largest = Math.max(...layers.map(([, share]) => Math.abs(share)), 1e-9);
  const columns = layers.map(([layer, share]) => {
    const bar = make("i", share < 0 ? "minus" : "plus");
    bar.style.setProperty("--height", Math.abs(share) / largest);
    const column = make("span", share < 0 ? "column below" : "column", bar);
    column.title = `layer ${layer}: ${signedShare(share)}`;
    return column;
  });
  const hasNegative = layers.some(([, share]) => share < 0);
  const chart = make("div", hasNegative ? "layerchart signed" : "layerchart", ...columns);
  const [strongestLayer, strongestShare] = layers.reduce((one, other) =>
    Math.abs(other[1]) > Math.abs(one[1]) ? other : one,
  );
  chart.setAttribute("role", "img");
  const strongest = `layer ${strongestLayer}, ${signedShare(strongestShare)}`;
  chart.setAttribute("aria-label", `Share of each layer; most from ${strongest}`);
  const ends = make("p", "chartends hint", `layer ${layers[0][0]}`, make("span", "", `layer ${layers.at(-1)[0]}`));
  return make("div", "", chart, ends);
}

/** A line of the list of heads: share, bar and name. */
function headRow(name, share) {
  const className = share < 0 ? "pct share minus" : "pct";
  return make("li", "", make("span", className, signedShare(share)), shareBar(share), make("span", "", name));
}

function headList({ arc, layers, heads }) {
  // Parts too small to see are joined to the rest.
  const listed = heads.filter(([, , share]) => Math.abs(share) >= SMALLEST_PART);
  const rows = listed.map(([layer, head, share]) => headRow(`layer ${layer}, head ${head}`, share));
  if (!heads.length) {
    const byShare = [...layers].sort((one, other) => Math.abs(other[1]) - Math.abs(one[1]));
    rows.push(...byShare.slice(0, 8).map(([layer, share]) => headRow(`layer ${layer}`, share)));
  } else {
    const sumOfLayers = layers.reduce((sum, [, share]) => sum + share, 0);
    const rest = sumOfLayers - listed.reduce((sum, [, , share]) => sum + share, 0);
    if (Math.abs(rest) >= SMALLEST_PART) rows.push(headRow("all other heads", rest));
  }
  if (arc !== 0) rows.unshift(headRow("no head: the answer’s demand, or a generated word passed on", arc));
  return make("ul", "flows headlist", ...rows);
}

function drawEdgePanel(index) {
  const { isRelevance, source, target, weight, layers, heads } = edgeParts[index];
  const what = isRelevance
    ? `${signedShare(weight)} of the answer’s relevance`
    : `capacity ${weight.toPrecision(3)}: what the later token takes from the earlier one`;
  const note = heads.length
    ? "Shares of this edge by layer, then its largest heads."
    : "Shares of this edge by layer. This capacity joins the heads of a layer before layers are summed.";
  detail.replaceChildren(
    make(
      "div",
      "head",
      make("span", "name", tokenButton(source), make("span", "arrow", "→"), tokenButton(target)),
      unpinButton(),
    ),
    make("p", "hint", `edge from token ${source} to token ${target} · ${what}`),
    make("p", "hint", note),
    layerChart(layers),
    headList(edgeParts[index]),
  );
}

/** Mark both ends of an edge in the text. */
function markEdge(index) {
  mark(tokenElements[edgeParts[index].source], "in");
  mark(tokenElements[edgeParts[index].target], "out");
}
