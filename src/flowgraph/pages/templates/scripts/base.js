// What every other part uses: the trace, makers of elements, and how numbers and token text are written.
const page = JSON.parse(document.getElementById("trace").textContent);
const [TEXT, REGION, GENERATED, H, G, FLOW, JOINED] = [0, 1, 2, 3, 4, 5, 6];
const CONTEXT = "context";
const tokens = page.tokens;
const at = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");

// --- elements: every string reaches the page through textContent ---------------------------------------------
function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null && child !== "")); // append makes text nodes of strings
  return element;
}
function shape(tag, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
function pressable(className, action, ...children) {
  const button = make("button", className, ...children);
  button.type = "button";
  button.addEventListener("click", action);
  return button;
}

// --- numbers -------------------------------------------------------------------------------------------------
/** A share as a percentage that says 100 only when it is all and 0 only when it is nothing. */
function percent(share) {
  if (share === null) return "–";
  const value = 100 * share;
  if (value === 0 || value >= 99.9999) return `${Math.round(value)} %`;
  if (value > 99.9) return "99.9 %";
  return value < 0.01 ? "< 0.01 %" : `${value.toFixed(value < 1 ? 2 : 1)} %`;
}
const count = (value) => value.toLocaleString("en");
const plural = (value, word, several = `${word}s`) => `${count(value)} ${value === 1 ? word : several}`;
const number = (value) => (value === null ? "–" : value !== 0 && value < 0.001 ? value.toExponential(1) : value.toFixed(3));
/** The characters of tokens [start, stop): one that several tokens share is written once. */
function textOf(start, stop) {
  let text = "";
  for (let i = start; i < stop; i++) if (!tokens[i][JOINED] || i === start) text += tokens[i][TEXT];
  return text;
}
/** Text on one line, at most so many characters (never half of one). */
function shortened(text, limit) {
  const characters = Array.from(visible(text.replace(/\s+/g, " ").trim()));
  return characters.length > limit ? `${characters.slice(0, limit - 1).join("").trimEnd()}…` : characters.join("");
}
/** A token's name in lists; one without letters or digits brings the words before it, to be recognised by. */
function named(index) {
  const words = Array.from(visible(tokens[index][TEXT]).trim() || "·".repeat(tokens[index][TEXT].length));
  const wordy = (text) => /[\p{L}\p{N}]/u.test(text);
  let before = "";
  for (let i = index - 1; !wordy(words.join("") + before) && i >= Math.max(0, index - 4); i--) before = visible(tokens[i][TEXT]) + before;
  const context = Array.from(before.trim()).slice(-16).join("");
  return make("span", "", context && make("small", "", `${context} `), words.length > 24 ? `${words.slice(0, 23).join("")}…` : words.join(""));
}
const chip = (index) => make("span", `chip ${tokens[index][REGION] ?? CONTEXT}`, named(index));

// --- colour: square root of throughput, full at the strongest token outside the answer -----------------------
const greatest = (chosen) => chosen.reduce((top, token) => Math.max(top, token[FLOW]), 0);
const strongest = greatest(tokens);
const full = greatest(tokens.filter((token) => token[REGION] !== "answer")) || strongest || 1;
const level = (flow) => Math.sqrt(Math.min(1, flow / full)).toFixed(3);
