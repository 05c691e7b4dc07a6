// Measures along the text: a band of colour for a layer, a chart for a head.

// Between which values most of the numbers lie: the 2nd and 98th of a hundred.
function middle(values) {
  const known = Float64Array.from(values).filter((value) => !Number.isNaN(value)).sort();
  if (!known.length) return { low: 0, high: 1 };
  const at = (share) => known[Math.round(share * (known.length - 1))];
  return { low: at(0.02), high: at(0.98) };
}

// The same of a measure over all layers and inputs, so that bands can be compared.
function reach(label) {
  const strips = inputs.flatMap((input) => input.layers.flatMap((layer) => layer.strips.filter((one) => one.label === label)));
  return middle(strips.flatMap((strip) => Array.from(strip.ofLayer())));
}

// A layer's measure, a mean over its heads, as a band: one pixel a bin.
function band(strip, { low, high }) {
  const canvas = el("canvas", { width: strip.bins, height: 1 });
  const context = canvas.getContext("2d"), image = context.createImageData(strip.bins, 1);
  const colours = ramp("strip");
  for (let bin = 0; bin < strip.bins; bin++) {
    const value = strip.ofLayer()[bin];
    if (Number.isNaN(value)) continue;
    const from = 3 * Math.round(255 * (high > low ? Math.max(0, Math.min(1, (value - low) / (high - low))) : 0));
    image.data.set([colours[from], colours[from + 1], colours[from + 2], 255], 4 * bin);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// Which tokens a bin holds, in words.
function tokensOf(strip, bin) {
  const first = strip.edges[bin], last = strip.edges[bin + 1] - 1;
  const what = strip.axis === "key" ? "key" : "query";
  return first === last ? `${what} ${whole(first)}` : `${what === "key" ? "keys" : "queries"} ${whole(first)}–${whole(last)}, mean`;
}

class StripChart {
  // series: [{input, strip, head}], one for each input shown. on: {hover, pick} with a row or key.
  constructor({ label, unit, series, on }) {
    Object.assign(this, { label, unit, series, on, at: null });
    this.canvas = el("canvas", { class: "chart", role: "img", "aria-label": this.summary() });
    const caption = el("figcaption", {}, el("span", {}, label), el("span", { class: "soft" }, unit ? ` ${unit}` : ""));
    series.forEach(({ input, strip, head }, i) => {
      const mean = input.layers[state.layer].means[label][head];
      caption.append(el("span", { class: `mean s${i}` }, `${series.length > 1 ? `${input.name} ` : ""}mean ${number(mean)}`));
    });
    this.element = el("figure", { class: "strip" }, caption, this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => { hideTip(); this.point(null); on.hover?.(null); });
    this.canvas.addEventListener("click", (event) => on.pick?.(this.index(event), this.series[0]));
    this.resize = new ResizeObserver(() => this.draw());
    this.resize.observe(this.element);
  }

  summary() {
    return `${this.label} along the text: ${this.series.map(({ strip, head, input }) => `${input.name} ${number(strip.low[head])} to ${number(strip.high[head])}`).join("; ")} ${this.unit}`;
  }

  length(strip) { return strip.edges[strip.bins]; }

  index(event) {
    const box = this.canvas.getBoundingClientRect();
    const share = Math.max(0, Math.min(0.99999, (event.clientX - box.left - 46) / (box.width - 50)));
    return Math.floor(share * this.length(this.series[0].strip));
  }

  items() {
    const width = Math.max(160, this.element.clientWidth), height = 64, left = 46, top = 6, w = width - 50, h = height - 12;
    const ink = inks(), items = [];
    const low = Math.min(...this.series.map(({ strip, head }) => strip.low[head]));
    const high = Math.max(...this.series.map(({ strip, head }) => strip.high[head]));
    const y = (value) => top + h - (high > low ? (value - low) / (high - low) : 0.5) * h;
    items.push({ path: [[left, top + h + 0.5], [left + w, top + h + 0.5]], stroke: ink.line });
    items.push({ text: short(high), x: left - 5, y: top + 4, fill: ink.soft, align: "right", size: 10 });
    if (high > low) items.push({ text: short(low), x: left - 5, y: top + h - 3, fill: ink.soft, align: "right", size: 10 });
    this.series.forEach(({ strip, head }, i) => {
      const stroke = i ? ink.second : ink.accent, x = (edge) => left + (edge / this.length(strip)) * w;
      items.push(...lines(strip, head, x, y, w, stroke, this.series.length > 1 ? 0 : y(low)));
    });
    if (this.at !== null) {
      const x = left + ((this.at + 0.5) / this.length(this.series[0].strip)) * w;
      items.push({ path: [[x, top - 4], [x, top + h + 4]], stroke: ink.mark, width: 1.5 });
    }
    return { items, width, height };
  }

  draw() {
    const { items, width, height } = this.items();
    paint(sized(this.canvas, width, height), items);
  }

  point(at) {
    if (at === this.at) return;
    this.at = at;
    this.draw();
  }

  hover(event) {
    const at = this.index(event), share = (at + 0.5) / this.length(this.series[0].strip);
    const rows = this.series.flatMap(({ input, strip, head }) => {
      const bin = cellOf(strip.edges, Math.floor(share * this.length(strip)));
      const value = strip.value(head, bin);
      return [`${this.series.length > 1 ? `${input.name}: ` : ""}${tokensOf(strip, bin)}`, `${this.label} ${bounded(value, strip.error(head))} ${this.unit}`];
    });
    showTip(event, rows);
    this.point(at);
    this.on.hover?.(at);
  }

  stop() { this.resize.disconnect(); }
}

// A measure as a line; where a pixel has several bins, a band from the least to the largest and
// their mean.
function lines(strip, head, x, y, width, stroke, floor) {
  const columns = Math.min(Math.floor(width), strip.bins), mean = [], upper = [], lower = [];
  for (let column = 0; column < columns; column++) {
    const first = Math.floor((column * strip.bins) / columns), end = Math.floor(((column + 1) * strip.bins) / columns);
    let sum = 0, count = 0, least = Infinity, most = -Infinity;
    for (let bin = first; bin < end; bin++) {
      const value = strip.value(head, bin);
      if (Number.isNaN(value)) continue;
      [sum, count, least, most] = [sum + value, count + 1, Math.min(least, value), Math.max(most, value)];
    }
    if (!count) continue;
    const at = (x(strip.edges[first]) + x(strip.edges[end])) / 2;
    mean.push([at, y(sum / count)]);
    upper.push([at, y(most)]);
    lower.push([at, y(least)]);
  }
  if (mean.length === 1) mean.push([mean[0][0] + 2, mean[0][1]]);
  const items = [];
  if (columns < strip.bins) items.push({ path: [...upper, ...lower.reverse()], fill: stroke, alpha: 0.22 });
  else if (floor && mean.length) items.push({ path: [[mean[0][0], floor], ...mean, [mean.at(-1)[0], floor]], fill: stroke, alpha: 0.12 });
  items.push({ path: mean, stroke, width: 1.25 });
  return items;
}
