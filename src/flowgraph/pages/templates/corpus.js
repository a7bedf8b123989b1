// The corpus page: sort the table of traces by a column, and list only the traces that contain a text.

const table = byId("traces"); // absent if no line could be traced

// --- sort ------------------------------------------------------------------------------------------------------

const textOrder = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

function compareTexts(first, second, column) {
  return textOrder.compare(first.cells[column].textContent, second.cells[column].textContent);
}

/** The value of a number cell, or null where there is none. */
function numberIn(row, column) {
  const { v } = row.cells[column].dataset;
  return v === "" ? null : Number(v);
}

/** Compare two rows by a number; a row without the number goes last in both directions. */
function compareNumbers(first, second, column, sign) {
  const a = numberIn(first, column);
  const b = numberIn(second, column);
  if (a === null || b === null) return Number(a === null) - Number(b === null);
  return sign * (a - b);
}

function sortRows(rows, column, isNumber, isAscending) {
  const sign = isAscending ? 1 : -1;
  return [...rows].sort((first, second) =>
    isNumber ? compareNumbers(first, second, column, sign) : sign * compareTexts(first, second, column),
  );
}

function startSorting(rows) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      // A second click turns the order round. At first, numbers fall, and texts and line numbers rise.
      const isNumber = heading.classList.contains("number");
      const before = heading.getAttribute("aria-sort");
      const isAscending = before ? before === "descending" : !isNumber || column === 0;
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", isAscending ? "ascending" : "descending");
      table.tBodies[0].append(...sortRows(rows, column, isNumber, isAscending));
    });
  });
}

// --- find ------------------------------------------------------------------------------------------------------

function startFinding(rows) {
  const field = byId("find");
  const idAndAnswer = (row) => `${row.cells[1].textContent}\n${row.cells[2].textContent}`.toLowerCase();
  const texts = rows.map(idAndAnswer);
  const find = () => {
    const wanted = field.value.trim().toLowerCase();
    let numListed = 0;
    rows.forEach((row, index) => {
      row.hidden = !texts[index].includes(wanted);
      if (!row.hidden) numListed++;
    });
    byId("count").textContent = wanted ? `${count(numListed)} of ${count(rows.length)} listed` : "";
  };
  field.addEventListener("input", find);
  find(); // a browser may restore the field when the page is loaded again
}

// --- start -----------------------------------------------------------------------------------------------------

if (table) {
  const rows = [...table.tBodies[0].rows];
  startSorting(rows);
  startFinding(rows);
}
