// The matrix on a canvas: painted with a pointer or with keys, repainted whole within a frame.

import { css, diverging, inkOn, sequential } from "./colour.js";
import { scheme } from "./dom.js";
import { line, rectangle, short } from "./matrix.js";

/**
 * What the grid shows: a number for each layer and head.
 * kind: "diverging" about 0 (values are logs), or "sequential" from low to high.
 * @typedef {{values: ArrayLike<number>[], kind: "diverging"|"sequential", low: number, high: number,
 *            label: (value: number) => string}} View
 * @typedef {import("./matrix.js").Cell} Cell
 */

const GUTTER = 34; // CSS pixels left of the cells, for the numbers of layers
const TOP = 16; // above them, for the numbers of heads

export class Grid {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {{layer: number|null, index: number, stack: string}[]} rows in order of depth
   * @param {number[]} heads of each layer of the profile
   * @param {{begin: () => void, paint: (cells: Cell[]) => void, end: () => void,
   *          moved: (cell: Cell) => void, chosen: (cell: Cell) => void, key: (event: KeyboardEvent) => boolean}} on
   */
  constructor(canvas, rows, heads, on) {
    this.canvas = canvas;
    this.context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { alpha: false }));
    this.rows = rows;
    this.heads = heads;
    this.on = on;
    this.wide = Math.max(1, ...heads);
    /** @type {number[]} place of a layer of the profile among the rows */
    this.places = [];
    rows.forEach((row, place) => row.layer !== null && (this.places[row.layer] = place));
    /** @type {Cell} */
    this.cursor = [0, 0];
    /** @type {Cell} the other corner of the selection */
    this.anchor = [0, 0];
    /** @type {string} */
    this.tool = "brush";
    /** @type {View|null} */
    this.view = null;
    /** @type {Cell[]|null} a rectangle that is being drawn */
    this.preview = null;
    this.frame = 0;
    this.cellWidth = this.cellHeight = this.width = this.height = 0;
    this.size();
    this.listen();
  }

  /** Fit the cells to the width that there is. */
  size() {
    const width = Math.max(220, /** @type {HTMLElement} */ (this.canvas.parentElement).clientWidth - 2);
    this.cellWidth = Math.max(3, Math.floor((width - GUTTER) / this.wide));
    this.cellHeight = Math.max(5, Math.min(22, Math.floor(640 / Math.max(1, this.rows.length))));
    const ratio = window.devicePixelRatio || 1;
    this.width = GUTTER + this.cellWidth * this.wide + 1;
    this.height = TOP + this.cellHeight * this.rows.length + 1;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.height}px`;
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.draw();
  }

  /** @param {View} view */
  show(view) {
    this.view = view;
    this.draw();
  }

  /** Repaint before the next frame, however often it is asked for. */
  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.paintNow();
    });
  }

  paintNow() {
    const { context: c, cellWidth: w, cellHeight: h, view } = this;
    const mode = scheme();
    const style = getComputedStyle(this.canvas);
    const card = style.getPropertyValue("--card");
    const quiet = style.getPropertyValue("--quiet");
    c.fillStyle = card;
    c.fillRect(0, 0, this.width, this.height);
    if (!view) return;
    const gap = w > 6 && h > 6 ? 1 : 0;
    const written = w >= 30 && h >= 12;
    c.font = "10px ui-monospace, monospace";
    c.textBaseline = "middle";
    this.rows.forEach((row, place) => {
      const y = TOP + place * h;
      if (row.layer === null) {
        c.strokeStyle = quiet;
        c.globalAlpha = 0.35;
        c.beginPath();
        c.moveTo(GUTTER, y + h / 2);
        c.lineTo(this.width, y + h / 2);
        c.stroke();
        c.globalAlpha = 1;
        return;
      }
      const values = view.values[row.layer];
      for (let head = 0; head < this.heads[row.layer]; head++) {
        const value = values ? values[head] : NaN;
        if (Number.isNaN(value)) continue;
        const colour = view.kind === "diverging"
          ? diverging(value, view.high, mode)
          : sequential(value, view.low, view.high, mode);
        c.fillStyle = css(colour);
        c.fillRect(GUTTER + head * w, y, w - gap, h - gap);
        if (written) {
          c.fillStyle = css(inkOn(colour));
          c.textAlign = "center";
          c.fillText(view.label(value), GUTTER + head * w + w / 2, y + h / 2, w - 2);
        }
      }
    });
    c.fillStyle = quiet;
    c.textAlign = "right";
    const every = Math.ceil(12 / h);
    this.rows.forEach((row, place) => {
      if (place % every === 0) c.fillText(String(row.index), GUTTER - 5, TOP + place * h + h / 2);
    });
    c.textAlign = "center";
    const across = Math.ceil(20 / w);
    for (let head = 0; head < this.wide; head += across) c.fillText(String(head), GUTTER + head * w + w / 2, TOP / 2);
    this.outline(this.preview ?? this.selection(), style.getPropertyValue("--ink"));
    this.outline([this.cursor], style.getPropertyValue("--mark"));
  }

  /** @param {Cell[]} cells @param {string} colour */
  outline(cells, colour) {
    if (!cells.length || !this.heads.length) return;
    const { cellWidth: w, cellHeight: h } = this;
    const places = cells.map(([layer]) => this.places[layer]);
    const heads = cells.map(([, head]) => head);
    const [top, bottom] = [Math.min(...places), Math.max(...places)];
    const [left, right] = [Math.min(...heads), Math.max(...heads)];
    this.context.strokeStyle = colour;
    this.context.lineWidth = 2;
    this.context.strokeRect(GUTTER + left * w, TOP + top * h, (right - left + 1) * w - 1, (bottom - top + 1) * h - 1);
  }

  /** @returns {Cell[]} the cells between cursor and anchor */
  selection() {
    return rectangle(this.cursor, this.anchor, this.heads);
  }

  /** The cell under a pointer; the nearest one where it is dragged outside.
   * @param {PointerEvent} event @returns {Cell|null} */
  under(event) {
    const box = this.canvas.getBoundingClientRect();
    let place = Math.floor((event.clientY - box.top - TOP) / this.cellHeight);
    place = Math.min(this.rows.length - 1, Math.max(0, place));
    const layer = this.rows[place]?.layer;
    if (layer === null || layer === undefined) return null;
    const head = Math.floor((event.clientX - box.left - GUTTER) / this.cellWidth);
    return [layer, Math.min(this.heads[layer] - 1, Math.max(0, head))];
  }

  /** The cells that the tool means at a cell.
   * @param {Cell} cell @returns {Cell[]} */
  meant([layer, head]) {
    if (this.tool === "row") return rectangle([layer, 0], [layer, this.wide], this.heads);
    if (this.tool === "column") return rectangle([0, head], [this.heads.length - 1, head], this.heads);
    return [[layer, head]];
  }

  listen() {
    /** @type {Cell|null} */
    let last = null;
    /** @type {Cell|null} */
    let corner = null;
    /** @type {Set<string>} painted in this stroke: "x 1.1" multiplies each head once */
    let touched = new Set();
    const paint = (/** @type {Cell[]} */ cells) => {
      const fresh = cells.filter((cell) => !touched.has(String(cell)));
      fresh.forEach((cell) => touched.add(String(cell)));
      if (fresh.length) this.on.paint(fresh);
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      const cell = this.under(event);
      if (event.button !== 0 || !cell) return;
      try {
        this.canvas.setPointerCapture(event.pointerId);
      } catch {
        // a pointer that has gone already
      }
      this.move(cell, false);
      this.on.chosen(cell);
      if (this.tool === "look") return;
      last = cell;
      touched = new Set();
      this.on.begin();
      if (this.tool === "rectangle") corner = cell;
      else paint(this.meant(cell));
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      const cell = this.under(event);
      if (!cell || String(cell) === String(last)) return;
      if (corner) {
        this.preview = rectangle(corner, cell, this.heads);
        this.draw();
      } else {
        paint(line(last, cell).filter(([l, h]) => h < this.heads[l]).flatMap((each) => this.meant(each)));
      }
      last = cell;
      this.cursor = this.anchor = cell;
      this.on.moved(cell);
    });
    const end = (/** @type {PointerEvent} */ event) => {
      if (!last) return;
      if (corner && event.type !== "pointercancel") paint(rectangle(corner, last, this.heads));
      this.preview = null;
      last = corner = null;
      this.on.end();
      this.draw();
    };
    this.canvas.addEventListener("pointerup", end);
    this.canvas.addEventListener("pointercancel", end);
    this.canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !this.heads.length) return;
      if (this.travel(event) || this.on.key(event)) event.preventDefault();
    });
  }

  /** Move by keys; whether the key means a move.
   * @param {KeyboardEvent} event */
  travel(event) {
    const [layer, head] = this.cursor;
    const last = this.heads.length - 1;
    /** @type {Record<string, Cell>} */
    const to = {
      ArrowUp: [layer - 1, head],
      ArrowDown: [layer + 1, head],
      ArrowLeft: [layer, head - 1],
      ArrowRight: [layer, head + 1],
      PageUp: [layer - 5, head],
      PageDown: [layer + 5, head],
      Home: [layer, 0],
      End: [layer, this.wide],
    };
    const found = to[event.key];
    if (found) {
      const l = Math.min(last, Math.max(0, found[0]));
      this.move([l, Math.min(this.heads[l] - 1, Math.max(0, found[1]))], event.shiftKey);
      return true;
    }
    const whole = { r: [[layer, 0], [layer, this.wide - 1]], c: [[0, head], [last, head]], a: [[0, 0], [last, this.wide - 1]] };
    const [from, until] = /** @type {any} */ (whole)[event.key.toLowerCase()] ?? [];
    if (!from) return false;
    this.anchor = from;
    this.cursor = [until[0], Math.min(until[1], this.heads[until[0]] - 1)];
    this.on.moved(this.cursor);
    this.draw();
    return true;
  }

  /** @param {Cell} cell @param {boolean} select leave the other corner where it is */
  move(cell, select) {
    this.cursor = cell;
    if (!select) this.anchor = cell;
    this.on.moved(cell);
    this.draw();
  }
}

/** The colours of a view as a bar.
 * @param {HTMLCanvasElement} canvas @param {View["kind"]} kind @param {number} low @param {number} high */
export function drawScale(canvas, kind, low, high) {
  const c = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const mode = scheme();
  for (let x = 0; x < canvas.width; x++) {
    const value = low + ((high - low) * x) / (canvas.width - 1);
    c.fillStyle = css(kind === "diverging" ? diverging(value, high, mode) : sequential(value, low, high, mode));
    c.fillRect(x, 0, 1, canvas.height);
  }
}

/** A schedule over depth, with the layers that read it.
 * @param {HTMLCanvasElement} canvas @param {{values: (number|null)[], points: (number|null)[]}} curve */
export function drawCurve(canvas, curve) {
  const c = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth || 300, 60];
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  c.setTransform(ratio, 0, 0, ratio, 0, 0);
  const style = getComputedStyle(canvas);
  const logs = [...curve.values, ...curve.points].filter((v) => v !== null && v > 0).map((v) => Math.log(/** @type {number} */ (v)));
  const [low, high] = [Math.min(0, ...logs), Math.max(0, ...logs)];
  const y = (/** @type {number} */ v) => 6 + (high > low ? ((high - Math.log(v)) / (high - low)) * (height - 12) : (height - 12) / 2);
  const x = (/** @type {number} */ i, /** @type {number} */ n) => 4 + (n > 1 ? (i / (n - 1)) * (width - 8) : 0);
  c.strokeStyle = style.getPropertyValue("--line");
  c.beginPath();
  c.moveTo(0, y(1));
  c.lineTo(width, y(1));
  c.stroke();
  c.strokeStyle = style.getPropertyValue("--accent");
  c.lineWidth = 2;
  c.beginPath();
  curve.values.forEach((v, i) => v !== null && v > 0 && c.lineTo(x(i, curve.values.length), y(v)));
  c.stroke();
  c.fillStyle = style.getPropertyValue("--mark");
  curve.points.forEach((v, i) => v !== null && v > 0 && c.fillRect(x(i, curve.points.length) - 1.5, y(v) - 1.5, 3, 3));
  canvas.setAttribute("aria-label", `The schedule over depth, T from ${short(Math.exp(low))} to ${short(Math.exp(high))}`);
}
