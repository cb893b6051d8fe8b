// Colours that carry numbers: readable to the colour-blind, in light and dark.

/** @typedef {[number, number, number]} RGB each 0..255 */

// Blue and orange differ to every common kind of colour blindness; lightness carries the size too.
/** @type {Record<"light"|"dark", {cold: RGB[], hot: RGB[], ground: RGB}>} */
const DIVERGING = {
  light: { ground: [244, 243, 240], cold: [[146, 187, 224], [28, 82, 150]], hot: [[244, 181, 120], [178, 62, 8]] },
  dark: { ground: [38, 40, 46], cold: [[52, 92, 148], [126, 186, 246]], hot: [[142, 74, 26], [255, 172, 92]] },
};
// Lightness rises (light: falls) evenly, after cividis (Nuñez et al. 2018).
/** @type {Record<"light"|"dark", RGB[]>} */
const SEQUENTIAL = {
  light: [[246, 242, 214], [196, 180, 116], [124, 123, 120], [52, 72, 110], [0, 32, 77]],
  dark: [[22, 30, 56], [52, 72, 110], [124, 123, 120], [190, 174, 108], [254, 232, 98]],
};

/** @param {RGB} a @param {RGB} b @param {number} t @returns {RGB} */
function mix(a, b, t) {
  const at = (/** @type {0|1|2} */ i) => Math.round(a[i] + t * (b[i] - a[i]));
  return [at(0), at(1), at(2)];
}

/** @param {RGB[]} stops @param {number} t 0..1 @returns {RGB} */
function along(stops, t) {
  const place = Math.min(1, Math.max(0, t)) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(place));
  return mix(stops[low], stops[low + 1], place - low);
}

/** Colour of a signed number: cold below 0, hot above.
 * @param {number} value
 * @param {number} reach the value of the fullest colour
 * @param {"light"|"dark"} scheme
 * @returns {RGB} */
export function diverging(value, reach, scheme) {
  const { ground, cold, hot } = DIVERGING[scheme];
  return along([ground, ...(value < 0 ? cold : hot)], reach > 0 ? Math.abs(value) / reach : 0);
}

/** Colour of a number between two bounds.
 * @param {number} value @param {number} low @param {number} high @param {"light"|"dark"} scheme
 * @returns {RGB} */
export function sequential(value, low, high, scheme) {
  return along(SEQUENTIAL[scheme], high > low ? (value - low) / (high - low) : 0);
}

/** @param {RGB} colour */
export function css(colour) {
  return `rgb(${colour[0]} ${colour[1]} ${colour[2]})`;
}

/** Relative luminance of WCAG 2.
 * @param {RGB} colour */
function luminance(colour) {
  const [r, g, b] = colour.map((c) => {
    const x = c / 255;
    return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** Contrast ratio of WCAG 2, 1 to 21.
 * @param {RGB} a @param {RGB} b */
export function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}

/** Black or white, whichever stands out from a colour: 4.58 at least.
 * @param {RGB} ground @returns {RGB} */
export function inkOn(ground) {
  return contrast(ground, [0, 0, 0]) >= contrast(ground, [255, 255, 255]) ? [0, 0, 0] : [255, 255, 255];
}
