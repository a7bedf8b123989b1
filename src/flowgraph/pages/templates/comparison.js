const page = JSON.parse(document.getElementById("comparison").textContent);
const [TEXT, REGION, START, STOP, FLOW, PAIR] = [0, 1, 2, 3, 4, 5];
const [CHANGE] = [2];
const SIDES = ["A", "B"], CONTEXT = "context", STRONG = 0.3, MIN_ROW = 48;
const { units, pairs } = page;
const at = (id) => document.getElementById(id);
const holder = at("text"), panel = at("panel");

// --- small helpers: every string reaches the page through textContent -------------------------------------
function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null && child !== "")); // append makes text nodes of strings
  return element;
}
function percent(share) {
  const value = 100 * share;
  if (value === 0 || value > 99.95) return `${Math.round(value)} %`;
  return value < 0.01 ? "< 0.01 %" : `${value.toFixed(value < 1 ? 2 : 1)} %`;
}
function points(change) {
  const value = Math.abs(100 * change), shown = value >= 0.005 ? value.toFixed(value < 1 ? 2 : 1) : "0";
  return shown === "0" ? "0" : `${change > 0 ? "+" : "−"}${shown}`;
}

const cut = (text, most) => { const all = Array.from(text); return all.length > most ? `${all.slice(0, most - 1).join("")}…` : text; };
/** A unit's name in lists; one without letters, or of one character, brings the words before it. */
function named(side, index) {
  const text = units[side][index][TEXT], words = visible(text).trim() || "·".repeat(Math.max(1, text.length));
  let before = "";
  for (let i = index - 1; Array.from(words).length < 2 && before.trim().length < 10 && i >= Math.max(0, index - 6); i--) before = visible(units[side][i][TEXT]) + before;
  const context = Array.from(before.trim()).slice(-14).join("");
  return make("span", "", context && make("small", "", `${context} `), cut(words, 44));
}
const sideOf = (pair) => (pairs[pair][0] >= 0 ? 0 : 1);
function chip(pair) {
  const [i, j] = pairs[pair], replaced = i >= 0 && j >= 0 && units[0][i][TEXT] !== units[1][j][TEXT];
  const name = make("span", "chip", named(sideOf(pair), pairs[pair][sideOf(pair)]));
  return replaced ? make("span", "", name, make("span", "arrow", "⇄"), make("span", "chip", named(1, j))) : name;
}

// --- colour: signed square root of the difference, full at the largest ------------------------------------
const largest = pairs.reduce((top, pair) => Math.max(top, Math.abs(pair[CHANGE])), 0);
const level = (change) => (largest > 0 ? Math.sqrt(Math.abs(change) / largest) : 0);
function tint(element, change) {
  const strength = level(change);
  element.style.setProperty("--f", strength.toFixed(3));
  if (strength > 0) element.classList.add(change > 0 ? "plus" : "minus");
  if (strength >= STRONG) element.classList.add("strong");
}

