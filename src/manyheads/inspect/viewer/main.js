// What is shown now, and how the parts hear of each other.

const inputs = meta.inputs.map((of, i) => new Input(of, "AB"[i]));
const byId = (id) => document.getElementById(id);
const state = {
  view: "overview", layer: 0, head: 0, row: 0, input: 0, way: "to",
  mode: "A", measure: null, palette: "auto", scale: "head", theme: null,
};
let stage = null;
let readers = [];

function chosenInputs() {
  if (state.mode === "A") return [inputs[0]];
  return state.mode === "B" ? [inputs[1]] : inputs;
}

// ---- moving around -----------------------------------------------------------------------------

// Change what is shown, and remember it in the address where there is one.
function go(change) {
  const before = state.view;
  Object.assign(state, change);
  if (!chosenInputs().includes(inputs[state.input])) state.input = inputs.indexOf(chosenInputs()[0]);
  state.row = Math.min(state.row, inputs[state.input].queries - 1);
  remember(before !== state.view);
  render();
}

function address() {
  if (state.view === "overview") return "#";
  return state.view === "head" ? `#head/${state.layer}/${state.head}` : `#token/${state.layer}/${state.head}/${state.row}`;
}

function remember(newPage) {
  try {
    history[newPage ? "pushState" : "replaceState"](null, "", address());
  } catch {
    // A notebook's frame has no address of its own.
  }
}

function recall() {
  const [view, ...numbers] = location.hash.slice(1).split("/");
  const [layer, head, row] = numbers.map(Number);
  const known = inputs[0].layers[layer]?.heads[head] !== undefined;
  if ((view === "head" || view === "token") && known) Object.assign(state, { view, layer, head });
  else state.view = "overview";
  if (view === "token") state.row = Math.max(0, Math.min(inputs[state.input].queries - 1, row || 0));
}

function stepHead(layers, heads) {
  const [{ layers: all }] = inputs;
  const layer = Math.max(0, Math.min(all.length - 1, state.layer + layers));
  const head = Math.max(0, Math.min(all[layer].heads.length - 1, state.head + heads));
  if (layer !== state.layer || head !== state.head) go({ layer, head });
}

function up() {
  const { layer, head } = state;
  if (state.view === "token") go({ view: "head" });
  else if (state.view === "head") {
    go({ view: "overview" });
    stage.focus(layer, head);
  }
}

function render() {
  hideTip();
  stage?.stop();
  const kind = { overview: Overview, head: HeadView, token: TokenView }[state.view];
  stage = new kind();
  byId("stage").replaceChildren(stage.element);
  document.body.dataset.view = state.view;
  trail();
  Promise.resolve(stage.start?.()).then(() => state.view !== "token" && stage.colourText());
}

function trail() {
  const parts = [["All heads", "overview"]];
  const { heads } = inputs[0].layers[state.layer];
  if (state.view !== "overview") parts.push([`Layer ${state.layer}, head ${heads[state.head]}`, "head"]);
  if (state.view === "token") parts.push([`Token ${whole(inputs[state.input].tokenOf(state.row))}`, "token"]);
  byId("trail").replaceChildren(...parts.map(([name, view]) => {
    const here = view === state.view;
    return el("button", { type: "button", "aria-current": here ? "page" : null, onclick: () => !here && go({ view }) }, name);
  }));
  byId("status").textContent = parts.map(([name]) => name).join(", ");
  document.title = `${parts.at(-1)[0]} · ${meta.title}`;
}

// ---- the text ----------------------------------------------------------------------------------

function buildReaders() {
  readers.forEach((reader) => reader.stop());
  readers = chosenInputs().flatMap((input) => {
    const prefix = inputs.length > 1 ? `Input ${input.name}: ` : "";
    const on = (side) => ({
      hover: (token) => stage.hoverText?.(readers.find((one) => one.input === input && one.side === side), token),
      pick: (token) => pick(input, side, token),
    });
    const reader = (tokens, names, side, title) => new TextView(tokens, names, { input, side, title: prefix + title, on: on(side) });
    if (!input.queryTokens) return [reader(input.keyPieces, input.keyTokens, "both", "Text")];
    return [reader(input.queryPieces, input.queryTokens, "query", "Queries"), reader(input.keyPieces, input.keyTokens, "key", "Keys")];
  });
  byId("texts").replaceChildren(...readers.map((reader) => reader.element));
}

// A token was chosen in the text.
function pick(input, side, token) {
  const row = side === "key" ? -1 : input.rowOf(token);
  if (row >= 0) go({ view: "token", row, input: inputs.indexOf(input) });
}

function sides(reader, axis) { return reader.side === "both" || reader.side === axis; }

