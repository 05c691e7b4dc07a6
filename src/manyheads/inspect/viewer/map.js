// One head's map on a canvas: pan, zoom down to single tokens, and what is under the pointer.

class MapView {
  // sources: maps of one head, the whole first. on: {hover(row, key), pick(row), window(window)}.
  constructor({ input, layer, head, maps, difference = false, detail = null, title, on }) {
    Object.assign(this, { input, layer, head, maps, difference, detail, title, on });
    this.canvas = el("canvas", {
      class: "map",
      tabindex: "0",
      role: "img",
      "aria-label": `${title}. Queries run down, keys run right. Plus and minus zoom, shift and arrows pan, 0 shows all.`,
    });
    const button = (label, name, action) => el("button", { type: "button", "aria-label": name, title: name, onclick: action }, label);
    this.note = el("p", { class: "note pixel" });
    const tools = el("div", { class: "tools" },
      button("+", "Zoom in", () => this.zoom(0.5)),
      button("−", "Zoom out", () => this.zoom(2)),
      button("Fit", "Show all", () => this.reset()));
    const heading = title ? el("h3", {}, title) : null;
    this.element = el("figure", { class: "mapview" }, el("div", { class: "maphead" }, heading ?? el("span"), tools), this.canvas, this.note);
    this.pointers = new Map();
    this.images = new Map();
    this.window = this.whole();
    this.top = this.bright;
    this.cross = null;
    this.exact = null; // what the server last said, of a window
    for (const name of ["pointerdown", "pointermove", "pointerup", "pointercancel", "pointerleave", "wheel", "keydown", "dblclick"]) {
      this.canvas.addEventListener(name, (event) => this[name](event), { passive: false });
    }
    this.resize = new ResizeObserver(() => this.draw());
    this.resize.observe(this.element);
  }

  whole() {
    const [map] = this.maps;
    return { q0: map.rows[0], q1: map.rows[map.height], k0: map.columns[0], k1: map.columns[map.width] };
  }

  // Where colours end, at first; several maps side by side are given one end.
  get bright() { return this.maps[0].bright; }

  get most() { return Math.max(...this.maps.map((map) => map.top)); }

  stop() {
    this.resize.disconnect();
    clearTimeout(this.rest);
    this.asking?.abort();
  }

  // ---- where things are --------------------------------------------------------------------------

  layout() {
    const width = Math.max(160, this.element.clientWidth);
    const { q0, q1, k0, k1 } = this.window;
    const words = !this.difference;
    const rowPixels = (width * 0.85) / (q1 - q0), columnPixels = (width * 0.85) / (k1 - k0);
    const rowWords = words && rowPixels >= 12, columnWords = words && columnPixels >= 12;
    const left = rowWords ? Math.min(110, width * 0.26) : 46;
    const top = columnWords ? 84 : 22;
    const side = width - left - 4;
    const whole = this.whole();
    const shape = Math.max(0.35, Math.min(1, (whole.q1 - whole.q0) / (whole.k1 - whole.k0)));
    return { width, height: top + side * shape + 4, left, top, w: side, h: side * shape, rowWords, columnWords };
  }

  // The query and key (fractions) at a place on the canvas, or null outside.
  locate(event) {
    const box = this.canvas.getBoundingClientRect();
    const { left, top, w, h } = this.laid;
    const x = (event.clientX - box.left - left) / w, y = (event.clientY - box.top - top) / h;
    const { q0, q1, k0, k1 } = this.window;
    if (x < 0 || y < 0 || x >= 1 || y >= 1) return null;
    return { query: q0 + y * (q1 - q0), key: k0 + x * (k1 - k0), x, y };
  }

  // ---- drawing -----------------------------------------------------------------------------------

  // Every cell of a map as one pixel.
  picture(map) {
    const kind = this.difference ? "difference" : "map";
    const colours = ramp(kind), key = `${this.maps.indexOf(map)} ${state.palette}${isDark()}`;
    if (!this.images.has(key)) this.images.set(key, cells(map, colours, this.top));
    return this.images.get(key);
  }

