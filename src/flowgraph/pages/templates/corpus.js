"use strict";
(() => {
  const table = document.getElementById("traces");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  const words = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

  // A cell without a number goes last, whichever way the column is sorted.
  const compare = (column, isNumber, sign) => (a, b) => {
    if (!isNumber) return sign * words.compare(a.cells[column].textContent, b.cells[column].textContent);
    const [x, y] = [a, b].map((row) => row.cells[column].dataset.v);
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (Number(x) - Number(y));
  };

  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const isNumber = heading.classList.contains("number");
      const before = heading.getAttribute("aria-sort");
      const ascending = before ? before === "descending" : !isNumber || column === 0;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      body.append(...[...rows].sort(compare(column, isNumber, ascending ? 1 : -1)));
    });
  });

  const find = document.getElementById("find");
  const count = document.getElementById("count");
  const texts = rows.map((row) => `${row.cells[1].textContent}\n${row.cells[2].textContent}`.toLowerCase());
  const filter = () => {
    const wanted = find.value.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row, index) => {
      row.hidden = !texts[index].includes(wanted);
      shown += !row.hidden;
    });
    count.textContent = wanted ? `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} listed` : "";
  };
  find.addEventListener("input", filter);
  filter();  // a browser may keep what was typed over a reload
})();
