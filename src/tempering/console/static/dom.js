// Small helpers for elements. Text is always set as text, never as HTML.

/** The element with an id.
 * @param {string} id @returns {any} */
export function at(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found;
}

/** A new element.
 * @param {string} tag @param {Record<string, any>} [properties] @param {...(Node|string)} children
 * @returns {any} */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else /** @type {any} */ (element)[name] = value;
  }
  element.append(...children);
  return element;
}

/** A function that waits until it was not called for a while.
 * @param {number} wait ms @param {() => void} act */
export function calm(wait, act) {
  let timer = 0;
  const call = () => {
    clearTimeout(timer);
    timer = window.setTimeout(act, wait);
  };
  call.cancel = () => clearTimeout(timer);
  return call;
}

/** Offer a file for download.
 * @param {string} name @param {string} text @param {string} kind */
export function download(name, text, kind) {
  const link = make("a", { href: `data:${kind};charset=utf-8,${encodeURIComponent(text)}`, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

/** The colours that the system asks for. @returns {"light"|"dark"} */
export function scheme() {
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}
