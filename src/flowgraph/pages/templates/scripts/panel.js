// The panel: the numbers, roles and edges of one token; without a choice, a hint and the strongest edges.

const MAX_LISTED = 5; // edges listed for each direction
const panel = byId("panel");
const detail = byId("detail");

// --- edges of one token ----------------------------------------------------------------------------------------

// Edges by target and by source. Their order is that of the page: strongest first.
const edgesByTarget = groupedBy(edges, (edge) => edge.target);
const edgesBySource = groupedBy(edges, (edge) => edge.source);

/** Records by their key, in their order. */
function groupedBy(records, keyOf) {
  const groups = new Map();
  for (const record of records) {
    const key = keyOf(record);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(record);
  }
  return groups;
}

function inflowsOf(token) {
  return edgesByTarget.get(token) ?? [];
}

function outflowsOf(token) {
  return edgesBySource.get(token) ?? [];
}

/**
 * The strongest edges of a token in one direction, each with its share of the flow and a bar.
 *
 * `end` names the other end of an edge, "source" or "target"; `boundary` says in words what happens to the rest of the
 * throughput, which starts or ends at the token.
 */
function flowList({ title, className, tokenEdges, end, boundary, throughput }) {
  if (throughput === 0) return "";
  const rows = tokenEdges.slice(0, MAX_LISTED).map((edge) => {
    const name = make("span", "", tokenButton(edge[end]), headsButton(edge.source, edge.target));
    return flowRow(edge.flow, throughput, name);
  });

  // The rest is known only if the page holds every edge.
  const onEdges = tokenEdges.reduce((sum, edge) => sum + edge.flow, 0);
  const rest = throughput - onEdges;
  const isComplete = page.edges_left_out === 0;
  if (isComplete && rest > 0.002 * throughput) {
    rows.unshift(flowRow(rest, throughput, make("span", "hint", boundary)));
  }
  if (!rows.length) {
    rows.push(make("li", "none hint", "none among the strongest edges, which this page holds"));
  }

  const numUnlisted = tokenEdges.length - MAX_LISTED;
  const atLeast = isComplete ? "" : "at least ";
  const more = numUnlisted > 0 ? make("p", "hint", `and ${atLeast}${count(numUnlisted)} weaker`) : null;
  return make("div", "", make("h3", className, title), make("ul", `flows ${className}`, ...rows), more);
}

/** One line of a list of edges: percentage, bar, and the other end. */
function flowRow(flow, throughput, name) {
  const bar = make("div", "bar");
  bar.style.setProperty("--share", Math.min(1, flow / throughput));
  return make("li", "", make("span", "pct", percent(flow)), make("div", "", bar), name);
}

/** A token in a list: pointing at it frames the token in the text, a click chooses it. */
function tokenButton(index) {
  const button = pressable("", () => pin({ token: index }), chip(index));
  const setFrame = (isFramed) => tokenElements[index]?.classList.toggle("peek", isFramed);
  listen(button, ["pointerenter", "focus"], () => setFrame(true));
  listen(button, ["pointerleave", "blur", "click"], () => setFrame(false));
  return button;
}

// --- roles -----------------------------------------------------------------------------------------------------

/** The roles of a token as [name, explanation]. */
function rolesOf(index) {
  const roles = [];
  const number = (rank) => `number ${rank + 1} in the reasoning`;
  const hubRank = rankIn(hubs, index);
  const checkpointRank = rankIn(checkpoints, index);
  if (hubRank >= 0) roles.push(["hub", `${number(hubRank)} by the flow that passes through`]);
  if (checkpointRank >= 0) {
    roles.push(["checkpoint", `${number(checkpointRank)} at gathering flow from many places`]);
  }
  const flowRole = flowRoleOf(index);
  if (flowRole) roles.push(flowRole);
  else if (!roles.length && hasFlow) roles.push(["relay", "takes flow in and passes it on"]);
  return roles;
}

/** Place of a token in a list of hubs or checkpoints, or -1. */
function rankIn(records, index) {
  return records.findIndex((record) => record.token === index);
}

/** The role of a token at an end of the flow or outside it, or null. */
function flowRoleOf(index) {
  const { region, h, throughput } = tokens[index];
  if (h === 0) return ["leaf", "a dead end: nothing leads from here to the answer"];
  if (throughput === 0 && hasFlow) return ["idle", "no flow from the question arrives here"];
  // Only a page with every edge can tell that a token has none in one direction.
  if (page.edges_left_out > 0) return null;
  if (region === "answer" && !outflowsOf(index).length) return ["leaf", "the flow ends here, in the answer"];
  if (region === "question" && !inflowsOf(index).length) return ["root", "flow only starts here"];
  return null;
}

