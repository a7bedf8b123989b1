// Curves between tokens, laid over the text: the backbone faintly, the chosen token's or route's own on top.
const MAX_ARCS = 4000; // beyond this a picture is one black mass, and a browser slows down
const FOCUS_ARCS = 14;
const canvas = shape("svg", { class: "arcs", "aria-hidden": "true" });
const everything = shape("g", { class: "all" }), focus = shape("g", { class: "focus" });
canvas.append(everything, focus);
const topArc = page.edges.length ? page.edges[0][2] : 1;
let boxes = []; // where each token stands; one in a folded section stands at the section's line

function measure() {
  const origin = holder.getBoundingClientRect();
  const placed = (element) => {
    const box = element.getClientRects()[0] ?? element.getBoundingClientRect();
    return { x: (box.left + box.right) / 2 - origin.left, top: box.top - origin.top, bottom: box.bottom - origin.top };
  };
  boxes = new Array(tokens.length);
  for (const section of sections) {
    const line = isOpen(section) ? null : placed(section.button);
    for (let i = section.start; i < section.stop; i++) boxes[i] = line ?? placed(views[i]);
  }
}
function curve(source, target) {
  const from = boxes[source], to = boxes[target], run = Math.abs(to.x - from.x);
  if (to.top - from.top < 5) { // on one line: over it
    const rise = Math.min(26, 7 + 0.12 * run);
    const lean = 0.2 * (to.x - from.x);
    return `M${from.x} ${from.top}C${from.x + lean} ${from.top - rise} ${to.x - lean} ${to.top - rise} ${to.x} ${to.top}`;
  }
  const bend = Math.max(12, Math.min(160, 0.5 * (to.top - from.bottom)));
  return `M${from.x} ${from.bottom}C${from.x} ${from.bottom + bend} ${to.x} ${to.top - bend} ${to.x} ${to.top}`;
}
/** One edge's curve, or null when both ends hide in one folded section. */
function arc([source, target, flow], top, className = "") {
  if (boxes[source] === boxes[target]) return null;
  const share = Math.sqrt(flow / top), faintest = className ? 0.35 : 0.12;
  const ink = { "stroke-width": (0.7 + 4.3 * share).toFixed(2), opacity: (faintest + (0.85 - faintest) * share).toFixed(2) };
  return shape("path", { d: curve(source, target), class: className, ...ink });
}
const arcsOf = (edges, top, className) => edges.map((edge) => arc(edge, top, className)).filter(Boolean);
function drawArcs() {
  everything.replaceChildren(...arcsOf(page.edges.slice(0, Math.min(shownEdges(), MAX_ARCS)), topArc));
}
function drawFocus() {
  const paths = [];
  if (shown?.token !== undefined) {
    const into = inflows(shown.token).slice(0, FOCUS_ARCS), out = outflows(shown.token).slice(0, FOCUS_ARCS);
    const top = Math.max(into[0]?.[2] ?? 0, out[0]?.[2] ?? 0);
    paths.push(...arcsOf(into, top, "in"), ...arcsOf(out, top, "out"));
  }
  if (shown?.route !== undefined) {
    const path = page.routes[shown.route][0], last = playing ? playing.position : path.length - 1;
    for (let i = 1; i < path.length; i++) {
      if (boxes[path[i - 1]] === boxes[path[i]]) continue;
      const className = `route${i > last ? " ahead" : ""}`;
      paths.push(shape("path", { d: curve(path[i - 1], path[i]), class: className }));
    }
  }
  focus.replaceChildren(...paths);
}
/** Curves keep to their tokens when the text reflows. */
function redraw() {
  if (holder.hidden || !holder.offsetParent) return;
  measure();
  drawArcs();
  drawFocus();
}
let waiting = false;
function follow() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; redraw(); });
}