// --- the texts: rows that stand for each other ------------------------------------------------------------
const views = [[], []];
const of = (pair, side) => (pairs[pair][side] >= 0 ? units[side][pairs[pair][side]][FLOW] : 0);
const textOf = (pair) => pairs[pair].slice(0, 2).map((index, side) => (index >= 0 ? units[side][index][TEXT] : ""));
function drawUnit(side, index, last) {
  const [text, region, start, stop, , pair] = units[side][index];
  const view = make("span", "t"), change = pairs[pair][CHANGE];
  tint(view, change);
  if (pairs[pair][1 - side] < 0) view.classList.add("alone");
  const lead = text.match(/^ */)[0], rest = text.slice(lead.length);
  if (rest === "") { view.classList.add("blank"); view.append("\u00a0"); }
  rest.split(/(\n+)/).forEach((part, k, parts) => {
    if (!part.startsWith("\n")) return void view.append(visible(part));
    view.append(make("span", "sign", "⏎".repeat(part.length)));
    if (parts.slice(k + 1).join("")) view.append(make("br"));
  });
  Object.assign(view.dataset, { side, index });
  view.tabIndex = -1;
  view.setAttribute("role", "button");
  view.setAttribute("aria-pressed", "false");
  const tokens = stop - start > 1 ? `tokens ${start} to ${stop - 1}` : `token ${start}`;
  const others = pairs[pair][1 - side] < 0 ? "no partner" : `A ${percent(of(pair, 0))}, B ${percent(of(pair, 1))}`;
  view.setAttribute("aria-label", `${exact(text)}, ${tokens} of ${SIDES[side]}, ${region ?? "outside the three parts"}, ${others}, difference ${points(change)} points`);
  views[side][index] = view;
  return [rest ? lead : make("wbr"), view, text.endsWith("\n") && !last ? make("br") : null];
}
/** Region of each pair; what lies in none, between two pairs of one region, stays with them. */
function regions() {
  const found = pairs.map((pair, k) => units[sideOf(k)][pair[sideOf(k)]][REGION]);
  let last = null, gap = [];
  found.forEach((region, k) => {
    if (!region) return void gap.push(k);
    if (region === last) for (const j of gap) found[j] = region;
    [last, gap] = [region, []];
  });
  return found.map((region) => region ?? CONTEXT);
}
/** A row ends where both texts end a line, or a sentence that is long enough. */
function endsRow(pair, length) {
  if (pairs[pair][0] < 0 || pairs[pair][1] < 0) return false;
  const texts = textOf(pair);
  if (texts.some((text) => text.includes("\n"))) return true;
  const following = pair + 1 < pairs.length ? textOf(pair + 1).join("") : "";
  return length >= MIN_ROW && /[.!?。！？]$/.test(texts[0]) && /^\s/.test(following);
}
function drawText() {
  const regionOf = regions();
  let block = null, row = [], length = 0;
  const finish = () => {
    if (!row.length) return;
    const cells = SIDES.map((name, side) => {
      const own = row.map((pair) => pairs[pair][side]).filter((index) => index >= 0);
      const cell = make("div", "cell", ...own.flatMap((index, k) => drawUnit(side, index, k === own.length - 1)).filter(Boolean));
      Object.assign(cell.dataset, { side: name });
      cell.dir = "auto";
      return cell;
    });
    block.append(make("div", "row", ...cells));
    [row, length] = [[], 0];
  };
  pairs.forEach((_, pair) => {
    if (pair === 0 || regionOf[pair] !== regionOf[pair - 1]) {
      finish();
      const region = regionOf[pair];
      block = make("section", `block ${region}`, make("h2", "", region[0].toUpperCase() + region.slice(1)));
      holder.append(block);
    }
    row.push(pair);
    length += Math.max(...textOf(pair).map((text) => text.length));
    if (endsRow(pair, length)) finish();
  });
  finish();
  for (const side of [0, 1]) if (views[side].length) views[side][0].tabIndex = 0;
}
function drawLegend() {
  const steps = 25, middle = (steps - 1) / 2, ramp = make("span", "ramp");
  for (let k = 0; k < steps; k++) {
    const step = make("i"), value = (k - middle) / middle;
    tint(step, Math.sign(value) * value * value * largest);
    ramp.append(step);
  }
  for (const [column, change] of [[1, -largest], [10, 0], [19, largest]]) {
    const label = make("b", "", points(change));
    label.style.gridColumn = `${column} / span 7`;
    ramp.append(label);
  }
  const alone = pairs.some((pair) => pair[0] < 0 || pair[1] < 0);
  const bars = ["minus", "plus"].map((name) => { const example = make("span", `t strong ${name}`, name === "plus" ? "+" : "−"); example.style.setProperty("--f", 0.6); return example; });
  at("legend").append(...(largest > 0 ? [
    make("span", "key", make("b", "a", "− more in A"), ramp, make("b", "b", "+ more in B")),
    make("span", "", "difference of throughput, in points of 100 % (square-root scale)"),
    make("span", "key", bars[0], "bar below: less in B", bars[1], "bar above: more in B"),
  ] : [make("span", "", "No difference anywhere: both flows are the same.")]),
  ...(alone ? [make("span", "key", make("span", "t alone", "dotted"), "no partner in the other text")] : []));
}

