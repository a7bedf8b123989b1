// Search in the text, across tokens and without regard to case. A hit keeps its colour and gets a frame.

const searchField = byId("search");
let hits = []; // [start, stop) of the tokens of each hit
let hitTokens = new Set();
let currentHit = -1; // index into hits, or -1

function isHit(token) {
  return hitTokens.has(token);
}

// --- find ------------------------------------------------------------------------------------------------------

let searchable = null;

function searchForm(text) {
  return text.toLowerCase().replace(/\s/g, " ");
}

/** The whole text in its search form, and where each token starts in it; made at the first search. */
function searchableText() {
  if (searchable) return searchable;
  const parts = [];
  const starts = new Uint32Array(tokens.length + 1);
  tokens.forEach(({ text, joined }, index) => {
    // A character that several tokens share belongs to the first of them.
    const part = joined ? "" : searchForm(text);
    parts.push(part);
    starts[index + 1] = starts[index] + part.length;
  });
  searchable = { text: parts.join(""), starts };
  return searchable;
}

/** The token ranges [start, stop) of all matches. */
function findAll(query) {
  const wanted = searchForm(query);
  if (!wanted) return [];
  const { text, starts } = searchableText();
  const found = [];
  let token = 0;
  let from = text.indexOf(wanted);
  while (from >= 0) {
    const end = from + wanted.length;
    while (starts[token + 1] <= from) token++;
    let stop = token + 1;
    while (starts[stop] < end) stop++;
    // Tokens that share the last character belong to the match too.
    while (stop < tokens.length && tokens[stop].joined) stop++;
    found.push([token, stop]);
    from = text.indexOf(wanted, end);
  }
  return found;
}

// --- hits ------------------------------------------------------------------------------------------------------

function search() {
  for (const token of hitTokens) tokenElements[token]?.classList.remove("hit", "now");
  hits = findAll(searchField.value);
  hitTokens = new Set();
  for (const [start, stop] of hits) {
    for (let token = start; token < stop; token++) hitTokens.add(token);
  }
  for (const token of hitTokens) tokenElements[token]?.classList.add("hit");
  currentHit = -1;
  markStepHits();

  // A folded text and the step view stay where they are until a hit is asked for.
  const goesToFirst = hits.length > 0 && !isFolding && view === "tokens";
  if (goesToFirst) goToHit(1);
  else describeHits();
}

function describeHits() {
  const hasHits = hits.length > 0;
  let text = "";
  if (searchField.value) text = "no match";
  if (hasHits) text = plural(hits.length, "match", "matches");
  if (currentHit >= 0) text = `${count(currentHit + 1)} of ${count(hits.length)}`;
  byId("hits").textContent = text;
  byId("hit-back").disabled = !hasHits;
  byId("hit-on").disabled = !hasHits;
}

function frameCurrentHit(isFramed) {
  if (currentHit < 0) return;
  const [start, stop] = hits[currentHit];
  for (let token = start; token < stop; token++) tokenElements[token]?.classList.toggle("now", isFramed);
}

/** Go to the next hit (change 1) or the one before (change -1); after the last comes the first. */
function goToHit(change) {
  if (!hits.length) return;
  frameCurrentHit(false);
  const first = change > 0 ? 0 : hits.length - 1;
  currentHit = currentHit < 0 ? first : (currentHit + change + hits.length) % hits.length;

  const [start] = hits[currentHit];
  if (view === "steps") {
    const step = stepOf(start);
    bringIntoView(stepCards.get(step), "center");
    pin({ step });
  } else {
    reveal(start);
    setCurrent(start);
    bringIntoView(tokenElements[start], "center");
  }
  frameCurrentHit(true);
  describeHits();
}

function stepOf(token) {
  return lastStartingBefore(steps.nodes, token);
}

function markStepHits() {
  if (!steps) return;
  const stepsWithHit = new Set(hits.map(([start]) => stepOf(start)));
  for (const [step, card] of stepCards) card.classList.toggle("hit", stepsWithHit.has(step));
}

function clearSearch() {
  searchField.value = "";
  search();
}

// --- events ----------------------------------------------------------------------------------------------------

function startSearch() {
  // Search after a pause in typing; the text of a long trace takes longer.
  let timer = 0;
  searchField.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, isFolding ? 200 : 60);
  });
  searchField.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      clearTimeout(timer);
      if (hits.length) goToHit(event.shiftKey ? -1 : 1);
      else search();
    } else if (event.key === "Escape") {
      clearSearch();
      searchField.blur();
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  });
  byId("hit-back").addEventListener("click", () => goToHit(-1));
  byId("hit-on").addEventListener("click", () => goToHit(1));
  describeHits();
}
