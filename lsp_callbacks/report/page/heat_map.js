// Layers or blocks over time as colours: hover, keys, and a table of the same layers.

const VIRIDIS = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"];
const BLUE_TO_RED = ["053061", "2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d", "b2182b", "67001f"];

function shade(scale, value) {
  const of = scale.log ? (v) => Math.log(Math.max(v, 1e-300)) : (v) => v, low = of(scale.low), high = of(scale.high);
  const at = value === Infinity ? 1 : value === -Infinity ? 0 : Math.min(Math.max((of(value) - low) / (high - low || 1), 0), 1);
  const colours = scale.neutral === null ? VIRIDIS : BLUE_TO_RED, place = at * (colours.length - 1);
  const i = Math.min(Math.floor(place), colours.length - 2), part = place - i;
  const mixed = [0, 2, 4].map((k) => {
    const [a, b] = [colours[i], colours[i + 1]].map((hex) => parseInt(hex.slice(k, k + 2), 16));
    return Math.round(a + (b - a) * part);
  });
  return `rgb(${mixed.join(",")})`;
}

function scaleBar(scale) {
  const canvas = make("canvas", { width: 180, height: 12, "aria-hidden": "true" }), context = canvas.getContext("2d");
  for (let i = 0; i < 180; i++) {
    const at = i / 179;
    const value = scale.log ? scale.low * (scale.high / scale.low) ** at : scale.low + (scale.high - scale.low) * at;
    context.fillStyle = shade(scale, value);
    context.fillRect(i, 0, 1, 12);
  }
  const kind = scale.neutral === null ? "" : `white: ${scale.neutral}; `;
  const text = `${scale.log ? "logarithmic; " : ""}${kind}grey: not measured; cross: failed`;
  const bar = make("span", { class: "bar" }, say(scale.low), canvas, say(scale.high));
  return make("div", { class: "scale" }, bar, text);
}

// How many letters all names begin with, up to a dot; a single name has nothing in common with others.
function commonBeginning(names) {
  if (names.length < 2) return 0;
  const same = (length) => names.every((name) => name.startsWith(names[0].slice(0, length)));
  let length = names[0].lastIndexOf(".") + 1;
  while (length > 0 && !same(length)) length = names[0].lastIndexOf(".", length - 2) + 1;
  return length;
}

