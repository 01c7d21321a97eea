// The page: the list of runs, the controls, the tables, and what a live page adds.
"use strict";

const runs = new Map();
const charts = new Map();
const STATES = {
  running: "●", finished: "✓", interrupted: "❚❚", failed: "✗", dead: "✗", silent: "?", unknown: "?",
};

/** What is shown, and how. */
const view = {
  x: "step",
  logX: false,
  smoothing: 0.01,
  zoom: null,
  filter: "",
  hidden: new Set(),
  theme() {
    const chosen = document.documentElement.dataset.theme;
    return chosen || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  },
  matches(run) {
    return run.info.name.toLowerCase().includes(this.filter);
  },
  visible() {
    const all = [...runs.values()].map((run, index) => ({ run, index }));
    return all.filter(({ run }) => this.matches(run) && !this.hidden.has(run.info.id));
  },
  /** The range of x: the zoom, or all that the visible runs have. */
  window() {
    if (this.zoom) return this.zoom;
    let low = Infinity, high = -Infinity;
    for (const { run } of this.visible()) {
      const xs = run.column(this.x);
      if (!xs || run.rows === 0) continue;
      const first = this.logX ? Array.prototype.find.call(xs, (x) => x > 0) ?? 1 : xs[0];
      low = Math.min(low, first);
      high = Math.max(high, xs[run.rows - 1]);
    }
    if (!(low <= high)) return this.logX ? [1, 10] : [0, 1];
    if (low === high) return this.logX ? [low, low * 10] : [low - 1, high + 1];
    return [low, high];
  },
};

const find = (id) => document.getElementById(id);

let scheduled = false;
/** Draws everything again before the next frame. */
function refresh() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    drawList();
    drawCharts();
    drawSummary();
    drawSamples();
    drawConfig();
  });
}

let drawing = 0;
function drawCharts() {
  const panels = panelsOf([...runs.values()]);
  for (const panel of panels.filter((panel) => !charts.has(panel.id))) {
    const host = element("section");
    find("charts").append(host);
    charts.set(panel.id, new Chart(panel, host, view, { zoom }));
  }
  // What is in sight comes first, the rest follows frame by frame.
  const turn = ++drawing;
  const inSight = ({ box }) => {
    const { top, bottom } = box.getBoundingClientRect();
    return bottom > 0 && top < innerHeight;
  };
  const all = [...charts.values()];
  const rest = all.filter((chart) => !inSight(chart));
  const next = () => {
    if (turn !== drawing || rest.length === 0) return;
    rest.shift().draw();
    requestAnimationFrame(next);
  };
  all.filter(inSight).forEach((chart) => chart.draw());
  requestAnimationFrame(next);
}

function zoom(range) {
  view.zoom = range;
  find("unzoom").hidden = range === null;
  drawCharts();
}

function drawList() {
  const list = find("runs");
  const entries = [...runs.values()].map((run, index) => ({ run, index })).filter(({ run }) => view.matches(run));
  list.replaceChildren(...entries.map(({ run, index }) => {
    const { info } = run;
    const entry = element("li", "run");
    const label = element("label");
    const box = element("input");
    box.type = "checkbox";
    box.checked = !view.hidden.has(info.id);
    box.addEventListener("change", () => {
      box.checked ? view.hidden.delete(info.id) : view.hidden.add(info.id);
      refresh();
    });
    const name = element("span", "name", info.name);
    name.title = info.name;
    label.append(box, swatch(look(index, view.theme())), name);
    const only = element("button", "small only", "only");
    only.title = "Show this run alone";
    only.addEventListener("click", () => {
      for (const other of runs.values()) view.hidden.add(other.info.id);
      view.hidden.delete(info.id);
      refresh();
    });
    const step = run.last("step");
    const total = info.steps ? " / " + grouped(info.steps) : "";
    const state = element("span", "state " + info.state, `${STATES[info.state] || "?"} ${info.state}`);
    const line = element("div", "run-line");
    line.append(state, element("span", "", `step ${grouped(step)}${total}`));
    line.append(element("span", "", `loss ${short(run.last("loss"))}`));
    const validation = run.last("val_loss");
    if (!Number.isNaN(validation)) line.append(element("span", "", `val ${short(validation)}`));
    entry.append(label, only, line);
    if (info.error) entry.append(element("div", "error", info.error));
    return entry;
  }));
  const shown = view.visible().length;
  find("count").textContent = `${shown} of ${runs.size} run${runs.size === 1 ? "" : "s"} shown`;
}

/** The best validation loss of a run and its step. */
function best(run) {
  const [steps, values] = [run.column("step"), run.column("val_loss")];
  let at = -1;
  for (let row = 0; values && row < run.rows; row++) {
    if (!Number.isNaN(values[row]) && (at < 0 || values[row] < values[at])) at = row;
  }
  return at < 0 ? "–" : `${values[at].toFixed(4)} (step ${grouped(steps[at])})`;
}

/** The median speed, the first step left out. */
function speed(run) {
  const values = run.column("tokens_per_s");
  if (!values || run.rows < 2) return NaN;
  const sorted = values.slice(1, run.rows).filter((value) => !Number.isNaN(value)).sort();
  return sorted[Math.floor(sorted.length / 2)];
}

function most(run, name) {
  const values = run.column(name);
  let most = NaN;
  for (let row = 0; values && row < run.rows; row++) if (!(values[row] <= most)) most = Number.isNaN(values[row]) ? most : values[row];
  return most;
}

