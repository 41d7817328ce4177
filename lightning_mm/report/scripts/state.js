// What the reader chose: a step, layers, and the layer pointed at, for all charts at once.
// Data flow: slider, fields, pointer, keys -> state -> every chart that is awake draws itself anew.
const state = { step: null, brush: null, layer: null };
const charts = [];
const HINT = `${matchMedia('(hover: none)').matches ? 'Name' : 'Drag over'} layers to compare them in all charts.`;
const byId = (id) => document.getElementById(id);
const isShort = (x) => x !== 0 && (Math.abs(x) < 1e-2 || Math.abs(x) >= 1e9);

function short(x) {
  if (isShort(x)) { const [digits, power] = x.toExponential(2).split('e'); return `${Number(digits)}e${Number(power)}`; }
  if (Math.abs(x) >= 1e6) return `${Number((x / 1e6).toPrecision(3))}M`;
  if (Math.abs(x) >= 1e4) return `${Number((x / 1e3).toPrecision(3))}k`;
  return Math.abs(x) >= 100 ? x.toFixed(0) : String(Number(x.toPrecision(3)));
}

const percent = (x) => `${(100 * x).toFixed(1).replace(/\.0$/, '')}\u00a0%`;
const layerName = (layer) => (layer < 0 ? 'embeddings' : `layer ${layer}`);

function redraw(part) {
  for (const chart of charts) if (chart.view) chart.refresh(part);
}

function setLayer(layer) {
  if (layer === state.layer) return;
  state.layer = layer;
  redraw('hover');
}

function setBrush(brush) {
  state.brush = brush;
  byId('from').value = brush ? brush[0] : '';
  byId('to').value = brush ? brush[1] : '';
  byId('clear').disabled = !brush;
  const words = brush ? `Comparing ${layerName(brush[0])} to ${brush[1]} with the others, in every chart.` : '';
  byId('work-words').textContent = words || HINT;
  for (const lane of document.querySelectorAll('.lane-brush')) markLane(lane);
  redraw('brush');
  for (const chart of charts) chart.compare();
}

/** The band of the layers chosen, in a row of bars by layer. */
function markLane(lane) {
  const { first, last } = lane.parentElement.dataset;
  const count = last - first + 1;
  lane.hidden = !state.brush;
  if (!state.brush) return;
  const inner = '(100% - 2 * var(--inset))';
  lane.style.left = `calc(var(--inset) + ${inner} * ${(state.brush[0] - first) / count})`;
  lane.style.width = `calc(${inner} * ${(state.brush[1] - state.brush[0] + 1) / count})`;
}

function startState() {
  const panels = charts.filter((chart) => chart.data.live.kind === 'panel');
  const layered = charts.filter((chart) => chart.data.live.first !== undefined);
  if (!layered.length) return;
  byId('workbar').hidden = false;
  byId('work-words').textContent = HINT;
  const steps = [...new Set(panels.flatMap((chart) => chart.data.live.steps))].sort((a, b) => a - b);
  const names = Object.assign({}, ...panels.map((chart) => chart.data.live.names));
  const slider = byId('step');
  const told = () => { byId('step-words').textContent = names[steps[slider.value]]; slider.setAttribute('aria-valuetext', names[steps[slider.value]]); };
  byId('work-step').hidden = steps.length < 2;
  if (steps.length > 1) {
    slider.max = steps.length - 1; // first: a value above it is cut off
    slider.value = slider.max;
    told();
    slider.addEventListener('input', () => {
      state.step = steps[slider.value];
      told();
      redraw('step');
      for (const chart of charts) chart.compare();
    });
  }
  const low = Math.min(...layered.map((chart) => chart.data.live.first));
  const high = Math.max(...layered.map((chart) => chart.data.live.last));
  const fields = [byId('from'), byId('to')];
  for (const field of fields) {
    Object.assign(field, { min: low, max: high, placeholder: field.id === 'from' ? low : high });
    field.addEventListener('change', () => {
      const open = fields.filter((end) => end.value === '');
      const ends = [fields[0].value || low, fields[1].value || high].map((v) => Math.min(high, Math.max(low, Math.round(Number(v)))));
      setBrush(open.length === 2 ? null : ends.sort((a, b) => a - b));
      for (const end of open) end.value = ''; // to be typed into
    });
  }
  byId('clear').addEventListener('click', () => setBrush(null));
  for (const lane of document.querySelectorAll('[data-first][data-last]')) {
    const mark = document.createElement('i');
    mark.className = 'lane-brush';
    mark.hidden = true;
    lane.append(mark);
  }
}
