// The widest routes, each of which can be played token by token, and the tables of hubs and checkpoints.

const MILLISECONDS_PER_TOKEN = 1100;
const MAX_ROLES = 8; // rows of a table of roles

let player = null; // {route, position, timer} while a route is played; timer is null while it is paused

// --- list of routes --------------------------------------------------------------------------------------------

const routeButtons = routes.map(({ path, flow }, route) => {
  const hops = path.flatMap((token, place) => (place ? [make("span", "arrow", "→"), chip(token)] : [chip(token)]));
  const label = [make("span", "pct", percent(flow)), make("span", "", ...hops)];
  const button = pressable("path", () => togglePin({ route }), ...label);
  button.setAttribute("aria-pressed", "false");
  listen(button, ["pointerenter", "focus"], () => preview({ route }));
  listen(button, ["pointerleave", "blur"], endPreview);
  return button;
});

function drawRoutes() {
  if (!routes.length) return;
  const rows = routeButtons.map((button, route) => {
    const play = pressable("play", () => startRoute(route), "▶");
    play.setAttribute("aria-label", `Play route ${route + 1}`);
    return make("li", "", play, button);
  });
  const total = routes.reduce((sum, { flow }) => sum + flow, 0);
  const hint =
    "Single paths from question to answer and the share of the flow that each carries, " +
    `${percent(total)} in all. ▶ plays a path token by token.`;
  byId("routes").append(make("h2", "", "Widest routes"), make("p", "hint", hint), make("ol", "", ...rows));
}

/** Mark the tokens of a route; while it is played, those up to the current position. */
function markRoute(route) {
  routes[route].path.forEach((token, place) => {
    const isReached = !player || place <= player.position;
    const isPosition = player !== null && place === player.position;
    if (isReached) mark(tokenElements[token], isPosition ? "walk" : "on");
  });
}

// --- player ----------------------------------------------------------------------------------------------------

function startRoute(route) {
  stopPlayer();
  player = { route, position: 0, timer: null };
  pinned = { route };
  byId("player").hidden = false;
  if (isFolding) {
    for (const token of routes[route].path) reveal(token);
  }
  showView("tokens");
  moveAlong(0);
  // With reduced motion the reader moves along by hand.
  if (!reducedMotion.matches) resumePlayer();
  byId("play-pause").focus({ preventScroll: true });
}

/** Move by some tokens along the route that is played, and stop the clock at its end. */
function moveAlong(change) {
  if (!player) return;
  const { path } = routes[player.route];
  const last = path.length - 1;
  player.position = Math.max(0, Math.min(last, player.position + change));
  const token = path[player.position];
  reveal(token);
  show({ route: player.route });
  bringIntoView(tokenElements[token]);

  const place = `route ${player.route + 1}: token ${player.position + 1} of ${path.length}`;
  byId("play-place").textContent = `${place}, “${exact(tokens[token].text)}”`;
  byId("play-back").disabled = player.position === 0;
  byId("play-on").disabled = player.position === last;
  if (player.position === last) pausePlayer();
}

function isRunning() {
  return player !== null && player.timer !== null;
}

function resumePlayer() {
  if (!player) return;
  const isAtEnd = player.position === routes[player.route].path.length - 1;
  if (isAtEnd) moveAlong(-player.position);
  player.timer = setInterval(() => moveAlong(1), MILLISECONDS_PER_TOKEN);
  labelPauseButton();
}

function pausePlayer() {
  if (player) {
    clearInterval(player.timer);
    player.timer = null;
  }
  labelPauseButton();
}

function labelPauseButton() {
  byId("play-pause").textContent = isRunning() ? "pause" : "▶ play";
}

function togglePlayer() {
  if (isRunning()) pausePlayer();
  else resumePlayer();
}

function moveByHand(change) {
  pausePlayer();
  moveAlong(change);
}

function stopPlayer() {
  if (!player) return;
  pausePlayer();
  player = null;
  byId("player").hidden = true;
}

/** Stop playing when anything but the route that is played is chosen. */
function stopPlayerUnless(route) {
  if (player && player.route !== route) stopPlayer();
}

function startPlayer() {
  byId("play-back").addEventListener("click", () => moveByHand(-1));
  byId("play-on").addEventListener("click", () => moveByHand(1));
  byId("play-pause").addEventListener("click", togglePlayer);
  byId("play-stop").addEventListener("click", unpin);
}

// --- hubs and checkpoints --------------------------------------------------------------------------------------

function drawRoles(title, hint, records) {
  if (!records.length) return;
  const rows = records
    .slice(0, MAX_ROLES)
    .map(({ token, throughput, inflows, outflows }) =>
      tableRow(tokenButton(token), percent(throughput), inflows.toFixed(1), outflows.toFixed(1)),
    );
  const head = tableHead(["token", "throughput", "inflows", "outflows"]);
  const table = make("table", "", head, make("tbody", "", ...rows));
  byId("roles").append(make("section", "", make("h2", "", title), make("p", "hint", hint), table));
}
