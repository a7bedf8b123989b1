// Curves between tokens, behind the text: the strongest edges, and on top the edges of the chosen token or route.

const MAX_CURVES = 4000; // more curves are unreadable and slow a browser down
const MAX_TOKEN_CURVES = 14; // curves drawn for each direction of one token

/** An SVG element with attributes. */
function shape(tag, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const canvas = shape("svg", { class: "arcs", "aria-hidden": "true" });
const edgeCurves = shape("g", { class: "all" });
const chosenCurves = shape("g", { class: "focus" });
canvas.append(edgeCurves, chosenCurves);

const strongestFlow = edges.length ? edges[0].flow : 1;
let boxes = []; // {x, top, bottom} of each token; tokens of a folded section share the box of its button

/** Measure where each token stands, relative to the text. */
function measure() {
  const origin = textHolder.getBoundingClientRect();
  const boxOf = (element) => {
    // A token that wraps has several rectangles; the curve starts at the first.
    const box = element.getClientRects()[0] ?? element.getBoundingClientRect();
    return { x: (box.left + box.right) / 2 - origin.left, top: box.top - origin.top, bottom: box.bottom - origin.top };
  };
  boxes = new Array(tokens.length);
  for (const section of sections) {
    const folded = isOpen(section) ? null : boxOf(section.button);
    for (let index = section.start; index < section.stop; index++) {
      boxes[index] = folded ?? boxOf(tokenElements[index]);
    }
  }
}

/** The path from one token to another. */
function curvePath(source, target) {
  const from = boxes[source];
  const to = boxes[target];
  const isOneLine = to.top - from.top < 5;
  if (isOneLine) {
    // An arch over the line, higher for a longer distance.
    const rise = Math.min(26, 7 + 0.12 * Math.abs(to.x - from.x));
    const lean = 0.2 * (to.x - from.x);
    const height = from.top - rise;
    return `M${from.x} ${from.top}C${from.x + lean} ${height} ${to.x - lean} ${to.top - rise} ${to.x} ${to.top}`;
  }
  // An S from the lower edge of the source to the upper edge of the target.
  const bend = Math.max(12, Math.min(160, 0.5 * (to.top - from.bottom)));
  return `M${from.x} ${from.bottom}C${from.x} ${from.bottom + bend} ${to.x} ${to.top - bend} ${to.x} ${to.top}`;
}

/** The curve of an edge: width and opacity grow with its flow. Null if both ends are in one folded section. */
function drawCurve({ source, target, flow }, largestFlow, className) {
  if (boxes[source] === boxes[target]) return null;
  const share = Math.sqrt(flow / largestFlow);
  const faintest = className ? 0.35 : 0.12;
  return shape("path", {
    d: curvePath(source, target),
    class: className,
    "stroke-width": (0.7 + 4.3 * share).toFixed(2),
    opacity: (faintest + (0.85 - faintest) * share).toFixed(2),
  });
}

function drawCurves(someEdges, largestFlow, className = "") {
  return someEdges.map((edge) => drawCurve(edge, largestFlow, className)).filter((curve) => curve !== null);
}

/** Draw the edges that the slider selects. */
function drawEdgeCurves() {
  const drawn = edges.slice(0, Math.min(numShownEdges(), MAX_CURVES));
  edgeCurves.replaceChildren(...drawCurves(drawn, strongestFlow));
}

/** Draw the edges of what is chosen. */
function drawChosenCurves() {
  const curves = [];
  if (shown?.token !== undefined) {
    const into = inflowsOf(shown.token).slice(0, MAX_TOKEN_CURVES);
    const out = outflowsOf(shown.token).slice(0, MAX_TOKEN_CURVES);
    const largest = Math.max(into[0]?.flow ?? 0, out[0]?.flow ?? 0);
    curves.push(...drawCurves(into, largest, "in"), ...drawCurves(out, largest, "out"));
  }
  if (shown?.edge !== undefined) {
    const { source, target } = edgeParts[shown.edge];
    curves.push(...drawCurves([{ source, target, flow: 1 }], 1, "in"));
  }
  if (shown?.route !== undefined) curves.push(...drawRouteCurves(shown.route));
  chosenCurves.replaceChildren(...curves);
}

/** The curves of a route; while it is played, the part that is still to come has a class of its own. */
function drawRouteCurves(route) {
  const { path } = routes[route];
  const reached = player ? player.position : path.length - 1;
  const curves = [];
  for (let hop = 1; hop < path.length; hop++) {
    const source = path[hop - 1];
    const target = path[hop];
    if (boxes[source] === boxes[target]) continue;
    const className = hop > reached ? "route ahead" : "route";
    curves.push(shape("path", { d: curvePath(source, target), class: className }));
  }
  return curves;
}

/** Draw all curves anew, after the text has moved. */
function redraw() {
  const isVisible = !textHolder.hidden && textHolder.offsetParent !== null;
  if (!isVisible) return;
  measure();
  drawEdgeCurves();
  drawChosenCurves();
}

let isRedrawPlanned = false;

/** Redraw once before the next frame, however often the text moves until then. */
function planRedraw() {
  if (isRedrawPlanned) return;
  isRedrawPlanned = true;
  requestAnimationFrame(() => {
    isRedrawPlanned = false;
    redraw();
  });
}
