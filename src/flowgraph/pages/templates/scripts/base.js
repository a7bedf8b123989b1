// Helpers that every page uses: page data, elements, numbers, colour scales, regions, lines of text, theme.
//
// The scripts of a page are joined into the body of one function, so a name declared in one file is known in the
// files after it and is not global. Text reaches the page through textContent only, never as markup.

// --- page data -------------------------------------------------------------------------------------------------

const dataElement = document.querySelector('script[type="application/json"]');
const page = dataElement ? JSON.parse(dataElement.textContent) : null;

const CONTEXT = "context"; // class and title of text outside question, reasoning and answer
const OUTSIDE = "context, outside question, reasoning and answer"; // the same in a sentence
const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");

// --- elements --------------------------------------------------------------------------------------------------

function byId(id) {
  return document.getElementById(id);
}

/** An HTML element with children; a string becomes a text node, null and "" are left out. */
function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

/** A button that calls `action` on a click. */
function pressable(className, action, ...children) {
  const button = make("button", className, ...children);
  button.type = "button";
  button.addEventListener("click", action);
  return button;
}

/** Add one listener for several events. */
function listen(element, eventNames, listener) {
  for (const name of eventNames) element.addEventListener(name, listener);
}

/** A table row of `td` cells; a cell is a string or an element. */
function tableRow(...cells) {
  return make("tr", "", ...cells.map((cell) => make("td", "", cell)));
}

/** A table head; `classes` gives the class of a column where it has one. */
function tableHead(names, classes = []) {
  const cells = names.map((name, column) => {
    const cell = make("th", classes[column] ?? "", name);
    cell.scope = "col";
    return cell;
  });
  return make("thead", "", make("tr", "", ...cells));
}

// --- numbers and text ------------------------------------------------------------------------------------------

/** A share in percent; "100 %" only for a whole, "0 %" only for nothing. */
function percent(share) {
  if (share === null) return "–";
  const value = 100 * share;
  if (value === 0 || value >= 99.9999) return `${Math.round(value)} %`;
  if (value > 99.9) return "99.9 %";
  if (value < 0.01) return "< 0.01 %";
  return `${value.toFixed(value < 1 ? 2 : 1)} %`;
}

/** A whole number with separators of thousands. */
function count(value) {
  return value.toLocaleString("en");
}

/** A count with its noun. */
function plural(value, singular, several = `${singular}s`) {
  return `${count(value)} ${value === 1 ? singular : several}`;
}

/** The first `limit` characters of a text; surrogate pairs stay together. */
function truncated(text, limit) {
  const characters = Array.from(text);
  if (characters.length <= limit) return text;
  return `${characters
    .slice(0, limit - 1)
    .join("")
    .trimEnd()}…`;
}

function capitalised(word) {
  return word[0].toUpperCase() + word.slice(1);
}

// --- colour scales ---------------------------------------------------------------------------------------------

/** Set the place of an element on its colour scale, from 0 (no colour) to 1 (full colour). */
function setStrength(element, strength) {
  element.style.setProperty("--f", strength.toFixed(3));
}

/**
 * A colour scale with labels below it.
 *
 * `paint(step, fraction)` colours one step, with the fraction going from 0 to 1 from left to right.
 * A label is [text, CSS grid column, class].
 */
function colourScale(numSteps, paint, labels) {
  const scale = make("span", "ramp");
  for (let index = 0; index < numSteps; index++) {
    const step = make("i");
    paint(step, index / (numSteps - 1));
    scale.append(step);
  }
  for (const [text, column, className] of labels) {
    const label = make("b", className, text);
    label.style.gridColumn = column;
    scale.append(label);
  }
  return scale;
}

// --- tokens as buttons -----------------------------------------------------------------------------------------

/**
 * Append the visible text of a token to its element, without the leading spaces.
 *
 * Leading spaces stand before the element (see `beforeToken`), so that the coloured background starts at the first
 * glyph. A token of spaces alone gets a no-break space, so that it can be seen and pointed at. A token without any
 * character gets the sign "‥". With `breakLines`, a line break inside the text also starts a new line.
 */
function appendTokenText(element, text, { breakLines = false } = {}) {
  const rest = text.slice(leadingSpaces(text).length);
  if (text === "") {
    element.append(make("span", "sign", "‥"));
  } else if (rest === "") {
    element.classList.add("blank");
    element.append("\u00a0");
  }
  const parts = rest.split(/(\n+)/).filter((part) => part !== "");
  parts.forEach((part, index) => {
    if (!part.startsWith("\n")) {
      element.append(visible(part));
      return;
    }
    element.append(make("span", "sign", "⏎".repeat(part.length)));
    const isInside = index < parts.length - 1;
    if (breakLines && isInside) element.append(make("br"));
  });
}

function leadingSpaces(text) {
  return text.match(/^ */)[0];
}

/** Make an element a toggle button that the arrow keys reach; `label` is what a screen reader says. */
function makeToggle(element, label) {
  element.tabIndex = -1;
  element.setAttribute("role", "button");
  element.setAttribute("aria-pressed", "false");
  element.setAttribute("aria-label", label);
}

/** What comes before a token in its line: its leading spaces, or a place where a line may break. */
function beforeToken(text) {
  const spaces = leadingSpaces(text);
  return spaces.length < text.length ? spaces : make("wbr");
}

// --- regions ---------------------------------------------------------------------------------------------------

/**
 * The region of each token, with CONTEXT for none.
 *
 * Tokens without a region between two tokens of the same region are given that region, so that a section is not cut
 * into pieces by a separator.
 */
function filledRegions(regions) {
  const filled = regions.map((region) => region ?? CONTEXT);
  let lastRegion = null;
  let gap = [];
  regions.forEach((region, index) => {
    if (!region) {
      gap.push(index);
      return;
    }
    if (region === lastRegion) {
      for (const inGap of gap) filled[inGap] = region;
    }
    lastRegion = region;
    gap = [];
  });
  return filled;
}

// --- lines of text ---------------------------------------------------------------------------------------------

const SAME_LINE = 8; // boxes whose tops differ by less than this many pixels stand on one line

/**
 * The box nearest to box `current` in the adjacent line above (direction -1) or below (direction 1).
 *
 * A box is {x, top}, x its horizontal centre. Returns `current` where there is no such line.
 */
function nearestInNextLine(boxes, current, direction) {
  const here = boxes[current];
  const distanceOf = (box) => direction * (box.top - here.top);

  // The adjacent line is the one at the smallest distance in this direction.
  let lineDistance = Infinity;
  for (const box of boxes) {
    const distance = distanceOf(box);
    if (distance > SAME_LINE) lineDistance = Math.min(lineDistance, distance);
  }

  // In that line, take the box whose centre is nearest.
  let nearest = current;
  let smallestOffset = Infinity;
  boxes.forEach((box, index) => {
    const offset = Math.abs(box.x - here.x);
    const isInLine = Math.abs(distanceOf(box) - lineDistance) < SAME_LINE;
    if (isInLine && offset < smallestOffset) {
      nearest = index;
      smallestOffset = offset;
    }
  });
  return nearest;
}

// --- theme -----------------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];

/** Go to the next theme; "auto" follows the setting of the browser. */
function nextTheme() {
  const button = byId("theme");
  const place = THEMES.indexOf(button.dataset.theme);
  const theme = THEMES[(place + 1) % THEMES.length];
  button.dataset.theme = theme;
  document.documentElement.dataset.theme = theme;
  button.textContent = `Theme: ${theme}`;
}

byId("theme")?.addEventListener("click", nextTheme);
