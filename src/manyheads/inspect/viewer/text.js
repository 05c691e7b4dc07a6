// The text itself. Blocks of tokens are filled when they come near the view and emptied when they
// leave it, so that a long text costs as much as a screenful; two listeners serve all tokens.

const BLOCK = 64;

class TextView {
  // side: "both", "query" or "key". on: {hover(token or -1), pick(token)}.
  // tokens: what each adds to the text. names: theirs, another one where a token is part of a letter.
  constructor(tokens, names, { input, side, title, on }) {
    Object.assign(this, { tokens, names, input, side, on, tints: null, marked: new Map(), found: new Set() });
    this.scroller = el("div", {
      class: "text",
      tabindex: "0",
      role: "listbox",
      "aria-label": `${title}: ${whole(tokens.length)} tokens. Arrow keys move, Enter opens.`,
    });
    this.note = el("p", { class: "note" });
    this.element = el("section", { class: "reader" }, el("h2", {}, title), this.note, this.scroller);
    this.blocks = [];
    for (let begin = 0; begin < tokens.length; begin += BLOCK) this.blocks.push(this.placeholder(begin));
    this.scroller.append(...this.blocks);
    this.watch = new IntersectionObserver((seen) => {
      for (const { target, isIntersecting } of seen) isIntersecting ? this.fill(target) : this.empty(target);
    }, { root: this.scroller, rootMargin: "600px 0px" });
    this.blocks.forEach((block) => this.watch.observe(block));
    this.scroller.addEventListener("pointermove", (event) => this.point(event));
    this.scroller.addEventListener("pointerleave", () => this.leave());
    this.scroller.addEventListener("click", (event) => {
      const at = this.indexOf(event.target);
      if (at >= 0) on.pick(at);
    });
    this.scroller.addEventListener("keydown", (event) => this.key(event));
    this.cursor = 0;
  }

  placeholder(begin) {
    const block = el("div", { class: "block", "data-begin": begin, role: "presentation" });
    let signs = 0, lines = 0;
    for (let i = begin; i < Math.min(begin + BLOCK, this.tokens.length); i++) {
      signs += this.tokens[i].length;
      lines += this.tokens[i].endsWith("\n");
    }
    block.style.minHeight = `${22 * Math.max(1, Math.ceil(signs / 42) + lines)}px`;
    return block;
  }

  indexOf(target) { return target instanceof HTMLElement && target.dataset.i ? Number(target.dataset.i) : -1; }

  fill(block) {
    if (block.firstChild) return;
    const begin = Number(block.dataset.begin);
    const parts = [el("span", { class: "gutter", "aria-hidden": "true" }, String(begin))];
    for (let i = begin; i < Math.min(begin + BLOCK, this.tokens.length); i++) {
      const part = this.tokens[i] !== this.names[i];
      const span = el("span", { class: part ? "t part" : "t", "data-i": i, role: "option", dir: "auto", "aria-label": part ? this.names[i] : null }, spelled(this.tokens[i], this.names[i]));
      this.dress(span, i);
      parts.push(span);
      if (this.tokens[i].endsWith("\n")) parts.push(el("br"));
    }
    block.append(...parts);
    block.style.minHeight = "";
  }

  empty(block) {
    if (!block.firstChild) return;
    block.style.minHeight = `${block.offsetHeight}px`;
    block.replaceChildren();
  }

  span(index) {
    const block = this.blocks[Math.floor(index / BLOCK)];
    return block?.firstChild ? block.querySelector(`[data-i="${index}"]`) : null;
  }

  // How one token looks: its tint (0 to 1), its mark, whether a search found it.
  dress(span, index) {
    const tint = this.tints ? this.tints(index) : 0;
    span.style.setProperty("--w", tint > 0 ? (100 * tint).toFixed(1) : "0");
    span.classList.toggle("on", tint > 0.004);
    span.classList.toggle("found", this.found.has(index));
    const mark = this.marked.get(index);
    for (const kind of ["query", "key", "cursor"]) span.classList.toggle(`is-${kind}`, mark === kind);
    span.setAttribute("aria-selected", mark === "query" ? "true" : "false");
  }

  refresh() {
    for (const block of this.blocks) {
      for (const span of block.children) if (span.dataset.i) this.dress(span, Number(span.dataset.i));
    }
  }

  // tints: (token) -> 0 to 1. note: what the tint means.
  tint(tints, note) {
    this.tints = tints;
    this.note.textContent = note;
    this.refresh();
  }

  // marks: pairs [token, "query" | "key" | "cursor"].
  mark(marks) {
    const before = [...this.marked.keys()];
    this.marked = new Map(marks.filter(([index]) => index >= 0));
    for (const index of new Set([...before, ...this.marked.keys()])) {
      const span = this.span(index);
      if (span) this.dress(span, index);
    }
  }

  find(found) {
    this.found = new Set(found);
    this.refresh();
  }

  scrollTo(index) {
    const block = this.blocks[Math.floor(index / BLOCK)];
    if (!block) return;
    const place = () => {
      this.fill(block);
      const span = this.span(index);
      const top = span.getBoundingClientRect().top - this.scroller.getBoundingClientRect().top;
      this.scroller.scrollTop += top - this.scroller.clientHeight / 3;
    };
    place();
    // Blocks around it take their true heights only now.
    requestAnimationFrame(() => requestAnimationFrame(place));
  }

  point(event) {
    const at = this.indexOf(event.target);
    if (at === this.pointed) return at >= 0 && moveTip(event);
    this.pointed = at;
    this.on.hover(at);
    if (at >= 0) showTip(event, tokenLines(this.input, this.side, at));
    else hideTip();
  }

  leave() {
    this.pointed = -1;
    this.on.hover(-1);
    hideTip();
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, PageUp: -BLOCK, PageDown: BLOCK }[event.key];
    if (step && !event.shiftKey && !event.altKey) {
      this.cursor = Math.max(0, Math.min(this.tokens.length - 1, this.cursor + step));
      this.mark([...[...this.marked].filter(([, kind]) => kind !== "cursor"), [this.cursor, "cursor"]]);
      this.scrollTo(this.cursor);
      this.announce();
      this.on.hover(this.cursor);
    } else if (event.key === "Enter") {
      this.on.pick(this.cursor);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // Tell a screen reader which token the arrow keys have reached.
  announce() {
    this.scroller.querySelector("[id]")?.removeAttribute("id");
    const id = `cursor-${this.input.name}-${this.side}`;
    this.span(this.cursor).id = id;
    this.scroller.setAttribute("aria-activedescendant", id);
  }

  stop() { this.watch.disconnect(); }
}

// Tokens whose text, run together, holds `words`: [[first, last], ...].
function search(tokens, words) {
  if (!words) return [];
  const begins = new Int32Array(tokens.length + 1);
  tokens.forEach((token, i) => { begins[i + 1] = begins[i] + token.length; });
  // Letter by letter, so that places stay where they are: some letters grow in lower case.
  const lower = (text) => Array.from({ length: text.length }, (_, i) => {
    const small = text[i].toLowerCase();
    return small.length === 1 ? small : text[i];
  }).join("");
  const text = lower(tokens.join("")), wanted = lower(words);
  const hits = [];
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
    hits.push([cellOf(begins, at), cellOf(begins, at + wanted.length - 1)]);
  }
  return hits;
}
