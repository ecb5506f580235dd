/** Pictures of numbers: colour scales, heat maps with tokens on their axes, thumbnails, legends, histograms. */

import { el, number } from "explore/text.js";

/* Blue to orange through the background is told apart with every common colour blindness; so is one hue by lightness. */
const DIVERGING = {
  light: ["#08427f", "#2f7fc1", "#9cc6e8", "#fafaf8", "#f3bf85", "#d07a1f", "#8a3f00"],
  dark: ["#a9d6ff", "#4f9fe6", "#1f4f80", "#1c1e22", "#7a4510", "#d98324", "#ffd8a3"],
};
const SEQUENTIAL = {
  light: ["#fafaf8", "#c5e3dc", "#74bdb1", "#2b8784", "#0b4a55"],
  dark: ["#1c1e22", "#1d4a4d", "#2b8784", "#7cc9b6", "#e4f9ec"],
};

/** Whether the page is dark now. */
export function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** 256 colours between the stops. */
function table(stops) {
  const points = stops.map(rgb);
  return Array.from({ length: 256 }, (_, i) => {
    const x = (i / 255) * (points.length - 1);
    const k = Math.min(points.length - 2, Math.floor(x));
    return points[k].map((a, channel) => Math.round(a + (points[k + 1][channel] - a) * (x - k)));
  });
}

function scaleOf(low, high, stops, largest) {
  const colours = table(stops[dark() ? "dark" : "light"]);
  const span = high - low || 1;
  const at = (x) => colours[Math.max(0, Math.min(255, Math.round(((x - low) / span) * 255)))];
  return { low, high, largest, colour: at, css: (x) => `rgb(${at(x).join(" ")})` };
}

/** Blue below zero, orange above; zero is the background. `largest` is the largest size where `max` leaves some out. */
export const diverging = (max, largest = max) => scaleOf(-(max || 1), max || 1, DIVERGING, largest);

/** From the background up: for probabilities and sizes. */
export const sequential = (max, low = 0) => scaleOf(low, max > low ? max : low + 1, SEQUENTIAL, max);

/** A scale for data around zero, which a few outliers do not turn pale: it ends at the 99.5th percentile of the sizes. */
export function divergingFor(data) {
  const step = Math.max(1, Math.floor(data.length / 40000));
  const sizes = [];
  let largest = 0;
  for (let i = 0; i < data.length; i += 1) {
    const size = Math.abs(data[i]);
    if (!Number.isFinite(size)) continue;
    if (size > largest) largest = size;
    if (i % step === 0 && size > 0) sizes.push(size);
  }
  sizes.sort((a, b) => a - b);
  const most = sizes[Math.floor(sizes.length * 0.995)] ?? largest;
  return diverging(largest > 1.5 * most && most > 0 ? most : largest, largest);
}

/** A colour bar with its numbers. */
export function legend(scale, title) {
  const bar = el("canvas", { width: 128, height: 1, class: "legend-bar", "aria-hidden": "true" });
  const context = bar.getContext("2d");
  for (let x = 0; x < 128; x += 1) {
    context.fillStyle = scale.css(scale.low + ((scale.high - scale.low) * (x + 0.5)) / 128);
    context.fillRect(x, 0, 1, 1);
  }
  const middle = (scale.low + scale.high) / 2;
  const beyond = scale.largest > scale.high + 0.001 * Math.abs(scale.high) ? el("span", { class: "quiet" }, `up to ${number(scale.largest, 3)}`) : null;
  return el("div", { class: "legend" },
    el("span", { class: "legend-title" }, title),
    el("span", { class: "legend-scale" }, bar,
      el("span", { class: "legend-ticks num" }, ...[scale.low, middle, scale.high].map((x) => el("span", {}, number(x, 2))))),
    beyond);
}

