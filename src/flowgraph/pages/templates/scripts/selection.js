// What is chosen: {token}, {edge}, {route}, {step}, {band} or {part}. It is shown while pointed at or focused, and kept
// while pinned.

let shown = null;
let pinned = null;
let current = 0; // the token that the Tab key reaches

const marks = []; // [element, class names] of everything that the shown selection marks
const pressed = []; // elements with aria-pressed="true"

// --- marks -----------------------------------------------------------------------------------------------------

function mark(element, ...classNames) {
  if (!element) return; // tokens of a folded section are not on the page
  element.classList.add(...classNames);
  marks.push([element, classNames]);
}

function press(element) {
  if (!element) return;
  element.setAttribute("aria-pressed", "true");
  pressed.push(element);
}

function clearMarks() {
  for (const [element, classNames] of marks.splice(0)) element.classList.remove(...classNames);
  for (const element of pressed.splice(0)) element.setAttribute("aria-pressed", "false");
}

/** Mark a token and the ends of its strongest edges. */
function markToken(token) {
  mark(tokenElements[token], "on");
  for (const { source } of inflowsOf(token).slice(0, MAX_LISTED)) mark(tokenElements[source], "in");
  for (const { target } of outflowsOf(token).slice(0, MAX_LISTED)) mark(tokenElements[target], "out");
}

/** Mark the tokens of a step in the text. */
function markStep(step) {
  const { start, stop } = steps.nodes[step];
  for (let index = start; index < stop; index++) mark(tokenElements[index], "instep");
}

// --- show, pin, release ----------------------------------------------------------------------------------------

/** Show a selection in text, curves, step view and panel; null shows none. */
function show(selection) {
  shown = selection;
  clearMarks();
  drawChosenCurves();
  const hasCurves = ["token", "edge", "route"].some((kind) => selection?.[kind] !== undefined);
  canvas.classList.toggle("busy", hasCurves);

  if (selection?.token !== undefined) markToken(selection.token);
  if (selection?.edge !== undefined) markEdge(selection.edge);
  if (selection?.route !== undefined) markRoute(selection.route);
  if (selection?.step !== undefined) markStep(selection.step);
  if (selection?.part !== undefined) markPart(selection.part);
  markRiver(selection);
  drawPanel(selection);

  if (pinned?.token !== undefined) press(tokenElements[pinned.token]);
  if (pinned?.route !== undefined) press(routeButtons[pinned.route]);
  if (pinned?.step !== undefined) press(stepCards.get(pinned.step));
}

/** Show what is pointed at or focused, unless something is pinned. */
function preview(selection) {
  if (pinned) return;
  stopPlayerUnless(selection.route);
  show(selection);
}

function endPreview() {
  if (!pinned) show(null);
}

/** Keep a selection; a token is also brought into view. */
function pin(selection) {
  stopPlayerUnless(selection.route);
  pinned = selection;
  const { token } = selection;
  if (token !== undefined) {
    reveal(token);
    if (view === "steps") showView("tokens");
  }
  show(selection);
  if (token === undefined) return;
  setCurrent(token);
  bringIntoView(tokenElements[token]);
}

function unpin() {
  stopPlayer();
  pinned = null;
  show(null);
}

function isSame(first, second) {
  if (first === null) return false;
  return ["token", "edge", "route", "step", "band", "part"].every((kind) => first[kind] === second[kind]);
}

function togglePin(selection) {
  if (isSame(pinned, selection)) unpin();
  else pin(selection);
}

function bringIntoView(element, block = "nearest") {
  const behavior = reducedMotion.matches ? "auto" : "smooth";
  element?.scrollIntoView({ block, inline: "nearest", behavior });
}

// --- movement in the text --------------------------------------------------------------------------------------

/** Make a token the one that the Tab key reaches. */
function setCurrent(index) {
  if (tokenElements[current]) tokenElements[current].tabIndex = -1;
  current = index;
  if (tokenElements[current]) tokenElements[current].tabIndex = 0;
}

function focusToken(index) {
  reveal(index);
  setCurrent(index);
  tokenElements[index].focus();
}

function isRightToLeft() {
  const line = tokenElements[current]?.parentElement;
  return line !== undefined && getComputedStyle(line).direction === "rtl";
}

/** The token that a key leads to, or null for any other key. */
function tokenAfterKey(key) {
  const last = tokens.length - 1;
  const forward = isRightToLeft() ? -1 : 1; // the right arrow key goes to the right on the page
  switch (key) {
    case "ArrowRight":
      return Math.max(0, Math.min(last, current + forward));
    case "ArrowLeft":
      return Math.max(0, Math.min(last, current - forward));
    case "ArrowDown":
      return nearestInNextLine(boxes, current, 1);
    case "ArrowUp":
      return nearestInNextLine(boxes, current, -1);
    case "Home":
      return 0;
    case "End":
      return last;
    default:
      return null;
  }
}

/** The token of an event, or null. */
function tokenOf(event) {
  const element = event.target.closest(".t");
  return element ? Number(element.dataset.index) : null;
}

function onTextKey(event) {
  if (tokenOf(event) === null || event.ctrlKey || event.metaKey || event.altKey) return;
  const next = tokenAfterKey(event.key);
  if (next !== null) focusToken(next);
  else if (event.key === "Enter" || event.key === " ") togglePin({ token: current });
  else return;
  event.preventDefault();
}

function startText() {
  textHolder.addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    // A finger has no hover: a tap arrives as a click.
    if (event.pointerType === "mouse" && token !== null && shown?.token !== token) preview({ token });
  });
  textHolder.addEventListener("pointerleave", endPreview);
  textHolder.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (token !== null && event.target.matches(":focus-visible")) preview({ token });
  });
  textHolder.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (token !== null) {
      focusToken(token);
      togglePin({ token });
      return;
    }
    const isFoldButton = event.target.closest("button") !== null;
    if (!isFoldButton) unpin();
  });
  textHolder.addEventListener("keydown", onTextKey);
}
