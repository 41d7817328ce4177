// Files and tables of charts, and the start of it all once the page stands.
// Data flow: the numbers of a chart -> CSV, a table; its specification with heading and legend -> SVG, PNG.
function save(name, url) {
  const link = document.createElement('a');
  link.href = url;
  link.download = name;
  link.click();
}

function csvOf({ columns, values }) {
  const cell = (value) => {
    const text = value === null ? '' : String(value);
    const quoted = /^[=+\-@]/.test(text) && typeof value === 'string' ? `'${text}` : text; // no formula for a spreadsheet
    return /[",\n\r]/.test(quoted) ? `"${quoted.replaceAll('"', '""')}"` : quoted;
  };
  const rows = (values[0] ?? []).map((_, i) => values.map((column) => cell(column[i])).join(','));
  return [columns.map(cell).join(','), ...rows].join('\n') + '\n';
}

Chart.prototype.fileName = function (kind) {
  return `${`${this.data.title} ${this.data.place}`.replace(/[^\p{L}\p{N}]+/gu, '-').replace(/^-|-$/g, '').slice(0, 80) || 'chart'}.${kind}`;
};

/** The chart on white with its heading and legend, as it is now. */
Chart.prototype.picture = async function () {
  const keys = [...this.box.parentElement.querySelectorAll('.keys li')].map((key) => key.textContent.replace(/\s+/g, ' ').trim());
  const spec = structuredClone({ ...this.data.spec, datasets: { ...this.data.spec.datasets, ...this.rows, hover: [], hover_points: [] } });
  const subtitle = [this.data.place, ...keys].filter((words) => words);
  const title = { text: this.data.title, subtitle, anchor: 'start', fontSize: 13, subtitleFontSize: 11, color: INK, subtitleColor: '#5d636b', offset: 12 };
  const embed = await vega();
  return (await embed(document.createElement('div'), { ...spec, title, background: '#ffffff', padding: 14 }, OPTIONS)).view;
};

Chart.prototype.tools = function () {
  const bar = document.createElement('div');
  bar.className = 'tools';
  const button = (words, act) => {
    const made = Object.assign(document.createElement('button'), { type: 'button', textContent: words });
    made.setAttribute('aria-label', `${this.data.title}: ${words}`);
    made.addEventListener('click', act);
    bar.append(made);
    return made;
  };
  button('PNG', async () => save(this.fileName('png'), await (await this.picture()).toImageURL('png', 2)));
  button('SVG', async () => save(this.fileName('svg'), URL.createObjectURL(new Blob([await (await this.picture()).toSVG()], { type: 'image/svg+xml' }))));
  button('CSV', () => save(this.fileName('csv'), URL.createObjectURL(new Blob([csvOf(this.data)], { type: 'text/csv' }))));
  const toggle = button('Table', () => {
    const shown = toggle.getAttribute('aria-expanded') === 'true';
    toggle.setAttribute('aria-expanded', String(!shown));
    if (shown) this.written.remove(); else bar.after(this.written = tableOf(this.data));
  });
  toggle.setAttribute('aria-expanded', 'false');
  const last = this.box.parentElement.matches('figure') ? this.box.parentElement.lastElementChild : this.box;
  last.after(this.note, bar);
};

const MOST_ROWS = 1000;
function tableOf({ title, columns, values, note }) {
  const make = (name, words, attributes = {}) => {
    const element = document.createElement(name);
    if (words !== undefined) element.textContent = words;
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const box = make('div', undefined, { class: 'scroll written', tabindex: '0', role: 'region', 'aria-label': `${title}: numbers` });
  const table = make('table');
  const head = make('tr');
  head.append(...columns.map((name) => make('th', name, { scope: 'col', class: 'num' })));
  const count = values[0]?.length ?? 0;
  const body = make('tbody');
  for (let i = 0; i < Math.min(count, MOST_ROWS); i++) {
    const row = make('tr');
    row.append(...values.map((column) => make('td', column[i] === null ? '–' : column[i], { class: 'num' })));
    body.append(row);
  }
  const thead = make('thead');
  thead.append(head);
  table.append(thead, body);
  box.append(table);
  makeSortable(table);
  const left = [note, count > MOST_ROWS ? `The CSV file holds ${count - MOST_ROWS} more rows.` : ''].filter((words) => words).join(' ');
  if (left) box.append(make('p', left, { class: 'note' }));
  return box;
}

async function start() {
  startTheme();
  for (const table of document.querySelectorAll('table')) makeSortable(table);
  if (!byId('charts') || !('DecompressionStream' in window)) return;
  const box = Object.assign(document.createElement('div'), { id: 'readout', hidden: true });
  box.setAttribute('aria-hidden', 'true');
  document.body.append(box);
  const data = JSON.parse(await unpacked('charts'));
  for (const plot of document.querySelectorAll('[data-chart]')) charts.push(new Chart(plot, data[plot.dataset.chart]));
  startState();
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) charts.find((chart) => chart.box === entry.target).wake();
  }, { rootMargin: '200px' });
  for (const chart of charts) near.observe(chart.box);
  document.documentElement.dataset.ready = performance.now().toFixed(0);
}

start();
