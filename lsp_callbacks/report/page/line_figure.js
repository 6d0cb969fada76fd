"use strict";
// Curves over optimizer steps: hover, zoom, keys, a legend that switches curves, and a table of the same numbers.

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 3", "2 2.5", "9 3 2 3", "4 2", "12 4"];

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "text") element.textContent = value; else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function draw(parent, tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

const read = (value) => value === null ? NaN : value === "inf" ? Infinity : value === "-inf" ? -Infinity : value;

function say(value) {
  if (Number.isNaN(value)) return "failed (NaN)";
  if (!Number.isFinite(value)) return value > 0 ? "infinite" : "minus infinite";
  return Number(value.toPrecision(4)).toString();
}

const count = (value) => Math.round(value).toLocaleString("en");

function ticks(low, high, most) {
  const raw = (high - low) / Math.max(most, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const factors = high < 300 * low ? [1, 2, 5] : [1], found = [];
  for (let k = first; k <= last; k++) for (const n of factors) if (n * 10 ** k >= low && n * 10 ** k <= high) found.push(n * 10 ** k);
  return last - first > 8 ? found.filter((_, i) => i % Math.ceil(found.length / 6) === 0) : found;
}

// The range of steps is one for all figures: zooming one zooms the others.
const view = { whole: [0, 1], range: [0, 1], listeners: [] };

function zoom(low, high) {
  const [first, last] = view.whole, least = Math.max((last - first) / 2000, 1e-9);
  if (high - low < least) { const middle = (low + high) / 2; low = middle - least / 2; high = middle + least / 2; }
  view.range = [Math.max(low, first), Math.min(high, last)];
  if (view.range[1] <= view.range[0]) view.range = [first, last];
  view.listeners.forEach((listener) => listener());
}

function zoomBy(factor, around) {
  const [low, high] = view.range, middle = around === undefined ? (low + high) / 2 : around;
  zoom(middle - (middle - low) * factor, middle + (high - middle) * factor);
}

// Draw again when the width has changed, not while it is being laid out.
function watchWidth(element, act) {
  let before = 0;
  new ResizeObserver(() => {
    if (element.clientWidth === before) return;
    before = element.clientWidth;
    requestAnimationFrame(act);
  }).observe(element);
}

// The range of the vertical axis, by the rules of the package's pictures.
function verticalRange(spec, values) {
  const finite = values.filter(Number.isFinite), positive = finite.filter((v) => v > 0);
  if (!finite.length) return { low: 0, high: 1, log: false };
  let low = finite.reduce((a, b) => Math.min(a, b)), high = finite.reduce((a, b) => Math.max(a, b));
  const leastPositive = positive.length ? positive.reduce((a, b) => Math.min(a, b)) : 1;
  if (spec.rule === "courant") {
    if (high > 8) return { low: Math.max(leastPositive, 1e-2) / 1.3, high: Math.min(high, 1e3) * 1.3, log: true };
    return { low: Math.min(0, low), high: Math.max(1.25, 1.08 * high), log: false };
  }
  if (spec.rule === "loss" && spec.first) high = Math.min(high, 100 * Math.max(spec.first, 1e-12));
  if (spec.edge !== null && spec.rule !== "loss") { low = Math.min(low, spec.edge); high = Math.max(high, spec.edge); }
  if (low > 0 && high > (spec.rule === "loss" ? 8 : 30) * low) return { low: low / 1.2, high: high * 1.2, log: true };
  const margin = 0.08 * Math.max(high - low, 0.05 * Math.abs(high), 1e-9);
  return { low: low - margin, high: high + margin, log: false };
}

class LineFigure {
  constructor(host, spec) {
    this.host = host;
    this.spec = spec;
    this.series = spec.series.map((s) => ({ ...s, y: s.y.map(read), shown: true }));
    const loss = this.series.find((s) => s.look === "thin");
    if (spec.rule === "loss" && loss) {
      const first = loss.y.filter(Number.isFinite).slice(0, 5).map(Math.abs);
      spec.first = first.reduce((a, b) => a + b, 0) / Math.max(first.length, 1);
    }
    this.steps = [...new Set(this.series.flatMap((s) => s.x))].sort((a, b) => a - b);
    this.cursor = null;
    this.build();
    view.listeners.push(() => this.render());
    watchWidth(this.plot, () => this.render());
  }

  colour(series) { return `var(--c${(series.colour === undefined ? series.run : series.colour) % 6})`; }

  dash(series) {
    if (series.look === "dashed") return "7 3";
    return DASHES[(series.colour === undefined ? series.run : 0) % DASHES.length];
  }

  build() {
    const spec = this.spec, title = make("h3", { text: spec.title }), tools = make("div", { class: "tools" });
    for (const [text, label, act] of [
      ["−", "Zoom out", () => zoomBy(2)], ["+", "Zoom in", () => zoomBy(0.5, this.step())],
      ["Whole run", "Show the whole run", () => zoom(...view.whole)],
    ]) {
      const button = make("button", { type: "button", text, "aria-label": `${label}: ${spec.title}` });
      button.addEventListener("click", act);
      tools.append(button);
    }
    const drawn = this.series.reduce((n, s) => n + s.x.length, 0), all = this.series.reduce((n, s) => n + s.of, 0);
    const thinned = drawn < all ? ` ${count(all)} values, drawn as ${count(drawn)}: the least and the largest of neighbours are kept.` : "";
    const about = make("p", { class: "note", text: (spec.about || "") + thinned });
    this.plot = make("div", {
      class: "plot", tabindex: "0", role: "group", "aria-roledescription": "chart",
      "aria-label": `${this.summary()} Left and right arrows: readings. Plus and minus: zoom. Escape: the whole run.`,
    });
    this.svg = draw(this.plot, "svg", { role: "img", "aria-label": this.summary() });
    this.tip = make("div", { class: "tip" });
    this.tip.hidden = true;
    this.voice = make("div", { class: "quiet", "aria-live": "polite" });
    this.plot.append(this.tip);
    this.host.replaceChildren(make("div", { class: "head" }, title, tools), about, this.legend(), this.plot, this.voice, this.table());
    this.plot.addEventListener("pointerdown", (event) => this.press(event));
    this.plot.addEventListener("pointermove", (event) => this.move(event));
    this.plot.addEventListener("pointerup", (event) => this.release(event));
    this.plot.addEventListener("pointercancel", () => { this.from = undefined; });
    this.plot.addEventListener("pointerleave", () => { if (this.from === undefined) this.point(null); });
    this.plot.addEventListener("dblclick", () => zoom(...view.whole));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.plot.addEventListener("blur", () => this.point(null));
  }

  summary() {
    const parts = this.series.map((s) => {
      const finite = s.y.filter((v) => !Number.isNaN(v));
      return finite.length ? `${s.name} from ${say(finite[0])} to ${say(finite[finite.length - 1])}` : `${s.name} without a reading`;
    });
    const edge = this.spec.edge === null ? "" : ` Edge at ${this.spec.edge}.`;
    return `${this.spec.title} over optimizer steps: ${parts.join("; ")}.${edge}`;
  }

  legend() {
    const legend = make("div", { class: "legend", role: "group", "aria-label": `Curves of ${this.spec.title}` });
    for (const series of this.series) {
      const swatch = document.createElementNS(SVG, "svg");
      for (const [name, value] of [["width", 26], ["height", 10], ["aria-hidden", "true"]]) swatch.setAttribute(name, value);
      const thin = series.look === "thin" || series.look === "bound";
      draw(swatch, "line", {
        x1: 1, x2: 25, y1: 5, y2: 5, stroke: this.colour(series), "stroke-width": thin ? 1 : 2.4, "stroke-dasharray": this.dash(series),
        "stroke-opacity": thin ? 0.6 : 1,
      });
      const button = make("button", { type: "button", "aria-pressed": "true" }, swatch, series.name);
      button.addEventListener("click", () => {
        series.shown = !series.shown;
        button.setAttribute("aria-pressed", String(series.shown));
        this.render();
      });
      legend.append(button);
    }
    return legend;
  }

  table() {
    const details = make("details", {}, make("summary", { text: `${this.spec.title} as a table` }));
    details.addEventListener("toggle", () => {
      if (!details.open || details.children.length > 1) return;
      const most = 1500, steps = this.steps.length > most ? this.steps.slice(-most) : this.steps;
      const values = this.series.map((s) => new Map(s.x.map((step, i) => [step, s.y[i]])));
      const head = make("tr", {}, ...["step", ...this.series.map((s) => s.name)].map((text) => make("th", { scope: "col", text })));
      const rows = steps.map((step) => make("tr", {}, make("th", { scope: "row", text: count(step) }),
        ...values.map((of) => make("td", { text: of.has(step) ? say(of.get(step)) : "" }))));
      const note = steps.length < this.steps.length ? `, the last ${count(most)} of ${count(this.steps.length)} steps` : "";
      const table = make("table", {}, make("caption", { text: this.spec.title + note }), make("thead", {}, head), make("tbody", {}, ...rows));
      details.append(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${this.spec.title} as a table` }, table));
    });
    return details;
  }

  render() {
    const width = Math.max(this.plot.clientWidth, 220), narrow = width < 520;
    const marks = (this.spec.marks || []).filter((m) => m.step >= view.range[0] && m.step <= view.range[1]);
    const top = 8 + 15 * marks.length, height = top + (narrow ? 200 : 240) + 34;
    const box = this.box = { left: narrow ? 44 : 58, right: width - 12, top, bottom: height - 34 };
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    this.svg.replaceChildren();
    const [from, to] = view.range, shown = this.series.filter((s) => s.shown);
    const inside = shown.flatMap((s) => s.y.filter((_, i) => s.x[i] >= from && s.x[i] <= to));
    const range = this.range = verticalRange(this.spec, inside);
    const scale = range.log ? Math.log10 : (v) => v, bottom = scale(range.low), span = scale(range.high) - bottom || 1;
    const x = this.x = (step) => box.left + (step - from) / (to - from || 1) * (box.right - box.left);
    const y = (value) => {
      if (value === Infinity || value > range.high) return box.top;
      if (value === -Infinity || value < range.low) return box.bottom;
      return box.bottom - (scale(value) - bottom) / span * (box.bottom - box.top);
    };
    this.grid(box, range, x, y, narrow);
    const clip = `clip-${this.spec.id.replace(/\W/g, "-")}-${this.host.dataset.figure || "chosen"}`;
    draw(draw(this.svg, "clipPath", { id: clip }), "rect", { x: box.left, y: box.top - 5, width: box.right - box.left, height: box.bottom - box.top + 10 });
    const layer = draw(this.svg, "g", { "clip-path": `url(#${clip})` });
    this.edge(layer, box, range, y);
    this.marks(layer, marks, x, box);
    for (const series of shown) this.curve(layer, series, x, y, box, range);
    this.cursorLayer = draw(this.svg, "g", { "pointer-events": "none" });
    if (this.cursor !== null) this.point(this.cursor);
  }

  grid(box, range, x, y, narrow) {
    const across = ticks(view.range[0], view.range[1], narrow ? 4 : 8), up = range.log ? logTicks(range.low, range.high) : ticks(range.low, range.high, 5);
    for (const step of across) {
      draw(this.svg, "line", { x1: x(step), x2: x(step), y1: box.top, y2: box.bottom, stroke: "var(--grid)" });
      const ends = x(step) > box.right - 24;  // its number would be cut off
      draw(this.svg, "text", { x: ends ? box.right + 10 : x(step), y: box.bottom + 16, "text-anchor": ends ? "end" : "middle" }, step.toLocaleString("en"));
    }
    for (const value of up) {
      draw(this.svg, "line", { x1: box.left, x2: box.right, y1: y(value), y2: y(value), stroke: "var(--grid)" });
      const text = value !== 0 && (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3) ? value.toExponential(0) : String(Number(value.toPrecision(6)));
      draw(this.svg, "text", { x: box.left - 6, y: y(value) + 4, "text-anchor": "end" }, text);
    }
    draw(this.svg, "path", { d: `M${box.left} ${box.top}V${box.bottom}H${box.right}`, fill: "none", stroke: "var(--axis)", "stroke-width": 0.8 });
    draw(this.svg, "text", { x: box.right, y: box.bottom + 31, "text-anchor": "end" }, "optimizer step");
  }

  edge(layer, box, range, y) {
    const edge = this.spec.edge;
    if (edge === null || edge > range.high || edge < range.low) return;
    draw(layer, "rect", { x: box.left, y: box.top, width: box.right - box.left, height: Math.max(y(edge) - box.top, 0), fill: "var(--beyond)" });
    draw(layer, "line", { x1: box.left, x2: box.right, y1: y(edge), y2: y(edge), stroke: "var(--edge)", "stroke-width": 1.2 });
    draw(this.svg, "text", { class: "edge mark", x: box.left + 6, y: y(edge) - 5 }, `edge (${edge})`);
  }

  marks(layer, marks, x, box) {
    const several = document.querySelectorAll(".verdict").length > 1;
    const ordered = [...marks].sort((a, b) => a.step - b.step);
    ordered.forEach((mark, row) => {
      const left = x(mark.step) > (box.left + box.right) / 2, at = 15 * row;
      draw(this.svg, "line", {
        x1: x(mark.step), x2: x(mark.step), y1: at + 4, y2: box.bottom, stroke: `var(--c${several ? mark.run % 6 : [1, 3, 4, 5][row % 4]})`,
        "stroke-width": 1.2, "stroke-dasharray": DASHES[(row % 5) + 1],
      });
      const text = `${several ? mark.of + ": " : ""}${mark.name}, step ${count(mark.step)}`;
      const label = draw(this.svg, "text", { class: "mark", x: x(mark.step) + (left ? -5 : 5), y: at + 14, "text-anchor": left ? "end" : "start" }, text);
      const wide = label.getComputedTextLength(), room = left ? x(mark.step) - 5 : box.right + 12 - x(mark.step) - 5;
      if (wide > room) {  // on a phone: to the border, across its line
        label.setAttribute("x", left ? 0 : box.right + 12);
        label.setAttribute("text-anchor", left ? "start" : "end");
        if (wide > box.right + 12) {
          label.setAttribute("textLength", box.right + 12);
          label.setAttribute("lengthAdjust", "spacingAndGlyphs");
        }
      }
    });
  }

  curve(layer, series, x, y, box, range) {
    const colour = this.colour(series), bound = series.look === "bound", thin = bound || series.look === "thin";
    let path = "", open = false, points = 0;
    const [from, to] = view.range, beyond = [], failed = [], spots = [];
    series.x.forEach((step, i) => {
      const value = series.y[i], here = step >= from && step <= to;
      if (Number.isNaN(value)) { open = false; if (here) failed.push(step); return; }
      path += `${open ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
      open = true;
      if (!here) return;
      points += 1;
      if (value > range.high || value < range.low) beyond.push([step, value]); else spots.push([step, value]);
    });
    draw(layer, "path", {
      d: path || "M0 0", fill: "none", stroke: colour, "stroke-width": thin ? 1 : series.look === "thick" ? 2.2 : 1.5,
      "stroke-opacity": thin ? (points > 400 ? 0.35 : 0.6) : 1, "stroke-linejoin": "round", "stroke-linecap": "round", "stroke-dasharray": this.dash(series),
    });
    if (points <= 5 || (thin && !bound && points <= 120)) {
      for (const [step, value] of spots) draw(layer, "circle", { cx: x(step), cy: y(value), r: thin ? 2 : 3, fill: colour, "fill-opacity": thin ? 0.7 : 1 });
    }
    for (const [step, value] of beyond.slice(0, 300)) {  // off the scale: a triangle at its border
      const at = x(step), up = value > range.high, base = up ? box.top : box.bottom, tip = up ? -5 : 5;
      draw(layer, "path", { d: `M${at - 4} ${base}L${at + 4} ${base}L${at} ${base + tip}Z`, fill: colour });
    }
    for (const step of failed.slice(0, 300)) {
      draw(layer, "path", { d: `M${x(step) - 3} ${box.bottom - 3}l6 6m0 -6l-6 6`, stroke: "var(--c4)", "stroke-width": 1.2, fill: "none" });
    }
  }

  step() { return this.cursor === null ? undefined : this.steps[this.cursor]; }

  nearest(series, step) {
    let low = 0, high = series.x.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (series.x[middle] <= step) low = middle; else high = middle; }
    return Math.abs(series.x[high] - step) < Math.abs(series.x[low] - step) ? high : low;
  }

  point(index, speak) {
    this.cursor = index;
    if (!this.cursorLayer) return;
    this.cursorLayer.replaceChildren();
    this.tip.hidden = index === null;
    if (index === null) return;
    const step = this.steps[index], at = this.x(step), box = this.box;
    draw(this.cursorLayer, "line", { x1: at, x2: at, y1: box.top, y2: box.bottom, stroke: "var(--axis)", "stroke-width": 0.8 });
    const lines = [`step ${count(step)}`];
    for (const series of this.series.filter((s) => s.shown && s.x.length)) {
      const i = this.nearest(series, step), other = series.x[i] === step ? "" : ` (step ${count(series.x[i])})`;
      lines.push(`${series.name}: ${say(series.y[i])}${other}`);
    }
    this.tip.replaceChildren(...lines.map((text) => make("p", { text })));
    const width = this.plot.clientWidth;
    this.tip.style.left = at < width / 2 ? `${at + 12}px` : "auto";
    this.tip.style.right = at < width / 2 ? "auto" : `${width - at + 12}px`;
    if (speak) this.voice.textContent = lines.join(", ");
  }

  at(event) {
    const box = this.box, place = event.clientX - this.plot.getBoundingClientRect().left;
    const share = Math.min(Math.max((place - box.left) / (box.right - box.left), 0), 1);
    return view.range[0] + share * (view.range[1] - view.range[0]);
  }

  move(event) {
    const step = this.at(event);
    if (!this.steps.length) return;
    this.point(this.nearest({ x: this.steps }, step));
    if (this.from === undefined) return;
    const [a, b] = [this.x(this.from), this.x(step)].sort((p, q) => p - q);
    draw(this.cursorLayer, "rect", { x: a, y: this.box.top, width: b - a, height: this.box.bottom - this.box.top, fill: "var(--focus)", "fill-opacity": 0.15 });
  }

  press(event) {
    if (event.button) return;
    this.from = this.at(event);
    if (event.pointerType === "mouse") this.plot.setPointerCapture(event.pointerId);
  }

  release(event) {
    const from = this.from, to = this.at(event);
    this.from = undefined;
    if (from === undefined || Math.abs(this.x(from) - this.x(to)) < 12) return;
    this.point(null);
    zoom(Math.min(from, to), Math.max(from, to));
  }

  key(event) {
    const last = this.steps.length - 1, at = this.cursor === null ? -1 : this.cursor;
    const acts = {
      ArrowRight: () => this.point(Math.min(at + 1, last), true), ArrowLeft: () => this.point(at < 0 ? last : Math.max(at - 1, 0), true),
      Home: () => this.point(0, true), End: () => this.point(last, true), "+": () => zoomBy(0.5, this.step()), "=": () => zoomBy(0.5, this.step()),
      "-": () => zoomBy(2, this.step()), "0": () => zoom(...view.whole), Escape: () => { this.point(null); zoom(...view.whole); },
    };
    if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey || last < 0) return;
    event.preventDefault();
    acts[event.key]();
  }
}
