// The advisor's page: the cost model of research/analysis/cost.py and the ranking of
// experiments/reports/advice.py on plain numbers, and their display. ADVISOR_DATA (data.js, which
// docs/_ext/advice.py writes) has the methods. A test compares the numbers with those of Python.
"use strict";

(function () {
  const data = window.ADVISOR_DATA;

  // ---- the cost model

  const HOPS = {
    "all-reduce": (w) => 2 * (w - 1),
    "all-gather": (w) => w - 1,
    "reduce-scatter": (w) => w - 1,
    "all-to-all": (w) => w - 1,
    permute: () => 1,
  };
  // Bytes that one of w workers sends, over those of its operand.
  const SENT = {
    "all-reduce": (w) => (2 * (w - 1)) / w,
    "all-gather": (w) => w - 1,
    "reduce-scatter": (w) => (w - 1) / w,
    "all-to-all": (w) => (w - 1) / w,
    permute: () => 1,
  };

  // Predicts a step of a method. place: bandwidth in bits per second, latency and computing in
  // seconds, workers, parameters, and encoding: the share of the measured times of encoding that
  // counts. Returns seconds, and bytes that a worker sends per step.
  function predict(method, place) {
    let sent = 0;
    let hops = 0;
    for (const one of method.transfers) {
      const operand = (one.fixed + one.by_workers / place.workers) * place.parameters;
      sent += operand * SENT[one.operation](place.workers);
      hops += one.messages * HOPS[one.operation](place.workers);
    }
    const encoding = place.encoding * method.encoding * place.parameters;
    const link = hops * place.latency + (8 * sent) / place.bandwidth;
    const hidden = (Math.min(method.delay, method.period) / method.period) * place.computing;
    const waiting = Math.max(0, link - hidden);
    return { method, sent, encoding, waiting, seconds: place.computing + encoding + waiting };
  }

  // Seconds in which a method gets as far as the exact average does in one step.
  const cost = (found, which = 1) => found.seconds * found.method.steps[which];

  function rank(place) {
    const found = data.methods.map((method) => predict(method, place));
    return found.sort((a, b) => cost(a) - cost(b));
  }

  // Says in one line why a method is behind the first one.
  function why(found, first) {
    const share = (part) => `${Math.round((100 * part) / found.seconds)}% of a step`;
    const parts = [
      [found.waiting, `${share(found.waiting)} is waiting for the link`],
      [found.encoding, `${share(found.encoding)} is encoding`],
      [found.seconds - found.waiting - found.encoding, "most of a step is computing"],
    ];
    const made = parts.reduce((a, b) => (b[0] > a[0] ? b : a))[1];
    if (found === first) return `first: ${made}`;
    const slower = found.seconds / first.seconds;
    const more = found.method.steps[1] / first.method.steps[1];
    if (slower >= more) return `a step takes ${slower.toFixed(2)} times as long: ${made}`;
    return `needs ${more.toFixed(2)} times as many steps`;
  }

  // The bandwidths at which the best method changes, from high to low.
  function crossings(place) {
    const found = [];
    let last = null;
    for (let exponent = 12; exponent >= 6; exponent -= 0.02) {
      const best = rank({ ...place, bandwidth: 10 ** exponent })[0].method.name;
      if (best !== last) found.push({ bandwidth: 10 ** exponent, name: best });
      last = best;
    }
    return found;
  }

  // ---- numbers as text

  function scaled(value, units, digits) {
    let text = "";
    for (const [size, unit] of units) {
      if (value >= size || unit === units[units.length - 1][1]) {
        text = `${Number((value / size).toPrecision(digits || 3)).toLocaleString("en")} ${unit}`;
        break;
      }
    }
    return text;
  }
  const BITS = [[1e12, "Tbit/s"], [1e9, "Gbit/s"], [1e6, "Mbit/s"], [1e3, "kbit/s"]];
  const BYTES = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]];
  const COUNT = [[1e12, "trillion"], [1e9, "billion"], [1e6, "million"], [1e3, "thousand"], [1, ""]];
  const TIME = [[86400, "days"], [3600, "h"], [60, "min"], [1, "s"], [1e-3, "ms"], [1e-6, "µs"]];
  const time = (seconds) => (seconds ? scaled(seconds, TIME) : "0 s");
  // Powers of ten of a second on an axis.
  const tick = (seconds) => (seconds >= 1 ? scaled(seconds, [[1, "s"]]) : time(seconds));
  const bytes = (count) => (count ? scaled(count, BYTES) : "0 B");
  const bits = (rate) => scaled(rate, BITS);
  const count = (n) => scaled(n, COUNT).trim();

  // ---- sliders; all are logarithmic

  const SLIDERS = [
    { id: "bandwidth", label: "Bandwidth of a worker's link", least: 6, greatest: 12, value: 9, text: bits },
    { id: "latency", label: "Latency, one way", least: -6, greatest: -0.5, value: -4, text: tick },
    { id: "computing", label: "Computing per step", least: -3, greatest: 2, value: 0, text: tick },
    { id: "workers", label: "Workers", least: Math.log10(2), greatest: 4, value: Math.log10(8), text: (n) => String(n) },
    { id: "parameters", label: "Parameters of the model", least: 5, greatest: 12, value: 9, text: count },
  ];
  const element = (name, attributes, ...children) => {
    const svg = ["svg", "g", "path", "circle", "text", "line", "title"].includes(name);
    const made = svg
      ? document.createElementNS("http://www.w3.org/2000/svg", name)
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  function read() {
    const place = {};
    for (const one of SLIDERS) {
      const value = 10 ** Number(document.getElementById(`advisor-${one.id}`).value);
      place[one.id] = one.id === "workers" || one.id === "parameters" ? Math.round(value) : value;
    }
    place.encoding = document.getElementById("advisor-encoding").checked ? 1 : 0;
    return place;
  }

  function makeSliders(root) {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const one of SLIDERS) {
      const id = `advisor-${one.id}`;
      const exponent = Math.log10(Number(given.get(one.id)));
      const value = Number.isFinite(exponent) ? exponent : one.value;
      const input = element("input", { type: "range", id, min: one.least, max: one.greatest, step: 0.01 });
      input.value = value;
      input.addEventListener("input", show);
      const label = element("label", { for: id }, one.label);
      root.append(element("div", { class: "advisor-slider" }, label, input, element("output", { id: `${id}-text`, for: id })));
    }
  }

  // ---- figures

  const WIDTH = 640;
  const HEIGHT = 300;
  const LEFT = 64;
  const RIGHT = 28;
  const BOTTOM = 44;

  // An SVG with logarithmic axes. Returns the element and the functions from values to pixels.
  function axes(title, x, y) {
    const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
    const place = (axis, from, to) => (value) =>
      from + ((Math.log10(value) - axis.from) / (axis.to - axis.from)) * (to - from);
    const atX = place(x, LEFT, WIDTH - RIGHT);
    const atY = place(y, HEIGHT - BOTTOM, 12);
    const ticks = (axis) => {
      const every = Math.max(1, Math.ceil((axis.to - axis.from) / 6));
      const found = [];
      for (let e = Math.ceil(axis.from); e <= axis.to; e += every) found.push(10 ** e);
      return found.length > 1 ? found : [10 ** axis.from, 10 ** axis.to];
    };
    for (const value of ticks(x)) {
      svg.append(element("line", { x1: atX(value), x2: atX(value), y1: 12, y2: HEIGHT - BOTTOM, class: "advisor-grid" }));
      svg.append(element("text", { x: atX(value), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, x.text(value)));
    }
    for (const value of ticks(y)) {
      svg.append(element("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: atY(value), y2: atY(value), class: "advisor-grid" }));
      svg.append(element("text", { x: LEFT - 6, y: atY(value) + 4, "text-anchor": "end" }, y.text(value)));
    }
    svg.append(element("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, x.label));
    return { svg, atX, atY };
  }

  const range = (values) => {
    const logs = values.filter((v) => v > 0).map(Math.log10);
    return { from: Math.min(...logs) - 0.15, to: Math.max(...logs) + 0.15 };
  };

  // Time to the target against bytes per step; filled circles are not beaten in both.
  function drawFront(found) {
    const shown = found.filter((one) => one.sent > 0);
    const best = (one) => !shown.some((o) => o !== one && o.sent <= one.sent && cost(o) <= cost(one) && (o.sent < one.sent || cost(o) < cost(one)));
    const x = { ...range(shown.map((o) => o.sent)), label: "bytes that a worker sends per step", text: bytes };
    const y = { ...range(shown.map((one) => cost(one))), text: tick };
    const { svg, atX, atY } = axes("Time against bytes", x, y);
    shown.forEach((one) => {
      const left = atX(one.sent) > WIDTH - 160;
      const dot = element("circle", { cx: atX(one.sent), cy: atY(cost(one)), r: 5, class: best(one) ? "advisor-best" : "advisor-other" });
      dot.append(element("title", {}, `${one.method.name}: ${bytes(one.sent)}, ${time(cost(one))}`));
      svg.append(dot);
      if (best(one)) svg.append(element("text", { x: atX(one.sent) + (left ? -9 : 9), y: atY(cost(one)) + 4, "text-anchor": left ? "end" : "start" }, one.method.name));
    });
    return svg;
  }

  // Time to the target against bandwidth, for the methods that win somewhere; the current bandwidth.
  function drawCrossings(place, winners) {
    const rates = [];
    for (let e = 6; e <= 12.001; e += 0.1) rates.push(10 ** e);
    const methods = data.methods.filter((method) => winners.some((one) => one.name === method.name));
    const lines = methods.map((method) => rates.map((bandwidth) => cost(predict(method, { ...place, bandwidth }))));
    const x = { from: 6, to: 12, label: "bandwidth of a worker's link", text: bits };
    const { svg, atX, atY } = axes("Time against bandwidth", x, { ...range(lines.flat()), text: tick });
    lines.forEach((line, i) => {
      const path = line.map((value, k) => `${k ? "L" : "M"}${atX(rates[k]).toFixed(1)},${atY(value).toFixed(1)}`).join("");
      svg.append(element("path", { d: path, class: `advisor-line advisor-color-${i % 6}` }));
    });
    svg.append(element("line", { x1: atX(place.bandwidth), x2: atX(place.bandwidth), y1: 12, y2: HEIGHT - BOTTOM, class: "advisor-now" }));
    const legend = element("p", { class: "advisor-legend" });
    methods.forEach((method, i) => legend.append(element("span", { class: `advisor-color-${i % 6}` }, method.name)));
    return element("div", {}, svg, legend);
  }

  // ---- the page

  function row(found, first) {
    const [low, middle, high] = found.method.steps;
    const steps = element("td", {}, low === high ? middle.toFixed(2) : `${middle.toFixed(2)} (${low.toFixed(2)} to ${high.toFixed(2)})`);
    for (const [name, page] of found.method.sources) {
      const short = name.replace("results/", "");
      steps.append(" ", page ? element("a", { href: page }, short) : short);
    }
    const cells = [found.method.name, time(found.seconds), bytes(found.sent)];
    const made = element("tr", {}, ...cells.map((cell) => element("td", {}, cell)), steps);
    for (const cell of [(cost(found) / cost(first)).toFixed(2), why(found, first)]) {
      made.append(element("td", {}, cell));
    }
    return made;
  }

  // As `verdict` of advice.py.
  function verdict(found) {
    const [first] = found;
    const exact = found.find((one) => one.method.name === data.exact);
    const gain = cost(exact) / cost(first);
    if (gain <= 1.05) {
      const share = Math.round((100 * exact.waiting) / exact.seconds);
      return `Do not compress: the exact average of gradients waits for the link during ${share}% of a step, and no method is more than 5% faster.`;
    }
    const near = found.slice(1).filter((one) => cost(one, 0) <= cost(first, 2));
    const close = near.length ? ` Within the range of the recorded runs: ${near.map((one) => one.method.name).join(", ")}.` : "";
    return `Use ${first.method.name}: ${gain.toPrecision(3)} times as fast as the exact average.${close}`;
  }

  function show() {
    const place = read();
    for (const one of SLIDERS) {
      const text = one.text(place[one.id]);
      document.getElementById(`advisor-${one.id}-text`).textContent = text;
      document.getElementById(`advisor-${one.id}`).setAttribute("aria-valuetext", text);
    }
    const found = rank(place);
    const winners = crossings(place);
    const by = (name) => document.getElementById(`advisor-${name}`);
    by("verdict").textContent = verdict(found);
    by("ranking").replaceChildren(...found.map((one) => row(one, found[0])));
    by("front").replaceChildren(drawFront(found));
    by("crossings").replaceChildren(drawCrossings(place, winners));
    const text = winners.map((one, i) => (i ? `below ${bits(one.bandwidth)} ${one.name}` : `${one.name} on the fastest links`));
    by("points").textContent = `${text.join("; ")}.`;
    by("command").textContent = `python experiments/run.py --executor=spmd --mesh=data:${place.workers} --method="${found[0].method.spec}"`;
    const state = SLIDERS.map((one) => `${one.id}=${Number(place[one.id].toPrecision(4))}`);
    history.replaceState(null, "", `#${state.join("&")}`);
  }

  window.advisor = { predict, rank, crossings, cost };
  document.addEventListener("DOMContentLoaded", () => {
    const root = document.getElementById("advisor-sliders");
    if (!root) return;
    makeSliders(root);
    const encoding = document.getElementById("advisor-encoding");
    encoding.disabled = !data.kernels;
    const missing = data.methods.filter((method) => method.unmeasured.length).map((method) => method.name);
    const note = missing.length && data.kernels ? ` Not measured: ${missing.join(", ")}.` : "";
    encoding.parentElement.append(note);
    encoding.addEventListener("input", show);
    show();
  });
})();
