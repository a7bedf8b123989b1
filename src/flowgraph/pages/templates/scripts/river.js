// The step view's picture: steps from left to right, each as tall as its throughput, bands as wide as their flow.
// d3-sankey places them. A band that passes over other steps gets a place of its own in each column it crosses, so
// that bands run beside the steps between, never through them.
const river = at("river"), RIVER_HEIGHT = 380, LABEL = 22, NODE = 14, COLUMN = 104;
const riverSvg = shape("svg", { "aria-hidden": "true" });

function riverGraph({ indices, bands }) {
  const columnOf = new Map(indices.map((index, column) => [index, column]));
  const nodes = indices.map((index, column) => ({ step: index, column, fixedValue: steps.nodes[index][STEP_FLOW] }));
  const links = [];
  for (let i = 1; i < indices.length; i++) links.push({ source: i - 1, target: i, value: 0 }); // keeps every column in place
  for (const band of bands) {
    const [from, to, flow] = steps.edges[band];
    let last = columnOf.get(from);
    for (let column = last + 1; column < columnOf.get(to); column++) {
      nodes.push({ column, fixedValue: flow });
      links.push({ source: last, target: nodes.length - 1, value: flow, band });
      last = nodes.length - 1;
    }
    links.push({ source: last, target: columnOf.get(to), value: flow, band });
  }
  return { nodes, links };
}
function placeRiver(graph, width) {
  const crowd = [];
  for (const { column } of graph.nodes) crowd[column] = (crowd[column] ?? 0) + 1;
  const gaps = Math.max(1, ...crowd) - 1;
  return d3.sankey()
    .nodeAlign((node) => node.column)
    .nodeWidth(NODE)
    .nodePadding(gaps ? Math.min(16, (0.3 * RIVER_HEIGHT) / gaps) : 0) // at least 70 % of the height is flow
    .iterations(12)
    .extent([[0, LABEL], [width, LABEL + RIVER_HEIGHT]])(graph);
}
/** A band through all its columns: level inside a column, an S between two. */
function bandLine(links) {
  let line = "";
  for (const { source, target, y0, y1 } of links) {
    const middle = (source.x1 + target.x0) / 2;
    line += `${line ? "L" : "M"}${source.x1} ${y0}C${middle} ${y0} ${middle} ${y1} ${target.x0} ${y1}`;
  }
  return line;
}
function drawBand(band, links) {
  const [source, target] = steps.edges[band];
  const path = shape("path", { d: bandLine(links), class: "band", "stroke-width": Math.max(1, links[0].width).toFixed(2) });
  path.dataset.band = band;
  path.dataset.ends = `${source + 1}-${target + 1}`;
  bandPaths.set(band, path);
  return path;
}
function drawNode(node) {
  const [, , region, flow] = steps.nodes[node.step];
  const height = Math.max(2, node.y1 - node.y0);
  const box = shape("rect", { x: node.x0, y: node.y0, width: NODE, height, class: `node ${region ?? CONTEXT}` });
  box.style.setProperty("--f", flow.toFixed(3)); // a scale of its own: a step holds far more than a token
  const label = shape("text", { x: (node.x0 + node.x1) / 2, y: node.y0 - 6 });
  label.append(percent(flow));
  const group = shape("g");
  group.dataset.step = node.step;
  group.append(box, label);
  return group;
}
function drawCard(node, pitch) {
  const [, , region, flow] = steps.nodes[node.step];
  const name = `Step ${node.step + 1}, ${region ?? "outside the three parts"}, throughput ${percent(flow)}`;
  const words = make("span", "words", shortened(stepText(node.step), 110));
  words.dir = "auto";
  const card = pressable(`step ${region ?? CONTEXT}`, () => pickStep(node.step), make("b", "", count(node.step + 1), make("small", "", region ?? CONTEXT)), words);
  card.setAttribute("aria-pressed", "false");
  card.setAttribute("aria-label", `${name}: ${shortened(stepText(node.step), 110)}`);
  card.dataset.step = node.step;
  card.style.setProperty("--x", `${(node.x0 + node.x1) / 2}px`);
  card.style.setProperty("--pitch", `${pitch - 8}px`);
  stepCards.set(node.step, card);
  return card;
}
/** A first click keeps the step's numbers in the panel, a second one goes to its text. */
const pickStep = (index) => (same(pinned, { step: index }) ? goToStep(index) : select({ step: index }, true));

