// All heads: one small picture each, and each layer's measure along the text.

class Overview {
  constructor() {
    const shownInputs = state.mode === "difference" ? inputs.slice(0, 1) : chosenInputs();
    const [first] = shownInputs, label = state.measure;
    this.pictures = new Map();
    this.reach = label ? reach(label) : null;
    this.top = Math.max(...inputs.flatMap((input) => input.layers.flatMap((layer) => layer.maps.map(([map]) => map?.bright ?? 0))));
    this.element = el("div", { class: "overview" }, this.head(first));
    this.grid = el("div", { class: "grid", role: "group", "aria-label": "Heads. Arrow keys move between them, Enter opens one." });
    this.watch = new IntersectionObserver((seen) => {
      for (const { target, isIntersecting } of seen) if (isIntersecting) this.drawHead(target);
    }, { rootMargin: "400px" });
    first.layers.forEach((layer, index) => this.grid.append(this.row(layer, index, shownInputs)));
    this.element.append(this.grid);
    this.resize = new ResizeObserver(() => this.drawBands());
    this.resize.observe(this.grid);
  }

  head(input) {
    const heads = input.layers.reduce((sum, layer) => sum + layer.heads.length, 0);
    const map = input.layers[0].maps[0][0];
    const size = map ? ` A pixel of a picture is ${counted(map.rows, "query", "queries")}, down, and ${counted(map.columns, "key", "keys")}, across: ${map.label}.` : "";
    const text = `${whole(heads)} heads in ${whole(input.layers.length)} layers over ${whole(input.queries)} queries and ${whole(input.keys)} keys.${size}`;
    const kept = input.layers.reduce((sum, layer) => sum + Object.keys(layer.of.detail).length, 0);
    const single = kept === heads ? " Single tokens are kept for all heads." : kept ? ` Single tokens are kept for ${whole(kept)} heads, marked •.` : "";
    const legends = el("div", { class: "legends" });
    if (map && state.mode === "difference") legends.append(legend("difference", -1, 1, "B more · A more, of each head's largest"));
    else if (map && state.scale === "all") legends.append(legend("map", 0, this.top, "mass, same scale for all heads", { more: true }));
    else if (map) legends.append(legend("map", 0, 1, "mass, of the head's brightest"));
    if (this.reach) {
      const { unit } = input.layers.flatMap((layer) => layer.strips).find((strip) => strip.label === state.measure);
      legends.append(legend("strip", this.reach.low, this.reach.high, `${state.measure}${unit ? `, ${unit}` : ""}, of a layer`, { root: false, more: true }));
    }
    const note = state.mode === "difference" && inputs[0].keys !== inputs[1].keys ? " Lengths differ: places are compared as shares of each text." : "";
    return el("div", { class: "lead" }, el("p", {}, text + (kept < heads || span(map?.rows ?? [0, 1]) !== "1" ? single : "") + note), legends);
  }

  row(layer, index, shownInputs) {
    const heads = el("div", { class: "heads" });
    layer.heads.forEach((head, place) => {
      const button = el("button", {
        type: "button", class: layer.of.detail[place] ? "thumb detailed" : "thumb", "data-layer": index, "data-head": place, tabindex: index || place ? "-1" : "0",
        "aria-label": [`layer ${index}, head ${head}`, ...facts(layer, place)].join(", "),
        onclick: () => go({ view: "head", layer: index, head: place }),
        onpointermove: (event) => showTip(event, [`layer ${index}, head ${head}`, layer.name, ...facts(layer, place)]),
        onpointerleave: hideTip,
      }, el("span", { class: "pictures" }), el("span", { class: "number", "aria-hidden": "true" }, String(head)));
      heads.append(button);
      this.watch.observe(button);
    });
    const row = el("div", { class: "layer" }, el("div", { class: "name", title: layer.name }, String(index)), heads);
    for (const input of shownInputs) {
      const strip = input.layers[index].strips.find((one) => one.label === state.measure);
      if (strip) row.append(this.bandOf(strip, input, index));
    }
    return row;
  }

  bandOf(strip, input, index) {
    const canvas = el("canvas", { class: "band", role: "img", "aria-label": `layer ${index}, ${strip.label} along the text` });
    Object.assign(canvas, { strip, input });
    const place = (event) => {
      const box = canvas.getBoundingClientRect(), length = strip.edges[strip.bins];
      return Math.max(0, Math.min(length - 1, Math.floor(((event.clientX - box.left) / box.width) * length)));
    };
    canvas.addEventListener("pointermove", (event) => {
      const at = place(event), bin = cellOf(strip.edges, at);
      const token = strip.axis === "key" ? at : input.tokenOf(at);
      const text = strip.axis === "key" ? input.keyTokens : input.queryTokens ?? input.keyTokens;
      showTip(event, [`layer ${index}${inputs.length > 1 ? `, ${input.name}` : ""}: ${strip.label}`, `${tokensOf(strip, bin)}  ${named(text[token])}`, `${number(strip.ofLayer()[bin])} ${strip.unit}, mean of ${strip.heads} heads`]);
      markText(input, strip.axis, at, "cursor");
    });
    canvas.addEventListener("pointerleave", () => { hideTip(); markText(input, strip.axis, -1); });
    canvas.addEventListener("click", (event) => scrollText(input, strip.axis, place(event)));
    return canvas;
  }

