// One step of two models, and Monte Carlo beside Rao-Blackwell. The data stand in the page itself,
// so that it works from a file too; site/prefixes.py made them and says how they are packed.
"use strict";

const ROWS = 10; // tokens with a row of their own; the others share the last
const MOST = 100000; // draws that are kept
const MINUS = "\u2212";

const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

function unpacked(text) {
  const numbers = [];
  let number = 0;
  let shift = 0;
  for (const character of text) {
    const digit = DIGITS.indexOf(character);
    number += (digit % 32) << shift;
    shift += 5;
    if (digit < 32) {
      numbers.push(number);
      number = shift = 0;
    }
  }
  return numbers;
}

// The weights are whole numbers, so their sums are exact: what is drawn and what is summed agree.
function stepOf(prefix) {
  const [weights, other] = [prefix.policy, prefix.reference].map((text) =>
    unpacked(text).map((root) => root * root));
  const [total, otherTotal] = [weights, other].map((o) => o.reduce((a, b) => a + b, 0));
  const p = weights.map((o) => o / total);
  const q = other.map((o) => o / otherTotal);
  const logRatio = p.map((o, i) => Math.log(o / q[i]));
  const kl = p.reduce((sum, o, i) => sum + o * logRatio[i], 0);
  const variance = p.reduce((sum, o, i) => sum + o * (logRatio[i] - kl) ** 2, 0);
  let below = 0;
  const upTo = Float64Array.from(weights, (o) => (below += o));
  const order = [...p.keys()].sort((a, b) => Math.max(p[b], q[b]) - Math.max(p[a], q[a]));
  return { p, q, logRatio, kl, deviation: Math.sqrt(variance), upTo, total,
    shown: order.slice(0, ROWS), rest: order.slice(ROWS) };
}

// mulberry32: small, and the same on every visit
function generator(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

function drawn(step, random) {
  const wanted = random() * step.total;
  let low = 0;
  let high = step.upTo.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (step.upTo[middle] > wanted) high = middle;
    else low = middle + 1;
  }
  return low;
}

function signed(value, digits = 3) {
  const text = Math.abs(value).toFixed(digits);
  return (Number(text) && value < 0 ? MINUS : "") + text;
}

