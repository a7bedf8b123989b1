// Search in the text: across tokens, without regard to case; hits keep their colour and get a frame.
let hits = [], hitTokens = new Set(), chosenHit = -1;
const isHit = (index) => hitTokens.has(index);
const field = at("search");

/** All the text in small letters, and where each token begins in it; a character of several tokens counts once. */
let searchable = null;
function searchText() {
  if (searchable) return searchable;
  const parts = [], starts = new Uint32Array(tokens.length + 1);
  tokens.forEach((token, i) => {
    parts.push(token[JOINED] ? "" : token[TEXT].toLowerCase().replace(/\s/g, " "));
    starts[i + 1] = starts[i] + parts[i].length;
  });
  searchable = { text: parts.join(""), starts };
  return searchable;
}
function find(query) {
  const { text, starts } = searchText(), found = [];
  const wanted = query.toLowerCase().replace(/\s/g, " ");
  let token = 0;
  for (let from = text.indexOf(wanted); wanted && from >= 0; from = text.indexOf(wanted, from + wanted.length)) {
    while (starts[token + 1] <= from) token++;
    let stop = token + 1;
    while (starts[stop] < from + wanted.length) stop++;
    while (stop < tokens.length && tokens[stop][JOINED]) stop++; // the rest of a split character
    found.push([token, stop]);
  }
  return found;
}
function search() {
  for (const index of hitTokens) views[index]?.classList.remove("hit", "now");
  hits = find(field.value);
  hitTokens = new Set(hits.flatMap(([start, stop]) => Array.from({ length: stop - start }, (_, i) => start + i)));
  for (const index of hitTokens) views[index]?.classList.add("hit");
  chosenHit = -1;
  markStepHits();
  if (hits.length && !folding && view === "tokens") goToHit(1);
  else sayHits();
}
function sayHits() {
  const place = chosenHit < 0 ? plural(hits.length, "match", "matches") : `${count(chosenHit + 1)} of ${count(hits.length)}`;
  at("hits").textContent = !field.value ? "" : hits.length ? place : "no match";
  at("hit-back").disabled = at("hit-on").disabled = !hits.length;
}
function goToHit(change) {
  if (!hits.length) return;
  const frame = (on) => {
    if (chosenHit < 0) return;
    for (let i = hits[chosenHit][0]; i < hits[chosenHit][1]; i++) views[i]?.classList.toggle("now", on);
  };
  frame(false);
  chosenHit = chosenHit < 0 ? (change > 0 ? 0 : hits.length - 1) : (chosenHit + change + hits.length) % hits.length;
  const [start] = hits[chosenHit];
  if (view === "steps") {
    const card = stepCards.get(stepOf(start));
    if (card) bringIntoView(card, "center");
    select({ step: stepOf(start) }, true);
  } else {
    reveal(start);
    setCurrent(start);
    bringIntoView(views[start], "center");
  }
  frame(true);
  sayHits();
}
function stepOf(index) {
  let low = 0, high = steps.nodes.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (steps.nodes[middle][START] <= index) low = middle;
    else high = middle - 1;
  }
  return low;
}
function markStepHits() {
  if (!steps) return;
  const found = new Set(hits.map(([start]) => stepOf(start)));
  for (const [step, card] of stepCards) card.classList.toggle("hit", found.has(step));
}
function clearSearch() {
  field.value = "";
  search();
}
function startSearch() {
  let waitingFor = 0;
  field.addEventListener("input", () => {
    clearTimeout(waitingFor);
    waitingFor = setTimeout(search, folding ? 200 : 60);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") { clearTimeout(waitingFor); if (!hits.length) search(); else goToHit(event.shiftKey ? -1 : 1); }
    else if (event.key === "Escape") { clearSearch(); field.blur(); }
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  at("hit-back").addEventListener("click", () => goToHit(-1));
  at("hit-on").addEventListener("click", () => goToHit(1));
  sayHits();
}
