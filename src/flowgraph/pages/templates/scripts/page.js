// The trace page as a whole: its two views, its keys, and the start.

let view = "tokens"; // or "steps"

// --- views -----------------------------------------------------------------------------------------------------

function showView(name) {
  if (!steps || view === name) return;
  view = name;
  byId("step-view").hidden = name !== "steps";
  byId("token-view").hidden = name !== "tokens";
  for (const each of ["tokens", "steps"]) {
    byId(`show-${each}`).setAttribute("aria-pressed", String(each === name));
  }
  if (name === "steps") stopPlayer();
  if (name === "tokens") redraw();
  if (!pinned) show(null);

  // Both views start at the same place, so a page scrolled into one goes to the start of the other.
  const columns = document.querySelector(".columns");
  if (columns.getBoundingClientRect().top < 0) columns.scrollIntoView();
}

// --- keys ------------------------------------------------------------------------------------------------------

const KEYS = [
  ["← → ↑ ↓ Home End", "move from token to token (in the step view: from step to step)"],
  ["Enter or Space", "pin a token or step, again to release it; a pinned step: go to its text"],
  ["Escape", "release, stop playing, clear the search, close this"],
  ["/", "search"],
  ["n, N or Enter", "next match, N and Shift+Enter: the one before"],
  ["p", "play the chosen route (or the widest), pause, go on"],
  [". and ,", "one token forward or back along the route"],
  ["1 and 2", "tokens, steps"],
  ["t", "theme: auto, light, dark"],
  ["?", "this list"],
];

const ACTIONS = {
  "/": () => searchField.focus(),
  "?": openHelp,
  n: () => goToHit(1),
  N: () => goToHit(-1),
  p: playChosenRoute,
  ".": () => moveByHand(1),
  ",": () => moveByHand(-1),
  1: () => showView("tokens"),
  2: () => showView("steps"),
  t: nextTheme,
};

function playChosenRoute() {
  if (player) togglePlayer();
  else if (routes.length) startRoute(pinned?.route ?? 0);
}

function openHelp() {
  byId("help").showModal();
}

function startHelp() {
  for (const [keys, meaning] of KEYS) {
    byId("keys").append(make("dt", "", make("kbd", "", keys)), make("dd", "", meaning));
  }
  byId("ask").addEventListener("click", openHelp);
  byId("help-close").addEventListener("click", () => byId("help").close());
}

function isTyping(event) {
  return event.target.matches?.("input:not([type=range]), textarea, select");
}

function onEscape() {
  const clearsSearch = !pinned && !player && searchField.value;
  if (clearsSearch) clearSearch();
  else unpin();
}

function onKey(event) {
  if (isTyping(event) || event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (event.key === "Escape") onEscape();
  else if (Object.hasOwn(ACTIONS, event.key)) ACTIONS[event.key]();
  else return;
  event.preventDefault();
}

// --- start -----------------------------------------------------------------------------------------------------

/** Say that a long trace is folded, and open it as steps. */
function announceFolding() {
  const how = steps ? "It opens as steps; its text opens section by section." : "Its text opens section by section.";
  const notice = byId("long");
  notice.textContent = `This trace has ${count(tokens.length)} tokens, too many to show at once. ${how}`;
  notice.hidden = false;
  showView("steps");
}

function start() {
  // Contents.
  drawEvidence();
  drawLegend();
  drawText();
  drawRoutes();
  drawRoles("Hubs", "Reasoning tokens that most of the flow passes through.", hubs);
  drawRoles("Aggregation checkpoints", "Reasoning tokens that gather flow from many places.", checkpoints);
  if (hubs.length) {
    const explanation =
      "Inflows and outflows: the effective number of edges by which a token’s flow arrives and leaves.";
    byId("roles").append(make("p", "hint", explanation));
  }
  textHolder.append(canvas);
  setCurrent(0);
  drawPanel(null);
  measure();

  // Controls.
  startSlider();
  startColouring();
  startText();
  startSteps();
  startPlayer();
  startSearch();
  startHelp();
  if (steps) {
    for (const each of ["tokens", "steps"]) byId(`show-${each}`).addEventListener("click", () => showView(each));
  }
  document.addEventListener("keydown", onKey);
  if (isFolding) announceFolding();

  // Curves keep to their tokens when the text moves.
  new ResizeObserver(planRedraw).observe(textHolder);
  document.fonts?.ready.then(planRedraw);
}

start();
