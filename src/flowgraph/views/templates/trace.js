
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("trace").textContent);
  const [TEXT, REGION, GENERATED, H, G, FLOW, JOINED] = [0, 1, 2, 3, 4, 5, 6];
  const tokens = page.tokens;
  const at = (id) => document.getElementById(id);
  const holder = at("text"), panel = at("panel"), slider = at("arcs");
  const CONTEXT = "context", LISTED = 5, FOCUS_ARCS = 14, DEFAULT_ARCS = 60;

  // --- small helpers: every string reaches the page through textContent -------------------------------------
  function make(tag, className = "", ...children) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children.filter((child) => child !== null && child !== "")); // append makes text nodes of strings
    return element;
  }
  function shape(tag, attributes = {}) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }
  function percent(share) {
    if (share === null) return "–";
    const value = 100 * share;
    if (value === 0 || value > 99.95) return `${Math.round(value)} %`;
    return value < 0.01 ? "< 0.01 %" : `${value.toFixed(value < 1 ? 2 : 1)} %`;
  }
  const count = (value) => value.toLocaleString("en");
  const number = (value) => (value === null ? "–" : value !== 0 && value < 0.001 ? value.toExponential(1) : value.toFixed(3));

  // --- characters that would be invisible, or would reorder what stands around them, are shown as signs -----
  const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;
  const JOINERS = /^[\u200c\u200d]$/; // needed inside words and emoji, invisible only on their own
  function sign(character) {
    const code = character.codePointAt(0);
    if (character === "\n") return "⏎";
    if (character === "\t") return "⇥";
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    return code === 0x7f ? "␡" : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  }
  const visible = (text) => text.replace(HIDDEN, (character) => (JOINERS.test(character) && text !== character ? character : sign(character)));
  const exact = (text) => (text === "" ? "(empty)" : visible(text).replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length)));
  /** A token's name in lists; one without letters or digits brings the words before it, to be recognised by. */
  function named(index) {
    const words = Array.from(visible(tokens[index][TEXT]).trim() || "·".repeat(tokens[index][TEXT].length));
    const wordy = (text) => /[\p{L}\p{N}]/u.test(text);
    let before = "";
    for (let i = index - 1; !wordy(words.join("") + before) && i >= Math.max(0, index - 4); i--) before = visible(tokens[i][TEXT]) + before;
    const context = Array.from(before.trim()).slice(-16).join("");
    return make("span", "", context && make("small", "", `${context} `), words.length > 24 ? `${words.slice(0, 23).join("")}…` : words.join(""));
  }
  const chip = (index) => make("span", `chip ${tokens[index][REGION] ?? CONTEXT}`, named(index));

  // --- colour: square root of throughput, full at the strongest token outside the answer --------------------
  const inner = tokens.filter((token) => token[REGION] !== "answer").map((token) => token[FLOW]);
  const strongest = Math.max(...tokens.map((token) => token[FLOW]));
  const full = inner.reduce((top, flow) => Math.max(top, flow), 0) || strongest || 1;
  const level = (flow) => Math.sqrt(Math.min(1, flow / full));

  // --- the text ---------------------------------------------------------------------------------------------
  const views = [];
  function drawToken(index) {
    const [text, region, , , , flow, joined] = tokens[index];
    const view = make("span", "t");
    if (!region) view.classList.add("dim");
    view.style.setProperty("--f", level(flow).toFixed(3));
    const lead = text.match(/^ */)[0];
    const rest = joined ? "" : text.slice(lead.length);
    if (joined) view.append(make("span", "sign", "‥"));
    else if (rest === "") { view.classList.add("blank"); view.append("\u00a0"); }
    for (const part of rest.split(/(\n+)/)) {
      if (part.startsWith("\n")) view.append(make("span", "sign", "⏎".repeat(part.length)));
      else view.append(visible(part));
    }
    view.dataset.index = index;
    view.tabIndex = -1;
    view.setAttribute("role", "button");
    view.setAttribute("aria-pressed", "false");
    view.setAttribute("aria-label", `${exact(text)}, token ${index}, ${region ?? "outside the three parts"}, throughput ${percent(flow)}`);
    views.push(view);
    const breaks = joined ? 0 : text.split("\n").length - 1;
    return [rest ? lead : make("wbr"), view, ...[make("br"), make("span", "gap")].slice(0, breaks)];
  }
  /** Runs of one region; tokens of none that lie between two tokens of the same region stay inside its run. */
  function blocks() {
    const regions = tokens.map((token) => token[REGION]);
    let last = null, gap = [];
    regions.forEach((region, i) => {
      if (!region) return void gap.push(i);
      if (region === last) for (const j of gap) regions[j] = region;
      [last, gap] = [region, []];
    });
    const runs = [];
    regions.forEach((region, i) => {
      if (i === 0 || region !== regions[i - 1]) runs.push({ region: region ?? CONTEXT, indices: [] });
      runs.at(-1).indices.push(i);
    });
    return runs;
  }
  function drawText() {
    for (const { region, indices } of blocks()) {
      const prose = make("div", "prose", ...indices.flatMap(drawToken));
      prose.dir = "auto";
      const title = region === CONTEXT ? "Context" : region[0].toUpperCase() + region.slice(1);
      holder.append(make("section", `block ${region}`, make("h2", "", make("span", "", title)), prose));
    }
    views[0].tabIndex = 0;
  }
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
      make("span", "key curves", example, "flow to a later token, thicker = more"),
      make("span", "key", make("span", "t dim", "dimmed"), "template and other text outside the three parts"),
    );
  }

  // --- curves -----------------------------------------------------------------------------------------------
  const canvas = shape("svg", { class: "arcs", "aria-hidden": "true" });
  const everything = shape("g", { class: "all" }), focus = shape("g", { class: "focus" });
  canvas.append(everything, focus);
  const topArc = page.arcs.length ? page.arcs[0][2] : 1;
  let boxes = [];
  function measure() {
    const origin = holder.getBoundingClientRect();
    boxes = views.map((view) => {
      const box = view.getClientRects()[0] ?? view.getBoundingClientRect();
      return { x: (box.left + box.right) / 2 - origin.left, top: box.top - origin.top, bottom: box.bottom - origin.top };
    });
  }
  function curve(source, target) {
    const from = boxes[source], to = boxes[target], run = Math.abs(to.x - from.x);
    if (to.top - from.top < 5) { // on one line: over it
      const rise = Math.min(26, 7 + 0.12 * run);
      const lean = 0.2 * (to.x - from.x);
      return `M${from.x} ${from.top}C${from.x + lean} ${from.top - rise} ${to.x - lean} ${to.top - rise} ${to.x} ${to.top}`;
    }
    const bend = Math.max(12, 0.5 * (to.top - from.bottom));
    return `M${from.x} ${from.bottom}C${from.x} ${from.bottom + bend} ${to.x} ${to.top - bend} ${to.x} ${to.top}`;
  }
  function arc([source, target, flow], top, className = "") {
    const share = Math.sqrt(flow / top), faintest = className ? 0.35 : 0.12;
    const ink = { "stroke-width": (0.7 + 4.3 * share).toFixed(2), opacity: (faintest + (0.85 - faintest) * share).toFixed(2) };
    return shape("path", { d: curve(source, target), class: className, ...ink });
  }
  const drawArcs = () => everything.replaceChildren(...page.arcs.slice(0, stops[slider?.value ?? 0]).map((edge) => arc(edge, topArc)));

  /** Slider stops: fine where the picture is readable, coarse towards everything. */
  const stops = [0, 5, 10, 20, 30, 40, DEFAULT_ARCS, 80, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000, 3000]
    .filter((stop) => stop < page.arcs.length).concat(page.arcs.length);
  function moveSlider() {
    const shown = stops[slider.value], all = page.num_arcs;
    const label = shown === all ? `all ${count(all)}` : `the strongest ${count(shown)} of ${count(all)}`;
    at("arc-count").textContent = label;
    slider.setAttribute("aria-valuetext", label);
    drawArcs();
  }

  // --- what one token does ----------------------------------------------------------------------------------
  const inflows = tokens.map(() => []), outflows = tokens.map(() => []);
  for (const edge of page.edges) { // strongest first, so the lists are too
    inflows[edge[1]].push(edge);
    outflows[edge[0]].push(edge);
  }
  function flowList(title, className, edges, end, edgeOfPage, throughput) {
    if (throughput === 0) return null;
    const rows = edges.slice(0, LISTED).map((edge) => ({ share: edge[2], index: edge[end] }));
    const rest = throughput - edges.reduce((sum, edge) => sum + edge[2], 0);
    if (page.edges_left_out === 0 && rest > 0.002 * throughput) rows.unshift({ share: rest, label: edgeOfPage });
    const list = make("ul", `flows ${className}`);
    for (const { share, index, label } of rows) {
      const bar = make("div", "bar");
      bar.style.setProperty("--share", Math.min(1, share / throughput));
      const name = label ? make("span", "hint", label) : clickable(index);
      list.append(make("li", "", make("span", "pct", percent(share)), make("div", "", bar), name));
    }
    const more = edges.length - LISTED;
    const unlisted = page.edges_left_out ? "at least " : "";
    return make("div", "", make("h3", className, title), list, more > 0 ? make("p", "hint", `and ${unlisted}${count(more)} weaker`) : null);
  }
  const clickable = (index) => {
    const button = make("button", "", chip(index));
    button.addEventListener("click", () => select({ token: index }, true));
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => views[index].classList.add("peek"));
    for (const event of ["pointerleave", "blur", "click"]) button.addEventListener(event, () => views[index].classList.remove("peek"));
    return button;
  };
  /** Without a choice: what to do, and the steps worth looking at first. */
  function drawInvitation() {
    const steps = page.edges.slice(0, 12).map(([source, target, flow]) =>
      make("li", "", make("span", "pct", percent(flow)), make("span", "", clickable(source), make("span", "arrow", "→"), clickable(target))));
    const curves = steps.length ? " and its own curves in the text" : "";
    const hint = `Point at a token, tap it or reach it with the arrow keys: its numbers appear here${curves}. A click pins it, Escape releases it.`;
    panel.replaceChildren(
      make("h2", "", "One token at a time"),
      make("p", "hint", hint),
      ...(steps.length ? [make("h3", "", "Strongest single steps"), make("ul", "flows steps", ...steps)] : []),
    );
  }
  function drawPanel(index) {
    panel.classList.toggle("active", index !== null);
    panel.classList.toggle("roomy", page.edges.length > 8); // a fixed height keeps the routes below from jumping
    if (index === null) return drawInvitation();
    const [text, region, generated, h, g, flow, joined] = tokens[index];
    const numbers = make("dl", "numbers");
    const line = (name, value, note) => numbers.append(make("dt", "", name), make("dd", "", value), make("dd", "note", note));
    line("throughput", percent(flow), "of the flow passes here");
    line("h", number(h), "influence on the answer");
    line("g", number(g), "influence that arrives");
    const about = [`token ${index}`, region ?? "outside question, reasoning and answer", generated ? "generated" : "prompt"];
    if (joined) about.push("part of the character before");
    const into = flowList("Flow in from", "in", inflows[index], 0, "starts here", flow);
    const out = flowList("Flow out to", "out", outflows[index], 1, "ends here", flow);
    const release = make("button", "release", "unpin (Esc)");
    release.addEventListener("click", unpin);
    panel.replaceChildren(
      make("div", "head", make("span", "name", exact(text)), pinned ? release : null),
      make("p", "hint", about.join(" · ")),
      numbers,
      ...[into, out].filter(Boolean),
    );
  }

  // --- selection: a token or a route, shown while pointed at, kept when pinned ------------------------------
  let shown = null, pinned = null;
  const marked = [];
  const mark = (element, ...names) => { element.classList.add(...names); marked.push([element, names]); };
  function show(choice) {
    shown = choice;
    for (const [element, names] of marked.splice(0)) element.classList.remove(...names);
    drawFocus();
    canvas.classList.toggle("busy", choice !== null);
    if (choice?.token !== undefined) {
      mark(views[choice.token], "on");
      for (const [source] of inflows[choice.token].slice(0, LISTED)) mark(views[source], "in");
      for (const [, target] of outflows[choice.token].slice(0, LISTED)) mark(views[target], "out");
    }
    if (choice?.route !== undefined) for (const index of page.routes[choice.route][0]) mark(views[index], "on");
    drawPanel(choice?.token ?? null);
    for (const element of document.querySelectorAll('[aria-pressed="true"]')) element.setAttribute("aria-pressed", "false");
    if (pinned?.token !== undefined) views[pinned.token].setAttribute("aria-pressed", "true");
    if (pinned?.route !== undefined) routeButtons[pinned.route].setAttribute("aria-pressed", "true");
  }
  function drawFocus() {
    const paths = [];
    if (shown?.token !== undefined) {
      const into = inflows[shown.token].slice(0, FOCUS_ARCS), out = outflows[shown.token].slice(0, FOCUS_ARCS);
      const top = Math.max(into[0]?.[2] ?? 0, out[0]?.[2] ?? 0);
      paths.push(...into.map((edge) => arc(edge, top, "in")), ...out.map((edge) => arc(edge, top, "out")));
    }
    if (shown?.route !== undefined) {
      const path = page.routes[shown.route][0];
      for (let i = 1; i < path.length; i++) paths.push(shape("path", { d: curve(path[i - 1], path[i]), class: "route" }));
    }
    focus.replaceChildren(...paths);
  }
  function select(choice, pin) {
    if (pinned && !pin) return;
    if (pin) pinned = choice;
    show(choice);
    if (!pin || choice.token === undefined) return;
    rove(choice.token, false);
    views[choice.token].scrollIntoView({ block: "nearest" });
  }
  function unpin() {
    pinned = null;
    show(null);
  }
  const same = (one, other) => one?.token === other.token && one?.route === other.route;
  const toggle = (choice) => (same(pinned, choice) ? unpin() : select(choice, true));

  // --- pointer and keyboard ---------------------------------------------------------------------------------
  let current = 0;
  function rove(index, focusIt = true) {
    views[current].tabIndex = -1;
    current = index;
    views[current].tabIndex = 0;
    if (focusIt) views[current].focus();
  }
  const indexOf = (event) => {
    const view = event.target.closest(".t");
    return view ? Number(view.dataset.index) : null;
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
  holder.addEventListener("pointerover", (event) => {
    const index = indexOf(event);
    if (event.pointerType === "mouse" && index !== null && shown?.token !== index) select({ token: index }, false);
  });
  holder.addEventListener("pointerleave", () => { if (!pinned) show(null); });
  holder.addEventListener("focusin", (event) => {
    const index = indexOf(event);
    if (index !== null && event.target.matches(":focus-visible")) select({ token: index }, false);
  });
  holder.addEventListener("click", (event) => { 
    const index = indexOf(event);
    if (index === null) return unpin();
    rove(index);
    toggle({ token: index });
  });
  holder.addEventListener("keydown", (event) => {
    const last = tokens.length - 1;
    const moves = {
      ArrowRight: () => Math.min(last, current + 1), ArrowLeft: () => Math.max(0, current - 1),
      ArrowDown: () => vertical(1), ArrowUp: () => vertical(-1), Home: () => 0, End: () => last,
    };
    if (Object.hasOwn(moves, event.key)) rove(moves[event.key]());
    else if (event.key === "Enter" || event.key === " ") toggle({ token: current });
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") unpin(); });

  // --- routes, hubs and checkpoints -------------------------------------------------------------------------
  const routeButtons = page.routes.map(([path, flow], route) => {
    const steps = path.flatMap((index, i) => [i ? make("span", "arrow", "→") : null, chip(index)]).filter(Boolean);
    const button = make("button", "", make("span", "pct", percent(flow)), make("span", "", ...steps));
    button.setAttribute("aria-pressed", "false");
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => select({ route }, false));
    for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => { if (!pinned) show(null); });
    button.addEventListener("click", () => toggle({ route }));
    return button;
  });
  function drawRoutes() {
    if (!routeButtons.length) return;
    const sum = page.routes.reduce((total, [, flow]) => total + flow, 0);
    at("routes").append(
      make("h2", "", "Widest routes"),
      make("p", "hint", `Single paths from question to answer and the share of the flow each carries, ${percent(sum)} in all.`),
      make("ol", "", ...routeButtons.map((button) => make("li", "", button))),
    );
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

  drawLegend();
  drawText();
  drawRoutes();
  drawRoles("Hubs", "Reasoning tokens that most of the flow passes through.", page.hubs);
  drawRoles("Aggregation checkpoints", "Reasoning tokens that gather flow from many places.", page.checkpoints);
  const explained = "Inflows and outflows: the effective number of edges by which a token’s flow arrives and leaves.";
  if (page.hubs.length) at("roles").append(make("p", "hint", explained));
  holder.append(canvas);
  drawPanel(null);
  measure();
  if (slider) {
    slider.max = stops.length - 1;
    slider.value = Math.max(0, stops.findLastIndex((stop) => stop <= DEFAULT_ARCS));
    slider.addEventListener("input", moveSlider);
    moveSlider();
  }
  let waiting = false;
  function follow() { // curves keep to their tokens when the text reflows
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; measure(); drawArcs(); drawFocus(); });
  }
  new ResizeObserver(follow).observe(holder);
  document.fonts?.ready.then(follow);
})();
