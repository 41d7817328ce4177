// How kinds of charts are read: profiles over layers at any inspected step, curves over steps.
// Data flow: the numbers of a chart and the state -> rows of its tables, and words for what is pointed at.
const READERS = { panel: (chart) => new Panel(chart), steps: (chart) => new Curves(chart), compared: (chart) => new Compared(chart) };

class Panel {
  constructor(chart) {
    this.chart = chart;
    this.live = chart.data.live;
    const names = ['step', 'layer', 'value', 'low', 'high', 'null', 'null_low', 'null_high', 'n', 'k'];
    this.cells = new Map(); // step -> layer -> row
    const columns = chart.data.values;
    (columns[0] ?? []).forEach((step, i) => {
      const row = Object.fromEntries(names.map((name, c) => [name, columns[c][i]]));
      if (!this.cells.has(step)) this.cells.set(step, new Map());
      this.cells.get(step).set(row.layer, row);
    });
    this.steps = [...this.cells.keys()].filter((step) => this.profile(step).length);
  }

  spell(x) { return this.live.percent ? percent(x) : short(x); }

  /** The step that is shown: the one chosen, or the last before it that was inspected. */
  get step() {
    if (state.step === null) return this.live.last_step;
    return this.steps.filter((step) => step <= state.step).pop() ?? this.steps[0];
  }

  profile(step) {
    return [...(this.cells.get(step)?.values() ?? [])].filter((row) => row.value !== null).sort((a, b) => a.layer - b.layer);
  }

  peak(rows) {
    if (rows.length > 1 && new Set(rows.map((row) => row.value)).size === 1) return null;
    const sign = this.live.seek === 'max' ? 1 : -1;
    return rows.reduce((best, row) => (best === null || sign * row.value > sign * best.value ? row : best), null);
  }

  /** Draw the profile of the step chosen, with its interval, chance and peak; what was drawn stays, pale. */
  atStep() {
    const names = ['lines', 'interval', 'null_band', 'null', 'points', 'peak'];
    const key = this.chart.box.parentElement.querySelector('.keys');
    key?.querySelector('.now')?.remove();
    if (this.step === this.live.last_step) return this.chart.show(Object.fromEntries(names.map((name) => [name, null])));
    const rows = this.profile(this.step);
    const runs = runsOf(rows);
    const peak = this.peak(rows);
    const look = { color: INK, width: 2, opacity: 1, dash: [] };
    const own = (this.chart.data.spec.datasets.lines ?? []).map((row) => ({ ...row, opacity: 0.22 * row.opacity }));
    const drawn = runs.flatMap((run, r) => run.map((row) => ({ line: 99, run: r, x: row.value, layer: row.layer, ...look })));
    const nulls = rows.filter((row) => row.null !== null && row.null >= this.live.profile.low && row.null <= this.live.profile.high);
    this.chart.show({
      lines: [...own, ...drawn],
      interval: areas(runsOf(rows.filter((row) => row.low !== null && row.high !== null)), 'low', 'high'),
      null_band: areas(runsOf(nulls.filter((row) => row.null_low !== null && row.null_high !== null)), 'null_low', 'null_high'),
      null: nulls.map((row) => ({ low: row.layer - 0.5, high: row.layer + 0.5, x: row.null })),
      points: [],
      peak: peak ? [{ x: peak.value, layer: peak.layer, text: peak.layer < 0 ? 'emb' : String(peak.layer) }] : [],
    });
    const words = document.createElement('li');
    words.className = 'now';
    const where = peak ? `${this.spell(peak.value)} at ${layerName(peak.layer)}` : 'all alike';
    words.append(`now ${this.live.names[this.step]} `, Object.assign(document.createElement('b'), { textContent: where }));
    key?.append(words);
  }

  describe(row) {
    let words = this.spell(row.value);
    if (row.low !== null && row.high !== null) words += ` (${this.spell(row.low)} to ${this.spell(row.high)})`;
    if (row.null !== null) words += `, ${this.live.null_word} ${this.spell(row.null)}`;
    return words + (row.n === null ? '' : `, N ${row.n.toLocaleString('en')}`);
  }

  /** The numbers of a layer: at the step pointed at, or at the one shown and the first. */
  words(at, layer) {
    if (layer === null) return null;
    const { heat } = this.live;
    let steps = [...new Set([this.step, this.steps[0]])];
    if (heat && at.x < heat.left + heat.width) {
      const column = heat.edges.findIndex((edge) => at.x - heat.left < edge) - 1;
      steps = [this.live.steps[Math.max(0, column)]];
    }
    const told = steps.map((step) => {
      const row = this.cells.get(step)?.get(layer);
      return `${this.live.names[step]}: ${row && row.value !== null ? this.describe(row) : 'undefined'}`;
    });
    return [layerName(layer), ...told];
  }

  walk(move) {
    const { first, last } = this.live;
    setLayer(state.layer === null ? (move > 0 ? first : last) : Math.min(last, Math.max(first, state.layer + move)));
    return this.words({ x: Infinity }, state.layer);
  }

