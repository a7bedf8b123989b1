// The picture of the step view: steps from left to right, as tall as their throughput, and bands as wide as their flow.
//
// d3-sankey places them. A band that passes over other steps gets a place of its own in each column that it crosses, so
// that bands run beside the steps between their ends.

const river = byId("river"); // absent if the trace has no steps
const RIVER_HEIGHT = 380; // pixels for all of the flow
const LABEL_HEIGHT = 22; // pixels for the percentages above the steps
const NODE_WIDTH = 14;
const MIN_COLUMN_WIDTH = 104;
const riverSvg = shape("svg", { "aria-hidden": "true" });

// --- layout ----------------------------------------------------------------------------------------------------

/** Nodes and links for d3-sankey: a node for each step, and one for each column that a band passes over. */
function sankeyGraph({ indices, bands }) {
  const columnOf = new Map(indices.map((step, column) => [step, column]));
  const nodes = indices.map((step, column) => ({ step, column, fixedValue: steps.nodes[step].throughput }));
  const links = [];

  // Links without flow between neighbours keep every step in its column.
  for (let column = 1; column < indices.length; column++) {
    links.push({ source: column - 1, target: column, value: 0 });
  }
  for (const band of bands) {
    const { source, target, flow } = steps.edges[band];
    let last = columnOf.get(source);
    for (let column = last + 1; column < columnOf.get(target); column++) {
      nodes.push({ column, fixedValue: flow });
      links.push({ source: last, target: nodes.length - 1, value: flow, band });
      last = nodes.length - 1;
    }
    links.push({ source: last, target: columnOf.get(target), value: flow, band });
  }
  return { nodes, links };
}

function layOut(graph, width) {
  const nodesInColumn = [];
  for (const { column } of graph.nodes) nodesInColumn[column] = (nodesInColumn[column] ?? 0) + 1;
  const numGaps = Math.max(1, ...nodesInColumn) - 1;
  // Gaps take at most 30 % of the height of a column.
  const gap = numGaps ? Math.min(16, (0.3 * RIVER_HEIGHT) / numGaps) : 0;
  const layout = d3
    .sankey()
    .nodeAlign((node) => node.column)
    .nodeWidth(NODE_WIDTH)
    .nodePadding(gap)
    .iterations(12)
    .extent([
      [0, LABEL_HEIGHT],
      [width, LABEL_HEIGHT + RIVER_HEIGHT],
    ]);
  return layout(graph);
}

// --- shapes ----------------------------------------------------------------------------------------------------

/** The path of a band through all its columns: level inside a column, an S between two. */
function bandPath(links) {
  let path = "";
  for (const { source, target, y0, y1 } of links) {
    const middle = (source.x1 + target.x0) / 2;
    path += `${path ? "L" : "M"}${source.x1} ${y0}C${middle} ${y0} ${middle} ${y1} ${target.x0} ${y1}`;
  }
  return path;
}

function drawBand(band, links) {
  const { source, target } = steps.edges[band];
  const width = Math.max(1, links[0].width).toFixed(2);
  const path = shape("path", { d: bandPath(links), class: "band", "stroke-width": width });
  path.dataset.band = band;
  path.dataset.ends = `${source + 1}-${target + 1}`;
  bandPaths.set(band, path);
  return path;
}

function drawNode(node) {
  const { throughput } = steps.nodes[node.step];
  const box = shape("rect", {
    x: node.x0,
    y: node.y0,
    width: NODE_WIDTH,
    height: Math.max(2, node.y1 - node.y0),
    class: `node ${regionOfStep(node.step)}`,
  });
  // Steps hold far more flow than tokens, so their colour is the throughput itself.
  setStrength(box, throughput);
  const label = shape("text", { x: (node.x0 + node.x1) / 2, y: node.y0 - 6 });
  label.append(percent(throughput));
  const group = shape("g");
  group.dataset.step = node.step;
  group.append(box, label);
  return group;
}

/** The card below a step: its number, its region and its first words. */
function drawCard(node, columnWidth) {
  const { step } = node;
  const { region, throughput } = steps.nodes[step];
  const text = shortened(stepText(step), 110);
  const words = make("span", "words", text);
  words.dir = "auto";
  const title = make("b", "", count(step + 1), make("small", "", regionOfStep(step)));
  const card = pressable(`step ${regionOfStep(step)}`, () => onStepClick(step), title, words);
  card.setAttribute("aria-pressed", "false");
  const place = region ?? OUTSIDE;
  card.setAttribute("aria-label", `Step ${step + 1}, ${place}, throughput ${percent(throughput)}: ${text}`);
  card.dataset.step = step;
  card.style.setProperty("--x", `${(node.x0 + node.x1) / 2}px`);
  card.style.setProperty("--pitch", `${columnWidth - 8}px`);
  stepCards.set(step, card);
  return card;
}

