// The comparison page: two texts side by side, coloured by the difference of throughput; tables; routes.
//
// A unit is a token or a step of one text. A pair holds the units of both texts that correspond, or one unit alone.

const SIDES = ["A", "B"]; // index 0 and 1 everywhere
const STRONG = 0.3; // place on the colour scale from which on a unit has a bar
const MIN_ROW_LENGTH = 48; // characters from which on a row may end with a sentence
const MAX_NAME = 44; // characters of a unit's name

const units = page.units.map((side) =>
  side.map(([text, region, start, stop, throughput, pair]) => ({ text, region, start, stop, throughput, pair })),
);
/** Records {members, change}: the unit of each text, null for none, and the throughput of B minus that of A. */
const pairs = page.pairs.map(([first, second, change]) => ({
  members: [first, second].map((unit) => (unit >= 0 ? unit : null)),
  change,
}));
/** Records {path, widths, isShared}: the pairs of a route, and how much flow it could carry in each text. */
const routes = page.routes.map(([path, first, second, shared]) => ({
  path,
  widths: [first, second],
  isShared: shared === 1,
}));

const textHolder = byId("text");
const panel = byId("panel");
const unitElements = [[], []]; // the element of each unit of each text

// --- pairs -----------------------------------------------------------------------------------------------------

/** The text that names a pair: A if it has a unit there, else B. */
function namingSide(pair) {
  return pairs[pair].members[0] !== null ? 0 : 1;
}

function unitOf(pair, side) {
  const member = pairs[pair].members[side];
  return member === null ? null : units[side][member];
}

function throughputOf(pair, side) {
  return unitOf(pair, side)?.throughput ?? 0;
}

function textsOf(pair) {
  return [0, 1].map((side) => unitOf(pair, side)?.text ?? "");
}

function hasPartner(pair) {
  return !pairs[pair].members.includes(null);
}

/** A difference in points of 100 %, with its sign. */
function points(change) {
  const size = Math.abs(100 * change);
  if (size < 0.005) return "0";
  return `${change > 0 ? "+" : "−"}${size.toFixed(size < 1 ? 2 : 1)}`;
}

/** "token 3", or "tokens 3 to 7" with the given word between the numbers. */
function tokenRange({ start, stop }, between) {
  return stop - start > 1 ? `tokens ${start}${between}${stop - 1}` : `token ${start}`;
}

// --- names of units --------------------------------------------------------------------------------------------

/** A unit's name in lists; a name of one character is preceded by the text before the unit. */
function nameOf(side, index) {
  const { text } = units[side][index];
  const name = visible(text).trim() || "␣".repeat(Math.max(1, text.length));
  const needsContext = Array.from(name).length < 2;

  let before = "";
  const first = Math.max(0, index - 6);
  for (let place = index - 1; needsContext && before.trim().length < 10 && place >= first; place--) {
    before = visible(units[side][place].text) + before;
  }
  const context = Array.from(before.trim()).slice(-14).join("");
  return make("span", "", context && make("small", "", `${context} `), truncated(name, MAX_NAME));
}

/** A pair as a small label; both texts where they differ. */
function chip(pair) {
  const side = namingSide(pair);
  const { members } = pairs[pair];
  const label = make("span", "chip", nameOf(side, members[side]));
  const [textA, textB] = textsOf(pair);
  const isReplaced = hasPartner(pair) && textA !== textB;
  if (!isReplaced) return label;
  return make("span", "", label, make("span", "arrow", "⇄"), make("span", "chip", nameOf(1, members[1])));
}

// --- colour: square root of the difference, full at the largest one --------------------------------------------

const largestChange = pairs.reduce((largest, { change }) => Math.max(largest, Math.abs(change)), 0);

function paint(element, change) {
  const strength = largestChange > 0 ? Math.sqrt(Math.abs(change) / largestChange) : 0;
  setStrength(element, strength);
  if (strength > 0) element.classList.add(change > 0 ? "plus" : "minus");
  if (strength >= STRONG) element.classList.add("strong");
}

// --- texts -----------------------------------------------------------------------------------------------------

/** Elements of one unit, which may be the first or the last one of its cell. */
function drawUnit(side, index, { isFirst, isLast }) {
  const unit = units[side][index];
  const { pair, text } = unit;
  const { change } = pairs[pair];
  const element = make("span", "t");
  element.dataset.side = side;
  element.dataset.index = index;
  paint(element, change);
  if (!hasPartner(pair)) element.classList.add("alone");
  appendTokenText(element, text, { breakLines: true });

  const place = `${tokenRange(unit, " to ")} of ${SIDES[side]}, ${unit.region ?? OUTSIDE}`;
  const both = `A ${percent(throughputOf(pair, 0))}, B ${percent(throughputOf(pair, 1))}`;
  const numbers = `${hasPartner(pair) ? both : "no partner"}, difference ${points(change)} points`;
  makeToggle(element, `${exact(text)}, ${place}, ${numbers}`);
  unitElements[side][index] = element;

  // The space before a cell would indent it, and the end of a cell ends the line anyway.
  const before = isFirst ? [] : [beforeToken(text)];
  const after = text.endsWith("\n") && !isLast ? [make("br")] : [];
  return [...before, element, ...after];
}

