// Files and tables of charts, and the start of it all once the page stands.
// Data flow: the numbers of a chart -> CSV, a table; its specification with heading and legend -> SVG, PNG.
const FONT = 'system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif';

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

/** The chart as it is now, on white, with its heading and legend: an SVG of its own. */
Chart.prototype.picture = async function () {
  const embed = await vega();
  const datasets = { ...this.data.spec.datasets, ...this.rows, hover: [], hover_points: [] };
  const { view } = await embed(document.createElement('div'), structuredClone({ ...this.data.spec, datasets, padding: 0 }));
  const drawn = new DOMParser().parseFromString(await view.toSVG(), 'image/svg+xml').documentElement;
  const make = (name, attributes, words = '') => {
    const element = document.createElementNS(drawn.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = words;
    return element;
  };
  const edge = 14;
  const parts = [make('rect', { width: '100%', height: '100%', fill: '#ffffff' })];
  let y = edge;
  const write = (words, size, x, look) => parts.push(make('text', { x, y, 'font-size': size, ...look }, words));
  y += 12;
  write(this.data.title, 13, edge, { fill: INK, 'font-weight': 'bold' });
  if (this.data.place) { y += 17; write(this.data.place, 11, edge, { fill: '#5d636b' }); }
  for (const key of this.box.parentElement.querySelectorAll('.keys li')) {
    y += 17;
    const line = key.querySelector('line')?.cloneNode() ?? make('line', { x1: 1, x2: 23, y1: 4, y2: 4, stroke: INK, 'stroke-width': 2 });
    line.setAttribute('transform', `translate(${edge},${y - 8})`);
    parts.push(line);
    write(key.textContent.replace(/\s+/g, ' ').trim(), 11, edge + 32, { fill: INK });
  }
  const [width, height] = ['width', 'height'].map((side) => Number(drawn.getAttribute(side)));
  y += 16;
  drawn.setAttribute('x', edge);
  drawn.setAttribute('y', y);
  const size = { width: Math.max(width, 332) + 2 * edge, height: y + height + edge };
  const picture = make('svg', { xmlns: drawn.namespaceURI, ...size, viewBox: `0 0 ${size.width} ${size.height}`, 'font-family': FONT });
  picture.append(...parts, drawn);
  return { text: new XMLSerializer().serializeToString(picture), ...size };
};

async function pngOf({ text, width, height }) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await image.decode();
  const canvas = Object.assign(document.createElement('canvas'), { width: 2 * width, height: 2 * height });
  canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL('image/png');
}

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
  button('PNG', async () => save(this.fileName('png'), await pngOf(await this.picture())));
  button('SVG', async () => save(this.fileName('svg'), URL.createObjectURL(new Blob([(await this.picture()).text], { type: 'image/svg+xml' }))));
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
  if (byId('charts')) {
    if (!('DecompressionStream' in window)) return;
    await startCharts();
  }
  document.documentElement.dataset.ready = performance.now().toFixed(0);
}

async function startCharts() {
  const box = Object.assign(document.createElement('div'), { id: 'readout', hidden: true });
  box.setAttribute('aria-hidden', 'true');
  document.body.append(box);
  const data = JSON.parse(await unpacked('charts'));
  for (const plot of document.querySelectorAll('[data-chart]')) charts.push(new Chart(plot, data[plot.dataset.chart]));
  startState();
  document.addEventListener('pointerdown', (event) => {
    if (!event.target.closest('[data-chart]')) for (const chart of charts) chart.leave();
  });
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) charts.find((chart) => chart.box === entry.target).wake();
  }, { rootMargin: '200px' });
  for (const chart of charts) near.observe(chart.box);
}

start();
