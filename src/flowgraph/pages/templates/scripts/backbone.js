// The backbone slider: the strongest edges, and the exact share of the flow whose routes use only these edges.

const slider = byId("arcs"); // absent if there is no flow
const DEFAULT_EDGES = 60; // edges shown first, or more where fewer make no whole route
const DEFAULT_SHARE = 0.05; // least flow on whole routes that is shown first, where the page holds so much

/** Ranks of the edges by their source, so that what a token receives is complete before it is propagated. */
const ranksBySource = edges.map((_, rank) => rank).sort((a, b) => edges[a].source - edges[b].source);

/**
 * The share of the flow whose whole route uses the `numKept` strongest edges.
 *
 * A kept edge (u, v) propagates flow(u, v) / throughput(u) of what has arrived at u. The sum of what is absorbed at the
 * answer tokens is the share.
 */
function shareOnStrongest(numKept) {
  const arrived = new Float64Array(tokens.length);
  for (const [token, share] of page.entering) arrived[token] = share;
  for (const rank of ranksBySource) {
    if (rank >= numKept) continue;
    const { source, target, flow } = edges[rank];
    arrived[target] += (arrived[source] * flow) / tokens[source].throughput;
  }
  let absorbed = 0;
  for (const [token, share] of page.leaving) absorbed += (arrived[token] * share) / tokens[token].throughput;
  return Math.min(1, absorbed);
}

// The flow of the k strongest edges, added up, at index k, and of all edges. One unit of flow over n hops counts n
// times in both, so their ratio is a share of all hops.
const cumulativeFlow = [0];
for (const edge of edges) cumulativeFlow.push(cumulativeFlow.at(-1) + edge.flow);
const totalHops = tokens.reduce((sum, token) => sum + token.throughput, 0) - 1;

/** The smallest number of strongest edges whose routes carry a share, or the number of all edges. */
function fewestEdgesFor(share) {
  const needed = share * (1 - 1e-5); // the numbers of the page have six digits
  let low = 0;
  let high = edges.length;
  while (low < high) {
    const middle = Math.floor((low + high) / 2);
    if (shareOnStrongest(middle) >= needed) high = middle;
    else low = middle + 1;
  }
  return high;
}

/** Numbers of edges at which the slider stops: round numbers first, then those of 5 %, 10 %, ... of the flow. */
function sliderStops() {
  const stops = [0, 5, 10, 20, 30, 40, DEFAULT_EDGES, 80, 100, 150, 200, 300];
  for (let share = 5; share <= 95; share += 5) stops.push(fewestEdgesFor(share / 100));
  if (page.backbone) stops.push(page.backbone.num_edges);
  const distinct = new Set(stops.filter((stop) => stop < edges.length));
  distinct.add(edges.length);
  return [...distinct].sort((a, b) => a - b);
}

let stops = [0];

function numShownEdges() {
  return stops[slider?.value ?? 0];
}

/** What the shown edges are: the share of the flow on their routes, their share of all hops, and their number. */
function describeEdges(numShown) {
  const numEdges = edges.length + page.edges_left_out;
  const number = `${count(numShown)} of ${plural(numEdges, "edge")}`;
  if (numShown === numEdges) return { routeShare: 1, hopShare: 1, number };
  const isBackbone = numShown === page.backbone?.num_edges;
  const routeShare = isBackbone ? page.backbone.share : shareOnStrongest(numShown);
  return { routeShare, hopShare: Math.min(1, cumulativeFlow[numShown] / totalHops), number };
}

function onSlider() {
  const numShown = numShownEdges();
  const { routeShare, hopShare, number } = describeEdges(numShown);
  const onlyDrawn = numShown > MAX_CURVES ? `, the strongest ${count(MAX_CURVES)} of them drawn` : "";
  // Edges are shown strongest first, and the strongest alone may form no whole route from question to answer.
  const isWithoutRoute = numShown > 0 && routeShare === 0;
  if (isWithoutRoute) {
    byId("arc-share").textContent = `${percent(hopShare)} of all hops`;
    byId("arc-count").textContent = `on ${number} with flow, which alone make no route to the answer${onlyDrawn}`;
    slider.setAttribute("aria-valuetext", `${number}: they carry ${percent(hopShare)} of all hops`);
  } else {
    byId("arc-share").textContent = `${percent(routeShare)} of the flow`;
    byId("arc-count").textContent =
      `in routes that stay on ${number} with flow, ${percent(hopShare)} of all hops${onlyDrawn}`;
    const spoken = `${number}: routes that stay on them carry ${percent(routeShare)} of the flow`;
    slider.setAttribute("aria-valuetext", spoken);
  }
  drawEdgeCurves();
}

/** The stop that is shown first: few edges, but enough for whole routes with some of the flow. */
function firstStop() {
  const fewest = Math.max(
    0,
    stops.findLastIndex((stop) => stop <= DEFAULT_EDGES),
  );
  const isDrawable = (stop) => stop <= MAX_CURVES || stop === stops[fewest];
  const later = stops.slice(fewest).filter(isDrawable);
  const enough = later.find((stop) => shareOnStrongest(stop) >= DEFAULT_SHARE);
  return stops.indexOf(enough ?? later.at(-1));
}

function startSlider() {
  if (!slider) return;
  stops = sliderStops();
  slider.max = stops.length - 1;
  slider.value = firstStop();
  slider.addEventListener("input", onSlider);
  onSlider();
}