class HeatMap {
  constructor(host, group, map, name) {
    this.group = group;
    this.map = map;
    this.name = name;
    this.cell = null;
    const title = `${group.kind} of ${map.layers.length} ${group.kind.startsWith("residual") ? "blocks" : "rows"}${name ? ", " + name : ""}`;
    const notes = [];
    if (map.columns > map.spans.length) notes.push(`${count(map.columns)} readings in ${count(map.spans.length)} columns: of those that share a cell, the furthest from ${group.scale.neutral === null ? 0 : group.scale.neutral} is shown.`);
    if (map.left_out) notes.push(`${count(map.left_out)} more rows, nearer to it, are left out.`);
    this.plot = make("div", {
      class: "plot", tabindex: "0", role: "group", "aria-roledescription": "heat map",
      "aria-label": `${title}. ${this.summary()} Arrows move from cell to cell; a table of the rows follows.`,
    });
    this.canvas = make("canvas", { role: "img", "aria-label": `${title}. ${this.summary()}` });
    this.tip = make("div", { class: "tip" });
    this.tip.hidden = true;
    this.voice = make("div", { class: "quiet", "aria-live": "polite" });
    this.plot.append(this.canvas, this.tip);
    host.append(make("div", {}, ...(name ? [make("h3", { text: name })] : []), ...notes.map((text) => make("p", { class: "note", text })), this.plot, this.voice, this.table(title)));
    this.plot.addEventListener("pointermove", (event) => this.move(event));
    this.plot.addEventListener("pointerleave", () => this.point(null));
    this.plot.addEventListener("blur", () => this.point(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    view.listeners.push(() => this.render());
    document.addEventListener("theme", () => this.render());
    watchWidth(this.plot, () => this.render());
  }

  summary() {
    const rows = this.map.table.filter((row) => typeof read(row[4]) === "number" && !Number.isNaN(read(row[4])));
    if (!rows.length) return "No reading.";
    const largest = rows.reduce((a, b) => read(b[4]) > read(a[4]) ? b : a);
    return `Largest at the last reading: ${largest[0]}, ${say(read(largest[4]))}.`;
  }

  table(title) {
    const details = make("details", {}, make("summary", { text: `${title} as a table` }));
    details.addEventListener("toggle", () => {
      if (!details.open || details.children.length > 1) return;
      const head = make("tr", {}, ...["name", "first", "largest", "at step", "last"].map((text) => make("th", { scope: "col", text })));
      const rows = this.map.table.map((row) => make("tr", {}, make("th", { scope: "row", text: row[0] }),
        ...row.slice(1).map((value, i) => make("td", { text: i === 2 ? count(value) : say(read(value)) }))));
      const table = make("table", {}, make("caption", { text: title }), make("thead", {}, head), make("tbody", {}, ...rows));
      details.append(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, table));
    });
    return details;
  }

  // Edges of columns half way between readings.
  edges() {
    const spans = this.map.spans, edges = [spans[0][0]];
    for (let i = 1; i < spans.length; i++) edges.push((spans[i - 1][1] + spans[i][0]) / 2);
    const last = spans[spans.length - 1][1], width = spans.length > 1 ? last - edges[edges.length - 1] : 0;
    edges.push(last + Math.max(width, (view.whole[1] - view.whole[0]) / 100));
    return edges;
  }

  render() {
    const width = Math.max(this.plot.clientWidth, 220), narrow = width < 520, rows = this.map.layers.length;
    const tall = Math.max(Math.min(18, 420 / rows), 1.2), height = Math.ceil(tall * rows) + 40;
    const ratio = window.devicePixelRatio || 1, context = this.canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    this.canvas.style.height = `${height}px`;
    context.scale(ratio, ratio);
    context.font = '11px "DejaVu Sans", Verdana, sans-serif';
    const short = (text, most) => text.length > most ? "…" + text.slice(1 - most) : text;
    // What all names begin with tells nothing: in "model.layers.3.mlp" it is "model.layers.".
    const most = narrow ? 14 : 26, begin = this.map.layers.some((name) => name.length > most) ? commonBeginning(this.map.layers) : 0;
    const names = this.map.layers.map((name) => short(name.slice(begin), most));
    const left = Math.min(8 + names.reduce((most, name) => Math.max(most, context.measureText(name).width), 0), width / 3);
    const box = this.box = { left, right: width - 12, top: 4, bottom: 4 + tall * rows, tall }, [from, to] = view.range;
    const x = this.x = (step) => box.left + (step - from) / (to - from || 1) * (box.right - box.left), edges = this.edges();
    context.fillStyle = style.getPropertyValue("--line");
    context.fillRect(box.left, box.top, box.right - box.left, box.bottom - box.top);
    context.save();
    context.beginPath();
    context.rect(box.left, box.top, box.right - box.left, box.bottom - box.top);
    context.clip();
    this.map.values.forEach((row, r) => row.forEach((value, c) => {
      if (value === null) return;
      const a = x(edges[c]), b = x(edges[c + 1]), y = box.top + r * tall;
      if (b < box.left || a > box.right) return;
      if (value === "x") {
        context.strokeStyle = style.getPropertyValue("--axis");
        const middle = (Math.max(a, box.left) + b) / 2, half = Math.min(tall, b - a, 8) / 2.5;
        context.beginPath();
        context.moveTo(middle - half, y + tall / 2 - half); context.lineTo(middle + half, y + tall / 2 + half);
        context.moveTo(middle + half, y + tall / 2 - half); context.lineTo(middle - half, y + tall / 2 + half);
        context.stroke();
      } else {
        context.fillStyle = shade(this.group.scale, read(value));
        context.fillRect(a, y, b - a + 0.5, tall + 0.5);
      }
    }));
    context.restore();
    context.fillStyle = style.getPropertyValue("--axis");
    context.textBaseline = "middle";
    context.textAlign = "right";
    const stride = Math.max(Math.ceil(13 / tall), 1);
    names.forEach((name, r) => { if (r % stride === 0) context.fillText(name, box.left - 5, box.top + (r + 0.5) * tall, box.left - 6); });
    context.textAlign = "center";
    for (const step of ticks(from, to, narrow ? 3 : 6)) {
      const text = step.toLocaleString("en"), half = context.measureText(text).width / 2;
      context.fillText(text, Math.min(x(step), width - half - 1), box.bottom + 12);
    }
    context.textAlign = "right";
    context.fillText("optimizer step", box.right, box.bottom + 28);
    if (this.cell) {
      const [r, c] = this.cell, a = Math.max(x(edges[c]), box.left);
      context.strokeStyle = style.getPropertyValue("--ink");
      context.lineWidth = 1.5;
      context.strokeRect(a, box.top + r * tall, Math.max(Math.min(x(edges[c + 1]), box.right) - a, 2), tall);
    }
  }

  point(cell, speak) {
    this.cell = cell;
    this.tip.hidden = cell === null;
    this.render();
    if (cell === null) return;
    const [r, c] = cell, [first, last] = this.map.spans[c], value = this.map.values[r][c];
    const text = value === null ? "not measured" : value === "x" ? "failed (NaN)" : say(read(value));
    const lines = [this.map.layers[r], first === last ? `step ${count(first)}` : `steps ${count(first)} to ${count(last)}`, `${text} ${value === null || value === "x" ? "" : this.group.unit}`];
    this.tip.replaceChildren(...lines.map((line) => make("p", { text: line })));
    const at = this.x(first), width = this.plot.clientWidth;
    this.tip.style.left = at < width / 2 ? `${Math.max(at, this.box.left) + 14}px` : "auto";
    this.tip.style.right = at < width / 2 ? "auto" : `${width - at + 14}px`;
    if (speak) this.voice.textContent = lines.join(", ");
  }

  move(event) {
    const place = this.canvas.getBoundingClientRect(), x = event.clientX - place.left, y = event.clientY - place.top;
    const r = Math.floor((y - this.box.top) / this.box.tall), edges = this.edges();
    const step = view.range[0] + (x - this.box.left) / (this.box.right - this.box.left) * (view.range[1] - view.range[0]);
    const c = edges.findIndex((edge, i) => i < edges.length - 1 && step >= edge && step < edges[i + 1]);
    const inside = r >= 0 && r < this.map.layers.length && c >= 0 && x >= this.box.left && x <= this.box.right;
    const same = this.cell && inside && this.cell[0] === r && this.cell[1] === c;
    if (!same && (inside || this.cell)) this.point(inside ? [r, c] : null);
  }

  key(event) {
    const rows = this.map.layers.length - 1, columns = this.map.spans.length - 1, [r, c] = this.cell || [-1, columns];
    const moves = {
      ArrowDown: [Math.min(r + 1, rows), c], ArrowUp: [Math.max(r - 1, 0), c], ArrowLeft: [Math.max(r, 0), Math.max(c - 1, 0)],
      ArrowRight: [Math.max(r, 0), Math.min(c + 1, columns)], Home: [Math.max(r, 0), 0], End: [Math.max(r, 0), columns],
    };
    if (event.key === "Escape") { this.point(null); zoom(...view.whole); return; }
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.point(moves[event.key], true);
  }
}
