// The steps of the trace: which steps and bands the step view draws, and what the panel says about one of them.

const DEFAULT_STEPS = 40; // steps drawn of a long trace
const MAX_BANDS = 120; // bands drawn

/** The steps as named records, or null. A step spans tokens [start, stop); a band is the flow between two steps. */
const steps = page.steps && {
  nodes: page.steps.nodes.map(([start, stop, region, throughput, source, absorbed]) => ({
    start,
    stop,
    region,
    throughput,
    source, // share of the flow that enters here
    absorbed, // share of the flow that ends here
  })),
  edges: page.steps.edges.map(([source, target, flow]) => ({ source, target, flow })),
  numEdges: page.steps.num_edges,
  edgeFlow: page.steps.edge_flow, // flow of all bands, added up
};
const stepCards = new Map(); // the card of each drawn step
const bandPaths = new Map(); // the path of each drawn band

function stepText(step) {
  return textOf(steps.nodes[step].start, steps.nodes[step].stop);
}

function regionOfStep(step) {
  return steps.nodes[step].region ?? CONTEXT;
}

// --- what is drawn ---------------------------------------------------------------------------------------------

/** Indices of the steps with flow. */
function flowingSteps() {
  return [...steps.nodes.keys()].filter((step) => steps.nodes[step].throughput > 0);
}

/** At most `limit` steps, those at the ends of the strongest bands, in text order, and the bands between them. */
function stepsToDraw(limit) {
  const flowing = flowingSteps();
  const kept = new Set(flowing.length <= limit ? flowing : []);
  for (const { source, target } of steps.edges) {
    const added = [source, target].filter((step) => !kept.has(step));
    if (kept.size + added.length > limit) continue;
    for (const step of added) kept.add(step);
  }
  const between = [...steps.edges.keys()].filter((band) => {
    const { source, target } = steps.edges[band];
    return kept.has(source) && kept.has(target);
  });
  return { indices: [...kept].sort((a, b) => a - b), bands: between.slice(0, MAX_BANDS) };
}

/** Say how many steps and bands are drawn, and how much flow the bands carry. */
function describeDrawn({ indices, bands }) {
  const numFlowing = flowingSteps().length;
  const numIdle = steps.nodes.length - numFlowing;
  const withoutFlow = numIdle ? ` ${plural(numIdle, "step")} without flow left out.` : "";

  const isComplete = indices.length === numFlowing && bands.length === steps.numEdges;
  if (isComplete) {
    const all = `All ${plural(indices.length, "step")} and ${plural(bands.length, "band")}.`;
    byId("step-count").textContent = all + withoutFlow;
    return;
  }
  const drawnFlow = bands.reduce((sum, band) => sum + steps.edges[band].flow, 0);
  const share = steps.edgeFlow > 0 ? percent(Math.min(1, drawnFlow / steps.edgeFlow)) : "none";
  byId("step-count").textContent =
    `${count(indices.length)} of ${plural(numFlowing, "step")}, those of the strongest bands, ` +
    `and ${count(bands.length)} of ${plural(steps.numEdges, "band")}, ` +
    `with ${share} of all flow between steps; the rest is left out of the picture.${withoutFlow}`;
}

// --- one step in the panel -------------------------------------------------------------------------------------

/** A step in a list: its number and its first words. */
function stepButton(step, limit = 34) {
  const number = make("small", "", `${step + 1} `);
  const words = make("bdi", "", shortened(stepText(step), limit));
  return pressable("", () => pin({ step }), make("span", `chip ${regionOfStep(step)}`, number, words));
}

function stepFlowList(title, className, bands, end, throughput) {
  if (!bands.length) return "";
  const rows = bands.slice(0, MAX_LISTED).map((band) => flowRow(band.flow, throughput, stepButton(band[end])));
  const numUnlisted = bands.length - MAX_LISTED;
  const more = numUnlisted > 0 ? make("p", "hint", `and ${count(numUnlisted)} weaker`) : "";
  return make("div", "", make("h3", className, title), make("ul", `flows ${className}`, ...rows), more);
}

function excerpt(step) {
  const text = make("blockquote", `excerpt ${regionOfStep(step)}`, shortened(stepText(step), 700));
  text.dir = "auto";
  return text;
}

function drawStepPanel(step) {
  const { start, stop, region, throughput, source, absorbed } = steps.nodes[step];
  const rows = [["throughput", percent(throughput), "of the flow passes here"]];
  if (source > 0) rows.push(["enters", percent(source), "starts in this step"]);
  if (absorbed > 0) rows.push(["ends", percent(absorbed), "is absorbed in this step"]);

  const title = `Step ${count(step + 1)} of ${count(steps.nodes.length)}`;
  const place = region ?? OUTSIDE;
  const into = steps.edges.filter((band) => band.target === step);
  const out = steps.edges.filter((band) => band.source === step);
  detail.replaceChildren(
    make("div", "head", make("span", "name", title), unpinButton()),
    make("p", "hint", `${place} · tokens ${count(start)} to ${count(stop - 1)}`),
    excerpt(step),
    numberList(rows),
    pressable("small", () => goToStep(step), "Show it in the text"),
    stepFlowList("Flow in from", "in", into, "source", throughput),
    stepFlowList("Flow out to", "out", out, "target", throughput),
  );
}

// --- one band in the panel -------------------------------------------------------------------------------------

function drawBandPanel(band) {
  const { source, target, flow } = steps.edges[band];
  const shareOf = (step) => {
    const { throughput } = steps.nodes[step];
    return throughput > 0 ? percent(Math.min(1, flow / throughput)) : "–";
  };
  detail.replaceChildren(
    make("div", "head", make("span", "name", `${percent(flow)} of the flow`), unpinButton()),
    make("p", "hint", `goes straight from step ${count(source + 1)} to step ${count(target + 1)}`),
    numberList([
      ["of the first", shareOf(source), "what passes through it"],
      ["of the second", shareOf(target), "what passes through it"],
    ]),
    make("h3", "", "From"),
    stepButton(source),
    excerpt(source),
    make("h3", "", "To"),
    stepButton(target),
    excerpt(target),
  );
}

/** Go to the text of a step and keep its tokens marked. */
function goToStep(step) {
  const { start, stop } = steps.nodes[step];
  for (let index = start; index < stop; index += SECTION_TOKENS) reveal(index);
  showView("tokens");
  focusToken(start);
  pinned = { step };
  show(pinned);
  bringIntoView(tokenElements[start], "center");
}