// `at`: a row for the queries' side, a key for the keys'.
function markText(input, axis, at, kind, key = -1) {
  for (const reader of readers) {
    if (reader.input !== input) continue;
    const marks = [];
    if (at >= 0 && sides(reader, axis)) marks.push([axis === "query" ? input.tokenOf(at) : at, kind]);
    if (key >= 0 && sides(reader, "key")) marks.push([key, "key"]);
    reader.mark(marks);
  }
}

function scrollText(input, axis, at) {
  const reader = readers.find((one) => one.input === input && sides(one, axis));
  reader?.scrollTo(axis === "query" ? input.tokenOf(at) : at);
}

// Tint a text by a measure: value(strip, bin), a mean over the strips.
function tintByStrip(reader, strips, value, whose) {
  tinted++; // what is still being read for a row comes too late
  const fitting = strips.filter((strip) => sides(reader, strip.axis));
  if (!fitting.length) return reader.tint(null, strips.length ? "" : "Hover or choose a token.");
  const [{ bins, edges, axis, label, unit }] = fitting;
  const means = Float64Array.from({ length: bins }, (_, bin) => {
    const values = fitting.map((strip) => value(strip, bin)).filter((one) => !Number.isNaN(one));
    return values.length ? values.reduce((a, b) => a + b, 0) / values.length : NaN;
  });
  const { low, high } = middle(means);
  const tints = (token) => {
    const at = axis === "query" ? reader.input.rowOf(token) : token;
    const bin = at < 0 ? -1 : cellOf(edges, at);
    return bin < 0 || Number.isNaN(means[bin]) || high <= low ? 0 : Math.max(0, Math.min(1, (means[bin] - low) / (high - low)));
  };
  return reader.tint(tints, `Tint: ${label}, ${number(low)} to ${number(high)}${unit ? ` ${unit}` : ""} (${whose}).`);
}

let tinted = 0;

// Tint the text by what a row attends to, or who attends to its token.
async function tintByRow(input, layer, head, row, way = "to") {
  const mine = ++tinted;
  for await (const found of answers(input, layer, head, row, way, () => mine === tinted)) {
    if (mine !== tinted) return;
    tintBy(found, input, row, way);
  }
}

function tintBy(found, input, row, way) {
  const answer = way === "to" ? "key" : "query", name = named(input.queryText(row), 16);
  const most = Math.max(found.entries[0]?.weight ?? 0, 1e-9), mostMass = Math.max(found.cells[0]?.mass ?? 0, 1e-9);
  const weights = new Map(found.entries.map(({ index, weight }) => [index, weight]));
  const edges = [...found.cells].sort((a, b) => a.first - b.first);
  const firsts = [...edges.map(({ first }) => first), edges.length ? edges.at(-1).last + 1 : 0];
  for (const reader of readers) {
    if (reader.input !== input) continue;
    reader.mark(sides(reader, "query") ? [[input.tokenOf(row), "query"]] : []);
    if (!sides(reader, answer)) reader.tint(null, `Outlined: ${name}.`);
    else {
      const at = (token) => (answer === "key" ? token : input.rowOf(token));
      const bulk = (token) => {
        const cell = cellOf(firsts, at(token));
        return cell < 0 ? 0 : 0.7 * Math.sqrt(edges[cell].mass / mostMass);
      };
      const verb = way === "to" ? `what ${name} attends to` : `who attends to ${name}`;
      const tints = found.single ? (token) => Math.sqrt((weights.get(at(token)) ?? 0) / most) : bulk;
      reader.tint(tints, `Tint: ${verb}${found.single ? `, at most ${number(most)}` : ", pooled: tokens of a cell share one tint"}.`);
    }
  }
}

// A token's lines for the tooltip.
function tokenLines(input, side, token) {
  const tokens = side === "query" ? input.queryTokens : input.keyTokens;
  const lines = [`${named(tokens[token], 40)}  token ${whole(token)}`];
  const row = side === "key" ? -1 : input.rowOf(token);
  if (state.view === "overview" || row < 0) return lines;
  for (const strip of input.layers[state.layer].strips) {
    const at = strip.axis === "query" ? row : side === "query" ? -1 : token;
    const bin = at < 0 ? -1 : cellOf(strip.edges, at);
    if (bin >= 0) lines.push(`${strip.label} ${bounded(strip.value(state.head, bin), strip.error(state.head))} ${strip.unit}`);
  }
  if (state.view === "token" && stage.found?.single && input === stage.input) {
    const at = stage.side() === "key" ? token : row;
    const entry = stage.found.entries.find(({ index }) => index === at);
    if (entry) lines.unshift(`weight ${bounded(entry.weight, entry.error)}`);
  }
  return lines;
}

// ---- searching ---------------------------------------------------------------------------------

let hits = [], current = -1;

