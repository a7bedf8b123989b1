// The text, token by token, in the sections of its regions; a long trace opens a section when it is asked for.
const FOLD_ABOVE = 10000, SECTION = 256;
const folding = tokens.length > FOLD_ABOVE;
const holder = at("text");
const views = []; // the element of each token that is on the page
const sections = []; // {region, start, stop, prose, button}: button and an empty prose while folded

function drawToken(index) {
  const [text, region, , , , flow, joined] = tokens[index];
  const view = make("span", "t");
  if (!region) view.classList.add("dim");
  view.style.setProperty("--f", level(flow));
  const lead = text.match(/^ */)[0];
  const rest = joined ? "" : text.slice(lead.length);
  if (joined) view.append(make("span", "sign", "‥"));
  else if (rest === "") { view.classList.add("blank"); view.append("\u00a0"); }
  for (const part of rest.split(/(\n+)/)) {
    if (part.startsWith("\n")) view.append(make("span", "sign", "⏎".repeat(part.length)));
    else if (part) view.append(visible(part));
  }
  view.dataset.index = index;
  view.tabIndex = index === current ? 0 : -1;
  view.setAttribute("role", "button");
  view.setAttribute("aria-pressed", "false");
  view.setAttribute("aria-label", `${exact(text)}, token ${index}, ${region ?? "outside the three parts"}, throughput ${percent(flow)}`);
  if (isHit(index)) view.classList.add("hit");
  views[index] = view;
  const breaks = joined ? 0 : Math.min(3, text.split("\n").length - 1);
  const after = [];
  for (let i = 0; i < breaks; i++) after.push(make("br"), make("span", "gap"));
  return [rest ? lead : make("wbr"), view, ...after];
}

/** Runs of one region; tokens of none that lie between two tokens of the same region stay inside its run. */
function runs() {
  const regions = tokens.map((token) => token[REGION]);
  let last = null, gap = [];
  regions.forEach((region, i) => {
    if (!region) return void gap.push(i);
    if (region === last) for (const j of gap) regions[j] = region;
    [last, gap] = [region, []];
  });
  const found = [];
  regions.forEach((region, i) => {
    if (i === 0 || region !== regions[i - 1]) found.push({ region: region ?? CONTEXT, start: i });
    found.at(-1).stop = i + 1;
  });
  return found;
}

/** A long run in pieces of a few hundred tokens, cut between steps where there are any. */
function pieces({ region, start, stop }) {
  if (!folding) return [{ region, start, stop }];
  const ends = (page.steps?.nodes ?? []).map((node) => node[1]).filter((end) => end > start && end < stop);
  const found = [];
  for (let from = start; from < stop;) {
    const step = ends.find((end) => end >= from + SECTION / 2 && end <= from + 2 * SECTION);
    const to = Math.min(stop, step ?? from + SECTION);
    found.push({ region, start: from, stop: to });
    from = to;
  }
  return found;
}

const titleOf = (region) => region[0].toUpperCase() + region.slice(1);
function drawText() {
  for (const run of runs()) {
    const block = make("section", `block ${run.region}`, make("h2", "", make("span", "", titleOf(run.region))));
    const body = make("div", "body");
    for (const piece of pieces(run)) {
      const section = { ...piece, prose: make("div", "prose"), button: null };
      section.prose.dir = "auto";
      if (folding) {
        const top = greatest(tokens.slice(piece.start, piece.stop));
        const words = shortened(textOf(piece.start, Math.min(piece.stop, piece.start + 40)), 90);
        const about = `tokens ${count(piece.start)} to ${count(piece.stop - 1)}, strongest ${percent(top)}`;
        section.button = pressable("fold", () => (isOpen(section) ? fold(section) : unfold(section)), make("bdi", "", words), make("small", "", about));
        section.button.style.setProperty("--f", level(top));
        section.button.setAttribute("aria-expanded", "false");
        body.append(section.button);
      } else fill(section);
      body.append(section.prose);
      sections.push(section);
    }
    block.append(body);
    holder.append(block);
  }
}
const isOpen = (section) => views[section.start] !== undefined;
function fill(section) {
  const parts = [];
  for (let i = section.start; i < section.stop; i++) parts.push(...drawToken(i));
  section.prose.append(...parts);
}
function unfold(section) {
  if (isOpen(section)) return;
  fill(section);
  section.button.setAttribute("aria-expanded", "true");
  if (!views[current]) setCurrent(section.start);
  redraw();
}
function fold(section) {
  if (section.start <= current && current < section.stop) views[current].blur();
  section.prose.replaceChildren();
  for (let i = section.start; i < section.stop; i++) delete views[i];
  section.button.setAttribute("aria-expanded", "false");
  redraw();
}
function sectionOf(index) {
  let low = 0, high = sections.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (sections[middle].start <= index) low = middle;
    else high = middle - 1;
  }
  return sections[low];
}
/** Make sure that a token is on the page. */
const reveal = (index) => unfold(sectionOf(index));

function drawLegend() {
  const steps = 24, ramp = make("span", "ramp");
  for (let i = 0; i < steps; i++) {
    const step = make("i");
    step.style.setProperty("--f", (i / (steps - 1)).toFixed(3));
    ramp.append(step);
  }
  for (const [column, share] of [["1", 0], ["11", 0.25], ["22", 1]]) {
    const label = make("b", "", (share === 1 && strongest > full ? "≥ " : "") + percent(share * full));
    label.style.gridColumn = `${column} / span 6`;
    ramp.append(label);
  }
  if (!strongest) return;
  const example = shape("svg", { "aria-hidden": "true" });
  example.append(shape("path", { d: "M3 16C12 0 34 0 43 16", "stroke-width": 3 }));
  at("legend").append(
    make("span", "key", "throughput (square-root scale)", ramp),
    make("span", "key curves", example, "flow, thicker = more"),
    make("span", "key", make("span", "t dim", "dimmed"), "outside the three parts"),
  );
}