  items() {
    const laid = this.layout(), { left, top, w, h } = laid, ink = inks();
    const { q0, q1, k0, k1 } = this.window;
    const x = (key) => left + ((key - k0) / (k1 - k0)) * w, y = (query) => top + ((query - q0) / (q1 - q0)) * h;
    const clip = [left, top, w, h];
    const items = [{ rect: clip, fill: colourAt(ramp(this.difference ? "difference" : "map"), this.difference ? 0.5 : 0) }];
    const single = this.singles();
    for (const map of this.maps) items.push(...this.cells(map, x, y, clip, single ? 0.12 : 1));
    if (this.exact) items.push(...this.cells(this.exact, x, y, clip, 1));
    if (single) items.push(...this.weights(x, y, clip));
    items.push({ rect: [left + 0.5, top + 0.5, w - 1, h - 1], stroke: ink.line });
    items.push(...this.axes(laid, x, y, ink));
    if (this.cross) {
      const { row, key } = this.cross;
      items.push({ rect: [left, y(row), w, Math.max(1.5, y(row + 1) - y(row))], stroke: ink.mark, width: 1.5, clip });
      if (key !== null) items.push({ rect: [x(key), top, Math.max(1.5, x(key + 1) - x(key)), h], stroke: ink.accent, clip });
    }
    return { items, laid };
  }

  // Far out a map is one picture; close by, where a cell's true edges show, a few rectangles.
  cells(map, x, y, clip, alpha) {
    const { q0, q1, k0, k1 } = this.window;
    const r0 = Math.max(0, cellOf(map.rows, Math.floor(q0))), c0 = Math.max(0, cellOf(map.columns, Math.floor(k0)));
    let r1 = r0, c1 = c0;
    while (r1 < map.height && map.rows[r1] < q1) r1++;
    while (c1 < map.width && map.columns[c1] < k1) c1++;
    if ((r1 - r0) * (c1 - c0) > 4000) {
      const left = x(map.columns[0]), top = y(map.rows[0]);
      const w = x(map.columns[map.width]) - left, h = y(map.rows[map.height]) - top;
      return [{ image: this.picture(map), x: left, y: top, w, h, clip, alpha, smooth: w < map.width }];
    }
    // Rectangles that meet between pixels would leave a line of paper.
    const items = [], colours = ramp(this.difference ? "difference" : "map"), seam = alpha < 1 ? 0 : 0.6;
    for (let r = r0; r < r1; r++) {
      for (let c = c0; c < c1; c++) {
        const left = x(map.columns[c]), top = y(map.rows[r]);
        const rect = [left, top, x(map.columns[c + 1]) - left + seam, y(map.rows[r + 1]) - top + seam];
        items.push({ rect, fill: colourAt(colours, map.share(r, c, this.top)), clip, alpha });
      }
    }
    return items;
  }

  // Whether the window is so small that single tokens' weights show, and the map does not hold them.
  singles() {
    if (!this.detail || this.finest() === this.exact) return false;
    const { q0, q1, k0, k1 } = this.window;
    const [width] = [this.element.clientWidth];
    return this.pooled() && width / Math.max(q1 - q0, k1 - k0) >= 1.2;
  }

  // Whether the page's map has cells of more than one token.
  pooled() {
    const [map] = this.maps;
    return map.height < map.rows[map.height] - map.rows[0] || map.width < map.columns[map.width] - map.columns[0];
  }

  // The server's map if it has all that is in view, else the page's.
  finest() {
    const { exact, window: { q0, q1, k0, k1 } } = this;
    const covers = exact && exact.rows[0] <= q0 && exact.rows.at(-1) >= q1 && exact.columns[0] <= k0 && exact.columns.at(-1) >= k1;
    return covers ? exact : this.maps[0];
  }

