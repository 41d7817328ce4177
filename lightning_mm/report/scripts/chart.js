// One chart: its SVG of the file until it comes near the screen, then the same drawn by Vega, with what is pointed at.
// Data flow: compressed JSON of the page -> Chart -> vegaEmbed (expressions are interpreted: the page allows no eval).
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
}

let loading = null;
/** Vega-Embed, run at its first use: an inline script whose hash the page's policy holds. */
function vega() {
  loading ??= unpacked('library').then((text) => {
    const script = document.createElement('script');
    script.textContent = text;
    document.head.append(script);
    return (host, spec) => window.vegaEmbed(host, spec, OPTIONS);
  });
  return loading;
}

const OPTIONS = { mode: 'vega-lite', ast: true, actions: false, defaultStyle: false, renderer: 'svg', tooltip: false, logLevel: 1 };
let turn = Promise.resolve();

class Chart {
  constructor(box, data) {
    this.box = box;
    this.data = data;
    this.view = null;
    this.rows = {}; // what a table of the chart holds in place of its own rows
    this.read = READERS[data.live.kind]?.(this) ?? null;
    this.note = document.createElement('p');
    this.note.className = 'note compared';
    this.note.hidden = true;
    if (!box.firstElementChild) this.keepRoom();
    this.tools();
    box.addEventListener('pointermove', (event) => this.point(event));
    box.addEventListener('pointerdown', (event) => this.press(event));
    box.addEventListener('pointerleave', (event) => { if (event.pointerType !== 'touch') this.leave(); }); // a finger is lifted to read
    box.addEventListener('pointercancel', () => this.leave());
    box.addEventListener('blur', () => this.leave());
    box.addEventListener('keydown', (event) => this.key(event));
  }

  /** An empty drawing of its size, so that the page stands still when the chart comes. */
  keepRoom() {
    const room = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
    room.setAttribute('viewBox', `0 0 ${this.data.size.join(' ')}`);
    this.box.append(room);
  }

  /** Draw it live, one chart after the other, so that the page stays quick. */
  wake() {
    this.waking ??= (turn = turn.then(() => this.embed()).catch((error) => console.error(error)).then(() => new Promise((done) => setTimeout(done))));
    return this.waking;
  }

  async embed() {
    const embed = await vega();
    const host = document.createElement('div');
    const { view } = await embed(host, structuredClone(this.data.spec));
    host.setAttribute('aria-hidden', 'true');
    host.className = 'live';
    this.host = host;
    this.fit();
    this.box.replaceChildren(host);
    this.view = view;
    this.box.dataset.live = 'yes';
    for (const part of ['step', 'brush', 'hover']) this.refresh(part);
  }

  /** Place the plot as in the SVG of the file, whatever room Vega takes for axes. */
  fit() {
    const svg = this.host.querySelector('svg');
    const [x, y] = svg.querySelector('g').getAttribute('transform').match(/-?[\d.]+/g).map(Number);
    const box = `${x - this.data.origin[0]} ${y - this.data.origin[1]} ${this.data.size.join(' ')}`;
    if (svg.getAttribute('viewBox') !== box) svg.setAttribute('viewBox', box);
    svg.removeAttribute('width');
    svg.removeAttribute('height');
  }

  /** Give tables of the chart other rows; null brings its own back. */
  async show(tables) {
    let changed = false;
    for (const [name, rows] of Object.entries(tables)) {
      const own = this.data.spec.datasets[name];
      if (own === undefined) continue;
      this.rows[name] = rows ?? own;
      this.view.data(name, structuredClone(this.rows[name]));
      changed = true;
    }
    if (!changed) return;
    await this.view.runAsync();
    this.fit();
  }

  refresh(part) {
    const { live } = this.data;
    const band = (low, high) => [{ low: low - 0.5, high: high + 0.5 }];
    if (live.first === undefined) return;
    if (part === 'hover') this.show({ hover: state.layer === null ? [] : band(state.layer, state.layer) });
    if (part === 'brush') this.show({ brush: state.brush ? band(...state.brush) : [] });
    if (part === 'step') this.read?.atStep?.();
  }

  compare() {
    const words = this.read?.compared?.() ?? '';
    this.note.textContent = words;
    this.note.hidden = !words;
  }

  /** Where an event is, in the pixels of the figure. */
  place(event) {
    const box = this.box.querySelector('svg').getBoundingClientRect();
    const scale = this.data.size[0] / box.width;
    return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
  }

  layerAt(y) {
    const { first, last, top, row } = this.data.live;
    if (first === undefined) return null;
    const layer = last - Math.floor((y - top) / row);
    return layer >= first && layer <= last ? layer : null;
  }

  point(event) {
    this.wake();
    const at = this.place(event);
    const layer = this.layerAt(at.y);
    if (this.from !== undefined && this.from !== null && layer !== null) setBrush([this.from, layer].sort((a, b) => a - b));
    setLayer(layer);
    const said = event.target.getAttribute?.('aria-label');
    const words = this.read?.words(at, layer) ?? (said && event.target !== this.box ? [said] : null);
    readout(words, event.clientX, event.clientY, event.pointerType === 'touch');
  }

  press(event) {
    const layer = this.layerAt(this.place(event).y);
    this.point(event);
    if (event.pointerType !== 'mouse' || event.button !== 0 || layer === null) return;
    event.preventDefault();
    this.box.focus({ preventScroll: true });
    const start = event.clientY;
    const move = (later) => { if (Math.abs(later.clientY - start) > 4) this.from = layer; };
    const end = () => {
      if (this.from === undefined && state.brush) setBrush(null); // a click without a drag
      this.from = undefined;
      removeEventListener('pointermove', move, true);
      removeEventListener('pointerup', end, true);
    };
    addEventListener('pointermove', move, true);
    addEventListener('pointerup', end, true);
  }

  leave() {
    readout(null);
    setLayer(null);
    if (this.view && this.data.spec.datasets.hover_points) this.show({ hover: [], hover_points: [] });
  }

  /** Arrows go from layer to layer, or from step to step, and what is there is said. */
  key(event) {
    const move = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1 }[event.key];
    if (event.key === 'Escape') this.leave();
    if (!move || !this.read) return;
    event.preventDefault();
    this.wake();
    const words = this.read.walk(move);
    const box = this.box.getBoundingClientRect();
    readout(words, box.left + box.width / 2, box.top + 20);
    const said = byId('said');
    if (said) said.textContent = words.join(', ');
  }
}

/** What is pointed at, in words beside the pointer: the first line is its heading. */
function readout(words, x = 0, y = 0, above = false) {
  const box = byId('readout');
  box.hidden = !words;
  if (!words) return;
  box.replaceChildren(...words.map((line, index) => Object.assign(document.createElement(index ? 'span' : 'b'), { textContent: line })));
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - width - 8))}px`;
  box.style.top = `${above || y + 18 + height > innerHeight ? Math.max(6, y - height - 12) : y + 18}px`;
}
