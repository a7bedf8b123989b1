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
  const { text, region, joined } = tokens[index];
  const element = make("span", "t");
  element.dataset.index = index;
  paintToken(element, index);
  if (!region) element.classList.add("dim");
  if (isHit(index)) element.classList.add("hit");

  const place = region ?? OUTSIDE;
  makeToggle(element, `${exact(text)}, token ${index}, ${place}, ${spokenScore(index)}`);
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

/** Colour a token by its score; a signed score has one colour for each sign. */
function paintToken(element, index) {
  const score = scoreOf(index);
  setStrength(element, strengthOf(score));
  element.classList.toggle("plus", colouring.signed && score >= 0);
  element.classList.toggle("minus", colouring.signed && score < 0);
}

/** The score of a token for a screen reader. */
function spokenScore(index) {
  if (colouring.signed) return `${colouring.name} ${signedPercent(scoreOf(index))}`;
  return `${colouring.values ? colouring.name : "throughput"} ${percent(scoreOf(index))}`;
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
  const largest = largestScore((index) => section.start <= index && index < section.stop);
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
  byId("legend").replaceChildren();
  if (!strongest) return;
  const atLeast = strongest > fullColour ? "≥ " : ""; // answer tokens above the end of the scale
  const scale = colouring.signed ? signedScale() : plainScale(atLeast);
  const curve = shape("svg", { "aria-hidden": "true" });
  curve.append(shape("path", { d: "M3 16C12 0 34 0 43 16", "stroke-width": 3 }));
  const entries = [
    make("span", "key", `${colouring.values ? colouring.name : "throughput"} (square-root scale)`, scale),
    hasFlow && !colouring.values ? make("span", "key curves", curve, "flow, thicker = more") : null,
    make("span", "key", make("span", "t dim", "dimmed"), "context (chat template)"),
  ];
  byId("legend").append(...entries.filter((entry) => entry !== null));
}

function plainScale(atLeast) {
  return colourScale(24, setStrength, [
    ["0 %", "1 / span 6", ""],
    [percent(fullColour / 4), "11 / span 6", ""], // the middle of a square-root scale
    [atLeast + percent(fullColour), "22 / span 6", ""],
  ]);
}

/** Purple for what argues against the answer at the left, no colour in the middle. */
function signedScale() {
  const paint = (step, fraction) => {
    const place = 2 * fraction - 1;
    setStrength(step, Math.abs(place));
    step.classList.add(place < 0 ? "minus" : "plus");
  };
  return colourScale(24, paint, [
    [signedPercent(-fullColour), "1 / span 7", ""],
    ["0 %", "11 / span 5", ""],
    [signedPercent(fullColour), "20 / span 7", ""],
  ]);
}

// --- choice of the score -----------------------------------------------------------------------------------------

/** Colour the text by another score. Curves are edges of the flow, so they are drawn with its colours only. */
function showColouring(index) {
  setColouring(colourings[index]);
  byId("colouring-note").textContent = colouring.note;
  tokenElements.forEach((element, token) => {
    paintToken(element, token);
  });
  drawLegend();
  const showsFlow = colouring.values === null;
  canvas.classList.toggle("absent", !showsFlow);
  const backboneSlider = document.querySelector(".slider");
  if (backboneSlider) backboneSlider.hidden = !showsFlow;
}

function startColouring() {
  const select = byId("colouring");
  if (!select) return;
  colourings.forEach(({ name }, index) => {
    select.append(new Option(name, String(index)));
  });
  select.addEventListener("change", () => showColouring(Number(select.value)));
  showColouring(0);
}
