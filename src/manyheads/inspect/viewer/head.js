// One head: its map, its measures along the text, and on hover what a token attends to.

class HeadView {
  constructor() {
    this.inputs = chosenInputs();
    const layer = this.inputs[0].layers[state.layer], number = layer.heads[state.head];
    this.maps = [];
    this.charts = [];
    this.mapsPlace = el("div", { class: "maps" });
    this.legendPlace = el("div", { class: "legends" });
    const previous = el("button", { type: "button", "aria-label": "Previous head", onclick: () => stepHead(0, -1) }, "←");
    const next = el("button", { type: "button", "aria-label": "Next head", onclick: () => stepHead(0, 1) }, "→");
    const title = el("div", { class: "title" }, previous, el("h2", {}, `Layer ${state.layer}, head ${number}`), next, el("span", { class: "path" }, layer.name), this.legendPlace);
    const charts = el("div", { class: "strips" });
    this.element = el("div", { class: "headview" }, title, this.mapsPlace, charts);
    for (const strip of layer.strips) charts.append(this.chart(strip));
  }

  chart({ label, unit }) {
    const series = this.inputs.map((input) => ({ input, head: state.head, strip: input.layers[state.layer].strips.find((one) => one.label === label) })).filter(({ strip }) => strip);
    const chart = new StripChart({
      label, unit, series,
      on: {
        hover: (at) => markText(series[0].input, series[0].strip.axis, at ?? -1, "cursor"),
        pick: (at) => scrollText(series[0].input, series[0].strip.axis, at),
      },
    });
    this.charts.push(chart);
    return chart.element;
  }

  // After the head's single tokens are read.
  async start() {
    const details = await Promise.all(this.inputs.map((input) => input.layers[state.layer].detail(state.head)));
    if (this.stopped) return;
    const sources = this.inputs.map((input) => input.layers[state.layer].maps[state.head]);
    if (!sources[0].length) {
      this.mapsPlace.replaceChildren(el("p", { class: "message" }, "No map was measured: observe with mh.HeatMap(64, 64) or mh.TopKeys(8) to see one."));
    } else if (state.mode === "difference") {
      this.difference(sources);
    } else {
      this.maps = this.inputs.map((input, i) => this.map(input, sources[i], details[i]));
      const top = Math.max(...this.maps.map((map) => map.bright));
      for (const map of this.maps) map.top = top;
      this.legendPlace.replaceChildren(legend("map", 0, top, `mass on a cell's keys, of 1${sources[0][0].label.startsWith("pooled") ? "" : ` (${sources[0][0].label})`}`, { more: this.maps.some((map) => map.most > top) }));
    }
    this.mapsPlace.append(...this.maps.map((map) => map.element));
  }

  map(input, maps, detail) {
    return new MapView({
      input, head: state.head, maps, detail,
      layer: input.layers[state.layer],
      title: inputs.length > 1 ? `Input ${input.name}` : "",
      on: {
        hover: (row, key) => this.hover(input, row, key),
        pick: (row) => go({ view: "token", row, input: inputs.indexOf(input) }),
        window: (moved) => this.maps.forEach((map) => map !== moved && map.follow(moved)),
      },
    });
  }

  difference(sources) {
    if (!DifferenceMap.fits(sources[0][0], sources[1][0])) {
      this.mapsPlace.replaceChildren(el("p", { class: "message" }, "The two inputs' maps have different numbers of cells: give HeatMap as many rows and columns as the shorter text has tokens, or fewer."));
      return;
    }
    const map = new DifferenceMap(sources[0][0], sources[1][0]);
    this.legendPlace.replaceChildren(legend("difference", -map.top, map.top, "mass: A less B"));
    this.maps = [new MapView({ input: inputs[0], layer: inputs[0].layers[state.layer], head: state.head, maps: [map], difference: true, title: "A less B", on: {} })];
  }

  hover(input, row, key) {
    markText(input, "query", row ?? -1, "query", key ?? -1);
    for (const chart of this.charts) {
      const { input: charted, strip } = chart.series[0];
      if (charted === input) chart.point(strip.axis === "key" ? key : row);
    }
  }

  // A token of the text under the pointer: what it attends to, over the text.
  async hoverText(reader, token) {
    const row = reader.side === "key" ? -1 : reader.input.rowOf(token);
    for (const map of this.maps) if (map.input === reader.input && !map.difference) map.point(row < 0 ? null : row, null);
    if (token < 0 || row < 0) return this.colourText();
    await tintByRow(reader.input, state.layer, state.head, row);
  }

  async colourText() {
    for (const reader of readers) {
      const strip = reader.input.layers[state.layer].strips.find((one) => one.label === state.measure);
      tintByStrip(reader, strip ? [strip] : [], (one, bin) => one.value(state.head, bin), "this head");
      reader.mark([]);
    }
  }

  keydown(event) {
    const [map] = this.maps;
    if (event.shiftKey && event.key.startsWith("Arrow") && map) map.keydown(event);
    else if (event.key === "ArrowLeft") stepHead(0, -1);
    else if (event.key === "ArrowRight") stepHead(0, 1);
    else if (event.key === "ArrowUp") stepHead(-1, 0);
    else if (event.key === "ArrowDown") stepHead(1, 0);
    else if (map && ["+", "=", "-", "0"].includes(event.key)) map.keydown(event);
    else return false;
    return true;
  }

  csv() {
    const rows = [["input", "layer", "head", "first query", "last query", "first key", "last key", "mass"]];
    for (const view of this.maps) {
      const map = view.finest(), name = view.difference ? "A less B" : view.input.name;
      for (let r = 0; r < map.height; r++) {
        for (let c = 0; c < map.width; c++) {
          rows.push([name, state.layer, view.layer.heads[state.head], map.rows[r], map.rows[r + 1] - 1, map.columns[c], map.columns[c + 1] - 1, map.value(r, c)]);
        }
      }
    }
    return rows;
  }

  scene() {
    return stacked([...this.maps.map((map) => ({ ...map.items(), width: map.laid.width, height: map.laid.height })), ...this.charts.map((chart) => ({ ...chart.items(), caption: `${chart.label} ${chart.unit}` }))]);
  }

  stop() {
    this.stopped = true;
    [...this.maps, ...this.charts].forEach((part) => part.stop());
  }
}