// --- what is pointed at: shown for a moment, or pinned ----------------------------------------------------
let shown = null, pinned = null;
const marked = [];
const mark = (element, name) => { element.classList.add(name); marked.push([element, name]); };
function show(choice) {
  shown = choice;
  for (const [element, name] of marked.splice(0)) element.classList.remove(name);
  if (choice?.pair !== undefined) pairs[choice.pair].slice(0, 2).forEach((index, side) => {
    if (index >= 0) mark(views[side][index], side === choice.side ? "on" : "partner");
  });
  if (choice?.route !== undefined) for (const pair of page.routes[choice.route][0]) pairs[pair].slice(0, 2).forEach((index, side) => { if (index >= 0) mark(views[side][index], "route"); });
  drawPanel(choice);
  for (const element of document.querySelectorAll('[aria-pressed="true"]')) element.setAttribute("aria-pressed", "false");
  if (pinned?.pair !== undefined) views[pinned.side][pairs[pinned.pair][pinned.side]].setAttribute("aria-pressed", "true");
  if (pinned?.route !== undefined) routeButtons[pinned.route].setAttribute("aria-pressed", "true");
}
function drawPanel(choice) {
  const inside = make("div", "inside");
  const number = (className, label, value) => inside.append(make("span", `number ${className}`, make("small", "", `${label} `), value));
  if (choice?.pair !== undefined) {
    const { pair, side } = choice, both = pairs[pair].slice(0, 2);
    const names = both.map((index, k) => (index >= 0 ? exact(units[k][index][TEXT]) : null));
    inside.append(make("span", "name", names[0] === names[1] || !names[1 - side] ? cut(names[side], 90) : `${cut(names[0], 60)} ⇄ ${cut(names[1], 60)}`));
    both.forEach((index, k) => number("ab"[k], SIDES[k], index >= 0 ? percent(units[k][index][FLOW]) : "no partner"));
    number(pairs[pair][CHANGE] > 0 ? "b" : "a", "B − A", `${points(pairs[pair][CHANGE])} points`);
    const places = both.map((index, k) => {
      if (index < 0) return null;
      const [, region, start, stop] = units[k][index];
      return `${SIDES[k]}: ${stop - start > 1 ? `tokens ${start}–${stop - 1}` : `token ${start}`}, ${region ?? "context"}`;
    });
    if (pinned) inside.append(release());
    inside.append(make("span", "hint", `share of the flow that passes here · ${places.filter(Boolean).join(" · ")}`));
  } else if (choice?.route !== undefined) {
    const [path, first, second] = page.routes[choice.route];
    inside.append(make("span", "name", `route of ${path.length - 1} ${path.length === 2 ? "hop" : "hops"}`));
    number("a", "width in A", percent(first));
    number("b", "width in B", percent(second));
    if (pinned) inside.append(release());
  } else {
    inside.append(make("span", "hint", "Point at a token, tap it, or reach it with Tab and the arrow keys: its numbers appear here and its partner is framed in the other text. A click pins it, Escape releases it."));
  }
  panel.replaceChildren(inside);
}
function release() {
  const button = make("button", "release", "unpin (Esc)");
  button.addEventListener("click", unpin);
  return button;
}
function select(choice, pin) {
  if (pinned && !pin) return;
  if (pin) pinned = choice;
  show(choice);
}
function unpin() {
  pinned = null;
  show(null);
}
const same = (one, other) => one?.pair === other.pair && one?.side === other.side && one?.route === other.route;
const toggle = (choice) => (same(pinned, choice) ? unpin() : select(choice, true));

