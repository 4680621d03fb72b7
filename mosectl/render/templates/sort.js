"use strict";
// Sorting tables, and nothing else: without it the page reads as well. A click sorts up, a second one down, a third as it was.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows];
  if (!table.tHead || rows.length < 2) continue;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const number = head.classList.contains("number");
    const text = (row) => row.cells[column].textContent.trim();
    const value = (row) => number ? parseFloat(text(row).replaceAll(",", "")) : text(row);
    const missing = (x) => x === "" || x === "–" || Number.isNaN(x);
    const button = document.createElement("button");
    button.type = "button";
    if (head.textContent.trim() === "") button.setAttribute("aria-label", "sort");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = {ascending: "descending", descending: ""}[head.getAttribute("aria-sort")] ?? "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      if (next) head.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const order = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (missing(x) || missing(y)) return missing(x) - missing(y);
        return sign * (number ? x - y : x.localeCompare(y, "en", {numeric: true}));
      };
      body.append(...(next ? [...rows].sort(order) : rows));
    });
  });
}
