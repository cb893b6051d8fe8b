// The page's state in the fragment of its address: a browser doesn't send it to any server.

/** @param {Uint8Array} bytes */
function base64url(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** @param {string} text */
function bytesOf(text) {
  const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  return Uint8Array.from(binary, (c) => c.charCodeAt(0));
}

/** @param {Uint8Array} bytes @param {CompressionStream|DecompressionStream} through */
async function piped(bytes, through) {
  const stream = new Blob([/** @type {BlobPart} */ (bytes)]).stream().pipeThrough(through);
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const MOST = 32 * 2 ** 20; // bytes of an unpacked state

/** @param {unknown} state @returns {Promise<string>} */
export async function packed(state) {
  const bytes = new TextEncoder().encode(JSON.stringify(state));
  return `s=${base64url(await piped(bytes, new CompressionStream("deflate-raw")))}`;
}

/** The state in a fragment, or null where there is none; throws where it is damaged.
 * @param {string} fragment @returns {Promise<any>} */
export async function unpacked(fragment) {
  const text = fragment.replace(/^#/, "");
  if (!text.startsWith("s=")) return null;
  try {
    const reader = new Blob([/** @type {BlobPart} */ (bytesOf(text.slice(2)))])
      .stream()
      .pipeThrough(new DecompressionStream("deflate-raw"))
      .getReader();
    const parts = [];
    let size = 0;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      size += value.length;
      if (size > MOST) throw new Error("too long");
      parts.push(value);
    }
    const bytes = new Uint8Array(size);
    let at = 0;
    for (const part of parts) {
      bytes.set(part, at);
      at += part.length;
    }
    const state = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
    if (typeof state !== "object" || state === null) throw new Error("no state");
    return state;
  } catch {
    throw new Error("the part of the address after # is damaged (a link that was cut?); the page begins anew");
  }
}