/** A thumbnail of the summary, drawn; null if there is none. */
export function thumbnail(thumb, probability = false, className = "thumb") {
  const canvas = el("canvas", { class: className, "aria-hidden": "true" });
  if (!thumb) return canvas;
  const bytes = Uint8Array.from(atob(thumb.data), (c) => c.charCodeAt(0));
  const signed = new Int8Array(bytes.buffer);
  canvas.width = thumb.cols;
  canvas.height = thumb.rows;
  const scale = probability ? sequential(127) : diverging(127);
  const context = canvas.getContext("2d");
  const image = context.createImageData(thumb.cols, thumb.rows);
  signed.forEach((x, i) => image.data.set([...scale.colour(x), 255], i * 4));
  context.putImageData(image, 0, 0);
  return canvas;
}

/** The colour that a variable of style.css stands for in this theme. */
function css(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}
const probe = el("span", { hidden: true });
document.body.append(probe);

const FONT = '11px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace';

/**
 * A heat map on a canvas, with labels, a cursor (mouse or arrow keys) and, if the matrix is too large, a window of it.
 *
 * rows, cols: of the complete matrix. value(r, c): undefined where there is no cell, -Infinity where it is masked.
 * label(r, c): the cell in words. rowLabel(r), colLabel(c): text on the axes. rowTitle, colTitle: what the axes are.
 * groups: columns to a head, groupLabel(g). rowGroups: rows to a head. load(r0, nr, c0, nc): awaited before a window is drawn.
 * labelRoom, rowRoom: pixels for the labels, where a sample of them says too little.
 * onhover(r, c), onpick(r, c), onmove(window). width, height: room. smallest, largest: sizes of a cell.
 */
export class HeatMap {
  constructor(options) {
    Object.assign(this, { smallest: 4, largest: 26, width: 700, height: 420, groups: 0, rowGroups: 0 }, options);
    this.picked = null;
    this.cursor = null;
    this.row = null;
    this.canvas = el("canvas", { tabindex: "0", role: "application", "aria-roledescription": "heat map", "aria-label": `${this.title}: ${this.rows} rows, ${this.cols} columns. Arrow keys move, Enter opens the number.` });
    this.element = el("div", { class: "heat" }, this.canvas);
    this.measure();
    this.listen();
  }

  /** Sizes: margins from the labels, cells from the room that is left. */
  measure() {
    const context = this.canvas.getContext("2d");
    context.font = FONT;
    const widest = (f, n) => {
      let most = 0;
      for (let i = 0; i < Math.min(n, 400); i += 1) most = Math.max(most, context.measureText(f(i)).width);
      return most;
    };
    this.left = (this.rowRoom || Math.min(150, Math.ceil(widest(this.rowLabel, this.rows)))) + 10;
    const room = this.width - this.left - 4;
    const fit = (space, n) => Math.floor((space / n) * 4) / 4;
    this.cw = Math.max(this.smallest, Math.min(this.largest, fit(room, this.cols)));
    const wide = this.labelRoom || Math.min(110, Math.ceil(widest(this.colLabel, this.cols)));
    this.slantRoom = wide + 2;
    this.slanted = this.everyColumn && wide + 4 > this.cw;
    this.top = (this.slanted ? wide + 8 : 18) + (this.groups ? 16 : 0) + (this.colTitle ? 14 : 0);
    const high = this.height - this.top - 4;
    this.ch = Math.max(this.smallest, Math.min(this.largest, fit(high, this.rows)));
    if (this.square) this.cw = this.ch = Math.min(this.cw, this.ch);
    this.nr = Math.min(this.rows, Math.max(1, Math.floor(high / this.ch)));
    this.nc = Math.min(this.cols, Math.max(1, Math.floor(room / this.cw)));
    if (this.nr < this.rows && this.ch < 12) this.nr = Math.min(this.rows, Math.floor(high / (this.ch = 12)));
    if (this.nc < this.cols && this.cw < 12) this.nc = Math.min(this.cols, Math.floor(room / (this.cw = 12)));
    this.r0 = Math.min(this.r0 ?? 0, this.rows - this.nr);
    this.c0 = Math.min(this.c0 ?? 0, this.cols - this.nc);
  }

  /** Whether it shows a window only. */
  get windowed() {
    return this.nr < this.rows || this.nc < this.cols;
  }

