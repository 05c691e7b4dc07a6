// What the page holds: reading it back (packing.py wrote it), and asking it.

const meta = JSON.parse(document.getElementById("data").textContent);

// Who can say more than the page keeps (served.js); a page that is a file has nobody.
let server = null;

async function bytesOf(blob) {
  const text = document.getElementById(`blob-${blob}`).textContent;
  const packed = Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Unsigned integers from planes of bytes, lowest first.
async function numbersOf(reference) {
  const bytes = await bytesOf(reference.blob);
  if (reference.bits === 8) return bytes;
  const count = reference.shape.reduce((a, b) => a * b, 1);
  const numbers = reference.bits === 16 ? new Uint16Array(count) : new Uint32Array(count);
  for (let plane = 0; plane < reference.bits / 8; plane++) {
    for (let i = 0; i < count; i++) numbers[i] += bytes[plane * count + i] * 2 ** (8 * plane);
  }
  return numbers;
}

// The place in ascending `edges` whose cell holds `index`; -1 outside.
function cellOf(edges, index) {
  if (!(index >= edges[0] && index < edges[edges.length - 1])) return -1;
  let low = 0, high = edges.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (edges[middle] <= index) low = middle; else high = middle;
  }
  return low;
}

// A map of one head: cells are masses, means over the queries of a cell.
class HeadMap {
  constructor(of, codes, head) {
    [this.label, this.rows, this.columns] = [of.label, meta.edges[of.rows], meta.edges[of.columns]];
    this.height = this.rows.length - 1;
    this.width = this.columns.length - 1;
    this.top = of.tops[head];
    this.levels = 2 ** of.cells.bits - 1;
    this.codes = codes.subarray(head * this.height * this.width, (head + 1) * this.height * this.width);
  }

  value(r, c) { return this.top * (this.codes[r * this.width + c] / this.levels) ** 2; }

  // Where colours end: 99 of a hundred cells that have mass have less. The first queries of a causal
  // head, which have little choice, would leave no colour to the others.
  get bright() {
    if (this.kept !== undefined) return this.kept;
    const codes = this.codes.filter((code) => code > 0).sort();
    const code = codes.length < 400 ? this.levels : codes[Math.floor(0.99 * (codes.length - 1))];
    return (this.kept = this.top * (code / this.levels) ** 2);
  }

  // How far value() may be off, by rounding alone.
  error(r, c) { return (this.top * (this.codes[r * this.width + c] + 0.25)) / this.levels ** 2; }

  // {r, c, value, error} of the cell that holds a query and a key, or null.
  at(query, key) {
    const r = cellOf(this.rows, query), c = cellOf(this.columns, key);
    return r < 0 || c < 0 ? null : { r, c, value: this.value(r, c), error: this.error(r, c) };
  }

  // 0 to 1: where a cell stands on the square-root scale that ends at `top`.
  share(r, c, top) { return this.codes[r * this.width + c] * this.scale(top); }

  scale(top) { return top ? Math.sqrt(this.top / top) / this.levels : 0; }

  // The same of all cells, row by row.
  shares(top) {
    const scale = this.scale(top), shares = new Float32Array(this.codes.length);
    for (let i = 0; i < shares.length; i++) shares[i] = this.codes[i] * scale;
    return shares;
  }
}

// One input's map less the other's; both have as many cells, each input's own lengths.
class DifferenceMap {
  constructor(first, second) {
    Object.assign(this, { first, second, label: "difference, A less B", rows: first.rows });
    Object.assign(this, { columns: first.columns, height: first.height, width: first.width });
    this.top = 0;
    for (let r = 0; r < this.height; r++) {
      for (let c = 0; c < this.width; c++) this.top = Math.max(this.top, Math.abs(this.value(r, c)));
    }
  }

  get bright() { return this.top; }

  static fits(first, second) { return first && second && first.height === second.height && first.width === second.width; }

  value(r, c) { return this.first.value(r, c) - this.second.value(r, c); }

  error(r, c) { return this.first.error(r, c) + this.second.error(r, c); }

  at(query, key) {
    const r = cellOf(this.rows, query), c = cellOf(this.columns, key);
    return r < 0 || c < 0 ? null : { r, c, value: this.value(r, c), error: this.error(r, c) };
  }

  share(r, c, top) {
    const value = this.value(r, c);
    return top ? 0.5 + 0.5 * Math.sign(value) * Math.sqrt(Math.min(1, Math.abs(value) / top)) : 0.5;
  }

  shares(top) {
    const shares = new Float32Array(this.height * this.width);
    for (let i = 0; i < shares.length; i++) shares[i] = this.share(Math.floor(i / this.width), i % this.width, top);
    return shares;
  }
}

// One measure of one layer along the queries or keys: means over bins of tokens.
class Strip {
  constructor(of, codes) {
    Object.assign(this, { label: of.label, unit: of.unit, axis: of.axis, low: of.low, high: of.high });
    this.edges = meta.edges[of.edges];
    this.bins = this.edges.length - 1;
    this.levels = 2 ** of.values.bits - 2;
    this.codes = codes;
    this.heads = of.low.length;
    this.lowest = Math.min(...of.low);
    this.highest = Math.max(...of.high);
  }