function drawSummary() {
  const heads = ["Run", "State", "Step", "Loss", "Val. loss", "Best val. loss", "Tokens", "tok/s (median)", "Training time", "Most memory"];
  const fixed = (value) => (Number.isNaN(value) ? "–" : value.toFixed(4));
  const rows = view.visible().map(({ run, index }) => {
    const name = element("td");
    name.append(swatch(look(index, view.theme())), " " + run.info.name);
    const memory = most(run, "memory_bytes");
    const cells = [
      run.info.state, grouped(run.last("step")), fixed(run.last("loss")), fixed(run.last("val_loss")), best(run),
      short(run.last("tokens")), short(speed(run)), duration(run.last("elapsed_s")),
      Number.isNaN(memory) ? "–" : (memory / 2 ** 30).toFixed(2) + " GiB",
    ];
    const row = element("tr");
    row.append(name, ...cells.map((text) => element("td", "number", text)));
    return row;
  });
  fillTable(find("summary"), heads, rows);
}

function fillTable(table, heads, rows) {
  const head = element("tr");
  head.append(...heads.map((text) => element("th", "", text)));
  table.replaceChildren(head, ...rows);
}

function sampleText(sample) {
  const text = element("p", "sample");
  text.append(element("span", "step", "step " + grouped(sample.step)));
  text.append(element("span", "muted", sample.prompt), element("span", "", sample.text));
  return text;
}

let samplesShown = "";
function drawSamples() {
  const chosen = view.visible().filter(({ run }) => run.info.samples.length > 0);
  const key = JSON.stringify([view.theme(), chosen.map(({ run }) => [run.info.id, run.info.samples.length, run.info.samples.at(-1).step])]);
  if (key === samplesShown) return;
  samplesShown = key;
  find("samples-card").hidden = chosen.length === 0;
  find("samples").replaceChildren(...chosen.map(({ run, index }) => {
    const group = element("div", "sample-run");
    const title = element("h3");
    title.append(swatch(look(index, view.theme())), " " + run.info.name);
    const [newest, ...earlier] = [...run.info.samples].reverse().map(sampleText);
    group.append(title, newest);
    if (earlier.length > 0) {
      const more = element("details");
      more.append(element("summary", "", `${earlier.length} earlier`), ...earlier);
      group.append(more);
    }
    return group;
  }));
}

function drawConfig() {
  const chosen = view.visible().map(({ run }) => run);
  const keys = new Set(chosen.flatMap((run) => Object.keys(run.info.config)));
  const onlyDifferent = find("different").checked && chosen.length > 1;
  find("different").parentElement.hidden = chosen.length < 2;
  const rows = [];
  for (const key of keys) {
    const values = chosen.map((run) => run.info.config[key] ?? "–");
    const differs = new Set(values).size > 1;
    if (onlyDifferent && !differs) continue;
    const row = element("tr", differs && chosen.length > 1 ? "differs" : "");
    row.append(element("th", "", key), ...values.map((value) => element("td", "", value)));
    rows.push(row);
  }
  fillTable(find("config"), ["Key", ...chosen.map((run) => run.info.name)], rows);
  find("no-difference").hidden = rows.length > 0 || chosen.length === 0;
}

function put(info, block) {
  const run = runs.get(info.id) || new Run(info);
  run.info = info;
  if (block) run.load(block);
  runs.set(info.id, run);
}

/** Server-sent events of `vrtrain watch`: whole runs, appended rows, changed descriptions. */
function follow() {
  const note = find("live");
  note.hidden = false;
  const source = new EventSource("events");
  source.addEventListener("open", () => { note.textContent = "● live"; note.className = "live"; });
  source.addEventListener("error", () => { note.textContent = "○ connection lost, trying again"; note.className = "lost"; });
  source.addEventListener("run", (event) => {
    const { info, block } = JSON.parse(event.data);
    put(info, block);
    refresh();
  });
  source.addEventListener("rows", (event) => {
    const { id, columns } = JSON.parse(event.data);
    runs.get(id)?.append(columns);
    refresh();
  });
}

function listen() {
  for (const button of find("axis").querySelectorAll("button")) {
    button.addEventListener("click", () => {
      view.x = button.dataset.x;
      for (const other of find("axis").querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
      zoom(null);
    });
  }
  find("log-x").addEventListener("change", (event) => { view.logX = event.target.checked; zoom(null); });
  find("smoothing").addEventListener("input", (event) => {
    view.smoothing = Number(event.target.value) / 100;
    find("smoothing-value").textContent = event.target.value + "% of the run";
    drawCharts();
  });
  find("filter").addEventListener("input", (event) => { view.filter = event.target.value.trim().toLowerCase(); refresh(); });
  find("all").addEventListener("click", () => { view.hidden.clear(); refresh(); });
  find("none").addEventListener("click", () => { for (const id of runs.keys()) view.hidden.add(id); refresh(); });
  find("unzoom").addEventListener("click", () => zoom(null));
  find("different").addEventListener("change", drawConfig);
  find("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = view.theme() === "dark" ? "light" : "dark";
    refresh();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
  new ResizeObserver(() => drawCharts()).observe(find("charts"));
}

function start() {
  const data = JSON.parse(find("vrtrain-data").textContent);
  for (const { info, block } of data.runs) put(info, block);
  listen();
  refresh();
  if (data.live) follow();
}

start();
