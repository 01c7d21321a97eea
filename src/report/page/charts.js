// The charts: one panel a quantity, all runs in it, over steps, tokens or time.
"use strict";

const AXES = {
  step: { label: "Steps", show: grouped },
  tokens: { label: "Tokens", show: short },
  elapsed_s: { label: "Training time", show: duration },
};

// `lines` of a panel: the column, its name, and how it is drawn.
const PANELS = [
  { id: "loss", title: "Loss", unit: "nats per token",
    lines: [{ column: "loss", name: "training", smooth: true }, { column: "val_loss", name: "validation", points: true }] },
  { id: "gate", title: "Gate", unit: "eta / alpha0", lines: [{ column: "gate", name: "gate", smooth: true }] },
  { id: "velocity", title: "Squared velocity", unit: "||v||²", log: true,
    lines: [{ column: "velocity_sq", name: "||v||²", smooth: true }] },
  { id: "norm", title: "Gradient norm", unit: "before the clip", log: true,
    lines: [{ column: "grad_norm", name: "norm", smooth: true }] },
  { id: "rate", title: "Learning rate", unit: "eta; faint: scheduled",
    lines: [{ column: "lr", name: "scheduled", faint: true }, { column: "eta", name: "eta", smooth: true }] },
  { id: "speed", title: "Throughput", unit: "tokens per second",
    lines: [{ column: "tokens_per_s", name: "tok/s", smooth: true }] },
  { id: "memory", title: "Memory", unit: "GiB resident", factor: 1 / 2 ** 30,
    lines: [{ column: "memory_bytes", name: "GiB" }] },
  { id: "queue", title: "Data queue", unit: "share filled", lines: [{ column: "queue", name: "queue", smooth: true }] },
  { id: "wait", title: "Waiting for data", unit: "ms per step",
    lines: [{ column: "waited_ms", name: "ms", smooth: true }] },
  { id: "exact", title: "Exact match", unit: "share of held-out problems",
    lines: [{ column: "exact_match", name: "exact match", points: true }] },
];

// Columns that no panel of their own is for.
const NOT_DRAWN = ["step", "tokens", "elapsed_s", "time", "step_ms"];

// Colours that stay apart for every common kind of colour blindness (after Okabe and Ito), and dashes when they run out.
const COLOURS = {
  light: ["#0072b2", "#d55e00", "#009e73", "#b8528f", "#a87900", "#3d9bd6", "#3a3a3a", "#7a4b1e"],
  dark: ["#56b4e9", "#ff8c42", "#2fc79c", "#e59ac6", "#f0d442", "#8fa8ff", "#d8d8d8", "#c99a6b"],
};
const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];

function look(index, theme) {
  const colours = COLOURS[theme];
  return { colour: colours[index % colours.length], dash: DASHES[Math.floor(index / colours.length) % DASHES.length] };
}

function faded(colour, alpha) {
  return colour + Math.round(255 * alpha).toString(16).padStart(2, "0");
}

/** All panels, those for columns that only some runs have included. */
function panelsOf(runs) {
  const columns = new Set();
  for (const run of runs) for (const name of run.columns.keys()) columns.add(name);
  const known = PANELS.filter((panel) => panel.lines.some((line) => columns.has(line.column)));
  const drawn = new Set([...NOT_DRAWN, ...PANELS.flatMap((panel) => panel.lines.map((line) => line.column))]);
  const others = [...columns].filter((name) => !drawn.has(name));
  return known.concat(others.map((name) => (
    { id: "column-" + name, title: name, unit: "", lines: [{ column: name, name, points: true }] }
  )));
}

/** One panel on the page. */
class Chart {
  constructor(panel, host, view, events) {
    this.panel = panel;
    this.view = view;
    this.events = events;
    this.log = panel.log || false;
    this.plot = null;
    this.shape = "";
    this.box = host;
    host.className = "card chart";
    host.id = "chart-" + panel.id;
    const head = element("div", "chart-head");
    const title = element("h2", "", panel.title);
    title.append(element("span", "unit", panel.unit));
    this.button = element("button", "small", "log");
    this.button.title = "Logarithmic scale";
    this.button.setAttribute("aria-pressed", String(this.log));
    this.button.addEventListener("click", () => {
      this.log = !this.log;
      this.button.setAttribute("aria-pressed", String(this.log));
      this.draw();
    });
    head.append(title, this.button);
    this.area = element("div", "plot");
    this.tip = element("div", "tip");
    this.tip.hidden = true;
    host.append(head, this.area, this.tip);
  }

