// Tables that are sorted by their headings. Data flow: the texts of a column -> numbers or words -> the order of rows.
const UNITS = { k: 1e3, M: 1e6, B: 1e9, G: 1e9 };

/** The first number of a cell, with its unit; null where there is none. */
function numberIn(text) {
  const found = text.replaceAll(',', '').replaceAll('−', '-').match(/(-?)(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([kMBG](?![a-z]))?/i);
  return found ? Number(found[1] + found[2]) * (UNITS[found[3]] ?? 1) : null;
}

function sortBy(table, column, heading) {
  const falling = heading.getAttribute('aria-sort') === 'descending';
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => {
    const cell = row.cells[column];
    const text = (cell?.querySelector('b') ?? cell)?.textContent.trim() ?? '';
    return { row, text, number: numberIn(text) };
  });
  const numeric = rows.filter((r) => r.number !== null).length * 2 > rows.length;
  const known = (r) => (numeric ? r.number !== null : r.text !== '');
  rows.sort((a, b) => {
    if (known(a) !== known(b)) return known(a) ? -1 : 1; // what is undefined stays last either way
    const order = numeric ? a.number - b.number : a.text.localeCompare(b.text);
    return falling ? order : -order;
  });
  for (const other of heading.parentElement.cells) other.removeAttribute('aria-sort');
  heading.setAttribute('aria-sort', falling ? 'ascending' : 'descending');
  body.append(...rows.map((r) => r.row));
}

/** Put a button into each heading that has words. */
function makeSortable(table) {
  const head = table.tHead?.rows[0];
  if (!head || !table.tBodies[0] || table.tBodies[0].rows.length < 2) return;
  [...head.cells].forEach((heading, column) => {
    if (!heading.textContent.trim() || heading.querySelector('svg, button, .numbers')) return;
    const button = document.createElement('button');
    button.type = 'button';
    button.className = 'sort';
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener('click', () => sortBy(table, column, heading));
  });
}