  /** The layers chosen against all others, at the step shown. */
  compared() {
    if (!state.brush) return '';
    const rows = this.profile(this.step);
    const inside = (row) => row.layer >= state.brush[0] && row.layer <= state.brush[1];
    const mean = (found) => (found.length ? this.spell(found.reduce((sum, row) => sum + row.value, 0) / found.length) : 'undefined');
    const before = this.step === this.steps[0] ? '' : `; ${this.live.names[this.steps[0]]}: ${mean(this.profile(this.steps[0]).filter(inside))}`;
    const words = `Mean of layers ${state.brush[0] < 0 ? 'emb' : state.brush[0]}–${state.brush[1]}: ${mean(rows.filter(inside))}`;
    return `${words}; other layers: ${mean(rows.filter((row) => !inside(row)))}${before}.`;
  }
}

const INK = '#22262b';

/** Runs of neighboring layers: a line does not cross a layer that is undefined. */
function runsOf(rows) {
  const runs = [];
  for (const row of rows) {
    const run = runs.at(-1);
    if (run && run.at(-1).layer === row.layer - 1) run.push(row); else runs.push([row]);
  }
  return runs;
}

function areas(runs, low, high) {
  const sides = (run) => (run.length === 1 ? [-0.5, 0.5] : [0]);
  return runs.flatMap((run, r) => run.flatMap((row) => sides(run).map((side) => ({ run: r, layer: row.layer + side, left: row[low], right: row[high] }))));
}

/** Profiles of several runs: columns run, layer, value, low, high, chance, N, step. */
class Compared {
  constructor(chart) {
    this.live = chart.data.live;
    const [runs, layers, values, lows, highs, nulls] = chart.data.values;
    this.rows = runs.map((run, i) => ({ run, layer: layers[i], value: values[i], low: lows[i], high: highs[i], null: nulls[i] }));
    this.runs = [...new Set(runs)];
  }

  spell(x) { return this.live.percent ? percent(x) : short(x); }

  words(at, layer) {
    if (layer === null) return null;
    const interval = (row) => (row.low === null || row.high === null ? '' : ` (${this.spell(row.low)} to ${this.spell(row.high)})`);
    const told = this.runs.map((run) => {
      const row = this.rows.find((r) => r.run === run && r.layer === layer);
      return `${run}: ${row ? this.spell(row.value) + interval(row) : 'undefined'}`;
    });
    const chance = this.rows.find((row) => row.layer === layer && row.null !== null);
    return [layerName(layer), ...told, ...(chance ? [`${this.live.null_word} ${this.spell(chance.null)}`] : [])];
  }

  walk(move) {
    const { first, last } = this.live;
    setLayer(state.layer === null ? (move > 0 ? first : last) : Math.min(last, Math.max(first, state.layer + move)));
    return this.words(null, state.layer);
  }

  compared() {
    if (!state.brush) return '';
    const told = this.runs.map((run) => {
      const found = this.rows.filter((row) => row.run === run && row.layer >= state.brush[0] && row.layer <= state.brush[1]);
      return `${run} ${found.length ? this.spell(found.reduce((sum, row) => sum + row.value, 0) / found.length) : 'undefined'}`;
    });
    return `Mean of layers ${state.brush[0] < 0 ? 'emb' : state.brush[0]}–${state.brush[1]}: ${told.join('; ')}.`;
  }
}

class Curves {
  constructor(chart) {
    this.chart = chart;
    this.live = chart.data.live;
    this.series = new Map();
    const [labels, steps, values] = chart.data.values.length ? chart.data.values : [[], [], []];
    labels.forEach((label, i) => {
      if (!this.series.has(label)) this.series.set(label, []);
      if (values[i] !== null) this.series.get(label).push({ x: steps[i], y: values[i] });
    });
    this.all = [...new Set(steps)].sort((a, b) => a - b);
    this.at = null;
  }

  words(at) {
    const [first, last] = this.live.span;
    const x = first + ((at.x - this.live.left) / this.live.width) * (last - first);
    this.at = nearest(this.all, x, (step) => step);
    return this.tell();
  }

  walk(move) {
    const index = this.at === null ? (move > 0 ? -1 : this.all.length) : this.all.indexOf(this.at);
    this.at = this.all[Math.min(this.all.length - 1, Math.max(0, index + move))];
    return this.tell();
  }

  /** Each series at its own point that is nearest, which is said where it is another step. */
  tell() {
    const found = [...this.series].map(([label, points]) => ({ label, ...nearest(points, this.at, (point) => point.x) }));
    const dots = found.map((point) => ({ x: point.x, y: point.y, color: this.live.styles[point.label]?.color ?? INK }));
    if (this.chart.view) this.chart.show({ hover: [{ x: this.at }], hover_points: dots });
    const other = (point) => (point.x === this.at ? '' : ` (step ${short(point.x)})`);
    const spell = this.live.percent ? percent : short;
    return [`step ${this.at.toLocaleString('en')}`, ...found.map((point) => `${point.label}: ${spell(point.y)}${other(point)}`)];
  }
}

function nearest(items, x, place) {
  return items.reduce((best, item) => (best === undefined || Math.abs(place(item) - x) < Math.abs(place(best) - x) ? item : best), undefined);
}