  /** Each line of each visible run: [run, line, look, smoothed or not]. */
  traces() {
    const [raw, traces] = [[], []];
    for (const { run, index } of this.view.visible()) {
      for (const line of this.panel.lines.filter((line) => run.columns.has(line.column))) {
        const style = look(index, this.view.theme());
        const smoothing = line.smooth ? this.view.smoothing : 0;
        if (smoothing > 0) raw.push({ run, line, style, smoothing: 0, faint: true });
        traces.push({ run, line, style, smoothing, faint: line.faint || false });
      }
    }
    // Smoothed lines lie on top of what they smooth.
    return raw.concat(traces);
  }

  draw() {
    const width = this.area.clientWidth;
    if (width === 0) return;
    const traces = this.traces();
    const [low, high] = this.view.window();
    const grid = new Grid(low, high, Math.max(50, Math.min(1200, Math.round(width - 60))), this.view.logX);
    const factor = this.panel.factor || 1;
    const data = [grid.xs];
    for (const { run, line, smoothing } of traces) {
      const xs = run.column(this.view.x);
      const ys = xs && run.smooth(line.column, smoothing);
      const thin = ys ? grid.thin(xs, ys, run.rows, this.log) : new Array(grid.xs.length).fill(null);
      data.push(factor === 1 ? thin : thin.map((value) => (value === null ? null : value * factor)));
    }
    const shape = JSON.stringify([
      traces.map(({ run, line, smoothing, style }) => [run.info.id, line.column, smoothing, style]),
      this.log, this.view.logX, this.view.x, this.view.theme(), width,
    ]);
    this.range = [low, high];
    if (this.plot && shape === this.shape) {
      this.plot.setData(data, true);
      return;
    }
    this.shape = shape;
    this.plot?.destroy();
    this.plot = new uPlot(this.options(traces, width), data, this.area);
  }

