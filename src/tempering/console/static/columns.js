// Columns of text that grow token by token; a token can be coloured, chosen and asked about.

import { css, diverging, inkOn, sequential } from "./colour.js";
import { make, scheme } from "./dom.js";
import { short } from "./matrix.js";

/**
 * @typedef {{row: number, id: number, text: string, phase: string, temperature: number|string,
 *   entropy: number, entropy_before: number, support: number, raw: number|string,
 *   log_probability: number|string, kl?: number,
 *   alternatives?: {text: string, after: number}[]}} Token tokens of a server have a text, a log
 *   probability and alternatives alone
 * @typedef {{kind: "diverging"|"sequential", low: number, high: number, of: (token: Token) => number,
 *   text: [string, string]}} Colouring
 */

/** @type {Record<string, Colouring>} */
export const COLOURINGS = {
  temperature: { kind: "diverging", low: -Math.log(2), high: Math.log(2), of: (t) => Math.log(Number(t.temperature)), text: ["T 0.5", "2"] },
  entropy: { kind: "sequential", low: 0, high: 5, of: (t) => t.entropy, text: ["0 nats", "5"] },
  support: { kind: "sequential", low: 0, high: Math.log(100), of: (t) => Math.log(t.support), text: ["1 token", "100"] },
  log_probability: { kind: "sequential", low: 0, high: 6, of: (t) => -Number(t.log_probability), text: ["log p 0", "-6"] },
  kl: { kind: "sequential", low: 0, high: 1, of: (t) => t.kl ?? NaN, text: ["0 nats", "1"] },
};

/** A name for a column that no other has: A to Z, then A2 to Z2 and so on.
 * @param {string[]} used */
export function freeName(used) {
  for (let round = 1; ; round++) {
    for (const letter of "ABCDEFGHIJKLMNOPQRSTUVWXYZ") {
      const name = round === 1 ? letter : `${letter}${round}`;
      if (!used.includes(name)) return name;
    }
  }
}

/** @param {HTMLElement} span @param {Token} token @param {string} by */
function colour(span, token, by) {
  const how = COLOURINGS[by];
  const value = how ? how.of(token) : NaN;
  if (!how || Number.isNaN(value)) {
    span.style.background = span.style.color = "";
    return;
  }
  const ground = how.kind === "diverging" ? diverging(value, how.high, scheme()) : sequential(value, how.low, how.high, scheme());
  span.style.background = css(ground);
  span.style.color = css(inkOn(ground));
}

/** What is known of a token, in words. @param {Token} token */
export function facts(token) {
  if (token.alternatives) return `log p ${short(Number(token.log_probability))}; its likeliest alternatives as the server tells them`;
  return (
    `T ${short(Number(token.temperature))}${token.phase ? ` (${token.phase})` : ""}, entropy ${short(token.entropy)} nats ` +
    `(${short(token.entropy_before)} at T = 1), support ${short(token.support)} tokens, ` +
    `log p ${short(Number(token.log_probability))} (${short(Number(token.raw))} at T = 1)` +
    (token.kl === undefined ? "" : `, KL from untempered ${short(token.kl)} nats`)
  );
}

export class Columns {
  /** @param {HTMLElement} box @param {(row: number, index: number) => void} choose */
  constructor(box, choose) {
    this.box = box;
    this.choose = choose;
    this.by = "temperature";
    /** @type {{name: string, tokens: Token[], marks: number[], body: HTMLElement, spans: HTMLElement[],
     *   note: HTMLElement, stale: HTMLElement, finish: "length"|"end"|null}[]}
     * marks: tokens before which the temperatures changed; finish: null of a text that was cut off */
    this.columns = [];
  }