  // Once the window rests, ask the server for what is in view, a cell for each pixel at most.
  sharpen() {
    if (!server || this.difference || !this.pooled()) return;
    const { q0, q1, k0, k1 } = this.window, { rows, columns, height, width } = this.maps[0];
    const view = { q0: Math.max(rows[0], Math.floor(q0)), q1: Math.min(rows[height], Math.ceil(q1)), k0: Math.max(columns[0], Math.floor(k0)), k1: Math.min(columns[width], Math.ceil(k1)) };
    const asked = Object.values(view).join();
    if (asked === this.asked) return;
    this.asked = asked;
    clearTimeout(this.rest);
    this.asking?.abort();
    this.asking = new AbortController();
    this.rest = setTimeout(() => this.ask(view, this.asking.signal), 150);
  }

  async ask(view, signal) {
    try {
      this.exact = await server.zoom(this.input, this.layer, this.head, view, 512, signal);
      this.images.clear();
      this.trouble = "";
    } catch (problem) {
      if (problem.name === "AbortError") return;
      this.trouble = problem.message;
    }
    this.draw();
  }

  weights(x, y, clip) {
    const items = [], colours = ramp("map"), { q0, q1 } = this.window;
    for (let row = Math.max(0, Math.floor(q0)); row < Math.min(this.detail.queries, Math.ceil(q1)); row++) {
      for (const { index, weight } of this.detail.ofRow(row)) {
        const rect = [x(index), y(row), Math.max(1.5, x(index + 1) - x(index)), Math.max(1.5, y(row + 1) - y(row))];
        items.push({ rect, fill: colourAt(colours, Math.sqrt(weight / this.top)), clip });
      }
    }
    return items;
  }

