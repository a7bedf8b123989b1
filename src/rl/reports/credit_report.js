// The token-credit page: every response of a rollout, its tokens coloured by one number, all numbers of one token.
//
// The helpers of flowgraph's pages stand before this script: page, byId, make, visible, colourScale and others.

// Bits of a token's flags.
const GENERATED = 1; // drawn by the policy
const SCORED = 2; // has a credit score
const ANSWER = 4; // part of the stated answer
const IN_LOSS = 8;
const DECISIVE = 16; // known to be decisive for the answer
const DETOUR = 32; // work of the same kind that the answer does not depend on

const MIN_RATIO = 1e-6; // smaller ratios are drawn like this one

const { groups, quantities } = page;
const quantityChoice = byId("quantity");
const legend = byId("legend");
const readout = byId("readout");
const groupHolder = byId("groups");

const tokens = []; // {response, column, element} of every token of the page, in order
let chosen = 0; // index of the quantity that colours the tokens

// --- numbers and words -----------------------------------------------------------------------------------------

/** A number with three decimals, fewer if it is large, as a power of ten if it is very small or large. */
function numberText(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  if (value !== 0 && (size < 0.001 || size >= 1e5)) {
    // A minus sign before the number, a hyphen in the exponent.
    return value.toExponential(1).replace(/^-/, "−");
  }
  const rounded = Number(value.toFixed(size < 10 ? 3 : 1));
  return String(rounded).replace("-", "−");
}

/** What a token is, in words. */
function stateText(flags) {
  if (!(flags & GENERATED)) return "not the policy's";
  const words = [flags & SCORED ? "scored" : "not scored"];
  if (flags & ANSWER) words.push("answer");
  if (flags & DECISIVE) words.push("decisive");
  if (flags & DETOUR) words.push("detour");
  if (!(flags & IN_LOSS)) words.push("not in the loss");
  return words.join(", ");
}

function verdictText(response) {
  return response.right ? "✓ right" : "✗ wrong";
}

// --- colour ----------------------------------------------------------------------------------------------------

function hasTwoSides(quantity) {
  return quantity.scale === "signed" || quantity.scale === "ratio";
}

/** Place of a value on the scale of its quantity: -1 to 1 about a centre, or 0 to 1. */
function placeOnScale(quantity, value) {
  if (!quantity.bound) return 0;
  const isRatio = quantity.scale === "ratio";
  const distance = isRatio ? Math.log(Math.max(value, MIN_RATIO)) : value - quantity.centre;
  const share = Math.max(-1, Math.min(1, distance / quantity.bound));
  switch (quantity.scale) {
    case "root":
      return Math.sqrt(Math.max(0, share));
    case "linear":
      return Math.max(0, share);
    case "falling":
      return Math.max(0, -share);
    default:
      return share;
  }
}

function paint(element, quantity, place) {
  setStrength(element, Math.abs(place));
  element.classList.toggle("plus", hasTwoSides(quantity) && place >= 0);
  element.classList.toggle("minus", hasTwoSides(quantity) && place < 0);
}

/** Colour every token by the chosen quantity. */
function paintTokens() {
  const quantity = quantities[chosen];
  for (const { response, column, element } of tokens) {
    const value = response.numbers[chosen][column];
    element.classList.toggle("plain", value === null);
    paint(element, quantity, value === null ? 0 : placeOnScale(quantity, value));
    const state = stateText(response.flags[column]);
    const name = `${exact(response.tokens[column])}, token ${column + 1}, ${state}`;
    element.setAttribute("aria-label", `${name}, ${quantity.name} ${numberText(value)}`);
  }
  drawLegend(quantity);
  drawReadout();
}

// --- legend ----------------------------------------------------------------------------------------------------

/** The number at an end of the scale, side -1 or 1, with a sign if some tokens lie beyond it. */
function endText(quantity, side) {
  const isRatio = quantity.scale === "ratio";
  const value = isRatio ? Math.exp(side * quantity.bound) : quantity.centre + side * quantity.bound;
  const [isExceededBelow, isExceededAbove] = quantity.exceeded;
  let sign = "";
  if (side < 0 && isExceededBelow) sign = "≤ ";
  if (side > 0 && isExceededAbove) sign = "≥ ";
  return sign + numberText(Number(value.toPrecision(3)));
}

function centreText(quantity) {
  return numberText(quantity.scale === "ratio" ? 1 : quantity.centre);
}

function drawScale(quantity) {
  if (hasTwoSides(quantity)) {
    return colourScale(25, (step, fraction) => paint(step, quantity, 2 * fraction - 1), [
      [endText(quantity, -1), "1 / span 9", ""],
      [centreText(quantity), "10 / span 7", "mid"],
      [endText(quantity, 1), "17 / span 9", "end"],
    ]);
  }
  const far = quantity.scale === "falling" ? -1 : 1;
  return colourScale(25, (step, fraction) => paint(step, quantity, fraction), [
    [centreText(quantity), "1 / span 12", ""],
    [endText(quantity, far), "13 / span 13", "end"],
  ]);
}

