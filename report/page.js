// Draw the page of one run, or of several side by side, from the facts embedded in it. Text is inserted as text, never as HTML.
"use strict";
(() => {
const facts = JSON.parse(document.getElementById("facts").textContent);
const runs = facts.runs, several = runs.length > 1;
const SVG = "http://www.w3.org/2000/svg", COLOURS = 6, MOST_CHARTS = 9;
const MARKS = {running: "\u25cf", finished: "\u2713", interrupted: "\u2016", failed: "\u2715", killed: "\u2715", unknown: "?"};

// ---------------------------------------------------------------- words

const count = n => n == null ? "\u2013" : n.toLocaleString("en");
function number(v) {
  if (v == null) return "not finite";
  if (typeof v !== "number") return String(v);
  const size = Math.abs(v);
  return v && (size < 1e-3 || size >= 1e6) ? v.toExponential(4) : String(Number(v.toPrecision(6)));
}
function bytes(n) {
  for (const unit of ["B", "kB", "MB"]) { if (n < 1000) return `${unit === "B" ? n : n.toFixed(1)} ${unit}`; n /= 1000; }
  return `${n.toFixed(1)} GB`;
}
function duration(seconds) {
  const s = Math.max(0, Math.round(seconds)), two = n => String(n).padStart(2, "0");
  const days = Math.floor(s / 86400), hours = Math.floor(s / 3600) % 24, minutes = Math.floor(s / 60) % 60;
  if (days) return `${days} d ${hours} h`;
  return hours ? `${hours} h ${two(minutes)} min` : minutes ? `${minutes} min ${two(s % 60)} s` : `${s} s`;
}
function when(seconds) {
  if (seconds == null) return "\u2013";
  const d = new Date(seconds * 1000), two = n => String(n).padStart(2, "0");
  return `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())} ${two(d.getHours())}:${two(d.getMinutes())}`;
}
const shown = value => value === undefined ? "\u2013" : typeof value === "string" ? value : JSON.stringify(value);

// ---------------------------------------------------------------- elements

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter(child => child != null && child !== false));
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const badge = state => h("span", {class: `badge ${MARKS[state] ? state : "unknown"}`},
  h("span", {"aria-hidden": "true"}, `${MARKS[state] || "?"} `), String(state));
function swatch(colour, baseline) {
  const mark = h("span", {class: `swatch${baseline ? " baseline" : ""}`, "aria-hidden": "true"});
  mark.style.borderColor = `var(--c${colour % COLOURS})`;
  return mark;
}
let tables = 0;
function table(title, heads, rows) {  // heads: [text, class]; a cell: text, node, or [text, class]
  const id = `table${tables++}`, cell = (tag, c, own, more) => {
    const [content, extra] = Array.isArray(c) ? c : [c, ""];
    return h(tag, {class: [own, extra].filter(Boolean).join(" ") || null, ...more}, content == null ? "\u2013" : content);
  };
  return h("div", {class: "scroll", role: "region", tabindex: "0", "aria-labelledby": id}, h("table", {},
    h("caption", {class: "hidden", id}, title),
    h("thead", {}, h("tr", {}, heads.map(([text, kind]) => h("th", {scope: "col", class: kind}, text)))),
    h("tbody", {}, rows.map(row => h("tr", {class: row.kind || null}, (row.cells || row).map((c, i) =>
      cell(i ? "td" : "th", c, heads[i][1], i ? {} : {scope: "row"})))))));
}

// ---------------------------------------------------------------- the reader's choices, kept over a reload

const choice = {log: false, smoothing: 0, reload: false, theme: ""};
try { Object.assign(choice, JSON.parse(sessionStorage.getItem("perdure") || "{}")); } catch { /* a browser without */ }
function keep() { try { sessionStorage.setItem("perdure", JSON.stringify(choice)); } catch { /* then for now only */ } }
function setTheme(theme) {
  choice.theme = theme;
  if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme;
  keep();
}
setTheme(choice.theme);

// ---------------------------------------------------------------- curves

const charts = [];
let cursor = null;  // the iteration that all charts highlight

function nearest(xs, x) {  // index of the x in ascending xs that is closest
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle; else high = middle; }
  return high > 0 && Math.abs(xs[high] - x) <= Math.abs(xs[low] - x) ? high : Math.max(low, 0);
}
function smoothed(points, weight) {  // bias-corrected moving average, restarted after a value that is not finite
  let sum = 0, norm = 0;
  return {x: points.x, y: points.y.map(y => {
    if (y == null) { sum = norm = 0; return null; }
    sum = weight * sum + (1 - weight) * y; norm = weight * norm + 1 - weight;
    return sum / norm;
  })};
}
function ticks(low, high, log, most) {
  if (log) {
    const found = [], from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
    const steps = to - from <= 2 ? [1, 2, 5] : [1], skip = Math.max(1, Math.ceil((to - from) / most));
    for (let e = from; e <= to; e += skip) for (const m of steps) found.push(m * 10 ** e);
    const inside = found.filter(v => v >= low && v <= high);
    if (inside.length > 1) return inside;
  }
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(v => v >= rough * 0.999), found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}
function tickText(v) {
  const size = Math.abs(v);
  if (size >= 1e4 || (v && size < 1e-3)) {
    const [m, e] = v.toExponential(6).split("e");
    return size >= 1e4 && size < 1e9 ? (size >= 1e6 ? `${Number((v / 1e6).toPrecision(6))}M` : `${Number((v / 1e3).toPrecision(6))}k`)
      : `${Number(Number(m).toPrecision(4))}e${Number(e)}`;
  }
  return String(Number(v.toPrecision(6)));
}

