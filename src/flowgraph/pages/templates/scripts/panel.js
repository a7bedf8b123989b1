// The panel: what one token does, in numbers and in words.
const LISTED = 5;
const panel = at("panel"), detail = at("detail");

/** Edges into and out of each token, strongest first because the page's list is. */
const flowsInto = new Map(), flowsOutOf = new Map();
for (const edge of page.edges) {
  for (const [flows, index] of [[flowsInto, edge[1]], [flowsOutOf, edge[0]]]) {
    if (flows.has(index)) flows.get(index).push(edge);
    else flows.set(index, [edge]);
  }
}
const inflows = (index) => flowsInto.get(index) ?? [], outflows = (index) => flowsOutOf.get(index) ?? [];

function flowList(title, className, edges, end, edgeOfPage, throughput) {
  if (throughput === 0) return null;
  const rows = edges.slice(0, LISTED).map((edge) => ({ share: edge[2], index: edge[end] }));
  const rest = throughput - edges.reduce((sum, edge) => sum + edge[2], 0);
  if (page.edges_left_out === 0 && rest > 0.002 * throughput) rows.unshift({ share: rest, label: edgeOfPage });
  const list = make("ul", `flows ${className}`);
  for (const { share, index, label } of rows) list.append(flowRow(share, throughput, label ? make("span", "hint", label) : clickable(index)));
  if (!rows.length) list.append(make("li", "none hint", "none among the strongest edges, which this page holds"));
  const more = edges.length - LISTED;
  const unlisted = page.edges_left_out ? "at least " : "";
  return make("div", "", make("h3", className, title), list, more > 0 ? make("p", "hint", `and ${unlisted}${count(more)} weaker`) : null);
}
function flowRow(share, whole, name) {
  const bar = make("div", "bar");
  bar.style.setProperty("--share", Math.min(1, share / whole));
  return make("li", "", make("span", "pct", percent(share)), make("div", "", bar), name);
}
function clickable(index) {
  const button = pressable("", () => select({ token: index }, true), chip(index));
  const peek = (on) => views[index]?.classList.toggle("peek", on);
  for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => peek(true));
  for (const event of ["pointerleave", "blur", "click"]) button.addEventListener(event, () => peek(false));
  return button;
}

const rank = (place) => `number ${place + 1} in the reasoning`;
/** What part a token plays: [word, explanation] pairs. */
function rolesOf(index) {
  const [, region, , h, , flow] = tokens[index];
  const found = [];
  const hub = page.hubs.findIndex((role) => role[0] === index), checkpoint = page.checkpoints.findIndex((role) => role[0] === index);
  if (hub >= 0) found.push(["hub", `${rank(hub)} by the flow that passes through`]);
  if (checkpoint >= 0) found.push(["checkpoint", `${rank(checkpoint)} at gathering flow from many places`]);
  if (h === 0) found.push(["leaf", "a dead end: nothing leads from here to the answer"]);
  else if (flow === 0 && strongest > 0) found.push(["idle", "no flow from the question arrives here"]);
  else if (region === "answer" && !outflows(index).length && !page.edges_left_out) found.push(["leaf", "the flow ends here, in the answer"]);
  else if (region === "question" && !inflows(index).length && !page.edges_left_out) found.push(["root", "flow only starts here"]);
  else if (!found.length && strongest > 0) found.push(["relay", "takes flow in and passes it on"]);
  return found;
}

/** Without a choice: what to do, and the edges worth looking at first. */
function drawInvitation() {
  const [listed, name] = view === "steps" ? [steps.edges, (index) => stepButton(index, 12)] : [page.edges, clickable];
  const edges = listed.slice(0, view === "steps" ? 6 : 10).map(([source, target, flow]) =>
    make("li", "", make("span", "pct", percent(flow)), make("span", "", name(source), make("span", "arrow", "→"), name(target))));
  const curves = edges.length ? " and its own curves in the text" : "";
  const hint = view === "steps"
    ? "Point at a step or a band, or tap it: its numbers and its text appear here. A click pins it, a second one goes to its text."
    : `Point at a token, tap it or reach it with the arrow keys: its numbers appear here${curves}. A click pins it, Escape releases it.`;
  detail.replaceChildren(
    make("h2", "", view === "steps" ? "One step at a time" : "One token at a time"),
    make("p", "hint", hint),
    ...(edges.length ? [make("h3", "", view === "steps" ? "Strongest bands" : "Strongest edges"), make("ul", "flows pairs", ...edges)] : []),
  );
}
function numberList(rows) {
  const list = make("dl", "numbers");
  for (const [name, value, note] of rows) list.append(make("dt", "", name), make("dd", "", value), make("dd", "note", note));
  return list;
}
const releaseButton = () => (pinned && !playing ? pressable("small", unpin, "unpin (Esc)") : null);
function drawTokenPanel(index) {
  const [text, region, generated, h, g, flow, joined] = tokens[index];
  const about = [`token ${index}`, region ?? "outside question, reasoning and answer", generated ? "generated" : "prompt"];
  if (joined) about.push("part of the character before");
  const roles = rolesOf(index).map(([word, meaning]) => make("li", "", make("b", "role", word), ` ${meaning}`));
  detail.replaceChildren(
    make("div", "head", make("bdi", "name", exact(text)), releaseButton()),
    make("p", "hint", about.join(" · ")),
    roles.length ? make("ul", "rolelist", ...roles) : "",
    numberList([
      ["throughput", percent(flow), "of the flow passes here"],
      ["h", number(h), "influence on the answer"],
      ["g", number(g), "influence that arrives"],
    ]),
    ...[
      flowList("Flow in from", "in", inflows(index), 0, "starts here", flow),
      flowList("Flow out to", "out", outflows(index), 1, "ends here", flow),
    ].filter(Boolean),
  );
}
function drawPanel(choice) {
  panel.classList.toggle("active", choice !== null);
  panel.classList.toggle("roomy", page.edges.length > 8); // a fixed height keeps the routes below from jumping
  if (choice?.token !== undefined) drawTokenPanel(choice.token);
  else if (choice?.route !== undefined && playing) drawTokenPanel(page.routes[playing.route][0][playing.position]);
  else if (choice?.step !== undefined) drawStepPanel(choice.step);
  else if (choice?.band !== undefined) drawBandPanel(choice.band);
  else drawInvitation();
}
