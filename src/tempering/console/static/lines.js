// A long context as lines of tokens, of which only those in view are in the page.

export const PER_LINE = 12;

/** @param {number} tokens */
export function lineCount(tokens) {
  return Math.ceil(tokens / PER_LINE);
}

/** The lines to draw for a scrolled view, a few more on both sides.
 * @param {number} top pixels scrolled @param {number} height of the view
 * @param {number} line height of a line @param {number} count of lines
 * @returns {[number, number]} the first, and one past the last */
export function inView(top, height, line, count) {
  const first = Math.max(0, Math.floor(top / line) - 4);
  return [Math.min(first, count), Math.min(count, Math.ceil((top + height) / line) + 4)];
}

/** The places of the largest values, the largest first.
 * @param {ArrayLike<number>} values @param {number} most */
export function largest(values, most) {
  /** @type {number[]} */
  const places = [];
  for (let i = 0; i < values.length; i++) {
    if (places.length === most && !(values[i] > values[places[most - 1]])) continue;
    let at = places.length;
    while (at > 0 && values[i] > values[places[at - 1]]) at--;
    places.splice(at, 0, i);
    if (places.length > most) places.pop();
  }
  return places;
}

/** A token as one can see it: spaces and line breaks have signs.
 * @param {string} text */
export function visible(text) {
  return text === "" ? "∅" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +| +$/g, (s) => "␣".repeat(s.length));
}