class Chart {
  constructor(title, note, series, smooth) {
    this.title = title; this.series = series; this.smooth = smooth;
    this.xs = [...new Set(series.filter(one => !one.baseline).flatMap(one => one.data.x))].sort((a, b) => a - b);
    this.at = h("span", {class: "soft small nowrap"});
    this.values = series.map(() => h("b", {}));
    this.plot = h("div", {class: "plot", tabindex: "0", role: "slider", "aria-label": `${title}, curve cursor`,
      "aria-valuemin": this.xs[0], "aria-valuemax": this.xs[this.xs.length - 1],
      onpointermove: e => this.point(e), onpointerdown: e => this.point(e),
      onpointerleave: e => { if (e.pointerType !== "touch" && document.activeElement !== this.plot) setCursor(null); },
      onfocus: () => setCursor(cursor ?? this.xs[this.xs.length - 1]), onblur: () => setCursor(null),
      onkeydown: e => this.key(e)});
    const broken = series.reduce((sum, one) => sum + one.data.broken, 0);
    const thinned = series.find(one => one.data.mean);
    this.figure = h("figure", {class: "card chart", "data-chart": title},
      h("div", {class: "top"}, h("h3", {}, title, note && h("span", {class: "soft small"}, ` ${note}`)), this.at), this.plot,
      h("figcaption", {}, h("ul", {class: "legend"}, series.map((one, i) => h("li", {},
        swatch(one.colour, one.baseline), one.label && h("span", {}, one.label), this.values[i]))),
      thinned && h("span", {class: "soft small"}, `${count(thinned.data.rows)} rows; each stretch by its lowest and highest. `),
      broken > 0 && h("span", {class: "fault small"}, `${count(broken)} values are not finite.`)));
    charts.push(this);
  }
  point(event) {
    const box = this.plot.getBoundingClientRect();
    const x = this.x0 + (event.clientX - box.left - this.left) / this.innerWidth * (this.x1 - this.x0);
    setCursor(this.xs[nearest(this.xs, x)]);
  }
  key(event) {
    const last = this.xs.length - 1, at = nearest(this.xs, cursor ?? this.xs[last]), leap = Math.max(1, Math.round(last / 10));
    const to = {ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, Home: 0, End: last,
      PageUp: at + leap, PageDown: at - leap}[event.key];
    if (event.key === "Escape") this.plot.blur();
    if (to === undefined) return;
    event.preventDefault();
    setCursor(this.xs[Math.min(last, Math.max(0, to))]);
  }
  draw() {
    const width = this.plot.clientWidth, height = this.plot.clientHeight, log = choice.log;
    if (!width) return;
    const usable = v => v != null && (!log || v > 0);
    const ends = this.series.flatMap(one => [one.data.low, one.data.high]).filter(Boolean).map(end => end[1]);
    const all = log ? this.series.flatMap(one => one.data.y).filter(usable) : ends;
    let low = all.reduce((a, b) => Math.min(a, b), Infinity), high = all.reduce((a, b) => Math.max(a, b), -Infinity);
    this.svg = s("svg", {width, height, "aria-hidden": "true"});
    this.plot.replaceChildren(this.svg);
    if (low > high) {
      this.svg.append(s("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, "nothing to be drawn on this scale"));
      [low, high] = log ? [1, 10] : [0, 1];
    }
    if (low === high) { const pad = log ? 1.5 : Math.abs(low) * 0.1 || 1; [low, high] = log ? [low / pad, high * pad] : [low - pad, high + pad]; }
    const toScale = log ? Math.log10 : v => v, pad = (toScale(high) - toScale(low)) * 0.06;
    const bottom = toScale(low) - pad, top = toScale(high) + pad;
    const marks = ticks(log ? 10 ** bottom : bottom, log ? 10 ** top : top, log, 6), words = marks.map(tickText);
    this.left = 14 + 6.4 * Math.max(...words.map(w => w.length), 2);
    this.innerWidth = width - this.left - 14;
    const floor = height - 22;
    this.x0 = 0; this.x1 = Math.max(...this.xs, 1);
    this.toX = x => this.left + (x - this.x0) / (this.x1 - this.x0) * this.innerWidth;
    this.toY = y => floor - (toScale(y) - bottom) / (top - bottom) * (floor - 10);
    marks.forEach((v, i) => this.svg.append(s("path", {class: "axis", d: `M${this.left} ${this.toY(v).toFixed(1)}H${width - 14}`}),
      s("text", {x: this.left - 6, y: this.toY(v) + 4, "text-anchor": "end"}, words[i])));
    for (const v of ticks(0, this.x1, false, Math.max(2, Math.min(6, Math.floor(width / 70))))) {
      const word = tickText(v), x = this.toX(v);
      this.svg.append(s("text", {x, y: height - 5, "text-anchor": x + 3.2 * word.length > width ? "end" : "middle"}, word));
    }
    for (const one of this.series) if (!one.baseline) for (const mark of one.resumes) this.svg.append(
      s("path", {class: "resume", "data-resume": mark.iteration, d: `M${this.toX(mark.iteration).toFixed(1)} 6V${floor}`},
        s("title", {}, mark.text)));
    for (const one of this.series) {
      const kind = one.baseline ? " baseline" : "";
      if (choice.smoothing && this.smooth) {
        this.line(one, one.data, " raw", usable, false);
        this.line(one, smoothed(one.data.mean || one.data, choice.smoothing), kind, usable, true);
      } else this.line(one, one.data, kind, usable, true);
    }
    this.pointer = s("g", {});
    this.svg.append(this.pointer);
    this.showCursor();
  }
  line(one, points, kind, usable, bridged) {  // broken at missing values and at resumes
    const starts = one.baseline ? [] : one.resumes.map(mark => mark.iteration), dots = points.x.length <= 60;
    const colour = `var(--c${one.colour % COLOURS})`;
    let solid = "", over = "", before = null, next = 0, dot = "";
    points.x.forEach((x, i) => {
      if (!usable(points.y[i])) { before = null; return; }
      const here = `${this.toX(x).toFixed(1)} ${this.toY(points.y[i]).toFixed(1)}`;
      let resumed = false;
      while (next < starts.length && starts[next] < x) { next++; resumed = true; }
      if (before !== null && !resumed) solid += `L${here}`;
      else { if (before !== null) over += `M${before}L${here}`; solid += `M${here}`; }
      if (dots) dot += `M${here}h0`;
      before = here;
    });
    const path = (d, extra, more) => d && this.svg.append(s("path", {class: `curve${extra}`, d, stroke: colour, ...more}));
    path(solid, kind, {"data-series": one.label || this.title});
    if (bridged) path(over, " over");
    if (dots && !kind) path(dot, " dots");
  }
  showCursor() {
    const last = this.xs[this.xs.length - 1], at = cursor == null ? last : this.xs[nearest(this.xs, cursor)];
    this.at.textContent = `${cursor == null ? "newest, " : ""}iteration ${count(at)}`;
    const said = [];
    this.series.forEach((one, i) => {
      const j = nearest(one.data.x, at), y = one.data.y[j], off = one.data.x[j] !== at;
      this.values[i].textContent = number(y) + (off ? ` (at ${count(one.data.x[j])})` : "");
      this.values[i].title = shown(y);
      this.values[i].dataset.value = shown(y);
      this.values[i].dataset.iteration = one.data.x[j];
      said.push(`${one.label || this.title} ${this.values[i].textContent}`);
    });
    this.plot.setAttribute("aria-valuenow", at);
    this.plot.setAttribute("aria-valuetext", `iteration ${at}: ${said.join(", ")}`);
    if (!this.pointer) return;
    this.pointer.replaceChildren();
    if (cursor == null) return;
    const x = this.toX(at).toFixed(1);
    this.pointer.append(s("path", {class: "cursor", d: `M${x} 6V${this.plot.clientHeight - 22}`}));
    for (const one of this.series) {
      const j = nearest(one.data.x, at), y = one.data.y[j];
      if (y != null && (!choice.log || y > 0)) this.pointer.append(s("circle", {cx: this.toX(one.data.x[j]), cy: this.toY(y), r: 4,
        fill: `var(--c${one.colour % COLOURS})`, stroke: "var(--card)", "stroke-width": 1.5}));
    }
  }
}
function setCursor(iteration) {
  if (iteration === cursor) return;
  cursor = iteration;
  charts.forEach(chart => chart.showCursor());
}
const redraw = () => charts.forEach(chart => chart.draw());

function resumesOf(run) {
  return run.launches.slice(1).filter(launch => launch.iteration > 0).map((launch, i) => {
    const before = run.launches[i];
    return {iteration: launch.iteration, text: `resumed at iteration ${count(launch.iteration)}, ${when(launch.began)}; ` +
      `before: ${before.state || "unknown"} ${before.reason || ""}`};
  });
}
function groups() {  // title of a section -> charts, each with the curves of one name of every run and test set
  const found = {Validation: new Map(), Training: new Map()};
  runs.forEach((run, r) => {
    const resumes = resumesOf(run), sets = [...new Set(Object.keys(run.curves.test).map(c => c.split(".")[0]))];
    for (const part of ["test", "train"]) for (const [column, data] of Object.entries(run.curves[part])) {
      const dot = part === "test" ? column.indexOf(".") : -1, set = column.slice(0, Math.max(dot, 0));
      const bare = column.replace(`_${run.baseline}`, ""), baseline = bare !== column && bare in run.curves[part];
      const name = (baseline ? bare : column).slice(dot + 1);
      const section = part === "test" ? found.Validation : found.Training;
      const label = [several && run.name, sets.length > 1 && set, baseline && run.baseline].filter(Boolean).join(", ");
      if (!section.has(name)) section.set(name, []);
      section.get(name).push({label, data, baseline, resumes, colour: several ? r : Math.max(0, sets.indexOf(set))});
    }
  });
  const rate = found.Training.get("lr");
  if (rate) { found.Training.delete("lr"); found.Training.set("lr", rate); }  // last, below the losses
  return found;
}
function curveSection() {
  const parts = [], deciding = new Map(runs.filter(run => run.best).map(run => [run.best.column.split(".").pop(), run.best.mode]));
  for (const [title, map] of Object.entries(groups())) {
    if (!map.size) continue;
    const names = [...map.keys()], chart = name => {
      const mode = title === "Validation" && deciding.get(name);
      return new Chart(title === "Training" && name === "lr" ? "learning rate" : name,
        mode ? `\u2605 ${mode === "max" ? "highest" : "lowest"} is best` : "", map.get(name), title === "Training" && name !== "lr").figure;
    };
    const part = name => names.length > MOST_CHARTS && names.some(other => name.startsWith(`${other}_`));  // swd_plain_to_dusk
    const rest = names.filter(part);
    parts.push(h("h2", {}, title), h("div", {class: "grid"}, names.filter(name => !part(name)).map(chart)),
      rest.length > 0 && h("details", {class: "more", ontoggle: redraw}, h("summary", {}, `${rest.length} more, in parts`),
        h("div", {class: "grid"}, rest.map(chart))));
  }
  if (!parts.length) return h("p", {class: "soft"}, "No curve yet: no rows have been written.");
  const weight = h("output", {for: "smoothing"}, choice.smoothing.toFixed(2));
  const scale = (label, log) => h("label", {}, h("input", {type: "radio", name: "scale", value: label, checked: choice.log === log,
    onchange: () => { choice.log = log; keep(); redraw(); }}), label);
  return [h("div", {class: "tools", role: "group", "aria-label": "How curves are drawn"},
    h("div", {class: "pair", role: "radiogroup", "aria-label": "Scale"}, h("span", {class: "soft"}, "Scale"),
      scale("linear", false), scale("log", true)),
    h("label", {}, h("span", {class: "soft"}, "Smoothing of losses"), h("input", {type: "range", id: "smoothing", min: 0, max: 0.99, step: 0.01,
      value: choice.smoothing, oninput: e => { choice.smoothing = Number(e.target.value); weight.textContent = choice.smoothing.toFixed(2);
        keep(); redraw(); }}), weight),
    runs.some(run => resumesOf(run).length) && h("span", {class: "soft"}, "\u2506 resumed; the dotted piece joins two launches"),
    h("span", {class: "soft keys"}, "Values: point, or focus a chart and press ", h("kbd", {}, "\u2190"), " ", h("kbd", {}, "\u2192"))),
    parts];
}

// ---------------------------------------------------------------- one run

function headline(run) {
  const left = run.speed > 0 && run.total ? (run.total - run.iteration) / run.speed : null;
  const share = run.total ? Math.min(100, 100 * run.iteration / run.total) : 0;
  const spent = run.launches.reduce((sum, l, i) => {
    const end = l.ended ?? (i === run.launches.length - 1 ? run.written : null);
    return end && l.began ? sum + end - l.began : sum;
  }, 0);
  const [day, clock] = when(run.written ?? facts.written).split(" ");
  const bar = h("div", {}); bar.style.width = `${share}%`;
  const item = (name, value, more) => h("div", {}, h("dt", {}, name), h("dd", {}, value, more && h("small", {}, more)));
  const speed = run.speed > 0 ? (run.speed >= 1 ? `${run.speed.toFixed(2)} it/s` : `${(1 / run.speed).toFixed(2)} s/it`) : null;
  return h("section", {class: "card", "aria-label": "Progress"},
    h("div", {class: `progress ${run.state}`, role: "progressbar", "aria-label": "iterations done", "aria-valuemin": 0,
      "aria-valuemax": run.total, "aria-valuenow": run.iteration}, bar),
    h("dl", {class: "figures"},
      item("Iteration", `${count(run.iteration)} of ${count(run.total)}`, `${share.toFixed(share < 10 ? 1 : 0)} %`),
      run.best && item(`Best ${run.best.column}`, number(run.best.value), `iteration ${count(run.best.iteration)}`),
      run.state === "running" && left != null && item("Time left", duration(left), `about ${when(run.written + left)}`),
      spent > 0 && item("Time spent", duration(spent), run.launches.length > 1 ? `in ${run.launches.length} launches` : null),
      speed && item("Speed", speed, "with validations and saves"),
      item("Written", clock, [day, run.host && `on ${run.host}`].filter(Boolean).join(" "))),
    run.command && h("div", {class: "command"}, h("div", {}, h("div", {class: "soft small"},
      run.state === "finished" ? "The command, to continue with a higher total_iter" : "To resume after a stop, in ",
      run.state !== "finished" && h("code", {}, run.cwd)), h("code", {id: "command"}, run.command)), copyButton()));
}
function copyButton() {
  const said = h("span", {class: "hidden", role: "status"});
  return h("button", {type: "button", onclick: async e => {
    const node = document.getElementById("command");
    getSelection().selectAllChildren(node);
    try { await navigator.clipboard.writeText(node.textContent); e.target.textContent = said.textContent = "Copied"; }
    catch { said.textContent = "Selected"; }
  }}, "Copy", said);
}
function notices(run) {
  const silent = run.state === "running" && run.written && Date.now() / 1000 - run.written > run.patience;
  const tell = (kind, title, ...text) => h("div", {class: `card notice ${kind}`, role: "status"},
    h("strong", {}, title), text.map(t => h("p", {}, t)));
  return [
    silent && tell("interrupted", "No news for a while", `This page was last updated at ${when(run.written)}, when the run was in progress ` +
      `(process ${run.pid} on ${run.host}). If that is long ago, the run died or hangs: "python -m report ${run.folder}" there shows which.`),
    run.state === "failed" && tell("failed", "The run failed", run.reason),
    run.state === "killed" && tell("killed", "The run was killed", `${run.reason}, at iteration ${count(run.iteration)} or later. ` +
      "Checkpoints are intact; the command below resumes from the newest."),
    run.state === "interrupted" && tell("interrupted", "The run was interrupted", `${run.reason || ""}, after iteration ${count(run.iteration)}; ` +
      "the command below resumes it, bit for bit as if it had never stopped."),
    run.checkpoints.some(c => c.fault) && tell("failed", "A checkpoint is damaged",
      "See the table of checkpoints; a resume falls back to the newest intact one."),
  ];
}
function pictureSection(run) {
  if (!run.pictures.length) return null;
  const place = h("div", {class: "pictures"}), out = h("output", {for: "slider"}), last = run.pictures.length - 1;
  const slider = h("input", {type: "range", id: "slider", min: 0, max: last, step: 1, value: last});
  const show = () => {
    const one = run.pictures[Number(slider.value)], text = one.when;
    out.textContent = text;
    slider.setAttribute("aria-valuetext", text);
    place.replaceChildren(...one.shown.map(picture => {
      const image = h("img", {src: picture.source, alt: `${picture.name} at ${text}`, onload: () => {
        const times = image.naturalWidth < 240 ? 3 : image.naturalWidth < 480 ? 2 : 1;  // small crops are hard to see
        image.style.width = `${image.naturalWidth * times}px`;
        image.classList.toggle("enlarged", times > 1);
      }});
      return h("figure", {}, image, h("figcaption", {}, picture.name));
    }), one.more > 0 ? h("p", {class: "soft small"}, `${one.more} more in the run's images folder`) : "");
  };
  slider.addEventListener("input", show);
  show();
  return [h("h2", {}, "Pictures"), h("div", {class: "card"}, h("div", {class: "slide"},
    h("label", {for: "slider", class: "soft small"}, "Validation at"), slider, out), place)];
}
function checkpointSection(run) {
  const metric = run.best ? run.best.column.split(".").pop() : "metric";
  return [h("h2", {}, "Checkpoints"), run.checkpoints.length ? table("Checkpoints, newest first",
    [["Iteration", "number"], ["Epochs", "number"], [metric, "number"], ["Size", "number"], ["Saved", "nowrap"], ["Verified", ""],
      ["Best", "nowrap"], ["Kept as", "nowrap"], ["File", "nowrap"]],
    run.checkpoints.map(c => [count(c.iteration), count(c.epoch), c.metric == null ? null : number(c.metric), bytes(c.size),
      c.saved ? c.saved.replace("T", " ").slice(0, 16) : null,
      c.fault ? [c.fault, "fault"] : [c.checked ? `\u2713 ${when(c.checked)}` : c.committed ? "committed, not verified since" : "no record", "nowrap"],
      c.best ? "\u2605 best" : "", c.kept, h("code", {}, c.file)])) : h("p", {class: "soft"}, "None yet."),
    run.after_save && h("p", {class: "soft small"}, `checkpoint.after_save for ${count(run.after_save.iteration)}: ` +
      (run.after_save.code ? `failed (${run.after_save.code})` : `done in ${number(run.after_save.seconds)} s`)),
    run.archives.length > 0 && h("p", {class: "soft small"}, `Archived beside it: ${run.archives.join(", ")}`)];
}
function launchSection(run) {
  if (!run.launches.length) return null;
  return [h("h2", {}, "Launches"), table("Launches of the run",
    [["Began", "nowrap"], ["From iteration", "number"], ["To", "number"], ["Ended", "nowrap"], ["How", "value"], ["Where", "nowrap"]],
    run.launches.map((l, i) => {
      const last = i === run.launches.length - 1, until = count(l.until ?? (last ? run.iteration : null));
      return [when(l.began), count(l.iteration), l.state === "killed" ? `${until} or later` : until, when(l.ended),
        [l.state || (last ? run.state : "unknown"), l.reason].filter(Boolean).join(" "),
        l.host ? `${l.host}, process ${l.pid}` : null];
    }))];
}
function optionSection(run) {
  if (!run.options.length) return null;
  const kinds = run.options.map(([, , origin]) => origin ? (origin.startsWith("--") ? 2 : 1) : 0), known = kinds.some(Boolean);
  const holder = h("div", {}), words = ["default", "file", "command line"];
  const pick = h("select", {id: "which"}, [["all", 0], ["set in a file or on the command line", 1], ["set on the command line", 2]].map(
    ([text, least]) => h("option", {value: least}, `${text} (${kinds.filter(k => k >= least).length})`)));
  const search = h("input", {type: "search", id: "search", placeholder: "e.g. lr"});
  const show = () => holder.replaceChildren(table("Options", [["Key", "key"], ["Value", "value"], ["Set by", "nowrap"]],
    run.options.map(([key, value, origin], i) => ({key, least: kinds[i], kind: kinds[i] === 2 ? "said" : null,
      cells: [h("code", {}, key), h("code", {}, shown(value)), known ? origin || words[0] : null]}))
      .sort((a, b) => (b.least === 2) - (a.least === 2))
      .filter(row => row.least >= Number(pick.value) && row.key.toLowerCase().includes(search.value.trim().toLowerCase()))));
  pick.addEventListener("change", show);
  search.addEventListener("input", show);
  pick.value = known ? "1" : "0";
  show();
  return [h("h2", {}, "Options"), h("div", {class: "tools plain"}, known && h("label", {}, h("span", {class: "soft"}, "Show"), pick),
    h("label", {}, h("span", {class: "soft"}, "Find"), search)), holder];
}
function machineSection(run) {
  const entries = Object.entries(run.machine || {});
  return entries.length > 0 && [h("h2", {}, "Machine and versions"), table("Machine and versions", [["Item", ""], ["Value", "value"]],
    entries.map(([key, value]) => [key, value == null ? "none" : shown(value)]))];
}
function logSection(run) {
  return run.log.length > 0 && h("details", {}, h("summary", {}, "End of the log"),
    h("pre", {class: "card", tabindex: "0", role: "region", "aria-label": "End of the log"}, run.log.join("\n")));
}
function onePage(run) {
  return [notices(run), h("p", {}), headline(run), curveSection(), pictureSection(run), checkpointSection(run), launchSection(run), optionSection(run),
    machineSection(run), logSection(run)];
}

// ---------------------------------------------------------------- several runs

function manyPage() {
  const name = run => h("span", {}, swatch(runs.indexOf(run)), " ", run.name);
  const metrics = [...new Set(runs.flatMap(run => run.best ? Object.keys(run.best.metrics) : []))].filter(m => m !== "epoch");
  const decides = runs.map(run => run.best).find(Boolean);
  const sameRule = decides && runs.every(run => !run.best || (run.best.column === decides.column && run.best.mode === decides.mode));
  const winner = sameRule ? runs.filter(run => run.best).map(run => run.best.value)
    .reduce((a, b) => decides.mode === "max" ? Math.max(a, b) : Math.min(a, b)) : null;
  const keys = [...new Set(runs.flatMap(run => run.options.map(o => o[0])))];
  const values = runs.map(run => new Map(run.options.map(([key, value]) => [key, value])));
  const differing = keys.filter(key => new Set(values.map(map => map.has(key) ? JSON.stringify(map.get(key)) : "")).size > 1);
  return [h("p", {}), table("The runs", [["Run", "key"], ["State", "nowrap"], ["Iterations", "number"],
    ["Decided by", "nowrap"], ["Best", "number"], ["At iteration", "number"], ["Time spent", "number"]],
    runs.map(run => [name(run), badge(run.state), `${count(run.iteration)} of ${count(run.total)}`, run.best && run.best.column,
      run.best ? [number(run.best.value), run.best.value === winner ? "best-cell" : ""] : null, run.best && count(run.best.iteration),
      duration(run.launches.reduce((sum, l) => sum + ((l.ended ?? run.written ?? l.began) - l.began || 0), 0))])),
    metrics.length > 0 && [h("h2", {}, "Metrics of each run's best checkpoint"), table("Metrics of each run's best checkpoint",
      [["Metric", "key"], ...runs.map(run => [name(run), "number"])],
      metrics.map(metric => [metric, ...runs.map(run => run.best && metric in run.best.metrics
        ? [number(run.best.metrics[metric]), sameRule && metric === decides.column && run.best.value === winner ? "best-cell" : ""] : null)]))],
    curveSection(),
    h("h2", {}, "Options that differ"), differing.length ? table("Options that differ", [["Key", "key"], ...runs.map(run => [name(run), "value"])],
      differing.map(key => [h("code", {}, key), ...values.map(map => h("code", {}, shown(map.get(key))))])) : h("p", {class: "soft"}, "None."),
    h("p", {class: "soft small"}, "Pictures, checkpoints and logs are on each run's own page: python -m report RUN")];
}

// ---------------------------------------------------------------- the page

const plain = run => run.task || run.folder.split("/").filter(Boolean).pop() || run.folder;
for (const run of runs) run.name = runs.filter(other => plain(other) === plain(run)).length > 1 ? run.folder : plain(run);
const title = several ? `Comparison of ${runs.length} runs` : runs[0].name;
document.title = several ? title : `${title}: ${runs[0].state}, ${count(runs[0].iteration)} of ${count(runs[0].total)}`;
const themes = {"": "\u25d0 system", light: "\u25cb light", dark: "\u25cf dark"};
const themeButton = h("button", {type: "button", title: "Colours: as the system, light or dark", onclick: () => {
  const order = Object.keys(themes);
  setTheme(order[(order.indexOf(choice.theme) + 1) % order.length]);
  themeButton.textContent = themes[choice.theme];
}}, themes[choice.theme]);
const live = runs.some(run => run.state === "running");
const reloads = h("input", {type: "checkbox", checked: choice.reload, onchange: () => { choice.reload = reloads.checked; keep(); }});
if (live) setInterval(() => { if (reloads.checked) location.reload(); }, 30000);
document.body.append(
  h("header", {}, h("h1", {}, title), !several && badge(runs[0].state), h("span", {class: "spring"}),
    live && h("label", {class: "small"}, reloads, " Reload every 30 s"), themeButton),
  h("main", {}, several ? manyPage() : onePage(runs[0])),
  h("footer", {}, `Written ${when(facts.written)} by Perdure. This file holds everything.`));
new ResizeObserver(redraw).observe(document.querySelector("main"));
redraw();
})();