  axes({ left, top, w, h, rowWords, columnWords }, x, y, ink) {
    const { q0, q1, k0, k1 } = this.window, items = [];
    const { keyTokens } = this.input;
    if (rowWords) {
      for (let row = Math.ceil(q0 - 0.5); row < q1 - 0.5; row++) {
        items.push({ text: named(this.input.queryText(row), 14), x: left - 5, y: y(row + 0.5), fill: ink.ink, align: "right" });
      }
    } else {
      for (const at of ticks(q0, q1, 6)) if (Number.isInteger(at) && at < q1) items.push({ text: whole(at), x: left - 5, y: y(at + 0.5), fill: ink.soft, align: "right", size: 10 });
    }
    if (columnWords) {
      for (let key = Math.ceil(k0 - 0.5); key < k1 - 0.5; key++) {
        items.push({ text: named(keyTokens[key], 11), x: x(key + 0.5), y: top - 5, fill: ink.ink, rotate: -90 });
      }
    } else {
      for (const at of ticks(k0, k1, Math.max(2, w / 90))) if (Number.isInteger(at) && at < k1) items.push({ text: whole(at), x: x(at + 0.5), y: top - 9, fill: ink.soft, align: "center", size: 10 });
    }
    if (!rowWords) items.push({ text: "query", x: 8, y: top + h / 2, fill: ink.soft, rotate: -90, align: "center", size: 10 });
    if (!rowWords && !columnWords) items.push({ text: "key", x: 18, y: top - 9, fill: ink.soft, align: "center", size: 10 });
    return items;
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => {
      const { items, laid } = this.items();
      this.laid = laid;
      paint(sized(this.canvas, laid.width, laid.height), items);
      this.note.textContent = this.trouble || this.meaning();
      this.sharpen();
      this.canvas.style.touchAction = this.zoomed() ? "none" : "pan-y";
    });
  }

  // What a pixel is, in words.
  meaning() {
    const { q0, q1, k0, k1 } = this.window, map = this.finest();
    if (this.singles()) {
      return `Single tokens: weights of each query's ${this.detail.k} heaviest keys. Behind them, faint, the pooled map.`;
    }
    if (span(map.rows) === "1" && span(map.columns) === "1") return "A cell is one query and one key: the weight itself.";
    const more = this.detail || (server && !this.difference) ? " Zoom in for single tokens." : this.difference ? "" : ` ${advice(this.layer, this.head)}`;
    const view = this.zoomed() ? ` In view: queries ${Math.floor(q0)}–${Math.ceil(q1) - 1}, keys ${Math.floor(k0)}–${Math.ceil(k1) - 1}.` : "";
    return `A cell is ${counted(map.rows, "query", "queries")} and ${counted(map.columns, "key", "keys")}: what its queries put on its keys together, as a mean.${view}${more}`;
  }

  // ---- moving ------------------------------------------------------------------------------------

  zoomed() {
    const all = this.whole(), { q0, q1, k0, k1 } = this.window;
    return q1 - q0 < all.q1 - all.q0 || k1 - k0 < all.k1 - all.k0;
  }

  // Halve (0.5) or double (2) what is in view, around a place.
  zoom(factor, around = null) {
    const { q0, q1, k0, k1 } = this.window, all = this.whole();
    const centre = around ?? { query: (q0 + q1) / 2, key: (k0 + k1) / 2, x: 0.5, y: 0.5 };
    const rows = Math.min(all.q1 - all.q0, Math.max(Math.min(6, all.q1 - all.q0), (q1 - q0) * factor));
    const columns = Math.min(all.k1 - all.k0, Math.max(Math.min(6, all.k1 - all.k0), (k1 - k0) * factor));
    this.show(centre.query - centre.y * rows, rows, centre.key - centre.x * columns, columns);
  }

  show(q0, rows, k0, columns) {
    const all = this.whole();
    const begin = Math.max(all.q0, Math.min(q0, all.q1 - rows)), first = Math.max(all.k0, Math.min(k0, all.k1 - columns));
    this.window = { q0: begin, q1: begin + rows, k0: first, k1: first + columns };
    this.draw();
    this.on.window?.(this);
  }

  reset() { const all = this.whole(); this.show(all.q0, all.q1 - all.q0, all.k0, all.k1 - all.k0); }

  pan(rows, columns) {
    const { q0, q1, k0, k1 } = this.window;
    this.show(q0 + rows * (q1 - q0), q1 - q0, k0 + columns * (k1 - k0), k1 - k0);
  }

  // Follow another map's window, in shares of the whole.
  follow(other) {
    const mine = this.whole(), theirs = other.whole(), { q0, q1, k0, k1 } = other.window;
    const at = (value, low, high, to, end) => to + ((value - low) / (high - low)) * (end - to);
    const query = (value) => at(value, theirs.q0, theirs.q1, mine.q0, mine.q1), key = (value) => at(value, theirs.k0, theirs.k1, mine.k0, mine.k1);
    this.window = { q0: query(q0), q1: query(q1), k0: key(k0), k1: key(k1) };
    this.draw();
  }

  point(row, key) {
    this.cross = row === null ? null : { row, key };
    this.draw();
  }

  // ---- the pointer and the keyboard --------------------------------------------------------------

  pointerdown(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, event);
    this.moved = 0;
  }

  pointermove(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return this.hover(event);
    const { w, h } = this.laid;
    if (this.pointers.size === 2) {
      const apart = () => { const [a, b] = [...this.pointers.values()]; return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY); };
      const was = apart();
      this.pointers.set(event.pointerId, event);
      this.zoom(was / Math.max(apart(), 1), this.locate(event));
    } else if (this.zoomed()) {
      this.pan((before.clientY - event.clientY) / h, (before.clientX - event.clientX) / w);
    }
    this.moved += Math.abs(event.clientX - before.clientX) + Math.abs(event.clientY - before.clientY);
    this.pointers.set(event.pointerId, event);
  }

  pointerup(event) {
    const held = this.pointers.delete(event.pointerId);
    const at = this.locate(event);
    if (held && this.moved < 5 && at && this.on.pick) this.on.pick(Math.floor(at.query));
  }

  pointercancel(event) { this.pointers.delete(event.pointerId); }

  pointerleave() {
    hideTip();
    this.on.hover?.(null, null);
  }

  wheel(event) {
    event.preventDefault();
    this.zoom(2 ** (Math.max(-120, Math.min(120, event.deltaY)) / 160), this.locate(event));
    this.hover(event);
  }

  // A click opens a token, so two of them do not zoom.
  dblclick(event) { event.preventDefault(); }

  keydown(event) {
    const pan = event.shiftKey && { ArrowUp: [-0.25, 0], ArrowDown: [0.25, 0], ArrowLeft: [0, -0.25], ArrowRight: [0, 0.25] }[event.key];
    if (pan) this.pan(...pan);
    else if (event.key === "+" || event.key === "=") this.zoom(0.5);
    else if (event.key === "-") this.zoom(2);
    else if (event.key === "0") this.reset();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  hover(event) {
    const at = this.locate(event);
    if (!at) return this.pointerleave();
    const query = Math.floor(at.query), key = Math.floor(at.key);
    this.on.hover?.(query, key);
    showTip(event, this.lines(query, key));
  }

  // Whether a cell is one query and one key.
  single(map, { r, c }) { return map.rows[r + 1] - map.rows[r] === 1 && map.columns[c + 1] - map.columns[c] === 1; }

  // The tooltip: which tokens, and the numbers there.
  lines(query, key) {
    const lines = [];
    if (!this.difference) {
      lines.push(`query ${whole(query)}  ${named(this.input.queryText(query))}`, `key ${whole(key)}  ${named(this.input.keyTokens[key])}`);
    }
    const map = [...this.maps, this.exact].findLast((one) => one?.at(query, key));
    const cell = map?.at(query, key);
    if (cell) {
      const rows = map.rows[cell.r + 1] - map.rows[cell.r], columns = map.columns[cell.c + 1] - map.columns[cell.c];
      const what = this.single(map, cell) ? "weight" : `cell of ${whole(rows)} × ${whole(columns)}: mass`;
      lines.push(`${what} ${bounded(cell.value, cell.error)}`);
    }
    if (this.detail && !(map === this.exact && cell && this.single(map, cell))) {
      const known = this.detail.ofRow(query);
      const rank = known.findIndex(({ index }) => index === key);
      if (rank >= 0) lines.push(`weight ${bounded(known[rank].weight, known[rank].error)}, heaviest key no. ${rank + 1}`);
      else if (known.length === this.detail.k) lines.push(`weight at most ${number(known.at(-1).weight)}: not among the ${this.detail.k} heaviest`);
    }
    return lines;
  }
}

