// Runs as columns of numbers: decoding, appending, smoothing, and thinning for the screen without losing spikes.
"use strict";

/** A growing column of numbers; NaN stands for no value. */
class Column {
  constructor(values = new Float64Array(0)) {
    this.values = values;
    this.length = values.length;
  }
  push(value) {
    if (this.length === this.values.length) {
      const grown = new Float64Array(Math.max(256, 2 * this.length));
      grown.set(this.values);
      this.values = grown;
    }
    this.values[this.length++] = value;
  }
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index++) bytes[index] = text.charCodeAt(index);
  return bytes;
}

/** One run: what is known about it, and its rows by column name. */
class Run {
  constructor(info) {
    this.info = info;
    this.columns = new Map();
    this.rows = 0;
    this.smoothed = new Map();
  }

  /** Takes a block {rows, columns: [{name, type}], base64}: the columns one after another, little-endian. */
  load(block) {
    const bytes = bytesOf(block.base64);
    this.columns.clear();
    this.smoothed.clear();
    this.rows = block.rows;
    let offset = 0;
    for (const { name, type } of block.columns) {
      const size = block.rows * (type === "f64" ? 8 : 4);
      const part = bytes.buffer.slice(offset, offset + size);
      const values = type === "f64" ? new Float64Array(part) : new Float32Array(part);
      this.columns.set(name, new Column(values));
      offset += size;
    }
  }

  /** Appends rows {name: [values]}; what they begin before is cut off first. */
  append(columns) {
    const steps = columns.step;
    if (!steps || steps.length === 0) return;
    this.cut(steps[0]);
    for (const name of Object.keys(columns)) {
      if (!this.columns.has(name)) {
        this.columns.set(name, new Column(new Float64Array(this.rows).fill(NaN)));
      }
    }
    for (const [name, column] of this.columns) {
      const values = columns[name];
      for (let row = 0; row < steps.length; row++) {
        const value = values ? values[row] : null;
        column.push(value === null || value === undefined ? NaN : value);
      }
    }
    this.rows += steps.length;
    this.smoothed.clear();
  }

  /** Drops the rows of `step` and of later steps. */
  cut(step) {
    const steps = this.columns.get("step");
    if (!steps) return;
    let keep = this.rows;
    while (keep > 0 && steps.values[keep - 1] >= step) keep--;
    for (const column of this.columns.values()) column.length = keep;
    this.rows = keep;
  }

  column(name) {
    return this.columns.get(name)?.values;
  }

  /** The last value of a column that is one. */
  last(name) {
    const values = this.column(name);
    for (let row = this.rows - 1; values && row >= 0; row--) if (!Number.isNaN(values[row])) return values[row];
    return NaN;
  }

  /** A column's exponentially weighted mean over steps; `share` of the run's steps is its time constant. */
  smooth(name, share) {
    const values = this.column(name);
    if (!values || share === 0) return values;
    const key = name + " " + share;
    const known = this.smoothed.get(key);
    if (known) return known;
    const steps = this.column("step");
    const constant = Math.max(1, share * (steps[this.rows - 1] - steps[0]));
    const out = new Float64Array(this.rows).fill(NaN);
    let sum = 0, weight = 0, before = steps[0];
    for (let row = 0; row < this.rows; row++) {
      const decay = Math.exp((before - steps[row]) / constant);
      before = steps[row];
      sum *= decay;
      weight *= decay;
      if (Number.isNaN(values[row])) continue;
      sum += values[row];
      weight += 1;
      out[row] = sum / weight;
    }
    this.smoothed.set(key, out);
    return out;
  }

  /** The row whose x is nearest to `x`. */
  nearest(xName, x) {
    const xs = this.column(xName);
    if (!xs || this.rows === 0) return -1;
    let low = 0, high = this.rows - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1;
      else high = middle;
    }
    return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
  }
}

/** What a window of x onto `buckets` columns of the screen is: two positions in each. */
class Grid {
  constructor(low, high, buckets, logarithmic) {
    this.to = logarithmic ? Math.log : (x) => x;
    const back = logarithmic ? Math.exp : (x) => x;
    this.low = this.to(low);
    this.width = (this.to(high) - this.low) / buckets || 1;
    this.buckets = buckets;
    this.xs = Float64Array.from({ length: 2 * buckets }, (_, index) => back(this.low + (index / 2 + 0.25) * this.width));
  }

  /** The smallest and the largest value of each bucket, in the order in which they come. */
  thin(xs, ys, rows, logarithmic) {
    const out = new Array(2 * this.buckets).fill(null);
    let bucket = -1, low = 0, high = 0, lowRow = -1, highRow = -1;
    const close = () => {
      if (bucket < 0) return;
      out[2 * bucket] = lowRow <= highRow ? low : high;
      if (lowRow !== highRow) out[2 * bucket + 1] = lowRow <= highRow ? high : low;
    };
    for (let row = 0; row < rows; row++) {
      const y = ys[row];
      if (!Number.isFinite(y) || (logarithmic && y <= 0)) continue;
      const own = Math.floor((this.to(xs[row]) - this.low) / this.width);
      const inside = own >= 0 && own < this.buckets ? own : own === this.buckets ? own - 1 : -1;
      if (inside < 0) continue;
      if (inside !== bucket) {
        close();
        bucket = inside;
        low = high = y;
        lowRow = highRow = row;
      } else if (y < low) {
        low = y;
        lowRow = row;
      } else if (y > high) {
        high = y;
        highRow = row;
      }
    }
    close();
    return out;
  }
}

/** 1234567 -> "1.23M"; small numbers keep four digits. */
function short(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return trim((value / unit).toPrecision(3)) + name;
  }
  if (size >= 0.001) return trim(value.toPrecision(4));
  return trim(value.toExponential(2).replace(/e/, " e")).replace(" e", "e");
}

function trim(text) {
  return text.includes(".") ? text.replace(/\.?0+(?=$| )/, "") : text;
}

/** Seconds as a person says them. */
function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 10) return trim(seconds.toPrecision(2)) + " s";
  const whole = Math.round(seconds);
  if (whole < 60) return whole + " s";
  const pad = (number) => String(number).padStart(2, "0");
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days > 0) return `${days}d ${pad(hours)}h`;
  return hours > 0 ? `${hours}h ${pad(minutes)}m` : `${minutes}m ${pad(whole % 60)}s`;
}

/** A whole number with its digits in groups. */
function grouped(value) {
  return Number.isFinite(value) ? Math.round(value).toLocaleString("en-US") : "–";
}