  /** Begin anew. @param {string[]} names @param {number} active */
  reset(names, active) {
    this.box.replaceChildren();
    this.columns = names.map((name, row) => {
      const body = make("div", { className: "body", role: "group", "aria-label": `Text, ${name}` });
      const note = make("p", { className: "quiet" });
      const stale = make("p", { className: "quiet", hidden: true }, "written before the last edit");
      this.box.append(make("div", { className: row === active ? "column active" : "column" }, make("h3", {}, name), body, note, stale));
      body.addEventListener("click", (/** @type {MouseEvent} */ event) => this.meant(row, event.target));
      body.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => this.key(row, event));
      return { name, tokens: [], marks: [], body, spans: [], note, stale, finish: null };
    });
  }

  /** @param {Token} token */
  add(token) {
    const column = this.columns[token.row];
    if (!column) return;
    // The first token of a column is reached by Tab, the others from it by arrows.
    const span = make("span", { className: "token", tabIndex: column.spans.length ? -1 : 0, role: "button" }, token.text);
    colour(span, token, this.by);
    column.tokens.push(token);
    column.spans.push(span);
    column.body.append(span);
  }

  /** Mark that the temperatures changed here. */
  mark() {
    for (const column of this.columns.slice(1)) {
      column.marks.push(column.tokens.length);
      column.body.append(make("span", { className: "changed", title: "From here on with the new temperatures; the keys of what came before stay those of the old ones" }, "┊"));
    }
  }

  /** Everything that is written, for `comeBack`. */
  kept() {
    return this.columns.map(({ name, tokens, marks, note, finish }) => ({ name, tokens, marks, note: note.textContent, finish }));
  }

  /** Show what `kept` gave; throws where it is something else, with nothing changed.
   * @param {ReturnType<Columns["kept"]>} kept @param {number} active */
  comeBack(kept, active) {
    this.reset(kept.map(({ name }) => name), active);
    const longest = Math.max(0, ...kept.map(({ tokens }) => tokens.length));
    // A column that has ended is marked at its end.
    const places = (kept[1]?.marks ?? []).map((_, k) => Math.max(...kept.slice(1).map(({ marks }) => marks[k])));
    for (let i = 0; i <= longest; i++) {
      for (const place of places) if (place === i) this.mark();
      for (const { tokens } of kept) if (i < tokens.length) this.add(tokens[i]);
    }
    kept.forEach(({ note, finish }, row) => {
      this.tell(row, note ?? "");
      this.columns[row].finish = finish;
    });
  }

  /** A text is whole. @param {number} row @param {number} count @param {number} most tokens that were asked for */
  done(row, count, most) {
    const column = this.columns[row];
    if (!column) return;
    column.finish = count < most ? "end" : "length";
    this.tell(row, `${count} tokens${count < most ? ", ended by itself" : ""}`);
  }

  /** @param {number} row @param {string} text */
  tell(row, text) {
    const column = this.columns[row];
    if (column) column.note.textContent = text;
  }

  /** Colour every token anew. @param {string} by */
  recolour(by) {
    this.by = by;
    for (const column of this.columns) column.spans.forEach((span, i) => colour(span, column.tokens[i], by));
  }

  /** @param {number} row @param {EventTarget|null} target */
  meant(row, target) {
    const index = this.columns[row].spans.indexOf(/** @type {HTMLElement} */ (target));
    if (index < 0) return;
    this.highlight(row, index);
    this.choose(row, index);
  }

  /** @param {number} row @param {KeyboardEvent} event */
  key(row, event) {
    const { spans } = this.columns[row];
    const index = spans.indexOf(/** @type {HTMLElement} */ (event.target));
    if (index < 0) return;
    const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (next !== undefined && spans[next]) {
      spans[index].tabIndex = -1;
      spans[next].tabIndex = 0;
      spans[next].focus();
      event.preventDefault();
    } else if (event.key === "Enter" || event.key === " ") {
      this.meant(row, event.target);
      event.preventDefault();
    }
  }

  /** @param {number} row @param {number} index */
  highlight(row, index) {
    this.box.querySelector(".chosen")?.classList.remove("chosen");
    this.columns[row]?.spans[index]?.classList.add("chosen");
  }
}
