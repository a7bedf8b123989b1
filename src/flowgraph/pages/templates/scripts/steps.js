// The step view's content: which steps and bands are shown, what one of them says, and the words for what is not shown.
const [START, STOP, STEP_REGION, STEP_FLOW, ENTERS, ABSORBED] = [0, 1, 2, 3, 4, 5];
const STEPS_SHOWN = 40, BANDS_SHOWN = 120;
const steps = page.steps;
const stepText = (index) => textOf(steps.nodes[index][START], steps.nodes[index][STOP]);
const stepCards = new Map(), bandPaths = new Map(); // what stands for a shown step or band

/** The steps at the ends of the strongest bands, as many as asked for, in reading order, and the bands between them. */
function chosenSteps(limit) {
  const flowing = steps.nodes.map((node, index) => index).filter((index) => steps.nodes[index][STEP_FLOW] > 0);
  const kept = new Set(flowing.length <= limit ? flowing : []);
  for (const [source, target] of steps.edges) {
    const ends = [source, target].filter((index) => !kept.has(index));
    if (kept.size + ends.length <= limit) ends.forEach((index) => kept.add(index));
  }
  const between = steps.edges.map((edge, band) => band).filter((band) => kept.has(steps.edges[band][0]) && kept.has(steps.edges[band][1]));
  return { indices: [...kept].sort((a, b) => a - b), bands: between.slice(0, BANDS_SHOWN) };
}
const numFlowing = () => steps.nodes.reduce((sum, node) => sum + (node[STEP_FLOW] > 0), 0);
function sayWhatIsShown({ indices, bands }) {
  const carried = bands.reduce((sum, band) => sum + steps.edges[band][2], 0);
  const share = steps.edge_flow > 0 ? percent(Math.min(1, carried / steps.edge_flow)) : "none";
  const flowing = numFlowing(), idle = steps.nodes.length - flowing;
  const whole = indices.length === flowing && bands.length === steps.num_edges;
  const without = idle ? ` ${plural(idle, "step")} without flow left out.` : "";
  at("step-count").textContent = whole
    ? `All ${plural(indices.length, "step")} and ${plural(bands.length, "band")}.${without}`
    : `${count(indices.length)} of ${plural(flowing, "step")}, those of the strongest bands, and ${count(bands.length)} of ${plural(steps.num_edges, "band")}, ` +
      `with ${share} of all flow between steps; the rest is left out of the picture.${without}`;
}

// --- one step, one band, in the panel ------------------------------------------------------------------------
const stepName = (index, limit) => make("span", `chip ${steps.nodes[index][STEP_REGION] ?? CONTEXT}`, make("small", "", `${index + 1} `), make("bdi", "", shortened(stepText(index), limit)));
const stepButton = (index, limit = 34) => pressable("", () => select({ step: index }, true), stepName(index, limit));
function stepFlows(title, className, edges, end, whole) {
  if (!edges.length) return "";
  const list = make("ul", `flows ${className}`, ...edges.slice(0, LISTED).map((edge) => flowRow(edge[2], whole, stepButton(edge[end]))));
  return make("div", "", make("h3", className, title), list, edges.length > LISTED ? make("p", "hint", `and ${count(edges.length - LISTED)} weaker`) : "");
}
function excerpt(index) {
  const text = make("blockquote", `excerpt ${steps.nodes[index][STEP_REGION] ?? CONTEXT}`, shortened(stepText(index), 700));
  text.dir = "auto";
  return text;
}
function drawStepPanel(index) {
  const [start, stop, region, flow, enters, absorbed] = steps.nodes[index];
  const rows = [["throughput", percent(flow), "of the flow passes here"]];
  if (enters > 0) rows.push(["enters", percent(enters), "starts in this step"]);
  if (absorbed > 0) rows.push(["ends", percent(absorbed), "is absorbed in this step"]);
  detail.replaceChildren(
    make("div", "head", make("span", "name", `Step ${count(index + 1)} of ${count(steps.nodes.length)}`), releaseButton()),
    make("p", "hint", `${region ?? "outside question, reasoning and answer"} · tokens ${count(start)} to ${count(stop - 1)}`),
    excerpt(index),
    numberList(rows),
    pressable("small", () => goToStep(index), "Show it in the text"),
    stepFlows("Flow in from", "in", steps.edges.filter((edge) => edge[1] === index), 0, flow),
    stepFlows("Flow out to", "out", steps.edges.filter((edge) => edge[0] === index), 1, flow),
  );
}
function drawBandPanel(band) {
  const [source, target, flow] = steps.edges[band];
  const part = (whole) => (whole > 0 ? percent(Math.min(1, flow / whole)) : "–");
  detail.replaceChildren(
    make("div", "head", make("span", "name", `${percent(flow)} of the flow`), releaseButton()),
    make("p", "hint", `goes straight from step ${count(source + 1)} to step ${count(target + 1)}`),
    numberList([
      ["of the first", part(steps.nodes[source][STEP_FLOW]), "what passes through it"],
      ["of the second", part(steps.nodes[target][STEP_FLOW]), "what passes through it"],
    ]),
    make("h3", "", "From"), stepButton(source), excerpt(source),
    make("h3", "", "To"), stepButton(target), excerpt(target),
  );
}
function goToStep(index) {
  const start = steps.nodes[index][START];
  for (let i = start; i < steps.nodes[index][STOP]; i += SECTION) reveal(i);
  showView("tokens");
  rove(start);
  pinned = { step: index };
  show(pinned);
  bringIntoView(views[start], "center");
}