  // NaN where there is no number.
  value(head, bin) {
    const code = this.codes[head * this.bins + bin];
    return code ? this.low[head] + ((code - 1) / this.levels) * (this.high[head] - this.low[head]) : NaN;
  }

  // The mean over the layer's heads, of every bin.
  ofLayer() { return (this.kept ??= Float64Array.from({ length: this.bins }, (_, bin) => this.mean(bin))); }

  mean(bin) {
    let sum = 0, count = 0;
    for (let head = 0; head < this.heads; head++) {
      const value = this.value(head, bin);
      if (!Number.isNaN(value)) [sum, count] = [sum + value, count + 1];
    }
    return count ? sum / count : NaN;
  }

  error(head) { return (this.high[head] - this.low[head]) / this.levels / 2; }
}

// The heaviest keys of each row of one head.
class Heaviest {
  constructor(of, keys, weights) {
    [this.k, this.queries] = of.keys.shape;
    Object.assign(this, { keys, weights, none: 2 ** of.keys.bits - 1, levels: 2 ** of.weights.bits - 1 });
  }

  weight(rank, row) { return (this.weights[rank * this.queries + row] / this.levels) ** 2; }

  error(rank, row) { return (this.weights[rank * this.queries + row] + 0.25) / this.levels ** 2; }

  key(rank, row) {
    const key = this.keys[rank * this.queries + row];
    return key === this.none ? -1 : key;
  }

  // [{index, weight, error}], heaviest first: the keys of a row.
  ofRow(row) {
    const found = [];
    for (let rank = 0; rank < this.k; rank++) {
      const index = this.key(rank, row);
      if (index >= 0) found.push({ index, weight: this.weight(rank, row), error: this.error(rank, row) });
    }
    return found;
  }

  // The same of a key: the rows that have it among their heaviest.
  ofKey(key) {
    const found = [];
    for (let at = 0; at < this.keys.length; at++) {
      if (this.keys[at] !== key) continue;
      const rank = Math.floor(at / this.queries), index = at % this.queries;
      found.push({ index, weight: this.weight(rank, index), error: this.error(rank, index) });
    }
    return found.sort((a, b) => b.weight - a.weight);
  }
}

class Layer {
  constructor(of) {
    Object.assign(this, { of, name: of.name, heads: of.heads, means: of.means, k: of.k });
    this.details = new Map();
  }

  async load() {
    const loaded = await Promise.all(this.of.maps.map((one) => numbersOf(one.cells)));
    this.maps = this.heads.map((_, head) => this.of.maps.map((one, i) => new HeadMap(one, loaded[i], head)));
    const codes = await Promise.all(this.of.strips.map((one) => numbersOf(one.values)));
    this.strips = this.of.strips.map((one, i) => new Strip(one, codes[i]));
  }

  // The heaviest keys of a head, or null where the page does not keep them.
  async detail(head) {
    if (!this.details.has(head)) {
      const of = this.of.detail[head];
      const read = of && (await Promise.all([numbersOf(of.keys), numbersOf(of.weights)]));
      this.details.set(head, of ? new Heaviest(of, ...read) : null);
    }
    return this.details.get(head);
  }
}

class Input {
  constructor(of, name) {
    Object.assign(this, { of, name, queries: of.queries, keys: of.keys });
    this.layers = of.layers.map((layer) => new Layer(layer));
  }

  async load() {
    const texts = await Promise.all(this.of.texts.map(bytesOf));
    // What each token adds to the text; and its name, which is another where it is part of a letter.
    const read = (text) => JSON.parse(new TextDecoder().decode(text));
    [this.keyPieces, this.queryPieces] = texts.map(read);
    const names = (await Promise.all(this.of.names.map(bytesOf))).map(read);
    [this.keyTokens, this.queryTokens] = [this.keyPieces, this.queryPieces].map((pieces, i) => pieces?.map((piece, token) => names[i][token] ?? piece));
    const { start } = this.of.positions;
    const offsets = this.of.positions.blob === undefined ? null : await numbersOf(this.of.positions);
    this.position = (row) => start + (offsets ? offsets[row] : row);
    // The row of a token of the text that queries are shown in; -1 if it asks nothing.
    const rows = new Int32Array(this.queryTokens ? this.queries : this.keys).fill(-1);
    for (let row = 0; row < this.queries; row++) rows[this.queryTokens ? row : this.position(row)] = row;
    this.rowOf = (token) => rows[token] ?? -1;
    this.tokenOf = (row) => (this.queryTokens ? row : this.position(row));
    await Promise.all(this.layers.map((layer) => layer.load()));
  }

  queryText(row) { return (this.queryTokens ?? this.keyTokens)[this.tokenOf(row)]; }
}