function drawRiver() {
  const chosen = chosenSteps(Number(at("step-limit").value));
  const columns = chosen.indices.length;
  const pitch = Math.max(COLUMN, river.clientWidth / columns), width = pitch * columns;
  const { nodes, links } = placeRiver(riverGraph(chosen), width - pitch + NODE);
  const byBand = new Map(chosen.bands.map((band) => [band, []]));
  for (const link of links) if (link.band !== undefined) byBand.get(link.band).push(link);
  stepCards.clear();
  bandPaths.clear();
  const bands = shape("g", { class: "bands" });
  bands.append(...[...byBand].map(([band, path]) => drawBand(band, path)));
  const real = nodes.filter((node) => node.step !== undefined);
  const body = shape("g", { transform: `translate(${pitch / 2 - NODE / 2} 0)` });
  body.append(bands, ...real.map(drawNode));
  riverSvg.replaceChildren(body);
  riverSvg.setAttribute("width", width);
  riverSvg.setAttribute("height", LABEL + RIVER_HEIGHT + 4);
  const cards = make("div", "cards", ...real.map((node) => drawCard(node, pitch)));
  cards.style.setProperty("--shift", `${pitch / 2 - NODE / 2}px`);
  cards.style.width = `${width}px`;
  river.replaceChildren(riverSvg, cards);
  sayWhatIsShown(chosen);
  markRiver(shown);
  markStepHits();
}

/** Light up what belongs to the chosen step or band. */
function markRiver(choice) {
  if (!steps) return;
  riverSvg.classList.toggle("busy", choice?.step !== undefined || choice?.band !== undefined);
  for (const [band, path] of bandPaths) {
    const [source, target] = steps.edges[band];
    path.classList.toggle("in", target === choice?.step);
    path.classList.toggle("out", source === choice?.step);
    path.classList.toggle("on", band === choice?.band);
  }
  const lit = choice?.band === undefined ? [choice?.step] : steps.edges[choice.band].slice(0, 2);
  for (const [step, card] of stepCards) card.classList.toggle("on", lit.includes(step));
}

function startSteps() {
  if (!steps) return;
  const target = (event) => {
    const found = event.target.closest("[data-step], [data-band]");
    if (!found) return null;
    return found.dataset.step !== undefined ? { step: Number(found.dataset.step) } : { band: Number(found.dataset.band) };
  };
  const point = (event) => {
    const choice = target(event);
    if (choice && !same(shown, choice)) select(choice, false);
  };
  river.addEventListener("pointerover", (event) => { if (event.pointerType === "mouse") point(event); });
  river.addEventListener("focusin", (event) => { if (event.target.matches(":focus-visible")) point(event); });
  river.addEventListener("pointerleave", unhover);
  riverSvg.addEventListener("click", (event) => {
    const choice = target(event);
    if (!choice) unpin();
    else if (choice.step !== undefined) pickStep(choice.step);
    else toggle(choice);
  });
  river.addEventListener("keydown", (event) => {
    const cards = [...stepCards.values()], here = cards.indexOf(event.target);
    const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: cards.length - 1 }[event.key];
    if (here < 0 || next === undefined) return;
    cards[Math.max(0, Math.min(cards.length - 1, next))].focus();
    event.preventDefault();
  });
  at("step-limit").addEventListener("change", drawRiver);
  for (const limit of [20, STEPS_SHOWN, 80, 160]) {
    if (limit > STEPS_SHOWN / 2 && steps.nodes.length <= limit / 2) continue;
    const option = make("option", "", count(limit));
    option.value = limit;
    option.selected = limit === STEPS_SHOWN || steps.nodes.length <= limit;
    at("step-limit").append(option);
  }
  at("step-choice").hidden = steps.nodes.length <= 20;
  let width = 0;
  new ResizeObserver(() => {
    if (!river.clientWidth || river.clientWidth === width) return;
    width = river.clientWidth;
    drawRiver();
  }).observe(river);
}