/** A row ends where both texts end a line, or end a sentence that is long enough. */
function endsRow(pair, length) {
  if (!hasPartner(pair)) return false;
  const texts = textsOf(pair);
  if (texts.some((text) => text.includes("\n"))) return true;
  const following = pair + 1 < pairs.length ? textsOf(pair + 1).join("") : "";
  const endsSentence = /[.!?。！？]$/.test(texts[0]) && /^\s/.test(following);
  return length >= MIN_ROW_LENGTH && endsSentence;
}

/** Two cells side by side with the units of some successive pairs. */
function drawRow(rowPairs) {
  const cells = SIDES.map((name, side) => {
    const members = rowPairs.map((pair) => pairs[pair].members[side]).filter((member) => member !== null);
    const last = members.length - 1;
    const parts = members.flatMap((member, place) =>
      drawUnit(side, member, { isFirst: place === 0, isLast: place === last }),
    );
    const cell = make("div", "cell", ...parts);
    cell.dataset.side = name;
    cell.dir = "auto";
    return cell;
  });
  return make("div", "row", ...cells);
}

function drawText() {
  const regions = filledRegions(pairs.map((_, pair) => unitOf(pair, namingSide(pair)).region));
  let block = null;
  let rowPairs = [];
  let rowLength = 0;
  const finishRow = () => {
    if (rowPairs.length) block.append(drawRow(rowPairs));
    rowPairs = [];
    rowLength = 0;
  };
  regions.forEach((region, pair) => {
    const startsBlock = pair === 0 || region !== regions[pair - 1];
    if (startsBlock) {
      finishRow();
      const title = make("h2", "", make("span", "", capitalised(region)));
      block = make("section", `block ${region}`, title);
      textHolder.append(block);
    }
    rowPairs.push(pair);
    rowLength += Math.max(...textsOf(pair).map((text) => text.length));
    if (endsRow(pair, rowLength)) finishRow();
  });
  finishRow();

  // The Tab key reaches one unit in each text.
  for (const elements of unitElements) {
    if (elements.length) elements[0].tabIndex = 0;
  }
}

// --- legend ----------------------------------------------------------------------------------------------------

function drawLegend() {
  const legend = byId("legend");
  if (largestChange > 0) {
    const scale = colourScale(
      25,
      (step, fraction) => {
        const place = 2 * fraction - 1; // from -1, more in A, to 1, more in B
        paint(step, Math.sign(place) * place * place * largestChange);
      },
      [
        [points(-largestChange), "1 / span 7", ""],
        ["0", "10 / span 7", "mid"],
        [points(largestChange), "19 / span 7", "end"],
      ],
    );
    const bar = (className, sign) => {
      const example = make("span", `t strong ${className}`, sign);
      setStrength(example, 0.6);
      return example;
    };
    legend.append(
      make("span", "key", make("b", "a", "− more in A"), scale, make("b", "b", "+ more in B")),
      make("span", "", "difference of throughput, in points of 100 % (square-root scale)"),
      make("span", "key", bar("minus", "−"), "bar below: less in B", bar("plus", "+"), "bar above: more in B"),
    );
  } else {
    legend.append(make("span", "", "No difference anywhere: both flows are the same."));
  }
  const hasSingles = pairs.some((_, pair) => !hasPartner(pair));
  if (hasSingles) {
    legend.append(make("span", "key", make("span", "t alone", "dotted"), "no partner in the other text"));
  }
}

// --- selection: {pair, side} or {route}, shown while pointed at or focused, kept while pinned ------------------

let shown = null;
let pinned = null;
const marks = []; // [element, class name] of everything that the shown selection marks

function mark(element, className) {
  element.classList.add(className);
  marks.push([element, className]);
}

function markPair(pair, classNameOf) {
  pairs[pair].members.forEach((member, side) => {
    if (member !== null) mark(unitElements[side][member], classNameOf(side));
  });
}

function show(selection) {
  shown = selection;
  for (const [element, className] of marks.splice(0)) element.classList.remove(className);
  if (selection?.pair !== undefined) {
    markPair(selection.pair, (side) => (side === selection.side ? "on" : "partner"));
  }
  if (selection?.route !== undefined) {
    for (const pair of routes[selection.route].path) markPair(pair, () => "route");
  }
  drawPanel(selection);

  for (const element of document.querySelectorAll('[aria-pressed="true"]')) {
    element.setAttribute("aria-pressed", "false");
  }
  pinnedElement()?.setAttribute("aria-pressed", "true");
}

