// One token in one head: what it attends to, or who attends to it, in numbers and over the text.

class TokenView {
  constructor() {
    this.input = inputs[state.input];
    this.layer = this.input.layers[state.layer];
    const { input, layer } = this, row = state.row, token = input.tokenOf(row);
    const button = (label, name, action, on) => el("button", { type: "button", "aria-label": name, onclick: action, "aria-pressed": on === undefined ? null : String(on) }, label);
    const title = el("div", { class: "title" },
      button("←", "Previous token", () => this.step(-1)),
      el("h2", {}, el("bdi", { class: "word" }, named(input.queryText(row), 40)), el("span", { class: "soft" }, ` token ${whole(token)}`)),
      button("→", "Next token", () => this.step(1)),
      el("span", { class: "path" }, `layer ${state.layer}, head ${layer.heads[state.head]}${inputs.length > 1 ? `, input ${input.name}` : ""}`));
    const ways = el("div", { class: "segments", role: "group", "aria-label": "Direction" },
      button("attends to", "What it attends to", () => go({ way: "to" }), state.way === "to"),
      button("is attended by", "Which tokens attend to it", () => go({ way: "by" }), state.way === "by"));
    this.facts = el("p", { class: "facts" });
    this.where = el("canvas", { class: "where", role: "img", "aria-label": "Where in the text the attention lies" });
    this.body = el("div", { class: "tokenbody" });
    this.element = el("div", { class: "tokenview" }, title, this.facts, ways, el("figure", { class: "strip" }, el("figcaption", {}, "where in the text"), this.where), this.body);
    this.facts.textContent = layer.strips.filter((strip) => strip.axis === "query").map((strip) => {
      const bin = cellOf(strip.edges, row), { unit } = strip, single = strip.edges[bin + 1] - strip.edges[bin] === 1;
      return `${strip.label} ${bounded(strip.value(state.head, bin), strip.error(state.head))}${unit ? ` ${unit}` : ""}${single ? "" : ` (${tokensOf(strip, bin)})`}`;
    }).join(" · ");
    this.where.addEventListener("click", (event) => {
      const box = this.where.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
      scrollText(input, this.side(), Math.floor(Math.max(0, Math.min(0.99999, share)) * this.count()));
    });
    this.resize = new ResizeObserver(() => this.found && this.draw());
    this.resize.observe(this.element);
  }

  // The side of the text that the answers lie on, and how long it is.
  side() { return state.way === "to" ? "key" : "query"; }

  count() { return state.way === "to" ? this.input.keys : this.input.queries; }

  async start() {
    const { input } = this, key = input.queryTokens ? -1 : input.tokenOf(state.row);
    if (state.way === "by" && key < 0) {
      this.found = { single: false, cells: [], entries: [] };
      this.body.replaceChildren(el("p", { class: "message" }, "Queries and keys are two texts here: this token is a query, and nothing attends to it."));
    } else {
      for await (const found of answers(input, state.layer, state.head, state.row, state.way)) {
        if (this.stopped) return;
        const first = !this.found;
        this.found = found;
        this.body.replaceChildren(...this.tables());
        this.draw();
        if (first) scrollText(input, "query", state.row);
      }
    }
    this.draw();
    await this.colourText();
  }

  tables() {
    const { found, input, layer } = this, parts = [];
    if (found.single) parts.push(this.table(found.entries.slice(0, 50)));
    const known = found.entries.reduce((sum, { weight }) => sum + weight, 0);
    if (found.exact) {
      const [one, many] = state.way === "to" ? ["key", "keys"] : ["query", "queries"];
      parts.push(el("p", { class: "note" }, `Exact: ${whole(found.entries.length)} ${found.entries.length === 1 ? one : many} with ${number(known)} together${found.entries.length > 50 ? "; the first 50 are listed" : ""}.`));
    } else if (found.single && state.way === "to") {
      parts.push(el("p", { class: "note" }, `These ${found.entries.length} keys have ${number(known)} of 1; the page keeps no more than ${layer.k} a query.`));
    } else if (found.single) {
      parts.push(el("p", { class: "note" }, `${whole(found.entries.length)} queries have it among their ${layer.k} heaviest keys${found.entries.length > 50 ? "; the first 50 are listed" : ""}.`));
    } else {
      parts.push(el("p", { class: "message" }, `Pooled: this head's map is known, its single tokens are not. ${server ? found.trouble ?? "Asking the server for them…" : advice(layer, state.head)}`), this.cellTable(found.cells.slice(0, 12)));
    }
    return parts;
  }

