// The current view as a file: a picture (PNG, SVG) or its numbers (CSV).

// Several pictures of items below each other, with captions.
function stacked(parts) {
  const items = [], ink = inks();
  let y = 8, width = 0;
  for (const part of parts) {
    if (part.caption) {
      items.push({ text: part.caption, x: 8, y: y + 8, fill: ink.ink, size: 12, weight: 600 });
      y += 20;
    }
    items.push(...part.items.map((item) => moved(item, 8, y)));
    y += part.height + 12;
    width = Math.max(width, part.width + 16);
  }
  return { items, width, height: y };
}

function moved(item, dx, dy) {
  const box = ([x, y, w, h]) => [x + dx, y + dy, w, h];
  const copy = { ...item };
  if (item.rect) copy.rect = box(item.rect);
  if (item.clip) copy.clip = box(item.clip);
  if (item.path) copy.path = item.path.map(([x, y]) => [x + dx, y + dy]);
  if (item.x !== undefined) [copy.x, copy.y] = [item.x + dx, item.y + dy];
  return copy;
}

function canvasOf({ items, width, height }) {
  const canvas = el("canvas", { width: Math.ceil(width * 2), height: Math.ceil(height * 2) });
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  paint(context, [{ rect: [0, 0, width, height], fill: inks().paper }, ...items]);
  return canvas;
}

// The DOM writes the markup, so that no token can.
function svgOf({ items, width, height }) {
  const space = "http://www.w3.org/2000/svg";
  const node = (name, attributes) => {
    const made = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== undefined) made.setAttribute(key, typeof value === "number" ? String(Number(value.toFixed(2))) : value);
    }
    return made;
  };
  const root = node("svg", { viewBox: `0 0 ${width.toFixed(0)} ${height.toFixed(0)}`, width, height, "font-family": FONT });
  root.append(node("rect", { width, height, fill: inks().paper }));
  const clips = new Map();
  for (const item of items) {
    const drawn = shapeOf(item, node);
    if (item.clip) {
      const key = item.clip.map((value) => value.toFixed(1)).join();
      if (!clips.has(key)) {
        clips.set(key, `clip${clips.size}`);
        const [x, y, w, h] = item.clip, path = node("clipPath", { id: clips.get(key) });
        path.append(node("rect", { x, y, width: w, height: h }));
        root.append(path);
      }
      drawn.setAttribute("clip-path", `url(#${clips.get(key)})`);
    }
    if (item.alpha !== undefined) drawn.setAttribute("opacity", item.alpha);
    root.append(drawn);
  }
  return new XMLSerializer().serializeToString(root);
}

function shapeOf(item, node) {
  if (item.image) {
    const { x, y, w, h, smooth } = item;
    return node("image", { x, y, width: w, height: h, preserveAspectRatio: "none", href: item.image.toDataURL(), "image-rendering": smooth ? undefined : "pixelated" });
  }
  if (item.rect) {
    const [x, y, w, h] = item.rect;
    return node("rect", { x, y, width: Math.max(0, w), height: Math.max(0, h), fill: item.fill ?? "none", stroke: item.stroke, "stroke-width": item.width });
  }
  if (item.path) {
    const points = item.path.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
    return node(item.fill ? "polygon" : "polyline", { points, fill: item.fill ?? "none", stroke: item.stroke, "stroke-width": item.width });
  }
  const anchor = { right: "end", center: "middle" }[item.align];
  const text = node("text", {
    x: item.x, y: item.y, fill: item.fill, "font-size": item.size ?? 11, "font-weight": item.weight, "text-anchor": anchor,
    "dominant-baseline": "central", transform: item.rotate ? `rotate(${item.rotate} ${item.x} ${item.y})` : undefined,
  });
  text.textContent = item.text;
  return text;
}

// RFC 4180: fields with commas, quotes or line ends stand in quotes.
function csvOf(rows) {
  const field = (value) => (/[",\r\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  return `${rows.map((row) => row.map(field).join(",")).join("\r\n")}\r\n`;
}

function fileName(kind) {
  const where = { overview: "heads", head: `layer${state.layer}-head${inputs[0].layers[state.layer].heads[state.head]}`, token: `layer${state.layer}-head${inputs[0].layers[state.layer].heads[state.head]}-token${inputs[state.input].tokenOf(state.row)}` };
  return `attention-${where[state.view]}.${kind}`;
}

function download(blob, kind) {
  const link = el("a", { href: URL.createObjectURL(blob), download: fileName(kind) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function exportAs(kind) {
  if (kind === "csv") download(new Blob([csvOf(stage.csv())], { type: "text/csv;charset=utf-8" }), kind);
  else if (kind === "svg") download(new Blob([svgOf(stage.scene())], { type: "image/svg+xml" }), kind);
  else canvasOf(stage.scene()).toBlob((blob) => download(blob, kind), "image/png");
}
