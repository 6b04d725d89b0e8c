// Sorts the long tables of a page by a click on a header, by number where the cells begin with one.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const first = [...body.rows];
  const numberOf = (text) => parseFloat(text.split("→").pop().replace("−", "-").replace(/[,<]/g, ""));
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const turns = { none: "descending", descending: "ascending", ascending: "none" };
      const order = turns[head.getAttribute("aria-sort") ?? "none"], sign = order === "ascending" ? 1 : -1;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      if (order !== "none") head.setAttribute("aria-sort", order);
      const textOf = (row) => row.cells[column].textContent.trim();
      const compare = (one, other) => {
        const [a, b] = [one, other].map((row) => numberOf(textOf(row)));
        if (Number.isNaN(a) !== Number.isNaN(b)) return Number.isNaN(a) ? 1 : -1; // texts come last
        return sign * (Number.isNaN(a) ? textOf(one).localeCompare(textOf(other)) : a - b);
      };
      body.append(...(order === "none" ? first : [...first].sort(compare)));
    });
  });
}