/** An example of a mark on tokens. */
function exampleToken(className, text) {
  const example = make("span", `t plain ${className}`, text);
  setStrength(example, 0);
  return make("span", "key", example);
}

function isAnyToken(flag) {
  return groups.some((group) => group.responses.some((response) => response.flags.some((flags) => flags & flag)));
}

function drawLegend(quantity) {
  const centre = centreText(quantity);
  const scaleKinds = { root: ", square-root scale", ratio: ", logarithmic" };
  const scale = quantity.bound ? drawScale(quantity) : `${centre} for every token`;
  const keys = [make("span", "key", scale), make("span", "key", quantity.note + (scaleKinds[quantity.scale] ?? ""))];
  if (hasTwoSides(quantity) && quantity.bound) keys.push(exampleToken("minus", `below ${centre}`));
  keys.push(exampleToken("off", "not scored"));
  if (isAnyToken(ANSWER)) keys.push(exampleToken("answer", "answer"));
  if (isAnyToken(DECISIVE)) keys.push(make("span", "key", "◆ decisive"));
  if (isAnyToken(DETOUR)) keys.push(make("span", "key", "◇ detour: work that the answer does not use"));
  legend.replaceChildren(...keys);
}

// --- one token: its numbers are shown while it is pointed at or focused, and kept while it is pinned ------------

const HINT =
  "Point at a token, tap it, or reach it with Tab and the arrow keys: all its numbers appear here. " +
  "A click pins it, Escape releases it.";

let shown = null; // index into tokens, or null
let pinned = null;

/** All numbers of a token as a list, the chosen quantity marked. */
function numberList(response, column) {
  const entries = quantities.map((quantity, index) => {
    const value = response.numbers[index][column];
    const isUnscored = quantity.name === "weight" && value === null;
    const text = isUnscored ? "1 (not scored)" : numberText(value);
    return make("div", index === chosen ? "chosen" : "", make("dt", "", quantity.name), make("dd", "", text));
  });
  return make("dl", "", ...entries);
}

function drawReadout() {
  if (shown === null) {
    readout.replaceChildren(make("p", "hint", HINT));
    return;
  }
  const { response, column } = tokens[shown];
  const facts = [
    `token ${column + 1} of ${response.tokens.length}`,
    `response ${response.row} (${verdictText(response)})`,
    stateText(response.flags[column]),
  ];
  readout.replaceChildren(
    make("span", "name", exact(response.tokens[column])),
    make("span", "where", facts.join(" · ")),
    ...(pinned === null ? [] : [pressable("small", unpin, "unpin (Esc)")]),
    numberList(response, column),
  );
}

function show(index) {
  if (shown !== null) tokens[shown].element.classList.remove("on");
  shown = index;
  if (shown !== null) tokens[shown].element.classList.add("on");
  drawReadout();
}

function preview(index) {
  if (pinned === null) show(index);
}

function setPinned(index) {
  if (pinned !== null) tokens[pinned].element.setAttribute("aria-pressed", "false");
  pinned = index;
  if (pinned !== null) tokens[pinned].element.setAttribute("aria-pressed", "true");
  show(pinned);
  // The numbers may cover the token.
  if (pinned !== null) tokens[pinned].element.scrollIntoView({ block: "nearest" });
}

function unpin() {
  setPinned(null);
}

function togglePin(index) {
  setPinned(pinned === index ? null : index);
}

// --- pointer and keyboard --------------------------------------------------------------------------------------

/** The token of an event, or null. */
function tokenOf(event) {
  const { index } = event.target.closest(".t")?.dataset ?? {};
  return index === undefined ? null : Number(index);
}

/** Focus a token. The Tab key reaches one token of each response, the arrow keys move within the response. */
function focusToken(index) {
  const { response, element } = tokens[index];
  for (const other of tokens) {
    if (other.response === response) other.element.tabIndex = -1;
  }
  element.tabIndex = 0;
  element.focus();
}

/** The token that a key leads to, or null for any other key. */
function tokenAfterKey(key, index) {
  const { response, column } = tokens[index];
  const first = index - column;
  const last = first + response.tokens.length - 1;
  switch (key) {
    case "ArrowRight":
      return Math.min(last, index + 1);
    case "ArrowLeft":
      return Math.max(first, index - 1);
    case "Home":
      return first;
    case "End":
      return last;
    default:
      return null;
  }
}

function onTokenKey(event) {
  const index = tokenOf(event);
  if (index === null) return;
  const next = tokenAfterKey(event.key, index);
  if (next !== null) focusToken(next);
  else if (event.key === "Enter" || event.key === " ") togglePin(index);
  else return;
  event.preventDefault();
}

function startTokens() {
  groupHolder.addEventListener("pointerover", (event) => {
    const index = tokenOf(event);
    // A finger has no hover: a tap arrives as a click.
    if (event.pointerType === "mouse" && index !== null) preview(index);
  });
  groupHolder.addEventListener("pointerleave", () => preview(null));
  groupHolder.addEventListener("focusin", (event) => {
    const index = tokenOf(event);
    if (index !== null && event.target.matches(":focus-visible")) preview(index);
  });
  groupHolder.addEventListener("click", (event) => {
    const index = tokenOf(event);
    if (index === null) return;
    focusToken(index);
    togglePin(index);
  });
  groupHolder.addEventListener("keydown", onTokenKey);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") unpin();
  });
}

