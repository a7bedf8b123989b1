// The text, token by token, in sections by region. A long trace is folded: a section is drawn when it is opened.

const FOLD_ABOVE = 10000; // tokens from which on a trace is folded
const SECTION_TOKENS = 256; // tokens of a folded section
const MAX_LINE_BREAKS = 3; // line breaks drawn after one token

const isFolding = tokens.length > FOLD_ABOVE;
const textHolder = byId("text");
const tokenElements = []; // the element of each token that is on the page
const sections = []; // {region, start, stop, prose, button}; a folded section has a button and an empty prose

// --- one token -------------------------------------------------------------------------------------------------

/** Elements of one token, from the space before it to the line breaks after it. */
function drawToken(index) {
  const { text, region, throughput, joined } = tokens[index];
  const element = make("span", "t");
  element.dataset.index = index;
  setStrength(element, strengthOf(throughput));
  if (!region) element.classList.add("dim");
  if (isHit(index)) element.classList.add("hit");

  const place = region ?? OUTSIDE;
  makeToggle(element, `${exact(text)}, token ${index}, ${place}, throughput ${percent(throughput)}`);
  if (index === current) element.tabIndex = 0;
  tokenElements[index] = element;

  // A token that shares its character with the token before has nothing to show and ends no line.
  if (joined) {
    element.append(make("span", "sign", "‥"));
    return [make("wbr"), element];
  }
  appendTokenText(element, text);
  const after = [];
  const numBreaks = Math.min(MAX_LINE_BREAKS, text.split("\n").length - 1);
  for (let line = 0; line < numBreaks; line++) after.push(make("br"), make("span", "gap"));
  return [beforeToken(text), element, ...after];
}

// --- sections --------------------------------------------------------------------------------------------------

/** Runs of tokens of one region, as {region, start, stop}. */
function regionRuns() {
  const regions = filledRegions(tokens.map((token) => token.region));
  const runs = [];
  regions.forEach((region, index) => {
    if (index === 0 || region !== regions[index - 1]) runs.push({ region, start: index, stop: index });
    runs.at(-1).stop = index + 1;
  });
  return runs;
}

/** The sections of a run: the run itself, or pieces of a few hundred tokens that end with a step where possible. */
function sectionsOf(run) {
  if (!isFolding) return [run];
  const stepEnds = (steps?.nodes ?? []).map((node) => node.stop).filter((stop) => stop > run.start && stop < run.stop);
  const found = [];
  let start = run.start;
  while (start < run.stop) {
    const earliest = start + SECTION_TOKENS / 2;
    const latest = start + 2 * SECTION_TOKENS;
    const stepEnd = stepEnds.find((end) => end >= earliest && end <= latest);
    const stop = Math.min(run.stop, stepEnd ?? start + SECTION_TOKENS);
    found.push({ region: run.region, start, stop });
    start = stop;
  }
  return found;
}

function drawText() {
  for (const run of regionRuns()) {
    const body = make("div", "body");
    for (const { region, start, stop } of sectionsOf(run)) {
      const section = { region, start, stop, prose: make("div", "prose"), button: null };
      section.prose.dir = "auto";
      if (isFolding) {
        section.button = foldButton(section);
        body.append(section.button);
      } else {
        fill(section);
      }
      body.append(section.prose);
      sections.push(section);
    }
    const title = make("h2", "", make("span", "", capitalised(run.region)));
    textHolder.append(make("section", `block ${run.region}`, title, body));
  }
}

/** The button that opens and closes a section: its first words, its tokens and the strongest of them. */
function foldButton(section) {
  const largest = largestThroughput(tokens.slice(section.start, section.stop));
  const words = shortened(textOf(section.start, Math.min(section.stop, section.start + 40)), 90);
  const about = `tokens ${count(section.start)} to ${count(section.stop - 1)}, strongest ${percent(largest)}`;
  const button = pressable(
    "fold",
    () => (isOpen(section) ? fold(section) : unfold(section)),
    make("bdi", "", words),
    make("small", "", about),
  );
  setStrength(button, strengthOf(largest));
  button.setAttribute("aria-expanded", "false");
  return button;
}

function isOpen(section) {
  return tokenElements[section.start] !== undefined;
}

function fill(section) {
  const parts = [];
  for (let index = section.start; index < section.stop; index++) parts.push(...drawToken(index));
  section.prose.append(...parts);
}

function unfold(section) {
  if (isOpen(section)) return;
  fill(section);
  section.button.setAttribute("aria-expanded", "true");
  // The Tab key needs one token to reach.
  if (!tokenElements[current]) setCurrent(section.start);
  redraw();
}

function fold(section) {
  if (section.start <= current && current < section.stop) tokenElements[current].blur();
  section.prose.replaceChildren();
  for (let index = section.start; index < section.stop; index++) delete tokenElements[index];
  section.button.setAttribute("aria-expanded", "false");
  redraw();
}

/** Index of the last record that starts at or before a token; records are in the order of their start. */
function lastStartingBefore(records, token) {
  let low = 0;
  let high = records.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (records[middle].start <= token) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** Open the section of a token, so that the token is on the page. */
function reveal(index) {
  unfold(sections[lastStartingBefore(sections, index)]);
}

// --- legend ----------------------------------------------------------------------------------------------------

function drawLegend() {
  if (!strongest) return;
  const atLeast = strongest > fullColour ? "≥ " : ""; // answer tokens above the end of the scale
  const scale = colourScale(24, setStrength, [
    ["0 %", "1 / span 6", ""],
    [percent(fullColour / 4), "11 / span 6", ""], // the middle of a square-root scale
    [atLeast + percent(fullColour), "22 / span 6", ""],
  ]);
  const curve = shape("svg", { "aria-hidden": "true" });
  curve.append(shape("path", { d: "M3 16C12 0 34 0 43 16", "stroke-width": 3 }));
  byId("legend").append(
    make("span", "key", "throughput (square-root scale)", scale),
    make("span", "key curves", curve, "flow, thicker = more"),
    make("span", "key", make("span", "t dim", "dimmed"), "context (chat template)"),
  );
}