// --- contents --------------------------------------------------------------------------------------------------

/** A potential with three decimals, or as a power of ten if it is small. */
function potential(value) {
  if (value === null) return "–";
  const isSmall = value !== 0 && value < 0.001;
  return isSmall ? value.toExponential(1) : value.toFixed(3);
}

/** Rows of [name, value, note]. */
function numberList(rows) {
  const list = make("dl", "numbers");
  for (const [name, value, note] of rows) {
    list.append(make("dt", "", name), make("dd", "", value), make("dd", "note", note));
  }
  return list;
}

function unpinButton() {
  const isPinned = pinned !== null && player === null;
  return isPinned ? pressable("small", unpin, "unpin (Esc)") : null;
}

/** Without a choice: what to do, and the strongest edges of the view. */
function drawHint() {
  const isSteps = view === "steps";
  const listed = isSteps ? steps.edges.slice(0, 6) : edges.slice(0, 10);
  const nameEnd = isSteps ? (index) => stepButton(index, 12) : tokenButton;
  const rows = listed.map(({ source, target, flow }) => {
    const heads = isSteps ? null : headsButton(source, target);
    const ends = make("span", "", nameEnd(source), make("span", "arrow", "→"), nameEnd(target), heads);
    return make("li", "", make("span", "pct", percent(flow)), ends);
  });

  const curves = rows.length ? " and its own curves in the text" : "";
  const tokenHint =
    `Point at a token, tap it or reach it with the arrow keys: its numbers appear here${curves}. ` +
    "A click pins it, Escape releases it.";
  const stepHint =
    "Point at a step or a band, or tap it: its numbers and its text appear here. " +
    "A click pins it, a second one goes to its text.";
  detail.replaceChildren(
    make("h2", "", isSteps ? "One step at a time" : "One token at a time"),
    make("p", "hint", isSteps ? stepHint : tokenHint),
  );
  const title = isSteps ? "Strongest bands" : "Strongest edges";
  if (rows.length) detail.append(make("h3", "", title), make("ul", "flows pairs", ...rows));
  if (!isSteps) detail.append(strongestRelevanceEdges());
}

/** The numbers of a token: those of the flow, and every other score. */
function numbersOf(index) {
  const { h, g, throughput } = tokens[index];
  const rows = [];
  for (const { name, note, signed, values } of colourings) {
    if (values) rows.push([name, signed ? signedPercent(values[index]) : percent(values[index]), note.split(";")[0]]);
  }
  if (!hasFlow && rows.length) return rows;
  return [
    ["throughput", percent(throughput), "of the flow passes here: h · g"],
    ["h", potential(h), "influence on the answer, over all paths"],
    ["g", potential(g), "influence that arrives from the question"],
    ...rows,
  ];
}

function drawTokenPanel(index) {
  const { text, region, generated, throughput, joined } = tokens[index];
  const facts = [`token ${index}`, region ?? OUTSIDE, generated ? "generated" : "prompt"];
  if (joined) facts.push("part of the character before");
  const roles = rolesOf(index).map(([name, meaning]) => make("li", "", make("b", "role", name), ` ${meaning}`));

  const parts = [
    make("div", "head", make("bdi", "name", exact(text)), unpinButton()),
    make("p", "hint", facts.join(" · ")),
    roles.length ? make("ul", "rolelist", ...roles) : "",
    numberList(numbersOf(index)),
    flowList({
      title: "Flow in from",
      className: "in",
      tokenEdges: inflowsOf(index),
      end: "source",
      boundary: "starts here",
      throughput,
    }),
    flowList({
      title: "Flow out to",
      className: "out",
      tokenEdges: outflowsOf(index),
      end: "target",
      boundary: "ends here",
      throughput,
    }),
    ...relevanceEdgesOf(index),
  ];
  detail.replaceChildren(...parts.filter((part) => part !== ""));
}

function drawPanel(selection) {
  panel.classList.toggle("active", selection !== null);
  // A fixed height keeps the routes below the panel in place when the choice changes.
  panel.classList.toggle("roomy", edges.length > 8);

  if (selection?.token !== undefined) drawTokenPanel(selection.token);
  else if (selection?.route !== undefined && player) drawTokenPanel(routes[player.route].path[player.position]);
  else if (selection?.step !== undefined) drawStepPanel(selection.step);
  else if (selection?.band !== undefined) drawBandPanel(selection.band);
  else if (selection?.edge !== undefined) drawEdgePanel(selection.edge);
  else if (selection?.part !== undefined) drawPartPanel(selection.part);
  else drawHint();
}