// --- responses -------------------------------------------------------------------------------------------------

/** Elements of one token, from the space before it to the line breaks after it. */
function drawToken(response, column) {
  const text = response.tokens[column];
  const flags = response.flags[column];
  const element = make("span", "t");
  element.dataset.index = tokens.length;
  if (!(flags & SCORED)) element.classList.add("off");
  if (flags & ANSWER) element.classList.add("answer");
  if (flags & DECISIVE) element.append(make("span", "sign", "◆"));
  if (flags & DETOUR) element.append(make("span", "sign", "◇"));
  appendTokenText(element, text);
  makeToggle(element, ""); // named when it is painted
  if (column === 0) element.tabIndex = 0;
  tokens.push({ response, column, element });

  const endsLine = text.includes("\n");
  return [beforeToken(text), element, ...(endsLine ? [make("br"), make("span", "gap")] : [])];
}

/** The numbers of a response: a row for each token, a column for each quantity. */
function numberTable(response) {
  const names = ["#", "token", ...quantities.map((quantity) => quantity.name), "state"];
  const isText = (name) => name === "token" || name === "state";
  const head = tableHead(
    names,
    names.map((name) => (isText(name) ? "text" : "")),
  );
  const rows = response.tokens.map((text, column) => {
    const numbers = response.numbers.map((values) => numberText(values[column]));
    const row = tableRow(exact(text), ...numbers, stateText(response.flags[column]));
    row.cells[0].className = "text";
    row.cells[row.cells.length - 1].className = "state";
    const rowHead = make("th", "", String(column + 1));
    rowHead.scope = "row";
    row.prepend(rowHead);
    return row;
  });
  const region = make("div", "table", make("table", "", head, make("tbody", "", ...rows)));
  region.tabIndex = 0; // it scrolls
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", `Numbers of response ${response.row}`);
  return region;
}

/** The table of a response, drawn when it is opened for the first time. */
function drawTableDetails(response) {
  const details = make("details", "", make("summary", "", "Numbers as a table"));
  details.addEventListener("toggle", () => {
    const isDrawn = details.children.length > 1;
    if (details.open && !isDrawn) details.append(numberTable(response));
  });
  return details;
}

function drawResponse(response) {
  const reward = `reward ${numberText(response.reward)}`;
  const name = `Response ${response.row}, ${verdictText(response)}, ${reward}`;
  const text = make("div", "prose", ...response.tokens.flatMap((_, column) => drawToken(response, column)));
  text.dir = "auto";
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `${name}. Arrow keys move, Enter pins, Escape releases.`);
  if (response.padding) text.append(" ", make("span", "pad", `+ ${response.padding} padding`));

  const head = make(
    "header",
    "",
    make("h3", "verdict", verdictText(response)),
    make("span", "note", reward),
    make("span", "note", `response ${response.row}, ${plural(response.tokens.length, "token")}`),
    response.truncated ? make("span", "badge", "✂ cut off") : null,
    response.in_loss ? null : make("span", "badge", "left out of the loss"),
  );
  const verdict = response.right ? "right" : "wrong";
  const article = make("article", `response ${verdict}`, head, text, drawTableDetails(response));
  article.setAttribute("aria-label", name);
  return article;
}

// --- prompts ---------------------------------------------------------------------------------------------------

/** Visible text that keeps its lines. */
function visibleLines(text) {
  return text.split("\n").map(visible).join("\n");
}

/** The messages of the prompt and the reference answer. */
function drawProblem(group) {
  const problem = make("dl", "problem");
  for (const [role, text] of group.prompt) {
    const message = make("dd", "", visibleLines(text));
    message.dir = "auto";
    problem.append(make("dt", "", role ? `prompt (${visible(role)})` : "prompt"), message);
  }
  const answer = visibleLines(group.answer) || "–";
  problem.append(make("dt", "", "reference answer"), make("dd", "", answer));
  return problem;
}

function drawGroup(group) {
  const numRight = group.responses.filter((response) => response.right).length;
  const head = make(
    "header",
    "",
    make("h2", "", `Prompt ${group.group}`),
    make("span", "badge", `${numRight} of ${group.responses.length} right`),
    group.same_reward ? make("span", "badge flat", "no variance: all rewards equal") : null,
    make("span", "note", `problem ${group.problem}`),
  );
  const responses = make("div", "responses", ...group.responses.map(drawResponse));
  groupHolder.append(make("section", "group", head, drawProblem(group), responses));
}

// --- start -----------------------------------------------------------------------------------------------------

quantities.forEach((quantity, index) => {
  const option = make("option", "", quantity.name);
  option.value = index;
  quantityChoice.append(option);
});
quantityChoice.addEventListener("input", () => {
  chosen = Number(quantityChoice.value);
  paintTokens();
});
for (const group of groups) drawGroup(group);
startTokens();
chosen = Number(quantityChoice.value); // a browser may restore an earlier choice when the page is loaded again
paintTokens();
