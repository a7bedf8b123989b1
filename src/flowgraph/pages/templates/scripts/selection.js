// What is chosen: a token, a route, a step or a band; shown while pointed at, kept when pinned.
let shown = null, pinned = null, current = 0;
const marked = [];
const mark = (element, ...names) => {
  if (!element) return;
  element.classList.add(...names);
  marked.push([element, names]);
};
function show(choice) {
  shown = choice;
  for (const [element, names] of marked.splice(0)) element.classList.remove(...names);
  drawFocus();
  canvas.classList.toggle("busy", choice !== null && (choice.token !== undefined || choice.route !== undefined));
  if (choice?.token !== undefined) {
    mark(views[choice.token], "on");
    for (const [source] of inflows(choice.token).slice(0, LISTED)) mark(views[source], "in");
    for (const [, target] of outflows(choice.token).slice(0, LISTED)) mark(views[target], "out");
  }
  if (choice?.route !== undefined) markRoute(choice.route);
  if (choice?.step !== undefined) for (let i = page.steps.nodes[choice.step][0]; i < page.steps.nodes[choice.step][1]; i++) mark(views[i], "instep");
  markRiver(choice);
  drawPanel(choice);
  for (const element of pressed.splice(0)) element.setAttribute("aria-pressed", "false");
  press(pinned?.token !== undefined && views[pinned.token]);
  press(pinned?.route !== undefined && routeButtons[pinned.route]);
  press(pinned?.step !== undefined && stepCards.get(pinned.step));
}
const pressed = [];
function press(element) {
  if (!element) return;
  element.setAttribute("aria-pressed", "true");
  pressed.push(element);
}
function select(choice, pin) {
  if (pinned && !pin) return;
  if (playing && choice.route !== playing.route) stopPlaying();
  if (pin) pinned = choice;
  if (pin && choice.token !== undefined) {
    reveal(choice.token);
    if (view === "steps") showView("tokens");
  }
  show(choice);
  if (!pin || choice.token === undefined) return;
  rove(choice.token, false);
  bringIntoView(views[choice.token]);
}
function unpin() {
  stopPlaying();
  pinned = null;
  show(null);
}
const unhover = () => { if (!pinned) show(null); };
const same = (one, other) => one !== null && ["token", "route", "step", "band"].every((kind) => one[kind] === other[kind]);
const toggle = (choice) => (same(pinned, choice) ? unpin() : select(choice, true));
const bringIntoView = (element, block = "nearest") => element?.scrollIntoView({ block, inline: "nearest", behavior: still.matches ? "auto" : "smooth" });

// --- pointer and keyboard in the text ------------------------------------------------------------------------
function setCurrent(index) {
  if (views[current]) views[current].tabIndex = -1;
  current = index;
  if (views[current]) views[current].tabIndex = 0;
}
function rove(index, focusIt = true) {
  reveal(index);
  setCurrent(index);
  if (focusIt) views[index].focus();
}
const indexOf = (event) => {
  const found = event.target.closest(".t");
  return found ? Number(found.dataset.index) : null;
};
/** The token nearest in the closest line above (-1) or below (1). */
function vertical(direction) {
  const here = boxes[current];
  const distance = (box) => direction * (box.top - here.top);
  const line = boxes.reduce((best, box) => (distance(box) > 8 ? Math.min(best, distance(box)) : best), Infinity);
  let best = current, nearest = Infinity;
  boxes.forEach((box, i) => {
    const off = Math.abs(box.x - here.x);
    if (Math.abs(distance(box) - line) < 8 && off < nearest) [best, nearest] = [i, off];
  });
  return best;
}
/** 1 where reading goes to the right, -1 where it goes to the left. */
const reading = () => (views[current] && getComputedStyle(views[current].parentElement).direction === "rtl" ? -1 : 1);
function startText() {
  holder.addEventListener("pointerover", (event) => {
    const index = indexOf(event);
    if (event.pointerType === "mouse" && index !== null && shown?.token !== index) select({ token: index }, false);
  });
  holder.addEventListener("pointerleave", unhover);
  holder.addEventListener("focusin", (event) => {
    const index = indexOf(event);
    if (index !== null && event.target.matches(":focus-visible")) select({ token: index }, false);
  });
  holder.addEventListener("click", (event) => {
    const index = indexOf(event);
    if (index === null) return event.target.closest("button") ? undefined : unpin();
    rove(index);
    toggle({ token: index });
  });
  holder.addEventListener("keydown", (event) => {
    if (indexOf(event) === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const last = tokens.length - 1, inside = (index) => Math.max(0, Math.min(last, index));
    const moves = {
      ArrowRight: () => inside(current + reading()), ArrowLeft: () => inside(current - reading()),
      ArrowDown: () => vertical(1), ArrowUp: () => vertical(-1), Home: () => 0, End: () => last,
    };
    if (Object.hasOwn(moves, event.key)) rove(moves[event.key]());
    else if (event.key === "Enter" || event.key === " ") toggle({ token: current });
    else return;
    event.preventDefault();
  });
}
