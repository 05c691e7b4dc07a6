// Asking the server of this page (serving.py) for what the page itself keeps only roughly. A page that
// is a file has no such part, and no connection.

// A window of one head's map, exact; the same interface as HeadMap's.
class ExactMap {
  constructor(rows, columns, values) {
    Object.assign(this, { label: "exact", rows, columns, values, height: rows.length - 1, width: columns.length - 1 });
    this.top = values.reduce((a, b) => Math.max(a, b), 0);
  }

  value(r, c) { return this.values[r * this.width + c]; }

  error() { return 0; }

  at(query, key) {
    const r = cellOf(this.rows, query), c = cellOf(this.columns, key);
    return r < 0 || c < 0 ? null : { r, c, value: this.value(r, c), error: 0 };
  }

  share(r, c, top) { return top ? Math.sqrt(this.value(r, c) / top) : 0; }

  shares(top) { return this.values.map((value) => (top ? Math.sqrt(value / top) : 0)); }
}

// Where HeatMap's cells begin, and the end: index i of n falls into cell floor(i * cells / n).
function edgesOf(begin, end, cells) {
  return Array.from({ length: cells + 1 }, (_, cell) => begin + Math.ceil((cell * (end - begin)) / cells));
}

class PageServer {
  constructor() { this.answers = new Map(); }

  // Float32 numbers; an Error with the server's words.
  async ask(path, given, signal) {
    let answer;
    try {
      answer = await fetch(`${path}?${new URLSearchParams(given)}`, { signal });
    } catch (problem) {
      if (problem.name === "AbortError") throw problem;
      throw new Error("The server does not answer: is `manyheads see --serve` still running? Shown is what the page keeps.");
    }
    if (!answer.ok) throw new Error(`The server says: ${(await answer.json()).error}`);
    return new Float32Array(await answer.arrayBuffer());
  }

  where(input, layer, head) { return { input: inputs.indexOf(input), layer: input.layers.indexOf(layer), head: layer.heads[head] }; }

  // The window {q0, q1, k0, k1} in at most `cells` a side.
  async zoom(input, layer, head, { q0, q1, k0, k1 }, cells, signal) {
    const rows = Math.min(cells, q1 - q0), columns = Math.min(cells, k1 - k0);
    const given = { ...this.where(input, layer, head), queries: `${q0},${q1}`, keys: `${k0},${k1}`, rows, columns };
    return new ExactMap(edgesOf(q0, q1, rows), edgesOf(k0, k1, columns), await this.ask("zoom", given, signal));
  }

  // All that a row gives, or that its token gets: [{index, weight, error}], heaviest first.
  async weights(input, layer, head, row, way) {
    const line = way === "to" ? { row } : { key: input.tokenOf(row) };
    const path = way === "to" ? "row" : "column", given = { ...this.where(input, layer, head), ...line };
    const name = path + JSON.stringify(given);
    if (!this.answers.has(name)) {
      if (this.answers.size > 50) this.answers.delete(this.answers.keys().next().value);
      this.answers.set(name, this.ask(path, given).then(heaviestFirst));
      this.answers.get(name).catch(() => this.answers.delete(name));
    }
    return this.answers.get(name);
  }
}

function heaviestFirst(weights) {
  const found = [];
  weights.forEach((weight, index) => { if (weight > 0) found.push({ index, weight, error: 0 }); });
  return found.sort((a, b) => b.weight - a.weight);
}

server = new PageServer();
