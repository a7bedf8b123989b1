// The page as a whole: the two views, the colour theme, the keys, and the start.
let view = "tokens";
function showView(name) {
  if (!steps || view === name) return;
  view = name;
  at("step-view").hidden = name !== "steps";
  at("token-view").hidden = name !== "tokens";
  for (const each of ["tokens", "steps"]) at(`show-${each}`).setAttribute("aria-pressed", String(each === name));
  if (name === "steps") stopPlaying();
  if (name === "tokens") redraw();
  if (!pinned) show(null);
  const columns = document.querySelector(".columns");
  if (columns.getBoundingClientRect().top < 0) columns.scrollIntoView();
}

const THEMES = ["auto", "light", "dark"];
function turnTheme() {
  const button = at("theme"), next = THEMES[(THEMES.indexOf(button.dataset.theme) + 1) % THEMES.length];
  button.dataset.theme = document.documentElement.dataset.theme = next;
  button.textContent = `Theme: ${next}`;
}

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
function startHelp() {
  for (const [keys, meaning] of KEYS) at("keys").append(make("dt", "", make("kbd", "", keys)), make("dd", "", meaning));
  at("ask").addEventListener("click", () => at("help").showModal());
  at("help-close").addEventListener("click", () => at("help").close());
}

const typing = (event) => event.target.matches?.("input:not([type=range]), textarea, select");
const ACTIONS = {
  "/": () => field.focus(),
  "?": () => at("help").showModal(),
  n: () => goToHit(1), N: () => goToHit(-1),
  p: () => (playing ? playOrPause() : page.routes.length && startPlaying(pinned?.route ?? 0)),
  ".": () => byHand(1), ",": () => byHand(-1),
  1: () => showView("tokens"), 2: () => showView("steps"),
  t: turnTheme,
};
function onKey(event) {
  if (typing(event) || event.ctrlKey || event.metaKey || event.altKey || at("help").open) return;
  if (event.key === "Escape") {
    if (pinned || playing) unpin();
    else if (field.value) clearSearch();
    else unpin();
  } else if (Object.hasOwn(ACTIONS, event.key)) ACTIONS[event.key]();
  else return;
  event.preventDefault();
}

function start() {
  drawLegend();
  drawText();
  drawRoutes();
  drawRoles("Hubs", "Reasoning tokens that most of the flow passes through.", page.hubs);
  drawRoles("Aggregation checkpoints", "Reasoning tokens that gather flow from many places.", page.checkpoints);
  const explained = "Inflows and outflows: the effective number of edges by which a token’s flow arrives and leaves.";
  if (page.hubs.length) at("roles").append(make("p", "hint", explained));
  holder.append(canvas);
  setCurrent(0);
  drawPanel(null);
  measure();
  startSlider();
  startText();
  startSteps();
  startPlayer();
  startSearch();
  startHelp();
  at("theme").addEventListener("click", turnTheme);
  if (steps) for (const each of ["tokens", "steps"]) at(`show-${each}`).addEventListener("click", () => { showView(each); });
  document.addEventListener("keydown", onKey);
  if (folding) {
    const how = steps ? "It opens as steps; its text opens section by section." : "Its text opens section by section.";
    at("long").textContent = `This trace has ${count(tokens.length)} tokens, too many to show at once. ${how}`;
    at("long").hidden = false;
    showView("steps");
  }
  new ResizeObserver(follow).observe(holder);
  document.fonts?.ready.then(follow);
}
start();