  table(entries) {
    const { input } = this, to = state.way === "to", text = to ? input.keyTokens : input.queryTokens ?? input.keyTokens;
    const pieces = to ? input.keyPieces : input.queryPieces ?? input.keyPieces;
    const most = Math.max(...entries.map(({ weight }) => weight), 1e-9);
    const rows = entries.map(({ index, weight, error }) => {
      const token = to ? index : input.tokenOf(index);
      const near = (from, end) => pieces.slice(Math.max(0, from), Math.max(0, end)).map((one, i) => spelled(one, text[Math.max(0, from) + i])).join("");
      const meter = el("span", { class: "meter" });
      meter.style.width = `${(100 * weight) / most}%`;
      const context = el("td", { class: "context" },
        el("bdi", { class: "soft" }, near(token - 4, token)), el("bdi", { class: "word" }, shown(text[token])), el("bdi", { class: "soft" }, near(token + 1, token + 4)));
      const distance = to ? input.position(state.row) - index : input.position(index) - input.tokenOf(state.row);
      const row = el("tr", { tabindex: "0", onclick: () => scrollText(input, this.side(), index), onkeydown: (event) => event.key === "Enter" && scrollText(input, this.side(), index) },
        el("td", { class: "weight" }, meter, el("span", {}, bounded(weight, error))), context, el("td", { class: "n" }, whole(token)), el("td", { class: "n" }, input.queryTokens ? "" : whole(distance)));
      return row;
    });
    const head = ["weight, of 1", to ? "key, among its neighbours" : "query, among its neighbours", "place", input.queryTokens ? "" : "tokens back"];
    return el("table", {}, el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, ...rows));
  }

  cellTable(cells) {
    const rows = cells.map(({ first, last, mass, error }) => el("tr", { tabindex: "0", onclick: () => scrollText(this.input, this.side(), first) },
      el("td", { class: "n" }, bounded(mass, error)), el("td", { class: "n" }, first === last ? whole(first) : `${whole(first)}–${whole(last)}`)));
    const head = [state.way === "to" ? "mass, of 1" : "mean mass of a query", state.way === "to" ? "keys" : "queries"];
    return el("table", { class: "cells" }, el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, ...rows));
  }

  items() {
    const width = Math.max(160, this.element.clientWidth), height = 34, ink = inks(), colours = ramp("map"), count = this.count();
    const items = [{ rect: [0, 12, width, 14], fill: colourAt(colours, 0) }];
    items.push({ rect: [0.5, 12.5, width - 1, 13], stroke: ink.line });
    const x = (index) => (index / count) * width;
    const most = Math.max(...this.found.cells.map(({ mass }) => mass), 1e-9);
    for (const { first, last, mass } of this.found.cells) {
      items.push({ rect: [x(first), 12, x(last + 1) - x(first) + 0.5, 14], fill: colourAt(colours, Math.sqrt(mass / most)) });
    }
    const heaviest = this.found.entries[0]?.weight ?? 1;
    for (const { index, weight } of this.found.entries.slice(0, 200)) {
      const tall = 2 + 9 * Math.sqrt(weight / heaviest);
      items.push({ rect: [x(index), 12 - tall, Math.max(2, x(index + 1) - x(index)), tall], fill: ink.accent });
    }
    if (!this.input.queryTokens) {
      const at = x((this.input.tokenOf(state.row) + 0.5) * (count / this.input.keys));
      items.push({ path: [[at, 27], [at - 4, 34], [at + 4, 34]], fill: ink.mark });
    }
    return { items, width, height };
  }

  draw() {
    const { items, width, height } = this.items();
    paint(sized(this.where, width, height), items);
  }

  async colourText() { await tintByRow(this.input, state.layer, state.head, state.row, state.way); }

  async hoverText(reader, token) {
    if (token < 0) await this.colourText();
  }

  step(by) {
    go({ row: Math.max(0, Math.min(this.input.queries - 1, state.row + by)) });
  }

  keydown(event) {
    if (event.shiftKey || event.altKey) return false;
    if (event.key === "ArrowLeft") stepHead(0, -1);
    else if (event.key === "ArrowRight") stepHead(0, 1);
    else if (event.key === "ArrowUp") stepHead(-1, 0);
    else if (event.key === "ArrowDown") stepHead(1, 0);
    else if (event.key === "," || event.key === "[") this.step(-1);
    else if (event.key === "." || event.key === "]") this.step(1);
    else return false;
    return true;
  }

  csv() {
    const { input } = this, to = state.way === "to", text = to ? input.keyTokens : input.queryTokens ?? input.keyTokens;
    if (!this.found.single) return [[to ? "first key" : "first query", to ? "last key" : "last query", "mass"], ...this.found.cells.map(({ first, last, mass }) => [first, last, mass])];
    const rows = this.found.entries.map(({ index, weight }, rank) => [rank + 1, to ? index : input.tokenOf(index), text[to ? index : input.tokenOf(index)], weight]);
    return [["rank", to ? "key" : "query", "token", "weight"], ...rows];
  }

  scene() {
    const ink = inks(), { items, width } = this.items(), list = [];
    const title = `${named(this.input.queryText(state.row), 40)}, token ${this.input.tokenOf(state.row)}: layer ${state.layer}, head ${this.layer.heads[state.head]}`;
    const rows = this.found.single ? this.found.entries.slice(0, 20).map(({ index, weight }) => {
      const token = state.way === "to" ? index : this.input.tokenOf(index), text = state.way === "to" ? this.input.keyTokens : this.input.queryTokens ?? this.input.keyTokens;
      return [weight, `${named(text[token])}  ${token}`];
    }) : this.found.cells.slice(0, 12).map(({ first, last, mass }) => [mass, `${first}–${last}`]);
    const most = Math.max(...rows.map(([weight]) => weight), 1e-9);
    rows.forEach(([weight, label], i) => {
      list.push({ rect: [0, 8 + 22 * i, Math.max(1, 160 * (weight / most)), 14], fill: ink.accent, alpha: 0.5 });
      list.push({ text: number(weight), x: 4, y: 15 + 22 * i, fill: ink.ink }, { text: label, x: 176, y: 15 + 22 * i, fill: ink.ink });
    });
    return stacked([{ items, width, height: 36, caption: title }, { items: list, width, height: 16 + 22 * rows.length }]);
  }

  stop() {
    this.stopped = true;
    this.resize.disconnect();
  }
}