  listen() {
    const canvas = this.canvas;
    canvas.addEventListener("mousemove", (event) => this.hover(this.cellAt(event)));
    canvas.addEventListener("mouseleave", () => this.hover(null));
    canvas.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      if (cell) this.onpick?.(...cell);
    });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("focus", () => this.hover(this.cursor ?? this.picked ?? [this.r0, this.c0]));
    canvas.addEventListener("blur", () => this.hover(null));
    canvas.addEventListener("wheel", (event) => {
      if (!this.windowed || !(event.shiftKey || event.deltaX)) return;
      event.preventDefault();
      this.moveTo(this.r0, this.c0 + Math.sign(event.deltaX || event.deltaY) * Math.ceil(this.nc / 8));
    }, { passive: false });
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const c = this.c0 + Math.floor((event.clientX - box.left - this.left) / this.cw);
    const r = this.r0 + Math.floor((event.clientY - box.top - this.top) / this.ch);
    return this.has(r, c) ? [r, c] : null;
  }

  has(r, c) {
    return r >= this.r0 && c >= this.c0 && r < this.r0 + this.nr && c < this.c0 + this.nc && this.value(r, c) !== undefined;
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const far = event.shiftKey ? 8 : 1;
    const steps = { ArrowUp: [-far, 0], ArrowDown: [far, 0], ArrowLeft: [0, -far], ArrowRight: [0, far],
      PageUp: [-this.nr, 0], PageDown: [this.nr, 0], Home: [0, -this.cols], End: [0, this.cols] };
    const [r, c] = this.cursor ?? this.picked ?? [this.r0, this.c0];
    if (event.key === "Enter" || event.key === " ") this.onpick?.(r, c);
    else if (steps[event.key]) this.walk(r, c, steps[event.key]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  async walk(r, c, [down, right]) {
    const to = [Math.max(0, Math.min(this.rows - 1, r + down)), Math.max(0, Math.min(this.cols - 1, c + right))];
    await this.reveal(...to);
    if (this.value(...to) !== undefined) this.hover(to);
  }

  /** Move the window, if needed, so that a cell is in it. */
  async reveal(r, c) {
    const into = (at, start, n) => (at < start ? at : at >= start + n ? at - n + 1 : start);
    const [r0, c0] = [into(r, this.r0, this.nr), into(c, this.c0, this.nc)];
    if (r0 !== this.r0 || c0 !== this.c0) await this.moveTo(r0, c0);
  }

  async moveTo(r0, c0) {
    this.r0 = Math.max(0, Math.min(this.rows - this.nr, Math.round(r0)));
    this.c0 = Math.max(0, Math.min(this.cols - this.nc, Math.round(c0)));
    await this.draw();
    this.onmove?.(this);
  }

  hover(cell) {
    this.mark(cell);
    this.onhover?.(cell);
  }

  /** Mark a row at its ends: the chosen token's; null for none. */
  markRow(r) {
    this.row = r;
    this.overlay();
  }

  /** Show a cursor without calling onhover, for the map beside this one. */
  mark(cell) {
    this.cursor = cell;
    this.overlay();
  }

  async pick(r, c) {
    this.picked = [r, c];
    await this.reveal(r, c);
    this.overlay();
  }

  /** Load what the window shows, and draw it. */
  async draw() {
    await this.load?.(this.r0, this.nr, this.c0, this.nc);
    const ratio = window.devicePixelRatio || 1;
    const wide = this.left + this.nc * this.cw + 6;
    const high = this.top + this.nr * this.ch + 6;
    const picture = el("canvas", { width: Math.ceil(wide * ratio), height: Math.ceil(high * ratio) });
    const context = picture.getContext("2d");
    context.scale(ratio, ratio);
    this.cells(context);
    this.lines(context);
    this.labels(context);
    this.picture = picture;
    this.canvas.width = picture.width;
    this.canvas.height = picture.height;
    this.canvas.style.width = `${wide}px`;
    this.canvas.style.height = `${high}px`;
    this.overlay();
    return this;
  }

  cells(context) {
    const small = el("canvas", { width: this.nc, height: this.nr });
    const inner = small.getContext("2d");
    const image = inner.createImageData(this.nc, this.nr);
    const masked = [];
    for (let r = 0; r < this.nr; r += 1) {
      for (let c = 0; c < this.nc; c += 1) {
        const x = this.value(this.r0 + r, this.c0 + c);
        if (x === undefined) continue;
        if (x === -Infinity || Number.isNaN(x) || this.masked?.(this.r0 + r, this.c0 + c)) {
          masked.push([r, c]);
          continue;
        }
        const [red, green, blue] = this.scale.colour(x);
        const at = (r * this.nc + c) * 4;
        image.data[at] = red;
        image.data[at + 1] = green;
        image.data[at + 2] = blue;
        image.data[at + 3] = 255;
      }
    }
    inner.putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, this.left, this.top, this.nc * this.cw, this.nr * this.ch);
    this.hatch(context, masked);
  }

  /** Diagonal strokes over masked cells. */
  hatch(context, cells) {
    if (!cells.length) return;
    context.save();
    context.beginPath();
    for (const [r, c] of cells) context.rect(this.left + c * this.cw, this.top + r * this.ch, this.cw, this.ch);
    context.clip();
    context.strokeStyle = css("--hatch");
    context.lineWidth = 1;
    context.beginPath();
    const [wide, high] = [this.nc * this.cw, this.nr * this.ch];
    for (let x = -high; x < wide; x += 6) {
      context.moveTo(this.left + x, this.top + high);
      context.lineTo(this.left + x + high, this.top);
    }
    context.stroke();
    context.restore();
  }

  lines(context) {
    context.strokeStyle = css("--line");
    context.lineWidth = 1;
    context.strokeRect(this.left - 0.5, this.top - 0.5, this.nc * this.cw + 1, this.nr * this.ch + 1);
    context.strokeStyle = css("--divide");
    context.lineWidth = 1.5;
    context.beginPath();
    for (let c = this.groups; this.groups && c < this.cols; c += this.groups) {
      if (c <= this.c0 || c >= this.c0 + this.nc) continue;
      const x = this.left + (c - this.c0) * this.cw;
      context.moveTo(x, this.top - 14);
      context.lineTo(x, this.top + this.nr * this.ch);
    }
    for (let r = this.rowGroups; this.rowGroups && r < this.rows; r += this.rowGroups) {
      if (r <= this.r0 || r >= this.r0 + this.nr) continue;
      const y = this.top + (r - this.r0) * this.ch;
      context.moveTo(this.left, y);
      context.lineTo(this.left + this.nc * this.cw, y);
    }
    context.stroke();
  }

  labels(context) {
    context.font = FONT;
    context.fillStyle = css("--quiet");
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = (size, room) => [1, 2, 4, 8, 16, 32, 64, 128, 256].find((n) => n * size >= room) ?? 512;
    const down = every(this.ch, 11);
    for (let r = this.r0; r < this.r0 + this.nr; r += 1) {
      if (r % down) continue;
      context.fillText(this.clip(context, this.rowLabel(r), this.left - 8), this.left - 6, this.top + (r - this.r0 + 0.5) * this.ch);
    }
    const across = this.everyColumn ? every(this.cw, 11) : every(this.cw, 30);
    for (let c = this.c0; c < this.c0 + this.nc; c += 1) {
      if (c % across) continue;
      const x = this.left + (c - this.c0 + 0.5) * this.cw;
      context.save();
      context.translate(x, this.top - 5);
      context.textAlign = this.slanted ? "left" : "center";
      context.textBaseline = this.slanted ? "middle" : "bottom";
      if (this.slanted) context.rotate(-Math.PI / 2);
      context.fillText(this.clip(context, this.colLabel(c), this.slanted ? this.slantRoom : 999), 0, this.slanted ? 0 : 2);
      context.restore();
    }
    context.textBaseline = "top";
    if (this.groups) this.groupLabels(context);
    context.textAlign = "left";
    context.fillStyle = css("--faint");
    if (this.colTitle) context.fillText(this.colTitle, this.left, 0);
  }

  groupLabels(context) {
    context.textAlign = "center";
    for (let g = 0; g * this.groups < this.cols; g += 1) {
      const [from, to] = [Math.max(this.c0, g * this.groups), Math.min(this.c0 + this.nc, (g + 1) * this.groups)];
      if (to <= from) continue;
      const label = this.groupLabel(g);
      const room = (to - from) * this.cw;
      const x = this.left + ((from + to) / 2 - this.c0) * this.cw;
      context.fillText(context.measureText(label).width < room - 4 ? label : room > 14 ? String(g) : "", x, this.colTitle ? 14 : 0);
    }
  }

  clip(context, text, room) {
    if (context.measureText(text).width <= room) return text;
    let kept = [...text];
    while (kept.length > 1 && context.measureText(`${kept.join("")}…`).width > room) kept = kept.slice(0, -1);
    return `${kept.join("")}…`;
  }

  /** The drawn picture, with the cursor and the picked cell over it. */
  overlay() {
    if (!this.picture) return;
    const context = this.canvas.getContext("2d");
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.drawImage(this.picture, 0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const outline = ([r, c], colour, width) => {
      if (r < this.r0 || c < this.c0 || r >= this.r0 + this.nr || c >= this.c0 + this.nc) return;
      context.strokeStyle = css("--paper");
      context.lineWidth = width + 2;
      const box = [this.left + (c - this.c0) * this.cw - 0.5, this.top + (r - this.r0) * this.ch - 0.5, this.cw + 1, this.ch + 1];
      context.strokeRect(...box);
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.strokeRect(...box);
    };
    if (this.row !== null && this.row >= this.r0 && this.row < this.r0 + this.nr) {
      const y = this.top + (this.row - this.r0) * this.ch;
      context.fillStyle = css("--focus");
      context.fillRect(this.left - 4, y, 3, this.ch);
      context.fillRect(this.left + this.nc * this.cw + 1, y, 3, this.ch);
    }
    if (this.cursor) {
      const [r, c] = this.cursor;
      context.fillStyle = css("--cross");
      if (r >= this.r0 && r < this.r0 + this.nr) context.fillRect(this.left, this.top + (r - this.r0) * this.ch, this.nc * this.cw, this.ch);
      if (c >= this.c0 && c < this.c0 + this.nc) context.fillRect(this.left + (c - this.c0) * this.cw, this.top, this.cw, this.nr * this.ch);
      outline(this.cursor, css("--ink"), 1);
    }
    if (this.picked) outline(this.picked, css("--focus"), 2);
  }
}

const svg = (tag, attributes, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
};
export { svg };

/** How the numbers of an array are spread: bars in the heat map's colours. */
export function histogram(data, scale, title) {
  let [low, high, n] = [Infinity, -Infinity, 0];
  for (const x of data) {
    if (!Number.isFinite(x)) continue;
    n += 1;
    if (x < low) low = x;
    if (x > high) high = x;
  }
  if (n === 0) return el("p", { class: "quiet" }, "No finite numbers.");
  const bins = new Array(56).fill(0);
  const span = high - low || 1;
  for (const x of data) if (Number.isFinite(x)) bins[Math.min(55, Math.floor(((x - low) / span) * 56))] += 1;
  const most = Math.max(...bins);
  const height = (many) => Math.log1p(many) / Math.log1p(most);
  const bars = bins.map((many, i) => {
    const tall = many ? Math.max(1, height(many) * 62) : 0;
    const from = low + (span * i) / 56;
    const bar = svg("rect", { x: i * 5, y: 66 - tall, width: 4.4, height: tall, fill: scale.css(from + span / 112), class: "bar" });
    bar.append(svg("title", {}, `${number(from, 3)} to ${number(from + span / 56, 3)}: ${many}`));
    return bar;
  });
  const zero = low < 0 && high > 0 ? [svg("line", { x1: (-low / span) * 280, x2: (-low / span) * 280, y1: 0, y2: 69, class: "zero" })] : [];
  const picture = svg("svg", { viewBox: "0 0 280 70", class: "histogram", role: "img", "aria-label": `Histogram of ${title}` },
    ...zero, svg("line", { x1: 0, x2: 280, y1: 66.5, y2: 66.5, class: "axis" }), ...bars);
  return el("figure", { class: "histogram-box" }, picture,
    el("figcaption", { class: "num quiet spread" }, el("span", {}, number(low, 3)), el("span", {}, `of ${n}, logarithmic`), el("span", {}, number(high, 3))));
}