function element(tag, content, attributes = {}) {
  const made = document.createElement(tag);
  made.append(...[content].flat());
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function drawing(tag, attributes, content = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(content);
  return made;
}

const quoted = (token) => `\u201c${token.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5")}\u201d`;

class Explorer {
  constructor(root, data) {
    this.data = data;
    this.random = generator(1);
    this.part = Object.fromEntries(
      [...root.querySelectorAll("[data-part]")].map((o) => [o.dataset.part, o]));
    const options = data.prefixes.map((o, i) => element("option", o.text, { value: i }));
    this.part.prefix.append(...options);
    this.part.prefix.addEventListener("change", () => this.choose());
    for (const button of root.querySelectorAll("button[data-draws]"))
      button.addEventListener("click", () => this.draw(Number(button.dataset.draws)));
    this.part.again.addEventListener("click", () => this.restart());
    new ResizeObserver(() => this.chart()).observe(this.part.chart);
    this.choose();
    root.hidden = false;
  }

  choose() {
    this.step = stepOf(this.data.prefixes[this.part.prefix.value]);
    const { kl, deviation } = this.step;
    this.part.kl.textContent = kl.toFixed(3);
    this.part.deviation.textContent = deviation.toPrecision(3);
    this.part.needed.textContent = Math.ceil((deviation / (0.05 * kl)) ** 2).toLocaleString("en");
    this.table();
    this.restart();
  }

  restart() {
    this.means = [];
    this.sum = this.squares = this.negative = 0;
    this.mark(null);
    this.part.last.textContent = "nothing yet";
    this.report();
  }

  draw(count) {
    const last = [];
    for (let i = 0; i < count && this.means.length < MOST; i++) {
      const token = drawn(this.step, this.random);
      const value = this.step.logRatio[token];
      this.sum += value;
      this.squares += value * value;
      this.negative += value < 0;
      this.means.push(this.sum / (this.means.length + 1));
      last.push(token);
    }
    if (!last.length) return;
    const words = last.slice(-5).map((o) =>
      `${quoted(this.data.tokens[o])} ${signed(this.step.logRatio[o], 2)}`);
    this.part.last.textContent = (last.length > 5 ? "\u2026 " : "") + words.join(", ");
    this.mark(last.at(-1));
    this.report();
  }

  // Standard error of the mean of the draws, from the draws
  error() {
    const n = this.means.length;
    if (n < 2) return NaN;
    const mean = this.sum / n;
    return Math.sqrt(Math.max(0, this.squares - n * mean * mean) / (n - 1) / n);
  }

  report() {
    const n = this.means.length;
    const error = this.error();
    this.part.count.textContent = n.toLocaleString("en");
    this.part.mc.textContent = n ? signed(this.means.at(-1)) : "\u2013";
    this.part.error.textContent = Number.isNaN(error) ? "\u2013" : error.toPrecision(2);
    this.part.negative.textContent = n ? `${Math.round((100 * this.negative) / n)} %` : "\u2013";
    this.part.rb.textContent = this.step.kl.toFixed(3);
    this.chart();
  }

  mark(token) {
    for (const row of this.part.rows.children) {
      const own = token !== null && row.dataset.token === String(token);
      const rest = token !== null && row.dataset.token === "rest" && !this.step.shown.includes(token);
      row.classList.toggle("drawn", own || rest);
    }
  }

  table() {
    const { p, q, logRatio, shown, rest, kl } = this.step;
    const add = (indices, values) => indices.reduce((sum, o) => sum + values(o), 0);
    const all = [...shown.map((o) => [o]), rest];
    const widest = Math.max(...all.flatMap((o) => [add(o, (i) => p[i]), add(o, (i) => q[i])]));
    const row = (name, indices, key) => {
      const [own, other] = [add(indices, (o) => p[o]), add(indices, (o) => q[o])];
      const product = add(indices, (o) => p[o] * logRatio[o]);
      const bar = (kind, value) => {
        const width = `width: ${(100 * value) / widest}%`;
        const fill = element("span", "", { class: `bar ${kind}`, style: width });
        const track = element("span", fill, { class: "track" });
        return element("span", [track, element("span", value.toFixed(3), { class: "value" })],
          { class: "pair" });
      };
      const cells = [
        element("th", name, { scope: "row" }),
        element("td", [bar("policy", own), bar("reference", other)], { class: "bars" }),
        element("td", signed(product / own, 2)),
        element("td", signed(product)),
      ];
      return element("tr", cells, { "data-token": key });
    };
    const rows = shown.map((o) => row(element("code", quoted(this.data.tokens[o])), [o], o));
    rows.push(row(`${rest.length.toLocaleString("en")} others`, rest, "rest"));
    this.part.rows.replaceChildren(...rows);
    this.part.total.textContent = signed(kl);
  }

  // Running mean and its standard error against the number of draws, on a logarithmic axis
  chart() {
    const frame = this.part.chart;
    const [width, height] = [frame.clientWidth, 260];
    if (!width) return;
    const [left, right, top, bottom] = [44, 34, 10, 40];
    const { kl, deviation } = this.step;
    const n = this.means.length;
    const decades = Math.max(3, Math.ceil(Math.log10(Math.max(n, 1))));
    const [low, high] = [kl - 1.5 * deviation, kl + 1.5 * deviation];
    const x = (count) => left + ((width - left - right) * Math.log10(count)) / decades;
    const y = (value) => top + ((height - top - bottom) * (high - value)) / (high - low);
    const image = drawing("svg", { width, height, role: "img", "aria-label":
      `Running mean of ${n} draws, and the exact KL, ${kl.toFixed(3)} nats` });
    const clip = drawing("clipPath", { id: "explorer-clip" });
    const [across, down] = [width - left - right, height - top - bottom];
    clip.append(drawing("rect", { x: left, y: top, width: across, height: down }));
    image.append(clip);

    const unit = 10 ** Math.floor(Math.log10(high - low));
    const tick = [0.2, 0.5, 1, 2].map((o) => o * unit).find((o) => (high - low) / o <= 6);
    for (let i = Math.ceil(low / tick); i * tick <= high; i++) {
      const at = y(i * tick);
      const kind = i === 0 ? "zero" : "grid";
      image.append(drawing("line", { x1: left, x2: width - right, y1: at, y2: at, class: kind }));
      const digits = Math.max(0, -Math.floor(Math.log10(tick)));
      image.append(drawing("text", { x: left - 6, y: at + 4, class: "end" },
        signed(i * tick, digits)));
    }
    for (let i = 0; i <= decades; i++)
      image.append(drawing("text", { x: x(10 ** i), y: height - bottom + 18, class: "middle" },
        (10 ** i).toLocaleString("en")));
    image.append(drawing("text", { x: (left + width - right) / 2, y: height - 4, class: "middle" },
      "tokens drawn"));

    const counts = [];
    for (let i = 0; i <= 300; i++) counts.push(Math.round(10 ** ((i * decades) / 300)));
    const kept = [...new Set([...counts.filter((o) => o <= n), n])].filter((o) => o > 0);
    const points = (values) => values.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`);
    const clipped = drawing("g", { "clip-path": "url(#explorer-clip)" });
    const sides = [1, -1].map((side) =>
      counts.map((o) => [o, kl + (side * deviation) / Math.sqrt(o)]));
    clipped.append(drawing("polygon", { class: "funnel",
      points: points([...sides[0], ...sides[1].reverse()]).join(" ") }));
    clipped.append(drawing("polyline", { class: "mc",
      points: points(kept.map((o) => [o, this.means[o - 1]])).join(" ") }));
    if (n) {
      const at = { x: x(n), y: Math.min(height - bottom, Math.max(top, y(this.means[n - 1]))) };
      const above = this.means[n - 1] >= kl; // away from the line of RB
      clipped.append(drawing("circle", { class: "mc", r: 4, cx: at.x, cy: at.y }));
      image.append(drawing("text", { x: at.x, y: at.y + (above ? -9 : 19), class: "mc middle" },
        "MC"));
    }
    image.append(clipped);
    image.append(drawing("line", { x1: left, x2: width - right, y1: y(kl), y2: y(kl), class: "rb" }));
    image.append(drawing("text", { x: width - right + 5, y: y(kl) + 4, class: "rb" }, "RB"));
    frame.replaceChildren(image);
  }
}

const root = document.getElementById("prefix-explorer");
new Explorer(root, JSON.parse(document.getElementById("prefix-data").textContent));