/** The element that stands for what is pinned, or null. */
function pinnedElement() {
  if (pinned === null) return null;
  if (pinned.route !== undefined) return routeButtons[pinned.route];
  return unitElements[pinned.side][pairs[pinned.pair].members[pinned.side]];
}

/** Show what is pointed at or focused, unless something is pinned. */
function preview(selection) {
  if (!pinned) show(selection);
}

function endPreview() {
  if (!pinned) show(null);
}

function pin(selection) {
  pinned = selection;
  show(selection);
}

function unpin() {
  pinned = null;
  show(null);
}

function isSame(first, second) {
  if (first === null) return false;
  return ["pair", "side", "route"].every((kind) => first[kind] === second[kind]);
}

function togglePin(selection) {
  if (isSame(pinned, selection)) unpin();
  else pin(selection);
}

// --- panel -----------------------------------------------------------------------------------------------------

const UNIT = page.by === "steps" ? "step" : "token";
const HINT =
  `Point at a ${UNIT}, tap it, or reach it with Tab and the arrow keys: its numbers appear here and its partner is ` +
  "framed in the other text. A click pins it, Escape releases it.";

function panelNumber(className, label, value) {
  return make("span", `number ${className}`, make("small", "", `${label} `), value);
}

/** The name of a pair seen from one text: that of its unit there, and that of the partner where it differs. */
function pairName(pair, side) {
  const { members } = pairs[pair];
  const names = members.map((member, other) => (member === null ? null : exact(units[other][member].text)));
  const isOneName = names[0] === names[1] || names[1 - side] === null;
  if (isOneName) return truncated(names[side], 90);
  return `${truncated(names[0], 60)} ⇄ ${truncated(names[1], 60)}`;
}

function pairDetails({ pair, side }) {
  const { change } = pairs[pair];
  const numbers = SIDES.map((name, each) => {
    const unit = unitOf(pair, each);
    return panelNumber(name.toLowerCase(), name, unit ? percent(unit.throughput) : "no partner");
  });
  const places = SIDES.flatMap((name, each) => {
    const unit = unitOf(pair, each);
    return unit ? [`${name}: ${tokenRange(unit, "–")}, ${unit.region ?? CONTEXT}`] : [];
  });
  const hint = `share of the flow that passes here · ${places.join(" · ")}`;
  return [
    make("span", "name", pairName(pair, side)),
    ...numbers,
    panelNumber(change > 0 ? "b" : "a", "B − A", `${points(change)} points`),
    unpinButton(),
    make("span", "hint", hint),
  ];
}

function routeDetails(route) {
  const { path, widths } = routes[route];
  return [
    make("span", "name", `route of ${plural(path.length - 1, "hop")}`),
    panelNumber("a", "width in A", percent(widths[0])),
    panelNumber("b", "width in B", percent(widths[1])),
    unpinButton(),
  ];
}

function unpinButton() {
  return pinned ? pressable("small release", unpin, "unpin (Esc)") : null;
}

function drawPanel(selection) {
  let details = [make("span", "hint", HINT)];
  if (selection?.pair !== undefined) details = pairDetails(selection);
  if (selection?.route !== undefined) details = routeDetails(selection.route);
  panel.replaceChildren(make("div", "inside", ...details));
}

// --- pointer and keyboard --------------------------------------------------------------------------------------

const current = [0, 0]; // the unit of each text that the Tab key reaches

function setCurrent(side, index) {
  unitElements[side][current[side]].tabIndex = -1;
  current[side] = index;
  unitElements[side][index].tabIndex = 0;
}

/** Move in one text; in the other text the Tab key then reaches the partner. */
function moveTo(side, index) {
  setCurrent(side, index);
  const partner = pairs[units[side][index].pair].members[1 - side];
  if (partner !== null) setCurrent(1 - side, partner);
}

function focusUnit(side, index) {
  moveTo(side, index);
  unitElements[side][index].focus();
}

/** The unit of an event as {pair, side, index}, or null. */
function unitOfEvent(event) {
  const element = event.target.closest(".t");
  if (!element?.dataset.side) return null;
  const side = Number(element.dataset.side);
  const index = Number(element.dataset.index);
  return { pair: units[side][index].pair, side, index };
}

function nearestUnit(side, direction) {
  const boxes = unitElements[side].map((element) => {
    const box = element.getClientRects()[0] ?? element.getBoundingClientRect();
    return { x: (box.left + box.right) / 2, top: box.top };
  });
  return nearestInNextLine(boxes, current[side], direction);
}

