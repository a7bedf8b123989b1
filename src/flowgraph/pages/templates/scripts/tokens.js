// The trace as named records: tokens, edges, routes and roles, and how tokens are written in lists.

const tokens = page.tokens.map(([text, region, generated, h, g, throughput, joined]) => ({
  text,
  region, // "question", "reasoning", "answer" or null
  generated: generated === 1,
  h, // influence on the answer
  g, // influence that arrives from the question
  throughput, // share of the flow that passes through
  joined: joined === 1, // the token shares its characters with the token before
}));

/** Records {source, target, flow}; the page holds the strongest edges, in falling order of flow. */
const edges = page.edges.map(([source, target, flow]) => ({ source, target, flow }));
const routes = page.routes.map(([path, flow]) => ({ path, flow }));
const hubs = page.hubs.map(roleRecord);
const checkpoints = page.checkpoints.map(roleRecord);

function roleRecord([token, throughput, inflows, outflows]) {
  return { token, throughput, inflows, outflows };
}

// --- text of tokens --------------------------------------------------------------------------------------------

/** The characters of tokens [start, stop); a character that several tokens share is written once. */
function textOf(start, stop) {
  let text = "";
  for (let index = start; index < stop; index++) {
    const isRepeated = tokens[index].joined && index > start;
    if (!isRepeated) text += tokens[index].text;
  }
  return text;
}

/** Visible text on one line, of at most `limit` characters. */
function shortened(text, limit) {
  return truncated(visible(text.replace(/\s+/g, " ").trim()), limit);
}

const MAX_NAME = 24; // characters of a token's name
const MAX_CONTEXT = 16; // characters shown of the text before it
const CONTEXT_TOKENS = 4; // tokens looked at for a name

/** A token's name in lists; a name without letters or digits is preceded by the text before the token. */
function nameOf(index) {
  const hasWord = (text) => /[\p{L}\p{N}]/u.test(text);
  const { text } = tokens[index];
  const name = visible(text).trim() || "␣".repeat(text.length);

  let before = "";
  const first = Math.max(0, index - CONTEXT_TOKENS);
  for (let place = index - 1; place >= first && !hasWord(before + name); place--) {
    before = visible(tokens[place].text) + before;
  }
  const context = Array.from(before.trim()).slice(-MAX_CONTEXT).join("");
  return make("span", "", context && make("small", "", `${context} `), truncated(name, MAX_NAME));
}

/** A token as a small label in the colour of its region. */
function chip(index) {
  return make("span", `chip ${tokens[index].region ?? CONTEXT}`, nameOf(index));
}

// --- colour of tokens ------------------------------------------------------------------------------------------

/** What the colours of the text can show: {name, note, signed, values}; values null stand for the throughput. */
const colourings = page.colourings;
let colouring = colourings[0] ?? { name: "", note: "", signed: false, values: null };

/** The number that colours a token. */
function scoreOf(index) {
  return colouring.values ? colouring.values[index] : tokens[index].throughput;
}

/** Largest absolute score of the tokens for which `isCounted` holds. */
function largestScore(isCounted = () => true) {
  let largest = 0;
  for (let index = 0; index < tokens.length; index++) {
    if (isCounted(index)) largest = Math.max(largest, Math.abs(scoreOf(index)));
  }
  return largest;
}

let strongest = 0; // the largest absolute score
let fullColour = 1; // the score that has the full colour

/** Choose what the colours show. */
function setColouring(chosen) {
  colouring = chosen;
  strongest = largestScore();
  // Answer tokens carry most and would leave all other tokens pale, so the strongest token outside the answer has the
  // full colour.
  fullColour = largestScore((index) => tokens[index].region !== "answer") || strongest || 1;
}
setColouring(colouring);

/** Place on the colour scale, 0 to 1: the square root keeps small shares visible. */
function strengthOf(score) {
  return Math.sqrt(Math.min(1, Math.abs(score) / fullColour));
}

/** Whether any flow passes through the graph. */
const hasFlow = tokens.some((token) => token.throughput > 0);