function find() {
  const words = byId("words").value;
  hits = readers.flatMap((reader) => {
    const spans = search(reader.tokens, words);
    reader.find(spans.flatMap(([first, last]) => Array.from({ length: last - first + 1 }, (_, i) => first + i)));
    return spans.map(([first]) => ({ reader, first }));
  });
  current = -1;
  byId("count").textContent = words ? `${whole(hits.length)} found` : "";
  if (hits.length) showHit(0);
}

function showHit(at) {
  if (!hits.length) return;
  current = (at + hits.length) % hits.length;
  const { reader, first } = hits[current];
  byId("count").textContent = `${whole(current + 1)} of ${whole(hits.length)}`;
  const row = reader.side === "key" ? -1 : reader.input.rowOf(first);
  if (state.view === "token" && row >= 0) go({ row, input: inputs.indexOf(reader.input) });
  else if (state.view === "head" && row >= 0) stage.hoverText(reader, first);
  if (state.view !== "token") {
    reader.cursor = first;
    reader.mark([[first, "cursor"]]);
  }
  reader.scrollTo(first);
}

// ---- the tooltip -------------------------------------------------------------------------------

function showTip(event, lines) {
  const tip = byId("tip");
  tip.replaceChildren(...lines.map((line) => el("div", {}, el("bdi", {}, line))));
  tip.hidden = false;
  moveTip(event);
}

function moveTip(event) {
  const tip = byId("tip"), { width, height } = tip.getBoundingClientRect();
  const x = event.clientX + 14 + width > innerWidth ? event.clientX - width - 14 : event.clientX + 14;
  const y = event.clientY + 16 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 16;
  tip.style.transform = `translate(${Math.max(4, x)}px, ${Math.max(4, y)}px)`;
}

function hideTip() { byId("tip").hidden = true; }

// ---- the bar above -----------------------------------------------------------------------------

function choices(select, entries, value, change) {
  select.replaceChildren(...entries.map(([key, name]) => el("option", { value: key, selected: key === value }, name)));
  select.addEventListener("change", () => change(select.value));
}

function buildBar() {
  byId("title").textContent = meta.title;
  const labels = new Map(inputs[0].layers.flatMap((layer) => layer.strips.map((strip) => [strip.label, strip.label])));
  state.measure = labels.keys().next().value ?? null;
  byId("measures").hidden = !labels.size;
  choices(byId("measure"), [...labels], state.measure, (measure) => go({ measure }));
  choices(byId("palette"), PALETTES, state.palette, (palette) => go({ palette }));
  choices(byId("scale"), [["head", "per head"], ["all", "shared"]], state.scale, (scale) => go({ scale }));
  if (inputs.length > 1) {
    state.mode = "both";
    byId("modes").hidden = false;
    choices(byId("mode"), [["both", "A and B"], ["A", "A"], ["B", "B"], ["difference", "A less B"]], state.mode, (mode) => {
      state.mode = mode;
      buildReaders();
      go({});
      find();
    });
  }
  // The text stands below the bar, which takes a second line where names are long.
  const bar = document.querySelector(".bar");
  new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${bar.offsetHeight}px`)).observe(bar);
  byId("theme").addEventListener("click", () => {
    state.theme = isDark() ? "light" : "dark";
    themed();
  });
  byId("help").addEventListener("click", () => byId("keys").showModal());
  for (const kind of ["png", "svg", "csv"]) {
    byId(kind).addEventListener("click", () => {
      byId("export").open = false;
      exportAs(kind);
    });
  }
  byId("words").addEventListener("input", find);
  byId("search").addEventListener("submit", (event) => event.preventDefault());
  byId("next").addEventListener("click", () => showHit(current + 1));
  byId("previous").addEventListener("click", () => showHit(current - 1));
}

function themed() {
  const dark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-label", dark ? "Light theme" : "Dark theme");
  byId("theme").textContent = dark ? "☀" : "☾";
  if (stage) render();
}

function onKey(event) {
  const typing = event.target instanceof Element && event.target.matches("input, select, textarea");
  if (event.ctrlKey || event.metaKey || byId("keys").open) return;
  if (event.key === "Escape") {
    if (typing) {
      byId("words").value = "";
      find();
      event.target.blur();
    } else up();
  } else if (typing) {
    if (event.key !== "Enter" || event.target !== byId("words")) return;
    showHit(current + (event.shiftKey ? -1 : 1));
  } else if (event.key === "/") byId("words").focus();
  else if (event.key === "?") byId("keys").showModal();
  else if (!stage.keydown(event)) return;
  event.preventDefault();
}

async function start() {
  themed();
  await Promise.all(inputs.map((input) => input.load()));
  buildBar();
  recall();
  buildReaders();
  render();
  document.addEventListener("keydown", onKey);
  addEventListener("popstate", () => { recall(); render(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => !state.theme && themed());
  document.body.dataset.ready = "yes";
}

start().catch((problem) => {
  byId("stage").textContent = `This page could not be shown: ${problem.message}. It needs a browser of 2023 or later.`;
  throw problem;
});
