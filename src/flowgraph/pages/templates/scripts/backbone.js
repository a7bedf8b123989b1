// The backbone slider: the strongest edges, and the exact share of the flow whose whole route lies on them.
const slider = at("arcs");
const DEFAULT_ARCS = 60;

/** The page's edges in the order of their source, so that a token's flow is complete before it goes on. */
const inOrder = page.edges.map((edge, rank) => rank).sort((a, b) => page.edges[a][0] - page.edges[b][0]);

/**
 * The share of the flow that never leaves the `kept` strongest edges: what enters, carried on by each kept edge's
 * part of its source's throughput, as far as it is absorbed.
 */
function keptShare(kept) {
  const carried = new Float64Array(tokens.length);
  for (const [index, share] of page.entering) carried[index] = share;
  for (const rank of inOrder) {
    if (rank >= kept) continue;
    const [source, target, flow] = page.edges[rank];
    carried[target] += (carried[source] * flow) / tokens[source][FLOW];
  }
  let arrived = 0;
  for (const [index, share] of page.leaving) arrived += (carried[index] * share) / tokens[index][FLOW];
  return Math.min(1, arrived);
}
/** Flow on the strongest edges, added up, and on all: every hop of a unit of flow counts once on each. */
const flowUpTo = page.edges.reduce((sums, edge) => (sums.push(sums.at(-1) + edge[2]), sums), [0]);
const allHops = tokens.reduce((sum, token) => sum + token[FLOW], 0) - 1;
/** The fewest strongest edges that carry a share, or all of them. */
function fewestFor(share) {
  let low = 0, high = page.edges.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (keptShare(middle) >= share * (1 - 1e-5)) high = middle; // the page's numbers have six digits
    else low = middle + 1;
  }
  return high;
}
/** Numbers of edges the slider stops at: round ones while a picture is readable, then by share of the flow. */
function sliderStops() {
  const all = page.edges.length, stops = [0, 5, 10, 20, 30, 40, DEFAULT_ARCS, 80, 100, 150, 200, 300];
  for (let share = 5; share <= 95; share += 5) stops.push(fewestFor(share / 100));
  if (page.backbone) stops.push(page.backbone.num_edges);
  return [...new Set(stops.filter((stop) => stop < all)), all].sort((a, b) => a - b);
}
let stops = [0];
const shownEdges = () => stops[slider?.value ?? 0];

/** [share of the flow whose routes stay on the shown edges, share of all hops they hold, how many they are]. */
function describe(shown) {
  const known = page.edges.length + page.edges_left_out;
  const whole = shown === known ? 1 : shown === page.backbone?.num_edges ? page.backbone.share : keptShare(shown);
  const held = shown === known ? 1 : Math.min(1, flowUpTo[shown] / allHops);
  return [whole, held, `${count(shown)} of ${plural(known, "edge")}`];
}
function moveSlider() {
  const shown = shownEdges(), [whole, held, edges] = describe(shown);
  const drawn = shown > MAX_ARCS ? `, the strongest ${count(MAX_ARCS)} of them drawn` : "";
  at("arc-share").textContent = `${percent(whole)} of the flow`;
  at("arc-count").textContent = `in routes that stay on ${edges}, ${percent(held)} of all hops${drawn}`;
  slider.setAttribute("aria-valuetext", `${edges}: routes that stay on them carry ${percent(whole)} of the flow`);
  drawArcs();
}
function startSlider() {
  if (!slider) return;
  stops = sliderStops();
  slider.max = stops.length - 1;
  slider.value = Math.max(0, stops.findLastIndex((stop) => stop <= DEFAULT_ARCS));
  slider.addEventListener("input", moveSlider);
  moveSlider();
}
