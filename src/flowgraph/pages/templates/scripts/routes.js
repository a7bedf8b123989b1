// Routes, each playable token by token, and the tables of hubs and checkpoints.
const BEAT = 1100; // milliseconds a token is shown for
let playing = null; // {route, position, timer}: timer is null while paused

const routeButtons = page.routes.map(([path, flow], route) => {
  const edges = path.flatMap((index, i) => [i ? make("span", "arrow", "→") : null, chip(index)]).filter(Boolean);
  const button = pressable("path", () => toggle({ route }), make("span", "pct", percent(flow)), make("span", "", ...edges));
  button.setAttribute("aria-pressed", "false");
  for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => select({ route }, false));
  for (const event of ["pointerleave", "blur"]) button.addEventListener(event, unhover);
  return button;
});
function drawRoutes() {
  if (!routeButtons.length) return;
  const sum = page.routes.reduce((total, [, flow]) => total + flow, 0);
  const rows = routeButtons.map((button, route) => {
    const play = pressable("play", () => startPlaying(route), "▶");
    play.setAttribute("aria-label", `Play route ${route + 1}`);
    return make("li", "", play, button);
  });
  at("routes").append(
    make("h2", "", "Widest routes"),
    make("p", "hint", `Single paths from question to answer and the share of the flow each carries, ${percent(sum)} in all. ▶ walks along one.`),
    make("ol", "", ...rows),
  );
}
function markRoute(route) {
  page.routes[route][0].forEach((index, i) => {
    if (!playing || i <= playing.position) mark(views[index], i === playing?.position ? "walk" : "on");
  });
}

// --- playing: one token after the other, by itself or step by step -------------------------------------------
function startPlaying(route) {
  stopPlaying();
  playing = { route, position: 0, timer: null };
  pinned = { route };
  at("player").hidden = false;
  for (const index of page.routes[route][0]) if (folding) reveal(index);
  showView("tokens");
  goAlong(0);
  if (!still.matches) resume(); // who asked for less motion goes on by hand
  at("play-pause").focus({ preventScroll: true });
}
function goAlong(change) {
  if (!playing) return;
  const path = page.routes[playing.route][0];
  playing.position = Math.max(0, Math.min(path.length - 1, playing.position + change));
  const index = path[playing.position];
  reveal(index);
  show({ route: playing.route });
  bringIntoView(views[index], "nearest");
  at("play-place").textContent = `route ${playing.route + 1}: token ${playing.position + 1} of ${path.length}, “${exact(tokens[index][TEXT])}”`;
  at("play-back").disabled = playing.position === 0;
  at("play-on").disabled = playing.position === path.length - 1;
  if (playing.position === path.length - 1) pause();
}
function resume() {
  if (!playing) return;
  if (playing.position === page.routes[playing.route][0].length - 1) goAlong(-playing.position);
  playing.timer = setInterval(() => goAlong(1), BEAT);
  nameButton();
}
function pause() {
  clearInterval(playing?.timer ?? undefined);
  if (playing) playing.timer = null;
  nameButton();
}
function nameButton() {
  const on = playing?.timer != null;
  at("play-pause").textContent = on ? "pause" : "▶ play";
}
const playOrPause = () => (playing?.timer != null ? pause() : resume());
const byHand = (change) => { pause(); goAlong(change); };
function stopPlaying() {
  if (!playing) return;
  pause();
  playing = null;
  at("player").hidden = true;
}
function startPlayer() {
  at("play-back").addEventListener("click", () => byHand(-1));
  at("play-on").addEventListener("click", () => byHand(1));
  at("play-pause").addEventListener("click", playOrPause);
  at("play-stop").addEventListener("click", unpin);
}

function drawRoles(title, hint, roles) {
  if (!roles.length) return;
  const head = make("tr", "", ...["token", "throughput", "inflows", "outflows"].map((name) => make("th", "", name)));
  const rows = roles.slice(0, 8).map(([index, flow, into, out]) => {
    const cells = [percent(flow), into.toFixed(1), out.toFixed(1)].map((value) => make("td", "", value));
    return make("tr", "", make("td", "", clickable(index)), ...cells);
  });
  const table = make("table", "", make("thead", "", head), make("tbody", "", ...rows));
  at("roles").append(make("section", "", make("h2", "", title), make("p", "hint", hint), table));
}
