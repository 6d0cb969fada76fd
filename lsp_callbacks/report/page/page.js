// The page: figures into their places, light and dark, and loading again while a run goes on.

function remember(name, value) {
  try {  // a page opened from a file may have no storage
    if (value === undefined) return window.sessionStorage.getItem(name);
    window.sessionStorage.setItem(name, value);
  } catch (error) { /* nothing is remembered then */ }
  return null;
}

function themeButton() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)"), button = make("button", { type: "button" });
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", theme === "dark" ? "Use light colours" : "Use dark colours");
    document.dispatchEvent(new Event("theme"));
  };
  show(remember("theme") || (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => { if (!remember("theme")) show(dark.matches ? "dark" : "light"); });
  button.addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    remember("theme", theme);
    show(theme);
  });
  return button;
}

function refreshButton(seconds) {
  const button = make("button", { type: "button" });
  let timer = null;
  const show = (on) => {
    clearTimeout(timer);
    if (on) timer = setTimeout(() => window.location.reload(), 1000 * seconds);
    button.textContent = on ? `Loads again every ${seconds} s: pause` : "Paused: go on";
    button.dataset.on = on ? "yes" : "";
  };
  show(remember("paused") !== "yes");
  button.addEventListener("click", () => {
    remember("paused", button.dataset.on ? "yes" : "no");
    show(!button.dataset.on);
  });
  return button;
}

function chooser(host, quantities) {
  if (!quantities.length) return;
  const select = make("select", { id: "number" }, ...quantities.map((each, i) => make("option", { value: i, text: each.title })));
  const place = make("div", { class: "figure" });
  host.append(make("label", { for: "number", text: "Draw: " }), select, place);
  const show = () => {
    if (host.listener) view.listeners = view.listeners.filter((listener) => listener !== host.listener);
    new LineFigure(place, { ...quantities[select.value], marks: [] });
    host.listener = view.listeners[view.listeners.length - 1];
  };
  const moves = (each) => each.series.some((s) => new Set(s.y).size > 1);
  select.value = String(Math.max(quantities.findIndex(moves), 0));
  select.addEventListener("change", show);
  show();
}

function begin() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tools = document.getElementById("tools");
  tools.append(themeButton(), ...(data.refresh ? [refreshButton(data.refresh)] : []));
  const steps = [...data.figures, ...data.quantities].flatMap((figure) => figure.series.flatMap((s) => [s.x[0], s.x[s.x.length - 1]]))
    .concat(data.maps.flatMap((group) => group.maps.flatMap((map) => map.spans.flat()))).filter(Number.isFinite);
  const first = steps.reduce((a, b) => Math.min(a, b), 0), last = steps.reduce((a, b) => Math.max(a, b), 1), margin = 0.01 * (last - first);
  view.whole = [first - margin, last + margin];
  view.range = [...view.whole];
  for (const host of document.querySelectorAll("[data-figure]")) {
    new LineFigure(host, data.figures.find((figure) => figure.id === host.dataset.figure));
  }
  for (const host of document.querySelectorAll("[data-map]")) {
    const group = data.maps[Number(host.dataset.map)], row = make("div", { class: "row" });
    const unit = group.unit ? `, ${group.unit}` : "";
    host.append(make("h3", { text: group.kind + unit }), ...(group.about ? [make("p", { class: "note", text: group.about })] : []), scaleBar(group.scale), row);
    for (const map of group.maps) new HeatMap(row, group, map, data.runs.length > 1 ? data.runs[map.run] : "");
  }
  chooser(document.getElementById("chooser"), data.quantities);
}

begin();
