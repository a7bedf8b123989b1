// Where the answer came from: the conserved relevance between the parts of the text, as a tree from the answer down.
//
// A part is a line, a sentence or a numbered step. A share is of the answer's demand; a negative one argues against it.

const SMALLEST_LISTED = 0.03; // contributions below this absolute share are behind "more"
const MAX_CONTRIBUTIONS = 8; // contributions listed of one part
const TREE_DEPTH = 3; // levels that are open at the start
const PART_TEXT = 110; // characters of a part in the tree

/** The relevance as named records, or null: parts are runs of tokens [start, stop). */
const relevance = page.relevance && {
  ...page.relevance,
  parts: page.relevance.parts.map(([start, stop, region, share, absorbed]) => ({
    start,
    stop,
    region,
    share, // of the demand that reaches the part
    absorbed, // of the demand that ends at its tokens
  })),
  // By the part that takes, largest absolute share first.
  taken: groupedBy(
    page.relevance.edges.map(([source, target, share]) => ({ source, target, share })),
    (edge) => edge.target,
  ),
};

function contributionsTo(part) {
  return (relevance.taken.get(part) ?? []).slice(0, MAX_CONTRIBUTIONS);
}

/** A share with its sign, in whole percent. */
function signedPercent(share) {
  const value = Math.round(100 * share);
  if (value === 0) return "0 %";
  return `${value > 0 ? "+" : "−"}${Math.abs(value)} %`;
}

// --- one line of the tree --------------------------------------------------------------------------------------

/** A bar as long as the share, in the colour of its sign. */
function shareBar(share) {
  const bar = make("i", `bar ${share < 0 ? "minus" : "plus"}`);
  bar.style.setProperty("--share", Math.min(1, Math.abs(share)));
  return make("span", "track", bar);
}

function partButton(part, share) {
  const { start, stop, region } = relevance.parts[part];
  const place = region ?? "context";
  const words = make("bdi", "words", shortened(textOf(start, stop), PART_TEXT));
  const button = pressable(
    "part",
    () => goToPart(part),
    make("b", share < 0 ? "share minus" : "share", signedPercent(share)),
    shareBar(share),
    make("span", `place ${place}`, place),
    words,
  );
  button.title = "Show it in the text";
  listen(button, ["pointerenter", "focus"], () => preview({ part }));
  listen(button, ["pointerleave", "blur"], endPreview);
  return button;
}

/**
 * A part with what it takes from earlier parts below it.
 *
 * `opened` holds the parts whose contributions are in the tree already; they are listed once.
 */
function partItem(part, share, level, opened) {
  const row = make("div", "row", partButton(part, share));
  const list = make("ul");
  const item = make("li", "", row, list);
  const contributions = contributionsTo(part);
  if (!contributions.length) return item;
  if (opened.has(part)) {
    row.append(make("small", "aside", "sources: see above"));
    return item;
  }
  opened.add(part);
  const draw = (edges) => {
    list.append(...edges.map((edge) => partItem(edge.source, edge.share, level + 1, opened)));
  };

  // Large contributions are drawn, small ones and those of deep levels on request.
  const isLarge = (edge) => level < TREE_DEPTH && Math.abs(edge.share) >= SMALLEST_LISTED;
  draw(contributions.filter(isLarge));
  const later = contributions.filter((edge) => !isLarge(edge));
  if (later.length) row.append(moreButton(later, draw));
  return item;
}

/** The button that lists the rest of a part's contributions. */
function moreButton(edges, draw) {
  const sum = edges.reduce((total, edge) => total + edge.share, 0);
  const label = `${plural(edges.length, "source")} more, ${signedPercent(sum)}`;
  const button = pressable(
    "aside",
    () => {
      button.remove();
      draw(edges);
    },
    label,
  );
  return button;
}

// --- the section -----------------------------------------------------------------------------------------------

/** Where the demand ends, as a list of shares. */
function endsList() {
  const list = make("dl", "ends");
  for (const [name, share] of relevance.ends) {
    if (Math.abs(share) < 0.005) continue;
    list.append(make("div", "", make("dt", "", name), make("dd", "", signedPercent(share))));
  }
  return list;
}

function drawEvidence() {
  const holder = byId("evidence");
  if (!holder || !relevance) return;
  const opened = new Set();
  const roots = relevance.roots.map(([part, share]) => partItem(part, share, 0, opened));
  byId("evidence-tree").replaceChildren(...roots);
  byId("evidence-ends").replaceChildren(
    make("span", "hint", "What it comes down to, at the words’ own embeddings:"),
    endsList(),
  );
}

/** Go to the text of a part and keep its tokens marked. */
function goToPart(part) {
  const { start, stop } = relevance.parts[part];
  for (let index = start; index < stop; index += SECTION_TOKENS) reveal(index);
  showView("tokens");
  pinned = { part };
  show(pinned);
  bringIntoView(tokenElements[start], "center");
}

/** Mark the tokens of a part in the text. */
function markPart(part) {
  const { start, stop } = relevance.parts[part];
  for (let index = start; index < stop; index++) mark(tokenElements[index], "instep");
}

/** The panel of a part: its text, its share, and what it takes and gives. */
function drawPartPanel(part) {
  const { start, stop, region, share, absorbed } = relevance.parts[part];
  const given = [];
  for (const [target, edges] of relevance.taken) {
    for (const edge of edges) if (edge.source === part) given.push({ part: target, share: edge.share });
  }
  given.sort((one, other) => Math.abs(other.share) - Math.abs(one.share));
  const taken = contributionsTo(part).map((edge) => ({ part: edge.source, share: edge.share }));
  const text = make("blockquote", `excerpt ${region ?? CONTEXT}`, shortened(textOf(start, stop), 700));
  text.dir = "auto";
  const parts = [
    make("div", "head", make("span", "name", `${signedPercent(share)} of the answer`), unpinButton()),
    make("p", "hint", `${region ?? OUTSIDE} · tokens ${start} to ${stop - 1}`),
    text,
    numberList([
      ["reaches it", signedPercent(share), "of the answer's relevance"],
      ["ends here", signedPercent(absorbed), "stays at its own words"],
    ]),
    shareList("Taken from", "in", taken),
    shareList("Given to", "out", given),
  ];
  detail.replaceChildren(...parts.filter((each) => each !== ""));
}

function shareList(title, className, entries) {
  if (!entries.length) return "";
  const rows = entries.slice(0, MAX_LISTED).map(({ part, share }) => {
    const words = make("bdi", "", shortened(textOf(relevance.parts[part].start, relevance.parts[part].stop), 34));
    const name = pressable(
      "",
      () => goToPart(part),
      make("span", `chip ${relevance.parts[part].region ?? CONTEXT}`, words),
    );
    return make("li", "", make("span", "pct", signedPercent(share)), shareBar(share), name);
  });
  return make("div", "", make("h3", className, title), make("ul", "flows", ...rows));
}