// A map as a canvas of one pixel a cell.
function cells(map, colours, top) {
  const canvas = el("canvas", { width: map.width, height: map.height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(map.width, map.height), pixels = new Uint32Array(image.data.buffer);
  const packed = Uint32Array.from({ length: 256 }, (_, i) => 0xff000000 + colours[3 * i] + colours[3 * i + 1] * 256 + colours[3 * i + 2] * 65536);
  const shares = map.shares(top);
  for (let i = 0; i < pixels.length; i++) pixels[i] = packed[Math.min(255, (255 * shares[i] + 0.5) | 0)];
  context.putImageData(image, 0, 0);
  return canvas;
}

// How many tokens a cell has: "512", or "42–43".
function span(edges) {
  let least = Infinity, most = 0;
  for (let i = 0; i + 1 < edges.length; i++) {
    least = Math.min(least, edges[i + 1] - edges[i]);
    most = Math.max(most, edges[i + 1] - edges[i]);
  }
  return least === most ? whole(least) : `${whole(least)}–${whole(most)}`;
}

// The same with its noun.
function counted(edges, one, many) {
  const count = span(edges);
  return count === "1" ? `one ${one}` : `${count} ${many}`;
}

// How to get the single tokens that this page does not keep.
function advice(layer, head) {
  if (!layer.k) return "For single tokens, observe with mh.TopKeys(8).";
  return `This page keeps no single tokens of this head: mh.view(…, detail=[("${layer.name}", ${layer.heads[head]})]) does.`;
}