  options(traces, width) {
    const css = getComputedStyle(document.documentElement);
    const [ink, line] = [css.getPropertyValue("--muted").trim(), css.getPropertyValue("--grid").trim()];
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1, size: 4 },
      font: "11px system-ui, sans-serif" };
    // The more runs, the fainter what is not smoothed, or it would hide the rest.
    const haze = Math.max(0.07, Math.min(0.28, 1.2 / traces.length));
    const series = traces.map(({ line, style, faint }) => ({
      stroke: faint ? faded(style.colour, line.faint ? 0.45 : haze) : style.colour,
      width: faint ? 1 : 1.7,
      dash: style.dash,
      spanGaps: true,
      points: line.points ? { show: true, size: 5, fill: style.colour } : { show: false },
    }));
    const show = AXES[this.view.x].show;
    // On a short run uPlot's ticks fall between steps too: those keep their line and get no label.
    const label = (x) => (x === null || (this.view.x !== "elapsed_s" && !Number.isInteger(x)) ? "" : show(x));
    return {
      width, height: 220,
      legend: { show: false },
      scales: {
        x: { time: false, distr: this.view.logX ? 3 : 1, range: () => this.range },
        y: { distr: this.log ? 3 : 1 },
      },
      axes: [
        { ...axis, size: 28, space: 60, values: (_, splits) => splits.map(label) },
        { ...axis, size: 54, values: (_, splits) => splits.map((y) => (y === null ? "" : short(y))) },
      ],
      series: [{}, ...series],
      cursor: { y: false, sync: { key: "vrtrain" }, drag: { x: true, y: false, setScale: false }, points: { show: false } },
      hooks: {
        setSelect: [(plot) => {
          if (plot.select.width < 4) return;
          const edge = (left) => plot.posToVal(left, "x");
          this.events.zoom([edge(plot.select.left), edge(plot.select.left + plot.select.width)]);
        }],
        setCursor: [(plot) => this.hover(plot)],
        ready: [(plot) => {
          plot.over.addEventListener("mouseenter", () => { this.inside = true; });
          plot.over.addEventListener("mouseleave", () => { this.inside = false; this.tip.hidden = true; });
          plot.over.addEventListener("dblclick", () => this.events.zoom(null));
        }],
      },
    };
  }

  /** Shows the exact values of the rows nearest to the cursor. */
  hover(plot) {
    const { left, top } = plot.cursor;
    if (!this.inside || left === undefined || left < 0) {
      this.tip.hidden = true;
      return;
    }
    const x = plot.posToVal(left, "x");
    const y = plot.posToVal(top, "y");
    const found = [];
    for (const { run, line, style, smoothing, faint } of this.traces()) {
      if (faint && !line.faint) continue;
      const row = this.nearestValue(run, line.column, x);
      if (row < 0) continue;
      const factor = this.panel.factor || 1;
      const value = run.column(line.column)[row] * factor;
      const mean = smoothing > 0 ? run.smooth(line.column, smoothing)[row] * factor : null;
      found.push({ run, line, style, row, value, mean });
    }
    const distance = ({ value, mean }) => {
      const height = mean ?? value;
      return this.log ? Math.abs(Math.log(Math.max(height, 1e-300) / Math.max(y, 1e-300))) : Math.abs(height - y);
    };
    const SHOWN = 12;
    const nearest = new Set([...found].sort((one, other) => distance(one) - distance(other)).slice(0, SHOWN));
    this.tip.replaceChildren(...this.tipRows(found.filter((entry) => nearest.has(entry)), x));
    if (found.length > SHOWN) this.tip.append(element("div", "muted", `${SHOWN} nearest of ${found.length}`));
    this.tip.hidden = found.length === 0;
    const right = left > plot.over.clientWidth / 2;
    const [area, over] = [this.box.getBoundingClientRect(), plot.over.getBoundingClientRect()];
    const at = over.left - area.left + left;
    const room = this.box.clientWidth - this.tip.offsetWidth - 4;
    this.tip.style.left = Math.max(4, Math.min(room, right ? at - this.tip.offsetWidth - 14 : at + 14)) + "px";
    // On a narrow screen the values stand below the curves, not on them.
    this.tip.style.top = (this.box.clientWidth < 480 ? over.bottom : over.top) - area.top + 6 + "px";
  }

  /** The row nearest to `x` that has a value; lines with few values snap to the one before or after. */
  nearestValue(run, column, x) {
    const values = run.column(column);
    const row = run.nearest(this.view.x, x);
    if (row < 0 || !values) return -1;
    for (let distance = 0; distance < run.rows; distance++) {
      if (row - distance >= 0 && !Number.isNaN(values[row - distance])) return row - distance;
      if (row + distance < run.rows && !Number.isNaN(values[row + distance])) return row + distance;
    }
    return -1;
  }

  tipRows(found, x) {
    const table = element("table");
    const several = this.panel.lines.length > 1;
    for (const { run, line, style, row, value, mean } of found) {
      const entry = element("tr");
      const name = element("td");
      name.append(swatch(style), " " + run.info.name + (several ? " " + line.name : ""));
      const step = run.column("step")[row];
      entry.append(name, element("td", "number", precise(value)));
      entry.append(element("td", "number muted", mean === null ? "" : "~" + short(mean)));
      entry.append(element("td", "number muted", "step " + grouped(step)));
      table.append(entry);
    }
    return [element("div", "tip-head", AXES[this.view.x].label + ": " + AXES[this.view.x].show(x)), table];
  }
}

/** Six digits: what 32-bit floats are good for. */
function precise(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e9)) return value.toExponential(4);
  return size >= 1e6 ? grouped(value) : String(Number(value.toPrecision(6)));
}

/** A short line in a run's colour and dash. */
function swatch({ colour, dash }) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  for (const [name, value] of [["width", 22], ["height", 10], ["class", "swatch"], ["aria-hidden", "true"]]) {
    picture.setAttribute(name, value);
  }
  const line = document.createElementNS(space, "line");
  for (const [name, value] of [["x1", 0], ["x2", 22], ["y1", 5], ["y2", 5], ["stroke", colour], ["stroke-width", 3],
    ["stroke-dasharray", dash.join(" ")]]) {
    line.setAttribute(name, value);
  }
  picture.append(line);
  return picture;
}

function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}
