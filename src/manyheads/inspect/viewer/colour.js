// Colours: matplotlib's maps (tests/test_page.py compares), 33 stops each, and the page's own inks.

const STOPS = {
  magma: "0000040303120a0822130d341d114729115a36106b440f7651127c5d177f6a1c81762181832681902a819c2e7faa337db73779c43c75d0416fdc4869e75263ef5d5ef56b5cf9795dfc8961fd9869fea772feb67cfec488fed395fde2a3fcf0b2fcfdbf",
  viridis: "440154470d6048186a482374472d7b4537814240863e49893b528b375b8d33638d2f6b8e2c728e297a8e26828e23898e21918c1f988b1fa08822a78528ae8032b67a3fbc734ec36b5ec96270cf5784d44b98d83eaddc30c2df23d8e219ece51bfde725",
  cividis: "00224e00285b002e6a0533711a386f273e6e32436d3b496c434e6c4b546c535a6d5a5f6e61656f686a716f70737676767d7c788482798c8878938e789b9476a39a74aba072b4a76fbcae6cc4b468cdbb63d5c25edec958e7d150f0d846f9e03afee838",
  gray_r: "fffffff7f7f7efefefe7e7e7dfdfdfd7d7d7cfcfcfc7c7c7bfbfbfb7b7b7afafafa7a7a79f9f9f9797978f8f8f8787877f7f7f7777776f6f6f6767675f5f5f5757574f4f4f4747473f3f3f3737372f2f2f2727271f1f1f1717170f0f0f070707000000",
  PuOr_r: "2d004b390c5e4518715225845f3a916d529c7b6aa88a7eb39990bfa9a1cbb7b1d5c3c0ddcfcfe5dadcece4e5f0eeeef3f7f7f6f9efe1fce8cdfee1b9fed59ffdc885fdbc6bf7ac52ee9b39e58a20d97b12cb6e0dbd6109ae55069e4c078d43077f3b08",
  berlin: "9eb0ff8caef679abed65a7e2519fd34194c13685ad2e76992868862259731d4b61183d4f14303e11242e111a20121214190c09220c022b0e013510004112014d16025b1d086c27117d341e8e422e9e513fae6051be6f63ce7f76df8f89f09f9cffadad",
};

// What the palette menu offers. "auto" and "grey" begin at the page's own paper.
const PALETTES = [
  ["auto", "Magma"],
  ["viridis", "Viridis"],
  ["cividis", "Cividis"],
  ["grey", "Grey"],
];

// 256 colours of a map as bytes r, g, b.
function sampled(name, reversed) {
  const stops = STOPS[name].match(/../g).map((pair) => parseInt(pair, 16));
  const last = stops.length / 3 - 1;
  const colours = new Uint8Array(768);
  for (let i = 0; i < 256; i++) {
    const at = ((reversed ? 255 - i : i) / 255) * last;
    const below = Math.min(Math.floor(at), last - 1);
    for (let c = 0; c < 3; c++) {
      const low = stops[3 * below + c], high = stops[3 * below + 3 + c];
      colours[3 * i + c] = Math.round(low + (high - low) * (at - below));
    }
  }
  return colours;
}

// Colours near `zero` run into the page's paper, so that nothing looks like nothing.
function onPaper(colours, zero, paper) {
  const faded = colours.slice();
  for (let i = 0; i < 256; i++) {
    const part = Math.max(0, Math.abs(i - zero) - 0.5) / 32;
    for (let c = 0; c < 3 && part < 1; c++) faded[3 * i + c] = Math.round(paper[c] + (colours[3 * i + c] - paper[c]) * part);
  }
  return faded;
}

const ramps = new Map();

// The colours of `kind`: "map" (the reader's choice), "strip" or "difference".
function ramp(kind) {
  const dark = isDark();
  let name = { map: state.palette, strip: "cividis", difference: "PuOr_r" }[kind], reversed = false;
  if (name === "auto") [name, reversed] = ["magma", !dark];
  if (name === "grey") [name, reversed] = ["gray_r", dark];
  if (kind === "difference" && dark) name = "berlin";
  const key = name + reversed;
  if (!ramps.has(key)) {
    const colours = sampled(name, reversed), paper = dark ? [20, 20, 23] : [255, 255, 255];
    const zero = kind === "difference" ? 127.5 : 0, keeps = name === "viridis" || name === "cividis";
    ramps.set(key, keeps ? colours : onPaper(colours, zero, paper));
  }
  return ramps.get(key);
}

// The CSS colour at `share` (0 to 1) of a ramp.
function colourAt(colours, share) {
  const i = 3 * Math.max(0, Math.min(255, Math.round(share * 255)));
  return `rgb(${colours[i]},${colours[i + 1]},${colours[i + 2]})`;
}

function isDark() { return document.documentElement.dataset.theme === "dark"; }

// What the style sheet calls its colours, for canvases.
function inks() {
  const style = getComputedStyle(document.documentElement);
  const names = ["ink", "soft", "line", "paper", "panel", "accent", "mark", "second"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}
