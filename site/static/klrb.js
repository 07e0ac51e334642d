// A search box over each table of libraries: a row stays if every word occurs in it.
function addFilter(table) {
  const rows = [...table.querySelectorAll("tbody tr")];
  const box = document.createElement("input");
  box.className = "filter";
  box.type = "search";
  box.placeholder = "Filter: a library, an option, a method ...";
  box.setAttribute("aria-label", "Filter the table");
  const count = document.createElement("p");
  count.className = "filter-count";
  count.setAttribute("aria-live", "polite");
  function filter() {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const keep = words.every((word) => text.includes(word));
      row.hidden = !keep;
      shown += keep;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }
  box.addEventListener("input", filter);
  const frame = table.closest("div.wide") || table;
  frame.before(box, count);
  filter();
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll('table[id^="T_libraries"]').forEach(addFilter);
});
