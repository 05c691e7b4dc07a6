// Small tools: elements, numbers and tokens as text, and pictures made of items, which are drawn on
// a canvas or written as SVG alike.
//
// An item is one of {image, x, y, w, h, smooth}, {rect: [x, y, w, h], fill, stroke},
// {path: [[x, y], ...], stroke, width, fill} and {text, x, y, fill, size, align, rotate}.

// An element: properties, then children. Strings become text, never markup.
function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const grouped = new Intl.NumberFormat("en");

function whole(value) { return grouped.format(value); }

// Four digits, or what there is of a number.
function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "none";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

// The same in few signs, for an axis.
function short(value) {
  const size = Math.abs(value);
  return size > 0 && size < 1e-3 ? value.toExponential(0) : number(Number(value.toPrecision(3)));
}

// A number with how far rounding may have moved it, where that shows.
function bounded(value, error) {
  return error > 5e-4 * Math.abs(value) ? `${number(value)} ± ${number(Number(error.toPrecision(1)))}` : number(value);
}

// A token as it can be shown: controls and marks that turn text around become visible signs.
function shown(token) {
  if (token === "") return "∅";
  const visible = token.replace(
    /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]|(?<![\ud800-\udbff])[\udc80-\udcff]/g,
    (sign) => {
      if (sign === "\n") return "↵";
      if (sign === "\t") return "⇥";
      const code = sign.charCodeAt(0);
      if (code < 32) return String.fromCharCode(0x2400 + code);
      // A byte that is no whole letter (letters.py).
      if (code >= 0xdc80 && code <= 0xdcff) return `‹${(code & 255).toString(16).toUpperCase()}›`;
      return `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
    },
  );
  return visible.toWellFormed ? visible.toWellFormed() : visible;
}

// A token in a text: one that only goes on with a letter, which begins before it, is a dot.
function spelled(piece, name) { return piece === "" && name !== "" ? "·" : shown(piece); }

// A token as a name in a sentence, a table or an axis: no longer than `limit` signs.
function named(token, limit = 28) {
  const signs = [...shown(token ?? "").replace(/^ | $/g, "␣")];
  return signs.length > limit ? `${signs.slice(0, limit - 1).join("")}…` : signs.join("");
}

// A canvas that is as sharp as the screen.
function sized(canvas, width, height) {
  const ratio = Math.min(devicePixelRatio || 1, 3);
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

const FONT = 'system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif';

function paint(context, items) {
  for (const item of items) {
    context.save();
    if (item.clip) {
      context.beginPath();
      context.rect(...item.clip);
      context.clip();
    }
    context.globalAlpha = item.alpha ?? 1;
    if (item.image) {
      context.imageSmoothingEnabled = Boolean(item.smooth);
      context.imageSmoothingQuality = "high";
      context.drawImage(item.image, item.x, item.y, item.w, item.h);
    } else if (item.rect) {
      if (item.fill) [context.fillStyle] = [item.fill], context.fillRect(...item.rect);
      if (item.stroke) {
        [context.strokeStyle, context.lineWidth] = [item.stroke, item.width ?? 1];
        context.strokeRect(...item.rect);
      }
    } else if (item.path) {
      context.beginPath();
      item.path.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      if (item.fill) [context.fillStyle] = [item.fill], context.fill();
      if (item.stroke) {
        [context.strokeStyle, context.lineWidth, context.lineJoin] = [item.stroke, item.width ?? 1, "round"];
        context.stroke();
      }
    } else {
      context.font = `${item.weight ?? 400} ${item.size ?? 11}px ${FONT}`;
      [context.fillStyle, context.textAlign, context.textBaseline] = [item.fill, item.align ?? "left", "middle"];
      context.translate(item.x, item.y);
      if (item.rotate) context.rotate((item.rotate * Math.PI) / 180);
      context.fillText(item.text, 0, 0);
    }
    context.restore();
  }
}

// Round numbers that cut [low, high] into about `count` parts.
function ticks(low, high, count) {
  const rough = Math.max((high - low) / count, 1e-9);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) ?? 10);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(at);
  return found;
}

// A legend of a ramp on the square-root scale (or a straight one), with ticks.
// more: values beyond its ends have the colours of the ends.
function legend(kind, low, high, caption, { root = true, more = false } = {}) {
  const canvas = el("canvas", { class: "ramp", "aria-hidden": "true" });
  const context = sized(canvas, 160, 10);
  const colours = ramp(kind);
  for (let x = 0; x < 160; x++) paint(context, [{ rect: [x, 0, 1.5, 10], fill: colourAt(colours, x / 159) }]);
  const middle = kind === "difference" ? 0 : root ? low + (high - low) / 4 : (low + high) / 2;
  const marks = [low, middle, high].map((value, i) => el("span", {}, more && i === 2 ? `≥ ${number(value)}` : more && !root && i === 0 ? `≤ ${number(value)}` : number(value)));
  const parts = [el("span", { class: "caption" }, caption), canvas, el("span", { class: "marks" }, ...marks)];
  return el("div", { class: "legend" }, ...parts);
}