// --- pointer and keyboard ---------------------------------------------------------------------------------
const current = [0, 0];
/** One stop of Tab in each text; that of the other text follows to the partner. */
function rove(side, index, focusIt = true) {
  const move = (where, to) => { views[where][current[where]].tabIndex = -1; current[where] = to; views[where][to].tabIndex = 0; };
  move(side, index);
  const partner = pairs[units[side][index][PAIR]][1 - side];
  if (partner >= 0) move(1 - side, partner);
  if (focusIt) views[side][index].focus();
}
function choiceOf(event) {
  const view = event.target.closest(".t");
  if (!view || !view.dataset.side) return null;
  const side = Number(view.dataset.side), index = Number(view.dataset.index);
  return { pair: units[side][index][PAIR], side, index };
}
/** The unit nearest in the closest line above (-1) or below (1) in the same text. */
function vertical(side, direction) {
  const boxes = views[side].map((view) => view.getClientRects()[0] ?? view.getBoundingClientRect());
  const middle = (box) => (box.left + box.right) / 2, here = boxes[current[side]];
  const distance = (box) => direction * (box.top - here.top);
  const line = boxes.reduce((best, box) => (distance(box) > 8 ? Math.min(best, distance(box)) : best), Infinity);
  let best = current[side], nearest = Infinity;
  boxes.forEach((box, k) => {
    const off = Math.abs(middle(box) - middle(here));
    if (Math.abs(distance(box) - line) < 8 && off < nearest) [best, nearest] = [k, off];
  });
  return best;
}
holder.addEventListener("pointerover", (event) => {
  const choice = choiceOf(event);
  if (event.pointerType === "mouse" && choice && !same(shown, choice)) select(choice, false);
});
holder.addEventListener("pointerleave", () => { if (!pinned) show(null); });
holder.addEventListener("focusin", (event) => {
  const choice = choiceOf(event);
  if (!choice || !event.target.matches(":focus-visible")) return;
  rove(choice.side, choice.index, false);
  select(choice, false);
});
holder.addEventListener("click", (event) => {
  const choice = choiceOf(event);
  if (!choice) return unpin();
  rove(choice.side, choice.index);
  toggle(choice);
});
holder.addEventListener("keydown", (event) => {
  const choice = choiceOf(event);
  if (!choice) return;
  const { side, index } = choice, last = views[side].length - 1;
  const moves = {
    ArrowRight: () => Math.min(last, index + 1), ArrowLeft: () => Math.max(0, index - 1),
    ArrowDown: () => vertical(side, 1), ArrowUp: () => vertical(side, -1), Home: () => 0, End: () => last,
  };
  if (Object.hasOwn(moves, event.key)) rove(side, moves[event.key]());
  else if (event.key === "Enter" || event.key === " ") toggle(choice);
  else return;
  event.preventDefault();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") unpin(); });

// --- tables -----------------------------------------------------------------------------------------------
function clickable(pair) {
  const side = sideOf(pair), view = () => views[side][pairs[pair][side]], button = make("button", "", chip(pair));
  button.addEventListener("click", () => {
    rove(side, pairs[pair][side], false);
    select({ pair, side }, true);
    view().scrollIntoView({ block: "center" });
  });
  for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => view().classList.add("peek"));
  for (const event of ["pointerleave", "blur", "click"]) button.addEventListener(event, () => view().classList.remove("peek"));
  return button;
}
const headRow = (...names) => make("thead", "", make("tr", "", ...names.map((name, k) => make("th", k ? "" : "what", name))));
function drawTable(title, listed) {
  const section = make("section", "", make("h2", "", title));
  const rows = listed.map((pair) => make("tr", "", make("td", "what", clickable(pair)),
    ...[0, 1].map((side) => make("td", "", pairs[pair][side] >= 0 ? percent(of(pair, side)) : "–")), make("td", "", points(pairs[pair][CHANGE]))));
  if (rows.length) section.append(make("table", "", headRow(page.by === "steps" ? "step" : "token", "A", "B", "B − A"), make("tbody", "", ...rows)));
  else section.append(make("p", "hint", "nothing"));
  at("tables").append(section);
}
const routeButtons = page.routes.map(([path], route) => {
  const steps = path.flatMap((pair, k) => [k ? make("span", "arrow", "→") : null, chip(pair)]).filter(Boolean);
  const button = make("button", "", ...steps);
  button.setAttribute("aria-pressed", "false");
  for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => select({ route }, false));
  for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => { if (!pinned) show(null); });
  button.addEventListener("click", () => toggle({ route }));
  return button;
});
function drawRoutes() {
  if (!routeButtons.length) return;
  const rows = page.routes.map(([, first, second, shared], route) => make("tr", "",
    make("td", "", percent(first)), make("td", "", percent(second)),
    make("td", `kind ${shared ? "" : first > second ? "a" : "b"}`, shared ? "both" : `${Math.min(first, second) > 0 ? "more" : "only"} in ${first > second ? "A" : "B"}`),
    make("td", "what", routeButtons[route])));
  const head = make("thead", "", make("tr", "", make("th", "", "in A"), make("th", "", "in B"), make("th", ""), make("th", "what", "route")));
  at("routes").append(make("table", "", head, make("tbody", "", ...rows)));
}

drawLegend();
drawText();
drawTable("More in B", page.gains);
drawTable("More in A", page.losses);
drawRoutes();
drawPanel(null);