/** The unit that a key leads to, or null for any other key. */
function unitAfterKey(key, side, index) {
  const last = units[side].length - 1;
  switch (key) {
    case "ArrowRight":
      return Math.min(last, index + 1);
    case "ArrowLeft":
      return Math.max(0, index - 1);
    case "ArrowDown":
      return nearestUnit(side, 1);
    case "ArrowUp":
      return nearestUnit(side, -1);
    case "Home":
      return 0;
    case "End":
      return last;
    default:
      return null;
  }
}

function onTextKey(event) {
  const unit = unitOfEvent(event);
  if (!unit) return;
  const { pair, side, index } = unit;
  const next = unitAfterKey(event.key, side, index);
  if (next !== null) focusUnit(side, next);
  else if (event.key === "Enter" || event.key === " ") togglePin({ pair, side });
  else return;
  event.preventDefault();
}

function startText() {
  textHolder.addEventListener("pointerover", (event) => {
    const unit = unitOfEvent(event);
    if (event.pointerType !== "mouse" || !unit) return;
    const selection = { pair: unit.pair, side: unit.side };
    if (!isSame(shown, selection)) preview(selection);
  });
  textHolder.addEventListener("pointerleave", endPreview);
  textHolder.addEventListener("focusin", (event) => {
    const unit = unitOfEvent(event);
    if (!unit || !event.target.matches(":focus-visible")) return;
    moveTo(unit.side, unit.index);
    preview({ pair: unit.pair, side: unit.side });
  });
  textHolder.addEventListener("click", (event) => {
    const unit = unitOfEvent(event);
    if (!unit) {
      unpin();
      return;
    }
    focusUnit(unit.side, unit.index);
    togglePin({ pair: unit.pair, side: unit.side });
  });
  textHolder.addEventListener("keydown", onTextKey);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") unpin();
  });
}

// --- tables ----------------------------------------------------------------------------------------------------

/** A pair in a table: pointing at it frames its unit in the text, a click chooses it. */
function pairButton(pair) {
  const side = namingSide(pair);
  const member = pairs[pair].members[side];
  const element = unitElements[side][member];
  const button = pressable(
    "",
    () => {
      moveTo(side, member);
      pin({ pair, side });
      element.scrollIntoView({ block: "center" });
    },
    chip(pair),
  );
  listen(button, ["pointerenter", "focus"], () => element.classList.add("peek"));
  listen(button, ["pointerleave", "blur", "click"], () => element.classList.remove("peek"));
  return button;
}

/** A table of the largest differences in one direction. */
function drawTable(title, listed) {
  const section = make("section", "", make("h2", "", title));
  byId("tables").append(section);
  if (!listed.length) {
    section.append(make("p", "hint", "nothing"));
    return;
  }
  const rows = listed.map((pair) => {
    const shares = [0, 1].map((side) => {
      const unit = unitOf(pair, side);
      return unit ? percent(unit.throughput) : "–";
    });
    const row = tableRow(pairButton(pair), ...shares, points(pairs[pair].change));
    row.cells[0].className = "what";
    return row;
  });
  const head = tableHead([UNIT, "A", "B", "B − A"], ["what"]);
  section.append(make("table", "", head, make("tbody", "", ...rows)));
}

// --- routes ----------------------------------------------------------------------------------------------------

const routeButtons = routes.map(({ path }, route) => {
  const hops = path.flatMap((pair, place) => (place ? [make("span", "arrow", "→"), chip(pair)] : [chip(pair)]));
  const button = pressable("", () => togglePin({ route }), ...hops);
  button.setAttribute("aria-pressed", "false");
  listen(button, ["pointerenter", "focus"], () => preview({ route }));
  listen(button, ["pointerleave", "blur"], endPreview);
  return button;
});

/** Say in which text a route is wide, with the class of that text. */
function routeKind({ widths, isShared }) {
  if (isShared) return ["both", "kind"];
  const wider = widths[0] > widths[1] ? 0 : 1;
  const isOnly = Math.min(...widths) === 0;
  return [`${isOnly ? "only" : "more"} in ${SIDES[wider]}`, `kind ${SIDES[wider].toLowerCase()}`];
}

function drawRoutes() {
  if (!routes.length) return;
  const rows = routes.map((record, route) => {
    const [kind, kindClass] = routeKind(record);
    const row = tableRow(percent(record.widths[0]), percent(record.widths[1]), kind, routeButtons[route]);
    row.cells[2].className = kindClass;
    row.cells[3].className = "what";
    return row;
  });
  const head = tableHead(["in A", "in B", "", "route"], ["", "", "", "what"]);
  byId("routes").append(make("table", "", head, make("tbody", "", ...rows)));
}

// --- start -----------------------------------------------------------------------------------------------------

drawLegend();
drawText();
drawTable("More in B", page.gains);
drawTable("More in A", page.losses);
drawRoutes();
drawPanel(null);
startText();