  drawBands() {
    for (const canvas of this.grid.querySelectorAll(".band")) {
      const width = canvas.parentElement.querySelector(".heads").clientWidth;
      if (!width) continue;
      canvas.picture ??= band(canvas.strip, this.reach);
      paint(sized(canvas, width, 7), [{ image: canvas.picture, x: 0, y: 0, w: width, h: 7, smooth: canvas.strip.bins > width }]);
    }
  }

  // The pictures of one head, an input each, drawn when they come into view.
  drawHead(button) {
    this.watch.unobserve(button);
    const layer = Number(button.dataset.layer), head = Number(button.dataset.head);
    button.querySelector(".pictures").replaceChildren(...this.picturesOf(layer, head));
  }

  picturesOf(layer, head) {
    const maps = chosenInputs().map((input) => input.layers[layer].maps[head][0]);
    if (state.mode === "difference") {
      if (!DifferenceMap.fits(...maps)) return [el("span", { class: "nothing" }, "other size")];
      const map = new DifferenceMap(...maps);
      return [cells(map, ramp("difference"), map.top)];
    }
    const top = state.scale === "all" ? this.top : null;
    return maps.map((map, i) => (map ? cells(map, ramp("map"), top ?? map.bright) : this.bars(chosenInputs()[i].layers[layer], head)));
  }

  // Without a map: the measure along the text, as a band.
  bars(layer, head) {
    const strip = layer.strips.find((one) => one.label === state.measure) ?? layer.strips[0];
    const canvas = el("canvas", { width: strip.bins, height: 1 }), context = canvas.getContext("2d");
    for (let bin = 0; bin < strip.bins; bin++) {
      const value = strip.value(head, bin), { lowest, highest } = strip;
      context.fillStyle = colourAt(ramp("strip"), highest > lowest ? (value - lowest) / (highest - lowest) : 0);
      if (!Number.isNaN(value)) context.fillRect(bin, 0, 1, 1);
    }
    return canvas;
  }

  // Which head has the focus moves by the arrow keys.
  keydown(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || event.shiftKey || event.altKey) return false;
    const held = document.activeElement.closest?.(".thumb");
    const layer = held ? Number(held.dataset.layer) + step[0] : state.layer, head = held ? Number(held.dataset.head) + step[1] : state.head;
    this.focus(layer, head);
    return true;
  }

  focus(layer, head) {
    const row = Math.max(0, Math.min(inputs[0].layers.length - 1, layer));
    const place = Math.max(0, Math.min(inputs[0].layers[row].heads.length - 1, head));
    const button = this.grid.querySelector(`[data-layer="${row}"][data-head="${place}"]`);
    this.grid.querySelector('.thumb[tabindex="0"]')?.setAttribute("tabindex", "-1");
    button.setAttribute("tabindex", "0");
    button.focus();
    Object.assign(state, { layer: row, head: place });
  }

  // The text carries the measure, a mean over all layers and heads.
  async colourText() {
    for (const reader of readers) {
      const strips = reader.input.layers.flatMap((layer) => layer.strips.filter((one) => one.label === state.measure));
      tintByStrip(reader, strips, (strip, bin) => strip.ofLayer()[bin], "mean of all heads");
    }
  }

  csv() {
    const labels = [...new Set(inputs.flatMap((input) => input.layers.flatMap((layer) => Object.keys(layer.means))))];
    const rows = [["input", "layer", "name", "head", ...labels.map((label) => `mean of ${label}`)]];
    for (const input of chosenInputs()) {
      input.layers.forEach((layer, index) => layer.heads.forEach((head, place) => rows.push([input.name, index, layer.name, head, ...labels.map((label) => layer.means[label]?.[place] ?? "")])));
    }
    return rows;
  }

  scene() {
    const items = [], ink = inks(), size = 72, gap = 6, left = 40;
    let y = 8, right = 0;
    inputs[0].layers.forEach((layer, index) => {
      items.push({ text: String(index), x: left - 12, y: y + size / 2, fill: ink.soft, align: "right", size: 12 });
      layer.heads.forEach((head, place) => {
        const pictures = this.picturesOf(index, place).filter((one) => one instanceof HTMLCanvasElement);
        pictures.forEach((image, i) => items.push({ image, x: left + (place * pictures.length + i) * (size + gap), y, w: size, h: size, smooth: image.width > size }));
        right = Math.max(right, left + (place + 1) * Math.max(1, pictures.length) * (size + gap));
        items.push({ text: String(head), x: left + place * Math.max(1, pictures.length) * (size + gap), y: y + size + 8, fill: ink.soft, size: 10 });
      });
      y += size + 22;
    });
    return { items, width: right + 8, height: y };
  }

  stop() {
    this.watch.disconnect();
    this.resize.disconnect();
  }
}

// A head's means, in words.
function facts(layer, head) {
  return layer.strips.map((strip) => `mean ${strip.label} ${number(layer.means[strip.label][head])}${strip.unit ? ` ${strip.unit}` : ""}`);
}
