"use strict";
// Draws the data that vmm.trace.views.page puts into the page. Times are microseconds.
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("page");
const traces = data.traces;
const colours = ["var(--first)", "var(--second)"];
const decisionColours = { allow: "allow", deny: "refused", partial: "partial", defer: "deferred",
  convert: "first", kill: "refused", invalid: "dim", "device stopped": "refused" };
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "rect", "line", "text", "g", "title", "circle"].includes(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function short(number) { return String(+number.toPrecision(number >= 100 ? 3 : 2)); }
function bytes(value) {
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (value < 1024 || unit === "TiB") return `${+value.toPrecision(4)} ${unit}`;
    value /= 1024;
  }
}
function time(us) {
  if (us < 1) return `${short(us * 1000)} ns`;
  if (us < 1000) return `${short(us)} µs`;
  return us < 1e6 ? `${+(us / 1000).toPrecision(4)} ms` : `${+(us / 1e6).toPrecision(4)} s`;
}
function hex(address) { return "0x" + address.toString(16); }
function count(value) { return value.toLocaleString("en"); }
function name(trace) { return trace.summary.path.replace(/\/+$/, "").split("/").pop(); }
function card(title, note, ...children) {
  const made = make("section", { class: "card" }, make("h2", {}, title));
  made.append(make("p", { class: "note" }, note), ...children);
  return made;
}
function legend(entries) {
  return make("div", { class: "legend" }, ...entries.map(([text, colour, opacity = 1]) =>
    make("span", {}, make("i", { style: `background:${colour};opacity:${opacity}` }), text)));
}
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5, 10].find((m) => m * power >= raw) || 10), found = [];
  for (let at = Math.ceil(low / step) * step; at <= high * 1.0001; at += step) found.push(at);
  return found;
}
const tip = document.body.appendChild(make("div", { id: "tip" }));
function showTip(event, text) {
  tip.style.display = text ? "block" : "none";
  tip.textContent = text;
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${event.clientY + 16}px`;
}

// ---- page states: address over time -----------------------------------------------------------
// The address axis is a list of pieces {start, size, weight}: all of RAM with weight = size, or
// only what changed, where small areas get more room than they take in memory.
function pieces(trace, changedOnly) {
  const all = trace.ram.map(([start, size]) => ({ start, size, weight: size }));
  if (!changedOnly) return all;
  const block = trace.blockBytes, areas = [];
  const [, , first, blocks] = trace.rects, ends = trace.rects[1], begins = trace.rects[0];
  const order = first.map((_, i) => i)
    .filter((i) => begins[i] > 0 || ends[i] < trace.until).sort((a, b) => first[a] - first[b]);
  for (const i of order) {
    const start = first[i] * block, end = start + blocks[i] * block, last = areas[areas.length - 1];
    if (last && start - (last.start + last.size) <= 16 * block) {
      last.size = Math.max(last.size, end - last.start);
    } else areas.push({ start, size: end - start });
  }
  if (!areas.length) return all;
  for (const area of areas) area.weight = Math.sqrt(area.size);
  return areas;
}
// All timelines show the same stretch of time: two runs can be read one below the other.
const longest = Math.max(...traces.map((trace) => trace.until), 1);
let shown = [0, longest];
function show(from, to) {
  shown = [Math.max(from, 0), Math.min(to, longest)];
  timelines.forEach((timeline) => timeline.draw());
}
class Timeline {
  constructor(trace) {
    this.trace = trace;
    this.tracks = trace.decided.words;
    this.canvas = make("canvas", { height: 420, role: "img", "aria-label": "page states over time" });
    this.changedOnly = false;
    this.left = 92; this.right = 18; this.track = 15;
    this.bottom = 36 + this.track * this.tracks.length + (this.tracks.length ? 8 : 0);
    this.height = 384 + this.bottom;
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", (event) => showTip(event, ""));
    this.canvas.addEventListener("pointerdown", (event) => { this.drag = event.offsetX; });
    this.canvas.addEventListener("pointerup", (event) => this.zoom(event));
    this.canvas.addEventListener("dblclick", () => show(0, longest));
  }
  layOut() {
    const list = pieces(this.trace, this.changedOnly);
    const gap = list.length > 1 ? Math.min(4, 120 / list.length) : 0;
    const room = this.height - this.bottom - gap * (list.length - 1);
    const total = list.reduce((sum, piece) => sum + piece.weight, 0) || 1;
    let y = this.height - this.bottom;
    for (const piece of list) {
      piece.height = Math.max(room * piece.weight / total, 0.5);
      piece.top = (y -= piece.height);
      y -= gap;
    }
    this.pieces = list;
  }
  x(us) {
    const [from, to] = shown;
    return this.left + (us - from) / (to - from) * (this.width - this.left - this.right);
  }
  draw() {
    const scale = this.scale = devicePixelRatio || 1, style = getComputedStyle(document.documentElement);
    this.width = this.canvas.clientWidth || 1180;
    this.canvas.width = this.width * scale;
    this.canvas.height = this.height * scale;
    this.canvas.style.height = `${this.height}px`;
    const draw = this.context = this.canvas.getContext("2d");
    draw.scale(scale, scale);
    draw.clearRect(0, 0, this.width, this.height);
    const colour = (word) => style.getPropertyValue(`--${word}`).trim();
    this.layOut();
    draw.save();
    draw.beginPath();
    draw.rect(this.left, 0, this.width - this.left - this.right, this.height);
    draw.clip();
    const { rects, blockBytes: block, converting } = this.trace;
    // The private ground first, so that single shared pages are not painted over.
    let drawn = 0;
    for (const state of ["private", "shared", "deferred"]) {
      const number = data.states.indexOf(state);
      draw.fillStyle = colour(state);
      for (let i = 0; i < rects[0].length; i++) {
        if (rects[4][i] !== number) continue;
        drawn += this.fill(rects[0][i], rects[1][i], rects[2][i] * block, rects[3][i] * block);
      }
    }
    draw.fillStyle = colour("converting");
    for (let i = 0; i < converting[0].length; i++) {
      drawn += this.fill(converting[0][i], converting[1][i], converting[2][i], converting[3][i]);
    }
    const decided = this.decisions(draw, colour);
    this.bounceBuffer(draw, colour("mark"));
    if (this.trace.until < shown[1]) {
      draw.fillStyle = colour("dim");
      draw.fillRect(this.x(this.trace.until), 0, 1, this.height - 30);
      draw.font = "11px system-ui, sans-serif";
      const end = this.x(this.trace.until), fits = end + 90 < this.width - this.right;
      draw.textAlign = fits ? "left" : "right";
      draw.fillText("end of the run", end + (fits ? 5 : -5), 12);
    }
    draw.restore();
    this.axes(draw, colour("dim"), colour("line"));
    Object.assign(this.canvas.dataset, { drawn, decided, tracks: this.tracks.join(","), window: shown.join(",") });
  }
  trackTop(number) { return this.height - this.bottom + 8 + number * this.track; }
  // A track for each thing that was decided, what was not carried out in full height.
  decisions(draw, colour) {
    const { words, rows } = this.trace.decided;
    let drawn = 0;
    for (let i = 0; i < rows[0].length; i++) {
      if (rows[0][i] < shown[0] || rows[0][i] > shown[1]) continue;
      const word = words[rows[3][i]];
      draw.fillStyle = colour(decisionColours[word] || "dim");
      const low = word === "allow" && !rows[5][i] ? 4 : 1;
      draw.fillRect(this.x(rows[0][i]) - 0.75, this.trackTop(rows[3][i]) + low, 1.5, this.track - 1 - low);
      drawn++;
    }
    return drawn;
  }
  // What was decided at a point of a track, the nearest within some pixels.
  decidedAt(event) {
    const { words, names, rows } = this.trace.decided, number = Math.floor((event.offsetY - this.trackTop(0)) / this.track);
    if (number < 0 || number >= words.length) return "";
    let best = -1, near = 6;
    for (let i = 0; i < rows[0].length; i++) {
      const away = Math.abs(this.x(rows[0][i]) - event.offsetX);
      if (rows[3][i] === number && away < near) [best, near] = [i, away];
    }
    if (best < 0) return "";
    const [at, gpa, size, word, what, answer, by] = rows.map((column) => column[best]);
    const who = names[by] ? ` by ${names[by]}` : "", got = names[answer] ? `, answer ${names[answer]}` : "";
    const where = words[word] === "device stopped" ? names[what] : `${names[what]} ${hex(gpa)} + ${bytes(size)}`;
    return `${time(at)}: ${words[word]}${who}${got}\n${where}`;
  }
  fill(from, to, gpa, size) {
    if (to < shown[0] || from > shown[1]) return 0;
    // On whole pixels: half covered ones would draw seams between neighbours.
    const snap = (at) => Math.round(at * this.scale) / this.scale;
    const x = snap(this.x(from)), width = Math.max(snap(this.x(to)) - x, 1);
    for (const piece of this.pieces) {
      const low = Math.max(gpa, piece.start), high = Math.min(gpa + size, piece.start + piece.size);
      if (low >= high) continue;
      const y = (at) => snap(piece.top + piece.height * (1 - (at - piece.start) / piece.size));
      const height = Math.max(y(low) - y(high), 1);
      this.context.fillRect(x, y(low) - height, width, height);
    }
    return 1;
  }
  bounceBuffer(draw, colour) {
    const found = this.trace.summary.bounce_buffer;
    if (!found) return;
    for (const piece of this.pieces) {
      const low = Math.max(found.gpa, piece.start);
      const high = Math.min(found.gpa + found.bytes, piece.start + piece.size);
      if (low >= high) continue;
      const y = (at) => piece.top + piece.height * (1 - (at - piece.start) / piece.size);
      draw.strokeStyle = draw.fillStyle = colour;
      draw.setLineDash([5, 3]);
      draw.strokeRect(this.left + 1, y(high), this.width - this.left - this.right - 2, y(low) - y(high));
      draw.setLineDash([]);
      draw.font = "600 11.5px system-ui, sans-serif";
      draw.textAlign = "left";
      const label = y(high) > 18 ? y(high) - 5 : y(low) + 13;
      draw.fillText(`swiotlb, inferred: ${bytes(found.bytes)} at ${hex(found.gpa)}`, this.left + 8, label);
    }
  }
  axes(draw, ink, line) {
    draw.fillStyle = ink;
    draw.strokeStyle = line;
    draw.font = "11px system-ui, sans-serif";
    draw.textAlign = "center";
    for (const at of ticks(...shown, 8)) draw.fillText(time(at), this.x(at), this.height - 12);
    draw.textAlign = "right";
    this.tracks.forEach((word, i) => draw.fillText(word, this.left - 7, this.trackTop(i) + 11));
    let above = Infinity;
    for (const piece of this.pieces) {
      draw.strokeRect(this.left, piece.top, this.width - this.left - this.right, piece.height);
      const steps = this.changedOnly ? [piece.start] : [0, 0.25, 0.5, 0.75, 1].map((f) => piece.start + f * piece.size);
      for (const at of steps) {
        const y = piece.top + piece.height * (1 - (at - piece.start) / piece.size);
        if (above - y < 13) continue;
        draw.fillText(hex(at), this.left - 7, Math.max(y + 1, 10));
        above = y;
      }
    }
  }
  at(event) {
    const [from, to] = shown, piece = this.pieces.find((p) =>
      event.offsetY >= p.top && event.offsetY <= p.top + p.height);
    const us = from + (event.offsetX - this.left) / (this.width - this.left - this.right) * (to - from);
    const gpa = piece && piece.start + (1 - (event.offsetY - piece.top) / piece.height) * piece.size;
    return [us, gpa];
  }
  hover(event) {
    const [us, gpa] = this.at(event);
    if (gpa === undefined || us < shown[0] || us > shown[1]) return showTip(event, this.decidedAt(event));
    const { rects, blockBytes: block } = this.trace;
    let found = "";
    for (let i = 0; i < rects[0].length; i++) {
      const start = rects[2][i] * block, size = rects[3][i] * block;
      if (rects[0][i] <= us && us < rects[1][i] && start <= gpa && gpa < start + size) {
        found = `${data.states[rects[4][i]]} ${time(rects[0][i])} to ${time(rects[1][i])}\n` +
          `${hex(start)} + ${bytes(size)}`;
      }
    }
    showTip(event, `${time(us)}, ${hex(Math.floor(gpa / 4096) * 4096)}\n${found}`.trim());
  }
  zoom(event) {
    const [from, to] = [this.drag, event.offsetX].sort((a, b) => a - b);
    if (this.drag === undefined || to - from < 6) return;
    const at = (x) => this.at({ offsetX: x, offsetY: -1 })[0];
    show(at(from), at(to));
  }
  card() {
    const button = (text, value) => {
      const made = make("button", { "aria-pressed": this.changedOnly === value }, text);
      made.addEventListener("click", () => {
        this.changedOnly = value;
        for (const each of made.parentNode.querySelectorAll("button")) each.setAttribute("aria-pressed", each === made);
        this.draw();
      });
      return made;
    };
    const key = legend([["private", "var(--private)"], ["shared", "var(--shared)"],
      ["deferred", "var(--deferred)"], ["converting", "var(--converting)"]]);
    key.append(button("all of RAM", false), button("what changed", true));
    const coarse = this.trace.blockBytes > 4096
      ? ` Drawn in blocks of ${bytes(this.trace.blockBytes)}: there are more changes than fit.` : "";
    const made = card(`Page states: address over time${traces.length > 1 ? `, ${name(this.trace)}` : ""}`,
      `Drag to zoom in time, double-click to zoom out${traces.length > 1 ? "; both runs have the same time scale" : ""}. ` +
      `Below: what was decided of each request.${coarse}`, key, make("div", { class: "chart" }, this.canvas));
    made.dataset.chart = "timeline";
    return made;
  }
}

// ---- charts in SVG ----------------------------------------------------------------------------
const W = 560, H = 230, L = 64, R = 12, T = 14, B = 30;
function frame(xTicks, yTicks, x, y, xText, yText) {
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  for (const at of yTicks) {
    svg.append(make("line", { class: "axis", x1: L, x2: W - R, y1: y(at), y2: y(at) }),
      make("text", { x: L - 7, y: y(at) + 4, "text-anchor": "end" }, yText(at)));
  }
  for (const at of xTicks) svg.append(make("text", { x: x(at), y: H - 10, "text-anchor": "middle" }, xText(at)));
  return svg;
}
function linear(low, high, from, to) { return (v) => from + (v - low) / (high - low || 1) * (to - from); }
function byteTicks(most) {
  const step = 2 ** Math.ceil(Math.log2(most / 4 || 1));
  return [0, 1, 2, 3, 4].map((n) => n * step).filter((at) => at <= most * 1.001);
}
const who = () => traces.length > 1 ? legend(traces.map((trace, i) => [name(trace), colours[i]])) : "";

function sharedChart() {
  const told = traces.filter((trace) => trace.summary.memory.told);
  if (!told.length) {
    const made = card("Bytes shared over time", "The guest shares pages without telling the host.");
    made.dataset.chart = "shared";
    return made;
  }
  const most = Math.max(...told.flatMap((trace) => trace.shared[1]), 1) * 1.06;
  const x = linear(0, longest, L, W - R), y = linear(0, most, H - B, T);
  const svg = frame(ticks(0, longest, 6), byteTicks(most), x, y, time, bytes);
  traces.forEach((trace, i) => {
    if (!trace.summary.memory.told) return;
    const [times, values] = trace.shared;
    let path = `M${x(0)},${y(values[0])}`;
    times.forEach((at, n) => { path += `H${x(at).toFixed(1)}V${y(values[n]).toFixed(1)}`; });
    path += `H${x(trace.until).toFixed(1)}`;
    const colour = traces.length > 1 ? colours[i] : "var(--shared)";
    svg.append(make("path", { d: `${path}V${y(0)}H${x(0)}Z`, fill: colour, opacity: 0.14 }),
      make("path", { d: path, fill: "none", stroke: colour, "stroke-width": 1.8 }));
    const { shared_bytes_peak: peak, shared_peak_s: at } = trace.summary.memory;
    const end = x(at * 1e6) > W / 2 ? "end" : "start";
    svg.append(make("circle", { cx: x(at * 1e6), cy: y(peak), r: 3, fill: colour }),
      make("text", { x: x(at * 1e6) + (end === "end" ? -6 : 6), y: y(peak) - 5 + 12 * i, "text-anchor": end }, `peak ${bytes(peak)}`));
  });
  const made = card("Bytes shared over time", "What the host may read and write.", who(), svg);
  made.dataset.chart = "shared";
  return made;
}
function latencyChart() {
  const series = traces.flatMap((trace, i) => ["share", "unshare"].map((kind, k) => ({
    kind: traces.length > 1 ? `${name(trace)}: ${kind}` : kind, edges: trace.latency.edges, counts: trace.latency[kind],
    colour: traces.length > 1 ? colours[i] : ["var(--shared)", "var(--first)"][k], opacity: traces.length > 1 && k ? 0.45 : 0.9,
  }))).filter((each) => each.counts.length);
  const made = card("Conversion latency", "Requests that were carried out, from the guest's call to its answer.");
  made.dataset.chart = "latency";
  if (!series.length) { made.append(make("p", {}, "No conversions.")); return made; }
  const low = Math.log10(Math.min(...series.map((s) => s.edges[0]))), high = Math.log10(Math.max(...series.map((s) => s.edges.at(-1))));
  const most = Math.max(...series.flatMap((s) => s.counts));
  const x = linear(low, high, L, W - R), y = linear(0, most * 1.06, H - B, T), decades = [];
  for (let d = Math.ceil(low); d <= high; d++) decades.push(d);
  const svg = frame(decades.length > 1 ? decades : [low, high], ticks(0, most, 4).filter(Number.isInteger), x, y, (d) => time(10 ** d / 1000), count);
  series.forEach((s, n) => {
    s.counts.forEach((value, i) => {
      if (!value) return;
      const from = x(Math.log10(s.edges[i])), width = (x(Math.log10(s.edges[i + 1])) - from) / series.length;
      const bar = make("rect", { x: from + n * width + 0.5, y: y(value), width: Math.max(width - 1, 1), height: y(0) - y(value), fill: s.colour, opacity: s.opacity, rx: 1 });
      bar.append(make("title", {}, `${count(value)} x ${s.kind}, ${time(s.edges[i] / 1000)} to ${time(s.edges[i + 1] / 1000)}`));
      svg.append(bar);
    });
  });
  made.append(legend(series.map((s) => [s.kind, s.colour, s.opacity])), svg);
  return made;
}
function bars(rows, y, base, x, step, colour, up) {
  let path = "";
  rows.forEach((value, i) => {
    if (!value) return;
    path += `M${x(i * step).toFixed(1)},${base}V${(up ? y(value) : 2 * base - y(value)).toFixed(1)}H${x((i + 1) * step).toFixed(1)}V${base}Z`;
  });
  return make("path", { d: path, fill: colour });
}
function ioChart(device) {
  const mine = traces.map((trace, i) => ({ i, trace, io: trace.io[device], summary: trace.summary.io[device] })).filter((m) => m.io);
  const most = Math.max(...mine.flatMap((m) => [...m.io.to_guest, ...m.io.from_guest]), 1);
  const x = linear(0, longest, L, W - R), middle = (H - B + T) / 2, y = linear(0, most, middle, T);
  const svg = frame(ticks(0, longest, 6), [0], x, y, time, () => "0");
  svg.append(make("text", { x: L - 7, y: T + 6, "text-anchor": "end" }, bytes(most)), make("text", { x: L - 7, y: H - B, "text-anchor": "end" }, bytes(most)),
    make("text", { x: L + 6, y: T + 4 }, "to the guest"), make("text", { x: L + 6, y: H - B - 2 }, "from the guest"));
  for (const { i, trace, io } of mine) {
    const colour = traces.length > 1 ? colours[i] : "var(--first)", step = trace.until / io.to_guest.length;
    svg.append(bars(io.to_guest, y, middle, x, step, colour, true), bars(io.from_guest, y, middle, x, step, colour, false));
  }
  const note = mine.map((m) => `${count(m.summary.requests)} requests, ${bytes(m.summary.to_guest.bytes)} to and ${bytes(m.summary.from_guest.bytes)} from the guest`).join("; ");
  const made = card(`I/O of ${device}`, note, who(), svg);
  made.dataset.chart = "io";
  return made;
}
function exitsChart() {
  const slice = (trace) => trace.until / trace.exits.length / 1e6 || 1;
  const rates = traces.map((trace) => trace.exits.map((value) => value / slice(trace)));
  const most = Math.max(...rates.flat(), 1), x = linear(0, longest, L, W - R), y = linear(0, most * 1.06, H - B, T);
  const svg = frame(ticks(0, longest, 6), ticks(0, most, 4), x, y, time, count);
  traces.forEach((trace, i) => {
    const step = trace.until / trace.exits.length;
    svg.append(bars(rates[i], y, y(0), x, step, traces.length > 1 ? colours[i] : "var(--dim)", true));
  });
  const made = card("Exits per second", "Exits that user space handled.", who(), svg);
  made.dataset.chart = "exits";
  return made;
}

// ---- the page ---------------------------------------------------------------------------------
function headLine(trace) {
  const { summary } = trace, run = summary.run, backings = run.backings || {};
  const guest = (summary.complete && (summary.guest || {}).exit) || "unknown";
  const facts = [`guest: ${guest}`, `scheme ${run.scheme}`, `doorbell ${run.doorbell}`, `private side ${backings.private || "unknown"}`,
    `policies: ${(run.policies || []).map((words) => words.join(" ")).join(", ") || "none"}`];
  const made = make("p", { class: "note" }, `${summary.path}: ${facts.join(" · ")}`);
  if (!summary.complete) made.append(make("span", { class: "warn" }, " The run did not end its trace: it was killed, or is still going on."));
  if (summary.torn_events) made.append(make("span", { class: "warn" }, ` ${count(summary.torn_events)} torn events at the end are left out.`));
  return made;
}
function tiles() {
  const both = (show) => traces.map((trace) => show(trace.summary)).join(" / ");
  const tile = (label, show) => make("div", { class: "tile" }, make("b", {}, both(show)), make("span", {}, label));
  const told = (show) => (s) => s.memory.told ? show(s) : "not told";
  const sum = (s, key) => s.conversions.share[key] + s.conversions.unshare[key];
  return make("div", { class: "tiles" },
    tile("time", (s) => time(s.seconds * 1e6)),
    tile("share and unshare requests", told((s) => count(sum(s, "requests")))),
    tile("not granted", told((s) => count(sum(s, "denied") + sum(s, "partial") + sum(s, "failed")))),
    tile("shared at most", told((s) => bytes(s.memory.shared_bytes_peak))),
    tile("spent converting", told((s) => time((s.conversions.share.latency_ns.total + s.conversions.unshare.latency_ns.total) / 1000))),
    tile("exits", (s) => count(Object.values(s.exits).reduce((all, one) => all + one.count, 0))));
}
// What is not the same in two runs leads the page.
function changed() {
  const made = card("What changed", `${name(traces[0])} | ${name(traces[1])} | the second against the first`);
  made.dataset.chart = "changes";
  if (!data.changes.length) made.append(make("p", {}, "Nothing but the usual noise: no number differs by a tenth."));
  made.append(make("table", {}, ...data.changes.map((row) => make("tr", {}, make("td", {}, row.label),
    ...row.cells.map((cell) => make("td", {}, cell)), make("td", { class: "change" }, row.change)))));
  return made;
}
function refusals() {
  const made = card("Refusals", "Requests and I/O that were refused, invalid, or failed.");
  made.dataset.chart = "refusals";
  for (const trace of traces) {
    if (traces.length > 1) made.append(make("strong", {}, name(trace)));
    const lines = trace.refusals.length ? trace.refusals : ["none"];
    made.append(make("ul", {}, ...lines.map((line) => make("li", {}, line))));
  }
  return made;
}
function numbers(table) {
  const made = card(table.title[0].toUpperCase() + table.title.slice(1), traces.length > 1 ? traces.map(name).join(" | ") : "");
  made.append(make("table", {}, ...table.rows.map((row) =>
    make("tr", {}, make("td", {}, row.label), ...row.cells.map((cell) => make("td", {}, cell)), ...(row.change ? [make("td", {}, row.change)] : [])))));
  return made;
}
const timelines = traces.map((trace) => new Timeline(trace));
const devices = [...new Set(traces.flatMap((trace) => Object.keys(trace.io)))];
main.append(make("h1", {}, document.title), ...traces.map(headLine), ...(traces.length > 1 ? [changed()] : []), tiles(),
  ...timelines.map((timeline) => timeline.card()),
  make("div", { class: "grid" }, sharedChart(), latencyChart(), ...devices.map(ioChart), exitsChart(), refusals()),
  make("div", { class: "grid" }, ...data.tables.map(numbers)));
const drawAll = () => timelines.forEach((timeline) => timeline.draw());
drawAll();
addEventListener("resize", drawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
