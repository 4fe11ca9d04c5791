for (const table of document.querySelectorAll("table.sorts")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const key = row => {
        let end = 0;  // a cell may span several columns
        const cell = [...row.cells].find(cell => (end += cell.colSpan) > column);
        return cell.dataset.value ?? cell.textContent.trim();
      };
      const sign = order === "ascending" ? 1 : -1;
      const compare = (a, b) =>
        !a || !b ? !a - !b  // what has no value stays below
          : sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => compare(key(a), key(b))));
    });
  });
}
