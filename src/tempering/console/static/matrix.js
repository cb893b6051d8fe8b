// Temperatures of heads, rows[layer][head], as values: nothing here touches the page.

/**
 * A profile as the page and the server exchange it.
 * @typedef {{rows: number[][], rules: (string|null)[], pattern: string|null}} Profile
 * @typedef {{name: string, profile: Profile, room: number, text: string, amplitude: number|null}} Column
 * @typedef {{columns: Column[], active: number}} Painting columns: side by side; active: the one that is painted
 * @typedef {{set: number} | {times: number}} Brush
 * @typedef {[number, number]} Cell layer of the profile, head
 */

/** T = 1 for every head.
 * @param {number[]} heads of each layer
 * @returns {Profile} */
export function neutral(heads) {
  return { rows: heads.map((n) => new Array(n).fill(1)), rules: heads.map(() => null), pattern: null };
}

/** What a brush's text means: "1.2" sets T, "x 1.1" (or "*1.1", "/1.1") multiplies it.
 * @param {string} text
 * @returns {Brush} */
export function brushOf(text) {
  const found = /^\s*([x×*/÷])?\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*$/i.exec(text);
  const value = found ? Number(found[2]) : NaN;
  if (!found || !(value > 0) || !Number.isFinite(value)) {
    throw new Error(`"${text.trim()}" is no brush: write a temperature such as 1.2, or x 1.1 to multiply`);
  }
  if (!found[1]) return { set: value };
  return { times: "/÷".includes(found[1]) ? 1 / value : value };
}

/** Rows with some cells painted; rows that don't change are the same objects.
 * @param {number[][]} rows
 * @param {Cell[]} cells
 * @param {Brush} brush
 * @param {{coldest: number, hottest: number}} bounds
 * @returns {number[][]} */
export function painted(rows, cells, brush, bounds) {
  const found = rows.slice();
  for (const [layer, head] of cells) {
    const value = "set" in brush ? brush.set : rows[layer][head] * brush.times;
    if (!(value >= bounds.coldest && value <= bounds.hottest)) {
      throw new Error(
        `layer ${layer}, head ${head}: T = ${short(value)} is outside of ` +
          `${bounds.coldest} to ${bounds.hottest}; nothing was painted`,
      );
    }
    if (found[layer] === rows[layer]) found[layer] = rows[layer].slice();
    found[layer][head] = value;
  }
  return found;
}

/** The cells of a rectangle between two corners; layers have as many heads as they have.
 * @param {Cell} from
 * @param {Cell} to
 * @param {number[]} heads of each layer
 * @returns {Cell[]} */
export function rectangle(from, to, heads) {
  /** @type {Cell[]} */
  const cells = [];
  for (let l = Math.min(from[0], to[0]); l <= Math.max(from[0], to[0]); l++) {
    for (let h = Math.min(from[1], to[1]); h <= Math.max(from[1], to[1]); h++) {
      if (l >= 0 && l < heads.length && h >= 0 && h < heads[l]) cells.push([l, h]);
    }
  }
  return cells;
}

/** The cells on the straight line between two, so that a quick drag leaves no gaps.
 * @param {Cell} from
 * @param {Cell} to
 * @returns {Cell[]} */
export function line(from, to) {
  const steps = Math.max(Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]));
  /** @type {Cell[]} */
  const cells = [];
  for (let i = 0; i <= steps; i++) {
    const t = steps ? i / steps : 0;
    cells.push([Math.round(from[0] + t * (to[0] - from[0])), Math.round(from[1] + t * (to[1] - from[1]))]);
  }
  return cells;
}

/** T^room for every head: 0 is the untempered model, 1 the profile, -1 its mirror image.
 * @param {number[][]} rows
 * @param {number} room
 * @returns {number[][]} */
export function withRoom(rows, room) {
  return room === 1 ? rows : rows.map((row) => row.map((t) => t ** room));
}

/** log(a / b) of every head.
 * @param {number[][]} a
 * @param {number[][]} b
 * @returns {number[][]} */
export function difference(a, b) {
  return a.map((row, l) => row.map((t, h) => Math.log(t / b[l][h])));
}

/** Whether every head has the same temperature in both.
 * @param {number[][]} a
 * @param {number[][]} b */
export function sameRows(a, b) {
  return a.length === b.length && a.every((row, l) => row === b[l] || (row.length === b[l].length && row.every((t, h) => t === b[l][h])));
}

/** Whether every temperature is 1 and no layer has a rule.
 * @param {Profile} profile */
export function isNeutral(profile) {
  return profile.rows.every((row) => row.every((t) => t === 1)) && profile.rules.every((r) => !r);
}

/** A row in a link: one number where all heads have it.
 * @param {number[][]} rows
 * @returns {(number|number[])[]} */
export function packedRows(rows) {
  return rows.map((row) => (row.every((t) => t === row[0]) ? row[0] : row));
}

/** The inverse of `packedRows`; throws unless the rows fit the model.
 * @param {unknown} packed
 * @param {number[]} heads
 * @returns {number[][]} */
export function unpackedRows(packed, heads) {
  if (!Array.isArray(packed) || packed.length !== heads.length) {
    throw new Error(`the link's profile has ${Array.isArray(packed) ? packed.length : "no"} layers, the model has ${heads.length}`);
  }
  return packed.map((row, l) => {
    const values = Array.isArray(row) ? row : new Array(heads[l]).fill(row);
    if (values.length !== heads[l] || !values.every((t) => typeof t === "number" && t > 0 && Number.isFinite(t))) {
      throw new Error(`layer ${l} of the link's profile doesn't fit: the model has ${heads[l]} heads there`);
    }
    return values;
  });
}

/** @param {Profile} profile */
export function packedProfile({ rows, rules, pattern }) {
  return { pattern, rows: packedRows(rows), ...(rules.some((r) => r) ? { rules } : {}) };
}

/** The inverse of `packedProfile`; throws unless it fits the model.
 * @param {any} packed
 * @param {number[]} heads
 * @returns {Profile} */
export function unpackedProfile({ pattern, rows, rules }, heads) {
  return {
    rows: unpackedRows(rows, heads),
    rules: Array.isArray(rules) && rules.length === heads.length ? rules.map((r) => (r ? String(r) : null)) : heads.map(() => null),
    pattern: pattern == null ? null : String(pattern),
  };
}

/** A number in few digits.
 * @param {number} value */
export function short(value) {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e5)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}