/** A first click pins the step, a second one goes to its text. */
function onStepClick(step) {
  if (isSame(pinned, { step })) goToStep(step);
  else pin({ step });
}

function drawRiver() {
  const drawn = stepsToDraw(Number(byId("step-limit").value));
  const numColumns = drawn.indices.length;
  const columnWidth = Math.max(MIN_COLUMN_WIDTH, river.clientWidth / numColumns);
  const width = columnWidth * numColumns;
  const { nodes, links } = layOut(sankeyGraph(drawn), width - columnWidth + NODE_WIDTH);

  // A band is one path over all its links; the links without a band only keep the columns apart.
  const linksByBand = new Map(drawn.bands.map((band) => [band, []]));
  for (const link of links) {
    if (link.band !== undefined) linksByBand.get(link.band).push(link);
  }
  stepCards.clear();
  bandPaths.clear();
  const bands = shape("g", { class: "bands" });
  for (const [band, bandLinks] of linksByBand) bands.append(drawBand(band, bandLinks));

  const stepNodes = nodes.filter((node) => node.step !== undefined);
  const shift = columnWidth / 2 - NODE_WIDTH / 2; // from the left edge to the middle of the first column
  const body = shape("g", { transform: `translate(${shift} 0)` });
  body.append(bands, ...stepNodes.map(drawNode));
  riverSvg.replaceChildren(body);
  riverSvg.setAttribute("width", width);
  riverSvg.setAttribute("height", LABEL_HEIGHT + RIVER_HEIGHT + 4);

  const cards = make("div", "cards", ...stepNodes.map((node) => drawCard(node, columnWidth)));
  cards.style.setProperty("--shift", `${shift}px`);
  cards.style.width = `${width}px`;
  river.replaceChildren(riverSvg, cards);

  describeDrawn(drawn);
  markRiver(shown);
  markStepHits();
}

/** Mark the chosen step with its bands, or the chosen band with its ends. */
function markRiver(selection) {
  if (!steps) return;
  const step = selection?.step;
  const band = selection?.band;
  riverSvg.classList.toggle("busy", step !== undefined || band !== undefined);
  for (const [drawnBand, path] of bandPaths) {
    const { source, target } = steps.edges[drawnBand];
    path.classList.toggle("in", target === step);
    path.classList.toggle("out", source === step);
    path.classList.toggle("on", drawnBand === band);
  }
  const marked = band === undefined ? [step] : [steps.edges[band].source, steps.edges[band].target];
  for (const [drawnStep, card] of stepCards) card.classList.toggle("on", marked.includes(drawnStep));
}

// --- events ----------------------------------------------------------------------------------------------------

/** The step or band of an event, or null. */
function riverSelection(event) {
  const element = event.target.closest("[data-step], [data-band]");
  if (!element) return null;
  const { step, band } = element.dataset;
  return step !== undefined ? { step: Number(step) } : { band: Number(band) };
}

function previewRiver(event) {
  const selection = riverSelection(event);
  if (selection && !isSame(shown, selection)) preview(selection);
}

function onRiverClick(event) {
  const selection = riverSelection(event);
  if (!selection) unpin();
  else if (selection.step !== undefined) onStepClick(selection.step);
  else togglePin(selection);
}

/** Arrow keys move from card to card. */
function onRiverKey(event) {
  const cards = [...stepCards.values()];
  const here = cards.indexOf(event.target);
  const places = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: cards.length - 1 };
  const next = places[event.key];
  if (here < 0 || next === undefined) return;
  cards[Math.max(0, Math.min(cards.length - 1, next))].focus();
  event.preventDefault();
}

/** Fill the list of limits: each that differs from the one before, up to the number of steps. */
function fillStepLimits() {
  const numSteps = steps.nodes.length;
  for (const limit of [20, DEFAULT_STEPS, 80, 160]) {
    const isTooLarge = limit > DEFAULT_STEPS / 2 && numSteps <= limit / 2;
    if (isTooLarge) continue;
    const option = make("option", "", count(limit));
    option.value = limit;
    option.selected = limit === DEFAULT_STEPS || numSteps <= limit;
    byId("step-limit").append(option);
  }
  byId("step-choice").hidden = numSteps <= 20;
}

function startSteps() {
  if (!steps) return;
  river.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse") previewRiver(event);
  });
  river.addEventListener("focusin", (event) => {
    if (event.target.matches(":focus-visible")) previewRiver(event);
  });
  river.addEventListener("pointerleave", endPreview);
  river.addEventListener("keydown", onRiverKey);
  riverSvg.addEventListener("click", onRiverClick);
  byId("step-limit").addEventListener("change", drawRiver);
  fillStepLimits();

  // The river is as wide as its holder, which has no width while the view is hidden.
  let drawnWidth = 0;
  const observer = new ResizeObserver(() => {
    const width = river.clientWidth;
    if (!width || width === drawnWidth) return;
    drawnWidth = width;
    drawRiver();
  });
  observer.observe(river);
}
