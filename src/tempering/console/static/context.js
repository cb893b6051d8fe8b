// A context of any length, coloured by what one head attends to; only lines in view exist.

import { css, diverging, inkOn, sequential } from "./colour.js";
import { make, scheme } from "./dom.js";
import { inView, largest, lineCount, PER_LINE, visible } from "./lines.js";
import { short } from "./matrix.js";

const LINE = 22; // pixels, as in console.css

export class Context {
  /** @param {HTMLElement} box @param {HTMLElement} list */
  constructor(box, list) {
    this.box = box;
    this.list = list;
    /** @type {string[]} */
    this.texts = [];
    /** @type {ArrayLike<number>} */
    this.before = this.after = new Float32Array();
    this.by = "after";
    this.drawn = "";
    this.space = make("div");
    box.append(this.space);
    box.addEventListener("scroll", () => this.draw(), { passive: true });
  }

  /** @param {string[]} texts @param {ArrayLike<number>} before @param {ArrayLike<number>} after */
  show(texts, before, after) {
    Object.assign(this, { texts, before, after, drawn: "" });
    this.space.style.height = `${lineCount(texts.length) * LINE}px`;
    const most = largest(this.values().map(Math.abs), 8);
    this.list.replaceChildren(
      ...most.map((place) => {
        const jump = make("button", { type: "button" }, `${place}: ${visible(texts[place])}`);
        jump.addEventListener("click", () => this.jump(place));
        return make("li", {}, jump, ` ${share(before[place])} → ${share(after[place])}`);
      }),
    );
    this.draw();
  }

  /** @returns {number[]} what colours each token */
  values() {
    const { before, after } = this;
    if (this.by === "before") return Array.from(before);
    if (this.by === "after") return Array.from(after);
    return Array.from(after, (value, i) => value - before[i]);
  }

  /** @param {number} place */
  jump(place) {
    this.box.scrollTop = Math.max(0, Math.floor(place / PER_LINE) * LINE - this.box.clientHeight / 2);
    this.draw();
  }

  draw() {
    const [first, last] = inView(this.box.scrollTop, this.box.clientHeight, LINE, lineCount(this.texts.length));
    const key = `${first}-${last}-${this.by}-${scheme()}`;
    if (key === this.drawn) return;
    this.drawn = key;
    const lines = [];
    for (let i = first; i < last; i++) lines.push(this.line(i));
    this.space.replaceChildren(...lines);
  }

  /** @param {number} index */
  line(index) {
    const line = make("div", { className: "line" }, make("b", {}, String(index * PER_LINE)));
    line.style.top = `${index * LINE}px`;
    const mode = scheme();
    for (let i = index * PER_LINE; i < Math.min(this.texts.length, (index + 1) * PER_LINE); i++) {
      const [b, a] = [this.before[i], this.after[i]];
      const span = make("span", { title: `token ${i}: ${share(b)} before, ${share(a)} after` }, visible(this.texts[i]));
      // Shares span orders of magnitude: colours follow their square roots.
      const ground = this.by === "change"
        ? diverging(Math.sign(a - b) * Math.sqrt(Math.abs(a - b)), 0.5, mode)
        : sequential(Math.sqrt(this.by === "before" ? b : a), 0, 0.7, mode);
      span.style.background = css(ground);
      span.style.color = css(inkOn(ground));
      line.append(span);
    }
    return line;
  }
}

/** @param {number} value */
function share(value) {
  return `${short(100 * value)}%`;
}