// The page's own answer; then, where the page is served, the exact one, if somebody still wants it.
async function* answers(input, layerIndex, head, row, way = "to", wanted = () => true) {
  const own = await attention(input, layerIndex, head, row, way);
  yield own;
  if (!server) return;
  await new Promise((resolve) => setTimeout(resolve, 60));
  if (!wanted()) return;
  try {
    const entries = await server.weights(input, input.layers[layerIndex], head, row, way);
    yield { ...own, entries, single: true, exact: true };
  } catch (problem) {
    yield { ...own, trouble: problem.message };
  }
}

// What a row attends to ("to"), or who attends to the token of that row ("by").
//
// {single: whether single tokens are known, entries: [{index, weight, error}], cells: [{first, last,
// mass, error}] of the pooled map, heaviest first}.
async function attention(input, layerIndex, head, row, way = "to") {
  const layer = input.layers[layerIndex], detail = await layer.detail(head);
  const map = layer.maps[head][0], token = input.tokenOf(row), cells = [];
  if (map && way === "to") {
    const r = cellOf(map.rows, row);
    for (let c = 0; r >= 0 && c < map.width; c++) {
      cells.push({ first: map.columns[c], last: map.columns[c + 1] - 1, mass: map.value(r, c), error: map.error(r, c) });
    }
  } else if (map) {
    const c = cellOf(map.columns, token);
    for (let r = 0; c >= 0 && r < map.height; r++) {
      cells.push({ first: map.rows[r], last: map.rows[r + 1] - 1, mass: map.value(r, c), error: map.error(r, c) });
    }
  }
  cells.sort((a, b) => b.mass - a.mass);
  const single = detail ? (way === "to" ? detail.ofRow(row) : detail.ofKey(token)) : null;
  if (single) return { single: true, entries: single, cells };
  // A map whose cells are single tokens says it all.
  const fine = map && cells.every(({ first, last }) => first === last) && span(map.rows) === "1" && span(map.columns) === "1";
  const entries = fine ? cells.filter(({ mass }) => mass > 0).map(({ first, mass, error }) => ({ index: first, weight: mass, error })) : [];
  return { single: Boolean(fine), entries, cells };
}
