// The evaluation page: draw one item of a task, its tokens coloured by a method and beside it by the truth.

const MIDDLE = (page.levels.length - 1) / 2; // the character of this index stands for 0
const REGION_NAMES = { Q: "question", R: "reasoning", A: "answer", ".": CONTEXT };

// --- scores ----------------------------------------------------------------------------------------------------

/** The scores of a text from -1 to 1; null where there are none. */
function scoresOf(levels) {
  if (!levels) return null;
  return [...levels].map((character) => (page.levels.indexOf(character) - MIDDLE) / MIDDLE);
}

// --- text ------------------------------------------------------------------------------------------------------

/** The text of an item with every token coloured by its score; below 0 in the colour of less. */
function colouredText(text, scores) {
  const prose = make("div", "prose");
  const isSigned = scores.some((score) => score < 0);
  text.tokens.forEach((token, index) => {
    const region = REGION_NAMES[text.regions[index]] ?? CONTEXT;
    const direction = scores[index] < 0 ? " minus" : " plus";
    const sign = isSigned ? direction : "";
    const element = make("span", `t ${region}${sign}`);
    setStrength(element, Math.abs(scores[index]));
    element.title = `${index}, ${region}, ${(scores[index] ** 2 * Math.sign(scores[index])).toFixed(2)} of the largest`;
    appendTokenText(element, token);
    prose.append(beforeToken(token), element);
    if (token.endsWith("\n")) prose.append(make("br"));
  });
  return prose;
}

function side(title, content) {
  return make("div", "", make("h3", "", title), content);
}

// --- truth -----------------------------------------------------------------------------------------------------

/** The units of the truth, or pairs of units, with the effect of each. */
function unitTable(item) {
  if (!item.units.length && !item.pairs.length) return item.plain ? make("p", "plain", visible(item.plain)) : null;
  const rows = item.pairs.length ? item.pairs : item.units;
  const names = item.pairs.length ? ["reads", "is read", "effect"] : ["unit", "effect"];
  const body = make("tbody");
  for (const row of rows) {
    const effect = row[row.length - 1];
    const line = tableRow(...row.slice(0, -1).map(visible), String(effect));
    line.lastElementChild.className = "figure";
    body.append(line);
  }
  return make("table", "units", tableHead(names), body);
}

// --- viewer ----------------------------------------------------------------------------------------------------

/** A menu with a label; `names` are what it shows. */
function menu(label, names, action) {
  const select = make("select");
  names.forEach((name, index) => {
    const option = make("option", "", name);
    option.value = String(index);
    select.append(option);
  });
  select.addEventListener("change", action);
  return { select, element: make("label", "", label, select) };
}

function startViewer(details) {
  const task = page.tasks[Number(details.dataset.task)];
  const viewer = details.querySelector(".viewer");
  const body = make("div");
  let method = null; // the chosen method stays chosen when the item changes

  const marks = { true: "", false: " (answered wrongly)", null: "" };
  const names = task.items.map((item) => `${visible(item.id)}${marks[item.right]}${item.note ? " (no result)" : ""}`);
  const items = menu("Item", names, draw);
  const holder = make("span");

  function draw() {
    const item = task.items[Number(items.select.value)];
    const methods = Object.keys(item.methods);
    if (!methods.includes(method)) method = methods[0] ?? null;
    const label = (name) => `${visible(name)}${name in item.values ? `: ${item.values[name]}` : ""}`;
    const choice = menu(`Method: ${task.metric}`, methods.map(label), () => {
      method = methods[Number(choice.select.value)];
      drawSides(item);
    });
    choice.select.value = String(methods.indexOf(method));
    holder.replaceChildren(choice.element);
    drawSides(item);
  }

  function drawSides(item) {
    const text = page.texts[item.text];
    const none = text.tokens.map(() => 0);
    const scores = method === null ? none : (scoresOf(item.methods[method]) ?? none);
    const truth = scoresOf(item.truth);
    const right = make("div", "", truth ? colouredText(text, truth) : null, unitTable(item));
    body.replaceChildren(
      ...(item.note ? [make("p", "alert", visible(item.note))] : []),
      make(
        "div",
        "sides",
        side(method === null ? "text" : `scores of ${visible(method)}`, colouredText(text, scores)),
        side("truth", right),
      ),
    );
  }

  if (!task.items.length) {
    viewer.append(make("p", "hint", "No item."));
    return;
  }
  const hint =
    "Colour: root of the share of the largest score, among the tokens that the task compares; others have none. " +
    "Lines below tokens: question, reasoning, answer.";
  viewer.append(make("div", "choice", items.element, holder), make("p", "hint", hint), body);
  draw();
}

for (const details of document.querySelectorAll("details.items")) {
  // A page of many items is drawn only where it is opened.
  details.addEventListener("toggle", () => startViewer(details), { once: true });
}
