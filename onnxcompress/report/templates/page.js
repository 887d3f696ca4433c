"use strict";
// The page is complete without this: here tables learn to be sorted and searched, and the figures to be saved.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (body.rows.length < 4 || !table.tHead) continue;
  const rows = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.classList.contains("n") ? "descending" : "ascending";
      const other = { ascending: "descending", descending: "ascending" };
      const order = other[head.getAttribute("aria-sort")] ?? first;
      const sign = order === "ascending" ? 1 : -1;
      for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const key = (row) => row.cells[column].dataset.v;
      rows.sort((a, b) => {
        if (key(a) !== undefined && key(b) !== undefined) return sign * (key(a) - key(b));
        const [x, y] = [a.cells[column].textContent, b.cells[column].textContent];
        if (!x || !y) return x ? -1 : y ? 1 : 0;
        return sign * x.localeCompare(y, undefined, { numeric: true });
      });
      body.append(...rows);
    });
  });
  if (rows.length > 12) {
    const field = document.createElement("input");
    field.type = "search";
    field.className = "filter";
    field.placeholder = `Filter ${rows.length} rows`;
    field.setAttribute("aria-label", field.placeholder);
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) {
        const shown = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => shown.includes(word));
      }
    });
    table.parentElement.before(field);
  }
}
const save = document.createElement("button");
save.type = "button";
save.textContent = "Save them as JSON";
save.addEventListener("click", () => {
  const link = document.createElement("a");
  const content = JSON.parse(document.getElementById("content").textContent);
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
  link.download = "report.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
document.querySelector("footer p").append(" ", save);
