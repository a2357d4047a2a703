// Sort the table of layers by a column when its heading is pressed.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th"), table = heading.closest("table");
    const column = [...heading.parentNode.children].indexOf(heading);
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.children[column].dataset.value;
    const body = table.tBodies[0], numeric = heading.classList.contains("n");
    const compare = numeric ? (a, b) => a - b : (a, b) => a.localeCompare(b, undefined, { numeric: true });
    [...body.rows]
      .sort((a, b) => (down ? -1 : 1) * compare(value(a), value(b)))
      .forEach((row) => body.append(row));
  });
}
